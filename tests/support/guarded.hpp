// Memory between two pages that nobody may touch: a read or write past either end stops the
// program.
#pragma once

#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstring>
#include <moeroute/base/index.hpp>
#include <new>

#if defined(_WIN32)
// What is needed of windows.h, which would define near, far and small for every test.
extern "C" {
__declspec(dllimport) void* __stdcall VirtualAlloc(void*, std::size_t, unsigned long,
                                                   unsigned long);
__declspec(dllimport) int __stdcall VirtualProtect(void*, std::size_t, unsigned long,
                                                   unsigned long*);
__declspec(dllimport) int __stdcall VirtualFree(void*, std::size_t, unsigned long);
}
#endif

namespace test {

namespace detail {

#if defined(_WIN32)
inline std::size_t page_bytes() { return 4096; }
inline void* map_pages(std::size_t bytes) { return VirtualAlloc(nullptr, bytes, 0x3000, 0x04); }
inline void forbid_page(void* at) {
  unsigned long before;
  VirtualProtect(at, page_bytes(), 0x01, &before);
}
inline void unmap_pages(void* at, std::size_t) { VirtualFree(at, 0, 0x8000); }
#else
inline std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
inline void* map_pages(std::size_t size) {
  int kind = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_POPULATE)
  kind |= MAP_POPULATE;
#endif
  void* const at = mmap(nullptr, size, PROT_READ | PROT_WRITE, kind, -1, 0);
  return at == MAP_FAILED ? nullptr : at;
}
inline void forbid_page(void* at) { mprotect(at, page_bytes(), PROT_NONE); }
inline void unmap_pages(void* at, std::size_t size) { munmap(at, size); }
#endif

}  // namespace detail

/// Which end of a window lies at a forbidden page.
enum class guarded_end { front, back };

/// Room for at most `most` values, of which windows are handed out.
template <class T>
class guarded {
 public:
  explicit guarded(moeroute::index_t most)
      : page_(detail::page_bytes()),
        size_((static_cast<std::size_t>(most) * sizeof(T) / page_ + 1) * page_) {
    void* const all = detail::map_pages(size_ + 2 * page_);
    if (all == nullptr) throw std::bad_alloc();
    memory_ = static_cast<std::byte*>(all) + page_;
    detail::forbid_page(memory_ - page_);
    detail::forbid_page(memory_ + size_);
  }
  guarded(const guarded&) = delete;
  guarded& operator=(const guarded&) = delete;
  ~guarded() { detail::unmap_pages(memory_ - page_, size_ + 2 * page_); }

  /// n values that touch a forbidden page, poisoned: every byte is 0xff, a NaN as a float.
  T* window(moeroute::index_t n, guarded_end end) {
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(T);
    std::byte* const at = end == guarded_end::front ? memory_ : memory_ + size_ - bytes;
    if (bytes > 0) std::memset(at, 0xff, bytes);
    return reinterpret_cast<T*>(at);
  }

 private:
  std::size_t page_, size_;
  std::byte* memory_;
};

}  // namespace test
