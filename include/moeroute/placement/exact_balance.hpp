// Exact balance: every rank computes the same number of rows, with as few foreign experts as can be
// promised.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <moeroute/placement/spill.hpp>

namespace moeroute {

/// Rows that one rank computes for another.
struct rank_fill {
  std::int32_t from = 0;
  std::int32_t to = 0;
  std::int64_t rows = 0;
  bool operator==(const rank_fill&) const = default;
};

struct exact_balance_options {
  /// No fill of fewer rows is made: ranks may then be that far apart.
  std::int64_t min_rows = 1;
  /// Below this imbalance nothing is moved; 0: always.
  double lambda = 0.0;
};

/// A batch plan, and what it was made of.
struct exact_balance_plan {
  batch_plan batch;
  std::vector<rank_fill> fills;        ///< at most R - 1, at most one to each rank
  std::vector<std::int64_t> alloc;     ///< [E, R], rows of each expert on each rank
  std::vector<std::int64_t> capacity;  ///< [R], what each rank is to compute
  std::vector<index_t> foreign;        ///< [R], experts of others on each rank, at most E / R
};

/// Ranks that have too much fill those that have too little, the fullest the emptiest, each up to
/// its capacity; a fill takes the giver's largest experts first.
///
/// Tokens of an expert go to home and receivers in rank order, in consecutive pieces of all ranks'
/// order. Ensures (min_rows 1, lambda 0): every rank computes its capacity, floor(N / R) or one
/// more; at most R - 1 fills, and a rank is filled by one other, so with at most E / R foreign
/// experts. Throws: error where counts are out of range or R does not divide E. Cost: O(R^2 + E R).
/// Determinism: exact; of equals the lowest. Source: K3 MoonEP (planning reference).
inline exact_balance_plan balance_exactly(std::span<const std::int64_t> count, index_t ranks,
                                          const exact_balance_options& options = {}) {
  using detail::at;
  constexpr const char* where = "balance_exactly";
  std::vector<std::int64_t> load = detail::native_loads(where, count, ranks);
  check_range(where, "min_rows", static_cast<index_t>(options.min_rows), 1, index_t{1} << 40);
  if (!(options.lambda >= 0.0)) fail_value(where, "lambda", options.lambda, ">= 0");
  const auto experts = static_cast<index_t>(count.size()), own = experts / ranks;
  const std::int64_t sum = std::accumulate(load.begin(), load.end(), std::int64_t{0});
  exact_balance_plan plan;
  plan.alloc.assign(at(experts * ranks), 0);
  plan.foreign.assign(at(ranks), 0);
  for (index_t e = 0; e < experts; ++e) plan.alloc[at(e * ranks + e / own)] = count[at(e)];
  for (index_t r = 0; r < ranks; ++r)
    plan.capacity.push_back(sum / ranks + (r < sum % ranks ? 1 : 0));
  if (detail::is_even_enough(load, options.lambda)) {
    plan.batch = detail::native_plan(count, std::move(load));
    return plan;
  }

  std::vector<std::int64_t> over(at(ranks));
  for (index_t r = 0; r < ranks; ++r) over[at(r)] = load[at(r)] - plan.capacity[at(r)];
  for (;;) {
    const auto giver = std::max_element(over.begin(), over.end());
    const auto taker = std::min_element(over.begin(), over.end());
    const std::int64_t rows = -*taker;
    if (*giver <= 0 || rows < options.min_rows) break;
    *giver -= rows;
    *taker = 0;
    plan.fills.push_back({static_cast<std::int32_t>(giver - over.begin()),
                          static_cast<std::int32_t>(taker - over.begin()), rows});
  }
  std::vector<std::int64_t> left(at(ranks));
  for (index_t h = 0; h < ranks; ++h) {
    std::fill(left.begin(), left.end(), 0);
    std::int64_t quota = 0;
    for (const rank_fill& f : plan.fills)
      if (f.from == h) {
        left[at(f.to)] += f.rows;
        quota += f.rows;
      }
    while (quota > 0) {
      const index_t d = std::max_element(left.begin(), left.end()) - left.begin();
      index_t e = h * own;
      for (index_t i = e + 1; i < (h + 1) * own; ++i)
        if (plan.alloc[at(i * ranks + h)] > plan.alloc[at(e * ranks + h)]) e = i;
      const std::int64_t rows = std::min(left[at(d)], plan.alloc[at(e * ranks + h)]);
      plan.alloc[at(e * ranks + d)] += rows;
      plan.alloc[at(e * ranks + h)] -= rows;
      left[at(d)] -= rows;
      quota -= rows;
    }
  }
  plan.batch.enabled = true;
  plan.batch.cap = plan.capacity.front();
  plan.batch.range.resize(at(experts));
  plan.batch.load.assign(at(ranks), 0);
  for (index_t e = 0; e < experts; ++e) {
    std::int64_t from = 0;
    for (index_t r = 0; r < ranks; ++r) {
      const std::int64_t n = plan.alloc[at(e * ranks + r)];
      if (n == 0) continue;
      plan.batch.range[at(e)].push_back({static_cast<std::int32_t>(r), from, from + n});
      from += n;
      plan.batch.load[at(r)] += n;
      if (r == e / own) continue;
      ++plan.foreign[at(r)];
      plan.batch.moves.push_back({static_cast<expert_id>(e), static_cast<std::int32_t>(e / own),
                                  static_cast<std::int32_t>(r)});
    }
  }
  return plan;
}

}  // namespace moeroute
