// A value that at least k columns of each row reach, found without selecting anything.
#pragma once

#include <algorithm>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/select/network.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

namespace detail {

// `width` rows of as many values, one row per lane: once in the code, for those that are in memory.
template <class A>
MOEROUTE_OUT_OF_LINE void turn_maxima(const float* group, index_t stride, vfloat<A>* x) {
  MOEROUTE_UNROLL
  for (int i = 0; i < width<A>; ++i) x[i] = vfloat<A>::load_aligned(group + i * stride);
  transpose<A>(x);
}

}  // namespace detail

/// For each of `width` rows a lower bound of its k-th largest value, one row per lane.
///
/// The columns fall into G groups (c modulo G). The k-th largest of the G group maxima is a bound,
/// as k different columns reach it; about k + k^2 / 2G columns do. -inf where fewer than k groups
/// have a value. Requires: k <= K <= G, both powers of two, G a multiple of width. Cost: one pass
/// over the rows and a network of G registers.
template <class A, int G, int K>
MOEROUTE_INLINE vfloat<A> column_bound(const float* const* rows, index_t cols, int k) {
  constexpr int w = width<A>, registers = G / w;
  static_assert(G % w == 0 && K <= G);
  alignas(alignment) float group[w * G];
  for (int i = 0; i < w; ++i) {
    const float* const row = rows[i];
    vfloat<A> most[registers];
    for (auto& m : most) m = vfloat<A>(minus_infinity);
    index_t c = 0;
    for (; c + G <= cols; c += G) {
      MOEROUTE_UNROLL
      for (int r = 0; r < registers; ++r)
        most[r] = max_or_second<A>(load<A>(row + c + r * w), most[r]);
    }
    MOEROUTE_UNROLL
    for (int r = 0; r < registers; ++r) {
      if (c < cols)
        most[r] = max_or_second<A>(
            load_first<A>(row + c, std::min<index_t>(cols - c, w), minus_infinity), most[r]);
      c += w;
    }
    MOEROUTE_UNROLL
    for (int r = 0; r < registers; ++r) most[r].store_aligned(group + i * G + r * w);
  }
  // More than 8 maxima and a run of as many are more than there are registers.
  constexpr bool unrolled = K <= 8;
  constexpr int chunk = std::max(K, w);
  vfloat<A> top[K], least(minus_infinity);
  detail::for_each_step<unrolled, chunk, G>(G, [&](int g) MOEROUTE_INLINE_LAMBDA {
    vfloat<A> x[chunk];
    detail::for_each_step<unrolled, w, chunk>(chunk, [&](int h) MOEROUTE_INLINE_LAMBDA {
      if constexpr (unrolled) {
        MOEROUTE_UNROLL
        for (int i = 0; i < w; ++i) x[h + i] = vfloat<A>::load_aligned(group + i * G + g + h);
        transpose<A>(x + h);
      } else {
        detail::turn_maxima<A>(group + g + h, G, x + h);
      }
    });
    MOEROUTE_UNROLL
    for (int h = 0; h < chunk; h += K) {
      sort<K>(x + h);
      if (g + h == 0) {
        std::copy_n(x, K, top);
      } else if (g + h + K == G && k == K) {
        least = last_of_merged<K>(top, x + h);
      } else {
        merge_keep_first<K>(top, x + h);
      }
    }
  });
  return k == K ? least : top[k - 1];
}

}  // namespace moeroute::simd
