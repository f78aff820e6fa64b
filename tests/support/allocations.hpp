// How many times operator new runs. One file of the program includes support/counting_new.hpp as
// well.
#pragma once

#include <utility>

namespace test {

/// Calls of any form of global operator new so far, from all threads.
long allocations();

template <class F>
long allocations_during(F&& f) {
  const long before = allocations();
  std::forward<F>(f)();
  return allocations() - before;
}

}  // namespace test
