// Formulas of rows that are written once: in registers of float, and in single doubles, which is
// what tests of gradients compute in.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/reduce.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// A register of floats and its operations. n is the number of values, at most `width`.
template <class A>
struct of_lanes {
  using value = vfloat<A>;
  using mask = vmask<A>;
  static constexpr index_t width = simd::width<A>;

  MOEROUTE_INLINE static value load(const float* p, index_t n, float fill = 0.0f) {
    return n == width ? simd::load<A>(p) : load_first<A>(p, n, fill);
  }
  MOEROUTE_INLINE static void store(float* p, index_t n, value v) {
    if (n == width)
      v.store_unaligned(p);
    else
      store_first<A>(p, n, v);
  }
  MOEROUTE_INLINE static value select(mask m, value a, value b) { return simd::select<A>(m, a, b); }
  MOEROUTE_INLINE static value divide(value a, value b) { return simd::divide<A>(a, b); }
  MOEROUTE_INLINE static value root(value x) { return square_root<A>(x); }
  MOEROUTE_INLINE static value absolute(value x) { return xsimd::abs(x); }
  MOEROUTE_INLINE static value rectified(value x) { return max_or_second<A>(x, value(0.0f)); }
  MOEROUTE_INLINE static value exp_nonpositive(value x) { return simd::exp_nonpositive<A>(x); }
  MOEROUTE_INLINE static value sigmoid(value x) { return simd::sigmoid<A>(x); }
  MOEROUTE_INLINE static value softplus(value x) { return simd::softplus<A>(x); }
  MOEROUTE_INLINE static value clamped(value x, float most) {
    return xsimd::min(xsimd::max(x, value(-most)), value(most));
  }
  // Beyond 9 both tails and the density are below 1e-17, and what is made of them would soon be
  // denormal, which costs a hundred cycles an operation.
  MOEROUTE_INLINE static value normal_cdf(value x) {
    return value(0.5f) * xsimd::erfc(clamped(x, 9.0f) * value(-0.707106781f));
  }
  MOEROUTE_INLINE static value normal_density(value x) {
    const value y = value(0.398942280f) * simd::exp_nonpositive<A>(x * x * value(-0.5f));
    return select(xsimd::abs(x) < value(9.0f), y, value(0.0f));
  }
  MOEROUTE_INLINE static float sum(value x) {
    partials<A> all(0.0f);
    all.part[0] = x;
    return sum_of<A>(all);
  }
  // Two sums at once.
  MOEROUTE_INLINE static std::array<float, 2> sums(value x, value y) {
#if defined(__AVX512F__)
    if constexpr (width == 16) {
      __m512 both =
          _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
      both = _mm512_add_ps(both, _mm512_shuffle_f32x4(both, both, 0xb1));
      both = _mm512_add_ps(both, _mm512_permute_ps(both, 0x4e));
      both = _mm512_add_ps(both, _mm512_permute_ps(both, 0xb1));
      return {_mm512_cvtss_f32(both), _mm_cvtss_f32(_mm512_extractf32x4_ps(both, 2))};
    }
#endif
    return {sum(x), sum(y)};
  }
  // Lanes whose column, counted from `first`, is at most `last`.
  MOEROUTE_INLINE static mask up_to(index_t first, std::int32_t last) {
    return xsimd::batch_bool_cast<float>(lane_numbers<A>() <=
                                         vint<A>(last - static_cast<std::int32_t>(first)));
  }
};

/// The same of one double.
struct of_double {
  using value = double;
  using mask = bool;
  static constexpr index_t width = 1;

  static double load(const double* p, index_t, double = 0.0) { return *p; }
  static void store(double* p, index_t, double v) { *p = v; }
  static double select(bool m, double a, double b) { return m ? a : b; }
  static double divide(double a, double b) { return a / b; }
  static double root(double x) { return std::sqrt(x); }
  static double absolute(double x) { return std::abs(x); }
  static double rectified(double x) { return x > 0.0 ? x : 0.0; }
  static double clamped(double x, double most) { return std::min(std::max(x, -most), most); }
  static double exp_nonpositive(double x) { return x == x ? std::exp(x) : 0.0; }
  static double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
  static double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
  static double normal_cdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752); }
  static double normal_density(double x) { return 0.39894228040143268 * std::exp(-0.5 * x * x); }
  static double sum(double x) { return x; }
  static std::array<double, 2> sums(double x, double y) { return {x, y}; }
  static bool up_to(index_t first, std::int32_t last) { return first <= index_t{last}; }
};

/// What rows of F are computed in.
template <class F, class A = default_arch>
using numbers_of = std::conditional_t<std::is_same_v<F, float>, of_lanes<A>, of_double>;

/// f(column, n) from the first column to the last, n values at a time.
template <class Of, class G>
MOEROUTE_INLINE void for_each_part(index_t cols, G&& f) {
  index_t c = 0;
  for (; c + Of::width <= cols; c += Of::width) f(c, Of::width);
  if (c < cols) f(c, cols - c);
}

/// The sum of a[i] * b[i], n products.
template <class F, class A = default_arch>
F row_dot(const F* a, const F* b, index_t n) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  constexpr index_t w = Of::width;
  // Four sums: one would wait for its own last addition.
  V sum[4] = {V(0), V(0), V(0), V(0)};
  index_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w) {
    MOEROUTE_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += Of::load(a + i + j * w, w) * Of::load(b + i + j * w, w);
  }
  for_each_part<Of>(n - i, [&](index_t at, index_t many) {
    sum[0] += Of::load(a + i + at, many) * Of::load(b + i + at, many);
  });
  return Of::sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

/// The softmax of n values in their place; NaN and -inf become 0, several +inf share.
///
/// For a few values: the selected ones of a token. 0 everywhere where none is above -inf.
template <class F, class A = default_arch>
void softmax_in_place(F* x, index_t n) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  constexpr F lowest = -std::numeric_limits<F>::infinity();
  F top = lowest;
  for (index_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  V sum(0);
  for_each_part<Of>(n, [&](index_t i, index_t many) {
    const V v = Of::load(x + i, many, lowest);
    const V y = Of::select(v == V(top), V(1), Of::exp_nonpositive(v - V(top)));
    Of::store(x + i, many, top > lowest ? y : V(0));
    sum += y;
  });
  if (!(top > lowest)) return;
  const V scale(F{1} / Of::sum(sum));
  for_each_part<Of>(
      n, [&](index_t i, index_t many) { Of::store(x + i, many, Of::load(x + i, many) * scale); });
}

}  // namespace moeroute::simd
