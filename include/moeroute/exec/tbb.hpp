// The door to oneTBB: opt-in, include it and link moeroute::tbb.
#pragma once

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/partitioner.h>
#include <oneapi/tbb/task_arena.h>

#include <moeroute/exec/executor.hpp>

namespace moeroute {

/// Pieces run as oneTBB tasks, in the arena of the calling thread or in one that the caller owns.
///
/// What a piece throws reaches the caller. Pieces are isolated: a thread that waits inside one for
/// oneTBB work of its own takes no other piece of the loop meanwhile, which would wait for scratch
/// that only the suspended one gives back.
struct onetbb {
  ::tbb::task_arena* arena = nullptr;

  int concurrency() const {
    return arena != nullptr ? arena->max_concurrency() : ::tbb::this_task_arena::max_concurrency();
  }

  /// A loop of one piece runs on the calling thread and makes no task.
  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    const index_t pieces = ceil_div(n, grain);
    if (pieces <= 1) return serial{}.parallel_for(n, grain, f);
    const auto all = [&] {
      ::tbb::parallel_for(
          ::tbb::blocked_range<index_t>(0, pieces, 1),
          [&](const ::tbb::blocked_range<index_t>& range) {
            for (index_t piece = range.begin(); piece < range.end(); ++piece) {
              const index_t begin = piece * grain;
              ::tbb::this_task_arena::isolate(
                  [&] { f(begin, begin + grain < n ? begin + grain : n); });
            }
          },
          ::tbb::simple_partitioner());
    };
    if (arena != nullptr) {
      arena->execute(all);
    } else {
      all();
    }
  }
};
static_assert(executor<onetbb>);

}  // namespace moeroute
