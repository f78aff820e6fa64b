// The arrays of a call where memory ends: what a kernel reads or writes beyond them stops the
// program.
#pragma once

#include <algorithm>
#include <cstddef>
#include <deque>
#include <moeroute/base/workspace.hpp>
#include <span>
#include <vector>

#include "support/guarded.hpp"

namespace test {

/// Arrays that all begin, or all end, at a page that nobody may touch. Those that end there have
/// every alignment, as their lengths have it.
class edges {
 public:
  /// most: bytes of the largest array.
  explicit edges(moeroute::index_t most) : most_(most) {}

  /// Forgets the arrays; those that come lie at this end.
  void begin(guarded_end end) {
    end_ = end;
    used_ = 0;
  }

  /// Room for n values, poisoned: every byte is 0xff.
  template <class T>
  T* room(moeroute::index_t n) {
    if (used_ == memory_.size()) memory_.emplace_back(most_);
    constexpr auto size = static_cast<moeroute::index_t>(sizeof(T));
    return reinterpret_cast<T*>(memory_[used_++].window(n * size, end_));
  }

  template <class T>
  T* copy(std::span<const T> values) {
    T* const at = room<T>(std::ssize(values));
    std::ranges::copy(values, at);
    return at;
  }
  template <class T>
  T* copy(const std::vector<T>& values) {
    return copy(std::span<const T>(values));
  }

  /// What layout(scratch) takes, in memory of that size.
  template <class Layout>
  auto carve(Layout&& layout) {
    moeroute::scratch measure;
    layout(measure);
    moeroute::scratch tape(room<std::byte>(measure.used()), measure.used());
    return layout(tape);
  }

 private:
  moeroute::index_t most_;
  guarded_end end_ = guarded_end::back;
  std::deque<guarded<std::byte>> memory_;
  std::size_t used_ = 0;
};

/// Calls f for both ends.
template <class F>
void at_both_ends(edges& memory, F&& f) {
  for (const guarded_end end : {guarded_end::front, guarded_end::back}) {
    memory.begin(end);
    f();
  }
}

}  // namespace test
