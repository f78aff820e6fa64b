#include <moeroute/policy/batch/base_assignment.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/route.hpp>
#include <numeric>
#include <vector>

#include "oracle/batch_routing.hpp"
#include "support/batch_bits.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;

namespace {

constexpr base_assignment auction{};
constexpr base_assignment optimal{.solver = assignment_solver::optimal};

double objective(const std::vector<float>& z, index_t experts, std::span<const expert_id> ids) {
  double sum = 0;
  for (std::size_t t = 0; t < ids.size(); ++t)
    sum += static_cast<double>(
        z[t * static_cast<std::size_t>(experts) + static_cast<std::size_t>(ids[t])]);
  return sum;
}

std::vector<int> loads(std::span<const expert_id> ids, index_t experts) {
  std::vector<int> load(static_cast<std::size_t>(experts), 0);
  for (const expert_id e : ids)
    if (e >= 0) ++load[static_cast<std::size_t>(e)];
  return load;
}

}  // namespace

TEST_CASE("every token has one expert and every expert T / E tokens") {
  for (const auto& [tokens, experts] : {std::pair<index_t, index_t>{1, 1},
                                        {5, 1},
                                        {3, 3},
                                        {16, 16},
                                        {42, 7},
                                        {64, 8},
                                        {test::sized(512, 128), 32},
                                        {test::sized(2048, 256), 8}})
    for (const test::shape shape :
         {test::shape::normal, test::shape::quantised, test::shape::all_equal,
          test::shape::ascending, test::shape::one_hot_expert, test::shape::zipf,
          test::shape::extreme, test::shape::signed_zeros, test::shape::plus_infs}) {
      const auto z = test::make_logits(shape, 3, tokens, experts);
      INFO(test::name(shape) << " T=" << tokens << " E=" << experts);
      for (const base_assignment& router : {auction, optimal}) {
        if (router.solver == assignment_solver::optimal && tokens > 600) continue;
        const assignment a = routed(router, z, experts);
        const auto load = loads(a.ids(), experts);
        CHECK(std::all_of(load.begin(), load.end(),
                          [&, each = tokens / experts](int n) { return n == each; }));
        CHECK(std::all_of(a.weights().begin(), a.weights().end(),
                          [](float w) { return w >= 0.0f && w <= 1.0f; }));
      }
    }
}

TEST_CASE("the auction comes near the optimum and beats random balanced assignments") {
  for (const auto& [tokens, experts] : {std::pair<index_t, index_t>{32, 4}, {120, 8}, {256, 32}})
    for (std::uint64_t seed = 1; seed <= 4; ++seed) {
      const auto z = test::make_logits(test::shape::normal, seed, tokens, experts);
      const double best = objective(z, experts, routed(optimal, z, experts).ids());
      const double bid = objective(z, experts, routed(auction, z, experts).ids());
      const auto [low, high] = std::minmax_element(z.begin(), z.end());
      double bound = 0;
      for (index_t t = 0; t < tokens; ++t)
        bound += static_cast<double>(
            *std::max_element(z.begin() + t * experts, z.begin() + (t + 1) * experts));
      INFO("T=" << tokens << " E=" << experts << " auction " << bid << " optimum " << best);
      CHECK(bid <= best + 1e-4);
      CHECK(best <= bound + 1e-4);
      CHECK(bid >= best - static_cast<double>(tokens) * static_cast<double>(*high - *low) / 50);
      test::random rng(seed);
      std::vector<expert_id> any(static_cast<std::size_t>(tokens));
      for (index_t t = 0; t < tokens; ++t)
        any[static_cast<std::size_t>(t)] = static_cast<expert_id>(t % experts);
      for (index_t t = tokens - 1; t > 0; --t)
        std::swap(any[static_cast<std::size_t>(t)],
                  any[static_cast<std::size_t>(rng.below(t + 1))]);
      CHECK(bid > objective(z, experts, any));
    }
}

TEST_CASE("the optimum is that of all balanced assignments") {
  // 6 tokens on 3 experts: 90 assignments, all tried.
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const auto z =
        test::make_logits(seed % 2 == 0 ? test::shape::normal : test::shape::quantised, seed, 6, 3);
    std::vector<expert_id> ids{0, 0, 1, 1, 2, 2};
    double best = -1e30;
    do best = std::max(best, objective(z, 3, ids));
    while (std::next_permutation(ids.begin(), ids.end()));
    CHECK(std::abs(objective(z, 3, routed(optimal, z, 3).ids()) - best) < 1e-6);
  }
}

TEST_CASE("weights are the sigmoid of the token's own expert") {
  constexpr index_t tokens = 48, experts = 6;
  const auto z = test::make_logits(test::shape::normal, 5, tokens, experts);
  const assignment a = routed(auction, z, experts);
  std::vector<double> expected;
  for (index_t t = 0; t < tokens; ++t)
    expected.push_back(1 / (1 + std::exp(-static_cast<double>(
                                    z[static_cast<std::size_t>(t * experts + a.ids(t)[0])]))));
  CHECK(test::difference(a.weights(), expected, 3e-6) == "");
}

TEST_CASE("evaluation takes each token's best expert") {
  constexpr index_t tokens = 50, experts = 6;
  const auto z = test::make_logits(test::shape::quantised, 5, tokens, experts);
  const assignment a = routed(base_assignment{.phase = routing_phase::evaluation}, z, experts);
  for (index_t t = 0; t < tokens; ++t)
    CHECK(a.ids(t)[0] == oracle::top_k(z.data() + t * experts, experts, 1)[0]);
}

TEST_CASE("no token is put where its logit is -inf or NaN, masked tokens nowhere") {
  for (const test::shape shape : {test::shape::masked, test::shape::half_nan, test::shape::all_nan,
                                  test::shape::all_minus_inf, test::shape::plus_infs}) {
    constexpr index_t tokens = 64, experts = 8;
    const auto z = test::make_logits(shape, 5, tokens, experts);
    std::vector<std::uint8_t> mask(tokens, 1);
    for (std::size_t t = 0; t < tokens; t += 5) mask[t] = 0;
    for (const base_assignment& router : {auction, optimal}) {
      const assignment a = routed(router, z, experts, {.mask = mask});
      bool sound = true;
      for (index_t t = 0; t < tokens; ++t) {
        const expert_id e = a.ids(t)[0];
        const float w = a.weights(t)[0];
        if (e == no_expert) {
          sound = sound && w == 0.0f;
        } else {
          sound = sound && mask[static_cast<std::size_t>(t)] != 0 && std::isfinite(w) &&
                  z[static_cast<std::size_t>(t * experts + e)] > -test::infinity;
        }
      }
      CHECK(sound);
      const auto load = loads(a.ids(), experts);
      CHECK(*std::max_element(load.begin(), load.end()) <= tokens / experts);
    }
  }
}

TEST_CASE("the optimum avoids forbidden places where it can") {
  // Token t may not go to expert t: a balanced assignment without them exists.
  constexpr index_t n = 6;
  std::vector<float> z(n * n, 0.0f);
  for (std::size_t t = 0; t < n; ++t) z[t * n + t] = -test::infinity;
  const assignment a = routed(optimal, z, n);
  CHECK(std::none_of(a.ids().begin(), a.ids().end(), [](expert_id e) { return e == no_expert; }));
}

TEST_CASE("an auction that cannot settle falls back to the optimum") {
  constexpr index_t tokens = 64, experts = 8;
  auto z = test::make_logits(test::shape::normal, 5, tokens, experts);
  for (float& x : z) x = 1e8f + 8.0f * std::round(x);
  const auto load = loads(routed(auction, z, experts).ids(), experts);
  CHECK(std::all_of(load.begin(), load.end(), [](int n) { return n == 8; }));
}

TEST_CASE("BASE has the same ids on every instruction set, executor and thread count") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = test::sized(1280, 40), experts = 40;
    const auto z = test::make_logits(shape, 12, tokens, experts);
    const base_assignment router{.most_rounds = test::sized(400, 60)};
    INFO(test::name(shape));
    CHECK(test::batch_bits_differ(router, z, experts) == "");
  }
}

TEST_CASE("the auction is the published one, bid by bid") {
  for (const auto& [tokens, experts] :
       {std::pair<index_t, index_t>{8, 2}, {32, 4}, {60, 5}, {64, 16}, {240, 12}})
    for (const std::uint32_t seed : {1u, 2u, 3u, 4u, 5u}) {
      const auto z = test::make_logits(test::shape::normal, seed, tokens, experts);
      const assignment a = routed(auction, z, experts);
      INFO(tokens << " tokens, " << experts << " experts, seed " << seed);
      CHECK(std::vector<expert_id>(a.ids().begin(), a.ids().end()) ==
            oracle::auction(z, tokens, experts));
    }
}

TEST_CASE(
    "an auction takes what is not finite for the least affinity, +inf and more for the most") {
  for (const auto& [tokens, experts] : {std::pair<index_t, index_t>{32, 4}, {60, 5}, {64, 16}}) {
    auto z = test::make_logits(test::shape::normal, 4, tokens, experts);
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 1);
    mask[3] = mask[17] = 0;
    const auto finite = [&](index_t t) { return mask[static_cast<std::size_t>(t)] != 0; };
    const auto row = [&](auto& rows, index_t t) { return rows.begin() + t * experts; };
    float least = 1e9f, most = -1e9f;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; finite(t) && e < experts; ++e) {
        const float x = *(row(z, t) + e);
        least = std::min(least, x);
        most = std::max(most, x);
      }
    std::vector<float> clean = z;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e) {
        const float odd = (t + e) % 3 == 0   ? -test::infinity
                          : (t + e) % 3 == 1 ? test::not_a_number
                                             : test::infinity;
        // The extremes stay where they are.
        const float x = *(row(z, t) + e);
        if ((7 * t + e) % 11 == 0 && x != least && x != most) {
          *(row(z, t) + e) = odd;
          *(row(clean, t) + e) = odd > 0.0f ? most : least;
        }
        if (!finite(t)) *(row(clean, t) + e) = least;
      }
    auto expected = oracle::auction(clean, tokens, experts);
    for (index_t t = 0; t < tokens; ++t) {
      expert_id& e = expected[static_cast<std::size_t>(t)];
      if (!finite(t) || !(*(row(z, t) + e) > -test::infinity)) e = no_expert;
    }
    INFO(tokens << " tokens, " << experts << " experts");
    CHECK(test::listed(routed(auction, z, experts, {.mask = mask}).ids()) == expected);
  }
}

TEST_CASE("BASE refuses a batch that cannot be shared evenly, by name") {
  CHECK(test::refusal([] { auction.check(10, 4); }) ==
        "moeroute::base_assignment: tokens is 10, expected a multiple of experts = 4");
  CHECK(test::refusal([] { auction.check(8, 4); }) == "accepted");
  CHECK(test::refusal([] { base_assignment{.phase = routing_phase::evaluation}.check(10, 4); }) ==
        "accepted");
}

TEST_CASE("beside masks and forbidden places the optimum is that of all balanced assignments") {
  test::random rng(47);
  for (index_t round = 0; round < test::sized(300, 40); ++round) {
    const index_t experts = 1 + rng.below(3), jobs = 1 + rng.below(experts == 3 ? 2 : 3);
    const index_t tokens = experts * jobs;
    auto z = test::make_logits(test::shape::normal, rng.bits() % 1000, tokens, experts);
    for (float& x : z)
      if (const auto odd = rng.below(12); odd < 3)
        x = odd == 0 ? -test::infinity : odd == 1 ? test::not_a_number : test::infinity;
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 1);
    for (std::uint8_t& m : mask) m = rng.below(4) != 0;
    side_inputs side;
    if (rng.below(2) == 0) side.mask = mask;
    float least = 0.0f, most = 0.0f;
    bool any = false;
    for (index_t i = 0; i < tokens * experts; ++i) {
      const float x = z[static_cast<std::size_t>(i)];
      if (side.masked(i / experts) || !std::isfinite(x)) continue;
      least = any ? std::min(least, x) : x;
      most = any ? std::max(most, x) : x;
      any = true;
    }
    // What may not be, and +inf, outweigh all the rest; a masked token is worth nothing anywhere.
    const auto worth = [&](index_t t, index_t e) {
      const float x = z[static_cast<std::size_t>(t * experts + e)];
      const double beyond = 1e3;
      if (side.masked(t)) return 0.0;
      if (!(x > -test::infinity)) return static_cast<double>(least) - beyond;
      return x > most ? static_cast<double>(most) + beyond : static_cast<double>(x);
    };
    std::vector<index_t> of;
    for (index_t t = 0; t < tokens; ++t) of.push_back(t / jobs);
    double best = -HUGE_VAL;
    do {
      double sum = 0.0;
      for (index_t t = 0; t < tokens; ++t) sum += worth(t, of[static_cast<std::size_t>(t)]);
      best = std::max(best, sum);
    } while (std::next_permutation(of.begin(), of.end()));

    const assignment a = routed(optimal, z, experts, side);
    // A place that became none is one that may not be.
    double sum = 0.0;
    bool sound = true;
    for (index_t t = 0; t < tokens; ++t) {
      const expert_id e = a.ids(t)[0];
      const float w = a.weights(t)[0];
      if (e == no_expert) {
        sum += side.masked(t) ? 0.0 : static_cast<double>(least) - 1e3;
        sound = sound && w == 0.0f;
        continue;
      }
      const auto x = static_cast<double>(z[static_cast<std::size_t>(t * experts + e)]);
      sum += worth(t, e);
      sound = sound && !side.masked(t) && x > -HUGE_VAL &&
              std::abs(static_cast<double>(w) - 1.0 / (1.0 + std::exp(-x))) < 1e-6;
    }
    INFO("round " << round << " T=" << tokens << " E=" << experts << " masked "
                  << !side.mask.empty());
    CHECK(sound);
    CHECK(std::abs(sum - best) < 1e-3);
    const auto load = loads(a.ids(), experts);
    CHECK(*std::max_element(load.begin(), load.end()) <= jobs);

    const base_assignment evaluation{
        .phase = routing_phase::evaluation,
        .solver = rng.below(2) == 0 ? assignment_solver::auction : assignment_solver::optimal};
    const assignment own = routed(evaluation, z, experts, side);
    for (index_t t = 0; t < tokens; ++t) {
      const expert_id e =
          side.masked(t) ? no_expert : oracle::top_k(z.data() + t * experts, experts, 1)[0];
      REQUIRE(own.ids(t)[0] == e);
      const double x = e == no_expert
                           ? -HUGE_VAL
                           : static_cast<double>(z[static_cast<std::size_t>(t * experts + e)]);
      REQUIRE(std::abs(static_cast<double>(own.weights(t)[0]) - 1.0 / (1.0 + std::exp(-x))) < 1e-6);
    }
  }
}

TEST_CASE("the auction is the published one where bids are equal, and where its patience ends") {
  // A token is worth the same to every expert; or tokens come in eighths, experts in three kinds.
  for (const bool alike : {true, false})
    for (const auto& [tokens, experts] :
         {std::pair<index_t, index_t>{24, 12}, {32, 16}, {40, 40}, {72, 72}}) {
      if (tokens > test::sized(72, 40)) continue;
      test::random rng(5);
      std::vector<float> z;
      for (index_t t = 0; t < tokens; ++t) {
        const float worth = rng.uniform();
        for (index_t e = 0; e < experts; ++e)
          z.push_back(alike ? worth : std::floor(8.0f * worth) / 8.0f * static_cast<float>(e % 3));
      }
      INFO(tokens << " tokens, " << experts << " experts, alike " << alike);
      CHECK(test::listed(routed(auction, z, experts).ids()) == oracle::auction(z, tokens, experts));
    }
}

TEST_CASE("BASE trains by auction for at most 2000 rounds where nothing is said") {
  CHECK((auction.phase == routing_phase::training && auction.most_rounds == 2000 &&
         auction.solver == assignment_solver::auction));
  const auto refused = [](const base_assignment& r, index_t experts = 4) {
    return test::refusal([&] { r.check(4 * experts, experts); });
  };
  CHECK(refused({.most_rounds = 0}) ==
        "moeroute::base_assignment: most_rounds is 0, expected 1 to 1073741824");
  CHECK(refused({.most_rounds = 1}) == "accepted");
  CHECK(refused({.most_rounds = 1 << 30}) == "accepted");
  CHECK(refused({.most_rounds = (1 << 30) + 1}) ==
        "moeroute::base_assignment: most_rounds is 1073741825, expected 1 to 1073741824");
  CHECK(refused({}, 0) == "moeroute::base_assignment: experts is 0, expected 1 to 1048576");
  CHECK(refused({}, 1) == "accepted");
  CHECK(refused({}, max_experts) == "accepted");
  CHECK(refused({}, max_experts + 1) ==
        "moeroute::base_assignment: experts is 1048577, expected 1 to 1048576");
}

#if !MOEROUTE_TEST_REDUCED  // of fewer tokens none has a patience that ends
TEST_CASE("the auction is the published one to the round in which its patience ends") {
  struct batch {
    index_t n;
    std::uint64_t seed;
    index_t apart;  // draws between two tokens
  };
  // Batches that take some more than 100 rounds, and would end elsewhere with one round of patience
  // more or less.
  for (const auto& [n, seed, apart] : {batch{140, 1, 140}, {148, 6, 0}}) {
    test::random rng(seed);
    std::vector<float> z;
    for (index_t t = 0; t < n; ++t) {
      const float worth = std::floor(8.0f * rng.uniform()) / 8.0f;
      for (index_t i = 0; i < apart; ++i) rng.bits();
      for (index_t e = 0; e < n; ++e) z.push_back(worth * static_cast<float>(e % 3));
    }
    INFO(n << " tokens and experts");
    CHECK(test::listed(routed(auction, z, n).ids()) == oracle::auction(z, n, n));
  }
}
#endif
