#include <moeroute/policy/concepts.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <moeroute/data/routing_record.hpp>
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace side_inputs_tests {

namespace {

constexpr index_t tokens = 35, experts = 16;

std::vector<float> logits() { return test::make_logits(test::shape::normal, 71, tokens, experts); }

// 0, 1, ..., most, 0, 1, ...
std::vector<std::int32_t> own_counts(int most) {
  std::vector<std::int32_t> own;
  for (int t = 0; t < tokens; ++t) own.push_back(t % (most + 1));
  return own;
}

/// What a token with an own k decides differently from the router that has this k, `with(k)`.
template <class With>
std::string own_k_differs(const With& with, int k, side_inputs side = {}) {
  const std::vector<std::int32_t> own = own_counts(k);
  side.k_of_token = own;
  const assignment a = routed(with(k), logits(), experts, side);
  side.k_of_token = {};
  for (int few = 0; few <= k; ++few) {
    const assignment expected = routed(with(std::max(few, 1)), logits(), experts, side);
    for (index_t t = few; t < tokens; t += k + 1)
      for (std::size_t r = 0; r < a.ids(t).size(); ++r) {
        const bool there = static_cast<int>(r) < few;
        if (a.ids(t)[r] != (there ? expected.ids(t)[r] : no_expert) ||
            a.weights(t)[r] != (there ? expected.weights(t)[r] : 0.0f))
          return "token " + std::to_string(t) + " with k = " + std::to_string(few) + ", rank " +
                 std::to_string(r) + ": weight " + std::to_string(a.weights(t)[r]);
      }
  }
  return "";
}

}  // namespace

TEST_CASE("a token's own k decides as a router with that k, weights normalised over them") {
  const std::vector<float> bias = test::make_logits(test::shape::normal, 72, 1, experts);
  CHECK(own_k_differs([](index_t k) { return router{softmax{}, top_k{.k = k}}; }, 4) == "");
  CHECK(own_k_differs([](index_t k) { return router{softmax{}, top_k{.k = k}, sum_normalized}; },
                      4) == "");
  CHECK(own_k_differs([](index_t k) { return router{softmax_selected{}, top_k{.k = k}}; }, 5) ==
        "");
  CHECK(own_k_differs(
            [&](index_t k) {
              return router{sigmoid{}, top_k{.k = k, .groups = 4, .topk_group = 2}, sum_normalized,
                            selection_bias(bias)};
            },
            4) == "");
  CHECK(own_k_differs(
            [](index_t k) { return product_keys<>{.choices = k, .weight = sum_normalized}; }, 4) ==
        "");
  CHECK(own_k_differs([](index_t k) { return sinkhorn{.k = k, .weights = plan_weights::plan}; },
                      3) == "");
  CHECK(own_k_differs([](index_t k) { return selective_sinkhorn{.k = k, .probability = 0.0f}; },
                      3) == "");
  CHECK(own_k_differs(
            [](index_t k) {
              return sparse_transport_token_choice{.k = k, .transport = {.support = 8}};
            },
            3) == "");
}

TEST_CASE("a record's choices and a table's are cut by the own k, and weighed as what is left") {
  const std::vector<float> z = logits();
  routing_record<std::uint8_t> record;
  record.record(routed(router{softmax{}, top_k{.k = 4}}, z, experts));
  const std::vector<std::int32_t> own = own_counts(4), ids(tokens, 0);
  const replay<softmax, std::uint8_t> again{.record = &record, .weight = sum_normalized};
  const assignment a = routed(again, z, experts, {.k_of_token = own});
  const assignment b =
      routed(router{softmax{}, top_k{.k = 4}, sum_normalized}, z, experts, {.k_of_token = own});
  CHECK(test::bit_difference(a.ids(), b.ids()) == "");
  CHECK(test::bit_difference(a.weights(), b.weights()) == "");
  const expert_table table({3, 1, 7, 2}, 4, experts);
  const table_router<uniform_score> fixed{.table = &table, .weight = sum_normalized};
  const assignment c = routed(fixed, z, experts, {.token_ids = ids, .k_of_token = own});
  CHECK(test::listed(c.ids(2)) == std::vector<expert_id>{3, 1, no_expert, no_expert});
  CHECK(test::listed(c.weights(2)) == std::vector<float>{0.5f, 0.5f, 0.0f, 0.0f});
}

TEST_CASE("with shared experts an own k cuts the routed ones, and the shared ones stay") {
  const router plain{softmax{}, top_k{.k = 3}, sum_normalized};
  const std::vector<std::int32_t> own = own_counts(3);
  const assignment a =
      routed(with_shared<router<softmax>>{plain, 2, 0.25f}, logits(), experts, {.k_of_token = own});
  const assignment routed_only = routed(plain, logits(), experts, {.k_of_token = own});
  for (index_t t = 0; t < tokens; ++t) {
    for (std::size_t r = 0; r < 3; ++r) {
      CHECK(a.ids(t)[r] == routed_only.ids(t)[r]);
      CHECK(a.weights(t)[r] == routed_only.weights(t)[r]);
    }
    CHECK((a.ids(t)[3] == experts && a.ids(t)[4] == experts + 1));
    CHECK((a.weights(t)[3] == 0.25f && a.weights(t)[4] == 0.25f));
  }
  const std::vector<std::int32_t> four(tokens, 4);
  CHECK(test::refusal([&] {
          routed(with_shared<router<softmax>>{plain, 2, 0.25f}, logits(), experts,
                 {.k_of_token = four});
        }) == "moeroute::route: k_of_token is 4, expected 0 to 3");
}

TEST_CASE("top-p and experts that choose give a token no more than its own k") {
  const std::vector<std::int32_t> own = own_counts(3);
  const side_inputs side{.k_of_token = own};
  const top_p by_mass{.p = 0.9f, .weight = sum_normalized};
  const assignment all = routed(by_mass, logits(), experts);
  const assignment mass = routed(by_mass, logits(), experts, side);
  const assignment chosen = routed(expert_choice<>{}, logits(), experts, side);
  const assignment planned = routed(sinkhorn_expert_choice{}, logits(), experts, side);
  bool any = false;
  for (index_t t = 0; t < tokens; ++t) {
    const index_t most = own[static_cast<std::size_t>(t)];
    CHECK(mass.count(t) == std::min(most, all.count(t)));
    float sum = 0.0f;
    for (const float w : mass.weights(t)) sum += w;
    if (most > 0) CHECK(std::abs(sum - 1.0f) < 1e-6f);
    for (std::size_t r = 0; r < mass.ids(t).size(); ++r) CHECK(mass.ids(t)[r] == all.ids(t)[r]);
    CHECK(chosen.count(t) <= most);
    CHECK(planned.count(t) <= most);
    any = any || planned.count(t) > 0;
  }
  CHECK(any);
  // No more than a cap leaves.
  CHECK(test::refusal([&] { routed(top_p{.max_k = 2}, logits(), experts, side); }) ==
        "moeroute::route: k_of_token is 3, expected 0 to 2");
}

TEST_CASE("a side input that a router does not read is refused by name, never ignored") {
  const std::vector<std::int32_t> ids(tokens, 0), own(tokens, 1);
  const std::vector<std::uint8_t> modality(tokens, 0);
  const std::vector<float> shared(tokens, 1.0f), noise = logits();
  const matrix_view<const float> noise_logits(noise.data(), tokens, experts);
  // Which of the five a router takes, as letters: ids, own k, modality, shared weight, noise.
  const auto taken = [&](const auto& router) {
    std::string letters;
    const auto with = [&](char letter, const side_inputs& side) {
      const std::string said = test::refusal([&] { routed(router, logits(), experts, side); });
      const bool unread =
          said.find("is given, which this router does not read") != std::string::npos;
      if (!unread) letters += letter;
      // Without it the router is content, unless it needs something else.
      const std::string rest = test::refusal(
          [&] { routed(router, logits(), experts, side.only(side_use_of(router, experts))); });
      CHECK(rest.find("does not read") == std::string::npos);
    };
    with('i', {.token_ids = ids});
    with('k', {.k_of_token = own});
    with('m', {.modality = modality});
    with('s', {.shared_weight = shared});
    with('n', {.noise_logits = noise_logits});
    return letters;
  };
  const router plain{softmax{}, top_k{.k = 2}};
  router noisy = plain;
  noisy.transform.noise.kind = noise_kind::gaussian;
  const expert_table table({0, 1}, 2, experts);
  routing_record<std::uint8_t> record;
  record.record(routed(plain, logits(), experts));
  CHECK(taken(plain) == "k");
  CHECK(taken(noisy) == "kn");
  CHECK(taken(table_router<softmax>{.table = &table}) == "ik");
  CHECK(taken(replay<softmax, std::uint8_t>{.record = &record}) == "k");
  CHECK(taken(product_keys<>{}) == "k");
  CHECK(taken(top_p{}) == "k");
  CHECK(taken(threshold_router<relu>{}) == "");
  CHECK(taken(sparsemixer{}) == "k");
  CHECK(taken(gshard_top2{}) == "k");
  CHECK(taken(random_choice{2}) == "");
  CHECK(taken(by_modality<router<softmax>>{plain, noisy, 8}) == "kmn");
  CHECK(taken(with_shared<router<softmax>>{noisy, 1}) == "ksn");
  CHECK(taken(expert_choice<>{}) == "k");
  CHECK(taken(sinkhorn{}) == "k");
  CHECK(taken(selective_sinkhorn{.noise = {.kind = noise_kind::gumbel}}) == "kn");
  CHECK(taken(sinkhorn_expert_choice{}) == "k");
  CHECK(taken(base_assignment{.phase = routing_phase::evaluation}) == "");
  CHECK(taken(sparse_transport{}) == "");
  CHECK(taken(sparse_transport_token_choice{}) == "k");
  CHECK(taken(make_router({.experts = experts, .selection = selection_kind::expert_table},
                          {.table = &table})) == "ik");
  CHECK(test::refusal([&] { routed(plain, logits(), experts, {.token_ids = ids}); }) ==
        "moeroute::route: token_ids is given, which this router does not read: leave it out");
}

TEST_CASE("the second modality reads its own columns of the noise logits") {
  const std::vector<float> z = logits(), zero(tokens * experts, 0.0f);
  std::vector<float> loud = zero;
  for (index_t t = 0; t < tokens; ++t) std::fill_n(loud.begin() + t * experts + 8, 8, 5.0f);
  const std::vector<std::uint8_t> second(tokens, 1);
  router noisy{softmax{}, top_k{.k = 2}};
  noisy.transform.noise.kind = noise_kind::gaussian;
  const by_modality<router<softmax>> both{noisy, noisy, 8};
  const auto with = [&](const std::vector<float>& noise) {
    return test::listed(
        routed(both, z, experts,
               {.modality = second, .noise_logits = {noise.data(), tokens, experts}})
            .ids());
  };
  std::vector<float> first_loud = zero;
  for (index_t t = 0; t < tokens; ++t) std::fill_n(first_loud.begin() + t * experts, 8, 5.0f);
  CHECK(with(first_loud) == with(zero));
  CHECK(with(loud) != with(zero));
}

}  // namespace side_inputs_tests
