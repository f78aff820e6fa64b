// Functions of rows of probabilities and their gradients with respect to what the probabilities
// were made from: up to 16 rows at once, which share their reductions.
#pragma once

#include <cmath>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/join.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

/// How a row x becomes probabilities p.
enum class probability {
  softmax,             ///< exp(x) / sum exp(x)
  normalized_sigmoid,  ///< s / (sum s + eps) with s = sigmoid(x)
};

/// Functions of one row, as bits of a set.
enum row_function : unsigned {
  no_function = 0,
  square_lse = 1,    ///< (log sum exp x)^2
  entropy = 2,       ///< H = -sum p ln p
  power = 4,         ///< (1 - sum p^q) / (q - 1)
  inverse_norm = 8,  ///< 1 / (|p| + offset), |p| the Euclidean norm
};

/// The weight of each function, and what they need.
template <class F>
struct row_functions {
  F square_lse = 0, entropy = 0, power = 0, inverse_norm = 0;
  F q = 2;       ///< of power
  F offset = 0;  ///< of inverse_norm
  F eps = 0;     ///< of normalized_sigmoid
};

/// Each function summed over rows.
struct row_function_sums {
  double square_lse = 0, entropy = 0, power = 0, inverse_norm = 0;
};

/// What is done with the gradient.
enum class gradient_to { nowhere, write, add };

/// Rows [16, stride] of unscaled probabilities and, per row, what makes them p and its gradient.
template <class F>
struct probability_block {
  F* unscaled;     ///< [16, stride]; zero past the last column
  F* powers;       ///< [16, stride] for power: unscaled^(q - 1), 0 where unscaled is
  index_t stride;  ///< a multiple of 16
  alignas(alignment) F scale[block_rows];     ///< p = scale * unscaled; 0 for a row without mass
  alignas(alignment) F slope[block_rows];     ///< scale, or 0 where the gradient is 0
  alignas(alignment) F center[block_rows];    ///< sum p G - (what the row as a whole adds to G)
  alignas(alignment) F top[block_rows];       ///< the row's maximum
  alignas(alignment) F log_sum[block_rows];   ///< ln p = x - top - log_sum
  alignas(alignment) F along[block_rows];     ///< factor of p in G
  alignas(alignment) F to_power[block_rows];  ///< factor of unscaled^(q - 1) in G
};

namespace detail {

// The functions of 16 rows, one row per lane, from their sums. G = dValue/dp is, per element,
//   c - entropy * ln p + along * p + to_power * unscaled^(q - 1),
// and the gradient p * (G - center).
template <unsigned uses, class F, class Lane>
MOEROUTE_INLINE void close_row(probability_block<F>& b, const row_functions<F>& f, int i,
                               const Lane& at, row_function_sums& total) {
  const F top = b.top[i], sum = at.sum;
  const bool live = sum > F{0};
  const bool finite = live && top < std::numeric_limits<F>::infinity();
  const F scale = live ? F{1} / (sum + f.eps) : F{0};
  b.scale[i] = scale;
  b.slope[i] = finite ? scale : F{0};
  F center = at.dot * scale;
  if constexpr ((uses & (square_lse | entropy)) != 0) b.log_sum[i] = at.log_sum;
  if constexpr ((uses & square_lse) != 0) {
    const F lse = finite ? top + at.log_sum : F{0};
    center -= F{2} * f.square_lse * lse;
    total.square_lse += static_cast<double>(lse) * static_cast<double>(lse);
  }
  if constexpr ((uses & entropy) != 0) {
    const F h = live ? at.log_sum - at.mean_below * scale : F{0};
    center += f.entropy * h;
    total.entropy += static_cast<double>(h);
  }
  if constexpr ((uses & power) != 0) {
    const F order = f.q - F{1};
    const F scaled = live ? at.scale_to_order : F{0};
    const F sum_of_powers = at.powers * scaled * scale;
    b.to_power[i] = -f.power * f.q / order * scaled;
    center -= f.power * f.q / order * sum_of_powers;
    total.power += live ? static_cast<double>((F{1} - sum_of_powers) / order) : 0.0;
  }
  if constexpr ((uses & inverse_norm) != 0) {
    const F norm = std::sqrt(at.squares) * scale;
    const F value = live ? F{1} / (norm + f.offset) : F{0};
    b.along[i] = live ? -f.inverse_norm * value * value / norm : F{0};
    center += b.along[i] * norm * norm;
    total.inverse_norm += static_cast<double>(value);
  }
  b.center[i] = center;
}

template <class F>
struct row_sums {
  F sum, dot, log_sum, mean_below, powers, squares;
  F scale_to_order;  // sum^(1 - q)
};

// Partial sums of 16 rows, joined at once: out[i] is row i's sum in the tree of sum_of.
struct joined_sums {
  alignas(alignment) float part[block_rows * block_rows];
  alignas(alignment) float row[block_rows];

  template <class A>
  MOEROUTE_INLINE void keep(int i, const partials<A>& p) {
    for (int r = 0; r < partials<A>::n; ++r)
      p.part[r].store_aligned(part + i * block_rows + r * width<A>);
  }
  template <class A>
  MOEROUTE_INLINE void join() {
    simd::join_partials<A>(part, row, [](vfloat<A> a, vfloat<A> b) { return a + b; });
  }
};

// f(register number, first column, values) over a row, the tail filled.
template <class A, class F>
MOEROUTE_INLINE void for_each_column(const float* row, index_t cols, float fill, F&& f) {
  constexpr int w = width<A>, n = registers_per_block<A>;
  index_t c = 0;
  for (; c + block_rows <= cols; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) f(r, c + r * w, load<A>(row + c + r * w));
  }
  for (int r = 0; c < cols; ++r, c += w)
    f(r, c, c + w <= cols ? load<A>(row + c) : load_first<A>(row + c, cols - c, fill));
}

}  // namespace detail

/// Fills a block from n rows x of floats, 1 <= n <= 16, and adds the rows' functions to `total`.
///
/// Shapes: row[i] is [cols]; coefficient is [stride], zero past cols: the value's derivative by p.
/// A NaN counts as -inf. A row of nothing but -inf has no mass: p, its functions and its gradient
/// are 0. +inf share the mass, and the gradient of their row and its square_lse are 0.
/// Cost: one exponential per element, a second one for power. No allocation.
/// Determinism: a row's values do not depend on the rows beside it.
template <probability kind, unsigned uses, class A = default_arch>
void open_probability_rows(const float* const* row, int n, index_t cols, const float* coefficient,
                           const row_functions<float>& functions, probability_block<float>& b,
                           row_function_sums& total) {
  using F = vfloat<A>;
  constexpr bool softmax = kind == probability::softmax;
  static_assert(softmax || uses == no_function,
                "[moeroute::simd::open_probability_rows] functions of rows are of the softmax");
  const F zero(0.0f), one(1.0f);
  detail::joined_sums max, sum, dot, below, powers, squares;
  if constexpr (softmax) {
    for (int i = 0; i < block_rows; ++i) {
      partials<A> best(minus_infinity);
      if (i < n)
        detail::for_each_column<A>(row[i], cols, minus_infinity, [&](int r, index_t, F x) {
          best.part[r] = select<A>(x > best.part[r], x, best.part[r]);
        });
      max.keep<A>(i, best);
    }
    join_partials<A>(max.part, b.top, [](F x, F y) { return select<A>(y > x, y, x); });
    // A row without mass: nothing equals this maximum and everything is infinitely far below it.
    for (float& top : b.top) top = top > minus_infinity ? top : plus_infinity;
  } else {
    for (float& top : b.top) top = 0.0f;
  }
  const F order(functions.q - 1.0f);
  for (int i = 0; i < block_rows; ++i) {
    partials<A> s(0.0f), d(0.0f), m(0.0f), e_to_q(0.0f), sq(0.0f);
    if (i < n) {
      const F top(b.top[i]);
      float* const out = b.unscaled + i * b.stride;
      for (index_t c = round_up(cols, index_t{width<A>}); c < b.stride; c += width<A>)
        zero.store_aligned(out + c);
      detail::for_each_column<A>(row[i], cols, minus_infinity, [&](int r, index_t c, F x) {
        F e, t;
        if constexpr (softmax) {
          t = select<A>(x == top, zero, x - top);
          e = exp_nonpositive<A>(t);
        } else {
          e = sigmoid<A>(nan_to_minus_infinity<A>(x));
        }
        e.store_aligned(out + c);
        s.part[r] += e;
        d.part[r] = fma<A>(e, load<A>(coefficient + c), d.part[r]);
        if constexpr ((uses & entropy) != 0)
          m.part[r] = fma<A>(e, select<A>(e > zero, t, zero), m.part[r]);
        if constexpr ((uses & power) != 0) {
          const F to_order = select<A>(e > zero, simd::exp<A>(order * t), zero);
          to_order.store_aligned(b.powers + i * b.stride + c);
          e_to_q.part[r] = fma<A>(e, to_order, e_to_q.part[r]);
        }
        if constexpr ((uses & inverse_norm) != 0) sq.part[r] = fma<A>(e, e, sq.part[r]);
      });
    }
    sum.keep<A>(i, s);
    dot.keep<A>(i, d);
    if constexpr ((uses & entropy) != 0) below.keep<A>(i, m);
    if constexpr ((uses & power) != 0) powers.keep<A>(i, e_to_q);
    if constexpr ((uses & inverse_norm) != 0) squares.keep<A>(i, sq);
  }
  sum.join<A>();
  dot.join<A>();
  if constexpr ((uses & entropy) != 0) below.join<A>();
  if constexpr ((uses & power) != 0) powers.join<A>();
  if constexpr ((uses & inverse_norm) != 0) squares.join<A>();
  alignas(alignment) float log_sum[block_rows] = {}, scale_to_order[block_rows] = {};
  if constexpr ((uses & (square_lse | entropy | power)) != 0)
    for (int i = 0; i < block_rows; i += width<A>) {
      const F x = load<A>(sum.row + i);
      const F logarithm = select<A>(x == one, zero, log<A>(x));
      logarithm.store_aligned(log_sum + i);
      if constexpr ((uses & power) != 0)
        simd::exp<A>(-order * logarithm).store_aligned(scale_to_order + i);
    }
  for (int i = 0; i < n; ++i) {
    const detail::row_sums<float> at{sum.row[i],
                                     dot.row[i],
                                     log_sum[i],
                                     (uses & entropy) != 0 ? below.row[i] : 0.0f,
                                     (uses & power) != 0 ? powers.row[i] : 0.0f,
                                     (uses & inverse_norm) != 0 ? squares.row[i] : 0.0f,
                                     scale_to_order[i]};
    detail::close_row<uses>(b, functions, i, at, total);
  }
}

namespace detail {

// Rows [first, first + R) of a block: column sums and gradient.
template <probability kind, unsigned uses, gradient_to to, class A, int R>
MOEROUTE_INLINE void close_rows(const float* const* row, int first, index_t cols,
                                const float* coefficient, const row_functions<float>& functions,
                                const probability_block<float>& b, float* const* gradient,
                                float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  const F zero(0.0f), one(1.0f), log_factor(-functions.entropy);
  const auto columns = [&](index_t c, index_t m) {
    const F weight = load<A>(coefficient + c);
    F sum = load<A>(column_sum + c);
    MOEROUTE_UNROLL
    for (int j = 0; j < R; ++j) {
      const int i = first + j;
      const F e = F::load_aligned(b.unscaled + i * b.stride + c);
      sum = fma<A>(e, F(b.scale[i]), sum);
      if constexpr (to != gradient_to::nowhere) {
        F g = weight - F(b.center[i]);
        if constexpr ((uses & entropy) != 0) {
          const F x = m == w ? load<A>(row[i] + c) : load_first<A>(row[i] + c, m, minus_infinity);
          const F top(b.top[i]);
          const F t = select<A>(x == top, zero, x - top);
          g = fma<A>(log_factor, select<A>(e > zero, t - F(b.log_sum[i]), zero), g);
        }
        if constexpr ((uses & power) != 0)
          g = fma<A>(F(b.to_power[i]), F::load_aligned(b.powers + i * b.stride + c), g);
        if constexpr ((uses & inverse_norm) != 0) g = fma<A>(F(b.along[i]) * F(b.scale[i]), e, g);
        F slope = e * F(b.slope[i]);
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
    sum.store_unaligned(column_sum + c);
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
/// gradient_to::nowhere; column_sum is [stride]. Cost: one pass. No allocation. Determinism: as
/// open_probability_rows; columns are added in row order.
template <probability kind, unsigned uses, gradient_to to, class A = default_arch>
void close_probability_rows(const float* const* row, int n, index_t cols, const float* coefficient,
                            const row_functions<float>& functions,
                            const probability_block<float>& b, float* const* gradient,
                            float* column_sum) {
  int i = 0;
  for (; i + 4 <= n; i += 4)
    detail::close_rows<kind, uses, to, A, 4>(row, i, cols, coefficient, functions, b, gradient,
                                             column_sum);
  for (; i < n; ++i)
    detail::close_rows<kind, uses, to, A, 1>(row, i, cols, coefficient, functions, b, gradient,
                                             column_sum);
}

namespace detail {

template <class A, int R>
MOEROUTE_INLINE void keep_rows(const probability_block<float>& b, int first, index_t cols,
                               float* const* out, float* column_sum) {
  using F = vfloat<A>;
  constexpr int w = width<A>;
  for (index_t c = 0; c < cols; c += w) {
    F sum = load<A>(column_sum + c);
    MOEROUTE_UNROLL
    for (int j = 0; j < R; ++j) {
      const int i = first + j;
      const F e = F::load_aligned(b.unscaled + i * b.stride + c);
      sum = fma<A>(e, F(b.scale[i]), sum);
      const F p = e * F(b.slope[i]);
      if (c + w <= cols) {
        p.store_unaligned(out[i] + c);
      } else {
        store_first<A>(out[i] + c, cols - c, p);
      }
    }
    sum.store_unaligned(column_sum + c);
  }
}

}  // namespace detail

/// out = p for the rows of a block, 0 for rows whose gradient is 0; column_sum += p. The first half
/// of a gradient whose weights are not known yet; gradient_of_probability_rows is the second.
///
/// Shapes: out[i] is [cols], column_sum [stride]. Cost: one pass. No allocation.
template <class A = default_arch>
void keep_probability_rows(const probability_block<float>& b, int n, index_t cols,
                           float* const* out, float* column_sum) {
  int i = 0;
  for (; i + 4 <= n; i += 4) detail::keep_rows<A, 4>(b, i, cols, out, column_sum);
  for (; i < n; ++i) detail::keep_rows<A, 1>(b, i, cols, out, column_sum);
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
  for (int i = 0; i < block_rows; ++i) {
    partials<A> d(0.0f);
    if (i < n)
      detail::for_each_column<A>(row[i], cols, 0.0f, [&](int r, index_t c, F p) {
        d.part[r] = fma<A>(p, load<A>(coefficient + c), d.part[r]);
      });
    dot.keep<A>(i, d);
  }
  dot.join<A>();
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

/// The same in double, element by element: for tests of gradients.
template <probability kind, unsigned uses>
void open_probability_rows(const double* const* row, int n, index_t cols, const double* coefficient,
                           const row_functions<double>& functions, probability_block<double>& b,
                           row_function_sums& total) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (int i = 0; i < n; ++i) {
    double* const out = b.unscaled + i * b.stride;
    double top = kind == probability::softmax ? -infinity : 0.0;
    for (index_t c = 0; kind == probability::softmax && c < cols; ++c)
      top = row[i][c] > top ? row[i][c] : top;
    detail::row_sums<double> at{};
    for (index_t c = 0; c < cols; ++c) {
      const double x = row[i][c] == row[i][c] ? row[i][c] : -infinity;
      const double t = x == top ? 0.0 : x - top;
      const double e = kind == probability::normalized_sigmoid ? 1.0 / (1.0 + std::exp(-x))
                       : top > -infinity                       ? std::exp(t)
                                                               : 0.0;
      out[c] = e;
      at.sum += e;
      at.dot += e * coefficient[c];
      if (e > 0.0) {
        at.mean_below += e * t;
        if ((uses & power) != 0) at.powers += e * std::exp((functions.q - 1.0) * t);
        at.squares += e * e;
      }
    }
    b.top[i] = top;
    at.log_sum = std::log(at.sum);
    at.scale_to_order = std::exp((1.0 - functions.q) * at.log_sum);
    detail::close_row<uses>(b, functions, i, at, total);
  }
}

template <probability kind, unsigned uses, gradient_to to>
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
        gradient[i][c] = slope * g + (to == gradient_to::add ? gradient[i][c] : 0.0);
      }
    }
}

}  // namespace moeroute::simd
