// Capacity, applied: drops the choices that find their expert full, and counts them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/base/rng.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/policy/parts/capacity.hpp>

namespace moeroute {

/// What apply_capacity did: kept + dropped + unrouted = choices.
struct capacity_result {
  index_t capacity = 0;
  index_t kept = 0;
  index_t dropped = 0;   ///< those of earlier calls as well
  index_t unrouted = 0;  ///< choices without an expert
};

namespace detail {

// Unsigned integers in the order of the floats; NaN counts as -inf, -0 equals +0.
inline std::uint32_t ordered_bits(float x) {
  if (x != x) x = -std::numeric_limits<float>::infinity();
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

struct capacity_memory {
  std::int32_t* count;  // [E]
  std::int32_t* order;  // [T] or [choices]
  std::uint32_t* key;   // [T] or [choices]

  static capacity_memory carve(scratch& tape, const assignment& a, drop_order order) {
    const bool per_choice = order == drop_order::by_weight || order == drop_order::random;
    const index_t n = per_choice ? a.room() : order == drop_order::batch_priority ? a.tokens() : 0;
    return {tape.take<std::int32_t>(a.experts()), tape.take<std::int32_t>(n),
            tape.take<std::uint32_t>(n)};
  }
};

// Rank by rank over the tokens as `token_at` lists them: the first C that come to an expert stay.
template <class TokenAt>
void keep_choice_major(const assignment& a, index_t capacity, std::int32_t* count,
                       std::uint8_t* kept, TokenAt&& token_at) {
  const expert_id* id = a.ids().data();
  for (index_t rank = 0, more = 1; more != 0 && rank < a.k(); ++rank) {
    more = 0;
    for (index_t i = 0; i < a.tokens(); ++i) {
      const index_t t = token_at(i);
      if (rank >= a.count(t)) continue;
      more = 1;
      const index_t c = a.first(t) + rank;
      if (id[c] >= 0 && kept[c] != 0 && count[id[c]]++ >= capacity) kept[c] = 0;
    }
  }
}

// Expert by expert, the C largest keys stay. m.count holds the loads.
template <class A = simd::default_arch>
void keep_largest(const assignment& a, index_t capacity, const capacity_memory& m,
                  std::uint8_t* kept) {
  const expert_id* id = a.ids().data();
  std::int32_t sum = 0;
  for (index_t e = 0; e < a.experts(); ++e) {
    const std::int32_t load = m.count[e];
    m.count[e] = sum;
    sum += load;
  }
  for (index_t c = 0; c < a.choices(); ++c)
    if (id[c] >= 0 && kept[c] != 0) m.order[m.count[id[c]]++] = static_cast<std::int32_t>(c);
  const auto before = [&](std::int32_t x, std::int32_t y) {
    return m.key[x] > m.key[y] || (m.key[x] == m.key[y] && x < y);
  };
  for (index_t e = 0, first = 0; e < a.experts(); ++e) {
    const index_t last = m.count[e];  // the cursor has reached the end of its expert
    if (last - first > capacity) {
      std::nth_element(m.order + first, m.order + first + capacity, m.order + last, before);
      for (index_t i = first + capacity; i < last; ++i) kept[m.order[i]] = 0;
    }
    first = last;
  }
}

// weights /= max(sum, eps), token by token; the sum runs in rank order over what is kept, or over
// all.
template <class A = simd::default_arch>
void divide_by_sums(assignment& a, bool kept_only, float eps) {
  float* weight = a.weights().data();
  for (index_t t = 0; t < a.tokens(); ++t) {
    float sum = 0.0f;
    for (index_t c = a.first(t); c < a.first(t + 1); ++c)
      if (!kept_only || a.kept(c)) sum += weight[c];
    const float divisor = std::max(sum, eps);
    for (index_t c = a.first(t); c < a.first(t + 1); ++c)
      weight[c] = divisor > 0.0f ? weight[c] / divisor : 0.0f;
  }
}

// Clears the flags of the choices that find their expert full. m.count holds the loads.
template <class A = simd::default_arch>
void drop_excess(assignment& a, const capacity_policy& policy, index_t capacity,
                 const capacity_memory& m, std::uint8_t* kept) {
  const expert_id* id = a.ids().data();
  const float* weight = a.weights().data();
  const index_t n = a.choices(), tokens = a.tokens();
  switch (policy.order) {
    case drop_order::choice_major:
      std::fill_n(m.count, a.experts(), 0);
      keep_choice_major(a, capacity, m.count, kept, [](index_t i) { return i; });
      break;
    case drop_order::token_major:
      std::fill_n(m.count, a.experts(), 0);
      for (index_t c = 0; c < n; ++c)
        if (id[c] >= 0 && kept[c] != 0 && m.count[id[c]]++ >= capacity) kept[c] = 0;
      break;
    case drop_order::batch_priority:
      for (index_t t = 0; t < tokens; ++t) {
        float best = -std::numeric_limits<float>::infinity();
        for (index_t c = a.first(t); c < a.first(t + 1); ++c) best = std::max(best, weight[c]);
        m.key[t] = ordered_bits(
            policy.priority.empty() ? best : policy.priority[static_cast<std::size_t>(t)]);
        m.order[t] = static_cast<std::int32_t>(t);
      }
      std::sort(m.order, m.order + tokens, [&](std::int32_t x, std::int32_t y) {
        return m.key[x] > m.key[y] || (m.key[x] == m.key[y] && x < y);
      });
      std::fill_n(m.count, a.experts(), 0);
      keep_choice_major(a, capacity, m.count, kept, [&](index_t i) { return index_t{m.order[i]}; });
      break;
    case drop_order::by_weight:
      for (index_t c = 0; c < n; ++c) m.key[c] = ordered_bits(weight[c]);
      keep_largest<A>(a, capacity, m, kept);
      break;
    case drop_order::random:
      for (index_t c = 0; c < n; ++c)
        m.key[c] = static_cast<std::uint32_t>(
            random_bits(policy.seed, policy.step, static_cast<std::uint64_t>(c)));
      keep_largest<A>(a, capacity, m, kept);
      break;
  }
}

}  // namespace detail

/// Drops every choice that finds its expert full: kept flag false, weight 0, the id stays.
///
/// Choices without an expert take no place; choices that were dropped before stay dropped and take
/// none either. Weights decide an order as they are before renormalisation.
/// Ensures: an expert keeps min(its choices, C); kept + dropped + unrouted = choices.
/// Throws: error where the rule refuses, an id is outside [-1, E), or `priority` is neither empty
/// nor of size T. Cost: O(choices + E), for batch_priority O(T log T) on top; O(choices) integers
/// of scratch; no allocation once ws and the assignment are warm. Determinism: exact. Source:
/// Lepikhin et al. 2020 (choice_major), Riquelme et al. 2021 (batch_priority).
/// Example:
///
///     const capacity_rule rule{.formula = capacity_formula::megatron, .factor = 1.25};
///     const auto did = apply_capacity(choices, {.rule = rule}, ws);
///     if (did.dropped > 0) plan(choices, slots);        // leaves them out
template <class A = simd::default_arch>
capacity_result apply_capacity(assignment& choices, const capacity_policy& policy, workspace& ws) {
  const index_t tokens = choices.tokens(), experts = choices.experts(), n = choices.choices();
  if (!policy.priority.empty())
    check_size("apply_capacity", "priority.size()", static_cast<index_t>(policy.priority.size()),
               tokens);
  if (!(policy.eps >= 0.0f)) fail_value("apply_capacity", "eps", policy.eps, ">= 0");
  policy.rule.check();
  check_range("apply_capacity", "tokens", policy.tokens, capacity_policy::all_tokens, tokens);
  check_choices<A>("apply_capacity", choices);
  const auto m = ws.carve(
      [&](scratch& tape) { return detail::capacity_memory::carve(tape, choices, policy.order); });
  const expert_id* id = choices.ids().data();

  capacity_result result;
  std::fill_n(m.count, experts, 0);
  for (index_t c = 0; c < n; ++c) {
    if (id[c] < 0) {
      ++result.unrouted;
    } else if (choices.kept(c)) {
      ++m.count[id[c]];
    } else {
      ++result.dropped;
    }
  }
  const index_t greatest = experts > 0 ? *std::max_element(m.count, m.count + experts) : 0;
  const index_t counted = policy.tokens == capacity_policy::all_tokens ? tokens : policy.tokens;
  result.capacity = policy.rule.capacity(counted, experts, choices.k(), greatest);

  if (greatest > result.capacity) {
    std::uint8_t* kept = choices.kept_to_change().data();
    detail::drop_excess<A>(choices, policy, result.capacity, m, kept);
    // A choice without an expert is unrouted, whatever its flag says.
    result.dropped = 0;
    for (index_t c = 0; c < n; ++c) result.dropped += index_t{id[c] >= 0} & index_t{kept[c] == 0};
  }
  if (policy.renormalize != renormalization::none)
    detail::divide_by_sums<A>(choices, policy.renormalize == renormalization::after_drop,
                              policy.eps);
  if (choices.drops()) {
    float* weight = choices.weights().data();
    for (index_t c = 0; c < n; ++c)
      if (!choices.kept(c)) weight[c] = 0.0f;
  }
  result.kept = n - result.dropped - result.unrouted;
  return result;
}

/// How many choices were made, and how many of them dropped, in each part of the batch.
///
/// Shapes: chosen and dropped [parts], the same size; token t counts in part t * parts / T.
/// Throws: error where the sizes differ or are 0. Source: Xue et al. 2024 (OpenMoE: under an order
/// by position, drops fall on the end).
inline void drops_by_position(const assignment& choices, std::span<std::int64_t> chosen,
                              std::span<std::int64_t> dropped) {
  const auto parts = static_cast<index_t>(chosen.size());
  check_size("drops_by_position", "dropped.size()", static_cast<index_t>(dropped.size()), parts);
  check_range("drops_by_position", "chosen.size()", parts, 1, std::int32_t{0x7fffffff});
  check_offsets("drops_by_position", choices);
  std::fill(chosen.begin(), chosen.end(), 0);
  std::fill(dropped.begin(), dropped.end(), 0);
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const auto part = static_cast<std::size_t>(t * parts / choices.tokens());
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      if (choices.ids()[static_cast<std::size_t>(c)] < 0) continue;
      ++chosen[part];
      if (!choices.kept(c)) ++dropped[part];
    }
  }
}

}  // namespace moeroute
