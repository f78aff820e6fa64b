// The stable counting sort of small keys: rank, scan, place; and the same for a handful of keys in
// registers.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

namespace detail {

// Arches with which 16 keys fill a register that is gathered and scattered.
#if defined(__AVX512F__)
template <class A>
inline constexpr bool scatters_keys = std::derived_from<A, xsimd::avx512f>;
#else
template <class A>
inline constexpr bool scatters_keys = false;
#endif

// Of these the same register counts 64 values at once, in bytes.
#if defined(__AVX512BW__)
template <class A>
inline constexpr bool counts_in_bytes = std::derived_from<A, xsimd::avx512bw>;
#else
template <class A>
inline constexpr bool counts_in_bytes = false;
#endif

// Two neighbours in one load or store: the port that stores is what a counting sort waits for.
struct two_keys {
  std::uint32_t a, b;
};

// The half of a word that comes first in memory.
inline constexpr int first_half = std::endian::native == std::endian::little ? 0 : 32;

MOEROUTE_INLINE two_keys load_two(const std::int32_t* from) {
  std::uint64_t both;
  std::memcpy(&both, from, sizeof both);
  return {static_cast<std::uint32_t>(both >> first_half),
          static_cast<std::uint32_t>(both >> (32 - first_half))};
}

MOEROUTE_INLINE void store_two(std::uint32_t a, std::uint32_t b, std::int32_t* to) {
  const std::uint64_t both = std::uint64_t{a} << first_half | std::uint64_t{b} << (32 - first_half);
  std::memcpy(to, &both, sizeof both);
}

// Whether one of 16 keys is outside of [0, values).
template <class A>
MOEROUTE_INLINE bool any_outside(const std::int32_t* key, std::int32_t values) {
  using U = xsimd::batch<std::uint32_t, A>;
  const U limit(static_cast<std::uint32_t>(values));
  auto outside = U::load_unaligned(reinterpret_cast<const std::uint32_t*>(key)) >= limit;
  MOEROUTE_UNROLL
  for (int i = width<A>; i < 16; i += width<A>)
    outside =
        outside | (U::load_unaligned(reinterpret_cast<const std::uint32_t*>(key + i)) >= limit);
  return xsimd::any(outside);
}

}  // namespace detail

/// From so many keys on, what a counting sort writes is no longer all in the first-level cache.
inline constexpr index_t far_keys = 4096;

/// Whether every key is in [-1, values). Cost: one read of the keys.
template <class A = default_arch>
bool keys_in_range(const std::int32_t* key, index_t n, index_t values) {
  index_t i = 0;
  const auto fits = [&](index_t end) {
    for (; i < end; ++i)
      if (key[i] < -1 || key[i] >= values) return false;
    return true;
  };
  while (i + 16 <= n) {
    if (!detail::any_outside<A>(key + i, static_cast<std::int32_t>(values))) [[likely]]
      i += 16;
    else if (!fits(i + 16))
      return false;
  }
  return fits(n);
}

/// rank[i] becomes the number of keys before i that equal key[i], or -1 where key[i] is -1, and
/// count[v] the number of all keys that are v. Returns false, with neither complete, where a key is
/// outside of [-1, values).
///
/// rank may be the array of the keys. The lines of later[0, n), which will be written next and in
/// no order that the hardware foresees, are fetched along the way; null where nobody knows.
/// Cost: O(n + values), no allocation: two keys are read and two ranks written at a time, which
/// leaves the store port to the counters.
template <class A = default_arch>
bool rank_keys(const std::int32_t* key, index_t n, index_t values, std::int32_t* count,
               std::int32_t* rank, [[maybe_unused]] const std::int32_t* later = nullptr) {
  std::fill_n(count, values, 0);
  index_t i = 0;
  const auto one_by_one = [&](index_t end) {
    for (; i < end; ++i) {
      const std::int32_t v = key[i];
      if (static_cast<std::uint32_t>(v) < static_cast<std::uint32_t>(values)) {
        rank[i] = count[v]++;
      } else if (v == -1) {
        rank[i] = -1;
      } else {
        return false;
      }
    }
    return true;
  };
  while (i + 16 <= n) {
    if (detail::any_outside<A>(key + i, static_cast<std::int32_t>(values))) [[unlikely]] {
      if (!one_by_one(i + 16)) return false;
      continue;
    }
    if (later != nullptr) {
      MOEROUTE_PREFETCH_TO_WRITE(later + i);
      MOEROUTE_PREFETCH_TO_WRITE(rank + std::min(i + 512, n));
    }
    MOEROUTE_UNROLL
    for (int j = 0; j < 16; j += 2) {
      const detail::two_keys v = detail::load_two(key + i + j);
      const auto rank_a = static_cast<std::uint32_t>(count[v.a]++);
      const auto rank_b = static_cast<std::uint32_t>(count[v.b]++);
      detail::store_two(rank_a, rank_b, rank + i + j);
    }
    i += 16;
  }
  return one_by_one(n);
}

/// start[v] becomes the sum of count[u] over u < v, for v in [0, values]; returns the total.
/// start may be count itself, given room for one value more.
template <class A = default_arch>
std::int32_t exclusive_scan(const std::int32_t* count, index_t values, std::int32_t* start) {
  std::int32_t sum = 0;
  index_t v = 0;
#if defined(__AVX512F__)
  if constexpr (detail::scatters_keys<A>) {
    const __m512i zero = _mm512_setzero_si512(), last = _mm512_set1_epi32(15);
    __m512i before = zero;
    for (; v + 16 <= values; v += 16) {
      const __m512i n = _mm512_loadu_si512(count + v);
      __m512i up_to = _mm512_add_epi32(n, _mm512_alignr_epi32(n, zero, 15));
      up_to = _mm512_add_epi32(up_to, _mm512_alignr_epi32(up_to, zero, 14));
      up_to = _mm512_add_epi32(up_to, _mm512_alignr_epi32(up_to, zero, 12));
      up_to = _mm512_add_epi32(up_to, _mm512_alignr_epi32(up_to, zero, 8));
      up_to = _mm512_add_epi32(up_to, before);
      _mm512_storeu_si512(start + v, _mm512_sub_epi32(up_to, n));
      before = _mm512_permutexvar_epi32(last, up_to);
    }
    sum = _mm512_cvtsi512_si32(before);
  }
#endif
  for (; v < values; ++v) {
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

inline void place_keys_one_by_one(const std::int32_t* key, index_t n, groups g,
                                  const std::int32_t* start, std::int32_t* place,
                                  std::int32_t* group_at) {
  const auto one = [&](index_t i, std::int32_t group) MOEROUTE_INLINE_LAMBDA {
    if (place[i] < 0) return;
    const std::int32_t at = start[key[i]] + place[i];
    place[i] = at;
    group_at[at] = group;
  };
  const auto all = [&](index_t i, index_t end, auto&& group_of) MOEROUTE_INLINE_LAMBDA {
    for (; i + 2 <= end; i += 2) {
      const two_keys rank = load_two(place + i);
      if (static_cast<std::int32_t>(rank.a | rank.b) < 0) {
        one(i, group_of(i));
        one(i + 1, group_of(i + 1));
        continue;
      }
      const two_keys v = load_two(key + i);
      const auto at_a = static_cast<std::uint32_t>(start[v.a]) + rank.a;
      const auto at_b = static_cast<std::uint32_t>(start[v.b]) + rank.b;
      group_at[at_a] = group_of(i);
      group_at[at_b] = group_of(i + 1);
      store_two(at_a, at_b, place + i);
    }
    if (i < end) one(i, group_of(i));
  };
  if (g.list != nullptr)
    return all(0, n, [&](index_t i) MOEROUTE_INLINE_LAMBDA { return g.list[i]; });
  if (g.size <= 2)  // a loop for each group would cost more than what is in it
    return all(0, n, [&](index_t i) MOEROUTE_INLINE_LAMBDA {
      return static_cast<std::int32_t>(i >> (g.size - 1));
    });
  std::int32_t group = 0;
  for (index_t i = 0; i < n; i += g.size, ++group)
    all(i, std::min(i + g.size, n), [&](index_t) MOEROUTE_INLINE_LAMBDA { return group; });
}

#if defined(__AVX512F__)
// index / size of the indices from 0 on, 16 at a time, without a division for each.
struct group_counter {
  __m512i group, rest;
  const __m512i groups_per_step, rest_per_step, size;

  explicit group_counter(index_t n)
      : groups_per_step(_mm512_set1_epi32(static_cast<int>(16 / n))),
        rest_per_step(_mm512_set1_epi32(static_cast<int>(16 % n))),
        size(_mm512_set1_epi32(static_cast<int>(n))) {
    // Half-way between integers the quotient's rounding cannot reach one.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(lane), _mm512_set1_ps(0.5f));
    group = _mm512_cvttps_epi32(_mm512_div_ps(middle, _mm512_set1_ps(static_cast<float>(n))));
    rest = _mm512_sub_epi32(lane, _mm512_mullo_epi32(group, size));
  }
  MOEROUTE_INLINE void step() {
    group = _mm512_add_epi32(group, groups_per_step);
    rest = _mm512_add_epi32(rest, rest_per_step);
    const __mmask16 over = _mm512_cmpge_epi32_mask(rest, size);
    group = _mm512_mask_sub_epi32(group, over, group, _mm512_set1_epi32(-1));
    rest = _mm512_mask_sub_epi32(rest, over, rest, size);
  }
};

inline void place_keys_by_gather(const std::int32_t* key, index_t n, groups g,
                                 const std::int32_t* start, std::int32_t* place,
                                 std::int32_t* group_at) {
  group_counter counted(g.list != nullptr ? 1 : g.size);
  for (index_t i = 0; i < n; i += 16) {
    const auto there = static_cast<__mmask16>(n - i >= 16 ? 0xffffu : (1u << (n - i)) - 1);
    const __m512i rank = _mm512_maskz_loadu_epi32(there, place + i);
    const __mmask16 used = _mm512_mask_cmpge_epi32_mask(there, rank, _mm512_setzero_si512());
    const __m512i from = _mm512_mask_i32gather_epi32(
        _mm512_setzero_si512(), used, _mm512_maskz_loadu_epi32(there, key + i), start, 4);
    const __m512i at = _mm512_mask_add_epi32(rank, used, rank, from);
    _mm512_mask_storeu_epi32(place + i, there, at);
    const __m512i group =
        g.list != nullptr ? _mm512_maskz_loadu_epi32(there, g.list + i) : counted.group;
    _mm512_mask_i32scatter_epi32(group_at, used, at, group, 4);
    counted.step();
  }
}
#endif

}  // namespace detail

/// Places every index i < n: place[i], which holds its rank among equal keys, becomes
/// start[key[i]] + rank, and group_at[place[i]] the group of i; where the rank is -1 it stays.
///
/// Requires: start[key[i]] and the places are in range wherever the rank is not -1.
/// Cost: O(n), no allocation. Determinism: exact, stable.
template <class A = default_arch>
void place_keys(const std::int32_t* key, index_t n, groups g, const std::int32_t* start,
                std::int32_t* place, std::int32_t* group_at) {
  if (n == 0) return;
#if defined(__AVX512F__)
  // Of more keys the lines that 16 of them go to are no longer all in the first-level cache, and a
  // scatter waits for each: measured, the two are even at 2,000 keys, and at 32,000 one by one
  // takes 0.8 of the time.
  if constexpr (detail::scatters_keys<A>)
    if (n < far_keys) return detail::place_keys_by_gather(key, n, g, start, place, group_at);
#endif
  detail::place_keys_one_by_one(key, n, g, start, place, group_at);
}

/// Whether a sort of n keys is the work of a few registers: sort_few_keys takes them.
template <class A = default_arch>
constexpr bool are_few_keys(index_t n, index_t values) {
  // Of more keys the counters are ahead of the bytes of a word: measured, with and without the
  // shifts of those instruction sets.
  if (values <= 8) return n <= (detail::scatters_keys<A> ? 64 : 8);
  return detail::counts_in_bytes<A> && n <= 16 && values <= 256;
}

namespace detail {

// to[v] = byte v of a word, the lowest first, for v below n, which is 8 at most.
template <class A>
MOEROUTE_INLINE void store_bytes(std::uint64_t word, index_t n, std::int32_t* to) {
#if defined(__AVX2__) && defined(__x86_64__)
  if constexpr (width<A> >= 8 && !is_portable<A>) {
    if (n == 8) {
      const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(word));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_cvtepu8_epi32(bytes));
      return;
    }
  }
#endif
  for (index_t v = 0; v < n; ++v) to[v] = static_cast<std::int32_t>(word >> 8 * v & 255);
}

// Up to 255 keys below 8: their counters are the bytes of one word, which is there at once where a
// counter in memory has to be written before the next equal key can read it.
template <class A>
bool sort_in_bytes(const std::int32_t* key, index_t n, index_t values, groups g,
                   std::int32_t* start, std::int32_t* place, std::int32_t* group_at) {
  static constexpr std::uint64_t one[8] = {std::uint64_t{1},       std::uint64_t{1} << 8,
                                           std::uint64_t{1} << 16, std::uint64_t{1} << 24,
                                           std::uint64_t{1} << 32, std::uint64_t{1} << 40,
                                           std::uint64_t{1} << 48, std::uint64_t{1} << 56};
  std::uint64_t count = 0, odd = 0;
  index_t i = 0;
  for (; i + 16 <= n && !any_outside<A>(key + i, static_cast<std::int32_t>(values)); i += 16) {
    MOEROUTE_UNROLL
    for (int j = 0; j < 16; j += 2) {
      const two_keys v = load_two(key + i + j);
      count += one[v.a];
      odd += one[v.b];
    }
  }
  count += odd;
  for (; i < n; ++i) {
    const auto v = static_cast<std::uint32_t>(key[i]);
    if (v < static_cast<std::uint32_t>(values)) [[likely]]
      count += one[v];
    else if (key[i] != -1)
      return false;
  }
  // Byte v of the product is the sum of all bytes below v; none carries, as the last sum fits.
  std::uint64_t next = count * 0x0101010101010100u;
  store_bytes<A>(next, values, start);
  const auto total = static_cast<std::int32_t>(count * 0x0101010101010101u >> 56);
  start[values] = total;
  std::int32_t group = 0;
  index_t end = g.size;
  i = 0;
  const auto group_of = [&](index_t c) MOEROUTE_INLINE_LAMBDA {
    if (c == end) {
      ++group;
      end += g.size;
    }
    return g.list != nullptr ? g.list[c] : group;
  };
  const auto place_of = [&](std::uint32_t v) MOEROUTE_INLINE_LAMBDA {
    const auto at = static_cast<std::uint32_t>(next >> 8 * v & 255);
    next += one[v];
    return at;
  };
  if (total == n) {  // every key has a place
    for (; i + 2 <= n; i += 2) {
      const two_keys v = load_two(key + i);
      const std::uint32_t a = place_of(v.a), b = place_of(v.b);
      store_two(a, b, place + i);
      group_at[a] = group_of(i);
      group_at[b] = group_of(i + 1);
    }
  }
  for (; i < n; ++i) {
    const std::int32_t own = group_of(i);
    place[i] = -1;
    if (key[i] < 0) continue;
    place[i] = static_cast<std::int32_t>(place_of(static_cast<std::uint32_t>(key[i])));
    group_at[place[i]] = own;
  }
  return true;
}

#if defined(__AVX512BW__)
// start[v] = how many of n keys in [-1, values) are below v, -1 aside, for v below values, which
// are 256 at most. As a byte, -1 is the largest: below none.
template <class A>
MOEROUTE_OUT_OF_LINE void starts_in_bytes(const std::int32_t* key, index_t n, index_t values,
                                          std::int32_t* start) {
  alignas(alignment) static constexpr auto number = [] {
    std::array<std::uint8_t, 64> list{};
    for (std::size_t i = 0; i < list.size(); ++i) list[i] = static_cast<std::uint8_t>(i);
    return list;
  }();
  const __m512i first = _mm512_load_si512(number.data());
  for (index_t v = 0; v < values; v += 128) {
    const __m512i low = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(v)));
    const __m512i high = _mm512_add_epi8(low, _mm512_set1_epi8(64));
    alignas(alignment) std::uint8_t below[128];
    __m512i below_low = _mm512_setzero_si512(), below_high = below_low;
    for (index_t i = 0; i < n; ++i) {
      const __m512i k = _mm512_set1_epi8(static_cast<char>(key[i]));
      below_low = _mm512_sub_epi8(below_low, _mm512_movm_epi8(_mm512_cmplt_epu8_mask(k, low)));
      below_high = _mm512_sub_epi8(below_high, _mm512_movm_epi8(_mm512_cmplt_epu8_mask(k, high)));
    }
    _mm512_store_si512(below, below_low);
    _mm512_store_si512(below + 64, below_high);
    MOEROUTE_FORGET(below);
    for (index_t j = 0; j < 128 && v + j < values; j += 16) {
      const index_t left = values - v - j;
      const auto wanted = static_cast<__mmask16>(left >= 16 ? 0xffffu : (1u << left) - 1);
      _mm512_mask_storeu_epi32(
          start + v + j, wanted,
          _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(below + j))));
    }
  }
}
#endif

}  // namespace detail

/// The result of rank, scan and place without counters in memory: place, group_at and start
/// [values + 1]. Returns false, with none complete, where a key is outside of [-1, values).
///
/// Requires: n <= 16 and values <= 256, or n <= 255 and values <= 8. Cost: two short passes over
/// the keys; or, for more than 8 values, n comparisons of a register for ranks and one for each 64
/// values.
template <class A = default_arch>
bool sort_few_keys(const std::int32_t* key, index_t n, index_t values, groups g,
                   std::int32_t* start, std::int32_t* place, std::int32_t* group_at) {
  if (values <= 8) return detail::sort_in_bytes<A>(key, n, values, g, start, place, group_at);
#if defined(__AVX512BW__)
  if constexpr (detail::counts_in_bytes<A>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i one = _mm512_set1_epi32(1), none = _mm512_set1_epi32(-1);
    const auto there = static_cast<__mmask16>((1u << n) - 1);
    const __m512i mine = _mm512_mask_loadu_epi32(none, there, key);
    const __mmask16 used = _mm512_cmpneq_epi32_mask(mine, none);
    if (_mm512_mask_cmpge_epu32_mask(used, mine, _mm512_set1_epi32(static_cast<int>(values))) != 0)
        [[unlikely]]
      return false;
    // Unsigned, a key of -1 is greater than all others; equal ones are told apart by their index.
    const __m512i ordered = _mm512_or_si512(_mm512_slli_epi32(mine, 4), lane);
    __m512i rank = _mm512_setzero_si512(), other = rank;
    for (index_t i = 0; i < n; ++i, other = _mm512_add_epi32(other, one)) {
      const __mmask16 greater =
          _mm512_cmpgt_epu32_mask(ordered, _mm512_permutexvar_epi32(other, ordered));
      rank = _mm512_mask_add_epi32(rank, greater, rank, one);
    }
    _mm512_mask_storeu_epi32(place, there, _mm512_mask_mov_epi32(none, used, rank));
    if (g.list == nullptr && g.size >= n) {  // one group
      const auto slots = static_cast<__mmask16>((1u << __builtin_popcount(used)) - 1);
      _mm512_mask_storeu_epi32(group_at, slots, _mm512_setzero_si512());
    } else {
      const __m512i group = g.list != nullptr ? _mm512_maskz_loadu_epi32(there, g.list)
                                              : detail::group_counter(g.size).group;
      _mm512_mask_i32scatter_epi32(group_at, used, rank, group, 4);
    }
    detail::starts_in_bytes<A>(key, n, values, start);
    start[values] = __builtin_popcount(used);
    return true;
  }
#endif
  return rank_keys<A>(key, n, values, start, place) &&
         (exclusive_scan<A>(start, values, start), place_keys<A>(key, n, g, start, place, group_at),
          true);
}

}  // namespace moeroute::simd
