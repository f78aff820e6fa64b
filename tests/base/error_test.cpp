#include <moeroute/base/error.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include "support/refusal.hpp"

using namespace moeroute;
using test::refusal;

TEST_CASE("a wrong size is refused with stage, argument and both values") {
  CHECK(refusal([] { check_size("combine", "y.rows()", 3, 4); }) ==
        "moeroute::combine: y.rows() is 3, expected 4");
  CHECK(refusal([] { check_size("combine", "y.rows()", 4, 4); }) == "accepted");
}

TEST_CASE("a value outside its range is refused with both ends, and both ends are accepted") {
  const auto k = [](index_t value) {
    return refusal([=] { check_range("top_k", "k", value, 1, 8); });
  };
  CHECK(k(0) == "moeroute::top_k: k is 0, expected 1 to 8");
  CHECK(k(9) == "moeroute::top_k: k is 9, expected 1 to 8");
  CHECK(k(1) == "accepted");
  CHECK(k(8) == "accepted");
}

TEST_CASE("sizes beyond 32 bits are compared and shown whole") {
  CHECK(refusal([] { check_size("gemm", "x.cols()", 0x100000001, 1); }) ==
        "moeroute::gemm: x.cols() is 4294967297, expected 1");
}

TEST_CASE("a number is shown whole, however large it is") {
  using real = std::numeric_limits<double>;
  for (const double x : {1e15, 1e25, 1e31, 2e63, 1e100, 2e300, real::max(), real::lowest()}) {
    char number[400];
    std::snprintf(number, sizeof number, "%f", x);
    CHECK(refusal([&] { fail_value("stage", "a gain", x, "less"); }) ==
          "moeroute::stage: a gain is " + std::string(number) + ", expected less");
  }
  constexpr index_t least = std::numeric_limits<index_t>::min();
  CHECK(refusal([] { check_range("stage", "n", least, -1, -(least + 1)); }) ==
        "moeroute::stage: n is -9223372036854775808, expected -1 to 9223372036854775807");
}

TEST_CASE("an error can be caught as std::invalid_argument") {
  CHECK_THROWS_AS(fail("here", "no"), std::invalid_argument);
}

TEST_CASE("a sentence in parts reads as its text and numbers do, and is cut where it is endless") {
  CHECK(refusal([] {
          fail("plan", {"expert ", -3, std::string_view("xs", 1), index_t{1} << 40, " slots"});
        }) == "moeroute::plan: expert -3x1099511627776 slots");
  CHECK(refusal([] {
          fail("plan", {"of ", 0, " to ", std::size_t{7}, std::string_view(), "s"});
        }) == "moeroute::plan: of 0 to 7s");
  const char* const name = "mask";
  CHECK(refusal([&] { fail("plan", {name, " is missing"}); }) == "moeroute::plan: mask is missing");
  const std::string endless(3000, 'n');
  const std::string cut = refusal([&] { fail("plan", {"see ", endless.c_str(), "never"}); });
  CHECK(cut == "moeroute::plan: see " + endless.substr(0, 1023 - 20));
  CHECK(refusal([&] { fail("plan", endless); }) == "moeroute::plan: " + endless);
}
