// Property: capacity drops whom the ranking of all rivals drops, or the rule is refused.
#pragma once

#include <cmath>
#include <moeroute/stage/capacity.hpp>

#include "properties/plan.hpp"

namespace test {

inline std::string capacity_property(bytes in) {
  using namespace moeroute;
  assignment a = detail::any_assignment(in, true);
  std::vector<float> priority;
  if (in.flag())
    for (index_t t = 0; t < a.tokens(); ++t) priority.push_back(in.logit());
  capacity_policy policy{
      .rule = {.formula = in.one_of(capacity_formula::soft_moe),
               .factor = in.below(8) == 0 ? static_cast<double>(in.raw())
                                          : static_cast<double>(in.below(64)) / 16.0,
               .count = in.below(20),
               .minimum = in.usually<index_t>(0, [&] { return in.below(9); }),
               .multiple = in.usually<index_t>(1, [&] { return in.below(9); })},
      .order = in.one_of(drop_order::random),
      .renormalize = in.one_of(renormalization::after_drop),
      .eps = in.usually(0.0f, [&] { return in.logit(); }),
      .priority = priority,
      .seed = in.take<std::uint16_t>(),
      .step = in.take<std::uint16_t>()};
  const assignment original = a;
  workspace memory;
  capacity_result result;
  try {
    result = apply_capacity(a, policy, memory);
  } catch (const error& refused) {
    const double f = policy.rule.factor;
    const bool asked = !(policy.eps >= 0.0f) || policy.rule.multiple < 1 || !std::isfinite(f) ||
                       f <= 0.0 || policy.rule.formula == capacity_formula::vmoe_ceil ||
                       policy.rule.formula == capacity_formula::vmoe_round;
    return asked ? "" : std::string("refused: ") + refused.what();
  }
  // The rank of a choice among its expert's is what every order comes down to.
  std::vector<index_t> token(static_cast<std::size_t>(a.choices()));
  for (index_t t = 0; t < a.tokens(); ++t)
    for (index_t c = a.first(t); c < a.first(t + 1); ++c) token[static_cast<std::size_t>(c)] = t;
  const auto before = [&](index_t x, index_t y) {
    const index_t tx = token[static_cast<std::size_t>(x)], ty = token[static_cast<std::size_t>(y)];
    const index_t rx = x - a.first(tx), ry = y - a.first(ty);
    const auto weight = [&](index_t c) { return original.weights()[static_cast<std::size_t>(c)]; };
    const auto urgency = [&](index_t t) {
      if (!priority.empty()) {
        const float p = priority[static_cast<std::size_t>(t)];
        return p == p ? p : -std::numeric_limits<float>::infinity();
      }
      float best = -std::numeric_limits<float>::infinity();
      for (const float w : original.weights(t)) best = std::max(best, w);
      return best;
    };
    const auto number = [&](index_t c) {
      return static_cast<std::uint32_t>(
          random_bits(policy.seed, policy.step, static_cast<std::uint64_t>(c)));
    };
    switch (policy.order) {
      case drop_order::choice_major: return rx != ry ? rx < ry : tx < ty;
      case drop_order::token_major: return x < y;
      case drop_order::by_weight: return weight(x) != weight(y) ? weight(x) > weight(y) : x < y;
      case drop_order::batch_priority:
        if (rx != ry) return rx < ry;
        return urgency(tx) != urgency(ty) ? urgency(tx) > urgency(ty) : tx < ty;
      case drop_order::random: return number(x) != number(y) ? number(x) > number(y) : x < y;
    }
    return false;
  };
  index_t kept = 0, dropped = 0, unrouted = 0;
  for (index_t c = 0; c < a.choices(); ++c) {
    const expert_id e = a.ids()[static_cast<std::size_t>(c)];
    if (e < 0) {
      ++unrouted;
      continue;
    }
    index_t rank = 0;
    for (index_t d = 0; d < a.choices(); ++d)
      rank += d != c && a.ids()[static_cast<std::size_t>(d)] == e && before(d, c);
    const bool stays = rank < result.capacity;
    if (a.kept(c) != stays)
      return "choice " + std::to_string(c) + (stays ? " was dropped" : " was kept");
    ++(stays ? kept : dropped);
    const float w = a.weights()[static_cast<std::size_t>(c)];
    if (!std::isfinite(w) || (!stays && w != 0.0f)) return "weight " + std::to_string(w);
  }
  if (kept != result.kept || dropped != result.dropped || unrouted != result.unrouted)
    return "counts";
  return "";
}

}  // namespace test
