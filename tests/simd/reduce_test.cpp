#include <moeroute/simd/reduce.hpp>

#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::shape;

namespace {

// Every one of a few registers, and long ones.
const std::vector<index_t> lengths = [] {
  std::vector<index_t> list{160, 257, 2048};
  for (index_t n = 1; n <= 130; ++n) list.push_back(n);
  return list;
}();

// The documented tree, by plain loops.
float strided_sum(const std::vector<float>& row) {
  float lane[16] = {};
  for (std::size_t c = 0; c < row.size(); ++c) lane[c % 16] += row[c];
  for (int distance = 8; distance > 0; distance /= 2)
    for (int i = 0; i < distance; ++i) lane[i] += lane[i + distance];
  return lane[0];
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("a row's sum is 16 strided partial sums joined in one tree", "",
                        test::arches) {
  for (const index_t n : lengths) {
    const std::vector<float> row = test::make_logits(shape::normal, 1, 1, n);
    CHECK(test::bit_difference(std::vector{simd::row_sum<TestType>(row.data(), n)},
                               std::vector{strided_sum(row)}) == "");
  }
  CHECK(simd::row_sum<TestType>(nullptr, 0) == 0.0f);
}

TEMPLATE_LIST_TEST_CASE("a row's maximum skips NaN; -inf where nothing is left", "", test::arches) {
  for (const shape s : test::all_shapes)
    for (const index_t n : lengths) {
      const std::vector<float> row = test::make_logits(s, 2, 1, n);
      float expected = -test::infinity;
      for (const float x : row)
        if (x > expected) expected = x;
      INFO(test::name(s) << " n=" << n);
      CHECK(simd::row_max<TestType>(row.data(), n) == expected);
    }
  CHECK(simd::row_max<TestType>(nullptr, 0) == -test::infinity);
}

TEMPLATE_LIST_TEST_CASE("a row's largest value is found at every position", "", test::arches) {
  std::vector<float> row(67, -1.0f);
  for (std::size_t i = 0; i < row.size(); ++i) {
    row[i] = 1.0f;
    CHECK(simd::row_max<TestType>(row.data(), 67) == 1.0f);
    row[i] = -1.0f;
  }
}

TEMPLATE_LIST_TEST_CASE(
    "the first column of a value is found; where none has it, what follows the last", "",
    test::arches) {
  for (const index_t n : lengths) {
    std::vector<float> row(static_cast<std::size_t>(n), 1.0f);
    for (const float absent : {0.0f, 2.0f, test::infinity, -test::infinity})
      CHECK(simd::first_column<TestType>(row.data(), n, absent) == n);
    row.back() = -0.0f;
    CHECK(simd::first_column<TestType>(row.data(), n, 0.0f) == n - 1);
    row[static_cast<std::size_t>(n / 2)] = 0.0f;
    CHECK(simd::first_column<TestType>(row.data(), n, 0.0f) == n / 2);
  }
  CHECK(simd::first_column<TestType>(nullptr, 0, 0.0f) == 0);
}

TEMPLATE_LIST_TEST_CASE("the sum of exponentials below the maximum: near the true one, 1 or more",
                        "", test::arches) {
  for (const shape s : test::all_shapes) {
    if (s == shape::all_minus_inf || s == shape::all_nan) continue;  // no maximum
    for (const index_t n : lengths) {
      std::vector<float> row = test::make_logits(s, 3, 1, n);
      row[static_cast<std::size_t>(n / 2)] = s == shape::plus_infs ? test::infinity : 3.0f;
      const float max = simd::row_max<TestType>(row.data(), n);
      double expected = 0;
      for (const float x : row)
        if (x == max) {
          expected += 1;
        } else if (x > -test::infinity) {
          expected += std::exp(static_cast<double>(x) - static_cast<double>(max));
        }
      const float sum = simd::row_sum_exp<TestType>(row.data(), n, max);
      INFO(test::name(s) << " n=" << n);
      CHECK(sum >= 1.0f);
      CHECK(std::abs(static_cast<double>(sum) - expected) <= 2e-6 * expected);
    }
  }
}

TEMPLATE_LIST_TEST_CASE("row sums have the same bits on every instruction set", "", test::arches) {
  for (const shape s : test::all_shapes)
    for (const index_t n : lengths) {
      const std::vector<float> row = test::make_logits(s, 4, 1, n);
      const float max = simd::row_max<simd::default_arch>(row.data(), n);
      INFO(test::name(s) << " n=" << n);
      CHECK(simd::row_max<TestType>(row.data(), n) == max);
      if (max == -test::infinity) continue;  // no maximum to sum below
      CHECK(test::bit_difference(
                std::vector{simd::row_sum_exp<TestType>(row.data(), n, max)},
                std::vector{simd::row_sum_exp<simd::default_arch>(row.data(), n, max)}) == "");
    }
}
