#include <moeroute/exec/callable.hpp>

#include <algorithm>
#include <atomic>
#include <catch2/catch_test_macros.hpp>
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

// A thread per part, each part several grains.
auto threads_of(index_t grains) {
  return [grains](index_t n, index_t grain, loop_body body) {
    std::vector<std::thread> pool;
    for (index_t b = 0; b < n; b += grain * grains)
      pool.emplace_back([=] { body(b, std::min(n, b + grain * grains)); });
    for (auto& t : pool) t.join();
  };
}

}  // namespace

TEST_CASE("a callable's pieces are the serial ones, however many it takes at once") {
  for (const index_t grains : {1, 2, 5})
    for (const index_t n : {0, 1, 7, 16, 33})
      for (const index_t grain : {1, 4, 100})
        CHECK(cut(callable_executor(threads_of(grains), 4), n, grain) == cut(serial{}, n, grain));
}

TEST_CASE("what a piece throws on another thread reaches the caller, once all have ended") {
  const callable_executor exec(threads_of(1), 4);
  std::atomic<int> running{0};
  const auto loop = [&] {
    exec.parallel_for(20, 1, [&](index_t b, index_t) {
      ++running;
      std::this_thread::yield();
      --running;
      if (b % 3 == 1) throw std::runtime_error("piece");
    });
  };
  CHECK_THROWS_AS(loop(), std::runtime_error);
  CHECK(running == 0);
  CHECK(cut(exec, 9, 2) == cut(serial{}, 9, 2));
}

TEST_CASE("a callable has at least one thread") {
  CHECK(callable_executor(threads_of(1), 0).concurrency() == 1);
  CHECK(callable_executor(threads_of(1), 7).concurrency() == 7);
}
