#include <moeroute/policy/row/random_choice.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <set>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;
using test::zeros;

TEST_CASE("random choices are distinct, in range, and weighted equally, up to k = E") {
  for (const index_t experts : {1, 3, 16, 60})
    for (const index_t k : {1, 2, 7, 60}) {
      if (k > experts) continue;
      const assignment a = routed(random_choice{k}, zeros(33, experts), experts, {.seed = 4});
      for (index_t t = 0; t < 33; ++t) {
        const std::set<expert_id> distinct(a.ids(t).begin(), a.ids(t).end());
        CHECK(static_cast<index_t>(distinct.size()) == k);
        CHECK((*distinct.begin() >= 0 && *distinct.rbegin() < experts));
        for (const float w : a.weights(t)) CHECK(w == 1.0f / static_cast<float>(k));
      }
    }
}

TEST_CASE("random choices replay by seed and step, whatever the batch they are in") {
  const auto ids = [](index_t tokens, std::uint64_t seed, std::uint64_t step) {
    return test::listed(
        routed(random_choice{2}, zeros(tokens, 64), 64, {.seed = seed, .step = step}).ids());
  };
  CHECK(ids(50, 1, 2) == ids(50, 1, 2));
  CHECK(ids(50, 1, 2) != ids(50, 2, 2));
  CHECK(ids(50, 1, 2) != ids(50, 1, 3));
  const auto few = ids(20, 1, 2), many = ids(50, 1, 2);
  CHECK(std::vector<expert_id>(many.begin(), many.begin() + 40) == few);
}

TEST_CASE("every expert is as likely as every other") {
  const index_t tokens = 8000;
  const assignment a = routed(random_choice{2}, zeros(tokens, 16), 16, {.seed = 12});
  std::vector<double> load(16, 0);
  for (const expert_id e : a.ids()) ++load[static_cast<std::size_t>(e)];
  double chi2 = 0;
  for (const double n : load) chi2 += (n - 1000) * (n - 1000) / 1000;
  // 15 degrees of freedom; less spread than independent draws, as the two differ.
  CHECK(chi2 < 37.7);
}

TEST_CASE("GShard's best second expert is the second of the softmax") {
  const std::vector<float> logits = test::make_logits(test::shape::quantised, 3, 40, 16);
  const assignment a = routed(gshard_top2{}, logits, 16);
  for (index_t t = 0; t < 40; ++t) {
    const float* row = logits.data() + t * 16;
    const std::vector<expert_id> ids = oracle::top_k(row, 16, 2);
    CHECK(test::bit_difference(a.ids(t), ids) == "");
    const std::vector<double> p = oracle::softmax(row, 16, oracle::order(row, 16));
    CHECK(test::difference(a.weights(t),
                           std::vector<double>{p[static_cast<std::size_t>(ids[0])],
                                               p[static_cast<std::size_t>(ids[1])]},
                           3e-6) == "");
  }
}

TEST_CASE("a random second expert is kept with probability min(1, 2 g2)") {
  // g2 = 0.25: kept half of the time; g2 = 0.5: always.
  const index_t tokens = 4000;
  std::vector<float> logits;
  for (index_t t = 0; t < tokens; ++t) logits.insert(logits.end(), {std::log(3.0f), 0.0f});
  const assignment a = routed(gshard_top2{.policy = second_expert::random}, logits, 2, {.seed = 5});
  int kept = 0;
  for (index_t t = 0; t < tokens; ++t) {
    CHECK(a.ids(t)[0] == 0);
    if (a.ids(t)[1] == 1) ++kept;
    CHECK((a.ids(t)[1] == no_expert) == (a.weights(t)[1] == 0.0f));
  }
  CHECK(std::abs(kept - 2000) < 160);
  const assignment even = routed(gshard_top2{.policy = second_expert::random},
                                 std::vector<float>(2 * 500, 1.0f), 2, {.seed = 5});
  for (index_t t = 0; t < 500; ++t) CHECK(even.ids(t)[1] == 1);
}

TEST_CASE("a sampled second expert follows the softmax of the others, and its weight is its own") {
  const index_t tokens = 6000;
  std::vector<float> logits;
  for (index_t t = 0; t < tokens; ++t)
    logits.insert(logits.end(), {9.0f, std::log(1.0f), std::log(3.0f), std::log(6.0f)});
  const assignment a =
      routed(gshard_top2{.policy = second_expert::sampling}, logits, 4, {.seed = 8});
  std::vector<int> second(4, 0);
  const std::vector<double> p = oracle::softmax(logits.data(), 4, {0, 1, 2, 3});
  for (index_t t = 0; t < tokens; ++t) {
    REQUIRE(a.ids(t)[0] == 0);
    const auto e = static_cast<std::size_t>(a.ids(t)[1]);
    REQUIRE((e >= 1 && e <= 3));
    ++second[e];
    CHECK(std::abs(static_cast<double>(a.weights(t)[1]) / p[e] - 1) < 3e-6);
  }
  CHECK(std::abs(second[1] - 600) < 120);
  CHECK(std::abs(second[2] - 1800) < 180);
  CHECK(std::abs(second[3] - 3600) < 200);
}

TEST_CASE("one expert is refused where two are chosen, and k beyond E") {
  CHECK(test::refusal([] { gshard_top2{}.check(1); }) ==
        "moeroute::gshard_top2: E is 1, expected 2 to 1048576");
  CHECK(test::refusal([] { random_choice{9}.check(8); }) ==
        "moeroute::random_choice: k is 9, expected 1 to 8");
}

TEST_CASE("GShard's sampling is from the softmax, also beside a noise gate that others use") {
  const std::vector<float> logits = test::make_logits(test::shape::normal, 3, 40, 16);
  const std::vector<float> gate(logits.size(), 5.0f);
  const gshard_top2 sampling{.policy = second_expert::sampling};
  // The gate is the second router's, which no token of this batch goes to.
  router noisy{softmax{}, top_k{.k = 2}};
  noisy.transform.noise.kind = noise_kind::gaussian;
  const by_modality<gshard_top2, router<softmax>> both{sampling, noisy, 8};
  const std::vector<std::uint8_t> first(40, 0);
  const assignment a = routed(both, logits, 16, {.modality = first, .seed = 7});
  const assignment b = routed(both, logits, 16,
                              {.modality = first,
                               .noise_logits = matrix_view<const float>(gate.data(), 40, 16),
                               .seed = 7});
  CHECK(test::bit_difference(a.ids(), b.ids()) == "");
}
