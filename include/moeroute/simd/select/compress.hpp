// From masks of columns to a short list of columns.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstdint>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/mask.hpp>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// The columns of one row whose bits are set, ascending; the first `slots` of them are kept.
///
/// Cost: no branch that depends on the data where few bits are set.
template <class A, int slots>
class column_list {
 public:
  /// How many bits were set, which may be more than slots.
  std::int32_t size() const { return size_; }

  /// Appends the set columns of [first, end); first is a multiple of 64.
  MOEROUTE_INLINE void append(const column_mask* masks, index_t first, index_t end) {
    append([&](index_t c) { return masks[(c - first) / 64].bits(); }, first, end);
  }

  /// The same where bits_at(c) gives the bits of the 64 columns from c on.
  template <std::invocable<index_t> F>
  MOEROUTE_INLINE void append(F&& bits_at, index_t first, index_t end) {
    constexpr std::uint64_t last = std::uint64_t{1}
                                   << 63;  // counting zeros of zero would cost a branch
    std::int32_t size = size_;
    for (index_t c = first; c < end; c += 64) {
      std::uint64_t bits = bits_at(c);
      const int n = std::popcount(bits);
      std::int32_t* const out = column_ + (size < slots ? size : slots);
      const auto pop = [&](int i) {
        out[i] = static_cast<std::int32_t>(c) + std::countr_zero(bits | last);
        bits &= bits - 1;
      };
      MOEROUTE_UNROLL
      for (int i = 0; i < 4; ++i) pop(i);
      if (n > 4) {
        MOEROUTE_UNROLL
        for (int i = 4; i < 12; ++i) pop(i);
        for (int i = 12; i < n; ++i) pop(i);
      }
      size += n;
    }
    size_ = size;
  }

  /// The columns in slots [r * width, (r + 1) * width); 0 past the end.
  MOEROUTE_INLINE vint<A> columns(int r) const {
    return select<A>(in_list(r), load<A>(column_ + r * width<A>), vint<A>(0));
  }

  /// Which of these slots are in the list.
  MOEROUTE_INLINE vmask<A> in_list(int r) const {
    return xsimd::batch_bool_cast<float>(lane_numbers<A>() < vint<A>(size_ - r * width<A>));
  }

 private:
  std::int32_t column_[slots + 64];
  std::int32_t size_ = 0;
};

#if defined(__AVX512F__) && defined(__AVX512VBMI2__)

namespace detail {

alignas(alignment) inline constexpr auto byte_numbers = [] {
  std::array<std::uint8_t, 256> list{};
  for (std::size_t i = 0; i < list.size(); ++i) list[i] = static_cast<std::uint8_t>(i);
  return list;
}();

}  // namespace detail

/// One instruction compresses 64 columns: bytes hold the columns modulo 256, and after every 256
/// columns the slots that are still free move on by 256.
template <class A, int slots>
  requires(width<A> == 16)
class column_list<A, slots> {
 public:
  std::int32_t size() const { return size_; }

  MOEROUTE_INLINE void append(const column_mask* masks, index_t first, index_t end) {
    append([&](index_t c) { return masks[(c - first) / 64].bits(); }, first, end);
  }

  template <std::invocable<index_t> F>
  MOEROUTE_INLINE void append(F&& bits_at, index_t first, index_t end) {
    std::int32_t size = size_;
    __m512i high[registers];
    for (int r = 0; r < registers; ++r) high[r] = high_[r];
    for (index_t c = first; c < end; c += 64) {
      const std::uint64_t bits = bits_at(c);
      const __m512i packed = _mm512_maskz_compress_epi8(
          bits, _mm512_load_si512(detail::byte_numbers.data() + c % 256));
      std::uint8_t* const out = low_ + (size < slots ? size : slots);
      if constexpr (slots <= 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(packed));
      } else if constexpr (slots <= 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(packed));
      } else {
        _mm512_storeu_si512(out, packed);
      }
      size += std::popcount(bits);
      if (c % 256 == 192) {
        const std::uint64_t free = ~below(size);
        MOEROUTE_UNROLL
        for (int r = 0; r < registers; ++r)
          high[r] = _mm512_mask_add_epi32(high[r], static_cast<__mmask16>(free >> (16 * r)),
                                          high[r], _mm512_set1_epi32(256));
      }
    }
    for (int r = 0; r < registers; ++r) high_[r] = high[r];
    size_ = size;
  }

  MOEROUTE_INLINE vint<A> columns(int r) const {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low_ + 16 * r));
    return _mm512_maskz_add_epi32(in_list(r), _mm512_cvtepu8_epi32(low), high_[r]);
  }

  MOEROUTE_INLINE vmask<A> in_list(int r) const {
    return static_cast<__mmask16>(below(size_) >> (16 * r));
  }

 private:
  static_assert(slots % 16 == 0 && slots <= 64);
  static constexpr int registers = slots / 16;

  // The first n bits.
  static std::uint64_t below(std::int32_t n) {
    return n < 64 ? (std::uint64_t{1} << n) - 1 : ~std::uint64_t{0};
  }

  __m512i high_[registers] = {};
  std::uint8_t low_[slots + 64];
  std::int32_t size_ = 0;
};

#endif

/// Writes the lanes of x that are in the mask, and the numbers of these lanes from `first` on, one
/// after the other; nothing past them. Returns how many.
template <class A>
MOEROUTE_INLINE int store_chosen(vmask<A> mask, vfloat<A> x, std::int32_t first, float* value,
                                 std::int32_t* column) {
  const auto bits = mask.mask();
  const int n = std::popcount(bits);
#if defined(__AVX512F__)
  if constexpr (width<A> == 16) {
    // Packed in a register: the instruction that packs into memory is slower everywhere.
    const auto filled = static_cast<__mmask16>((1u << n) - 1);
    _mm512_mask_storeu_ps(value, filled, _mm512_maskz_compress_ps(mask, x));
    _mm512_mask_storeu_epi32(column, filled,
                             _mm512_maskz_compress_epi32(mask, lane_numbers<A>() + vint<A>(first)));
    return n;
  }
#endif
  alignas(alignment) float lane[width<A>];
  x.store_aligned(lane);
  auto left = bits;
  for (int i = 0; i < n; ++i, left &= left - 1) {
    const int at = std::countr_zero(left);
    value[i] = lane[at];
    column[i] = first + at;
  }
  return n;
}

}  // namespace moeroute::simd
