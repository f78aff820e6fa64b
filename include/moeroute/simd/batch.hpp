// The door to xsimd: registers of floats and expert ids, and the few operations whose bits we fix ourselves.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <xsimd/xsimd.hpp>

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// The best instruction set that the compiler was told about. Arch is the last template parameter of
/// everything in simd/, so that one program may hold several (one per translation unit and flag set).
using default_arch = xsimd::default_arch;

template <class A = default_arch>
using vfloat = xsimd::batch<float, A>;
template <class A = default_arch>
using vint = xsimd::batch<std::int32_t, A>;
template <class A = default_arch>
using vmask = xsimd::batch_bool<float, A>;

/// Floats in one register.
template <class A = default_arch>
inline constexpr int width = static_cast<int>(vfloat<A>::size);

/// Registers that hold one value for each of the 16 rows of a block.
template <class A = default_arch>
inline constexpr int registers_per_block = block_rows / width<A>;

static_assert(block_rows % width<default_arch> == 0,
              "[moeroute::simd] registers of 4, 8 or 16 floats only");

inline constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
inline constexpr float plus_infinity = std::numeric_limits<float>::infinity();

template <class A>
MOEROUTE_INLINE vfloat<A> load(const float* p) {
  return vfloat<A>::load_unaligned(p);
}
template <class A>
MOEROUTE_INLINE vint<A> load(const std::int32_t* p) {
  return vint<A>::load_unaligned(p);
}

#if defined(__AVX2__)
namespace detail {

// All bits set in the first n of 8 lanes.
MOEROUTE_INLINE __m256i first_lanes(index_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

}  // namespace detail
#endif

/// The first n floats at p, the other lanes filled; reads nothing else. n in [0, width].
template <class A>
MOEROUTE_INLINE vfloat<A> load_first(const float* p, index_t n, float fill) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16)
    return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << n) - 1), p);
#endif
#if defined(__AVX2__)
  if constexpr (width<A> == 8)
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, detail::first_lanes(n)),
                            _mm256_castsi256_ps(detail::first_lanes(n)));
#endif
  alignas(alignment) float lane[width<A>];
  for (int i = 0; i < width<A>; ++i) lane[i] = i < n ? p[i] : fill;
  return vfloat<A>::load_aligned(lane);
}

/// Writes the first n lanes to p and nothing else. n in [0, width].
template <class A>
MOEROUTE_INLINE void store_first(float* p, index_t n, vfloat<A> v) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#endif
#if defined(__AVX2__)
  if constexpr (width<A> == 8) return _mm256_maskstore_ps(p, detail::first_lanes(n), v);
#endif
  alignas(alignment) float lane[width<A>];
  v.store_aligned(lane);
  for (index_t i = 0; i < n; ++i) p[i] = lane[i];
}

template <class A>
MOEROUTE_INLINE vint<A> select(vmask<A> m, vint<A> a, vint<A> b) {
  return xsimd::select(xsimd::batch_bool_cast<std::int32_t>(m), a, b);
}
template <class A>
MOEROUTE_INLINE vfloat<A> select(vmask<A> m, vfloat<A> a, vfloat<A> b) {
  return xsimd::select(m, a, b);
}

/// NaN becomes -inf: a masked expert and a broken logit are the same thing.
template <class A>
MOEROUTE_INLINE vfloat<A> nan_to_minus_infinity(vfloat<A> x) {
  return select<A>(x == x, x, vfloat<A>(minus_infinity));
}

namespace detail {

// Arches whose fused multiply-add is one rounding in hardware.
template <class A>
inline constexpr bool has_fma = std::derived_from<A, xsimd::avx512f>
#if XSIMD_WITH_FMA3_SSE
                                || std::same_as<A, xsimd::fma3<xsimd::sse4_2>>
#endif
#if XSIMD_WITH_FMA3_AVX
                                || std::same_as<A, xsimd::fma3<xsimd::avx>>
#endif
#if XSIMD_WITH_FMA3_AVX2
                                || std::derived_from<A, xsimd::fma3<xsimd::avx2>>
#endif
                                || std::derived_from<A, xsimd::neon64>;

}  // namespace detail

/// a * b + c with one rounding, the same bits on every ISA. Where the hardware has no fused form it is
/// emulated exactly: the product of two floats is exact in double, the sum is rounded to odd in double,
/// and a double that was rounded to odd rounds correctly to float.
template <class A>
MOEROUTE_INLINE vfloat<A> fma(vfloat<A> a, vfloat<A> b, vfloat<A> c) {
  if constexpr (detail::has_fma<A>) {
    return xsimd::fma(a, b, c);
  } else {
    alignas(alignment) float x[width<A>], y[width<A>], z[width<A>];
    a.store_aligned(x);
    b.store_aligned(y);
    c.store_aligned(z);
    for (int i = 0; i < width<A>; ++i) {
      const double product = static_cast<double>(x[i]) * static_cast<double>(y[i]);
      const double addend = static_cast<double>(z[i]);
      const double sum = product + addend;
      const double back = sum - product;
      const double error = (product - (sum - back)) + (addend - back);
      std::uint64_t bits;
      __builtin_memcpy(&bits, &sum, sizeof bits);
      // Round to odd: an inexact sum takes the neighbour with an odd last bit, on the side of the error.
      // The error is NaN where the sum is infinite or NaN, which stays as it is.
      const bool rounded = error < 0.0 || error > 0.0;
      const std::uint64_t inexact = static_cast<std::uint64_t>(rounded && (bits & 1) == 0);
      const std::uint64_t outward = static_cast<std::uint64_t>((error > 0.0) == (sum > 0.0));
      bits += inexact * (2 * outward - 1);
      double odd;
      __builtin_memcpy(&odd, &bits, sizeof odd);
      z[i] = static_cast<float>(odd);
    }
    return vfloat<A>::load_aligned(z);
  }
}

/// 2^n * m for n integral in [-126, 127 + 1] and m in (0.5, 2): the exponent field is added, not multiplied,
/// so no compiler can fuse it with a neighbouring addition.
template <class A>
MOEROUTE_INLINE vfloat<A> scale_by_power_of_two(vfloat<A> m, vint<A> n) {
  return xsimd::bitwise_cast<float>(xsimd::bitwise_cast<std::int32_t>(m) + (n << 23));
}

}  // namespace moeroute::simd
