// The weight maps of routers that see the whole batch, where a token's weights follow from its own
// logits: expert choice, Sinkhorn and sparse transport with weights by softmax or sigmoid, BASE.
#pragma once

#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/batch_percentile.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>
#include <moeroute/policy/weigh/router.hpp>

namespace moeroute {

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_coupled(const char* router) {
  fail("weigh", std::string(router) +
                    ".weights is plan: it couples the tokens, use weigh_plan and "
                    "weigh_plan_backward");
}

[[noreturn]] MOEROUTE_COLD inline void fail_transport(const char* weights) {
  fail("weigh", std::string(weights) +
                    " is plan: it couples the tokens, use weigh_transport and "
                    "weigh_transport_backward");
}

}  // namespace detail

template <class Score>
weight_maps weight_maps_of(const expert_choice<Score>& r, const side_inputs&) {
  return {
      weight_map_of(score_map_of<Score>(),
                    {.normalize = r.normalize == token_renormalization::sum ? normalization::sum
                                                                            : normalization::none,
                     .eps_where = r.eps > 0.0f ? eps_mode::add : eps_mode::none,
                     .eps = r.eps,
                     .scale = r.scale})};
}

template <class Score>
weight_maps weight_maps_of(const batch_percentile<Score>& r, const side_inputs&) {
  return {weight_map_of(score_map_of(r.score), r.weight)};
}

inline weight_maps weight_maps_of(const base_assignment&, const side_inputs&) {
  return {{.score = {weight_score::sigmoid}}};
}

/// Throws: error where the weights are the plan's.
inline weight_maps weight_maps_of(const sinkhorn& r, const side_inputs&) {
  if (r.weights == plan_weights::plan) detail::fail_coupled("sinkhorn");
  const bool sigmoid =
      r.weights == plan_weights::sigmoid || (r.weights == plan_weights::by_k && r.k == 1);
  return {{.score = {sigmoid ? weight_score::sigmoid : weight_score::softmax}}};
}

/// Throws: error on a balanced step, whose weights are the plan's.
inline weight_maps weight_maps_of(const selective_sinkhorn& r, const side_inputs& side) {
  if (r.balances(side)) detail::fail_coupled("selective_sinkhorn");
  logit_transform transform;
  if (r.phase == routing_phase::training) transform.noise = r.noise;
  return {weight_map_of({weight_score::softmax}, sum_normalized, transform)};
}

/// Throws: error where the weights are the plan's.
inline weight_maps weight_maps_of(const sinkhorn_expert_choice& r, const side_inputs&) {
  if (r.weights == plan_weights::plan) detail::fail_coupled("sinkhorn_expert_choice");
  return {{.score = {weight_score::softmax}}};
}

/// Throws: error where the weights are the plan's.
inline weight_maps weight_maps_of(const sparse_transport& r, const side_inputs&) {
  if (r.weights == transport_weights::plan) detail::fail_transport("sparse_transport.weights");
  return {{.score = {weight_score::softmax}}};
}

/// Throws: error where the weights are the plan's.
inline weight_maps weight_maps_of(const sparse_transport_token_choice& r, const side_inputs&) {
  if (r.transport.weights == transport_weights::plan)
    detail::fail_transport("sparse_transport_token_choice.transport.weights");
  return {{.score = {weight_score::softmax}}};
}

}  // namespace moeroute
