#include <moeroute/policy/row/table.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
#include <moeroute/policy/row/replay.hpp>
#include <set>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;
using test::zeros;

TEST_CASE("a table's experts do not depend on the logits, its weights do") {
  const expert_table table({3, 1, 0, 2}, 2, 4);
  const std::vector<std::int32_t> ids = {1, 0, 1};
  const table_router<sigmoid> router{.table = &table, .weight = sum_normalized};
  const std::vector<float> logits = test::make_logits(test::shape::normal, 1, 3, 4);
  const assignment a = routed(router, logits, 4, {.token_ids = ids});
  CHECK(test::listed(a.ids()) == std::vector<expert_id>{0, 2, 3, 1, 0, 2});
  for (index_t t = 0; t < 3; ++t) CHECK(std::abs(a.weights(t)[0] + a.weights(t)[1] - 1) < 1e-6f);
  CHECK(a.weights(0)[0] != a.weights(2)[0]);
  const assignment b = routed(router, zeros(3, 4), 4, {.token_ids = ids});
  CHECK(test::bit_difference(a.ids(), b.ids()) == "");
  CHECK(b.weights(0)[0] == 0.5f);
}

TEST_CASE(
    "the softmax of a table's choices is over all experts, also where the largest is not one") {
  const expert_table table({1, 2}, 2, 3);
  const std::vector<std::int32_t> ids = {0};
  const auto weights = [&](float largest) {
    const assignment a = routed(table_router<softmax>{.table = &table}, {largest, 1.0f, 2.0f}, 3,
                                {.token_ids = ids});
    return test::listed(a.weights(0));
  };
  const double all = std::exp(9.0) + std::exp(1.0) + std::exp(2.0);
  CHECK(test::difference(weights(9.0f),
                         std::vector<double>{std::exp(1.0) / all, std::exp(2.0) / all},
                         1e-6) == "");
  // So far above the chosen that exp overflows where it is not taken below the row's maximum.
  for (const float largest : {100.0f, 150.0f, test::infinity})
    for (const float w : weights(largest)) CHECK((w >= 0.0f && w < 1e-30f));
}

TEST_CASE("a table's expert that is masked in the logits, or that is none, is no choice") {
  const expert_table table({2, no_expert, 0}, 3, 3);
  const std::vector<std::int32_t> ids = {0};
  const assignment a =
      routed(table_router<sqrt_softplus>{.table = &table, .weight = sum_normalized},
             {1.0f, 1.0f, test::not_a_number}, 3, {.token_ids = ids});
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{no_expert, no_expert, 0});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{0.0f, 0.0f, 1.0f});
}

TEST_CASE("equal shares of one token have the bits that they have in a block, whatever is masked") {
  const expert_table table({2, no_expert, 0, 4, 1, 3, no_expert, no_expert, no_expert, 0, 3, 2}, 3,
                           5);
  const std::vector<std::int32_t> ids = {0, 1, 2, 3, 3, 2, 1, 0, 1, 1, 3, 0, 2, 0, 3, 1};
  std::vector<float> logits = test::make_logits(test::shape::normal, 2, 16, 5);
  for (std::size_t i = 0; i < logits.size(); i += 3) logits[i] = test::not_a_number;
  for (std::size_t i = 0; i < logits.size(); i += 7) logits[i] = -test::infinity;
  for (const auto normalize : {normalization::none, normalization::sum, normalization::lp})
    for (const float scale : {1.0f, 2.5f, -0.3f})
      for (const float divide : {1.0f, 3.0f}) {
        const weight_rule weight{
            .normalize = normalize, .p = 2.0f, .divide = divide, .scale = scale};
        const table_router<uniform_score> router{.table = &table, .weight = weight};
        const assignment block = routed(router, logits, 5, {.token_ids = ids});
        for (index_t t = 0; t < 16; ++t) {
          const std::vector<std::int32_t> id = {ids[static_cast<std::size_t>(t)]};
          const std::vector<float> row(logits.begin() + t * 5, logits.begin() + (t + 1) * 5);
          const assignment alone = routed(router, row, 5, {.token_ids = id});
          CHECK(test::bit_difference(alone.ids(), block.ids(t)) == "");
          CHECK(test::bit_difference(alone.weights(), block.weights(t)) == "");
        }
      }
}

TEST_CASE("random tables have distinct experts, replay, and use every expert about equally") {
  const expert_table table = random_table(4000, 2, 16, 5);
  CHECK(table.vocabulary() == 4000);
  std::vector<int> load(16, 0);
  for (index_t t = 0; t < 4000; ++t) {
    const auto row = table.of(t);
    CHECK(row[0] != row[1]);
    for (const expert_id e : row) ++load[static_cast<std::size_t>(e)];
  }
  // 500 expected, standard deviation 22.
  for (const int n : load) CHECK((n > 380 && n < 620));
  const expert_table again = random_table(4000, 2, 16, 5), other = random_table(4000, 2, 16, 6);
  int same = 0;
  for (index_t t = 0; t < 4000; ++t) {
    CHECK(std::ranges::equal(table.of(t), again.of(t)));
    same += std::ranges::equal(table.of(t), other.of(t)) ? 1 : 0;
  }
  CHECK(same < 100);
}

TEST_CASE(
    "a balanced table's fullest expert has at most one token's frequency more than the mean") {
  test::random rng(9);
  std::vector<std::int64_t> frequency;
  for (int i = 1; i <= 3000; ++i) frequency.push_back(1'000'000 / i + rng.below(3));
  const expert_table table = balanced_table(frequency, 24);
  std::vector<std::int64_t> load(24, 0);
  std::int64_t all = 0;
  for (std::size_t t = 0; t < frequency.size(); ++t) {
    load[static_cast<std::size_t>(table.of(static_cast<index_t>(t))[0])] += frequency[t];
    all += frequency[t];
  }
  CHECK(*std::ranges::max_element(load) <= all / 24 + *std::ranges::max_element(frequency));
  // The most frequent first, each to the lowest of the experts with the least so far.
  std::vector<std::size_t> order(frequency.size());
  for (std::size_t t = 0; t < order.size(); ++t) order[t] = t;
  std::ranges::stable_sort(order, std::greater<>(), [&](std::size_t t) { return frequency[t]; });
  std::vector<std::int64_t> so_far(24, 0);
  for (const std::size_t t : order) {
    const auto least = std::ranges::min_element(so_far);
    *least += frequency[t];
    REQUIRE(table.of(static_cast<index_t>(t))[0] == least - so_far.begin());
  }
  // Below the random table's, on a popularity law.
  std::vector<std::int64_t> chance(24, 0);
  const expert_table random = random_table(3000, 1, 24, 1);
  for (std::size_t t = 0; t < frequency.size(); ++t)
    chance[static_cast<std::size_t>(random.of(static_cast<index_t>(t))[0])] += frequency[t];
  CHECK(*std::ranges::max_element(load) < *std::ranges::max_element(chance));
}

TEST_CASE("a clustered table sends a cluster to one expert") {
  const std::vector<std::int32_t> cluster = {0, 5, 7, 5, 12};
  const expert_table table = clustered_table(cluster, 5);
  std::vector<expert_id> ids;
  for (index_t t = 0; t < 5; ++t) ids.push_back(table.of(t)[0]);
  CHECK(ids == std::vector<expert_id>{0, 0, 2, 0, 2});
}

TEST_CASE("a bigram's row depends on both ids and on nothing else") {
  const expert_table table = random_table(64, 1, 1 << 10, 3);
  const std::vector<std::int32_t> ids = {7, 9, 7, 9, 8, 9};
  const table_router<uniform_score> router{.table = &table, .key = table_key::bigram};
  const assignment a = routed(router, zeros(6, 1 << 10), 1 << 10, {.token_ids = ids});
  CHECK(a.ids(1)[0] == a.ids(3)[0]);
  std::set<expert_id> others{a.ids(0)[0], a.ids(2)[0], a.ids(5)[0]};
  CHECK(others.size() == 3);
  CHECK_FALSE(others.contains(a.ids(1)[0]));
}

TEST_CASE("a bigram has the row of its two ids wherever it stands in the batch") {
  const expert_table table = random_table(64, 1, 1 << 10, 3);
  constexpr index_t tokens = 50;
  std::vector<std::int32_t> ids;
  for (int t = 0; t < tokens; ++t) ids.push_back(t % 3);
  const table_router<uniform_score> router{.table = &table, .key = table_key::bigram};
  const assignment a = routed(router, zeros(tokens, 1 << 10), 1 << 10, {.token_ids = ids});
  CHECK(a.ids(0)[0] != a.ids(3)[0]);  // nothing stands before the first
  for (index_t t = 4; t < tokens; ++t) {
    INFO("token " << t);
    CHECK(a.ids(t)[0] == a.ids(t - 3)[0]);
  }
}

TEST_CASE("tables reach the last of a million experts") {
  const expert_table table({(1 << 20) - 1}, 1, 1 << 20);
  const std::vector<std::int32_t> ids = {0};
  const assignment a = routed(table_router<uniform_score>{.table = &table}, zeros(1, 1 << 20),
                              1 << 20, {.token_ids = ids});
  CHECK(a.ids(0)[0] == (1 << 20) - 1);
}

TEST_CASE("tables with wrong sizes, experts out of range or twice in a token are refused") {
  const auto refused = [](std::vector<expert_id> ids, index_t k, index_t experts) {
    return test::refusal([&] { expert_table(std::move(ids), k, experts); });
  };
  CHECK(refused({0, 1, 2}, 2, 4) ==
        "moeroute::expert_table: ids.size() is 3, expected a multiple of k = 2");
  CHECK(refused({0, 1, 2, 4}, 2, 4) ==
        "moeroute::expert_table: token id 1 has expert 4, expected -1 to 3");
  CHECK(refused({0, -2}, 2, 4) ==
        "moeroute::expert_table: token id 0 has expert -2, expected -1 to 3");
  CHECK(refused({0, 1, 3, 3}, 2, 4) ==
        "moeroute::expert_table: token id 1 has expert 3 twice, expected distinct experts");
  CHECK(refused({}, 5, 4) == "moeroute::expert_table: k is 5, expected 1 to 4");
  CHECK(refused({}, 0, 4) == "moeroute::expert_table: k is 0, expected 1 to 4");
  CHECK(refused({}, 1, 0) == "moeroute::expert_table: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { clustered_table(std::vector<std::int32_t>{1, -1}, 4); }) ==
        "moeroute::clustered_table: cluster of token id 1 is -1, expected >= 0");
  CHECK(test::refusal([] { clustered_table(std::vector<std::int32_t>{1}, 0); }) ==
        "moeroute::clustered_table: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { random_table(4, 5, 4, 1); }) ==
        "moeroute::random_table: k is 5, expected 1 to 4");
  CHECK(test::refusal([] { balanced_table(std::vector<std::int64_t>{1, -1}, 4); }) ==
        "moeroute::balanced_table: frequency of token id 1 is -1, expected >= 0");
}

TEST_CASE("a router without its table or token ids, or with ids outside the table, is refused") {
  const expert_table table({0, 1}, 1, 4);
  const auto refused = [&](const table_router<uniform_score>& router,
                           const std::vector<std::int32_t>& ids) {
    return test::refusal([&] { routed(router, zeros(1, 4), 4, {.token_ids = ids}); });
  };
  CHECK(refused({}, {0}) == "moeroute::table_router: table is missing");
  CHECK(refused({.table = &table}, {}) ==
        "moeroute::table_router: side_inputs::token_ids is missing");
  CHECK(refused({.table = &table}, {2}) ==
        "moeroute::table_router: token id is 2, expected 0 to 1");
  CHECK(refused({.table = &table}, {-1}) ==
        "moeroute::table_router: token id is -1, expected 0 to 1");
  const expert_table empty({}, 1, 4);
  CHECK(refused({.table = &empty, .key = table_key::bigram}, {0}) ==
        "moeroute::table_router: table rows is 0, expected 1 to 1099511627776");
  CHECK(test::refusal([&] {
          const std::vector<std::int32_t> ids = {0};
          routed(table_router<uniform_score>{.table = &table}, zeros(1, 5), 5, {.token_ids = ids});
        }) == "moeroute::table_router: table experts is 4, expected 5");
}

TEST_CASE("a masked token's id is not looked at") {
  const expert_table table({0, 1, 1, 3}, 2, 4);
  const std::vector<std::int32_t> ids = {1, 0, -100};
  const std::vector<std::uint8_t> mask = {1, 1, 0};
  const table_router<uniform_score> router{.table = &table, .weight = sum_normalized};
  const assignment a = routed(router, zeros(3, 4), 4, {.token_ids = ids, .mask = mask});
  CHECK(test::listed(a.ids()) == std::vector<expert_id>{1, 3, 0, 1, no_expert, no_expert});
}

TEST_CASE("with every option at once a table's rows are looked up and weighed, and so replayed") {
  test::random rng(79);
  const auto agrees = [&]<class Score>(Score) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(40), tokens = 1 + rng.below(40),
                  k = 1 + rng.below(std::min<index_t>(experts, 18)), vocabulary = 1 + rng.below(20);
    const std::uint64_t table_seed = rng.bits();
    std::vector<expert_id> listed;
    const expert_table full = random_table(vocabulary, k, experts, table_seed);
    for (index_t row = 0; row < vocabulary; ++row)
      for (const expert_id e : full.of(row)) listed.push_back(rng.below(6) == 0 ? no_expert : e);
    const expert_table table(listed, k, experts);
    std::vector<float> z = test::make_logits(test::shape::normal, rng.bits() % 1000, tokens,
                                             experts),
                       by_expert;
    for (float& x : z)
      if (const auto odd = rng.below(12); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    for (index_t e = 0; e < experts; ++e) by_expert.push_back(0.5f + rng.uniform());
    table_router<Score> rule{.table = &table};
    if (coin()) rule.key = table_key::bigram;
    if (coin()) rule.weight = sum_normalized;
    if (coin()) rule.weight.scale = 2.5f;
    if (rng.below(3) == 0) rule.weight.divide = 2.0f;
    if (rng.below(3) == 0) rule.weight.expert_scale = by_expert;
    if (rng.below(3) == 0) rule.transform.temperature = 2.0f;
    std::vector<std::int32_t> token, own;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t) {
      token.push_back(static_cast<std::int32_t>(rng.below(vocabulary)));
      own.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    }
    side_inputs side{.token_ids = token};
    if (coin()) side.k_of_token = own;
    if (coin()) side.mask = mask;
    std::vector<expert_id> ids, recorded;
    std::vector<double> weights;
    for (index_t t = 0; t < tokens; ++t) {
      index_t row = token[static_cast<std::size_t>(t)];
      if (rule.key == table_key::bigram)
        row = random_below(
            static_cast<std::uint32_t>(vocabulary), 0,
            static_cast<std::uint32_t>(t > 0 ? token[static_cast<std::size_t>(t - 1)] : -1),
            static_cast<std::uint32_t>(row));
      const float* const logits = z.data() + t * experts;
      double sum = 0.0, all = 0.0, most = -HUGE_VAL;
      const auto at = [&](index_t e) {
        return static_cast<double>(logits[e]) / static_cast<double>(rule.transform.temperature);
      };
      for (index_t e = 0; e < experts; ++e)
        if (logits[e] > -test::infinity) most = std::max(most, at(e));
      for (index_t e = 0; e < experts; ++e)
        if (logits[e] > -test::infinity) all += std::exp(at(e) - most);
      const auto first = static_cast<std::ptrdiff_t>(ids.size());
      for (index_t r = 0; r < k; ++r) {
        const expert_id named = table.of(row)[static_cast<std::size_t>(r)];
        const bool there = named != no_expert && logits[named] > -test::infinity,
                   cut = side.masked(t) ||
                         (!side.k_of_token.empty() && r >= own[static_cast<std::size_t>(t)]);
        recorded.push_back(named);
        ids.push_back(there && !cut ? named : no_expert);
        double score = 1.0;
        if constexpr (std::is_same_v<Score, softmax>)
          score = std::exp(at(std::max(named, 0)) - most) / all;
        if constexpr (std::is_same_v<Score, sigmoid>)
          score = 1.0 / (1.0 + std::exp(-at(std::max(named, 0))));
        weights.push_back(ids.back() == no_expert ? 0.0 : score);
        sum += weights.back();
      }
      for (std::size_t c = static_cast<std::size_t>(first); c < ids.size(); ++c) {
        if (rule.weight.normalize == normalization::sum && sum > 0.0) weights[c] /= sum;
        weights[c] *=
            static_cast<double>(rule.weight.scale) / static_cast<double>(rule.weight.divide);
        if (!rule.weight.expert_scale.empty() && ids[c] != no_expert)
          weights[c] *= static_cast<double>(by_expert[static_cast<std::size_t>(ids[c])]);
      }
    }
    INFO("T=" << tokens << " E=" << experts << " k=" << k << " rows " << vocabulary << " key "
              << static_cast<int>(rule.key));
    const assignment a = routed(rule, z, experts, side);
    CHECK(test::listed(a.ids()) == ids);
    CHECK(test::difference(a.weights(), weights, 3e-6, 1e-36) == "");
    // The record of what the table names decides the same, to the bit.
    assignment named;
    named.reset(tokens, experts, k);
    std::copy(recorded.begin(), recorded.end(), named.ids().begin());
    routing_record<std::int32_t> record;
    record.record(named);
    side.token_ids = {};
    const assignment b = routed(
        replay<Score, std::int32_t>{&record, {}, rule.weight, rule.transform}, z, experts, side);
    CHECK(test::listed(b.ids()) == ids);
    CHECK(test::bit_difference(b.weights(), a.weights()) == "");
  };
  for (index_t round = 0; round < 60; ++round) {
    agrees(softmax{});
    agrees(sigmoid{});
    agrees(uniform_score{});
  }
}

TEST_CASE("a random table is drawn by token id and by how often was drawn for it") {
  for (const auto& [k, experts] : {std::pair<index_t, index_t>{1, 1}, {3, 3}, {4, 9}}) {
    const expert_table table = random_table(30, k, experts, 11);
    for (index_t t = 0; t < 30; ++t) {
      std::vector<expert_id> row;
      for (std::uint64_t draw = 0; static_cast<index_t>(row.size()) < k; ++draw) {
        const auto e = static_cast<expert_id>(random_below(static_cast<std::uint32_t>(experts), 11,
                                                           static_cast<std::uint64_t>(t), draw));
        if (std::ranges::count(row, e) == 0) row.push_back(e);
      }
      CHECK(test::listed(table.of(t)) == row);
    }
  }
}

TEST_CASE("tables may be of any size that ids can tell, and no other") {
  const std::vector<std::int64_t> frequency{3, 0, 5};
  const std::vector<std::int32_t> cluster{0};
  const test::refusals all{
      {[] { random_table(0, 1, 1, 1); }, "accepted"},
      {[] { random_table(-1, 1, 1, 1); },
       "moeroute::random_table: vocabulary is -1, expected 0 to 2147483647"},
      {[] { random_table(index_t{1} << 31, 1, 1, 1); },
       "moeroute::random_table: vocabulary is 2147483648, expected 0 to 2147483647"},
      {[] { random_table(4, 1, 0, 1); },
       "moeroute::random_table: experts is 0, expected 1 to 1048576"},
      {[] { random_table(4, 1, max_experts + 1, 1); },
       "moeroute::random_table: experts is 1048577, expected 1 to 1048576"},
      {[] { random_table(1, 1, max_experts, 1); }, "accepted"},
      {[] { random_table(4, 0, 4, 1); }, "moeroute::random_table: k is 0, expected 1 to 4"},
      {[&] { balanced_table(frequency, 0); },
       "moeroute::balanced_table: experts is 0, expected 1 to 1048576"},
      {[&] { balanced_table(frequency, max_experts + 1); },
       "moeroute::balanced_table: experts is 1048577, expected 1 to 1048576"},
      {[&] { balanced_table(frequency, 1); }, "accepted"},
      {[&] { clustered_table(cluster, max_experts + 1); },
       "moeroute::clustered_table: experts is 1048577, expected 1 to 1048576"},
      {[&] { clustered_table(cluster, 1); }, "accepted"},
      {[] { expert_table({}, 1, max_experts + 1); },
       "moeroute::expert_table: experts is 1048577, expected 1 to 1048576"},
      {[] { expert_table({0, no_expert, 3, no_expert, no_expert, no_expert}, 3, 4); }, "accepted"},
  };
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == message);
  const expert_table nothing;
  CHECK((nothing.k() == 1 && nothing.experts() == 1 && nothing.vocabulary() == 0));
  CHECK((table_router<softmax>{}.k() == 1 && table_router<softmax>{}.key == table_key::token));
  CHECK(replay<softmax, std::uint8_t>{}.k() == 1);
  const expert_table one({0}, 1, 4);
  table_router<softmax> rule{.table = &one};
  rule.weight.divide = 0.0f;
  CHECK(test::refusal([&] { rule.check(4); }) ==
        "moeroute::weight_rule: divide is 0.000000, expected > 0");
  rule.weight.divide = 1.0f;
  rule.transform.temperature = 0.0f;
  CHECK(test::refusal([&] { rule.check(4); }) ==
        "moeroute::logit_transform: temperature is 0.000000, expected > 0");
  routing_record<std::uint8_t> record;
  record.record(
      routed(table_router<softmax>{.table = &one}, zeros(1, 4), 4, {.token_ids = cluster}));
  replay<softmax, std::uint8_t> again{.record = &record, .weight = {.divide = 0.0f}};
  CHECK(test::refusal([&] { again.check(4); }) ==
        "moeroute::weight_rule: divide is 0.000000, expected > 0");
  again.weight.divide = 1.0f;
  again.transform.temperature = 0.0f;
  CHECK(test::refusal([&] { again.check(4); }) ==
        "moeroute::logit_transform: temperature is 0.000000, expected > 0");
}

TEST_CASE("tables and records with equal shares look at no logits, unless they transform them") {
  const expert_table table({2, 0, 1, 3}, 2, 4);
  const std::vector<std::int32_t> ids{1, 0, 1};
  routing_record<std::uint8_t> record;
  const table_router<uniform_score> rule{.table = &table, .weight = sum_normalized};
  const assignment a = routed(rule, zeros(3, 4), 4, {.token_ids = ids});
  record.record(a);
  const replay<uniform_score, std::uint8_t> again{.record = &record, .weight = sum_normalized};
  CHECK_FALSE(rule.reads_logits());
  CHECK_FALSE(again.reads_logits());
  CHECK(table_router<softmax>{}.reads_logits());
  CHECK(replay<softmax, std::uint8_t>{}.reads_logits());
  CHECK(table_router<uniform_score>{.transform = {.temperature = 2.0f}}.reads_logits());
  CHECK(replay<uniform_score, std::uint8_t>{.transform = {.temperature = 2.0f}}.reads_logits());
  // One token alone, and a block of them.
  workspace ws;
  assignment none;
  for (const index_t tokens : {1, 16}) {
    const std::vector<std::int32_t> ones(static_cast<std::size_t>(tokens), 1);
    const matrix_view<const float> no_logits(nullptr, tokens, 4, tokens == 1 ? 0 : 4);
    route(rule, no_logits, {.token_ids = ones}, ws, none);
    for (index_t t = 0; t < tokens; ++t) {
      CHECK(test::listed(none.ids(t)) == std::vector<expert_id>{1, 3});
      CHECK(test::listed(none.weights(t)) == std::vector<float>{0.5f, 0.5f});
    }
  }
}
