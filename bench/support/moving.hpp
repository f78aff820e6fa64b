// What the stages that move rows are measured on: an assignment, its plan, and hidden states.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/rows.hpp>
#include <moeroute/stage/plan.hpp>

#include "support/shapes.hpp"

namespace bench {

/// An assignment as a router leaves it: k distinct experts per token, equal weights.
inline moeroute::assignment make_assignment(const std::string& shape, index_t tokens,
                                            index_t experts, index_t k) {
  moeroute::assignment made;
  made.reset(tokens, experts, k);
  const auto ids = expert_ids(shape, tokens, experts, k);
  std::copy_n(ids.data(), tokens * k, made.ids().data());
  std::fill_n(made.weights().data(), tokens * k, 1.0f / static_cast<float>(k));
  return made;
}

/// Rows of N(0, 1) in any storage type.
template <class T>
moeroute::buffer<T> hidden_states(index_t rows, index_t d) {
  moeroute::buffer<T> made(rows * d);
  const auto pool = normals();
  const auto size = static_cast<index_t>(pool.size());
  for (index_t i = 0; i < rows * d; i += size)
    moeroute::simd::convert_row(pool.data(), std::min(size, rows * d - i), made.data() + i);
  return made;
}

template <class T>
std::string name_of() {
  return std::is_same_v<T, float> ? "f32" : std::is_same_v<T, moeroute::bfloat16> ? "bf16" : "f16";
}

}  // namespace bench
