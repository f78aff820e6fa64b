// The dot product of two rows, and what backward passes over rows are made of, in float or double.
#pragma once

#include <algorithm>
#include <concepts>

#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute::simd {

/// The sum of a[c] * b[c], widened from 16 bits where kept so: 16 strided partial sums of fused
/// multiply-adds joined in one fixed tree. Determinism: the same bits on every ISA.
template <class A = default_arch, storage S, storage T>
float row_dot(const S* a, const T* b, index_t n) {
  constexpr int w = width<A>, parts = partials<A>::n;
  partials<A> sum(0.0f);
  index_t c = 0;
  for (; c + block_rows <= n; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < parts; ++r)
      sum.part[r] = fma<A>(detail::load_wide<A>(a + c + r * w), detail::load_wide<A>(b + c + r * w),
                           sum.part[r]);
  }
  for (int r = 0; c < n; ++r, c += w) {
    alignas(alignment) float x[w] = {}, y[w] = {};
    for (index_t i = 0; i < std::min<index_t>(w, n - c); ++i) {
      x[i] = static_cast<float>(a[c + i]);
      y[i] = static_cast<float>(b[c + i]);
    }
    sum.part[r] = fma<A>(vfloat<A>::load_aligned(x), vfloat<A>::load_aligned(y), sum.part[r]);
  }
  return sum_of<A>(sum);
}

/// The same in double, from the first column to the last.
template <class A = default_arch>
double row_dot(const double* a, const double* b, index_t n) {
  double sum = 0.0;
  for (index_t c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

/// to[c] = factor * from[c] in double.
template <class A = default_arch>
void scale_row(const double* from, double factor, index_t n, double* to) {
  for (index_t c = 0; c < n; ++c) to[c] = factor * from[c];
}

/// to[c] += factor * from[c].
template <class A = default_arch, storage From>
void add_scaled_row(const From* from, float factor, index_t n, float* to) {
  sum_of_rows<A>(n, to, sum_start::output, [&](auto& sum) { sum(from, factor); });
}
template <class A = default_arch>
void add_scaled_row(const double* from, double factor, index_t n, double* to) {
  for (index_t c = 0; c < n; ++c) to[c] += factor * from[c];
}

}  // namespace moeroute::simd
