// Which keys of a model's description speak of routing, and which of those change none.
#pragma once

#include <algorithm>
#include <cctype>
#include <string>
#include <string_view>
#include <vector>

namespace moeroute::detail {

// Names come from files, and a message stays on one line.
inline std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return text;
}

/// The words of a key in small letters: "moe_topK-prob" is moe, top, k, prob.
inline std::vector<std::string> words_of(std::string_view key) {
  std::vector<std::string> words;
  bool open = false, low = false;
  for (const char letter : key) {
    const auto c = static_cast<unsigned char>(letter);
    const bool hump = std::isupper(c) != 0 && low;
    low = std::islower(c) != 0;
    if (!std::isalnum(c)) {
      open = false;
      continue;
    }
    if (!open || hump) words.emplace_back();
    open = true;
    words.back() += static_cast<char>(std::tolower(c));
  }
  return words;
}

/// The key has a word of routing in it. Words that attention and others use too count where none of
/// theirs stands beside them.
inline bool speaks_of_routing(std::string_view key) {
  static constexpr std::string_view elsewhere[] = {
      "attn",  "attention", "index", "indexer", "mamba",  "ssm",   "vision", "image", "video",
      "audio", "mtp",       "nextn", "kv",      "key",    "query", "value",  "conv",  "final",
      "lora",  "quant",     "beam",  "code",    "linear", "hc",    "rope",   "speech"};
  static constexpr std::string_view shared[] = {
      "gate",     "gates",   "gating",      "score",   "scores",    "scoring",
      "scorer",   "group",   "groups",      "grouped", "topk",      "jitter",
      "capacity", "softcap", "softcapping", "balance", "balancing", "aux",
      "noaux",    "hash",    "renormalize", "sinkhorn"};
  const std::vector<std::string> words = words_of(key);
  bool theirs = false, ours = false;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string_view w = words[i];
    if (w.find("expert") != w.npos || w.find("router") != w.npos || w.starts_with("moe") ||
        w.starts_with("rout"))
      return true;
    theirs =
        theirs || std::find(std::begin(elsewhere), std::end(elsewhere), w) != std::end(elsewhere);
    ours = ours || std::find(std::begin(shared), std::end(shared), w) != std::end(shared) ||
           (w == "top" && i + 1 < words.size() && words[i + 1] == "k");
  }
  return ours && !theirs;
}

/// Keys of configurations that speak of routing and change none: widths and kinds of the experts,
/// which layers have some, what only training reads, how the work is spread, what is put out.
inline constexpr std::string_view harmless_config_keys[] = {
    // sizes and kinds of experts
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
    "expert_intermediate_size",
    "expert_hidden_dim",
    "expert_ffn_hidden_size",
    "moe_ffn_hidden_size",
    "moe_latent_size",
    "moe_hidden_size",
    "router_hidden_size",
    "moe_secondary_expert_size",
    "moe_num_secondary_experts",
    "expert_dtype",
    "experts_implementation",
    "_experts_implementation",
    "moe_activation",
    "moe_hidden_act",
    // experts that every token takes
    "n_shared_experts",
    "num_shared_experts",
    "num_shared_expert",
    "moe_num_shared_experts",
    "shared_expert_combination_strategy",
    "moe_shared_expert_overlap",
    "shared_moe_mode",
    "use_mixed_mlp_moe",
    "use_shared_expert",
    "moe_shared_expert_gate",
    "has_shared_experts",
    "shared_expert_gate",
    "shared_experts",
    "shared_experts_intermediate_size",
    "parallel_expert_scale",
    "moe_shared_primary_experts",
    // which layers have experts
    "moe_layer_freq",
    "moe_layers",
    "moe_layer_layout",
    "is_moe_layer",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_layer_num_skipped",
    "expert_layer_period",
    "expert_layer_offset",
    "interleave_moe_layer_step",
    "moe_every_n_layers",
    // training
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_jitter_noise",
    "input_jitter_noise",
    "moe_jitter_eps",
    "moe_loss_weight",
    "moe_z_loss_coeff",
    "moe_aux_loss_coeff",
    "moe_aux_loss_coef",
    "moe_aux_loss_lambda",
    "moe_aux_loss_weight",
    "moe_z_loss_lambda",
    "aux_loss_alpha",
    "aux_loss_coef",
    "seq_aux",
    "load_balance_coeff",
    "load_balance_loss_coef",
    "moe_group_orthogonal_loss",
    "moe_with_send_router_loss",
    "global_aux_loss",
    "moe_token_dropout",
    "moe_dropout_prob",
    "moe_all_to_all_dropout",
    "moe_orthogonal_loss_lambda",
    "output_router_logits",
    "add_router_probs",
    "router_ignore_padding_tokens",
    "router_dtype",
    "moe_enable_early_router",
    "moe_router_dtype",
    "bias_update_speed",
    "moe_router_bias_update_rate",
    // how the work is spread
    "ep_size",
    "moe_group",
    "expert_parallel",
    "expert_parallel_size",
    "moe_tensor_parallel",
    "moe_multimodal_dispatch_use_allgather",
    "moe_backend",
    "use_grouped_mm",
    "moe_kernel",
    "moe_impl",
    "moe_resid_pdrop",
    "enable_moe_fp32_combine",
    "moe_layer_feed_fake_token",
    "moe_dense_experts_token_type_id",
    "need_fp32_gate",
    "moe_world_size",
    "moe_rank",
    "moe_use_size_all2all",
    "moe_logging",
    "fuse_gate_detach_matmul",
    "moe_quantize_config",
    "num_experts_per_rank",
    // others' groups, gates and scores
    "top_k",
    "num_beam_groups",
    "output_scores",
    "o_groups",
    "norm_group_size",
    "group_size",
    "layer_group_size",
    "num_code_groups",
    "group_norm",
    "use_output_gate",
    "output_gate_type",
    "mlp_gate_softcap",
    "mlp_up_softcap",
    "loop_gate_rank",
    "residual_gate_temperature",
    "output_gate",
    "mamba_n_groups",
    "n_mamba_groups",
    "conv_groups",
    "conv_pos_groups",
    "feat_extract_norm_groups",
};

inline bool harmless_in_config(std::string_view key) {
  return std::find(std::begin(harmless_config_keys), std::end(harmless_config_keys), key) !=
         std::end(harmless_config_keys);
}

}  // namespace moeroute::detail
