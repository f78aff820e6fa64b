// Experts that somebody else named, by a table or a record: what a block takes of them.
#pragma once

#include <moeroute/policy/concepts.hpp>

namespace moeroute::detail {

// c gets the experts given(row, rank) of the block's rows, with their logits as values. An expert
// that is masked in the logits cannot be had this way either; lanes without a row get nothing.
template <class A, class Given>
MOEROUTE_INLINE void take_given(const logit_block& z, choice_block& c, const Given& given) {
  using F = simd::vfloat<A>;
  const F never(simd::minus_infinity);
  const simd::vint<A> none(no_expert);
  for (int r = 0; r < c.k; ++r) {
    expert_id* const id = c.id + r * block_rows;
    float* const value = c.value + r * block_rows;
    for (int i = 0; i < z.rows; ++i) {
      const expert_id e = given(i, r);
      id[i] = e;
      value[i] = z.row(i)[e < 0 ? 0 : e];
    }
    for (int i = z.rows; i < block_rows; ++i) {
      id[i] = no_expert;
      value[i] = simd::minus_infinity;
    }
    // In registers: whether an expert is there is as good as random in a masked row.
    for (int lane = 0; lane < block_rows; lane += simd::width<A>) {
      const F x = simd::load<A>(value + lane);
      const simd::vint<A> e = simd::load<A>(id + lane);
      const auto there = simd::differs<A>(e, none) & (x > never);
      simd::select<A>(there, x, never).store_unaligned(value + lane);
      simd::select<A>(there, e, none).store_unaligned(id + lane);
    }
  }
}

}  // namespace moeroute::detail
