// expect: [moeroute::route] a vector does not say how many tokens it holds
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>
#include <vector>

void decide(const std::vector<float>& logits_of_all_tokens, moeroute::workspace& ws,
            moeroute::assignment& out) {
  moeroute::route(moeroute::router<moeroute::softmax>{}, logits_of_all_tokens, ws, out);
}
