// How deep a sequence or a token goes: blocks that are skipped, executed or repeated, networks of
// which a sequence takes a part, tokens that pass a block by.
#include <cstdio>
#include <moeroute/matrix/eigen.hpp>
#include <vector>

#include "support/depth_routers.hpp"

using namespace example;
using matrix = moeroute::row_matrix<float>;

namespace {

moeroute::simd::packed_matrix<> random_weight(index_t rows, index_t cols) {
  const matrix w = matrix::Random(rows, cols);
  return moeroute::simd::packed_matrix<>(moeroute::view(w));
}

// Stands for attention or a network; yours adds to its rows.
void block(index_t, matrix_view<float> rows) {
  for (index_t t = 0; t < rows.rows; ++t)
    for (index_t c = 0; c < rows.cols; ++c) rows(t, c) *= 1.5f;
}

}  // namespace

int main() {
  constexpr index_t d = 16, tokens = 48;
  // Three prompts, one after the other.
  const std::vector<std::int32_t> offsets{0, 10, 30, 48}, decoded{0, 1, 2, 3};
  matrix x = matrix::Random(tokens, d), next = matrix::Random(3, d);

  mind_skip attention(random_weight(1, d));
  attention.decide(moeroute::const_view(x), offsets);
  attention.run(moeroute::view(x), offsets, block);
  attention.run(moeroute::view(next), decoded, block);  // the prompt's decision, kept
  for (index_t s = 0; s < 3; ++s)
    std::printf("sequence %td %s the attention block\n", s,
                attention.decisions().count(s) > 0 ? "passes" : "skips");

  skip_execute_repeat layer(moeroute::mlp_gate<>(random_weight(8, d), random_weight(3, 8),
                                                 moeroute::gate_activation::silu),
                            8);
  layer.run(moeroute::view(x), offsets, block);
  for (index_t s = 0; s < 3; ++s)
    std::printf("sequence %td runs the layer %d times\n", s, layer.decisions().ids(s)[0]);

  matrix y(tokens, d);
  union_of_experts network(random_weight(4, d), 2);
  network.forward(moeroute::const_view(x), offsets, moeroute::view(y),
                  [](expert_id e, auto in, auto out) {
                    for (index_t r = 0; r < in.rows; ++r)
                      for (index_t c = 0; c < in.cols; ++c)
                        out(r, c) = in(r, c) * static_cast<float>(e + 1);
                  });
  for (index_t s = 0; s < 3; ++s)
    std::printf("sequence %td takes slices %d and %d of 4\n", s, network.decisions().ids(s)[0],
                network.decisions().ids(s)[1]);

  const matrix figures = matrix::Random(tokens, 4);
  auto pruned = pruned_tokens(
      random_weight(1, 4),
      [](expert_id, auto in, auto out) {
        for (index_t r = 0; r < in.rows; ++r)
          for (index_t c = 0; c < in.cols; ++c) out(r, c) = in(r, c);
      },
      0.25, 16, d);
  pruned.forward(x, figures, x);
  std::printf("%td of %td tokens pass the pruned layer\n", pruned.plan().load(0), tokens);
}
