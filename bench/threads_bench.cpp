// route on two threads: the baseline is the same call on one.
#include <algorithm>
#include <string>
#include <vector>

#include <moeroute/exec/openmp.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/routing.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;

void route(benchmark::State& state, const moeroute::router_spec& spec, index_t tokens) {
  const bench::drawn_tensors tensors(spec, tokens);
  const moeroute::any_router router = moeroute::make_router(spec, tensors.view());
  const index_t calls = std::max<index_t>(1, 4096 / tokens);
  moeroute::buffer<float> logits(calls * tokens * spec.columns());
  bench::fill("normal", calls * tokens, spec.columns(), logits.data());
  moeroute::workspace workspace;
  moeroute::assignment choices;
  // Every turn is the calls of a rotation, one after the other and each timed.
  const auto on = [&](auto exec) -> bench::turn {
    return [&, exec](bench::stopwatch& watch) {
      for (index_t call = 0; call < calls; ++call)
        watch.time(tokens, [&] {
          moeroute::route(
              router,
              moeroute::matrix_view<const float>(logits.data() + call * tokens * spec.columns(),
                                                 tokens, spec.columns()),
              workspace, choices, exec);
        });
    };
  };
  bench::compete(state, static_cast<double>(spec.columns() * 4),
                 {{"ours", on(moeroute::openmp{2})}, {"baseline", on(moeroute::serial{})}});
}

const bool registered = [] {
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    const std::string name(entry.name);
    if (name != "qwen3_moe" && name != "deepseek_v3") continue;
    for (const index_t tokens : {16, 128, 256, 512, 1024, 4096, 16384})
      bench::entry("route/" + name + "/T:" + std::to_string(tokens) +
                       "/E:" + std::to_string(entry.spec.experts) +
                       "/k:" + std::to_string(entry.spec.k) + "/threads:2",
                   [=](benchmark::State& state) { route(state, entry.spec, tokens); });
  }
  return true;
}();

}  // namespace
