#include <moeroute/stage/plan_layouts.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
#include <moeroute/stage/plan.hpp>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace {

using ints = std::vector<std::int32_t>;

template <class F>
void for_each_layout(F&& f) {
  test::random rng(31);
  for (const index_t tokens : {0, 1, 7, 50})
    for (const index_t experts : {1, 4, 12})
      for (const index_t k : {1, 3}) {
        if (k > experts) continue;
        assignment fixed = test::fixed_choices(rng, tokens, experts, k, 6);
        assignment ragged = test::ragged_choices(rng, tokens, experts, k);
        f(fixed);
        f(ragged);
        test::drop_some(rng, fixed, 3);
        f(fixed);
      }
}

// The kept choices of one expert, ascending.
ints choices_of(const assignment& a, expert_id e) {
  ints list;
  for (index_t c = 0; c < a.choices(); ++c)
    if (a.ids()[static_cast<std::size_t>(c)] == e && a.kept(c))
      list.push_back(static_cast<std::int32_t>(c));
  return list;
}

}  // namespace

TEST_CASE("aligned blocks list each expert's choices in order, padded with the sentinel") {
  dispatch_plan p;
  for_each_layout([&](const assignment& a) {
    for (const index_t block : {1, 2, 8}) {
      ints sorted, experts, starts;
      std::int32_t unpadded = 0;
      for (expert_id e = 0; e < a.experts(); ++e) {
        ints own = choices_of(a, e);
        const auto load = static_cast<std::int32_t>(own.size());
        while (static_cast<index_t>(own.size()) % block != 0)
          own.push_back(static_cast<std::int32_t>(a.choices()));
        for (std::size_t b = 0; b < own.size(); b += static_cast<std::size_t>(block)) {
          experts.push_back(e);
          starts.push_back(unpadded + static_cast<std::int32_t>(b));
        }
        sorted.insert(sorted.end(), own.begin(), own.end());
        unpadded += load;
      }
      const std::size_t used = sorted.size(), blocks = experts.size();
      sorted.resize(used + 5, static_cast<std::int32_t>(a.choices()));
      experts.resize(blocks + 3, 0);

      plan(a, p, {.block = block});
      ints s(used + 5, 99), e(blocks + 3, 99), at(blocks);
      const index_t n = export_aligned_blocks(
          p, block,
          {.sorted_choices = s, .block_experts = e, .block_starts = at, .tail_expert = 0});
      CHECK(n == static_cast<index_t>(used));
      CHECK(s == sorted);
      CHECK(e == experts);
      CHECK(at == starts);
    }
  });
}

TEST_CASE("a block of nothing but padding starts where its expert's tokens end") {
  assignment a;
  a.reset(3, 2, 1);
  std::ranges::copy(ints{1, 1, 0}, a.ids().begin());
  dispatch_plan p;
  plan(a, p, {.block = 2, .capacity = 6});
  ints sorted(12), experts(6), starts(6);
  export_aligned_blocks(
      p, 2, {.sorted_choices = sorted, .block_experts = experts, .block_starts = starts});
  CHECK(sorted == ints{2, 3, 3, 3, 3, 3, 0, 1, 3, 3, 3, 3});
  CHECK(experts == ints{0, 0, 0, 1, 1, 1});
  CHECK(starts == ints{0, 1, 1, 1, 3, 3});
}

TEST_CASE("the row-id map lists a token's slots from the last to the first") {
  dispatch_plan p;
  for_each_layout([&](const assignment& a) {
    for (const index_t block : {1, 4}) {
      plan(a, p, {.block = block});
      const index_t experts = a.experts(), width = 2 * experts + 1;
      ints expected(static_cast<std::size_t>(a.tokens() * width), -1);
      for (index_t t = 0; t < a.tokens(); ++t) {
        std::vector<std::pair<std::int32_t, std::int32_t>> rows;
        for (index_t c = a.first(t); c < a.first(t + 1); ++c)
          if (p.slot_of_choice()[static_cast<std::size_t>(c)] != no_slot)
            rows.emplace_back(p.slot_of_choice()[static_cast<std::size_t>(c)],
                              a.ids()[static_cast<std::size_t>(c)]);
        std::sort(rows.begin(), rows.end(), std::greater<>());
        for (std::size_t i = 0; i < rows.size(); ++i) {
          expected[static_cast<std::size_t>(t * width) + i] = rows[i].first;
          expected[static_cast<std::size_t>(t * width + experts) + i] = rows[i].second;
        }
        expected[static_cast<std::size_t>(t * width + 2 * experts)] =
            static_cast<std::int32_t>(rows.size());
      }
      ints map(expected.size(), 99);
      export_row_id_map(p, map);
      CHECK(map == expected);
    }
  });
}

TEST_CASE("the row-id map of a worked example") {
  // The routing map 110 / 101 / 001 / 110 / 000 over three experts.
  assignment a;
  a.reset_ragged(5, 3, 2);
  const assignment::parts w = a.to_fill();
  std::ranges::copy(ints{0, 1, 0, 2, 2, 0, 1}, w.ids);
  std::ranges::copy(ints{0, 2, 4, 5, 7, 7}, w.offsets);
  a.close();
  dispatch_plan p;
  plan(a, p);
  ints map(35);
  export_row_id_map(p, map);
  CHECK(map == ints{3,  0,  -1, 1,  0,  -1, 2,  //
                    5,  1,  -1, 2,  0,  -1, 2,  //
                    6,  -1, -1, 2,  -1, -1, 1,  //
                    4,  2,  -1, 1,  0,  -1, 2,  //
                    -1, -1, -1, -1, -1, -1, 0});
}

TEST_CASE("a token counts once per rank and once per node, and once per choice for experts") {
  for_each_layout([&](const assignment& a) {
    for (const index_t ranks : {1, 2, 4}) {
      if (a.experts() % ranks != 0) continue;
      for (const index_t per_node : {1, 2, 4}) {
        if (ranks % per_node != 0) continue;
        const index_t nodes = ranks / per_node, per_rank = a.experts() / ranks;
        ints expert(static_cast<std::size_t>(a.experts())), rank(static_cast<std::size_t>(ranks));
        ints node(static_cast<std::size_t>(nodes));
        std::vector<std::uint8_t> in_rank(static_cast<std::size_t>(a.tokens() * ranks));
        ints expert2 = expert, rank2 = rank, node2 = node;
        std::vector<std::uint8_t> in_rank2 = in_rank;
        for (index_t t = 0; t < a.tokens(); ++t) {
          std::set<index_t> hit_ranks, hit_nodes;
          for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
            const expert_id e = a.ids()[static_cast<std::size_t>(c)];
            if (e < 0 || !a.kept(c)) continue;
            ++expert[static_cast<std::size_t>(e)];
            hit_ranks.insert(e / per_rank);
            hit_nodes.insert(e / per_rank / per_node);
          }
          for (const index_t r : hit_ranks) {
            ++rank[static_cast<std::size_t>(r)];
            in_rank[static_cast<std::size_t>(t * ranks + r)] = 1;
          }
          for (const index_t n : hit_nodes) ++node[static_cast<std::size_t>(n)];
        }
        export_once_counts(a, {.tokens_per_expert = expert2,
                               .tokens_per_rank = rank2,
                               .token_in_rank = in_rank2,
                               .tokens_per_node = node2,
                               .ranks_per_node = per_node});
        CHECK(expert2 == expert);
        CHECK(rank2 == rank);
        CHECK(in_rank2 == in_rank);
        CHECK(node2 == node);
        const auto sum = [](const ints& v) { return std::accumulate(v.begin(), v.end(), 0); };
        CHECK(sum(expert2) >= sum(rank2));
        CHECK(sum(rank2) >= sum(node2));
      }
    }
  });
}

TEST_CASE("what an export refuses, it refuses by name") {
  test::random rng(32);
  const assignment a = test::fixed_choices(rng, 10, 4, 2);
  dispatch_plan p;
  plan(a, p);
  ints few(3), enough(100), four(4), three(3);
  std::vector<std::uint8_t> flags(40);
  CHECK(test::refusal([&] {
          export_aligned_blocks(p, 1, {.sorted_choices = few, .block_experts = enough});
        }) ==
        "moeroute::export_aligned_blocks: sorted_choices.size() is 3, expected 20 to "
        "4611686018427387904");
  CHECK(test::refusal([&] {
          export_aligned_blocks(p, 1, {.sorted_choices = enough, .block_experts = few});
        }) ==
        "moeroute::export_aligned_blocks: block_experts.size() is 3, expected 20 to "
        "4611686018427387904");
  CHECK(test::refusal([&] {
          export_aligned_blocks(p, 64, {.sorted_choices = enough, .block_experts = enough});
        }) == "moeroute::export_aligned_blocks: expert 0 has " + std::to_string(p.rows(0)) +
                  " slots, expected a multiple of 64: plan with plan_options{.block = 64}");
  CHECK(test::refusal([&] { export_row_id_map(p, enough); }) ==
        "moeroute::export_row_id_map: map.size() is 100, expected 90");
  CHECK(test::refusal([&] { export_once_counts(a, {four, three, flags}); }) ==
        "moeroute::export_once_counts: 4 experts on 3 ranks, expected a number of ranks that "
        "divides them");
  CHECK(test::refusal([&] { export_once_counts(a, {three, four, flags}); }) ==
        "moeroute::export_once_counts: tokens_per_expert.size() is 3, expected 4");
  CHECK(test::refusal([&] { export_once_counts(a, {four, four, flags, three, 3}); }) ==
        "moeroute::export_once_counts: 4 ranks on nodes of 3, expected a divisor of the ranks");
  // Exactly as large as needed is large enough.
  ints sorted(20), blocks(20), starts(20), short_starts(19), none, four2(4), two(2), seventeen(17);
  CHECK(export_aligned_blocks(p, 1, {sorted, blocks, starts}) == 20);
  const auto aligned = [&](index_t block, const aligned_blocks& out) {
    return [&p, block, out] { export_aligned_blocks(p, block, out); };
  };
  const auto once = [&](const once_counts& out) {
    return [&a, out] { export_once_counts(a, out); };
  };
  const test::refusals refused{
      {aligned(0, {sorted, blocks}), "export_aligned_blocks: block is 0, expected 1 to 2147483647"},
      {aligned(1, {sorted, blocks, short_starts}),
       "export_aligned_blocks: block_starts.size() is 19, expected 20 to 4611686018427387904"},
      {once({four, none, flags}),
       "export_once_counts: tokens_per_rank.size() is 0, expected 1 to 4"},
      {once({four, seventeen, flags}),
       "export_once_counts: tokens_per_rank.size() is 17, expected 1 to 4"},
      {once({four, two, flags}), "export_once_counts: token_in_rank.size() is 40, expected 20"},
      {once({four, four2, flags, four, 2}),
       "export_once_counts: tokens_per_node.size() is 4, expected 2"},
      {once({four, four2, flags, two, 0}),
       "export_once_counts: ranks_per_node is 0, expected 1 to 4"},
      {once({four, four2, flags, two, 8}),
       "export_once_counts: ranks_per_node is 8, expected 1 to 4"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK((once_counts{}.ranks_per_node == 8 && aligned_blocks{}.tail_expert == -1));
  CHECK(test::refusal(aligned(index_t{1} << 31, {sorted, blocks})) ==
        "moeroute::export_aligned_blocks: block is 2147483648, expected 1 to 2147483647");
  // Behind the last block every place says whose it is, and every slot has its choice.
  ints tail(23, 7), longer(25, 9);
  for (const std::int32_t behind : {-1, 0}) {
    CHECK(export_aligned_blocks(p, 1, {longer, tail, {}, behind}) == 20);
    CHECK(std::equal(blocks.begin(), blocks.end(), tail.begin()));
    CHECK(std::equal(sorted.begin(), sorted.end(), longer.begin()));
    for (std::size_t i = 20; i < 23; ++i) CHECK(tail[i] == behind);
    for (std::size_t i = 20; i < 25; ++i) CHECK(longer[i] == 20);
  }
}
