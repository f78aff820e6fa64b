// Memory between two pages that nobody may touch: a read or write past either end stops the
// program.
#pragma once

#include <cstddef>
#include <cstring>
#include <moeroute/base/index.hpp>
#include <new>

#include "support/pages.hpp"

namespace test {

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
