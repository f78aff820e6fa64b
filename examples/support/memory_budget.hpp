// A model with part of its experts in memory: what was asked for on the command line, the steering
// of its layers, and what came of it.
#pragma once

#include "checkpoint.hpp"
#include "error.hpp"
#include "file.hpp"
#include "model.hpp"
#include "steering.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include <moeroute/base/read_number.hpp>
#include <moeroute/data/expert_profile.hpp>

namespace example {

struct memory_request {
  double share = 1.0;  ///< of each layer's experts in memory
  moeroute::residency_rule rule{};
  moeroute::cache_policy policy = moeroute::cache_policy::lru;
  /// Half of the memory holds what this profile says is used most.
  std::optional<std::filesystem::path> profile{};
  std::optional<std::filesystem::path> save_profile{};
  bool read_experts = false;  ///< misses read the checkpoint
};

/// RULE or RULE:PARAMETER, as --residency has it.
[[nodiscard]] inline moeroute::residency_rule parse_residency(std::string_view text) {
  using moeroute::residency_kind;
  const auto colon = text.find(':');
  const std::string_view name = text.substr(0, colon);
  moeroute::residency_rule rule;
  for (const residency_kind kind :
       {residency_kind::off, residency_kind::cache_prior, residency_kind::max_rank,
        residency_kind::mass_threshold, residency_kind::margin_swap, residency_kind::drop_cold}) {
    if (name != moeroute::to_string(kind)) continue;
    rule.kind = kind;
    if (kind == residency_kind::off && colon == std::string_view::npos) return rule;
    double value = 0;
    const std::string_view number =
        colon == std::string_view::npos ? std::string_view{} : text.substr(colon + 1);
    if (!moeroute::detail::read_number(number, value) || !(value >= 0) || value > 1e6 ||
        kind == residency_kind::off ||
        (kind == residency_kind::max_rank && value != std::floor(value)))
      refuse("--residency: expected RULE:NUMBER, found '", text, "'");
    if (kind == residency_kind::max_rank)
      rule.ranks = static_cast<index_t>(value);
    else
      rule.strength = static_cast<float>(value);
    return rule;
  }
  refuse("--residency: expected off, prior, maxrank, mass, swap or drop, found '", name, "'");
}

/// A live policy by its name, as --cache has it.
[[nodiscard]] inline moeroute::cache_policy parse_policy(std::string_view name) {
  std::string known;
  for (const moeroute::cache_policy policy : moeroute::live_policies) {
    if (name == moeroute::to_string(policy)) return policy;
    known += known.empty() ? "" : ", ";
    known += moeroute::to_string(policy);
  }
  refuse("--cache: expected one of ", known, ", found '", name, "'");
}

/// Steers a model's layers while it lives.
class memory_budget {
 public:
  memory_budget(model& weights, const std::filesystem::path& directory, const memory_request& asked)
      : model_(weights), asked_(asked) {
    const model_config& c = weights.config;
    const auto wanted =
        static_cast<index_t>(std::llround(asked.share * static_cast<double>(c.experts())));
    held_ = std::clamp<index_t>(wanted, 1, c.experts());
    moeroute::expert_profile hot;
    if (asked.profile) {
      hot = moeroute::parse_expert_profile(input_file(*asked.profile).text(1U << 28));
      if (hot.layers != c.layers || hot.experts != c.experts())
        refuse(asked.profile->string(), ": expected ", c.layers, " layers of ", c.experts(),
               " experts, found ", hot.layers, " of ", hot.experts);
    }
    if (asked.read_experts) tensors_.emplace(directory);
    for (index_t l = 0; l < c.layers; ++l) {
      std::vector<std::int32_t> pins;
      if (asked.profile) {
        const auto row = hot.layer(l);
        pins = moeroute::hot_keys({1, c.experts(), {row.begin(), row.end()}}, held_ / 2);
      }
      const auto& router = weights.layers[static_cast<std::size_t>(l)].moe.router();
      auto& steering = steering_.emplace_back(
          std::make_unique<layer_steering>(router.plain(), asked.rule,
                                           moeroute::expert_cache_options{.experts = c.experts(),
                                                                          .capacity = held_,
                                                                          .policy = asked.policy,
                                                                          .pinned = pins,
                                                                          .decay = 0.98}));
      if (tensors_) steering->on_load = [this, l](moeroute::expert_id e) { read(l, e); };
      router.steer(steering.get());
    }
  }
  memory_budget(const memory_budget&) = delete;
  memory_budget& operator=(const memory_budget&) = delete;
  ~memory_budget() { stop(); }

  /// The model is the plain one again.
  void stop() const {
    for (const auto& layer : model_.layers) layer.moe.router().steer(nullptr);
  }

  void print(std::ostream& out) const {
    std::int64_t lookups = 0, hits = 0;
    moeroute::residency_counts all;
    for (const auto& s : steering_) {
      lookups += s->lookups;
      hits += s->hits;
      all.add(s->counts);
    }
    const model_config& c = model_.config;
    const auto tokens = static_cast<double>(std::max<std::int64_t>(all.tokens, 1));
    const auto loads = static_cast<double>(lookups - hits);
    const double size = 6.0 * static_cast<double>(c.hidden * c.expert_width);
    out << join(
        "memory      ", held_, " of ", c.experts(), " experts per layer, ",
        moeroute::to_string(asked_.policy), ", rule ", moeroute::to_string(asked_.rule.kind),
        "\nloads       ", rounded(loads / tokens), " per token and layer, ",
        rounded(lookups == 0 ? 100.0
                             : 100.0 * static_cast<double>(hits) / static_cast<double>(lookups)),
        " % of lookups hit, ",
        rounded(loads * size / tokens * static_cast<double>(c.layers) / 1024.0),
        " KiB per token in 16 bits\nagreement   ", rounded(100 * all.agreement()),
        " % of the plain choices, softmax mass lost ", rounded(all.mass_lost()), '\n');
    if (tensors_)
      out << join("read        ", rounded(static_cast<double>(bytes_) / 1048576.0), " MiB in ",
                  rounded(1e3 * seconds_), " ms\n");
    if (asked_.save_profile) save();
  }

 private:
  static double rounded(double x) { return std::round(x * 1e4) / 1e4; }

  void save() const {
    moeroute::expert_profile made{.layers = model_.config.layers,
                                  .experts = model_.config.experts(),
                                  .uses = std::vector<std::int64_t>(static_cast<std::size_t>(
                                      model_.config.layers * model_.config.experts()))};
    for (std::size_t l = 0; l < steering_.size(); ++l)
      steering_[l]->uses(std::span(made.uses).subspan(l * static_cast<std::size_t>(made.experts),
                                                      static_cast<std::size_t>(made.experts)));
    std::ofstream file(*asked_.save_profile, std::ios::binary);
    file << to_string(made) << std::flush;
    if (!file) refuse(asked_.save_profile->string(), ": cannot be written");
  }

  // An expert's three matrices, as they would be read on a miss.
  void read(index_t layer, moeroute::expert_id e) {
    const auto begun = std::chrono::steady_clock::now();
    const model_config& c = model_.config;
    const detail::tensor_names names(c.family);
    memory_.resize(static_cast<std::size_t>(c.hidden * c.expert_width));
    const std::string expert =
        "model.layers." + std::to_string(layer) + "." + names.expert + std::to_string(e);
    for (const std::string& part :
         {names.gate_projection, names.up_projection, names.down_projection})
      tensors_->read(expert + part + ".weight", 0, memory_);
    bytes_ += static_cast<std::int64_t>(6 * memory_.size());
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
  }

  model& model_;
  memory_request asked_;
  index_t held_ = 0;
  std::vector<std::unique_ptr<layer_steering>> steering_;
  std::optional<checkpoint> tensors_;
  std::vector<float> memory_;
  std::int64_t bytes_ = 0;
  double seconds_ = 0;
};

}  // namespace example
