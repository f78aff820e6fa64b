// The code of docs/balancing.md, and what the page says of it, on scores that are easy to see
// through.
#include <moeroute/balance/loss.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/quantile.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/data/expert_load.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

#include "support/skewed.hpp"

using namespace moeroute;

namespace {

std::int64_t busiest(const assignment& choices, index_t experts) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(experts));
  count_choices(choices, {}, std::span(counts));
  return *std::max_element(counts.begin(), counts.end());
}

}  // namespace

TEST_CASE("the bias of docs/balancing.md follows its balancer into the router") {
  const test::skewed_scores d;
  const index_t experts = d.experts, k = d.k;
  const matrix_view<const float> scores(d.score.data(), d.tokens, experts);
  workspace ws;
  assignment choices;

  quantile_balancer balancer(experts, {.k = k, .ema = 0.9f});
  router<identity_score> rule{.score = {}, .selection = {.k = k}, .weight = sum_normalized};
  rule.bias = selection_bias(balancer.bias());
  route(rule, scores, ws, choices);
  const std::int64_t before = busiest(choices, experts);
  for (int batch = 0; batch < 60; ++batch) {
    route(rule, scores, ws, choices);
    balancer.observe(scores, ws);
    balancer.update();
  }
  const std::int64_t even = d.tokens * k / experts;
  CHECK(before > 2 * even);
  CHECK(busiest(choices, experts) < even + even / 4);
}

TEST_CASE("the loss of docs/balancing.md pulls at the logits of the busiest expert") {
  const test::skewed_scores d(2, 256, 8, 2);
  const index_t experts = d.experts, k = d.k;
  const matrix_view<const float> logits(d.score.data(), d.tokens, experts);
  std::vector<float> memory(d.score.size());
  const matrix_view<float> dlogits(memory.data(), d.tokens, experts);
  workspace ws;
  assignment choices;
  route(router<softmax>{.score = {}, .selection = {.k = k}, .weight = sum_normalized}, logits, ws,
        choices);

  std::vector<double> counts(static_cast<std::size_t>(experts));
  count_choices(choices, {}, std::span(counts));
  const auto term = switch_loss::megatron(0.01, counts, k);
  const auto value = balance_loss<float>(loss_options{}, logits, dlogits, ws, serial{}, term);

  CHECK(value.total() > 0.01);
  const auto most = std::max_element(counts.begin(), counts.end()) - counts.begin();
  const auto least = std::min_element(counts.begin(), counts.end()) - counts.begin();
  double up = 0.0, down = 0.0;
  for (index_t t = 0; t < d.tokens; ++t) {
    up += static_cast<double>(dlogits(t, most));
    down += static_cast<double>(dlogits(t, least));
  }
  CHECK(up > 0.0);
  CHECK(down < 0.0);
}
