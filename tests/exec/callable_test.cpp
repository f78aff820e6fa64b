#include <moeroute/exec/callable.hpp>

#include <algorithm>
#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <functional>
#include <moeroute/exec/worker_slots.hpp>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "support/refusal.hpp"

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

namespace {

// A pool that steals: whoever waits inside a piece runs pieces that have not begun, its own loop's
// among them.
class stealing_pool {
 public:
  void run(index_t n, index_t grain, loop_body body) {
    for (index_t b = 0; b < n; b += grain)
      queue_.push_back([=] { body(b, std::min(n, b + grain)); });
    while (help()) {
    }
  }
  bool help() {
    if (queue_.empty()) return false;
    const auto piece = queue_.back();
    queue_.pop_back();
    piece();
    return true;
  }

 private:
  std::vector<std::function<void()>> queue_;
};

}  // namespace

TEST_CASE("a pool that runs pieces inside suspended ones gives each its scratch, or an error") {
  stealing_pool pool;
  const callable_executor exec(
      [&](index_t n, index_t grain, loop_body body) { pool.run(n, grain, body); }, 2);
  std::vector<int> depth_of(3, 0);
  const auto loop = [&](index_t n) {
    worker_slots slots(exec.concurrency());
    int depth = 0;
    exec.parallel_for(n, 1, [&](index_t, index_t) {
      const worker_slots::held worker(slots);
      CHECK(depth_of[static_cast<std::size_t>(int{worker})]++ == 0);
      ++depth;
      while (pool.help()) {
      }
      --depth;
      --depth_of[static_cast<std::size_t>(int{worker})];
    });
    CHECK(depth == 0);
  };
  loop(2);
  CHECK(test::refusal([&] { loop(3); }) ==  // it would wait for itself
        "moeroute::worker_slots: every thread waits inside a piece for scratch that only these "
        "pieces give back: the pool runs pieces inside suspended ones; isolate them");
  loop(2);
}

TEST_CASE("a pool that forgets a piece, or runs one twice, is refused") {
  const auto forgets = [](index_t n, index_t grain, loop_body body) {
    for (index_t b = 0; b + grain < n; b += grain) body(b, b + grain);
  };
  const auto repeats = [](index_t n, index_t grain, loop_body body) {
    for (index_t b = 0; b < n; b += grain) body(b, std::min(n, b + grain));
    body(0, std::min(n, grain));
  };
  auto nothing = [](index_t, index_t) {};
  CHECK(test::refusal([&] { callable_executor(forgets, 1).parallel_for(10, 3, nothing); }) ==
        "moeroute::callable_executor: what run covered of the loop is 9, expected 10");
  CHECK(test::refusal([&] { callable_executor(repeats, 1).parallel_for(10, 3, nothing); }) ==
        "moeroute::callable_executor: what run covered of the loop is 13, expected 10");
  CHECK(test::refusal([&] { callable_executor(forgets, 1).parallel_for(0, 3, nothing); }) ==
        "accepted");
  int asked = 0;
  const auto counts = [&](index_t n, index_t, loop_body body) { ++asked, body(0, n); };
  for (const index_t n : {-1, 0, 1}) callable_executor(counts, 1).parallel_for(n, 3, nothing);
  CHECK(asked == 1);  // nothing is not handed to a pool
}
