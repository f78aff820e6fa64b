// Two tokens whose activation should be alike: the binary cross-entropy of their rows.
#pragma once

#include <limits>

#include <moeroute/simd/numbers.hpp>

namespace moeroute::simd {

/// The sum over columns of softplus(a) - a y, a = beta * guess[c], y = sigmoid(beta * truth[c]);
/// where dguess is given, dguess[c] += factor (sigmoid(a) - y) and dtruth[c] -= factor a y (1 - y).
///
/// Shapes: rows of cols; the two tokens, and so their gradients, may be the same one. Ensures:
/// columns where a product is not finite add nothing. Cost: three exponentials a column. No
/// allocation.
template <class F, class A = default_arch>
F locality_row(const F* guess, const F* truth, F beta, F factor, index_t cols, F* dguess,
               F* dtruth) {
  using Of = numbers_of<F, A>;
  using V = typename Of::value;
  const V infinity(std::numeric_limits<F>::infinity()), zero(0);
  V sum(0);
  for_each_part<Of>(cols, [&](index_t c, index_t n) {
    // Past the last column: not a number, hence nothing.
    constexpr F none = std::numeric_limits<F>::quiet_NaN();
    const V a = Of::load(guess + c, n, none) * V(beta), b = Of::load(truth + c, n, none) * V(beta);
    const auto both = (Of::absolute(a) < infinity) && (Of::absolute(b) < infinity);
    // Beyond 40 a sigmoid is 0 or 1 by 4e-18; closer to them there are denormal numbers, and each
    // operation on one costs a hundred cycles.
    const V inner = Of::clamped(a, F{40}), y = Of::sigmoid(Of::clamped(b, F{40}));
    sum += Of::select(both, Of::softplus(inner) + Of::rectified(a - inner) - a * y, zero);
    if (dguess == nullptr) return;
    const V pull = (Of::sigmoid(inner) - y) * V(factor), bend = a * y * (V(1) - y) * V(factor);
    Of::store(dguess + c, n, Of::load(dguess + c, n) + Of::select(both, pull, zero));
    Of::store(dtruth + c, n, Of::load(dtruth + c, n) - Of::select(both, bend, zero));
  });
  return Of::sum(sum);
}

}  // namespace moeroute::simd
