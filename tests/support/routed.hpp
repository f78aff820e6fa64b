// A router's choices for a list of rows, without the ceremony.
#pragma once

#include <moeroute/stage/route.hpp>
#include <span>
#include <type_traits>
#include <vector>

namespace test {

/// A list of logits as rows [T, columns].
inline moeroute::matrix_view<const float> rows_of(const std::vector<float>& logits,
                                                  moeroute::index_t columns) {
  return {logits.data(), static_cast<moeroute::index_t>(logits.size()) / columns, columns};
}

inline std::vector<float> zeros(moeroute::index_t tokens, moeroute::index_t experts) {
  return std::vector<float>(static_cast<std::size_t>(tokens * experts));
}

/// The assignment of logits [T, columns].
template <class Router>
moeroute::assignment routed(const Router& router, const std::vector<float>& logits,
                            moeroute::index_t columns, const moeroute::side_inputs& side = {}) {
  moeroute::workspace memory;
  moeroute::assignment out;
  moeroute::route(router, rows_of(logits, columns), side, memory, out);
  return out;
}

template <class T>
std::vector<std::remove_const_t<T>> listed(std::span<T> values) {
  return {values.begin(), values.end()};
}

}  // namespace test
