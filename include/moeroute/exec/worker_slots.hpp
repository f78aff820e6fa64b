// Hands each running piece of a parallel loop its own piece of scratch, whatever the executor is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>

#include <moeroute/base/config.hpp>
#include <moeroute/base/error.hpp>
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
  ///
  /// Throws: error where it would wait forever: every number is held by a thread that runs a piece
  /// inside a suspended one and waits for another number.
  class held {
   public:
    explicit held(worker_slots& slots) : slots_(slots) {
      if (slots.size_ == 1) return;  // one piece at a time: nobody to keep out
      if (!take()) wait();
      outer_ = enter(this);
    }
    ~held() {
      if (slots_.size_ == 1) return;
      innermost() = outer_;
      word().fetch_and(~bit(), std::memory_order_release);
    }
    held(const held&) = delete;
    held& operator=(const held&) = delete;
    operator int() const { return number_; }

   private:
    // What this thread holds, the latest first: more than one where a pool lets it run a piece
    // while it waits inside another.
    static held*& innermost() {
      static constinit thread_local held* latest = nullptr;
      return latest;
    }

    // Out of line: a compiler that sees a local object's address stored warns.
    MOEROUTE_OUT_OF_LINE static held* enter(held* self) { return std::exchange(innermost(), self); }

    bool take() {
      for (number_ = 0; number_ < slots_.size_; ++number_)
        if ((word().fetch_or(bit(), std::memory_order_acquire) & bit()) == 0) return true;
      return false;
    }

    MOEROUTE_COLD void wait() {
      int own = 0;
      for (const held* h = innermost(); h != nullptr; h = h->outer_) own += &h->slots_ == &slots_;
      slots_.stuck_ += own;
      for (;;) {
        const bool taken = take();
        const bool forever = slots_.stuck_ >= slots_.size_;
        if (taken || forever) slots_.stuck_ -= own;
        if (taken) return;
        if (forever)
          fail("worker_slots",
               "every thread waits inside a piece for scratch that only these pieces give back: "
               "the pool runs pieces inside suspended ones; isolate them");
        std::this_thread::yield();
      }
    }

    std::atomic<std::uint64_t>& word() const { return slots_.busy_[number_ / 64]; }
    std::uint64_t bit() const { return std::uint64_t{1} << number_ % 64; }

    worker_slots& slots_;
    held* outer_ = nullptr;
    int number_ = 0;
  };

 private:
  // Bits: clearing a byte for each would cost more than routing one token.
  int size_;
  std::atomic<int> stuck_{0};  // numbers held by threads that wait for another
  std::atomic<std::uint64_t> busy_[most / 64] = {};
};

}  // namespace moeroute
