// Named inputs: the rows of logits that routers meet, the kind ones and the hard ones.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>

namespace bench {

using moeroute::index_t;

inline constexpr std::array shapes{
    "normal",          // independent N(0, 1)
    "bf16_rounded",    // the same, rounded to bfloat16: ties in a third of the rows
    "quantised",       // the same, rounded to 1/8: ties nearly everywhere
    "all_equal",       // every logit 0
    "ascending",       // each row sorted: every logit beats all before it
    "masked",          // five experts left, fewer than most k
    "group_masked",    // half of the groups of E/8 experts masked
    "one_hot_expert",  // one expert far ahead, the same for all tokens
    "zipf",            // popularity of experts falls like 1/rank
    "half_nan",        // every second logit is NaN, at random
    "one_column",      // the best sixteenth of the experts in one residue class modulo 16
};

/// N(0, 1), made once: drawing them takes longer than the kernels do.
inline std::span<const float> normals() {
  static const std::vector<float> pool = [] {
    std::vector<float> draw(std::size_t{1} << 21);
    std::mt19937 random(20240229);
    std::normal_distribution<float> normal;
    for (float& x : draw) x = normal(random);
    return draw;
  }();
  return pool;
}

/// Fills rows [rows, experts] with a named shape.
inline void fill(const std::string& shape, index_t rows, index_t experts, float* out) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const auto pool = normals();
  std::mt19937 random(static_cast<std::uint32_t>(experts));
  const auto below = [&](index_t n) {
    return static_cast<index_t>(random() % static_cast<std::uint32_t>(n));
  };
  const std::size_t n = static_cast<std::size_t>(rows * experts);
  // Past the end of the pool it is used again from another place, so that no two rows are equal.
  for (std::size_t i = 0; i < n; ++i) out[i] = pool[(i + i / pool.size() * 12347) % pool.size()];

  std::vector<index_t> order(static_cast<std::size_t>(experts));
  std::iota(order.begin(), order.end(), index_t{0});
  std::shuffle(order.begin(), order.end(), random);  // which expert has which popularity

  for (index_t r = 0; r < rows; ++r) {
    float* row = out + r * experts;
    if (shape == "bf16_rounded") {
      for (index_t e = 0; e < experts; ++e) {
        const auto bits = std::bit_cast<std::uint32_t>(row[e]);
        row[e] = std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
      }
    } else if (shape == "quantised") {
      for (index_t e = 0; e < experts; ++e) row[e] = std::nearbyint(row[e] * 8.0f) / 8.0f;
    } else if (shape == "all_equal") {
      std::fill_n(row, experts, 0.0f);
    } else if (shape == "ascending") {
      std::sort(row, row + experts);
    } else if (shape == "masked") {
      const index_t kept = std::min<index_t>(5, experts);
      std::vector<float> values(row, row + kept);
      std::fill_n(row, experts, -infinity);
      for (float x : values) row[below(experts)] = x;
    } else if (shape == "group_masked") {
      const index_t group = std::max<index_t>(1, experts / 8);
      const index_t first = below(8);
      for (index_t e = 0; e < experts; ++e)
        if ((e / group + first) % 8 < 4 && e != first % experts) row[e] = -infinity;
    } else if (shape == "one_hot_expert") {
      row[experts / 3] += 20.0f;
    } else if (shape == "zipf") {
      for (index_t e = 0; e < experts; ++e)
        row[e] -= std::log(1.0f + static_cast<float>(order[static_cast<std::size_t>(e)]));
    } else if (shape == "half_nan") {
      for (index_t e = 0; e < experts; ++e)
        if (random() & 1u) row[e] = nan;
    } else if (shape == "one_column") {
      for (index_t e = below(std::min<index_t>(16, experts)); e < experts; e += 16) row[e] += 10.0f;
    }
  }
}

/// k distinct experts per token, [tokens, k]: uniform, or as popular as the shape says.
inline moeroute::buffer<std::int32_t> expert_ids(const std::string& shape, index_t tokens,
                                                 index_t experts, index_t k) {
  moeroute::buffer<std::int32_t> ids(tokens * k);
  std::vector<float> logits(static_cast<std::size_t>(experts));
  std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(1e-6f, 1.0f);
  for (index_t t = 0; t < tokens; ++t) {
    // The largest k of log(popularity) + Gumbel noise: a draw without replacement.
    for (index_t e = 0; e < experts; ++e) {
      const auto i = static_cast<std::size_t>(e);
      logits[i] = -std::log(-std::log(uniform(random)));
      if (shape == "zipf") logits[i] -= std::log(1.0f + static_cast<float>(e));
    }
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(
        order.begin(), order.begin() + k, order.end(), [&](std::int32_t a, std::int32_t b) {
          return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
        });
    std::copy_n(order.begin(), k, ids.data() + t * k);
  }
  return ids;
}

}  // namespace bench
