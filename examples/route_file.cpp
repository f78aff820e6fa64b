// Routes the logits of a file and writes {"ids": [[...]], "weights": [[...]]}, one row per token.
//
//   route_file tests/golden/open/deepseek_v3.json
//   route_file logits.npy --spec router.json --k 4 --mask 1,1,0
//
// The files' words are those of tests/golden/README.md. Bad input: one line that names file and
// field, exit code 2.
#include "support/route_file_app.hpp"

#include <iostream>

int main(int argc, char** argv) {
  return example::run_route_file(argc, argv, std::cout, std::cerr);
}
