// Replicate: how many slots each expert gets.
#pragma once

#include <algorithm>
#include <numeric>
#include <queue>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

namespace detail {

// Expert by expert: every further slot goes to the highest load per slot, the lowest id of equals.
// F is the type that quotients are compared in. order, if wanted, gets the expert of each slot
// beyond the first E.
template <class F>
std::vector<index_t> replicate_greedy(std::span<const F> load, index_t slots, index_t most,
                                      std::vector<expert_id>* order = nullptr) {
  const auto experts = static_cast<index_t>(load.size());
  std::vector<index_t> count(load.size(), 1);
  using entry = std::pair<F, index_t>;
  const auto below = [](const entry& a, const entry& b) {
    return a.first < b.first || (a.first == b.first && a.second > b.second);
  };
  std::vector<entry> heap;
  for (index_t e = 0; e < experts; ++e) heap.push_back({load[at(e)], e});
  std::make_heap(heap.begin(), heap.end(), below);
  for (index_t s = experts; s < slots; ++s) {
    std::pop_heap(heap.begin(), heap.end(), below);
    const index_t e = heap.back().second;
    ++count[at(e)];
    if (order != nullptr) order->push_back(static_cast<expert_id>(e));
    if (count[at(e)] >= most) {
      heap.pop_back();
      continue;
    }
    heap.back().first = load[at(e)] / static_cast<F>(count[at(e)]);
    std::push_heap(heap.begin(), heap.end(), below);
  }
  return count;
}

}  // namespace detail

/// The number of slots of every expert that makes the greatest load per slot as small as it can be,
/// with at most `most` slots for one expert (ranks, so that none holds it twice).
///
/// Where all loads are zero, slots are spread by id. Ensures: every expert has one, they sum to
/// `slots`. Throws: error where a load is no load, or slots are outside [E, E most]. Cost: O(slots
/// log E). Determinism: exact; of equal loads per slot the lowest expert.
inline std::vector<index_t> replicate(std::span<const double> load, index_t slots, index_t most) {
  check_loads("replicate", load);
  const auto experts = static_cast<index_t>(load.size());
  check_range("replicate", "most", most, 1, max_ranks);
  check_range("replicate", "slots", slots, experts, size_product(experts, most));
  if (std::all_of(load.begin(), load.end(), [](double w) { return w == 0.0; })) {
    std::vector<index_t> count(load.size());
    for (index_t e = 0; e < experts; ++e)
      count[detail::at(e)] = slots / experts + (e < slots % experts ? 1 : 0);
    return count;
  }
  return detail::replicate_greedy<double>(load, slots, most);
}

/// A load that no placement with so many slots gets below, with even shares: the mean, or the
/// greatest load per slot.
inline double placement_bound(std::span<const double> load, index_t slots, index_t ranks) {
  const std::vector<index_t> count = replicate(load, slots, ranks);
  double bound = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(ranks);
  for (std::size_t e = 0; e < load.size(); ++e)
    bound = std::max(bound, load[e] / static_cast<double>(count[e]));
  return bound;
}

}  // namespace moeroute
