// Backward of the gates: from the gradient of logits to those of hidden states and gate weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/simd/rows/row_dot.hpp>
#include <moeroute/simd/rows/row_product.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/gates/cosine.hpp>

namespace moeroute {

/// The gradients of a gate; what has no data is not wanted. `to` says whether they are written or
/// added to.
template <class F = float>
struct gate_gradients {
  gradient_to to = gradient_to::write;
  matrix_view<F> x{};       ///< [T, d]
  matrix_view<F> weight{};  ///< [E, d]
  std::span<F> bias{};      ///< [E]
};

namespace detail {

template <class T, class W, class F>
void check_gate_gradients(const char* where, const matrix_view<T>& x, const matrix_view<W>& weight,
                          const matrix_view<const F>& dlogits, const gate_gradients<F>& g) {
  const index_t tokens = x.rows, d = x.cols, experts = weight.rows;
  check_size(where, "weight.cols()", weight.cols, d);
  check_size(where, "dlogits.rows()", dlogits.rows, tokens);
  check_size(where, "dlogits.cols()", dlogits.cols, experts);
  check_stride(where, "x", x);
  check_stride(where, "weight", weight);
  check_stride(where, "dlogits", dlogits);
  if (g.x.data != nullptr) {
    check_size(where, "gradients.x.rows()", g.x.rows, tokens);
    check_size(where, "gradients.x.cols()", g.x.cols, d);
    check_stride(where, "gradients.x", g.x);
    check_apart(where, "x", x, "gradients.x", g.x);
    check_apart(where, "weight", weight, "gradients.x", g.x);
    check_apart(where, "dlogits", dlogits, "gradients.x", g.x);
  }
  if (g.weight.data != nullptr) {
    check_size(where, "gradients.weight.rows()", g.weight.rows, experts);
    check_size(where, "gradients.weight.cols()", g.weight.cols, d);
    check_stride(where, "gradients.weight", g.weight);
    check_apart(where, "x", x, "gradients.weight", g.weight);
    check_apart(where, "weight", weight, "gradients.weight", g.weight);
    check_apart(where, "dlogits", dlogits, "gradients.weight", g.weight);
  }
  if (!g.bias.empty())
    check_size(where, "gradients.bias.size()", static_cast<index_t>(g.bias.size()), experts);
}

}  // namespace detail

/// dx = dlogits W, dW = dlogits^T x, db = the sum of dlogits over tokens: the derivative of gate(),
/// logits = x W^T + b.
///
/// Shapes: x [T, d] and W [E, d], not packed, in float, bfloat16 or float16 (or double with
/// double), dlogits [T, E]. Throws: error where the shapes do not fit or a gradient shares memory
/// with what is read. Cost: 2 T E d multiply-adds, no allocation. Determinism: the same bits for
/// every executor and thread count; they may differ in the last bits between ISAs.
template <class T, class W, class F, executor Exec = serial, class A = simd::default_arch>
void gate_backward(const matrix_view<T>& x, const matrix_view<W>& weight,
                   const std::type_identity_t<matrix_view<const F>>& dlogits,
                   const gate_gradients<F>& gradients, const Exec& exec = {}) {
  if (gradients.to == gradient_to::nowhere) return;
  detail::check_gate_gradients("gate_backward", x, weight, dlogits, gradients);
  const bool writes = gradients.to == gradient_to::write;
  const auto start = writes ? simd::sum_start::zero : simd::sum_start::output;
  using XT = std::add_const_t<T>;
  using WT = std::add_const_t<W>;
  if (gradients.x.data != nullptr)
    simd::multiply_rows<A>(dlogits, matrix_view<WT>(weight), gradients.x, start, exec);
  if (gradients.weight.data != nullptr)
    simd::multiply_transposed<A>(dlogits, matrix_view<XT>(x), gradients.weight, start, exec);
  if (gradients.bias.empty()) return;
  if (writes) std::fill(gradients.bias.begin(), gradients.bias.end(), F(0));
  for (index_t t = 0; t < dlogits.rows; ++t)
    for (index_t e = 0; e < dlogits.cols; ++e)
      gradients.bias[static_cast<std::size_t>(e)] += dlogits(t, e);
}

/// The same for a layer's gate: what moe_layer's backward calls. weight is [columns, d] as the
/// caller trains it. A gate of another type brings a function of this name and these arguments.
template <storage G, class GA, class T, class W, executor Exec = serial>
void gate_backward(const linear_gate<G, GA>&, const matrix_view<T>& x, const matrix_view<W>& weight,
                   const matrix_view<const float>& dlogits, const gate_gradients<float>& gradients,
                   workspace&, const Exec& exec = {}) {
  gate_backward<T, W, float, Exec, GA>(x, weight, dlogits, gradients, exec);
}

template <class G, class T, class W, executor Exec = serial>
void gate_backward(const gate_ref<G>& gate, const matrix_view<T>& x, const matrix_view<W>& weight,
                   const matrix_view<const float>& dlogits, const gate_gradients<float>& gradients,
                   workspace& ws, const Exec& exec = {}) {
  gate_backward(gate.get(), x, weight, dlogits, gradients, ws, exec);
}

/// The derivative of a vector's direction: from that of u = v / |v| to that of v, for every row:
/// dv (+)= (du - u (u . du)) / |v|, where |v| is the root of v . v + eps. A row of norm below 1e-12
/// has no gradient.
///
/// Shapes: v, du, dv [n, d]; dv may be du or v. Throws: error where the shapes do not fit, rows run
/// into one another or memory is shared otherwise.
template <class T, class F, executor Exec = serial, class A = simd::default_arch>
void unit_rows_backward(const matrix_view<T>& v,
                        const std::type_identity_t<matrix_view<const F>>& du, gradient_to to,
                        const matrix_view<F>& dv, const Exec& exec = {},
                        std::type_identity_t<F> eps = 0) {
  constexpr const char* where = "unit_rows_backward";
  if (to == gradient_to::nowhere) return;
  check_size(where, "du.rows()", du.rows, v.rows);
  check_size(where, "du.cols()", du.cols, v.cols);
  check_size(where, "dv.rows()", dv.rows, v.rows);
  check_size(where, "dv.cols()", dv.cols, v.cols);
  check_stride(where, "v", v);
  check_stride(where, "du", du);
  check_stride(where, "dv", dv);
  check_apart_or_same(where, "du", du, "dv", dv);
  check_apart_or_same(where, "v", v, "dv", dv);
  exec.parallel_for(v.rows, 16, [&](index_t begin, index_t end) {
    for (index_t r = begin; r < end; ++r) {
      const auto* const from = v.data + r * v.stride;
      const F square = simd::row_dot<A>(from, from, v.cols) + eps;
      const F norm = std::sqrt(square);
      const bool there = norm > F(1e-12);
      const F along =
          there ? simd::row_dot<A>(from, du.data + r * du.stride, v.cols) / square : F(0);
      for (index_t c = 0; c < v.cols; ++c) {
        const F g = there ? (du(r, c) - along * static_cast<F>(from[c])) / norm : F(0);
        dv(r, c) = to == gradient_to::write ? g : dv(r, c) + g;
      }
    }
  });
}

/// The gradients of cosine_gate(): logits = scale cos(x, w_e).
///
/// Shapes: x [T, d], weight [E, d] as the caller trains it (not of norm 1), dlogits [T, E]; bias is
/// unused. dscale is added to where given. Throws: error where the shapes do not fit. Cost: 3 T E d
/// multiply-adds and (T + E) d floats of scratch; no allocation once ws is warm. Determinism: the
/// same bits for every executor and thread count. Source: X-MoE (Chi et al. 2022).
template <class T, class W, class F, executor Exec = serial, class A = simd::default_arch>
void cosine_gate_backward(const matrix_view<T>& x, const matrix_view<W>& weight,
                          std::type_identity_t<F> scale,
                          const std::type_identity_t<matrix_view<const F>>& dlogits,
                          const gate_gradients<F>& gradients, workspace& ws, const Exec& exec = {},
                          std::type_identity_t<F>* dscale = nullptr) {
  constexpr const char* where = "cosine_gate_backward";
  if (gradients.to == gradient_to::nowhere) return;
  check_size(where, "gradients.bias.size()", static_cast<index_t>(gradients.bias.size()), 0);
  detail::check_gate_gradients(where, x, weight, dlogits, gradients);
  const index_t tokens = x.rows, experts = weight.rows, d = x.cols;
  struct memory {
    F *x, *weight, *dx, *dweight;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<F>(tokens * d), tape.take<F>(experts * d), tape.take<F>(tokens * d),
                  tape.take<F>(experts * d)};
  });
  const auto unit = [&](const auto& from, F* to) {
    for (index_t r = 0; r < from.rows; ++r) {
      const auto* const row = from.data + r * from.stride;
      const F norm = std::max(F(std::sqrt(simd::row_dot<A>(row, row, d))), F(1e-12));
      for (index_t c = 0; c < d; ++c) to[r * d + c] = static_cast<F>(row[c]) / norm;
    }
  };
  unit(x, m.x);
  unit(weight, m.weight);
  const matrix_view<const F> ux(m.x, tokens, d), uw(m.weight, experts, d);
  const matrix_view<F> dux(m.dx, tokens, d), duw(m.dweight, experts, d);
  simd::multiply_rows<A>(matrix_view<const F>(dlogits), uw, dux, simd::sum_start::zero, exec);
  simd::multiply_transposed<A>(matrix_view<const F>(dlogits), ux, duw, simd::sum_start::zero, exec);
  // Without the scale so far: dscale is the sum of dlogits cos.
  for (index_t t = 0; dscale != nullptr && t < tokens; ++t)
    *dscale += simd::row_dot<A>(ux.row(t), m.dx + t * d, d);
  for (index_t i = 0; i < tokens * d; ++i) m.dx[i] *= scale;
  for (index_t i = 0; i < experts * d; ++i) m.dweight[i] *= scale;
  if (gradients.x.data != nullptr)
    unit_rows_backward<T, F, Exec, A>(x, dux, gradients.to, gradients.x, exec);
  if (gradients.weight.data != nullptr)
    unit_rows_backward<W, F, Exec, A>(weight, duw, gradients.to, gradients.weight, exec);
}

/// The same for a layer's gate; weight is of any norms, and the gate has no bias.
template <storage G, class GA, class T, class W, executor Exec = serial>
void gate_backward(const scaled_cosine_gate<G, GA>& gate, const matrix_view<T>& x,
                   const matrix_view<W>& weight, const matrix_view<const float>& dlogits,
                   const gate_gradients<float>& gradients, workspace& ws, const Exec& exec = {}) {
  cosine_gate_backward<T, W, float, Exec, GA>(x, weight, 1.0f / gate.temperature(), dlogits,
                                              gradients, ws, exec);
}

/// The gradient of shared_gate(): weights[t] = scale sigmoid(x[t] . w).
///
/// dz[t] = dweights[t] weights[t] (1 - weights[t] / scale), then dx[t] = dz[t] w and dw = the sum
/// of dz[t] x[t]. Shapes: x [T, d], weight [1, d], weights (what shared_gate gave) and dweights
/// [T]. Throws: error where the shapes do not fit or scale is 0 in it. Cost: 2 T d multiply-adds, T
/// floats of scratch. Determinism: the same bits for every executor and thread count.
template <class T, class W, class F, executor Exec = serial, class A = simd::default_arch>
void shared_gate_backward(const matrix_view<T>& x, const matrix_view<W>& weight,
                          std::type_identity_t<F> scale,
                          std::type_identity_t<std::span<const F>> weights,
                          std::type_identity_t<std::span<const F>> dweights,
                          const gate_gradients<F>& gradients, workspace& ws,
                          const Exec& exec = {}) {
  constexpr const char* where = "shared_gate_backward";
  check_size(where, "weight.rows()", weight.rows, 1);
  check_size(where, "weights.size()", static_cast<index_t>(weights.size()), x.rows);
  check_size(where, "dweights.size()", static_cast<index_t>(dweights.size()), x.rows);
  F* const dz = ws.carve([&](scratch& tape) { return tape.take<F>(x.rows); });
  for (index_t t = 0; t < x.rows; ++t) {
    const auto at = static_cast<std::size_t>(t);
    dz[t] = scale == F(0) ? F(0) : dweights[at] * weights[at] * (1 - weights[at] / scale);
  }
  gate_backward<T, W, F, Exec, A>(x, weight, matrix_view<const F>(dz, x.rows, 1), gradients, exec);
}

}  // namespace moeroute
