// The sweeps of Sinkhorn's iteration: one read of the kernel matrix gives the row factors and the
// column sums.
#pragma once

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/join.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

/// Kernel values below this are 0: they carry nothing, and their products would be denormal and
/// slow.
inline constexpr float sinkhorn_flush = 1e-30f;
/// The largest factor of a row or column: what cannot be even does not overflow.
inline constexpr float sinkhorn_most = 1e30f;

namespace detail {

// column_sum[c] += sum over R rows of factor[i] row[i][c], row by row.
template <class A, int R>
MOEROUTE_INLINE void add_scaled_rows(const float* rows, index_t stride, const float* factor,
                                     index_t cols, float* column_sum) {
  using F = vfloat<A>;
  F times[R];
  MOEROUTE_UNROLL
  for (int i = 0; i < R; ++i) times[i] = F(factor[i]);
  for (index_t c = 0; c < cols; c += width<A>) {
    F sum = load<A>(column_sum + c);
    MOEROUTE_UNROLL
    for (int i = 0; i < R; ++i) sum = fma<A>(load<A>(rows + i * stride + c), times[i], sum);
    sum.store_unaligned(column_sum + c);
    // While this block is in cache the next one comes: the dot products would wait for it.
    MOEROUTE_UNROLL
    for (int i = 0; i < R; ++i) MOEROUTE_PREFETCH(rows + (i + block_rows) * stride + c);
  }
}

// The same for n rows, up to 16: eight at once where there are eight.
template <class A>
MOEROUTE_INLINE void add_scaled_block(const float* rows, index_t stride, int n, const float* factor,
                                      index_t cols, float* column_sum) {
  int i = 0;
  for (; i + 8 <= n; i += 8)
    add_scaled_rows<A, 8>(rows + i * stride, stride, factor + i, cols, column_sum);
  for (; i < n; ++i) add_scaled_rows<A, 1>(rows + i * stride, stride, factor + i, cols, column_sum);
}

// The 16 partial dot products with v of R rows.
template <class A, int R>
MOEROUTE_INLINE void partial_dots(const float* rows, index_t stride, const float* v, index_t cols,
                                  float* partial) {
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
        dot[i][r] = fma<A>(load<A>(rows + i * stride + c + r * w), factor, dot[i][r]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int r = 0; r < n; ++r) dot[i][r].store_unaligned(partial + i * block_rows + r * w);
}

// Rows that share their loads of v: as many as registers allow.
template <class A>
inline constexpr int rows_at_once = registers_per_block<A> == 1 ? 4 : 2;

}  // namespace detail

/// u[t] = marginal / (sum over e of K[t, e] v[e] + eps), then column_sum[e] += u[t] K[t, e], row by
/// row.
///
/// Shapes: k is [rows, stride] with stride and cols multiples of 16 and zeros past the last expert;
/// v and column_sum are [cols]. Ensures: u is finite, and 0 for a row of zeros. Cost: one read of k
/// from memory and one from cache, 16 rows at a time. No allocation. Determinism: the same bits on
/// every ISA; column sums are added in row order.
template <class A = default_arch>
void sinkhorn_sweep(const float* k, index_t rows, index_t stride, const float* v, index_t cols,
                    float marginal, float eps, float* u, float* column_sum) {
  using F = vfloat<A>;
  constexpr int at_once = detail::rows_at_once<A>;
  alignas(alignment) float partial[block_rows * block_rows] = {}, factor[block_rows];
  const auto rows_from = [&](index_t t) {
    return static_cast<int>(rows - t < block_rows ? rows - t : block_rows);
  };
  const auto dots = [&](index_t t) {
    const int n = rows_from(t);
    const float* const block = k + t * stride;
    int i = 0;
    for (; i + at_once <= n; i += at_once)
      detail::partial_dots<A, at_once>(block + i * stride, stride, v, cols,
                                       partial + i * block_rows);
    for (; i < n; ++i)
      detail::partial_dots<A, 1>(block + i * stride, stride, v, cols, partial + i * block_rows);
  };
  // Narrow blocks wait for their quotient longer than they compute: the next one's dot products go
  // between.
  const bool ahead = stride <= 128;
  if (rows > 0) dots(0);
  for (index_t t = 0; t < rows; t += block_rows) {
    join_partials<A>(partial, factor, [](F a, F b) { return a + b; });
    for (int lane = 0; lane < block_rows; lane += width<A>) {
      const F dot = load<A>(factor + lane), most(sinkhorn_most), zero(0.0f);
      F row_factor = divide<A>(F(marginal), dot + F(eps));
      row_factor = select<A>(row_factor < most, row_factor, most);
      select<A>(dot > zero, row_factor, zero).store_unaligned(factor + lane);
    }
    const bool more = t + block_rows < rows;
    if (ahead && more) dots(t + block_rows);
    const int n = rows_from(t);
    for (int row = 0; row < n; ++row) u[t + row] = factor[row];
    detail::add_scaled_block<A>(k + t * stride, stride, n, factor, cols, column_sum);
    if (!ahead && more) dots(t + block_rows);
  }
}

/// 16 rows of the kernel matrix: exp(x), or x itself where `logarithm`, for x = (z - max z) /
/// temperature.
///
/// Shapes: row[i] points at cols logits, or is null for a row without any; k is [n, stride].
/// NaN and -inf logits become 0 (-inf as a logarithm), as do values below the flush level and what
/// lies in [cols, stride). +inf logits are 1, their row's others 0. k may be where the logits are.
/// Returns how many rows have a logit above -inf.
template <class A = default_arch>
int sinkhorn_kernel_block(const float* const* row, int n, index_t cols, float temperature,
                          bool logarithm, float* k, index_t stride) {
  using F = vfloat<A>;
  alignas(alignment) float partial[block_rows * block_rows] = {}, max[block_rows];
  for (int i = 0; i < n; ++i) {
    partials<A> best(minus_infinity);
    if (row[i] != nullptr)
      detail::for_each_register<A>(row[i], cols, minus_infinity, [&](int r, F x) {
        best.part[r] = select<A>(x > best.part[r], x, best.part[r]);
      });
    store_partials<A>(best, partial + i * block_rows);
  }
  join_partials<A>(partial, max, larger<A>);
  const F nothing(logarithm ? minus_infinity : 0.0f), t(temperature), flush(sinkhorn_flush);
  const F zero(0.0f);
  int live = 0;
  for (int i = 0; i < n; ++i) {
    float* const to = k + i * stride;
    const F top(max[i]);
    const auto one = [&](F x) {
      F below = nan_to_minus_infinity<A>(x - top);
      if (temperature != 1.0f) below = divide<A>(below, t);
      below = select<A>(x == top, zero, below);
      if (logarithm) return below;
      const F e = exp_nonpositive<A>(below);
      return select<A>(e >= flush, e, zero);
    };
    index_t c = 0;
    if (max[i] > minus_infinity) {
      ++live;
      for (; c + width<A> <= cols; c += width<A>) one(load<A>(row[i] + c)).store_unaligned(to + c);
      if (c < cols) {
        one(load_first<A>(row[i] + c, cols - c, minus_infinity)).store_unaligned(to + c);
        c += width<A>;
      }
    }
    for (; c < stride; c += width<A>) nothing.store_unaligned(to + c);
  }
  return live;
}

/// The sweep in the log domain, for up to 16 rows: with p[e] = exp(x[e] + g[e] - their maximum),
/// column_sum[e] += marginal p[e] / sum of p, row by row. Nothing is flushed or overflows, whatever
/// the spread of x. u receives the logarithms of the token factors, -inf for a row without mass.
///
/// Shapes: x is [n, stride], g and column_sum are [cols], cols a multiple of 16, x = -inf past the
/// last expert; p is scratch of [16, cols]. Cost: one exponential per element. Determinism: the
/// same bits on every ISA.
template <class A = default_arch>
void sinkhorn_log_block(const float* x, index_t stride, int n, const float* g, index_t cols,
                        float marginal, float* p, float* u, float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>, regs = registers_per_block<A>;
  alignas(alignment) float partial[block_rows * block_rows] = {};
  alignas(alignment) float max[block_rows], factor[block_rows];
  for (int i = 0; i < n; ++i) {
    const float* const row = x + i * stride;
    partials<A> best(minus_infinity);
    for (index_t c = 0; c < cols; c += block_rows) {
      MOEROUTE_UNROLL
      for (int r = 0; r < regs; ++r)
        best.part[r] = larger<A>(best.part[r], load<A>(row + c + r * w) + load<A>(g + c + r * w));
    }
    store_partials<A>(best, partial + i * block_rows);
  }
  join_partials<A>(partial, max, larger<A>);
  for (int i = 0; i < n; ++i) {
    const float* const row = x + i * stride;
    // A row without mass must not make NaN of -inf - -inf: its values are all 0.
    const F top(max[i] > minus_infinity ? max[i] : 0.0f);
    partials<A> sum(0.0f);
    for (index_t c = 0; c < cols; c += block_rows) {
      MOEROUTE_UNROLL
      for (int r = 0; r < regs; ++r) {
        const F s = load<A>(row + c + r * w) + load<A>(g + c + r * w);
        const F e = exp_nonpositive<A>(s - top);
        sum.part[r] += e;
        e.store_unaligned(p + i * cols + c + r * w);
      }
    }
    store_partials<A>(sum, partial + i * block_rows);
  }
  join_partials<A>(partial, factor, [](F a, F b) { return a + b; });
  for (int lane = 0; lane < block_rows; lane += w) {
    const F sum = load<A>(factor + lane), zero(0.0f);
    const F row_factor = divide<A>(F(marginal), sum);
    select<A>(sum > zero, row_factor, zero).store_unaligned(factor + lane);
    select<A>(sum > zero, log<A>(row_factor) - load<A>(max + lane), F(minus_infinity))
        .store_unaligned(max + lane);
  }
  for (int i = 0; i < n; ++i) u[i] = max[i];
  detail::add_scaled_block<A>(p, cols, n, factor, cols, column_sum);
}

}  // namespace moeroute::simd
