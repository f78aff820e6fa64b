// SparseMixer-v2: two choices, each weighted by a softmax over the experts close to the best.
#pragma once

#include <algorithm>
#include <string>

#include <moeroute/policy/concepts.hpp>
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

}  // namespace moeroute
