// Choosing the next token from logits. The same seed gives the same draws on
// every platform: the engine's bits are fixed by the standard, those of
// std::uniform_real_distribution are not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace example {

/// The largest logit's index, the lowest one among equals.
[[nodiscard]] inline std::int32_t greedy_token(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

class sampler {
 public:
  sampler(double temperature, std::uint64_t seed) : temperature_(temperature), bits_(seed) {}

  [[nodiscard]] std::int32_t operator()(std::span<const float> logits) {
    const std::int32_t best = greedy_token(logits);
    if (!(temperature_ > 0)) {
      return best;
    }
    // Running sums of exp((logit - max) / temperature); then one draw.
    sums_.resize(logits.size());
    const double top = static_cast<double>(logits[static_cast<std::size_t>(best)]);
    double sum = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      sum += std::exp((static_cast<double>(logits[i]) - top) / temperature_);
      sums_[i] = sum;
    }
    const double point = uniform() * sum;
    const auto found = std::upper_bound(sums_.begin(), sums_.end(), point);
    // Rounding, or a logit that is not a number, may leave nothing above.
    return found == sums_.end() ? best : static_cast<std::int32_t>(found - sums_.begin());
  }

 private:
  /// In [0, 1), from the 53 upper bits.
  double uniform() { return static_cast<double>(bits_() >> 11) * 0x1p-53; }

  double temperature_;
  std::mt19937_64 bits_;
  std::vector<double> sums_;
};

}  // namespace example
