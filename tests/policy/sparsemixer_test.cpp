#include <moeroute/policy/row/sparsemixer.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "oracle/spec_routing.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

TEST_CASE("SparseMixer decides what float64 decides, on every shape") {
  for (const index_t experts : {2, 3, 16, 60, 257})
    for (const test::shape s : test::all_shapes) {
      const index_t tokens = 18;
      const std::vector<float> logits = test::make_logits(s, 2, tokens, experts);
      const assignment a = routed(sparsemixer{}, logits, experts);
      const router_spec spec{
          .experts = experts, .k = 2, .selection = selection_kind::sparsemixer, .jitter = 0.01f};
      INFO(test::name(s) << ", E = " << experts);
      for (index_t t = 0; t < tokens; ++t) {
        // Shares among several +inf are a law of their own.
        if (s == test::shape::plus_infs) continue;
        CHECK(oracle::break_of(spec, {logits.data() + t * experts}, a.ids(t), a.weights(t)) == "");
      }
    }
}

TEST_CASE("the two choices differ, and each weight is in (0, 1]") {
  const std::vector<float> logits = test::make_logits(test::shape::quantised, 4, 200, 16);
  const assignment a = routed(sparsemixer{}, logits, 16);
  for (index_t t = 0; t < 200; ++t) {
    CHECK(a.ids(t)[0] != a.ids(t)[1]);
    for (const float w : a.weights(t)) CHECK((w > 0.0f && w <= 1.0f));
  }
}

TEST_CASE("a best logit that is further than 2 jitter from the next has weight exactly 1") {
  CHECK(routed(sparsemixer{}, {1.0f, 0.97f, 0.5f}, 3).weights(0)[0] == 1.0f);
  CHECK(routed(sparsemixer{}, {1.0f, 0.99f, 0.5f}, 3).weights(0)[0] < 1.0f);
  // The size of the larger of |logit| and maximum scales the distance, also below 0.
  CHECK(routed(sparsemixer{}, {-1.0f, -1.03f, -2.0f}, 3).weights(0)[0] == 1.0f);
  CHECK(routed(sparsemixer{}, {-1.0f, -1.01f, -2.0f}, 3).weights(0)[0] < 1.0f);
}

TEST_CASE("0 / 0 counts as close") {
  const assignment a = routed(sparsemixer{}, {0.0f, 0.0f, -1.0f}, 3);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{0, 1});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{0.5f, 1.0f});
}

TEST_CASE("several +inf are chosen by id with finite weights") {
  const assignment a = routed(sparsemixer{}, {1.0f, test::infinity, test::infinity}, 3);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{1, 2});
  for (const float w : a.weights(0)) CHECK((w > 0.0f && w <= 1.0f));
}

TEST_CASE("one expert that can be chosen is the only choice") {
  const assignment a = routed(sparsemixer{}, {test::not_a_number, 3.0f, -test::infinity}, 3);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{1, no_expert});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{1.0f, 0.0f});
}

TEST_CASE("one expert, or a negative jitter, is refused") {
  CHECK(test::refusal([] { sparsemixer{}.check(1); }) ==
        "moeroute::sparsemixer: E is 1, expected 2 to 1048576");
  CHECK(test::refusal([] { sparsemixer{-0.5f}.check(4); }) ==
        "moeroute::sparsemixer: jitter is -0.500000, expected >= 0");
}
