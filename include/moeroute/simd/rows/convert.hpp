// 16-bit storage in and out of registers of floats.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

namespace detail {

// What the compiler may use for arch A: a wider flag set than A's own is no reason to leave A.
#if defined(__AVX512F__)
template <class A>
inline constexpr bool converts_sixteen = std::derived_from<A, xsimd::avx512f>;
#else
template <class A>
inline constexpr bool converts_sixteen = false;
#endif
#if defined(__AVX2__)
template <class A>
inline constexpr bool converts_eight = std::derived_from<A, xsimd::avx2> && width<A> == 8;
#else
template <class A>
inline constexpr bool converts_eight = false;
#endif
#if defined(__SSE2__)
template <class A>
inline constexpr bool converts_four = std::derived_from<A, xsimd::sse2> && width<A> == 4;
#else
template <class A>
inline constexpr bool converts_four = false;
#endif
#if defined(__F16C__)
inline constexpr bool has_float16_conversion = true;
#else
inline constexpr bool has_float16_conversion = false;
#endif

// One value of storage as a float. The arch is in the name: what the flags make of it differs.
template <class A>
float widened(bfloat16 x) {
  return x;
}
template <class A>
float widened(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  return x;
#endif
}

// One float in the storage type.
template <class A, storage T>
T narrowed(float x) {
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>)
    return std::bit_cast<float16>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  return static_cast<T>(x);
}

// The upper halves of the lanes of v, rounded as bfloat16_bits does, in the lower halves.
template <class A>
MOEROUTE_INLINE xsimd::batch<std::uint32_t, A> rounded_halves(vfloat<A> v) {
  using U = xsimd::batch<std::uint32_t, A>;
  const U bits = bits_as<std::uint32_t>(v);
  const U rounded = bits + U(0x7fffu) + ((bits >> 16) & U(1u));
  const U quiet = bits | U(0x400000u);
  return xsimd::select(xsimd::batch_bool_cast<std::uint32_t>(v == v), rounded, quiet) >> 16;
}

// Pairs of bfloat16: even in the lower halves of the lanes, odd in the upper, rounded likewise.
template <class A>
MOEROUTE_INLINE xsimd::batch<std::uint32_t, A> rounded_pairs(vfloat<A> even, vfloat<A> odd) {
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16) {
    // Nine operations in place of sixteen: a NaN is rare enough to branch on, and the odd bit of
    // the result is a test.
    if (!xsimd::any((even != even) | (odd != odd))) [[likely]] {
      const auto rounded = [](__m512i bits) {
        const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
        const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
        return _mm512_mask_add_epi32(half, is_odd, half, _mm512_set1_epi32(1));
      };
      return _mm512_mask_blend_epi16(0xaaaaaaaau,
                                     _mm512_srli_epi32(rounded(_mm512_castps_si512(even)), 16),
                                     rounded(_mm512_castps_si512(odd)));
    }
  }
#endif
  return rounded_halves<A>(even) | (rounded_halves<A>(odd) << 16);
}

// The next `width` values of a row as floats.
template <class A, storage T>
MOEROUTE_INLINE vfloat<A> load_wide(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return load<A>(p);
  } else if constexpr (converts_sixteen<A>) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<T, bfloat16>) {
      return vfloat<A>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
    } else {
      return vfloat<A>(_mm512_cvtph_ps(half));
    }
#endif
  } else if constexpr (converts_eight<A> &&
                       (std::is_same_v<T, bfloat16> || has_float16_conversion)) {
#if defined(__AVX2__)
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<T, bfloat16>) {
      return vfloat<A>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)));
    } else {
#if defined(__F16C__)
      return vfloat<A>(_mm256_cvtph_ps(half));
#endif
    }
#endif
  } else if constexpr (converts_four<A> && std::is_same_v<T, bfloat16>) {
#if defined(__SSE2__)
    const __m128i half = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return vfloat<A>(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), half)));
#endif
  } else {
    alignas(alignment) float lane[width<A>];
    for (int i = 0; i < width<A>; ++i) lane[i] = widened<A>(p[i]);
    return vfloat<A>::load_aligned(lane);
  }
}

template <class A, storage T>
MOEROUTE_INLINE void store_narrow(T* p, vfloat<A> v) {
  if constexpr (std::is_same_v<T, float>) {
    v.store_unaligned(p);
  } else if constexpr (converts_sixteen<A>) {
#if defined(__AVX512F__)
    __m256i half;
    if constexpr (std::is_same_v<T, bfloat16>) {
      half = _mm512_cvtepi32_epi16(rounded_halves<A>(v));
    } else {
      half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#endif
  } else if constexpr (converts_eight<A> &&
                       (std::is_same_v<T, bfloat16> || has_float16_conversion)) {
#if defined(__AVX2__)
    __m128i half;
    if constexpr (std::is_same_v<T, bfloat16>) {
      const __m256i wide = rounded_halves<A>(v);
      half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    } else {
#if defined(__F16C__)
      half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#endif
  } else if constexpr (converts_four<A> && std::is_same_v<T, bfloat16>) {
#if defined(__SSE2__)
    // The signed pack saturates nothing once the sign of the half is the sign of the lane.
    const __m128i wide = _mm_srai_epi32(_mm_slli_epi32(rounded_halves<A>(v), 16), 16);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(wide, wide));
#endif
  } else {
    alignas(alignment) float lane[width<A>];
    v.store_aligned(lane);
    for (int i = 0; i < width<A>; ++i) p[i] = narrowed<A, T>(lane[i]);
  }
}

}  // namespace detail

}  // namespace moeroute::simd
