// Top-k by a bound: one comparison discards almost every column, a network sorts the rest.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/select/column_bound.hpp>
#include <moeroute/simd/select/compress.hpp>
#include <moeroute/simd/select/network.hpp>
#include <moeroute/simd/select/pick.hpp>
#include <moeroute/simd/select/ranked.hpp>

namespace moeroute::simd {

namespace detail {

// Which columns of [first, end) of n rows reach their row's bound, 64 in a mask.
template <class A, index_t words>
MOEROUTE_OUT_OF_LINE void mark_columns(const float* const* rows, int n, index_t first, index_t end,
                                       const float* bound, column_mask (*masks)[words]) {
  for (int i = 0; i < n; ++i) {
    const vfloat<A> b(bound[i]);
    for (index_t c = first; c < end; c += 64)
      mask_not_below<A>(rows[i] + c, end - c, b, masks[i][(c - first) / 64]);
  }
}

// The columns of n rows that reach their row's bound; returns how many the fullest row has, which
// may be more than slots.
template <class A, int slots>
MOEROUTE_INLINE std::int32_t collect(const float* const* rows, int n, index_t cols,
                                     const float* bound, column_list<A, slots>* found) {
  constexpr index_t panel = 1024;
  column_mask masks[width<A>][panel / 64];
  for (index_t first = 0; first < cols; first += panel) {
    const index_t end = std::min(first + panel, cols);
    mark_columns<A>(rows, n, first, end, bound, masks);
    // After all rows: the parts of a mask have reached memory by now and load as one.
    for (int i = 0; i < n; ++i) found[i].append(masks[i], first, end);
  }
  std::int32_t most = 0;
  for (int i = 0; i < n; ++i) most = std::max(most, found[i].size());
  return most;
}

// The first `used` listed values of n rows as ranks, in any order; nothing in the slots past the
// end.
template <class A, bool unrolled, int slots>
MOEROUTE_INLINE void rank_survivors(const float* const* rows, int n, index_t cols, int used,
                                    const column_list<A, slots>* found,
                                    double (*rank_of_slot)[slots]) {
  constexpr int w = width<A>;
  alignas(alignment) std::int32_t column[w][slots];
  alignas(alignment) float value[w][slots];
  // Three loops, so that no wide load waits for the narrow stores just before it.
  for (int i = 0; i < n; ++i)
    for_each_step<unrolled, w, slots>(
        used, [&](int s) { found[i].columns(s / w).store_aligned(column[i] + s); });
  pick<A, unrolled ? slots : 16>(rows, n, cols, used, column, value);
  for (int i = 0; i < n; ++i)
    for_each_step<unrolled, w, slots>(used, [&](int s) {
      const vfloat<A> v = vfloat<A>::load_aligned(value[i] + s);
      const ranked<A> x = rank<A>(select<A>(found[i].in_list(s / w), v, vfloat<A>(minus_infinity)),
                                  vint<A>::load_aligned(column[i] + s));
      x.part[0].store_aligned(rank_of_slot[i] + s);
      x.part[1].store_aligned(rank_of_slot[i] + s + w / 2);
    });
}

// The ranks of `slots` slots from `rank` on, a row's slots `stride` after another's, as a run of
// both halves of the rows has them.
template <class A, int slots>
MOEROUTE_INLINE void turn_slots(const double* rank, index_t stride, vdouble<A>* first_rows,
                                vdouble<A>* second_rows) {
  constexpr int half = width<A> / 2;
  MOEROUTE_UNROLL
  for (int j = 0; j < slots; j += half) {
    MOEROUTE_UNROLL
    for (int part = 0; part < 2; ++part) {
      vdouble<A> x[half];
      MOEROUTE_UNROLL
      for (int i = 0; i < half; ++i)
        x[i] = vdouble<A>::load_aligned(rank + ranked<A>::lane(part, i) * stride + j);
      transpose<A>(x);
      MOEROUTE_UNROLL
      for (int i = 0; i < half; ++i) (part == 0 ? first_rows : second_rows)[j + i] = x[i];
    }
  }
}

// The same once in the code, for runs that are in memory.
template <class A, int slots>
MOEROUTE_OUT_OF_LINE void turn_many_slots(const double* rank, index_t stride,
                                          vdouble<A>* first_rows, vdouble<A>* second_rows) {
  turn_slots<A, slots>(rank, stride, first_rows, second_rows);
}

// The k best of the listed values, none of which are in slots past `used`: sorted runs of slots are
// merged into the best K so far.
template <class A, int K, int slots>
MOEROUTE_INLINE void top_of_survivors(const float* const* rows, index_t cols, int used,
                                      const column_list<A, slots>* found, int k, float* value,
                                      std::int32_t* column) {
  constexpr int w = width<A>, length = std::min(K, 16);
  // More than 8 ranks and a run of as many are more than there are registers.
  constexpr bool unrolled = K <= 8;
  alignas(alignment) double rank_of_slot[w][slots];
  rank_survivors<A, unrolled>(rows, w, cols, used, found, rank_of_slot);
  ranks<A, K> top;
  for_each_step<unrolled, length, slots>(used, [&](int s) {
    ranks<A, length> run;
    if constexpr (unrolled) {
      turn_slots<A, length>(rank_of_slot[0] + s, slots, run.part[0], run.part[1]);
    } else {
      turn_many_slots<A, length>(rank_of_slot[0] + s, slots, run.part[0], run.part[1]);
    }
    sort(run);
    if (s > 0) {
      merge_keep_first(top, run);
    } else {
      for (int r = 0; r < K; ++r) top.set(r, r < length ? run.get(r) : rank_nothing<A>());
    }
  });
  store_top(top, k, rows, value, column);
}

// False where a row has more survivors than slots; nothing has been written then. Rows mostly have
// no more than `usual`.
template <class A, int K, int G, int slots, int usual = slots>
MOEROUTE_OUT_OF_LINE bool top_k_bound(const float* const* rows, index_t cols, int k, float* value,
                                      std::int32_t* column) {
  constexpr int w = width<A>;
  alignas(alignment) float bound[w];
  // The largest negative float keeps -inf out where a row has fewer than k values.
  xsimd::max(column_bound<A, G, K>(rows, cols, k), vfloat<A>(std::numeric_limits<float>::lowest()))
      .store_aligned(bound);
  column_list<A, slots> found[w];
  const std::int32_t most = collect<A, slots>(rows, w, cols, bound, found);
  if (most > slots) return false;
  top_of_survivors<A, K>(rows, cols, most <= usual ? usual : slots, found, k, value, column);
  return true;
}

}  // namespace detail

}  // namespace moeroute::simd
