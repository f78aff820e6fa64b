// The door to Eigen: matrix views, and the 16-bit storage types.
#pragma once

#include <Eigen/Core>
#include <concepts>
#include <ranges>
#include <span>
#include <type_traits>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// 16-bit storage types: hidden states and logits are kept in them and widened to float once.
using bfloat16 = Eigen::bfloat16;
using float16 = Eigen::half;

/// float, bfloat16 or float16.
template <class T>
concept storage = std::is_same_v<std::remove_const_t<T>, float> ||
                  std::is_same_v<std::remove_const_t<T>, bfloat16> ||
                  std::is_same_v<std::remove_const_t<T>, float16>;

/// A row-major matrix that somebody else owns: one token (or slot, or expert) per row.
///
/// Shapes: element (r, c) is data[r * stride + c]; stride >= cols.
/// Stages take one of these, or anything that view() turns into one.
template <class T>
struct matrix_view {
  T* data = nullptr;
  index_t rows = 0;
  index_t cols = 0;
  index_t stride = 0;

  matrix_view() = default;
  matrix_view(T* d, index_t r, index_t c) : matrix_view(d, r, c, c) {}
  matrix_view(T* d, index_t r, index_t c, index_t s) : data(d), rows(r), cols(c), stride(s) {
    MOEROUTE_EXPECTS(r >= 0 && c >= 0 && (s >= c || r <= 1));
  }

  /// A read-only view of a writable one.
  template <class U>
    requires(std::is_same_v<T, const U> && !std::is_same_v<T, U>)
  matrix_view(const matrix_view<U>& v)
      : data(v.data), rows(v.rows), cols(v.cols), stride(v.stride) {}  // whoever reads it checks it

  T* row(index_t r) const {
    MOEROUTE_EXPECTS(r >= 0 && r < rows);
    return data + r * stride;
  }
  T& operator()(index_t r, index_t c) const { return row(r)[c]; }

  /// Rows [first, first + n).
  matrix_view middle_rows(index_t first, index_t n) const {
    MOEROUTE_EXPECTS(first >= 0 && n >= 0 && first + n <= rows);
    return {data + first * stride, n, cols, stride};
  }
};

namespace detail {

template <class M>
inline constexpr bool is_matrix_view = false;
template <class T>
inline constexpr bool is_matrix_view<matrix_view<T>> = true;

template <class M>
concept eigen_rows = requires(M& m) {
  { m.data() };
  { m.outerStride() } -> std::convertible_to<index_t>;
  { m.innerStride() } -> std::convertible_to<index_t>;
  { std::remove_cvref_t<M>::IsRowMajor };
};

// Whether a temporary M takes its values with it when it goes.
template <class M>
inline constexpr bool owns_values = !std::ranges::borrowed_range<M>;
template <detail::eigen_rows M>
inline constexpr bool owns_values<M> = std::derived_from<M, Eigen::PlainObjectBase<M>>;
template <class T>
inline constexpr bool owns_values<matrix_view<T>> = false;

}  // namespace detail

/// A matrix_view of a row-major Eigen matrix, map, ref or block; of a std::span (one row); or the
/// view itself. Read-only where m is; a temporary that owns its values is refused.
template <class M>
  requires(detail::is_matrix_view<std::remove_cvref_t<M>> || detail::eigen_rows<M> ||
           requires(M& m) { std::span(m); })
auto view(M&& m) {
  using type = std::remove_cvref_t<M>;
  static_assert(std::is_lvalue_reference_v<M> || !detail::owns_values<type>,
                "[moeroute::view] a temporary would dangle: give the matrix a name");
  if constexpr (detail::is_matrix_view<type>) {
    return m;
  } else if constexpr (detail::eigen_rows<M>) {
    static_assert(type::IsRowMajor || type::ColsAtCompileTime == 1,
                  "[moeroute::view] rows must be contiguous: use Eigen::RowMajor");
    static_assert(type::InnerStrideAtCompileTime == 1,
                  "[moeroute::view] rows must be contiguous: the inner stride must be 1");
    // A column vector's outer stride is its length; its rows are one element apart.
    const index_t stride = type::IsRowMajor ? index_t{m.outerStride()} : index_t{1};
    return matrix_view(m.data(), m.rows(), m.cols(), m.rows() > 1 ? stride : m.cols());
  } else {
    const std::span row(m);
    return matrix_view(row.data(), 1, static_cast<index_t>(row.size()));
  }
}

/// A read-only matrix_view of what view() accepts; of a temporary, until the statement ends.
template <class M>
  requires requires(const M& m) { view(m); }
auto const_view(const M& m) {
  const auto v = view(m);
  return matrix_view<const std::remove_pointer_t<decltype(v.data)>>(v);
}

/// What a stage reads: rows of float, bfloat16 or float16.
template <class M>
concept readable_rows = requires(const M& m) {
  { const_view(m) };
} && storage<std::remove_pointer_t<decltype(const_view(std::declval<const M&>()).data)>>;

/// What a stage writes.
template <class M>
concept writable_rows = readable_rows<std::remove_cvref_t<M>> && requires(M& m) {
  requires !std::is_const_v<std::remove_pointer_t<decltype(view(m).data)>>;
};

/// The element type of what view() accepts, without const.
template <class M>
using element_of =
    std::remove_const_t<std::remove_pointer_t<decltype(view(std::declval<M&>()).data)>>;

/// A row-major Eigen matrix: what the views like best.
template <class T>
using row_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace moeroute
