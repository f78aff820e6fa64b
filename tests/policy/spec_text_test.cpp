#include <moeroute/policy/spec_text.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstddef>
#include <iterator>
#include <moeroute/policy/catalog.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"

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

// Every field that is read beside another one only is set; the words that switch them on are not.
router_spec dependent_fields(selection_kind selection) {
  router_spec s = plain_spec(selection);
  s.topk_group = 2;
  s.group_score = group_score::sum;
  s.group_fill = 0.0f;
  s.lost_weight = lost_weight::own;
  s.lp_p = 3.0f;
  s.eps_where = eps_mode::add;
  s.eps = 0.5f;
  s.scale_where = scale_place::output;
  s.gate.width = 7;
  s.gate.activation = gate_activation::tanh;
  s.gate.temperature = 2.0f;
  s.gate.scale = 3.0f;
  s.gate.eps = 0.25f;
  s.pass_rule = pass_rule::ratio;
  s.pass_lambda = 4.0f;
  s.candidate_scope = row_scope::batch;
  s.explore_scope = row_scope::batch;
  s.noise_sigma = 5.0f;
  s.noise_floor = 6.0f;
  s.weight_domain = score_domain::selected;
  s.jitter = 0.125f;
  s.second = second_expert::random;
  s.table_key = table_key::bigram;
  s.first_keys = 9;
  s.count = count_rule::percentile;
  s.quantile = 0.75f;
  s.count_scope = row_scope::batch;
  s.ratio = 0.25f;
  s.entropy_low = 1.0f;
  s.entropy_high = 2.0f;
  s.mid_k = 3;
  s.tsallis_q = 2.0f;
  s.dense_above = 0.5f;
  s.top_p = 0.625f;
  s.crossing = crossing::exclude;
  s.min_k = 4;
  s.max_k = 5;
  s.threshold = 0.375f;
  s.take = {1.5, capacity_rounding::down, 2, 3, 0};
  s.sequence = 10;
  s.phase = routing_phase::evaluation;
  s.probability = 0.0625f;
  s.plan_weights = plan_weights::plan;
  s.plan.mass = s.plan.mass == plan_mass::one ? plan_mass::tokens : plan_mass::one;
  s.plan.order = s.plan.order == scaling_order::rows_then_columns
                     ? scaling_order::columns_then_rows
                     : scaling_order::rows_then_columns;
  s.plan.stop = s.plan.stop == sinkhorn_stop::mean_change ? sinkhorn_stop::column_error
                                                          : sinkhorn_stop::mean_change;
  s.plan.domain = sinkhorn_domain::logarithm;
  s.plan.similarity = plan_similarity::softmax;
  s.plan.temperature = 1.25f;
  s.plan.eps = 0.5f;
  s.plan.tolerance = 0.75f;
  s.plan.most_iterations = 11;
  s.support = 12;
  s.plan_gamma = 13.0f;
  s.plan_rate = 14.0f;
  s.solver = assignment_solver::optimal;
  s.rounds = 15;
  s.slots_per_expert = 16;
  s.slot_logits = soft_logits::product;
  s.drop_order = drop_order::token_major;
  s.normalize_before_drop = false;
  return s;
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
  CHECK(parse_spec("E=8 k=2 bias=none") == router_spec{});
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

TEST_CASE("a field that nothing reads is not printed, and one that is read is") {
  // Of every selection in turn.
  const char* const alone[] = {
      "k=2 score=softmax",
      "k=2 score=softmax selection=top_p p=0.625 crossing=exclude min_k=4 max_k=5",
      "k=2 score=softmax selection=threshold threshold=0.375",
      "k=2 score=softmax selection=hash_table table_key=bigram",
      "k=2 score=softmax selection=product_keys first_keys=9",
      "k=2 score=softmax selection=sparsemixer jitter_eps=0.125",
      "k=2 score=softmax selection=top2_second_by_logit second=random",
      "k=2 score=softmax selection=random",
      "k=2 score=softmax selection=each_group",
      "k=2 score=softmax selection=counted count=percentile quantile=0.75 count_scope=batch "
      "min_k=4 max_k=5",
      "score=softmax selection=expert_choice max_k=5 take_factor=1.5 take_rounding=down "
      "take_multiple=2 take_at_least=3 sequence=10",
      "k=2 score=softmax selection=sinkhorn phase=evaluation plan_weights=plan plan_mass=tokens "
      "plan_order=columns_then_rows plan_domain=logarithm plan_stop=column_error "
      "plan_similarity=softmax plan_temperature=1.25 plan_eps=0.5 plan_tolerance=0.75 "
      "plan_iterations=11",
      "k=2 score=softmax selection=selective_sinkhorn phase=evaluation probability=0.0625 "
      "plan_mass=one plan_order=rows_then_columns plan_domain=logarithm plan_stop=mean_change "
      "plan_similarity=softmax plan_temperature=1.25 plan_eps=0.5 plan_tolerance=0.75 "
      "plan_iterations=11",
      "score=softmax selection=sinkhorn_expert_choice take_factor=1.5 take_rounding=down "
      "take_multiple=2 take_at_least=3 plan_weights=plan plan_mass=tokens "
      "plan_order=columns_then_rows plan_domain=logarithm plan_stop=column_error "
      "plan_similarity=softmax plan_temperature=1.25 plan_eps=0.5 plan_tolerance=0.75 "
      "plan_iterations=11",
      "score=softmax selection=base phase=evaluation solver=optimal rounds=15",
      "score=softmax selection=sparse_transport take_factor=1.5 take_rounding=down take_multiple=2 "
      "take_at_least=3 plan_weights=plan plan_iterations=11 support=12 plan_gamma=13 plan_rate=14",
      "k=2 score=softmax selection=sparse_transport_tokens take_factor=1.5 take_rounding=down "
      "take_multiple=2 take_at_least=3 plan_weights=plan plan_iterations=11 support=12 "
      "plan_gamma=13 plan_rate=14",
      "score=softmax selection=soft slots_per_expert=16 slot_logits=product",
  };
  for (std::size_t i = 0; i < std::size(alone); ++i)
    CHECK(to_string(dependent_fields(static_cast<selection_kind>(i))) ==
          "E=8 " + std::string(alone[i]));
  CHECK(std::size(alone) == static_cast<std::size_t>(selection_kind::soft) + 1);
  // And beside each word that switches some of them on.
  using enum selection_kind;
  struct switched {
    selection_kind selection;
    void (*on)(router_spec&);
    const char* printed;
  };
  const switched beside[] = {
      {top_k, [](router_spec& s) { s.groups = 4; },
       "k=2 score=softmax groups=4 topk_group=2 group_score=sum group_fill=0 lost_weight=own"},
      {each_group, [](router_spec& s) { s.groups = 4; },
       "k=2 score=softmax selection=each_group groups=4"},
      {top_k, [](router_spec& s) { s.normalize = normalization::sum; },
       "k=2 score=softmax normalize=sum eps=0.5 eps_mode=add"},
      {top_k, [](router_spec& s) { s.normalize = normalization::lp; },
       "k=2 score=softmax normalize=lp lp_p=3 eps=0.5 eps_mode=add"},
      {threshold, [](router_spec& s) { s.row_norm = threshold_norm::sum; },
       "k=2 score=softmax selection=threshold eps=0.5 threshold=0.375 row_norm=sum"},
      {expert_choice, [](router_spec& s) { s.normalize = normalization::sum, s.take.fixed = 17; },
       "score=softmax selection=expert_choice normalize=sum eps=0.5 max_k=5 take=17 sequence=10"},
      // A factor that no float is, where it is read and where it is not.
      {expert_choice, [](router_spec& s) { s.take = {.factor = 1.1}; },
       "score=softmax selection=expert_choice max_k=5 take_factor=1.1000000000000001 sequence=10"},
      {expert_choice, [](router_spec& s) { s.take = {.factor = static_cast<double>(1.1f)}; },
       "score=softmax selection=expert_choice max_k=5 take_factor=1.10000002 sequence=10"},
      {expert_choice, [](router_spec& s) { s.take = {.factor = 1.1, .fixed = 17}; },
       "score=softmax selection=expert_choice max_k=5 take=17 sequence=10"},
      {top_k, [](router_spec& s) { s.scale = 18.0f; },
       "k=2 score=softmax scale=18 scale_where=output"},
      {top_k, [](router_spec& s) { s.gate.kind = gate_kind::cosine; },
       "k=2 score=softmax gate=cosine gate_temperature=2"},
      {top_k, [](router_spec& s) { s.gate.kind = gate_kind::low_rank_cosine; },
       "k=2 score=softmax gate=low_rank_cosine gate_width=7 gate_temperature=2"},
      {top_k, [](router_spec& s) { s.gate.kind = gate_kind::rms; },
       "k=2 score=softmax gate=rms gate_scale=3 gate_eps=0.25"},
      {top_k, [](router_spec& s) { s.gate.kind = gate_kind::mlp; },
       "k=2 score=softmax gate=mlp gate_width=7 gate_activation=tanh"},
      {top_k, [](router_spec& s) { s.gate.kind = gate_kind::codebook; },
       "k=2 score=softmax gate=codebook gate_width=7"},
      {top_k, [](router_spec& s) { s.gate.kind = gate_kind::mixing; },
       "k=2 score=softmax gate=mixing gate_temperature=2"},
      {top_k, [](router_spec& s) { s.passes = 3; }, "k=2 score=softmax passes=3 pass_rule=ratio"},
      {top_k, [](router_spec& s) { s.passes = 3, s.pass_rule = pass_rule::bound; },
       "k=2 score=softmax passes=3 pass_lambda=4"},
      {top_k, [](router_spec& s) { s.pass_rule = pass_rule::bound; }, "k=2 score=softmax"},
      {top_k, [](router_spec& s) { s.row_norm = threshold_norm::sum; }, "k=2 score=softmax"},
      {top_k, [](router_spec& s) { s.take.fixed = 17; }, "k=2 score=softmax"},
      {top_k, [](router_spec& s) { s.count = count_rule::ratio; }, "k=2 score=softmax"},
      {top_k, [](router_spec& s) { s.count = count_rule::entropy; }, "k=2 score=softmax"},
      {top_k, [](router_spec& s) { s.count = count_rule::tsallis; }, "k=2 score=softmax"},
      {top_k, [](router_spec& s) { s.candidates = 6; },
       "k=2 score=softmax candidates=6 candidate_scope=batch"},
      {top_k, [](router_spec& s) { s.explore = 0.5f; },
       "k=2 score=softmax explore=0.5 explore_scope=batch"},
      {top_k, [](router_spec& s) { s.noise = noise_kind::gumbel; },
       "k=2 score=softmax noise=gumbel noise_sigma=5 noise_floor=6"},
      {top_k, [](router_spec& s) { s.weight_apart = true; },
       "k=2 score=softmax weight_score=softmax weight_domain=selected"},
      {top_k, [](router_spec& s) { s.capacity = 19; },
       "k=2 score=softmax capacity=19 drop_order=token_major norm_before_drop=false"},
      {top_k, [](router_spec& s) { s.capacity = 19, s.normalize_before_drop = true; },
       "k=2 score=softmax capacity=19 drop_order=token_major"},
      {counted, [](router_spec& s) { s.count = count_rule::ratio; },
       "k=2 score=softmax selection=counted count=ratio ratio=0.25 min_k=4 max_k=5"},
      {counted, [](router_spec& s) { s.count = count_rule::entropy; },
       "k=2 score=softmax selection=counted count=entropy entropy_low=1 entropy_high=2 min_k=4 "
       "mid_k=3 max_k=5"},
      {counted, [](router_spec& s) { s.count = count_rule::tsallis; },
       "k=2 score=softmax selection=counted count=tsallis tsallis_q=2 dense_above=0.5 p=0.625 "
       "crossing=exclude min_k=4 max_k=5"},
      {sinkhorn_expert_choice, [](router_spec& s) { s.take.fixed = 17; },
       "score=softmax selection=sinkhorn_expert_choice take=17 plan_weights=plan plan_mass=tokens "
       "plan_order=columns_then_rows plan_domain=logarithm plan_stop=column_error "
       "plan_similarity=softmax plan_temperature=1.25 plan_eps=0.5 plan_tolerance=0.75 "
       "plan_iterations=11"},
  };
  // What is printed of a rule in any case has its default; an eps that is none is not.
  for (const char* const text :
       {"E=8 k=2 score=softmax normalize=sum", "E=8 k=2 score=softmax normalize=lp lp_p=1",
        "E=8 k=2 score=relu selection=threshold threshold=0 row_norm=sum",
        "E=8 score=softmax selection=expert_choice normalize=sum take_factor=2",
        "E=8 k=2 score=softmax selection=sparsemixer jitter_eps=0.00999999978",
        "E=8 k=2 score=softmax selection=counted count=percentile quantile=0.5",
        "E=8 k=2 score=softmax selection=counted count=ratio ratio=0.5",
        "E=8 k=2 score=softmax selection=counted count=entropy entropy_low=0.5 entropy_high=1.5 "
        "mid_k=2 max_k=4",
        "E=8 k=2 score=softmax selection=counted count=tsallis tsallis_q=1.10000002 "
        "dense_above=0.899999976 p=0.5",
        "E=8 k=2 score=softmax selection=selective_sinkhorn probability=0.00100000005",
        "E=8 k=2 score=softmax groups=2 topk_group=1 group_score=top2_sum group_fill=-inf"}) {
    std::string words;  // without the values of what is always printed
    for (std::size_t at = 0, end = 0; at < std::string(text).size(); at = end + 1) {
      end = std::min(std::string(text).find(' ', at), std::string(text).size());
      const std::string word = std::string(text).substr(at, end - at);
      const std::string name = word.substr(0, word.find('='));
      for (const char* const kept : {"E", "k", "score", "selection", "normalize", "row_norm",
                                     "count", "max_k", "p", "groups"})
        if (name == kept) words += word + " ";
    }
    CHECK(to_string(parse_spec(words)) == text);
  }
  for (const switched& one : beside) {
    router_spec s = dependent_fields(one.selection);
    one.on(s);
    CHECK(to_string(s) == "E=8 " + std::string(one.printed));
  }
}

TEST_CASE("a word that is unknown, wrong, repeated or missing is named") {
  CHECK(refused_text("E=8 k=2 router=fast") ==
        "moeroute::parse_spec: 'router=fast', expected a word of docs/models.md");
  CHECK(refused_text("E=8 k=two") == "moeroute::parse_spec: 'k=two', expected a whole number");
  CHECK(refused_text("E=8 k") == "moeroute::parse_spec: 'k', expected a whole number");
  CHECK(refused_text("E=8 k=") == "moeroute::parse_spec: 'k=', expected a whole number");
  CHECK(refused_text("E=8 k=2 scale") == "moeroute::parse_spec: 'scale', expected a number");
  CHECK(refused_text("E=8 k=2 score_domain") ==
        "moeroute::parse_spec: 'score_domain', expected all, selected");
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
  CHECK(test::refusal([] { (void)advice({.k = 9}); }) ==
        "moeroute::router_spec: k is 9, expected 1 to 8");
  CHECK(advises({.k = 1, .domain = score_domain::selected}, "the gate has no gradient"));
  CHECK_FALSE(advises({.k = 1}, "the gate has no gradient"));
  CHECK(advises({.experts = 4, .k = 4},
                "k=4 is E: every token takes every expert, nothing is chosen"));
  CHECK(advises({.groups = 4, .topk_group = 4},
                "topk_group=4 keeps every group: the limit does nothing"));
  CHECK(advises(
      {.score = score_kind::sigmoid, .selection = selection_kind::threshold, .threshold = -0.25f},
      "threshold=-0.25 on sigmoids lets every expert through"));
  CHECK(advises({.score = score_kind::sigmoid, .selection = selection_kind::threshold},
                "threshold=0 on sigmoids"));
  const auto of = [](const std::string& text, const std::string& sentence) {
    INFO(text);
    const std::vector<std::string> all = advice(parse_spec(text));
    CHECK(std::count(all.begin(), all.end(), sentence) == 1);
  };
  const std::string no_gradient =
      "k=1 and weights that sum to one: every weight is 1, and the gate has no gradient";
  const std::string by_batch =
      " decides by the whole batch: a token's experts depend on tokens "
      "behind it";
  const std::string hopeless = " on logits: what is 69 of it below a row's largest counts as 0";
  of("E=8 k=1 normalize=sum", no_gradient);
  of("E=8 k=1 weight_score=softmax weight_domain=selected score=sigmoid", no_gradient);
  of("E=8 k=2 score=sigmoid bias=selection groups=4 topk_group=2 group_fill=0",
     "group_fill=0 with bias=selection: an expert of a lost group beats every kept one whose score "
     "+ bias is below 0");
  of("E=256 k=2 bias=selection",
     "bias=selection on softmax scores: they are about 1/E = 0.00390625, so the step of a bias "
     "controller has to be far below that (0.001 is made for sigmoids)");
  of("E=8 k=2 score=identity normalize=sum",
     "normalize on score=identity: logits have either sign, so their sum may vanish");
  of("E=8 k=2 normalize=sum eps=0.0625 eps_mode=add",
     "eps=0.0625 is added to the divisor: weights sum to visibly less than one");
  of("E=8 k=2 logit_softcap=0.5",
     "logit_softcap=0.5: logits within +-0.5 make nearly equal scores");
  of("E=8 k=2 selection=top_p p=0.75",
     "p=0.75 without max_k: a token that is undecided takes up to E = 8 experts");
  of("E=8 k=2 normalize=sum capacity=4",
     "weights are divided before the drop: those of a token with dropped choices sum to less than "
     "one");
  of("E=8 k=2 explore=1", "explore=1: experts are always drawn, the router chooses nothing");
  of("E=8 k=2 candidates=2", "candidates=2 is k: every candidate is taken, the lot decides");
  of("E=8 k=2 noise=gumbel", "noise=gumbel is drawn in every call: describe inference without it");
  of("E=8 k=2 selection=counted count=ratio score=identity max_k=4",
     "count=ratio on score=identity: where the best logit is below 0 only min_k reach a share of "
     "it");
  of("E=8 k=2 selection=counted count=percentile",
     "count=percentile without max_k: a token that is undecided takes up to E = 8 experts");
  of("E=8 selection=expert_choice", "selection=expert_choice" + by_batch);
  of("E=8 k=2 selection=sinkhorn",
     "phase=training balances the batch that it is given: describe inference with "
     "phase=evaluation");
  of("E=8 k=2 selection=sinkhorn plan_temperature=0.125",
     "plan_temperature=0.125" + hopeless +
         ", and plan_eps outweighs an expert that all tokens want; plan_domain=logarithm has "
         "neither limit");
  of("E=8 k=2 selection=sinkhorn plan_temperature=0.125 plan_eps=0",
     "plan_temperature=0.125" + hopeless + "; plan_domain=logarithm has neither limit");
  of("E=8 k=2 gate=cosine gate_temperature=2",
     "gate_temperature=2 on cosines: logits within +-0.5 make nearly equal scores");
  of("E=8 k=2 gate=low_rank_cosine gate_d=16 gate_width=16 gate_temperature=0.1",
     "gate_width=16 is no lower rank than gate_d=16");
  of("E=8 k=2 gate=low_rank_cosine gate_d=16 gate_width=17 gate_temperature=0.1",
     "gate_width=17 is no lower rank than gate_d=16");
  of("E=8 k=2 gate=mixing score=identity",
     "gate=mixing mixes every token of the call: a token's experts depend on tokens behind it");
  of("E=8 k=2 selection=hash_table score=uniform gate=rms",
     "gate=rms on score=uniform: nobody reads its logits, gate=none saves the product");
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
        "E=8 k=2 eps=0.5 eps_mode=add",
        "E=8 k=2 plan_temperature=0.1",
        "E=8 k=4 selection=each_group groups=4 candidates=4",
        "E=8 k=2 gate=mlp gate_d=16 gate_width=16",
        "E=8 k=2 selection=selective_sinkhorn noise=gaussian phase=evaluation "
        "plan_domain=logarithm",
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
  CHECK(advice(parse_spec("E=8 k=1 weight_score=sigmoid score_domain=selected")).empty());
  CHECK(advice(parse_spec("E=8 k=1 score=sigmoid score_domain=selected")).empty());
  CHECK(advice(parse_spec("E=8 k=1")).empty());
}

TEST_CASE("each trait of a router is lost and won by the words that decide it") {
  // Of monotone, shift invariant, relabelling, sum to one, fixed k, table's ids, ~ random,
  // capacity.
  const auto traits = [](const router_spec& s) {
    const router_traits t = traits_of(s);
    const bool has[] = {t.monotone, t.shift_invariant, t.relabelling, t.weights_sum_to_one,
                        t.fixed_k,  t.needs_token_ids, t.random,      t.capacity_bound};
    std::string letters;
    for (std::size_t i = 0; i < std::size(has); ++i)
      if (has[i]) letters += "msr1kt~c"[i];
    return letters;
  };
  const auto sum = normalization::sum;
  const struct {
    router_spec spec;
    const char* letters;
  } listed[] = {
      {{}, "msrk"},
      {{.normalize = sum}, "msr1k"},
      {{.domain = score_domain::selected}, "msr1k"},
      {{.normalize = normalization::lp}, "msrk"},
      {{.normalize = sum, .eps_where = eps_mode::add}, "msrk"},
      {{.normalize = sum, .scale = 2.0f}, "msrk"},
      {{.normalize = sum, .divide_by_k = true}, "msrk"},
      {{.normalize = sum, .per_expert_scale = true}, "msrk"},
      {{.normalize = sum, .capacity = 4}, "msrkc"},
      {{.score = score_kind::sigmoid}, "mrk"},
      {{.score = score_kind::sigmoid, .domain = score_domain::selected}, "mrk"},
      {{.selection = selection_kind::sparsemixer, .normalize = sum}, "k"},
      {{.selection = selection_kind::top2}, "msrk"},
      {{.selection = selection_kind::top_p}, "msr"},
      {{.selection = selection_kind::threshold}, "msr"},
      {{.selection = selection_kind::counted}, "msr"},
      {{.selection = selection_kind::expert_table}, "skt"},
      {{.selection = selection_kind::random}, "sk~"},
      {{.groups = 2}, "sk"},
      {{.domain = score_domain::selected, .groups = 2}, "1k"},
      {{.selection_bias = true}, "srk"},
      {{.softcap = 1.0f}, "mrk"},
      {{.weight_apart = true}, "mrk"},
      {{.second_logits = logit_pairs::sigmoid_sum}, "srk"},
      {{.passes = 2}, "srk"},
      {{.steering = true}, "srk"},
      {{.candidates = 4}, "sk~"},
      {{.noise = noise_kind::gumbel}, "msrk~"},
      {{.explore = 0.5f}, "sk~"},
  };
  for (const auto& [spec, letters] : listed) {
    INFO(to_string(spec));
    CHECK(traits(spec) == letters);
  }
}

namespace {

// Every word of a description: its value, and whether it is printed.
struct word_recorder {
  struct entry {
    std::string name, value;
    bool shown;
  };
  std::vector<entry> words{};

  template <class T>
  void number(std::string_view name, T x, bool shown) {
    words.push_back({std::string(name), std::to_string(x), shown});
  }
  void flag(std::string_view name, bool set) { number(name, int{set}, set); }
  template <class E>
  bool one_of(std::string_view name, E e, bool shown) {
    words.push_back({std::string(name), std::string(to_string(e)), shown});
    return false;
  }
  template <std::size_t n, class Set>
  void pick(std::string_view name, const std::string_view (&)[n], std::size_t which, const Set&,
            bool shown) {
    number(name, which, shown);
  }
};

std::vector<word_recorder::entry> words_of(router_spec s) {
  word_recorder list;
  detail::each_word(s, list);
  return list.words;
}

}  // namespace

TEST_CASE(
    "no word is printed that says what its rule has anyway, but for those that belong to it") {
  // What a rule is not understood without, and what stands beside the word that switches it on.
  const std::set<std::string> always{
      "selection",   "E",          "k",           "score",        "group_score",
      "topk_group",  "group_fill", "lp_p",        "eps",          "jitter_eps",
      "count",       "quantile",   "ratio",       "entropy_low",  "tsallis_q",
      "dense_above", "p",          "mid_k",       "threshold",    "take_factor",
      "drop_order",  "gate_width", "probability", "weight_score", "entropy_high"};
  test::random rng(89);
  std::set<std::string> printed_alike;
  index_t printed = 0;
  const index_t rounds = test::sized(4000, 400);
  for (index_t round = 0; round < rounds; ++round) {
    const auto some = [&] { return rng.below(3) == 0; };
    router_spec s = plain_spec(static_cast<selection_kind>(rng.below(18)));
    const router_spec plain = s;
    if (some()) s.domain = score_domain::selected;
    if (some()) s.selection_bias = true;
    if (some()) s.groups = 4;
    if (some()) s.ties = tie_order::higher_id;
    if (some()) s.weight_apart = true;
    s.normalize = static_cast<normalization>(rng.below(3));
    s.eps_where = static_cast<eps_mode>(rng.below(3));
    if (some()) s.scale = 2.0f;
    s.gate.kind = static_cast<gate_kind>(rng.below(8));
    s.second_logits = static_cast<logit_pairs>(rng.below(3));
    if (some()) s.passes = 2;
    s.pass_rule = static_cast<pass_rule>(rng.below(2));
    if (some()) s.candidates = 3;
    if (some()) s.explore = 0.5f;
    s.noise = static_cast<noise_kind>(rng.below(3));
    s.count = static_cast<count_rule>(rng.below(4));
    if (some()) s.take.fixed = 3;
    if (some()) s.capacity = 5;
    if (some()) s.row_norm = threshold_norm::sum;
    if (some()) s.shared_experts = 1;
    const auto now = words_of(s), before = words_of(plain);
    REQUIRE(now.size() == before.size());
    for (std::size_t i = 0; i < now.size(); ++i) {
      printed += now[i].shown;
      if (now[i].shown && now[i].value == before[i].value && !always.contains(now[i].name))
        printed_alike.insert(now[i].name + "=" + now[i].value + " of " + to_string(s));
    }
  }
  CHECK(printed > rounds);
  INFO((printed_alike.empty() ? std::string() : *printed_alike.begin()));
  CHECK(printed_alike.empty());
}
