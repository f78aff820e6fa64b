// expect: any_kind_of_router
// expect: r.carve(s, index_t{})
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/stage/route.hpp>

struct first_experts {
  moeroute::index_t k() const { return 2; }
  moeroute::index_t experts(moeroute::index_t columns) const { return columns; }
  void check(moeroute::index_t) const {}
};

void decide(const moeroute::row_matrix<float>& logits, moeroute::workspace& ws,
            moeroute::assignment& out) {
  moeroute::route(first_experts{}, logits, ws, out);
}
