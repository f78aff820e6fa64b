#include <moeroute/policy/make_batch_router.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <string>
#include <type_traits>
#include <utility>
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
  const std::vector<float> nine(9 * 8, 0.0f);
  CHECK(test::refusal([&] {
          routed(make_batch_router(parse_spec("E=8 selection=base")), nine, 8);
        }) == "moeroute::base_assignment: tokens is 9, expected a multiple of experts = 8");
  // A rare word does not make a rule of the batch one of rows.
  const router_spec rare_of_batch =
      parse_spec("E=8 k=1 selection=counted count=percentile count_scope=batch weight_score=relu");
  REQUIRE(rare_of_batch.has_rare_words());
  CHECK(test::refusal([&] { make_rare_router(rare_of_batch); }) ==
        "moeroute::make_rare_router: selection is counted, which sees the whole batch: "
        "make_batch_router");
  // Who makes a router of what nobody checked checks it.
  CHECK(test::refusal([] { make_batch_router({.k = 0, .selection = selection_kind::sinkhorn}); }) ==
        "moeroute::router_spec: k is 0, expected 1 to 8");
  CHECK(test::refusal([] { make_rare_router({.k = 0, .ties = tie_order::higher_id}); }) ==
        "moeroute::router_spec: k is 0, expected 1 to 8");
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

namespace {

// Whether the made router is of a kind that has its fields right.
template <class Kind, class Any, class F>
bool is(const Any& made, F&& right) {
  bool found = false;
  made.visit([&]<class R>(const R& r) {
    if constexpr (std::is_same_v<R, Kind>) found = right(r);
  });
  return found;
}

bool same_weight(const weight_rule& a, const weight_rule& b) {
  return a.normalize == b.normalize && a.p == b.p && a.eps_where == b.eps_where && a.eps == b.eps &&
         a.divide == b.divide && a.scale == b.scale &&
         a.expert_scale.data() == b.expert_scale.data();
}

bool same_transform(const logit_transform& a, const logit_transform& b) {
  return a.temperature == b.temperature && a.softcap == b.softcap && a.noise.kind == b.noise.kind &&
         a.noise.sigma == b.noise.sigma && a.noise.floor == b.noise.floor;
}

bool same_top_k(const top_k& a, const top_k& b) {
  return a.k == b.k && a.groups == b.groups && a.topk_group == b.topk_group &&
         a.group_score == b.group_score && a.group_fill == b.group_fill &&
         a.lost_weight == b.lost_weight;
}

bool same_top_p(const top_p& a, const top_p& b) {
  return a.p == b.p && a.crossing == b.crossing && a.min_k == b.min_k && a.max_k == b.max_k &&
         same_weight(a.weight, b.weight) && same_transform(a.transform, b.transform);
}

}  // namespace

TEST_CASE("each field of a description is found in its place of the router that is made") {
  const std::vector<float> bias(12, 0.5f), second(12, 0.25f), factor(12, 2.0f), gamma(12, 3.0f),
      share{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  const std::vector<expert_id> up{3};
  const expert_table table({0, 1, 2, 3, 4, 5}, 3, 12);
  const steering steer{.promote = up};
  // What no two fields have the same number of; each rule takes what it knows.
  const logit_transform moved{
      .temperature = 0.5f, .softcap = 30.0f, .noise = {noise_kind::gumbel, 0.75f, 0.125f}};
  router_spec basic{.experts = 12,
                    .k = 3,
                    .softcap = 30.0f,
                    .temperature = 0.5f,
                    .noise = noise_kind::gumbel,
                    .noise_sigma = 0.75f,
                    .noise_floor = 0.125f};
  router_spec all = basic;
  all.score = score_kind::sigmoid;
  all.selection_bias = all.divide_by_k = all.per_expert_scale = true;
  all.groups = 4, all.topk_group = 2, all.group_fill = 0.0f;
  all.group_score = group_score::max;
  all.lost_weight = lost_weight::own;
  all.normalize = normalization::sum;
  all.eps_where = eps_mode::add, all.eps = 0.25f, all.scale = 2.5f;
  const weight_rule whole{.normalize = normalization::sum,
                          .eps_where = eps_mode::add,
                          .eps = 0.25f,
                          .divide = 3.0f,
                          .scale = 2.5f,
                          .expert_scale = factor};
  const top_k of_groups{3, 4, 2, group_score::max, 0.0f, lost_weight::own};
  const router_tensors of_all{.bias = bias, .per_expert_scale = factor};
  const auto chosen = [&](const router<any_score>& r) {
    return r.score.kind() == score_kind::sigmoid && same_top_k(r.selection, of_groups) &&
           same_weight(r.weight, whole) && r.bias.values().data() == bias.data() &&
           same_transform(r.transform, moved);
  };
  CHECK(is<router<any_score>>(make_router(all, of_all), chosen));
  router_spec exploring = all;
  exploring.explore = 0.375f;
  for (const auto& [scope, own] : {std::pair{row_scope::token, exploration_scope::token},
                                   {row_scope::batch, exploration_scope::batch}}) {
    exploring.explore_scope = scope;
    CHECK(is<explore<router<any_score>>>(
        make_rare_router(exploring, of_all), [&](const explore<router<any_score>>& r) {
          return r.epsilon == 0.375f && r.scope == own && chosen(r.router);
        }));
  }
  // A factor of the output is none of the weights; an Lp norm; a sum over what is kept is another
  // stage's.
  const auto weighs = [](router_spec spec, const weight_rule& rule) {
    return is<router<any_score>>(make_router(spec), [&](const router<any_score>& r) {
      return same_weight(r.weight, rule) && r.score.domain() == score_domain::selected;
    });
  };
  router_spec few{.experts = 12, .domain = score_domain::selected, .scale = 2.5f};
  few.scale_where = scale_place::output, few.normalize = normalization::lp, few.lp_p = 3.0f;
  CHECK(weighs(few, {.normalize = normalization::lp, .p = 3.0f}));
  few.normalize = normalization::sum, few.lp_p = 1.0f, few.scale = 1.0f;
  few.normalize_before_drop = false;
  CHECK(weighs(few, sum_normalized));
  few.capacity = 5;
  CHECK(weighs(few, raw_weights));
  few.normalize_before_drop = true;
  CHECK(weighs(few, sum_normalized));
  router_spec own = basic;
  own.normalize = normalization::sum, own.scale = 2.5f;
  const weight_rule scaled{.normalize = normalization::sum, .scale = 2.5f};
  own.selection = selection_kind::expert_table, own.table_key = table_key::bigram;
  CHECK(is<table_router<any_score>>(
      make_router(own, {.table = &table}), [&](const table_router<any_score>& r) {
        return r.table == &table && r.score.kind() == score_kind::softmax &&
               same_weight(r.weight, scaled) && same_transform(r.transform, moved) &&
               r.key == table_key::bigram;
      }));
  own.selection = selection_kind::top_p;
  own.top_p = 0.625f, own.crossing = crossing::exclude, own.min_k = 2, own.max_k = 5;
  const top_p mass{0.625f, crossing::exclude, 2, 5, scaled, moved};
  const any_router ragged = make_router(own);
  CHECK(is<top_p>(ragged, [&](const top_p& r) { return same_top_p(r, mass); }));
  CHECK((ragged.ragged() && ragged.k() == 5 && ragged.columns() == 12));
  CHECK(test::refusal([&] { ragged.as_token_router().check(12); }) ==
        "moeroute::route: the router's k varies: route() takes it as it is");
  CHECK(test::refusal([&] { ragged.as_ragged_router().check(13); }) ==
        "moeroute::route: logits.cols is 13, expected 12");
  own.selection = selection_kind::counted, own.count = count_rule::tsallis;
  own.tsallis_q = 1.5f, own.dense_above = 0.875f;
  CHECK(is<dense_if>(make_rare_router(own), [&](const dense_if& r) {
    return same_top_p(r.rule, mass) && r.q == 1.5f && r.threshold == 0.875f;
  }));
  own.top_p = 0.0f, own.count = count_rule::entropy;
  own.quantile = 0.375f, own.ratio = 0.125f, own.entropy_low = 0.25f, own.entropy_high = 2.0f;
  own.mid_k = 3;
  own.weight_apart = true, own.weight_score = score_kind::sigmoid;
  CHECK(is<detail::rare_counted>(make_rare_router(own), [&](const detail::rare_counted& r) {
    const row_count& n = r.router.count;
    return n.rule == count_rule::entropy && n.quantile == 0.375f && n.ratio == 0.125f &&
           n.low == 0.25f && n.high == 2.0f && n.mid_k == 3 && n.min_k == 2 && n.max_k == 5 &&
           r.router.score.choice.kind() == score_kind::softmax &&
           r.router.score.weight.kind() == score_kind::sigmoid && !r.router.score.on_logits &&
           same_weight(r.router.weight, scaled) && same_transform(r.router.transform, moved);
  }));
  router_spec above = basic;
  above.selection = selection_kind::threshold, above.threshold = 0.375f,
  above.row_norm = threshold_norm::rms;
  above.eps = 0.25f, above.scale = 2.5f;
  const auto reaches = [&]<class Score>(Score, score_kind kind) {
    above.score = kind;
    return is<threshold_router<Score>>(
        make_router(above, {.gamma = gamma}), [&](const threshold_router<Score>& r) {
          return r.threshold == 0.375f && r.norm == threshold_norm::rms && r.eps == 0.25f &&
                 r.norm_scale == 1.0f && r.scale == 2.5f && r.gamma.data() == gamma.data() &&
                 same_transform(r.transform, moved);
        });
  };
  CHECK(reaches(relu{}, score_kind::relu));
  CHECK(reaches(sigmoid{}, score_kind::sigmoid));
  CHECK(reaches(identity_score{}, score_kind::identity));
  const router_spec keys{.experts = 12,
                         .k = 4,
                         .domain = score_domain::selected,
                         .selection = selection_kind::product_keys,
                         .normalize = normalization::sum,
                         .scale = 2.5f,
                         .first_keys = 3};
  using common_keys = moeroute::product_keys<softmax_selected>;
  const any_router of_keys = make_router(keys);
  CHECK(is<common_keys>(of_keys, [&](const common_keys& r) {
    return r.choices == 4 && r.first_keys == 3 && same_weight(r.weight, scaled);
  }));
  CHECK((of_keys.k() == 4 && of_keys.columns() == 7 && of_keys.spec() == keys &&
         of_keys.as_token_router().experts(7) == 12 && of_keys.as_token_router().k() == 4));
  CHECK(is<moeroute::sparsemixer>(
      make_router({.selection = selection_kind::sparsemixer, .jitter = 0.125f}),
      [](const auto& r) { return r.jitter == 0.125f; }));
  for (const second_expert policy : {second_expert::sampling, second_expert::random})
    CHECK(is<gshard_top2>(
        make_router({.selection = selection_kind::top2,
                     .normalize = normalization::sum,
                     .scale = 2.5f,
                     .second = policy}),
        [&](const gshard_top2& r) { return r.policy == policy && same_weight(r.weight, scaled); }));
  const any_router drawn = make_router({.k = 5, .selection = selection_kind::random});
  CHECK(is<random_choice>(drawn, [](const random_choice& r) { return r.choices == 5; }));
  CHECK((!drawn.reads_logits() && ragged.reads_logits() && !drawn.ragged() && drawn.k() == 5));
  // Parts that are picked at run time.
  router_spec rare = all;
  rare.class_bias = rare.steering = true;
  rare.ties = tie_order::higher_id;
  rare.passes = 6, rare.pass_rule = pass_rule::ratio, rare.pass_lambda = 0.375f;
  rare.standardize = 1.5f, rare.candidates = 7, rare.candidate_scope = row_scope::batch;
  const router_tensors of_rare{
      .bias = bias, .per_expert_scale = factor, .second_bias = second, .steer = steer};
  CHECK(is<detail::rare_router>(make_rare_router(rare, of_rare), [&](const detail::rare_router& r) {
    const any_row_transform& steps = r.router.transform;
    const auto& best = r.router.router;
    return !r.active && !steps.sums_sigmoids && steps.passes.passes == 6 &&
           steps.passes.rule == pass_rule::ratio && steps.passes.lambda == 0.375f &&
           steps.standardize == 1.5f && steps.steer.promote.data() == up.data() &&
           steps.lot.active == 7 && steps.lot.scope == row_scope::batch && best.bias.empty() &&
           best.selection.of[0].values().data() == bias.data() &&
           best.selection.of[1].values().data() == second.data() &&
           best.selection.rule.order == tie_order::higher_id &&
           same_top_k(best.selection.rule.rule.best, of_groups) &&
           !best.selection.rule.rule.of_each_group && same_weight(best.weight, whole) &&
           same_transform(best.transform, moved);
  }));
  rare.class_bias = rare.steering = false;
  rare.ties = tie_order::lower_id;
  rare.passes = 1, rare.second_logits = logit_pairs::weigh;
  CHECK(is<detail::rare_router>(make_rare_router(rare, of_all), [&](const detail::rare_router& r) {
    const auto& best = r.router.router;
    return r.active && r.score.kind() == score_kind::sigmoid && same_weight(r.weight, whole) &&
           same_weight(best.weight, raw_weights) && best.bias.values().data() == bias.data() &&
           !best.selection.active();
  }));
  // Rules of the batch.
  const tokens_per_expert take{3.0, capacity_rounding::nearest, 2, 3, 0};
  const auto same_transport = [&](const sparse_transport& r) {
    return r.capacity == take && r.support == 7 && r.weights == transport_weights::softmax &&
           r.gamma == 0.375f && r.learning_rate == 0.625f && r.steps == 9;
  };
  router_spec batch{.experts = 12, .k = 3, .selection = selection_kind::sparse_transport};
  batch.take = take, batch.support = 7, batch.plan_gamma = 0.375f, batch.plan_rate = 0.625f;
  batch.plan.most_iterations = 9, batch.plan_weights = plan_weights::softmax;
  CHECK(is<sparse_transport>(make_batch_router(batch), same_transport));
  batch.selection = selection_kind::sparse_transport_tokens;
  CHECK(is<sparse_transport_token_choice>(make_batch_router(batch), [&](const auto& r) {
    return r.k == 3 && same_transport(r.transport);
  }));
  batch.plan.temperature = 0.375f;
  batch.selection = selection_kind::sinkhorn_expert_choice;
  CHECK(is<sinkhorn_expert_choice>(make_batch_router(batch), [&](const sinkhorn_expert_choice& r) {
    return r.capacity == take && r.weights == plan_weights::softmax && r.scaling == batch.plan;
  }));
  batch.selection = selection_kind::selective_sinkhorn, batch.shares = true;
  batch.probability = 0.25f, batch.phase = routing_phase::evaluation;
  batch.noise = noise_kind::gaussian, batch.noise_sigma = 0.75f, batch.noise_floor = 0.125f;
  CHECK(is<selective_sinkhorn>(
      make_batch_router(batch, {.share = share}), [&](const selective_sinkhorn& r) {
        return r.k == 3 && r.probability == 0.25f && r.phase == routing_phase::evaluation &&
               r.scaling == batch.plan && r.noise.kind == noise_kind::gaussian &&
               r.noise.sigma == 0.75f && r.noise.floor == 0.125f && r.share.data() == share.data();
      }));
  const any_batch_router wide = make_batch_router(batch, {.share = share});
  CHECK((wide.columns() == 12 && wide.spec() == batch));
  router_spec by_expert{.experts = 12,
                        .score = score_kind::sigmoid,
                        .selection = selection_kind::expert_choice,
                        .eps = 0.25f,
                        .scale = 2.5f,
                        .scale_where = scale_place::output,
                        .max_k = 5};
  by_expert.take = take, by_expert.sequence = 24;
  CHECK(is<expert_choice<any_score>>(
      make_batch_router(by_expert), [&](const expert_choice<any_score>& r) {
        return r.score.kind() == score_kind::sigmoid && r.capacity == take &&
               r.normalize == token_renormalization::none && r.eps == 0.0f && r.scale == 1.0f &&
               r.sequence_length == 24 && r.most_experts == 5;
      }));
  router_spec cut{.experts = 12,
                  .selection = selection_kind::counted,
                  .normalize = normalization::sum,
                  .scale = 2.5f,
                  .min_k = 2,
                  .max_k = 5,
                  .count = count_rule::percentile,
                  .count_scope = row_scope::batch,
                  .quantile = 0.375f};
  cut.weight_apart = true, cut.weight_score = score_kind::sigmoid;
  CHECK(is<batch_percentile<rare_score>>(make_batch_router(cut), [&](const auto& r) {
    return r.quantile == 0.375f && r.min_k == 2 && r.max_k == 5 &&
           r.score.choice.kind() == score_kind::softmax &&
           r.score.weight.kind() == score_kind::sigmoid && same_weight(r.weight, scaled);
  }));
}

}  // namespace make_batch_router_tests
