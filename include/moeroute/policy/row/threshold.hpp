// Threshold and ReLU routing: every expert whose score is above a threshold, as many as there are.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/simd/select/compress.hpp>

namespace moeroute {

/// Every expert with score > threshold; none is possible. With relu and 0 this is ReLU routing.
///
/// A ragged router: choices come by ascending expert. The norm runs over the chosen scores (the
/// others count as 0). Cost: one pass over the row. Determinism: the same bits on every ISA.
/// Source: ReMoE (Wang et al. 2024), BlockFFN (Song et al. 2025).
template <score_function Score = relu>
struct threshold_router {
  float threshold = 0.0f;
  Score score{};
  threshold_norm norm = threshold_norm::none;
  float eps = 1e-5f;
  float norm_scale = 1.0f;
  float scale = 1.0f;
  lasting_span<const float> gamma{};  ///< [E] for rms, or empty for 1; the caller keeps it alive
  logit_transform transform{};

  struct buffers {
    float* logits;
    float* scores;  ///< [E] where a score depends on its whole row
  };

  static index_t max_choices(index_t columns) { return columns; }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t) const { return {.noise_logits = transform.noise.active()}; }

  /// Throws: error where eps is negative, threshold NaN or gamma has another length than E.
  void check(index_t experts) const {
    check_range("threshold_router", "E", experts, 1, max_experts);
    if (std::isnan(threshold)) fail("threshold_router", "threshold is NaN, expected a number");
    if (!(eps >= 0.0f)) fail_value("threshold_router", "eps", eps, ">= 0");
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
  // Score and choice of a register of experts from the c-th on; lanes past the row are not chosen.
  template <class A>
  struct portion {
    simd::vfloat<A> score;
    simd::vmask<A> chosen;
  };
  template <class A>
  MOEROUTE_INLINE portion<A> take(const float* z, const float* s, index_t experts,
                                  index_t c) const {
    using F = simd::vfloat<A>;
    const index_t lanes = std::min<index_t>(simd::width<A>, experts - c);
    const bool whole = lanes == simd::width<A>;
    const F logit =
        whole ? simd::load<A>(z + c) : simd::load_first<A>(z + c, lanes, simd::minus_infinity);
    F x;
    if constexpr (Score::traits.elementwise) {
      x = Score::template value<A>(logit);
    } else {
      x = whole ? simd::load<A>(s + c) : simd::load_first<A>(s + c, lanes, 0.0f);
    }
    return {x, (x > F(threshold)) & (logit > F(simd::minus_infinity))};
  }

  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> plus(simd::vfloat<A> sum, const portion<A>& p) const {
    using F = simd::vfloat<A>;
    const F value = simd::select<A>(p.chosen, p.score, F(0.0f));
    return norm == threshold_norm::rms ? simd::fma<A>(value, value, sum) : sum + value;
  }

  // What scores are divided by, 0 where there is nothing to divide by.
  float divisor_of(float sum, index_t experts) const {
    float divisor = 1.0f;
    if (norm == threshold_norm::sum) divisor = sum * norm_scale + eps;
    if (norm == threshold_norm::rms) divisor = std::sqrt(sum / static_cast<float>(experts) + eps);
    return divisor > 0.0f && divisor <= std::numeric_limits<float>::max() ? divisor : 0.0f;
  }

  // Weights of chosen scores; g is their gamma.
  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> weigh(simd::vfloat<A> x, simd::vfloat<A> g, float divisor) const {
    using F = simd::vfloat<A>;
    const F most(std::numeric_limits<float>::max());
    if (norm != threshold_norm::none)
      x = divisor != 0.0f ? simd::divide<A>(x, F(divisor))
                          : simd::select<A>(x > most, F(1.0f), F(0.0f));
    x = x * g * F(scale);
    return simd::select<A>(x > most, most, simd::select<A>(x < -most, -most, x));
  }

  template <class A>
  int route_row(const float* z, index_t experts, float* s, expert_id* id, float* weight) const {
    using F = simd::vfloat<A>;
    constexpr int w = simd::width<A>;
    if constexpr (!Score::traits.elementwise) score.template score_row<A>(z, experts, s);
    simd::partials<A> sum(0.0f);
    if (experts <= w) {  // the weights before they are packed: not a word goes through memory twice
      const portion<A> p = this->template take<A>(z, s, experts, 0);
      if (norm != threshold_norm::none) sum.part[0] = this->template plus<A>(sum.part[0], p);
      const F g = gamma.empty() ? F(1.0f) : simd::load_first<A>(gamma.data(), experts, 1.0f);
      const float divisor = divisor_of(simd::sum_of<A>(sum), experts);
      return simd::store_chosen<A>(p.chosen, this->template weigh<A>(p.score, g, divisor), 0,
                                   weight, id);
    }
    const bool as_they_are = norm == threshold_norm::none && gamma.empty() && scale == 1.0f;
    const F most(std::numeric_limits<float>::max());
    int n = 0;
    for (index_t c = 0; c < experts; c += w) {
      portion<A> p = this->template take<A>(z, s, experts, c);
      auto& part = sum.part[(c / w) % simd::partials<A>::n];
      if (norm != threshold_norm::none) part = this->template plus<A>(part, p);
      if (as_they_are) p.score = simd::select<A>(p.score > most, most, p.score);
      n += simd::store_chosen<A>(p.chosen, p.score, static_cast<std::int32_t>(c), weight + n,
                                 id + n);
    }
    if (!as_they_are)
      this->template finish<A>(divisor_of(simd::sum_of<A>(sum), experts), id, weight, n);
    return n;
  }

  // In registers, without a branch on how many were chosen: that is as good as random.
  template <class A>
  void finish(float divisor, const expert_id* id, float* weight, int n) const {
    constexpr int w = simd::width<A>;
    alignas(alignment) float g[w];
    std::fill_n(g, w, 1.0f);
    int r = 0;
    do {
      const int lanes = std::min(w, n - r);
      if (!gamma.empty())
        for (int i = 0; i < lanes; ++i) g[i] = gamma[static_cast<std::size_t>(id[r + i])];
      const auto x = simd::load_first<A>(weight + r, lanes, 0.0f);
      simd::store_first<A>(weight + r, lanes,
                           this->template weigh<A>(x, simd::load<A>(g), divisor));
      r += w;
    } while (r < n);
  }
};
static_assert(ragged_router<threshold_router<relu>>);

}  // namespace moeroute
