// Weight rules: from the scores of the selected experts to combine weights.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/score.hpp>

namespace moeroute {

/// weight = score / divisor / divide * scale * expert_scale[id], where the divisor runs over the
/// row's choices in rank order.
///
/// Weights are finite: a divisor of 0 gives weights of 0, scores of +inf share the weight equally,
/// and what would overflow is the largest float. Cost: O(k) per row. Determinism: the same bits on
/// every ISA.
struct weight_rule {
  normalization normalize = normalization::none;
  float p = 1.0f;  ///< of the Lp norm
  eps_mode eps_where = eps_mode::none;
  float eps = 0.0f;
  float divide = 1.0f;  ///< k where a model divides its weights by k
  float scale = 1.0f;
  lasting_span<const float> expert_scale{};  ///< [E], or empty; the caller keeps it alive

  /// How exact the scores must be: a factor common to a row may be divided away.
  score_scale needs() const {
    return normalize != normalization::none && eps_where == eps_mode::none
               ? score_scale::up_to_row_factor
               : score_scale::exact;
  }

  /// Throws: error where eps < 0, p < 1, a factor is not finite, or expert_scale has another length
  /// than E.
  void check(index_t experts) const {
    if (!(eps >= 0.0f) || !std::isfinite(eps)) fail_value("weight_rule", "eps", eps, ">= 0");
    if (!(p >= 1.0f) || !std::isfinite(p)) fail_value("weight_rule", "p", p, ">= 1");
    if (!(divide > 0.0f) || !std::isfinite(divide))
      fail_value("weight_rule", "divide", divide, "> 0");
    if (!std::isfinite(scale)) fail_value("weight_rule", "scale", scale, "a finite number");
    if (!expert_scale.empty())
      check_size("weight_rule", "expert_scale.size()", static_cast<index_t>(expert_scale.size()),
                 experts);
  }

  template <class A = simd::default_arch>
  void apply(choice_block& c) const {
    using F = simd::vfloat<A>;
    const F zero(0.0f), most(std::numeric_limits<float>::max());
    const auto finite = [&](F w) {
      w = simd::select<A>(w > most, most, simd::select<A>(w == w, w, zero));  // 0 * infinity
      return simd::select<A>(w < -most, -most, w);
    };
    const bool scales_experts = !expert_scale.empty();
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      F divisor(1.0f);
      if (normalize != normalization::none) {
        divisor = this->template norm<A>(c, lane);
        F least(eps);
        if (simd::any<A>(divisor > most)) divisor = this->template tame<A>(c, lane, divisor, least);
        if (eps_where == eps_mode::add) divisor += least;
        if (eps_where == eps_mode::clamp)
          divisor = simd::select<A>(divisor > least, divisor, least);
      }
      const auto usable = divisor > zero;
      detail::for_each_rank<A>(c, lane, [&](F score, simd::vmask<A> present) {
        F w = normalize == normalization::none ? score : simd::divide<A>(score, divisor);
        if (divide != 1.0f) w = simd::divide<A>(w, F(divide));
        if (scale != 1.0f) w *= F(scale);
        w = simd::select<A>(present & usable, w, zero);
        return scales_experts ? w : finite(w);
      });
    }
    if (!scales_experts) return;
    // no_expert is out of range, and so may be what stands in lanes without a row.
    for (int i = 0; i < c.k * block_rows; ++i)
      if (const auto e = static_cast<std::size_t>(c.id[i]); e < expert_scale.size())
        c.value[i] *= expert_scale[e];
    for (int lane = 0; lane < block_rows; lane += simd::width<A>)
      detail::for_each_rank<A>(c, lane, [&](F w, simd::vmask<A>) { return finite(w); });
  }

 private:
  // Adding and comparing what is absent would need a mask: absent scores are 0.
  template <class A>
  simd::vfloat<A> norm(choice_block& c, int lane) const {
    using F = simd::vfloat<A>;
    F sum(0.0f);
    const bool plain = normalize == normalization::sum || p == 1.0f;
    detail::for_each_rank<A>(c, lane, [&](F x, simd::vmask<A> present) {
      x = simd::select<A>(present, x, F(0.0f));
      sum += plain ? x : power<A>(x, p);
      return x;
    });
    return plain ? sum : power<A>(sum, 1.0f / p);
  }

  // Rows whose divisor overflowed: +inf scores become 1 and the others 0; finite ones are scaled
  // down, and eps with them.
  template <class A>
  simd::vfloat<A> tame(choice_block& c, int lane, simd::vfloat<A> divisor,
                       simd::vfloat<A>& least) const {
    using F = simd::vfloat<A>;
    const F infinite(simd::plus_infinity), zero(0.0f);
    const auto wild = divisor > F(std::numeric_limits<float>::max());
    F top = zero;
    detail::for_each_rank<A>(c, lane, [&](F x, simd::vmask<A>) {
      top = simd::select<A>(x > top, x, top);
      return x;
    });
    detail::for_each_rank<A>(c, lane, [&](F x, simd::vmask<A>) {
      const F shared = simd::select<A>(x == infinite, F(1.0f), zero);
      const F scaled = simd::select<A>(top == infinite, shared, simd::divide<A>(x, top));
      return simd::select<A>(wild, scaled, x);
    });
    least = simd::select<A>(wild, simd::divide<A>(least, top), least);
    return simd::select<A>(wild, norm<A>(c, lane), divisor);
  }

  template <class A>
  static simd::vfloat<A> power(simd::vfloat<A> x, float exponent) {
    alignas(alignment) float value[simd::width<A>];
    x.store_aligned(value);
    for (float& v : value) v = std::pow(v, exponent);
    return simd::vfloat<A>::load_aligned(value);
  }
};

/// The scores themselves.
inline constexpr weight_rule raw_weights{};
/// The scores divided by their sum.
inline constexpr weight_rule sum_normalized{.normalize = normalization::sum};

}  // namespace moeroute
