#include <moeroute/simd/rows/counting_sort.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <vector>

using namespace moeroute;

TEST_CASE("keys are counted and negative ones skipped") {
  const std::vector<std::int32_t> key = {2, 0, -1, 2, 2, 4, -7};
  std::vector<std::int32_t> count(5, 99);
  simd::count_keys(key.data(), 7, 5, count.data());
  CHECK(count == std::vector<std::int32_t>{1, 0, 3, 0, 1});
  simd::count_keys(nullptr, 0, 5, count.data());
  CHECK(count == std::vector<std::int32_t>(5, 0));
}

TEST_CASE("the scan begins at 0, ends at the total, and may be done in place") {
  std::vector<std::int32_t> count = {1, 0, 3, 0, 1}, start(6, 99);
  CHECK(simd::exclusive_scan(count.data(), 5, start.data()) == 5);
  CHECK(start == std::vector<std::int32_t>{0, 1, 1, 4, 4, 5});
  count.push_back(99);
  CHECK(simd::exclusive_scan(count.data(), 5, count.data()) == 5);
  CHECK(count == start);
  CHECK(simd::exclusive_scan(nullptr, 0, start.data()) == 0);
  CHECK(start[0] == 0);
}
