// The stable counting sort of small keys: check, count, scan, place; and a sort of up to 16 keys
// without counters.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512VPOPCNTDQ__)
#include <immintrin.h>
#endif

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Whether every key is in [-1, values). Cost: one read of the keys.
template <class A = default_arch>
bool keys_in_range(const std::int32_t* key, index_t n, index_t values) {
  constexpr int w = width<A>;
  std::int32_t least = 0, greatest = -1;
  index_t i = 0;
  if (n >= 2 * w) {
    vint<A> low(0), high(-1), low2(0), high2(-1);
    for (; i + 2 * w <= n; i += 2 * w) {
      const vint<A> a = load<A>(key + i), b = load<A>(key + i + w);
      low = xsimd::min(low, a);
      high = xsimd::max(high, a);
      low2 = xsimd::min(low2, b);
      high2 = xsimd::max(high2, b);
    }
    low = xsimd::min(low, low2);
    high = xsimd::max(high, high2);
    alignas(alignment) std::int32_t lows[w], highs[w];
    low.store_aligned(lows);
    high.store_aligned(highs);
    for (int j = 0; j < w; ++j) {
      least = std::min(least, lows[j]);
      greatest = std::max(greatest, highs[j]);
    }
  }
  for (; i < n; ++i) {
    least = std::min(least, key[i]);
    greatest = std::max(greatest, key[i]);
  }
  return least >= -1 && greatest < values;
}

/// count[v] becomes the number of i < n with key[i] == v; negative keys are skipped.
///
/// Requires: every key is below `values`. Cost: O(n + values), no allocation.
inline void count_keys(const std::int32_t* key, index_t n, index_t values, std::int32_t* count) {
  std::fill_n(count, values, 0);
  for (index_t i = 0; i < n; ++i)
    if (key[i] >= 0) ++count[key[i]];
}

/// start[v] becomes the sum of count[u] over u < v, for v in [0, values]; returns the total.
/// start may be count itself, given room for one value more.
inline std::int32_t exclusive_scan(const std::int32_t* count, index_t values, std::int32_t* start) {
  std::int32_t sum = 0;
  for (index_t v = 0; v < values; ++v) {
    const std::int32_t n = count[v];
    start[v] = sum;
    sum += n;
  }
  start[values] = sum;
  return sum;
}

/// The group of every index: a list, or index / size for groups of one size.
struct groups {
  const std::int32_t* list;
  index_t size;
};

namespace detail {

template <class A>
void place_keys_from(index_t first, const std::int32_t* key, index_t n, groups g,
                     std::int32_t* cursor, std::int32_t* place, std::int32_t* group_at) {
  index_t group = g.list != nullptr ? 0 : first / g.size;
  index_t next = g.list != nullptr ? n : (group + 1) * g.size;
  for (index_t i = first; i < n; ++i) {
    if (i == next) {
      ++group;
      next += g.size;
    }
    const std::int32_t v = key[i];
    if (v < 0) {
      place[i] = -1;
    } else {
      const std::int32_t at = cursor[v]++;
      place[i] = at;
      group_at[at] = g.list != nullptr ? g.list[i] : static_cast<std::int32_t>(group);
    }
  }
}

#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512VPOPCNTDQ__)
template <class A>
inline constexpr bool has_conflict_detection = std::derived_from<A, xsimd::avx512cd>;

// 16 keys at a time: a key's place is its counter plus the number of equal keys before it among the
// 16. Of several lanes that scatter to one counter the highest wins, and it has the largest place.
template <class A>
void place_keys_by_conflict(const std::int32_t* key, index_t n, groups g, std::int32_t* cursor,
                            std::int32_t* place, std::int32_t* group_at) {
  const __m512i one = _mm512_set1_epi32(1), none = _mm512_set1_epi32(-1);
  alignas(alignment) std::int32_t quotient[16], remainder[16];
  const index_t size = g.list != nullptr ? 1 : g.size;
  for (int lane = 0; lane < 16; ++lane) {
    quotient[lane] = static_cast<std::int32_t>(lane / size);
    remainder[lane] = static_cast<std::int32_t>(lane % size);
  }
  __m512i group = _mm512_load_si512(quotient), rest = _mm512_load_si512(remainder);
  const __m512i groups_per_step = _mm512_set1_epi32(static_cast<int>(16 / size));
  const __m512i rest_per_step = _mm512_set1_epi32(static_cast<int>(16 % size));
  const __m512i whole = _mm512_set1_epi32(static_cast<int>(size));
  index_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m512i v = _mm512_loadu_si512(key + i);
    const __mmask16 used = _mm512_cmpgt_epi32_mask(v, none);
    const __m512i at = _mm512_mask_i32gather_epi32(none, used, v, cursor, 4);
    const __m512i before = _mm512_popcnt_epi32(_mm512_conflict_epi32(v));
    const __m512i mine = _mm512_mask_add_epi32(none, used, at, before);
    _mm512_storeu_si512(place + i, mine);
    if (g.list != nullptr) group = _mm512_loadu_si512(g.list + i);
    _mm512_mask_i32scatter_epi32(group_at, used, mine, group, 4);
    _mm512_mask_i32scatter_epi32(cursor, used, v, _mm512_add_epi32(mine, one), 4);
    group = _mm512_add_epi32(group, groups_per_step);
    rest = _mm512_add_epi32(rest, rest_per_step);
    const __mmask16 over = _mm512_cmpge_epi32_mask(rest, whole);
    group = _mm512_mask_add_epi32(group, over, group, one);
    rest = _mm512_mask_sub_epi32(rest, over, rest, whole);
  }
  place_keys_from<A>(i, key, n, g, cursor, place, group_at);
}
#else
template <class A>
inline constexpr bool has_conflict_detection = false;
#endif

}  // namespace detail

/// Places every index i < n behind the earlier ones of its key: place[i] = cursor[key[i]]++ and
/// group_at[place[i]] = group of i; place[i] = -1 where the key is negative.
///
/// place may be the array of the keys. Requires: cursors of different keys never meet.
/// Cost: O(n), no allocation. Determinism: exact, stable.
template <class A = default_arch>
void place_keys(const std::int32_t* key, index_t n, groups g, std::int32_t* cursor,
                std::int32_t* place, std::int32_t* group_at) {
#if defined(__AVX512F__) && defined(__AVX512CD__) && defined(__AVX512VPOPCNTDQ__)
  if constexpr (detail::has_conflict_detection<A>)
    return detail::place_keys_by_conflict<A>(key, n, g, cursor, place, group_at);
#endif
  detail::place_keys_from<A>(0, key, n, g, cursor, place, group_at);
}

/// Most keys that sort_few_keys takes.
inline constexpr int few_keys = 16;

/// The same result without counters, for up to 16 keys below 2^20: place, group_at and start
/// [values + 1] as count, scan and place leave them. Returns the number of keys that are not
/// negative.
///
/// Cost: n comparisons of registers, and the writing of start.
template <class A = default_arch>
std::int32_t sort_few_keys(const std::int32_t* key, int n, index_t values, groups g,
                           std::int32_t* start, std::int32_t* place, std::int32_t* group_at) {
  constexpr int w = width<A>;
  constexpr std::int32_t last = std::numeric_limits<std::int32_t>::max();
  alignas(alignment) std::int32_t packed[few_keys], rank[few_keys], sorted[few_keys];
  std::int32_t used = 0;
  for (int i = 0; i < few_keys; ++i) {
    const bool present = i < n && key[i] >= 0;
    packed[i] = present ? key[i] << 4 | i : last;
    used += present ? 1 : 0;
  }
  for (int lane = 0; lane < few_keys; lane += w) {
    const vint<A> mine = vint<A>::load_aligned(packed + lane);
    vint<A> smaller(0);
    for (int i = 0; i < n; ++i)
      smaller += xsimd::select(mine > vint<A>(packed[i]), vint<A>(1), vint<A>(0));
    smaller.store_aligned(rank + lane);
  }
  for (int i = 0; i < n; ++i) {
    if (packed[i] == last) {
      place[i] = -1;
      continue;
    }
    sorted[rank[i]] = packed[i] >> 4;
    place[i] = rank[i];
    group_at[rank[i]] =
        g.list != nullptr ? g.list[i] : static_cast<std::int32_t>(index_t{i} / g.size);
  }
  // start[v] counts the keys below v: a staircase, whose steps may be written too long, because the
  // next step comes behind.
  index_t v = 0;
  for (std::int32_t below = 0; below <= used; ++below) {
    const index_t end = below < used ? index_t{sorted[below]} + 1 : values + 1;
    index_t at = v;
    for (; at < end && at + w <= values + 1; at += w) vint<A>(below).store_unaligned(start + at);
    for (; at < end; ++at) start[at] = below;
    v = end;
  }
  return used;
}

}  // namespace moeroute::simd
