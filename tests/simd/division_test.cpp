#include <moeroute/simd/elementwise.hpp>

#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <random>
#include <vector>

#include "support/arches.hpp"

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

TEMPLATE_LIST_TEST_CASE("a reciprocal has the bits of the division for every mantissa", "",
                        test::widths) {
  using F = simd::vfloat<TestType>;
  constexpr int w = simd::width<TestType>;
  index_t wrong = 0;
  for (std::uint32_t mantissa = 0; mantissa < 1u << 23; mantissa += w) {
    alignas(alignment) float d[w], r[w];
    const std::uint32_t exponent = (127 + mantissa / w % 125) << 23;
    for (int i = 0; i < w; ++i)
      d[i] = std::bit_cast<float>(exponent | (mantissa + static_cast<std::uint32_t>(i)));
    simd::reciprocal<TestType>(F::load_aligned(d)).store_aligned(r);
    for (int i = 0; i < w; ++i) wrong += !same(r[i], 1.0f / d[i]);
  }
  CHECK(wrong == 0);
}

TEMPLATE_LIST_TEST_CASE("a reciprocal is right where it is denormal, 0 or NaN", "", test::arches) {
  const auto reciprocal = [](auto x) { return simd::reciprocal<TestType>(x); };
  for (const float d : {0x1p125f, 0x1.8p125f, 0x1p126f, 0x1.234p127f, 0x1.fffffep127f,
                        std::numeric_limits<float>::infinity()})
    CHECK(same(lane_of<TestType>(d, reciprocal), 1.0f / d));
  CHECK(std::isnan(lane_of<TestType>(std::numeric_limits<float>::quiet_NaN(), reciprocal)));
}

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
  for (int round = 0; round < 20000; ++round) {
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
