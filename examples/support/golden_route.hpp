// Routes what a file of the golden format describes.
#pragma once

#include <moeroute/data/assignment.hpp>
#include <moeroute/policy/make_batch_router.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/route.hpp>

#include <cstdint>
#include <span>
#include <vector>

#include "golden_config.hpp"

namespace example {

/// The choices of every token, with what the router's capacity dropped.
inline moeroute::assignment route_golden(const golden_router& router,
                                         moeroute::matrix_view<const float> logits,
                                         std::span<const std::uint8_t> mask = {}) {
  using namespace moeroute;
  const router_spec& spec = router.spec;
  const side_inputs side{.token_ids = router.input_ids, .mask = mask, .modality = router.modality};
  const router_tensors tensors{.bias = router.bias,
                               .per_expert_scale = router.per_expert_scale,
                               .table = router.table ? &*router.table : nullptr,
                               .second_bias = router.second_bias};
  workspace memory;
  assignment choices;
  with_router(spec, tensors, [&](const auto& described) {
    // A file may have ids that nobody reads.
    route(described, logits, side.only(described.reads_side(logits.cols)), memory, choices);
  });
  if (spec.capacity == 0) return choices;

  capacity_policy policy = capacity_of(spec);
  std::vector<float> best;
  if (spec.drop_order == drop_order::batch_priority) {
    // Tokens rank by their largest probability, which normalising has divided away from the
    // weights.
    router_spec plain{
        .experts = spec.experts, .k = 1, .score = spec.score, .softcap = spec.softcap};
    assignment first;
    route(make_router(plain), logits, {.mask = mask}, memory, first);
    best.assign(first.weights().begin(), first.weights().end());
    policy.priority = best;
  }
  apply_capacity(choices, policy, memory);
  return choices;
}

}  // namespace example
