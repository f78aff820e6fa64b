// How a property is tried on random bytes, and a failure made short and repeatable.
#pragma once

#include <catch2/catch_test_macros.hpp>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "properties/bytes.hpp"
#include "support/random.hpp"

namespace test {

/// The first thing that does not hold, in words; empty where all does.
using property = std::string (*)(bytes);

namespace detail {

using byte_string = std::vector<std::uint8_t>;

inline std::string broken(property p, const byte_string& data) {
  try {
    return p(bytes(data));
  } catch (const std::exception& error) {
    return std::string("threw: ") + error.what();
  }
}

// Shorter, then smaller in every byte, as long as it stays broken.
inline byte_string shrunk(property p, byte_string data) {
  for (std::size_t cut = data.size() / 2; cut > 0; cut /= 2)
    while (data.size() > cut) {
      byte_string shorter(data.begin(), data.end() - static_cast<std::ptrdiff_t>(cut));
      if (broken(p, shorter).empty()) break;
      data = shorter;
    }
  for (std::size_t i = 0; i < data.size(); ++i)
    for (const int value : {0, 1, data[i] / 2}) {
      if (value >= data[i]) continue;
      byte_string smaller = data;
      smaller[i] = static_cast<std::uint8_t>(value);
      if (broken(p, smaller).empty()) continue;
      data = smaller;
      break;
    }
  return data;
}

inline std::string spelled(const byte_string& data) {
  std::string out;
  for (const std::uint8_t b : data) {
    constexpr char digits[] = "0123456789abcdef";
    out += digits[b >> 4];
    out += digits[b & 15];
  }
  return out;
}

inline byte_string read(std::string_view digits) {
  byte_string data;
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2)
    data.push_back(static_cast<std::uint8_t>(
        std::strtol(std::string(digits.substr(i, 2)).c_str(), nullptr, 16)));
  return data;
}

}  // namespace detail

/// Fails where the property does not hold for one of so many random byte strings. What is printed
/// runs that case alone: MOEROUTE_BYTES=... and the title of the test.
inline void hold(property p, int cases) {
  if (const char* only = std::getenv("MOEROUTE_BYTES")) {
    CHECK(detail::broken(p, detail::read(only)) == "");
    return;
  }
  random rng(2026);
  for (int i = 0; i < cases; ++i) {
    detail::byte_string data(static_cast<std::size_t>(rng.below(i % 4 == 0 ? 2000 : 120)));
    for (std::uint8_t& b : data) b = static_cast<std::uint8_t>(rng.below(256));
    if (detail::broken(p, data).empty()) continue;
    data = detail::shrunk(p, data);
    INFO("MOEROUTE_BYTES=" << detail::spelled(data));
    FAIL(detail::broken(p, data));
  }
  SUCCEED();
}

}  // namespace test
