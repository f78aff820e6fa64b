#include <moeroute/data/dispatch_plan.hpp>

#include <catch2/catch_test_macros.hpp>

#include <moeroute/data/soft_plan.hpp>

#include "support/allocations.hpp"
#include "support/refusal.hpp"

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

TEST_CASE("plans for which there is no room are empty, and are plans again afterwards") {
  dispatch_plan p;
  p.reset(3, 2, 2);
  p.writable().offsets[2] = 6;
  CHECK(test::refusal([&] { p.reset(3, index_t{1} << 60, 2); }).find("more than any machine has") !=
        std::string::npos);
  CHECK((p.tokens() == 0 && p.experts() == 0 && p.choices() == 0));
  CHECK((p.slots() == 0 && p.slot_of_choice().empty() && p.token_of_slot().empty()));
  p.reset(3, 2, 2);
  CHECK((p.tokens() == 3 && p.experts() == 2 && p.k() == 2 && p.choices() == 6));

  soft_plan soft;
  soft.reset(4, 6, 2);
  constexpr index_t most = 0x7fffffff;
  CHECK(test::refusal([&] { soft.reset(most, most, 1); }).find("more than any machine has") !=
        std::string::npos);
  CHECK((soft.tokens() == 0 && soft.slots() == 0 && soft.experts() == 0));
  CHECK((soft.dispatch().rows == 0 && soft.combine().rows == 0));
  soft.reset(4, 6, 2);
  CHECK((soft.tokens() == 4 && soft.slots() == 6 && soft.experts() == 3));
}
