// Replaces the global operator new and delete of the program: include it in exactly one file of a
// binary. Blocks with an alignment come full of ones, NaN as floats and -1 as ids, and whoever
// writes behind one is found when it is freed.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "support/allocations.hpp"
#include "support/pages.hpp"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOEROUTE_TEST_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define MOEROUTE_TEST_ASAN 1
#endif
#if defined(MOEROUTE_TEST_ASAN)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(at, size) static_cast<void>(0)
#endif

namespace test::detail {

inline std::atomic<long> blocks_allocated{0};
inline std::atomic<long> all_bytes{0};

inline void* allocate(std::size_t n) {
  ++blocks_allocated;
  all_bytes += static_cast<long>(n);
  return std::malloc(n > 0 ? n : 1);
}

// Which end of new blocks is forbidden: 0 neither, 1 the front, 2 the back.
inline std::atomic<int> forbidden{0};

// What is known of a block with an alignment: bytes of its pages, or 0 where malloc gave the
// memory, its size, and how many bytes behind it have one value.
struct aligned_block {
  void* whole;
  std::size_t pages, size, behind;
};
inline constexpr int mark = 0xc5;

// It stands in front of the block: before a forbidden page if that begins at one. No block of
// malloc's does.
inline std::byte* description(std::byte* p) {
  const std::size_t page = page_bytes();
  const bool at_page = reinterpret_cast<std::uintptr_t>(p) % page == 0;
  return p - (at_page ? page : 0) - sizeof(aligned_block);
}

inline void* allocate(std::size_t n, std::align_val_t alignment) {
  ++blocks_allocated;
  all_bytes += static_cast<long>(n);
  const std::size_t a = std::max(static_cast<std::size_t>(alignment), alignof(std::max_align_t));
  const std::size_t front = (sizeof(aligned_block) + a - 1) / a * a, page = page_bytes();
  aligned_block block{nullptr, 0, n, a};
  std::byte* p;
  if (const int end = forbidden; end != 0) {
    // A page for the description, a forbidden one, the block's and a forbidden one.
    const std::size_t own = (std::max(n, a) + a - 1) / a * a;
    const std::size_t room = own % page == 0 ? own : (front + own + page - 1) / page * page;
    block.pages = room + 3 * page;
    block.whole = map_pages(block.pages);
    if (block.whole == nullptr) return nullptr;
    std::byte* const first = static_cast<std::byte*>(block.whole) + 2 * page;
    block.behind = own - n;
    p = end == 1 ? first : first + room - own;
    forbid_page(first - page);
    forbid_page(first + room);
  } else {
    // By malloc, since not every system has std::aligned_alloc.
    block.whole = std::malloc(front + n + 3 * a);
    if (block.whole == nullptr) return nullptr;
    p = static_cast<std::byte*>(block.whole) + front;
    p += (a - reinterpret_cast<std::uintptr_t>(p) % a) % a;
    if (reinterpret_cast<std::uintptr_t>(p) % page == 0) p += a;
  }
  std::memcpy(description(p), &block, sizeof block);
  if (n <= std::size_t{1} << 20) std::memset(p, 0xff, n);  // of more, nothing is touched
  std::memset(p + n, mark, block.behind);
  ASAN_POISON_MEMORY_REGION(p + n, block.behind);
  return p;
}

// Out of line: g++ takes a delete that is inlined down to free for a mismatch with new.
[[gnu::noinline]] inline void release(void* p) noexcept { std::free(p); }
[[gnu::noinline]] inline void release_aligned(void* p) noexcept {
  if (p == nullptr) return;
  std::byte* const at = static_cast<std::byte*>(p);
  aligned_block block;
  std::memcpy(&block, description(at), sizeof block);
  ASAN_UNPOISON_MEMORY_REGION(at + block.size, block.behind);
  for (std::size_t i = 0; i < block.behind; ++i)
    if (at[block.size + i] != std::byte{mark}) {
      std::fputs("test: something was written behind a block of memory\n", stderr);
      std::abort();
    }
  if (block.pages > 0)
    unmap_pages(block.whole, block.pages);
  else
    std::free(block.whole);
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
test::forbidden_memory::forbidden_memory(guarded_end end) {
  test::detail::forbidden = end == guarded_end::front ? 1 : 2;
}
test::forbidden_memory::~forbidden_memory() { test::detail::forbidden = 0; }

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
