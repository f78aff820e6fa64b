// Simulation: a layer's batches over many ranks, planned by what was seen before, paid by the cost
// model. What one machine cannot show: nodes, links, stragglers, the use of re-planning.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include <moeroute/placement/cost.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/split.hpp>

namespace moeroute {

/// Who plans. The first four place experts by past loads and split tokens evenly over replicas;
/// the others see the batch itself.
enum class planner_kind {
  contiguous,     ///< experts as they are numbered, no replica
  eplb,           ///< EPLB anew at every re-plan
  search,         ///< search_placement anew, ranks renamed to move little
  incremental,    ///< search_placement once, then replan
  batch_split,    ///< EPLB, and each batch split by flow
  spill,          ///< LLEP on contiguous experts
  exact_balance,  ///< exact balance on contiguous experts
};

inline constexpr const char* planner_names[] = {
    "contiguous",         "eplb",         "search",       "incremental",
    "eplb + batch split", "spill (LLEP)", "exact balance"};

struct simulation_options {
  planner_kind planner = planner_kind::eplb;
  index_t slots = 0;         ///< of those with replicas
  index_t replan_every = 1;  ///< steps
  double memory = 0.0;       ///< of past loads: sum = memory * sum + batch; 0: the last batch only
  replan_options incremental{};
  search_options search{};
  index_t k = 8;  ///< choices per token
  cluster machine{};
};

/// What a step came to.
struct simulated_step {
  double imbalance = 1.0;       ///< of rows, max over mean of ranks
  double time_imbalance = 1.0;  ///< of computing time
  double moves = 0.0;           ///< experts newly on a rank, before the batch or for it
  double off_rank_rows = 0.0;   ///< per token, each rank once
  double off_node_rows = 0.0;   ///< per token, each node once
  layer_seconds seconds{};
};

/// One layer over steps: next(counts) plans by what it has seen, then serves the batch.
class layer_simulation {
 public:
  /// Throws: error where an option is out of range.
  layer_simulation(index_t experts, const simulation_options& o) : options_(o), experts_(experts) {
    constexpr const char* where = "simulate";
    check_cluster(where, o.machine);
    check_range(where, "experts", experts, 1, max_experts);
    check_range(where, "replan_every", o.replan_every, 1, 1 << 30);
    check_range(where, "k", o.k, 1, experts);
    if (!(o.memory >= 0.0 && o.memory < 1.0)) fail_value(where, "memory", o.memory, "0 to below 1");
    const index_t ranks = o.machine.ranks;
    for (index_t r = 0; r < ranks; ++r)
      node_.push_back(static_cast<std::int32_t>(o.machine.node(r)));
    const bool replicas = o.planner == planner_kind::eplb || o.planner == planner_kind::search ||
                          o.planner == planner_kind::incremental ||
                          o.planner == planner_kind::batch_split;
    if (replicas) detail::check_slots(where, experts, o.slots, ranks);
    const placement flat = placement::contiguous(experts, ranks);
    placement_ = placement({.experts = experts,
                            .slot_offset = flat.slot_offset(),
                            .expert_of_slot = flat.expert_of_slot(),
                            .node_of_rank = node_});
  }

  const placement& experts() const { return placement_; }
  index_t steps() const { return step_; }

  /// Serves a batch with so many choices of each expert, from ranks with equally many tokens.
  simulated_step next(std::span<const double> count) {
    using detail::at;
    check_size("simulate", "count.size()", static_cast<index_t>(count.size()), experts_);
    check_loads("simulate", count);
    simulated_step s;
    if (step_ > 0 && (step_ - 1) % options_.replan_every == 0)
      s.moves = static_cast<double>(plan());
    s.seconds.transfer = 0.0;
    rows_.assign(at(placement_.slots()), 0.0);
    double moved_to_most = 0.0;
    switch (options_.planner) {
      case planner_kind::batch_split: {
        whole(count);
        const slot_split split = split_optimal(placement_, whole_);
        for (std::size_t i = 0; i < rows_.size(); ++i)
          rows_[i] = static_cast<double>(split.of_slot[i]);
        account(placement_, count, s);
        break;
      }
      case planner_kind::spill:
      case planner_kind::exact_balance: {
        whole(count);
        const index_t ranks = options_.machine.ranks;
        const batch_plan batch = options_.planner == planner_kind::spill
                                     ? moeroute::spill(whole_, ranks)
                                     : balance_exactly(whole_, ranks).batch;
        const batch_placement placed = place_batch(batch, node_);
        rows_.assign(at(placed.experts.slots()), 0.0);
        for (const slot_range& r : placed.ranges.range)
          rows_[at(r.slot)] += static_cast<double>(r.end - r.begin);
        std::vector<double> received(at(ranks), 0.0), sent(at(ranks), 0.0);
        for (const expert_move& m : batch.moves) {
          ++received[at(m.to)];
          ++sent[at(m.from)];
        }
        for (index_t r = 0; r < ranks; ++r)
          moved_to_most = std::max({moved_to_most, received[at(r)], sent[at(r)]});
        s.moves += static_cast<double>(batch.moves.size());
        account(placed.experts, count, s);
        break;
      }
      default:
        for (std::size_t i = 0; i < rows_.size(); ++i)
          if (const expert_id e = placement_.expert_of_slot()[i]; e >= 0)
            rows_[i] = count[at(e)] * placement_.share()[i];
        account(placement_, count, s);
    }
    s.seconds.transfer = transfer_seconds(options_.machine, moved_to_most);
    if (past_.empty()) past_.assign(at(experts_), 0.0);
    for (index_t e = 0; e < experts_; ++e)
      past_[at(e)] = options_.memory * past_[at(e)] + count[at(e)];
    ++step_;
    return s;
  }

 private:
  // A new placement from past loads; returns experts moved.
  index_t plan() {
    const index_t ranks = options_.machine.ranks;
    placement made;
    switch (options_.planner) {
      case planner_kind::eplb:
      case planner_kind::batch_split:
        made = with_nodes(eplb_plan(past_, options_.slots, ranks).experts);
        break;
      case planner_kind::search:
        made = search_placement(past_, options_.slots, ranks, options_.search, node_).experts;
        if (planned_) made = relabel(placement_, made);
        break;
      case planner_kind::incremental:
        if (!planned_)
          made = search_placement(past_, options_.slots, ranks, options_.search, node_).experts;
        else
          made = replan(placement_, past_, options_.incremental).experts;
        break;
      default: return 0;
    }
    const index_t moves = count_moves(placement_, made);
    placement_ = std::move(made);
    planned_ = true;
    return moves;
  }
  placement with_nodes(const placement& p) const {
    return placement({.experts = p.experts(),
                      .slot_offset = p.slot_offset(),
                      .expert_of_slot = p.expert_of_slot(),
                      .node_of_rank = node_});
  }
  void whole(std::span<const double> count) {
    whole_.clear();
    for (const double c : count) {
      if (!(c >= 0.0 && c <= 0x1p40)) fail_value("simulate", "count", c, "0 to 2^40");
      whole_.push_back(static_cast<std::int64_t>(c + 0.5));
    }
  }

  // Times and rows from what each slot computes; tokens come from all ranks alike.
  void account(const placement& p, std::span<const double> count, simulated_step& s) {
    using detail::at;
    const cluster& c = options_.machine;
    const index_t ranks = c.ranks;
    double all = 0.0;
    for (const double n : count) all += n;
    const double k = static_cast<double>(options_.k), tokens = all / k,
                 own = tokens / static_cast<double>(ranks);
    load_.assign(at(ranks), 0.0);
    std::vector<double>& seconds = seconds_;
    seconds.assign(at(ranks), 0.0);
    std::vector<double> of_node(at(c.nodes), 0.0);
    for (index_t r = 0; r < ranks; ++r) {
      const auto slots =
          std::span<const double>(rows_).subspan(at(p.first_slot(r)), at(p.slots(r)));
      for (const double n : slots) load_[at(r)] += n;
      seconds[at(r)] = compute_seconds(c, slots);
      of_node[at(c.node(r))] += load_[at(r)];
    }
    s.imbalance = balance_of(load_).imbalance;
    s.time_imbalance = balance_of(seconds).imbalance;
    s.seconds.compute = balance_of(seconds).max_load;
    s.seconds.header = ranks > 1 ? 2.0 * (c.nodes > 1 ? c.outside.alpha : c.inside.alpha) : 0.0;
    if (!(all > 0.0)) return;
    // A token reaches a rank with a part q of the choices with probability 1 - (1 - q)^k, near
    // enough for k distinct experts out of many.
    const auto reached = [&](double rows) {
      return tokens * (1.0 - std::pow(1.0 - std::min(1.0, rows / all), k));
    };
    const double places = static_cast<double>(c.places());
    double rank_rows = 0.0, node_rows = 0.0;
    for (const double n : load_) rank_rows += reached(n);
    for (const double n : of_node) node_rows += reached(n);
    const double away = 1.0 - 1.0 / static_cast<double>(ranks),
                 across = 1.0 - 1.0 / static_cast<double>(c.nodes);
    s.off_rank_rows = rank_rows / tokens * away;
    s.off_node_rows = node_rows / tokens * across;
    const double inside_part = (places - 1.0) / static_cast<double>(ranks),
                 outside_part = (static_cast<double>(ranks) - places) / static_cast<double>(ranks);
    double out = 0.0, back = 0.0;
    for (index_t r = 0; r < ranks; ++r) {
      const double rows = reached(load_[at(r)]), sent = rank_rows / tokens * own;
      rank_traffic t{sent * inside_part,  rows * inside_part, sent * outside_part,
                     rows * outside_part, places - 1.0,       static_cast<double>(ranks) - places};
      out = std::max(out, exchange_seconds(c, t));
      // What comes back is a row for each choice.
      t = {load_[at(r)] * inside_part, k * own * inside_part, load_[at(r)] * outside_part,
           k * own * outside_part,     t.peers_inside,        t.peers_outside};
      back = std::max(back, exchange_seconds(c, t));
    }
    s.seconds.dispatch = out;
    s.seconds.results = back;
  }

  simulation_options options_;
  index_t experts_;
  std::vector<std::int32_t> node_;
  placement placement_;
  bool planned_ = false;
  index_t step_ = 0;
  std::vector<double> past_, rows_, load_, seconds_;
  std::vector<std::int64_t> whole_;
};

}  // namespace moeroute
