// Every property on tens of thousands of random byte strings.
#include <catch2/catch_test_macros.hpp>
#include <cstdlib>

#include "properties/capacity.hpp"
#include "properties/hold.hpp"
#include "properties/plan.hpp"
#include "properties/select.hpp"
#include "properties/spec.hpp"

TEST_CASE("the k best are those of the sorted row, for 10,000 random E, k, rows and storages") {
  test::hold(test::selection_property, 10000);
}

TEST_CASE("30,000 random specs are refused in a sentence or route as they say") {
  test::specs_compared = 0;
  test::hold(test::spec_property, 30000);
  // Neither refusals nor ragged and random choices may leave the oracle without work.
  INFO(test::specs_compared << " specs compared");
  CHECK((test::specs_compared > 2000 || std::getenv("MOEROUTE_BYTES") != nullptr));
}

TEST_CASE("100,000 random assignments are planned as brute force plans them, or refused") {
  test::hold(test::plan_property, 100000);
}

TEST_CASE("100,000 random capacities drop whom the ranking of all rivals drops, or are refused") {
  test::hold(test::capacity_property, 100000);
}
