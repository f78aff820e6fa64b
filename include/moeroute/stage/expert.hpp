// Running the experts: one contiguous block of rows per expert that has any.
#pragma once

#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// What runs an expert: f(expert, in, out) with in [n, d] and out [n, d'], n >= 1 rows of its tokens.
template <class F, class In, class Out>
concept expert_function = requires(F& f, expert_id e, matrix_view<const In> in, matrix_view<Out> out) {
  f(e, in, out);
};

/// An expert function that wants scratch: f(expert, in, out, memory) with scratch_floats() floats of its own.
template <class F, class In, class Out>
concept expert_function_with_scratch =
    requires(F& f, expert_id e, matrix_view<const In> in, matrix_view<Out> out, float* memory) {
      { f.scratch_floats() } -> std::convertible_to<index_t>;
      f(e, in, out, memory);
    };

/// Calls f for every expert that has tokens, with the rows of its slots.
///
/// Shapes: in [plan.slots(), d], out [plan.slots(), d'].
/// Throws: error where the shapes do not fit the plan. Cost: what f costs; experts run on the executor's
/// threads, so f must allow that. Determinism: as f's; a block is never split.
template <readable_rows X, writable_rows Y, class F, executor Exec = serial>
  requires expert_function<F, element_of<const X>, element_of<Y>>
void for_each_expert(const dispatch_plan& plan, const X& in_rows, Y&& out_rows, F&& f,
                     const Exec& exec = {}) {
  const auto in = const_view(in_rows);
  const auto out = view(out_rows);
  check_size("for_each_expert", "in.rows()", in.rows, plan.slots());
  check_size("for_each_expert", "out.rows()", out.rows, plan.slots());
  exec.parallel_for(plan.experts(), 1, [&](index_t begin, index_t end) {
    for (index_t e = begin; e < end; ++e) {
      const index_t first = plan.offsets()[static_cast<std::size_t>(e)], n = plan.load(e);
      if (n > 0) f(static_cast<expert_id>(e), in.middle_rows(first, n), out.middle_rows(first, n));
    }
  });
}

/// The same for an f that wants scratch; `memory` holds f.scratch_floats() floats for each of
/// worker_slots::count(exec.concurrency()) workers.
template <readable_rows X, writable_rows Y, class F, executor Exec = serial>
  requires expert_function_with_scratch<F, element_of<const X>, element_of<Y>>
void for_each_expert(const dispatch_plan& plan, const X& in, Y&& out, F&& f, float* memory,
                     const Exec& exec = {}) {
  worker_slots workers(exec.concurrency());
  for_each_expert(
      plan, in, out,
      [&](expert_id e, matrix_view<const element_of<const X>> rows,
          matrix_view<element_of<Y>> results) {
        const worker_slots::held worker(workers);
        f(e, rows, results, memory + worker * f.scratch_floats());
      },
      exec);
}

}  // namespace moeroute
