// expect: [moeroute::route] logits are rows of float, bfloat16 or float16
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

void decide(const moeroute::row_matrix<double>& logits, moeroute::workspace& ws,
            moeroute::assignment& out) {
  moeroute::route(moeroute::router<moeroute::softmax>{}, logits, ws, out);
}
