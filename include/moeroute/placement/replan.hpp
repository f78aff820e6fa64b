// Re-planning: a placement that follows the load with few experts moved, and a new plan's ranks
// renamed so that as little as can be moves.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/placement/loads.hpp>

namespace moeroute {

struct replan_options {
  double target = 1.02;  ///< imbalance at which nothing more is moved
  index_t budget = 16;   ///< most experts moved
};

/// One step of a re-plan: a swap of two slots (2 moves), or an expert copied over a redundant slot
/// (1 move).
struct replan_step {
  enum class kind { copy, swap } what;
  slot_id slot;        ///< the slot written, or the one of the hottest rank
  std::int32_t other;  ///< the expert copied there, or the other slot
  bool operator==(const replan_step&) const = default;
};

struct replan_result {
  placement experts;
  std::vector<replan_step> steps;
  index_t moves = 0;
  double imbalance_before = 1.0;
  double imbalance_after = 1.0;
};

/// Steps on the placement itself, for the hottest rank, each the one that lowers the sum of squares
/// of rank loads most per move: slots that no step touches stay.
///
/// Shares are even. Ensures: at most `budget` moves; no rank comes to hold an expert twice; (max,
/// sum of squares) falls with every step; nothing moves within the target. Throws: error where
/// loads or options are out of range or the placement has lost experts. Cost: O((P S + copies) R)
/// a step. Determinism: exact; of equals fewer moves, a copy before a swap, the lowest slots.
inline replan_result replan(const placement& old, std::span<const double> load,
                            const replan_options& options = {}) {
  using detail::at;
  constexpr const char* where = "replan";
  check_size(where, "load.size()", static_cast<index_t>(load.size()), old.experts());
  check_loads(where, load);
  check_range(where, "budget", options.budget, 0, std::int32_t{0x7fffffff});
  if (!(options.target >= 1.0)) fail_value(where, "target", options.target, ">= 1");
  old.check_hosted(where);
  const index_t slots = old.slots(), ranks = old.ranks();
  std::vector<expert_id> of(old.expert_of_slot().begin(), old.expert_of_slot().end());
  const std::span<const std::int32_t> rank_of = old.rank_of_slot();
  const auto live = [&](index_t s) { return old.alive()[at(rank_of[at(s)])] != 0; };
  std::vector<index_t> count(at(old.experts()), 0);
  std::vector<std::vector<slot_id>> held(at(old.experts()));
  for (index_t s = 0; s < slots; ++s)
    if (of[at(s)] >= 0 && live(s)) {
      ++count[at(of[at(s)])];
      held[at(of[at(s)])].push_back(static_cast<slot_id>(s));
    }
  const auto w = [&](expert_id e) { return load[at(e)] / static_cast<double>(count[at(e)]); };
  std::vector<double> sum(at(ranks));
  const auto measure = [&] {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (index_t s = 0; s < slots; ++s)
      if (of[at(s)] >= 0 && live(s)) sum[at(rank_of[at(s)])] += w(of[at(s)]);
  };
  const auto imbalance = [&] { return balance_of(sum, old.alive()).imbalance; };
  const auto holds = [&](index_t r, expert_id e) {
    for (const slot_id s : held[at(e)])
      if (rank_of[at(s)] == r) return true;
    return false;
  };
  measure();
  replan_result out;
  out.imbalance_before = out.imbalance_after = imbalance();
  std::vector<std::pair<index_t, double>> change;  // rank, new load
  while (out.imbalance_after > options.target && out.moves < options.budget) {
    const index_t hot = std::max_element(sum.begin(), sum.end()) - sum.begin();
    const double max_now = sum[at(hot)];
    double best = 1e-9 * max_now * max_now;
    replan_step step{};
    index_t step_moves = 0;
    const auto judge = [&](const replan_step& candidate, index_t moves) {
      double drop = 0.0, made = 0.0;
      for (const auto& [r, v] : change) {
        drop += sum[at(r)] * sum[at(r)] - v * v;
        made = std::max(made, v);
      }
      // Lower (max, sum of squares): a step off one of several hottest ranks leaves the max. Ranks
      // that the step leaves alone are not above it.
      if (made > max_now * (1.0 + 1e-12)) return;
      const double score = drop / static_cast<double>(moves);
      if (score <= best * (1.0 + 1e-12)) return;  // of equals the first: copies come before swaps
      best = score;
      step = candidate;
      step_moves = moves;
    };
    const auto touch = [&](index_t r, double by) {
      for (auto& c : change)
        if (c.first == r) {
          c.second += by;
          return;
        }
      change.push_back({r, sum[at(r)] + by});
    };
    // Copies: any redundant slot, any expert of the hottest rank that its rank lacks.
    for (index_t s = 0; s < slots; ++s) {
      const expert_id f = of[at(s)];
      if (!live(s) || (f >= 0 && count[at(f)] < 2)) continue;
      const index_t r = rank_of[at(s)];
      for (index_t i = old.first_slot(hot); i < old.first_slot(hot) + old.slots(hot); ++i) {
        const expert_id e = of[at(i)];
        if (e < 0 || holds(r, e)) continue;
        change.clear();
        if (f >= 0) {
          const double before = w(f), after = load[at(f)] / static_cast<double>(count[at(f)] - 1);
          for (const slot_id j : held[at(f)])
            touch(rank_of[at(j)], j == s ? -before : after - before);
        }
        const double before = w(e), after = load[at(e)] / static_cast<double>(count[at(e)] + 1);
        for (const slot_id j : held[at(e)]) touch(rank_of[at(j)], after - before);
        touch(r, after);
        judge({replan_step::kind::copy, static_cast<slot_id>(s), e}, 1);
      }
    }
    if (out.moves + 2 <= options.budget)
      for (index_t i = old.first_slot(hot); i < old.first_slot(hot) + old.slots(hot); ++i)
        for (index_t j = 0; j < slots; ++j) {
          const index_t k = rank_of[at(j)];
          const expert_id e = of[at(i)], f = of[at(j)];
          if (k == hot || !live(j) || e < 0 || f < 0) continue;
          const double d = w(e) - w(f);
          // What cannot help is left out before it costs a search of two ranks.
          if (d <= 0.0 || d >= max_now - sum[at(k)] || holds(k, e) || holds(hot, f)) continue;
          change.clear();
          touch(hot, -d);
          touch(k, d);
          judge({replan_step::kind::swap, static_cast<slot_id>(i), static_cast<std::int32_t>(j)},
                2);
        }
    if (step_moves == 0) break;
    const auto forget = [&](expert_id e, slot_id s) { std::erase(held[at(e)], s); };
    if (step.what == replan_step::kind::copy) {
      if (const expert_id f = of[at(step.slot)]; f >= 0) {
        forget(f, step.slot);
        --count[at(f)];
      }
      of[at(step.slot)] = step.other;
      held[at(step.other)].push_back(step.slot);
      ++count[at(step.other)];
    } else {
      const expert_id e = of[at(step.slot)], f = of[at(step.other)];
      forget(e, step.slot);
      forget(f, step.other);
      held[at(e)].push_back(step.other);
      held[at(f)].push_back(step.slot);
      std::swap(of[at(step.slot)], of[at(step.other)]);
    }
    out.steps.push_back(step);
    out.moves += step_moves;
    measure();
    out.imbalance_after = imbalance();
  }
  out.experts = placement({.experts = old.experts(),
                           .slot_offset = old.slot_offset(),
                           .expert_of_slot = of,
                           .node_of_rank = old.node_of_rank(),
                           .alive = old.alive()});
  return out;
}

namespace detail {

// The assignment of rows to columns with the greatest total gain [n, n]: Hungarian, O(n^3).
inline std::vector<index_t> assign_best(const std::vector<double>& gain, index_t n) {
  const double infinity = std::numeric_limits<double>::infinity();
  std::vector<double> u(at(n) + 1, 0.0), v(at(n) + 1, 0.0), least;
  std::vector<index_t> row_of(at(n) + 1, 0), way(at(n) + 1, 0);
  std::vector<std::uint8_t> used;
  for (index_t i = 1; i <= n; ++i) {
    row_of[0] = i;
    index_t j = 0;
    least.assign(at(n) + 1, infinity);
    used.assign(at(n) + 1, 0);
    do {
      used[at(j)] = 1;
      double delta = infinity;
      index_t next = 0;
      for (index_t k = 1; k <= n; ++k) {
        if (used[at(k)] != 0) continue;
        const double cost =
            -gain[at((row_of[at(j)] - 1) * n + k - 1)] - u[at(row_of[at(j)])] - v[at(k)];
        if (cost < least[at(k)]) {
          least[at(k)] = cost;
          way[at(k)] = j;
        }
        if (least[at(k)] < delta) {
          delta = least[at(k)];
          next = k;
        }
      }
      for (index_t k = 0; k <= n; ++k) {
        if (used[at(k)] != 0) {
          u[at(row_of[at(k)])] += delta;
          v[at(k)] -= delta;
        } else {
          least[at(k)] -= delta;
        }
      }
      j = next;
    } while (row_of[at(j)] != 0);
    for (; j != 0; j = way[at(j)]) row_of[at(j)] = row_of[at(way[at(j)])];
  }
  std::vector<index_t> column(at(n));
  for (index_t k = 1; k <= n; ++k) column[at(row_of[at(k)] - 1)] = k - 1;
  return column;
}

// The same, the greatest gains first: for many ranks.
inline std::vector<index_t> assign_greedy(const std::vector<double>& gain, index_t n) {
  std::vector<std::pair<index_t, index_t>> list;
  for (index_t i = 0; i < n; ++i)
    for (index_t j = 0; j < n; ++j)
      if (gain[at(i * n + j)] > 0.0) list.push_back({i, j});
  std::sort(list.begin(), list.end(),
            greatest_first([&](const auto& i) { return gain[at(i.first * n + i.second)]; }));
  std::vector<index_t> column(at(n), -1), row(at(n), -1);
  for (const auto& [i, j] : list)
    if (column[at(i)] < 0 && row[at(j)] < 0) {
      column[at(i)] = j;
      row[at(j)] = i;
    }
  // The rest in order, no pair that may not be: those that may come in blocks, where any will do.
  for (index_t i = 0; i < n; ++i) {
    if (column[at(i)] >= 0) continue;
    index_t j = 0;
    while (row[at(j)] >= 0 || gain[at(i * n + j)] <= -1e18) ++j;
    column[at(i)] = j;
    row[at(j)] = i;
  }
  return column;
}

inline std::vector<index_t> assign(const std::vector<double>& gain, index_t n) {
  if (n <= 256) return assign_best(gain, n);
  std::vector<index_t> column = assign_greedy(gain, n);
  // The greedy way may be worse than names left as they are.
  double renamed = 0.0, kept = 0.0;
  for (index_t i = 0; i < n; ++i) {
    renamed += gain[at(i * n + column[at(i)])];
    kept += gain[at(i * n + i)];
  }
  if (kept > renamed) std::iota(column.begin(), column.end(), index_t{0});
  return column;
}

}  // namespace detail

/// The plan `made` with its ranks renamed within nodes, and nodes renamed, so that most experts are
/// where `old` has them, in their slots where they can be.
///
/// Who is alive is as in made: it is a rank, not its name, that died, so a plan for live ranks
/// stays on live ranks; what a rank that is dead in old once held counts for nothing. Requires: as
/// many slots on every rank in both. Ensures: the loads of ranks are those of made, permuted; no
/// more moves than without. Throws: error where sizes differ. Cost: O(R^3) to 256 ranks, beyond by
/// the greatest overlaps.
inline placement relabel(const placement& old, const placement& made) {
  using detail::at;
  constexpr const char* where = "relabel";
  check_size(where, "made.experts()", made.experts(), old.experts());
  check_size(where, "made.ranks()", made.ranks(), old.ranks());
  check_size(where, "made.nodes()", made.nodes(), old.nodes());
  const index_t ranks = old.ranks(), nodes = old.nodes();
  for (index_t r = 0; r < ranks; ++r) {
    check_size(where, "made.slots(rank)", made.slots(r), old.slots(0));
    check_size(where, "old.slots(rank)", old.slots(r), old.slots(0));
    check_size(where, "made.node_of_rank", made.node_of_rank()[at(r)], old.node_of_rank()[at(r)]);
  }
  std::vector<std::vector<index_t>> of_node(at(nodes));
  for (index_t r = 0; r < ranks; ++r) of_node[at(old.node_of_rank()[at(r)])].push_back(r);
  const auto shared = [&](index_t a, index_t b) {  // experts of made's rank a on old's rank b
    if (made.alive()[at(a)] != made.alive()[at(b)]) return -1e18;
    double n = 0.0;
    if (old.alive()[at(b)] == 0 || made.alive()[at(a)] == 0) return n;
    const std::span<const expert_id> here = old.experts_of_rank(b);
    for (const expert_id e : made.experts_of_rank(a))
      n += e >= 0 && std::find(here.begin(), here.end(), e) != here.end() ? 1.0 : 0.0;
    return n;
  };
  // For every pair of nodes of one kind the best names of ranks, then the best names of nodes.
  std::vector<std::vector<index_t>> names(at(nodes * nodes));
  std::vector<double> gain(at(nodes * nodes), 0.0);
  for (index_t a = 0; a < nodes; ++a)
    for (index_t b = 0; b < nodes; ++b) {
      const auto n = static_cast<index_t>(of_node[at(a)].size());
      const auto live = [&](index_t node) {
        return std::count_if(of_node[at(node)].begin(), of_node[at(node)].end(),
                             [&](index_t r) { return made.alive()[at(r)] != 0; });
      };
      if (n != static_cast<index_t>(of_node[at(b)].size()) || live(a) != live(b)) {
        gain[at(a * nodes + b)] = -1e18;
        continue;
      }
      std::vector<double> pair(at(n * n));
      for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < n; ++j)
          pair[at(i * n + j)] = shared(of_node[at(a)][at(i)], of_node[at(b)][at(j)]);
      names[at(a * nodes + b)] = detail::assign(pair, n);
      for (index_t i = 0; i < n; ++i)
        gain[at(a * nodes + b)] += pair[at(i * n + names[at(a * nodes + b)][at(i)])];
    }
  std::vector<index_t> node_name = detail::assign(gain, nodes);
  std::vector<expert_id> slots(at(old.slots()), no_expert);
  std::vector<double> share(slots.size(), 0.0);
  for (index_t a = 0; a < nodes; ++a) {
    const index_t b = node_name[at(a)];
    for (std::size_t i = 0; i < of_node[at(a)].size(); ++i) {
      const index_t from = of_node[at(a)][i], to = of_node[at(b)][at(names[at(a * nodes + b)][i])];
      std::vector<index_t> rest;  // slots of made
      const index_t first = old.first_slot(to);
      const auto here = old.experts_of_rank(to);
      const auto put = [&](index_t slot, index_t place) {
        slots[at(place)] = made.expert_of_slot()[at(slot)];
        share[at(place)] = made.share()[at(slot)];
      };
      for (index_t slot = made.first_slot(from); slot < made.first_slot(from) + made.slots(from);
           ++slot) {
        const expert_id e = made.expert_of_slot()[at(slot)];
        if (e < 0) continue;
        index_t place = -1;
        for (std::size_t s = 0; s < here.size() && place < 0; ++s)
          if (here[s] == e && slots[at(first) + s] == no_expert) place = static_cast<index_t>(s);
        if (place >= 0)
          put(slot, first + place);
        else
          rest.push_back(slot);
      }
      index_t next = first;
      for (const index_t slot : rest) {
        while (slots[at(next)] != no_expert) ++next;
        put(slot, next);
      }
    }
  }
  return placement({.experts = old.experts(),
                    .slot_offset = old.slot_offset(),
                    .expert_of_slot = slots,
                    .node_of_rank = old.node_of_rank(),
                    .alive = made.alive(),
                    .share = share});
}

/// One expert's weights from a rank that holds them to one that will.
struct expert_transfer {
  expert_id expert = no_expert;
  std::int32_t from = 0;
  std::int32_t to = 0;
  slot_id slot = no_slot;  ///< of the new placement
};

/// What has to be sent so that `to` can be adopted: for each slot whose rank lacks its expert, from
/// the live ranks that hold it in turn.
///
/// A dead rank gets nothing; one that comes back alive has nothing of what it once held. Throws:
/// error where sizes differ, or nobody alive holds an expert. Cost: O(P S).
inline std::vector<expert_transfer> transfers(const placement& from, const placement& to) {
  using detail::at;
  check_size("transfers", "to.ranks()", to.ranks(), from.ranks());
  check_size("transfers", "to.experts()", to.experts(), from.experts());
  std::vector<expert_transfer> list;
  std::vector<std::size_t> turn(at(from.experts()), 0);
  for (index_t s = 0; s < to.slots(); ++s) {
    const expert_id e = to.expert_of_slot()[at(s)];
    const std::int32_t r = to.rank_of_slot()[at(s)];
    if (e < 0 || to.alive()[at(r)] == 0) continue;
    const auto here = from.experts_of_rank(r);
    if (from.alive()[at(r)] != 0 && std::find(here.begin(), here.end(), e) != here.end()) continue;
    const std::span<const slot_id> holders = from.slots_of_expert(e);
    if (holders.empty())
      fail("transfers", "expert " + std::to_string(e) + " has no live slot to be copied from");
    list.push_back({e, from.rank_of_slot()[at(holders[turn[at(e)]++ % holders.size()])], r,
                    static_cast<slot_id>(s)});
  }
  return list;
}

}  // namespace moeroute
