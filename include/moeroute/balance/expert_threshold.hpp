// Thresholds per expert that let each take its share of the tokens on average, without looking at
// the batch it routes.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <moeroute/balance/dual_prices.hpp>

namespace moeroute {

struct expert_threshold_options {
  float k = 1.0f;     ///< experts per token, on average
  float ema = 0.99f;  ///< share of the old threshold that stays
};

/// A token uses expert e where its score is above thresholds()[e]: as many experts as there are.
///
/// observe() finds each expert's floor(k T / E)-th largest score of a batch; update() moves the
/// thresholds there by the moving average, the first time all the way. bias() = -threshold makes it
/// a threshold_router's 0. Source: Expert threshold routing (arXiv 2603.11535), as summarised.
class expert_thresholds {
 public:
  /// Throws: error where E is outside [1, 2^20], k outside (0, E] or ema outside [0, 1].
  explicit expert_thresholds(index_t experts, const expert_threshold_options& options)
      : options_(options) {
    check_range("expert_thresholds", "experts", experts, 1, max_experts);
    detail::check_between("expert_thresholds", "k", static_cast<double>(options.k), 1e-6,
                          static_cast<double>(experts));
    detail::check_between("expert_thresholds", "ema", static_cast<double>(options.ema), 0.0, 1.0);
    threshold_.assign(static_cast<std::size_t>(experts), 0.0f);
    bias_.assign(threshold_.size(), 0.0f);
    estimate_.resize(threshold_.size());
    sums_.assign(2 * threshold_.size(), 0.0);
  }

  /// Adds the estimate of one batch; a batch with no whole token for each expert has none.
  ///
  /// Shapes: scores [T, E]; mask [T] or empty. Throws: error where a size differs. Cost: one column
  /// selection; no allocation once ws is warm. Determinism: the same bits on every ISA, executor
  /// and thread count.
  template <executor Exec = serial, class A = simd::default_arch>
  void observe(matrix_view<const float> scores, std::span<const std::uint8_t> mask, workspace& ws,
               const Exec& exec = {}) {
    const auto experts = static_cast<index_t>(threshold_.size());
    detail::check_scores("expert_thresholds", scores, mask, experts);
    const int workers = worker_slots::count(exec.concurrency());
    const auto memory = ws.carve([&](scratch& tape) {
      return detail::dual_memory::carve(tape, scores.rows, experts, 1, workers);
    });
    detail::dual_prices<A, Exec> prices(scores, mask, memory, workers, exec);
    const auto rank =
        static_cast<index_t>(static_cast<double>(options_.k) *
                             static_cast<double>(prices.tokens()) / static_cast<double>(experts));
    if (rank < 1) return;
    prices.price_tokens_at_zero();
    prices.price_experts(rank, estimate_.data());
    for (std::size_t e = 0; e < threshold_.size(); ++e) {
      if (!std::isfinite(estimate_[e])) continue;
      sums_[e] += static_cast<double>(estimate_[e]);
      sums_[threshold_.size() + e] += 1.0;
    }
  }
  template <executor Exec = serial, class A = simd::default_arch>
  void observe(matrix_view<const float> scores, workspace& ws, const Exec& exec = {}) {
    observe<Exec, A>(scores, {}, ws, exec);
  }

  /// [2 E], to be summed over ranks before update(): estimates and how many there are.
  std::span<double> sums() { return sums_; }

  void update() {
    const std::size_t experts = threshold_.size();
    bool any = false;
    for (std::size_t e = 0; e < experts; ++e) {
      const double n = sums_[experts + e], old = static_cast<double>(threshold_[e]);
      if (!(n > 0.0)) continue;
      const double keep = updates_ == 0 ? 0.0 : static_cast<double>(options_.ema);
      threshold_[e] = static_cast<float>(keep * old + (1.0 - keep) * (sums_[e] / n));
      bias_[e] = -threshold_[e];
      any = true;
    }
    updates_ += any;
    std::fill(sums_.begin(), sums_.end(), 0.0);
  }

  std::span<const float> thresholds() const { return threshold_; }
  std::span<const float> bias() const { return bias_; }

 private:
  expert_threshold_options options_;
  std::vector<float> threshold_, bias_, estimate_;
  std::vector<double> sums_;
  std::int64_t updates_ = 0;
};

}  // namespace moeroute
