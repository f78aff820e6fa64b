// Floats of a seed, and vectors seen as rows.
#pragma once

#include <cstdint>
#include <moeroute/matrix/matrix.hpp>
#include <vector>

#include "oracle/layer.hpp"
#include "support/random.hpp"

namespace test {

using floats = std::vector<float>;

/// n normal numbers of a deviation. Streams of neighbouring seeds do not overlap.
inline floats random_floats(moeroute::index_t n, std::uint64_t seed, float size = 1.0f) {
  random rng(seed << 32);
  floats x(static_cast<std::size_t>(n));
  for (float& v : x) v = size * rng.normal();
  return x;
}

inline moeroute::matrix_view<const float> as_rows(const floats& x, moeroute::index_t cols) {
  return {x.data(), static_cast<moeroute::index_t>(x.size()) / cols, cols};
}
inline moeroute::matrix_view<float> into_rows(floats& x, moeroute::index_t cols) {
  return {x.data(), static_cast<moeroute::index_t>(x.size()) / cols, cols};
}
/// The same rows in double.
inline oracle::matrix wide(const floats& x, moeroute::index_t cols) {
  return {static_cast<moeroute::index_t>(x.size()) / cols, cols, x.data()};
}

}  // namespace test
