// Per-batch plans that move tokens and weights for one batch: spilling from full ranks (LLEP).
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// A piece of an expert's tokens on a rank, which need not hold the expert otherwise.
struct rank_range {
  std::int32_t rank = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  bool operator==(const rank_range&) const = default;
};

/// An expert whose weights a rank needs for this batch.
struct expert_move {
  expert_id expert = no_expert;
  std::int32_t from = 0;
  std::int32_t to = 0;
  bool operator==(const expert_move&) const = default;
};

/// A batch over R ranks with E / R experts of their own each: who computes which tokens.
struct batch_plan {
  bool enabled = false;                        ///< false: every rank its own experts
  std::vector<std::vector<rank_range>> range;  ///< [E], each a partition of the expert's tokens
  std::vector<expert_move> moves;
  std::vector<std::int64_t> load;  ///< [R]
  std::int64_t cap = 0;            ///< 0 where not enabled
  index_t forced = 0;              ///< pieces that no rank had room for
};

struct spill_options {
  /// Most rows of a rank, as a fraction of the mean: alpha = alpha_num / alpha_den >= 1.
  std::int64_t alpha_num = 1;
  std::int64_t alpha_den = 1;
  /// A helper takes no piece smaller than this, unless it ends the expert.
  std::int64_t min_rows = 1;
  /// Below this imbalance of the ranks' own loads nothing is spilled; 0: always.
  double lambda = 0.0;
};

namespace detail {

inline std::vector<std::int64_t> native_loads(const char* where,
                                              std::span<const std::int64_t> count, index_t ranks) {
  const auto experts = static_cast<index_t>(count.size());
  check_range(where, "ranks", ranks, 1, max_ranks);
  check_range(where, "experts", experts, 1, max_experts);
  if (experts % ranks != 0)
    fail(where, std::to_string(experts) + " experts on " + std::to_string(ranks) +
                    " ranks, expected a multiple of the ranks");
  std::vector<std::int64_t> load(at(ranks), 0);
  for (index_t e = 0; e < experts; ++e) {
    if (count[at(e)] < 0 || count[at(e)] > std::int64_t{1} << 40)
      fail_value(where, "count", static_cast<index_t>(count[at(e)]), "0 to 2^40");
    load[at(e / (experts / ranks))] += count[at(e)];
  }
  return load;
}

// Every rank its own experts.
inline batch_plan native_plan(std::span<const std::int64_t> count, std::vector<std::int64_t> load) {
  batch_plan plan;
  const auto own = static_cast<index_t>(count.size() / load.size());
  plan.load = std::move(load);
  plan.range.resize(count.size());
  for (std::size_t e = 0; e < count.size(); ++e)
    if (count[e] > 0)
      plan.range[e].push_back(
          {static_cast<std::int32_t>(static_cast<index_t>(e) / own), 0, count[e]});
  return plan;
}

inline bool is_even_enough(std::span<const std::int64_t> load, double lambda) {
  const std::int64_t sum = std::accumulate(load.begin(), load.end(), std::int64_t{0});
  const std::int64_t max = *std::max_element(load.begin(), load.end());
  return static_cast<double>(max) * static_cast<double>(load.size()) <
         lambda * static_cast<double>(sum);
}

}  // namespace detail

/// Experts from the heaviest on keep what fits under the cap at home; the rest goes to the ranks
/// with the least, piece by piece, with the weights.
///
/// Ensures: ranges partition every expert's tokens; loads sum to all tokens; with min_rows 1 no
/// rank has more than cap + R - 1. Throws: error where counts or options are out of range, or R
/// does not divide E. Cost: O(E log E + moves R). Determinism: exact. Source: LLEP (2026), in the
/// paper's order: helpers are sorted anew for every piece.
inline batch_plan spill(std::span<const std::int64_t> count, index_t ranks,
                        const spill_options& options = {}) {
  using detail::at;
  constexpr const char* where = "spill";
  std::vector<std::int64_t> pending = detail::native_loads(where, count, ranks);
  check_range(where, "alpha_den", static_cast<index_t>(options.alpha_den), 1, index_t{1} << 20);
  check_range(where, "alpha_num", static_cast<index_t>(options.alpha_num),
              static_cast<index_t>(options.alpha_den), index_t{1} << 20);
  check_range(where, "min_rows", static_cast<index_t>(options.min_rows), 1, index_t{1} << 40);
  if (!(options.lambda >= 0.0)) fail_value(where, "lambda", options.lambda, ">= 0");
  if (detail::is_even_enough(pending, options.lambda)) return detail::native_plan(count, pending);

  const auto experts = static_cast<index_t>(count.size()), own = experts / ranks;
  const std::int64_t sum = std::accumulate(count.begin(), count.end(), std::int64_t{0});
  batch_plan plan;
  plan.enabled = true;
  plan.range.resize(count.size());
  plan.load.assign(at(ranks), 0);
  // Without overflow: sum is below 2^60, and a cap above it is none.
  const std::int64_t mean = sum / ranks;
  if (mean / options.alpha_den > (std::int64_t{1} << 61) / options.alpha_num)
    plan.cap = sum;
  else
    plan.cap = std::max<std::int64_t>(
        1, mean / options.alpha_den * options.alpha_num +
               mean % options.alpha_den * options.alpha_num / options.alpha_den);
  std::vector<index_t> order(at(experts));
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(), greatest_first([&](index_t i) { return count[at(i)]; }));
  for (const index_t e : order) {
    const std::int64_t n = count[at(e)];
    const index_t home = e / own;
    pending[at(home)] -= n;
    const std::int64_t stays =
        std::clamp<std::int64_t>(plan.cap - plan.load[at(home)] - pending[at(home)], 0, n);
    std::vector<rank_range>& range = plan.range[at(e)];
    if (stays > 0) range.push_back({static_cast<std::int32_t>(home), 0, stays});
    plan.load[at(home)] += stays;
    std::int64_t done = stays;
    while (done < n) {
      index_t helper = -1;
      for (index_t r = 0; r < ranks; ++r)
        if (r != home && (helper < 0 || plan.load[at(r)] + pending[at(r)] <
                                            plan.load[at(helper)] + pending[at(helper)]))
          helper = r;
      // Whoever has least has most room: where it takes no piece, none does.
      const std::int64_t rest = n - done,
                         room = plan.cap - plan.load[at(helper)] - pending[at(helper)];
      std::int64_t piece = std::min(rest, room);
      const bool force = piece < options.min_rows && rest > piece;
      if (force) {
        piece = rest;
        ++plan.forced;
      }
      const auto same = std::find_if(range.begin(), range.end(), [&](const rank_range& r) {
        return r.rank == helper && r.end == done;
      });
      const bool moved = std::any_of(range.begin(), range.end(),
                                     [&](const rank_range& r) { return r.rank == helper; });
      if (same != range.end())
        same->end += piece;
      else
        range.push_back({static_cast<std::int32_t>(helper), done, done + piece});
      if (!moved)
        plan.moves.push_back({static_cast<expert_id>(e), static_cast<std::int32_t>(home),
                              static_cast<std::int32_t>(helper)});
      plan.load[at(helper)] += piece;
      done += piece;
    }
  }
  return plan;
}

/// A batch plan as a placement for this batch, every rank's own experts and the moved ones behind
/// them, and the pieces for replica_rule::ranges.
struct batch_placement {
  placement experts;
  slot_ranges ranges;
};

/// Throws: error where node_of_rank does not fit. Cost: O(E + moves + R).
inline batch_placement place_batch(const batch_plan& plan,
                                   std::span<const std::int32_t> node_of_rank = {}) {
  using detail::at;
  const auto experts = static_cast<index_t>(plan.range.size()),
             ranks = static_cast<index_t>(plan.load.size());
  check_range("place_batch", "ranks", ranks, 1, experts);
  const index_t own = experts / ranks;
  std::vector<std::vector<expert_id>> of_rank(at(ranks));
  for (index_t e = 0; e < experts; ++e) of_rank[at(e / own)].push_back(static_cast<expert_id>(e));
  for (const expert_move& m : plan.moves) of_rank[at(m.to)].push_back(m.expert);
  std::vector<std::int32_t> offset{0};
  std::vector<expert_id> slots;
  for (const auto& list : of_rank) {
    slots.insert(slots.end(), list.begin(), list.end());
    offset.push_back(static_cast<std::int32_t>(slots.size()));
  }
  batch_placement out{placement({.experts = experts,
                                 .slot_offset = offset,
                                 .expert_of_slot = slots,
                                 .node_of_rank = node_of_rank}),
                      {}};
  for (index_t e = 0; e < experts; ++e) {
    out.ranges.first.push_back(static_cast<std::int32_t>(out.ranges.range.size()));
    for (const rank_range& r : plan.range[at(e)]) {
      const std::vector<expert_id>& list = of_rank[at(r.rank)];
      const index_t local = std::find(list.begin(), list.end(), e) - list.begin();
      out.ranges.range.push_back(
          {static_cast<slot_id>(offset[at(r.rank)] + local), r.begin, r.end});
    }
  }
  out.ranges.first.push_back(static_cast<std::int32_t>(out.ranges.range.size()));
  return out;
}

}  // namespace moeroute
