#include <moeroute/metrics/cache.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <set>
#include <vector>

#include "support/assignments.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"
#include "support/split.hpp"

using namespace moeroute;

namespace {

constexpr cache_policy policies[] = {cache_policy::lru,        cache_policy::lfu,
                                     cache_policy::fifo,       cache_policy::segmented,
                                     cache_policy::segment,    cache_policy::least_stale,
                                     cache_policy::cost_aware, cache_policy::belady};

index_t hits(const expert_trace& trace, cache_policy policy, index_t capacity,
             cold_misses cold = cold_misses::counted, index_t window = 16) {
  return simulate_cache(trace,
                        {.policy = policy, .capacity = capacity, .window = window, .cold = cold})
      .hits;
}

expert_trace singles(std::initializer_list<expert_id> ids, index_t experts) {
  expert_trace trace(experts);
  for (const expert_id e : ids) {
    assignment a;
    a.reset(1, experts, 1);
    a.ids()[0] = e;
    trace.add(a);
  }
  return trace;
}

// The most hits that any way of evicting reaches, by trying all of them.
index_t most_hits(const expert_trace& trace, index_t token, const std::set<expert_id>& held,
                  index_t capacity) {
  if (token == trace.tokens()) return 0;
  index_t now = 0;
  std::set<expert_id> with = held;
  for (const expert_id e : trace.ids(token)) {
    now += held.contains(e);
    with.insert(e);
  }
  const index_t extra = static_cast<index_t>(with.size()) - capacity;
  if (extra <= 0) return now + most_hits(trace, token + 1, with, capacity);
  std::vector<expert_id> free;
  for (const expert_id e : with)
    if (std::find(trace.ids(token).begin(), trace.ids(token).end(), e) == trace.ids(token).end())
      free.push_back(e);
  index_t best = 0;
  for (unsigned choice = 0; choice < (1u << free.size()); ++choice) {
    if (std::popcount(choice) != extra) continue;
    std::set<expert_id> next = with;
    for (std::size_t i = 0; i < free.size(); ++i)
      if (choice >> i & 1) next.erase(free[i]);
    best = std::max(best, most_hits(trace, token + 1, next, capacity));
  }
  return now + best;
}

}  // namespace

TEST_CASE("hand traces: who leaves under each policy") {
  const expert_trace t = singles({0, 1, 2, 0, 3, 1, 0}, 4);
  CHECK(hits(t, cache_policy::lru, 3) == 2);     // 0 and, at the end, 0: 1 left for 3
  CHECK(hits(t, cache_policy::belady, 3) == 3);  // 2 leaves for 3
  const expert_trace u = singles({0, 0, 1, 2, 0}, 3);
  CHECK(hits(u, cache_policy::lru, 2) == 1);
  CHECK(hits(u, cache_policy::lfu, 2) == 2);  // 1 leaves
  CHECK(hits(u, cache_policy::segment, 2, cold_misses::counted, 3) == 2);
  // The window begins with the token itself: of one token nothing is foreseen.
  CHECK(hits(u, cache_policy::segment, 2, cold_misses::counted, 2) == 2);
  CHECK(hits(u, cache_policy::segment, 2, cold_misses::counted, 1) == 1);
}

TEST_CASE("Belady is the best of all ways to evict, so of every other cache") {
  test::random rng(3);
  for (int trial = 0; trial < 6; ++trial) {
    expert_trace trace(5);
    trace.add(test::fixed_choices(rng, 9, 5, trial % 2 + 1));
    for (index_t c = 2; c <= 4; ++c)
      CHECK(hits(trace, cache_policy::belady, c) == most_hits(trace, 0, {}, c));
  }
  for (index_t trial = 0; trial < test::sized(20, 4); ++trial) {
    expert_trace trace(16);
    trace.add(test::fixed_choices(rng, 200, 16, 3, 8, 1.0));
    for (index_t c = 3; c <= 16; ++c)
      for (const cache_policy p : policies)
        for (const cold_misses cold : {cold_misses::counted, cold_misses::free})
          REQUIRE(hits(trace, cache_policy::belady, c, cold) >= hits(trace, p, c, cold));
  }
}

TEST_CASE(
    "a larger cache never hits less (LRU, segment, Belady), and one for all misses cold only") {
  test::random rng(4);
  expert_trace trace(12);
  trace.add(test::fixed_choices(rng, 300, 12, 2, 0, 0.5));
  const std::set<expert_id> used(trace.ids().begin(), trace.ids().end());
  for (const cache_policy p : policies) {
    const bool inclusive =
        p == cache_policy::lru || p == cache_policy::segment || p == cache_policy::belady;
    for (index_t c = 3; c <= 12 && inclusive; ++c)
      CHECK(hits(trace, p, c) >= hits(trace, p, c - 1));
    CHECK(hits(trace, p, 12) == trace.lookups() - static_cast<index_t>(used.size()));
    CHECK(hits(trace, p, 12, cold_misses::free) == trace.lookups());
    CHECK(hits(trace, p, 5, cold_misses::free) == hits(trace, p, 5) + 5);
  }
}

TEST_CASE("a trace fed batch by batch is the whole one") {
  test::random rng(5);
  const assignment whole = test::fixed_choices(rng, 70, 9, 2, 6);
  expert_trace one(9), many(9);
  one.add(whole);
  test::for_each_part(whole, {20, 0, 50}, [&](const assignment& part) { many.add(part); });
  CHECK(one.tokens() == many.tokens());
  // Some have lost a choice: not every token has as many lookups.
  CHECK(one.lookups() == static_cast<index_t>(one.ids().size()));
  CHECK(std::vector<expert_id>(one.ids().begin(), one.ids().end()) ==
        std::vector<expert_id>(many.ids().begin(), many.ids().end()));
  CHECK(hits(one, cache_policy::segment, 4) == hits(many, cache_policy::segment, 4));
}

TEST_CASE("one pass gives what an LRU cache of every size gives") {
  test::random rng(7);
  expert_trace trace(24);
  trace.add(test::fixed_choices(rng, 400, 24, 3, 5, 1.0));
  const std::vector<index_t> curve = lru_hits(trace);
  REQUIRE(curve.size() == 25);
  CHECK(curve[0] == 0);
  for (index_t c = 3; c <= 24; ++c)
    CHECK(curve[static_cast<std::size_t>(c)] == hits(trace, cache_policy::lru, c));
  // What a token names again is there.
  assignment twice;
  twice.reset(3, 4, 3);
  const expert_id named[] = {1, 1, 2, 2, 1, 2, 3, 3, 3};
  std::copy_n(named, 9, twice.ids().begin());
  expert_trace again(4);
  again.add(twice);
  CHECK(lru_hits(again) == std::vector<index_t>{0, 5, 6, 6, 6});
  for (index_t c = 3; c <= 4; ++c)
    CHECK(lru_hits(again)[static_cast<std::size_t>(c)] == hits(again, cache_policy::lru, c));
}

TEST_CASE("what is pinned hits from the start, and takes its place from the rest") {
  test::random rng(8);
  expert_trace trace(16);
  trace.add(test::fixed_choices(rng, 200, 16, 2, 0, 1.0));
  std::vector<index_t> uses(16);
  for (const expert_id e : trace.ids()) ++uses[static_cast<std::size_t>(e)];
  const std::vector<std::int32_t> pins = {0, 1, 2};
  const cache_options all_pinned{.capacity = 3, .pinned = pins};
  CHECK(simulate_cache(trace, all_pinned).hits == uses[0] + uses[1] + uses[2]);
}

TEST_CASE("an empty trace has no hits; a cache below one token's experts is refused") {
  constexpr index_t longest = index_t{1} << 40;
  expert_trace trace(4);
  CHECK(simulate_cache(trace, {.capacity = 2}).hit_rate() == 0);
  CHECK((cache_result{}.lookups == 0 && cache_result{}.hits == 0));
  CHECK(test::refusal([&] { simulate_cache(trace, {.capacity = 0}); }) ==
        "moeroute::simulate_cache: capacity is 0, expected 1 to 4");
  test::random rng(6);
  trace.add(test::fixed_choices(rng, 3, 4, 2));
  CHECK(test::refusal([&] { simulate_cache(trace, {.capacity = 1}); }) ==
        "moeroute::simulate_cache: capacity is 1, expected 2 to 4");
  CHECK(test::refusal([&] { simulate_cache(trace, {.capacity = 5}); }) ==
        "moeroute::simulate_cache: capacity is 5, expected 2 to 4");
  const assignment wide = test::fixed_choices(rng, 3, 5, 2),
                   narrow = test::fixed_choices(rng, 3, 4, 2);
  const std::vector<std::uint8_t> short_mask(2, 1);
  const test::refusals all{
      {[] { expert_trace(0); }, "expert_trace: experts is 0, expected 1 to 1048576"},
      {[] { expert_trace(1048577); }, "expert_trace: experts is 1048577, expected 1 to 1048576"},
      {[&] { trace.add(wide); }, "expert_trace: experts is 5, expected 4"},
      {[&] { trace.add(narrow, {.mask = short_mask}); },
       "expert_trace: mask.size is 2, expected 3"},
      {[&] { simulate_cache(trace, {.capacity = 2, .window = 0}); },
       "simulate_cache: window is 0, expected 1 to 1099511627776"},
      {[&] { simulate_cache(trace, {.capacity = 2, .window = longest + 1}); },
       "simulate_cache: window is 1099511627777, expected 1 to 1099511627776"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK((trace.tokens() == 3 && trace.experts() == 4 && expert_trace(1048576).most() == 0));
  CHECK(hits(trace, cache_policy::segment, 2, cold_misses::counted, longest) ==
        hits(trace, cache_policy::segment, 2, cold_misses::counted, 3));
}

TEST_CASE("a simulated cache is the cache that it is named after, with its decay, token by token") {
  test::random rng(9);
  expert_trace trace(20);
  trace.add(test::fixed_choices(rng, 300, 20, 2, 0, 0.8));
  int differing = 0;
  for (const double decay : {1.0, 0.6}) {
    const std::vector<std::int32_t> pins = {19, 3};
    expert_cache cache({.experts = 20,
                        .capacity = 7,
                        .policy = cache_policy::lfu,
                        .pinned = pins,
                        .decay = decay});
    index_t found = 0;
    for (index_t t = 0; t < trace.tokens(); ++t) found += cache.step(trace.ids(t)).hits;
    const cache_result r = simulate_cache(
        trace, {.policy = cache_policy::lfu, .capacity = 7, .pinned = pins, .decay = decay});
    CHECK(r.hits == found);
    CHECK(r.lookups == 600);
    CHECK(r.hit_rate() == static_cast<double>(found) / 600.0);
    differing += decay == 1.0 ? static_cast<int>(found) : -static_cast<int>(found);
  }
  CHECK(differing != 0);
}
