// All columns of one row in the order in which they are chosen.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/select/ordered_key.hpp>

namespace moeroute::simd {

/// Integers of scratch that rank_columns needs.
constexpr index_t rank_columns_scratch(index_t cols) { return round_up(cols, block_rows); }

/// column[r] = the column of rank r: value descending, column ascending among equals, NaN as -inf.
/// Returns how many columns are above -inf; the others come last.
///
/// For short rows that come alone: ranks are counted, each column against each other one, without a
/// branch that depends on the data. Shapes: column [cols], key [rank_columns_scratch(cols)].
/// Cost: O(cols^2 / width), no allocation. Determinism: exact.
template <class A = default_arch>
index_t rank_columns(const float* row, index_t cols, std::int32_t* key, std::int32_t* column) {
  constexpr int w = width<A>;
  const vint<A> zero(0), one(1), hopeless(ordered_key(minus_infinity));
  vint<A> there(0);
  for (index_t c = 0; c < cols; c += w) {
    const vfloat<A> x =
        cols - c >= w ? load<A>(row + c) : load_first<A>(row + c, cols - c, minus_infinity);
    const vint<A> k = ordered_key<A>(nan_to_minus_infinity<A>(x));
    k.store_unaligned(key + c);
    there += xsimd::select(k > hopeless, one, zero);
  }
  for (index_t c = 0; c < cols; c += w) {
    const vint<A> mine = load<A>(key + c),
                  place = lane_numbers<A>() + vint<A>(static_cast<std::int32_t>(c));
    vint<A> before(0);
    const index_t end = std::min(cols, c + w);
    for (index_t j = 0; j < c; ++j) before += xsimd::select(vint<A>(key[j]) >= mine, one, zero);
    for (index_t j = c; j < end; ++j) {
      const vint<A> other(key[j]);
      before += xsimd::select(
          (other > mine) | ((other == mine) & (vint<A>(static_cast<std::int32_t>(j)) < place)), one,
          zero);
    }
    for (index_t j = end; j < cols; ++j) before += xsimd::select(vint<A>(key[j]) > mine, one, zero);
    alignas(alignment) std::int32_t rank[w];
    before.store_aligned(rank);
    for (index_t i = 0; i < end - c; ++i) column[rank[i]] = static_cast<std::int32_t>(c + i);
  }
  return xsimd::reduce_add(there);
}

}  // namespace moeroute::simd
