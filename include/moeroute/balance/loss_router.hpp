// Expert-router coupling: each expert should answer its own router row the loudest.
#pragma once

#include <moeroute/balance/loss.hpp>
#include <moeroute/base/rng.hpp>
#include <moeroute/simd/numbers.hpp>

namespace moeroute {

/// Noise for expert_router_coupling: delta[i, :] uniform in 1 +- eps_i, with
/// eps_i = min over j != i of |R_i - R_j| / (2 |R_i|), so that no noisy row is nearer to another.
///
/// Shapes: router, delta [E, d]. By counter: the same seed and step replay. One expert or a row of
/// zeros: 1. Throws: error where a size differs. Cost: O(E^2 d). No allocation.
template <class F, class A = simd::default_arch>
void fill_router_noise(std::type_identity_t<matrix_view<const F>> router, std::uint64_t seed,
                       std::uint64_t step, matrix_view<F> delta) {
  check_size("fill_router_noise", "delta.rows", delta.rows, router.rows);
  check_size("fill_router_noise", "delta.cols", delta.cols, router.cols);
  check_stride("fill_router_noise", "router", router);
  check_stride("fill_router_noise", "delta", delta);
  check_apart("fill_router_noise", "router", router, "delta", delta);
  for (index_t i = 0; i < router.rows; ++i) {
    double nearest = std::numeric_limits<double>::infinity();
    for (index_t j = 0; j < router.rows; ++j) {
      double squares = 0.0;
      for (index_t c = 0; c < router.cols; ++c) {
        const double gap = static_cast<double>(router(i, c)) - static_cast<double>(router(j, c));
        squares += gap * gap;
      }
      if (j != i) nearest = std::min(nearest, std::sqrt(squares));
    }
    const double norm =
        std::sqrt(static_cast<double>(simd::row_dot(router.row(i), router.row(i), router.cols)));
    const bool some = norm > 0.0 && std::isfinite(nearest);
    const double eps = some ? nearest / (2.0 * norm) : 0.0;
    for (index_t c = 0; c < router.cols; ++c) {
      const auto at = static_cast<std::uint64_t>(i * router.cols + c);
      const double u = static_cast<double>(random_u01(seed, 0x45524300 + step, at));
      delta(i, c) = static_cast<F>(1.0 + eps * (2.0 * u - 1.0));
    }
  }
}

struct coupling_loss {
  double coefficient = 1.0;
  double alpha = 1.0;  ///< in [0, 1]; smaller asks for more specialisation
};

/// coefficient / E^2 * sum over i != j of max(0, M_ij - alpha M_ii) + max(0, M_ji - alpha M_ii),
/// with M_ij = |W_j (R_i * delta_i)|_2.
///
/// Backward, g[a, b] = d value / d M_ab: +coefficient / E^2 for every active hinge that M_ab
/// raises, g[i, i] -= alpha * coefficient / E^2 for every active hinge of i;
///   dR_i = delta_i * sum_j g_ij / M_ij W_j^T W_j (R_i * delta_i),
///   dW_j = sum_i g_ij / M_ij (W_j (R_i * delta_i)) (R_i * delta_i)^T; delta is a constant.
///
/// Shapes: router, delta, drouter [E, d]; expert, dexpert [E * H, d], expert j at rows [j H, (j+1)
/// H). drouter and dexpert are overwritten (write), added to (add) or not touched (nowhere).
/// Ensures: 0 where M_ii leads its row and column by the factor 1 / alpha; a M of 0 has no
/// gradient. Throws: error where a size differs, coefficient < 0, or alpha is outside [0, 1]. Cost:
/// O(E^2 H d), three times that with gradients; independent of the tokens. Scratch: 2 E^2, and d +
/// H per worker. No allocation once warm. Determinism: the same bits for every executor and thread
/// count. Source: expert-router coupling (ERC) 2025, arXiv 2512.23447.
template <class F, executor Exec, class A = simd::default_arch>
double expert_router_coupling(const coupling_loss& loss, gradient_to to,
                              std::type_identity_t<matrix_view<const F>> router,
                              std::type_identity_t<matrix_view<const F>> delta,
                              std::type_identity_t<matrix_view<const F>> expert,
                              matrix_view<F> drouter, matrix_view<F> dexpert, workspace& ws,
                              const Exec& exec) {
  constexpr const char* where = "expert_router_coupling";
  const index_t experts = router.rows, d = router.cols;
  check_range(where, "experts", experts, 1, max_experts);
  check_size(where, "delta.rows", delta.rows, experts);
  check_size(where, "delta.cols", delta.cols, d);
  check_size(where, "expert.rows % experts", expert.rows % experts, 0);
  check_size(where, "expert.cols", expert.cols, d);
  check_stride(where, "router", router);
  check_stride(where, "delta", delta);
  check_stride(where, "expert", expert);
  detail::check_coefficient(where, loss.coefficient);
  if (!(loss.alpha >= 0.0 && loss.alpha <= 1.0)) fail_value(where, "alpha", loss.alpha, "0 to 1");
  if (to != gradient_to::nowhere) {
    check_size(where, "drouter.rows", drouter.rows, experts);
    check_size(where, "drouter.cols", drouter.cols, d);
    check_size(where, "dexpert.rows", dexpert.rows, expert.rows);
    check_size(where, "dexpert.cols", dexpert.cols, d);
    check_stride(where, "drouter", drouter);
    check_stride(where, "dexpert", dexpert);
    check_apart(where, "drouter", drouter, "dexpert", dexpert);
    for (const auto& from : {router, delta, expert}) {
      check_apart(where, "router, delta or expert", from, "drouter", drouter);
      check_apart(where, "router, delta or expert", from, "dexpert", dexpert);
    }
  }
  const index_t hidden = expert.rows / experts;
  worker_slots slots(exec.concurrency());
  struct memory {
    double *norm, *slope, *sum;
    F *row, *answer;
  };
  const int workers = worker_slots::count(exec.concurrency());
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<double>(experts * experts), tape.take<double>(experts * experts),
                  tape.take<double>(workers * d), tape.take<F>(experts * d),
                  tape.take<F>(workers * hidden)};
  });
  for (index_t i = 0; i < experts; ++i)
    for (index_t c = 0; c < d; ++c) m.row[i * d + c] = router(i, c) * delta(i, c);
  // answer = W_j row_i; returns its norm.
  const auto ask = [&](index_t i, index_t j, F* answer) {
    double squares = 0.0;
    for (index_t h = 0; h < hidden; ++h) {
      answer[h] = simd::row_dot(expert.row(j * hidden + h), m.row + i * d, d);
      squares += static_cast<double>(answer[h]) * static_cast<double>(answer[h]);
    }
    return std::sqrt(squares);
  };
  exec.parallel_for(experts, 1, [&](index_t i, index_t) {
    const worker_slots::held worker(slots);
    for (index_t j = 0; j < experts; ++j)
      m.norm[i * experts + j] = ask(i, j, m.answer + worker * hidden);
  });
  // Forward and g at once.
  const double unit =
      loss.coefficient / (static_cast<double>(experts) * static_cast<double>(experts));
  double value = 0.0;
  std::fill_n(m.slope, experts * experts, 0.0);
  for (index_t i = 0; i < experts; ++i)
    for (index_t j = 0; j < experts; ++j) {
      if (i == j) continue;
      for (const index_t at : {i * experts + j, j * experts + i}) {
        const double hinge = m.norm[at] - loss.alpha * m.norm[i * experts + i];
        if (!(hinge > 0.0)) continue;
        value += unit * hinge;
        m.slope[at] += unit;
        m.slope[i * experts + i] -= loss.alpha * unit;
      }
    }
  if (to == gradient_to::nowhere) return value;
  const auto weight = [&](index_t i, index_t j) {
    const double norm = m.norm[i * experts + j];
    return norm > 0.0 ? m.slope[i * experts + j] / norm : 0.0;
  };
  exec.parallel_for(experts, 1, [&](index_t i, index_t) {
    const worker_slots::held worker(slots);
    double* const sum = m.sum + worker * d;
    F* const answer = m.answer + worker * hidden;
    std::fill_n(sum, d, 0.0);
    for (index_t j = 0; j < experts; ++j) {
      const double w = weight(i, j);
      if (w == 0.0) continue;
      ask(i, j, answer);
      for (index_t h = 0; h < hidden; ++h) {
        const double x = w * static_cast<double>(answer[h]);
        const F* const from = expert.row(j * hidden + h);
        for (index_t c = 0; c < d; ++c) sum[c] += x * static_cast<double>(from[c]);
      }
    }
    for (index_t c = 0; c < d; ++c) {
      const F g = static_cast<F>(sum[c]) * delta(i, c);
      drouter(i, c) = to == gradient_to::add ? drouter(i, c) + g : g;
    }
  });
  exec.parallel_for(experts, 1, [&](index_t j, index_t) {
    const worker_slots::held worker(slots);
    F* const answer = m.answer + worker * hidden;
    if (to == gradient_to::write)
      for (index_t h = 0; h < hidden; ++h) std::fill_n(dexpert.row(j * hidden + h), d, F{0});
    for (index_t i = 0; i < experts; ++i) {
      const double w = weight(i, j);
      if (w == 0.0) continue;
      ask(i, j, answer);
      for (index_t h = 0; h < hidden; ++h) {
        const F x = static_cast<F>(w * static_cast<double>(answer[h]));
        F* const out = dexpert.row(j * hidden + h);
        for (index_t c = 0; c < d; ++c) out[c] += x * m.row[i * d + c];
      }
    }
  });
  return value;
}

}  // namespace moeroute
