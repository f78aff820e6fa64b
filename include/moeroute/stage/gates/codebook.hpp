// A gate of prototypes: the nearest code decides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <moeroute/stage/gate.hpp>

namespace moeroute {

/// Tokens go where their nearest code is: code c belongs to expert c mod E, and an expert's logit
/// is the largest of x . c - |c|^2 / 2 over its codes, which is the larger the nearer the code.
/// With one code per expert: online k-means (Routing Transformer), distribution centres.
///
/// Shapes: codes [C, d], C >= E. Throws: error where C < E. Cost: T C d multiply-adds and T C
/// floats of scratch. Determinism: a token's logits do not depend on other tokens or on threads.
/// Source: VQMoE (Do et al. 2024), which uses 512 codes.
template <class A = simd::default_arch>
class codebook_gate {
 public:
  codebook_gate(matrix_view<const float> codes, index_t experts)
      : experts_(experts),
        packed_(codes.rows, codes.cols),
        code_(codes.rows * codes.cols),
        sum_(codes.rows * codes.cols),
        count_(codes.rows),
        taken_(codes.rows) {
    check_range("codebook_gate", "experts", experts, 1, codes.rows);
    check_stride("codebook_gate", "codes", codes);
    for (index_t c = 0; c < codes.rows; ++c) {
      std::copy_n(codes.row(c), d(), code_.data() + c * d());
      std::copy_n(codes.row(c), d(), sum_.data() + c * d());
      count_[c] = 1.0f;
      pack(c);
    }
  }

  index_t columns() const { return experts_; }
  index_t d() const { return packed_.cols(); }
  index_t codes() const { return packed_.rows(); }
  matrix_view<const float> code_rows() const { return {code_.data(), codes(), d()}; }
  expert_id expert_of(index_t code) const { return static_cast<expert_id>(code % experts_); }
  index_t scratch_floats(index_t tokens) const { return tokens * codes(); }

  template <readable_rows X, executor Exec = serial>
  void operator()(const X& x_rows, const matrix_view<float>& logits, float* memory,
                  const Exec& exec = {}) const {
    const auto x = const_view(x_rows);
    score(x, memory, exec);
    exec.parallel_for(x.rows, 64, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        const float* const z = memory + t * codes();
        float* const out = logits.row(t);
        std::copy_n(z, experts_, out);
        // Codes of one expert are E apart: whole rows of E are compared.
        for (index_t first = experts_; first < codes(); first += experts_) {
          const index_t n = std::min(experts_, codes() - first);
          for (index_t e = 0; e < n; ++e) out[e] = std::max(out[e], z[first + e]);
        }
      }
    });
  }

  /// The nearest code of every token, the lower one among equals. Shapes: x [T, d], code [T].
  /// Throws: error where they do not fit. Cost: as a call; no allocation once ws is warm.
  template <readable_rows X, executor Exec = serial>
  void nearest(const X& x_rows, std::span<std::int32_t> code, workspace& ws,
               const Exec& exec = {}) const {
    const auto x = const_view(x_rows);
    check_size("codebook_gate", "x.cols()", x.cols, d());
    check_size("codebook_gate", "code.size()", static_cast<index_t>(code.size()), x.rows);
    float* const memory =
        ws.carve([&](scratch& tape) { return tape.take<float>(scratch_floats(x.rows)); });
    score(x, memory, exec);
    for (index_t t = 0; t < x.rows; ++t) {
      const float* const z = memory + t * codes();
      const index_t c = simd::first_column<A>(z, codes(), simd::row_max<A>(z, codes()));
      code[static_cast<std::size_t>(t)] =
          static_cast<std::int32_t>(c < codes() ? c : 0);  // a row of NaN has none
    }
  }

  /// Moves every code towards the mean of the tokens that it is nearest to:
  /// n_c = decay n_c + (1 - decay) count, m_c = decay m_c + (1 - decay) sum, code = m_c / n_c, from
  /// n_c = 1 and m_c = the first code. A code that no token takes keeps n_c and m_c, and stays
  /// where it is.
  ///
  /// Shapes: x [T, d], code [T], as nearest() gave. Throws: error where they do not fit, a code is
  /// none, or the decay is not in [0, 1). Cost: T d and, for each code in use, d; no allocation.
  /// Source: VQ-VAE (van den Oord et al. 2017).
  template <readable_rows X>
  void update(const X& x_rows, std::span<const std::int32_t> code, float decay) {
    const auto x = const_view(x_rows);
    check_size("codebook_gate", "x.cols()", x.cols, d());
    check_size("codebook_gate", "code.size()", static_cast<index_t>(code.size()), x.rows);
    if (!(decay >= 0.0f && decay < 1.0f))
      fail_value("codebook_gate", "decay", decay, "a number from 0 to below 1");
    for (const std::int32_t c : code) check_range("codebook_gate", "code", c, 0, codes() - 1);
    std::fill_n(taken_.data(), codes(), 0.0f);
    for (const std::int32_t c : code) taken_[c] += 1.0f;
    for (index_t c = 0; c < codes(); ++c) {
      if (taken_[c] == 0.0f) continue;
      count_[c] = decay * count_[c] + (1.0f - decay) * taken_[c];
      for (index_t i = 0; i < d(); ++i) sum_[c * d() + i] *= decay;
    }
    for (index_t t = 0; t < x.rows; ++t) {
      float* const sum = sum_.data() + code[static_cast<std::size_t>(t)] * d();
      for (index_t i = 0; i < d(); ++i) sum[i] += (1.0f - decay) * static_cast<float>(x.row(t)[i]);
    }
    for (index_t c = 0; c < codes(); ++c) {
      if (taken_[c] == 0.0f) continue;
      for (index_t i = 0; i < d(); ++i) code_[c * d() + i] = sum_[c * d() + i] / count_[c];
      pack(c);
    }
  }

 private:
  template <class T, class Exec>
  void score(const matrix_view<const T>& x, float* memory, const Exec& exec) const {
    simd::gemm(x, packed_, matrix_view<float>(memory, x.rows, codes()), exec);
  }
  void pack(index_t c) {
    const float* const row = code_.data() + c * d();
    packed_.set_rows(c, matrix_view<const float>(row, 1, d()));
    const float norm = simd::row_norm<A>(row, d());
    packed_.bias(c) = -0.5f * norm * norm;
  }

  index_t experts_;
  simd::packed_matrix<float, A> packed_;
  buffer<float> code_, sum_, count_, taken_;
};

}  // namespace moeroute
