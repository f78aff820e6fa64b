// Running the experts: one contiguous block of rows per expert that has any.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// What runs an expert: f(expert, in, out) with in [n, d] and out [n, d'], n >= 1 rows of its
/// tokens.
template <class F, class In, class Out>
concept expert_function =
    requires(F& f, expert_id e, matrix_view<const In> in, matrix_view<Out> out) { f(e, in, out); };

/// An expert function that wants scratch: f(expert, in, out, memory) with scratch_floats() floats
/// of its own.
template <class F, class In, class Out>
concept expert_function_with_scratch =
    requires(F& f, expert_id e, matrix_view<const In> in, matrix_view<Out> out, float* memory) {
      { f.scratch_floats() } -> std::convertible_to<index_t>;
      f(e, in, out, memory);
    };

/// How for_each_expert cuts its work.
struct expert_options {
  /// Most rows per call, 0: an expert's rows are never split. Otherwise the slots are cut every so
  /// many rows, so that one busy expert keeps several threads busy: for experts whose rows do not
  /// depend on one another.
  index_t rows_per_call = 0;
};

namespace detail {

// Calls f for the experts' rows within the slots [begin, end).
template <class In, class Out, class F>
void run_slots(const dispatch_plan& plan, const matrix_view<const In>& in,
               const matrix_view<Out>& out, index_t begin, index_t end, F& f) {
  const std::span<const slot_id> offsets = plan.offsets();
  // The first expert that ends behind begin.
  const auto behind = std::upper_bound(offsets.begin() + 1, offsets.end(), begin);
  for (index_t e = behind - offsets.begin() - 1; e < plan.experts(); ++e) {
    const index_t first = std::max<index_t>(begin, offsets[static_cast<std::size_t>(e)]);
    if (first >= end) break;
    const index_t last =
        std::min(end, offsets[static_cast<std::size_t>(e)] + plan.load(e));  // without padding
    if (first < last)
      f(static_cast<expert_id>(e), in.middle_rows(first, last - first),
        out.middle_rows(first, last - first));
  }
}

// Calls f for an expert's tokens, cut where the distance from one to the next changes: rows at one
// distance are a view with that stride, and two tokens always have one.
template <class In, class Out, class F>
void run_tokens(const dispatch_plan& plan, const matrix_view<const In>& x,
                const matrix_view<Out>& out, expert_id e, F& f) {
  const slot_id* token = plan.token_of_slot().data();
  index_t s = plan.offsets()[static_cast<std::size_t>(e)];
  for (const index_t end = s + plan.load(e); s < end;) {
    const slot_id step = s + 1 < end ? token[s + 1] - token[s] : 1;
    index_t n = 1;
    while (step > 0 && s + n < end && token[s + n] - token[s + n - 1] == step) ++n;
    f(e,
      matrix_view<const In>(x.data + token[s] * x.stride, n, x.cols,
                            n > 1 ? step * x.stride : x.cols),
      out.middle_rows(s, n));
    s += n;
  }
}

}  // namespace detail

/// Calls f for every expert that has tokens, with the rows of its slots; padding is left out.
///
/// Shapes: in [plan.slots(), d], out [plan.slots(), d']; apart, or the same memory where f works in
/// place.
/// Throws: error where the shapes do not fit the plan; what f throws. Cost: what f costs; calls run
/// on the executor's threads, so f must allow that.
/// Determinism: as f's; what a call sees depends on the plan and options only, never on threads.
/// Example:
///
///     for_each_expert(slots, in, out, [&](expert_id e, auto rows, auto result) {
///       run_expert(e, rows, result);    // rows [load of e, d] to result, both views
///     });
template <readable_rows X, writable_rows Y, class F, executor Exec = serial>
  requires expert_function<F, element_of<const X>, element_of<Y>>
void for_each_expert(const dispatch_plan& plan, const X& in_rows, Y&& out_rows, F&& f,
                     const Exec& exec = {}, const expert_options& options = {}) {
  const matrix_view<const element_of<const X>> in = const_view(in_rows);
  const auto out = view(out_rows);
  check_size("for_each_expert", "in.rows()", in.rows, plan.slots());
  check_size("for_each_expert", "out.rows()", out.rows, plan.slots());
  check_stride("for_each_expert", "in", in);
  check_stride("for_each_expert", "out", out);
  check_apart_or_same("for_each_expert", "in", in, "out", out);
  check_range("for_each_expert", "rows_per_call", options.rows_per_call, 0,
              std::int32_t{0x7fffffff});
  if (options.rows_per_call > 0) {
    exec.parallel_for(plan.slots(), options.rows_per_call, [&](index_t begin, index_t end) {
      detail::run_slots(plan, in, out, begin, end, f);
    });
    return;
  }
  exec.parallel_for(plan.experts(), 1, [&](index_t begin, index_t end) {
    for (index_t e = begin; e < end; ++e) {
      const index_t first = plan.offsets()[static_cast<std::size_t>(e)], n = plan.load(e);
      if (n > 0) f(static_cast<expert_id>(e), in.middle_rows(first, n), out.middle_rows(first, n));
    }
  });
}

/// The same without a dispatch: experts read the rows of their tokens where they lie. For a few
/// tokens, where a row would be copied k times to be read once.
///
/// f is called with an expert's tokens at once where they follow each other at one distance, as one
/// or two tokens always do; in several calls otherwise.
/// Shapes: x [T, d], out [plan.slots(), d'], apart.
/// Requires: the plan was made of `choices`.
/// Throws: error where the shapes do not fit the plan or the choices, the choices' experts are not
/// the plan's, or x and out share memory; what f throws. Cost: O(choices) and what f costs, no
/// allocation. Determinism: as f's, where its rows do not depend on one another.
template <readable_rows X, writable_rows Y, class F, executor Exec = serial>
  requires expert_function<F, element_of<const X>, element_of<Y>>
void for_each_expert(const dispatch_plan& plan, const assignment& choices, const X& x_rows,
                     Y&& out_rows, F&& f, const Exec& exec = {}) {
  const matrix_view<const element_of<const X>> x = const_view(x_rows);
  const auto out = view(out_rows);
  check_size("for_each_expert", "x.rows()", x.rows, plan.tokens());
  check_size("for_each_expert", "out.rows()", out.rows, plan.slots());
  check_size("for_each_expert", "choices.choices()", choices.choices(), plan.choices());
  check_size("for_each_expert", "choices.experts()", choices.experts(), plan.experts());
  check_stride("for_each_expert", "x", x);
  check_stride("for_each_expert", "out", out);
  check_apart("for_each_expert", "x", x, "out", out);
  const slot_id* slot = plan.slot_of_choice().data();
  const expert_id* id = choices.ids().data();
  // Whoever has an expert's first slot calls it: no search among experts that have no tokens.
  exec.parallel_for(plan.choices(), 1, [&](index_t begin, index_t end) {
    for (index_t c = begin; c < end; ++c) {
      if (slot[c] == no_slot) continue;
      if (id[c] < 0 || id[c] >= plan.experts()) [[unlikely]]
        fail("for_each_expert", "the choices are others than those that were planned");
      if (slot[c] == plan.offsets()[static_cast<std::size_t>(id[c])])
        detail::run_tokens(plan, x, out, id[c], f);
    }
  });
}

/// The same for an f that wants scratch; `memory` holds f.scratch_floats() floats for each of
/// worker_slots::count(exec.concurrency()) workers.
template <readable_rows X, writable_rows Y, class F, executor Exec = serial>
  requires expert_function_with_scratch<F, element_of<const X>, element_of<Y>>
void for_each_expert(const dispatch_plan& plan, const X& in, Y&& out, F&& f, float* memory,
                     const Exec& exec = {}, const expert_options& options = {}) {
  worker_slots workers(exec.concurrency());
  for_each_expert(
      plan, in, out,
      [&](expert_id e, matrix_view<const element_of<const X>> rows,
          matrix_view<element_of<Y>> results) {
        const worker_slots::held worker(workers);
        f(e, rows, results, memory + worker * f.scratch_floats());
      },
      exec, options);
}

/// Without a dispatch, for an f that wants scratch.
template <readable_rows X, writable_rows Y, class F, executor Exec = serial>
  requires expert_function_with_scratch<F, element_of<const X>, element_of<Y>>
void for_each_expert(const dispatch_plan& plan, const assignment& choices, const X& x, Y&& out,
                     F&& f, float* memory, const Exec& exec = {}) {
  worker_slots workers(exec.concurrency());
  for_each_expert(
      plan, choices, x, out,
      [&](expert_id e, matrix_view<const element_of<const X>> rows,
          matrix_view<element_of<Y>> results) {
        const worker_slots::held worker(workers);
        f(e, rows, results, memory + worker * f.scratch_floats());
      },
      exec);
}

}  // namespace moeroute
