// Rectified rows max(x, 0): sums and counts by column, and the gradient of a weighted sum.
#pragma once

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>

namespace moeroute::simd {

/// sum[c] += max(x[c], 0) and count[c] += 1 where x[c] > 0; NaN is not.
///
/// Cost: one read. No allocation. Determinism: the same bits on every ISA.
template <class A = default_arch>
void add_rectified_row(const float* x, index_t cols, float* sum, float* count) {
  using F = vfloat<A>;
  const F zero(0.0f), one(1.0f);
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>) {
    const F v = load<A>(x + c);
    const vmask<A> on = v > zero;
    (load<A>(sum + c) + select<A>(on, v, zero)).store_unaligned(sum + c);
    (load<A>(count + c) + select<A>(on, one, zero)).store_unaligned(count + c);
  }
  for (; c < cols; ++c)
    if (x[c] > 0.0f) {
      sum[c] += x[c];
      count[c] += 1.0f;
    }
}

/// out[c] = slope[c] where x[c] > 0, else 0; or that added to out.
template <bool add, class A = default_arch>
void rectified_gradient_row(const float* x, const float* slope, index_t cols, float* out) {
  using F = vfloat<A>;
  const F zero(0.0f);
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>) {
    const F g = select<A>(load<A>(x + c) > zero, load<A>(slope + c), zero);
    (add ? load<A>(out + c) + g : g).store_unaligned(out + c);
  }
  for (; c < cols; ++c) out[c] = (x[c] > 0.0f ? slope[c] : 0.0f) + (add ? out[c] : 0.0f);
}

/// The same in double, element by element: for tests of gradients.
inline void add_rectified_row(const double* x, index_t cols, double* sum, double* count) {
  for (index_t c = 0; c < cols; ++c)
    if (x[c] > 0.0) {
      sum[c] += x[c];
      count[c] += 1.0;
    }
}
template <bool add>
void rectified_gradient_row(const double* x, const double* slope, index_t cols, double* out) {
  for (index_t c = 0; c < cols; ++c) out[c] = (x[c] > 0.0 ? slope[c] : 0.0) + (add ? out[c] : 0.0);
}

}  // namespace moeroute::simd
