// Failover: the placement that is left when ranks stop serving.
#pragma once

#include <span>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// The placement without the slots of dead ranks: these are empty (never expert 0), shares are
/// those of the live replicas, renormalised.
///
/// A dead rank stays in the numbering: it may still have tokens (drained), or be gone. Experts
/// whose last slot was there are what lost() lists. Shapes: alive [R], 0 for dead. Throws: error
/// where the size differs or nobody is left.
inline placement without(const placement& p, std::span<const std::uint8_t> alive) {
  using detail::at;
  check_size("without", "alive.size()", static_cast<index_t>(alive.size()), p.ranks());
  std::vector<std::uint8_t> flags(alive.begin(), alive.end());
  bool any = false;
  for (index_t r = 0; r < p.ranks(); ++r) {
    check_range("without", "alive", flags[at(r)], 0, 1);
    flags[at(r)] = flags[at(r)] != 0 && p.alive()[at(r)] != 0 ? 1 : 0;
    any = any || flags[at(r)] != 0;
  }
  if (!any) fail("without", "no rank is alive, expected one at least");
  std::vector<expert_id> slots(p.expert_of_slot().begin(), p.expert_of_slot().end());
  std::vector<double> share(p.share().begin(), p.share().end()), sum(at(p.experts()), 0.0);
  std::vector<index_t> left(at(p.experts()), 0);
  for (index_t s = 0; s < p.slots(); ++s) {
    if (flags[at(p.rank_of_slot()[at(s)])] == 0) slots[at(s)] = no_expert;
    if (slots[at(s)] < 0) continue;
    sum[at(slots[at(s)])] += share[at(s)];
    ++left[at(slots[at(s)])];
  }
  for (index_t s = 0; s < p.slots(); ++s) {
    if (slots[at(s)] < 0) continue;
    const auto e = at(slots[at(s)]);
    // Where all the share was on dead ranks the others take equal parts.
    share[at(s)] = sum[e] > 0.0 ? share[at(s)] / sum[e] : 1.0 / static_cast<double>(left[e]);
  }
  return placement({.experts = p.experts(),
                    .slot_offset = p.slot_offset(),
                    .expert_of_slot = slots,
                    .node_of_rank = p.node_of_rank(),
                    .alive = flags,
                    .share = share});
}

}  // namespace moeroute
