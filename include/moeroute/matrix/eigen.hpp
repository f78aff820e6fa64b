// The door to Eigen, for who has matrices of it: row_matrix, and Eigen's 16-bit types as storage.
// The library itself takes Eigen's matrices without it.
#pragma once

#include <Eigen/Core>

#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

template <>
struct stored_as<Eigen::bfloat16> {
  using type = bfloat16;
};
template <>
struct stored_as<Eigen::half> {
  using type = float16;
};

/// A row-major Eigen matrix: what the views like best.
template <class T>
using row_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

}  // namespace moeroute
