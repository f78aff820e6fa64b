#include <moeroute/residency/resident_router.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <moeroute/data/expert_cache.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/weigh/router.hpp>
#include <moeroute/residency/resident_any_router.hpp>
#include <moeroute/stage/weigh.hpp>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "oracle/residency.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/traces.hpp"

namespace resident_router_test {

using namespace moeroute;

namespace {

using kind = residency_kind;

resident_set some_experts(test::random& rng, index_t experts, float share) {
  resident_set set(experts);
  for (expert_id e = 0; e < experts; ++e)
    if (rng.uniform() < share) set.insert(e);
  return set;
}

buddy_table some_buddies(test::random& rng, index_t experts, index_t most) {
  std::vector<double> m(static_cast<std::size_t>(experts * experts));
  for (index_t a = 0; a < experts; ++a)
    for (index_t b = 0; b < a; ++b)
      m[static_cast<std::size_t>(a * experts + b)] = m[static_cast<std::size_t>(b * experts + a)] =
          static_cast<double>(rng.below(5));
  return {{m.data(), experts, experts}, most};
}

// Every rule, once or twice.
std::vector<residency_rule> rules(index_t experts, index_t k, const buddy_table& buddies) {
  const index_t more = std::min(experts, k + 5), two = std::min<index_t>(2, k);
  return {{.kind = kind::cache_prior, .strength = 0.1f},
          {.kind = kind::cache_prior, .strength = 0.4f, .forced = two},
          {.kind = kind::cache_prior, .strength = 0.4f, .forced = 0},
          {.kind = kind::max_rank, .ranks = more},
          {.kind = kind::max_rank, .ranks = k, .forced = two},
          {.kind = kind::mass_threshold, .strength = 0.9f},
          {.kind = kind::margin_swap, .strength = 0.15f},
          {.kind = kind::margin_swap, .strength = 0.5f, .forced = 0, .swaps = 1},
          {.kind = kind::buddy, .buddies = &buddies, .search = buddies.most()},
          {.kind = kind::buddy,
           .forced = 0,
           .buddies = &buddies,
           .search = buddies.most(),
           .least_entropy = 1.4f,
           .most_missing = 0.6f},
          {.kind = kind::within},
          {.kind = kind::within, .ranks = more, .forced = two}};
}

// A router's choices, each row alone as well.
template <class Router>
assignment both_ways(const Router& router, const std::vector<float>& z, index_t experts) {
  const assignment all = test::routed(router, z, experts);
  const auto rows = test::rows_of(z, experts);
  for (index_t t = 0; t < rows.rows; ++t) {
    const std::vector<float> row(rows.row(t), rows.row(t) + experts);
    const assignment one = test::routed(router, row, experts);
    REQUIRE(test::listed(one.ids()) == test::listed(all.ids(t)));
    REQUIRE(test::listed(one.weights()) == test::listed(all.weights(t)));
  }
  return all;
}

std::vector<expert_id> chosen(const assignment& a, index_t t) {
  std::vector<expert_id> list;
  for (const expert_id e : a.ids(t))
    if (e != no_expert) list.push_back(e);
  return list;
}

template <class Router>
void expect_oracle(const Router& router, const std::vector<float>& z,
                   const std::vector<float>& scores, index_t experts, index_t k,
                   test::random& rng) {
  for (const float share : {0.0f, 0.3f, 0.7f, 1.0f}) {
    const resident_set set = some_experts(rng, experts, share);
    std::set<expert_id> held;
    for_each_resident(set, [&](expert_id e) { held.insert(e); });
    const buddy_table buddies = some_buddies(rng, experts, std::min<index_t>(experts, 5));
    auto list = rules(experts, k, buddies);
    list.push_back({.kind = kind::within, .forced = 0});
    for (const residency_rule& rule : list) {
      const assignment a = both_ways(resident_router(router, rule, set), z, experts);
      for (index_t t = 0; t < a.tokens(); ++t) {
        INFO(to_string(rule.kind) << " " << rule.strength << " ranks " << rule.ranks << " forced "
                                  << rule.forced << " share " << share << " token " << t << " E "
                                  << experts << " k " << k);
        const std::vector<float> row(scores.begin() + t * experts,
                                     scores.begin() + (t + 1) * experts);
        REQUIRE(chosen(a, t) == oracle::choose(rule, held, row, k));
      }
    }
  }
}

}  // namespace

TEST_CASE("each rule chooses what plain loops choose, in blocks and row by row") {
  test::random rng(1);
  for (const auto& [experts, k] : {std::pair<index_t, index_t>{8, 2},
                                   {32, 4},
                                   {61, 8},
                                   {5, 5},
                                   {256, 8},
                                   {1, 1},
                                   {80, 20},
                                   {80, 30},
                                   {600, 66}})
    for (const test::shape shape :
         {test::shape::normal, test::shape::quantised, test::shape::masked, test::shape::plus_infs,
          test::shape::half_nan, test::shape::all_minus_inf}) {
      const auto z = test::make_logits(shape, 3, experts > 500 ? 3 : 19, experts);
      INFO(test::name(shape));
      expect_oracle(router<softmax>{.score = {}, .selection = {.k = k}, .weight = sum_normalized},
                    z, z, experts, k, rng);
    }
}

TEST_CASE("where a bias decides, rules go by score and bias, and weights never see it") {
  test::random rng(2);
  constexpr index_t experts = 32, k = 4;
  std::vector<float> bias(experts);
  for (float& b : bias) b = 0.3f * rng.normal();
  const auto z = test::make_logits(test::shape::normal, 5, 21, experts);
  std::vector<float> s(z.size());
  for (index_t t = 0; t < 21; ++t) {
    sigmoid::score_row(z.data() + t * experts, experts, s.data() + t * experts);
    for (index_t e = 0; e < experts; ++e)
      s[static_cast<std::size_t>(t * experts + e)] += bias[static_cast<std::size_t>(e)];
  }
  const router<sigmoid> plain{
      .score = {}, .selection = {.k = k}, .weight = sum_normalized, .bias = selection_bias(bias)};
  expect_oracle(plain, z, s, experts, k, rng);
}

TEST_CASE("weights of other experts are what the router gives them; groups stay the router's") {
  test::random rng(3);
  constexpr index_t experts = 32, k = 4;
  const auto z = test::make_logits(test::shape::normal, 7, 40, experts);
  const resident_set set = some_experts(rng, experts, 0.4f);
  const buddy_table buddies = some_buddies(rng, experts, 5);
  const auto check = [&](const auto& plain) {
    for (const residency_rule& rule : rules(experts, k, buddies)) {
      const resident_router moved(plain, rule, set);
      const assignment a = both_ways(moved, z, experts);
      workspace ws;
      std::vector<float> weights(static_cast<std::size_t>(a.choices()));
      weigh(moved, test::rows_of(z, experts), {}, a, std::span(weights), ws);
      for (std::size_t c = 0; c < weights.size(); ++c)
        REQUIRE(std::abs(weights[c] - a.weights()[c]) <= 3e-6f * std::abs(weights[c]));
      if (plain.selection.groups == 1) continue;
      const assignment before = test::routed(plain, z, experts);
      for (index_t t = 0; t < a.tokens(); ++t) {
        // Two of four groups stay; four choices of score order come from them.
        std::set<expert_id> groups;
        for (const expert_id e : before.ids(t)) groups.insert(e / 8);
        for (const expert_id e : a.ids(t))
          groups.insert(e == no_expert ? before.ids(t)[0] / 8 : e / 8);
        REQUIRE(groups.size() <= 2);
      }
    }
  };
  check(router<softmax>{.score = {}, .selection = {.k = k}, .weight = raw_weights});
  check(router<softmax>{.score = {}, .selection = {.k = k}, .weight = sum_normalized});
  check(router<softmax_selected>{.score = {}, .selection = {.k = k}});
  check(router<sigmoid>{
      .score = {}, .selection = {.k = k, .groups = 4, .topk_group = 2}, .weight = sum_normalized});
}

TEST_CASE("an expert far below one that was passed over has the weight 0, not what overflows") {
  resident_set set(2);
  set.insert(1);
  const router<softmax> plain{.score = {}, .selection = {.k = 1}, .weight = raw_weights};
  const residency_rule rule{.kind = kind::cache_prior, .strength = 2, .forced = 0};
  // Seventeen rows: a block, and one alone.
  std::vector<float> z;
  for (int t = 0; t < 17; ++t) z.insert(z.end(), {100.0f, 0.0f});
  const assignment a = test::routed(resident_router(plain, rule, set), z, 2);
  for (index_t t = 0; t < 17; ++t) {
    CHECK(a.ids(t)[0] == 1);
    CHECK(a.weights(t)[0] == 0.0f);
  }
}

TEST_CASE("a row with an infinite logit is sure of it, so that no buddy is called") {
  const std::vector<double> together{0, 1, 1, 1, 1, 0, 5, 1, 1, 5, 0, 1, 1, 1, 1, 0};
  const buddy_table buddies({together.data(), 4, 4}, 1);
  resident_set set(4);
  for (const expert_id e : {0, 2, 3}) set.insert(e);
  const router<softmax> plain{.score = {}, .selection = {.k = 2}, .weight = raw_weights};
  const residency_rule rule{.kind = kind::buddy,
                            .forced = 0,
                            .buddies = &buddies,
                            .search = 1,
                            .least_entropy = 0.5f,
                            .most_missing = 1.0f};
  // Seventeen rows: a block, and one alone.
  for (const float first : {1.5f, test::infinity}) {
    std::vector<float> z;
    for (int t = 0; t < 17; ++t) z.insert(z.end(), {first, 1.0f, 0.9f, 0.8f});
    const assignment a = test::routed(resident_router(plain, rule, set), z, 4);
    for (index_t t = 0; t < 17; ++t)
      CHECK(chosen(a, t) == std::vector<expert_id>{0, first == test::infinity ? 1 : 2});
  }
}

TEST_CASE("what is just as much as a rule asks for is enough, and rank 64 is a rank like others") {
  const router<softmax> one{.score = {}, .selection = {.k = 1}, .weight = raw_weights};
  const auto first = [](const auto& router, const std::vector<float>& row) {
    std::vector<float> z;
    for (int t = 0; t < 17; ++t) z.insert(z.end(), row.begin(), row.end());
    const auto columns = static_cast<index_t>(row.size());
    const assignment a = test::routed(router, z, columns);
    for (index_t t = 1; t < 17; ++t) REQUIRE(chosen(a, t) == chosen(a, 0));
    REQUIRE(chosen(test::routed(router, row, columns), 0) == chosen(a, 0));
    return chosen(a, 0);
  };
  using list = std::vector<expert_id>;
  // Of four equal experts two have half of the mass.
  for (const expert_id held : {1, 2}) {
    resident_set set(4);
    set.insert(held);
    const residency_rule half{
        .kind = kind::mass_threshold, .strength = 0.5f, .ranks = 4, .forced = 0};
    CHECK(first(resident_router(one, half, set), {1, 1, 1, 1}) == list{held == 1 ? 1 : 0});
  }
  // An entropy that is the least is not below it; the last that counts is at exp(-87).
  const std::vector<double> together{0, 1, 1, 0};
  const buddy_table buddies({together.data(), 2, 2}, 1);
  resident_set second(2);
  second.insert(1);
  residency_rule unsure{.kind = kind::buddy, .forced = 0, .buddies = &buddies, .search = 1};
  for (const auto& [least, row, who] :
       {std::tuple<float, std::vector<float>, int>{std::log(2.0f), {3, 3}, 1},
        {std::nextafter(std::log(2.0f), 1.0f), {3, 3}, 0},
        {1e-37f, {0, -87}, 1},
        {1e-37f, {0, -88}, 0}}) {
    unsure.least_entropy = least;
    INFO(least << ", " << row[1]);
    CHECK(first(resident_router(one, unsure, second), row) == list{who});
  }
  // The best 62, 63, 64 and 65 of 80: who is behind the last of them is not taken.
  std::vector<float> falling;
  for (int e = 0; e < 80; ++e) falling.push_back(static_cast<float>(-e));
  for (const index_t ranks : {62, 63, 64, 65})
    for (const expert_id held : {61, 62, 63, 64, 65}) {
      resident_set set(80);
      set.insert(held);
      INFO(ranks << " ranks, " << held << " in memory");
      for (const kind of : {kind::max_rank, kind::within}) {
        const residency_rule rule{.kind = of, .ranks = ranks, .forced = 0};
        const bool found = held < ranks;
        CHECK(first(resident_router(one, rule, set), falling) == (found ? list{held}
                                                                  : of == kind::max_rank ? list{0}
                                                                                         : list{}));
      }
    }
}

TEST_CASE(
    "a rule of memory where nothing is said is off, keeps the best and looks at four buddies") {
  const residency_rule r;
  CHECK((r.kind == kind::off && r.strength == 0.0f && r.ranks == 0 && r.forced == 1));
  CHECK((r.swaps == 0 && r.range == score_range::own && r.running == nullptr));
  CHECK((r.dropped == dropped_weight::shared_out && r.buddies == nullptr && r.search == 4));
  CHECK((r.least_entropy == 0.0f && r.most_missing == 1.0f));
  running_range mean, said(0.99f);
  for (const float top : {1.0f, 5.0f})
    for (running_range* one : {&mean, &said}) {
      const float row[] = {0.0f, top};
      one->update(matrix_view<const float>(row, 1, 2));
    }
  CHECK(mean.value() == said.value());
  CHECK(std::abs(mean.value() - 1.04f) < 1e-6f);
}

TEST_CASE("a token loses what its own logits say, whatever lies between rows") {
  // Four columns in rows of seven: what lies behind them is larger than any.
  resident_set set(4);
  set.insert(3);
  const router<softmax> plain{.score = {}, .selection = {.k = 1}, .weight = raw_weights};
  const residency_rule rule{.kind = kind::within, .forced = 0};
  std::vector<float> wide;
  for (int t = 0; t < 3; ++t) wide.insert(wide.end(), {1, 3, 2, 0, 9e9f, 9e9f, 9e9f});
  residency_counts counts;
  workspace ws;
  assignment a;
  route(resident_router(plain, rule, set, &counts), matrix_view<const float>(wide.data(), 3, 4, 7),
        ws, a);
  const double total = std::exp(1.0) + std::exp(3.0) + std::exp(2.0) + 1.0;
  CHECK(std::abs(counts.mass_lost() - (std::exp(3.0) - 1.0) / total) < 1e-8);
}

TEST_CASE("a strength of 0 is the router to the bit, for every router of the catalogue") {
  std::map<std::string, int> seen;
  index_t dropped = 0;
  for (const catalog_entry& entry : catalog) {
    router_spec spec = entry.spec;
    spec.capacity = 0;
    spec.drop_order = drop_order::choice_major;
    spec.normalize_before_drop = true;
    test::random rng(4);
    std::vector<float> bias, scale;
    for (index_t e = 0; e < spec.experts; ++e) {
      if (spec.selection_bias) bias.push_back(0.1f * rng.normal());
      if (spec.per_expert_scale) scale.push_back(0.5f + rng.uniform());
    }
    const expert_table table = random_table(8, spec.k, spec.experts, 11);
    const any_router plain =
        make_router(spec, {.bias = bias, .per_expert_scale = scale, .table = &table});
    INFO(entry.name);
    const index_t columns = plain.columns();
    resident_set set(spec.experts + spec.zero_experts);
    if (plain.ragged()) {
      CHECK(test::refusal([&] { resident_any_router(plain, {}, set); }) ==
            "moeroute::resident_any_router: the router's k varies, expected a fixed one");
      continue;
    }
    set = resident_set(plain.as_token_router().experts(columns));
    for (expert_id e = 0; e < set.experts(); e += 2) set.insert(e);
    const auto z = test::make_logits(test::shape::bf16_rounded, 9, 18, columns);
    std::vector<std::int32_t> ids(18, 3);
    const side_inputs side = side_inputs{.token_ids = ids}.only(side_use_of(plain, columns));
    const assignment want = test::routed(plain, z, columns, side);
    ++seen[std::string(to_string(spec.selection))];
    for (const kind k : {kind::off, kind::cache_prior, kind::max_rank, kind::mass_threshold,
                         kind::margin_swap, kind::drop_cold}) {
      const resident_any_router moved(plain, {.kind = k}, set);
      const assignment got = test::routed(moved, z, columns, side);
      REQUIRE(test::listed(got.ids()) == test::listed(want.ids()));
      REQUIRE(test::listed(got.weights()) == test::listed(want.weights()));
    }
    // And a rule that does something is the one of the router at compile time, or refused by name.
    const residency_rule prior{.kind = kind::cache_prior, .strength = 0.2f};
    if (spec.selection == selection_kind::top_k) {
      residency_counts counts;
      test::routed(resident_any_router(plain, prior, set, &counts), z, columns, side);
      CHECK((counts.substitutions > 0) == (spec.k > 1));  // the best stays
      const expert_cache cache({.experts = set.experts()});
      CHECK(resident_any_router(plain, prior, cache.resident()).k() == spec.k);
    } else {
      CHECK(test::refusal([&] {
              resident_any_router(plain, prior, set);
            }).ends_with(" does not choose by rank: drop is what it takes"));
      // The last two tokens come one by one where the router has a way for that.
      for (const int trial : {0, 1, 2, 3, 4}) {
        const dropped_weight what = trial < 2 ? dropped_weight::lost : dropped_weight::shared_out;
        const auto forced = static_cast<std::size_t>(std::min<index_t>(trial % 3, spec.k));
        const residency_rule drop{.kind = kind::drop_cold,
                                  .strength = 0.9f,
                                  .forced = static_cast<index_t>(forced),
                                  .dropped = what};
        const assignment got =
            test::routed(resident_any_router(plain, drop, set), z, columns, side);
        for (index_t t = 0; t < got.tokens(); ++t) {
          float before = 0, after = 0, most = 0;
          for (const float w : want.weights(t)) most = std::max(most, w);
          for (std::size_t r = 0; r < static_cast<std::size_t>(got.k()); ++r) {
            const expert_id own = want.ids(t)[r];
            const bool left = got.ids(t)[r] == no_expert && own != no_expert;
            CHECK(left == (own != no_expert && r >= forced && !set.contains(own) &&
                           want.weights(t)[r] < 0.9f * most));
            before += want.weights(t)[r];
            after += got.weights(t)[r];
            dropped += left;
            CHECK((left || got.ids(t)[r] == want.ids(t)[r]));
            if (left) CHECK(got.weights(t)[r] == 0.0f);
            if (!left && what == dropped_weight::lost)
              CHECK(got.weights(t)[r] == want.weights(t)[r]);
          }
          float left_over = 0;
          for (std::size_t r = 0; r < static_cast<std::size_t>(got.k()); ++r)
            if (got.ids(t)[r] != no_expert) left_over += want.weights(t)[r];
          if (what == dropped_weight::shared_out)
            CHECK(std::abs(after - (left_over > 0.0f ? before : 0.0f)) <= 1e-5f);
        }
      }
    }
  }
  CHECK(seen.size() >= 4);
  CHECK(dropped > 50);
}

TEST_CASE("what is missing and hardly counts is dropped; the row's sum stays, or does not") {
  constexpr index_t experts = 32;
  test::random rng(5);
  const auto z = test::make_logits(test::shape::normal, 11, 50, experts);
  const resident_set set = some_experts(rng, experts, 0.4f);
  index_t dropped = 0;
  for (int trial = 0; trial < 4; ++trial) {
    const auto k = std::size_t{trial % 2 == 0 ? 4u : 20u};  // 20: more than a block of ranks
    const dropped_weight what = trial < 2 ? dropped_weight::lost : dropped_weight::shared_out;
    const router<softmax> plain{
        .score = {}, .selection = {.k = static_cast<index_t>(k)}, .weight = sum_normalized};
    const assignment before = test::routed(plain, z, experts);
    const auto forced = static_cast<std::size_t>(1 + trial % 3);
    const residency_rule rule{.kind = kind::drop_cold,
                              .strength = 0.3f,
                              .forced = static_cast<index_t>(forced),
                              .dropped = what};
    const assignment a = both_ways(resident_router(plain, rule, set), z, experts);
    for (index_t t = 0; t < a.tokens(); ++t) {
      float kept = 0;
      std::vector<expert_id> want;
      for (std::size_t r = 0; r < k; ++r) {
        const float w = before.weights(t)[r];
        const bool stays =
            r < forced || set.contains(before.ids(t)[r]) || !(w < 0.3f * before.weights(t)[0]);
        want.push_back(stays ? before.ids(t)[r] : no_expert);
        if (stays) kept += w;
        dropped += !stays;
      }
      REQUIRE(test::listed(a.ids(t)) == want);
      for (std::size_t r = 0; r < k; ++r) {
        const float w = want[r] == no_expert ? 0.0f : before.weights(t)[r];
        const float expected = what == dropped_weight::lost ? w : w / kept;
        REQUIRE(std::abs(a.weights(t)[r] - expected) <= 1e-6f);
      }
    }
  }
  CHECK(dropped > 20);
}

TEST_CASE("what is as heavy as the bound stays, and where all is dropped all weights are 0") {
  constexpr index_t experts = 40;
  const expert_table table({0, 1, 39, 2}, 2, experts);
  const router<softmax> ranked{.score = {}, .selection = {.k = 2}, .weight = sum_normalized},
      many{.score = {}, .selection = {.k = 20}, .weight = sum_normalized};
  const table_router<softmax> by_id{.table = &table, .weight = sum_normalized};
  // Seventeen rows: a block, and one alone.
  constexpr index_t tokens = 17;
  std::vector<float> level(static_cast<std::size_t>(tokens * experts)), falling = level;
  for (std::size_t i = 0; i < falling.size(); ++i)
    falling[i] = -0.25f * static_cast<float>(i % static_cast<std::size_t>(experts));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens));
  const auto both = [&](const auto& plain, const residency_rule& rule, const resident_set& set,
                        const std::vector<float>& z, const side_inputs& side) {
    return test::routed(resident_router(plain, rule, set), z, experts, side);
  };
  const auto each = [&](auto&& check) {
    check(ranked, side_inputs{});
    check(many, side_inputs{});
    check(by_id, side_inputs{.token_ids = ids});
  };
  const resident_set nobody(experts);
  resident_set first(experts), second(experts);
  first.insert(0);
  second.insert(1);
  for (const dropped_weight what : {dropped_weight::lost, dropped_weight::shared_out})
    each([&](const auto& plain, const side_inputs& side) {
      const auto count = static_cast<std::size_t>(plain.k());
      const auto rule = [&](float strength, index_t forced) {
        return residency_rule{
            .kind = kind::drop_cold, .strength = strength, .forced = forced, .dropped = what};
      };
      // Equally heavy ones are as heavy as the heaviest.
      const assignment equal = both(plain, rule(1.0f, 0), nobody, level, side);
      for (const float w : equal.weights())
        CHECK(std::abs(w - 1.0f / static_cast<float>(count)) < 1e-6f);
      // None is half as heavy again as the heaviest.
      const assignment none = both(plain, rule(1.5f, 0), nobody, falling, side);
      for (const expert_id e : none.ids()) CHECK(e == no_expert);
      for (const float w : none.weights()) CHECK(w == 0.0f);
      // Who is there stays, expert 0 as any other.
      for (const resident_set* set : {&first, &second}) {
        const assignment one = both(plain, rule(1.5f, 0), *set, falling, side);
        const expert_id there = set == &first ? 0 : 1;
        for (index_t t = 0; t < tokens; ++t)
          for (std::size_t r = 0; r < count; ++r)
            CHECK(one.ids(t)[r] == (static_cast<expert_id>(r) == there ? there : no_expert));
      }
      // Of forced ones the first stays.
      const assignment forced = both(plain, rule(1.5f, 1), nobody, falling, side);
      for (index_t t = 0; t < tokens; ++t) {
        CHECK(forced.ids(t)[0] == 0);
        CHECK(forced.ids(t)[1] == no_expert);
        if (what == dropped_weight::shared_out)
          CHECK(std::abs(forced.weights(t)[0] - 1.0f) < 1e-6f);
        else
          CHECK(forced.weights(t)[0] < 0.9f);
      }
    });
  // What a row without a softmax loses is not counted as mass.
  residency_counts counts;
  std::vector<float> endless(static_cast<std::size_t>(experts));
  endless[3] = INFINITY;
  test::routed(
      resident_router(ranked, {.kind = kind::drop_cold, .strength = 0.9f}, nobody, &counts),
      endless, experts);
  CHECK((counts.tokens == 1 && counts.dropped == 1 && counts.mass == 0));
  CHECK(residency_counts{}.agreement() == 1.0);
  CHECK((residency_counts{}.misses_per_token() == 0.0 && residency_counts{}.mass_lost() == 0.0));
}

TEST_CASE("counts are what plain sums over the choices give, and counting changes nothing") {
  constexpr index_t experts = 32, k = 4;
  test::random rng(6);
  const auto z = test::make_logits(test::shape::normal, 13, 70, experts);
  const resident_set set = some_experts(rng, experts, 0.4f);
  const buddy_table buddies = some_buddies(rng, experts, 5);
  const router<softmax> plain{.score = {}, .selection = {.k = k}, .weight = sum_normalized};
  const assignment before = test::routed(plain, z, experts);
  std::vector<residency_rule> all = rules(experts, k, buddies);
  all.push_back({.kind = kind::drop_cold, .strength = 0.4f});
  std::vector<std::uint8_t> mask(70, 1);
  mask[5] = mask[66] = 0;
  for (const residency_rule& rule : all) {
    INFO(to_string(rule.kind));
    residency_counts counts;
    const assignment a =
        test::routed(resident_router(plain, rule, set, &counts), z, experts, {.mask = mask});
    const assignment quiet =
        test::routed(resident_router(plain, rule, set), z, experts, {.mask = mask});
    REQUIRE(test::listed(a.ids()) == test::listed(quiet.ids()));
    REQUIRE(test::listed(a.weights()) == test::listed(quiet.weights()));
    residency_counts want;
    double lost = 0;
    for (index_t t = 0; t < 70; ++t) {
      if (mask[static_cast<std::size_t>(t)] == 0) continue;
      ++want.tokens;
      double total = 0;
      const float* row = z.data() + t * experts;
      for (index_t e = 0; e < experts; ++e) total += std::exp(double(row[e]));
      const auto b = before.ids(t);
      for (const expert_id e : b) {
        ++want.plain_choices;
        lost += std::exp(double(row[e])) / total;
      }
      for (const expert_id e : a.ids(t)) {
        if (e == no_expert) continue;
        ++want.choices;
        want.misses += !set.contains(e);
        const bool own = std::find(b.begin(), b.end(), e) != b.end();
        want.agreed += own;
        want.substitutions += !own;
        lost -= std::exp(double(row[e])) / total;
      }
    }
    CHECK(counts.tokens == want.tokens);
    CHECK(counts.plain_choices == want.plain_choices);
    CHECK(counts.choices == want.choices);
    CHECK(counts.misses == want.misses);
    CHECK(counts.agreed == want.agreed);
    CHECK(counts.substitutions == want.substitutions);
    CHECK(counts.dropped == want.plain_choices - want.choices);
    CHECK(std::abs(counts.mass_lost() - lost / double(want.tokens)) < 1e-7);
  }
  // Rows without a softmax, and experts without a column of their own, lose no mass.
  auto wild = z;
  wild[3] = NAN;
  wild[experts + 1] = INFINITY;
  std::fill_n(wild.begin() + 2 * experts, experts, -INFINITY);
  residency_counts seen, keyed;
  test::routed(resident_router(plain, all[0], set, &seen),
               decltype(wild)(wild.begin(), wild.begin() + 3 * experts), experts);
  CHECK(seen.tokens == 3);
  CHECK(std::abs(seen.mass_lost()) <= 1.0);
  const product_keys<softmax> keys{.choices = k};
  const resident_set some = some_experts(rng, 16 * 16, 0.2f);
  const residency_rule drop{.kind = kind::drop_cold, .strength = 0.9f};
  // Such a router drops by itself: a block of counted rows as one that is not.
  const assignment own = test::routed(keys, z, experts),
                   left = test::routed(resident_router(keys, drop, some), z, experts),
                   counted = test::routed(resident_router(keys, drop, some, &keyed), z, experts);
  CHECK(test::listed(counted.ids()) == test::listed(left.ids()));
  CHECK(test::listed(counted.weights()) == test::listed(left.weights()));
  const auto made = [](const assignment& a) {
    return std::count_if(a.ids().begin(), a.ids().end(), [](expert_id e) { return e >= 0; });
  };
  CHECK(keyed.dropped > 0);
  CHECK(keyed.dropped == made(own) - made(left));
  CHECK(keyed.agreed == made(left));
  CHECK(keyed.mass == 0);
  // What has no column is not looked for behind the last one.
  test::guarded<float> room(experts);
  float* const row = room.window(experts, test::guarded_end::back);
  std::copy_n(z.data(), experts, row);
  const expert_id was[] = {1, experts}, now[] = {1, experts + 1};
  const residency_counts other =
      moeroute::detail::counts_of(row, experts, some.view(), was, 1, now, 1, 2);
  CHECK((other.substitutions == 1 && other.agreed == 1 && other.mass == 0));
}

TEST_CASE("what a token explores is dropped where it is cold, as what it chooses") {
  constexpr index_t tokens = 40, experts = 12, k = 3;
  test::random rng(7);
  std::vector<float> z(tokens * experts);
  for (float& v : z) v = rng.normal();
  const resident_set none(experts);
  for (const float strength : {0.0f, 0.9f}) {
    const residency_rule drop{.kind = kind::drop_cold, .strength = strength};
    const explore<router<softmax, resident_selection<top_k>>> rule{
        {.score = {},
         .selection = {.plain = {.k = k}, .rule = drop, .set = none.view()},
         .weight = sum_normalized},
        1.0f};
    const assignment drawn = test::routed(rule, z, experts);
    index_t there = 0;
    for (const expert_id e : drawn.ids()) there += e != no_expert;
    CHECK((strength == 0.0f ? there == tokens * k : there < tokens * k));
  }
}

TEST_CASE("real logits choose and weigh the same under every rule everywhere") {
  // FNV-1a over ids and weights of the Python trace, T at once; made once, checked on every
  // instruction set and compiler.
  const auto traces = example::read_traces(MOEROUTE_MODEL_DIR);
  std::vector<double> together(32 * 32);
  const router<softmax> plain{.score = {}, .selection = {.k = 4}, .weight = sum_normalized};
  const assignment first = test::routed(
      plain, std::vector<float>(traces[0].logits.begin(), traces[0].logits.begin() + 2048 * 32),
      32);
  for (index_t t = 0; t < first.tokens(); ++t)
    for (const expert_id a : first.ids(t))
      for (const expert_id b : first.ids(t)) together[static_cast<std::size_t>(a * 32 + b)] += 1;
  const buddy_table buddies({together.data(), 32, 32}, 8);
  resident_set set(32);
  for (expert_id e = 0; e < 32; e += 3) set.insert(e);
  std::vector<residency_rule> all = rules(32, 4, buddies);
  all.push_back({.kind = kind::drop_cold, .strength = 0.4f});
  std::uint64_t hash = 0xcbf29ce484222325;
  const auto add = [&](std::uint32_t word) {
    for (int byte = 0; byte < 4; ++byte) hash = (hash ^ (word >> 8 * byte & 255)) * 0x100000001b3;
  };
  workspace ws;
  assignment a;
  for (const residency_rule& rule : all)
    for (index_t layer = 0; layer < traces[0].layers; ++layer) {
      route(resident_router(plain, rule, set), traces[0].layer(layer), ws, a);
      for (const expert_id e : a.ids()) add(static_cast<std::uint32_t>(e));
      for (const float w : a.weights()) add(std::bit_cast<std::uint32_t>(w));
    }
  INFO("0x" << std::hex << hash);
  CHECK(hash == 0xd01b3ed4a6620d11);
}

TEST_CASE("real logits miss, agree and lose as the study of the rules says") {
  // Per layer an LRU cache of `held` experts, empty at the start, asked for one choice after the
  // other: a plain-loop study in another language, on the Python trace.
  struct row {
    index_t held;
    kind rule;
    float strength;
    index_t ranks;
    double misses, agreement, mass;
  };
  constexpr row rows[] = {{8, kind::off, 0, 0, 1.5540, 1.0000, 0.0000},
                          {8, kind::cache_prior, 0.05f, 0, 1.1486, 0.8965, 0.0042},
                          {8, kind::cache_prior, 0.1f, 0, 0.8285, 0.8179, 0.0135},
                          {8, kind::cache_prior, 0.2f, 0, 0.4617, 0.7200, 0.0339},
                          {8, kind::cache_prior, 0.3f, 0, 0.3276, 0.6862, 0.0437},
                          {8, kind::max_rank, 0, 6, 0.9810, 0.8532, 0.0163},
                          {8, kind::max_rank, 0, 8, 0.6686, 0.7710, 0.0312},
                          {8, kind::max_rank, 0, 12, 0.3796, 0.6934, 0.0462},
                          {8, kind::margin_swap, 0.05f, 0, 1.1641, 0.8963, 0.0042},
                          {8, kind::margin_swap, 0.1f, 0, 0.8475, 0.8170, 0.0136},
                          {8, kind::margin_swap, 0.2f, 0, 0.4720, 0.7200, 0.0339},
                          {8, kind::drop_cold, 0.2f, 0, 0.8105, 0.7992, 0.0330},
                          {8, kind::drop_cold, 0.5f, 0, 0.3783, 0.6974, 0.0672},
                          {16, kind::off, 0, 0, 0.5594, 1.0000, 0.0000},
                          {16, kind::cache_prior, 0.05f, 0, 0.2850, 0.9333, 0.0022},
                          {16, kind::cache_prior, 0.1f, 0, 0.1550, 0.8958, 0.0056},
                          {16, kind::cache_prior, 0.2f, 0, 0.0743, 0.8573, 0.0100},
                          {16, kind::cache_prior, 0.3f, 0, 0.0400, 0.8441, 0.0123},
                          {16, kind::max_rank, 0, 6, 0.1409, 0.8930, 0.0093},
                          {16, kind::max_rank, 0, 8, 0.0590, 0.8611, 0.0127},
                          {16, kind::max_rank, 0, 12, 0.0310, 0.8423, 0.0137},
                          {16, kind::margin_swap, 0.05f, 0, 0.2875, 0.9334, 0.0022},
                          {16, kind::margin_swap, 0.1f, 0, 0.1575, 0.8958, 0.0056},
                          {16, kind::margin_swap, 0.2f, 0, 0.0746, 0.8574, 0.0100},
                          {16, kind::drop_cold, 0.2f, 0, 0.1938, 0.8956, 0.0148},
                          {16, kind::drop_cold, 0.5f, 0, 0.0603, 0.8529, 0.0262}};
  const auto traces = example::read_traces(MOEROUTE_MODEL_DIR);
  const router<softmax> plain{.score = {}, .selection = {.k = 4}, .weight = sum_normalized};
  workspace ws;
  assignment a;
  for (const row& want : rows) {
    residency_counts counts;
    double misses = 0;
    for (index_t layer = 0; layer < traces[0].layers; ++layer) {
      const auto z = traces[0].layer(layer);
      expert_cache cache({.experts = 32, .capacity = want.held});
      const residency_rule rule{.kind = want.rule, .strength = want.strength, .ranks = want.ranks};
      const resident_router moved(plain, rule, cache.resident(), &counts);
      for (index_t t = 0; t < z.rows; ++t) {
        route(moved, z.middle_rows(t, 1), ws, a);
        for (const expert_id e : a.ids(0))
          misses += double(cache.step(std::span(&e, 1)).loads.size());
      }
    }
    INFO(to_string(want.rule) << " " << want.strength << " " << want.ranks << " held "
                              << want.held);
    CHECK(std::abs(misses / double(counts.tokens) - want.misses) <= 0.01 * want.misses);
    CHECK(std::abs(counts.agreement() - want.agreement) <= 0.01 * want.agreement);
    CHECK(std::abs(counts.mass_lost() - want.mass) <= 0.01 * want.mass + 6e-5);
  }
}

TEST_CASE("a running range is the decayed mean of the tokens' own") {
  running_range mean(0.5f);
  CHECK(mean.value() == 0.0f);
  const float z[] = {1, 3, 2, -INFINITY, 0, 8, NAN, 4};
  mean.update({z, 2, 4});
  CHECK(mean.value() == 0.5f * 2 + 0.5f * 8);
  running_range last(0.0f);
  last.update({z, 2, 4});
  CHECK(last.value() == 8.0f);
  for (const auto& [decay, shown] :
       {std::pair{1.0f, "1.000000"}, {-0.5f, "-0.500000"}, {NAN, "nan"}})
    CHECK(test::refusal([&, of = decay] { running_range{of}; }) ==
          "moeroute::running_range: decay is " + std::string(shown) + ", expected 0 to below 1");
  running_range usual, said(0.99f);
  for (running_range* one : {&usual, &said}) one->update({z, 2, 4});
  CHECK((usual.value() == said.value() && usual.value() < 2.1f));
  const char* const names[] = {"off",  "prior", "maxrank", "mass",
                               "swap", "drop",  "buddy",   "within"};
  for (int i = 0; i < 8; ++i) CHECK(to_string(static_cast<kind>(i)) == std::string(names[i]));
  // The last column counts as the first, in more rows than columns and in fewer.
  const float ends[] = {0, 0, 5, 9, 0, 0, 0, -3, 1, 1, 1, 5};
  for (const auto& [rows, columns] : {std::pair<index_t, index_t>{3, 4}, {6, 2}, {1, 12}}) {
    running_range ranges(0.0f);
    ranges.update({ends, rows, columns});
    CHECK(ranges.value() == (columns == 12 ? 12.0f : 4.0f));
  }
  resident_set set(4);
  set.insert(0);
  const residency_rule rule{
      .kind = kind::cache_prior, .strength = 0.5f, .range = score_range::running, .running = &mean};
  const router<softmax> plain{.score = {}, .selection = {.k = 2}};
  // 0.5 * 5 lifts expert 0 from 0 above 2, which half of the token's own range would not.
  const assignment a = test::routed(resident_router(plain, rule, set), {0, 2, 1, 3}, 4);
  CHECK(test::listed(a.ids()) == std::vector<expert_id>{3, 0});
}

TEST_CASE(
    "buddies are who served with an expert most, the lowest id among equals, none by chance") {
  const double self = std::nan("");               // what nobody reads
  const double together[] = {self, 2, 2, 0,  5,   //
                             7,    9, 0, 0,  0,   //
                             2,    0, 9, 1,  1,   //
                             0,    0, 0, 99, 0,   //
                             1,    1, 1, 1,  0};  // by rows, whatever the columns say
  const buddy_table table({together, 5, 5}, 3);
  const expert_id expected[5][3] = {{4, 1, 2},
                                    {0, no_expert, no_expert},
                                    {0, 3, 4},
                                    {no_expert, no_expert, no_expert},
                                    {0, 1, 2}};
  for (expert_id e = 0; e < 5; ++e) {
    CHECK(std::ranges::equal(table.of(e), expected[e]));
    CHECK(buddy_table({together, 5, 5}, 1).of(e)[0] == expected[e][0]);
  }
}

TEST_CASE("a selection by rule comes alone only where its row fits, without the wrapper too") {
  const resident_set many(2048), some_held(300);
  const auto of = [](const residency_rule& rule, const resident_set& set) {
    return router<softmax, resident_selection<top_k>>{
        .score = {}, .selection = {.plain = {.k = 4}, .rule = rule, .set = set.view()}};
  };
  CHECK(of({.kind = kind::cache_prior, .strength = 0.1f}, many).rows_alone(2048) == 0);
  CHECK(of({.kind = kind::max_rank, .ranks = 100}, some_held).rows_alone(300) == 0);
  CHECK(of({.kind = kind::max_rank, .ranks = 8}, some_held).rows_alone(300) > 0);
}

TEST_CASE("what does not fit together is refused by name") {
  const router<softmax> plain{.score = {}, .selection = {.k = 4}};
  const resident_set set(32), small(16);
  const auto refused = [&](const residency_rule& rule, const resident_set& held) {
    return test::refusal(
        [&] { test::routed(resident_router(plain, rule, held), test::zeros(2, 32), 32); });
  };
  CHECK(refused({.kind = kind::cache_prior, .strength = 0.1f}, small) ==
        "moeroute::resident_router: set.experts is 16, expected 32");
  CHECK(refused({.kind = kind::cache_prior, .strength = -1}, set) ==
        "moeroute::residency_rule: strength is -1.000000, expected a finite number >= 0");
  CHECK(refused({.kind = kind::mass_threshold, .strength = 1.5f}, set) ==
        "moeroute::residency_rule: strength of mass_threshold is 1.500000, expected 0 to 1");
  CHECK(refused({.kind = kind::max_rank, .ranks = 3}, set) ==
        "moeroute::residency_rule: ranks is 3, expected 4 to 32");
  CHECK(refused({.kind = kind::max_rank, .ranks = 8, .forced = 5}, set) ==
        "moeroute::residency_rule: forced is 5, expected 0 to 4");
  CHECK(refused({.kind = kind::buddy}, set) ==
        "moeroute::residency_rule: kind is buddy, and there is no buddy_table");
  CHECK(refused({.kind = kind::cache_prior, .strength = 1, .range = score_range::running}, set) ==
        "moeroute::residency_rule: range is running, and there is no running_range");
  CHECK(test::refusal([] { resident_set(0); }) ==
        "moeroute::resident_set: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { resident_set(4).insert(4); }) ==
        "moeroute::resident_set: expert is 4, expected 0 to 3");
  const expert_table table = random_table(8, 2, 32, 1);
  CHECK(
      test::refusal([&] {
        resident_router(table_router<softmax>{.table = &table},
                        {.kind = kind::margin_swap, .strength = 1}, set);
      }) ==
      "moeroute::resident_router: the rule is swap, and this router does not choose by rank: drop "
      "is what it takes");
  const double negative[] = {0, -1, 2, 0};
  CHECK(test::refusal([&] { buddy_table({negative, 2, 2}, 1); }) ==
        "moeroute::buddy_table: co_activations is -1.000000, expected >= 0");
}

TEST_CASE("every number of a rule of memory is refused by its own name") {
  const resident_set small(16);
  test::random rng(3);
  const buddy_table buddies = some_buddies(rng, 32, 4), fewer = some_buddies(rng, 16, 4);
  const double pairs[] = {0, 1, 1, 1, 0, 1}, unknown[] = {0, NAN, 1, 0};
  const auto ruled = [&](const residency_rule& rule) { return [rule] { rule.check(32, 4); }; };
  const auto buddy = [&](residency_rule rule) {
    rule.kind = kind::buddy;
    if (rule.buddies == nullptr) rule.buddies = &buddies;
    return [rule] { rule.check(32, 4); };
  };
  const router<softmax, resident_selection<top_k>> bare{
      .score = {},
      .selection = {.plain = {.k = 4},
                    .rule = {.kind = kind::cache_prior, .strength = 0.1f},
                    .set = small.view()}};
  const test::refusals all{
      {[&] { buddy_table({pairs, 2, 3}, 1); }, "buddy_table: co_activations.cols is 3, expected 2"},
      {[&] { buddy_table({pairs, 0, 0}, 1); }, "buddy_table: experts is 0, expected 1 to 1048576"},
      {[&] { buddy_table({pairs, 2, 2}, 0); }, "buddy_table: most is 0, expected 1 to 2"},
      {[&] { buddy_table({pairs, 2, 2}, 3); }, "buddy_table: most is 3, expected 1 to 2"},
      {[&] { buddy_table({unknown, 2, 2}, 1); },
       "buddy_table: co_activations is nan, expected >= 0"},
      {ruled({.kind = kind::cache_prior, .strength = NAN}),
       "residency_rule: strength is nan, expected a finite number >= 0"},
      {ruled({.kind = kind::cache_prior, .strength = INFINITY}),
       "residency_rule: strength is inf, expected a finite number >= 0"},
      {ruled({.kind = kind::cache_prior, .forced = -1}),
       "residency_rule: forced is -1, expected 0 to 4"},
      {ruled({.kind = kind::max_rank, .ranks = 33}),
       "residency_rule: ranks is 33, expected 4 to 32"},
      {ruled({.kind = kind::margin_swap, .swaps = -1}),
       "residency_rule: swaps is -1, expected 0 to 1048576"},
      {buddy({.buddies = &fewer}), "residency_rule: buddies.experts() is 16, expected 32"},
      {buddy({.search = -1}), "residency_rule: search is -1, expected 0 to 4"},
      {buddy({.search = 5}), "residency_rule: search is 5, expected 0 to 4"},
      {buddy({.least_entropy = -1}), "residency_rule: least_entropy is -1.000000, expected >= 0"},
      {buddy({.least_entropy = NAN}), "residency_rule: least_entropy is nan, expected >= 0"},
      {buddy({.most_missing = 1.5f}), "residency_rule: most_missing is 1.500000, expected 0 to 1"},
      {buddy({.most_missing = -0.5f}),
       "residency_rule: most_missing is -0.500000, expected 0 to 1"},
      {[&] { bare.selection.check(32); }, "resident_selection: set.experts is 16, expected 32"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  const std::vector<std::function<void()>> ends{
      buddy({.search = 0, .least_entropy = 0, .most_missing = 0}), buddy({.most_missing = 1}),
      ruled({.kind = kind::mass_threshold, .strength = 1.0f}),
      ruled({.kind = kind::max_rank, .ranks = 32, .forced = 4}),
      ruled({.kind = kind::off, .strength = -1.0f})};
  for (const auto& accepted : ends) CHECK(test::refusal(accepted) == "accepted");
}

namespace {

residency_rule drawn_rule(test::random& rng, index_t experts, index_t k, const buddy_table& buddies,
                          const running_range& running) {
  const kind kinds[] = {kind::off,         kind::cache_prior, kind::max_rank, kind::mass_threshold,
                        kind::margin_swap, kind::drop_cold,   kind::buddy,    kind::within};
  residency_rule rule{.kind = kinds[rng.below(8)]};
  rule.strength = rng.below(8) == 0 ? 0.0f : rng.uniform();
  rule.ranks = rng.below(2) == 0 ? 0 : k + rng.below(std::min<index_t>(experts - k, 12) + 1);
  rule.forced = rng.below(std::min<index_t>(k, 3) + 1);
  if (rng.below(8) == 0) rule.forced = k;
  rule.swaps = rng.below(4);
  rule.range = rng.below(2) == 0 ? score_range::own : score_range::running;
  rule.running = &running;
  rule.dropped = rng.below(2) == 0 ? dropped_weight::lost : dropped_weight::shared_out;
  rule.buddies = &buddies;
  rule.search = rng.below(buddies.most() + 1);
  rule.least_entropy = rng.below(2) == 0 ? 0.0f : 2.0f * rng.uniform();
  rule.most_missing = rng.below(2) == 0 ? 1.0f : rng.uniform();
  return rule;
}

// What a router does under a rule to tokens that are masked, have a k of their own, or are alone.
// scores: what it chooses by. weight: of an expert by its logit, before weights are normalised.
template <class Router, class Weight>
void expect_rule_in_full(const Router& plain, const std::vector<float>& z,
                         const std::vector<float>& scores, index_t experts, test::random& rng,
                         Weight&& weight) {
  const index_t k = plain.k(), tokens = static_cast<index_t>(z.size()) / experts;
  const resident_set set = some_experts(rng, experts, 0.25f * static_cast<float>(rng.below(5)));
  std::set<expert_id> held;
  for_each_resident(set, [&](expert_id e) { held.insert(e); });
  const buddy_table buddies = some_buddies(rng, experts, std::min<index_t>(experts, 5));
  running_range running(0.5f);
  if (rng.below(4) > 0) running.update({z.data(), std::min<index_t>(tokens, 3), experts});
  residency_rule rule = drawn_rule(rng, experts, k, buddies, running);
  if (!std::isfinite(running.value())) rule.range = score_range::own;
  INFO(to_string(rule.kind) << " strength " << rule.strength << " ranks " << rule.ranks
                            << " forced " << rule.forced << " swaps " << rule.swaps << " running "
                            << (rule.range == score_range::running) << " held " << held.size()
                            << " E " << experts << " k " << k << " groups "
                            << plain.selection.groups);
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> own;
  for (index_t t = 0, some = rng.below(2), fewer = rng.below(2); t < tokens; ++t) {
    if (some != 0) mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    if (fewer != 0) own.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
  }
  residency_counts counts, want;
  const assignment a = test::routed(resident_router(plain, rule, set), z, experts,
                                    {.mask = mask, .k_of_token = own});
  const assignment counted = test::routed(resident_router(plain, rule, set, &counts), z, experts,
                                          {.mask = mask, .k_of_token = own});
  REQUIRE(test::listed(counted.ids()) == test::listed(a.ids()));
  // Experts of the groups that stay: all that a router of as many choices takes.
  Router wide = plain;
  wide.selection.k = experts / plain.selection.groups * plain.selection.topk_group;
  const assignment allowed = test::routed(wide, z, experts);
  for (index_t t = 0; t < tokens; ++t) {
    const auto at = static_cast<std::size_t>(t);
    INFO("token " << t << " own k " << (own.empty() ? -1 : own[at]));
    if (!mask.empty() && mask[at] == 0) {
      for (const expert_id e : a.ids(t)) REQUIRE(e == no_expert);
      for (const float w : a.weights(t)) REQUIRE(w == 0.0f);
      continue;
    }
    const std::vector<float> row(z.begin() + t * experts, z.begin() + (t + 1) * experts);
    const assignment alone = test::routed(
        resident_router(plain, rule, set), row, experts,
        {.k_of_token = std::span(own).subspan(own.empty() ? 0 : at, own.empty() ? 0 : 1)});
    REQUIRE(test::listed(alone.ids()) == test::listed(a.ids(t)));
    REQUIRE(std::ranges::equal(alone.weights(), a.weights(t),
                               [](float x, float y) { return x == y || (x != x && y != y); }));
    std::vector<float> s(row.size(), -INFINITY);
    for (const expert_id e : chosen(allowed, t))
      s[static_cast<std::size_t>(e)] = scores[static_cast<std::size_t>(t * experts + e)];
    const auto most = own.empty() ? static_cast<std::size_t>(k) : static_cast<std::size_t>(own[at]);
    const auto cut = [&](std::vector<expert_id> list) {
      if (list.size() > most) list.resize(most);
      return list;
    };
    const std::vector<expert_id> before = cut(oracle::choose({}, held, s, k));
    residency_rule moves = rule;
    if (rule.kind == kind::drop_cold) moves.kind = kind::off;
    std::vector<expert_id> ids = cut(oracle::choose(moves, held, s, k));
    std::vector<double> weights;
    double sum = 0.0;
    for (const expert_id e : ids) sum += weights.emplace_back(weight(row, e));
    for (double& w : weights) w /= sum;
    const bool sure = std::isfinite(sum) && sum > 0.0;
    if (rule.kind == kind::drop_cold && rule.active() && sure) {
      const double largest =
          weights.empty() ? 0.0 : *std::max_element(weights.begin(), weights.end());
      double kept = 0.0;
      for (std::size_t r = 0; r < ids.size(); ++r) {
        const bool leaves = static_cast<index_t>(r) >= rule.forced && !held.contains(ids[r]) &&
                            weights[r] < double{rule.strength} * largest;
        if (leaves) ids[r] = no_expert, weights[r] = 0.0;
        kept += weights[r];
      }
      for (double& w : weights) w *= rule.dropped == dropped_weight::lost ? 1.0 : 1.0 / kept;
    }
    if (rule.kind != kind::drop_cold || sure) {
      std::vector<expert_id> all = ids;
      all.resize(static_cast<std::size_t>(k), no_expert);
      REQUIRE(test::listed(a.ids(t)) == all);
    }
    for (std::size_t r = 0; sure && r < ids.size(); ++r)
      REQUIRE(std::abs(double{a.weights(t)[r]} - weights[r]) <= 2e-5);
    ++want.tokens;
    want.plain_choices += static_cast<std::int64_t>(before.size());
    std::int64_t made = 0;
    for (const expert_id e : a.ids(t)) {
      if (e == no_expert) continue;
      ++made;
      want.misses += !held.contains(e);
      const bool of_its_own = std::find(before.begin(), before.end(), e) != before.end();
      want.agreed += of_its_own;
      want.substitutions += !of_its_own;
    }
    want.choices += made;
    want.dropped += std::max<std::int64_t>(0, static_cast<std::int64_t>(before.size()) - made);
  }
  CHECK(counts.tokens == want.tokens);
  CHECK(counts.plain_choices == want.plain_choices);
  CHECK(counts.choices == want.choices);
  CHECK(counts.misses == want.misses);
  CHECK(counts.agreed == want.agreed);
  CHECK(counts.substitutions == want.substitutions);
  CHECK(counts.dropped == want.dropped);
}

}  // namespace

TEST_CASE("a rule of any fields does to a masked token, a k of its own and a group what loops do") {
  test::random rng(93);
  const test::shape shapes[] = {test::shape::normal, test::shape::quantised, test::shape::masked,
                                test::shape::half_nan, test::shape::plus_infs};
  for (int draw = 0; draw < 1200; ++draw) {
    INFO("draw " << draw);
    const index_t groups = rng.below(3) == 0 ? 2 + rng.below(4) : 1;
    const index_t size = 1 + rng.below(groups > 1 ? 20 : rng.below(6) == 0 ? 300 : 70);
    const index_t experts = groups * size, stay = groups == 1 ? 1 : 1 + rng.below(groups);
    const index_t most = size * stay;
    const top_k selection{
        .k = 1 + rng.below(std::min<index_t>(most, rng.below(8) == 0 ? 70 : 12)),
        .groups = groups,
        .topk_group = stay,
        .group_score = rng.below(2) == 0 ? group_score::max : group_score::top2_sum};
    const bool biased = rng.below(2) == 0;
    const index_t tokens = 1 + rng.below(20);
    const auto z =
        test::make_logits(shapes[rng.below(biased ? 3 : 5)], rng.bits(), tokens, experts);
    std::vector<float> s(z.size());
    if (!biased) {
      const router<softmax> plain{.score = {}, .selection = selection, .weight = sum_normalized};
      // Groups are weighed by sums of scores, which are what is chosen by then.
      for (index_t t = 0; t < tokens; ++t)
        softmax::score_row(z.data() + t * experts, experts, s.data() + t * experts);
      expect_rule_in_full(plain, z, plain.selects_on_logits() ? z : s, experts, rng,
                          [](const std::vector<float>& row, expert_id e) {
                            float top = -INFINITY;
                            for (const float x : row) top = x > top ? x : top;
                            return std::exp(double{row[static_cast<std::size_t>(e)]} - double{top});
                          });
      continue;
    }
    std::vector<float> bias(static_cast<std::size_t>(experts));
    for (float& b : bias) b = 0.3f * rng.normal();
    for (index_t t = 0; t < tokens; ++t) {
      sigmoid::score_row(z.data() + t * experts, experts, s.data() + t * experts);
      for (index_t e = 0; e < experts; ++e) {
        const auto at = static_cast<std::size_t>(t * experts + e);
        s[at] = z[at] > -INFINITY ? s[at] + bias[static_cast<std::size_t>(e)] : -INFINITY;
      }
    }
    expect_rule_in_full(router<sigmoid>{.score = {},
                                        .selection = selection,
                                        .weight = sum_normalized,
                                        .bias = selection_bias(bias)},
                        z, s, experts, rng, [](const std::vector<float>& row, expert_id e) {
                          return 1.0 / (1.0 + std::exp(-double{row[static_cast<std::size_t>(e)]}));
                        });
  }
}

TEST_CASE("experts that are all there keep their weights, of infinite logits too") {
  resident_set set(8);
  for (expert_id e = 0; e < 8; ++e) set.insert(e);
  const router<identity_score, top_k> plain{.selection = {.k = 3}};
  const resident_router rule(plain, residency_rule{.kind = kind::drop_cold, .strength = 0.1f}, set);
  // One row goes another way than a block of them.
  for (const index_t tokens : {1, 20}) {
    std::vector<float> z;
    for (index_t t = 0; t < tokens; ++t)
      for (const float x : {test::infinity, test::infinity, 2.0f, 1.0f, 0.0f, 0.0f, 0.0f, 0.0f})
        z.push_back(x);
    const assignment a = test::routed(rule, z, 8), b = test::routed(plain, z, 8);
    CHECK(std::ranges::equal(a.ids(), b.ids()));
    CHECK(std::ranges::equal(a.weights(), b.weights()));
  }
}

}  // namespace resident_router_test
