// Combine: the experts' rows back to their tokens, weighted.
#pragma once

#include <algorithm>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/stage/dispatch.hpp>

namespace moeroute {

/// y[t] = sum over the choices of t, in rank order, of weight * slots[slot of the choice].
///
/// A token without any slot gets zeros. Accumulates in float with one rounding at the end.
/// Shapes: slots [plan.slots(), d], y [T, d]; they must not overlap.
/// Throws: error where the shapes do not fit. Cost: reads each slot once, no allocation.
/// Determinism: the same bits for every executor, thread count and ISA.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void combine(const X& slot_rows, const dispatch_plan& plan, const assignment& choices, Y&& y_rows,
             const Exec& exec = {}) {
  const auto slots = const_view(slot_rows);
  const auto y = view(y_rows);
  check_size("combine", "slots.rows()", slots.rows, plan.slots());
  check_size("combine", "choices.tokens()", choices.tokens(), plan.tokens());
  check_size("combine", "choices.k()", choices.k(), plan.k());
  check_size("combine", "y.rows()", y.rows, plan.tokens());
  check_size("combine", "y.cols()", y.cols, slots.cols);
  const index_t k = plan.k();
  const slot_id* slot = plan.slot_of_choice().data();
  const float* weight = choices.weights().data();
  exec.parallel_for(y.rows, detail::row_grain(y.cols * k), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t)
      simd::weighted_sum_of_rows<A>(slots.data, slots.stride, slot + t * k, weight + t * k, k,
                                    y.cols, y.data + t * y.stride);
  });
}

}  // namespace moeroute
