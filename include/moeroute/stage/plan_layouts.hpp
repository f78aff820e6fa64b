// A plan in the forms that other systems' kernels read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

#include <moeroute/base/error.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/data/dispatch_plan.hpp>

namespace moeroute {

/// Where export_aligned_blocks writes: blocks of choices, each of one expert.
struct aligned_blocks {
  /// Choice numbers (token * k + rank) in slot order, `choices` where a slot is padding; at least
  /// plan.slots() of them.
  std::span<std::int32_t> sorted_choices;
  /// The expert of every block; at least plan.slots() / block of them.
  std::span<std::int32_t> block_experts;
  /// If not empty: where each block starts among the slots without their padding; at least
  /// plan.slots() / block of them.
  std::span<std::int32_t> block_starts{};
  /// What block_experts gets behind the last block: 0 or -1, by the version of the reader.
  std::int32_t tail_expert = -1;
};

/// Writes the arrays of moe_align_block_size, in stable order; returns the number of slots.
///
/// Requires: the plan was made with plan_options::block a multiple of `block`.
/// Throws: error where an array is too small, or an expert's slots are no multiple of `block`.
/// Cost: O(choices + slots + E), no allocation.
/// Source: vLLM (sorted ids, expert ids, number of padded tokens), SGLang for CPUs (block starts).
inline index_t export_aligned_blocks(const dispatch_plan& plan, index_t block,
                                     const aligned_blocks& out) {
  constexpr const char* where = "export_aligned_blocks";
  constexpr index_t most = index_t{1} << 62;
  check_range(where, "block", block, 1, std::int32_t{0x7fffffff});
  const index_t slots = plan.slots();
  for (index_t e = 0; e < plan.experts(); ++e)
    if (plan.rows(e) % block != 0)
      fail(where, "expert " + std::to_string(e) + " has " + std::to_string(plan.rows(e)) +
                      " slots, expected a multiple of " + std::to_string(block) +
                      ": plan with plan_options{.block = " + std::to_string(block) + "}");
  check_range(where, "sorted_choices.size()", static_cast<index_t>(out.sorted_choices.size()),
              slots, most);
  check_range(where, "block_experts.size()", static_cast<index_t>(out.block_experts.size()),
              slots / block, most);
  if (!out.block_starts.empty())
    check_range(where, "block_starts.size()", static_cast<index_t>(out.block_starts.size()),
                slots / block, most);

  std::fill(out.sorted_choices.begin(), out.sorted_choices.end(),
            static_cast<std::int32_t>(plan.choices()));
  const slot_id* slot = plan.slot_of_choice().data();
  for (index_t c = 0; c < plan.choices(); ++c)
    if (slot[c] != no_slot)
      out.sorted_choices[static_cast<std::size_t>(slot[c])] = static_cast<std::int32_t>(c);

  std::size_t b = 0;
  index_t rows_before = 0;
  for (index_t e = 0; e < plan.experts(); ++e) {
    for (index_t row = 0; row < plan.rows(e); row += block, ++b) {
      out.block_experts[b] = static_cast<std::int32_t>(e);
      if (!out.block_starts.empty())
        out.block_starts[b] = static_cast<std::int32_t>(rows_before + std::min(row, plan.load(e)));
    }
    rows_before += plan.load(e);
  }
  std::fill(out.block_experts.begin() + static_cast<std::ptrdiff_t>(b), out.block_experts.end(),
            out.tail_expert);
  return slots;
}

/// Writes the row-id map [T, 2 E + 1]: per token its slots in descending order, from column E on
/// their experts, in column 2 E their number; unused entries are -1.
///
/// Throws: error where the map has another size. Cost: O(T E), the size of the map; no allocation.
/// Source: TransformerEngine (permutation by mask map).
inline void export_row_id_map(const dispatch_plan& plan, std::span<std::int32_t> map) {
  const index_t experts = plan.experts(), width = 2 * experts + 1;
  check_size("export_row_id_map", "map.size()", static_cast<index_t>(map.size()),
             plan.tokens() * width);
  std::fill(map.begin(), map.end(), -1);
  for (index_t t = 0; t < plan.tokens(); ++t)
    map[static_cast<std::size_t>(t * width + 2 * experts)] = 0;
  // From the last slot to the first, so that every token meets its slots in descending order.
  const slot_id* token = plan.token_of_slot().data();
  for (index_t e = experts - 1; e >= 0; --e) {
    const index_t first = plan.offsets()[static_cast<std::size_t>(e)];
    for (index_t s = first + plan.load(e) - 1; s >= first; --s) {
      std::int32_t* row = map.data() + token[s] * width;
      const index_t n = row[2 * experts]++;
      MOEROUTE_EXPECTS(n < experts);
      row[n] = static_cast<std::int32_t>(s);
      row[experts + n] = static_cast<std::int32_t>(e);
    }
  }
}

/// Where export_once_counts writes: who sends to whom, a token counted once per rank and node
/// however many of its experts live there.
struct once_counts {
  std::span<std::int32_t> tokens_per_expert;  ///< [E]: every choice counts
  std::span<std::int32_t> tokens_per_rank;    ///< [D]
  std::span<std::uint8_t> token_in_rank;      ///< [T, D]
  /// [D / ranks_per_node], or empty.
  std::span<std::int32_t> tokens_per_node{};
  index_t ranks_per_node = 8;
};

/// Writes the counts of a dispatch over D ranks with E / D experts each, from choices that were
/// kept.
///
/// Ensures: the sum over experts >= over ranks >= over nodes; tokens_per_rank is the column sum of
/// token_in_rank.
/// Throws: error where an array has the wrong size, an id is outside [-1, E), D does not divide E,
/// or ranks_per_node not D. Cost: O(choices + T D + E), no allocation. Source: DeepEP
/// (get_dispatch_layout).
template <class A = simd::default_arch>
void export_once_counts(const assignment& choices, const once_counts& out) {
  constexpr const char* where = "export_once_counts";
  const index_t tokens = choices.tokens(), experts = choices.experts();
  check_choices<A>(where, choices);
  const auto ranks = static_cast<index_t>(out.tokens_per_rank.size());
  check_range(where, "tokens_per_rank.size()", ranks, 1, experts);
  if (experts % ranks != 0)
    fail(where, std::to_string(experts) + " experts on " + std::to_string(ranks) +
                    " ranks, expected a number of ranks that divides them");
  check_size(where, "tokens_per_expert.size()", static_cast<index_t>(out.tokens_per_expert.size()),
             experts);
  check_size(where, "token_in_rank.size()", static_cast<index_t>(out.token_in_rank.size()),
             tokens * ranks);
  const bool nodes = !out.tokens_per_node.empty();
  if (nodes) {
    check_range(where, "ranks_per_node", out.ranks_per_node, 1, ranks);
    if (ranks % out.ranks_per_node != 0)
      fail(where, std::to_string(ranks) + " ranks on nodes of " +
                      std::to_string(out.ranks_per_node) + ", expected a divisor of the ranks");
    check_size(where, "tokens_per_node.size()", static_cast<index_t>(out.tokens_per_node.size()),
               ranks / out.ranks_per_node);
  }

  std::fill(out.tokens_per_expert.begin(), out.tokens_per_expert.end(), 0);
  std::fill(out.tokens_per_rank.begin(), out.tokens_per_rank.end(), 0);
  std::fill(out.tokens_per_node.begin(), out.tokens_per_node.end(), 0);
  std::fill(out.token_in_rank.begin(), out.token_in_rank.end(), std::uint8_t{0});
  const index_t per_rank = experts / ranks;
  for (index_t t = 0; t < tokens; ++t) {
    std::uint8_t* in_rank = out.token_in_rank.data() + t * ranks;
    for (index_t c = choices.first(t); c < choices.first(t + 1); ++c) {
      const expert_id e = choices.ids()[static_cast<std::size_t>(c)];
      if (e < 0 || !choices.kept(c)) continue;
      ++out.tokens_per_expert[static_cast<std::size_t>(e)];
      in_rank[e / per_rank] = 1;
    }
    for (index_t r = 0; r < ranks; ++r)
      out.tokens_per_rank[static_cast<std::size_t>(r)] += in_rank[r];
    if (!nodes) continue;
    for (index_t first = 0; first < ranks; first += out.ranks_per_node)
      out.tokens_per_node[static_cast<std::size_t>(first / out.ranks_per_node)] +=
          *std::max_element(in_rank + first, in_rank + first + out.ranks_per_node);
  }
}

}  // namespace moeroute
