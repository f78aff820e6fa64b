// Forward values of whole layers against torch in float64 (gradients/layer_*,
// gradients/soft_moe_*). Ids and weights are the file's own: what is checked is plan, dispatch,
// experts and combine. When one goes red, ask whether a stage rounds more than once.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <fstream>
#include <moeroute/layer/soft_moe.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/plan.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using namespace moeroute;
using nlohmann::json;

namespace {

json gradients(const std::string& name) {
  std::ifstream file(std::string(MOEROUTE_TEST_DATA "/golden/gradients/") + name + ".json");
  REQUIRE(file.good());
  return json::parse(file);
}

std::vector<float> flat(const json& list) {
  std::vector<float> all;
  for (const json& item : list) {
    if (item.is_array()) {
      for (const json& x : item) all.push_back(static_cast<float>(x.get<double>()));
    } else {
      all.push_back(static_cast<float>(item.get<double>()));
    }
  }
  return all;
}

// Token t's experts e with their weights, as a ragged assignment.
assignment ragged(index_t tokens, index_t experts, const std::vector<float>& dense,
                  const std::vector<std::uint8_t>& chosen) {
  assignment a;
  a.reset_ragged(tokens, experts, experts);
  const assignment::parts p = a.to_fill();
  p.offsets[0] = 0;
  std::int32_t n = 0;
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t e = 0; e < experts; ++e)
      if (chosen[static_cast<std::size_t>(t * experts + e)] != 0) {
        p.ids[n] = static_cast<expert_id>(e);
        p.weights[n++] = dense[static_cast<std::size_t>(t * experts + e)];
      }
    p.offsets[t + 1] = n;
  }
  a.close();
  return a;
}

assignment choices_of(const json& file) {
  const index_t tokens = file["T"], experts = file["E"];
  if (file.contains("ids")) {
    assignment a;
    a.reset(tokens, experts, static_cast<index_t>(file["ids"][0].size()));
    std::size_t c = 0;
    for (const json& row : file["ids"])
      for (const json& id : row) a.ids()[c++] = id.get<expert_id>();
    std::ranges::copy(flat(file["weights"]), a.weights().begin());
    return a;
  }
  std::vector<float> dense(static_cast<std::size_t>(tokens * experts));
  std::vector<std::uint8_t> chosen(dense.size());
  if (file.contains("weights_dense")) {
    dense = flat(file["weights_dense"]);
    for (std::size_t i = 0; i < dense.size(); ++i) chosen[i] = dense[i] > 0.0f;
  } else {
    const auto token = flat(file["token_ids"]), weight = flat(file["weights"]);
    const std::size_t capacity = file["capacity"];
    for (std::size_t i = 0; i < token.size(); ++i) {
      const auto at =
          static_cast<std::size_t>(token[i]) * static_cast<std::size_t>(experts) + i / capacity;
      dense[at] = weight[i];
      chosen[at] = 1;
    }
  }
  return ragged(tokens, experts, dense, chosen);
}

// out = A_e in, or tanh of it.
struct linear_experts {
  std::vector<float> weight;
  index_t d;
  bool curved;
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t i = 0; i < d; ++i) {
        double sum = 0.0;
        for (index_t c = 0; c < d; ++c)
          sum += static_cast<double>(weight[static_cast<std::size_t>((e * d + i) * d + c)]) *
                 static_cast<double>(in(r, c));
        out(r, i) = static_cast<float>(curved ? std::tanh(sum) : sum);
      }
  }
};

double largest_error(const float* actual, const json& expected) {
  const auto list = flat(expected);
  double worst = 0.0;
  for (std::size_t i = 0; i < list.size(); ++i)
    worst =
        std::max(worst, std::abs(static_cast<double>(actual[i]) - static_cast<double>(list[i])));
  return worst;
}

}  // namespace

TEST_CASE("plan, dispatch, experts and combine give torch's layer outputs") {
  for (const char* name :
       {"expert_choice_T6_E16_k4", "grouped_sigmoid_norm_bias_scale_T6_E16_k4",
        "llama4_input_weighted_T6_E16_k4", "relu_T6_E16_k4", "sigmoid_bias_scale_T6_E16_k4",
        "sigmoid_norm_bias_scale_T5_E64_k6", "sigmoid_norm_bias_scale_T6_E16_k4",
        "sigmoid_selected_T6_E16_k4", "softmax_all_T6_E16_k4", "softmax_all_norm_T5_E64_k6",
        "softmax_all_norm_T6_E16_k4", "softmax_bias_scale_T6_E16_k4",
        "softmax_norm_bias_clamp_T6_E16_k4", "softmax_selected_T6_E16_k4",
        "sqrtsoftplus_norm_bias_scale_T6_E16_k4"}) {
    INFO(name);
    const json file = gradients(std::string("layer_") + name);
    const index_t tokens = file["T"], d = file["d"];
    const bool on_input = std::string(name).starts_with("llama4");
    const auto x = flat(file["X"]);
    assignment a = choices_of(file);
    if (on_input && !file.contains("weights")) {
      // The weight is the sigmoid of the chosen logit.
      const auto logits = flat(file["logits"]);
      for (std::size_t c = 0; c < a.ids().size(); ++c)
        a.weights()[c] = 1.0f / (1.0f + std::exp(-logits[c / static_cast<std::size_t>(a.k()) *
                                                             static_cast<std::size_t>(a.experts()) +
                                                         static_cast<std::size_t>(a.ids()[c])]));
    }
    dispatch_plan p;
    plan(a, p);
    buffer<float> in(p.slots() * d), out(p.slots() * d), y(tokens * d);
    const matrix_view<float> in_rows(in.data(), p.slots(), d), out_rows(out.data(), p.slots(), d);
    dispatch_options moving;
    combine_options<> combining;
    if (on_input) {
      moving.scale = a.weights();
      combining.weight = combine_weight::one;
    }
    dispatch(matrix_view<const float>(x.data(), tokens, d), p, in_rows, moving);
    for_each_expert(p, in_rows, out_rows, linear_experts{flat(file["expert_weight"]), d, on_input});
    combine(out_rows, p, a, matrix_view<float>(y.data(), tokens, d), combining);
    CHECK(largest_error(y.data(), file["Y"]) < 3e-6);
  }
}

TEST_CASE("soft plans and a soft layer give torch's values") {
  for (const char* name :
       {"soft_moe_weights_T5_E64_k6", "soft_moe_weights_T6_E16_k4", "layer_soft_moe_T6_E16_k4"}) {
    INFO(name);
    const json file = gradients(name);
    const index_t tokens = file["T"], slots = file["E"];
    const auto logits = flat(file["logits"]);
    soft_plan p;
    plan_soft(matrix_view<const float>(logits.data(), tokens, slots), 1, p);
    std::vector<float> dispatch_by_token(logits.size());  // the file has it as [T, S]
    for (index_t t = 0; t < tokens; ++t)
      for (index_t s = 0; s < slots; ++s)
        dispatch_by_token[static_cast<std::size_t>(t * slots + s)] = p.dispatch()(s, t);
    CHECK(largest_error(dispatch_by_token.data(), file["dispatch"]) < 3e-7);
    CHECK(largest_error(p.combine().data, file["combine"]) < 3e-7);
  }
  const json file = gradients("layer_soft_moe_T6_E16_k4");
  const index_t tokens = file["T"], slots = file["E"], d = file["d"];
  const auto x = flat(file["X"]), mu = flat(file["gate_weight"]);
  soft_moe layer(matrix_view<const float>(mu.data(), slots, d),
                 linear_experts{flat(file["expert_weight"]), d, false},
                 {.logits = soft_logits::product});
  buffer<float> y(tokens * d);
  layer.forward(matrix_view<const float>(x.data(), tokens, d),
                matrix_view<float>(y.data(), tokens, d));
  CHECK(largest_error(y.data(), file["Y"]) < 3e-6);
}
