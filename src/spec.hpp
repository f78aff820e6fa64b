// The C face's description of a router as a moeroute::router_spec, and back.
#pragma once

#include "handles.hpp"

#include <moeroute/compiled.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute::sets {

static_assert(int(score_kind::uniform) == MOEROUTE_UNIFORM);
static_assert(int(selection_kind::random) == MOEROUTE_RANDOM);
static_assert(int(group_score::top_sum) == MOEROUTE_GROUP_TOP_SUM);
static_assert(int(normalization::lp) == MOEROUTE_NORMALIZE_LP);
static_assert(int(eps_mode::clamp) == MOEROUTE_EPS_CLAMP);
static_assert(int(drop_order::random) == MOEROUTE_DROP_RANDOM);
static_assert(int(crossing::include_strict) == 1 && int(crossing::exclude) == 2);
static_assert(int(threshold_norm::rms) == 2);
static_assert(int(score_domain::selected) == 1 && int(scale_place::output) == 1);
static_assert(int(weight_place::input) == 1);

/// The description of a router that sees one row at a time.
inline router_spec router_spec_of(const moeroute_spec& s) {
  constexpr const char* where = "router_spec";
  router_spec r;
  r.experts = s.experts;
  r.k = s.k;
  r.score = enum_of(where, "score", s.score, score_kind::uniform);
  r.domain = s.score_selected != 0 ? score_domain::selected : score_domain::all;
  r.selection = enum_of(where, "selection", s.selection, selection_kind::random);
  r.selection_bias = s.selection_bias != 0;
  r.groups = s.groups;
  r.topk_group = s.topk_group;
  r.group_score = enum_of(where, "group_score", s.group_score, group_score::top_sum);
  r.group_fill = s.group_fill;
  r.normalize = enum_of(where, "normalize", s.normalize, normalization::lp);
  r.lp_p = s.lp_p;
  r.eps_where = enum_of(where, "eps_mode", s.eps_mode, eps_mode::clamp);
  r.eps = s.eps;
  r.scale = s.scale;
  r.scale_where = s.scale_on_output != 0 ? scale_place::output : scale_place::weights;
  r.divide_by_k = s.divide_by_k != 0;
  r.output_scale = s.output_scale;
  r.per_expert_scale = s.per_expert_scale != 0;
  r.gate_bias = s.gate_bias != 0;
  r.softcap = s.softcap;
  r.temperature = s.temperature;
  r.jitter = s.jitter;
  r.top_p = s.top_p;
  r.crossing = enum_of(where, "crossing", s.crossing, crossing::exclude);
  r.min_k = s.min_k;
  r.max_k = s.max_k;
  r.threshold = s.threshold;
  r.row_norm = enum_of(where, "row_norm", s.row_norm, threshold_norm::rms);
  r.zero_experts = s.zero_experts;
  r.shared_experts = s.shared_experts;
  r.weight_on = s.weight_on_input != 0 ? weight_place::input : weight_place::output;
  r.capacity = s.capacity;
  r.drop_order = enum_of(where, "drop_order", s.drop_order, drop_order::random);
  r.normalize_before_drop = s.normalize_after_drop == 0;
  return r;
}

inline moeroute_spec c_spec_of(const router_spec& r) {
  moeroute_spec s{};
  s.capacity_rounding = 2;
  s.capacity_factor = 2.0;
  s.capacity_multiple = 1;
  s.plan_tolerance = -1.0f;
  s.probability = 1e-3f;
  compiled::describe(r, s);
  return s;
}

}  // namespace moeroute::sets
