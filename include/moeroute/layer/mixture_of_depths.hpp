// Mixture of depths: a block that only some tokens of each sequence pass through.
#pragma once

#include <utility>

#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>

namespace moeroute {

/// How many tokens go through the block.
struct depth_options {
  double share = 0.125;  ///< of a sequence's tokens S: ceil(share * S), the product in double
  index_t sequence_length = 0;  ///< of every sequence in the batch; 0: the batch is one
};

/// A layer whose block sees the best tokens of every sequence, in their order, and adds to them
/// score * block(row); all other tokens pass it by, with their bits.
///
/// It is a moe_layer with one expert that chooses: forward(x, x) in place, or forward(x, y) where y
/// holds x. Gate makes one column, or no_gate(1) takes scores from outside by forward_logits();
/// Score is what a row is multiplied with (identity_score: the gate's own value). Which tokens are
/// best depends on those that follow: to decode, score against a threshold instead
/// (threshold_router).
/// Throws: error where the gate has more than one column, or the share is not in (0, 1]. Cost: the
/// gate, a selection per sequence and the block on its share of rows. Source: Mixture-of-Depths
/// (Raposo et al. 2024). Example:
///
///     const simd::packed_matrix<> w(view(gate_weight));    // [1, d]
///     auto depths = mixture_of_depths(linear_gate<>(w), block, {.share = 0.125});
///     depths.forward(x, x);
template <class Score = identity_score, class Gate, class Block>
auto mixture_of_depths(Gate gate, Block block, const depth_options& options = {}, index_t d = 0) {
  check_size("mixture_of_depths", "gate.columns()", gate.columns(), 1);
  if (!(options.share > 0.0 && options.share <= 1.0))
    fail_value("mixture_of_depths", "share", options.share, "above 0 and at most 1");
  expert_choice<Score> rule;
  rule.capacity = {.factor = options.share};
  rule.sequence_length = options.sequence_length;
  return moe_layer<expert_choice<Score>, Block, no_shared_experts, Gate>(
      std::move(gate), rule, std::move(block),
      moe_layer_options{.d = d, .output = combine_output::accumulate});
}

}  // namespace moeroute
