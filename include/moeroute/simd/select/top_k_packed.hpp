// Top-k of rows of bfloat16 by packed keys: integers that no tie can occur between.
#pragma once

#include <algorithm>
#include <cstdint>

#include <moeroute/base/contract.hpp>
#include <moeroute/simd/rows/rows.hpp>
#include <moeroute/simd/select/compress.hpp>
#include <moeroute/simd/select/network.hpp>
#include <moeroute/simd/select/packed_key.hpp>
#include <moeroute/simd/select/top_k.hpp>
#include <moeroute/simd/transpose.hpp>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// Floats of scratch for the widened rows, or the 16-bit orders, of a block of bfloat16 rows.
constexpr index_t widened_block(index_t cols) { return block_rows * round_up(cols, 32); }

namespace detail {

#if defined(__AVX2__)

// Groups of columns (c modulo 32) for the bound.
inline constexpr int packed_groups = 32;

// From one row of orders to the next: whole masks.
constexpr index_t order_stride(index_t cols) { return round_up(cols, 64); }

// Sorted runs of K keys are merged into the best K so far.
template <class A, int K>
void top_k_packed_lanes(const bfloat16* const* rows, index_t cols, int k, float* value,
                        std::int32_t* column) {
  constexpr int chunk = std::max(K, 8);
  vint<A> top[K];
  for (index_t c = 0; c < cols; c += chunk) {
    vint<A> x[chunk];
    MOEROUTE_UNROLL
    for (int j = 0; j < chunk; j += 8) load_keys<A>(rows, c + j, cols, x + j);
    MOEROUTE_UNROLL
    for (int g = 0; g < chunk; g += K) {
      sort<K>(x + g);
      if (g == 0 && c == 0) {
        MOEROUTE_UNROLL
        for (int r = 0; r < K; ++r) top[r] = x[r];
      } else {
        merge_keep_first<K>(top, x + g);
      }
    }
  }
  store_top<A>(top, k, rows, value, column);
}

// The orders of `width` rows, -inf past the columns, and the largest of each group.
template <class A>
MOEROUTE_INLINE void order_rows(const bfloat16* const* rows, index_t cols, std::int16_t* order,
                                std::int16_t (*most)[packed_groups]) {
  constexpr int step = 2 * width<A>, registers = packed_groups / step;
  const index_t stride = order_stride(cols);
  for (int i = 0; i < width<A>; ++i) {
    const bfloat16* const row = rows[i];
    std::int16_t* const out = order + i * stride;
    vshort<A> m[registers];
    for (auto& x : m) x = vshort<A>(order_of_minus_infinity);
    index_t c = 0;
    for (; c + packed_groups <= cols; c += packed_groups) {
      MOEROUTE_UNROLL
      for (int r = 0; r < registers; ++r) {
        const vshort<A> x = order_of<A>(load_bits<A>(row + c + r * step));
        x.store_unaligned(out + c + r * step);
        m[r] = xsimd::max(m[r], x);
      }
    }
    for (; c < stride; c += packed_groups) {
      MOEROUTE_UNROLL
      for (int r = 0; r < registers; ++r) {
        const index_t at = std::min(c + r * step, cols);
        const vshort<A> x =
            order_of<A>(load_first_bits<A>(row + at, std::min<index_t>(cols - at, step)));
        x.store_unaligned(out + c + r * step);
        m[r] = xsimd::max(m[r], x);
      }
    }
    MOEROUTE_UNROLL
    for (int r = 0; r < registers; ++r) m[r].store_aligned(most[i] + r * step);
  }
}

// The 16-bit halves of each 32-bit lane, exchanged.
template <class A>
MOEROUTE_INLINE vshort<A> exchanged_halves(vshort<A> x) {
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16) return vshort<A>(_mm512_rol_epi32(x, 16));
#endif
  if constexpr (width<A> == 8)
    return vshort<A>(_mm256_shufflehi_epi16(_mm256_shufflelo_epi16(x, 0xb1), 0xb1));
}

// The k-th largest of the groups' largest, one row in both halves of each 32-bit lane: k columns
// reach it. k <= K.
template <class A, int K>
MOEROUTE_INLINE vshort<A> packed_bound(const std::int16_t (*most)[packed_groups], int k) {
  constexpr int w = width<A>, pairs = packed_groups / 2;
  // Moving pairs of groups keeps even groups in the lower halves and odd ones in the upper.
  vshort<A> x[pairs];
  MOEROUTE_UNROLL
  for (int h = 0; h < pairs; h += w) {
    vfloat<A> y[w];
    MOEROUTE_UNROLL
    for (int i = 0; i < w; ++i) y[i] = bits_as<float>(vshort<A>::load_aligned(most[i] + 2 * h));
    transpose<A>(y);
    MOEROUTE_UNROLL
    for (int i = 0; i < w; ++i) x[h + i] = bits_as<std::int16_t>(y[i]);
  }
  MOEROUTE_UNROLL
  for (int g = 0; g < pairs; g += K) {
    sort<K>(x + g);
    if (g > 0) merge_keep_first<K>(x, x + g);
  }
  // Rank i of one half meets rank k - 1 - i of the other; so do their opposites one lane half away.
  const auto meet = [&](int i) { return xsimd::max(x[i], exchanged_halves<A>(x[k - 1 - i])); };
  vshort<A> least = meet(0);
  if (k == K) {
    MOEROUTE_UNROLL
    for (int i = 1; i < K / 2; ++i)
      least = xsimd::min(least, xsimd::max(x[i], exchanged_halves<A>(x[K - 1 - i])));
  } else {
    for (int i = 1; i < (k + 1) / 2; ++i) least = xsimd::min(least, meet(i));
  }
  return xsimd::min(least, exchanged_halves<A>(least));
}

// Bit c is set where column c of 64 is at least bound, which is above the order of -inf.
template <class A>
MOEROUTE_INLINE std::uint64_t columns_not_below(const std::int16_t* order, vshort<A> bound) {
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16)
    return _mm512_kunpackd(_mm512_cmpge_epi16_mask(_mm512_loadu_si512(order + 32), bound),
                           _mm512_cmpge_epi16_mask(_mm512_loadu_si512(order), bound));
#endif
  if constexpr (width<A> == 8) {
    const __m256i below = _mm256_sub_epi16(bound, _mm256_set1_epi16(1));
    const auto reach = [&](int c) {
      return _mm256_cmpgt_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(order + c)),
                                below);
    };
    std::uint64_t bits = 0;
    MOEROUTE_UNROLL
    for (int c = 0; c < 64; c += 32) {
      // Packing works inside 128-bit parts: the middle quarters are exchanged.
      const __m256i bytes = _mm256_packs_epi16(reach(c), reach(c + 16));
      const int half = _mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8));
      bits |= std::uint64_t{static_cast<std::uint32_t>(half)} << c;
    }
    return bits;
  }
}

// The keys of the listed columns, and of column 0 in the slots past the end.
template <class A, int slots, int used>
MOEROUTE_INLINE void keys_of_listed(const std::int16_t* order, index_t stride,
                                    const column_list<A, slots>* found,
                                    std::int16_t (*key)[2 * used]) {
  constexpr int w = width<A>;
#if defined(__AVX512BW__)
  if constexpr (width<A> == 16) {
    for (int i = 0; i < w; ++i) {
      MOEROUTE_UNROLL
      for (int r = 0; r < used / w; ++r) {
        // Each load takes the next order along, which is shifted out.
        const __m512i c = found[i].columns(r), not_c = ~vint<A>(c);
        const __m512i x = _mm512_slli_epi32(_mm512_i32gather_epi32(c, order + i * stride, 2), 16);
        _mm512_store_si512(key[i] + 2 * r * w, _mm512_mask_blend_epi16(0x55555555, x, not_c));
      }
    }
    return;
  }
#endif
  alignas(alignment) std::int32_t from[w][used];
  for (int i = 0; i < w; ++i) {
    MOEROUTE_UNROLL
    for (int r = 0; r < used / w; ++r) {
      const vint<A> c = found[i].columns(r);
      c.store_aligned(from[i] + r * w);
      bits_as<std::int16_t>(~c).store_aligned(key[i] + 2 * r * w);
    }
  }
  for (int i = 0; i < w; ++i) {
    // Volatile, or compilers insert into registers: slower.
    MOEROUTE_UNROLL
    for (int s = 0; s < used; ++s) {
      std::int16_t one;
      __builtin_memcpy(&one, order + i * stride + from[i][s], sizeof one);
      static_cast<volatile std::int16_t&>(key[i][2 * s + 1]) = one;
    }
  }
}

// The k best of the listed columns, none of which are in slots past `used`.
template <class A, int K, int slots, int used>
MOEROUTE_INLINE void top_of_packed(const bfloat16* const* rows, const std::int16_t* order,
                                   index_t cols, const column_list<A, slots>* found, int k,
                                   float* value, std::int32_t* column) {
  constexpr int w = width<A>, chunk = std::max(K, w);
  const index_t stride = order_stride(cols);
  alignas(alignment) std::int16_t key[w][2 * used];
  keys_of_listed<A, slots, used>(order, stride, found, key);
  vint<A> top[K];
  MOEROUTE_UNROLL
  for (int s = 0; s < used; s += chunk) {
    vint<A> x[chunk];
    MOEROUTE_UNROLL
    for (int h = 0; h < chunk; h += w) {
      vfloat<A> y[w];
      MOEROUTE_UNROLL
      for (int i = 0; i < w; ++i)
        y[i] = bits_as<float>(select<A>(
            found[i].in_list((s + h) / w),
            bits_as<std::int32_t>(vshort<A>::load_aligned(key[i] + 2 * (s + h))), vint<A>(no_key)));
      transpose<A>(y);
      MOEROUTE_UNROLL
      for (int i = 0; i < w; ++i) x[h + i] = bits_as<std::int32_t>(y[i]);
    }
    MOEROUTE_UNROLL
    for (int j = 0; j < chunk; j += K) {
      sort<K>(x + j);
      if (s + j == 0) {
        MOEROUTE_UNROLL
        for (int r = 0; r < K; ++r) top[r] = x[r];
      } else {
        merge_keep_first<K>(top, x + j);
      }
    }
  }
  store_top<A>(top, k, rows, value, column);
}

// False where a row has more survivors than slots; nothing has been written then. Rows mostly have
// no more than `usual`. order: `width` rows, order_stride(cols) apart.
template <class A, int K, int slots, int usual = slots>
MOEROUTE_OUT_OF_LINE bool top_k_packed_bound(const bfloat16* const* rows, index_t cols, int k,
                                             std::int16_t* order, float* value,
                                             std::int32_t* column) {
  constexpr int w = width<A>;
  const index_t stride = order_stride(cols);
  alignas(alignment) std::int16_t most[w][packed_groups];
  order_rows<A>(rows, cols, order, most);
  alignas(alignment) std::int16_t bound[2 * w];
  // What follows -inf keeps it out where a row has fewer than k values.
  xsimd::max(packed_bound<A, K>(most, k),
             vshort<A>(static_cast<std::int16_t>(order_of_minus_infinity + 1)))
      .store_aligned(bound);
  column_list<A, slots> found[w];
  for (int i = 0; i < w; ++i) {
    const vshort<A> least(bound[2 * i]);
    found[i].append([&](index_t c) { return columns_not_below<A>(order + i * stride + c, least); },
                    0, cols);
  }
  std::int32_t fullest = 0;
  for (int i = 0; i < w; ++i) fullest = std::max(fullest, found[i].size());
  if (fullest > slots) return false;
  if constexpr (usual < slots) {
    if (fullest <= usual) {
      top_of_packed<A, K, slots, usual>(rows, order, cols, found, k, value, column);
      return true;
    }
  }
  top_of_packed<A, K, slots, slots>(rows, order, cols, found, k, value, column);
  return true;
}

// `width` rows, one per lane. least <= k <= most, k <= max_packed_k.
template <class A, int least, int most>
void top_k_packed_group(const bfloat16* const* rows, index_t cols, int k, std::int16_t* order,
                        float* value, std::int32_t* column) {
  // Columns from which a bound wins, measured.
  constexpr bool wide = width<A> == 16;
  constexpr index_t bound_of_two = wide ? 192 : 384, bound_of_four = wide ? 128 : 192;
  constexpr index_t bound_of_eight = wide ? 96 : 192, bound_of_sixteen = wide ? 112 : 192;
  if constexpr (least <= 16 && most > 8)
    if (k > 8) {
      if (cols >= bound_of_sixteen &&
          top_k_packed_bound<A, 16, 32, 16>(rows, cols, k, order, value, column))
        return;
      return top_k_packed_lanes<A, 16>(rows, cols, k, value, column);
    }
  if constexpr (least <= 8 && most > 4)
    if (k > 4) {
      if (cols >= bound_of_eight &&
          top_k_packed_bound<A, 8, 16>(rows, cols, k, order, value, column))
        return;
      return top_k_packed_lanes<A, 8>(rows, cols, k, value, column);
    }
  if constexpr (least <= 4 && most > 1)
    if (cols >= (k <= 2 ? bound_of_two : bound_of_four) && k > 1 &&
        top_k_packed_bound<A, 4, 16>(rows, cols, k, order, value, column))
      return;
  if constexpr (least <= 4 && most > 2)
    if (k > 2) return top_k_packed_lanes<A, 4>(rows, cols, k, value, column);
  if constexpr (least <= 2 && most > 1)
    if (k > 1) return top_k_packed_lanes<A, 2>(rows, cols, k, value, column);
  if constexpr (least <= 1) top_k_packed_lanes<A, 1>(rows, cols, k, value, column);
}

// Largest k of the packed kernels: above it the rows are widened.
inline constexpr int max_packed_k = 16;

#endif

}  // namespace detail

/// top_k_block on rows of bfloat16: what it gives for the widened rows, to the bit.
///
/// Shapes: n rows (1 to 16) of cols bfloat16, `stride` apart; value and column as there. Requires:
/// 1 <= k <= cols <= 2^20; wide holds widened_block(cols) floats, aligned to a cache line; key
/// holds top_k_scratch(cols, k) words. Cost: two passes over the rows for small k, O(cols log^2 k)
/// compare-exchanges for large k; where packed keys do not pay (arches without them, k above 16,
/// very few rows) the rows are widened first. No allocation. Determinism: exact; the same on every
/// ISA.
template <class A = default_arch, int least = 1, int most = int{max_experts}>
void top_k_block(const bfloat16* rows, index_t stride, int n, index_t cols, int k, float* value,
                 std::int32_t* column, float* wide, std::uint64_t* key) {
  MOEROUTE_EXPECTS(n >= 1 && n <= block_rows && k >= 1 && k <= cols);
  int first = 0;
#if defined(__AVX2__)
  if constexpr (has_packed_keys<A> && least <= detail::max_packed_k) {
    if (k <= detail::max_packed_k && cols <= max_packed_columns) {
      // The lanes of a third of a register cost more together than so many rows one by one.
      for (; 3 * (n - first) > width<A> || (k > 8 && first < n); first += width<A>) {
        const bfloat16* row[width<A>];
        for (int i = 0; i < width<A>; ++i) row[i] = rows + std::min(first + i, n - 1) * stride;
        detail::top_k_packed_group<A, least, most>(
            row, cols, k, reinterpret_cast<std::int16_t*>(wide), value + first, column + first);
      }
      if (first >= n) return;
    }
  }
#endif
  for (int i = first; i < n; ++i)
    convert_row<A>(rows + i * stride, cols, wide + (i - first) * cols);
  top_k_block<A, least, most>(wide, cols, n - first, cols, k, value + first, column + first, key);
}

}  // namespace moeroute::simd
