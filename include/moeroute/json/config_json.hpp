// The routers of a Hugging Face checkpoint: from its config.json to a router_spec, layer by layer.
// Opt-in, include it and link moeroute::json.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/json/json.hpp>
#include <moeroute/json/model_routers.hpp>
#include <moeroute/json/routing_words.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute {

namespace detail {

/// How the configurations of one model type say what may differ from checkpoint to checkpoint. What
/// they cannot say is that of the catalogue's entry.
struct config_model {
  enum flag { always, off, on };

  const char* type;                       ///< model_type
  const char* entry;                      ///< in the catalogue
  const char* experts = "num_experts";    ///< the field that holds E
  const char* k = "num_experts_per_tok";  ///< the field that holds k, or nullptr where it is fixed
  flag normalize = always;                ///< norm_topk_prob: not a field, or its class default
  bool groups = false;                    ///< n_group, topk_group
  const char* scale = nullptr;            ///< the field that holds the scale
  float scale_absent = 1.0f;              ///< its class default
  index_t dense = 0;                      ///< class default: so many first layers have no experts
};

inline constexpr config_model config_models[] = {
    {.type = "mixtral", .entry = "mixtral", .experts = "num_local_experts"},
    {.type = "minimax", .entry = "minimax", .experts = "num_local_experts"},
    {.type = "minimax_m1", .entry = "minimax", .experts = "num_local_experts"},
    {.type = "minimax_text_01", .entry = "minimax", .experts = "num_local_experts"},
    {.type = "qwen2_moe", .entry = "qwen2_moe", .normalize = config_model::off},
    {.type = "qwen3_moe", .entry = "qwen3_moe", .normalize = config_model::off},
    {.type = "qwen3_next", .entry = "qwen3_next", .normalize = config_model::on},
    {.type = "qwen3_5_moe", .entry = "qwen3_5_moe"},
    {.type = "qwen3_5_moe_text", .entry = "qwen3_5_moe"},
    {.type = "qwen3_vl_moe", .entry = "qwen3_vl_moe"},
    {.type = "qwen3_vl_moe_text", .entry = "qwen3_vl_moe"},
    {.type = "qwen3_omni_moe_thinker",
     .entry = "qwen3_omni_moe_thinker",
     .normalize = config_model::on},
    {.type = "qwen3_omni_moe_text",
     .entry = "qwen3_omni_moe_thinker",
     .normalize = config_model::on},
    {.type = "qwen3_omni_moe_talker",
     .entry = "qwen3_omni_moe_talker",
     .normalize = config_model::off},
    {.type = "qwen3_omni_moe_talker_text",
     .entry = "qwen3_omni_moe_talker",
     .normalize = config_model::off},
    {.type = "olmoe", .entry = "olmoe", .normalize = config_model::off},
    {.type = "flex_olmo", .entry = "flex_olmo", .normalize = config_model::off},
    {.type = "mellum", .entry = "mellum", .normalize = config_model::on},
    {.type = "hunyuan_v1_moe", .entry = "hunyuan_v1_moe", .k = "moe_topk"},
    {.type = "jamba", .entry = "jamba"},
    {.type = "dbrx", .entry = "dbrx", .experts = "moe_num_experts", .k = "moe_top_k"},
    {.type = "deepseek_v2",
     .entry = "deepseek_v2",
     .experts = "n_routed_experts",
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "deepseek_ocr2",
     .entry = "deepseek_ocr2",
     .experts = "n_routed_experts",
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "deepseek_ocr2_text",
     .entry = "deepseek_ocr2",
     .experts = "n_routed_experts",
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "deepseek_v3",
     .entry = "deepseek_v3",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .scale_absent = 2.5f,
     .dense = 3},
    {.type = "kimi_k2",
     .entry = "deepseek_v3",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .scale_absent = 2.5f,
     .dense = 3},
    {.type = "deepseek_v32",
     .entry = "deepseek_v32",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .scale_absent = 2.5f,
     .dense = 3},
    {.type = "dots1",
     .entry = "dots1",
     .experts = "n_routed_experts",
     .normalize = config_model::off,
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "glm4_moe",
     .entry = "glm4_moe",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .dense = 1},
    {.type = "glm4_moe_lite",
     .entry = "glm4_moe_lite",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .scale_absent = 1.8f,
     .dense = 1},
    {.type = "glm4v_moe",
     .entry = "glm4v_moe",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .dense = 1},
    {.type = "glm4v_moe_text",
     .entry = "glm4v_moe",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .dense = 1},
    {.type = "glm_moe_dsa",
     .entry = "glm_moe_dsa",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .scale_absent = 2.5f,
     .dense = 3},
    {.type = "exaone_moe",
     .entry = "exaone_moe",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor",
     .scale_absent = 2.5f,
     .dense = 1},
    {.type = "solar_open",
     .entry = "solar_open",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "nemotron_h",
     .entry = "nemotron_h",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "mistral4",
     .entry = "mistral4",
     .experts = "n_routed_experts",
     .normalize = config_model::on,
     .groups = true,
     .scale = "routed_scaling_factor"},
    {.type = "deepseek_v4",
     .entry = "deepseek_v4",
     .experts = "n_routed_experts",
     .scale = "routed_scaling_factor",
     .scale_absent = 1.5f},
    {.type = "gpt_oss", .entry = "gpt_oss", .experts = "num_local_experts"},
    {.type = "openai_privacy_filter",
     .entry = "openai_privacy_filter",
     .experts = "num_local_experts"},
    {.type = "llama4", .entry = "llama4_scout", .experts = "num_local_experts"},
    {.type = "llama4_text", .entry = "llama4_scout", .experts = "num_local_experts"},
    {.type = "granitemoe", .entry = "granitemoe", .experts = "num_local_experts"},
    {.type = "granitemoehybrid", .entry = "granitemoehybrid", .experts = "num_local_experts"},
    {.type = "granitemoeshared", .entry = "granitemoeshared", .experts = "num_local_experts"},
    {.type = "jetmoe", .entry = "jetmoe", .experts = "num_local_experts"},
    {.type = "aria", .entry = "aria", .experts = "moe_num_experts", .k = "moe_topk"},
    {.type = "aria_text", .entry = "aria", .experts = "moe_num_experts", .k = "moe_topk"},
    {.type = "cohere2_moe", .entry = "cohere2_moe"},
    {.type = "phimoe", .entry = "phimoe", .experts = "num_local_experts"},
    {.type = "ernie4_5_moe", .entry = "ernie4_5_moe", .experts = "moe_num_experts", .k = "moe_k"},
    {.type = "ernie4_5_vl_moe",
     .entry = "ernie4_5_vl_moe",
     .experts = "moe_num_experts",
     .k = "moe_k"},
    {.type = "ernie4_5_vl_moe_text",
     .entry = "ernie4_5_vl_moe",
     .experts = "moe_num_experts",
     .k = "moe_k"},
    {.type = "ernie4_5_moe_vl",
     .entry = "ernie4_5_vl_moe",
     .experts = "moe_num_experts",
     .k = "moe_k"},
    {.type = "longcat_flash",
     .entry = "longcat_flash",
     .experts = "n_routed_experts",
     .k = "moe_topk",
     .scale = "routed_scaling_factor",
     .scale_absent = 6.0f},
    {.type = "minimax_m2", .entry = "minimax_m2", .experts = "num_local_experts"},
    {.type = "minimax_m3_vl",
     .entry = "minimax_m3_vl",
     .experts = "num_local_experts",
     .scale = "routed_scaling_factor",
     .scale_absent = 2.0f},
    {.type = "minimax_m3_vl_text",
     .entry = "minimax_m3_vl",
     .experts = "num_local_experts",
     .scale = "routed_scaling_factor",
     .scale_absent = 2.0f},
    {.type = "hy_v3",
     .entry = "hy_v3",
     .scale = "router_scaling_factor",
     .scale_absent = 2.826f,
     .dense = 1},
    {.type = "laguna", .entry = "laguna", .scale = "moe_routed_scaling_factor", .dense = 1},
    {.type = "lfm2_moe",
     .entry = "lfm2_moe",
     .normalize = config_model::on,
     .scale = "routed_scaling_factor",
     .dense = 2},
    {.type = "afmoe", .entry = "afmoe", .scale = "route_scale", .dense = 1},
    {.type = "gemma4", .entry = "gemma4", .k = "top_k_experts"},
    {.type = "gemma4_text", .entry = "gemma4", .k = "top_k_experts"},
    {.type = "diffusion_gemma", .entry = "diffusion_gemma", .k = "top_k_experts"},
    {.type = "diffusion_gemma_text", .entry = "diffusion_gemma", .k = "top_k_experts"},
    {.type = "switch_transformers", .entry = "switch_transformers", .k = nullptr},
    {.type = "nllb-moe", .entry = "nllb_moe", .k = nullptr},
    {.type = "doge", .entry = "doge"},
};

inline const config_model* config_model_of(std::string_view type) {
  for (const config_model& one : config_models)
    if (type == one.type) return &one;
  return nullptr;
}

/// One configuration with experts in it, and where it stands.
struct config_source {
  const config_model& model;
  const json_fields& fields;  ///< of the routers
  const json_fields& around;  ///< of the layers; the same object but for DBRX
};

/// The spelling of a field that the file has; the field's own name where it has none.
///
/// Configurations are older than their classes, and the classes map some names. Two spellings with
/// two values are refused: readers differ in which of them they take.
inline std::string spelled(const json_fields& fields, std::string_view name) {
  static constexpr std::initializer_list<std::initializer_list<const char*>> alike = {
      {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"},
      {"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k",
       "moe_k", "top_k_experts", "num_selected_experts"},
      {"routed_scaling_factor", "router_scaling_factor", "moe_routed_scaling_factor",
       "route_scale"},
      {"norm_topk_prob", "route_norm", "moe_renormalize"},
      {"n_group", "num_expert_group", "num_expert_groups"},
      {"topk_group", "num_limited_groups"},
      {"first_k_dense_replace", "num_dense_layers"},
  };
  std::string taken;
  const auto look = [&](const std::string& one) {
    if (!fields.said(one)) return;
    if (taken.empty() || fields.at(taken).is_null())
      taken = one;
    else if (!fields.at(one).is_null() && fields.at(one) != fields.at(taken))
      fields.wrong(
          one, "what field '" + taken + "' says, which is " + json_fields::show(fields.at(taken)));
  };
  look(std::string(name));
  for (const auto& group : alike)
    for (const char* one : group)
      if (name == one)
        for (const char* other : group)
          if (name != other) look(other);
  return taken.empty() ? std::string(name) : taken;
}

/// As Python takes it: null is false.
inline bool truth(const json_fields& fields, const std::string& name, bool absent) {
  return fields.said(name) ? fields.flag(name, false) : absent;
}

inline bool says_nothing(const nlohmann::json& value) {
  return value.is_null() || value == false || (value.is_number() && value == 0);
}

/// Sizes per layer: one, or as many as the file lists.
inline std::vector<index_t> sizes_of(const json_fields& fields, const std::string& name,
                                     index_t high) {
  if (!fields.at(name).is_array()) return {static_cast<index_t>(fields.integer(name, 1, high))};
  std::vector<index_t> sizes;
  for (const nlohmann::json& one : fields.at(name)) {
    const nlohmann::json single{{name, one}};
    sizes.push_back(
        static_cast<index_t>(json_fields(single, fields.where()).integer(name, 1, high)));
  }
  if (sizes.empty()) fields.wrong(name, "a number");
  if (std::equal(sizes.begin() + 1, sizes.end(), sizes.begin())) return {sizes.front()};
  return sizes;
}

inline void no_normalization(router_spec& s) {
  s.normalize = normalization::none;
  s.eps_where = eps_mode::none;
  s.eps = 0.0f;
}

inline void read_groups(const config_source& from, router_spec& s) {
  const json_fields& fields = from.fields;
  const std::string_view entry = from.model.entry;
  const bool v2 = entry == "deepseek_v2" || entry == "deepseek_ocr2";
  const router_spec& published = find_in_catalog(entry)->spec;
  const std::string n = spelled(fields, "n_group"), kept = spelled(fields, "topk_group");
  // The class of V2 has no groups where it says null, and none where its method is greedy.
  bool limits = !v2;
  if (v2 && fields.said("topk_method")) {
    const std::string method = fields.text("topk_method");
    if (method != "greedy" && method != "group_limited_greedy")
      fields.wrong("topk_method", "greedy or group_limited_greedy");
    limits = method != "greedy";
  } else if (!v2 && fields.has("topk_method") && fields.text("topk_method") != "noaux_tc") {
    fields.wrong("topk_method", "noaux_tc");
  }
  s.groups = s.topk_group = 1;
  if (limits) {
    s.groups = v2 ? 1 : published.groups;
    s.topk_group = v2 ? 1 : published.topk_group;
    if (fields.said(n)) s.groups = static_cast<index_t>(fields.integer(n, 1, s.experts));
    if (fields.said(kept)) s.topk_group = static_cast<index_t>(fields.integer(kept, 1, s.groups));
    if (s.topk_group > s.groups)
      fail("json", fields.where() + ": field '" + n + "' is " + std::to_string(s.groups) +
                       ", expected at least topk_group, which is " + std::to_string(s.topk_group) +
                       " by default");
  }
  // One group limits nothing, whatever it is worth.
  const bool zero = v2 || entry == "mistral4";
  s.group_score = s.groups > 1 && v2 ? group_score::max : group_score::top2_sum;
  s.group_fill = s.groups > 1 && zero ? 0.0f : router_spec{}.group_fill;
}

inline void read_score(const config_source& from, router_spec& s) {
  const json_fields& fields = from.fields;
  const std::string_view entry = from.model.entry;
  if (entry == "cohere2_moe" && fields.has("expert_selection_fn")) {
    const std::string word = fields.text("expert_selection_fn");
    if (word != "softmax" && word != "sigmoid")
      fields.wrong("expert_selection_fn", "softmax or sigmoid");
    // The softmax of the selected sums to one, divided or not.
    const std::string norm = spelled(fields, "norm_topk_prob");
    const bool divided = truth(fields, norm, true);
    if (word == "sigmoid") s.score = score_kind::sigmoid;
    if (word == "sigmoid" && divided) s.normalize = normalization::sum;
  }
  if (entry == "deepseek_v4" && fields.said("scoring_func")) {
    const std::string word = fields.text("scoring_func");
    if (word != "sqrtsoftplus" && word != "sigmoid")
      fields.wrong("scoring_func", "sqrtsoftplus or sigmoid");
    if (word == "sigmoid") s.score = score_kind::sigmoid;
  }
}

/// The sum of the last axis is 1 (or what a scale makes of it).
inline bool divides(const router_spec& s) { return s.normalize != normalization::none; }
inline bool sums_to_one(const router_spec& s) {
  return divides(s) || (s.score == score_kind::softmax && s.domain == score_domain::selected);
}

// What only one model type can say.
inline void read_own(const config_source& from, router_spec& s) {
  const json_fields& fields = from.fields;
  const std::string_view entry = from.model.entry;
  const auto bias_by = [&](const char* name) {
    if (!truth(fields, name, true)) s.selection_bias = false;
  };
  if (entry == "dbrx" && fields.said("moe_normalize_expert_weights")) {
    if (fields.has("moe_normalize_expert_weights"))
      s.lp_p = static_cast<float>(fields.positive("moe_normalize_expert_weights"));
    else
      no_normalization(s);
  }
  if (entry == "phimoe") {
    if (s.k != 2) fields.wrong(spelled(fields, from.model.k), "2: sparsemixer makes two choices");
    if (fields.said("router_jitter_noise") && fields.at("router_jitter_noise") != 0)
      s.jitter = static_cast<float>(fields.positive("router_jitter_noise"));
    else if (fields.said("router_jitter_noise"))
      s.jitter = 0.0f;
  }
  if (entry == "lfm2_moe") bias_by("use_expert_bias");
  if (entry == "minimax_m2" || entry == "minimax_m3_vl") bias_by("use_routing_bias");
  if (entry == "hy_v3") bias_by("moe_router_enable_expert_bias");
  if ((entry == "hy_v3" || entry == "laguna") && !truth(fields, "moe_router_use_sigmoid", true))
    fields.wrong("moe_router_use_sigmoid", "true: the class knows nothing else");
  if (entry == "afmoe" && !truth(fields, spelled(fields, "route_norm"), true)) no_normalization(s);
  if (entry == "laguna" && fields.said("moe_router_logit_softcapping") &&
      fields.at("moe_router_logit_softcapping") != 0)
    s.softcap = static_cast<float>(fields.positive("moe_router_logit_softcapping"));
  if (entry == "longcat_flash") {
    // Null is none, as the class has it; absent is the class's default.
    s.zero_experts = 256;
    if (fields.said("zero_expert_num"))
      s.zero_experts = fields.has("zero_expert_num")
                           ? static_cast<index_t>(fields.integer("zero_expert_num", 0, 1 << 19))
                           : 0;
    if (fields.has("zero_expert_type") && fields.text("zero_expert_type") != "identity")
      fields.wrong("zero_expert_type", "identity");
    s.gate_bias = truth(fields, "router_bias", false);
    s.experts += s.zero_experts;
  }
  if (entry == "openai_privacy_filter") s.output_scale = static_cast<float>(s.k);
  for (const char* name : {"enable_moe_block", "is_moe"})
    if (fields.has(name) && !fields.flag(name, true))
      fields.wrong(name, "true: without it the model has no router");
  if (entry == "nllb_moe") {
    // The capacity is a fraction of the tokens: for the caller, who knows how many there are.
    s.capacity = 0;
    s.normalize_before_drop = truth(fields, "normalize_router_prob_before_dropping", false);
    if (fields.has("second_expert_policy") && fields.text("second_expert_policy") != "all")
      fields.wrong("second_expert_policy", "all: the others draw random numbers");
    s.gate_bias = truth(fields, "router_bias", false);
  }
  if (entry == "switch_transformers") s.gate_bias = truth(fields, "router_bias", false);
  if (entry.starts_with("ernie4_5") && fields.said("moe_norm_min"))
    s.eps = static_cast<float>(fields.positive("moe_norm_min"));
}

/// A key that the class does not read must say what the class does anyway. False: it is none of
/// these keys.
inline bool agrees(const config_source& from, const std::string& key, const router_spec& s) {
  const json_fields& fields = from.fields;
  const nlohmann::json& value = fields.at(key);
  const auto among = [&](std::initializer_list<const char*> keys) {
    for (const char* one : keys)
      if (key == one) return true;
    return false;
  };
  const auto must = [&](bool agreed, const std::string& expected) {
    if (!agreed) fields.wrong(key, expected + ": the class knows nothing else");
    return true;
  };
  const std::string score(to_string(s.score));
  if (among({"norm_topk_prob", "route_norm", "moe_renormalize", "moe_norm_gate_logits"}))
    return must(
        value.is_null() || (value == true && sums_to_one(s)) || (value == false && !divides(s)),
        divides(s) ? "true" : "false");
  if (among({"scoring_func", "score_func", "score_function", "scoring_function",
             "moe_router_activation", "moe_router_activation_func", "moe_router_score_func",
             "moe_router_score_function", "router_score_function", "moe_score_func",
             "expert_selection_fn", "moe_gate_act"}))
    // dots1 names its method of selection here.
    return must(value.is_null() || value == score ||
                    (value == "noaux_tc" && std::string_view(from.model.entry) == "dots1"),
                score);
  if (among({"n_group", "num_expert_group", "num_expert_groups"}))
    return must(says_nothing(value) || value == 1, "1 or null");
  if (among({"topk_group", "num_limited_groups", "routed_scaling_factor", "router_scaling_factor",
             "moe_routed_scaling_factor", "route_scale"}))
    return must(says_nothing(value) || value == 1, "1 or null");
  if (among({"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk",
             "moe_top_k", "moe_k", "num_selected_experts"}))
    return must(value == s.k, std::to_string(s.k));
  if (key == "topk_method")
    return must(value.is_null() || value == (s.selection_bias ? "noaux_tc" : "greedy"),
                s.selection_bias ? "noaux_tc" : "greedy");
  if (among({"use_expert_bias", "use_routing_bias", "moe_router_enable_expert_bias",
             "moe_use_aux_free", "e_score_correction_bias", "use_correction_bias"}))
    return must(value.is_null() || value == s.selection_bias, s.selection_bias ? "true" : "false");
  if (among({"router_bias", "moe_router_bias", "gate_bias"}))
    return must(says_nothing(value) ? !s.gate_bias : value == s.gate_bias,
                s.gate_bias ? "true" : "false");
  if (among({"group_limited_greedy", "use_grouped_topk", "uniform_expert_assignment",
             "batch_prioritized_routing", "moe_apply_router_weight_on_input",
             "moe_router_logit_softcapping", "router_logit_softcapping", "moe_use_hard_gate",
             "zero_expert_num", "moe_group_experts", "moe_router_force_load_balancing",
             "moe_drop_tokens", "moe_reverse_token_drop", "moe_random_routing_dropped_token",
             "moe_use_token_type_bias"}))
    return must(says_nothing(value) || (key == "use_grouped_topk" && s.groups == 1),
                "false, 0 or null");
  if (key == "moe_gate") return must(value == "topk" || value == "top2_fused", "topk");
  // What means nothing of routing in these classes alone.
  const std::string_view entry = from.model.entry;
  const bool encoder_decoder = entry == "switch_transformers" || entry == "nllb_moe";
  if (among({"router_type", "expert_capacity", "moe_eval_capacity_token_fraction"}))
    return encoder_decoder;
  if (key == "moe_capacity") return entry.starts_with("ernie4_5");
  if (key == "n_groups") return entry == "nemotron_h";  // Mamba's
  if (key == "gating") return entry == "laguna";        // attention's
  return false;
}

/// Which layers have experts, and which of those a table of token ids; `n` becomes the number of
/// layers where the file says it.
inline std::vector<layer_router> read_layers(const config_source& from, bool by_table, index_t& n) {
  using enum layer_router;
  const json_fields& f = from.around;
  if (const std::string_view entry = from.model.entry;
      entry == "switch_transformers" || entry == "nllb_moe")
    return {};                       // an encoder and a decoder, each with layers of its own
  constexpr index_t most = 1 << 16;  // layers: far more than any model has
  const auto count = [&](const char* name, index_t absent) {
    if (!f.said(name)) return absent;
    return f.has(name) ? static_cast<index_t>(f.integer(name, 0, most)) : 0;
  };
  for (const char* name : {"num_hidden_layers", "n_layers", "num_layers"})
    if (n == 0 && f.has(name)) n = static_cast<index_t>(f.integer(name, 0, most));

  // Words, one per layer.
  for (const char* name : {"mlp_layer_types", "layers_block_type"}) {
    if (!f.has(name)) continue;
    std::vector<layer_router> layers;
    for (const nlohmann::json& word : f.array(name)) {
      if (word == "sparse" || word == "moe")
        layers.push_back(by_score);
      else if (word == "hash_moe" && by_table)
        layers.push_back(table);
      else if (word == "dense" || word == "mlp" || word == "mamba" || word == "attention")
        layers.push_back(none);
      else
        fail("json", f.where() + ": field '" + name + "': expected " +
                         (by_table ? "hash_moe or moe" : "dense, sparse or moe") + ", found " +
                         json_fields::show(word));
    }
    const auto listed = static_cast<index_t>(layers.size());
    if (listed > most) f.wrong(name, "at most " + std::to_string(most) + " layers");
    if (n != 0 && listed != n && std::string_view(name) != "layers_block_type")
      fail("json", f.where() + ": field '" + name + "' lists " + std::to_string(listed) +
                       " layers, field 'num_hidden_layers' says " + std::to_string(n));
    if (by_table && f.has("num_hash_layers")) {
      const index_t said = count("num_hash_layers", 0);
      for (index_t l = 0; l < listed; ++l)
        if ((layers[static_cast<std::size_t>(l)] == table) != (l < said))
          f.wrong("num_hash_layers", std::string("as many as field '") + name + "' lists first");
    }
    n = listed;
    return layers;
  }
  if (f.has("hybrid_override_pattern")) {
    std::vector<layer_router> layers;
    for (const char c : f.text("hybrid_override_pattern")) {
      if (c == '|' || c == ' ') continue;
      layers.push_back(c == 'E' ? by_score : none);
      if (static_cast<index_t>(layers.size()) > most)
        f.wrong("hybrid_override_pattern", "at most " + std::to_string(most) + " layers");
    }
    n = static_cast<index_t>(layers.size());
    return layers;
  }
  const index_t tables = by_table ? count("num_hash_layers", 3) : 0;
  if (n == 0) {
    return std::vector<layer_router>(static_cast<std::size_t>(tables), table);
  }

  std::vector<layer_router> layers(static_cast<std::size_t>(n), by_score);
  const auto without = [&](auto&& condition) {
    for (index_t l = 0; l < n; ++l)
      if (condition(l)) layers[static_cast<std::size_t>(l)] = none;
  };
  const std::string first = spelled(f, "first_k_dense_replace");
  const index_t dense = f.said(first) ? count(first.c_str(), 0) : from.model.dense;
  without([&](index_t l) { return l < dense; });
  if (const index_t skipped = count("moe_layer_num_skipped", 0); skipped != 0)
    without([&](index_t l) { return l < skipped; });
  for (const char* name : {"moe_layer_freq", "is_moe_layer"}) {
    if (!f.has(name)) continue;
    if (!f.at(name).is_array()) {
      const index_t every = static_cast<index_t>(f.integer(name, 1, most));
      without([&](index_t l) { return l % every != 0; });
      continue;
    }
    const nlohmann::json& list = f.at(name);
    if (static_cast<index_t>(list.size()) != n)
      fail("json", f.where() + ": field '" + name + "' lists " + std::to_string(list.size()) +
                       " layers, field 'num_hidden_layers' says " + std::to_string(n));
    without([&](index_t l) { return says_nothing(list[static_cast<std::size_t>(l)]); });
  }
  const auto listed = [&](const char* name, index_t l) {
    for (const nlohmann::json& one : f.array(name))
      if (one == l) return true;
    return false;
  };
  if (f.has("mlp_only_layers")) without([&](index_t l) { return listed("mlp_only_layers", l); });
  if (const index_t step = count("decoder_sparse_step", 1); step > 1)
    without([&](index_t l) { return (l + 1) % step != 0; });
  if (const std::string_view entry = from.model.entry; entry == "jamba") {
    const index_t period = count("expert_layer_period", 2),
                  offset = count("expert_layer_offset", 1);
    if (period > 0) without([&](index_t l) { return l % period != offset; });
  } else if (entry == "llama4_scout") {
    const index_t step = count("interleave_moe_layer_step", 1);
    if (f.has("moe_layers"))
      without([&](index_t l) { return !listed("moe_layers", l); });
    else if (step > 1)
      without([&](index_t l) { return (l + 1) % step != 0; });
  } else if (entry == "ernie4_5_moe" || entry == "ernie4_5_vl_moe") {
    // One number, or one for each modality: those of text come first.
    const auto bound = [&](const char* name, index_t absent) {
      if (!f.has(name)) return absent;
      const nlohmann::json& value = f.at(name);
      const nlohmann::json single{{name, value.is_array() && !value.empty() ? value[0] : value}};
      return static_cast<index_t>(json_fields(single, f.where()).integer(name, -1, most));
    };
    const index_t begin = bound("moe_layer_start_index", 1);
    const index_t last = bound("moe_layer_end_index", -1);
    const index_t step = count("moe_layer_interval", 1);
    without([&](index_t l) {
      return l < begin || (last >= 0 && l > last) || (step > 0 && (l + 1) % step != 0);
    });
  }
  for (index_t l = 0; l < tables && l < n; ++l) layers[static_cast<std::size_t>(l)] = table;
  return layers;
}

// Keys that speak of routing and were not read: they say what the class does, or nothing of it, or
// the file is refused.
inline void refuse_unread(const config_source& from, const router_spec& s) {
  for (const json_fields* fields : {&from.fields, &from.around}) {
    for (const auto& [key, value] : fields->object().items()) {
      if (from.fields.asked(key) || from.around.asked(key)) continue;
      if (!speaks_of_routing(key) || harmless_in_config(key)) continue;
      if (fields == &from.fields && agrees(from, key, s)) continue;
      fail("json", fields->where() + ": field '" + printable(key) +
                       "' speaks of routing and is not known, found " + json_fields::show(value));
    }
    if (&from.fields == &from.around) return;
  }
}

inline model_routers read_config(const config_source& from) {
  const json_fields& fields = from.fields;
  const config_model& model = from.model;
  router_spec s = find_in_catalog(model.entry)->spec;
  const std::vector<index_t> experts =
      sizes_of(fields, spelled(fields, model.experts), max_experts);
  s.experts = experts.front();
  s.zero_experts = 0;
  if (model.normalize != config_model::always) {
    const std::string norm = spelled(fields, "norm_topk_prob");
    if (!truth(fields, norm, model.normalize == config_model::on))
      no_normalization(s);
    else
      s.normalize = normalization::sum;
  }
  if (model.scale != nullptr) {
    const std::string scale = spelled(fields, model.scale);
    s.scale = fields.said(scale) ? static_cast<float>(fields.positive(scale)) : model.scale_absent;
  }
  std::vector<index_t> k{s.k};
  if (model.k != nullptr) {
    // LongCat's choices may be zero experts too, which stand in a field of their own.
    const index_t extra = std::string_view(model.entry) == "longcat_flash" ? max_experts : 0;
    k = sizes_of(fields, spelled(fields, model.k),
                 *std::max_element(experts.begin(), experts.end()) + extra);
  }
  s.k = k.front();
  if (model.groups) read_groups(from, s);
  read_score(from, s);
  read_own(from, s);
  const bool by_table = std::string_view(model.type) == "deepseek_v4";
  index_t count = 0;
  const std::vector<layer_router> layers = read_layers(from, by_table, count);
  refuse_unread(from, s);

  model_routers made{
      .entry = find_in_catalog(model.entry), .spec = s, .layers = {}, .count = count};
  const auto one_each = [&](const std::vector<index_t>& sizes, const char* name) {
    if (sizes.size() > 1 && sizes.size() != layers.size())
      fields.wrong(spelled(fields, name),
                   "one number, or one for each of " + std::to_string(layers.size()) + " layers");
  };
  one_each(experts, model.experts);
  if (model.k != nullptr) one_each(k, model.k);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    router_spec own = s;
    if (experts.size() > 1) own.experts = experts[l] + s.zero_experts;
    if (k.size() > 1) own.k = k[l];
    if (layers[l] == layer_router::table) {
      own.selection = selection_kind::expert_table;
      own.selection_bias = false;
    }
    made.layers.push_back(layers[l] == layer_router::none ? std::nullopt : std::optional(own));
  }
  made.check(fields.where());
  return made;
}

}  // namespace detail

/// The routers that a config.json describes, of one of the model types that the catalogue has; the
/// text model of a wrapper that holds one (text_config, llm_config, language_config).
///
/// Fields that are absent have the default of the model's class; null is what the class makes of
/// it. A field that speaks of routing is read, or says what the class does anyway, or is one of a
/// list that changes no routing; any other is refused.
///
/// Throws: error that names `file`, the field and what was expected.
///
///     const nlohmann::json document = moeroute::parse_json(text, "config.json");
///     const moeroute::model_routers model = moeroute::routers_from_config(document,
///     "config.json"); std::puts(to_string(model.spec).c_str());
[[nodiscard]] inline model_routers routers_from_config(const nlohmann::json& document,
                                                       const std::string& file) {
  using namespace detail;
  const json_fields top(document, file);
  const std::string type = top.text("model_type");
  const config_model* model = config_model_of(type);
  const char* wrapped = nullptr;
  // An omni model is a thinker and a talker; text is the thinker's.
  for (const char* name : {"thinker_config", "text_config", "llm_config", "language_config"}) {
    if (!top.has(name)) continue;
    if (wrapped != nullptr)
      fail("json", file + ": fields '" + wrapped + "' and '" + name + "' both hold a model");
    wrapped = name;
  }
  if (wrapped != nullptr) {
    const std::string where = file + ": field '" + wrapped + "'";
    const json_fields inner(top.at(wrapped), where);
    if (std::string_view(wrapped) == "thinker_config")
      return routers_from_config(inner.object(), where);
    const config_model* own =
        inner.has("model_type") ? config_model_of(inner.text("model_type")) : nullptr;
    if (model == nullptr) model = own;
    // MiniMax-M3 names the class that its text model was derived from.
    if (model != nullptr && own != nullptr && std::string_view(model->entry) != own->entry &&
        type != "minimax_m3_vl")
      inner.wrong("model_type", "the text model of '" + type + "'");
    if (model == nullptr && inner.has("model_type"))
      inner.wrong("model_type", "a mixture-of-experts model of the catalogue");
    if (model != nullptr) {
      const model_routers made = read_config({*model, inner, inner});
      for (const auto& [key, value] : document.items())
        if (speaks_of_routing(key) && !harmless_in_config(key) &&
            !(inner.object().contains(key) && inner.object()[key] == value))
          fail("json", file + ": field '" + printable(key) + "' beside '" + wrapped +
                           "' speaks of routing, found " + json_fields::show(value));
      return made;
    }
  }
  if (model == nullptr) top.wrong("model_type", "a mixture-of-experts model of the catalogue");
  if (std::string_view(model->entry) == "dbrx") {
    const json_fields inner(top.at("ffn_config"), file + ": field 'ffn_config'");
    return read_config({*model, inner, top});
  }
  return read_config({*model, top, top});
}

}  // namespace moeroute
