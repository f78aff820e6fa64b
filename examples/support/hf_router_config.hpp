// The router of a Hugging Face checkpoint: from its config.json to a router_spec.
#pragma once

#include <moeroute/policy/catalog.hpp>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "json.hpp"

namespace example {

namespace detail {

using moeroute::index_t;
using moeroute::router_spec;

/// How the configurations of one model type say what may differ from checkpoint to checkpoint. What
/// they cannot say is that of the catalogue's entry.
struct hf_model {
  const char* type;             ///< model_type
  const char* entry;            ///< in the catalogue
  const char* experts;          ///< the field that holds E
  const char* k;                ///< the field that holds k, or nullptr where the class fixes it
  const char* inner = nullptr;  ///< the object that these fields are in, where it is not the top
  enum flag { always, off, on } normalize = always;  ///< norm_topk_prob: none, or its class default
  bool groups = false;                               ///< n_group, topk_group
  const char* scale = nullptr;                       ///< the field that holds the scale
  float scale_absent = 1.0f;                         ///< its class default
};

inline constexpr hf_model hf_models[] = {
    {"mixtral", "mixtral", "num_local_experts", "num_experts_per_tok"},
    {"minimax", "minimax", "num_local_experts", "num_experts_per_tok"},
    {"qwen2_moe", "qwen2_moe", "num_experts", "num_experts_per_tok", nullptr, hf_model::off},
    {"qwen3_moe", "qwen3_moe", "num_experts", "num_experts_per_tok", nullptr, hf_model::off},
    {"qwen3_next", "qwen3_next", "num_experts", "num_experts_per_tok", nullptr, hf_model::on},
    {"qwen3_5_moe", "qwen3_5_moe", "num_experts", "num_experts_per_tok", "text_config"},
    {"qwen3_5_moe_text", "qwen3_5_moe", "num_experts", "num_experts_per_tok"},
    {"qwen3_vl_moe", "qwen3_vl_moe", "num_experts", "num_experts_per_tok", "text_config"},
    {"qwen3_vl_moe_text", "qwen3_vl_moe", "num_experts", "num_experts_per_tok"},
    {"qwen3_omni_moe_thinker", "qwen3_omni_moe_thinker", "num_experts", "num_experts_per_tok",
     "text_config", hf_model::on},
    {"qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "num_experts", "num_experts_per_tok", nullptr,
     hf_model::on},
    {"qwen3_omni_moe_talker", "qwen3_omni_moe_talker", "num_experts", "num_experts_per_tok",
     "text_config", hf_model::off},
    {"qwen3_omni_moe_talker_text", "qwen3_omni_moe_talker", "num_experts", "num_experts_per_tok",
     nullptr, hf_model::off},
    {"olmoe", "olmoe", "num_experts", "num_experts_per_tok", nullptr, hf_model::off},
    {"flex_olmo", "flex_olmo", "num_experts", "num_experts_per_tok", nullptr, hf_model::off},
    {"mellum", "mellum", "num_experts", "num_experts_per_tok", nullptr, hf_model::on},
    {"hunyuan_v1_moe", "hunyuan_v1_moe", "num_experts", "moe_topk"},
    {"jamba", "jamba", "num_experts", "num_experts_per_tok"},
    {"dbrx", "dbrx", "moe_num_experts", "moe_top_k", "ffn_config"},
    {"deepseek_v2", "deepseek_v2", "n_routed_experts", "num_experts_per_tok", nullptr,
     hf_model::always, true, "routed_scaling_factor"},
    {"deepseek_ocr2", "deepseek_ocr2", "n_routed_experts", "num_experts_per_tok", "text_config",
     hf_model::always, true, "routed_scaling_factor"},
    {"deepseek_v3", "deepseek_v3", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on,
     true, "routed_scaling_factor", 2.5f},
    {"kimi_k2", "deepseek_v3", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on,
     true, "routed_scaling_factor", 2.5f},
    {"deepseek_v32", "deepseek_v32", "n_routed_experts", "num_experts_per_tok", nullptr,
     hf_model::on, true, "routed_scaling_factor", 2.5f},
    {"dots1", "dots1", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::off, true,
     "routed_scaling_factor"},
    {"glm4_moe", "glm4_moe", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on, true,
     "routed_scaling_factor"},
    {"glm4_moe_lite", "glm4_moe_lite", "n_routed_experts", "num_experts_per_tok", nullptr,
     hf_model::on, true, "routed_scaling_factor", 1.8f},
    {"glm4v_moe", "glm4v_moe", "n_routed_experts", "num_experts_per_tok", "text_config",
     hf_model::on, true, "routed_scaling_factor"},
    {"glm4v_moe_text", "glm4v_moe", "n_routed_experts", "num_experts_per_tok", nullptr,
     hf_model::on, true, "routed_scaling_factor"},
    {"glm_moe_dsa", "glm_moe_dsa", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on,
     true, "routed_scaling_factor", 2.5f},
    {"exaone_moe", "exaone_moe", "num_experts", "num_experts_per_tok", nullptr, hf_model::on, true,
     "routed_scaling_factor", 2.5f},
    {"solar_open", "solar_open", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on,
     true, "routed_scaling_factor"},
    {"nemotron_h", "nemotron_h", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on,
     true, "routed_scaling_factor"},
    {"mistral4", "mistral4", "n_routed_experts", "num_experts_per_tok", nullptr, hf_model::on, true,
     "routed_scaling_factor"},
    {"deepseek_v4", "deepseek_v4", "n_routed_experts", "num_experts_per_tok", nullptr,
     hf_model::always, false, "routed_scaling_factor", 1.5f},
    {"gpt_oss", "gpt_oss", "num_local_experts", "num_experts_per_tok"},
    {"openai_privacy_filter", "openai_privacy_filter", "num_local_experts", "num_experts_per_tok"},
    {"llama4", "llama4_scout", "num_local_experts", "num_experts_per_tok", "text_config"},
    {"llama4_text", "llama4_scout", "num_local_experts", "num_experts_per_tok"},
    {"granitemoe", "granitemoe", "num_local_experts", "num_experts_per_tok"},
    {"granitemoehybrid", "granitemoehybrid", "num_local_experts", "num_experts_per_tok"},
    {"granitemoeshared", "granitemoeshared", "num_local_experts", "num_experts_per_tok"},
    {"jetmoe", "jetmoe", "num_local_experts", "num_experts_per_tok"},
    {"aria", "aria", "moe_num_experts", "moe_topk", "text_config"},
    {"aria_text", "aria", "moe_num_experts", "moe_topk"},
    {"cohere2_moe", "cohere2_moe", "num_experts", "num_experts_per_tok"},
    {"phimoe", "phimoe", "num_local_experts", "num_experts_per_tok"},
    {"ernie4_5_moe", "ernie4_5_moe", "moe_num_experts", "moe_k"},
    {"ernie4_5_vl_moe", "ernie4_5_vl_moe", "moe_num_experts", "moe_k", "text_config"},
    {"longcat_flash", "longcat_flash", "n_routed_experts", "moe_topk", nullptr, hf_model::always,
     false, "routed_scaling_factor", 6.0f},
    {"minimax_m2", "minimax_m2", "num_local_experts", "num_experts_per_tok"},
    {"minimax_m3_vl", "minimax_m3_vl", "num_local_experts", "num_experts_per_tok", "text_config",
     hf_model::always, false, "routed_scaling_factor", 2.0f},
    {"minimax_m3_vl_text", "minimax_m3_vl", "num_local_experts", "num_experts_per_tok", nullptr,
     hf_model::always, false, "routed_scaling_factor", 2.0f},
    {"hy_v3", "hy_v3", "num_experts", "num_experts_per_tok", nullptr, hf_model::always, false,
     "router_scaling_factor", 2.826f},
    {"laguna", "laguna", "num_experts", "num_experts_per_tok", nullptr, hf_model::always, false,
     "moe_routed_scaling_factor"},
    {"lfm2_moe", "lfm2_moe", "num_experts", "num_experts_per_tok", nullptr, hf_model::on, false,
     "routed_scaling_factor"},
    {"afmoe", "afmoe", "num_experts", "num_experts_per_tok", nullptr, hf_model::always, false,
     "route_scale"},
    {"gemma4", "gemma4", "num_experts", "top_k_experts", "text_config"},
    {"gemma4_text", "gemma4", "num_experts", "top_k_experts"},
    {"diffusion_gemma", "diffusion_gemma", "num_experts", "top_k_experts", "text_config"},
    {"switch_transformers", "switch_transformers", "num_experts", nullptr},
    {"nllb-moe", "nllb_moe", "num_experts", nullptr},
    {"doge", "doge", "num_experts", "num_experts_per_tok"},
};

/// The spellings of a field: configurations are older than their classes, and the classes map some
/// names.
[[nodiscard]] inline std::vector<std::string> spellings(std::string_view name) {
  static constexpr std::initializer_list<std::initializer_list<const char*>> alike = {
      {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"},
      {"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_top_k",
       "moe_k", "top_k_experts"},
      {"routed_scaling_factor", "router_scaling_factor", "moe_routed_scaling_factor",
       "route_scale"},
  };
  std::vector<std::string> names{std::string(name)};
  for (const auto& group : alike)
    for (const char* one : group)
      if (name == one)
        for (const char* other : group)
          if (name != other) names.emplace_back(other);
  return names;
}

/// The field under its own name or another of its spellings; its own where there is none.
[[nodiscard]] inline std::string present(const json_fields& fields, const char* name) {
  for (const std::string& spelled : spellings(name))
    if (fields.has(spelled)) return spelled;
  return name;
}

// A size, or a list of sizes per layer or modality that are all the same.
[[nodiscard]] inline index_t size_of(const json_fields& fields, const char* name, index_t high) {
  const std::string field = present(fields, name);
  if (!fields.has(field) || !fields.at(field).is_array())
    return static_cast<index_t>(fields.integer(field, 1, high));
  const json& list = fields.at(field);
  for (const json& one : list)
    if (one != list.front()) fields.wrong(field, "one number, or a list of equal ones");
  if (list.empty()) fields.wrong(field, "a number");
  const json single{{field, list.front()}};
  return static_cast<index_t>(json_fields(single, fields.where()).integer(field, 1, high));
}

[[nodiscard]] inline float factor_of(const json_fields& fields, const char* name, float absent) {
  const std::string field = present(fields, name);
  return fields.has(field) ? static_cast<float>(fields.positive(field)) : absent;
}

inline void set_groups(const hf_model& model, const json_fields& fields, router_spec& s) {
  const bool v2 = std::string_view(model.entry).starts_with("deepseek_v2") ||
                  std::string_view(model.entry) == "deepseek_ocr2";
  const auto moved = moeroute::find_in_catalog(model.entry)->spec;
  s.groups = fields.has("n_group") ? static_cast<index_t>(fields.integer("n_group", 1, s.experts))
                                   : (v2 ? 1 : moved.groups);
  s.topk_group = fields.has("topk_group")
                     ? static_cast<index_t>(fields.integer("topk_group", 1, s.groups))
                     : (v2 ? 1 : moved.topk_group);
  if (fields.has("topk_method")) {
    const std::string method = fields.text("topk_method");
    if (v2 && method == "greedy") s.groups = s.topk_group = 1;
    if (v2 && method != "greedy" && method != "group_limited_greedy")
      fields.wrong("topk_method", "greedy or group_limited_greedy");
    if (!v2 && method != "noaux_tc") fields.wrong("topk_method", "noaux_tc");
  } else if (v2) {
    s.groups = s.topk_group = 1;  // the class's default method is greedy
  }
  // One group limits nothing, whatever it is worth.
  const bool limited = s.groups > 1;
  const bool zero = v2 || std::string_view(model.entry) == "mistral4";
  s.group_score = limited && v2 ? moeroute::group_score::max : moeroute::group_score::top2_sum;
  s.group_fill = limited && zero ? 0.0f : moeroute::simd::minus_infinity;
}

inline void set_score(const hf_model& model, const json_fields& fields, router_spec& s) {
  const std::string_view entry = model.entry;
  if (entry == "cohere2_moe" && fields.has("expert_selection_fn")) {
    const std::string word = fields.text("expert_selection_fn");
    if (word != "softmax" && word != "sigmoid")
      fields.wrong("expert_selection_fn", "softmax or sigmoid");
    if (word == "sigmoid") {
      s.score = moeroute::score_kind::sigmoid;
      if (fields.flag("norm_topk_prob", false)) s.normalize = moeroute::normalization::sum;
    }
    return;
  }
  // The other classes score in one way only; a checkpoint that asks for another is not one of
  // theirs.
  for (const char* field :
       {"scoring_func", "score_func", "score_function", "moe_router_activation"})
    if (fields.has(field) && fields.text(field) != to_string(s.score))
      fields.wrong(field, std::string(to_string(s.score)));
}

// What only one model type can say.
inline void set_own(const hf_model& model, const json_fields& fields, router_spec& s) {
  using moeroute::normalization;
  const std::string_view entry = model.entry;
  if (entry == "dbrx" && fields.has("moe_normalize_expert_weights"))
    s.lp_p = static_cast<float>(fields.positive("moe_normalize_expert_weights"));
  if (entry == "phimoe") {
    if (s.k != 2) fields.wrong(present(fields, model.k), "2: sparsemixer makes two choices");
    s.jitter = fields.has("router_jitter_noise")
                   ? static_cast<float>(fields.positive("router_jitter_noise"))
                   : 0.01f;
  }
  if (entry == "lfm2_moe" && !fields.flag("use_expert_bias", true)) s.selection_bias = false;
  if ((entry == "minimax_m2" || entry == "minimax_m3_vl") && !fields.flag("use_routing_bias", true))
    s.selection_bias = false;
  if (entry == "hy_v3" && !fields.flag("moe_router_enable_expert_bias", true))
    s.selection_bias = false;
  // Checkpoints say what the class does anyway; one that says otherwise is not one of its own.
  if (entry == "hy_v3" || entry == "laguna")
    for (const char* field : {"moe_router_use_sigmoid", "route_norm", "norm_topk_prob"})
      if (!fields.flag(field, true)) fields.wrong(field, "true: the class knows nothing else");
  if (entry == "afmoe" && !fields.flag("route_norm", true)) {
    s.normalize = normalization::none;
    s.eps_where = moeroute::eps_mode::none;
    s.eps = 0.0f;
  }
  if (entry == "laguna" && fields.has("moe_router_logit_softcapping")) {
    const json& cap = fields.at("moe_router_logit_softcapping");
    if (cap != 0) s.softcap = static_cast<float>(fields.positive("moe_router_logit_softcapping"));
  }
  if (entry == "laguna" && fields.flag("moe_apply_router_weight_on_input", false))
    fields.wrong("moe_apply_router_weight_on_input", "false: the class refuses it");
  if (entry == "longcat_flash") {
    s.zero_experts = static_cast<index_t>(fields.integer("zero_expert_num", 0, 1 << 19));
    s.experts += s.zero_experts;
  }
  if (entry == "openai_privacy_filter") s.output_scale = static_cast<float>(s.k);
  if (entry == "nllb_moe") {
    // The capacity is a fraction of the tokens: for the caller, who knows how many there are.
    s.capacity = 0;
    s.normalize_before_drop = fields.flag("normalize_router_prob_before_dropping", false);
    if (fields.has("second_expert_policy") && fields.text("second_expert_policy") != "all")
      fields.wrong("second_expert_policy", "all: the others draw random numbers");
  }
}

}  // namespace detail

/// The router that a config.json describes, of one of the model types that the catalogue has.
///
/// Refuses a model type that it does not know, and routing fields that are missing or have a value
/// that the model's class does not know, by name. Fields that are absent have the default of the
/// class. `layer` tells apart the layers of models whose first ones route by token id
/// (DeepSeek-V4).
[[nodiscard]] inline moeroute::router_spec spec_from_config(const json& document,
                                                            const std::string& file,
                                                            std::int64_t layer = 1 << 20) {
  using namespace detail;
  const json_fields top(document, file);
  const std::string type = top.text("model_type");
  // An omni model is a thinker and a talker; text is the thinker's.
  if (type == "qwen3_omni_moe")
    return spec_from_config(top.at("thinker_config"), file + ": field 'thinker_config'", layer);
  const hf_model* model = nullptr;
  for (const hf_model& one : hf_models)
    if (type == one.type) model = &one;
  if (model == nullptr) top.wrong("model_type", "a mixture-of-experts model of the catalogue");
  const bool nested = model->inner != nullptr && top.has(model->inner);
  if (model->inner != nullptr && !nested && std::string_view(model->inner) != "text_config")
    refuse(file, ": field '", model->inner, "' is missing");
  const json_fields fields(nested ? top.at(model->inner) : document,
                           nested ? file + ": field '" + model->inner + "'" : file);

  router_spec s = moeroute::find_in_catalog(model->entry)->spec;
  s.experts = size_of(fields, model->experts, moeroute::max_experts);
  s.zero_experts = 0;
  if (model->normalize != hf_model::always &&
      !fields.flag("norm_topk_prob", model->normalize == hf_model::on)) {
    s.normalize = moeroute::normalization::none;
    s.eps_where = moeroute::eps_mode::none;
    s.eps = 0.0f;
  } else if (model->normalize != hf_model::always) {
    s.normalize = moeroute::normalization::sum;
  }
  if (model->scale != nullptr) s.scale = factor_of(fields, model->scale, model->scale_absent);
  if (model->k != nullptr) {
    // LongCat's choices may be zero experts too, which stand in a field of their own.
    const index_t extra = fields.has("zero_expert_num") ? moeroute::max_experts : 0;
    s.k = size_of(fields, model->k, s.experts + extra);
  }
  if (model->groups) set_groups(*model, fields, s);
  set_score(*model, fields, s);
  set_own(*model, fields, s);
  if (type == "deepseek_v4" && fields.has("num_hash_layers") &&
      layer < fields.integer("num_hash_layers", 0, 1 << 20)) {
    s.selection = moeroute::selection_kind::expert_table;
    s.selection_bias = false;
  }
  try {
    check(s);
  } catch (const moeroute::error& e) {
    refuse(fields.where(), ": ", e.what());
  }
  return s;
}

}  // namespace example
