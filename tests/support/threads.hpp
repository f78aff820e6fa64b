// An executor with several threads: OpenMP where the compiler has it, else threads of the standard
// library.
#pragma once

#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#else
#include <atomic>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/first_exception.hpp>
#include <thread>
#include <vector>
#endif

namespace test {

#if defined(_OPENMP)
using several_threads = moeroute::openmp;
#else
struct several_threads {
  int threads = 2;

  int concurrency() const { return threads; }

  template <class F>
  void parallel_for(moeroute::index_t n, moeroute::index_t grain, F&& f) const {
    std::atomic<moeroute::index_t> next = 0;
    moeroute::first_exception failure;
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
      team.emplace_back([&] {
        for (;;) {
          const moeroute::index_t begin = next.fetch_add(grain);
          if (begin >= n) return;
          failure.guard([&] { f(begin, begin + grain < n ? begin + grain : n); });
        }
      });
    for (std::thread& one : team) one.join();
    failure.rethrow();
  }
};
static_assert(moeroute::executor<several_threads>);
#endif

}  // namespace test
