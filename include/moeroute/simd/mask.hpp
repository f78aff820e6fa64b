// Comparisons as bits, and the ragged end of a row.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <moeroute/simd/batch.hpp>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// The larger of x and y; y where x is NaN.
template <class A>
MOEROUTE_INLINE vfloat<A> max_or_second(vfloat<A> x, vfloat<A> y) {
  // maxps itself returns its second operand; which of its two that is differs between versions of
  // xsimd.
#if XSIMD_WITH_AVX512F
  if constexpr (std::derived_from<A, xsimd::avx512f>) return _mm512_max_ps(x, y);
#endif
#if XSIMD_WITH_AVX
  if constexpr (std::derived_from<A, xsimd::avx>) return _mm256_max_ps(x, y);
#endif
#if XSIMD_WITH_SSE2
  if constexpr (std::derived_from<A, xsimd::sse2>) return _mm_max_ps(x, y);
#endif
  return select<A>(x > y, x, y);
}

/// count + 1 in the lanes of a mask of floats or of integers.
template <class A, class T>
MOEROUTE_INLINE vint<A> count_where(vint<A> count, xsimd::batch_bool<T, A> m) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16)
    return _mm512_mask_sub_epi32(count, m, count, _mm512_set1_epi32(-1));
#endif
  // A lane that is set is -1.
#if defined(__AVX2__)
  if constexpr (width<A> == 8) {
    if constexpr (std::is_same_v<T, float>)
      return _mm256_sub_epi32(count, _mm256_castps_si256(m));
    else
      return _mm256_sub_epi32(count, m);
  }
#endif
#if defined(__SSE2__)
  if constexpr (width<A> == 4) {
    if constexpr (std::is_same_v<T, float>)
      return _mm_sub_epi32(count, _mm_castps_si128(m));
    else
      return _mm_sub_epi32(count, m);
  }
#endif
  const vint<A> one(1), zero(0);
  if constexpr (std::is_same_v<T, float>)
    return count + xsimd::select(xsimd::batch_bool_cast<std::int32_t>(m), one, zero);
  else
    return count + xsimd::select(m, one, zero);
}

/// Bits of 64 columns in memory, which may be written in parts.
struct column_mask {
  std::uint16_t part[4];

  std::uint64_t bits() const {
    if constexpr (std::endian::native != std::endian::little)
      return part[0] | std::uint64_t{part[1]} << 16 | std::uint64_t{part[2]} << 32 |
             std::uint64_t{part[3]} << 48;
    std::uint64_t all;
    __builtin_memcpy(&all, part, sizeof all);
    return all;
  }
};

/// How a mask gets to memory: in parts is cheaper, joined can be loaded at once.
enum class mask_form { parts, joined };

/// Sets bit c where column c of at most 64 is at least bound, which is not NaN and above -inf.
template <class A, mask_form form = mask_form::parts>
MOEROUTE_INLINE void mask_not_below(const float* row, index_t n, vfloat<A> bound,
                                    column_mask& mask) {
  constexpr int w = width<A>;
  const auto values = [&](int c) {
    return n >= 64 ? load<A>(row + c)
           : n > c ? load_first<A>(row + c, std::min<index_t>(n - c, w), minus_infinity)
                   : vfloat<A>(minus_infinity);
  };
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if constexpr (w == 16) {
    __mmask16 part[4];
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) part[j] = _mm512_cmp_ps_mask(values(16 * j), bound, _CMP_GE_OQ);
    if constexpr (form == mask_form::joined) {
      const std::uint64_t all =
          _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
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
  if constexpr (std::endian::native == std::endian::little)
    __builtin_memcpy(mask.part, &all, sizeof all);
  else
    for (int j = 0; j < 4; ++j) mask.part[j] = static_cast<std::uint16_t>(all >> 16 * j);
}

}  // namespace moeroute::simd
