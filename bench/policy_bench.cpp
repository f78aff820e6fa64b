// route: logits to experts and weights, by every router of the catalogue and by plain families over
// E.
#include <algorithm>
#include <string>
#include <vector>

#include <moeroute/policy/catalog.hpp>

#include "support/logits.hpp"
#include "support/routing.hpp"

namespace {

using bench::index_t;
using moeroute::router_spec;

void route(benchmark::State& state, const router_spec& spec, index_t tokens,
           const std::string& shape, const std::string& mem) {
  const bench::logit_rows logits(shape, spec.columns(), mem, tokens);
  const bench::drawn_tensors tensors(spec, tokens);
  bench::compete_routing(state, spec, tensors.view(), tensors.token_ids, logits.row(0),
                         logits.turns);
}

void add(const std::string& router, const router_spec& spec, index_t tokens,
         const std::string& shape = "normal", const std::string& mem = "") {
  const std::string name = "route/" + router + "/T:" + std::to_string(tokens) +
                           "/E:" + std::to_string(spec.experts) + "/k:" + std::to_string(spec.k) +
                           "/shape:" + shape + (mem.empty() ? "" : "/mem:" + mem);
  bench::entry(name, [=](benchmark::State& state) {
    route(state, spec, tokens, shape, mem.empty() ? "l2" : mem);
  });
}

const bool registered = [] {
  const auto softmax = [](index_t experts, bool renormalised) {
    router_spec s{.experts = experts, .k = 8};
    if (renormalised) s.normalize = moeroute::normalization::sum;
    return s;
  };
  for (const index_t experts : {64, 128, 256, 512}) {
    add("softmax_renorm", softmax(experts, true), 1024);
    add("softmax_raw", softmax(experts, false), 1024);
  }
  add("softmax_renorm", softmax(256, true), 1024, "normal", "stream");
  for (const char* shape : {"bf16_rounded", "quantised", "masked", "zipf", "one_column"})
    add("softmax_renorm", softmax(256, true), 1024, shape);
  add("softmax_renorm", softmax(256, true), 1);

  std::vector<router_spec> seen;
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    const std::string name(entry.name);
    // Routers of the same fields cost the same: the first of them stands for all.
    if (std::find(seen.begin(), seen.end(), entry.spec) != seen.end()) continue;
    seen.push_back(entry.spec);
    add(name, entry.spec, 1024);
    if (name == "qwen3_moe" || name == "deepseek_v3") {
      for (const index_t tokens : {1, 4, 16, 64, 256}) add(name, entry.spec, tokens);
      add(name, entry.spec, 1024, "normal", "stream");
      add(name, entry.spec, 1024, "bf16_rounded");
    }
  }
  return true;
}();

}  // namespace
