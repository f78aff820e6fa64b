// The dot product of two rows, and what backward passes over rows are made of, in float or double.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute::simd {

/// The sum of a[c] * b[c], widened from 16 bits where kept so: 16 strided partial sums of fused
/// multiply-adds joined in one fixed tree. Determinism: the same bits on every ISA.
template <class A = default_arch, storage S, storage T>
float row_dot(const S* a, const T* b, index_t n) {
  constexpr int w = width<A>, parts = partials<A>::n;
  partials<A> sum(0.0f);
  index_t c = 0;
  for (; c + block_rows <= n; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < parts; ++r)
      sum.part[r] = fma<A>(detail::load_wide<A>(a + c + r * w), detail::load_wide<A>(b + c + r * w),
                           sum.part[r]);
  }
  for (int r = 0; c < n; ++r, c += w) {
    alignas(alignment) float x[w] = {}, y[w] = {};
    for (index_t i = 0; i < std::min<index_t>(w, n - c); ++i) {
      x[i] = static_cast<float>(a[c + i]);
      y[i] = static_cast<float>(b[c + i]);
    }
    sum.part[r] = fma<A>(vfloat<A>::load_aligned(x), vfloat<A>::load_aligned(y), sum.part[r]);
  }
  return sum_of<A>(sum);
}

/// The same in double, from the first column to the last.
template <class A = default_arch>
double row_dot(const double* a, const double* b, index_t n) {
  double sum = 0.0;
  for (index_t c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}

namespace detail {

// Whether a row is scaled two registers at a time, by rounded_pairs().
template <class A, class From, class To>
inline constexpr bool scales_pairs =
    std::is_same_v<From, bfloat16> && std::is_same_v<To, bfloat16> && converts_sixteen<A>;

}  // namespace detail

/// dot[r] = row . rows[r] and out[r] = factor[r] * row, for R rows in one pass; past the caches
/// where `stream` says so.
///
/// The sums of several rows are independent: one alone waits for its own multiply-adds.
/// Requires: for streaming, what stream_bytes() does of every row of out. Determinism: the bits of
/// row_dot() and scale_row().
template <class A, int R, storage U, storage T, storage V>
void scale_and_dot_rows(const U* row, const T* const* rows, const float* factor, index_t n,
                        V* const* out, bool stream, float* dot) {
  constexpr int w = width<A>, parts = partials<A>::n;
  constexpr index_t chunk = 512;
  alignas(alignment) V made[R][chunk];
  vfloat<A> sum[R][parts];
  MOEROUTE_UNROLL
  for (int r = 0; r < R; ++r) {
    MOEROUTE_UNROLL
    for (int j = 0; j < parts; ++j) sum[r][j] = vfloat<A>(0.0f);
  }
  const index_t whole = n / block_rows * block_rows;
  for (index_t first = 0; first < whole; first += chunk) {
    const index_t m = std::min(chunk, whole - first);
    index_t c = 0;
    if constexpr (detail::scales_pairs<A, U, V>) {
      // Two registers of products are rounded into one; the dots want their columns in order.
      using bits = xsimd::batch<std::uint32_t, A>;
      for (; c + 2 * block_rows <= m; c += 2 * block_rows) {
        const U* const from = row + first + c;
        const bits pairs = bits::load_unaligned(reinterpret_cast<const std::uint32_t*>(from));
        const auto even = bits_as<float>(pairs << 16);
        const auto odd = bits_as<float>(pairs & bits(0xffff0000u));
        const vfloat<A> x = detail::load_wide<A>(from), y = detail::load_wide<A>(from + w);
        MOEROUTE_UNROLL
        for (int r = 0; r < R; ++r) {
          const T* const other = rows[r] + first + c;
          sum[r][0] = fma<A>(x, detail::load_wide<A>(other), sum[r][0]);
          sum[r][0] = fma<A>(y, detail::load_wide<A>(other + w), sum[r][0]);
          const vfloat<A> f(factor[r]);
          detail::rounded_pairs<A>(f * even, f * odd)
              .store_unaligned(
                  reinterpret_cast<std::uint32_t*>((stream ? made[r] : out[r] + first) + c));
        }
      }
    }
    for (; c < m; c += block_rows) {
      MOEROUTE_UNROLL
      for (int j = 0; j < parts; ++j) {
        const vfloat<A> x = detail::load_wide<A>(row + first + c + j * w);
        MOEROUTE_UNROLL
        for (int r = 0; r < R; ++r) {
          sum[r][j] = fma<A>(x, detail::load_wide<A>(rows[r] + first + c + j * w), sum[r][j]);
          detail::store_narrow<A>((stream ? made[r] : out[r] + first) + c + j * w,
                                  vfloat<A>(factor[r]) * x);
        }
      }
    }
    for (int r = 0; stream && r < R; ++r)
      stream_bytes<A>(reinterpret_cast<const std::byte*>(made[r]),
                      m * static_cast<index_t>(sizeof(V)),
                      reinterpret_cast<std::byte*>(out[r] + first));
  }
  for (int r = 0; r < R; ++r) {
    scale_row<A>(row + whole, factor[r], n - whole, out[r] + whole);
    partials<A> total(0.0f);
    for (int j = 0; j < parts; ++j) total.part[j] = sum[r][j];
    for (index_t c = whole, j = 0; c < n; ++j, c += w) {
      alignas(alignment) float x[w] = {}, y[w] = {};
      for (index_t i = 0; i < std::min<index_t>(w, n - c); ++i) {
        x[i] = static_cast<float>(row[c + i]);
        y[i] = static_cast<float>(rows[r][c + i]);
      }
      total.part[j] = fma<A>(vfloat<A>::load_aligned(x), vfloat<A>::load_aligned(y), total.part[j]);
    }
    dot[r] = sum_of<A>(total);
  }
}

/// to[c] = factor * from[c] in double.
template <class A = default_arch>
void scale_row(const double* from, double factor, index_t n, double* to) {
  for (index_t c = 0; c < n; ++c) to[c] = factor * from[c];
}

/// to[c] += factor * from[c].
template <class A = default_arch, storage From>
void add_scaled_row(const From* from, float factor, index_t n, float* to) {
  sum_of_rows<A>(n, to, sum_start::output, [&](auto& sum) { sum(from, factor); });
}
template <class A = default_arch>
void add_scaled_row(const double* from, double factor, index_t n, double* to) {
  for (index_t c = 0; c < n; ++c) to[c] += factor * from[c];
}

}  // namespace moeroute::simd
