#include <moeroute/placement/simulate.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/placement/traffic.hpp>
#include <string>
#include <vector>

#include "support/placement_figures.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace simulate_test {

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
  // Of two experts each is the popular one as often as the other.
  int first = 0;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    const expert_traffic two({.experts = 2, .zipf = 1.0, .noise = 0.0, .seed = seed});
    first += two.popularity()[0] > two.popularity()[1];
  }
  CHECK(std::abs(first - 200) < 60);
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

TEST_CASE("simulated rows leave ranks and nodes as often as their numbers say") {
  for (const auto& [ranks, nodes] : {std::pair<index_t, index_t>{8, 4}, {8, 2}, {6, 3}, {4, 1}}) {
    const double r = static_cast<double>(ranks), n = static_cast<double>(nodes);
    simulation_options o{.planner = planner_kind::contiguous, .k = 1};
    o.machine.ranks = ranks;
    o.machine.nodes = nodes;
    // One choice goes to one rank, wherever the load is; of its own rank and node all know.
    std::vector<double> skewed;
    for (index_t e = 0; e < 2 * ranks; ++e) skewed.push_back(static_cast<double>(e * e % 11));
    const simulated_step one = layer_simulation(2 * ranks, o).next(skewed);
    CHECK(std::abs(one.off_rank_rows - (1.0 - 1.0 / r)) < 1e-12);
    CHECK(std::abs(one.off_node_rows - (1.0 - 1.0 / n)) < 1e-12);
    // Three even ones meet on a rank or a node at times.
    o.k = 3;
    const simulated_step three =
        layer_simulation(2 * ranks, o)
            .next(std::vector<double>(static_cast<std::size_t>(2 * ranks), 9.0));
    const auto reached = [](double places) {
      return places * (1.0 - std::pow(1.0 - 1.0 / places, 3.0));
    };
    CHECK(std::abs(three.off_rank_rows - reached(r) * (1.0 - 1.0 / r)) < 1e-12);
    CHECK(std::abs(three.off_node_rows - reached(n) * (1.0 - 1.0 / n)) < 1e-12);
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

TEST_CASE("no load is balanced, whether ranks have none or there are no ranks") {
  for (const std::vector<double>& load : {std::vector<double>{}, std::vector<double>{0.0, 0.0}}) {
    const rank_balance b = balance_of(load);
    CHECK((b.imbalance == 1.0 && b.max_load == 0.0 && b.mean_load == 0.0));
  }
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

TEST_CASE("every price of a cluster counts where it should, and in a simulation of it too") {
  const cluster c{.ranks = 6,
                  .nodes = 2,
                  .inside = {1.0, 2.0},
                  .outside = {16.0, 32.0},
                  .rows_per_second = 0.5,
                  .call_seconds = 7.0,
                  .block = 4,
                  .row_bytes = 3.0,
                  .expert_bytes = 5.0};
  const rank_traffic t{.sent_inside = 2,
                       .received_inside = 5,
                       .sent_outside = 4,
                       .received_outside = 3,
                       .peers_inside = 2,
                       .peers_outside = 3};
  CHECK(exchange_seconds(c, t) == 2 * 1.0 + 5 * 3.0 * 2.0 + 3 * 16.0 + 4 * 3.0 * 32.0);
  CHECK(two_level_seconds(c, 6, 7, 8) == 16.0 + 7 * 3.0 * 32.0 + 2 * 1.0 + 8 * 3.0 * 2.0);
  const std::vector<double> rows{0, 1, 4, 5};
  CHECK(compute_seconds(c, rows) == 3 * 7.0 + (4 + 4 + 8) / 0.5);
  CHECK(transfer_seconds(c, 2) == 2 * (16.0 + 5.0 * 32.0));
  cluster near_by = c;
  near_by.nodes = 1;
  CHECK(transfer_seconds(near_by, 2) == 2 * (1.0 + 5.0 * 2.0));
  // Two chunks of 2.5, 4 and 3.5 seconds: out, work, back, and the longest once more.
  const layer_seconds one{
      .header = 1.0, .dispatch = 4.0, .compute = 8.0, .results = 6.0, .transfer = 2.0};
  CHECK(chunked_seconds(one, 1.0, 2) == 1.0 + 2.0 + 2.5 + 4.0 + 3.5 + 4.0);

  layer_simulation layer(6, {.planner = planner_kind::contiguous, .k = 2, .machine = c});
  const simulated_step s = layer.next(std::vector<double>{1, 1, 1, 1, 1, 9});
  CHECK(s.seconds.compute == 7.0 + 12 / 0.5);
  CHECK(s.seconds.header == 2 * 16.0);
  cluster heavy = c;
  heavy.expert_bytes = 50.0;
  heavy.row_bytes = 6.0;
  const std::vector<double> skewed{1000, 1, 1, 1, 1, 1};
  double sent[2] = {}, moved[2] = {};
  for (int i = 0; i < 2; ++i) {
    layer_simulation spilled(
        6, {.planner = planner_kind::spill, .k = 2, .machine = i == 0 ? c : heavy});
    const simulated_step step = spilled.next(skewed);
    sent[i] = step.seconds.dispatch - 2 * 1.0 - 3 * 16.0;
    moved[i] = step.seconds.transfer;
  }
  CHECK(std::abs(sent[1] - 2 * sent[0]) < 1e-9 * sent[1]);
  CHECK(moved[0] > 0.0);
  CHECK(std::abs(moved[1] / moved[0] - (16.0 + 50.0 * 32.0) / (16.0 + 5.0 * 32.0)) < 1e-12);
}

TEST_CASE("a simulated layer plans with its own options, from loads that fade as it says") {
  for (const double memory : {0.0, 0.5})
    for (const planner_kind planner :
         {planner_kind::eplb, planner_kind::search, planner_kind::incremental}) {
      INFO(planner_names[static_cast<std::size_t>(planner)] << ", memory " << memory);
      simulation_options o{.planner = planner,
                           .slots = 40,
                           .memory = memory,
                           .incremental = {.target = 1.001, .budget = 5},
                           .search = {.most_steps = 1, .swaps = false, .kicks = 0},
                           .k = 2};
      o.machine.ranks = 8;
      layer_simulation layer(32, o);
      const expert_traffic traffic({.experts = 32, .zipf = 1.3});
      std::vector<double> count, past(32, 0.0);
      const std::vector<std::int32_t> node(8, 0);
      for (std::uint64_t step = 0; step < 4; ++step) {
        traffic.sample(3000.0, step, count);
        std::rotate(count.begin(), count.begin() + static_cast<std::ptrdiff_t>(5 * step),
                    count.end());
        const placement before = layer.experts();
        const simulated_step s = layer.next(count);
        if (step > 0) {
          placement want = before;
          if (planner == planner_kind::eplb) {
            want = eplb_plan(past, 40, 8).experts;
          } else if (planner == planner_kind::search || step == 1) {
            want = search_placement(past, 40, 8, o.search, node).experts;
            if (step > 1) want = relabel(before, want);
          } else {
            want = replan(before, past, o.incremental).experts;
          }
          const auto a = layer.experts().expert_of_slot(), b = want.expert_of_slot();
          CHECK(std::vector<expert_id>(a.begin(), a.end()) ==
                std::vector<expert_id>(b.begin(), b.end()));
          CHECK(s.moves == static_cast<double>(count_moves(before, want)));
        }
        for (std::size_t e = 0; e < 32; ++e) past[e] = memory * past[e] + count[e];
      }
    }
}

TEST_CASE("traffic has the spread, the drift and the batches that its options say") {
  constexpr index_t experts = 512;
  for (const double zipf : {0.0, 0.5, 1.7}) {
    const expert_traffic t({.experts = experts, .zipf = zipf, .noise = 0.0});
    std::vector<double> p(t.popularity().begin(), t.popularity().end());
    std::sort(p.rbegin(), p.rend());
    for (std::size_t i = 0; i < p.size(); ++i)
      REQUIRE(std::abs(p[i] / p[0] - std::pow(static_cast<double>(i + 1), -zipf)) < 1e-9);
  }
  for (const double noise : {0.05, 0.5}) {
    const expert_traffic t({.experts = experts, .zipf = 0.0, .noise = noise});
    const auto [low, high] = std::minmax_element(t.popularity().begin(), t.popularity().end());
    CHECK(*high / *low <= (1.0 + noise) / (1.0 - noise) + 1e-9);
    CHECK(*high / *low >= 0.95 * (1.0 + noise) / (1.0 - noise));
  }
  // Changes of the logarithm, less those of the first expert: the same normal numbers, scaled.
  const auto changes = [](expert_traffic& t) {
    const std::vector<double> before(t.popularity().begin(), t.popularity().end());
    t.advance();
    std::vector<double> change;
    for (std::size_t e = 0; e < before.size(); ++e)
      change.push_back(std::log(t.popularity()[e] / before[e]));
    double mean = 0.0;
    for (const double c : change) mean += c / static_cast<double>(change.size());
    for (double& c : change) c -= mean;
    return change;
  };
  const auto product = [](const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum / static_cast<double>(a.size());
  };
  expert_traffic slow({.experts = experts, .drift = 0.1}), fast({.experts = experts, .drift = 0.3}),
      other({.experts = experts, .drift = 0.1, .seed = 2}),
      above({.experts = experts, .drift = 0.1}, 1);
  const auto a = changes(slow), b = changes(fast), c = changes(other), d = changes(above),
             next = changes(slow);
  for (std::size_t e = 0; e < a.size(); ++e) REQUIRE(std::abs(b[e] - 3.0 * a[e]) < 1e-9);
  CHECK(std::abs(std::sqrt(product(a, a)) - 0.1) < 0.015);
  // Another step, seed or layer has numbers of its own: a correlation of 5 / sqrt(512) at most.
  for (const auto& x : {c, d, next})
    CHECK(std::abs(product(a, x)) < 0.22 * std::sqrt(product(a, a) * product(x, x)));

  const expert_traffic four({.experts = 4, .noise = 0.0});
  constexpr double n = 1e4, batches = 400;
  double sum[4] = {}, squares[4] = {};
  std::vector<double> count;
  for (std::uint64_t batch = 0; batch < 400; ++batch) {
    four.sample(n, batch, count);
    for (std::size_t e = 0; e < 4; ++e) {
      const double gap = count[e] - n * four.popularity()[e];
      sum[e] += gap;
      squares[e] += gap * gap;
    }
  }
  for (std::size_t e = 0; e < 4; ++e) {
    const double variance = n * four.popularity()[e] * (1.0 - four.popularity()[e]);
    CHECK(std::abs(sum[e] / batches) < 5.0 * std::sqrt(variance / batches));
    CHECK(std::abs(squares[e] / batches / variance - 1.0) < 0.36);  // 5 standard deviations
  }
  std::vector<expert_id> first, second;
  four.draw(64, 2, 1, first);
  four.draw(64, 2, 2, second);
  CHECK(first != second);
}

TEST_CASE("the same options, layer, step and batch give the same traffic for good") {
  std::string all;
  for (const index_t layer : {0, 3})
    for (const std::uint64_t batch : {0u, 5u}) {
      expert_traffic t({.experts = 11, .zipf = 0.8, .drift = 0.5, .switch_at = 2, .seed = 9},
                       layer);
      std::vector<expert_id> ids;
      std::vector<double> count;
      for (int step = 0; step < 4; ++step, t.advance()) {
        t.draw(2, 3, batch, ids);
        for (const expert_id e : ids) all += std::to_string(e) + ".";
        t.sample(1000.0, batch, count);
        for (const double n : count) all += " " + std::to_string(static_cast<int>(n));
        all += '\n';
      }
    }
  CHECK("\n" + all == R"(
4.7.1.8.0.5. 282 46 46 24 43 149 120 108 69 63 58
4.2.7.8.0.5. 222 37 126 17 25 125 153 108 84 46 63
4.3.1.8.5.4. 58 50 40 60 97 272 48 63 41 116 156
4.3.10.8.5.4. 49 30 27 42 102 292 33 59 46 170 151
9.0.4.0.7.4. 290 39 46 34 48 151 102 84 91 49 63
9.0.1.2.0.7. 229 30 126 25 29 127 133 84 108 33 68
9.4.5.4.10.1. 63 42 40 74 105 275 37 45 59 96 164
9.4.5.4.10.7. 53 24 27 54 110 295 24 41 65 148 159
9.7.6.0.9.7. 164 104 53 54 50 40 81 265 46 96 23
9.7.6.0.9.7. 208 59 67 37 14 14 143 303 47 64 19
9.7.6.0.9.7. 119 276 43 44 43 47 97 146 65 75 32
9.7.6.9.0.7. 58 102 34 44 51 51 91 295 67 139 42
0.7.9.0.9.4. 150 88 59 58 51 39 97 304 49 90 28
0.7.9.0.9.7. 193 47 73 41 14 14 164 344 51 59 23
0.1.9.0.1.9. 107 252 48 47 44 45 115 179 69 70 36
9.7.0.9.0.4. 49 86 38 48 52 50 108 336 71 132 48
)");
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
  for (const planner_kind planner :
       {planner_kind::contiguous, planner_kind::eplb, planner_kind::search,
        planner_kind::incremental, planner_kind::batch_split, planner_kind::spill,
        planner_kind::exact_balance}) {
    const bool none = planner == planner_kind::contiguous || planner == planner_kind::spill ||
                      planner == planner_kind::exact_balance;
    simulation_options of = o;
    of.planner = planner;
    CHECK(said(of) == (none ? "accepted" : said(o)));
  }
  o.slots = 12;
  CHECK(said(o) == "accepted");
  o.machine.nodes = 3;
  CHECK(said(o) == "moeroute::simulate: 4 ranks on 3 nodes, expected a multiple of the nodes");
  o.machine.nodes = 1;
  o.machine.rows_per_second = 0.0;
  CHECK(said(o) == "moeroute::simulate: rows_per_second is 0.000000, expected > 0");
  o.machine.rows_per_second = 1.0;
  o.k = 9;
  CHECK(said(o) == "moeroute::simulate: k is 9, expected 1 to 8");
  o.k = 2;
  o.memory = 1.0;
  CHECK(said(o) == "moeroute::simulate: memory is 1.000000, expected 0 to below 1");
  o.memory = 0.0;
  layer_simulation layer(8, o);
  CHECK(test::refusal([&] { layer.next(std::vector<double>(7, 1.0)); }) ==
        "moeroute::simulate: count.size() is 7, expected 8");
  CHECK(test::refusal([&] { layer.next(std::vector<double>(8, -1.0)); }) ==
        "moeroute::simulate: the load of expert 0 is -1.000000, expected a finite number >= 0");
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
  CHECK(said([](auto&) {}, max_experts + 1) ==
        "moeroute::simulate: experts is 1048577, expected 1 to 1048576");
  CHECK(said([](auto& o) { o.replan_every = (1 << 30) + 1; }) ==
        "moeroute::simulate: replan_every is 1073741825, expected 1 to 1073741824");
  CHECK(said([](auto& o) { o.replan_every = 1 << 30; }) == "accepted");
  CHECK(said([](auto& o) { o.k = 0; }) == "moeroute::simulate: k is 0, expected 1 to 8");
  CHECK(said([](auto& o) { o.replan_every = 0; }) ==
        "moeroute::simulate: replan_every is 0, expected 1 to 1073741824");
  CHECK(said([](auto& o) { o.memory = -0.5; }) ==
        "moeroute::simulate: memory is -0.500000, expected 0 to below 1");
  CHECK(said([](auto& o) { o.machine.ranks = 0; }) ==
        "moeroute::simulate: ranks is 0, expected 1 to 1048576");
  CHECK(said([](auto& o) { o.machine.nodes = 0; }) ==
        "moeroute::simulate: nodes is 0, expected 1 to 4");
  CHECK(said([](auto& o) { o.machine.nodes = 5; }) ==
        "moeroute::simulate: nodes is 5, expected 1 to 4");
  CHECK(said([](auto& o) { o.machine.block = 0; }) ==
        "moeroute::simulate: block is 0, expected 1 to 2147483647");
  CHECK(said([](auto& o) { o.machine.block = index_t{1} << 31; }) ==
        "moeroute::simulate: block is 2147483648, expected 1 to 2147483647");
  CHECK(said([](auto& o) { o.machine.block = 0x7fffffff; }) == "accepted");
  CHECK(said([](auto& o) { o.machine.ranks = max_ranks + 1; }) ==
        "moeroute::simulate: ranks is 1048577, expected 1 to 1048576");
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

TEST_CASE("a cluster and a simulation are what they are without a word; nothing is negative") {
  const cluster c;
  CHECK((c.ranks == 1 && c.nodes == 1 && c.block == 1 && c.rows_per_second == 1e6));
  CHECK((c.inside.alpha == 2e-6 && c.inside.beta == 1.0 / 300e9));
  CHECK((c.outside.alpha == 8e-6 && c.outside.beta == 1.0 / 50e9));
  CHECK((c.call_seconds == 5e-6 && c.row_bytes == 4096.0 && c.expert_bytes == 50e6));
  const simulation_options o;
  CHECK((o.planner == planner_kind::eplb && o.slots == 0 && o.replan_every == 1));
  CHECK((o.memory == 0.0 && o.k == 8));
  CHECK(std::string(planner_names[static_cast<int>(planner_kind::search)]) == "search");
  CHECK(std::string(planner_names[static_cast<int>(planner_kind::spill)]) == "spill (LLEP)");
  // A line that falls, and one that would begin below 0.
  const std::vector<double> bytes{1, 2}, falling{2, 1}, late{0, 1};
  const link_cost flat = fit_link(bytes, falling), steep = fit_link(bytes, late);
  CHECK((flat.beta == 0.0 && flat.alpha == 1.5 && steep.beta == 1.0 && steep.alpha == 0.0));
  // Noise of 1 and more leaves everybody a part; few choices are no fewer than none.
  const expert_traffic loud({.experts = 64, .zipf = 0.0, .noise = 5.0});
  for (const double part : loud.popularity()) CHECK(part > 0.0);
  std::vector<double> count;
  loud.sample(8.0, 1, count);
  CHECK(*std::min_element(count.begin(), count.end()) == 0.0);
  // Parts of a choice are rounded: three choices, two of them on rank 0.
  layer_simulation exact(2,
                         {.planner = planner_kind::exact_balance, .k = 1, .machine = {.ranks = 2}});
  CHECK(exact.next(std::vector<double>{2.5, 0.4}).imbalance == 2 / 1.5);
}

TEST_CASE("a simulated step of any planner and cluster is what its formulas make of its plan") {
  test::random rng(61);
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  const auto same = [](double a, double b) {
    return std::abs(a - b) <= 1e-9 * std::max(std::abs(a), std::abs(b)) + 1e-12;
  };
  for (int draw = 0; draw < 84; ++draw) {
    const auto planner = static_cast<planner_kind>(draw % 7);
    const index_t nodes = 1 + rng.below(3), places = 1 + rng.below(3), ranks = nodes * places,
                  own = 1 + rng.below(3), experts = ranks * own;
    const auto price = [&](index_t most) { return 0.25 * static_cast<double>(rng.below(most)); };
    simulation_options o{.planner = planner, .search = {.most_steps = 2, .kicks = 0}};
    o.slots = experts + ranks * rng.below(3);
    if (o.slots > experts * ranks) o.slots = experts;  // no expert is on a rank twice
    o.replan_every = 1 + rng.below(2);
    o.memory = rng.below(2) == 0 ? 0.0 : 0.5;
    o.k = 1 + rng.below(std::min<index_t>(experts, 4));
    o.machine = {.ranks = ranks, .nodes = nodes};
    for (link_cost* link : {&o.machine.inside, &o.machine.outside}) {
      link->alpha = price(9);
      link->beta = price(9);
    }
    o.machine.rows_per_second = 0.5 + price(9);
    o.machine.call_seconds = price(5);
    o.machine.block = 1 + rng.below(4);
    o.machine.row_bytes = price(9);
    o.machine.expert_bytes = price(9);
    const cluster& c = o.machine;
    layer_simulation layer(experts, o);
    for (int step = 0; step < 4; ++step) {
      INFO(planner_names[at(draw % 7)] << ", draw " << draw << ", step " << step);
      std::vector<double> count;
      std::vector<std::int64_t> whole;
      for (index_t e = 0; e < experts; ++e) {
        whole.push_back(step == 3 && draw % 5 == 0 ? 0 : rng.below(4) * rng.below(50));
        count.push_back(static_cast<double>(whole.back()));
      }
      const placement before = layer.experts();
      const simulated_step s = layer.next(count);
      const placement& p = layer.experts();
      for (index_t r = 0; r < ranks; ++r) CHECK(p.node_of_rank()[at(r)] == r / places);
      CHECK((step > 0 && (step - 1) % o.replan_every == 0) >= (p != before));
      // Rows of each expert that a rank has.
      std::vector<std::vector<double>> rows(at(ranks));
      double moves = static_cast<double>(count_moves(before, p)), most_moved = 0.0;
      if (planner == planner_kind::spill || planner == planner_kind::exact_balance) {
        const batch_plan plan = planner == planner_kind::spill
                                    ? spill(whole, ranks)
                                    : balance_exactly(whole, ranks).batch;
        for (const auto& ranges : plan.range) {
          std::vector<double> of(at(ranks), 0.0);
          for (const rank_range& r : ranges) of[at(r.rank)] += double(r.end - r.begin);
          for (index_t r = 0; r < ranks; ++r) rows[at(r)].push_back(of[at(r)]);
        }
        moves += static_cast<double>(plan.moves.size());
        for (index_t r = 0; r < ranks; ++r) {
          double to = 0.0, from = 0.0;
          for (const expert_move& m : plan.moves) to += m.to == r, from += m.from == r;
          most_moved = std::max({most_moved, to, from});
        }
      } else {
        const slot_split split = split_optimal(p, whole);
        for (index_t i = 0; i < p.slots(); ++i) {
          const expert_id e = p.expert_of_slot()[at(i)];
          rows[at(p.rank_of_slot()[at(i)])].push_back(
              planner == planner_kind::batch_split
                  ? static_cast<double>(split.of_slot[at(i)])
                  : count[at(e)] / static_cast<double>(p.replicas(e)));
        }
      }
      CHECK(s.moves == moves);
      double all = 0.0;
      for (const double n : count) all += n;
      const double r = static_cast<double>(ranks), k = static_cast<double>(o.k), tokens = all / k,
                   inside = static_cast<double>(places - 1) / r,
                   outside = static_cast<double>(ranks - places) / r;
      const auto reached = [&](double n) {
        return all > 0.0 ? tokens * (1.0 - std::pow(1.0 - std::min(1.0, n / all), k)) : 0.0;
      };
      double most = 0.0, slowest = 0.0, seconds = 0.0, on_ranks = 0.0, on_nodes = 0.0;
      std::vector<double> load;
      for (const auto& list : rows) {
        double sum = 0.0, time = 0.0;
        for (const double n : list) {
          sum += n;
          if (n > 0.0)
            time += c.call_seconds +
                    std::ceil(n / double(c.block)) * double(c.block) / c.rows_per_second;
        }
        load.push_back(sum);
        on_ranks += reached(sum);
        most = std::max(most, sum);
        slowest = std::max(slowest, time);
        seconds += time;
      }
      for (index_t n = 0; n < nodes; ++n) {
        double sum = 0.0;
        for (index_t i = n * places; i < (n + 1) * places; ++i) sum += load[at(i)];
        on_nodes += reached(sum);
      }
      CHECK(same(s.imbalance, all > 0.0 ? most * r / all : 1.0));
      CHECK(same(s.time_imbalance, seconds > 0.0 ? slowest * r / seconds : 1.0));
      CHECK(same(s.seconds.compute, slowest));
      CHECK(same(s.seconds.header,
                 ranks == 1 ? 0.0 : 2.0 * (nodes > 1 ? c.outside.alpha : c.inside.alpha)));
      const link_cost& link = nodes > 1 ? c.outside : c.inside;
      CHECK(same(s.seconds.transfer, most_moved * (link.alpha + c.expert_bytes * link.beta)));
      CHECK(same(s.off_rank_rows, all > 0.0 ? on_ranks / tokens * (1.0 - 1.0 / r) : 0.0));
      CHECK(
          same(s.off_node_rows, all > 0.0 ? on_nodes / tokens * (1.0 - 1.0 / double(nodes)) : 0.0));
      // The slowest rank: its messages, and the busier direction of each kind of link.
      double out = 0.0, back = 0.0;
      for (const double n : load) {
        const double alphas = static_cast<double>(places - 1) * c.inside.alpha +
                              static_cast<double>(ranks - places) * c.outside.alpha;
        const double there = std::max(on_ranks / r, reached(n)), home = std::max(n, all / r),
                     per_row = c.row_bytes * (inside * c.inside.beta + outside * c.outside.beta);
        out = std::max(out, alphas + there * per_row);
        back = std::max(back, alphas + home * per_row);
      }
      CHECK(same(s.seconds.dispatch, all > 0.0 ? out : 0.0));
      CHECK(same(s.seconds.results, all > 0.0 ? back : 0.0));
    }
  }
}

}  // namespace simulate_test
