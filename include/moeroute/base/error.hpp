// How the library refuses what comes from outside: one sentence that names stage, argument and both
// values.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

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

/// Throws error (or calls on_error() under -fno-exceptions) with "moeroute::<where>: <sentence>".
[[noreturn]] MOEROUTE_COLD inline void fail(const char* where, const std::string& sentence) {
  const std::string message = std::string("moeroute::") + where + ": " + sentence;
#if MOEROUTE_EXCEPTIONS
  throw error(message);
#else
  on_error()(message.c_str());
  std::abort();
#endif
}

[[noreturn]] MOEROUTE_COLD inline void fail(const char* where, const char* sentence) {
  fail(where, std::string(sentence));
}

/// The same with "<what> is <actual>, expected <expected><of>". The message is put together here,
/// once in a program, from what costs a caller a register each.
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  const std::string& actual, const char* expected) {
  fail(where, std::string(what) + " is " + actual + ", expected " + expected);
}
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  double actual, const char* expected) {
  fail_value(where, what, std::to_string(actual), expected);
}
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  index_t actual, const char* expected) {
  fail_value(where, what, std::to_string(actual), expected);
}
[[noreturn]] MOEROUTE_COLD inline void fail_value(const char* where, const char* what,
                                                  index_t actual, const char* expected,
                                                  index_t of) {
  fail_value(where, what, std::to_string(actual), (expected + std::to_string(of)).c_str());
}

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_size(const char* where, const char* what,
                                                 index_t actual, index_t expected) {
  fail_value(where, what, actual, "", expected);
}
[[noreturn]] MOEROUTE_COLD inline void fail_range(const char* where, const char* what,
                                                  index_t actual, index_t low, index_t high) {
  fail_value(where, what, actual, (std::to_string(low) + " to ").c_str(), high);
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
    if (values[i] != values[i])
      fail(where, what + (": value " + std::to_string(i)) + " is NaN, expected a number");
}

}  // namespace moeroute
