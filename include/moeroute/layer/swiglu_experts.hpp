// The experts of most published models: down(silu(gate x) * (up x)), weights packed once.
#pragma once

#include <vector>

#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/gemm.hpp>
#include <moeroute/stage/expert.hpp>

namespace moeroute {

/// E SwiGLU feed-forward networks of width ff over hidden states of width d, without biases.
///
/// Shapes: gate and up [ff, d], down [d, ff] as checkpoints store them.
/// Cost: 3 d ff multiply-adds per row; scratch_floats() floats of scratch per worker, no allocation.
/// Determinism: a row's result does not depend on the other rows of its block.
/// Source: Shazeer 2020 (GLU variants).
template <class A = simd::default_arch>
class swiglu_experts {
 public:
  /// Rows that pass through an expert at a time.
  static constexpr index_t tile = 96;

  swiglu_experts(index_t experts, index_t d, index_t ff) : d_(d), ff_(ff) {
    check_range("swiglu_experts", "experts", experts, 1, max_experts);
    gate_up_.assign(static_cast<std::size_t>(experts), simd::packed_matrix<A>(2 * ff, d));
    down_.assign(static_cast<std::size_t>(experts), simd::packed_matrix<A>(d, ff));
  }

  /// Throws: error where e or a shape does not fit.
  void set_gate(expert_id e, matrix_view<const float> w) { part(gate_up_, e).set_rows(0, rows(w, ff_)); }
  void set_up(expert_id e, matrix_view<const float> w) { part(gate_up_, e).set_rows(ff_, rows(w, ff_)); }
  void set_down(expert_id e, matrix_view<const float> w) { part(down_, e).set_rows(0, rows(w, d_)); }

  index_t experts() const { return static_cast<index_t>(down_.size()); }
  index_t d() const { return d_; }
  index_t ff() const { return ff_; }

  index_t scratch_floats() const { return tile * 2 * ff_; }

  template <storage In>
  void operator()(expert_id e, matrix_view<const In> in, matrix_view<float> out,
                  float* memory) const {
    const auto& gate_up = gate_up_[static_cast<std::size_t>(e)];
    const auto& down = down_[static_cast<std::size_t>(e)];
    for (index_t first = 0; first < in.rows; first += tile) {
      const index_t n = std::min(tile, in.rows - first);
      const matrix_view<float> hidden(memory, n, 2 * ff_);
      simd::gemm(in.middle_rows(first, n), gate_up, hidden);
      for (index_t r = 0; r < n; ++r) activate(hidden.row(r));
      simd::gemm(matrix_view<const float>(memory, n, ff_, 2 * ff_), down,
                 out.middle_rows(first, n));
    }
  }

 private:
  // gate[i] = silu(gate[i]) * up[i]
  void activate(float* gate) const {
    const float* up = gate + ff_;
    constexpr int w = simd::width<A>;
    index_t i = 0;
    for (; i + w <= ff_; i += w)
      (simd::silu<A>(simd::load<A>(gate + i)) * simd::load<A>(up + i)).store_unaligned(gate + i);
    if (i < ff_) {
      const auto g = simd::load_first<A>(gate + i, ff_ - i, 0.0f);
      const auto u = simd::load_first<A>(up + i, ff_ - i, 0.0f);
      simd::store_first<A>(gate + i, ff_ - i, simd::silu<A>(g) * u);
    }
  }

  static simd::packed_matrix<A>& part(std::vector<simd::packed_matrix<A>>& list, expert_id e) {
    check_range("swiglu_experts", "expert", e, 0, static_cast<index_t>(list.size()) - 1);
    return list[static_cast<std::size_t>(e)];
  }
  static matrix_view<const float> rows(matrix_view<const float> w, index_t expected) {
    check_size("swiglu_experts", "w.rows()", w.rows, expected);
    return w;
  }

  index_t d_;
  index_t ff_;
  std::vector<simd::packed_matrix<A>> gate_up_;
  std::vector<simd::packed_matrix<A>> down_;
};
static_assert(expert_function_with_scratch<const swiglu_experts<>, float, float>);

}  // namespace moeroute
