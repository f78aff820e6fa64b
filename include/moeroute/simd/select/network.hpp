// Sorting networks on registers, one row per lane: what goes first moves to the front.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Puts the larger value into a, the smaller into b. No NaN.
template <class T, class A>
MOEROUTE_INLINE void exchange(xsimd::batch<T, A>& a, xsimd::batch<T, A>& b) {
  const xsimd::batch<T, A> first = a;
  a = xsimd::max(first, b);
  b = xsimd::min(first, b);
}

namespace detail {

struct comparator {
  int low, high;
};

// Batcher's odd-even merge sort of n = 2^m (K. E. Batcher, 1968): calls f(i, j), i < j.
template <class F>
constexpr void batcher(int n, F f) {
  for (int p = 1; p < n; p *= 2)
    for (int k = p; k >= 1; k /= 2)
      for (int j = k % p; j + k < n; j += 2 * k)
        for (int i = j; i < j + k; ++i)
          if (i / (2 * p) == (i + k) / (2 * p)) f(i, i + k);
}

// The half-cleaners that sort a bitonic run of n = 2^m.
template <class F>
constexpr void bitonic_clean(int n, F f) {
  for (int k = n / 2; k >= 1; k /= 2)
    for (int j = 0; j < n; j += 2 * k)
      for (int i = j; i < j + k; ++i) f(i, i + k);
}

constexpr int batcher_size(int n) {
  int count = 0;
  batcher(n, [&](int, int) { ++count; });
  return count;
}

constexpr int bitonic_clean_size(int n) {
  int count = 0;
  bitonic_clean(n, [&](int, int) { ++count; });
  return count;
}

template <int n>
inline constexpr auto batcher_network = [] {
  std::array<comparator, static_cast<std::size_t>(batcher_size(n))> list{};
  std::size_t at = 0;
  batcher(n, [&](int i, int j) { list[at++] = {i, j}; });
  return list;
}();

template <int n>
inline constexpr auto bitonic_clean_network = [] {
  std::array<comparator, static_cast<std::size_t>(bitonic_clean_size(n))> list{};
  std::size_t at = 0;
  bitonic_clean(n, [&](int i, int j) { list[at++] = {i, j}; });
  return list;
}();

// Networks of more registers than any machine has are built from these, which are not repeated in
// the code.
inline constexpr int largest_unrolled = 16;

template <const auto& network, class V, std::size_t... s>
MOEROUTE_INLINE void run_network(V* x, std::index_sequence<s...>) {
  (exchange(x[network[s].low], x[network[s].high]), ...);
}

template <const auto& network, class V>
MOEROUTE_INLINE void run_network(V* x) {
  run_network<network>(x, std::make_index_sequence<network.size()>{});
}

template <const auto& network, class V>
MOEROUTE_OUT_OF_LINE void call_network(V* x) {
  run_network<network>(x);
}

// f(s) for s = 0, step, ... below `used`: twice and more in the code only where all of it may stay
// in registers.
template <bool unrolled, int step, int most, class F>
MOEROUTE_INLINE void for_each_step(int used, F&& f) {
  if constexpr (unrolled) {
    MOEROUTE_UNROLL
    for (int s = 0; s < most; s += step) f(s);
  } else {
    for (int s = 0; s < used; s += step) f(s);
  }
}

// f(i) for i in [0, n), n = 2^m: eight times in the code where n registers are in memory anyway.
template <int n, class F>
MOEROUTE_INLINE void for_each_of(F&& f) {
  constexpr int step = n > largest_unrolled ? 8 : n;
  for (int i = 0; i < n; i += step) {
    MOEROUTE_UNROLL
    for (int j = 0; j < step; ++j) f(i + j);
  }
}

// Sorts a bitonic run.
template <int n, class V>
MOEROUTE_INLINE void clean(V* x) {
  if constexpr (n > largest_unrolled) {
    for (int i = 0; i < n / 2; ++i) exchange(x[i], x[n / 2 + i]);
    for (int half = 0; half < 2; ++half) clean<n / 2>(x + half * (n / 2));
  } else if constexpr (n == largest_unrolled) {
    call_network<bitonic_clean_network<n>>(x);
  } else if constexpr (n > 1) {
    run_network<bitonic_clean_network<n>>(x);
  }
}

}  // namespace detail

/// Sorts n = 2^m registers, lane by lane, the largest first.
template <int n, class V>
MOEROUTE_INLINE void sort(V* x) {
  if constexpr (n > detail::largest_unrolled) {
    for (int half = 0; half < 2; ++half) sort<n / 2>(x + half * (n / 2));
    for (int i = 0; i < n / 2; ++i) exchange(x[i], x[n - 1 - i]);
    for (int half = 0; half < 2; ++half) detail::clean<n / 2>(x + half * (n / 2));
  } else if constexpr (n == detail::largest_unrolled) {
    detail::call_network<detail::batcher_network<n>>(x);
  } else if constexpr (n > 1) {
    detail::run_network<detail::batcher_network<n>>(x);
  }
}

/// Merges sorted runs of n = 2^m and r <= n registers; top keeps the n largest, sorted.
template <int n, int r = n, class V>
MOEROUTE_INLINE void merge_keep_first(V* top, const V* run) {
  detail::for_each_of<r>([&](int i) MOEROUTE_INLINE_LAMBDA {
    top[n - r + i] = xsimd::max(top[n - r + i], run[r - 1 - i]);
  });
  detail::clean<n>(top);
}

/// The n-th largest of two sorted runs of n registers.
template <int n, class V>
MOEROUTE_INLINE V last_of_merged(const V* first, const V* second) {
  V least = xsimd::max(first[0], second[n - 1]);
  detail::for_each_of<n>([&](int i) MOEROUTE_INLINE_LAMBDA {
    least = xsimd::min(least, xsimd::max(first[i], second[n - 1 - i]));
  });
  return least;
}

}  // namespace moeroute::simd
