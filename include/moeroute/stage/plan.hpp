// Planning: an assignment becomes slots in expert-major order.
#pragma once

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/simd/counting_sort.hpp>

namespace moeroute {

/// Gives every choice that has an expert a slot: expert by expert, in token order within one.
///
/// Requires: ids are in [0, E) or no_expert, as route leaves them.
/// Ensures: slot_of_choice and token_of_slot are inverse to each other; offsets end at the number of slots.
/// Cost: O(T k + E), no allocation once the plan is warm. Determinism: exact, stable in token order.
inline void plan(const assignment& choices, dispatch_plan& out) {
  const index_t tokens = choices.tokens(), experts = choices.experts(), k = choices.k();
  out.reset(tokens, experts, k);
  const dispatch_plan::parts p = out.writable();
  const expert_id* id = choices.ids().data();
  simd::count_keys(id, tokens * k, experts, p.cursor);
  simd::exclusive_scan(p.cursor, experts, p.offsets);
  for (index_t e = 0; e < experts; ++e) p.cursor[e] = p.offsets[e];
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t c = t * k; c < (t + 1) * k; ++c) {
      const expert_id e = id[c];
      if (e == no_expert) {
        p.slot_of_choice[c] = no_slot;
      } else {
        const slot_id s = p.cursor[e]++;
        p.slot_of_choice[c] = s;
        p.token_of_slot[s] = static_cast<slot_id>(t);
      }
    }
  }
}

}  // namespace moeroute
