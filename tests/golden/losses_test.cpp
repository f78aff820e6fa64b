#include <moeroute/balance/loss.hpp>
//
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/loss_selected.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/compare.hpp"

using namespace moeroute;

namespace {

// A file of autograd values in float64: logits, the selection, the value and its gradient.
struct golden_loss {
  index_t tokens, experts, k;
  std::vector<double> logits, gradient;
  double value;
  assignment choices;
  std::vector<double> counts;

  explicit golden_loss(const std::string& name) {
    std::ifstream in(std::string(MOEROUTE_TEST_DATA "/golden/gradients/loss_") + name + ".json");
    if (!in) throw std::runtime_error(name + ": cannot be opened");
    const auto j = nlohmann::json::parse(in);
    tokens = j.at("T").get<index_t>();
    experts = j.at("E").get<index_t>();
    logits = j.at("logits").get<std::vector<double>>();
    gradient = j.at("grad_logits").get<std::vector<double>>();
    value = j.at("value").get<double>();
    k = j.at("k").get<index_t>();
    counts.assign(static_cast<std::size_t>(experts), 0.0);
    // A file without a selection means the k largest logits.
    std::vector<std::vector<expert_id>> ids;
    if (j.contains("ids")) ids = j.at("ids").get<std::vector<std::vector<expert_id>>>();
    for (index_t t = 0; !j.contains("ids") && t < tokens; ++t) {
      std::vector<expert_id> order(static_cast<std::size_t>(experts));
      std::iota(order.begin(), order.end(), 0);
      const double* const z = logits.data() + t * experts;
      std::sort(order.begin(), order.end(), [&](expert_id x, expert_id y) { return z[x] > z[y]; });
      order.resize(static_cast<std::size_t>(k));
      ids.push_back(order);
    }
    k = static_cast<index_t>(ids.front().size());
    choices.reset(tokens, experts, k);
    std::size_t i = 0;
    for (const auto& row : ids)
      for (const expert_id e : row) choices.ids()[i++] = e;
    count_choices(choices, {}, std::span(counts));
  }
  matrix_view<const double> z() const { return {logits.data(), tokens, experts}; }
};

// run(golden, dlogits, workspace) -> value, against the file.
template <class Run>
void agrees(const std::string& loss, Run run) {
  for (const char* shape : {"_T6_E16_k4", "_T5_E64_k6"}) {
    const golden_loss g(loss + shape);
    std::vector<double> dz(g.logits.size());
    workspace ws;
    const double value = run(g, matrix_view<double>(dz.data(), g.tokens, g.experts), ws);
    INFO("golden/gradients/loss_" << loss << shape << ".json");
    CHECK(std::abs(value - g.value) <= 1e-6 * std::abs(g.value));
    CHECK(test::difference(dz, g.gradient, 1e-6, 1e-12) == "");
  }
}

// A loss of the engine that make(golden) gives.
template <class Make>
void engine_agrees(const std::string& loss, Make make, const loss_options& how = {}) {
  agrees(loss, [&](const golden_loss& g, matrix_view<double> dz, workspace& ws) {
    return balance_loss(how, g.z(), dz, ws, serial{}, make(g)).total();
  });
}

}  // namespace

TEST_CASE("values and gradients of the losses are those of autograd") {
  engine_agrees("switch", [](const auto& g) { return switch_loss::megatron(1.0, g.counts, g.k); });
  engine_agrees("switch_top1",
                [](const auto& g) { return switch_loss::first_choice(1.0, g.counts); });
  engine_agrees("hf_load_balancing",
                [](const auto& g) { return switch_loss::hugging_face(1.0, g.counts); });
  engine_agrees("deepseek_v3_sequence",
                [](const auto& g) { return switch_loss::megatron(1.0, g.counts, g.k); },
                {.scores = probability::normalized_sigmoid});
  engine_agrees("importance_cv2_dense_biased",
                [](const auto&) { return importance_loss{.coefficient = 1.0}; });
  engine_agrees("importance_cv2_dense_unbiased", [](const auto&) {
    return importance_loss{.coefficient = 1.0, .kind = variance::unbiased};
  });
  engine_agrees("neg_entropy_batch",
                [](const auto&) { return batch_entropy_loss{.coefficient = 1.0}; });
  engine_agrees("router_z", [](const auto&) { return router_z_loss{.coefficient = 1.0}; });
  engine_agrees("entropy_token",
                [](const auto&) { return token_entropy_loss{.coefficient = 1.0}; });
  engine_agrees("tsallis_1p5",
                [](const auto&) { return tsallis_loss{.coefficient = 1.0, .q = 1.5}; });
}

TEST_CASE("the loss by sequence is autograd's for a sequence that is the batch") {
  agrees("deepseek_v3_sequence", [](const golden_loss& g, matrix_view<double> dz, workspace& ws) {
    const sequence_loss loss{.coefficient = 1.0,
                             .counts = matrix_view<const double>(g.counts.data(), 1, g.experts),
                             .k = g.k};
    return balance_loss({.scores = probability::normalized_sigmoid, .sequence_length = g.tokens},
                        g.z(), dz, ws, serial{}, loss)
        .total();
  });
}

TEST_CASE("importance over the gates and ReMoE's losses are autograd's") {
  for (const bool unbiased : {false, true})
    agrees(unbiased ? "importance_cv2_topk_unbiased" : "importance_cv2_topk_biased",
           [&](const golden_loss& g, matrix_view<double> dz, workspace& ws) {
             return selected_importance_loss(
                 {.coefficient = 1.0, .kind = unbiased ? variance::unbiased : variance::population},
                 drop_stage::before_drop, {}, g.choices, g.z(), dz, ws, serial{});
           });
  for (const auto weighting : {relu_weighting::plain, relu_weighting::load})
    agrees(weighting == relu_weighting::plain ? "remoe_l1" : "remoe_l1_lb",
           [&](const golden_loss& g, matrix_view<double> dz, workspace& ws) {
             return relu_balance_loss({.coefficient = 1.0, .weighting = weighting, .k = g.k}, {},
                                      g.z(), dz, ws, serial{});
           });
}
