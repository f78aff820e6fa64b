// expect: readable_rows
// expect: std::is_same_v<std::remove_const_t<T>, bfloat16>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

void decide(const moeroute::row_matrix<double>& logits, moeroute::workspace& ws,
            moeroute::assignment& out) {
  moeroute::route(moeroute::router<moeroute::softmax>{}, logits, ws, out);
}
