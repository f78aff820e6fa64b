#include <moeroute/policy/parts/selection.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/parts/selection_rules.hpp>
#include <string>
#include <utility>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

/// The experts chosen for each row of [T, E] choice scores, at most 16 rows, and who is of a lost
/// group.
template <selection_rule Rule>
std::vector<expert_id> chosen(const Rule& rule, std::vector<float> rows, int tokens,
                              index_t experts, const side_inputs& side = {},
                              index_t first_token = 0, std::vector<bool>* lost = nullptr) {
  const index_t k = rule.choices();
  const logit_block block{rows.data(), experts, tokens, experts, first_token, &side};
  std::vector<expert_id> id(static_cast<std::size_t>(k * block_rows)), out;
  std::vector<float> value(id.size());
  workspace memory;
  const auto carved = memory.carve([&](scratch& tape) { return rule.carve(tape, experts); });
  choice_block c{static_cast<int>(k), id.data(), value.data()};
  rule.select(block, rows.data(), c, carved);
  for (int i = 0; i < tokens; ++i)
    for (index_t r = 0; r < k; ++r) out.push_back(id[static_cast<std::size_t>(r * block_rows + i)]);
  if constexpr (requires { rule.lost(carved, 0, expert_id{}, experts); })
    for (int i = 0; lost != nullptr && i < tokens; ++i)
      for (expert_id e = 0; e < experts; ++e) lost->push_back(rule.lost(carved, i, e, experts));
  return out;
}

/// Who is of a lost group, by hand.
std::vector<bool> lost_by_hand(const top_k& rule, const std::vector<float>& row) {
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
    if (rule.group_score == group_score::sum) counted = best.size();
    for (std::size_t r = 1; r < std::min(counted, best.size()); ++r) sum += first[best[r]];
    worth.push_back(sum);
  }
  std::vector<expert_id> groups(static_cast<std::size_t>(rule.groups));
  for (std::size_t g = 0; g < groups.size(); ++g) groups[g] = static_cast<expert_id>(g);
  std::stable_sort(groups.begin(), groups.end(), [&](expert_id a, expert_id b) {
    return worth[static_cast<std::size_t>(a)] > worth[static_cast<std::size_t>(b)];
  });
  std::vector<bool> lost(row.size());
  for (std::size_t g = static_cast<std::size_t>(rule.topk_group); g < groups.size(); ++g)
    std::fill_n(lost.begin() + groups[g] * size, size, true);
  return lost;
}

/// Groups by hand: experts outside the best groups get the fill, then top-k of what is left.
std::vector<expert_id> grouped(const top_k& rule, const std::vector<float>& row) {
  const std::vector<bool> lost = lost_by_hand(rule, row);
  std::vector<float> masked = row;
  for (std::size_t e = 0; e < row.size(); ++e)
    if (lost[e] && row[e] > simd::minus_infinity) masked[e] = rule.group_fill;
  return oracle::top_k(masked.data(), static_cast<index_t>(row.size()), rule.k);
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

TEST_CASE("selections touch no memory but their own, and know who is of a lost group") {
  test::random rng(109);
  const side_inputs side;
  for (index_t round = 0; round < 200; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t groups = 1 + rng.below(20), size = 1 + rng.below(12), experts = groups * size;
    const int tokens = static_cast<int>(1 + rng.below(block_rows));
    top_k rule{.groups = groups, .topk_group = 1 + rng.below(groups)};
    rule.k = 1 + rng.below(rule.topk_group * size);
    rule.group_score = static_cast<group_score>(rng.below(4));
    if (coin()) rule.group_fill = 0.0f;
    rule.check(experts);
    // In eighths: no sum rounds.
    const auto seed = rng.bits() % 1000;
    const auto z = test::make_logits(coin() ? test::shape::quantised : test::shape::masked, seed,
                                     tokens, experts);
    std::vector<float> exact(z);
    for (float& x : exact) x = x > -test::infinity ? std::floor(8.0f * x) / 8.0f : x;
    const int k = static_cast<int>(rule.k);
    const index_t best = rule.group_score == group_score::top_sum
                             ? std::clamp<index_t>(rule.k / rule.topk_group, 1, size)
                             : std::min<index_t>(rule.group_score == group_score::top2_sum ? 2 : 1,
                                                 size),
                  wide = best > 2 ? best * block_rows : groups * block_rows,
                  keys = std::max(simd::top_k_scratch(experts, rule.k),
                                  best > 2 ? simd::top_k_scratch(size, best) : 0);
    for (const auto end : {test::guarded_end::front, test::guarded_end::back}) {
      test::guarded<float> rows(tokens * experts), worth(groups * block_rows), value(wide),
          values(k * block_rows);
      test::guarded<std::int32_t> column(wide);
      test::guarded<std::uint64_t> key(keys);
      test::guarded<expert_id> ids(k * block_rows);
      float* const own = rows.window(tokens * experts, end);
      std::copy(exact.begin(), exact.end(), own);
      const top_k::buffers memory{key.window(keys, end), worth.window(groups * block_rows, end),
                                  value.window(wide, end), column.window(wide, end)};
      choice_block c{k, ids.window(k * block_rows, end), values.window(k * block_rows, end)};
      clear_lanes(c, tokens);
      rule.select(logit_block{own, experts, tokens, experts, 0, &side}, own, c, memory);
      std::string broken;
      for (int i = 0; i < tokens; ++i) {
        const std::vector<float> row(exact.begin() + i * experts,
                                     exact.begin() + (i + 1) * experts);
        const std::vector<expert_id> expected = grouped(rule, row);
        for (int r = 0; r < k; ++r)
          if (c.id[r * block_rows + i] != expected[static_cast<std::size_t>(r)])
            broken = "row " + std::to_string(i);
        if (groups == 1) continue;
        const std::vector<bool> lost = lost_by_hand(rule, row);
        for (expert_id e = 0; e < experts; ++e)
          if (rule.lost(memory, i, e, experts) != lost[static_cast<std::size_t>(e)])
            broken = "expert " + std::to_string(e) + " of row " + std::to_string(i);
      }
      INFO("round " << round << " groups " << groups << " of " << size << " stay "
                    << rule.topk_group << " k " << k << " T " << tokens << " score "
                    << static_cast<int>(rule.group_score));
      CHECK(broken == "");
    }
  }
}

TEST_CASE(
    "a selection asks for the memory that its kernels use, and for none where it has no groups") {
  const auto bytes = [](const auto& rule, index_t experts) {
    scratch tape;
    rule.carve(tape, experts);
    return tape.used();
  };
  constexpr index_t line = block_rows * 4;
  CHECK(bytes(top_k{.k = 8}, 96) == 0);
  CHECK(bytes(top_k{.k = 8, .groups = 6, .topk_group = 3}, 96) == 2 * 6 * line);
  CHECK(bytes(top_k{.k = 8, .groups = 6, .topk_group = 3, .group_score = group_score::max}, 96) ==
        2 * 6 * line);
  CHECK(bytes(top_k{.k = 8, .groups = 6, .topk_group = 3, .group_score = group_score::sum}, 96) ==
        2 * 6 * line);
  CHECK(bytes(top_k{.k = 12, .groups = 6, .topk_group = 3, .group_score = group_score::top_sum},
              96) == (6 + 4 + 4) * line);
  // A k beyond the kernels' has a word for each expert.
  const index_t many = simd::max_lane_k + 1;
  CHECK(bytes(top_k{.k = many}, 512) == 512 * 8);
  CHECK(bytes(top_k{.k = many, .groups = 2, .topk_group = 1}, 512) == 512 * 8 + 2 * 2 * line);
  CHECK(bytes(top_k_of<8>{}, 96) == 0);
  CHECK(bytes(top_k_of<simd::max_lane_k + 1>{}, 512) == 512 * 8);
}

TEST_CASE("lanes without a row hold nobody, and those of a whole block what they held") {
  std::vector<expert_id> id(3 * block_rows, 7);
  std::vector<float> value(3 * block_rows, 5.0f);
  const choice_block c{3, id.data(), value.data()};
  clear_lanes(c, block_rows);
  CHECK(id == std::vector<expert_id>(3 * block_rows, 7));
  CHECK(value == std::vector<float>(3 * block_rows, 5.0f));
  clear_lanes(c, block_rows - 1);
  CHECK(id == std::vector<expert_id>(3 * block_rows, no_expert));
  CHECK(value == std::vector<float>(3 * block_rows, 0.0f));
}

TEST_CASE("a selection without numbers is of two experts of all, each of its numbers has ends") {
  const top_k plain;
  CHECK((plain.k == 2 && plain.groups == 1 && plain.topk_group == 1 &&
         plain.group_score == group_score::top2_sum && plain.group_fill == simd::minus_infinity &&
         plain.lost_weight == lost_weight::as_published));
  const auto refusal = [](const top_k& rule) { return test::refusal([&] { rule.check(12); }); };
  CHECK(refusal({.k = 12}) == "accepted");
  CHECK(refusal({.k = 1}) == "accepted");
  CHECK(refusal({.k = 1, .groups = 12}) == "accepted");
  CHECK(refusal({.k = 1, .groups = 13}) == "moeroute::top_k: groups is 13, expected 1 to 12");
  CHECK(refusal({.k = 1, .groups = 4, .topk_group = 0}) ==
        "moeroute::top_k: topk_group is 0, expected 1 to 4");
  CHECK(refusal({.k = 1, .groups = 4, .topk_group = 4, .group_fill = 0.0f}) == "accepted");
  CHECK(refusal({.k = 1, .groups = 4, .topk_group = 4, .group_fill = test::infinity}) ==
        "moeroute::top_k: group_fill is inf, expected -inf or 0");
  // Rows alone: up to so many experts, of up to so many groups, by one or two of each.
  CHECK(top_k{.k = simd::max_row_k}.takes_rows());
  CHECK_FALSE(top_k{.k = simd::max_row_k + 1}.takes_rows());
  CHECK(top_k{.k = 2, .groups = 16, .topk_group = 2}.takes_rows());
  CHECK_FALSE(top_k{.k = 2, .groups = 17, .topk_group = 2}.takes_rows());
  for (const group_score by : {group_score::top_sum, group_score::sum})
    CHECK_FALSE(top_k{.k = 2, .groups = 4, .topk_group = 2, .group_score = by}.takes_rows());
  CHECK_FALSE(top_k{
      .k = 2, .groups = 4, .topk_group = 2, .group_score = group_score::max, .group_fill = 0.0f}
                  .takes_rows());
}

TEST_CASE("rows in 16 bits are chosen from as their floats are, where the program knows k") {
  const top_k_of<8> rule;
  for (const index_t experts : {9, 33, 257})
    for (const int tokens : {1, 7, 16}) {
      std::vector<float> rows = test::make_logits(test::shape::quantised, 5, tokens, experts);
      std::vector<bfloat16> narrow;
      for (float& x : rows) narrow.push_back(bfloat16(x = test::bf16_cut(x)));
      struct memory {
        top_k_of<8>::buffers own;
        float* wide;
      };
      workspace ws;
      const memory m = ws.carve([&](scratch& tape) {
        return memory{rule.carve(tape, experts), tape.take<float>(simd::widened_block(experts))};
      });
      const side_inputs side;
      std::vector<expert_id> id(8 * block_rows), got;
      std::vector<float> value(8 * block_rows);
      choice_block c{8, id.data(), value.data()};
      rule.select(
          narrow_block<bfloat16>{{narrow.data(), experts, tokens, experts, 0, &side}, m.wide}, c,
          m.own);
      for (std::size_t i = 0; i < static_cast<std::size_t>(tokens); ++i)
        for (std::size_t r = 0; r < 8; ++r) got.push_back(id[r * block_rows + i]);
      INFO("E=" << experts << " T=" << tokens);
      CHECK(got == chosen(rule, rows, tokens, experts));
    }
}

TEST_CASE("the rules around a selection are plain loops around it, with every option at once") {
  test::random rng(113);
  for (index_t round = 0; round < 250; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t groups = 1 + rng.below(6), size = 1 + rng.below(12), experts = groups * size;
    const index_t tokens = 1 + rng.below(block_rows), first = rng.below(20);
    top_k best{.groups = groups, .topk_group = 1 + rng.below(groups)};
    best.k = 1 + rng.below(best.topk_group * size);
    best.group_score = static_cast<group_score>(rng.below(4));
    if (coin()) best.group_fill = 0.0f;
    best.lost_weight = static_cast<lost_weight>(rng.below(3));
    const auto seed = rng.bits() % 1000;
    auto rows = test::make_logits(coin() ? test::shape::quantised : test::shape::masked, seed,
                                  tokens, experts);
    std::vector<float> bias[2];
    std::vector<std::uint8_t> modality;
    for (index_t t = 0; t < first + tokens; ++t)
      modality.push_back(static_cast<std::uint8_t>(rng.below(3)));
    // In eighths: no sum rounds.
    for (float& x : rows) x = x > -test::infinity ? std::floor(8.0f * x) / 8.0f : x;
    for (index_t e = 0; e < 2 * experts; ++e)
      bias[e % 2].push_back(static_cast<float>(rng.below(17)) / 8.0f - 1.0f);
    const side_inputs side{.modality = modality};
    const top_of_each_group fair{groups * (1 + rng.below(size)), groups};
    const ordered_ties<> ties{best, coin() ? tie_order::higher_id : tie_order::lower_id};
    class_bias<ordered_ties<>> biased{ties};
    const bool moves = coin();
    if (moves) biased.of[0] = selection_bias(bias[0]), biased.of[1] = selection_bias(bias[1]);
    fair.check(experts);
    biased.check(experts);
    std::vector<bool> lost[2], lost_of_ties, lost_of_class;
    const auto in_order = [&](std::vector<float> row, std::vector<bool>& gone) {
      const bool turns = ties.order == tie_order::higher_id;
      if (turns) std::reverse(row.begin(), row.end());
      std::vector<expert_id> ids = grouped(best, row);
      std::vector<bool> here = lost_by_hand(best, row);
      if (turns) std::reverse(here.begin(), here.end());
      gone.insert(gone.end(), here.begin(), here.end());
      for (expert_id& e : ids)
        if (turns && e != no_expert) e = static_cast<expert_id>(experts - 1) - e;
      return ids;
    };
    std::vector<expert_id> of_each, of_ties, of_class;
    const auto add = [](std::vector<expert_id>& to, const std::vector<expert_id>& more) {
      to.insert(to.end(), more.begin(), more.end());
    };
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<float> row(rows.begin() + t * experts, rows.begin() + (t + 1) * experts);
      for (index_t g = 0; g < groups; ++g)
        for (const expert_id e : oracle::top_k(row.data() + g * size, size, fair.k / groups))
          of_each.push_back(e == no_expert ? e : e + static_cast<expert_id>(g * size));
      add(of_ties, in_order(row, lost[0]));
      const auto& own = bias[modality[static_cast<std::size_t>(first + t)] != 0];
      for (std::size_t e = 0; moves && e < row.size(); ++e) row[e] += own[e];
      add(of_class, in_order(row, lost[1]));
    }
    INFO("round " << round << " groups " << groups << " of " << size << " k " << best.k << " T "
                  << tokens << " fair k " << fair.k);
    const int n = static_cast<int>(tokens);
    CHECK(chosen(fair, rows, n, experts) == of_each);
    const bool masks = groups > 1;
    CHECK(chosen(ties, rows, n, experts, {}, 0, masks ? &lost_of_ties : nullptr) == of_ties);
    CHECK(chosen(biased, rows, n, experts, side, first, masks ? &lost_of_class : nullptr) ==
          of_class);
    if (masks) CHECK((lost_of_ties == lost[0] && lost_of_class == lost[1]));
    CHECK(ties.weighs_lost_with_0() == best.weighs_lost_with_0());
    CHECK(biased.weighs_lost_with_0() == best.weighs_lost_with_0());
    CHECK(biased.reads_modality() == moves);
    CHECK(biased.masks_experts() == (moves || ties.masks_experts()));
    CHECK(ties.masks_experts() == (ties.order == tie_order::higher_id || best.masks_experts()));
  }
  CHECK((top_of_each_group{}.k == 8 && top_of_each_group{}.groups == 8 &&
         ordered_ties<>{}.order == tie_order::higher_id && !class_bias<>{}.active()));
  const std::vector<float> eight(8), nine(9);
  const auto refused = [](const selection_bias& one, const selection_bias& two) {
    return test::refusal([&] { class_bias<>{{.k = 2}, {one, two}}.check(8); });
  };
  const selection_bias fits(eight), wide(nine), none;
  CHECK(refused(fits, fits) == "accepted");
  CHECK(refused(none, none) == "accepted");
  CHECK(refused(wide, fits) == "moeroute::class_bias: first bias.size() is 9, expected 8");
  CHECK(refused(fits, wide) == "moeroute::class_bias: second bias.size() is 9, expected 8");
  CHECK(refused(none, fits) == "moeroute::class_bias: first bias.size() is 0, expected 8");
  CHECK(refused(fits, none) == "moeroute::class_bias: second bias.size() is 0, expected 8");
}
