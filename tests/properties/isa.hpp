// Property: every instruction set that the machine has gives the same ids and weights. For programs
// that link moeroute::compiled.
#pragma once

#include <algorithm>
#include <bit>
#include <moeroute/compiled.hpp>

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
  compiled::assignment choices;
  for (int i = 0; const char* isa = moeroute_isa_name(i); ++i) {
    try {
      compiled::check(moeroute_use_isa(isa));
      compiled::spec words = compiled::plain_spec();
      compiled::describe(s, words);  // of rare words, what the library has
      const compiled::router router(words, {.bias = bias, .per_expert_scale = scale});
      if (z.empty()) z = in.logits(tokens * router.columns());
      compiled::route(router, {z.data(), tokens, router.columns()}, choices);
      if (i == 0) {
        first_ids.assign(choices.ids().begin(), choices.ids().end());
        first_weights.assign(choices.weights().begin(), choices.weights().end());
      }
      const std::string where = to_string(s) + " on " + isa + ": ";
      if (!std::ranges::equal(choices.ids(), first_ids)) return where + "other ids";
      const auto bits = [](float w) { return std::bit_cast<std::uint32_t>(w); };
      if (!std::ranges::equal(choices.weights(), first_weights, {}, bits, bits))
        return where + "other weights";
    } catch (const std::invalid_argument&) {
      return "";  // refused by all alike: the specs are checked before anything is done
    }
  }
  return "";
}

}  // namespace test
