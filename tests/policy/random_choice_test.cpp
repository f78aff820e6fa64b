#include <moeroute/policy/row/random_choice.hpp>

#include <algorithm>
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

TEST_CASE("k random experts are drawn without repetition by place, alone or in a block") {
  test::random rng(67);
  for (index_t round = 0; round < 60; ++round) {
    const index_t experts = 1 + rng.below(70), tokens = 1 + rng.below(40),
                  k = 1 + rng.below(std::min<index_t>(experts, 20));
    const auto step = static_cast<std::uint64_t>(rng.below(1000)), seed = rng.bits();
    const std::uint64_t stream = detail::random_stream(detail::random_use::random_choice, step);
    std::vector<expert_id> ids;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t r = 0; r < k; ++r) {
        const index_t limit = experts - k + r + 1;
        auto e =
            static_cast<expert_id>(random_below(static_cast<std::uint32_t>(limit), seed, stream,
                                                static_cast<std::uint64_t>(t * k + r)));
        if (std::count(ids.end() - r, ids.end(), e) > 0) e = static_cast<expert_id>(limit - 1);
        ids.push_back(e);
      }
    const random_choice rule{k};
    const assignment a =
        routed(rule, zeros(tokens, experts), experts, {.seed = seed, .step = step});
    INFO("T=" << tokens << " E=" << experts << " k=" << k);
    CHECK(test::listed(a.ids()) == ids);
    CHECK(test::listed(a.weights()) ==
          std::vector<float>(ids.size(), 1.0f / static_cast<float>(k)));
  }
}

TEST_CASE("with every option at once GShard's second expert is what its policy says") {
  test::random rng(71);
  for (index_t round = 0; round < 120; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 2 + rng.below(30), tokens = 1 + rng.below(40);
    const auto seed = rng.bits() % 1000;
    std::vector<float> z = test::make_logits(coin() ? test::shape::normal : test::shape::quantised,
                                             seed, tokens, experts);
    for (float& x : z)
      if (const auto odd = rng.below(12); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    if (coin()) std::fill_n(z.begin(), experts, test::not_a_number);
    gshard_top2 rule{.policy = static_cast<second_expert>(rng.below(3))};
    if (coin()) rule.weight = sum_normalized;
    if (coin()) rule.weight.scale = 2.5f;
    std::vector<std::int32_t> own;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t) {
      own.push_back(static_cast<std::int32_t>(rng.below(3)));
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    }
    side_inputs side{.seed = rng.bits(), .step = static_cast<std::uint64_t>(rng.below(1000))};
    if (coin()) side.k_of_token = own;
    if (coin()) side.mask = mask;
    std::vector<expert_id> ids;
    std::vector<double> weights;
    for (index_t t = 0; t < tokens; ++t) {
      const float* const row = z.data() + t * experts;
      const std::vector<expert_id> order = oracle::order(row, experts);
      const std::vector<double> p = oracle::softmax(row, experts, order);
      std::vector<expert_id> two = oracle::top_k(row, experts, 2);
      if (rule.policy == second_expert::sampling) {
        std::vector<float> noisy(row, row + experts);
        logit_noise{.kind = noise_kind::gumbel}.add_to_row(noisy.data(), experts, t,
                                                           {.seed = side.seed, .step = side.step});
        if (two[0] != no_expert) noisy[static_cast<std::size_t>(two[0])] = -test::infinity;
        two[1] = oracle::top_k(noisy.data(), experts, 1)[0];
      }
      const auto share = [&](expert_id e) {
        return e == no_expert ? 0.0 : p[static_cast<std::size_t>(e)];
      };
      const float u =
          random_u01(side.seed, detail::random_stream(detail::random_use::second_expert, side.step),
                     static_cast<std::uint64_t>(t));
      if (rule.policy == second_expert::random && 2.0 * share(two[1]) <= static_cast<double>(u))
        two[1] = no_expert;
      for (std::size_t r = 0; r < 2; ++r)
        if (side.masked(t) ||
            (!side.k_of_token.empty() && static_cast<std::int32_t>(r) >= own[std::size_t(t)]))
          two[r] = no_expert;
      const double sum = share(two[0]) + share(two[1]),
                   by = rule.weight.normalize == normalization::sum && sum > 0.0 ? sum : 1.0;
      for (const expert_id e : two) {
        ids.push_back(e);
        weights.push_back(share(e) / by * static_cast<double>(rule.weight.scale));
      }
    }
    const assignment a = routed(rule, z, experts, side);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " policy "
                  << static_cast<int>(rule.policy));
    CHECK(test::listed(a.ids()) == ids);
    CHECK(test::difference(a.weights(), weights, 3e-6, 1e-36) == "");
  }
}

TEST_CASE("a second expert whose chance is what was thrown is not kept") {
  // Of four equals each has 1/4, and this seed throws 1/2.
  const side_inputs side{.seed = 56734429};
  REQUIRE(random_u01(side.seed, detail::random_stream(detail::random_use::second_expert, 0), 0) ==
          0.5f);
  const gshard_top2 rule{.policy = second_expert::random};
  CHECK(routed(rule, zeros(1, 4), 4, side).ids(0)[1] == no_expert);
  CHECK(routed(rule, zeros(1, 3), 3, side).ids(0)[1] == 1);
}

TEST_CASE("random choices without numbers of their own are two, GShard's the best two") {
  CHECK(random_choice{}.k() == 2);
  CHECK(gshard_top2{}.policy == second_expert::best);
  CHECK(test::refusal([] { random_choice{0}.check(8); }) ==
        "moeroute::random_choice: k is 0, expected 1 to 8");
  CHECK(test::refusal([] { random_choice{8}.check(8); }) == "accepted");
  CHECK(test::refusal([] { gshard_top2{}.check(2); }) == "accepted");
  CHECK(test::refusal([] { gshard_top2{.weight = {.divide = 0.0f}}.check(2); }) ==
        "moeroute::weight_rule: divide is 0.000000, expected > 0");
}
