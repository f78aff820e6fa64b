#include <moeroute/policy/parts/selection.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <string>
#include <utility>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

/// The experts chosen for each row of [T, E] choice scores, at most 16 rows.
template <selection_rule Rule>
std::vector<expert_id> chosen(const Rule& rule, std::vector<float> rows, int tokens,
                              index_t experts) {
  const side_inputs side;
  const index_t k = rule.choices();
  const logit_block block{rows.data(), experts, tokens, experts, 0, &side};
  std::vector<expert_id> id(static_cast<std::size_t>(k * block_rows)), out;
  std::vector<float> value(id.size());
  workspace memory;
  const auto carved = memory.carve([&](scratch& tape) { return rule.carve(tape, experts); });
  choice_block c{static_cast<int>(k), id.data(), value.data()};
  rule.select(block, rows.data(), c, carved);
  for (int i = 0; i < tokens; ++i)
    for (index_t r = 0; r < k; ++r) out.push_back(id[static_cast<std::size_t>(r * block_rows + i)]);
  return out;
}

/// Groups by hand: experts outside the best groups get the fill, then top-k of what is left.
std::vector<expert_id> grouped(const top_k& rule, const std::vector<float>& row) {
  const index_t experts = static_cast<index_t>(row.size()), size = experts / rule.groups;
  std::vector<float> worth;
  for (index_t g = 0; g < rule.groups; ++g) {
    const float* first = row.data() + g * size;
    const std::vector<expert_id> best = oracle::order(first, size);
    float sum = simd::minus_infinity;
    if (!best.empty()) sum = first[best[0]];
    std::size_t counted = 1;
    if (rule.group_score == group_score::top2_sum) counted = 2;
    if (rule.group_score == group_score::top_sum)
      counted = static_cast<std::size_t>(rule.k / rule.topk_group);
    for (std::size_t r = 1; r < std::min(counted, best.size()); ++r) sum += first[best[r]];
    worth.push_back(sum);
  }
  std::vector<expert_id> groups(static_cast<std::size_t>(rule.groups));
  for (std::size_t g = 0; g < groups.size(); ++g) groups[g] = static_cast<expert_id>(g);
  std::stable_sort(groups.begin(), groups.end(), [&](expert_id a, expert_id b) {
    return worth[static_cast<std::size_t>(a)] > worth[static_cast<std::size_t>(b)];
  });
  std::vector<float> masked = row;
  for (std::size_t g = static_cast<std::size_t>(rule.topk_group); g < groups.size(); ++g)
    for (index_t e = groups[g] * size; e < (groups[g] + 1) * size; ++e) {
      float& x = masked[static_cast<std::size_t>(e)];
      if (x > simd::minus_infinity) x = rule.group_fill;
    }
  return oracle::top_k(masked.data(), experts, rule.k);
}

}  // namespace

TEST_CASE("without groups the k best of all experts are chosen") {
  const top_k rule{.k = 5};
  for (const test::shape s : test::all_shapes) {
    const std::vector<float> rows = test::make_logits(s, 1, 9, 24);
    std::vector<expert_id> expected;
    for (index_t t = 0; t < 9; ++t) {
      const auto row = oracle::top_k(rows.data() + t * 24, 24, 5);
      expected.insert(expected.end(), row.begin(), row.end());
    }
    INFO(test::name(s));
    CHECK(chosen(rule, rows, 9, 24) == expected);
  }
}

TEST_CASE("with groups only experts of the best groups are chosen, equal groups in order") {
  for (const group_score score : {group_score::max, group_score::top2_sum, group_score::top_sum})
    for (const float fill : {simd::minus_infinity, 0.0f})
      for (const index_t topk_group : {1, 2, 3, 8}) {
        // Three experts of each group count towards a top_sum.
        const top_k rule{.k = score == group_score::top_sum ? 3 * topk_group : 3,
                         .groups = 8,
                         .topk_group = topk_group,
                         .group_score = score,
                         .group_fill = fill};
        for (const test::shape s : test::all_shapes) {
          const std::vector<float> rows = test::make_logits(s, 2, 9, 32);
          std::vector<expert_id> expected;
          for (index_t t = 0; t < 9; ++t) {
            const auto row = grouped(rule, {rows.begin() + t * 32, rows.begin() + (t + 1) * 32});
            expected.insert(expected.end(), row.begin(), row.end());
          }
          INFO(test::name(s) << " topk_group=" << topk_group << " fill=" << fill);
          CHECK(chosen(rule, rows, 9, 32) == expected);
        }
      }
}

TEST_CASE("a k that the program knows chooses what the same k does at run time") {
  const auto check = []<index_t... n>(std::integer_sequence<index_t, n...>) {
    for (const index_t experts : {66, 130, 257})
      for (const int tokens : {1, 9, 16})
        for (const test::shape s : test::all_shapes) {
          const std::vector<float> rows = test::make_logits(s, 3, tokens, experts);
          INFO(test::name(s) << " E=" << experts << " T=" << tokens);
          CHECK(((chosen(top_k_of<n>{}, rows, tokens, experts) ==
                  chosen(top_k{.k = n}, rows, tokens, experts)) &&
                 ...));
        }
  };
  check(std::integer_sequence<index_t, 1, 2, 3, 4, 8, 10, 24, 33, 65>{});
  CHECK(test::refusal([] { top_k_of<8>::check(7); }) ==
        "moeroute::top_k_of: k is 8, expected 1 to 7");
}

TEST_CASE("selections that do not fit E are refused") {
  const auto refusal = [](const top_k& rule) { return test::refusal([&] { rule.check(12); }); };
  CHECK(refusal({.k = 0}) == "moeroute::top_k: k is 0, expected 1 to 12");
  CHECK(refusal({.k = 13}) == "moeroute::top_k: k is 13, expected 1 to 12");
  CHECK(refusal({.k = 2, .groups = 5}) ==
        "moeroute::top_k: groups is 5, expected a divisor of E = 12");
  CHECK(refusal({.k = 2, .groups = 0}) == "moeroute::top_k: groups is 0, expected 1 to 12");
  CHECK(refusal({.k = 2, .groups = 4, .topk_group = 5}) ==
        "moeroute::top_k: topk_group is 5, expected 1 to 4");
  CHECK(refusal({.k = 4, .groups = 4, .topk_group = 1}) ==
        "moeroute::top_k: topk_group is 1 groups of 3 experts, expected room for k = 4");
  CHECK(refusal({.k = 2, .groups = 4, .topk_group = 1, .group_fill = 1.0f}) ==
        "moeroute::top_k: group_fill is 1.000000, expected -inf or 0");
  CHECK(refusal({.k = 3, .groups = 4, .topk_group = 1}) == "accepted");
  CHECK(refusal({.k = 3, .topk_group = 0, .group_fill = 1.0f}) == "accepted");  // of one group
}
