// Running the experts backwards: one contiguous block of rows per expert that has any.
#pragma once

#include <concepts>
#include <utility>

#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// What runs an expert backwards: f(expert, in, dout, din) with in [n, d], dout [n, d'] and din
/// [n, d], n >= 1 rows of its tokens: it writes din, and adds to gradients of its own.
template <class F, class In, class Out, class D>
concept expert_gradient =
    requires(F& f, expert_id e, matrix_view<const In> in, matrix_view<const Out> dout,
             matrix_view<D> din) { f(e, in, dout, din); };

/// One that wants scratch: f(expert, in, dout, din, memory) with scratch_floats() floats of its
/// own.
template <class F, class In, class Out, class D>
concept expert_gradient_with_scratch =
    requires(F& f, expert_id e, matrix_view<const In> in, matrix_view<const Out> dout,
             matrix_view<D> din, float* memory) {
      { f.scratch_floats() } -> std::convertible_to<index_t>;
      f(e, in, dout, din, memory);
    };

/// Calls f for every expert that has tokens, with the rows of its slots; padding is left out.
///
/// An expert's rows are never split, and each expert is called once: what f adds to its expert's
/// gradients has one order. Shapes: in and din [plan.slots(), d], dout [plan.slots(), d']; in may
/// be without rows where f does not want it. Throws: error where the shapes do not fit the plan;
/// what f throws. Cost: what f costs; calls run on the executor's threads, so f must allow that.
/// Determinism: as f's; what a call sees depends on the plan only.
template <class In, class Out, class D, class F, executor Exec = serial>
  requires expert_gradient<F, std::remove_const_t<In>, std::remove_const_t<Out>, D>
void for_each_expert_backward(const dispatch_plan& plan, const matrix_view<In>& in,
                              const matrix_view<Out>& dout, const matrix_view<D>& din, F&& f,
                              const Exec& exec = {}) {
  constexpr const char* where = "for_each_expert_backward";
  check_size(where, "in.rows()", in.rows, in.data == nullptr ? 0 : plan.slots());
  check_size(where, "dout.rows()", dout.rows, plan.slots());
  check_size(where, "din.rows()", din.rows, plan.slots());
  check_stride(where, "in", in);
  check_stride(where, "dout", dout);
  check_stride(where, "din", din);
  check_apart(where, "in", in, "din", din);
  check_apart(where, "dout", dout, "din", din);
  using row_in = matrix_view<std::add_const_t<In>>;
  using row_out = matrix_view<std::add_const_t<Out>>;
  exec.parallel_for(plan.experts(), 1, [&](index_t begin, index_t end) {
    for (index_t e = begin; e < end; ++e) {
      const index_t first = plan.offsets()[static_cast<std::size_t>(e)], n = plan.load(e);
      if (n > 0)
        f(static_cast<expert_id>(e),
          in.data == nullptr ? row_in{} : row_in(in.middle_rows(first, n)),
          row_out(dout.middle_rows(first, n)), din.middle_rows(first, n));
    }
  });
}

/// The same for an f that wants scratch; `memory` holds f.scratch_floats() floats for each of
/// worker_slots::count(exec.concurrency()) workers.
template <class In, class Out, class D, class F, executor Exec = serial>
  requires expert_gradient_with_scratch<F, std::remove_const_t<In>, std::remove_const_t<Out>, D>
void for_each_expert_backward(const dispatch_plan& plan, const matrix_view<In>& in,
                              const matrix_view<Out>& dout, const matrix_view<D>& din, F&& f,
                              float* memory, const Exec& exec = {}) {
  worker_slots workers(exec.concurrency());
  for_each_expert_backward(
      plan, in, dout, din,
      [&](expert_id e, matrix_view<std::add_const_t<In>> rows,
          matrix_view<std::add_const_t<Out>> drows, matrix_view<D> dinput) {
        const worker_slots::held worker(workers);
        f(e, rows, drows, dinput, memory + worker * f.scratch_floats());
      },
      exec);
}

}  // namespace moeroute
