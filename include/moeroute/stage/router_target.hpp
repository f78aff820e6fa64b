// Losses of a router against something that is given: the probabilities of another router, the
// experts that it chose, the weights of neighbouring tokens.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include <moeroute/base/gradient.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/probability/softmax_row.hpp>

namespace moeroute {

/// How far a router is from its target.
enum class target_distance {
  cross_entropy,  ///< - sum over e of q_e log p_e
  squares,        ///< sum over e of (p_e - q_e)^2
};

struct distillation_options {
  target_distance distance = target_distance::cross_entropy;
  double coefficient = 1.0;
  double temperature = 1.0;              ///< p = softmax(z / temperature)
  double tokens = 0.0;                   ///< T of the whole where this call is a part; 0: its own
  std::span<const std::uint8_t> mask{};  ///< [T], 0: no such token; empty: all
  gradient_to gradient = gradient_to::write;
};

namespace detail {

// sum over tokens of loss(t, row of logits, row of the gradient) / T, where T counts the tokens
// that take part; rows of the others are 0, or stay.
template <class F, class Each>
double mean_over_tokens(std::span<const std::uint8_t> mask, double tokens, gradient_to to,
                        const matrix_view<const F>& z, const matrix_view<F>& dz, Each&& each) {
  index_t live = z.rows;
  if (!mask.empty()) live = z.rows - std::count(mask.begin(), mask.end(), std::uint8_t{0});
  const double n = tokens > 0.0 ? tokens : static_cast<double>(live);
  double sum = 0.0;
  for (index_t t = 0; t < z.rows; ++t) {
    if (to == gradient_to::write) std::fill_n(dz.row(t), z.cols, F(0));
    if (mask.empty() || mask[static_cast<std::size_t>(t)] != 0) sum += each(t, 1.0 / n);
  }
  return live > 0 ? sum / n : 0.0;
}

template <class F>
void check_target_gradient(const char* where, gradient_to to, const matrix_view<const F>& z,
                           const matrix_view<F>& dz, std::span<const std::uint8_t> mask,
                           double coefficient) {
  check_stride(where, "logits", z);
  if (!mask.empty()) check_size(where, "mask.size()", static_cast<index_t>(mask.size()), z.rows);
  if (!std::isfinite(coefficient)) fail_value(where, "coefficient", coefficient, "finite");
  if (to == gradient_to::nowhere) return;
  check_size(where, "dlogits.rows", dz.rows, z.rows);
  check_size(where, "dlogits.cols", dz.cols, z.cols);
  check_stride(where, "dlogits", dz);
  check_apart(where, "logits", z, "dlogits", dz);
}

// Of one token: q(e) is its target. Adds to dz where it is not null.
template <class F, class A, class Target>
double distill_row(const distillation_options& how, const F* z, index_t n, F* p, double share,
                   F* dz, Target&& q) {
  constexpr F never = -std::numeric_limits<F>::infinity();
  const double inverse = 1.0 / how.temperature, c = how.coefficient * share * inverse;
  for (index_t e = 0; e < n; ++e) p[e] = z[e] * static_cast<F>(inverse);
  double mass = 0.0, loss = 0.0, mean = 0.0;
  const bool squares = how.distance == target_distance::squares;
  const double lse = static_cast<double>(simd::softmax_row<A>(p, n, p));
  if (!std::isfinite(lse)) return 0.0;
  for (index_t e = 0; e < n; ++e) {
    const double pe = static_cast<double>(p[e]), qe = q(e), gap = pe - qe;
    mass += qe;
    if (squares) {
      loss += gap * gap;
      mean += pe * 2.0 * gap;
    } else if (z[e] > never) {
      loss += qe * (lse - static_cast<double>(z[e]) * inverse);
    }
  }
  for (index_t e = 0; dz != nullptr && e < n; ++e) {
    if (!std::isfinite(z[e])) continue;
    const double pe = static_cast<double>(p[e]), qe = q(e);
    dz[e] += static_cast<F>(c * (squares ? pe * (2.0 * (pe - qe) - mean) : pe * mass - qe));
  }
  return how.coefficient * loss;
}

}  // namespace detail

/// Router distillation: coefficient * the mean over tokens of the distance of p = softmax(z /
/// temperature) from a target that has no gradient.
///
/// Backward: cross-entropy dz_e = coefficient / (T temperature) (p_e sum(q) - q_e); squares R1 with
/// G_e = 2 (p_e - q_e): dz_e = coefficient / (T temperature) p_e (G_e - sum of p_j G_j). Rows
/// without a finite logit have neither value nor gradient. Shapes: logits, target, dlogits [T, E],
/// dlogits apart from both. Throws: error where a size differs, temperature <= 0 or the coefficient
/// is not finite. Cost: T E exponentials, E numbers of scratch; no allocation once ws is warm.
/// Source: Hinton et al. 2015; squares CompeteSMoE (Pham et al. 2024).
template <class F, class A = simd::default_arch>
double router_distillation(const distillation_options& how,
                           std::type_identity_t<matrix_view<const F>> logits,
                           std::type_identity_t<matrix_view<const F>> target,
                           matrix_view<F> dlogits, workspace& ws) {
  constexpr const char* where = "router_distillation";
  detail::check_target_gradient(where, how.gradient, logits, dlogits, how.mask, how.coefficient);
  check_size(where, "target.rows", target.rows, logits.rows);
  check_size(where, "target.cols", target.cols, logits.cols);
  check_stride(where, "target", target);
  if (how.gradient != gradient_to::nowhere)
    check_apart(where, "target", target, "dlogits", dlogits);
  if (!(how.temperature > 0.0)) fail_value(where, "temperature", how.temperature, "> 0");
  F* const p = ws.carve([&](scratch& tape) { return tape.take<F>(logits.cols); });
  return detail::mean_over_tokens(
      how.mask, how.tokens, how.gradient, logits, dlogits, [&](index_t t, double share) {
        F* const dz = how.gradient == gradient_to::nowhere ? nullptr : dlogits.row(t);
        return detail::distill_row<F, A>(
            how, logits.row(t), logits.cols, p, share, dz,
            [&](index_t e) { return static_cast<double>(target(t, e)); });
      });
}

/// The same towards the first choice of another router: q is 1 there. A token without one takes no
/// part in the sum, but in T.
///
/// Source: StableMoE (Dai et al. 2022), whose distilled router learns the assignment.
template <class F, class A = simd::default_arch>
double router_distillation(const distillation_options& how,
                           std::type_identity_t<matrix_view<const F>> logits,
                           const assignment& target, matrix_view<F> dlogits, workspace& ws) {
  constexpr const char* where = "router_distillation";
  detail::check_target_gradient(where, how.gradient, logits, dlogits, how.mask, how.coefficient);
  check_size(where, "target.tokens()", target.tokens(), logits.rows);
  check_size(where, "target.experts()", target.experts(), logits.cols);
  check_offsets(where, target);
  if (!(how.temperature > 0.0)) fail_value(where, "temperature", how.temperature, "> 0");
  F* const p = ws.carve([&](scratch& tape) { return tape.take<F>(logits.cols); });
  return detail::mean_over_tokens(
      how.mask, how.tokens, how.gradient, logits, dlogits, [&](index_t t, double share) {
        const auto ids = target.ids(t);
        if (ids.empty() || ids[0] < 0) return 0.0;
        check_range(where, "an id", ids[0], no_expert, logits.cols - 1);
        F* const dz = how.gradient == gradient_to::nowhere ? nullptr : dlogits.row(t);
        return detail::distill_row<F, A>(how, logits.row(t), logits.cols, p, share, dz,
                                         [&](index_t e) { return e == ids[0] ? 1.0 : 0.0; });
      });
}

/// Whether the rows of neighbours move too.
enum class neighbour_gradient {
  constant,  ///< RoMA: neighbours are samples that were answered well, and stay
  both,      ///< the quadratic form of the graph's Laplacian
};

/// RoMA's regulariser: eta * sum over i, j of w_ij |r_i - r_n(i,j)|^2 over each row's neighbours.
///
/// Backward: dr_i = 2 eta sum over j of w_ij (r_i - r_n(i,j)), and with neighbour_gradient::both
/// the opposite to each neighbour. With weights that are symmetric and both, the value is
/// 2 eta tr(r^T L r), L the Laplacian of the graph. Neighbours that are negative are none.
/// Shapes: r, dr [n, width] (routing weights of a sample, of all layers that take part, side by
/// side), neighbour and weight [n, m]; what r is made of gets its gradient by weigh_backward().
/// Throws: error where a size differs, a neighbour is no row, or dr shares memory with r.
/// Cost: O(n m width). Source: RoMA (Li et al. 2025).
template <class F>
double neighbour_loss(double eta, neighbour_gradient moves,
                      std::type_identity_t<matrix_view<const F>> r,
                      std::span<const std::int32_t> neighbour,
                      std::type_identity_t<matrix_view<const F>> weight, gradient_to to,
                      matrix_view<F> dr) {
  constexpr const char* where = "neighbour_loss";
  check_size(where, "weight.rows", weight.rows, r.rows);
  check_size(where, "neighbour.size()", static_cast<index_t>(neighbour.size()),
             r.rows * weight.cols);
  check_stride(where, "r", r);
  check_stride(where, "weight", weight);
  if (to != gradient_to::nowhere) {
    check_size(where, "dr.rows", dr.rows, r.rows);
    check_size(where, "dr.cols", dr.cols, r.cols);
    check_stride(where, "dr", dr);
    check_apart(where, "r", r, "dr", dr);
  }
  for (index_t i = 0; to == gradient_to::write && i < r.rows; ++i)
    std::fill_n(dr.row(i), r.cols, F(0));
  double value = 0.0;
  for (index_t i = 0; i < r.rows; ++i)
    for (index_t m = 0; m < weight.cols; ++m) {
      const std::int32_t j = neighbour[static_cast<std::size_t>(i * weight.cols + m)];
      if (j < 0) continue;
      check_range(where, "a neighbour", j, -1, r.rows - 1);
      const double w = eta * static_cast<double>(weight(i, m));
      for (index_t c = 0; c < r.cols; ++c) {
        const double gap = static_cast<double>(r(i, c)) - static_cast<double>(r(j, c));
        value += w * gap * gap;
        if (to == gradient_to::nowhere) continue;
        dr(i, c) += static_cast<F>(2.0 * w * gap);
        if (moves == neighbour_gradient::both) dr(j, c) -= static_cast<F>(2.0 * w * gap);
      }
    }
  return value;
}

}  // namespace moeroute
