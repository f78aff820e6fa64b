// The list of the laws with what they need: for the routers of the library, and for a router of
// one's own (docs/adding-a-router.md).
#pragma once

#include <string>
#include <vector>

#include "laws/router_laws.hpp"

namespace test {

/// A law, and the routers that promise it.
struct named_law {
  const char* title;
  /// The first break in words, empty where there is none.
  std::string (*obeys)(const listed_router&);
  bool (*promised)(const listed_router&) = [](const listed_router&) { return true; };
};

namespace laws {
inline bool has_an_oracle(const listed_router& r) { return r.reference || r.verify; }
inline bool sees_one_row(const listed_router& r) { return r.rows_apart; }
}  // namespace laws

inline const std::vector<named_law> all_laws = {
    {"ids are in range or -1 with weight 0, never twice in a row, and weights are finite",
     laws::is_well_formed},
    {"NaN and -inf are never selected", laws::never_selects_what_is_masked},
    {"a NaN logit counts as -inf", laws::takes_nan_for_minus_infinity},
    {"-0 equals +0", laws::takes_both_zeros_alike},
    {"several +inf experts share the weight equally", laws::shares_among_infinities,
     [](const listed_router& r) { return r.shares; }},
    {"every router decides what its oracle decides, on every shape", laws::agrees_with_the_oracle,
     laws::has_an_oracle},
    {"every router decides what its oracle decides, for every E and k",
     laws::agrees_with_the_oracle_at_every_size, laws::has_an_oracle},
    {"ties go to the lower id", laws::gives_ties_to_the_lower_id,
     [](const listed_router& r) { return r.permutable; }},
    {"every expert can win", laws::lets_every_expert_win,
     [](const listed_router& r) { return r.permutable; }},
    {"adding a constant to a row of a shift-invariant router changes nothing",
     laws::ignores_a_shift, [](const listed_router& r) { return r.shift_invariant; }},
    {"choices of a row do not depend on other rows", laws::routes_each_row_by_itself,
     laws::sees_one_row},
    {"permuted tokens have permuted choices", laws::follows_a_permutation_of_tokens,
     laws::sees_one_row},
    {"masked tokens have no choices", laws::leaves_masked_tokens_out},
    {"renumbered experts have renumbered choices", laws::follows_a_renumbering_of_experts,
     [](const listed_router& r) { return r.permutable; }},
    {"choices do not depend on executor and threads", laws::does_not_depend_on_threads},
    {"bfloat16 logits are routed as the floats they widen to", laws::widens_logits_once<bfloat16>},
    {"float16 logits are routed as the floats they widen to", laws::widens_logits_once<float16>},
    {"rows are read by their stride", laws::reads_rows_by_their_stride},
    {"a warm router never allocates", laws::allocates_nothing_when_warm},
    {"no tokens are no choices", laws::takes_no_tokens},
};

}  // namespace test
