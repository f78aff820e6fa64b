#include <moeroute/policy/router.hpp>

#include <algorithm>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::shape;

namespace {

/// A user's score that does not keep the order of logits: the nearer to 1, the higher.
struct near_one {
  static constexpr score_traits traits{.monotone = false, .shift_invariant = false};

  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    for (index_t e = 0; e < experts; ++e) score[e] = 4.0f - std::abs(z[e] - 1.0f);
  }
  template <class A = simd::default_arch>
  static void score_choices(const logit_block&, choice_block&, score_scale) {}
};
static_assert(token_router<router<near_one>>);

struct block_choices {
  std::vector<expert_id> ids;  ///< [T, k]
  std::vector<float> weights;  ///< [T, k]
};

/// Routes up to 16 rows on one instruction set.
template <class A, class Router>
block_choices block(const Router& r, const std::vector<float>& z, int tokens, index_t experts) {
  r.check(experts);
  workspace memory;
  const auto scratch_of_block = memory.carve([&](scratch& tape) { return r.carve(tape, experts); });
  const auto k = static_cast<std::size_t>(r.k());
  std::vector<expert_id> id(k * block_rows);
  std::vector<float> value(k * block_rows);
  const side_inputs side;
  choice_block c{static_cast<int>(k), id.data(), value.data()};
  r.template route_block<A>(logit_block{z.data(), experts, tokens, experts, 0, &side},
                            scratch_of_block, c);
  block_choices out;
  for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i)
    for (std::size_t rank = 0; rank < k; ++rank) {
      out.ids.push_back(id[rank * block_rows + i]);
      out.weights.push_back(value[rank * block_rows + i]);
    }
  return out;
}

template <class A, class Router>
std::string differs(const Router& r) {
  for (const shape s : test::all_shapes)
    for (const index_t experts : {7, 16, 60, 72, 257}) {
      const int tokens = 1 + static_cast<int>(experts) % block_rows;
      const std::vector<float> z = test::make_logits(s, 8, tokens, experts);
      const block_choices a = block<A>(r, z, tokens, experts);
      const block_choices b = block<simd::default_arch>(r, z, tokens, experts);
      std::string broken = test::bit_difference(a.ids, b.ids);
      if (broken.empty()) broken = test::bit_difference(a.weights, b.weights);
      if (!broken.empty())
        return to_string(test::reproducer{s, 8, tokens, experts, r.k()}) + ": " + broken;
    }
  return "";
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("ids and weights have the same bits on every instruction set", "",
                        test::widths) {
  CHECK(differs<TestType>(router<softmax>{.selection = {.k = 6}}) == "");
  CHECK(differs<TestType>(router<softmax>{.selection = {.k = 4}, .weight = sum_normalized}) == "");
  CHECK(differs<TestType>(router<softmax>{
            .selection = {.k = 3},
            .weight = {.normalize = normalization::lp, .p = 3.0f, .scale = 2.5f}}) == "");
  CHECK(differs<TestType>(router<softmax_selected>{.selection = {.k = 5}}) == "");
}

TEST_CASE("a score that does not keep the order of logits decides by itself") {
  const index_t experts = 20;
  const std::vector<float> z = test::make_logits(shape::quantised, 9, 16, experts);
  const router<near_one> r{.selection = {.k = 4}};
  REQUIRE_FALSE(r.selects_on_logits());
  const block_choices got = block<simd::default_arch>(r, z, 16, experts);
  std::vector<float> score(z.size());
  near_one::score_row(z.data(), static_cast<index_t>(z.size()), score.data());
  std::vector<expert_id> ids;
  std::vector<float> weights;
  for (index_t t = 0; t < 16; ++t)
    for (const expert_id e : oracle::top_k(score.data() + t * experts, experts, 4)) {
      ids.push_back(e);
      weights.push_back(score[static_cast<std::size_t>(t * experts + e)]);
    }
  CHECK(test::bit_difference(got.ids, ids) == "");
  CHECK(test::bit_difference(got.weights, weights) == "");
}

TEST_CASE("a masked logit is not chosen, whatever its score is") {
  const std::vector<float> z = {-test::infinity, 5.0f, test::not_a_number, 4.0f};
  const block_choices got =
      block<simd::default_arch>(router<near_one>{.selection = {.k = 4}}, z, 1, 4);
  CHECK(got.ids == std::vector<expert_id>{3, 1, no_expert, no_expert});
  CHECK(test::bit_difference(got.weights, std::vector<float>{1, 0, 0, 0}) == "");
}

TEST_CASE("monotone scores without a bias are chosen on logits, where scores would tie") {
  // exp of both differences underflows: equal scores, different logits.
  const std::vector<float> z = {-500.0f, 0.0f, -400.0f};
  const router<softmax> r{.selection = {.k = 3}};
  CHECK(r.selects_on_logits());
  CHECK(block<simd::default_arch>(r, z, 1, 3).ids == std::vector<expert_id>{1, 2, 0});
}

TEMPLATE_TEST_CASE("a bias moves the choice and never the weight", "", softmax, sigmoid) {
  for (const shape s : test::all_shapes)
    for (const index_t experts : {7, 60, 257}) {
      const std::vector<float> z = test::make_logits(s, 10, 16, experts);
      std::vector<float> bias, score(static_cast<std::size_t>(experts)), choice(score.size());
      for (index_t e = 0; e < experts; ++e) bias.push_back(static_cast<float>(e % 5) - 2.0f);
      const router<TestType> r{.selection = {.k = 4}, .bias = selection_bias(bias)};
      const block_choices got = block<simd::default_arch>(r, z, 16, experts);
      std::vector<expert_id> ids;
      std::vector<float> weights;
      for (index_t t = 0; t < 16; ++t) {
        const float* row = z.data() + t * experts;
        TestType::score_row(row, experts, score.data());
        for (std::size_t e = 0; e < score.size(); ++e)
          choice[e] = row[e] > -test::infinity ? score[e] + bias[e] : -test::infinity;
        for (const expert_id e : oracle::top_k(choice.data(), experts, 4)) {
          ids.push_back(e);
          weights.push_back(e == no_expert ? 0.0f : score[static_cast<std::size_t>(e)]);
        }
      }
      INFO(test::name(s) << " E=" << experts);
      CHECK(test::bit_difference(got.ids, ids) == "");
      CHECK(test::bit_difference(got.weights, weights) == "");
    }
}

TEST_CASE("a router needs no type but its score's") {
  const router r{softmax{}, top_k{.k = 3}, sum_normalized};
  CHECK(r.k() == 3);
  const router by_rank{softmax_selected{}, top_k{.k = 4}};
  CHECK(by_rank.k() == 4);
}

TEST_CASE("the softmax over the selected experts weighs them, whatever moves the choice") {
  const std::vector<float> z{1.0f, 2.0f, 3.0f, 4.0f}, zero(4, 0.0f), first{9.0f, 0.0f, 0.0f, 0.0f};
  const auto expect = [](const auto& router, const std::vector<float>& logits,
                         std::vector<expert_id> ids, std::vector<double> weights) {
    const assignment a = test::routed(router, logits, 4);
    CHECK(test::listed(a.ids(0)) == ids);
    CHECK(test::difference(a.weights(0), weights, 2e-7) == "");
  };
  const double high = 1.0 / (1.0 + std::exp(-1.0)), low = 1.0 - high;
  const top_k two{.k = 2}, grouped{.k = 2, .groups = 2, .topk_group = 1};
  expect(router{softmax_selected{}, two}, z, {3, 2}, {high, low});
  expect(router{softmax_selected{}, grouped}, z, {3, 2}, {high, low});
  expect(router{softmax_selected{}, two, raw_weights, selection_bias(zero)}, z, {3, 2},
         {high, low});
  expect(router{softmax_selected{}, two, sum_normalized, selection_bias(zero)}, z, {3, 2},
         {high, low});
  expect(router{softmax_selected{}, two, sum_normalized, selection_bias(zero)},
         {-1.0f, -2.0f, -3.0f, -4.0f}, {0, 1}, {high, low});
  // The bias moves the choice; the weights are those of the logits.
  const double third = 1.0 / (1.0 + std::exp(3.0));
  expect(router{softmax_selected{}, two, raw_weights, selection_bias(first)}, z, {0, 3},
         {third, 1.0 - third});
  expect(router{softmax_selected{}, grouped, raw_weights, selection_bias(first)}, z, {0, 1},
         {low, high});
}

TEST_CASE("a chosen expert of a lost group weighs what its published class gives it") {
  // The group that stays has one probability above 0; expert 0 fills the place.
  const std::vector<float> z{0.0f, 0.0f, 0.1f, -200.0f};
  const double sum = 2.0 + std::exp(0.1), p = std::exp(0.1) / sum, own = 1.0 / sum;
  const auto weights = [&](group_score by, lost_weight lost) {
    const router r{softmax{}, top_k{.k = 2,
                                    .groups = 2,
                                    .topk_group = 1,
                                    .group_score = by,
                                    .group_fill = 0.0f,
                                    .lost_weight = lost}};
    const assignment a = test::routed(r, z, 4);
    CHECK(a.ids(0)[0] == (by == group_score::max ? 2 : 0));
    return test::listed(a.weights(0));
  };
  const auto is = [](const std::vector<float>& w, std::vector<double> expected) {
    return test::difference(w, expected, 2e-7) == "";
  };
  CHECK(is(weights(group_score::max, lost_weight::as_published), {p, 0.0}));
  CHECK(is(weights(group_score::max, lost_weight::zero), {p, 0.0}));
  CHECK(is(weights(group_score::max, lost_weight::own), {p, own}));
  // A score of 0 in a group that stays is no lost one, and a biased choice may be 0 by chance.
  const std::vector<float> bias{-0.5f, 0.0f, -1.0f, -1.0f};
  const router biased{sigmoid{},
                      top_k{.k = 2,
                            .groups = 2,
                            .topk_group = 1,
                            .group_score = group_score::max,
                            .group_fill = 0.0f},
                      raw_weights, selection_bias(bias)};
  const assignment a = test::routed(biased, {0.0f, 0.0f, 0.0f, 0.0f}, 4);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{1, 0});
  CHECK(test::listed(a.weights(0)) == std::vector<float>{0.5f, 0.5f});
}

TEST_CASE(
    "of equal groups the lowest stay, and weights know which, under each group score and fill") {
  // Every group has experts of 0.5 and -0.5: those of lost groups, at 0, come between.
  const std::vector<float> z(8 * 17, 0.0f), bias{0, -1, 0, -1, 0, -1, 0, -1};
  for (const group_score by :
       {group_score::max, group_score::top2_sum, group_score::top_sum, group_score::sum})
    for (const float fill : {simd::minus_infinity, 0.0f})
      for (const lost_weight lost :
           {lost_weight::as_published, lost_weight::zero, lost_weight::own})
        for (const index_t stay : {1, 2, 3}) {
          const index_t k = stay + 1;
          const router r{sigmoid{},
                         top_k{.k = k,
                               .groups = 4,
                               .topk_group = stay,
                               .group_score = by,
                               .group_fill = fill,
                               .lost_weight = lost},
                         raw_weights, selection_bias(bias)};
          std::vector<expert_id> ids;
          for (index_t g = 0; g < stay; ++g) ids.push_back(static_cast<expert_id>(2 * g));
          ids.push_back(static_cast<expert_id>(fill == 0.0f ? 2 * stay : 1));
          std::vector<float> weights(static_cast<std::size_t>(k), 0.5f);
          if (fill == 0.0f && (lost == lost_weight::zero ||
                               (lost == lost_weight::as_published && by == group_score::max)))
            weights.back() = 0.0f;
          INFO("group score " << static_cast<int>(by) << ", fill " << fill << ", lost weight "
                              << static_cast<int>(lost) << ", " << stay << " groups");
          for (const index_t tokens : {1, 17}) {
            const assignment a =
                test::routed(r, std::vector<float>(z.begin(), z.begin() + 8 * tokens), 8);
            for (index_t t = 0; t < tokens; ++t) {
              CHECK(test::listed(a.ids(t)) == ids);
              CHECK(test::listed(a.weights(t)) == weights);
            }
          }
        }
}
