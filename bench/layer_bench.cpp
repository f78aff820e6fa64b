// layer: the whole flow in one call, and the share of it that is routing.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/moving.hpp"

namespace {

using bench::index_t;
using matrix = moeroute::row_matrix<float>;
using router = moeroute::router<moeroute::softmax>;

struct shape {
  index_t d, ff, experts, k;
};

// The same weights for every entry of a shape, in the layer's packing: they fill hundreds of
// megabytes.
std::shared_ptr<moeroute::moe_layer<router, moeroute::swiglu_experts<>>> layer_of(const shape& s) {
  static std::shared_ptr<moeroute::moe_layer<router, moeroute::swiglu_experts<>>> held;
  if (held && held->d() == s.d && held->experts() == s.experts) return held;
  moeroute::swiglu_experts<> experts(s.experts, s.d, s.ff);
  const matrix in = 0.05f * matrix::Random(s.ff, s.d), out = 0.05f * matrix::Random(s.d, s.ff);
  for (moeroute::expert_id e = 0; e < s.experts; ++e) {
    experts.set_gate(e, moeroute::const_view(in));
    experts.set_up(e, moeroute::const_view(in));
    experts.set_down(e, moeroute::const_view(out));
  }
  const matrix gate = matrix::Random(s.experts, s.d);
  const auto made = std::make_shared<moeroute::moe_layer<router, moeroute::swiglu_experts<>>>(
      moeroute::simd::packed_matrix<>(moeroute::const_view(gate)),
      router{{}, {.k = s.k}, moeroute::sum_normalized}, std::move(experts));
  held = made;
  return made;
}

// Notes when each step begins.
struct clock_probe {
  using time = std::chrono::steady_clock::time_point;
  time* at;
  void operator()(moeroute::layer_step step) const {
    at[static_cast<int>(step)] = std::chrono::steady_clock::now();
  }
};

constexpr int steps = static_cast<int>(moeroute::layer_step::done) + 1;

// whole: the figure is the layer, beside as many multiply-adds out of registers (one token: beside
// reading as many weights). Otherwise it is
// route + plan + dispatch + combine, beside a memcpy that moves as many bytes as dispatch and
// combine.
void layer(benchmark::State& state, bool whole, index_t tokens, const shape& s) {
  const auto under_test = layer_of(s);
  const matrix x = matrix::Random(tokens, s.d);
  matrix y(tokens, s.d);
  const index_t moved = (s.k + 1) * s.d;  // floats per token that a memcpy must copy
  const auto from = bench::hidden_states<float>(tokens, moved);
  moeroute::buffer<float> to(tokens * moved);
  const index_t work = s.d * s.experts + 3 * s.k * s.d * s.ff;  // multiply-adds per token

  bench::stopwatch all, routing;
  bench::competitor ours{
      "ours", [&](bench::stopwatch& watch) {
        clock_probe::time at[steps];
        under_test->forward(x, y, moeroute::serial{}, clock_probe{at});
        const auto ns = [&](moeroute::layer_step step) {
          const auto i = static_cast<int>(step);
          return std::chrono::duration<double, std::nano>(at[i + 1] - at[i]).count();
        };
        using step = moeroute::layer_step;
        const double total =
            std::chrono::duration<double, std::nano>(at[steps - 1] - at[0]).count();
        const double part =
            ns(step::route) + ns(step::plan) + ns(step::dispatch) + ns(step::combine);
        all.add(total, tokens);
        routing.add(part, tokens);
        watch.add(whole ? total : part, tokens);
      }};
  const index_t read =
      tokens == 1 ? work * 4 : 0;  // a single token: as many weights as multiply-adds
  const auto weights = bench::hidden_states<float>(read / 4, 1);
  std::int32_t kept = 0;
  bench::competitor floor{
      "floor", [&](bench::stopwatch& watch) {
        if (whole && tokens == 1) {
          watch.time(1, [&] {
            kept |= bench::read_pass(weights.data(), read);
            benchmark::DoNotOptimize(kept);
          });
        } else if (whole) {
          // A slice of the arithmetic that fits a chunk.
          const index_t few = index_t{1} << 20;
          bench::stopwatch slice;
          const double ns =
              slice.time(1, [&] { benchmark::DoNotOptimize(bench::multiply_adds(few)); });
          watch.add(ns * static_cast<double>(work) / static_cast<double>(few), 1);
        } else {
          watch.time(tokens, [&] {
            std::memcpy(to.data(), from.data(),
                        static_cast<std::size_t>(tokens * moved) * sizeof(float));
          });
        }
      }};
  std::vector<bench::competitor> list{ours, floor};
  bench::compete(state, static_cast<double>(2 * moved * 4), std::move(list));
  state.counters["routing_share"] = routing.median() / all.median();
}

// A call at decode without what its gate and its experts do: logits are given, and the experts
// leave their output as it is. Beside it the stages that are in it, called one after the other:
// what they cost beyond the combine's reading of k rows is reported apart.
void decode(benchmark::State& state, index_t tokens, index_t d, index_t experts, index_t k) {
  bool fills = true;
  const auto nothing = [&fills](moeroute::expert_id, auto, auto out) {
    for (index_t r = 0; fills && r < out.rows; ++r) std::fill_n(out.row(r), out.cols, 1.0f);
  };
  const router gate{{}, {.k = k}, moeroute::sum_normalized};
  moeroute::moe_layer layer(moeroute::no_gate(experts), gate, nothing, {.d = d});
  constexpr index_t calls = 64;
  const matrix x = matrix::Random(tokens, d), logits = matrix::Random(calls * tokens, experts);
  matrix y(tokens, d);
  const auto from = bench::hidden_states<float>(tokens * k, d);
  const auto forward = [&](index_t call) {
    layer.forward_logits(moeroute::const_view(x),
                         moeroute::matrix_view<const float>(logits.data() + call * tokens * experts,
                                                            tokens, experts),
                         y);
  };
  for (index_t i = 0; i < calls; ++i) forward(i);
  fills = false;
  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;
  const auto slots = bench::hidden_states<float>(tokens * k, d);
  const auto stages = [&](index_t call) {
    moeroute::route(gate,
                    moeroute::matrix_view<const float>(logits.data() + call * tokens * experts,
                                                       tokens, experts),
                    workspace, choices);
    moeroute::plan(choices, plan);
    moeroute::combine(moeroute::matrix_view<const float>(slots.data(), tokens * k, d), plan,
                      choices, y);
  };
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", [&](bench::stopwatch& watch) {
                    watch.time(calls * tokens, [&] {
                      for (index_t i = 0; i < calls; ++i) forward(i);
                    });
                  }});
  list.push_back({"stages", [&](bench::stopwatch& watch) {
                    watch.time(calls * tokens, [&] {
                      for (index_t i = 0; i < calls; ++i) stages(i);
                    });
                  }});
  list.push_back({"floor", [&](bench::stopwatch& watch) {
                    watch.time(calls * tokens, [&] {
                      for (index_t i = 0; i < calls; ++i) {
                        kept |= bench::read_pass(from.data(), tokens * k * d * 4);
                        benchmark::DoNotOptimize(kept);
                      }
                    });
                  }});
  bench::compete(state, static_cast<double>(k * d * 4), std::move(list));
  state.counters["ns_beyond_reading"] =
      state.counters["stages_ns_per_token"].value - state.counters["floor_ns_per_token"].value;
}

void add(bool whole, index_t tokens, const shape& s) {
  const auto part = [](const char* letter, index_t n) {
    return std::string("/") + letter + ":" + std::to_string(n);
  };
  bench::entry(std::string("layer/") + (whole ? "whole" : "routing") + part("T", tokens) +
                   part("d", s.d) + part("ff", s.ff) + part("E", s.experts) + part("k", s.k),
               [=](benchmark::State& state) { layer(state, whole, tokens, s); });
}

const bool registered = [] {
  constexpr shape olmoe_like{1024, 512, 64, 8};
  for (const index_t tokens : {1, 64, 1024})
    for (const bool whole : {true, false}) add(whole, tokens, olmoe_like);
  for (const index_t tokens : {1, 4})
    for (const index_t experts : {8, 128, 256})
      bench::entry("layer/decode/T:" + std::to_string(tokens) +
                       "/d:2048/E:" + std::to_string(experts) +
                       "/k:" + std::to_string(std::min<index_t>(8, experts / 4)),
                   [=](benchmark::State& state) {
                     decode(state, tokens, 2048, experts, std::min<index_t>(8, experts / 4));
                   });
  return true;
}();

}  // namespace
