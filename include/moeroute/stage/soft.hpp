// Soft mixtures: slots are weighted means of all tokens, outputs weighted means of all slots.
#pragma once

#include <algorithm>

#include <moeroute/data/soft_plan.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute {

namespace detail {

// row = exp(row - max) / sum, in place; zeros where nothing is finite.
template <class A>
void softmax_row(float* row, index_t n) {
  const float max = simd::row_max<A>(row, n);
  if (max == simd::minus_infinity) {
    std::fill_n(row, n, 0.0f);
    return;
  }
  const float sum = simd::row_exp<A>(row, n, max, row);
  index_t c = 0;
  for (; c + simd::width<A> <= n; c += simd::width<A>)
    simd::divide<A>(simd::load<A>(row + c), simd::vfloat<A>(sum)).store_unaligned(row + c);
  for (; c < n; ++c) row[c] /= sum;
}

}  // namespace detail

/// dispatch = softmax of the logits over the tokens, combine = softmax over the slots.
///
/// A NaN logit counts as -inf.
/// Shapes: logits [T, S] with the slots_per_expert slots of each expert side by side.
/// Throws: error where slots_per_expert does not divide S. Cost: 2 T S exponentials; no allocation
/// once out is warm. Determinism: the same bits on every ISA, executor and thread count.
/// Source: Puigcerver et al. 2023.
/// Example:
///
///     soft_plan soft;
///     plan_soft(logits, 1, soft);        // one slot for each expert
///     dispatch(x, soft, in);
template <readable_rows Z, executor Exec = serial, class A = simd::default_arch>
void plan_soft(const Z& logit_rows, index_t slots_per_expert, soft_plan& out,
               const Exec& exec = {}) {
  const auto logits = const_view(logit_rows);
  check_stride("plan_soft", "logits", logits);
  const index_t tokens = logits.rows, slots = logits.cols;
  out.reset(tokens, slots, slots_per_expert);
  const matrix_view<float> dispatch = out.dispatch(), combine = out.combine();
  exec.parallel_for(tokens, 64, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      simd::convert_row<A>(logits.data + t * logits.stride, slots, combine.data + t * slots);
      for (index_t s = 0; s < slots; ++s)
        dispatch.data[s * tokens + t] = combine.data[t * slots + s];
      detail::softmax_row<A>(combine.data + t * slots, slots);
    }
  });
  exec.parallel_for(slots, 16, [&](index_t begin, index_t end) {
    for (index_t s = begin; s < end; ++s)
      detail::softmax_row<A>(dispatch.data + s * tokens, tokens);
  });
}

namespace detail {

// out[r] = sum over c of weight(r, c) * rows[c], in the order of c.
template <class A, class T, class U, executor Exec>
void mix_rows(const matrix_view<const float>& weight, const matrix_view<const T>& rows,
              const matrix_view<U>& out, const Exec& exec) {
  exec.parallel_for(weight.rows, 24, [&](index_t begin, index_t end) {
    simd::mix_rows<A>(weight.middle_rows(begin, end - begin), rows,
                      out.middle_rows(begin, end - begin));
  });
}

}  // namespace detail

/// slots[s] = sum over the tokens of dispatch(s, t) * x[t].
///
/// Accumulates in float in token order with one rounding at the end.
/// Shapes: x [T, d], slots [S, d]. Throws: error where shapes do not fit or memory overlaps.
/// Cost: S T d multiply-adds, no allocation. Determinism: the same bits everywhere.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void dispatch(const X& x_rows, const soft_plan& plan, Y&& slot_rows, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const auto slots = view(slot_rows);
  check_size("dispatch", "x.rows()", x.rows, plan.tokens());
  check_size("dispatch", "slots.rows()", slots.rows, plan.slots());
  check_size("dispatch", "slots.cols()", slots.cols, x.cols);
  check_stride("dispatch", "x", x);
  check_stride("dispatch", "slots", slots);
  check_apart("dispatch", "x", x, "slots", slots);
  detail::mix_rows<A>(plan.dispatch(), x, slots, exec);
}

/// y[t] = sum over the slots of combine(t, s) * slots[s].
///
/// Accumulates in float in slot order with one rounding at the end.
/// Shapes: slots [S, d], y [T, d]. Throws: error where shapes do not fit or memory overlaps.
/// Cost: S T d multiply-adds, no allocation. Determinism: the same bits everywhere.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void combine(const X& slot_rows, const soft_plan& plan, Y&& y_rows, const Exec& exec = {}) {
  const auto slots = const_view(slot_rows);
  const auto y = view(y_rows);
  check_size("combine", "slots.rows()", slots.rows, plan.slots());
  check_size("combine", "y.rows()", y.rows, plan.tokens());
  check_size("combine", "y.cols()", y.cols, slots.cols);
  check_stride("combine", "slots", slots);
  check_stride("combine", "y", y);
  check_apart("combine", "slots", slots, "y", y);
  detail::mix_rows<A>(plan.combine(), slots, y, exec);
}

}  // namespace moeroute
