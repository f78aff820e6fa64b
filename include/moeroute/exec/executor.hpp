// Who runs a loop: the executor concept and the serial one. No stage starts a thread by itself.
#pragma once

#include <concepts>
#include <utility>

#include <moeroute/base/index.hpp>

namespace moeroute {

/// Runs f(begin, end) over pieces of [0, n) that cover it once, each piece `grain` long but for the
/// last.
///
/// The pieces are cut by (n, grain) alone, never by the number of threads, so results that are
/// computed piece by piece have the same bits under every executor. A piece may run loops of its
/// own (an expert that uses the same pool); a thread that waits for them inside the piece should
/// take no other piece of the outer loop: see worker_slots.
template <class Exec>
concept executor = requires(const Exec& exec, index_t n, void (*f)(index_t, index_t)) {
  { exec.parallel_for(n, n, f) };
  { exec.concurrency() } -> std::convertible_to<int>;
};

/// Everything on the calling thread.
struct serial {
  static constexpr int concurrency() { return 1; }

  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    for (index_t begin = 0, end = 0; begin < n; begin = end) {
      end = n - begin > grain ? begin + grain : n;
      f(begin, end);
    }
  }
};
static_assert(executor<serial>);

}  // namespace moeroute
