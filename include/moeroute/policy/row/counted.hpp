// Rules that count from the row: how many experts a token is worth, between a floor and a cap.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include <moeroute/matrix/check.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute {

/// How many of a row's best experts are taken, by its scores; at least min_k, at most max_k.
///
/// percentile: those that reach the percentile `quantile` of the row's scores, between two of them
/// by a straight line (numpy's). ratio: those with score >= ratio * the best one's. entropy: of the
/// row's softmax in nats: min_k below `low`, mid_k up to `high`, max_k above. Experts at -inf are
/// not counted. Source: DynaMoE (Guelmez 2026; the equation of the paper is not known, a percentile
/// of the row's own scores keeps the count nearly constant); dynamic skipping (Lu et al. 2024);
/// AdaptiveK of TensorRT-LLM.
struct row_count {
  count_rule rule = count_rule::ratio;
  float quantile = 0.5f;
  float ratio = 0.5f;
  float low = 0.5f;
  float high = 1.5f;
  index_t mid_k = 2;
  index_t min_k = 1;
  index_t max_k = 0;  ///< 0: no cap (not for entropy, whose third count it is)

  index_t most(index_t experts) const { return max_k > 0 ? std::min(max_k, experts) : experts; }

  /// Throws: error where a number is outside its domain.
  MOEROUTE_OUT_OF_LINE void check(index_t experts) const {
    detail::check_counts("counted", experts, min_k, max_k);
    if (rule == count_rule::percentile && !(quantile >= 0.0f && quantile <= 1.0f))
      fail_value("counted", "quantile", quantile, "0 to 1");
    if (rule == count_rule::ratio && !(ratio >= 0.0f && ratio <= 1.0f))
      fail_value("counted", "ratio", ratio, "0 to 1");
    if (rule == count_rule::entropy) detail::check_entropy_counts(low, high, min_k, mid_k, max_k);
    if (rule == count_rule::tsallis)
      fail("counted", "rule is tsallis, expected percentile, ratio or entropy: that is dense_if");
  }
};

namespace detail {

// The entropy in nats of the softmax of a row with at least one logit above -inf.
template <class A>
float softmax_entropy(const float* z, index_t n, float max) {
  using F = simd::vfloat<A>;
  const F top(max), never(simd::minus_infinity), zero(0.0f);
  simd::partials<A> sum(0.0f), below(0.0f);
  simd::detail::for_each_register<A>(z, n, simd::minus_infinity, [&](int r, F x) {
    const F e = simd::exp_below_max<A>(x, top);
    // Several +inf share; what is -inf adds nothing, whatever it is multiplied by.
    const F d = simd::select<A>((e > zero) & (x < top), x - top, zero);
    sum.part[r] += e;
    below.part[r] = simd::fma<A>(e, simd::select<A>(d > never, d, zero), below.part[r]);
  });
  const float total = simd::sum_of<A>(sum);
  return simd::log<A>(F(total)).get(0) - simd::sum_of<A>(below) / total;
}

// Scores that are ranked by counting who is below each: no branch looks at one.
inline constexpr index_t ranked_by_counting = 16;

// The percentile of the scores of experts above -inf, by a straight line between two of them.
MOEROUTE_OUT_OF_LINE inline double percentile_of(const float* row, const float* scores, index_t n,
                                                 float quantile, float* sorted) {
  index_t there = 0;
  for (index_t e = 0; e < n; ++e) {
    sorted[there] = scores[e];
    there += index_t{row[e] > simd::minus_infinity};
  }
  const double place = static_cast<double>(there - 1) * static_cast<double>(quantile);
  const auto low = static_cast<index_t>(place);
  if (there <= ranked_by_counting) {
    float in_order[ranked_by_counting] = {};
    for (index_t e = 0; e < there; ++e) {
      index_t below = 0;
      for (index_t i = 0; i < there; ++i)
        below += index_t{sorted[i] < sorted[e]} + index_t{(sorted[i] == sorted[e]) & (i < e)};
      in_order[below] = sorted[e];
    }
    std::copy_n(in_order, there, sorted);
  } else {
    std::nth_element(sorted, sorted + low, sorted + there);
  }
  const double below = static_cast<double>(sorted[low]);
  if (low + 1 == there) return below;
  const double above = static_cast<double>(*std::min_element(sorted + low + 1, sorted + there));
  const double part = place - static_cast<double>(low);
  return part == 0.0 || above == below ? below : std::fma(part, above - below, below);
}

// Tsallis' entropy of the softmax of a row, divided by its largest value: 0 to 1. One expert: 0.
template <class A>
float tsallis_entropy(const float* z, index_t n, float max, float q) {
  using F = simd::vfloat<A>;
  const auto experts = static_cast<float>(n);
  if (n < 2) return 0.0f;
  if (q == 1.0f) return softmax_entropy<A>(z, n, max) / simd::log<A>(F(experts)).get(0);
  const F top(max), power(q);
  simd::partials<A> sum(0.0f), powers(0.0f);
  simd::detail::for_each_register<A>(z, n, simd::minus_infinity, [&](int r, F x) {
    const F e = simd::exp_below_max<A>(x, top);
    sum.part[r] += e;
    const F d = simd::select<A>((e > F(0.0f)) & (x < top), x - top, F(0.0f));
    powers.part[r] += simd::select<A>(e > F(0.0f), simd::exp_nonpositive<A>(d * power), F(0.0f));
  });
  const F log_sum = simd::log<A>(F(simd::sum_of<A>(sum)));
  const float share = (F(simd::sum_of<A>(powers)) * simd::exp<A>(F(-q) * log_sum)).get(0);
  const float even = simd::exp<A>(F(1.0f - q) * simd::log<A>(F(experts))).get(0);
  return (1.0f - share) / (1.0f - even);
}

}  // namespace detail

/// The best experts of each row, as many as `count` says.
///
/// A ragged router: choices come best first, chosen on logits; side_inputs::k_of_token cuts them,
/// below min_k too. Weights are of the chosen: softmax_selected is the softmax over them. Cost: the
/// scores of the row, one pass over them, and a top-k of the largest count of 16 rows; percentile
/// adds a partial sort. Determinism: the same bits on every ISA. Experts are counted by score and
/// taken by logit: the score must keep their order.
template <score_function Score = softmax>
struct counted {
  row_count count{};
  Score score{};
  weight_rule weight{};
  logit_transform transform{};

  struct buffers {
    std::uint64_t* key;
    float* logits;
    float* scores;  ///< [E] of one row
    float* sorted;  ///< [E] for percentiles
    expert_id* id;  ///< [most][16]
    float* value;
  };

  index_t max_choices(index_t columns) const { return count.most(columns); }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t columns) const {
    return {.own_k = max_choices(columns), .noise_logits = transform.noise.active()};
  }

  /// Throws: error where a part does not fit E experts.
  void check(index_t experts) const {
    count.check(experts);
    transform.check(experts);
    weight.check(experts);
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t most = max_choices(columns);
    return {tape.take<std::uint64_t>(simd::top_k_scratch(columns, most)),
            tape.take<float>(transform.active() ? block_rows * columns : 0),
            tape.take<float>(columns + block_rows),
            tape.take<float>(count.rule == count_rule::percentile ? columns : 0),
            tape.take<expert_id>(block_rows * most),
            tape.take<float>(block_rows * most)};
  }

  template <class A = simd::default_arch>
  index_t route_block(const logit_block& z, const buffers& m, expert_id* id, float* weights,
                      std::int32_t* counts) const {
    return this->template route_counted<A>(
        z, m, id, weights, counts,
        [&](const float* row, index_t n) { return this->template count_of<A>(row, n, m); });
  }

  /// The same with counts by f(row, E), which are then clamped; for rules of one's own.
  template <class A = simd::default_arch, class F>
  index_t route_counted(logit_block z, const buffers& m, expert_id* id, float* weights,
                        std::int32_t* counts, F&& f) const {
    if (transform.active()) z = transform.template apply<A>(z, m.logits);
    const index_t most = max_choices(z.experts);
    std::int32_t largest = 0;
    for (int i = 0; i < z.rows; ++i) {
      index_t n = std::clamp(f(z.row(i), z.experts), std::min(count.min_k, most), most);
      if (!z.side->k_of_token.empty())
        n = std::min<index_t>(n, z.side->k_of_token[static_cast<std::size_t>(z.first_token + i)]);
      counts[i] = static_cast<std::int32_t>(n);
      largest = std::max(largest, counts[i]);
    }
    if (largest == 0) return 0;
    choice_block c{largest, m.id, m.value};
    clear_lanes(c, z.rows);
    simd::top_k_block<A>(z.logits, z.stride, z.rows, z.experts, c.k, c.value, c.id, m.key);
    for (int i = 0; i < z.rows; ++i) {
      std::int32_t there = 0;
      while (there < counts[i] && c.id[there * block_rows + i] != no_expert) ++there;
      counts[i] = there;
      // At least the best one stays for the scores to know the row's largest logit.
      for (int r = there; r < c.k; ++r) c.id[r * block_rows + i] = no_expert;
    }
    c.has_row_max = z.side->k_of_token.empty();
    score.template score_choices<A>(z, c, weight.needs());
    weight.template apply<A>(c);
    index_t at = 0;
    for (int i = 0; i < z.rows; ++i)
      for (int r = 0; r < counts[i]; ++r, ++at) {
        id[at] = c.id[r * block_rows + i];
        weights[at] = c.value[r * block_rows + i];
      }
    return at;
  }

  /// How many experts a row is worth before it is clamped.
  template <class A = simd::default_arch>
  index_t count_of(const float* row, index_t n, const buffers& m) const {
    const float max = simd::row_max<A>(row, n);
    if (!(max > simd::minus_infinity)) return 0;
    if (count.rule == count_rule::entropy) {
      const float h = detail::softmax_entropy<A>(row, n, max);
      return h < count.low ? count.min_k : h > count.high ? count.max_k : count.mid_k;
    }
    score.template score_row<A>(row, n, m.scores);
    if (count.rule == count_rule::percentile)
      return this->template reaching<A>(
          row, n, m.scores, detail::percentile_of(row, m.scores, n, count.quantile, m.sorted));
    const float best = simd::row_max<A>(m.scores, n);
    const float least = best < simd::plus_infinity ? best * count.ratio : best;
    return this->template reaching<A>(row, n, m.scores, static_cast<double>(least));
  }

  /// Experts above -inf whose score is at least that much.
  template <class A = simd::default_arch>
  static index_t reaching(const float* row, index_t n, const float* scores, double least) {
    using F = simd::vfloat<A>;
    // The smallest float that is at least `least`.
    float bound = static_cast<float>(least);
    if (static_cast<double>(bound) < least) bound = std::nextafter(bound, simd::plus_infinity);
    const F limit(bound), never(simd::minus_infinity);
    simd::vint<A> found(0);
    for (index_t e = 0; e < n; e += simd::width<A>) {
      const index_t here = std::min<index_t>(simd::width<A>, n - e);
      const F x = simd::load_first<A>(row + e, here, simd::minus_infinity);
      const F s = simd::load_first<A>(scores + e, here, 0.0f);
      found = simd::count_where<A>(found, (x > never) & (s >= limit));
    }
    alignas(alignment) std::int32_t lane[simd::width<A>];
    found.store_aligned(lane);
    index_t sum = 0;
    for (const std::int32_t c : lane) sum += c;
    return sum;
  }
};
static_assert(ragged_router<counted<>>);

/// A mass of experts as top_p takes it, or every expert where a token is undecided: where the
/// normalised Tsallis entropy of its softmax is above `threshold`.
///
/// A ragged router: choices come best first; rule.min_k and max_k bound both; the weight rule is
/// rule.weight. Cost: as top_p, an entropy per row, and a sort of the rows that are dense.
/// Determinism: the same bits on every ISA. Source: DynMoLE (Li et al. 2025); two published
/// readings of its mass have names of their own, dynmole_included and dynmole_excluded.
struct dense_if {
  top_p rule{};
  float q = 1.1f;          ///< 1: Shannon's entropy
  float threshold = 0.9f;  ///< 0 to 1

  struct buffers {
    top_p::buffers sparse, dense;
    expert_id* id;  ///< [16][most], of the sparse rows
    float* weight;
  };

  index_t max_choices(index_t columns) const { return rule.max_choices(columns); }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t columns) const { return rule.reads_side(columns); }

  /// Throws: error where q is not positive, threshold outside [0, 1], or the rule does not fit.
  void check(index_t experts) const {
    rule.check(experts);
    detail::check_dense_if(q, threshold);
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t most = max_choices(columns);
    return {rule.carve(tape, columns), every(columns).carve(tape, columns),
            tape.take<expert_id>(block_rows * most), tape.take<float>(block_rows * most)};
  }

  template <class A = simd::default_arch>
  index_t route_block(logit_block z, const buffers& m, expert_id* id, float* weights,
                      std::int32_t* count) const {
    top_p sparse = rule, dense = every(z.experts);
    if (rule.transform.active()) {
      z = rule.transform.template apply<A>(z, m.sparse.logits);
      sparse.transform = dense.transform = {};
    }
    bool is_dense[block_rows];
    int undecided = 0;
    for (int i = 0; i < z.rows; ++i) {
      const float max = simd::row_max<A>(z.row(i), z.experts);
      is_dense[i] = max > simd::minus_infinity &&
                    detail::tsallis_entropy<A>(z.row(i), z.experts, max, q) > threshold;
      undecided += is_dense[i];
    }
    if (undecided == 0) return sparse.route_block<A>(z, m.sparse, id, weights, count);
    if (undecided == z.rows) return dense.route_block<A>(z, m.dense, id, weights, count);
    std::int32_t few[block_rows];
    sparse.route_block<A>(z, m.sparse, m.id, m.weight, few);
    // Dense rows one by one, each behind what is there already.
    index_t at = 0, from = 0;
    for (int i = 0; i < z.rows; ++i) {
      if (is_dense[i]) {
        logit_block one = z;
        one.logits = z.row(i);
        one.rows = 1;
        one.first_token = z.first_token + i;
        dense.route_block<A>(one, m.dense, id + at, weights + at, count + i);
      } else {
        std::copy_n(m.id + from, few[i], id + at);
        std::copy_n(m.weight + from, few[i], weights + at);
        count[i] = few[i];
      }
      from += few[i];
      at += count[i];
    }
    return at;
  }

 private:
  top_p every(index_t experts) const {
    top_p all = rule;
    all.p = 1.0f;
    all.min_k = experts;
    all.max_k = rule.max_k > 0 ? std::max(rule.max_k, index_t{1}) : 0;
    return all;
  }
};
static_assert(ragged_router<dense_if>);

/// DynMoLE, the expert that crosses the mass included and the weights divided by their sum.
inline constexpr dense_if dynmole_included{
    .rule = {.p = 0.75f, .min_k = 2, .weight = {.normalize = normalization::sum}}};
/// DynMoLE as its published code has it: the crossing expert left out, weights as they are.
inline constexpr dense_if dynmole_excluded{
    .rule = {.p = 0.75f, .crossing = crossing::exclude, .min_k = 2}};

/// How important each token is to the others: the attention that it receives, averaged over heads
/// and divided by the queries that can see it.
///
/// Shapes: attention [heads * tokens, tokens], head after head, row = query; importance [tokens].
/// `causal`: token j is seen by the queries from j on. Throws: error where the shapes do not fit.
/// Cost: one read of the attention, in token order. Source: DA-MoE (Aghdam et al. 2024), of whose
/// formula only the idea is published: the column sum, here per query that can see the token.
inline void attention_importance(matrix_view<const float> attention, bool causal,
                                 std::span<float> importance) {
  const index_t tokens = attention.cols;
  check_size("attention_importance", "importance.size()", static_cast<index_t>(importance.size()),
             tokens);
  check_stride("attention_importance", "attention", attention);
  if (tokens == 0) return;
  check_size("attention_importance", "attention.rows % tokens", attention.rows % tokens, 0);
  check_range("attention_importance", "heads", attention.rows / tokens, 1, index_t{1} << 20);
  std::fill(importance.begin(), importance.end(), 0.0f);
  for (index_t i = 0; i < attention.rows; ++i)
    for (index_t j = 0; j < tokens; ++j) importance[static_cast<std::size_t>(j)] += attention(i, j);
  const auto heads = static_cast<float>(attention.rows / tokens);
  for (index_t j = 0; j < tokens; ++j)
    importance[static_cast<std::size_t>(j)] /=
        heads * static_cast<float>(causal ? tokens - j : tokens);
}

/// Each token's own k by importance: k = least + (most - least) * (importance - smallest) /
/// (largest
/// - smallest), to the nearest, halves up; all `least` where all are equally important. For
/// side_inputs::k_of_token.
///
/// Shapes: importance and k [tokens]. Throws: error where sizes differ, least > most, or a value is
/// not finite. Source: DA-MoE (Aghdam et al. 2024), the clamp by rank or range: range here.
inline void k_of_importance(std::span<const float> importance, index_t least, index_t most,
                            std::span<std::int32_t> k) {
  check_size("k_of_importance", "k.size()", static_cast<index_t>(k.size()),
             static_cast<index_t>(importance.size()));
  check_range("k_of_importance", "least", least, 0, most);
  check_range("k_of_importance", "most", most, least, max_experts);
  if (importance.empty()) return;
  for (std::size_t t = 0; t < importance.size(); ++t)
    if (!std::isfinite(importance[t]))
      fail("k_of_importance", "importance of token " + std::to_string(t) + " is " +
                                  std::to_string(importance[t]) + ", expected a finite number");
  const auto [low, high] = std::minmax_element(importance.begin(), importance.end());
  const double smallest = static_cast<double>(*low), range = static_cast<double>(*high) - smallest;
  for (std::size_t t = 0; t < k.size(); ++t) {
    const double share =
        range > 0.0 ? (static_cast<double>(importance[t]) - smallest) / range : 0.0;
    const double more = std::floor(std::fma(share, static_cast<double>(most - least), 0.5));
    k[t] = static_cast<std::int32_t>(least) + static_cast<std::int32_t>(more);
  }
}

}  // namespace moeroute
