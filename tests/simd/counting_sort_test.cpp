#include <moeroute/simd/rows/counting_sort.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <vector>

#include "support/arches.hpp"

using namespace moeroute;

TEST_CASE("keys are counted and ranked among their equals, -1 aside") {
  const std::vector<std::int32_t> key = {2, 0, -1, 2, 2, 4, -1};
  std::vector<std::int32_t> count(5, 99), rank(7, 99);
  CHECK(simd::rank_keys(key.data(), 7, 5, count.data(), rank.data()));
  CHECK(count == std::vector<std::int32_t>{1, 0, 3, 0, 1});
  CHECK(rank == std::vector<std::int32_t>{0, 0, -1, 1, 2, 0, -1});
  CHECK(simd::rank_keys(nullptr, 0, 5, count.data(), nullptr));
  CHECK(count == std::vector<std::int32_t>(5, 0));
}

TEST_CASE("the scan begins at 0, ends at the total, and may be done in place") {
  test::for_each_arch<test::arches>([]<class A>(A) {
    for (index_t values = 0; values <= 130; ++values) {
      std::vector<std::int32_t> count, expected = {0};
      for (std::int32_t v = 0; v < values; ++v) {
        count.push_back(v * v % 7);
        expected.push_back(expected.back() + count.back());
      }
      count.push_back(99);
      std::vector<std::int32_t> start(count.size() + 1, 99);
      CHECK(simd::exclusive_scan<A>(count.data(), values, start.data()) == expected.back());
      CHECK(start.back() == 99);
      start.pop_back();
      CHECK(start == expected);
      CHECK(simd::exclusive_scan<A>(count.data(), values, count.data()) == expected.back());
      CHECK(count == expected);
    }
  });
}
