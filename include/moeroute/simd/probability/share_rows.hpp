// Shares of rectified scores: rows s = scale * max(x, 0), what losses sum over them, and their
// gradients. A NaN has no share; a +inf must not occur where there is a scale.
#pragma once

#include <moeroute/simd/numbers.hpp>

namespace moeroute::simd {

/// Sums over a row, r = max(x, 0).
template <class F>
struct rectified_sums {
  F sum, squares;  ///< of r, of r^2
};

/// What a row's gradient is made of: (slope - center - bend * x) * scale where x > 0.
template <class F>
struct share_gradient {
  F center, bend, scale;
};

namespace detail {

// y where x > 0, else 0.
template <class Of, class V = typename Of::value>
MOEROUTE_INLINE V where_positive(V x, V y) {
  return Of::select(x > V(0), y, V(0));
}

// 1 - s + eps, at least eps: next to s = 1 the difference is exact, and eps is what is left.
template <class Of, class V = typename Of::value>
MOEROUTE_INLINE V rest_of(V share, V eps) {
  return Of::rectified(V(1) - share) + eps;
}

}  // namespace detail

/// Sum and sum of squares of max(x, 0).
///
/// Cost of this and all below: one read of each row, no allocation.
template <class F, class A = default_arch>
MOEROUTE_INLINE rectified_sums<F> sums_of_rectified(const F* x, index_t cols) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  V sum(0), squares(0);
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V v = Of::load(x + c, n), r = Of::rectified(v);
    sum += r;
    squares += r * r;
  });
  const auto both = Of::sums(sum, squares);
  return {both[0], both[1]};
}

/// sum[c] += s[c] and count[c] += 1 where x[c] > 0.
template <class F, class A = default_arch>
MOEROUTE_INLINE void add_share_row(const F* x, F scale, index_t cols, F* sum, F* count) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V v = Of::load(x + c, n);
    Of::store(sum + c, n, Of::load(sum + c, n) + Of::rectified(v) * V(scale));
    Of::store(count + c, n, Of::load(count + c, n) + detail::where_positive<Of>(v, V(1)));
  });
}

/// The sum of slope[c] * s[c].
template <class F, class A = default_arch>
MOEROUTE_INLINE F share_dot(const F* x, F scale, const F* slope, index_t cols) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  V sum(0);
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V v = Of::load(x + c, n);
    sum += Of::rectified(v) * Of::load(slope + c, n);
  });
  return scale * Of::sum(sum);
}

/// product[c] *= 1 - s[c] + eps.
template <class F, class A = default_arch>
MOEROUTE_INLINE void multiply_rest_row(const F* x, F scale, F eps, index_t cols, F* product) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V v = Of::load(x + c, n), s = Of::rectified(v) * V(scale);
    Of::store(product + c, n, Of::load(product + c, n) * detail::rest_of<Of>(s, V(eps)));
  });
}

/// pull[c] = product[c] / (1 - s[c] + eps), the product without this row; returns the sum of
/// pull[c] * s[c].
template <class F, class A = default_arch>
MOEROUTE_INLINE F pull_row(const F* x, F scale, F eps, const F* product, index_t cols, F* pull) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  V sum(0);
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V v = Of::load(x + c, n), s = Of::rectified(v) * V(scale);
    const V p = Of::divide(Of::load(product + c, n), detail::rest_of<Of>(s, V(eps)));
    Of::store(pull + c, n, p);
    sum += p * s;
  });
  return Of::sum(sum);
}

/// out[c] = (slope[c] - center - bend * x[c]) * scale where x[c] > 0, else 0; or that added to out.
template <bool add, class F, class A = default_arch>
MOEROUTE_INLINE void share_gradient_row(const F* x, const F* slope, const share_gradient<F>& g,
                                        index_t cols, F* out) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    const V v = Of::load(x + c, n);
    const V d = (Of::load(slope + c, n) - V(g.center)) - V(g.bend) * v;
    const V y = detail::where_positive<Of>(v, d * V(g.scale));
    Of::store(out + c, n, add ? Of::load(out + c, n) + y : y);
  });
}

}  // namespace moeroute::simd
