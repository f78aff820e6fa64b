// The laws for a router that is not the library's: that of examples/02_my_own_router.cpp, which is
// one file to copy and is therefore included whole.
#include <catch2/catch_test_macros.hpp>

#include "laws/all_laws.hpp"

#define main my_own_router_main
#include "02_my_own_router.cpp"
#undef main

TEST_CASE("a router of one's own obeys the laws that it promises") {
  const test::listed_router own{
      .name = "one_per_group",
      .make = [](test::index_t k, test::index_t) { return test::make_subject(one_per_group{k}); },
      .shift_invariant = true,
      .permutable = false,  // another numbering puts experts into other groups
      .compact = false};    // a group that is masked whole leaves its place empty
  for (const test::named_law& law : test::all_laws) {
    INFO(law.title);
    if (law.promised(own)) CHECK(law.obeys(own) == "");
  }
}
