#include <moeroute/base/read_number.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>

using moeroute::detail::read_number;

// Also where a standard library has from_chars of whole numbers alone.
TEST_CASE("a text is a number where all of it is one, without space, plus or hexadecimal digits") {
  const auto real = [](std::string_view text) {
    double x = 5;  // what is too large leaves it
    return read_number(text, x) ? x : -77;
  };
  CHECK(real("0.5") == 0.5);
  CHECK(real("-1.25e-3") == -1.25e-3);
  CHECK(real("3") == 3);
  CHECK(real(".5") == 0.5);
  CHECK(real("2.") == 2);
  CHECK(real("1E2") == 100);
  CHECK(real("0.1") == 0.1);
  CHECK(std::isinf(real("inf")));
  CHECK(real("-inf") < 0);
  CHECK(std::isnan(real("nan")));
  for (const char* text :
       {"", "-", " 1", "1 ", "+1", "0x10", "1e", "e5", "1.5.2", "1-2", "--1", "one", "1e999", ","})
    CHECK(real(text) == -77);
  float x = 0;
  CHECK((read_number("0.1", x) && x == 0.1f));
  std::int64_t n = 0;
  CHECK((read_number("-12", n) && n == -12));
  CHECK_FALSE(read_number("1.5", n));
}
