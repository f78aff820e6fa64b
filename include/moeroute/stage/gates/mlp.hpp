// A gate with a hidden layer.
#pragma once

#include <utility>

#include <moeroute/policy/parts/gate_spec.hpp>
#include <moeroute/stage/gate.hpp>

namespace moeroute {

/// logits = W2 f(W1 x + b1) + b2.
///
/// Shapes: first [h, d] and second [E, h], packed with their biases. Throws: error where the
/// second's width is not the first's height. Cost: T (d + E) h multiply-adds and T h floats of
/// scratch. Determinism: a token's logits do not depend on other tokens or on threads.
template <storage W = float, class A = simd::default_arch>
class mlp_gate {
 public:
  mlp_gate(simd::packed_matrix<W, A> first, simd::packed_matrix<W, A> second,
           gate_activation activation = gate_activation::relu)
      : first_(std::move(first)), second_(std::move(second)), activation_(activation) {
    check_size("mlp_gate", "second.cols()", second_.cols(), first_.rows());
  }

  index_t columns() const { return second_.rows(); }
  index_t d() const { return first_.cols(); }
  index_t hidden() const { return first_.rows(); }
  index_t scratch_floats(index_t tokens) const { return tokens * hidden(); }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x_rows, const matrix_view<float>& logits, float* memory,
                  const Exec& exec = {}) const {
    using F = simd::vfloat<A>;
    const auto x = const_view(x_rows);
    const matrix_view<float> h(memory, x.rows, hidden());
    simd::gemm(x, first_, h, exec);
    exec.parallel_for(x.rows, 16, [&](index_t begin, index_t end) {
      float* const from = memory + begin * hidden();
      const index_t n = (end - begin) * hidden();
      if (activation_ == gate_activation::relu)
        simd::map_row<A>(from, n, from,
                         [](F v) { return simd::select<A>(v > F(0.0f), v, F(0.0f)); });
      else if (activation_ == gate_activation::tanh)
        simd::map_row<A>(from, n, from, [](F v) { return simd::tanh<A>(v); });
      else
        simd::map_row<A>(from, n, from, [](F v) { return simd::silu<A>(v); });
    });
    simd::gemm(h, second_, logits, exec);
  }

 private:
  simd::packed_matrix<W, A> first_, second_;
  gate_activation activation_;
};

}  // namespace moeroute
