// The load loss of noisy top-k: the expected number of tokens per expert, smooth in the logits.
#pragma once

#include <moeroute/balance/loss_sums.hpp>

namespace moeroute {

/// What a logit must exceed to be selected under fresh noise of its own.
enum class load_threshold {
  without_self,  ///< the k-th largest noisy logit of the others (Shazeer et al. 2017)
  kth,           ///< the k-th largest noisy logit, for every expert (Tutel, V-MoE)
};

struct load_loss {
  double coefficient = 0.01;
  index_t k = 1;
  load_threshold threshold = load_threshold::without_self;
  variance kind = variance::population;
  double eps = 1e-10;
};

namespace detail {

// A row's k-th and (k + 1)-th largest noisy logits and their experts; -inf and -1 where there are
// none. Equal logits: the lower expert first.
struct load_bound {
  double value[2];
  std::int32_t expert[2];

  // What expert e with noisy logit h has to exceed: 0 or 1.
  int of(double h, index_t e) const {
    const bool inside = expert[0] < 0 || h > value[0] || (h == value[0] && e <= index_t{expert[0]});
    return inside ? 1 : 0;
  }
};

struct load_candidate {
  double logit;
  std::int32_t expert;
};

template <class F>
load_bound bound_of(const F* h, index_t experts, index_t k, load_candidate* best) {
  // The k + 1 largest, kept in order by insertion.
  const index_t most = std::min(k + 1, experts);
  index_t n = 0;
  for (index_t e = 0; e < experts; ++e) {
    const double x = static_cast<double>(h[e]);
    if (!(x > -std::numeric_limits<double>::infinity())) continue;
    if (n == most && !(x > best[n - 1].logit)) continue;
    index_t at = n < most ? n++ : n - 1;
    for (; at > 0 && x > best[at - 1].logit; --at) best[at] = best[at - 1];
    best[at] = {x, static_cast<std::int32_t>(e)};
  }
  load_bound b{{-std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()},
               {-1, -1}};
  for (index_t i = 0; i < 2; ++i)
    if (k - 1 + i < n) {
      b.value[i] = best[k - 1 + i].logit;
      b.expert[i] = best[k - 1 + i].expert;
    }
  return b;
}

}  // namespace detail

/// coefficient * CV^2 of Load_e = sum_t Phi((z[t, e] - th) / sigma[t, e]), th the threshold among
/// the noisy logits h = z + n * sigma, n a constant.
///
/// Backward, with u = (z - th) / sigma and w = coefficient * dCV2/dLoad_e * phi(u) / sigma:
///   dz[t, e] += w, dz[t, expert of th] -= w,
/// and where sigma is learned, th = z + n * sigma of its expert:
///   dsigma[t, e] -= w u, dsigma[t, expert of th] -= w n.
///
/// Shapes: logits, noisy, dlogits [T, E]; sigma [T, E] > 0, or [1, 1] for one value; dsigma [T, E],
/// or empty where it is not wanted. Ensures: a NaN
/// counts as -inf; where logit and threshold are both infinite the expert has no probability and no
/// gradient. No threshold (k = E): probability 1. Masked tokens take no part.
/// Throws: error where a size differs, k is outside [1, E], or coefficient or eps is negative.
/// Cost: two sweeps with an error function per element. Scratch: T / 64 rows, 2 thresholds per
/// token. No allocation once warm. Determinism: the same bits for every executor and thread count.
/// Source: Shazeer et al. 2017; Tutel.
template <class F, executor Exec>
double noisy_load_loss(const load_loss& loss, const token_options& how,
                       std::type_identity_t<matrix_view<const F>> z,
                       std::type_identity_t<matrix_view<const F>> noisy,
                       std::type_identity_t<matrix_view<const F>> sigma, matrix_view<F> dz,
                       std::type_identity_t<matrix_view<F>> dsigma, workspace& ws,
                       const Exec& exec) {
  constexpr const char* where = "load_loss";
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  detail::check_eps(where, loss.eps);
  check_range(where, "k", loss.k, 1, z.cols);
  check_size(where, "noisy.rows", noisy.rows, z.rows);
  check_size(where, "noisy.cols", noisy.cols, z.cols);
  const bool constant = sigma.rows == 1 && sigma.cols == 1;
  if (!constant) {
    check_size(where, "sigma.rows", sigma.rows, z.rows);
    check_size(where, "sigma.cols", sigma.cols, z.cols);
  }
  const bool learned = dsigma.data != nullptr && how.gradient != gradient_to::nowhere;
  if (learned) {
    if (constant) fail(where, "dsigma is given, expected sigma of [T, E]");
    check_size(where, "dsigma.rows", dsigma.rows, z.rows);
    check_size(where, "dsigma.cols", dsigma.cols, z.cols);
  }
  const index_t experts = z.cols, grain = detail::loss_grain(z.rows);
  const index_t pieces = ceil_div(z.rows, grain);
  using candidate = detail::load_candidate;
  worker_slots slots(exec.concurrency());
  struct memory {
    double *sum, *slope, *total;
    detail::load_bound* bound;
    candidate* best;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<double>(pieces * experts), tape.take<double>(experts),
                  tape.take<double>(experts), tape.take<detail::load_bound>(z.rows),
                  tape.take<candidate>(worker_slots::count(exec.concurrency()) * (loss.k + 1))};
  });
  // u and 1 / sigma of one element; NaN where there is no probability.
  const auto distance = [&](index_t t, index_t e, int which, double& inverse) {
    inverse = 1.0 / static_cast<double>(constant ? sigma(0, 0) : sigma(t, e));
    return (static_cast<double>(z(t, e)) - m.bound[t].value[which]) * inverse;
  };
  const auto threshold_of = [&](index_t t, index_t e) {
    return loss.threshold == load_threshold::kth
               ? 0
               : m.bound[t].of(static_cast<double>(noisy(t, e)), e);
  };
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    double* const sum = m.sum + begin / grain * experts;
    std::fill_n(sum, experts, 0.0);
    for (index_t t = begin; t < end; ++t) {
      if (how.masked(t)) continue;
      m.bound[t] = detail::bound_of(noisy.row(t), experts, loss.k, m.best + worker * (loss.k + 1));
      for (index_t e = 0; e < experts; ++e) {
        double inverse;
        const double u = distance(t, e, threshold_of(t, e), inverse);
        if (u == u) sum[e] += 0.5 * std::erfc(-u * 0.70710678118654752);
      }
    }
  });
  std::fill_n(m.total, experts, 0.0);
  std::fill_n(m.slope, experts, 0.0);
  for (index_t p = 0; p < pieces; ++p)
    for (index_t e = 0; e < experts; ++e) m.total[e] += m.sum[p * experts + e];
  const double value =
      detail::squared_variation(loss.coefficient, loss.kind, loss.eps, experts, m.total, m.slope);
  if (how.gradient == gradient_to::nowhere) return value;
  exec.parallel_for(z.rows, grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      F* const out = dz.row(t);
      if (how.gradient == gradient_to::write) {
        std::fill_n(out, experts, F{0});
        if (learned) std::fill_n(dsigma.row(t), experts, F{0});
      }
      if (how.masked(t)) continue;
      double away[2] = {0.0, 0.0};
      for (index_t e = 0; e < experts; ++e) {
        double inverse;
        const int which = threshold_of(t, e);
        const double u = distance(t, e, which, inverse);
        if (!std::isfinite(u)) continue;
        const double w = m.slope[e] * 0.39894228040143268 * std::exp(-0.5 * u * u) * inverse;
        out[e] += static_cast<F>(w);
        if (learned) dsigma(t, e) -= static_cast<F>(w * u);
        away[which] += w;
      }
      for (int i = 0; i < 2; ++i) {
        const index_t th = m.bound[t].expert[i];
        if (th < 0 || away[i] == 0.0) continue;
        out[th] -= static_cast<F>(away[i]);
        if (!learned) continue;
        const double noise = (m.bound[t].value[i] - static_cast<double>(z(t, th))) /
                             static_cast<double>(sigma(t, th));
        dsigma(t, th) -= static_cast<F>(away[i] * noise);
      }
    }
  });
  return value;
}
template <class F, executor Exec>
double noisy_load_loss(const load_loss& loss, const token_options& how,
                       std::type_identity_t<matrix_view<const F>> z,
                       std::type_identity_t<matrix_view<const F>> noisy,
                       std::type_identity_t<matrix_view<const F>> sigma, matrix_view<F> dz,
                       workspace& ws, const Exec& exec) {
  return noisy_load_loss<F>(loss, how, z, noisy, sigma, dz, {}, ws, exec);
}

/// From the gradient by sigma to that by the noise logits x of sigma = softplus(x) + floor, in
/// place: dx = dsigma * sigmoid(x), and sigmoid(x) = 1 - exp(floor - sigma).
///
/// Shapes: both [T, E]. Throws: error where a size differs. Source: Shazeer et al. 2017.
template <class F>
void noise_logit_gradient(std::type_identity_t<matrix_view<const F>> sigma, double floor,
                          matrix_view<F> dsigma) {
  constexpr const char* where = "noise_logit_gradient";
  check_size(where, "sigma.rows", sigma.rows, dsigma.rows);
  check_size(where, "sigma.cols", sigma.cols, dsigma.cols);
  for (index_t t = 0; t < dsigma.rows; ++t)
    for (index_t e = 0; e < dsigma.cols; ++e)
      dsigma(t, e) = static_cast<F>(static_cast<double>(dsigma(t, e)) *
                                    -std::expm1(floor - static_cast<double>(sigma(t, e))));
}

}  // namespace moeroute
