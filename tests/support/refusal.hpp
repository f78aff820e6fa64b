// The message with which the library refuses.
#pragma once

#include <functional>
#include <moeroute/base/error.hpp>
#include <string>
#include <utility>
#include <vector>

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

/// Calls, and the message with which each is refused.
using refusals = std::vector<std::pair<std::function<void()>, std::string>>;

}  // namespace test
