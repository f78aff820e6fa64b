// Random assignments with their plans, the fast and the slow one, and matrices to go through them.
#pragma once

#include <cstdint>
#include <moeroute/data/assignment.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/stage/plan.hpp>
#include <span>
#include <vector>

#include "oracle/layer.hpp"
#include "support/random.hpp"

namespace test {

using moeroute::index_t;

inline moeroute::row_matrix<float> random_rows(index_t rows, index_t cols, std::uint64_t seed = 9) {
  random rng(seed);
  moeroute::row_matrix<float> m(rows, cols);
  for (index_t i = 0; i < m.size(); ++i) m.data()[i] = rng.normal();
  return m;
}

template <class T>
std::span<const T> values(const moeroute::row_matrix<T>& m) {
  return {m.data(), static_cast<std::size_t>(m.size())};
}

/// k different random experts per token, of which one in eight is missing; random weights.
struct planned {
  moeroute::assignment choices;
  moeroute::dispatch_plan plan;
  oracle::plan slow;

  planned(index_t tokens, index_t experts, index_t k, std::uint64_t seed = 4) {
    random rng(seed);
    choices.reset(tokens, experts, k);
    for (index_t t = 0; t < tokens; ++t) {
      const index_t first = rng.below(experts);
      for (index_t r = 0; r < k; ++r) {
        const auto at = static_cast<std::size_t>(t * k + r);
        const bool there = rng.below(8) > 0;
        choices.ids()[at] =
            there ? static_cast<moeroute::expert_id>((first + r) % experts) : moeroute::no_expert;
        choices.weights()[at] = there ? rng.normal() : 0.0f;
      }
    }
    moeroute::plan(choices, plan);
    slow = oracle::make_plan({choices.ids().begin(), choices.ids().end()}, tokens, experts, k);
  }
};

}  // namespace test
