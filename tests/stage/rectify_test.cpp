#include <moeroute/stage/rectify.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace {

struct batch {
  std::vector<float> scores;
  assignment choices;
  index_t tokens, experts, k;
  matrix_view<const float> view() const { return {scores.data(), tokens, experts}; }
};

// Each token chooses its k best, and capacity has dropped some.
batch dropped_batch(std::uint64_t seed, index_t tokens, index_t experts, index_t k,
                    index_t capacity, bool ties) {
  test::random rng(seed);
  batch b{{}, {}, tokens, experts, k};
  for (index_t i = 0; i < tokens * experts; ++i) {
    const float popular = static_cast<float>(experts - i % experts) / static_cast<float>(experts);
    b.scores.push_back(ties ? static_cast<float>(rng.below(4)) / 4.0f
                            : rng.uniform() * 0.7f + popular * 0.3f);
  }
  b.choices.reset(tokens, experts, k);
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t x, std::int32_t y) {
      return b.view()(t, x) > b.view()(t, y);
    });
    for (index_t r = 0; r < k; ++r) {
      const auto c = static_cast<std::size_t>(t * k + r);
      b.choices.ids()[c] = order[static_cast<std::size_t>(r)];
      b.choices.weights()[c] = b.view()(t, order[static_cast<std::size_t>(r)]);
    }
  }
  workspace ws;
  apply_capacity(b.choices,
                 {.rule = {.formula = capacity_formula::fixed, .count = capacity},
                  .order = drop_order::by_weight},
                 ws);
  return b;
}

std::vector<index_t> loads(const assignment& a) {
  std::vector<index_t> load(static_cast<std::size_t>(a.experts()));
  for (index_t c = 0; c < a.choices(); ++c) {
    const expert_id e = a.ids()[static_cast<std::size_t>(c)];
    if (e >= 0 && a.kept(c)) ++load[static_cast<std::size_t>(e)];
  }
  return load;
}

std::set<expert_id> used_by(const assignment& a, index_t t, bool kept_only) {
  std::set<expert_id> used;
  for (index_t c = a.first(t); c < a.first(t + 1); ++c)
    if (!kept_only || a.kept(c)) used.insert(a.ids()[static_cast<std::size_t>(c)]);
  return used;
}

}  // namespace

TEST_CASE("after rectification within a rank a dropped choice has the rank's best unused expert") {
  for (const bool ties : {false, true})
    for (const index_t per_rank : {2, 3, 4, 8}) {
      batch b = dropped_batch(21, 60, 8, 2, 6, ties);
      const assignment before = b.choices;
      std::vector<std::int32_t> rank(60);
      for (std::size_t t = 0; t < rank.size(); ++t)
        rank[t] =
            static_cast<std::int32_t>(t) % static_cast<std::int32_t>(ceil_div(b.experts, per_rank));
      const index_t found = rectify_within_rank(b.choices, b.view(), rank, per_rank);
      index_t expected_found = 0;
      for (index_t t = 0; t < b.tokens; ++t) {
        std::set<expert_id> used = used_by(before, t, true);
        for (index_t c = t * b.k; c < (t + 1) * b.k; ++c) {
          const auto i = static_cast<std::size_t>(c);
          if (before.kept(c)) {
            CHECK(b.choices.ids()[i] == before.ids()[i]);
            CHECK(b.choices.weights()[i] == before.weights()[i]);
            continue;
          }
          expert_id best = no_expert;
          const index_t begin = rank[static_cast<std::size_t>(t)] * per_rank;
          for (index_t e = begin; e < std::min(b.experts, begin + per_rank); ++e)
            if (!used.contains(static_cast<expert_id>(e)) &&
                (best < 0 || b.view()(t, e) > b.view()(t, best)))
              best = static_cast<expert_id>(e);
          CHECK(b.choices.kept(c) == (best >= 0));
          if (best < 0) continue;
          ++expected_found;
          used.insert(best);
          CHECK(b.choices.ids()[i] == best);
          CHECK(b.choices.weights()[i] == b.view()(t, best));
        }
      }
      CHECK(found == expected_found);
      CHECK(found > 0);
    }
}

TEST_CASE("after filling in no expert has a vacancy while a token is left that does not use it") {
  for (const bool ties : {false, true})
    for (const index_t capacity : {10, 16, 20, 60, 100}) {
      const batch b = dropped_batch(22, 60, 8, 2, capacity, ties);
      workspace ws;
      assignment filled;
      const index_t given = rectify_by_filling(b.choices, b.view(), capacity, 8, ws, filled);
      const auto before = loads(b.choices), after = loads(filled);
      index_t added = 0;
      for (std::size_t e = 0; e < after.size(); ++e) {
        CHECK(after[e] <= capacity);
        CHECK(after[e] >= before[e]);
        added += after[e] - before[e];
        index_t candidates = 0;
        for (index_t t = 0; t < b.tokens; ++t)
          candidates += !used_by(filled, t, false).contains(static_cast<expert_id>(e));
        CHECK((after[e] == capacity || candidates == 0));
      }
      CHECK(added == given);
    }
}

TEST_CASE("of equal claims to the last vacancies those of the lowest tokens are met") {
  const std::vector<float> scores(12, 0.5f);
  assignment choices, filled;
  choices.reset(6, 2, 1);
  std::fill(choices.ids().begin(), choices.ids().end(), 0);
  std::fill(choices.weights().begin(), choices.weights().end(), 0.5f);
  workspace ws;
  const matrix_view<const float> view(scores.data(), 6, 2);
  CHECK(rectify_by_filling(choices, view, 2, 2, ws, filled) == 2);
  for (index_t t = 0; t < 6; ++t) CHECK(filled.count(t) == (t < 2 ? 2 : 1));
}

TEST_CASE("filling in takes nobody's place, uses an expert once, and keeps the tokens' order") {
  const batch b = dropped_batch(23, 40, 8, 2, 12, false);
  workspace ws;
  assignment filled;
  rectify_by_filling(b.choices, b.view(), 12, 3, ws, filled);
  for (index_t t = 0; t < b.tokens; ++t) {
    CHECK(std::equal(b.choices.ids(t).begin(), b.choices.ids(t).end(), filled.ids(t).begin()));
    CHECK(std::equal(b.choices.weights(t).begin(), b.choices.weights(t).end(),
                     filled.weights(t).begin()));
    CHECK(static_cast<index_t>(used_by(filled, t, false).size()) == filled.count(t));
    for (index_t r = 0; r < b.k; ++r)
      CHECK(filled.kept(filled.first(t) + r) == b.choices.kept(t * b.k + r));
    for (std::size_t r = 2; r < filled.ids(t).size(); ++r) {
      CHECK(filled.weights(t)[r] == b.view()(t, filled.ids(t)[r]));
      if (r > 2) CHECK(filled.weights(t)[r] <= filled.weights(t)[r - 1]);
    }
  }
}

TEST_CASE("one round of filling in gives vacancies to the best of those whose next choice it is") {
  for (const index_t experts : {8, 15, 16, 17, 31, 32, 33}) {
    for (const test::guarded_end end : {test::guarded_end::front, test::guarded_end::back}) {
      const test::forbidden_memory around(end);
      const batch b = dropped_batch(24, 64, experts, 2, 14, false);
      workspace ws;
      assignment filled;
      rectify_by_filling(b.choices, b.view(), 14, 1, ws, filled);
      const auto before = loads(b.choices);
      std::vector<expert_id> next_of;
      for (index_t t = 0; t < b.tokens; ++t) {
        expert_id next = no_expert;
        const auto used = used_by(b.choices, t, false);
        for (expert_id x = 0; x < b.experts; ++x)
          if (!used.contains(x) && (next < 0 || b.view()(t, x) > b.view()(t, next))) next = x;
        next_of.push_back(next);
      }
      for (expert_id e = 0; e < b.experts; ++e) {
        INFO("E=" << experts << " e=" << e);
        std::vector<std::pair<float, index_t>> candidates;
        for (index_t t = 0; t < b.tokens; ++t)
          if (next_of[static_cast<std::size_t>(t)] == e)
            candidates.emplace_back(-b.view()(t, e), t);
        std::sort(candidates.begin(), candidates.end());
        candidates.resize(std::min(
            candidates.size(), static_cast<std::size_t>(14 - before[static_cast<std::size_t>(e)])));
        std::set<index_t> expected, actual;
        for (const auto& c : candidates) expected.insert(c.second);
        for (index_t t = 0; t < b.tokens; ++t)
          if (filled.count(t) > 2 && filled.ids(t)[2] == e) actual.insert(t);
        CHECK(actual == expected);
      }
    }
  }
}

TEST_CASE("what was dropped by hand, with room left, leaves its place to another token") {
  batch b{{2.0f, 1.0f, 2.0f, 1.0f, 1.0f, 2.0f}, {}, 3, 2, 1};
  b.choices.reset(3, 2, 1);
  const expert_id ids[] = {0, 0, 1};
  std::copy(std::begin(ids), std::end(ids), b.choices.ids().begin());
  b.choices.kept_to_change()[1] = 0;
  workspace ws;
  assignment filled;
  CHECK(rectify_by_filling(b.choices, b.view(), 2, 1, ws, filled) == 2);
  CHECK(loads(filled) == std::vector<index_t>{2, 2});
}

TEST_CASE("a score of -inf or NaN is no reason to go to an expert") {
  batch b = dropped_batch(25, 10, 4, 1, 1, false);
  for (std::size_t i = 0; i < b.scores.size(); ++i)
    b.scores[i] = i % 2 == 0 ? -std::numeric_limits<float>::infinity()
                             : std::numeric_limits<float>::quiet_NaN();
  workspace ws;
  assignment filled;
  CHECK(rectify_by_filling(b.choices, b.view(), 10, 4, ws, filled) == 0);
  const std::vector<std::int32_t> rank(10, 0);
  CHECK(rectify_within_rank(b.choices, b.view(), rank, 4) == 0);
}

TEST_CASE("what rectification refuses, it refuses by name") {
  batch b = dropped_batch(26, 10, 4, 2, 3, false);
  workspace ws;
  assignment filled;
  const std::vector<std::int32_t> rank(10, 0), nine(9, 0), wrong(10, 2);
  const matrix_view<const float> narrow(b.scores.data(), 10, 3, 4);
  CHECK(test::refusal([&] { rectify_within_rank(b.choices, narrow, rank, 2); }) ==
        "moeroute::rectify_within_rank: scores.cols() is 3, expected 4");
  CHECK(test::refusal([&] { rectify_within_rank(b.choices, b.view(), nine, 2); }) ==
        "moeroute::rectify_within_rank: rank_of_token.size() is 9, expected 10");
  CHECK(test::refusal([&] { rectify_within_rank(b.choices, b.view(), wrong, 2); }) ==
        "moeroute::rectify_within_rank: rank_of_token is 2, expected 0 to 1");
  CHECK(test::refusal([&] { rectify_within_rank(b.choices, b.view(), rank, 5); }) ==
        "moeroute::rectify_within_rank: experts_per_rank is 5, expected 1 to 4");
  CHECK(test::refusal([&] { rectify_by_filling(b.choices, b.view(), -1, 4, ws, filled); }) ==
        "moeroute::rectify_by_filling: capacity is -1, expected 0 to 2147483647");
  CHECK(test::refusal([&] { rectify_by_filling(b.choices, b.view(), 3, 4, ws, b.choices); }) ==
        "moeroute::rectify_by_filling: choices and filled are the same, expected two assignments");
  const matrix_view<const float> low(b.scores.data(), 9, 4), tight(b.scores.data(), 10, 4, 3);
  const std::vector<std::int32_t> below(10, -1);
  const auto within = [&](matrix_view<const float> scores,
                          const std::vector<std::int32_t>& rank_of_token, index_t each = 2) {
    return [&b, scores, &rank_of_token, each] {
      rectify_within_rank(b.choices, scores, rank_of_token, each);
    };
  };
  const auto filling = [&](matrix_view<const float> scores, index_t rounds = 2) {
    return [&, scores, rounds] { rectify_by_filling(b.choices, scores, 3, rounds, ws, filled); };
  };
  const test::refusals refused{
      {within(low, rank), "rectify_within_rank: scores.rows() is 9, expected 10"},
      {within(tight, rank), "rectify_within_rank: scores.stride is 3, expected at least 4"},
      {within(b.view(), below), "rectify_within_rank: rank_of_token is -1, expected 0 to 1"},
      {within(b.view(), rank, 0), "rectify_within_rank: experts_per_rank is 0, expected 1 to 4"},
      {filling(low), "rectify_by_filling: scores.rows() is 9, expected 10"},
      {filling(narrow), "rectify_by_filling: scores.cols() is 3, expected 4"},
      {filling(tight), "rectify_by_filling: scores.stride is 3, expected at least 4"},
      {filling(b.view(), 5), "rectify_by_filling: rounds is 5, expected 0 to 4"},
      {filling(b.view(), -1), "rectify_by_filling: rounds is -1, expected 0 to 4"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
}

TEST_CASE("either rectification of any choices and scores is that of plain loops") {
  test::random rng(61);
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  for (int round = 0; round < 300; ++round) {
    const index_t tokens = rng.below(12), experts = 1 + rng.below(7),
                  k = 1 + rng.below(std::min<index_t>(experts, 3)), stride = experts + rng.below(3);
    const bool ragged = rng.below(2) == 0;
    assignment a = ragged ? test::ragged_choices(rng, tokens, experts, k)
                          : test::fixed_choices(rng, tokens, experts, k, 5);
    if (rng.below(4) != 0) test::drop_some(rng, a, 2);
    std::vector<float> memory(at(tokens * stride + 1));
    for (float& x : memory) {
      const index_t what = rng.below(12);
      const float value = static_cast<float>(rng.below(5)) - 2.0f;
      x = what == 0   ? -std::numeric_limits<float>::infinity()
          : what == 1 ? std::numeric_limits<float>::quiet_NaN()
                      : value;
    }
    const matrix_view<const float> scores(memory.data(), tokens, experts, stride);
    const auto finds = [&](index_t t, index_t e) {
      return scores(t, e) > -std::numeric_limits<float>::infinity();
    };
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << k);

    const index_t each = 1 + rng.below(experts), ranks = (experts + each - 1) / each;
    std::vector<std::int32_t> rank;
    for (index_t t = 0; t < tokens; ++t)
      rank.push_back(static_cast<std::int32_t>(rng.below(ranks)));
    std::vector<expert_id> ids(a.ids().begin(), a.ids().end());
    std::vector<float> weights(a.weights().begin(), a.weights().end());
    std::vector<bool> kept;
    for (index_t c = 0; c < a.choices(); ++c) kept.push_back(a.kept(c));
    index_t expected = 0;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
        if (kept[at(c)] || ids[at(c)] < 0) continue;
        expert_id best = no_expert;
        for (index_t e = 0; e < experts; ++e) {
          bool used = false;
          for (index_t o = a.first(t); o < a.first(t + 1); ++o)
            used = used || (kept[at(o)] && ids[at(o)] == e);
          if (e / each == rank[at(t)] && !used && finds(t, e) &&
              (best < 0 || scores(t, e) > scores(t, best)))
            best = static_cast<expert_id>(e);
        }
        if (best < 0) continue;
        ids[at(c)] = best;
        weights[at(c)] = scores(t, best);
        kept[at(c)] = true;
        ++expected;
      }
    assignment within = a;
    CHECK(rectify_within_rank(within, scores, rank, each) == expected);
    index_t wrong =
        !std::ranges::equal(within.ids(), ids) || !std::ranges::equal(within.weights(), weights);
    for (index_t c = 0; c < a.choices(); ++c) wrong += within.kept(c) != kept[at(c)];
    CHECK(wrong == 0);

    // Round by round each token names its next best, and each expert takes the best of them.
    const index_t capacity = rng.below(6), rounds = rng.below(experts + 1);
    std::vector<index_t> room(at(experts), capacity);
    const std::vector<index_t> load = loads(a);
    for (std::size_t e = 0; e < room.size(); ++e) room[e] = std::max<index_t>(0, room[e] - load[e]);
    std::vector<std::vector<expert_id>> named(at(tokens)), given(at(tokens));
    index_t sum = 0;
    for (index_t n = 0; n < rounds; ++n) {
      std::vector<expert_id> next(at(tokens), no_expert);
      for (index_t t = 0; t < tokens; ++t) {
        const auto used = used_by(a, t, false);
        for (expert_id e = 0; e < experts; ++e)
          if (finds(t, e) && !used.contains(e) &&
              std::find(named[at(t)].begin(), named[at(t)].end(), e) == named[at(t)].end() &&
              (next[at(t)] < 0 || scores(t, e) > scores(t, next[at(t)])))
            next[at(t)] = e;
        if (next[at(t)] >= 0) named[at(t)].push_back(next[at(t)]);
      }
      for (expert_id e = 0; e < experts; ++e)
        for (; room[at(e)] > 0; --room[at(e)], ++sum) {
          index_t best = -1;
          for (index_t t = 0; t < tokens; ++t)
            if (next[at(t)] == e && (best < 0 || scores(t, e) > scores(best, e))) best = t;
          if (best < 0) break;
          given[at(best)].push_back(e);
          next[at(best)] = no_expert;
        }
    }
    workspace ws;
    assignment filled;
    CHECK(rectify_by_filling(a, scores, capacity, rounds, ws, filled) == sum);
    wrong = !filled.ragged() || filled.tokens() != tokens || filled.experts() != experts ||
            filled.k() != std::min(experts, k + rounds) || filled.drops() != a.drops();
    index_t c = 0;
    for (index_t t = 0; t < tokens; ++t) {
      wrong += filled.first(t) != c;
      for (index_t o = a.first(t); o < a.first(t + 1); ++o) {
        if (a.ids()[at(o)] < 0) continue;
        wrong += c >= filled.choices() || filled.ids()[at(c)] != a.ids()[at(o)] ||
                 filled.weights()[at(c)] != a.weights()[at(o)] || filled.kept(c) != a.kept(o);
        ++c;
      }
      for (const expert_id e : given[at(t)]) {
        wrong +=
            filled.ids()[at(c)] != e || filled.weights()[at(c)] != scores(t, e) || !filled.kept(c);
        ++c;
      }
      wrong += filled.first(t + 1) != c;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE(
    "a token of one expert and one choice that has none is filled in, with no room to spare") {
  assignment a, filled;
  a.reset(1, 2, 2);
  std::ranges::copy(std::vector<expert_id>{no_expert, 1}, a.ids().begin());
  std::ranges::copy(std::vector<float>{0.0f, 0.5f}, a.weights().begin());
  const std::vector<float> scores{0.75f, 0.5f};
  workspace ws;
  const matrix_view<const float> rows(scores.data(), 1, 2);
  const test::forbidden_memory around(test::guarded_end::back);
  CHECK(rectify_by_filling(a, rows, 1, 2, ws, filled) == 1);
  CHECK(std::ranges::equal(filled.ids(), std::vector<expert_id>{1, 0}));
  CHECK(std::ranges::equal(filled.weights(), std::vector<float>{0.5f, 0.75f}));
  // Who names an expert twice may have more than there are.
  a.ids()[0] = 1;
  CHECK(test::refusal([&] { rectify_by_filling(a, rows, 1, 2, ws, filled); }) ==
        "moeroute::rectify_by_filling: token 0 has 2 choices and is given 1, expected at most 2 "
        "distinct experts");
  CHECK(filled.choices() == 2);
}
