// The k-th largest of a list of keys: counts between two bounds, no sorting.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Below every key of a value that can be selected: what pads lists of keys.
inline constexpr std::int32_t lowest_key = std::numeric_limits<std::int32_t>::min();

/// How many of n keys, padded to a register with the lowest key, are at least `bound` (not the
/// lowest key).
template <class A>
index_t count_at_least(const std::int32_t* key, index_t n, std::int32_t bound) {
  const vint<A> at_least(bound), one(1), zero(0);
  vint<A> count(0);
  for (index_t i = 0; i < n; i += width<A>)
    count += xsimd::select(load<A>(key + i) >= at_least, one, zero);
  return xsimd::reduce_add(count);
}

/// The largest bound that at least k of n keys reach, or an earlier one that exactly k reach.
///
/// The keys are padded; 1 <= k <= n; where fewer than k are above the lowest key the bound is some
/// key. Steps by interpolation, every third one by halves, until at most `slack` more than k reach
/// the bound.
template <class A>
std::int32_t kth_largest_bound(const std::int32_t* key, index_t n, index_t k, index_t slack) {
  constexpr std::int32_t top = std::numeric_limits<std::int32_t>::max();
  vint<A> least(top), most(lowest_key);
  for (index_t i = 0; i < n; i += width<A>) {
    const vint<A> x = load<A>(key + i);
    least = xsimd::min(least, xsimd::select(x == vint<A>(lowest_key), vint<A>(top), x));
    most = xsimd::max(most, x);
  }
  std::int64_t low = xsimd::reduce_min(least), high = std::int64_t{xsimd::reduce_max(most)} + 1;
  // At least k keys reach `low`, fewer than k reach `high`.
  index_t reach_low = n, reach_high = 0;
  for (int step = 1; high - low > 1 && reach_low > k + slack; ++step) {
    const double share = step % 3 == 0 ? 0.5
                                       : (static_cast<double>(reach_low - k) + 0.5) /
                                             static_cast<double>(reach_low - reach_high);
    const auto offset = static_cast<std::int64_t>(static_cast<double>(high - low) * share);
    const std::int64_t middle = low + std::clamp<std::int64_t>(offset, 1, high - low - 1);
    const index_t reach = count_at_least<A>(key, n, static_cast<std::int32_t>(middle));
    if (reach >= k) {
      low = middle;
      reach_low = reach;
    } else {
      high = middle;
      reach_high = reach;
    }
  }
  return static_cast<std::int32_t>(low);
}

}  // namespace moeroute::simd
