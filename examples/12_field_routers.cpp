// Routing systems of the field, a few calls each (support/field_routers.hpp); which system is which
// is in docs/systems.md.
#include <cstdio>
#include <vector>

#include "support/field_routers.hpp"

using namespace example;

int main() {
  constexpr index_t tokens = 24, d = 4, block = 8, blocks = 3;
  std::vector<float> q, k;
  for (index_t i = 0; i < tokens * d; ++i) {
    q.push_back(static_cast<float>(i * 37 % 64) / 32.0f - 1.0f);
    k.push_back(static_cast<float>(i * 29 % 64) / 32.0f - 1.0f);
  }
  const matrix_view<const float> query(q.data(), tokens, d), keys(k.data(), tokens, d);

  std::vector<float> z(tokens * blocks);
  block_scores(query, keys, block, matrix_view<float>(z.data(), tokens, blocks));
  moeroute::workspace ws;
  moeroute::assignment read;
  moeroute::route(moeroute::router<moeroute::softmax_selected>{.selection = {.k = 2}},
                  matrix_view<const float>(z.data(), tokens, blocks), ws, read);
  std::printf("the last token reads blocks %d and %d of keys\n", read.ids(tokens - 1)[0],
              read.ids(tokens - 1)[1]);

  moving_centres centres(matrix_view<const float>(q.data(), 3, d));
  for (int step = 0; step < 10; ++step) centres.follow(keys, 0.5f);
  const moeroute::assignment& clusters = centres.clusters(keys, 4);
  for (expert_id e = 0; e < 3; ++e) {
    std::printf("centre %d reads tokens", e);
    for (index_t t = 0; t < tokens; ++t)
      for (const expert_id one : clusters.ids(t))
        if (one == e) std::printf(" %td", t);
    std::puts("");
  }

  std::printf("mean quality of three models over all budgets: %.3f\n",
              mean_quality({{1.0, 0.55}, {4.0, 0.7}, {8.0, 0.75}}));
  return 0;
}
