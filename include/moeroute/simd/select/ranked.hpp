// A value and its column as one number: the larger number goes first, and no two are equal.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/select/network.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

/// One (value, column) in each lane of a block of rows, as doubles whose order is ours: value
/// descending, then column ascending.
///
/// The float's bits are the upper half of a double, the column the lower half, so that one max and
/// one min replace a lexicographic comparison and four blends, and ties cannot happen. -0 is filed
/// as +0 (its sign comes back from the row, see restore_zeros), values are never NaN, and the
/// exponent is raised by one so that no key is denormal: flush-to-zero modes cannot make two keys
/// equal.
template <class A>
struct ranked {
  vdouble<A> part[2];

  /// The lane of the block that lane i of part p stands for.
  static constexpr int lane(int p, int i) { return i / 2 * 4 + 2 * p + i % 2; }
};

namespace detail {

inline constexpr std::int32_t rank_offset = 0x00100000;

// The lanes of one part, each low word beside its high word.
template <class A, int part, class R, std::size_t... j>
MOEROUTE_INLINE R zipped(R low, R high, std::index_sequence<j...>) {
  constexpr int w = sizeof...(j);
  return __builtin_shufflevector(
      low, high, (ranked<A>::lane(part, static_cast<int>(j) / 2) + (j % 2 ? w : 0))...);
}

// The inverse: even words (0) or odd words (1) of both parts.
template <int odd, class R, std::size_t... j>
MOEROUTE_INLINE R unzipped(R first, R second, std::index_sequence<j...>) {
  constexpr int w = sizeof...(j);
  return __builtin_shufflevector(
      first, second, (static_cast<int>(j / 4 * 4 + j % 2 * 2 + odd) + (j % 4 / 2 ? w : 0))...);
}

// Ranks of their lower and upper words, and back. Without registers a lane at a time, whatever the
// order of the words in memory is.
template <class A>
MOEROUTE_INLINE ranked<A> joined_words(vint<A> low, vint<A> high) {
  constexpr int w = width<A>;
  if constexpr (is_portable<A>) {
    alignas(alignment) std::int32_t l[w], h[w];
    alignas(alignment) double rank[2][w / 2];
    low.store_aligned(l);
    high.store_aligned(h);
    for (int p = 0; p < 2; ++p)
      for (int i = 0; i < w / 2; ++i) {
        const int lane = ranked<A>::lane(p, i);
        rank[p][i] =
            std::bit_cast<double>(std::uint64_t{static_cast<std::uint32_t>(h[lane])} << 32 |
                                  static_cast<std::uint32_t>(l[lane]));
      }
    return {{vdouble<A>::load_aligned(rank[0]), vdouble<A>::load_aligned(rank[1])}};
  } else {
    using words = typename vfloat<A>::register_type;
    constexpr auto lanes = std::make_index_sequence<static_cast<std::size_t>(w)>{};
    const words l = bits_as<float>(low), h = bits_as<float>(high);
    return {{bits_as<double>(vfloat<A>(zipped<A, 0>(l, h, lanes))),
             bits_as<double>(vfloat<A>(zipped<A, 1>(l, h, lanes)))}};
  }
}

template <class A>
MOEROUTE_INLINE void split_words(const ranked<A>& x, vint<A>& low, vint<A>& high) {
  constexpr int w = width<A>;
  if constexpr (is_portable<A>) {
    alignas(alignment) std::int32_t l[w], h[w];
    alignas(alignment) double rank[w / 2];
    for (int p = 0; p < 2; ++p) {
      x.part[p].store_aligned(rank);
      for (int i = 0; i < w / 2; ++i) {
        const auto bits = std::bit_cast<std::uint64_t>(rank[i]);
        l[ranked<A>::lane(p, i)] = static_cast<std::int32_t>(bits);
        h[ranked<A>::lane(p, i)] = static_cast<std::int32_t>(bits >> 32);
      }
    }
    low = vint<A>::load_aligned(l);
    high = vint<A>::load_aligned(h);
  } else {
    using words = typename vfloat<A>::register_type;
    constexpr auto lanes = std::make_index_sequence<static_cast<std::size_t>(w)>{};
    const words first = bits_as<float>(x.part[0]);
    const words second = bits_as<float>(x.part[1]);
    low = bits_as<std::int32_t>(vfloat<A>(unzipped<0>(first, second, lanes)));
    high = bits_as<std::int32_t>(vfloat<A>(unzipped<1>(first, second, lanes)));
  }
}

}  // namespace detail

/// Requires: values are not NaN; columns are in [-1, 2^20).
template <class A>
MOEROUTE_INLINE ranked<A> rank(vfloat<A> value, vint<A> column) {
  const vint<A> bits = bits_as<std::int32_t>(value + vfloat<A>(0.0f));
  // A larger lower half makes a positive double larger and a negative one smaller.
  return detail::joined_words<A>(~column ^ (bits >> 31), bits + vint<A>(detail::rank_offset));
}

/// The value (zeros without their sign) and the column of every lane.
template <class A>
MOEROUTE_INLINE void unrank(const ranked<A>& x, vfloat<A>& value, vint<A>& column) {
  vint<A> low, high;
  detail::split_words<A>(x, low, high);
  const vint<A> bits = high - vint<A>(detail::rank_offset);
  value = bits_as<float>(bits);
  column = ~(low ^ (bits >> 31));
}

/// n ranks of every row of the block. The two halves of the rows are apart, so that each is sorted
/// alone and twice as many ranks fit into the registers.
template <class A, int n>
struct ranks {
  vdouble<A> part[2][n];

  MOEROUTE_INLINE void set(int r, const ranked<A>& x) {
    part[0][r] = x.part[0];
    part[1][r] = x.part[1];
  }
  MOEROUTE_INLINE ranked<A> get(int r) const { return {{part[0][r], part[1][r]}}; }
};

namespace detail {

// f(0), f(1): twice in the code only where n ranks may stay in registers.
template <int n, class F>
MOEROUTE_INLINE void for_both_parts(F&& f) {
  if constexpr (n > largest_unrolled) {
    for (int h = 0; h < 2; ++h) f(h);
  } else {
    f(0);
    f(1);
  }
}

}  // namespace detail

/// Sorts n = 2^m ranks.
template <class A, int n>
MOEROUTE_INLINE void sort(ranks<A, n>& x) {
  detail::for_both_parts<n>([&](int h) { sort<n>(x.part[h]); });
}

/// Merges sorted runs of n = 2^m and r <= n ranks; top keeps the n that go first, sorted.
template <class A, int n, int r>
MOEROUTE_INLINE void merge_keep_first(ranks<A, n>& top, const ranks<A, r>& run) {
  detail::for_both_parts<n>([&](int h) { merge_keep_first<n, r>(top.part[h], run.part[h]); });
}

/// What goes after everything that can be selected.
template <class A>
MOEROUTE_INLINE ranked<A> rank_nothing() {
  return rank<A>(vfloat<A>(minus_infinity), vint<A>(no_expert));
}

/// Ranks r < k of a block's lanes, rank-major: (-inf, no_expert) where a row has nothing left to
/// select.
///
/// rows[i] is the row in lane i, from which zeros take their sign back.
template <class A, int n>
MOEROUTE_INLINE void store_top(const ranks<A, n>& top, int k, const float* const* rows,
                               float* value, std::int32_t* column) {
  vmask<A> zeros(false);
  for (int r = 0; r < k; ++r) {
    vfloat<A> v;
    vint<A> c;
    unrank<A>(top.get(r), v, c);
    zeros = zeros | (v == vfloat<A>(0.0f));
    v.store_unaligned(value + r * block_rows);
    select<A>(v > vfloat<A>(minus_infinity), c, vint<A>(no_expert))
        .store_unaligned(column + r * block_rows);
  }
  if (xsimd::any(zeros)) [[unlikely]] {
    for (int r = 0; r < k; ++r) {
      for (int i = 0; i < width<A>; ++i) {
        const int at = r * block_rows + i;
        if (value[at] == 0.0f) value[at] = rows[i][column[at]];
      }
    }
  }
}

}  // namespace moeroute::simd
