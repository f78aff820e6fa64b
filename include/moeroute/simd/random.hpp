// The random numbers of base/rng.hpp, 16 blocks at once.
#pragma once

#include <cstdint>

#include <moeroute/base/rng.hpp>
#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// 16 blocks of Philox, one per lane: what they are of goes in, the random words come out.
template <class A = default_arch>
class random_lanes {
 public:
  /// Lane i will hold the words at (stream, counter).
  void place(int i, std::uint64_t stream, std::uint64_t counter) {
    word_[0][i] = static_cast<std::uint32_t>(counter);
    word_[1][i] = static_cast<std::uint32_t>(counter >> 32);
    word_[2][i] = static_cast<std::uint32_t>(stream);
    word_[3][i] = static_cast<std::uint32_t>(stream >> 32);
  }

  /// Lane i will hold the words at (stream, first + i * step).
  void place_all(std::uint64_t stream, std::uint64_t first, std::uint64_t step) {
    for (int i = 0; i < block_rows; ++i)
      place(i, stream, first + static_cast<std::uint64_t>(i) * step);
  }

  /// The words of random_block(seed, stream, counter) for every place: the same bits, in a tenth of
  /// the time. Written as plain loops over lanes: compilers know how to multiply them in registers.
  void draw(std::uint64_t seed) {
    auto key0 = static_cast<std::uint32_t>(seed);
    auto key1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < block_rows; ++i) {
        const std::uint64_t p0 = std::uint64_t{0xd2511f53u} * word_[0][i];
        const std::uint64_t p1 = std::uint64_t{0xcd9e8d57u} * word_[2][i];
        word_[0][i] = static_cast<std::uint32_t>(p1 >> 32) ^ word_[1][i] ^ key0;
        word_[2][i] = static_cast<std::uint32_t>(p0 >> 32) ^ word_[3][i] ^ key1;
        word_[1][i] = static_cast<std::uint32_t>(p1);
        word_[3][i] = static_cast<std::uint32_t>(p0);
      }
      key0 += 0x9e3779b9u;
      key1 += 0xbb67ae85u;
    }
  }

  /// Word j (0 to 3) of lane i.
  std::uint32_t word(int j, int i) const { return word_[j][i]; }

  /// random_below(n, ...) of lane i.
  std::uint32_t below(std::uint32_t n, int i) const {
    return static_cast<std::uint32_t>(std::uint64_t{word_[0][i]} * n >> 32);
  }

 private:
  alignas(alignment) std::uint32_t word_[4][block_rows];
};

}  // namespace moeroute::simd
