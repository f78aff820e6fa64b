// Expert choice on balanced plans, token choice on sparse ones, and noise beside the plan.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>
#include <moeroute/stage/route.hpp>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/batch_bits.hpp"
#include "support/compare.hpp"
#include "support/counting_new.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;
using test::rows_of;

namespace {

std::vector<float> balanced_plan(const sinkhorn_scaling& how, const std::vector<float>& z,
                                 index_t experts) {
  std::vector<float> plan(z.size());
  workspace ws;
  sinkhorn_plan(how, rows_of(z, experts), {}, ws,
                matrix_view<float>(plan.data(), static_cast<index_t>(z.size()) / experts, experts));
  return plan;
}

// The tokens of each expert: the C largest of a column, the lowest token among equals.
std::vector<std::vector<expert_id>> column_choice(const std::vector<float>& plan,
                                                  const std::vector<float>& z, index_t experts,
                                                  index_t capacity) {
  const auto tokens = static_cast<index_t>(z.size()) / experts;
  std::vector<std::vector<expert_id>> chosen(static_cast<std::size_t>(tokens));
  for (index_t e = 0; e < experts; ++e) {
    std::vector<float> column;
    for (index_t t = 0; t < tokens; ++t) {
      const auto at = static_cast<std::size_t>(t * experts + e);
      column.push_back(z[at] > -test::infinity ? plan[at] : -test::infinity);
    }
    for (const expert_id t : oracle::top_k(column.data(), tokens, capacity))
      if (t >= 0) chosen[static_cast<std::size_t>(t)].push_back(static_cast<expert_id>(e));
  }
  return chosen;
}

}  // namespace

TEST_CASE("expert choice on a balanced plan takes the largest entries of the plan's columns") {
  constexpr index_t tokens = 70, experts = 9;
  for (const test::shape shape : {test::shape::normal, test::shape::quantised, test::shape::masked,
                                  test::shape::all_equal, test::shape::half_nan})
    for (const auto domain : {sinkhorn_domain::exponential, sinkhorn_domain::logarithm})
      for (const index_t capacity : {1, 8, 70}) {
        const sinkhorn_expert_choice router{.capacity = {.fixed = capacity},
                                            .scaling = {.domain = domain}};
        auto z = test::make_logits(shape, 5, tokens, experts);
        const assignment out = routed(router, z, experts);
        const auto expected =
            column_choice(balanced_plan(router.scaling, z, experts), z, experts, capacity);
        bool same = true;
        double error = 0.0;
        for (index_t t = 0; t < tokens; ++t) {
          const auto& ids = expected[static_cast<std::size_t>(t)];
          same = same && std::equal(out.ids(t).begin(), out.ids(t).end(), ids.begin(), ids.end());
          const float* row = z.data() + t * experts;
          const auto score = oracle::softmax(row, experts, oracle::order(row, experts));
          for (std::size_t i = 0; i < out.ids(t).size(); ++i)
            error = std::max(error, std::abs(static_cast<double>(out.weights(t)[i]) -
                                             score[static_cast<std::size_t>(out.ids(t)[i])]));
        }
        INFO(test::name(shape) << " C=" << capacity << " domain " << static_cast<int>(domain));
        CHECK(same);
        CHECK(error < 1e-6);
      }
}

TEST_CASE("weights of expert choice may be the plan's entries") {
  constexpr index_t experts = 8;
  const auto z = test::make_logits(test::shape::normal, 2, 64, experts);
  const sinkhorn_expert_choice router{.capacity = {.fixed = 8}, .weights = plan_weights::plan};
  const assignment out = routed(router, z, experts);
  const auto plan = balanced_plan(router.scaling, z, experts);
  std::vector<float> expected;
  for (index_t t = 0; t < 64; ++t)
    for (const expert_id e : out.ids(t))
      expected.push_back(plan[static_cast<std::size_t>(t * experts + e)]);
  CHECK(test::bit_difference(out.weights(), expected) == "");
}

TEST_CASE("token choice on a sparse plan takes the largest entries of the plan's rows first") {
  constexpr index_t tokens = 64, experts = 8;
  for (const test::shape shape :
       {test::shape::normal, test::shape::zipf, test::shape::quantised, test::shape::masked})
    for (const index_t support : {4, 16, 64})
      for (const index_t k : {1, 3, 8}) {
        const sparse_transport transport{.support = support, .weights = transport_weights::plan};
        const auto z = test::make_logits(shape, 6, tokens, experts);
        const assignment out =
            routed(sparse_transport_token_choice{.k = k, .transport = transport}, z, experts);
        std::vector<float> plan(z.size());
        workspace ws;
        transport.plan(rows_of(z, experts), {}, ws,
                       matrix_view<float>(plan.data(), tokens, experts));
        std::string broken;
        for (index_t t = 0; t < tokens; ++t) {
          const float* row = plan.data() + t * experts;
          std::vector<float> sorted(row, row + experts);
          std::sort(sorted.begin(), sorted.end(), std::greater<>{});
          for (index_t r = 0; r < k; ++r) {
            const auto at = static_cast<std::size_t>(r);
            const expert_id e = out.ids(t)[at];
            const float entry = e < 0 ? 0.0f : row[e];
            // The order is that of the entries before they were rounded.
            if (std::abs(entry - sorted[at]) > 1e-6f * sorted[at]) broken = "another entry";
            if (std::abs(out.weights(t)[at] - entry) > 1e-6f * entry) broken = "another weight";
            if (e >= 0 && !(z[static_cast<std::size_t>(t * experts + e)] > -test::infinity))
              broken = "a masked expert";
          }
        }
        INFO(test::name(shape) << " support " << support << " k " << k);
        CHECK(broken == "");
      }
}

TEST_CASE("token choice on a sparse plan has weights of the softmax unless the plan's are wanted") {
  constexpr index_t experts = 6;
  const auto z = test::make_logits(test::shape::normal, 4, 48, experts);
  const assignment out = routed(sparse_transport_token_choice{.k = 2}, z, experts);
  double error = 0.0;
  for (index_t t = 0; t < 48; ++t) {
    const float* row = z.data() + t * experts;
    const auto score = oracle::softmax(row, experts, oracle::order(row, experts));
    for (std::size_t r = 0; r < 2; ++r)
      error = std::max(error, std::abs(static_cast<double>(out.weights(t)[r]) -
                                       score[static_cast<std::size_t>(out.ids(t)[r])]));
  }
  CHECK(error < 1e-6);
}

TEST_CASE(
    "choices on plans have the same bits on every instruction set, executor and thread count") {
  const auto z = test::make_logits(test::shape::normal, 8, 500, 24);
  CHECK(test::batch_bits_differ(sinkhorn_expert_choice{.capacity = {.fixed = 30}}, z, 24) == "");
  CHECK(test::batch_bits_differ(sparse_transport_token_choice{.k = 3}, z, 24) == "");
}

TEST_CASE("masked tokens are never taken on a plan, and no token is no choice") {
  constexpr index_t experts = 5;
  const auto z = test::make_logits(test::shape::normal, 9, 40, experts);
  std::vector<std::uint8_t> mask(40, 1);
  for (std::size_t t = 0; t < 40; t += 3) mask[t] = 0;
  const side_inputs side{.mask = mask};
  const assignment experts_take =
      routed(sinkhorn_expert_choice{.capacity = {.fixed = 7}}, z, experts, side);
  const assignment tokens_take = routed(sparse_transport_token_choice{.k = 2}, z, experts, side);
  for (index_t t = 0; t < 40; t += 3) {
    CHECK(experts_take.count(t) == 0);
    CHECK(tokens_take.ids(t)[0] == no_expert);
  }
  CHECK(routed(sinkhorn_expert_choice{}, {}, experts).choices() == 0);
  CHECK(routed(sparse_transport_token_choice{}, {}, experts).choices() == 0);
}

TEST_CASE("warm choices on plans never allocate") {
  constexpr index_t experts = 16;
  const auto z = test::make_logits(test::shape::normal, 1, 200, experts);
  workspace ws;
  assignment out;
  const auto warm = [&](const auto& router) {
    route(router, rows_of(z, experts), ws, out);
    return test::allocations_during([&] { route(router, rows_of(z, experts), ws, out); });
  };
  CHECK(warm(sinkhorn_expert_choice{.capacity = {.fixed = 20}}) == 0);
  CHECK(warm(sparse_transport_token_choice{.k = 4}) == 0);
}

TEST_CASE("a selective step that is not balanced has the noise of a noisy softmax top-k") {
  constexpr index_t experts = 12;
  const auto z = test::make_logits(test::shape::normal, 3, 50, experts);
  const logit_noise noise{.kind = noise_kind::gaussian, .sigma = 0.5f};
  const side_inputs side{.seed = 4, .step = 9};
  selective_sinkhorn router{.k = 2, .probability = 0.0f, .noise = noise};
  moeroute::router<softmax> noisy{.selection = {.k = 2}, .weight = sum_normalized};
  const assignment plain = routed(noisy, z, experts, side);
  noisy.transform.noise = noise;
  const auto same = [](const assignment& a, const assignment& b) {
    return std::ranges::equal(a.ids(), b.ids()) &&
           test::bit_difference(a.weights(), b.weights()) == "";
  };
  CHECK(same(routed(router, z, experts, side), routed(noisy, z, experts, side)));
  CHECK_FALSE(same(routed(router, z, experts, side), plain));
  router.phase = routing_phase::evaluation;
  CHECK(same(routed(router, z, experts, side), plain));
}

TEST_CASE("choices on plans refuse what does not fit, by name") {
  const auto z = test::make_logits(test::shape::normal, 1, 8, 4);
  CHECK(
      test::refusal([&] { routed(sinkhorn_expert_choice{.weights = plan_weights::by_k}, z, 4); }) ==
      "moeroute::sinkhorn_expert_choice: weights is by_k or sigmoid, expected softmax or plan");
  const auto refused = [](const sinkhorn_expert_choice& r, index_t experts) {
    return test::refusal([&] { r.check(8, experts); });
  };
  CHECK(refused({.scaling = {.temperature = 0.0f}}, 4) ==
        "moeroute::sinkhorn_expert_choice: temperature is 0.000000, expected > 0");
  CHECK(refused({}, 0) == "moeroute::sinkhorn_expert_choice: experts is 0, expected 1 to " +
                              std::to_string(max_experts));
  CHECK(test::refusal([&] { routed(sparse_transport_token_choice{.k = 5}, z, 4); }) ==
        "moeroute::sparse_transport_token_choice: k is 5, expected 1 to 4");
}

TEST_CASE("with every option at once experts take from a plan what a sort of its columns says") {
  test::random rng(41);
  for (index_t round = 0; round < test::sized(200, 30); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(20), tokens = 1 + rng.below(70);
    const sinkhorn_expert_choice router{
        .capacity = {.factor = 0.5 + 2.0 * static_cast<double>(rng.uniform()),
                     .multiple_of = 1 + rng.below(3),
                     .fixed = rng.below(2) * rng.below(tokens + 2)},
        .weights = coin() ? plan_weights::softmax : plan_weights::plan,
        .scaling = {
            .mass = coin() ? plan_mass::one : plan_mass::tokens,
            .order = coin() ? scaling_order::rows_then_columns : scaling_order::columns_then_rows,
            .domain = coin() ? sinkhorn_domain::exponential : sinkhorn_domain::logarithm,
            .similarity = coin() ? plan_similarity::logits : plan_similarity::softmax,
            .temperature = coin() ? 1.0f : 0.25f + rng.uniform(),
            .most_iterations = 1 + rng.below(6)}};
    auto z = test::make_logits(coin() ? test::shape::normal : test::shape::quantised,
                               rng.bits() % 1000, tokens, experts);
    for (float& x : z)
      if (const auto odd = rng.below(20); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    std::vector<std::uint8_t> mask;
    std::vector<std::int32_t> own_k;
    for (index_t t = 0; t < tokens; ++t) {
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      own_k.push_back(static_cast<std::int32_t>(rng.below(experts + 1)));
    }
    side_inputs side;
    if (coin()) side.mask = mask;
    std::vector<float> plan(z.size());
    workspace ws;
    sinkhorn_plan(router.scaling, rows_of(z, experts), side, ws,
                  matrix_view<float>(plan.data(), tokens, experts));
    if (coin()) side.k_of_token = own_k;
    std::vector<float> open = z;
    for (index_t t = 0; t < tokens; ++t)
      if (side.masked(t)) std::fill_n(open.begin() + t * experts, experts, -test::infinity);
    auto takers = column_choice(plan, open, experts, router.capacity(tokens, experts));
    std::vector<expert_id> ids;
    std::vector<double> weights;
    for (index_t t = 0; t < tokens; ++t) {
      auto& takes = takers[static_cast<std::size_t>(t)];
      const float* const row = plan.data() + t * experts;
      std::stable_sort(takes.begin(), takes.end(),
                       [&](expert_id a, expert_id b) { return row[a] > row[b]; });
      if (!side.k_of_token.empty())
        takes.resize(std::min<std::size_t>(
            takes.size(), static_cast<std::size_t>(own_k[static_cast<std::size_t>(t)])));
      std::sort(takes.begin(), takes.end());
      const float* const logits = z.data() + t * experts;
      const auto p = oracle::softmax(logits, experts, oracle::order(logits, experts));
      for (const expert_id e : takes) {
        ids.push_back(e);
        weights.push_back(router.weights == plan_weights::plan ? static_cast<double>(row[e])
                                                               : p[static_cast<std::size_t>(e)]);
      }
    }
    const assignment out = routed(router, z, experts, side);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " masked "
                  << !side.mask.empty() << " own k " << !side.k_of_token.empty());
    CHECK(test::listed(out.ids()) == ids);
    CHECK(test::difference(out.weights(), weights, 3e-6, 1e-30) == "");
    for (index_t t = 0; t < tokens; ++t)
      REQUIRE(out.ids(t).size() == takers[static_cast<std::size_t>(t)].size());
  }
}

TEST_CASE("a selective step with every option at once is the rule that its coin falls for") {
  test::random rng(43);
  index_t balanced = 0;
  for (index_t round = 0; round < test::sized(120, 20); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 2 + rng.below(20), tokens = 1 + rng.below(40);
    selective_sinkhorn router{.k = 1 + rng.below(experts), .probability = 0.5f};
    router.phase = rng.below(3) == 0 ? routing_phase::evaluation : routing_phase::training;
    router.scaling.temperature = coin() ? 0.05f : 1.0f;
    router.scaling.domain = coin() ? sinkhorn_domain::exponential : sinkhorn_domain::logarithm;
    router.stream = rng.bits();
    if (coin()) router.noise = {.kind = noise_kind::gaussian, .sigma = 0.5f};
    std::vector<float> share, gate;
    if (coin())
      for (index_t e = 0; e < experts; ++e) share.push_back(0.5f + rng.uniform());
    router.share = share;
    auto z = test::make_logits(test::shape::normal, rng.bits() % 1000, tokens, experts);
    std::vector<std::uint8_t> mask;
    std::vector<std::int32_t> own_k;
    for (index_t t = 0; t < tokens; ++t) {
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      own_k.push_back(static_cast<std::int32_t>(rng.below(router.k + 1)));
    }
    for (std::size_t i = 0; i < z.size(); ++i) gate.push_back(rng.normal());
    side_inputs side{.seed = rng.bits(), .step = static_cast<std::uint64_t>(round)};
    if (coin()) side.mask = mask;
    if (coin()) side.k_of_token = own_k;
    if (router.noise.active() && coin()) side.noise_logits = rows_of(gate, experts);
    const bool balances = router.phase == routing_phase::training &&
                          random_u01(side.seed, router.stream, side.step) < 0.5f;
    balanced += balances;
    CHECK(router.balances(side) == balances);
    const assignment out = routed(router, z, experts, side);
    moeroute::router<softmax> plain{.selection = {.k = router.k}, .weight = sum_normalized};
    if (router.phase == routing_phase::training) plain.transform.noise = router.noise;
    side_inputs read = side;
    if (balances || !plain.transform.noise.active()) read.noise_logits = {};
    const assignment expected = balances ? routed(sinkhorn{.k = router.k,
                                                           .weights = plan_weights::plan,
                                                           .scaling = router.scaling,
                                                           .share = share},
                                                  z, experts, read)
                                         : routed(plain, z, experts, read);
    INFO("round " << round << " balanced " << balances);
    CHECK(test::listed(out.ids()) == test::listed(expected.ids()));
    CHECK(test::bit_difference(out.weights(), expected.weights()) == "");
  }
  CHECK(balanced > 0);
}
