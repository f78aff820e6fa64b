// Loads of experts and ranks: what every planner takes, checks and reports.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/data/placement.hpp>

namespace moeroute {

/// How evenly ranks are loaded.
struct rank_balance {
  double max_load = 0.0;
  double mean_load = 0.0;
  /// max / mean, 1 where the mean is 0.
  double imbalance = 1.0;
};

/// What a planner found: where experts live, and what the loads that it was given make of it.
struct placement_plan {
  placement experts;
  std::vector<double> rank_load;
  rank_balance balance;
  /// No placement with so many slots and even shares has a lower max_load.
  double lower_bound = 0.0;
};

/// Throws: error where a load is negative, infinite or NaN, or there is none.
inline void check_loads(const char* where, std::span<const double> load) {
  check_range(where, "loads", static_cast<index_t>(load.size()), 1, max_experts);
  for (std::size_t e = 0; e < load.size(); ++e)
    if (!(load[e] >= 0.0 && std::isfinite(load[e])))
      fail(where, "the load of expert " + std::to_string(e) + " is " + std::to_string(load[e]) +
                      ", expected a finite number >= 0");
}

namespace detail {

// The sizes that planners of equally many slots per rank share.
inline void check_slots(const char* where, index_t experts, index_t slots, index_t ranks) {
  check_range(where, "ranks", ranks, 1, max_ranks);
  check_range(where, "slots", slots, experts, std::int32_t{0x7fffffff});
  if (slots % ranks != 0)
    fail(where, std::to_string(slots) + " slots on " + std::to_string(ranks) +
                    " ranks, expected a multiple of the ranks");
}

inline std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

}  // namespace detail

/// Loads of ranks with unequal speed are compared as load / rate: rank_balance of those. Ranks that
/// are not alive have no load, and no part in the mean. Shapes: rank_load [R]; alive [R], or empty:
/// all are. Throws: error where alive has another size. Cost: O(R).
inline rank_balance balance_of(std::span<const double> rank_load,
                               std::span<const std::uint8_t> alive = {}) {
  rank_balance b;
  if (!alive.empty())
    check_size("balance_of", "alive.size()", static_cast<index_t>(alive.size()),
               static_cast<index_t>(rank_load.size()));
  if (rank_load.empty()) return b;
  const auto dead = std::count(alive.begin(), alive.end(), std::uint8_t{0});
  b.max_load = *std::max_element(rank_load.begin(), rank_load.end());
  b.mean_load =
      std::accumulate(rank_load.begin(), rank_load.end(), 0.0) /
      static_cast<double>(std::max<index_t>(static_cast<index_t>(rank_load.size()) - dead, 1));
  b.imbalance = b.mean_load > 0.0 ? b.max_load / b.mean_load : 1.0;
  return b;
}

/// Each rank's load under a placement's shares.
///
/// Throws: error where the loads do not fit. Cost: O(P + R).
inline std::vector<double> rank_loads(const placement& p, std::span<const double> load) {
  check_size("rank_loads", "load.size()", static_cast<index_t>(load.size()), p.experts());
  check_loads("rank_loads", load);
  std::vector<double> sum(detail::at(p.ranks()), 0.0);
  for (index_t s = 0; s < p.slots(); ++s)
    if (const expert_id e = p.expert_of_slot()[detail::at(s)]; e >= 0)
      sum[detail::at(p.rank_of_slot()[detail::at(s)])] +=
          load[detail::at(e)] * p.share()[detail::at(s)];
  return sum;
}

/// Fills in what a plan says about itself; lower_bound stays.
inline placement_plan plan_of(placement p, std::span<const double> load, double lower_bound) {
  placement_plan plan{std::move(p), {}, {}, lower_bound};
  plan.rank_load = rank_loads(plan.experts, load);
  plan.balance = balance_of(plan.rank_load, plan.experts.alive());
  return plan;
}

/// Experts newly held by a rank, over all ranks: what a change of placement has to move.
///
/// By content, not by slot: an expert that changes its slot on its rank is not moved. A dead rank
/// gets nothing, and what it once held counts for nothing. Throws: error where experts or ranks
/// differ. Cost: O(P log P).
inline index_t count_moves(const placement& from, const placement& to) {
  check_size("count_moves", "to.ranks()", to.ranks(), from.ranks());
  check_size("count_moves", "to.experts()", to.experts(), from.experts());
  index_t moves = 0;
  std::vector<expert_id> before, after;
  for (index_t r = 0; r < from.ranks(); ++r) {
    if (to.alive()[detail::at(r)] == 0) continue;
    const auto sorted = [](std::span<const expert_id> list, std::vector<expert_id>& out) {
      out.assign(list.begin(), list.end());
      std::sort(out.begin(), out.end());
      out.erase(std::unique(out.begin(), out.end()), out.end());
      if (!out.empty() && out.front() == no_expert) out.erase(out.begin());
    };
    sorted(from.experts_of_rank(r), before);
    if (from.alive()[detail::at(r)] == 0) before.clear();
    sorted(to.experts_of_rank(r), after);
    for (const expert_id e : after)
      moves += std::binary_search(before.begin(), before.end(), e) ? 0 : 1;
  }
  return moves;
}

}  // namespace moeroute
