// A whole layer with experts of the caller's own.
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/policy/router.hpp>

void expert(int e, const float* in, float* out, moeroute::index_t rows);

void run(const float* gate, const float* x, float* y, moeroute::index_t tokens,
         moeroute::index_t d) {
  const auto experts = [](int e, auto in, auto out) { expert(e, in.data, out.data, in.rows); };
  moeroute::moe_layer layer(
      moeroute::simd::packed_matrix<>(moeroute::matrix_view<const float>(gate, 64, d)),
      moeroute::router{moeroute::softmax{}, moeroute::top_k_of<8>{}, moeroute::sum_normalized},
      experts);
  layer.forward(moeroute::matrix_view<const float>(x, tokens, d),
                moeroute::matrix_view<float>(y, tokens, d));
}
