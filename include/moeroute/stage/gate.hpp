// The gate projection: hidden states to logits.
#pragma once

#include <algorithm>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace moeroute {

/// logits = x W^T + b, in float.
///
/// Shapes: x [T, d] in float, bfloat16 or float16, W [E, d] packed in any of them (with its bias),
/// logits [T, E].
/// Throws: error where the shapes do not fit. Cost: T E d multiply-adds, no allocation. One token
/// is bound by reading W, which takes half as long in 16 bits.
/// Determinism: a token's logits do not depend on other tokens or on threads; they may differ in
/// the last bits between ISAs.
template <readable_rows X, writable_rows Y, executor Exec = serial, storage W = float,
          class A = simd::default_arch>
void gate(const X& x, const simd::packed_matrix<W, A>& weight, Y&& logits, const Exec& exec = {}) {
  simd::gemm(x, weight, logits, exec);
}

/// logits = scale * cos(x, w_e): rows of x and of W count by their direction only.
///
/// Shapes: as gate(); weight holds rows of norm 1 (unit_rows), A zero row has zero
/// logits. Cost: T (E + 2) d multiply-adds, no allocation. Source: X-MoE (Chi et al. 2022).
template <readable_rows X, writable_rows Y, executor Exec = serial, storage W = float,
          class A = simd::default_arch>
void cosine_gate(const X& x_rows, const simd::packed_matrix<W, A>& weight, float scale,
                 Y&& logit_rows, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> logits = view(logit_rows);
  simd::gemm(x, weight, logits, exec);
  for (index_t t = 0; t < x.rows; ++t) {
    const float norm = simd::row_norm<A>(x.row(t), x.cols);
    const float factor = scale / std::max(norm, 1e-12f);
    for (index_t e = 0; e < logits.cols; ++e) logits(t, e) *= factor;
  }
}

/// weights[t] = scale * sigmoid(x[t] . w): the gate of shared experts that have one.
///
/// Shapes: x [T, d], weight [1, d], weights [T]. Throws: error where shapes do not fit.
/// Cost: T d multiply-adds, no allocation. Determinism: as gate(): the same bits for every executor
/// and thread count, but not on every ISA. Source: Qwen2-MoE (2024).
template <readable_rows X, executor Exec = serial, storage W = float, class A = simd::default_arch>
void shared_gate(const X& x_rows, const simd::packed_matrix<W, A>& weight, float scale,
                 std::span<float> weights, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  check_size("shared_gate", "weight.rows()", weight.rows(), 1);
  check_size("shared_gate", "weights.size()", static_cast<index_t>(weights.size()), x.rows);
  simd::gemm(x, weight, matrix_view<float>(weights.data(), x.rows, 1), exec);
  simd::map_row<A>(weights.data(), x.rows, weights.data(), [scale](simd::vfloat<A> z) {
    return simd::sigmoid<A>(z) * simd::vfloat<A>(scale);
  });
}

/// Divides every row by its norm; a zero row stays. For the weights of a cosine gate.
///
/// Throws: error where rows run into one another.
template <writable_rows W, class A = simd::default_arch>
void unit_rows(W&& weight_rows) {
  const auto w = view(weight_rows);
  check_stride("unit_rows", "weight", w);
  for (index_t r = 0; r < w.rows; ++r) {
    const float norm = std::max(simd::row_norm<A>(w.row(r), w.cols), 1e-12f);
    for (index_t c = 0; c < w.cols; ++c) w(r, c) /= norm;
  }
}

}  // namespace moeroute
