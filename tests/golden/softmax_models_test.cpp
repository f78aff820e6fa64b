// Gates and plans of published softmax models against what their real classes computed (see
// README.md beside the files); ids and weights of every model are in open_models_test.cpp.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <span>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/golden.hpp"

using namespace moeroute;
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
