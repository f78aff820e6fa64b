// Hands each running piece of a parallel loop its own piece of scratch, whatever the executor is.
#pragma once

#include <algorithm>
#include <atomic>
#include <thread>

#include <moeroute/base/index.hpp>

namespace moeroute {

/// Numbers in [0, size) of which each is held by one running piece at a time.
class worker_slots {
 public:
  static constexpr int most = 256;

  /// As many as `concurrency`, at most 256: more threads than that wait for one another.
  explicit worker_slots(int concurrency) : size_(std::clamp(concurrency, 1, most)) {}

  static int count(int concurrency) { return std::clamp(concurrency, 1, most); }

  /// Holds a number until the end of its scope.
  class held {
   public:
    explicit held(worker_slots& slots) : slots_(slots) {
      for (;;) {
        for (number_ = 0; number_ < slots.size_; ++number_)
          if (!slots.busy_[number_].exchange(true, std::memory_order_acquire)) return;
        std::this_thread::yield();
      }
    }
    ~held() { slots_.busy_[number_].store(false, std::memory_order_release); }
    held(const held&) = delete;
    held& operator=(const held&) = delete;
    operator int() const { return number_; }

   private:
    worker_slots& slots_;
    int number_ = 0;
  };

 private:
  int size_;
  std::atomic<bool> busy_[most] = {};
};

}  // namespace moeroute
