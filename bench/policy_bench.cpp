// route: logits to experts and weights, by every router of the catalogue and by plain families over
// E.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/router.hpp>

#include "support/logits.hpp"
#include "support/routing.hpp"

namespace {

using bench::index_t;
using moeroute::router_spec;

void route_by(benchmark::State& state, const router_spec& spec, index_t tokens,
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
    route_by(state, spec, tokens, shape, mem.empty() ? "l2" : mem);
  });
}

// The gates of eight models, one for each way to route of those that most systems run.
std::vector<std::pair<std::string, router_spec>> eight_models() {
  std::vector<std::pair<std::string, router_spec>> list;
  for (const char* name :
       {"mixtral", "llama4_maverick", "gpt_oss", "olmoe", "qwen3_moe", "deepseek_v3", "qwen3_next"})
    list.emplace_back(name, moeroute::find_in_catalog(name)->spec);
  router_spec kimi = moeroute::find_in_catalog("deepseek_v3")->spec;
  kimi.experts = 384;
  kimi.groups = kimi.topk_group = 1;
  kimi.scale = 2.827f;
  list.emplace_back("kimi_k2", kimi);
  return list;
}

// One token of a named shape, beside one of normal rows by the same router: what the worst input
// costs.
void route_worst(benchmark::State& state, const router_spec& spec, const std::string& shape) {
  const bench::logit_rows logits(shape, spec.columns(), "l2", 1);
  const bench::logit_rows normal("normal", spec.columns(), "l2", 1);
  const bench::drawn_tensors tensors(spec, 1);
  const moeroute::any_router router = moeroute::make_router(spec, tensors.view());
  moeroute::workspace workspace;
  moeroute::assignment choices;
  const auto route_rows = [&](const bench::logit_rows& rows) {
    return [&](index_t first, index_t n) {
      for (index_t t = first; t < first + n; ++t) {
        moeroute::route(router, moeroute::matrix_view<const float>(rows.row(t), 1, spec.columns()),
                        workspace, choices);
        benchmark::DoNotOptimize(choices.ids().data());
      }
    };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(logits.turns, 0.0, route_rows(logits))});
  list.push_back({"normal", bench::over(normal.turns, 0.5, route_rows(normal))});
  bench::compete(state, logits.bytes(), std::move(list));
}

// What route() costs around the row itself: a token by the whole call, its workspace and assignment
// warm, beside the router's own way for one row.
void route_call(benchmark::State& state, const router_spec& spec) {
  const bench::logit_rows logits("normal", spec.columns(), "l2", 1);
  const bench::drawn_tensors tensors(spec, 1);
  const moeroute::any_router router = moeroute::make_router(spec, tensors.view());
  const auto rows = router.as_token_router();
  moeroute::workspace workspace;
  moeroute::assignment choices;
  std::vector<moeroute::expert_id> id(static_cast<std::size_t>(spec.k));
  std::vector<float> weight(id.size());
  const auto call = [&](index_t first, index_t n) {
    for (index_t t = first; t < first + n; ++t) {
      moeroute::route(router, moeroute::matrix_view<const float>(logits.row(t), 1, spec.columns()),
                      workspace, choices);
      benchmark::DoNotOptimize(choices.ids().data());
    }
  };
  const auto kernel = [&](index_t first, index_t n) {
    for (index_t t = first; t < first + n; ++t) {
      rows.route_row(logits.row(t), spec.columns(), 0, moeroute::no_side_inputs, id.data(),
                     weight.data());
      benchmark::DoNotOptimize(id.data());
    }
  };
  call(0, 1);
  kernel(0, 1);
  if (!std::ranges::equal(choices.ids(), id) || !std::ranges::equal(choices.weights(), weight)) {
    state.SkipWithError("differs from the row alone");
    return;
  }
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(logits.turns, 0.0, call)});
  list.push_back({"kernel", bench::over(logits.turns, 0.5, kernel)});
  bench::compete(state, logits.bytes(), std::move(list));
  state.counters["ns_over_kernel"] =
      state.counters["ns_per_token"].value - state.counters["kernel_ns_per_token"].value;
}

// A router that does not take bfloat16 logits as they are: the stage widens them for it.
struct widened_router {
  moeroute::router<moeroute::softmax> inner;

  index_t k() const { return inner.k(); }
  static index_t experts(index_t columns) { return columns; }
  void check(index_t columns) const { inner.check(columns); }
  auto carve(moeroute::scratch& tape, index_t columns) const { return inner.carve(tape, columns); }
  template <class Memory>
  void route_block(const moeroute::logit_block& z, const Memory& memory,
                   moeroute::choice_block& c) const {
    inner.route_block(z, memory, c);
  }
};

// Logits in bfloat16. Floor: the SIMD max over the same 16-bit rows. Baseline: the same router on
// rows that are widened first.
void route_bfloat16(benchmark::State& state, moeroute::weight_rule weight, index_t tokens,
                    index_t experts) {
  using moeroute::bfloat16;
  const bench::logit_rows logits("normal", experts, "l2", tokens);
  const index_t units = logits.turns.units;
  moeroute::buffer<bfloat16> narrow(units * experts);
  moeroute::simd::convert_row(logits.values.data(), units * experts, narrow.data());
  const moeroute::router<moeroute::softmax> router{.selection = {.k = 8}, .weight = weight};
  moeroute::workspace memory, other_memory;
  moeroute::assignment choices, other;
  const auto route_to = [&](const auto& how, moeroute::workspace& ws, moeroute::assignment& out) {
    return [&, tokens, experts](index_t first, index_t n) {
      for (index_t t = first; t < first + n; t += tokens) {
        moeroute::route(
            how,
            moeroute::matrix_view<const bfloat16>(narrow.data() + t * experts, tokens, experts), ws,
            out);
        benchmark::DoNotOptimize(out.ids().data());
      }
    };
  };
  const widened_router widened{router};
  const auto ours = route_to(router, memory, choices);
  const auto baseline = route_to(widened, other_memory, other);
  ours(0, tokens);
  baseline(0, tokens);
  if (!std::ranges::equal(choices.ids(), other.ids()) ||
      !std::ranges::equal(choices.weights(), other.weights())) {
    state.SkipWithError("differs from routing the widened rows");
    return;
  }
  moeroute::buffer<std::int16_t> best(8 * units);
  const bench::rotation turns(units, experts * static_cast<index_t>(sizeof(bfloat16)), tokens);
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(turns, 0.0, ours)});
  list.push_back({"floor", bench::over(turns.row_by_row(), 1.0 / 3, [&](index_t first, index_t n) {
                    bench::max_of_rows(narrow.data() + first * experts, n, experts, best.data());
                  })});
  list.push_back({"baseline", bench::over(turns, 2.0 / 3, baseline)});
  bench::compete(state, static_cast<double>(turns.unit_bytes), std::move(list));
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
  for (const index_t experts : {64, 128, 256, 512})
    for (const bool renormalised : {true, false}) {
      if (!renormalised && experts != 256) continue;
      const std::string name = std::string("route/softmax_") + (renormalised ? "renorm" : "raw") +
                               "/T:1024/E:" + std::to_string(experts) +
                               "/k:8/shape:normal/dtype:bf16";
      bench::entry(name, [=](benchmark::State& state) {
        route_bfloat16(state, renormalised ? moeroute::sum_normalized : moeroute::raw_weights, 1024,
                       experts);
      });
    }

  std::vector<router_spec> seen;
  for (const auto& [name, spec] : eight_models()) {
    seen.push_back(spec);
    for (const index_t tokens : {1, 2, 4, 8, 16, 64, 1024}) add(name, spec, tokens);
    const std::string size =
        name + "/T:1/E:" + std::to_string(spec.experts) + "/k:" + std::to_string(spec.k);
    bench::entry("route_call/" + size, [=](benchmark::State& state) { route_call(state, spec); });
    for (const char* shape : {"all_equal", "ascending", "half_nan", "masked", "one_column"})
      bench::entry("route_worst/" + size + "/shape:" + shape,
                   [=](benchmark::State& state) { route_worst(state, spec, shape); });
  }
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    const std::string name(entry.name);
    // Routers of the same fields cost the same: the first of them stands for all.
    if (name == "qwen3_moe" || name == "deepseek_v3") {
      add(name, entry.spec, 256);
      add(name, entry.spec, 1024, "normal", "stream");
      add(name, entry.spec, 1024, "bf16_rounded");
    }
    if (std::find(seen.begin(), seen.end(), entry.spec) != seen.end()) continue;
    seen.push_back(entry.spec);
    add(name, entry.spec, 1024);
  }
  return true;
}();

}  // namespace
