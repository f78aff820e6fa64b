// One router that is known when the program is compiled, and route().
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

void run(const float* z, moeroute::index_t tokens, moeroute::workspace& ws,
         moeroute::assignment& out) {
  const moeroute::router router{moeroute::softmax{}, moeroute::top_k_of<8>{},
                                moeroute::sum_normalized};
  moeroute::route(router, moeroute::matrix_view<const float>(z, tokens, 64), ws, out);
}
