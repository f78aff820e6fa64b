#include <moeroute/base/linear_assignment.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

TEST_CASE("no order of the columns has a larger sum than the one that is found") {
  test::random rng(31);
  std::string wrong;
  for (index_t n = 0; n <= 6; ++n)
    for (int trial = 0; trial < 60; ++trial) {
      std::vector<double> gain;
      // Few values, so that many sums are equal; or many, of both signs and all sizes.
      const std::int64_t kind = rng.below(3);
      for (index_t i = 0; i < n * n; ++i) {
        const double v = static_cast<double>(rng.normal());
        gain.push_back(kind == 0   ? static_cast<double>(rng.below(3))
                       : kind == 1 ? v
                                   : v * std::ldexp(1.0, static_cast<int>(rng.below(40)) - 20));
      }
      const auto sum_of = [&](const std::vector<std::int32_t>& column) {
        double sum = 0.0;
        for (std::size_t r = 0; r < column.size(); ++r)
          sum += gain[r * column.size() + static_cast<std::size_t>(column[r])];
        return sum;
      };
      std::vector<std::int32_t> order(static_cast<std::size_t>(n));
      std::iota(order.begin(), order.end(), 0);
      const std::vector<std::int32_t> found = linear_assignment(gain, n), in_order = order;
      std::vector<std::int32_t> sorted = found;
      std::sort(sorted.begin(), sorted.end());
      if (sorted != in_order) {
        wrong = "a column twice, n " + std::to_string(n);
        continue;
      }
      double most = sum_of(order), size = 1.0;
      for (const double g : gain) size = std::max(size, std::abs(g));
      while (std::next_permutation(order.begin(), order.end()))
        most = std::max(most, sum_of(order));
      if (!(sum_of(found) >= most - 1e-12 * size)) wrong = "less, n " + std::to_string(n);
    }
  CHECK(wrong == "");
}

TEST_CASE("where all gains are equal every row keeps its own column") {
  for (const double g : {0.0, -3.5, 1e300, -1e300}) {
    const auto column = linear_assignment(std::vector<double>(25, g), 5);
    CHECK(column == std::vector<std::int32_t>{0, 1, 2, 3, 4});
  }
}

TEST_CASE("an assignment refuses another size, and a gain that is no number or more than 1e300") {
  const auto refused = [](const std::vector<double>& gain, index_t n) {
    return test::refusal([&] { linear_assignment(gain, n); });
  };
  CHECK(refused({1, 2, 3}, 2) == "moeroute::linear_assignment: gain.size() is 3, expected 4");
  CHECK(refused({1, 2}, 1) == "moeroute::linear_assignment: gain.size() is 2, expected 1");
  CHECK(refused({1e300, -1e300, 0, 1}, 2) == "accepted");
  for (const double g :
       {HUGE_VAL, -HUGE_VAL, std::nextafter(1e300, HUGE_VAL), -2e300, std::nan("")})
    for (const std::size_t at : {0u, 3u}) {
      std::vector<double> gain(4, 1.0);
      gain[at] = g;
      char number[400];
      std::snprintf(number, sizeof number, "%f", g);
      CHECK(refused(gain, 2) == "moeroute::linear_assignment: a gain is " + std::string(number) +
                                    ", expected a number of at most 1e300");
    }
}
