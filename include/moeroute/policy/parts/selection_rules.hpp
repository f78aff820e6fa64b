// Selection beyond the k best: some of each group, the other order of equals, a bias for each class
// of tokens.
#pragma once

#include <algorithm>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/selection.hpp>
#include <moeroute/policy/parts/selection_bias.hpp>

namespace moeroute {

/// The k / groups best experts of each group: every group has the same work.
///
/// Ids come group after group, within one by descending choice score, the lowest id first among
/// equals; where a group has too few, its places are no_expert. Cost: O(E) per row. Source: Pangu
/// Pro (2025, "MoGE"); Intern-S1-Pro; XTuner's grouped router.
struct top_of_each_group {
  index_t k = 8;
  index_t groups = 8;

  index_t choices() const { return k; }
  static constexpr bool masks_experts() { return false; }

  /// Throws: error where groups do not divide k and E, or a group has fewer than k / groups.
  void check(index_t experts) const { detail::check_top_of_each_group(experts, k, groups); }

  struct buffers {
    std::uint64_t* key;
    float* value;          ///< [k / groups][16]
    std::int32_t* column;  ///< likewise
  };

  buffers carve(scratch& tape, index_t experts) const {
    const index_t each = k / groups;
    return {tape.take<std::uint64_t>(simd::top_k_scratch(experts / groups, each)),
            tape.take<float>(each * block_rows), tape.take<std::int32_t>(each * block_rows)};
  }

  template <class A = simd::default_arch>
  void select(const logit_block& choice, float*, choice_block& c, const buffers& m) const {
    const index_t size = choice.experts / groups;
    const int each = static_cast<int>(k / groups);
    for (index_t g = 0; g < groups; ++g) {
      const auto first = static_cast<expert_id>(g * size);
      float* const value = c.value + g * each * block_rows;
      expert_id* const id = c.id + g * each * block_rows;
      simd::top_k_block<A>(choice.logits + first, choice.stride, choice.rows, size, each, value, id,
                           m.key);
      for (int i = 0; i < each * block_rows; ++i)
        id[i] = id[i] == no_expert ? no_expert : id[i] + first;
    }
  }
};
static_assert(selection_rule<top_of_each_group>);

/// A selection among experts in descending order: of equal choice scores the higher id comes first,
/// and of equal groups the later one. The choice is then always made on scores, not on logits.
///
/// Requires: a rule that knows no expert by its id, as columns come to it in reverse; one that does
/// stands around this one: class_bias<ordered_ties<>>.
/// Source: engines whose sort puts equals in reverse (a bitonic sort by (score, id)).
template <selection_rule Rule = top_k>
  requires(!requires(const Rule& rule) { rule.reads_modality(); })
struct ordered_ties {
  Rule rule{};
  tie_order order = tie_order::higher_id;

  index_t choices() const { return rule.choices(); }
  bool turns() const { return order == tie_order::higher_id; }
  bool masks_experts() const { return turns() || rule.masks_experts(); }
  void check(index_t experts) const { rule.check(experts); }
  auto carve(scratch& tape, index_t experts) const { return rule.carve(tape, experts); }

  template <class A = simd::default_arch, class Buffers>
  void select(const logit_block& choice, float* rows, choice_block& c, const Buffers& m) const {
    if (!turns()) return rule.template select<A>(choice, rows, c, m);
    const auto turn = [&] {
      for (int i = 0; i < choice.rows; ++i)
        std::reverse(rows + i * choice.experts, rows + (i + 1) * choice.experts);
    };
    turn();
    rule.template select<A>(choice, rows, c, m);
    turn();
    const auto last = static_cast<expert_id>(choice.experts - 1);
    for (int i = 0; i < c.k * block_rows; ++i)
      c.id[i] = c.id[i] == no_expert ? no_expert : last - c.id[i];
  }

  bool weighs_lost_with_0() const
    requires requires { rule.weighs_lost_with_0(); }
  {
    return rule.weighs_lost_with_0();
  }
  template <class Buffers>
  bool lost(const Buffers& m, int row, expert_id e, index_t experts) const {
    return rule.lost(m, row, turns() ? static_cast<expert_id>(experts - 1) - e : e, experts);
  }
};
static_assert(selection_rule<ordered_ties<>>);

/// A selection with a bias for each of two classes of tokens, side_inputs::modality 0 or 1: added
/// to the scores for the choice only, in place of the router's own bias.
///
/// Shapes: both [E]; the caller keeps them alive. Source: the vision models of DeepSeek-V4 (2026),
/// whose image tokens have a bias of their own.
template <selection_rule Rule = top_k>
struct class_bias {
  Rule rule{};
  selection_bias of[2]{};

  index_t choices() const { return rule.choices(); }
  bool active() const { return !of[0].empty() || !of[1].empty(); }
  bool masks_experts() const { return active() || rule.masks_experts(); }
  bool reads_modality() const { return active(); }

  /// Throws: error where one bias is missing or has another length than E.
  void check(index_t experts) const {
    rule.check(experts);
    if (!active()) return;
    check_size("class_bias", "first bias.size()", static_cast<index_t>(of[0].values().size()),
               experts);
    check_size("class_bias", "second bias.size()", static_cast<index_t>(of[1].values().size()),
               experts);
  }
  auto carve(scratch& tape, index_t experts) const { return rule.carve(tape, experts); }

  /// Throws: error where side_inputs::modality is missing.
  template <class A = simd::default_arch, class Buffers>
  void select(const logit_block& choice, float* rows, choice_block& c, const Buffers& m) const {
    if (active()) {
      if (choice.side->modality.empty()) fail("class_bias", "side_inputs::modality is missing");
      for (int i = 0; i < choice.rows; ++i) {
        const auto t = static_cast<std::size_t>(choice.first_token + i);
        const float* const b = of[choice.side->modality[t] != 0].values().data();
        float* const row = rows + i * choice.experts;
        for (index_t e = 0; e < choice.experts; ++e) row[e] += b[e];
      }
    }
    rule.template select<A>(choice, rows, c, m);
  }

  bool weighs_lost_with_0() const
    requires requires { rule.weighs_lost_with_0(); }
  {
    return rule.weighs_lost_with_0();
  }
  template <class Buffers>
  bool lost(const Buffers& m, int row, expert_id e, index_t experts) const {
    return rule.lost(m, row, e, experts);
  }
};
static_assert(selection_rule<class_bias<>>);

}  // namespace moeroute
