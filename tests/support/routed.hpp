// A router's choices for a list of rows, without the ceremony.
#pragma once

#include <moeroute/stage/route.hpp>
#include <span>
#include <type_traits>
#include <vector>

namespace test {

/// The assignment of logits [T, columns].
template <class Router>
moeroute::assignment routed(const Router& router, const std::vector<float>& logits,
                            moeroute::index_t columns, const moeroute::side_inputs& side = {}) {
  moeroute::workspace memory;
  moeroute::assignment out;
  const auto tokens = static_cast<moeroute::index_t>(logits.size()) / columns;
  moeroute::route(router, moeroute::matrix_view<const float>(logits.data(), tokens, columns), side,
                  memory, out);
  return out;
}

template <class T>
std::vector<std::remove_const_t<T>> listed(std::span<T> values) {
  return {values.begin(), values.end()};
}

}  // namespace test
