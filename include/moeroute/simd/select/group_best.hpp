// The two largest values of every group of neighbouring columns, one row per lane.
#pragma once

#include <algorithm>

#include <moeroute/base/index.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

/// best and second of the `size` columns of each group, for n rows (1 to 16); NaN counts as -inf.
///
/// Shapes: rows of groups * size floats, `stride` apart; best and second are
/// [groups][16], group by group, one row per lane; lanes at or past n repeat the last row. second
/// is -inf where size is 1. Cost: a transpose and three operations per register, no allocation.
/// Determinism: exact.
template <class A = default_arch>
void best_two_of_groups(const float* rows, index_t stride, int n, index_t groups, index_t size,
                        float* best, float* second) {
  constexpr int w = width<A>;
  using F = vfloat<A>;
  for (int lane = 0; lane < block_rows; lane += w) {
    const float* row[w];
    for (int i = 0; i < w; ++i) row[i] = rows + std::min(lane + i, n - 1) * stride;
    for (index_t g = 0; g < groups; ++g) {
      F one(minus_infinity), two(minus_infinity);
      for (index_t c = g * size; c < (g + 1) * size; c += w) {
        F x[w];
        load_transposed<A>(row, c, (g + 1) * size, minus_infinity, x);
        MOEROUTE_UNROLL
        for (int j = 0; j < w; ++j) {
          const F value = max_or_second<A>(x[j], F(minus_infinity));
          two = xsimd::max(two, xsimd::min(one, value));
          one = xsimd::max(one, value);
        }
      }
      one.store_unaligned(best + g * block_rows + lane);
      two.store_unaligned(second + g * block_rows + lane);
    }
  }
}

}  // namespace moeroute::simd
