// Memory between two pages that nobody may touch: a read or write past either end stops the
// program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <moeroute/base/index.hpp>
#include <new>

namespace test {

/// Which end of a window lies at a forbidden page.
enum class guarded_end { front, back };

/// Room for at most `most` values, of which windows are handed out.
template <class T>
class guarded {
 public:
  explicit guarded(moeroute::index_t most)
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        size_((static_cast<std::size_t>(most) * sizeof(T) / page_ + 1) * page_) {
    void* const all = mmap(nullptr, size_ + 2 * page_, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<std::byte*>(all) + page_;
    mprotect(memory_ - page_, page_, PROT_NONE);
    mprotect(memory_ + size_, page_, PROT_NONE);
  }
  guarded(const guarded&) = delete;
  guarded& operator=(const guarded&) = delete;
  ~guarded() { munmap(memory_ - page_, size_ + 2 * page_); }

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
