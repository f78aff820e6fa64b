// A span that outlives the call: what a router or a rule keeps of its caller's memory.
#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>

#include <moeroute/base/config.hpp>

namespace moeroute {

/// A std::span that does not compile from a temporary that owns its values: it would dangle at the
/// end of the statement, long before it is read.
template <class T>
class lasting_span : public std::span<T> {
 public:
  constexpr lasting_span() = default;
  constexpr lasting_span(T* first, std::size_t size) : std::span<T>(first, size) {}

  template <class R>
    requires(!std::same_as<std::remove_cvref_t<R>, lasting_span> &&
             std::convertible_to<R &&, std::span<T>>)
  constexpr lasting_span(R&& values) : std::span<T>(values) {
    static_assert(std::ranges::borrowed_range<R>,
                  "[moeroute::lasting_span] a temporary would dangle: give the values a name, "
                  "and keep them");
  }
};

}  // namespace moeroute
