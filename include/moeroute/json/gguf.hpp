// The routers of a GGUF file: from its metadata keys to a router_spec, layer by layer. Needs no
// third party; stands beside config_json.hpp because it answers the same question.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/json/model_routers.hpp>
#include <moeroute/json/routing_words.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute {

/// A value of GGUF metadata; of arrays those of up to 4096 whole numbers, others are monostate.
using gguf_value = std::variant<std::monostate, bool, std::int64_t, double, std::string,
                                std::vector<std::int64_t>>;

/// Metadata keys as the file spells them ("deepseek2.expert_count").
using gguf_metadata = std::map<std::string, gguf_value, std::less<>>;

namespace detail {

/// How a GGUF architecture says what may differ from file to file.
struct gguf_model {
  const char* arch;                                  ///< general.architecture
  const char* entry;                                 ///< in the catalogue
  enum flag { always, off, on } normalize = always;  ///< expert_weights_norm, or what absent means
  bool groups = false;  ///< expert_group_count, expert_group_used_count
  bool scale = false;   ///< expert_weights_scale
};

inline constexpr gguf_model gguf_models[] = {
    {"llama", "mixtral"},
    {"qwen2moe", "qwen2_moe"},
    {"qwen3moe", "qwen3_moe"},
    {"qwen3next", "qwen3_next"},
    {"qwen35moe", "qwen3_5_moe"},
    {"qwen3vlmoe", "qwen3_vl_moe"},
    {"olmoe", "olmoe"},
    {"jamba", "jamba"},
    {"dbrx", "dbrx"},
    {"hunyuan-moe", "hunyuan_v1_moe"},
    {"gemma4", "gemma4"},
    {"mellum", "mellum", gguf_model::on},
    {"mistral4", "mistral4", gguf_model::off, true, true},
    {"deepseek2", "deepseek_v3", gguf_model::off, true, true},
    {"deepseek2-ocr", "deepseek_ocr2", gguf_model::off, true, true},
    {"deepseek32", "deepseek_v32", gguf_model::off, true, true},
    {"deepseek4", "deepseek_v4", gguf_model::always, false, true},
    {"dots1", "dots1", gguf_model::off, true, true},
    {"glm4moe", "glm4_moe", gguf_model::off, true, true},
    {"glm-dsa", "glm_moe_dsa", gguf_model::off, true, true},
    {"exaone-moe", "exaone_moe", gguf_model::off, true, true},
    {"nemotron_h_moe", "nemotron_h", gguf_model::off, true, true},
    {"afmoe", "afmoe", gguf_model::off, false, true},
    {"laguna", "laguna", gguf_model::always, false, true},
    {"hy_v3", "hy_v3", gguf_model::always, false, true},
    {"lfm2moe", "lfm2_moe"},
    {"minimax-m2", "minimax_m2"},
    {"minimax-m3", "minimax_m3_vl", gguf_model::always, false, true},
    {"ernie4_5-moe", "ernie4_5_moe"},
    {"gpt-oss", "gpt_oss"},
    {"granitemoe", "granitemoe"},
    {"granitehybrid", "granitemoehybrid"},
    {"cohere2moe", "cohere2_moe", gguf_model::off},
    {"llama4", "llama4_scout"},
    {"phimoe", "phimoe"},
    {"bailingmoe", "ling_lite", gguf_model::off},
    {"bailingmoe2", "ling2", gguf_model::off, true, true},
    {"mimo2", "mimo_v2_flash", gguf_model::off, true, true},
    {"step35", "step3p7", gguf_model::always, false, true},
    {"kimi-linear", "kimi_linear", gguf_model::off, true, true},
    {"smallthinker", "smallthinker"},
    {"grovemoe", "grove_moe"},
    {"grok", "grok1"},
    {"arctic", "arctic"},
    {"nomic-bert-moe", "nomic_bert_moe"},
};

/// Keys of an architecture that speak of routing and change none.
inline constexpr std::string_view harmless_gguf_keys[] = {
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_chunk_feed_forward_length",
    "expert_shared_count",
    "expert_latent_length",
    "experts_per_group",
    "expert_group_scale",
    "moe_latent_size",
    "leading_dense_block_count",
    "interleave_moe_layer_step",
    "moe_every_n_layers",
};

/// The keys of one architecture in a named file; every complaint says which.
class gguf_fields {
 public:
  gguf_fields(const gguf_metadata& keys, std::string arch, std::string file)
      : keys_(keys), arch_(std::move(arch)), file_(std::move(file)) {}

  /// The key is there, read.
  const gguf_value* find(std::string_view name) const {
    asked_.emplace_back(name);
    const auto found = keys_.find(arch_ + "." + std::string(name));
    return found == keys_.end() ? nullptr : &found->second;
  }

  std::optional<index_t> integer(std::string_view name, index_t low, index_t high) const {
    const gguf_value* value = find(name);
    if (value == nullptr) return std::nullopt;
    const auto* number = std::get_if<std::int64_t>(value);
    if (number == nullptr || *number < low || *number > high)
      wrong(name, "a whole number from " + std::to_string(low) + " to " + std::to_string(high));
    return *number;
  }

  std::optional<double> real(std::string_view name) const {
    const gguf_value* value = find(name);
    if (value == nullptr) return std::nullopt;
    const auto* number = std::get_if<double>(value);
    if (number == nullptr || !(*number >= 0) || !std::isfinite(*number))
      wrong(name, "a number from 0 on");
    return *number;
  }

  std::optional<bool> flag(std::string_view name) const {
    const gguf_value* value = find(name);
    if (value == nullptr) return std::nullopt;
    const auto* said = std::get_if<bool>(value);
    if (said == nullptr) wrong(name, "true or false");
    return *said;
  }

  /// A key that speaks of routing and was not read is refused.
  void refuse_unread() const {
    const std::string prefix = arch_ + ".";
    for (const auto& [key, value] : keys_) {
      if (!key.starts_with(prefix)) continue;
      const std::string name = key.substr(prefix.size());
      if (!speaks_of_routing(name)) continue;
      if (std::find(asked_.begin(), asked_.end(), name) != asked_.end()) continue;
      if (std::find(std::begin(harmless_gguf_keys), std::end(harmless_gguf_keys), name) !=
          std::end(harmless_gguf_keys))
        continue;
      fail("gguf", file_ + ": key '" + printable(key) + "' speaks of routing and is not known");
    }
  }

  [[noreturn]] void wrong(std::string_view name, const std::string& expected) const {
    const auto found = keys_.find(arch_ + "." + std::string(name));
    fail("gguf", file_ + ": key '" + printable(arch_) + "." + std::string(name) + "': expected " +
                     expected + ", found " + (found == keys_.end() ? "none" : show(found->second)));
  }

  static std::string show(const gguf_value& value) {
    if (const auto* b = std::get_if<bool>(&value)) return *b ? "true" : "false";
    if (const auto* i = std::get_if<std::int64_t>(&value)) return std::to_string(*i);
    if (const auto* d = std::get_if<double>(&value)) return number(static_cast<float>(*d));
    if (const auto* s = std::get_if<std::string>(&value))
      return s->size() > 40 ? "a text" : "'" + printable(*s) + "'";
    return "an array";
  }

 private:
  const gguf_metadata& keys_;
  std::string arch_, file_;
  mutable std::vector<std::string> asked_;
};

/// Reads little-endian values one after the other; never past the end.
class gguf_bytes {
 public:
  gguf_bytes(std::span<const std::uint8_t> bytes, std::string file)
      : bytes_(bytes), file_(std::move(file)) {}

  const std::uint8_t* take(std::uint64_t n) {
    if (n > bytes_.size() - at_)
      fail("gguf", file_ + ": expected " + std::to_string(n) + " bytes at offset " +
                       std::to_string(at_) + ", there are " + std::to_string(bytes_.size() - at_));
    const std::uint8_t* const here = bytes_.data() + at_;
    at_ += static_cast<std::size_t>(n);
    return here;
  }
  std::uint64_t whole(int bytes) {
    const std::uint8_t* const from = take(static_cast<std::uint64_t>(bytes));
    std::uint64_t value = 0;
    for (int i = bytes; i-- > 0;) value = value << 8 | from[i];
    return value;
  }
  std::string text() {
    const std::uint64_t n = whole(8);
    const std::uint8_t* const from = take(n);
    return {reinterpret_cast<const char*>(from), static_cast<std::size_t>(n)};
  }
  std::size_t offset() const { return at_; }
  [[noreturn]] void refuse(const std::string& sentence) const {
    fail("gguf", file_ + ": " + sentence + " at offset " + std::to_string(at_));
  }

 private:
  std::span<const std::uint8_t> bytes_;
  std::string file_;
  std::size_t at_ = 0;
};

// Bytes of a value by its type in the file; 0: text, array or no type.
inline int gguf_size(std::uint64_t type) {
  constexpr std::string_view sizes = "1122444100888";
  const auto known = static_cast<std::size_t>(std::min<std::uint64_t>(type, sizes.size()));
  const std::string_view from_type = sizes.substr(known);
  return from_type.empty() ? 0 : from_type.front() - '0';
}

inline gguf_value gguf_scalar(gguf_bytes& in, std::uint64_t type) {
  const int size = gguf_size(type);
  if (type == 8) return in.text();
  if (size == 0) in.refuse("expected the type of a value, found " + std::to_string(type));
  const std::uint64_t raw = in.whole(size);
  switch (type) {
    case 6: return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(raw)));
    case 7: return raw != 0;
    case 12: return std::bit_cast<double>(raw);
    case 10:
      // Larger than any count: what reads it refuses it as out of range.
      return static_cast<std::int64_t>(std::min<std::uint64_t>(raw, INT64_MAX));
    case 1:
    case 3:
    case 5:
    case 11: {
      const int shift = 64 - 8 * size;
      return static_cast<std::int64_t>(raw << shift) >> shift;
    }
    default: return static_cast<std::int64_t>(raw);
  }
}

}  // namespace detail

/// The metadata at the begin of a GGUF file (versions 2 and 3, little-endian); `bytes` may end
/// behind it.
///
/// Throws: error that names `file` and the offset where the bytes are no such metadata, end too
/// early, or have a key twice.
[[nodiscard]] inline gguf_metadata parse_gguf_metadata(std::span<const std::uint8_t> bytes,
                                                       const std::string& file) {
  using namespace detail;
  gguf_bytes in(bytes, file);
  if (std::memcmp(in.take(4), "GGUF", 4) != 0) in.refuse("expected a GGUF file");
  const std::uint64_t version = in.whole(4);
  if (version != 2 && version != 3)
    in.refuse("expected version 2 or 3, found " + std::to_string(version));
  in.whole(8);  // tensors
  gguf_metadata keys;
  for (std::uint64_t left = in.whole(8); left > 0; --left) {
    std::string key = in.text();
    const std::uint64_t type = in.whole(4);
    gguf_value value;
    if (type == 9) {
      const std::uint64_t of = in.whole(4), n = in.whole(8);
      const int size = gguf_size(of);
      const bool wholes = of != 6 && of != 12 && size != 0 && n <= 4096;
      if (of == 8) {
        for (std::uint64_t i = 0; i < n; ++i) in.take(in.whole(8));
      } else if (wholes) {
        std::vector<std::int64_t> list;
        for (std::uint64_t i = 0; i < n; ++i) {
          const gguf_value one = gguf_scalar(in, of);
          list.push_back(std::holds_alternative<bool>(one) ? std::int64_t{std::get<bool>(one)}
                                                           : std::get<std::int64_t>(one));
        }
        value = std::move(list);
      } else if (size != 0 && n <= UINT64_MAX / 8) {
        in.take(n * static_cast<std::uint64_t>(size));
      } else {
        in.refuse("expected an array of numbers or texts");
      }
    } else {
      value = gguf_scalar(in, type);
    }
    const std::string shown = printable(key);
    if (!keys.emplace(std::move(key), std::move(value)).second)
      in.refuse("key '" + shown + "' stands there twice");
  }
  return keys;
}

/// The routers that GGUF metadata describes, of one of the architectures that the catalogue has.
///
/// Reads expert_count, expert_used_count, expert_gating_func, expert_group_count,
/// expert_group_used_count, expert_weights_norm, expert_weights_scale and which layers have
/// experts; the rest of the rule is that of the catalogue's entry. A selection bias is a tensor in
/// these files (exp_probs_b), so the spec has the class's; give make_router zeros where there is
/// none. A key that speaks of routing and is not known is refused.
///
/// Throws: error that names `file`, the key and what was expected.
[[nodiscard]] inline model_routers routers_from_gguf(const gguf_metadata& keys,
                                                     const std::string& file) {
  using namespace detail;
  const auto named = keys.find("general.architecture");
  if (named == keys.end()) fail("gguf", file + ": key 'general.architecture' is missing");
  const auto* arch = std::get_if<std::string>(&named->second);
  const gguf_model* model = nullptr;
  for (const gguf_model& one : gguf_models)
    if (arch != nullptr && *arch == one.arch) model = &one;
  if (model == nullptr)
    fail("gguf", file +
                     ": key 'general.architecture': expected a mixture-of-experts model of the "
                     "catalogue, found " +
                     gguf_fields::show(named->second));
  const gguf_fields fields(keys, *arch, file);

  // DeepSeek-V2 and V3 share a name; the newer one says sigmoid.
  const std::optional<index_t> gating = fields.integer("expert_gating_func", 0, 4);
  std::string_view entry = model->entry;
  if (*arch == "deepseek2" && gating.value_or(0) < 2) entry = "deepseek_v2";
  const catalog_entry* const published = find_in_catalog(entry);
  router_spec s = published->spec;
  const bool v2 = entry == "deepseek_v2" || entry == "deepseek_ocr2";

  const std::optional<index_t> experts = fields.integer("expert_count", 1, max_experts);
  if (!experts) fields.wrong("expert_count", "a whole number");
  s.experts = *experts;
  const std::optional<index_t> k = fields.integer("expert_used_count", 1, s.experts);
  if (!k) fields.wrong("expert_used_count", "a whole number");
  s.k = *k;

  if (gating.value_or(0) != 0) {
    const score_kind score = *gating == 2   ? score_kind::sigmoid
                             : *gating == 4 ? score_kind::sqrt_softplus
                                            : score_kind::softmax;
    const bool selected = *gating == 3;
    // Cohere's class has two modes; the other ones have one.
    if (entry == "cohere2_moe" && score != score_kind::sqrt_softplus) {
      s.score = score;
    } else if (score != s.score || (selected && s.domain != score_domain::selected)) {
      fields.wrong("expert_gating_func",
                   "that of " + std::string(entry) + ", " + std::string(to_string(s.score)));
    }
  }
  const std::optional<bool> norm = fields.flag("expert_weights_norm");
  const auto raw = [&] {
    s.normalize = normalization::none;
    s.eps_where = eps_mode::none;
    s.eps = 0.0f;
  };
  const bool one_sum = s.score == score_kind::softmax && s.domain == score_domain::selected;
  if (model->normalize == gguf_model::always || v2) {
    const bool divided = s.normalize != normalization::none;
    if (norm && *norm != divided && !(*norm && one_sum))
      fields.wrong("expert_weights_norm", divided ? "true" : "false");
  } else if (!norm.value_or(model->normalize == gguf_model::on)) {
    raw();
  } else if (!one_sum) {
    s.normalize = normalization::sum;
  }
  const double scale = fields.real("expert_weights_scale").value_or(0.0);
  if (model->scale)
    s.scale = scale == 0.0 ? 1.0f : static_cast<float>(scale);  // 0 is "none" in these files
  else if (scale != 0.0 && scale != 1.0)
    fields.wrong("expert_weights_scale", "0 or 1");

  const index_t groups = fields.integer("expert_group_count", 0, s.experts).value_or(0);
  const index_t kept =
      fields.integer("expert_group_used_count", 0, std::max<index_t>(groups, 1)).value_or(0);
  s.groups = s.topk_group = 1;
  if (groups > 1) {
    if (!model->groups) fields.wrong("expert_group_count", "0 or 1");
    if (kept == 0) fields.wrong("expert_group_used_count", "how many groups are kept");
    s.groups = groups;
    s.topk_group = kept;
  }
  s.group_score = groups > 1 && v2 ? group_score::max : group_score::top2_sum;
  s.group_fill = groups > 1 && (v2 || entry == "mistral4") ? 0.0f : router_spec{}.group_fill;
  if (const double cap = fields.real("router_logit_softcapping").value_or(0.0); cap != 0.0) {
    if (entry != "laguna" && entry != "grok1") fields.wrong("router_logit_softcapping", "0");
    s.softcap = static_cast<float>(cap);
  }

  constexpr index_t most = 1 << 12;
  model_routers made{.entry = published, .spec = s, .layers = {}, .count = 0};
  const index_t all = fields.integer("block_count", 0, most).value_or(0);
  const index_t predicted = fields.integer("nextn_predict_layers", 0, all).value_or(0);
  made.count = all - predicted;
  const index_t dense = fields.integer("leading_dense_block_count", 0, most).value_or(0);
  const index_t step = std::max<index_t>(
      1, fields.integer("interleave_moe_layer_step", 0, most)
             .value_or(fields.integer("moe_every_n_layers", 0, most).value_or(0)));
  const index_t tables =
      entry == "deepseek_v4" ? fields.integer("hash_layer_count", 0, most).value_or(0) : 0;
  for (index_t l = 0; l < std::max(made.count, tables); ++l) {
    if (l < dense || (l + 1) % step != 0) {
      made.layers.emplace_back(std::nullopt);
      continue;
    }
    router_spec own = s;
    if (l < tables) {
      own.selection = selection_kind::expert_table;
      own.selection_bias = false;
    }
    made.layers.emplace_back(own);
  }
  fields.refuse_unread();
  made.check(file);
  return made;
}

}  // namespace moeroute
