// Top-k with one row per lane: the same work whatever the values are.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/select/network.hpp>
#include <moeroute/simd/select/ranked.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

namespace detail {

// Each column is compared with the K best so far and inserted: columns come in ascending order, so
// a strict comparison keeps the lowest of equals. For K <= 4, where sorting ranks costs more.
template <class A, int K>
void top_k_insert(const float* const* rows, index_t cols, int k, float* value,
                  std::int32_t* column) {
  constexpr int w = width<A>;
  vfloat<A> best[K];
  vint<A> at[K];
  for (int r = 0; r < K; ++r) {
    best[r] = vfloat<A>(minus_infinity);
    at[r] = vint<A>(no_expert);
  }
  for (index_t c = 0; c < cols; c += w) {
    vfloat<A> x[w];
    load_transposed<A>(rows, c, cols, minus_infinity, x);
    MOEROUTE_UNROLL
    for (int j = 0; j < w; ++j) {
      const vint<A> here(static_cast<std::int32_t>(c) + j);
      vmask<A> larger[K];
      MOEROUTE_UNROLL
      for (int r = 0; r < K; ++r) larger[r] = x[j] > best[r];
      MOEROUTE_UNROLL
      for (int r = K - 1; r > 0; --r) {
        best[r] = select<A>(larger[r], select<A>(larger[r - 1], best[r - 1], x[j]), best[r]);
        at[r] = select<A>(larger[r], select<A>(larger[r - 1], at[r - 1], here), at[r]);
      }
      best[0] = select<A>(larger[0], x[j], best[0]);
      at[0] = select<A>(larger[0], here, at[0]);
    }
  }
  for (int r = 0; r < k; ++r) {
    best[r].store_unaligned(value + r * block_rows);
    at[r].store_unaligned(column + r * block_rows);
  }
}

// The ranks of `width` columns from c on, written to where a run of both halves of the rows has
// them.
template <class A>
MOEROUTE_INLINE void fill_run(const float* const* rows, index_t c, index_t cols,
                              vdouble<A>* first_rows, vdouble<A>* second_rows) {
  constexpr int w = width<A>;
  vfloat<A> x[w];
  load_transposed<A>(rows, c, cols, minus_infinity, x);
  MOEROUTE_UNROLL
  for (int i = 0; i < w; ++i) {
    const ranked<A> r =
        rank<A>(nan_to_minus_infinity<A>(x[i]), vint<A>(static_cast<std::int32_t>(c) + i));
    first_rows[i] = r.part[0];
    second_rows[i] = r.part[1];
  }
}

// The same once in the code, for the long runs, which are in memory.
template <class A>
MOEROUTE_OUT_OF_LINE void fill_long_run(const float* const* rows, index_t c, index_t cols,
                                        vdouble<A>* first_rows, vdouble<A>* second_rows) {
  fill_run<A>(rows, c, cols, first_rows, second_rows);
}

// Sorted runs of K columns are merged into the best K so far.
template <class A, int K>
void top_k_lanes(const float* const* rows, index_t cols, int k, float* value,
                 std::int32_t* column) {
  constexpr int w = width<A>;
  constexpr int chunk = std::max(K, w);
  ranks<A, K> top;
  for (int r = 0; r < K; ++r) top.set(r, rank_nothing<A>());
  for (index_t c = 0; c < cols; c += chunk) {
    if constexpr (K > w || K >= largest_unrolled) {
      ranks<A, K> run;
      for (int j = 0; j < K; j += w) {
        if constexpr (K >= largest_unrolled) {
          fill_long_run<A>(rows, c + j, cols, run.part[0] + j, run.part[1] + j);
        } else {
          fill_run<A>(rows, c + j, cols, run.part[0] + j, run.part[1] + j);
        }
      }
      sort(run);
      merge_keep_first(top, run);
    } else {
      vfloat<A> x[w];
      load_transposed<A>(rows, c, cols, minus_infinity, x);
      MOEROUTE_UNROLL
      for (int g = 0; g < w; g += K) {
        ranks<A, K> run;
        MOEROUTE_UNROLL
        for (int j = 0; j < K; ++j)
          run.set(j, rank<A>(nan_to_minus_infinity<A>(x[g + j]),
                             vint<A>(static_cast<std::int32_t>(c) + g + j)));
        sort(run);
        merge_keep_first(top, run);
      }
    }
  }
  store_top(top, k, rows, value, column);
}

}  // namespace detail

}  // namespace moeroute::simd
