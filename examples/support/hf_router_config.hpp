// The router of a Hugging Face checkpoint: what moeroute/json/config_json.hpp reads, layer by
// layer.
#pragma once

#include <cstdint>
#include <string>

#include <moeroute/json/config_json.hpp>

#include "json.hpp"

namespace example {

/// The router of one layer; of the layers that choose by score where the layer has no experts or is
/// none of the file's.
[[nodiscard]] inline moeroute::router_spec spec_from_config(const json& document,
                                                            const std::string& file,
                                                            std::int64_t layer = 1 << 20) {
  const moeroute::model_routers model = moeroute::routers_from_config(document, file);
  return model.of(layer).value_or(model.spec);
}

}  // namespace example
