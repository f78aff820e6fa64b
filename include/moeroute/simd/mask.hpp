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

/// Bits of 64 columns in memory, which may be written in parts.
struct column_mask {
  std::uint16_t part[4];

  std::uint64_t bits() const {
    std::uint64_t all;
    __builtin_memcpy(&all, part, sizeof all);
    return all;
  }
};
static_assert(std::endian::native == std::endian::little,
              "[moeroute::simd] the parts of a column_mask are in little-endian order");

/// How a mask gets to memory: in parts is cheaper, joined can be loaded at once.
enum class mask_form { parts, joined };

/// Sets bit c where column c of at most 64 is at least bound, which is not NaN and above -inf.
template <class A, mask_form form = mask_form::parts>
MOEROUTE_INLINE void mask_not_below(const float* row, index_t n, vfloat<A> bound,
                                    column_mask& mask) {
  constexpr int w = width<A>;
  const auto values = [&](int c) {
    return n >= 64 ? load<A>(row + c)
           : n > c ? load_tail<A>(row + c, n - c, minus_infinity)
                   : vfloat<A>(minus_infinity);
  };
#if defined(__AVX512F__)
  if constexpr (w == 16) {
    __mmask16 part[4];
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) part[j] = _mm512_cmp_ps_mask(values(16 * j), bound, _CMP_GE_OQ);
    if constexpr (form == mask_form::joined) {
      const std::uint64_t all = std::uint64_t{_mm512_kunpackw(part[1], part[0])} |
                                std::uint64_t{_mm512_kunpackw(part[3], part[2])} << 32;
      __builtin_memcpy(mask.part, &all, sizeof all);
    } else {
      // Straight from mask registers; volatile, or compilers join the parts by slower inserts.
      MOEROUTE_UNROLL
      for (int j = 0; j < 4; ++j) static_cast<volatile std::uint16_t&>(mask.part[j]) = part[j];
    }
    return;
  }
#endif
  std::uint64_t all = 0;
  for (int c = 0; c < 64 && c < n; c += w) all |= std::uint64_t{(values(c) >= bound).mask()} << c;
  __builtin_memcpy(mask.part, &all, sizeof all);
}

}  // namespace moeroute::simd
