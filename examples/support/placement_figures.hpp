// Figures about placements that were published or measured elsewhere, and what comes out here.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "report.hpp"

#include <moeroute/placement/cost.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/spill.hpp>
#include <moeroute/placement/traffic.hpp>

namespace example {

/// One figure: what is known of it, what came out, and how far apart they may be.
struct placement_figure {
  std::string name;
  double known = 0.0;
  double here = 0.0;
  double tolerance = 0.0;  ///< absolute
  [[nodiscard]] bool holds() const { return std::abs(known - here) <= tolerance; }
};

namespace detail {

using moeroute::index_t;

// Loads of `layers` layers: Zipf, shuffled, with noise.
[[nodiscard]] inline std::vector<std::vector<double>> zipf_layers(index_t experts, double zipf,
                                                                  index_t layers) {
  std::vector<std::vector<double>> list;
  for (index_t l = 0; l < layers; ++l) {
    const moeroute::expert_traffic traffic({.experts = experts, .zipf = zipf, .seed = 5}, l);
    list.emplace_back(traffic.popularity().begin(), traffic.popularity().end());
  }
  return list;
}

// Speed of spilling against every rank its own experts, in the cost model: 8 ranks, 128 experts of
// 2880 x 2880, 4 choices of 32768 tokens on each rank, 400 Tflop/s and 300 GB/s, `part` of all
// choices on one expert.
struct spilling {
  double before, after, speed_up;
};
[[nodiscard]] inline spilling spill_one_expert(double part) {
  using namespace moeroute;
  constexpr double d = 2880.0, all = 8.0 * 32768.0 * 4.0;
  cluster c;
  c.ranks = 8;
  c.inside = {0.0, 1.0 / 300e9};
  c.rows_per_second = 400e12 / (6.0 * d * d);
  c.call_seconds = 0.0;
  c.row_bytes = 2.0 * d;
  c.expert_bytes = 2.0 * 3.0 * d * d;
  std::vector<std::int64_t> count(128, static_cast<std::int64_t>(all * (1.0 - part) / 127.0));
  count[0] = static_cast<std::int64_t>(all * part);
  const auto seconds = [&](const batch_plan& plan) {
    double compute = 0.0, link = 0.0;
    for (const std::int64_t n : plan.load) {
      const auto rows = static_cast<double>(n);
      compute = std::max(compute, rows / c.rows_per_second);
      rank_traffic t;
      t.received_inside = rows * 7.0 / 8.0;
      t.sent_inside = all / 8.0 * 7.0 / 8.0;
      link = std::max(link, exchange_seconds(c, t));
    }
    std::vector<double> in(8, 0.0), out(8, 0.0);
    for (const expert_move& m : plan.moves) {
      ++in[static_cast<std::size_t>(m.to)];
      ++out[static_cast<std::size_t>(m.from)];
    }
    const double moved = std::max(*std::max_element(in.begin(), in.end()),
                                  *std::max_element(out.begin(), out.end()));
    return compute + 2.0 * link + transfer_seconds(c, moved);
  };
  const auto imbalance = [](const batch_plan& plan) {
    const std::vector<double> load(plan.load.begin(), plan.load.end());
    return balance_of(load).imbalance;
  };
  const batch_plan own = spill(count, 8, {.lambda = 1e9}), spilled = spill(count, 8);
  return {imbalance(own), imbalance(spilled), seconds(own) / seconds(spilled)};
}

}  // namespace detail

/// All of them; a second or two.
[[nodiscard]] inline std::vector<placement_figure> placement_figures() {
  using namespace moeroute;
  using detail::fixed;
  using detail::zipf_layers;
  std::vector<placement_figure> list;
  const auto add = [&](std::string name, double known, double here, double tolerance) {
    list.push_back({std::move(name), known, here, tolerance});
  };

  // Plain Zipf(1), in order of popularity.
  std::vector<double> plain;
  for (int e = 0; e < 256; ++e) plain.push_back(1.0 / (e + 1));
  add("Zipf 1, 256 experts on 32 ranks, contiguous", 14.201,
      balance_of(rank_loads(placement::contiguous(256, 32), plain)).imbalance, 1e-3);
  add("the same, EPLB without replicas", 5.3696, eplb_plan(plain, 256, 32).balance.imbalance, 1e-4);
  add("the same, EPLB with 32 more slots", 1.0077, eplb_plan(plain, 288, 32).balance.imbalance,
      1e-4);
  add("the same, EPLB with 64 more slots", 1.0009, eplb_plan(plain, 320, 32).balance.imbalance,
      1e-4);

  // Shuffled and with noise, means over layers.
  struct row {
    double zipf, known;
    index_t experts, ranks, more;
  };
  for (const row& r : {row{1.0, 1.0074, 256, 32, 32},
                       {1.0, 1.024, 256, 64, 64},
                       {1.1, 1.048, 256, 64, 64},
                       {1.2, 1.025, 256, 32, 32},
                       {1.2, 1.104, 256, 64, 64},
                       {1.2, 1.014, 256, 64, 128},
                       {1.3, 1.178, 256, 64, 64}}) {
    constexpr index_t layers = 80;
    double sum = 0.0;
    for (const std::vector<double>& w : zipf_layers(r.experts, r.zipf, layers))
      sum += eplb_plan(w, r.experts + r.more, r.ranks).balance.imbalance / layers;
    add("Zipf " + fixed(r.zipf, 1) + ", noise, " + std::to_string(r.experts) + " experts on " +
            std::to_string(r.ranks) + " ranks, EPLB with " + std::to_string(r.more) + " more",
        r.known, sum, 0.1 * (r.known - 1.0));
  }

  // A batch of 4096 x 8 choices differs from what it was planned for.
  double next = 0.0;
  for (index_t l = 0; l < 20; ++l) {
    const expert_traffic traffic({.experts = 256, .zipf = 1.0, .seed = 5}, l);
    std::vector<double> count;
    traffic.sample(32768.0, 1, count);
    next +=
        balance_of(rank_loads(eplb_plan(traffic.popularity(), 288, 32).experts, count)).imbalance /
        20.0;
  }
  add("EPLB, the next batch of 4096 x 8 choices on 32 ranks", 1.055, next, 0.3 * 0.055);

  for (const auto& [part, before, speed_up] :
       {std::array{0.95, 7.648, 7.2}, {0.80, 6.589, 6.2}, {0.50, 4.473, 4.2}, {0.30, 3.062, 2.9}}) {
    const detail::spilling s = detail::spill_one_expert(part);
    const std::string name =
        std::to_string(static_cast<int>(part * 100 + 0.5)) + " % on one expert of 128, 8 ranks";
    add(name + ": imbalance", before, s.before, 2e-3);
    add(name + ": spilled", 1.0, s.after, 8.0 / 131072.0);
    add(name + ": faster by", speed_up, s.speed_up, 0.25 * speed_up);
  }

  // Heavy-tailed batches, 64 experts on 8 ranks.
  double moved_exactly = 0.0, moved_spilling = 0.0, foreign_exactly = 0.0, foreign_spilling = 0.0;
  constexpr int batches = 300;
  for (std::uint64_t b = 0; b < batches; ++b) {
    std::vector<std::int64_t> count;
    for (std::uint64_t e = 0; e < 64; ++e)
      count.push_back(static_cast<std::int64_t>(
          100.0 *
          std::pow(static_cast<double>(open_u01_of(random_block(3, b, e).word[0])), -1.0 / 0.8)));
    const exact_balance_plan exact = balance_exactly(count, 8);
    const batch_plan spilled = spill(count, 8);
    foreign_exactly +=
        static_cast<double>(*std::max_element(exact.foreign.begin(), exact.foreign.end())) /
        batches;
    std::vector<double> foreign(8, 0.0);
    for (const expert_move& m : spilled.moves) ++foreign[static_cast<std::size_t>(m.to)];
    foreign_spilling += *std::max_element(foreign.begin(), foreign.end()) / batches;
    double all = 0.0, exact_rows = 0.0, spilled_rows = 0.0;
    for (std::size_t e = 0; e < 64; ++e) {
      all += static_cast<double>(count[e]);
      for (const rank_range& r : exact.batch.range[e])
        exact_rows +=
            r.rank == static_cast<int>(e / 8) ? 0.0 : static_cast<double>(r.end - r.begin);
      for (const rank_range& r : spilled.range[e])
        spilled_rows +=
            r.rank == static_cast<int>(e / 8) ? 0.0 : static_cast<double>(r.end - r.begin);
    }
    moved_exactly += exact_rows / all;
    moved_spilling += spilled_rows / all;
  }
  add("heavy tails, exact balance: most foreign experts on a rank", 1.06, foreign_exactly, 0.106);
  add("heavy tails, spilling: most foreign experts on a rank", 5.00, foreign_spilling, 0.5);
  add("heavy tails, exact balance: tokens moved over spilling's", 1.02,
      moved_exactly / moved_spilling, 0.02);

  // Experts moved per re-plan while loads drift.
  double fresh = 0.0, renamed = 0.0, incremental = 0.0, excess = 0.0, excess_fresh = 0.0;
  constexpr int steps = 20;
  expert_traffic drifting({.experts = 256, .zipf = 1.0, .drift = 0.1, .seed = 5});
  placement last = eplb_plan(drifting.popularity(), 288, 32).experts, last_named = last,
            kept = last;
  for (int s = 0; s < steps; ++s) {
    drifting.advance();
    const placement_plan made = eplb_plan(drifting.popularity(), 288, 32);
    fresh += static_cast<double>(count_moves(last, made.experts)) / steps;
    last = made.experts;
    const placement named = relabel(last_named, made.experts);
    renamed += static_cast<double>(count_moves(last_named, named)) / steps;
    last_named = named;
    const replan_result changed = replan(kept, drifting.popularity(),
                                         {.target = made.balance.imbalance + 0.02, .budget = 32});
    incremental += static_cast<double>(count_moves(kept, changed.experts)) / steps;
    kept = changed.experts;
    excess += changed.imbalance_after / steps;
    excess_fresh += made.balance.imbalance / steps;
  }
  add("experts moved per re-plan of 288 slots, EPLB", 257.0, fresh, 0.15 * 257.0);
  add("the same, ranks renamed", 215.0, renamed, 0.15 * 215.0);
  add("the same, incremental", 17.0, incremental, 0.15 * 17.0);
  add("its imbalance over EPLB's", 0.016, excess - excess_fresh, 0.15 * 0.016);

  const expected_rows four = expect_rows(256, 8, 32, 4), eight = expect_rows(256, 8, 64, 8);
  add("rows off the node per token, 256 experts, k 8, 4 nodes, by choice", 6.0,
      four.off_node_choices, 5e-3);
  add("the same, once per rank of 32", 5.45, four.off_node_rows_by_rank, 5e-3);
  add("the same, once per node", 2.71, four.off_node_rows_by_node, 5e-3);
  add("rows off the node, 8 nodes of 64 ranks, once per rank", 6.72, eight.off_node_rows_by_rank,
      5e-3);
  add("the same, once per node", 4.63, eight.off_node_rows_by_node, 5e-3);
  add("messages of a rank on two levels, 4 nodes of 8", 10.0, (4.0 - 1.0) + (8.0 - 1.0), 0.0);
  return list;
}

}  // namespace example
