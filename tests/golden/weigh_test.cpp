#include <moeroute/stage/weigh.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/weigh/batch_routers.hpp>
#include <moeroute/policy/weigh/row_routers.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/gradient_file.hpp"

using namespace moeroute;

namespace {

// Parameters of a router are floats: where the file's are none, what floats can reach is the bound,
// as a part of the largest entry.
constexpr double exact = 1e-9, of_float = 3e-7;

std::string differs(const std::vector<double>& actual, const std::vector<double>& expected,
                    double bound) {
  double largest = 0.0;
  for (const double x : expected) largest = std::max(largest, std::abs(x));
  return test::difference(actual, expected, bound, bound == exact ? 1e-12 : bound * largest);
}

// The weights of a file's choices and the gradients of its logits and parameters.
template <class Router>
void weighs_alike(const std::string& name, const Router& router, double bound = exact) {
  INFO("golden/gradients/" << name << ".json");
  const test::gradient_file file(name);
  std::vector<std::size_t> order;
  const assignment choices = file.choices(order);
  const std::vector<double> z = file.numbers("logits");
  const bool dense = file.json.contains("weights_dense");
  const std::vector<double> expected = file.numbers(dense ? "weights_dense" : "weights");
  const std::vector<double> upstream = file.numbers("upstream");
  std::vector<double> w(order.size()), dw(order.size()), wanted(order.size());
  for (std::size_t c = 0; c < order.size(); ++c) {
    wanted[c] = expected[order[c]];
    dw[c] = upstream[order[c]];
  }
  const index_t columns = static_cast<index_t>(z.size()) / file.tokens;
  const matrix_view<const double> logits(z.data(), file.tokens, columns);
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(file.tokens), 1);
  workspace ws;
  weigh(router, logits, {}, choices, std::span(w), ws);
  CHECK(differs(w, wanted, bound) == "");

  std::vector<double> dz(z.size(), 7.0), dscale, dadd, dtemperature;
  router_gradients<double> own;
  const auto want = [&](const char* field, std::vector<double>& list, std::span<double>& view) {
    if (!file.json.contains(field)) return;
    list.assign(file.json[field].size(), 0.0);
    view = list;
  };
  const bool gamma = file.json.contains("grad_gamma");
  want(gamma ? "grad_gamma" : "grad_per_expert_scale", dscale, own.expert_factor);
  want("grad_add", dadd, own.add);
  want("grad_temperature", dtemperature, own.temperature);
  weigh_backward(router, logits, {}, choices, dw, gradient_to::write,
                 matrix_view<double>(dz.data(), file.tokens, columns), ws, serial{}, own);
  CHECK(differs(dz, file.numbers("grad_logits"), bound) == "");
  const auto check = [&](const char* field, const std::vector<double>& list) {
    if (!list.empty()) CHECK(differs(list, file.numbers(field), bound) == "");
  };
  check(gamma ? "grad_gamma" : "grad_per_expert_scale", dscale);
  check("grad_add", dadd);
  check("grad_temperature", dtemperature);
}

template <class Router>
void agrees_twice(const std::string& family, const Router& router) {
  weighs_alike(family + "_T6_E16_k4", router);
  weighs_alike(family + "_T5_E64_k6", router);
}

}  // namespace

TEST_CASE("weights and their gradients are autograd's for every score and norm") {
  const weight_rule scaled{.scale = 2.5f};
  const weight_rule shares{.normalize = normalization::sum, .scale = 2.5f};
  agrees_twice("weights_softmax_all", router<softmax>{});
  agrees_twice("weights_softmax_all_norm", router<softmax>{.weight = sum_normalized});
  agrees_twice("weights_softmax_bias_scale", router<softmax>{.weight = scaled});
  agrees_twice("weights_softmax_norm_bias_clamp",
               router<softmax>{.weight = {.normalize = normalization::sum,
                                          .eps_where = eps_mode::clamp,
                                          .eps = 1e-12f}});
  agrees_twice("weights_softmax_selected", router<softmax_selected>{});
  agrees_twice("weights_sigmoid_selected", router<sigmoid>{});
  agrees_twice("weights_sigmoid_bias_scale", router<sigmoid>{.weight = scaled});
  agrees_twice("weights_sigmoid_norm_bias_scale", router<sigmoid>{.weight = shares});
  agrees_twice("weights_grouped_sigmoid_norm_bias_scale", router<sigmoid>{.weight = shares});
  agrees_twice("weights_sqrtsoftplus_norm_bias_scale", router<sqrt_softplus>{.weight = shares});
  agrees_twice("weights_relu_dense", threshold_router<relu>{});
  agrees_twice("expert_choice", expert_choice<>{});
  weighs_alike("weights_identity_sum_positive_T5_E16_k4", router<identity_score>{});
  weighs_alike("weights_softplus_sum_T5_E16_k4", router<softplus>{.weight = sum_normalized});
  weighs_alike("weights_sigmoid_divide_T5_E16_k4",
               router<sigmoid>{.weight = {.divide = 4.0f, .scale = 4.0f}});
  weighs_alike("weights_softmax_lp3_T5_E16_k4",
               router<softmax>{.weight = {.normalize = normalization::lp, .p = 3.0f}});
  weighs_alike(
      "weights_sqrtsoftplus_lp2_T5_E16_k4",
      router<sqrt_softplus>{.weight = {.normalize = normalization::lp, .p = 2.0f, .scale = 1.5f}});
  weighs_alike("weights_softmax_k1_normalised_T5_E16_k1",
               router<softmax>{.weight = sum_normalized});
  weighs_alike("weights_mask_and_missing_T5_E16_k4", router<softmax>{.weight = sum_normalized});
  weighs_alike("weights_top_p_renorm_T5_E16", top_p{.p = 0.6f, .weight = sum_normalized});
  weighs_alike("weights_product_keys_selected_T5_n4_m4_k4", product_keys<>{.choices = 4});
  weighs_alike("weights_product_keys_softmax_T5_n4_m4_k4", product_keys<softmax>{.choices = 4});
}

TEST_CASE("gradients of a router's own parameters are autograd's") {
  weighs_alike("weights_sigmoid_softcap_T5_E16_k4",
               router<sigmoid>{.weight = sum_normalized, .transform = {.softcap = 2.0f}});
  weighs_alike("weights_sigmoid_sum_eps_add_T5_E16_k4",
               router<sigmoid>{.weight = {.normalize = normalization::sum,
                                          .eps_where = eps_mode::add,
                                          .eps = 0.1f,
                                          .scale = 2.5f}},
               of_float);
  weighs_alike("weights_softmax_lp2_eps_add_T5_E16_k4",
               router<softmax>{.weight = {.normalize = normalization::lp,
                                          .p = 2.0f,
                                          .eps_where = eps_mode::add,
                                          .eps = 0.01f}},
               of_float);
  weighs_alike(
      "weights_softmax_sum_clamp_acts_T5_E16_k4",
      router<softmax>{
          .weight = {.normalize = normalization::sum, .eps_where = eps_mode::clamp, .eps = 0.85f}},
      of_float);
  weighs_alike("weights_softmax_temperature_learned_T5_E16_k4",
               router<softmax>{.weight = sum_normalized, .transform = {.temperature = 0.7f}},
               of_float);
  const auto gamma = test::gradient_file("weights_relu_rms_gamma_T5_E16").floats("gamma");
  weighs_alike("weights_relu_rms_gamma_T5_E16",
               threshold_router<relu>{.norm = threshold_norm::rms, .eps = 1e-5f, .gamma = gamma},
               of_float);
  const auto add = test::gradient_file("weights_softmax_add_learned_T5_E16_k4").floats("add");
  weighs_alike("weights_softmax_add_learned_T5_E16_k4", router<softmax>{.transform = {.add = add}},
               of_float);
  const auto scale =
      test::gradient_file("weights_softmax_expert_scale_T5_E16_k4").floats("per_expert_scale");
  weighs_alike("weights_softmax_expert_scale_T5_E16_k4",
               router<softmax>{.weight = {.normalize = normalization::sum, .expert_scale = scale}},
               of_float);
}
