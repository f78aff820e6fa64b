#include <moeroute/base/error.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

#include "support/guarded.hpp"
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

TEST_CASE("the first value that is NaN is refused by its number; others are numbers") {
  float values[] = {1.0f, -std::numeric_limits<float>::infinity(), 0.0f, 3e38f};
  const auto said = [&](index_t n) {
    return refusal([&] { check_numbers("bias", "values", values, n); });
  };
  CHECK(said(4) == "accepted");
  values[3] = std::numeric_limits<float>::quiet_NaN();
  CHECK(said(3) == "accepted");
  CHECK(said(4) == "moeroute::bias: values: value 3 is NaN, expected a number");
  values[0] = values[2] = values[3];
  CHECK(said(4) == "moeroute::bias: values: value 0 is NaN, expected a number");
  CHECK(refusal([] { check_numbers("bias", "values", nullptr, 0); }) == "accepted");
}

TEST_CASE("a value is refused with what is expected, and of how many") {
  CHECK(refusal([] { fail_value("plan", "k", index_t{9}, "at most the experts, ", 8); }) ==
        "moeroute::plan: k is 9, expected at most the experts, 8");
  CHECK(refusal([] { fail_value("plan", "k", index_t{-9}, "more"); }) ==
        "moeroute::plan: k is -9, expected more");
  CHECK(refusal([] { fail_value("plan", "kind", std::string("odd"), "even"); }) ==
        "moeroute::plan: kind is odd, expected even");
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
  CHECK(refusal([] { fail("plan", {static_cast<const char*>(nullptr), "s"}); }) ==
        "moeroute::plan: s");
  const char* const name = "mask";
  CHECK(refusal([&] { fail("plan", {name, " is missing"}); }) == "moeroute::plan: mask is missing");
  const std::string endless(3000, 'n');
  const std::string cut = refusal([&] { fail("plan", {"see ", endless.c_str(), "Never"}); });
  CHECK(cut == "moeroute::plan: see " + endless.substr(0, 1023 - 20));
  CHECK(refusal([&] { fail("plan", endless); }) == "moeroute::plan: " + endless);
}

TEST_CASE("a message is its first 1023 bytes, whichever part the end lies in") {
  std::string text;
  for (int i = 0; i < 1100; ++i) text += static_cast<char>('a' + i % 23);  // no byte as the next
  std::string wrong;
  for (std::size_t size = 980; size < 1030; ++size) {
    const std::string first = text.substr(0, size);
    const auto said = [&](const message_part& second) {
      return refusal([&] { fail("plan", {first.c_str(), second, "!?"}); });
    };
    const auto whole = [&](const char* second) {
      return ("moeroute::plan: " + first + second + "!?").substr(0, 1023);
    };
    if (said("NEVER") != whole("NEVER") || said(-40961) != whole("-40961") || said("") != whole(""))
      wrong += " " + std::to_string(size);
    const std::string where = text.substr(0, size);
    if (refusal([&] { fail(where.c_str(), {"k is ", 7}); }) !=
        ("moeroute::" + where + ": k is 7").substr(0, 1023))
      wrong += " where " + std::to_string(size);
  }
  CHECK(wrong == "");
}

TEST_CASE("a part is written over the room that it is given and no byte more, from its own bytes") {
  test::guarded<char> room(32), bytes(4);
  char* const own = bytes.window(4, test::guarded_end::back);  // no zero follows
  std::copy_n("mask", 4, own);
  const std::pair<message_part, std::string> parts[] = {
      {"shared", "shared"}, {std::string_view(own, 4), "mask"}, {index_t{-1024}, "-1024"}};
  for (const auto& [part, text] : parts)
    for (std::size_t size = 1; size <= 8; ++size) {
      char* const to = room.window(static_cast<index_t>(size), test::guarded_end::back);
      CHECK(part.write(to, size) == static_cast<int>(text.size()));
      CHECK(std::string(to) == text.substr(0, size - 1));
    }
}
