// Choice on a balanced plan: Sinkhorn routing, its selective form, and expert choice.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/base/rng.hpp>
#include <moeroute/policy/batch/column_choice.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/row_choice.hpp>
#include <moeroute/policy/batch/sinkhorn_scaling.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/batch_kinds.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/policy/parts/phase.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/router.hpp>

namespace moeroute {

namespace detail {

// Weights of plan_weights for chosen logits in c.value; choice holds the block's choice scores.
template <class A>
void weigh_plan_choices(plan_weights weights, bool logarithm, const logit_block& z, choice_block& c,
                        const float* choice) {
  if (weights == plan_weights::by_k)
    weights = c.k == 1 ? plan_weights::sigmoid : plan_weights::softmax;
  if (weights == plan_weights::sigmoid) return sigmoid::score_choices<A>(z, c, score_scale::exact);
  if (weights == plan_weights::softmax) return softmax::score_choices<A>(z, c, score_scale::exact);
  for (int r = 0; r < c.k; ++r)
    for (int i = 0; i < z.rows; ++i) {
      const expert_id e = c.id[r * block_rows + i];
      c.value[r * block_rows + i] = e == no_expert ? 0.0f : choice[i * z.experts + e];
    }
  if (logarithm) return softmax_selected::score_choices<A>(z, c, score_scale::exact);
  sum_normalized.apply<A>(c);
}

}  // namespace detail

/// Sinkhorn routing: in training the k largest entries of each row of a transport plan, in
/// evaluation the k largest logits.
///
/// Shapes: logits [T, E]; the result is [T, k], best first. Choice score: the plan without its
/// token factor (the same order within a row), or its logarithm in the log domain; the logit in
/// evaluation. Ensures: shifting a row's logits changes no choice. In the exponential domain logits
/// that lie more than 69 temperatures below their row's largest count as equally hopeless: the
/// lowest expert goes first. Cost: as sinkhorn_plan, and a top-k per row; a [T, E] matrix of
/// scratch. No allocation once warm. Determinism: the same ids and weights on every ISA, executor
/// and thread count. Selection is a constant for gradients; they flow through the weights. Source:
/// Clark et al. 2022 (S-BASE) as in Megatron-LM; Puigcerver et al. 2024 (KL projection of V-MoE).
struct sinkhorn {
  index_t k = 1;
  routing_phase phase = routing_phase::training;
  plan_weights weights = plan_weights::by_k;
  sinkhorn_scaling scaling{};
  /// [E], the share of the load that each expert is to have, of any sum; empty: equal. The caller
  /// keeps it alive.
  lasting_span<const float> share{};

  side_use reads_side(index_t) const { return {.own_k = k}; }

  /// Throws: error where k is outside [1, E] or a field of scaling is out of range.
  void check(index_t, index_t experts) const {
    check_range("sinkhorn", "experts", experts, 1, max_experts);
    check_range("sinkhorn", "k", k, 1, experts);
    scaling.check("sinkhorn");
    detail::check_shares("sinkhorn", share, experts);
    if (phase == routing_phase::evaluation && weights == plan_weights::plan)
      fail("sinkhorn", "weights is plan and phase is evaluation, which has no plan");
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    if (z.rows == 0) return out.reset(0, z.cols, k);
    const bool plan = phase == routing_phase::training;
    const int workers = worker_slots::count(exec.concurrency());
    detail::sinkhorn_state state{};
    const detail::sinkhorn_engine<A> engine(scaling, state);
    const detail::filled_rows rows{
        k,
        [&]<class B>(const logit_block& block, float* choice) {
          for (int i = 0; i < block.rows; ++i) {
            float* const row = choice + i * block.experts;
            if (plan) {
              engine.choice_row(block.first_token + i, block.row(i), row);
            } else {
              std::copy_n(block.row(i), block.experts, row);
            }
          }
        },
        [&]<class B>(const logit_block& block, choice_block& c, const float* choice) {
          detail::weigh_plan_choices<B>(weights, scaling.domain == sinkhorn_domain::logarithm,
                                        block, c, choice);
        }};
    using memory = detail::row_memory<std::remove_const_t<decltype(rows)>>;
    const memory* memories = ws.carve([&](scratch& tape) {
      if (plan)
        state = detail::sinkhorn_state::carve(tape, z.rows, z.cols, workers, !share.empty());
      return memory::carve(tape, rows, z.cols, workers);
    });
    if (plan) detail::sinkhorn_engine<A>(scaling, state).run(z, side, exec, share);
    detail::route_rows<A>(rows, z, side, memories, workers, out, exec);
  }
};
static_assert(batch_router<sinkhorn>);

/// Selective Sinkhorn routing: a coin per training step decides between a balanced plan and a plain
/// softmax top-k. Weights are the k chosen entries divided by their sum, of the plan or of the
/// softmax.
///
/// Ensures: with probability 0, and in evaluation, the result has the bits of router<softmax> with
/// a top-k, sum_normalized weights and, in training, the noise. The coin is random_u01(side.seed,
/// stream, side.step): every rank and every replay throws the same one. Cost, Determinism: as
/// sinkhorn on a balanced step, else as the softmax router. Source: Nguyen et al. 2025.
struct selective_sinkhorn {
  index_t k = 2;
  float probability = 1e-3f;  ///< of a balanced step
  routing_phase phase = routing_phase::training;
  sinkhorn_scaling scaling = selective_scaling;
  /// On the logits of a training step that is not balanced; the weights see it too.
  logit_noise noise{};
  lasting_span<const float> share{};  ///< as sinkhorn's, on balanced steps
  std::uint64_t stream = 0x53535200;  ///< of the coin; give layers that should differ their own

  side_use reads_side(index_t) const { return {.own_k = k, .noise_logits = noise.active()}; }

  /// Throws: error where k is outside [1, E], probability outside [0, 1], or a field of scaling out
  /// of range.
  void check(index_t, index_t experts) const {
    check_range("selective_sinkhorn", "experts", experts, 1, max_experts);
    check_range("selective_sinkhorn", "k", k, 1, experts);
    if (!(probability >= 0.0f && probability <= 1.0f))
      fail_value("selective_sinkhorn", "probability", probability, "0 to 1");
    scaling.check("selective_sinkhorn");
    detail::check_shares("selective_sinkhorn", share, experts);
    noise.check();
  }

  /// Whether the step of `side` is balanced.
  bool balances(const side_inputs& side) const {
    return phase == routing_phase::training &&
           random_u01(side.seed, stream, side.step) < probability;
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    if (balances(side)) {
      const sinkhorn balanced{
          .k = k, .weights = plan_weights::plan, .scaling = scaling, .share = share};
      return balanced.route_batch<Exec, A>(z, side, ws, out, exec);
    }
    if (z.rows == 0) return out.reset(0, z.cols, k);
    router<softmax> plain{.selection = {.k = k}, .weight = sum_normalized};
    if (phase == routing_phase::training) plain.transform.noise = noise;
    const int workers = worker_slots::count(exec.concurrency());
    using memory = detail::row_memory<router<softmax>>;
    const memory* memories =
        ws.carve([&](scratch& tape) { return memory::carve(tape, plain, z.cols, workers); });
    detail::route_rows<A>(plain, z, side, memories, workers, out, exec);
  }
};
static_assert(batch_router<selective_sinkhorn>);

/// Expert choice on a balanced plan: each expert takes the C tokens that the plan gives it most of,
/// the lowest token among equals.
///
/// Shapes: logits [T, E]; the result is ragged, a token's experts in ascending id, possibly none.
/// Ensures: every expert has exactly C tokens, fewer only where fewer tokens have a logit above
/// -inf or a token's own k gives places back, those that the plan gives it least of. Throws: error
/// where weights is by_k or sigmoid, or an option is out of its range. Cost: as
/// sinkhorn, and one column sweep; a [T, E] matrix and a panel of scratch. No allocation once warm.
/// Determinism: the same ids and weights on every ISA, executor and thread count.
/// Source: Liu et al. 2024, "Routers in Vision Mixture of Experts"; weights are V-MoE's.
struct sinkhorn_expert_choice {
  tokens_per_expert capacity{};
  plan_weights weights = plan_weights::softmax;  ///< or the plan's own entries, as they are
  sinkhorn_scaling scaling{};

  static side_use reads_side(index_t columns) { return {.own_k = columns}; }

  void check(index_t, index_t experts) const {
    check_range("sinkhorn_expert_choice", "experts", experts, 1, max_experts);
    capacity.check();
    scaling.check("sinkhorn_expert_choice");
    if (weights != plan_weights::softmax && weights != plan_weights::plan)
      fail("sinkhorn_expert_choice", "weights is by_k or sigmoid, expected softmax or plan");
  }

  template <executor Exec, class A = simd::default_arch>
  void route_batch(matrix_view<const float> z, const side_inputs& side, workspace& ws,
                   assignment& out, const Exec& exec) const {
    const index_t tokens = z.rows, experts = z.cols;
    if (tokens == 0) return detail::no_rows(experts, experts, out);
    const detail::column_scopes s{tokens, experts, 1, tokens, capacity(tokens, experts)};
    const int workers = worker_slots::count(exec.concurrency());
    detail::sinkhorn_state state{};
    struct memory {
      float* panel;
      detail::choice_rows* rows;
      simd::column_top_k_buffers* columns;
      simd::column_picks picks;
      std::int32_t* cursor;
    };
    const memory m = ws.carve([&](scratch& tape) {
      state = detail::sinkhorn_state::carve(tape, tokens, experts, workers);
      return memory{tape.take<float>(s.panel()), detail::choice_rows::carve(tape, experts, workers),
                    detail::carve_column_buffers(tape, tokens, workers),
                    detail::carve_picks(tape, s), tape.take<std::int32_t>(tokens + experts)};
    });
    detail::sinkhorn_engine<A> engine(scaling, state);
    engine.run(z, side, exec);
    // The plan, 16 tokens at a time, into the panel.
    worker_slots slots(workers);
    exec.parallel_for(s.tiles(), 1, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots);
      const detail::choice_rows& r = m.rows[worker];
      for (index_t tile = begin; tile < end; ++tile) {
        std::fill_n(r.rows, simd::tile_size * r.stride, simd::minus_infinity);
        std::fill_n(r.factor, simd::tile_size, 1.0f);
        const index_t first = tile * simd::tile_size;
        for (index_t t = first; t < std::min(first + simd::tile_size, tokens); ++t) {
          if (side.masked(t)) continue;
          float* const row = r.rows + (t - first) * r.stride;
          engine.plan_row(t, row);
          for (index_t e = 0; e < experts; ++e)
            if (!(z(t, e) > simd::minus_infinity)) row[e] = simd::minus_infinity;
        }
        simd::pack_tiles<A>(r.rows, r.stride, r.factor, experts, m.panel,
                            simd::panel_shape{s.tiles()}, tile);
      }
    });
    detail::pick_columns<A>(
        s,
        [&](index_t, index_t strip) {
          return detail::stored_strip{m.panel +
                                      strip * s.tiles() * simd::tile_size * simd::tile_size};
        },
        m.columns, workers, m.picks, exec);
    detail::rows_from_picks(
        s, m.picks, m.cursor, experts, out,
        [](index_t, index_t, std::int32_t key) { return simd::value_of_key(key); });
    if (!side.k_of_token.empty()) detail::release_above_cap<A>(side, experts, out);
    if (weights == plan_weights::plan) return;
    const assignment::parts p = out.to_fill();
    exec.parallel_for(tokens, 256, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots);
      float* const score = m.rows[worker].rows;
      for (index_t t = begin; t < end; ++t) {
        if (out.count(t) == 0) continue;
        softmax::score_row<A>(z.row(t), experts, score);
        for (std::int32_t i = p.offsets[t]; i < p.offsets[t + 1]; ++i)
          p.weights[i] = score[p.ids[i]];
      }
    });
  }
};
static_assert(batch_router<sinkhorn_expert_choice>);

}  // namespace moeroute
