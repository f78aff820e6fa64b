// One loss of the engine against a formula of the oracle.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/losses.hpp"

namespace test {

/// What differs: the value in double (1e-12) and float (1e-5), the gradient in double from central
/// differences of the formula (1e-7), and in float from that in double. Empty where nothing does.
template <class L, class Formula>
std::string disagreement(const oracle::batch& b, const moeroute::loss_options& how, const L& loss,
                         Formula formula) {
  const double expected = formula(b);
  const auto exact = run_losses<double>(b, how, loss);
  if (!(std::abs(exact.values[0] - expected) <= 1e-12 * (1.0 + std::abs(expected))))
    return "value " + shown(exact.values[0]) + ", expected " + shown(expected);
  const oracle::row slope = oracle::derivative(b.logits, [&](const oracle::row& z) {
    oracle::batch moved = b;
    moved.logits = z;
    return formula(moved);
  });
  std::string found = difference(exact.gradient, slope, 1e-7, 1e-10);
  if (!found.empty()) return "gradient " + found;
  const auto single = run_losses<float>(b, how, loss);
  if (!(std::abs(single.values[0] - expected) <= 1e-5 * (0.1 + std::abs(expected))))
    return "float value " + shown(single.values[0]) + ", expected " + shown(expected);
  found = difference(single.gradient, exact.gradient, 1e-4, 2e-7);
  return found.empty() ? "" : "float gradient " + found;
}

/// What a loss with a function of its own gives in float and not in double: the value (1e-5), the
/// gradient (1e-4, or 1e-5 of the largest one, or 2e-8: what is left of 1 - 1), what it adds to a
/// gradient that is there. Empty where nothing differs. run(logits, dlogits, gradient_to) returns
/// the value.
template <class Run>
std::string float_disagreement(const oracle::batch& b, Run run) {
  using moeroute::gradient_to;
  using moeroute::matrix_view;
  const std::vector<float> z(b.logits.begin(), b.logits.end());
  const oracle::row wide(z.begin(), z.end());
  oracle::row exact(z.size(), 7.0);
  std::vector<float> written(z.size(), 7.0f), added(z.size(), 1.0f);
  const matrix_view<const float> logits(z.data(), b.tokens, b.experts);
  const double expected =
      run(matrix_view<const double>(wide.data(), b.tokens, b.experts),
          matrix_view<double>(exact.data(), b.tokens, b.experts), gradient_to::write);
  const double value =
      run(logits, matrix_view<float>(written.data(), b.tokens, b.experts), gradient_to::write);
  run(logits, matrix_view<float>(added.data(), b.tokens, b.experts), gradient_to::add);
  if (!(std::abs(value - expected) <= 1e-5 * (0.1 + std::abs(expected))))
    return "value " + shown(value) + ", expected " + shown(expected);
  double tolerance = 2e-8;
  for (const double g : exact) tolerance = std::max(tolerance, 1e-5 * std::abs(g));
  std::string found = difference(written, exact, 1e-4, tolerance);
  if (!found.empty()) return "gradient " + found;
  for (double& g : exact) g += 1.0;
  found = difference(added, exact, 3e-5, tolerance);
  return found.empty() ? "" : "added gradient " + found;
}

}  // namespace test
