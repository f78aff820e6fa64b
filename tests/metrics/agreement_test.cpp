#include <moeroute/metrics/agreement.hpp>

#include <catch2/catch_test_macros.hpp>
#include <vector>

#include "support/refusal.hpp"

using namespace moeroute;

namespace {

assignment made_of(std::vector<expert_id> ids, index_t k) {
  assignment a;
  a.reset(static_cast<index_t>(ids.size()) / k, 8, k);
  std::copy(ids.begin(), ids.end(), a.ids().begin());
  return a;
}

}  // namespace

TEST_CASE("a routing does not disagree with itself, in whatever order its ranks are") {
  const disagreement d = selection_disagreement(made_of({1, 2, 3, 4}, 2), made_of({2, 1, 4, 3}, 2));
  CHECK(d.tokens == 2);
  CHECK(d.differing_tokens == 0);
  CHECK(d.choice_rate() == 0.0);
}

TEST_CASE("differing choices are counted per choice, differing tokens once") {
  const disagreement d =
      selection_disagreement(made_of({1, 2, 3, 4, 5, 6}, 2), made_of({1, 7, 0, 2, 5, 6}, 2));
  CHECK(d.differing_tokens == 2);
  CHECK(d.differing_choices == 3);
  CHECK(d.choices == 6);
  CHECK(d.token_rate() == 2.0 / 3.0);
  CHECK(d.choice_rate() == 0.5);
}

TEST_CASE("no_expert is no choice: it cannot disagree, but a choice made once and not again does") {
  const disagreement gone = selection_disagreement(made_of({1, 2}, 2), made_of({1, no_expert}, 2));
  CHECK(gone.differing_choices == 1);
  CHECK(gone.differing_tokens == 1);
  const disagreement come = selection_disagreement(made_of({1, no_expert}, 2), made_of({1, 2}, 2));
  CHECK(come.choices == 1);
  CHECK(come.differing_choices == 0);
  CHECK(come.differing_tokens == 1);
}

TEST_CASE("routings of other numbers of tokens are not compared; of none the rates are 0") {
  CHECK(test::refusal([] { selection_disagreement(made_of({1}, 1), made_of({1, 2}, 1)); }) ==
        "moeroute::selection_disagreement: b.tokens is 2, expected 1");
  const disagreement none = selection_disagreement(made_of({}, 1), made_of({}, 1));
  CHECK((none.token_rate() == 0.0 && none.choice_rate() == 0.0));
  const disagreement unsaid;
  CHECK((unsaid.tokens == 0 && unsaid.choices == 0));
}
