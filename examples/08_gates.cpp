// Routers whose gate is not a matrix: eight of the field's, each a struct of a page
// (support/own_gates.hpp) or a few calls, in the library's layer or around its stages.
#include <cstdio>
#include <moeroute/matrix/eigen.hpp>
#include <string>
#include <vector>

#include "support/own_gates.hpp"

using namespace example;
using matrix = moeroute::row_matrix<float>;

namespace {

constexpr index_t tokens = 32, d = 24, experts = 8;

packed random_weight(index_t rows, index_t cols) {
  const matrix w = matrix::Random(rows, cols) * 0.5f;
  return packed(moeroute::view(w));
}

// What an expert makes of its rows; yours is a network.
struct scaled_rows {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = in(r, c) * static_cast<float>(e + 1);
  }
};

void print(const std::string& name, const moeroute::assignment& choices) {
  std::printf("%-20s token 0: experts %d and %d with weights %.3f and %.3f\n", name.c_str(),
              choices.ids(0)[0], choices.ids(0)[1], static_cast<double>(choices.weights(0)[0]),
              static_cast<double>(choices.weights(0)[1]));
}

// Any gate goes where the linear one does.
template <class Gate, class Router>
void run(const std::string& name, Gate gate, const Router& router, const matrix& x) {
  moeroute::moe_layer layer(std::move(gate), router, scaled_rows{});
  matrix y(x.rows(), x.cols());
  layer.forward(x, y);
  print(name, layer.choices());
}

}  // namespace

int main() {
  const matrix x = matrix::Random(tokens, d);
  const moeroute::router by_softmax{moeroute::softmax{}, moeroute::top_k{.k = 2},
                                    moeroute::sum_normalized};
  // For gates whose columns are probabilities.
  const moeroute::router by_value{moeroute::identity_score{}, moeroute::top_k{.k = 2},
                                  moeroute::sum_normalized};

  run("attention router", attention_gate{random_weight(3 * experts, d)}, by_softmax, x);

  constexpr index_t p = 6;
  std::vector<float> state(static_cast<std::size_t>(tokens * p));
  for (int layer = 0; layer < 2; ++layer)
    run("recurrent, layer " + std::to_string(layer),
        recurrent_gate{random_weight(3 * p, d), random_weight(3 * p, p), random_weight(experts, p),
                       state.data()},
        by_softmax, x);

  run("multi-head", multi_head_gate{random_weight(12, d), random_weight(experts, 12), 3},
      by_softmax, x);
  run("mixture of routers", mixture_of_routers{random_weight(2 * experts + 2, d), 2}, by_value, x);

  const matrix embedding = matrix::Random(1, p);
  run("hyper-router",
      hyper_gate(moeroute::const_view(embedding), random_weight(16, p),
                 random_weight(experts * d, 16), experts),
      by_softmax, x);

  // Decisions mixed by an attention map, which come to the layer as logits from outside.
  const matrix attention = matrix::Constant(tokens, tokens, 1.0f / tokens);
  matrix probabilities = matrix::Random(tokens, experts), mixed(tokens, experts), y(tokens, d);
  attend_to_decisions(moeroute::const_view(attention), moeroute::view(probabilities),
                      moeroute::view(mixed));
  moeroute::moe_layer layer(moeroute::no_gate(experts), by_value, scaled_rows{},
                            moeroute::moe_layer_options{.d = d});
  layer.forward_logits(x, mixed, y);
  print("graph of tokens", layer.choices());

  autonomous_experts autonomous{.narrow = random_weight(experts * 4, d),
                                .router = {.selection = {.k = 2}}};
  for (index_t e = 0; e < experts; ++e) {
    autonomous.up.push_back(random_weight(16, 4));
    autonomous.value.push_back(random_weight(16, d));
    autonomous.down.push_back(random_weight(d, 16));
  }
  autonomous.forward(moeroute::const_view(x), y);
  print("autonomous experts", autonomous.choices);

  const matrix outputs = matrix::Random(tokens * experts, d);
  matrix logits = matrix::Random(tokens, experts), dlogits(tokens, experts);
  competition compete{.router = by_value};
  const double loss = compete.run(moeroute::const_view(outputs), moeroute::const_view(logits),
                                  moeroute::view(y), moeroute::view(dlogits));
  print("competition", compete.choices);
  std::printf("the gate is %.4f away from foretelling who wins\n", loss);
}
