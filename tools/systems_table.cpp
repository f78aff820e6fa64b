// docs/systems.md: the routing systems of the field, and what of the library each of them is.
//
//   systems_table                          writes the page to stdout
//   systems_table --check docs/systems.md  says where the page differs, which spec does not parse
//                                          and which test is not there; exit code 1
//
// Runs in the folder of the sources: the tests that a row names are looked for.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <moeroute/policy/spec_text.hpp>
#include <sstream>
#include <string>
#include <string_view>

#include "made_page.hpp"

namespace {

enum state { works, partly, not_here };

struct system_row {
  const char* kind;
  const char* name;
  state is;
  const char* by;       // a spec where it begins with E=, else where in the library or the examples
  const char* test;     // file in tests/, a colon, and what one of its titles begins with
  const char* missing;  // of what is partly or not here
};

constexpr system_row rows[] = {
    // clang-format off
    {"Token to expert inside a model", "Unified Scaling Laws (S-BASE, hash, RL-R)", works, "E=64 k=1 score=softmax selection=sinkhorn", "policy/make_batch_router_test.cpp: a batch rule from a line of text decides", ""},
    {"Token to expert inside a model", "On DeepSeekMoE (shared experts, normalised sigmoid)", works, "E=64 k=6 score=sigmoid normalize=sum shared_experts=2", "policy/weight_test.cpp: normalised weights sum to the scale", ""},
    {"Token to expert inside a model", "Expert Choice as in pMoE (patches)", works, "E=64 score=softmax selection=expert_choice take_factor=2 sequence=196", "policy/expert_choice_test.cpp: tokens of one sequence do not compete with those of another", ""},
    {"Token to expert inside a model", "Nucleus-Image", works, "E=64 score=softmax selection=expert_choice normalize=sum eps=9.99999996e-13 scale=2.5 take_factor=2 sequence=256", "layer/moe_layer_gates_test.cpp: the router's rows are its own", ""},
    {"Token to expert inside a model", "Routers in Vision MoE", works, "E=32 score=softmax selection=sinkhorn_expert_choice take_factor=1", "policy/make_batch_router_test.cpp: a batch rule from a line of text decides", ""},
    {"Token to expert inside a model", "Selective Sinkhorn Routing", works, "E=64 k=2 score=softmax selection=selective_sinkhorn probability=0.00100000005", "policy/make_batch_router_test.cpp: a batch rule from a line of text decides", ""},
    {"Token to expert inside a model", "Sparsity-Constrained OT", works, "E=32 score=softmax selection=sparse_transport take_factor=1", "policy/sparse_transport_test.cpp: at every step columns sum to T / E and have at most k entries", ""},
    {"Token to expert inside a model", "ReMoE", works, "E=8 k=2 score=relu selection=threshold threshold=0", "policy/threshold_test.cpp: the weight goes to 0 with its logit", ""},
    {"Token to expert inside a model", "BlockFFN", works, "E=40 k=2 score=relu selection=threshold eps=9.99999975e-06 threshold=0 row_norm=rms", "policy/threshold_test.cpp: the scores are divided by their RMS over all experts", ""},
    {"Token to expert inside a model", "Harder Tasks Need More Experts (top-p)", works, "E=16 k=2 score=softmax selection=top_p p=0.400000006 crossing=include_strict", "policy/top_p_test.cpp: top-p takes the shortest prefix that reaches the mass", ""},
    {"Token to expert inside a model", "DynMoLE", works, "E=8 k=2 score=softmax selection=counted normalize=sum count=tsallis tsallis_q=1.10000002 dense_above=0.899999976 p=0.75 min_k=2", "policy/rare_rules_test.cpp: undecided tokens take every expert", ""},
    {"Token to expert inside a model", "DynaMoE", works, "E=16 k=2 score=softmax score_domain=selected selection=counted count=percentile quantile=0.75 max_k=8", "policy/rare_rules_test.cpp: a share of the best, a percentile and an entropy count what double counts", ""},
    {"Token to expert inside a model", "DA-MoE", works, "policy/row/counted.hpp: attention_importance, k_of_importance into side_inputs::k_of_token", "policy/rare_rules_test.cpp: importance by attention is one where attention is even", ""},
    {"Token to expert inside a model", "OmniMoE", partly, "E=1024 k=16 score=softmax selection=product_keys", "policy/rare_rules_test.cpp: the Cartesian router has the weights of its golden vector", "the kernel of atomic experts"},
    {"Token to expert inside a model", "Yuan 2.0-M32 (attention router)", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: an attention router is softmax", ""},
    {"Token to expert inside a model", "RMoE", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: a recurrent router's logits are G h", ""},
    {"Token to expert inside a model", "HyperRouter", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: a hyper-router is the linear gate", ""},
    {"Token to expert inside a model", "Omni-router", works, "layer/moe_layer.hpp: one gate, shared by reference", "layer/moe_layer_gates_test.cpp: a layer has the same bits by its gate, by a shared one", ""},
    {"Token to expert inside a model", "Mixture of Routers", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: a mixture of routers is a distribution", ""},
    {"Token to expert inside a model", "Router Upcycling", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: a multi-head router averages", ""},
    {"Token to expert inside a model", "Equifinality / ST-MoE", works, "E=16 k=1 score=softmax gate=low_rank_cosine gate_width=4 gate_temperature=0.100000001", "examples/field_routers_test.cpp: a step that moves a token by less than a share", ""},
    {"Token to expert inside a model", "LocMoE", partly, "stage/gate.hpp: cosine gate", "stage/gates_test.cpp: a cosine gate", "the locality loss and the bound of its capacity"},
    {"Token to expert inside a model", "SMILE", works, "E=64 k=1 score=softmax selection=product_keys first_keys=8", "policy/rare_rules_test.cpp: the Cartesian router has the weights of its golden vector", ""},
    {"Token to expert inside a model", "SAM (Switch and Mixture)", partly, "E=16 k=2 score=softmax groups=4 topk_group=1 group_score=sum group_fill=-inf", "policy/rare_rules_test.cpp: the sum of a group's probabilities picks the group", "the alignment loss"},
    {"Token to expert inside a model", "Union of Experts", works, "examples/support/depth_routers.hpp", "examples/depth_routers_test.cpp: a union of all slices is the dense network", ""},
    {"Token to expert inside a model", "StableMoE", works, "E=64 k=1 score=sigmoid selection=hash_table", "stage/combine_test.cpp: x gets what the weights of a token leave of 1", ""},
    {"Token to expert inside a model", "VQMoE", works, "E=8 k=1 score=softmax gate=codebook gate_width=512", "stage/gates_test.cpp: a codebook gate's best expert has the nearest code", ""},
    {"Token to expert inside a model", "S2MoE", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: two views of a token are mixed by its gate", ""},
    {"Token to expert inside a model", "THOR", works, "E=8 k=2 score=softmax explore=1 explore_scope=batch", "policy/explore_test.cpp: a batch that explores has the same experts for every token", ""},
    {"Token to expert inside a model", "SMoE-Dropout", works, "E=16 k=2 score=softmax score_domain=selected", "balance/sparsity_controller_test.cpp: k of an annealing is the nearest", ""},
    {"Token to expert inside a model", "Autonomy-of-Experts", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: autonomous experts rank by the norm", ""},
    {"Token to expert inside a model", "CompeteSMoE", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: in competition the experts with the largest outputs win", ""},
    {"Token to expert inside a model", "Graph of Tokens", works, "examples/support/own_gates.hpp", "examples/own_gates_test.cpp: decisions mixed by attention change less under noise", ""},
    {"Token to expert inside a model", "Chain-of-Experts", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: a chain of experts is its passes", ""},
    {"Token to expert inside a model", "ReXMoE", works, "E=256 k=8 score=softmax normalize=sum candidates=64 candidate_scope=batch", "policy/rare_rules_test.cpp: every expert is a candidate as often as any other", ""},
    {"Token to expert inside a model", "Rectify-Router", works, "stage/rectify.hpp", "stage/rectify_test.cpp: after rectification within a rank", ""},
    {"Token to expert inside a model", "OpenMoE", works, "metrics/drops.hpp: drops_by_position", "stage/capacity_test.cpp: by position the drops fall on the end of the batch", ""},
    {"Token to expert inside a model", "SpeechMoE", works, "layer/moe_layer.hpp: rows of the router's own; balance/loss_token.hpp", "layer/moe_layer_gates_test.cpp: the router's rows are its own", ""},
    {"Token to expert inside a model", "ERC loss", works, "balance/loss_router.hpp", "balance/loss_router_test.cpp: coupling is its formula", ""},
    {"Token to expert inside a model", "DPSL", works, "balance/loss_prior.hpp", "balance/loss_prior_test.cpp: the prior's loss is the squared distance of ranks", ""},
    {"Token to expert inside a model", "RoMA", works, "stage/router_target.hpp", "stage/router_training_test.cpp: neighbours pull at one another", ""},
    {"Token to expert inside a model", "BIP balancing", works, "balance/bip.hpp", "balance/bip_test.cpp: more iterations balance better", ""},
    {"Token to expert inside a model", "ALF-LB theory", works, "balance/bias_controller.hpp", "balance/bias_controller_test.cpp: a step changes the Lagrangian of its own choice", ""},
    {"Token to expert inside a model", "MAGNET", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: a switch by entropy", ""},
    {"Token to expert inside a model", "LLaVA-DyMoE", not_here, "", "", "training of old and new groups of experts"},
    {"Token to expert inside a model", "SAME", works, "stage/retained_inputs.hpp", "stage/router_training_test.cpp: a projected update leaves the logits of what is retained", ""},
    {"Token to expert inside a model", "GRIP", works, "stage/retained_inputs.hpp", "stage/router_training_test.cpp: a projected update leaves the logits of what is retained", ""},
    {"Token to expert inside a model", "RL for MoE (router-aware importance sampling)", works, "stage/policy_gradient.hpp", "stage/router_training_test.cpp: a router's shift is 1 where nothing moved", ""},
    {"Token to expert inside a model", "Rewiring Experts on the Fly", works, "policy/parts/logit_transform.hpp: add, and its gradient", "policy/logit_transform_test.cpp: temperature divides, the soft-cap is", ""},
    {"Token to expert inside a model", "Multilingual routing (steering)", works, "E=128 k=8 score=softmax normalize=sum steering", "policy/rare_rules_test.cpp: promoted experts come first where they are promoted hard", ""},
    {"Token to expert inside a model", "AdvMoE", works, "metrics/agreement.hpp", "metrics/agreement_test.cpp: differing choices are counted per choice", ""},
    {"Token to expert inside a model", "Towards Understanding MoE", works, "E=8 k=1 score=softmax noise=gaussian", "policy/noise_test.cpp: Gaussian noise has mean 0 and the variance asked for", ""},
    {"Token to expert inside a model", "PMoE", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: added experts change no old logit", ""},
    {"Token to expert inside a model", "MoFME (uncertainty router)", partly, "E=16 k=2 score=softmax passes=8", "policy/rare_rules_test.cpp: passes that agree are one pass", "experts that modulate features; its formula is not known"},
    {"Depth, states, attention, heads, pixels", "Mixture of States", works, "E=16 k=2 score=softmax explore=0.100000001", "policy/rare_rules_test.cpp: exploration from a line of text", ""},
    {"Depth, states, attention, heads, pixels", "MoBA / FlashMoBA", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: a query reads its own block", ""},
    {"Depth, states, attention, heads, pixels", "Routing Transformer", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: centres find the middles of two clouds", ""},
    {"Depth, states, attention, heads, pixels", "Router-Tuning / MindSkip", works, "examples/support/depth_routers.hpp", "examples/depth_routers_test.cpp: a sequence skips a block by the mean of its prompt", ""},
    {"Depth, states, attention, heads, pixels", "Dr.LLM", works, "examples/support/depth_routers.hpp", "examples/depth_routers_test.cpp: a layer is skipped, executed or repeated", ""},
    {"Depth, states, attention, heads, pixels", "Duo-LLM", works, "layer/moe_layer.hpp: experts of several sizes, zero and identity ones; examples/support/depth_routers.hpp: oracle_path", "examples/depth_routers_test.cpp: an oracle's path is the best of all that fit", ""},
    {"Depth, states, attention, heads, pixels", "FTP", works, "examples/support/depth_routers.hpp", "examples/depth_routers_test.cpp: tokens are pruned by figures of theirs", ""},
    {"Depth, states, attention, heads, pixels", "Informed Routing", partly, "stage/sequences.hpp", "stage/sequences_test.cpp: a block runs on a sequence as often as decided", "the cheap forecaster that stands in for a block"},
    {"Depth, states, attention, heads, pixels", "Pruning All-Rounder (PAR)", not_here, "", "", "a meta-router over flows of pruning"},
    {"Depth, states, attention, heads, pixels", "APTP", partly, "E=16 k=1 score=softmax selection=sinkhorn", "policy/sinkhorn_test.cpp: a skewed batch becomes nearly even", "its gate and contrastive loss are outside"},
    {"Depth, states, attention, heads, pixels", "Stochastic KV Routing", works, "E=2 k=1 score=uniform selection=random", "examples/field_routers_test.cpp: a layer takes its own keys or another's at random", ""},
    {"Depth, states, attention, heads, pixels", "PVChat (ReLU mixture of heads)", partly, "E=8 k=2 score=relu selection=threshold threshold=0", "policy/threshold_test.cpp: a token may choose no expert", "its losses"},
    {"Depth, states, attention, heads, pixels", "SplatWeaver", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: a prior guides a choice", ""},
    {"Depth, states, attention, heads, pixels", "AdaptDHM", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: centres find the middles of two clouds", ""},
    {"Depth, states, attention, heads, pixels", "MST-Distill", works, "examples/support/field_routers.hpp; stage/router_target.hpp", "examples/field_routers_test.cpp: instances have one decision for all of their rows", ""},
    {"Depth, states, attention, heads, pixels", "DORNet", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: instances have one decision for all of their rows", ""},
    {"Adapters and merging", "Multi-Head Adapter Routing", works, "layer/lora_experts.hpp: mix_parameters in blocks", "layer/lora_experts_test.cpp: a one-hot mixture is its expert to the bit", ""},
    {"Adapters and merging", "FlyLoRA", works, "layer/lora_experts.hpp: fly_projection, rank masks", "layer/lora_experts_test.cpp: each row of a FlyLoRA projection has", ""},
    {"Adapters and merging", "Queryable LoRA", partly, "layer/lora_experts.hpp, with a prior in logit_transform::add", "layer/lora_experts_test.cpp: a one-hot mixture is its expert to the bit", "attention over shared atoms"},
    {"Adapters and merging", "FeRA", partly, "E=4 k=4 score=softmax", "layer/lora_experts_test.cpp: an adapter is B times what a mask leaves of A x", "its frequency features"},
    {"Adapters and merging", "Glider", partly, "layer/lora_experts.hpp", "layer/lora_experts_test.cpp: tokens of one adapter and expert stand together", "how global and local scores are combined is not known"},
    {"Adapters and merging", "SMEAR", works, "layer/lora_experts.hpp: mix_parameters", "layer/lora_experts_test.cpp: a one-hot mixture is its expert to the bit", ""},
    {"Adapters and merging", "LoRA-Mixer", works, "layer/lora_experts.hpp: adapters as experts of a layer; balance/loss_count.hpp: specialisation_loss", "layer/lora_experts_test.cpp: an adapter is B times what a mask leaves of A x", ""},
    {"Adapters and merging", "ReMix", works, "stage/policy_gradient.hpp: drawn experts, leave-one-out", "stage/router_training_test.cpp: advantages of a token sum to 0", ""},
    {"Systems, measures, compression", "Local routing consistency (SRP, SCH)", works, "metrics/segment.hpp", "metrics/segment_test.cpp: segment performance is its definition", ""},
    {"Systems, measures, compression", "Standing Committee", works, "metrics/committee.hpp", "metrics/segment_test.cpp: the committee fed in batches", ""},
    {"Systems, measures, compression", "Least-Loaded EP", works, "placement: spill plans", "placement/planners_test.cpp: spilling gives the vectors", ""},
    {"Systems, measures, compression", "Expert-as-a-Service", works, "placement: dead ranks", "placement/planners_test.cpp: without its dead ranks a placement has empty slots", ""},
    {"Systems, measures, compression", "ExpertFlow", works, "residency: predictors, prefetch, regrouping", "residency/ahead_test.cpp: regrouped requests read no more experts", ""},
    {"Systems, measures, compression", "Read-ME", works, "residency: who knows the future", "residency/ahead_test.cpp: who knows the future loads nothing on demand", ""},
    {"Systems, measures, compression", "REAP", works, "metrics/saliency.hpp, residency/prune.hpp", "residency/compress_test.cpp: saliency by batches and merged is that of one", ""},
    {"Systems, measures, compression", "M-SMoE / MC-SMoE", works, "residency/merge.hpp: group_experts, align_units, merge_experts", "residency/compress_test.cpp: merging twins changes nothing", ""},
    {"Systems, measures, compression", "LaDiMo", works, "metrics/saliency.hpp: least_experts of each layer", "residency/compress_test.cpp: a layer needs as many experts as have the mass", ""},
    {"Query to model", "RouteLLM", works, "examples/10_models_as_experts.cpp", "examples/query_routing_test.cpp: by threshold: the strong model", ""},
    {"Query to model", "CARROT", works, "examples/10_models_as_experts.cpp", "examples/query_routing_test.cpp: by cost: the best model", ""},
    {"Query to model", "Universal Model Routing", works, "examples/support/field_routers.hpp", "examples/field_routers_test.cpp: an unseen model is worth what it was", ""},
    {"Query to model", "PORT (training-free online routing)", works, "examples/10_models_as_experts.cpp", "examples/query_routing_test.cpp: prices of budgets serve more", ""},
    {"Query to model", "BaRP, GreenServ, POLAR (bandits)", works, "examples/10_models_as_experts.cpp", "examples/query_routing_test.cpp: a linear bandit", ""},
    {"Query to model", "GlimpRouter, ACAR, SafeRoute, NanoVLA, Budget-Aware Agentic, BudgetMem", works, "examples/10_models_as_experts.cpp", "examples/query_routing_test.cpp: a cascade asks until a model is sure", ""},
    {"Query to model", "RouterDC, GraphRouter, RAGRouter, ProbeDirichlet, SCOPE, Lookahead, Arch-Router, vLLM Semantic Router, MoDEM, RouterRetriever, MasRouter, AgentRouter", partly, "route() on given scores", "examples/query_routing_test.cpp: by threshold: the strong model", "the learned scores are made outside"},
    {"Query to model", "Composition of Experts", works, "E=16 k=1 score=uniform selection=hash_table", "policy/table_test.cpp: a clustered table sends a cluster to one expert", ""},
    {"Query to model", "FusionRoute, Mixture of Thoughts, Paris", partly, "route() on given scores", "examples/query_routing_test.cpp: by threshold: the strong model", "adding up logits and cross-attention of models"},
    {"Query to model", "RouterBench, RouterArena, VL-RouterBench, router robustness", partly, "examples/support/field_routers.hpp: mean_quality", "examples/field_routers_test.cpp: the mean quality over budgets is the area", "the data sets, and attacks on query routers"},
    {"Query to model", "DualMap", works, "residency: two choices", "residency/ahead_test.cpp: two choices level a Zipf load", ""},
    {"Query to model", "Intelligent Router, Learned Best-Effort, WRP", not_here, "", "", "scheduling of requests"},
    {"Query to model", "Router-R1, xRouter, TCAR, ToolACE-MCP, AMRO-S, AgentSwing, Self-Healing Router", not_here, "", "", "language models, ants or graphs that route: no arrays in and out"},
    // clang-format on
};

bool is_spec(std::string_view by) { return by.starts_with("E="); }

// What is wrong with the rows themselves.
int broken_rows() {
  int broken = 0;
  const auto say = [&](const system_row& row, const std::string& what) {
    std::fprintf(stderr, "%s: %s\n", row.name, what.c_str());
    ++broken;
  };
  for (const system_row& row : rows) {
    if (is_spec(row.by)) {
      try {
        const std::string again = to_string(moeroute::parse_spec(row.by));
        if (again != row.by)
          say(row, std::string("'") + row.by + "' is printed as '" + again + "'");
      } catch (const moeroute::error& refused) {
        say(row, refused.what());
      }
    }
    const std::string_view test = row.test;
    if (row.is == not_here) continue;
    const std::size_t colon = test.find(": ");
    if (colon == test.npos) {
      say(row, "names no test");
      continue;
    }
    const std::string path = "tests/" + std::string(test.substr(0, colon));
    std::ifstream file(path);
    std::ostringstream text;
    text << file.rdbuf();
    if (!file || text.str().find('"' + std::string(test.substr(colon + 2))) == std::string::npos)
      say(row, path + " has no test whose title begins with '" +
                   std::string(test.substr(colon + 2)) + "'");
  }
  return broken;
}

// The text with every path of a file in it a link: to a header, or from the root where it begins
// so.
std::string linked(std::string_view text, std::string_view folder) {
  const auto in_path = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '/' || c == '.';
  };
  std::string made;
  for (std::size_t i = 0; i < text.size();) {
    std::size_t end = i;
    while (end < text.size() && in_path(text[end])) ++end;
    const std::string_view word = text.substr(i, end - i);
    if (word.ends_with(".hpp") || word.ends_with(".cpp")) {
      const bool root = folder != "tests/" && word.starts_with("examples/");
      made.append("[").append(word).append("](../").append(root ? "" : folder);
      made.append(word).append(")");
    } else {
      made.append(word);
    }
    if (end < text.size()) made += text[end++];
    i = end;
  }
  return made;
}

std::string page() {
  int count[3] = {};
  for (const system_row& row : rows) ++count[row.is];
  std::ostringstream out;
  out << "# The field's routing systems\n\n"
         "<!-- Made by tools/systems_table.cpp; a test compares. "
         "After a change: build/ci/tests/systems_table > docs/systems.md -->\n\n"
      << std::size(rows) << " published systems: " << count[works]
      << " work (their defining step is in a header or an example, and a test names it), "
      << count[partly] << " partly (the rest is said), " << count[not_here]
      << " are not here. Where the third column is a line of text, `parse_spec` reads it and "
         "[`with_router`](../include/moeroute/policy/make_batch_router.hpp) makes the router; "
         "sizes are examples. [models.md](models.md) has the routers of published models.\n";
  std::string_view kind;
  for (const system_row& row : rows) {
    if (kind != row.kind) {
      kind = row.kind;
      out << "\n## " << kind
          << "\n\n| system | state | by | test | missing |\n|---|---|---|---|---|\n";
    }
    out << "| " << row.name << " | "
        << (row.is == works    ? "works"
            : row.is == partly ? "partly"
                               : "not here")
        << " | ";
    if (is_spec(row.by))
      out << '`' << row.by << '`';
    else
      out << linked(row.by, "include/moeroute/");
    out << " | " << linked(row.test, "tests/") << " | " << row.missing << " |\n";
  }
  return out.str();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && broken_rows() > 0) return 1;
  return print_or_check(argc, argv, "systems_table", "the table", page());
}
