#include <moeroute/data/dispatch_plan.hpp>

#include <catch2/catch_test_macros.hpp>

#include "support/allocations.hpp"

using namespace moeroute;

TEST_CASE("a plan nobody made has no slots") {
  const dispatch_plan p;
  CHECK((p.slots() == 0 && p.unrouted() == 0 && p.experts() == 0));
  CHECK((p.token_of_slot().empty() && p.slot_of_choice().empty()));
}

TEST_CASE("sizes follow the offsets") {
  dispatch_plan p;
  p.reset(3, 2, 2);
  const auto parts = p.writable();
  parts.offsets[0] = 0;
  parts.offsets[1] = 1;
  parts.offsets[2] = 4;
  CHECK((p.slots() == 4 && p.unrouted() == 2));
  CHECK((p.load(0) == 1 && p.load(1) == 3));
  CHECK(p.token_of_slot().size() == 4);
  CHECK(p.slot_of_choice().size() == 6);
  CHECK(p.offsets().size() == 3);
}

TEST_CASE("a warm plan never allocates") {
  dispatch_plan p;
  p.reset(64, 256, 8);
  CHECK(test::allocations_during([&] {
          p.reset(64, 256, 8);
          p.reset(1, 16, 4);
          p.reset(0, 256, 8);
        }) == 0);
}
