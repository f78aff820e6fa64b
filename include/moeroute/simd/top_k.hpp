// Row-wise top-k: value descending, column ascending among equals, NaN and -inf never.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include <moeroute/base/contract.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/network.hpp>
#include <moeroute/simd/ranked.hpp>
#include <moeroute/simd/top_k_bound.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

/// Largest k of the in-register kernels; above it rows are selected one by one.
inline constexpr int max_lane_k = 64;

/// Scratch 64-bit words that top_k_block needs.
constexpr index_t top_k_scratch(index_t cols, index_t k) { return k > max_lane_k ? cols : 0; }

namespace detail {

// One row per lane: sorted runs of K columns are merged into the best K so far.
template <class A, int K>
void top_k_lanes(const float* const* rows, index_t cols, int k, float* value,
                 std::int32_t* column) {
  constexpr int w = width<A>;
  constexpr int chunk = K > w ? K : w;
  ranked<A> top[K];
  for (auto& t : top) t = rank_nothing<A>();
  for (index_t c = 0; c < cols; c += chunk) {
    vfloat<A> x[chunk];
    MOEROUTE_UNROLL
    for (int j = 0; j < chunk; j += w) load_transposed<A>(rows, c + j, cols, minus_infinity, x + j);
    MOEROUTE_UNROLL
    for (int g = 0; g < chunk; g += K) {
      ranked<A> run[K];
      MOEROUTE_UNROLL
      for (int j = 0; j < K; ++j)
        run[j] = rank<A>(nan_to_minus_infinity<A>(x[g + j]),
                         vint<A>(static_cast<std::int32_t>(c) + g + j));
      sort<A, K>(run);
      merge_keep_first<A, K>(top, run);
    }
  }
  store_ranks<A>(top, k, rows, value, column);
}

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

}  // namespace detail

/// The k best columns of each row of a block, best first.
///
/// Shapes: n rows (1 to 16) of cols floats, `stride` apart; value and column are [k][16], rank by
/// rank, one row per lane; lanes at or past n are unspecified. Where a row has fewer than k finite
/// or +inf values the rest is (-inf, no_expert). Requires: 1 <= k <= cols <= 2^20; key holds
/// top_k_scratch(cols, k) words. Cost: O(cols log^2 k) compare-exchanges on registers, no
/// allocation. Determinism: exact; the same on every ISA.
template <class A = default_arch>
void top_k_block(const float* rows, index_t stride, int n, index_t cols, int k, float* value,
                 std::int32_t* column, std::uint64_t* key) {
  MOEROUTE_EXPECTS(n >= 1 && n <= block_rows && k >= 1 && k <= cols);
  if (k > max_lane_k) {
    for (int i = 0; i < n; ++i)
      detail::top_k_one_row(rows + i * stride, cols, k, value + i, column + i, key);
    return;
  }
  for (int first = 0; first < n; first += width<A>) {
    const float* row[width<A>];
    for (int i = 0; i < width<A>; ++i) row[i] = rows + std::min(first + i, n - 1) * stride;
    float* v = value + first;
    std::int32_t* c = column + first;
    if constexpr (width<A> == 16) {
      if (cols >= 64 && k <= 8) {
        if (detail::top_k_bound<A, 8, 32, 16>(row, cols, k, v, c)) continue;
      }
    }
    if (k <= 1) {
      detail::top_k_lanes<A, 1>(row, cols, k, v, c);
    } else if (k <= 2) {
      detail::top_k_lanes<A, 2>(row, cols, k, v, c);
    } else if (k <= 4) {
      detail::top_k_lanes<A, 4>(row, cols, k, v, c);
    } else if (k <= 8) {
      detail::top_k_lanes<A, 8>(row, cols, k, v, c);
    } else if (k <= 16) {
      detail::top_k_lanes<A, 16>(row, cols, k, v, c);
    } else if (k <= 32) {
      detail::top_k_lanes<A, 32>(row, cols, k, v, c);
    } else {
      detail::top_k_lanes<A, 64>(row, cols, k, v, c);
    }
  }
}

}  // namespace moeroute::simd
