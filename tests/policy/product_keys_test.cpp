#include <moeroute/policy/row/product_keys.hpp>

#include <catch2/catch_test_macros.hpp>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;

namespace {

// All n^2 sums, one by one.
void is_the_top_k_of_all_sums(test::shape s, index_t n, index_t k, index_t tokens) {
  const std::vector<float> logits = test::make_logits(s, 6, tokens, 2 * n);
  const assignment a = routed(product_keys<>{.choices = k}, logits, 2 * n);
  INFO(test::name(s) << ", n = " << n << ", k = " << k);
  REQUIRE(a.experts() == n * n);
  for (index_t t = 0; t < tokens; ++t) {
    const float* row = logits.data() + t * 2 * n;
    std::vector<float> sums;
    for (index_t i = 0; i < n; ++i)
      for (index_t j = 0; j < n; ++j) {
        const float sum = row[i] + row[n + j];
        sums.push_back(sum == sum ? sum : -test::infinity);
      }
    const std::vector<expert_id> ids = oracle::top_k(sums.data(), n * n, k);
    REQUIRE(test::bit_difference(a.ids(t), ids) == "");
    const std::vector<double> score = oracle::softmax(sums.data(), n * n, ids);
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
        if (k <= n * n) is_the_top_k_of_all_sums(s, n, k, 17);
}

TEST_CASE("product keys may choose every expert") {
  for (const test::shape s : {test::shape::quantised, test::shape::masked, test::shape::all_equal})
    is_the_top_k_of_all_sums(s, 9, 81, 3);
}

TEST_CASE("product keys reach a million experts") {
  for (const test::shape s : {test::shape::quantised, test::shape::normal, test::shape::zipf})
    is_the_top_k_of_all_sums(s, test::sized(1024, 256), 16, 2);
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
