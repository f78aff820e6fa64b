// What a description of a model says of its routers, layer by layer.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/router_spec.hpp>

namespace moeroute {

/// How a layer finds its experts.
enum class layer_router {
  none,  ///< a layer without experts
  by_score,
  table,  ///< by token id
};

/// The routers of a model.
struct model_routers {
  const catalog_entry* entry = nullptr;  ///< whose class it is
  router_spec spec;                      ///< of the layers that choose by score
  /// One for each layer that the description speaks of; nothing where a layer has no experts.
  std::vector<std::optional<router_spec>> layers;
  index_t count = 0;  ///< layers of the model; 0 where the description does not say

  /// The router of a layer; `spec` behind those that are listed.
  [[nodiscard]] std::optional<router_spec> of(index_t layer) const {
    check_range("model_routers", "layer", layer, 0, std::int64_t{1} << 62);
    const auto at = static_cast<std::size_t>(layer);
    return at < layers.size() ? layers[at] : std::optional(spec);
  }

  /// Throws: error that names `where` and the fields of a spec that clash.
  void check(const std::string& where) const {
    const auto checked = [&](const router_spec& s) {
#if MOEROUTE_EXCEPTIONS
      try {
        moeroute::check(s);
      } catch (const error& e) {
        fail("json", where + ": " + e.what());
      }
#else
      moeroute::check(s);
#endif
    };
    checked(spec);
    for (const auto& layer : layers)
      if (layer && *layer != spec) checked(*layer);
  }
};

}  // namespace moeroute
