// Selection by rank: the k best experts, of all or of the best groups.
#pragma once

#include <algorithm>
#include <bit>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/select/group_best.hpp>
#include <moeroute/simd/select/top_k_packed.hpp>

namespace moeroute {

/// A selection rule fills ids and values of a block from its choice scores, where NaN and -inf mean
/// "not this one". One with settle(c, rows) and settle(row_choices) has the last word on what was
/// weighed.
template <class S>
concept selection_rule =
    requires(const S& s, const logit_block& choice, choice_block& c, float* rows, scratch& tape) {
      { s.choices() } -> std::convertible_to<index_t>;
      { s.check(index_t{}) };
      { s.masks_experts() } -> std::convertible_to<bool>;  // rewrites the choice scores in `rows`
      { s.select(choice, rows, c, s.carve(tape, index_t{})) };
    };

/// A selection rule that also takes one row alone.
template <class S>
concept row_selection = selection_rule<S> && requires(const S& s, float* choice,
                                                      const float* logits, simd::row_ranks& ranks) {
  { s.takes_rows() } -> std::convertible_to<bool>;
  s.select_row(choice, index_t{}, ranks);  // a row that it may overwrite
  s.select_row(logits, index_t{}, ranks);  // where it does not mask experts
};

namespace detail {

// worth[g][row] = the sum of all scores of the group, -inf where it has none above -inf.
template <class A>
MOEROUTE_COLD void sum_groups(const float* rows, int n, index_t groups, index_t size,
                              float* worth) {
  using F = simd::vfloat<A>;
  const F never(simd::minus_infinity), zero(0.0f);
  for (index_t g = 0; g < groups; ++g)
    for (int i = 0; i < block_rows; ++i) {
      float& out = worth[g * block_rows + i];
      out = 0.0f;
      if (i >= n) continue;
      const float* const row = rows + (i * groups + g) * size;
      simd::partials<A> sum(0.0f);
      simd::detail::for_each_register<A>(row, size, simd::minus_infinity, [&](int r, F x) {
        sum.part[r] += simd::select<A>(x > never, x, zero);
      });
      out = simd::row_max<A>(row, size) > simd::minus_infinity ? simd::sum_of<A>(sum)
                                                               : simd::minus_infinity;
    }
}

}  // namespace detail

/// The k experts with the largest choice scores, the lowest id first among equals; with groups > 1
/// only experts of the topk_group best groups stay, equal groups in ascending order.
///
/// NaN and -inf are never selected. Cost: O(E) per row. Source: Shazeer et al. 2017; groups:
/// DeepSeek-V2 2024.
/// Example:
///
///     const router r{sigmoid{}, top_k{.k = 8, .groups = 8, .topk_group = 4}, sum_normalized};
struct top_k {
  index_t k = 2;
  index_t groups = 1;      ///< of E / groups experts each
  index_t topk_group = 1;  ///< groups that stay
  moeroute::group_score group_score = moeroute::group_score::top2_sum;
  float group_fill = simd::minus_infinity;  ///< choice score of experts in other groups: -inf or 0
  moeroute::lost_weight lost_weight = moeroute::lost_weight::as_published;

  index_t choices() const { return k; }
  bool masks_experts() const { return groups > 1; }
  /// Whether chosen experts of groups that lost have weight 0.
  bool weighs_lost_with_0() const {
    return masks_experts() && group_fill == 0.0f &&
           (lost_weight == moeroute::lost_weight::zero ||
            (lost_weight == moeroute::lost_weight::as_published &&
             group_score == moeroute::group_score::max));
  }

  /// Throws: error where k is outside [1, E], groups do not divide E, or topk_group groups hold
  /// fewer than k.
  void check(index_t experts) const {
    detail::check_top_k(experts, k, groups, topk_group, group_fill);
  }

  struct buffers {
    std::uint64_t* key;
    float* worth;  ///< [groups][16], one row per lane
    float* value;  ///< [groups][16] seconds; with more than two counted, the best of 16 groups
    std::int32_t* column;  ///< likewise
  };

  buffers carve(scratch& tape, index_t experts) const {
    const index_t size = experts / groups, best = masks_experts() ? counted(size) : 0;
    if (best <= 2)
      return {tape.take<std::uint64_t>(simd::top_k_scratch(experts, k)),
              tape.take<float>(best > 0 ? groups * block_rows : 0),
              tape.take<float>(best > 0 ? groups * block_rows : 0), nullptr};
    return {tape.take<std::uint64_t>(
                std::max(simd::top_k_scratch(experts, k), simd::top_k_scratch(size, best))),
            tape.take<float>(groups * block_rows), tape.take<float>(best * block_rows),
            tape.take<std::int32_t>(best * block_rows)};
  }

  /// rows: the choice scores again, writable and E apart, where masks_experts().
  template <class A = simd::default_arch>
  void select(const logit_block& choice, float* rows, choice_block& c, const buffers& m) const {
    if (masks_experts()) {
      this->template weigh_groups<A>(rows, choice.rows, choice.experts, m);
      this->template mask_groups<A>(rows, choice.rows, choice.experts, m.worth);
    }
    simd::top_k_block<A>(choice.logits, choice.stride, choice.rows, choice.experts, c.k, c.value,
                         c.id, m.key);
  }

  /// Whether select_row knows this rule: k up to simd::max_row_k, up to 16 groups.
  bool takes_rows() const {
    return k <= simd::max_row_k &&
           (!masks_experts() || (groups <= block_rows && !weighs_lost_with_0() &&
                                 group_score < moeroute::group_score::top_sum));
  }

  /// The same for one row that comes alone. Requires: takes_rows(); where masks_experts() the row
  /// is overwritten.
  template <class A = simd::default_arch>
  void select_row(float* choice, index_t experts, simd::row_ranks& c) const {
    if (masks_experts())
      this->template select_of_groups<A>(choice, experts, c);
    else
      simd::top_k_row<A>(choice, experts, static_cast<int>(k), c);
  }
  template <class A = simd::default_arch>
  void select_row(const float* choice, index_t experts, simd::row_ranks& c) const {
    simd::top_k_row<A>(choice, experts, static_cast<int>(k), c);
  }

  /// The same on logits, which nothing masks. Requires: !masks_experts().
  template <class A = simd::default_arch>
  void select(const narrow_block<bfloat16>& z, choice_block& c, const buffers& m) const {
    simd::top_k_block<A>(z.logits, z.stride, z.rows, z.experts, c.k, c.value, c.id, z.wide, m.key);
  }

  /// Whether expert e of a row is of a group that lost, after select() on this memory.
  bool lost(const buffers& m, int row, expert_id e, index_t experts) const {
    const index_t g = e / (experts / groups);
    const float mine = m.worth[g * block_rows + row];
    index_t before = 0;
    for (index_t h = 0; h < groups; ++h) {
      const float other = m.worth[h * block_rows + row];
      before += h < g ? other >= mine : other > mine;
    }
    return before >= topk_group;
  }

 private:
  // Experts that count towards a group's worth.
  index_t counted(index_t size) const {
    if (group_score == moeroute::group_score::max || group_score == moeroute::group_score::sum)
      return 1;
    if (group_score == moeroute::group_score::top2_sum) return std::min<index_t>(2, size);
    return std::clamp<index_t>(k / topk_group, 1, size);
  }

  // The groups of a row that stay, as bits.
  template <class A>
  std::uint32_t best_groups(const float* choice, index_t size) const {
    using F = simd::vfloat<A>;
    alignas(alignment) float one[block_rows], two[block_rows];
    simd::best_two_of_row<A>(choice, groups, size, one, two);
    if (group_score == moeroute::group_score::top2_sum)
      for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
        const F best = simd::load<A>(one + lane), second = simd::load<A>(two + lane);
        simd::select<A>(second > F(simd::minus_infinity), best + second, best)
            .store_aligned(one + lane);
      }
    std::uint32_t stays = 0;
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      const F mine = simd::load<A>(one + lane);
      simd::vint<A> before(0);
      for (int g = 0; g < groups; ++g) {
        const F other(one[g]);
        const auto later = simd::lanes_from<A>(g - lane + 1);
        before = simd::count_where<A>(before, (other > mine) | (later & (other == mine)));
      }
      stays |= static_cast<std::uint32_t>(
                   (before < simd::vint<A>(static_cast<std::int32_t>(topk_group))).mask())
               << lane;
    }
    return stays & ((1u << groups) - 1);
  }

  template <class A>
  void select_of_groups(float* choice, index_t experts, simd::row_ranks& c) const {
    using F = simd::vfloat<A>;
    const index_t size = experts / groups;
    std::uint32_t stays = this->template best_groups<A>(choice, size);
    if (group_fill == simd::minus_infinity) {
      // Nothing outside can be chosen: the groups that stay move together.
      std::int32_t start[block_rows];
      index_t kept = 0;
      for (; stays != 0; stays &= stays - 1, ++kept) {
        const index_t g = std::countr_zero(stays);
        start[kept] = static_cast<std::int32_t>(g * size);
        simd::map_row<A>(choice + g * size, size, choice + kept * size, [](F x) { return x; });
      }
      simd::top_k_row<A>(choice, kept * size, static_cast<int>(k), c);
      simd::move_columns<A>(c, static_cast<int>(k), start, static_cast<int>(kept),
                            static_cast<std::int32_t>(size));
    } else {
      const F fill(group_fill), never(simd::minus_infinity);
      for (index_t g = 0; g < groups; ++g) {
        float* const group = choice + g * size;
        const simd::vmask<A> is_out((stays >> g & 1) == 0);
        simd::map_row<A>(group, size, group,
                         [&](F x) { return simd::select<A>(is_out & (x > never), fill, x); });
      }
      simd::top_k_row<A>(choice, experts, static_cast<int>(k), c);
    }
  }

  // worth[g][row] = the sum of the group's best, from the largest down; experts that cannot be
  // chosen count as absent. For more than two, groups are rows of E / groups columns to the
  // selection kernel.
  template <class A>
  void weigh_groups(const float* rows, int n, index_t experts, const buffers& m) const {
    const index_t size = experts / groups;
    if (group_score == moeroute::group_score::sum)
      return detail::sum_groups<A>(rows, n, groups, size, m.worth);
    const int best = static_cast<int>(counted(size));
    if (best <= 2) {
      using F = simd::vfloat<A>;
      simd::best_two_of_groups<A>(rows, experts, n, groups, size, m.worth, m.value);
      for (index_t i = 0; best == 2 && i < groups * block_rows; i += simd::width<A>) {
        const F one = simd::load<A>(m.worth + i), two = simd::load<A>(m.value + i);
        simd::select<A>(two > F(simd::minus_infinity), one + two, one).store_unaligned(m.worth + i);
      }
      return;
    }
    const index_t all = n * groups;
    for (index_t first = 0; first < all; first += block_rows) {
      const int here = static_cast<int>(std::min<index_t>(block_rows, all - first));
      simd::top_k_block<A>(rows + first * size, size, here, size, best, m.value, m.column, m.key);
      for (int i = 0; i < here; ++i) {
        float sum = m.value[i];
        for (int r = 1; r < best && m.column[r * block_rows + i] != no_expert; ++r)
          sum += m.value[r * block_rows + i];
        m.worth[(first + i) % groups * block_rows + (first + i) / groups] = sum;
      }
    }
    for (index_t g = 0; g < groups; ++g)
      for (int i = n; i < block_rows; ++i) m.worth[g * block_rows + i] = 0.0f;
  }

  // Experts outside a row's best groups get group_fill; -inf stays -inf.
  template <class A>
  void mask_groups(float* rows, int n, index_t experts, const float* worth) const {
    using F = simd::vfloat<A>;
    const index_t size = experts / groups;
    const F fill(group_fill), never(simd::minus_infinity);
    for (index_t g = 0; g < groups; ++g) {
      std::uint64_t out = 0;
      for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
        const F mine = simd::load<A>(worth + g * block_rows + lane);
        F before(0.0f);
        for (index_t h = 0; h < groups; ++h) {
          const F other = simd::load<A>(worth + h * block_rows + lane);
          const auto ahead = h < g ? other >= mine : other > mine;
          before += simd::select<A>(ahead, F(1.0f), F(0.0f));
        }
        out |= static_cast<std::uint64_t>((before >= F(static_cast<float>(topk_group))).mask())
               << lane;
      }
      // Every group of every row is written: which ones are out, no processor can predict.
      for (int i = 0; i < n; ++i) {
        float* const group = rows + i * experts + g * size;
        const simd::vmask<A> is_out((out >> i & 1) != 0);
        simd::map_row<A>(group, size, group,
                         [&](F x) { return simd::select<A>(is_out & (x > never), fill, x); });
      }
    }
  }
};
static_assert(row_selection<top_k>);

/// top_k of n experts out of all, where the program knows n: only the kernels of this n are
/// compiled, which is half of a router's code.
template <index_t n>
struct top_k_of {
  static_assert(n >= 1 && n <= max_experts, "[moeroute::top_k_of] n is 1 to 2^20");

  struct buffers {
    std::uint64_t* key;
  };

  static constexpr index_t choices() { return n; }
  static constexpr bool masks_experts() { return false; }

  /// Throws: error where n is greater than E.
  static void check(index_t experts) { check_range("top_k_of", "k", n, 1, experts); }

  static buffers carve(scratch& tape, index_t experts) {
    return {tape.take<std::uint64_t>(simd::top_k_scratch(experts, n))};
  }

  template <class A = simd::default_arch>
  static void select(const logit_block& choice, float*, choice_block& c, const buffers& m) {
    simd::top_k_block<A, static_cast<int>(n), static_cast<int>(n)>(
        choice.logits, choice.stride, choice.rows, choice.experts, c.k, c.value, c.id, m.key);
  }
  template <class A = simd::default_arch>
  static void select(const narrow_block<bfloat16>& z, choice_block& c, const buffers& m) {
    simd::top_k_block<A, static_cast<int>(n), static_cast<int>(n)>(
        z.logits, z.stride, z.rows, z.experts, c.k, c.value, c.id, z.wide, m.key);
  }

  static constexpr bool takes_rows() { return n <= simd::max_row_k; }
  template <class A = simd::default_arch>
  static void select_row(const float* choice, index_t experts, simd::row_ranks& c) {
    simd::top_k_row<A, std::min(static_cast<int>(n), simd::max_row_k)>(choice, experts,
                                                                       static_cast<int>(n), c);
  }
};
static_assert(row_selection<top_k_of<8>>);

}  // namespace moeroute
