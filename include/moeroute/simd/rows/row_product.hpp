// Products of a matrix and rows as they lie in memory: the other two of the three that a linear map
// needs for its backward pass.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/caches.hpp>
#include <moeroute/simd/rows/gemm.hpp>
#include <moeroute/simd/rows/rows.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

namespace detail {

// Rows per pass: a packed slice of them stays in the first-level cache, packed factors of a stripe
// of rows of `out` in the second.
template <class A>
inline constexpr index_t product_across = tile_registers<A> * width<A>;
inline constexpr index_t product_depth = 128;
inline constexpr index_t product_stripe = 144;

/// How a product's rows reach memory.
enum class product_store {
  written,
  first,     ///< written, and nothing was there to add to
  streamed,  ///< the same past the caches
};

// Rows of out whose sums are made in one pass and that are four second-level caches or more are
// streamed, if they are whole lines: 1.3 to 1.6 times as fast, and 1.3 together with a read of all
// of them. Stores to rows that are a power of two apart push one another out of the caches.
template <class A>
product_store product_store_of(index_t depth, const matrix_view<float>& out, sum_start start) {
  constexpr index_t line = alignment / index_t{sizeof(float)};
  if (start != sum_start::zero) return product_store::written;
  const bool streams = has_streaming_stores && product_across<A> % line == 0 &&
                       depth <= product_depth && out.stride % line == 0 &&
                       reinterpret_cast<std::uintptr_t>(out.data) % alignment == 0 &&
                       out.rows * out.cols * index_t{sizeof(float)} >= 4 * machine_caches().second;
  return streams ? product_store::streamed : product_store::first;
}

// m rows of out += packed factors, m per row of the slice, times a slice of rows.
template <class A, int m>
void product_tile(const float* MOEROUTE_RESTRICT a, const float* MOEROUTE_RESTRICT slice,
                  index_t slice_stride, index_t depth, float* out, index_t out_stride,
                  product_store store) {
  constexpr int w = width<A>, v = tile_registers<A>;
  const bool from_zero = store != product_store::written;
  vfloat<A> sum[m][v];
  MOEROUTE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j)
      sum[r][j] =
          from_zero ? vfloat<A>(0.0f) : vfloat<A>::load_unaligned(out + r * out_stride + j * w);
  }
  for (index_t i = 0; i < depth; ++i, a += m, slice += slice_stride) {
    vfloat<A> x[v];
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j) x[j] = vfloat<A>::load_unaligned(slice + j * w);
    MOEROUTE_UNROLL
    for (int r = 0; r < m; ++r) {
      const vfloat<A> factor(a[r]);
      MOEROUTE_UNROLL
      for (int j = 0; j < v; ++j) sum[r][j] = multiply_add<A>(factor, x[j], sum[r][j]);
    }
  }
  if (store == product_store::streamed) {
    MOEROUTE_UNROLL
    for (int r = 0; r < m; ++r) {
      MOEROUTE_UNROLL
      for (int j = 0; j < v; ++j) stream<A>(out + r * out_stride + j * w, sum[r][j]);
    }
    return;
  }
  MOEROUTE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j) sum[r][j].store_unaligned(out + r * out_stride + j * w);
  }
}

// The same where only n rows and `cols` columns are there.
template <class A, int m>
void product_part(const float* a, const float* slice, index_t slice_stride, index_t depth,
                  float* out, index_t out_stride, product_store store, index_t n, index_t cols) {
  constexpr index_t across = product_across<A>;
  if (n == m && cols == across)
    return product_tile<A, m>(a, slice, slice_stride, depth, out, out_stride, store);
  alignas(alignment) float whole[m * across] = {};
  for (index_t r = 0; r < n; ++r) std::copy_n(out + r * out_stride, cols, whole + r * across);
  if (store == product_store::streamed) store = product_store::first;
  product_tile<A, m>(a, slice, slice_stride, depth, whole, across, store);
  for (index_t r = 0; r < n; ++r) std::copy_n(whole + r * across, cols, out + r * out_stride);
}

// What a product reads: a(r, i) of `rows` rows and depth columns.
struct product_factor {
  const float* data;
  index_t row_step, depth_step, rows, depth;
};

// Rows of a tile that begins with `left` rows to go: few are padded to a small one.
constexpr index_t product_rows_of(index_t left) { return left >= tile_rows ? tile_rows : 2; }

// The factors of a tile of m rows, of which n are there, in the order in which it reads them. What
// stands for the others is no matter: nothing of it reaches `out`. May write a register past the
// end.
template <class A, int m>
void pack_factors(const float* from, index_t row_step, index_t depth_step, index_t n, index_t depth,
                  float* to) {
  constexpr int w = width<A>;
  if (row_step == 1 && n == m) {
    for (index_t i = 0; i < depth; ++i, from += depth_step, to += m) std::copy_n(from, m, to);
    return;
  }
  if (depth_step != 1) {
    for (index_t i = 0; i < depth; ++i)
      for (index_t q = 0; q < m; ++q)
        to[i * m + q] = q < n ? from[q * row_step + i * depth_step] : 0.0f;
    return;
  }
  for (int q = 0; q < m; q += w) {
    const float* row[w];
    for (int r = 0; r < w; ++r) row[r] = from + std::min<index_t>(q + r, n - 1) * row_step;
    for (index_t i = 0; i < depth; i += w) {
      vfloat<A> x[w];
      load_transposed<A>(row, i, depth, 0.0f, x);
      for (index_t j = 0; j < std::min<index_t>(w, depth - i); ++j) {
        // What runs over into the next row's factors comes before them.
        float* const at = to + (i + j) * m + q;
        if (q == 0 || q + w <= m) {
          x[j].store_unaligned(at);
        } else {
          store_first<A>(at, m - q, x[j]);
        }
      }
    }
  }
}

// `depth` rows of cols columns, widened, the rest of a slice's width 0.
template <class A, class T>
void pack_slice(const T* from, index_t stride, index_t depth, index_t cols, float* to) {
  constexpr index_t w = width<A>, across = product_across<A>;
  for (index_t i = 0; i < depth; ++i, from += stride, to += across) {
    if (cols == across) {
      MOEROUTE_UNROLL
      for (int j = 0; j < tile_registers<A>; ++j)
        load_wide<A>(from + j * w).store_aligned(to + j * w);
    } else {
      for (index_t c = 0; c < across; ++c) to[c] = c < cols ? static_cast<float>(from[c]) : 0.0f;
    }
  }
}

// The rows [row, row_end) of out, a stripe at most, at the columns [col, col_end).
template <class A, class T>
void product_block(const product_factor& a, const matrix_view<const T>& rows,
                   const matrix_view<float>& out, product_store store, index_t row, index_t row_end,
                   index_t col, index_t col_end) {
  constexpr int most = tile_rows;
  constexpr index_t across = product_across<A>;
  alignas(alignment) float packed[(product_stripe + most) * product_depth + block_rows];
  alignas(alignment) float slice[product_depth * across];
  if (a.depth == 0 && store != product_store::written)
    for (index_t r = row; r < row_end; ++r)
      std::fill_n(out.data + r * out.stride + col, col_end - col, 0.0f);
  for (index_t first = 0; first < a.depth; first += product_depth) {
    const index_t depth = std::min(product_depth, a.depth - first);
    if (first > 0) store = product_store::written;
    float* into = packed;
    for (index_t r = row; r < row_end;) {
      const index_t m = product_rows_of(row_end - r), n = std::min(m, row_end - r);
      const float* const from = a.data + r * a.row_step + first * a.depth_step;
      if (m == most) {
        pack_factors<A, most>(from, a.row_step, a.depth_step, n, depth, into);
      } else {
        pack_factors<A, 2>(from, a.row_step, a.depth_step, n, depth, into);
      }
      into += m * depth;
      r += n;
    }
    for (index_t c = col; c < col_end; c += across) {
      const index_t cols = std::min(across, col_end - c);
      const float* x = slice;
      index_t x_stride = across;
      if (std::is_same_v<T, float> && row_end - row <= most && cols == across) {
        // Read once: as it lies.
        x = reinterpret_cast<const float*>(rows.data + first * rows.stride + c);
        x_stride = rows.stride;
      } else {
        pack_slice<A>(rows.data + first * rows.stride + c, rows.stride, depth, cols, slice);
      }
      // Of rows that are far apart no hardware fetches the next slice: its lines come while this
      // one is multiplied, some with each tile.
      const bool more = c + across < col_end;
      const index_t next_first = more ? first : first + product_depth;
      const T* next = rows.data + next_first * rows.stride + (more ? c + across : col);
      index_t to_fetch = std::clamp<index_t>(a.depth - next_first, 0, product_depth);
      const index_t with_each = ceil_div(to_fetch, ceil_div(row_end - row, tile_rows));
      const float* factor = packed;
      for (index_t r = row; r < row_end;) {
        const index_t m = product_rows_of(row_end - r), n = std::min(m, row_end - r);
        float* const to = out.data + r * out.stride + c;
        for (index_t i = std::min(with_each, to_fetch); i > 0; --i, --to_fetch, next += rows.stride)
          for (index_t line = 0; line < across; line += alignment / index_t{sizeof(T)})
            MOEROUTE_PREFETCH_TO_SECOND(next + line);
        // What the next tile will add to is on its way while this one is computed.
        const index_t ahead = store == product_store::streamed ? 0 : most;
        for (index_t q = r + n; q < std::min(row_end, r + n + ahead); ++q)
          for (index_t line = 0; line < cols; line += alignment / index_t{sizeof(float)})
            MOEROUTE_PREFETCH_TO_WRITE(out.data + q * out.stride + c + line);
        if (m == most) {
          product_part<A, most>(factor, x, x_stride, depth, to, out.stride, store, n, cols);
        } else {
          product_part<A, 2>(factor, x, x_stride, depth, to, out.stride, store, n, cols);
        }
        factor += m * depth;
        r += n;
      }
    }
  }
  if (store == product_store::streamed) stream_fence();
}

template <class A, class T, executor Exec>
void product(const product_factor& a, const matrix_view<const T>& rows,
             const matrix_view<float>& out, sum_start start, const Exec& exec) {
  constexpr index_t across = product_across<A>, tile = tile_rows;
  // Stripes of about equal height; a piece of work is 2^18 multiply-adds or more, and so wide that
  // packing the factors is little of it.
  const index_t stripe =
      round_up(ceil_div(out.rows, std::max<index_t>(1, ceil_div(out.rows, product_stripe))), tile);
  const index_t slices = ceil_div(out.cols, across),
                stripes = ceil_div(out.rows, std::max<index_t>(1, stripe));
  const index_t cost = std::max<index_t>(1, std::min(out.rows, stripe) * across * a.depth);
  const product_store store = product_store_of<A>(a.depth, out, start);
  exec.parallel_for(stripes * slices, std::max<index_t>(8, (index_t{1} << 18) / cost),
                    [&](index_t begin, index_t end) {
                      while (begin < end) {
                        const index_t s = begin / slices, last = std::min(end, (s + 1) * slices);
                        product_block<A>(a, rows, out, store, s * stripe,
                                         std::min(out.rows, (s + 1) * stripe),
                                         (begin - s * slices) * across,
                                         std::min(out.cols, (last - s * slices) * across));
                        begin = last;
                      }
                    });
}

template <class T, class U>
void check_product(const char* where, const product_factor& f, const matrix_view<const T>& a,
                   const matrix_view<const U>& rows, const matrix_view<T>& out) {
  check_size(where, "rows.rows()", rows.rows, f.depth);
  check_size(where, "out.rows()", out.rows, f.rows);
  check_size(where, "out.cols()", out.cols, rows.cols);
  check_stride(where, "a", a);
  check_stride(where, "rows", rows);
  check_stride(where, "out", out);
  check_apart(where, "a", a, "out", out);
  check_apart(where, "rows", rows, "out", out);
}

}  // namespace detail

/// out[r] = start + the sum, in the order of i, of a(r, i) * rows[i].
///
/// Shapes: a [R, n], rows [n, d] in float, bfloat16 or float16, out [R, d] in float.
/// Throws: error where the shapes do not fit, rows run into one another or out shares memory with
/// the others. Cost: R n d
/// multiply-adds, no allocation. Determinism: an element is one chain of multiply-adds, whatever
/// the executor; it may differ in the last bits between ISAs.
template <class A = default_arch, storage T, executor Exec = serial>
void multiply_rows(const matrix_view<const float>& a, const matrix_view<const T>& rows,
                   const matrix_view<float>& out, sum_start start, const Exec& exec = {}) {
  const detail::product_factor f{a.data, a.stride, 1, a.rows, a.cols};
  detail::check_product("multiply_rows", f, a, rows, out);
  detail::product<A>(f, rows, out, start, exec);
}

/// out[r] = start + the sum, in the order of i, of a(i, r) * rows[i].
///
/// Shapes: a [n, R], the others as for multiply_rows(), and so is all else.
template <class A = default_arch, storage T, executor Exec = serial>
void multiply_transposed(const matrix_view<const float>& a, const matrix_view<const T>& rows,
                         const matrix_view<float>& out, sum_start start, const Exec& exec = {}) {
  const detail::product_factor f{a.data, 1, a.stride, a.cols, a.rows};
  detail::check_product("multiply_transposed", f, a, rows, out);
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
