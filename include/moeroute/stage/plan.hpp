// Planning: an assignment becomes slots in expert-major order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/data/expert_lists.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/simd/rows/counting_sort.hpp>

namespace moeroute {

/// Every expert gets as many slots as it has tokens.
inline constexpr index_t as_needed = -1;

/// What is in the slots behind an expert's own tokens.
enum class slot_padding {
  empty,  ///< no_token: dispatch writes zeros
  /// Tokens without a slot of that expert, the lowest first, masked ones aside: dispatch writes
  /// their rows, so that a kernel over all slots sees real values; combine reads none of them.
  /// Where there are too few, the rest is empty. Source: Megatron (pad to capacity, pad the routing
  /// map).
  spare_tokens,
};

/// What a plan does beyond giving each choice its slot.
struct plan_options {
  /// Each expert's number of slots is rounded up to a multiple of this: blocks of a tiled kernel.
  index_t block = 1;
  /// Every expert gets exactly this many slots (rounded up to `block`), or as_needed.
  index_t capacity = as_needed;
  slot_padding padding = slot_padding::empty;
  /// [E], 0: the plan leaves this expert to others (another rank, another device). Empty: all.
  std::span<const std::uint8_t> owned{};
  /// [T], 0: the token takes no part. Empty: all take part.
  std::span<const std::uint8_t> mask{};
};

namespace detail {

inline void check_plan_options(const plan_options& options, index_t tokens, index_t experts) {
  check_range("plan", "block", options.block, 1, std::int32_t{0x7fffffff});
  check_range("plan", "capacity", options.capacity, as_needed, std::int32_t{0x7fffffff});
  if (!options.owned.empty())
    check_size("plan", "owned.size()", static_cast<index_t>(options.owned.size()), experts);
  if (!options.mask.empty())
    check_size("plan", "mask.size()", static_cast<index_t>(options.mask.size()), tokens);
}

[[noreturn]] MOEROUTE_COLD inline void fail_list_token(std::span<const std::int32_t> token,
                                                       index_t tokens) {
  const auto bad = std::find_if(token.begin(), token.end(),
                                [&](std::int32_t t) { return t < -1 || t >= tokens; });
  fail("plan", {"place ", static_cast<index_t>(bad - token.begin()), " of the lists has token ",
                *bad, ", expected -1 to ", tokens - 1});
}

// An upper bound of the slots that depends on shapes only, so that a warm plan never allocates.
inline index_t most_slots(index_t choices, index_t experts, const plan_options& options) {
  if (options.capacity != as_needed) return experts * round_up(options.capacity, options.block);
  return choices + std::min(choices, experts) * (options.block - 1);
}

struct left_out {
  index_t dropped = 0;
  index_t elsewhere = 0;
};

// key[c] = the expert of choice c, or -1 where the choice gets no slot.
inline left_out keys_of_choices(const assignment& choices, const plan_options& options,
                                std::int32_t* key) {
  left_out counts;
  const expert_id* id = choices.ids().data();
  const bool all_owned = options.owned.empty();
  for (index_t t = 0; t < choices.tokens(); ++t) {
    const bool masked = !options.mask.empty() && options.mask[static_cast<std::size_t>(t)] == 0;
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      key[c] = -1;
      if (masked || id[c] < 0) continue;
      if (!choices.kept(c)) {
        ++counts.dropped;
      } else if (!all_owned && options.owned[static_cast<std::size_t>(id[c])] == 0) {
        ++counts.elsewhere;
      } else {
        key[c] = id[c];
      }
    }
  }
  return counts;
}

// Offsets and sentinels of a padded plan from the loads; returns the padding.
inline index_t pad_offsets(const dispatch_plan::parts& p, const std::int32_t* load, index_t experts,
                           const plan_options& options) {
  index_t sum = 0, padding = 0;
  for (index_t e = 0; e < experts; ++e) {
    const index_t own = load[e];
    if (options.capacity != as_needed && own > options.capacity) [[unlikely]]
      fail("plan", {"expert ", e, " has ", own, " tokens, expected at most the capacity ",
                    options.capacity});
    const index_t rows =
        round_up(options.capacity != as_needed ? options.capacity : own, options.block);
    p.offsets[e] = static_cast<slot_id>(sum);
    std::fill_n(p.token_of_slot + sum + own, rows - own, no_token);
    sum += rows;
    padding += rows - own;
  }
  p.offsets[experts] = static_cast<slot_id>(sum);
  return padding;
}

[[noreturn]] MOEROUTE_COLD inline void fail_distinct(const dispatch_plan& plan) {
  const slot_id* const token = plan.token_of_slot().data();
  for (index_t e = 0; e < plan.experts(); ++e) {
    const index_t first = plan.offsets()[static_cast<std::size_t>(e)];
    for (index_t s = first + 1; s < first + plan.load(e); ++s)
      if (token[s] == token[s - 1])
        fail("plan", {"token ", token[s], " has expert ", e, " twice, expected distinct experts"});
  }
  std::abort();
}

// A token that names an expert twice stands twice in a row among the expert's slots. Slots of one
// expert are compared together with those of the next: equal neighbours there are no fault.
inline void check_distinct(const dispatch_plan& plan) {
  const slot_id* const token = plan.token_of_slot().data();
  const index_t slots = plan.slots();
  index_t equal = 0;
  for (index_t s = 1; s < slots; ++s) equal += (token[s] == token[s - 1]) & (token[s] >= 0);
  for (index_t e = 1; e < plan.experts() && equal > 0; ++e) {
    const index_t s = plan.offsets()[static_cast<std::size_t>(e)];
    if (plan.rows(e) > 0 && s > 0) equal -= (token[s] == token[s - 1]) & (token[s] >= 0);
  }
  if (equal > 0) [[unlikely]]
    fail_distinct(plan);
}

// Writes spare tokens over the empty slots. An expert's own tokens ascend, so one walk finds those
// that are not among them.
inline void fill_spare_tokens(const dispatch_plan& plan, std::span<const std::uint8_t> mask,
                              slot_id* token_of_slot) {
  for (index_t e = 0; e < plan.experts(); ++e) {
    index_t own = plan.offsets()[static_cast<std::size_t>(e)], to = own + plan.load(e);
    const index_t behind = to, end = plan.offsets()[static_cast<std::size_t>(e) + 1];
    for (index_t t = 0; t < plan.tokens() && to < end; ++t) {
      bool taken = !mask.empty() && mask[static_cast<std::size_t>(t)] == 0;
      for (; own < behind && token_of_slot[own] == t; ++own) taken = true;
      if (!taken) token_of_slot[to++] = static_cast<slot_id>(t);
    }
  }
}

// A plan that a refusal left half-made is empty.
class until_made {
 public:
  explicit until_made(dispatch_plan& plan) : plan_(&plan) {}
  until_made(const until_made&) = delete;
  until_made& operator=(const until_made&) = delete;
  ~until_made() {
    if (plan_ != nullptr) [[unlikely]]
      plan_->reset(0, 0, 0);
  }
  void made() { plan_ = nullptr; }

 private:
  dispatch_plan* plan_;
};

// All choices of the fixed form, each with a slot.
template <class A>
void plan_every_choice(const assignment& choices, dispatch_plan& out) {
  const index_t experts = choices.experts(), n = choices.choices();
  out.reset(choices.tokens(), experts, choices.k(), n, n);
  if (experts == 0) return;
  const dispatch_plan::parts p = out.writable();
  const std::int32_t* id = choices.ids().data();
  const simd::groups token{nullptr, choices.k()};
  if (simd::are_few_keys<A>(n, experts)) {
    if (!simd::sort_few_keys<A>(id, n, experts, token, p.offsets, p.slot_of_choice,
                                p.token_of_slot)) [[unlikely]] {
      out.reset(0, 0, 0);  // what was refused is no plan
      fail_expert_id("plan", choices.ids(), experts);
    }
    return;
  }
  const slot_id* const later = n < simd::far_keys ? nullptr : p.token_of_slot;
  if (!simd::rank_keys<A>(id, n, experts, p.offsets, p.slot_of_choice, later)) [[unlikely]] {
    out.reset(0, 0, 0);
    fail_expert_id("plan", choices.ids(), experts);
  }
  simd::exclusive_scan<A>(p.offsets, experts, p.offsets);
  simd::place_keys<A>(id, n, token, p.offsets, p.slot_of_choice, p.token_of_slot);
}

template <class A>
void plan_with_options(const assignment& choices, dispatch_plan& out, const plan_options& options) {
  const index_t tokens = choices.tokens(), experts = choices.experts();
  const std::span<const expert_id> ids = choices.ids();
  const index_t n = choices.choices(), room = choices.room();
  check_plan_options(options, tokens, experts);
  check_offsets("plan", choices);
  if (!simd::keys_in_range<A>(ids.data(), n, experts)) [[unlikely]]
    fail_expert_id("plan", ids, experts);

  out.reset(tokens, experts, choices.k(), room, most_slots(room, experts, options));
  until_made guard(out);
  out.set_choices(n);
  if (experts == 0) return guard.made();
  simd::groups token_of_choice{nullptr, choices.k()};
  if (choices.ragged()) {
    std::int32_t* list = out.token_of_choice();
    std::copy_n(choices.offsets().data(), tokens + 1, out.first_to_fill());
    for (index_t t = 0; t < tokens; ++t)
      std::fill(list + choices.first(t), list + choices.first(t + 1), static_cast<slot_id>(t));
    token_of_choice.list = list;
  }

  const bool padded = options.block > 1 || options.capacity != as_needed;
  std::int32_t* const load = padded ? out.loads_to_fill() : out.writable().offsets;
  const dispatch_plan::parts p = out.writable();
  const left_out counts = keys_of_choices(choices, options, p.slot_of_choice);
  simd::rank_keys<A>(p.slot_of_choice, n, experts, load, p.slot_of_choice);
  index_t padding = 0;
  if (padded) {
    padding = pad_offsets(p, load, experts, options);
  } else {
    simd::exclusive_scan<A>(load, experts, p.offsets);
  }
  simd::place_keys<A>(ids.data(), n, token_of_choice, p.offsets, p.slot_of_choice, p.token_of_slot);
  out.set_counts(counts.dropped, counts.elsewhere, padding);
  if (choices.ragged()) check_distinct(out);
  if (options.padding == slot_padding::spare_tokens && padding > 0)
    fill_spare_tokens(out, options.mask, p.token_of_slot);
  guard.made();
}

}  // namespace detail

/// Gives every choice that takes part a slot: expert by expert, in token order within one.
///
/// A choice takes part unless it has no expert, was dropped, its token is masked or its expert is
/// left to others.
/// Ensures: slot_of_choice and token_of_slot are inverse to each other; offsets end at the number
/// of slots; kept + dropped + elsewhere + unrouted = choices. Throws: error where an id is outside
/// [-1, E), the offsets of a ragged assignment do not ascend or one of its tokens has an expert
/// twice (in the fixed form it gets a slot for each), a mask has the wrong size, block < 1, an
/// expert has more tokens than `capacity` slots, or the slots exceed 2^31 - 1; what was refused
/// half-way leaves an empty plan. Cost: O(choices +
/// E), no allocation once the plan is warm. Determinism: exact, stable in token order.
/// Example:
///
///     plan(choices, slots);
///     plan(choices, slots, {.block = 16});    // experts padded to blocks of 16 rows
template <class A = simd::default_arch>
void plan(const assignment& choices, dispatch_plan& out, const plan_options& options = {}) {
  // Decided where the caller's options are known: what is not asked for is not looked at again.
  const bool every_choice = options.block == 1 && options.capacity == as_needed &&
                            options.owned.empty() && options.mask.empty();
  if (every_choice && !choices.drops() && !choices.ragged()) {
    detail::plan_every_choice<A>(choices, out);
  } else {
    detail::plan_with_options<A>(choices, out, options);
  }
}

/// The same from lists of tokens: the plan that the lists' assignment has, a token's experts in
/// ascending order, without making that assignment.
///
/// weights, if given, become those of the lists in the order of the plan's choices, for combine.
/// Shapes: weights [E * C], of which out.choices() are written; or empty.
/// Throws: error where a list or an option has the wrong size, a token is outside [-1, T) or twice
/// among an expert's slots (masked tokens and experts of others have none), or as above. Cost: O(E
/// C + T), O(C log C) on top for each list that does not ascend; no allocation once the plan is
/// warm. Determinism: exact.
template <class A = simd::default_arch>
void plan(const expert_lists& lists, dispatch_plan& out, const plan_options& options = {},
          std::span<float> weights = {}) {
  constexpr index_t most = std::int32_t{0x7fffffff};
  const index_t tokens = lists.tokens, experts = lists.experts, capacity = lists.capacity;
  check_range("plan", "lists.tokens", tokens, 0, most);
  check_range("plan", "lists.experts", experts, 1, max_experts);
  check_range("plan", "lists.capacity", capacity, 0, most);
  const index_t n = experts * capacity;
  check_range("plan", "lists.experts * capacity", n, 0, most);
  check_size("plan", "lists.token.size()", static_cast<index_t>(lists.token.size()), n);
  if (!lists.weight.empty())
    check_size("plan", "lists.weight.size()", static_cast<index_t>(lists.weight.size()), n);
  if (!weights.empty()) {
    check_size("plan", "weights.size()", static_cast<index_t>(weights.size()), n);
    check_size("plan", "lists.weight.size()", static_cast<index_t>(lists.weight.size()), n);
    check_apart("plan", "weights", matrix_view<float>(weights.data(), 1, n), "lists.weight",
                matrix_view<const float>(lists.weight.data(), 1, n));
  }
  detail::check_plan_options(options, tokens, experts);
  const std::int32_t* token = lists.token.data();
  if (!simd::keys_in_range<A>(token, n, tokens)) [[unlikely]]
    detail::fail_list_token(lists.token, tokens);

  out.reset(tokens, experts, experts, n, detail::most_slots(n, experts, options));
  detail::until_made guard(out);
  std::int32_t* const first = out.first_to_fill();
  const bool padded = options.block > 1 || options.capacity != as_needed;
  const dispatch_plan::parts p = out.writable();
  std::int32_t* const loads = padded ? out.loads_to_fill() : p.offsets;
  const auto is_masked = [&](std::int32_t t) {
    return !options.mask.empty() && options.mask[static_cast<std::size_t>(t)] == 0;
  };
  const auto is_owned = [&](index_t e) {
    return options.owned.empty() || options.owned[static_cast<std::size_t>(e)] != 0;
  };

  // How many experts each token has, and how many tokens each expert.
  std::fill_n(first, tokens + 1, 0);
  index_t elsewhere = 0;
  for (index_t e = 0; e < experts; ++e) {
    std::int32_t load = 0;
    for (index_t i = e * capacity; i < (e + 1) * capacity; ++i) {
      if (token[i] < 0) continue;
      ++first[token[i] + 1];
      if (!is_masked(token[i])) ++load;
    }
    if (!is_owned(e)) elsewhere += load;
    loads[e] = is_owned(e) ? load : 0;
  }
  for (index_t t = 0; t < tokens; ++t) first[t + 1] += first[t];
  out.set_choices(first[tokens]);

  index_t padding = 0;
  if (padded) {
    padding = detail::pad_offsets(p, loads, experts, options);
  } else {
    simd::exclusive_scan<A>(loads, experts, p.offsets);
  }
  out.set_counts(0, elsewhere, padding);

  // Moved up by one, each token's first choice becomes a cursor over its choices; when all are
  // written the cursors are the first choices of the next tokens, which is where they began.
  const auto as_cursors = [&] {
    std::copy_backward(first, first + tokens, first + tokens + 1);
    return first + 1;
  };
  if (tokens == 0) return guard.made();
  std::int32_t* cursor = as_cursors();
  for (index_t e = 0; e < experts; ++e) {
    slot_id* const own = p.token_of_slot + p.offsets[e];
    index_t load = 0;
    bool ascending = true;
    for (index_t i = e * capacity; i < (e + 1) * capacity; ++i) {
      if (token[i] < 0) continue;
      if (is_masked(token[i]) || !is_owned(e)) {
        p.slot_of_choice[cursor[token[i]]++] = no_slot;
        continue;
      }
      ascending = ascending && (load == 0 || own[load - 1] <= token[i]);
      own[load++] = token[i];
    }
    if (!ascending) std::sort(own, own + load);
    for (index_t i = 0; i < load; ++i)
      p.slot_of_choice[cursor[own[i]]++] = static_cast<slot_id>(p.offsets[e] + i);
  }
  detail::check_distinct(out);
  if (!weights.empty()) {
    cursor = as_cursors();
    for (index_t i = 0; i < n; ++i)
      if (token[i] >= 0)
        weights[static_cast<std::size_t>(cursor[token[i]]++)] =
            lists.weight[static_cast<std::size_t>(i)];
  }
  if (options.padding == slot_padding::spare_tokens && padding > 0)
    detail::fill_spare_tokens(out, options.mask, p.token_of_slot);
  guard.made();
}

}  // namespace moeroute
