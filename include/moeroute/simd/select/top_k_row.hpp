// Top-k of a single row: as there are no other rows to fill the lanes, its choices lie side by side
// in them, and ranks are counted.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include <moeroute/base/contract.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/select/compress.hpp>
#include <moeroute/simd/select/kth_key.hpp>
#include <moeroute/simd/select/ordered_key.hpp>
#include <moeroute/simd/select/rank_columns.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// Largest k that top_k_row takes.
inline constexpr int max_row_k = 64;

/// The choices of one row, best first: whole blocks of 16, (-inf, no_expert) where there is none.
struct row_ranks {
  alignas(alignment) float value[max_row_k];
  alignas(alignment) std::int32_t column[max_row_k];
};

namespace detail {

// The largest of each of 16 n groups of columns (c modulo 16 n), in registers; -inf where a group
// has no value.
template <class A, int n>
MOEROUTE_INLINE void group_maxima(const float* row, index_t cols, vfloat<A>* group) {
  // Four registers at least: in a single one every maximum would wait for the one before.
  constexpr int w = width<A>, registers = n * registers_per_block<A>,
                chains = std::max(4, registers);
  vfloat<A> most[chains];
  MOEROUTE_UNROLL
  for (auto& m : most) m = vfloat<A>(minus_infinity);
  index_t c = 0;
  for (; c + chains * w <= cols; c += chains * w) {
    MOEROUTE_UNROLL
    for (int j = 0; j < chains; ++j) most[j] = max_or_second<A>(load<A>(row + c + j * w), most[j]);
  }
  if (c < cols) {
    MOEROUTE_UNROLL
    for (int j = 0; j < chains; ++j)
      if (const index_t here = c + j * w; here < cols)
        most[j] = max_or_second<A>(here + w <= cols
                                       ? load<A>(row + here)
                                       : load_first<A>(row + here, cols - here, minus_infinity),
                                   most[j]);
  }
  MOEROUTE_UNROLL
  for (int half = chains / 2; half >= registers; half /= 2) {
    MOEROUTE_UNROLL
    for (int j = 0; j < half; ++j) most[j] = xsimd::max(most[j], most[j + half]);
  }
  MOEROUTE_UNROLL
  for (int r = 0; r < registers; ++r) group[r] = most[r];
}

// The k-th largest of the values in n registers, in every lane: k of them reach it. No NaN.
template <class A, int n>
MOEROUTE_INLINE vfloat<A> kth_of(const vfloat<A>* x, int k) {
  constexpr int w = width<A>, at_once = n * w < 16 ? n * w : 16;
  alignas(alignment) float all[n * w];
  vint<A> larger[n];
  MOEROUTE_UNROLL
  for (int r = 0; r < n; ++r) {
    x[r].store_aligned(all + r * w);
    larger[r] = vint<A>(0);
  }
  MOEROUTE_FORGET(all);
  for (int first = 0; first < n * w; first += at_once) {
    MOEROUTE_UNROLL
    for (int j = 0; j < at_once; ++j) {
      const vfloat<A> other(all[first + j]);
      MOEROUTE_UNROLL
      for (int r = 0; r < n; ++r) larger[r] = count_where<A>(larger[r], other > x[r]);
    }
  }
  vfloat<A> least(plus_infinity);
  MOEROUTE_UNROLL
  for (int r = 0; r < n; ++r)
    least = xsimd::min(least, select<A>(xsimd::batch_bool_cast<float>(larger[r] < vint<A>(k)), x[r],
                                        vfloat<A>(plus_infinity)));
  return vfloat<A>(xsimd::reduce_min(least));
}

// A value that at least k columns reach, and about k + k^2 / 32 n do; never -inf. k <= 16 n.
template <class A, int n>
MOEROUTE_INLINE vfloat<A> bound_of_row(const float* row, index_t cols, int k) {
  constexpr int registers = n * registers_per_block<A>;
  vfloat<A> group[registers];
  group_maxima<A, n>(row, cols, group);
  return xsimd::max(kth_of<A, registers>(group, k),
                    vfloat<A>(std::numeric_limits<float>::lowest()));
}

// For each value in n registers how many of the first `size` go before it: larger ones, and equal
// ones in lower places. No NaN; -inf past the first `size`.
template <class A, int n>
MOEROUTE_INLINE void count_before(const vfloat<A>* value, int size, vint<A>* before) {
  constexpr int w = width<A>;
  // From place j an equal key goes before those in later places: their keys count as one less.
  alignas(alignment) static constexpr auto later = [] {
    std::array<std::int32_t, 2 * block_rows> list{};
    for (std::size_t i = block_rows; i < list.size(); ++i) list[i] = 1;
    return list;
  }();
  vint<A> key[n];
  alignas(alignment) std::int32_t all[n * w];
  MOEROUTE_UNROLL
  for (int r = 0; r < n; ++r) {
    key[r] = ordered_key<A>(value[r]);
    key[r].store_aligned(all + r * w);
    before[r] = vint<A>(0);
  }
  MOEROUTE_FORGET(all);
  const std::int32_t* after = later.data() + block_rows - 1;
  for (int first = 0; first < size; first += 4, after -= 4) {
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      MOEROUTE_UNROLL
      for (int r = 0; r < n; ++r)
        before[r] = count_where<A>(before[r],
                                   vint<A>(all[first + j]) > key[r] - load<A>(after - j + r * w));
    }
  }
}

#if defined(__AVX512F__)
// The values of the places before which there are none, and one where k is 2, and their columns.
template <class A>
MOEROUTE_INLINE void first_two(vint<A> before, int k, vfloat<A> value, vint<A> column, __m512& v,
                               __m512i& c) {
  const __m512 never = _mm512_set1_ps(minus_infinity);
  const __mmask16 best = _mm512_cmpeq_epi32_mask(before, _mm512_setzero_si512()),
                  next =
                      k == 2 ? _mm512_cmpeq_epi32_mask(before, _mm512_set1_epi32(1)) : __mmask16{0};
  v = _mm512_mask_unpacklo_ps(never, 3, _mm512_mask_compress_ps(never, best, value),
                              _mm512_mask_compress_ps(never, next, value));
  c = _mm512_unpacklo_epi32(_mm512_maskz_compress_epi32(best, column),
                            _mm512_maskz_compress_epi32(next, column));
}
#endif

// Writes the k first of `size` values in n registers and their columns, best first. -inf past the
// first `size`.
template <class A, int n>
MOEROUTE_INLINE void write_in_order(const vfloat<A>* value, const vint<A>* column, int size, int k,
                                    row_ranks& out) {
  constexpr int w = width<A>;
  const int last = std::min(k, size);
  vint<A> before[n];
  count_before<A, n>(value, size, before);
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    const __m512 never = _mm512_set1_ps(minus_infinity);
    const __m512i nobody = _mm512_set1_epi32(no_expert);
    __m512 v;
    __m512i c;
    if (k <= 2) {
      first_two<A>(before[0], k, value[0], column[0], v, c);
    } else {
      // Each place writes its number into the lane of its rank.
      alignas(alignment) std::int32_t rank[w], from[w];
      const __m512i number = lane_numbers<A>();
      before[0].store_aligned(rank);
      _mm512_store_si512(from, number);
      MOEROUTE_FORGET(rank);
      MOEROUTE_FORGET(from);
      __m512i place = number;
      for (int first = 0; first < size; first += 4) {
        MOEROUTE_UNROLL
        for (int j = first; j < first + 4; ++j)
          place = _mm512_mask_broadcastd_epi32(
              place, _mm512_cmpeq_epi32_mask(number, _mm512_set1_epi32(rank[j])),
              _mm_cvtsi32_si128(from[j]));
      }
      const auto wanted = static_cast<__mmask16>((1u << last) - 1);
      v = _mm512_mask_permutexvar_ps(never, wanted, place, value[0]);
      c = _mm512_permutexvar_epi32(place, column[0]);
    }
    _mm512_store_ps(out.value, v);
    _mm512_store_si512(
        out.column, _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, never, _CMP_GT_OQ), nobody, c));
    return;
  }
#endif
  alignas(alignment) float v[n * w];
  alignas(alignment) std::int32_t c[n * w];
  MOEROUTE_UNROLL
  for (int r = 0; r < n; ++r) {
    value[r].store_aligned(v + r * w);
    select<A>(value[r] > vfloat<A>(minus_infinity), column[r], vint<A>(no_expert))
        .store_aligned(c + r * w);
  }
  // Into registers, which are stored whole: what reads them at once does not wait for the cache.
  MOEROUTE_UNROLL
  for (int to = 0; to < registers_per_block<A>; ++to) {
    vfloat<A> best(minus_infinity);
    vint<A> from(no_expert);
    for (int i = 0; i < w && to * w + i < last; ++i) {
      std::uint32_t here = 0;
      MOEROUTE_UNROLL
      for (int r = 0; r < n; ++r)
        here |= static_cast<std::uint32_t>((before[r] == vint<A>(to * w + i)).mask()) << r * w;
      const int at = std::countr_zero(here);
      const vmask<A> lane = xsimd::batch_bool_cast<float>(lane_numbers<A>() == vint<A>(i));
      best = select<A>(lane, vfloat<A>(v[at]), best);
      from = select<A>(lane, vint<A>(c[at]), from);
    }
    best.store_aligned(out.value + to * w);
    from.store_aligned(out.column + to * w);
  }
}

// The columns of a row that reach a bound, ascending, 0 past the end; returns how many there are,
// or more than 16 where 16 places do not hold them.
template <class A>
MOEROUTE_INLINE std::int32_t columns_not_below(const float* row, index_t cols, vfloat<A> least,
                                               vint<A>* column) {
  column_list<A, block_rows> found;
  index_t c = 0;
  do {
    column_mask mask;
    mask_not_below<A, mask_form::joined>(row + c, cols - c, least, mask);
    found.append(&mask, c, std::min(c + 64, cols));
    c += 64;
  } while (c < cols);
  for (int r = 0; r < registers_per_block<A>; ++r) column[r] = found.columns(r);
  return found.size();
}

#if defined(__AVX512F__) && defined(__AVX512VBMI2__)
// In registers: a list in memory would be written in overlapping parts, and reading it would wait
// for them.
template <class A>
  requires(width<A> == 16)
MOEROUTE_INLINE std::int32_t columns_not_below(const float* row, index_t cols, vfloat<A> least,
                                               vint<A>* column) {
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
    if (c % 256 == 0 && c < cols)  // places past the end stay 0: what is there is read
      high = _mm512_mask_add_epi32(high, static_cast<__mmask16>(0xffffu << size), high,
                                   _mm512_set1_epi32(256));
  } while (c < cols);
  column[0] = _mm512_add_epi32(_mm512_cvtepu8_epi32(low), high);
  return size;
}
#endif

// The values of a row at the columns in registers, all of which are in [0, cols).
template <class A, int n>
MOEROUTE_INLINE void values_at(const float* row, [[maybe_unused]] index_t cols,
                               const vint<A>* column, vfloat<A>* value) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    // Registers that hold the row: a gather costs more.
    if (cols == 32 || cols == 64 || cols == 128) {
      const __m512i c = column[0];
      const auto of_two = [&](int j) {
        return _mm512_permutex2var_ps(load<A>(row + 16 * j), c, load<A>(row + 16 * j + 16));
      };
      if (cols == 32) {
        value[0] = of_two(0);
        return;
      }
      const __mmask16 odd = _mm512_test_epi32_mask(c, _mm512_set1_epi32(32));
      __m512 v = _mm512_mask_blend_ps(odd, of_two(0), of_two(2));
      if (cols == 128)
        v = _mm512_mask_blend_ps(_mm512_test_epi32_mask(c, _mm512_set1_epi32(64)), v,
                                 _mm512_mask_blend_ps(odd, of_two(4), of_two(6)));
      value[0] = v;
      return;
    }
  }
#endif
  MOEROUTE_UNROLL
  for (int r = 0; r < n; ++r) value[r] = vfloat<A>::gather(row, column[r]);
}

// Entries of the list of top_k_list: a panel of columns, what is kept of those before, and the rest
// of a register.
inline constexpr index_t list_panel = 1024;
inline constexpr index_t list_room = list_panel + max_row_k + block_rows;

// Keeps the k best of n > k listed values, none of which has a key below `bound`, in their order;
// returns the key of the k-th, which a later column has to be above.
template <class A>
std::int32_t keep_best(float* value, std::int32_t* column, index_t n, index_t k,
                       std::int32_t bound) {
  alignas(alignment) std::int32_t key[list_room];
  index_t i = 0;
  for (; i < n; i += width<A>) ordered_key<A>(load<A>(value + i)).store_unaligned(key + i);
  std::fill(key + n, key + i, lowest_key);
  // Where fewer than k are above the least value it is the k-th: many columns tie.
  index_t ties = k - count_at_least<A>(key, n, bound + 1), at = 0;
  if (ties <= 0) {
    bound = kth_largest_bound<A>(key, n, k, 0);
    ties = k - count_at_least<A>(key, n, bound + 1);
  }
  const vint<A> least(bound);
  for (i = 0; i < n; i += width<A>) {
    const vint<A> x = load<A>(key + i);
    const std::uint64_t equal = (x == least).mask();
    std::uint64_t bits = (x > least).mask();
    if (ties >= std::popcount(equal)) {
      bits |= equal;
      ties -= std::popcount(equal);
    } else {
      for (std::uint64_t left = equal; ties > 0; --ties, left &= left - 1) bits |= left & -left;
    }
    for (; bits != 0; bits &= bits - 1, ++at) {
      value[at] = value[i + std::countr_zero(bits)];
      column[at] = column[i + std::countr_zero(bits)];
    }
  }
  return bound;
}

// Any k up to max_row_k and any number of columns that reach the bound: they are listed in memory,
// panel by panel.
template <class A>
MOEROUTE_OUT_OF_LINE void top_k_list(const float* row, index_t cols, int k, row_ranks& out) {
  constexpr int w = width<A>;
  alignas(alignment) float value[list_room];
  alignas(alignment) std::int32_t column[list_room], key[round_up(max_row_k, block_rows)];
  std::int32_t order[max_row_k];
  vfloat<A> least(std::numeric_limits<float>::lowest());
  if (k <= 16 && cols > 32)
    least = bound_of_row<A, 2>(row, cols, k);
  else if (cols > max_row_k)
    least = bound_of_row<A, 4>(row, cols, k);
  std::int32_t bound = ordered_key(least.get(0));
  index_t n = 0;
  for (index_t first = 0; first < cols; first += list_panel) {
    const index_t end = std::min(first + list_panel, cols);
    for (index_t c = first; c < end; c += w) {
      const vfloat<A> x =
          end - c >= w ? load<A>(row + c) : load_first<A>(row + c, end - c, minus_infinity);
      n += store_chosen<A>(x >= least, x, static_cast<std::int32_t>(c), value + n, column + n);
    }
    // Ranks of all in the list are counted in the end: no more of them than need be.
    if (n > (end < cols ? k : std::max(k, 48))) {
      bound = keep_best<A>(value, column, n, k, bound);
      least = vfloat<A>(value_of_key(bound + 1));
      n = k;
    }
  }
  rank_columns<A>(value, n, key, order);
  for (index_t r = 0; r < round_up(k, block_rows); ++r) {
    const bool there = r < std::min<index_t>(k, n);
    out.value[r] = there ? value[order[r]] : minus_infinity;
    out.column[r] = there ? column[order[r]] : no_expert;
  }
}

// The columns that reach the bound of 16 n groups, and their values: -inf past the end. Returns how
// many there are; where they are more than 16 nothing has been written.
template <class A, int n>
MOEROUTE_INLINE std::int32_t columns_by_bound(const float* row, index_t cols, int k,
                                              vfloat<A>* value, vint<A>* column) {
  constexpr int w = width<A>, registers = registers_per_block<A>;
  const vfloat<A> least = bound_of_row<A, n>(row, cols, k);
  const std::int32_t size = columns_not_below<A>(row, cols, least, column);
  if (size > block_rows) return size;
  values_at<A, registers>(row, cols, column, value);
  MOEROUTE_UNROLL
  for (int r = 0; r < registers; ++r)
    value[r] = select<A>(xsimd::batch_bool_cast<float>(lane_numbers<A>() < vint<A>(size - r * w)),
                         value[r], vfloat<A>(minus_infinity));
  return size;
}

// Up to 16 columns: one or a few registers hold them.
template <class A>
MOEROUTE_INLINE std::int32_t all_columns(const float* row, index_t cols, vfloat<A>* value,
                                         vint<A>* column) {
  constexpr int w = width<A>;
  MOEROUTE_UNROLL
  for (int r = 0; r < registers_per_block<A>; ++r) {
    const vfloat<A> x = load_first<A>(row + std::min<index_t>(r * w, cols),
                                      std::clamp<index_t>(cols - r * w, 0, w), minus_infinity);
    value[r] = max_or_second<A>(x, vfloat<A>(minus_infinity));
    column[r] = lane_numbers<A>() + vint<A>(r * w);
  }
  return static_cast<std::int32_t>(cols);
}

// The largest value, in every lane, and the first column that has it; -inf and no_expert where
// there is none above it. Out of line, but what it returns stays in a register.
template <class A>
MOEROUTE_OUT_OF_LINE vfloat<A> best_of_row(const float* row, index_t cols, std::int32_t& found) {
  vfloat<A> group[registers_per_block<A>];
  group_maxima<A, 1>(row, cols, group);
  MOEROUTE_UNROLL
  for (int r = 1; r < registers_per_block<A>; ++r) group[0] = xsimd::max(group[0], group[r]);
  const vfloat<A> most = largest_lane<A>(group[0]);
  // From the last columns to the first, without a branch that depends on the data; -inf is the
  // least of all, so what reaches the largest is equal to it.
  index_t c = cols / 64 * 64;
  index_t column = no_expert;
  const auto look = [&](index_t n) MOEROUTE_INLINE_LAMBDA {
    column_mask mask;
    mask_not_below<A, mask_form::joined>(row + c, n, most, mask);
    const std::uint64_t bits = mask.bits();
    const index_t here = c + std::countr_zero(bits);
    column = bits != 0 ? here : column;
  };
  if (c < cols) look(cols - c);
  while ((c -= 64) >= 0) look(64);
  // The value does not wait for its column, but for zeros: they keep the sign that the row gives.
  found = static_cast<std::int32_t>(column);
  if (any<A>(most == vfloat<A>(0.0f))) [[unlikely]]
    return vfloat<A>(row[column]);
  if (!any<A>(most > vfloat<A>(minus_infinity))) [[unlikely]]
    found = no_expert;
  return most;
}

template <class A>
MOEROUTE_OUT_OF_LINE void top_one(const float* row, index_t cols, row_ranks& out) {
  constexpr int w = width<A>;
  std::int32_t column;
  const vfloat<A> most = best_of_row<A>(row, cols, column);
  const vint<A> lane = lane_numbers<A>();
  MOEROUTE_UNROLL
  for (int r = 0; r < registers_per_block<A>; ++r) {
    const vmask<A> first = xsimd::batch_bool_cast<float>(lane == vint<A>(-r * w));
    select<A>(first, most, vfloat<A>(minus_infinity)).store_aligned(out.value + r * w);
    select<A>(first, vint<A>(column), vint<A>(no_expert)).store_aligned(out.column + r * w);
  }
}

// The same for k > 1. Compiled once for all k up to 8 and once for all others.
template <class A, bool beyond_8>
MOEROUTE_OUT_OF_LINE void top_few(const float* row, index_t cols, int k, row_ranks& out) {
  constexpr int registers = registers_per_block<A>;
  vfloat<A> value[registers];
  vint<A> column[registers];
  std::int32_t size = block_rows + 1;
  if (cols <= block_rows)
    size = all_columns<A>(row, cols, value, column);
  else if (k <= 8)
    size = columns_by_bound<A, 1>(row, cols, k, value, column);
  else if (beyond_8 && k <= 10 && cols > 32)
    size = columns_by_bound<A, 2>(row, cols, k, value, column);
  if (size > block_rows) return top_k_list<A>(row, cols, k, out);
  if (width<A> == 8 && size <= width<A>)
    write_in_order<A, 1>(value, column, size, k, out);
  else
    write_in_order<A, registers>(value, column, size, k, out);
}

}  // namespace detail

/// The k best columns of one row, best first.
///
/// Shapes: row has cols floats. Where it has fewer than k finite or +inf values the rest is (-inf,
/// no_expert), up to the next multiple of 16. Requires: 1 <= k <= min(cols, max_row_k), cols <=
/// 2^20. Cost: two passes over the row and a count of ranks in registers for k up to 10; a list in
/// memory for larger k, and where many columns tie. No allocation. Determinism: exact; the same on
/// every ISA.
///
/// Who knows that k is at most `most` compiles less.
template <class A = default_arch, int most = max_row_k>
MOEROUTE_INLINE void top_k_row(const float* row, index_t cols, int k, row_ranks& out) {
  MOEROUTE_EXPECTS(k >= 1 && k <= cols && k <= most && most <= max_row_k);
  if (k == 1) return detail::top_one<A>(row, cols, out);
  if constexpr (most > 1) detail::top_few<A, (most > 8)>(row, cols, k, out);
}

/// The same for k <= 16 in registers, where the lanes from k on mean nothing: one or two of a short
/// row do not go through memory.
template <class A = default_arch>
MOEROUTE_INLINE void top_k_row(const float* row, index_t cols, int k, vfloat<A>* value,
                               vint<A>* column) {
  MOEROUTE_EXPECTS(k >= 1 && k <= cols && k <= block_rows);
  if (k == 1) {
    std::int32_t best;
    value[0] = detail::best_of_row<A>(row, cols, best);
    column[0] = vint<A>(best);
    return;
  }
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    if (k == 2 && cols <= block_rows) {
      vint<A> before;
      __m512 v;
      __m512i c;
      detail::all_columns<A>(row, cols, value, column);
      detail::count_before<A, 1>(value, static_cast<int>(cols), &before);
      detail::first_two<A>(before, 2, value[0], column[0], v, c);
      value[0] = v;
      column[0] = select<A>(value[0] > vfloat<A>(minus_infinity), vint<A>(c), vint<A>(no_expert));
      return;
    }
  }
#endif
  row_ranks ranks;
  detail::top_few<A, true>(row, cols, k, ranks);
  MOEROUTE_UNROLL
  for (int r = 0; r < registers_per_block<A>; ++r) {
    value[r] = load<A>(ranks.value + r * width<A>);
    column[r] = load<A>(ranks.column + r * width<A>);
  }
}

/// The values of a row at the columns that were chosen, in place of those that they were chosen by.
template <class A = default_arch>
MOEROUTE_INLINE void take_values(const float* row, index_t cols, int k, row_ranks& c) {
  constexpr int w = width<A>, n = registers_per_block<A>;
  for (int first = 0; first < k; first += block_rows) {
    vint<A> column[n];
    vfloat<A> value[n];
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r)
      column[r] = xsimd::max(vint<A>::load_aligned(c.column + first + r * w), vint<A>(0));
    detail::values_at<A, n>(row, cols, column, value);
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r)
      select<A>(differs<A>(vint<A>::load_aligned(c.column + first + r * w), vint<A>(no_expert)),
                value[r], vfloat<A>(minus_infinity))
          .store_aligned(c.value + first + r * w);
  }
}

/// Columns of a row whose groups of `size` were moved together become those they had before: group
/// i began at start[i].
template <class A = default_arch>
void move_columns(row_ranks& c, int k, const std::int32_t* start, int groups, std::int32_t size) {
  for (int r = 0; r < k; r += width<A>) {
    const vint<A> column = vint<A>::load_aligned(c.column + r);
    vint<A> back = column;
    for (std::int32_t g = 0, moved = 0; g < groups; ++g) {
      const std::int32_t by = start[g] - g * size;
      back += xsimd::select(column >= vint<A>(g * size), vint<A>(by - moved), vint<A>(0));
      moved = by;
    }
    back.store_aligned(c.column + r);
  }
}

/// So many rows at most are selected and weighed sooner one by one than side by side in lanes.
///
/// Measured from T = 1 to 15 on the gates of named models. A full register of rows costs the same
/// however few of them there are, so narrow registers are full sooner.
template <class A = default_arch>
constexpr index_t rows_sooner_alone(index_t cols, index_t k) {
  if (width<A> == 4) return 2;
  if (cols <= 32) return 4;
  if (k == 1) return 10;
  if (width<A> == 8) return k <= 10 ? 5 : 3;
  return k <= 10 ? 8 : 5;
}

/// The choices of a row whose ranks are bits of `first`, then those of `then`, each in their order,
/// k <= 64 of them at most; whole blocks of 16, (-inf, no_expert) after them.
///
/// Requires: from holds what the bits name; the bits are apart, and `to` is not `from`. Cost: a few
/// instructions where all ranks lie in one register of 16, else a step for each of k.
template <class A>
MOEROUTE_INLINE void take_ranks(const row_ranks& from, std::uint64_t first, std::uint64_t then,
                                int k, row_ranks& to) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    if ((first | then) <= 0xffff && k <= 16) {
      const int n = std::popcount(first), most = std::min(k, n + std::popcount(then));
      const auto of_first = static_cast<__mmask16>(first), of_then = static_cast<__mmask16>(then),
                 after = static_cast<__mmask16>(0xffffu << n),
                 there = static_cast<__mmask16>((1u << most) - 1);
      const __m512 x = load<A>(from.value);
      const __m512i e = load<A>(from.column);
      const __m512 v = _mm512_mask_expand_ps(_mm512_maskz_compress_ps(of_first, x), after,
                                             _mm512_maskz_compress_ps(of_then, x));
      const __m512i c = _mm512_mask_expand_epi32(_mm512_maskz_compress_epi32(of_first, e), after,
                                                 _mm512_maskz_compress_epi32(of_then, e));
      _mm512_store_ps(to.value, _mm512_mask_blend_ps(there, _mm512_set1_ps(minus_infinity), v));
      _mm512_store_si512(to.column,
                         _mm512_mask_blend_epi32(there, _mm512_set1_epi32(no_expert), c));
      return;
    }
  }
#endif
  for (int out = 0; out < round_up(k, block_rows); ++out) {
    const bool of_first = first != 0;
    const std::uint64_t bits = of_first ? first : then, left = bits & (bits - 1);
    first = of_first ? left : 0;
    then = of_first ? then : left;
    const bool any = bits != 0 && out < k;
    const int r = any ? std::countr_zero(bits) : 0;
    to.value[out] = any ? from.value[r] : minus_infinity;
    to.column[out] = any ? from.column[r] : no_expert;
  }
}

}  // namespace moeroute::simd
