// The bundled model's router logits: what its four layers saw of three kinds of text.
#pragma once

#include "error.hpp"
#include "npy.hpp"

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <moeroute/matrix/matrix.hpp>

namespace example {

inline constexpr std::array<const char*, 3> trace_domains{"python", "c", "english"};

/// Experts per token of the model that the traces are of.
inline constexpr moeroute::index_t trace_k = 4;

/// One domain: [layers, tokens, experts].
struct router_trace {
  std::string domain;
  moeroute::index_t layers, tokens, experts;
  std::vector<float> logits;

  [[nodiscard]] moeroute::matrix_view<const float> layer(moeroute::index_t l) const {
    return {logits.data() + l * tokens * experts, tokens, experts};
  }
};

[[nodiscard]] inline std::vector<router_trace> read_traces(const std::filesystem::path& model) {
  std::vector<router_trace> list;
  for (const char* const domain : trace_domains) {
    const auto path = model / "traces" / (std::string("router_logits_") + domain + ".npy");
    npy_array read = read_npy(path);
    if (read.shape.size() != 3) {
      refuse(path.string(), ": expected [layers, tokens, experts]");
    }
    const auto extent = [&](std::size_t i) {
      return static_cast<moeroute::index_t>(read.shape[i]);
    };
    list.push_back({domain, extent(0), extent(1), extent(2), std::move(read.values)});
  }
  return list;
}

}  // namespace example
