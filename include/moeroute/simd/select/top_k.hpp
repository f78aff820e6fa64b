// Row-wise top-k: value descending, column ascending among equals, NaN and -inf never.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include <moeroute/base/contract.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/select/top_k_bound.hpp>
#include <moeroute/simd/select/top_k_lanes.hpp>
#include <moeroute/simd/select/top_k_row.hpp>

namespace moeroute::simd {

/// Largest k of the in-register kernels; above it rows are selected one by one.
inline constexpr int max_lane_k = 64;

/// Scratch 64-bit words that top_k_block needs.
constexpr index_t top_k_scratch(index_t cols, index_t k) { return k > max_lane_k ? cols : 0; }

namespace detail {

// A float's place in the descending order, so that keys ascend: NaN and -inf last, -0 equal to +0.
inline std::uint32_t descending_key(float x) {
  if (!(x > minus_infinity)) return 0xffffffffu;
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  return bits >> 31 ? bits : 0x7fffffffu - bits;
}

// One row by partial selection on unique 64-bit keys: for k above the lane kernels.
inline void top_k_one_row(const float* row, index_t cols, int k, float* value, std::int32_t* column,
                          std::uint64_t* key) {
  for (index_t c = 0; c < cols; ++c)
    key[c] = std::uint64_t{descending_key(row[c])} << 32 | static_cast<std::uint32_t>(c);
  if (k < cols) std::nth_element(key, key + k - 1, key + cols);
  std::sort(key, key + k);
  for (int r = 0; r < k; ++r) {
    const auto c = static_cast<std::int32_t>(key[r] & 0xffffffffu);
    const bool found = (key[r] >> 32) != 0xffffffffu;
    value[r * block_rows] = found ? row[c] : minus_infinity;
    column[r * block_rows] = found ? c : no_expert;
  }
}

// `width` rows, one per lane. least <= k <= most, k <= max_lane_k.
template <class A, int least, int most>
void top_k_lane_group(const float* const* rows, index_t cols, int k, float* value,
                      std::int32_t* column) {
  // Columns from which a bound wins, measured: with 16 lanes insertion of two still wins at 128
  // columns and the network at 32, with 8 lanes insertion and the network win at 64 and lose at
  // 128.
  constexpr index_t bound_of_two = width<A> == 16 ? 192 : 80;
  constexpr index_t bound_of_few = width<A> == 16 ? 64 : 80;
  if constexpr (most > 32)
    if (k > 32) return top_k_lanes<A, 64>(rows, cols, k, value, column);
  if constexpr (least <= 32 && most > 16)
    if (k > 16) {
      if (cols >= 96 && top_k_bound<A, 32, 64, 64, 48>(rows, cols, k, value, column)) return;
      return top_k_lanes<A, 32>(rows, cols, k, value, column);
    }
  if constexpr (least <= 16 && most > 8)
    if (k > 8) {
      if (cols >= bound_of_few && top_k_bound<A, 16, 32, 32, 16>(rows, cols, k, value, column))
        return;
      return top_k_lanes<A, 16>(rows, cols, k, value, column);
    }
  if constexpr (least <= 8 && most > 1)
    if (cols >= (k <= 2 ? bound_of_two : bound_of_few) && k > 1 &&
        top_k_bound<A, 8, 32, 16>(rows, cols, k, value, column))
      return;
  if constexpr (least <= 8 && most > 4)
    if (k > 4) return top_k_lanes<A, 8>(rows, cols, k, value, column);
  if constexpr (least <= 4 && most > 2)
    if (k > 2) return top_k_lanes<A, 4>(rows, cols, k, value, column);
  if constexpr (least <= 2 && most > 1)
    if (k > 1) return top_k_insert<A, 2>(rows, cols, k, value, column);
  if constexpr (least <= 1) top_k_insert<A, 1>(rows, cols, k, value, column);
}

}  // namespace detail

/// The k best columns of each row of a block, best first.
///
/// Shapes: n rows (1 to 16) of cols floats, `stride` apart; value and column are [k][16], rank by
/// rank, one row per lane; lanes at or past n are unspecified. Where a row has fewer than k finite
/// or +inf values the rest is (-inf, no_expert). Requires: 1 <= k <= cols <= 2^20; key holds
/// top_k_scratch(cols, k) words. Cost: O(cols log^2 k) compare-exchanges on registers, no
/// allocation. Determinism: exact; the same on every ISA.
///
/// Who knows that k is in [least, most] compiles the kernels of such k alone.
template <class A = default_arch, int least = 1, int most = int{max_experts}>
void top_k_block(const float* rows, index_t stride, int n, index_t cols, int k, float* value,
                 std::int32_t* column, std::uint64_t* key) {
  MOEROUTE_EXPECTS(n >= 1 && n <= block_rows && k >= least && k <= most && k <= cols);
  if constexpr (most > max_lane_k) {
    if (k > max_lane_k) {
      for (int i = 0; i < n; ++i)
        detail::top_k_one_row(rows + i * stride, cols, k, value + i, column + i, key);
      return;
    }
  }
  for (int first = 0; first < n; first += width<A>) {
    // The lanes of a third of a register cost more together than so many rows one by one.
    if (3 * (n - first) <= width<A>) {
      for (; first < n; ++first) {
        row_ranks ranks;
        top_k_row<A, std::min(most, max_row_k)>(rows + first * stride, cols, k, ranks);
        for (int r = 0; r < k; ++r) {
          value[r * block_rows + first] = ranks.value[r];
          column[r * block_rows + first] = ranks.column[r];
        }
      }
      return;
    }
    const float* row[width<A>];
    for (int i = 0; i < width<A>; ++i) row[i] = rows + std::min(first + i, n - 1) * stride;
    detail::top_k_lane_group<A, least, most>(row, cols, k, value + first, column + first);
  }
}

}  // namespace moeroute::simd
