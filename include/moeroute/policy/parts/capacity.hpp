// Capacity: how many tokens an expert takes, and who is dropped when more want it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// How an expert's capacity C follows from T tokens, E experts, k choices and a factor: published
/// systems differ by the place of the rounding.
enum class capacity_formula {
  unlimited,   ///< every choice is kept
  fixed,       ///< C = count
  megatron,    ///< ceil(T k / E * factor)
  deepspeed,   ///< ceil(T / E * (factor k))
  megablocks,  ///< floor(factor * (k T / E)); factor 0: the greatest load (also GShard, Switch)
  vmoe_ceil,   ///< ceil(T k factor / E); at least 1
  vmoe_round,  ///< T k factor / E to the nearest, halves to even; at least 1
  tutel,       ///< k floor(factor * ceil(T / E)); 0: the greatest load; < 0: the lesser of both
  nllb_train,  ///< floor(2 ceil(T / E) * factor)
  nllb_eval,   ///< ceil(factor * T): a fraction of the tokens
  stable_moe,  ///< floor(T * factor)
  nucleus,     ///< max(1, ceil(factor * T / E))
  soft_moe,    ///< T factor / E to the nearest, halves to even: slots of a soft plan
};

/// Capacity as a number: the formula, then at least `minimum`, then up to a multiple.
///
/// Source: the code of the system that a formula is named after.
struct capacity_rule {
  capacity_formula formula = capacity_formula::unlimited;
  double factor = 1.0;
  index_t count = 0;     ///< of the formula `fixed`
  index_t minimum = 0;   ///< where the system has one (DeepSpeed: 4 or 8)
  index_t multiple = 1;  ///< C is rounded up to one (V-MoE: 4; Tutel: its alignment)

  /// Throws: error where the factor is outside the formula's domain, or a count is negative.
  MOEROUTE_OUT_OF_LINE void check() const {
    using enum capacity_formula;
    const bool any = formula == unlimited || formula == fixed;
    const bool sign = formula == tutel        ? std::isfinite(factor)
                      : formula == megablocks ? factor >= 0.0 && std::isfinite(factor)
                                              : factor > 0.0 && std::isfinite(factor);
    if (!any && !sign)
      fail_value("capacity_rule", "factor", factor,
                 formula == tutel        ? "a finite number"
                 : formula == megablocks ? ">= 0"
                                         : "> 0");
    constexpr index_t most = std::int32_t{0x7fffffff};
    check_range("capacity_rule", "count", count, 0, most);
    check_range("capacity_rule", "minimum", minimum, 0, most);
    check_range("capacity_rule", "multiple", multiple, 1, most);
  }

  /// Whether the load of the fullest expert matters.
  bool needs_greatest_load() const {
    return (formula == capacity_formula::tutel && factor <= 0.0) ||
           (formula == capacity_formula::megablocks && factor == 0.0);
  }

  /// C, in [0, T k] or what minimum and multiple make of it.
  ///
  /// Throws: as check(), and error where the V-MoE formulas give less than 1.
  index_t capacity(index_t tokens, index_t experts, index_t k, index_t greatest_load = 0) const {
    check();
    const auto t = static_cast<double>(tokens), e = static_cast<double>(experts),
               n = static_cast<double>(k);
    const double per_expert = std::ceil(t / e);
    double c = 0.0;
    // The order of operations is that of the named system: it decides where a product is whole.
    switch (formula) {
      using enum capacity_formula;
      case unlimited: c = t * n; break;
      case fixed: c = static_cast<double>(count); break;
      case megatron: c = std::ceil(t * n / e * factor); break;
      case deepspeed: c = std::ceil(t / e * (factor * n)); break;
      case megablocks:
        c = factor == 0.0 ? static_cast<double>(greatest_load) : std::floor(factor * (n * t / e));
        break;
      case vmoe_ceil: c = std::ceil(t * n * factor / e); break;
      case vmoe_round: c = std::nearbyint(t * n * factor / e); break;
      case tutel:
        c = n * std::floor(std::abs(factor) * per_expert);
        if (factor == 0.0) c = static_cast<double>(greatest_load);
        if (factor < 0.0) c = std::fmin(c, static_cast<double>(greatest_load));
        break;
      case nllb_train: c = std::floor(2.0 * per_expert * factor); break;
      case nllb_eval: c = std::ceil(factor * t); break;
      case stable_moe: c = std::floor(t * factor); break;
      case nucleus: c = std::fmax(1.0, std::ceil(factor * t / e)); break;
      case soft_moe: c = std::nearbyint(t * factor / e); break;
    }
    if ((formula == capacity_formula::vmoe_ceil || formula == capacity_formula::vmoe_round) &&
        tokens > 0 && c < 1.0)
      fail("capacity_rule",
           {"capacity is 0 for ", tokens, " tokens, expected at least 1: a larger factor"});
    // A choice more than all there are changes nothing, and stays far from overflow.
    const double most = static_cast<double>(std::int32_t{0x7fffffff});
    const auto whole = static_cast<index_t>(std::fmin(c, most));
    return round_up(whole > minimum ? whole : minimum, multiple);
  }
};

/// Every choice is kept.
inline constexpr capacity_rule dropless{};

/// Who gets an expert's places when more choices name it than it has. Lowest token first decides
/// every tie.
enum class drop_order {
  choice_major,  ///< all first choices in token order, then all second ones (GShard, V-MoE, Tutel)
  token_major,   ///< token by token, its choices in rank order (DeepSpeed top-k)
  by_weight,     ///< the largest weights, whatever their rank (Megatron, DeepSpeed "probs")
  batch_priority,  ///< choice_major over tokens in descending priority (V-MoE)
  random,          ///< random token selection, seeded (DeepSpeed top-1)
};

/// When a token's weights are divided by their sum.
enum class renormalization {
  none,
  before_drop,  ///< over all of its choices: what is dropped is missing from the sum
  after_drop,   ///< over those that were kept
};

/// A capacity and what happens at it.
///
/// The formula's T is all tokens of the assignment, those of padding too, so that C is a constant
/// of the shape, as in the systems that the formulas are named after; `tokens` is another T.
struct capacity_policy {
  capacity_rule rule{};
  drop_order order = drop_order::choice_major;
  renormalization renormalize = renormalization::none;
  float eps = 0.0f;  ///< the sum is at least this (the clamp of DeepSpeed and NLLB)
  /// [T] for batch_priority, NaN counting as -inf; empty: a token's largest weight.
  std::span<const float> priority{};
  std::uint64_t seed = 0;  ///< of the order `random`: the same seed and step replay
  std::uint64_t step = 0;
  index_t tokens = all_tokens;  ///< T of the formula where padding shall not count

  static constexpr index_t all_tokens = -1;
};

}  // namespace moeroute
