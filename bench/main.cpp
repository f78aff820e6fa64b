// The main function of every benchmark program: Google Benchmark's flags, --quick, and a trace to
// route.
#include <benchmark/benchmark.h>

#include <Eigen/Core>
#include <cstdio>
#include <exception>
#include <string>
#include <string_view>

#include <moeroute/simd/batch.hpp>

#include "support/arguments.hpp"
#include "support/contest.hpp"

int main(int argc, char** argv) {
  bench::arguments asked;
  int kept = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    const auto value = [&](std::string_view flag, std::string& to) {
      if (!word.starts_with(flag)) return false;
      to = word.substr(flag.size());
      return true;
    };
    if (word == "--quick")
      bench::seconds_per_entry() *= 0.1;
    else if (!value("--trace=", asked.trace) && !value("--router=", asked.router) &&
             !value("--step=", asked.steps))
      argv[kept++] = argv[i];
  }
  argc = kept;
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  try {
    for (const auto& add : bench::late_entries()) add(asked);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  benchmark::AddCustomContext("isa", moeroute::simd::default_arch::name());
  benchmark::AddCustomContext("seconds_per_entry", std::to_string(bench::seconds_per_entry()));
  Eigen::setNbThreads(1);  // everything here is measured on one thread
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
