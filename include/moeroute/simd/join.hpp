// Joining the partial values of 16 rows at once: 16 reductions for the price of a transpose.
#pragma once

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/transpose.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// out[i] = the 16 values of row i of `partial`, joined in the tree of sum_of: distance 8, 4, 2, 1.
///
/// Shapes: partial is [16, 16], out is [16]. Determinism: the bits of sum_of where join is the sum.
template <class A, class Join>
MOEROUTE_INLINE void join_partials(const float* partial, float* out, Join join) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    // Each level joins halves of two registers into one: 30 shuffles where a transpose has 64.
    __m512 four[4];  // four[m]: what is left of rows m, m + 4, m + 8, m + 12, one in each 128 bits
    MOEROUTE_UNROLL
    for (int m = 0; m < 4; ++m) {
      __m512 pair[2];
      MOEROUTE_UNROLL
      for (int h = 0; h < 2; ++h) {
        const __m512 a = load<A>(partial + (m + 8 * h) * block_rows);
        const __m512 b = load<A>(partial + (m + 8 * h + 4) * block_rows);
        pair[h] = join(vfloat<A>(_mm512_shuffle_f32x4(a, b, 0x44)),
                       vfloat<A>(_mm512_shuffle_f32x4(a, b, 0xee)));
      }
      four[m] = join(vfloat<A>(_mm512_shuffle_f32x4(pair[0], pair[1], 0x88)),
                     vfloat<A>(_mm512_shuffle_f32x4(pair[0], pair[1], 0xdd)));
    }
    __m512 two[2];
    MOEROUTE_UNROLL
    for (int h = 0; h < 2; ++h)
      two[h] = join(vfloat<A>(_mm512_shuffle_ps(four[2 * h], four[2 * h + 1], 0x44)),
                    vfloat<A>(_mm512_shuffle_ps(four[2 * h], four[2 * h + 1], 0xee)));
    join(vfloat<A>(_mm512_shuffle_ps(two[0], two[1], 0x88)),
         vfloat<A>(_mm512_shuffle_ps(two[0], two[1], 0xdd)))
        .store_unaligned(out);
    return;
  }
#endif
  constexpr int w = width<A>;
  for (int row = 0; row < block_rows; row += w) {
    vfloat<A> lane[block_rows];
    for (int c = 0; c < block_rows; c += w) {
      MOEROUTE_UNROLL
      for (int i = 0; i < w; ++i) lane[c + i] = load<A>(partial + (row + i) * block_rows + c);
      transpose<A>(lane + c);
    }
    MOEROUTE_UNROLL
    for (int distance = block_rows / 2; distance > 0; distance /= 2)
      for (int i = 0; i < distance; ++i) lane[i] = join(lane[i], lane[i + distance]);
    lane[0].store_unaligned(out + row);
  }
}

/// Stores a row's partial values where join_partials reads them.
template <class A>
MOEROUTE_INLINE void store_partials(const partials<A>& p, float* partial_row) {
  for (int r = 0; r < partials<A>::n; ++r) p.part[r].store_unaligned(partial_row + r * width<A>);
}

/// The larger of two values, neither of which is NaN. An object: a function that must be inlined
/// has no address.
template <class A>
struct larger_of {
  MOEROUTE_INLINE vfloat<A> operator()(vfloat<A> a, vfloat<A> b) const {
    return select<A>(b > a, b, a);
  }
};
template <class A>
inline constexpr larger_of<A> larger{};

}  // namespace moeroute::simd
