// expect: [moeroute::route] a pointer has no shape
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

void decide(const float* logits, moeroute::workspace& ws, moeroute::assignment& out) {
  moeroute::route(moeroute::router<moeroute::softmax>{}, logits, 16, ws, out);
}
