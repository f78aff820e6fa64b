// Grouping: experts that serve the same tokens on the same rank and node, under a limit of load.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// Experts that a number of tokens use together.
struct token_set {
  std::vector<expert_id> experts;
  double count = 1.0;
};

struct grouping_options {
  index_t ranks = 1;
  std::vector<std::int32_t> node_of_rank{};  ///< empty: one node
  double weight_node = 4.0;                  ///< of each node that a token reaches
  double weight_rank = 1.0;                  ///< of each rank
  /// Most load of a rank over the mean; where the start has more, that is the limit.
  double slack = 1.2;
};

struct grouping_plan {
  std::vector<std::int32_t> rank_of_expert;  ///< [E]
  double cost = 0.0;
  double start_cost = 0.0;
  double max_load = 0.0;
  index_t swaps = 0;
};

/// From `start`, swaps of two experts on different ranks, the steepest first, while the weighted
/// number of distinct nodes and ranks per token falls and no rank passes the limit of load.
///
/// For layers whose tokens return home: a row is sent once per rank, crosses once per node. Shapes:
/// load [E], start [E], as many experts stay on each rank. Throws: error where a size, an id, a
/// load or a weight is out of range. Cost: O(E^2) sets a step. Determinism: exact; of equals the
/// lowest pair. Source: objective of Occult and GRACE-MoE (2025).
inline grouping_plan group_experts(std::span<const token_set> sets, std::span<const double> load,
                                   std::span<const std::int32_t> start,
                                   const grouping_options& options) {
  using detail::at;
  constexpr const char* where = "group_experts";
  check_loads(where, load);
  const auto experts = static_cast<index_t>(load.size());
  check_size(where, "start.size()", static_cast<index_t>(start.size()), experts);
  check_range(where, "ranks", options.ranks, 1, max_ranks);
  if (!options.node_of_rank.empty())
    check_size(where, "node_of_rank.size()", static_cast<index_t>(options.node_of_rank.size()),
               options.ranks);
  for (const double v : {options.weight_node, options.weight_rank, options.slack})
    if (!(v >= 0.0 && std::isfinite(v))) fail_value(where, "an option", v, "a finite number >= 0");
  for (const std::int32_t r : start) check_range(where, "start", r, 0, options.ranks - 1);
  std::vector<std::vector<std::int32_t>> sets_of(at(experts));
  for (std::size_t i = 0; i < sets.size(); ++i) {
    if (!(sets[i].count >= 0.0 && std::isfinite(sets[i].count)))
      fail_value(where, "count", sets[i].count, "a finite number >= 0");
    for (const expert_id e : sets[i].experts) {
      check_range(where, "expert", e, 0, experts - 1);
      sets_of[at(e)].push_back(static_cast<std::int32_t>(i));
    }
  }
  grouping_plan plan;
  plan.rank_of_expert.assign(start.begin(), start.end());
  std::vector<std::int32_t>& rank = plan.rank_of_expert;
  std::vector<std::int64_t> seen_rank(at(options.ranks), -1), seen_node(at(options.ranks), -1);
  std::int64_t stamp = 0;
  const auto cost_of = [&](std::size_t i) {
    ++stamp;
    double sum = 0.0;
    for (const expert_id e : sets[i].experts) {
      const std::int32_t r = rank[at(e)],
                         n = options.node_of_rank.empty() ? 0 : options.node_of_rank[at(r)];
      check_range(where, "node_of_rank", n, 0, options.ranks - 1);
      if (seen_rank[at(r)] != stamp) sum += options.weight_rank;
      if (seen_node[at(n)] != stamp) sum += options.weight_node;
      seen_rank[at(r)] = seen_node[at(n)] = stamp;
    }
    return sum * sets[i].count;
  };
  std::vector<double> set_cost(sets.size()), rank_load(at(options.ranks), 0.0);
  for (std::size_t i = 0; i < sets.size(); ++i) plan.cost += set_cost[i] = cost_of(i);
  plan.start_cost = plan.cost;
  for (index_t e = 0; e < experts; ++e) rank_load[at(rank[at(e)])] += load[at(e)];
  const rank_balance begin = balance_of(rank_load);
  const double limit = std::max(options.slack * begin.mean_load, begin.max_load) * (1.0 + 1e-12);
  for (; plan.swaps < 100 * experts; ++plan.swaps) {
    double best = -1e-9;
    index_t first = -1, second = -1;
    for (index_t a = 0; a < experts; ++a)
      for (index_t b = a + 1; b < experts; ++b) {
        const std::int32_t p = rank[at(a)], q = rank[at(b)];
        if (p == q) continue;
        const double d = load[at(a)] - load[at(b)];
        if (rank_load[at(q)] + d > limit || rank_load[at(p)] - d > limit) continue;
        std::swap(rank[at(a)], rank[at(b)]);
        double change = 0.0;
        // A set with both keeps its cost.
        for (const index_t e : {a, b})
          for (const std::int32_t i : sets_of[at(e)]) change += cost_of(at(i)) - set_cost[at(i)];
        std::swap(rank[at(a)], rank[at(b)]);
        if (change < best) {
          best = change;
          first = a;
          second = b;
        }
      }
    if (first < 0) break;
    const double d = load[at(first)] - load[at(second)];
    rank_load[at(rank[at(second)])] += d;
    rank_load[at(rank[at(first)])] -= d;
    std::swap(rank[at(first)], rank[at(second)]);
    for (const index_t e : {first, second})
      for (const std::int32_t i : sets_of[at(e)]) set_cost[at(i)] = cost_of(at(i));
  }
  plan.cost = 0.0;
  for (const double c : set_cost) plan.cost += c;
  plan.max_load = balance_of(rank_load).max_load;
  return plan;
}

}  // namespace moeroute
