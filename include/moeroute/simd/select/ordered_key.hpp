// Integers in the order of the floats.
#pragma once

#include <bit>
#include <cstdint>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Integers in the order of the floats, -0 equal to +0. Requires: x is not NaN.
template <class A>
MOEROUTE_INLINE vint<A> ordered_key(vfloat<A> x) {
  const vint<A> bits = bits_as<std::int32_t>(x + vfloat<A>(0.0f));
  return bits ^ ((bits >> 31) & vint<A>(0x7fffffff));
}
inline std::int32_t ordered_key(float x) {
  const auto bits = std::bit_cast<std::int32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float value_of_key(std::int32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

}  // namespace moeroute::simd
