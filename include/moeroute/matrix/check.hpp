// What a stage checks about the matrices it is given: strides, and that output is not input.
#pragma once

#include <cstdint>

#include <moeroute/base/error.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

namespace detail {

// What check_stride has no quick answer to.
MOEROUTE_COLD inline void check_layout(const char* where, const char* what, index_t rows,
                                       index_t cols, index_t stride, index_t value_bytes) {
  if (rows > 1 && stride < cols)
    fail(where, {what, ".stride is ", stride, ", expected at least ", cols});
  const index_t last = rows > 1 ? size_product(rows - 1, stride) : 0;
  if (rows < 0 || cols < 0 || cols > max_bytes || last > max_bytes - cols ||
      (rows > 0 && size_product(last + cols, value_bytes) > max_bytes))
    fail(where, {what, " of ", rows, " x ", cols, " values with stride ", stride,
                 " is no matrix that memory holds"});
}

[[noreturn]] MOEROUTE_COLD inline void fail_overlap(const char* where, const char* a,
                                                    const char* b) {
  fail(where, {a, " and ", b, " overlap, expected memory of their own"});
}

// A matrix as bytes. Addresses are numbers: those of two arrays may be compared.
struct byte_rows {
  std::uintptr_t begin;
  index_t row_bytes, stride_bytes, rows;

  template <class T>
  explicit byte_rows(const matrix_view<T>& m)
      : begin(reinterpret_cast<std::uintptr_t>(m.data)),
        row_bytes(m.cols * static_cast<index_t>(sizeof(T))),
        stride_bytes((m.rows > 1 ? m.stride : m.cols) * static_cast<index_t>(sizeof(T))),
        rows(m.rows) {}

  bool empty() const { return rows == 0 || row_bytes == 0; }
  std::uintptr_t end() const {
    return begin + static_cast<std::uintptr_t>((rows - 1) * stride_bytes + row_bytes);
  }
};

inline bool share_bytes(const byte_rows& a, const byte_rows& b) {
  if (a.empty() || b.empty() || a.begin >= b.end() || b.begin >= a.end()) return false;
  if (a.stride_bytes != b.stride_bytes || a.stride_bytes == 0 || a.rows == 1 || b.rows == 1)
    return true;
  // Columns of one matrix side by side: the rows interleave, the bytes need not meet.
  // Signed before it is taken: an address of 32 bits would wrap.
  const index_t apart =
      (static_cast<index_t>(b.begin) - static_cast<index_t>(a.begin)) % a.stride_bytes;
  const index_t shift = apart < 0 ? apart + a.stride_bytes : apart;
  return shift < a.row_bytes || shift + b.row_bytes > a.stride_bytes;
}

MOEROUTE_OUT_OF_LINE inline void check_bytes_apart(const char* where, const char* a_name,
                                                   const byte_rows& a, const char* b_name,
                                                   const byte_rows& b) {
  if (share_bytes(a, b)) [[unlikely]]
    fail_overlap(where, a_name, b_name);
}

}  // namespace detail

/// Throws error where rows would run into one another, or end past what an address reaches.
template <class T>
void check_stride(const char* where, const char* what, const matrix_view<T>& m) {
  constexpr int quick = sizeof(void*) < 8 ? 13 : 26;  // the product of two such sizes is in reach
  if ((((m.rows | m.cols | m.stride) >> quick) | ((m.rows > 1) & (m.stride < m.cols))) != 0)
      [[unlikely]]
    detail::check_layout(where, what, m.rows, m.cols, m.stride, sizeof(T));
}

/// Whether two matrices share memory. Two column ranges of one matrix do not.
template <class T, class U>
bool overlap(const matrix_view<T>& a, const matrix_view<U>& b) {
  return detail::share_bytes(detail::byte_rows(a), detail::byte_rows(b));
}

/// Throws error where two matrices share memory.
template <class T, class U>
void check_apart(const char* where, const char* a_name, const matrix_view<T>& a, const char* b_name,
                 const matrix_view<U>& b) {
  detail::check_bytes_apart(where, a_name, detail::byte_rows(a), b_name, detail::byte_rows(b));
}

/// Throws error where two matrices share memory and are not the same one, element by element.
template <class T, class U>
void check_apart_or_same(const char* where, const char* a_name, const matrix_view<T>& a,
                         const char* b_name, const matrix_view<U>& b) {
  const bool same = static_cast<const void*>(a.data) == static_cast<const void*>(b.data) &&
                    sizeof(T) == sizeof(U) && (a.rows <= 1 || a.stride == b.stride);
  if (!same) check_apart(where, a_name, a, b_name, b);
}

}  // namespace moeroute
