// The two largest values of every group of neighbouring columns, one row per lane.
#pragma once

#include <algorithm>

#include <moeroute/base/index.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/transpose.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// best and second of the `size` columns of each group, for n rows (1 to 16); NaN counts as -inf.
///
/// Shapes: rows of groups * size floats, `stride` apart; best and second are
/// [groups][16], group by group, one row per lane; lanes at or past n repeat the last row. second
/// is -inf where size is 1. Cost: a transpose and three operations per register, no allocation.
/// Determinism: exact.
template <class A = default_arch>
void best_two_of_groups(const float* rows, index_t stride, int n, index_t groups, index_t size,
                        float* best, float* second) {
  constexpr int w = width<A>;
  using F = vfloat<A>;
  for (int lane = 0; lane < block_rows; lane += w) {
    const float* row[w];
    for (int i = 0; i < w; ++i) row[i] = rows + std::min(lane + i, n - 1) * stride;
    for (index_t g = 0; g < groups; ++g) {
      F one(minus_infinity), two(minus_infinity);
      for (index_t c = g * size; c < (g + 1) * size; c += w) {
        F x[w];
        load_transposed<A>(row, c, (g + 1) * size, minus_infinity, x);
        MOEROUTE_UNROLL
        for (int j = 0; j < w; ++j) {
          const F value = max_or_second<A>(x[j], F(minus_infinity));
          two = xsimd::max(two, xsimd::min(one, value));
          one = xsimd::max(one, value);
        }
      }
      one.store_unaligned(best + g * block_rows + lane);
      two.store_unaligned(second + g * block_rows + lane);
    }
  }
}

namespace detail {

#if defined(__AVX512F__)
// The two largest values in each lane.
struct best_two {
  __m512 one, two;
};

MOEROUTE_INLINE best_two better_two(__m512 one, __m512 other, __m512 two, __m512 other_two) {
  return {_mm512_max_ps(one, other),
          _mm512_max_ps(_mm512_min_ps(one, other), _mm512_max_ps(two, other_two))};
}

// Of 16 lanes for each of 8 groups to one lane for each of them: halves of two registers become
// one, three times, and neighbours the last time.
MOEROUTE_INLINE void join_best_two(const best_two* group, __m256& one, __m256& two) {
  best_two half[4], quarter[2];
  MOEROUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const best_two &a = group[i], &b = group[i + 4];
    half[i] = better_two(
        _mm512_shuffle_f32x4(a.one, b.one, 0x44), _mm512_shuffle_f32x4(a.one, b.one, 0xee),
        _mm512_shuffle_f32x4(a.two, b.two, 0x44), _mm512_shuffle_f32x4(a.two, b.two, 0xee));
  }
  MOEROUTE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const best_two &a = half[i], &b = half[i + 2];
    quarter[i] = better_two(
        _mm512_shuffle_f32x4(a.one, b.one, 0x88), _mm512_shuffle_f32x4(a.one, b.one, 0xdd),
        _mm512_shuffle_f32x4(a.two, b.two, 0x88), _mm512_shuffle_f32x4(a.two, b.two, 0xdd));
  }
  const best_two &a = quarter[0], &b = quarter[1];
  const best_two pair =
      better_two(_mm512_shuffle_ps(a.one, b.one, 0x44), _mm512_shuffle_ps(a.one, b.one, 0xee),
                 _mm512_shuffle_ps(a.two, b.two, 0x44), _mm512_shuffle_ps(a.two, b.two, 0xee));
  const best_two all = better_two(pair.one, _mm512_permute_ps(pair.one, 0xb1), pair.two,
                                  _mm512_permute_ps(pair.two, 0xb1));
  const __m512i order = _mm512_setr_epi32(0, 2, 8, 10, 4, 6, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  one = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all.one));
  two = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all.two));
}
#endif

}  // namespace detail

/// best and second of the `size` columns of each group of one row; NaN counts as -inf.
///
/// Shapes: groups * size floats, best and second are [16]; groups in [1, 16], what is past them is
/// unspecified. second is -inf where size is 1. Determinism: exact.
template <class A = default_arch>
void best_two_of_row(const float* row, index_t groups, index_t size, float* best, float* second) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    const __m512 never = _mm512_set1_ps(minus_infinity);
    const __m256 nothing = _mm512_castps512_ps256(never);
    __m256 one[2] = {nothing, nothing}, two[2] = {nothing, nothing};
    for (int half = 0; 8 * half < groups; ++half) {
      detail::best_two lanes[8];
      for (int g = 0; g < 8; ++g) {
        lanes[g] = {never, never};
        if (8 * half + g >= groups) continue;
        const float* const from = row + (8 * half + g) * size;
        for (index_t c = 0; c < size; c += 16) {
          const __m512 x =
              max_or_second<A>(size - c >= 16 ? load<A>(from + c)
                                              : load_first<A>(from + c, size - c, minus_infinity),
                               vfloat<A>(never));
          lanes[g] = detail::better_two(lanes[g].one, x, lanes[g].two, never);
        }
      }
      detail::join_best_two(lanes, one[half], two[half]);
    }
    // Whole registers: they are read as such at once.
    const auto both = [](const __m256* x) {
      return _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castps_pd(x[0])),
                                                 _mm256_castps_pd(x[1]), 1));
    };
    _mm512_storeu_ps(best, both(one));
    _mm512_storeu_ps(second, both(two));
    return;
  }
#endif
  // Each group is a row to the kernel of blocks.
  best_two_of_groups<A>(row, size, static_cast<int>(groups), 1, size, best, second);
}

}  // namespace moeroute::simd
