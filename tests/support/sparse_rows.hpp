// A view whose rows lie gigabytes apart.
#pragma once

#if defined(__linux__) && defined(__LP64__)

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace test {

using moeroute::index_t;
using moeroute::matrix_view;

// Rows far apart in address space of which only the rows themselves are memory: the rest is
// reserved without any right to it, which no limit on memory counts.
template <class T>
class sparse_rows {
 public:
  sparse_rows(index_t rows, index_t cols, index_t stride)
      : size_(static_cast<std::size_t>((rows - 1) * stride + cols) * sizeof(T)),
        at_(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)),
        rows_(static_cast<T*>(at_), rows, cols, stride) {
    if (at_ == MAP_FAILED) FAIL("no address space of " << size_ << " bytes");
    const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    for (index_t r = 0; r < rows; ++r) {
      const auto begin = reinterpret_cast<std::uintptr_t>(rows_.data + r * stride) / page * page;
      const auto end = reinterpret_cast<std::uintptr_t>(rows_.data + r * stride + cols);
      if (mprotect(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE) != 0)
        FAIL("no memory for row " << r);
    }
  }
  sparse_rows(const sparse_rows&) = delete;
  sparse_rows& operator=(const sparse_rows&) = delete;
  ~sparse_rows() { munmap(at_, size_); }

  const matrix_view<T>& view() const { return rows_; }

 private:
  std::size_t size_;
  void* at_;
  matrix_view<T> rows_;
};

}  // namespace test

#endif
