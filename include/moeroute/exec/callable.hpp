// Any thread pool as an executor: a callable f(n, grain, body).
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>
#include <utility>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/first_exception.hpp>

namespace moeroute {

/// What a callable is given to run: a reference to the loop's body, cheap to copy, valid during the
/// call. body(begin, end) may be called from any thread, for ranges that cover [0, n) once and
/// begin at multiples of the grain; it never throws.
class loop_body {
 public:
  template <class F>
  loop_body(F& f, index_t grain, first_exception& failure, std::atomic<index_t>& covered)
      : object_(std::addressof(f)),
        call_([](void* object, index_t begin, index_t end) {
          (*static_cast<F*>(object))(begin, end);
        }),
        grain_(grain),
        failure_(&failure),
        covered_(&covered) {}

  /// A range of several grains is run piece by piece: where the pieces begin decides results' bits.
  void operator()(index_t begin, index_t end) const {
    MOEROUTE_EXPECTS(begin % grain_ == 0);
    covered_->fetch_add(end - begin, std::memory_order_relaxed);
    for (; begin < end; begin += grain_)
      failure_->guard([&] { call_(object_, begin, begin + grain_ < end ? begin + grain_ : end); });
  }

 private:
  void* object_;
  void (*call_)(void*, index_t, index_t);
  index_t grain_;
  first_exception* failure_;
  std::atomic<index_t>* covered_;
};

/// Runs loops by run(n, grain, body), where body is a loop_body: for pools that are not ours.
///
/// run returns when body has been called for all of [0, n) once; parallel_for throws error where it
/// was called for more or less. What a piece throws is thrown by
/// parallel_for then. Where pieces use the pool themselves, a thread that waits inside a piece
/// should run no other piece of the same loop (work-stealing pools: isolate the piece). One that
/// does so needs scratch for both; where all of it is held by threads that wait for more,
/// parallel_for throws error instead of waiting forever.
template <class Run>
class callable_executor {
 public:
  /// threads: how many pieces run calls at once, at most; more than that wait for scratch.
  callable_executor(Run run, int threads) : run_(std::move(run)), threads_(threads) {}

  int concurrency() const { return threads_ > 0 ? threads_ : 1; }

  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    if (n <= 0) return;
    first_exception failure;
    std::atomic<index_t> covered{0};
    run_(n, grain, loop_body(f, grain, failure, covered));
    failure.rethrow();
    // A pool that forgets a piece leaves what was there before.
    check_size("callable_executor", "what run covered of the loop", covered, n);
  }

 private:
  Run run_;
  int threads_;
};

namespace detail {
struct call_at_once {
  void operator()(index_t n, index_t grain, loop_body body) const;
};
}  // namespace detail
static_assert(executor<callable_executor<detail::call_at_once>>);

}  // namespace moeroute
