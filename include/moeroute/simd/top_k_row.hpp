// Top-k of a single row: as by a bound, but ranks are counted, as there are no other rows to fill
// the lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include <moeroute/simd/top_k_bound.hpp>

namespace moeroute::simd {

namespace detail {

// The k-th largest of 16 group maxima (columns modulo 16), found by counting for each how many are
// larger.
template <class A>
MOEROUTE_INLINE float row_bound(const float* row, index_t cols, int k) {
  constexpr int w = width<A>, n = registers_per_block<A>;
  vfloat<A> most[n];
  vint<A> larger[n];
  for (int r = 0; r < n; ++r) {
    most[r] = vfloat<A>(minus_infinity);
    larger[r] = vint<A>(0);
  }
  index_t c = 0;
  for (; c + block_rows <= cols; c += block_rows) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r) most[r] = max_or_second<A>(load<A>(row + c + r * w), most[r]);
  }
  for (int r = 0; c < cols; ++r, c += w)
    most[r] = max_or_second<A>(
        load_first<A>(row + c, std::min<index_t>(cols - c, w), minus_infinity), most[r]);
  alignas(alignment) float group[block_rows];
  for (int r = 0; r < n; ++r) most[r].store_aligned(group + r * w);
  for (const float g : group) {
    MOEROUTE_UNROLL
    for (int r = 0; r < n; ++r)
      larger[r] += select<A>(vfloat<A>(g) > most[r], vint<A>(1), vint<A>(0));
  }
  vfloat<A> least(plus_infinity);
  for (int r = 0; r < n; ++r)
    least = xsimd::min(least, select<A>(xsimd::batch_bool_cast<float>(larger[r] < vint<A>(k)),
                                        most[r], vfloat<A>(plus_infinity)));
  return xsimd::reduce_min(least);
}

// False where more than 16 columns reach the bound; nothing has been written then. k <= 16.
template <class A>
bool top_k_row(const float* row, index_t cols, int k, float* value, std::int32_t* column) {
  constexpr int slots = block_rows, half = width<A> / 2;
  const float bound = std::max(row_bound<A>(row, cols, k), std::numeric_limits<float>::lowest());
  const vfloat<A> least(bound);
  column_list<A, slots> found;
  for (index_t c = 0; c < cols; c += 64) {
    column_mask mask;
    mask_not_below<A, mask_form::joined>(row + c, cols - c, least, mask);
    found.append(&mask, c, std::min(c + 64, cols));
  }
  if (found.size() > slots) return false;
  // In registers, as wide loads would wait here for narrow stores.
  alignas(alignment) double x[slots];
  for (int r = 0; r < slots / width<A>; ++r) {
    const vint<A> c = found.columns(r);
    const vfloat<A> v =
        select<A>(found.in_list(r), vfloat<A>::gather(row, c), vfloat<A>(minus_infinity));
    const ranked<A> both = rank<A>(v, c);
    both.part[0].store_aligned(x + r * width<A>);
    both.part[1].store_aligned(x + r * width<A> + half);
  }
  using vlong = xsimd::batch<std::int64_t, A>;
  vdouble<A> mine[slots / half];
  vlong before[slots / half];
  MOEROUTE_UNROLL
  for (int r = 0; r < slots / half; ++r) {
    mine[r] = vdouble<A>::load_aligned(x + r * half);
    before[r] = vlong(0);
  }
  for (const double other : x) {
    MOEROUTE_UNROLL
    for (int r = 0; r < slots / half; ++r)
      before[r] += xsimd::select(xsimd::batch_bool_cast<std::int64_t>(vdouble<A>(other) > mine[r]),
                                 vlong(1), vlong(0));
  }
  alignas(alignment) std::int64_t place[slots];
  MOEROUTE_UNROLL
  for (int r = 0; r < slots / half; ++r) before[r].store_aligned(place + r * half);
  std::int32_t best[slots + 1];
  // Volatile for the same reason as in pick(): compilers would scatter.
  for (int s = 0; s < slots; ++s)
    static_cast<volatile std::int32_t&>(best[place[s]]) = column_of(x[s]);
  for (int r = 0; r < k; ++r) {
    const bool is_there = r < found.size();
    column[r * block_rows] = is_there ? best[r] : no_expert;
    value[r * block_rows] = is_there ? row[best[r]] : minus_infinity;
  }
  return true;
}

}  // namespace detail

}  // namespace moeroute::simd
