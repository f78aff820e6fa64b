// A mixture-of-experts layer, step by step: describe a router, then gate, route, plan, dispatch,
// run your experts, combine.
#include <cstdio>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/expert.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>
#include <vector>

using matrix = moeroute::row_matrix<float>;

int main() {
  constexpr int tokens = 512, d = 64, experts = 8;
  const matrix x = matrix::Random(tokens, d);
  const matrix gate_weight = matrix::Random(experts, d);
  std::vector<matrix> expert_weight;
  for (int e = 0; e < experts; ++e) expert_weight.push_back(matrix::Random(d, d) / d);

  // Mixtral's router: softmax over all experts, the best two, weights that sum to 1.
  const moeroute::router router{moeroute::softmax{}, moeroute::top_k{.k = 2},
                                moeroute::sum_normalized};

  // All of these are reused from call to call: a warm call allocates nothing.
  const moeroute::simd::packed_matrix<> gate(moeroute::view(gate_weight));
  matrix logits(tokens, experts), y(tokens, d);
  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;

  moeroute::gate(x, gate, logits);                      // logits = x W^T
  moeroute::route(router, logits, workspace, choices);  // which experts, what weights
  moeroute::plan(choices, plan);                        // expert-major slots
  matrix in(plan.slots(), d), out(plan.slots(), d);
  moeroute::dispatch(x, plan, in);  // one contiguous block of rows per expert
  moeroute::for_each_expert(plan, in, out, [&](int e, auto block, auto result) {
    using rows = Eigen::Map<const matrix>;  // your own code here
    Eigen::Map<matrix>(result.data, result.rows, result.cols).noalias() =
        rows(block.data, block.rows, block.cols) * expert_weight[static_cast<size_t>(e)];
  });
  moeroute::combine(out, plan, choices, y);  // the weighted sum, back in token order

  std::printf("token 0 goes to experts %d and %d with weights %.3f and %.3f\n", choices.ids(0)[0],
              choices.ids(0)[1], choices.weights(0)[0], choices.weights(0)[1]);
  for (int e = 0; e < experts; ++e) std::printf("expert %d serves %3td tokens\n", e, plan.load(e));
  std::printf("y is %td x %td, |y| = %.3f\n", y.rows(), y.cols(), static_cast<double>(y.norm()));
}
