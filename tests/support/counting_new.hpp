// Replaces the global operator new and delete of the program: include it in exactly one file of a
// binary.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "support/allocations.hpp"

namespace test::detail {

inline std::atomic<long> blocks_allocated{0};
inline std::atomic<long> all_bytes{0};

inline void* allocate(std::size_t n) {
  ++blocks_allocated;
  all_bytes += static_cast<long>(n);
  return std::malloc(n > 0 ? n : 1);
}

inline void* allocate(std::size_t n, std::align_val_t alignment) {
  ++blocks_allocated;
  all_bytes += static_cast<long>(n);
  // By malloc, since not every system has std::aligned_alloc: in front of it stands what to free.
  const std::size_t a = std::max(static_cast<std::size_t>(alignment), alignof(std::max_align_t));
  void* const whole = std::malloc(n + 2 * a);
  if (whole == nullptr) return nullptr;
  // At least alignof(max_align_t) behind the beginning, as malloc aligns that.
  const auto p = reinterpret_cast<void**>((reinterpret_cast<std::uintptr_t>(whole) / a + 1) * a);
  p[-1] = whole;
  return p;
}

// Out of line: g++ takes a delete that is inlined down to free for a mismatch with new.
[[gnu::noinline]] inline void release(void* p) noexcept { std::free(p); }
[[gnu::noinline]] inline void release_aligned(void* p) noexcept {
  if (p != nullptr) std::free(static_cast<void**>(p)[-1]);
}

inline void* or_throw(void* p) {
#if defined(__cpp_exceptions)
  if (p == nullptr) throw std::bad_alloc();
#else
  if (p == nullptr) std::abort();
#endif
  return p;
}

}  // namespace test::detail

long test::allocations() { return test::detail::blocks_allocated; }
long test::allocated_bytes() { return test::detail::all_bytes; }

using test::detail::allocate;
using test::detail::or_throw;
using test::detail::release;
using test::detail::release_aligned;

// The array forms call these.
void* operator new(std::size_t n) { return or_throw(allocate(n)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate(n); }
void* operator new(std::size_t n, std::align_val_t a) { return or_throw(allocate(n, a)); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return allocate(n, a);
}
void operator delete(void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release_aligned(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release_aligned(p); }
void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept {
  release_aligned(p);
}
