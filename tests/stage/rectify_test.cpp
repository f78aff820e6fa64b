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
