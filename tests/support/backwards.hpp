// An executor that runs the pieces last to first: what they write must not depend on their order.
#pragma once

#include <algorithm>
#include <moeroute/exec/executor.hpp>

namespace test {

struct backwards {
  static constexpr int concurrency() { return 2; }

  template <class F>
  void parallel_for(moeroute::index_t n, moeroute::index_t grain, F&& f) const {
    for (moeroute::index_t i = moeroute::ceil_div(n, grain) - 1; i >= 0; --i)
      f(i * grain, std::min(n, (i + 1) * grain));
  }
};
static_assert(moeroute::executor<backwards>);

}  // namespace test
