// Hands each running piece of a parallel loop its own piece of scratch, whatever the executor is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include <moeroute/base/index.hpp>

namespace moeroute {

/// Numbers in [0, size) of which each is held by one running piece at a time.
class worker_slots {
 public:
  static constexpr int most = 256;

  /// As many as `concurrency`, at most 256: more threads than that wait for one another. Requires:
  /// with 1, pieces do not run at the same time.
  explicit worker_slots(int concurrency) : size_(std::clamp(concurrency, 1, most)) {}

  static int count(int concurrency) { return std::clamp(concurrency, 1, most); }

  /// Holds a number until the end of its scope.
  class held {
   public:
    explicit held(worker_slots& slots) : slots_(slots) {
      if (slots.size_ == 1) return;  // one piece at a time: nobody to keep out
      for (;;) {
        for (number_ = 0; number_ < slots.size_; ++number_)
          if ((word().fetch_or(bit(), std::memory_order_acquire) & bit()) == 0) return;
        std::this_thread::yield();
      }
    }
    ~held() {
      if (slots_.size_ > 1) word().fetch_and(~bit(), std::memory_order_release);
    }
    held(const held&) = delete;
    held& operator=(const held&) = delete;
    operator int() const { return number_; }

   private:
    std::atomic<std::uint64_t>& word() const { return slots_.busy_[number_ / 64]; }
    std::uint64_t bit() const { return std::uint64_t{1} << number_ % 64; }

    worker_slots& slots_;
    int number_ = 0;
  };

 private:
  // Bits: clearing a byte for each would cost more than routing one token.
  int size_;
  std::atomic<std::uint64_t> busy_[most / 64] = {};
};

}  // namespace moeroute
