// Score functions: from logits to what weights are made of.
#pragma once

#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute {

/// What a score function promises about its row.
struct score_traits {
  bool monotone;         ///< a larger logit never has a smaller score in the same row
  bool shift_invariant;  ///< adding a constant to the row changes nothing
};

/// A score that the router can evaluate at the winners only: value holds their logits and becomes their scores.
template <class S>
concept score_function = requires(const S& s, const logit_block& z, choice_block& c, float* row) {
  { S::traits } -> std::convertible_to<score_traits>;
  { s.score_choices(z, c, true) };  // true: a positive factor common to a row may be left out
  { s.score_row(z.row(0), z.experts, row) };
};

namespace detail {

// Calls f(values of one rank, mask of the rows that have it) and stores what it returns, rank by rank.
template <class A, class F>
MOEROUTE_INLINE void for_each_rank(choice_block& c, int lane, F&& f) {
  const simd::vint<A> none(no_expert);
  for (int r = 0; r < c.k; ++r) {
    float* value = c.value + r * block_rows + lane;
    const simd::vint<A> id = simd::load<A>(c.id + r * block_rows + lane);
    const auto present = xsimd::batch_bool_cast<float>(id != none);
    f(simd::load<A>(value), present).store_unaligned(value);
  }
}

}  // namespace detail

/// Softmax over all experts: score e = exp(z_e) / sum over j of exp(z_j).
///
/// Several +inf logits share the row equally. Cost: with up_to_row_factor k exponentials per row, else E.
/// Source: Shazeer et al. 2017; Fedus et al. 2021.
struct softmax {
  static constexpr score_traits traits{.monotone = true, .shift_invariant = true};

  template <class A = simd::default_arch>
  static void score_choices(const logit_block& z, choice_block& c, bool up_to_row_factor) {
    alignas(alignment) float total[block_rows];
    for (int i = 0; i < block_rows; ++i) total[i] = 1.0f;
    if (!up_to_row_factor)
      for (int i = 0; i < z.rows; ++i)
        total[i] = simd::row_sum_exp<A>(z.row(i), z.experts, c.value[i]);
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      const simd::vfloat<A> max = simd::load<A>(c.value + lane);
      const simd::vfloat<A> sum = simd::load<A>(total + lane);
      detail::for_each_rank<A>(c, lane, [&](simd::vfloat<A> x, simd::vmask<A> present) {
        const simd::vfloat<A> e = simd::exp_below_max<A>(x, max);
        return simd::select<A>(present, up_to_row_factor ? e : e / sum, simd::vfloat<A>(0.0f));
      });
    }
  }

  /// All scores of one row; zeros where the row has nothing above -inf.
  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    const float max = simd::row_max<A>(z, experts);
    if (!(max > simd::minus_infinity)) {
      for (index_t e = 0; e < experts; ++e) score[e] = 0.0f;
      return;
    }
    const simd::vfloat<A> top(max), sum(simd::row_sum_exp<A>(z, experts, max));
    simd::map_row<A>(z, experts, score, [&](simd::vfloat<A> x) {
      return simd::exp_below_max<A>(x, top) / sum;
    });
  }
};
static_assert(score_function<softmax>);

/// Softmax over the selected experts only: the scores of a row sum to 1.
///
/// With k = 1 the weight is 1 and no gradient reaches the gate. Cost: k exponentials per row.
/// Source: Shazeer et al. 2017; Mixtral (Jiang et al. 2024) in its equivalent form; GPT-OSS 2025.
struct softmax_selected {
  static constexpr score_traits traits{.monotone = true, .shift_invariant = true};

  template <class A = simd::default_arch>
  static void score_choices(const logit_block&, choice_block& c, bool up_to_row_factor) {
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      const simd::vfloat<A> max = simd::load<A>(c.value + lane);
      simd::vfloat<A> sum(0.0f);
      detail::for_each_rank<A>(c, lane, [&](simd::vfloat<A> x, simd::vmask<A> present) {
        const simd::vfloat<A> e =
            simd::select<A>(present, simd::exp_below_max<A>(x, max), simd::vfloat<A>(0.0f));
        sum += e;
        return e;
      });
      if (up_to_row_factor) continue;
      detail::for_each_rank<A>(c, lane, [&](simd::vfloat<A> e, simd::vmask<A> present) {
        return simd::select<A>(present, e / sum, simd::vfloat<A>(0.0f));
      });
    }
  }

  /// What the choice is made on: the logits themselves.
  template <class A = simd::default_arch>
  static void score_row(const float* z, index_t experts, float* score) {
    simd::map_row<A>(z, experts, score, [](simd::vfloat<A> x) { return x; });
  }
};
static_assert(score_function<softmax_selected>);

}  // namespace moeroute
