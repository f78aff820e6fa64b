// Backward of swiglu_experts: the gradients of their inputs, weights and biases.
#pragma once

#include <algorithm>
#include <span>

#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/simd/rows/row_dot.hpp>
#include <moeroute/simd/rows/row_product.hpp>
#include <moeroute/stage/expert_backward.hpp>

namespace moeroute {

/// The matrices of all experts as they are trained: gate and up [E ff, d], down [E d, ff], those of
/// an expert side by side; gate has no rows for relu_squared.
template <class T>
struct swiglu_matrices {
  matrix_view<T> gate{}, up{}, down{};
};

/// Gradients of biases, [E ff], [E ff] and [E d]; empty ones are not wanted.
struct swiglu_bias_gradients {
  std::span<float> gate{}, up{}, down{};
};

/// An expert_gradient_with_scratch: din = the gradient of an expert's input, and gradients of its
/// weights that are added to.
///
/// With h = act(g) (u + offset), g = W1 x, u = W3 x, y = W2 h: dW2 += dy^T h, dh = dy W2, du = dh
/// act(g), dg = dh (u + offset) act'(g), dx = dg W1 + du W3, dW1 += dg^T x, dW3 += du^T x. Where a
/// limit holds g or u, its gradient is 0. g and u are those that the forward pass kept
/// (layer_tape::keep_activations), or they are computed again of its input: the same bits. W is the
/// type that the weights are trained in: float, bfloat16 or float16. `experts` holds them packed
/// and, like the views, outlives this. Cost: 6 d ff multiply-adds per row (4 without a gate), 2 d
/// ff (d ff) more where nothing was kept, scratch_floats() floats of scratch per worker, no
/// allocation. Determinism: the same bits for every executor and thread count. Source: Shazeer 2020
/// (GLU variants).
template <storage W = float, class A = simd::default_arch>
class swiglu_backward {
 public:
  /// Rows that pass through an expert at a time.
  static constexpr index_t tile = 192;

  /// Throws: error where the shapes do not fit the experts.
  swiglu_backward(const swiglu_experts<A>& experts, const swiglu_matrices<const W>& weights,
                  const swiglu_matrices<float>& gradients, const swiglu_bias_gradients& biases = {})
      : experts_(&experts), weights_(weights), gradients_(gradients), biases_(biases) {
    const index_t all = experts.experts(), up = all * ff(), down = all * d();
    const auto fits = [&](const auto& m, const char* rows_name, index_t rows, const char* cols_name,
                          index_t cols) {
      check_size("swiglu_backward", rows_name, m.rows, rows);
      if (rows > 0) check_size("swiglu_backward", cols_name, m.cols, cols);
    };
    fits(weights.gate, "weights.gate.rows()", gated() ? up : 0, "weights.gate.cols()", d());
    fits(weights.up, "weights.up.rows()", up, "weights.up.cols()", d());
    fits(weights.down, "weights.down.rows()", down, "weights.down.cols()", ff());
    fits(gradients.gate, "gradients.gate.rows()", gated() ? up : 0, "gradients.gate.cols()", d());
    fits(gradients.up, "gradients.up.rows()", up, "gradients.up.cols()", d());
    fits(gradients.down, "gradients.down.rows()", down, "gradients.down.cols()", ff());
    for (const auto* gradient : {&gradients.gate, &gradients.up, &gradients.down}) {
      check_apart("swiglu_backward", "weights.gate", weights.gate, "a gradient", *gradient);
      check_apart("swiglu_backward", "weights.up", weights.up, "a gradient", *gradient);
      check_apart("swiglu_backward", "weights.down", weights.down, "a gradient", *gradient);
    }
    const auto sized = [&](std::span<float> list, const char* name, index_t n) {
      if (!list.empty()) check_size("swiglu_backward", name, static_cast<index_t>(list.size()), n);
    };
    sized(biases.gate, "biases.gate.size()", gated() ? up : 0);
    sized(biases.up, "biases.up.size()", up);
    sized(biases.down, "biases.down.size()", down);
  }

  index_t scratch_floats() const { return tile * (hidden() + 2 * ff()); }
  index_t kept_floats() const { return hidden(); }

  void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dout,
                  matrix_view<float> din, float* memory) const {
    (*this)(e, in, dout, din, {}, memory);
  }

  /// With what the forward pass kept, [n, kept_floats()], or no rows.
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dout,
                  matrix_view<float> din, matrix_view<const float> kept, float* memory) const {
    using enum simd::sum_start;
    using rows = matrix_view<const float>;
    check_range("swiglu_backward", "expert", e, 0, experts_->experts() - 1);
    check_size("swiglu_backward", "in.cols", in.cols, d());
    check_size("swiglu_backward", "dout.rows", dout.rows, in.rows);
    check_size("swiglu_backward", "dout.cols", dout.cols, d());
    check_size("swiglu_backward", "din.rows", din.rows, in.rows);
    check_size("swiglu_backward", "din.cols", din.cols, d());
    if (kept.data != nullptr) {
      check_size("swiglu_backward", "kept.rows", kept.rows, in.rows);
      check_size("swiglu_backward", "kept.cols", kept.cols, hidden());
    }
    const index_t n_ff = ff(), h = hidden(), first_ff = e * n_ff, first_d = e * d();
    for (index_t first = 0; first < in.rows; first += tile) {
      const index_t n = std::min(tile, in.rows - first);
      const matrix_view<float> between(memory, n, h), act(memory + tile * h, n, n_ff),
          dact(memory + tile * (h + n_ff), n, n_ff);
      const rows x = in.middle_rows(first, n), dy = dout.middle_rows(first, n);
      const matrix_view<float> dx = din.middle_rows(first, n);
      if (kept.data == nullptr) experts_->activation_input(e, x, between);
      const rows input = kept.data == nullptr ? rows(between) : kept.middle_rows(first, n);
      simd::multiply_rows<A>(dy, weights_.down.middle_rows(first_d, d()), dact, zero);
      for (index_t r = 0; r < n; ++r) pull(input.row(r), dact.row(r), between.row(r), act.row(r));
      simd::multiply_transposed<A>(dy, rows(act), gradients_.down.middle_rows(first_d, d()),
                                   output);
      const rows dup(gated() ? memory + n_ff : memory, n, n_ff, h);
      simd::multiply_rows<A>(dup, weights_.up.middle_rows(first_ff, n_ff), dx, zero);
      simd::multiply_transposed<A>(dup, x, gradients_.up.middle_rows(first_ff, n_ff), output);
      sum_rows(dup, biases_.up, first_ff);
      sum_rows(dy, biases_.down, first_d);
      if (!gated()) continue;
      const rows dgate(memory, n, n_ff, h);
      simd::multiply_rows<A>(dgate, weights_.gate.middle_rows(first_ff, n_ff), dx, output);
      simd::multiply_transposed<A>(dgate, x, gradients_.gate.middle_rows(first_ff, n_ff), output);
      sum_rows(dgate, biases_.gate, first_ff);
    }
  }

 private:
  index_t d() const { return experts_->d(); }
  index_t ff() const { return experts_->ff(); }
  bool gated() const { return experts_->options().activation == expert_activation::silu_gated; }
  index_t hidden() const { return gated() ? 2 * ff() : ff(); }

  // row = [dg | du] of [g | u], which it may replace; act receives what the second product read.
  void pull(const float* input, const float* dact, float* row, float* act) const {
    using F = simd::vfloat<A>;
    const swiglu_options& o = experts_->options();
    const bool bounded = o.limit > 0.0f;
    const F zero(0.0f), one(1.0f), limit(o.limit), alpha(o.alpha), offset(o.up_offset);
    float* const up_row = gated() ? row + ff() : row;
    const float* const up = gated() ? input + ff() : input;
    constexpr int w = simd::width<A>;
    for (index_t i = 0; i < ff(); i += w) {
      const index_t n = std::min<index_t>(w, ff() - i);
      const F dh = simd::load_first<A>(dact + i, n, 0.0f);
      F u = simd::load_first<A>(up + i, n, 0.0f);
      const auto held_up = bounded ? (u > limit) | (gated() ? u < -limit : u < u) : u != u;
      if (bounded) u = simd::select<A>(u > limit, limit, u);
      if (!gated()) {
        const F positive = simd::select<A>(u < zero, zero, u);
        simd::store_first<A>(act + i, n, positive * positive);
        simd::store_first<A>(row + i, n,
                             simd::select<A>(held_up & (u == u), zero, dh * (positive + positive)));
        continue;
      }
      if (bounded) u = simd::select<A>(u < -limit, -limit, u);
      F g = simd::load_first<A>(input + i, n, 0.0f);
      const auto held_gate = bounded ? g > limit : g != g;
      if (bounded) g = simd::select<A>(held_gate, limit, g);
      const F s = simd::sigmoid<A>(alpha * g), swish = g * s, open = u + offset;
      const F slope = s + alpha * swish * (one - s);
      simd::store_first<A>(act + i, n, swish * open);
      // What is NaN stays NaN.
      simd::store_first<A>(row + i, n,
                           simd::select<A>(held_gate & (g == g), zero, dh * open * slope));
      simd::store_first<A>(up_row + i, n, simd::select<A>(held_up & (u == u), zero, dh * swish));
    }
  }

  // Adds the sum of the rows to the bias of an expert.
  static void sum_rows(const matrix_view<const float>& rows, std::span<float> bias, index_t first) {
    if (bias.empty()) return;
    for (index_t r = 0; r < rows.rows; ++r)
      simd::add_scaled_row<A>(rows.data + r * rows.stride, 1.0f, rows.cols, bias.data() + first);
  }

  const swiglu_experts<A>* experts_;
  swiglu_matrices<const W> weights_;
  swiglu_matrices<float> gradients_;
  swiglu_bias_gradients biases_;
};
static_assert(expert_gradient_with_scratch<const swiglu_backward<>, float, float, float>);

}  // namespace moeroute
