// How many times operator new runs. One file of the program includes support/counting_new.hpp as
// well.
#pragma once

#include <utility>

#include "support/pages.hpp"

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

/// While one of these lives, blocks of operator new with an alignment, those of every buffer, begin
/// or end at a page that nobody may touch, or end as near to it as their alignment lets them.
class forbidden_memory {
 public:
  explicit forbidden_memory(guarded_end end);
  ~forbidden_memory();
  forbidden_memory(const forbidden_memory&) = delete;
  forbidden_memory& operator=(const forbidden_memory&) = delete;
};

}  // namespace test
