// Choices that are partly or wholly random: uniform routing, GShard's second expert.
#pragma once

#include <algorithm>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/simd/random.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute {

/// k distinct experts per token, uniformly at random, each with weight 1 / k. Looks at no logit,
/// only at their shape; replays from side_inputs seed and step. For benchmarks and as a baseline.
///
/// Cost: O(k^2) per token, so k should be small against E.
struct random_choice {
  index_t choices = 2;

  struct buffers {};
  index_t k() const { return choices; }
  static index_t experts(index_t columns) { return columns; }
  void check(index_t experts) const { check_range("random_choice", "k", choices, 1, experts); }
  static buffers carve(scratch&, index_t) { return {}; }
  static bool reads_logits() { return false; }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers&, choice_block& c) const {
    const std::uint64_t stream =
        detail::random_stream(detail::random_use::random_choice, z.side->step);
    const auto step = static_cast<std::uint64_t>(choices);
    simd::random_lanes<A> random;
    // Floyd's sampling: the r-th draw is from E - k + r + 1 and yields to the new largest when
    // taken.
    for (int r = 0; r < c.k; ++r) {
      random.place_all(stream,
                       static_cast<std::uint64_t>(z.first_token) * step + static_cast<unsigned>(r),
                       step, z.rows);
      random.draw(z.side->seed, z.rows);
      const auto limit = static_cast<std::uint32_t>(z.experts - choices + r + 1);
      expert_id* const id = c.id + r * block_rows;
      expert_id drawn[block_rows];
      for (int i = 0; i < z.rows; ++i)
        id[i] = drawn[i] = static_cast<expert_id>(random.below(limit, i));
      for (int before = 0; before < r; ++before)
        for (int i = 0; i < z.rows; ++i)
          id[i] =
              c.id[before * block_rows + i] == drawn[i] ? static_cast<expert_id>(limit) - 1 : id[i];
      std::fill_n(c.value + r * block_rows, block_rows, 1.0f / static_cast<float>(choices));
    }
  }

  /// Few rows come one by one: the draws of a row lie side by side.
  index_t rows_alone(index_t) const { return choices <= block_rows ? 4 : 0; }

  template <class A = simd::default_arch>
  void route_row(const float*, index_t experts, index_t token, const side_inputs& side,
                 expert_id* id, float* weights) const {
    const int n = static_cast<int>(choices);
    simd::random_lanes<A> random;
    random.place_all(detail::random_stream(detail::random_use::random_choice, side.step),
                     static_cast<std::uint64_t>(token) * static_cast<std::uint64_t>(choices), 1, n);
    random.draw(side.seed, n);
    for (int r = 0; r < n; ++r) {
      const auto limit = static_cast<std::uint32_t>(experts - choices + r + 1);
      const auto drawn = static_cast<expert_id>(random.below(limit, r));
      id[r] = drawn;
      for (int before = 0; before < r; ++before)
        id[r] = id[before] == drawn ? static_cast<expert_id>(limit) - 1 : id[r];
      weights[r] = 1.0f / static_cast<float>(choices);
    }
  }
};
static_assert(row_router<random_choice>);

/// Top-2: the first expert by probability, the second by `policy`; weights from the softmax over
/// all experts.
///
/// Source: GShard (Lepikhin et al. 2020); NLLB-MoE (2022).
struct gshard_top2 {
  second_expert policy = second_expert::best;
  weight_rule weight{};

  struct buffers {
    float* noisy;  ///< [16, E] for sampling
  };
  static index_t k() { return 2; }
  static index_t experts(index_t columns) { return columns; }
  static side_use reads_side(index_t) { return {.own_k = 2}; }

  /// Throws: error where E < 2.
  void check(index_t experts) const {
    check_range("gshard_top2", "E", experts, 2, max_experts);
    weight.check(experts);
  }
  buffers carve(scratch& tape, index_t experts) const {
    return {tape.take<float>(policy == second_expert::sampling ? block_rows * experts : 0)};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    simd::top_k_block<A>(z.logits, z.stride, z.rows, z.experts, 2, c.value, c.id, nullptr);
    if (policy == second_expert::sampling) {
      // Sampling is from the softmax: a noise gate that is there for others does not widen it.
      side_inputs plain = *z.side;
      plain.noise_logits = {};
      for (int i = 0; i < z.rows; ++i) {
        float* row = memory.noisy + i * z.experts;
        std::copy_n(z.row(i), z.experts, row);
        logit_noise{.kind = noise_kind::gumbel}.add_to_row<A>(row, z.experts, z.first_token + i,
                                                              plain);
        if (c.id[i] != no_expert) row[c.id[i]] = simd::minus_infinity;
      }
      alignas(alignment) float value[block_rows];
      simd::top_k_block<A>(memory.noisy, z.experts, z.rows, z.experts, 1, value, c.id + block_rows,
                           nullptr);
      for (int i = 0; i < z.rows; ++i)
        if (const expert_id e = c.id[block_rows + i]; e != no_expert)
          c.value[block_rows + i] = z.row(i)[e];
    }
    c.has_row_max = true;
    softmax::score_choices<A>(z, c, score_scale::exact);
    if (policy == second_expert::random) {
      simd::random_lanes<A> random;
      random.place_all(detail::random_stream(detail::random_use::second_expert, z.side->step),
                       static_cast<std::uint64_t>(z.first_token), 1, z.rows);
      random.draw(z.side->seed, z.rows);
      for (int i = 0; i < z.rows; ++i) {
        const float u = u01_of(random.word(0, i));
        if (2.0f * c.value[block_rows + i] <= u) c.id[block_rows + i] = no_expert;
      }
    }
    keep_own_k(z, c);
    weight.template apply<A>(c);
  }
};
static_assert(token_router<gshard_top2>);

}  // namespace moeroute
