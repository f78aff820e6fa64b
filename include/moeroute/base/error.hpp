// How the library refuses what comes from outside: one sentence that names stage, argument and both
// values.
#pragma once

#include <concepts>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include <moeroute/base/config.hpp>
#include <moeroute/base/index.hpp>

namespace moeroute {

/// A shape or an argument from outside does not fit. what() is "moeroute::stage: sentence".
class error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// Called with the message instead of a throw where exceptions are off. Must not return.
using error_handler = void (*)(const char* message);

inline error_handler& on_error() {
  static error_handler handler = [](const char* message) {
    std::fprintf(stderr, "%s\n", message);
    std::abort();
  };
  return handler;
}

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void raise(const char* message) {
#if MOEROUTE_EXCEPTIONS
  throw error(message);
#else
  on_error()(message);
  std::abort();
#endif
}

}  // namespace detail

/// A part of a sentence: text or a whole number.
class message_part {
 public:
  constexpr message_part(const char* text) : text_(text == nullptr ? "" : text) {}
  constexpr message_part(std::string_view text)
      : text_(text.data() == nullptr ? "" : text.data()),
        value_(static_cast<index_t>(text.size())) {}
  template <std::integral Number>
  constexpr message_part(Number number) : value_(static_cast<index_t>(number)) {}

  /// Writes what of it fits into `room` bytes, the last of them a zero; returns how many it has.
  int write(char* to, std::size_t room) const {
    if (text_ == nullptr) return std::snprintf(to, room, "%lld", static_cast<long long>(value_));
    return std::snprintf(to, room, "%.*s", static_cast<int>(value_), text_);
  }

 private:
  const char* text_ = nullptr;
  index_t value_ = -1;  // the number, or the text's length: -1 where it ends in a zero
};

/// Throws error (or calls on_error() under -fno-exceptions) with "moeroute::<where>: <sentence>",
/// the sentence in parts. It is put together here, once in a program: strings that every caller
/// joins would be a third of the code of a small one. A message is cut behind 1023 bytes.
/// Example:
///
///     fail("plan", {"expert ", 3, " has ", 9, " slots, expected at most ", index_t{8}});
[[noreturn]] MOEROUTE_COLD inline void fail(const char* where,
                                            std::initializer_list<message_part> sentence) {
  char message[1024] = "moeroute::";
  std::size_t used = 10;
  const auto add = [&](const message_part& part) {
    const std::size_t room = sizeof message - used;
    const auto size = static_cast<std::size_t>(part.write(message + used, room));
    used += size < room ? size : room - 1;  // <algorithm> would be a fifth of a description's lines
  };
  add(where);
  add(": ");
  for (const message_part& part : sentence) add(part);
  detail::raise(message);
}

[[noreturn]] MOEROUTE_COLD inline void fail(const char* where, const char* sentence) {
  fail(where, std::initializer_list<message_part>{sentence});
}

/// The same with a sentence of any length.
[[noreturn]] MOEROUTE_COLD inline void fail(const char* where, const std::string& sentence) {
  detail::raise((std::string("moeroute::") + where + ": " + sentence).c_str());
}

/// The same with "<what> is <actual>, expected <expected><of>": what costs a caller a register
/// each.
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  const std::string& actual, const char* expected) {
  fail(where, std::string(what) + " is " + actual + ", expected " + expected);
}
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  double actual, const char* expected) {
  char number[336];  // the largest has 309 digits before its point
  std::snprintf(number, sizeof number, "%f", actual);
  fail(where, {what, " is ", number, ", expected ", expected});
}
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  index_t actual, const char* expected) {
  fail(where, {what, " is ", actual, ", expected ", expected});
}
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  index_t actual, const char* expected,
                                                  index_t of) {
  fail(where, {what, " is ", actual, ", expected ", expected, of});
}

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_size(const char* where, const char* what,
                                                 index_t actual, index_t expected) {
  fail_value(where, what, actual, "", expected);
}
[[noreturn]] MOEROUTE_COLD inline void fail_range(const char* where, const char* what,
                                                  index_t actual, index_t low, index_t high) {
  fail(where, {what, " is ", actual, ", expected ", low, " to ", high});
}

}  // namespace detail

/// One compare on the hot path; the message is built only when it fails.
inline void check_size(const char* where, const char* what, index_t actual, index_t expected) {
  if (actual != expected) [[unlikely]]
    detail::fail_size(where, what, actual, expected);
}

inline void check_range(const char* where, const char* what, index_t actual, index_t low,
                        index_t high) {
  if (actual < low || actual > high) [[unlikely]]
    detail::fail_range(where, what, actual, low, high);
}

/// Throws error where one of n values is NaN.
MOEROUTE_COLD inline void check_numbers(const char* where, const char* what, const float* values,
                                        index_t n) {
  for (index_t i = 0; i < n; ++i)
    if (values[i] != values[i]) fail(where, {what, ": value ", i, " is NaN, expected a number"});
}

}  // namespace moeroute
