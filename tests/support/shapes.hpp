// Named logits: what routers meet in models, and what breaks them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <moeroute/base/index.hpp>
#include <string>
#include <vector>

#include "support/random.hpp"

namespace test {

using moeroute::index_t;

inline constexpr float infinity = std::numeric_limits<float>::infinity();
inline constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

enum class shape {
  normal,
  bf16_rounded,  // ties as 16-bit gates make them
  quantised,     // steps of 1/8: many ties
  all_equal,
  ascending,
  descending,
  masked,  // one logit in eight is not -inf
  half_nan,
  all_minus_inf,
  all_nan,
  plus_infs,       // about a quarter are +inf
  signed_zeros,    // +0, -0 and a few negatives
  one_hot_expert,  // one expert wins everywhere
  zipf,            // log of a popularity law plus noise
  extreme,         // around -10000 and +10000
};

// A sanitizer sees where memory is read, which few shapes change: in a reduced build it gets those.
#if defined(__has_feature)
#define MOEROUTE_TEST_SANITIZED (MOEROUTE_TEST_REDUCED && __has_feature(address_sanitizer))
#else
#define MOEROUTE_TEST_SANITIZED 0
#endif

#if MOEROUTE_TEST_SANITIZED
inline constexpr shape all_shapes[] = {
    shape::normal,   shape::quantised,     shape::descending, shape::masked,
    shape::half_nan, shape::all_minus_inf, shape::plus_infs,  shape::extreme,
};
#else
inline constexpr shape all_shapes[] = {
    shape::normal,         shape::bf16_rounded, shape::quantised, shape::all_equal,
    shape::ascending,      shape::descending,   shape::masked,    shape::half_nan,
    shape::all_minus_inf,  shape::all_nan,      shape::plus_infs, shape::signed_zeros,
    shape::one_hot_expert, shape::zipf,         shape::extreme,
};
#endif

inline const char* name(shape s) {
  switch (s) {
    case shape::normal: return "normal";
    case shape::bf16_rounded: return "bf16_rounded";
    case shape::quantised: return "quantised";
    case shape::all_equal: return "all_equal";
    case shape::ascending: return "ascending";
    case shape::descending: return "descending";
    case shape::masked: return "masked";
    case shape::half_nan: return "half_nan";
    case shape::all_minus_inf: return "all_minus_inf";
    case shape::all_nan: return "all_nan";
    case shape::plus_infs: return "plus_infs";
    case shape::signed_zeros: return "signed_zeros";
    case shape::one_hot_expert: return "one_hot_expert";
    case shape::zipf: return "zipf";
    case shape::extreme: return "extreme";
  }
  return "?";
}

/// The float that keeps the upper 16 bits of x: a bfloat16.
inline float bf16_cut(float x) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & 0xffff0000u);
}

/// Logits [T, E] by seed. Differences within a row are either at most 40 or so large that exp
/// underflows, so that rounding z - max stays far below the tolerance of weights.
inline std::vector<float> make_logits(shape s, std::uint64_t seed, index_t tokens,
                                      index_t experts) {
  random rng(seed * 1000 + static_cast<std::uint64_t>(s));
  std::vector<float> z;
  z.reserve(static_cast<std::size_t>(tokens * experts));
  const index_t hot = static_cast<index_t>(seed) % experts;
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t e = 0; e < experts; ++e) {
      const float x = 2.0f * rng.normal();
      const auto step = static_cast<float>(e);
      z.push_back([&]() -> float {
        switch (s) {
          case shape::normal: return x;
          case shape::bf16_rounded: return bf16_cut(x);
          case shape::quantised: return std::floor(x * 8.0f) / 8.0f;
          case shape::all_equal: return 0.75f;
          case shape::ascending: return step / 128.0f;
          case shape::descending: return -step / 128.0f;
          case shape::masked: return rng.below(8) == 0 ? x : -infinity;
          case shape::half_nan: return rng.below(2) == 0 ? x : not_a_number;
          case shape::all_minus_inf: return -infinity;
          case shape::all_nan: return not_a_number;
          case shape::plus_infs: return rng.below(4) == 0 ? infinity : x;
          case shape::signed_zeros: {
            const float choice[] = {0.0f, -0.0f, -0.0f, 0.0f, -1.0f};
            return choice[rng.below(5)];
          }
          case shape::one_hot_expert: return e == hot ? 12.0f : x;
          case shape::zipf: return -std::log2(step + 1.0f) + 0.5f * x;
          case shape::extreme:
            return (rng.below(2) == 0 ? 1e4f : -1e4f) + std::floor(x * 8.0f) / 8.0f;
        }
        return 0.0f;
      }());
    }
  }
  return z;
}

/// Rows each of a kind of its own, of the seeds from `seed` on; +inf between two of them.
inline std::vector<float> rows_of_all_shapes(random& draw, std::uint64_t seed, index_t rows,
                                             index_t cols, index_t stride) {
  std::vector<float> all(static_cast<std::size_t>((rows - 1) * stride + cols), infinity);
  for (index_t i = 0; i < rows; ++i) {
    const shape s = all_shapes[draw.below(std::ssize(all_shapes))];
    const std::vector<float> row = make_logits(s, seed + static_cast<std::uint64_t>(i), 1, cols);
    std::copy(row.begin(), row.end(), all.begin() + i * stride);
  }
  return all;
}

/// What it takes to see a failure again.
struct reproducer {
  shape logits;
  std::uint64_t seed;
  index_t tokens;
  index_t experts;
  index_t k;
};

inline std::string to_string(const reproducer& r) {
  return std::string("shape=") + name(r.logits) + " seed=" + std::to_string(r.seed) +
         " T=" + std::to_string(r.tokens) + " E=" + std::to_string(r.experts) +
         " k=" + std::to_string(r.k);
}

}  // namespace test
