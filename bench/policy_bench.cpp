// route: logits to experts and weights, by the routers of real models and by plain families over E.
#include <algorithm>
#include <string>
#include <vector>

#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/logits.hpp"
#include "support/plain_gate.hpp"

namespace {

using bench::index_t;
using bench::plain_divisor;

template <class Router>
void route(benchmark::State& state, const Router& router, plain_divisor divisor, index_t tokens,
           index_t experts, const std::string& shape, const std::string& mem) {
  const bench::logit_rows logits(shape, experts, mem, tokens);
  const index_t k = router.k();
  moeroute::workspace workspace;
  moeroute::assignment choices;
  bench::plain_selection plain;
  std::vector<std::int32_t> id(static_cast<std::size_t>(logits.turns.chunk * k));
  std::vector<float> weight(id.size());
  moeroute::buffer<float> best(logits.turns.units);
  const auto ours = [&](index_t first) {
    moeroute::route(router, moeroute::matrix_view<const float>(logits.row(first), tokens, experts),
                    workspace, choices);
    benchmark::DoNotOptimize(choices.ids().data());
  };
  const auto baseline = [&](index_t first, index_t n) {
    for (index_t t = 0; t < n; ++t)
      bench::plain_softmax_gate(plain, logits.row(first + t), experts, k, divisor,
                                id.data() + t * k, weight.data() + t * k);
    benchmark::DoNotOptimize(id.data());
  };
  ours(0);
  baseline(0, tokens);
  if (!std::equal(choices.ids().begin(), choices.ids().end(), id.begin())) {
    state.SkipWithError("differs from the plain gate");
    return;
  }

  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(logits.turns, 0.0, [&](index_t first, index_t n) {
                    for (index_t t = first; t < first + n; t += tokens) ours(t);
                  })});
  const bench::rotation rows = logits.turns.row_by_row();
  list.push_back({"floor", bench::over(rows, 1.0 / 3, [&](index_t first, index_t n) {
                    bench::max_of_rows(logits.row(first), n, experts, best.data());
                  })});
  list.push_back({"baseline", bench::over(rows, 2.0 / 3, baseline)});
  bench::compete(state, logits.bytes(), std::move(list));
}

template <class Router>
void add(const std::string& router_name, const Router& router, plain_divisor divisor,
         index_t tokens, index_t experts, const std::string& shape = "normal",
         const std::string& mem = "") {
  const std::string name = "route/" + router_name + "/T:" + std::to_string(tokens) +
                           "/E:" + std::to_string(experts) + "/k:" + std::to_string(router.k()) +
                           "/shape:" + shape + (mem.empty() ? "" : "/mem:" + mem);
  bench::entry(name, [=](benchmark::State& state) {
    route(state, router, divisor, tokens, experts, shape, mem.empty() ? "l2" : mem);
  });
}

const bool registered = [] {
  namespace m = moeroute;
  const auto renormalised = [](index_t k) {
    return m::router<m::softmax>{{}, {.k = k}, m::sum_normalized};
  };
  const auto raw = [](index_t k) { return m::router<m::softmax>{{}, {.k = k}, m::raw_weights}; };
  const auto selected = [](index_t k) {
    return m::router<m::softmax_selected>{{}, {.k = k}, m::raw_weights};
  };
  for (const index_t experts : {64, 128, 256, 512}) {
    add("softmax_renorm", renormalised(8), plain_divisor::winners, 1024, experts);
    add("softmax_raw", raw(8), plain_divisor::row, 1024, experts);
  }
  add("softmax_renorm", renormalised(8), plain_divisor::winners, 1024, 256, "normal", "stream");
  for (const char* shape : {"bf16_rounded", "quantised", "masked", "zipf", "one_column"})
    add("softmax_renorm", renormalised(8), plain_divisor::winners, 1024, 256, shape);
  add("softmax_renorm", renormalised(8), plain_divisor::winners, 1, 256);

  add("mixtral", selected(2), plain_divisor::winners, 1024, 8);
  add("olmoe", raw(8), plain_divisor::row, 1024, 64);
  add("gpt_oss", selected(4), plain_divisor::winners, 1024, 128);
  add("qwen3_next", renormalised(10), plain_divisor::winners, 1024, 512);
  for (const index_t tokens : {1, 4, 16, 64, 256, 1024})
    add("qwen3_moe", renormalised(8), plain_divisor::winners, tokens, 128);
  return true;
}();

}  // namespace
