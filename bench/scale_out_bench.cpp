// Experts over ranks: plans and moves of an exchange without a network, and the planners.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/spill.hpp>
#include <moeroute/placement/split.hpp>
#include <moeroute/placement/traffic.hpp>
#include <moeroute/stage/exchange.hpp>
#include <moeroute/stage/resolve.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/moving.hpp"

namespace {

using bench::index_t;
using moeroute::expert_id;
using moeroute::slot_id;

std::string part(const char* letter, index_t n) {
  return std::string("/") + letter + ":" + std::to_string(n);
}

template <class F>
bench::turn whole(index_t units, F call) {
  return [=](bench::stopwatch& watch) { watch.time(units, call); };
}

// A rank's tokens, each expert with a replica on another rank.
struct traffic {
  index_t tokens, experts, k, ranks;
  moeroute::assignment choices;
  moeroute::placement where;
  std::vector<std::int32_t> counts;
  std::vector<slot_id> slot;
  moeroute::workspace memory;

  traffic(index_t t, index_t e, index_t best, index_t r)
      : tokens(t),
        experts(e),
        k(best),
        ranks(r),
        choices(bench::make_assignment("normal", t, e, best)),
        slot(static_cast<std::size_t>(t * best)) {
    std::vector<expert_id> slots;
    for (index_t i = 0; i < ranks; ++i)
      for (index_t s = 0; s < 2 * experts / ranks; ++s)
        slots.push_back(static_cast<expert_id>((i * experts / ranks + s) % experts));
    where = moeroute::placement::from_slots(experts, ranks, slots);
    std::vector<std::int32_t> own(static_cast<std::size_t>(experts));
    moeroute::count_choices(choices, own);
    for (index_t i = 0; i < ranks; ++i) counts.insert(counts.end(), own.begin(), own.end());
    resolve(moeroute::replica_rule::nearest);
  }
  void resolve(moeroute::replica_rule rule) {
    moeroute::resolve(choices, where, 1, {.rule = rule, .counts = counts}, memory, slot);
  }
};

// The floor: a counting sort of the same keys, ranks of slots.
void exchange_plan(benchmark::State& state, index_t tokens, index_t ranks) {
  traffic t(tokens, 256, 8, ranks);
  const index_t n = tokens * t.k;
  moeroute::exchange_plan plan;
  std::vector<std::int32_t> key(static_cast<std::size_t>(n)),
      count(static_cast<std::size_t>(ranks)), first(count), sorted(key);
  for (index_t c = 0; c < n; ++c)
    key[static_cast<std::size_t>(c)] =
        t.where.rank_of_slot()[static_cast<std::size_t>(t.slot[static_cast<std::size_t>(c)])];
  bench::compete(
      state, 4.0,
      {{"ours", whole(n, [&] { moeroute::plan_exchange(t.choices, t.slot, t.where, plan); })},
       {"floor", whole(n, [&] {
          bench::histogram(key.data(), n, ranks, count.data());
          bench::clear_and_scan(ranks, count.data(), first.data());
          for (index_t c = 0; c < n; ++c)
            sorted[static_cast<std::size_t>(
                first[static_cast<std::size_t>(key[static_cast<std::size_t>(c)])]++)] =
                static_cast<std::int32_t>(c);
        })}});
}

// The floor: a table looked up for each choice.
void resolve(benchmark::State& state, index_t tokens, moeroute::replica_rule rule) {
  traffic t(tokens, 256, 8, 64);
  const index_t n = tokens * t.k;
  std::vector<slot_id> table(256, 3);
  bench::compete(state, 4.0,
                 {{"ours", whole(n, [&] { t.resolve(rule); })},
                  {"floor", whole(n, [&] {
                     const auto ids = t.choices.ids();
                     for (std::size_t c = 0; c < ids.size(); ++c)
                       t.slot[c] = table[static_cast<std::size_t>(ids[c])];
                   })}});
}

// Rows out as the plan says and results back into the order of entries; the floor copies as much.
void pack_and_unpack(benchmark::State& state, index_t tokens, index_t d) {
  traffic t(tokens, 64, 8, 8);
  moeroute::exchange_plan plan;
  moeroute::plan_exchange(t.choices, t.slot, t.where, plan);
  const auto x = bench::hidden_states<float>(tokens, d);
  const auto results = bench::hidden_states<float>(plan.entries(), d);
  moeroute::buffer<float> rows(plan.rows() * d), back(plan.entries() * d);
  std::vector<slot_id> order(static_cast<std::size_t>(plan.entries()));
  for (index_t i = 0; i < plan.entries(); ++i)
    order[static_cast<std::size_t>(i)] = static_cast<slot_id>(plan.entries() - 1 - i);
  const auto view = [d](auto& of, index_t n) { return moeroute::matrix_view(of.data(), n, d); };
  bench::compete(state, 4.0 * static_cast<double>(d * (plan.rows() + plan.entries()) / tokens),
                 {{"ours", whole(tokens,
                                 [&] {
                                   moeroute::gather_rows(view(x, tokens), plan.row_token(),
                                                         view(rows, plan.rows()));
                                   moeroute::gather_rows(view(results, plan.entries()), order,
                                                         view(back, plan.entries()));
                                 })},
                  {"floor", whole(tokens, [&] {
                     for (index_t done = 0; done < plan.rows(); done += tokens)
                       std::memcpy(rows.data() + done * d, x.data(),
                                   sizeof(float) * static_cast<std::size_t>(
                                                       d * std::min(tokens, plan.rows() - done)));
                     std::memcpy(back.data(), results.data(),
                                 sizeof(float) * static_cast<std::size_t>(results.size()));
                   })}});
}

// --- planners, per layer ----------------------------------------------------------------------

struct layer_loads {
  std::vector<double> load;
  std::vector<std::int64_t> count;
  explicit layer_loads(index_t experts, double zipf = 1.2) {
    const moeroute::expert_traffic t({.experts = experts, .zipf = zipf});
    for (const double p : t.popularity()) {
      load.push_back(32768.0 * p);
      count.push_back(static_cast<std::int64_t>(load.back()));
    }
  }
};

template <class F>
void planner(benchmark::State& state, index_t slots, F call) {
  // The floor: as many loads sorted.
  std::vector<double> some(static_cast<std::size_t>(slots)), sorted;
  for (std::size_t i = 0; i < some.size(); ++i)
    some[i] = static_cast<double>((i * 7919) % some.size());
  bench::compete(state, 8.0 * static_cast<double>(slots),
                 {{"ours", whole(1, call)}, {"floor", whole(1, [&] {
                                               sorted = some;
                                               std::sort(sorted.begin(), sorted.end());
                                             })}});
}

void add_eplb(index_t experts, index_t ranks, index_t slots) {
  bench::entry("eplb" + part("E", experts) + part("R", ranks) + part("P", slots),
               [=](benchmark::State& state) {
                 const layer_loads l(experts);
                 planner(state, slots, [&] {
                   benchmark::DoNotOptimize(moeroute::eplb(l.load, slots, 1, 1, ranks));
                 });
               });
}

const bool registered = [] {
  for (const index_t ranks : {8, 64})
    bench::entry("exchange_plan/T:4096/E:256/k:8" + part("R", ranks),
                 [=](benchmark::State& state) { exchange_plan(state, 4096, ranks); });
  bench::entry("resolve/nearest/T:4096/E:256/k:8/R:64", [](benchmark::State& state) {
    resolve(state, 4096, moeroute::replica_rule::nearest);
  });
  bench::entry("resolve/even/T:4096/E:256/k:8/R:64",
               [](benchmark::State& state) { resolve(state, 4096, moeroute::replica_rule::even); });
  for (const index_t tokens : {64, 1024})
    bench::entry("pack_and_unpack" + part("T", tokens) + "/d:1024/k:8/R:8",
                 [=](benchmark::State& state) { pack_and_unpack(state, tokens, 1024); });
  add_eplb(256, 64, 320);
  add_eplb(512, 128, 640);
  add_eplb(1024, 256, 1280);
  add_eplb(2048, 1024, 3072);
  add_eplb(4096, 2048, 6144);
  bench::entry("search_placement/E:256/R:64/P:320", [](benchmark::State& state) {
    const layer_loads l(256);
    planner(state, 320,
            [&] { benchmark::DoNotOptimize(moeroute::search_placement(l.load, 320, 64)); });
  });
  bench::entry("spill/E:256/R:64", [](benchmark::State& state) {
    const layer_loads l(256);
    planner(state, 256, [&] { benchmark::DoNotOptimize(moeroute::spill(l.count, 64)); });
  });
  bench::entry("balance_exactly/E:256/R:64", [](benchmark::State& state) {
    const layer_loads l(256);
    planner(state, 256, [&] { benchmark::DoNotOptimize(moeroute::balance_exactly(l.count, 64)); });
  });
  bench::entry("split_optimal/E:256/R:64/P:320", [](benchmark::State& state) {
    const layer_loads l(256);
    const moeroute::placement p = moeroute::eplb_plan(l.load, 320, 64).experts;
    planner(state, 320, [&] { benchmark::DoNotOptimize(moeroute::split_optimal(p, l.count)); });
  });
  bench::entry("replan/E:256/R:32/P:288", [](benchmark::State& state) {
    moeroute::expert_traffic t({.experts = 256, .zipf = 1.2, .drift = 0.1});
    const std::vector<double> before(t.popularity().begin(), t.popularity().end());
    const moeroute::placement p = moeroute::eplb_plan(before, 288, 32).experts;
    t.advance();
    const std::vector<double> after(t.popularity().begin(), t.popularity().end());
    planner(state, 288, [&] { benchmark::DoNotOptimize(moeroute::replan(p, after)); });
  });
  return true;
}();

}  // namespace
