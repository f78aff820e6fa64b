// The values of a row at a short list of columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/mask.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// value[i][s] = rows[i][column[i][s]] for n rows and s < used. Every column is in [0, cols).
/// Requires: used is a multiple of step, of which the code is one piece.
template <class A, int step, int slots>
MOEROUTE_INLINE void pick(const float* const* rows, int n, [[maybe_unused]] index_t cols, int used,
                          const std::int32_t (*column)[slots], float (*value)[slots]) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    if (cols <= 64) {  // four registers hold the row
      for (int i = 0; i < n; ++i) {
        __m512 x[4];
        MOEROUTE_UNROLL
        for (int j = 0; j < 4; ++j)
          x[j] = load_first<A>(rows[i] + 16 * j, std::clamp<index_t>(cols - 16 * j, 0, 16), 0.0f);
        for (int first = 0; first < used; first += step) {
          MOEROUTE_UNROLL
          for (int s = first; s < first + step; s += 16) {
            const __m512i c = _mm512_load_si512(column[i] + s);
            const __m512 low = _mm512_permutex2var_ps(x[0], c, x[1]);
            const __m512 high = _mm512_permutex2var_ps(x[2], c, x[3]);
            const __mmask16 upper = _mm512_test_epi32_mask(c, _mm512_set1_epi32(32));
            _mm512_store_ps(value[i] + s, _mm512_mask_blend_ps(upper, low, high));
          }
        }
      }
      return;
    }
  }
#endif
  // Volatile keeps compilers from replacing plain copies by inserts into registers or by a gather:
  // slower.
  for (int i = 0; i < n; ++i) {
    for (int first = 0; first < used; first += step) {
      MOEROUTE_UNROLL
      for (int s = first; s < first + step; ++s)
        static_cast<volatile float&>(value[i][s]) = rows[i][column[i][s]];
    }
  }
}

}  // namespace moeroute::simd
