// A gradient against central differences of the value beside it.
#pragma once

#include <string>
#include <vector>

#include "oracle/losses.hpp"
#include "support/compare.hpp"

namespace test {

/// value(x, gradient) fills the gradient (if not null) and returns the value. Empty where the
/// gradient is the derivative by 1e-7.
template <class Value>
std::string gradient_difference(const oracle::row& x, Value value) {
  oracle::row gradient(x.size(), 3.0);
  value(x, &gradient);
  const oracle::row slope =
      oracle::derivative(x, [&](const oracle::row& moved) { return value(moved, nullptr); });
  return difference(gradient, slope, 1e-7, 2e-9);
}

}  // namespace test
