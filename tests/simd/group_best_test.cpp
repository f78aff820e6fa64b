#include <moeroute/simd/select/group_best.hpp>

#include <algorithm>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <functional>
#include <span>
#include <vector>

#include "support/arches.hpp"
#include "support/edges.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

TEMPLATE_LIST_TEST_CASE("best and second of every group are those of a sorted copy", "",
                        test::widths) {
  test::edges memory(4 * block_rows * (34 * 16 + 3));
  for (index_t size = 1; size <= 34; ++size)
    for (const index_t groups : {1, 2, 5, 8, 9, 16})
      for (const int n : {1, 5, 16}) {
        const index_t cols = size * groups, stride = cols + size % 4;
        const auto cols_of_one = static_cast<std::size_t>(cols);
        std::vector<float> rows = test::make_logits(test::shape::quantised, 9, n, stride);
        for (std::size_t i = 0; i < rows.size(); i += 5) rows[i] = simd::minus_infinity;
        for (std::size_t i = 0; i < rows.size(); i += 7) rows[i] = test::not_a_number;
        // The last row ends where its columns end.
        rows.resize(static_cast<std::size_t>((n - 1) * stride + cols));
        memory.begin(size % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
        const float* const at_end = memory.copy(rows);
        float *const best = memory.room<float>(groups * block_rows), *const second =
                                                                         memory.room<float>(
                                                                             groups * block_rows);
        simd::best_two_of_groups<TestType>(at_end, stride, n, groups, size, best, second);
        const float* const alone = memory.copy(std::span<const float>(rows).first(cols_of_one));
        float *const best_alone = memory.room<float>(block_rows), *const second_alone =
                                                                      memory.room<float>(
                                                                          block_rows);
        simd::best_two_of_row<TestType>(alone, groups, size, best_alone, second_alone);
        bool right = true;
        for (int i = 0; i < n; ++i)
          for (index_t g = 0; g < groups; ++g) {
            const float* from = rows.data() + i * stride + g * size;
            std::vector<float> sorted(from, from + size);
            for (float& x : sorted)
              if (x != x) x = simd::minus_infinity;
            std::sort(sorted.begin(), sorted.end(), std::greater<>{});
            sorted.push_back(simd::minus_infinity);
            const auto at = static_cast<std::size_t>(g * block_rows + i);
            right &= best[at] == sorted[0] && second[at] == sorted[1];
            if (i == 0) right &= best_alone[g] == sorted[0] && second_alone[g] == sorted[1];
            // Lanes past the last row repeat it.
            for (int lane = i; i == n - 1 && lane < block_rows; ++lane)
              right &= best[g * block_rows + lane] == sorted[0] &&
                       second[g * block_rows + lane] == sorted[1];
          }
        INFO("size " << size << ", groups " << groups << ", n " << n);
        CHECK(right);
      }
}
