// Gates that see directions only: cosine, and cosine in a space of few dimensions.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include <moeroute/stage/gate.hpp>

namespace moeroute {

namespace detail {

template <storage W, class A>
simd::packed_matrix<W, A> packed_unit_rows(const matrix_view<const float>& weight) {
  simd::packed_matrix<W, A> packed(weight.rows, weight.cols);
  check_stride("scaled_cosine_gate", "weight", weight);
  buffer<float> row(weight.cols);
  for (index_t e = 0; e < weight.rows; ++e) {
    const float norm = std::max(simd::row_norm<A>(weight.row(e), weight.cols), 1e-12f);
    for (index_t c = 0; c < weight.cols; ++c) row[c] = weight(e, c) / norm;
    packed.set_rows(e, matrix_view<const float>(row.data(), 1, weight.cols));
  }
  return packed;
}

}  // namespace detail

/// logits = cos(x, w_e) / temperature, as a gate of its own: cosine_gate() with the weights that it
/// needs.
///
/// Shapes: weight [E, d], of any norms. Throws: error where the temperature is not above 0. Cost: T
/// (E + 2) d multiply-adds, no allocation. Determinism: a token's logits do not depend on other
/// tokens or on threads. Source: X-MoE (Chi et al. 2022).
template <storage W = float, class A = simd::default_arch>
class scaled_cosine_gate {
 public:
  scaled_cosine_gate(matrix_view<const float> weight, float temperature)
      : unit_(detail::packed_unit_rows<W, A>(weight)), temperature_(temperature) {
    if (!(temperature > 0.0f) || !std::isfinite(temperature))
      fail_value("scaled_cosine_gate", "temperature", temperature, "a number above 0");
  }

  index_t columns() const { return unit_.rows(); }
  index_t d() const { return unit_.cols(); }
  float temperature() const { return temperature_; }
  /// The weights after a step of training, [E, d] of any norms. Throws: error where the shape
  /// differs.
  void set_weight(matrix_view<const float> weight) {
    check_size("scaled_cosine_gate", "weight.rows()", weight.rows, columns());
    check_size("scaled_cosine_gate", "weight.cols()", weight.cols, d());
    unit_ = detail::packed_unit_rows<W, A>(weight);
  }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x, const matrix_view<float>& logits, const Exec& exec = {}) const {
    cosine_gate<X, const matrix_view<float>&, Exec, W, A>(x, unit_, 1.0f / temperature_, logits,
                                                          exec);
  }

 private:
  simd::packed_matrix<W, A> unit_;
  float temperature_;
};

/// logits = cos(P x, w_e) / temperature: experts are told apart in a space of r dimensions, much
/// less than d.
///
/// Shapes: projection [r, d], weight [E, r] of any norms. Cost: T (d + E + 2) r multiply-adds and T
/// r floats of scratch. Determinism: as scaled_cosine_gate. Source: X-MoE (Chi et al. 2022).
template <storage W = float, class A = simd::default_arch>
class low_rank_cosine_gate {
 public:
  /// Throws: error where the widths differ or the temperature is not above 0.
  low_rank_cosine_gate(simd::packed_matrix<W, A> projection, matrix_view<const float> weight,
                       float temperature)
      : projection_(std::move(projection)), cosine_(weight, temperature) {
    check_size("low_rank_cosine_gate", "weight.cols()", weight.cols, projection_.rows());
  }

  index_t columns() const { return cosine_.columns(); }
  index_t d() const { return projection_.cols(); }
  index_t rank() const { return projection_.rows(); }
  index_t scratch_floats(index_t tokens) const { return tokens * rank(); }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x_rows, const matrix_view<float>& logits, float* memory,
                  const Exec& exec = {}) const {
    const auto x = const_view(x_rows);
    const matrix_view<float> low(memory, x.rows, rank());
    simd::gemm(x, projection_, low, exec);
    cosine_(low, logits, exec);
  }

 private:
  simd::packed_matrix<W, A> projection_;
  scaled_cosine_gate<float, A> cosine_;
};

}  // namespace moeroute
