#include <moeroute/policy/row/threshold.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace {

double score_of(const relu&, double z) { return std::max(z, 0.0); }
double score_of(const sigmoid&, double z) { return 1 / (1 + std::exp(-z)); }
double score_of(const identity_score&, double z) { return z; }

template <class Score>
void agrees(const threshold_router<Score>& rule, index_t experts) {
  for (const test::shape s : test::all_shapes) {
    // What +inf is divided by is infinite: a law of its own.
    if (s == test::shape::plus_infs && rule.norm != threshold_norm::none) continue;
    const index_t tokens = 18;
    const std::vector<float> logits = test::make_logits(s, 4, tokens, experts);
    const assignment a = routed(rule, logits, experts);
    INFO(test::name(s) << ", E = " << experts);
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<expert_id> ids;
      std::vector<double> weights;
      double sum = 0;
      for (index_t e = 0; e < experts; ++e) {
        const float z = logits[static_cast<std::size_t>(t * experts + e)];
        if (!(z > -test::infinity)) continue;
        const double x = score_of(rule.score, static_cast<double>(z));
        if (!(x > static_cast<double>(rule.threshold))) continue;
        ids.push_back(static_cast<expert_id>(e));
        weights.push_back(x);
        sum += rule.norm == threshold_norm::rms ? x * x : x;
      }
      const double eps = static_cast<double>(rule.eps);
      double divisor = 1;
      if (rule.norm == threshold_norm::sum)
        divisor = sum * static_cast<double>(rule.norm_scale) + eps;
      if (rule.norm == threshold_norm::rms)
        divisor = std::sqrt(sum / static_cast<double>(experts) + eps);
      for (std::size_t r = 0; r < ids.size(); ++r) {
        weights[r] *= static_cast<double>(rule.scale) / divisor;
        if (!rule.gamma.empty())
          weights[r] *= static_cast<double>(rule.gamma[static_cast<std::size_t>(ids[r])]);
        weights[r] = std::min(weights[r], static_cast<double>(std::numeric_limits<float>::max()));
      }
      REQUIRE(test::bit_difference(a.ids(t), ids) == "");
      REQUIRE(test::difference(a.weights(t), weights, 3e-6) == "");
    }
  }
}

}  // namespace

TEST_CASE("every expert above the threshold is chosen, by ascending id, on every shape") {
  for (const index_t experts : {1, 3, 16, 60, 257}) {
    agrees(threshold_router<relu>{}, experts);
    agrees(threshold_router<relu>{.threshold = 0.5f}, experts);
    agrees(threshold_router<sigmoid>{.threshold = 0.5f, .scale = 2.5f}, experts);
    agrees(threshold_router<identity_score>{.threshold = -0.25f}, experts);
  }
}

TEST_CASE("the scores are divided by their RMS over all experts, or by their sum") {
  const std::vector<float> gamma(60, 0.5f);
  for (const index_t experts : {3, 16, 60}) {
    agrees(threshold_router<relu>{.norm = threshold_norm::rms}, experts);
    agrees(threshold_router<relu>{.norm = threshold_norm::sum}, experts);
    agrees(threshold_router<relu>{.norm = threshold_norm::sum, .eps = 0.1f, .norm_scale = 2.0f},
           experts);
  }
  agrees(threshold_router<relu>{.norm = threshold_norm::rms, .gamma = gamma}, 60);
}

TEST_CASE("a token may choose no expert, and one may choose all") {
  const assignment a = routed(threshold_router<relu>{}, {-1.0f, 0.0f, -0.0f, 1.0f, 2.0f, 3.0f}, 3);
  CHECK(a.count(0) == 0);
  CHECK(a.count(1) == 3);
  CHECK(a.choices() == 3);
}

TEST_CASE("the RMS of normalised ReLU weights is 1, and a factor on the logits changes nothing") {
  const std::vector<float> logits = test::make_logits(test::shape::normal, 2, 9, 48);
  std::vector<float> louder = logits;
  for (float& z : louder) z *= 8.0f;
  const threshold_router<relu> rule{.norm = threshold_norm::rms, .eps = 0.0f};
  const assignment a = routed(rule, logits, 48), b = routed(rule, louder, 48);
  CHECK(test::bit_difference(a.ids(), b.ids()) == "");
  CHECK(test::difference(a.weights(), b.weights(), 1e-6) == "");
  for (index_t t = 0; t < 9; ++t) {
    double square = 0;
    for (const float w : a.weights(t)) square += static_cast<double>(w) * static_cast<double>(w);
    CHECK(std::abs(square / 48 - 1) < 1e-5);
  }
}

TEST_CASE("the weight goes to 0 with its logit: no jump where an expert comes in") {
  float last = 0.0f;
  for (int i = -8; i <= 64; ++i) {
    const float z = static_cast<float>(i) / 64.0f;
    const assignment a = routed(threshold_router<relu>{}, {z, 1.0f}, 2);
    const float w = a.ids(0)[0] == 0 ? a.weights(0)[0] : 0.0f;
    CHECK(std::abs(w - last) <= 1.0f / 64.0f);
    last = w;
  }
}

TEST_CASE("weights stay finite beside +inf") {
  for (const threshold_norm norm :
       {threshold_norm::none, threshold_norm::sum, threshold_norm::rms}) {
    const assignment a =
        routed(threshold_router<relu>{.norm = norm}, {test::infinity, 1.0f, test::infinity}, 3);
    REQUIRE(a.count(0) == 3);
    for (const float w : a.weights(0)) CHECK(std::isfinite(w));
    CHECK(a.weights(0)[0] == a.weights(0)[2]);
    CHECK(a.weights(0)[0] > 0.0f);
  }
}

TEST_CASE("a token that chooses everything writes nothing of its neighbours', in any order") {
  // More tokens than one piece has, and rows that fill a register and a part of the next.
  constexpr index_t tokens = 2000, experts = 20;
  const std::vector<float> logits = test::make_logits(test::shape::normal, 6, tokens, experts);
  const std::vector<float> gamma(experts, 3.0f);
  const threshold_router<identity_score> rule{.threshold = -100.0f, .gamma = gamma};
  workspace memory;
  assignment forwards, backwards;
  route(rule, test::rows_of(logits, experts), memory, forwards);
  route(rule, test::rows_of(logits, experts), memory, backwards, test::backwards{});
  CHECK(forwards.choices() == tokens * experts);
  CHECK(test::bit_difference(backwards.ids(), forwards.ids()) == "");
  CHECK(test::bit_difference(backwards.weights(), forwards.weights()) == "");
}

TEST_CASE("pieces of a ragged batch are joined without a gap, in any order") {
  constexpr index_t tokens = 4000, experts = 20;
  const std::vector<float> logits = test::make_logits(test::shape::normal, 7, tokens, experts);
  const threshold_router<relu> rule{.threshold = 0.5f, .scale = 2.0f};
  std::vector<expert_id> ids;
  std::vector<float> weights;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      if (const float z = logits[static_cast<std::size_t>(t * experts + e)]; z > 0.5f) {
        ids.push_back(static_cast<expert_id>(e));
        weights.push_back(2.0f * z);
      }
  workspace memory;
  assignment a;
  const auto check = [&] {
    CHECK(test::bit_difference(a.ids(), ids) == "");
    CHECK(test::bit_difference(a.weights(), weights) == "");
    CHECK(a.first(tokens) == static_cast<index_t>(ids.size()));
  };
  route(rule, test::rows_of(logits, experts), memory, a);
  check();
  route(rule, test::rows_of(logits, experts), memory, a, test::backwards{});
  check();
}

TEST_CASE("a threshold, eps or gamma that makes no sense is refused") {
  using rule = threshold_router<relu>;
  const auto refused = [](const rule& r) { return test::refusal([&] { r.check(8); }); };
  const std::vector<float> gamma(7, 1.0f);
  CHECK(refused({.threshold = test::not_a_number}) ==
        "moeroute::threshold_router: threshold is NaN, expected a number");
  CHECK(refused({.eps = -1.0f}) == "moeroute::threshold_router: eps is -1.000000, expected >= 0");
  CHECK(refused({.gamma = gamma}) == "moeroute::threshold_router: gamma.size() is 7, expected 8");
  CHECK(refused({.scale = test::infinity}) ==
        "moeroute::threshold_router: scale and norm_scale must be finite");
  CHECK(test::refusal([] { rule{}.check(0); }) ==
        "moeroute::threshold_router: E is 0, expected 1 to " + std::to_string(max_experts));
}
