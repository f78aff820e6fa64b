#include <moeroute/stage/plan.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/counting_new.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::listed;

namespace {

using ints = std::vector<std::int32_t>;
using flags = std::vector<std::uint8_t>;

struct expectation {
  ints offsets, load, token_of_slot, slot_of_choice;
  index_t kept = 0, dropped = 0, elsewhere = 0, unrouted = 0;
};

// Expert by expert, all choices are looked at.
expectation by_brute_force(const assignment& a, const plan_options& o) {
  expectation p;
  const ints token = test::tokens_of(a);
  p.slot_of_choice.assign(token.size(), no_slot);
  const auto fate = [&](std::size_t c) {
    const expert_id e = a.ids()[c];
    if (e < 0 || (!o.mask.empty() && o.mask[static_cast<std::size_t>(token[c])] == 0)) return 'u';
    if (!a.kept(static_cast<index_t>(c))) return 'd';
    return !o.owned.empty() && o.owned[static_cast<std::size_t>(e)] == 0 ? 'e' : 'k';
  };
  for (std::size_t c = 0; c < token.size(); ++c) {
    p.kept += fate(c) == 'k';
    p.dropped += fate(c) == 'd';
    p.elsewhere += fate(c) == 'e';
    p.unrouted += fate(c) == 'u';
  }
  for (expert_id e = 0; e < a.experts(); ++e) {
    p.offsets.push_back(static_cast<std::int32_t>(p.token_of_slot.size()));
    std::int32_t load = 0;
    for (std::size_t c = 0; c < token.size(); ++c)
      if (a.ids()[c] == e && fate(c) == 'k') {
        p.slot_of_choice[c] = static_cast<std::int32_t>(p.token_of_slot.size());
        p.token_of_slot.push_back(token[c]);
        ++load;
      }
    p.load.push_back(load);
    index_t rows = o.capacity == as_needed ? load : o.capacity;
    while (rows % o.block != 0) ++rows;
    const auto own = p.token_of_slot.end() - load;
    const ints served(own, p.token_of_slot.end());
    if (o.padding == slot_padding::spare_tokens)
      for (std::int32_t t = 0; t < a.tokens() && load < rows; ++t)
        if ((o.mask.empty() || o.mask[static_cast<std::size_t>(t)] != 0) &&
            std::find(served.begin(), served.end(), t) == served.end()) {
          p.token_of_slot.push_back(t);
          --rows;
        }
    for (index_t r = load; r < rows; ++r) p.token_of_slot.push_back(no_token);
  }
  p.offsets.push_back(static_cast<std::int32_t>(p.token_of_slot.size()));
  return p;
}

std::string difference(const dispatch_plan& p, const expectation& e) {
  if (listed(p.offsets()) != e.offsets) return "offsets";
  if (listed(p.token_of_slot()) != e.token_of_slot) return "token_of_slot";
  if (listed(p.slot_of_choice()) != e.slot_of_choice) return "slot_of_choice";
  for (index_t x = 0; x < p.experts(); ++x)
    if (p.load(x) != e.load[static_cast<std::size_t>(x)]) return "load";
  if (p.kept() != e.kept || p.dropped() != e.dropped || p.elsewhere() != e.elsewhere ||
      p.unrouted() != e.unrouted)
    return "counts";
  if (p.kept() + p.padding() != p.slots()) return "padding";
  return "";
}

// Fixed and ragged, with and without drops, small and large.
template <class F>
void for_every_size(F&& f) {
  test::random rng(3);
  for (const index_t tokens : {0, 1, 2, 5, 33, 200})
    for (const index_t experts : {1, 2, 7, 16, 100})
      for (const index_t k : {1, 2, 5, 8}) {
        if (k > experts) continue;
        assignment fixed = test::fixed_choices(rng, tokens, experts, k, k == 2 ? 5 : 0);
        assignment ragged = test::ragged_choices(rng, tokens, experts, k);
        f(fixed);
        f(ragged);
        test::drop_some(rng, fixed, 3);
        test::drop_some(rng, ragged, 3);
        f(fixed);
        f(ragged);
      }
}

}  // namespace

TEST_CASE("a plan equals the one that looks at all choices of every expert") {
  dispatch_plan p;
  for_every_size([&](const assignment& a) {
    plan(a, p);
    INFO("T=" << a.tokens() << " E=" << a.experts() << " k=" << a.k() << " ragged " << a.ragged());
    CHECK(difference(p, by_brute_force(a, {})) == "");
  });
}

TEST_CASE("masked tokens and experts of others get no slot, and are counted") {
  dispatch_plan p;
  test::random rng(4);
  for_every_size([&](const assignment& a) {
    flags owned(static_cast<std::size_t>(a.experts())), mask(static_cast<std::size_t>(a.tokens()));
    for (auto& x : owned) x = static_cast<std::uint8_t>(rng.below(2));
    for (auto& x : mask) x = static_cast<std::uint8_t>(rng.below(3) != 0);
    for (const plan_options& o : {plan_options{.owned = owned}, plan_options{.mask = mask},
                                  plan_options{.block = 4, .owned = owned, .mask = mask}}) {
      plan(a, p, o);
      CHECK(difference(p, by_brute_force(a, o)) == "");
    }
  });
}

TEST_CASE("padding fills every expert's rows up to a multiple, behind its tokens") {
  dispatch_plan p;
  for_every_size([&](const assignment& a) {
    for (const index_t block : {2, 3, 8, 64}) {
      plan(a, p, {.block = block});
      CHECK(difference(p, by_brute_force(a, {.block = block})) == "");
      for (index_t e = 0; e < a.experts(); ++e) CHECK(p.rows(e) % block == 0);
    }
  });
}

TEST_CASE("padded to a capacity every expert has exactly that many slots") {
  dispatch_plan p;
  for_every_size([&](const assignment& a) {
    plan(a, p);
    index_t greatest = 0;
    for (index_t e = 0; e < a.experts(); ++e) greatest = std::max(greatest, p.load(e));
    for (const index_t capacity : {greatest, greatest + 3})
      for (const index_t block : {1, 4}) {
        const plan_options o{.block = block, .capacity = capacity};
        plan(a, p, o);
        CHECK(difference(p, by_brute_force(a, o)) == "");
        CHECK(p.slots() == a.experts() * round_up(capacity, block));
      }
  });
}

TEST_CASE("padded with spare tokens a slot has the lowest token that its expert does not serve") {
  dispatch_plan p;
  test::random rng(8);
  for_every_size([&](const assignment& a) {
    plan(a, p);
    index_t greatest = 0;
    for (index_t e = 0; e < a.experts(); ++e) greatest = std::max(greatest, p.load(e));
    flags owned(static_cast<std::size_t>(a.experts())), mask(static_cast<std::size_t>(a.tokens()));
    for (auto& x : owned) x = static_cast<std::uint8_t>(rng.below(2));
    for (auto& x : mask) x = static_cast<std::uint8_t>(rng.below(3) != 0);
    constexpr auto spare = slot_padding::spare_tokens;
    for (const plan_options& o :
         {plan_options{.padding = spare}, plan_options{.block = 8, .padding = spare},
          plan_options{.capacity = greatest, .padding = spare},
          plan_options{.block = 4, .capacity = greatest + 3, .padding = spare},
          plan_options{.block = 16, .padding = spare, .owned = owned, .mask = mask}}) {
      plan(a, p, o);
      CHECK(difference(p, by_brute_force(a, o)) == "");
    }
  });
}

TEST_CASE("kept, dropped, elsewhere and unrouted add up to all choices, and the loads to kept") {
  dispatch_plan p;
  for_every_size([&](const assignment& a) {
    plan(a, p);
    index_t loads = 0;
    for (index_t e = 0; e < a.experts(); ++e) loads += p.load(e);
    CHECK(loads == p.kept());
    CHECK(p.kept() + p.dropped() + p.elsewhere() + p.unrouted() == a.choices());
  });
}

TEST_CASE("slot and choice are inverse to each other, and tokens ascend within an expert") {
  dispatch_plan p;
  for_every_size([&](const assignment& a) {
    plan(a, p);
    const ints token = test::tokens_of(a);
    flags seen(static_cast<std::size_t>(p.slots()));
    bool inverse = true, ascending = true;
    for (std::size_t c = 0; c < token.size(); ++c) {
      const slot_id s = p.slot_of_choice()[c];
      if (s == no_slot) continue;
      inverse &= p.token_of_slot()[static_cast<std::size_t>(s)] == token[c];
      inverse &= seen[static_cast<std::size_t>(s)]++ == 0;
    }
    inverse &= std::accumulate(seen.begin(), seen.end(), index_t{0}) == p.slots();
    for (index_t e = 0; e < a.experts(); ++e)
      for (index_t s = p.offsets()[static_cast<std::size_t>(e)] + 1;
           s < p.offsets()[static_cast<std::size_t>(e) + 1]; ++s)
        ascending &= p.token_of_slot()[static_cast<std::size_t>(s - 1)] <=
                     p.token_of_slot()[static_cast<std::size_t>(s)];
    CHECK(inverse);
    CHECK(ascending);
  });
}

TEST_CASE("a warm plan never allocates, whatever its options") {
  test::random rng(5);
  const assignment fixed = test::fixed_choices(rng, 100, 32, 4);
  const assignment ragged = test::ragged_choices(rng, 100, 32, 4);
  const assignment other = test::ragged_choices(rng, 100, 32, 4);
  const flags owned(32, 1);
  const auto all = [&](dispatch_plan& p) {
    for (const assignment* a : {&fixed, &ragged, &other}) {
      plan(*a, p);
      plan(*a, p, {.block = 16});
      plan(*a, p, {.capacity = 100});
      plan(*a, p, {.block = 16, .padding = slot_padding::spare_tokens});
      plan(*a, p, {.owned = owned});
    }
  };
  dispatch_plan p;
  all(p);
  CHECK(test::allocations_during([&] { all(p); }) == 0);
}

TEST_CASE("what a plan refuses, it refuses by name") {
  test::random rng(6);
  assignment a = test::fixed_choices(rng, 10, 4, 2);
  dispatch_plan p;
  const flags three(3, 1);
  CHECK(test::refusal([&] { plan(a, p, {.block = 0}); }) ==
        "moeroute::plan: block is 0, expected 1 to 2147483647");
  constexpr index_t beyond = index_t{1} << 31;
  CHECK(test::refusal([&] { plan(a, p, {.block = beyond}); }) ==
        "moeroute::plan: block is 2147483648, expected 1 to 2147483647");
  CHECK(test::refusal([&] { plan(a, p, {.capacity = -2}); }) ==
        "moeroute::plan: capacity is -2, expected -1 to 2147483647");
  CHECK(test::refusal([&] { plan(a, p, {.capacity = beyond}); }) ==
        "moeroute::plan: capacity is 2147483648, expected -1 to 2147483647");
  // The ends are taken: what is too much then are the slots.
  CHECK(test::refusal([&] { plan(a, p, {.capacity = beyond - 1}); }) ==
        "moeroute::plan: slots is 8589934588, expected 0 to 2147483647");
  CHECK(test::refusal([&] { plan(a, p, {.block = beyond - 1}); }) ==
        "moeroute::plan: slots is 8589934604, expected 0 to 2147483647");
  const plan_options plain;
  CHECK((plain.block == 1 && plain.capacity == as_needed && plain.padding == slot_padding::empty));
  CHECK(test::refusal([&] { plan(a, p, {.owned = three}); }) ==
        "moeroute::plan: owned.size() is 3, expected 4");
  CHECK(test::refusal([&] { plan(a, p, {.mask = three}); }) ==
        "moeroute::plan: mask.size() is 3, expected 10");
  CHECK(test::refusal([&] { plan(a, p, {.capacity = 0}); }) ==
        "moeroute::plan: expert 0 has " +
            std::to_string(std::count(a.ids().begin(), a.ids().end(), 0)) +
            " tokens, expected at most the capacity 0");
  // The capacity is the bound, not the slots that its blocks round up to.
  assignment crowd;
  crowd.reset(4, 2, 1);
  std::fill(crowd.ids().begin(), crowd.ids().end(), 0);
  for (const index_t block : {1, 2, 4})
    CHECK(test::refusal([&] { plan(crowd, p, {.block = block, .capacity = 3}); }) ==
          "moeroute::plan: expert 0 has 4 tokens, expected at most the capacity 3");
  CHECK(test::refusal([&] { plan(crowd, p, {.block = 3, .capacity = 4}); }) == "accepted");
  CHECK(test::refusal([&] { plan(a, p, {.capacity = index_t{1} << 30}); }) ==
        "moeroute::plan: slots is 4294967296, expected 0 to 2147483647");
  for (const expert_id bad : {4, -2, 1 << 30}) {
    a.ids()[13] = bad;
    CHECK(test::refusal([&] { plan(a, p); }) ==
          "moeroute::plan: the id of choice 13 is " + std::to_string(bad) + ", expected -1 to 3");
  }
}

TEST_CASE("a plan of every choice knows nothing of what an earlier one of its shape left out") {
  test::random rng(12);
  for (const index_t tokens : {1, 16, 300}) {
    const assignment whole = test::fixed_choices(rng, tokens, 8, 2);
    assignment lacking = whole;
    lacking.kept_to_change()[1] = 0;
    flags owned(8, 1);
    owned[static_cast<std::size_t>(whole.ids()[0])] = 0;
    dispatch_plan p;
    plan(lacking, p, {.owned = owned});
    CHECK(p.dropped() + p.elsewhere() > 1);
    plan(whole, p);
    CHECK(p.dropped() == 0);
    CHECK(p.elsewhere() == 0);
    CHECK(p.kept() == 2 * tokens);
    CHECK(p.slots() == 2 * tokens);
  }
}

TEST_CASE("a token that has an expert twice is found, whoever it is and whatever pads the plan") {
  test::random rng(12);
  for (int round = 0; round < 100; ++round) {
    const index_t tokens = 2 + rng.below(3), experts = 2 + rng.below(4), bad = rng.below(tokens);
    std::vector<std::vector<expert_id>> lists(static_cast<std::size_t>(tokens));
    for (auto& list : lists)
      for (index_t e = rng.below(2); e < experts; e += 1 + rng.below(3))
        list.push_back(static_cast<expert_id>(e));
    auto& own = lists[static_cast<std::size_t>(bad)];
    own.assign(2, static_cast<expert_id>(rng.below(experts)));
    assignment a;
    a.reset_ragged(tokens, experts, experts);
    const assignment::parts to = a.to_fill();
    index_t c = to.offsets[0] = 0;
    for (std::size_t t = 0; t < lists.size(); ++t) {
      for (const expert_id e : lists[t]) to.ids[c++] = e;
      to.offsets[t + 1] = static_cast<std::int32_t>(c);
    }
    a.close();
    plan_options o{.block = 1 + rng.below(3)};
    if (rng.below(2) == 0) o.capacity = tokens + 1 + rng.below(2);
    dispatch_plan p;
    CHECK(test::refusal([&] { plan(a, p, o); }) == "moeroute::plan: token " + std::to_string(bad) +
                                                       " has expert " + std::to_string(own[0]) +
                                                       " twice, expected distinct experts");
  }
}

TEST_CASE("a plan that is refused half-way is empty") {
  test::random rng(9);
  dispatch_plan p;
  const auto emptied = [&](const assignment& good, auto&& refused) {
    plan(good, p);
    CHECK(p.slots() > 0);
    CHECK(test::refusal(refused) != "accepted");
    return p.tokens() == 0 && p.experts() == 0 && p.choices() == 0 && p.slots() == 0 &&
           p.kept() == 0 && p.dropped() == 0 && p.unrouted() == 0 && p.slot_of_choice().empty() &&
           p.token_of_slot().empty() && !p.ragged();
  };
  for (const index_t experts : {4, 1000}) {
    const assignment a = test::fixed_choices(rng, 40, experts, 2);
    // Few keys are sorted, many are ranked and placed.
    for (const index_t tokens : {3, 40}) {
      assignment bad = test::fixed_choices(rng, tokens, experts, 2);
      bad.ids()[5] = static_cast<expert_id>(experts);
      CHECK(emptied(a, [&] { plan(bad, p); }));
    }
    CHECK(emptied(a, [&] { plan(a, p, {.capacity = 0}); }));
    assignment twice = test::ragged_choices(rng, 40, experts, 3);
    const index_t t = [&] {
      index_t pair = 0;
      while (twice.count(pair) < 2) ++pair;
      return pair;
    }();
    twice.ids()[static_cast<std::size_t>(twice.first(t))] =
        twice.ids()[static_cast<std::size_t>(twice.first(t)) + 1];
    CHECK(emptied(a, [&] { plan(twice, p); }));
    CHECK(test::refusal([&] { plan(twice, p); }) ==
          "moeroute::plan: token " + std::to_string(t) + " has expert " +
              std::to_string(twice.ids(t)[0]) + " twice, expected distinct experts");
    const ints lists = {0, 1, 1, 0};
    CHECK(emptied(a, [&] { plan({.tokens = 2, .experts = 1, .capacity = 4, .token = lists}, p); }));
  }
}

TEST_CASE(
    "with every option at once a plan is that of all choices of every expert, also of repeated "
    "ones") {
  dispatch_plan p;
  test::random rng(97);
  for (index_t round = 0; round < test::sized(500, 170); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(coin() ? 8 : 150),
                  k = 1 + rng.below(std::min<index_t>(experts, 6)), tokens = rng.below(40);
    const bool ragged = coin();
    assignment a = ragged ? test::ragged_choices(rng, tokens, experts, k)
                          : test::fixed_choices(rng, tokens, experts, k, 5);
    // In the fixed form a token may have an expert twice.
    for (std::size_t c = 1; !ragged && c < a.ids().size(); ++c)
      if (rng.below(5) == 0) a.ids()[c] = a.ids()[c - 1];
    if (coin()) test::drop_some(rng, a, 3);
    flags owned, mask;
    for (index_t e = 0; e < experts; ++e) owned.push_back(rng.below(4) != 0);
    for (index_t t = 0; t < tokens; ++t)
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    plan_options o{.block = coin() ? 1 : 1 + rng.below(9),
                   .padding = coin() ? slot_padding::empty : slot_padding::spare_tokens};
    if (coin()) o.owned = owned;
    if (coin()) o.mask = mask;
    if (coin()) {
      const expectation needed = by_brute_force(a, o);
      o.capacity = *std::max_element(needed.load.begin(), needed.load.end()) + rng.below(3);
    }
    plan(a, p, o);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << k << " ragged "
                  << ragged << " block " << o.block << " capacity " << o.capacity);
    CHECK(difference(p, by_brute_force(a, o)) == "");
    if (round % 4 == 0) {  // beside memory that nobody may touch
      const test::forbidden_memory around(round % 8 == 0 ? test::guarded_end::front
                                                         : test::guarded_end::back);
      const assignment own = a;
      dispatch_plan fresh;
      plan(own, fresh, o);
      CHECK(difference(fresh, by_brute_force(a, o)) == "");
    }
    CHECK(p.tokens() == tokens);
    CHECK(p.experts() == experts);
    CHECK(p.choices() == a.choices());
    for (index_t t = 0; t < tokens; ++t)
      REQUIRE((p.first(t) == a.first(t) && p.count(t) == a.count(t)));
  }
}
