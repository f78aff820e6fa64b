#include "laws/router_laws.hpp"

#include <catch2/catch_test_macros.hpp>
#include <functional>
#include <string>

#include "support/counting_new.hpp"

using namespace test;

namespace {

using law = std::function<std::string(const listed_router&)>;

// Every router of the list, or those that promise it, obeys the law.
void all_obey(const law& obeys, const std::function<bool(const listed_router&)>& promises = {}) {
  int asked = 0;
  for (const listed_router& router : listed_routers()) {
    if (promises && !promises(router)) continue;
    ++asked;
    CHECK(obeys(router) == "");
  }
  CHECK(asked > 0);
}

bool renumbers(const listed_router& r) { return r.permutable; }

}  // namespace

TEST_CASE("ids are in range or -1 with weight 0, never twice in a row, and weights are finite") {
  all_obey(laws::is_well_formed);
}
TEST_CASE("NaN and -inf are never selected") { all_obey(laws::never_selects_what_is_masked); }
TEST_CASE("a NaN logit counts as -inf") { all_obey(laws::takes_nan_for_minus_infinity); }
TEST_CASE("-0 equals +0") { all_obey(laws::takes_both_zeros_alike); }
TEST_CASE("several +inf experts share the weight equally") {
  all_obey(laws::shares_among_infinities, [](const listed_router& r) { return r.shares; });
}
TEST_CASE("every router decides what its oracle decides, on every shape") {
  all_obey(laws::agrees_with_the_oracle);
}
TEST_CASE("every router decides what its oracle decides, for every E and k") {
  all_obey(laws::agrees_with_the_oracle_at_every_size);
}
TEST_CASE("ties go to the lower id") { all_obey(laws::gives_ties_to_the_lower_id, renumbers); }
TEST_CASE("every expert can win") { all_obey(laws::lets_every_expert_win, renumbers); }
TEST_CASE("adding a constant to a row of a shift-invariant router changes nothing") {
  all_obey(laws::ignores_a_shift, [](const listed_router& r) { return r.shift_invariant; });
}
TEST_CASE("choices of a row do not depend on other rows") {
  all_obey(laws::routes_each_row_by_itself);
}
TEST_CASE("permuted tokens have permuted choices") {
  all_obey(laws::follows_a_permutation_of_tokens);
}
TEST_CASE("renumbered experts have renumbered choices") {
  all_obey(laws::follows_a_renumbering_of_experts, renumbers);
}
TEST_CASE("choices do not depend on executor and threads") {
  all_obey(laws::does_not_depend_on_threads);
}
TEST_CASE("bfloat16 logits are routed as the floats they widen to") {
  all_obey(laws::widens_logits_once<bfloat16>);
}
TEST_CASE("float16 logits are routed as the floats they widen to") {
  all_obey(laws::widens_logits_once<float16>);
}
TEST_CASE("rows are read by their stride") { all_obey(laws::reads_rows_by_their_stride); }
TEST_CASE("a warm router never allocates") { all_obey(laws::allocates_nothing_when_warm); }
TEST_CASE("no tokens are no choices") { all_obey(laws::takes_no_tokens); }
