// Every planner against its vectors, against brute force where that is possible, and by what each
// promises of any loads.
#include <algorithm>
#include <array>
#include <catch2/catch_test_macros.hpp>
#include <fstream>
#include <functional>
#include <moeroute/base/linear_assignment.hpp>
#include <moeroute/placement/affinity.hpp>
#include <moeroute/placement/cost.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/failover.hpp>
#include <moeroute/placement/grouping.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/shadow.hpp>
#include <moeroute/placement/spill.hpp>
#include <moeroute/placement/split.hpp>
#include <moeroute/placement/traffic.hpp>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"

namespace planners_test {

using namespace moeroute;

namespace {

using json = nlohmann::json;

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

json cases(const std::string& name) {
  std::ifstream in(std::string(MOEROUTE_TEST_DATA "/golden/placement/") + name + ".json");
  return json::parse(in)["cases"];
}

template <class T>
std::vector<T> list(const json& j) {
  return j.is_null() ? std::vector<T>{} : j.get<std::vector<T>>();
}

bool near(double a, double b) { return std::abs(a - b) <= 1e-9 * (1.0 + std::abs(b)); }

std::vector<expert_id> slots_of(const placement& p) {
  return {p.expert_of_slot().begin(), p.expert_of_slot().end()};
}

// Zipf(s) loads in shuffled order with noise.
std::vector<double> zipf_loads(index_t experts, double s, std::uint64_t seed, double noise = 0.15) {
  test::random rng(seed);
  std::vector<double> w;
  for (index_t e = 0; e < experts; ++e)
    w.push_back(1e5 * std::pow(double(e + 1), -s) * (1.0 + noise * double(rng.uniform() * 2 - 1)));
  for (index_t e = experts - 1; e > 0; --e) std::swap(w[at(e)], w[at(rng.below(e + 1))]);
  return w;
}

std::vector<std::int64_t> random_counts(test::random& rng, index_t n, bool heavy) {
  std::vector<std::int64_t> c;
  for (index_t e = 0; e < n; ++e) {
    const double u = double(rng.uniform()) + 1e-3;
    c.push_back(static_cast<std::int64_t>(heavy ? 20.0 * std::pow(u, -1.25) : 100.0 * u) *
                (rng.below(9) == 0 ? 0 : 1));
  }
  return c;
}

// The smallest max of rank loads over all placements of P slots, even shares, by trying them all.
double best_placement(const std::vector<double>& w, index_t slots, index_t ranks) {
  const auto experts = static_cast<index_t>(w.size());
  std::vector<index_t> count(w.size(), 1);
  double best = 1e300;
  const index_t room = slots / ranks;
  const std::function<void(std::size_t, std::vector<double>&, std::vector<index_t>&,
                           std::vector<index_t>&)>
      place = [&](std::size_t i, std::vector<double>& load, std::vector<index_t>& filled,
                  std::vector<index_t>& item) {
        if (i == item.size()) {
          best = std::min(best, *std::max_element(load.begin(), load.end()));
          return;
        }
        const double x = w[at(item[i])] / double(count[at(item[i])]);
        for (std::size_t r = 0; r < load.size(); ++r) {
          if (filled[r] == room || load[r] + x >= best) continue;
          load[r] += x;
          ++filled[r];
          place(i + 1, load, filled, item);
          load[r] -= x;
          --filled[r];
          if (filled[r] == 0) break;  // empty ranks are alike
        }
      };
  const std::function<void(index_t, index_t)> counts = [&](index_t e, index_t left) {
    if (e == experts - 1) {
      count[at(e)] = 1 + left;
      std::vector<double> load(at(ranks), 0.0);
      std::vector<index_t> filled(at(ranks), 0), item;
      for (index_t i = 0; i < experts; ++i) item.insert(item.end(), at(count[at(i)]), i);
      place(0, load, filled, item);
      return;
    }
    for (index_t more = 0; more <= left; ++more) {
      count[at(e)] = 1 + more;
      counts(e + 1, left - more);
    }
  };
  counts(0, slots - experts);
  return best;
}

}  // namespace

TEST_CASE("eplb gives the published arrays, ties either way") {
  for (const json& one : cases("eplb")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    const auto weight = list<double>(in["weight"]);
    const eplb_result r = eplb(weight, in["slots"], in["groups"], in["nodes"], in["ranks"]);
    std::vector<std::vector<expert_id>> right{list<expert_id>(out["expert_of_slot"])};
    if (one.contains("alternatives"))
      right = one["alternatives"].get<std::vector<std::vector<expert_id>>>();
    CHECK(std::find(right.begin(), right.end(), r.expert_of_slot) != right.end());
    CHECK(r.replicas == list<index_t>(out["replicas"]));
    if (r.expert_of_slot == list<expert_id>(out["expert_of_slot"])) {
      std::vector<slot_id> flat;
      for (const json& row : out["slots_of_expert"])
        for (const json& s : row) flat.push_back(s);
      CHECK(r.slots_of_expert == flat);
    }
    const placement_plan plan =
        eplb_plan(weight, in["slots"], in["ranks"], in["groups"], in["nodes"]);
    CHECK(near(plan.balance.imbalance, out["imbalance"]));
    const auto want = list<double>(out["rank_load"]);
    for (std::size_t i = 0; i < want.size(); ++i) CHECK(near(plan.rank_load[i], want[i]));
  }
}

TEST_CASE("the search reaches the vectors' maxima, and the optimum where they give it") {
  for (const json& one : cases("refine")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    const auto w = list<double>(in["weight"]);
    const index_t slots = in["slots"], ranks = in["ranks"];
    const packing wide = search_packing(
        w, slots, ranks, {.candidates = 0, .distinct = false, .swaps = false, .kicks = 0});
    CHECK(near(wide.max_load, out["search_max"]));
    CHECK(wide.count == list<index_t>(out["search_replicas"]));
    const packing swapped =
        search_packing(w, slots, ranks, {.candidates = 0, .distinct = false, .kicks = 0});
    CHECK(near(swapped.max_load, out["after_swaps_max"]));
    CHECK(replicate(w, slots, slots) == list<index_t>(out["eplb_replicas"]));
    CHECK(near(eplb_plan(w, slots, ranks).balance.max_load, out["eplb_max"]));
    const placement_plan ours = search_placement(w, slots, ranks, {.candidates = 0});
    CHECK(ours.balance.max_load <= out["search_max"].get<double>() + 1e-9);
    CHECK(ours.balance.max_load >= out["optimum_max"].get<double>() - 1e-9);
    CHECK(ours.experts.duplicates().empty());
    if (slots < 16) CHECK(near(best_placement(w, slots, ranks), out["optimum_max"]));
    CHECK(ours.lower_bound <= out["optimum_max"].get<double>() + 1e-9);
  }
}

TEST_CASE("splits are as small as the vectors say, and partition every expert") {
  for (const json& one : cases("split")) {
    const json& in = one["input"];
    if (in["rule"] != "optimal") continue;
    INFO(one["name"].get<std::string>());
    const auto count = list<std::int64_t>(in["load"]);
    const placement p = placement::from_slots(static_cast<index_t>(count.size()), in["ranks"],
                                              list<expert_id>(in["expert_of_slot"]));
    const slot_split s = split_optimal(p, count);
    CHECK(s.max_load == one["output"]["smallest_max"].get<std::int64_t>());
    for (index_t e = 0; e < p.experts(); ++e) {
      std::int64_t sum = 0;
      for (const slot_id i : p.slots_of_expert(e)) sum += s.of_slot[at(i)];
      CHECK(sum == count[at(e)]);
    }
  }
}

TEST_CASE("an optimal split is as even as any: what a set of ranks alone can serve bounds it") {
  // By max flow and min cut: the greatest, over sets of ranks, of the mean load of experts that
  // live nowhere else.
  test::random rng(12);
  constexpr index_t experts = 8, ranks = 6, slots = 12;
  index_t further = 0;
  for (int draw = 0; draw < 200; ++draw) {
    std::vector<expert_id> of;
    for (index_t i = 0; i < slots; ++i)
      of.push_back(static_cast<expert_id>(i < experts ? i : rng.below(experts)));
    for (index_t i = slots - 1; i > 0; --i) std::swap(of[at(i)], of[at(rng.below(i + 1))]);
    const placement p = placement::from_slots(experts, ranks, of);
    std::vector<std::int64_t> count;
    for (index_t e = 0; e < experts; ++e)
      count.push_back(rng.below(10) * (rng.below(3) == 0 ? 30 : 1));
    std::int64_t bound = 0;
    for (unsigned set = 1; set < 1u << ranks; ++set) {
      std::int64_t inside = 0, size = 0;
      for (index_t r = 0; r < ranks; ++r) size += set >> r & 1u;
      for (index_t e = 0; e < experts; ++e) {
        bool only_here = true;
        for (const slot_id s : p.slots_of_expert(e))
          only_here = only_here && (set >> p.rank_of_slot()[at(s)] & 1u) != 0;
        inside += only_here ? count[at(e)] : 0;
      }
      bound = std::max(bound, (inside + size - 1) / size);
    }
    CHECK(split_optimal(p, count).max_load == bound);
    further += split_by_filling(p, count).max_load > bound ? 1 : 0;
  }
  CHECK(further > 0);  // some need more than filling
  // Where no rank lives and no token comes nobody has a load.
  const std::vector<std::uint8_t> nobody(2, 0);
  const placement lost =
      placement::from_slots(4, 2, std::vector<expert_id>{0, 1, 2, 3}, {}, nobody);
  CHECK(split_optimal(lost, std::vector<std::int64_t>(4)).max_load == 0);
}

TEST_CASE("a split is even where ranks can share evenly, though filling does not find it") {
  const placement p =
      placement::from_slots(6, 4, std::vector<expert_id>{0, 1, 2, 3, 4, 5, 1, 2, 3, 3, 5, 5});
  for (const std::int64_t scale : {1, 2, 1000}) {
    const std::vector<std::int64_t> count{0,          10 * scale, 6 * scale,
                                          10 * scale, 8 * scale,  2 * scale};
    CHECK(split_by_filling(p, count).max_load > 9 * scale);
    CHECK(split_optimal(p, count).max_load == 9 * scale);
  }
}

TEST_CASE("spilling gives the vectors' ranges, moves and loads") {
  for (const json& one : cases("llep")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    spill_options o{
        .alpha_num = in["alpha"][0], .alpha_den = in["alpha"][1], .min_rows = in["min_rows"]};
    if (!in["lambda_"].is_null()) o.lambda = in["lambda_"];
    const batch_plan plan = spill(list<std::int64_t>(in["load"]), in["ranks"], o);
    CHECK(plan.enabled == out["enabled"].get<bool>());
    CHECK(plan.load == list<std::int64_t>(out["load"]));
    if (plan.enabled) {
      CHECK(plan.cap == out["cap"].get<std::int64_t>());
      CHECK(plan.forced == out["forced"].get<index_t>());
    }
    std::vector<expert_move> moves;
    for (const json& m : out["moves"]) moves.push_back({m[0], m[1], m[2]});
    CHECK(plan.moves == moves);
    for (std::size_t e = 0; e < plan.range.size(); ++e) {
      std::vector<rank_range> want;
      for (const json& r : out["ranges"][std::to_string(e)]) want.push_back({r[0], r[1], r[2]});
      CHECK(plan.range[e] == want);
    }
  }
}

TEST_CASE("exact balance gives the vectors' fills and allocation") {
  for (const json& one : cases("exact_balance")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    const index_t ranks = in["ranks"];
    std::vector<std::int64_t> count(in["tokens_per_expert"][0].size(), 0);
    for (const json& row : in["tokens_per_expert"])
      for (std::size_t e = 0; e < count.size(); ++e) count[e] += row[e].get<std::int64_t>();
    CHECK(count == list<std::int64_t>(out["counts"]));
    const exact_balance_plan plan = balance_exactly(count, ranks);
    std::vector<rank_fill> fills;
    for (const json& f : out["fills"]) fills.push_back({f[0], f[1], f[2]});
    CHECK(plan.fills == fills);
    CHECK(plan.capacity == list<std::int64_t>(out["capacity"]));
    CHECK(plan.foreign == list<index_t>(out["foreign"]));
    std::vector<std::int64_t> flat;
    for (const json& row : out["alloc"])
      for (const json& n : row) flat.push_back(n);
    CHECK(plan.alloc == flat);
  }
}

TEST_CASE("shadowing decides as published, and ours by what ranks really have") {
  for (const json& one : cases("shadow")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    const shadow_costs costs{in["d"], in["ratio"], in["bytes"], in["bandwidth"], in["flops"]};
    const auto load = list<double>(in["load"]);
    const shadow_plan plan = shadow_published(load, costs);
    CHECK(plan.shadowed == list<expert_id>(out["shadowed"]));
    CHECK(near(plan.latency, out["latency"]));
    const auto trace = list<double>(out["trace"]);
    CHECK(plan.trace.size() == trace.size());
    for (std::size_t i = 0; i < std::min(trace.size(), plan.trace.size()); ++i)
      CHECK(near(plan.trace[i], trace[i]));
    // Four ranks that each have a quarter.
    std::vector<std::int64_t> count;
    for (int r = 0; r < 4; ++r)
      for (const double l : load) count.push_back(static_cast<std::int64_t>(l) / 4);
    const shadow_plan ours = shadow_exact(count, 4, costs, true);
    CHECK(ours.latency <= ours.trace.front());
    double best = ours.trace.front();
    for (unsigned set = 0; set < 16; ++set) {
      std::vector<std::uint8_t> flags;
      for (unsigned e = 0; e < 4; ++e) flags.push_back(set >> e & 1);
      best = std::min(best, shadow_latency(count, 4, flags, costs, true));
    }
    CHECK(ours.latency <= best * (1.0 + 1e-9));
  }
}

TEST_CASE("the first restart begins with layer 0 clustered by where its tokens go") {
  const layer_transitions t{.experts = 4,
                            .count = {{1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0}}};
  CHECK(place_by_affinity(t, {.ranks = 2, .restarts = 0}).cost == 2.0);
  CHECK(place_by_affinity(t, {.ranks = 2, .restarts = 1}).cost == 0.0);
}

TEST_CASE("of many experts the busiest are shadowed, wherever they stand") {
  constexpr index_t ranks = 4, experts = 12;
  const shadow_costs costs{.d = 64, .ratio = 4, .bytes = 2, .bandwidth = 1e9, .flops = 1e12};
  for (index_t busy = 0; busy < experts; ++busy) {
    std::vector<std::int64_t> count(ranks * experts, 10);
    for (index_t r = 0; r < ranks; ++r)
      count[static_cast<std::size_t>(r * experts + busy)] = 100'000;
    const shadow_plan plan = shadow_exact(count, ranks, costs, true);
    CHECK(plan.shadowed == std::vector<expert_id>{static_cast<expert_id>(busy)});
  }
}

TEST_CASE("affinity: greedy and swaps as in the vectors, restarts within 1.05 of the optimum") {
  for (const json& one : cases("affinity")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    layer_transitions t{.experts = in["experts"]};
    for (const json& layer : in["transitions"]) {
      t.count.emplace_back();
      for (const json& row : layer)
        for (const json& v : row) t.count.back().push_back(v);
    }
    const affinity_options o{.ranks = in["ranks"],
                             .node_of_rank = list<std::int32_t>(in["node_of_rank"]),
                             .weight_within = in["weight_within"],
                             .weight_across = in["weight_across"]};
    std::vector<std::int32_t> first;
    for (index_t e = 0; e < t.experts; ++e)
      first.push_back(static_cast<std::int32_t>(e * o.ranks / t.experts));
    const affinity_plan greedy = affinity_from(t, o, first, false),
                        local = affinity_from(t, o, first, true);
    CHECK(greedy.rank_of_expert == out["greedy"].get<std::vector<std::vector<std::int32_t>>>());
    CHECK(near(greedy.cost, out["greedy_cost"]));
    CHECK(local.rank_of_expert == out["local"].get<std::vector<std::vector<std::int32_t>>>());
    CHECK(local.swaps == out["swaps"].get<index_t>());
    CHECK(near(local.cost, out["local_cost"]));
    CHECK(
        near(affinity_cost(t, o, std::vector<std::vector<std::int32_t>>(t.count.size() + 1, first)),
             out["trivial_cost"]));
    const affinity_plan ours = place_by_affinity(t, o);
    CHECK(ours.cost <= 1.05 * out["optimum_cost"].get<double>() + 1e-9);
    CHECK(near(ours.cost, affinity_cost(t, o, ours.rank_of_expert)));
    for (const auto& layer : ours.rank_of_expert)
      for (index_t r = 0; r < o.ranks; ++r)
        CHECK(std::count(layer.begin(), layer.end(), r) == t.experts / o.ranks);
  }
}

TEST_CASE("a search takes no more steps than it may, and no new starts where it is good enough") {
  int changed = 0;
  index_t longest = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    const auto load = zipf_loads(48, 1.1, seed);
    const auto steps = [&](index_t most) {
      return search_packing(load, 64, 8, {.most_steps = most, .swaps = false, .kicks = 0});
    };
    const packing all = steps(200);
    for (index_t most = 0; most <= all.steps + 1; ++most)
      CHECK(steps(most).steps == std::min(most, all.steps));
    longest = std::max(longest, all.steps);
    // Above the first way down's distance to the bound nothing else is tried.
    const packing once = search_packing(load, 64, 8, {.kicks = 0}),
                  easy = search_packing(load, 64, 8, {.good = 1e9}),
                  strict = search_packing(load, 64, 8, {.good = 1.0});
    CHECK(easy.of_rank == once.of_rank);
    CHECK(strict.max_load <= easy.max_load);
    changed += strict.max_load < easy.max_load;
  }
  CHECK(changed > 0);
  CHECK(longest > 1);
  // What is as near to the mean of ranks as is asked for stays as it is.
  test::random rng(36);
  int bettered = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const index_t ranks = 3 + rng.below(3), slots = 3 * ranks, experts = slots - 1 - rng.below(4);
    std::vector<double> load(at(experts));
    for (double& w : load) w = 0.1 + static_cast<double>(rng.uniform());
    const auto busiest = at(rng.below(2) * (experts - 1));
    load[busiest] = 4.0 * static_cast<double>(experts);
    const double mean = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(ranks);
    const auto asked = [&](double good) {
      return search_packing(load, slots, ranks, {.kicks = 24, .good = good});
    };
    const packing once = search_packing(load, slots, ranks, {.kicks = 0});
    if (once.count[busiest] < ranks || detail::has_twice(once)) continue;
    CHECK(asked(once.max_load / mean * (1.0 + 1e-9)).of_rank == once.of_rank);
    bettered += asked(1.0).of_rank != once.of_rank;
  }
  CHECK(bettered > 0);
}

TEST_CASE("affinity without restarts is the way down from layer 0 in order; restarts never cost") {
  int cheaper = 0, small_swaps = 0;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    test::random rng(seed);
    layer_transitions t{.experts = 12};
    t.count.assign(2, {});
    for (auto& layer : t.count)
      for (int i = 0; i < 144; ++i) layer.push_back(static_cast<double>(rng.below(50)));
    const auto plan = [&](index_t restarts) {
      return place_by_affinity(t, {.ranks = 3, .restarts = restarts});
    };
    const std::vector<std::int32_t> first{0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2};
    const affinity_plan none = plan(0);
    CHECK(none.rank_of_expert == affinity_from(t, {.ranks = 3}, first, true).rank_of_expert);
    // The best swap of what the greedy way leaves, at half a billionth to one and at one to two.
    std::vector<std::vector<std::int32_t>> ranks =
        affinity_from(t, {.ranks = 3}, first, false).rank_of_expert;
    const double greedy = affinity_cost(t, {.ranks = 3}, ranks);
    double most = 0.0;
    for (auto& layer : ranks)
      for (std::int32_t& a : layer)
        for (std::int32_t& b : layer) {
          std::swap(a, b);
          most = std::max(most, greedy - affinity_cost(t, {.ranks = 3}, ranks));
          std::swap(a, b);
        }
    double scale = 1.0;
    while (most * scale > 1e-9) scale *= 0.5;
    for (const double by : {scale, 2 * scale}) {
      layer_transitions tiny = t;
      for (auto& layer : tiny.count)
        for (double& v : layer) v *= by;
      const bool swaps = affinity_from(tiny, {.ranks = 3}, first, true).swaps > 0;
      CHECK(swaps == (most * by > 1e-9));
      small_swaps += swaps;
    }
    double last = none.cost;
    for (const index_t restarts : {1, 4, 12, 24}) {
      const double cost = plan(restarts).cost;
      CHECK(cost <= last);
      // A cost below 1 is one to lower too.
      layer_transitions less = t;
      for (auto& layer : less.count)
        for (double& v : layer) v *= 0x1p-14;
      CHECK(place_by_affinity(less, {.ranks = 3, .restarts = restarts}).cost == 0x1p-14 * cost);
      if (restarts == 24) cheaper += cost < last;
      last = cost;
    }
  }
  CHECK((cheaper > 0 && small_swaps > 0));
}

TEST_CASE("grouping reaches the vectors' cost within the limit of load") {
  for (const json& one : cases("two_level")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    std::vector<token_set> sets;
    for (const json& s : in["token_sets"])
      sets.push_back({s[0].get<std::vector<expert_id>>(), s[1]});
    const grouping_options o{.ranks = in["ranks"],
                             .node_of_rank = list<std::int32_t>(in["node_of_rank"]),
                             .weight_node = in["weight_node"],
                             .weight_rank = in["weight_rank"],
                             .slack = in["slack"]};
    const grouping_plan plan =
        group_experts(sets, list<double>(in["weight"]), list<std::int32_t>(in["start"]), o);
    CHECK(near(plan.start_cost, out["start_cost"]));
    CHECK(near(plan.cost, out["cost"]));
    CHECK(plan.rank_of_expert == list<std::int32_t>(out["placement"]));
    CHECK(plan.swaps == out["swaps"].get<index_t>());
    CHECK(near(plan.max_load, out["max_load"]));
  }
}

TEST_CASE("groups are swapped for more than a billionth") {
  for (const auto& [part, swaps] : {std::pair{0.9e-9, 0}, {1.5e-9, 1}}) {
    // Two pairs that serve together, each on two ranks: one swap takes a rank from both.
    const std::vector<token_set> sets{{{0, 2}, part / 2}, {{1, 3}, part / 2}};
    const grouping_plan plan = group_experts(sets, std::vector<double>{1, 1, 1, 1},
                                             std::vector<std::int32_t>{0, 0, 1, 1}, {.ranks = 2});
    CHECK(plan.swaps == swaps);
  }
}

TEST_CASE("re-planning takes the vectors' steps and no more than its budget") {
  for (const json& one : cases("replan")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    const auto w = list<double>(in["weight"]);
    const placement old = placement::from_slots(static_cast<index_t>(w.size()), in["ranks"],
                                                list<expert_id>(in["expert_of_slot"]));
    const replan_result r = replan(old, w, {.target = in["target"], .budget = in["budget"]});
    CHECK(slots_of(r.experts) == list<expert_id>(out["expert_of_slot"]));
    CHECK(r.moves == out["moves"].get<index_t>());
    CHECK(count_moves(old, r.experts) == out["moves_checked"].get<index_t>());
    CHECK(near(r.imbalance_before, out["imbalance_before"]));
    CHECK(near(r.imbalance_after, out["imbalance_after"]));
    std::vector<replan_step> steps;
    for (const json& s : out["steps"])
      steps.push_back(
          {s[0] == "swap" ? replan_step::kind::swap : replan_step::kind::copy, s[1], s[2]});
    CHECK(r.steps == steps);
  }
}

TEST_CASE("without its dead ranks a placement has empty slots there and lists what is lost") {
  for (const json& one : cases("failover")) {
    INFO(one["name"].get<std::string>());
    const json &in = one["input"], &out = one["output"];
    const placement p =
        placement::from_slots(in["experts"], in["ranks"], list<expert_id>(in["expert_of_slot"]));
    const placement left = without(p, list<std::uint8_t>(in["alive"]));
    CHECK(slots_of(left) == list<expert_id>(out["expert_of_slot"]));
    CHECK(left.lost() == list<expert_id>(out["lost"]));
    for (index_t e = 0; e < p.experts(); ++e)
      CHECK(std::vector<slot_id>(left.slots_of_expert(e).begin(), left.slots_of_expert(e).end()) ==
            list<slot_id>(out["live_slots"][at(e)]));
  }
  const std::vector<std::uint8_t> none{0, 0};
  CHECK(test::refusal([&] { without(placement::contiguous(4, 2), none); }) ==
        "moeroute::without: no rank is alive, expected one at least");

  // Who died before stays dead, whatever the flags say; an empty slot is no expert to move.
  const std::vector<expert_id> pairs{0, 1, 0, 1};
  const std::vector<std::uint8_t> dead{0, 1, 1, 1}, next{1, 1, 1, 0}, both{0, 1, 1, 0};
  const placement whole = placement::from_slots(2, 4, pairs),
                  born_dead = placement::from_slots(2, 4, pairs, {}, dead);
  for (const placement& p : {without(without(whole, dead), next), without(born_dead, next)}) {
    CHECK(std::vector<std::uint8_t>(p.alive().begin(), p.alive().end()) == both);
    CHECK(slots_of(p) == std::vector<expert_id>{no_expert, 1, 0, no_expert});
    CHECK(count_moves(whole, p) == 0);
    CHECK(count_moves(p, whole) == 2);
  }
}

TEST_CASE(
    "tiny instances: replicas and splits are optimal, the search within 1.05 of the optimum") {
  test::random rng(5);
  int tried = 0;
  for (int draw = 0; draw < 300; ++draw) {
    const index_t ranks = 2 + rng.below(3), per = 1 + rng.below(3), slots = ranks * per;
    if (slots > 8 || slots < 3) continue;
    const index_t experts =
        std::max<index_t>(2, slots - rng.below(std::min<index_t>(slots - 2, 4) + 1));
    if (experts > slots || per > experts) continue;
    ++tried;
    std::vector<double> w;
    for (index_t e = 0; e < experts; ++e)
      w.push_back(double(1 + rng.below(30)) * (rng.below(4) == 0 ? 4.0 : 1.0));
    const double optimum = best_placement(w, slots, ranks);
    CHECK(
        search_placement(w, slots, ranks, {.candidates = 0, .distinct = false}).balance.max_load <=
        1.05 * optimum + 1e-9);
    CHECK(placement_bound(w, slots, slots) <= optimum + 1e-9);

    // The counts that no other beats in the greatest load per slot.
    const std::vector<index_t> count = replicate(w, slots, slots);
    double got = 0.0, least = 1e300;
    for (std::size_t e = 0; e < w.size(); ++e) got = std::max(got, w[e] / double(count[e]));
    const std::function<void(index_t, index_t, double)> all = [&](index_t e, index_t left,
                                                                  double max) {
      if (e == experts) {
        least = std::min(least, max);
        return;
      }
      for (index_t more = 0; more <= left; ++more)
        all(e + 1, left - more, std::max(max, w[at(e)] / double(1 + more)));
    };
    all(0, slots - experts, 0.0);
    CHECK(near(got, least));
  }
  CHECK(tried > 100);
  for (int draw = 0; draw < 60; ++draw) {
    const index_t ranks = 2 + rng.below(2), slots = ranks * 2, experts = 3;
    std::vector<expert_id> of;
    for (index_t s = 0; s < slots; ++s)
      of.push_back(static_cast<expert_id>(s < experts ? s : rng.below(experts)));
    const placement p = placement::from_slots(experts, ranks, of);
    std::vector<std::int64_t> count;
    for (index_t e = 0; e < experts; ++e) count.push_back(rng.below(9));
    std::int64_t best = 1 << 20;
    std::vector<std::int64_t> load(at(ranks), 0);
    const std::function<void(index_t, index_t, std::int64_t)> all = [&](index_t e, index_t i,
                                                                        std::int64_t left) {
      if (e == experts) {
        best = std::min(best, *std::max_element(load.begin(), load.end()));
        return;
      }
      const index_t m = p.replicas(e), r = p.rank_of_slot()[at(p.slots_of_expert(e)[at(i)])];
      for (std::int64_t n = i + 1 == m ? left : 0; n <= left; ++n) {
        load[at(r)] += n;
        if (i + 1 == m)
          all(e + 1, 0, e + 1 < experts ? count[at(e + 1)] : 0);
        else
          all(e, i + 1, left - n);
        load[at(r)] -= n;
      }
    };
    all(0, 0, count[0]);
    const slot_split exact = split_optimal(p, count), fast = split_by_filling(p, count),
                     even = split_even(p, count);
    CHECK(exact.max_load == best);
    CHECK(fast.max_load >= best);
    CHECK(fast.max_load <= even.max_load);
  }
}

TEST_CASE("what planners promise holds for any loads") {
  test::random rng(11);
  for (int draw = 0; draw < 120; ++draw) {
    const index_t ranks = 1 + rng.below(12), own = 1 + rng.below(5), experts = ranks * own;
    std::vector<std::int64_t> count = random_counts(rng, experts, draw % 2 == 0);
    if (draw % 10 == 9) std::fill(count.begin(), count.end(), 0);
    const std::int64_t sum = std::accumulate(count.begin(), count.end(), std::int64_t{0});
    const spill_options so{
        .alpha_num = 10 + rng.below(3), .alpha_den = 10, .min_rows = draw % 3 == 0 ? 7 : 1};
    const batch_plan spilled = spill(count, ranks, so);
    const exact_balance_plan exact = balance_exactly(count, ranks);
    for (const batch_plan* plan : {&spilled, &exact.batch}) {
      std::vector<std::int64_t> load(at(ranks), 0);
      bool partition = true;
      for (index_t e = 0; e < experts; ++e) {
        std::int64_t end = 0;
        for (const rank_range& r : plan->range[at(e)]) {
          partition = partition && r.begin == end && r.end > r.begin;
          end = r.end;
          load[at(r.rank)] += r.end - r.begin;
        }
        partition = partition && end == count[at(e)];
      }
      CHECK(partition);
      CHECK(load == plan->load);
      const batch_placement placed = place_batch(*plan);
      CHECK(placed.experts.duplicates().empty());
      CHECK(static_cast<index_t>(placed.experts.slots()) ==
            experts + static_cast<index_t>(plan->moves.size()));
    }
    if (so.min_rows == 1)
      CHECK(*std::max_element(spilled.load.begin(), spilled.load.end()) <= spilled.cap + ranks - 1);
    CHECK(exact.batch.load == exact.capacity);
    CHECK((exact.batch.enabled && exact.batch.cap == exact.capacity.front()));
    // What is said of a plan in other words: rows by expert and rank, and foreign experts.
    std::vector<std::int64_t> alloc(exact.alloc.size(), 0);
    std::vector<index_t> foreign(at(ranks), 0);
    for (index_t e = 0; e < experts; ++e)
      for (const rank_range& r : exact.batch.range[at(e)])
        alloc[at(e * ranks + r.rank)] += r.end - r.begin;
    for (const expert_move& m : exact.batch.moves) {
      CHECK(m.from == m.expert / own);
      ++foreign[at(m.to)];
    }
    CHECK((alloc == exact.alloc && foreign == exact.foreign));
    // Fills of least rows and more, until nobody lacks so many or nobody has too much.
    const std::int64_t least = 1 + rng.below(9);
    const exact_balance_plan coarse = balance_exactly(count, ranks, {.min_rows = least});
    for (const rank_fill& f : coarse.fills) CHECK(f.rows >= least);
    std::int64_t lacks = 0, above = 0;
    for (index_t r = 0; r < ranks; ++r) {
      lacks = std::max(lacks, coarse.capacity[at(r)] - coarse.batch.load[at(r)]);
      above = std::max(above, coarse.batch.load[at(r)] - coarse.capacity[at(r)]);
    }
    CHECK((lacks < least || above == 0));
    CHECK(static_cast<index_t>(exact.fills.size()) <= ranks - 1);
    for (const index_t f : exact.foreign) CHECK(f <= own);
    CHECK(std::accumulate(exact.capacity.begin(), exact.capacity.end(), std::int64_t{0}) == sum);
  }
  for (int draw = 0; draw < 30; ++draw) {
    const index_t ranks = 2 + rng.below(8), experts = 2 + rng.below(40);
    const index_t per = (experts + ranks - 1) / ranks + rng.below(3), slots = per * ranks;
    if (per > experts) continue;
    std::vector<double> w = zipf_loads(experts, 1.1, static_cast<std::uint64_t>(draw), 0.5);
    const placement_plan ours = search_placement(w, slots, ranks),
                         published = eplb_plan(w, slots, ranks);
    CHECK(ours.experts.lost().empty());
    CHECK(ours.experts.duplicates().empty());
    CHECK(ours.balance.max_load >= ours.lower_bound * (1 - 1e-12));
    if (published.experts.duplicates().empty())
      CHECK(ours.balance.max_load <= published.balance.max_load);
    // The same plan for loads in other units.
    std::vector<double> scaled = w;
    for (double& v : scaled) v *= 1024.0;
    CHECK(search_placement(scaled, slots, ranks).experts == ours.experts);
    CHECK(eplb_plan(scaled, slots, ranks).experts == published.experts);
    // More slots never raise the greatest load per slot.
    double before = 1e300;
    for (index_t more = experts; more <= experts + 8; ++more) {
      const std::vector<index_t> c = replicate(w, more, more);
      double most = 0.0;
      for (std::size_t e = 0; e < w.size(); ++e) most = std::max(most, w[e] / double(c[e]));
      CHECK(most <= before);
      before = most;
    }
    // Drift, and what a re-plan makes of it.
    for (double& v : w) v *= std::exp(0.3 * double(rng.normal()));
    const replan_result moved = replan(ours.experts, w, {.target = 1.05, .budget = 6});
    CHECK(moved.moves <= 6);
    CHECK(count_moves(ours.experts, moved.experts) <= moved.moves);
    CHECK(moved.imbalance_after <= moved.imbalance_before);
    CHECK(moved.experts.duplicates().empty());
    CHECK(moved.experts.lost().empty());
    CHECK(near(moved.imbalance_after, balance_of(rank_loads(moved.experts, w)).imbalance));
    // Within the target nothing moves; else every step lessens the greatest load, or the squares.
    const replan_result none = replan(moved.experts, w, {.target = moved.imbalance_after + 1e-9});
    CHECK(none.moves == 0);
    CHECK(none.experts == moved.experts);
    const auto measured = [&](const placement& p) {
      const std::vector<double> load = rank_loads(p, w);
      return std::pair(*std::max_element(load.begin(), load.end()),
                       std::inner_product(load.begin(), load.end(), load.begin(), 0.0));
    };
    placement now = ours.experts;
    for (int step = 0; step < 8; ++step) {
      const replan_result one = replan(now, w, {.target = 1.0, .budget = 2});
      if (one.moves == 0) break;
      const auto [max_before, squares_before] = measured(now);
      const auto [max, squares] = measured(one.experts);
      CHECK(max <= max_before * (1 + 1e-12));
      CHECK((max < max_before * (1 - 1e-12) || squares < squares_before));
      now = one.experts;
    }
    const placement_plan fresh = search_placement(w, slots, ranks);
    const placement named = relabel(ours.experts, fresh.experts);
    CHECK(count_moves(ours.experts, named) <= count_moves(ours.experts, fresh.experts));
    std::vector<double> a = rank_loads(named, w), b = fresh.rank_load;
    std::sort(a.begin(), a.end());
    std::sort(b.begin(), b.end());
    for (std::size_t i = 0; i < a.size(); ++i) CHECK(near(a[i], b[i]));
    CHECK(static_cast<index_t>(transfers(ours.experts, named).size()) ==
          count_moves(ours.experts, named));
  }
}

TEST_CASE("re-planning and splits see a rank that is dead as none") {
  test::random rng(31);
  index_t moves = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const index_t experts = 4, per = 2 + rng.below(2), left = 2 + rng.below(3), ranks = left + 1,
                  dead = rng.below(ranks), turn = rng.below(experts);
    std::vector<expert_id> live, all;
    for (index_t i = 0; i < left * per; ++i)
      live.push_back(static_cast<expert_id>((i + turn) % experts));
    all = live;
    for (index_t i = 0; i < per; ++i)
      all.insert(all.begin() + dead * per, static_cast<expert_id>(rng.below(experts + 1) - 1));
    std::vector<std::uint8_t> alive(at(ranks), 1);
    alive[at(dead)] = 0;
    const placement whole = placement::from_slots(experts, ranks, all, {}, alive),
                    without_it = placement::from_slots(experts, left, live);
    const auto slot = [&](index_t s) { return s < dead * per ? s : s + per; };
    const std::vector<double> load =
        draw == 0 ? std::vector<double>(4, 1.0) : zipf_loads(experts, 1.2, 40 + at(draw));
    const replan_options o{.target = 1.01, .budget = 6};
    const replan_result a = replan(whole, load, o), b = replan(without_it, load, o);
    CHECK(near(a.imbalance_before, b.imbalance_before));
    CHECK(near(a.imbalance_after, b.imbalance_after));
    CHECK(a.moves == b.moves);
    REQUIRE(a.steps.size() == b.steps.size());
    for (std::size_t i = 0; i < a.steps.size(); ++i) {
      const replan_step& s = b.steps[i];
      const bool swaps = s.what == replan_step::kind::swap;
      CHECK(a.steps[i] == replan_step{s.what, static_cast<slot_id>(slot(s.slot)),
                                      swaps ? static_cast<std::int32_t>(slot(s.other)) : s.other});
    }
    for (index_t s = 0; s < without_it.slots(); ++s)
      CHECK(a.experts.expert_of_slot()[at(slot(s))] == b.experts.expert_of_slot()[at(s)]);
    moves += a.moves;

    const std::vector<std::int64_t> count = random_counts(rng, experts, draw % 2 == 0);
    const auto same = [&](const slot_split& with, const slot_split& none) {
      CHECK(with.max_load == none.max_load);
      for (index_t s = 0; s < without_it.slots(); ++s)
        CHECK(with.of_slot[at(slot(s))] == none.of_slot[at(s)]);
    };
    same(split_even(whole, count), split_even(without_it, count));
    same(split_by_filling(whole, count), split_by_filling(without_it, count));
    CHECK(split_optimal(whole, count).max_load == split_optimal(without_it, count).max_load);
  }
  CHECK(moves > 20);
}

TEST_CASE("the mean of ranks is that of who is alive, and without a load all is even") {
  const std::vector<std::uint8_t> alive{1, 0, 1, 0};
  const placement p = placement::from_slots(2, 4, std::vector<expert_id>{0, 0, 1, 1}, {}, alive);
  const rank_balance of_two = plan_of(p, std::vector<double>{6, 2}, 0.0).balance;
  CHECK((of_two.max_load == 6 && of_two.mean_load == 4 && of_two.imbalance == 1.5));
  CHECK(replan(p, std::vector<double>{6, 2}, {.budget = 0}).imbalance_after == 1.5);
  const std::vector<double> nothing{0, 0};
  CHECK(plan_of(p, nothing, 0.0).balance.imbalance == 1.0);
  CHECK(replan(p, nothing).imbalance_before == 1.0);
  CHECK(balance_of({}).imbalance == 1.0);
  CHECK(test::refusal([&] { balance_of(nothing, alive); }) ==
        "moeroute::balance_of: alive.size() is 4, expected 2");
}

TEST_CASE("no placement is below the mean of ranks nor below the busiest expert's part") {
  const std::vector<double> load{9, 1, 1, 1};
  CHECK(placement_bound(load, 4, 4) == 9.0);
  CHECK(placement_bound(load, 6, 2) == 6.0);
  CHECK(placement_bound(load, 5, 5) == 4.5);
}

TEST_CASE("a shadow's weights go out once, and in training come back as gradients") {
  // A row takes 1 to compute and 1 to move, an expert's weights take 2.
  const shadow_costs costs{.d = 1, .ratio = 1, .bytes = 1, .bandwidth = 1, .flops = 4};
  const std::vector<std::int64_t> count{3, 1, 1, 2};
  const std::vector<std::uint8_t> none{0, 0}, first{1, 0};
  CHECK(shadow_latency(count, 2, first, costs, false) == 4.0 + 2 * 1.0 + 1 * 2.0);
  CHECK(shadow_latency(count, 2, first, costs, true) == 3 * 4.0 + 4 * 1.0 + 2 * 2.0);
  CHECK(shadow_latency(count, 2, none, costs, true) == 3 * 4.0 + 4 * 1.0);
}

TEST_CASE("ranks that hold an expert send its copies in turn") {
  const std::vector<expert_id> few{0, 0, 1, 1}, all{0, 1, 0, 1, 0, 1, 0, 1};
  const auto sent = transfers(placement::from_slots(2, 4, few), placement::from_slots(2, 4, all));
  const std::array<std::array<int, 4>, 4> expected{
      {{1, 2, 0, 1}, {1, 3, 1, 3}, {0, 0, 2, 4}, {0, 1, 3, 6}}};
  REQUIRE(sent.size() == 4);
  for (std::size_t i = 0; i < 4; ++i)
    CHECK((std::array<int, 4>{sent[i].expert, sent[i].from, sent[i].to, sent[i].slot}) ==
          expected[i]);
}

TEST_CASE("renamed ranks keep dead ones dead, even where those have what a live one shall hold") {
  const std::vector<std::uint8_t> alive{1, 1, 1, 0};
  const std::vector<expert_id> before{0, 1, 2, 3, 4, 5, 0, 2}, after{0, 2, 3, 5, 1, 4, 1, 4};
  for (const std::vector<std::int32_t>& nodes :
       {std::vector<std::int32_t>{0, 0, 0, 0}, {0, 0, 1, 1}}) {
    const placement old = placement::from_slots(6, 4, before, nodes, alive),
                    made = placement::from_slots(6, 4, after, nodes, alive);
    const placement named = relabel(old, made);
    CHECK(named.lost().empty());
    const auto dead = named.experts_of_rank(3);
    CHECK(std::vector<expert_id>(dead.begin(), dead.end()) == std::vector<expert_id>{1, 4});
  }
}

TEST_CASE("the search leaves no expert twice on a rank where no load says which goes where") {
  for (const auto& [experts, slots, ranks] :
       {std::array<index_t, 3>{5, 15, 5}, {3, 6, 3}, {4, 12, 4}, {7, 42, 7}})
    for (const index_t kicks : {8, 0})
      for (const double load : {0.0, 1.0, 5e-324}) {
        INFO(experts << " experts, " << kicks << " kicks, load " << load);
        const std::vector<double> loads(at(experts), load);
        const placement p = search_placement(loads, slots, ranks, {.kicks = kicks}).experts;
        CHECK(p.duplicates().empty());
        for (index_t e = 0; e < experts; ++e) CHECK(p.replicas(e) >= 1);
        CHECK(p.slots() == slots);
      }
  const std::vector<double> two{1.0, 2.0};
  CHECK(near(search_placement(two, 8, 2, {.distinct = false}).balance.max_load, 1.5));
}

TEST_CASE("a second copy is exchanged for the expert of the nearest load that its rank lacks") {
  packing p;
  p.count = {2, 2, 2, 2};
  p.of_rank = {{1, 1}, {2, 3}, {0, 2}, {3, 0}};
  p.load.resize(4);
  const std::vector<double> load{4, 8, 2, 7};
  CHECK(detail::has_twice(p));
  detail::separate(p, load);
  CHECK_FALSE(detail::has_twice(p));
  CHECK(p.of_rank == std::vector<std::vector<expert_id>>{{3, 1}, {2, 1}, {0, 2}, {3, 0}});
  CHECK(p.load == std::vector<double>{7.5, 5, 3, 5.5});
  CHECK(p.max_load == 7.5);
  p.of_rank = {{0, 1, 0}};  // not side by side
  CHECK(detail::has_twice(p));
}

TEST_CASE("counts and prices at the ends of their ranges overflow nothing") {
  const std::vector<std::int64_t> most(64, std::int64_t{1} << 40);
  const batch_plan plan = spill(most, 2, {.alpha_num = 1 << 20, .alpha_den = 1, .lambda = 0.0});
  CHECK(plan.load == std::vector<std::int64_t>(2, std::int64_t{1} << 45));
  // A cap above 2^61 is none: all rows.
  CHECK(plan.cap == std::int64_t{1} << 46);
  CHECK(spill(most, 2, {.alpha_num = 1 << 17}).cap == std::int64_t{1} << 46);
  CHECK(spill(most, 2, {.alpha_num = 1 << 16}).cap == std::int64_t{1} << 61);
  const affinity_plan far = place_by_affinity(
      {.experts = 4, .count = {std::vector<double>(16, 1.7e308), std::vector<double>(16, 1.7e308)}},
      {.ranks = 2});
  CHECK(far.rank_of_expert.size() == 3);
}

TEST_CASE("renaming ranks finds the fewest moves that brute force finds") {
  test::random rng(3);
  for (int draw = 0; draw < 20; ++draw) {
    std::vector<expert_id> a, b;
    for (int s = 0; s < 8; ++s) {
      a.push_back(static_cast<expert_id>(rng.below(6)));
      b.push_back(static_cast<expert_id>(rng.below(6)));
    }
    const placement old = placement::from_slots(6, 4, a), made = placement::from_slots(6, 4, b);
    std::vector<std::size_t> order{0, 1, 2, 3};
    index_t least = 99;
    do {
      std::vector<expert_id> c;
      for (const std::size_t r : order) c.insert(c.end(), {b[2 * r], b[2 * r + 1]});
      least = std::min(least, count_moves(old, placement::from_slots(6, 4, c)));
    } while (std::next_permutation(order.begin(), order.end()));
    // Overlaps are counted by slot, moves by content: they differ where a rank holds an expert
    // twice.
    if (made.duplicates().empty() && old.duplicates().empty())
      CHECK(count_moves(old, relabel(old, made)) == least);
  }
}

TEST_CASE("renaming ranks keeps a plan on the ranks that are alive, and its shares") {
  // Rank 1 died: the plan is of the other three, and shares are uneven.
  const std::vector<std::uint8_t> alive{1, 0, 1, 1};
  const std::vector<expert_id> before{0, 1, 2, 3, 4, 5, 0, 2}, after{4, 5, -1, -1, 2, 0, 1, 3};
  const placement old = placement::from_slots(6, 4, before);
  const placement made = without(placement::from_slots(6, 4, after), alive);
  const placement named = relabel(old, made);
  CHECK(std::vector<std::uint8_t>(named.alive().begin(), named.alive().end()) == alive);
  CHECK(named.lost().empty());
  CHECK(std::vector<expert_id>(named.expert_of_slot().begin(), named.expert_of_slot().end()) ==
        std::vector<expert_id>{3, 1, -1, -1, 4, 5, 0, 2});
  // What was on a rank that was dead is not there: nothing is gained by its name.
  const placement long_dead = without(old, alive);
  CHECK(relabel(long_dead, placement::from_slots(6, 4, before)).lost().empty());
  const std::vector<double> share{0.25, 1.0, 0.75, 1.0};
  const placement uneven({.experts = 3,
                          .slot_offset = std::vector<std::int32_t>{0, 2, 4},
                          .expert_of_slot = std::vector<expert_id>{0, 1, 0, 2},
                          .share = share});
  const placement turned =
      relabel(placement::from_slots(3, 2, std::vector<expert_id>{2, 0, 1, 0}), uneven);
  CHECK(std::vector<expert_id>(turned.expert_of_slot().begin(), turned.expert_of_slot().end()) ==
        std::vector<expert_id>{2, 0, 1, 0});
  CHECK(std::vector<double>(turned.share().begin(), turned.share().end()) ==
        std::vector<double>{1.0, 0.75, 1.0, 0.25});
}

TEST_CASE("beyond 256 ranks names go by the greatest overlaps, and to nobody for more moves") {
  constexpr index_t ranks = 260;
  std::vector<expert_id> from(ranks);
  std::iota(from.begin(), from.end(), 0);
  std::vector<expert_id> turned(from.rbegin(), from.rend());
  const placement old = placement::from_slots(ranks, ranks, from);
  CHECK(slots_of(relabel(old, placement::from_slots(ranks, ranks, turned))) == from);
  // Made's rank 0 shares three experts with old's rank 1 and two with old's rank 0, made's rank 1
  // two with old's rank 1 and none with old's rank 0: the greatest first is 3, as it was is 4.
  const std::vector<expert_id> before{0, 1, 4, 5, 0, 1, 2, 3}, after{0, 1, 2, 6, 2, 3, 7, 8};
  std::vector<expert_id> a = before, b = after;
  for (expert_id e = 9; static_cast<index_t>(a.size()) < 4 * ranks; ++e) {
    a.push_back(e);
    b.push_back(e);
  }
  const placement was = placement::from_slots(5 * ranks, ranks, a),
                  made = placement::from_slots(5 * ranks, ranks, b);
  CHECK(count_moves(was, made) == 4);
  CHECK(count_moves(was, relabel(was, made)) == 4);
}

TEST_CASE("against EPLB the excess over 1 is a tenth at the most, and no row is above 1.005") {
  double logs = 0.0, worst = 0.0, highest = 0.0;
  int rows = 0;
  index_t duplicates = 0;
  for (const double s : {1.0, 1.1, 1.2, 1.3})
    for (const auto& [experts, ranks] :
         {std::pair<index_t, index_t>{256, 32}, {256, 64}, {128, 16}})
      for (const index_t extra : {ranks, 2 * ranks}) {
        double ours = 0.0, published = 0.0;
        for (std::uint64_t draw = 0; draw < 2; ++draw) {
          const std::vector<double> w = zipf_loads(experts, s, 100 + draw);
          const placement_plan plan = search_placement(w, experts + extra, ranks);
          ours += plan.balance.imbalance - 1.0;
          published += eplb_plan(w, experts + extra, ranks).balance.imbalance - 1.0;
          highest = std::max(highest, plan.balance.imbalance);
          duplicates += static_cast<index_t>(plan.experts.duplicates().size());
        }
        logs += std::log(std::max(ours, 1e-9) / published);
        worst = std::max(worst, ours / published);
        ++rows;
      }
  INFO("geometric mean " << std::exp(logs / rows) << ", worst " << worst << ", highest "
                         << highest);
  CHECK(std::exp(logs / rows) <= 0.10);
  CHECK(worst <= 0.35);
  CHECK(highest <= 1.005);
  CHECK(duplicates == 0);
}

TEST_CASE("the next batch, split when it is seen, is at most half as far from even as EPLB's") {
  double ours = 0.0, published = 0.0;
  for (const double s : {1.0, 1.3})
    for (const auto& [experts, ranks] :
         {std::pair<index_t, index_t>{256, 32}, {256, 64}, {128, 16}}) {
      const expert_traffic traffic({.experts = experts, .zipf = s, .seed = 7});
      const std::span<const double> past = traffic.popularity();
      std::vector<expert_id> ids;
      traffic.draw(4096, 8, 1, ids);
      std::vector<std::int64_t> count(at(experts), 0);
      for (const expert_id e : ids) ++count[at(e)];
      const double mean = 4096.0 * 8.0 / static_cast<double>(ranks);
      const auto excess = [&](const slot_split& split) {
        return static_cast<double>(split.max_load) / mean - 1.0;
      };
      const index_t slots = experts + 2 * ranks;
      published += excess(split_even(eplb_plan(past, slots, ranks).experts, count));
      ours += excess(split_optimal(search_placement(past, slots, ranks).experts, count));
    }
  INFO("ours " << ours / 6 << ", EPLB " << published / 6);
  CHECK(ours <= 0.5 * published);
}

TEST_CASE("planners refuse by name what is no load, no size, no option") {
  const std::vector<double> good{1, 2, 3, 4}, negative{1, -2, 3, 4}, nan{1, 2, std::nan(""), 4},
      infinite{1, 2, 3, HUGE_VAL};
  const auto said = [](auto&& f) { return test::refusal(f); };
  for (const auto& w : {negative, nan, infinite}) {
    for (const std::string& text :
         {said([&] { search_placement(w, 8, 2); }), said([&] { eplb_plan(w, 8, 2); }),
          said([&] { replicate(w, 8, 8); }), said([&] { replan(placement::contiguous(4, 2), w); }),
          said([&] { rank_loads(placement::contiguous(4, 2), w); })})
      CHECK(text.find("expected a finite number >= 0") != std::string::npos);
  }
  CHECK(said([&] { search_placement(good, 3, 3); }) ==
        "moeroute::search_placement: slots is 3, expected 4 to 2147483647");
  CHECK(said([&] { eplb_plan(good, 2, 2); }) ==
        "moeroute::eplb: slots is 2, expected 4 to 2147483647");
  CHECK(said([&] { search_placement(good, 7, 2); }) ==
        "moeroute::search_placement: 7 slots on 2 ranks, expected a multiple of the ranks");
  CHECK(said([&] { search_placement(good, 10, 2); }) ==
        "moeroute::search_placement: slots per rank is 5, expected 1 to 4");
  CHECK(said([&] { search_placement(good, 4, 0); }) ==
        "moeroute::search_placement: ranks is 0, expected 1 to 1048576");
  CHECK(said([&] { eplb(good, 8, 3, 1, 2); }) ==
        "moeroute::eplb: 4 experts in 3 groups, expected a multiple of the groups");
  CHECK(said([&] { eplb(good, 8, 2, 3, 4); }) ==
        "moeroute::eplb: 4 ranks on 3 nodes, expected a multiple of the nodes");
  const std::vector<std::int64_t> counts{1, 2, 3, 4}, below{1, 2, 3, -4};
  CHECK(said([&] { spill(below, 2); }) == "moeroute::spill: count is -4, expected 0 to 2^40");
  CHECK(said([&] { spill(counts, 3); }) ==
        "moeroute::spill: 4 experts on 3 ranks, expected a multiple of the ranks");
  CHECK(said([&] { spill(counts, 2, {.alpha_num = 1, .alpha_den = 2}); }) ==
        "moeroute::spill: alpha_num is 1, expected 2 to 1048576");
  CHECK(said([&] { spill(counts, 2, {.min_rows = 0}); }) ==
        "moeroute::spill: min_rows is 0, expected 1 to 1099511627776");
  CHECK(said([&] { balance_exactly(below, 2); }) ==
        "moeroute::balance_exactly: count is -4, expected 0 to 2^40");
  CHECK(said([&] { balance_exactly(counts, 2, {.lambda = -1}); }) ==
        "moeroute::balance_exactly: lambda is -1.000000, expected >= 0");
  const placement lost = placement::from_slots(4, 2, std::vector<expert_id>{0, 1, 2, 2});
  CHECK(said([&] { split_optimal(lost, counts); }) ==
        "moeroute::split_by_filling: expert 3 has tokens and no live slot");
  const std::vector<std::int64_t> single{0, 0, 0, 1};
  CHECK(said([&] { split_even(lost, single); }) ==
        "moeroute::split_even: expert 3 has tokens and no live slot");
  CHECK(said([&] { split_even(lost, below); }) ==
        "moeroute::split_even: count is -4, expected 0 to 2^40");
  CHECK(said([&] { replan(lost, good); }) == "moeroute::replan: 1 experts have no live slot: 3");
  CHECK(said([&] { replan(placement::contiguous(4, 2), good, {.target = 0.5}); }) ==
        "moeroute::replan: target is 0.500000, expected >= 1");
  CHECK(said([&] { count_moves(lost, placement::contiguous(4, 3)); }) ==
        "moeroute::count_moves: to.ranks() is 3, expected 2");
  CHECK(said([&] { shadow_published(good, {.d = 0}); }) ==
        "moeroute::shadow_published: a cost is 0.000000, expected a finite number > 0");
  CHECK(said([&] { shadow_exact(counts, 2, {.d = 0}, true); }) ==
        "moeroute::shadow_exact: a cost is 0.000000, expected a finite number > 0");
  CHECK(said([&] { shadow_exact(counts, 3, {.d = 1}, true); }) ==
        "moeroute::shadow_exact: 4 counts for 3 ranks, expected a multiple");
  const auto grouped = [&](const token_set& set, std::vector<std::int32_t> start,
                           const grouping_options& options) {
    const std::vector<token_set> sets{set};
    return said([&] { group_experts(sets, good, start, options); });
  };
  CHECK(grouped({{0, 3}, 0.0}, {0, 0, 1, 1}, {.ranks = 2}) == "accepted");
  CHECK(grouped({{0, 3}, -1.0}, {0, 0, 1, 1}, {.ranks = 2}) ==
        "moeroute::group_experts: count is -1.000000, expected a finite number >= 0");
  CHECK(grouped({{0, 3}, HUGE_VAL}, {0, 0, 1, 1}, {.ranks = 2}) ==
        "moeroute::group_experts: count is inf, expected a finite number >= 0");
  CHECK(grouped({{0, -1}, 1.0}, {0, 0, 1, 1}, {.ranks = 2}) ==
        "moeroute::group_experts: expert is -1, expected 0 to 3");
  CHECK(grouped({{0, 3}, 1.0}, {0, -1, 1, 1}, {.ranks = 2}) ==
        "moeroute::group_experts: start is -1, expected 0 to 1");
  CHECK(grouped({{0, 4}, 1.0}, {0, 0, 1, 1}, {.ranks = 2}) ==
        "moeroute::group_experts: expert is 4, expected 0 to 3");
  CHECK(grouped({{0, 3}, 1.0}, {0, 0, 1, 2}, {.ranks = 2}) ==
        "moeroute::group_experts: start is 2, expected 0 to 1");
  CHECK(grouped({{0, 3}, 1.0}, {0, 0, 1}, {.ranks = 2}) ==
        "moeroute::group_experts: start.size() is 3, expected 4");
  CHECK(grouped({{0, 3}, 1.0}, {0, 0, 1, 1}, {.ranks = 2, .slack = -0.5}) ==
        "moeroute::group_experts: an option is -0.500000, expected a finite number >= 0");
  CHECK(said([&] { place_by_affinity({.experts = 4, .count = {{1, 2}}}, {.ranks = 2}); }) ==
        "moeroute::affinity: count.size() is 2, expected 16");
  const std::vector<std::int32_t> start{0, 0, 1, 2};
  CHECK(said([&] { group_experts({}, good, start, {.ranks = 2}); }) ==
        "moeroute::group_experts: start is 2, expected 0 to 1");
  CHECK(said([&] { split_even(placement{}, {}); }).find("placement.ranks() is 0") !=
        std::string::npos);
  const std::vector<std::uint8_t> flags(2, 0);
  CHECK(said([&] { shadow_latency(counts, 4, flags, {.d = 1}, true); }) ==
        "moeroute::shadow_latency: count.size() is 4, expected 8");
  const std::vector<std::int64_t> huge(4, std::int64_t{1} << 62);
  CHECK(said([&] { shadow_exact(huge, 2, {.d = 1}, true); }).find("expected 0 to 2^40") !=
        std::string::npos);
  CHECK(said([&] {
          linear_assignment({1.0, std::nan(""), 2.0, 3.0}, 2);
        }).find("linear_assignment: a gain is nan") != std::string::npos);
  CHECK(said([&] {
          linear_assignment({1.0, HUGE_VAL, 2.0, 3.0}, 2);
        }).find("linear_assignment: a gain is inf") != std::string::npos);
}

TEST_CASE("what counts, costs or moves a placement refuses by name what does not fit it") {
  const auto said = [](auto&& f) { return test::refusal(f); };
  using numbers = std::vector<double>;
  const numbers good{1, 2, 3, 4};
  const placement two = placement::contiguous(4, 2), four = placement::contiguous(4, 4);
  CHECK(said([&] {
          shadow_published(numbers{1, -2}, {.d = 1});
        }).ends_with("expected a finite number >= 0"));
  CHECK(said([&] { rank_loads(two, numbers{1, 2}); }) ==
        "moeroute::rank_loads: load.size() is 2, expected 4");
  for (const index_t slots : {3, 33})
    CHECK(said([&] { replicate(good, slots, 8); }) ==
          "moeroute::replicate: slots is " + std::to_string(slots) + ", expected 4 to 32");
  CHECK(said([&] { replicate(good, 4, 0); }) ==
        "moeroute::replicate: most is 0, expected 1 to 1048576");
  CHECK(said([&] { relabel(two, four); }) == "moeroute::relabel: made.ranks() is 4, expected 2");
  CHECK(said([&] { relabel(two, placement::contiguous(6, 2)); }) ==
        "moeroute::relabel: made.experts() is 6, expected 4");
  CHECK(said([&] { transfers(two, four); }) == "moeroute::transfers: to.ranks() is 4, expected 2");
  CHECK(said([&] { transfers(two, placement::contiguous(6, 2)); }) ==
        "moeroute::transfers: to.experts() is 6, expected 4");
  const placement lost = placement::from_slots(4, 2, std::vector<expert_id>{0, 1, 2, 2});
  CHECK(said([&] { transfers(lost, two); }) ==
        "moeroute::transfers: expert 3 has no live slot to be copied from");
  CHECK(said([] { place_batch({}); }) == "moeroute::place_batch: ranks is 0, expected 1 to 0");
  CHECK(said([] { expert_traffic({.experts = 0}); }) ==
        "moeroute::traffic: experts is 0, expected 1 to 1048576");
  CHECK(said([] { expert_traffic({.experts = 4, .noise = -1.0}); }) ==
        "moeroute::traffic: an option is -1.000000, expected a finite number >= 0");
  std::vector<expert_id> ids;
  CHECK(said([&] { expert_traffic({.experts = 4}).draw(1, 5, 0, ids); }) ==
        "moeroute::traffic: k is 5, expected 1 to 4");
  const auto cost = [&](const std::vector<std::vector<std::int32_t>>& rank_of_expert) {
    return said([&] {
      affinity_cost({.experts = 2, .count = {{1, 2, 3, 4}}}, {.ranks = 2}, rank_of_expert);
    });
  };
  CHECK(cost({{0, 1}, {1, 0}}) == "accepted");
  CHECK(cost({{0, 1}}) == "moeroute::affinity_cost: layers is 1, expected 2");
  CHECK(cost({{0, 1}, {0}}) == "moeroute::affinity_cost: experts is 1, expected 2");
  CHECK(cost({{0, 1}, {0, 2}}) == "moeroute::affinity_cost: rank is 2, expected 0 to 1");
  CHECK(said([] { fit_link(numbers{1, 2}, numbers{1}); }) ==
        "moeroute::fit_link: seconds.size() is 1, expected 2");
  CHECK(said([] { fit_link(numbers{3, 3}, numbers{1, 2}); }) ==
        "moeroute::fit_link: all messages have one size, expected several");
  CHECK(said([] { expected_distinct(4, 5, 2); }) ==
        "moeroute::expected_distinct: k is 5, expected 1 to 4");
  CHECK(said([] { expected_distinct(4, 2, 5); }) ==
        "moeroute::expected_distinct: groups is 5, expected 1 to 4");
  CHECK(said([] { chunked_seconds({}, 0.0, 0); }) ==
        "moeroute::chunked_seconds: n is 0, expected 1 to 1048576");
}

TEST_CASE("every size and option of a planner is refused by its own name") {
  using numbers = std::vector<double>;
  using counts = std::vector<std::int64_t>;
  using ranks_of = std::vector<std::int32_t>;
  const numbers good{1, 2, 3, 4}, none;
  const counts rows{1, 2, 3, 4}, no_rows, limit(4, std::int64_t{1} << 40),
      beyond{1, 2, 3, (std::int64_t{1} << 40) + 1};
  const placement two = placement::contiguous(4, 2);
  const layer_transitions t{.experts = 2, .count = {{1, 2, 3, 4}}};
  const auto on = [](const ranks_of& offset, const ranks_of& nodes) {
    std::vector<expert_id> id{0, 1, 2, 3};
    id.resize(static_cast<std::size_t>(offset.back()));
    return placement(
        {.experts = 4, .slot_offset = offset, .expert_of_slot = id, .node_of_rank = nodes});
  };
  const std::vector<std::uint8_t> flags(2, 0), no_flags;
  const auto start = [&](const std::vector<index_t>& from) {
    return [&good, from] { search_packing(good, 8, 2, {}, from); };
  };
  const auto grouped = [&](const grouping_options& o) {
    return [&good, o] {
      const std::vector<token_set> sets{{{0, 3}, 1.0}};
      group_experts(sets, good, ranks_of{0, 0, 1, 1}, o);
    };
  };
  const auto near_by = [&](index_t experts, const affinity_options& o) {
    return [experts, o] { place_by_affinity({.experts = experts}, o); };
  };
  const auto spilled = [&](const spill_options& o) { return [&rows, o] { spill(rows, 2, o); }; };
  const test::refusals all{
      {near_by(0, {}), "affinity: experts is 0, expected 1 to 1048576"},
      {near_by(4, {.ranks = 0}), "affinity: ranks is 0, expected 1 to 4"},
      {near_by(4, {.ranks = 5}), "affinity: ranks is 5, expected 1 to 4"},
      {near_by(4, {.ranks = 3}),
       "affinity: 4 experts on 3 ranks, expected a multiple of the ranks"},
      {near_by(4, {.ranks = 2, .node_of_rank = {0}}),
       "affinity: node_of_rank.size() is 1, expected 2"},
      {near_by(4, {.weight_within = -1.0}),
       "affinity: weight is -1.000000, expected a finite number >= 0"},
      {near_by(4, {.weight_across = HUGE_VAL}),
       "affinity: weight is inf, expected a finite number >= 0"},
      {[] { place_by_affinity({.experts = 1, .count = {{-1}}}, {}); },
       "affinity: count is -1.000000, expected a finite number >= 0"},
      {[&] { affinity_from(t, {.ranks = 2}, ranks_of{0}, true); },
       "affinity: first.size() is 1, expected 2"},
      {[&] { affinity_from(t, {.ranks = 2}, ranks_of{0, 2}, true); },
       "affinity: first is 2, expected 0 to 1"},
      {[&] { affinity_from(t, {.ranks = 2}, ranks_of{-1, 0}, true); },
       "affinity: first is -1, expected 0 to 1"},
      {[] {
         affinity_from({.experts = 2, .count = {{1, 2, 3}}}, {.ranks = 2}, ranks_of{0, 1}, true);
       },
       "affinity: count.size() is 3, expected 4"},
      {[] { affinity_cost({.experts = 2, .count = {{1, 2, 3}}}, {.ranks = 2}, {{0, 1}, {1, 0}}); },
       "affinity: count.size() is 3, expected 4"},
      {[&] { eplb(numbers{1, -2}, 4, 1, 1, 2); },
       "eplb: the load of expert 1 is -2.000000, expected a finite number >= 0"},
      {[&] { eplb(good, 8, 1, 0, 2); }, "eplb: nodes is 0, expected 1 to 2"},
      {[&] { eplb(good, 8, 1, 3, 2); }, "eplb: nodes is 3, expected 1 to 2"},
      {[&] { eplb(good, 8, 0, 1, 2); }, "eplb: groups is 0, expected 1 to 4"},
      {[&] { eplb(good, 8, 5, 1, 2); }, "eplb: groups is 5, expected 1 to 4"},
      {[] { group_experts({}, numbers{1, -2}, ranks_of{0, 0}, {}); },
       "group_experts: the load of expert 1 is -2.000000, expected a finite number >= 0"},
      {[] { expected_distinct(0, 1, 1); },
       "expected_distinct: experts is 0, expected 1 to 1048576"},
      {[] { expected_distinct(4, 0, 1); }, "expected_distinct: k is 0, expected 1 to 4"},
      {[] { expected_distinct(4, 2, 0); }, "expected_distinct: groups is 0, expected 1 to 4"},
      {[&] { balance_exactly(std::vector<std::int64_t>(4, 1), 3); },
       "balance_exactly: 4 experts on 3 ranks, expected a multiple of the ranks"},
      {[&] { balance_exactly(rows, 2, {.min_rows = 0}); },
       "balance_exactly: min_rows is 0, expected 1 to 1099511627776"},
      {[&] { balance_exactly(rows, 2, {.lambda = std::nan("")}); },
       "balance_exactly: lambda is nan, expected >= 0"},
      {[&] { without(two, std::vector<std::uint8_t>(1, 1)); },
       "without: alive.size() is 1, expected 2"},
      {[&] { without(two, std::vector<std::uint8_t>(2, 2)); },
       "without: alive is 2, expected 0 to 1"},
      {grouped({.ranks = 0}), "group_experts: ranks is 0, expected 1 to 1048576"},
      {grouped({.ranks = 2, .node_of_rank = {0}}),
       "group_experts: node_of_rank.size() is 1, expected 2"},
      {grouped({.ranks = 2, .node_of_rank = {0, 2}}),
       "group_experts: node_of_rank is 2, expected 0 to 1"},
      {grouped({.ranks = 2, .node_of_rank = {-1, 0}}),
       "group_experts: node_of_rank is -1, expected 0 to 1"},
      {grouped({.ranks = 2, .weight_node = -1.0}),
       "group_experts: an option is -1.000000, expected a finite number >= 0"},
      {grouped({.ranks = 2, .weight_rank = -2.0}),
       "group_experts: an option is -2.000000, expected a finite number >= 0"},
      {[&] { search_placement(none, 8, 2); },
       "search_placement: loads is 0, expected 1 to 1048576"},
      {[&] { count_moves(two, placement::contiguous(6, 2)); },
       "count_moves: to.experts() is 6, expected 4"},
      {[&] { replan(two, numbers{1, 2, 3}); }, "replan: load.size() is 3, expected 4"},
      {[&] { replan(two, good, {.budget = -1}); },
       "replan: budget is -1, expected 0 to 2147483647"},
      {[&] { relabel(two, on({0, 2, 4}, {0, 1})); }, "relabel: made.nodes() is 2, expected 1"},
      {[&] { relabel(two, on({0, 1, 4}, {})); }, "relabel: made.slots(rank) is 1, expected 2"},
      {[&] { relabel(on({0, 1, 4}, {}), on({0, 1, 2}, {})); },
       "relabel: old.slots(rank) is 3, expected 1"},
      {[&] { relabel(on({0, 1, 2, 3, 4}, {0, 0, 1, 1}), on({0, 1, 2, 3, 4}, {0, 1, 0, 1})); },
       "relabel: made.node_of_rank is 1, expected 0"},
      {[&] { search_placement(good, 8, 2, {.candidates = -1}); },
       "search_placement: candidates is -1, expected 0 to 1048576"},
      {[&] { search_placement(good, 8, 2, {.kicks = -1}); },
       "search_placement: kicks is -1, expected 0 to 1048576"},
      {start({2, 2, 4}), "search_placement: start.size() is 3, expected 4"},
      {start({2, 2, 3, 1}), "search_placement: start is 3, expected 1 to 2"},
      {start({2, 2, 2, 0}), "search_placement: start is 0, expected 1 to 2"},
      {start({2, 2, 2, 1}), "search_placement: the sum of start is 7, expected 8"},
      {[&] { shadow_latency(rows, 0, flags, {.d = 1}, true); },
       "shadow_latency: ranks is 0, expected 1 to 1048576"},
      {[&] { shadow_latency(no_rows, 2, no_flags, {.d = 1}, true); },
       "shadow_latency: shadowed.size() is 0, expected 1 to 1048576"},
      {[&] { shadow_exact(rows, 0, {.d = 1}, true); },
       "shadow_exact: ranks is 0, expected 1 to 1048576"},
      {[&] { shadow_exact(no_rows, 2, {.d = 1}, true); },
       "shadow_exact: 0 counts for 2 ranks, expected a multiple"},
      {[&] { shadow_exact(beyond, 2, {.d = 1}, true); },
       "shadow_exact: count is 1099511627777, expected 0 to 2^40"},
      {[&] { shadow_exact(rows, 2, {.d = 1, .ratio = -4}, true); },
       "shadow_exact: a cost is -4.000000, expected a finite number > 0"},
      {[&] { shadow_exact(rows, 2, {.d = 1, .bytes = -4}, true); },
       "shadow_exact: a cost is -4.000000, expected a finite number > 0"},
      {[&] { shadow_exact(rows, 2, {.d = 1, .bandwidth = HUGE_VAL}, true); },
       "shadow_exact: a cost is inf, expected a finite number > 0"},
      {[&] { shadow_exact(rows, 2, {.d = 1, .flops = std::nan("")}, true); },
       "shadow_exact: a cost is nan, expected a finite number > 0"},
      {[&] { spill(rows, 0); }, "spill: ranks is 0, expected 1 to 1048576"},
      {[&] { spill(no_rows, 1); }, "spill: experts is 0, expected 1 to 1048576"},
      {[&] { spill(beyond, 2); }, "spill: count is 1099511627777, expected 0 to 2^40"},
      {spilled({.alpha_num = 1, .alpha_den = 0}), "spill: alpha_den is 0, expected 1 to 1048576"},
      {spilled({.alpha_num = 1 << 21}), "spill: alpha_num is 2097152, expected 1 to 1048576"},
      {spilled({.lambda = -1.0}), "spill: lambda is -1.000000, expected >= 0"},
      {[&] { split_even(two, counts{1, 2, 3}); }, "split_even: count.size() is 3, expected 4"},
      {[&] { split_by_filling(two, beyond); },
       "split_by_filling: count is 1099511627777, expected 0 to 2^40"},
      {[] { linear_assignment({1, 2, 3}, 2); }, "linear_assignment: gain.size() is 3, expected 4"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  const double nan = std::nan("");
  const test::refusals ends{
      {near_by(4, {.weight_within = nan}),
       "affinity: weight is nan, expected a finite number >= 0"},
      {near_by(4, {.weight_across = -1.0}),
       "affinity: weight is -1.000000, expected a finite number >= 0"},
      {[] { place_by_affinity({.experts = 1, .count = {{HUGE_VAL}}}, {}); },
       "affinity: count is inf, expected a finite number >= 0"},
      {near_by(max_experts + 1, {}), "affinity: experts is 1048577, expected 1 to 1048576"},
      {grouped({.ranks = max_ranks + 1}), "group_experts: ranks is 1048577, expected 1 to 1048576"},
      {[] { expected_distinct(max_experts + 1, 1, 1); },
       "expected_distinct: experts is 1048577, expected 1 to 1048576"},
      {[&] { shadow_latency(rows, max_ranks + 1, flags, {.d = 1}, true); },
       "shadow_latency: ranks is 1048577, expected 1 to 1048576"},
      {[&] { shadow_exact(rows, max_ranks + 1, {.d = 1}, true); },
       "shadow_exact: ranks is 1048577, expected 1 to 1048576"},
      {[&] { shadow_latency(rows, 2, std::vector<std::uint8_t>(max_experts + 1), {.d = 1}, true); },
       "shadow_latency: shadowed.size() is 1048577, expected 1 to 1048576"},
      {[] { shadow_exact(std::vector<std::int64_t>{-1}, 1, {.d = 1}, true); },
       "shadow_exact: count is -1, expected 0 to 2^40"},
      {[] { spill(std::vector<std::int64_t>(max_experts + 1), 1); },
       "spill: experts is 1048577, expected 1 to 1048576"},
      {[] { search_placement(numbers(max_experts + 1), 8, 2); },
       "search_placement: loads is 1048577, expected 1 to 1048576"},
      {[&] { search_placement(good, index_t{1} << 31, 2); },
       "search_placement: slots is 2147483648, expected 4 to 2147483647"},
      {[] {
         place_batch(
             {.range = std::vector<std::vector<rank_range>>(1), .moves = {}, .load = {0, 0}});
       },
       "place_batch: ranks is 2, expected 1 to 1"},
      {[] {
         std::vector<expert_id> drawn;
         expert_traffic({.experts = 4}).draw(1, 0, 0, drawn);
       },
       "traffic: k is 0, expected 1 to 4"},
      {[&] { spill(rows, max_ranks + 1); }, "spill: ranks is 1048577, expected 1 to 1048576"},
      {[] {
         affinity_cost({.experts = 2, .count = {{1, 2, 3, 4}}}, {.ranks = 2}, {{0, 1}, {0, -1}});
       },
       "affinity_cost: rank is -1, expected 0 to 1"},
      {grouped({.ranks = 2, .weight_node = nan}),
       "group_experts: an option is nan, expected a finite number >= 0"},
      {grouped({.ranks = 2, .slack = HUGE_VAL}),
       "group_experts: an option is inf, expected a finite number >= 0"},
      {spilled({.alpha_num = 1 << 20, .alpha_den = (1 << 20) + 1}),
       "spill: alpha_den is 1048577, expected 1 to 1048576"},
      {spilled({.alpha_num = (1 << 20) + 1}), "spill: alpha_num is 1048577, expected 1 to 1048576"},
      {spilled({.min_rows = (std::int64_t{1} << 40) + 1}),
       "spill: min_rows is 1099511627777, expected 1 to 1099511627776"},
      {spilled({.lambda = nan}), "spill: lambda is nan, expected >= 0"},
      {[&] { balance_exactly(rows, 2, {.min_rows = (std::int64_t{1} << 40) + 1}); },
       "balance_exactly: min_rows is 1099511627777, expected 1 to 1099511627776"},
      {[&] { shadow_published(good, {.d = HUGE_VAL}); },
       "shadow_published: a cost is inf, expected a finite number > 0"},
      {[&] { replicate(good, 4, max_ranks + 1); },
       "replicate: most is 1048577, expected 1 to 1048576"},
      {[&] { search_placement(good, 8, max_ranks + 1); },
       "search_placement: ranks is 1048577, expected 1 to 1048576"},
      {[] { chunked_seconds({}, 0.0, (1 << 20) + 1); },
       "chunked_seconds: n is 1048577, expected 1 to 1048576"},
      {[] { expert_traffic({.experts = max_experts + 1}); },
       "traffic: experts is 1048577, expected 1 to 1048576"},
      {[] { expert_traffic({.experts = 4, .zipf = std::nan("")}); },
       "traffic: an option is nan, expected a finite number >= 0"},
      {[] { expert_traffic({.experts = 4, .drift = HUGE_VAL}); },
       "traffic: an option is inf, expected a finite number >= 0"}};
  for (const auto& [call, message] : ends) CHECK(test::refusal(call) == "moeroute::" + message);
  const test::refusals accepted{
      {near_by(4, {.weight_within = 0.0, .weight_across = 0.0, .restarts = 0}), ""},
      {grouped({.ranks = 2, .weight_node = 0.0, .weight_rank = 0.0, .slack = 0.0}), ""},
      {spilled({.alpha_num = 1 << 20, .alpha_den = 1 << 20}), ""},
      {spilled({.min_rows = std::int64_t{1} << 40, .lambda = HUGE_VAL}), ""},
      {[&] { balance_exactly(rows, 2, {.min_rows = std::int64_t{1} << 40}); }, ""},
      {[] { chunked_seconds({}, 0.0, 1 << 20); }, ""},
      {[] { expert_traffic({.experts = 1, .zipf = 0.0, .noise = 0.0, .drift = 0.0}); }, ""}};
  for (const auto& one : accepted) CHECK(test::refusal(one.first) == "accepted");
  // What stands where nothing is said.
  const affinity_options a;
  CHECK((a.ranks == 1 && a.node_of_rank.empty() && a.weight_within == 1.0 &&
         a.weight_across == 1.0 && a.restarts == 12));
  const grouping_options g;
  CHECK((g.ranks == 1 && g.node_of_rank.empty() && g.weight_node == 4.0 && g.weight_rank == 1.0 &&
         g.slack == 1.2 && token_set{}.count == 1.0));
  const spill_options s;
  CHECK((s.alpha_num == 1 && s.alpha_den == 1 && s.min_rows == 1 && s.lambda == 0.0));
  CHECK((exact_balance_options{}.min_rows == 1 && exact_balance_options{}.lambda == 0.0));
  const shadow_costs c;
  CHECK((c.d == 0.0 && c.ratio == 4.0 && c.bytes == 4.0 && c.bandwidth == 1.0 && c.flops == 1.0));
  const traffic_options o;
  CHECK((o.experts == 256 && o.zipf == 1.0 && o.noise == 0.15 && o.drift == 0.0 &&
         o.switch_at == -1 && o.seed == 1));
  // What is at the end of its range is in it.
  CHECK(split_even(two, limit).max_load == std::int64_t{1} << 41);
  CHECK(spill(limit, 4).load == limit);
  CHECK(search_packing(good, 8, 2, {}, std::vector<index_t>{2, 2, 2, 2}).max_load == 5.0);
  CHECK(place_by_affinity(t, {.ranks = 2, .weight_within = 0.0}).cost == 0.0);
  CHECK(replan(two, good, {.budget = 0}).moves == 0);
}

TEST_CASE(
    "shadows go to the busiest and, of equals, to the lowest expert, one by one or as a pair") {
  // A row takes 1 to compute and 1 to move, an expert's weights take 2.
  const shadow_costs costs{.d = 1, .ratio = 1, .bytes = 1, .bandwidth = 1, .flops = 4};
  // Two experts of rank 0 that both ranks use alike.
  const shadow_plan equal =
      shadow_exact(std::vector<std::int64_t>{8, 8, 0, 0, 8, 8, 0, 0}, 2, costs, false);
  CHECK(equal.shadowed == std::vector<expert_id>{0, 1});
  CHECK(equal.trace == std::vector<double>{32 + 2 * 16, 24 + 2 * 8 + 2, 16 + 2 * 2});
  CHECK(equal.latency == 20);
  // Each rank uses the other's expert: one shadow alone saves nothing, both save all rows.
  const shadow_plan pair =
      shadow_exact(std::vector<std::int64_t>{0, 0, 10, 0, 10, 0, 0, 0}, 2, costs, false);
  CHECK(pair.shadowed == std::vector<expert_id>{0, 2});
  CHECK(pair.trace == std::vector<double>{10 + 2 * 10, 10 + 2 * 2});
  // Only the eight busiest are tried: of nine equal ones the last is not.
  std::vector<std::int64_t> nine(18, 0);
  for (std::size_t e = 0; e < 9; ++e) nine[e] = nine[9 + e] = 50;
  const shadow_plan most = shadow_exact(nine, 2, costs, false);
  CHECK(std::find(most.shadowed.begin(), most.shadowed.end(), 8) == most.shadowed.end());
  // Three experts on two ranks: the middle one is rank 0's.
  const std::vector<std::uint8_t> nobody(3, 0), middle{0, 1, 0};
  const std::vector<std::int64_t> count{0, 0, 0, 0, 5, 0};
  CHECK(shadow_latency(count, 2, nobody, costs, false) == 5 + 2 * 5);
  CHECK(shadow_latency(count, 2, middle, costs, false) == 5 + 2);
  // As published: what costs as much as it saves is not done, and the trace shows it.
  const shadow_costs even{.d = 1, .ratio = 3.5, .bytes = 1, .bandwidth = 1, .flops = 14};
  const shadow_plan none = shadow_published(std::vector<double>{2, 3}, even);
  CHECK(none.shadowed.empty());
  CHECK(none.trace == std::vector<double>{21, 21});
  CHECK(none.latency == 21);
  const shadow_plan one = shadow_published(std::vector<double>{3, 9, 3}, even);
  CHECK(one.shadowed == std::vector<expert_id>{1});
  CHECK(one.trace == std::vector<double>{63, 28, 35});
  // Everybody: nothing is left to wait for.
  CHECK(shadow_published(std::vector<double>{9}, even).trace == std::vector<double>{63, 7});
}

TEST_CASE("what is spilled goes to the lowest of the ranks with least, in pieces of min_rows on") {
  using ranges = std::vector<rank_range>;
  using moves = std::vector<expert_move>;
  const std::vector<std::int64_t> one{8, 0, 0, 0}, two{4, 4, 0, 0}, six{6, 0, 0}, uneven{3, 1};
  const batch_plan spread = spill(one, 4);
  CHECK(spread.range[0] == ranges{{0, 0, 2}, {1, 2, 4}, {2, 4, 6}, {3, 6, 8}});
  CHECK(spread.moves == moves{{0, 0, 1}, {0, 0, 2}, {0, 0, 3}});
  CHECK(spread.load == std::vector<std::int64_t>{2, 2, 2, 2});
  CHECK((spread.cap == 2 && spread.forced == 0 && spread.enabled));
  // Of equally heavy experts the lowest is placed, and so moved, first.
  const batch_plan first = spill(two, 2);
  CHECK(first.moves == moves{{0, 0, 1}});
  CHECK(first.range[0] == ranges{{1, 0, 4}});
  CHECK(first.range[1] == ranges{{0, 0, 4}});
  // A piece may be as small as min_rows; smaller, all that is left goes to one rank.
  CHECK(spill(six, 3, {.min_rows = 2}).forced == 0);
  const batch_plan forced = spill(six, 3, {.min_rows = 3});
  CHECK(forced.forced == 1);
  CHECK(forced.range[0] == ranges{{0, 0, 2}, {1, 2, 6}});
  CHECK(forced.load == std::vector<std::int64_t>{2, 4, 0});
  // Two pieces of one helper that follow one another are one; home takes none of its own rest.
  const batch_plan joined = spill(std::vector<std::int64_t>{5, 0}, 2);
  CHECK(joined.range[0] == ranges{{0, 0, 2}, {1, 2, 5}});
  CHECK((joined.forced == 1 && joined.moves == moves{{0, 0, 1}}));
  const batch_plan level = spill(std::vector<std::int64_t>{3, 2}, 2);
  CHECK(level.range[0] == ranges{{0, 0, 2}, {1, 2, 3}});
  CHECK((level.forced == 2 && level.moves == moves{{0, 0, 1}, {1, 1, 0}}));
  // The mean is rounded down too, to 1 at least.
  CHECK(spill(std::vector<std::int64_t>{7, 0, 0, 0}, 4).cap == 1);
  CHECK(spill(std::vector<std::int64_t>{3, 0, 0, 0}, 4).cap == 1);
  // alpha widens the cap, rounded down.
  CHECK(spill(six, 3, {.alpha_num = 7, .alpha_den = 4}).cap == 3);
  // Exactly as uneven as lambda is spilled, below it every rank has its own.
  CHECK(spill(uneven, 2, {.lambda = 1.5}).enabled);
  const batch_plan native = spill(uneven, 2, {.lambda = 1.6});
  CHECK_FALSE(native.enabled);
  // Uneven are ranks, whatever their experts are.
  const std::vector<std::int64_t> even{3, 1, 3, 1};
  CHECK_FALSE(spill(even, 2, {.lambda = 1.2}).enabled);
  CHECK((native.cap == 0 && native.moves.empty() && native.load == uneven));
  CHECK(native.range[0] == ranges{{0, 0, 3}});
  CHECK(native.range[1] == ranges{{1, 0, 1}});
  // On one rank everything stays.
  CHECK(spill(one, 1).range[0] == ranges{{0, 0, 8}});
  // Moved experts lie behind a rank's own.
  const batch_placement placed = place_batch(spread);
  const auto slots = placed.experts.expert_of_slot();
  CHECK(std::vector<expert_id>(slots.begin(), slots.end()) ==
        std::vector<expert_id>{0, 1, 0, 2, 0, 3, 0});
  CHECK(placed.ranges.first == std::vector<std::int32_t>{0, 4, 4, 4, 4});
  const slot_id expected[] = {0, 2, 4, 6};
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(placed.ranges.range[i].slot == expected[i]);
    CHECK(placed.ranges.range[i].begin == static_cast<std::int64_t>(2 * i));
    CHECK(placed.ranges.range[i].end == static_cast<std::int64_t>(2 * i + 2));
  }
}

TEST_CASE("a split that fills no pass is the even one, and its ranges follow one another") {
  test::random rng(31);
  index_t better = 0;
  for (int draw = 0; draw < 20; ++draw) {
    std::vector<expert_id> of;
    for (index_t i = 0; i < 12; ++i) of.push_back(static_cast<expert_id>(i < 6 ? i : rng.below(6)));
    const placement p = placement::from_slots(6, 4, of);
    const std::vector<std::int64_t> count = random_counts(rng, 6, true);
    const slot_split even = split_even(p, count), none = split_by_filling(p, count, 0),
                     one = split_by_filling(p, count, 1);
    CHECK(none.of_slot == even.of_slot);
    CHECK(none.rank_load == even.rank_load);
    better += one.max_load < even.max_load;
    const slot_ranges ranges = ranges_of(p, one);
    REQUIRE(ranges.first.size() == 7);
    std::size_t next = 0;
    for (index_t e = 0; e < 6; ++e) {
      CHECK(ranges.first[at(e)] == static_cast<std::int32_t>(next));
      std::int64_t from = 0;
      for (const slot_id s : p.slots_of_expert(e)) {
        const std::int64_t n = one.of_slot[at(s)];
        if (n == 0) continue;
        CHECK(ranges.range[next++] == slot_range{s, from, from + n});
        from += n;
      }
      CHECK(from == count[at(e)]);
    }
    CHECK(ranges.first.back() == static_cast<std::int32_t>(ranges.range.size()));
    CHECK(next == ranges.range.size());
  }
  CHECK(better > 0);
}

TEST_CASE("who has no tokens has no range, spilled or at home") {
  const std::vector<std::int64_t> count{4, 0, 3, 0};
  for (const double lambda : {0.0, 9.0}) {
    const batch_plan plan = spill(count, 2, {.lambda = lambda});
    CHECK(plan.enabled == (lambda == 0.0));
    CHECK((plan.range[1].empty() && plan.range[3].empty()));
  }
  CHECK(balance_exactly(count, 2, {.lambda = 9.0}).batch.range[1].empty());
}

TEST_CASE("shares that are left are renormalised, and even where none is") {
  const std::vector<std::uint8_t> second{1, 0, 1}, third{1, 1, 0}, last{0, 0, 1};
  const std::vector<double> share{0.125, 0.375, 0.5, 1.0, 0.0, 1.0};
  const placement p({.experts = 3,
                     .slot_offset = std::vector<std::int32_t>{0, 2, 4, 6},
                     .expert_of_slot = std::vector<expert_id>{0, 0, 0, 1, 1, 2},
                     .share = share});
  const auto shares = [](const placement& left) {
    return std::vector<double>(left.share().begin(), left.share().end());
  };
  CHECK(shares(without(p, second)) == std::vector<double>{0.25, 0.75, 0, 0, 1, 1});
  CHECK(shares(without(p, third)) == std::vector<double>{0.125, 0.375, 0.5, 1, 0, 0});
  CHECK(shares(without(p, last)) == std::vector<double>{0, 0, 0, 0, 1, 1});
  CHECK(without(p, last).lost() == std::vector<expert_id>{0});
}

TEST_CASE("what a re-plan does next depends on where it is, not on how it came there") {
  test::random rng(32);
  int several = 0, swaps = 0;
  for (int draw = 0; draw < 40; ++draw) {
    const index_t ranks = 3 + draw % 4, per = 3, experts = ranks * per - 2;
    std::vector<expert_id> of;
    for (index_t i = 0; i < ranks * per; ++i)
      of.push_back(static_cast<expert_id>(i < experts ? i : rng.below(experts)));
    for (index_t i = ranks * per - 1; i > 0; --i) std::swap(of[at(i)], of[at(rng.below(i + 1))]);
    if (draw % 3 == 0)  // a slot of nobody
      for (expert_id& e : of)
        if (std::count(of.begin(), of.end(), e) > 1) {
          e = no_expert;
          break;
        }
    placement now = placement::from_slots(experts, ranks, of);
    if (!now.lost().empty()) continue;
    const std::vector<double> w = zipf_loads(experts, 1.0, static_cast<std::uint64_t>(draw), 0.5);
    constexpr index_t budget = 12;
    const replan_result all = replan(now, w, {.target = 1.0, .budget = budget});
    index_t spent = 0;
    for (std::size_t i = 0; i < all.steps.size(); ++i) {
      const replan_result rest = replan(now, w, {.target = 1.0, .budget = budget - spent});
      CHECK(std::vector<replan_step>(all.steps.begin() + static_cast<std::ptrdiff_t>(i),
                                     all.steps.end()) == rest.steps);
      CHECK(rest.experts == all.experts);
      const replan_step& step = all.steps[i];
      std::vector<expert_id> next = slots_of(now);
      if (step.what == replan_step::kind::swap) {
        std::swap(next[at(step.slot)], next[at(step.other)]);
        spent += 2;
        ++swaps;
      } else {
        next[at(step.slot)] = step.other;
        spent += 1;
      }
      now = placement::from_slots(experts, ranks, next);
    }
    CHECK(spent == all.moves);
    CHECK(now == all.experts);
    several += all.steps.size() > 2;
  }
  CHECK(several > 5);
  CHECK(swaps > 5);
}

TEST_CASE("slots are swapped as plain loops over every pair swap them") {
  test::random rng(33);
  int made = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const index_t ranks = 2 + draw % 4, room = 1 + draw % 3, experts = ranks * room - draw % 2;
    if (experts < 2) continue;
    packing p;
    std::vector<expert_id> of;
    for (index_t i = 0; i < ranks * room; ++i)
      of.push_back(static_cast<expert_id>(i < experts ? i : rng.below(experts)));
    for (index_t i = ranks * room - 1; i > 0; --i) std::swap(of[at(i)], of[at(rng.below(i + 1))]);
    p.count.assign(at(experts), 0);
    for (const expert_id e : of) ++p.count[at(e)];
    // Whole numbers, whatever the counts are: many are equal.
    std::vector<double> load;
    for (index_t e = 0; e < experts; ++e)
      load.push_back(static_cast<double>((1 + rng.below(9)) * p.count[at(e)]));
    const auto w = [&](expert_id e) { return load[at(e)] / static_cast<double>(p.count[at(e)]); };
    const auto sums = [&](packing& q) {
      q.load.assign(at(ranks), 0.0);
      for (index_t r = 0; r < ranks; ++r)
        for (const expert_id e : q.of_rank[at(r)]) q.load[at(r)] += w(e);
      q.max_load = *std::max_element(q.load.begin(), q.load.end());
    };
    for (index_t r = 0; r < ranks; ++r)
      p.of_rank.emplace_back(of.begin() + r * room, of.begin() + (r + 1) * room);
    sums(p);
    for (const bool distinct : {true, false}) {
      packing expected = p, got = p;
      for (;;) {
        const auto hot = at(static_cast<index_t>(
            std::max_element(expected.load.begin(), expected.load.end()) - expected.load.begin()));
        double best = expected.load[hot];
        packing next;
        for (std::size_t i = 0; i < expected.of_rank[hot].size(); ++i)
          for (std::size_t k = 0; k < at(ranks); ++k)
            for (std::size_t j = 0; j < at(room); ++j) {
              packing tried = expected;
              const expert_id e = expected.of_rank[hot][i], f = expected.of_rank[k][j];
              if (k == hot || e == f) continue;
              const auto has = [&](std::size_t r, expert_id one) {
                return std::count(expected.of_rank[r].begin(), expected.of_rank[r].end(), one) > 0;
              };
              if (distinct && (has(k, e) || has(hot, f))) continue;
              std::swap(tried.of_rank[hot][i], tried.of_rank[k][j]);
              sums(tried);
              const double hotter = std::max(tried.load[hot], tried.load[k]);
              if (hotter < best) {
                best = hotter;
                next = tried;
              }
            }
        if (next.of_rank.empty()) break;
        expected = next;
        ++made;
      }
      detail::swap_slots(got, load, distinct);
      CHECK(got.of_rank == expected.of_rank);
      CHECK(got.load == expected.load);
      CHECK(got.max_load == expected.max_load);
    }
  }
  CHECK(made > 20);
  // A hundred swaps for each rank at the most: all of one rank weigh 2, all of the other 1.
  packing wide;
  wide.of_rank.resize(2);
  for (expert_id e = 0; e < 900; ++e) wide.of_rank[at(e % 2)].push_back(e);
  wide.count.assign(900, 1);
  wide.load = {900, 450};
  std::vector<double> two_or_one;
  for (int e = 0; e < 900; ++e) two_or_one.push_back(2.0 - e % 2);
  detail::swap_slots(wide, two_or_one, false);
  CHECK(wide.load == std::vector<double>{700, 650});
}

TEST_CASE("searches end where they always ended: loads whose quotients are whole numbers") {
  std::string all;
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    test::random rng(seed);
    std::vector<double> load;
    for (int e = 0; e < 24; ++e)
      load.push_back(5040.0 *
                     static_cast<double>(1 + rng.below(40) + (rng.below(6) == 0 ? 90 : 0)));
    const search_options options[] = {{},
                                      {.candidates = 0, .kicks = 0},
                                      {.candidates = 2, .kicks = 0},
                                      {.candidates = 3, .swaps = false, .kicks = 0},
                                      {.candidates = 3, .distinct = false, .kicks = 0},
                                      {.candidates = 2, .most_steps = 2, .kicks = 2, .good = 1.0},
                                      {.candidates = 1, .most_steps = 0, .kicks = 3, .good = 1.0}};
    for (const search_options& o : options) {
      const packing p = search_packing(load, 42, 6, o);
      REQUIRE(*std::max_element(p.count.begin(), p.count.end()) <= 10);
      // What is said of the ranks is what lies on them: of whole numbers, to the bit.
      double most = 0.0, squares = 0.0;
      for (std::size_t r = 0; r < p.of_rank.size(); ++r) {
        double sum = 0.0;
        for (const expert_id e : p.of_rank[r])
          sum += load[static_cast<std::size_t>(e)] /
                 static_cast<double>(p.count[static_cast<std::size_t>(e)]);
        CHECK(p.load[r] == sum);
        most = std::max(most, sum);
        squares += sum * sum;
      }
      CHECK((p.max_load == most && p.squares == squares));
      std::uint64_t hash = 0xcbf29ce484222325;
      for (const auto& rank : p.of_rank)
        for (const expert_id e : rank)
          hash = (hash ^ static_cast<std::uint64_t>(e)) * 0x100000001b3;
      all += std::to_string(p.steps) + ":" + std::to_string(static_cast<std::int64_t>(p.max_load)) +
             ":" + std::to_string(hash % 100000) + " ";
    }
    all.back() = '\n';
  }
  // Steps, the greatest load and a hash of who is where.
  CHECK("\n" + all == R"(
3:687120:80435 2:687540:75616 3:689052:54069 2:689052:78346 4:687420:60854 1:686700:21829 0:687960:62993
3:614040:72986 2:613872:69412 2:615216:53329 4:617736:64381 2:614880:38258 0:614040:25263 0:614040:25263
0:669480:18530 2:669480:74642 1:670572:33161 1:673092:58249 4:669312:65252 1:669480:47019 0:669060:48074
3:598920:8058 5:598920:91425 1:599340:42845 1:604800:10817 2:599760:81218 0:598920:4608 0:598920:4608
3:670320:59907 1:671580:42663 2:672084:79412 1:672840:33949 2:671160:18769 2:670320:42460 0:670320:51249
)");
}

TEST_CASE("of assignments with equal gain always the same is found") {
  std::string all;
  for (std::uint64_t seed = 1; seed <= 12; ++seed) {
    test::random rng(seed);
    const index_t n = 3 + static_cast<index_t>(seed % 4);
    std::vector<double> gain;
    for (index_t i = 0; i < n * n; ++i) gain.push_back(static_cast<double>(rng.below(3)));
    for (const index_t c : detail::assign_best(gain, n)) all += std::to_string(c);
    all += ' ';
    for (const index_t c : detail::assign_greedy(gain, n)) all += std::to_string(c);
    all += '\n';
  }
  CHECK("\n" + all == R"(
2031 2031
12304 12034
032415 032415
102 102
0321 0321
34120 01243
524013 524031
120 210
3102 3201
20341 20341
314052 104532
120 021
)");
}

TEST_CASE("what is lost is listed, sixteen of it at the most") {
  const auto said = [](index_t there, index_t experts) {
    std::vector<expert_id> of;
    for (index_t e = 0; e < there; ++e) of.push_back(static_cast<expert_id>(e));
    const placement p = placement::from_slots(experts, 1, of);
    return test::refusal([&] { p.check_hosted("here"); });
  };
  CHECK(said(2, 2) == "accepted");
  CHECK(said(1, 4) == "moeroute::here: 3 experts have no live slot: 1, 2, 3");
  CHECK(said(1, 17) ==
        "moeroute::here: 16 experts have no live slot: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, "
        "14, 15, 16");
  CHECK(said(1, 18) ==
        "moeroute::here: 17 experts have no live slot: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, "
        "14, 15, 16, ...");
}

TEST_CASE("dead ranks get and give nothing, and are renamed to each other's names alone") {
  test::random rng(34);
  index_t renamed = 0, sent = 0;
  for (int draw = 0; draw < 500; ++draw) {
    const index_t nodes = 1 + rng.below(2), places = nodes == 1 ? 2 + rng.below(3) : 2,
                  ranks = nodes * places, per = 1 + rng.below(3), experts = per + 1 + rng.below(4);
    std::vector<std::int32_t> node;
    for (index_t r = 0; r < ranks; ++r) node.push_back(static_cast<std::int32_t>(r / places));
    const auto drawn = [&](index_t dead) {
      std::vector<expert_id> of;
      for (index_t r = 0; r < ranks; ++r) {
        std::vector<expert_id> own;  // each once
        for (index_t e = 0; e < experts; ++e) own.push_back(static_cast<expert_id>(e));
        for (index_t e = experts - 1; e > 0; --e) std::swap(own[at(e)], own[at(rng.below(e + 1))]);
        if (rng.below(4) == 0) own[0] = no_expert;
        of.insert(of.end(), own.begin(), own.begin() + per);
      }
      std::vector<std::uint8_t> alive(at(ranks), 1);
      for (; dead > 0; --dead) alive[at(rng.below(ranks))] = 0;
      const placement even = placement::from_slots(experts, ranks, of, node, alive);
      std::vector<double> share(even.share().begin(), even.share().end());
      for (index_t e = 0; e < experts; ++e)  // the first live slot takes more
        if (const auto s = even.slots_of_expert(e); s.size() > 1) {
          share[at(s[0])] += share[at(s[1])] / 2;
          share[at(s[1])] /= 2;
        }
      return placement({.experts = experts,
                        .slot_offset = even.slot_offset(),
                        .expert_of_slot = of,
                        .node_of_rank = node,
                        .alive = alive,
                        .share = share});
    };
    const placement old = drawn(rng.below(3)), made = drawn(rng.below(4));
    const auto moves = [&](const std::vector<index_t>& name) {
      index_t n = 0;
      for (index_t r = 0; r < ranks; ++r) {
        const index_t to = name[at(r)];
        if (made.alive()[at(r)] == 0) continue;
        for (const expert_id e : made.experts_of_rank(r)) {
          const auto here = old.experts_of_rank(to);
          const bool there =
              old.alive()[at(to)] != 0 && std::find(here.begin(), here.end(), e) != here.end();
          n += e >= 0 && !there;
        }
      }
      return n;
    };
    std::vector<index_t> name(at(ranks)), as_it_is;
    std::iota(name.begin(), name.end(), index_t{0});
    as_it_is = name;
    CHECK(count_moves(old, made) == moves(as_it_is));
    index_t fewest = moves(as_it_is);
    do {
      bool allowed = true;
      for (index_t a = 0; a < ranks; ++a) {
        allowed = allowed && made.alive()[at(a)] == made.alive()[at(name[at(a)])];
        for (index_t b = 0; b < ranks; ++b)
          allowed = allowed && (node[at(a)] == node[at(b)]) ==
                                   (node[at(name[at(a)])] == node[at(name[at(b)])]);
      }
      if (allowed) fewest = std::min(fewest, moves(name));
    } while (std::next_permutation(name.begin(), name.end()));
    const placement named = relabel(old, made);
    CHECK(count_moves(old, named) == fewest);
    renamed += fewest < moves(as_it_is);
    CHECK(std::ranges::equal(named.alive(), made.alive()));
    // Ranks with all that they hold, and with which part of each.
    const auto contents = [&](const placement& p) {
      std::vector<std::vector<std::pair<expert_id, double>>> list;
      for (index_t r = 0; r < ranks; ++r) {
        list.emplace_back();
        for (index_t s = p.first_slot(r); s < p.first_slot(r) + p.slots(r); ++s)
          list.back().push_back({p.expert_of_slot()[at(s)], p.share()[at(s)]});
        std::sort(list.back().begin(), list.back().end());
      }
      std::sort(list.begin(), list.end());
      return list;
    };
    CHECK(contents(named) == contents(made));
    // What stays on its rank stays in its slot.
    for (index_t s = 0; s < old.slots(); ++s) {
      const index_t r = old.rank_of_slot()[at(s)];
      const expert_id e = old.expert_of_slot()[at(s)];
      const auto now = named.experts_of_rank(r);
      if (e >= 0 && std::find(now.begin(), now.end(), e) != now.end())
        CHECK(named.expert_of_slot()[at(s)] == e);
    }

    bool all_there = true;
    for (const expert_id e : old.lost()) all_there = all_there && named.replicas(e) == 0;
    if (!all_there) {
      CHECK(test::refusal([&] { transfers(old, named); }).ends_with("to be copied from"));
      continue;
    }
    std::vector<expert_transfer> want;
    std::vector<std::size_t> turn(at(experts), 0);
    for (index_t s = 0; s < named.slots(); ++s) {
      const index_t r = named.rank_of_slot()[at(s)];
      const expert_id e = named.expert_of_slot()[at(s)];
      const auto here = old.experts_of_rank(r);
      if (e < 0 || named.alive()[at(r)] == 0) continue;
      if (old.alive()[at(r)] != 0 && std::find(here.begin(), here.end(), e) != here.end()) continue;
      const auto from = old.slots_of_expert(e);
      want.push_back({e, old.rank_of_slot()[at(from[turn[at(e)]++ % from.size()])],
                      static_cast<std::int32_t>(r), static_cast<slot_id>(s)});
    }
    const std::vector<expert_transfer> got = transfers(old, named);
    REQUIRE(got.size() == want.size());
    CHECK(static_cast<index_t>(got.size()) == fewest);
    for (std::size_t i = 0; i < got.size(); ++i)
      CHECK((got[i].expert == want[i].expert && got[i].from == want[i].from &&
             got[i].to == want[i].to && got[i].slot == want[i].slot));
    sent += fewest;
  }
  CHECK(renamed > 10);
  CHECK(sent > 20);
}

TEST_CASE(
    "what plans of affinity, groups and shadows cost is summed again, and no swap costs less") {
  test::random rng(35);
  for (int draw = 0; draw < 40; ++draw) {
    const index_t ranks = 2 + rng.below(3), own = 1 + rng.below(3), experts = ranks * own;
    std::vector<std::int32_t> node;
    for (index_t r = 0; r < ranks && draw % 3 > 0; ++r)
      node.push_back(static_cast<std::int32_t>(rng.below(2)));
    const auto across = [&](std::int32_t a, std::int32_t b) {
      return !node.empty() && node[at(a)] != node[at(b)];
    };
    layer_transitions t{.experts = experts};
    for (index_t l = rng.below(3); l > 0; --l) {
      t.count.emplace_back();
      for (index_t i = 0; i < experts * experts; ++i)
        t.count.back().push_back(static_cast<double>(rng.below(4) * rng.below(9)));
    }
    affinity_options o{.ranks = ranks, .node_of_rank = node};
    o.weight_within = static_cast<double>(rng.below(3));
    o.weight_across = static_cast<double>(1 + rng.below(5));
    o.restarts = rng.below(4);
    const auto cost = [&](const std::vector<std::vector<std::int32_t>>& rank) {
      double sum = 0.0;
      for (std::size_t l = 0; l < t.count.size(); ++l)
        for (index_t i = 0; i < experts; ++i)
          for (index_t j = 0; j < experts; ++j) {
            const std::int32_t a = rank[l][at(i)], b = rank[l + 1][at(j)];
            if (a == b) continue;
            sum += t.count[l][at(i * experts + j)] *
                   (across(a, b) ? o.weight_across : o.weight_within);
          }
      return sum;
    };
    affinity_plan plan = place_by_affinity(t, o);
    CHECK(plan.rank_of_expert.size() == t.count.size() + 1);
    CHECK(near(plan.cost, cost(plan.rank_of_expert)));
    CHECK(near(plan.cost, affinity_cost(t, o, plan.rank_of_expert)));
    for (auto& layer : plan.rank_of_expert)
      for (std::int32_t& a : layer)
        for (std::int32_t& b : layer) {
          std::swap(a, b);
          CHECK(cost(plan.rank_of_expert) >= plan.cost - 1e-6);
          std::swap(a, b);
        }

    // From a layer 0 of any order: the expert whose second choice costs most more than its first.
    std::vector<std::int32_t> layer;
    for (index_t e = 0; e < experts; ++e) layer.push_back(static_cast<std::int32_t>(e % ranks));
    for (index_t e = experts - 1; e > 0; --e) std::swap(layer[at(e)], layer[at(rng.below(e + 1))]);
    std::vector<std::vector<std::int32_t>> greedy{layer};
    for (const auto& n : t.count) {
      std::vector<std::int32_t> next(at(experts), -1);
      for (index_t placed = 0; placed < experts; ++placed) {
        double regret = -1.0;
        std::size_t who = 0;
        std::int32_t where = 0;
        for (std::size_t e = 0; e < next.size(); ++e) {
          std::vector<std::pair<double, std::int32_t>> price;
          for (std::int32_t r = 0; r < ranks; ++r) {
            if (std::count(next.begin(), next.end(), r) == own) continue;
            price.emplace_back(0.0, r);
            for (std::size_t i = 0; i < next.size(); ++i)
              if (const std::int32_t from = greedy.back()[i]; from != r)
                price.back().first +=
                    n[i * next.size() + e] * (across(from, r) ? o.weight_across : o.weight_within);
          }
          std::sort(price.begin(), price.end());
          const double more = price.size() > 1 ? price[1].first - price[0].first : 1e300;
          if (next[e] >= 0 || more <= regret) continue;
          regret = more;
          who = e;
          where = price[0].second;
        }
        next[who] = where;
      }
      greedy.push_back(next);
    }
    CHECK(affinity_from(t, o, layer, false).rank_of_expert == greedy);

    std::vector<token_set> sets;
    for (index_t i = rng.below(20); i > 0; --i) {
      sets.push_back({{}, 0.25 * static_cast<double>(rng.below(9))});
      for (index_t n = rng.below(4); n > 0; --n)
        sets.back().experts.push_back(static_cast<expert_id>(rng.below(experts)));
    }
    std::vector<double> load;
    std::vector<std::int32_t> start;
    for (index_t e = 0; e < experts; ++e) {
      load.push_back(static_cast<double>(1 + rng.below(9)));
      start.push_back(static_cast<std::int32_t>(e % ranks));
    }
    grouping_options g{.ranks = ranks, .node_of_rank = node};
    g.weight_node = static_cast<double>(rng.below(5));
    g.weight_rank = static_cast<double>(rng.below(3));
    g.slack = 1.0 + 0.25 * static_cast<double>(rng.below(4));
    const auto reached = [&](const std::vector<std::int32_t>& rank) {
      double sum = 0.0;
      for (const token_set& s : sets) {
        std::vector<std::uint8_t> there(at(ranks), 0), near_to(at(ranks), 0);
        for (const expert_id e : s.experts) {
          const std::int32_t r = rank[at(e)];
          there[at(r)] = near_to[at(node.empty() ? 0 : node[at(r)])] = 1;
        }
        for (index_t r = 0; r < ranks; ++r)
          sum += s.count * (g.weight_rank * there[at(r)] + g.weight_node * near_to[at(r)]);
      }
      return sum;
    };
    const auto greatest = [&](const std::vector<std::int32_t>& rank) {
      std::vector<double> of(at(ranks), 0.0);
      for (index_t e = 0; e < experts; ++e) of[at(rank[at(e)])] += load[at(e)];
      return *std::max_element(of.begin(), of.end());
    };
    grouping_plan made = group_experts(sets, load, start, g);
    CHECK(near(made.start_cost, reached(start)));
    CHECK(near(made.cost, reached(made.rank_of_expert)));
    CHECK(near(made.max_load, greatest(made.rank_of_expert)));
    const double mean = std::accumulate(load.begin(), load.end(), 0.0) / double(ranks),
                 limit = std::max(g.slack * mean, greatest(start)) + 1e-9;
    CHECK(made.max_load <= limit);
    for (std::int32_t& a : made.rank_of_expert)
      for (std::int32_t& b : made.rank_of_expert) {
        std::swap(a, b);
        if (greatest(made.rank_of_expert) <= limit - 2e-9)
          CHECK(reached(made.rank_of_expert) >= made.cost - 1e-6);
        std::swap(a, b);
      }

    // A batch with shadows: every row of every pair of ranks.
    std::vector<std::int64_t> count;
    for (index_t i = 0; i < ranks * experts; ++i) count.push_back(rng.below(3) * rng.below(30));
    std::vector<std::uint8_t> shadowed;
    for (index_t e = 0; e < experts; ++e) shadowed.push_back(rng.below(3) == 0);
    const auto some = [&] { return static_cast<double>(1 + rng.below(4)); };
    const double d0 = some(), ratio = 0.5 * some(), bytes = some();
    const shadow_costs price{d0, ratio, bytes, 8.0, 64.0};
    for (const bool training : {false, true}) {
      std::vector<double> rows(at(ranks), 0.0), in = rows, out = rows;
      double shadows = 0.0;
      for (index_t e = 0; e < experts; ++e) shadows += shadowed[at(e)];
      for (index_t r = 0; r < ranks; ++r)
        for (index_t e = 0; e < experts; ++e) {
          const auto n = static_cast<double>(count[at(r * experts + e)]);
          const index_t by = shadowed[at(e)] != 0 ? r : e / own;
          rows[at(by)] += n;
          if (by == r) continue;
          out[at(r)] += n;
          in[at(by)] += n;
        }
      const auto most = [](const std::vector<double>& v) {
        return *std::max_element(v.begin(), v.end());
      };
      const double d = price.d, r = price.ratio,
                   want =
                       (training ? 3 : 1) * most(rows) * 4 * r * d * d / 64.0 +
                       (training ? 4 : 2) * std::max(most(in), most(out)) * d * price.bytes / 8.0 +
                       (training ? 2 : 1) * shadows * 2 * r * d * d * price.bytes / 8.0;
      CHECK(near(shadow_latency(count, ranks, shadowed, price, training), want));
      const shadow_plan best = shadow_exact(count, ranks, price, training);
      std::vector<std::uint8_t> flags(at(experts), 0);
      CHECK(near(best.trace.front(), shadow_latency(count, ranks, flags, price, training)));
      for (const expert_id e : best.shadowed) flags[at(e)] = 1;
      CHECK(near(best.latency, shadow_latency(count, ranks, flags, price, training)));
      CHECK(best.latency == best.trace.back());
    }
  }
}

}  // namespace planners_test
