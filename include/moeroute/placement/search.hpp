// The searched placement: numbers of replicas found by packing them, then swaps between ranks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/replicate.hpp>

namespace moeroute {

/// How long search_placement looks.
struct search_options {
  /// Experts tried for one replica more, the heaviest of a hottest rank, and for one less, those
  /// with the most replicas; 0: all experts and all with replicas, for small instances.
  index_t candidates = 10;
  /// A rank holds an expert once.
  bool distinct = true;
  /// Most changes of replica counts.
  index_t most_steps = 200;
  bool swaps = true;
  /// New starts where the first way down ends above `good` times the lower bound.
  index_t kicks = 8;
  double good = 1.0015;
};

/// A packing: what search_placement compares.
struct packing {
  std::vector<index_t> count;                   ///< [E] replicas
  std::vector<std::vector<expert_id>> of_rank;  ///< [R][S]
  std::vector<double> load;                     ///< [R]
  double max_load = 0.0;
  double squares = 0.0;  ///< the sum of those of load
  index_t steps = 0;     ///< changes of counts on the way there
};

namespace detail {

// Packs replicas, heaviest first, to the lightest rank with room (and without the expert).
class packer {
 public:
  packer(std::span<const double> load, index_t slots, index_t ranks, bool distinct)
      : load_(load), room_(slots / ranks), ranks_(ranks), distinct_(distinct) {
    order_.resize(load.size());
    std::iota(order_.begin(), order_.end(), index_t{0});
  }

  // Sets the counts: experts in order of load per replica.
  void start(std::span<const index_t> count) {
    count_.assign(count.begin(), count.end());
    std::sort(order_.begin(), order_.end(), [&](index_t a, index_t b) { return before(a, b); });
  }
  // The order again after the counts of two experts have changed.
  void change(index_t e, index_t by) {
    const auto from = std::find(order_.begin(), order_.end(), e);
    order_.erase(from);
    count_[at(e)] += by;
    order_.insert(std::lower_bound(order_.begin(), order_.end(), e,
                                   [&](index_t a, index_t b) { return before(a, b); }),
                  e);
  }
  std::span<const index_t> count() const { return count_; }

  // (max load, sum of squares); gives up where the load of a rank exceeds `most`.
  std::pair<double, double> pack(double most, packing* out = nullptr) {
    heap_.clear();
    for (index_t r = 0; r < ranks_; ++r) heap_.push_back({0.0, static_cast<std::int32_t>(r), 0});
    if (out != nullptr) {
      out->count = count_;
      out->of_rank.assign(at(ranks_), {});
      out->load.assign(at(ranks_), 0.0);
    }
    double max = 0.0, squares = 0.0;
    const double given_up = std::numeric_limits<double>::infinity();
    for (const index_t e : order_) {
      const double w = quotient(e);
      taken_.clear();
      for (index_t i = 0; i < count_[at(e)]; ++i) {
        if (heap_.empty()) put_back(max, squares);  // ranks with room hold it all: twice, then
        std::pop_heap(heap_.begin(), heap_.end(), later);
        open_rank r = heap_.back();
        heap_.pop_back();
        r.load += w;
        ++r.filled;
        if (r.load > most) return {given_up, given_up};
        if (out != nullptr) out->of_rank[at(r.rank)].push_back(static_cast<expert_id>(e));
        if (distinct_) {
          taken_.push_back(r);
        } else {
          close_or_push(r, max, squares);
        }
      }
      put_back(max, squares);
    }
    if (out != nullptr) {
      for (index_t r = 0; r < ranks_; ++r)
        for (const expert_id e : out->of_rank[at(r)]) out->load[at(r)] += quotient(e);
      out->max_load = max;
      out->squares = squares;
    }
    return {max, squares};
  }

  double quotient(index_t e) const { return load_[at(e)] / static_cast<double>(count_[at(e)]); }

 private:
  struct open_rank {
    double load;
    std::int32_t rank;
    std::int32_t filled;
  };
  static bool later(const open_rank& a, const open_rank& b) {
    return a.load > b.load || (a.load == b.load && a.rank > b.rank);
  }
  bool before(index_t a, index_t b) const {
    const double x = quotient(a), y = quotient(b);
    return x > y || (x == y && a < b);
  }
  void close_or_push(const open_rank& r, double& max, double& squares) {
    if (r.filled < room_) {
      heap_.push_back(r);
      std::push_heap(heap_.begin(), heap_.end(), later);
      return;
    }
    max = std::max(max, r.load);
    squares += r.load * r.load;
  }
  void put_back(double& max, double& squares) {
    for (const open_rank& r : taken_) close_or_push(r, max, squares);
    taken_.clear();
  }

  std::span<const double> load_;
  index_t room_, ranks_;
  bool distinct_;
  std::vector<index_t> order_, count_;
  std::vector<open_rank> heap_, taken_;
};

// The greatest load and the sum of squares, from loads that have changed.
inline void settle(packing& p) {
  p.max_load = *std::max_element(p.load.begin(), p.load.end());
  p.squares = std::inner_product(p.load.begin(), p.load.end(), p.load.begin(), 0.0);
}

// Swaps slots of the hottest rank with lighter ones elsewhere while the hotter of the two ranks
// gets cooler.
inline void swap_slots(packing& p, std::span<const double> load, bool distinct) {
  const auto ranks = static_cast<index_t>(p.of_rank.size());
  const auto w = [&](expert_id e) { return load[at(e)] / static_cast<double>(p.count[at(e)]); };
  const auto holds = [&](index_t r, expert_id e) {
    return std::find(p.of_rank[at(r)].begin(), p.of_rank[at(r)].end(), e) != p.of_rank[at(r)].end();
  };
  for (index_t step = 0; step < 100 * ranks; ++step) {
    const index_t h = std::max_element(p.load.begin(), p.load.end()) - p.load.begin();
    const double hot = p.load[at(h)];
    double best = hot * (1.0 - 1e-12);
    index_t best_rank = -1;
    std::size_t best_i = 0, best_j = 0;
    for (std::size_t i = 0; i < p.of_rank[at(h)].size(); ++i) {
      const expert_id e = p.of_rank[at(h)][i];
      const double x = w(e);
      for (index_t k = 0; k < ranks; ++k) {
        if (p.load[at(k)] >= best) continue;
        for (std::size_t j = 0; j < p.of_rank[at(k)].size(); ++j) {
          const expert_id f = p.of_rank[at(k)][j];
          const double d = x - w(f);
          const double made = std::max(hot - d, p.load[at(k)] + d);
          if (made >= best || (distinct && (holds(k, e) || holds(h, f)))) continue;
          best = made;
          best_rank = k;
          best_i = i;
          best_j = j;
        }
      }
    }
    if (best_rank < 0) break;
    std::swap(p.of_rank[at(h)][best_i], p.of_rank[at(best_rank)][best_j]);
    for (const index_t r : {h, best_rank}) {
      p.load[at(r)] = 0.0;
      for (const expert_id e : p.of_rank[at(r)]) p.load[at(r)] += w(e);
    }
  }
  settle(p);
}

}  // namespace detail

namespace detail {

// From these counts, one replica at a time from one expert to another while (max load, sum of
// squares) falls; then swaps.
inline packing descend(std::span<const double> load, index_t slots, index_t ranks,
                       const search_options& options, std::span<const index_t> start) {
  const auto experts = static_cast<index_t>(load.size());
  packer packs(load, slots, ranks, options.distinct);
  packs.start(start);
  const double no_limit = std::numeric_limits<double>::infinity();
  packing best;
  std::pair<double, double> score = packs.pack(no_limit, &best);
  const double mean = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(ranks);
  std::vector<index_t> more, less;
  for (index_t step = 0; step < options.most_steps && score.first > mean * (1.0 + 1e-9); ++step) {
    more.clear();
    less.clear();
    for (index_t e = 0; e < experts; ++e) {
      if (best.count[at(e)] > 1) less.push_back(e);
      if (options.candidates == 0) more.push_back(e);
    }
    if (options.candidates > 0) {
      // Who may get one more: the heaviest of a hottest rank. Who may lose one: those with most,
      // and those whose loss costs least.
      const auto rise = [&](index_t e) {
        return load[at(e)] / static_cast<double>(best.count[at(e)] - 1);
      };
      std::sort(less.begin(), less.end(), [&](index_t a, index_t b) {
        const index_t x = best.count[at(a)], y = best.count[at(b)];
        return x > y || (x == y && a < b);
      });
      if (static_cast<index_t>(less.size()) > options.candidates) {
        std::sort(less.begin() + options.candidates, less.end(), [&](index_t a, index_t b) {
          return rise(a) < rise(b) || (rise(a) == rise(b) && a < b);
        });
        less.resize(std::min(less.size(), at(2 * options.candidates)));
      }
      const index_t hot = std::max_element(best.load.begin(), best.load.end()) - best.load.begin();
      more.assign(best.of_rank[at(hot)].begin(), best.of_rank[at(hot)].end());
      std::sort(more.begin(), more.end(), [&](index_t a, index_t b) {
        const double x = packs.quotient(a), y = packs.quotient(b);
        return x > y || (x == y && a < b);
      });
      more.erase(std::unique(more.begin(), more.end()), more.end());
      if (static_cast<index_t>(more.size()) > options.candidates)
        more.resize(at(options.candidates));
    }
    std::pair<double, double> found = score;
    index_t give = -1, take = -1;
    for (const index_t f : more) {
      if (options.distinct && packs.count()[at(f)] >= ranks) continue;
      for (const index_t e : less) {
        if (e == f) continue;
        packs.change(e, -1);
        packs.change(f, 1);
        if (const auto made = packs.pack(found.first); made < found) {
          found = made;
          give = e;
          take = f;
        }
        packs.change(f, -1);
        packs.change(e, 1);
      }
    }
    if (give < 0) break;
    packs.change(give, -1);
    packs.change(take, 1);
    score = packs.pack(no_limit, &best);
    ++best.steps;
  }
  if (options.swaps) swap_slots(best, load, options.distinct);
  return best;
}

inline bool has_twice(const packing& p) {
  for (std::vector<expert_id> rank : p.of_rank) {
    std::sort(rank.begin(), rank.end());
    if (std::adjacent_find(rank.begin(), rank.end()) != rank.end()) return true;
  }
  return false;
}

// Exchanges the second copy of an expert on a rank with the expert of the nearest load that this
// rank lacks, from a rank that lacks the copy, until no rank holds one twice.
//
// There is always such a pair where no expert has more replicas than ranks: if not, every rank
// without the copy would hold fewer different experts, all of them here, and so have copies itself,
// and so on without end.
inline void separate(packing& p, std::span<const double> load) {
  const auto ranks = static_cast<index_t>(p.of_rank.size());
  const auto w = [&](expert_id e) { return load[at(e)] / static_cast<double>(p.count[at(e)]); };
  const auto copies = [&](index_t r, expert_id e) {
    return std::count(p.of_rank[at(r)].begin(), p.of_rank[at(r)].end(), e);
  };
  for (bool found = true; found;) {
    found = false;
    double best = 0.0;
    expert_id *from = nullptr, *to = nullptr;
    for (index_t r = 0; r < ranks; ++r)
      for (expert_id& e : p.of_rank[at(r)]) {
        if (copies(r, e) < 2) continue;
        for (index_t q = 0; q < ranks; ++q) {
          if (copies(q, e) != 0) continue;
          for (expert_id& f : p.of_rank[at(q)]) {
            const double gap = std::abs(w(e) - w(f));
            if (copies(r, f) != 0 || (found && gap >= best)) continue;
            found = true;
            best = gap;
            from = &e;
            to = &f;
          }
        }
      }
    if (found) std::swap(*from, *to);
  }
  for (index_t r = 0; r < ranks; ++r) {
    p.load[at(r)] = 0.0;
    for (const expert_id e : p.of_rank[at(r)]) p.load[at(r)] += w(e);
  }
  settle(p);
}

}  // namespace detail

/// The packing that search_placement finds, before it is a placement. `start`, if given, are the
/// replica counts to begin with: those of the last plan.
inline packing search_packing(std::span<const double> load, index_t slots, index_t ranks,
                              const search_options& options = {},
                              std::span<const index_t> start = {}) {
  using detail::at;
  constexpr const char* where = "search_placement";
  check_loads(where, load);
  const auto experts = static_cast<index_t>(load.size());
  detail::check_slots(where, experts, slots, ranks);
  check_range(where, "slots per rank", slots / ranks, 1, options.distinct ? experts : slots);
  check_range(where, "candidates", options.candidates, 0, max_experts);
  check_range(where, "kicks", options.kicks, 0, 1 << 20);
  const index_t most = options.distinct ? ranks : slots;
  std::vector<index_t> first = replicate(load, slots, most);
  double bound = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(ranks);
  for (std::size_t e = 0; e < load.size(); ++e)
    bound = std::max(bound, load[e] / static_cast<double>(first[e]));
  if (!start.empty()) {
    check_size(where, "start.size()", static_cast<index_t>(start.size()), experts);
    index_t sum = 0;
    for (const index_t c : start) {
      check_range(where, "start", c, 1, most);
      sum += c;
    }
    check_size(where, "the sum of start", sum, slots);
    first.assign(start.begin(), start.end());
  }
  packing best = detail::descend(load, slots, ranks, options, first);
  const auto better = [&](const packing& a) {
    const bool a_twice = options.distinct && detail::has_twice(a);
    const bool b_twice = options.distinct && detail::has_twice(best);
    return a_twice == b_twice ? a.max_load < best.max_load : b_twice;
  };
  const auto is_good = [&] {
    return best.max_load <= bound * options.good && !(options.distinct && detail::has_twice(best));
  };
  // Where the way down ends early: the counts that are found where ranks may hold an expert twice,
  // then the best so far with a few replicas moved at random.
  if (options.distinct && options.kicks > 0 && !is_good()) {
    search_options relaxed = options;
    relaxed.distinct = relaxed.swaps = false;
    std::vector<index_t> count = detail::descend(load, slots, ranks, relaxed, first).count;
    if (*std::max_element(count.begin(), count.end()) <= most)
      if (packing made = detail::descend(load, slots, ranks, options, count); better(made))
        best = std::move(made);
  }
  std::vector<index_t> heavy(at(experts));
  std::iota(heavy.begin(), heavy.end(), index_t{0});
  std::sort(heavy.begin(), heavy.end(), greatest_first([&](index_t i) { return load[at(i)]; }));
  // Numbers by which no slot has more than a part of the mean; what is left goes to the fullest.
  const double mean = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(ranks);
  for (const double part : {0.92, 0.84, 0.76, 0.68, 0.6, 0.52}) {
    if (options.kicks == 0 || is_good() || !(part * mean > 0.0)) break;
    std::vector<index_t> count(at(experts), 1);
    index_t sum = 0;
    for (index_t e = 0; e < experts; ++e) {
      const double wanted = std::ceil(load[at(e)] / (part * mean));
      count[at(e)] = std::clamp<index_t>(static_cast<index_t>(std::min(wanted, 1e9)), 1, most);
      sum += count[at(e)];
    }
    // Small experts that get another slot fill up ranks beside the slots of heavy ones.
    for (index_t i = 0; sum < slots; ++i) {
      const index_t e = heavy[at((experts / 8 + i) % experts)];
      if (count[at(e)] >= most) continue;
      ++count[at(e)];
      ++sum;
    }
    if (sum != slots) continue;
    if (packing made = detail::descend(load, slots, ranks, options, count); better(made))
      best = std::move(made);
  }
  const auto heavies = static_cast<std::uint32_t>(std::min<index_t>(experts, 24));
  for (index_t kick = 0; kick < options.kicks && !is_good(); ++kick) {
    std::vector<index_t> count = best.count, owners;
    for (std::uint64_t i = 0; i < 2; ++i) {
      const random_words r = random_block(11, i, static_cast<std::uint64_t>(kick));
      const index_t f = heavy[r.word[1] % heavies];
      owners.clear();
      for (index_t e = 0; e < experts; ++e)
        if (count[at(e)] > 1 && e != f) owners.push_back(e);
      if (owners.empty() || count[at(f)] >= most) continue;
      --count[at(owners[r.word[0] % owners.size()])];
      ++count[at(f)];
    }
    if (packing made = detail::descend(load, slots, ranks, options, count); better(made))
      best = std::move(made);
  }
  if (options.distinct && detail::has_twice(best)) detail::separate(best, load);
  return best;
}

/// A placement with equally many slots on every rank and even shares, searched over the numbers of
/// replicas: each change of two experts' numbers is packed anew, the best kept; then slots are
/// swapped between ranks.
///
/// EPLB fixes the numbers for the smallest load per slot before it packs; those that pack well are
/// others. Ensures: every expert has a slot, no rank holds one twice (options.distinct); max_load
/// never above that of EPLB's plan, where that has no expert twice on a rank. Throws: error where a
/// load is no load, ranks do not divide slots, or slots are fewer than experts. Cost: about 10^2 to
/// 10^3 packs of O(P log R). Determinism: exact; of equals the first.
inline placement_plan search_placement(std::span<const double> load, index_t slots, index_t ranks,
                                       const search_options& options = {},
                                       std::span<const std::int32_t> node_of_rank = {}) {
  const packing found = search_packing(load, slots, ranks, options);
  std::vector<expert_id> of_slot;
  for (const auto& rank : found.of_rank) of_slot.insert(of_slot.end(), rank.begin(), rank.end());
  const auto experts = static_cast<index_t>(load.size());
  placement_plan plan =
      plan_of(placement::from_slots(experts, ranks, of_slot, node_of_rank), load,
              placement_bound(load, std::min(slots, size_product(experts, ranks)), ranks));
  const placement_plan published = eplb_plan(load, slots, ranks);
  if (published.balance.max_load < plan.balance.max_load &&
      (!options.distinct || published.experts.duplicates().empty()))
    plan = plan_of(
        placement::from_slots(experts, ranks, published.experts.expert_of_slot(), node_of_rank),
        load, plan.lower_bound);
  return plan;
}

}  // namespace moeroute
