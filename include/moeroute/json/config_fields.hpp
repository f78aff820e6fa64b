// Fields of config.json under all their spellings, and as their classes take what is absent or
// null.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/json/config_models.hpp>
#include <moeroute/json/json.hpp>

namespace moeroute::detail {

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
      {"routed_scaling_factor", "router_scaling_factor", "moe_routed_scaling_factor", "route_scale",
       "moe_router_scaling_factor"},
      {"norm_topk_prob", "route_norm", "moe_renormalize", "norm_expert_weight"},
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

}  // namespace moeroute::detail
