// Dirichlet-prior shaping: the probabilities of each expert over the batch should look like draws
// from a Dirichlet distribution.
#pragma once

#include <moeroute/balance/loss.hpp>

namespace moeroute {

namespace detail {

// log(Gamma(x)) for x > 0. std::lgamma writes a global variable, so that callers on several threads
// race for it. Stirling's series (DLMF 5.11.1) from 16 on, where its ninth term is below 1e-17;
// below by the recurrence Gamma(x + 1) = x Gamma(x).
inline double log_gamma(double x) {
  double product = 1.0;
  for (; x < 16.0; x += 1.0) product *= x;
  constexpr double term[] = {1.0 / 12.0,   -1.0 / 360.0,      1.0 / 1260.0, -1.0 / 1680.0,
                             1.0 / 1188.0, -691.0 / 360360.0, 1.0 / 156.0,  -3617.0 / 122400.0};
  const double inverse_square = 1.0 / (x * x);
  double series = 0.0;
  for (int i = 7; i >= 0; --i) series = series * inverse_square + term[i];
  constexpr double half_log_of_two_pi = 0.91893853320467274178;
  return (x - 0.5) * std::log(x) - x + half_log_of_two_pi + series / x - std::log(product);
}

// The continued fraction of the incomplete beta function, by modified Lentz, for
// x < (a + 1) / (a + b + 2); it takes some 5 a^(1/3) steps, 11000 where a is 1e10.
inline double beta_fraction(double a, double b, double x) {
  constexpr double tiny = 1e-300;
  const auto away_from_zero = [](double v) { return std::abs(v) < tiny ? tiny : v; };
  double c = 1.0, d = 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0)), fraction = d;
  for (int m = 1; m <= 20000; ++m) {
    const double n = m;
    const double even = n * (b - n) * x / ((a + 2.0 * n - 1.0) * (a + 2.0 * n));
    d = 1.0 / away_from_zero(1.0 + even * d);
    c = away_from_zero(1.0 + even / c);
    fraction *= d * c;
    const double odd = -(a + n) * (a + b + n) * x / ((a + 2.0 * n) * (a + 2.0 * n + 1.0));
    d = 1.0 / away_from_zero(1.0 + odd * d);
    c = away_from_zero(1.0 + odd / c);
    fraction *= d * c;
    if (std::abs(d * c - 1.0) < 1e-15) break;
  }
  return fraction;
}

}  // namespace detail

/// The beta distribution with parameters a, b > 0: the marginal of a Dirichlet.
///
/// Accurate to 1e-14 (1 + a + b), for parameters of at most 1e10.
/// Source: the continued fraction of the regularised incomplete beta function, DLMF 8.17.22.
class beta_distribution {
 public:
  beta_distribution(double a, double b)
      : a_(a),
        b_(b),
        log_beta_(detail::log_gamma(a) + detail::log_gamma(b) - detail::log_gamma(a + b)) {}

  /// I_x(a, b), the share below x; x in [0, 1].
  double cdf(double x) const { return cdf_from(x, front(x)); }

  /// Its density at x in (0, 1).
  double pdf(double x) const { return front(x) / (x * (1.0 - x)); }

  struct cdf_and_pdf {
    double cdf, pdf;
  };
  /// Both at x in (0, 1), for little more than one.
  cdf_and_pdf at(double x) const {
    const double f = front(x);
    return {cdf_from(x, f), f / (x * (1.0 - x))};
  }

 private:
  // x^a (1 - x)^b / B(a, b).
  double front(double x) const {
    return std::exp(a_ * std::log(x) + b_ * std::log1p(-x) - log_beta_);
  }
  double cdf_from(double x, double f) const {
    return x < (a_ + 1.0) / (a_ + b_ + 2.0) ? f / a_ * detail::beta_fraction(a_, b_, x)
                                            : 1.0 - f / b_ * detail::beta_fraction(b_, a_, 1.0 - x);
  }

  double a_, b_, log_beta_;
};

struct dirichlet_prior_loss {
  double coefficient = 0.01;
  std::span<const double> alpha{};  ///< [E], > 0: all alike is balanced, below 1 confident
  double clamp = 1e-6;  ///< p is kept in [clamp, 1 - clamp], where the density is finite
};

/// coefficient / (T E) * sum over experts and tokens of (ecdf - F_e(p[t, e]))^2, p the softmax, F_e
/// the beta distribution (alpha_e, A - alpha_e), A = sum alpha; ecdf = r / (T + 1) for the r-th
/// smallest of an expert's T values, equal ones by token, is a constant.
///
/// Backward: G[t, e] = -2 coefficient / (T E) * (ecdf - F_e(p)) f_e(p), 0 where p is clamped; then
/// dz[t, i] = p_i * (G_i - sum_j p_j G_j).
///
/// Shapes: logits, dlogits [T, E], E >= 2 (with one expert there is nothing to shape: 0), float or
/// double. Ensures: masked tokens take no part; a NaN counts as -inf, rows with +inf or without a
/// logit above -inf have no gradient. 0 where the values are the quantiles r / (T + 1) themselves.
/// Throws: error where a size differs, an alpha is not > 0, coefficient < 0, or clamp is outside
/// (0, 0.5).
/// Cost: three sweeps, a sort of each column and an incomplete beta function per element, which is
/// what takes the time: for the first steps of a training. Scratch: 18 numbers per token. No
/// allocation once warm. Determinism: the same bits for every executor and thread count.
/// Source: Dirichlet-prior shaping of routers (DPSL).
template <class F, executor Exec, class A = simd::default_arch>
double dirichlet_prior(const dirichlet_prior_loss& loss, const token_options& how,
                       std::type_identity_t<matrix_view<const F>> z, matrix_view<F> dz,
                       workspace& ws, const Exec& exec) {
  constexpr const char* where = "dirichlet_prior";
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const index_t experts = z.cols, tokens = z.rows;
  detail::check_loss_shapes(where, how.gradient, how.mask, z, dz);
  detail::check_coefficient(where, loss.coefficient);
  check_size(where, "alpha.size", static_cast<index_t>(loss.alpha.size()), experts);
  if (!(loss.clamp > 0.0 && loss.clamp < 0.5)) fail(where, "clamp is not between 0 and 0.5");
  double all = 0.0;
  for (const double a : loss.alpha) {
    if (!(a > 0.0) || std::isinf(a)) fail_value(where, "an alpha", a, "> 0");
    all += a;
  }
  const bool writes = how.gradient != gradient_to::nowhere;
  if (how.gradient == gradient_to::write)
    for (index_t t = 0; t < tokens; ++t) std::fill_n(dz.row(t), experts, F{0});
  const index_t live = detail::live_tokens(how, tokens);
  if (live == 0 || experts == 1) return 0.0;

  struct draw {
    double p;
    std::int32_t token;
  };
  // At most 16 groups of experts, each with its own share of sum_j p_j G_j for every token.
  const index_t grain = ceil_div(experts, 16);
  const index_t groups = ceil_div(experts, grain);
  worker_slots slots(exec.concurrency());
  struct memory {
    double *lse, *dot, *value;
    draw* column;
    beta_distribution* prior;
  };
  const memory m = ws.carve([&](scratch& tape) {
    return memory{tape.take<double>(tokens), tape.take<double>(groups * tokens),
                  tape.take<double>(groups),
                  tape.take<draw>(worker_slots::count(exec.concurrency()) * tokens),
                  tape.take<beta_distribution>(experts)};
  });
  for (index_t e = 0; e < experts; ++e) {
    const double a = loss.alpha[static_cast<std::size_t>(e)];
    new (m.prior + e) beta_distribution(a, all - a);
  }
  const index_t rows = detail::loss_grain(tokens);
  exec.parallel_for(tokens, rows, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      double top = -infinity, sum = 0.0;
      for (index_t e = 0; e < experts; ++e) top = std::max(top, static_cast<double>(z(t, e)));
      for (index_t e = 0; e < experts; ++e) {
        const double x = static_cast<double>(z(t, e));
        if (x == x) sum += std::exp(x - top);
      }
      m.lse[t] = std::isfinite(top) ? top + std::log(sum) : infinity;
    }
  });
  const auto probability_of = [&](index_t t, index_t e) {
    const double x = static_cast<double>(z(t, e));
    return x < infinity ? std::exp(x - m.lse[t]) : 0.0;  // 0 as well where lse is infinite
  };
  const double n = static_cast<double>(live);
  const double factor = loss.coefficient / (n * static_cast<double>(experts));
  exec.parallel_for(experts, grain, [&](index_t begin, index_t end) {
    const worker_slots::held worker(slots);
    draw* const column = m.column + worker * tokens;
    double* const dot = m.dot + begin / grain * tokens;
    std::fill_n(dot, tokens, 0.0);
    double value = 0.0;
    for (index_t e = begin; e < end; ++e) {
      index_t size = 0;
      for (index_t t = 0; t < tokens; ++t)
        if (!how.masked(t)) column[size++] = {probability_of(t, e), static_cast<std::int32_t>(t)};
      std::sort(column, column + size, [](const draw& a, const draw& b) {
        return a.p != b.p ? a.p < b.p : a.token < b.token;
      });
      for (index_t r = 0; r < size; ++r) {
        const double p = column[r].p;
        const index_t t = column[r].token;
        const double inside = std::clamp(p, loss.clamp, 1.0 - loss.clamp);
        const auto prior = m.prior[e].at(inside);
        const double miss = static_cast<double>(r + 1) / (n + 1.0) - prior.cdf;
        value += factor * miss * miss;
        if (!writes || p != inside) continue;
        const double pull = -2.0 * factor * miss * prior.pdf * p;
        dz(t, e) += static_cast<F>(pull);
        dot[t] += pull;
      }
    }
    m.value[begin / grain] = value;
  });
  double value = 0.0;
  for (index_t g = 0; g < groups; ++g) value += m.value[g];
  if (!writes) return value;
  exec.parallel_for(tokens, rows, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      if (how.masked(t)) continue;
      double mean = 0.0;
      for (index_t g = 0; g < groups; ++g) mean += m.dot[g * tokens + t];
      for (index_t e = 0; e < experts; ++e) dz(t, e) -= static_cast<F>(probability_of(t, e) * mean);
    }
  });
  return value;
}

}  // namespace moeroute
