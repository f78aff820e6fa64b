#include <moeroute/data/expert_cache.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <map>
#include <moeroute/data/expert_profile.hpp>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace {

using ids = std::vector<expert_id>;

ids step_of(test::random& rng, index_t experts, index_t k) {
  ids list;
  while (static_cast<index_t>(list.size()) < k) {
    const double u = static_cast<double>(rng.uniform());
    const auto e = static_cast<expert_id>(u * u * static_cast<double>(experts));
    if (std::find(list.begin(), list.end(), e) == list.end()) list.push_back(e);
  }
  return list;
}

// A cache in plain scans, for every call and every option: what is named twice or not at all, steps
// that exceed the cache, experts brought in ahead.
struct cache_by_scans {
  expert_cache_options options;
  struct line {
    double uses = 0.0;
    std::int64_t last_step = -1, used_at = 0, placed_at = 0, pass = 0, next = expert_cache::never;
    std::int64_t ahead = 0, total = 0;
    bool held = false, pinned = false, safe = false;  // safe: in the protected part
  };
  std::vector<line> lines;
  std::int64_t now = 0, step_number = 0, pass = 0, early = expert_cache::never;
  index_t layer = -1;
  index_t hits = 0;
  std::vector<std::int32_t> loads, evictions;

  explicit cache_by_scans(const expert_cache_options& o)
      : options(o), lines(static_cast<std::size_t>(o.experts * o.layers)) {
    for (const std::int32_t key : o.pinned) at(key).held = at(key).pinned = true;
  }
  line& at(std::int32_t key) { return lines[static_cast<std::size_t>(key)]; }
  std::int32_t keys() const { return static_cast<std::int32_t>(lines.size()); }
  std::int64_t size(std::int32_t key) const {
    return options.bytes.empty() ? 1 : options.bytes[static_cast<std::size_t>(key)];
  }
  template <class P>
  std::int64_t sum_of(P&& which) {
    std::int64_t sum = 0;
    for (std::int32_t key = 0; key < keys(); ++key) sum += which(at(key)) ? size(key) : 0;
    return sum;
  }
  std::int64_t used() {
    return sum_of([](const line& l) { return l.held; });
  }
  double worth(const line& l) const {
    return l.uses * std::pow(options.decay, double(step_number - l.last_step));
  }
  bool leaves_before(std::int32_t a, std::int32_t b) {
    const line &x = at(a), &y = at(b);
    double p = worth(x), q = worth(y);
    switch (options.policy) {
      case cache_policy::cost_aware: p *= double(size(a)), q *= double(size(b)); [[fallthrough]];
      case cache_policy::lfu:
        if (std::abs(p - q) > 1e-9 * std::max(p, q)) return p < q;
        break;
      case cache_policy::fifo: return x.placed_at < y.placed_at;
      case cache_policy::segmented: return x.safe != y.safe ? y.safe : x.placed_at < y.placed_at;
      case cache_policy::least_stale: {
        const auto stale = [&](std::int32_t key) {
          return key / options.experts <= layer && at(key).pass < pass;
        };
        if (stale(a) != stale(b)) return stale(a);
        break;
      }
      case cache_policy::belady:
        if (x.next != y.next) return x.next > y.next;
        break;
      case cache_policy::segment:
        if (x.ahead != y.ahead) return x.ahead < y.ahead;
        break;
      default: break;
    }
    return x.used_at < y.used_at;
  }
  std::int32_t who_leaves(bool others) {
    std::int32_t out = -1;
    for (std::int32_t key = 0; key < keys(); ++key) {
      const line& l = at(key);
      if (!l.held || l.pinned) continue;
      if (others && (l.last_step == step_number || l.used_at > early)) continue;
      if (out < 0 || leaves_before(key, out)) out = key;
    }
    return out;
  }
  bool bring(std::int32_t key, bool others_only) {
    // Nobody leaves for who finds no room.
    const auto stays = [&](const line& l) {
      return l.pinned ||
             (others_only && l.held && (l.last_step == step_number || l.used_at > early));
    };
    if (size(key) > options.capacity - sum_of(stays)) return false;
    while (used() + size(key) > options.capacity) {
      std::int32_t old = who_leaves(true);
      if (old < 0 && !others_only) old = who_leaves(false);
      if (old < 0) return false;
      at(old).held = at(old).safe = false;
      evictions.push_back(old);
    }
    at(key).held = true;
    at(key).placed_at = ++now;
    return true;
  }
  void step(const ids& list, index_t at_layer, const std::vector<std::int64_t>& next) {
    loads.clear();
    evictions.clear();
    hits = 0;
    early = expert_cache::never;
    ++step_number;
    if (at_layer <= layer) ++pass;
    layer = at_layer;
    for (std::size_t i = 0; i < list.size(); ++i) {
      if (list[i] == no_expert) continue;
      const auto key = static_cast<std::int32_t>(at_layer * options.experts + list[i]);
      line& l = at(key);
      const bool there = l.held || l.last_step == step_number;
      hits += there;
      if (!there) loads.push_back(key);
      l.uses = worth(l) + 1.0;
      l.last_step = step_number;
      l.used_at = ++now;
      l.pass = pass;
      ++l.total;
      if (!next.empty()) l.next = next[i];
      if (options.policy != cache_policy::segmented || !l.held || l.pinned) continue;
      l.safe = true;
      l.placed_at = ++now;
      const auto most =
          static_cast<std::int64_t>(options.protected_share * double(options.capacity));
      while (sum_of([](const line& s) { return s.safe; }) > most) {
        line* oldest = nullptr;
        for (line& s : lines)
          if (s.safe && (oldest == nullptr || s.placed_at < oldest->placed_at)) oldest = &s;
        oldest->safe = false;
        oldest->placed_at = ++now;
      }
    }
    for (const std::int32_t key : loads) bring(key, false);
  }
  void prefetch(const ids& list, index_t at_layer, index_t most) {
    loads.clear();
    evictions.clear();
    hits = 0;
    early = now;
    for (const expert_id e : list) {
      if (static_cast<index_t>(loads.size()) >= most) break;
      if (e == no_expert) continue;
      const auto key = static_cast<std::int32_t>(at_layer * options.experts + e);
      if (at(key).held) {
        ++hits;
        continue;
      }
      at(key).used_at = ++now;
      at(key).pass = pass;
      if (bring(key, true)) loads.push_back(key);
    }
  }
};

void agrees(const expert_cache& cache, cache_by_scans& scans,
            const expert_cache::step_result& got) {
  REQUIRE(got.hits == scans.hits);
  REQUIRE(std::vector<std::int32_t>(got.loads.begin(), got.loads.end()) == scans.loads);
  REQUIRE(std::vector<std::int32_t>(got.evictions.begin(), got.evictions.end()) == scans.evictions);
  REQUIRE(cache.held() == scans.used());
  index_t wrong = 0;
  for (std::int32_t key = 0; key < scans.keys(); ++key) {
    const index_t l = key / cache.experts();
    const auto e = static_cast<expert_id>(key % cache.experts());
    wrong += cache.resident(l).contains(e) != scans.at(key).held;
    wrong += cache.would_hit(e, l) != scans.at(key).held;
  }
  REQUIRE(wrong == 0);
}

void expect_same(expert_cache& cache, cache_by_scans& scans, const ids& list, index_t layer,
                 const std::vector<std::int64_t>& next = {}) {
  const auto got = cache.step(list, layer, next);
  scans.step(list, layer, next);
  agrees(cache, scans, got);
}

}  // namespace

TEST_CASE("a cache loads and evicts what plain scans do, layer by layer, with pins and sizes") {
  test::random rng(1);
  for (const cache_policy policy : {cache_policy::lru, cache_policy::lfu, cache_policy::fifo,
                                    cache_policy::least_stale, cache_policy::cost_aware})
    for (const index_t layers : {1, 3})
      for (const double decay : {1.0, 0.9})
        for (const bool sized : {false, true}) {
          constexpr index_t experts = 20;
          const std::vector<std::int32_t> pins = {3, 11, 3};
          std::vector<std::int64_t> bytes;
          for (index_t i = 0; sized && i < layers * experts; ++i) bytes.push_back(1 + rng.below(4));
          const expert_cache_options options{.experts = experts,
                                             .layers = layers,
                                             .capacity = sized ? 30 * layers : 9 * layers,
                                             .policy = policy,
                                             .pinned = pins,
                                             .bytes = bytes,
                                             .decay = decay};
          INFO(to_string(policy) << " layers " << layers << " decay " << decay << " " << sized);
          expert_cache cache(options);
          cache_by_scans scans(options);
          for (int t = 0; t < 200; ++t)
            for (index_t l = 0; l < layers; ++l)
              expect_same(cache, scans, step_of(rng, experts, 3), l);
          CHECK(cache.would_hit(3));
          CHECK(cache.would_hit(11));
        }
}

TEST_CASE("Belady evicts what is needed last") {
  test::random rng(2);
  constexpr index_t experts = 12, tokens = 150;
  std::vector<ids> trace;
  for (index_t t = 0; t < tokens; ++t) trace.push_back(step_of(rng, experts, 2));
  const expert_cache_options options{
      .experts = experts, .capacity = 5, .policy = cache_policy::belady};
  expert_cache cache(options);
  cache_by_scans scans(options);
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<std::int64_t> next;
    for (const expert_id e : trace[static_cast<std::size_t>(t)]) {
      index_t later = t + 1;
      const auto uses = [&](index_t at) {
        const ids& list = trace[static_cast<std::size_t>(at)];
        return std::find(list.begin(), list.end(), e) != list.end();
      };
      while (later < tokens && !uses(later)) ++later;
      next.push_back(later < tokens ? later : expert_cache::never);
    }
    expect_same(cache, scans, trace[static_cast<std::size_t>(t)], 0, next);
  }
}

TEST_CASE("segment evicts what is expected least, and nothing that is pinned, expected or not") {
  test::random rng(12);
  for (const index_t layers : {1, 2}) {
    const std::vector<std::int32_t> pins = {3, 11};
    const expert_cache_options options{.experts = 14,
                                       .layers = layers,
                                       .capacity = 6 * layers,
                                       .policy = cache_policy::segment,
                                       .pinned = pins};
    expert_cache cache(options);
    cache_by_scans scans(options);
    const auto expect = [&](expert_id e, index_t l, int more) {
      cache.expect(e, l, more);
      scans.at(static_cast<std::int32_t>(l * options.experts + e)).ahead += more;
    };
    expect(3, 0, 1);  // before anything else is there
    for (int t = 0; t < 200; ++t)
      for (index_t l = 0; l < layers; ++l) {
        for (int i = 0; i < 3; ++i)
          expect(static_cast<expert_id>(rng.below(14)), l, static_cast<int>(rng.below(4)) - 1);
        expect_same(cache, scans, step_of(rng, options.experts, 2), l);
      }
    for (const std::int32_t key : pins) CHECK(cache.would_hit(key));
  }
}

TEST_CASE("segmented: who was used twice outlives a stream of who was used once") {
  expert_cache cache({.experts = 100, .capacity = 8, .policy = cache_policy::segmented});
  for (int twice = 0; twice < 2; ++twice) cache.step(ids{0, 1, 2, 3});
  for (expert_id e = 10; e < 90; ++e) cache.step(ids{e});
  for (expert_id e = 0; e < 4; ++e) CHECK(cache.would_hit(e));
  expert_cache lru({.experts = 100, .capacity = 8});
  for (int twice = 0; twice < 2; ++twice) lru.step(ids{0, 1, 2, 3});
  for (expert_id e = 10; e < 90; ++e) lru.step(ids{e});
  CHECK(!lru.would_hit(0));
  // The protected half is full: the fifth that is used twice sends the first back.
  cache.step(ids{89});
  cache.step(ids{90, 91, 92, 93});
  CHECK(!cache.would_hit(0));
  CHECK(cache.would_hit(1));
}

TEST_CASE("segmented: as many outlive a stream as the protected share says, the last used twice") {
  for (const double share : {0.0, 0.25, 0.5, 0.8, 0.99}) {
    expert_cache cache({.experts = 60,
                        .capacity = 8,
                        .policy = cache_policy::segmented,
                        .protected_share = share});
    for (int twice = 0; twice < 2; ++twice) cache.step(ids{0, 1, 2, 3, 4, 5, 6, 7});
    for (expert_id e = 10; e < 50; ++e) cache.step(ids{e});
    const auto most = static_cast<expert_id>(share * 8.0);
    for (expert_id e = 0; e < 8; ++e) CHECK(cache.would_hit(e) == (e >= 8 - most));
  }
}

TEST_CASE(
    "hits and loads are all accesses; a cache for all loads each once; a relabelling relabels") {
  test::random rng(3);
  for (const cache_policy policy : live_policies) {
    constexpr index_t experts = 30;
    INFO(to_string(policy));
    expert_cache some({.experts = experts, .capacity = 7, .policy = policy, .decay = 0.95});
    expert_cache all({.experts = experts, .capacity = experts, .policy = policy});
    expert_cache other({.experts = experts, .capacity = 7, .policy = policy, .decay = 0.95});
    std::set<expert_id> used;
    index_t loads = 0;
    for (int t = 0; t < 300; ++t) {
      const ids list = step_of(rng, experts, 3);
      used.insert(list.begin(), list.end());
      ids mirrored;
      for (const expert_id e : list) mirrored.push_back(experts - 1 - e);
      const auto a = some.step(list);
      const auto b = other.step(mirrored);
      REQUIRE(a.hits + static_cast<index_t>(a.loads.size()) == 3);
      REQUIRE(a.hits == b.hits);
      REQUIRE(a.loads.size() == b.loads.size());
      for (std::size_t i = 0; i < a.evictions.size(); ++i)
        REQUIRE(a.evictions[i] == experts - 1 - b.evictions[i]);
      REQUIRE(some.held() <= 7);
      REQUIRE(some.resident().count() == some.held());
      for (const expert_id e : list) REQUIRE(some.would_hit(e));
      loads += static_cast<index_t>(all.step(list).loads.size());
    }
    CHECK(loads == static_cast<index_t>(used.size()));
  }
}

TEST_CASE("a step larger than the cache streams through it; what is named twice is read once") {
  for (const cache_policy policy : live_policies) {
    expert_cache cache({.experts = 10, .capacity = 3, .policy = policy});
    const auto first = cache.step(ids{0, 1, 2, 3, 4, 1, no_expert});
    CHECK(first.hits == 1);
    CHECK(first.loads.size() == 5);
    CHECK(first.evictions.size() == 2);
    CHECK(cache.held() == 3);
  }
  const std::vector<std::int32_t> pins = {7, 8};
  expert_cache full({.experts = 10, .capacity = 2, .pinned = pins});
  CHECK(full.step(ids{7, 1, 2}).loads.size() == 2);
  CHECK(full.step(ids{1, 8}).hits == 1);
  CHECK(full.held() == 2);
}

TEST_CASE("prefetched experts are there when asked for, and never push out what the step uses") {
  for (const cache_policy policy : live_policies) {
    INFO(to_string(policy));
    expert_cache cache({.experts = 16, .layers = 2, .capacity = 6, .policy = policy});
    cache.step(ids{0, 1, 2}, 0);
    const auto early = cache.prefetch(ids{5, 6, 7, 8}, 1, 3);
    CHECK(early.loads.size() == 3);
    CHECK(early.evictions.empty());
    CHECK(cache.prefetch(ids{5, 9, 10}, 1, 1).hits == 1);  // 5 is there; 9 comes for 6 or so
    for (expert_id e = 0; e < 3; ++e) CHECK(cache.would_hit(e, 0));
    CHECK(cache.step(ids{9}, 1).hits == 1);
  }
  // Nor one of a call for another of it; the next call and the next step may let them leave.
  for (const cache_policy policy : live_policies) {
    INFO(to_string(policy));
    expert_cache cache({.experts = 16, .capacity = 3, .policy = policy});
    cache.step(ids{0});
    CHECK(cache.prefetch(ids{4, 5, 6}, 0, 3).loads.size() == 2);
    CHECK((cache.would_hit(0) && cache.would_hit(4) && cache.would_hit(5)));
    CHECK(cache.prefetch(ids{7, 8}, 0, 2).evictions.size() == 2);
    CHECK((cache.would_hit(0) && cache.would_hit(7) && cache.would_hit(8)));
    CHECK(cache.step(ids{1, 2, 3}).evictions.size() == 3);
  }
  expert_cache tight({.experts = 16, .capacity = 3});
  tight.step(ids{0, 1, 2});
  CHECK(tight.prefetch(ids{4}, 0, 1).loads.empty());
  expert_cache roomy({.experts = 16, .capacity = 12});
  CHECK(roomy.prefetch(ids{5, 6, 7, 8}, 0, 3).loads.size() == 3);
  CHECK(roomy.prefetch(ids{9}, 0, 0).loads.empty());
}

TEST_CASE("a profile is the uses of a run; the hottest are pinned; text comes back as it was") {
  expert_cache cache({.experts = 4, .layers = 2, .capacity = 3});
  for (int t = 0; t < 3; ++t) {
    cache.step(ids{2, 1}, 0);
    cache.step(ids{3}, 1);
  }
  cache.step(ids{2, 0}, 0);
  expert_profile profile{.layers = 2, .experts = 4, .uses = std::vector<std::int64_t>(8)};
  cache.uses(profile.uses);
  CHECK(profile.uses == std::vector<std::int64_t>{1, 3, 4, 0, 0, 0, 0, 3});
  CHECK(hot_keys(profile, 3) == std::vector<std::int32_t>{2, 1, 7});
  CHECK(hot_keys(profile, 8).size() == 8);
  for (const index_t n : {-1, 9})
    CHECK(test::refusal([&] { hot_keys(profile, n); }) ==
          "moeroute::hot_keys: n is " + std::to_string(n) + ", expected 0 to 8");
  CHECK(test::refusal([] { hot_keys({.layers = 2, .experts = 2, .uses = {1, 2, 3}}, 1); }) ==
        "moeroute::hot_keys: uses.size() is 3, expected 4");
  CHECK(to_string(profile) == "expert_profile v1 2 4\n1 3 4 0\n0 0 0 3\n");
  const expert_profile back = parse_expert_profile(to_string(profile));
  CHECK(back.layers == 2);
  CHECK(back.experts == 4);
  CHECK(back.uses == profile.uses);
  const auto refused = [](const char* text) {
    return test::refusal([&] { parse_expert_profile(text); });
  };
  CHECK(refused("") == "moeroute::parse_expert_profile: line 1: expected another line that ends");
  CHECK(refused("profile\n") ==
        "moeroute::parse_expert_profile: line 1: expected 'expert_profile v1 LAYERS EXPERTS'");
  CHECK(refused("expert_profile v1 2 2\n1 2\n") ==
        "moeroute::parse_expert_profile: line 3: expected another line that ends");
  CHECK(refused("expert_profile v1 1 2\n1 x\n") ==
        "moeroute::parse_expert_profile: line 2: expected counts from 0 on");
  CHECK(refused("expert_profile v1 1 2\n1 2 3\n") ==
        "moeroute::parse_expert_profile: line 2: expected 2 counts");
  CHECK(refused("expert_profile v1 1 2\n1 2\n5\n") ==
        "moeroute::parse_expert_profile: line 3: expected the end");
  const std::string counted = "counts from 0 on";
  for (const char* sizes : {"0 2", "2 0", "1 1048577", "1 2 3", "1", "-1 2"})
    CHECK(refused(("expert_profile v1 " + std::string(sizes) + "\n1 2\n").c_str()) ==
          "moeroute::parse_expert_profile: line 1: expected " +
              (sizes == std::string("1") || sizes == std::string("-1 2")
                   ? counted
                   : "'expert_profile v1 LAYERS EXPERTS'"));
  for (const char* counts : {"1 -2", "1 99999999999999999999", " 1 2", "1,2", "1"})
    CHECK(refused(("expert_profile v1 1 2\n" + std::string(counts) + "\n").c_str()) ==
          "moeroute::parse_expert_profile: line 2: expected " + counted);
  CHECK(refused("expert_profile v1 2 1\n9223372036854775807\n0\n") == "accepted");
  CHECK(refused("expert_profile v1 1 1048576\n1 2\n") ==
        "moeroute::parse_expert_profile: line 2: expected counts from 0 on");
  // Lines that end as on Windows, and one that ends twice.
  CHECK(parse_expert_profile("expert_profile v1 2 2\r\n1 2\r\n3 4\r\n").uses ==
        std::vector<std::int64_t>{1, 2, 3, 4});
  CHECK(refused("expert_profile v1 1 2\n1 2\r\r\n") ==
        "moeroute::parse_expert_profile: line 2: expected 2 counts");
  // The lowest among equals, beyond one layer.
  const expert_profile even{.layers = 3, .experts = 2, .uses = {1, 5, 5, 1, 5, 0}};
  CHECK(hot_keys(even, 4) == std::vector<std::int32_t>{1, 2, 4, 0});
  CHECK(hot_keys(even, 0).empty());
  CHECK((hot_keys({}, 0).empty() && expert_profile{}.layers == 0 && expert_profile{}.experts == 0));
  CHECK((even.layer(1)[0] == 5 && even.layer(2)[1] == 0 && even.layer(1).size() == 2));
}

TEST_CASE("a prefetch that is refused brings nobody in, and nobody leaves for who can never fit") {
  expert_cache cache({.experts = 8, .capacity = 4});
  CHECK(test::refusal([&] { cache.prefetch(ids{3, 99}, 0, 2); }) ==
        "moeroute::expert_cache: expert is 99, expected 0 to 7");
  CHECK(cache.held() == 0);
  // Of 100 bytes 60 are pinned: an expert of 50 has no room, whoever leaves.
  const std::vector<std::int64_t> bytes = {60, 20, 20, 50};
  const std::vector<std::int32_t> pins = {0};
  expert_cache tight({.experts = 4, .capacity = 100, .pinned = pins, .bytes = bytes});
  tight.step(ids{1, 2});
  CHECK(tight.prefetch(ids{3}, 0, 1).evictions.empty());
  CHECK(tight.step(ids{3}).evictions.empty());
  CHECK(tight.step(ids{1, 2}).hits == 2);
  // Of two that may leave and one that the step uses, none does for an expert as large as all
  // three.
  const std::vector<std::int64_t> sizes = {30, 30, 40, 90};
  expert_cache busy({.experts = 4, .capacity = 100, .bytes = sizes});
  busy.step(ids{0, 1});
  busy.step(ids{2});
  CHECK(busy.prefetch(ids{3}, 0, 1).evictions.empty());
  CHECK(busy.held() == 100);
}

TEST_CASE("a cache that cannot be is refused by name") {
  const auto refused = [](const expert_cache_options& options) {
    return test::refusal([&] { expert_cache cache(options); });
  };
  CHECK(refused({.experts = 8, .capacity = 0}) ==
        "moeroute::expert_cache: capacity is 0, expected 1 to 8");
  CHECK(refused({.experts = 8, .layers = 2, .capacity = 17}) ==
        "moeroute::expert_cache: capacity is 17, expected 1 to 16");
  for (const index_t experts : {index_t{-1}, index_t{0}, max_experts + 1})
    CHECK(refused({.experts = experts, .capacity = 1}) == "moeroute::expert_cache: experts is " +
                                                              std::to_string(experts) +
                                                              ", expected 1 to 1048576");
  const std::vector<std::int64_t> of_two = {10, 3};
  CHECK(refused({.experts = 2, .capacity = 9, .bytes = of_two}) ==
        "moeroute::expert_cache: capacity is 9, expected 10 to 13");
  CHECK(refused({.experts = 2, .capacity = 14, .bytes = of_two}) ==
        "moeroute::expert_cache: capacity is 14, expected 10 to 13");
  for (const index_t capacity : {10, 13})
    CHECK(refused({.experts = 2, .capacity = capacity, .bytes = of_two}) == "accepted");
  const std::vector<std::int32_t> pins = {0, 1, 2}, outside = {8};
  CHECK(refused({.experts = 8, .capacity = 2, .pinned = pins}) ==
        "moeroute::expert_cache: the size of what is pinned is 3, expected at most 2");
  CHECK(refused({.experts = 8, .capacity = 2, .pinned = outside}) ==
        "moeroute::expert_cache: pinned is 8, expected 0 to 7");
  const std::vector<std::int64_t> bytes = {5, 0};
  CHECK(refused({.experts = 2, .capacity = 2, .bytes = bytes}) ==
        "moeroute::expert_cache: bytes is 0, expected above 0");
  const std::vector<std::int64_t> huge = {expert_cache::never, 1};
  CHECK(refused({.experts = 2, .capacity = 2, .bytes = huge}) ==
        "moeroute::expert_cache: the sum of bytes is beyond 64 bits, expected less");
  for (const double decay : {0.0, 1.5})
    CHECK(refused({.experts = 2, .decay = decay}) == "moeroute::expert_cache: decay is " +
                                                         std::to_string(decay) +
                                                         ", expected above 0, at most 1");
  expert_cache cache({.experts = 8, .capacity = 2});
  CHECK(test::refusal([&] { cache.step(ids{8}); }) ==
        "moeroute::expert_cache: expert is 8, expected 0 to 7");
  // A step is taken as a whole or not at all: the next one evicts what is the longest unused.
  cache.step(ids{3, 4});
  CHECK(test::refusal([&] { cache.step(ids{3, -2}); }) ==
        "moeroute::expert_cache: expert is -2, expected 0 to 7");
  CHECK(cache.prefetch(ids{6}, 0, 1).loads.empty());  // what the last step used is there to stay
  const auto after = cache.step(ids{5});
  CHECK(after.hits == 0);
  CHECK(std::vector<std::int32_t>(after.evictions.begin(), after.evictions.end()) ==
        std::vector<std::int32_t>{3});
  CHECK(test::refusal([&] { cache.step(ids{0}, 1); }) ==
        "moeroute::expert_cache: layer is 1, expected 0 to 0");
  expert_cache foresees({.experts = 8, .capacity = 2, .policy = cache_policy::belady});
  CHECK(test::refusal([&] { foresees.step(ids{0}); }) ==
        "moeroute::expert_cache: next.size() is 0, expected 1");
}

TEST_CASE("what an earlier prefetch brought gives way to a later one, what was used does not") {
  for (const cache_policy policy : live_policies) {
    expert_cache cache({.experts = 6, .capacity = 2, .policy = policy});
    const std::vector<expert_id> used{0}, early{1}, later{2}, last{3, 4};
    cache.step(used);
    CHECK(cache.prefetch(early, 0, 1).loads.size() == 1);
    const auto found = cache.prefetch(later, 0, 1);
    CHECK(std::vector(found.loads.begin(), found.loads.end()) == std::vector<std::int32_t>{2});
    CHECK(std::vector(found.evictions.begin(), found.evictions.end()) ==
          std::vector<std::int32_t>{1});
    CHECK(cache.would_hit(0));
    CHECK(cache.prefetch(last, 0, 2).loads.size() == 1);  // nor one of them for another
  }
}

TEST_CASE("a step is refused by the id that is wrong, behind ids of nobody") {
  expert_cache cache({.experts = 6, .capacity = 2});
  for (const expert_id wrong : {-2, 6}) {
    const std::vector<expert_id> list{no_expert, 5, 0, wrong};
    CHECK(test::refusal([&] { cache.step(list); }) ==
          "moeroute::expert_cache: expert is " + std::to_string(wrong) + ", expected 0 to 5");
    CHECK(test::refusal([&] { cache.prefetch(list, 0, 1); }) ==
          "moeroute::expert_cache: expert is " + std::to_string(wrong) + ", expected 0 to 5");
  }
  CHECK(cache.held() == 0);
}

TEST_CASE("a cache of any options is its scans, whatever is asked of it in whatever order") {
  test::random rng(77);
  const cache_policy policies[] = {cache_policy::lru,         cache_policy::lfu,
                                   cache_policy::fifo,        cache_policy::segmented,
                                   cache_policy::least_stale, cache_policy::cost_aware,
                                   cache_policy::segment,     cache_policy::belady};
  const double decays[] = {1.0, 0.9, 0.5}, shares[] = {0.0, 0.3, 0.5, 0.9};
  for (const cache_policy policy : policies)
    for (int draw = 0; draw < 60; ++draw) {
      const index_t experts = 2 + rng.below(9), layers = 1 + rng.below(3);
      std::vector<std::int64_t> bytes;
      if (rng.below(2) == 0)
        for (index_t i = 0; i < layers * experts; ++i) bytes.push_back(1 + rng.below(5));
      const auto size = [&](std::size_t key) { return bytes.empty() ? 1 : bytes[key]; };
      std::int64_t all = 0, largest = 1;
      for (std::size_t key = 0; key < static_cast<std::size_t>(layers * experts); ++key) {
        all += size(key);
        largest = std::max(largest, size(key));
      }
      std::vector<std::int32_t> pins;
      std::int64_t pinned = 0;
      for (index_t n = rng.below(4); n > 0 && policy != cache_policy::belady; --n) {
        const auto key = static_cast<std::int32_t>(rng.below(layers * experts));
        if (std::find(pins.begin(), pins.end(), key) == pins.end())
          pinned += size(static_cast<std::size_t>(key));
        pins.push_back(key);
      }
      const std::int64_t least = std::max(largest, pinned);
      const expert_cache_options options{.experts = experts,
                                         .layers = layers,
                                         .capacity = least + rng.below((all - least) / 2 + 1),
                                         .policy = policy,
                                         .pinned = pins,
                                         .bytes = bytes,
                                         .decay = decays[rng.below(3)],
                                         .protected_share = shares[rng.below(4)]};
      INFO(to_string(policy) << ", draw " << draw);
      expert_cache cache(options);
      cache_by_scans scans(options);
      index_t layer = 0;
      for (int call = 0; call < 80; ++call) {
        INFO("call " << call);
        layer = rng.below(4) == 0 ? rng.below(layers) : (layer + 1) % layers;
        ids list;
        for (index_t n = rng.below(rng.below(3) == 0 ? experts + 3 : 4); n > 0; --n)
          list.push_back(static_cast<expert_id>(rng.below(9) == 0 ? -1 : rng.below(experts)));
        const index_t what = rng.below(10);
        if (what < 6) {
          std::vector<std::int64_t> next;
          for (std::size_t i = 0; i < list.size(); ++i)
            next.push_back(rng.below(4) == 0 ? expert_cache::never : call + rng.below(9));
          if (policy != cache_policy::belady) next.clear();
          expect_same(cache, scans, list, layer, next);
        } else if (what < 8) {
          const index_t most = rng.below(4);
          const auto got = cache.prefetch(list, layer, most);
          scans.prefetch(list, layer, most);
          agrees(cache, scans, got);
        } else if (what == 8) {
          for (const expert_id e : list) {
            if (e == no_expert) continue;
            const int more = static_cast<int>(rng.below(5)) - 2;
            cache.expect(e, layer, more);
            scans.at(static_cast<std::int32_t>(layer * experts + e)).ahead += more;
          }
        } else {
          // A copy goes on as the cache itself, and without it.
          const expert_cache copy(cache);
          CHECK_THROWS(cache.step(ids{static_cast<expert_id>(experts)}, layer));
          CHECK_THROWS(cache.prefetch(ids{0, -2}, layer, 2));
          if (rng.below(2) == 0) cache = copy;
        }
      }
      std::vector<std::int64_t> uses(scans.lines.size());
      cache.uses(uses);
      for (std::size_t key = 0; key < uses.size(); ++key)
        CHECK(uses[key] == scans.lines[key].total);
    }
}

TEST_CASE("a set of residents is a flag for every expert") {
  test::random rng(5);
  for (const index_t experts : {1, 63, 64, 65, 127, 128, 129, 200}) {
    resident_set set(experts);
    std::vector<bool> flag(static_cast<std::size_t>(experts));
    index_t wrong = set.experts() != experts || set.count() != 0;
    for (int step = 0; step < 300; ++step) {
      const auto e = static_cast<expert_id>(rng.below(experts));
      const bool in = rng.below(5) < (step < 150 ? 4 : 1);  // nearly all of them, then few
      in ? set.insert(e) : set.erase(e);
      flag[static_cast<std::size_t>(e)] = in;
      std::vector<expert_id> expected, seen;
      for (index_t i = 0; i < experts; ++i) {
        const auto id = static_cast<expert_id>(i);
        if (flag[static_cast<std::size_t>(i)]) expected.push_back(id);
        wrong += set.contains(id) != flag[static_cast<std::size_t>(i)];
      }
      const resident_view view = set;
      for_each_resident(view, [&](expert_id id) {
        if (std::ssize(seen) == experts) FAIL("more than there are");
        seen.push_back(id);
      });
      wrong += seen != expected || set.count() != static_cast<index_t>(expected.size());
      wrong += view.experts != experts || view.count() != set.count() || !(view.contains(e) == in);
    }
    INFO(experts << " experts");
    CHECK(wrong == 0);
    set.insert(static_cast<expert_id>(experts - 1));
    set.clear();
    CHECK((set.count() == 0 && set.experts() == experts));
  }
  CHECK((resident_view::words_of(0) == 0 && resident_view::words_of(1) == 1 &&
         resident_view::words_of(64) == 1 && resident_view::words_of(65) == 2));
  CHECK((resident_set().experts() == 0 && resident_set().count() == 0));
  CHECK((resident_view{}.words == nullptr && resident_view{}.experts == 0));
  const auto sized = [](index_t experts) {
    return test::refusal([&] { const resident_set set(experts); });
  };
  CHECK(sized(0) == "moeroute::resident_set: experts is 0, expected 1 to 1048576");
  CHECK(sized(1048577) == "moeroute::resident_set: experts is 1048577, expected 1 to 1048576");
  CHECK(sized(1048576) == "accepted");
  resident_set three(3);
  for (const bool in : {true, false})
    for (const expert_id e : {-1, 3})
      CHECK(test::refusal([&] { in ? three.insert(e) : three.erase(e); }) ==
            "moeroute::resident_set: expert is " + std::to_string(e) + ", expected 0 to 2");
}

TEST_CASE("a cache says its sizes, and refuses whatever is no layer, expert, share or size") {
  const expert_cache_options plain;
  CHECK((plain.experts == 1 && plain.layers == 1 && plain.capacity == 1 && plain.decay == 1.0 &&
         plain.protected_share == 0.5 && plain.policy == cache_policy::lru));
  std::string names;
  for (int policy = 0; policy < 9; ++policy)
    names += std::string(to_string(static_cast<cache_policy>(policy))) + " ";
  CHECK(names == "lru lfu fifo segmented least_stale cost_aware segment belady ? ");
  const auto said = [](const auto& call) {
    const std::string text = test::refusal(call), front = "moeroute::expert_cache: ";
    return text.starts_with(front) ? text.substr(front.size()) : text;
  };
  const auto made = [&](const expert_cache_options& o) {
    return said([&] { expert_cache cache(o); });
  };
  CHECK(made({.layers = 0}) == "layers is 0, expected 1 to 2147483647");
  CHECK(made({.experts = max_experts, .layers = 2048}) == "layers is 2048, expected 1 to 2047");
  const std::vector<std::int32_t> before{-1}, both{0, 1};
  CHECK(made({.experts = 2, .pinned = before}) == "pinned is -1, expected 0 to 1");
  CHECK(made({.experts = 2, .capacity = 2, .pinned = both}) == "accepted");
  const std::vector<std::int64_t> three{1, 1, 1}, negative{1, -1}, most{expert_cache::never - 1, 1};
  CHECK(made({.experts = 2, .bytes = three}) == "bytes.size() is 3, expected 2");
  CHECK(made({.experts = 2, .bytes = negative}) == "bytes is -1, expected above 0");
  CHECK(made({.experts = 2, .capacity = expert_cache::never, .bytes = most}) == "accepted");
  const double nan = std::nan("");
  CHECK(made({.decay = nan}) == "decay is nan, expected above 0, at most 1");
  CHECK(made({.decay = -0.5}) == "decay is -0.500000, expected above 0, at most 1");
  CHECK(made({.decay = 1.0625}) == "decay is 1.062500, expected above 0, at most 1");
  CHECK(made({.protected_share = -0.25}) == "protected_share is -0.250000, expected 0 to below 1");
  CHECK(made({.protected_share = 1.0}) == "protected_share is 1.000000, expected 0 to below 1");
  CHECK(made({.protected_share = nan}) == "protected_share is nan, expected 0 to below 1");
  CHECK(made({}) == "accepted");

  const std::vector<std::int32_t> pins{5, 5};
  for (const cache_policy policy : {cache_policy::lfu, cache_policy::fifo}) {
    expert_cache cache(
        {.experts = 3, .layers = 2, .capacity = 4, .policy = policy, .pinned = pins});
    CHECK((cache.experts() == 3 && cache.layers() == 2 && cache.keys() == 6 &&
           cache.capacity() == 4 && cache.policy() == policy && cache.held() == 1));
    CHECK((cache.resident(1).contains(2) && !cache.resident().contains(2) &&
           cache.would_hit(2, 1) && !cache.would_hit(2)));
    for (const index_t layer : {-1, 2}) {
      const std::string expected = "layer is " + std::to_string(layer) + ", expected 0 to 1";
      CHECK(said([&] { cache.resident(layer); }) == expected);
      CHECK(said([&] { (void)cache.would_hit(0, layer); }) == expected);
      CHECK(said([&] { cache.step(ids{0}, layer); }) == expected);
      CHECK(said([&] { cache.prefetch(ids{0}, layer, 1); }) == expected);
      CHECK(said([&] { cache.expect(0, layer, 1); }) == expected);
    }
    for (const expert_id e : {-1, 3}) {
      const std::string expected = "expert is " + std::to_string(e) + ", expected 0 to 2";
      CHECK(said([&] { (void)cache.would_hit(e); }) == expected);
      CHECK(said([&] { cache.expect(e, 0, 1); }) == expected);
    }
    std::vector<std::int64_t> five(5);
    CHECK(said([&] { cache.uses(five); }) == "out.size() is 5, expected 6");
    CHECK(cache.prefetch(ids{0}, 0, -1).loads.empty());
  }
  // All of a layer is missing, and one of it named again.
  expert_cache one({.experts = 3, .capacity = 1});
  const auto got = one.step(ids{2, 0, 1, 0});
  CHECK((got.loads.size() == 3 && got.hits == 1 && got.evictions.size() == 2));
}
