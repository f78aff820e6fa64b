// Experts that somebody else named, by a table or a record: what a block takes of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/choices.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>

namespace moeroute::detail {

// c gets the experts given(row, rank) of the block's rows, with their logits as values. An expert
// that is masked in the logits cannot be had this way either; lanes without a row get nothing.
template <class A, class Given>
MOEROUTE_INLINE void take_given(const logit_block& z, choice_block& c, const Given& given) {
  using F = simd::vfloat<A>;
  using I = simd::vint<A>;
  const F never(simd::minus_infinity);
  const I none(no_expert), zero(0);
  for (int r = 0; r < c.k; ++r) {
    expert_id* const id = c.id + r * block_rows;
    for (int i = 0; i < z.rows; ++i) id[i] = given(i, r);
    for (int i = z.rows; i < block_rows; ++i) id[i] = no_expert;
  }
  // In registers: whether an expert is there is as good as random in a masked row. And after all
  // ranks: words written one by one are slow to come back as a vector.
  const bool near_rows =
      z.stride <= std::numeric_limits<std::int32_t>::max() / block_rows - max_experts;
  const I row_step(near_rows ? static_cast<std::int32_t>(z.stride) : 0);
  const auto far_logits = [&](int lane, const expert_id* id) {
    alignas(alignment) float x[simd::width<A>];
    for (int i = 0; i < simd::width<A>; ++i)
      x[i] = id[i] < 0 ? simd::minus_infinity : z.row(lane + i)[id[i]];
    return simd::load<A>(x);
  };
  if (z.logits == nullptr) {  // nobody looks at any
    std::fill_n(c.value, c.k * block_rows, 0.0f);
    return;
  }
  for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
    const I start = (simd::lane_numbers<A>() + I(lane)) * row_step;
    for (int at = lane; at < c.k * block_rows; at += block_rows) {
      const I e = simd::load<A>(c.id + at);
      const auto named = simd::differs<A>(e, none);
      const F x = near_rows ? F::gather(z.row(0), simd::select<A>(named, start + e, zero))
                            : far_logits(lane, c.id + at);
      const auto there = named & (x > never);
      simd::select<A>(there, x, never).store_unaligned(c.value + at);
      simd::select<A>(there, e, none).store_unaligned(c.id + at);
    }
  }
}

// Whether a score is the same for every logit.
template <class Score>
constexpr bool is_uniform(const Score& score) {
  if constexpr (requires { score.uniform(); }) {
    return score.uniform();
  } else {
    return std::is_same_v<Score, uniform_score>;
  }
}

// Largest k of rows of given choices that come alone, and so many of them at most.
inline constexpr index_t most_given = block_rows, given_rows_alone = 4;

// A row's k named experts with equal weights; those that are masked in the logits are not taken.
inline void share_given(const weight_rule& weight, const expert_id* named, int k, const float* z,
                        expert_id* id, float* weights) {
  int there = 0;
  for (int r = 0; r < k; ++r) {
    const expert_id e = named[r];
    const bool taken = e != no_expert && (z == nullptr || z[e] > simd::minus_infinity);
    id[r] = taken ? e : no_expert;
    there += taken;
  }
  const float share = there > 0 ? weight.share(there) : 0.0f;
  for (int r = 0; r < k; ++r) weights[r] = id[r] == no_expert ? 0.0f : share;
}

// One row's k <= most_given experts, which somebody else named, weighed.
template <class A, class Score>
void weigh_given(const Score& score, const weight_rule& weight, const expert_id* named, int k,
                 const float* z, index_t experts, expert_id* id, float* weights) {
  if (is_uniform(score) && weight.shares_equally())
    return share_given(weight, named, k, z, id, weights);
  row_choices<A, simd::registers_per_block<A>> c(named, k, z);
  score.score_one(z, experts, c, weight.needs());
  weight.template apply_to<A>(c);
  c.store(id, weights);
}

}  // namespace moeroute::detail
