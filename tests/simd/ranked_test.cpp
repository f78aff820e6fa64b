#include <moeroute/simd/select/ranked.hpp>

#include <array>
#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <vector>

#include "support/arches.hpp"

using namespace moeroute;

namespace {

struct pick {
  float value;
  std::int32_t column;
};

bool goes_before(const pick& a, const pick& b) {
  return a.value > b.value || (a.value == b.value && a.column < b.column);
}

// Every kind of float that can be selected, and -inf, each with the lowest and the highest columns.
std::vector<pick> picks() {
  std::vector<pick> list;
  for (const float magnitude :
       {0.0f, std::bit_cast<float>(1u), std::bit_cast<float>(0x7fffffu), 1.17549435e-38f, 1e-20f,
        0.99999994f, 1.0f, 1.0000001f, 3.4028235e38f, simd::plus_infinity})
    for (const float value : {magnitude, -magnitude})
      for (const std::int32_t column : {0, 1, 2, 0xffffe, 0xfffff}) list.push_back({value, column});
  return list;
}

template <class A>
pick lane(const simd::ranked<A>& x, int i) {
  simd::vfloat<A> value;
  simd::vint<A> column;
  simd::unrank<A>(x, value, column);
  return {value.get(static_cast<std::size_t>(i)), column.get(static_cast<std::size_t>(i))};
}

template <class A>
simd::ranked<A> everywhere(const pick& p) {
  return simd::rank<A>(simd::vfloat<A>(p.value), simd::vint<A>(p.column));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("a pair comes back from its rank, zeros without their sign", "",
                        test::widths) {
  for (const pick& p : picks()) {
    const pick back = lane<TestType>(everywhere<TestType>(p), simd::width<TestType> - 1);
    const float unsigned_zero = p.value == 0.0f ? 0.0f : p.value;
    CHECK(std::bit_cast<std::uint32_t>(back.value) == std::bit_cast<std::uint32_t>(unsigned_zero));
    CHECK(back.column == p.column);
  }
}

TEMPLATE_LIST_TEST_CASE("ranks order every two pairs: value descending, then column ascending", "",
                        test::widths) {
  const auto list = picks();
  bool right = true;
  for (const pick& p : list) {
    for (const pick& q : list) {
      simd::ranks<TestType, 2> both;
      both.set(0, everywhere<TestType>(p));
      both.set(1, everywhere<TestType>(q));
      simd::sort(both);
      const pick f = lane<TestType>(both.get(0), 0), s = lane<TestType>(both.get(1), 0);
      right &= !goes_before(s, f);
      right &= f.column == (goes_before(q, p) ? q : p).column;
      right &= s.column == (goes_before(q, p) ? p : q).column;
    }
  }
  CHECK(right);
}

TEMPLATE_LIST_TEST_CASE("nothing goes after everything, and is stored as (-inf, no_expert)", "",
                        test::widths) {
  using A = TestType;
  for (const pick& p : picks()) {
    simd::ranks<A, 2> both;
    both.set(0, simd::rank_nothing<A>());
    both.set(1, everywhere<A>(p));
    simd::sort(both);
    CHECK(lane<A>(both.get(0), 0).column == p.column);
  }
  alignas(alignment) std::array<float, block_rows> value{};
  alignas(alignment) std::array<std::int32_t, block_rows> column{};
  simd::ranks<A, 1> top;
  top.set(0, simd::rank_nothing<A>());
  simd::store_top(top, 1, nullptr, value.data(), column.data());
  CHECK(value[0] == simd::minus_infinity);
  CHECK(column[0] == no_expert);
}
