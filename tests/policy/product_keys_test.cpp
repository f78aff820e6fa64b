#include <moeroute/policy/row/product_keys.hpp>

#include <catch2/catch_test_macros.hpp>
#include <string>
#include <utility>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;

namespace {

// All n m sums, one by one.
void is_the_top_k_of_all_sums(test::shape s, index_t n, index_t m, index_t k, index_t tokens) {
  const std::vector<float> logits = test::make_logits(s, 6, tokens, n + m);
  const product_keys<> rule{.choices = k, .first_keys = n == m ? 0 : n};
  const assignment a = routed(rule, logits, n + m);
  INFO(test::name(s) << ", n = " << n << ", m = " << m << ", k = " << k);
  REQUIRE(a.experts() == n * m);
  for (index_t t = 0; t < tokens; ++t) {
    const float* row = logits.data() + t * (n + m);
    std::vector<float> sums;
    for (index_t i = 0; i < n; ++i)
      for (index_t j = 0; j < m; ++j) {
        const float sum = row[i] + row[n + j];
        sums.push_back(sum == sum ? sum : -test::infinity);
      }
    const std::vector<expert_id> ids = oracle::top_k(sums.data(), n * m, k);
    REQUIRE(test::bit_difference(a.ids(t), ids) == "");
    const std::vector<double> score = oracle::softmax(sums.data(), n * m, ids);
    std::vector<double> weight;
    for (const expert_id e : ids) weight.push_back(e < 0 ? 0 : score[static_cast<std::size_t>(e)]);
    REQUIRE(test::difference(a.weights(t), weight, 3e-6, 1e-36) == "");
  }
}

}  // namespace

TEST_CASE("product keys choose what a top-k of all sums chooses, ties by the lowest id") {
  for (const test::shape s : test::all_shapes)
    for (const index_t n : {1, 2, 5, 16, 33})
      for (const index_t k : {1, 2, 7, 16, 64})
        if (k <= n * n) is_the_top_k_of_all_sums(s, n, n, k, 17);
}

TEST_CASE("product keys may choose every expert") {
  for (const test::shape s : {test::shape::quantised, test::shape::masked, test::shape::all_equal})
    is_the_top_k_of_all_sums(s, 9, 9, 81, 3);
}

TEST_CASE("product keys reach a million experts") {
  for (const test::shape s : {test::shape::quantised, test::shape::normal, test::shape::zipf})
    is_the_top_k_of_all_sums(s, test::sized(1024, 256), test::sized(1024, 256), 16, 2);
  // The last of all wins where both its halves do.
  std::vector<float> logits(2048, 0.0f);
  logits[1023] = logits[2047] = 1.0f;
  CHECK(routed(product_keys<>{.choices = 1}, logits, 2048).ids(0)[0] == (1 << 20) - 1);
}

TEST_CASE("a half without finite logits leaves nothing to choose") {
  const std::vector<float> logits = {test::not_a_number, -test::infinity, 1.0f, 2.0f};
  const assignment a = routed(product_keys<>{.choices = 2}, logits, 4);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{no_expert, no_expert});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{0.0f, 0.0f});
}

TEST_CASE("halves that differ, too many experts, and k beyond n^2 are refused") {
  const auto refused = [](index_t k, index_t columns) {
    return test::refusal([&] { product_keys<>{.choices = k}.check(columns); });
  };
  CHECK(refused(1, 7) == "moeroute::product_keys: columns is 7, expected two halves");
  CHECK(refused(1, 0) == "moeroute::product_keys: columns is 0, expected two halves");
  CHECK(refused(1, 2050) == "moeroute::product_keys: E is 1050625, expected 1 to 1048576");
  CHECK(refused(5, 4) == "moeroute::product_keys: k is 5, expected 1 to 4");
}

TEST_CASE("with every option at once product keys are a top-k of all sums") {
  test::random rng(83);
  const auto agrees = [&]<class Score>(Score) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t n = 1 + rng.below(12), m = coin() ? n : 1 + rng.below(20), experts = n * m,
                  k = 1 + rng.below(std::min<index_t>(experts, 40)), tokens = 1 + rng.below(20);
    product_keys<Score> rule{.choices = k, .first_keys = n == m && coin() ? 0 : n};
    if (coin()) rule.weight = sum_normalized;
    if (coin()) rule.weight.scale = 2.5f;
    const test::shape shapes[] = {test::shape::normal, test::shape::quantised,
                                  test::shape::all_equal, test::shape::masked};
    const auto seed = rng.bits() % 1000;
    auto z = test::make_logits(shapes[rng.below(4)], seed, tokens, n + m);
    for (float& x : z)
      if (rng.below(24) == 0) x = coin() ? test::not_a_number : -test::infinity;
    const bool endless = coin();
    for (float& x : z)
      if (endless && rng.below(16) == 0) x = test::infinity;
    std::vector<std::int32_t> own;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t) {
      own.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    }
    side_inputs side;
    if (coin()) side.k_of_token = own;
    if (coin()) side.mask = mask;
    const assignment a = routed(rule, z, n + m, side);
    INFO("n = " << n << ", m = " << m << ", k = " << k << ", T = " << tokens);
    REQUIRE(a.experts() == experts);
    std::string broken;
    for (index_t t = 0; t < tokens; ++t) {
      const float* const row = z.data() + t * (n + m);
      std::vector<float> sums;
      for (index_t i = 0; i < n; ++i)
        for (index_t j = 0; j < m; ++j) {
          const float sum = row[i] + row[n + j];
          sums.push_back(sum == sum ? sum : -test::infinity);
        }
      std::vector<expert_id> ids = oracle::top_k(sums.data(), experts, k);
      for (index_t r = 0; r < k; ++r)
        if (side.masked(t) || (!side.k_of_token.empty() && r >= own[static_cast<std::size_t>(t)]))
          ids[static_cast<std::size_t>(r)] = no_expert;
      const auto score = oracle::softmax(
          sums.data(), experts,
          std::is_same_v<Score, softmax> ? oracle::order(sums.data(), experts) : ids);
      std::vector<double> weight;
      double sum = 0.0;
      for (const expert_id e : ids) {
        weight.push_back(e < 0 ? 0.0 : score[static_cast<std::size_t>(e)]);
        sum += weight.back();
      }
      for (double& w : weight) {
        if (rule.weight.normalize == normalization::sum && sum > 0.0) w /= sum;
        w *= static_cast<double>(rule.weight.scale);
      }
      if (broken.empty()) broken = test::bit_difference(a.ids(t), ids);
      if (broken.empty()) broken = test::difference(a.weights(t), weight, 5e-6, 1e-36);
    }
    CHECK(broken == "");
  };
  for (index_t round = 0; round < 80; ++round) {
    agrees(softmax{});
    agrees(softmax_selected{});
  }
}

TEST_CASE("product keys choose more than may be gathered at once") {
  for (const test::shape s : {test::shape::normal, test::shape::quantised, test::shape::all_equal,
                              test::shape::ascending, test::shape::descending, test::shape::zipf})
    for (const index_t k : {150, 300}) is_the_top_k_of_all_sums(s, 33, 33, k, 2);
  // More keys on one side than all else needs room for.
  for (const auto& [n, m] : {std::pair<index_t, index_t>{500, 3}, {3, 500}, {500, 65}, {65, 500}})
    is_the_top_k_of_all_sums(test::shape::normal, n, m, 66, 16);
}

TEST_CASE("product keys need keys on both sides, and no more experts than there may be") {
  const auto refused = [](const product_keys<>& rule, index_t columns) {
    return test::refusal([&] { rule.check(columns); });
  };
  CHECK(refused({.choices = 1, .first_keys = -1}, 8) ==
        "moeroute::product_keys: first_keys is -1, expected 1 to 7");
  CHECK(refused({.choices = 1, .first_keys = 8}, 8) ==
        "moeroute::product_keys: first_keys is 8, expected 1 to 7");
  for (const index_t n : {1, 7}) CHECK(refused({.choices = 1, .first_keys = n}, 8) == "accepted");
  CHECK(refused({.choices = 0}, 4) == "moeroute::product_keys: k is 0, expected 1 to 4");
  CHECK(refused({.choices = 4}, 4) == "accepted");
  CHECK(refused({.choices = 1}, 2) == "accepted");
  CHECK(refused({.choices = 1}, 1) == "moeroute::product_keys: columns is 1, expected two halves");
  CHECK(refused({.choices = 1}, 2048) == "accepted");
  CHECK(refused({.choices = 4, .weight = {.divide = 0.0f}}, 4) ==
        "moeroute::weight_rule: divide is 0.000000, expected > 0");
  const std::vector<float> four(4, 1.0f);
  CHECK(refused({.choices = 4, .weight = {.expert_scale = four}}, 4) == "accepted");
  CHECK(product_keys<>{}.k() == 16);
}
