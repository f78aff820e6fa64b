// Sums and maxima of a row, with bits that do not depend on the register width.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/rows/convert.hpp>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// One value for each of 16 strided positions: partial[j] belongs to the columns c with c % 16 ==
/// j.
template <class A = default_arch>
struct partials {
  static constexpr int n = registers_per_block<A>;
  vfloat<A> part[n];

  explicit partials(float start) {
    for (auto& p : part) p = vfloat<A>(start);
  }
};

namespace detail {

// Calls f(register number, values) for every register of a row, the tail padded.
template <class A, class F>
MOEROUTE_INLINE void for_each_register(const float* row, index_t cols, float fill, F&& f) {
  constexpr int w = width<A>, n = registers_per_block<A>;
  index_t c = 0;
  for (; c + block_rows <= cols; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) f(r, load<A>(row + c + r * w));
  }
  for (int r = 0; c < cols; ++r, c += w)
    f(r, c + w <= cols ? load<A>(row + c) : load_first<A>(row + c, cols - c, fill));
}

}  // namespace detail

/// The sum of 16 partial sums in one fixed tree: distance 8, 4, 2, 1.
template <class A>
MOEROUTE_INLINE float sum_of(const partials<A>& p) {
  constexpr int w = width<A>;
  vfloat<A> x[partials<A>::n];
  for (int r = 0; r < partials<A>::n; ++r) x[r] = p.part[r];
  for (int distance = partials<A>::n / 2; distance > 0; distance /= 2)
    for (int r = 0; r < distance; ++r) x[r] += x[r + distance];
#if defined(__SSE2__)
  // In registers: a row's sum is waited for.
  const auto of_four = [](__m128 v) {
    const __m128 two = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  };
#if defined(__AVX__)
  const auto of_eight = [&](__m256 v) {
    return of_four(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
  };
#if defined(__AVX512F__)
  if constexpr (w == 16) {
    const __m512d v = _mm512_castps_pd(x[0]);
    return of_eight(_mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(v)),
                                  _mm256_castpd_ps(_mm512_extractf64x4_pd(v, 1))));
  }
#endif
  if constexpr (w == 8) return of_eight(x[0]);
#endif
  if constexpr (w == 4) return of_four(x[0]);
#endif
  alignas(alignment) float lane[w];
  x[0].store_aligned(lane);
  for (int distance = w / 2; distance > 0; distance /= 2)
    for (int i = 0; i < distance; ++i) lane[i] += lane[i + distance];
  return lane[0];
}

/// The largest of the row, NaN skipped; -inf for an empty or all-NaN row.
template <class A = default_arch>
float row_max(const float* row, index_t cols) {
  partials<A> best(minus_infinity);
  detail::for_each_register<A>(row, cols, minus_infinity, [&](int r, vfloat<A> x) {
    best.part[r] = select<A>(x > best.part[r], x, best.part[r]);
  });
  alignas(alignment) float lane[block_rows];
  for (int r = 0; r < partials<A>::n; ++r) best.part[r].store_aligned(lane + r * width<A>);
  float largest = lane[0];
  for (int i = 1; i < block_rows; ++i) largest = lane[i] > largest ? lane[i] : largest;
  return largest;
}

/// The first column that holds `value` (-0 equal to +0); cols where none does. Requires: not NaN.
template <class A = default_arch>
index_t first_column(const float* row, index_t cols, float value) {
  const vfloat<A> sought(value);
  for (index_t c = 0; c < cols; c += width<A>) {
    const vfloat<A> x =
        cols - c >= width<A>
            ? load<A>(row + c)
            : load_first<A>(row + c, cols - c, std::numeric_limits<float>::quiet_NaN());
    if (const auto bits = (x == sought).mask(); bits != 0) return c + std::countr_zero(bits);
  }
  return cols;
}

/// The sum of the row: 16 strided partial sums joined in one fixed tree, the same bits on every
/// ISA.
template <class A = default_arch>
float row_sum(const float* row, index_t cols) {
  partials<A> sum(0.0f);
  detail::for_each_register<A>(row, cols, 0.0f, [&](int r, vfloat<A> x) { sum.part[r] += x; });
  return sum_of<A>(sum);
}

/// The Euclidean norm of the row, widened from 16 bits where it is kept so; the same bits on every
/// ISA.
template <class A = default_arch, storage T>
float row_norm(const T* row, index_t cols) {
  partials<A> sum(0.0f);
  index_t c = 0;
  int r = 0;
  for (; c + width<A> <= cols; c += width<A>, r = (r + 1) % partials<A>::n) {
    const vfloat<A> x = detail::load_wide<A>(row + c);
    sum.part[r] = fma<A>(x, x, sum.part[r]);
  }
  if (c < cols) {
    alignas(alignment) float rest[width<A>] = {};
    for (int i = 0; c + i < cols; ++i) rest[i] = static_cast<float>(row[c + i]);
    const vfloat<A> x = vfloat<A>::load_aligned(rest);
    sum.part[r] = fma<A>(x, x, sum.part[r]);
  }
  return std::sqrt(sum_of<A>(sum));
}

/// exp(x - max) where max is the row's largest value: 1 at the maximum itself (also where both are
/// +inf), 0 for NaN and -inf.
template <class A>
MOEROUTE_INLINE vfloat<A> exp_below_max(vfloat<A> x, vfloat<A> max) {
  return select<A>(x == max, vfloat<A>(1.0f), exp_nonpositive<A>(x - max));
}

/// The sum of exp(x - max) over the row: at least 1 where max is the row's largest value.
template <class A = default_arch>
float row_sum_exp(const float* row, index_t cols, float max) {
  partials<A> sum(0.0f);
  const vfloat<A> top(max);
  if (max < plus_infinity) {
    detail::for_each_register<A>(row, cols, minus_infinity, [&](int r, vfloat<A> x) {
      sum.part[r] += exp_nonpositive<A>(x - top);
    });
  } else {
    detail::for_each_register<A>(row, cols, minus_infinity, [&](int r, vfloat<A> x) {
      sum.part[r] += exp_below_max<A>(x, top);
    });
  }
  return sum_of<A>(sum);
}

/// out[c] = exp(row[c] - max), and their sum; the bits of exp_below_max and row_sum_exp.
template <class A = default_arch>
float row_exp(const float* row, index_t cols, float max, float* out) {
  partials<A> sum(0.0f);
  const vfloat<A> top(max);
  map_row<A>(row, cols, out, [&](vfloat<A> x) { return exp_below_max<A>(x, top); });
  detail::for_each_register<A>(out, cols, 0.0f,
                               [&](int part, vfloat<A> e) { sum.part[part] += e; });
  return sum_of<A>(sum);
}

}  // namespace moeroute::simd
