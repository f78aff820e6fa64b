// Histograms of many columns at once: one row adds one count to each.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Rows that count_rows takes at once: few enough to be in cache still.
inline constexpr index_t count_rows_at_once = 256;

/// Where the count of a bucket of a column is: the same bucket of 16 columns is a line of memory,
/// so that columns counted together never touch the same one.
constexpr index_t count_place(index_t column, index_t bucket, index_t buckets) {
  return (column / block_rows * buckets + bucket) * block_rows + column % block_rows;
}

/// Integers of the histograms of so many columns.
constexpr index_t count_size(index_t cols, index_t buckets) {
  return round_up(cols, block_rows) * buckets;
}

/// counts[c][bucket of start[i] - scale * row[i][c]] += 1 for n rows and every column; what lies
/// outside [0, buckets) counts at the nearer end, NaN and -inf at the far one.
///
/// Shapes: row[i] is [cols], start is [n], counts is [count_size(cols, buckets)], entries at
/// count_place. Requires: buckets <= 2^16. Cost: one read and one scattered increment per element,
/// 16 columns at a time, so that their counts are in cache. No allocation. Determinism: exact.
template <class A = default_arch>
void count_rows(const float* const* row, index_t n, index_t cols, const float* start, float scale,
                index_t buckets, std::int32_t* counts) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  static_assert(block_rows == 16);
  const F by(scale), last(static_cast<float>(buckets - 1)), zero(0.0f);
  for (index_t c = 0; c < cols; c += block_rows, counts += block_rows * buckets)
    for (index_t i = 0; i < n; ++i) {
      const F from(start[i]);
      alignas(alignment) std::int32_t place[block_rows];
      MOEROUTE_UNROLL
      for (int r = 0; r < block_rows; r += w) {
        const index_t here = std::min(c + r, cols);
        const F x = here + w <= cols ? load<A>(row[i] + here)
                                     : load_first<A>(row[i] + here, cols - here, 0.0f);
        const F at = from - x * by;
        const F in = select<A>(at < last, at, last);
        const vint<A> bucket = xsimd::batch_cast<std::int32_t>(select<A>(in > zero, in, zero));
        ((bucket << 4) + (lane_numbers<A>() + vint<A>(r))).store_aligned(place + r);
      }
      if (c + block_rows <= cols) {
        MOEROUTE_UNROLL
        for (int j = 0; j < block_rows; ++j) ++counts[place[j]];
      } else {
        for (index_t j = 0; j < cols - c; ++j) ++counts[place[j]];
      }
    }
}

}  // namespace moeroute::simd
