// Rows of hidden states: widen, narrow, copy, and the weighted sum of several rows.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

namespace detail {

// The next `width` values of a row as floats.
template <class A, storage T>
MOEROUTE_INLINE vfloat<A> load_wide(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    return load<A>(p);
  } else {
    alignas(alignment) float lane[width<A>];
    for (int i = 0; i < width<A>; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        lane[i] = std::bit_cast<float>(static_cast<std::uint32_t>(std::bit_cast<std::uint16_t>(p[i]))
                                       << 16);
      } else {
        lane[i] = static_cast<float>(p[i]);
      }
    }
    return vfloat<A>::load_aligned(lane);
  }
}

// To bfloat16, nearest, ties to even; NaN stays NaN.
inline std::uint16_t bfloat16_bits(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto rounded = static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  const auto quiet = static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

template <class A, storage T>
MOEROUTE_INLINE void store_narrow(T* p, vfloat<A> v) {
  if constexpr (std::is_same_v<T, float>) {
    v.store_unaligned(p);
  } else {
    alignas(alignment) float lane[width<A>];
    v.store_aligned(lane);
    for (int i = 0; i < width<A>; ++i) {
      if constexpr (std::is_same_v<T, bfloat16>) {
        p[i] = std::bit_cast<bfloat16>(bfloat16_bits(lane[i]));
      } else {
        p[i] = static_cast<T>(lane[i]);
      }
    }
  }
}

template <storage T>
T narrowed(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return std::bit_cast<bfloat16>(bfloat16_bits(x));
  } else {
    return static_cast<T>(x);
  }
}

}  // namespace detail

/// to[i] = from[i], widened or narrowed (nearest, ties to even) where the types differ.
template <class A = default_arch, storage From, storage To>
void convert_row(const From* from, index_t n, To* to) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(To));
  } else {
    index_t i = 0;
    for (; i + width<A> <= n; i += width<A>)
      detail::store_narrow<A>(to + i, detail::load_wide<A>(from + i));
    for (; i < n; ++i) to[i] = detail::narrowed<To>(static_cast<float>(from[i]));
  }
}

/// out[c] = sum over r < k of weight[r] * rows[row[r] * stride + c], where negative row[r] are skipped; zeros
/// where nothing is left.
///
/// Accumulates in float in the order of r with fused multiply-adds; one rounding to To at the end.
/// Cost: reads each row once, no allocation. Determinism: the same bits on every ISA.
template <class A = default_arch, storage From, storage To>
void weighted_sum_of_rows(const From* rows, index_t stride, const std::int32_t* row,
                          const float* weight, index_t k, index_t n, To* out) {
  index_t c = 0;
  const auto tile = [&]<int v>(std::integral_constant<int, v>) {
    vfloat<A> sum[v];
    for (auto& s : sum) s = vfloat<A>(0.0f);
    for (index_t r = 0; r < k; ++r) {
      if (row[r] < 0) continue;
      const From* from = rows + row[r] * stride + c;
      const vfloat<A> w(weight[r]);
      MOEROUTE_UNROLL
      for (int j = 0; j < v; ++j)
        sum[j] = fma<A>(w, detail::load_wide<A>(from + j * width<A>), sum[j]);
    }
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j) detail::store_narrow<A>(out + c + j * width<A>, sum[j]);
    c += v * width<A>;
  };
  while (c + 4 * width<A> <= n) tile(std::integral_constant<int, 4>{});
  while (c + width<A> <= n) tile(std::integral_constant<int, 1>{});
  if (c < n) {
    vfloat<A> sum(0.0f);
    for (index_t r = 0; r < k; ++r) {
      if (row[r] < 0) continue;
      alignas(alignment) float lane[width<A>] = {};
      for (index_t j = c; j < n; ++j) lane[j - c] = static_cast<float>(rows[row[r] * stride + j]);
      sum = fma<A>(vfloat<A>(weight[r]), vfloat<A>::load_aligned(lane), sum);
    }
    alignas(alignment) float total[width<A>];
    sum.store_aligned(total);
    for (index_t j = c; j < n; ++j) out[j] = detail::narrowed<To>(total[j - c]);
  }
}

}  // namespace moeroute::simd
