// The routers of published models, by name. A new one is one entry here.
#pragma once

#include <string>
#include <string_view>

#include <moeroute/base/config.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute {

/// A published model's router.
struct catalog_entry {
  std::string_view name;
  std::string_view source;  ///< the class, of transformers 5.12.1 where no other version is named,
                            ///< and the model that the sizes are of
  router_spec spec;
  std::string_view golden =
      {};  ///< reference vectors of the real class; without them, a float64 recompute
  std::string_view remark = {};
};

/// What holds for a router because of its spec. A law of the tests runs where its trait holds.
struct router_traits {
  bool monotone;         ///< a larger logit never loses to a smaller one
  bool shift_invariant;  ///< adding a constant to a row changes neither choice nor weights
  bool relabelling;      ///< permuting experts (with bias and scales) permutes the ids
  bool weights_sum_to_one;
  bool fixed_k;
  bool needs_token_ids;
  bool random;
  bool capacity_bound;  ///< other tokens can take a choice away
};

constexpr router_traits traits_of(const router_spec& s) {
  const bool by_score =
      s.selection == selection_kind::top_k || s.selection == selection_kind::counted ||
      s.selection == selection_kind::top2 || s.selection == selection_kind::top_p ||
      s.selection == selection_kind::threshold;
  const bool plain = !s.selection_bias && s.groups == 1 && !s.steering && s.candidates == 0 &&
                     s.passes == 1 && s.second_logits != logit_pairs::sigmoid_sum &&
                     s.explore == 0.0f;
  const bool softmax_selected =
      s.score == score_kind::softmax && s.domain == score_domain::selected;
  const bool scaled = s.scale != 1.0f || s.divide_by_k || s.per_expert_scale ||
                      s.selection == selection_kind::sparsemixer;
  return {
      .monotone = by_score && plain,
      // Sums of logits of groups with fewer experts than others are not.
      .shift_invariant = s.score == score_kind::softmax && s.softcap == 0.0f && !s.weight_apart &&
                         (s.groups == 1 || s.domain == score_domain::all) &&
                         s.selection != selection_kind::sparsemixer,
      .relabelling = by_score && s.groups == 1 && s.candidates == 0 && s.explore == 0.0f,
      .weights_sum_to_one = (softmax_selected || (s.normalize == normalization::sum &&
                                                  s.eps_where == eps_mode::none)) &&
                            !scaled && s.capacity == 0,
      .fixed_k = s.selection != selection_kind::top_p && s.selection != selection_kind::threshold &&
                 s.selection != selection_kind::counted,
      .needs_token_ids = s.selection == selection_kind::expert_table,
      .random = s.selection == selection_kind::random || s.candidates != 0 ||
                s.noise != noise_kind::none || s.explore != 0.0f,
      .capacity_bound = s.capacity != 0,
  };
}

namespace detail {

// softmax over all experts, the k best, raw or divided by their sum
constexpr router_spec softmax_all(index_t experts, index_t k,
                                  normalization normalize = normalization::none) {
  return {.experts = experts, .k = k, .normalize = normalize};
}

// the k best logits, softmax over them
constexpr router_spec softmax_k(index_t experts, index_t k) {
  return {.experts = experts, .k = k, .domain = score_domain::selected};
}

// sigmoid, a bias for the choice, weights divided by their sum + 1e-20 and scaled
constexpr router_spec biased_sigmoid(index_t experts, index_t k, float scale, index_t groups = 1,
                                     index_t topk_group = 1) {
  return {.experts = experts,
          .k = k,
          .score = score_kind::sigmoid,
          .selection_bias = true,
          .groups = groups,
          .topk_group = topk_group,
          .normalize = normalization::sum,
          .eps_where = eps_mode::add,
          .eps = 1e-20f,
          .scale = scale};
}

constexpr router_spec with(router_spec spec, auto change) {
  change(spec);
  return spec;
}

inline constexpr auto renormalized = normalization::sum;

}  // namespace detail

/// Every router of transformers 5.12.1, with the sizes of a published model. Facts and reference
/// vectors were taken from that release; what differs there from the models' papers is in the
/// remark.
inline constexpr catalog_entry catalog[] = {
    // softmax over all experts, divided by their sum
    {"mixtral", "MixtralTopKRouter; Mixtral-8x7B", detail::softmax_all(8, 2, detail::renormalized),
     "mixtral", "training: input jitter"},
    {"minimax", "MiniMaxTopKRouter; Text-01", detail::softmax_all(32, 2, detail::renormalized), "",
     "as mixtral"},
    {"qwen3_moe", "Qwen3MoeTopKRouter; Qwen3-30B-A3B",
     detail::softmax_all(128, 8, detail::renormalized), "qwen3_moe",
     "norm_topk_prob is a flag: false by class default, true in checkpoints"},
    {"qwen3_next", "Qwen3NextTopKRouter", detail::softmax_all(512, 10, detail::renormalized),
     "qwen3_next", "one shared expert behind a sigmoid gate"},
    {"qwen3_5_moe", "Qwen3_5MoeTopKRouter", detail::softmax_all(256, 8, detail::renormalized), "",
     "one shared expert behind a sigmoid gate"},
    {"qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter", detail::softmax_all(60, 4, detail::renormalized),
     "qwen3_vl_moe", "the published 30B-A3B has 128 experts, 8 per token"},
    {"qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerTextTopKRouter",
     detail::softmax_all(128, 8, detail::renormalized), "qwen3_omni_moe_thinker"},
    {"mellum", "MellumTopKRouter", detail::softmax_all(64, 8, detail::renormalized), "mellum"},
    {"hunyuan_v1_moe", "HunYuanMoEV1Gate; A13B", detail::softmax_all(64, 8, detail::renormalized),
     "", "one dense shared MLP"},
    {"dbrx", "DbrxRouter; dbrx-base", detail::softmax_all(16, 4, normalization::lp), "dbrx",
     "Lp norm with any p, 1 in checkpoints"},
    {"mistral4", "Mistral4 router",
     detail::with(detail::softmax_all(128, 4, detail::renormalized),
                  [](auto& s) {
                    s.eps_where = eps_mode::add;
                    s.eps = 1e-20f;
                  }),
     "mistral4", "groups as DeepSeek-V3 on probabilities, 1 of 1 by default"},
    {"gemma4", "Gemma4TextRouter; 26B-A4B",
     detail::with(detail::softmax_all(128, 8, detail::renormalized),
                  [](auto& s) { s.per_expert_scale = true; }),
     "gemma4", "the router's input is normalised: RMSNorm(x) * scale / sqrt(d)"},
    {"diffusion_gemma", "DiffusionGemmaTextRouter",
     detail::with(detail::softmax_all(128, 8, detail::renormalized),
                  [](auto& s) { s.per_expert_scale = true; }),
     "", "as gemma4"},
    // softmax over all experts, raw
    {"qwen2_moe", "Qwen2MoeTopKRouter; Qwen1.5-MoE-A2.7B", detail::softmax_all(60, 4), "qwen2_moe",
     "one shared expert behind a sigmoid gate"},
    {"qwen3_omni_moe_talker", "Qwen3OmniMoeTalkerTextTopKRouter", detail::softmax_all(128, 8),
     "qwen3_omni_moe_talker", "one shared expert behind a sigmoid gate"},
    {"olmoe", "OlmoeTopKRouter; OLMoE-1B-7B", detail::softmax_all(64, 8), "olmoe"},
    {"flex_olmo", "FlexOlmoTopKRouter", detail::softmax_all(7, 5), "", "odd E, k close to E"},
    {"jamba", "JambaSparseMoeBlock", detail::softmax_all(16, 2), "jamba"},
    {"deepseek_v2", "DeepseekV2Moe; DeepSeek-V2",
     detail::with(detail::softmax_all(160, 6),
                  [](auto& s) {
                    s.groups = 8;
                    s.topk_group = 3;
                    s.group_score = group_score::max;
                    s.group_fill = 0.0f;
                    s.scale = 16.0f;
                  }),
     "deepseek_v2", "norm_topk_prob is ignored there; two shared experts"},
    {"deepseek_v2_lite", "DeepseekV2Moe; DeepSeek-V2-Lite", detail::softmax_all(64, 6),
     "deepseek_v2_lite", "two shared experts"},
    {"deepseek_ocr2", "DeepseekOcr2TextMoe", detail::softmax_all(64, 6), "",
     "as deepseek_v2, greedy by default; two shared experts"},
    {"switch_transformers", "SwitchTransformersTop1Router; switch-base-8",
     detail::softmax_all(8, 1), "switch_transformers",
     "a capacity of 64 is configured but never acts there"},
    {"longcat_flash", "LongcatFlashTopkRouter",
     detail::with(detail::softmax_all(768, 12),
                  [](auto& s) {
                    s.selection_bias = true;
                    s.scale = 6.0f;
                    s.zero_experts = 256;
                  }),
     "longcat_flash", "ids from 512 on are identity experts"},
    // softmax over all experts with a bias for the choice
    {"ernie4_5_moe", "Ernie4_5_MoeTopKRouter; ERNIE-4.5-21B-A3B",
     detail::with(detail::softmax_all(64, 6, detail::renormalized),
                  [](auto& s) {
                    s.selection_bias = true;
                    s.eps_where = eps_mode::clamp;
                    s.eps = 1e-12f;
                  }),
     "ernie4_5_moe", "two shared experts"},
    {"ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter",
     detail::with(detail::softmax_all(64, 6, detail::renormalized),
                  [](auto& s) {
                    s.selection_bias = true;
                    s.eps_where = eps_mode::clamp;
                    s.eps = 1e-12f;
                  }),
     "", "two of these with experts of their own, one per modality: by_modality"},
    // softmax over the selected experts
    {"gpt_oss", "GptOssTopKRouter; gpt-oss-120b",
     detail::with(detail::softmax_k(128, 4), [](auto& s) { s.gate_bias = true; }), "gpt_oss"},
    {"openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter",
     detail::with(detail::softmax_k(128, 4),
                  [](auto& s) {
                    s.gate_bias = true;
                    s.divide_by_k = true;
                    s.output_scale = 4.0f;
                  }),
     "openai_privacy_filter", "weights / k, made up for on the output"},
    {"granitemoe", "GraniteMoeTopKGating; granite-3 3b-a800m", detail::softmax_k(40, 8),
     "granitemoe"},
    {"granitemoehybrid", "GraniteMoeHybridTopKGating", detail::softmax_k(72, 10), "",
     "as granitemoe; a dense shared MLP"},
    {"granitemoeshared", "GraniteMoeSharedTopKGating", detail::softmax_k(8, 2), "granitemoeshared",
     "a dense shared MLP"},
    {"jetmoe", "JetMoeTopKGating", detail::softmax_k(8, 2), "jetmoe", "routes attention too"},
    {"aria", "AriaTextMoELayer", detail::softmax_k(64, 6), "", "two shared experts"},
    {"cohere2_moe", "Cohere2MoeTopKRouter", detail::softmax_k(8, 2), "cohere2_moe",
     "a sigmoid mode exists: sigmoid of the selected, divided by their sum"},
    {"doge", "DogeCDMoE",
     detail::with(detail::softmax_k(16384, 64),
                  [](auto& s) { s.selection = selection_kind::product_keys; }),
     "doge", "its view of the logits as (2, T, n) mixes tokens; here the halves are a token's own"},
    // sigmoid
    {"deepseek_v3", "DeepseekV3TopkRouter", detail::biased_sigmoid(256, 8, 2.5f, 8, 4),
     "deepseek_v3", "one shared expert; the group score uses the biased score"},
    {"deepseek_v32", "DeepseekV32TopkRouter", detail::biased_sigmoid(256, 8, 2.5f, 8, 4),
     "deepseek_v32", "as deepseek_v3"},
    {"dots1", "Dots1TopkRouter", detail::biased_sigmoid(128, 6, 2.5f), "dots1",
     "two shared experts"},
    {"glm4_moe", "Glm4MoeTopkRouter; GLM-4.5", detail::biased_sigmoid(160, 8, 2.5f), "glm4_moe",
     "one shared expert"},
    {"glm4_moe_lite", "Glm4MoeLiteTopkRouter", detail::biased_sigmoid(64, 4, 1.8f), "",
     "one shared expert"},
    {"glm4v_moe", "Glm4vMoeTextTopkRouter", detail::biased_sigmoid(128, 8, 1.0f), "glm4v_moe",
     "one shared expert"},
    {"glm_moe_dsa", "GlmMoeDsaTopkRouter", detail::biased_sigmoid(256, 8, 2.5f), "glm_moe_dsa",
     "one shared expert"},
    {"exaone_moe", "ExaoneMoeTopkRouter", detail::biased_sigmoid(64, 8, 2.5f), "exaone_moe",
     "one shared expert; K-EXAONE has 128"},
    {"solar_open", "SolarOpenTopkRouter", detail::biased_sigmoid(128, 8, 1.0f), "solar_open",
     "one shared expert"},
    {"nemotron_h", "NemotronHTopkRouter; Nano", detail::biased_sigmoid(128, 6, 2.5f), "nemotron_h",
     "Super has 512 experts, 22 per token, scale 5"},
    {"hy_v3", "HYV3TopKRouter", detail::biased_sigmoid(192, 8, 2.826f), "", "one shared expert"},
    {"afmoe", "AfmoeTokenChoiceRouter", detail::biased_sigmoid(128, 8, 2.826f), "afmoe",
     "one shared expert"},
    {"lfm2_moe", "Lfm2MoeSparseMoeBlock",
     detail::with(detail::biased_sigmoid(32, 4, 1.0f), [](auto& s) { s.eps = 1e-6f; }), "lfm2_moe",
     "the largest additive eps of all"},
    {"minimax_m2", "MiniMaxM2TopKRouter",
     detail::with(detail::biased_sigmoid(256, 8, 1.0f),
                  [](auto& s) {
                    s.eps_where = eps_mode::none;
                    s.eps = 0.0f;
                  }),
     "minimax_m2", "no eps: 0 / 0 there where all k underflow, weights of 0 here"},
    {"minimax_m3_vl", "MiniMaxM3VLTopKRouter",
     detail::with(detail::biased_sigmoid(128, 4, 2.0f),
                  [](auto& s) {
                    s.eps_where = eps_mode::none;
                    s.eps = 0.0f;
                    s.scale_where = scale_place::output;
                  }),
     "", "one shared expert"},
    {"laguna", "LagunaTopKRouter",
     detail::with(detail::biased_sigmoid(256, 8, 2.5f),
                  [](auto& s) {
                    s.eps_where = eps_mode::none;
                    s.eps = 0.0f;
                    s.scale_where = scale_place::output;
                  }),
     "laguna", "one shared expert; scale 1 by class default"},
    {"laguna_softcap", "LagunaTopKRouter with a soft-cap",
     detail::with(detail::biased_sigmoid(256, 8, 1.0f),
                  [](auto& s) {
                    s.eps_where = eps_mode::none;
                    s.eps = 0.0f;
                    s.scale_where = scale_place::output;
                    s.softcap = 4.0f;
                  }),
     "laguna_softcap"},
    {"llama4_scout",
     "Llama4Router; Scout",
     {.experts = 16,
      .k = 1,
      .score = score_kind::sigmoid,
      .domain = score_domain::selected,
      .weight_on = weight_place::input},
     "llama4_scout",
     "the weight multiplies the expert's input; one shared expert"},
    {"llama4_maverick",
     "Llama4Router; Maverick",
     {.experts = 128,
      .k = 1,
      .score = score_kind::sigmoid,
      .domain = score_domain::selected,
      .weight_on = weight_place::input},
     "llama4_maverick",
     "as llama4_scout"},
    // sqrt(softplus)
    {"deepseek_v4", "DeepseekV4 router",
     detail::with(detail::biased_sigmoid(256, 6, 1.5f),
                  [](auto& s) { s.score = score_kind::sqrt_softplus; }),
     "deepseek_v4", "one shared expert"},
    {"deepseek_v4_hash", "DeepseekV4HashRouter; the first three layers",
     detail::with(detail::biased_sigmoid(256, 6, 1.5f),
                  [](auto& s) {
                    s.score = score_kind::sqrt_softplus;
                    s.selection = selection_kind::expert_table;
                    s.selection_bias = false;
                  }),
     "deepseek_v4_hash", "ids by token id; weights from the gate"},
    // others
    {"phimoe",
     "PhimoeTopKRouter; Phi-3.5-MoE",
     {.experts = 16, .k = 2, .selection = selection_kind::sparsemixer},
     "phimoe",
     "the two weights do not sum to 1"},
    {"nllb_moe",
     "NllbMoeTop2Router; nllb-moe-54b",
     {.experts = 128,
      .k = 2,
      .selection = selection_kind::top2,
      .normalize = normalization::sum,
      .eps_where = eps_mode::clamp,
      .eps = 1.1920929e-7f,
      .capacity = 20,
      .drop_order = drop_order::choice_major,
      .normalize_before_drop = false},
     "nllb_moe",
     "capacity as in evaluation of 20 tokens; the block's combine is broken there"},
    {"nllb_moe_bpr",
     "NllbMoeTop2Router with batch priority",
     {.experts = 128,
      .k = 2,
      .selection = selection_kind::top2,
      .normalize = normalization::sum,
      .eps_where = eps_mode::clamp,
      .eps = 1.1920929e-7f,
      .capacity = 2,
      .drop_order = drop_order::batch_priority},
     "nllb_moe_bpr"},
};

/// Routers that transformers 5.12.1 does not have: the classes new in 5.24.0, and published models
/// outside it. Where the sizes of a model are not known for sure the remark says so: take them from
/// its configuration.
inline constexpr catalog_entry newer_catalog[] = {
    // classes of transformers 5.24.0, with the sizes that are their configuration's defaults
    {"axk1", "AXK1TopkRouter, transformers 5.24.0", detail::biased_sigmoid(192, 8, 2.5f, 8, 4),
     "axk1", "one shared expert"},
    {"axk2", "AXK2TopkRouter, transformers 5.24.0", detail::biased_sigmoid(128, 8, 2.5f), "axk2",
     "groups are null in light checkpoints; one shared expert"},
    {"bailing_hybrid", "BailingHybridTopkRouter, transformers 5.24.0; Ling 3",
     detail::biased_sigmoid(512, 8, 2.5f, 8, 4), "bailing_hybrid",
     "a size of 128 exists; one shared expert"},
    {"dots3_note", "Dots3NoteTextTopkRouter, transformers 5.24.0",
     detail::biased_sigmoid(256, 8, 1.0f), "dots3_note", "one shared expert"},
    {"dots3_note_vision", "Dots3NoteVisionTopKRouter, transformers 5.24.0",
     detail::biased_sigmoid(64, 2, 1.0f), "dots3_note_vision", "layers differ in their experts"},
    {"flint",
     "FlintTopKRouter, transformers 5.24.0",
     {.experts = 256, .k = 6, .score = score_kind::sigmoid, .normalize = normalization::sum},
     "flint",
     "no bias; one shared expert"},
    {"glm5_next", "Glm5NextTextTopkRouter, transformers 5.24.0; GLM-5.3",
     detail::biased_sigmoid(288, 8, 2.5f), "glm5_next", "one shared expert"},
    {"granitemoe_swa", "GraniteMoeSWATopKRouter, transformers 5.24.0", detail::softmax_k(8, 2),
     "granitemoe_swa"},
    {"hy_v4", "HYV4TopkRouter, transformers 5.24.0", detail::biased_sigmoid(256, 8, 2.827f),
     "hy_v4", "sizes of the class; those of a published model are not verified"},
    {"inkling2", "Inkling2TopKRouter, transformers 5.24.0", detail::biased_sigmoid(384, 8, 8.0f),
     "inkling2", "another score can be configured"},
    {"inkling2_loop", "Inkling2LoopTopKRouter, transformers 5.24.0",
     detail::biased_sigmoid(128, 8, 8.0f), "inkling2_loop"},
    {"kimi_linear", "KimiLinearTopkRouter, transformers 5.24.0; Kimi-Linear-48B-A3B",
     detail::biased_sigmoid(256, 8, 2.446f), "kimi_linear", "one shared expert"},
    {"kolibri1",
     "Kolibri1TopKRouter, transformers 5.24.0",
     {.experts = 384,
      .k = 6,
      .score = score_kind::sigmoid,
      .domain = score_domain::selected,
      .selection_bias = true},
     "kolibri1",
     "the bias is added to the logits, not to the scores; norm_topk_prob is a flag"},
    {"lara_mini", "LaraMiniTopKRouter, transformers 5.24.0",
     detail::softmax_all(128, 4, detail::renormalized), "lara_mini",
     "one shared expert behind a sigmoid gate"},
    {"mimo_v2_flash", "MiMoV2FlashTopkRouter, transformers 5.24.0; MiMo-V2-Flash",
     detail::biased_sigmoid(256, 8, 1.0f), "mimo_v2_flash"},
    {"mistral_large4", "MistralLarge4TextTopkRouter, transformers 5.24.0",
     detail::with(detail::softmax_all(128, 4, detail::renormalized),
                  [](auto& s) {
                    s.eps_where = eps_mode::add;
                    s.eps = 1e-20f;
                  }),
     "mistral_large4", "as mistral4, always divided; one shared expert"},
    {"muse_spark", "MuseSparkTopkRouter, transformers 5.24.0",
     detail::with(detail::biased_sigmoid(256, 8, 1.0f), [](auto& s) { s.eps = 1e-15f; }),
     "muse_spark", "the product is multiplied by output_multiplier = 32^-0.5 before it is a logit"},
    {"qwen4_exp", "Qwen4ExpTextTopKRouter, transformers 5.24.0",
     detail::softmax_all(512, 10, detail::renormalized), "qwen4_exp",
     "one shared expert behind a sigmoid gate"},
    {"step3p7", "Step3p7TopKRouter, transformers 5.24.0; Step 3.5 and 3.7",
     detail::with(detail::biased_sigmoid(288, 8, 1.0f),
                  [](auto& s) {
                    s.eps_where = eps_mode::none;
                    s.eps = 0.0f;
                    s.scale_where = scale_place::weights;
                  }),
     "step3p7", "moe_router_scaling_factor multiplies the output, 1 by default"},
    {"unlimited_ocr", "UnlimitedOcrTextTopkRouter, transformers 5.24.0", detail::softmax_all(64, 6),
     "unlimited_ocr", "as deepseek_v2, greedy by default"},
    {"zaya",
     "ZayaRouter, transformers 5.24.0",
     {.experts = 17, .k = 1, .selection_bias = true, .zero_experts = 1},
     "",
     "the gate is a hidden layer on the sum of its own and the last layer's state; the last expert "
     "is skipped: there the class has weight 0"},
    // outside transformers: from configurations and code of the models, not run here
    {"kimi_k2", "Kimi-K2's configuration, DeepSeek-V3's rule",
     detail::biased_sigmoid(384, 8, 2.827f), "",
     "one shared expert; also the text model of Kimi-K2.5"},
    {"kimi_k3", "Kimi-K3, DeepSeek-V3's rule", detail::biased_sigmoid(896, 16, 1.0f), "",
     "its scale is not known: take it from the configuration"},
    {"ling_lite", "bailing_moe v1; Ling-lite", detail::softmax_all(64, 6, detail::renormalized), "",
     "two shared experts"},
    {"ling2", "bailing_moe_v2; Ling and Ring 2.0", detail::biased_sigmoid(256, 8, 2.5f, 8, 4), "",
     "one shared expert"},
    {"llada2", "LLaDA2-MoE; as Ling 2.0", detail::biased_sigmoid(256, 8, 2.5f, 8, 4), "",
     "sizes not verified"},
    {"step3", "Step-3", detail::softmax_all(48, 3, detail::renormalized), "",
     "whether it divides by the sum is not verified; one shared expert"},
    {"grok1", "Grok-1",
     detail::with(detail::softmax_all(8, 2, detail::renormalized),
                  [](auto& s) { s.softcap = 30.0f; }),
     "", "the soft-cap is on the router's logits"},
    {"arctic", "Snowflake Arctic", detail::softmax_all(128, 2, detail::renormalized), "",
     "beside a dense residual MLP"},
    {"klear", "Klear-46B-A2.5B", detail::biased_sigmoid(256, 8, 1.0f), "",
     "sizes, scale and eps not verified"},
    {"smallthinker",
     "SmallThinker-4BA0.6B",
     {.experts = 32,
      .k = 4,
      .score = score_kind::sigmoid,
      .domain = score_domain::selected,
      .normalize = normalization::sum},
     "",
     "the router reads the input of attention; whether weights are divided is a flag"},
    {"hunyuan_image_3", "HunyuanImage-3.0",
     detail::with(detail::softmax_all(64, 8, detail::renormalized),
                  [](auto& s) {
                    s.eps_where = eps_mode::clamp;
                    s.eps = 1e-8f;
                  }),
     "", "one shared MLP"},
    {"deepseek_v4_1", "DeepSeek-V4.1",
     detail::with(detail::biased_sigmoid(384, 6, 1.5f),
                  [](auto& s) { s.score = score_kind::sqrt_softplus; }),
     "", "its scale is that of deepseek_v4, not verified; one shared expert"},
    {"deepseek_v4_vision", "DeepSeek-V4 with images",
     detail::with(detail::biased_sigmoid(256, 6, 1.5f),
                  [](auto& s) {
                    s.score = score_kind::sqrt_softplus;
                    s.class_bias = true;
                  }),
     "", "tokens of images have a selection bias of their own: side_inputs::modality"},
    {"laguna_sqrtsoftplus", "LagunaTopKRouter with moe_router_score_func sqrtsoftplus",
     detail::with(detail::biased_sigmoid(256, 8, 2.5f),
                  [](auto& s) {
                    s.score = score_kind::sqrt_softplus;
                    s.eps_where = eps_mode::none;
                    s.eps = 0.0f;
                    s.scale_where = scale_place::output;
                  }),
     "", "as laguna"},
    {"nomic_bert_moe", "nomic-embed-text-v2-moe", detail::softmax_all(8, 2), "",
     "sizes and whether weights are divided not verified"},
    {"megrez", "Megrez2-3x7B-A3B", detail::biased_sigmoid(64, 6, 1.0f), "",
     "its scale is not known: take it from the configuration"},
    {"pangu_pro",
     "Pangu Pro MoE 72B",
     {.experts = 64,
      .k = 8,
      .selection = selection_kind::each_group,
      .groups = 8,
      .per_expert_scale = true},
     "",
     "one expert from each of eight groups, weight = probability * router_scale[id]; four shared"},
    {"intern_s1_pro",
     "Intern-S1-Pro",
     {.experts = 512,
      .k = 8,
      .selection = selection_kind::each_group,
      .groups = 8,
      .normalize = normalization::sum,
      .eps_where = eps_mode::add,
      .eps = 1e-20f},
     "",
     "sizes and scale not verified: take them from the configuration"},
    {"grove_moe",
     "GroveMoE",
     {.experts = 128,
      .k = 8,
      .score = score_kind::sigmoid,
      .selection_bias = true,
      .weight_apart = true,
      .weight_score = score_kind::softmax,
      .weight_domain = score_domain::selected},
     "",
     "sizes not verified; a second set of experts, id / 2, adds its output times 0.05"},
    {"skywork_moe",
     "Skywork-MoE",
     {.experts = 16, .k = 2, .normalize = normalization::sum, .standardize = 1.0f},
     "",
     "the factor of its standardised logits is a setting"},
};

/// The entry of that name in either list, or nullptr.
/// Example:
///
///     const catalog_entry* entry = find_in_catalog("mixtral");
///     if (entry != nullptr) route(make_router(entry->spec), logits, ws, choices);
constexpr const catalog_entry* find_in_catalog(std::string_view name) {
  for (const catalog_entry& entry : catalog)
    if (entry.name == name) return &entry;
  for (const catalog_entry& entry : newer_catalog)
    if (entry.name == name) return &entry;
  return nullptr;
}

namespace detail {

// Its letters and digits, all small.
inline std::string bare_name(std::string_view name) {
  std::string bare;
  for (const char c : name)
    if ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9'))
      bare += c;
    else if (c >= 'A' && c <= 'Z')
      bare += static_cast<char>(c - 'A' + 'a');
  return bare;
}

// That a name is not there, and the one that was meant: written otherwise, its begin, or with more
// behind it.
MOEROUTE_COLD inline std::string unknown_model(std::string_view name) {
  std::string said = "'" + std::string(name.substr(0, 64)) + "' is not in the catalogue";
  const std::string bare = bare_name(name);
  const catalog_entry* meant = nullptr;
  std::size_t known = 0;  // letters of the longest name that the word begins with
  const auto look = [&](const catalog_entry& entry) {
    const std::string other = bare_name(entry.name);
    if (bare.size() < 3) return;
    if (bare.starts_with(other) && other.size() > known) {
      meant = &entry;
      known = other.size();
    } else if (meant == nullptr && other.starts_with(bare)) {
      meant = &entry;
    }
  };
  for (const catalog_entry& entry : catalog) look(entry);
  for (const catalog_entry& entry : newer_catalog) look(entry);
  if (meant == nullptr) return said + ": docs/models.md has its names";
  return said + ": did you mean '" + std::string(meant->name) + "'?";
}

}  // namespace detail

/// The router of a published model, in a description that may be changed: find_in_catalog(name)
/// ->spec, for who knows that the name is there.
/// Throws: error where it is not, with the name that was meant if one is like it.
/// Example:
///
///     route(make_router(spec_of_model("mixtral")), logits, ws, choices);
inline const router_spec& spec_of_model(std::string_view name) {
  const catalog_entry* const entry = find_in_catalog(name);
  if (entry == nullptr) fail("spec_of_model", detail::unknown_model(name));
  return entry->spec;
}

}  // namespace moeroute
