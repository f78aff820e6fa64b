// Comparisons that return what differs, in words; empty where nothing does. One assertion per
// array, not per element: assertions are slow.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <type_traits>

namespace test {

inline std::string shown(double x) {
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", x);
  return text;
}

/// What float64 sums in one order or another.
inline bool near(double a, double b) { return std::abs(a - b) < 1e-12; }

/// Equal to the last bit; NaN equals the same NaN, -0 differs from +0.
template <class A, class B>
std::string bit_difference(const A& actual, const B& expected) {
  const std::span a(actual);
  const std::span b(expected);
  using T = std::remove_const_t<typename decltype(a)::element_type>;
  static_assert(std::is_same_v<T, std::remove_const_t<typename decltype(b)::element_type>>);
  if (a.size() != b.size())
    return "size " + std::to_string(a.size()) + ", expected " + std::to_string(b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    using bits = std::conditional_t<sizeof(T) == 2, std::uint16_t, std::uint32_t>;
    if (std::bit_cast<bits>(a[i]) != std::bit_cast<bits>(b[i]))
      return "at " + std::to_string(i) + ": " + shown(static_cast<double>(a[i])) + ", expected " +
             shown(static_cast<double>(b[i]));
  }
  return "";
}

/// |a - b| <= relative * |b| + absolute; a NaN equals nothing.
template <class A, class B>
std::string difference(const A& actual, const B& expected, double relative, double absolute = 0.0) {
  const std::span a(actual);
  const std::span b(expected);
  if (a.size() != b.size())
    return "size " + std::to_string(a.size()) + ", expected " + std::to_string(b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = static_cast<double>(a[i]), y = static_cast<double>(b[i]);
    if (!(std::abs(x - y) <= relative * std::abs(y) + absolute))
      return "at " + std::to_string(i) + ": " + shown(x) + ", expected " + shown(y);
  }
  return "";
}

}  // namespace test
