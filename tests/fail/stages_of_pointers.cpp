// expect: [moeroute::gate] the weight is packed once
// expect: [moeroute::gate] x and logits are rows
// expect: [moeroute::dispatch] x and slots are rows
// expect: [moeroute::combine] slots and y are rows
// expect: [moeroute::combine] behind the rows come the plan
// expect: [moeroute::route] behind the logits come the side inputs
// expect: [moeroute::route] behind the logits come the side inputs
// expect: [moeroute::route] the first argument is no router
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/route.hpp>

using rows = moeroute::matrix_view<float>;

void multiply(const rows& x, const rows& weight, rows& logits) {
  moeroute::gate(x, weight, logits);
}
void multiply(const float* x, const moeroute::simd::packed_matrix<>& weight, float* logits) {
  moeroute::gate(x, weight, logits);
}
void move(const float* x, const moeroute::dispatch_plan& plan, float* slots) {
  moeroute::dispatch(x, plan, slots);
}
void add_up(const float* slots, const moeroute::dispatch_plan& plan,
            const moeroute::assignment& choices, float* y) {
  moeroute::combine(slots, plan, choices, y);
}
void add_up(const rows& slots, const moeroute::dispatch_plan& plan,
            const moeroute::assignment& choices, rows& y) {
  moeroute::combine(slots, choices, plan, y);
}
void decide(const moeroute::router<moeroute::softmax>& router, const rows& logits,
            moeroute::workspace& ws, moeroute::assignment& out) {
  moeroute::route(router, logits, out, ws);
  moeroute::route(router, logits, out);
  moeroute::route(moeroute::softmax{}, logits, ws, out);
}
