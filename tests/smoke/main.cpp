// Every header at once, behind macros as other people's headers define them (<windows.h>,
// <complex.h>, <termios.h>), and one decision without exceptions or type information.
#define min(a, b) ((a) < (b) ? (a) : (b))
#define max(a, b) ((a) > (b) ? (a) : (b))
#define I _Complex_I
#define small char
#define near
#define far
#define B0 0000000
#define ERROR 0
#define interface struct

#include "every_header.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

#include <cstdio>
#include <cstdlib>

int main() {
  const float logits[] = {0.5f, -1.0f, 2.0f, 2.0f};
  const moeroute::router router{moeroute::softmax{}, moeroute::top_k{.k = 2},
                                moeroute::sum_normalized};
  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::route(router, moeroute::matrix_view<const float>(logits, 1, 4), workspace, choices);
  if (choices.ids()[0] != 2 || choices.ids()[1] != 3 || choices.weights()[0] != 0.5f) {
    std::puts("smoke: a wrong decision");
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
