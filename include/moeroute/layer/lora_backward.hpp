// Backward of lora_experts: the gradients of their inputs and of both factors.
#pragma once

#include <algorithm>

#include <moeroute/layer/lora_experts.hpp>
#include <moeroute/simd/rows/row_product.hpp>
#include <moeroute/stage/expert_backward.hpp>

namespace moeroute {

/// The factors of all adapters as they are trained: A [E r, d] and B [E d_out, r], those of an
/// expert side by side.
template <class T>
struct lora_matrices {
  matrix_view<T> a{}, b{};
};

/// An expert_gradient_with_scratch: din = the gradient of an adapter's input, and gradients of A
/// and B that are added to.
///
/// With s = alpha / r, l = A x and y = s B l: dB += s dy^T l, dl = s dy B, dA += dl^T x, dx = dl A.
/// Ranks that a mask drops have no gradient; which they are is a constant. A x is computed again.
/// Where y was added to a base product, dy is the base's as well. `experts` holds the factors
/// packed and, like the views, outlives this. Cost: r (3 d + 2 d_out) multiply-adds per row, no
/// allocation. Determinism: the same bits for every executor and thread count. Source: Hu et al.
/// 2021.
template <class A = simd::default_arch>
class lora_backward {
 public:
  static constexpr index_t tile = 192;

  /// Throws: error where the shapes do not fit the experts.
  lora_backward(const lora_experts<A>& experts, const lora_matrices<const float>& factors,
                const lora_matrices<float>& gradients)
      : experts_(&experts), factors_(factors), gradients_(gradients) {
    constexpr const char* where = "lora_backward";
    const index_t n = experts.experts();
    const auto fits = [&](const auto& of, const char* a_rows, const char* a_cols,
                          const char* b_rows, const char* b_cols) {
      check_size(where, a_rows, of.a.rows, n * experts.rank());
      check_size(where, a_cols, of.a.cols, experts.d());
      check_size(where, b_rows, of.b.rows, n * experts.d_out());
      check_size(where, b_cols, of.b.cols, experts.rank());
    };
    fits(factors, "factors.a.rows()", "factors.a.cols()", "factors.b.rows()", "factors.b.cols()");
    fits(gradients, "gradients.a.rows()", "gradients.a.cols()", "gradients.b.rows()",
         "gradients.b.cols()");
    check_apart(where, "factors.a", factors.a, "gradients.a", gradients.a);
    check_apart(where, "factors.a", factors.a, "gradients.b", gradients.b);
    check_apart(where, "factors.b", factors.b, "gradients.a", gradients.a);
    check_apart(where, "factors.b", factors.b, "gradients.b", gradients.b);
    check_apart(where, "gradients.a", gradients.a, "gradients.b", gradients.b);
  }

  index_t scratch_floats() const { return tile * (2 * experts_->rank() + experts_->d_out()); }

  void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dout,
                  matrix_view<float> din, float* memory) const {
    using enum simd::sum_start;
    using rows = matrix_view<const float>;
    const index_t rank = experts_->rank(), d_out = experts_->d_out();
    check_range("lora_backward", "expert", e, 0, experts_->experts() - 1);
    check_size("lora_backward", "in.cols()", in.cols, experts_->d());
    check_size("lora_backward", "dout.rows()", dout.rows, in.rows);
    check_size("lora_backward", "dout.cols()", dout.cols, d_out);
    check_size("lora_backward", "din.rows()", din.rows, in.rows);
    check_size("lora_backward", "din.cols()", din.cols, experts_->d());
    for (index_t first = 0; first < in.rows; first += tile) {
      const index_t n = std::min(tile, in.rows - first);
      const matrix_view<float> low(memory, n, rank), dlow(memory + tile * rank, n, rank),
          dy(memory + 2 * tile * rank, n, d_out);
      const rows x = in.middle_rows(first, n);
      experts_->low_rank(e, x, low);
      for (index_t t = 0; t < n; ++t)
        simd::scale_row<A>(dout.row(first + t), experts_->scale(), d_out, dy.row(t));
      simd::multiply_rows<A>(rows(dy), factors_.b.middle_rows(e * d_out, d_out), dlow, zero);
      for (index_t t = 0; experts_->masks() && t < n; ++t) {
        bool dropped[lora_experts<A>::most_masked];
        experts_->dropped_ranks(low.row(t), dropped);
        for (index_t i = 0; i < rank; ++i)
          if (dropped[i]) low(t, i) = dlow(t, i) = 0.0f;
      }
      simd::multiply_transposed<A>(rows(dy), rows(low), gradients_.b.middle_rows(e * d_out, d_out),
                                   output);
      simd::multiply_transposed<A>(rows(dlow), x, gradients_.a.middle_rows(e * rank, rank), output);
      simd::multiply_rows<A>(rows(dlow), factors_.a.middle_rows(e * rank, rank),
                             din.middle_rows(first, n), zero);
    }
  }

 private:
  const lora_experts<A>* experts_;
  lora_matrices<const float> factors_;
  lora_matrices<float> gradients_;
};
static_assert(expert_gradient_with_scratch<const lora_backward<>, float, float, float>);

}  // namespace moeroute
