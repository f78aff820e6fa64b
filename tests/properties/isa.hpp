// Property: every instruction set that the machine has gives the same ids and weights. For programs
// with moeroute_add_dispatch().
#pragma once

#include <moeroute_dispatch.hpp>

#include <algorithm>
#include <bit>

#include "properties/bytes.hpp"
#include "properties/spec.hpp"

namespace test {

inline std::string isa_property(bytes in) {
  using namespace moeroute;
  const router_spec s = detail::any_spec(in);
  std::vector<float> bias, scale;
  for (index_t e = 0; e < std::max<index_t>(0, s.experts); ++e) {
    const auto number = static_cast<float>(in.below(64));
    if (s.selection_bias) bias.push_back((number - 32.0f) / 256.0f);
    if (s.per_expert_scale) scale.push_back(0.5f + number / 64.0f);
  }
  const index_t tokens = in.below(36);
  std::vector<float> z;
  std::vector<std::int32_t> first_ids;
  std::vector<float> first_weights;
  for (const dispatch::kernels* kernels : dispatch::available()) {
    try {
      dispatch::session session(s, {.bias = bias, .per_expert_scale = scale}, *kernels);
      if (z.empty()) z = in.logits(tokens * s.columns());
      std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * s.k));
      std::vector<float> weights(ids.size());
      session.route(z.data(), tokens, s.columns(), ids.data(), weights.data());
      if (kernels == dispatch::available().front()) {
        first_ids = ids;
        first_weights = weights;
      }
      const std::string where = to_string(s) + " on " + kernels->name + ": ";
      if (ids != first_ids) return where + "other ids";
      const auto bits = [](float w) { return std::bit_cast<std::uint32_t>(w); };
      if (!std::ranges::equal(weights, first_weights, {}, bits, bits))
        return where + "other weights";
    } catch (const std::invalid_argument&) {
      return "";  // refused by all alike: the specs are checked before anything is done
    }
  }
  return "";
}

}  // namespace test
