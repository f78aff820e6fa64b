// expect: [moeroute::lasting_span] a temporary would dangle
#include <moeroute/policy/make_router.hpp>
#include <vector>

std::vector<float> bias_from_a_file();

moeroute::any_router made(const moeroute::router_spec& spec) {
  return moeroute::make_router(spec, {.bias = bias_from_a_file()});
}
