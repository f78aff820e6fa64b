// Top-k of a single row: as by a bound, but ranks are counted, as there are no other rows to fill
// the lanes.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/select/compress.hpp>
#include <moeroute/simd/select/ordered_key.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

namespace detail {

// One value for each of 16 places.
template <class V, class A>
using sixteen = std::array<V, static_cast<std::size_t>(registers_per_block<A>)>;

// The largest of each of 16 groups of columns (c modulo 16); -inf where a group has no value.
template <class A>
MOEROUTE_INLINE sixteen<vfloat<A>, A> group_maxima(const float* row, index_t cols) {
  // Four registers at least: in a single one every maximum would wait for the one before.
  constexpr int w = width<A>, n = registers_per_block<A>, chains = std::max(4, n);
  vfloat<A> most[chains];
  for (auto& m : most) m = vfloat<A>(minus_infinity);
  index_t c = 0;
  for (; c + chains * w <= cols; c += chains * w) {
    MOEROUTE_UNROLL
    for (int j = 0; j < chains; ++j) most[j] = max_or_second<A>(load<A>(row + c + j * w), most[j]);
  }
  for (int j = 0; c < cols; ++j, c += w)
    most[j] = max_or_second<A>(
        load_first<A>(row + c, std::min<index_t>(cols - c, w), minus_infinity), most[j]);
  MOEROUTE_UNROLL
  for (int half = chains / 2; half >= n; half /= 2) {
    MOEROUTE_UNROLL
    for (int j = 0; j < half; ++j) most[j] = xsimd::max(most[j], most[j + half]);
  }
  sixteen<vfloat<A>, A> result;
  MOEROUTE_UNROLL
  for (std::size_t r = 0; r < result.size(); ++r) result[r] = most[r];
  return result;
}

// For each of 16 values how many go before it: larger ones, and equal ones in lower places. No NaN.
template <class A>
MOEROUTE_INLINE sixteen<vint<A>, A> count_before(const sixteen<vfloat<A>, A>& value) {
  constexpr std::size_t w = width<A>, n = registers_per_block<A>;
  // From place j an equal key goes before those in later places: their keys count as one less.
  alignas(alignment) static constexpr auto later = [] {
    std::array<std::int32_t, 2 * block_rows> list{};
    for (std::size_t i = block_rows; i < list.size(); ++i) list[i] = 1;
    return list;
  }();
  sixteen<vint<A>, A> key, before;
  alignas(alignment) std::int32_t all[block_rows];
  MOEROUTE_UNROLL
  for (std::size_t r = 0; r < n; ++r) {
    key[r] = ordered_key<A>(value[r]);
    key[r].store_aligned(all + r * w);
    before[r] = vint<A>(0);
  }
  MOEROUTE_FORGET(all);
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    __m512i count = _mm512_setzero_si512();
    MOEROUTE_UNROLL
    for (std::size_t j = 0; j < block_rows; ++j) {
      const __m512i least = _mm512_sub_epi32(key[0], load<A>(later.data() + block_rows - 1 - j));
      const __mmask16 goes_before = _mm512_cmplt_epi32_mask(least, _mm512_set1_epi32(all[j]));
      count = _mm512_mask_sub_epi32(count, goes_before, count, _mm512_set1_epi32(-1));
    }
    before[0] = count;
    return before;
  }
#endif
  MOEROUTE_UNROLL
  for (std::size_t j = 0; j < block_rows; ++j) {
    MOEROUTE_UNROLL
    for (std::size_t r = 0; r < n; ++r) {
      const vint<A> least = key[r] - load<A>(later.data() + block_rows - 1 - j + r * w);
      before[r] += xsimd::select(vint<A>(all[j]) > least, vint<A>(1), vint<A>(0));
    }
  }
  return before;
}

// The one of 16 values that m of its places are before.
template <class A>
MOEROUTE_INLINE vfloat<A> value_at(const sixteen<vfloat<A>, A>& value,
                                   const sixteen<vint<A>, A>& before, std::int32_t m) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    const __mmask16 here = _mm512_cmpeq_epi32_mask(before[0], _mm512_set1_epi32(m));
    return _mm512_broadcastss_ps(_mm512_castps512_ps128(_mm512_maskz_compress_ps(here, value[0])));
  }
#endif
  vfloat<A> found(minus_infinity);
  MOEROUTE_UNROLL
  for (std::size_t r = 0; r < value.size(); ++r)
    found = xsimd::max(found, select<A>(xsimd::batch_bool_cast<float>(before[r] == vint<A>(m)),
                                        value[r], vfloat<A>(minus_infinity)));
  return vfloat<A>(xsimd::reduce_max(found));
}

// The places of 16 whose value is m, as bits.
template <class A>
MOEROUTE_INLINE std::uint32_t places_equal(const sixteen<vint<A>, A>& value, std::int32_t m) {
  std::uint32_t places = 0;
  MOEROUTE_UNROLL
  for (std::size_t r = 0; r < value.size(); ++r)
    places |= static_cast<std::uint32_t>((value[r] == vint<A>(m)).mask()) << r * width<A>;
  return places;
}

// The columns of a row that reach a bound, ascending, 0 past the end; returns how many there are,
// or more than 16 where 16 places do not hold them.
template <class A>
MOEROUTE_INLINE std::int32_t columns_not_below(const float* row, index_t cols, vfloat<A> least,
                                               sixteen<vint<A>, A>& column) {
  column_list<A, block_rows> found;
  index_t c = 0;
  do {
    column_mask mask;
    mask_not_below<A, mask_form::joined>(row + c, cols - c, least, mask);
    found.append(&mask, c, std::min(c + 64, cols));
    c += 64;
  } while (c < cols);
  for (int r = 0; r < registers_per_block<A>; ++r)
    column[static_cast<std::size_t>(r)] = found.columns(r);
  return found.size();
}

#if defined(__AVX512F__) && defined(__AVX512VBMI2__)
// In registers: a list in memory would be written in overlapping parts, and reading it would wait
// for them.
template <class A>
  requires(width<A> == 16)
MOEROUTE_INLINE std::int32_t columns_not_below(const float* row, index_t cols, vfloat<A> least,
                                               sixteen<vint<A>, A>& column) {
  const __m128i place = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m128i low = _mm_setzero_si128();  // columns modulo 256
  __m512i high = _mm512_setzero_si512();
  std::int32_t size = 0;
  index_t c = 0;
  do {
    column_mask mask;
    mask_not_below<A, mask_form::joined>(row + c, cols - c, least, mask);
    const std::uint64_t bits = mask.bits();
    const __m512i packed =
        _mm512_maskz_compress_epi8(bits, _mm512_load_si512(byte_numbers.data() + c % 256));
    // Moved up by size: a negative index gives 0.
    low = _mm_or_si128(
        low, _mm_shuffle_epi8(_mm512_castsi512_si128(packed),
                              _mm_sub_epi8(place, _mm_set1_epi8(static_cast<char>(size)))));
    size += std::popcount(bits);
    if (size > block_rows) break;
    c += 64;
    if (c % 256 == 0)
      high = _mm512_mask_add_epi32(high, static_cast<__mmask16>(0xffffu << size), high,
                                   _mm512_set1_epi32(256));
  } while (c < cols);
  column[0] = _mm512_add_epi32(_mm512_cvtepu8_epi32(low), high);
  return size;
}
#endif

// False where more than 16 columns reach the bound; nothing has been written then. k <= 16.
template <class A>
bool top_k_row(const float* row, index_t cols, int k, float* value, std::int32_t* column) {
  constexpr int slots = block_rows, w = width<A>;
  const sixteen<vfloat<A>, A> most = group_maxima<A>(row, cols);
  const vfloat<A> least = xsimd::max(value_at<A>(most, count_before<A>(most), k - 1),
                                     vfloat<A>(std::numeric_limits<float>::lowest()));
  sixteen<vint<A>, A> found;
  const std::int32_t size = columns_not_below<A>(row, cols, least, found);
  if (size > slots) return false;
  sixteen<vfloat<A>, A> v;
  alignas(alignment) std::int32_t from[slots];
  alignas(alignment) float what[slots];
  MOEROUTE_UNROLL
  for (int r = 0; r < slots / w; ++r) {
    const auto i = static_cast<std::size_t>(r);
    const vmask<A> there = xsimd::batch_bool_cast<float>(lane_numbers<A>() < vint<A>(size - r * w));
    const vint<A> c = select<A>(there, found[i], vint<A>(0));
    v[i] = select<A>(there, vfloat<A>::gather(row, c), vfloat<A>(minus_infinity));
    v[i].store_aligned(what + r * w);
    select<A>(there, c, vint<A>(no_expert)).store_aligned(from + r * w);
  }
  const sixteen<vint<A>, A> before = count_before<A>(v);
  for (int r = 0; r < k; ++r) {
    const int s = std::countr_zero(places_equal<A>(before, r));
    column[r * block_rows] = from[s];
    value[r * block_rows] = what[s];
  }
  return true;
}

}  // namespace detail

}  // namespace moeroute::simd
