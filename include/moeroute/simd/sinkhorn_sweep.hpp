// The sweeps of Sinkhorn's iteration: one read of the kernel matrix gives the row factors and the
// column sums.
#pragma once

#include <limits>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

/// Kernel values below this are 0: they carry nothing, and their products would be denormal and
/// slow.
inline constexpr float sinkhorn_flush = 1e-30f;

/// row / (dot + eps), 0 where the row has no mass, never infinite.
MOEROUTE_INLINE float sinkhorn_factor(float marginal, float mass, float eps) {
  constexpr float most = 1e30f;
  if (!(mass > 0.0f)) return 0.0f;
  const float factor = marginal / (mass + eps);
  return factor < most ? factor : most;
}

namespace detail {

// R rows at once share the loads of v and of the column sums.
template <class A, int R>
MOEROUTE_INLINE void sinkhorn_rows(const float* k, index_t stride, const float* v, index_t cols,
                                   float marginal, float eps, float* u, float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>, n = registers_per_block<A>;
  F dot[R][n];
  for (auto& row : dot)
    for (F& part : row) part = F(0.0f);
  for (index_t c = 0; c < cols; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) {
      const F factor = load<A>(v + c + r * w);
      MOEROUTE_UNROLL
      for (int i = 0; i < R; ++i)
        dot[i][r] = fma<A>(load<A>(k + i * stride + c + r * w), factor, dot[i][r]);
    }
  }
  F row_factor[R];
  for (int i = 0; i < R; ++i) {
    partials<A> sum(0.0f);
    for (int r = 0; r < n; ++r) sum.part[r] = dot[i][r];
    u[i] = sinkhorn_factor(marginal, sum_of<A>(sum), eps);
    row_factor[i] = F(u[i]);
  }
  for (index_t c = 0; c < cols; c += w) {
    F sum = load<A>(column_sum + c);
    MOEROUTE_UNROLL
    for (int i = 0; i < R; ++i) sum = fma<A>(load<A>(k + i * stride + c), row_factor[i], sum);
    sum.store_unaligned(column_sum + c);
  }
}

}  // namespace detail

/// u[t] = marginal / (sum over e of K[t, e] v[e] + eps), then column_sum[e] += u[t] K[t, e], row by
/// row.
///
/// Shapes: k is [rows, stride] with stride and cols multiples of 16 and zeros past the last expert;
/// v and column_sum are [cols]. Ensures: u is finite, and 0 for a row of zeros. Cost: one read of
/// k; four rows at once. No allocation. Determinism: the same bits on every ISA; column sums are
/// added in row order.
template <class A = default_arch>
void sinkhorn_sweep(const float* k, index_t rows, index_t stride, const float* v, index_t cols,
                    float marginal, float eps, float* u, float* column_sum) {
  index_t t = 0;
  for (; t + 4 <= rows; t += 4)
    detail::sinkhorn_rows<A, 4>(k + t * stride, stride, v, cols, marginal, eps, u + t, column_sum);
  for (; t < rows; ++t)
    detail::sinkhorn_rows<A, 1>(k + t * stride, stride, v, cols, marginal, eps, u + t, column_sum);
}

/// One row of the kernel matrix: exp(x), or x itself where `logarithm`, for x = (z - max z) /
/// temperature.
///
/// NaN and -inf logits become 0 (-inf as a logarithm), as do values below the flush level and what
/// lies in [cols, stride). Returns whether the row has a logit above -inf. +inf logits are 1, their
/// row's others 0.
template <class A = default_arch>
bool sinkhorn_kernel_row(const float* z, index_t cols, float temperature, bool logarithm, float* k,
                         index_t stride) {
  using F = vfloat<A>;
  const F nothing(logarithm ? minus_infinity : 0.0f);
  const float max = row_max<A>(z, cols);
  const bool live = max > minus_infinity;
  const index_t whole = live ? cols / width<A> * width<A> : 0;
  for (index_t c = whole; c < stride; c += width<A>) nothing.store_unaligned(k + c);
  if (!live) return false;
  const F top(max), t(temperature), flush(sinkhorn_flush), zero(0.0f);
  map_row<A>(z, cols, k, [&](F x) {
    const F below = select<A>(x == top, zero, nan_to_minus_infinity<A>(x - top) / t);
    if (logarithm) return below;
    const F e = exp_nonpositive<A>(below);
    return select<A>(e >= flush, e, zero);
  });
  return true;
}

/// column_sum[e] += marginal p[e] / sum of p, with p[e] = exp(x[e] + g[e] - their maximum): the
/// sweep in the log domain for one row, in which nothing is flushed or overflows, whatever the
/// spread of x. Returns the logarithm of the token factor, -inf for a row without mass.
///
/// Shapes: x, g, p and column_sum are [cols], cols a multiple of 16, x = -inf past the last expert;
/// p is scratch. Cost: one exponential per element. Determinism: the same bits on every ISA.
template <class A = default_arch>
float sinkhorn_log_row(const float* x, const float* g, index_t cols, float marginal, float* p,
                       float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>, n = registers_per_block<A>;
  partials<A> best(minus_infinity);
  for (index_t c = 0; c < cols; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) {
      const F s = load<A>(x + c + r * w) + load<A>(g + c + r * w);
      best.part[r] = select<A>(s > best.part[r], s, best.part[r]);
    }
  }
  alignas(alignment) float lane[block_rows];
  for (int r = 0; r < n; ++r) best.part[r].store_aligned(lane + r * w);
  float max = lane[0];
  for (int i = 1; i < block_rows; ++i) max = lane[i] > max ? lane[i] : max;
  if (!(max > minus_infinity)) return minus_infinity;
  const F top(max);
  partials<A> sum(0.0f);
  for (index_t c = 0; c < cols; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) {
      const F s = load<A>(x + c + r * w) + load<A>(g + c + r * w);
      const F e = exp_nonpositive<A>(s - top);
      sum.part[r] += e;
      e.store_unaligned(p + c + r * w);
    }
  }
  const F factor(marginal / sum_of<A>(sum));
  for (index_t c = 0; c < cols; c += w)
    fma<A>(load<A>(p + c), factor, load<A>(column_sum + c)).store_unaligned(column_sum + c);
  return log<A>(factor).get(0) - max;
}

}  // namespace moeroute::simd
