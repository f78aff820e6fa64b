// What becomes of a row of logits before a router sees it, where more than one logit matters:
// several projections made one, standardising, steering, candidates by lot.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/base/rng.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute {

/// A step between the logits and a router: row by row, [columns] in and [experts(columns)] out. NaN
/// counts as -inf, and what is -inf stays so.
template <class T>
concept row_transform =
    requires(const T& t, const float* z, index_t token, const side_inputs& side, float* out) {
      { t.experts(index_t{}) } -> std::convertible_to<index_t>;
      {
        t.check(index_t{}, index_t{})
      };  // columns, and how many experts must be left to choose from
      { t.apply_row(z, index_t{}, token, side, out) };  // out may be z where the columns stay
    };

namespace detail {

// Mean, population standard deviation and maximum of what is finite in a row.
struct row_moments {
  float mean = 0.0f, deviation = 0.0f;
  index_t count = 0;

  template <class A>
  static row_moments of(const float* z, index_t n) {
    using F = simd::vfloat<A>;
    const F most(std::numeric_limits<float>::max()), zero(0.0f), one(1.0f);
    const auto finite = [&](F x) { return (x <= most) & (x >= -most); };
    index_t at = 0;
    while (at < n && !std::isfinite(z[at])) ++at;
    const F first(at < n ? z[at] : 0.0f);
    simd::partials<A> sum(0.0f), there(0.0f), other(0.0f), square(0.0f);
    simd::detail::for_each_register<A>(z, n, simd::minus_infinity, [&](int r, F x) {
      sum.part[r] += simd::select<A>(finite(x), x, zero);
      there.part[r] += simd::select<A>(finite(x), one, zero);
      other.part[r] += simd::select<A>(finite(x) & (x != first), one, zero);
    });
    row_moments m;
    const float count = simd::sum_of<A>(there);
    m.count = static_cast<index_t>(count);
    if (m.count == 0) return m;
    if (simd::sum_of<A>(other) == 0.0f) {  // the mean of equals would round
      m.mean = z[at];
      return m;
    }
    m.mean = simd::sum_of<A>(sum) / count;
    const F mean(m.mean);
    simd::detail::for_each_register<A>(z, n, simd::minus_infinity, [&](int r, F x) {
      const F d = simd::select<A>(finite(x), x - mean, zero);
      square.part[r] = simd::fma<A>(d, d, square.part[r]);
    });
    m.deviation = std::sqrt(simd::sum_of<A>(square) / count);
    return m;
  }
};

inline void check_half(const char* who, index_t columns, index_t parts, const char* expected) {
  if (columns < parts || columns % parts != 0) fail_value(who, "columns", columns, expected, parts);
}

}  // namespace detail

/// z_e = sigmoid(first_e) + sigmoid(second_e), of the two halves of a row: with identity_score the
/// two-projection sigmoid.
///
/// Shapes: [2E] to [E]. An expert whose logit is -inf in either half is -inf.
struct sigmoid_sum {
  static index_t experts(index_t columns) { return columns / 2; }
  static void check(index_t columns, index_t) {
    detail::check_half("sigmoid_sum", columns, 2, "a multiple of ");
  }

  template <class A = simd::default_arch>
  static void apply_row(const float* z, index_t columns, index_t, const side_inputs&, float* out) {
    using F = simd::vfloat<A>;
    const index_t n = columns / 2;
    const F never(simd::minus_infinity);
    for (index_t e = 0; e < n; e += simd::width<A>) {
      const index_t here = std::min<index_t>(simd::width<A>, n - e);
      const F a = simd::load_first<A>(z + e, here, 0.0f);
      const F b = simd::load_first<A>(z + n + e, here, 0.0f);
      const F sum = simd::sigmoid<A>(a) + simd::sigmoid<A>(b);
      simd::store_first<A>(out + e, here, simd::select<A>((a > never) & (b > never), sum, never));
    }
  }
};
static_assert(row_transform<sigmoid_sum>);

/// One logit from those of several passes (dropout at inference): their mean and standard
/// deviation, by `rule`.
///
/// Shapes: [passes * E], pass after pass, to [E]; deviations are divided by the number of passes.
/// An expert that is -inf in one pass is -inf. The rule of the published router is not known:
/// `bound` is the choice here. Source: UaR (MoFME, Zhang et al. 2024), by its description.
struct pass_logits {
  index_t passes = 8;
  pass_rule rule = pass_rule::bound;
  float lambda = 1.0f;

  index_t experts(index_t columns) const { return columns / passes; }
  /// Throws: error where passes do not divide the columns, or lambda is not finite.
  void check(index_t columns, index_t) const {
    check_range("pass_logits", "passes", passes, 1, index_t{1} << 16);
    detail::check_half("pass_logits", columns, passes, "a multiple of passes = ");
    if (!std::isfinite(lambda)) fail_value("pass_logits", "lambda", lambda, "a finite number");
  }

  template <class A = simd::default_arch>
  void apply_row(const float* z, index_t columns, index_t, const side_inputs&, float* out) const {
    using F = simd::vfloat<A>;
    const index_t n = columns / passes;
    const F never(simd::minus_infinity), count(static_cast<float>(passes));
    for (index_t e = 0; e < n; e += simd::width<A>) {
      const index_t here = std::min<index_t>(simd::width<A>, n - e);
      F sum(0.0f), square(0.0f);
      auto there = F(0.0f) > never;
      for (index_t p = 0; p < passes; ++p) {
        const F x = simd::load_first<A>(z + p * n + e, here, 0.0f);
        there = there & (x > never);
        sum += x;
      }
      const F mean = simd::divide<A>(sum, count);
      for (index_t p = 0; p < passes; ++p) {
        const F d = simd::load_first<A>(z + p * n + e, here, 0.0f) - mean;
        square = simd::fma<A>(d, d, square);
      }
      F deviation = simd::square_root<A>(simd::divide<A>(square, count));
      // +inf has no deviation from itself.
      deviation = simd::select<A>(deviation == deviation, deviation, F(0.0f));
      const F floor(1e-6f);
      const F one =
          rule == pass_rule::bound
              ? simd::fma<A>(F(-lambda), deviation, mean)
              : simd::divide<A>(mean, simd::select<A>(deviation > floor, deviation, floor));
      simd::store_first<A>(out + e, here, simd::select<A>(there, one, never));
    }
  }
};
static_assert(row_transform<pass_logits>);

/// z' = lambda * (z - mean) / standard deviation, of what is finite in the row; 0 where that is all
/// equal.
///
/// Cost: three passes over the row. Source: Skywork-MoE (Wei et al. 2024).
struct standardized {
  float lambda = 1.0f;

  static index_t experts(index_t columns) { return columns; }
  /// Throws: error where lambda is not positive and finite.
  void check(index_t, index_t) const {
    if (!(lambda > 0.0f) || !std::isfinite(lambda))
      fail_value("standardized", "lambda", lambda, "> 0");
  }

  template <class A = simd::default_arch>
  void apply_row(const float* z, index_t columns, index_t, const side_inputs&, float* out) const {
    using F = simd::vfloat<A>;
    const auto m = detail::row_moments::of<A>(z, columns);
    const F mean(m.mean), wide(m.deviation > 0.0f ? m.deviation : 1.0f), factor(lambda);
    const F most(std::numeric_limits<float>::max());
    simd::map_row<A>(z, columns, out, [&](F x) {
      const F y = factor * simd::divide<A>(x - mean, wide);
      return simd::select<A>((x <= most) & (x >= -most), y, x);
    });
  }
};
static_assert(row_transform<standardized>);

/// How experts are promoted.
enum class promotion {
  soft,  ///< z += lambda * standard deviation of the row
  hard,  ///< above every other expert of the row, the first of the list on top
};

/// Experts to promote and experts to suppress: steering without training.
///
/// An expert that is -inf already stays so: what is masked cannot be promoted. Suppressed ones
/// become -inf. Each layer has its own sets: give each layer's router its own. Cost: two passes
/// over the row, and one write per listed expert. Source: steering towards a language or a task
/// (Bandarkar et al. 2026); hard promotion puts an expert at the row's maximum plus 1e-6 per rank,
/// or as much more as a float of that size needs.
struct steering {
  lasting_span<const expert_id> promote{};  ///< the caller keeps both alive
  lasting_span<const expert_id> suppress{};
  promotion how = promotion::soft;
  float lambda = 1.0f;

  bool active() const { return !promote.empty() || !suppress.empty(); }
  static index_t experts(index_t columns) { return columns; }

  /// Throws: error where an id is out of range or stands twice, lambda is not finite, or fewer than
  /// `least` experts are left.
  MOEROUTE_OUT_OF_LINE void check(index_t columns, index_t least) const {
    if (!std::isfinite(lambda)) fail_value("steering", "lambda", lambda, "a finite number");
    const auto listed = [&](std::span<const expert_id> list, const char* name, std::size_t n) {
      for (std::size_t i = 0; i < n; ++i) {
        check_range("steering", name, list[i], 0, columns - 1);
        if (std::find(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(i), list[i]) !=
            list.begin() + static_cast<std::ptrdiff_t>(i))
          fail("steering", std::string(name) + " has expert " + std::to_string(list[i]) + " twice");
      }
    };
    listed(promote, "promote", promote.size());
    listed(suppress, "suppress", suppress.size());
    for (const expert_id e : promote)
      if (std::find(suppress.begin(), suppress.end(), e) != suppress.end())
        fail("steering", "expert " + std::to_string(e) + " is both promoted and suppressed");
    check_range("steering", "experts that are not suppressed",
                columns - static_cast<index_t>(suppress.size()), least, columns);
  }

  template <class A = simd::default_arch>
  void apply_row(const float* z, index_t columns, index_t, const side_inputs&, float* out) const {
    float deviation = 0.0f;
    if (how == promotion::soft && lambda != 0.0f && !promote.empty())
      deviation = detail::row_moments::of<A>(z, columns).deviation;
    const float top = simd::row_max<A>(z, columns);
    if (out != z) std::copy_n(z, columns, out);
    // Steps that a float near the maximum can tell apart.
    const float step = std::max(1e-6f, std::abs(top) * 0x1p-22f);
    auto rank = static_cast<float>(promote.size());
    for (const expert_id e : promote) {
      float& x = out[e];
      if (how == promotion::soft) {
        if (deviation != 0.0f) x = std::fma(lambda, deviation, x);
      } else if (x > simd::minus_infinity && top < simd::plus_infinity) {
        x = std::min(std::fma(step, rank, top), std::numeric_limits<float>::max());
      } else if (x > simd::minus_infinity) {
        x = top;
      }
      rank -= 1.0f;
    }
    for (const expert_id e : suppress) out[e] = simd::minus_infinity;
  }
};
static_assert(row_transform<steering>);

/// Only `active` experts, drawn by lot, can be chosen: the others are -inf.
///
/// Every subset of that size is equally likely; the draw is by counter from side_inputs seed and
/// step. Cost: one random number per expert. Source: ReXMoE (2025), whose count grows in training
/// (balance/schedule.hpp: annealing).
struct candidates {
  index_t active = 1;
  row_scope scope = row_scope::token;

  static index_t experts(index_t columns) { return columns; }
  /// Throws: error where fewer than `least` experts are active, or more than there are.
  void check(index_t columns, index_t least) const {
    check_range("candidates", "active", active, least, columns);
  }

  template <class A = simd::default_arch>
  void apply_row(const float* z, index_t columns, index_t token, const side_inputs& side,
                 float* out) const {
    if (out != z) std::copy_n(z, columns, out);
    for_each(columns, token, side, [&](index_t e, bool drawn) {
      if (!drawn) out[e] = simd::minus_infinity;
    });
  }

  /// f(expert, whether it is drawn) for all of them in turn.
  template <class F>
  void for_each(index_t columns, index_t token, const side_inputs& side, F&& f) const {
    const std::uint64_t stream = detail::random_stream(detail::random_use::candidates, side.step);
    const index_t row = scope == row_scope::token ? token : 0;
    // Expert by expert, each with the share of what is still to be drawn.
    index_t wanted = active;
    for (index_t e = 0; e < columns; ++e) {
      const auto counter = static_cast<std::uint64_t>(row * columns + e);
      const auto left = static_cast<std::uint32_t>(columns - e);
      const bool drawn =
          static_cast<index_t>(random_below(left, side.seed, stream, counter)) < wanted;
      wanted -= drawn;
      f(e, drawn);
    }
  }
};
static_assert(row_transform<candidates>);

}  // namespace moeroute
