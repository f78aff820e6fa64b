#include <moeroute/policy/parts/weight.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/counted.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/top_p.hpp>
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
  // p is of no other norm.
  CHECK(near({.normalize = normalization::sum, .p = 2.0f}, {3.0f, 1.0f}, {0.75, 0.25}) == "");
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
  // Scores of either sign may come to nothing, or less.
  CHECK(near(sum_normalized, {1.0f, -1.0f}, {0, 0}) == "");
  CHECK(near(sum_normalized, {1.0f, -3.0f}, {0, 0}) == "");
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
  CHECK(refusal({.p = test::not_a_number}) == "moeroute::weight_rule: p is nan, expected >= 1");
  CHECK(refusal({.p = test::infinity}) == "moeroute::weight_rule: p is inf, expected >= 1");
  CHECK(refusal({.divide = 0.0f}) == "moeroute::weight_rule: divide is 0.000000, expected > 0");
  CHECK(refusal({.scale = test::infinity}) ==
        "moeroute::weight_rule: scale is inf, expected a finite number");
  const std::vector<float> three(3, 1.0f);
  CHECK(refusal({.expert_scale = three}) ==
        "moeroute::weight_rule: expert_scale.size() is 3, expected 4");
  CHECK(refusal({.scale = -2.0f}) == "accepted");
}

TEST_CASE("every number of a rule is refused where it is none, infinite or out of its range") {
  constexpr float endless = test::infinity;
  struct numbers {
    const char* of;
    const char* expected;
    std::function<void(float)> check;
    std::vector<float> refused, accepted;
  };
  const auto rule = [](float weight_rule::* number) {
    return [number](float x) {
      weight_rule r;
      r.*number = x;
      r.check(4);
    };
  };
  const auto noise = [](float logit_noise::* number) {
    return [number](float x) {
      logit_noise n;
      n.*number = x;
      n.check();
    };
  };
  const auto transform = [](float logit_transform::* number) {
    return [number](float x) {
      logit_transform t;
      t.*number = x;
      t.check(4);
    };
  };
  const auto plan = [](float sinkhorn_scaling::* number) {
    return [number](float x) {
      sinkhorn_scaling s;
      s.*number = x;
      s.check("plan");
    };
  };
  std::vector<float> x(4, 1.0f), y(4);
  const matrix_view<const float> rows(x.data(), 2, 2);
  const matrix_view<float> out(y.data(), 2, 2);
  const numbers all[] = {
      {"weight_rule: eps", ">= 0", rule(&weight_rule::eps), {-1e-9f, endless}, {0.0f}},
      {"weight_rule: p", ">= 1", rule(&weight_rule::p), {0.9999f, endless}, {1.0f}},
      {"weight_rule: divide", "> 0", rule(&weight_rule::divide), {0.0f, endless}, {1e-9f}},
      {"weight_rule: scale", "a finite number", rule(&weight_rule::scale), {endless}, {-1.0f}},
      {"logit_noise: sigma", ">= 0", noise(&logit_noise::sigma), {-1e-9f}, {0.0f}},
      {"logit_noise: floor", ">= 0", noise(&logit_noise::floor), {-1e-9f}, {0.0f}},
      {"logit_transform: temperature",
       "> 0",
       transform(&logit_transform::temperature),
       {0.0f, endless},
       {1e-9f}},
      {"logit_transform: softcap",
       ">= 0",
       transform(&logit_transform::softcap),
       {-1e-9f, endless},
       {0.0f}},
      {"plan: temperature", "> 0", plan(&sinkhorn_scaling::temperature), {0.0f, endless}, {1e-9f}},
      {"plan: eps", ">= 0", plan(&sinkhorn_scaling::eps), {-1e-9f, endless}, {0.0f}},
      {"plan: tolerance", ">= 0", plan(&sinkhorn_scaling::tolerance), {-1e-9f}, {0.0f, endless}},
      {"expert_choice: capacity.factor",
       "> 0",
       [](float v) { tokens_per_expert{.factor = static_cast<double>(v)}.check(); },
       {0.0f, endless},
       {1e-9f}},
      {"expert_choice: eps",
       ">= 0",
       [](float v) { expert_choice<>{.eps = v}.check(4, 4); },
       {-1e-9f, endless},
       {0.0f}},
      {"expert_choice: scale",
       "a finite number",
       [](float v) { expert_choice<>{.scale = v}.check(4, 4); },
       {endless},
       {-1.0f}},
      {"selective_sinkhorn: probability",
       "0 to 1",
       [](float v) { selective_sinkhorn{.probability = v}.check(4, 4); },
       {-1e-9f, 1.0001f},
       {0.0f, 1.0f}},
      {"counted: quantile",
       "0 to 1",
       [](float v) { row_count{.rule = count_rule::percentile, .quantile = v}.check(4); },
       {-1e-9f, 1.0001f},
       {0.0f, 1.0f}},
      {"counted: ratio",
       "0 to 1",
       [](float v) { row_count{.ratio = v}.check(4); },
       {-1e-9f, 1.0001f},
       {0.0f, 1.0f}},
      {"counted: entropy_low",
       ">= 0",
       [](float v) {
         row_count{.rule = count_rule::entropy, .low = v, .high = endless, .max_k = 4}.check(4);
       },
       {-1e-9f},
       {0.0f}},
      {"dense_if: q",
       "more than 0 and at most 8",
       [](float v) { dense_if{.rule = {.p = 0.5f}, .q = v}.check(4); },
       {0.0f, 8.0001f},
       {1e-9f, 8.0f}},
      {"dense_if: threshold",
       "0 to 1",
       [](float v) { dense_if{.rule = {.p = 0.5f}, .threshold = v}.check(4); },
       {-1e-9f, 1.0001f},
       {0.0f, 1.0f}},
      {"top_p: p",
       "more than 0 and at most 1",
       [](float v) { top_p{.p = v}.check(4); },
       {0.0f, 1.0001f},
       {1e-9f, 1.0f}},
      {"pass_logits: lambda",
       "a finite number",
       [](float v) { pass_logits{.passes = 2, .lambda = v}.check(4, 1); },
       {endless},
       {-1.0f}},
      {"steering: lambda",
       "a finite number",
       [](float v) { steering{.lambda = v}.check(4, 1); },
       {endless},
       {-1.0f}},
      {"standardized: lambda",
       "> 0",
       [](float v) { standardized{v}.check(4, 1); },
       {0.0f, endless},
       {1e-9f}},
      {"sparsemixer: jitter", ">= 0", [](float v) { sparsemixer{v}.check(4); }, {-1e-9f}, {0.0f}},
      {"jitter_rows: eps",
       ">= 0",
       [&](float v) { jitter_rows(rows, v, {}, out); },
       {-1e-9f, endless},
       {0.0f}},
      {"gaussian_rows: factor",
       ">= 0",
       [&](float v) { gaussian_rows(rows, v, 0.0f, {}, out); },
       {-1e-9f, endless},
       {0.0f}},
      {"gaussian_rows: addend",
       ">= 0",
       [&](float v) { gaussian_rows(rows, 0.0f, v, {}, out); },
       {-1e-9f, endless},
       {0.0f}}};
  for (const numbers& one : all) {
    INFO(one.of);
    std::vector<float> refused = one.refused;
    refused.insert(refused.end(), {test::not_a_number, -endless});
    for (const float v : refused)
      CHECK(test::refusal([&] { one.check(v); }) == "moeroute::" + std::string(one.of) + " is " +
                                                        std::to_string(v) + ", expected " +
                                                        one.expected);
    for (const float v : one.accepted) CHECK(test::refusal([&] { one.check(v); }) == "accepted");
  }
}

TEST_CASE(
    "a router refuses what one of its parts refuses, and has the plain parts where none is named") {
  const weight_rule bad_weight{.divide = 0.0f};
  const logit_transform bad_transform{.temperature = 0.0f};
  const std::string weight = "moeroute::weight_rule: divide is 0.000000, expected > 0",
                    transform = "moeroute::logit_transform: temperature is 0.000000, expected > 0";
  const auto refused = [](const auto& rule) { return test::refusal([&] { rule.check(8); }); };
  CHECK(refused(counted<>{.weight = bad_weight}) == weight);
  CHECK(refused(counted<>{.transform = bad_transform}) == transform);
  CHECK(refused(counted<>{.count = {.min_k = 9}}) ==
        "moeroute::counted: min_k is 9, expected 1 to 8");
  CHECK(refused(top_p{.weight = bad_weight}) == weight);
  CHECK(refused(top_p{.transform = bad_transform}) == transform);
  CHECK(refused(dense_if{.rule = {.weight = bad_weight}}) == weight);
  CHECK(refused(dense_if{.rule = {.p = 0.0f}}) ==
        "moeroute::top_p: p is 0.000000, expected more than 0 and at most 1");
  CHECK(refused(router<softmax>{.weight = bad_weight}) == weight);
  CHECK(refused(router<softmax>{.transform = bad_transform}) == transform);
  const std::vector<float> seven(7, 0.5f), eight(8, 0.5f);
  CHECK(refused(router<softmax>{.bias = selection_bias(seven)}) ==
        "moeroute::selection_bias: bias.size() is 7, expected 8");
  CHECK(refused(router<softmax>{.bias = selection_bias(eight)}) == "accepted");
  CHECK(refused(counted<>{}) == "accepted");
  CHECK(refused(dense_if{}) == "accepted");
  const top_p mass;
  CHECK((mass.p == 0.4f && mass.crossing == crossing::include && mass.min_k == 1 &&
         mass.max_k == 0 && mass.max_choices(8) == 8));
  CHECK((top_p{.max_k = 3}.max_choices(8) == 3 && top_p{.max_k = 9}.max_choices(8) == 8));
  const row_count count;
  CHECK((count.rule == count_rule::ratio && count.quantile == 0.5f && count.ratio == 0.5f &&
         count.low == 0.5f && count.high == 1.5f && count.mid_k == 2 && count.min_k == 1 &&
         count.max_k == 0));
  const dense_if dense;
  CHECK((dense.q == 1.1f && dense.threshold == 0.9f && dense.rule.p == 0.4f));
  CHECK((dynmole_included.rule.p == 0.75f && dynmole_included.rule.min_k == 2 &&
         dynmole_included.rule.crossing == crossing::include &&
         dynmole_included.rule.weight.normalize == normalization::sum));
  CHECK((dynmole_excluded.rule.p == 0.75f && dynmole_excluded.rule.min_k == 2 &&
         dynmole_excluded.rule.crossing == crossing::exclude &&
         dynmole_excluded.rule.weight.normalize == normalization::none));
  const weight_rule plain;
  CHECK((plain.normalize == normalization::none && plain.p == 1.0f &&
         plain.eps_where == eps_mode::none && plain.eps == 0.0f && plain.divide == 1.0f &&
         plain.scale == 1.0f && plain.expert_scale.empty()));
}
