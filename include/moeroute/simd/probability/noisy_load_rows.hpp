// The probability of each column to exceed a threshold under noise of its own, and its gradient.
#pragma once

#include <limits>

#include <moeroute/simd/numbers.hpp>

namespace moeroute::simd {

/// What the columns of one row have to exceed: threshold[1] those that are selected, that is, whose
/// noisy value is above threshold[0] or equal to it at column[0] or before; threshold[0] the
/// others. column: where the threshold stands; -1: there is none, and it is -inf.
template <class F>
struct load_bound {
  F threshold[2];
  std::int32_t column[2];
};

/// One row: values, the same with noise, and sigma per column; sigma null: `constant` for all.
template <class F>
struct noisy_row {
  const F *clean, *noisy, *sigma;
  F constant;
};

/// How much the thresholds of a row are pushed up.
template <class F>
struct threshold_push {
  F at[2];
};

namespace detail {

// u = (clean - threshold) / sigma of some columns.
template <class Of>
struct load_distance {
  typename Of::value u, inverse_sigma;
  typename Of::mask selected;
};

template <class Of, class F, class V = typename Of::value>
MOEROUTE_INLINE load_distance<Of> load_distance_at(const noisy_row<F>& row, const load_bound<F>& b,
                                                   index_t c, index_t n) {
  load_distance<Of> d;
  const V last(b.threshold[0]), h = Of::load(row.noisy + c, n);
  d.selected = (h > last) | ((h == last) & Of::up_to(c, b.column[0]));
  const V sigma = row.sigma != nullptr ? Of::load(row.sigma + c, n, F{1}) : V(row.constant);
  d.inverse_sigma = Of::divide(V(1), sigma);
  d.u = (Of::load(row.clean + c, n) - Of::select(d.selected, V(b.threshold[1]), last)) *
        d.inverse_sigma;
  return d;
}

}  // namespace detail

/// sum[c] += Phi(u[c]), u = (clean - threshold) / sigma, Phi the normal distribution; nothing where
/// u is NaN, as it is where value and threshold are both -inf.
///
/// Cost: an error function per column. No allocation.
template <class F, class A = default_arch>
void add_load_row(const noisy_row<F>& row, const load_bound<F>& bound, index_t cols, F* sum) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V u = detail::load_distance_at<Of>(row, bound, c, n).u;
    const V p = Of::select(u == u, Of::normal_cdf(u), V(0));
    Of::store(sum + c, n, Of::load(sum + c, n) + p);
  });
}

/// out[c] += w, and dsigma[c] -= w u where dsigma is given, w = slope[c] phi(u) / sigma; returns
/// the sums of w over the columns that are not selected and over those that are. Nothing where u is
/// not finite.
template <class F, class A = default_arch>
threshold_push<F> load_gradient_row(const noisy_row<F>& row, const load_bound<F>& bound,
                                    const F* slope, index_t cols, F* out, F* dsigma) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  V others(0), chosen(0);
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const auto d = detail::load_distance_at<Of>(row, bound, c, n);
    const auto finite = Of::absolute(d.u) < V(std::numeric_limits<F>::infinity());
    // Past the last column the slope is 0, and so is w.
    const V w = Of::select(
        finite, Of::load(slope + c, n) * Of::normal_density(d.u) * d.inverse_sigma, V(0));
    Of::store(out + c, n, Of::load(out + c, n) + w);
    if (dsigma != nullptr)
      Of::store(dsigma + c, n, Of::load(dsigma + c, n) - Of::select(finite, w * d.u, V(0)));
    others += Of::select(d.selected, V(0), w);
    chosen += Of::select(d.selected, w, V(0));
  });
  return {{Of::sum(others), Of::sum(chosen)}};
}

}  // namespace moeroute::simd
