// ReMoE's regularisation of ReLU routing: the L1 norm of the scores, plain or weighted by load.
#pragma once

#include <moeroute/balance/loss.hpp>
#include <moeroute/simd/probability/rectified_rows.hpp>

namespace moeroute {

/// How ReMoE weighs the scores of an expert.
enum class relu_weighting {
  plain,  ///< all alike
  load,   ///< by f_e = E count_e / (k T), count_e the tokens with a positive score
};

struct relu_loss {
  double coefficient = 1e-8;  ///< lambda, which a controller moves
  relu_weighting weighting = relu_weighting::load;
  index_t k = 1;                     ///< experts per token that lambda aims at
  std::span<const double> counts{};  ///< [E], of a whole group; empty: counted in this call
  double tokens = 0.0;               ///< of the group; 0: the tokens of this call
};

namespace detail {

template <class F>
struct relu_memory {
  F* sum;         // [pieces][2 * E]: sums, then counts
  F* slope;       // [E]
  double* total;  // [2 * E]
};

}  // namespace detail

/// plain: coefficient / T * sum r; load: coefficient * E / (k T^2) * sum_e count_e sum_t r[t, e];
/// r = max(z, 0). Counts are constants.
///
/// Backward: dz[t, e] = slope_e where z > 0, else 0, with slope_e = coefficient / T, or
/// coefficient * E count_e / (k T^2).
///
/// Shapes: logits, dlogits [T, E], float or double. Ensures: masked tokens have no gradient and are
/// in no count and no mean; a NaN counts as -inf. No token: 0.
/// Throws: error where a size differs, coefficient < 0, or k is outside [1, E].
/// Cost: a sweep that reads and one that writes, of which the gradient reads again. Scratch: 2 T /
/// 64 rows. No allocation once warm. Determinism: the same bits for every executor and thread
/// count. Source: Wang et al. 2024 (ReMoE).
template <class F, executor Exec, class A = simd::default_arch>
double relu_balance_loss(const relu_loss& loss, const token_options& how,
                         std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz,
                         workspace& ws, const Exec& exec) {
  constexpr const char* where = "relu_loss";
  const index_t experts = z.cols;
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  check_range(where, "k", loss.k, 1, experts);
  if (!loss.counts.empty()) detail::check_counts(where, loss.counts, experts);
  if (!(loss.tokens >= 0.0)) fail(where, "tokens is negative, expected >= 0");
  const index_t live = detail::live_tokens(how, z.rows), grain = detail::loss_grain(z.rows);
  const index_t pieces = ceil_div(z.rows, grain);
  const auto m = ws.carve([&](scratch& tape) {
    return detail::relu_memory<F>{tape.take<F>(pieces * 2 * experts), tape.take<F>(experts),
                                  tape.take<double>(2 * experts)};
  });
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    F* const sum = m.sum + begin / grain * 2 * experts;
    std::fill_n(sum, 2 * experts, F{0});
    for (index_t t = begin; t < end; ++t)
      if (!how.masked(t)) simd::add_rectified_row(z.row(t), experts, sum, sum + experts);
  });
  std::fill_n(m.total, 2 * experts, 0.0);
  for (index_t p = 0; p < pieces; ++p)
    for (index_t i = 0; i < 2 * experts; ++i)
      m.total[i] += static_cast<double>(m.sum[p * 2 * experts + i]);
  const double n = loss.tokens > 0.0 ? loss.tokens : static_cast<double>(live);
  double value = 0.0;
  for (index_t e = 0; e < experts; ++e) {
    const double count =
        loss.counts.empty() ? m.total[experts + e] : loss.counts[static_cast<std::size_t>(e)];
    double slope = loss.coefficient / n;
    if (loss.weighting == relu_weighting::load)
      slope *= static_cast<double>(experts) * count / (static_cast<double>(loss.k) * n);
    if (live == 0) slope = 0.0;
    m.slope[e] = static_cast<F>(slope);
    value += slope * m.total[e];
  }
  if (how.gradient == gradient_to::nowhere) return value;
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      if (how.gradient == gradient_to::add) {
        if (!how.masked(t))
          simd::rectified_gradient_row<true>(z.row(t), m.slope, experts, dz.row(t));
      } else if (how.masked(t)) {
        std::fill_n(dz.row(t), experts, F{0});
      } else {
        simd::rectified_gradient_row<false>(z.row(t), m.slope, experts, dz.row(t));
      }
    }
  });
  return value;
}

}  // namespace moeroute
