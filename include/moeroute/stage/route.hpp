// Routing: logits to an assignment, block by block.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include <moeroute/data/assignment.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/rows.hpp>

namespace moeroute {

namespace detail {

// Tokens per piece of parallel work: about 2^15 logits, whole blocks.
inline index_t route_grain(index_t experts) {
  return std::clamp<index_t>(round_up((index_t{1} << 15) / experts, block_rows), block_rows, 4096);
}

// Workers that route T tokens: one where there is one piece.
template <executor Exec>
int route_workers(const Exec& exec, index_t tokens, index_t experts) {
  return tokens <= route_grain(experts) ? 1 : worker_slots::count(exec.concurrency());
}

// Scratch of one worker that routes logits kept as T.
template <class Router, class T>
struct route_memory {
  expert_id* id;
  float* value;
  float* wide;  // [16, E] where logits are kept in 16 bits
  decltype(std::declval<const Router&>().carve(std::declval<scratch&>(), index_t{})) router;

  static route_memory carve(scratch& tape, const Router& router, index_t experts) {
    const index_t lanes = router.k() * block_rows;
    return {tape.take<expert_id>(lanes), tape.take<float>(lanes),
            tape.take<float>(std::is_same_v<T, float> ? 0 : experts * block_rows),
            router.carve(tape, experts)};
  }

  // One for each worker, in one array.
  static route_memory* carve(scratch& tape, const Router& router, index_t experts, int workers) {
    route_memory* const list = tape.take<route_memory>(workers);
    for (int w = 0; w < workers; ++w) {
      const route_memory m = carve(tape, router, experts);
      if (list != nullptr) std::construct_at(list + w, m);
    }
    return list;
  }
};

// route() on memory that is already carved; out has been reset.
template <class A, class T, class Router, executor Exec>
void route_with(const Router& router, matrix_view<const T> logits,
                const route_memory<Router, T>* memories, int workers, assignment& out,
                const Exec& exec) {
  const index_t experts = logits.cols;
  const int k = static_cast<int>(router.k());
  worker_slots slots(workers);
  exec.parallel_for(logits.rows, route_grain(experts), [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    const route_memory<Router, T>& m = memories[worker];
    choice_block choices{k, m.id, m.value};
    for (index_t t = begin; t < end; t += block_rows) {
      const int rows = static_cast<int>(std::min<index_t>(block_rows, end - t));
      logit_block block{nullptr, logits.stride, rows, experts, t};
      if constexpr (std::is_same_v<T, float>) {
        block.logits = logits.row(t);
      } else {
        for (int i = 0; i < rows; ++i)
          simd::convert_row<A>(logits.row(t + i), experts, m.wide + i * experts);
        block.logits = m.wide;
        block.stride = experts;
      }
      router.route_block(block, m.router, choices);
      expert_id* id = out.ids().data() + t * k;
      float* weight = out.weights().data() + t * k;
      for (int i = 0; i < rows; ++i) {
        for (int r = 0; r < k; ++r) {
          id[i * k + r] = m.id[r * block_rows + i];
          weight[i * k + r] = m.value[r * block_rows + i];
        }
      }
    }
  });
}

}  // namespace detail

/// Decides for every token which experts it goes to, and with which weights.
///
/// Shapes: logits [T, E] in float, bfloat16 or float16 (widened once); out becomes [T, k].
/// Ensures: ids are in [0, E) or no_expert with weight 0; weights are finite; a NaN logit counts as -inf and
/// a -inf logit is never chosen.
/// Throws: error where the router does not fit E.
/// Cost: no allocation once ws and out are warm.
/// Determinism: rows are independent; the same ids on every ISA, executor and thread count.
template <token_router Router, readable_rows Z, executor Exec = serial,
          class A = simd::default_arch>
void route(const Router& router, const Z& logit_rows, workspace& ws, assignment& out,
           const Exec& exec = {}) {
  using T = element_of<const Z>;
  const matrix_view<const T> logits = const_view(logit_rows);
  const index_t tokens = logits.rows, experts = logits.cols;
  router.check(experts);
  out.reset(tokens, experts, router.k());
  const int workers = detail::route_workers(exec, tokens, experts);
  const auto* memories = ws.carve([&](scratch& tape) {
    return detail::route_memory<Router, T>::carve(tape, router, experts, workers);
  });
  detail::route_with<A>(router, logits, memories, workers, out, exec);
}

}  // namespace moeroute
