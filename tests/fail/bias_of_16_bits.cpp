// expect: [moeroute::selection_bias] a selection bias is float
#include <moeroute/policy/router.hpp>
#include <vector>

void choose(const std::vector<moeroute::bfloat16>& bias) {
  moeroute::router<moeroute::sigmoid>{.bias = moeroute::selection_bias(bias)};
}
