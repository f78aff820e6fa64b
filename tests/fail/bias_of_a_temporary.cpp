// expect: [moeroute::lasting_span] a temporary would dangle
#include <moeroute/policy/router.hpp>
#include <vector>

moeroute::router<moeroute::sigmoid> made() {
  return {.bias = moeroute::selection_bias(std::vector<float>(8))};
}
