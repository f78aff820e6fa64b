// What capacity does to weights once it has dropped, in float or double, and its derivative.
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/policy/parts/capacity.hpp>

namespace moeroute {

namespace detail {

// The divisor of a token's weights, and whether eps holds it.
template <std::floating_point F>
struct kept_sum {
  F divisor = 1;
  bool clamped = true;

  kept_sum(const capacity_policy& policy, const assignment& choices, index_t token,
           const F* weight) {
    if (policy.renormalize == renormalization::none) return;
    F sum = 0;
    for (index_t c = choices.first(token); c < choices.first(token + 1); ++c)
      if (policy.renormalize == renormalization::before_drop || choices.kept(c)) sum += weight[c];
    clamped = !(sum > F(policy.eps));
    divisor = clamped ? F(policy.eps) : sum;
  }
};

}  // namespace detail

/// weights = what apply_capacity() made of the router's weights: divided by the sum of those that
/// were kept (or of all), and 0 for those that were dropped.
///
/// Shapes: weights [choices.choices()], in place; choices after apply_capacity().
/// Throws: error where the sizes differ. Cost: O(choices), no allocation. Determinism: exact.
template <std::floating_point F>
void renormalize(const capacity_policy& policy, const assignment& choices, std::span<F> weights) {
  check_offsets("renormalize", choices);
  check_size("renormalize", "weights.size()", static_cast<index_t>(weights.size()),
             choices.choices());
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const detail::kept_sum<F> sum(policy, choices, t, weights.data());
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      F& w = weights[static_cast<std::size_t>(c)];
      w = choices.kept(c) && sum.divisor > 0 ? w / sum.divisor : F(0);
    }
  }
}

/// dweights, in place, from the gradient of the weights behind capacity to that of the router's:
/// dw_i = (g_i - sum over c of g_c w_c / N) / N with g = 0 for what was dropped, and without the
/// second term for what is not in the sum N, or where eps holds it.
///
/// Which choices were dropped is a constant. Shapes: weights (the router's, as of weigh()) and
/// dweights [choices.choices()], apart. Throws: error where the sizes differ or dweights is
/// weights. Cost: O(choices), no allocation. Determinism: exact.
template <std::floating_point F>
void renormalize_backward(const capacity_policy& policy, const assignment& choices,
                          std::type_identity_t<std::span<const F>> weights, std::span<F> dweights) {
  constexpr const char* where = "renormalize_backward";
  check_offsets(where, choices);
  check_size(where, "weights.size()", static_cast<index_t>(weights.size()), choices.choices());
  check_size(where, "dweights.size()", static_cast<index_t>(dweights.size()), choices.choices());
  if (!weights.empty() && weights.data() == dweights.data())
    fail(where, "weights and dweights overlap, expected memory of their own");
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const detail::kept_sum<F> sum(policy, choices, t, weights.data());
    F mean = 0;
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c)
      if (choices.kept(c) && !sum.clamped)
        mean += dweights[static_cast<std::size_t>(c)] * weights[static_cast<std::size_t>(c)];
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      F& dw = dweights[static_cast<std::size_t>(c)];
      const bool kept = choices.kept(c);
      const bool counts =
          !sum.clamped && (kept || policy.renormalize == renormalization::before_drop);
      const F g = kept ? dw : F(0);
      dw = sum.divisor > 0 ? (g - (counts ? mean / sum.divisor : F(0))) / sum.divisor : F(0);
    }
  }
}

}  // namespace moeroute
