#include <moeroute/simd/network.hpp>

#include <algorithm>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/simd/ranked.hpp>
#include <utility>
#include <vector>

#include "support/arches.hpp"
#include "support/random.hpp"

using namespace moeroute;

namespace {

using pair = std::pair<float, int>;  // value, column

bool goes_before(const pair& a, const pair& b) {
  return a.first > b.first || (a.first == b.first && a.second < b.second);
}

template <class A>
pair lane(const simd::ranked<A>& x, int i) {
  simd::vfloat<A> value;
  simd::vint<A> column;
  simd::unrank<A>(x, value, column);
  return {value.get(static_cast<std::size_t>(i)), column.get(static_cast<std::size_t>(i))};
}

// A network sorts everything where it sorts all zeros and ones (Knuth), so the index networks are
// proven here.
template <const auto& network, int n>
bool sorts_zeros_and_ones() {
  for (std::uint32_t pattern = 0; pattern < (1u << n); ++pattern) {
    std::uint32_t bits = pattern;
    for (const auto c : network)
      if ((bits >> c.low & 1u) < (bits >> c.high & 1u)) bits ^= (1u << c.low) | (1u << c.high);
    if ((bits & (bits + 1)) != 0) return false;  // ones first
  }
  return true;
}

template <class A, int n>
void check_sort_and_merge() {
  test::random rng(static_cast<std::uint64_t>(n));
  constexpr int w = simd::width<A>;
  bool sorted = true, merged = true;
  for (int round = 0; round < 50; ++round) {
    simd::ranked<A> x[n], y[n];
    std::vector<std::vector<pair>> a(w), b(w);
    alignas(alignment) float value[w];
    const auto fill = [&](simd::ranked<A>* to, std::vector<std::vector<pair>>& copy, int first) {
      for (int j = 0; j < n; ++j) {
        for (int i = 0; i < w; ++i) {
          value[i] = static_cast<float>(rng.below(6));  // ties; the column decides
          copy[static_cast<std::size_t>(i)].emplace_back(value[i], first + j);
        }
        to[j] = simd::rank<A>(simd::vfloat<A>::load_aligned(value), simd::vint<A>(first + j));
      }
    };
    fill(x, a, 0);
    fill(y, b, n);
    simd::sort<A, n>(x);
    simd::sort<A, n>(y);
    for (int i = 0; i < w; ++i) {
      auto& expected = a[static_cast<std::size_t>(i)];
      std::sort(expected.begin(), expected.end(), goes_before);
      for (int j = 0; j < n; ++j)
        sorted &= lane<A>(x[j], i) == expected[static_cast<std::size_t>(j)];
    }
    simd::merge_keep_first<A, n>(x, y);
    for (int i = 0; i < w; ++i) {
      auto& expected = a[static_cast<std::size_t>(i)];
      const auto& other = b[static_cast<std::size_t>(i)];
      expected.insert(expected.end(), other.begin(), other.end());
      std::sort(expected.begin(), expected.end(), goes_before);
      for (int j = 0; j < n; ++j)
        merged &= lane<A>(x[j], i) == expected[static_cast<std::size_t>(j)];
    }
  }
  INFO("n = " << n);
  CHECK(sorted);
  CHECK(merged);
}

}  // namespace

TEST_CASE("the sorting networks sort all zeros and ones") {
  CHECK(sorts_zeros_and_ones<simd::detail::batcher_network<2>, 2>());
  CHECK(sorts_zeros_and_ones<simd::detail::batcher_network<4>, 4>());
  CHECK(sorts_zeros_and_ones<simd::detail::batcher_network<8>, 8>());
  CHECK(sorts_zeros_and_ones<simd::detail::batcher_network<16>, 16>());
}

TEMPLATE_LIST_TEST_CASE("sort and merge put values descending, columns ascending among equals", "",
                        test::widths) {
  check_sort_and_merge<TestType, 1>();
  check_sort_and_merge<TestType, 4>();
  check_sort_and_merge<TestType, 16>();
  check_sort_and_merge<TestType, 32>();
}
