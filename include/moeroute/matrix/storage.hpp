// The 16-bit storage types: hidden states and logits are kept in them and widened to float once.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <moeroute/base/config.hpp>

namespace moeroute {

namespace detail {

constexpr std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
constexpr bool is_nan_bits(std::uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// To bfloat16, nearest, ties to even; a NaN stays one, quiet, with its sign and upper bits.
constexpr std::uint16_t bfloat16_bits(float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<std::uint16_t>((is_nan_bits(bits) ? bits | 0x400000u : rounded) >> 16);
}

constexpr float widened_bfloat16(std::uint16_t bits) {
  return std::bit_cast<float>(std::uint32_t{bits} << 16);
}

// To IEEE half precision, likewise. From 65520 on the nearest is infinity.
constexpr std::uint16_t float16_bits(float x) {
  const std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half = 0;
  if (is_nan_bits(bits)) {
    half = 0x7e00u | (size >> 13 & 0x3ffu);
  } else if (size >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (size >= 0x38800000u) {
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  } else {
    // Below 2^-14 halves are multiples of 2^-24: so are floats from 0.5 to 1, the addition rounds.
    half = bits_of(std::bit_cast<float>(size) + 0.5f) - bits_of(0.5f);
  }
  return static_cast<std::uint16_t>(sign | half);
}

constexpr float widened_float16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16, size = half & 0x7fffu;
  std::uint32_t bits = 0;
  if (size >= 0x7c00u) {
    bits = 0x7f800000u | (size & 0x3ffu) << 13 | (size > 0x7c00u ? 0x400000u : 0u);
  } else if (size >= 0x400u) {
    bits = (size << 13) + 0x38000000u;
  } else {
    bits = bits_of(static_cast<float>(size) * 0x1p-24f);
  }
  return std::bit_cast<float>(sign | bits);
}

}  // namespace detail

/// The upper half of a float: 8 bits of exponent, 7 of fraction.
///
/// Made from a float by rounding to the nearest, ties to even; NaN stays NaN. Widens to float by
/// itself, which is exact; arithmetic is that of float. A pointer to another library's bfloat16 may
/// be cast to one of these.
struct MOEROUTE_MAY_ALIAS bfloat16 {
  std::uint16_t bits;

  bfloat16() = default;
  template <class T>
    requires std::is_arithmetic_v<T>
  constexpr explicit bfloat16(T x) : bits(detail::bfloat16_bits(static_cast<float>(x))) {}
  constexpr operator float() const { return detail::widened_bfloat16(bits); }
};

/// IEEE half precision: 5 bits of exponent, 10 of fraction. Rounds, widens and casts as bfloat16.
struct MOEROUTE_MAY_ALIAS float16 {
  std::uint16_t bits;

  float16() = default;
  template <class T>
    requires std::is_arithmetic_v<T>
  constexpr explicit float16(T x) : bits(detail::float16_bits(static_cast<float>(x))) {}
  constexpr operator float() const { return detail::widened_float16(bits); }
};

/// float, bfloat16 or float16.
template <class T>
concept storage = std::is_same_v<std::remove_const_t<T>, float> ||
                  std::is_same_v<std::remove_const_t<T>, bfloat16> ||
                  std::is_same_v<std::remove_const_t<T>, float16>;

/// The type that a stage reads where rows are kept in T. Specialise it for a 16-bit type of another
/// library that has the bits of one of ours.
template <class T>
struct stored_as {
  using type = T;
};

}  // namespace moeroute

namespace std {

template <>
class numeric_limits<moeroute::bfloat16> : public numeric_limits<float> {
  using T = moeroute::bfloat16;
  static constexpr T of(uint16_t bits) { return bit_cast<T>(bits); }

 public:
  static constexpr int digits = 8, digits10 = 2, max_digits10 = 4;
  static constexpr T min() noexcept { return of(0x0080); }
  static constexpr T max() noexcept { return of(0x7f7f); }
  static constexpr T lowest() noexcept { return of(0xff7f); }
  static constexpr T epsilon() noexcept { return of(0x3c00); }
  static constexpr T round_error() noexcept { return of(0x3f00); }
  static constexpr T infinity() noexcept { return of(0x7f80); }
  static constexpr T quiet_NaN() noexcept { return of(0x7fc0); }
  static constexpr T signaling_NaN() noexcept { return of(0x7fa0); }
  static constexpr T denorm_min() noexcept { return of(0x0001); }
};

template <>
class numeric_limits<moeroute::float16> : public numeric_limits<float> {
  using T = moeroute::float16;
  static constexpr T of(uint16_t bits) { return bit_cast<T>(bits); }

 public:
  static constexpr int digits = 11, digits10 = 3, max_digits10 = 5;
  static constexpr int min_exponent = -13, min_exponent10 = -4, max_exponent = 16,
                       max_exponent10 = 4;
  static constexpr T min() noexcept { return of(0x0400); }
  static constexpr T max() noexcept { return of(0x7bff); }
  static constexpr T lowest() noexcept { return of(0xfbff); }
  static constexpr T epsilon() noexcept { return of(0x1400); }
  static constexpr T round_error() noexcept { return of(0x3800); }
  static constexpr T infinity() noexcept { return of(0x7c00); }
  static constexpr T quiet_NaN() noexcept { return of(0x7e00); }
  static constexpr T signaling_NaN() noexcept { return of(0x7d00); }
  static constexpr T denorm_min() noexcept { return of(0x0001); }
};

}  // namespace std
