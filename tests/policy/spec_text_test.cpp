#include <moeroute/policy/spec_text.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/policy/catalog.hpp>
#include <string>
#include <vector>

#include "support/refusal.hpp"

using namespace moeroute;

namespace {

std::string refused_text(const std::string& text) {
  return test::refusal([&] { (void)parse_spec(text); });
}

bool advises(const router_spec& s, const std::string& words) {
  for (const std::string& sentence : advice(s))
    if (sentence.find(words) != std::string::npos) return true;
  return false;
}

}  // namespace

TEST_CASE(
    "what a spec prints is parsed to what prints the same, for every router of the catalogue") {
  for (const catalog_entry& entry : catalog) {
    INFO(entry.name);
    // The place of a scale of 1 is not printed: it is nowhere.
    CHECK(to_string(parse_spec(to_string(entry.spec))) == to_string(entry.spec));
  }
}

TEST_CASE("every word that a spec can print is parsed") {
  const std::vector<router_spec> specs{
      {.experts = 16,
       .k = 4,
       .score = score_kind::sigmoid,
       .selection_bias = true,
       .groups = 4,
       .topk_group = 2,
       .group_score = group_score::top_sum,
       .group_fill = 0.0f,
       .lost_weight = lost_weight::zero,
       .normalize = normalization::lp,
       .lp_p = 2.5f,
       .eps_where = eps_mode::clamp,
       .eps = 1e-7f,
       .scale = 2.826f,
       .scale_where = scale_place::output,
       .divide_by_k = true,
       .output_scale = 3.5f,
       .per_expert_scale = true,
       .gate_bias = true,
       .softcap = 30.0f,
       .temperature = 0.7f,
       .zero_experts = 2,
       .shared_experts = 1,
       .weight_on = weight_place::input},
      {.experts = 16,
       .k = 4,
       .selection = selection_kind::top_p,
       .top_p = 0.7f,
       .crossing = crossing::include_strict,
       .min_k = 2,
       .max_k = 8},
      {.experts = 16,
       .k = 4,
       .score = score_kind::relu,
       .selection = selection_kind::threshold,
       .threshold = 0.125f,
       .row_norm = threshold_norm::rms},
      {.experts = 16,
       .k = 4,
       .normalize = normalization::sum,
       .capacity = 40,
       .drop_order = drop_order::by_weight,
       .normalize_before_drop = false},
      {.experts = 16, .k = 2, .selection = selection_kind::sparsemixer, .jitter = 0.25f},
      {.experts = 16,
       .k = 2,
       .gate = {.kind = gate_kind::cosine, .d = 64, .temperature = 0.07f},
       .explore = 0.1f,
       .explore_scope = row_scope::batch},
      {.gate = {.kind = gate_kind::low_rank_cosine, .width = 4, .temperature = 0.25f}},
      {.gate_bias = true, .gate = {.kind = gate_kind::rms, .scale = 0.125f, .eps = 1e-5f}},
      {.gate_bias = true,
       .gate = {.kind = gate_kind::mlp, .width = 32, .activation = gate_activation::silu}},
      {.gate = {.kind = gate_kind::codebook, .width = 24}},
      {.score = score_kind::identity, .gate = {.kind = gate_kind::mixing, .temperature = 2.0f}},
      {.gate = {.kind = gate_kind::none}},
      {.selection = selection_kind::sinkhorn, .shares = true},
      {.experts = 16, .k = 2, .score = score_kind::uniform, .selection = selection_kind::random},
  };
  for (const router_spec& s : specs) {
    INFO(to_string(s));
    CHECK(parse_spec(to_string(s)) == s);
  }
  CHECK(parse_spec("  k=2   E=8 score=softmax ") == router_spec{});
}

TEST_CASE("a word that says what is so anyway is not printed, another is") {
  for (const char* const text :
       {"E=8 k=2 selection=sinkhorn", "E=8 k=2 selection=selective_sinkhorn probability=0.5",
        "E=8 k=1 selection=base", "E=8 k=2 passes=2", "E=8 k=2 selection=top_p p=0.5"}) {
    const std::string printed = to_string(parse_spec(text));
    INFO(printed);
    for (const char* const word : {"phase", "pass_rule", "pass_lambda", "crossing", "min_k",
                                   "plan_", "second", "table_key", "noise"})
      CHECK(printed.find(word) == std::string::npos);
  }
  for (const char* const text :
       {"E=8 k=2 passes=3 pass_lambda=0.5", "E=8 k=2 selection=sinkhorn phase=evaluation"}) {
    const std::string printed = to_string(parse_spec(text));
    INFO(printed);
    CHECK(printed.find(std::string(text).substr(std::string(text).rfind(' '))) !=
          std::string::npos);
  }
}

TEST_CASE("a word that is unknown, wrong, repeated or missing is named") {
  CHECK(refused_text("E=8 k=2 router=fast") ==
        "moeroute::parse_spec: 'router=fast', expected a word of docs/models.md");
  CHECK(refused_text("E=8 k=two") == "moeroute::parse_spec: 'k=two', expected a whole number");
  CHECK(refused_text("E=8 k=2 k=3") == "moeroute::parse_spec: 'k=3', expected it once");
  CHECK(refused_text("E=8") == "moeroute::parse_spec: 'k' is missing");
  CHECK(refused_text("") == "moeroute::parse_spec: 'E' is missing");
  CHECK(refused_text("E=8 k=2 score=tanh") ==
        "moeroute::parse_spec: 'score=tanh', expected softmax, sigmoid, sqrtsoftplus, relu, "
        "identity, uniform, softplus");
  CHECK(refused_text("E=8 k=2 gate_bias=1") ==
        "moeroute::parse_spec: 'gate_bias=1', expected the word alone");
  CHECK(refused_text("E=8 k=2 scale=2.5x") ==
        "moeroute::parse_spec: 'scale=2.5x', expected a number");
  CHECK(refused_text("E=8 k=2 gate=convolution") ==
        "moeroute::parse_spec: 'gate=convolution', expected linear, cosine, low_rank_cosine, rms, "
        "mlp, codebook, mixing, none");
  CHECK(refused_text("E=8 k=2 gate=codebook gate_width=7") ==
        "moeroute::router_spec: gate_width is 7, expected 8 to 2147483648");
  CHECK(refused_text("E=8 k=2 gate=mlp") ==
        "moeroute::router_spec: gate_width is 0, expected 1 to 2147483648");
  CHECK(refused_text("E=8 k=2 gate=cosine gate_temperature=0") ==
        "moeroute::router_spec: gate_temperature is 0, expected > 0");
  CHECK(refused_text("E=8 k=2 gate=cosine gate_bias") ==
        "moeroute::router_spec: gate_bias clashes with gate=cosine: it has none");
  CHECK(refused_text("E=8 k=2 gate=mixing") ==
        "moeroute::router_spec: gate=mixing clashes with score=softmax: its columns are "
        "probabilities: score=identity");
  CHECK(refused_text("E=8 k=2 explore=1.5") ==
        "moeroute::router_spec: explore is 1.5, expected 0 to 1");
  CHECK(refused_text("E=8 k=2 explore=0.5 ties=higher_id") ==
        "moeroute::router_spec: explore clashes with selection=top_k: only a common top_k "
        "explores");
  for (const std::string rule :
       {"top_p p=0.5", "threshold threshold=0 score=relu", "hash_table", "product_keys E=16",
        "sparsemixer", "top2_second_by_logit", "random score=uniform", "each_group groups=2",
        "counted", "expert_choice", "sinkhorn", "base k=1", "sparse_transport", "soft"}) {
    const std::string name = rule.substr(0, rule.find(' '));
    const std::string line = (rule.find("E=") == rule.npos ? "E=8 " : "") +
                             std::string(rule.find("k=") == rule.npos ? "k=2 " : "") +
                             "explore=0.5 selection=" + rule;
    INFO(line);
    CHECK(refused_text(line) == "moeroute::router_spec: explore clashes with selection=" + name +
                                    ": only a common top_k explores");
  }
  CHECK(refused_text("E=8 k=2 shares") ==
        "moeroute::router_spec: shares clashes with selection=top_k: only sinkhorn and "
        "selective_sinkhorn have shares per expert");
  // What means nothing here is taken and not printed.
  CHECK(to_string(parse_spec("E=8 k=2 gate_eps=1 gate_width=9 gate_activation=tanh "
                             "explore_scope=batch")) == "E=8 k=2 score=softmax");
  CHECK(refused_text("E=8 k=9").find("k is 9, expected 1 to 8") != std::string::npos);
}

TEST_CASE(
    "advice names what is legal and strange, and says nothing of published routers but of biases "
    "on softmax and drops") {
  CHECK(advice({}).empty());
  CHECK(advises({.k = 1, .normalize = normalization::sum}, "the gate has no gradient"));
  CHECK(advises({.k = 1, .domain = score_domain::selected}, "the gate has no gradient"));
  CHECK_FALSE(advises({.k = 1}, "the gate has no gradient"));
  CHECK(advises({.experts = 4, .k = 4}, "nothing is chosen"));
  CHECK(advises({.groups = 4, .topk_group = 4}, "the limit does nothing"));
  CHECK(advises({.score = score_kind::sigmoid,
                 .selection_bias = true,
                 .groups = 4,
                 .topk_group = 2,
                 .group_fill = 0.0f},
                "an expert of a lost group"));
  CHECK(advises({.experts = 256, .selection_bias = true}, "0.00390625"));
  CHECK(advises({.score = score_kind::identity, .normalize = normalization::sum}, "may vanish"));
  CHECK(advises({.normalize = normalization::sum, .eps_where = eps_mode::add, .eps = 0.01f},
                "is added to the divisor"));
  CHECK(advises({.softcap = 0.5f}, "nearly equal scores"));
  CHECK(advises({.score = score_kind::sigmoid, .selection = selection_kind::threshold},
                "every expert through"));
  CHECK(advises({.selection = selection_kind::top_p, .top_p = 0.7f}, "without max_k"));
  CHECK(advises({.normalize = normalization::sum, .capacity = 4}, "before the drop"));
  const auto of = [](const std::string& text, const std::string& words) {
    INFO(text);
    CHECK(advises(parse_spec(text), words));
  };
  of("E=8 k=1 weight_score=softmax weight_domain=selected score=sigmoid",
     "the gate has no gradient");
  of("E=8 k=2 explore=1", "the router chooses nothing");
  of("E=8 k=2 candidates=2", "the lot decides");
  of("E=8 k=2 noise=gumbel", "in every call");
  of("E=8 k=2 selection=counted count=ratio score=identity max_k=4", "below 0");
  of("E=8 k=2 selection=counted count=percentile", "without max_k");
  of("E=8 selection=expert_choice", "tokens behind it");
  of("E=8 k=2 selection=sinkhorn", "phase=evaluation");
  of("E=8 k=2 selection=sinkhorn plan_temperature=0.1", "plan_eps outweighs");
  of("E=8 k=2 gate=cosine", "nearly equal scores");
  of("E=8 k=2 gate=low_rank_cosine gate_d=16 gate_width=16 gate_temperature=0.1", "no lower rank");
  of("E=8 k=2 gate=mixing score=identity", "tokens behind it");
  of("E=8 k=2 selection=hash_table score=uniform gate=rms", "nobody reads");
  CHECK(advice(parse_spec("E=8 k=2 gate=cosine gate_temperature=0.07 explore=0.1")).empty());
  CHECK(advice(parse_spec("E=8 k=2 selection=sinkhorn phase=evaluation")).empty());
  for (const catalog_entry& entry : catalog)
    for (const std::string& sentence : advice(entry.spec)) {
      INFO(entry.name << ": " << sentence);
      CHECK((sentence.starts_with("bias=selection on softmax") ||
             sentence.find("before the drop") != std::string::npos));
    }
}

TEST_CASE("advice is given where its sentence is true, and one step before it is silent") {
  for (const char* text :
       {"E=8 k=2 groups=4 topk_group=3",
        "E=4 k=4 selection=hash_table",
        "E=8 k=1 selection=hash_table normalize=sum",
        "E=8 k=2 score=sigmoid groups=4 topk_group=2 group_fill=0",
        "E=8 k=2 score=sigmoid bias=selection groups=4 topk_group=2",
        "E=8 k=2 score=sigmoid bias=selection group_fill=0",
        "E=8 k=2 score=identity",
        "E=8 k=2 normalize=sum eps=0.0005 eps_mode=add",
        "E=8 k=2 normalize=sum eps=0.5 eps_mode=clamp",
        "E=8 k=2 logit_softcap=1",
        "E=8 k=2 logit_softcap=30",
        "E=8 k=2 score=sigmoid selection=threshold threshold=0.1",
        "E=8 k=2 score=relu selection=threshold threshold=-1",
        "E=8 k=2 selection=top_p p=0.5 max_k=3",
        "E=8 k=2 capacity=4",
        "E=8 k=2 normalize=sum capacity=4 norm_before_drop=false",
        "E=8 k=2 explore=0.5",
        "E=8 k=2 candidates=3",
        "E=8 k=2 selection=counted count=ratio max_k=4",
        "E=8 k=2 selection=counted count=percentile score=identity max_k=4",
        "E=8 k=2 selection=counted count=tsallis p=0.5",
        "E=8 k=2 selection=sinkhorn phase=evaluation plan_temperature=0.25",
        "E=8 k=2 selection=sinkhorn phase=evaluation plan_temperature=0.1 plan_domain=logarithm",
        "E=8 k=2 selection=sinkhorn phase=evaluation plan_temperature=0.1 plan_similarity=softmax",
        "E=8 k=2 gate=cosine gate_temperature=0.5",
        "E=8 k=2 score=sigmoid gate=cosine",
        "E=8 k=2 gate=low_rank_cosine gate_width=16 gate_temperature=0.1",
        "E=8 k=2 gate=low_rank_cosine gate_d=17 gate_width=16 gate_temperature=0.1",
        "E=8 k=2 selection=hash_table score=uniform gate=none",
        "E=8 k=2 selection=hash_table score=uniform",
        "E=8 k=2 gate=rms"}) {
    INFO(text);
    CHECK(advice(parse_spec(text)).empty());
  }
  for (const auto& [text, words] :
       {std::pair{"E=8 k=1 selection=each_group normalize=sum", "the gate has no gradient"},
        {"E=8 k=2 normalize=sum eps=0.001 eps_mode=add", "is added to the divisor"},
        {"E=8 k=2 score=sigmoid selection=threshold threshold=-1", "every expert through"},
        {"E=8 k=2 score_domain=selected capacity=4", "before the drop"},
        {"E=8 selection=sinkhorn_expert_choice", "tokens behind it"},
        {"E=8 selection=sparse_transport", "tokens behind it"},
        {"E=8 k=1 selection=counted count=percentile count_scope=batch max_k=4",
         "tokens behind it"},
        {"E=8 selection=base", "phase=evaluation"},
        {"E=8 selection=selective_sinkhorn k=2 plan_domain=logarithm", "phase=evaluation"},
        {"E=8 k=2 gate=cosine gate_temperature=0.625", "nearly equal scores"}}) {
    INFO(text);
    CHECK(advises(parse_spec(text), words));
  }
  // Without eps the sentence ends before it.
  const router_spec cold =
      parse_spec("E=8 k=2 selection=sinkhorn phase=evaluation plan_temperature=0.1 plan_eps=0");
  CHECK(advises(cold, "counts as 0; plan_domain=logarithm has neither limit"));
  CHECK_FALSE(advises(cold, "plan_eps"));
  CHECK(advice(parse_spec("E=8 k=1 weight_score=sigmoid score_domain=selected")).empty());
}
