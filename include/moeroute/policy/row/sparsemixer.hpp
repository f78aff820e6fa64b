// SparseMixer-v2: two choices, each weighted by a softmax over the experts close to the best; and
// how they are drawn in training.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include <moeroute/base/rng.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute {

/// Twice: m = the largest logit left; experts with (m - z) / max(|z|, m) > 2 jitter are out; the
/// best of the rest is chosen with its softmax over the rest as weight. The two weights do not sum
/// to 1. k is 2.
///
/// A quotient that is NaN (m = z = 0) counts as close. Cost: O(E) per row.
/// Source: Phi-3.5-MoE (Microsoft 2024), evaluation form.
struct sparsemixer {
  float jitter = 0.01f;

  struct buffers {
    float* row;  ///< [E], the experts that are left
  };
  static index_t k() { return 2; }
  static index_t experts(index_t columns) { return columns; }
  static side_use reads_side(index_t) { return {.own_k = 2}; }

  /// Throws: error where E < 2 or jitter < 0.
  void check(index_t experts) const {
    check_range("sparsemixer", "E", experts, 2, max_experts);
    if (!(jitter >= 0.0f)) fail_value("sparsemixer", "jitter", jitter, ">= 0");
  }

  static buffers carve(scratch& tape, index_t experts) { return {tape.take<float>(experts)}; }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    using F = simd::vfloat<A>;
    if (z.experts <= block_rows) {
      this->template route_lanes<A>(z, c);
      return keep_own_k(z, c);
    }
    float* const row = memory.row;
    for (int i = 0; i < z.rows; ++i) {
      simd::map_row<A>(z.row(i), z.experts, row,
                       [](F x) { return simd::nan_to_minus_infinity<A>(x); });
      for (int r = 0; r < 2; ++r) {
        const float max = simd::row_max<A>(row, z.experts);
        const index_t best = simd::first_column<A>(row, z.experts, max);
        const bool found = max > simd::minus_infinity;
        c.id[r * block_rows + i] = found ? static_cast<expert_id>(best) : no_expert;
        c.value[r * block_rows + i] = found ? 1.0f / close_to<A>(row, z.experts, max) : 0.0f;
        row[best] = simd::minus_infinity;
      }
    }
    keep_own_k(z, c);
  }

 private:
  // Few experts: one row per lane, one expert per register; the same bits, as the sums are joined
  // in the same tree.
  template <class A>
  void route_lanes(const logit_block& z, choice_block& c) const {
    using F = simd::vfloat<A>;
    constexpr int w = simd::width<A>;
    const F never(simd::minus_infinity), zero(0.0f), one(1.0f), limit(2.0f * jitter);
    const int experts = static_cast<int>(z.experts);
    for (int lane = 0; lane < z.rows; lane += w) {
      const float* row[w];
      for (int i = 0; i < w; ++i) row[i] = z.row(std::min(lane + i, z.rows - 1));
      F x[block_rows];
      for (int e = 0; e < experts; e += w)
        simd::load_transposed<A>(row, e, z.experts, simd::minus_infinity, x + e);
      for (int e = 0; e < experts; ++e) x[e] = simd::nan_to_minus_infinity<A>(x[e]);
      for (int r = 0; r < 2; ++r) {
        F max = x[0];
        for (int e = 1; e < experts; ++e) max = simd::select<A>(x[e] > max, x[e], max);
        simd::vint<A> best(no_expert);
        F term[block_rows];
        for (int e = experts - 1; e >= 0; --e) {
          best = simd::select<A>(x[e] == max, simd::vint<A>(e), best);
          const F size = simd::absolute<A>(x[e]), factor = simd::select<A>(size > max, size, max);
          const auto out = simd::divide<A>(max - x[e], factor) > limit;
          term[e] = simd::select<A>(out, zero, simd::exp_below_max<A>(x[e], max));
        }
        for (int e = experts; e < block_rows; ++e) term[e] = zero;
        for (int distance = block_rows / 2; distance > 0; distance /= 2)
          for (int e = 0; e < distance; ++e) term[e] += term[e + distance];
        const auto found = max > never;
        simd::select<A>(found, best, simd::vint<A>(no_expert))
            .store_unaligned(c.id + r * block_rows + lane);
        simd::select<A>(found, simd::divide<A>(one, term[0]), zero)
            .store_unaligned(c.value + r * block_rows + lane);
        for (int e = 0; e < experts; ++e)
          x[e] = simd::select<A>(simd::differs<A>(best, simd::vint<A>(e)), x[e], never);
      }
    }
  }

  friend struct sparsemixer_training;

  // Whether an expert is close to the best.
  static bool close(float z, float max, float jitter) {
    return !((max - z) / std::max(std::abs(z), max) > 2.0f * jitter);
  }

  // The sum of exp(z - max) over the experts that are close to the best.
  template <class A>
  float close_to(const float* row, index_t experts, float max) const {
    using F = simd::vfloat<A>;
    simd::partials<A> sum(0.0f);
    const F m(max), limit(2.0f * jitter), zero(0.0f);
    simd::detail::for_each_register<A>(row, experts, simd::minus_infinity, [&](int r, F x) {
      const F size = simd::absolute<A>(x), factor = simd::select<A>(size > m, size, m);
      const auto out = simd::divide<A>(m - x, factor) > limit;
      sum.part[r] += simd::select<A>(out, zero, simd::exp_below_max<A>(x, m));
    });
    return simd::sum_of<A>(sum);
  }
};
static_assert(token_router<sparsemixer>);

/// SparseMixer's training form. Twice: the experts close to the best that is left, as sparsemixer
/// finds them, p = their softmax; one of them is drawn from p; its weight is p where it is the best
/// or with probability 1/4, and p / 3 otherwise.
///
/// Backward (weigh_backward) is the paper's estimator, with p's derivative whatever the weight was
/// scaled with: dz_j = dw p_e (1[j = e] - p_j) over the experts that were close. **It is not the
/// derivative of what this computes**: the draw, and the third of Heun's method, make its mean an
/// approximation of the gradient of the mean over all experts. Replays from side_inputs seed and
/// step. Cost: O(E) per row and 2 E random numbers.
/// Source: SparseMixer-v2 (Liu et al. 2023, GRIN MoE 2024).
struct sparsemixer_training {
  float jitter = 0.01f;

  struct buffers {
    float *row, *noisy;  ///< [E], the experts that are left; those that are close, and noise
  };
  static index_t k() { return 2; }
  static index_t experts(index_t columns) { return columns; }
  static side_use reads_side(index_t) { return {.own_k = 2}; }
  void check(index_t experts) const { sparsemixer{jitter}.check(experts); }
  static buffers carve(scratch& tape, index_t experts) {
    return {tape.take<float>(experts), tape.take<float>(experts)};
  }

  /// Whether the r-th choice of a token is weighed whole though it is not the best.
  static bool whole(const side_inputs& side, index_t token, index_t r) {
    return random_u01(side.seed, detail::random_stream(detail::random_use::sparsemixer, side.step),
                      static_cast<std::uint64_t>(2 * token + r)) >= 0.75f;
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    for (int i = 0; i < z.rows; ++i) {
      simd::map_row<A>(z.row(i), z.experts, memory.row,
                       [](simd::vfloat<A> x) { return simd::nan_to_minus_infinity<A>(x); });
      for (int r = 0; r < 2; ++r) choose<A>(z, memory, i, r, c);
    }
    keep_own_k(z, c);
  }

 private:
  template <class A>
  void choose(const logit_block& z, const buffers& memory, int i, int r, choice_block& c) const {
    float &weight = c.value[r * block_rows + i], *const row = memory.row;
    expert_id& id = c.id[r * block_rows + i];
    id = no_expert;
    weight = 0.0f;
    const float max = simd::row_max<A>(row, z.experts);
    if (!(max > simd::minus_infinity)) return;
    const index_t first = simd::first_column<A>(row, z.experts, max), token = z.first_token + i;
    index_t best = first;
    if (max < simd::plus_infinity) {  // several +inf: no draw
      for (index_t e = 0; e < z.experts; ++e)
        memory.noisy[e] = sparsemixer::close(row[e], max, jitter) ? row[e] : simd::minus_infinity;
      side_inputs own;
      own.seed = z.side->seed;
      own.step = 2 * z.side->step + static_cast<std::uint64_t>(r);
      logit_noise{.kind = noise_kind::gumbel}.add_to_row<A>(memory.noisy, z.experts, token, own);
      const float drawn = simd::row_max<A>(memory.noisy, z.experts);
      best = simd::first_column<A>(memory.noisy, z.experts, drawn);
    }
    const float sum = sparsemixer{jitter}.close_to<A>(row, z.experts, max);
    alignas(alignment) float p[simd::width<A>];
    simd::exp_below_max<A>(simd::vfloat<A>(row[best]), simd::vfloat<A>(max)).store_aligned(p);
    weight = p[0] / sum * (row[best] == max || whole(*z.side, token, r) ? 1.0f : 1.0f / 3.0f);
    id = static_cast<expert_id>(best);
    row[best] = simd::minus_infinity;
  }
};
static_assert(token_router<sparsemixer_training>);

}  // namespace moeroute
