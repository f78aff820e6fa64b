// The weight map of router<Score, Selection>, and what scores and weight rules are to a map.
#pragma once

#include <type_traits>

#include <moeroute/policy/router.hpp>
#include <moeroute/policy/weigh/weight_map.hpp>

namespace moeroute {

namespace detail {

template <class S>
concept score_with_slope = requires(double x) {
  { S::value(x) } -> std::convertible_to<double>;
  { S::slope(x, x) } -> std::convertible_to<double>;
};

template <class>
inline constexpr bool is_known_score = false;

}  // namespace detail

/// What a score function is to a weight map. One of the caller's own offers
/// `static double value(double z)` and `static double slope(double z, double value)`.
template <class Score>
constexpr score_map score_map_of() {
  if constexpr (detail::score_with_slope<Score>) {
    return {weight_score::own, [](double z) { return static_cast<double>(Score::value(z)); },
            [](double z, double s) { return static_cast<double>(Score::slope(z, s)); }};
  } else if constexpr (std::is_same_v<Score, softmax>) {
    return {weight_score::softmax};
  } else if constexpr (std::is_same_v<Score, softmax_selected>) {
    return {weight_score::softmax_selected};
  } else if constexpr (std::is_same_v<Score, sigmoid>) {
    return {weight_score::sigmoid};
  } else if constexpr (std::is_same_v<Score, sqrt_softplus>) {
    return {weight_score::sqrt_softplus};
  } else if constexpr (std::is_same_v<Score, softplus>) {
    return {weight_score::softplus};
  } else if constexpr (std::is_same_v<Score, relu>) {
    return {weight_score::relu};
  } else if constexpr (std::is_same_v<Score, identity_score>) {
    return {weight_score::identity};
  } else if constexpr (std::is_same_v<Score, uniform_score>) {
    return {weight_score::uniform};
  } else {
    static_assert(detail::is_known_score<Score>,
                  "[moeroute::weigh] this score has no gradient: give it static value(double) and "
                  "slope(double, double)");
  }
}

template <class Score>
score_map score_map_of(const Score&) {
  return score_map_of<Score>();
}
inline score_map score_map_of(const any_score& score) {
  return score.visit([]<class Score>(Score) { return score_map_of<Score>(); });
}

/// The map of a score and a weight rule on transformed logits.
inline weight_map weight_map_of(const score_map& score, const weight_rule& rule,
                                const logit_transform& transform = {}) {
  weight_map m{.score = score,
               .p = rule.p,
               .eps_where = rule.eps_where,
               .eps = rule.eps,
               .factor = rule.scale,
               .divide = rule.divide,
               .expert_factor = rule.expert_scale,
               .transform = transform};
  if (rule.normalize == normalization::sum) m.divisor = weight_divisor::sum;
  if (rule.normalize == normalization::lp)
    m.divisor = rule.p == 1.0f ? weight_divisor::sum : weight_divisor::lp;
  return m.reduced();
}

template <class Score, class Selection>
weight_maps weight_maps_of(const router<Score, Selection>& r, const side_inputs&) {
  return {weight_map_of(score_map_of(r.score), r.weight, r.transform)};
}

/// A router whose weights are a map of each token's own logits, once the experts are chosen.
template <class R>
concept differentiable_router = requires(const R& r, const side_inputs& s) {
  { weight_maps_of(r, s) } -> std::same_as<weight_maps>;
};
static_assert(differentiable_router<router<softmax>>);

}  // namespace moeroute
