#include <moeroute/policy/row/table.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
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
