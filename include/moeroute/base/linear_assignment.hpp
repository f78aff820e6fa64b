// The assignment of rows to columns with the largest sum.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// column[r]: the column of each row of gain [n, n], such that the sum of gains is the largest.
///
/// Throws: error where gain.size() is not n * n or a gain is no number. Cost: O(n^3). Determinism:
/// exact. Source: shortest augmenting paths with potentials (Kuhn 1955; Jonker and Volgenant 1987).
inline std::vector<std::int32_t> linear_assignment(const std::vector<double>& gain, index_t n) {
  check_size("linear_assignment", "gain.size()", static_cast<index_t>(gain.size()), n * n);
  // Sums of prices stay finite as well.
  for (const double g : gain)
    if (!(std::abs(g) <= 1e300))
      fail_value("linear_assignment", "a gain", g, "a number of at most 1e300");
  const auto size = static_cast<std::size_t>(n);
  constexpr std::size_t none = std::numeric_limits<std::size_t>::max();
  constexpr double never = std::numeric_limits<double>::infinity();
  std::vector<double> row_price(size), column_price(size), reach(size);
  std::vector<std::size_t> row_of(size, none), from(size);
  std::vector<char> done(size);
  for (std::size_t r = 0; r < size; ++r) {
    reach.assign(size, never);
    done.assign(size, 0);
    std::size_t row = r, at = none;
    double so_far = 0.0;
    do {
      std::size_t next = none;
      double least = never;
      for (std::size_t c = 0; c < size; ++c) {
        if (done[c] != 0) continue;
        const double through = so_far - gain[row * size + c] - row_price[row] - column_price[c];
        if (through < reach[c]) {
          reach[c] = through;
          from[c] = at;
        }
        if (reach[c] < least) {
          least = reach[c];
          next = c;
        }
      }
      so_far = least;
      at = next;
      done[at] = 1;
      row = row_of[at];
    } while (row != none);
    // Prices such that every edge of the tree is tight, then the path is turned over.
    row_price[r] += so_far;
    for (std::size_t c = 0; c < size; ++c) {
      if (done[c] == 0 || c == at) continue;
      column_price[c] -= so_far - reach[c];
      row_price[row_of[c]] += so_far - reach[c];
    }
    while (at != none) {
      const std::size_t before = from[at];
      row_of[at] = before == none ? r : row_of[before];
      at = before;
    }
  }
  std::vector<std::int32_t> column(size);
  for (std::size_t c = 0; c < size; ++c) column[row_of[c]] = static_cast<std::int32_t>(c);
  return column;
}

}  // namespace moeroute
