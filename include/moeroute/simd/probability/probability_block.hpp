// What functions of rows of probabilities and their gradients are made of: up to 16 rows at once,
// which share their reductions. open_probability_rows.hpp computes the rows' sums,
// close_probability_rows.hpp the gradients.
#pragma once

#include <algorithm>
#include <limits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/join.hpp>
#include <moeroute/simd/mask.hpp>
#include <moeroute/simd/numbers.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute::simd {

/// How a row x becomes probabilities p.
enum class probability {
  softmax,                   ///< exp(x) / sum exp(x)
  normalized_sigmoid,        ///< s / (sum s + eps) with s = sigmoid(x)
  normalized_sqrt_softplus,  ///< s / (sum s + eps) with s = sqrt(log(1 + exp(x)))
};

/// Functions of one row, as bits of a set.
enum row_function : unsigned {
  no_function = 0,
  square_lse = 1,    ///< (log sum exp x)^2
  entropy = 2,       ///< H = -sum p ln p
  power = 4,         ///< (1 - sum p^q) / (q - 1)
  inverse_norm = 8,  ///< 1 / (|p| + offset), |p| the Euclidean norm
};

/// The weight of each function, and what they need.
template <class F>
struct row_functions {
  F square_lse = 0, entropy = 0, power = 0, inverse_norm = 0;
  F q = 2;       ///< of power
  F offset = 0;  ///< of inverse_norm
  F eps = 0;     ///< of the scores that are divided by their sum
};

/// Each function summed over rows.
struct row_function_sums {
  double square_lse = 0, entropy = 0, power = 0, inverse_norm = 0;
};

/// Rows [16, stride] of unscaled probabilities and, per row, what makes them p and its gradient.
template <class F>
struct probability_block {
  F* unscaled;     ///< [16, stride]; zero past the last column
  F* powers;       ///< [16, stride] for power: unscaled^(q - 1), something finite where that is 0
  index_t stride;  ///< a multiple of 16
  alignas(alignment) F scale[block_rows];     ///< p = scale * unscaled; 0 for a row without mass
  alignas(alignment) F slope[block_rows];     ///< scale, or 0 where the gradient is 0
  alignas(alignment) F center[block_rows];    ///< sum p G - (what the row as a whole adds to G)
  alignas(alignment) F top[block_rows];       ///< the row's maximum
  alignas(alignment) F log_sum[block_rows];   ///< ln p = x - top - log_sum
  alignas(alignment) F along[block_rows];     ///< factor of p in G
  alignas(alignment) F to_power[block_rows];  ///< factor of unscaled^(q - 1) in G
};

namespace detail {

// What a row sums up, one row per lane.
template <class V>
struct row_sums {
  V top, sum, dot, log_sum, mean_below, powers, squares;
  V scale_to_order;  // sum^(1 - q)
};

// The functions of rows and what their gradient needs.
template <class V>
struct closed_rows {
  V scale, slope, center, along, to_power;
  V lse, entropy, power, inverse_norm;
};

// G = dValue/dp is, per element,
//   c - entropy * ln p + along * p + to_power * unscaled^(q - 1),
// and the gradient p * (G - center).
template <unsigned uses, class Of, class F, class V = typename Of::value>
MOEROUTE_INLINE closed_rows<V> close_rows_of(const row_functions<F>& f, const row_sums<V>& at) {
  const V zero(F{0}), one(F{1});
  const auto live = at.sum > zero;
  const auto finite = live & (at.top < V(std::numeric_limits<F>::infinity()));
  closed_rows<V> out;
  out.scale = Of::select(live, Of::divide(one, at.sum + V(f.eps)), zero);
  out.slope = Of::select(finite, out.scale, zero);
  out.center = at.dot * out.scale;
  if constexpr ((uses & square_lse) != 0) {
    out.lse = Of::select(finite, at.top + at.log_sum, zero);
    out.center = out.center - V(F{2} * f.square_lse) * out.lse;
  }
  if constexpr ((uses & entropy) != 0) {
    out.entropy = Of::select(live, at.log_sum - at.mean_below * out.scale, zero);
    out.center = out.center + V(f.entropy) * out.entropy;
  }
  if constexpr ((uses & power) != 0) {
    const F order = f.q - F{1}, factor = f.power * f.q / order;
    const V scaled = Of::select(live, at.scale_to_order, zero);
    const V sum_of_powers = at.powers * scaled * out.scale;
    out.to_power = V(-factor) * scaled;
    out.center = out.center - V(factor) * sum_of_powers;
    out.power = Of::select(live, Of::divide(one - sum_of_powers, V(order)), zero);
  }
  if constexpr ((uses & inverse_norm) != 0) {
    const V norm = Of::root(at.squares) * out.scale;
    const V value = Of::select(live, Of::divide(one, norm + V(f.offset)), zero);
    out.along = Of::select(live, Of::divide(V(-f.inverse_norm) * value * value, norm), zero);
    out.center = out.center + out.along * norm * norm;
    out.inverse_norm = value;
  }
  return out;
}

// Partial sums of 16 rows, joined at once: out[i] is row i's sum in the tree of sum_of.
struct joined_sums {
  alignas(alignment) float part[block_rows * block_rows];
  alignas(alignment) float row[block_rows];

  template <class A>
  MOEROUTE_INLINE void keep(int i, const partials<A>& p) {
    store_partials<A>(p, part + i * block_rows);
  }
  template <class A>
  MOEROUTE_INLINE void join(int n) {
    std::fill(part + n * block_rows, part + block_rows * block_rows, 0.0f);
    simd::join_partials<A>(part, row, [](vfloat<A> a, vfloat<A> b) { return a + b; });
  }
};

// The register of columns [c, c + width), c below cols rounded up to 16: the tail filled.
template <class A>
MOEROUTE_INLINE vfloat<A> load_columns(const float* row, index_t c, index_t cols, float fill) {
  if (c + width<A> <= cols) [[likely]]
    return load<A>(row + c);
  const index_t from = c < cols ? c : cols;
  return load_first<A>(row + from, cols - from, fill);
}

// Above, a score would be too large to be squared; its row's gradient is 0 long before.
inline constexpr float largest_logit = 1e30f;

// Where unscaled is 0, x - top counts as this: anything finite does, as it is multiplied by 0.
inline constexpr float far_below = -88.0f;

}  // namespace detail

}  // namespace moeroute::simd
