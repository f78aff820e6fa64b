// Random numbers by counter: the number at a place is a function of the place, so results replay on
// any thread.
#pragma once

#include <cstdint>

namespace moeroute {

/// Four independent words of 32 random bits.
struct random_words {
  std::uint32_t word[4];
};

/// The words at (seed, stream, counter): Philox with ten rounds, seed as key, stream and counter as
/// block.
///
/// No state: neighbouring seeds, streams and counters give unrelated words. A use of its own takes
/// a stream of its own (a layer, a purpose), and counts places (token * E + expert, a step) in the
/// counter. Determinism: integers only, the same on every machine; the numbers are part of the
/// interface. Source: Salmon et al. 2011, Philox4x32-10.
constexpr random_words random_block(std::uint64_t seed, std::uint64_t stream,
                                    std::uint64_t counter) {
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(seed >> 32);
  auto c0 = static_cast<std::uint32_t>(counter);
  auto c1 = static_cast<std::uint32_t>(counter >> 32);
  auto c2 = static_cast<std::uint32_t>(stream);
  auto c3 = static_cast<std::uint32_t>(stream >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xd2511f53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

/// 64 random bits.
constexpr std::uint64_t random_bits(std::uint64_t seed, std::uint64_t stream,
                                    std::uint64_t counter) {
  const random_words r = random_block(seed, stream, counter);
  return std::uint64_t{r.word[1]} << 32 | r.word[0];
}

/// A word as a uniform number in [0, 1), a multiple of 2^-24: every value is exact in float.
constexpr float u01_of(std::uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

/// A word as a uniform number in (0, 1), an odd multiple of 2^-24: safe under a logarithm.
constexpr float open_u01_of(std::uint32_t word) {
  return static_cast<float>(word >> 9) * 0x1p-23f + 0x1p-24f;
}

/// A uniform number in [0, 1): less than p with probability p, for every p that is a multiple of
/// 2^-24.
constexpr float random_u01(std::uint64_t seed, std::uint64_t stream, std::uint64_t counter) {
  return u01_of(random_block(seed, stream, counter).word[0]);
}

/// A uniform number in {0, ..., n - 1}, n >= 1.
constexpr std::uint32_t random_below(std::uint32_t n, std::uint64_t seed, std::uint64_t stream,
                                     std::uint64_t counter) {
  return static_cast<std::uint32_t>(
      std::uint64_t{random_block(seed, stream, counter).word[0]} * n >> 32);
}

}  // namespace moeroute
