// Gradients of whole layers against torch's autograd in float64 (gradients/layer_*, gate_*): what
// the backward stages give one after the other, in double.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/weigh/batch_routers.hpp>
#include <moeroute/policy/weigh/row_routers.hpp>
#include <moeroute/stage/capacity_backward.hpp>
#include <moeroute/stage/combine_backward.hpp>
#include <moeroute/stage/dispatch_backward.hpp>
#include <moeroute/stage/expert_backward.hpp>
#include <moeroute/stage/gate_backward.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/weigh.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/gradient_file.hpp"

using namespace moeroute;
using layer_doubles = std::vector<double>;

namespace {

matrix_view<double> rows(layer_doubles& x, index_t n) {
  return {x.data(), n, n > 0 ? static_cast<index_t>(x.size()) / n : 0};
}

std::string differs(const layer_doubles& actual, const layer_doubles& expected) {
  return test::difference(actual, expected, 1e-9, 1e-12);
}

// experts [E, d, d]: out = A_e in, or the tanh of it.
struct linear_gradients {
  const layer_doubles& weight;
  layer_doubles& dweight;
  bool curved;

  void operator()(expert_id e, matrix_view<const double> in, matrix_view<const double> dout,
                  matrix_view<double> din) const {
    const index_t d = in.cols;
    const double* const a = weight.data() + e * d * d;
    double* const da = dweight.data() + e * d * d;
    for (index_t r = 0; r < in.rows; ++r) {
      std::fill_n(din.row(r), d, 0.0);
      for (index_t i = 0; i < d; ++i) {
        double out = 0.0, g = dout(r, i);
        for (index_t j = 0; j < d; ++j) out += a[i * d + j] * in(r, j);
        if (curved) g *= 1.0 - std::tanh(out) * std::tanh(out);
        for (index_t j = 0; j < d; ++j) {
          da[i * d + j] += g * in(r, j);
          din(r, j) += g * a[i * d + j];
        }
      }
    }
  }
};

// One training step of a file's layer, stage by stage.
template <class Router>
void layer_agrees(const std::string& name, const Router& router, bool on_input = false) {
  INFO("golden/gradients/layer_" << name << ".json");
  const test::gradient_file file("layer_" + name);
  const index_t tokens = file.tokens, experts = file.experts, d = file.json["d"];
  layer_doubles x = file.numbers("X"), gate = file.numbers("gate_weight"),
                z = file.numbers("logits");
  layer_doubles dy = file.numbers("upstream");
  const layer_doubles expert = file.numbers("expert_weight");
  std::vector<std::size_t> order;
  const assignment choices = file.choices(order);
  dispatch_plan p;
  plan(choices, p);
  const auto slot_count = static_cast<std::size_t>(p.slots() * d);
  layer_doubles w(order.size()), in(slot_count), out(slot_count), y(x.size());
  workspace ws;
  weigh(router, rows(z, tokens), {}, choices, std::span(w), ws);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t c = p.first(t); c < p.first(t + 1); ++c) {
      const index_t s = p.slot_of_choice()[static_cast<std::size_t>(c)];
      const double weight = w[static_cast<std::size_t>(c)];
      const index_t e = choices.ids()[static_cast<std::size_t>(c)];
      for (index_t j = 0; j < d; ++j)
        in[static_cast<std::size_t>(s * d + j)] =
            x[static_cast<std::size_t>(t * d + j)] * (on_input ? weight : 1.0);
      for (index_t i = 0; i < d; ++i) {
        double sum = 0.0;
        for (index_t j = 0; j < d; ++j)
          sum += expert[static_cast<std::size_t>((e * d + i) * d + j)] *
                 in[static_cast<std::size_t>(s * d + j)];
        if (on_input) sum = std::tanh(sum);
        out[static_cast<std::size_t>(s * d + i)] = sum;
        y[static_cast<std::size_t>(t * d + i)] += (on_input ? 1.0 : weight) * sum;
      }
    }
  CHECK(differs(y, file.numbers("Y")) == "");

  layer_doubles dout(slot_count), din(slot_count), dw(w.size()), dz(z.size()), dx(x.size()),
      dgate(gate.size()), dexpert(expert.size());
  combine_gradients<double> wanted{rows(dout, p.slots()), dw};
  combine_options<> combining;
  if (on_input) {
    combining.weight = combine_weight::one;
    wanted.weights = {};
  }
  combine_backward(rows(out, p.slots()), p, w, rows(dy, tokens), wanted, serial{}, combining);
  for_each_expert_backward(p, rows(in, p.slots()), rows(dout, p.slots()), rows(din, p.slots()),
                           linear_gradients{expert, dexpert, on_input});
  dispatch_scale<double> scale;
  if (on_input) scale = {.scale = w, .x = rows(x, tokens), .dscale = dw};
  dispatch_backward(rows(din, p.slots()), p, gradient_to::write, rows(dx, tokens), serial{}, scale);
  weigh_backward(router, rows(z, tokens), {}, choices, dw, gradient_to::write, rows(dz, tokens),
                 ws);
  gate_backward(rows(x, tokens), rows(gate, experts), rows(dz, tokens),
                gate_gradients<double>{gradient_to::add, rows(dx, tokens), rows(dgate, experts)});
  CHECK(differs(dx, file.numbers("grad_X")) == "");
  CHECK(differs(dgate, file.numbers("grad_gate_weight")) == "");
  CHECK(differs(dexpert, file.numbers("grad_expert_weight")) == "");
}

}  // namespace

TEST_CASE("a training step's gradients are autograd's for layers of every router") {
  const weight_rule scaled{.scale = 2.5f};
  const weight_rule shares{.normalize = normalization::sum, .scale = 2.5f};
  layer_agrees("softmax_all_T6_E16_k4", router<softmax>{});
  layer_agrees("softmax_all_norm_T6_E16_k4", router<softmax>{.weight = sum_normalized});
  layer_agrees("softmax_all_norm_T5_E64_k6", router<softmax>{.weight = sum_normalized});
  layer_agrees("softmax_bias_scale_T6_E16_k4", router<softmax>{.weight = scaled});
  layer_agrees("softmax_norm_bias_clamp_T6_E16_k4", router<softmax>{.weight = sum_normalized});
  layer_agrees("softmax_selected_T6_E16_k4", router<softmax_selected>{});
  layer_agrees("sigmoid_selected_T6_E16_k4", router<sigmoid>{});
  layer_agrees("sigmoid_bias_scale_T6_E16_k4", router<sigmoid>{.weight = scaled});
  layer_agrees("sigmoid_norm_bias_scale_T6_E16_k4", router<sigmoid>{.weight = shares});
  layer_agrees("sigmoid_norm_bias_scale_T5_E64_k6", router<sigmoid>{.weight = shares});
  layer_agrees("grouped_sigmoid_norm_bias_scale_T6_E16_k4", router<sigmoid>{.weight = shares});
  layer_agrees("sqrtsoftplus_norm_bias_scale_T6_E16_k4", router<sqrt_softplus>{.weight = shares});
  layer_agrees("relu_T6_E16_k4", threshold_router<relu>{});
  layer_agrees("expert_choice_T6_E16_k4", expert_choice<>{});
}

TEST_CASE("a weight on the expert's input has the gradient of dispatch's scale") {
  layer_agrees("llama4_input_weighted_T6_E16_k4", router<sigmoid>{}, true);
}

TEST_CASE("weights that are renormalised after a drop have autograd's gradient") {
  const test::gradient_file file("weights_capacity_renorm_after_T5_E16_k4");
  std::vector<std::size_t> order;
  assignment choices = file.choices(order);
  const auto& kept = file.json["params"]["kept"];
  for (std::size_t c = 0; c < order.size(); ++c)
    if (!kept[c / 4][c % 4].get<bool>()) choices.kept_to_change()[c] = 0;
  layer_doubles z = file.numbers("logits"), w(order.size()), dw = file.numbers("upstream"),
                dz(z.size());
  const router<softmax> router{};
  const capacity_policy policy{.renormalize = renormalization::after_drop};
  workspace ws;
  weigh(router, rows(z, 5), {}, choices, std::span(w), ws);
  layer_doubles after = w;
  renormalize(policy, choices, std::span(after));
  CHECK(differs(after, file.numbers("weights")) == "");
  renormalize_backward(policy, choices, w, std::span(dw));
  weigh_backward(router, rows(z, 5), {}, choices, dw, gradient_to::write, rows(dz, 5), ws);
  CHECK(differs(dz, file.numbers("grad_logits")) == "");
}

TEST_CASE("a low-rank cosine gate has autograd's gradients, its scale too") {
  const test::gradient_file file("gate_cosine_lowrank_T5_E16");
  const index_t tokens = file.tokens, experts = file.experts, d = file.json["d"],
                r = file.json["r"];
  layer_doubles x = file.numbers("X"), down = file.numbers("P"),
                embedding = file.numbers("expert_embedding");
  layer_doubles dz = file.numbers("upstream"), low(static_cast<std::size_t>(tokens * r));
  for (index_t t = 0; t < tokens; ++t)
    for (index_t i = 0; i < r; ++i)
      for (index_t j = 0; j < d; ++j)
        rows(low, tokens)(t, i) += rows(down, r)(i, j) * rows(x, tokens)(t, j);
  layer_doubles dlow(low.size()), dembedding(embedding.size()), ddown(down.size()), dx(x.size());
  double dscale = 0.0;
  workspace ws;
  cosine_gate_backward(
      rows(low, tokens), rows(embedding, experts), file.numbers("tau")[0], rows(dz, tokens),
      gate_gradients<double>{gradient_to::write, rows(dlow, tokens), rows(dembedding, experts)}, ws,
      serial{}, &dscale);
  gate_backward(rows(x, tokens), rows(down, r), rows(dlow, tokens),
                gate_gradients<double>{gradient_to::write, rows(dx, tokens), rows(ddown, r)});
  CHECK(differs(dembedding, file.numbers("grad_expert_embedding")) == "");
  CHECK(differs(ddown, file.numbers("grad_P")) == "");
  CHECK(differs(dx, file.numbers("grad_X")) == "");
  CHECK(differs({dscale}, file.numbers("grad_tau")) == "");
}
