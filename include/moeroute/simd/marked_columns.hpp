// Rows whose columns carry a bit each: what is done to the marked ones only.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

namespace detail {

// The bits of the columns c to c + width - 1 as lanes. c is a multiple of the width.
template <class A>
MOEROUTE_INLINE vmask<A> marked_lanes(const std::uint64_t* bits, index_t c) {
  constexpr std::uint64_t lanes = (std::uint64_t{1} << width<A>)-1;
  return vmask<A>::from_mask(bits[c >> 6] >> (c & 63) & lanes);
}

// out[c] = f(row[c], whether c is marked).
template <class A, class F>
MOEROUTE_INLINE void map_marked(const float* row, index_t cols, const std::uint64_t* bits,
                                float* out, F&& f) {
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>)
    f(load<A>(row + c), marked_lanes<A>(bits, c)).store_unaligned(out + c);
  if (c < cols)
    store_first<A>(out + c, cols - c,
                   f(load_first<A>(row + c, cols - c, minus_infinity), marked_lanes<A>(bits, c)));
}

}  // namespace detail

/// The least value of a row above -inf and the largest; (+inf, -inf) where there is none.
struct row_bounds {
  float least, most;
  /// 0 where there is none or the largest is +inf.
  float range() const { return most > least && most < plus_infinity ? most - least : 0.0f; }
};

/// NaN counts as -inf.
template <class A = default_arch>
row_bounds bounds_of(const float* row, index_t cols) {
  const vfloat<A> up(plus_infinity), down(minus_infinity);
  vfloat<A> least = up, most = down;
  const auto see = [&](vfloat<A> x) {
    most = select<A>(x > most, x, most);
    least = select<A>((x > down) & (x < least), x, least);
  };
  index_t c = 0;
  for (; c + width<A> <= cols; c += width<A>) see(load<A>(row + c));
  if (c < cols) see(load_first<A>(row + c, cols - c, minus_infinity));
  return {xsimd::reduce_min(least), xsimd::reduce_max(most)};
}

/// out[c] = row[c] + bonus in marked columns, row[c] in others. One rounding each.
template <class A = default_arch>
void add_to_marked(const float* row, index_t cols, const std::uint64_t* bits, float bonus,
                   float* out) {
  const vfloat<A> more(bonus);
  detail::map_marked<A>(row, cols, bits, out, [&](vfloat<A> x, vmask<A> marked) {
    return select<A>(marked, x + more, x);
  });
}

/// out[c] = row[c] in marked columns, -inf in others.
template <class A = default_arch>
void keep_marked(const float* row, index_t cols, const std::uint64_t* bits, float* out) {
  detail::map_marked<A>(row, cols, bits, out, [](vfloat<A> x, vmask<A> marked) {
    return select<A>(marked, x, vfloat<A>(minus_infinity));
  });
}

}  // namespace moeroute::simd
