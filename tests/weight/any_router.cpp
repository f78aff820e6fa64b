// Whatever router a spec describes, and route().
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/route.hpp>

void run(const moeroute::router_spec& spec, const float* z, moeroute::index_t tokens,
         moeroute::workspace& ws, moeroute::assignment& out) {
  const moeroute::any_router router = moeroute::make_router(spec);
  moeroute::route(router, moeroute::matrix_view<const float>(z, tokens, spec.experts), ws, out);
}
