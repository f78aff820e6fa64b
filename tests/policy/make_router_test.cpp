#include <moeroute/policy/make_router.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace {

std::string not_made(const router_spec& spec, const router_tensors& tensors = {}) {
  return test::refusal([&] { make_router(spec, tensors); });
}

}  // namespace

TEST_CASE("a router from a spec decides what the same router from templates decides, to the bit") {
  const std::vector<float> logits = test::make_logits(test::shape::quantised, 3, 50, 16);
  const std::vector<float> bias = test::make_logits(test::shape::normal, 4, 1, 16);
  const auto same = [&](const router_spec& spec, const auto& router, router_tensors tensors = {}) {
    const assignment a = routed(make_router(spec, tensors), logits, 16);
    const assignment b = routed(router, logits, 16);
    REQUIRE(a.choices() == b.choices());
    CHECK(test::bit_difference(a.ids(), b.ids()) == "");
    CHECK(test::bit_difference(a.weights(), b.weights()) == "");
  };
  same({.experts = 16, .normalize = normalization::sum}, router<softmax>{.weight = sum_normalized});
  same({.experts = 16, .domain = score_domain::selected, .softcap = 3.0f},
       router<softmax_selected>{.transform = {.softcap = 3.0f}});
  same({.experts = 16,
        .score = score_kind::sigmoid,
        .selection_bias = true,
        .groups = 4,
        .topk_group = 2,
        .scale = 2.5f},
       router<sigmoid>{.selection = {.groups = 4, .topk_group = 2},
                       .weight = {.scale = 2.5f},
                       .bias = selection_bias(bias)},
       {.bias = bias});
  same({.experts = 16, .selection = selection_kind::top_p, .top_p = 0.5f, .max_k = 3},
       top_p{.p = 0.5f, .max_k = 3});
  same({.experts = 16,
        .score = score_kind::relu,
        .selection = selection_kind::threshold,
        .eps = 1e-5f,
        .row_norm = threshold_norm::rms},
       threshold_router<relu>{.norm = threshold_norm::rms});
  same({.experts = 16,
        .score = score_kind::relu,
        .selection = selection_kind::threshold,
        .row_norm = threshold_norm::sum},
       threshold_router<relu>{.norm = threshold_norm::sum, .eps = 0.0f});
  same({.experts = 16,
        .domain = score_domain::selected,
        .selection_bias = true,
        .groups = 4,
        .topk_group = 2,
        .normalize = normalization::sum},
       router<softmax_selected>{.selection = {.groups = 4, .topk_group = 2},
                                .weight = sum_normalized,
                                .bias = selection_bias(bias)},
       {.bias = bias});
  same({.experts = 16,
        .groups = 4,
        .topk_group = 1,
        .group_score = group_score::max,
        .group_fill = 0.0f,
        .lost_weight = lost_weight::own},
       router<softmax>{.selection = {.groups = 4,
                                     .topk_group = 1,
                                     .group_score = group_score::max,
                                     .group_fill = 0.0f,
                                     .lost_weight = lost_weight::own}});
  same({.experts = 16, .selection = selection_kind::sparsemixer}, sparsemixer{});
  same({.experts = 16, .selection = selection_kind::random}, random_choice{2});
}

TEST_CASE("a token that comes alone has the ids and weights of one among many, to the bit") {
  // What a single row may be sooner for, and beside each of these what is not.
  const std::vector<float> scale(200, 0.5f);
  const std::vector<router_spec> rules = {
      {},
      {.normalize = normalization::sum},
      {.domain = score_domain::selected},
      {.domain = score_domain::selected, .normalize = normalization::sum},
      {.score = score_kind::sigmoid},
      {.score = score_kind::sigmoid, .normalize = normalization::sum},
      {.score = score_kind::softplus},
      {.normalize = normalization::sum, .eps_where = eps_mode::add, .eps = 0.5f},
      {.normalize = normalization::sum, .scale = 2.5f},
      {.score = score_kind::sigmoid, .per_expert_scale = true},
      {.normalize = normalization::sum, .divide_by_k = true},
      {.score = score_kind::relu, .normalize = normalization::lp, .lp_p = 2.0f},
      {.score = score_kind::sigmoid, .selection_bias = true},
      {.selection_bias = true},
      {.selection_bias = true, .normalize = normalization::sum},
  };
  for (const index_t experts : {1, 2, 8, 15, 16, 17, 64, 128, 200})
    for (const index_t k : {1, 2, 3, 8, 10, 16, 17}) {
      if (k > experts) continue;
      std::vector<float> z = test::make_logits(test::shape::quantised, 5, 9, experts);
      const std::vector<float> smooth = test::make_logits(test::shape::normal, 6, 9, experts);
      z.insert(z.end(), smooth.begin(), smooth.end());
      const auto row = [&](index_t t) { return z.data() + t * experts; };
      std::fill_n(row(0), experts, simd::minus_infinity);
      std::fill_n(row(1), experts, std::numeric_limits<float>::quiet_NaN());
      std::fill_n(row(2), experts, -0.0f);
      row(2)[experts / 2] = 0.0f;
      std::fill_n(row(3), experts - 1, simd::minus_infinity);
      row(4)[experts - 1] = row(4)[0] = simd::plus_infinity;
      for (index_t e = 0; e < experts; ++e) row(5)[e] *= 60.0f;
      for (router_spec spec : rules) {
        spec.experts = experts;
        spec.k = k;
        const any_router r = make_router(
            spec,
            {.bias = spec.selection_bias ? std::span<const float>(smooth.data(), smooth.size() / 9)
                                         : std::span<const float>(),
             .per_expert_scale = {scale.data(),
                                  spec.per_expert_scale ? static_cast<std::size_t>(experts) : 0}});
        workspace ws;
        assignment all, one;
        route(r, matrix_view<const float>(z.data(), 18, experts), ws, all);
        INFO(to_string(spec));
        for (index_t t = 0; t < 18; ++t) {
          route(r, matrix_view<const float>(row(t), 1, experts), ws, one);
          INFO("token " << t);
          CHECK(test::bit_difference(all.ids(t), one.ids()) == "");
          CHECK(test::bit_difference(all.weights(t), one.weights()) == "");
        }
      }
    }
}

TEST_CASE("a router goes its own way, whatever the description beside it says") {
  const std::vector<float> z = test::make_logits(test::shape::normal, 7, 1, 16);
  const any_router r({.experts = 16, .score = score_kind::sigmoid}, router<softmax>{});
  const assignment a = routed(r, z, 16), b = routed(router<softmax>{}, z, 16);
  CHECK(test::bit_difference(a.weights(), b.weights()) == "");
}

TEST_CASE("a tensor that is missing, too many, or of another length is refused by name") {
  const std::vector<float> eight(8, 1.0f), seven(7, 1.0f);
  CHECK(not_made({.selection_bias = true}) ==
        "moeroute::make_router: bias.size() is 0, expected 8");
  CHECK(not_made({.selection_bias = true}, {.bias = seven}) ==
        "moeroute::make_router: bias.size() is 7, expected 8");
  CHECK(not_made({}, {.bias = eight}) == "moeroute::make_router: bias.size() is 8, expected 0");
  CHECK(not_made({.per_expert_scale = true}, {.per_expert_scale = seven}) ==
        "moeroute::make_router: per_expert_scale.size() is 7, expected 8");
  CHECK(not_made({.score = score_kind::relu, .selection = selection_kind::threshold},
                 {.gamma = seven}) == "moeroute::make_router: gamma.size() is 7, expected 8");
  const std::vector<expert_id> third{2};
  CHECK(not_made({}, {.steer = {.promote = third}}) ==
        "moeroute::make_router: steer has experts, which the spec does not say: steering");
}

TEST_CASE("a bias with NaN is refused with its place, whichever that is") {
  for (std::size_t i = 0; i < 8; ++i) {
    std::vector<float> bias(8, 0.0f);
    bias[i] = test::not_a_number;
    const std::string said = "bias: value " + std::to_string(i) + " is NaN, expected a number";
    CHECK(not_made({.selection_bias = true}, {.bias = bias}) == "moeroute::make_router: " + said);
    CHECK(test::refusal([&] { selection_bias refused(bias); }) ==
          "moeroute::selection_bias: " + said);
  }
}

TEST_CASE("a table that is missing or made for another router is refused") {
  const expert_table table({0, 1, 2, 3}, 2, 8);
  router_spec spec{.score = score_kind::sigmoid, .selection = selection_kind::expert_table};
  CHECK(not_made(spec) ==
        "moeroute::make_router: table is missing, expected one of k ids per token");
  CHECK(not_made(spec, {.table = &table}) == "accepted");
  spec.k = 1;
  CHECK(not_made(spec, {.table = &table}) == "moeroute::make_router: table k is 2, expected 1");
  spec.k = 2;
  spec.experts = 9;
  CHECK(not_made(spec, {.table = &table}) ==
        "moeroute::make_router: table experts is 8, expected 9");
  spec.experts = 8;
  for (const score_kind score : {score_kind::relu, score_kind::identity}) {
    spec.score = score;
    CHECK(not_made(spec, {.table = &table}) ==
          "moeroute::router_spec: selection=hash_table clashes with score=" +
              std::string(to_string(score)) +
              ": tables are weighted by softmax, sigmoid, sqrtsoftplus or uniform");
  }
}

TEST_CASE("logits of another number of columns than the spec's E are refused") {
  const any_router router = make_router({.experts = 16, .k = 2});
  CHECK(test::refusal([&] { routed(router, std::vector<float>(24, 0.0f), 8); }) ==
        "moeroute::route: logits.cols is 8, expected 16");
}

TEST_CASE("a spec that clashes makes no router") {
  CHECK(not_made({.normalize = normalization::sum, .lp_p = 2.0f}).find("clashes") !=
        std::string::npos);
}

TEST_CASE("a described router takes plain memory, where its k does not vary") {
  workspace memory;
  const index_t tokens = 33;
  const std::vector<float> z = test::make_logits(test::shape::normal, 8, tokens, 16);
  const any_router router = make_router({.experts = 16, .k = 4});
  CHECK((router.k() == 4 && !router.ragged()));
  assignment expected;
  route(router, matrix_view<const float>(z.data(), tokens, 16), memory, expected);
  std::vector<expert_id> ids(132);
  std::vector<float> weights(132);
  route(router, z.data(), tokens, 16, memory, ids.data(), weights.data());
  CHECK(std::equal(ids.begin(), ids.end(), expected.ids().begin()));
  CHECK(std::equal(weights.begin(), weights.end(), expected.weights().begin()));
  const any_router varying =
      make_router({.experts = 16, .k = 4, .selection = selection_kind::top_p, .top_p = 0.5f});
  CHECK(test::refusal([&] {
          route(varying, z.data(), tokens, 16, memory, ids.data(), weights.data());
        }) == "moeroute::route: the router's k varies, expected a fixed k: give an assignment");
  CHECK(test::refusal([&] {
          route(router, matrix_view<const float>(z.data(), 2, 15), memory, expected);
        }) == "moeroute::route: logits.cols is 15, expected 16");
}

TEST_CASE("a row alone goes the plain way where its rule is one of these and asks for no more") {
  using detail::plain_row;
  using enum score_kind;
  const auto way = [](const any_score& score, const weight_rule& weight = {}, const top_k& of = {},
                      selection_bias bias = {}) {
    return static_cast<int>(
        detail::plain_row_of({.score = score, .selection = of, .weight = weight, .bias = bias}));
  };
  const auto is = [](plain_row how) { return static_cast<int>(how); };
  const any_score all(softmax), winners(softmax, score_domain::selected);
  CHECK(way(all) == is(plain_row::softmax));
  CHECK(way(all, sum_normalized) == is(plain_row::among));
  CHECK(way(winners) == is(plain_row::among));
  CHECK(way(winners, sum_normalized) == is(plain_row::none));
  CHECK(way(sigmoid) == is(plain_row::sigmoid));
  CHECK(way(sigmoid, sum_normalized) == is(plain_row::none));
  for (const score_kind other : {sqrt_softplus, softplus, relu, identity, uniform})
    CHECK(way(any_score(other)) == is(plain_row::none));
  const std::vector<float> eight(8, 2.0f);
  for (const any_score& score : {all, winners, any_score(sigmoid)}) {
    CHECK(way(score, {}, {.k = block_rows}) != is(plain_row::none));
    CHECK(way(score, {}, {.k = block_rows + 1}) == is(plain_row::none));
    CHECK(way(score, {}, {.groups = 2, .topk_group = 1}) == is(plain_row::none));
    CHECK(way(score, {}, {}, selection_bias(eight)) == is(plain_row::none));
    for (const weight_rule& more :
         {weight_rule{.normalize = normalization::lp}, weight_rule{.eps_where = eps_mode::add},
          weight_rule{.eps_where = eps_mode::clamp}, weight_rule{.divide = 2.0f},
          weight_rule{.scale = 2.0f}, weight_rule{.expert_scale = eight}})
      CHECK(way(score, more) == is(plain_row::none));
  }
}

TEST_CASE("a few tokens of a router picked at run time are routed each, but for those masked") {
  const std::vector<float> z = test::make_logits(test::shape::normal, 5, 3, 8);
  const any_router any = make_router({.experts = 8});
  const router<softmax> same;
  const std::vector<std::uint8_t> mask{0, 2, 0};
  workspace ws;
  assignment made, expected;
  for (const index_t tokens : {1, 2, 3})
    for (const bool masked : {false, true}) {
      const matrix_view<const float> rows(z.data(), tokens, 8);
      side_inputs side;
      if (masked) side.mask = std::span(mask).first(static_cast<std::size_t>(tokens));
      route(any, rows, side, ws, made);
      route(same, rows, side, ws, expected);
      CHECK(test::bit_difference(made.ids(), expected.ids()) == "");
      CHECK(test::bit_difference(made.weights(), expected.weights()) == "");
      CHECK((made.ids()[0] == no_expert) == masked);
    }
}
