// What giving way to memory costs: rules against the router alone, unions, the cache per access,
// miss curves and groups.
#include <algorithm>
#include <list>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <moeroute/data/expert_cache.hpp>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/residency/regroup.hpp>
#include <moeroute/residency/resident_router.hpp>
#include <moeroute/residency/union.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/shapes.hpp"

namespace {

using namespace moeroute;
using kind = residency_kind;

constexpr index_t rows = 4096;

struct rule_case {
  const char* name;
  residency_rule rule;
};

// `router` against the plain one on calls of `step` tokens; half of the experts are in memory.
template <class Make>
void against_plain(benchmark::State& state, index_t experts, index_t k, index_t step, Make make) {
  buffer<float> logits(rows * experts);
  bench::fill("normal", rows, experts, logits.data());
  const router<softmax> plain{.score = {}, .selection = {.k = k}, .weight = sum_normalized};
  resident_set set(experts);
  for (expert_id e = 0; e < experts; e += 2) set.insert(e);
  const auto moved = make(plain, set);
  workspace ws, other_ws;
  assignment choices, other;
  const bench::rotation turns(rows, experts * 4, step);
  const auto run = [&](const auto& r, workspace& memory, assignment& out, index_t first,
                       index_t n) {
    for (index_t t = 0; t < n; t += step)
      route(r, matrix_view<const float>(logits.data() + (first + t) * experts, step, experts),
            memory, out);
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(turns, 0.0, [&](index_t first, index_t n) {
                    run(moved, ws, choices, first, n);
                  })});
  list.push_back({"floor", bench::over(turns, 0.5, [&](index_t first, index_t n) {
                    run(plain, other_ws, other, first, n);
                  })});
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
}

void add_rules() {
  const rule_case rules[] = {
      {"prior", {.kind = kind::cache_prior, .strength = 0.1f}},
      {"max_rank", {.kind = kind::max_rank, .ranks = 12}},
      {"mass", {.kind = kind::mass_threshold, .strength = 0.7f, .ranks = 12}},
      {"swap", {.kind = kind::margin_swap, .strength = 0.1f}},
      {"drop", {.kind = kind::drop_cold, .strength = 0.2f}}};
  for (const auto& [experts, k] : {std::pair<index_t, index_t>{32, 4}, {64, 8}, {128, 8}})
    for (const index_t step : {1, 16})
      for (const rule_case& one : rules)
        bench::entry(std::string("residency/") + one.name + "/E:" + std::to_string(experts) +
                         "/k:" + std::to_string(k) + "/T:" + std::to_string(step),
                     [=, e = experts, n = k, rule = one.rule](benchmark::State& state) {
                       against_plain(state, e, n, step,
                                     [&](const auto& plain, const resident_set& set) {
                                       return resident_router(plain, rule, set.view());
                                     });
                     });
  for (const index_t step : {4, 16})
    bench::entry("residency/oea/E:64/k:8/T:" + std::to_string(step), [=](benchmark::State& state) {
      against_plain(state, 64, 8, step, [&](const auto& plain, const resident_set&) {
        return union_router(plain, {.k0 = 4});
      });
    });
}

// An LRU cache as one writes it with what the language brings.
struct list_cache {
  std::list<std::int32_t> order;
  std::unordered_map<std::int32_t, std::list<std::int32_t>::iterator> place;
  std::size_t capacity;

  index_t use(std::int32_t key) {
    if (const auto found = place.find(key); found != place.end()) {
      order.splice(order.begin(), order, found->second);
      return 1;
    }
    if (place.size() == capacity) {
      place.erase(order.back());
      order.pop_back();
    }
    order.push_front(key);
    place[key] = order.begin();
    return 0;
  }
};

std::vector<expert_id> accesses(index_t n, index_t experts, index_t k) {
  const auto drawn = bench::expert_ids("zipf", n, experts, k);
  return {drawn.data(), drawn.data() + drawn.size()};
}

void add_caches() {
  for (const cache_policy policy : live_policies)
    bench::entry(
        std::string("residency/cache_step/") + to_string(policy) + "/E:128/C:32",
        [=](benchmark::State& state) {
          constexpr index_t experts = 128, k = 8;
          const auto ids = accesses(rows, experts, k);
          expert_cache cache({.experts = experts, .capacity = 32, .policy = policy});
          list_cache plain{{}, {}, 32};
          const bench::rotation turns(rows, k * 4);
          std::vector<bench::competitor> list;
          // A unit is an access.
          const auto each = [&](auto f) {
            return [f, at = index_t{0}](bench::stopwatch& watch) mutable {
              constexpr index_t chunk = 256;
              watch.time(chunk * k, [&] { f(at, chunk); });
              at = (at + chunk) % rows;
            };
          };
          list.push_back(
              {"ours", each([&](index_t first, index_t n) {
                 for (index_t t = first; t < first + n; ++t)
                   benchmark::DoNotOptimize(
                       cache.step(std::span(ids).subspan(static_cast<std::size_t>(t * k), k)).hits);
               })});
          list.push_back({"baseline", each([&](index_t first, index_t n) {
                            for (index_t i = first * k; i < (first + n) * k; ++i)
                              benchmark::DoNotOptimize(plain.use(ids[static_cast<std::size_t>(i)]));
                          }),
                          true});
          bench::compete(state, 4.0, std::move(list));
        });
  bench::entry("residency/miss_curve/E:256/accesses:1e6", [](benchmark::State& state) {
    constexpr index_t experts = 256, k = 8, tokens = 125000;
    expert_trace trace(experts);
    assignment a;
    a.reset(tokens, experts, k);
    const auto ids = accesses(tokens, experts, k);
    std::copy(ids.begin(), ids.end(), a.ids().begin());
    trace.add(a);
    std::vector<bench::competitor> list;
    list.push_back({"ours", [&](bench::stopwatch& watch) {
                      watch.time(tokens * k, [&] { benchmark::DoNotOptimize(lru_hits(trace)); });
                    }});
    bench::compete(state, 4.0, std::move(list));
  });
  bench::entry("residency/regroup/sets:4096/E:64/batch:16", [](benchmark::State& state) {
    constexpr index_t experts = 64, k = 4;
    assignment a;
    a.reset(rows, experts, k);
    const auto ids = accesses(rows, experts, k);
    std::copy(ids.begin(), ids.end(), a.ids().begin());
    std::vector<bench::competitor> list;
    list.push_back({"ours", [&](bench::stopwatch& watch) {
                      watch.time(rows, [&] { benchmark::DoNotOptimize(regroup(a, 16)); });
                    }});
    bench::compete(state, k * 4.0, std::move(list));
  });
}

const bool registered = [] {
  add_rules();
  add_caches();
  return true;
}();

}  // namespace
