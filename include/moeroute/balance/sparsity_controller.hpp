// Controllers of how many experts a token uses, where the router leaves that open.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <moeroute/balance/check_counts.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// What lambda does where the sparsity is exactly the target.
enum class at_target {
  decrease,  ///< ReMoE's code
  hold,
};

struct lambda_options {
  index_t experts = 1;
  float k = 1.0f;  ///< wanted experts per token; the target sparsity is 1 - k / E
  double start = 1e-8;
  double factor = 1.2;    ///< at least 1
  double floor = 0.0;     ///< lambda stays at or above it; 0: none, and it may wind down for ever
  double ceiling = 1e30;  ///< and at or below this
  at_target equal = at_target::decrease;
};

/// The coefficient of ReMoE's L1 loss: times the factor while too many experts are active, divided
/// by it while too few are.
///
/// Feed it once per optimiser step with counts summed over layers, micro-batches and ranks. A floor
/// keeps a dead phase from winding lambda down so far that it takes hundreds of steps to come back.
/// Source: ReMoE (Wang et al. 2024); the floor is ours.
class lambda_controller {
 public:
  /// Throws: error where E < 1, k is outside [0, E], factor < 1, start <= 0 or the bounds are not
  /// 0 <= floor <= start <= ceiling.
  explicit lambda_controller(const lambda_options& options)
      : options_(options), lambda_(options.start) {
    constexpr const char* where = "lambda_controller";
    check_range(where, "experts", options.experts, 1, max_experts);
    detail::check_between(where, "k", static_cast<double>(options.k), 0.0,
                          static_cast<double>(options.experts));
    detail::check_between(where, "factor", options.factor, 1.0, 1e6);
    detail::check_between(where, "ceiling", options.ceiling, 1e-300, 1e300);
    detail::check_between(where, "start", options.start, 1e-300, options.ceiling);
    detail::check_between(where, "floor", options.floor, 0.0, options.start);
  }

  /// active: choices made; places: tokens times E, over the same layers. No places change nothing.
  /// Throws: error where active is outside [0, places].
  void update(std::int64_t active, std::int64_t places) {
    check_range("lambda_controller", "active", active, 0, places);
    if (places == 0) return;
    // Compared as counts: 1 - k / E rounds, and equality is a case of its own.
    const double share = static_cast<double>(active) * static_cast<double>(options_.experts);
    const double wanted = static_cast<double>(options_.k) * static_cast<double>(places);
    if (share > wanted)
      lambda_ *= options_.factor;
    else if (share < wanted || options_.equal == at_target::decrease)
      lambda_ /= options_.factor;
    lambda_ = std::clamp(lambda_, options_.floor, options_.ceiling);
  }

  double lambda() const { return lambda_; }

 private:
  lambda_options options_;
  double lambda_;
};

/// How a threshold follows the number of experts per token.
enum class target_rule {
  proportional,  ///< by step * (mean - target) / target
  sign,          ///< by step, towards the target
};

struct target_options {
  float start = 0.5f;
  float target = 2.0f;  ///< experts per token
  float step = 0.02f;
  float least = 0.0f;  ///< bounds of the controlled value
  float most = 1.0f;
  target_rule rule = target_rule::proportional;
};

/// Steers one number of a router (top-p's p, a threshold) until the mean number of experts per
/// token is the target. More of it means more experts; for a threshold steer its negative.
///
/// Bounded, so it cannot wind up. Cost: O(1).
class target_controller {
 public:
  /// Throws: error where target <= 0, step < 0 or the bounds are not least <= start <= most.
  explicit target_controller(const target_options& options)
      : options_(options), value_(static_cast<double>(options.start)) {
    constexpr const char* where = "target_controller";
    detail::check_between(where, "target", static_cast<double>(options.target), 1e-6,
                          static_cast<double>(max_experts));
    detail::check_nonnegative(where, "step", static_cast<double>(options.step));
    detail::check_between(where, "start", static_cast<double>(options.start),
                          static_cast<double>(options.least), static_cast<double>(options.most));
  }

  /// choices made by that many tokens; no tokens change nothing. Throws: error where one is
  /// negative.
  void update(std::int64_t choices, std::int64_t tokens) {
    detail::check_nonnegative("target_controller", "choices", static_cast<double>(choices));
    detail::check_nonnegative("target_controller", "tokens", static_cast<double>(tokens));
    if (tokens == 0) return;
    const double target = static_cast<double>(options_.target);
    const double gap = target - static_cast<double>(choices) / static_cast<double>(tokens);
    const double error = options_.rule == target_rule::proportional
                             ? gap / target
                             : static_cast<double>((gap > 0.0) - (gap < 0.0));
    value_ = std::clamp(value_ + static_cast<double>(options_.step) * error,
                        static_cast<double>(options_.least), static_cast<double>(options_.most));
  }

  float value() const { return static_cast<float>(value_); }

 private:
  target_options options_;
  double value_;
};

}  // namespace moeroute
