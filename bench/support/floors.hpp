// Floors: the least that a kernel must do to its bytes. Nothing that reads the same input can be
// faster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include <moeroute/base/index.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/select/packed_key.hpp>

namespace bench {

using moeroute::index_t;

namespace detail {

// Widths below the widest, for rows that do not fill a register.
template <int n>
using sized = xsimd::make_sized_batch_t<float, n>;

template <int n>
float narrow_row_max(const float* row, index_t cols) {
  if constexpr (n >= 4 && !std::is_void_v<sized<n>>) {
    if (cols >= n) {
      sized<n> best = sized<n>::load_unaligned(row);
      for (index_t c = n; c + n <= cols; c += n)
        best = xsimd::max(best, sized<n>::load_unaligned(row + c));
      if (cols % n != 0) best = xsimd::max(best, sized<n>::load_unaligned(row + cols - n));
      return xsimd::reduce_max(best);
    }
    return narrow_row_max<n / 2>(row, cols);
  } else {
    float best = row[0];
    for (index_t c = 1; c < cols; ++c) best = row[c] > best ? row[c] : best;
    return best;
  }
}

}  // namespace detail

/// best[r] = the largest of each row (NaN aside): the least that looks at every logit.
inline void max_of_rows(const float* rows, index_t n, index_t cols, float* best) {
  using F = moeroute::simd::vfloat<>;
  constexpr index_t w = F::size;
  if (cols < 4 * w) {
    for (index_t r = 0; r < n; ++r)
      best[r] = detail::narrow_row_max<static_cast<int>(w)>(rows + r * cols, cols);
    return;
  }
  for (index_t r = 0; r < n; ++r) {
    const float* row = rows + r * cols;
    F a = F::load_unaligned(row), b = F::load_unaligned(row + w);
    F c = F::load_unaligned(row + 2 * w), d = F::load_unaligned(row + 3 * w);
    index_t i = 4 * w;
    for (; i + 4 * w <= cols; i += 4 * w) {
      a = xsimd::max(F::load_unaligned(row + i), a);
      b = xsimd::max(F::load_unaligned(row + i + w), b);
      c = xsimd::max(F::load_unaligned(row + i + 2 * w), c);
      d = xsimd::max(F::load_unaligned(row + i + 3 * w), d);
    }
    for (; i + w <= cols; i += w) a = xsimd::max(F::load_unaligned(row + i), a);
    if (i < cols) a = xsimd::max(F::load_unaligned(row + cols - w), a);
    best[r] = xsimd::reduce_max(xsimd::max(xsimd::max(a, b), xsimd::max(c, d)));
  }
}

/// The same on rows of 16 bits, taken as signed integers: best[8 r, 8 r + 8) gets the largest of
/// each eighth of row r, as joining those would take longer than all the rest. cols >= 8.
inline void max_of_rows(const moeroute::bfloat16* rows, index_t n, index_t cols,
                        std::int16_t* best) {
  using S = moeroute::simd::vshort<>;
  using eight = xsimd::make_sized_batch_t<std::int16_t, 8>;
  constexpr index_t w = S::size;
  const auto* bits = reinterpret_cast<const std::int16_t*>(rows);
  for (index_t r = 0; r < n; ++r) {
    const std::int16_t* row = bits + r * cols;
    eight most = eight::load_unaligned(row + cols - 8);
    index_t i = 0;
    if (cols >= 2 * w) {
      S a = S::load_unaligned(row), b = S::load_unaligned(row + w);
      for (i = 2 * w; i + 2 * w <= cols; i += 2 * w) {
        a = xsimd::max(S::load_unaligned(row + i), a);
        b = xsimd::max(S::load_unaligned(row + i + w), b);
      }
      alignas(moeroute::alignment) std::int16_t lane[w];
      xsimd::max(a, b).store_aligned(lane);
      for (index_t j = 0; j < w; j += 8) most = xsimd::max(eight::load_aligned(lane + j), most);
    }
    for (; i + 8 <= cols; i += 8) most = xsimd::max(eight::load_unaligned(row + i), most);
    most.store_unaligned(best + 8 * r);
  }
}

/// Reads n bytes (a multiple of 512) and keeps something of each. Eight places at once: a memory
/// page has a prefetcher to itself, so that one stream alone is slower than eight.
inline std::int32_t read_pass(const void* from, index_t n) {
  using I = moeroute::simd::vint<>;
  constexpr int streams = 8;
  constexpr index_t w = I::size;
  const auto* p = static_cast<const std::int32_t*>(from);
  const index_t each = n / 4 / streams;
  I seen[streams];
  for (I& s : seen) s = I(0);
  for (index_t i = 0; i + w <= each; i += w) {
    MOEROUTE_UNROLL
    for (int s = 0; s < streams; ++s) seen[s] |= I::load_unaligned(p + s * each + i);
  }
  for (int s = 1; s < streams; ++s) seen[0] |= seen[s];
  return xsimd::reduce_add(seen[0]);
}

/// Counts ids: what any plan must do before it can place a single token.
inline void histogram(const std::int32_t* id, index_t n, index_t experts, std::int32_t* count) {
  std::memset(count, 0, static_cast<std::size_t>(experts) * sizeof(std::int32_t));
  for (index_t i = 0; i < n; ++i) ++count[id[i]];
}

/// Clears and scans the counters of E experts: the part of a plan that does not depend on T.
inline void clear_and_scan(index_t experts, std::int32_t* count, std::int32_t* start) {
  std::memset(count, 0, static_cast<std::size_t>(experts) * sizeof(std::int32_t));
  std::int32_t sum = 0;
  for (index_t e = 0; e < experts; ++e) {
    start[e] = sum;
    sum += count[e];
  }
  start[experts] = sum;
}

/// n multiply-adds out of registers: the peak that no matrix product exceeds.
inline float multiply_adds(index_t n) {
  using F = moeroute::simd::vfloat<>;
  constexpr int chains = 12;
  F sum[chains];
  for (int j = 0; j < chains; ++j) sum[j] = F(static_cast<float>(j));
  F a(0.5f), b(1.0f);
  for (index_t i = 0; i < n; i += chains * static_cast<index_t>(F::size)) {
    MOEROUTE_UNROLL
    for (int j = 0; j < chains; ++j) sum[j] = xsimd::fma(sum[j], a, b);
  }
  F all(0.0f);
  for (const F& s : sum) all += s;
  return xsimd::reduce_add(all);
}

}  // namespace bench
