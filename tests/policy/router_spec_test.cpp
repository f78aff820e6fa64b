#include <moeroute/policy/router_spec.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/catalog.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/refusal.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

std::string refused(const router_spec& s) {
  return test::refusal([&] { check(s); });
}

// The plain spec of a selection that is accepted, with a change.
router_spec changed(selection_kind selection, void (*change)(router_spec&)) {
  router_spec s = plain_spec(selection);
  if (selection == selection_kind::top_p) s.top_p = 0.5f;
  if (selection == selection_kind::threshold) s.score = score_kind::relu;
  if (selection == selection_kind::product_keys) s.experts = 16;
  change(s);
  return s;
}

}  // namespace

TEST_CASE("the plain spec and every spec of the catalogue are accepted") {
  CHECK(refused({}) == "accepted");
  for (const catalog_entry& entry : catalog) {
    INFO(entry.name);
    CHECK(refused(entry.spec) == "accepted");
  }
}

TEST_CASE("a description without words is the plain one, field by field") {
  CHECK(router_spec{} ==
        router_spec{
            .experts = 8,
            .k = 2,
            .score = score_kind::softmax,
            .domain = score_domain::all,
            .selection = selection_kind::top_k,
            .selection_bias = false,
            .groups = 1,
            .topk_group = 1,
            .group_score = group_score::top2_sum,
            .group_fill = -HUGE_VALF,
            .lost_weight = lost_weight::as_published,
            .normalize = normalization::none,
            .lp_p = 1.0f,
            .eps_where = eps_mode::none,
            .eps = 0.0f,
            .scale = 1.0f,
            .scale_where = scale_place::weights,
            .divide_by_k = false,
            .output_scale = 1.0f,
            .per_expert_scale = false,
            .gate_bias = false,
            .gate = {gate_kind::linear, 0, 0, gate_activation::relu, 1.0f, 1.0f, 1e-6f},
            .softcap = 0.0f,
            .temperature = 1.0f,
            .jitter = 0.01f,
            .top_p = 0.0f,
            .crossing = crossing::include,
            .min_k = 1,
            .max_k = 0,
            .threshold = 0.0f,
            .row_norm = threshold_norm::none,
            .zero_experts = 0,
            .shared_experts = 0,
            .weight_on = weight_place::output,
            .capacity = 0,
            .drop_order = drop_order::choice_major,
            .normalize_before_drop = true,
            .ties = tie_order::lower_id,
            .class_bias = false,
            .weight_apart = false,
            .weight_score = score_kind::softmax,
            .weight_domain = score_domain::all,
            .second = second_expert::best,
            .table_key = table_key::token,
            .first_keys = 0,
            .second_logits = logit_pairs::none,
            .passes = 1,
            .pass_rule = pass_rule::bound,
            .pass_lambda = 1.0f,
            .standardize = 0.0f,
            .steering = false,
            .candidates = 0,
            .candidate_scope = row_scope::token,
            .noise = noise_kind::none,
            .noise_sigma = 1.0f,
            .noise_floor = 0.01f,
            .explore = 0.0f,
            .explore_scope = row_scope::token,
            .count = count_rule::ratio,
            .count_scope = row_scope::token,
            .quantile = 0.5f,
            .ratio = 0.5f,
            .entropy_low = 0.5f,
            .entropy_high = 1.5f,
            .mid_k = 2,
            .tsallis_q = 1.1f,
            .dense_above = 0.9f,
            .take = {2.0, capacity_rounding::up, 1, 1, 0},
            .sequence = 0,
            .phase = routing_phase::training,
            .plan_weights = plan_weights::by_k,
            .plan = {plan_mass::one, scaling_order::rows_then_columns, sinkhorn_domain::exponential,
                     sinkhorn_stop::mean_change, plan_similarity::logits, 1.0f, 1e-8f, 1e-4f, 1000},
            .shares = false,
            .probability = 1e-3f,
            .solver = assignment_solver::auction,
            .rounds = 2000,
            .support = 0,
            .plan_gamma = 1.0f,
            .plan_rate = 1e-2f,
            .slots_per_expert = 1,
            .slot_logits = soft_logits::normalized});
  // What else the plain one of a rule is.
  using enum selection_kind;
  for (int i = 0; i <= static_cast<int>(soft); ++i) {
    const auto kind = static_cast<selection_kind>(i);
    router_spec s{.selection = kind};
    const bool sparse = kind == sparse_transport || kind == sparse_transport_tokens;
    if (kind == selective_sinkhorn) s.plan = selective_scaling;
    if (sparse) s.plan.most_iterations = 20;
    if (sparse || kind == sinkhorn_expert_choice) s.plan_weights = plan_weights::softmax;
    INFO(to_string(kind));
    CHECK(plain_spec(kind) == s);
  }
}

TEST_CASE("names in the catalogue are found, and are different") {
  std::set<std::string_view> names;
  for (const catalog_entry& entry : catalog) {
    CHECK(names.insert(entry.name).second);
    CHECK_FALSE(entry.source.empty());
    REQUIRE(find_in_catalog(entry.name) != nullptr);
    CHECK(find_in_catalog(entry.name)->spec == entry.spec);
  }
  CHECK(find_in_catalog("no such model") == nullptr);
  CHECK(&spec_of_model("mixtral") == &find_in_catalog("mixtral")->spec);
  const auto said = [](std::string_view name) {
    return test::refusal([&] { spec_of_model(name); });
  };
  CHECK(said("no such model") ==
        "moeroute::spec_of_model: 'no such model' is not in the catalogue: docs/models.md has its "
        "names");
  CHECK(said("DeepSeek-V3") ==
        "moeroute::spec_of_model: 'DeepSeek-V3' is not in the catalogue: did you mean "
        "'deepseek_v3'?");
  CHECK(said("qwen3") ==
        "moeroute::spec_of_model: 'qwen3' is not in the catalogue: did you mean 'qwen3_moe'?");
  CHECK(said("Mixtral-8x7B") ==
        "moeroute::spec_of_model: 'Mixtral-8x7B' is not in the catalogue: did you mean 'mixtral'?");
  CHECK(said("") ==
        "moeroute::spec_of_model: '' is not in the catalogue: docs/models.md has its names");
  // The longest name that the word begins with, and marks on either side of letters and digits.
  CHECK(said("Step-3p7-Flash").ends_with(": did you mean 'step3p7'?"));
  CHECK(said("`{@[/:Mixtral").ends_with(": did you mean 'mixtral'?"));
  // Three letters are enough of one, two are not.
  CHECK(said("jam").ends_with(": did you mean 'jamba'?"));
  CHECK(said("ja").ends_with(": docs/models.md has its names"));
  CHECK(said(std::string(65, '-')) ==
        "moeroute::spec_of_model: '" + std::string(64, '-') +
            "' is not in the catalogue: docs/models.md has its names");
  // Whatever letters and digits a name has, it is known in capitals and with other marks between.
  std::string not_known;
  const auto in_capitals = [&](const catalog_entry& entry) {
    std::string name;
    for (const char c : entry.name)
      name += c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c == '_' ? '-' : c;
    const std::string mark = "did you mean '" + std::string(entry.name) + "'?";
    if (!said(name).ends_with(mark)) not_known += name + " ";
  };
  for (const catalog_entry& entry : catalog) in_capitals(entry);
  for (const catalog_entry& entry : newer_catalog) in_capitals(entry);
  CHECK(not_known == "");
}

TEST_CASE("sizes outside their range are refused with the field and both values") {
  CHECK(refused({.experts = 0}) == "moeroute::router_spec: experts is 0, expected 1 to 1048576");
  CHECK(refused({.experts = (1 << 20) + 1}) ==
        "moeroute::router_spec: experts is 1048577, expected 1 to 1048576");
  CHECK(refused({.experts = 8, .k = 9}) == "moeroute::router_spec: k is 9, expected 1 to 8");
  CHECK(refused({.k = 0}) == "moeroute::router_spec: k is 0, expected 1 to 8");
  CHECK(refused({.experts = 10, .groups = 4, .topk_group = 2}) ==
        "moeroute::top_k: groups is 4, expected a divisor of E = 10");
  CHECK(refused({.groups = 4, .topk_group = 5}) ==
        "moeroute::top_k: topk_group is 5, expected 1 to 4");
  CHECK(refused({.k = 3, .groups = 4, .topk_group = 1}) ==
        "moeroute::top_k: topk_group is 1 groups of 2 experts, expected room for k = 3");
  CHECK(refused({.groups = 4, .topk_group = 1, .group_fill = 1.0f}) ==
        "moeroute::top_k: group_fill is 1.000000, expected -inf or 0");
  CHECK(refused({.zero_experts = 8}) ==
        "moeroute::router_spec: zero_experts is 8, expected 0 to 7");
  CHECK(refused({.capacity = -1}) ==
        "moeroute::router_spec: capacity is -1, expected 0 to 2147483647");
}

TEST_CASE("numbers outside their domain are refused by name") {
  CHECK(refused({.normalize = normalization::sum, .eps_where = eps_mode::add, .eps = -1e-3f}) ==
        "moeroute::router_spec: eps is -0.00100000005, expected >= 0");
  CHECK(refused({.softcap = -2.0f}) == "moeroute::router_spec: logit_softcap is -2, expected >= 0");
  CHECK(refused({.temperature = 0.0f}) == "moeroute::router_spec: temperature is 0, expected > 0");
  CHECK(refused({.temperature = test::not_a_number}) ==
        "moeroute::router_spec: temperature is nan, expected a finite number");
  CHECK(refused({.selection = selection_kind::top_p, .top_p = 1.5f}) ==
        "moeroute::top_p: p is 1.500000, expected more than 0 and at most 1");
  CHECK(refused({.experts = 10,
                 .k = 2,
                 .domain = score_domain::selected,
                 .selection = selection_kind::product_keys}) ==
        "moeroute::router_spec: experts is 10, expected a square for product_keys");
  CHECK(refused({.experts = 8, .k = 3, .selection = selection_kind::sparsemixer}) ==
        "moeroute::router_spec: k of sparsemixer is 3, expected 2");
  CHECK(refused({.experts = 8, .k = 3, .selection = selection_kind::top2}) ==
        "moeroute::router_spec: k of top2_second_by_logit is 3, expected 2");
}

TEST_CASE("fields that clash are both named, and why") {
  using enum selection_kind;
  const auto sum = normalization::sum;
  const auto clashes = [](const router_spec& s, const std::string& sentence) {
    CHECK(refused(s) == "moeroute::router_spec: " + sentence);
  };
  clashes({.selection = sparsemixer, .groups = 4, .topk_group = 2},
          "groups=4 clashes with selection=sparsemixer: only top_k and each_group know groups");
  clashes({.selection = expert_table, .selection_bias = true},
          "bias=selection clashes with selection=hash_table: only top_k and each_group add a "
          "selection bias");
  clashes({.normalize = sum, .lp_p = 2.0f},
          "lp_p=2 clashes with normalize: only normalize=lp has a p");
  clashes({.score = score_kind::sigmoid, .selection = top_p, .top_p = 0.5f},
          "selection=top_p clashes with score=sigmoid: top_p needs probabilities: softmax over all "
          "experts");
  clashes({.top_p = 0.5f},
          "p=0.5 clashes with selection=top_k: only top_p and count=tsallis have a mass");
  clashes({.score = score_kind::softmax, .selection = threshold},
          "selection=threshold clashes with score=softmax: threshold takes relu, sigmoid or "
          "identity");
  clashes({.score = score_kind::relu, .selection = threshold, .normalize = sum},
          "selection=threshold clashes with normalize: threshold routers divide by row_norm");
  clashes({.row_norm = threshold_norm::rms},
          "row_norm clashes with selection=top_k: only threshold routers have it");
  clashes({.top_p = 0.5f, .count = count_rule::tsallis},
          "p=0.5 clashes with selection=top_k: only top_p and count=tsallis have a mass");
  clashes({.selection = sparsemixer, .scale = 2.0f},
          "selection=sparsemixer clashes with normalize or scale: its two weights come from two "
          "softmaxes");
  clashes({.score = score_kind::sigmoid, .selection = top2},
          "selection=top2_second_by_logit clashes with score=sigmoid: top2 weighs by the softmax "
          "over all experts");
  clashes({.experts = 16, .score = score_kind::sigmoid, .selection = product_keys},
          "selection=product_keys clashes with score=sigmoid: product keys weigh by a softmax of "
          "the sums");
  clashes({.score = score_kind::uniform},
          "score=uniform clashes with selection=top_k: equal scores choose nothing");
  clashes({.drop_order = drop_order::batch_priority},
          "drop_order=batch_priority_slot_major clashes with capacity=0: without a capacity "
          "nothing is dropped");
  clashes({.normalize = normalization::lp, .capacity = 4, .normalize_before_drop = false},
          "norm_before_drop=false clashes with normalize=lp or eps_mode=add: after dropping "
          "weights are divided by max(sum, eps)");
  clashes({.normalize = sum, .scale = 2.0f, .capacity = 4, .normalize_before_drop = false},
          "norm_before_drop=false clashes with scale, per_expert_scale or post_divide_by_k: after "
          "dropping weights are divided by their sum, which takes a factor away");
}

TEST_CASE(
    "eps where nothing is normalised is inert, and so is the place of a norm where nothing drops: "
    "accepted") {
  CHECK(test::refusal([] { check({.eps_where = eps_mode::add, .eps = 1e-20f}); }) == "accepted");
  CHECK(test::refusal([] {
          check({.normalize = normalization::sum, .scale = 2.0f, .normalize_before_drop = false});
        }) == "accepted");
}

TEST_CASE(
    "a printed spec names what differs from the plain one, in the words of the golden files") {
  CHECK(to_string(router_spec{}) == "E=8 k=2 score=softmax");
  CHECK(to_string(find_in_catalog("deepseek_v3")->spec) ==
        "E=256 k=8 score=sigmoid bias=selection groups=8 topk_group=4 group_score=top2_sum "
        "group_fill=-inf normalize=sum eps=9.99999968e-21 eps_mode=add scale=2.5");
  CHECK(to_string(find_in_catalog("nllb_moe")->spec) ==
        "E=128 k=2 score=softmax selection=top2_second_by_logit normalize=sum eps=1.1920929e-07 "
        "eps_mode=clamp capacity=20 drop_order=position_slot_major norm_before_drop=false");
  CHECK(to_string(router_spec{.selection = selection_kind::top_p,
                              .top_p = 0.5f,
                              .crossing = crossing::exclude,
                              .max_k = 4}) ==
        "E=8 k=2 score=softmax selection=top_p p=0.5 crossing=exclude max_k=4");
}

TEST_CASE("specs that print alike are equal, in the catalogue") {
  for (const catalog_entry& a : catalog)
    for (const catalog_entry& b : catalog)
      CHECK((to_string(a.spec) == to_string(b.spec)) == (a.spec == b.spec));
}

TEST_CASE("the routed sum is scaled by what does not act on weights") {
  CHECK(router_spec{.scale = 2.5f}.routed_scale() == 1.0f);
  CHECK(router_spec{.scale = 2.5f, .scale_where = scale_place::output}.routed_scale() == 2.5f);
  CHECK(router_spec{.output_scale = 4.0f}.routed_scale() == 4.0f);
}

TEST_CASE("a spec's capacity is that of the stage which drops") {
  CHECK(capacity_of({}).rule.formula == capacity_formula::unlimited);
  const capacity_policy after = capacity_of(find_in_catalog("nllb_moe")->spec);
  CHECK(after.rule.capacity(20, 128, 2) == 20);
  CHECK(after.renormalize == renormalization::after_drop);
  CHECK(after.eps == 1.1920929e-7f);
  const capacity_policy before = capacity_of(find_in_catalog("nllb_moe_bpr")->spec);
  CHECK(before.order == drop_order::batch_priority);
  CHECK(before.renormalize == renormalization::none);
}

TEST_CASE("every check of a description is made, and by its name") {
  using enum selection_kind;
  const std::vector<std::pair<router_spec, std::string>> all{
      {changed(top_p, [](router_spec& s) { s.groups = 2; }),
       "router_spec: groups=2 clashes with selection=top_p: only top_k and each_group know groups"},
      {changed(each_group, [](router_spec& s) { s.groups = 0; }),
       "top_of_each_group: groups is 0, expected 1 to 8"},
      {changed(each_group, [](router_spec& s) { s.groups = 3; }),
       "top_of_each_group: groups is 3, expected a divisor of E = 8"},
      {changed(each_group, [](router_spec& s) { s.groups = 4; }),
       "top_of_each_group: k is 2, expected 4 to 8"},
      {changed(each_group,
               [](router_spec& s) {
                 s.groups = 2;
                 s.k = 3;
               }),
       "top_of_each_group: k is 3, expected a multiple of groups = 2"},
      {changed(top_k, [](router_spec& s) { s.groups = 9; }), "top_k: groups is 9, expected 1 to 8"},
      {changed(top_k,
               [](router_spec& s) {
                 s.groups = 4;
                 s.topk_group = 0;
               }),
       "top_k: topk_group is 0, expected 1 to 4"},
      {changed(top_k, [](router_spec& s) { s.class_bias = true; }),
       "router_spec: bias=by_class clashes with bias=none: the second bias stands beside the "
       "first"},
      {changed(top_k, [](router_spec& s) { s.eps = -0.5f; }),
       "router_spec: eps is -0.5, expected >= 0"},
      {changed(top_p, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: selection=top_p clashes with score=softmax: top_p needs probabilities: "
       "softmax over all experts"},
      {changed(top_p, [](router_spec& s) { s.top_p = 0.0f; }),
       "top_p: p is 0.000000, expected more than 0 and at most 1"},
      {changed(top_p, [](router_spec& s) { s.min_k = 0; }), "top_p: min_k is 0, expected 1 to 8"},
      {changed(top_p, [](router_spec& s) { s.min_k = 9; }), "top_p: min_k is 9, expected 1 to 8"},
      {changed(top_p,
               [](router_spec& s) {
                 s.min_k = 2;
                 s.max_k = 1;
               }),
       "top_p: max_k is 1, expected 2 to 1048576"},
      {changed(threshold, [](router_spec& s) { s.score = score_kind::softplus; }),
       "router_spec: selection=threshold clashes with score=softplus: threshold takes relu, "
       "sigmoid or identity"},
      {changed(threshold, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: selection=threshold clashes with normalize: threshold routers divide by "
       "row_norm"},
      {changed(sparsemixer, [](router_spec& s) { s.k = 1; }),
       "router_spec: k of sparsemixer is 1, expected 2"},
      {changed(sparsemixer, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: selection=sparsemixer clashes with normalize or scale: its two weights come "
       "from two softmaxes"},
      {changed(random, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: normalize or scale clashes with selection=random: every choice weighs 1 / k"},
      {changed(sparsemixer, [](router_spec& s) { s.scale = 2.0f; }),
       "router_spec: selection=sparsemixer clashes with normalize or scale: its two weights come "
       "from two softmaxes"},
      {changed(random, [](router_spec& s) { s.scale = 2.0f; }),
       "router_spec: normalize or scale clashes with selection=random: every choice weighs 1 / k"},
      {changed(top2, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: selection=top2_second_by_logit clashes with score=softmax: top2 weighs by the "
       "softmax over all experts"},
      {changed(product_keys, [](router_spec& s) { s.first_keys = 17; }),
       "router_spec: first_keys is 17, expected 1 to 16"},
      {changed(product_keys, [](router_spec& s) { s.first_keys = -1; }),
       "router_spec: first_keys is -1, expected 1 to 16"},
      {changed(product_keys, [](router_spec& s) { s.first_keys = 3; }),
       "router_spec: experts is 16, expected a multiple of first_keys = 3"},
      {changed(sparsemixer, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=sparsemixer: it takes "
       "logits as they are"},
      {changed(random, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=random: it takes logits "
       "as they are"},
      {changed(top2, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=top2_second_by_logit: it "
       "takes logits as they are"},
      {changed(product_keys, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=product_keys: it takes "
       "logits as they are"},
      {changed(sinkhorn, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=sinkhorn: it takes logits "
       "as they are"},
      {changed(base, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=base: it takes logits as "
       "they are"},
      {changed(soft, [](router_spec& s) { s.softcap = 3.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=soft: it takes logits as "
       "they are"},
      {changed(sparsemixer, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=sparsemixer: it takes "
       "logits as they are"},
      {changed(random, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=random: it takes logits "
       "as they are"},
      {changed(top2, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=top2_second_by_logit: it "
       "takes logits as they are"},
      {changed(product_keys, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=product_keys: it takes "
       "logits as they are"},
      {changed(sinkhorn, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=sinkhorn: it takes logits "
       "as they are"},
      {changed(base, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=base: it takes logits as "
       "they are"},
      {changed(soft, [](router_spec& s) { s.temperature = 2.0f; }),
       "router_spec: logit_softcap or temperature clashes with selection=soft: it takes logits as "
       "they are"},
      {changed(sparsemixer, [](router_spec& s) { s.divide_by_k = true; }),
       "router_spec: post_divide_by_k or per_expert_scale clashes with selection=sparsemixer: it "
       "has weights of its own"},
      {changed(threshold, [](router_spec& s) { s.divide_by_k = true; }),
       "router_spec: post_divide_by_k or per_expert_scale clashes with selection=threshold: it has "
       "weights of its own"},
      {changed(random, [](router_spec& s) { s.divide_by_k = true; }),
       "router_spec: post_divide_by_k or per_expert_scale clashes with selection=random: it has "
       "weights of its own"},
      {changed(sinkhorn, [](router_spec& s) { s.divide_by_k = true; }),
       "router_spec: per_expert_scale or post_divide_by_k clashes with selection=sinkhorn: its "
       "weights are its own"},
      {changed(top_k,
               [](router_spec& s) {
                 s.normalize = normalization::sum;
                 s.capacity = 4;
                 s.normalize_before_drop = false;
                 s.divide_by_k = true;
               }),
       "router_spec: norm_before_drop=false clashes with scale, per_expert_scale or "
       "post_divide_by_k: after dropping weights are divided by their sum, which takes a factor "
       "away"},
      {changed(sparsemixer, [](router_spec& s) { s.per_expert_scale = true; }),
       "router_spec: post_divide_by_k or per_expert_scale clashes with selection=sparsemixer: it "
       "has weights of its own"},
      {changed(threshold, [](router_spec& s) { s.per_expert_scale = true; }),
       "router_spec: post_divide_by_k or per_expert_scale clashes with selection=threshold: it has "
       "weights of its own"},
      {changed(random, [](router_spec& s) { s.per_expert_scale = true; }),
       "router_spec: post_divide_by_k or per_expert_scale clashes with selection=random: it has "
       "weights of its own"},
      {changed(sinkhorn, [](router_spec& s) { s.per_expert_scale = true; }),
       "router_spec: per_expert_scale or post_divide_by_k clashes with selection=sinkhorn: its "
       "weights are its own"},
      {changed(top_k,
               [](router_spec& s) {
                 s.normalize = normalization::sum;
                 s.capacity = 4;
                 s.normalize_before_drop = false;
                 s.per_expert_scale = true;
               }),
       "router_spec: norm_before_drop=false clashes with scale, per_expert_scale or "
       "post_divide_by_k: after dropping weights are divided by their sum, which takes a factor "
       "away"},
      {changed(top_k,
               [](router_spec& s) {
                 s.normalize = normalization::sum;
                 s.eps_where = eps_mode::add;
                 s.capacity = 4;
                 s.normalize_before_drop = false;
               }),
       "router_spec: norm_before_drop=false clashes with normalize=lp or eps_mode=add: after "
       "dropping weights are divided by max(sum, eps)"},
      {changed(top_k, [](router_spec& s) { s.scale = HUGE_VALF; }),
       "router_spec: scale is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.output_scale = HUGE_VALF; }),
       "router_spec: output_scale is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.eps = HUGE_VALF; }),
       "router_spec: eps is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.softcap = HUGE_VALF; }),
       "router_spec: logit_softcap is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.temperature = HUGE_VALF; }),
       "router_spec: temperature is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.threshold = HUGE_VALF; }),
       "router_spec: threshold is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.jitter = HUGE_VALF; }),
       "router_spec: jitter_eps is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.noise_sigma = HUGE_VALF; }),
       "router_spec: noise_sigma is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.noise_floor = HUGE_VALF; }),
       "router_spec: noise_floor is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.pass_lambda = HUGE_VALF; }),
       "router_spec: pass_lambda is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.noise_sigma = -1.0f; }),
       "router_spec: noise_sigma is -1, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.noise_floor = -1.0f; }),
       "router_spec: noise_floor is -1, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.softcap = -1.0f; }),
       "router_spec: logit_softcap is -1, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.jitter = -1.0f; }),
       "router_spec: jitter_eps is -1, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.standardize = -1.0f; }),
       "router_spec: standardize is -1, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.temperature = -1.0f; }),
       "router_spec: temperature is -1, expected > 0"},
      {changed(sparsemixer, [](router_spec& s) { s.noise = noise_kind::gumbel; }),
       "router_spec: noise=gumbel clashes with selection=sparsemixer: it takes logits as they are"},
      {changed(top2, [](router_spec& s) { s.noise = noise_kind::gumbel; }),
       "router_spec: noise=gumbel clashes with selection=top2_second_by_logit: it takes logits as "
       "they are"},
      {changed(sinkhorn, [](router_spec& s) { s.noise = noise_kind::gumbel; }),
       "router_spec: noise=gumbel clashes with selection=sinkhorn: it takes logits as they are"},
      {changed(expert_choice, [](router_spec& s) { s.noise = noise_kind::gumbel; }),
       "router_spec: noise=gumbel clashes with selection=expert_choice: it takes logits as they "
       "are"},
      {changed(top_k, [](router_spec& s) { s.zero_experts = -1; }),
       "router_spec: zero_experts is -1, expected 0 to 7"},
      {changed(top_k, [](router_spec& s) { s.capacity = index_t{1} << 31; }),
       "router_spec: capacity is 2147483648, expected 0 to 2147483647"},
      {changed(top_p, [](router_spec& s) { s.explore = 0.5f; }),
       "router_spec: explore clashes with selection=top_p: only a common top_k explores"},
      {changed(top_k,
               [](router_spec& s) {
                 s.explore = 0.5f;
                 s.passes = 2;
               }),
       "router_spec: explore clashes with selection=top_k: only a common top_k explores"},
      {changed(top_k, [](router_spec& s) { s.explore = -0.5f; }),
       "router_spec: explore is -0.5, expected 0 to 1"},
      {changed(top_k, [](router_spec& s) { s.explore = 1.5f; }),
       "router_spec: explore is 1.5, expected 0 to 1"},
      {changed(top_k, [](router_spec& s) { s.shares = true; }),
       "router_spec: shares clashes with selection=top_k: only sinkhorn and selective_sinkhorn "
       "have shares per expert"},
      {changed(top_p, [](router_spec& s) { s.ties = tie_order::higher_id; }),
       "router_spec: ties=higher_id clashes with selection=top_p: only top_k and each_group turn "
       "ties"},
      {changed(counted, [](router_spec& s) { s.ties = tie_order::higher_id; }),
       "router_spec: ties=higher_id clashes with selection=counted: only top_k and each_group turn "
       "ties"},
      {changed(top_p, [](router_spec& s) { s.weight_apart = true; }),
       "router_spec: weight_score clashes with selection=top_p: only top_k, each_group and counted "
       "weigh by another score"},
      {changed(top_p, [](router_spec& s) { s.second_logits = logit_pairs::sigmoid_sum; }),
       "router_spec: second_logits=sigmoid_sum clashes with selection=top_p: only top_k, "
       "each_group and counted take two logits per expert"},
      {changed(top_p, [](router_spec& s) { s.passes = 2; }),
       "router_spec: passes clashes with selection=top_p: only top_k, each_group and counted take "
       "logits of passes"},
      {changed(top_p, [](router_spec& s) { s.standardize = 1.0f; }),
       "router_spec: standardize clashes with selection=top_p: only top_k, each_group and counted "
       "have steps before them"},
      {changed(top_p, [](router_spec& s) { s.steering = true; }),
       "router_spec: steering clashes with selection=top_p: only top_k, each_group and counted "
       "have steps before them"},
      {changed(top_p, [](router_spec& s) { s.candidates = 4; }),
       "router_spec: candidates clashes with selection=top_p: only top_k, each_group and counted "
       "have steps before them"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.second_logits = logit_pairs::sigmoid_sum;
               }),
       "router_spec: second_logits=sigmoid_sum clashes with selection=counted: only top_k, "
       "each_group and counted take two logits per expert"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.passes = 2;
               }),
       "router_spec: passes clashes with selection=counted: only top_k, each_group and counted "
       "take logits of passes"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.standardize = 1.0f;
               }),
       "router_spec: standardize clashes with selection=counted: only top_k, each_group and "
       "counted have steps before them"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.steering = true;
               }),
       "router_spec: steering clashes with selection=counted: only top_k, each_group and counted "
       "have steps before them"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.candidates = 4;
               }),
       "router_spec: candidates clashes with selection=counted: only top_k, each_group and counted "
       "have steps before them"},
      {changed(counted, [](router_spec& s) { s.second_logits = logit_pairs::weigh; }),
       "router_spec: second_logits=weigh clashes with selection=counted: only top_k and each_group "
       "take two logits per expert"},
      {changed(top_k, [](router_spec& s) { s.second_logits = logit_pairs::sigmoid_sum; }),
       "router_spec: second_logits=sigmoid_sum clashes with score=softmax: the sum is the score: "
       "score=identity"},
      {changed(top_k, [](router_spec& s) { s.standardize = HUGE_VALF; }),
       "router_spec: standardize is inf, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.passes = 0; }),
       "router_spec: passes is 0, expected 1 to 65536"},
      {changed(top_k, [](router_spec& s) { s.passes = 65537; }),
       "router_spec: passes is 65537, expected 1 to 65536"},
      {changed(top_k, [](router_spec& s) { s.candidates = 1; }),
       "router_spec: candidates is 1, expected 2 to 8"},
      {changed(top_k, [](router_spec& s) { s.candidates = 9; }),
       "router_spec: candidates is 9, expected 2 to 8"},
      {changed(top_k,
               [](router_spec& s) {
                 s.second_logits = logit_pairs::weigh;
                 s.passes = 2;
               }),
       "router_spec: second_logits=weigh clashes with passes=2: columns are read one way"},
      {changed(soft, [](router_spec& s) { s.gate.kind = gate_kind::cosine; }),
       "router_spec: gate=cosine clashes with selection=soft: its slots are its gate"},
      {changed(top_k, [](router_spec& s) { s.gate.d = -1; }),
       "router_spec: gate_d is -1, expected 0 to 2147483648"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate.kind = gate_kind::mlp;
                 s.gate.width = 0;
               }),
       "router_spec: gate_width is 0, expected 1 to 2147483648"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate.kind = gate_kind::low_rank_cosine;
                 s.gate.width = 0;
               }),
       "router_spec: gate_width is 0, expected 1 to 2147483648"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate.kind = gate_kind::codebook;
                 s.gate.width = 7;
               }),
       "router_spec: gate_width is 7, expected 8 to 2147483648"},
      {changed(top_k, [](router_spec& s) { s.gate.temperature = 0.0f; }),
       "router_spec: gate_temperature is 0, expected > 0"},
      {changed(top_k, [](router_spec& s) { s.gate.temperature = -1.0f; }),
       "router_spec: gate_temperature is -1, expected > 0"},
      {changed(top_k, [](router_spec& s) { s.gate.temperature = HUGE_VALF; }),
       "router_spec: gate_temperature is inf, expected > 0"},
      {changed(top_k, [](router_spec& s) { s.gate.scale = HUGE_VALF; }),
       "router_spec: gate_scale is inf, expected a finite number"},
      {changed(top_k, [](router_spec& s) { s.gate.eps = -1.0f; }),
       "router_spec: gate_eps is -1, expected >= 0"},
      {changed(top_k, [](router_spec& s) { s.gate.eps = HUGE_VALF; }),
       "router_spec: gate_eps is inf, expected >= 0"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate_bias = true;
                 s.gate.kind = gate_kind::cosine;
                 s.gate.width = 8;
               }),
       "router_spec: gate_bias clashes with gate=cosine: it has none"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate_bias = true;
                 s.gate.kind = gate_kind::low_rank_cosine;
                 s.gate.width = 8;
               }),
       "router_spec: gate_bias clashes with gate=low_rank_cosine: it has none"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate_bias = true;
                 s.gate.kind = gate_kind::codebook;
                 s.gate.width = 8;
               }),
       "router_spec: gate_bias clashes with gate=codebook: it has none"},
      {changed(top_k,
               [](router_spec& s) {
                 s.gate_bias = true;
                 s.gate.kind = gate_kind::none;
                 s.gate.width = 8;
               }),
       "router_spec: gate_bias clashes with gate=none: it has none"},
      {changed(top_k, [](router_spec& s) { s.gate.kind = gate_kind::mixing; }),
       "router_spec: gate=mixing clashes with score=softmax: its columns are probabilities: "
       "score=identity"},
      {changed(expert_choice, [](router_spec& s) { s.take.factor = 0.0; }),
       "expert_choice: capacity.factor is 0.000000, expected > 0"},
      {changed(expert_choice, [](router_spec& s) { s.take.factor = HUGE_VAL; }),
       "expert_choice: capacity.factor is inf, expected > 0"},
      {changed(expert_choice, [](router_spec& s) { s.take.multiple_of = 0; }),
       "expert_choice: capacity.multiple_of is 0, expected 1 to 1073741824"},
      {changed(expert_choice, [](router_spec& s) { s.take.at_least = 0; }),
       "expert_choice: capacity.at_least is 0, expected 1 to 1073741824"},
      {changed(expert_choice, [](router_spec& s) { s.take.fixed = -1; }),
       "expert_choice: capacity.fixed is -1, expected 0 to 1073741824"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.take.factor = 0.0; }),
       "expert_choice: capacity.factor is 0.000000, expected > 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.take.factor = HUGE_VAL; }),
       "expert_choice: capacity.factor is inf, expected > 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.take.multiple_of = 0; }),
       "expert_choice: capacity.multiple_of is 0, expected 1 to 1073741824"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.take.at_least = 0; }),
       "expert_choice: capacity.at_least is 0, expected 1 to 1073741824"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.take.fixed = -1; }),
       "expert_choice: capacity.fixed is -1, expected 0 to 1073741824"},
      {changed(sparse_transport, [](router_spec& s) { s.take.factor = 0.0; }),
       "expert_choice: capacity.factor is 0.000000, expected > 0"},
      {changed(sparse_transport, [](router_spec& s) { s.take.factor = HUGE_VAL; }),
       "expert_choice: capacity.factor is inf, expected > 0"},
      {changed(sparse_transport, [](router_spec& s) { s.take.multiple_of = 0; }),
       "expert_choice: capacity.multiple_of is 0, expected 1 to 1073741824"},
      {changed(sparse_transport, [](router_spec& s) { s.take.at_least = 0; }),
       "expert_choice: capacity.at_least is 0, expected 1 to 1073741824"},
      {changed(sparse_transport, [](router_spec& s) { s.take.fixed = -1; }),
       "expert_choice: capacity.fixed is -1, expected 0 to 1073741824"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.take.factor = 0.0; }),
       "expert_choice: capacity.factor is 0.000000, expected > 0"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.take.factor = HUGE_VAL; }),
       "expert_choice: capacity.factor is inf, expected > 0"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.take.multiple_of = 0; }),
       "expert_choice: capacity.multiple_of is 0, expected 1 to 1073741824"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.take.at_least = 0; }),
       "expert_choice: capacity.at_least is 0, expected 1 to 1073741824"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.take.fixed = -1; }),
       "expert_choice: capacity.fixed is -1, expected 0 to 1073741824"},
      {changed(sinkhorn, [](router_spec& s) { s.plan.temperature = 0.0f; }),
       "router_spec: temperature is 0.000000, expected > 0"},
      {changed(sinkhorn, [](router_spec& s) { s.plan.temperature = HUGE_VALF; }),
       "router_spec: temperature is inf, expected > 0"},
      {changed(sinkhorn, [](router_spec& s) { s.plan.eps = -1.0f; }),
       "router_spec: eps is -1.000000, expected >= 0"},
      {changed(sinkhorn, [](router_spec& s) { s.plan.eps = HUGE_VALF; }),
       "router_spec: eps is inf, expected >= 0"},
      {changed(sinkhorn, [](router_spec& s) { s.plan.tolerance = -1.0f; }),
       "router_spec: tolerance is -1.000000, expected >= 0"},
      {changed(sinkhorn, [](router_spec& s) { s.plan.most_iterations = 0; }),
       "router_spec: most_iterations is 0, expected 1 to 1073741824"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.plan.temperature = 0.0f; }),
       "router_spec: temperature is 0.000000, expected > 0"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.plan.temperature = HUGE_VALF; }),
       "router_spec: temperature is inf, expected > 0"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.plan.eps = -1.0f; }),
       "router_spec: eps is -1.000000, expected >= 0"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.plan.eps = HUGE_VALF; }),
       "router_spec: eps is inf, expected >= 0"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.plan.tolerance = -1.0f; }),
       "router_spec: tolerance is -1.000000, expected >= 0"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.plan.most_iterations = 0; }),
       "router_spec: most_iterations is 0, expected 1 to 1073741824"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan.temperature = 0.0f; }),
       "router_spec: temperature is 0.000000, expected > 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan.temperature = HUGE_VALF; }),
       "router_spec: temperature is inf, expected > 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan.eps = -1.0f; }),
       "router_spec: eps is -1.000000, expected >= 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan.eps = HUGE_VALF; }),
       "router_spec: eps is inf, expected >= 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan.tolerance = -1.0f; }),
       "router_spec: tolerance is -1.000000, expected >= 0"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan.most_iterations = 0; }),
       "router_spec: most_iterations is 0, expected 1 to 1073741824"},
      {changed(expert_choice, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: score_domain=selected clashes with selection=expert_choice: it scores every "
       "expert"},
      {changed(sinkhorn, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: score_domain=selected clashes with selection=sinkhorn: it scores every "
       "expert"},
      {changed(base, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: score_domain=selected clashes with selection=base: it scores every expert"},
      {changed(soft, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: score_domain=selected clashes with selection=soft: it scores every expert"},
      {changed(sparse_transport, [](router_spec& s) { s.domain = score_domain::selected; }),
       "router_spec: score_domain=selected clashes with selection=sparse_transport: it scores "
       "every expert"},
      {changed(expert_choice, [](router_spec& s) { s.score = score_kind::uniform; }),
       "router_spec: score=uniform clashes with selection=expert_choice: equal scores choose "
       "nothing"},
      {changed(expert_choice, [](router_spec& s) { s.normalize = normalization::lp; }),
       "router_spec: normalize=lp or eps_mode=clamp clashes with selection=expert_choice: a "
       "token's weights are divided by sum + eps"},
      {changed(expert_choice,
               [](router_spec& s) {
                 s.normalize = normalization::sum;
                 s.eps_where = eps_mode::clamp;
               }),
       "router_spec: normalize=lp or eps_mode=clamp clashes with selection=expert_choice: a "
       "token's weights are divided by sum + eps"},
      {changed(expert_choice, [](router_spec& s) { s.sequence = -1; }),
       "router_spec: sequence is -1, expected 0 to 2147483648"},
      {changed(expert_choice, [](router_spec& s) { s.max_k = -1; }),
       "router_spec: max_k is -1, expected 0 to 8"},
      {changed(expert_choice, [](router_spec& s) { s.max_k = 9; }),
       "router_spec: max_k is 9, expected 0 to 8"},
      {changed(sinkhorn, [](router_spec& s) { s.score = score_kind::sigmoid; }),
       "router_spec: score=sigmoid clashes with selection=sinkhorn: its scores are its own"},
      {changed(sinkhorn, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: normalize clashes with selection=sinkhorn: its weights are its own"},
      {changed(sinkhorn, [](router_spec& s) { s.scale = 2.0f; }),
       "router_spec: scale=2 clashes with selection=sinkhorn: its weights are its own: "
       "scale_where=output"},
      {changed(base, [](router_spec& s) { s.score = score_kind::sigmoid; }),
       "router_spec: score=sigmoid clashes with selection=base: its scores are its own"},
      {changed(base, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: normalize clashes with selection=base: its weights are its own"},
      {changed(base, [](router_spec& s) { s.scale = 2.0f; }),
       "router_spec: scale=2 clashes with selection=base: its weights are its own: "
       "scale_where=output"},
      {changed(sparse_transport, [](router_spec& s) { s.score = score_kind::sigmoid; }),
       "router_spec: score=sigmoid clashes with selection=sparse_transport: its scores are its "
       "own"},
      {changed(sparse_transport, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: normalize clashes with selection=sparse_transport: its weights are its own"},
      {changed(sparse_transport, [](router_spec& s) { s.scale = 2.0f; }),
       "router_spec: scale=2 clashes with selection=sparse_transport: its weights are its own: "
       "scale_where=output"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.score = score_kind::sigmoid; }),
       "router_spec: score=sigmoid clashes with selection=sinkhorn_expert_choice: its scores are "
       "its own"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.normalize = normalization::sum; }),
       "router_spec: normalize clashes with selection=sinkhorn_expert_choice: its weights are its "
       "own"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.scale = 2.0f; }),
       "router_spec: scale=2 clashes with selection=sinkhorn_expert_choice: its weights are its "
       "own: scale_where=output"},
      {changed(sinkhorn,
               [](router_spec& s) {
                 s.phase = routing_phase::evaluation;
                 s.plan_weights = plan_weights::plan;
               }),
       "router_spec: plan_weights=plan clashes with phase=evaluation: evaluation has no plan"},
      {changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan_weights = plan_weights::by_k; }),
       "router_spec: plan_weights=by_k clashes with selection=sinkhorn_expert_choice: it weighs by "
       "softmax or plan"},
      {changed(sinkhorn_expert_choice,
               [](router_spec& s) { s.plan_weights = plan_weights::sigmoid; }),
       "router_spec: plan_weights=sigmoid clashes with selection=sinkhorn_expert_choice: it weighs "
       "by softmax or plan"},
      {changed(sparse_transport, [](router_spec& s) { s.plan_weights = plan_weights::by_k; }),
       "router_spec: plan_weights=by_k clashes with selection=sparse_transport: it weighs by "
       "softmax or plan"},
      {changed(sparse_transport, [](router_spec& s) { s.plan_weights = plan_weights::sigmoid; }),
       "router_spec: plan_weights=sigmoid clashes with selection=sparse_transport: it weighs by "
       "softmax or plan"},
      {changed(sparse_transport_tokens,
               [](router_spec& s) { s.plan_weights = plan_weights::by_k; }),
       "router_spec: plan_weights=by_k clashes with selection=sparse_transport_tokens: it weighs "
       "by softmax or plan"},
      {changed(sparse_transport_tokens,
               [](router_spec& s) { s.plan_weights = plan_weights::sigmoid; }),
       "router_spec: plan_weights=sigmoid clashes with selection=sparse_transport_tokens: it "
       "weighs by softmax or plan"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.probability = -0.5f; }),
       "router_spec: probability is -0.5, expected 0 to 1"},
      {changed(selective_sinkhorn, [](router_spec& s) { s.probability = 1.5f; }),
       "router_spec: probability is 1.5, expected 0 to 1"},
      {changed(sparse_transport, [](router_spec& s) { s.support = -1; }),
       "router_spec: support is -1, expected 0 to 1073741824"},
      {changed(sparse_transport, [](router_spec& s) { s.plan.most_iterations = -1; }),
       "router_spec: plan_iterations is -1, expected 0 to 1073741824"},
      {changed(sparse_transport, [](router_spec& s) { s.plan_gamma = 0.0f; }),
       "router_spec: plan_gamma is 0, expected > 0"},
      {changed(sparse_transport, [](router_spec& s) { s.plan_gamma = HUGE_VALF; }),
       "router_spec: plan_gamma is inf, expected > 0"},
      {changed(sparse_transport, [](router_spec& s) { s.plan_rate = 0.0f; }),
       "router_spec: plan_rate is 0, expected > 0"},
      {changed(sparse_transport, [](router_spec& s) { s.plan_rate = HUGE_VALF; }),
       "router_spec: plan_rate is inf, expected > 0"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.support = -1; }),
       "router_spec: support is -1, expected 0 to 1073741824"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.plan.most_iterations = -1; }),
       "router_spec: plan_iterations is -1, expected 0 to 1073741824"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.plan_gamma = 0.0f; }),
       "router_spec: plan_gamma is 0, expected > 0"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.plan_gamma = HUGE_VALF; }),
       "router_spec: plan_gamma is inf, expected > 0"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.plan_rate = 0.0f; }),
       "router_spec: plan_rate is 0, expected > 0"},
      {changed(sparse_transport_tokens, [](router_spec& s) { s.plan_rate = HUGE_VALF; }),
       "router_spec: plan_rate is inf, expected > 0"},
      {changed(base, [](router_spec& s) { s.rounds = 0; }),
       "router_spec: rounds is 0, expected 1 to 1073741824"},
      {changed(soft, [](router_spec& s) { s.slots_per_expert = 0; }),
       "router_spec: slots_per_expert is 0, expected 1 to 1048576"},
      {changed(counted, [](router_spec& s) { s.min_k = 0; }),
       "router_spec: min_k is 0, expected 1 to 8"},
      {changed(counted, [](router_spec& s) { s.min_k = 9; }),
       "router_spec: min_k is 9, expected 1 to 8"},
      {changed(counted,
               [](router_spec& s) {
                 s.min_k = 2;
                 s.max_k = 1;
               }),
       "router_spec: max_k is 1, expected 2 to 1048576"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.score = score_kind::sigmoid;
               }),
       "router_spec: count=tsallis clashes with score=sigmoid: it needs probabilities: softmax "
       "over all experts"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.domain = score_domain::selected;
               }),
       "router_spec: count=tsallis clashes with score=softmax: it needs probabilities: softmax "
       "over all experts"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.weight_apart = true;
               }),
       "router_spec: count=tsallis clashes with score=softmax: it needs probabilities: softmax "
       "over all experts"},
      {changed(counted, [](router_spec& s) { s.count = count_rule::tsallis; }),
       "top_p: p is 0.000000, expected more than 0 and at most 1"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.tsallis_q = 0.0f;
               }),
       "dense_if: q is 0.000000, expected more than 0 and at most 8"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.tsallis_q = 9.0f;
               }),
       "dense_if: q is 9.000000, expected more than 0 and at most 8"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.dense_above = -0.5f;
               }),
       "dense_if: threshold is -0.500000, expected 0 to 1"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::tsallis;
                 s.top_p = 0.5f;
                 s.dense_above = 1.5f;
               }),
       "dense_if: threshold is 1.500000, expected 0 to 1"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::entropy;
                 s.max_k = 3;
                 s.entropy_low = -1.0f;
               }),
       "counted: entropy_low is -1.000000, expected >= 0"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::entropy;
                 s.max_k = 3;
                 s.entropy_high = 0.25f;
               }),
       "counted: entropy_high is 0.250000, expected at least entropy_low = 0.500000"},
      {changed(counted, [](router_spec& s) { s.count = count_rule::entropy; }),
       "counted: max_k is 0, expected 1 to 1048576"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::entropy;
                 s.max_k = 3;
                 s.mid_k = 4;
               }),
       "counted: mid_k is 4, expected 1 to 3"},
      {changed(counted,
               [](router_spec& s) {
                 s.count = count_rule::entropy;
                 s.max_k = 3;
                 s.min_k = 2;
                 s.mid_k = 1;
               }),
       "counted: mid_k is 1, expected 2 to 3"},
      {changed(counted, [](router_spec& s) { s.quantile = -0.5f; }),
       "router_spec: quantile is -0.5, expected 0 to 1"},
      {changed(counted, [](router_spec& s) { s.quantile = 1.5f; }),
       "router_spec: quantile is 1.5, expected 0 to 1"},
      {changed(counted, [](router_spec& s) { s.ratio = -0.5f; }),
       "router_spec: ratio is -0.5, expected 0 to 1"},
      {changed(counted, [](router_spec& s) { s.ratio = 1.5f; }),
       "router_spec: ratio is 1.5, expected 0 to 1"},
      {changed(counted, [](router_spec& s) { s.count_scope = row_scope::batch; }),
       "router_spec: count_scope=batch clashes with count=ratio: only a percentile is taken among "
       "all tokens"},
      {changed(counted, [](router_spec& s) { s.score = score_kind::uniform; }),
       "router_spec: score=uniform clashes with selection=counted: equal scores choose nothing"},
      {changed(top_p, [](router_spec& s) { s.selection_bias = true; }),
       "router_spec: bias=selection clashes with selection=top_p: only top_k and each_group add a "
       "selection bias"},
  };
  for (const auto& [spec, message] : all) CHECK(refused(spec) == "moeroute::" + message);
}

TEST_CASE("what lies at the end of a range, or fits another word, is accepted") {
  using enum selection_kind;
  const std::vector<router_spec> all{
      changed(each_group,
              [](router_spec& s) {
                s.groups = 2;
                s.selection_bias = true;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.groups = 4;
                s.topk_group = 1;
                s.group_fill = 0.0f;
              }),
      changed(top_p, [](router_spec& s) { s.top_p = 1.0f; }),
      changed(top_p,
              [](router_spec& s) {
                s.min_k = 2;
                s.max_k = 2;
              }),
      changed(threshold, [](router_spec& s) { s.score = score_kind::sigmoid; }),
      changed(threshold,
              [](router_spec& s) {
                s.score = score_kind::identity;
                s.row_norm = threshold_norm::rms;
              }),
      changed(product_keys, [](router_spec& s) { s.first_keys = 2; }),
      changed(product_keys, [](router_spec& s) { s.first_keys = 16; }),
      changed(expert_table, [](router_spec& s) { s.score = score_kind::uniform; }),
      changed(random, [](router_spec& s) { s.score = score_kind::uniform; }),
      changed(top_k, [](router_spec& s) { s.softcap = 3.0f; }),
      changed(top_p, [](router_spec& s) { s.softcap = 3.0f; }),
      changed(threshold, [](router_spec& s) { s.softcap = 3.0f; }),
      changed(expert_table, [](router_spec& s) { s.softcap = 3.0f; }),
      changed(each_group, [](router_spec& s) { s.softcap = 3.0f; }),
      changed(counted, [](router_spec& s) { s.softcap = 3.0f; }),
      changed(top_k, [](router_spec& s) { s.temperature = 2.0f; }),
      changed(top_p, [](router_spec& s) { s.temperature = 2.0f; }),
      changed(threshold, [](router_spec& s) { s.temperature = 2.0f; }),
      changed(expert_table, [](router_spec& s) { s.temperature = 2.0f; }),
      changed(each_group, [](router_spec& s) { s.temperature = 2.0f; }),
      changed(counted, [](router_spec& s) { s.temperature = 2.0f; }),
      changed(top_k, [](router_spec& s) { s.divide_by_k = true; }),
      changed(product_keys, [](router_spec& s) { s.divide_by_k = true; }),
      changed(top2, [](router_spec& s) { s.divide_by_k = true; }),
      changed(top_p, [](router_spec& s) { s.divide_by_k = true; }),
      changed(top_k, [](router_spec& s) { s.per_expert_scale = true; }),
      changed(product_keys, [](router_spec& s) { s.per_expert_scale = true; }),
      changed(top2, [](router_spec& s) { s.per_expert_scale = true; }),
      changed(top_p, [](router_spec& s) { s.per_expert_scale = true; }),
      changed(top_k, [](router_spec& s) { s.noise_sigma = 0.0f; }),
      changed(top_k, [](router_spec& s) { s.noise_floor = 0.0f; }),
      changed(top_k, [](router_spec& s) { s.softcap = 0.0f; }),
      changed(top_k, [](router_spec& s) { s.jitter = 0.0f; }),
      changed(top_k, [](router_spec& s) { s.standardize = 0.0f; }),
      changed(top_k, [](router_spec& s) { s.noise = noise_kind::gaussian; }),
      changed(threshold, [](router_spec& s) { s.noise = noise_kind::gaussian; }),
      changed(selective_sinkhorn, [](router_spec& s) { s.noise = noise_kind::gumbel; }),
      changed(top_k, [](router_spec& s) { s.zero_experts = 7; }),
      changed(top_k, [](router_spec& s) { s.explore = 1.0f; }),
      changed(sinkhorn, [](router_spec& s) { s.shares = true; }),
      changed(selective_sinkhorn, [](router_spec& s) { s.shares = true; }),
      changed(each_group, [](router_spec& s) { s.ties = tie_order::higher_id; }),
      changed(counted, [](router_spec& s) { s.weight_apart = true; }),
      changed(each_group, [](router_spec& s) { s.weight_apart = true; }),
      changed(counted, [](router_spec& s) { s.passes = 2; }),
      changed(each_group, [](router_spec& s) { s.passes = 2; }),
      changed(top_k, [](router_spec& s) { s.passes = 2; }),
      changed(counted, [](router_spec& s) { s.standardize = 1.0f; }),
      changed(each_group, [](router_spec& s) { s.standardize = 1.0f; }),
      changed(top_k, [](router_spec& s) { s.standardize = 1.0f; }),
      changed(counted, [](router_spec& s) { s.steering = true; }),
      changed(each_group, [](router_spec& s) { s.steering = true; }),
      changed(top_k, [](router_spec& s) { s.steering = true; }),
      changed(counted, [](router_spec& s) { s.candidates = 4; }),
      changed(each_group, [](router_spec& s) { s.candidates = 4; }),
      changed(top_k, [](router_spec& s) { s.candidates = 4; }),
      changed(counted,
              [](router_spec& s) {
                s.score = score_kind::identity;
                s.second_logits = logit_pairs::sigmoid_sum;
              }),
      changed(each_group,
              [](router_spec& s) {
                s.score = score_kind::identity;
                s.second_logits = logit_pairs::sigmoid_sum;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.score = score_kind::identity;
                s.second_logits = logit_pairs::sigmoid_sum;
              }),
      changed(each_group, [](router_spec& s) { s.second_logits = logit_pairs::weigh; }),
      changed(top_k, [](router_spec& s) { s.candidates = 2; }),
      changed(counted, [](router_spec& s) { s.candidates = 1; }),
      changed(top_k,
              [](router_spec& s) {
                s.gate.kind = gate_kind::mlp;
                s.gate.width = 1;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.gate.kind = gate_kind::low_rank_cosine;
                s.gate.width = 1;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.gate.kind = gate_kind::codebook;
                s.gate.width = 8;
              }),
      changed(top_k, [](router_spec& s) { s.gate.eps = 0.0f; }),
      changed(top_k,
              [](router_spec& s) {
                s.gate_bias = true;
                s.gate.kind = gate_kind::linear;
                s.gate.width = 8;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.gate_bias = true;
                s.gate.kind = gate_kind::rms;
                s.gate.width = 8;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.gate_bias = true;
                s.gate.kind = gate_kind::mlp;
                s.gate.width = 8;
              }),
      changed(top_k,
              [](router_spec& s) {
                s.gate.kind = gate_kind::mixing;
                s.score = score_kind::identity;
                s.gate_bias = true;
              }),
      changed(sinkhorn,
              [](router_spec& s) {
                s.plan.tolerance = 0.0f;
                s.plan.eps = 0.0f;
                s.plan.most_iterations = 1;
              }),
      changed(selective_sinkhorn,
              [](router_spec& s) {
                s.plan.tolerance = 0.0f;
                s.plan.eps = 0.0f;
                s.plan.most_iterations = 1;
              }),
      changed(sinkhorn_expert_choice,
              [](router_spec& s) {
                s.plan.tolerance = 0.0f;
                s.plan.eps = 0.0f;
                s.plan.most_iterations = 1;
              }),
      changed(expert_choice,
              [](router_spec& s) {
                s.normalize = normalization::sum;
                s.eps_where = eps_mode::add;
                s.eps = 1.0f;
                s.scale = 2.0f;
                s.score = score_kind::sigmoid;
              }),
      changed(expert_choice, [](router_spec& s) { s.max_k = 8; }),
      changed(sinkhorn,
              [](router_spec& s) {
                s.scale = 2.0f;
                s.scale_where = scale_place::output;
              }),
      changed(base,
              [](router_spec& s) {
                s.scale = 2.0f;
                s.scale_where = scale_place::output;
              }),
      changed(sparse_transport,
              [](router_spec& s) {
                s.scale = 2.0f;
                s.scale_where = scale_place::output;
              }),
      changed(sinkhorn_expert_choice,
              [](router_spec& s) {
                s.scale = 2.0f;
                s.scale_where = scale_place::output;
              }),
      changed(soft, [](router_spec& s) { s.scale = 2.0f; }),
      changed(sinkhorn, [](router_spec& s) { s.phase = routing_phase::evaluation; }),
      changed(sinkhorn, [](router_spec& s) { s.plan_weights = plan_weights::plan; }),
      changed(sinkhorn_expert_choice, [](router_spec& s) { s.plan_weights = plan_weights::plan; }),
      changed(sparse_transport, [](router_spec& s) { s.plan_weights = plan_weights::plan; }),
      changed(sparse_transport_tokens, [](router_spec& s) { s.plan_weights = plan_weights::plan; }),
      changed(selective_sinkhorn, [](router_spec& s) { s.probability = 0.0f; }),
      changed(selective_sinkhorn, [](router_spec& s) { s.probability = 1.0f; }),
      changed(sparse_transport, [](router_spec& s) { s.plan.most_iterations = 0; }),
      changed(sparse_transport_tokens, [](router_spec& s) { s.plan.most_iterations = 0; }),
      changed(counted,
              [](router_spec& s) {
                s.min_k = 2;
                s.max_k = 2;
              }),
      changed(counted,
              [](router_spec& s) {
                s.count = count_rule::tsallis;
                s.top_p = 0.5f;
                s.tsallis_q = 8.0f;
                s.dense_above = 1.0f;
              }),
      changed(counted,
              [](router_spec& s) {
                s.count = count_rule::tsallis;
                s.top_p = 0.5f;
                s.dense_above = 0.0f;
              }),
      changed(counted,
              [](router_spec& s) {
                s.count = count_rule::entropy;
                s.max_k = 3;
                s.entropy_high = 0.5f;
              }),
      changed(counted,
              [](router_spec& s) {
                s.count = count_rule::entropy;
                s.max_k = 3;
                s.entropy_low = 0.0f;
              }),
      // Nobody reads the k of rules that have none.
      changed(expert_choice, [](router_spec& s) { s.experts = 1; }),
      changed(base, [](router_spec& s) { s.k = 0; }),
      changed(soft, [](router_spec& s) { s.k = 99; }),
      // Where weights are divided before the drop they may have factors.
      changed(top_k,
              [](router_spec& s) {
                s.capacity = 4;
                s.normalize = normalization::lp;
                s.eps_where = eps_mode::add;
                s.scale = 2.0f;
                s.divide_by_k = s.per_expert_scale = true;
              }),
      // Nor what is of groups, or of tokens that experts take, where there are none.
      changed(top_k,
              [](router_spec& s) {
                s.topk_group = 3;
                s.group_fill = 7.0f;
              }),
      changed(base, [](router_spec& s) { s.take.factor = 0.0; }),
      changed(sinkhorn_expert_choice,
              [](router_spec& s) {
                s.phase = routing_phase::evaluation;
                s.plan_weights = plan_weights::plan;
              }),
      changed(counted,
              [](router_spec& s) {
                s.count = count_rule::tsallis;
                s.top_p = 0.5f;
                s.tsallis_q = 0.5f;
              }),
      changed(counted, [](router_spec& s) { s.quantile = 0.0f; }),
      changed(counted, [](router_spec& s) { s.quantile = 1.0f; }),
      changed(counted, [](router_spec& s) { s.ratio = 0.0f; }),
      changed(counted, [](router_spec& s) { s.ratio = 1.0f; }),
      changed(counted,
              [](router_spec& s) {
                s.count_scope = row_scope::batch;
                s.count = count_rule::percentile;
              }),
  };
  for (const router_spec& spec : all) {
    INFO(to_string(spec));
    CHECK(refused(spec) == "accepted");
  }
}

TEST_CASE("each word that is rare is rare alone, and rules of the batch are told apart") {
  using enum selection_kind;
  const auto top = [](void (*change)(router_spec&)) { return changed(top_k, change); };
  for (const router_spec& s : {
           changed(each_group, [](router_spec&) {}),
           changed(counted, [](router_spec&) {}),
           top([](router_spec& s) { s.ties = tie_order::higher_id; }),
           top([](router_spec& s) { s.class_bias = true; }),
           top([](router_spec& s) { s.weight_apart = true; }),
           top([](router_spec& s) { s.second_logits = logit_pairs::weigh; }),
           top([](router_spec& s) { s.passes = 2; }),
           top([](router_spec& s) { s.standardize = 1.0f; }),
           top([](router_spec& s) { s.steering = true; }),
           top([](router_spec& s) { s.candidates = 4; }),
           top([](router_spec& s) {
             s.domain = score_domain::selected;
             s.score = score_kind::sigmoid;
             s.selection_bias = true;
           }),
           top([](router_spec& s) {
             s.domain = score_domain::selected;
             s.score = score_kind::sigmoid;
             s.groups = 4;
           }),
           changed(product_keys, [](router_spec& s) { s.domain = score_domain::all; }),
       }) {
    INFO(to_string(s));
    CHECK(s.has_rare_rule());
    CHECK(s.has_rare_words());
    CHECK_FALSE(s.sees_batch());
  }
  CHECK_FALSE(top([](router_spec& s) {
                s.count = count_rule::percentile;
                s.count_scope = row_scope::batch;
              }).sees_batch());
  const router_spec explores = top([](router_spec& s) { s.explore = 0.5f; });
  CHECK(explores.has_rare_words());
  CHECK_FALSE(explores.has_rare_rule());
  for (const router_spec& s : {
           router_spec{},
           top([](router_spec& s) {
             s.domain = score_domain::selected;
             s.selection_bias = true;
             s.groups = 4;
           }),
           top([](router_spec& s) {
             s.domain = score_domain::selected;
             s.score = score_kind::sigmoid;
           }),
           changed(product_keys, [](router_spec& s) { s.domain = score_domain::selected; }),
           changed(counted,
                   [](router_spec& s) {
                     s.count = count_rule::percentile;
                     s.count_scope = row_scope::batch;
                   }),
       }) {
    INFO(to_string(s));
    CHECK_FALSE(s.has_rare_words());
  }
  for (const selection_kind kind :
       {expert_choice, sinkhorn, selective_sinkhorn, sinkhorn_expert_choice, base, sparse_transport,
        sparse_transport_tokens})
    CHECK(plain_spec(kind).sees_batch());
  for (const selection_kind kind : {top_k, top_p, threshold, random, each_group, counted, soft})
    CHECK_FALSE(plain_spec(kind).sees_batch());
  CHECK_FALSE(
      changed(counted, [](router_spec& s) { s.count_scope = row_scope::batch; }).sees_batch());
  CHECK_FALSE(
      changed(counted, [](router_spec& s) { s.count = count_rule::percentile; }).sees_batch());
}

TEST_CASE("a description says how many columns its logits have") {
  using enum selection_kind;
  CHECK(router_spec{}.columns() == 8);
  CHECK(router_spec{.passes = 3}.columns() == 24);
  CHECK(router_spec{.second_logits = logit_pairs::weigh}.columns() == 16);
  CHECK(router_spec{.second_logits = logit_pairs::sigmoid_sum, .passes = 3}.columns() == 16);
  CHECK(router_spec{.selection = soft, .passes = 3, .slots_per_expert = 5}.columns() == 40);
  CHECK(router_spec{.experts = 16, .selection = product_keys}.columns() == 8);
  CHECK(router_spec{.experts = 16, .selection = product_keys, .first_keys = 2}.columns() == 10);
  CHECK(router_spec{.experts = 1, .selection = product_keys}.columns() == 2);
  CHECK(router_spec{.experts = 17, .selection = product_keys}.columns() == 10);
}

TEST_CASE("eps goes to the stage that drops only where it divides there, and clamps") {
  const auto capacity = [](bool before, normalization n, eps_mode mode) {
    return capacity_of({.normalize = n,
                        .eps_where = mode,
                        .eps = 0.25f,
                        .capacity = 3,
                        .normalize_before_drop = before});
  };
  using enum normalization;
  CHECK(capacity(false, sum, eps_mode::clamp).eps == 0.25f);
  CHECK(capacity(false, sum, eps_mode::none).eps == 0.0f);
  CHECK(capacity(true, sum, eps_mode::clamp).eps == 0.0f);
  CHECK(capacity(true, sum, eps_mode::clamp).renormalize == renormalization::none);
  CHECK(capacity(false, none, eps_mode::clamp).eps == 0.0f);
  CHECK(capacity(false, none, eps_mode::clamp).renormalize == renormalization::none);
  CHECK(capacity(false, sum, eps_mode::none).renormalize == renormalization::after_drop);
  CHECK(capacity(false, sum, eps_mode::none).rule.capacity(100, 8, 2) == 3);
}

TEST_CASE(
    "every rule of the batch refuses what is of rows, and so does a percentile of the batch") {
  using enum selection_kind;
  const auto clash_of = [](router_spec s, const std::string& first, const std::string& why) {
    CHECK(refused(s) == "moeroute::router_spec: " + first + " clashes with selection=" +
                            std::string(to_string(s.selection)) + ": " + why);
  };
  std::vector<router_spec> all;
  for (const selection_kind kind :
       {expert_choice, sinkhorn, selective_sinkhorn, sinkhorn_expert_choice, base, sparse_transport,
        sparse_transport_tokens, soft})
    all.push_back(changed(kind, [](router_spec&) {}));
  all.push_back(changed(counted, [](router_spec& s) {
    s.count = count_rule::percentile;
    s.count_scope = row_scope::batch;
  }));
  for (const router_spec& plain : all) {
    INFO(to_string(plain));
    CHECK(refused(plain) == "accepted");
    router_spec s = plain;
    s.domain = score_domain::selected;
    clash_of(s, "score_domain=selected", "it scores every expert");
    for (bool router_spec::* flag : {&router_spec::divide_by_k, &router_spec::per_expert_scale}) {
      s = plain;
      s.*flag = true;
      clash_of(s, "per_expert_scale or post_divide_by_k", "its weights are its own");
    }
    s = plain;
    s.softcap = 3.0f;
    clash_of(s, "logit_softcap or temperature", "it takes logits as they are");
    s = plain;
    s.temperature = 2.0f;
    clash_of(s, "logit_softcap or temperature", "it takes logits as they are");
    s = plain;
    s.steering = true;
    clash_of(s, "steering", "only top_k, each_group and counted have steps before them");
    s = plain;
    s.noise = noise_kind::gumbel;
    if (s.selection == selective_sinkhorn)
      CHECK(refused(s) == "accepted");
    else
      clash_of(s, "noise=gumbel", "it takes logits as they are");
  }
}
