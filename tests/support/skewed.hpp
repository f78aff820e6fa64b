// The recipe of the balancing sheet: static scores with a heavy skew, and what top-k makes of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <moeroute/base/index.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <numeric>
#include <span>
#include <vector>

#include "support/random.hpp"

namespace test {

using moeroute::index_t;

/// s = sigmoid(N(0, 1) + 2 linspace(1, -1, E)).
struct skewed_scores {
  index_t tokens = 1024, experts = 16, k = 4;
  std::vector<float> score;

  explicit skewed_scores(std::uint64_t seed = 1, index_t t = 1024, index_t e = 16,
                         index_t choices = 4)
      : tokens(t), experts(e), k(choices) {
    random rng(seed);
    for (index_t i = 0; i < t; ++i)
      for (index_t j = 0; j < e; ++j) {
        const float place =
            e == 1 ? 0.0f : 2.0f - 4.0f * static_cast<float>(j) / static_cast<float>(e - 1);
        score.push_back(1.0f / (1.0f + std::exp(-(rng.normal() + place))));
      }
  }

  moeroute::matrix_view<const float> view() const { return {score.data(), tokens, experts}; }

  /// The k experts of a token by score + bias, best first, the lowest among equals.
  std::vector<index_t> choose(index_t token, std::span<const float> bias) const {
    std::vector<index_t> ids(static_cast<std::size_t>(experts));
    std::iota(ids.begin(), ids.end(), index_t{0});
    const auto value = [&](index_t e) {
      return score[static_cast<std::size_t>(token * experts + e)] +
             (bias.empty() ? 0.0f : bias[static_cast<std::size_t>(e)]);
    };
    std::stable_sort(ids.begin(), ids.end(),
                     [&](index_t a, index_t b) { return value(a) > value(b); });
    ids.resize(static_cast<std::size_t>(k));
    return ids;
  }

  std::vector<std::int64_t> counts(std::span<const float> bias = {}) const {
    std::vector<std::int64_t> n(static_cast<std::size_t>(experts), 0);
    for (index_t t = 0; t < tokens; ++t)
      for (const index_t e : choose(t, bias)) ++n[static_cast<std::size_t>(e)];
    return n;
  }

  double max_violation(std::span<const float> bias = {}) const {
    const auto n = counts(bias);
    const double mean = static_cast<double>(tokens * k) / static_cast<double>(experts);
    return static_cast<double>(*std::max_element(n.begin(), n.end())) / mean - 1.0;
  }
};

/// The rank-th largest of a list, 1 the largest; -inf where there are fewer.
inline double nth_largest(std::vector<double> list, index_t rank) {
  if (rank > static_cast<index_t>(list.size())) return -HUGE_VAL;
  std::sort(list.begin(), list.end(), std::greater<>());
  return list[static_cast<std::size_t>(rank - 1)];
}

}  // namespace test
