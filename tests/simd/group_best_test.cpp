#include <moeroute/simd/select/group_best.hpp>

#include <algorithm>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <functional>
#include <vector>

#include "support/arches.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

TEMPLATE_LIST_TEST_CASE("best and second of every group are those of a sorted copy", "",
                        test::widths) {
  for (index_t size = 1; size <= 34; ++size)
    for (const index_t groups : {1, 2, 5, 8})
      for (const int n : {1, 5, 16}) {
        const index_t cols = size * groups, stride = cols + 3;
        std::vector<float> rows = test::make_logits(test::shape::quantised, 9, n, stride);
        for (std::size_t i = 0; i < rows.size(); i += 5) rows[i] = simd::minus_infinity;
        for (std::size_t i = 0; i < rows.size(); i += 7) rows[i] = test::not_a_number;
        // The last row ends where its columns end, so that the sanitizer sees a read beyond them.
        rows.resize(static_cast<std::size_t>((n - 1) * stride + cols));
        std::vector<float> best(static_cast<std::size_t>(groups * block_rows)), second(best);
        simd::best_two_of_groups<TestType>(rows.data(), stride, n, groups, size, best.data(),
                                           second.data());
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
          }
        INFO("size " << size << ", groups " << groups << ", n " << n);
        CHECK(right);
      }
}
