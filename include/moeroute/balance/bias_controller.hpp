// Balancing without a loss: a bias per expert that moves the choice, corrected from the counts of
// each batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

#include <moeroute/balance/check_counts.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// How a bias follows its expert's error.
enum class bias_rule {
  sign,            ///< b += u sign(error); sign(0) = 0
  proportional,    ///< b += u error
  multiplicative,  ///< factors that start at 1 and are to multiply the scores; f += u sign(error)
};

/// What an expert's error is, from its count c and the mean count.
enum class bias_error {
  over_mean,   ///< (mean - c) / mean: 1 for an expert without tokens
  over_total,  ///< (mean - c) / sum of counts
  tokens,      ///< mean - c: the dual subgradient of the assignment problem
};

/// How the step shrinks with the number n = 1, 2, ... of the update.
enum class step_decay {
  none,          ///< u
  inverse_root,  ///< u / sqrt(n)
  inverse,       ///< u / n
};

/// What becomes of the mean of the biases, which the choice does not depend on.
enum class bias_centre {
  free,  ///< it wanders
  mean,  ///< subtracted after every update
};

struct bias_options {
  bias_rule rule = bias_rule::sign;
  bias_error error = bias_error::over_mean;  ///< the sign does not depend on it
  step_decay decay = step_decay::none;
  bias_centre centre = bias_centre::free;
  float step = 1e-3f;          ///< u; 0 freezes
  float least_factor = 1e-3f;  ///< multiplicative factors stay at or above it
  /// [E], the share of the load that each expert is to have, of any sum: experts or devices that
  /// are not alike. Copied; empty: equal shares. An expert's mean is then its own part of the sum.
  std::span<const float> share{};
};

/// The bias of auxiliary-loss-free balancing.
///
/// bias() feeds a router's selection_bias or router_tensors::bias; update() takes the counts of one
/// global batch, summed over ranks by the caller. Multiplicative factors are to multiply the scores
/// that the choice is made on; log_factors() turns them into a bias for routers that choose on
/// logarithms of scores, as a softmax does on its logits.
/// Cost: update O(E), no allocation. Determinism: the same bits on every ISA.
/// Source: Wang et al. 2024 (sign, proportional, multiplicative); Han and Zhong 2025 (decays).
/// Example:
///
///     bias_controller balance(8, {.step = 1e-3f});
///     const router r{sigmoid{}, top_k{.k = 2}, sum_normalized, selection_bias(balance.bias())};
///     route(r, logits, ws, choices);
///     std::vector<std::int64_t> counts(8);
///     count_choices(choices, {}, std::span(counts));
///     balance.update(counts);            // the router sees the new bias
class bias_controller {
 public:
  /// Throws: error where E is outside [1, 2^20], or step or least_factor is negative or no number.
  explicit bias_controller(index_t experts, const bias_options& options = {}) : options_(options) {
    check_range("bias_controller", "experts", experts, 1, max_experts);
    detail::check_nonnegative("bias_controller", "step", static_cast<double>(options.step));
    detail::check_nonnegative("bias_controller", "least_factor",
                              static_cast<double>(options.least_factor));
    bias_.assign(static_cast<std::size_t>(experts), multiplies() ? 1.0f : 0.0f);
    part_ = detail::parts_of("bias_controller", options.share, experts);
    options_.share = {};
  }

  /// Corrects the bias by the counts of one batch. A batch without choices changes nothing.
  ///
  /// Shapes: counts [E]. Throws: error where the length differs, or a count is negative or NaN.
  template <class N>
    requires std::is_arithmetic_v<N>
  void update(std::span<const N> counts) {
    const auto experts = static_cast<index_t>(bias_.size());
    const double sum = detail::checked_sum("bias_controller", counts, experts);
    if (!(sum > 0.0)) return;
    ++updates_;
    const double even = sum / static_cast<double>(experts), u = step();
    for (std::size_t e = 0; e < bias_.size(); ++e) {
      const double mean = part_.empty() ? even : sum * part_[e];
      const double unit = options_.error == bias_error::over_mean    ? mean
                          : options_.error == bias_error::over_total ? sum
                                                                     : 1.0;
      const double gap = mean - static_cast<double>(counts[e]);
      const double error = options_.rule == bias_rule::proportional
                               ? gap / unit
                               : static_cast<double>((gap > 0.0) - (gap < 0.0));
      const auto moved = static_cast<float>(static_cast<double>(bias_[e]) + u * error);
      bias_[e] = multiplies() ? std::max(moved, options_.least_factor) : moved;
    }
    if (options_.centre == bias_centre::mean) recentre();
  }
  template <class List>
  void update(const List& counts) {
    update(std::span<const typename List::value_type>(counts));
  }

  /// [E], to be added to the scores, or to multiply them under bias_rule::multiplicative.
  std::span<const float> bias() const { return bias_; }
  /// For checkpoints.
  std::span<float> bias() { return bias_; }

  /// out[e] = ln f_e of multiplicative factors. Shapes: out [E].
  void log_factors(std::span<float> out) const {
    check_size("bias_controller", "out.size()", static_cast<index_t>(out.size()),
               static_cast<index_t>(bias_.size()));
    for (std::size_t e = 0; e < bias_.size(); ++e) out[e] = std::log(bias_[e]);
  }

  /// Another step: 0 for the last stretch of a training.
  void set_step(float step) {
    detail::check_nonnegative("bias_controller", "step", static_cast<double>(step));
    options_.step = step;
  }
  const bias_options& options() const { return options_; }
  std::int64_t updates() const { return updates_; }

 private:
  bool multiplies() const { return options_.rule == bias_rule::multiplicative; }

  double step() const {
    const auto n = static_cast<double>(updates_), u = static_cast<double>(options_.step);
    if (options_.decay == step_decay::inverse_root) return u / std::sqrt(n);
    return options_.decay == step_decay::inverse ? u / n : u;
  }

  // A common factor is as neutral as a common summand.
  void recentre() {
    double sum = 0.0;
    for (const float b : bias_) sum += static_cast<double>(b);
    const double mean = sum / static_cast<double>(bias_.size());
    for (float& b : bias_)
      b = static_cast<float>(multiplies() ? static_cast<double>(b) / mean
                                          : static_cast<double>(b) - mean);
  }

  bias_options options_;
  std::vector<float> bias_;
  std::vector<double> part_;
  std::int64_t updates_ = 0;
};

struct real_expert_options {
  index_t experts = 1;       ///< that compute: the first ones
  index_t zero_experts = 0;  ///< identity experts, which follow them
  index_t k = 1;
  float target = 1.0f;  ///< computing experts per token, at most k
  float step = 1e-3f;
};

/// Holds the mean number of computing experts per token at a target, beside identity experts that
/// cost nothing, and shares their load evenly: b_e += u (target / (k E) - c_e / sum c) for the
/// computing experts; identity experts keep bias 0.
///
/// Cost: update O(E), no allocation. Source: LongCat-Flash (2025).
class real_expert_controller {
 public:
  /// Throws: error where E < 1, zero_experts < 0, k is outside [1, E + zero_experts], target
  /// outside [0, k] or step negative.
  explicit real_expert_controller(const real_expert_options& options) : options_(options) {
    constexpr const char* where = "real_expert_controller";
    check_range(where, "experts", options.experts, 1, max_experts);
    check_range(where, "zero_experts", options.zero_experts, 0, max_experts - options.experts);
    check_range(where, "k", options.k, 1, columns());
    detail::check_between(where, "target", static_cast<double>(options.target), 0.0,
                          static_cast<double>(options.k));
    detail::check_nonnegative(where, "step", static_cast<double>(options.step));
    bias_.assign(static_cast<std::size_t>(columns()), 0.0f);
  }

  /// Shapes: counts [E + zero_experts]. Throws: error where the length differs, or a count is
  /// negative or NaN. A batch without choices changes nothing.
  template <class N>
    requires std::is_arithmetic_v<N>
  void update(std::span<const N> counts) {
    const double sum = detail::checked_sum("real_expert_controller", counts, columns());
    if (!(sum > 0.0)) return;
    const double wanted =
        static_cast<double>(options_.target) / static_cast<double>(options_.k * options_.experts);
    for (std::size_t e = 0; e < static_cast<std::size_t>(options_.experts); ++e)
      bias_[e] += static_cast<float>(static_cast<double>(options_.step) *
                                     (wanted - static_cast<double>(counts[e]) / sum));
  }
  template <class List>
  void update(const List& counts) {
    update(std::span<const typename List::value_type>(counts));
  }

  std::span<const float> bias() const { return bias_; }
  std::span<float> bias() { return bias_; }

 private:
  index_t columns() const { return options_.experts + options_.zero_experts; }

  real_expert_options options_;
  std::vector<float> bias_;
};

}  // namespace moeroute
