// Properties are functions of arbitrary bytes: random ones in the tests, a fuzzer's in tests/fuzz.
// They return the first thing that does not hold in words, or nothing.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <moeroute/base/index.hpp>
#include <span>
#include <string>
#include <vector>

namespace test {

using moeroute::index_t;

/// Takes values off the front; zeros where nothing is left.
class bytes {
 public:
  explicit bytes(std::span<const std::uint8_t> all) : left_(all) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t n = std::min(sizeof(T), left_.size());
    if (n > 0) std::memcpy(&value, left_.data(), n);
    left_ = left_.subspan(n);
    return value;
  }

  /// In [0, n).
  index_t below(index_t n) {
    return n <= 256 ? take<std::uint8_t>() % n : static_cast<index_t>(take<std::uint32_t>()) % n;
  }
  /// All that is left.
  std::span<const std::uint8_t> rest() const { return left_; }
  bool flag() { return (take<std::uint8_t>() & 1) != 0; }
  template <class Enum>
  Enum one_of(Enum last) {
    return static_cast<Enum>(below(static_cast<index_t>(last) + 1));
  }
  /// Half the time the usual value.
  template <class T, class F>
  T usually(T value, F&& other) {
    return flag() ? static_cast<T>(other()) : value;
  }

  /// Any of the 2^32 floats.
  float raw() { return std::bit_cast<float>(take<std::uint32_t>()); }

  /// A logit as routers meet them: of few different values so that there are ties, one in some of
  /// them infinite, NaN, a zero of either sign, huge or tiny.
  float logit() {
    const auto b = take<std::uint8_t>();
    constexpr float largest = std::numeric_limits<float>::infinity();
    constexpr float odd[] = {largest, -largest, std::numeric_limits<float>::quiet_NaN(),
                             0.0f,    -0.0f,    1e4f,
                             -1e4f,   1e-30f};
    if (b >= 248) return odd[b - 248];
    return (static_cast<float>(b) - 124.0f) / 16.0f;
  }

  /// n logits; where the bytes end early, a pattern that goes on without them.
  std::vector<float> logits(index_t n) {
    std::vector<float> z(static_cast<std::size_t>(n));
    const auto seed = take<std::uint32_t>();
    const bool exact = flag();
    for (std::size_t i = 0; i < z.size(); ++i) {
      if (!left_.empty()) {
        z[i] = logit();
      } else {
        const auto mixed = (static_cast<std::uint32_t>(i) * 2654435761u + seed) * 2246822519u;
        const auto step = static_cast<float>(static_cast<std::int32_t>(mixed) >> (exact ? 8 : 26));
        z[i] = exact ? step * 0x1p-20f : step / 4.0f;
      }
    }
    return z;
  }

 private:
  std::span<const std::uint8_t> left_;
};

}  // namespace test
