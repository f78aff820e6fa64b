// The door to OpenMP: opt-in, include it and compile with OpenMP on.
#pragma once

#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/first_exception.hpp>

#if !defined(_OPENMP)
#error \
    "[moeroute::openmp] exec/openmp.hpp needs OpenMP: compile with -fopenmp, or use moeroute::serial"
#endif

#include <omp.h>

namespace moeroute {

/// Pieces run on an OpenMP team of `threads` threads; 0 means the OpenMP default.
///
/// What a piece throws reaches the caller; pieces that have not begun by then are left out. A
/// thread that waits inside a piece runs no other: pieces are iterations of a loop, not tasks.
struct openmp {
  int threads = 0;

  int concurrency() const { return threads > 0 ? threads : omp_get_max_threads(); }

  /// A loop of one piece runs on the calling thread and starts no team.
  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    const index_t pieces = ceil_div(n, grain);
    if (pieces <= 1 || concurrency() == 1) return serial{}.parallel_for(n, grain, f);
    first_exception failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(concurrency())
    for (index_t piece = 0; piece < pieces; ++piece) {
      const index_t begin = piece * grain;
      failure.guard([&] { f(begin, begin + grain < n ? begin + grain : n); });
    }
    failure.rethrow();
  }
};
static_assert(executor<openmp>);

}  // namespace moeroute
