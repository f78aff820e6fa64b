// exp, sigmoid, silu on registers and rows. Relative error at most 2.5e-7; the same bits on every ISA.
#pragma once

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

namespace detail {

// exp(x) for x in [-87.3365, 88.7229]: n = round(x / ln 2), a polynomial of degree 6 in the remainder.
template <class A>
MOEROUTE_INLINE vfloat<A> exp_core(vfloat<A> x) {
  using F = vfloat<A>;
  const F magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = fma<A>(x, F(1.44269504088896341f), magic);
  const F n = shifted - magic;
  F r = fma<A>(n, F(-0.693145751953125f), x);
  r = fma<A>(n, F(-1.42860682030941723e-6f), r);
  // Minimax on |r| <= ln 2 / 2 with the first two coefficients fixed at 1: 3.1e-9 before rounding.
  F p(0.0013814540579915047f);
  p = fma<A>(p, r, F(0.00836874544620514f));
  p = fma<A>(p, r, F(0.04166838899254799f));
  p = fma<A>(p, r, F(0.1666652113199234f));
  p = fma<A>(p, r, F(0.4999999403953552f));
  p = fma<A>(p, r, F(1.0f));
  p = fma<A>(p, r, F(1.0f));
  const vint<A> exponent =
      xsimd::bitwise_cast<std::int32_t>(shifted) - xsimd::bitwise_cast<std::int32_t>(magic);
  return scale_by_power_of_two<A>(p, exponent);
}

inline constexpr float exp_lowest = -87.3365402f;  // below, the result would be denormal: 0
inline constexpr float exp_highest = 88.7228394f;  // above, it would overflow: +inf

}  // namespace detail

/// exp(x) for x <= 0 (and up to 88.7): 0 below -87.3365 and for NaN.
template <class A>
MOEROUTE_INLINE vfloat<A> exp_nonpositive(vfloat<A> x) {
  const vmask<A> normal = x >= vfloat<A>(detail::exp_lowest);
  return select<A>(normal, detail::exp_core<A>(x), vfloat<A>(0.0f));
}

/// exp(x) for every x: 0 below -87.3365, +inf above 88.7228, NaN for NaN.
template <class A>
MOEROUTE_INLINE vfloat<A> exp(vfloat<A> x) {
  using F = vfloat<A>;
  F y = exp_nonpositive<A>(x);
  y = select<A>(x > F(detail::exp_highest), F(plus_infinity), y);
  return select<A>(x == x, y, x);
}

/// 1 / (1 + exp(-x)): 0 at -inf, 1 at +inf, NaN for NaN.
template <class A>
MOEROUTE_INLINE vfloat<A> sigmoid(vfloat<A> x) {
  const vfloat<A> one(1.0f);
  return one / (one + exp<A>(-x));
}

/// x * sigmoid(x), finite for every finite x.
template <class A>
MOEROUTE_INLINE vfloat<A> silu(vfloat<A> x) {
  const vfloat<A> one(1.0f);
  return x / (one + exp<A>(-x));
}

/// out[i] = f(in[i]) over a row of n floats; in and out may be the same row.
template <class A, class F>
MOEROUTE_INLINE void map_row(const float* in, index_t n, float* out, F&& f) {
  index_t i = 0;
  for (; i + width<A> <= n; i += width<A>) f(load<A>(in + i)).store_unaligned(out + i);
  if (i < n) store_first<A>(out + i, n - i, f(load_first<A>(in + i, n - i, 0.0f)));
}

}  // namespace moeroute::simd
