// Parts of a router picked at run time: the rare words of a description share one router made of
// these, where the common ones have kernels of their own.
#pragma once

#include <algorithm>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/any_score.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/selection.hpp>
#include <moeroute/policy/parts/selection_rules.hpp>

namespace moeroute {

/// A score to choose on, or the logits, and another to weigh the winners by.
struct rare_score {
  static constexpr score_traits traits{.monotone = true, .shift_invariant = false, .apart = true};

  any_score choice{}, weight{};
  bool on_logits = false;

  template <class A = simd::default_arch>
  void score_choices(const logit_block& z, choice_block& c, score_scale scale) const {
    weight.score_choices<A>(z, c, scale);
  }
  template <class A = simd::default_arch>
  void score_row(const float* z, index_t experts, float* scores) const {
    if (on_logits) return identity_score::score_row<A>(z, experts, scores);
    choice.score_row<A>(z, experts, scores);
  }
};
static_assert(score_function<rare_score>);

/// The k best of all experts, of the best groups, or of each group.
struct any_selection {
  top_k best{};
  bool of_each_group = false;

  index_t choices() const { return best.k; }
  bool masks_experts() const { return !of_each_group && best.masks_experts(); }
  bool weighs_lost_with_0() const { return !of_each_group && best.weighs_lost_with_0(); }
  void check(index_t experts) const { of_each_group ? each().check(experts) : best.check(experts); }

  struct buffers {
    top_k::buffers best;
    top_of_each_group::buffers each;
  };
  buffers carve(scratch& tape, index_t experts) const {
    if (of_each_group) return {{}, each().carve(tape, experts)};
    return {best.carve(tape, experts), {}};
  }

  template <class A = simd::default_arch>
  void select(const logit_block& choice, float* rows, choice_block& c, const buffers& m) const {
    if (of_each_group) return each().select<A>(choice, rows, c, m.each);
    best.select<A>(choice, rows, c, m.best);
  }
  bool lost(const buffers& m, int row, expert_id e, index_t experts) const {
    return best.lost(m.best, row, e, experts);
  }

 private:
  top_of_each_group each() const { return {best.k, best.groups}; }
};
static_assert(selection_rule<any_selection>);

/// The steps of row_transform.hpp, those that are asked for: several projections made one, then
/// standardised, then steered, then masked by lot.
struct any_row_transform {
  bool sums_sigmoids = false;
  pass_logits passes{.passes = 1};
  float standardize = 0.0f;  ///< lambda; 0: off
  steering steer{};
  candidates lot{.active = 0};  ///< 0: off

  bool active() const {
    return sums_sigmoids || passes.passes > 1 || standardize != 0.0f || steer.active() ||
           lot.active != 0;
  }
  index_t experts(index_t columns) const {
    return sums_sigmoids ? sigmoid_sum::experts(columns) : passes.experts(columns);
  }
  void check(index_t columns, index_t least) const {
    if (sums_sigmoids) sigmoid_sum::check(columns, least);
    passes.check(columns, least);
    const index_t own = experts(columns);
    if (standardize != 0.0f) standardized{standardize}.check(own, least);
    steer.check(own, least);
    if (lot.active != 0) lot.check(own, least + static_cast<index_t>(steer.suppress.size()));
  }

  template <class A = simd::default_arch>
  MOEROUTE_COLD void apply_row(const float* z, index_t columns, index_t token,
                               const side_inputs& side, float* out) const {
    const index_t own = experts(columns);
    if (sums_sigmoids)
      sigmoid_sum::apply_row<A>(z, columns, token, side, out);
    else if (passes.passes > 1)
      passes.apply_row<A>(z, columns, token, side, out);
    else
      std::copy_n(z, own, out);
    if (standardize != 0.0f) standardized{standardize}.apply_row<A>(out, own, token, side, out);
    if (steer.active()) steer.apply_row<A>(out, own, token, side, out);
    if (lot.active != 0) lot.apply_row<A>(out, own, token, side, out);
  }
};
static_assert(row_transform<any_row_transform>);

}  // namespace moeroute
