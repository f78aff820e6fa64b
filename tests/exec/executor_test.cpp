#include <moeroute/exec/executor.hpp>

#include <catch2/catch_test_macros.hpp>
#include <utility>
#include <vector>

using namespace moeroute;

TEST_CASE("the serial executor cuts by (n, grain) in order, the last piece shorter") {
  using pieces = std::vector<std::pair<index_t, index_t>>;
  const auto cut = [](index_t n, index_t grain) {
    pieces list;
    serial{}.parallel_for(n, grain, [&](index_t b, index_t e) { list.emplace_back(b, e); });
    return list;
  };
  CHECK(serial{}.concurrency() == 1);
  CHECK(cut(0, 4) == pieces{});
  CHECK(cut(1, 4) == pieces{{0, 1}});
  CHECK(cut(8, 4) == pieces{{0, 4}, {4, 8}});
  CHECK(cut(9, 4) == pieces{{0, 4}, {4, 8}, {8, 9}});
  CHECK(cut(3, 1) == pieces{{0, 1}, {1, 2}, {2, 3}});
}
