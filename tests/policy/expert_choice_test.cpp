#include <moeroute/policy/batch/expert_choice.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/route.hpp>
#include <set>
#include <vector>

#include "oracle/batch_routing.hpp"
#include "support/backwards.hpp"
#include "support/batch_bits.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::listed;
using test::routed;

namespace {

// The tokens of every expert, and whether token rows are ordered and in range.
struct columns_of {
  std::vector<std::vector<index_t>> tokens;
  bool ordered = true;

  explicit columns_of(const assignment& a) : tokens(static_cast<std::size_t>(a.experts())) {
    for (index_t t = 0; t < a.tokens(); ++t) {
      expert_id before = -1;
      for (const expert_id e : a.ids(t)) {
        ordered = ordered && e > before && e < a.experts();
        before = e;
        if (e >= 0 && e < a.experts()) tokens[static_cast<std::size_t>(e)].push_back(t);
      }
    }
  }
};

}  // namespace

TEST_CASE("every expert takes exactly C tokens, whatever the shape") {
  for (const auto& [tokens, experts] : {std::pair<index_t, index_t>{1, 1},
                                        {1, 5},
                                        {2, 3},
                                        {17, 1},
                                        {16, 16},
                                        {33, 60},
                                        {100, 7},
                                        {64, 257},
                                        {1500, 33}})
    for (const test::shape shape :
         {test::shape::normal, test::shape::quantised, test::shape::all_equal,
          test::shape::ascending, test::shape::one_hot_expert, test::shape::extreme,
          test::shape::plus_infs, test::shape::signed_zeros}) {
      const auto z = test::make_logits(shape, 3, tokens, experts);
      for (const double factor : {0.5, 1.0, 2.0, 1e9}) {
        const expert_choice<> router{.capacity = {.factor = factor}};
        const index_t c = router.capacity_of(tokens, experts);
        const assignment a = routed(router, z, experts);
        INFO(test::name(shape) << " T=" << tokens << " E=" << experts << " factor=" << factor);
        const columns_of columns(a);
        REQUIRE(columns.ordered);
        REQUIRE(std::all_of(columns.tokens.begin(), columns.tokens.end(), [&](const auto& column) {
          return column.size() == static_cast<std::size_t>(c);
        }));
        REQUIRE(a.choices() == experts * c);
        REQUIRE(std::all_of(a.weights().begin(), a.weights().end(),
                            [](float w) { return w >= 0.0f && w <= 1.0f; }));
      }
    }
}

TEST_CASE("experts take the tokens of highest probability, the lowest token among equals") {
  for (const test::shape shape : test::all_shapes)
    for (const auto& [tokens, experts] :
         {std::pair<index_t, index_t>{40, 16}, {300, 5}, {1111, 24}, {2048, 64}}) {
      if (tokens > test::sized(2048, 1111)) continue;
      const auto z = test::make_logits(shape, 5, tokens, experts);
      const auto p = oracle::softmax_rows(z, tokens, experts);
      const expert_choice<> router{};
      const index_t c = router.capacity_of(tokens, experts);
      const columns_of columns(routed(router, z, experts));
      INFO(test::name(shape) << " T=" << tokens << " E=" << experts);
      for (index_t e = 0; e < experts; ++e) {
        // The library chooses on fp32 scores: allow what rounding can exchange, and nothing else.
        std::vector<double> column(static_cast<std::size_t>(tokens), -1.0);
        std::vector<double> open;
        for (index_t t = 0; t < tokens; ++t) {
          const auto at = static_cast<std::size_t>(t * experts + e);
          if (!(z[at] > -test::infinity)) continue;
          column[static_cast<std::size_t>(t)] = p[at];
          open.push_back(p[at]);
        }
        const auto& taken = columns.tokens[static_cast<std::size_t>(e)];
        REQUIRE(taken.size() == std::min(static_cast<std::size_t>(c), open.size()));
        if (taken.empty()) continue;
        std::sort(open.rbegin(), open.rend());
        const double bound = open[taken.size() - 1];
        std::vector<bool> is_taken(static_cast<std::size_t>(tokens), false);
        for (const index_t t : taken) is_taken[static_cast<std::size_t>(t)] = true;
        index_t wrong = 0;
        for (index_t t = 0; t < tokens; ++t) {
          const double x = column[static_cast<std::size_t>(t)];
          wrong += is_taken[static_cast<std::size_t>(t)] ? x < bound * (1 - 2e-6) - 2e-38
                                                         : x > bound * (1 + 2e-6) + 2e-38;
        }
        REQUIRE(wrong == 0);
      }
    }
}

TEST_CASE("among equal scores an expert takes the lowest tokens") {
  // Identity scores are the logits, so ties are exact.
  for (const test::shape shape :
       {test::shape::quantised, test::shape::all_equal, test::shape::signed_zeros,
        test::shape::masked, test::shape::half_nan, test::shape::plus_infs})
    for (const index_t tokens : {index_t{50}, index_t{3000}}) {
      constexpr index_t experts = 20;
      const auto z = test::make_logits(shape, 8, tokens, experts);
      const expert_choice<identity_score> router{.capacity = {.factor = 3}};
      const index_t c = router.capacity_of(tokens, experts);
      const columns_of columns(routed(router, z, experts));
      INFO(test::name(shape) << " T=" << tokens);
      for (index_t e = 0; e < experts; ++e) {
        auto expected = oracle::column_order(z, tokens, experts, e);
        expected.resize(std::min(expected.size(), static_cast<std::size_t>(c)));
        std::sort(expected.begin(), expected.end());
        REQUIRE(columns.tokens[static_cast<std::size_t>(e)] == expected);
      }
    }
}

TEST_CASE("weights are the softmax probabilities of the picks") {
  constexpr index_t tokens = 70, experts = 24;
  for (const test::shape shape : {test::shape::normal, test::shape::zipf, test::shape::extreme}) {
    const auto z = test::make_logits(shape, 4, tokens, experts);
    const auto p = oracle::softmax_rows(z, tokens, experts);
    const assignment a = routed(expert_choice<>{}, z, experts);
    std::vector<double> expected;
    for (index_t t = 0; t < tokens; ++t)
      for (const expert_id e : a.ids(t))
        expected.push_back(p[static_cast<std::size_t>(t * experts + e)]);
    CHECK(test::difference(a.weights(), expected, 3e-6, 1.2e-38) == "");
  }
}

TEST_CASE("renormalised weights of a token sum to the scale, of an untaken token to nothing") {
  constexpr index_t tokens = 64, experts = 16;
  const auto z = test::make_logits(test::shape::normal, 4, tokens, experts);
  const expert_choice<> router{.capacity = nucleus_capacity(1.0),
                               .normalize = token_renormalization::sum,
                               .eps = 1e-12f,
                               .scale = 2.5f};
  const assignment a = routed(router, z, experts);
  index_t untaken = 0;
  for (index_t t = 0; t < tokens; ++t) {
    double sum = 0;
    for (const float w : a.weights(t)) sum += static_cast<double>(w);
    untaken += a.count(t) == 0;
    if (a.count(t) > 0) CHECK(std::abs(sum - 2.5) < 1e-6);
  }
  CHECK(untaken > 0);
}

TEST_CASE("renormalised weights are the picks' scores over their sum, for every token") {
  constexpr index_t tokens = 16, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 5, tokens, experts);
  const expert_choice<> plain{.capacity = {.factor = 4.0}};
  expert_choice<> shared = plain;
  shared.normalize = token_renormalization::sum;
  shared.eps = 0.25f;
  const assignment a = routed(plain, z, experts), b = routed(shared, z, experts);
  REQUIRE(listed(a.ids()) == listed(b.ids()));
  for (index_t t = 0; t < tokens; ++t) {
    REQUIRE(a.count(t) > 0);
    double sum = 0.25;
    for (const float w : a.weights(t)) sum += static_cast<double>(w);
    std::vector<double> expected;
    for (const float w : a.weights(t)) expected.push_back(static_cast<double>(w) / sum);
    CHECK(test::difference(b.weights(t), expected, 1e-6) == "");
  }
}

TEST_CASE("a token whose scores are all 0 has weights 0, not a quotient of them") {
  const expert_choice<identity_score> router{.capacity = {.factor = 2.0},
                                             .normalize = token_renormalization::sum};
  const assignment a = routed(router, test::zeros(4, 2), 2);
  CHECK(a.choices() == 8);
  CHECK(listed(a.weights()) == std::vector<float>(8, 0.0f));
}

TEST_CASE("a masked token is never taken, and a batch of them leaves every expert empty") {
  constexpr index_t tokens = 50, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 4, tokens, experts);
  std::vector<std::uint8_t> mask(tokens, 1);
  for (std::size_t t = 0; t < tokens; t += 3) mask[t] = 0;
  const assignment a = routed(expert_choice<>{}, z, experts, {.mask = mask});
  for (index_t t = 0; t < tokens; t += 3) CHECK(a.count(t) == 0);
  for (const auto& column : columns_of(a).tokens) CHECK(column.size() == 13);
  std::fill(mask.begin(), mask.end(), std::uint8_t{0});
  CHECK(routed(expert_choice<>{}, z, experts, {.mask = mask}).choices() == 0);
}

TEST_CASE("tokens of one sequence do not compete with those of another") {
  constexpr index_t length = 24, sequences = 3, experts = 9;
  const auto z = test::make_logits(test::shape::normal, 6, length * sequences, experts);
  const assignment all = routed(expert_choice<>{.sequence_length = length}, z, experts);
  std::vector<expert_id> ids;
  std::vector<float> weights;
  for (index_t s = 0; s < sequences; ++s) {
    const std::vector<float> part(z.begin() + s * length * experts,
                                  z.begin() + (s + 1) * length * experts);
    const assignment one = routed(expert_choice<>{}, part, experts);
    ids.insert(ids.end(), one.ids().begin(), one.ids().end());
    weights.insert(weights.end(), one.weights().begin(), one.weights().end());
  }
  CHECK(listed(all.ids()) == ids);
  CHECK(test::bit_difference(all.weights(), weights) == "");
}

TEST_CASE("masks and own k of a sequence are those of its own tokens") {
  constexpr index_t length = 24, sequences = 3, tokens = length * sequences, experts = 9;
  const auto z = test::make_logits(test::shape::normal, 16, tokens, experts);
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> own_k;
  for (index_t t = 0; t < tokens; ++t) {
    mask.push_back(t % 5 == 0 || t / length == 1 ? 0 : 1);
    own_k.push_back(static_cast<std::int32_t>(t * 7 % 4));
  }
  const auto agrees = [&](const auto& whole, const auto& alone) {
    for (const bool capped : {false, true}) {
      const auto side = [&](index_t first, index_t n) {
        side_inputs of{.mask = std::span(mask).subspan(std::size_t(first), std::size_t(n))};
        if (capped) of.k_of_token = std::span(own_k).subspan(std::size_t(first), std::size_t(n));
        return of;
      };
      const assignment all = routed(whole, z, experts, side(0, tokens));
      std::vector<expert_id> ids;
      std::vector<float> weights;
      for (index_t s = 0; s < sequences; ++s) {
        const index_t first = s * length;
        const std::vector<float> part(z.begin() + first * experts,
                                      z.begin() + (first + length) * experts);
        const assignment one = routed(alone, part, experts, side(first, length));
        ids.insert(ids.end(), one.ids().begin(), one.ids().end());
        weights.insert(weights.end(), one.weights().begin(), one.weights().end());
      }
      CHECK(!ids.empty());
      CHECK(listed(all.ids()) == ids);
      CHECK(test::bit_difference(all.weights(), weights) == "");
    }
  };
  agrees(expert_choice<>{.sequence_length = length}, expert_choice<>{});
  agrees(expert_choice<sigmoid>{.sequence_length = length}, expert_choice<sigmoid>{});
}

TEST_CASE(
    "a capped token keeps its best experts, the lowest among equals; the others stay one short") {
  constexpr index_t tokens = 60, experts = 12;
  for (const test::shape shape :
       {test::shape::normal, test::shape::quantised, test::shape::all_equal}) {
    INFO(test::name(shape));
    const auto z = test::make_logits(shape, 9, tokens, experts);
    const assignment open = routed(expert_choice<>{.capacity = {.factor = 4}}, z, experts);
    const assignment capped =
        routed(expert_choice<>{.capacity = {.factor = 4}, .most_experts = 3}, z, experts);
    CHECK(capped.k() == 3);
    bool cut = false;
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<std::pair<float, expert_id>> best;
      for (std::size_t i = 0; i < open.ids(t).size(); ++i)
        best.emplace_back(-open.weights(t)[i], open.ids(t)[i]);
      std::sort(best.begin(), best.end());
      cut = cut || best.size() > 3;
      best.resize(std::min<std::size_t>(best.size(), 3));
      std::vector<expert_id> expected;
      for (const auto& [w, e] : best) expected.push_back(e);
      std::sort(expected.begin(), expected.end());
      CHECK(listed(capped.ids(t)) == expected);
    }
    CHECK(cut);
  }
}

TEST_CASE("permuting tokens permutes the choice") {
  constexpr index_t tokens = 48, experts = 16;
  const auto z = test::make_logits(test::shape::normal, 2, tokens, experts);
  std::vector<float> turned(z.size());
  for (index_t t = 0; t < tokens; ++t)
    std::copy_n(z.data() + t * experts, experts, turned.data() + (t * 5 + 1) % tokens * experts);
  const assignment a = routed(expert_choice<>{}, z, experts);
  const assignment b = routed(expert_choice<>{}, turned, experts);
  for (index_t t = 0; t < tokens; ++t)
    CHECK(listed(a.ids(t)) == listed(b.ids((t * 5 + 1) % tokens)));
}

TEST_CASE("a token that is appended can take places from earlier tokens") {
  const std::vector<float> two{1, 0, 0, 1}, three{1, 0, 0, 1, 9, 0};
  const expert_choice<> one_each{.capacity = {.fixed = 1}};
  CHECK(listed(routed(one_each, two, 2).ids(0)) == std::vector<expert_id>{0});
  CHECK(routed(one_each, three, 2).count(0) == 0);
}

TEST_CASE("no tokens are routed to nothing") {
  const assignment a = routed(expert_choice<>{}, {}, 4);
  CHECK(a.tokens() == 0);
  CHECK(a.choices() == 0);
}

TEST_CASE("expert choice has the same bits on every instruction set, executor and thread count") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = test::sized(1200, 400), experts = 40;
    const auto z = test::make_logits(shape, 12, tokens, experts);
    const expert_choice<> router{.normalize = token_renormalization::sum, .eps = 1e-12f};
    INFO(test::name(shape));
    CHECK(test::batch_bits_differ(router, z, experts) == "");
  }
}

TEST_CASE("capacities are rounded by their named rule") {
  CHECK(tokens_per_expert{.factor = 1.0}(10, 4) == 3);
  CHECK(floor_capacity(1.0)(10, 4) == 2);
  CHECK(floor_capacity(1.0)(1, 4) == 1);
  CHECK(tokens_per_expert{.factor = 0.5, .multiple_of = 4, .at_least = 5}(100, 50) == 8);
  CHECK(tokens_per_expert{.factor = 1.0, .rounding = capacity_rounding::nearest}(11, 4) == 3);
  CHECK(vmoe_capacity(1.0)(40, 8) == 8);
  CHECK(vmoe_capacity(1.0)(3, 1) == 3);
  CHECK(nucleus_capacity(2.0)(100, 64) == 4);
  CHECK(nucleus_capacity(0.1)(10, 64) == 1);
  CHECK(tokens_per_expert{.factor = 100}(10, 4) == 10);
  CHECK(tokens_per_expert{.fixed = 7}(100, 4) == 7);
}

TEST_CASE("expert choice refuses what does not fit, by name") {
  const auto refusal = [](const expert_choice<>& r) {
    return test::refusal([&] { r.check(10, 4); });
  };
  CHECK(refusal({.capacity = {.factor = 0}}) ==
        "moeroute::expert_choice: capacity.factor is 0.000000, expected > 0");
  CHECK(refusal({.sequence_length = 4}) ==
        "moeroute::expert_choice: tokens is 10, expected a multiple of sequence_length = 4");
  CHECK(refusal({.most_experts = 5}) ==
        "moeroute::expert_choice: most_experts is 5, expected 0 to 4");
  CHECK(refusal({.normalize = token_renormalization::sum, .eps = -1.0f}) ==
        "moeroute::expert_choice: eps is -1.000000, expected >= 0");
  CHECK(refusal({}) == "accepted");
}

TEST_CASE("with every option at once experts take what a sort of their columns says") {
  test::random rng(29);
  const auto agrees = [&]<class Score>(const expert_choice<Score>& drawn) {
    expert_choice<Score> router = drawn;
    const auto upto = [&](index_t n) { return 1 + rng.below(n); };
    const index_t experts = upto(40), length = upto(40), sequences = upto(3);
    const index_t tokens = length * sequences;
    const bool fixed = rng.below(2) == 0, bounded = rng.below(2) == 0;
    router.capacity = {.factor = 0.25 + 4.0 * static_cast<double>(rng.uniform()),
                       .rounding = static_cast<capacity_rounding>(rng.below(3)),
                       .multiple_of = upto(4),
                       .at_least = upto(5),
                       .fixed = fixed ? rng.below(length + 3) : 0};
    router.normalize = static_cast<token_renormalization>(rng.below(2));
    router.eps = rng.below(2) == 0 ? 0.0f : 0.125f;
    router.scale = rng.below(2) == 0 ? 1.0f : 2.7f;
    router.sequence_length = sequences > 1 || rng.below(2) == 0 ? length : 0;
    router.most_experts = bounded ? rng.below(experts + 1) : 0;
    const auto seed = rng.bits() % 1000;
    auto z = test::make_logits(rng.below(2) == 0 ? test::shape::normal : test::shape::quantised,
                               seed, tokens, experts);
    for (float& x : z)
      if (const auto odd = rng.below(24); odd < 3)
        x = odd == 0 ? -test::infinity : odd == 1 ? test::not_a_number : test::infinity;
    std::vector<std::uint8_t> mask;
    std::vector<std::int32_t> own_k;
    for (index_t t = 0; t < tokens; ++t) {
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      own_k.push_back(static_cast<std::int32_t>(rng.below(experts + 1)));
    }
    side_inputs side;
    if (rng.below(2) == 0) side.mask = mask;
    if (rng.below(2) == 0) side.k_of_token = own_k;

    // Scores are the weights where every expert takes every token.
    std::vector<float> score(z.size(), -test::infinity);
    const assignment everything =
        routed(expert_choice<Score>{.capacity = {.fixed = tokens}}, z, experts);
    for (index_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < everything.ids(t).size(); ++i)
        if (!side.masked(t))
          score[static_cast<std::size_t>(t * experts + everything.ids(t)[i])] =
              everything.weights(t)[i];

    const double share =
        static_cast<double>(length) * router.capacity.factor / static_cast<double>(experts);
    const auto rounded = static_cast<index_t>(
        router.capacity.rounding == capacity_rounding::down ? std::floor(share)
        : router.capacity.rounding == capacity_rounding::up ? std::ceil(share)
                                                            : std::nearbyint(share));
    index_t capacity = std::max(rounded, router.capacity.at_least);
    while (capacity % router.capacity.multiple_of != 0) ++capacity;
    if (router.capacity.fixed > 0) capacity = router.capacity.fixed;
    std::vector<std::vector<expert_id>> takers(static_cast<std::size_t>(tokens));
    for (index_t s = 0; s < sequences; ++s) {
      const std::vector<float> own(score.begin() + s * length * experts,
                                   score.begin() + (s + 1) * length * experts);
      for (index_t e = 0; e < experts; ++e) {
        auto order = oracle::column_order(own, length, experts, e);
        order.resize(std::min(order.size(), static_cast<std::size_t>(capacity)));
        for (const index_t t : order)
          takers[static_cast<std::size_t>(s * length + t)].push_back(static_cast<expert_id>(e));
      }
    }
    const index_t most = router.most_experts > 0 ? router.most_experts : experts;
    std::vector<expert_id> ids;
    std::vector<float> weights;
    for (index_t t = 0; t < tokens; ++t) {
      const float* const row = score.data() + t * experts;
      auto& takes = takers[static_cast<std::size_t>(t)];
      std::stable_sort(takes.begin(), takes.end(),
                       [&](expert_id a, expert_id b) { return row[a] > row[b]; });
      index_t keep = most;
      if (!side.k_of_token.empty())
        keep = std::min<index_t>(keep, own_k[static_cast<std::size_t>(t)]);
      takes.resize(std::min(takes.size(), static_cast<std::size_t>(keep)));
      std::sort(takes.begin(), takes.end());
      double sum = static_cast<double>(router.eps);
      for (const expert_id e : takes) sum += static_cast<double>(row[e]);
      const bool shared = router.normalize == token_renormalization::sum;
      for (const expert_id e : takes) {
        const auto w = static_cast<double>(row[e]), by = static_cast<double>(router.scale);
        ids.push_back(e);
        weights.push_back(static_cast<float>(!shared ? w * by : sum > 0.0 ? w / sum * by : 0.0));
      }
    }
    const assignment out = routed(router, z, experts, side);
    INFO("T=" << tokens << " E=" << experts << " C=" << capacity << " most " << most << " mask "
              << !side.mask.empty() << " own k " << !side.k_of_token.empty());
    CHECK(out.k() == most);
    CHECK(listed(out.ids()) == ids);
    CHECK(test::difference(out.weights(), weights, 2e-7) == "");
    for (index_t t = 0; t < tokens; ++t)
      REQUIRE(out.ids(t).size() == takers[static_cast<std::size_t>(t)].size());
  };
  for (index_t i = 0; i < test::sized(150, 20); ++i) {
    agrees(expert_choice<>{});
    agrees(expert_choice<sigmoid>{});
  }
}

TEST_CASE("sequences are decided alike in whatever order their pieces run") {
  constexpr index_t length = 20, tokens = 4 * length;
  for (const index_t experts : {3, 20, 33}) {
    const auto z = test::make_logits(test::shape::normal, 18, tokens, experts);
    const expert_choice<sigmoid> router{.capacity = {.fixed = 5}, .sequence_length = length};
    workspace ws;
    assignment forwards, backwards;
    route(router, test::rows_of(z, experts), ws, forwards);
    route(router, test::rows_of(z, experts), ws, backwards, test::backwards{});
    CHECK(forwards.choices() == 4 * experts * 5);
    CHECK(listed(backwards.ids()) == listed(forwards.ids()));
    CHECK(test::bit_difference(backwards.weights(), forwards.weights()) == "");
  }
}

TEST_CASE("each number of expert choice has two ends, and one where nothing is said") {
  const auto refused = [](const expert_choice<>& r, index_t experts = 4) {
    return test::refusal([&] { r.check(8, experts); });
  };
  constexpr index_t most = index_t{1} << 30;
  CHECK(refused({.sequence_length = -1}) ==
        "moeroute::expert_choice: sequence_length is -1, expected 0 to 2147483648");
  CHECK(refused({.sequence_length = 2 * most + 1}) ==
        "moeroute::expert_choice: sequence_length is 2147483649, expected 0 to 2147483648");
  CHECK(refused({.sequence_length = 8}) == "accepted");
  CHECK(refused({.most_experts = -1}) ==
        "moeroute::expert_choice: most_experts is -1, expected 0 to 4");
  CHECK(refused({.most_experts = 4}) == "accepted");
  CHECK(refused({}, 0) == "moeroute::expert_choice: experts is 0, expected 1 to 1048576");
  CHECK(refused({}, 1) == "accepted");
  CHECK(refused({}, max_experts + 1) ==
        "moeroute::expert_choice: experts is 1048577, expected 1 to 1048576");
  const auto sizes = [&](index_t tokens_per_expert::* field, const char* name, index_t least) {
    const auto with = [&](index_t n) {
      expert_choice<> r;
      r.capacity.*field = n;
      return refused(r);
    };
    CHECK(with(least) == "accepted");
    CHECK(with(most) == "accepted");
    for (const index_t n : {least - 1, most + 1})
      CHECK(with(n) == "moeroute::expert_choice: capacity." + std::string(name) + " is " +
                           std::to_string(n) + ", expected " + std::to_string(least) +
                           " to 1073741824");
  };
  sizes(&tokens_per_expert::multiple_of, "multiple_of", 1);
  sizes(&tokens_per_expert::at_least, "at_least", 1);
  sizes(&tokens_per_expert::fixed, "fixed", 0);
  const expert_choice<> plain;
  CHECK(plain.capacity == tokens_per_expert{.factor = 2.0,
                                            .rounding = capacity_rounding::up,
                                            .multiple_of = 1,
                                            .at_least = 1,
                                            .fixed = 0});
  CHECK((plain.normalize == token_renormalization::none && plain.eps == 0.0f &&
         plain.scale == 1.0f && plain.sequence_length == 0 && plain.most_experts == 0));
  CHECK(vmoe_capacity(1.5) == tokens_per_expert{.factor = 1.5, .multiple_of = 4});
  CHECK(nucleus_capacity(1.5) == tokens_per_expert{.factor = 1.5});
  CHECK(floor_capacity(1.5) ==
        tokens_per_expert{.factor = 1.5, .rounding = capacity_rounding::down});
}
