// EPLB as it was published: replicate, pack, by groups and nodes where these divide.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/placement/replicate.hpp>

namespace moeroute {

/// What eplb() returns: the published arrays, slot by slot and expert by expert.
struct eplb_result {
  std::vector<expert_id> expert_of_slot;  ///< [P]
  std::vector<slot_id> slots_of_expert;   ///< [E, most], by replica number, padded with -1
  std::vector<index_t> replicas;          ///< [E]
  index_t most = 0;
};

namespace detail {

// Items by weight descending to the lightest pack with room, equally many in each. Sums in float,
// as published; one item per pack: item i in pack i.
inline void pack_as_published(std::span<const float> weight, index_t packs,
                              std::vector<index_t>& pack, std::vector<index_t>& place) {
  const auto n = static_cast<index_t>(weight.size());
  pack.assign(weight.size(), 0);
  place.assign(weight.size(), 0);
  const index_t room = n / packs;
  if (room == 1) {
    for (index_t i = 0; i < n; ++i) pack[at(i)] = i;
    return;
  }
  std::vector<index_t> order(weight.size());
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(), greatest_first([&](index_t i) { return weight[at(i)]; }));
  std::vector<index_t> filled(at(packs), 0);
  using entry = std::pair<float, index_t>;
  const auto above = [](const entry& a, const entry& b) { return a > b; };
  std::vector<entry> heap;  // the lightest first, the lowest of equals
  for (index_t p = 0; p < packs; ++p) heap.push_back({0.0f, p});
  for (const index_t i : order) {
    std::pop_heap(heap.begin(), heap.end(), above);
    entry& lightest = heap.back();
    pack[at(i)] = lightest.second;
    place[at(i)] = filled[at(lightest.second)]++;
    lightest.first += weight[at(i)];
    if (filled[at(lightest.second)] < room)
      std::push_heap(heap.begin(), heap.end(), above);
    else
      heap.pop_back();
  }
}

}  // namespace detail

/// The plan of EPLB: hierarchical where groups divide by nodes, else global.
///
/// Its quirks are kept: float arithmetic, one slot per rank is not sorted, a rank may hold an
/// expert twice, and without any load all further slots are expert 0's.
/// Throws: error where a load is no load, ranks do not divide slots, nodes not ranks, groups not
/// experts, or there are fewer slots than experts. Cost: O(P log P). Determinism: exact; of equals
/// the lowest. Source: DeepSeek, EPLB (rebalance_experts).
inline eplb_result eplb(std::span<const double> load, index_t slots, index_t groups, index_t nodes,
                        index_t ranks) {
  using detail::at;
  constexpr const char* where = "eplb";
  check_loads(where, load);
  const auto experts = static_cast<index_t>(load.size());
  detail::check_slots(where, experts, slots, ranks);
  check_range(where, "nodes", nodes, 1, ranks);
  check_range(where, "groups", groups, 1, experts);
  if (ranks % nodes != 0)
    fail(where, std::to_string(ranks) + " ranks on " + std::to_string(nodes) +
                    " nodes, expected a multiple of the nodes");
  if (experts % groups != 0)
    fail(where, std::to_string(experts) + " experts in " + std::to_string(groups) +
                    " groups, expected a multiple of the groups");
  if (groups % nodes != 0) groups = nodes = 1;

  // Groups to nodes: experts are renumbered by (node, place, number in the group).
  const index_t size = experts / groups, node_groups = groups / nodes;
  std::vector<float> weight(load.begin(), load.end());
  std::vector<float> group_weight(at(groups), 0.0f);
  for (index_t e = 0; e < experts; ++e) group_weight[at(e / size)] += weight[at(e)];
  std::vector<index_t> pack, place, moved(at(experts)), back(at(experts));
  detail::pack_as_published(group_weight, nodes, pack, place);
  for (index_t e = 0; e < experts; ++e) {
    const index_t g = e / size;
    moved[at(e)] = (pack[at(g)] * node_groups + place[at(g)]) * size + e % size;
    back[at(moved[at(e)])] = e;
  }

  eplb_result out;
  out.expert_of_slot.resize(at(slots));
  out.replicas.resize(at(experts));
  const index_t node_experts = experts / nodes, node_slots = slots / nodes,
                node_ranks = ranks / nodes;
  std::vector<index_t> replica_of_slot(at(slots));
  for (index_t n = 0; n < nodes; ++n) {
    std::vector<float> own(at(node_experts));
    for (index_t i = 0; i < node_experts; ++i)
      own[at(i)] = weight[at(back[at(n * node_experts + i)])];
    std::vector<expert_id> expert(at(node_experts));
    std::iota(expert.begin(), expert.end(), expert_id{0});
    const std::vector<index_t> count =
        detail::replicate_greedy<float>(own, node_slots, slots + 1, &expert);
    std::vector<index_t> seen(at(node_experts), 0), number;
    std::vector<float> slot_weight;
    for (const expert_id e : expert) {
      number.push_back(seen[at(e)]++);
      slot_weight.push_back(own[at(e)] / static_cast<float>(count[at(e)]));
    }
    detail::pack_as_published(slot_weight, node_ranks, pack, place);
    for (index_t i = 0; i < node_slots; ++i) {
      const index_t slot = n * node_slots + pack[at(i)] * (node_slots / node_ranks) + place[at(i)];
      out.expert_of_slot[at(slot)] =
          static_cast<expert_id>(back[at(n * node_experts + expert[at(i)])]);
      replica_of_slot[at(slot)] = number[at(i)];
    }
    for (index_t i = 0; i < node_experts; ++i) {
      out.replicas[at(back[at(n * node_experts + i)])] = count[at(i)];
      out.most = std::max(out.most, count[at(i)]);
    }
  }
  out.slots_of_expert.assign(at(experts * out.most), no_slot);
  for (index_t s = 0; s < slots; ++s)
    out.slots_of_expert[at(out.expert_of_slot[at(s)] * out.most + replica_of_slot[at(s)])] =
        static_cast<slot_id>(s);
  return out;
}

/// The same as a plan, with what the loads make of it.
inline placement_plan eplb_plan(std::span<const double> load, index_t slots, index_t ranks,
                                index_t groups = 1, index_t nodes = 1) {
  const eplb_result r = eplb(load, slots, groups, nodes, ranks);
  std::vector<std::int32_t> node(detail::at(ranks));
  for (index_t i = 0; i < ranks; ++i)
    node[detail::at(i)] = static_cast<std::int32_t>(i * nodes / ranks);
  return plan_of(
      placement::from_slots(static_cast<index_t>(load.size()), ranks, r.expert_of_slot, node), load,
      0.0);
}

}  // namespace moeroute
