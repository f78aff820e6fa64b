#include <moeroute/base/index.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <vector>

using namespace moeroute;

TEST_CASE("ceil_div and round_up reach the next multiple, and stay on one") {
  for (index_t d = 1; d <= 17; ++d) {
    for (index_t n = 0; n <= 40; ++n) {
      const index_t pieces = ceil_div(n, d);
      CHECK((pieces * d >= n && (pieces - 1) * d < n));
      CHECK(round_up(n, d) == pieces * d);
    }
  }
}

TEST_CASE("sizes are signed and 64 bits wide, ids 32") {
  STATIC_REQUIRE(sizeof(index_t) == 8);
  STATIC_REQUIRE(index_t{-1} < 0);
  STATIC_REQUIRE(sizeof(expert_id) == 4);
  STATIC_REQUIRE(no_expert == -1);
  STATIC_REQUIRE(max_experts == 1048576);
}

TEST_CASE(
    "numbers stand by their values from the greatest on, equals by themselves, whatever came "
    "first") {
  const std::vector<int> value{3, 7, 3, -1, 7, 3};
  std::vector<index_t> order{5, 4, 3, 2, 1, 0};
  do {
    std::vector<index_t> sorted = order;
    std::sort(sorted.begin(), sorted.end(),
              greatest_first([&](index_t i) { return value[static_cast<std::size_t>(i)]; }));
    REQUIRE(sorted == std::vector<index_t>{1, 4, 0, 2, 5, 3});
  } while (std::prev_permutation(order.begin(), order.end()));
  const auto before = greatest_first([&](index_t i) { return value[static_cast<std::size_t>(i)]; });
  CHECK((before(1, 0) && !before(0, 1) && before(0, 2) && !before(2, 0) && !before(2, 2)));
}
