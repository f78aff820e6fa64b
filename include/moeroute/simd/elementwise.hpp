// exp, sigmoid, silu, tanh, softplus on registers and rows. Relative error at most 2.5e-7; the same
// bits on every ISA.
#pragma once

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

namespace detail {

// exp(x) for x in [-87.3365, 88.7228]: n = round(x / ln 2), a polynomial of degree 6 in the
// remainder.
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
  // The low bits of `shifted` are n, and all others leave the register at the top.
  return scale_by_power_of_two<A>(p, bits_as<std::int32_t>(shifted));
}

inline constexpr float exp_lowest = -87.3365402f;  // below, the result would be denormal: 0
inline constexpr float exp_highest = 88.7228317f;  // above, it would overflow: +inf

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

/// Divides many by one d in [1, 2^40], with the bits of the division.
template <class A>
class divider {
 public:
  explicit divider(float d) : d_(d), reciprocal_(1.0f / d) {}

  /// x / d for x in [0, 1] or NaN.
  MOEROUTE_INLINE vfloat<A> operator()(vfloat<A> x) const {
    if constexpr (detail::has_fma<A>) {
      // The quotient by the rounded reciprocal is at most a step off; its exact remainder says
      // where to.
      const vfloat<A> q = x * reciprocal_;
      const vfloat<A> corrected = fma<A>(fma<A>(-q, d_, x), reciprocal_, q);
      // Below, the remainder may be denormal and lose the bits that decide.
      const auto tiny = x < vfloat<A>(0x1p-80f);
      if (!xsimd::any(tiny & (x > vfloat<A>(0.0f)))) [[likely]]
        return corrected;
      return select<A>(tiny, divide<A>(x, d_), corrected);
    } else {
      return divide<A>(x, d_);
    }
  }

 private:
  vfloat<A> d_;
  vfloat<A> reciprocal_;
};

/// 1 / (1 + exp(-x)): 0 at -inf, 1 at +inf, NaN for NaN.
template <class A>
MOEROUTE_INLINE vfloat<A> sigmoid(vfloat<A> x) {
  // A divider works beside the ports that the exponential keeps busy: a reciprocal by Newton steps
  // would queue for those, and is slower.
  return divide<A>(vfloat<A>(1.0f), vfloat<A>(1.0f) + exp<A>(-x));
}

/// The same where only the first n lanes count.
template <class A>
MOEROUTE_INLINE vfloat<A> sigmoid_first(vfloat<A> x, int n) {
  return divide_first<A>(vfloat<A>(1.0f), vfloat<A>(1.0f) + exp<A>(-x), n);
}

/// x * sigmoid(x), finite for every finite x.
template <class A>
MOEROUTE_INLINE vfloat<A> silu(vfloat<A> x) {
  const vfloat<A> one(1.0f);
  return divide<A>(x, one + exp<A>(-x));
}

/// tanh(x), odd, NaN for NaN. Relative error at most 3e-7.
template <class A>
MOEROUTE_INLINE vfloat<A> tanh(vfloat<A> x) {
  using F = vfloat<A>;
  const F size = xsimd::abs(x), square = x * x;
  F p(-0.005704987794160843f);
  p = fma<A>(p, square, F(0.0206390880048275f));
  p = fma<A>(p, square, F(-0.05373971536755562f));
  p = fma<A>(p, square, F(0.13331441581249237f));
  p = fma<A>(p, square, F(-0.3333328068256378f));
  const F near_zero = fma<A>(p * square, x, x);
  // 1 - 2 / (exp(2|x|) + 1), whose cancellation is harmless from 0.625 on.
  const F elsewhere = F(1.0f) - divide<A>(F(2.0f), exp<A>(size + size) + F(1.0f));
  const F y = select<A>(size < F(0.625f), near_zero, xsimd::copysign(elsewhere, x));
  return select<A>(x == x, y, x);
}

/// log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)); relative error at most 4e-7 down to x = -87.
template <class A>
MOEROUTE_INLINE vfloat<A> softplus(vfloat<A> x) {
  using F = vfloat<A>;
  const F e = exp_nonpositive<A>(-xsimd::abs(x));
  // log1p(e) = 2 atanh(s) with s = e / (2 + e) in [0, 1/3].
  const F s = divide<A>(e, e + F(2.0f)), square = s * s;
  F p(0.24289555847644806f);
  p = fma<A>(p, square, F(0.21430741250514984f));
  p = fma<A>(p, square, F(0.2861659526824951f));
  p = fma<A>(p, square, F(0.39998888969421387f));
  p = fma<A>(p, square, F(0.6666667461395264f));
  const F log1p = fma<A>(p * square, s, s + s);
  const F y = select<A>(x > F(0.0f), x, F(0.0f)) + log1p;
  return select<A>(x == x, y, x);
}

/// log(x) for normal x > 0; anything else gives some number. Relative error at most 4e-7 away from
/// x = 1.
template <class A>
MOEROUTE_INLINE vfloat<A> log(vfloat<A> x) {
  using F = vfloat<A>;
  // x = 2^n * m with m in [sqrt(1/2), sqrt(2)); log(m) = 2 atanh(s) with s = (m - 1) / (m + 1).
  const vint<A> bits = bits_as<std::int32_t>(x) - vint<A>(0x3f3504f3);
  const vint<A> n = bits >> 23;
  const F m = bits_as<float>(bits_as<std::int32_t>(x) - (n << 23));
  const F s = divide<A>(m - F(1.0f), m + F(1.0f)), square = s * s;
  F p(0.24289555847644806f);
  p = fma<A>(p, square, F(0.21430741250514984f));
  p = fma<A>(p, square, F(0.2861659526824951f));
  p = fma<A>(p, square, F(0.39998888969421387f));
  p = fma<A>(p, square, F(0.6666667461395264f));
  const F log_m = fma<A>(p * square, s, s + s);
  return fma<A>(xsimd::to_float(n), F(0.693147181f), log_m);
}

/// sqrt(softplus(x)), which is exp(x / 2) where softplus would underflow: 0 below -174, no 0 / 0
/// above.
template <class A>
MOEROUTE_INLINE vfloat<A> sqrt_softplus(vfloat<A> x) {
  using F = vfloat<A>;
  const F y = square_root<A>(softplus<A>(x));
  return select<A>(x < F(-17.0f), exp_nonpositive<A>(x * F(0.5f)), y);
}

/// out[i] = f(in[i]) over a row of n floats; in and out may be the same row.
template <class A, class F>
MOEROUTE_INLINE void map_row(const float* in, index_t n, float* out, F&& f) {
  index_t i = 0;
  for (; i + width<A> <= n; i += width<A>) f(load<A>(in + i)).store_unaligned(out + i);
  if (i < n) store_first<A>(out + i, n - i, f(load_first<A>(in + i, n - i, 0.0f)));
}

}  // namespace moeroute::simd
