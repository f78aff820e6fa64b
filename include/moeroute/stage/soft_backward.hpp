// Backward of soft mixtures: of the plan's two softmaxes, and of the products with it.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/soft_plan.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/simd/rows/row_dot.hpp>
#include <moeroute/simd/rows/row_product.hpp>

namespace moeroute {

/// dlogits[t, s] (+)= D(s, t) (dD(s, t) - sum over u of D(s, u) dD(s, u))
///                  + C(t, s) (dC(t, s) - sum over r of C(t, r) dC(t, r)),
/// the derivative of plan_soft(): D = softmax of the logits over the tokens, C = over the slots.
///
/// Shapes: dispatch and ddispatch [S, T], combine and dcombine [T, S], dlogits [T, S]. Throws:
/// error where the shapes do not fit or dlogits shares memory with the others. Cost: reads each
/// once, S numbers of scratch; no allocation once ws is warm. Determinism: the same bits for every
/// executor and thread count. Source: Puigcerver et al. 2023.
template <std::floating_point F, executor Exec = serial, class A = simd::default_arch>
void plan_soft_backward(const std::type_identity_t<matrix_view<const F>>& dispatch,
                        const std::type_identity_t<matrix_view<const F>>& combine,
                        const std::type_identity_t<matrix_view<const F>>& ddispatch,
                        const std::type_identity_t<matrix_view<const F>>& dcombine, gradient_to to,
                        const matrix_view<F>& dlogits, workspace& ws, const Exec& exec = {}) {
  constexpr const char* where = "plan_soft_backward";
  if (to == gradient_to::nowhere) return;
  const index_t tokens = combine.rows, slots = combine.cols;
  const auto fits = [&](const char* name, const auto& m, const char* rows_name, index_t rows,
                        const char* cols_name, index_t cols) {
    check_size(where, rows_name, m.rows, rows);
    check_size(where, cols_name, m.cols, cols);
    check_stride(where, name, m);
  };
  check_stride(where, "combine", combine);
  fits("dispatch", dispatch, "dispatch.rows()", slots, "dispatch.cols()", tokens);
  fits("ddispatch", ddispatch, "ddispatch.rows()", slots, "ddispatch.cols()", tokens);
  fits("dcombine", dcombine, "dcombine.rows()", tokens, "dcombine.cols()", slots);
  fits("dlogits", dlogits, "dlogits.rows()", tokens, "dlogits.cols()", slots);
  check_apart(where, "dlogits", dlogits, "dispatch", dispatch);
  check_apart(where, "dlogits", dlogits, "combine", combine);
  check_apart(where, "dlogits", dlogits, "dcombine", dcombine);
  check_apart(where, "dlogits", dlogits, "ddispatch", ddispatch);
  F* const mean = ws.carve([&](scratch& tape) { return tape.take<F>(slots); });
  exec.parallel_for(slots, 16, [&](index_t begin, index_t end) {
    for (index_t s = begin; s < end; ++s)
      mean[s] = simd::row_dot<A>(dispatch.data + s * dispatch.stride,
                                 ddispatch.data + s * ddispatch.stride, tokens);
  });
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      const F* const c = combine.data + t * combine.stride;
      const F* const dc = dcombine.data + t * dcombine.stride;
      const F own = simd::row_dot<A>(c, dc, slots);
      for (index_t s = 0; s < slots; ++s) {
        // Left to the compiler one product or the other would be fused, as each executor's loop has
        // it.
        const F of_dispatch = dispatch(s, t) * (ddispatch(s, t) - mean[s]);
        const F g = std::fma(c[s], dc[s] - own, of_dispatch);
        dlogits(t, s) = to == gradient_to::write ? g : dlogits(t, s) + g;
      }
    }
  });
}

/// The gradients of a product with one of a plan's matrices, out[r] = sum over i of weight(r, i)
/// rows[i]: dweight(r, i) = dout[r] . rows[i], and drows[i] (+)= the sum over r of weight(r, i)
/// dout[r]. Both dispatch (rows are the tokens) and combine (rows are the slots) of a soft plan.
///
/// Shapes: weight and dweight [R, n], rows and drows [n, d], dout [R, d]; dweight is written; what
/// has no data is not wanted. Throws: error where the shapes do not fit, rows run into one another
/// or a gradient shares memory with what is read. Cost: 2 R n d multiply-adds, no allocation.
/// Determinism: the same bits for every executor and thread count.
template <class T, std::floating_point F, executor Exec = serial, class A = simd::default_arch>
void mix_backward(const std::type_identity_t<matrix_view<const F>>& weight,
                  const matrix_view<T>& rows,
                  const std::type_identity_t<matrix_view<const F>>& dout,
                  const std::type_identity_t<matrix_view<F>>& dweight, gradient_to to,
                  const matrix_view<F>& drows, const Exec& exec = {}) {
  constexpr const char* where = "mix_backward";
  check_size(where, "weight.cols()", weight.cols, rows.rows);
  check_size(where, "dout.rows()", dout.rows, weight.rows);
  check_size(where, "dout.cols()", dout.cols, rows.cols);
  check_stride(where, "weight", weight);
  check_stride(where, "rows", rows);
  check_stride(where, "dout", dout);
  if (drows.data != nullptr && to != gradient_to::nowhere) {
    check_size(where, "drows.rows()", drows.rows, rows.rows);
    check_size(where, "drows.cols()", drows.cols, rows.cols);
    check_stride(where, "drows", drows);
    check_apart(where, "weight", weight, "drows", drows);
    check_apart(where, "dout", dout, "drows", drows);
  }
  if (dweight.data != nullptr) {
    check_size(where, "dweight.rows()", dweight.rows, weight.rows);
    check_size(where, "dweight.cols()", dweight.cols, weight.cols);
    check_stride(where, "dweight", dweight);
    check_apart(where, "rows", rows, "dweight", dweight);
    check_apart(where, "dout", dout, "dweight", dweight);
    exec.parallel_for(weight.rows, 8, [&](index_t begin, index_t end) {
      for (index_t r = begin; r < end; ++r)
        for (index_t i = 0; i < rows.rows; ++i)
          dweight(r, i) =
              simd::row_dot<A>(rows.data + i * rows.stride, dout.data + r * dout.stride, rows.cols);
    });
  }
  if (drows.data != nullptr && to != gradient_to::nowhere)
    simd::multiply_transposed<A>(
        matrix_view<const F>(weight), matrix_view<const F>(dout), drows,
        to == gradient_to::write ? simd::sum_start::zero : simd::sum_start::output, exec);
}

}  // namespace moeroute
