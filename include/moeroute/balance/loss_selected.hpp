// Losses of the selected experts alone: Shazeer's importance over the gates, StableMoE's balance.
#pragma once

#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/simd/numbers.hpp>

namespace moeroute {

namespace detail {

template <class A, class F>
void check_selected(const char* where, const assignment& a, const matrix_view<const F>& z) {
  check_size(where, "assignment.tokens", a.tokens(), z.rows);
  check_size(where, "assignment.experts", a.experts(), z.cols);
  check_choices<A>(where, a);
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
/// to clear dlogits under write. Scratch: T / 64 rows, two numbers per choice. No
/// allocation once warm. Determinism: the same bits for every executor and thread count. Source:
/// Shazeer et al. 2017.
template <class F, executor Exec, class A = simd::default_arch>
double selected_importance_loss(const importance_loss& loss, drop_stage drops,
                                const token_options& how, const assignment& a,
                                std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz,
                                workspace& ws, const Exec& exec) {
  constexpr const char* where = "selected_importance_loss";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_selected<A>(where, a, z);
  detail::check_coefficient(where, loss.coefficient);
  detail::check_eps(where, loss.eps);
  const count_options what{.drops = drops, .mask = how.mask};
  const index_t experts = z.cols, grain = detail::loss_grain(z.rows);
  const index_t pieces = ceil_div(z.rows, grain);
  struct memory {
    double *total, *slope_of_total;
    F *sum, *slope;
    F* gate;               // [choices], those that count first among a token's
    std::int32_t* expert;  // [choices], likewise
    std::int32_t* count;   // [T]
  };
  const auto choices = static_cast<index_t>(a.ids().size());
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<double>(experts),     tape.take<double>(experts),
                  tape.take<F>(pieces * experts), tape.take<F>(experts),
                  tape.take<F>(choices),          tape.take<std::int32_t>(choices),
                  tape.take<std::int32_t>(z.rows)};
  });
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    F* const piece = m.sum + begin / grain * experts;
    std::fill_n(piece, experts, F{0});
    for (index_t t = begin; t < end; ++t) {
      const F* const x = z.row(t);
      F* const gate = m.gate + a.first(t);
      std::int32_t* const expert = m.expert + a.first(t);
      std::int32_t n = 0;
      detail::for_each_counted(a, what, t, [&](index_t e) {
        gate[n] = x[e];
        expert[n++] = static_cast<std::int32_t>(e);
      });
      m.count[t] = n;
      simd::softmax_in_place(gate, n);
      for (std::int32_t i = 0; i < n; ++i) piece[expert[i]] += gate[i];
    }
  });
  std::fill_n(m.total, experts, 0.0);
  std::fill_n(m.slope_of_total, experts, 0.0);
  for (index_t p = 0; p < pieces; ++p)
    for (index_t e = 0; e < experts; ++e) m.total[e] += static_cast<double>(m.sum[p * experts + e]);
  const double value = detail::squared_variation(loss.coefficient, loss.kind, loss.eps, experts,
                                                 m.total, m.slope_of_total);
  if (how.gradient == gradient_to::nowhere) return value;
  for (index_t e = 0; e < experts; ++e) m.slope[e] = static_cast<F>(m.slope_of_total[e]);
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      F* const out = dz.row(t);
      if (how.gradient == gradient_to::write) std::fill_n(out, experts, F{0});
      const F* const x = z.row(t);
      const F* const gate = m.gate + a.first(t);
      const std::int32_t* const expert = m.expert + a.first(t);
      F mean = 0;
      bool finite = true;
      for (std::int32_t i = 0; i < m.count[t]; ++i) {
        mean += gate[i] * m.slope[expert[i]];
        finite = finite && !(x[expert[i]] == std::numeric_limits<F>::infinity());
      }
      if (!finite) continue;
      for (std::int32_t i = 0; i < m.count[t]; ++i)
        out[expert[i]] +=
            static_cast<F>(static_cast<double>(gate[i]) * (m.slope[expert[i]] - mean));
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
template <class F, class A = simd::default_arch>
double stable_moe_loss(double coefficient, std::span<const double> counts, drop_stage drops,
                       const token_options& how, const assignment& a,
                       std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz) {
  constexpr const char* where = "stable_moe_loss";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_selected<A>(where, a, z);
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
