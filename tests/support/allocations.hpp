// How many times operator new runs. One file of the program includes support/counting_new.hpp as
// well.
#pragma once

#include <utility>

namespace test {

/// Calls of any form of global operator new so far, from all threads.
long allocations();

/// Bytes that they asked for so far.
long allocated_bytes();

template <class F>
long allocations_during(F&& f) {
  const long before = allocations();
  std::forward<F>(f)();
  return allocations() - before;
}

template <class F>
long bytes_allocated_during(F&& f) {
  const long before = allocated_bytes();
  std::forward<F>(f)();
  return allocated_bytes() - before;
}

}  // namespace test
