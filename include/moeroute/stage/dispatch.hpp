// Dispatch: token rows to expert-major slots.
#pragma once

#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows.hpp>

namespace moeroute {

namespace detail {

// Rows per piece of parallel work: about 2^16 elements.
inline index_t row_grain(index_t cols) {
  return cols >= (index_t{1} << 16) ? 1 : (index_t{1} << 16) / (cols > 0 ? cols : 1);
}

}  // namespace detail

/// slots[s] = x[token of s] for every slot of the plan, widened or narrowed where the types differ.
///
/// Shapes: x [T, d], slots [plan.slots(), d]; they must not overlap.
/// Throws: error where the shapes do not fit the plan.
/// Cost: reads each row of x once and writes each slot once, no allocation. Determinism: exact.
template <readable_rows X, writable_rows Y, executor Exec = serial, class A = simd::default_arch>
void dispatch(const X& x_rows, const dispatch_plan& plan, Y&& slot_rows, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const auto slots = view(slot_rows);
  check_size("dispatch", "x.rows()", x.rows, plan.tokens());
  check_size("dispatch", "slots.rows()", slots.rows, plan.slots());
  check_size("dispatch", "slots.cols()", slots.cols, x.cols);
  const index_t k = plan.k();
  const slot_id* slot = plan.slot_of_choice().data();
  exec.parallel_for(x.rows, detail::row_grain(x.cols * k), [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t)
      for (index_t c = t * k; c < (t + 1) * k; ++c)
        if (slot[c] != no_slot)
          simd::convert_row<A>(x.data + t * x.stride, x.cols, slots.data + slot[c] * slots.stride);
  });
}

}  // namespace moeroute
