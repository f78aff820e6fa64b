// A user's own choice wins over NDEBUG.
#define MOEROUTE_CONTRACTS 0
#include <moeroute/base/contract.hpp>

#include <catch2/catch_test_macros.hpp>

TEST_CASE("a contract that is off does not evaluate its condition") {
  int evaluated = 0;
  const auto condition = [&] { return ++evaluated == 0; };
  MOEROUTE_EXPECTS(condition());
  CHECK(evaluated == 0);
  CHECK_FALSE(condition());
}
