// A router: score, selection and weight rules put together at compile time.
#pragma once

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/score.hpp>
#include <moeroute/policy/selection.hpp>
#include <moeroute/policy/weight.hpp>

namespace moeroute {

/// A token-choice router: each token picks its experts from its own row of logits.
///
/// The choice is made on the logits where the score keeps their order, so only the winners are scored; ties
/// are then ties of logits. Otherwise it is made on the scores.
template <score_function Score, selection_rule Selection = top_k>
struct router {
  [[no_unique_address]] Score score{};
  Selection selection{};
  weight_rule weight{};

  static constexpr bool selects_on_logits = Score::traits.monotone;

  struct buffers {
    std::uint64_t* key;
    float* scores;  ///< [16, E] where the choice is made on scores
  };

  index_t k() const { return selection.choices(); }
  static index_t experts(index_t columns) { return columns; }

  /// Throws: error where a part does not fit E experts.
  void check(index_t experts) const {
    selection.check(experts);
    weight.check();
  }

  buffers carve(scratch& tape, index_t experts) const {
    return {tape.take<std::uint64_t>(selection.scratch_words(experts)),
            tape.take<float>(selects_on_logits ? 0 : block_rows * experts)};
  }

  /// Routes up to 16 tokens: c receives ids and weights.
  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    if constexpr (selects_on_logits) {
      selection.template select<A>(z, c, memory.key);
      score.template score_choices<A>(z, c, weight.cancels_row_factor());
    } else {
      logit_block scores = z;
      scores.logits = memory.scores;
      scores.stride = z.experts;
      for (int i = 0; i < z.rows; ++i)
        score.template score_row<A>(z.row(i), z.experts, memory.scores + i * z.experts);
      selection.template select<A>(scores, c, memory.key);
    }
    weight.template apply<A>(c);
  }
};

template <class Score, class Selection>
router(Score, Selection, weight_rule) -> router<Score, Selection>;
template <class Score, class Selection>
router(Score, Selection) -> router<Score, Selection>;

static_assert(token_router<router<softmax>>);
static_assert(token_router<router<softmax_selected>>);

}  // namespace moeroute
