#include <moeroute/base/config.hpp>

#include <catch2/catch_test_macros.hpp>

TEST_CASE("the version has three numbers") {
  STATIC_REQUIRE(MOEROUTE_VERSION_MAJOR >= 0);
  STATIC_REQUIRE(MOEROUTE_VERSION_MINOR >= 0);
  STATIC_REQUIRE(MOEROUTE_VERSION_PATCH >= 0);
}

TEST_CASE("contracts are on exactly where assertions are, unless the user decides") {
#if defined(NDEBUG)
  STATIC_REQUIRE(MOEROUTE_CONTRACTS == 0);
#else
  STATIC_REQUIRE(MOEROUTE_CONTRACTS == 1);
#endif
}
