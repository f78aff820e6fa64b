// Square transposes of registers: rows of tokens become lanes of tokens.
#pragma once

#include <algorithm>
#include <concepts>
#include <utility>

#include <moeroute/simd/batch.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

template <class A = default_arch>
using vdouble = xsimd::batch<double, A>;

namespace detail {

// Whether xsimd has no transpose that can be trusted: where registers are arrays, and on SVE, where
// what it makes of more than four lanes is no transpose.
template <class A>
inline constexpr bool transposes_in_memory = is_portable<A>
#if XSIMD_WITH_SVE
                                             || std::derived_from<A, xsimd::sve>
#endif
    ;

// Out of line: inlined, g++ 12 makes wrong code of arrays.
template <class T, int n, class V>
MOEROUTE_OUT_OF_LINE void transpose_lanes(V* x) {
  alignas(alignment) T lane[n][n];
  for (int i = 0; i < n; ++i) x[i].store_aligned(lane[i]);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j) std::swap(lane[i][j], lane[j][i]);
  for (int i = 0; i < n; ++i) x[i] = V::load_aligned(lane[i]);
}

}  // namespace detail

/// Transposes `width` registers of `width` floats in place.
template <class A>
MOEROUTE_INLINE void transpose(vfloat<A>* x) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    // xsimd goes through memory here. Pairs, then fours inside the 128-bit lanes, then the lanes
    // themselves.
    __m512d pair[16];
    MOEROUTE_UNROLL
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
      pair[i + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    }
    __m512 four[16];  // four[i + j]: column j of every lane, rows i to i + 3
    MOEROUTE_UNROLL
    for (int i = 0; i < 16; i += 4) {
      four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[i], pair[i + 2]));
      four[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[i], pair[i + 2]));
      four[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair[i + 1], pair[i + 3]));
      four[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair[i + 1], pair[i + 3]));
    }
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512 even_low = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x88);
      const __m512 even_high = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88);
      const __m512 odd_low = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xdd);
      const __m512 odd_high = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xdd);
      x[j] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      x[4 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      x[8 + j] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      x[12 + j] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
    return;
  } else
#endif
      if constexpr (detail::transposes_in_memory<A>) {
    detail::transpose_lanes<float, width<A>>(x);
  } else {
    xsimd::transpose(x, x + width<A>);
  }
}

/// Transposes width / 2 registers of as many doubles in place.
template <class A>
MOEROUTE_INLINE void transpose(vdouble<A>* x) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    __m512d pair[8];
    MOEROUTE_UNROLL
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm512_unpacklo_pd(x[i], x[i + 1]);
      pair[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
    }
    MOEROUTE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const __m512d even_low = _mm512_shuffle_f64x2(pair[j], pair[2 + j], 0x88);
      const __m512d even_high = _mm512_shuffle_f64x2(pair[4 + j], pair[6 + j], 0x88);
      const __m512d odd_low = _mm512_shuffle_f64x2(pair[j], pair[2 + j], 0xdd);
      const __m512d odd_high = _mm512_shuffle_f64x2(pair[4 + j], pair[6 + j], 0xdd);
      x[j] = _mm512_shuffle_f64x2(even_low, even_high, 0x88);
      x[2 + j] = _mm512_shuffle_f64x2(odd_low, odd_high, 0x88);
      x[4 + j] = _mm512_shuffle_f64x2(even_low, even_high, 0xdd);
      x[6 + j] = _mm512_shuffle_f64x2(odd_low, odd_high, 0xdd);
    }
    return;
  } else
#endif
      if constexpr (detail::transposes_in_memory<A>) {
    detail::transpose_lanes<double, width<A> / 2>(x);
  } else if constexpr (width<A> == 4) {
    const vdouble<A> first = x[0];
    x[0] = xsimd::zip_lo(first, x[1]);
    x[1] = xsimd::zip_hi(first, x[1]);
  } else {
    xsimd::transpose(x, x + width<A> / 2);
  }
}

/// Columns [c, c + width) of `width` rows, transposed: out[j] holds column c + j, one row per lane.
///
/// Columns at or past `cols` read as `fill`. rows[i] points at row i.
template <class A>
MOEROUTE_INLINE void load_transposed(const float* const* rows, index_t c, index_t cols, float fill,
                                     vfloat<A>* out) {
  constexpr int w = width<A>;
  if (c + w <= cols) {
    MOEROUTE_UNROLL
    for (int i = 0; i < w; ++i) out[i] = load<A>(rows[i] + c);
  } else {
    for (int i = 0; i < w; ++i)
      out[i] = load_first<A>(rows[i] + c, std::clamp<index_t>(cols - c, 0, w), fill);
  }
  transpose<A>(out);
}

namespace detail {

// Registers of values that may be integers behind the pointer: copied, for no lvalue of another
// type may read or write them.
template <class A>
MOEROUTE_INLINE vfloat<A> load_words(const float* p) {
  vfloat<A> x;
  __builtin_memcpy(static_cast<void*>(&x), p, sizeof x);
  return x;
}
template <class A>
MOEROUTE_INLINE void store_words(float* p, vfloat<A> x) {
  __builtin_memcpy(p, static_cast<const void*>(&x), sizeof x);
}

// store_ranks for a k that is a power of two: log2(k) rounds of zips.
template <class A, int k>
MOEROUTE_INLINE void zip_ranks(const float* ranks, int n, float* out) {
  constexpr int w = width<A>;
  for (int first = 0; first < n; first += w) {
    vfloat<A> x[k], y[k];
    MOEROUTE_UNROLL
    for (int r = 0; r < k; ++r) x[r] = load_words<A>(ranks + r * block_rows + first);
    MOEROUTE_UNROLL
    for (int round = 1; round < k; round *= 2) {
      MOEROUTE_UNROLL
      for (int r = 0; r < k / 2; ++r) {
        y[2 * r] = xsimd::zip_lo(x[r], x[r + k / 2]);
        y[2 * r + 1] = xsimd::zip_hi(x[r], x[r + k / 2]);
      }
      MOEROUTE_UNROLL
      for (int r = 0; r < k; ++r) x[r] = y[r];
    }
    const int size = (n - first) * k;
    float* const to = out + first * k;
    for (int r = 0; r < k && r * w < size; ++r) {
      if (size - r * w >= w)
        store_words<A>(to + r * w, x[r]);
      else
        store_first<A>(to + r * w, size - r * w, x[r]);
    }
  }
}

}  // namespace detail

/// out[row * k + r] = ranks[r * 16 + row] for n rows: from one row per lane to one row after the
/// other.
///
/// Any 32-bit values: bits are moved, nothing is computed. Writes out[0, n * k) only.
template <class A = default_arch>
void store_ranks(const float* ranks, int k, int n, float* out) {
  constexpr int w = width<A>;
  const int size = n * k;
  if (n > 2 && k == 1) return detail::zip_ranks<A, 1>(ranks, n, out);
  if (n > 2 && k == 2) return detail::zip_ranks<A, 2>(ranks, n, out);
  if (n > 2 && k == 4) return detail::zip_ranks<A, 4>(ranks, n, out);
  if (size <= 2 * block_rows) {
    // One by one: a transpose costs more than 32 moves.
    for (int i = 0; i < n; ++i)
      for (int r = 0; r < k; ++r) __builtin_memcpy(out++, ranks + r * block_rows + i, sizeof *out);
    return;
  }
  for (int first = 0; first < n; first += w) {
    for (int r = 0; r < k; r += w) {
      vfloat<A> x[w];
      MOEROUTE_UNROLL
      for (int j = 0; j < w; ++j)
        x[j] = detail::load_words<A>(ranks + (r + j < k ? r + j : k - 1) * block_rows + first);
      transpose<A>(x);
      const int rows = n - first < w ? n - first : w;
      for (int i = 0; i < rows; ++i) {
        // What a full register writes past the row is written again by the rows that follow.
        const int at = (first + i) * k + r;
        if (at + w <= size && (r + w <= k || k < w)) {
          detail::store_words<A>(out + at, x[i]);
        } else {
          store_first<A>(out + at, k - r < w ? k - r : w, x[i]);
        }
      }
    }
  }
}

}  // namespace moeroute::simd
