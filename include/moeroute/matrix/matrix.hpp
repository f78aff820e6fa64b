// Matrices that somebody else owns: what the stages take, and how other libraries' become one.
#pragma once

#include <concepts>
#include <span>
#include <type_traits>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/matrix/storage.hpp>

namespace moeroute {

/// A row-major matrix that somebody else owns: one token (or slot, or expert) per row.
///
/// Shapes: element (r, c) is data[r * stride + c]; stride >= cols.
/// Stages take one of these, or anything that view() turns into one.
/// Example:
///
///     std::vector<float> memory(64 * 72);                        // 64 rows of 72 floats, of which
///     const matrix_view<float> rows(memory.data(), 64, 70, 72);  // 70 are used
template <class T>
struct matrix_view {
  T* data = nullptr;
  index_t rows = 0;
  index_t cols = 0;
  index_t stride = 0;

  matrix_view() = default;
  matrix_view(T* d, index_t r, index_t c) : matrix_view(d, r, c, c) {}
  matrix_view(T* d, index_t r, index_t c, index_t s) : data(d), rows(r), cols(c), stride(s) {
    MOEROUTE_EXPECTS(r >= 0 && c >= 0);  // every stage refuses a stride too small, by its name
  }

  /// A read-only view of a writable one.
  template <class U>
    requires(std::is_same_v<T, const U> && !std::is_same_v<T, U>)
  matrix_view(const matrix_view<U>& v)
      : data(v.data), rows(v.rows), cols(v.cols), stride(v.stride) {}

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

// Eigen's matrices, maps, refs and blocks, without a look at Eigen.
template <class M>
concept strided_rows = requires(M& m) {
  { m.data() };
  { m.rows() } -> std::convertible_to<index_t>;
  { m.cols() } -> std::convertible_to<index_t>;
  { m.outerStride() } -> std::convertible_to<index_t>;
  { m.innerStride() } -> std::convertible_to<index_t>;
  { std::remove_cvref_t<M>::IsRowMajor };
};

// Whether a temporary M takes its values with it when it goes.
template <class M>
inline constexpr bool owns_values = !std::ranges::borrowed_range<M>;
template <detail::strided_rows M>
inline constexpr bool owns_values<M> = requires(M& m) { m.conservativeResize(1, 1); };
template <class T>
inline constexpr bool owns_values<matrix_view<T>> = false;

template <class T>
auto* as_stored(T* p) {
  using type = typename stored_as<std::remove_const_t<T>>::type;
  static_assert(sizeof(type) == sizeof(T), "[moeroute::stored_as] another type of the same bits");
  using same = std::conditional_t<std::is_const_v<T>, const type, type>;
  if constexpr (std::is_same_v<same, T>) {
    return p;
  } else {
    return reinterpret_cast<same*>(p);
  }
}

}  // namespace detail

/// A matrix_view of a row-major Eigen matrix, map, ref or block (or what has their members); of a
/// std::span (one row); or the view itself. Read-only where m is; a temporary that owns its values
/// is refused.
template <class M>
  requires(detail::is_matrix_view<std::remove_cvref_t<M>> || detail::strided_rows<M> ||
           requires(M& m) { std::span(m); })
auto view(M&& m) {
  using type = std::remove_cvref_t<M>;
  static_assert(std::is_lvalue_reference_v<M> || !detail::owns_values<type>,
                "[moeroute::view] a temporary would dangle: give the matrix a name");
  if constexpr (detail::is_matrix_view<type>) {
    return matrix_view(detail::as_stored(m.data), m.rows, m.cols, m.stride);
  } else if constexpr (detail::strided_rows<M>) {
    static_assert(type::IsRowMajor || type::ColsAtCompileTime == 1,
                  "[moeroute::view] rows must be contiguous: use Eigen::RowMajor");
    static_assert(type::InnerStrideAtCompileTime == 1,
                  "[moeroute::view] rows must be contiguous: the inner stride must be 1");
    // A column vector's outer stride is its length; its rows are one element apart.
    const index_t stride = type::IsRowMajor ? index_t{m.outerStride()} : index_t{1};
    return matrix_view(detail::as_stored(m.data()), m.rows(), m.cols(),
                       m.rows() > 1 ? stride : m.cols());
  } else {
    const std::span row(m);
    return matrix_view(detail::as_stored(row.data()), 1, static_cast<index_t>(row.size()));
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

}  // namespace moeroute
