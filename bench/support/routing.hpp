// What a routing entry is measured with, whatever its router and wherever its logits come from.
#pragma once

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/peers/peers.hpp"
#include "support/plain_gate.hpp"
#include "support/shapes.hpp"

namespace bench {

/// The tensors that a described router needs, drawn where nobody brings them.
struct drawn_tensors {
  std::vector<float> bias, scale;
  std::optional<moeroute::expert_table> table;
  std::vector<std::int32_t> token_ids;

  drawn_tensors(const moeroute::router_spec& spec, index_t tokens) {
    std::mt19937 random(3);
    std::uniform_real_distribution<float> small(-0.05f, 0.05f), near_one(0.9f, 1.1f);
    const auto experts = static_cast<std::size_t>(spec.experts);
    if (spec.selection_bias)
      for (std::size_t e = 0; e < experts; ++e) bias.push_back(small(random));
    if (spec.per_expert_scale)
      for (std::size_t e = 0; e < experts; ++e) scale.push_back(near_one(random));
    if (spec.selection == moeroute::selection_kind::expert_table) {
      constexpr std::int32_t vocabulary = 4096;
      const auto drawn = expert_ids("normal", vocabulary, spec.experts, spec.k);
      table.emplace(std::vector<std::int32_t>(drawn.data(), drawn.data() + drawn.size()), spec.k,
                    spec.experts);
      for (index_t t = 0; t < tokens; ++t)
        token_ids.push_back(static_cast<std::int32_t>(random() % vocabulary));
    }
  }

  moeroute::router_tensors view() const {
    return {.bias = bias, .per_expert_scale = scale, .table = table ? &*table : nullptr};
  }
};

/// Routes `turns.step` tokens a call out of rows [turns.units, columns], with a SIMD max over the
/// same rows as the floor and, where the spec is one that it can carry out, the plain gate as the
/// baseline, and the peers that there are.
inline void compete_routing(benchmark::State& state, const moeroute::router_spec& spec,
                            const moeroute::router_tensors& tensors,
                            std::span<const std::int32_t> token_ids, const float* logits,
                            const rotation& turns) {
  const index_t tokens = turns.step, columns = spec.columns();
  const moeroute::any_router router = moeroute::make_router(spec, tensors);
  moeroute::side_inputs side;
  if (router.reads_side(columns).token_ids)
    side.token_ids = token_ids.first(std::min(token_ids.size(), static_cast<std::size_t>(tokens)));
  moeroute::workspace workspace;
  moeroute::assignment choices;
  const auto ours = [&](index_t first) {
    moeroute::route(router,
                    moeroute::matrix_view<const float>(logits + first * columns, tokens, columns),
                    side, workspace, choices);
    benchmark::DoNotOptimize(choices.ids().data());
  };
  std::vector<competitor> list;
  list.push_back({"ours", over(turns, 0.0, [&](index_t first, index_t n) {
                    for (index_t t = first; t < first + n; t += tokens) ours(t);
                  })});
  moeroute::buffer<float> best(turns.units);
  const rotation rows = turns.row_by_row();
  list.push_back({"floor", over(rows, 1.0 / 3, [&](index_t first, index_t n) {
                    max_of_rows(logits + first * columns, n, columns, best.data());
                  })});

  plain_gate plain(spec, tensors.bias);
  std::vector<std::int32_t> id(static_cast<std::size_t>(turns.chunk * spec.k));
  std::vector<float> weight(id.size());
  const auto baseline = [&](index_t first, index_t n) {
    for (index_t t = 0; t < n; ++t)
      plain(logits + (first + t) * columns, id.data() + t * spec.k, weight.data() + t * spec.k);
    benchmark::DoNotOptimize(id.data());
  };
  if (plain_gate::can(spec)) {
    ours(0);
    baseline(0, tokens);
    index_t different = 0;
    for (index_t i = 0; i < tokens * spec.k; ++i)
      different += id[static_cast<std::size_t>(i)] != choices.ids()[static_cast<std::size_t>(i)];
    // std::exp rounds otherwise than ours: where the choice is made on scores, near ties may swap.
    if (different * 50 > tokens * spec.k) {
      state.SkipWithError("differs from the plain gate");
      return;
    }
    list.push_back({"baseline", over(rows, 2.0 / 3, baseline), true});
  }
  // The best of the plain ways is what counts: for a few tokens they are near.
  quick_gate insertion(spec, tensors.bias, quick_gate::way::insertion);
  quick_gate max_passes(spec, tensors.bias, quick_gate::way::max_passes);
  if (quick_gate::can(spec)) {
    const auto add_quick = [&](const char* name, quick_gate& gate, double place) {
      const auto run = [&](index_t first, index_t n) {
        for (index_t t = 0; t < n; ++t)
          gate(logits + (first + t) * columns, id.data() + t * spec.k, weight.data() + t * spec.k);
        benchmark::DoNotOptimize(id.data());
      };
      ours(0);
      run(0, tokens);
      index_t different = 0;
      for (index_t i = 0; i < tokens * spec.k; ++i) {
        const auto c = static_cast<std::size_t>(i);
        different += id[c] != choices.ids()[c] ||
                     !(std::abs(weight[c] - choices.weights()[c]) <= 1e-5f * std::abs(weight[c]));
      }
      list.push_back({name, over(rows, place, run), true});
      return different * 50 <= tokens * spec.k;  // as above
    };
    if (!add_quick("insertion", insertion, 1.0 / 6) ||
        !add_quick("max_passes", max_passes, 5.0 / 6)) {
      state.SkipWithError("differs from a quick gate");
      return;
    }
  }
  const std::vector<peer> peers = gate_peers(spec, tensors.bias);
  if (!peers.empty()) ours(0);
  const std::string wrong =
      add_peers(list, peers, logits, columns, turns, choices.weights(), spec.k);
  if (!wrong.empty()) {
    state.SkipWithError(("differs from " + wrong).c_str());
    return;
  }
  compete(state, static_cast<double>(turns.unit_bytes), std::move(list));
}

}  // namespace bench
