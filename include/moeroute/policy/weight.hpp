// Weight rules: from the scores of the selected experts to combine weights.
#pragma once

#include <cmath>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/score.hpp>

namespace moeroute {

/// What the selected scores are divided by.
enum class normalization {
  none,
  sum,  ///< their sum
  lp,   ///< their Lp norm (DBRX)
};

/// How eps enters the divisor.
enum class eps_mode {
  none,
  add,    ///< sum + eps
  clamp,  ///< max(sum, eps)
};

/// weight = scale * score / divisor, where the divisor runs over the row's choices in rank order.
///
/// A divisor of 0 gives weights of 0. Cost: O(k) per row. Determinism: the same bits on every ISA.
struct weight_rule {
  normalization normalize = normalization::none;
  float p = 1.0f;  ///< of the Lp norm
  eps_mode eps_where = eps_mode::none;
  float eps = 0.0f;
  float scale = 1.0f;

  /// A positive factor common to a row's scores makes no difference.
  bool cancels_row_factor() const {
    return normalize != normalization::none && eps_where == eps_mode::none;
  }

  /// Throws: error where eps < 0, p < 1 or scale is not finite.
  void check() const {
    if (!(eps >= 0.0f)) fail("weight_rule", "eps is " + std::to_string(eps) + ", expected >= 0");
    if (!(p >= 1.0f)) fail("weight_rule", "p is " + std::to_string(p) + ", expected >= 1");
    if (!std::isfinite(scale))
      fail("weight_rule", "scale is " + std::to_string(scale) + ", expected a finite number");
  }

  template <class A = simd::default_arch>
  void apply(choice_block& c) const {
    using F = simd::vfloat<A>;
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      F divisor(1.0f);
      if (normalize != normalization::none) {
        divisor = this->template norm<A>(c, lane);
        if (eps_where == eps_mode::add) divisor += F(eps);
        if (eps_where == eps_mode::clamp)
          divisor = simd::select<A>(divisor > F(eps), divisor, F(eps));
      }
      const auto usable = divisor > F(0.0f);
      detail::for_each_rank<A>(c, lane, [&](F score, simd::vmask<A> present) {
        F w = normalize == normalization::none ? score : score / divisor;
        if (scale != 1.0f) w *= F(scale);
        return simd::select<A>(present & usable, w, F(0.0f));
      });
    }
  }

 private:
  template <class A>
  simd::vfloat<A> norm(choice_block& c, int lane) const {
    using F = simd::vfloat<A>;
    F sum(0.0f);
    const bool plain = normalize == normalization::sum || p == 1.0f;
    for (int r = 0; r < c.k; ++r) {
      F x = simd::load<A>(c.value + r * block_rows + lane);
      if (!plain) x = power<A>(x, p);
      sum += x;
    }
    return plain ? sum : power<A>(sum, 1.0f / p);
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
