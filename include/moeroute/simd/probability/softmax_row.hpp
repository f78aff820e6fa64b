// Softmax of one row in float or double, with the logarithm of its sum.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <type_traits>

#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

/// p = softmax of n logits; returns log sum exp, -inf where no logit is above -inf.
///
/// NaN counts as -inf, several +inf share, all are 0 where none is above -inf. p may be z.
/// Cost: n exponentials. Determinism: float has the same bits on every ISA.
template <class A = default_arch, std::floating_point F>
F softmax_row(const F* z, index_t n, F* p) {
  constexpr F never = -std::numeric_limits<F>::infinity();
  F top = never, sum = 0;
  if constexpr (std::is_same_v<F, float>) {
    top = row_max<A>(z, n);
    if (!(top > never)) {
      std::fill_n(p, n, F(0));
      return never;
    }
    sum = row_exp<A>(z, n, top, p);
    const float share = 1 / sum;
    for (index_t e = 0; e < n; ++e) p[e] *= share;
  } else {
    for (index_t e = 0; e < n; ++e) top = z[e] > top ? z[e] : top;
    for (index_t e = 0; e < n; ++e)
      sum += p[e] = !(z[e] > never) ? F(0) : z[e] == top ? F(1) : std::exp(z[e] - top);
    for (index_t e = 0; e < n; ++e) p[e] = sum > 0 ? p[e] / sum : F(0);
    if (!(sum > 0)) return never;
  }
  return top + std::log(sum);
}

}  // namespace moeroute::simd
