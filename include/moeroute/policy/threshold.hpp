// Threshold and ReLU routing: every expert whose score is above a threshold, as many as there are.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <string>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/logit_transform.hpp>
#include <moeroute/policy/score.hpp>
#include <moeroute/simd/compress.hpp>

namespace moeroute {

/// What the scores above the threshold are divided by.
enum class threshold_norm {
  none,  ///< ReMoE
  sum,   ///< sum * norm_scale + eps (BlockFFN 'sum')
  rms,   ///< sqrt(mean over all E of score^2 + eps), times gamma per expert (BlockFFN)
};

/// Every expert with score > threshold; none is possible. With relu and 0 this is ReLU routing.
///
/// A ragged router: choices come by ascending expert. The norm runs over the chosen scores (the
/// others count as 0). Cost: one pass over the row. Determinism: the same bits on every ISA.
/// Source: ReMoE (Wang et al. 2024), BlockFFN (Song et al. 2025).
template <score_function Score = relu>
struct threshold_router {
  float threshold = 0.0f;
  [[no_unique_address]] Score score{};
  threshold_norm norm = threshold_norm::none;
  float eps = 1e-5f;
  float norm_scale = 1.0f;
  float scale = 1.0f;
  std::span<const float> gamma{};  ///< [E] for rms, or empty for 1
  logit_transform transform{};

  struct buffers {
    float* logits;
    float* scores;  ///< [E] where a score depends on its whole row
  };

  static index_t max_choices(index_t columns) { return columns; }
  static index_t experts(index_t columns) { return columns; }

  /// Throws: error where eps is negative, threshold NaN or gamma has another length than E.
  void check(index_t experts) const {
    check_range("threshold_router", "E", experts, 1, max_experts);
    if (std::isnan(threshold)) fail("threshold_router", "threshold is NaN, expected a number");
    if (!(eps >= 0.0f))
      fail("threshold_router", "eps is " + std::to_string(eps) + ", expected >= 0");
    if (!std::isfinite(scale) || !std::isfinite(norm_scale))
      fail("threshold_router", "scale and norm_scale must be finite");
    if (!gamma.empty())
      check_size("threshold_router", "gamma.size()", static_cast<index_t>(gamma.size()), experts);
    transform.check(experts);
  }

  buffers carve(scratch& tape, index_t columns) const {
    return {tape.take<float>(transform.active() ? block_rows * columns : 0),
            tape.take<float>(Score::traits.elementwise ? 0 : columns)};
  }

  template <class A = simd::default_arch>
  index_t route_block(logit_block z, const buffers& memory, expert_id* id, float* weight,
                      std::int32_t* count) const {
    if (transform.active()) z = transform.template apply<A>(z, memory.logits);
    index_t at = 0;
    for (int i = 0; i < z.rows; ++i) {
      count[i] =
          this->template route_row<A>(z.row(i), z.experts, memory.scores, id + at, weight + at);
      at += count[i];
    }
    return at;
  }

 private:
  template <class A>
  int route_row(const float* z, index_t experts, float* s, expert_id* id, float* weight) const {
    using F = simd::vfloat<A>;
    if constexpr (!Score::traits.elementwise) score.template score_row<A>(z, experts, s);
    simd::partials<A> sum(0.0f);
    const F limit(threshold), never(simd::minus_infinity), zero(0.0f);
    const bool as_they_are = norm == threshold_norm::none && gamma.empty() && scale == 1.0f;
    const F most(std::numeric_limits<float>::max());
    int n = 0;
    constexpr int w = simd::width<A>;
    for (index_t c = 0; c < experts; c += w) {
      const index_t lanes = std::min<index_t>(w, experts - c);
      const bool whole = lanes == w;
      const F logit =
          whole ? simd::load<A>(z + c) : simd::load_first<A>(z + c, lanes, simd::minus_infinity);
      F x;
      if constexpr (Score::traits.elementwise) {
        x = Score::template value<A>(logit);
      } else {
        x = whole ? simd::load<A>(s + c) : simd::load_first<A>(s + c, lanes, 0.0f);
      }
      const auto in = (x > limit) & (logit > never);
      if (norm != threshold_norm::none) {
        const F value = simd::select<A>(in, x, zero);
        auto& part = sum.part[(c / w) % simd::partials<A>::n];
        part = norm == threshold_norm::sum ? part + value : simd::fma<A>(value, value, part);
      }
      if (as_they_are) x = simd::select<A>(x > most, most, x);
      n += simd::store_chosen<A>(in, x, static_cast<std::int32_t>(c), weight + n, id + n);
    }
    if (!as_they_are)
      finish(experts, norm == threshold_norm::none ? 0.0f : simd::sum_of<A>(sum), id, weight, n);
    return n;
  }

  void finish(index_t experts, float sum, const expert_id* id, float* weight, int n) const {
    constexpr float most = std::numeric_limits<float>::max();
    float divisor = 1.0f;
    if (norm == threshold_norm::sum) divisor = sum * norm_scale + eps;
    if (norm == threshold_norm::rms) divisor = std::sqrt(sum / static_cast<float>(experts) + eps);
    for (int r = 0; r < n; ++r) {
      float w = weight[r];
      if (norm != threshold_norm::none)
        w = divisor > 0.0f && divisor <= most ? w / divisor : (w > most ? 1.0f : 0.0f);
      if (!gamma.empty()) w *= gamma[static_cast<std::size_t>(id[r])];
      w *= scale;
      weight[r] = w > most ? most : (w < -most ? -most : w);
    }
  }
};
static_assert(ragged_router<threshold_router<relu>>);

}  // namespace moeroute
