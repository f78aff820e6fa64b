// The laws for a router that is not the library's: that of examples/02_my_own_router.cpp, which is
// one file to copy and is therefore included whole.
#include <catch2/catch_test_macros.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/transformed.hpp>
#include <vector>

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

TEST_CASE("a router of one's own is wrapped as the library's are") {
  using namespace moeroute;
  const one_per_group own{2};
  const std::vector<float> z{0.1f, 2.0f, -1.0f, 0.5f, 3.0f, 0.2f, 0.4f, 0.3f};
  const matrix_view<const float> logits(z.data(), 2, 4);
  const auto ids = [&](const auto& router) {
    workspace ws;
    assignment out;
    route(router, logits, {}, ws, out);
    return std::vector<expert_id>(out.ids().begin(), out.ids().end());
  };
  const std::vector<expert_id> alone = ids(own);
  CHECK(alone == std::vector<expert_id>{1, 3, 0, 2});
  const transformed<standardized, one_per_group> scaled{standardized{2.0f}, own};
  CHECK(ids(scaled) == alone);
  const explore<one_per_group> greedy{own, 0.0f};
  CHECK(ids(greedy) == alone);
}
