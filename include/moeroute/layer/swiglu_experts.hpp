// The experts of most published models: down(silu(gate x) * (up x)), weights packed once.
#pragma once

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/rows/gemm.hpp>
#include <moeroute/stage/expert.hpp>

namespace moeroute {

/// What is between the two products of an expert.
enum class expert_activation {
  silu_gated,    ///< silu(gate) * up
  relu_squared,  ///< relu(up)^2: no gate (Nemotron-H)
};

/// How a checkpoint fuses gate and up into one matrix [2 ff, d].
enum class gate_up_layout {
  gate_then_up,  ///< all of gate, then all of up
  interleaved,   ///< gate and up in turns (GPT-OSS)
};

/// What published experts add to SwiGLU.
struct swiglu_options {
  expert_activation activation = expert_activation::silu_gated;
  /// Where positive, gate is at most this, up within plus and minus this (GPT-OSS: 7).
  float limit = 0.0f;
  float alpha = 1.0f;      ///< silu(gate) = gate * sigmoid(alpha * gate) (GPT-OSS: 1.702)
  float up_offset = 0.0f;  ///< added to up behind the limit (GPT-OSS: 1)
};

/// E SwiGLU feed-forward networks of width ff over hidden states of width d, with or without
/// biases.
///
/// Shapes: gate and up [ff, d], down [d, ff] as checkpoints store them, or gate and up as one.
/// Cost: 3 d ff multiply-adds per row, 2 d ff without a gate; scratch_floats() floats of scratch
/// per worker, no allocation. Determinism: a row's result does not depend on the other rows of its
/// block. Source: Shazeer 2020 (GLU variants).
template <class A = simd::default_arch>
class swiglu_experts {
 public:
  /// Rows that pass through an expert at a time.
  static constexpr index_t tile = 192;

  /// Throws: error where experts is outside [1, 2^20], a size is negative, or an option is negative
  /// or not finite.
  swiglu_experts(index_t experts, index_t d, index_t ff, const swiglu_options& options = {})
      : d_(d), ff_(ff), options_(options) {
    check_range("swiglu_experts", "experts", experts, 1, max_experts);
    check_range("swiglu_experts", "d", d, 0, index_t{1} << 40);
    check_range("swiglu_experts", "ff", ff, 0, index_t{1} << 40);
    if (!(options.limit >= 0.0f && std::isfinite(options.limit)))
      fail_value("swiglu_experts", "limit", options.limit, ">= 0");
    if (!std::isfinite(options.alpha) || !std::isfinite(options.up_offset))
      fail("swiglu_experts", "alpha or up_offset is not a finite number");
    gate_up_.assign(static_cast<std::size_t>(experts), simd::packed_matrix<float, A>(hidden(), d));
    down_.assign(static_cast<std::size_t>(experts), simd::packed_matrix<float, A>(d, ff));
  }

  /// Throws: error where e or a shape does not fit.
  void set_gate(expert_id e, matrix_view<const float> w) {
    check_gated();
    part(gate_up_, e).set_rows(0, rows(w, ff_));
  }
  void set_up(expert_id e, matrix_view<const float> w) {
    part(gate_up_, e).set_rows(up_row(), rows(w, ff_));
  }
  /// Both from one matrix [2 ff, d].
  void set_gate_up(expert_id e, matrix_view<const float> w, gate_up_layout layout) {
    check_gated();
    rows(w, 2 * ff_);
    if (layout == gate_up_layout::gate_then_up) {
      part(gate_up_, e).set_rows(0, w);
    } else {
      for (index_t r = 0; r < 2 * ff_; ++r)
        part(gate_up_, e).set_rows(r / 2 + (r % 2) * ff_, w.middle_rows(r, 1));
    }
  }
  /// Those of all experts from one tensor [E, 2 ff, d], seen as [E * 2 ff, d].
  void set_all_gate_up(matrix_view<const float> w, gate_up_layout layout) {
    rows(w, experts() * 2 * ff_);
    for (index_t e = 0; e < experts(); ++e)
      set_gate_up(static_cast<expert_id>(e), w.middle_rows(e * 2 * ff_, 2 * ff_), layout);
  }
  /// Those of all experts from one tensor [E, d, ff], seen as [E * d, ff].
  void set_all_down(matrix_view<const float> w) {
    rows(w, experts() * d_);
    for (index_t e = 0; e < experts(); ++e)
      set_down(static_cast<expert_id>(e), w.middle_rows(e * d_, d_));
  }
  /// Biases of gate and up, [ff] each, and of down, [d].
  void set_gate_bias(expert_id e, std::span<const float> b) {
    check_gated();
    set_bias(part(gate_up_, e), 0, b, ff_);
  }
  void set_up_bias(expert_id e, std::span<const float> b) {
    set_bias(part(gate_up_, e), up_row(), b, ff_);
  }
  void set_down_bias(expert_id e, std::span<const float> b) { set_bias(part(down_, e), 0, b, d_); }
  void set_down(expert_id e, matrix_view<const float> w) {
    part(down_, e).set_rows(0, rows(w, d_));
  }

  index_t experts() const { return static_cast<index_t>(down_.size()); }
  index_t d() const { return d_; }
  index_t ff() const { return ff_; }
  const swiglu_options& options() const { return options_; }

  /// What the activation reads of expert e: [gate | up], [n, 2 ff], or [n, ff] without a gate.
  template <storage In>
  void activation_input(expert_id e, matrix_view<const In> in, matrix_view<float> out) const {
    simd::gemm(in, part(gate_up_, e), out);
  }

  index_t scratch_floats() const { return tile * hidden(); }

  template <storage In>
  void operator()(expert_id e, matrix_view<const In> in, matrix_view<float> out,
                  float* memory) const {
    (*this)(e, in, out, matrix_view<float>{}, memory);
  }

  /// Floats of a row of `kept`: what the way back reads of a row instead of computing it again.
  index_t kept_floats() const { return hidden(); }

  /// The same, and kept [n, kept_floats()] receives activation_input(); without rows nothing is.
  template <storage In>
  void operator()(expert_id e, matrix_view<const In> in, matrix_view<float> out,
                  matrix_view<float> kept, float* memory) const {
    const auto& gate_up = part(gate_up_, e);
    const auto& down = part(down_, e);
    check_size("swiglu_experts", "out.rows", out.rows, in.rows);
    if (kept.data != nullptr) {
      check_size("swiglu_experts", "kept.rows", kept.rows, in.rows);
      check_size("swiglu_experts", "kept.cols", kept.cols, hidden());
    }
    for (index_t first = 0; first < in.rows; first += tile) {
      const index_t n = std::min(tile, in.rows - first);
      const matrix_view<float> act(memory, n, hidden());
      const matrix_view<float> between = kept.data == nullptr ? act : kept.middle_rows(first, n);
      simd::gemm(in.middle_rows(first, n), gate_up, between);
      for (index_t r = 0; r < n; ++r) activate(between.row(r), act.row(r));
      simd::gemm(matrix_view<const float>(memory, n, ff_, hidden()), down,
                 out.middle_rows(first, n));
    }
  }

 private:
  bool gated() const { return options_.activation == expert_activation::silu_gated; }
  // Columns between the two products.
  index_t hidden() const { return gated() ? 2 * ff_ : ff_; }
  index_t up_row() const { return gated() ? ff_ : 0; }

  // ff values that the second product reads, of a row of activation_input(), which they may
  // replace.
  void activate(const float* row, float* act) const {
    const bool bounded = options_.limit > 0.0f, plain = options_.alpha == 1.0f;
    using F = simd::vfloat<A>;
    const F limit(options_.limit), alpha(options_.alpha), offset(options_.up_offset);
    if (!gated()) {
      each(row, row, act, [&](F up, F) {
        if (bounded) up = at_most(up, limit);
        const F positive = simd::select<A>(up < F(0.0f), F(0.0f), up);
        return positive * positive;
      });
      return;
    }
    each(row, row + ff_, act, [&](F gate, F up) {
      if (bounded) {
        gate = at_most(gate, limit);
        up = simd::select<A>(up < -limit, -limit, at_most(up, limit));
      }
      const F swish = plain ? simd::silu<A>(gate) : gate * simd::sigmoid<A>(alpha * gate);
      return swish * (up + offset);
    });
  }

  // The lesser of both; NaN stays NaN.
  static simd::vfloat<A> at_most(simd::vfloat<A> x, simd::vfloat<A> limit) {
    return simd::select<A>(x > limit, limit, x);
  }

  // to[i] = f(first[i], second[i]) for i < ff
  template <class F>
  void each(const float* first, const float* second, float* to, F&& f) const {
    constexpr int w = simd::width<A>;
    index_t i = 0;
    for (; i + w <= ff_; i += w)
      f(simd::load<A>(first + i), simd::load<A>(second + i)).store_unaligned(to + i);
    if (i < ff_) {
      const auto a = simd::load_first<A>(first + i, ff_ - i, 0.0f);
      const auto b = simd::load_first<A>(second + i, ff_ - i, 0.0f);
      simd::store_first<A>(to + i, ff_ - i, f(a, b));
    }
  }

  void check_gated() const {
    if (!gated()) fail("swiglu_experts", "these experts have no gate: relu_squared");
  }
  static void set_bias(simd::packed_matrix<float, A>& m, index_t first, std::span<const float> b,
                       index_t n) {
    check_size("swiglu_experts", "bias.size()", static_cast<index_t>(b.size()), n);
    for (index_t r = 0; r < n; ++r) m.bias(first + r) = b[static_cast<std::size_t>(r)];
  }
  // One of std::vector<packed_matrix>, which may be const.
  template <class List>
  static auto& part(List& list, expert_id e) {
    check_range("swiglu_experts", "expert", e, 0, static_cast<index_t>(list.size()) - 1);
    return list[static_cast<std::size_t>(e)];
  }
  static matrix_view<const float> rows(matrix_view<const float> w, index_t expected) {
    check_size("swiglu_experts", "w.rows()", w.rows, expected);
    return w;
  }

  index_t d_;
  index_t ff_;
  swiglu_options options_;
  std::vector<simd::packed_matrix<float, A>> gate_up_;
  std::vector<simd::packed_matrix<float, A>> down_;
};
static_assert(expert_function_with_scratch<const swiglu_experts<>, float, float>);

}  // namespace moeroute
