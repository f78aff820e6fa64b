// The door to xsimd: registers of floats and expert ids, and the few operations whose bits we fix
// ourselves.
#pragma once

#include <array>
#include <concepts>
#include <cstdint>
#include <limits>
#include <type_traits>

// Machines have these in one order, and xsimd has no registers for any other.
#if (defined(__AVX512DQ__) && !defined(__AVX512CD__)) ||                                \
    (defined(__AVX512BW__) && !defined(__AVX512DQ__)) ||                                \
    ((defined(__AVX512VNNI__) || defined(__AVX512IFMA__)) && !defined(__AVX512BW__)) || \
    (defined(__AVX512VBMI__) && !defined(__AVX512IFMA__)) ||                            \
    (defined(__AVX512ER__) && !defined(__AVX512CD__)) ||                                \
    (defined(__AVX512PF__) && !defined(__AVX512ER__))
#error \
    "[moeroute] these -mavx512 flags fit no machine (f, then cd, dq, bw, ifma, vbmi); compile with -march=skylake-avx512 or later, -mavx2 -mfma, or -march=native"
// No compiler stops at a sentence, and what follows would be xsimd's page about the same.
#include <moeroute stops here: the error above says why>
#endif

#if defined(_WIN32) && defined(__AVX__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(MOEROUTE_UNALIGNED_MOVES)
#error \
    "[moeroute] on Windows g++ keeps AVX registers on a stack that is not aligned for them; add -Wa,-muse-unaligned-vector-move -DMOEROUTE_UNALIGNED_MOVES, or compile with clang or without -mavx"
#include <moeroute stops here: the error above says why>
#endif

// Where xsimd has no registers its arrays stand in for them.
#include <xsimd/config/xsimd_config.hpp>
#if defined(XSIMD_NO_SUPPORTED_ARCHITECTURE) && !defined(MOEROUTE_NO_SIMD)
#define MOEROUTE_NO_SIMD
#endif
#if defined(MOEROUTE_NO_SIMD)
#if defined(__AVX__)
#error \
    "[moeroute] MOEROUTE_NO_SIMD replaces registers by arrays; compile without -mavx and -march=native, or without MOEROUTE_NO_SIMD"
#include <moeroute stops here: the error above says why>
#endif
#if !defined(XSIMD_WITH_EMULATED)
#if defined(XSIMD_HPP)
#error "[moeroute] include moeroute before xsimd, or define XSIMD_WITH_EMULATED to 1"
#endif
#define XSIMD_WITH_EMULATED 1
#endif
#undef XSIMD_ENABLE_XTL_COMPLEX         // with which its arrays do not compile (13.2)
#undef XSIMD_NO_SUPPORTED_ARCHITECTURE  // it does not count its arrays
#endif
#include <xsimd/xsimd.hpp>

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// The best instruction set that the compiler was told about. Arch is the last template parameter
/// of everything in simd/, so that one program may hold several (one per translation unit and flag
/// set).
#if defined(MOEROUTE_NO_SIMD)
using default_arch = xsimd::emulated<256>;
#elif XSIMD_WITH_FMA3_AVX2 && !XSIMD_WITH_AVX512F
using default_arch = xsimd::fma3<xsimd::avx2>;  // xsimd would prefer AVX-VNNI, to which it gives no
                                                // fused multiply-add
#else
using default_arch = xsimd::default_arch;
#endif

template <class A = default_arch>
using vfloat = xsimd::batch<float, A>;
template <class A = default_arch>
using vint = xsimd::batch<std::int32_t, A>;

/// The same bits, read as numbers of another type. On NEON xsimd looks its instruction up in tables
/// of functions, each of which costs a compiler seconds.
template <class To, class T, class A>
MOEROUTE_INLINE xsimd::batch<To, A> bits_as(const xsimd::batch<T, A>& x) {
#if XSIMD_WITH_NEON
  if constexpr (std::is_base_of_v<xsimd::neon, A>)
    return __builtin_bit_cast(typename xsimd::batch<To, A>::register_type, x.data);
  else
#endif
    return xsimd::bitwise_cast<To>(x);
}
template <class A = default_arch>
using vmask = xsimd::batch_bool<float, A>;

/// Whether registers of A are arrays, of which the compiler makes what it can: MOEROUTE_NO_SIMD.
template <class A>
inline constexpr bool is_portable = std::is_class_v<typename vfloat<A>::register_type>;

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

/// 0, 1, 2, ... in the lanes of a register.
template <class A>
MOEROUTE_INLINE vint<A> lane_numbers() {
  alignas(alignment) static constexpr auto number = [] {
    std::array<std::int32_t, width<A>> list{};
    for (int i = 0; i < width<A>; ++i) list[static_cast<std::size_t>(i)] = i;
    return list;
  }();
  return vint<A>::load_aligned(number.data());
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

template <class A>
MOEROUTE_INLINE vint<A> load_first(const std::int32_t* p, index_t n, std::int32_t fill) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16)
    return _mm512_mask_loadu_epi32(_mm512_set1_epi32(fill), static_cast<__mmask16>((1u << n) - 1),
                                   p);
#endif
#if defined(__AVX2__)
  if constexpr (width<A> == 8)
    return _mm256_blendv_epi8(_mm256_set1_epi32(fill),
                              _mm256_maskload_epi32(p, detail::first_lanes(n)),
                              detail::first_lanes(n));
#endif
  alignas(alignment) std::int32_t lane[width<A>];
  for (int i = 0; i < width<A>; ++i) lane[i] = i < n ? p[i] : fill;
  return vint<A>::load_aligned(lane);
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
  __builtin_memcpy(p, lane, static_cast<std::size_t>(n) * sizeof(float));  // p may hold integers
}

/// Writes the first n lanes of two registers and nothing else, in whole pieces: what is read back
/// at once must not wait for a masked store to reach the cache. n in [1, width].
template <class A>
MOEROUTE_INLINE void store_pieces(std::int32_t* integers, float* floats, int n, vint<A> i,
                                  vfloat<A> f) {
  if (n == width<A>) {
    i.store_unaligned(integers);
    f.store_unaligned(floats);
    return;
  }
#if defined(__SSE2__)
  __m128i four_i;
  __m128 four_f;
  int at = 0;
#if defined(__AVX2__)
  if constexpr (width<A> >= 8) {
    __m256i eight_i;
    __m256 eight_f;
#if defined(__AVX512F__)
    if constexpr (width<A> == 16) {
      eight_i = _mm512_castsi512_si256(i);
      eight_f = _mm512_castps512_ps256(f);
      if ((n & 8) != 0) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers), eight_i);
        _mm256_storeu_ps(floats, eight_f);
        eight_i = _mm512_extracti64x4_epi64(i, 1);
        eight_f = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(f), 1));
        at = 8;
      }
    } else
#endif
    {
      eight_i = i;
      eight_f = f;
    }
    four_i = _mm256_castsi256_si128(eight_i);
    four_f = _mm256_castps256_ps128(eight_f);
    if ((n & 4) != 0) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + at), four_i);
      _mm_storeu_ps(floats + at, four_f);
      four_i = _mm256_extracti128_si256(eight_i, 1);
      four_f = _mm256_extractf128_ps(eight_f, 1);
      at += 4;
    }
  } else
#endif
      if constexpr (width<A> == 4) {
    four_i = i;
    four_f = f;
  } else {
    store_first<A>(reinterpret_cast<float*>(integers), n, bits_as<float>(i));
    store_first<A>(floats, n, f);
    return;
  }
  if ((n & 2) != 0) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(integers + at), four_i);
    _mm_storel_pi(reinterpret_cast<__m64*>(floats + at), four_f);
    four_i = _mm_unpackhi_epi64(four_i, four_i);
    four_f = _mm_movehl_ps(four_f, four_f);
    at += 2;
  }
  if ((n & 1) != 0) {
    integers[at] = _mm_cvtsi128_si32(four_i);
    _mm_store_ss(floats + at, four_f);
  }
#else
  store_first<A>(reinterpret_cast<float*>(integers), n, bits_as<float>(i));
  store_first<A>(floats, n, f);
#endif
}

template <class A>
MOEROUTE_INLINE vint<A> select(vmask<A> m, vint<A> a, vint<A> b) {
  return xsimd::select(xsimd::batch_bool_cast<std::int32_t>(m), a, b);
}
template <class A>
MOEROUTE_INLINE vfloat<A> select(vmask<A> m, vfloat<A> a, vfloat<A> b) {
  return xsimd::select(m, a, b);
}

/// Lanes whose ids differ, as a mask for floats.
template <class A>
MOEROUTE_INLINE vmask<A> differs(vint<A> a, vint<A> b) {
  return xsimd::batch_bool_cast<float>(a != b);
}
/// Lanes whose number is at least `first`, as a mask for floats.
template <class A>
MOEROUTE_INLINE vmask<A> lanes_from(std::int32_t first) {
  return xsimd::batch_bool_cast<float>(lane_numbers<A>() >= vint<A>(first));
}
/// The largest lane of x, which has no NaN, in every lane.
template <class A>
MOEROUTE_INLINE vfloat<A> largest_lane(vfloat<A> x) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    // Halves that are never wide again: fewer steps, and no indices from memory.
    const __m256 eight =
        _mm256_max_ps(_mm512_castps512_ps256(x),
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    four = _mm_max_ps(four, _mm_shuffle_ps(four, four, 1));
    return _mm512_broadcastss_ps(four);
  }
#endif
  return vfloat<A>(xsimd::reduce_max(x));
}
/// x, but no further from 0 than `most`; NaN gives some number.
template <class A>
MOEROUTE_INLINE vfloat<A> clip(vfloat<A> x, vfloat<A> most) {
  return xsimd::max(xsimd::min(x, most), -most);
}
template <class A>
MOEROUTE_INLINE bool any(vmask<A> m) {
  return xsimd::any(m);
}
template <class A>
MOEROUTE_INLINE vfloat<A> absolute(vfloat<A> x) {
  return xsimd::abs(x);
}
// Root and quotient are rounded correctly on every ISA: on NEON xsimd approximates both.
template <class A>
MOEROUTE_INLINE vfloat<A> square_root(vfloat<A> x) {
#if XSIMD_WITH_NEON64
  if constexpr (std::derived_from<A, xsimd::neon64>) return vsqrtq_f32(x);
#endif
  return xsimd::sqrt(x);
}
template <class A>
MOEROUTE_INLINE vfloat<A> divide(vfloat<A> x, vfloat<A> y) {
#if XSIMD_WITH_NEON64
  if constexpr (std::derived_from<A, xsimd::neon64>) return vdivq_f32(x, y);
#endif
  return x / y;
}

/// The same where only the first n lanes count, the others become any numbers: 8 lanes are divided
/// in half the time of 16.
template <class A>
MOEROUTE_INLINE vfloat<A> divide_first(vfloat<A> x, vfloat<A> y, [[maybe_unused]] int n) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    if (n <= 8)
      return _mm512_zextps256_ps512(
          _mm256_div_ps(_mm512_castps512_ps256(x), _mm512_castps512_ps256(y)));
  }
#endif
  return divide<A>(x, y);
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

namespace detail {

// a * b + c with one rounding, without hardware for it. The product of two floats is exact in
// double; the sum is rounded to odd there (an inexact sum takes the neighbour with an odd last bit,
// on the side of the error), and a double that was rounded to odd rounds correctly to float.
MOEROUTE_INLINE float fma_by_double(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double back = sum - product;
  const double error = (product - (sum - back)) + (addend - back);
  std::uint64_t bits;
  __builtin_memcpy(&bits, &sum, sizeof bits);
  // The error is NaN where the sum is infinite or NaN, which stays as it is.
  const bool rounded = error < 0.0 || error > 0.0;
  const std::uint64_t inexact = static_cast<std::uint64_t>(rounded && (bits & 1) == 0);
  const std::uint64_t outward = static_cast<std::uint64_t>((error > 0.0) == (sum > 0.0));
  bits += inexact * (2 * outward - 1);
  double odd;
  __builtin_memcpy(&odd, &bits, sizeof odd);
  return static_cast<float>(odd);
}

#if defined(__SSE2__)
// Out of line, for it is rare and four times as long as what surrounds it. By arch: a function that
// is not inlined has a name of its own in every instruction set.
template <class A>
MOEROUTE_COLD __m128 fma_lane_by_lane(__m128 a, __m128 b, __m128 c) {
  alignas(16) float x[4], y[4], z[4];
  _mm_store_ps(x, a);
  _mm_store_ps(y, b);
  _mm_store_ps(z, c);
  for (int i = 0; i < 4; ++i) z[i] = fma_by_double(x[i], y[i], z[i]);
  return _mm_load_ps(z);
}

// Four at a time: rounding to double and then to float goes wrong only where the double lies
// half-way between two floats, or the float is denormal; both are rare, and seen in the bits.
template <class A>
MOEROUTE_INLINE __m128 fma_by_double(__m128 a, __m128 b, __m128 c) {
  const auto half = [](__m128 x, __m128 y, __m128 z) {
    return _mm_add_pd(_mm_mul_pd(_mm_cvtps_pd(x), _mm_cvtps_pd(y)), _mm_cvtps_pd(z));
  };
  const __m128d low = half(a, b, c);
  const __m128d high = half(_mm_movehl_ps(a, a), _mm_movehl_ps(b, b), _mm_movehl_ps(c, c));
  const __m128 sum = _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
  // The lower and the upper words of the four doubles. Half-way is told by the lower alone,
  // denormal by the upper: what is not 0 is a multiple of 2^-298, far above the denormals of
  // double.
  const __m128 l = _mm_castpd_ps(low), h = _mm_castpd_ps(high);
  const __m128i lower = _mm_castps_si128(_mm_shuffle_ps(l, h, _MM_SHUFFLE(2, 0, 2, 0)));
  const __m128i upper = _mm_castps_si128(_mm_shuffle_ps(l, h, _MM_SHUFFLE(3, 1, 3, 1)));
  const __m128i half_way =
      _mm_cmpeq_epi32(_mm_and_si128(lower, _mm_set1_epi32(0x1fffffff)), _mm_set1_epi32(0x10000000));
  const __m128i size = _mm_and_si128(upper, _mm_set1_epi32(0x7fffffff));
  const __m128i denormal =
      _mm_andnot_si128(_mm_cmpeq_epi32(size, _mm_setzero_si128()),
                       _mm_cmplt_epi32(size, _mm_set1_epi32(0x38100000)));  // 2^-126
  if (_mm_movemask_epi8(_mm_or_si128(half_way, denormal)) == 0) [[likely]]
    return sum;
  return fma_lane_by_lane<A>(a, b, c);
}
#endif

}  // namespace detail

/// a * b + c with one rounding, the same bits on every ISA: emulated exactly where the hardware has
/// no fused form.
template <class A>
MOEROUTE_INLINE vfloat<A> fma(vfloat<A> a, vfloat<A> b, vfloat<A> c) {
  if constexpr (detail::has_fma<A>) {
    return xsimd::fma(a, b, c);
#if defined(__SSE2__)
  } else if constexpr (std::derived_from<A, xsimd::sse2>) {
    return detail::fma_by_double<A>(a, b, c);
#endif
  } else {
    alignas(alignment) float x[width<A>], y[width<A>], z[width<A>];
    a.store_aligned(x);
    b.store_aligned(y);
    c.store_aligned(z);
#if defined(__SSE2__)
    for (int i = 0; i < width<A>; i += 4)
      _mm_store_ps(z + i, detail::fma_by_double<A>(_mm_load_ps(x + i), _mm_load_ps(y + i),
                                                   _mm_load_ps(z + i)));
#else
    for (int i = 0; i < width<A>; ++i) z[i] = detail::fma_by_double(x[i], y[i], z[i]);
#endif
    return vfloat<A>::load_aligned(z);
  }
}

/// 2^n * m for n in [-126, 127 + 1], of which only the lowest nine bits count, and m in (0.5, 2):
/// the exponent field is added, not multiplied, so no compiler can fuse it with a neighbouring
/// addition.
template <class A>
MOEROUTE_INLINE vfloat<A> scale_by_power_of_two(vfloat<A> m, vint<A> n) {
  return bits_as<float>(bits_as<std::int32_t>(m) + (n << 23));
}

}  // namespace moeroute::simd
