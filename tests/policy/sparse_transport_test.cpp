#include <moeroute/policy/batch/sparse_transport.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/route.hpp>
#include <vector>

#include "oracle/batch_routing.hpp"
#include "support/batch_bits.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;
using test::rows_of;

namespace {

std::vector<float> plan_of(const sparse_transport& router, const std::vector<float>& z,
                           index_t tokens, index_t experts) {
  std::vector<float> plan(z.size());
  workspace ws;
  router.plan(rows_of(z, experts), {}, ws, matrix_view<float>(plan.data(), tokens, experts));
  return plan;
}

}  // namespace

TEST_CASE("at every step columns sum to T / E and have at most k entries") {
  constexpr index_t tokens = 96, experts = 8;
  for (const test::shape shape : {test::shape::normal, test::shape::zipf, test::shape::quantised,
                                  test::shape::all_equal, test::shape::extreme})
    for (const index_t k : {index_t{1}, index_t{12}, index_t{40}, tokens})
      for (const index_t steps : {0, 1, 2, 5, 20}) {
        const auto z = test::make_logits(shape, 3, tokens, experts);
        const auto plan = plan_of({.support = k, .steps = steps}, z, tokens, experts);
        double error = 0;
        index_t most = 0;
        for (index_t e = 0; e < experts; ++e) {
          double sum = 0;
          index_t entries = 0;
          for (index_t t = 0; t < tokens; ++t) {
            const float x = plan[static_cast<std::size_t>(t * experts + e)];
            sum += static_cast<double>(x);
            entries += x != 0.0f;
          }
          error = std::max(error, std::abs(sum * experts / tokens - 1));
          most = std::max(most, entries);
        }
        INFO(test::name(shape) << " k=" << k << " steps=" << steps);
        CHECK(error < 1e-6);
        CHECK(most <= k);
      }
}

TEST_CASE("the plan is that of the double-precision solver") {
  for (const auto& [tokens, experts, k] :
       {std::tuple<index_t, index_t, index_t>{32, 4, 12}, {32, 4, 32}, {60, 6, 10}, {64, 16, 20}})
    for (const index_t steps : {0, 1, 7}) {
      const auto z = test::make_logits(test::shape::normal, 4, tokens, experts);
      const auto plan = plan_of({.support = k, .steps = steps}, z, tokens, experts);
      const auto expected = oracle::sparse_plan(oracle::softmax_rows(z, tokens, experts), tokens,
                                                experts, k, 1.0, 1e-2, steps);
      INFO("T=" << tokens << " E=" << experts << " k=" << k << " steps=" << steps);
      CHECK(test::difference(plan, expected, 1e-4, 2e-5) == "");
    }
}

TEST_CASE("steps bring the rows closer to 1") {
  constexpr index_t tokens = 256, experts = 8;
  const auto z = test::make_logits(test::shape::zipf, 4, tokens, experts);
  const auto row_error = [&](index_t steps) {
    const auto plan = plan_of({.support = tokens, .steps = steps}, z, tokens, experts);
    double error = 0;
    for (index_t t = 0; t < tokens; ++t) {
      double sum = 0;
      for (index_t e = 0; e < experts; ++e)
        sum += static_cast<double>(plan[static_cast<std::size_t>(t * experts + e)]);
      error += std::abs(sum - 1) / tokens;
    }
    return error;
  };
  CHECK(row_error(20) < 0.8 * row_error(0));
  CHECK(row_error(500) < 0.1 * row_error(0));
}

TEST_CASE("every expert takes exactly C tokens, with softmax weights") {
  for (const auto& [tokens, experts] :
       {std::pair<index_t, index_t>{1, 1}, {7, 3}, {64, 60}, {1200, 16}})
    for (const index_t support : {index_t{0}, index_t{1}, index_t{1000}}) {
      const auto z = test::make_logits(test::shape::normal, 9, tokens, experts);
      const auto p = oracle::softmax_rows(z, tokens, experts);
      const sparse_transport router{.support = support};
      const assignment a = routed(router, z, experts);
      const index_t c = router.capacity(tokens, experts);
      std::vector<index_t> load(static_cast<std::size_t>(experts), 0);
      for (const expert_id e : a.ids()) ++load[static_cast<std::size_t>(e)];
      CHECK(std::all_of(load.begin(), load.end(), [&](index_t n) { return n == c; }));
      std::vector<double> expected;
      for (index_t t = 0; t < tokens; ++t)
        for (const expert_id e : a.ids(t))
          expected.push_back(p[static_cast<std::size_t>(t * experts + e)]);
      CHECK(test::difference(a.weights(), expected, 3e-6, 1.2e-38) == "");
    }
}

TEST_CASE("weights from the plan are its entries") {
  constexpr index_t tokens = 96, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 3, tokens, experts);
  const sparse_transport router{.weights = transport_weights::plan};
  const auto plan = plan_of(router, z, tokens, experts);
  const assignment a = routed(router, z, experts);
  double sum = 0;
  for (index_t t = 0; t < tokens; ++t)
    for (std::size_t i = 0; i < a.ids(t).size(); ++i) {
      const float w = a.weights(t)[i];
      CHECK(w == plan[static_cast<std::size_t>(t * experts + a.ids(t)[i])]);
      sum += static_cast<double>(w);
    }
  CHECK(std::abs(sum - tokens) < 1e-3);
}

TEST_CASE("one token per expert is chosen hard, without steps by similarity") {
  constexpr index_t tokens = 64, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 5, tokens, experts);
  const auto plan = plan_of({.support = 1, .steps = 0}, z, tokens, experts);
  const auto p = oracle::softmax_rows(z, tokens, experts);
  for (index_t e = 0; e < experts; ++e) {
    const index_t best = oracle::column_order(p, tokens, experts, e)[0];
    CHECK(plan[static_cast<std::size_t>(best * experts + e)] == 8.0f);
  }
}

TEST_CASE("masked tokens and logits of -inf are never taken, weights stay finite") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = 50, experts = 12;
    const auto z = test::make_logits(shape, 9, tokens, experts);
    std::vector<std::uint8_t> mask(tokens, 1);
    for (std::size_t t = 0; t < tokens; t += 3) mask[t] = 0;
    const assignment a = routed(sparse_transport{}, z, experts, {.mask = mask});
    bool sound = true;
    for (index_t t = 0; t < tokens; ++t) {
      sound = sound && (mask[static_cast<std::size_t>(t)] != 0 || a.count(t) == 0);
      for (std::size_t i = 0; i < a.ids(t).size(); ++i)
        sound = sound && std::isfinite(a.weights(t)[i]) &&
                z[static_cast<std::size_t>(t * experts + a.ids(t)[i])] > -test::infinity;
    }
    INFO(test::name(shape));
    CHECK(sound);
    CHECK(routed(sparse_transport{}, z, experts, {.mask = std::vector<std::uint8_t>(tokens, 0)})
              .choices() == 0);
  }
}

TEST_CASE(
    "sparse transport has the same bits on every instruction set, executor and thread count") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = test::sized(1200, 400), experts = 24;
    const auto z = test::make_logits(shape, 12, tokens, experts);
    const sparse_transport router{.support = test::sized(300, 60),
                                  .weights = transport_weights::plan};
    INFO(test::name(shape));
    CHECK(test::batch_bits_differ(router, z, experts) == "");
  }
}

TEST_CASE("sparse transport refuses what does not fit, by name") {
  const auto refusal = [](const sparse_transport& r) {
    return test::refusal([&] { r.check(10, 4); });
  };
  CHECK(refusal({.gamma = 0.0f}) == "moeroute::sparse_transport: gamma is 0.000000, expected > 0");
  CHECK(refusal({.support = -1}) ==
        "moeroute::sparse_transport: support is -1, expected 0 to 1073741824");
  CHECK(refusal({}) == "accepted");
}
