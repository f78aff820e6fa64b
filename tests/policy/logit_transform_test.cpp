#include <moeroute/policy/parts/logit_transform.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/router.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace {

// The logits_after row itself.
std::vector<float> logits_after(const logit_transform& how, const std::vector<float>& row,
                                const side_inputs& side = {}) {
  std::vector<float> out(row.size());
  const auto n = static_cast<index_t>(row.size());
  how.apply({row.data(), n, 1, n, 0, &side}, out.data());
  return out;
}

}  // namespace

TEST_CASE("temperature divides, the soft-cap is cap * tanh(z / cap), the vector is added last") {
  std::vector<float> row, vector;
  for (int i = -300; i <= 300; ++i) {
    row.push_back(static_cast<float>(i) / 7.0f);
    vector.push_back(static_cast<float>(i % 5));
  }
  std::vector<double> expected;
  for (std::size_t i = 0; i < row.size(); ++i) {
    const double z = static_cast<double>(row[i]) / 0.7;
    expected.push_back(5 * std::tanh(z / 5) + static_cast<double>(vector[i]));
  }
  const auto got = logits_after({.temperature = 0.7f, .softcap = 5.0f, .add = vector}, row);
  CHECK(test::difference(got, expected, 1e-6, 1e-6) == "");
}

TEST_CASE("tanh is exact to a few ulp down to the smallest arguments") {
  std::vector<float> row;
  std::vector<double> expected;
  for (int i = -120; i <= 8; ++i)
    for (const float sign : {1.0f, -1.0f}) {
      row.push_back(sign * std::exp2(static_cast<float>(i) * 0.5f));
      expected.push_back(std::tanh(static_cast<double>(row.back())));
    }
  CHECK(test::difference(logits_after({.softcap = 1.0f}, row), expected, 6e-7) == "");
}

TEST_CASE("a masked logit stays masked under a soft-cap, and +inf becomes the cap") {
  const auto got = logits_after(
      {.softcap = 4.0f}, {-test::infinity, test::not_a_number, test::infinity, 1e30f, -1e30f});
  CHECK(got[0] == -test::infinity);
  CHECK(!(got[1] > -test::infinity));
  CHECK(got[2] == 4.0f);
  CHECK(got[3] == 4.0f);
  CHECK(got[4] == -4.0f);
}

TEST_CASE(
    "a vector added to the logits can hide an expert and moves nothing where it is constant") {
  const std::vector<float> logits = test::make_logits(test::shape::quantised, 1, 30, 8);
  std::vector<float> vector(8, 0.0f);
  vector[3] = -test::infinity;
  const router<softmax> hidden{.transform = {.add = vector}};
  const assignment a = routed(hidden, logits, 8);
  for (const expert_id e : a.ids()) CHECK(e != 3);
  const std::vector<float> constant(8, 2.5f);
  CHECK(
      test::bit_difference(routed(router<softmax>{.transform = {.add = constant}}, logits, 8).ids(),
                           routed(router<softmax>{}, logits, 8).ids()) == "");
}

TEST_CASE("temperature flattens or sharpens weights and leaves the choice alone") {
  const std::vector<float> logits = test::make_logits(test::shape::normal, 5, 30, 16);
  const assignment cold = routed(router<softmax>{.transform = {.temperature = 0.5f}}, logits, 16);
  const assignment hot = routed(router<softmax>{.transform = {.temperature = 4.0f}}, logits, 16);
  CHECK(test::bit_difference(cold.ids(), hot.ids()) == "");
  for (index_t t = 0; t < 30; ++t) CHECK(cold.weights(t)[0] > hot.weights(t)[0]);
}

TEST_CASE("a temperature, soft-cap or vector that makes no sense is refused") {
  const auto refused = [](const logit_transform& t) { return test::refusal([&] { t.check(8); }); };
  const std::vector<float> vector(7, 0.0f);
  CHECK(refused({.temperature = 0.0f}) ==
        "moeroute::logit_transform: temperature is 0.000000, expected > 0");
  CHECK(refused({.temperature = test::not_a_number}) ==
        "moeroute::logit_transform: temperature is nan, expected > 0");
  CHECK(refused({.softcap = -1.0f}) ==
        "moeroute::logit_transform: softcap is -1.000000, expected >= 0");
  CHECK(refused({.add = vector}) == "moeroute::logit_transform: add.size() is 7, expected 8");
  CHECK(refused({.noise = {.kind = noise_kind::gaussian, .sigma = -1.0f}}) ==
        "moeroute::logit_noise: sigma is -1.000000, expected >= 0");
}
