// The message with which the library refuses.
#pragma once

#include <moeroute/base/error.hpp>
#include <string>

namespace test {

/// What f throws, or "accepted" where it throws nothing.
template <class F>
std::string refusal(F&& f) {
  try {
    f();
  } catch (const moeroute::error& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace test
