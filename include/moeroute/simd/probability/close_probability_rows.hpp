// The second sweep over rows of probabilities: gradients and column sums.
#pragma once

#include <cmath>

#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/probability/probability_block.hpp>

namespace moeroute::simd {

/// How the probabilities of a column are added up.
enum class column_sums {
  plain,
  /// with what each addition rounds away in a second row: where the sums are nearly equal and their
  /// differences are what counts
  compensated,
};

namespace detail {

// The sum of a column of some rows, added to those before.
template <column_sums how, class A>
struct column_sum_of {
  vfloat<A> sum{0.0f}, rest{0.0f};

  MOEROUTE_INLINE column_sum_of(const float* at, index_t stride) {
    if constexpr (how == column_sums::compensated) {
      sum = load<A>(at);
      rest = load<A>(at + stride);
    }
  }
  MOEROUTE_INLINE void add(vfloat<A> e, vfloat<A> scale) {
    if constexpr (how == column_sums::compensated) {
      const vfloat<A> p = e * scale, after = sum + p;
      rest += (p - (after - sum)) + fma<A>(e, scale, -p);
      sum = after;
    } else {
      sum = fma<A>(e, scale, sum);
    }
  }
  // Of these rows together: added to those before, one by one, they would round in step.
  MOEROUTE_INLINE void store(float* at, index_t stride) {
    if constexpr (how == column_sums::compensated) {
      sum.store_unaligned(at);
      rest.store_unaligned(at + stride);
    } else {
      (load<A>(at) + sum).store_unaligned(at);
    }
  }
};

// ds/dx of s = sqrt(softplus(x)), from s: sigmoid(x) / 2 s with sigmoid(x) = 1 - exp(-s^2).
template <class A>
MOEROUTE_INLINE vfloat<A> sqrt_softplus_slope(vfloat<A> s) {
  using F = vfloat<A>;
  const F y = s * s, half(0.5f);
  // Where the difference would cancel: s / 2 times the series of (1 - exp(-y)) / y.
  F p(-1.0f / 720.0f);
  p = fma<A>(p, y, F(1.0f / 120.0f));
  p = fma<A>(p, y, F(-1.0f / 24.0f));
  p = fma<A>(p, y, F(1.0f / 6.0f));
  p = fma<A>(p, y, F(-0.5f));
  p = fma<A>(p, y, F(1.0f));
  const F elsewhere = divide<A>(F(1.0f) - exp_nonpositive<A>(-y), s + s);
  return select<A>(y < F(0.25f), half * s * p, elsewhere);
}

// Rows [first, first + R) of a block: column sums and gradient.
template <probability kind, unsigned uses, gradient_to to, column_sums how, class A, int R>
MOEROUTE_INLINE void close_rows(const float* const* row, int first, index_t cols,
                                const float* coefficient, const row_functions<float>& functions,
                                const probability_block<float>& b, float* const* gradient,
                                float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  const F zero(0.0f), one(1.0f), log_factor(-functions.entropy);
  const auto columns = [&](index_t c, index_t m) {
    const F weight = load<A>(coefficient + c);
    column_sum_of<how, A> sum(column_sum + c, b.stride);
    MOEROUTE_UNROLL
    for (int j = 0; j < R; ++j) {
      const int i = first + j;
      const F e = F::load_aligned(b.unscaled + i * b.stride + c);
      sum.add(e, F(b.scale[i]));
      if constexpr (to != gradient_to::nowhere) {
        F g = weight - F(b.center[i]);
        if constexpr ((uses & entropy) != 0) {
          const F x = m == w ? load<A>(row[i] + c) : load_first<A>(row[i] + c, m, minus_infinity);
          const F t = max_or_second<A>(x - F(b.top[i]), F(far_below));
          g = fma<A>(log_factor, t - F(b.log_sum[i]), g);
        }
        if constexpr ((uses & power) != 0)
          g = fma<A>(F(b.to_power[i]), F::load_aligned(b.powers + i * b.stride + c), g);
        if constexpr ((uses & inverse_norm) != 0) g = fma<A>(F(b.along[i]) * F(b.scale[i]), e, g);
        F slope = kind == probability::normalized_sqrt_softplus
                      ? sqrt_softplus_slope<A>(e) * F(b.slope[i])
                      : e * F(b.slope[i]);
        if constexpr (kind == probability::normalized_sigmoid) slope = slope * (one - e);
        float* const out = gradient[i] + c;
        if (m == w) {
          (to == gradient_to::add ? fma<A>(slope, g, load<A>(out)) : slope * g)
              .store_unaligned(out);
        } else {
          const F was = to == gradient_to::add ? load_first<A>(out, m, 0.0f) : zero;
          store_first<A>(out, m, to == gradient_to::add ? fma<A>(slope, g, was) : slope * g);
        }
      }
    }
    sum.store(column_sum + c, b.stride);
  };
  index_t c = 0;
  for (; c + w <= cols; c += w) columns(c, index_t{w});
  if (c < cols) columns(c, cols - c);
}

}  // namespace detail

/// gradient = p * (G - sum p G) for the rows of a block (times 1 - s for a sigmoid), and
/// column_sum += p.
///
/// Shapes: as open_probability_rows, with the same arguments; gradient[i] is [cols], unused for
/// gradient_to::nowhere; column_sum is [stride], or [2, stride] with what it rounds away. Cost: one
/// pass. No allocation. Determinism: as open_probability_rows; columns are added in row order.
template <probability kind, unsigned uses, gradient_to to, column_sums how = column_sums::plain,
          class A = default_arch>
void close_probability_rows(const float* const* row, int n, index_t cols, const float* coefficient,
                            const row_functions<float>& functions,
                            const probability_block<float>& b, float* const* gradient,
                            float* column_sum) {
  int i = 0;
  for (; i + 4 <= n; i += 4)
    detail::close_rows<kind, uses, to, how, A, 4>(row, i, cols, coefficient, functions, b, gradient,
                                                  column_sum);
  for (; i < n; ++i)
    detail::close_rows<kind, uses, to, how, A, 1>(row, i, cols, coefficient, functions, b, gradient,
                                                  column_sum);
}

/// The same in double, element by element: for tests of gradients.
template <probability kind, unsigned uses, gradient_to to, column_sums = column_sums::plain>
void close_probability_rows(const double* const* row, int n, index_t cols,
                            const double* coefficient, const row_functions<double>& functions,
                            const probability_block<double>& b, double* const* gradient,
                            double* column_sum) {
  for (int i = 0; i < n; ++i)
    for (index_t c = 0; c < cols; ++c) {
      const double e = b.unscaled[i * b.stride + c];
      column_sum[c] += e * b.scale[i];
      if constexpr (to != gradient_to::nowhere) {
        const double t = row[i][c] == b.top[i] ? 0.0 : row[i][c] - b.top[i];
        double g = coefficient[c] - b.center[i];
        if ((uses & entropy) != 0 && e > 0.0) g -= functions.entropy * (t - b.log_sum[i]);
        if ((uses & power) != 0 && e > 0.0) g += b.to_power[i] * std::exp((functions.q - 1.0) * t);
        if ((uses & inverse_norm) != 0) g += b.along[i] * b.scale[i] * e;
        double slope = e * b.slope[i];
        if (kind == probability::normalized_sigmoid) slope *= 1.0 - e;
        if (kind == probability::normalized_sqrt_softplus)
          slope = e > 0.0 ? b.slope[i] * -std::expm1(-e * e) / (2.0 * e) : 0.0;
        gradient[i][c] = slope * g + (to == gradient_to::add ? gradient[i][c] : 0.0);
      }
    }
}

namespace detail {

template <class A, int R>
MOEROUTE_INLINE void keep_rows(const probability_block<float>& b, int first, index_t cols,
                               float* const* out, float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  for (index_t c = 0; c < cols; c += w) {
    column_sum_of<column_sums::compensated, A> sum(column_sum + c, b.stride);
    MOEROUTE_UNROLL
    for (int j = 0; j < R; ++j) {
      const int i = first + j;
      const F e = F::load_aligned(b.unscaled + i * b.stride + c);
      sum.add(e, F(b.scale[i]));
      const F p = e * F(b.slope[i]);
      if (c + w <= cols) {
        p.store_unaligned(out[i] + c);
      } else {
        store_first<A>(out[i] + c, cols - c, p);
      }
    }
    sum.store(column_sum + c, b.stride);
  }
}

}  // namespace detail

/// out = p for the rows of a block, 0 for rows whose gradient is 0; column_sum += p. The first half
/// of a gradient whose weights are not known yet; gradient_of_probability_rows is the second.
///
/// Shapes: out[i] is [cols], column_sum [2, stride]: the sums and what they round away. Cost: one
/// pass. No allocation.
template <class A = default_arch>
void keep_probability_rows(const probability_block<float>& b, int n, index_t cols,
                           float* const* out, float* column_sum) {
  int i = 0;
  for (; i + 4 <= n; i += 4) detail::keep_rows<A, 4>(b, i, cols, out, column_sum);
  for (; i < n; ++i) detail::keep_rows<A, 1>(b, i, cols, out, column_sum);
}

/// sum + rest += block, and block = 0: what `sum` rounds away stands in `rest`.
///
/// Loads that are nearly even are sums of nearly equal terms, whose roundings agree: they would add
/// up. Shapes: all [stride], a multiple of 16; a compensated block [2, stride]. Cost: one pass. No
/// allocation.
template <column_sums how = column_sums::plain, class A = default_arch>
void add_block_sum(float* block, index_t stride, float* sum, float* rest) {
  using F = vfloat<A>;
  for (index_t c = 0; c < stride; c += width<A>) {
    const F b = load<A>(block + c), before = load<A>(sum + c), after = before + b;
    const F added = after - before;
    F lost = (before - (after - added)) + (b - added);
    if constexpr (how == column_sums::compensated) {
      lost += load<A>(block + stride + c);
      F(0.0f).store_unaligned(block + stride + c);
    }
    after.store_unaligned(sum + c);
    (load<A>(rest + c) + lost).store_unaligned(rest + c);
    F(0.0f).store_unaligned(block + c);
  }
}
template <column_sums = column_sums::plain>
void add_block_sum(double* block, index_t stride, double* sum, double*) {
  for (index_t c = 0; c < stride; ++c) {
    sum[c] += block[c];
    block[c] = 0.0;
  }
}

/// p becomes p * (c - sum p c), for n rows p of a softmax, 1 <= n <= 16.
///
/// Shapes: row[i] is [cols], coefficient [cols rounded up to 16], zero past cols. Cost: one read
/// and one write. No allocation.
template <class A = default_arch>
void gradient_of_probability_rows(float* const* row, int n, index_t cols,
                                  const float* coefficient) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  detail::joined_sums dot;
  for (int i = 0; i < n; ++i) {
    partials<A> d(0.0f);
    for (index_t block = 0; block < cols; block += block_rows) {
      MOEROUTE_UNROLL
      for (int r = 0; r < partials<A>::n; ++r) {
        const index_t c = block + r * w;
        d.part[r] = fma<A>(detail::load_columns<A>(row[i], c, cols, 0.0f), load<A>(coefficient + c),
                           d.part[r]);
      }
    }
    dot.keep<A>(i, d);
  }
  dot.join<A>(n);
  for (int i = 0; i < n; ++i) {
    const F mean(dot.row[i]);
    float* const p = row[i];
    index_t c = 0;
    for (; c + w <= cols; c += w)
      (load<A>(p + c) * (load<A>(coefficient + c) - mean)).store_unaligned(p + c);
    if (c < cols)
      store_first<A>(p + c, cols - c,
                     load_first<A>(p + c, cols - c, 0.0f) * (load<A>(coefficient + c) - mean));
  }
}

}  // namespace moeroute::simd
