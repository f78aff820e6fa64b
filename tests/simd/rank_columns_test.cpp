#include <moeroute/simd/select/rank_columns.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cstddef>
#include <vector>

#include "oracle/routing.hpp"
#include "support/arches.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

TEST_CASE("ranks of a row: value descending, column ascending, NaN and -inf last") {
  test::for_each_arch<test::widths>([](auto tag) {
    for (const test::shape shape : test::all_shapes)
      for (index_t cols = 1; cols <= 130; cols += cols < 34 ? 1 : 5) {
        const std::vector<float> row = test::make_logits(shape, 5, 1, cols);
        const std::vector<expert_id> expected = oracle::order(row.data(), cols);
        std::vector<std::int32_t> key(static_cast<std::size_t>(simd::rank_columns_scratch(cols)));
        std::vector<std::int32_t> column(static_cast<std::size_t>(cols), -1);
        const index_t there =
            simd::rank_columns<decltype(tag)>(row.data(), cols, key.data(), column.data());
        std::vector<bool> named(column.size(), false);
        for (const std::int32_t c : column) named.at(static_cast<std::size_t>(c)) = true;
        INFO(test::name(shape) << " " << cols);
        CHECK(std::find(named.begin(), named.end(), false) == named.end());
        column.resize(expected.size());
        CHECK(there == static_cast<index_t>(expected.size()));
        CHECK(column == expected);
      }
  });
}
