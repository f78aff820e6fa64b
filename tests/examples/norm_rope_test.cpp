#include "support/norm_rope.hpp"

#include <cmath>
#include <cstddef>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>

namespace norm_rope_test {

using namespace example;

TEST_CASE("a normed row is x / sqrt(mean of squares + eps) times the weight, for any width") {
  const std::size_t width = GENERATE(1U, 5U, 16U, 33U, 128U);
  std::vector<float> x(width);
  std::vector<float> weight(width);
  double squares = 0;
  for (std::size_t i = 0; i < width; ++i) {
    x[i] = static_cast<float>(i % 7) - 2.5F;
    weight[i] = 1.0F + 0.1F * static_cast<float>(i % 3);
    squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + 1e-3);
  std::vector<float> out(width);
  rms_norm(x.data(), weight, 1e-3F, out.data());
  double worst = 0;
  for (std::size_t i = 0; i < width; ++i) {
    worst =
        std::max(worst, std::abs(static_cast<double>(out[i]) - static_cast<double>(x[i]) * scale *
                                                                   static_cast<double>(weight[i])));
  }
  CHECK(worst < 1e-6);
  rms_norm(x.data(), weight, 1e-3F, x.data());
  CHECK(x == out);
}

TEST_CASE("the first position is not rotated, and the first pair turns by one radian per step") {
  const rotary_table table(10000.0, 4, 3);
  const std::vector<float> head{1, 2, 3, 4};
  std::vector<float> turned = head;
  table.rotate(turned.data(), 0);
  CHECK(turned == head);
  table.rotate(turned.data(), 2);
  // Rotate-half: element 0 pairs with element 2.
  CHECK(std::abs(turned[0] - (std::cos(2.0F) - 3 * std::sin(2.0F))) < 1e-6F);
  CHECK(std::abs(turned[2] - (3 * std::cos(2.0F) + std::sin(2.0F))) < 1e-6F);
  CHECK(std::abs(turned[1] - (2 * std::cos(0.02F) - 4 * std::sin(0.02F))) < 1e-6F);
}

}  // namespace norm_rope_test
