#include "support/hf_router_config.hpp"

#include <catch2/catch_test_macros.hpp>
#include <set>
#include <string>
#include <string_view>

using example::json;
using example::spec_from_config;
using moeroute::find_in_catalog;
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
};

router_spec read(const std::string& config, std::int64_t layer = 40) {
  return spec_from_config(json::parse(config), "config.json", layer);
}

// What reading refuses the config with.
std::string refusal(const std::string& config) {
  try {
    read(config);
  } catch (const example::input_error& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE("a published model's config.json gives the catalogue's spec") {
  for (const sample& one : samples) {
    INFO(one.entry);
    CHECK(to_string(read(one.config)) == to_string(find_in_catalog(one.entry)->spec));
    CHECK(read(one.config) == find_in_catalog(one.entry)->spec);
  }
}

TEST_CASE("every router of the catalogue has a config.json that it is read from") {
  std::set<std::string_view> read_from{"deepseek_v4_hash", "nllb_moe", "nllb_moe_bpr"};  // below
  for (const sample& one : samples) read_from.insert(one.entry);
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    INFO(entry.name);
    CHECK(read_from.contains(entry.name));
  }
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
        "config.json: field 'scoring_func': expected sigmoid, found 'softmax'");
  CHECK(refusal(R"({"model_type": "deepseek_v2", "n_routed_experts": 64, "num_experts_per_tok": 6,
                    "topk_method": "best"})") ==
        "config.json: field 'topk_method': expected greedy or group_limited_greedy, found 'best'");
  CHECK(
      refusal(R"({"model_type": "hunyuan_v1_moe", "num_experts": 64, "moe_topk": [8, 4]})") ==
      "config.json: field 'moe_topk': expected one number, or a list of equal ones, found a value "
      "of type array");
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
