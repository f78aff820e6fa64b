// Products of a matrix and rows as they lie in memory: the other two of the three that a linear map
// needs for its backward pass.
#pragma once

#include <algorithm>
#include <type_traits>

#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/rows/gemm.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute::simd {

namespace detail {

// Rows per pass: a packed slice of them stays in the first-level cache.
inline constexpr index_t product_depth = 96;

// m rows of out += m rows of a times a packed slice of v registers; a(r, i) is at
// a[r * row_step + i * depth_step].
template <class A, int v, int m>
void product_tile(const float* a, index_t row_step, index_t depth_step, const float* slice,
                  index_t depth, float* out, index_t out_stride, index_t cols, bool from_zero) {
  constexpr int w = width<A>;
  vfloat<A> sum[m][v];
  MOEROUTE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j)
      sum[r][j] = from_zero ? vfloat<A>(0.0f)
                            : load_first<A>(out + r * out_stride + j * w,
                                            std::clamp<index_t>(cols - j * w, 0, w), 0.0f);
  }
  for (index_t i = 0; i < depth; ++i, slice += v * w) {
    vfloat<A> x[v];
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j) x[j] = vfloat<A>::load_aligned(slice + j * w);
    MOEROUTE_UNROLL
    for (int r = 0; r < m; ++r) {
      const vfloat<A> factor(a[r * row_step + i * depth_step]);
      MOEROUTE_UNROLL
      for (int j = 0; j < v; ++j) sum[r][j] = multiply_add<A>(factor, x[j], sum[r][j]);
    }
  }
  MOEROUTE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j)
      store_first<A>(out + r * out_stride + j * w, std::clamp<index_t>(cols - j * w, 0, w),
                     sum[r][j]);
  }
}

// What a product reads: a(r, i) of `rows` rows and depth columns.
struct product_factor {
  const float* data;
  index_t row_step, depth_step, rows, depth;
};

// The rows [row, row_end) of out at the columns [c, c + cols), at most a tile's width of them.
template <class A, class T>
void product_block(const product_factor& a, const matrix_view<const T>& rows,
                   const matrix_view<float>& out, sum_start start, index_t row, index_t row_end,
                   index_t c, index_t cols) {
  constexpr int v = tile_registers<A>, most = tile_rows;
  constexpr index_t across = v * width<A>;
  alignas(alignment) float slice[product_depth * across];
  if (a.depth == 0 && start == sum_start::zero)
    for (index_t r = row; r < row_end; ++r) std::fill_n(out.data + r * out.stride + c, cols, 0.0f);
  for (index_t first = 0; first < a.depth; first += product_depth) {
    const index_t depth = std::min(product_depth, a.depth - first);
    for (index_t i = 0; i < depth; ++i) {
      convert_row<A>(rows.data + (first + i) * rows.stride + c, cols, slice + i * across);
      std::fill_n(slice + i * across + cols, across - cols, 0.0f);
    }
    const bool from_zero = first == 0 && start == sum_start::zero;
    const auto tile = [&]<int m>(std::integral_constant<int, m>, index_t r) {
      product_tile<A, v, m>(a.data + r * a.row_step + first * a.depth_step, a.row_step,
                            a.depth_step, slice, depth, out.data + r * out.stride + c, out.stride,
                            cols, from_zero);
    };
    index_t r = row;
    for (; r + most <= row_end; r += most) tile(std::integral_constant<int, most>{}, r);
    for (; r + 2 <= row_end; r += 2) tile(std::integral_constant<int, 2>{}, r);
    if (r < row_end) tile(std::integral_constant<int, 1>{}, r);
  }
}

template <class A, class T, executor Exec>
void product(const product_factor& a, const matrix_view<const T>& rows,
             const matrix_view<float>& out, sum_start start, const Exec& exec) {
  constexpr index_t across = tile_registers<A> * width<A>, stripe = 16 * tile_rows;
  const index_t slices = ceil_div(out.cols, across), stripes = ceil_div(out.rows, stripe);
  // A piece of work: 2^18 multiply-adds or more.
  const index_t cost = std::max<index_t>(1, std::min(out.rows, stripe) * across * a.depth);
  exec.parallel_for(stripes * slices, std::max<index_t>(1, (index_t{1} << 18) / cost),
                    [&](index_t begin, index_t end) {
                      for (index_t i = begin; i < end; ++i) {
                        const index_t r = i / slices * stripe, c = i % slices * across;
                        product_block<A>(a, rows, out, start, r, std::min(out.rows, r + stripe), c,
                                         std::min(across, out.cols - c));
                      }
                    });
}

inline void check_product(const char* where, const product_factor& a, index_t rows, index_t cols,
                          index_t out_rows, index_t out_cols) {
  check_size(where, "rows.rows()", rows, a.depth);
  check_size(where, "out.rows()", out_rows, a.rows);
  check_size(where, "out.cols()", out_cols, cols);
}

}  // namespace detail

/// out[r] = start + the sum, in the order of i, of a(r, i) * rows[i].
///
/// Shapes: a [R, n], rows [n, d] in float, bfloat16 or float16, out [R, d] in float.
/// Throws: error where the shapes do not fit or out shares memory with the others. Cost: R n d
/// multiply-adds, no allocation. Determinism: an element is one chain of multiply-adds, whatever
/// the executor; it may differ in the last bits between ISAs.
template <class A = default_arch, storage T, executor Exec = serial>
void multiply_rows(const matrix_view<const float>& a, const matrix_view<const T>& rows,
                   const matrix_view<float>& out, sum_start start, const Exec& exec = {}) {
  const detail::product_factor f{a.data, a.stride, 1, a.rows, a.cols};
  detail::check_product("multiply_rows", f, rows.rows, rows.cols, out.rows, out.cols);
  check_apart("multiply_rows", "a", a, "out", out);
  check_apart("multiply_rows", "rows", rows, "out", out);
  detail::product<A>(f, rows, out, start, exec);
}

/// out[r] = start + the sum, in the order of i, of a(i, r) * rows[i].
///
/// Shapes: a [n, R], the others as for multiply_rows(), and so is all else.
template <class A = default_arch, storage T, executor Exec = serial>
void multiply_transposed(const matrix_view<const float>& a, const matrix_view<const T>& rows,
                         const matrix_view<float>& out, sum_start start, const Exec& exec = {}) {
  const detail::product_factor f{a.data, 1, a.stride, a.cols, a.rows};
  detail::check_product("multiply_transposed", f, rows.rows, rows.cols, out.rows, out.cols);
  check_apart("multiply_transposed", "a", a, "out", out);
  check_apart("multiply_transposed", "rows", rows, "out", out);
  detail::product<A>(f, rows, out, start, exec);
}

/// Both in double, by plain loops: for tests of gradients.
template <class A = default_arch, executor Exec = serial>
void multiply_rows(const matrix_view<const double>& a, const matrix_view<const double>& rows,
                   const matrix_view<double>& out, sum_start start, const Exec& = {}) {
  for (index_t r = 0; r < out.rows; ++r) {
    if (start == sum_start::zero) std::fill_n(out.row(r), out.cols, 0.0);
    for (index_t i = 0; i < rows.rows; ++i)
      for (index_t c = 0; c < out.cols; ++c) out(r, c) += a(r, i) * rows(i, c);
  }
}
template <class A = default_arch, executor Exec = serial>
void multiply_transposed(const matrix_view<const double>& a, const matrix_view<const double>& rows,
                         const matrix_view<double>& out, sum_start start, const Exec& = {}) {
  for (index_t r = 0; r < out.rows; ++r) {
    if (start == sum_start::zero) std::fill_n(out.row(r), out.cols, 0.0);
    for (index_t i = 0; i < rows.rows; ++i)
      for (index_t c = 0; c < out.cols; ++c) out(r, c) += a(i, r) * rows(i, c);
  }
}

}  // namespace moeroute::simd
