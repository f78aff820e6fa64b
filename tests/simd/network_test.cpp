#include <moeroute/simd/select/network.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
#include <moeroute/simd/select/ranked.hpp>
#include <vector>

#include "support/arches.hpp"
#include "support/random.hpp"

using namespace moeroute;

namespace {

// A network sorts everything where it sorts all zeros and ones (Knuth), so the index networks are
// proven here. A bitonic one has to sort those whose ones are neighbours in a ring.
template <class Network>
bool sorts_zeros_and_ones(const Network& network, int n, bool bitonic = false) {
  for (std::uint32_t pattern = 0; pattern < (1u << n); ++pattern) {
    std::uint32_t bits = pattern;
    const std::uint32_t turned = (bits >> 1) | (bits & 1u) << (n - 1);
    if (bitonic && std::popcount(bits ^ turned) > 2) continue;
    for (const auto c : network) {
      if (c.low < 0 || c.high >= n) return false;
      if ((bits >> c.low & 1u) < (bits >> c.high & 1u)) bits ^= (1u << c.low) | (1u << c.high);
    }
    if ((bits & (bits + 1)) != 0) return false;  // ones first
  }
  return true;
}

template <class A, int n>
void check_sort_and_merge() {
  test::random rng(static_cast<std::uint64_t>(n));
  constexpr int w = simd::width<A>;
  bool sorted = true, merged = true;
  const auto lane = [](const simd::vfloat<A>* x, int i) {
    std::vector<float> values;
    for (int j = 0; j < n; ++j) values.push_back(x[j].get(static_cast<std::size_t>(i)));
    return values;
  };
  for (int round = 0; round < 50; ++round) {
    simd::vfloat<A> x[n], y[n];
    for (auto* run : {x, y})
      for (int j = 0; j < n; ++j) {
        alignas(alignment) float value[w];
        for (float& v : value) v = static_cast<float>(rng.below(n));
        run[j] = simd::vfloat<A>::load_aligned(value);
      }
    std::vector<std::vector<float>> expected, both;
    for (int i = 0; i < w; ++i) {
      expected.push_back(lane(x, i));
      both.push_back(lane(x, i));
      const std::vector<float> other = lane(y, i);
      both.back().insert(both.back().end(), other.begin(), other.end());
      for (auto* list : {&expected.back(), &both.back()})
        std::sort(list->begin(), list->end(), std::greater<>());
      both.back().resize(n);
    }
    simd::sort<n>(x);
    simd::sort<n>(y);
    for (int i = 0; i < w; ++i) sorted &= lane(x, i) == expected[static_cast<std::size_t>(i)];
    alignas(alignment) float last[w];
    simd::last_of_merged<n>(x, y).store_aligned(last);
    simd::merge_keep_first<n>(x, y);
    for (int i = 0; i < w; ++i) {
      const std::vector<float>& first = both[static_cast<std::size_t>(i)];
      merged &= lane(x, i) == first && last[i] == first.back();
    }
  }
  INFO("n = " << n);
  CHECK(sorted);
  CHECK(merged);
}

}  // namespace

TEST_CASE("the sorting networks sort all zeros and ones") {
  CHECK(sorts_zeros_and_ones(simd::detail::batcher_network<2>, 2));
  CHECK(sorts_zeros_and_ones(simd::detail::batcher_network<4>, 4));
  CHECK(sorts_zeros_and_ones(simd::detail::batcher_network<8>, 8));
  CHECK(sorts_zeros_and_ones(simd::detail::batcher_network<16>, 16));
  // The same as they are made, with no comparison that is not needed for it.
  constexpr std::size_t batchers[] = {0, 1, 5, 19, 63}, cleaners[] = {0, 1, 4, 12, 32};
  for (std::size_t m = 0; m < 5; ++m) {
    const int n = 1 << m;
    std::vector<simd::detail::comparator> sorting, cleaning;
    simd::detail::batcher(n, [&](int i, int j) { sorting.push_back({i, j}); });
    simd::detail::bitonic_clean(n, [&](int i, int j) { cleaning.push_back({i, j}); });
    CHECK(sorts_zeros_and_ones(sorting, n));
    CHECK(sorts_zeros_and_ones(cleaning, n, true));
    CHECK((sorting.size() == batchers[m] && cleaning.size() == cleaners[m]));
    CHECK(simd::detail::batcher_size(n) == std::ssize(sorting));
    CHECK(simd::detail::bitonic_clean_size(n) == std::ssize(cleaning));
  }
}

TEMPLATE_LIST_TEST_CASE("runs are sorted descending, and a merge keeps what goes first, sorted", "",
                        test::widths) {
  check_sort_and_merge<TestType, 1>();
  check_sort_and_merge<TestType, 4>();
  check_sort_and_merge<TestType, 16>();
  check_sort_and_merge<TestType, 32>();
}
