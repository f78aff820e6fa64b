#include <moeroute/policy/row/sparsemixer.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "oracle/spec_routing.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;

TEST_CASE("SparseMixer decides what float64 decides, on every shape") {
  for (const index_t experts : {2, 3, 16, 60, 257})
    for (const test::shape s : test::all_shapes) {
      const index_t tokens = 18;
      const std::vector<float> logits = test::make_logits(s, 2, tokens, experts);
      const assignment a = routed(sparsemixer{}, logits, experts);
      const router_spec spec{
          .experts = experts, .k = 2, .selection = selection_kind::sparsemixer, .jitter = 0.01f};
      INFO(test::name(s) << ", E = " << experts);
      for (index_t t = 0; t < tokens; ++t) {
        // Shares among several +inf are a law of their own.
        if (s == test::shape::plus_infs) continue;
        CHECK(oracle::break_of(spec, {logits.data() + t * experts}, a.ids(t), a.weights(t)) == "");
      }
    }
}

TEST_CASE("the two choices differ, and each weight is in (0, 1]") {
  const std::vector<float> logits = test::make_logits(test::shape::quantised, 4, 200, 16);
  const assignment a = routed(sparsemixer{}, logits, 16);
  for (index_t t = 0; t < 200; ++t) {
    CHECK(a.ids(t)[0] != a.ids(t)[1]);
    for (const float w : a.weights(t)) CHECK((w > 0.0f && w <= 1.0f));
  }
}

TEST_CASE("a best logit that is further than 2 jitter from the next has weight exactly 1") {
  CHECK(routed(sparsemixer{}, {1.0f, 0.97f, 0.5f}, 3).weights(0)[0] == 1.0f);
  CHECK(routed(sparsemixer{}, {1.0f, 0.99f, 0.5f}, 3).weights(0)[0] < 1.0f);
  // The size of the larger of |logit| and maximum scales the distance, also below 0.
  CHECK(routed(sparsemixer{}, {-1.0f, -1.03f, -2.0f}, 3).weights(0)[0] == 1.0f);
  CHECK(routed(sparsemixer{}, {-1.0f, -1.01f, -2.0f}, 3).weights(0)[0] < 1.0f);
}

TEST_CASE("an expert that is exactly 2 jitter away is close, the best of all even without any") {
  for (const index_t experts : {3, 16, 17}) {
    std::vector<float> z(static_cast<std::size_t>(experts), -9.0f);
    z[0] = 2.0f;
    z[1] = 1.0f;
    // Their distance, divided by 2, is a half.
    CHECK(routed(sparsemixer{.jitter = 0.25f}, z, experts).weights(0)[0] < 1.0f);
    CHECK(routed(sparsemixer{.jitter = 0.0f}, z, experts).weights(0)[0] == 1.0f);
    CHECK(routed(sparsemixer_training{.jitter = 0.0f}, z, experts).weights(0)[0] == 1.0f);
  }
}

TEST_CASE("0 / 0 counts as close") {
  const assignment a = routed(sparsemixer{}, {0.0f, 0.0f, -1.0f}, 3);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{0, 1});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{0.5f, 1.0f});
}

TEST_CASE("several +inf are chosen by id with finite weights") {
  const assignment a = routed(sparsemixer{}, {1.0f, test::infinity, test::infinity}, 3);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{1, 2});
  for (const float w : a.weights(0)) CHECK((w > 0.0f && w <= 1.0f));
}

TEST_CASE("one expert that can be chosen is the only choice") {
  const assignment a = routed(sparsemixer{}, {test::not_a_number, 3.0f, -test::infinity}, 3);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{1, no_expert});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{1.0f, 0.0f});
}

TEST_CASE("one expert, or a negative jitter, is refused") {
  CHECK(test::refusal([] { sparsemixer{}.check(1); }) ==
        "moeroute::sparsemixer: E is 1, expected 2 to 1048576");
  CHECK(test::refusal([] { sparsemixer{-0.5f}.check(4); }) ==
        "moeroute::sparsemixer: jitter is -0.500000, expected >= 0");
}

TEST_CASE(
    "in training experts are drawn by their softmax, and a third of them by luck weigh whole") {
  constexpr index_t tokens = test::sized(20000, 4000), experts = 4;
  constexpr float z[] = {1.0f, 0.9f, 0.85f, -3.0f};  // the last is never close
  std::vector<float> logits;
  for (index_t t = 0; t < tokens; ++t) logits.insert(logits.end(), z, z + 4);
  const sparsemixer_training router{.jitter = 0.1f};
  const side_inputs side{.seed = 11, .step = 4};
  const assignment a = routed(router, logits, experts, side);
  double sum = 0.0;
  for (int e = 0; e < 3; ++e) sum += std::exp(static_cast<double>(z[e]));
  index_t drawn[4] = {}, whole[4] = {}, twice = 0;
  for (index_t t = 0; t < tokens; ++t) {
    const auto e = static_cast<std::size_t>(a.ids(t)[0]);
    twice += a.ids(t)[0] == a.ids(t)[1];
    ++drawn[e];
    const double p = std::exp(static_cast<double>(z[e])) / sum;
    whole[e] += std::abs(static_cast<double>(a.weights(t)[0]) / p - 1.0) < 1e-5;
  }
  CHECK(twice == 0);
  const auto near = [](index_t seen, double of, double p) {
    return std::abs(static_cast<double>(seen) - of * p) < 5.0 * std::sqrt(of * p * (1.0 - p) + 1.0);
  };
  for (int e = 0; e < 3; ++e)
    CHECK(near(drawn[e], tokens, std::exp(static_cast<double>(z[e])) / sum));
  CHECK(drawn[3] == 0);
  CHECK(whole[0] == drawn[0]);
  for (int e = 1; e < 3; ++e) CHECK(near(whole[e], static_cast<double>(drawn[e]), 0.25));
  // The same seed and step again; another step draws others.
  const assignment again = routed(router, logits, experts, side),
                   other = routed(router, logits, experts, {.seed = 11, .step = 5});
  CHECK(test::listed(again.ids()) == test::listed(a.ids()));
  CHECK(test::listed(other.ids()) != test::listed(a.ids()));
  // A draw shares its numbers with none of the step that follows: both agree by chance alone.
  for (const std::size_t r : {0u, 1u})
    for (const std::size_t later : {0u, 1u}) {
      double expected = 0.0;
      index_t agreed = 0;
      for (int e = 0; e < 3; ++e) {
        double mine = 0.0, theirs = 0.0;
        for (index_t t = 0; t < tokens; ++t) {
          mine += a.ids(t)[r] == e;
          theirs += other.ids(t)[later] == e;
        }
        expected += mine * theirs / static_cast<double>(tokens);
      }
      for (index_t t = 0; t < tokens; ++t) agreed += a.ids(t)[r] == other.ids(t)[later];
      INFO("choice " << r << " and choice " << later << " of the next step");
      CHECK(near(agreed, tokens, expected / static_cast<double>(tokens)));
    }
}

TEST_CASE("in training, too, the larger of |logit| and maximum scales the distance below 0") {
  std::vector<float> logits;
  for (index_t t = 0; t < 200; ++t)
    for (const float z : {-2.0f, -1.0f, -1.03f, -1.015f}) logits.push_back(z);
  const assignment a = routed(sparsemixer_training{.jitter = 0.01f}, logits, 4, {.seed = 1});
  index_t drawn[4] = {};
  for (index_t t = 0; t < 200; ++t) ++drawn[static_cast<std::size_t>(a.ids(t)[0])];
  CHECK(drawn[0] == 0);
  CHECK(drawn[1] > 50);
  CHECK(drawn[2] == 0);  // 0.03 / 1.03 is more than 2 jitter, 0.015 / 1.015 is less
  CHECK(drawn[3] > 50);
}

TEST_CASE("in training, too, NaN and -inf are never drawn, and weights are finite") {
  for (const test::shape s : test::all_shapes) {
    const std::vector<float> logits = test::make_logits(s, 2, 40, 17);
    const assignment a = routed(sparsemixer_training{}, logits, 17, {.seed = 3});
    for (index_t t = 0; t < 40; ++t)
      for (std::size_t r = 0; r < 2; ++r) {
        const expert_id e = a.ids(t)[r];
        const float w = a.weights(t)[r];
        CHECK((std::isfinite(w) && w >= 0.0f));
        if (e >= 0) CHECK(logits[static_cast<std::size_t>(t * 17 + e)] > -HUGE_VALF);
      }
  }
}

TEST_CASE("with every option at once both forms choose among the close ones, and weigh by them") {
  test::random rng(73);
  for (index_t round = 0; round < 150; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 2 + rng.below(coin() ? 15 : 50), tokens = 1 + rng.below(40);
    // Ties, and quotients that are exactly the limit.
    const auto seed = rng.bits() % 1000;
    std::vector<float> z = test::make_logits(coin() ? test::shape::normal : test::shape::quantised,
                                             seed, tokens, experts);
    const auto odds = 1 + rng.below(20);
    for (float& x : z)
      if (const auto odd = rng.below(8 + 3 * odds); odd < 3)
        x = odd == 0 ? -test::infinity : odd == 1 ? test::not_a_number : test::infinity;
    const float jitters[] = {0.0f, 0.01f, 0.125f, 0.5f}, jitter = jitters[rng.below(4)];
    std::vector<std::int32_t> own;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t) {
      own.push_back(static_cast<std::int32_t>(rng.below(3)));
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    }
    side_inputs side{.seed = rng.bits(), .step = static_cast<std::uint64_t>(rng.below(1000))};
    if (coin()) side.k_of_token = own;
    if (coin()) side.mask = mask;
    const auto expected = [&](bool training, std::vector<expert_id>& ids) {
      std::vector<double> weights;
      for (index_t t = 0; t < tokens; ++t) {
        std::vector<float> row(z.begin() + t * experts, z.begin() + (t + 1) * experts);
        for (float& x : row)
          if (x != x) x = -test::infinity;
        for (std::uint64_t r = 0; r < 2; ++r) {
          expert_id id = oracle::top_k(row.data(), experts, 1)[0];
          double weight = 0.0;
          if (id != no_expert) {
            const float max = row[static_cast<std::size_t>(id)];
            std::vector<float> noisy(row);
            double sum = 0.0;
            const auto exp_of = [&](float x) {
              return x == max ? 1.0 : std::exp(static_cast<double>(x) - static_cast<double>(max));
            };
            for (float& x : noisy) {
              if ((max - x) / std::max(std::abs(x), max) > 2.0f * jitter) x = -test::infinity;
              if (x > -test::infinity) sum += exp_of(x);
            }
            if (training && max < test::infinity) {
              logit_noise{.kind = noise_kind::gumbel}.add_to_row(
                  noisy.data(), experts, t, {.seed = side.seed, .step = 2 * side.step + r});
              id = oracle::top_k(noisy.data(), experts, 1)[0];
            }
            const float own_logit = row[static_cast<std::size_t>(id)];
            const bool whole =
                random_u01(side.seed,
                           detail::random_stream(detail::random_use::sparsemixer, side.step),
                           static_cast<std::uint64_t>(2 * t) + r) >= 0.75f;
            weight = exp_of(own_logit) / sum * (own_logit == max || whole ? 1.0 : 1.0 / 3.0);
            row[static_cast<std::size_t>(id)] = -test::infinity;
          }
          const bool cut = side.masked(t) || (!side.k_of_token.empty() &&
                                              static_cast<std::int32_t>(r) >= own[std::size_t(t)]);
          ids.push_back(cut ? no_expert : id);
          weights.push_back(cut ? 0.0 : weight);
        }
      }
      return weights;
    };
    std::vector<expert_id> best, drawn;
    const std::vector<double> of_best = expected(false, best), of_drawn = expected(true, drawn);
    const assignment a = routed(sparsemixer{jitter}, z, experts, side),
                     b = routed(sparsemixer_training{jitter}, z, experts, side);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " jitter " << jitter);
    CHECK(test::listed(a.ids()) == best);
    CHECK(test::difference(a.weights(), of_best, 3e-6) == "");
    CHECK(test::listed(b.ids()) == drawn);
    CHECK(test::difference(b.weights(), of_drawn, 3e-6) == "");
  }
}

TEST_CASE(
    "a choice that is not the best is weighed whole where three quarters or more are thrown") {
  const side_inputs side{.seed = 1232689};
  REQUIRE(random_u01(side.seed, detail::random_stream(detail::random_use::sparsemixer, 0), 0) ==
          0.75f);
  CHECK(sparsemixer_training::whole(side, 0, 0));
}

TEST_CASE("SparseMixer without a number has the jitter of 0.01, and both forms refuse the same") {
  CHECK(sparsemixer{}.jitter == 0.01f);
  CHECK(sparsemixer_training{}.jitter == 0.01f);
  CHECK(test::refusal([] { sparsemixer_training{}.check(1); }) ==
        "moeroute::sparsemixer: E is 1, expected 2 to 1048576");
  CHECK(test::refusal([] { sparsemixer_training{-0.5f}.check(2); }) ==
        "moeroute::sparsemixer: jitter is -0.500000, expected >= 0");
  CHECK(test::refusal([] { sparsemixer{0.0f}.check(2); }) == "accepted");
  CHECK(test::refusal([] { sparsemixer{}.check(max_experts + 1); }) ==
        "moeroute::sparsemixer: E is 1048577, expected 2 to 1048576");
}
