// The random numbers of base/rng.hpp, up to 16 blocks at once.
#pragma once

#include <cstdint>

#include <moeroute/base/rng.hpp>
#include <moeroute/simd/batch.hpp>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moeroute::simd {

/// 16 blocks of Philox, one per lane: what they are of goes in, the random words come out.
template <class A = default_arch>
class random_lanes {
 public:
  /// Lane i will hold the words at (stream, counter).
  MOEROUTE_INLINE void place(int i, std::uint64_t stream, std::uint64_t counter) {
    word_[0][i] = static_cast<std::uint32_t>(counter);
    word_[1][i] = counter >> 32;
    word_[2][i] = static_cast<std::uint32_t>(stream);
    word_[3][i] = stream >> 32;
  }

  /// Lane i < n will hold the words at (stream, first + i * step).
  MOEROUTE_INLINE void place_all(std::uint64_t stream, std::uint64_t first, std::uint64_t step,
                                 int n = block_rows) {
    for (int i = 0; i < n; ++i) place(i, stream, first + static_cast<std::uint64_t>(i) * step);
  }

  /// The words of random_block(seed, stream, counter), the same bits, for the first n places; the
  /// other lanes are unspecified.
  MOEROUTE_INLINE void draw(std::uint64_t seed, index_t n = block_rows) {
#if defined(__AVX2__)
    if constexpr (width<A> >= 8)
      if (n > few) {
        for (int i = 0; i < block_rows; i += per_register) draw_register(seed, i);
        return;
      }
#endif
    for (index_t i = 0; i < n; ++i) {
      const random_words r =
          random_block(seed, word_[3][i] << 32 | word_[2][i], word_[1][i] << 32 | word_[0][i]);
      for (int j = 0; j < 4; ++j) word_[j][i] = r.word[j];
    }
  }

  /// Word j (0 to 3) of lane i.
  MOEROUTE_INLINE std::uint32_t word(int j, int i) const {
    return static_cast<std::uint32_t>(word_[j][i]);
  }

  /// random_below(n, ...) of lane i.
  MOEROUTE_INLINE std::uint32_t below(std::uint32_t n, int i) const {
    return static_cast<std::uint32_t>((word_[0][i] & 0xffffffffu) * n >> 32);
  }

 private:
#if defined(__AVX2__)
  static constexpr index_t few = 3;  // so many are drawn sooner one by one
  static constexpr int per_register = width<A> >= 16 ? 8 : 4;

  // The multiplication of lower halves ignores the upper ones, so what the rounds leave there does
  // no harm.
  void draw_register(std::uint64_t seed, int first) {
#if defined(__AVX512F__)
    if constexpr (per_register == 8) {
      __m512i c0 = _mm512_load_si512(word_[0] + first), c1 = _mm512_load_si512(word_[1] + first),
              c2 = _mm512_load_si512(word_[2] + first), c3 = _mm512_load_si512(word_[3] + first);
      const __m512i m0 = _mm512_set1_epi64(0xd2511f53), m1 = _mm512_set1_epi64(0xcd9e8d57);
      auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
        constexpr int all_three = 0x96;  // xor of three
        c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(key0),
                                       all_three);
        c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(key1),
                                       all_three);
        c1 = p1;
        c3 = p0;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
      }
      _mm512_store_si512(word_[0] + first, c0);
      _mm512_store_si512(word_[1] + first, c1);
      _mm512_store_si512(word_[2] + first, c2);
      _mm512_store_si512(word_[3] + first, c3);
      return;
    }
#endif
    const auto at = [&](int j) { return reinterpret_cast<__m256i*>(word_[j] + first); };
    __m256i c0 = _mm256_load_si256(at(0)), c1 = _mm256_load_si256(at(1)),
            c2 = _mm256_load_si256(at(2)), c3 = _mm256_load_si256(at(3));
    const __m256i m0 = _mm256_set1_epi64x(0xd2511f53), m1 = _mm256_set1_epi64x(0xcd9e8d57);
    auto key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1),
                            _mm256_set1_epi64x(key0));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3),
                            _mm256_set1_epi64x(key1));
      c1 = p1;
      c3 = p0;
      key0 += 0x9e3779b9u;
      key1 += 0xbb67ae85u;
    }
    _mm256_store_si256(at(0), c0);
    _mm256_store_si256(at(1), c1);
    _mm256_store_si256(at(2), c2);
    _mm256_store_si256(at(3), c3);
  }
#endif

  alignas(alignment) std::uint64_t word_[4][block_rows];
};

}  // namespace moeroute::simd
