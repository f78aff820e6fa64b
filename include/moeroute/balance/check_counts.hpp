// What every controller asks of the counts and options it is handed.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <moeroute/base/error.hpp>

namespace moeroute::detail {

inline void check_nonnegative(const char* where, const char* what, double value) {
  if (!(value >= 0.0) || !std::isfinite(value)) fail_value(where, what, value, ">= 0 and finite");
}

inline void check_between(const char* where, const char* what, double value, double low,
                          double high) {
  if (!(value >= low && value <= high))
    fail(where, std::string(what) + " is " + std::to_string(value) + ", expected " +
                    std::to_string(low) + " to " + std::to_string(high));
}

// The sum of counts [E]. Throws: error where the length differs or a count is negative or no
// number.
template <class N>
double checked_sum(const char* where, std::span<const N> counts, index_t experts) {
  check_size(where, "counts.size()", static_cast<index_t>(counts.size()), experts);
  double sum = 0.0;
  bool broken = false;
  for (const N n : counts) {
    const auto x = static_cast<double>(n);
    broken |= !(x >= 0.0) || !std::isfinite(x);
    sum += x;
  }
  if (broken) fail(where, "counts must be finite and not negative");
  return sum;
}

// The part of the load that each expert is to have, from shares of any sum; empty: equal parts.
inline std::vector<double> parts_of(const char* where, std::span<const float> share,
                                    index_t experts) {
  std::vector<double> parts;
  if (share.empty()) return parts;
  check_size(where, "share.size()", static_cast<index_t>(share.size()), experts);
  double sum = 0.0;
  for (std::size_t e = 0; e < share.size(); ++e) {
    if (!(share[e] > 0.0f) || !std::isfinite(share[e]))
      fail(where, "share of expert " + std::to_string(e) + " is " + std::to_string(share[e]) +
                      ", expected > 0");
    sum += static_cast<double>(share[e]);
  }
  // Equal shares are none: no rounding may tell them apart.
  if (std::all_of(share.begin(), share.end(), [&](float s) { return s == share[0]; })) return parts;
  for (const float s : share) parts.push_back(static_cast<double>(s) / sum);
  return parts;
}

// The whole places among `places` that are an expert's part; a part is rounded, and what should be
// whole may lie just below.
inline index_t whole_places(double places, double part) {
  const double exact = places * part;
  return static_cast<index_t>(exact + 1e-12 * std::max(1.0, exact));
}

}  // namespace moeroute::detail
