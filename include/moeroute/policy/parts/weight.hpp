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

  /// Whether scores of 1 get equal weights, which depend on nothing but how many they are.
  bool shares_equally() const {
    return normalize != normalization::lp && eps_where == eps_mode::none && divide == 1.0f &&
           expert_scale.empty();
  }
  /// The weight of each of n > 0 scores of 1, with the bits of apply. Requires: shares_equally().
  float share(int n) const {
    return (normalize == normalization::none ? 1.0f : 1.0f / static_cast<float>(n)) * scale;
  }

  /// Throws: error where eps < 0, p < 1, a factor is not finite, or expert_scale has another length
  /// than E.
  MOEROUTE_OUT_OF_LINE void check(index_t experts) const {
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
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      lane_choices<A> here{&c, lane};
      this->template apply_to<A>(here);
    }
  }

  /// The same for the choices of one row, or of some lanes of a block.
  template <class A, class Choices>
  MOEROUTE_INLINE void apply_to(Choices& c) const {
    using F = simd::vfloat<A>;
    const F zero(0.0f), most(std::numeric_limits<float>::max());
    const auto finite = [&](F w) MOEROUTE_INLINE_LAMBDA {
      const auto number = w == w;  // 0 * infinity is none
      return simd::select<A>(number, simd::clip<A>(w, most), zero);
    };
    F divisor(1.0f);
    if (normalize != normalization::none) {
      divisor = this->template norm<A>(c);
      F least(eps);
      if (simd::any<A>(divisor > most)) [[unlikely]] {
        // Copies: what cold code sees is not kept in registers.
        Choices wild = c;
        F wild_least = least;
        divisor = this->template tame<A>(wild, divisor, wild_least);
        c = wild;
        least = wild_least;
      }
      if (eps_where == eps_mode::add) divisor += least;
      if (eps_where == eps_mode::clamp) divisor = simd::select<A>(divisor > least, divisor, least);
    }
    const auto usable = divisor > zero;
    c.for_each([&](F score, simd::vmask<A> present) MOEROUTE_INLINE_LAMBDA {
      F w = normalize == normalization::none ? score
                                             : simd::divide_first<A>(score, divisor, c.lanes());
      if (divide != 1.0f) w = simd::divide_first<A>(w, F(divide), c.lanes());
      if (scale != 1.0f) w *= F(scale);
      w = simd::select<A>(present & usable, w, zero);
      return expert_scale.empty() ? finite(w) : w;
    });
    if (expert_scale.empty()) return;
    c.scale_by(expert_scale);
    c.for_each([&](F w, simd::vmask<A>) MOEROUTE_INLINE_LAMBDA { return finite(w); });
  }

 private:
  template <class A, class Choices>
  MOEROUTE_INLINE simd::vfloat<A> norm(Choices& c) const {
    if (normalize == normalization::sum || p == 1.0f)
      return c.sum([](simd::vfloat<A> x) MOEROUTE_INLINE_LAMBDA { return x; });
    return this->template lp_norm<A>(c);
  }

  template <class A, class Choices>
  MOEROUTE_COLD simd::vfloat<A> lp_norm(Choices c) const {
    return power<A>(c.sum([&](simd::vfloat<A> x) { return power<A>(x, p); }), 1.0f / p);
  }

  // Rows whose divisor overflowed: +inf scores become 1 and the others 0; finite ones are scaled
  // down, and eps with them.
  template <class A, class Choices>
  MOEROUTE_COLD simd::vfloat<A> tame(Choices& c, simd::vfloat<A> divisor,
                                     simd::vfloat<A>& least) const {
    using F = simd::vfloat<A>;
    const F infinite(simd::plus_infinity), zero(0.0f);
    const auto wild = divisor > F(std::numeric_limits<float>::max());
    const F largest = c.largest(), top = simd::select<A>(largest > zero, largest, zero);
    c.for_each([&](F x, simd::vmask<A>) {
      const F shared = simd::select<A>(x == infinite, F(1.0f), zero);
      const F scaled = simd::select<A>(top == infinite, shared, simd::divide<A>(x, top));
      return simd::select<A>(wild, scaled, x);
    });
    least = simd::select<A>(wild, simd::divide<A>(least, top), least);
    return simd::select<A>(wild, norm<A>(c), divisor);
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
