// Carries an exception out of threads that must not let one escape.
#pragma once

#include <atomic>
#include <exception>
#include <utility>

#include <moeroute/base/config.hpp>

namespace moeroute {

/// The first exception of many pieces of work; the others are lost.
class first_exception {
 public:
  /// Calls f, unless a piece has failed already.
  template <class F>
  void guard(F&& f) {
#if MOEROUTE_EXCEPTIONS
    if (failed_.load(std::memory_order_relaxed)) return;
    try {
      std::forward<F>(f)();
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_relaxed)) exception_ = std::current_exception();
    }
#else
    std::forward<F>(f)();
#endif
  }

  /// On the calling thread, when all pieces have ended: throws what was caught, if anything.
  void rethrow() {
#if MOEROUTE_EXCEPTIONS
    if (exception_ != nullptr) std::rethrow_exception(std::exchange(exception_, nullptr));
#endif
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

}  // namespace moeroute
