// The families of token choice against an independent float64 reference, and the worked examples of
// the sheet.
//
// The files are float64, the library chooses in float: ids are exact, as no two values that decide
// are closer than 1e-6 relative; weights to 3e-6.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <moeroute/stage/route.hpp>
#include <optional>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/golden.hpp"
#include "support/routed.hpp"

using namespace moeroute;
using test::golden_json;
using test::routed;

namespace {

// Row by row: the ids exactly, the weights to 3e-6.
void is_as_in(const golden_json& ids, const golden_json& weights, const assignment& a) {
  REQUIRE(static_cast<index_t>(ids.size()) == a.tokens());
  for (index_t t = 0; t < a.tokens(); ++t) {
    const auto at = static_cast<std::size_t>(t);
    INFO("token " << t);
    const auto expected = ids[at].get<std::vector<expert_id>>();
    CHECK(test::bit_difference(a.ids(t), expected) == "");
    if (!weights.is_null())
      CHECK(test::difference(a.weights(t), test::golden_floats(weights[at]), 3e-6) == "");
  }
}

// The smallest relative gap between values that a choice turns on, over a row in descending order.
float closest(std::vector<float> row) {
  std::sort(row.begin(), row.end());
  float gap = 1.0f;
  for (std::size_t i = 1; i < row.size(); ++i)
    gap = std::min(gap, (row[i] - row[i - 1]) / std::max(std::abs(row[i]), 1e-30f));
  return gap;
}

// Float rounding cannot turn a choice.
void is_decided(const std::vector<float>& logits, index_t experts) {
  for (auto row = logits.begin(); row != logits.end(); row += experts)
    CHECK(closest({row, row + experts}) > 1e-6f);
}

}  // namespace

TEST_CASE("top-p chooses and weighs as the reference") {
  const std::string name = GENERATE("top_p_0.4_maxk0_raw", "top_p_0.7_maxk0_raw",
                                    "top_p_0.7_maxk0_renorm", "top_p_0.7_maxk4_raw");
  const golden_json file = test::read_family(name), &params = file.at("params");
  const top_p router{.p = params.at("p").get<float>(),
                     .max_k = params.at("max_k").is_null() ? 0 : params.at("max_k").get<index_t>(),
                     .weight = params.at("renormalise").get<bool>() ? sum_normalized : raw_weights};
  const auto experts = file.at("experts").get<index_t>();
  const std::vector<float> logits = test::golden_floats(file.at("logits"));
  INFO(name);
  is_decided(logits, experts);
  is_as_in(file.at("ids"), file.at("weights"), routed(router, logits, experts));
}

TEST_CASE("group-limited top-k chooses and weighs as the reference") {
  const std::string name =
      GENERATE("grouped_topk_v2", "grouped_topk_v3", "grouped_topk_v3_g8", "grouped_topk_mistral4");
  const golden_json file = test::read_family(name), &params = file.at("params");
  const bool sums = params.at("normalise").get<bool>();
  const top_k selection{
      .k = file.at("k").get<index_t>(),
      .groups = params.at("groups").get<index_t>(),
      .topk_group = params.at("topk_group").get<index_t>(),
      .group_score = params.at("group_score") == "max" ? group_score::max : group_score::top2_sum,
      .group_fill = test::golden_float(params.at("fill"))};
  const weight_rule weight{.normalize = sums ? normalization::sum : normalization::none,
                           .eps_where = sums ? eps_mode::add : eps_mode::none,
                           .eps = sums ? params.at("eps").get<float>() : 0.0f,
                           .scale = params.at("scale").get<float>()};
  const std::vector<float> bias = test::golden_floats(file.at("correction_bias"));
  const std::vector<float> logits = test::golden_floats(file.at("logits"));
  const auto experts = file.at("experts").get<index_t>();
  INFO(name);
  const bool sigmoids = params.at("score") == "sigmoid";
  is_as_in(
      file.at("ids"), file.at("weights"),
      sigmoids
          ? routed(router{sigmoid{}, selection, weight, selection_bias(bias)}, logits, experts)
          : routed(router{softmax{}, selection, weight, selection_bias(bias)}, logits, experts));
}

TEST_CASE("hash tables are looked up and balanced as in the reference") {
  const golden_json file = test::read_family("hash_routing");
  const auto experts = file.at("experts").get<index_t>();
  const auto tokens = file.at("token_ids_in").get<std::vector<std::int32_t>>();
  const std::vector<float> logits(tokens.size() * static_cast<std::size_t>(experts), 0.0f);
  const side_inputs side{.token_ids = tokens};
  const auto ids_of = [&](const expert_table& table) {
    const table_router<uniform_score> router{.table = &table, .weight = sum_normalized};
    const assignment a = routed(router, logits, experts, side);
    for (const float w : a.weights()) CHECK(w == 1.0f / static_cast<float>(table.k()));
    return std::vector<expert_id>(a.ids().begin(), a.ids().end());
  };

  std::vector<expert_id> flat;
  for (const golden_json& row : file.at("table"))
    for (const golden_json& e : row) flat.push_back(e.get<expert_id>());
  std::vector<expert_id> expected;
  for (const golden_json& row : file.at("ids_table"))
    for (const golden_json& e : row) expected.push_back(e.get<expert_id>());
  CHECK(ids_of(expert_table(flat, 2, experts)) == expected);

  const auto frequency = file.at("frequency").get<std::vector<std::int64_t>>();
  const expert_table balanced = balanced_table(frequency, experts);
  const auto rows = file.at("balanced_table").get<std::vector<expert_id>>();
  std::vector<std::int64_t> load(static_cast<std::size_t>(experts), 0);
  for (std::size_t t = 0; t < rows.size(); ++t) {
    CHECK(balanced.of(static_cast<index_t>(t))[0] == rows[t]);
    load[static_cast<std::size_t>(rows[t])] += frequency[t];
  }
  CHECK(load == file.at("balanced_load").get<std::vector<std::int64_t>>());
  CHECK(ids_of(balanced) == file.at("ids_balanced").get<std::vector<expert_id>>());

  std::vector<std::int32_t> cluster(frequency.size());
  for (std::size_t t = 0; t < cluster.size(); ++t) cluster[t] = static_cast<std::int32_t>(t);
  CHECK(ids_of(clustered_table(cluster, experts)) ==
        file.at("ids_modulo").get<std::vector<expert_id>>());
}

TEST_CASE("noisy top-k with the reference's noise chooses and weighs as the reference") {
  const std::string name = GENERATE("noisy_topk_k2", "noisy_topk_k4");
  const golden_json file = test::read_family(name);
  const auto experts = file.at("experts").get<index_t>();
  std::vector<float> logits = test::golden_floats(file.at("logits"));
  const std::vector<float> gate = test::golden_floats(file.at("noise_logits"));
  const std::vector<float> noise = test::golden_floats(file.at("noise"));
  std::vector<float> sigma = gate;
  // The library draws its own noise: softplus and choice are its own here, the drawing is not.
  simd::map_row<simd::default_arch>(
      gate.data(), static_cast<index_t>(gate.size()), sigma.data(),
      [](simd::vfloat<simd::default_arch> x) { return simd::softplus<simd::default_arch>(x); });
  for (std::size_t i = 0; i < logits.size(); ++i) logits[i] += noise[i] * (sigma[i] + 0.01f);
  INFO(name);
  CHECK(test::difference(logits, test::golden_floats(file.at("noisy_logits")), 1e-6, 5e-7) == "");
  is_decided(logits, experts);
  const router<softmax_selected> router{.selection = {.k = file.at("k").get<index_t>()}};
  is_as_in(file.at("ids"), file.at("weights"), routed(router, logits, experts));
}

TEST_CASE("a bias that follows the load chooses as the reference in every step") {
  const std::string name = GENERATE("auxfree_bias_u0.001", "auxfree_bias_u0.05");
  const golden_json file = test::read_family(name);
  const auto experts = file.at("experts").get<index_t>();
  const auto k = file.at("k").get<index_t>();
  for (std::size_t step = 0; step < file.at("logits_steps").size(); ++step) {
    const std::vector<float> logits = test::golden_floats(file.at("logits_steps")[step]);
    const std::vector<float> bias = test::golden_floats(file.at("bias_after")[step]);
    const assignment a = routed(router{sigmoid{}, top_k{.k = k}, raw_weights, selection_bias(bias)},
                                logits, experts);
    INFO(name << ", step " << step);
    is_as_in(file.at("ids_steps")[step], nullptr, a);
  }
}

namespace {

const std::vector<float> four_logits = {2.0f, 1.0f, 0.5f, -1.0f};

// One token's choices as the sheet prints them, to its six digits.
void is(const assignment& a, const std::vector<expert_id>& ids,
        const std::vector<double>& weights) {
  CHECK(std::vector<expert_id>(a.ids().begin(), a.ids().end()) == ids);
  CHECK(test::difference(a.weights(), weights, 0.0, 6e-7) == "");
}

}  // namespace

TEST_CASE("worked example: softmax, raw and over the selected") {
  is(routed(router<softmax>{.selection = {.k = 4}}, four_logits, 4), {0, 1, 2, 3},
     {0.609460, 0.224208, 0.135989, 0.030343});
  is(routed(router<softmax>{.selection = {.k = 1}}, four_logits, 4), {0}, {0.609460});
  is(routed(router<softmax>{.weight = sum_normalized}, four_logits, 4), {0, 1},
     {0.731059, 0.268941});
  is(routed(router<softmax_selected>{}, four_logits, 4), {0, 1}, {0.731059, 0.268941});
}

TEST_CASE("worked example: sigmoid, with and without a bias") {
  is(routed(router<sigmoid>{.selection = {.k = 4}}, four_logits, 4), {0, 1, 2, 3},
     {0.880797, 0.731059, 0.622459, 0.268941});
  const weight_rule v3{
      .normalize = normalization::sum, .eps_where = eps_mode::add, .eps = 1e-20f, .scale = 2.5f};
  is(routed(router<sigmoid>{.weight = v3}, four_logits, 4), {0, 1}, {1.366123, 1.133877});
  const std::vector<float> bias = {-0.3f, 0.0f, 0.0f, 0.5f};
  is(routed(router<sigmoid>{.weight = v3, .bias = selection_bias(bias)}, four_logits, 4), {3, 1},
     {0.672354, 1.827646});
}

TEST_CASE("worked example: square root of softplus") {
  is(routed(router<sqrt_softplus>{.selection = {.k = 4}}, four_logits, 4), {0, 1, 2, 3},
     {1.458399, 1.145976, 0.986953, 0.559698});
  is(routed(router<sqrt_softplus>{.weight = {.normalize = normalization::sum, .scale = 1.5f}},
            four_logits, 4),
     {0, 1}, {0.839971, 0.660029});
}

TEST_CASE("worked example: ReLU routing, raw, by RMS and by sum") {
  is(routed(threshold_router<relu>{}, four_logits, 4), {0, 1, 2}, {2, 1, 0.5});
  is(routed(threshold_router<relu>{.norm = threshold_norm::rms}, four_logits, 4), {0, 1, 2},
     {1.745736, 0.872868, 0.436434});
  is(routed(threshold_router<relu>{.norm = threshold_norm::sum}, four_logits, 4), {0, 1, 2},
     {0.571427, 0.285713, 0.142857});
}

TEST_CASE("worked example: SparseMixer") {
  is(routed(sparsemixer{}, four_logits, 4), {0, 1}, {1, 1});
  is(routed(sparsemixer{}, {2.0f, 1.99f, 0.5f, -1.0f}, 4), {0, 1}, {0.502500, 1});
}

TEST_CASE("worked example: the sums of two halves of logits") {
  // k = 4 of the 3 x 3 grid, softmax over all of it: the row of sums is what the softmax is of.
  std::vector<float> sums;
  for (const float x : {2.0f, 1.0f, 0.0f})
    for (const float y : {1.0f, 0.5f, -1.0f}) sums.push_back(x + y);
  is(routed(router<softmax>{.selection = {.k = 4}}, sums, 9), {0, 1, 3, 4},
     {0.381913, 0.231642, 0.140498, 0.085216});
}

TEST_CASE("worked example: what fills the other groups decides where choices are negative") {
  const std::vector<float> choice = {-0.2f, -0.3f, -0.4f, -0.45f, -0.58f, -0.58f, -0.58f, -0.58f};
  top_k rule{.k = 2, .groups = 2, .topk_group = 1};
  is(routed(router<identity_score>{.selection = rule}, choice, 8), {0, 1}, {-0.2, -0.3});
  rule.group_fill = 0.0f;
  is(routed(router<identity_score>{.selection = rule}, choice, 8), {4, 5}, {-0.58, -0.58});
}

TEST_CASE("worked example: the mass that top-p reaches, by its three readings") {
  std::vector<float> logits;
  for (const double p : {0.5, 0.25, 0.15, 0.1}) logits.push_back(static_cast<float>(std::log(p)));
  const auto chosen = [&](float p, crossing how) {
    return routed(top_p{.p = p, .crossing = how}, logits, 4).choices();
  };
  // A mass just above or below: the sum of floats that are near 0.5 need not be 0.5.
  CHECK(chosen(0.499f, crossing::include) == 1);
  CHECK(chosen(0.501f, crossing::include) == 2);
  CHECK(chosen(0.499f, crossing::include_strict) == 1);
  CHECK(chosen(0.501f, crossing::include_strict) == 2);
  CHECK(chosen(0.501f, crossing::exclude) == 1);
  CHECK(chosen(0.751f, crossing::include_strict) == 3);
  CHECK(chosen(0.751f, crossing::exclude) == 2);
}
