// Baseline of routing: std::partial_sort over the row, then the weights by std::exp.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "support/plain_selection.hpp"

namespace bench {

/// What the weights of a plain softmax gate are divided by.
enum class plain_divisor { row, winners };

/// Softmax over the row (or over the winners, which is the same as renormalising) and the k best of
/// it.
inline void plain_softmax_gate(plain_selection& select, const float* row, index_t experts,
                               index_t k, plain_divisor divisor, std::int32_t* id, float* weight) {
  select.partial_sort(row, experts, k, id, weight);
  const float max = weight[0];
  float sum = 0.0f;
  if (divisor == plain_divisor::row)
    for (index_t e = 0; e < experts; ++e) sum += row[e] == row[e] ? std::exp(row[e] - max) : 0.0f;
  for (index_t r = 0; r < k; ++r) {
    weight[r] = std::exp(weight[r] - max);
    if (divisor == plain_divisor::winners) sum += weight[r];
  }
  for (index_t r = 0; r < k; ++r) weight[r] /= sum;
}

}  // namespace bench
