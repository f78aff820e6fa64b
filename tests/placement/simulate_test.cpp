#include <moeroute/placement/simulate.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <moeroute/placement/traffic.hpp>
#include <string>
#include <vector>

#include "support/placement_figures.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace {

std::vector<double> counts_of(const expert_traffic& t, double n) {
  std::vector<double> c;
  for (const double p : t.popularity()) c.push_back(n * p);
  return c;
}

}  // namespace

TEST_CASE("figures known from elsewhere come out here") {
  for (const example::placement_figure& f : example::placement_figures()) {
    INFO(f.name << ": known " << f.known << ", here " << f.here << ", may differ by "
                << f.tolerance);
    CHECK(f.holds());
  }
}

TEST_CASE("tokens drawn reach as many ranks and nodes as the formula says, within four errors") {
  // Uniform popularity: Zipf 0 without noise.
  const expert_traffic traffic({.experts = 64, .zipf = 0.0, .noise = 0.0});
  std::vector<expert_id> ids;
  constexpr index_t tokens = 4000, k = 6;
  traffic.draw(tokens, k, 1, ids);
  for (const index_t groups : {8, 16, 2}) {
    double sum = 0.0, squares = 0.0;
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<bool> seen(64, false);
      double n = 0.0;
      for (index_t r = 0; r < k; ++r) {
        const auto g =
            static_cast<std::size_t>(ids[static_cast<std::size_t>(t * k + r)] * groups / 64);
        n += seen[g] ? 0.0 : 1.0;
        seen[g] = true;
      }
      sum += n;
      squares += n * n;
    }
    const double mean = sum / tokens, error = std::sqrt((squares / tokens - mean * mean) / tokens);
    CHECK(std::abs(mean - expected_distinct(64, k, groups)) <= 4.0 * error);
  }
  // Distinct experts, and the same draw again.
  std::vector<expert_id> again;
  traffic.draw(tokens, k, 1, again);
  CHECK(ids == again);
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<expert_id> own(ids.begin() + t * k, ids.begin() + (t + 1) * k);
    std::sort(own.begin(), own.end());
    REQUIRE(std::adjacent_find(own.begin(), own.end()) == own.end());
  }
}

TEST_CASE("traffic drifts, switches, and sums to one") {
  expert_traffic t({.experts = 32, .zipf = 1.2, .drift = 0.1, .switch_at = 3});
  std::vector<double> before(t.popularity().begin(), t.popularity().end());
  for (int step = 1; step <= 4; ++step) {
    t.advance();
    double sum = 0.0, change = 0.0;
    for (std::size_t e = 0; e < 32; ++e) {
      sum += t.popularity()[e];
      change += std::abs(t.popularity()[e] - before[e]);
    }
    CHECK(std::abs(sum - 1.0) < 1e-12);
    CHECK((change > 0.3) == (step == 3));
    before.assign(t.popularity().begin(), t.popularity().end());
  }
}

TEST_CASE("a simulated layer plans by what it saw, from its second step on, every so many steps") {
  simulation_options o{.planner = planner_kind::eplb, .slots = 80, .replan_every = 2, .k = 4};
  o.machine.ranks = 16;
  layer_simulation layer(64, o);
  for (index_t step = 0; step < 6; ++step) {
    std::vector<double> count(64, 1.0);
    for (std::size_t e = 0; e < 8; ++e) count[8 * static_cast<std::size_t>(step) + e] = 100.0;
    const placement before = layer.experts();
    const simulated_step s = layer.next(count);
    CHECK((layer.experts() == before) == (step % 2 == 0));
    CHECK((s.moves > 0.0) == (step % 2 == 1));
  }
}

TEST_CASE("simulated rows are conserved, time grows with load and with links that are slower") {
  for (const planner_kind planner :
       {planner_kind::contiguous, planner_kind::eplb, planner_kind::search,
        planner_kind::incremental, planner_kind::batch_split, planner_kind::spill,
        planner_kind::exact_balance}) {
    INFO(planner_names[static_cast<std::size_t>(planner)]);
    simulation_options o{.planner = planner, .slots = 80, .k = 4};
    o.machine.ranks = 16;
    o.machine.nodes = 4;
    simulation_options slow = o;
    slow.machine.outside.beta *= 10.0;
    layer_simulation a(64, o), b(64, slow), twice(64, o);
    const expert_traffic traffic({.experts = 64, .zipf = 1.1});
    const std::vector<double> count = counts_of(traffic, 65536.0);
    std::vector<double> more = count;
    for (double& c : more) c *= 2.0;
    for (int step = 0; step < 3; ++step) {
      const simulated_step x = a.next(count), y = b.next(count), z = twice.next(more);
      CHECK(x.imbalance >= 1.0);
      CHECK(y.seconds.total() >= x.seconds.total());
      CHECK(z.seconds.total() >= x.seconds.total());
      CHECK(x.off_rank_rows <= 4.0);
      CHECK(x.off_node_rows <= x.off_rank_rows);
    }
    // Planned on what it then sees, a placement with replicas is nearly even.
    const double last = a.next(count).imbalance;
    if (planner == planner_kind::contiguous) CHECK(last > 2.0);
    if (planner == planner_kind::search || planner == planner_kind::exact_balance)
      CHECK(last < 1.003);
    CHECK(a.experts().lost().empty());
  }
}

TEST_CASE("one rank exchanges nothing, no tokens take no time") {
  simulation_options o{.planner = planner_kind::contiguous, .k = 2};
  layer_simulation one(8, o);
  const simulated_step s = one.next(std::vector<double>(8, 100.0));
  CHECK(s.seconds.dispatch == 0.0);
  CHECK(s.seconds.results == 0.0);
  CHECK(s.seconds.header == 0.0);
  CHECK(s.off_rank_rows == 0.0);
  o.machine.ranks = 4;
  layer_simulation none(8, o);
  const simulated_step nothing = none.next(std::vector<double>(8, 0.0));
  CHECK(nothing.seconds.compute == 0.0);
  CHECK(nothing.seconds.dispatch == 0.0);
  CHECK(nothing.seconds.results == 0.0);
  CHECK(nothing.off_rank_rows == 0.0);
  CHECK(nothing.off_node_rows == 0.0);
  CHECK(nothing.imbalance == 1.0);
  CHECK(nothing.seconds.header == 2.0 * o.machine.inside.alpha);
}

TEST_CASE("two levels pay (N - 1) + (G - 1) messages, a fitted link is the one that was measured") {
  cluster c{.ranks = 32, .nodes = 4};
  c.inside = {1e-6, 0.0};
  c.outside = {1e-5, 0.0};
  CHECK(std::abs(two_level_seconds(c, 0, 0, 0) - (3 * 1e-5 + 7 * 1e-6)) < 1e-15);
  const rank_traffic t{.peers_inside = 7, .peers_outside = 24};
  CHECK(std::abs(exchange_seconds(c, t) - (24 * 1e-5 + 7 * 1e-6)) < 1e-15);
  const std::vector<double> bytes{1e3, 1e5, 1e6},
      seconds{3e-6 + 1e3 / 1e9, 3e-6 + 1e5 / 1e9, 3e-6 + 1e6 / 1e9};
  const link_cost l = fit_link(bytes, seconds);
  CHECK(std::abs(l.alpha - 3e-6) < 1e-12);
  CHECK(std::abs(l.beta - 1e-9) < 1e-16);
  // Chunks of nothing but work and rows: the longest stage hides the others.
  const layer_seconds even{.dispatch = 1.0, .compute = 1.0, .results = 1.0};
  CHECK(std::abs(chunked_seconds(even, 0.0, 1) - 3.0) < 1e-12);
  CHECK(std::abs(chunked_seconds(even, 0.0, 10) - 1.2) < 1e-12);
  CHECK(chunked_seconds(even, 0.9, 10) > 3.0);
}

TEST_CASE("all tokens to all ranks cost what nobody needs, and nothing where everybody needs all") {
  // One choice of 8 experts on 4 ranks: of three quarters that come, a quarter was asked for.
  CHECK(gather_excess_bytes(8, 4, 10, 10, 100.0) == 10 * 0.75 * 0.75 * 100.0);
  CHECK(gather_excess_bytes(8, 4, 10, 80, 100.0) == 0.0);
  CHECK(gather_excess_bytes(8, 1, 10, 10, 100.0) == 0.0);
  CHECK(gather_excess_bytes(8, 4, 0, 0, 100.0) == 0.0);
  // More ranks than experts: most get what they have no use for.
  CHECK(gather_excess_bytes(2, 8, 8, 8, 1.0) == 8 * 0.875 * 0.875);
  // No choices at all count as one each, a ragged mean is rounded up.
  CHECK(gather_excess_bytes(8, 4, 10, 0, 1.0) == gather_excess_bytes(8, 4, 10, 10, 1.0));
  CHECK(gather_excess_bytes(8, 4, 10, 11, 1.0) == gather_excess_bytes(8, 4, 10, 20, 1.0));
}

TEST_CASE("simulations refuse by name what does not fit") {
  const auto said = [](simulation_options o, index_t experts = 8) {
    return test::refusal([&] { layer_simulation(experts, o); });
  };
  simulation_options o{.k = 2};
  o.machine.ranks = 4;
  CHECK(said(o) == "moeroute::simulate: slots is 0, expected 8 to 2147483647");
  o.slots = 12;
  CHECK(said(o) == "accepted");
  o.machine.nodes = 3;
  CHECK(said(o) == "moeroute::simulate: 4 ranks on 3 nodes, expected a multiple of the nodes");
  o.machine.nodes = 1;
  o.machine.rows_per_second = 0.0;
  CHECK(said(o).find("rows_per_second is 0") != std::string::npos);
  o.machine.rows_per_second = 1.0;
  o.k = 9;
  CHECK(said(o) == "moeroute::simulate: k is 9, expected 1 to 8");
  o.k = 2;
  o.memory = 1.0;
  CHECK(said(o).find("memory is 1") != std::string::npos);
  o.memory = 0.0;
  layer_simulation layer(8, o);
  CHECK(test::refusal([&] { layer.next(std::vector<double>(7, 1.0)); }) ==
        "moeroute::simulate: count.size() is 7, expected 8");
  CHECK(test::refusal([&] {
          layer.next(std::vector<double>(8, -1.0));
        }).find("expected a finite number >= 0") != std::string::npos);
}

TEST_CASE("every number of a cluster and of a simulation is refused by its own name") {
  simulation_options good{.planner = planner_kind::contiguous, .k = 2};
  good.machine.ranks = 4;
  const auto said = [&](auto&& change, index_t experts = 8) {
    simulation_options o = good;
    change(o);
    return test::refusal([&] { layer_simulation(experts, o); });
  };
  CHECK(said([](auto&) {}) == "accepted");
  CHECK(said([](auto&) {}, 0) == "moeroute::simulate: experts is 0, expected 1 to 1048576");
  CHECK(said([](auto& o) { o.k = 0; }) == "moeroute::simulate: k is 0, expected 1 to 8");
  CHECK(said([](auto& o) { o.replan_every = 0; }) ==
        "moeroute::simulate: replan_every is 0, expected 1 to 1073741824");
  CHECK(said([](auto& o) { o.memory = -0.5; }) ==
        "moeroute::simulate: memory is -0.500000, expected 0 to 1");
  CHECK(said([](auto& o) { o.machine.ranks = 0; }) ==
        "moeroute::simulate: ranks is 0, expected 1 to 1048576");
  CHECK(said([](auto& o) { o.machine.nodes = 0; }) ==
        "moeroute::simulate: nodes is 0, expected 1 to 4");
  CHECK(said([](auto& o) { o.machine.nodes = 5; }) ==
        "moeroute::simulate: nodes is 5, expected 1 to 4");
  CHECK(said([](auto& o) { o.machine.block = 0; }) ==
        "moeroute::simulate: block is 0, expected 1 to 2147483647");
  CHECK(said([](auto& o) { o.machine.rows_per_second = std::nan(""); }) ==
        "moeroute::simulate: rows_per_second is nan, expected > 0");
  good.planner = planner_kind::exact_balance;
  layer_simulation exact(8, good);
  CHECK(test::refusal([&] { exact.next(std::vector<double>(8, 0x1.8p40)); }) ==
        "moeroute::simulate: count is 1649267441664.000000, expected 0 to 2^40");
  CHECK(exact.next(std::vector<double>(8, 0x1p40)).imbalance == 1.0);
  double cluster::* const costs[] = {&cluster::call_seconds, &cluster::row_bytes,
                                     &cluster::expert_bytes};
  for (const auto cost : costs) {
    CHECK(said([&](auto& o) { o.machine.*cost = 0.0; }) == "accepted");
    CHECK(said([&](auto& o) { o.machine.*cost = -1.0; }) ==
          "moeroute::simulate: a cost is -1.000000, expected a finite number >= 0");
  }
  for (link_cost cluster::* const link : {&cluster::inside, &cluster::outside})
    for (double link_cost::* const part : {&link_cost::alpha, &link_cost::beta})
      CHECK(said([&](auto& o) { o.machine.*link.*part = HUGE_VAL; }) ==
            "moeroute::simulate: a cost is inf, expected a finite number >= 0");
}
