#include "laws/router_laws.hpp"

#include <catch2/catch_test_macros.hpp>

#include "laws/all_laws.hpp"
#include "support/counting_new.hpp"

TEST_CASE("every router of the list obeys the laws that it promises") {
  for (const test::named_law& law : test::all_laws) DYNAMIC_SECTION(law.title) {
      int asked = 0;
      for (const test::listed_router& router : test::listed_routers()) {
        if (!law.promised(router)) continue;
        ++asked;
        CHECK(law.obeys(router) == "");
      }
      CHECK(asked > 0);
    }
}
