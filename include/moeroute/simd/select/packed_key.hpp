// A bfloat16 and its column as one 32-bit integer: the larger integer goes first, and no two are
// equal.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <limits>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/rows/convert.hpp>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// Registers of twice `width` 16-bit integers.
template <class A = default_arch>
using vshort = xsimd::batch<std::int16_t, A>;

/// Whether packed keys are made for an arch: where it has a max and a min of 16-bit and of 32-bit
/// integers in one instruction each.
#if defined(__AVX512BW__)
template <class A = default_arch>
inline constexpr bool has_packed_keys =
    std::derived_from<A, xsimd::avx512bw> || (std::derived_from<A, xsimd::avx2> && width<A> == 8);
#elif defined(__AVX2__)
template <class A = default_arch>
inline constexpr bool has_packed_keys = std::derived_from<A, xsimd::avx2> && width<A> == 8;
#else
template <class A = default_arch>
inline constexpr bool has_packed_keys = false;
#endif

/// Columns that the lower half of a key can number.
inline constexpr index_t max_packed_columns = index_t{1} << 16;

/// A bfloat16 (its bits) as an integer of the same order, -0 equal to +0.
///
/// Sign and magnitude become a two's complement, and 127 is added: that takes +inf to the largest
/// integer, and the NaNs beyond it around to the negative ones.
constexpr std::int16_t order_of(std::uint16_t bits) {
  return static_cast<std::int16_t>(bits >> 15 ? 0x807f - bits : bits + 0x7f);
}

/// The order of -inf; every NaN is below it, everything that can be selected above.
inline constexpr std::int16_t order_of_minus_infinity = order_of(std::uint16_t{0xff80});

#if defined(__AVX2__)

template <class A>
  requires has_packed_keys<A>
MOEROUTE_INLINE vshort<A> order_of(vshort<A> bits) {
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16)
    return vshort<A>(_mm512_mask_sub_epi16(_mm512_add_epi16(bits, _mm512_set1_epi16(0x7f)),
                                           _mm512_movepi16_mask(bits), _mm512_set1_epi16(-0x7f81),
                                           bits));
#endif
  if constexpr (width<A> == 8)
    return vshort<A>(
        _mm256_add_epi16(_mm256_sign_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)), bits),
                         _mm256_set1_epi16(0x7f)));
}

/// The bits of the next 2 * width bfloat16.
template <class A>
MOEROUTE_INLINE vshort<A> load_bits(const bfloat16* p) {
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16) return vshort<A>(_mm512_loadu_si512(p));
#endif
  if constexpr (width<A> == 8)
    return vshort<A>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

/// The first n of them, the others -inf; reads nothing else. n in [0, 2 * width].
template <class A>
MOEROUTE_INLINE vshort<A> load_first_bits(const bfloat16* p, index_t n) {
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16)
    return vshort<A>(_mm512_mask_loadu_epi16(
        _mm512_set1_epi16(-0x80), static_cast<__mmask32>((std::uint64_t{1} << n) - 1), p));
#endif
  alignas(alignment) std::uint16_t lane[2 * width<A>];
  for (std::uint16_t& bits : lane) bits = 0xff80;
  if (n > 0) std::memcpy(lane, p, static_cast<std::size_t>(n) * sizeof *lane);
  return load_bits<A>(reinterpret_cast<const bfloat16*>(lane));
}

namespace detail {

// Eight bfloat16 of a row, of which n > 0 are there; -inf for the others.
MOEROUTE_INLINE __m128i load_eight(const bfloat16* p, index_t n) {
  if (n >= 8) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) std::uint16_t lane[8];
  for (std::uint16_t& bits : lane) bits = 0xff80;
  if (n > 0) std::memcpy(lane, p, static_cast<std::size_t>(n) * sizeof *lane);
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lane));
}

}  // namespace detail

/// The keys of columns [c, c + 8) of `width` rows, one row per lane; columns at or past `cols` read
/// as -inf.
///
/// Requires: c is a multiple of 8 below max_packed_columns. Each 128-bit part of a register takes a
/// row, so that the transpose stays inside the parts.
template <class A>
  requires has_packed_keys<A>
MOEROUTE_INLINE void load_keys(const bfloat16* const* rows, index_t c, index_t cols, vint<A>* key) {
  const index_t n = cols - c;
  const vint<A> low(static_cast<std::int32_t>(0xffff - c));
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16) {
    __m512i x[4];
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const auto part = [&](int i) {
        return detail::load_eight(rows[4 * i + j] + (n > 0 ? c : 0), n);
      };
      __m512i four = _mm512_castsi128_si512(part(0));
      four = _mm512_inserti32x4(four, part(1), 1);
      four = _mm512_inserti32x4(four, part(2), 2);
      four = _mm512_inserti32x4(four, part(3), 3);
      x[j] = order_of<A>(vshort<A>(four));
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i d = _mm512_unpackhi_epi32(x[0], x[1]), e = _mm512_unpackhi_epi32(x[2], x[3]);
    const __m512i pair[4] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b),
                             _mm512_unpacklo_epi64(d, e), _mm512_unpackhi_epi64(d, e)};
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      // 0xffff - c ends in 111: xor counts down from it.
      const __m512i even = _mm512_set1_epi32(2 * j), odd = _mm512_set1_epi32(2 * j + 1);
      key[2 * j] = vint<A>(
          _mm512_ternarylogic_epi32(_mm512_slli_epi32(pair[j], 16), low, even, 0xf0 ^ 0xcc ^ 0xaa));
      key[2 * j + 1] =
          vint<A>(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_xor_si512(low, odd), pair[j]));
    }
  }
#endif
  if constexpr (width<A> == 8) {
    __m256i x[4];
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const auto part = [&](int i) {
        return detail::load_eight(rows[4 * i + j] + (n > 0 ? c : 0), n);
      };
      x[j] = order_of<A>(
          vshort<A>(_mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1)));
    }
    const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpacklo_epi32(x[2], x[3]);
    const __m256i d = _mm256_unpackhi_epi32(x[0], x[1]), e = _mm256_unpackhi_epi32(x[2], x[3]);
    const __m256i pair[4] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b),
                             _mm256_unpacklo_epi64(d, e), _mm256_unpackhi_epi64(d, e)};
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m256i even = _mm256_xor_si256(low, _mm256_set1_epi32(2 * j));
      const __m256i odd = _mm256_xor_si256(low, _mm256_set1_epi32(2 * j + 1));
      key[2 * j] = vint<A>(_mm256_or_si256(_mm256_slli_epi32(pair[j], 16), even));
      key[2 * j + 1] = vint<A>(_mm256_blend_epi16(odd, pair[j], 0xaa));
    }
  }
}

#endif

/// Below every key that can be selected.
inline constexpr std::int32_t no_key = std::numeric_limits<std::int32_t>::min();

/// Ranks r < k of `width` rows, rank-major: (-inf, no_expert) where a row has nothing left to
/// select.
///
/// rows[i] is the row in lane i, from which zeros take their sign back.
template <class A>
MOEROUTE_INLINE void store_top(const vint<A>* top, int k, const bfloat16* const* rows, float* value,
                               std::int32_t* column) {
  const vint<A> last_missing((std::int32_t{order_of_minus_infinity} + 1) * 65536 - 1);
  vmask<A> zeros(false);
  for (int r = 0; r < k; ++r) {
    const vint<A> key = top[r];
    const vint<A> number = (key >> 16) - vint<A>(0x7f);
    const vint<A> bits = (xsimd::abs(number) << 16) | (number & vint<A>(no_key));
    const vmask<A> there = xsimd::batch_bool_cast<float>(key > last_missing);
    const vfloat<A> v = select<A>(there, bits_as<float>(bits), vfloat<A>(minus_infinity));
    zeros = zeros | (v == vfloat<A>(0.0f));
    v.store_unaligned(value + r * block_rows);
    select<A>(there, ~key & vint<A>(0xffff), vint<A>(no_expert))
        .store_unaligned(column + r * block_rows);
  }
  if (xsimd::any(zeros)) [[unlikely]] {
    for (int r = 0; r < k; ++r) {
      for (int i = 0; i < width<A>; ++i) {
        const int at = r * block_rows + i;
        if (value[at] == 0.0f) value[at] = detail::widened<A>(rows[i][column[at]]);
      }
    }
  }
}

}  // namespace moeroute::simd
