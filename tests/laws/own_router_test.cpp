// The laws for routers that are not the library's: those of examples/02_my_own_router.cpp and
// 11_ragged_and_batch.cpp, which are files to copy and are therefore included whole.
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <moeroute/policy/row/transformed.hpp>
#include <vector>

#include "laws/all_laws.hpp"

#define main my_own_router_main
#include "02_my_own_router.cpp"
#undef main
#define main ragged_and_batch_main
#include "11_ragged_and_batch.cpp"
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

TEST_CASE("routers of one's own that choose a varying number or see the batch obey theirs") {
  const auto obeys = [](const test::listed_router& own) {
    for (const test::named_law& law : test::all_laws) {
      INFO(own.name << ": " << law.title);
      if (law.promised(own)) CHECK(law.obeys(own) == "");
    }
  };
  // What it chooses is in the order of the experts, not of their logits.
  obeys({.name = "as_good_as_half",
         .make = [](test::index_t, test::index_t) { return test::make_subject(as_good_as_half{}); },
         .reference =
             [](const std::vector<float>& z, test::index_t tokens, test::index_t experts,
                test::index_t) {
               oracle::decision d;
               for (test::index_t t = 0; t < tokens; ++t) {
                 const float* const row = z.data() + t * experts;
                 double best = -HUGE_VAL;
                 for (test::index_t e = 0; e < experts; ++e)
                   if (double{row[e]} > best) best = double{row[e]};
                 const auto first = static_cast<std::size_t>(t * experts);
                 for (test::index_t e = 0; e < experts; ++e) {
                   const double x = double{row[e]};
                   const double ratio = x == best ? 1.0 : x < best ? std::exp(x - best) : 0.0;
                   if (!(ratio >= 0.5) || x == -HUGE_VAL) continue;
                   d.ids.push_back(static_cast<moeroute::expert_id>(e));
                   d.weights.push_back(ratio);
                 }
                 d.ids.resize(first + static_cast<std::size_t>(experts), moeroute::no_expert);
                 d.weights.resize(d.ids.size(), 0.0);
               }
               return d;
             },
         .shift_invariant = true,
         .permutable = false,
         .every_expert = true});
  obeys({.name = "one_token_each",
         .make = [](test::index_t, test::index_t) { return test::make_subject(one_token_each{}); },
         .permutable = false,  // the first experts are served first
         .rows_apart = false,
         .most_k = 1});
  // The library's own rules of both kinds, as their templates make them.
  using namespace moeroute;
  obeys({.name = "top_p",
         .make = [](test::index_t, test::index_t) { return test::make_subject(top_p{.p = 0.7f}); },
         .permutable = false,
         .every_expert = true});
  obeys({.name = "expert_choice",
         .make = [](test::index_t, test::index_t) { return test::make_subject(expert_choice<>{}); },
         .permutable = false,
         .compact = true,
         .rows_apart = false,
         .every_expert = true});
  obeys(
      {.name = "sinkhorn",
       .make = [](test::index_t k, test::index_t) { return test::make_subject(sinkhorn{.k = k}); },
       .permutable = false,
       .rows_apart = false});
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
