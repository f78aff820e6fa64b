#include <moeroute/policy/make_batch_router.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace make_batch_router_tests {

namespace {

constexpr index_t tokens = 48, experts = 8;

std::string refused(const std::string& text) {
  return test::refusal([&] { make_batch_router(parse_spec(text)); });
}

// The batch rule of a line of text decides what the one from templates decides, to the bit, and the
// line that is printed is parsed back.
template <class Router>
void same(const std::string& text, const Router& router, const router_tensors& tensors = {}) {
  const router_spec spec = parse_spec(text);
  INFO(text);
  CHECK(to_string(parse_spec(to_string(spec))) == to_string(spec));
  CHECK(parse_spec(to_string(spec)) == spec);
  const any_batch_router made = make_batch_router(spec, tensors);
  for (const test::shape shape : {test::shape::quantised, test::shape::masked, test::shape::zipf}) {
    const std::vector<float> z = test::make_logits(shape, 5, tokens, experts);
    std::vector<std::uint8_t> mask(tokens, 1);
    mask[3] = mask[17] = 0;
    const side_inputs side{.mask = mask, .seed = 3, .step = 9};
    const assignment a = routed(made, z, experts, side);
    const assignment b = routed(router, z, experts, side);
    CHECK(test::bit_difference(a.ids(), b.ids()) == "");
    CHECK(test::bit_difference(a.weights(), b.weights()) == "");
    REQUIRE(a.ragged() == b.ragged());
    for (index_t t = 0; t < tokens; ++t) CHECK(a.count(t) == b.count(t));
  }
}

}  // namespace

TEST_CASE("a batch rule from a line of text decides what the same rule from templates decides") {
  same("E=8 selection=expert_choice take_factor=2", expert_choice<>{});
  same(
      "E=8 score=sigmoid selection=expert_choice take_factor=1.5 take_rounding=down normalize=sum "
      "eps=1e-9 scale=2.5 max_k=3 sequence=24",
      expert_choice<sigmoid>{.capacity = {.factor = 1.5, .rounding = capacity_rounding::down},
                             .normalize = token_renormalization::sum,
                             .eps = 1e-9f,
                             .scale = 2.5f,
                             .sequence_length = 24,
                             .most_experts = 3});
  same("E=8 selection=expert_choice take=5", expert_choice<>{.capacity = {.fixed = 5}});
  same("E=8 k=2 selection=sinkhorn", sinkhorn{.k = 2});
  same("E=8 k=2 selection=sinkhorn phase=evaluation plan_weights=sigmoid",
       sinkhorn{.k = 2, .phase = routing_phase::evaluation, .weights = plan_weights::sigmoid});
  same(
      "E=8 k=2 selection=sinkhorn plan_weights=plan plan_mass=tokens "
      "plan_order=columns_then_rows plan_domain=logarithm plan_stop=column_error "
      "plan_similarity=softmax plan_temperature=0.5 plan_eps=0 plan_tolerance=0.01 "
      "plan_iterations=30",
      sinkhorn{.k = 2,
               .weights = plan_weights::plan,
               .scaling = {.mass = plan_mass::tokens,
                           .order = scaling_order::columns_then_rows,
                           .domain = sinkhorn_domain::logarithm,
                           .stop = sinkhorn_stop::column_error,
                           .similarity = plan_similarity::softmax,
                           .temperature = 0.5f,
                           .eps = 0.0f,
                           .tolerance = 0.01f,
                           .most_iterations = 30}});
  same("E=8 k=2 selection=selective_sinkhorn probability=1",
       selective_sinkhorn{.k = 2, .probability = 1.0f});
  same("E=8 k=2 selection=selective_sinkhorn probability=0 noise=gumbel noise_sigma=0.5",
       selective_sinkhorn{
           .k = 2, .probability = 0.0f, .noise = {.kind = noise_kind::gumbel, .sigma = 0.5f}});
  const std::vector<float> share{1.0f, 1.0f, 2.0f, 1.0f, 1.0f, 4.0f, 1.0f, 1.0f};
  same("E=8 k=2 selection=sinkhorn shares", sinkhorn{.k = 2, .share = share}, {.share = share});
  same("E=8 k=2 selection=selective_sinkhorn probability=1 shares",
       selective_sinkhorn{.k = 2, .probability = 1.0f, .share = share}, {.share = share});
  CHECK(refused("E=8 k=2 selection=sinkhorn shares") ==
        "moeroute::make_router: share.size() is 0, expected 8");
  same("E=8 selection=sinkhorn_expert_choice plan_weights=plan",
       sinkhorn_expert_choice{.weights = plan_weights::plan});
  same("E=8 selection=base", base_assignment{});
  same("E=8 selection=base solver=optimal", base_assignment{.solver = assignment_solver::optimal});
  same("E=8 selection=base phase=evaluation rounds=10",
       base_assignment{.phase = routing_phase::evaluation, .most_rounds = 10});
  same("E=8 selection=sparse_transport support=4 plan_gamma=0.5 plan_rate=0.1 plan_iterations=5",
       sparse_transport{.support = 4, .gamma = 0.5f, .learning_rate = 0.1f, .steps = 5});
  same("E=8 k=2 selection=sparse_transport_tokens plan_weights=plan",
       sparse_transport_token_choice{.k = 2, .transport = {.weights = transport_weights::plan}});
  same(
      "E=8 k=1 selection=counted count=percentile count_scope=batch quantile=0.75 min_k=1 max_k=4 "
      "normalize=sum",
      batch_percentile<>{.quantile = 0.75f, .max_k = 4, .weight = sum_normalized});
}

TEST_CASE("every maker names the one that makes what it does not") {
  CHECK(refused("E=8 k=2") ==
        "moeroute::make_batch_router: selection is top_k, which has common words only: "
        "make_router");
  CHECK(test::refusal([] { make_router(parse_spec("E=8 selection=base")); }) ==
        "moeroute::make_router: selection is base, which sees the whole batch: make_batch_router");
  CHECK(test::refusal([] { make_router(parse_spec("E=8 selection=soft")); }) ==
        "moeroute::make_router: selection is soft, which chooses nothing: layer/soft_moe.hpp");
  CHECK(test::refusal([] { make_router(parse_spec("E=8 k=2 ties=higher_id")); }) ==
        "moeroute::make_router: selection is top_k, which has rare words: make_rare_router");
  CHECK(test::refusal([] { make_rare_router(parse_spec("E=8 k=2")); }) ==
        "moeroute::make_rare_router: selection is top_k, which has common words only: "
        "make_router");
  const std::vector<float> z(experts * tokens, 0.0f);
  index_t made = 0;
  for (const char* text : {"E=8 k=2", "E=8 selection=base", "E=8 k=2 ties=higher_id"})
    with_router(parse_spec(text), {},
                [&](const auto& router) { made += routed(router, z, experts).tokens(); });
  CHECK(made == 3 * tokens);
  CHECK(test::refusal([&] { routed(make_batch_router(parse_spec("E=4 selection=base")), z, 8); }) ==
        "moeroute::route: logits.cols is 8, expected 4");
}

TEST_CASE("a batch rule's words outside their domain, or that clash, are refused by name") {
  CHECK(refused("E=8 selection=expert_choice take_factor=0") ==
        "moeroute::expert_choice: capacity.factor is 0.000000, expected > 0");
  CHECK(refused("E=8 selection=expert_choice score=uniform") ==
        "moeroute::router_spec: score=uniform clashes with selection=expert_choice: equal scores "
        "choose nothing");
  CHECK(refused("E=8 k=2 selection=sinkhorn plan_temperature=0") ==
        "moeroute::router_spec: temperature is 0.000000, expected > 0");
  CHECK(refused("E=8 k=2 selection=sinkhorn phase=evaluation plan_weights=plan") ==
        "moeroute::router_spec: plan_weights=plan clashes with phase=evaluation: evaluation has no "
        "plan");
  CHECK(refused("E=8 k=2 selection=selective_sinkhorn probability=1.5") ==
        "moeroute::router_spec: probability is 1.5, expected 0 to 1");
  CHECK(refused("E=8 selection=sparse_transport plan_weights=sigmoid") ==
        "moeroute::router_spec: plan_weights=sigmoid clashes with selection=sparse_transport: it "
        "weighs by softmax or plan");
  CHECK(refused("E=8 selection=sparse_transport plan_gamma=0") ==
        "moeroute::router_spec: plan_gamma is 0, expected > 0");
  CHECK(refused("E=8 selection=base score=sigmoid") ==
        "moeroute::router_spec: score=sigmoid clashes with selection=base: its scores are its own");
  CHECK(refused("E=8 selection=base rounds=0") ==
        "moeroute::router_spec: rounds is 0, expected 1 to 1073741824");
  CHECK(refused("E=8 k=2 selection=sinkhorn groups=4") ==
        "moeroute::router_spec: groups=4 clashes with selection=sinkhorn: only top_k and "
        "each_group know groups");
  CHECK(refused("E=8 k=2 selection=counted count=ratio count_scope=batch") ==
        "moeroute::router_spec: count_scope=batch clashes with count=ratio: only a percentile is "
        "taken among all tokens");
}

TEST_CASE("k is not asked of rules that have none, and what means nothing is not printed") {
  CHECK(to_string(parse_spec("E=8 selection=base take_factor=3 plan_eps=7 eps=1 eps_mode=add")) ==
        "E=8 score=softmax selection=base");
  CHECK(to_string(parse_spec("E=8 k=2 eps=1e-20 eps_mode=add quantile=0.25 rounds=3")) ==
        "E=8 k=2 score=softmax");
  CHECK(test::refusal([] { (void)parse_spec("E=8 selection=sinkhorn"); }) ==
        "moeroute::parse_spec: 'k' is missing");
}

}  // namespace make_batch_router_tests
