// Baselines of the token rules that no spec describes, one row at a time: scores by std::exp, order
// by the standard library. All of them give the library's choices: value descending, then expert
// ascending, NaN as -inf, nothing chosen at -inf.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/threshold.hpp>

#include "support/plain_selection.hpp"

namespace bench {

using moeroute::expert_id;
using moeroute::side_inputs;

namespace detail {

inline constexpr float lowest = plain_selection::lowest;

// exp(z - max) of a row and their sum; NaN counts as -inf.
inline float exponentials(const float* row, index_t experts, float max, std::vector<float>& e) {
  e.resize(static_cast<std::size_t>(experts));
  float sum = 0.0f;
  for (index_t i = 0; i < experts; ++i)
    sum += e[static_cast<std::size_t>(i)] = row[i] > lowest ? std::exp(row[i] - max) : 0.0f;
  return sum;
}

inline float row_max(const float* row, index_t experts) {
  float max = lowest;
  for (index_t i = 0; i < experts; ++i) max = row[i] > max ? row[i] : max;
  return max;
}

// Weights of chosen experts by the softmax over all of the row.
inline void softmax_of_chosen(const float* row, index_t experts, const expert_id* id, index_t k,
                              float* weight) {
  const float max = row_max(row, experts);
  float sum = 0.0f;
  for (index_t i = 0; i < experts; ++i) sum += row[i] > lowest ? std::exp(row[i] - max) : 0.0f;
  for (index_t r = 0; r < k; ++r) weight[r] = id[r] < 0 ? 0.0f : std::exp(row[id[r]] - max) / sum;
}

}  // namespace detail

/// Softmax, a sort of the whole row, the prefix that reaches p.
struct plain_top_p {
  float p = 0.4f;
  std::vector<float> score;
  std::vector<expert_id> order;

  index_t operator()(const float* row, index_t experts, index_t, const side_inputs&, expert_id* id,
                     float* weight) {
    const float total = detail::exponentials(row, experts, detail::row_max(row, experts), score);
    order.clear();
    for (index_t e = 0; e < experts; ++e)
      if (row[e] > detail::lowest) order.push_back(static_cast<expert_id>(e));
    std::sort(order.begin(), order.end(), [&](expert_id a, expert_id b) {
      return row[a] > row[b] || (row[a] == row[b] && a < b);
    });
    float sum = 0.0f;
    index_t n = 0;
    for (const expert_id e : order) {
      id[n] = e;
      weight[n] = score[static_cast<std::size_t>(e)] / total;
      sum += weight[n++];
      if (sum >= p) break;
    }
    return n;
  }
};

/// What is above 0; divided by nothing, by the sum, or by the root of the mean square.
struct plain_relu {
  moeroute::threshold_norm norm = moeroute::threshold_norm::none;

  index_t operator()(const float* row, index_t experts, index_t, const side_inputs&, expert_id* id,
                     float* weight) const {
    index_t n = 0;
    float sum = 0.0f;
    for (index_t e = 0; e < experts; ++e) {
      if (!(row[e] > 0.0f)) continue;
      id[n] = static_cast<expert_id>(e);
      weight[n++] = row[e];
      sum += norm == moeroute::threshold_norm::rms ? row[e] * row[e] : row[e];
    }
    if (norm == moeroute::threshold_norm::none) return n;
    const float divisor = norm == moeroute::threshold_norm::sum
                              ? sum + 1e-5f
                              : std::sqrt(sum / static_cast<float>(experts) + 1e-5f);
    for (index_t r = 0; r < n; ++r) weight[r] /= divisor;
    return n;
  }
};

/// What has a sigmoid above one half, or any other threshold.
struct plain_threshold {
  float threshold = 0.5f;

  index_t operator()(const float* row, index_t experts, index_t, const side_inputs&, expert_id* id,
                     float* weight) const {
    index_t n = 0;
    for (index_t e = 0; e < experts; ++e) {
      const float s = 1.0f / (1.0f + std::exp(-row[e]));
      if (!(s > threshold)) continue;
      id[n] = static_cast<expert_id>(e);
      weight[n++] = s;
    }
    return n;
  }
};

/// Distinct experts by Floyd's sampling, from the same random numbers.
struct plain_random {
  index_t k = 2;

  index_t operator()(const float*, index_t experts, index_t token, const side_inputs& side,
                     expert_id* id, float* weight) const {
    const std::uint64_t stream =
        moeroute::detail::random_stream(moeroute::detail::random_use::random_choice, side.step);
    for (index_t r = 0; r < k; ++r) {
      const auto limit = static_cast<std::uint32_t>(experts - k + r + 1);
      auto e = static_cast<expert_id>(moeroute::random_below(
          limit, side.seed, stream, static_cast<std::uint64_t>(token * k + r)));
      if (std::find(id, id + r, e) != id + r) e = static_cast<expert_id>(limit) - 1;
      id[r] = e;
      weight[r] = 1.0f / static_cast<float>(k);
    }
    return k;
  }
};

/// The largest logit, and a second one: the next, a sampled one, or the next by chance.
struct plain_gshard {
  moeroute::second_expert policy = moeroute::second_expert::best;

  index_t operator()(const float* row, index_t experts, index_t token, const side_inputs& side,
                     expert_id* id, float* weight) const {
    using moeroute::second_expert;
    float value[2];
    plain_selection::insertion(row, experts, 2, id, value);
    if (policy == second_expert::sampling) {
      const std::uint64_t stream =
          moeroute::detail::random_stream(moeroute::detail::random_use::logit_noise, side.step);
      const auto blocks = static_cast<std::uint64_t>((experts + 3) / 4);
      float best = detail::lowest;
      id[1] = moeroute::no_expert;
      for (index_t e = 0; e < experts; e += 4) {
        const moeroute::random_words r = moeroute::random_block(
            side.seed, stream,
            static_cast<std::uint64_t>(token) * blocks + static_cast<std::uint64_t>(e / 4));
        for (index_t i = 0; i < 4 && e + i < experts; ++i) {
          const float noisy = row[e + i] - std::log(-std::log(moeroute::open_u01_of(r.word[i])));
          if (e + i == id[0] || !(noisy > best)) continue;
          best = noisy;
          id[1] = static_cast<expert_id>(e + i);
        }
      }
    }
    detail::softmax_of_chosen(row, experts, id, 2, weight);
    if (policy == second_expert::random) {
      const float u = moeroute::random_u01(
          side.seed,
          moeroute::detail::random_stream(moeroute::detail::random_use::second_expert, side.step),
          static_cast<std::uint64_t>(token));
      if (2.0f * weight[1] <= u) {
        id[1] = moeroute::no_expert;
        weight[1] = 0.0f;
      }
    }
    return 2;
  }
};

/// Twice the best that is left, with its softmax over those close to it.
struct plain_sparsemixer {
  float jitter = 0.01f;
  std::vector<float> left;

  index_t operator()(const float* row, index_t experts, index_t, const side_inputs&, expert_id* id,
                     float* weight) {
    left.assign(row, row + experts);
    for (float& x : left) x = x == x ? x : detail::lowest;
    for (int r = 0; r < 2; ++r) {
      const auto best = std::max_element(left.begin(), left.end());
      const float max = *best;
      id[r] = max > detail::lowest ? static_cast<expert_id>(best - left.begin()) : -1;
      float sum = 0.0f;
      for (const float x : left)
        if (!((max - x) / std::max(std::abs(x), max) > 2.0f * jitter)) sum += std::exp(x - max);
      weight[r] = id[r] < 0 ? 0.0f : 1.0f / sum;
      *best = detail::lowest;
    }
    return 2;
  }
};

/// The k best of each half, sorted; their k^2 sums, sorted.
struct plain_product_keys {
  index_t k = 16;
  plain_selection select;
  std::vector<expert_id> half_id[2];
  std::vector<float> half[2];
  std::vector<std::pair<float, expert_id>> sums;

  index_t operator()(const float* row, index_t columns, index_t, const side_inputs&, expert_id* id,
                     float* weight) {
    const index_t n = columns / 2, m = std::min(k, n);
    for (int h = 0; h < 2; ++h) {
      half_id[h].resize(static_cast<std::size_t>(m));
      half[h].resize(static_cast<std::size_t>(m));
      select.partial_sort(row + h * n, n, m, half_id[h].data(), half[h].data());
    }
    sums.clear();
    for (std::size_t i = 0; i < half[0].size(); ++i)
      for (std::size_t j = 0; j < half[1].size(); ++j)
        sums.emplace_back(half[0][i] + half[1][j],
                          half_id[0][i] * static_cast<expert_id>(n) + half_id[1][j]);
    const auto end = sums.begin() + std::min<std::ptrdiff_t>(k, std::ssize(sums));
    std::partial_sort(sums.begin(), end, sums.end(), [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    });
    float sum = 0.0f;
    for (index_t r = 0; r < k; ++r) {
      const bool there =
          r < end - sums.begin() && sums[static_cast<std::size_t>(r)].first > detail::lowest;
      id[r] = there ? sums[static_cast<std::size_t>(r)].second : moeroute::no_expert;
      weight[r] = there ? std::exp(sums[static_cast<std::size_t>(r)].first - sums[0].first) : 0.0f;
      sum += weight[r];
    }
    for (index_t r = 0; r < k; ++r) weight[r] = sum > 0.0f ? weight[r] / sum : 0.0f;
    return k;
  }
};

/// What the experts that a list names are weighted by.
enum class given_weight { equal, sigmoid, softmax };

/// The experts that a list names; equally, by sigmoid and their sum, or by the softmax over all.
struct plain_given {
  given_weight by = given_weight::sigmoid;

  void operator()(const float* row, index_t experts, const expert_id* given, index_t k,
                  expert_id* id, float* weight) const {
    for (index_t r = 0; r < k; ++r)
      id[r] = given[r] >= 0 && row[given[r]] > detail::lowest ? given[r] : moeroute::no_expert;
    if (by == given_weight::softmax) return detail::softmax_of_chosen(row, experts, id, k, weight);
    float sum = 0.0f;
    for (index_t r = 0; r < k; ++r)
      sum += weight[r] = id[r] < 0                   ? 0.0f
                         : by == given_weight::equal ? 1.0f
                                                     : 1.0f / (1.0f + std::exp(-row[id[r]]));
    for (index_t r = 0; r < k; ++r) weight[r] = sum > 0.0f ? weight[r] / sum : 0.0f;
  }
};

/// The k best logits with a softmax over them.
struct plain_softmax_k {
  index_t k = 2;
  plain_selection select;

  index_t operator()(const float* row, index_t experts, index_t, const side_inputs&, expert_id* id,
                     float* weight) {
    select.partial_sort(row, experts, k, id, weight);
    const float max = weight[0];
    float sum = 0.0f;
    for (index_t r = 0; r < k; ++r) sum += weight[r] = id[r] < 0 ? 0.0f : std::exp(weight[r] - max);
    for (index_t r = 0; r < k; ++r) weight[r] = sum > 0.0f ? weight[r] / sum : 0.0f;
    return k;
  }
};

/// Normal noise of the width softplus(noise logit) + floor on every logit (Box and Muller), then
/// the k best.
struct plain_noisy {
  index_t k = 2;
  plain_softmax_k best{};
  std::vector<float> noisy;

  index_t operator()(const float* row, index_t experts, index_t token, const side_inputs& side,
                     expert_id* id, float* weight) {
    noisy.resize(static_cast<std::size_t>(experts));
    const std::uint64_t stream =
        moeroute::detail::random_stream(moeroute::detail::random_use::logit_noise, side.step);
    const auto blocks = static_cast<std::uint64_t>((experts + 3) / 4);
    const float* width = side.noise_logits.row(token);
    for (index_t e = 0; e < experts; e += 4) {
      const moeroute::random_words r = moeroute::random_block(
          side.seed, stream,
          static_cast<std::uint64_t>(token) * blocks + static_cast<std::uint64_t>(e / 4));
      float normal[4];
      for (int i = 0; i < 4; i += 2) {
        const float radius = std::sqrt(-2.0f * std::log(moeroute::open_u01_of(r.word[i])));
        const float angle = 6.2831853f * moeroute::u01_of(r.word[i + 1]);
        normal[i] = radius * std::cos(angle);
        normal[i + 1] = radius * std::sin(angle);
      }
      for (index_t i = 0; i < 4 && e + i < experts; ++i)
        noisy[static_cast<std::size_t>(e + i)] =
            row[e + i] + normal[i] * (std::log1p(std::exp(width[e + i])) + 0.01f);
    }
    best.k = k;
    return best(noisy.data(), experts, token, side, id, weight);
  }
};

}  // namespace bench
