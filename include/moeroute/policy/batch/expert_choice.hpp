// Expert choice: every expert takes its best tokens, so the load is even by construction.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>

#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/policy/batch/column_choice.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/batch_kinds.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/simd/probability/softmax_rows.hpp>
#include <moeroute/simd/select/column_top_k.hpp>

namespace moeroute {

namespace detail {

// One row of any score: -inf where the logit is NaN or -inf, and past the last expert.
template <class A, class Score>
void score_choice_row(const Score& score, const float* z, index_t experts, float* choice) {
  score.template score_row<A>(z, experts, choice);
  for (index_t e = 0; e < experts; ++e)
    if (!(z[e] > simd::minus_infinity)) choice[e] = simd::minus_infinity;
}

// 16 rows of choice scores on their way into a panel.
struct choice_rows {
  float* rows;  ///< [16, stride]
  float* factor;
  index_t stride;

  static choice_rows carve(scratch& tape, index_t experts) {
    const index_t stride = round_up(experts, simd::tile_size);
    return {tape.take<float>(simd::tile_size * stride), tape.take<float>(simd::tile_size), stride};
  }
  static choice_rows* carve(scratch& tape, index_t experts, int workers) {
    auto* const list = tape.take<choice_rows>(workers);
    for (int w = 0; w < workers; ++w) {
      const choice_rows memory = carve(tape, experts);
      if (list != nullptr) std::construct_at(list + w, memory);
    }
    return list;
  }
};

// Fills the panels of all scopes with choice scores; panels is [scopes][panel].
template <class A, class Score, executor Exec>
void fill_panels(const Score& score, matrix_view<const float> z, const side_inputs& side,
                 const column_scopes& s, const choice_rows* memories, int workers, float* panels,
                 const Exec& exec) {
  worker_slots slots(workers);
  const index_t grain = std::max<index_t>(1, (index_t{1} << 11) / s.experts);
  exec.parallel_for(s.scopes * s.tiles(), grain, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    const choice_rows& m = memories[worker];
    const simd::panel_shape shape{s.tiles()};
    for (index_t piece = begin; piece < end; ++piece) {
      const index_t scope = piece / s.tiles(), tile = piece % s.tiles();
      const float* row[simd::tile_size];
      for (index_t lane = 0; lane < simd::tile_size; ++lane) {
        const index_t local = tile * simd::tile_size + lane, token = scope * s.length + local;
        row[lane] = local < s.length && !side.masked(token) ? z.row(token) : nullptr;
      }
      if constexpr (std::is_same_v<Score, softmax>) {
        // The last tile's hint would lie past the batch: it has none.
        const bool more = piece + 1 < s.scopes * s.tiles();
        simd::exp_rows<A>(row, s.experts, m.rows, m.stride, m.factor,
                          more ? simd::tile_size * z.stride : 0);
      } else {
        std::fill_n(m.rows, simd::tile_size * m.stride, simd::minus_infinity);
        std::fill_n(m.factor, simd::tile_size, 1.0f);
        for (index_t lane = 0; lane < simd::tile_size; ++lane)
          if (row[lane] != nullptr)
            score_choice_row<A>(score, row[lane], s.experts, m.rows + lane * m.stride);
      }
      simd::pack_tiles<A>(m.rows, m.stride, m.factor, s.experts, panels + scope * s.panel(), shape,
                          tile);
    }
  });
}

// A weight that no rule can make infinite.
inline float finite_weight(double w) {
  constexpr double most = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(w, -most, most));
}

// weight = score / (sum over the token's experts + eps) * scale, in double so that nothing
// overflows.
inline void share_weights(float eps, float scale, assignment& out) {
  const assignment::parts p = out.to_fill();
  for (index_t t = 0; t < out.tokens(); ++t) {
    double sum = 0.0;
    for (std::int32_t i = p.offsets[t]; i < p.offsets[t + 1]; ++i)
      sum += static_cast<double>(p.weights[i]);
    sum += static_cast<double>(eps);
    for (std::int32_t i = p.offsets[t]; i < p.offsets[t + 1]; ++i)
      p.weights[i] = finite_weight(
          sum > 0.0 ? static_cast<double>(p.weights[i]) / sum * static_cast<double>(scale) : 0.0);
  }
}

}  // namespace detail

/// Expert choice: each expert takes the C tokens with the highest scores, the lowest token among
/// equals.
///
/// Shapes: logits [T, E]; the result is ragged, a token's experts in ascending id, possibly none.
/// Ensures: every expert has exactly C tokens, fewer only where fewer tokens have a logit above
/// -inf or a cap gives tokens back. A masked token is never taken. The choice score of softmax is
/// exp(z - max) times the rounded reciprocal of its sum, and so is the weight. Throws: error where
/// T is no multiple of sequence_length, or an option is out of its range. Cost: about one
/// exponential and one column sweep per logit; a [T, E] panel of scratch; no allocation once warm.
/// Determinism: the same ids and weights on every ISA, executor and thread count.
/// Source: Zhou et al. 2022; renormalisation and scale: Nucleus-Image 2026.
/// Example:
///
///     const expert_choice<> r{.capacity = floor_capacity(2.0)};    // in the mean two a token
///     route(r, logits, ws, choices);
template <score_function Score = softmax>
struct expert_choice {
  Score score{};
  tokens_per_expert capacity{};
  token_renormalization normalize = token_renormalization::none;
  float eps = 0.0f;             ///< added to the sum
  float scale = 1.0f;           ///< of the weights
  index_t sequence_length = 0;  ///< tokens that compete with one another; 0: the whole batch
  /// Most experts per token, 0: no cap (also side_inputs::k_of_token). A token keeps its best ones;
  /// the places that it gives back stay empty.
  index_t most_experts = 0;

  static side_use reads_side(index_t columns) { return {.own_k = columns}; }

  void check(index_t tokens, index_t experts) const {
    capacity.check();
    check_range("expert_choice", "experts", experts, 1, max_experts);
    check_range("expert_choice", "sequence_length", sequence_length, 0, index_t{1} << 31);
    check_range("expert_choice", "most_experts", most_experts, 0, experts);
    if (sequence_length > 0 && tokens % sequence_length != 0)
      fail("expert_choice",
           "tokens is " + std::to_string(tokens) +
               ", expected a multiple of sequence_length = " + std::to_string(sequence_length));
    if (!(eps >= 0.0f) || !std::isfinite(eps)) fail_value("expert_choice", "eps", eps, ">= 0");
    if (!std::isfinite(scale)) fail_value("expert_choice", "scale", scale, "a finite number");
  }

  /// Tokens that each expert takes from one sequence (or the batch).
  index_t capacity_of(index_t tokens, index_t experts) const {
    return capacity(sequence_length > 0 ? sequence_length : tokens, experts);
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    const index_t tokens = z.rows, experts = z.cols;
    const index_t most = most_experts > 0 ? most_experts : experts;
    if (tokens == 0) return detail::no_rows(experts, most, out);
    const index_t length = sequence_length > 0 ? sequence_length : tokens;
    const detail::column_scopes s{tokens, experts, tokens / length, length,
                                  capacity(length, experts)};
    const int workers = worker_slots::count(exec.concurrency());
    struct memory {
      float* panels;
      detail::choice_rows* rows;
      simd::column_top_k_buffers* columns;
      simd::column_picks picks;
      std::int32_t* cursor;
    };
    const memory m = ws.carve([&](scratch& tape) {
      return memory{tape.take<float>(s.scopes * s.panel()),
                    detail::choice_rows::carve(tape, experts, workers),
                    detail::carve_column_buffers(tape, length, workers),
                    detail::carve_picks(tape, s), tape.take<std::int32_t>(tokens + experts)};
    });
    detail::fill_panels<A>(score, z, side, s, m.rows, workers, m.panels, exec);
    detail::pick_columns<A>(
        s,
        [&](index_t scope, index_t strip) {
          return detail::stored_strip{m.panels + scope * s.panel() +
                                      strip * s.tiles() * simd::tile_size * simd::tile_size};
        },
        m.columns, workers, m.picks, exec);
    detail::rows_from_picks(s, m.picks, m.cursor, most, out,
                            [](index_t, index_t, std::int32_t key) {
                              const float value = simd::value_of_key(key);
                              // A score of +inf is a weight like any other, only finite.
                              return std::min(value, std::numeric_limits<float>::max());
                            });
    if (most < experts || !side.k_of_token.empty()) detail::release_above_cap<A>(side, most, out);
    if (normalize == token_renormalization::sum) {
      detail::share_weights(eps, scale, out);
    } else if (scale != 1.0f) {
      for (float& w : out.weights())
        w = detail::finite_weight(static_cast<double>(w) * static_cast<double>(scale));
    }
  }
};

static_assert(batch_router<expert_choice<>>);

}  // namespace moeroute
