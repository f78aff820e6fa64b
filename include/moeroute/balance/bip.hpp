// Balancing as an integer program: prices of tokens and experts, alternating, so that no expert is
// wanted by more tokens than it has room for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include <moeroute/balance/check_counts.hpp>
#include <moeroute/balance/dual_prices.hpp>

namespace moeroute {

/// Where the prices of a batch start.
enum class price_start {
  previous,  ///< where the batch before ended
  zero,      ///< anew
};

struct bip_options {
  index_t k = 1;
  int iterations = 4;
  price_start start = price_start::previous;
  /// [E], the share of the k T places that each expert has, of any sum. Copied; empty: equal.
  std::span<const float> share{};
};

/// Prices per expert, subtracted from the scores before the choice: bias() = -price.
///
/// Each iteration: p_t = max(0, (k+1)-th largest of s_te - q_e), then q_e = max(0, (floor(k T /
/// E) + 1)-th largest of s_te - p_t). Route the same batch by top-k of s + bias(); weights are of
/// s. Source: BIP-based balancing (arXiv 2502.15451), as the dual of its linear relaxation.
class bip_balancer {
 public:
  /// Throws: error where E is outside [1, 2^20], k outside [1, E] or iterations outside [0, 1000].
  explicit bip_balancer(index_t experts, const bip_options& options) : options_(options) {
    check_range("bip_balancer", "experts", experts, 1, max_experts);
    check_range("bip_balancer", "k", options.k, 1, experts);
    check_range("bip_balancer", "iterations", options.iterations, 0, 1000);
    price_.assign(static_cast<std::size_t>(experts), 0.0f);
    bias_.assign(price_.size(), 0.0f);
    part_ = detail::parts_of("bip_balancer", options.share, experts);
    options_.share = {};
  }

  /// Fits the prices to one batch of scores; without tokens they stay.
  ///
  /// Shapes: scores [T, E]; mask [T] or empty, 0: the token takes no part. Scores that are not
  /// finite count as never chosen. Throws: error where a size differs. Cost: about a row selection
  /// and a column selection per iteration; no allocation once ws is warm. Determinism: the same
  /// bits on every ISA, executor and thread count.
  template <executor Exec = serial, class A = simd::default_arch>
  void update(matrix_view<const float> scores, std::span<const std::uint8_t> mask, workspace& ws,
              const Exec& exec = {}) {
    const auto experts = static_cast<index_t>(price_.size());
    detail::check_scores("bip_balancer", scores, mask, experts);
    token_price_.resize(scores.rows);
    const int workers = worker_slots::count(exec.concurrency());
    const auto memory = ws.carve([&](scratch& tape) {
      return detail::dual_memory::carve(tape, scores.rows, experts, options_.k + 1, workers);
    });
    detail::dual_prices<A, Exec> prices(scores, mask, memory, workers, exec);
    const index_t tokens = prices.tokens();
    std::fill_n(token_price_.data(), scores.rows, 0.0f);
    if (tokens == 0) return;
    if (options_.start == price_start::zero) set_prices([](std::size_t) { return 0.0f; });
    for (int i = 0; i < options_.iterations; ++i) {
      prices.price_tokens(bias_.data(), options_.k + 1, [](float x) { return std::max(0.0f, x); });
      if (part_.empty())
        prices.price_experts(options_.k * tokens / experts + 1, price_.data());
      else
        prices.price_experts(static_cast<double>(options_.k * tokens), part_, tokens + 1,
                             price_.data());
      set_prices([&](std::size_t e) { return std::max(0.0f, price_[e]); });
    }
    if (options_.iterations > 0)
      for (index_t t = 0; t < scores.rows; ++t) token_price_[t] = prices.price_of(t);
  }
  template <executor Exec = serial, class A = simd::default_arch>
  void update(matrix_view<const float> scores, workspace& ws, const Exec& exec = {}) {
    update<Exec, A>(scores, {}, ws, exec);
  }

  /// [E], to be added to the scores; never above 0.
  std::span<const float> bias() const { return bias_; }
  /// [E], q.
  std::span<const float> prices() const { return price_; }
  /// [T], p of the last batch.
  std::span<const float> token_prices() const { return token_price_; }

 private:
  template <class F>
  void set_prices(F&& price) {
    for (std::size_t e = 0; e < price_.size(); ++e) {
      price_[e] = price(e);
      bias_[e] = 0.0f - price_[e];
    }
  }

  bip_options options_;
  std::vector<float> price_, bias_;
  std::vector<double> part_;
  buffer<float> token_price_;
};

/// The same for tokens that arrive one by one: each is priced by the experts' prices so far, and
/// then raises them.
///
/// An expert keeps the floor(k N / E) + 1 best of its tokens in a heap, N being the tokens of the
/// window; its price is the least of them once there are so many. Cost: of a token O(E log(k N /
/// E)) at worst, no allocation; memory E (k N / E + 1) floats. With shares [E], of any sum, an
/// expert keeps the part of the k N that is its own instead of k N / E.
class bip_online {
 public:
  /// Throws: error where E is outside [1, 2^20], k outside [1, E] or window outside [1, 2^31).
  bip_online(index_t experts, index_t k, index_t window, std::span<const float> share = {})
      : k_(k) {
    check_range("bip_online", "experts", experts, 1, max_experts);
    check_range("bip_online", "k", k, 1, experts);
    check_range("bip_online", "window", window, 1, std::int32_t{0x7fffffff});
    const std::vector<double> part = detail::parts_of("bip_online", share, experts);
    room_.assign(static_cast<std::size_t>(experts), k * window / experts + 1);
    for (std::size_t e = 0; e < part.size(); ++e)
      room_[e] = detail::whole_places(static_cast<double>(k * window), part[e]) + 1;
    first_.push_back(0);
    for (const index_t room : room_) first_.push_back(first_.back() + room);
    heap_.resize(first_.back());
    row_.resize(experts);
    filled_.assign(static_cast<std::size_t>(experts), 0);
    bias_.assign(filled_.size(), 0.0f);
  }

  /// Route the token by bias() first, then call this. Shapes: scores [E]; what is not finite takes
  /// no part. Throws: error where the length differs.
  void update(std::span<const float> scores) {
    const auto experts = static_cast<index_t>(bias_.size());
    check_size("bip_online", "scores.size()", static_cast<index_t>(scores.size()), experts);
    index_t n = 0;
    for (std::size_t e = 0; e < scores.size(); ++e)
      if (std::isfinite(scores[e])) row_[n++] = scores[e] + bias_[e];
    float price = 0.0f;
    if (n > k_) {
      std::nth_element(row_.data(), row_.data() + k_, row_.data() + n, std::greater<>());
      price = std::max(0.0f, row_[k_]);
    }
    for (std::size_t e = 0; e < scores.size(); ++e)
      if (std::isfinite(scores[e])) offer(e, scores[e] - price);
  }

  /// Forgets all tokens; the prices stay until the heaps are full again.
  void next_window() { std::fill(filled_.begin(), filled_.end(), index_t{0}); }

  std::span<const float> bias() const { return bias_; }

 private:
  void offer(std::size_t expert, float value) {
    float* const heap = heap_.data() + first_[expert];
    const index_t room = room_[expert];
    index_t& filled = filled_[expert];
    if (filled < room) {
      heap[filled++] = value;
      std::push_heap(heap, heap + filled, std::greater<>());
    } else if (value > heap[0]) {
      std::pop_heap(heap, heap + room, std::greater<>());
      heap[room - 1] = value;
      std::push_heap(heap, heap + room, std::greater<>());
    }
    if (filled == room) bias_[expert] = 0.0f - std::max(0.0f, heap[0]);
  }

  index_t k_;
  buffer<float> heap_, row_;
  std::vector<index_t> room_, first_, filled_;  // first_: where an expert's heap begins
  std::vector<float> bias_;
};

}  // namespace moeroute
