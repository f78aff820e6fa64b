#include <moeroute/policy/parts/logit_transform.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/router.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
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

TEST_CASE(
    "with every option at once logits are divided, bent, moved and made noisy, in this order") {
  test::random rng(127);
  for (index_t round = 0; round < 150; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t n = 1 + rng.below(70), stride = n + rng.below(4), first = rng.below(40);
    const int rows = static_cast<int>(1 + rng.below(block_rows));
    std::vector<float> vector,
        z = test::make_logits(test::shape::normal, rng.bits() % 1000, rows, stride);
    for (float& x : z)
      if (const auto odd = rng.below(16); odd < 3)
        x = odd == 0 ? -test::infinity : odd == 1 ? test::not_a_number : test::infinity;
    for (index_t e = 0; e < n; ++e) vector.push_back(rng.normal());
    logit_transform how;
    if (coin()) how.temperature = 0.7f;
    if (coin()) how.softcap = 3.0f;
    if (coin()) how.add = vector;
    if (coin()) how.noise = {.kind = noise_kind::gaussian, .sigma = 0.5f};
    CHECK(how.active() == (how.temperature != 1.0f || how.softcap != 0.0f || !how.add.empty() ||
                           how.noise.kind != noise_kind::none));
    const side_inputs side{.seed = rng.bits()};
    test::guarded<float> in((rows - 1) * stride + n), out(rows * n);
    float* const from = in.window((rows - 1) * stride + n, test::guarded_end::back);
    std::copy_n(z.begin(), (rows - 1) * stride + n, from);
    float* const to = out.window(rows * n, test::guarded_end::back);
    const logit_block made = how.apply({from, stride, rows, n, first, &side}, to);
    CHECK((made.logits == to && made.stride == n && made.rows == rows && made.experts == n &&
           made.first_token == first));
    index_t wrong = 0;
    for (int i = 0; i < rows; ++i) {
      std::vector<float> noise(static_cast<std::size_t>(n), 0.0f);
      if (how.noise.active()) how.noise.add_to_row(noise.data(), n, first + i, side);
      for (index_t e = 0; e < n; ++e) {
        auto x = static_cast<double>(from[i * stride + e]) / static_cast<double>(how.temperature);
        const auto cap = static_cast<double>(how.softcap);
        if (how.softcap != 0.0f) x = x > -HUGE_VAL ? cap * std::tanh(x / cap) : -HUGE_VAL;
        if (!how.add.empty()) x += static_cast<double>(vector[static_cast<std::size_t>(e)]);
        x += static_cast<double>(noise[static_cast<std::size_t>(e)]);
        const auto y = static_cast<double>(to[i * n + e]);
        const bool none = !(x > -HUGE_VAL);  // NaN or -inf, which are one
        wrong += none ? y > -HUGE_VAL : x != y && !(std::abs(x - y) <= 2e-6 * std::abs(x) + 2e-6);
      }
    }
    INFO("E=" << n << " rows " << rows);
    CHECK(wrong == 0);
  }
  CHECK_FALSE(logit_transform{}.active());
}
