// Histograms of many columns at once: one row adds one count to each.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// counts[c][bucket of start - scale * row[c]] += 1 for every column; what lies outside [0,
/// buckets) counts at the nearer end, NaN and -inf at the far one.
///
/// Shapes: row [cols]; counts [cols, buckets]; bucket is scratch, [cols rounded up to 16].
/// Cost: one pass over the row and one scattered increment per column. No allocation.
template <class A = default_arch>
void count_row(const float* row, index_t cols, float start, float scale, index_t buckets,
               std::int32_t* bucket, std::int32_t* counts) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  const F from(start), by(scale), last(static_cast<float>(buckets - 1)), zero(0.0f);
  for (index_t c = 0; c < cols; c += w) {
    const index_t n = std::min<index_t>(w, cols - c);
    const F x = n == w ? load<A>(row + c) : load_first<A>(row + c, n, 0.0f);
    const F at = from - x * by;
    const F in = select<A>(at < last, at, last);
    xsimd::batch_cast<std::int32_t>(select<A>(in > zero, in, zero)).store_unaligned(bucket + c);
  }
  for (index_t c = 0; c < cols; ++c, counts += buckets) ++counts[bucket[c]];
}

}  // namespace moeroute::simd
