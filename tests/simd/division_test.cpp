#include <moeroute/simd/elementwise.hpp>

#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <random>
#include <vector>

#include "support/arches.hpp"
#include "support/sized.hpp"

using namespace moeroute;

namespace {

template <class A, class F>
float lane_of(float x, F f) {
  alignas(alignment) float lane[simd::width<A>];
  f(simd::vfloat<A>(x)).store_aligned(lane);
  return lane[0];
}

bool same(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

// A float in [1, 2) whose mantissa ends in `zeros` zeros.
float random_mantissa(std::mt19937& engine, unsigned long zeros) {
  const auto mantissa = static_cast<std::uint32_t>(engine()) & 0x7fffffu;
  return std::bit_cast<float>(0x3f800000u | (mantissa >> zeros << zeros));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("a divider has the bits of the division", "", test::arches) {
  std::mt19937 engine(3);
  std::uniform_real_distribution<float> unit;
  index_t wrong = 0;
  for (int round = 0; round < 2000; ++round) {
    const float d = std::ldexp(1.0f + unit(engine), static_cast<int>(engine() % 40));
    const simd::divider<TestType> by(d);
    for (const float x : {0.0f, 1.0f, unit(engine), std::exp(-90.0f * unit(engine)), 0x1p-126f,
                          0x1p-80f, 0x1.8p-100f * unit(engine)})
      wrong += !same(lane_of<TestType>(x, by), x / d);
  }
  CHECK(wrong == 0);
}

TEMPLATE_LIST_TEST_CASE("an emulated fma rounds once where double would round twice", "",
                        test::arches) {
  // Sums that lie half-way between two floats but for a bit that double cannot hold.
  std::mt19937 engine(4);
  index_t wrong = 0;
  for (index_t round = 0; round < test::sized(20000, 4000); ++round) {
    const float a = random_mantissa(engine, 0);
    const float b = random_mantissa(engine, engine() % 20);
    const float c =
        std::ldexp(1.0f, static_cast<int>(engine() % 60)) * (engine() % 2 ? 1.0f : -1.0f);
    alignas(alignment) float lane[simd::width<TestType>];
    using F = simd::vfloat<TestType>;
    simd::fma<TestType>(F(a), F(b), F(c)).store_aligned(lane);
    wrong += !same(lane[0], std::fma(a, b, c));
  }
  CHECK(wrong == 0);
}
