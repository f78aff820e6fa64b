// Routers of published models against what their real classes computed (see README.md beside the
// files).
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/golden.hpp"

using namespace moeroute;
using test::golden_json;
using test::golden_model;

namespace {

const std::vector<std::string> models = {"mixtral",
                                         "qwen2_moe",
                                         "qwen3_moe",
                                         "qwen3_next",
                                         "qwen3_vl_moe",
                                         "qwen3_omni_moe_talker",
                                         "qwen3_omni_moe_thinker",
                                         "olmoe",
                                         "mellum",
                                         "jamba",
                                         "dbrx",
                                         "gpt_oss",
                                         "granitemoe",
                                         "granitemoeshared",
                                         "jetmoe",
                                         "cohere2_moe",
                                         "openai_privacy_filter"};

// The value where the key is there; every other key must be handled by name or be at its neutral
// value.
template <class T>
T option(const golden_json& config, const char* key, T otherwise) {
  return config.contains(key) ? config.at(key).template get<T>() : otherwise;
}

void expect(const golden_json& config, const char* key, const golden_json& value) {
  if (config.contains(key) && config.at(key) != value)
    throw std::runtime_error(std::string(key) + " is " + config.at(key).dump() + ", expected " +
                             value.dump());
}

weight_rule weights_of(const golden_json& config, index_t k) {
  weight_rule rule;
  const auto normalize = config.at("normalize").get<std::string>();
  if (normalize == "sum") rule.normalize = normalization::sum;
  if (normalize == "lp") rule.normalize = normalization::lp;
  rule.p = option(config, "lp_p", 1.0f);
  const auto mode = config.at("eps_mode").get<std::string>();
  if (mode == "add") rule.eps_where = eps_mode::add;
  if (mode == "clamp") rule.eps_where = eps_mode::clamp;
  rule.eps = config.at("eps").get<float>();
  rule.scale = config.at("scale").get<float>();
  if (option(config, "post_divide_by_k", false)) rule.divide = static_cast<float>(k);
  return rule;
}

// What the file's config describes, applied to its logits.
assignment routed(const golden_model& m) {
  expect(m.config, "score", "softmax");
  expect(m.config, "bias", "none");
  expect(m.config, "groups", 1);
  expect(m.config, "selection", "top_k");
  expect(m.config, "capacity", nullptr);
  expect(m.config, "weight_on", "output");
  expect(m.config, "scale_where", "weights");
  workspace memory;
  assignment out;
  const matrix_view<const float> logits(m.logits.data(), m.tokens, m.experts);
  const top_k selection{.k = m.k};
  const weight_rule weight = weights_of(m.config, m.k);
  if (m.config.at("score_domain") == "all") {
    route(router<softmax>{.selection = selection, .weight = weight}, logits, memory, out);
  } else {
    route(router<softmax_selected>{.selection = selection, .weight = weight}, logits, memory, out);
  }
  return out;
}

}  // namespace

TEST_CASE("softmax models: the gate's logits are the reference's, exact tokens bit for bit") {
  const auto model = GENERATE(from_range(models));
  const golden_model m = test::read_golden_model(model);
  simd::packed_matrix<> gate(
      matrix_view<const float>(m.gate_weight.data(), m.experts, m.hidden_size));
  for (std::size_t e = 0; e < m.gate_bias.size(); ++e)
    gate.bias(static_cast<index_t>(e)) = m.gate_bias[e];
  std::vector<float> logits(m.logits.size());
  moeroute::gate(matrix_view<const float>(m.hidden.data(), m.tokens, m.hidden_size), gate,
                 matrix_view<float>(logits.data(), m.tokens, m.experts));
  INFO(model);
  int exact = 0;
  for (index_t t = 0; t < m.tokens; ++t) {
    const auto n = static_cast<std::size_t>(m.experts);
    const std::span got(logits.data() + t * m.experts, n);
    const std::span expected(m.logits.data() + t * m.experts, n);
    INFO("token " << t);
    if (m.exact[static_cast<std::size_t>(t)]) {
      ++exact;
      // As values: a sum of zeros may come out as +0 or -0.
      CHECK(test::difference(got, expected, 0.0) == "");
    } else {
      CHECK(test::difference(got, expected, 1e-6, 2e-6) == "");
    }
  }
  CHECK(exact >= 8);
}

TEST_CASE("softmax models: ids and weights are the reference's") {
  const auto model = GENERATE(from_range(models));
  const golden_model m = test::read_golden_model(model);
  const assignment a = routed(m);
  CHECK(test::golden_difference(m, {a.ids().begin(), a.ids().end()},
                                {a.weights().begin(), a.weights().end()}) == "");
}

TEST_CASE("softmax models: the plan has the reference's expert sizes and tokens") {
  const std::string model = GENERATE("granitemoe", "granitemoeshared", "jetmoe");
  const golden_model m = test::read_golden_model(model);
  // Planned from the reference's own ids, whose ties are accidents of its sort.
  assignment a;
  a.reset(m.tokens, m.experts, m.k);
  std::copy(m.ids.begin(), m.ids.end(), a.ids().begin());
  dispatch_plan p;
  plan(a, p);
  INFO(model);
  const auto sizes = m.extra.at("dispatch_expert_size").get<std::vector<index_t>>();
  const auto tokens = m.extra.at("dispatch_batch_index").get<std::vector<slot_id>>();
  REQUIRE(static_cast<index_t>(sizes.size()) == m.experts);
  REQUIRE(static_cast<index_t>(tokens.size()) == p.slots());
  for (index_t e = 0; e < m.experts; ++e) {
    const auto at = static_cast<std::size_t>(e);
    REQUIRE(p.load(e) == sizes[at]);
    // The reference's order within an expert is that of an unstable sort.
    const auto first = p.offsets()[at], last = p.offsets()[at + 1];
    std::vector<slot_id> expected(tokens.begin() + first, tokens.begin() + last);
    std::sort(expected.begin(), expected.end());
    CHECK(std::equal(expected.begin(), expected.end(), p.token_of_slot().begin() + first,
                     p.token_of_slot().begin() + last));
  }
}
