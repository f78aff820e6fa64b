// A gate that reads its input normalised.
#pragma once

#include <cmath>
#include <span>

#include <moeroute/stage/gate.hpp>

namespace moeroute {

/// What rms_gate does to a row before its product.
struct rms_input {
  std::span<const float> gamma{};  ///< [d], empty: ones
  float scale = 1.0f;
  float eps = 1e-6f;
};

/// logits = (scale gamma x / sqrt(mean(x^2) + eps)) W^T + b: the gate of models whose router has a
/// norm of its own. gamma and the scale go into the weights once, the root into the logits, so x is
/// read as it is and nothing is written beside the logits.
///
/// Shapes: weight [E, d], bias [E] or empty, gamma [d] or empty. Throws: error where they do not
/// fit or eps is below 0. Cost: T (E + 1) d multiply-adds, no allocation. Determinism: a token's
/// logits do not depend on other tokens or on threads. Source: Gemma 4 (scale = 1 / sqrt(d)).
template <class A = simd::default_arch>
class rms_gate {
 public:
  rms_gate(matrix_view<const float> weight, const rms_input& input = {},
           std::span<const float> bias = {})
      : weight_(weight.rows, weight.cols), bias_(weight.rows), eps_(input.eps) {
    check_stride("rms_gate", "weight", weight);
    if (!input.gamma.empty())
      check_size("rms_gate", "gamma.size()", static_cast<index_t>(input.gamma.size()), d());
    if (!bias.empty())
      check_size("rms_gate", "bias.size()", static_cast<index_t>(bias.size()), columns());
    if (!(eps_ >= 0.0f) || !std::isfinite(eps_))
      fail_value("rms_gate", "eps", eps_, "a number of 0 or more");
    if (!std::isfinite(input.scale))
      fail_value("rms_gate", "scale", input.scale, "a finite number");
    buffer<float> row(d());
    for (index_t e = 0; e < columns(); ++e) {
      for (index_t c = 0; c < d(); ++c) {
        const float gamma = input.gamma.empty() ? 1.0f : input.gamma[static_cast<std::size_t>(c)];
        row[c] = weight(e, c) * (gamma * input.scale);
      }
      weight_.set_rows(e, matrix_view<const float>(row.data(), 1, d()));
      bias_[e] = bias.empty() ? 0.0f : bias[static_cast<std::size_t>(e)];
    }
  }

  index_t columns() const { return weight_.rows(); }
  index_t d() const { return weight_.cols(); }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x_rows, const matrix_view<float>& logits, const Exec& exec = {}) const {
    const auto x = const_view(x_rows);
    simd::gemm(x, weight_, logits, exec);
    const float width = static_cast<float>(d());
    exec.parallel_for(x.rows, 64, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        const float norm = simd::row_norm<A>(x.row(t), x.cols);
        const float root = std::sqrt(norm * norm / width + eps_);
        const float factor = root > 0.0f ? 1.0f / root : 0.0f;
        float* const z = logits.row(t);
        for (index_t e = 0; e < columns(); ++e) z[e] = z[e] * factor + bias_[e];
      }
    });
  }

 private:
  simd::packed_matrix<float, A> weight_;
  buffer<float> bias_;
  float eps_;
};

}  // namespace moeroute
