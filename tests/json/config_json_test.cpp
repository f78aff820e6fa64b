#include <moeroute/json/config_json.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "support/random.hpp"

using moeroute::find_in_catalog;
using moeroute::model_routers;
using moeroute::router_spec;

namespace {

struct sample {
  const char* entry;  // in the catalogue
  const char* config;
};

// What the routers of the published models have in their config.json, and nothing else.
constexpr sample samples[] = {
    {"mixtral", R"({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})"},
    {"minimax", R"({"model_type": "minimax", "num_local_experts": 32, "num_experts_per_tok": 2})"},
    {"qwen2_moe", R"({"model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4,
                      "norm_topk_prob": false})"},
    {"qwen3_moe", R"({"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
                      "norm_topk_prob": true})"},
    {"qwen3_next",
     R"({"model_type": "qwen3_next", "num_experts": 512, "num_experts_per_tok": 10})"},
    {"qwen3_5_moe", R"({"model_type": "qwen3_5_moe", "text_config":
                        {"num_experts": 256, "num_experts_per_tok": 8}})"},
    {"qwen3_vl_moe", R"({"model_type": "qwen3_vl_moe", "text_config": {"model_type":
                         "qwen3_vl_moe_text", "num_experts": 60, "num_experts_per_tok": 4}})"},
    {"qwen3_omni_moe_thinker", R"({"model_type": "qwen3_omni_moe", "thinker_config": {"model_type":
        "qwen3_omni_moe_thinker", "text_config": {"num_experts": 128, "num_experts_per_tok": 8}}})"},
    {"qwen3_omni_moe_talker", R"({"model_type": "qwen3_omni_moe_talker", "text_config":
        {"num_experts": 128, "num_experts_per_tok": 8}})"},
    {"olmoe", R"({"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8})"},
    {"flex_olmo", R"({"model_type": "flex_olmo", "num_experts": 7, "num_experts_per_tok": 5})"},
    {"mellum", R"({"model_type": "mellum", "num_experts": 64, "num_experts_per_tok": 8})"},
    {"hunyuan_v1_moe", R"({"model_type": "hunyuan_v1_moe", "num_experts": 64,
                           "moe_topk": [8, 8, 8]})"},
    {"jamba", R"({"model_type": "jamba", "num_experts": 16, "num_experts_per_tok": 2})"},
    {"dbrx", R"({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4,
                 "moe_normalize_expert_weights": 1.0}})"},
    {"deepseek_v2", R"({"model_type": "deepseek_v2", "n_routed_experts": 160,
        "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0,
        "topk_method": "group_limited_greedy", "norm_topk_prob": false, "scoring_func": "softmax"})"},
    {"deepseek_v2_lite", R"({"model_type": "deepseek_v2", "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        "topk_method": "greedy"})"},
    {"deepseek_ocr2", R"({"model_type": "deepseek_ocr2", "text_config": {"n_routed_experts": 64,
        "num_experts_per_tok": 6}})"},
    {"deepseek_v3", R"({"model_type": "deepseek_v3", "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
        "topk_method": "noaux_tc", "norm_topk_prob": true, "scoring_func": "sigmoid"})"},
    {"deepseek_v32", R"({"model_type": "deepseek_v32", "n_routed_experts": 256,
        "num_experts_per_tok": 8})"},
    {"dots1", R"({"model_type": "dots1", "n_routed_experts": 128, "num_experts_per_tok": 6,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": true})"},
    {"glm4_moe", R"({"model_type": "glm4_moe", "n_routed_experts": 160, "num_experts_per_tok": 8,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": true})"},
    {"glm4_moe_lite", R"({"model_type": "glm4_moe_lite", "n_routed_experts": 64,
        "num_experts_per_tok": 4})"},
    {"glm4v_moe", R"({"model_type": "glm4v_moe", "text_config": {"n_routed_experts": 128,
        "num_experts_per_tok": 8}})"},
    {"glm_moe_dsa", R"({"model_type": "glm_moe_dsa", "n_routed_experts": 256,
        "num_experts_per_tok": 8})"},
    {"exaone_moe", R"({"model_type": "exaone_moe", "num_experts": 64, "num_experts_per_tok": 8})"},
    {"solar_open", R"({"model_type": "solar_open", "n_routed_experts": 128,
        "num_experts_per_tok": 8})"},
    {"nemotron_h", R"({"model_type": "nemotron_h", "n_routed_experts": 128,
        "num_experts_per_tok": 6, "routed_scaling_factor": 2.5})"},
    {"mistral4",
     R"({"model_type": "mistral4", "n_routed_experts": 128, "num_experts_per_tok": 4})"},
    {"deepseek_v4", R"({"model_type": "deepseek_v4", "n_routed_experts": 256,
        "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus", "num_hash_layers": 3})"},
    {"gpt_oss", R"({"model_type": "gpt_oss", "num_local_experts": 128, "experts_per_token": 4})"},
    {"openai_privacy_filter", R"({"model_type": "openai_privacy_filter", "num_local_experts": 128,
        "num_experts_per_tok": 4})"},
    {"llama4_scout", R"({"model_type": "llama4", "text_config": {"num_local_experts": 16,
        "num_experts_per_tok": 1}})"},
    {"llama4_maverick", R"({"model_type": "llama4_text", "num_local_experts": 128,
        "num_experts_per_tok": 1})"},
    {"granitemoe", R"({"model_type": "granitemoe", "num_local_experts": 40,
        "num_experts_per_tok": 8})"},
    {"granitemoehybrid", R"({"model_type": "granitemoehybrid", "num_local_experts": 72,
        "num_experts_per_tok": 10})"},
    {"granitemoeshared", R"({"model_type": "granitemoeshared", "num_local_experts": 8,
        "num_experts_per_tok": 2})"},
    {"jetmoe", R"({"model_type": "jetmoe", "num_local_experts": 8, "num_experts_per_tok": 2})"},
    {"aria", R"({"model_type": "aria", "text_config": {"moe_num_experts": 64, "moe_topk": 6}})"},
    {"cohere2_moe", R"({"model_type": "cohere2_moe", "num_experts": 8, "num_experts_per_tok": 2,
        "expert_selection_fn": "softmax"})"},
    {"phimoe", R"({"model_type": "phimoe", "num_local_experts": 16, "num_experts_per_tok": 2})"},
    {"ernie4_5_moe", R"({"model_type": "ernie4_5_moe", "moe_num_experts": 64, "moe_k": 6})"},
    {"ernie4_5_vl_moe", R"({"model_type": "ernie4_5_vl_moe", "text_config":
        {"moe_num_experts": [64, 64], "moe_k": 6}})"},
    {"longcat_flash", R"({"model_type": "longcat_flash", "n_routed_experts": 512,
        "zero_expert_num": 256, "moe_topk": 12})"},
    {"minimax_m2", R"({"model_type": "minimax_m2", "num_local_experts": 256,
        "num_experts_per_tok": 8, "scoring_func": "sigmoid", "use_routing_bias": true})"},
    {"minimax_m3_vl", R"({"model_type": "minimax_m3_vl", "text_config": {"model_type": "minimax_m2",
        "num_local_experts": 128, "num_experts_per_tok": 4, "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.0, "use_routing_bias": true}})"},
    {"minimax_m3_vl", R"({"model_type": "minimax_m3_vl_text", "num_local_experts": 128,
        "num_experts_per_tok": 4})"},
    {"hy_v3", R"({"model_type": "hy_v3", "num_experts": 192, "num_experts_per_tok": 8,
        "router_scaling_factor": 2.826, "moe_router_use_sigmoid": true, "route_norm": true,
        "moe_router_enable_expert_bias": true})"},
    {"laguna", R"({"model_type": "laguna", "num_experts": 256, "num_experts_per_tok": 8,
        "moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 0.0,
        "norm_topk_prob": true})"},
    {"laguna_softcap", R"({"model_type": "laguna", "num_experts": 256, "num_experts_per_tok": 8,
        "moe_router_logit_softcapping": 4.0})"},
    {"lfm2_moe", R"({"model_type": "lfm2_moe", "num_experts": 32, "num_experts_per_tok": 4})"},
    {"afmoe", R"({"model_type": "afmoe", "num_experts": 128, "num_experts_per_tok": 8,
        "route_scale": 2.826})"},
    {"gemma4", R"({"model_type": "gemma4", "text_config": {"num_experts": 128,
        "top_k_experts": 8}})"},
    {"diffusion_gemma", R"({"model_type": "diffusion_gemma", "text_config": {"num_experts": 128,
        "top_k_experts": 8}})"},
    {"switch_transformers", R"({"model_type": "switch_transformers", "num_experts": 8})"},
    {"doge", R"({"model_type": "doge", "num_experts": 16384, "num_experts_per_tok": 64})"},
    {"axk1", R"({"model_type": "axk1", "n_routed_experts": 192, "num_experts_per_tok": 8})"},
    {"axk2", R"({"model_type": "axk2", "n_routed_experts": 128, "num_experts_per_tok": 8,
        "n_group": null, "topk_group": null})"},
    {"bailing_hybrid", R"({"model_type": "bailing_hybrid", "num_experts": 512,
        "num_experts_per_token": 8, "num_expert_group": 8, "topk_group": 4, "moe_renormalize": true,
        "score_function": "sigmoid"})"},
    {"dots3_note", R"({"model_type": "dots3_note", "text_config": {"model_type": "dots3_note_text",
        "n_routed_experts": 256, "num_experts_per_tok": 8}})"},
    {"dots3_note_vision", R"({"model_type": "dots3_note_vision_encoder",
        "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 64,
        "num_experts_per_tok": 2})"},
    {"flint", R"({"model_type": "flint", "num_experts": 256, "num_experts_per_tok": 6})"},
    {"glm5_next", R"({"model_type": "glm5_next", "text_config": {"n_routed_experts": 288,
        "num_experts_per_tok": 8}})"},
    {"granitemoe_swa", R"({"model_type": "granitemoe_swa", "num_local_experts": 8,
        "num_experts_per_tok": 2})"},
    {"hy_v4", R"({"model_type": "hy_v4", "n_routed_experts": 256, "num_experts_per_tok": 8})"},
    {"hy_v4", R"({"model_type": "hy_v4_vl", "text_config": {"model_type": "hy_v4_vl_text",
        "n_routed_experts": 256, "num_experts_per_tok": 8}})"},
    {"inkling2", R"({"model_type": "inkling2", "text_config": {"model_type": "inkling2_text",
        "n_routed_experts": 384, "num_experts_per_tok": 8, "scoring_func": "sigmoid"}})"},
    {"inkling2_loop", R"({"model_type": "inkling2_loop_text", "n_routed_experts": 128,
        "num_experts_per_tok": 8, "route_scale": 8.0})"},
    {"kimi_linear", R"({"model_type": "kimi_linear", "num_experts": 256,
        "num_experts_per_token": 8, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
        "moe_router_activation_func": "sigmoid", "use_grouped_topk": true})"},
    {"kolibri1", R"({"model_type": "kolibri1", "num_experts": 384, "num_experts_per_tok": 6})"},
    {"lara_mini", R"({"model_type": "lara_mini", "num_experts": 128, "num_experts_per_tok": 4})"},
    {"mimo_v2_flash", R"({"model_type": "mimo_v2_flash", "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
        "routed_scaling_factor": null, "scoring_func": "sigmoid", "topk_method": "noaux_tc"})"},
    {"mistral_large4", R"({"model_type": "mistral_large4", "text_config": {"n_routed_experts": 128,
        "num_experts_per_tok": 4}})"},
    {"muse_spark", R"({"model_type": "muse_spark", "text_config": {"num_local_experts": 256,
        "num_experts_per_tok": 8}})"},
    {"qwen4_exp", R"({"model_type": "qwen4_exp", "text_config": {"model_type": "qwen4_exp_text",
        "num_experts": 512, "num_experts_per_tok": 10}})"},
    {"step3p7", R"({"model_type": "step3p7", "text_config": {"model_type": "step3p5",
        "moe_num_experts": 288, "moe_top_k": 8, "moe_router_activation": "sigmoid",
        "norm_expert_weight": true, "use_moe_router_bias": true,
        "moe_every_n_layer": 1, "use_moe": true}})"},
    {"unlimited_ocr", R"({"model_type": "unlimited_ocr", "language_config": {"n_routed_experts": 64,
        "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1}})"},
    {"zaya", R"({"model_type": "zaya", "num_experts": 16, "num_experts_per_tok": 1})"},
    {"ling_lite", R"({"model_type": "bailing_moe", "num_experts": 64, "num_experts_per_tok": 6,
        "norm_topk_prob": true, "first_k_dense_replace": 0})"},
    {"ling2", R"({"model_type": "bailing_moe_v2", "num_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
        "moe_router_enable_expert_bias": true})"},
    {"llada2", R"({"model_type": "llada2_moe", "num_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": true})"},
    {"step3", R"({"model_type": "step3_vl", "text_config": {"model_type": "step3_text",
        "moe_num_experts": 48, "moe_top_k": 3, "moe_every_n_layer": 1}})"},
    {"nomic_bert_moe", R"({"model_type": "nomic_bert", "num_experts": 8, "moe_top_k": 2,
        "moe_normalize_expert_weights": false, "expert_choice_router": false})"},
    {"grok1", R"({"model_type": "grok-1", "num_experts": 8, "num_experts_per_tok": 2})"},
    {"smallthinker", R"({"model_type": "smallthinker", "moe_num_primary_experts": 32,
        "moe_num_active_primary_experts": 4, "moe_primary_router_apply_softmax": false, "moe_enable_secondary_experts": false,
        "norm_topk_prob": true})"},
    {"grove_moe", R"({"model_type": "grove_moe", "num_experts": 128, "num_experts_per_tok": 8})"},
    {"pangu_pro", R"({"model_type": "PanguProMoE", "num_experts": 64, "num_experts_per_tok": 8})"},
};

model_routers read_all(const std::string& config) {
  return moeroute::routers_from_config(moeroute::parse_json(config, "config.json"), "config.json");
}

router_spec read(const std::string& config, std::int64_t layer = 40) {
  return read_all(config).of(layer).value();
}

// What reading refuses the config with.
std::string refusal(const std::string& config) {
  try {
    read(config);
  } catch (const moeroute::error& e) {
    const std::string sentence = e.what();
    return sentence.starts_with("moeroute::json: ") ? sentence.substr(16) : "unnamed: " + sentence;
  }
  return "accepted";
}

}  // namespace

TEST_CASE("a published model's config.json gives the catalogue's spec") {
  for (const sample& one : samples) {
    INFO(one.entry);
    CHECK(to_string(read(one.config)) == to_string(find_in_catalog(one.entry)->spec));
    CHECK(read(one.config) == find_in_catalog(one.entry)->spec);
    // Some entries are named by more than a class; a class finds the entry of its name.
    const std::string own = "\"model_type\": \"" + std::string(one.entry) + '"';
    if (std::string(one.config).find(own) != std::string::npos)
      CHECK(read_all(one.config).entry->name == one.entry);
  }
  // Made up for on the output is what was divided by: the k of the file.
  CHECK(read(R"({"model_type": "openai_privacy_filter", "num_local_experts": 128,
                 "num_experts_per_tok": 8})")
            .output_scale == 8.0f);
}

TEST_CASE("every router of the catalogue has a config.json that it is read from") {
  std::set<std::string_view> read_from{"deepseek_v4_hash", "nllb_moe", "nllb_moe_bpr"};  // below
  for (const sample& one : samples) read_from.insert(one.entry);
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    INFO(entry.name);
    CHECK(read_from.contains(entry.name));
  }
}

TEST_CASE("every class that is new in transformers 5.24.0 has a config.json that it is read from") {
  std::set<std::string_view> read_from;
  for (const sample& one : samples) read_from.insert(one.entry);
  for (const moeroute::catalog_entry& entry : moeroute::newer_catalog) {
    INFO(entry.name);
    if (entry.source.find("transformers 5.24.0") != entry.source.npos)
      CHECK(read_from.contains(entry.name));
  }
}

TEST_CASE("what only one of the newer classes can say moves the spec, or is refused by name") {
  const std::string step = R"({"model_type": "step3p5", "moe_num_experts": 8, "moe_top_k": 2,
                               "num_hidden_layers": 6)";
  const auto layers = [](const std::string& config) {
    std::string line;
    for (const auto& layer : read_all(config).layers) line += layer ? 'E' : '-';
    return line;
  };
  CHECK(layers(step + "}") == "---EEE");
  CHECK(layers(R"({"model_type": "step3p5", "moe_num_experts": 8, "moe_top_k": 2,
                   "num_hidden_layers": 150})") == "---" + std::string(147, 'E'));
  CHECK(layers(step + R"(, "moe_layers_enum": "1, 4,7"})") == "-E--E-");
  CHECK(layers(step + R"(, "moe_layers_enum": [0, 5]})") == "E----E");
  CHECK(layers(R"({"model_type": "step3_text", "moe_num_experts": 8, "moe_top_k": 2,
                   "num_hidden_layers": 6})") == "----EE");
  CHECK(read(R"({"model_type": "step3_text", "moe_num_experts": 8, "moe_top_k": 2,
                 "norm_expert_weight": false})")
            .normalize == moeroute::normalization::none);
  const std::string nomic = R"({"model_type": "nomic_bert", "num_experts": 8, "moe_top_k": 2,
                                "n_layer": 4, "moe_every_n_layers": 2)";
  CHECK(layers(nomic + "}") == "-E-E");
  CHECK(refusal(nomic + R"(, "expert_choice_router": true})") ==
        "config.json: field 'expert_choice_router': expected false, 0 or null: the class knows "
        "nothing else, found true");
  CHECK(refusal(step + R"(, "moe_layers_enum": "1,x"})") ==
        "config.json: field 'moe_layers_enum': expected numbers of layers, found '1,x'");
  CHECK(read(step + R"(, "moe_router_scaling_factor": 3.0})").scale == 3.0f);
  CHECK(refusal(step + R"(, "moe_every_n_layer": null})") == "accepted");
  CHECK(refusal(step + R"(, "moe_every_n_layer": 2})") ==
        "config.json: field 'moe_every_n_layer': expected 1: the class knows nothing else, found "
        "2");
  const std::string small = R"({"model_type": "smallthinker", "moe_num_primary_experts": 8,
                                "moe_num_active_primary_experts": 2)";
  CHECK(to_string(read(small + R"(, "moe_primary_router_apply_softmax": true})")) ==
        "E=8 k=2 score=softmax score_domain=selected");
  CHECK(read(small + R"(, "norm_topk_prob": false})").normalize == moeroute::normalization::none);
  CHECK(layers(small + R"(, "num_hidden_layers": 3, "moe_layer_layout": [1, 0, 1]})") == "E-E");
  CHECK(refusal(small + R"(, "num_hidden_layers": 3, "moe_layer_layout": [1, 0]})") ==
        "config.json: field 'moe_layer_layout' lists 2 layers, field 'num_hidden_layers' says 3");
  CHECK(refusal(small + R"(, "moe_enable_secondary_experts": true})") ==
        "config.json: field 'moe_enable_secondary_experts': expected false, 0 or null: the class "
        "knows nothing else, found true");
  const std::string flint = R"({"model_type": "flint", "num_experts": 8, "num_experts_per_tok": 2,
                                "num_hidden_layers": 4)";
  CHECK(layers(flint + "}") == "--EE");
  CHECK(layers(flint + R"(, "mlp_only_layers": [2]})") == "EE-E");
  const std::string dots = R"({"model_type": "dots3_note_vision_encoder")";
  const model_routers eye = read_all(dots + R"(, "capacity_factor": 3, "router_scale": 1.5,
                                               "pyramid_num_routed": [-1, 2, 8]})");
  CHECK(eye.count == 3);
  CHECK_FALSE(eye.of(0));
  CHECK(eye.of(1)->experts == 2);
  CHECK(eye.of(1)->k == 2);
  CHECK(eye.of(2)->k == 3);
  CHECK(eye.of(2)->scale == 1.5f);
  CHECK(read_all(dots + "}").count == 42);
  CHECK(refusal(R"({"model_type": "zaya", "num_experts": 16, "num_experts_per_tok": 2})") ==
        "config.json: field 'num_experts_per_tok': expected 1, found 2");
  CHECK(read(R"({"model_type": "kolibri1", "num_experts": 8, "num_experts_per_tok": 2,
                 "norm_topk_prob": true})")
            .normalize == moeroute::normalization::sum);
}

TEST_CASE("the first layers of DeepSeek-V4 route by token id") {
  const std::string config = R"({"model_type": "deepseek_v4", "n_routed_experts": 256,
                                 "num_experts_per_tok": 6, "num_hash_layers": 3})";
  CHECK(read(config, 2) == find_in_catalog("deepseek_v4_hash")->spec);
  CHECK(read(config, 3) == find_in_catalog("deepseek_v4")->spec);
}

TEST_CASE("the capacity of NLLB depends on the tokens and is left to the caller") {
  router_spec expected = find_in_catalog("nllb_moe")->spec;
  expected.capacity = 0;
  CHECK(read(R"({"model_type": "nllb-moe", "num_experts": 128})") == expected);
}

TEST_CASE("the flags of a config move the spec") {
  const auto v3 = [](const std::string& more) {
    return read(R"({"model_type": "deepseek_v3", "n_routed_experts": 16, "num_experts_per_tok": 2,
                    "n_group": 4, "topk_group": 2)" +
                more + "}");
  };
  CHECK(v3("").normalize == moeroute::normalization::sum);
  CHECK(v3(R"(, "norm_topk_prob": false)").normalize == moeroute::normalization::none);
  CHECK(v3(R"(, "routed_scaling_factor": 1.25)").scale == 1.25f);
  CHECK(v3("").groups == 4);
  CHECK(read(R"({"model_type": "deepseek_v2", "n_routed_experts": 16, "num_experts_per_tok": 2,
                 "n_group": 4, "topk_group": 2, "topk_method": "greedy"})")
            .groups == 1);
  CHECK(read(R"({"model_type": "cohere2_moe", "num_experts": 8, "num_experts_per_tok": 2,
                 "expert_selection_fn": "sigmoid", "norm_topk_prob": true})")
            .score == moeroute::score_kind::sigmoid);
  CHECK_FALSE(read(R"({"model_type": "lfm2_moe", "num_experts": 8, "num_experts_per_tok": 2,
                       "use_expert_bias": false})")
                  .selection_bias);
  CHECK_FALSE(read(R"({"model_type": "hy_v3", "num_experts": 8, "num_experts_per_tok": 2,
                       "moe_router_enable_expert_bias": false})")
                  .selection_bias);
  CHECK_FALSE(read(R"({"model_type": "minimax_m3_vl", "text_config": {"num_local_experts": 8,
                       "num_experts_per_tok": 2, "use_routing_bias": false}})")
                  .selection_bias);
  CHECK(read(R"({"model_type": "laguna", "num_experts": 8, "num_experts_per_tok": 2})").scale ==
        1.0f);
}

TEST_CASE("what is missing, unknown or wrong is named") {
  CHECK(refusal(R"({"num_experts": 8})") == "config.json: field 'model_type' is missing");
  CHECK(refusal(R"({"model_type": "llama"})") ==
        "config.json: field 'model_type': expected a mixture-of-experts model of the catalogue, "
        "found 'llama'");
  CHECK(refusal(R"({"model_type": "mixtral", "num_experts_per_tok": 2})") ==
        "config.json: field 'num_local_experts' is missing");
  CHECK(refusal(R"({"model_type": "mixtral", "num_local_experts": 8})") ==
        "config.json: field 'num_experts_per_tok' is missing");
  CHECK(refusal(R"({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 9})") ==
        "config.json: field 'num_experts_per_tok': expected an integer from 1 to 8, found 9");
  CHECK(refusal(R"({"model_type": "dbrx"})") == "config.json: field 'ffn_config' is missing");
  CHECK(refusal(R"({"model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8,
                    "scoring_func": "softmax"})") ==
        "config.json: field 'scoring_func': expected sigmoid: the class knows nothing else, found "
        "'softmax'");
  CHECK(refusal(R"({"model_type": "deepseek_v2", "n_routed_experts": 64, "num_experts_per_tok": 6,
                    "topk_method": "best"})") ==
        "config.json: field 'topk_method': expected greedy or group_limited_greedy, found 'best'");
  CHECK(refusal(R"({"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8, 4]})") ==
        "config.json: field 'moe_topk': expected one number, or one for each of 0 layers, found a "
        "value of type array");
  CHECK(refusal(R"({"model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8,
                    "n_group": 7, "topk_group": 4})") ==
        "config.json: moeroute::top_k: groups is 7, expected a divisor of E = 256");
  CHECK(refusal(R"({"model_type": "hy_v3", "num_experts": 192, "num_experts_per_tok": 8,
                    "moe_router_use_sigmoid": false})") ==
        "config.json: field 'moe_router_use_sigmoid': expected true: the class knows nothing else, "
        "found false");
  CHECK(refusal(R"({"model_type": "phimoe", "num_local_experts": 16, "num_experts_per_tok": 4})") ==
        "config.json: field 'num_experts_per_tok': expected 2: sparsemixer makes two choices, "
        "found 4");
}

TEST_CASE("a model of the catalogue whose file nobody reads is refused by its type and its entry") {
  const auto sentence = [](const std::string& type, const std::string& entry) {
    return "field 'model_type': expected a model whose fields are known; of this one the catalogue "
           "has '" +
           entry + "', but not how its file says it, found '" + type + "'";
  };
  for (const auto& [type, entry] : {std::pair{"arctic", "arctic"},
                                    {"Klear", "klear"},
                                    {"megrez_moe", "megrez"},
                                    {"skywork_moe", "skywork_moe"},
                                    {"interns1_pro", "intern_s1_pro"},
                                    {"hunyuan_image_3_moe", "hunyuan_image_3"},
                                    {"kimi_k3", "kimi_k3"}}) {
    REQUIRE(find_in_catalog(entry) != nullptr);
    const std::string sizes = R"("num_experts": 8, "num_experts_per_tok": 2})";
    const std::string config = R"({"model_type": ")" + std::string(type) + "\", " + sizes;
    CHECK(refusal(config) == "config.json: " + sentence(type, entry));
    CHECK(refusal(R"({"model_type": "wrapper", "text_config": )" + config + "}") ==
          "config.json: field 'text_config': " + sentence(type, entry));
  }
  for (const char* const other : {"kimi_k30", "klear2", "skywork_moe2"})
    CHECK(refusal(R"({"model_type": ")" + std::string(other) + "\"}") ==
          "config.json: field 'model_type': expected a mixture-of-experts model of the catalogue, "
          "found '" +
              std::string(other) + "'");
}

namespace {

// The config with more fields behind the others; where fields stand in an inner object, in there.
std::string with(const std::string& config, const std::string& more) {
  std::string text = config;
  text.insert(text.find_last_not_of("} \n") + 1, ", " + more);
  return text;
}

constexpr const char* deepseek_v4 = R"({"model_type": "deepseek_v4", "n_routed_experts": 64,
    "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus", "num_hidden_layers": 5)";

// 't' where a layer routes by token id, 's' by score, '-' without experts.
std::string kinds(const std::string& config) {
  std::string text;
  for (const auto& layer : read_all(config).layers)
    text += !layer ? '-' : layer->selection == moeroute::selection_kind::expert_table ? 't' : 's';
  return text;
}

}  // namespace

TEST_CASE("a key that speaks of routing and is not known is refused by name, in every model type") {
  for (const sample& one : samples) {
    for (const char* key : {"moe_router_temperature", "expert_choice", "routing_noise",
                            "gate_scale", "score_transform", "moe_topk_method", "num_groups",
                            "router_score_fn", "capacity_factor", "numExpertsDropped"}) {
      INFO(one.entry << ": " << key);
      CHECK(refusal(with(one.config, "\"" + std::string(key) + "\": 3"))
                .find("field '" + std::string(key) +
                      "' speaks of routing and is not known, found 3") != std::string::npos);
    }
  }
}

TEST_CASE("keys of a list, and keys that speak of something else, change nothing") {
  for (const sample& one : samples) {
    INFO(one.entry);
    std::string more = R"("attn_output_gate": true, "mamba_n_heads": 8, "num_key_value_groups": 4,
        "index_topk": 2048, "final_logit_softcapping": 30.0, "rope_group": 1)";
    for (const std::string_view key : moeroute::detail::harmless_config_keys)
      if (!key.starts_with("moe_layer") && !key.starts_with("is_moe_layer") &&
          key != "router_jitter_noise" && !key.starts_with("expert_layer") &&
          !key.starts_with("interleave"))
        more += ", \"" + std::string(key) + "\": 0";
    CHECK(read(with(one.config, more)) == read(one.config));
  }
}

TEST_CASE("a key that the class does not read says what the class does, or is refused") {
  const std::string mixtral =
      R"({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})";
  for (const char* agreed :
       {R"("norm_topk_prob": true)", R"("scoring_func": "softmax")", R"("n_group": null)",
        R"("n_group": 1, "topk_group": 1)", R"("routed_scaling_factor": 1.0)",
        R"("use_routing_bias": false)", R"("router_bias": false)", R"("zero_expert_num": 0)"}) {
    INFO(agreed);
    CHECK(read(with(mixtral, agreed)) == read(mixtral));
  }
  for (const char* other :
       {R"("norm_topk_prob": false)", R"("scoring_func": "sigmoid")", R"("n_group": 4)",
        R"("routed_scaling_factor": 2.5)", R"("use_routing_bias": true)", R"("router_bias": true)",
        R"("zero_expert_num": 2)", R"("moe_router_score_func": "sqrtsoftplus")",
        R"("expert_capacity": 4)"}) {
    INFO(other);
    const std::string key(other + 1, std::string_view(other).find('"', 1) - 1);
    CHECK(refusal(with(mixtral, other)).find("field '" + key + "'") != std::string::npos);
  }
  // The score of Laguna is a sigmoid, whatever its file says.
  CHECK(refusal(R"({"model_type": "laguna", "num_experts": 64, "num_experts_per_tok": 6,
                    "moe_router_score_func": "sqrtsoftplus"})") ==
        "config.json: field 'moe_router_score_func': expected sigmoid: the class knows nothing "
        "else, found 'sqrtsoftplus'");
}

TEST_CASE("null is what the class makes of it, not absent") {
  const std::string dbrx =
      R"({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 12, "moe_top_k": 3)";
  CHECK(to_string(read(dbrx + R"(, "moe_normalize_expert_weights": null}})")) ==
        "E=12 k=3 score=softmax");
  CHECK(read(dbrx + "}}").normalize == moeroute::normalization::lp);
  const std::string v3 = R"({"model_type": "deepseek_v3", "n_routed_experts": 16,
                             "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2)";
  CHECK(read(v3 + R"(, "norm_topk_prob": null})").normalize == moeroute::normalization::none);
  CHECK(refusal(v3 + R"(, "routed_scaling_factor": null})") ==
        "config.json: field 'routed_scaling_factor': expected a positive number, found null");
  CHECK(refusal(R"({"model_type": "mixtral", "num_local_experts": null,
                    "num_experts_per_tok": 2})") ==
        "config.json: field 'num_local_experts': expected an integer from 1 to 1048576, found "
        "null");
  const std::string longcat =
      R"({"model_type": "longcat_flash", "n_routed_experts": 16, "moe_topk": 4)";
  CHECK(read(longcat + R"(, "zero_expert_num": null})").experts == 16);
  CHECK(read(longcat + R"(, "zero_expert_num": 0})").zero_experts == 0);
  CHECK(read(longcat + "}").zero_experts == 256);
  CHECK(read(R"({"model_type": "deepseek_v2", "n_routed_experts": 64, "num_experts_per_tok": 6,
                 "n_group": null, "topk_group": null})")
            .groups == 1);
}

TEST_CASE("a zero that a class allows is read") {
  const auto phimoe = [](const std::string& jitter) {
    return read(R"({"model_type": "phimoe", "num_local_experts": 16, "num_experts_per_tok": 2)" +
                jitter + "}")
        .jitter;
  };
  CHECK(phimoe(R"(, "router_jitter_noise": 0.0)") == 0.0f);
  CHECK(phimoe(R"(, "router_jitter_noise": 0.25)") == 0.25f);
  CHECK(phimoe("") == 0.01f);
  CHECK(read(R"({"model_type": "laguna", "num_experts": 8, "num_experts_per_tok": 2,
                 "moe_router_logit_softcapping": 0})")
            .softcap == 0.0f);
}

TEST_CASE("two spellings with two values are refused with both names") {
  CHECK(refusal(R"({"model_type": "glm4_moe", "n_routed_experts": 64, "num_experts": 128,
                    "num_experts_per_tok": 8})") ==
        "config.json: field 'num_experts': expected what field 'n_routed_experts' says, which is "
        "64, found 128");
  CHECK(refusal(R"({"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4,
                    "experts_per_token": 2})") ==
        "config.json: field 'experts_per_token': expected what field 'num_experts_per_tok' says, "
        "which is 4, found 2");
  CHECK(refusal(R"({"model_type": "afmoe", "num_experts": 8, "num_experts_per_tok": 2,
                    "route_scale": 2.0, "routed_scaling_factor": 1.0})") ==
        "config.json: field 'routed_scaling_factor': expected what field 'route_scale' says, which "
        "is 2.0, found 1.0");
  // The same twice, or once as null, is no conflict, whichever of them is null.
  CHECK(read(R"({"model_type": "glm4_moe", "n_routed_experts": 64, "num_experts": 64,
                 "num_local_experts": null, "num_experts_per_tok": 8})")
            .experts == 64);
  CHECK(read(R"({"model_type": "glm4_moe", "n_routed_experts": null, "num_experts": 64,
                 "num_experts_per_tok": 8})")
            .experts == 64);
  CHECK(read(R"({"model_type": "glm4_moe", "n_routed_experts": null, "num_experts": null,
                 "num_local_experts": 64, "num_experts_per_tok": 8})")
            .experts == 64);
  CHECK(refusal(R"({"model_type": "mixtral", "num_local_experts": 8, "num_local_experts": 4,
                    "num_experts_per_tok": 2})") ==
        "config.json: key 'num_local_experts' stands there twice");
}

TEST_CASE("a wrapper is read where the type of its text model is known") {
  const std::string inner = R"({"model_type": "kimi_k2", "n_routed_experts": 96,
      "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
      "scoring_func": "sigmoid", "norm_topk_prob": true, "routed_scaling_factor": 2.827,
      "top_k": 50})";
  for (const char* name : {"text_config", "llm_config", "language_config"}) {
    INFO(name);
    CHECK(to_string(
              read(R"({"model_type": "kimi_k25", ")" + std::string(name) + "\": " + inner + "}")) ==
          "E=96 k=6 score=sigmoid bias=selection normalize=sum eps=9.99999968e-21 eps_mode=add "
          "scale=2.8269999");
  }
  CHECK(refusal(R"({"model_type": "llava", "text_config": {"model_type": "llama"}})") ==
        "config.json: field 'text_config': field 'model_type': expected a mixture-of-experts model "
        "of the catalogue, found 'llama'");
  CHECK(refusal(R"({"model_type": "a", "text_config": {}, "llm_config": {}})") ==
        "config.json: fields 'text_config' and 'llm_config' both hold a model");
  CHECK(refusal(R"({"model_type": "llama4", "text_config": )" + inner + "}") ==
        "config.json: field 'text_config': field 'model_type': expected the text model of "
        "'llama4', found 'kimi_k2'");
  CHECK(refusal(R"({"model_type": "kimi_k25", "num_experts_per_tok": 4, "text_config": )" + inner +
                "}") ==
        "config.json: field 'num_experts_per_tok' beside 'text_config' speaks of routing, found 4");
}

TEST_CASE("layers that route by token id are those that the file lists, or the class's three") {
  CHECK(kinds(deepseek_v4 + std::string("}")) == "tttss");
  CHECK(kinds(deepseek_v4 + std::string(R"(, "num_hash_layers": 1})")) == "tssss");
  const std::string listed =
      deepseek_v4 +
      std::string(R"(, "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe", "moe"])");
  CHECK(kinds(listed + "}") == "ttsss");
  CHECK(kinds(listed + R"(, "num_hash_layers": 2})") == "ttsss");
  CHECK(refusal(listed + R"(, "num_hash_layers": 3})") ==
        "config.json: field 'num_hash_layers': expected as many as field 'mlp_layer_types' lists "
        "first, found 3");
  // Of five layers that the file lists as many at first are tables as it says: no first one less,
  // no last one more.
  for (int tables = 0; tables <= 5; ++tables)
    for (int said = 0; said <= 6; ++said) {
      std::string words;
      for (int l = 0; l < 5; ++l)
        words += std::string(l == 0 ? "" : ", ") + (l < tables ? R"("hash_moe")" : R"("moe")");
      const std::string n = std::to_string(said);
      CHECK(refusal(deepseek_v4 + (R"(, "mlp_layer_types": [)" + words) +
                    R"(], "num_hash_layers": )" + n + "}") ==
            (std::min(said, 5) == tables
                 ? "accepted"
                 : "config.json: field 'num_hash_layers': expected as many as field "
                   "'mlp_layer_types' lists first, found " +
                       n));
    }
  CHECK(refusal(deepseek_v4 + std::string(R"(, "mlp_layer_types": ["moe"]})")) ==
        "config.json: field 'mlp_layer_types' lists 1 layers, field 'num_hidden_layers' says 5");
  CHECK(refusal(deepseek_v4 +
                std::string(R"(, "mlp_layer_types": ["a", "moe", "moe", "moe", "moe"]})")) ==
        "config.json: field 'mlp_layer_types': expected hash_moe or moe, found 'a'");
}

TEST_CASE("layers without experts are those of the class") {
  const auto of = [](const std::string& type, const std::string& more) {
    return kinds(R"({"model_type": ")" + type + R"(", "num_experts": 8, "num_experts_per_tok": 2,
                    "num_hidden_layers": 6)" +
                 more + "}");
  };
  CHECK(of("deepseek_v3", R"(, "n_group": 1, "topk_group": 1)") == "---sss");
  CHECK(of("deepseek_v3", R"(, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
                              "moe_layer_freq": 2)") == "--s-s-");
  CHECK(of("lfm2_moe", R"(, "num_dense_layers": 1)") == "-sssss");
  CHECK(of("qwen3_moe", R"(, "mlp_only_layers": [0, 4], "decoder_sparse_step": 1)") == "-sss-s");
  CHECK(of("qwen3_moe", R"(, "decoder_sparse_step": 2)") == "-s-s-s");
  CHECK(of("jamba", "") == "-s-s-s");
  CHECK(of("llama4_text", R"(, "interleave_moe_layer_step": 2)") == "-s-s-s");
  CHECK(of("llama4_text", R"(, "interleave_moe_layer_step": 3)") == "--s--s");
  CHECK(of("llama4_text", R"(, "moe_layers": [5])") == "-----s");
  CHECK(of("ernie4_5_moe", R"(, "moe_layer_end_index": 4)") == "-ssss-");
  CHECK(of("minimax_m3_vl_text", R"(, "moe_layer_freq": [0, 0, 0, 1, 1, 1])") == "---sss");
  CHECK(of("nemotron_h", R"(, "hybrid_override_pattern": "MEM*E")") == "-s--s");
  CHECK(of("laguna", R"(, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse",
                                              "sparse"])") == "-sssss");
}

TEST_CASE("what a class makes of a file that says no more than its sizes is pinned for each type") {
  // Type, which of six layers have experts, how weights are normalised, their scale.
  std::istringstream pinned(R"(
    mixtral ssssss sum 1
    minimax ssssss sum 1
    minimax_m1 ssssss sum 1
    minimax_text_01 ssssss sum 1
    qwen2_moe ssssss none 1
    qwen3_moe ssssss none 1
    qwen3_next ssssss sum 1
    qwen3_5_moe ssssss sum 1
    qwen3_vl_moe ssssss sum 1
    qwen3_omni_moe_thinker ssssss sum 1
    qwen3_omni_moe_text ssssss sum 1
    qwen3_omni_moe_talker ssssss none 1
    olmoe ssssss none 1
    flex_olmo ssssss none 1
    mellum ssssss sum 1
    hunyuan_v1_moe ssssss sum 1
    jamba -s-s-s none 1
    deepseek_v2 ssssss none 1
    deepseek_ocr2 ssssss none 1
    deepseek_v3 ---sss sum 2.5
    kimi_k2 ---sss sum 2.5
    deepseek_v32 ---sss sum 2.5
    dots1 ssssss none 1
    glm4_moe -sssss sum 1
    glm4_moe_lite -sssss sum 1.8
    glm4v_moe -sssss sum 1
    glm_moe_dsa ---sss sum 2.5
    exaone_moe -sssss sum 2.5
    solar_open ssssss sum 1
    nemotron_h ssssss sum 1
    mistral4 ssssss sum 1
    deepseek_v4 tttsss sum 1.5
    gpt_oss ssssss none 1
    openai_privacy_filter ssssss none 1
    llama4 ssssss none 1
    granitemoe ssssss none 1
    granitemoehybrid ssssss none 1
    granitemoeshared ssssss none 1
    jetmoe ssssss none 1
    aria ssssss none 1
    cohere2_moe ssssss none 1
    phimoe ssssss none 1
    ernie4_5_moe -sssss sum 1
    ernie4_5_vl_moe -sssss sum 1
    ernie4_5_moe_vl -sssss sum 1
    longcat_flash ssssss none 6
    minimax_m2 ssssss sum 1
    minimax_m3_vl ssssss sum 2
    hy_v3 -sssss sum 2.826
    laguna -sssss sum 1
    lfm2_moe --ssss sum 1
    afmoe -sssss sum 1
    gemma4 ssssss sum 1
    diffusion_gemma ssssss sum 1
    switch_transformers . none 1
    nllb-moe . sum 1
    doge ssssss none 1
    axk1 -sssss sum 2.5
    axk2 -sssss sum 2.5
    bailing_hybrid --ssss sum 2.5
    dots3_note -sssss sum 1
    flint --ssss sum 1
    glm5_next ---sss sum 2.5
    granitemoe_swa ssssss none 1
    hy_v4 -sssss sum 2.827
    hy_v4_vl -sssss sum 2.827
    inkling2 ssssss sum 8
    inkling2_loop ssssss sum 8
    kimi_linear -sssss sum 2.446
    kolibri1 ssssss none 1
    lara_mini ssssss sum 1
    mimo_v2_flash -sssss sum 1
    mistral_large4 -sssss sum 1
    muse_spark ssssss sum 1
    qwen4_exp ssssss sum 1
    step3p5 ---sss sum 1
    step3p7 ---sss sum 1
    unlimited_ocr -sssss none 1
    bailing_moe ssssss sum 1
    bailing_moe_v2 -sssss sum 2.5
    llada2_moe -sssss sum 2.5
    grok-1 ssssss sum 1
    step3 ----ss sum 1
    nomic_bert ------ none 1
    smallthinker ssssss sum 1
    grove_moe ssssss none 1)");
  std::map<std::string, std::string> defaults;
  for (std::string type, layers, normalize, scale; pinned >> type >> layers >> normalize >> scale;)
    defaults[type] = layers + " " + normalize + " " + scale;
  // These need more than sizes, or other ones: the samples above have them.
  for (const char* type : {"dbrx", "dots3_note_vision_encoder", "zaya", "PanguProMoE"})
    defaults[type] = "";
  for (const moeroute::detail::config_model& m : moeroute::detail::config_models) {
    INFO(m.type);
    REQUIRE(defaults.contains(m.type));
    if (defaults[m.type].empty()) continue;
    std::string config = R"({"model_type": ")" + std::string(m.type) +
                         R"(", "num_hidden_layers": 6, ")" + m.experts + "\": 16";
    if (m.k != nullptr) config += std::string(", \"") + m.k + "\": 2";
    if (std::string_view(m.type) == "smallthinker")
      config += R"(, "moe_primary_router_apply_softmax": false)";
    config += "}";
    const model_routers all = read_all(config);
    router_spec last = all.of(40).value_or(router_spec{});
    for (const auto& layer : all.layers)
      if (layer) last = *layer;
    std::ostringstream made;
    const std::string layers = kinds(config);
    made << (layers.empty() ? "." : layers) << ' ' << to_string(last.normalize) << ' '
         << last.scale;
    CHECK(made.str() == defaults[m.type]);
  }
}

TEST_CASE("every field that says which layers have experts is read, alone and at its ends") {
  const auto of = [](const std::string& type, const std::string& more) {
    return kinds(R"({"model_type": ")" + type + R"(", "num_experts": 8, "num_experts_per_tok": 2,
                    "num_hidden_layers": 6)" +
                 more + "}");
  };
  const auto said = [](const std::string& type, const std::string& more) {
    return refusal(R"({"model_type": ")" + type + R"(", "num_experts": 8,
                      "num_experts_per_tok": 2, "num_hidden_layers": 6)" +
                   more + "}");
  };
  CHECK(of("qwen3_moe", "") == "ssssss");
  CHECK(of("qwen3_moe", R"(, "moe_layer_num_skipped": 2)") == "--ssss");
  CHECK(of("qwen3_moe", R"(, "moe_layer_num_skipped": 0)") == "ssssss");
  CHECK(of("qwen3_moe", R"(, "moe_layer_freq": 3)") == "s--s--");
  CHECK(of("qwen3_moe", R"(, "moe_layer_freq": 1)") == "ssssss");
  CHECK(of("qwen3_moe", R"(, "is_moe_layer": [true, false, 1, 0, null, true])") == "s-s--s");
  CHECK(of("qwen3_moe", R"(, "mlp_only_layers": [])") == "ssssss");
  CHECK(of("qwen3_moe", R"(, "mlp_only_layers": [5, 9])") == "sssss-");
  for (const char* every : {"0", "1"})
    CHECK(of("qwen3_moe", R"(, "decoder_sparse_step": )" + std::string(every)) == "ssssss");
  CHECK(of("qwen3_moe", R"(, "decoder_sparse_step": 3, "mlp_only_layers": [5])") == "--s---");
  CHECK(of("jamba", R"(, "expert_layer_period": 3)") == "-s--s-");
  CHECK(of("jamba", R"(, "expert_layer_period": 3, "expert_layer_offset": 2)") == "--s--s");
  CHECK(of("jamba", R"(, "expert_layer_offset": 0)") == "s-s-s-");
  CHECK(of("jamba", R"(, "expert_layer_period": 1, "expert_layer_offset": 0)") == "ssssss");
  CHECK(of("jamba", R"(, "expert_layer_period": 1)") == "------");
  CHECK(of("llama4_text", R"(, "interleave_moe_layer_step": 1)") == "ssssss");
  CHECK(of("llama4_text", R"(, "moe_layers": [0, 3], "interleave_moe_layer_step": 2)") == "s--s--");
  CHECK(of("ernie4_5_moe", "") == "-sssss");
  CHECK(of("ernie4_5_moe", R"(, "moe_layer_start_index": 0)") == "ssssss");
  CHECK(of("ernie4_5_moe", R"(, "moe_layer_start_index": 3, "moe_layer_end_index": -1)") ==
        "---sss");
  CHECK(of("ernie4_5_moe", R"(, "moe_layer_start_index": 0, "moe_layer_end_index": 0)") ==
        "s-----");
  CHECK(of("ernie4_5_moe", R"(, "moe_layer_interval": 2)") == "-s-s-s");
  CHECK(of("ernie4_5_moe", R"(, "moe_layer_interval": 3)") == "--s--s");
  CHECK(of("ernie4_5_vl_moe",
           R"(, "moe_layer_start_index": [2, 0], "moe_layer_end_index": [4, 5])") == "--sss-");
  CHECK(of("nemotron_h", R"(, "hybrid_override_pattern": "M|EE *-")") == "-ss--");
  CHECK(of("nemotron_h", R"(, "layers_block_type": ["mamba", "moe", "attention", "mlp"])") ==
        "-s--");
  CHECK(of("glm4_moe", R"(, "first_k_dense_replace": 0)") == "ssssss");
  CHECK(of("glm4_moe", R"(, "first_k_dense_replace": 6)") == "------");
  CHECK(of("glm4_moe", R"(, "first_k_dense_replace": null)") == "ssssss");
  for (const char* name : {"num_hidden_layers", "n_layers", "n_layer", "num_layers"})
    CHECK(kinds(R"({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, ")" +
                std::string(name) + "\": 2}") == "ss");
  CHECK(kinds(deepseek_v4 + std::string(R"(, "num_hash_layers": 0})")) == "sssss");
  CHECK(kinds(deepseek_v4 + std::string(R"(, "num_hash_layers": 9})")) == "ttttt");
  // DBRX has its experts in a field of their own: what is read of the layers stands around it.
  CHECK(kinds(R"({"model_type": "dbrx", "n_layers": 4, "moe_layer_freq": 2,
                  "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}})") == "s-s-");
  // What speaks of routing there is read in the field of their own alone.
  for (const char* key : {"moe_num_experts", "moe_top_k", "num_experts_per_tok", "gate_scale"}) {
    INFO(key);
    const std::string spoken = ", \"" + std::string(key) + "\": 7";
    CHECK(refusal(R"({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2})" +
                  spoken + "}") == "config.json: field '" + std::string(key) +
                                       "' speaks of routing and is not known, found 7");
  }
  CHECK(refusal(R"({"model_type": "dbrx", "norm_topk_prob": true, "moe_loss_weight": 0.5,
                    "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2}})") ==
        "config.json: field 'norm_topk_prob' speaks of routing and is not known, found true");
  CHECK(refusal(R"({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2,
                    "gate_scale": 7}})") ==
        "config.json: field 'ffn_config': field 'gate_scale' speaks of routing and is not known, "
        "found 7");
  const std::string nomic = R"({"model_type": "nomic_bert", "num_experts": 8, "moe_top_k": 2,
                                "n_layer": 6, "moe_every_n_layers": )";
  CHECK(kinds(nomic + "3}") == "-s--s-");
  CHECK(kinds(nomic + "0}") == "------");
  const std::string step = R"({"model_type": "step3p5", "moe_num_experts": 8, "moe_top_k": 2,
                               "num_hidden_layers": 6, "moe_layers_enum": )";
  CHECK(kinds(step + R"("0,5,6"})") == "s----s");
  CHECK(kinds(step + R"(""})") == "------");
  CHECK(kinds(step + R"(",2,,3,"})") == "--ss--");
  const std::string list = "a value of type array";
  for (const auto& [wrong, found] : {std::pair<std::string, std::string>{R"("1,-2")", "'1,-2'"},
                                     {R"("1 a")", "'1 a'"},
                                     {R"([1, "2"])", list},
                                     {"[-1]", list},
                                     {R"("1.5")", "'1.5'"}})
    CHECK(refusal(step + wrong + "}") ==
          "config.json: field 'moe_layers_enum': expected numbers of layers, found " + found);
  CHECK(said("qwen3_moe", R"(, "is_moe_layer": [1, 0])") ==
        "config.json: field 'is_moe_layer' lists 2 layers, field 'num_hidden_layers' says 6");
  CHECK(said("qwen3_moe", R"(, "moe_layer_freq": 0)") ==
        "config.json: field 'moe_layer_freq': expected an integer from 1 to 65536, found 0");
  CHECK(said("qwen3_moe", R"(, "decoder_sparse_step": -1)") ==
        "config.json: field 'decoder_sparse_step': expected an integer from 0 to 65536, found -1");
  CHECK(said("ernie4_5_moe", R"(, "moe_layer_end_index": -2)") ==
        "config.json: field 'moe_layer_end_index': expected an integer from -1 to 65536, found -2");
  CHECK(said("laguna", R"(, "mlp_layer_types": ["dense", "hash_moe", "sparse", "sparse", "sparse",
                         "sparse"])") ==
        "config.json: field 'mlp_layer_types': expected dense, sparse or moe, found 'hash_moe'");
  CHECK(said("laguna", R"(, "mlp_layer_types": ["sparse"])") ==
        "config.json: field 'mlp_layer_types' lists 1 layers, field 'num_hidden_layers' says 6");
  // What lists its layers says how many there are.
  const auto count = [](const std::string& more) {
    return read_all(R"({"model_type": "nemotron_h", "n_routed_experts": 8,
                        "num_experts_per_tok": 2, )" +
                    more + "}")
        .count;
  };
  CHECK(count(R"("layers_block_type": ["mamba", "moe", "mlp"])") == 3);
  CHECK(count(R"("num_hidden_layers": 6, "layers_block_type": ["mamba", "moe"])") == 2);
  CHECK(count(R"("num_hidden_layers": 6, "hybrid_override_pattern": "ME|*E")") == 4);
  CHECK(said("qwen3_moe", R"(, "mlp_only_layers": 3)") ==
        "config.json: field 'mlp_only_layers': expected an array, found 3");
  CHECK(said("laguna", R"(, "mlp_layer_types": "sparse")") ==
        "config.json: field 'mlp_layer_types': expected an array, found 'sparse'");
  CHECK(said("nemotron_h", R"(, "hybrid_override_pattern": 3)") ==
        "config.json: field 'hybrid_override_pattern': expected a string, found 3");
  CHECK(refusal(R"({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
                    "num_hidden_layers": 65537})") ==
        "config.json: field 'num_hidden_layers': expected an integer from 0 to 65536, found 65537");
}

TEST_CASE("every key that a class does not read is compared with what the class does") {
  const std::string mixtral =
      R"({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2})";
  const std::string gpt =
      R"({"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2})";
  const std::string v2 =
      R"({"model_type": "deepseek_v2", "n_routed_experts": 8, "num_experts_per_tok": 2})";
  const std::string v3 =
      R"({"model_type": "deepseek_v3", "n_routed_experts": 16, "num_experts_per_tok": 2})";
  const std::string biased =
      R"({"model_type": "muse_spark", "num_local_experts": 8, "num_experts_per_tok": 2})";
  const std::string encoder = R"({"model_type": "switch_transformers", "num_experts": 8})";
  using texts = std::vector<std::string>;
  const auto agree = [](const std::string& config, const texts& keys, const texts& values) {
    for (const std::string& key : keys)
      for (const std::string& value : values) {
        INFO(key << ": " << value);
        CHECK(refusal(with(config, "\"" + key + "\": " + value)) == "accepted");
      }
  };
  const auto differ = [](const std::string& config, const texts& keys, const std::string& value,
                         const std::string& expected) {
    for (const std::string& key : keys) {
      std::string shown = value;
      for (char& c : shown)
        if (c == '"') c = '\'';
      CHECK(refusal(with(config, "\"" + key + "\": " + value)) ==
            "config.json: field '" + key + "': expected " + expected +
                ": the class knows nothing else, found " + shown);
    }
  };
  const texts norm{"norm_topk_prob", "route_norm", "moe_renormalize", "norm_expert_weight",
                   "moe_norm_gate_logits"};
  agree(mixtral, norm, {"null", "true"});
  differ(mixtral, norm, "false", "true");
  agree(gpt, norm, {"null", "true", "false"});  // the softmax of the chosen is either
  differ(gpt, norm, "1", "false");
  agree(v2, norm, {"null", "false"});
  differ(v2, norm, "true", "false");

  const texts score{"scoring_func",          "score_func",
                    "score_function",        "scoring_function",
                    "moe_router_activation", "moe_router_activation_func",
                    "moe_router_score_func", "moe_router_score_function",
                    "router_score_function", "moe_score_func",
                    "expert_selection_fn",   "moe_gate_act"};
  agree(mixtral, score, {"null", R"("softmax")"});
  differ(mixtral, score, R"("sigmoid")", "softmax");
  differ(mixtral, score, R"("noaux_tc")", "softmax");
  agree(v3, score, {"null", R"("sigmoid")"});
  differ(v3, score, R"("softmax")", "sigmoid");
  agree(R"({"model_type": "dots1", "n_routed_experts": 8, "num_experts_per_tok": 2})", score,
        {R"("noaux_tc")", R"("sigmoid")"});

  const texts groups{"n_group", "num_expert_group", "num_expert_groups"};
  const texts factors{"topk_group",
                      "num_limited_groups",
                      "routed_scaling_factor",
                      "router_scaling_factor",
                      "moe_routed_scaling_factor",
                      "route_scale",
                      "moe_router_scaling_factor"};
  for (const texts& keys : {groups, factors}) {
    agree(mixtral, keys, {"null", "false", "0", "1", "1.0"});
    differ(mixtral, keys, "2", "1 or null");
  }
  const texts choices{"num_experts_per_tok", "num_experts_per_token",
                      "experts_per_token",   "moe_topk",
                      "moe_top_k",           "moe_k",
                      "num_selected_experts"};
  agree(encoder, choices, {"1"});
  differ(encoder, choices, "2", "1");
  agree(mixtral, {"topk_method"}, {"null", R"("greedy")"});
  differ(mixtral, {"topk_method"}, R"("noaux_tc")", "greedy");
  agree(biased, {"topk_method"}, {"null", R"("noaux_tc")"});
  differ(biased, {"topk_method"}, R"("greedy")", "noaux_tc");
  const texts bias{"use_expert_bias",  "use_routing_bias",    "moe_router_enable_expert_bias",
                   "moe_use_aux_free", "use_moe_router_bias", "e_score_correction_bias"};
  agree(mixtral, bias, {"null", "false"});
  differ(mixtral, bias, "true", "false");
  agree(biased, bias, {"null", "true"});
  differ(biased, bias, "false", "true");
  const texts gate{"router_bias", "moe_router_bias", "gate_bias"};
  agree(mixtral, gate, {"null", "false", "0"});
  differ(mixtral, gate, "true", "false");
  agree(gpt, gate, {"true"});
  differ(gpt, gate, "false", "true");
  differ(gpt, gate, "null", "true");
  const texts never{"group_limited_greedy",
                    "uniform_expert_assignment",
                    "batch_prioritized_routing",
                    "moe_apply_router_weight_on_input",
                    "moe_router_logit_softcapping",
                    "router_logit_softcapping",
                    "moe_use_hard_gate",
                    "zero_expert_num",
                    "moe_group_experts",
                    "moe_router_force_load_balancing",
                    "moe_drop_tokens",
                    "moe_enable_secondary_experts",
                    "expert_choice_router",
                    "moe_normalize_expert_weights",
                    "moe_reverse_token_drop",
                    "moe_random_routing_dropped_token",
                    "moe_use_token_type_bias"};
  agree(mixtral, never, {"null", "false", "0", "0.0"});
  differ(mixtral, never, "true", "false, 0 or null");
  differ(mixtral, never, "2", "false, 0 or null");
  // Without groups it says nothing; with them it says that they are.
  agree(mixtral, {"use_grouped_topk"}, {"null", "true", "false"});
  agree(v3, {"use_grouped_topk"}, {"null", "true"});
  differ(v3, {"use_grouped_topk"}, "false", "true");
  agree(mixtral, {"use_moe"}, {"null", "true"});
  differ(mixtral, {"use_moe"}, "false", "true");
  agree(mixtral, {"moe_every_n_layer"}, {"null", "0", "1"});
  differ(mixtral, {"moe_every_n_layer"}, "2", "1");
  agree(mixtral, {"moe_gate"}, {R"("topk")", R"("top2_fused")"});
  differ(mixtral, {"moe_gate"}, R"("hash")", "topk");

  // Of one class they mean nothing of routing, of the others nobody knows what.
  const std::string nllb = R"({"model_type": "nllb-moe", "num_experts": 8})";
  const std::string ernie = R"({"model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2})";
  const std::string hybrid =
      R"({"model_type": "nemotron_h", "n_routed_experts": 8, "num_experts_per_tok": 2})";
  const std::string laguna =
      R"({"model_type": "laguna", "num_experts": 8, "num_experts_per_tok": 2})";
  const texts fixed{"router_type", "expert_capacity", "moe_eval_capacity_token_fraction"};
  agree(encoder, fixed, {"7"});
  agree(nllb, fixed, {"7"});
  agree(ernie, {"moe_capacity"}, {"7"});
  agree(hybrid, {"n_groups"}, {"7"});
  agree(laguna, {"gating"}, {"7"});
  const auto unknown = [](const std::string& config, const std::string& key) {
    CHECK(refusal(with(config, "\"" + key + "\": 7")) ==
          "config.json: field '" + key + "' speaks of routing and is not known, found 7");
  };
  for (const std::string& key : fixed) unknown(mixtral, key);
  for (const char* key : {"moe_capacity", "n_groups", "gating", "top_k_experts"})
    unknown(encoder, key);
}

TEST_CASE("every spelling of a field is read, and what stands twice is one") {
  const auto sized = [](const std::string& type, const std::string& more) {
    return R"({"model_type": ")" + type + "\", " + more + "}";
  };
  for (const char* name :
       {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"})
    CHECK(read(sized("mixtral", "\"" + std::string(name) + R"(": 12, "num_experts_per_tok": 3)"))
              .experts == 12);
  for (const char* name :
       {"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk",
        "moe_top_k", "moe_k", "top_k_experts", "num_selected_experts"})
    CHECK(read(sized("mixtral", R"("num_local_experts": 12, ")" + std::string(name) + "\": 3")).k ==
          3);
  const std::string v3 = R"("n_routed_experts": 16, "num_experts_per_tok": 2, )";
  for (const char* name : {"routed_scaling_factor", "router_scaling_factor",
                           "moe_routed_scaling_factor", "route_scale", "moe_router_scaling_factor"})
    CHECK(read(sized("deepseek_v3", v3 + "\"" + name + "\": 3.5")).scale == 3.5f);
  for (const char* name : {"norm_topk_prob", "route_norm", "moe_renormalize", "norm_expert_weight"})
    CHECK(read(sized("deepseek_v3", v3 + "\"" + name + "\": false")).normalize ==
          moeroute::normalization::none);
  for (const char* name : {"n_group", "num_expert_group", "num_expert_groups"})
    CHECK(read(sized("deepseek_v3", v3 + "\"" + name + "\": 4")).groups == 4);
  for (const char* name : {"topk_group", "num_limited_groups"})
    CHECK(read(sized("deepseek_v3", v3 + "\"" + name + "\": 3")).topk_group == 3);
  for (const char* name : {"first_k_dense_replace", "num_dense_layers"})
    CHECK(kinds(sized("deepseek_v3", v3 + R"("num_hidden_layers": 4, ")" + name + "\": 1")) ==
          "-sss");
}

TEST_CASE("every word that only one class knows moves its spec, or is refused in a sentence") {
  const auto of = [](const std::string& type, const std::string& more) {
    return R"({"model_type": ")" + type + R"(", "num_experts": 16, "num_experts_per_tok": 2)" +
           (more.empty() ? "" : ", ") + more + "}";
  };
  using moeroute::normalization;
  const auto said = [&](const std::string& type, const std::string& more) {
    return refusal(of(type, more));
  };
  // groups
  const router_spec limited = read(
      of("deepseek_v2", R"("n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy")"));
  CHECK((limited.groups == 4 && limited.topk_group == 2 && limited.group_fill == 0.0f));
  CHECK(limited.group_score == moeroute::group_score::max);
  const router_spec unnamed = read(of("deepseek_v2", R"("n_group": 4, "topk_group": 2)"));
  CHECK((unnamed.groups == 1 && unnamed.topk_group == 1));
  CHECK(unnamed.group_score == moeroute::group_score::top2_sum);
  CHECK(unnamed.group_fill == router_spec{}.group_fill);
  const router_spec v3 = read(of("deepseek_v3", ""));
  CHECK((v3.groups == 8 && v3.topk_group == 4 && v3.group_fill == router_spec{}.group_fill));
  CHECK(v3.group_score == moeroute::group_score::top2_sum);
  for (const char* type : {"mistral4", "mistral_large4"}) {
    const router_spec s = read(of(type, R"("n_group": 4, "topk_group": 2)"));
    CHECK((s.group_fill == 0.0f && s.group_score == moeroute::group_score::top2_sum));
    CHECK(read(of(type, R"("n_group": 1, "topk_group": 1)")).group_fill ==
          router_spec{}.group_fill);
  }
  CHECK(read(of("kimi_linear", R"("num_expert_group": null, "topk_group": null)")).groups == 1);
  CHECK(said("deepseek_v3", R"("n_group": null)") ==
        "config.json: field 'n_group': expected an integer from 1 to 16, found null");
  CHECK(said("deepseek_v3", R"("n_group": 17)") ==
        "config.json: field 'n_group': expected an integer from 1 to 16, found 17");
  CHECK(said("deepseek_v3", R"("topk_group": 9)") ==
        "config.json: field 'topk_group': expected an integer from 1 to 8, found 9");
  CHECK(said("deepseek_v3", R"("n_group": 2)") ==
        "config.json: field 'n_group' is 2, expected at least topk_group, which is 4 by default");
  CHECK(said("deepseek_v3", R"("n_group": 4)") == "accepted");
  CHECK(said("deepseek_v3", R"("topk_method": "greedy")") ==
        "config.json: field 'topk_method': expected noaux_tc, found 'greedy'");
  CHECK(said("deepseek_v3", R"("topk_method": null)") == "accepted");
  CHECK(said("deepseek_v2", R"("topk_method": null)") ==
        "config.json: field 'topk_method': expected a string, found null");
  // scores
  const auto cohere = [&](const std::string& more) { return read(of("cohere2_moe", more)); };
  CHECK(cohere(R"("expert_selection_fn": "sigmoid", "norm_topk_prob": false)").normalize ==
        normalization::none);
  CHECK(cohere(R"("expert_selection_fn": "sigmoid")").normalize == normalization::sum);
  CHECK(cohere(R"("expert_selection_fn": "softmax", "norm_topk_prob": true)") == cohere(""));
  CHECK(said("cohere2_moe", R"("expert_selection_fn": "relu")") ==
        "config.json: field 'expert_selection_fn': expected softmax or sigmoid, found 'relu'");
  CHECK(read(of("deepseek_v4", R"("scoring_func": "sigmoid")")).score ==
        moeroute::score_kind::sigmoid);
  CHECK(said("deepseek_v4", R"("scoring_func": "softmax")") ==
        "config.json: field 'scoring_func': expected sqrtsoftplus or sigmoid, found 'softmax'");
  // biases, norms, caps
  for (const auto& [type, field] : {std::pair{"lfm2_moe", "use_expert_bias"},
                                    {"minimax_m2", "use_routing_bias"},
                                    {"minimax_m3_vl", "use_routing_bias"},
                                    {"hy_v3", "moe_router_enable_expert_bias"}}) {
    const std::string name = "\"" + std::string(field) + "\": ";
    CHECK(read(of(type, "")).selection_bias);
    CHECK(read(of(type, name + "true")).selection_bias);
    CHECK_FALSE(read(of(type, name + "false")).selection_bias);
    CHECK_FALSE(read(of(type, name + "null")).selection_bias);
    CHECK(said(type, name + "1") ==
          "config.json: field '" + std::string(field) + "': expected true or false, found 1");
  }
  for (const char* type : {"hy_v3", "laguna"}) {
    CHECK(said(type, R"("moe_router_use_sigmoid": true)") == "accepted");
    for (const char* no : {"false", "null"})
      CHECK(said(type, R"("moe_router_use_sigmoid": )" + std::string(no)) ==
            "config.json: field 'moe_router_use_sigmoid': expected true: the class knows nothing "
            "else, found " +
                std::string(no));
  }
  CHECK(read(of("afmoe", R"("route_norm": false)")).normalize == normalization::none);
  CHECK(read(of("afmoe", R"("route_norm": false)")).eps == 0.0f);
  CHECK(read(of("afmoe", R"("route_norm": true)")).normalize == normalization::sum);
  CHECK(said("laguna", R"("moe_router_logit_softcapping": -1)") ==
        "config.json: field 'moe_router_logit_softcapping': expected a positive number, found -1");
  CHECK(said("phimoe", R"("router_jitter_noise": -0.5)") ==
        "config.json: field 'router_jitter_noise': expected a positive number, found -0.5");
  CHECK(read(of("ernie4_5_moe", R"("moe_norm_min": 0.25)")).eps == 0.25f);
  CHECK(read(of("ernie4_5_vl_moe", R"("moe_norm_min": 0.25)")).eps == 0.25f);
  const std::string dbrx = R"({"model_type": "dbrx", "ffn_config": {"moe_num_experts": 12,
                              "moe_top_k": 3, "moe_normalize_expert_weights": )";
  CHECK(read(dbrx + "2.0}}").lp_p == 2.0f);
  // zero experts
  CHECK(read(of("longcat_flash", R"("zero_expert_num": 5)")).experts == 21);
  CHECK(said("longcat_flash", R"("zero_expert_num": -1)") ==
        "config.json: field 'zero_expert_num': expected an integer from 0 to 524288, found -1");
  CHECK(said("longcat_flash", R"("zero_expert_num": 524289)") ==
        "config.json: field 'zero_expert_num': expected an integer from 0 to 524288, found 524289");
  CHECK(said("longcat_flash", R"("zero_expert_type": "identity")") == "accepted");
  CHECK(said("longcat_flash", R"("zero_expert_type": "copy")") ==
        "config.json: field 'zero_expert_type': expected identity, found 'copy'");
  const router_spec skipping = read(R"({"model_type": "zaya", "num_experts": 16,
                                        "num_experts_per_tok": 1})");
  CHECK((skipping.experts == 17 && skipping.zero_experts == 1));
  // the gate's bias
  for (const char* type : {"longcat_flash", "switch_transformers", "nllb-moe"}) {
    const std::string start = R"({"model_type": ")" + std::string(type) +
                              R"(", "num_experts": 16)" +
                              (type[0] == 'l' ? R"(, "moe_topk": 2)" : "");
    CHECK_FALSE(read(start + "}").gate_bias);
    CHECK_FALSE(read(start + R"(, "router_bias": null})").gate_bias);
    CHECK(read(start + R"(, "router_bias": true})").gate_bias);
  }
  // without experts
  for (const char* name : {"enable_moe_block", "is_moe"}) {
    CHECK(said("gemma4", "\"" + std::string(name) + "\": true") == "accepted");
    CHECK(said("gemma4", "\"" + std::string(name) + "\": null") == "accepted");
    CHECK(said("gemma4", "\"" + std::string(name) + "\": false") ==
          "config.json: field '" + std::string(name) +
              "': expected true: without it the model has no router, found false");
  }
  // NLLB
  const std::string nllb = R"({"model_type": "nllb-moe", "num_experts": 16, )";
  CHECK(read(nllb + R"("normalize_router_prob_before_dropping": true})").normalize_before_drop);
  CHECK_FALSE(read(nllb + R"("second_expert_policy": "all"})").normalize_before_drop);
  CHECK(refusal(nllb + R"("second_expert_policy": "sampling"})") ==
        "config.json: field 'second_expert_policy': expected all: the others draw random numbers, "
        "found 'sampling'");
  // a scale that a class leaves out where it is null
  CHECK(read(of("mimo_v2_flash", R"("routed_scaling_factor": null)")).scale == 1.0f);
  CHECK(read(of("mimo_v2_flash", R"("routed_scaling_factor": 2.0)")).scale == 2.0f);
  CHECK(said("glm4_moe", R"("routed_scaling_factor": 0)") ==
        "config.json: field 'routed_scaling_factor': expected a positive number, found 0");
}

TEST_CASE("sizes by layer, and what stands beside a wrapped model") {
  const auto ernie = [](const std::string& experts, const std::string& more) {
    return R"({"model_type": "ernie4_5_vl_moe", "moe_num_experts": )" + experts +
           R"(, "moe_k": 2, "num_hidden_layers": 3, "moe_layer_start_index": 0)" + more + "}";
  };
  const model_routers own = read_all(ernie("[4, 8, 6]", ""));
  CHECK((own.of(0)->experts == 4 && own.of(1)->experts == 8 && own.of(2)->experts == 6));
  CHECK(read(ernie("[8, 8]", "")).experts == 8);
  CHECK(refusal(ernie("[]", "")) ==
        "config.json: field 'moe_num_experts': expected a number, found a value of type array");
  CHECK(refusal(ernie("[8, 0]", "")) ==
        "config.json: field 'moe_num_experts': expected an integer from 1 to 1048576, found 0");
  CHECK(refusal(ernie("[8, 4]", "")) ==
        "config.json: field 'moe_num_experts': expected one number, or one for each of 3 layers, "
        "found a value of type array");
  // The k of every layer is at most that of the largest; each layer's own is checked with its E.
  CHECK(refusal(ernie("[1, 8, 8]", "")) ==
        "config.json: moeroute::router_spec: k is 2, expected 1 to 1");
  CHECK(refusal(R"({"model_type": "longcat_flash", "n_routed_experts": 4, "zero_expert_num": 4,
                    "moe_topk": 6})") == "accepted");

  const auto beside = [](const std::string& more) {
    return refusal(R"({"model_type": "kimi_k25", )" + more +
                   R"("text_config": {"model_type": "kimi_k2", "n_routed_experts": 96,
                      "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1}})");
  };
  CHECK(beside("") == "accepted");
  CHECK(beside(R"("num_experts_per_tok": 6, )") == "accepted");
  CHECK(beside(R"("moe_intermediate_size": 6, )") == "accepted");
  CHECK(beside(R"("hidden_size": 6, )") == "accepted");
  CHECK(beside(R"("moe_dropless": 6, )") ==
        "config.json: field 'moe_dropless' beside 'text_config' speaks of routing, found 6");
  CHECK(refusal(R"({"model_type": "deepseek_v3", "text_config": {"model_type": "mixtral",
                    "num_local_experts": 8, "num_experts_per_tok": 2}})") ==
        "config.json: field 'text_config': field 'model_type': expected the text model of "
        "'deepseek_v3', found 'mixtral'");
}

TEST_CASE("lists of layers have 65536 at most") {
  const auto listed = [](int n) {
    std::string words = R"(["moe")";
    for (int l = 1; l < n; ++l) words += R"(, "moe")";
    return refusal(R"({"model_type": "nemotron_h", "n_routed_experts": 8, "num_experts_per_tok": 2,
                       "layers_block_type": )" +
                   words + "]}");
  };
  CHECK(listed(65536) == "accepted");
  CHECK(listed(65537) ==
        "config.json: field 'layers_block_type': expected at most 65536 layers, found a value of "
        "type array");
  const auto pattern = [](std::size_t n) {
    return refusal(R"({"model_type": "nemotron_h", "n_routed_experts": 8, "num_experts_per_tok": 2,
                       "hybrid_override_pattern": ")" +
                   std::string(n, 'E') + "\"}");
  };
  CHECK(pattern(65536) == "accepted");
  CHECK(pattern(65537) ==
        "config.json: field 'hybrid_override_pattern': expected at most 65536 layers, found a "
        "value of type string");
}

TEST_CASE("a list of k per layer gives each layer its own") {
  const auto all = read_all(R"({"model_type": "hunyuan_v1_moe", "num_experts": 64,
                                "moe_topk": [8, 4, 8], "num_hidden_layers": 3})");
  REQUIRE(all.count == 3);
  CHECK(all.of(0)->k == 8);
  CHECK(all.of(1)->k == 4);
  CHECK(all.of(2)->k == 8);
}

TEST_CASE("numbers as Python writes them are read") {
  CHECK(to_string(read(R"({"model_type": "nemotron_h", "n_routed_experts": 512,
      "num_experts_per_tok": 22, "n_group": 1, "topk_group": 1, "norm_topk_prob": true,
      "routed_scaling_factor": 5.0, "time_step_limit": [0.0, Infinity], "x": [NaN, -Infinity]})")) ==
        "E=512 k=22 score=sigmoid bias=selection normalize=sum eps=9.99999968e-21 eps_mode=add "
        "scale=5");
  CHECK(refusal(R"({"model_type": "hy_v3", "num_experts": 8, "num_experts_per_tok": 2,
                    "router_scaling_factor": Infinity})") ==
        "config.json: field 'router_scaling_factor': expected a positive number, found 'Infinity'");
}

TEST_CASE("a layer has experts where none of all fields that stand together takes them away") {
  test::random rng(71);
  using moeroute::index_t;
  const auto has = [](const nlohmann::json& list, index_t l) {
    return std::find(list.begin(), list.end(), nlohmann::json(l)) != list.end();
  };
  std::set<std::string> types;
  for (const auto& model : moeroute::detail::config_models) {
    const std::string type = model.type, entry = model.entry;
    // These have no list of layers, other sizes, or a document within.
    if (entry == "switch_transformers" || entry == "nllb_moe" || entry == "dbrx" ||
        entry == "dots3_note_vision")
      continue;
    types.insert(type);
    for (int draw = 0; draw < 25; ++draw) {
      const index_t n = 1 + rng.below(12);
      nlohmann::json file{{"model_type", type}, {"num_hidden_layers", n}};
      const auto number = [&](index_t most) { return static_cast<int>(rng.below(most)); };
      const auto flags = [&] {
        nlohmann::json list = nlohmann::json::array();
        for (index_t l = 0; l < n; ++l)
          list.push_back(rng.below(2) == 0 ? nlohmann::json(rng.below(3) > 0)
                                           : nlohmann::json(number(2)));
        return list;
      };
      const auto numbers = [&] {
        nlohmann::json list = nlohmann::json::array();
        for (index_t i = rng.below(4); i > 0; --i) list.push_back(number(n + 2));
        return list;
      };
      // Sizes: one, or one for each layer.
      const auto sizes = [&](const char* name, auto&& one) {
        std::vector<int> of(static_cast<std::size_t>(n), one());
        if (rng.below(2) == 0)
          for (int& size : of) size = one();
        if (rng.below(2) == 0)
          file[name] = of;
        else
          std::fill(of.begin(), of.end(), of[0]), file[name] = of[0];
        return of;
      };
      const std::vector<int> experts = sizes(model.experts, [&] {
        return entry == "doge" ? (number(2) == 0 ? 16 : 64) : 16 + 8 * number(4);
      });
      const std::vector<int> k = sizes(model.k, [&] {
        return entry == "phimoe"      ? 2
               : entry == "zaya"      ? 1
               : entry == "pangu_pro" ? 8 + 8 * number(2)
                                      : 1 + number(4);
      });
      if (model.groups) file["n_group"] = file["topk_group"] = 1;
      const auto maybe = [&](const char* name, auto&& value) {
        if (rng.below(2) == 0) file[name] = value();
        return file.contains(name);
      };
      file[rng.below(2) == 0 ? "first_k_dense_replace" : "num_dense_layers"] = number(4);
      const index_t dense = file.contains("num_dense_layers")
                                ? file["num_dense_layers"].get<index_t>()
                                : file["first_k_dense_replace"].get<index_t>();
      maybe("moe_layer_num_skipped", [&] { return number(3); });
      for (const char* name : {"moe_layer_freq", "is_moe_layer"})
        if (rng.below(3) == 0)
          file[name] = rng.below(2) == 0 ? nlohmann::json(1 + number(3)) : flags();
      maybe("mlp_only_layers", numbers);
      if (rng.below(3) == 0) file["decoder_sparse_step"] = number(4);
      if (rng.below(3) == 0) file["moe_layer_layout"] = flags();
      const bool step3 = entry == "step3" || entry == "step3p7",
                 ernie = entry == "ernie4_5_moe" || entry == "ernie4_5_vl_moe",
                 by_table = type == "deepseek_v4";
      if (step3)
        maybe("moe_layers_enum", [&]() -> nlohmann::json {
          const nlohmann::json list = numbers();
          if (rng.below(2) == 0) return list;
          std::string text;
          for (const auto& one : list) text += (text.empty() ? "" : ", ") + one.dump();
          return text;
        });
      if (entry == "nomic_bert_moe") maybe("moe_every_n_layers", [&] { return number(4); });
      if (entry == "jamba") {
        maybe("expert_layer_period", [&] { return number(4); });
        maybe("expert_layer_offset", [&] { return number(3); });
      }
      if (entry == "llama4_scout") {
        maybe("interleave_moe_layer_step", [&] { return number(4); });
        maybe("moe_layers", numbers);
      }
      if (ernie) {
        maybe("moe_layer_start_index", [&] { return number(4); });
        maybe("moe_layer_end_index", [&] { return number(12) - 1; });
        maybe("moe_layer_interval", [&] { return number(4); });
      }
      if (by_table) maybe("num_hash_layers", [&] { return number(5); });
      const auto value = [&](const char* name, index_t absent) {
        return file.contains(name) ? file[name].get<index_t>() : absent;
      };
      const auto there = [&](index_t l) {
        const auto at = static_cast<std::size_t>(l);
        bool out = l >= dense && l >= value("moe_layer_num_skipped", 0);
        for (const char* name : {"moe_layer_freq", "is_moe_layer", "moe_layer_layout"}) {
          if (!file.contains(name)) continue;
          const nlohmann::json& said = file[name];
          if (said.is_array())
            out = out && (said[at] == true || said[at] == 1);
          else
            out = out && l % said.get<index_t>() == 0;
        }
        if (file.contains("mlp_only_layers")) out = out && !has(file["mlp_only_layers"], l);
        const index_t sparse = value("decoder_sparse_step", 1);
        out = out && (sparse == 0 || (l + 1) % sparse == 0);
        if (step3 && !file.contains("moe_layers_enum"))
          out = out && l >= (entry == "step3" ? 4 : 3);
        if (step3 && file.contains("moe_layers_enum")) {
          nlohmann::json list = file["moe_layers_enum"];
          if (list.is_string()) list = nlohmann::json::parse("[" + list.get<std::string>() + "]");
          out = out && has(list, l);
        }
        if (entry == "nomic_bert_moe") {
          const index_t every = value("moe_every_n_layers", 0);
          out = out && every > 0 && l % every == 1;
        }
        if (entry == "jamba") {
          const index_t period = value("expert_layer_period", 2);
          out = out && (period == 0 || l % period == value("expert_layer_offset", 1));
        }
        if (entry == "llama4_scout") {
          const index_t step = value("interleave_moe_layer_step", 1);
          if (file.contains("moe_layers"))
            out = out && has(file["moe_layers"], l);
          else
            out = out && (step == 0 || (l + 1) % step == 0);
        }
        if (ernie) {
          const index_t last = value("moe_layer_end_index", -1),
                        step = value("moe_layer_interval", 1);
          out = out && l >= value("moe_layer_start_index", 1) && (last < 0 || l <= last) &&
                (step == 0 || (l + 1) % step == 0);
        }
        return out;
      };
      INFO(file.dump());
      const model_routers made = moeroute::routers_from_config(file, "config.json");
      REQUIRE(made.count == n);
      REQUIRE(made.layers.size() == static_cast<std::size_t>(n));
      const index_t more = made.spec.zero_experts;
      CHECK(made.spec.experts == experts[0] + more);
      CHECK(made.spec.k == k[0]);
      for (index_t l = 0; l < n; ++l) {
        INFO("layer " << l);
        const auto at = static_cast<std::size_t>(l);
        const bool table = by_table && l < value("num_hash_layers", 3);
        REQUIRE(made.layers[at].has_value() == (table || there(l)));
        if (!made.layers[at]) continue;
        router_spec want = made.spec;
        want.experts = experts[at] + more;
        want.k = k[at];
        if (table) {
          want.selection = moeroute::selection_kind::expert_table;
          want.selection_bias = false;
        }
        CHECK(*made.layers[at] == want);
      }
    }
  }
  CHECK(types.size() > 80);
}
