#include <moeroute/exec/worker_slots.hpp>

#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <chrono>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "support/guarded.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

constexpr auto no_slot_left =
    "moeroute::worker_slots: every thread waits inside a piece for scratch that only these "
    "pieces give back: the pool runs pieces inside suspended ones; isolate them";

TEST_CASE("a number is held by one at a time and comes back") {
  worker_slots slots(3);
  const worker_slots::held a(slots);
  {
    const worker_slots::held b(slots), c(slots);
    CHECK((a == 0 && b == 1 && c == 2));
  }
  const worker_slots::held again(slots);
  CHECK(again == 1);
}

TEST_CASE("there is at least one number and at most 256") {
  CHECK(worker_slots::count(0) == 1);
  CHECK(worker_slots::count(-5) == 1);
  CHECK(worker_slots::count(7) == 7);
  CHECK(worker_slots::count(100000) == worker_slots::most);
}

TEST_CASE("256 numbers are held at once, each another, and nothing lies behind their flags") {
  test::guarded<worker_slots> memory(1);
  worker_slots& slots = *new (memory.window(1, test::guarded_end::back)) worker_slots(100000);
  std::vector<std::unique_ptr<worker_slots::held>> all;
  for (int n = 0; n < worker_slots::most; ++n) {
    all.push_back(std::make_unique<worker_slots::held>(slots));
    REQUIRE(*all.back() == n);
  }
  CHECK(test::refusal([&] { const worker_slots::held more(slots); }) == no_slot_left);
  for (int n = worker_slots::most - 1; n >= 0; --n) {
    all.pop_back();
    const worker_slots::held again(slots);
    REQUIRE(again == n);
  }
}

TEST_CASE("more threads than numbers wait, and never share one") {
  worker_slots slots(2);
  std::atomic<int> holders[2] = {};
  std::atomic<int> broken{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 5; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        const worker_slots::held worker(slots);
        if (++holders[worker] != 1) ++broken;
        --holders[worker];
      }
    });
  for (auto& t : threads) t.join();
  CHECK(broken == 0);
}

TEST_CASE("who waited for a second number and got it is not counted as waiting any more") {
  worker_slots slots(2);
  const worker_slots::held outer(slots);
  for (int i = 0; i < 4; ++i) {
    std::atomic<bool> holds{false};
    std::thread other([&] {
      const worker_slots::held one(slots);
      holds = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    });
    while (!holds) std::this_thread::yield();
    CHECK(test::refusal([&] { const worker_slots::held inner(slots); }) == "accepted");
    other.join();
  }
}

TEST_CASE("numbers of another loop are not counted among those that a loop waits for") {
  worker_slots mine(2), others(2);
  const worker_slots::held one(mine), two(mine);
  std::atomic<bool> holds{false};
  std::thread other([&] {
    const worker_slots::held first(others), second(others);
    holds = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  });
  while (!holds) std::this_thread::yield();
  CHECK(test::refusal([&] { const worker_slots::held inner(others); }) == "accepted");
  other.join();
}

TEST_CASE("a thread that holds a number may hold another, and an endless wait is an error") {
  worker_slots slots(2);
  const worker_slots::held outer(slots);
  {
    const worker_slots::held inner(slots);
    CHECK(inner == 1);
    // Both are this thread's own, suspended: nobody can give one back.
    CHECK(test::refusal([&] { const worker_slots::held third(slots); }) == no_slot_left);
    worker_slots others(2);
    const worker_slots::held other(others);  // of another loop: no wait
    CHECK(other == 0);
    {
      worker_slots one(1);  // of a loop that runs piece after piece: nothing is held
      const worker_slots::held first(one), second(one);
      CHECK((first == 0 && second == 0));
    }
    CHECK(test::refusal([&] { const worker_slots::held third(slots); }) == no_slot_left);
  }
  {
    const worker_slots::held again(slots);
    CHECK(again == 1);
  }
  // Who gave up does not wait any more: another's number is waited for.
  std::atomic<bool> holds{false};
  std::thread other([&] {
    const worker_slots::held one(slots);
    holds = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  });
  while (!holds) std::this_thread::yield();
  CHECK(test::refusal([&] { const worker_slots::held inner(slots); }) == "accepted");
  other.join();
}
