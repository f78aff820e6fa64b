// What an outside project does first: route a few tokens and look where they go.
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

#include <cstdio>

int main() {
  constexpr int tokens = 3, experts = 4;
  moeroute::row_matrix<float> logits(tokens, experts);
  logits << 0, 1, 2, 3,  //
      3, 2, 1, 0,        //
      0, 5, 0, 5;

  const moeroute::router router{moeroute::softmax{}, moeroute::top_k{.k = 2},
                                moeroute::sum_normalized};
  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::route(router, logits, workspace, choices);

  const int expected[tokens][2] = {{3, 2}, {0, 1}, {1, 3}};
  for (int t = 0; t < tokens; ++t)
    for (int rank = 0; rank < 2; ++rank)
      if (choices.ids(t)[rank] != expected[t][rank]) {
        std::printf("token %d, choice %d is expert %d, expected %d\n", t, rank,
                    choices.ids(t)[rank], expected[t][rank]);
        return 1;
      }
  std::puts("three tokens routed");
}
