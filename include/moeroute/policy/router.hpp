// A router: transform, score, bias, selection and weight rules put together at compile time.
#pragma once

#include <type_traits>
#include <utility>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/any_score.hpp>
#include <moeroute/policy/parts/given_choice.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/selection.hpp>
#include <moeroute/policy/parts/selection_bias.hpp>
#include <moeroute/policy/parts/weight.hpp>

namespace moeroute {

namespace detail {

// The choice scores of one row: score + bias, and -inf for what may never be chosen. score(z, e)
// gives the scores of a register of logits at expert e.
template <class A, class Score>
void choice_row(const float* z, const float* bias, index_t experts, float* choice, Score&& score) {
  using F = simd::vfloat<A>;
  constexpr int w = simd::width<A>;
  const F never(simd::minus_infinity);
  index_t e = 0;
  for (; e + w <= experts; e += w) {
    const F x = simd::load<A>(z + e);
    F s = score(x, e);
    if (bias != nullptr) s += simd::load<A>(bias + e);
    simd::select<A>(x > never, s, never).store_unaligned(choice + e);
  }
  if (e == experts) return;
  const index_t n = experts - e;
  const F x = simd::load_first<A>(z + e, n, 0.0f);
  F s = score(x, e);
  if (bias != nullptr) s += simd::load_first<A>(bias + e, n, 0.0f);
  simd::store_first<A>(choice + e, n, simd::select<A>(x > never, s, never));
}

// The scores of one row, where `scores` is not null (whole registers are written), and its choice
// scores.
template <class A, class Score>
void score_to_choose(const Score& score, const float* z, const float* bias, index_t experts,
                     float* scores, float* choice) {
  using F = simd::vfloat<A>;
  if constexpr (std::is_same_v<Score, any_score>) {
    score.visit([&]<class S>(S) {
      // The softmax over the selected is not known before they are: its choice is made on logits.
      using chosen_on = std::conditional_t<std::is_same_v<S, softmax_selected>, identity_score, S>;
      score_to_choose<A>(chosen_on{}, z, bias, experts, scores, choice);
    });
  } else if constexpr (Score::traits.elementwise) {
    choice_row<A>(z, bias, experts, choice, [&](F x, index_t e) {
      const F s = Score::template value<A>(x);
      if (scores != nullptr) s.store_unaligned(scores + e);
      return s;
    });
  } else {
    score.template score_row<A>(z, experts, scores);
    choice_row<A>(z, bias, experts, choice,
                  [&](F, index_t e) { return simd::load<A>(scores + e); });
  }
}

}  // namespace detail

/// A token-choice router: each token picks its experts from its own row of logits.
///
/// The choice is made on the logits where the score keeps their order and nothing else moves it, so
/// only the winners are scored and ties are ties of logits; otherwise on score + bias. The weight
/// never sees the bias.
/// Example:
///
///     const router mixtral{softmax{}, top_k{.k = 2}, sum_normalized};
///     const router deepseek{sigmoid{}, top_k{.k = 8, .groups = 8, .topk_group = 4},
///                           weight_rule{.normalize = normalization::sum, .scale = 2.5f},
///                           selection_bias(bias)};
template <score_function Score, selection_rule Selection = top_k>
struct router {
  Score score{};
  Selection selection{};
  weight_rule weight{};
  selection_bias bias{};
  logit_transform transform{};

  bool selects_on_logits() const {
    return score.traits.monotone && bias.empty() && !selection.masks_experts();
  }

  struct buffers {
    decltype(std::declval<const Selection&>().carve(std::declval<scratch&>(), index_t{})) select;
    float* logits;  ///< [16, E] where logits are transformed
    float* scores;  ///< [16, E] where the choice is made on scores that depend on the whole row
    float* choice;  ///< [16, E] where the choice is made on scores
  };

  index_t k() const { return selection.choices(); }
  side_use reads_side(index_t) const {
    side_use use{.own_k = k(), .noise_logits = transform.noise.active()};
    if constexpr (requires { selection.reads_modality(); })
      use.modality = selection.reads_modality();
    return use;
  }
  static index_t experts(index_t columns) { return columns; }

  /// Throws: error where a part does not fit E experts.
  void check(index_t experts) const {
    transform.check(experts);
    bias.check(experts);
    selection.check(experts);
    weight.check(experts);
  }

  buffers carve(scratch& tape, index_t experts) const {
    const index_t block = block_rows * experts;
    // A register may be read past the last score.
    const index_t scores = selects_on_logits() || score.traits.elementwise ? 0 : block + block_rows;
    return {selection.carve(tape, experts), tape.take<float>(transform.active() ? block : 0),
            tape.take<float>(scores), tape.take<float>(selects_on_logits() ? 0 : block)};
  }

  /// Routes up to 16 tokens: c receives ids and weights.
  template <class A = simd::default_arch>
  void route_block(logit_block z, const buffers& memory, choice_block& c) const {
    if (transform.active()) z = transform.template apply<A>(z, memory.logits);
    if (selects_on_logits()) {
      selection.template select<A>(z, nullptr, c, memory.select);
      keep_own_k(z, c);
      c.has_row_max = true;
      // Fewer choices than were selected, in an order other than best first, may lack the best.
      if constexpr (requires { selection.keeps_best(); })
        c.has_row_max = selection.keeps_best() && z.side->k_of_token.empty();
      score.template score_choices<A>(z, c, weight.needs());
    } else {
      this->template score_rows<A>(z, memory);
      logit_block choice = z;
      choice.logits = memory.choice;
      choice.stride = z.experts;
      selection.template select<A>(choice, memory.choice, c, memory.select);
      keep_own_k(z, c);
      // The value of a choice held score + bias, and subtracting the bias would not give back the
      // score.
      const float* from = scores_winners() ? z.logits : memory.scores;
      const index_t stride = scores_winners() ? z.stride : z.experts;
      for (int r = 0; r < c.k; ++r)
        for (int i = 0; i < z.rows; ++i) {
          const expert_id e = c.id[r * block_rows + i];
          c.value[r * block_rows + i] = e == no_expert ? 0.0f : from[i * stride + e];
        }
      if (scores_winners()) score.template score_choices<A>(z, c, weight.needs());
      if constexpr (requires { selection.weighs_lost_with_0(); })
        if (selection.weighs_lost_with_0()) clear_lost(z, memory, c);
    }
    weight.template apply<A>(c);
    if constexpr (requires { selection.template settle<A>(c, z.rows); })
      selection.template settle<A>(c, z.rows);
  }

  /// So many rows at most are routed sooner one by one than as a block; 0 where the parts have no
  /// way for single rows.
  template <class A = simd::default_arch>
  index_t rows_alone(index_t experts) const {
    if constexpr (row_score<Score> && row_selection<Selection>) {
      if constexpr (requires { selection.takes_rows_of(experts); })
        if (!selection.takes_rows_of(experts)) return 0;
      const bool takes = !transform.active() && selection.takes_rows() &&
                         (selects_on_logits() || experts <= most_scores);
      return takes ? simd::rows_sooner_alone<A>(experts, k()) : 0;
    } else {
      return 0;
    }
  }

  /// Routes one token with the bits of route_block: k ids and weights. Requires: rows_alone() > 0.
  template <class A = simd::default_arch>
    requires row_score<Score> && row_selection<Selection>
  void route_row(const float* z, index_t experts, index_t, const side_inputs&, expert_id* id,
                 float* weights) const {
    constexpr int block = simd::registers_per_block<A>;
    simd::row_ranks ranks;
    alignas(alignment) float scores[most_scores + block_rows];
    const bool on_logits = selects_on_logits();
    if (on_logits)
      selection.template select_row<A>(z, experts, ranks);
    else
      this->template select_on_scores<A>(z, experts, scores, ranks);
    if (k() <= block_rows)
      this->template weigh_row<A, block>(z, experts, ranks, on_logits ? nullptr : scores, id,
                                         weights);
    else
      this->template weigh_long_row<A>(z, experts, ranks, on_logits ? nullptr : scores, id,
                                       weights);
  }

  /// The same from bfloat16 rows: where the choice is made on the logits it is made on them as they
  /// are, and they are widened only for scores that depend on the whole row.
  template <class A = simd::default_arch>
    requires requires(const Selection& s, const narrow_block<bfloat16>& z, choice_block& c,
                      scratch& tape) { s.select(z, c, s.carve(tape, index_t{})); }
  void route_block(const narrow_block<bfloat16>& z, const buffers& memory, choice_block& c) const {
    if (transform.active() || !selects_on_logits())
      return this->template route_block<A>(z.template widened<A>(), memory, c);
    selection.template select<A>(z, c, memory.select);
    keep_own_k(z, c);
    c.has_row_max = true;
    const logit_block rows =
        reads_rows(score.traits, weight.needs())
            ? z.template widened<A>()
            : logit_block{nullptr, 0, z.rows, z.experts, z.first_token, z.side};
    score.template score_choices<A>(rows, c, weight.needs());
    weight.template apply<A>(c);
    if constexpr (requires { selection.template settle<A>(c, z.rows); })
      selection.template settle<A>(c, z.rows);
  }

 private:
  // Scores that need no other logits than the winners' are made from these when all is chosen: the
  // softmax over the selected experts knows them then only. So are those apart from the choice.
  bool scores_winners() const {
    return score.traits.elementwise || score.traits.apart ||
           score.traits.reads_rows == row_use::never;
  }

  // Experts of groups that lost, chosen because nothing else was left: the reference weighs them by
  // their masked score.
  void clear_lost(const logit_block& z, const buffers& memory, choice_block& c) const {
    for (int r = 0; r < c.k; ++r)
      for (int i = 0; i < z.rows; ++i) {
        const expert_id e = c.id[r * block_rows + i];
        if (e != no_expert && memory.choice[i * z.experts + e] == 0.0f &&
            selection.lost(memory.select, i, e, z.experts))
          c.value[r * block_rows + i] = 0.0f;
      }
  }

  // Experts whose scores fit beside those of others on the stack.
  static constexpr index_t most_scores = 1024;

  // scores: those of the whole row, where the choice was made on them.
  template <class A, int n>
  MOEROUTE_INLINE void weigh_row(const float* z, index_t experts, const simd::row_ranks& ranks,
                                 const float* scores, expert_id* id, float* weights) const {
    row_choices<A, n> c(ranks, static_cast<int>(k()));
    const bool chosen_on_scores = scores != nullptr,
               scored = chosen_on_scores && (score.traits.elementwise || !scores_winners());
    if constexpr (n == simd::registers_per_block<A> && std::is_same_v<Score, any_score> &&
                  !requires { selection.template settle<A>(c); }) {
      // What is no detail::plain_row shares the code of choices by a table.
      static constexpr any_score as_it_is{identity_score{}};
      return detail::weigh_given<A>(scored ? as_it_is : score, weight, ranks.column, c.k,
                                    scored ? scores : z, experts, id, weights);
    }
    if (scored) {
      c.take_from(scores);
    } else {
      if (chosen_on_scores) {
        c.take_from(z);
        c.has_row_max = false;
      }
      score.score_one(z, experts, c, weight.needs());
    }
    weight.template apply_to<A>(c);
    if constexpr (requires { selection.template settle<A>(c); }) selection.template settle<A>(c);
    c.store(id, weights);
  }

  // More than a block's choices: in the code once, where a call is nothing beside the work.
  template <class A>
  MOEROUTE_OUT_OF_LINE void weigh_long_row(const float* z, index_t experts,
                                           const simd::row_ranks& ranks, const float* scores,
                                           expert_id* id, float* weights) const {
    constexpr int blocks = simd::max_row_k / block_rows;
    this->template weigh_row<A, simd::registers_per_block<A> * blocks>(z, experts, ranks, scores,
                                                                       id, weights);
  }

  template <class A>
  MOEROUTE_OUT_OF_LINE void select_on_scores(const float* z, index_t experts, float* scores,
                                             simd::row_ranks& ranks) const {
    alignas(alignment) float choice[most_scores];
    const float* const b = bias.empty() ? nullptr : bias.values().data();
    detail::score_to_choose<A>(score, z, b, experts, scores, choice);
    selection.template select_row<A>(choice, experts, ranks);
  }

  template <class A>
  void score_rows(const logit_block& z, const buffers& memory) const {
    const float* const b = bias.empty() ? nullptr : bias.values().data();
    for (int i = 0; i < z.rows; ++i)
      detail::score_to_choose<A>(score, z.row(i), b, z.experts,
                                 score.traits.elementwise ? nullptr : memory.scores + i * z.experts,
                                 memory.choice + i * z.experts);
  }
};

template <class Score, class Selection>
router(Score, Selection, weight_rule, selection_bias, logit_transform) -> router<Score, Selection>;
template <class Score, class Selection>
router(Score, Selection, weight_rule, selection_bias) -> router<Score, Selection>;
template <class Score, class Selection>
router(Score, Selection, weight_rule) -> router<Score, Selection>;
template <class Score, class Selection>
router(Score, Selection) -> router<Score, Selection>;

static_assert(token_router<router<softmax>>);
static_assert(token_router<router<sigmoid>>);

}  // namespace moeroute
