// A rule of single rows against the same rule as an inlined loop over the row.
#pragma once

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/logits.hpp"

namespace bench {

using moeroute::expert_id;

struct rule_input {
  index_t tokens, experts;
  std::string shape;
};

// What the rules need beside logits, drawn.
struct drawn_sides {
  std::vector<std::int32_t> token_ids;
  std::vector<std::uint8_t> modality;
  moeroute::buffer<float> noise;

  static constexpr std::int32_t vocabulary = 4096;

  explicit drawn_sides(const rule_input& in) : noise(in.tokens * in.experts) {
    std::mt19937 random(11);
    for (index_t t = 0; t < in.tokens; ++t) {
      token_ids.push_back(static_cast<std::int32_t>(random() % vocabulary));
      modality.push_back(static_cast<std::uint8_t>(random() & 1u));
    }
    fill("normal", in.tokens, in.experts, noise.data());
  }

  moeroute::side_inputs view(const rule_input& in) const {
    return {.token_ids = token_ids,
            .modality = modality,
            .noise_logits = moeroute::matrix_view<const float>(noise.data(), in.tokens, in.experts),
            .seed = 5,
            .step = 3};
  }
};

// How alike the choices of the two must be: rounding swaps near ties, and numbers drawn otherwise
// agree only by chance.
enum class agreement { nearly, not_asked };

// ours against plain(row, columns, token, side, ids, weights), which returns how many it chose.
template <class Router, class Plain>
void compete_rule(benchmark::State& state, const rule_input& in, const Router& router, Plain plain,
                  const drawn_sides& sides, agreement asked = agreement::nearly) {
  const logit_rows logits(in.shape, in.experts, "l2", in.tokens);
  const moeroute::side_inputs side = sides.view(in);
  const moeroute::side_inputs read = side.only(moeroute::side_use_of(router, in.experts));
  moeroute::workspace workspace;
  moeroute::assignment choices;
  const auto ours = [&](index_t first) {
    moeroute::route(router,
                    moeroute::matrix_view<const float>(logits.row(first), in.tokens, in.experts),
                    read, workspace, choices);
    benchmark::DoNotOptimize(choices.ids().data());
  };
  const index_t most = moeroute::detail::most_choices(router, in.experts);
  std::vector<expert_id> id(static_cast<std::size_t>(in.tokens * most));
  std::vector<float> weight(id.size());
  std::vector<std::int32_t> offset(static_cast<std::size_t>(in.tokens + 1));
  const auto baseline = [&](index_t first) {
    index_t at = 0;
    for (index_t t = 0; t < in.tokens; ++t) {
      at += plain(logits.row(first + t), in.experts, t, side, id.data() + at, weight.data() + at);
      offset[static_cast<std::size_t>(t + 1)] = static_cast<std::int32_t>(at);
    }
    benchmark::DoNotOptimize(id.data());
    return at;
  };
  if (asked == agreement::nearly) {
    ours(0);
    const index_t n = baseline(0);
    index_t different = std::abs(n - choices.choices());
    for (index_t i = 0; i < std::min(n, choices.choices()); ++i)
      different += id[static_cast<std::size_t>(i)] != choices.ids()[static_cast<std::size_t>(i)];
    // A choice more or less moves all that follow.
    bool alike = different * 50 <= n;
    if (choices.ragged()) {
      different = 0;
      for (index_t t = 0; t < in.tokens; ++t)
        different += std::abs(choices.count(t) - (offset[static_cast<std::size_t>(t + 1)] -
                                                  offset[static_cast<std::size_t>(t)]));
      alike = different * 50 <= n;
    }
    if (!alike) {
      state.SkipWithError("differs from the plain rule");
      return;
    }
  }
  const auto calls = [&](auto call) {
    return [&in, call](index_t first, index_t n) {
      for (index_t t = first; t < first + n; t += in.tokens) call(t);
    };
  };
  std::vector<competitor> list;
  list.push_back({"ours", over(logits.turns, 0.0, calls(ours))});
  moeroute::buffer<float> best(logits.turns.units);
  list.push_back({"floor", over(logits.turns.row_by_row(), 1.0 / 3, [&](index_t first, index_t n) {
                    max_of_rows(logits.row(first), n, in.experts, best.data());
                  })});
  list.push_back({"baseline", over(logits.turns, 2.0 / 3, calls(baseline))});
  compete(state, logits.bytes(), std::move(list));
}

using rule_run = std::function<void(benchmark::State&, const rule_input&)>;

// An entry of a rule on one rule_input.
inline void add_rule(const std::string& rule, const rule_input& in, rule_run f) {
  entry(rule + "/T:" + std::to_string(in.tokens) + "/E:" + std::to_string(in.experts) +
            "/shape:" + in.shape,
        [=](benchmark::State& state) { f(state, in); });
}

// All shapes at one size, and sizes of one shape: registers full, partly full, many.
inline void add_everywhere(const std::string& rule, index_t least, const rule_run& f) {
  for (const char* shape : shapes) add_rule(rule, {1024, 64, shape}, f);
  for (const index_t experts : {3, 7, 8, 60, 72, 256, 2048})
    if (experts >= least) add_rule(rule, {1024, experts, "normal"}, f);
  for (const index_t experts : {8, 64, 256}) add_rule(rule, {1, experts, "normal"}, f);
}

template <class Router, class Plain>
rule_run rule(Router router, Plain plain, agreement asked = agreement::nearly) {
  return [=](benchmark::State& state, const rule_input& in) {
    compete_rule(state, in, router, plain, drawn_sides(in), asked);
  };
}

}  // namespace bench
