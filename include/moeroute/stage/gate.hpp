// The gate projection: hidden states to logits.
#pragma once

#include <moeroute/simd/gemm.hpp>

namespace moeroute {

/// logits = x W^T + b, in float.
///
/// Shapes: x [T, d] in float, bfloat16 or float16, W [E, d] packed (with its bias), logits [T, E].
/// Throws: error where the shapes do not fit. Cost: T E d multiply-adds, no allocation.
/// Determinism: a token's logits do not depend on other tokens or on threads; they may differ in the last
/// bits between ISAs.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void gate(const X& x, const simd::packed_matrix<A>& weight, Y&& logits, const Exec& exec = {}) {
  simd::gemm(x, weight, logits, exec);
}

}  // namespace moeroute
