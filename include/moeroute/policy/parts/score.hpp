// Score functions: from logits to what weights are made of.
#pragma once

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/choices.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute {

/// When the scores of the winners depend on the logits of the others: score_choices reads the rows.
enum class row_use { always, for_exact_scores, never };

/// What a score function promises about its row.
struct score_traits {
  bool monotone;             ///< a larger logit never has a smaller score in the same row
  bool shift_invariant;      ///< adding a constant to the row changes nothing
  bool elementwise = false;  ///< a score depends on its own logit only: S::value<A>(register)
  row_use reads_rows = row_use::always;  ///< by score_choices
  bool apart = false;  ///< score_row is what a choice is made on, score_choices another score
};

/// How exact the scores of the winners must be.
enum class score_scale {
  exact,
  up_to_row_factor,  ///< a positive factor common to a row may be left out: the weight rule divides
                     ///< it away
};

/// Whether score_choices reads the rows.
constexpr bool reads_rows(const score_traits& traits, score_scale scale) {
  return traits.reads_rows == row_use::always ||
         (traits.reads_rows == row_use::for_exact_scores && scale == score_scale::exact);
}

/// A score function evaluates a whole row, or only the winners of a block: there c.value holds
/// their logits, in any order, and becomes their scores. Its traits are known to the compiler, but
/// for a score that is picked at run time.
template <class S>
concept score_function = requires(const S& s, const logit_block& z, choice_block& c, float* row) {
  { S::traits } -> std::convertible_to<score_traits>;
  { s.score_choices(z, c, score_scale::exact) };
  { s.score_row(z.row(0), z.experts, row) };
};

/// A score function that also evaluates the choices of one row alone.
template <class S>
concept row_score = score_function<S> &&
                    requires(const S& s, const float* row, row_choices<simd::default_arch, 1>& c) {
                      s.score_one(row, index_t{}, c, score_scale::exact);
                    };

namespace detail {

// exp(x - max) / total for the choices that are there, 0 for the others; without the quotient up to
// a factor of the row.
template <class A, class Choices>
MOEROUTE_INLINE void softmax_of(Choices& c, simd::vfloat<A> max, simd::vfloat<A> total,
                                score_scale scale) {
  using F = simd::vfloat<A>;
  const bool exact = scale == score_scale::exact;
  c.for_each([&](F x, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
    const F e = simd::exp_below_max<A>(x, max);
    return simd::select<A>(present, exact ? simd::divide_first<A>(e, total, c.lanes()) : e,
                           F(0.0f));
  });
}

// The same where the total is that of the choices themselves.
template <class A, class Choices>
MOEROUTE_INLINE void softmax_among(Choices& c, score_scale scale) {
  using F = simd::vfloat<A>;
  softmax_of<A>(c, c.largest(), F(1.0f), score_scale::up_to_row_factor);
  if (scale == score_scale::up_to_row_factor) return;
  const F sum = c.sum([](F x) MOEROUTE_INLINE_LAMBDA { return x; });
  c.for_each([&](F e, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
    return simd::select<A>(present, simd::divide_first<A>(e, sum, c.lanes()), F(0.0f));
  });
}

}  // namespace detail

/// Softmax over all experts: score e = exp(z_e) / sum over j of exp(z_j).
///
/// Several +inf logits share the row equally. Cost: k exponentials per row up to a row factor, else
/// E. Source: Shazeer et al. 2017; Fedus et al. 2021.
struct softmax {
  static constexpr score_traits traits{
      .monotone = true, .shift_invariant = true, .reads_rows = row_use::for_exact_scores};

  template <class A = simd::default_arch>
  static void score_choices(const logit_block& z, choice_block& c, score_scale scale) {
    alignas(alignment) float max[block_rows], total[block_rows];
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      lane_choices<A>{&c, lane}.largest().store_aligned(max + lane);
      simd::vfloat<A>(1.0f).store_aligned(total + lane);
    }
    if (scale == score_scale::exact) {
      for (int i = 0; i < z.rows; ++i) {
        // The winners of a top-k hold the row's maximum; those of a table need not.
        if (!c.has_row_max) max[i] = std::max(max[i], simd::row_max<A>(z.row(i), z.experts));
        total[i] = simd::row_sum_exp<A>(z.row(i), z.experts, max[i]);
      }
    }
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      lane_choices<A> here{&c, lane};
      detail::softmax_of<A>(here, simd::load<A>(max + lane), simd::load<A>(total + lane), scale);
    }
  }

  /// The choices of one row alone.
  template <class A, int n>
  MOEROUTE_INLINE static void score_one(const float* z, index_t experts, row_choices<A, n>& c,
                                        score_scale scale) {
    float max = c.has_row_max ? c.first() : c.largest().get(0);
    float total = 1.0f;
    if (scale == score_scale::exact) {
      if (!c.has_row_max) max = std::max(max, simd::row_max<A>(z, experts));
      total = simd::row_sum_exp<A>(z, experts, max);
    }
    detail::softmax_of<A>(c, simd::vfloat<A>(max), simd::vfloat<A>(total), scale);
  }

  /// All scores of one row; zeros where the row has nothing above -inf.
  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    const float max = simd::row_max<A>(z, experts);
    if (!(max > simd::minus_infinity)) {
      for (index_t e = 0; e < experts; ++e) score[e] = 0.0f;
      return;
    }
    const simd::divider<A> by_sum(simd::row_exp<A>(z, experts, max, score));
    simd::map_row<A>(score, experts, score, by_sum);
  }
};
static_assert(score_function<softmax>);

/// Softmax over the selected experts only: the scores of a row sum to 1.
///
/// With k = 1 the weight is 1 and no gradient reaches the gate. Cost: k exponentials per row.
/// Source: Shazeer et al. 2017; Mixtral (Jiang et al. 2024) in its equivalent form; GPT-OSS 2025.
struct softmax_selected {
  static constexpr score_traits traits{
      .monotone = true, .shift_invariant = true, .reads_rows = row_use::never};

  template <class A = simd::default_arch>
  static void score_choices(const logit_block&, choice_block& c, score_scale scale) {
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      lane_choices<A> here{&c, lane};
      detail::softmax_among<A>(here, scale);
    }
  }

  template <class A, int n>
  MOEROUTE_INLINE static void score_one(const float*, index_t, row_choices<A, n>& c,
                                        score_scale scale) {
    detail::softmax_among<A>(c, scale);
  }

  /// What a choice is made on: the logits themselves.
  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    simd::map_row<A>(z, experts, score, [](simd::vfloat<A> x) { return x; });
  }
};
static_assert(score_function<softmax_selected>);

/// A score that looks at one logit only. F has `template <class A> static vfloat<A>
/// value(vfloat<A>)`.
template <class F>
struct elementwise_score {
  static constexpr score_traits traits{.monotone = true,
                                       .shift_invariant = false,
                                       .elementwise = true,
                                       .reads_rows = row_use::never};

  template <class A = simd::default_arch>
  static void score_choices(const logit_block&, choice_block& c, score_scale) {
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      lane_choices<A> here{&c, lane};
      score_all<A>(here);
    }
  }

  template <class A, int n>
  MOEROUTE_INLINE static void score_one(const float*, index_t, row_choices<A, n>& c, score_scale) {
    score_all<A>(c);
  }

  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    simd::map_row<A>(z, experts, score, [](simd::vfloat<A> x) { return F::template value<A>(x); });
  }

 private:
  template <class A, class Choices>
  MOEROUTE_INLINE static void score_all(Choices& c) {
    c.for_each([&](simd::vfloat<A> x, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
      if constexpr (requires { F::template value_first<A>(x, 1); })
        x = F::template value_first<A>(x, c.lanes());
      else
        x = F::template value<A>(x);
      return simd::select<A>(present, x, simd::vfloat<A>(0.0f));
    });
  }
};

/// sigmoid(z). Source: DeepSeek-V3 (2024), Llama 4 (2025).
struct sigmoid : elementwise_score<sigmoid> {
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value(simd::vfloat<A> z) {
    return simd::sigmoid<A>(z);
  }
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value_first(simd::vfloat<A> z, int n) {
    return simd::sigmoid_first<A>(z, n);
  }
};
static_assert(score_function<sigmoid>);

/// sqrt(softplus(z)). Source: DeepSeek-V4 (2026).
struct sqrt_softplus : elementwise_score<sqrt_softplus> {
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value(simd::vfloat<A> z) {
    return simd::sqrt_softplus<A>(z);
  }
};
static_assert(score_function<sqrt_softplus>);

/// log(1 + exp(z)).
struct softplus : elementwise_score<softplus> {
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value(simd::vfloat<A> z) {
    return simd::softplus<A>(z);
  }
};
static_assert(score_function<softplus>);

/// max(z, 0). Source: ReMoE (Wang et al. 2024), BlockFFN (Song et al. 2025).
struct relu : elementwise_score<relu> {
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value(simd::vfloat<A> z) {
    return simd::select<A>(z > simd::vfloat<A>(0.0f), z, simd::vfloat<A>(0.0f));
  }
};
static_assert(score_function<relu>);

/// z itself.
struct identity_score : elementwise_score<identity_score> {
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value(simd::vfloat<A> z) {
    return z;
  }
};
static_assert(score_function<identity_score>);

/// 1 for every expert: tables and random choices without a gate. Source: Hash Layers (Roller et al.
/// 2021).
struct uniform_score : elementwise_score<uniform_score> {
  template <class A>
  MOEROUTE_INLINE static simd::vfloat<A> value(simd::vfloat<A>) {
    return simd::vfloat<A>(1.0f);
  }
};
static_assert(score_function<uniform_score>);

/// One score chooses, another weighs the winners: both of the same logits.
///
/// chosen_by<identity_score, sigmoid> with a selection bias is a bias on the logits, and sigmoid
/// weights without it; chosen_by<sigmoid, softmax_selected> is GroveMoE's.
template <score_function Choice, score_function Weight>
struct chosen_by {
  static_assert(!Choice::traits.apart && !Weight::traits.apart,
                "[moeroute::chosen_by] a score of one kind chooses, one of one kind weighs");
  static constexpr score_traits traits{
      .monotone = Choice::traits.monotone,
      .shift_invariant = Choice::traits.shift_invariant && Weight::traits.shift_invariant,
      .reads_rows = Weight::traits.reads_rows,
      .apart = true};

  Choice choice{};
  Weight weight{};

  template <class A = simd::default_arch>
  void score_choices(const logit_block& z, choice_block& c, score_scale scale) const {
    weight.template score_choices<A>(z, c, scale);
  }
  template <class A, int n>
    requires row_score<Weight>
  MOEROUTE_INLINE void score_one(const float* z, index_t experts, row_choices<A, n>& c,
                                 score_scale scale) const {
    weight.score_one(z, experts, c, scale);
  }
  template <class A = simd::default_arch>
  void score_row(const float* z, index_t experts, float* score) const {
    choice.template score_row<A>(z, experts, score);
  }
};
static_assert(row_score<chosen_by<sigmoid, softmax_selected>>);

}  // namespace moeroute
