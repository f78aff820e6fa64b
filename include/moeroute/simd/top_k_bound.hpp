// Top-k by a bound: one comparison discards almost every column, a network sorts the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include <moeroute/simd/column_bound.hpp>
#include <moeroute/simd/compress.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/network.hpp>
#include <moeroute/simd/pick.hpp>
#include <moeroute/simd/ranked.hpp>

namespace moeroute::simd {

namespace detail {

// The columns of n rows that reach their row's bound; false where a row has more than slots.
template <class A, int slots>
MOEROUTE_INLINE bool collect(const float* const* rows, int n, index_t cols, const float* bound,
                             column_list<A, slots>* found) {
  constexpr index_t panel = 1024;
  column_mask masks[width<A>][panel / 64];
  for (index_t first = 0; first < cols; first += panel) {
    const index_t end = std::min(first + panel, cols);
    for (int i = 0; i < n; ++i) {
      const vfloat<A> b(bound[i]);
      for (index_t c = first; c < end; c += 64)
        mask_not_below<A>(rows[i] + c, end - c, b, masks[i][(c - first) / 64]);
    }
    // After all rows: the parts of a mask have reached memory by now and load as one.
    for (int i = 0; i < n; ++i) found[i].append(masks[i], first, end);
  }
  std::int32_t most = 0;
  for (int i = 0; i < n; ++i) most = std::max(most, found[i].size());
  return most <= slots;
}

// The listed values of n rows as ranks, in any order; nothing in the slots past the end.
template <class A, int slots>
MOEROUTE_INLINE void rank_survivors(const float* const* rows, int n, index_t cols,
                                    const column_list<A, slots>* found,
                                    double (*rank_of_slot)[slots]) {
  constexpr int w = width<A>;
  alignas(alignment) std::int32_t column[w][slots];
  alignas(alignment) float value[w][slots];
  // Three loops, so that no wide load waits for the narrow stores just before it.
  for (int i = 0; i < n; ++i) {
    MOEROUTE_UNROLL
    for (int r = 0; r < slots / w; ++r) found[i].columns(r).store_aligned(column[i] + r * w);
  }
  pick<A, slots>(rows, n, cols, column, value);
  for (int i = 0; i < n; ++i) {
    MOEROUTE_UNROLL
    for (int r = 0; r < slots / w; ++r) {
      const vfloat<A> v = vfloat<A>::load_aligned(value[i] + r * w);
      const ranked<A> x = rank<A>(select<A>(found[i].in_list(r), v, vfloat<A>(minus_infinity)),
                                  vint<A>::load_aligned(column[i] + r * w));
      x.part[0].store_aligned(rank_of_slot[i] + r * w);
      x.part[1].store_aligned(rank_of_slot[i] + r * w + w / 2);
    }
  }
}

// False where a row has more survivors than slots; nothing has been written then.
template <class A, int K, int G, int slots>
[[gnu::noinline]] bool top_k_bound(const float* const* rows, index_t cols, int k, float* value,
                                   std::int32_t* column) {
  constexpr int w = width<A>, half = w / 2;
  alignas(alignment) float bound[w];
  // The largest negative float keeps -inf out where a row has fewer than k values.
  xsimd::max(column_bound<A, G, K>(rows, cols, k), vfloat<A>(std::numeric_limits<float>::lowest()))
      .store_aligned(bound);
  column_list<A, slots> found[w];
  if (!collect<A, slots>(rows, w, cols, bound, found)) return false;

  alignas(alignment) double rank_of_slot[w][slots];
  rank_survivors<A, slots>(rows, w, cols, found, rank_of_slot);
  constexpr int chunk = std::max(K, half);
  ranks<A, K> top;
  MOEROUTE_UNROLL
  for (int s = 0; s < slots; s += chunk) {
    ranks<A, K> run[chunk / K];
    MOEROUTE_UNROLL
    for (int j = 0; j < chunk; j += half) {
      MOEROUTE_UNROLL
      for (int part = 0; part < 2; ++part) {
        vdouble<A> x[half];
        MOEROUTE_UNROLL
        for (int i = 0; i < half; ++i)
          x[i] = vdouble<A>::load_aligned(&rank_of_slot[ranked<A>::lane(part, i)][s + j]);
        transpose<A>(x);
        MOEROUTE_UNROLL
        for (int i = 0; i < half; ++i) run[(j + i) / K].part[part][(j + i) % K] = x[i];
      }
    }
    MOEROUTE_UNROLL
    for (int j = 0; j < chunk / K; ++j) {
      sort(run[j]);
      if (s + j == 0) {
        top = run[0];
      } else {
        merge_keep_first(top, run[j]);
      }
    }
  }
  store_top(top, k, rows, value, column);
  return true;
}

}  // namespace detail

}  // namespace moeroute::simd
