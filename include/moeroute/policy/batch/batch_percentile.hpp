// A count from the row whose percentile is taken among all tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <moeroute/policy/batch/column_choice.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/row/counted.hpp>

namespace moeroute {

/// Each token's experts whose score reaches the percentile `quantile` of all tokens' scores, at
/// least min_k and at most max_k of them: an undecided batch spreads, a decided token is cheap.
///
/// Shapes: logits [T, E]; the result is ragged, best first. Masked tokens and experts at -inf are
/// not among those whose percentile is taken. Cost: a [T, E] matrix of scratch, a partial sort of
/// it and a top-k per row, on one thread. Determinism: the same bits on every ISA and executor.
/// Source: DynaMoE (Guelmez 2026), the percentile of the batch.
template <score_function Score = softmax>
struct batch_percentile {
  float quantile = 0.75f;
  index_t min_k = 1;
  index_t max_k = 0;  ///< 0: no cap
  Score score{};
  weight_rule weight{};

  side_use reads_side(index_t columns) const { return {.own_k = rule().max_choices(columns)}; }

  void check(index_t, index_t experts) const {
    check_range("batch_percentile", "experts", experts, 1, max_experts);
    rule().check(experts);
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec&) const {
    const counted<Score> choose = rule();
    const index_t tokens = z.rows, experts = z.cols, most = choose.max_choices(experts);
    if (tokens == 0) return detail::no_rows(experts, most, out);
    struct memory {
      typename counted<Score>::buffers rows;
      float* logits;
      float* scores;
      float* sorted;
    };
    const memory m = ws.carve([&](scratch& tape) {
      return memory{choose.carve(tape, experts), tape.take<float>(tokens * experts),
                    tape.take<float>(tokens * experts), tape.take<float>(tokens * experts)};
    });
    // Rows side by side, and nothing of those that are masked.
    index_t live = 0;
    for (index_t t = 0; t < tokens; ++t) {
      if (side.masked(t)) continue;
      float* const row = m.logits + live * experts;
      std::copy_n(z.row(t), experts, row);
      // Scores of a row that has nothing to give are never counted.
      if (simd::row_max<A>(row, experts) > simd::minus_infinity)
        score.template score_row<A>(row, experts, m.scores + live * experts);
      ++live;
    }
    const bool any = std::any_of(m.logits, m.logits + live * experts,
                                 [](float x) { return x > simd::minus_infinity; });
    const double least =
        any ? detail::percentile_of(m.logits, m.scores, live * experts, quantile, m.sorted) : 0.0;
    out.reset_ragged(tokens, experts, most);
    const assignment::parts p = out.to_fill();
    p.offsets[0] = 0;
    std::int32_t at = 0;
    for (index_t t = 0; t < tokens; ++t) {
      std::int32_t count = 0;
      if (!side.masked(t)) {
        const logit_block one{z.row(t), z.stride, 1, experts, t, &side};
        choose.template route_counted<A>(
            one, m.rows, p.ids + at, p.weights + at, &count, [&](const float* row, index_t n) {
              if (!(simd::row_max<A>(row, n) > simd::minus_infinity)) return index_t{0};
              score.template score_row<A>(row, n, m.rows.scores);
              return counted<Score>::template reaching<A>(row, n, m.rows.scores, least);
            });
      }
      at += count;
      p.offsets[t + 1] = at;
    }
    out.close();
  }

 private:
  counted<Score> rule() const {
    return {.count = {.rule = count_rule::percentile,
                      .quantile = quantile,
                      .min_k = min_k,
                      .max_k = max_k},
            .score = score,
            .weight = weight};
  }
};
static_assert(batch_router<batch_percentile<>>);

}  // namespace moeroute
