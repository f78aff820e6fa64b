#include <moeroute/stage/capacity.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"

using namespace moeroute;

namespace {

using flags = std::vector<std::uint8_t>;
using floats = std::vector<float>;

capacity_rule places(index_t count) { return {.formula = capacity_formula::fixed, .count = count}; }

constexpr drop_order all_orders[] = {drop_order::choice_major, drop_order::token_major,
                                     drop_order::by_weight, drop_order::batch_priority,
                                     drop_order::random};

// Ranks of the choices among those of one expert: less(x, y) says who is served first.
template <class Less>
flags served(const assignment& a, index_t capacity, Less&& less) {
  flags kept(static_cast<std::size_t>(a.choices()), 1);
  for (index_t c = 0; c < a.choices(); ++c) {
    const expert_id e = a.ids()[static_cast<std::size_t>(c)];
    if (e < 0) continue;
    index_t before = 0;
    for (index_t other = 0; other < a.choices(); ++other)
      before += other != c && a.ids()[static_cast<std::size_t>(other)] == e && less(other, c);
    kept[static_cast<std::size_t>(c)] = before < capacity;
  }
  return kept;
}

flags by_brute_force(const assignment& a, drop_order order, index_t capacity,
                     const floats& priority, const capacity_policy& policy) {
  const auto token = test::tokens_of(a);
  const auto t = [&](index_t c) { return token[static_cast<std::size_t>(c)]; };
  const auto rank = [&](index_t c) { return c - a.first(t(c)); };
  const auto weight = [&](index_t c) { return a.weights()[static_cast<std::size_t>(c)]; };
  const auto first = [&](index_t c) { return priority[static_cast<std::size_t>(t(c))]; };
  const auto number = [&](index_t c) {
    return static_cast<std::uint32_t>(
        random_bits(policy.seed, policy.step, static_cast<std::uint64_t>(c)));
  };
  switch (order) {
    case drop_order::choice_major:
      return served(a, capacity, [&](index_t x, index_t y) {
        return rank(x) < rank(y) || (rank(x) == rank(y) && t(x) < t(y));
      });
    case drop_order::token_major:
      return served(a, capacity, [](index_t x, index_t y) { return x < y; });
    case drop_order::by_weight:
      return served(a, capacity, [&](index_t x, index_t y) {
        return weight(x) > weight(y) || (weight(x) == weight(y) && x < y);
      });
    case drop_order::batch_priority:
      return served(a, capacity, [&](index_t x, index_t y) {
        if (rank(x) != rank(y)) return rank(x) < rank(y);
        return first(x) > first(y) || (first(x) == first(y) && t(x) < t(y));
      });
    case drop_order::random:
      return served(a, capacity, [&](index_t x, index_t y) {
        return number(x) > number(y) || (number(x) == number(y) && x < y);
      });
  }
  return {};
}

floats best_weights(const assignment& a) {
  floats best(static_cast<std::size_t>(a.tokens()), -1.0f);
  for (index_t t = 0; t < a.tokens(); ++t)
    for (const float w : a.weights(t))
      best[static_cast<std::size_t>(t)] = std::max(best[static_cast<std::size_t>(t)], w);
  return best;
}

flags kept_of(const assignment& a) {
  flags kept;
  for (index_t c = 0; c < a.choices(); ++c) kept.push_back(a.kept(c));
  return kept;
}

floats weights_of(const assignment& a) { return {a.weights().begin(), a.weights().end()}; }

// Weights of few different values: ties everywhere.
assignment tied(test::random& rng, index_t tokens, index_t experts, index_t k) {
  assignment a = test::fixed_choices(rng, tokens, experts, k, 6, 1.0);
  for (std::size_t c = 0; c < a.ids().size(); ++c)
    if (a.ids()[c] >= 0) a.weights()[c] = static_cast<float>(rng.below(4)) / 8.0f;
  return a;
}

template <class F>
void for_each_assignment(F&& f) {
  test::random rng(11);
  for (const index_t tokens : {0, 1, 9, 60})
    for (const index_t experts : {1, 3, 8})
      for (const index_t k : {1, 2, 3}) {
        if (k > experts) continue;
        f(test::fixed_choices(rng, tokens, experts, k, 7, 1.0));
        f(test::ragged_choices(rng, tokens, experts, k));
        f(tied(rng, tokens, experts, k));
      }
}

}  // namespace

TEST_CASE("every order keeps whom the ranking of all rivals keeps") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    for (const drop_order order : all_orders)
      for (const index_t capacity : {0, 1, 3, 10, 1000}) {
        assignment a = original;
        const capacity_policy policy{
            .rule = places(capacity), .order = order, .seed = 5, .step = 2};
        apply_capacity(a, policy, ws);
        INFO("T=" << a.tokens() << " E=" << a.experts() << " k=" << a.k() << " C=" << capacity
                  << " order " << static_cast<int>(order));
        CHECK(kept_of(a) ==
              by_brute_force(original, order, capacity, best_weights(original), policy));
      }
  });
}

TEST_CASE("an expert keeps the lesser of its choices and its capacity, and the counts add up") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    for (const drop_order order : all_orders)
      for (const index_t capacity : {0, 2, 7}) {
        assignment a = original;
        const capacity_result r = apply_capacity(a, {.rule = places(capacity), .order = order}, ws);
        std::vector<index_t> chosen(static_cast<std::size_t>(a.experts())), kept = chosen;
        for (index_t c = 0; c < a.choices(); ++c) {
          const expert_id e = a.ids()[static_cast<std::size_t>(c)];
          if (e < 0) continue;
          ++chosen[static_cast<std::size_t>(e)];
          kept[static_cast<std::size_t>(e)] += a.kept(c);
        }
        for (std::size_t e = 0; e < chosen.size(); ++e)
          CHECK(kept[e] == std::min(chosen[e], capacity));
        CHECK(r.capacity == capacity);
        CHECK(r.kept == std::accumulate(kept.begin(), kept.end(), index_t{0}));
        CHECK(r.kept + r.dropped + r.unrouted == a.choices());
      }
  });
}

TEST_CASE("a dropped choice keeps its id and gets weight 0; the others' weights stay") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    for (const drop_order order : all_orders) {
      assignment a = original;
      apply_capacity(a, {.rule = places(2), .order = order}, ws);
      bool same = std::equal(a.ids().begin(), a.ids().end(), original.ids().begin());
      for (std::size_t c = 0; c < a.ids().size(); ++c)
        same &= a.weights()[c] == (a.kept(static_cast<index_t>(c)) ? original.weights()[c] : 0.0f);
      CHECK(same);
    }
  });
}

TEST_CASE("no first choice is dropped while a later choice of the same expert is kept") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    for (const drop_order order : {drop_order::choice_major, drop_order::batch_priority}) {
      assignment a = original;
      apply_capacity(a, {.rule = places(3), .order = order}, ws);
      const auto token = test::tokens_of(a);
      bool holds = true;
      for (index_t x = 0; x < a.choices(); ++x)
        for (index_t y = 0; y < a.choices(); ++y) {
          const auto cx = static_cast<std::size_t>(x), cy = static_cast<std::size_t>(y);
          if (a.ids()[cx] < 0 || a.ids()[cx] != a.ids()[cy]) continue;
          const bool earlier = x - a.first(token[cx]) < y - a.first(token[cy]);
          holds &= !(earlier && !a.kept(x) && a.kept(y));
        }
      CHECK(holds);
    }
  });
}

TEST_CASE("by weight no other choice of as many keeps a larger sum") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    constexpr index_t capacity = 3;
    assignment a = original;
    apply_capacity(a, {.rule = places(capacity), .order = drop_order::by_weight}, ws);
    for (expert_id e = 0; e < a.experts(); ++e) {
      floats all;
      double sum = 0.0, best = 0.0;
      for (std::size_t c = 0; c < a.ids().size(); ++c)
        if (a.ids()[c] == e) {
          all.push_back(original.weights()[c]);
          sum += static_cast<double>(a.weights()[c]);
        }
      std::sort(all.rbegin(), all.rend());
      for (std::size_t i = 0; i < std::min<std::size_t>(capacity, all.size()); ++i)
        best += static_cast<double>(all[i]);
      CHECK(std::abs(sum - best) < 1e-6);
    }
  });
}

TEST_CASE("a priority from outside decides who comes first") {
  workspace ws;
  test::random rng(12);
  const assignment original = test::fixed_choices(rng, 50, 4, 2, 0, 1.0);
  floats priority(50);
  // Of any size, and on both sides of 0, where -0 is 0.
  for (const float unit : {1.0f, 1e-30f, 1e30f, -1e-10f}) {
    for (auto& p : priority) p = unit * (static_cast<float>(rng.below(5)) - 2.0f);
    assignment a = original;
    const capacity_policy policy{
        .rule = places(6), .order = drop_order::batch_priority, .priority = priority};
    apply_capacity(a, policy, ws);
    CHECK(kept_of(a) == by_brute_force(original, policy.order, 6, priority, policy));
  }
}

TEST_CASE("a priority that is no number counts as -inf, whose tokens come in their order") {
  workspace ws;
  test::random rng(13);
  const assignment original = test::fixed_choices(rng, 60, 3, 2, 0, 1.0);
  floats priority(60), as_read(60);
  for (std::size_t t = 0; t < 60; ++t) {
    const auto kind = rng.below(3);
    priority[t] = kind == 0 ? std::numeric_limits<float>::quiet_NaN()
                            : (kind == 1 ? -std::numeric_limits<float>::infinity() : -1.0f);
    as_read[t] = kind == 2 ? -1.0f : -std::numeric_limits<float>::infinity();
  }
  for (const index_t capacity : {15, 30}) {
    assignment a = original;
    const capacity_policy policy{
        .rule = places(capacity), .order = drop_order::batch_priority, .priority = priority};
    apply_capacity(a, policy, ws);
    CHECK(kept_of(a) == by_brute_force(original, policy.order, capacity, as_read, policy));
  }
}

TEST_CASE("random selection replays with its seed and step, and changes with either") {
  workspace ws;
  test::random rng(13);
  const assignment original = test::fixed_choices(rng, 300, 4, 1);
  const auto run = [&](std::uint64_t seed, std::uint64_t step) {
    assignment a = original;
    apply_capacity(a, {.rule = places(20), .order = drop_order::random, .seed = seed, .step = step},
                   ws);
    return kept_of(a);
  };
  CHECK(run(1, 1) == run(1, 1));
  CHECK(run(1, 1) != run(2, 1));
  CHECK(run(1, 1) != run(1, 2));
}

TEST_CASE("renormalised after the drop, the kept weights of a token sum to 1") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    assignment a = original;
    apply_capacity(a, {.rule = places(2), .renormalize = renormalization::after_drop}, ws);
    for (index_t t = 0; t < a.tokens(); ++t) {
      double sum = 0.0, before = 0.0;
      for (std::size_t r = 0; r < a.weights(t).size(); ++r) {
        sum += static_cast<double>(a.weights(t)[r]);
        if (a.kept(a.first(t) + static_cast<index_t>(r)))
          before += static_cast<double>(original.weights(t)[r]);
      }
      CHECK(std::abs(sum - (before > 0.0 ? 1.0 : 0.0)) < 1e-6);
    }
  });
}

TEST_CASE("renormalised before the drop, a dropped weight is missing from the sum") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    for (const drop_order order : all_orders) {
      assignment plain = original, a = original;
      apply_capacity(plain, {.rule = places(2), .order = order}, ws);
      apply_capacity(
          a, {.rule = places(2), .order = order, .renormalize = renormalization::before_drop}, ws);
      CHECK(kept_of(a) == kept_of(plain));
      bool right = true;
      for (index_t t = 0; t < a.tokens(); ++t) {
        float sum = 0.0f;
        for (const float w : original.weights(t)) sum += w;
        for (std::size_t r = 0; r < a.weights(t).size(); ++r) {
          const bool kept = a.kept(a.first(t) + static_cast<index_t>(r));
          right &= a.weights(t)[r] == (kept && sum > 0.0f ? original.weights(t)[r] / sum : 0.0f);
        }
      }
      CHECK(right);
    }
  });
}

TEST_CASE("the divisor of renormalised weights is at least eps") {
  workspace ws;
  assignment a;
  a.reset(1, 2, 1);
  a.ids()[0] = 1;
  a.weights()[0] = 0.25f;
  apply_capacity(a, {.renormalize = renormalization::after_drop, .eps = 0.5f}, ws);
  CHECK(a.weights()[0] == 0.5f);
}

TEST_CASE("without a limit nothing is dropped and nothing is flagged") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    assignment a = original;
    const capacity_result r = apply_capacity(a, {}, ws);
    CHECK(r.dropped == 0);
    CHECK_FALSE(a.drops());
    CHECK(weights_of(a) == weights_of(original));
  });
}

TEST_CASE("dropping again drops no more, and a smaller capacity only adds to the dropped") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    for (const drop_order order : all_orders) {
      assignment a = original;
      apply_capacity(a, {.rule = places(4), .order = order}, ws);
      const flags once = kept_of(a);
      const capacity_result again = apply_capacity(a, {.rule = places(4), .order = order}, ws);
      CHECK(kept_of(a) == once);
      CHECK(again.kept + again.dropped + again.unrouted == a.choices());
      apply_capacity(a, {.rule = places(2), .order = order}, ws);
      const flags less = kept_of(a);
      bool subset = true;
      for (std::size_t c = 0; c < less.size(); ++c) subset &= less[c] <= once[c];
      CHECK(subset);
    }
  });
}

TEST_CASE("what was dropped before takes no place from anybody, in every order") {
  workspace ws;
  for_each_assignment([&](const assignment& original) {
    assignment before = original, gone = original;
    const std::span<std::uint8_t> kept = before.kept_to_change();
    for (std::size_t c = 0; c < kept.size(); c += 3) {
      if (before.ids()[c] < 0) continue;
      kept[c] = 0;
      gone.ids()[c] = no_expert;
      before.weights()[c] = gone.weights()[c] = 0.0f;
    }
    for (const drop_order order : all_orders)
      for (const index_t capacity : {0, 1, 3}) {
        assignment a = before;
        const capacity_policy policy{
            .rule = places(capacity), .order = order, .seed = 5, .step = 2};
        const capacity_result r = apply_capacity(a, policy, ws);
        flags expected = by_brute_force(gone, order, capacity, best_weights(gone), policy);
        for (std::size_t c = 0; c < expected.size(); ++c) expected[c] &= before.kept()[c];
        INFO("T=" << a.tokens() << " C=" << capacity << " order " << static_cast<int>(order));
        CHECK(kept_of(a) == expected);
        CHECK(r.kept + r.dropped + r.unrouted == a.choices());
      }
  });
}

TEST_CASE("by position the drops fall on the end of the batch; by weight they do not") {
  workspace ws;
  test::random rng(14);
  const assignment original = test::fixed_choices(rng, 4000, 16, 1, 0, 1.0);
  const auto rates = [&](drop_order order) {
    assignment a = original;
    const capacity_policy policy{.rule = {.formula = capacity_formula::megatron, .factor = 1.0},
                                 .order = order};
    apply_capacity(a, policy, ws);
    std::vector<std::int64_t> chosen(10), dropped(10);
    drops_by_position(a, chosen, dropped);
    CHECK(std::accumulate(chosen.begin(), chosen.end(), std::int64_t{0}) == 4000);
    std::vector<double> rate;
    for (std::size_t i = 0; i < 10; ++i)
      rate.push_back(static_cast<double>(dropped[i]) / static_cast<double>(chosen[i]));
    return rate;
  };
  const auto position = rates(drop_order::token_major), weight = rates(drop_order::by_weight);
  CHECK(position.front() == 0.0);
  CHECK(position.back() > 0.25);
  for (std::size_t i = 1; i < 10; ++i) CHECK(position[i] > position[i - 1] - 0.08);
  CHECK(weight.front() > 0.1);
  CHECK(std::abs(weight.back() - weight.front()) < 0.1);
}

TEST_CASE("by position only what was chosen counts, and what was dropped of it") {
  assignment a;
  a.reset(4, 2, 1);
  const expert_id ids[] = {0, no_expert, 1, no_expert};
  std::copy(std::begin(ids), std::end(ids), a.ids().begin());
  a.kept_to_change()[2] = 0;
  std::vector<std::int64_t> chosen(2, 7), dropped(2, 7);
  drops_by_position(a, chosen, dropped);
  CHECK(chosen == std::vector<std::int64_t>{1, 1});
  CHECK(dropped == std::vector<std::int64_t>{0, 1});
  a.reset(0, 2, 1);
  drops_by_position(a, chosen, dropped);
  CHECK(chosen == std::vector<std::int64_t>{0, 0});
  CHECK(dropped == std::vector<std::int64_t>{0, 0});
}

TEST_CASE("a warm capacity never allocates") {
  workspace ws;
  test::random rng(15);
  const assignment original = test::fixed_choices(rng, 100, 8, 2, 0, 1.0);
  assignment a = original;
  const auto all = [&] {
    for (const drop_order order : all_orders) {
      a = original;
      apply_capacity(a, {.rule = places(5), .order = order}, ws);
    }
  };
  all();
  CHECK(test::allocations_during(all) == 0);
}

TEST_CASE("what capacity refuses, it refuses by name") {
  workspace ws;
  test::random rng(16);
  assignment a = test::fixed_choices(rng, 10, 4, 2);
  const floats three(3);
  CHECK(test::refusal([&] {
          apply_capacity(a, {.order = drop_order::batch_priority, .priority = three}, ws);
        }) == "moeroute::apply_capacity: priority.size() is 3, expected 10");
  CHECK(test::refusal([&] { apply_capacity(a, {.eps = -1.0f}, ws); }) ==
        "moeroute::apply_capacity: eps is -1.000000, expected >= 0");
  CHECK(test::refusal([&] { apply_capacity(a, {.rule = places(-1)}, ws); }) ==
        "moeroute::capacity_rule: count is -1, expected 0 to 2147483647");
  std::vector<std::int64_t> two(2), none;
  CHECK(test::refusal([&] { drops_by_position(a, two, none); }) ==
        "moeroute::drops_by_position: dropped.size() is 0, expected 2");
  CHECK(test::refusal([&] { drops_by_position(a, none, none); }) ==
        "moeroute::drops_by_position: chosen.size() is 0, expected 1 to 2147483647");
}

TEST_CASE("masked tokens count in a capacity's T unless it is told how many there are") {
  test::random rng(17);
  const auto capacity = [&](index_t counted) {
    workspace ws;
    assignment a = test::fixed_choices(rng, 40, 4, 2);
    for (std::size_t c = 40; c < 80; ++c) a.ids()[c] = no_expert;  // half of them is padding
    return apply_capacity(
               a,
               {.rule = {.formula = capacity_formula::megatron, .factor = 1.0}, .tokens = counted},
               ws)
        .capacity;
  };
  CHECK(capacity(capacity_policy::all_tokens) == 20);
  CHECK(capacity(20) == 10);
  CHECK(test::refusal([&] { capacity(41); }) ==
        "moeroute::apply_capacity: tokens is 41, expected -1 to 40");
}

TEST_CASE(
    "with every option at once who stays, the weights and the counts are those of plain loops") {
  test::random rng(89);
  workspace ws;
  for (index_t round = 0; round < test::sized(400, 130); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(8), k = 1 + rng.below(std::min<index_t>(experts, 3)),
                  tokens = rng.below(30);
    const auto form = rng.below(3);
    assignment a = form == 0   ? test::fixed_choices(rng, tokens, experts, k, 7, 1.0)
                   : form == 1 ? test::ragged_choices(rng, tokens, experts, k)
                               : tied(rng, tokens, experts, k);
    if (coin()) test::drop_some(rng, a, 4);
    floats priority;
    if (coin())
      for (index_t t = 0; t < tokens; ++t)
        priority.push_back(rng.below(6) == 0 ? std::numeric_limits<float>::quiet_NaN()
                                             : static_cast<float>(rng.below(5)) - 2.0f);
    capacity_policy policy{.order = all_orders[rng.below(5)],
                           .renormalize = static_cast<renormalization>(rng.below(3)),
                           .eps = coin() ? 0.0f : 0.5f,
                           .priority = priority,
                           .seed = rng.bits(),
                           .step = static_cast<std::uint64_t>(rng.below(9)),
                           .tokens = coin() ? capacity_policy::all_tokens : rng.below(tokens + 1)};
    const index_t counted = policy.tokens < 0 ? tokens : policy.tokens;
    const double factor = 0.25 + static_cast<double>(rng.below(8)) / 4.0;
    // The load of the fullest expert, of what was kept so far.
    index_t greatest = 0;
    for (expert_id e = 0; e < experts; ++e) {
      index_t load = 0;
      for (index_t c = 0; c < a.choices(); ++c)
        load += a.kept(c) && a.ids()[static_cast<std::size_t>(c)] == e;
      greatest = std::max(greatest, load);
    }
    const auto per_expert = static_cast<double>(ceil_div(counted, experts));
    double wanted = 0.0;
    switch (rng.below(5)) {
      case 0:
        policy.rule = {.formula = capacity_formula::fixed, .count = rng.below(6)};
        wanted = static_cast<double>(policy.rule.count);
        break;
      case 1:
        policy.rule = {.formula = capacity_formula::megatron, .factor = factor};
        wanted =
            std::ceil(static_cast<double>(counted * k) / static_cast<double>(experts) * factor);
        break;
      case 2:
        policy.rule = {.formula = capacity_formula::tutel, .factor = -factor};
        wanted = std::min(static_cast<double>(k) * std::floor(factor * per_expert),
                          static_cast<double>(greatest));
        break;
      case 3:
        policy.rule = {.formula = capacity_formula::megablocks, .factor = 0.0};
        wanted = static_cast<double>(greatest);
        break;
      default:
        policy.rule = {.formula = capacity_formula::nllb_eval, .factor = factor / 8.0};
        wanted = std::ceil(factor / 8.0 * static_cast<double>(counted));
    }
    policy.rule.minimum = rng.below(3) * rng.below(3);
    policy.rule.multiple = 1 + rng.below(3);
    index_t capacity = std::max(static_cast<index_t>(wanted), policy.rule.minimum);
    while (capacity % policy.rule.multiple != 0) ++capacity;

    // Who was dropped before is nobody's rival: without an expert.
    assignment rivals = a;
    for (index_t c = 0; c < a.choices(); ++c)
      if (!a.kept(c)) rivals.ids()[static_cast<std::size_t>(c)] = no_expert;
    floats first = priority;
    for (float& x : first)
      if (x != x) x = -std::numeric_limits<float>::infinity();
    if (priority.empty())
      for (index_t t = 0; t < tokens; ++t) {
        first.push_back(-std::numeric_limits<float>::infinity());
        for (const float w : a.weights(t)) first.back() = std::max(first.back(), w);
      }
    flags kept = by_brute_force(rivals, policy.order, capacity, first, policy);
    std::vector<double> weights;
    index_t dropped = 0, unrouted = 0;
    for (index_t t = 0; t < tokens; ++t) {
      double sum = 0.0;
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        const auto at = static_cast<std::size_t>(c);
        if (!a.kept(c)) kept[at] = 0;
        unrouted += a.ids()[at] < 0;
        dropped += a.ids()[at] >= 0 && kept[at] == 0;
        if (policy.renormalize == renormalization::before_drop || kept[at] != 0)
          sum += static_cast<double>(a.weights()[at]);
      }
      const double divisor = std::max(sum, static_cast<double>(policy.eps));
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        const auto at = static_cast<std::size_t>(c);
        const auto w = static_cast<double>(a.weights()[at]);
        weights.push_back(kept[at] == 0                                 ? 0.0
                          : policy.renormalize == renormalization::none ? w
                          : divisor > 0.0                               ? w / divisor
                                                                        : 0.0);
      }
    }
    const std::vector<expert_id> ids(a.ids().begin(), a.ids().end());
    const capacity_result found = apply_capacity(a, policy, ws);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << k << " C=" << capacity
                  << " order " << int(policy.order) << " formula " << int(policy.rule.formula));
    CHECK(found.capacity == capacity);
    CHECK(kept_of(a) == kept);
    CHECK(std::equal(ids.begin(), ids.end(), a.ids().begin()));
    bool same = true;
    for (std::size_t c = 0; c < weights.size(); ++c)
      same = same && std::abs(static_cast<double>(a.weights()[c]) - weights[c]) < 1e-6;
    CHECK(same);
    CHECK(found.dropped == dropped);
    CHECK(found.unrouted == unrouted);
    CHECK(found.kept == a.choices() - dropped - unrouted);
  }
}

TEST_CASE("the order of keys is that of floats, where NaN is -inf and -0 is 0") {
  constexpr float top = std::numeric_limits<float>::infinity();
  const floats ascending{-top,   -3e38f, -2.0f, -1.0f, -1e-40f, 0.0f,
                         1e-40f, 0.125f, 1.0f,  2.0f,  3e38f,   top};
  for (std::size_t i = 1; i < ascending.size(); ++i)
    CHECK(detail::ordered_bits(ascending[i - 1]) < detail::ordered_bits(ascending[i]));
  CHECK(detail::ordered_bits(-0.0f) == detail::ordered_bits(0.0f));
  CHECK(detail::ordered_bits(std::numeric_limits<float>::quiet_NaN()) ==
        detail::ordered_bits(-top));
}

TEST_CASE("a capacity's eps and number of tokens have ends, and drops of nobody are none") {
  workspace ws;
  test::random rng(18);
  assignment a = test::fixed_choices(rng, 10, 4, 2);
  CHECK(test::refusal([&] {
          apply_capacity(a, {.eps = std::numeric_limits<float>::quiet_NaN()}, ws);
        }) == "moeroute::apply_capacity: eps is nan, expected >= 0");
  CHECK(test::refusal([&] { apply_capacity(a, {.tokens = -2}, ws); }) ==
        "moeroute::apply_capacity: tokens is -2, expected -1 to 10");
  const capacity_policy plain;
  CHECK((plain.order == drop_order::choice_major && plain.renormalize == renormalization::none &&
         plain.eps == 0.0f && plain.priority.empty() && plain.seed == 0 && plain.step == 0 &&
         plain.tokens == capacity_policy::all_tokens));
  // More parts than tokens: token t counts in part t * parts / T.
  for (const index_t parts : {1, 3, 10, 25}) {
    assignment some = test::ragged_choices(rng, 10, 4, 3);
    test::drop_some(rng, some, 3);
    std::vector<std::int64_t> chosen(static_cast<std::size_t>(parts), 5), dropped = chosen;
    std::vector<std::int64_t> slow(chosen.size(), 0), slow_dropped = slow;
    for (index_t t = 0; t < 10; ++t)
      for (index_t c = some.first(t); c < some.first(t + 1); ++c) {
        ++slow[static_cast<std::size_t>(t * parts / 10)];
        slow_dropped[static_cast<std::size_t>(t * parts / 10)] += !some.kept(c);
      }
    drops_by_position(some, chosen, dropped);
    CHECK((chosen == slow && dropped == slow_dropped));
  }
}
