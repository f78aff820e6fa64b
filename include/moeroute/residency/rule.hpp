// How a choice gives way to what is in memory: the rules, their fields, and what they report.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/data/resident_set.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/marked_columns.hpp>

namespace moeroute {

/// What makes a token take an expert that is in memory in place of one that is not. `s` are choice
/// scores (score + bias, or logits where the router chooses by them), ranks are by s, and the range
/// is that of the token's own finite s.
enum class residency_kind {
  off,          ///< the router as it is
  cache_prior,  ///< the k best of s + strength * range * [in memory] (arXiv 2412.00099)
  max_rank,     ///< first those in memory among the best `ranks`, then by rank (arXiv 2412.00099)
  mass_threshold,  ///< as max_rank among the shortest prefix whose softmax mass reaches `strength`
  margin_swap,     ///< a missing one for the best in memory within strength * range below it
  drop_cold,       ///< a missing one below strength * the row's largest weight is left out
  buddy,           ///< a missing one for the first of its buddies in memory (arXiv 2511.10054)
  within,          ///< those in memory only: what batch rules choose in (residency/union.hpp)
};

/// Which range a strength is measured in.
enum class score_range {
  own,      ///< the token's
  running,  ///< a mean over the tokens of the layer so far: residency_rule::running
};

/// What the weights of the others are when one is dropped.
enum class dropped_weight {
  lost,       ///< what they were
  shared_out  ///< scaled so that the row's sum is what it was: a normalising router's own
};

/// Who stands in for whom: each expert's buddies, best first.
///
/// Source: arXiv 2511.10054; q(f|e) = M(e, f) / sum over j of M(e, j), M the co-activation counts.
class buddy_table {
 public:
  buddy_table() = default;
  /// co_activations [E, E]: how often two experts served the same token; the diagonal is not read.
  ///
  /// Ensures: descending count, the lowest id among equals; experts never seen together are no
  /// buddies. Throws: error where the matrix is not square or a count is negative or NaN.
  buddy_table(matrix_view<const double> co_activations, index_t most) : most_(most) {
    const index_t n = co_activations.rows;
    check_size("buddy_table", "co_activations.cols", co_activations.cols, n);
    check_range("buddy_table", "experts", n, 1, max_experts);
    check_range("buddy_table", "most", most, 1, n);
    list_.assign(static_cast<std::size_t>(n * most), no_expert);
    std::vector<expert_id> order;
    for (expert_id e = 0; e < n; ++e) {
      order.clear();
      for (expert_id f = 0; f < n; ++f) {
        if (f == e) continue;
        if (!(co_activations(e, f) >= 0.0))
          fail_value("buddy_table", "co_activations", co_activations(e, f), ">= 0");
        if (co_activations(e, f) > 0.0) order.push_back(f);
      }
      std::sort(order.begin(), order.end(),
                greatest_first([&](expert_id f) { return co_activations(e, f); }));
      const auto kept = std::min(order.size(), static_cast<std::size_t>(most));
      std::copy_n(order.begin(), kept, list_.begin() + e * most);
    }
  }

  index_t experts() const { return most_ == 0 ? 0 : static_cast<index_t>(list_.size()) / most_; }
  index_t most() const { return most_; }
  /// Ends with no_expert where there are fewer.
  std::span<const expert_id> of(expert_id e) const {
    return {list_.data() + e * most_, static_cast<std::size_t>(most_)};
  }

 private:
  std::vector<expert_id> list_;
  index_t most_ = 0;
};

/// A mean of the tokens' ranges of choice scores: value = decay * value + (1 - decay) * range.
///
/// Updated between steps by whoever owns it, on the logits (or scores) that were chosen by.
class running_range {
 public:
  explicit running_range(float decay = 0.99f) : decay_(decay) {
    if (!(decay >= 0.0f && decay < 1.0f))
      fail_value("running_range", "decay", decay, "0 to below 1");
  }
  void update(matrix_view<const float> scores) {
    for (index_t t = 0; t < scores.rows; ++t) {
      const float now = simd::bounds_of<>(scores.row(t), scores.cols).range();
      value_ = seen_ ? value_ + (1.0f - decay_) * (now - value_) : now;
      seen_ = true;
    }
  }
  /// 0 before the first token.
  float value() const { return value_; }

 private:
  float decay_, value_ = 0.0f;
  bool seen_ = false;
};

/// A rule and its parameters; fields that a kind does not name are not read.
///
/// A strength (or ranks, of max_rank) of 0 is the plain router, to the bit.
struct residency_rule {
  residency_kind kind = residency_kind::off;
  float strength = 0.0f;  ///< lambda, P, tau or F of the kind
  index_t ranks = 0;      ///< M of max_rank; of mass_threshold and within the most, 0: no limit
  index_t forced = 1;     ///< the best so many ranks stay, whatever is in memory
  index_t swaps = 0;      ///< of margin_swap the most per token, 0: no limit
  score_range range = score_range::own;
  const running_range* running = nullptr;  ///< of score_range::running
  dropped_weight dropped = dropped_weight::shared_out;
  const buddy_table* buddies = nullptr;
  index_t search = 4;  ///< buddies that are looked at
  float least_entropy =
      0.0f;                   ///< nats of the row's softmax below which buddies stand in for nobody
  float most_missing = 1.0f;  ///< share of a token's experts missing above which they do not either

  /// Whether it can change anything.
  bool active() const {
    switch (kind) {
      case residency_kind::off: return false;
      case residency_kind::max_rank: return ranks > 0;
      case residency_kind::buddy: return search > 0;
      case residency_kind::within: return true;
      default: return strength > 0.0f;
    }
  }

  /// Throws: error where a field that the kind reads is out of its range.
  MOEROUTE_OUT_OF_LINE void check(index_t experts, index_t k) const {
    constexpr const char* where = "residency_rule";
    if (kind == residency_kind::off) return;
    if (!(strength >= 0.0f) || !std::isfinite(strength))
      fail_value(where, "strength", strength, "a finite number >= 0");
    if (kind == residency_kind::mass_threshold && strength > 1.0f)
      fail_value(where, "strength of mass_threshold", strength, "0 to 1");
    check_range(where, "forced", forced, 0, k);
    if (ranks != 0) check_range(where, "ranks", ranks, k, experts);
    check_range(where, "swaps", swaps, 0, max_experts);
    if (range == score_range::running && running == nullptr)
      fail(where, "range is running, and there is no running_range");
    if (kind != residency_kind::buddy) return;
    if (buddies == nullptr) fail(where, "kind is buddy, and there is no buddy_table");
    check_size(where, "buddies.experts()", buddies->experts(), experts);
    check_range(where, "search", search, 0, buddies->most());
    if (!(least_entropy >= 0.0f)) fail_value(where, "least_entropy", least_entropy, ">= 0");
    if (!(most_missing >= 0.0f && most_missing <= 1.0f))
      fail_value(where, "most_missing", most_missing, "0 to 1");
  }
};

inline const char* to_string(residency_kind kind) {
  switch (kind) {
    case residency_kind::off: return "off";
    case residency_kind::cache_prior: return "prior";
    case residency_kind::max_rank: return "maxrank";
    case residency_kind::mass_threshold: return "mass";
    case residency_kind::margin_swap: return "swap";
    case residency_kind::drop_cold: return "drop";
    case residency_kind::buddy: return "buddy";
    case residency_kind::within: return "within";
  }
  return "?";
}

/// What a rule did, summed over tokens. Routers on several threads may add to the same counts:
/// sums are of integers, so their order does not matter.
struct residency_counts {
  std::int64_t tokens = 0;
  std::int64_t plain_choices = 0;  ///< that the router alone would have made
  std::int64_t choices = 0;
  std::int64_t misses = 0;         ///< choices that are not in memory
  std::int64_t substitutions = 0;  ///< choices that are none of the router's own
  std::int64_t agreed = 0;         ///< choices that are
  std::int64_t dropped = 0;        ///< choices fewer than the router's own
  std::int64_t mass = 0;  ///< lost softmax mass in units of 2^-32; 0 without a column per expert

  double agreement() const { return ratio(agreed, plain_choices, 1.0); }
  double misses_per_token() const { return ratio(misses, tokens, 0.0); }
  /// Softmax mass (of the logits) of the router's own choices less that of those made, per token.
  double mass_lost() const { return ratio(mass, tokens, 0.0) * 0x1p-32; }

  void add(const residency_counts& more) {
    const auto sum = [](std::int64_t& to, std::int64_t n) {
      std::atomic_ref(to).fetch_add(n, std::memory_order_relaxed);
    };
    sum(tokens, more.tokens);
    sum(plain_choices, more.plain_choices);
    sum(choices, more.choices);
    sum(misses, more.misses);
    sum(substitutions, more.substitutions);
    sum(agreed, more.agreed);
    sum(dropped, more.dropped);
    sum(mass, more.mass);
  }

 private:
  static double ratio(std::int64_t a, std::int64_t b, double none) {
    return b == 0 ? none : static_cast<double>(a) / static_cast<double>(b);
  }
};

}  // namespace moeroute
