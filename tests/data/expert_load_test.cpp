#include <moeroute/data/expert_load.hpp>

#include <catch2/catch_test_macros.hpp>
#include <vector>

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
