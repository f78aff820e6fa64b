// Experts that multiply each column by a weight of their own: the smallest with a gradient.
#pragma once

#include <cstdint>
#include <moeroute/base/index.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <vector>

#include "support/random.hpp"

namespace test {

struct column_experts {
  moeroute::index_t d;
  std::vector<float> weight, gradient;  ///< [E, d]

  column_experts(moeroute::index_t experts, moeroute::index_t cols, std::uint64_t seed = 11)
      : d(cols), weight(static_cast<std::size_t>(experts * cols)), gradient(weight.size(), 0.0f) {
    random rng(seed);
    for (float& w : weight) w = rng.normal();
  }

  void forward(moeroute::index_t e, moeroute::matrix_view<const float> in,
               moeroute::matrix_view<float> out) const {
    for (moeroute::index_t r = 0; r < in.rows; ++r)
      for (moeroute::index_t j = 0; j < d; ++j)
        out(r, j) = weight[static_cast<std::size_t>(e * d + j)] * in(r, j);
  }
  void backward(moeroute::index_t e, moeroute::matrix_view<const float> in,
                moeroute::matrix_view<const float> dout, moeroute::matrix_view<float> din) {
    for (moeroute::index_t r = 0; r < in.rows; ++r)
      for (moeroute::index_t j = 0; j < d; ++j) {
        const auto at = static_cast<std::size_t>(e * d + j);
        din(r, j) = weight[at] * dout(r, j);
        gradient[at] += dout(r, j) * in(r, j);
      }
  }
};

}  // namespace test
