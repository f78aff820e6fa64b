// Functions of rows of probabilities and their gradients with respect to what the probabilities
// were made from: up to 16 rows at once, which share their reductions.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/join.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/numbers.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

/// How a row x becomes probabilities p.
enum class probability {
  softmax,                   ///< exp(x) / sum exp(x)
  normalized_sigmoid,        ///< s / (sum s + eps) with s = sigmoid(x)
  normalized_sqrt_softplus,  ///< s / (sum s + eps) with s = sqrt(log(1 + exp(x)))
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
  F eps = 0;     ///< of the scores that are divided by their sum
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
  F* powers;       ///< [16, stride] for power: unscaled^(q - 1), something finite where that is 0
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

// What a row sums up, one row per lane.
template <class V>
struct row_sums {
  V top, sum, dot, log_sum, mean_below, powers, squares;
  V scale_to_order;  // sum^(1 - q)
};

// The functions of rows and what their gradient needs.
template <class V>
struct closed_rows {
  V scale, slope, center, along, to_power;
  V lse, entropy, power, inverse_norm;
};

// G = dValue/dp is, per element,
//   c - entropy * ln p + along * p + to_power * unscaled^(q - 1),
// and the gradient p * (G - center).
template <unsigned uses, class Of, class F, class V = typename Of::value>
MOEROUTE_INLINE closed_rows<V> close_rows_of(const row_functions<F>& f, const row_sums<V>& at) {
  const V zero(F{0}), one(F{1});
  const auto live = at.sum > zero;
  const auto finite = live & (at.top < V(std::numeric_limits<F>::infinity()));
  closed_rows<V> out;
  out.scale = Of::select(live, Of::divide(one, at.sum + V(f.eps)), zero);
  out.slope = Of::select(finite, out.scale, zero);
  out.center = at.dot * out.scale;
  if constexpr ((uses & square_lse) != 0) {
    out.lse = Of::select(finite, at.top + at.log_sum, zero);
    out.center = out.center - V(F{2} * f.square_lse) * out.lse;
  }
  if constexpr ((uses & entropy) != 0) {
    out.entropy = Of::select(live, at.log_sum - at.mean_below * out.scale, zero);
    out.center = out.center + V(f.entropy) * out.entropy;
  }
  if constexpr ((uses & power) != 0) {
    const F order = f.q - F{1}, factor = f.power * f.q / order;
    const V scaled = Of::select(live, at.scale_to_order, zero);
    const V sum_of_powers = at.powers * scaled * out.scale;
    out.to_power = V(-factor) * scaled;
    out.center = out.center - V(factor) * sum_of_powers;
    out.power = Of::select(live, Of::divide(one - sum_of_powers, V(order)), zero);
  }
  if constexpr ((uses & inverse_norm) != 0) {
    const V norm = Of::root(at.squares) * out.scale;
    const V value = Of::select(live, Of::divide(one, norm + V(f.offset)), zero);
    out.along = Of::select(live, Of::divide(V(-f.inverse_norm) * value * value, norm), zero);
    out.center = out.center + out.along * norm * norm;
    out.inverse_norm = value;
  }
  return out;
}

// Partial sums of 16 rows, joined at once: out[i] is row i's sum in the tree of sum_of.
struct joined_sums {
  alignas(alignment) float part[block_rows * block_rows];
  alignas(alignment) float row[block_rows];

  template <class A>
  MOEROUTE_INLINE void keep(int i, const partials<A>& p) {
    store_partials<A>(p, part + i * block_rows);
  }
  template <class A>
  MOEROUTE_INLINE void join(int n) {
    std::fill(part + n * block_rows, part + block_rows * block_rows, 0.0f);
    simd::join_partials<A>(part, row, [](vfloat<A> a, vfloat<A> b) { return a + b; });
  }
};

// The register of columns [c, c + width), c below cols rounded up to 16: the tail filled.
template <class A>
MOEROUTE_INLINE vfloat<A> load_columns(const float* row, index_t c, index_t cols, float fill) {
  if (c + width<A> <= cols) [[likely]]
    return load<A>(row + c);
  const index_t from = c < cols ? c : cols;
  return load_first<A>(row + from, cols - from, fill);
}

// 0 for NaN, else sigmoid(x): its bits.
template <class A>
MOEROUTE_INLINE vfloat<A> sigmoid_or_nothing(vfloat<A> x) {
  using F = vfloat<A>;
  // Below -87 the exponential is lost beside the 1.
  const F e = exp_core<A>(max_or_second<A>(-x, F(-87.0f)));
  return select<A>(x >= F(-exp_highest), divide<A>(F(1.0f), F(1.0f) + e), F(0.0f));
}

// Above, a score would be too large to be squared; its row's gradient is 0 long before.
inline constexpr float largest_logit = 1e30f;

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

template <class A>
struct open_sums {
  partials<A> sum{0.0f}, dot{0.0f}, below{0.0f}, powers{0.0f}, squares{0.0f};
};

// Where unscaled is 0, x - top counts as this: anything finite does, as it is multiplied by 0.
inline constexpr float far_below = -88.0f;

// One row of open_probability_rows. The sums stay in registers: there is one place that adds to
// them.
template <probability kind, unsigned uses, bool finite_top, class A>
MOEROUTE_INLINE open_sums<A> open_row(const float* row, index_t cols, float maximum,
                                      const float* coefficient, float power_order, float* out,
                                      float* powers, const float* written_next) {
  using F = vfloat<A>;
  constexpr int w = width<A>, n = registers_per_block<A>;
  const F zero(0.0f), top(maximum), order(power_order);
  open_sums<A> at;
  for (index_t block = 0; block < cols; block += block_rows) {
    MOEROUTE_PREFETCH_TO_WRITE(written_next + block);
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) {
      const index_t c = block + r * w;
      const F x = load_columns<A>(row, c, cols, minus_infinity);
      F e, t;
      if constexpr (kind == probability::softmax) {
        t = x - top;
        if constexpr (!finite_top) t = select<A>(x == top, zero, t);
        e = exp_nonpositive<A>(t);
        if constexpr ((uses & (entropy | power)) != 0) t = max_or_second<A>(t, F(far_below));
      } else if constexpr (kind == probability::normalized_sigmoid) {
        e = sigmoid_or_nothing<A>(x);
      } else {
        const F most(largest_logit);
        e = sqrt_softplus<A>(nan_to_minus_infinity<A>(select<A>(x > most, most, x)));
      }
      e.store_aligned(out + c);
      at.sum.part[r] += e;
      at.dot.part[r] = fma<A>(e, load<A>(coefficient + c), at.dot.part[r]);
      if constexpr ((uses & entropy) != 0) at.below.part[r] = fma<A>(e, t, at.below.part[r]);
      if constexpr ((uses & power) != 0) {
        const F to_order = exp_nonpositive<A>(order * t);
        to_order.store_aligned(powers + c);
        at.powers.part[r] = fma<A>(e, to_order, at.powers.part[r]);
      }
      if constexpr ((uses & inverse_norm) != 0)
        at.squares.part[r] = fma<A>(e, e, at.squares.part[r]);
    }
  }
  return at;
}

}  // namespace detail

/// Fills a block from n rows x of floats, 1 <= n <= 16, and adds the rows' functions to `total`.
///
/// Shapes: row[i] is [cols]; coefficient is [stride], zero past cols: the value's derivative by p;
/// gradient[i], or null: where the row's gradient will be written, whose memory is fetched while
/// the exponentials are computed.
/// A NaN counts as -inf. A row of nothing but -inf has no mass: p, its functions and its gradient
/// are 0. +inf share the mass, and the gradient of their row and its square_lse are 0.
/// Cost: one exponential per element, a second one for power. No allocation.
/// Determinism: a row's values do not depend on the rows beside it.
template <probability kind, unsigned uses, class A = default_arch>
void open_probability_rows(const float* const* row, int n, index_t cols, const float* coefficient,
                           const row_functions<float>& functions, float* const* gradient,
                           probability_block<float>& b, row_function_sums& total) {
  using F = vfloat<A>;
  constexpr bool softmax = kind == probability::softmax;
  static_assert(softmax || uses == no_function,
                "[moeroute::simd::open_probability_rows] functions of rows are of the softmax");
  constexpr int w = width<A>;
  const F zero(0.0f), one(1.0f);
  detail::joined_sums max, sum, dot, below, powers, squares;
  if constexpr (softmax) {
    std::fill(max.part + n * block_rows, max.part + block_rows * block_rows, minus_infinity);
    for (int i = 0; i < n; ++i) {
      partials<A> best(minus_infinity);
      for (index_t c = 0; c < cols; c += block_rows) {
        MOEROUTE_UNROLL
        for (int r = 0; r < partials<A>::n; ++r)
          best.part[r] = max_or_second<A>(
              detail::load_columns<A>(row[i], c + r * w, cols, minus_infinity), best.part[r]);
      }
      max.keep<A>(i, best);
    }
    join_partials<A>(max.part, b.top, [](F x, F y) { return max_or_second<A>(y, x); });
    // A row without mass: nothing equals this maximum and everything is infinitely far below it.
    for (float& top : b.top) top = top > minus_infinity ? top : plus_infinity;
  } else {
    for (float& top : b.top) top = 0.0f;
  }
  const float order = functions.q - 1.0f;
  for (int i = 0; i < n; ++i) {
    float* const out = b.unscaled + i * b.stride;
    float* const to_order = (uses & power) != 0 ? b.powers + i * b.stride : nullptr;
    const float* const written_next = gradient == nullptr ? row[i] : gradient[i];
    const bool finite_top = b.top[i] < plus_infinity;
    const detail::open_sums<A> at =
        finite_top ? detail::open_row<kind, uses, true, A>(row[i], cols, b.top[i], coefficient,
                                                           order, out, to_order, written_next)
                   : detail::open_row<kind, uses, false, A>(row[i], cols, b.top[i], coefficient,
                                                            order, out, to_order, written_next);
    sum.keep<A>(i, at.sum);
    dot.keep<A>(i, at.dot);
    if constexpr ((uses & entropy) != 0) below.keep<A>(i, at.below);
    if constexpr ((uses & power) != 0) powers.keep<A>(i, at.powers);
    if constexpr ((uses & inverse_norm) != 0) squares.keep<A>(i, at.squares);
  }
  sum.join<A>(n);
  dot.join<A>(n);
  if constexpr ((uses & entropy) != 0) below.join<A>(n);
  if constexpr ((uses & power) != 0) powers.join<A>(n);
  if constexpr ((uses & inverse_norm) != 0) squares.join<A>(n);
  alignas(alignment) float value[4][block_rows];
  for (int i = 0; i < block_rows; i += w) {
    detail::row_sums<F> at;
    at.top = load<A>(b.top + i);
    at.sum = load<A>(sum.row + i);
    at.dot = load<A>(dot.row + i);
    if constexpr ((uses & (square_lse | entropy | power)) != 0)
      at.log_sum = select<A>(at.sum == one, zero, log<A>(at.sum));
    if constexpr ((uses & entropy) != 0) at.mean_below = load<A>(below.row + i);
    if constexpr ((uses & power) != 0) {
      at.powers = load<A>(powers.row + i);
      at.scale_to_order = simd::exp<A>(-F(order) * at.log_sum);
    }
    if constexpr ((uses & inverse_norm) != 0) at.squares = load<A>(squares.row + i);
    const auto rows = detail::close_rows_of<uses, of_lanes<A>>(functions, at);
    rows.scale.store_aligned(b.scale + i);
    rows.slope.store_aligned(b.slope + i);
    rows.center.store_aligned(b.center + i);
    if constexpr ((uses & (square_lse | entropy)) != 0) at.log_sum.store_aligned(b.log_sum + i);
    if constexpr ((uses & square_lse) != 0) rows.lse.store_aligned(value[0] + i);
    if constexpr ((uses & entropy) != 0) rows.entropy.store_aligned(value[1] + i);
    if constexpr ((uses & power) != 0) {
      rows.to_power.store_aligned(b.to_power + i);
      rows.power.store_aligned(value[2] + i);
    }
    if constexpr ((uses & inverse_norm) != 0) {
      rows.along.store_aligned(b.along + i);
      rows.inverse_norm.store_aligned(value[3] + i);
    }
  }
  for (int i = 0; i < n; ++i) {
    const auto of = [&](int function) { return static_cast<double>(value[function][i]); };
    if constexpr ((uses & square_lse) != 0) total.square_lse += of(0) * of(0);
    if constexpr ((uses & entropy) != 0) total.entropy += of(1);
    if constexpr ((uses & power) != 0) total.power += of(2);
    if constexpr ((uses & inverse_norm) != 0) total.inverse_norm += of(3);
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

namespace detail {

inline double sqrt_softplus(double x) {
  x = std::min(x, static_cast<double>(largest_logit));
  // Below, the logarithm is lost; the exponential is exact enough long before.
  return x < -40.0 ? std::exp(0.5 * x)
                   : std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
}

}  // namespace detail

/// The same in double, element by element: for tests of gradients.
template <probability kind, unsigned uses>
void open_probability_rows(const double* const* row, int n, index_t cols, const double* coefficient,
                           const row_functions<double>& functions, double* const*,
                           probability_block<double>& b, row_function_sums& total) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (int i = 0; i < n; ++i) {
    double* const out = b.unscaled + i * b.stride;
    double top = kind == probability::softmax ? -infinity : 0.0;
    for (index_t c = 0; kind == probability::softmax && c < cols; ++c)
      top = row[i][c] > top ? row[i][c] : top;
    detail::row_sums<double> at{};
    at.top = top;
    for (index_t c = 0; c < cols; ++c) {
      const double x = row[i][c] == row[i][c] ? row[i][c] : -infinity;
      const double t = x == top ? 0.0 : x - top;
      const double e = kind == probability::normalized_sqrt_softplus ? detail::sqrt_softplus(x)
                       : kind == probability::normalized_sigmoid     ? 1.0 / (1.0 + std::exp(-x))
                       : top > -infinity                             ? std::exp(t)
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
    at.log_sum = std::log(at.sum);
    at.scale_to_order = std::exp((1.0 - functions.q) * at.log_sum);
    const auto closed = detail::close_rows_of<uses, of_double>(functions, at);
    b.top[i] = top;
    b.scale[i] = closed.scale;
    b.slope[i] = closed.slope;
    b.center[i] = closed.center;
    if constexpr ((uses & (square_lse | entropy)) != 0) b.log_sum[i] = at.log_sum;
    if constexpr ((uses & square_lse) != 0) total.square_lse += closed.lse * closed.lse;
    if constexpr ((uses & entropy) != 0) total.entropy += closed.entropy;
    if constexpr ((uses & power) != 0) {
      b.to_power[i] = closed.to_power;
      total.power += closed.power;
    }
    if constexpr ((uses & inverse_norm) != 0) {
      b.along[i] = closed.along;
      total.inverse_norm += closed.inverse_norm;
    }
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
        if (kind == probability::normalized_sqrt_softplus)
          slope = e > 0.0 ? b.slope[i] * -std::expm1(-e * e) / (2.0 * e) : 0.0;
        gradient[i][c] = slope * g + (to == gradient_to::add ? gradient[i][c] : 0.0);
      }
    }
}

}  // namespace moeroute::simd
