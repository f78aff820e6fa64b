#include <moeroute/policy/parts/weight.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

/// The weights of one row's scores, in every lane of a block; a NaN score stands for "no expert".
/// Ids descend, so that no rank is its expert's id by chance.
std::vector<float> weights(const weight_rule& rule, const std::vector<float>& scores) {
  std::vector<expert_id> id;
  std::vector<float> value;
  for (std::size_t r = 0; r < scores.size(); ++r)
    for (int i = 0; i < block_rows; ++i) {
      const bool there = scores[r] == scores[r];
      id.push_back(there ? static_cast<expert_id>(scores.size() - 1 - r) : no_expert);
      value.push_back(there ? scores[r] : 0.0f);
    }
  choice_block c{static_cast<int>(scores.size()), id.data(), value.data()};
  rule.apply(c);
  std::vector<float> out;
  for (std::size_t r = 0; r < scores.size(); ++r) {
    out.push_back(value[r * block_rows]);
    for (int i = 1; i < block_rows; ++i)
      if (value[r * block_rows + static_cast<std::size_t>(i)] != out.back())
        return {};  // lanes differ
  }
  return out;
}

std::string near(const weight_rule& rule, const std::vector<float>& scores,
                 const std::vector<double>& expected) {
  return test::difference(weights(rule, scores), expected, 2e-7);
}

const float none = test::not_a_number;

}  // namespace

TEST_CASE("raw weights are the scores, 0 where there is no expert") {
  CHECK(near(raw_weights, {0.5f, 0.25f, none}, {0.5, 0.25, 0}) == "");
}

TEST_CASE("normalised weights sum to the scale") {
  CHECK(near(sum_normalized, {0.5f, 0.25f, 0.05f}, {0.625, 0.3125, 0.0625}) == "");
  CHECK(near({.normalize = normalization::sum, .scale = 2.5f}, {1.0f, 3.0f, none},
             {0.625, 1.875, 0}) == "");
}

TEST_CASE("the Lp norm divides by (sum of s^p)^(1/p)") {
  CHECK(near({.normalize = normalization::lp, .p = 2.0f}, {3.0f, 4.0f}, {0.6, 0.8}) == "");
  CHECK(near({.normalize = normalization::lp}, {3.0f, 1.0f}, {0.75, 0.25}) == "");
}

TEST_CASE("eps is added to the divisor, or is its least value") {
  const weight_rule add{.normalize = normalization::sum, .eps_where = eps_mode::add, .eps = 0.5f};
  const weight_rule clamp{
      .normalize = normalization::sum, .eps_where = eps_mode::clamp, .eps = 0.5f};
  CHECK(near(add, {0.25f, 0.25f}, {0.25, 0.25}) == "");
  CHECK(near(clamp, {0.125f, 0.125f}, {0.25, 0.25}) == "");
  CHECK(near(clamp, {0.75f, 0.25f}, {0.75, 0.25}) == "");
  CHECK(near(add, {0.0f, 0.0f}, {0, 0}) == "");
}

TEST_CASE("eps has the unit of the scores where their sum is beyond a float") {
  using enum eps_mode;
  const auto sum = [](eps_mode where, float eps) {
    return weight_rule{.normalize = normalization::sum, .eps_where = where, .eps = eps};
  };
  CHECK(near(sum(add, 1e38f), {3e38f, 3e38f}, {3.0 / 7, 3.0 / 7}) == "");
  CHECK(near(sum(add, 1e-5f), {3e38f, 3e38f}, {0.5, 0.5}) == "");
  CHECK(near(sum(clamp, 2.0f), {3e38f, 1e38f, 1e38f}, {0.6, 0.2, 0.2}) == "");
  const weight_rule lp{.normalize = normalization::lp, .p = 2.0f, .eps_where = add, .eps = 5e29f};
  CHECK(near(lp, {3e29f, 4e29f}, {0.3, 0.4}) == "");
  // An infinite score leaves nothing of it.
  CHECK(near(sum(add, 3.0f), {test::infinity, 7.0f}, {1, 0}) == "");
}

TEST_CASE("a divisor of 0 gives weights of 0") {
  CHECK(near(sum_normalized, {0.0f, 0.0f}, {0, 0}) == "");
  CHECK(near(sum_normalized, {none, none}, {0, 0}) == "");
}

TEST_CASE("weights are finite where scores or their sum are not") {
  const float inf = test::infinity, max = std::numeric_limits<float>::max();
  CHECK(near(sum_normalized, {inf, inf, 3.0f}, {0.5, 0.5, 0}) == "");
  CHECK(near(sum_normalized, {max, max}, {0.5, 0.5}) == "");
  CHECK(near(raw_weights, {inf}, {static_cast<double>(max)}) == "");
  CHECK(near({.scale = 2.0f}, {max}, {static_cast<double>(max)}) == "");
  CHECK(near({.scale = -2.0f}, {max}, {-static_cast<double>(max)}) == "");
}

TEST_CASE("expert scales and the division by k come after normalising") {
  const std::vector<float> scale = {2.0f, 4.0f};
  weight_rule rule = sum_normalized;
  rule.expert_scale = scale;
  rule.divide = 2.0f;
  CHECK(near(rule, {1.0f, 3.0f}, {0.5, 0.75}) == "");
}

TEST_CASE("a row factor may be left out only where it is divided away") {
  CHECK(raw_weights.needs() == score_scale::exact);
  CHECK(sum_normalized.needs() == score_scale::up_to_row_factor);
  CHECK(weight_rule{.normalize = normalization::lp, .p = 3.0f}.needs() ==
        score_scale::up_to_row_factor);
  CHECK(weight_rule{.normalize = normalization::sum, .eps_where = eps_mode::add}.needs() ==
        score_scale::exact);
  CHECK(weight_rule{.normalize = normalization::sum, .eps_where = eps_mode::clamp}.needs() ==
        score_scale::exact);
}

TEST_CASE("rules that cannot be carried out are refused") {
  const auto refusal = [](const weight_rule& rule) {
    return test::refusal([&] { rule.check(4); });
  };
  CHECK(refusal({.eps = -1.0f}) == "moeroute::weight_rule: eps is -1.000000, expected >= 0");
  CHECK(refusal({.p = 0.5f}) == "moeroute::weight_rule: p is 0.500000, expected >= 1");
  CHECK(refusal({.p = test::not_a_number}).starts_with("moeroute::weight_rule: p is "));
  CHECK(refusal({.p = test::infinity}) == "moeroute::weight_rule: p is inf, expected >= 1");
  CHECK(refusal({.divide = 0.0f}) == "moeroute::weight_rule: divide is 0.000000, expected > 0");
  CHECK(refusal({.scale = test::infinity}) ==
        "moeroute::weight_rule: scale is inf, expected a finite number");
  const std::vector<float> three(3, 1.0f);
  CHECK(refusal({.expert_scale = three}) ==
        "moeroute::weight_rule: expert_scale.size() is 3, expected 4");
  CHECK(refusal({.scale = -2.0f}) == "accepted");
}
