// The routers of a Hugging Face checkpoint: from its config.json to a router_spec, layer by layer.
// Opt-in, include it and link moeroute::json.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/json/config_fields.hpp>
#include <moeroute/json/config_layers.hpp>
#include <moeroute/json/config_models.hpp>
#include <moeroute/json/json.hpp>
#include <moeroute/json/model_routers.hpp>
#include <moeroute/json/routing_words.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute {

namespace detail {

inline void no_normalization(router_spec& s) {
  s.normalize = normalization::none;
  s.eps_where = eps_mode::none;
  s.eps = 0.0f;
}

inline void read_groups(const config_source& from, router_spec& s) {
  const json_fields& fields = from.fields;
  const std::string_view entry = from.model.entry;
  const bool v2 = entry == "deepseek_v2" || entry == "deepseek_ocr2" || entry == "unlimited_ocr";
  // Null means one group there.
  const bool null_is_one = entry == "axk2" || entry == "kimi_linear";
  const auto given = [&](const std::string& name) {
    return null_is_one ? fields.has(name) : fields.said(name);
  };
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
    if (given(n)) s.groups = static_cast<index_t>(fields.integer(n, 1, s.experts));
    if (given(kept)) s.topk_group = static_cast<index_t>(fields.integer(kept, 1, s.groups));
    if (s.topk_group > s.groups)
      fail("json", fields.where() + ": field '" + n + "' is " + std::to_string(s.groups) +
                       ", expected at least topk_group, which is " + std::to_string(s.topk_group) +
                       " by default");
  }
  // One group limits nothing, whatever it is worth.
  const bool zero = v2 || entry == "mistral4" || entry == "mistral_large4";
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
  if (entry == "zaya") {
    if (s.k != 1) fields.wrong(spelled(fields, from.model.k), "1");
    s.zero_experts = 1;  // the last one skips
    s.experts += 1;
  }
  if (entry == "smallthinker" && truth(fields, "moe_primary_router_apply_softmax", false)) {
    s.score = score_kind::softmax;
    no_normalization(s);
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
  if (among({"norm_topk_prob", "route_norm", "moe_renormalize", "norm_expert_weight",
             "moe_norm_gate_logits"}))
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
             "moe_routed_scaling_factor", "route_scale", "moe_router_scaling_factor"}))
    return must(says_nothing(value) || value == 1, "1 or null");
  if (among({"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk",
             "moe_top_k", "moe_k", "num_selected_experts"}))
    return must(value == s.k, std::to_string(s.k));
  if (key == "topk_method")
    return must(value.is_null() || value == (s.selection_bias ? "noaux_tc" : "greedy"),
                s.selection_bias ? "noaux_tc" : "greedy");
  if (among({"use_expert_bias", "use_routing_bias", "moe_router_enable_expert_bias",
             "moe_use_aux_free", "use_moe_router_bias", "e_score_correction_bias"}))
    return must(value.is_null() || value == s.selection_bias, s.selection_bias ? "true" : "false");
  if (among({"router_bias", "moe_router_bias", "gate_bias"}))
    return must(says_nothing(value) ? !s.gate_bias : value == s.gate_bias,
                s.gate_bias ? "true" : "false");
  if (key == "use_grouped_topk")
    return must(s.groups == 1 || value == true || value.is_null(), "true");
  if (among({"group_limited_greedy", "uniform_expert_assignment", "batch_prioritized_routing",
             "moe_apply_router_weight_on_input", "moe_router_logit_softcapping",
             "router_logit_softcapping", "moe_use_hard_gate", "zero_expert_num",
             "moe_group_experts", "moe_router_force_load_balancing", "moe_drop_tokens",
             "moe_enable_secondary_experts", "expert_choice_router", "moe_normalize_expert_weights",
             "moe_reverse_token_drop", "moe_random_routing_dropped_token",
             "moe_use_token_type_bias"}))
    return must(says_nothing(value), "false, 0 or null");
  if (key == "use_moe") return must(value == true || value.is_null(), "true");
  if (key == "moe_every_n_layer") return must(says_nothing(value) || value == 1, "1");
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

// Keys that speak of routing and were not read: they say what the class does, or nothing of it, or
// the file is refused.
inline void refuse_unread(const config_source& from, const router_spec& s) {
  for (const json_fields* fields : {&from.fields, &from.around}) {
    for (const auto& [key, value] : fields->object().items()) {
      if (fields->asked(key)) continue;
      if (!speaks_of_routing(key) || harmless_in_config(key)) continue;
      if (fields == &from.fields && agrees(from, key, s)) continue;
      fail("json", fields->where() + ": field '" + printable(key) +
                       "' speaks of routing and is not known, found " + json_fields::show(value));
    }
    if (&from.fields == &from.around) return;
  }
}

/// Dots 3's vision encoder: each layer has as many experts as pyramid_num_routed says.
inline model_routers read_pyramid(const config_source& from) {
  const json_fields& f = from.fields;
  const catalog_entry* const entry = find_in_catalog(from.model.entry);
  model_routers made{.entry = entry, .spec = entry->spec, .layers = {}, .count = 0};
  const auto old = [&](const char* name, const char* before) {
    return f.has(name) ? name : before;
  };
  if (const char* const k = old("num_experts_per_tok", "capacity_factor"); f.has(k))
    made.spec.k = static_cast<index_t>(f.integer(k, 1, max_experts));
  if (const char* const by = old("router_scaling_factor", "router_scale"); f.has(by))
    made.spec.scale = static_cast<float>(f.positive(by));
  std::vector<index_t> experts(25, -1);
  for (index_t n = 4; n <= 64; n += 4) experts.push_back(n);
  experts.push_back(64);
  if (f.has("pyramid_num_routed")) {
    experts.clear();
    for (const nlohmann::json& one : f.array("pyramid_num_routed")) {
      const nlohmann::json single{{"pyramid_num_routed", one}};
      experts.push_back(static_cast<index_t>(
          json_fields(single, f.where()).integer("pyramid_num_routed", -1, max_experts)));
    }
  }
  for (const index_t n : experts) {
    made.spec.experts = std::max(n, made.spec.experts);
    router_spec own = made.spec;
    own.experts = n;
    own.k = std::min(own.k, n);
    made.layers.push_back(n > 0 ? std::optional(own) : std::nullopt);
  }
  made.count = static_cast<index_t>(experts.size());
  refuse_unread(from, made.spec);
  made.check(f.where());
  return made;
}

/// Whether a model type is that of an entry: its letters and digits begin with the entry's, and
/// another number does not follow.
inline bool names_entry(std::string_view type, std::string_view entry) {
  const auto letters = [](std::string_view text) {
    std::string kept;
    for (const char c : text)
      if (std::isalnum(static_cast<unsigned char>(c)) != 0)
        kept += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return kept;
  };
  const std::string given = letters(type), name = letters(entry);
  const auto digit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; };
  return given.starts_with(name) && !(given.size() > name.size() && digit(given[name.size()]));
}

/// Refuses the model type of the file; of a model that the catalogue has and whose file nobody
/// reads, with what there is of it.
[[noreturn]] MOEROUTE_COLD inline void refuse_type(const json_fields& fields) {
  const std::string type = fields.text("model_type");
  for (const catalog_entry& entry : newer_catalog) {
    const auto reads = [&](const config_model& one) { return entry.name == one.entry; };
    if (names_entry(type, entry.name) &&
        std::none_of(std::begin(config_models), std::end(config_models), reads))
      fields.wrong("model_type", "a model whose fields are known; of this one the catalogue has '" +
                                     std::string(entry.name) + "', but not how its file says it");
  }
  fields.wrong("model_type", "a mixture-of-experts model of the catalogue");
}

inline model_routers read_config(const config_source& from) {
  if (std::string_view(from.model.entry) == "dots3_note_vision" &&
      !from.fields.has("mlp_layer_types"))
    return read_pyramid(from);
  const json_fields& fields = from.fields;
  const config_model& model = from.model;
  router_spec s = find_in_catalog(model.entry)->spec;
  const std::vector<index_t> experts =
      sizes_of(fields, spelled(fields, model.experts), max_experts);
  s.experts = experts.front();
  if (model.normalize != config_model::always) {
    const std::string norm = spelled(fields, "norm_topk_prob");
    if (!truth(fields, norm, model.normalize == config_model::on))
      no_normalization(s);
    else
      s.normalize = normalization::sum;
  }
  if (model.scale != nullptr) {
    const std::string scale = spelled(fields, model.scale);
    const bool none = std::string_view(model.entry) == "mimo_v2_flash" && !fields.has(scale);
    s.scale = fields.said(scale) && !none ? static_cast<float>(fields.positive(scale))
                                          : model.scale_absent;
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
    if (model == nullptr && inner.has("model_type")) refuse_type(inner);
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
  if (model == nullptr) refuse_type(top);
  if (std::string_view(model->entry) == "dbrx") {
    const json_fields inner(top.at("ffn_config"), file + ": field 'ffn_config'");
    return read_config({*model, inner, top});
  }
  return read_config({*model, top, top});
}

}  // namespace moeroute
