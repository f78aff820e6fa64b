#include <moeroute/simd/elementwise.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;

namespace {

template <class A, class F>
std::vector<float> mapped(const std::vector<float>& x, F f) {
  std::vector<float> y(x.size());
  simd::map_row<A>(x.data(), static_cast<index_t>(x.size()), y.data(), f);
  return y;
}

template <class A>
std::vector<float> exps(const std::vector<float>& x) {
  return mapped<A>(x, [](simd::vfloat<A> v) { return simd::exp<A>(v); });
}

// One float in `step` of all that are between a and b, and the 200 next to each end.
std::vector<float> floats_between(float a, float b, index_t step = test::sized(1009, 16001)) {
  std::vector<float> list;
  for (float x = a, i = 0; i < 200; ++i, x = std::nextafter(x, b)) list.push_back(x);
  for (float x = b, i = 0; i < 200; ++i, x = std::nextafter(x, a)) list.push_back(x);
  const auto add = [&](float from, float to) {  // both positive
    for (auto bits = std::bit_cast<std::uint32_t>(from); bits < std::bit_cast<std::uint32_t>(to);
         bits += static_cast<std::uint32_t>(step))
      list.push_back(std::bit_cast<float>(bits));
  };
  add(1e-10f, b);
  const std::size_t positive = list.size();
  add(1e-10f, -a);
  for (std::size_t i = positive; i < list.size(); ++i) list[i] = -list[i];
  return list;
}

constexpr float lowest = -87.3365402f;  // exp of less is denormal
constexpr float highest = 88.7228317f;  // exp of more is above the largest float

}  // namespace

TEMPLATE_LIST_TEST_CASE("exp is within 2.5e-7 over the whole range of normal results", "",
                        test::arches) {
  const std::vector<float> x = floats_between(lowest, highest);
  std::vector<double> expected;
  for (const float v : x) expected.push_back(std::exp(static_cast<double>(v)));
  CHECK(test::difference(exps<TestType>(x), expected, 2.5e-7) == "");
}

TEMPLATE_LIST_TEST_CASE("exp at its edges: 1, 0, infinity, NaN", "", test::arches) {
  const float above = std::nextafter(highest, 100.0f), below = std::nextafter(lowest, -100.0f);
  const std::vector<float> x = {
      0.0f,   -0.0f,   0x1p-149f, above,          std::nextafter(above, 100.0f),
      89.0f,  1e4f,    3e38f,     test::infinity, below,
      -88.0f, -150.0f, -1e4f,     -3e38f,         -test::infinity};
  const float inf = test::infinity;
  const std::vector<float> y = {1, 1, 1, inf, inf, inf, inf, inf, inf, 0, 0, 0, 0, 0, 0};
  CHECK(test::bit_difference(exps<TestType>(x), y) == "");
  CHECK(std::isnan(exps<TestType>({test::not_a_number})[0]));
  CHECK(std::isfinite(exps<TestType>({highest})[0]));
  CHECK(exps<TestType>({lowest})[0] >= std::numeric_limits<float>::min());
}

TEMPLATE_LIST_TEST_CASE("exp_nonpositive is 0 for NaN and -inf", "", test::arches) {
  const auto y = mapped<TestType>({test::not_a_number, -test::infinity, -87.4f, 0.0f},
                                  [](auto v) { return simd::exp_nonpositive<TestType>(v); });
  CHECK(test::bit_difference(y, std::vector<float>{0, 0, 0, 1}) == "");
}

TEMPLATE_LIST_TEST_CASE("exp, sigmoid and silu have the same bits on every instruction set", "",
                        test::arches) {
  using first = simd::default_arch;
  const std::vector<float> x = floats_between(-100.0f, 100.0f);
  CHECK(test::bit_difference(exps<TestType>(x), exps<first>(x)) == "");
  const auto sigmoid = [](auto v) { return simd::sigmoid<typename decltype(v)::arch_type>(v); };
  CHECK(test::bit_difference(mapped<TestType>(x, sigmoid), mapped<first>(x, sigmoid)) == "");
  const auto silu = [](auto v) { return simd::silu<typename decltype(v)::arch_type>(v); };
  CHECK(test::bit_difference(mapped<TestType>(x, silu), mapped<first>(x, silu)) == "");
}

TEMPLATE_LIST_TEST_CASE("each function has the same bits with every compiler and flag", "",
                        test::arches) {
  // FNV-1a over the results. A new polynomial has a new number here: that is a change of every
  // score's bits.
  const auto hash = [](const std::vector<float>& results) {
    std::uint64_t of_all = 0xcbf29ce484222325u;
    for (const float y : results)
      for (std::uint32_t bits = std::bit_cast<std::uint32_t>(y), i = 0; i < 4; ++i, bits >>= 8)
        of_all = (of_all ^ (bits & 0xff)) * 0x100000001b3u;
    return of_all;
  };
  using A = TestType;
  CHECK(hash(exps<A>(floats_between(lowest, highest, 1009))) == 0x2041c379dbf6a255u);
  const std::vector<float> x = floats_between(-87.0f, 88.0f, 8009);
  CHECK(hash(mapped<A>(x, [](auto v) { return simd::tanh<A>(v); })) == 0x59e03b2bd6d162e5u);
  CHECK(hash(mapped<A>(x, [](auto v) { return simd::softplus<A>(v); })) == 0xc4649052d786fa1bu);
  CHECK(hash(mapped<A>(x, [](auto v) { return simd::sqrt_softplus<A>(v); })) ==
        0xd5a7b63ff5956095u);
  std::vector<float> positive;
  for (const float v : x) positive.push_back(std::abs(v) + 0x1p-100f);
  CHECK(hash(mapped<A>(positive, [](auto v) { return simd::log<A>(v); })) == 0xcdd86e5eb08d747fu);
}

TEMPLATE_LIST_TEST_CASE("sigmoid goes from 0 to 1 and passes NaN on", "", test::arches) {
  const std::vector<float> x = floats_between(-80.0f, 100.0f);
  const auto sigmoid = [](auto v) { return simd::sigmoid<TestType>(v); };
  std::vector<double> expected;
  for (const float v : x) expected.push_back(1.0 / (1.0 + std::exp(-static_cast<double>(v))));
  CHECK(test::difference(mapped<TestType>(x, sigmoid), expected, 4e-7) == "");
  const std::vector<float> ends = {-test::infinity, -1e30f, test::infinity, 1e30f, 0.0f};
  CHECK(test::bit_difference(mapped<TestType>(ends, sigmoid),
                             std::vector<float>{0, 0, 1, 1, 0.5f}) == "");
  CHECK(std::isnan(mapped<TestType>({test::not_a_number}, sigmoid)[0]));
}

TEMPLATE_LIST_TEST_CASE("silu is x * sigmoid(x), finite for every finite x", "", test::arches) {
  const std::vector<float> x = floats_between(-80.0f, 100.0f);
  const auto silu = [](auto v) { return simd::silu<TestType>(v); };
  std::vector<double> expected;
  for (const float v : x)
    expected.push_back(static_cast<double>(v) / (1.0 + std::exp(-static_cast<double>(v))));
  CHECK(test::difference(mapped<TestType>(x, silu), expected, 4e-7) == "");
  for (const float far : {-89.0f, -1e4f, -3e38f}) CHECK(mapped<TestType>({far}, silu)[0] == 0.0f);
  CHECK(mapped<TestType>({3e38f}, silu)[0] == 3e38f);
}

TEMPLATE_LIST_TEST_CASE("tanh, softplus, its root and the logarithm are near the true ones", "",
                        test::arches) {
  using A = TestType;
  const auto near_true = [](const std::vector<float>& x, auto f, auto truth, double error,
                            double absolute = 0.0) {
    std::vector<double> expected;
    for (const float v : x) expected.push_back(truth(static_cast<double>(v)));
    return test::difference(mapped<A>(x, f), expected, error, absolute);
  };
  const auto tanh = [](auto v) { return simd::tanh<A>(v); };
  const auto softplus = [](auto v) { return simd::softplus<A>(v); };
  const auto root = [](auto v) { return simd::sqrt_softplus<A>(v); };
  const auto log = [](auto v) { return simd::log<A>(v); };
  const auto true_softplus = [](double x) {
    return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
  };
  const std::vector<float> x = floats_between(-87.0f, 100.0f, 16001);
  CHECK(near_true(x, tanh, [](double v) { return std::tanh(v); }, 3e-7) == "");
  CHECK(near_true(
            {0.625f, std::nextafter(0.625f, 0.0f), -0.625f}, tanh,
            [](double v) { return std::tanh(v); }, 3e-7) == "");
  CHECK(near_true(x, softplus, true_softplus, 4e-7) == "");
  const auto true_root = [&](double v) { return std::sqrt(true_softplus(v)); };
  CHECK(near_true(floats_between(-170.0f, 100.0f, 16001), root, true_root, 1e-6) == "");
  std::vector<float> positive;
  for (const float v : x) positive.push_back(std::abs(v) + 1e-30f);
  CHECK(near_true(positive, log, [](double v) { return std::log(v); }, 4e-7, 1e-7) == "");
  const float inf = test::infinity, nan = test::not_a_number;
  const std::vector<float> ends = {inf, -inf, 3e38f, -3e38f, 0.0f};
  CHECK(test::bit_difference(mapped<A>(ends, tanh), std::vector<float>{1, -1, 1, -1, 0}) == "");
  CHECK(test::bit_difference(mapped<A>({inf, -inf, 3e38f, -3e38f}, softplus),
                             std::vector<float>{inf, 0, 3e38f, 0}) == "");
  CHECK(test::bit_difference(mapped<A>({inf, -inf, -3e38f, -175.0f}, root),
                             std::vector<float>{inf, 0, 0, 0}) == "");
  CHECK((std::isnan(mapped<A>({nan}, tanh)[0]) && std::isnan(mapped<A>({nan}, softplus)[0])));
  const auto some = [](auto v) { return simd::sigmoid_first<A>(v, 1); };
  CHECK(mapped<A>({1.5f}, some) == mapped<A>({1.5f}, [](auto v) { return simd::sigmoid<A>(v); }));
}

TEMPLATE_LIST_TEST_CASE("map_row maps rows of every length in place and writes no further", "",
                        test::arches) {
  for (index_t n = 0; n <= 67; ++n) {
    std::vector<float> row(static_cast<std::size_t>(n) + 1, 2.0f);
    simd::map_row<TestType>(row.data(), n, row.data(), [](auto v) { return v + v; });
    std::vector<float> expected(static_cast<std::size_t>(n) + 1, 4.0f);
    expected.back() = 2.0f;
    CHECK(test::bit_difference(row, expected) == "");
  }
}
