// Which layers of a model have experts, by the fields of config.json that say so.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include <moeroute/base/read_number.hpp>
#include <moeroute/json/config_fields.hpp>
#include <moeroute/json/model_routers.hpp>

namespace moeroute::detail {

/// The layers that Step's moe_layers_enum names, "3,4,5" or a list; without it all but the first
/// `dense`.
inline std::vector<bool> layers_enum(const json_fields& f, index_t n, index_t dense) {
  std::vector<bool> there(static_cast<std::size_t>(n));
  if (!f.has("moe_layers_enum")) {
    std::fill(there.begin() + static_cast<std::ptrdiff_t>(std::min(dense, n)), there.end(), true);
    return there;
  }
  const nlohmann::json& value = f.at("moe_layers_enum");
  const auto take = [&](index_t l) {
    if (l < 0) f.wrong("moe_layers_enum", "numbers of layers");
    if (l < n) there[static_cast<std::size_t>(l)] = true;  // behind them: those that predict ahead
  };
  if (value.is_array()) {
    for (const nlohmann::json& one : value) take(one.is_number_integer() ? one.get<index_t>() : -1);
    return there;
  }
  std::string text = f.text("moe_layers_enum") + ",";
  std::erase(text, ' ');
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t comma = text.find(',', at);
    const std::string_view word = std::string_view(text).substr(at, comma - at);
    index_t l = 0;
    if (!word.empty()) take(read_number(word, l) ? l : -1);
    at = comma + 1;
  }
  return there;
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
  for (const char* name : {"num_hidden_layers", "n_layers", "n_layer", "num_layers"})
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
  const std::string_view entry = from.model.entry;
  const std::string first = spelled(f, "first_k_dense_replace");
  // Flint lists its dense layers; the first two are the default of that list.
  const index_t usual = entry == "flint" && f.has("mlp_only_layers") ? 0 : from.model.dense;
  const index_t dense = f.said(first) ? count(first.c_str(), 0) : usual;
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
  if (f.has("moe_layer_layout")) {
    const nlohmann::json& list = f.array("moe_layer_layout");
    if (static_cast<index_t>(list.size()) != n)
      fail("json", f.where() + ": field 'moe_layer_layout' lists " + std::to_string(list.size()) +
                       " layers, field 'num_hidden_layers' says " + std::to_string(n));
    without([&](index_t l) { return says_nothing(list[static_cast<std::size_t>(l)]); });
  }
  if (entry == "step3p7" || entry == "step3") {
    const std::vector<bool> said = layers_enum(f, n, entry == "step3" ? 4 : 3);
    without([&](index_t l) { return !said[static_cast<std::size_t>(l)]; });
  } else if (entry == "nomic_bert_moe") {
    const index_t every = count("moe_every_n_layers", 0);
    without([&](index_t l) { return every == 0 || l % every != 1; });
  } else if (entry == "jamba") {
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
  std::fill_n(layers.begin(), std::min(tables, n), table);
  return layers;
}

}  // namespace moeroute::detail
