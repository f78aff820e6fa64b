// Losses of how much probability each expert has in all: importance, batch entropy, mean
// importance.
#pragma once

#include <moeroute/balance/loss.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute {

/// How the squares of E deviations become a variance.
enum class variance {
  population,  ///< divided by E
  unbiased,    ///< divided by E - 1; 0 for one expert
};

namespace detail {

// factor * var(x) / (mean(x)^2 + eps), adding its derivative by x to c:
//   dCV2/dx_e = 2 (x_e - mu) / (d m) - var * 2 mu / (E m^2), m = mu^2 + eps, d = E or E - 1.
template <class A = simd::default_arch>
double squared_variation(double factor, variance kind, double eps, index_t experts, const double* x,
                         double* c) {
  const double n = static_cast<double>(experts);
  const double divisor = kind == variance::population ? n : n - 1.0;
  double mean = 0.0, squares = 0.0;
  for (index_t e = 0; e < experts; ++e) mean += x[e];
  mean /= n;
  const double m = mean * mean + eps;
  if (!(divisor > 0.0) || !(m > 0.0)) return 0.0;
  for (index_t e = 0; e < experts; ++e) squares += (x[e] - mean) * (x[e] - mean);
  const double var = squares / divisor;
  for (index_t e = 0; e < experts; ++e)
    c[e] += factor * (2.0 * (x[e] - mean) / (divisor * m) - var * 2.0 * mean / (n * m * m));
  return factor * var / m;
}

inline void check_eps(const char* where, double eps) {
  if (!(eps >= 0.0)) fail_value(where, "eps", eps, ">= 0");
}

}  // namespace detail

/// Importance: coefficient * CV^2 of I_e = sum_t p[t, e], CV^2 = var / (mean^2 + eps).
///
/// Backward: G[t, e] = coefficient * dCV2/dI_e. Ensures: >= 0, 0 iff all are equal, at most E - 1
/// (E if unbiased). Throws: error where coefficient or eps is negative.
/// Source: Riquelme et al. 2021 (V-MoE), Tutel; Shazeer et al. 2017 take it over the selected
/// gates: selected_importance_loss.
struct importance_loss {
  double coefficient = 0.01;
  variance kind = variance::population;
  double eps = 1e-10;

  void check(const loss_shape&) const {
    detail::check_coefficient("importance_loss", coefficient);
    detail::check_eps("importance_loss", eps);
  }
  double from_sums(const loss_shape& shape, const double* sum, double* c) const {
    return detail::squared_variation(coefficient, kind, eps, shape.experts, sum, c);
  }
};
static_assert(loss_term<importance_loss>);

/// SpeechMoE's mean importance: coefficient * E * sum_e (mean_t p[t, e])^2.
///
/// Backward: G[t, e] = coefficient * 2 E / T * mean_t p[t, e]. Ensures: in coefficient * [1, E].
/// Throws: error where coefficient < 0. Source: You et al. 2021.
struct mean_importance_loss {
  double coefficient = 0.1;

  void check(const loss_shape&) const {
    detail::check_coefficient("mean_importance_loss", coefficient);
  }
  double from_sums(const loss_shape& shape, const double* sum, double* c) const {
    const double n = static_cast<double>(shape.tokens);
    const double factor = coefficient * static_cast<double>(shape.experts);
    double value = 0.0;
    for (index_t e = 0; e < shape.experts; ++e) {
      const double mean = sum[e] / n;
      value += factor * mean * mean;
      c[e] += 2.0 * factor * mean / n;
    }
    return value;
  }
};
static_assert(loss_term<mean_importance_loss>);

/// Negative entropy of the batch: coefficient * sum_e pbar_e ln pbar_e, pbar the mean probability.
/// Minimising it uses all experts, whatever the single token does.
///
/// Backward: G[t, e] = coefficient * (ln pbar_e + 1) / T, 0 where pbar_e is 0. Ensures: in
/// coefficient * [-ln E, 0]. Throws: error where coefficient < 0.
struct batch_entropy_loss {
  double coefficient = 0.01;

  void check(const loss_shape&) const {
    detail::check_coefficient("batch_entropy_loss", coefficient);
  }
  double from_sums(const loss_shape& shape, const double* sum, double* c) const {
    const double n = static_cast<double>(shape.tokens);
    double value = 0.0;
    for (index_t e = 0; e < shape.experts; ++e) {
      const double mean = sum[e] / n;
      if (!(mean > 0.0)) continue;
      value += coefficient * mean * std::log(mean);
      c[e] += coefficient * (std::log(mean) + 1.0) / n;
    }
    return value;
  }
};
static_assert(loss_term<batch_entropy_loss>);

}  // namespace moeroute
