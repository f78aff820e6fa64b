#include <moeroute/simd/batch.hpp>

#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/select/compress.hpp>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;

namespace {

template <class A>
float fma_of(float a, float b, float c) {
  return simd::fma<A>(simd::vfloat<A>(a), simd::vfloat<A>(b), simd::vfloat<A>(c)).get(0);
}

// The same float, or both NaN.
bool same_or_nan(float a, float b) {
  return (a != a && b != b) || std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

std::string shown(float a, float b, float c) {
  return test::shown(a) + " * " + test::shown(b) + " + " + test::shown(c);
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("fma rounds once, for any bits", "", test::arches) {
  test::random rng(1);
  std::string wrong;
  const auto check = [&](float a, float b, float c) {
    if (!same_or_nan(fma_of<TestType>(a, b, c), std::fma(a, b, c))) wrong = shown(a, b, c);
  };
  for (index_t i = 0; i < test::sized(300000, 20000); ++i) {
    const auto any = [&] { return std::bit_cast<float>(static_cast<std::uint32_t>(rng.bits())); };
    check(any(), any(), any());
  }
  CHECK(wrong == "");
}

TEMPLATE_LIST_TEST_CASE("fma rounds once where product and addend nearly cancel", "",
                        test::arches) {
  test::random rng(2);
  std::string wrong;
  for (index_t i = 0; i < test::sized(300000, 20000); ++i) {
    const float a = rng.normal(), b = rng.normal();
    // An addend near -a * b, or small beside it, so that a second rounding would show.
    const float scale[] = {1.0f, 0x1p-12f, 0x1p-24f, 0x1p-25f, 0x1p-48f};
    const float c = -a * b * (1.0f + 0x1p-22f * rng.normal()) * scale[rng.below(5)];
    if (!same_or_nan(fma_of<TestType>(a, b, c), std::fma(a, b, c))) wrong = shown(a, b, c);
  }
  CHECK(wrong == "");
}

TEMPLATE_LIST_TEST_CASE("fma keeps infinities, zeros, denormals and the largest numbers", "",
                        test::arches) {
  const float inf = test::infinity, max = std::numeric_limits<float>::max();
  const float denormal = std::numeric_limits<float>::denorm_min();
  const float values[] = {
      0.0f,      -0.0f, 1.0f, -1.0f, 3.0f,    0x1p-149f,          0x1p-126f,
      -0x1p-75f, max,   -max, inf,   -inf,    test::not_a_number, 0x1.fffffep-1f,
      0x1p-24f,  -7.5f, 0.1f, 1e30f, denormal};
  std::string wrong;
  for (const float a : values)
    for (const float b : values)
      for (const float c : values)
        if (!same_or_nan(fma_of<TestType>(a, b, c), std::fma(a, b, c))) wrong = shown(a, b, c);
  CHECK(wrong == "");
}

TEMPLATE_LIST_TEST_CASE("fma rounds once in each lane where a double comes to lie half-way", "",
                        test::arches) {
  constexpr int w = simd::width<TestType>;
  // 8392705 * 8384513 is 2^46 + 1: half a step of the addend, and what a double has no room for.
  struct half_step {
    float addend;
    int exponent;
  };
  std::string wrong;
  for (const half_step& at : {half_step{1.0f, -24},
                              {0x1.000004p0f, -24},
                              {0x1p126f, 102},
                              {0x1p-126f, -150},
                              {0x1p-127f, -150},
                              {0x0.fffffcp-126f, -150},
                              {0x1p-140f, -150}})
    for (const float sign : {1.0f, -1.0f})
      for (const float c : {at.addend, -at.addend})
        for (int lane = 0; lane < w; ++lane) {
          alignas(alignment) float x[w], y[w], z[w], made[w];
          for (int i = 0; i < w; ++i) x[i] = y[i] = z[i] = static_cast<float>(i + 2);
          x[lane] = sign * std::ldexp(8392705.0f, at.exponent / 2 - 23);
          y[lane] = std::ldexp(8384513.0f, at.exponent / 2 - 23);
          z[lane] = c;
          using F = simd::vfloat<TestType>;
          simd::fma<TestType>(F::load_aligned(x), F::load_aligned(y), F::load_aligned(z))
              .store_aligned(made);
          for (int i = 0; i < w; ++i)
            if (!same_or_nan(made[i], std::fma(x[i], y[i], z[i]))) wrong = shown(x[i], y[i], z[i]);
        }
  CHECK(wrong == "");
}

TEMPLATE_LIST_TEST_CASE("load_first and store_first touch the first n values only", "",
                        test::arches) {
  constexpr int w = simd::width<TestType>;
  test::edges memory(4 * w);
  for (int n = 0; n <= w; ++n)
    test::at_both_ends(memory, [&] {
      float* const in = memory.room<float>(n);
      std::int32_t* const ids = memory.room<std::int32_t>(n);
      for (int i = 0; i < n; ++i) in[i] = static_cast<float>(ids[i] = 3 + i);
      const auto v = simd::load_first<TestType>(in, n, 9.0f);
      const auto id = simd::load_first<TestType>(ids, n, 9);
      float* const out = memory.room<float>(n);
      simd::store_first<TestType>(out, n, v);
      const auto lane = [&](const auto& x, int i) { return x.get(static_cast<std::size_t>(i)); };
      bool right = true;
      for (int i = 0; i < w; ++i) {
        right &= lane(v, i) == (i < n ? in[i] : 9.0f) && lane(id, i) == (i < n ? ids[i] : 9);
        if (i < n) right &= out[i] == in[i];
      }
      CHECK(right);
      if (n == 0) return;
      float* const pieces = memory.room<float>(n);
      std::int32_t* const numbers = memory.room<std::int32_t>(n);
      simd::store_pieces<TestType>(numbers, pieces, n, id, v);
      CHECK((std::equal(in, in + n, pieces) && std::equal(ids, ids + n, numbers)));
      // Of a quotient the first lanes count.
      const auto half = simd::divide_first<TestType>(v, simd::vfloat<TestType>(2.0f), n);
      for (int i = 0; i < n; ++i) right &= lane(half, i) == in[i] / 2.0f;
      CHECK(right);
    });
}

TEMPLATE_LIST_TEST_CASE("lanes are numbered, compared, clipped, and the largest is found in each",
                        "", test::arches) {
  using A = TestType;
  using F = simd::vfloat<A>;
  constexpr int w = simd::width<A>;
  const auto number = simd::lane_numbers<A>();
  for (int at = 0; at <= w; ++at) {
    alignas(alignment) float x[w];
    for (int i = 0; i < w; ++i) x[i] = i == at ? 2.0f : -static_cast<float>(i) - 3.0f;
    const F v = F::load_aligned(x);
    const F most = simd::largest_lane<A>(v), clipped = simd::clip<A>(v, F(4.0f));
    const auto from = simd::lanes_from<A>(at).mask();
    const auto other = simd::differs<A>(number, simd::vint<A>(at)).mask();
    bool right = true;
    for (std::size_t i = 0; i < w; ++i) {
      const int lane = static_cast<int>(i);
      right &= number.get(i) == lane && most.get(i) == (at < w ? 2.0f : -3.0f);
      right &= clipped.get(i) == (lane == at ? 2.0f : lane == 0 ? -3.0f : -4.0f);
      right &= (from >> i & 1) == (lane >= at) && (other >> i & 1) == (lane != at);
    }
    CHECK(right);
    CHECK(simd::any<A>(v > F(0.0f)) == (at < w));
  }
  CHECK(simd::clip<A>(F(9.0f), F(4.0f)).get(0) == 4.0f);
}

TEMPLATE_LIST_TEST_CASE(
    "columns that reach a bound are bits of a mask, and chosen lanes are stored side by side", "",
    test::arches) {
  using A = TestType;
  using F = simd::vfloat<A>;
  constexpr int w = simd::width<A>;
  test::edges memory(4 * 70);
  test::random rng(5);
  for (index_t n = 0; n <= 70; ++n)
    test::at_both_ends(memory, [&] {
      float* const row = memory.room<float>(n);
      std::uint64_t expected = 0;
      for (index_t c = 0; c < n; ++c) {
        const float values[] = {-test::infinity, -1.0f, 0.5f, 0.75f, test::not_a_number};
        row[c] = values[rng.below(5)];
        if (c < 64) expected |= std::uint64_t{row[c] >= 0.5f} << c;
      }
      simd::column_mask parts, joined;
      simd::mask_not_below<A>(row, n, F(0.5f), parts);
      simd::mask_not_below<A, simd::mask_form::joined>(row, n, F(0.5f), joined);
      CHECK((parts.bits() == expected && joined.bits() == expected));
      if (n < w) return;
      // The lanes of one register that are above the bound, and their numbers from 100 on.
      const F x = simd::load<A>(row);
      const auto mask = x >= F(0.5f);
      const int many = std::popcount(mask.mask());
      float* const value = memory.room<float>(many);
      std::int32_t* const column = memory.room<std::int32_t>(many);
      CHECK(simd::store_chosen<A>(mask, x, 100, value, column) == many);
      bool right = true;
      for (int i = 0, at = 0; i < w; ++i)
        if (expected >> i & 1) {
          right &= column[at] == 100 + i && value[at] == row[i];
          ++at;
        }
      // Counts go up in those lanes alone; the second of two is taken where the first is NaN.
      const simd::vint<A> count(7);
      const auto once = simd::count_where<A>(count, mask),
                 twice = simd::count_where<A>(once, once == simd::vint<A>(8));
      const F larger = simd::max_or_second<A>(x, F(0.5f));
      for (int i = 0; i < w; ++i) {
        const auto lane = static_cast<std::size_t>(i);
        right &= twice.get(lane) == ((expected >> i & 1) != 0 ? 9 : 7);
        right &= larger.get(lane) == (row[i] > 0.5f ? row[i] : 0.5f);
      }
      CHECK(right);
    });
}

TEMPLATE_LIST_TEST_CASE("NaN becomes -inf and every other value stays", "", test::arches) {
  for (const float x : {0.0f, -0.0f, 1.5f, -1e38f, test::infinity, -test::infinity})
    CHECK(same_or_nan(simd::nan_to_minus_infinity<TestType>(simd::vfloat<TestType>(x)).get(0), x));
  const float nan =
      simd::nan_to_minus_infinity<TestType>(simd::vfloat<TestType>(test::not_a_number)).get(0);
  CHECK(nan == -test::infinity);
}

TEMPLATE_LIST_TEST_CASE("select takes a where the mask is set, for floats and ids", "",
                        test::arches) {
  constexpr int w = simd::width<TestType>;
  alignas(alignment) float x[w];
  for (int i = 0; i < w; ++i) x[i] = static_cast<float>(i % 3);
  const auto mask = simd::vfloat<TestType>::load_aligned(x) > simd::vfloat<TestType>(0.5f);
  const auto f =
      simd::select<TestType>(mask, simd::vfloat<TestType>(1.0f), simd::vfloat<TestType>(2.0f));
  const auto n = simd::select<TestType>(mask, simd::vint<TestType>(1), simd::vint<TestType>(2));
  for (int i = 0; i < w; ++i) {
    CHECK(f.get(static_cast<std::size_t>(i)) == (i % 3 > 0 ? 1.0f : 2.0f));
    CHECK(n.get(static_cast<std::size_t>(i)) == (i % 3 > 0 ? 1 : 2));
  }
}
