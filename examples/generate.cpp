// Writes text with a mixture-of-experts model from a Hugging Face checkpoint,
// every layer through gate, route, plan, dispatch, experts and combine.
//
//   generate --model examples/model --prompt 'def ' --tokens 200 --temperature 0.7 --seed 7
//   generate --model examples/model --verify
//   mpirun -n 4 generate --model examples/model --verify --ranks 4     (built with MPI)
#include "support/generate_app.hpp"

#include <iostream>
#include <memory>
#include <sstream>

#if MOEROUTE_HAS_MPI
#include "support/mpi_ranks.hpp"
#endif

#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#else
#include <moeroute/exec/executor.hpp>
#endif

namespace {

auto make_executor(int threads) {
#if defined(_OPENMP)
  return moeroute::openmp{threads};
#else
  static_cast<void>(threads);
  return moeroute::serial{};
#endif
}

}  // namespace

int main(int argc, char** argv) {
#if MOEROUTE_HAS_MPI
  example::mpi_session session(argc, argv);
  // Ranks do the same; the first speaks.
  std::ostringstream silent;
  const bool speaks = session.rank() == 0;
  int code = 0;
  {
    const auto ranks = std::make_shared<example::mpi_ranks>(session.rank(), session.ranks());
    code = example::run_generate(argc, argv, speaks ? std::cout : silent,
                                 speaks ? std::cerr : silent, 1, make_executor, ranks);
  }
  return example::mpi_session::worst(code);
#else
  return example::run_generate(argc, argv, std::cout, std::cerr, 1, make_executor);
#endif
}
