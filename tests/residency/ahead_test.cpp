#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/residency/prefetcher.hpp>
#include <moeroute/residency/pregate.hpp>
#include <moeroute/residency/regroup.hpp>
#include <numeric>
#include <set>
#include <vector>

#include "support/assignments.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace ahead_test {

using namespace moeroute;

namespace {

using ids = std::vector<expert_id>;

template <class P>
ids guesses(P& p, index_t layer, std::size_t n) {
  ids out(n, -7);
  out.resize(static_cast<std::size_t>(p.rank(layer, out)));
  return out;
}

// Knows what is asked for.
struct oracle_predictor {
  const std::vector<ids>* future;
  std::size_t at = 0;
  index_t rank(index_t, std::span<expert_id> out) {
    if (at >= future->size()) return 0;
    const ids& list = (*future)[at];
    std::copy(list.begin(), list.end(), out.begin());
    return static_cast<index_t>(list.size());
  }
  void saw(index_t, std::span<const expert_id>) { ++at; }
};

// Knows which one of 48 in turn is next, and then names others that nobody asks for.
struct cyclic_predictor {
  index_t ahead;
  index_t seen = 0, wrong = 0;
  index_t rank(index_t, std::span<expert_id> out) {
    out[0] = static_cast<expert_id>((seen - 1 + ahead) % 48);
    for (std::size_t i = 1; i < 3; ++i) out[i] = static_cast<expert_id>(48 + wrong++ % 16);
    return 3;
  }
  void saw(index_t, std::span<const expert_id>) { ++seen; }
};

// Is always wrong: what nobody asks for.
struct wrong_predictor {
  expert_id next = 20;
  index_t rank(index_t, std::span<expert_id> out) {
    out[0] = next = next == 31 ? 20 : next + 1;
    return 1;
  }
  void saw(index_t, std::span<const expert_id>) {}
};

}  // namespace

TEST_CASE("predictors rank what their name says, best first, the lowest among equals") {
  last_predictor last(2, 8);
  CHECK(guesses(last, 0, 4).empty());
  last.saw(0, ids{5, 2, no_expert});
  last.saw(1, ids{7});
  CHECK(guesses(last, 0, 4) == ids{5, 2});
  CHECK(guesses(last, 0, 1) == ids{5});
  CHECK(guesses(last, 1, 4) == ids{7});

  popularity_predictor popular(1, 8, 0.5);
  popular.saw(0, ids{3, 1});
  popular.saw(0, ids{6});
  CHECK(guesses(popular, 0, 8) == ids{6, 1, 3});
  popular.saw(0, ids{3});
  CHECK(guesses(popular, 0, 2) == ids{3, 6});  // 1.25 against 0.5

  transition_predictor after(3, 4);
  for (int i = 0; i < 3; ++i) {
    after.saw(0, ids{0, 1});
    after.saw(1, ids{i == 2 ? 2 : 3});
    after.saw(2, ids{0});
  }
  CHECK(guesses(after, 0, 4).empty());
  after.saw(0, ids{1});
  CHECK(guesses(after, 1, 4) == ids{3, 2});
  CHECK(after.after(0, 1)[3] == 2);
  CHECK(guesses(after, 2, 4).empty());  // layer 1 has not been seen yet
  transition_predictor skips(3, 4);     // layers that do not follow one another say nothing
  skips.saw(0, ids{0});
  skips.saw(2, ids{3});
  skips.saw(1, ids{2});
  for (const index_t layer : {0, 1})
    for (const std::int32_t n : skips.after(layer, 0)) CHECK(n == 0);
  CHECK(skips.after(0, 3)[2] == 0);

  test::random rng(1);
  std::vector<float> w(6 * 5), x(5);
  for (float& v : w) v = rng.normal();
  for (float& v : x) v = rng.normal();
  const simd::packed_matrix<> gate(matrix_view<const float>(w.data(), 6, 5));
  const simd::packed_matrix<>* const gates[] = {&gate};
  gate_predictor by_gate(gates);
  CHECK(guesses(by_gate, 0, 3).empty());
  by_gate.hidden(x);
  std::vector<std::pair<float, expert_id>> order;
  for (expert_id e = 0; e < 6; ++e) {
    float z = 0;
    for (std::size_t i = 0; i < 5; ++i) z += w[static_cast<std::size_t>(e) * 5 + i] * x[i];
    order.emplace_back(-z, e);
  }
  std::sort(order.begin(), order.end());
  CHECK(guesses(by_gate, 0, 2) == ids{order[0].second, order[1].second});
  CHECK(guesses(by_gate, 0, 9).size() == 6);
  by_gate.hidden(std::span(x).first(4));
  CHECK(test::refusal([&] { guesses(by_gate, 0, 2); }) ==
        "moeroute::gate_predictor: hidden.size() is 4, expected 5");
  CHECK(test::refusal([&] { guesses(by_gate, 1, 2); }) ==
        "moeroute::gate_predictor: layer is 1, expected 0 to 0");

  transition_predictor single(1, 4);  // of one layer nobody comes before
  single.saw(0, ids{1});
  CHECK(guesses(single, 0, 4).empty());

  const prefetch_options usual;
  CHECK(
      (usual.per_layer == 1 && usual.ahead == 1 && usual.most_per_use == 2.0 && usual.trial == 64));
  // Lately is 0.99: after 69 steps half.
  popularity_predictor lately(1, 2), said(1, 2, 0.99);
  for (popularity_predictor* one : {&lately, &said}) {
    one->saw(0, ids{1});
    one->saw(0, ids{1});
    for (int i = 0; i < 69; ++i) one->saw(0, ids{});
    one->saw(0, ids{0});
  }
  CHECK(guesses(lately, 0, 2) == guesses(said, 0, 2));
  CHECK(guesses(lately, 0, 2) == ids{0, 1});
  CHECK(two_choice_table(9).places_of(7) == two_choice_table(9, 0).places_of(7));
  two_choice_table single_place(1);
  CHECK((single_place.add(3, 2.5) == 0 && single_place.add(4) == 0));
  CHECK(single_place.load()[0] == 3.5);

  CHECK(recall_meter{}.recall() == 0.0);
  CHECK(prefetch_counts{}.per_use() == 0.0);
  CHECK(prefetch_counts{.prefetched = 6}.per_use() == 6.0);
  CHECK(prefetch_counts{.prefetched = 6, .useful = 4}.per_use() == 1.5);
  recall_meter recall;
  recall.add(ids{1, 2, 3}, ids{3, 4, no_expert});
  CHECK(recall.recall() == 0.5);
  recall.add(ids{0, 1}, ids{0, 1, 5, 6, 7, 8});  // a share of what was asked for in all
  CHECK(recall.asked() == 8);
  CHECK(recall.recall() == 0.375);
}

TEST_CASE("who knows the future loads nothing on demand; its loads are used and none is wasted") {
  test::random rng(2);
  constexpr index_t layers = 3, experts = 32;
  std::vector<ids> steps;
  for (int s = 0; s < 240; ++s) {
    const assignment a = test::fixed_choices(rng, 1, experts, 3);
    steps.emplace_back(a.ids().begin(), a.ids().end());
  }
  expert_cache cache({.experts = experts, .layers = layers, .capacity = 12});
  prefetcher ahead(cache, oracle_predictor{&steps}, {.per_layer = 3});
  std::int64_t demanded = 0;
  for (std::size_t s = 0; s < steps.size(); ++s) {
    const auto found = ahead.step(static_cast<index_t>(s) % layers, steps[s]);
    if (s > 0) demanded += static_cast<std::int64_t>(found.loads.size());
    REQUIRE(ahead.ahead().size() <= 3);
    REQUIRE(cache.held() <= 12);
  }
  CHECK(demanded == 0);
  CHECK(ahead.counts().wasted == 0);
  CHECK(ahead.counts().layers_early == ahead.counts().useful);  // one layer ahead each
  CHECK(!ahead.stopped());
  CHECK(ahead.counts().tokens == 80);
}

TEST_CASE("a prefetcher prepares the layer that is so many ahead, in the next pass too") {
  expert_cache cache({.experts = 8, .layers = 3, .capacity = 3});
  prefetcher two(cache, last_predictor(3, 8), {.ahead = 2});
  two.step(2, ids{7});
  two.step(1, ids{1, 2, 3});
  CHECK(two.ahead().empty());  // layer 0 has not been seen
  two.step(0, ids{1});
  CHECK(std::vector(two.ahead().begin(), two.ahead().end()) ==
        std::vector<std::int32_t>{2 * 8 + 7});
}

TEST_CASE("a prefetcher stops above its own share of useless loads, after its own trial") {
  struct row {
    index_t per_layer, ahead;
    double most;
    std::int64_t trial;
    std::int64_t stops_at;  // 0: never
  };
  for (const row& r : {row{3, 1, 3.0, 1, 0}, row{3, 1, 2.9, 30, 30}, row{3, 1, 2.9, 90, 90},
                       row{2, 1, 1.9, 20, 20}, row{2, 1, 2.0, 20, 0}, row{1, 1, 1.0, 1, 0},
                       row{1, 2, 2.0, 1, 0}, row{0, 1, 1.0, 0, 0}}) {
    INFO(r.per_layer << " per layer, " << r.most << " per use, trial " << r.trial);
    expert_cache cache({.experts = 64, .layers = 3, .capacity = 16});
    prefetcher ahead(cache, cyclic_predictor{r.ahead}, {r.per_layer, r.ahead, r.most, r.trial});
    constexpr index_t steps = 200;
    for (index_t s = 0; s < steps; ++s) ahead.step(s % 3, ids{static_cast<expert_id>(s % 48)});
    const prefetch_counts& n = ahead.counts();
    CHECK(ahead.stopped() == (r.stops_at > 0));
    const std::int64_t brought = r.stops_at > 0 ? r.stops_at : steps * r.per_layer;
    CHECK(n.prefetched == brought);
    const std::int64_t useful = r.per_layer == 0 ? 0
                                : r.stops_at > 0 ? brought / r.per_layer
                                                 : steps - r.ahead;
    CHECK(n.useful == useful);
    CHECK(n.layers_early == r.ahead * useful);
    CHECK(n.loads == steps - useful);
    CHECK(n.tokens == 67);
  }
}

TEST_CASE("a prefetcher whose loads are for nothing stops, and demand loads go on as without it") {
  test::random rng(3);
  expert_cache cache({.experts = 32, .capacity = 8}), alone({.experts = 32, .capacity = 8});
  prefetcher ahead(cache, wrong_predictor{}, {.most_per_use = 2.0, .trial = 10});
  std::int64_t with = 0, without = 0;
  for (int t = 0; t < 400; ++t) {
    const assignment a = test::fixed_choices(rng, 1, 20, 3);
    with += static_cast<std::int64_t>(ahead.step(0, a.ids()).loads.size());
    without += static_cast<std::int64_t>(alone.step(a.ids()).loads.size());
  }
  CHECK(ahead.stopped());
  CHECK(ahead.counts().prefetched == 10);
  CHECK(ahead.counts().useful == 0);
  CHECK(ahead.counts().wasted == 10);
  CHECK(ahead.counts().loads == with);
  CHECK(ahead.counts().tokens == 400);
  CHECK(with - without < 30);
}

TEST_CASE("regrouped requests read no more experts, topical ones far fewer, and none is lost") {
  test::random rng(4);
  for (const index_t batch : {1, 2, 7, 16, 100}) {
    const assignment sets = test::fixed_choices(rng, 60, 90, 4, 5, 1.0);
    std::vector<std::int32_t> given(60);
    std::iota(given.begin(), given.end(), 0);
    auto order = regroup(sets, batch);
    CHECK(distinct_experts(sets, order, batch) <= distinct_experts(sets, given, batch));
    if (batch == 1 || batch == 100) CHECK(order == given);  // no order is better
    std::sort(order.begin(), order.end());
    CHECK(order == given);
  }
  // Eight topics of eight experts each, tokens of all topics mixed.
  assignment topical;
  topical.reset(512, 64, 4);
  for (index_t t = 0; t < 512; ++t) {
    const auto topic = static_cast<expert_id>(rng.below(8));
    ids list(8);
    std::iota(list.begin(), list.end(), 8 * topic);
    for (std::size_t r = 0; r < 4; ++r) {
      std::swap(list[r],
                list[r + static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(8 - r)))]);
      topical.ids()[static_cast<std::size_t>(t * 4) + r] = list[r];
    }
  }
  std::vector<std::int32_t> given(512);
  std::iota(given.begin(), given.end(), 0);
  const double before = double(distinct_experts(topical, given, 16)) / 32;
  const double after = double(distinct_experts(topical, regroup(topical, 16), 16)) / 32;
  CHECK(before > 40);
  CHECK(after < 14);
  CHECK(regroup(test::fixed_choices(rng, 0, 4, 1), 4).empty());
}

TEST_CASE("of requests that add as many experts the first is taken") {
  const expert_id used[] = {0, 1, 2, 3, 4, 5, 1, 0, 6, 7, 8, 9};
  assignment sets;
  sets.reset(6, 10, 2);
  std::copy(used, used + 12, sets.ids().begin());
  CHECK(regroup(sets, 2) == std::vector<std::int32_t>{0, 3, 1, 2, 4, 5});
}

TEST_CASE("two choices level a Zipf load; a key has its two places for good") {
  double one[64] = {};
  two_choice_table two(64, 5);
  test::random rng(5);
  for (int i = 0; i < 20000; ++i) {
    // Requests of a thousand prefixes by Zipf's law.
    const auto key = static_cast<std::uint64_t>(std::exp(double(rng.uniform()) * std::log(1000.0)));
    const auto places = two.places_of(key);
    CHECK_FALSE(
        (places.first < 0 || places.first >= 64 || places.second < 0 || places.second >= 64));
    one[places.first] += 1;
    const bool lighter = two.load()[static_cast<std::size_t>(places.second)] <
                         two.load()[static_cast<std::size_t>(places.first)];
    REQUIRE(two.add(key) == (lighter ? places.second : places.first));
  }
  const double mean = 20000.0 / 64;
  const double most_one = *std::max_element(one, one + 64) / mean;
  const double most_two = *std::max_element(two.load().begin(), two.load().end()) / mean;
  CHECK(most_two < 0.65 * most_one);
  CHECK(std::accumulate(two.load().begin(), two.load().end(), 0.0) == 20000);
}

TEST_CASE(
    "layers that are decided ahead load least: never more than any live cache on the same steps") {
  test::random rng(6);
  constexpr index_t experts = 24, tokens = 96;
  std::vector<assignment> layers;
  for (int l = 0; l < 3; ++l)
    layers.push_back(test::fixed_choices(rng, tokens, experts, 3, 0, 1.0));
  for (const index_t batch : {1, 4}) {
    const pregated_loads best = pregate(layers, batch, {.capacity = 40});
    CHECK(best.hits + static_cast<index_t>(best.keys.size()) == best.accesses);
    CHECK(static_cast<index_t>(best.first.size()) == tokens / batch * 3 + 1);
    for (const cache_policy policy : live_policies) {
      expert_cache cache({.experts = experts, .layers = 3, .capacity = 40, .policy = policy});
      index_t loads = 0, accesses = 0;
      for (index_t t = 0; t < tokens; t += batch)
        for (index_t l = 0; l < 3; ++l) {
          std::set<expert_id> read;
          for (index_t i = t; i < t + batch; ++i)
            for (const expert_id e : layers[static_cast<std::size_t>(l)].ids(i)) read.insert(e);
          loads += static_cast<index_t>(cache.step(ids(read.begin(), read.end()), l).loads.size());
          accesses += static_cast<index_t>(read.size());
        }
      CHECK(accesses == best.accesses);
      CHECK(loads >= static_cast<index_t>(best.keys.size()));
    }
  }
  // One layer, one token a step: the simulator of metrics/.
  expert_trace trace(experts);
  trace.add(layers[0]);
  CHECK(pregate(std::span(layers).first(1), 1, {.capacity = 7}).hits ==
        simulate_cache(trace, {.policy = cache_policy::belady, .capacity = 7}).hits);
}

TEST_CASE("predictors, prefetchers, groups and tables refuse by name") {
  CHECK(test::refusal([] { last_predictor(0, 4); }) ==
        "moeroute::last_predictor: layers is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { last_predictor(1, 4).saw(0, ids{4}); }) ==
        "moeroute::last_predictor: expert is 4, expected -1 to 3");
  CHECK(test::refusal([] { popularity_predictor(1, 4, 2.0); }) ==
        "moeroute::popularity_predictor: decay is 2.000000, expected 0 to 1");
  CHECK(test::refusal([] { popularity_predictor(1, 4, -0.5); }) ==
        "moeroute::popularity_predictor: decay is -0.500000, expected 0 to 1");
  for (const double end : {0.0, 1.0})
    CHECK(test::refusal([&] { popularity_predictor(1, 4, end); }) == "accepted");
  CHECK(test::refusal([] { transition_predictor(2, 4).saw(2, ids{}); }) ==
        "moeroute::transition_predictor: layer is 2, expected 0 to 1");
  expert_cache cache({.experts = 8, .capacity = 2});
  CHECK(test::refusal([&] { prefetcher(cache, last_predictor(1, 8), {.per_layer = 9}); }) ==
        "moeroute::prefetcher: per_layer is 9, expected 0 to 8");
  for (const index_t ahead : {0, 2})
    CHECK(test::refusal([&] { prefetcher(cache, last_predictor(1, 8), {.ahead = ahead}); }) ==
          "moeroute::prefetcher: ahead is " + std::to_string(ahead) + ", expected 1 to 1");
  CHECK(test::refusal([&] { prefetcher(cache, last_predictor(1, 8), {.most_per_use = 0.5}); }) ==
        "moeroute::prefetcher: most_per_use is 0.500000, expected 1 or more");
  prefetcher checked(cache, last_predictor(1, 8));
  for (const index_t layer : {-1, 1})
    CHECK(test::refusal([&] { checked.step(layer, ids{1}); }) ==
          "moeroute::prefetcher: layer is " + std::to_string(layer) + ", expected 0 to 0");
  CHECK(test::refusal([&] { checked.step(0, ids{1, 8}); }) ==
        "moeroute::prefetcher: expert is 8, expected -1 to 7");
  CHECK(test::refusal([&] { checked.step(0, ids{-2}); }) ==
        "moeroute::prefetcher: expert is -2, expected -1 to 7");
  CHECK(checked.counts().tokens == 0);
  CHECK(checked.step(0, ids{1, no_expert}).loads.size() == 1);
  const transition_predictor follows(2, 4);
  CHECK(test::refusal([&] { follows.after(1, 0); }) ==
        "moeroute::transition_predictor: layer is 1, expected 0 to 0");
  CHECK(test::refusal([&] { follows.after(0, 4); }) ==
        "moeroute::transition_predictor: expert is 4, expected 0 to 3");
  test::random rng(7);
  const assignment sets = test::fixed_choices(rng, 4, 8, 2);
  CHECK(test::refusal([&] { regroup(sets, 0); }) ==
        "moeroute::regroup: batch is 0, expected 1 to 2147483647");
  CHECK(test::refusal([] { two_choice_table(0); }) ==
        "moeroute::two_choice_table: places is 0, expected 1 to 2147483647");
  const assignment layers[] = {sets, test::fixed_choices(rng, 5, 8, 2)};
  CHECK(test::refusal([&] { pregate(layers, 1, {}); }) ==
        "moeroute::pregate: tokens is 5, expected 4");
}

TEST_CASE("what looks ahead refuses models without layers, and places where there is nothing") {
  test::random rng(7);
  const assignment sets = test::fixed_choices(rng, 4, 8, 2);
  const assignment layers[] = {sets, test::fixed_choices(rng, 4, 9, 2)};
  assignment strange = sets;
  strange.ids()[3] = 8;
  expert_cache cache({.experts = 8, .capacity = 2});
  const std::vector<const simd::packed_matrix<>*> gates((1 << 20) + 1);
  const auto most = std::span(gates).first(1 << 20);
  ids out(2);
  const auto in_order = [&](std::vector<std::int32_t> order, index_t batch = 2) {
    return [&sets, order, batch] { distinct_experts(sets, order, batch); };
  };
  const test::refusals all{
      {[] { last_predictor(1, 0); }, "last_predictor: experts is 0, expected 1 to 1048576"},
      {[] { popularity_predictor(0, 4); },
       "popularity_predictor: layers is 0, expected 1 to 1048576"},
      {[] { popularity_predictor(1, 0); },
       "popularity_predictor: experts is 0, expected 1 to 1048576"},
      {[] { popularity_predictor(1, 4, std::nan("")); },
       "popularity_predictor: decay is nan, expected 0 to 1"},
      {[] { transition_predictor(0, 4); },
       "transition_predictor: layers is 0, expected 1 to 1048576"},
      {[] { transition_predictor(1, 0); },
       "transition_predictor: experts is 0, expected 1 to 1048576"},
      {[&] { regroup(strange, 2); }, "regroup: the id of choice 3 is 8, expected -1 to 7"},
      {[&] { distinct_experts(strange, std::vector<std::int32_t>{0}, 2); },
       "distinct_experts: the id of choice 3 is 8, expected -1 to 7"},
      {[&] { pregate({&strange, 1}, 1, {}); },
       "pregate: the id of choice 3 is 8, expected -1 to 7"},
      {[] { gate_predictor({}); }, "gate_predictor: gates.size() is 0, expected 1 to 1048576"},
      {[&] { last_predictor(1, 4).rank(1, out); }, "last_predictor: layer is 1, expected 0 to 0"},
      {[&] { popularity_predictor(1, 4).rank(-1, out); },
       "popularity_predictor: layer is -1, expected 0 to 0"},
      {[&] { transition_predictor(1, 4).rank(1, out); },
       "transition_predictor: layer is 1, expected 0 to 0"},
      {[] { last_predictor(2, 4).saw(2, ids{}); }, "last_predictor: layer is 2, expected 0 to 1"},
      {[] { popularity_predictor(2, 4).saw(2, ids{}); },
       "popularity_predictor: layer is 2, expected 0 to 1"},
      {[] { popularity_predictor(2, 4).saw(0, ids{4}); },
       "popularity_predictor: expert is 4, expected -1 to 3"},
      {[] { transition_predictor(2, 4).saw(0, ids{-2}); },
       "transition_predictor: expert is -2, expected -1 to 3"},
      {[&] { pregate({}, 1, {}); }, "pregate: layers.size() is 0, expected 1 to 1048576"},
      {[&] { pregate(layers, 0, {}); }, "pregate: batch is 0, expected 1 to 2147483647"},
      {[] { popularity_predictor((1 << 20) + 1, 4); },
       "popularity_predictor: layers is 1048577, expected 1 to 1048576"},
      {[] { popularity_predictor(1, max_experts + 1); },
       "popularity_predictor: experts is 1048577, expected 1 to 1048576"},
      {[&] { pregate(layers, index_t{1} << 31, {}); },
       "pregate: batch is 2147483648, expected 1 to 2147483647"},
      {in_order({0}, index_t{1} << 31),
       "distinct_experts: batch is 2147483648, expected 1 to 2147483647"},
      {[&] { pregate(layers, 1, {}); }, "pregate: experts is 9, expected 8"},
      {in_order({0}, 0), "distinct_experts: batch is 0, expected 1 to 2147483647"},
      {in_order({0, 4}), "distinct_experts: order is 4, expected 0 to 3"},
      {in_order({-1}), "distinct_experts: order is -1, expected 0 to 3"},
      {[&] { regroup(sets, index_t{1} << 31); },
       "regroup: batch is 2147483648, expected 1 to 2147483647"},
      {[] { two_choice_table(index_t{1} << 31); },
       "two_choice_table: places is 2147483648, expected 1 to 2147483647"},
      {[&] { last_predictor(1, 4).rank(-1, out); }, "last_predictor: layer is -1, expected 0 to 0"},
      {[&] { transition_predictor(1, 4).rank(-1, out); },
       "transition_predictor: layer is -1, expected 0 to 0"},
      {[&] { gate_predictor(gates).rank(-1, out); },
       "gate_predictor: gates.size() is 1048577, expected 1 to 1048576"},
      {[&] { gate_predictor(most).rank(-1, out); },
       "gate_predictor: layer is -1, expected 0 to 1048575"},
      {[] { transition_predictor(2, 4).after(-1, 0); },
       "transition_predictor: layer is -1, expected 0 to 0"},
      {[] { transition_predictor(2, 4).after(0, -1); },
       "transition_predictor: expert is -1, expected 0 to 3"},
      {[&] { prefetcher(cache, last_predictor(1, 8), {.per_layer = -1}); },
       "prefetcher: per_layer is -1, expected 0 to 8"},
      {[&] { prefetcher(cache, last_predictor(1, 8), {.most_per_use = std::nan("")}); },
       "prefetcher: most_per_use is nan, expected 1 or more"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(test::refusal([&] { regroup(sets, 0x7fffffff); }) == "accepted");
  CHECK(test::refusal(in_order({0}, 0x7fffffff)) == "accepted");
  CHECK(test::refusal([&] { pregate({&sets, 1}, 0x7fffffff, {.capacity = 8}); }) == "accepted");
}

TEST_CASE("predictors keep their layers apart: each ranks as counts made by plain loops do") {
  constexpr index_t layers = 3, experts = 70;
  constexpr double decay = 0.75;
  test::random rng(7);
  last_predictor last(layers, experts);
  popularity_predictor popular(layers, experts, decay);
  transition_predictor after(layers, experts);
  std::vector<std::vector<double>> popularity(layers, std::vector<double>(experts));
  std::vector<std::vector<std::int64_t>> followed(
      layers, std::vector<std::int64_t>(static_cast<std::size_t>(experts * experts)));
  std::vector<ids> seen(layers);
  // Best first, the lowest among equals, without what counts nothing.
  const auto ranked = [](const auto& value, std::size_t n) {
    ids order(value.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](expert_id a, expert_id b) {
      return value[static_cast<std::size_t>(a)] > value[static_cast<std::size_t>(b)];
    });
    while (!order.empty() && !(value[static_cast<std::size_t>(order.back())] > 0)) order.pop_back();
    if (order.size() > n) order.resize(n);
    return order;
  };
  for (int token = 0; token < 40; ++token)
    for (index_t l = 0; l < layers; ++l) {
      const auto layer = static_cast<std::size_t>(l);
      if (l > 0) {
        std::vector<std::int64_t> sum(experts);
        for (const expert_id from : seen[layer - 1])
          for (std::size_t e = 0; from != no_expert && e < sum.size(); ++e)
            sum[e] += followed[layer][static_cast<std::size_t>(from) * sum.size() + e];
        CHECK(guesses(after, l, 5) == ranked(sum, 5));
      }
      CHECK(guesses(popular, l, 9) == ranked(popularity[layer], 9));
      // Among few, so that much is equal; from layer to layer others; now and then nobody.
      ids now;
      for (int r = 0; r < 3; ++r)
        now.push_back(rng.below(6) == 0 ? no_expert
                                        : static_cast<expert_id>(60 - 20 * l + rng.below(9)));
      for (index_t from_layer = 0; from_layer < layers; ++from_layer)
        for (double& v : popularity[static_cast<std::size_t>(from_layer)])
          if (from_layer == l) v *= decay;
      for (const expert_id e : now) {
        if (e == no_expert) continue;
        popularity[layer][static_cast<std::size_t>(e)] += 1.0;
        for (std::size_t i = 0; l > 0 && i < seen[layer - 1].size(); ++i)
          if (const expert_id from = seen[layer - 1][i]; from != no_expert)
            ++followed[layer][static_cast<std::size_t>(from * experts + e)];
      }
      last.saw(l, now);
      popular.saw(l, now);
      after.saw(l, now);
      seen[layer] = now;
      ids asked = now;
      std::erase(asked, no_expert);
      CHECK(guesses(last, l, 8) == asked);
    }
  for (index_t l = 0; l + 1 < layers; ++l)
    for (expert_id from = 0; from < experts; ++from) {
      const auto counts = after.after(l, from);
      REQUIRE(counts.size() == static_cast<std::size_t>(experts));
      for (std::size_t e = 0; e < counts.size(); ++e)
        REQUIRE(counts[e] == followed[static_cast<std::size_t>(l + 1)]
                                     [static_cast<std::size_t>(from * experts) + e]);
    }
}

TEST_CASE("a gate predictor asks its layer's own gate, and of equal logits the lowest expert") {
  // Two layers of other widths; rows 1, 2 and 4 of the second one are the same.
  const std::vector<float> first{1, 0, 0, 1}, second{0, 1, 1, 1, 1, 1, -1, 0, 1, 1};
  const simd::packed_matrix<> a(matrix_view<const float>(first.data(), 2, 2)),
      b(matrix_view<const float>(second.data(), 5, 2));
  const simd::packed_matrix<>* const gates[] = {&a, &b};
  gate_predictor by_gate(gates);
  by_gate.hidden(std::vector<float>{-3.0f, -2.0f});
  CHECK(guesses(by_gate, 0, 2) == ids{1, 0});
  CHECK(guesses(by_gate, 1, 5) == ids{3, 0, 1, 2, 4});
  by_gate.hidden(std::vector<float>{3.0f, 2.0f});
  CHECK(guesses(by_gate, 1, 4) == ids{1, 2, 4, 0});
  CHECK(guesses(by_gate, 0, 1) == ids{0});
}

TEST_CASE("what is loaded ahead of each step are its experts that a cache of all has not") {
  // Room for everything: every expert of a layer is loaded once, at the step that asks first.
  test::random rng(8);
  constexpr index_t experts = 9, tokens = 11, batch = 4;
  std::vector<assignment> layers;
  for (int l = 0; l < 2; ++l) layers.push_back(test::fixed_choices(rng, tokens, experts, 2, 4));
  const pregated_loads all = pregate(layers, batch, {.capacity = 2 * experts});
  REQUIRE(all.first.size() == 7);  // three steps of two layers, the last of three tokens
  std::set<std::int32_t> held;
  index_t accesses = 0;
  for (index_t s = 0; s < 6; ++s) {
    std::set<std::int32_t> asked;
    const index_t layer = s % 2, from = s / 2 * batch;
    for (index_t t = from; t < std::min(tokens, from + batch); ++t)
      for (const expert_id e : layers[static_cast<std::size_t>(layer)].ids(t))
        if (e != no_expert) asked.insert(static_cast<std::int32_t>(layer * experts + e));
    accesses += static_cast<index_t>(asked.size());
    std::vector<std::int32_t> missing;
    for (const std::int32_t key : asked)
      if (held.insert(key).second) missing.push_back(key);
    const auto loads = all.of_step(s);
    CHECK(std::vector(loads.begin(), loads.end()) == missing);
  }
  CHECK(all.accesses == accesses);
  CHECK(all.hits == accesses - static_cast<index_t>(held.size()));
}

TEST_CASE("the last batch ends with the tokens, whatever lies behind them") {
  assignment a;
  a.reset(4, 4, 1);
  std::iota(a.ids().begin(), a.ids().end(), 0);
  a.reset(3, 4, 1);  // in the same memory: the fourth id is still there
  std::iota(a.ids().begin(), a.ids().end(), 0);
  for (const index_t batch : {1, 2, 3, 4, 5}) {
    const pregated_loads all = pregate({&a, 1}, batch, {.capacity = 4});
    std::vector<std::int32_t> first{0};
    while (first.back() < 3)
      first.push_back(static_cast<std::int32_t>(std::min<index_t>(3, first.back() + batch)));
    CHECK(all.accesses == 3);
    CHECK(all.keys == std::vector<std::int32_t>{0, 1, 2});
    CHECK(all.first == first);
  }
}

TEST_CASE("experts count once in each batch, and choices of nobody not at all") {
  const expert_id used[] = {0, 69, 69, no_expert, 0, 1, no_expert, no_expert, 1, 0};
  assignment sets;
  sets.reset(5, 70, 2);
  std::copy(used, used + 10, sets.ids().begin());
  const std::vector<std::int32_t> order{0, 1, 2, 3, 4}, twice{1, 1, 3}, none;
  CHECK(distinct_experts(sets, order, 1) == 2 + 1 + 2 + 0 + 2);
  CHECK(distinct_experts(sets, order, 2) == 2 + 2 + 2);
  CHECK(distinct_experts(sets, order, 5) == 3);
  CHECK(distinct_experts(sets, twice, 2) == 1);
  CHECK(distinct_experts(sets, none, 2) == 0);
  // Nobody adds nothing: such requests come as early as they stand, and the bits of others move up.
  CHECK(regroup(sets, 2) == order);
  CHECK(regroup(sets, 3) == std::vector<std::int32_t>{0, 1, 3, 2, 4});
}

TEST_CASE("a prefetcher of any options does what plain calls of its cache do, and counts them") {
  test::random rng(41);
  const auto listed = [](std::span<const std::int32_t> keys) {
    return std::vector<std::int32_t>(keys.begin(), keys.end());
  };
  index_t useful = 0, wasted = 0, stops = 0;
  for (int draw = 0; draw < 60; ++draw) {
    const index_t experts = 3 + rng.below(6), layers = 1 + rng.below(3);
    std::vector<std::int64_t> bytes;
    if (rng.below(3) == 0)
      for (index_t i = 0; i < layers * experts; ++i) bytes.push_back(1 + rng.below(3));
    const expert_cache_options sizes{.experts = experts,
                                     .layers = layers,
                                     .capacity = 3 + rng.below(experts - 2),
                                     .policy = live_policies[rng.below(6)],
                                     .bytes = bytes};
    prefetch_options o;
    o.per_layer = rng.below(4);
    o.ahead = 1 + rng.below(layers);
    o.most_per_use = 1.0 + 0.5 * static_cast<double>(rng.below(6));
    o.trial = rng.below(30);
    expert_cache cache(sizes), plain(sizes);
    prefetcher ahead(cache, popularity_predictor(layers, experts, 0.75), o);
    popularity_predictor guess(layers, experts, 0.75);
    std::vector<std::int64_t> since(static_cast<std::size_t>(layers * experts), -1);
    prefetch_counts n;
    bool stopped = false;
    const auto leave = [&](std::span<const std::int32_t> keys) {
      for (const std::int32_t key : keys) {
        std::int64_t& came = since[static_cast<std::size_t>(key)];
        n.wasted += came >= 0;
        came = -1;
      }
    };
    for (std::int64_t step = 1; step <= 90; ++step) {
      INFO("draw " << draw << ", step " << step);
      const index_t layer = rng.below(6) == 0 ? rng.below(layers) : step % layers;
      ids list;
      for (index_t i = rng.below(4); i > 0; --i) {
        const index_t among = 1 + rng.below(experts);
        list.push_back(static_cast<expert_id>(rng.below(among + 1)) - 1);
      }
      const auto got = ahead.step(layer, list);
      n.tokens += layer == 0;
      for (const expert_id e : list) {
        if (e == no_expert) continue;
        std::int64_t& came = since[static_cast<std::size_t>(layer * experts + e)];
        if (came < 0 || !plain.would_hit(e, layer)) continue;
        ++n.useful;
        n.layers_early += step - came;
        came = -1;
      }
      const auto want = plain.step(list, layer);
      n.loads += static_cast<std::int64_t>(want.loads.size());
      REQUIRE(got.hits == want.hits);
      REQUIRE(listed(got.loads) == listed(want.loads));
      REQUIRE(listed(got.evictions) == listed(want.evictions));
      leave(want.evictions);
      guess.saw(layer, list);
      stopped = stopped || (n.prefetched >= o.trial && n.per_use() > o.most_per_use);
      std::vector<std::int32_t> early;
      if (!stopped) {
        const index_t next = (layer + o.ahead) % layers;
        const auto brought = plain.prefetch(guesses(guess, next, static_cast<std::size_t>(experts)),
                                            next, o.per_layer);
        early = listed(brought.loads);
        n.prefetched += static_cast<std::int64_t>(early.size());
        for (const std::int32_t key : early) since[static_cast<std::size_t>(key)] = step;
        leave(brought.evictions);
      }
      REQUIRE(listed(ahead.ahead()) == early);
      REQUIRE(ahead.stopped() == stopped);
    }
    const prefetch_counts& c = ahead.counts();
    CHECK((c.tokens == n.tokens && c.loads == n.loads && c.prefetched == n.prefetched));
    CHECK((c.useful == n.useful && c.wasted == n.wasted && c.layers_early == n.layers_early));
    useful += n.useful, wasted += n.wasted, stops += stopped;
  }
  CHECK((useful > 100 && wasted > 100 && stops > 5));
}

TEST_CASE("decided ahead or regrouped, any batches read what plain loops say") {
  test::random rng(42);
  int regrouped = 0;
  for (int draw = 0; draw < 60; ++draw) {
    INFO("draw " << draw);
    const index_t experts = rng.below(2) == 0 ? 3 + rng.below(8) : 60 + rng.below(80);
    const index_t tokens = rng.below(20), batch = 1 + rng.below(6), k = 1 + rng.below(3);
    const index_t count = 1 + rng.below(3),
                  among = 3 + rng.below(std::min<index_t>(20, experts - 2));
    std::vector<assignment> layers(static_cast<std::size_t>(count));
    for (assignment& a : layers) {
      a.reset(tokens, experts, k);
      for (expert_id& e : a.ids()) {
        const index_t id = rng.below(among + 1);
        e = id == among ? no_expert : static_cast<expert_id>(experts - 1 - id);
      }
    }
    // The experts of each step, through a cache that knows when each comes again.
    std::vector<std::int64_t> bytes;
    if (rng.below(2) == 0)
      for (index_t i = 0; i < count * experts; ++i) bytes.push_back(1 + rng.below(3));
    std::vector<std::int32_t> pins;
    if (rng.below(2) == 0) pins.push_back(static_cast<std::int32_t>(experts - 1));
    expert_cache_options o{.capacity = 6 + rng.below(12), .pinned = pins, .bytes = bytes};
    o.capacity = std::min(o.capacity, count * experts);
    const pregated_loads got = pregate(layers, batch, o);
    std::vector<ids> steps;
    for (index_t t = 0; t < tokens; t += batch)
      for (const assignment& a : layers) {
        std::set<expert_id> read;
        for (index_t i = t; i < std::min(tokens, t + batch); ++i)
          for (const expert_id e : a.ids(i))
            if (e != no_expert) read.insert(e);
        steps.emplace_back(read.begin(), read.end());
      }
    o.experts = experts;
    o.layers = count;
    o.policy = cache_policy::belady;
    expert_cache cache(o);
    pregated_loads want;
    for (std::size_t s = 0; s < steps.size(); ++s) {
      std::vector<std::int64_t> next;
      for (const expert_id e : steps[s]) {
        std::size_t later = s + layers.size();
        while (later < steps.size() &&
               std::find(steps[later].begin(), steps[later].end(), e) == steps[later].end())
          later += layers.size();
        next.push_back(later < steps.size() ? static_cast<std::int64_t>(later)
                                            : expert_cache::never);
      }
      const auto found = cache.step(steps[s], static_cast<index_t>(s % layers.size()), next);
      want.accesses += static_cast<index_t>(steps[s].size());
      want.hits += found.hits;
      want.keys.insert(want.keys.end(), found.loads.begin(), found.loads.end());
      want.first.push_back(static_cast<std::int32_t>(want.keys.size()));
    }
    CHECK((got.accesses == want.accesses && got.hits == want.hits));
    CHECK(got.keys == want.keys);
    CHECK(got.first == want.first);

    // Batches of requests: the first one left, then who adds fewest, the first among equals.
    const assignment& sets = layers[0];
    const auto adds = [&](std::set<expert_id>& read, std::int32_t t, bool stays) {
      std::set<expert_id> with = read;
      for (const expert_id e : sets.ids(t))
        if (e != no_expert) with.insert(e);
      const std::size_t more = with.size() - read.size();
      if (stays) read = with;
      return more;
    };
    std::vector<std::int32_t> given(static_cast<std::size_t>(tokens)), order;
    std::iota(given.begin(), given.end(), 0);
    const auto distinct = [&](const std::vector<std::int32_t>& list) {
      std::set<expert_id> read;
      std::size_t sum = 0;
      for (std::size_t i = 0; i < list.size(); ++i) {
        if (i % static_cast<std::size_t>(batch) == 0) read.clear();
        sum += adds(read, list[i], true);
      }
      return static_cast<index_t>(sum);
    };
    std::vector<std::int32_t> left = given;
    std::set<expert_id> read;
    while (!left.empty()) {
      const bool begins = static_cast<index_t>(order.size()) % batch == 0;
      if (begins) read.clear();
      const auto best =
          begins ? left.begin()
                 : std::min_element(left.begin(), left.end(), [&](std::int32_t a, std::int32_t b) {
                     return adds(read, a, false) < adds(read, b, false);
                   });
      order.push_back(*best);
      adds(read, *best, true);
      left.erase(best);
    }
    CHECK(distinct_experts(sets, order, batch) == distinct(order));
    CHECK(distinct_experts(sets, given, batch) == distinct(given));
    const bool better = distinct(order) < distinct(given);
    CHECK(regroup(sets, batch) == (better ? order : given));
    regrouped += better;
  }
  CHECK(regrouped > 10);
}

}  // namespace ahead_test
