// Plans straight from expert choice: lists of tokens instead of an assignment.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/route.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"

using namespace moeroute;
using test::listed;

namespace {

using ints = std::vector<std::int32_t>;
using flags = std::vector<std::uint8_t>;

struct lists_of {
  index_t tokens, experts, capacity;
  ints token;
  std::vector<float> weight;

  expert_lists view() const { return {tokens, experts, capacity, token, weight}; }
};

// Distinct tokens in random order, or ascending; one place in `none_in` is empty.
lists_of random_lists(test::random& rng, index_t tokens, index_t experts, index_t capacity,
                      bool ascending, int none_in) {
  lists_of made{tokens, experts, capacity, {}, {}};
  ints all(static_cast<std::size_t>(tokens));
  for (index_t e = 0; e < experts; ++e) {
    std::iota(all.begin(), all.end(), 0);
    for (index_t i = 0; i < tokens; ++i)
      std::swap(all[static_cast<std::size_t>(i)],
                all[static_cast<std::size_t>(i + rng.below(tokens - i))]);
    ints list(all.begin(), all.begin() + capacity);
    if (ascending) std::sort(list.begin(), list.end());
    for (std::int32_t& t : list)
      if (none_in > 0 && rng.below(none_in) == 0) t = no_token;
    made.token.insert(made.token.end(), list.begin(), list.end());
  }
  for (std::size_t i = 0; i < made.token.size(); ++i) made.weight.push_back(rng.uniform());
  return made;
}

// The assignment of the lists: token by token, the experts that have it.
assignment by_tokens(const lists_of& l) {
  assignment a;
  a.reset_ragged(l.tokens, l.experts, l.experts, static_cast<index_t>(l.token.size()));
  const assignment::parts p = a.to_fill();
  std::int32_t n = 0;
  for (index_t t = 0; t < l.tokens; ++t) {
    p.offsets[t] = n;
    for (index_t e = 0; e < l.experts; ++e)
      for (index_t i = e * l.capacity; i < (e + 1) * l.capacity; ++i)
        if (l.token[static_cast<std::size_t>(i)] == t) {
          p.ids[n] = static_cast<expert_id>(e);
          p.weights[n++] = l.weight[static_cast<std::size_t>(i)];
        }
  }
  p.offsets[l.tokens] = n;
  a.close();
  return a;
}

std::string difference(const dispatch_plan& a, const dispatch_plan& b) {
  if (a.tokens() != b.tokens() || a.experts() != b.experts() || a.k() != b.k()) return "sizes";
  if (a.choices() != b.choices()) return "choices";
  for (index_t t = 0; t <= a.tokens(); ++t)
    if (a.first(t) != b.first(t)) return "first";
  if (listed(a.offsets()) != listed(b.offsets())) return "offsets";
  if (listed(a.token_of_slot()) != listed(b.token_of_slot())) return "token_of_slot";
  if (listed(a.slot_of_choice()) != listed(b.slot_of_choice())) return "slot_of_choice";
  for (index_t e = 0; e < a.experts(); ++e)
    if (a.load(e) != b.load(e)) return "load";
  if (a.kept() != b.kept() || a.dropped() != b.dropped() || a.elsewhere() != b.elsewhere() ||
      a.unrouted() != b.unrouted() || a.padding() != b.padding())
    return "counts";
  return "";
}

bool ascending(const lists_of& l) { return std::is_sorted(l.token.begin(), l.token.end()); }

template <class F>
void for_each_lists(F&& f) {
  test::random rng(70);
  for (const index_t tokens : {0, 1, 5, 31, 33, 200})
    for (const index_t experts : {1, 4, 17})
      for (const index_t capacity : {0, 1, 3, 16, 40})
        for (const bool ascending : {false, true})
          for (const int none_in : {0, 4})
            if (capacity <= tokens)
              f(random_lists(rng, tokens, experts, capacity, ascending, none_in));
}

}  // namespace

TEST_CASE("a plan of lists is the plan of the assignment that they make, under every option") {
  test::random rng(71);
  dispatch_plan direct, detour;
  for_each_lists([&](const lists_of& l) {
    const assignment a = by_tokens(l);
    flags owned(static_cast<std::size_t>(l.experts)), mask(static_cast<std::size_t>(l.tokens));
    for (auto& x : owned) x = static_cast<std::uint8_t>(rng.below(2));
    for (auto& x : mask) x = static_cast<std::uint8_t>(rng.below(3) != 0);
    constexpr auto spare = slot_padding::spare_tokens;
    for (const plan_options& o :
         {plan_options{}, plan_options{.block = 4}, plan_options{.capacity = l.capacity},
          plan_options{.block = 8, .capacity = l.capacity + 3, .padding = spare},
          plan_options{.owned = owned}, plan_options{.mask = mask},
          plan_options{.block = 3, .padding = spare, .owned = owned, .mask = mask}}) {
      INFO("T=" << l.tokens << " E=" << l.experts << " C=" << l.capacity);
      std::vector<float> weights(l.token.size());
      if (l.tokens == 31) {
        const test::forbidden_memory around(ascending(l) ? test::guarded_end::front
                                                         : test::guarded_end::back);
        dispatch_plan fresh;
        plan(l.view(), fresh, o, weights);
        plan(a, detour, o);
        CHECK(difference(fresh, detour) == "");
      }
      plan(l.view(), direct, o, weights);
      plan(a, detour, o);
      CHECK(difference(direct, detour) == "");
      weights.resize(static_cast<std::size_t>(direct.choices()));
      CHECK(test::bit_difference(weights,
                                 std::vector<float>(a.weights().begin(), a.weights().end())) == "");
    }
  });
}

TEST_CASE("rows go through a plan of lists as through that of its assignment") {
  test::random rng(72);
  const lists_of l = random_lists(rng, 60, 9, 12, false, 5);
  const assignment a = by_tokens(l);
  dispatch_plan p;
  std::vector<float> weights(l.token.size());
  plan(l.view(), p, {}, weights);
  weights.resize(static_cast<std::size_t>(p.choices()));
  const row_matrix<float> x = test::random_rows(60, 37, 73);
  row_matrix<float> slots(p.slots(), 37), y(60, 37), expected(60, 37);
  dispatch(x, p, slots);
  for (const lost_token lost : {lost_token::zero, lost_token::residual}) {
    const combine_options<> o{.lost = lost, .x = const_view(x)};
    combine(slots, p, std::span<const float>(weights), y, serial{}, o);
    combine(slots, p, a, expected, o);
    CHECK(test::bit_difference(test::values(y), test::values(expected)) == "");
  }
  CHECK(test::refusal([&] { combine(slots, p, std::span<const float>(weights).first(3), y); }) ==
        "moeroute::combine: weights.size() is 3, expected " + std::to_string(p.choices()));
  CHECK(test::refusal([&] {
          combine(slots, p, std::span<const float>(weights), y, serial{},
                  combine_options<>{.identity_end = 2, .x = const_view(x)});
        }) == "moeroute::combine: identity_end is 2, expected 0 to 0");
}

TEST_CASE("a plan from expert choice asks for memory by its choices, not by tokens times experts") {
  constexpr index_t tokens = 2048, experts = 64, capacity = 64;
  const row_matrix<float> logits = test::random_rows(tokens, experts, 74);
  workspace ws;
  assignment a;
  route(expert_choice<softmax>{.capacity = {.fixed = capacity}}, const_view(logits), ws, a);
  REQUIRE(a.choices() == experts * capacity);
  // slot_of_choice, token_of_slot and the token of each choice; offsets of tokens and of experts.
  constexpr long most = 4 * (3 * experts * capacity + tokens + 1 + 3 * (experts + 1));
  static_assert(most < 4 * tokens * experts / 4);
  dispatch_plan detour, direct;
  CHECK(test::bytes_allocated_during([&] { plan(a, detour); }) <= most);
  lists_of l{tokens, experts, capacity, ints(experts * capacity, no_token), {}};
  std::vector<index_t> filled(experts, 0);
  for (index_t t = 0; t < tokens; ++t)
    for (const expert_id e : a.ids(t))
      l.token[static_cast<std::size_t>(e * capacity + filled[static_cast<std::size_t>(e)]++)] =
          static_cast<std::int32_t>(t);
  CHECK(test::bytes_allocated_during([&] { plan(l.view(), direct); }) <= most);
  CHECK(difference(direct, detour) == "");
}

TEST_CASE("a warm plan of lists never allocates") {
  test::random rng(75);
  const lists_of some = random_lists(rng, 100, 8, 20, false, 0),
                 other = random_lists(rng, 90, 8, 20, true, 3);
  std::vector<float> weights(160);
  dispatch_plan p;
  const auto all = [&] {
    for (const lists_of* l : {&some, &other}) {
      plan(l->view(), p);
      plan(l->view(), p, {.block = 16, .padding = slot_padding::spare_tokens}, weights);
    }
  };
  all();
  CHECK(test::allocations_during(all) == 0);
}

TEST_CASE("lists that do not fit are refused by name") {
  test::random rng(76);
  lists_of l = random_lists(rng, 10, 4, 3, false, 0);
  dispatch_plan p;
  std::vector<float> eleven(11), twelve(12);
  const auto refused = [&](const plan_options& o = {}, std::span<float> weights = {}) {
    return test::refusal([&] { plan(l.view(), p, o, weights); });
  };
  CHECK(refused({}, twelve) == "accepted");
  CHECK(refused({}, eleven) == "moeroute::plan: weights.size() is 11, expected 12");
  CHECK(refused({.block = 0}) == "moeroute::plan: block is 0, expected 1 to 2147483647");
  for (const index_t block : {1, 4})
    CHECK(refused({.block = block, .capacity = 2}) ==
          "moeroute::plan: expert 0 has 3 tokens, expected at most the capacity 2");
  // Weights in place would be read after they were written.
  CHECK(refused({}, l.weight) ==
        "moeroute::plan: weights and lists.weight overlap, expected memory of their own");
  l.weight.clear();
  CHECK(refused({}, twelve) == "moeroute::plan: lists.weight.size() is 0, expected 12");
  for (const std::int32_t bad : {10, -2}) {
    l.token[7] = bad;
    CHECK(refused() == "moeroute::plan: place 7 of the lists has token " + std::to_string(bad) +
                           ", expected -1 to 9");
  }
  l.token.pop_back();
  CHECK(refused() == "moeroute::plan: lists.token.size() is 11, expected 12");
  l.capacity = index_t{1} << 30;
  CHECK(refused() ==
        "moeroute::plan: lists.experts * capacity is 4294967296, expected 0 to 2147483647");
  l.capacity = index_t{1} << 32;
  CHECK(refused() == "moeroute::plan: lists.capacity is 4294967296, expected 0 to 2147483647");
  l.capacity = 3;
  expert_lists none = l.view();
  none.tokens = -1;
  CHECK(test::refusal([&] { plan(none, p); }) ==
        "moeroute::plan: lists.tokens is -1, expected 0 to 2147483647");
  const auto lists = [&](index_t tokens, index_t experts, index_t capacity) {
    none.tokens = tokens;
    none.experts = experts;
    none.capacity = capacity;
    return test::refusal([&] { plan(none, p); });
  };
  constexpr index_t beyond = index_t{1} << 31;
  CHECK(lists(beyond, 4, 3) ==
        "moeroute::plan: lists.tokens is 2147483648, expected 0 to 2147483647");
  CHECK(lists(10, 1048577, 3) == "moeroute::plan: lists.experts is 1048577, expected 1 to 1048576");
  CHECK(lists(10, 4, -1) == "moeroute::plan: lists.capacity is -1, expected 0 to 2147483647");
  CHECK(lists(10, 1, beyond) ==
        "moeroute::plan: lists.capacity is 2147483648, expected 0 to 2147483647");
  // The ends are taken: what does not fit then is the list.
  CHECK(lists(beyond - 1, 1048576, 1) ==
        "moeroute::plan: lists.token.size() is 11, expected 1048576");
  CHECK(lists(10, 1, beyond - 1) ==
        "moeroute::plan: lists.token.size() is 11, expected 2147483647");
  const std::vector<float> eleven_weights(11);
  none.weight = eleven_weights;
  none.token = std::span<const std::int32_t>(l.token).first(8);
  CHECK(lists(10, 4, 2) == "moeroute::plan: lists.weight.size() is 11, expected 8");
  none.capacity = 3;
  none.tokens = 10;
  none.experts = 0;
  CHECK(test::refusal([&] { plan(none, p); }) ==
        "moeroute::plan: lists.experts is 0, expected 1 to 1048576");
}
