// Token rows inside a whole-batch router: blocks of rows through a token router, into the fixed
// form.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>

#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute::detail {

// Scratch of one worker that routes blocks.
template <class Router>
struct row_memory {
  expert_id* id;
  float* value;
  decltype(std::declval<const Router&>().carve(std::declval<scratch&>(), index_t{})) router;

  static row_memory* carve(scratch& tape, const Router& router, index_t experts, int workers) {
    auto* const list = tape.take<row_memory>(workers);
    const index_t lanes = router.k() * block_rows;
    for (int w = 0; w < workers; ++w) {
      auto* const id = tape.take<expert_id>(lanes);
      auto* const value = tape.take<float>(lanes);
      const row_memory m{id, value, router.carve(tape, experts)};
      if (list != nullptr) std::construct_at(list + w, m);
    }
    return list;
  }
};

// Routes every token of the batch; masked tokens get nothing.
template <class A, token_router Router, executor Exec>
void route_rows(const Router& router, matrix_view<const float> z, const side_inputs& side,
                const row_memory<Router>* memories, int workers, assignment& out,
                const Exec& exec) {
  const int k = static_cast<int>(router.k());
  out.reset(z.rows, z.cols, k);
  const index_t grain =
      std::clamp<index_t>(round_up((index_t{1} << 15) / z.cols, block_rows), block_rows, 4096);
  worker_slots slots(workers);
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    const row_memory<Router>& m = memories[worker];
    for (index_t t = begin; t < end; t += block_rows) {
      const int rows = static_cast<int>(std::min<index_t>(block_rows, end - t));
      choice_block c{k, m.id, m.value};
      clear_lanes(c, rows);
      router.template route_block<A>({z.row(t), z.stride, rows, z.cols, t, &side}, m.router, c);
      for (int i = 0; i < rows; ++i) {
        const bool taken = !side.masked(t + i);
        for (int r = 0; r < k; ++r) {
          const index_t at = (t + i) * k + r;
          out.ids()[static_cast<std::size_t>(at)] = taken ? c.id[r * block_rows + i] : no_expert;
          out.weights()[static_cast<std::size_t>(at)] = taken ? c.value[r * block_rows + i] : 0.0f;
        }
      }
    }
  });
}

// A token router whose choice scores come from the batch: fill(block, rows [16, E]) writes them,
// -inf for what may not be chosen; weigh(block, choices) turns c.value, the logits of the choices,
// into weights.
template <class Fill, class Weigh>
struct filled_rows {
  index_t choices;
  Fill fill;
  Weigh weigh;

  struct buffers {
    std::uint64_t* key;
    float* choice;  ///< [16, E]
  };

  index_t k() const { return choices; }
  static index_t experts(index_t columns) { return columns; }
  static void check(index_t) {}

  buffers carve(scratch& tape, index_t columns) const {
    return {tape.take<std::uint64_t>(simd::top_k_scratch(columns, choices)),
            tape.take<float>(block_rows * columns)};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& m, choice_block& c) const {
    fill.template operator()<A>(z, m.choice);
    simd::top_k_block<A>(m.choice, z.experts, z.rows, z.experts, c.k, c.value, c.id, m.key);
    for (int r = 0; r < c.k; ++r)
      for (int i = 0; i < block_rows; ++i) {
        // Lanes without a row are nobody's: they get what no weight rule trips over.
        expert_id& e = c.id[r * block_rows + i];
        if (i >= z.rows) e = no_expert;
        c.value[r * block_rows + i] = e == no_expert ? simd::minus_infinity : z.row(i)[e];
      }
    keep_own_k(z, c);
    weigh.template operator()<A>(z, c, m.choice);
  }
};
template <class Fill, class Weigh>
filled_rows(index_t, Fill, Weigh) -> filled_rows<Fill, Weigh>;

}  // namespace moeroute::detail
