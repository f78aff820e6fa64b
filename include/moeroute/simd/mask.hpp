// Comparisons as bits, and the ragged end of a row.
#pragma once

#include <bit>
#include <cstdint>

#include <moeroute/simd/batch.hpp>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// The larger of x and y; y where x is NaN.
template <class A>
MOEROUTE_INLINE vfloat<A> max_or_second(vfloat<A> x, vfloat<A> y) {
#if defined(__SSE2__)
  return xsimd::max(x, y);  // maxps itself returns its second operand
#else
  return select<A>(x > y, x, y);
#endif
}

/// The first min(n, width) floats at p, the other lanes filled; reads nothing else. n >= 0.
template <class A>
MOEROUTE_INLINE vfloat<A> load_tail(const float* p, index_t n, float fill) {
  constexpr int w = width<A>;
  if (n >= w) return load<A>(p);
#if defined(__AVX512F__)
  if constexpr (w == 16)
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
#endif
#if defined(__AVX2__)
  if constexpr (w == 8) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mine = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mine),
                            _mm256_castsi256_ps(mine));
  }
#endif
  return load_first<A>(p, n, fill);
}

/// Sets bit c where column c of at most 64 is at least bound, which is not NaN and above -inf.
template <class A>
MOEROUTE_INLINE void store_bits_not_below(const float* row, index_t n, vfloat<A> bound,
                                          std::uint64_t* bits) {
  constexpr int w = width<A>;
#if defined(__AVX512F__)
  if constexpr (w == 16) {
    // Straight from mask registers to memory, four stores; joined in a register they would cost
    // more.
    auto* const part = reinterpret_cast<unsigned char*>(bits);
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const vfloat<A> x = n >= 64      ? load<A>(row + 16 * j)
                          : n > 16 * j ? load_tail<A>(row + 16 * j, n - 16 * j, minus_infinity)
                                       : vfloat<A>(minus_infinity);
      const __mmask16 m = _mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ);
      __builtin_memcpy(part + 2 * j, &m, sizeof m);
    }
    return;
  }
#endif
  std::uint64_t all = 0;
  for (int c = 0; c < 64; c += w) {
    if (c >= n) break;
    const vfloat<A> x = n >= 64 ? load<A>(row + c) : load_tail<A>(row + c, n - c, minus_infinity);
    all |= std::uint64_t{(x >= bound).mask()} << c;
  }
  *bits = all;
}

}  // namespace moeroute::simd
