// The laws for routers that are not the library's: those of examples/02_my_own_router.cpp and
// 11_ragged_and_batch.cpp, which are files to copy and are therefore included whole.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/row/product_keys.hpp>
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

TEST_CASE("routers with other columns than experts obey the laws that do not speak of columns") {
  using namespace moeroute;
  constexpr index_t tokens = 19, experts = 12, k = 3;
  const auto obeys = [&](const char* name, std::unique_ptr<test::subject> router, index_t columns) {
    for (const test::shape shape : test::all_shapes) {
      INFO(name << ", " << test::name(shape));
      const std::vector<float> z = test::make_logits(shape, 5, tokens, columns);
      const test::laws::routed all = test::laws::route(*router, z, tokens, columns);
      REQUIRE(all.ids.size() == tokens * k);
      std::vector<float> turned, apart(static_cast<std::size_t>(tokens * (columns + 3)), 1e9f);
      std::vector<std::uint8_t> mask;
      test::laws::routed expected;
      for (index_t t = 0; t < tokens; ++t) {
        const auto first = all.ids.begin() + t * k;
        std::vector<expert_id> ids(first, first + k);
        std::erase(ids, no_expert);
        std::sort(ids.begin(), ids.end());
        CHECK(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
        if (!ids.empty()) CHECK((ids.front() >= 0 && ids.back() < experts));
        for (index_t c = t * k; c < (t + 1) * k; ++c)
          CHECK(std::isfinite(all.weights[static_cast<std::size_t>(c)]));
        const index_t back = tokens - 1 - t;
        turned.insert(turned.end(), z.begin() + back * columns, z.begin() + (back + 1) * columns);
        std::copy_n(z.begin() + t * columns, columns, apart.begin() + t * (columns + 3));
        mask.push_back(t % 3 != 1);
        const test::laws::routed alone = test::laws::route(
            *router, std::vector<float>(z.begin() + t * columns, z.begin() + (t + 1) * columns), 1,
            columns);
        expected.ids.insert(expected.ids.end(), alone.ids.begin(), alone.ids.end());
        expected.weights.insert(expected.weights.end(), alone.weights.begin(), alone.weights.end());
      }
      CHECK(test::laws::difference(all, expected) == "");
      const test::laws::routed reversed = test::laws::route(*router, turned, tokens, columns);
      assignment strided, masked, threads;
      router->route({apart.data(), tokens, columns, columns + 3}, strided);
      router->route({z.data(), tokens, columns}, side_inputs{.mask = mask}, masked);
      router->route({z.data(), tokens, columns}, 3, threads);
      CHECK(test::laws::difference(test::laws::copy_of(strided), all) == "");
      CHECK(test::laws::difference(test::laws::copy_of(threads), all) == "");
      for (index_t c = 0; c < tokens * k; ++c) {
        const auto at = static_cast<std::size_t>(c),
                   other = static_cast<std::size_t>((tokens - 1 - c / k) * k + c % k);
        CHECK(reversed.ids[other] == all.ids[at]);
        CHECK(masked.ids()[at] ==
              (mask[static_cast<std::size_t>(c / k)] != 0 ? all.ids[at] : no_expert));
      }
    }
  };
  const router<softmax> best{.selection = {.k = k}};
  const weighed_by_second<router<softmax>> halves{best};
  const transformed<pass_logits, router<softmax>> passes{pass_logits{.passes = 3}, best};
  obeys("product keys", test::make_subject(product_keys<>{.choices = k, .first_keys = 3}), 7);
  obeys("weights from a second half", test::make_subject(halves), 24);
  obeys("three passes", test::make_subject(passes), 36);
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
