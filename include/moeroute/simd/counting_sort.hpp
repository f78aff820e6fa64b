// The stable counting sort of small keys: count, scan, place.
#pragma once

#include <cstdint>

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute::simd {

/// count[v] becomes the number of i < n with key[i] == v; negative keys are skipped.
///
/// Requires: every key is below `values`. Cost: O(n + values), no allocation.
inline void count_keys(const std::int32_t* key, index_t n, index_t values, std::int32_t* count) {
  for (index_t v = 0; v < values; ++v) count[v] = 0;
  for (index_t i = 0; i < n; ++i)
    if (key[i] >= 0) ++count[key[i]];
}

/// start[v] becomes the sum of count[u] over u < v, for v in [0, values]; returns the total.
/// start and count may be the same array only where start is count.
inline std::int32_t exclusive_scan(const std::int32_t* count, index_t values, std::int32_t* start) {
  std::int32_t sum = 0;
  for (index_t v = 0; v < values; ++v) {
    const std::int32_t n = count[v];
    start[v] = sum;
    sum += n;
  }
  start[values] = sum;
  return sum;
}

}  // namespace moeroute::simd
