// The weight maps of routers that see one row: top-p, thresholds, tables, replay, product keys,
// SparseMixer, random choice, and routers made of routers.
#pragma once

#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <moeroute/policy/weigh/router.hpp>

namespace moeroute {

inline weight_maps weight_maps_of(const top_p& r, const side_inputs&) {
  return {weight_map_of({weight_score::softmax}, r.weight, r.transform)};
}

template <class Score>
weight_maps weight_maps_of(const threshold_router<Score>& r, const side_inputs&) {
  weight_map m{.score = score_map_of<Score>(),
               .eps = r.eps,
               .factor = r.scale,
               .expert_factor = r.gamma,
               .transform = r.transform};
  if (r.norm == threshold_norm::sum) {
    m.divisor = weight_divisor::scaled_sum;
    m.sum_factor = r.norm_scale;
    m.eps_where = eps_mode::add;
  }
  if (r.norm == threshold_norm::rms) m.divisor = weight_divisor::rms;
  return {m};
}

template <class Score>
weight_maps weight_maps_of(const table_router<Score>& r, const side_inputs&) {
  return {weight_map_of(score_map_of(r.score), r.weight, r.transform)};
}

template <class Score, class Id>
weight_maps weight_maps_of(const replay<Score, Id>& r, const side_inputs&) {
  return {weight_map_of(score_map_of(r.score), r.weight, r.transform)};
}

template <class Score>
weight_maps weight_maps_of(const product_keys<Score>& r, const side_inputs&) {
  weight_map m = weight_map_of(score_map_of<Score>(), r.weight);
  m.layout = logit_layout::product_keys;
  m.first_keys = r.first_keys;
  return {m};
}

inline weight_maps weight_maps_of(const sparsemixer& r, const side_inputs&) {
  return {{.score = {weight_score::sparsemixer}, .jitter = r.jitter}};
}

inline weight_maps weight_maps_of(const sparsemixer_training& r, const side_inputs&) {
  return {{.score = {weight_score::sparsemixer},
           .jitter = r.jitter,
           .whole = &sparsemixer_training::whole}};
}

inline weight_maps weight_maps_of(const gshard_top2& r, const side_inputs&) {
  return {weight_map_of({weight_score::softmax}, r.weight)};
}

inline weight_maps weight_maps_of(const random_choice& r, const side_inputs&) {
  return {{.score = {weight_score::uniform}, .divide = static_cast<float>(r.choices)}};
}

/// Of routers made of a score, a transform and a weight rule: drawn experts have weights as chosen
/// ones have.
template <class Router>
  requires differentiable_router<Router> && requires(const Router& r) { r.transform.active(); }
weight_maps weight_maps_of(const explore<Router>& r, const side_inputs& side) {
  return weight_maps_of(r.router, side);
}

/// Requires: neither of the two is made of routers itself.
template <class First, class Second>
  requires differentiable_router<First> && differentiable_router<Second>
weight_maps weight_maps_of(const by_modality<First, Second>& r, const side_inputs& side) {
  return {weight_maps_of(r.first, side).first, weight_maps_of(r.second, side).first,
          r.first_experts};
}

template <class Router>
  requires differentiable_router<Router>
weight_maps weight_maps_of(const with_shared<Router>& r, const side_inputs& side) {
  weight_maps maps = weight_maps_of(r.router, side);
  maps.shared = r.shared;
  maps.shared_weight = r.weight;
  return maps;
}

}  // namespace moeroute
