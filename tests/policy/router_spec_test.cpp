#include <moeroute/policy/router_spec.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/policy/catalog.hpp>
#include <set>
#include <string>

#include "support/refusal.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

std::string refused(const router_spec& s) {
  return test::refusal([&] { check(s); });
}

// The sentence names both fields.
void clashes(const router_spec& s, const std::string& one, const std::string& other) {
  const std::string sentence = refused(s);
  INFO(sentence);
  CHECK(sentence.find(" clashes with ") != std::string::npos);
  CHECK(sentence.find(one) != std::string::npos);
  CHECK(sentence.find(other) != std::string::npos);
}

}  // namespace

TEST_CASE("the plain spec and every spec of the catalogue are accepted") {
  CHECK(refused({}) == "accepted");
  for (const catalog_entry& entry : catalog) {
    INFO(entry.name);
    CHECK(refused(entry.spec) == "accepted");
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
  CHECK(refused({.groups = 4, .topk_group = 1, .group_fill = 1.0f}).find("expected -inf or 0") !=
        std::string::npos);
  CHECK(refused({.zero_experts = 8}) ==
        "moeroute::router_spec: zero_experts is 8, expected 0 to 7");
  CHECK(refused({.capacity = -1}).find("capacity is -1, expected 0") != std::string::npos);
}

TEST_CASE("numbers outside their domain are refused by name") {
  CHECK(refused({.normalize = normalization::sum, .eps_where = eps_mode::add, .eps = -1e-3f}) ==
        "moeroute::router_spec: eps is -0.00100000005, expected >= 0");
  CHECK(refused({.softcap = -2.0f}) == "moeroute::router_spec: logit_softcap is -2, expected >= 0");
  CHECK(refused({.temperature = 0.0f}) == "moeroute::router_spec: temperature is 0, expected > 0");
  CHECK(refused({.temperature = test::not_a_number}).find("temperature is nan") !=
        std::string::npos);
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

TEST_CASE("fields that clash are both named") {
  clashes({.selection = selection_kind::sparsemixer, .groups = 4, .topk_group = 2}, "groups=4",
          "selection=sparsemixer");
  clashes({.selection = selection_kind::expert_table, .selection_bias = true}, "bias=selection",
          "selection=hash_table");
  clashes({.normalize = normalization::sum, .lp_p = 2.0f}, "lp_p=2", "normalize");
  clashes({.score = score_kind::sigmoid, .selection = selection_kind::top_p, .top_p = 0.5f},
          "selection=top_p", "score=sigmoid");
  clashes({.top_p = 0.5f}, "p=0.5", "selection=top_k");
  clashes({.score = score_kind::softmax, .selection = selection_kind::threshold},
          "selection=threshold", "score=softmax");
  clashes({.score = score_kind::relu,
           .selection = selection_kind::threshold,
           .normalize = normalization::sum},
          "selection=threshold", "normalize");
  clashes({.row_norm = threshold_norm::rms}, "row_norm", "selection=top_k");
  clashes({.selection = selection_kind::sparsemixer, .scale = 2.0f}, "selection=sparsemixer",
          "scale");
  clashes({.score = score_kind::sigmoid, .selection = selection_kind::top2},
          "selection=top2_second_by_logit", "score=sigmoid");
  clashes({.experts = 16, .score = score_kind::sigmoid, .selection = selection_kind::product_keys},
          "selection=product_keys", "score=sigmoid");
  clashes({.score = score_kind::uniform}, "score=uniform", "selection=top_k");
  clashes({.drop_order = drop_order::batch_priority}, "drop_order=batch_priority_slot_major",
          "capacity=0");
  clashes({.normalize = normalization::lp, .capacity = 4, .normalize_before_drop = false},
          "norm_before_drop=false", "normalize=lp");
  clashes({.normalize = normalization::sum,
           .scale = 2.0f,
           .capacity = 4,
           .normalize_before_drop = false},
          "norm_before_drop=false", "scale");
}

TEST_CASE("eps where nothing is normalised is inert, and accepted") {
  CHECK(test::refusal([] { check({.eps_where = eps_mode::add, .eps = 1e-20f}); }) == "accepted");
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
