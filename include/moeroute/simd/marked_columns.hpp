// Rows whose columns carry a bit each: what is done to the marked ones only.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include <moeroute/simd/batch.hpp>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

namespace detail {

// The bits of the columns c to c + width - 1 as lanes. c is a multiple of the width.
template <class A>
MOEROUTE_INLINE vmask<A> marked_lanes(const std::uint64_t* bits, index_t c) {
  constexpr std::uint64_t lanes = (std::uint64_t{1} << width<A>)-1;
  return vmask<A>::from_mask(bits[c >> 6] >> (c & 63) & lanes);
}

// out[c] = f(row[c], whether c is marked).
template <class A, class F>
MOEROUTE_INLINE void map_marked(const float* row, index_t cols, const std::uint64_t* bits,
                                float* out, F&& f) {
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>)
    f(load<A>(row + c), marked_lanes<A>(bits, c)).store_unaligned(out + c);
  if (c < cols)
    store_first<A>(out + c, cols - c,
                   f(load_first<A>(row + c, cols - c, minus_infinity), marked_lanes<A>(bits, c)));
}

}  // namespace detail

/// The least value of a row above -inf and the largest; (+inf, -inf) where there is none.
struct row_bounds {
  float least, most;
  /// 0 where there is none or the largest is +inf.
  float range() const { return most > least && most < plus_infinity ? most - least : 0.0f; }
};

/// NaN counts as -inf.
template <class A = default_arch>
row_bounds bounds_of(const float* row, index_t cols) {
  const vfloat<A> up(plus_infinity), down(minus_infinity);
  vfloat<A> least = up, most = down;
  const auto see = [&](vfloat<A> x) {
    most = select<A>(x > most, x, most);
    least = select<A>((x > down) & (x < least), x, least);
  };
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>) see(load<A>(row + c));
  if (c < cols) see(load_first<A>(row + c, cols - c, minus_infinity));
  return {-largest_lane<A>(-least).get(0), largest_lane<A>(most).get(0)};
}

/// The least value of a row above -inf, +inf where there is none.
template <class A = default_arch>
float least_of(const float* row, index_t cols) {
  const vfloat<A> down(minus_infinity);
  vfloat<A> least(plus_infinity);
  const auto see = [&](vfloat<A> x) { least = select<A>((x > down) & (x < least), x, least); };
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>) see(load<A>(row + c));
  if (c < cols) see(load_first<A>(row + c, cols - c, minus_infinity));
  return -largest_lane<A>(-least).get(0);
}

/// out[c] = row[c] + bonus in marked columns, row[c] in others. One rounding each.
template <class A = default_arch>
void add_to_marked(const float* row, index_t cols, const std::uint64_t* bits, float bonus,
                   float* out) {
  const vfloat<A> more(bonus);
  detail::map_marked<A>(row, cols, bits, out, [&](vfloat<A> x, vmask<A> marked) {
    return select<A>(marked, x + more, x);
  });
}

/// The same with +inf where row[c] is `most`, the largest of the row; returns how many are.
template <class A = default_arch>
MOEROUTE_INLINE int add_to_marked_after(const float* row, index_t cols, const std::uint64_t* bits,
                                        float bonus, float most, float* out) {
  const vfloat<A> more(bonus), top(most), first(plus_infinity);
  int equal = 0;
  detail::map_marked<A>(row, cols, bits, out,
                        [&](vfloat<A> x, vmask<A> marked) MOEROUTE_INLINE_LAMBDA {
                          const vmask<A> best = x == top;
                          equal += std::popcount(best.mask());
                          return select<A>(best, first, select<A>(marked, x + more, x));
                        });
  return equal;
}

/// out[c] = row[c] in marked columns, -inf in others.
template <class A = default_arch>
void keep_marked(const float* row, index_t cols, const std::uint64_t* bits, float* out) {
  detail::map_marked<A>(row, cols, bits, out, [](vfloat<A> x, vmask<A> marked) {
    return select<A>(marked, x, vfloat<A>(minus_infinity));
  });
}

/// The largest value of the marked columns above -inf and the first of them that holds it; (-inf,
/// cols) where there is none.
struct marked_best {
  float value;
  index_t column;
};
template <class A = default_arch>
marked_best best_of_marked(const float* row, index_t cols, const std::uint64_t* bits) {
  const vfloat<A> down(minus_infinity);
  vfloat<A> most = down;
  const auto at = [&](index_t c) {
    return cols - c >= width<A> ? load<A>(row + c)
                                : load_first<A>(row + c, cols - c, minus_infinity);
  };
  for (index_t c = 0; c < cols; c += width<A>) {
    const vfloat<A> x = at(c);
    most = select<A>(detail::marked_lanes<A>(bits, c) & (x > most), x, most);
  }
  most = largest_lane<A>(most);
  marked_best best{most.get(0), cols};
  // From the last columns to the first, without a branch that depends on the data.
  for (index_t c = (cols - 1) / width<A> * width<A>; c >= 0; c -= width<A>) {
    const auto here = (detail::marked_lanes<A>(bits, c) & (at(c) == most) & (most > down)).mask();
    const index_t column = c + std::countr_zero(here);
    best.column = here != 0 ? column : best.column;
  }
  return best;
}

/// Which of the columns in a register are marked. A lane outside [0, cols) gives either.
template <class A = default_arch>
MOEROUTE_INLINE vmask<A> marked_at(const std::uint64_t* bits, index_t cols, vint<A> column) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    const __m512i c = column;
    __m512i word;
    if (cols <= 512) {
      const auto words = static_cast<unsigned>((cols + 63) / 64 * 2);
      word = _mm512_permutexvar_epi32(
          _mm512_srli_epi32(c, 5),
          _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << words) - 1), bits));
    } else {
      const __m512i in = _mm512_min_epu32(c, _mm512_set1_epi32(static_cast<int>(cols - 1)));
      word = _mm512_i32gather_epi32(_mm512_srli_epi32(in, 5), bits, 4);
    }
    const __m512i bit =
        _mm512_sllv_epi32(_mm512_set1_epi32(1), _mm512_and_si512(c, _mm512_set1_epi32(31)));
    return _mm512_test_epi32_mask(word, bit);
  }
#endif
#if defined(__AVX2__)
  if constexpr (width<A> == 8 && !is_portable<A>) {
    const __m256i c = column;
    const __m256i in = _mm256_min_epu32(c, _mm256_set1_epi32(static_cast<int>(cols - 1)));
    const __m256i word =
        _mm256_i32gather_epi32(reinterpret_cast<const int*>(bits), _mm256_srli_epi32(in, 5), 4);
    // The bit becomes the sign.
    const __m256i up = _mm256_sllv_epi32(
        word, _mm256_sub_epi32(_mm256_set1_epi32(31), _mm256_and_si256(c, _mm256_set1_epi32(31))));
    return vmask<A>(_mm256_castsi256_ps(_mm256_srai_epi32(up, 31)));
  }
#endif
  alignas(alignment) std::int32_t lane[width<A>];
  column.store_aligned(lane);
  std::uint64_t marked = 0;
  for (int i = 0; i < width<A>; ++i) {
    const auto c = std::min<std::uint64_t>(static_cast<std::uint32_t>(lane[i]),
                                           static_cast<std::uint64_t>(cols - 1));
    marked |= (bits[c >> 6] >> (c & 63) & 1) << i;
  }
  return vmask<A>::from_mask(marked);
}

/// list[i]: the i-th marked column; returns how many there are. list holds cols.
inline index_t list_marked(const std::uint64_t* bits, index_t cols, std::int32_t* list) {
  index_t n = 0;
  for (index_t first = 0; first < cols; first += 64)
    for (std::uint64_t left = bits[first >> 6]; left != 0; left &= left - 1)
      list[n++] = static_cast<std::int32_t>(first + std::countr_zero(left));
  return n;
}

/// out[i] = row[list[i]], where list has the marked columns; -inf up to `size`. out holds 16 more.
/// Returns whether the row has a +inf in any column.
template <class A = default_arch>
bool pack_marked(const float* row, index_t cols, const std::uint64_t* bits, index_t size,
                 float* out) {
  const vfloat<A> top(plus_infinity);
  vmask<A> infinite(false);
  index_t n = 0;
  for (index_t c = 0; c < cols; c += width<A>) {
    const vfloat<A> x =
        cols - c >= width<A> ? load<A>(row + c) : load_first<A>(row + c, cols - c, minus_infinity);
    infinite = infinite | (x == top);
    const vmask<A> marked = detail::marked_lanes<A>(bits, c);
#if defined(__AVX512F__)
    if constexpr (width<A> == 16) {
      _mm512_storeu_ps(out + n, _mm512_maskz_compress_ps(marked, x));
      n += std::popcount(marked.mask());
      continue;
    }
#endif
    alignas(alignment) float lane[width<A>];
    x.store_aligned(lane);
    for (auto left = marked.mask(); left != 0; left &= left - 1)
      out[n++] = lane[std::countr_zero(left)];
  }
  std::fill(out + std::min(n, size), out + size, minus_infinity);
  return any<A>(infinite);
}

/// column[i] = list[column[i]] for whole registers of columns; -1 where it is outside [0, n).
template <class A = default_arch>
void renumber(std::int32_t* column, index_t size, const std::int32_t* list, index_t n) {
  const vint<A> none(-1), zero(0), end(static_cast<std::int32_t>(n));
  for (index_t i = 0; i < size; i += width<A>) {
    const vint<A> c = load<A>(column + i);
    const auto there = (c >= zero) & (c < end);
    const vint<A> at = n == 0 ? none : vint<A>::gather(list, xsimd::select(there, c, zero));
    xsimd::select(there, at, none).store_unaligned(column + i);
  }
}

/// value[r][i] = rows[i][column[r][i]] for n rows, rank by rank, one row per lane; a column outside
/// [0, cols) leaves its value.
template <class A = default_arch>
void take_values(const float* rows, index_t stride, int n, index_t cols, const std::int32_t* column,
                 int k, float* value) {
  // Where 32 bits number all of it.
  if (stride <= (index_t{1} << 26)) {
    const auto by = static_cast<std::int32_t>(stride);
    for (int first = 0; first < n; first += width<A>) {
      const vint<A> number = lane_numbers<A>() + vint<A>(first);
      const vint<A> start = number * vint<A>(by);
      const auto there_row = number < vint<A>(n);
      for (int r = 0; r < k; ++r) {
        const vint<A> c = load<A>(column + r * block_rows + first);
        const auto there =
            there_row & (c >= vint<A>(0)) & (c < vint<A>(static_cast<std::int32_t>(cols)));
        const vfloat<A> x = vfloat<A>::gather(rows, xsimd::select(there, start + c, vint<A>(0)));
        float* const to = value + r * block_rows + first;
        select<A>(xsimd::batch_bool_cast<float>(there), x, load<A>(to)).store_unaligned(to);
      }
    }
    return;
  }
  for (int r = 0; r < k; ++r)
    for (int i = 0; i < n; ++i)
      if (const std::int32_t c = column[r * block_rows + i]; c >= 0 && c < cols)
        value[r * block_rows + i] = rows[i * stride + c];
}

}  // namespace moeroute::simd
