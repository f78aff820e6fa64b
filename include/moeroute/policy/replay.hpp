// Replay: recorded experts, weights from the logits of now.
#pragma once

#include <moeroute/data/routing_record.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/logit_transform.hpp>
#include <moeroute/policy/score.hpp>
#include <moeroute/policy/weight.hpp>

namespace moeroute {

/// A router that takes its experts from a record and weighs them by the current logits with the
/// score and weight rules of the router that was recorded.
///
/// An expert that is masked now (NaN or -inf) is not taken. Cost: O(k) per row, plus a pass over
/// the row where the score needs it.
template <score_function Score, class Id>
struct replay {
  const routing_record<Id>* record = nullptr;
  [[no_unique_address]] Score score{};
  weight_rule weight{};
  logit_transform transform{};

  struct buffers {
    float* logits;
  };
  index_t k() const { return record == nullptr ? 1 : record->k(); }
  static index_t experts(index_t columns) { return columns; }

  /// Throws: error where there is no record or it was made for another E.
  void check(index_t experts) const {
    if (record == nullptr) fail("replay", "record is missing");
    check_size("replay", "record.experts", record->experts(), experts);
    transform.check(experts);
    weight.check(experts);
  }
  buffers carve(scratch& tape, index_t experts) const {
    return {tape.take<float>(transform.active() ? block_rows * experts : 0)};
  }

  /// Throws: error where the record has fewer tokens.
  template <class A = simd::default_arch>
  void route_block(logit_block z, const buffers& memory, choice_block& c) const {
    check_range("replay", "tokens", z.first_token + z.rows, 0, record->tokens());
    if (transform.active()) z = transform.template apply<A>(z, memory.logits);
    for (int i = 0; i < block_rows; ++i)
      for (int r = 0; r < c.k; ++r) {
        const expert_id e = i < z.rows ? record->id((z.first_token + i) * c.k + r) : no_expert;
        const bool there = e != no_expert && z.row(i)[e] > simd::minus_infinity;
        c.id[r * block_rows + i] = there ? e : no_expert;
        c.value[r * block_rows + i] = there ? z.row(i)[e] : simd::minus_infinity;
      }
    score.template score_choices<A>(z, c, weight.needs());
    weight.template apply<A>(c);
  }
};
static_assert(token_router<replay<softmax, std::uint8_t>>);

}  // namespace moeroute
