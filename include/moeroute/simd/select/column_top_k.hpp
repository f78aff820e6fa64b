// Column-wise top-k over 16 columns at once: value descending, row ascending among equals, -inf and
// NaN never.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/rows/panel.hpp>
#include <moeroute/simd/select/kth_key.hpp>
#include <moeroute/simd/select/ordered_key.hpp>

namespace moeroute::simd {

/// Candidates of 16 columns.
struct column_top_k_buffers {
  std::int32_t* key;  ///< [16][room]
  std::int32_t* row;  ///< [16][room]
  index_t room;

  static column_top_k_buffers carve(scratch& tape, index_t rows) {
    // Compressed registers are stored whole, so each column has one register to spare.
    const index_t room = round_up(rows, tile_size) + tile_size;
    return {tape.take<std::int32_t>(tile_size * room), tape.take<std::int32_t>(tile_size * room),
            room};
  }
};

/// The picks of up to 16 columns. Column c has count[c] of them at [c * k], in ascending order of
/// rows.
struct column_picks {
  std::int32_t* row;
  std::int32_t* key;  ///< ordered_key of the value
  std::int32_t* count;
};

namespace detail {

inline constexpr index_t column_sample = 256;

// Stores the lanes of m one after the other at `at` and returns what follows them.
template <class A>
MOEROUTE_INLINE index_t append_lanes(xsimd::batch_bool<std::int32_t, A> m, vint<A> key, vint<A> row,
                                     std::int32_t* keys, std::int32_t* rows, index_t at) {
  std::uint64_t bits = m.mask();
  if constexpr (std::derived_from<A, xsimd::avx512f>) {
    xsimd::compress(key, m).store_unaligned(keys + at);
    xsimd::compress(row, m).store_unaligned(rows + at);
    return at + std::popcount(bits);
  } else {
    if (bits == 0) return at;
    alignas(alignment) std::int32_t k[width<A>], p[width<A>];
    key.store_aligned(k);
    row.store_aligned(p);
    for (; bits != 0; bits &= bits - 1, ++at) {
      const int lane = std::countr_zero(bits);
      keys[at] = k[lane];
      rows[at] = p[lane];
    }
    return at;
  }
}

inline void pad_keys(std::int32_t* key, index_t n) {
  for (int i = 0; i < tile_size; ++i) key[n + i] = lowest_key;
}

// A bound that a little more than k values of the column should reach; lowest_key where a sample
// tells nothing.
template <class A, class Source>
std::int32_t sampled_bound(const Source& source, index_t rows, int column, index_t k) {
  const double share = static_cast<double>(k) / static_cast<double>(rows);
  const double expected = share * column_sample;
  const auto rank =
      static_cast<index_t>(std::ceil(expected + 3.5 * std::sqrt(expected * (1.0 - share))) + 1.0);
  if (rows < 4 * column_sample || rank >= column_sample) return lowest_key;
  alignas(alignment) float value[column_sample];
  alignas(alignment) std::int32_t sample[column_sample];
  sample_column<A>(source, rows, column, column_sample, value);
  for (index_t i = 0; i < column_sample; i += width<A>) {
    const vfloat<A> x = load<A>(value + i);
    const auto possible = xsimd::batch_bool_cast<std::int32_t>(x > vfloat<A>(minus_infinity));
    xsimd::select(possible, ordered_key<A>(x), vint<A>(lowest_key)).store_aligned(sample + i);
  }
  const std::int32_t bound = kth_largest_bound<A>(sample, column_sample, rank, 2);
  return count_at_least<A>(sample, column_sample, std::max(bound, lowest_key + 1)) >= rank
             ? bound
             : lowest_key;
}

// Everything in columns [first, last) that reaches its bound and is not -inf, in the order of
// rows.
template <class A, class Source>
void collect_columns(const Source& source, index_t rows, int first, int last,
                     const std::int32_t* bound, const column_top_k_buffers& memory,
                     index_t* found) {
  vfloat<A> least[tile_size];
  index_t at[tile_size];
  for (int c = first; c < last; ++c) {
    // -inf itself never reaches what is left of the range.
    const float value =
        bound[c] == lowest_key ? std::numeric_limits<float>::lowest() : value_of_key(bound[c]);
    least[c] = vfloat<A>(value);
    at[c] = 0;
  }
  alignas(alignment) std::int32_t iota[width<A>];
  for (int i = 0; i < width<A>; ++i) iota[i] = i;
  const vint<A> lanes = vint<A>::load_aligned(iota);
  for (index_t tile = 0; tile * tile_size < rows; ++tile)
    for (int c = first; c < last; ++c)
      for (int r = 0; r < registers_per_block<A>; ++r) {
        const vfloat<A> x = source.template values<A>(tile, c, r * width<A>);
        const auto row = static_cast<std::int32_t>(tile * tile_size + r * width<A>);
        at[c] = append_lanes<A>(xsimd::batch_bool_cast<std::int32_t>(x >= least[c]),
                                ordered_key<A>(x), lanes + vint<A>(row),
                                memory.key + c * memory.room, memory.row + c * memory.room, at[c]);
      }
  std::copy(at + first, at + last, found + first);
}

// The k best of more candidates than that where equal keys have to be told apart: those of the
// lowest rows.
inline void pick_among_ties(const std::int32_t* key, const std::int32_t* row, index_t n, index_t k,
                            std::int32_t bound, std::int32_t* out_key, std::int32_t* out_row) {
  index_t ties = k;
  for (index_t i = 0; i < n; ++i) ties -= key[i] > bound;
  for (index_t i = 0, at = 0; at < k; ++i) {
    if (key[i] < bound || (key[i] == bound && ties-- <= 0)) continue;
    out_key[at] = key[i];
    out_row[at++] = row[i];
  }
}

// The k best of one column's candidates; returns how many there are.
template <class A>
index_t pick_column(const std::int32_t* key, const std::int32_t* row, index_t n, index_t k,
                    std::int32_t* out_key, std::int32_t* out_row) {
  if (n <= k) {
    std::copy_n(key, n, out_key);
    std::copy_n(row, n, out_row);
    return n;
  }
  const std::int32_t bound = kth_largest_bound<A>(key, n, k, 0);
  if (count_at_least<A>(key, n, bound) != k) {
    pick_among_ties(key, row, n, k, bound, out_key, out_row);
    return k;
  }
  // Registers are stored whole, and the next column's picks follow: the last ones go one by one.
  index_t at = 0, i = 0;
  for (; i + width<A> <= n && at + width<A> <= k; i += width<A>) {
    const vint<A> x = load<A>(key + i);
    at = append_lanes<A>(x >= vint<A>(bound), x, load<A>(row + i), out_key, out_row, at);
  }
  for (; at < k; ++i) {
    if (key[i] < bound) continue;
    out_key[at] = key[i];
    out_row[at++] = row[i];
  }
  return k;
}

}  // namespace detail

/// The k best rows of up to 16 columns of a panel.
///
/// Shapes: out.row and out.key are [columns, k], out.count is [columns]. A column with fewer than
/// k values above -inf has fewer picks. Requires: source.values<A>(tile, column, lane) is the
/// register of the rows [16 tile + lane, ...), -inf past the last row; 1 <= k <= rows <
/// 2^31. Cost: one sweep that keeps what reaches the bound of a 256-row sample, then interpolated
/// bisection over the survivors; two sweeps for a column whose sample misled. No allocation.
/// Determinism: exact; the same on every ISA.
template <class A = default_arch, class Source>
void column_top_k(const Source& source, index_t rows, int columns, index_t k,
                  const column_top_k_buffers& memory, const column_picks& out) {
  MOEROUTE_EXPECTS(columns >= 1 && columns <= tile_size && k >= 1 && k <= rows);
  std::int32_t bound[tile_size];
  index_t found[tile_size];
  for (int c = 0; c < columns; ++c) bound[c] = detail::sampled_bound<A>(source, rows, c, k);
  detail::collect_columns<A>(source, rows, 0, columns, bound, memory, found);
  for (int c = 0; c < columns; ++c) {
    if (found[c] < k && bound[c] != lowest_key) {
      bound[c] = lowest_key;
      detail::collect_columns<A>(source, rows, c, c + 1, bound, memory, found);
    }
    std::int32_t* const key = memory.key + c * memory.room;
    detail::pad_keys(key, found[c]);
    out.count[c] = static_cast<std::int32_t>(detail::pick_column<A>(
        key, memory.row + c * memory.room, found[c], k, out.key + c * k, out.row + c * k));
  }
}

}  // namespace moeroute::simd
