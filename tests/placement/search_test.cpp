#include <moeroute/placement/search.hpp>
// The search and the re-plan, with options of every kind beside each other, step for step against
// slow ones that work everything out anew from what the headers say.
#include <algorithm>
#include <array>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/placement/replan.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace search_test {

using detail::at;
using counts = std::vector<index_t>;

// Loads are multiples of the numbers of replicas: all quotients and sums are whole numbers.
constexpr double unit = 27720.0;  // of 1 to 12

struct slow_search {
  std::vector<double> load;
  index_t slots, ranks;

  double part(const counts& n, index_t e) const { return load[at(e)] / double(n[at(e)]); }
  double sum() const { return std::accumulate(load.begin(), load.end(), 0.0); }
  index_t experts() const { return static_cast<index_t>(load.size()); }

  static void measure(const slow_search& s, packing& p) {
    p.load.assign(at(s.ranks), 0.0);
    for (index_t r = 0; r < s.ranks; ++r)
      for (const expert_id e : p.of_rank[at(r)]) p.load[at(r)] += s.part(p.count, e);
    p.max_load = p.squares = 0.0;
    for (const double x : p.load) {
      p.max_load = std::max(p.max_load, x);
      p.squares += x * x;
    }
  }

  // The heaviest replica first, each to the lightest rank with room, those without the expert
  // before those that got it in this round.
  packing pack(const counts& n, bool distinct) const {
    packing p;
    p.count = n;
    p.of_rank.resize(at(ranks));
    p.load.assign(at(ranks), 0.0);
    std::vector<index_t> order;
    for (index_t e = 0; e < experts(); ++e) order.push_back(e);
    std::stable_sort(order.begin(), order.end(),
                     [&](index_t a, index_t b) { return part(n, a) > part(n, b); });
    for (const index_t e : order) {
      std::vector<bool> got(at(ranks), false);
      for (index_t i = 0; i < n[at(e)]; ++i) {
        const auto lightest = [&] {
          index_t best = -1;
          for (index_t r = 0; r < ranks; ++r) {
            const auto filled = static_cast<index_t>(p.of_rank[at(r)].size());
            if (filled == slots / ranks || (distinct && got[at(r)])) continue;
            if (best < 0 || p.load[at(r)] < p.load[at(best)]) best = r;
          }
          return best;
        };
        index_t r = lightest();
        if (r < 0) {
          got.assign(at(ranks), false);
          r = lightest();
        }
        got[at(r)] = true;
        p.of_rank[at(r)].push_back(static_cast<expert_id>(e));
        p.load[at(r)] += part(n, e);
      }
    }
    measure(*this, p);
    return p;
  }

  static bool holds(const packing& p, index_t r, expert_id e) {
    return std::count(p.of_rank[at(r)].begin(), p.of_rank[at(r)].end(), e) > 0;
  }
  static bool has_twice(const packing& p) {
    for (const auto& rank : p.of_rank)
      for (const expert_id e : rank)
        if (std::count(rank.begin(), rank.end(), e) > 1) return true;
    return false;
  }

  void swap(packing& p, bool distinct) const {
    for (;;) {
      const index_t hot = std::max_element(p.load.begin(), p.load.end()) - p.load.begin();
      double best = p.load[at(hot)];
      packing next;
      for (std::size_t i = 0; i < p.of_rank[at(hot)].size(); ++i)
        for (index_t k = 0; k < ranks; ++k)
          for (std::size_t j = 0; j < p.of_rank[at(k)].size(); ++j) {
            const expert_id e = p.of_rank[at(hot)][i], f = p.of_rank[at(k)][j];
            if (distinct && (holds(p, k, e) || holds(p, hot, f))) continue;
            packing tried = p;
            std::swap(tried.of_rank[at(hot)][i], tried.of_rank[at(k)][j]);
            measure(*this, tried);
            const double hotter = std::max(tried.load[at(hot)], tried.load[at(k)]);
            if (hotter >= best) continue;
            best = hotter;
            next = tried;
          }
      if (next.of_rank.empty()) break;
      p = next;
    }
  }

  packing descend(const search_options& o, const counts& start) const {
    packing best = pack(start, o.distinct);
    while (best.steps < o.most_steps && best.max_load > sum() / double(ranks)) {
      counts more, less;
      for (index_t e = 0; e < experts(); ++e) {
        more.push_back(e);
        if (best.count[at(e)] > 1) less.push_back(e);
      }
      if (o.candidates > 0) {
        const index_t hot =
            std::max_element(best.load.begin(), best.load.end()) - best.load.begin();
        std::erase_if(more,
                      [&](index_t e) { return !holds(best, hot, static_cast<expert_id>(e)); });
        std::stable_sort(more.begin(), more.end(), [&](index_t a, index_t b) {
          return part(best.count, a) > part(best.count, b);
        });
        more.resize(std::min(more.size(), at(o.candidates)));
        std::stable_sort(less.begin(), less.end(), [&](index_t a, index_t b) {
          return best.count[at(a)] > best.count[at(b)];
        });
        const std::size_t most = std::min(less.size(), at(o.candidates));
        counts cheap(less.begin() + static_cast<std::ptrdiff_t>(most), less.end());
        less.resize(most);
        std::sort(cheap.begin(), cheap.end());
        std::stable_sort(cheap.begin(), cheap.end(), [&](index_t a, index_t b) {
          return load[at(a)] / double(best.count[at(a)] - 1) <
                 load[at(b)] / double(best.count[at(b)] - 1);
        });
        cheap.resize(std::min(cheap.size(), at(o.candidates)));
        less.insert(less.end(), cheap.begin(), cheap.end());
      }
      packing next = best;
      for (const index_t f : more)
        for (const index_t e : less) {
          counts n = best.count;
          --n[at(e)];
          ++n[at(f)];
          if (e == f || (o.distinct && n[at(f)] > ranks)) continue;
          const packing made = pack(n, o.distinct);
          if (std::pair(made.max_load, made.squares) < std::pair(next.max_load, next.squares))
            next = made;
        }
      if (next.count == best.count) break;
      next.steps = best.steps + 1;
      best = next;
    }
    if (o.swaps) swap(best, o.distinct);
    return best;
  }

  void separate(packing& p) const {
    const auto copies = [&](index_t r, expert_id e) {
      return std::count(p.of_rank[at(r)].begin(), p.of_rank[at(r)].end(), e);
    };
    for (;;) {
      double least = 1e300;
      expert_id *from = nullptr, *to = nullptr;
      for (index_t r = 0; r < ranks; ++r)
        for (expert_id& e : p.of_rank[at(r)])
          for (index_t q = 0; q < ranks; ++q)
            for (expert_id& f : p.of_rank[at(q)]) {
              if (copies(r, e) < 2 || copies(q, e) > 0 || copies(r, f) > 0) continue;
              const double gap = std::abs(part(p.count, e) - part(p.count, f));
              if (gap >= least) continue;
              least = gap;
              from = &e;
              to = &f;
            }
      if (from == nullptr) break;
      std::swap(*from, *to);
    }
    measure(*this, p);
  }

  packing search(const search_options& o, const counts& start) const {
    const index_t most = o.distinct ? ranks : slots;
    counts first = replicate(load, slots, most);
    double bound = sum() / double(ranks);
    for (index_t e = 0; e < experts(); ++e) bound = std::max(bound, part(first, e));
    if (!start.empty()) first = start;
    packing best = descend(o, first);
    const auto twice = [&](const packing& p) { return o.distinct && has_twice(p); };
    const auto good = [&] { return !twice(best) && best.max_load <= bound * o.good; };
    const auto offer = [&](const counts& n) {
      const packing made = descend(o, n);
      if (std::pair(twice(made), made.max_load) < std::pair(twice(best), best.max_load))
        best = made;
    };
    if (o.kicks > 0 && o.distinct && !good()) {
      search_options relaxed = o;
      relaxed.distinct = relaxed.swaps = false;
      const counts n = descend(relaxed, first).count;
      if (*std::max_element(n.begin(), n.end()) <= ranks) offer(n);
    }
    counts heavy;
    for (index_t e = 0; e < experts(); ++e) heavy.push_back(e);
    std::stable_sort(heavy.begin(), heavy.end(),
                     [&](index_t a, index_t b) { return load[at(a)] > load[at(b)]; });
    for (const double of_mean : {0.92, 0.84, 0.76, 0.68, 0.6, 0.52}) {
      if (o.kicks == 0 || good() || sum() == 0.0) break;
      const double size = of_mean * (sum() / double(ranks));
      counts n;
      for (const double w : load)
        n.push_back(std::min(most, std::max<index_t>(1, index_t(std::ceil(w / size)))));
      index_t left = slots - std::accumulate(n.begin(), n.end(), index_t{0});
      for (index_t i = experts() / 8; left > 0 && i < experts() / 8 + most * experts(); ++i) {
        index_t& e = n[at(heavy[at(i % experts())])];
        if (e == most) continue;
        ++e;
        --left;
      }
      if (left == 0) offer(n);
    }
    for (index_t kick = 0; kick < o.kicks && !good(); ++kick) {
      counts n = best.count;
      for (std::uint64_t i = 0; i < 2; ++i) {
        const random_words r = random_block(11, i, static_cast<std::uint64_t>(kick));
        const index_t f =
            heavy[r.word[1] % static_cast<std::uint32_t>(std::min<index_t>(experts(), 24))];
        counts owners;
        for (index_t e = 0; e < experts(); ++e)
          if (e != f && n[at(e)] > 1) owners.push_back(e);
        if (owners.empty() || n[at(f)] == most) continue;
        --n[at(owners[r.word[0] % owners.size()])];
        ++n[at(f)];
      }
      offer(n);
    }
    if (twice(best)) separate(best);
    return best;
  }
};

bool same(const packing& a, const packing& b) {
  return a.of_rank == b.of_rank && a.count == b.count && a.load == b.load &&
         a.max_load == b.max_load && a.squares == b.squares && a.steps == b.steps;
}

std::vector<double> drawn_loads(test::random& rng, index_t experts) {
  std::vector<double> load;
  const index_t kind = rng.below(13), values = kind > 5 ? 40 : 1 + rng.below(9);
  for (index_t e = 0; e < experts; ++e) {
    const index_t x = rng.below(values), peak = rng.below(6);
    load.push_back(unit * double(kind % 12 == 0 ? 0
                                 : kind == 1    ? x
                                 : kind == 2    ? 1
                                                : 1 + x + (peak == 0 && kind < 9 ? 90 : 0)));
  }
  return load;
}

}  // namespace search_test

TEST_CASE("a search with any options ends where one ends that counts everything anew") {
  using namespace search_test;
  test::random rng(41);
  const auto draw_of = [&](auto... of) {
    const std::array all{of...};
    return all[at(rng.below(static_cast<index_t>(all.size())))];
  };
  int wrong = 0, stepped = 0, twice = 0;
  for (int draw = 0; draw < 400; ++draw) {
    // One rank, few or many experts for the slots, more than the 24 heaviest.
    const bool many = draw % 16 == 2;
    const index_t ranks = draw % 16 == 0 ? 1 : (many ? 4 : 2) + rng.below(4),
                  per = many ? 7 : 1 + rng.below(draw % 8 == 0 ? 7 : 4), slots = ranks * per,
                  fewest = many            ? 25
                           : draw % 4 == 1 ? per
                           : draw % 4 == 3 ? std::max(per, slots / 2)
                                           : std::max(per, slots - 1 - rng.below(8)),
                  experts = fewest + rng.below(std::min<index_t>(slots - fewest + 1, 4));
    search_options o;
    o.distinct = rng.below(4) > 0;
    if (slots > 12 && !o.distinct) continue;  // replicas by which a load is no whole number
    o.candidates = draw_of(0, 1, 2, 3, 10);
    o.most_steps = draw_of(0, 1, 200, 200, 200);
    o.swaps = rng.below(2) > 0;
    o.kicks = draw_of(0, 1, 3, 8, 8);
    o.good = draw_of(0.0, 1.0, 1.0, 1.0015, 1.1);
    if (many) o.most_steps = 1;
    const slow_search slow{drawn_loads(rng, experts), slots, ranks};
    const index_t most = o.distinct ? ranks : slots;
    counts start;
    if (rng.below(3) == 0) {
      start.assign(at(experts), 1);
      for (index_t left = slots - experts; left > 0;)
        if (index_t& n = start[at(rng.below(experts))]; n < most) ++n, --left;
    }
    INFO("draw " << draw);
    const packing want = slow.search(o, start),
                  got = search_packing(slow.load, slots, ranks, o, start);
    wrong += !same(got, want);
    stepped += want.steps > 0;
    twice += slow_search::has_twice(want);
    if (o.distinct) CHECK_FALSE(slow_search::has_twice(got));

    // The plan of it, or EPLB's where that is more even and may be taken.
    std::vector<std::int32_t> node;
    for (index_t r = 0; r < ranks; ++r) node.push_back(static_cast<std::int32_t>(r * 2 / ranks));
    const placement_plan plan = search_placement(slow.load, slots, ranks, o, node),
                         eplb = eplb_plan(slow.load, slots, ranks);
    packing found = start.empty() ? want : slow.search(o, {});
    const bool theirs = eplb.balance.max_load < found.max_load &&
                        (!o.distinct || eplb.experts.duplicates().empty());
    std::vector<expert_id> of;
    for (const auto& rank : found.of_rank) of.insert(of.end(), rank.begin(), rank.end());
    wrong += !(plan.experts == placement::from_slots(experts, ranks,
                                                     theirs ? eplb.experts.expert_of_slot()
                                                            : std::span<const expert_id>(of),
                                                     node));
    CHECK(plan.rank_load == rank_loads(plan.experts, slow.load));
    CHECK(plan.balance.max_load ==
          std::min(found.max_load, theirs ? eplb.balance.max_load : 1e300));
    CHECK(plan.lower_bound == placement_bound(slow.load, std::min(slots, experts * ranks), ranks));
  }
  CHECK(wrong == 0);
  CHECK((stepped > 40 && twice > 5));
}

TEST_CASE(
    "copies are parted by the nearest exchange, the first of equal ones, whatever lies where") {
  using namespace search_test;
  test::random rng(42);
  int wrong = 0;
  for (int draw = 0; draw < 200; ++draw) {
    const index_t ranks = 2 + rng.below(4), per = 2 + rng.below(3), slots = ranks * per,
                  experts = per + rng.below(slots - per + 1);
    slow_search slow{drawn_loads(rng, experts), slots, ranks};
    packing p;
    p.count = replicate(slow.load, slots, ranks);
    std::vector<expert_id> of;
    for (index_t e = 0; e < experts; ++e) of.insert(of.end(), at(p.count[at(e)]), expert_id(e));
    for (index_t i = slots - 1; i > 0 && draw % 4 > 0; --i)
      std::swap(of[at(i)], of[at(rng.below(i + 1))]);
    for (index_t r = 0; r < ranks; ++r)
      p.of_rank.emplace_back(of.begin() + r * per, of.begin() + (r + 1) * per);
    p.load.assign(at(ranks), -1.0);
    packing want = p;
    CHECK(detail::has_twice(p) == slow_search::has_twice(p));
    detail::separate(p, slow.load);
    slow.separate(want);
    wrong += !same(p, want) || slow_search::has_twice(p);
  }
  CHECK(wrong == 0);
}

TEST_CASE("the search takes EPLB's plan where that is more even, and only where it may") {
  using namespace search_test;
  // Loads that are equal as float are in another order there.
  test::random rng(43);
  int theirs = 0, refused = 0;
  for (int draw = 0; draw < 200; ++draw) {
    std::vector<double> load;
    for (int e = 0; e < 9; ++e) {
      const double much = 1e5 * double(1 + rng.below(2)), little = 1e-4 * double(rng.below(40));
      load.push_back(much + little);
    }
    search_options o{.most_steps = 0, .swaps = false, .kicks = 0};
    o.distinct = draw % 2 == 0;
    const packing found = search_packing(load, 12, 4, o);
    const placement_plan eplb = eplb_plan(load, 12, 4), got = search_placement(load, 12, 4, o);
    const bool better = eplb.balance.max_load < found.max_load,
               may = !o.distinct || eplb.experts.duplicates().empty();
    theirs += better && may;
    refused += better && !may;
    CHECK(got.balance.max_load == (better && may ? eplb.balance.max_load : found.max_load));
  }
  CHECK((theirs > 0 && refused > 0));
}

TEST_CASE("a re-plan with any options takes the steps of one that tries each and weighs it anew") {
  using namespace search_test;
  test::random rng(44);
  int wrong = 0, copies = 0, swaps = 0;
  for (int draw = 0; draw < 400; ++draw) {
    const index_t ranks = 1 + rng.below(5);
    std::vector<std::int32_t> offset{0}, node;
    std::vector<std::uint8_t> alive;
    for (index_t r = 0; r < ranks; ++r) {
      const auto own = static_cast<std::int32_t>(1 + rng.below(4));
      offset.push_back(offset.back() + own);
      node.push_back(static_cast<std::int32_t>(r * 2 / ranks));
      alive.push_back(rng.below(6) > 0);
    }
    alive[at(rng.below(ranks))] = 1;
    const index_t slots = offset.back();
    const auto rank_of = [&](index_t s) {
      return std::upper_bound(offset.begin(), offset.end(), s) - offset.begin() - 1;
    };
    // Every expert on some live rank, the other slots with anybody or nobody.
    std::vector<index_t> live;
    for (index_t s = 0; s < slots; ++s)
      if (alive[at(rank_of(s))] != 0) live.push_back(s);
    const auto room = static_cast<index_t>(live.size());
    const index_t experts = std::max<index_t>(1, room - rng.below(5));
    for (index_t i = room - 1; i > 0; --i) std::swap(live[at(i)], live[at(rng.below(i + 1))]);
    std::vector<expert_id> of;
    for (index_t s = 0; s < slots; ++s) of.push_back(expert_id(rng.below(experts + 1) - 1));
    for (index_t e = 0; e < experts; ++e) of[at(live[at(e)])] = expert_id(e);
    const placement old({.experts = experts,
                         .slot_offset = offset,
                         .expert_of_slot = of,
                         .node_of_rank = node,
                         .alive = alive});
    const std::vector<double> load = drawn_loads(rng, experts);
    replan_options o;
    o.budget = rng.below(3) == 0 ? 16 : rng.below(7);
    o.target = 1.0 + 0.05 * double(rng.below(4));

    const auto holds = [&](index_t r, expert_id e) {
      return std::count(of.begin() + offset[at(r)], of.begin() + offset[at(r) + 1], e) > 0;
    };
    const auto replicas = [&](expert_id e) {
      index_t n = 0;
      for (index_t s = 0; s < slots; ++s) n += of[at(s)] == e && alive[at(rank_of(s))] != 0;
      return n;
    };
    const auto loads = [&] {
      std::vector<double> sum(at(ranks), 0.0);
      for (index_t s = 0; s < slots; ++s)
        if (of[at(s)] >= 0 && alive[at(rank_of(s))] != 0)
          sum[at(rank_of(s))] += load[at(of[at(s)])] / double(replicas(of[at(s)]));
      return sum;
    };
    const auto imbalance = [&] { return balance_of(loads(), alive).imbalance; };
    const double before = imbalance();
    std::vector<replan_step> steps;
    index_t moves = 0;
    while (imbalance() > o.target && moves < o.budget) {
      const std::vector<double> now = loads();
      const index_t hot = std::max_element(now.begin(), now.end()) - now.begin();
      double best = 1e-9 * now[at(hot)] * now[at(hot)];
      std::vector<expert_id> next;
      replan_step taken{};
      const auto weigh = [&](const replan_step& step) {
        const bool copy = step.what == replan_step::kind::copy;
        const std::vector<expert_id> kept = of;
        if (copy)
          of[at(step.slot)] = step.other;
        else
          std::swap(of[at(step.slot)], of[at(step.other)]);
        double drop = 0.0, most = 0.0;
        const std::vector<double> then = loads();
        for (std::size_t r = 0; r < now.size(); ++r) {
          drop += now[r] * now[r] - then[r] * then[r];
          most = std::max(most, then[r]);
        }
        const double worth = drop / (copy ? 1.0 : 2.0);
        if (most <= now[at(hot)] && worth > best * (1.0 + 1e-12)) {
          best = worth;
          taken = step;
          next = of;
        }
        of = kept;
      };
      for (index_t s = 0; s < slots; ++s)
        for (index_t i = offset[at(hot)]; i < offset[at(hot) + 1]; ++i)
          if (const expert_id e = of[at(i)]; e >= 0 && alive[at(rank_of(s))] != 0 &&
                                             (of[at(s)] < 0 || replicas(of[at(s)]) > 1) &&
                                             !holds(rank_of(s), e))
            weigh({replan_step::kind::copy, slot_id(s), e});
      for (index_t i = offset[at(hot)]; i < offset[at(hot) + 1] && moves + 2 <= o.budget; ++i)
        for (index_t j = 0; j < slots; ++j)
          if (const expert_id e = of[at(i)], f = of[at(j)]; e >= 0 && f >= 0 &&
                                                            alive[at(rank_of(j))] != 0 &&
                                                            !holds(rank_of(j), e) && !holds(hot, f))
            weigh({replan_step::kind::swap, slot_id(i), std::int32_t(j)});
      if (next.empty()) break;
      of = next;
      steps.push_back(taken);
      const bool copy = taken.what == replan_step::kind::copy;
      moves += copy ? 1 : 2;
      ++(copy ? copies : swaps);
    }
    const replan_result got = replan(old, load, o);
    wrong += !(got.steps == steps && got.moves == moves && got.imbalance_before == before &&
               got.imbalance_after == imbalance() &&
               got.experts == placement({.experts = experts,
                                         .slot_offset = offset,
                                         .expert_of_slot = of,
                                         .node_of_rank = node,
                                         .alive = alive}));
  }
  CHECK(wrong == 0);
  CHECK((copies > 50 && swaps > 50));
}

TEST_CASE("the search's and the re-plan's options have the values that are written, and ends") {
  using namespace search_test;
  const search_options o;
  CHECK((o.candidates == 10 && o.distinct && o.most_steps == 200 && o.swaps && o.kicks == 8 &&
         o.good == 1.0015));
  const replan_options r;
  CHECK((r.target == 1.02 && r.budget == 16));
  const std::vector<double> load{3, 1, 1, 1};
  const placement two = placement::contiguous(4, 2);
  const auto searched = [&](const search_options& with, index_t slots = 8, index_t ranks = 2) {
    return test::refusal([&] { search_packing(load, slots, ranks, with); });
  };
  CHECK(searched({.candidates = max_experts}) == "accepted");
  CHECK(searched({.candidates = max_experts + 1}) ==
        "moeroute::search_placement: candidates is 1048577, expected 0 to 1048576");
  CHECK(searched({.kicks = 1 << 20}) == "accepted");
  CHECK(searched({.kicks = (1 << 20) + 1}) ==
        "moeroute::search_placement: kicks is 1048577, expected 0 to 1048576");
  // A rank may have a slot for every expert, or, where it may hold one twice, for every slot.
  CHECK(searched({}, 8, 2) == "accepted");
  CHECK(searched({}, 5, 1) == "moeroute::search_placement: slots per rank is 5, expected 1 to 4");
  CHECK(searched({.distinct = false}, 5, 1) == "accepted");
  const auto moved = [&](const replan_options& with) {
    return test::refusal([&] { replan(two, load, with); });
  };
  CHECK(moved({.target = 1.0}) == "accepted");
  CHECK(moved({.target = HUGE_VAL}) == "accepted");
  CHECK(moved({.target = 0.9375}) == "moeroute::replan: target is 0.937500, expected >= 1");
  CHECK(moved({.target = std::nan("")}) == "moeroute::replan: target is nan, expected >= 1");
  CHECK(moved({.budget = 0x7fffffff}) == "accepted");
  CHECK(moved({.budget = index_t{1} << 31}) ==
        "moeroute::replan: budget is 2147483648, expected 0 to 2147483647");
}

TEST_CASE("a search steps while the hottest rank is a billionth above the mean, and no further") {
  using namespace search_test;
  // With two slots for the heaviest the hottest rank is d / 1.5 above the mean, for the lightest
  // d / 3.
  for (const auto& [d, steps] : {std::pair{1.2e-9, 0}, {1.9e-9, 1}, {1e-3, 1}}) {
    const std::vector<double> load{1 + 2 * d, 1 + 3 * d, 1};
    const packing p = search_packing(load, 4, 2, {.candidates = 0, .swaps = false, .kicks = 0});
    CHECK(p.steps == steps);
    CHECK(p.count == (steps == 0 ? counts{1, 2, 1} : counts{1, 1, 2}));
  }
}

TEST_CASE("a re-plan moves for a billionth of the hottest load squared per move, not for less") {
  // A swap of two of four experts lowers the sum of squares by 8 d^2.
  for (const auto& [d, moves] : {std::pair{2.5e-5, 0}, {4e-5, 2}}) {
    const std::vector<double> load{1 + 2 * d, 1 + 2 * d, 1, 1};
    CHECK(replan(placement::contiguous(4, 2), load, {.target = 1.0}).moves == moves);
  }
}
