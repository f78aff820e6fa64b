#include <moeroute/policy/row/threshold.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
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

TEST_CASE("with every option at once a threshold's choices and weights are those of a plain loop") {
  test::random rng(97);
  const auto agrees = [&]<class Score>(Score) {
    const auto coin = [&] { return rng.below(2) == 0; };
    constexpr index_t edges[] = {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65};
    const index_t experts = coin() ? edges[rng.below(13)] : 1 + rng.below(70),
                  tokens = 1 + rng.below(40), stride = experts + rng.below(4);
    threshold_router<Score> rule{.norm = static_cast<threshold_norm>(rng.below(3))};
    std::vector<float> gamma, add;
    for (index_t e = 0; e < experts; ++e) {
      gamma.push_back(rng.uniform() + 0.5f);
      add.push_back(std::floor(rng.normal()));
    }
    constexpr float eps[] = {0.0f, 1e-5f, 0.25f}, scales[] = {1.0f, 2.5f, -0.5f},
                    sums[] = {1.0f, 3.0f};
    rule.eps = eps[rng.below(3)];
    rule.scale = scales[rng.below(3)];
    rule.norm_scale = sums[rng.below(2)];
    if (coin()) rule.gamma = gamma;
    if (rng.below(3) == 0) rule.transform = {.temperature = 2.0f, .add = add};
    // Ends of rows lie before memory that nobody may touch.
    test::guarded<float> memory((tokens - 1) * stride + experts);
    float* const z = memory.window((tokens - 1) * stride + experts, test::guarded_end::back);
    const auto seed = rng.bits() % 1000;
    const auto drawn = test::make_logits(coin() ? test::shape::normal : test::shape::quantised,
                                         seed, tokens, experts);
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e) {
        float& x = z[t * stride + e];
        x = drawn[static_cast<std::size_t>(t * experts + e)];
        if (const auto odd = rng.below(16); odd < 2)
          x = odd == 0 ? -test::infinity : test::not_a_number;
      }
    const auto logit = [&](index_t t, index_t e) {
      const float x = z[t * stride + e];
      return rule.transform.active() ? x / 2.0f + add[static_cast<std::size_t>(e)] : x;
    };
    const auto scores = [&](index_t t) {
      std::vector<float> row, s(static_cast<std::size_t>(experts));
      for (index_t e = 0; e < experts; ++e) row.push_back(logit(t, e));
      Score::score_row(row.data(), experts, s.data());
      return s;
    };
    // Now and then exactly one of the scores, which is not above it.
    const float one = scores(rng.below(tokens))[static_cast<std::size_t>(rng.below(experts))];
    rule.threshold = coin() && std::isfinite(one)     ? one
                     : std::is_same_v<Score, softmax> ? 0.1f
                     : coin()                         ? 0.5f
                                                      : -0.5f;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t)
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    side_inputs side;
    if (coin()) side.mask = mask;
    std::vector<expert_id> ids;
    std::vector<double> weights;
    std::vector<index_t> counts;
    for (index_t t = 0; t < tokens; ++t) {
      const std::vector<float> s = scores(t);
      double sum = 0.0;
      const auto first = static_cast<std::ptrdiff_t>(ids.size());
      for (index_t e = 0; e < experts && !side.masked(t); ++e) {
        const auto x = static_cast<double>(s[static_cast<std::size_t>(e)]);
        if (!(logit(t, e) > -test::infinity) || !(x > static_cast<double>(rule.threshold)))
          continue;
        sum += rule.norm == threshold_norm::rms ? x * x : x;
        ids.push_back(static_cast<expert_id>(e));
        weights.push_back(x *
                          (rule.gamma.empty() ? 1.0 : static_cast<double>(gamma[std::size_t(e)])) *
                          static_cast<double>(rule.scale));
      }
      const auto by = static_cast<double>(rule.eps);
      double divisor = 1.0;
      if (rule.norm == threshold_norm::sum)
        divisor = sum * static_cast<double>(rule.norm_scale) + by;
      if (rule.norm == threshold_norm::rms)
        divisor = std::sqrt(sum / static_cast<double>(experts) + by);
      for (auto w = weights.begin() + first; w != weights.end(); ++w)
        *w = divisor > 0.0 ? *w / divisor : 0.0;
      counts.push_back(static_cast<index_t>(ids.size()) - first);
    }
    workspace ws;
    assignment a;
    route(rule, matrix_view<const float>(z, tokens, experts, stride), side, ws, a);
    INFO("T=" << tokens << " E=" << experts << " norm " << static_cast<int>(rule.norm)
              << " threshold " << rule.threshold << " eps " << rule.eps);
    CHECK(test::listed(a.ids()) == ids);
    // A sum of either sign may come to nearly nothing.
    if (rule.norm != threshold_norm::sum || rule.threshold >= 0.0f)
      CHECK(test::difference(a.weights(), weights, 1e-5, 1e-36) == "");
    for (index_t t = 0; t < tokens; ++t) REQUIRE(a.count(t) == counts[static_cast<std::size_t>(t)]);
  };
  for (index_t round = 0; round < 60; ++round) {
    agrees(relu{});
    agrees(sigmoid{});
    agrees(identity_score{});
    agrees(softmax{});
  }
}

TEST_CASE(
    "weights of a threshold end at the largest float, of either sign, whatever divides them") {
  constexpr float most = std::numeric_limits<float>::max(), inf = test::infinity;
  const auto weight = [](const threshold_router<identity_score>& rule, std::vector<float> z) {
    // Alone, and where a row is more than a register.
    const auto alone = test::listed(routed(rule, z, 2).weights());
    z.resize(40, -inf);
    const auto among = test::listed(routed(rule, z, 40).weights());
    CHECK(alone == among);
    return alone;
  };
  using rule = threshold_router<identity_score>;
  CHECK(weight(rule{.threshold = -inf}, {inf, -1.0f}) == std::vector<float>{most, -1.0f});
  CHECK(weight(rule{.threshold = -inf, .scale = 2.0f}, {most, -most}) ==
        std::vector<float>{most, -most});
  CHECK(weight(rule{.threshold = -inf, .scale = -2.0f}, {inf, -most}) ==
        std::vector<float>{-most, most});
  // The largest float divides as any other.
  CHECK(weight(rule{.norm = threshold_norm::sum}, {most, 0.0f}) == std::vector<float>{1.0f});
  // What is infinite takes all where it divides, and what comes to nothing divides nothing.
  for (const threshold_norm norm : {threshold_norm::sum, threshold_norm::rms})
    CHECK(weight(rule{.norm = norm, .scale = 3.0f}, {inf, 1.0f}) == std::vector<float>{3.0f, 0.0f});
  CHECK(weight(rule{.threshold = -inf, .norm = threshold_norm::sum, .eps = 0.0f}, {1.0f, -1.0f}) ==
        std::vector<float>{0.0f, 0.0f});
  CHECK(weight(rule{.threshold = -inf, .norm = threshold_norm::sum, .eps = 0.0f}, {1.0f, -3.0f}) ==
        std::vector<float>{0.0f, 0.0f});
}

TEST_CASE("a threshold without numbers is that of ReLU routing, and each of its numbers has ends") {
  const threshold_router<relu> plain{};
  CHECK((plain.threshold == 0.0f && plain.norm == threshold_norm::none && plain.eps == 1e-5f &&
         plain.norm_scale == 1.0f && plain.scale == 1.0f));
  using rule = threshold_router<relu>;
  const auto refused = [](const rule& r, index_t experts = 8) {
    return test::refusal([&] { r.check(experts); });
  };
  CHECK(refused({.eps = 0.0f}) == "accepted");
  CHECK(refused({.eps = test::not_a_number}) ==
        "moeroute::threshold_router: eps is nan, expected >= 0");
  CHECK(refused({.eps = -1e-9f}) == "moeroute::threshold_router: eps is -0.000000, expected >= 0");
  for (const float x : {test::infinity, -test::infinity, test::not_a_number}) {
    CHECK(refused({.norm_scale = x}) ==
          "moeroute::threshold_router: scale and norm_scale must be finite");
    CHECK(refused({.scale = x}) ==
          "moeroute::threshold_router: scale and norm_scale must be finite");
  }
  CHECK(refused({.transform = {.temperature = 0.0f}}) ==
        "moeroute::logit_transform: temperature is 0.000000, expected > 0");
  CHECK(refused({}, 1) == "accepted");
  CHECK(refused({}, max_experts) == "accepted");
  CHECK(refused({}, max_experts + 1) ==
        "moeroute::threshold_router: E is 1048577, expected 1 to 1048576");
  CHECK(rule{.transform = {.noise = {.kind = noise_kind::gumbel}}}.reads_side(8).noise_logits);
  CHECK_FALSE(plain.reads_side(8).noise_logits);
}
