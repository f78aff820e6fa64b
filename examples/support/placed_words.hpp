// The command line of the examples whose arguments have a place and no name:
// [PAGE.html [MODEL [STEPS]]].
#pragma once

#include "error.hpp"

#include <ostream>
#include <string>
#include <string_view>

#include <moeroute/base/read_number.hpp>

namespace example {

/// Whether --help is among the words: says how they stand, and there is nothing else to do.
/// Refuses options, and words behind the last place.
[[nodiscard]] inline bool asked_how(int count, const char* const* words, int places,
                                    std::string_view usage, std::ostream& out) {
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    if (word == "--help" || word == "-h") {
      out << "usage: " << usage << '\n';
      return true;
    }
  }
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    if (word.starts_with("-") || i > places) {
      refuse("command line: expected ", usage, ", found '", word, "'");
    }
  }
  return false;
}

/// The word as a number in [low, high].
template <class T>
[[nodiscard]] T number_in_place(std::string_view name, const std::string& word, T low, T high) {
  T value{};
  if (!moeroute::detail::read_number(word, value) || !(value >= low && value <= high)) {
    refuse(name, ": expected a number from ", low, " to ", high, ", found '", word, "'");
  }
  return value;
}

}  // namespace example
