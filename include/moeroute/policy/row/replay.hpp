// Replay: recorded experts, weights from the logits of now.
#pragma once

#include <type_traits>

#include <moeroute/data/routing_record.hpp>
#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/given_choice.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>

namespace moeroute {

/// A router that takes its experts from a record and weighs them by the current logits with the
/// score and weight rules of the router that was recorded.
///
/// An expert that is masked now (NaN or -inf) is not taken. Cost: O(k) per row, plus a pass over
/// the row where the score needs it.
template <score_function Score, class Id>
struct replay {
  const routing_record<Id>* record = nullptr;
  Score score{};
  weight_rule weight{};
  logit_transform transform{};

  struct buffers {
    float* logits;
  };
  index_t k() const { return record == nullptr ? 1 : record->k(); }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t) const {
    return {.own_k = k(), .noise_logits = transform.noise.active()};
  }
  bool reads_logits() const { return !detail::is_uniform(score) || transform.active(); }

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
    const index_t first = z.first_token * c.k;
    detail::take_given<A>(z, c, [&](int i, int r) { return record->id(first + i * c.k + r); });
    keep_own_k(z, c);
    score.template score_choices<A>(z, c, weight.needs());
    weight.template apply<A>(c);
  }

  /// Few rows come one by one.
  index_t rows_alone(index_t) const {
    return !transform.active() && k() <= detail::most_given ? detail::given_rows_alone : 0;
  }

  /// Throws: error where the record has fewer tokens.
  template <class A = simd::default_arch>
    requires row_score<Score>
  void route_row(const float* z, index_t experts, index_t token, const side_inputs&, expert_id* id,
                 float* weights) const {
    check_range("replay", "tokens", token + 1, 0, record->tokens());
    const int choices = static_cast<int>(record->k());
    expert_id named[detail::most_given];
    for (int r = 0; r < choices; ++r) named[r] = record->id(token * choices + r);
    detail::weigh_given<A>(score, weight, named, choices, z, experts, id, weights);
  }
};
static_assert(row_router<replay<softmax, std::uint8_t>>);

}  // namespace moeroute
