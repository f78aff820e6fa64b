// One call at three layouts: rows side by side, rows with a gap, rows that begin at cache lines.
// What takes cols for a stride, or one view's stride for another's, gives other values or writes a
// gap.
#pragma once

#include <algorithm>
#include <memory>
#include <moeroute/matrix/matrix.hpp>
#include <span>
#include <string>
#include <vector>

#include "support/guarded.hpp"

namespace test {

using moeroute::index_t;

/// How far apart rows lie. Every view of a call has a gap of another width.
enum class spacing { none, gaps, cache_lines };

/// The matrices of one call. Gaps and what no call has written are poisoned: every byte is 0xff, a
/// NaN as a float; 0x7f in the gaps between cache lines, a large number: there are kernels to which
/// NaN is nothing. Behind the last element of a matrix lies a page that nobody may touch.
class layout {
 public:
  explicit layout(spacing how) : how_(how) {}

  /// Values that the call reads.
  template <class T>
  moeroute::matrix_view<const T> in(std::span<const T> values, index_t rows, index_t cols) {
    return in_out(values, rows, cols);
  }
  template <class T>
  moeroute::matrix_view<const T> in(const std::vector<T>& values, index_t rows, index_t cols) {
    return in_out(std::span<const T>(values), rows, cols);
  }

  /// Values that the call reads and changes.
  template <class T>
  moeroute::matrix_view<T> in_out(std::span<const T> values, index_t rows, index_t cols) {
    const moeroute::matrix_view<T> view = out<T>(rows, cols);
    for (index_t r = 0; r < rows; ++r)
      for (index_t c = 0; c < cols; ++c)
        view(r, c) = values[static_cast<std::size_t>(r * cols + c)];
    return view;
  }
  template <class T>
  moeroute::matrix_view<T> in_out(const std::vector<T>& values, index_t rows, index_t cols) {
    return in_out(std::span<const T>(values), rows, cols);
  }

  /// Values that the call writes.
  template <class T>
  moeroute::matrix_view<T> out(index_t rows, index_t cols) {
    const auto number = static_cast<index_t>(kept_.size());
    constexpr auto line = static_cast<index_t>(64 / sizeof(T));
    const index_t stride = how_ == spacing::none   ? cols
                           : how_ == spacing::gaps ? cols + 3 + number
                                                   : ((cols + line - 1) / line + number) * line;
    constexpr auto size = static_cast<index_t>(sizeof(T));
    // Rows begin at cache lines only where the last one has its gap too.
    const index_t last = how_ == spacing::cache_lines ? stride : cols;
    const index_t bytes = rows == 0 ? 0 : ((rows - 1) * stride + last) * size;
    matrix m{std::make_shared<guarded<std::byte>>(bytes),
             nullptr,
             rows,
             cols * size,
             stride * size,
             bytes};
    m.data = m.memory->window(bytes, guarded_end::back);
    for (index_t b = 0; b < bytes; ++b)
      if (b % m.stride >= m.width) m.data[b] = poison();
    kept_.push_back(m);
    return {reinterpret_cast<T*>(m.data), rows, cols, stride};
  }

  /// What a call gave beside its views.
  template <class T>
  void result(std::span<T> values) {
    const auto bytes = std::as_bytes(values);
    results_.insert(results_.end(), bytes.begin(), bytes.end());
  }
  void result(double value) { result(std::span<const double>(&value, 1)); }

  /// The bytes of all rows and results, one after the other.
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> all = results_;
    for (const matrix& m : kept_)
      for (index_t r = 0; r < m.rows; ++r)
        all.insert(all.end(), m.data + r * m.stride, m.data + r * m.stride + m.width);
    return all;
  }

  /// Whether every gap is as it was.
  bool gaps_are_whole() const {
    for (const matrix& m : kept_)
      for (index_t r = 0; r < m.rows; ++r)
        for (index_t b = r * m.stride + m.width; b < std::min((r + 1) * m.stride, m.bytes); ++b)
          if (m.data[b] != poison()) return false;
    return true;
  }

 private:
  std::byte poison() const { return std::byte(how_ == spacing::cache_lines ? 0x7f : 0xff); }

  struct matrix {
    std::shared_ptr<guarded<std::byte>> memory;
    std::byte* data;
    index_t rows, width, stride, bytes;  // all but rows in bytes
  };
  spacing how_;
  std::vector<matrix> kept_;
  std::vector<std::byte> results_;
};

/// What differs in words where call(layout) is made at every layout; empty where nothing does.
template <class Call>
std::string differs_by_stride(const Call& call) {
  layout reference(spacing::none);
  call(reference);
  for (const spacing how : {spacing::gaps, spacing::cache_lines}) {
    layout other(how);
    call(other);
    const std::string name = how == spacing::gaps ? "gaps" : "cache lines";
    if (!other.gaps_are_whole()) return name + ": a gap was written";
    if (other.bytes() != reference.bytes()) return name + ": other values";
  }
  return "";
}

/// n normal numbers.
template <class T = float, class Random>
std::vector<T> numbers(Random& rng, index_t n) {
  std::vector<T> made;
  for (index_t i = 0; i < n; ++i) made.push_back(static_cast<T>(rng.normal()));
  return made;
}

}  // namespace test
