// The k-th largest value of rows and of columns: what a price or a threshold is made of.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>

#include <moeroute/base/workspace.hpp>
#include <moeroute/simd/rows/panel.hpp>
#include <moeroute/simd/select/network.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute::simd {

namespace detail {

// Stores the lanes of m one after the other at `at` and returns what follows them.
template <class A>
MOEROUTE_INLINE float* append_values(vmask<A> m, vfloat<A> x, float* at) {
  std::uint64_t bits = m.mask();
  if constexpr (std::derived_from<A, xsimd::avx512f>) {
    xsimd::compress(x, m).store_unaligned(at);
    return at + std::popcount(bits);
  } else {
    if (bits == 0) return at;
    alignas(alignment) float lane[width<A>];
    x.store_aligned(lane);
    for (; bits != 0; bits &= bits - 1) *at++ = lane[std::countr_zero(bits)];
    return at;
  }
}

inline void pad_values(float* value, index_t n) {
  std::fill_n(value + n, tile_size, minus_infinity);
}

template <class A>
MOEROUTE_INLINE index_t count_reaching(const float* value, index_t n, float bound) {
  const vfloat<A> least(bound);
  const vint<A> one(1), zero(0);
  vint<A> count(0);
  for (index_t i = 0; i < n; i += width<A>)
    count += select<A>(load<A>(value + i) >= least, one, zero);
  return xsimd::reduce_add(count);
}

// The k-th largest of n values above -inf, 1 <= k <= n; values are padded, rest has as much room.
//
// A few steps of interpolation leave a narrow band around it, which is split the plain way: nothing
// but time depends on how the values lie, and many equal ones cost no more than others.
template <class A>
float kth_largest_value(const float* value, index_t n, index_t k, float* rest) {
  constexpr index_t few = 24;
  vfloat<A> least(plus_infinity), most(minus_infinity);
  for (index_t i = 0; i < n; i += width<A>) {
    const vfloat<A> x = load<A>(value + i);
    least = xsimd::min(least, select<A>(x > vfloat<A>(minus_infinity), x, least));
    most = xsimd::max(most, x);
  }
  // At least k values reach `low`, fewer than k reach `high`.
  float low = xsimd::reduce_min(least), high = plus_infinity;
  float top = xsimd::reduce_max(most);
  index_t reach_low = n, reach_high = 0;
  for (int step = 0; step < 6 && reach_low - reach_high > few; ++step) {
    const float share =
        static_cast<float>(reach_low - k) / static_cast<float>(reach_low - reach_high);
    const float middle = low + (top - low) * share;
    if (!(middle > low && middle < high)) break;
    const index_t reach = count_reaching<A>(value, n, middle);
    if (reach >= k) {
      low = middle;
      reach_low = reach;
    } else {
      high = top = middle;
      reach_high = reach;
    }
  }
  float* end = rest;
  const vfloat<A> from(low), below(high);
  for (index_t i = 0; i < n; i += width<A>) {
    const vfloat<A> x = load<A>(value + i);
    end =
        append_values<A>((x >= from) & ((x < below) | (below == vfloat<A>(plus_infinity))), x, end);
  }
  float* const wanted = rest + (k - reach_high - 1);
  std::nth_element(rest, wanted, end, std::greater<>());
  return *wanted + 0.0f;
}

}  // namespace detail

namespace detail {

// Largest k for which networks of values are built.
inline constexpr index_t max_value_k = 32;

// The k-th largest of every lane, 1 <= k <= K. Values alone: half the work of values with their
// columns. columns(c, x) fills `width` registers with the columns from c on, -inf past the last.
template <class A, int K, class Columns>
vfloat<A> kth_of_lanes(const Columns& columns, index_t cols, index_t k) {
  constexpr int w = width<A>, chunk = K > w ? K : w;
  vfloat<A> top[K];
  for (index_t c = 0; c < cols; c += chunk) {
    vfloat<A> x[chunk];
    MOEROUTE_UNROLL
    for (int j = 0; j < chunk; j += w) columns(c + j, x + j);
    MOEROUTE_UNROLL
    for (int g = 0; g < chunk; g += K) {
      sort<K>(x + g);
      if (c + g == 0) {
        MOEROUTE_UNROLL
        for (int r = 0; r < K; ++r) top[r] = x[r];
      } else {
        merge_keep_first<K>(top, x + g);
      }
    }
  }
  return top[k - 1] + vfloat<A>(0.0f);
}

// 1 <= k <= max_value_k.
template <class A, class Columns>
MOEROUTE_INLINE vfloat<A> kth_of_lanes(const Columns& columns, index_t cols, index_t k) {
  if (k <= 4) return kth_of_lanes<A, 4>(columns, cols, k);
  if (k <= 8) return kth_of_lanes<A, 8>(columns, cols, k);
  if (k <= 16) return kth_of_lanes<A, 16>(columns, cols, k);
  return kth_of_lanes<A, 32>(columns, cols, k);
}

// `width` rows of floats, one per lane.
template <class A>
struct columns_of_rows {
  const float* row[width<A>];
  index_t cols;

  MOEROUTE_INLINE void operator()(index_t c, vfloat<A>* x) const {
    load_transposed<A>(row, std::min(c, cols), cols, minus_infinity, x);
    MOEROUTE_UNROLL
    for (int i = 0; i < width<A>; ++i) x[i] = max_or_second<A>(x[i], vfloat<A>(minus_infinity));
  }
};

// The lanes [lane, lane + width) of a tile, and a bias per column.
template <class A>
struct columns_of_tile {
  const float* panel;
  panel_shape shape;
  index_t tile;
  int lane;
  const float* bias;
  index_t cols;

  MOEROUTE_INLINE void operator()(index_t c, vfloat<A>* x) const {
    constexpr int w = width<A>;
    const float* const at =
        panel + shape.strip(c) + panel_shape::lanes(tile, static_cast<int>(c % tile_size)) + lane;
    if (c + w <= cols) [[likely]] {
      MOEROUTE_UNROLL
      for (int i = 0; i < w; ++i) x[i] = load<A>(at + i * tile_size) + vfloat<A>(bias[c + i]);
    } else {
      for (int i = 0; i < w; ++i)
        x[i] = c + i < cols ? load<A>(at + i * tile_size) + vfloat<A>(bias[c + i])
                            : vfloat<A>(minus_infinity);
    }
  }
};

}  // namespace detail

/// Whether kth_largest_of_tile takes this k.
constexpr bool tile_takes(index_t k) { return k <= detail::max_value_k; }

/// The k-th largest of value + bias in each of the 16 rows of a tile of a panel.
///
/// Shapes: panel as pack_tiles leaves it, no NaN and no +inf in it; bias is [cols] and finite; out
/// is [16], -inf where a row has fewer than k values above that. Requires: k >= 1, tile_takes(k).
/// Cost: a sorting network of values, one read; no allocation. Determinism: exact.
template <class A = default_arch>
void kth_largest_of_tile(const float* panel, panel_shape shape, index_t tile, index_t cols,
                         const float* bias, index_t k, float* out) {
  MOEROUTE_EXPECTS(k >= 1 && tile_takes(k));
  if (k > cols) {
    std::fill_n(out, tile_size, minus_infinity);
    return;
  }
  for (int lane = 0; lane < tile_size; lane += width<A>)
    detail::kth_of_lanes<A>(detail::columns_of_tile<A>{panel, shape, tile, lane, bias, cols}, cols,
                            k)
        .store_unaligned(out + lane);
}

/// Scratch of kth_largest_of_block.
struct kth_largest_buffers {
  float* value;          ///< [k][16] for k that the lane kernels take, else [cols + 16]
  std::int32_t* column;  ///< [k][16]
  std::uint64_t* key;    ///< what top_k_block asks for
  float* rest;           ///< [cols + 16] for larger k

  static kth_largest_buffers carve(scratch& tape, index_t cols, index_t k) {
    const bool lanes = k <= max_lane_k;
    const index_t room = round_up(cols, tile_size) + tile_size;
    return {tape.take<float>(lanes ? k * block_rows : room),
            tape.take<std::int32_t>(lanes ? k * block_rows : 0),
            tape.take<std::uint64_t>(top_k_scratch(cols, std::min<index_t>(k, max_lane_k))),
            tape.take<float>(lanes ? 0 : room)};
  }
};

/// The k-th largest value of each of 16 rows; NaN and -inf count as nothing.
///
/// Shapes: 16 rows of cols floats, `stride` apart; out is [16], -inf where a row has fewer than k
/// values. Requires: k >= 1; memory was carved for the same cols and k. Cost: a sorting network of
/// values for k up to 32, top_k_block up to 64, above it a few counts over the row. No allocation.
/// Determinism: exact.
template <class A = default_arch>
void kth_largest_of_block(const float* rows, index_t stride, index_t cols, index_t k,
                          const kth_largest_buffers& memory, float* out) {
  if (k > cols) {
    std::fill_n(out, block_rows, minus_infinity);
  } else if (k <= detail::max_value_k) {
    for (int first = 0; first < block_rows; first += width<A>) {
      detail::columns_of_rows<A> columns;
      for (int i = 0; i < width<A>; ++i) columns.row[i] = rows + (first + i) * stride;
      columns.cols = cols;
      detail::kth_of_lanes<A>(columns, cols, k).store_unaligned(out + first);
    }
  } else if (k <= max_lane_k) {
    top_k_block<A>(rows, stride, block_rows, cols, static_cast<int>(k), memory.value, memory.column,
                   memory.key);
    for (int i = 0; i < block_rows; ++i) out[i] = memory.value[(k - 1) * block_rows + i] + 0.0f;
  } else {
    for (int i = 0; i < block_rows; ++i) {
      index_t n = 0;
      for (index_t c = 0; c < cols; ++c) {
        const float x = rows[i * stride + c];
        memory.value[n] = x;
        n += x > minus_infinity;
      }
      detail::pad_values(memory.value, n);
      out[i] =
          n < k ? minus_infinity : detail::kth_largest_value<A>(memory.value, n, k, memory.rest);
    }
  }
}

/// Scratch of kth_largest_of_columns: candidates of 16 columns.
struct kth_column_buffers {
  float* value;  ///< [16][room]
  float* rest;   ///< [room]
  index_t room;

  static kth_column_buffers carve(scratch& tape, index_t rows) {
    const index_t room = round_up(rows, tile_size) + tile_size;
    return {tape.take<float>(tile_size * room), tape.take<float>(room), room};
  }
};

namespace detail {

// A bound that a little more than k values of the column should reach; the lowest float where a
// sample would tell nothing.
template <class A, class Source>
float bound_by_sample(const Source& source, index_t rows, int column, index_t k, float* rest) {
  constexpr float lowest = std::numeric_limits<float>::lowest();
  constexpr index_t most = 256;
  const index_t size = std::min(most, round_up(rows / 8, tile_size));
  const double share = static_cast<double>(k) / static_cast<double>(rows);
  const double expected = share * static_cast<double>(size);
  const auto rank =
      static_cast<index_t>(std::ceil(expected + 3.5 * std::sqrt(expected * (1.0 - share))) + 1.0);
  if (size < 64 || 2 * rank >= size) return lowest;
  alignas(alignment) float sample[most + tile_size];
  float* end = sample;
  alignas(alignment) float value[most];
  sample_column<A>(source, rows, column, size, value);
  for (index_t i = 0; i < size; i += width<A>) {
    const vfloat<A> x = load<A>(value + i);
    end = append_values<A>(x > vfloat<A>(minus_infinity), x, end);
  }
  const index_t n = end - sample;
  if (n < rank) return lowest;
  pad_values(sample, n);
  return kth_largest_value<A>(sample, n, rank, rest);
}

// Everything in columns [first, last) that reaches its bound.
template <class A, class Source>
void collect_values(const Source& source, index_t rows, int first, int last, const float* bound,
                    const kth_column_buffers& memory, index_t* found) {
  vfloat<A> least[tile_size];
  float* at[tile_size];
  for (int c = first; c < last; ++c) {
    least[c] = vfloat<A>(bound[c]);
    at[c] = memory.value + c * memory.room;
  }
  for (index_t tile = 0; tile * tile_size < rows; ++tile)
    for (int c = first; c < last; ++c)
      for (int r = 0; r < registers_per_block<A>; ++r) {
        const vfloat<A> x = source.template values<A>(tile, c, r * width<A>);
        at[c] = append_values<A>(x >= least[c], x, at[c]);
      }
  for (int c = first; c < last; ++c) found[c] = at[c] - (memory.value + c * memory.room);
}

}  // namespace detail

/// The k-th largest value of up to 16 columns of a panel; NaN and -inf count as nothing.
///
/// Shapes: out is [columns], -inf where a column has fewer than k values. Requires:
/// source.values<A>(tile, column, lane) is the register of the rows [16 tile + lane, ...), -inf
/// past the last row; k >= 1. Cost: one sweep that keeps what reaches the bound of a sample,
/// then a few counts over the survivors; two sweeps for a column whose sample misled. No
/// allocation. Determinism: exact; the same on every ISA.
template <class A = default_arch, class Source>
void kth_largest_of_columns(const Source& source, index_t rows, int columns, index_t k,
                            const kth_column_buffers& memory, float* out) {
  MOEROUTE_EXPECTS(columns >= 1 && columns <= tile_size && k >= 1);
  constexpr float lowest = std::numeric_limits<float>::lowest();
  float bound[tile_size];
  index_t found[tile_size];
  for (int c = 0; c < columns; ++c)
    bound[c] = k > rows ? lowest : detail::bound_by_sample<A>(source, rows, c, k, memory.rest);
  detail::collect_values<A>(source, rows, 0, columns, bound, memory, found);
  for (int c = 0; c < columns; ++c) {
    if (found[c] < k && bound[c] > lowest) {
      bound[c] = lowest;
      detail::collect_values<A>(source, rows, c, c + 1, bound, memory, found);
    }
    float* const value = memory.value + c * memory.room;
    detail::pad_values(value, found[c]);
    out[c] = found[c] < k ? minus_infinity
                          : detail::kth_largest_value<A>(value, found[c], k, memory.rest);
  }
}

}  // namespace moeroute::simd
