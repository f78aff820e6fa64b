#include <moeroute/data/expert_load.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <set>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

namespace {

// Three tokens, four experts, k = 2: the second token lost its second choice, the third has one.
assignment small() {
  assignment a;
  a.reset(3, 4, 2);
  const expert_id ids[] = {2, 3, 2, 0, 1, no_expert};
  std::copy_n(ids, 6, a.ids().data());
  std::fill(a.weights().begin(), a.weights().end(), 0.5f);
  a.kept_to_fill()[3] = 0;
  return a;
}

std::vector<int> counted(const count_options& what) {
  std::vector<int> counts(4, -1);
  count_choices(small(), what, std::span(counts));
  return counts;
}

}  // namespace

TEST_CASE("missing picks never count; dropped ones count before the drop only") {
  CHECK(counted({}) == std::vector{1, 1, 2, 1});
  CHECK(counted({.drops = drop_stage::after_drop}) == std::vector{0, 1, 2, 1});
}

TEST_CASE("the first choice alone counts rank 0, which a dropped choice does not pass on") {
  CHECK(counted({.basis = count_basis::first_choice}) == std::vector{0, 1, 2, 0});
  assignment a = small();
  a.kept_to_fill()[0] = 0;
  std::vector<int> counts(4);
  count_choices(a, {.basis = count_basis::first_choice, .drops = drop_stage::after_drop},
                std::span(counts));
  CHECK(counts == std::vector{0, 1, 1, 0});
}

TEST_CASE("masked tokens do not count") {
  const std::uint8_t mask[] = {0, 1, 1};
  CHECK(counted({.mask = mask}) == std::vector{1, 1, 1, 0});
}

TEST_CASE("counts of sequences add up to the counts of the batch, the last sequence shorter") {
  std::vector<double> counts(8);
  count_choices_by_sequence(small(), {}, 2, matrix_view<double>(counts.data(), 2, 4));
  CHECK(counts == std::vector<double>{1, 0, 2, 1, 0, 1, 0, 0});
}

TEST_CASE("a device counts a token once, however many of its experts the token chose") {
  std::vector<int> counts(2);
  count_device_tokens(small(), {}, std::span(counts));
  CHECK(counts == std::vector{2, 2});
}

TEST_CASE("the ragged form is counted by its own lengths") {
  assignment a;
  a.reset_ragged(3, 4, 2);
  const auto fill = a.to_fill();
  const expert_id ids[] = {3, 1, 1};
  std::copy_n(ids, 3, fill.ids);
  const std::int32_t offsets[] = {0, 2, 2, 3};
  std::copy_n(offsets, 4, fill.offsets);
  a.close();
  std::vector<int> counts(4);
  count_choices(a, {}, std::span(counts));
  CHECK(counts == std::vector{0, 2, 0, 1});
  count_choices(a, {.basis = count_basis::first_choice}, std::span(counts));
  CHECK(counts == std::vector{0, 1, 0, 1});
}

TEST_CASE("counts of another size are refused by name") {
  std::vector<int> three(3);
  const std::uint8_t mask[] = {1};
  CHECK(test::refusal([&] { count_choices(small(), {}, std::span(three)); }) ==
        "moeroute::count_choices: counts.size is 3, expected 4");
  CHECK(test::refusal([&] { counted({.mask = mask}); }) ==
        "moeroute::count_choices: mask.size is 1, expected 3");
  CHECK(test::refusal([&] { count_device_tokens(small(), {}, std::span(three)); }) ==
        "moeroute::count_device_tokens: experts % devices is 1, expected 0");
}

TEST_CASE("every way to count is that of plain loops: masks, drops, first choices, both forms") {
  test::random rng(3);
  constexpr index_t tokens = 23, experts = 12;
  for (const bool ragged : {false, true})
    for (int bits = 0; bits < 8; ++bits) {
      assignment a = ragged ? test::ragged_choices(rng, tokens, experts, 4)
                            : test::fixed_choices(rng, tokens, experts, 4, 5);
      test::drop_some(rng, a, 3);
      std::vector<std::uint8_t> mask;
      for (index_t t = 0; t < tokens; ++t)
        mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      count_options what;
      if ((bits & 1) != 0) what.basis = count_basis::first_choice;
      if ((bits & 2) != 0) what.drops = drop_stage::after_drop;
      if ((bits & 4) != 0) what.mask = mask;
      const auto counts = [&](index_t t, std::size_t r) {
        return ((bits & 1) == 0 || r == 0) && a.ids(t)[r] >= 0 &&
               ((bits & 2) == 0 || a.kept(a.first(t) + static_cast<index_t>(r))) &&
               ((bits & 4) == 0 || mask[static_cast<std::size_t>(t)] != 0);
      };
      for (const index_t length : {1, 7, 23, 100}) {
        const index_t sequences = (tokens + length - 1) / length, stride = experts + 3;
        std::vector<int> made(static_cast<std::size_t>(sequences * stride), -5), slow = made;
        for (index_t s = 0; s < sequences; ++s) std::fill_n(slow.begin() + s * stride, experts, 0);
        for (index_t t = 0; t < tokens; ++t)
          for (std::size_t r = 0; r < a.ids(t).size(); ++r)
            if (counts(t, r)) ++slow[static_cast<std::size_t>(t / length * stride + a.ids(t)[r])];
        count_choices_by_sequence(a, what, length,
                                  matrix_view<int>(made.data(), sequences, experts, stride));
        CHECK(made == slow);
      }
      for (const index_t devices : {1, 3, 12}) {
        std::vector<int> made(static_cast<std::size_t>(devices), -5), slow(made.size(), 0);
        for (index_t t = 0; t < tokens; ++t) {
          std::set<index_t> on;
          for (std::size_t r = 0; r < a.ids(t).size(); ++r)
            if (counts(t, r)) on.insert(a.ids(t)[r] / (experts / devices));
          for (const index_t device : on) ++slow[static_cast<std::size_t>(device)];
        }
        count_device_tokens(a, what, std::span(made));
        CHECK(made == slow);
      }
    }
}

TEST_CASE("counts by sequence and by device refuse by name what does not fit") {
  std::vector<int> memory(40), none;
  const std::uint8_t mask[] = {1};
  assignment wild = small();
  wild.ids()[5] = 4;
  const auto by_sequence = [&](index_t length, index_t rows, index_t cols, index_t stride,
                               const count_options& what = {}) {
    return [&, length, rows, cols, stride, what] {
      count_choices_by_sequence(small(), what, length,
                                matrix_view<int>(memory.data(), rows, cols, stride));
    };
  };
  const std::string where = "count_choices_by_sequence: ";
  const test::refusals refused{
      {by_sequence(0, 2, 4, 4), where + "length is 0, expected 1 to 1099511627776"},
      {by_sequence((index_t{1} << 40) + 1, 1, 4, 4),
       where + "length is 1099511627777, expected 1 to 1099511627776"},
      {by_sequence(2, 1, 4, 4), where + "counts.rows is 1, expected 2"},
      {by_sequence(2, 2, 5, 5), where + "counts.cols is 5, expected 4"},
      {by_sequence(2, 2, 4, 3), where + "counts.stride is 3, expected at least 4"},
      {by_sequence(2, 2, 4, 4, {.mask = mask}), where + "mask.size is 1, expected 3"},
      {[&] { count_device_tokens(small(), {}, std::span(none)); },
       "count_device_tokens: counts.size is 0, expected 1 to 4"},
      {[&] { count_device_tokens(small(), {}, std::span(memory).first(5)); },
       "count_device_tokens: counts.size is 5, expected 1 to 4"},
      {[&] { count_device_tokens(small(), {.mask = mask}, std::span(memory).first(2)); },
       "count_device_tokens: mask.size is 1, expected 3"},
      {[&] { count_device_tokens(wild, {}, std::span(memory).first(2)); },
       "count_device_tokens: the id of choice 5 is 4, expected -1 to 3"},
      {[&] { count_choices_by_sequence(wild, {}, 3, matrix_view<int>(memory.data(), 1, 4)); },
       where + "the id of choice 5 is 4, expected -1 to 3"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(test::refusal(by_sequence(index_t{1} << 40, 1, 4, 4)) == "accepted");
}
