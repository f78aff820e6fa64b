// Where the compiler has no OpenMP this room's header refuses to compile, and there is nothing to
// test.
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>

#include <algorithm>
#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

using namespace moeroute;

namespace {

using pieces = std::vector<std::pair<index_t, index_t>>;

template <executor Exec>
pieces cut(const Exec& exec, index_t n, index_t grain) {
  pieces list;
  std::mutex mutex;
  exec.parallel_for(n, grain, [&](index_t b, index_t e) {
    const std::lock_guard lock(mutex);
    list.emplace_back(b, e);
  });
  std::sort(list.begin(), list.end());
  return list;
}

}  // namespace

TEST_CASE("OpenMP's pieces are the serial ones, whatever the number of threads") {
  for (const int threads : {1, 2, 3, 4, 7})
    for (const index_t n : {0, 1, 2, 5, 16, 17, 100})
      for (const index_t grain : {1, 2, 16, 1000})
        CHECK(cut(openmp{threads}, n, grain) == cut(serial{}, n, grain));
}

TEST_CASE("no more pieces run at once than concurrency says") {
  const openmp exec{3};
  CHECK(exec.concurrency() == 3);
  std::atomic<int> running{0}, most{0};
  exec.parallel_for(64, 1, [&](index_t, index_t) {
    const int now = ++running;
    int seen = most;
    while (now > seen && !most.compare_exchange_weak(seen, now)) {
    }
    std::this_thread::yield();
    --running;
  });
  CHECK(most <= 3);
}

TEST_CASE("several pieces are a parallel region's, where several threads are asked for") {
  std::atomic<int> together{0};
  openmp{2}.parallel_for(8, 2, [&](index_t, index_t) { together += omp_in_parallel() != 0; });
  CHECK(together == 4);
  // One thread needs no region, not even one of its own.
  openmp{1}.parallel_for(8, 2, [&](index_t, index_t) { together += omp_get_level() != 0; });
  CHECK(together == 4);
}

TEST_CASE("a loop of one piece stays on the calling thread") {
  const auto caller = std::this_thread::get_id();
  std::thread::id runner;
  int team = 0;
  openmp{4}.parallel_for(7, 7, [&](index_t, index_t) {
    runner = std::this_thread::get_id();
    team = omp_get_num_threads();
  });
  CHECK(runner == caller);
  CHECK(team == 1);
}

TEST_CASE("0 threads means OpenMP's own default") { CHECK(openmp{}.concurrency() >= 1); }
#endif
