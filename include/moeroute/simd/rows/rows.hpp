// Rows of hidden states: copy, widen, narrow, scale, and the weighted sum of several rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/rows/convert.hpp>

namespace moeroute::simd {

/// to[i] = from[i], widened or narrowed (nearest, ties to even) where the types differ.
template <class A = default_arch, storage From, storage To>
void convert_row(const From* from, index_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    if (n > 0) std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(To));
  } else {
    index_t i = 0;
    for (; i + width<A> <= n; i += width<A>)
      detail::store_narrow<A>(to + i, detail::load_wide<A>(from + i));
    for (; i < n; ++i) to[i] = detail::narrowed<A, To>(static_cast<float>(from[i]));
  }
}

/// to[i] = factor * from[i] in float, rounded once to To.
template <class A = default_arch, storage From, storage To>
void scale_row(const From* from, float factor, index_t n, To* to) {
  const vfloat<A> f(factor);
  index_t i = 0;
  for (; i + width<A> <= n; i += width<A>)
    detail::store_narrow<A>(to + i, f * detail::load_wide<A>(from + i));
  for (; i < n; ++i) to[i] = detail::narrowed<A, To>(factor * static_cast<float>(from[i]));
}

/// Copies n bytes through the caches. The lines that will be written are fetched a little ahead,
/// and at the end those at `next`, where the next copy of as many bytes goes (null where nobody
/// knows): written cold, a line is waited for. `distant`: most of them are further away than the
/// second-level cache, into which they come a page ahead.
MOEROUTE_OUT_OF_LINE inline void copy_ahead(const std::byte* from, index_t n, std::byte* to,
                                            const std::byte* next, bool distant = false) {
  constexpr index_t line = alignment, ahead = 16 * line, page = 64 * line;
  const index_t lines = n / line * line;
  index_t i = 0;
  const auto copy = [&](index_t end, const std::byte* soon, index_t soon_by, const std::byte* later,
                        index_t later_by) {
    for (; i < end; i += line) {
      if (soon != nullptr) MOEROUTE_PREFETCH_TO_WRITE(soon + (i + soon_by));
      if (later != nullptr) MOEROUTE_PREFETCH_TO_SECOND(later + (i + later_by));
      __builtin_memcpy(to + i, from + i, line);
    }
  };
  distant = distant && lines >= page;
  // Beyond the end they go on at `next`: of rows shorter than the distance at its begin.
  const index_t soon_beyond = std::min(ahead, lines) - lines, beyond = page - lines;
  if (distant) copy(lines - page, to, ahead, to, page);
  const std::byte* const later = distant ? next : nullptr;
  copy(lines - ahead, to, ahead, later, beyond);
  copy(lines, next, soon_beyond, later, beyond);
  if (i < n) std::memcpy(to + i, from + i, static_cast<std::size_t>(n - i));
}

#if defined(__SSE2__)
/// Whether stream_bytes passes the caches by; if not, it is a plain copy.
inline constexpr bool has_streaming_stores = true;
#else
inline constexpr bool has_streaming_stores = false;
#endif

/// Copies n bytes past the caches: for output that is much larger than they are.
///
/// Requires: n is a multiple of 64 and `to` aligned to 64 (partial lines would be slow). The
/// writing thread calls stream_fence() before it hands the bytes over.
template <class A = default_arch>
void stream_bytes(const std::byte* from, index_t n, std::byte* to) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    for (index_t i = 0; i < n; i += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    return;
  }
#endif
#if defined(__AVX__)
  if constexpr (width<A> >= 8) {
    for (index_t i = 0; i < n; i += 64) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), a);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), b);
    }
    return;
  }
#endif
#if defined(__SSE2__)
  for (index_t i = 0; i < n; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#else
  std::memcpy(to, from, static_cast<std::size_t>(n));
#endif
}

/// The same of one register, to an address that is aligned to it; whole lines should follow one
/// another.
template <class A>
MOEROUTE_INLINE void stream(float* to, vfloat<A> x) {
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) return _mm512_stream_ps(to, x);
#endif
#if defined(__AVX__)
  if constexpr (width<A> == 8 && !is_portable<A>) return _mm256_stream_ps(to, x);
#endif
  x.store_aligned(to);
}

/// Makes what this thread streamed visible to whoever it synchronises with next.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

namespace detail {

// v registers of a sum over rows, from column c on.
template <class A, int v>
struct row_sum {
  static constexpr index_t columns = v * width<A>;
  vfloat<A> sum[v];
  index_t c;

  template <class T>
  MOEROUTE_INLINE void operator()(const T* row, float weight) {
    const vfloat<A> w(weight);
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j) sum[j] = fma<A>(w, load_wide<A>(row + c + j * width<A>), sum[j]);
  }
};

// The columns [c, end) of a sum over rows, fewer than a register holds.
template <class A>
struct row_sum_tail {
  static constexpr index_t columns = width<A>;
  vfloat<A> sum;
  index_t c;
  index_t end;

  template <class T>
  MOEROUTE_INLINE void operator()(const T* row, float weight) {
    alignas(alignment) float lane[width<A>] = {};
    for (index_t j = c; j < end; ++j) lane[j - c] = static_cast<float>(row[j]);
    sum = fma<A>(vfloat<A>(weight), vfloat<A>::load_aligned(lane), sum);
  }
};

}  // namespace detail

/// What a sum of rows begins with.
enum class sum_start { zero, output };

/// out[c] = start + the sum, in the order of the calls, of weight * row[c], where each(term) calls
/// term(row, weight) for every term; rows may differ in type.
///
/// each is called once per tile of columns and must list the same terms every time.
/// Accumulates in float with fused multiply-adds; one rounding to To at the end.
/// Determinism: the same bits on every ISA.
template <class A = default_arch, storage To, class Each>
MOEROUTE_INLINE void sum_of_rows(index_t n, To* out, sum_start start, Each&& each) {
  constexpr int registers = detail::has_fma<A> && width<A> == 16 ? 8 : 4;
  index_t c = 0;
  const auto tile = [&]<int v>(std::integral_constant<int, v>) {
    detail::row_sum<A, v> total;
    total.c = c;
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j)
      total.sum[j] =
          start == sum_start::zero ? vfloat<A>(0.0f) : detail::load_wide<A>(out + c + j * width<A>);
    each(total);
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j) detail::store_narrow<A>(out + c + j * width<A>, total.sum[j]);
    c += v * width<A>;
  };
  while (c + registers * width<A> <= n) tile(std::integral_constant<int, registers>{});
  while (c + width<A> <= n) tile(std::integral_constant<int, 1>{});
  if (c < n) {
    alignas(alignment) float lane[width<A>] = {};
    if (start == sum_start::output)
      for (index_t j = c; j < n; ++j) lane[j - c] = static_cast<float>(out[j]);
    detail::row_sum_tail<A> total{vfloat<A>::load_aligned(lane), c, n};
    each(total);
    total.sum.store_aligned(lane);
    for (index_t j = c; j < n; ++j) out[j] = detail::narrowed<A, To>(lane[j - c]);
  }
}

namespace detail {

// Fetches `columns` columns, from c on, of every row that a later call will read.
template <class From>
MOEROUTE_INLINE void prefetch_rows(const From* rows, index_t stride, const std::int32_t* row,
                                   index_t k, index_t c, index_t columns) {
  constexpr index_t line = alignment / sizeof(From);
  for (index_t r = 0; r < k; ++r) {
    if (row[r] < 0) continue;
    const From* from = rows + row[r] * stride + c;
    for (index_t j = 0; j < columns; j += line) MOEROUTE_PREFETCH(from + j);
  }
}

// Two bfloat16 lie in each lane of a register of integers: the upper is a float once the lower is
// cleared, the lower once it is shifted up. Sums of such pairs, V registers of them.
template <class A, int V>
struct sum_of_pairs {
  using U = xsimd::batch<std::uint32_t, A>;
  static constexpr index_t columns = 2 * V * width<A>;
  vfloat<A> even[V], odd[V];

  MOEROUTE_INLINE sum_of_pairs() {
    MOEROUTE_UNROLL
    for (int j = 0; j < V; ++j) even[j] = odd[j] = vfloat<A>(0.0f);
  }
  MOEROUTE_INLINE void add(const bfloat16* row, vfloat<A> factor) {
    const auto* from = reinterpret_cast<const std::uint32_t*>(row);
    MOEROUTE_UNROLL
    for (int j = 0; j < V; ++j) {
      const U pair = U::load_unaligned(from + j * width<A>);
      even[j] = fma<A>(factor, bits_as<float>(pair << 16), even[j]);
      odd[j] = fma<A>(factor, bits_as<float>(pair & U(0xffff0000u)), odd[j]);
    }
  }
  template <storage To>
  MOEROUTE_INLINE void store(To* out) const {
    MOEROUTE_UNROLL
    for (int j = 0; j < V; ++j) {
      To* to = out + 2 * j * width<A>;
      if constexpr (std::is_same_v<To, bfloat16>) {
        rounded_pairs<A>(even[j], odd[j]).store_unaligned(reinterpret_cast<std::uint32_t*>(to));
      } else {
        store_narrow<A>(to, xsimd::zip_lo(even[j], odd[j]));
        store_narrow<A>(to + width<A>, xsimd::zip_hi(even[j], odd[j]));
      }
    }
  }
};

// Sums over the first columns of rows of bfloat16, as many as fill whole tiles; returns where they
// end.
template <class A, storage To>
index_t sum_of_bfloat16_tiles(const bfloat16* rows, index_t stride, const std::int32_t* row,
                              const float* weight, index_t k, index_t n, To* out,
                              const std::int32_t* next) {
  using tile = sum_of_pairs<A, has_fma<A> && width<A> == 16 ? 4 : 2>;
  index_t c = 0;
  for (; c + tile::columns <= n; c += tile::columns) {
    tile sum;
    for (index_t r = 0; r < k; ++r)
      if (row[r] >= 0) sum.add(rows + row[r] * stride + c, vfloat<A>(weight[r]));
    if (next != nullptr) prefetch_rows(rows, stride, next, k, c, tile::columns);
    sum.store(out + c);
  }
  return c;
}

// Most rows that are read side by side: their pointers and weights stay in registers.
inline constexpr int rows_side_by_side = 8;

// The sum of K rows over the columns [0, n rounded down to whole registers); returns where they
// end. Each load instruction walks along one row, which the hardware's prefetchers follow; a tile
// of one row after the other defeats them, and fetching by hand fills the first cache with rows
// that are pushed out again before their turn.
template <class A, int K, storage From, storage To>
index_t sum_side_by_side(const From* const* rows, const float* weight, index_t n, To* out) {
  constexpr int w = width<A>;
  const From* from[K];
  vfloat<A> factor[K];
  MOEROUTE_UNROLL
  for (int r = 0; r < K; ++r) {
    from[r] = rows[r];
    factor[r] = vfloat<A>(weight[r]);
  }
  index_t c = 0;
  if constexpr (std::is_same_v<From, bfloat16>) {
    using tile = sum_of_pairs<A, 2>;
    for (; c + tile::columns <= n; c += tile::columns) {
      tile sum;
      MOEROUTE_UNROLL
      for (int r = 0; r < K; ++r) sum.add(from[r] + c, factor[r]);
      sum.store(out + c);
    }
  } else {
    for (; c + w <= n; c += w) {
      vfloat<A> sum(0.0f);
      MOEROUTE_UNROLL
      for (int r = 0; r < K; ++r) sum = fma<A>(factor[r], load<A>(from[r] + c), sum);
      store_narrow<A>(out + c, sum);
    }
  }
  return c;
}

// The same for as many of the k rows as are there; 0 where there are none, or too many.
template <class A, storage From, storage To>
index_t sum_of_few_rows(const From* rows, index_t stride, const std::int32_t* row,
                        const float* weight, index_t k, index_t n, To* out) {
  if (k > rows_side_by_side) return 0;
  const From* from[rows_side_by_side];
  float factor[rows_side_by_side];
  int there = 0;
  for (index_t r = 0; r < k; ++r) {
    if (row[r] < 0) continue;
    from[there] = rows + row[r] * stride;
    factor[there++] = weight[r];
  }
  switch (there) {
    case 1: return sum_side_by_side<A, 1>(from, factor, n, out);
    case 2: return sum_side_by_side<A, 2>(from, factor, n, out);
    case 3: return sum_side_by_side<A, 3>(from, factor, n, out);
    case 4: return sum_side_by_side<A, 4>(from, factor, n, out);
    case 5: return sum_side_by_side<A, 5>(from, factor, n, out);
    case 6: return sum_side_by_side<A, 6>(from, factor, n, out);
    case 7: return sum_side_by_side<A, 7>(from, factor, n, out);
    case 8: return sum_side_by_side<A, 8>(from, factor, n, out);
  }
  return 0;
}

}  // namespace detail

/// out[c] = sum over r < k of weight[r] * rows[row[r] * stride + c], where negative row[r] are
/// skipped; zeros where nothing is left.
///
/// The lines of the rows next[0..k) may be fetched along the way, for the next call.
/// Accumulates in float in the order of r with fused multiply-adds; one rounding to To at the end.
/// Cost: reads each row once, no allocation. Determinism: the same bits on every ISA.
template <class A = default_arch, storage From, storage To>
void weighted_sum_of_rows(const From* rows, index_t stride, const std::int32_t* row,
                          const float* weight, index_t k, index_t n, To* out,
                          const std::int32_t* next = nullptr) {
  index_t done = 0;
  if constexpr (std::is_same_v<From, bfloat16>) {
    // From far memory the next rows are fetched by hand, tile by tile.
    if (detail::has_fma<A> && width<A> == 16 && next == nullptr)
      done = detail::sum_of_few_rows<A>(rows, stride, row, weight, k, n, out);
    if (done == 0)
      done = detail::sum_of_bfloat16_tiles<A>(rows, stride, row, weight, k, n, out, next);
  } else if constexpr (std::is_same_v<From, float> && detail::has_fma<A>) {
    done = detail::sum_of_few_rows<A>(rows, stride, row, weight, k, n, out);
  }
  if (rows != nullptr) rows += done;  // null where every row is skipped
  out += done;
  n -= done;
  sum_of_rows<A>(n, out, sum_start::zero, [&](auto& sum) {
    for (index_t r = 0; r < k; ++r) {
      if (row[r] < 0) continue;
      sum(rows + row[r] * stride, weight[r]);
    }
    if (next != nullptr) detail::prefetch_rows(rows, stride, next, k, sum.c, sum.columns);
  });
}

namespace detail {

// R sums over the same rows, V registers wide: each row is loaded once for all of them.
template <class A, int R, int V, storage From, storage To>
MOEROUTE_INLINE void mix_tile(const float* weight, index_t weight_stride,
                              const matrix_view<const From>& rows, index_t c, To* out,
                              index_t out_stride) {
  vfloat<A> sum[R][V];
  MOEROUTE_UNROLL
  for (int r = 0; r < R; ++r) {
    MOEROUTE_UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = vfloat<A>(0.0f);
  }
  for (index_t i = 0; i < rows.rows; ++i) {
    const From* from = rows.data + i * rows.stride + c;
    vfloat<A> x[V];
    MOEROUTE_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load_wide<A>(from + v * width<A>);
    MOEROUTE_UNROLL
    for (int r = 0; r < R; ++r) {
      const vfloat<A> w(weight[r * weight_stride + i]);
      MOEROUTE_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] = fma<A>(w, x[v], sum[r][v]);
    }
  }
  MOEROUTE_UNROLL
  for (int r = 0; r < R; ++r) {
    MOEROUTE_UNROLL
    for (int v = 0; v < V; ++v) store_narrow<A>(out + r * out_stride + c + v * width<A>, sum[r][v]);
  }
}

}  // namespace detail

/// out[r] = sum over i of weight(r, i) * rows[i]: a matrix product of float weights and rows as
/// they lie in memory.
///
/// Accumulates in float in the order of i with fused multiply-adds; one rounding to To at the end.
/// Shapes: weight [R, n], rows [n, d], out [R, d].
/// Cost: R n d multiply-adds, no allocation. Determinism: the same bits on every ISA, however the
/// rows of out are cut.
template <class A = default_arch, storage From, storage To>
void mix_rows(const matrix_view<const float>& weight, const matrix_view<const From>& rows,
              const matrix_view<To>& out) {
  constexpr bool wide = detail::has_fma<A> && width<A> == 16;
  constexpr int R = wide ? 6 : 4, V = wide ? 4 : 2, w = width<A>;
  index_t c = 0;
  const auto columns = [&]<int v>(std::integral_constant<int, v>) {
    index_t r = 0;
    for (; r + R <= weight.rows; r += R)
      detail::mix_tile<A, R, v>(weight.data + r * weight.stride, weight.stride, rows, c,
                                out.data + r * out.stride, out.stride);
    for (; r < weight.rows; ++r)
      detail::mix_tile<A, 1, v>(weight.data + r * weight.stride, weight.stride, rows, c,
                                out.data + r * out.stride, out.stride);
    c += v * w;
  };
  while (c + V * w <= rows.cols) columns(std::integral_constant<int, V>{});
  while (c + w <= rows.cols) columns(std::integral_constant<int, 1>{});
  for (index_t r = 0; c < rows.cols && r < weight.rows; ++r)
    sum_of_rows<A>(rows.cols - c, out.data + r * out.stride + c, sum_start::zero, [&](auto& sum) {
      for (index_t i = 0; i < rows.rows; ++i)
        sum(rows.data + i * rows.stride + c, weight.data[r * weight.stride + i]);
    });
}

}  // namespace moeroute::simd
