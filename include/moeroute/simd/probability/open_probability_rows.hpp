// The first sweep over rows of logits: probabilities, functions of rows and what their gradients
// need.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/probability/probability_block.hpp>

namespace moeroute::simd {

namespace detail {

// 0 for NaN, else sigmoid(x): its bits.
template <class A>
MOEROUTE_INLINE vfloat<A> sigmoid_or_nothing(vfloat<A> x) {
  using F = vfloat<A>;
  // Below -87 the exponential is lost beside the 1.
  const F e = exp_core<A>(max_or_second<A>(-x, F(-87.0f)));
  return select<A>(x >= F(-exp_highest), divide<A>(F(1.0f), F(1.0f) + e), F(0.0f));
}

template <class A>
struct open_sums {
  partials<A> sum{0.0f}, dot{0.0f}, below{0.0f}, powers{0.0f}, squares{0.0f};
};

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

}  // namespace moeroute::simd
