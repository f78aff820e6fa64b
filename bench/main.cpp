// The main function of every benchmark program: Google Benchmark's flags, and --quick.
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <cstring>
#include <string>

#include <moeroute/simd/batch.hpp>

#include "support/contest.hpp"

int main(int argc, char** argv) {
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--quick") == 0) {
      bench::seconds_per_entry() *= 0.1;
    } else {
      argv[kept++] = argv[i];
    }
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("isa", moeroute::simd::default_arch::name());
  benchmark::AddCustomContext("seconds_per_entry", std::to_string(bench::seconds_per_entry()));
  Eigen::setNbThreads(1);  // everything here is measured on one thread
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
