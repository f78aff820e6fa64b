// Losses of the selected experts alone: Shazeer's importance over the gates, StableMoE's balance.
#pragma once

#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/expert_load.hpp>

namespace moeroute {

namespace detail {

// The softmax of a token over its own choices: f(expert, gate) for each. Choices that do not count
// and -inf or NaN logits are left out; several +inf share and `finite` is false.
template <class F, class G>
void for_each_gate(const F* z, const assignment& a, const count_options& what, index_t t,
                   bool& finite, G&& f) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
  const auto below = [&](index_t e) {
    const double x = static_cast<double>(z[e]);
    return x == top ? 1.0 : x < top ? std::exp(x - top) : 0.0;
  };
  for_each_counted(a, what, t, [&](index_t e) {
    if (static_cast<double>(z[e]) > top) top = static_cast<double>(z[e]);
  });
  finite = std::isfinite(top);
  if (!(top > -std::numeric_limits<double>::infinity())) return;
  for_each_counted(a, what, t, [&](index_t e) { sum += below(e); });
  for_each_counted(a, what, t, [&](index_t e) { f(e, below(e) / sum); });
}

template <class F>
void check_selected(const char* where, const assignment& a, const matrix_view<const F>& z) {
  check_size(where, "assignment.tokens", a.tokens(), z.rows);
  check_size(where, "assignment.experts", a.experts(), z.cols);
}

}  // namespace detail

/// Shazeer's importance: coefficient * CV^2 of I_e = sum_t g[t, e], g the softmax of a token's
/// logits over its own choices, 0 elsewhere.
///
/// Backward, over the choices alone: dz[t, i] = g_i * (G_i - sum_j g_j G_j), G_e = coefficient *
/// dCV2/dI_e. The selection is a constant.
///
/// Shapes: logits, dlogits [T, E] of the assignment. Which choices count: `drops`.
/// Throws: error where a size differs, or coefficient or eps is negative. Cost: O(T k), and O(T E)
/// to clear dlogits under write. Scratch: T / 64 rows in double. No allocation once warm.
/// Determinism: the same bits for every executor and thread count. Source: Shazeer et al. 2017.
template <class F, executor Exec>
double selected_importance_loss(const importance_loss& loss, drop_stage drops,
                                const token_options& how, const assignment& a,
                                std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz,
                                workspace& ws, const Exec& exec) {
  constexpr const char* where = "selected_importance_loss";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_selected(where, a, z);
  detail::check_coefficient(where, loss.coefficient);
  detail::check_eps(where, loss.eps);
  const count_options what{.drops = drops, .mask = how.mask};
  const index_t experts = z.cols, grain = detail::loss_grain(z.rows);
  const index_t pieces = ceil_div(z.rows, grain);
  double* slope = nullptr;
  double* const sum = ws.carve([&](scratch& tape) {
    slope = tape.take<double>(experts);
    return tape.take<double>((pieces + 1) * experts);  // the last row: all pieces
  });
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    double* const piece = sum + begin / grain * experts;
    std::fill_n(piece, experts, 0.0);
    bool finite = false;
    for (index_t t = begin; t < end; ++t)
      detail::for_each_gate(z.row(t), a, what, t, finite,
                            [&](index_t e, double g) { piece[e] += g; });
  });
  double* const total = sum + pieces * experts;
  std::fill_n(total, experts, 0.0);
  std::fill_n(slope, experts, 0.0);
  for (index_t p = 0; p < pieces; ++p)
    for (index_t e = 0; e < experts; ++e) total[e] += sum[p * experts + e];
  const double value =
      detail::squared_variation(loss.coefficient, loss.kind, loss.eps, experts, total, slope);
  if (how.gradient == gradient_to::nowhere) return value;
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      F* const out = dz.row(t);
      if (how.gradient == gradient_to::write) std::fill_n(out, experts, F{0});
      double mean = 0.0;
      bool finite = false;
      detail::for_each_gate(z.row(t), a, what, t, finite,
                            [&](index_t e, double g) { mean += g * slope[e]; });
      if (!finite) continue;
      detail::for_each_gate(z.row(t), a, what, t, finite, [&](index_t e, double g) {
        out[e] += static_cast<F>(g * (slope[e] - mean));
      });
    }
  });
  return value;
}

/// StableMoE's balance: coefficient * sum_i (|A_i| - n) / n * sum over t in A_i of sigmoid(z[t,
/// i]), A_i the tokens whose first choice is i, n = (their number) / E. Counts are constants.
///
/// Backward: dz[t, a_t] = coefficient * (|A_a| - n) / n * s (1 - s), 0 elsewhere. Ensures: gradient
/// 0 at balance; overloaded experts are pushed down, underloaded ones up. A NaN counts as -inf.
///
/// Shapes: logits, dlogits [T, E] of the assignment; counts [E] of first choices, summed over a
/// group where there is one. Throws: error where a size differs, a count is negative, or
/// coefficient < 0. Cost: O(T + E), and O(T E) to clear dlogits under write. No allocation.
/// Determinism: runs on the calling thread. Source: Dai et al. 2022 (StableMoE), alpha = 0.3.
template <class F>
double stable_moe_loss(double coefficient, std::span<const double> counts, drop_stage drops,
                       const token_options& how, const assignment& a,
                       std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz) {
  constexpr const char* where = "stable_moe_loss";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_selected(where, a, z);
  detail::check_coefficient(where, coefficient);
  detail::check_counts(where, counts, z.cols);
  const count_options what{.basis = count_basis::first_choice, .drops = drops, .mask = how.mask};
  double all = 0.0, value = 0.0;
  for (const double c : counts) all += c;
  const double even = all / static_cast<double>(z.cols);
  for (index_t t = 0; t < z.rows; ++t) {
    if (how.gradient == gradient_to::write) std::fill_n(dz.row(t), z.cols, F{0});
    if (!(even > 0.0)) continue;
    detail::for_each_counted(a, what, t, [&](index_t e) {
      const double x = static_cast<double>(z(t, e));
      if (x != x) return;
      const double s = 1.0 / (1.0 + std::exp(-x));
      const double excess = coefficient * (counts[static_cast<std::size_t>(e)] - even) / even;
      value += excess * s;
      if (how.gradient != gradient_to::nowhere) dz(t, e) += static_cast<F>(excess * s * (1.0 - s));
    });
  }
  return value;
}

}  // namespace moeroute
