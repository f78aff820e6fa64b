// Where the build has no oneTBB this room's header cannot be compiled, and there is nothing to
// test.
#if defined(MOEROUTE_HAS_TBB)
#include <moeroute/exec/tbb.hpp>

#include <oneapi/tbb/global_control.h>

#include <algorithm>
#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <chrono>
#include <mutex>
#include <stdexcept>
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

TEST_CASE("oneTBB's pieces are the serial ones, in any arena") {
  ::tbb::task_arena one(1), three(3);
  for (const onetbb exec : {onetbb{}, onetbb{&one}, onetbb{&three}})
    for (const index_t n : {0, 1, 2, 5, 16, 17, 100})
      for (const index_t grain : {1, 2, 16, 1000})
        CHECK(cut(exec, n, grain) == cut(serial{}, n, grain));
  CHECK(onetbb{&three}.concurrency() == 3);
  CHECK(onetbb{}.concurrency() >= 1);
}

TEST_CASE("what a oneTBB task throws reaches the caller") {
  const auto loop = [] {
    onetbb{}.parallel_for(20, 1, [](index_t b, index_t) {
      if (b == 11) throw std::runtime_error("piece");
    });
  };
  CHECK_THROWS_AS(loop(), std::runtime_error);
}

TEST_CASE("a thread that waits inside a piece for tasks of its own runs no other piece") {
  // More threads than processors: some piece of a nested loop is always somebody else's.
  const ::tbb::global_control four(::tbb::global_control::max_allowed_parallelism, 4);
  ::tbb::task_arena arena(4);
  const onetbb exec{&arena};
  std::atomic<int> nested{0};
  for (int repeat = 0; repeat < 20; ++repeat)
    exec.parallel_for(64, 1, [&](index_t, index_t) {
      static thread_local bool inside = false;
      nested += inside;
      inside = true;
      ::tbb::parallel_for(::tbb::blocked_range<int>(0, 8, 1), [](const auto& range) {
        for (int i = range.begin(); i < range.end(); ++i)
          std::this_thread::sleep_for(std::chrono::microseconds(i % 5 == 0 ? 400 : 20));
      });
      inside = false;
    });
  CHECK(nested == 0);
}

TEST_CASE("a loop of one piece makes no oneTBB task") {
  const auto caller = std::this_thread::get_id();
  std::thread::id runner;
  onetbb{}.parallel_for(7, 7, [&](index_t, index_t) { runner = std::this_thread::get_id(); });
  CHECK(runner == caller);
  // Nor does it enter an arena, which several pieces run in.
  const int outside = ::tbb::this_task_arena::max_concurrency();
  ::tbb::task_arena arena(outside + 3);
  std::atomic<int> inside{0};
  const auto look = [&](index_t, index_t) {
    inside = ::tbb::this_task_arena::max_concurrency() - outside;
  };
  onetbb{&arena}.parallel_for(7, 7, look);
  CHECK(inside == 0);
  onetbb{&arena}.parallel_for(7, 2, look);
  CHECK(inside == 3);
  onetbb{}.parallel_for(7, 2, look);
  CHECK(inside == 0);
}
#endif
