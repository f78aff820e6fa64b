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

namespace detail {

[[noreturn]] MOEROUTE_COLD inline void fail_size(const char* where, const char* what,
                                                 index_t actual, index_t expected) {
  fail(where, std::string(what) + " is " + std::to_string(actual) + ", expected " +
                  std::to_string(expected));
}

[[noreturn]] MOEROUTE_COLD inline void fail_range(const char* where, const char* what,
                                                  index_t actual, index_t low, index_t high) {
  fail(where, std::string(what) + " is " + std::to_string(actual) + ", expected " +
                  std::to_string(low) + " to " + std::to_string(high));
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

}  // namespace moeroute
