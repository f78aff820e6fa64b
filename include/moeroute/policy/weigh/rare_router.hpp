// The weight maps of routers of rare rules: counts from the row, selections and biases of other
// kinds, exploration. Steps on logits are not part of a map, and are refused by name.
#pragma once

#include <string>

#include <moeroute/policy/make_rare_router.hpp>
#include <moeroute/policy/weigh/row_routers.hpp>

namespace moeroute {

inline score_map score_map_of(const rare_score& score) { return score_map_of(score.weight); }

template <class Score>
weight_maps weight_maps_of(const counted<Score>& r, const side_inputs&) {
  return {weight_map_of(score_map_of(r.score), r.weight, r.transform)};
}

inline weight_maps weight_maps_of(const dense_if& r, const side_inputs& side) {
  return weight_maps_of(r.rule, side);
}

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_step(const char* step) {
  fail("weigh", std::string(step) +
                    " changes logits before its router sees them: weigh the router inside on the "
                    "changed rows, and go on with the step's own derivative");
}

}  // namespace detail

/// Throws: error, for the step's derivative is not part of a weight map; not where the steps picked
/// at run time are none.
template <class Transform, class Router>
  requires differentiable_router<Router>
weight_maps weight_maps_of(const transformed<Transform, Router>& r, const side_inputs& side) {
  if constexpr (requires { r.transform.active(); }) {
    if (!r.transform.active()) return weight_maps_of(r.router, side);
  }
  (void)side;
  detail::fail_step("transformed");
}

/// Throws: error where weights come from the second half of the columns: they are a map of that
/// half alone.
template <class Router, class Score>
  requires differentiable_router<Router>
weight_maps weight_maps_of(const weighed_by_second<Router, Score>& r, const side_inputs& side) {
  if (r.active)
    fail("weigh",
         "weighed_by_second weighs by the second half of the columns: weigh a router of "
         "its score and weight rule on that half");
  return weight_maps_of(r.router, side);
}

inline weight_maps weight_maps_of(const any_rare_router& r, const side_inputs& side) {
  return r.visit([&](const auto& kind) { return weight_maps_of(kind, side); });
}

}  // namespace moeroute
