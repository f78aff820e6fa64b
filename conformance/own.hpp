// The kit's tokens through the compiled library.
#pragma once

#include <functional>
#include <moeroute/compiled.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <string>
#include <vector>

#include "kit.hpp"

namespace conformance {

/// Whether the compiled library has words for the rule.
inline bool in_library(const kit_file& kit) {
  return moeroute::compiled::can_describe(moeroute::parse_spec(kit.rule));
}

/// What the library decides for every token of the file; `change` may alter its description first.
/// Throws: std::invalid_argument with the library's sentence.
inline std::vector<answer> own_answers(const kit_file& kit,
                                       const std::function<void(moeroute_spec&)>& change = {}) {
  namespace library = moeroute::compiled;
  library::spec spec = library::describe(moeroute::parse_spec(kit.rule));
  if (change) change(spec);
  std::vector<std::int32_t> table;
  for (const auto& of_id : kit.table)
    for (const std::int64_t e : of_id) table.push_back(static_cast<std::int32_t>(e));
  library::tensors tensors{.table = table};
  if (spec.selection_bias != 0) tensors.bias = kit.bias;
  if (spec.per_expert_scale != 0) tensors.per_expert_scale = kit.per_expert_scale;
  const library::router router(spec, tensors);
  if (router.ragged() || router.k() != kit.k)
    throw malformed(kit.model + ":1: k: does not fit the rule, or the rule's k varies");
  library::assignment choices;
  std::vector<answer> out;
  for (const kit_case& c : kit.cases) {
    std::vector<float> logits;
    for (const auto& row : c.logits) logits.insert(logits.end(), row.begin(), row.end());
    const std::vector<std::uint8_t> mask(c.mask.begin(), c.mask.end());
    const std::vector<std::int32_t> token_ids(c.token_ids.begin(), c.token_ids.end());
    library::side_inputs side{};
    if (!mask.empty()) side.mask = mask.data();
    if (!token_ids.empty()) side.token_ids = token_ids.data();
    library::route(router, {logits.data(), std::ssize(c.logits), kit.columns}, side, choices);
    const auto k = static_cast<std::size_t>(choices.k());
    for (std::size_t t = 0; t < c.tokens(); ++t) {
      const auto ids = choices.ids().subspan(t * k, k);
      const auto weights = choices.weights().subspan(t * k, k);
      out.push_back({{ids.begin(), ids.end()}, {weights.begin(), weights.end()}});
    }
  }
  return out;
}

}  // namespace conformance
