// A number that a text is, and nothing else.
#pragma once

#include <charconv>
#include <string_view>
#include <system_error>
#include <type_traits>

#include <moeroute/base/config.hpp>

#if !MOEROUTE_FROM_CHARS_OF_REALS
#include <limits>
#include <locale>
#include <sstream>
#include <string>
#endif

namespace moeroute::detail {

/// Whether all of the text is a number as std::from_chars takes it, whatever the locale; x is it
/// then. Where the library has no from_chars of reals, numbers below the normal ones and other
/// spellings of "inf" and "nan" may be refused.
template <class T>
bool read_number(std::string_view text, T& x) {
#if !MOEROUTE_FROM_CHARS_OF_REALS
  if constexpr (std::is_floating_point_v<T>) {
    const bool minus = text.starts_with('-');
    const std::string_view size = text.substr(minus ? 1 : 0);
    if (size == "inf" || size == "nan") {
      using limits = std::numeric_limits<T>;
      x = size == "inf" ? limits::infinity() : limits::quiet_NaN();
      if (minus) x = -x;
      return true;
    }
    // A stream also takes space, a plus and hexadecimal digits.
    if (size.empty() || size.find_first_not_of("0123456789.eE+-") != std::string_view::npos ||
        size.find_first_of("0123456789.") != 0)
      return false;
    std::istringstream in{std::string(text)};
    in.imbue(std::locale::classic());
    return !(in >> x).fail() && in.eof();
  } else
#endif
  {
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), x);
    return failure == std::errc() && end == text.data() + text.size();
  }
}

}  // namespace moeroute::detail
