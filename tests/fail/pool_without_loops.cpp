// expect: executor
// expect: parallel_for
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

struct pool {
  int concurrency() const { return 2; }
};

void decide(const moeroute::row_matrix<float>& logits, moeroute::workspace& ws,
            moeroute::assignment& out) {
  moeroute::route(moeroute::router<moeroute::softmax>{}, logits, ws, out, pool{});
}
