// One loss of the engine against a formula of the oracle.
#pragma once

#include <cmath>
#include <string>

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

}  // namespace test
