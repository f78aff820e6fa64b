// Sorting networks on registers, one row per lane: what goes first moves to the front.
#pragma once

#include <array>
#include <cstddef>
#include <utility>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Puts the larger value into a, the smaller into b. No NaN.
template <class A>
MOEROUTE_INLINE void exchange(vfloat<A>& a, vfloat<A>& b) {
  const vfloat<A> first = a;
  a = xsimd::max(first, b);
  b = xsimd::min(first, b);
}

/// Puts the larger value into a. No NaN.
template <class A>
MOEROUTE_INLINE void keep_first(vfloat<A>& a, const vfloat<A>& b) {
  a = xsimd::max(a, b);
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
        for (int i = j; i < j + k && i + k < n; ++i)
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

template <class A, const auto& network, class T, std::size_t... s>
MOEROUTE_INLINE void run_unrolled(T* x, std::index_sequence<s...>) {
  (exchange<A>(x[network[s].low], x[network[s].high]), ...);
}

// Small networks are unrolled into registers; large ones work in L1 and would only bloat the code.
template <class A, const auto& network, class T>
MOEROUTE_INLINE void run_network(T* x) {
  if constexpr (network.size() <= 64) {
    run_unrolled<A, network>(x, std::make_index_sequence<network.size()>{});
  } else {
    for (const comparator c : network) exchange<A>(x[c.low], x[c.high]);
  }
}

}  // namespace detail

/// Sorts n = 2^m elements.
template <class A, int n, class T>
MOEROUTE_INLINE void sort(T* x) {
  if constexpr (n > 1) detail::run_network<A, detail::batcher_network<n>>(x);
}

/// Merges two sorted runs of n = 2^m elements; top keeps the n that go first, sorted.
template <class A, int n, class T>
MOEROUTE_INLINE void merge_keep_first(T* top, const T* run) {
  MOEROUTE_UNROLL
  for (int i = 0; i < n; ++i) keep_first<A>(top[i], run[n - 1 - i]);
  if constexpr (n > 1) detail::run_network<A, detail::bitonic_clean_network<n>>(top);
}

}  // namespace moeroute::simd
