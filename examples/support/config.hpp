// config.json of a Hugging Face mixture-of-experts checkpoint, in the spelling
// of transformers 5 and in the older one that checkpoints in the wild have.
#pragma once

#include "json.hpp"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <moeroute/json/config_json.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace example {

enum class model_family { qwen3_moe, mixtral, olmoe };

struct model_config {
  model_family family{};
  std::string model_type;
  std::int64_t vocab = 0;
  std::int64_t hidden = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  std::int64_t head_dim = 0;
  moeroute::router_spec router;
  std::int64_t expert_width = 0;
  std::int64_t positions = 0;
  double rope_theta = 0;
  double norm_eps = 0;
  double clip_qkv = 0;  // 0: queries, keys and values are not clipped
  bool tied_head = false;

  [[nodiscard]] std::int64_t experts() const { return router.experts; }
  [[nodiscard]] std::int64_t experts_per_token() const { return router.k; }
  [[nodiscard]] std::int64_t query_width() const { return heads * head_dim; }
  [[nodiscard]] std::int64_t kv_width() const { return kv_heads * head_dim; }
  /// Bytes are the tokens where there are 256 of them.
  [[nodiscard]] bool byte_vocabulary() const { return vocab == 256; }
};

namespace detail {

// Bounds far above every published model; products of two still fit 64 bits.
inline constexpr std::int64_t extent_limit = std::int64_t{1} << 24;
inline constexpr std::int64_t layer_limit = std::int64_t{1} << 16;
inline constexpr std::int64_t position_limit = std::int64_t{1} << 40;

[[nodiscard]] inline model_family family_of(const json_fields& fields) {
  const std::string type = fields.text("model_type");
  if (type == "qwen3_moe") {
    return model_family::qwen3_moe;
  }
  if (type == "mixtral") {
    return model_family::mixtral;
  }
  if (type == "olmoe") {
    return model_family::olmoe;
  }
  fields.wrong("model_type", "qwen3_moe, mixtral or olmoe");
}

[[nodiscard]] inline double rope_theta(const json_fields& fields) {
  if (!fields.has("rope_parameters")) {
    return fields.positive("rope_theta");
  }
  const json_fields rope(fields.at("rope_parameters"),
                         fields.where() + ": field 'rope_parameters'");
  if (rope.has("rope_type") && rope.text("rope_type") != "default") {
    rope.wrong("rope_type", "'default'");
  }
  return rope.positive("rope_theta");
}

/// Things a checkpoint can ask for that the forward pass here does not do:
/// better refused than computed wrongly.
inline void refuse_unsupported(const json_fields& fields) {
  if (fields.has("hidden_act") && fields.text("hidden_act") != "silu") {
    fields.wrong("hidden_act", "'silu'");
  }
  if (fields.flag("attention_bias", false)) {
    fields.wrong("attention_bias", "false");
  }
  if (fields.has("rope_scaling")) {
    fields.wrong("rope_scaling", "null");
  }
  if (fields.has("mlp_only_layers") && !fields.array("mlp_only_layers").empty()) {
    fields.wrong("mlp_only_layers", "no layers: every layer has experts");
  }
  if (fields.has("decoder_sparse_step") &&
      fields.integer("decoder_sparse_step", 0, extent_limit) != 1) {
    fields.wrong("decoder_sparse_step", "1: every layer has experts");
  }
  if (fields.has("quantization_config")) {
    fields.wrong("quantization_config", "null");
  }
}

}  // namespace detail

[[nodiscard]] inline model_config read_config(const std::filesystem::path& path) {
  using namespace detail;
  const json document = read_json(path);
  const json_fields fields(document, path.string());
  const auto extent = [&](const std::string& name) {
    return fields.integer(name, 1, extent_limit);
  };

  model_config made;
  made.family = family_of(fields);
  made.model_type = fields.text("model_type");
  made.vocab = extent("vocab_size");
  made.hidden = extent("hidden_size");
  made.layers = fields.integer("num_hidden_layers", 1, layer_limit);
  made.heads = extent("num_attention_heads");
  made.kv_heads = fields.has("num_key_value_heads") ? extent("num_key_value_heads") : made.heads;
  if (made.heads % made.kv_heads != 0) {
    fields.wrong("num_key_value_heads",
                 join("a divisor of num_attention_heads (", made.heads, ")"));
  }
  if (fields.has("head_dim")) {
    made.head_dim = extent("head_dim");
  } else if (made.hidden % made.heads == 0) {
    made.head_dim = made.hidden / made.heads;
  } else {
    fields.wrong("num_attention_heads", join("a divisor of hidden_size (", made.hidden, ")"));
  }
  if (made.head_dim % 2 != 0) {
    refuse(fields.where(), ": field 'head_dim': expected an even number, found ", made.head_dim);
  }
  refuse_unsupported(fields);
  const moeroute::model_routers routers = moeroute::routers_from_config(document, path.string());
  for (const auto& layer : routers.layers) {
    if (layer != routers.spec) {
      refuse(path.string(), ": expected experts in every layer, and one router for all");
    }
  }
  made.router = routers.spec;
  made.expert_width = extent(made.family == model_family::qwen3_moe ? "moe_intermediate_size"
                                                                    : "intermediate_size");
  made.positions = fields.integer("max_position_embeddings", 1, position_limit);
  made.rope_theta = rope_theta(fields);
  made.norm_eps = fields.positive("rms_norm_eps");
  if (fields.has("clip_qkv")) {
    made.clip_qkv = fields.positive("clip_qkv");
  }
  made.tied_head = fields.flag("tie_word_embeddings", false);
  if (fields.has("sliding_window") && fields.flag("use_sliding_window", true) &&
      fields.integer("sliding_window", 1, position_limit) < made.positions) {
    fields.wrong("sliding_window", "null or at least max_position_embeddings");
  }
  return made;
}

}  // namespace example
