// Selection by rank: the k best experts, of all or of the best groups.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/simd/top_k.hpp>

namespace moeroute {

/// A selection rule fills ids and values of a block from its choice scores, where NaN and -inf mean "not this
/// one". `choice` rows are writable when needs_scratch_rows() says so.
template <class S>
concept selection_rule =
    requires(const S& s, const logit_block& choice, choice_block& c, float* rows, std::uint64_t* key) {
      { s.choices() } -> std::convertible_to<index_t>;
      { s.check(index_t{}) };
      { s.masks_experts() } -> std::convertible_to<bool>;  // rewrites the choice scores in `rows`
      { s.scratch_words(index_t{}) } -> std::convertible_to<index_t>;
      { s.select(choice, rows, c, key) };
    };

/// What a group of experts is worth.
enum class group_score {
  max,       ///< its best choice score (DeepSeek-V2)
  top2_sum,  ///< the sum of its two best (DeepSeek-V3); of its one where it has only one
  top_sum,   ///< the sum of its k / topk_group best (Megatron-LM)
};

/// The k experts with the largest choice scores, the lowest id first among equals; with groups > 1 only
/// experts of the topk_group best groups stay, equal groups in ascending order.
///
/// NaN and -inf are never selected. Cost: O(E) per row. Source: Shazeer et al. 2017; groups: DeepSeek-V2 2024.
struct top_k {
  index_t k = 2;
  index_t groups = 1;      ///< of E / groups experts each
  index_t topk_group = 1;  ///< groups that stay
  moeroute::group_score group_score = moeroute::group_score::top2_sum;
  float group_fill = simd::minus_infinity;  ///< choice score of experts in other groups: -inf or 0

  index_t choices() const { return k; }
  bool masks_experts() const { return groups > 1; }

  /// Throws: error where k is outside [1, E], groups do not divide E, or topk_group groups hold fewer than k.
  void check(index_t experts) const {
    check_range("top_k", "k", k, 1, experts);
    if (groups == 1) return;
    check_range("top_k", "groups", groups, 1, experts);
    if (experts % groups != 0)
      fail("top_k", "groups is " + std::to_string(groups) + ", expected a divisor of E = " +
                        std::to_string(experts));
    check_range("top_k", "topk_group", topk_group, 1, groups);
    if (topk_group * (experts / groups) < k)
      fail("top_k", "topk_group is " + std::to_string(topk_group) + " groups of " +
                        std::to_string(experts / groups) + " experts, expected room for k = " +
                        std::to_string(k));
    if (group_fill != simd::minus_infinity && group_fill != 0.0f)
      fail("top_k", "group_fill is " + std::to_string(group_fill) + ", expected -inf or 0");
  }

  index_t scratch_words(index_t experts) const {
    return std::max(simd::top_k_scratch(experts, k), masks_experts() ? groups : index_t{0});
  }

  /// rows: the choice scores again, writable, where masks_experts().
  template <class A = simd::default_arch>
  void select(const logit_block& choice, float* rows, choice_block& c, std::uint64_t* key) const {
    if (masks_experts())
      for (int i = 0; i < choice.rows; ++i)
        mask_groups(rows + i * choice.stride, choice.experts, reinterpret_cast<float*>(key));
    simd::top_k_block<A>(choice.logits, choice.stride, choice.rows, choice.experts, c.k, c.value,
                         c.id, key);
  }

 private:
  // A row's experts outside its best groups get group_fill; -inf stays -inf.
  void mask_groups(float* row, index_t experts, float* worth) const {
    const index_t size = experts / groups;
    for (index_t g = 0; g < groups; ++g) worth[g] = worth_of(row + g * size, size);
    for (index_t g = 0; g < groups; ++g) {
      index_t before = 0;
      for (index_t h = 0; h < groups; ++h)
        before += worth[h] > worth[g] || (worth[h] == worth[g] && h < g);
      if (before < topk_group) continue;
      for (index_t e = g * size; e < (g + 1) * size; ++e)
        if (row[e] > simd::minus_infinity) row[e] = group_fill;
    }
  }

  // Sums run from the largest down; experts that cannot be chosen count as absent.
  float worth_of(const float* score, index_t size) const {
    if (group_score == moeroute::group_score::top_sum && k / topk_group > 2)
      return sum_of_best(score, size, k / topk_group);
    float best = simd::minus_infinity, second = simd::minus_infinity;
    for (index_t e = 0; e < size; ++e) {
      const float x = score[e] > simd::minus_infinity ? score[e] : simd::minus_infinity;
      second = std::max(second, std::min(best, x));
      best = std::max(best, x);
    }
    const bool one = group_score == moeroute::group_score::max ||
                     (group_score == moeroute::group_score::top_sum && k / topk_group < 2);
    return one || second == simd::minus_infinity ? best : best + second;
  }

  static float sum_of_best(const float* score, index_t size, index_t n) {
    float sum = simd::minus_infinity, last = simd::plus_infinity;
    index_t last_at = -1;
    for (index_t taken = 0; taken < n; ++taken) {
      index_t at = -1;
      for (index_t e = 0; e < size; ++e) {
        if (!(score[e] > simd::minus_infinity)) continue;
        const bool later = score[e] < last || (score[e] == last && e > last_at);
        if (later && (at < 0 || score[e] > score[at])) at = e;
      }
      if (at < 0) break;
      sum = taken == 0 ? score[at] : sum + score[at];
      last = score[at];
      last_at = at;
    }
    return sum;
  }
};
static_assert(selection_rule<top_k>);

}  // namespace moeroute
