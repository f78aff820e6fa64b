// Writes text with a mixture-of-experts model from a Hugging Face checkpoint,
// every layer through gate, route, plan, dispatch, experts and combine.
//
//   generate --model examples/model --prompt 'def ' --tokens 200 --temperature 0.7 --seed 7
//   generate --model examples/model --verify
#include "support/generate_app.hpp"

#include <iostream>

#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#else
#include <moeroute/exec/executor.hpp>
#endif

int main(int argc, char** argv) {
  return example::run_generate(argc, argv, std::cout, std::cerr, 1, [](int threads) {
#if defined(_OPENMP)
    return moeroute::openmp{threads};
#else
        static_cast<void>(threads);
        return moeroute::serial{};
#endif
  });
}
