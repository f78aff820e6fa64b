// Pages of memory, some of which nobody may touch.
#pragma once

#if !defined(_WIN32)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>

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

/// Which end of memory lies at a forbidden page.
enum class guarded_end { front, back };

}  // namespace test
