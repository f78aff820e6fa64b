#include <moeroute/data/dispatch_plan.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <string>
#include <vector>

#include <moeroute/data/exchange_plan.hpp>
#include <moeroute/data/expert_lists.hpp>
#include <moeroute/data/soft_plan.hpp>

#include "support/allocations.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

TEST_CASE("a plan nobody made has no slots") {
  const dispatch_plan p;
  CHECK((p.slots() == 0 && p.unrouted() == 0 && p.experts() == 0));
  CHECK((p.tokens() == 0 && p.k() == 0 && p.choices() == 0 && !p.ragged()));
  CHECK((p.padding() == 0 && p.dropped() == 0 && p.elsewhere() == 0));
  CHECK((p.token_of_slot().empty() && p.slot_of_choice().empty()));
  const expert_lists lists;
  CHECK((lists.tokens == 0 && lists.experts == 0 && lists.capacity == 0));
}

TEST_CASE("sizes follow the offsets") {
  dispatch_plan p;
  p.reset(3, 2, 2);
  const auto parts = p.writable();
  parts.offsets[0] = 0;
  parts.offsets[1] = 1;
  parts.offsets[2] = 4;
  CHECK((p.slots() == 4 && p.unrouted() == 2));
  CHECK((p.load(0) == 1 && p.load(1) == 3));
  CHECK(p.token_of_slot().size() == 4);
  CHECK(p.slot_of_choice().size() == 6);
  CHECK(p.offsets().size() == 3);
}

TEST_CASE("a warm plan never allocates") {
  dispatch_plan p;
  p.reset(64, 256, 8);
  CHECK(test::allocations_during([&] {
          p.reset(64, 256, 8);
          p.reset(1, 16, 4);
          p.reset(0, 256, 8);
        }) == 0);
}

TEST_CASE("plans for which there is no room are empty, and are plans again afterwards") {
  dispatch_plan p;
  p.reset(3, 2, 2);
  p.writable().offsets[2] = 6;
  const std::string beyond = " values of 4 bytes is asked for, more than any machine has";
  CHECK(test::refusal([&] { p.reset(3, index_t{1} << 60, 2); }) ==
        "moeroute::buffer: room for 1152921504606846977" + beyond);
  CHECK((p.tokens() == 0 && p.experts() == 0 && p.choices() == 0));
  CHECK((p.slots() == 0 && p.slot_of_choice().empty() && p.token_of_slot().empty()));
  p.reset(3, 2, 2);
  CHECK((p.tokens() == 3 && p.experts() == 2 && p.k() == 2 && p.choices() == 6));

  soft_plan soft;
  soft.reset(4, 6, 2);
  constexpr index_t most = 0x7fffffff;
  CHECK(test::refusal([&] { soft.reset(most, most, 1); }) ==
        "moeroute::buffer: room for 4611686014132420609" + beyond);
  CHECK((soft.tokens() == 0 && soft.slots() == 0 && soft.experts() == 0));
  CHECK((soft.dispatch().rows == 0 && soft.combine().rows == 0));
  soft.reset(4, 6, 2);
  CHECK((soft.tokens() == 4 && soft.slots() == 6 && soft.experts() == 3));
}

TEST_CASE("soft plans of no sizes are refused by name, and a second one is as a first one") {
  soft_plan p;
  CHECK((p.tokens() == 0 && p.slots() == 0 && p.slots_per_expert() == 1));
  constexpr index_t beyond = index_t{1} << 31;
  const test::refusals refused{
      {[&] { p.reset(-1, 4, 2); }, "soft_plan: tokens is -1, expected 0 to 2147483647"},
      {[&] { p.reset(beyond, 4, 2); }, "soft_plan: tokens is 2147483648, expected 0 to 2147483647"},
      {[&] { p.reset(3, 0, 1); }, "soft_plan: slots is 0, expected 1 to 2147483647"},
      {[&] { p.reset(3, beyond, 1); }, "soft_plan: slots is 2147483648, expected 1 to 2147483647"},
      {[&] { p.reset(3, 4, 0); }, "soft_plan: slots_per_expert is 0, expected 1 to 4"},
      {[&] { p.reset(3, 4, 5); }, "soft_plan: slots_per_expert is 5, expected 1 to 4"},
      {[&] { p.reset(3, 4, 3); }, "soft_plan: slots % slots_per_expert is 1, expected 0"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(p.experts() == 0);
  p.reset(5, 6, 3);
  for (const matrix_view<float> all : {p.dispatch(), p.combine()})
    std::fill_n(all.data, 5 * 6, all.rows == 6 ? 1.0f : 2.0f);
  CHECK((p.dispatch()(5, 4) == 1.0f && p.combine()(4, 5) == 2.0f));
  p.reset(0, 4, 4);
  CHECK((p.tokens() == 0 && p.slots() == 4 && p.slots_per_expert() == 4 && p.experts() == 1));
  CHECK((p.dispatch().rows == 4 && p.dispatch().cols == 0));
  CHECK((p.combine().rows == 0 && p.combine().cols == 4));
  p.reset(2, 1, 1);
  CHECK((p.slots() == 1 && p.experts() == 1));
}

TEST_CASE("a plan of a shape knows nothing of the padding and raggedness of the one before") {
  dispatch_plan p;
  p.reset(3, 2, 2, 5, 8);
  std::int32_t* const first = p.first_to_fill();
  first[0] = 0;
  first[1] = 2;
  first[2] = 2;
  first[3] = 5;
  std::int32_t* const load = p.loads_to_fill();
  load[0] = 2;
  load[1] = 2;
  dispatch_plan::parts parts = p.writable();
  parts.offsets[0] = 0;
  parts.offsets[1] = 4;
  parts.offsets[2] = 8;
  p.set_counts(1, 0, 4);
  CHECK((p.ragged() && p.count(0) == 2 && p.count(1) == 0 && p.first(2) == 2));
  CHECK((p.load(0) == 2 && p.rows(0) == 4 && p.load(1) == 2 && p.rows(1) == 4));
  CHECK((p.kept() == 4 && p.padding() == 4 && p.dropped() == 1 && p.unrouted() == 0));
  // As many tokens, experts and choices, in the fixed form; then fewer choices than room.
  for (int again = 0; again < 2; ++again) {
    p.reset(3, 2, 2);
    parts = p.writable();
    parts.offsets[0] = 0;
    parts.offsets[1] = 1;
    parts.offsets[2] = 4;
    CHECK((!p.ragged() && p.choices() == 6 && p.first(2) == 4 && p.count(1) == 2));
    CHECK((p.load(0) == 1 && p.load(1) == 3 && p.padding() == 0 && p.dropped() == 0));
    CHECK((p.kept() == 4 && p.elsewhere() == 0 && p.unrouted() == 2));
    p.set_counts(1, 1, 0);
    CHECK((p.dropped() == 1 && p.elsewhere() == 1 && p.unrouted() == 0));
  }
  // Of the very same shape, and room.
  for (const bool ragged : {true, false}) {
    if (ragged)
      std::fill_n(p.first_to_fill(), 4, 6);
    else
      std::fill_n(p.loads_to_fill(), 2, 9);
    p.reset(3, 2, 2);
    parts = p.writable();
    parts.offsets[0] = 0;
    parts.offsets[1] = 1;
    parts.offsets[2] = 4;
    CHECK((!p.ragged() && p.first(2) == 4 && p.load(0) == 1 && p.load(1) == 3));
  }
  p.set_choices(5);
  CHECK((p.choices() == 5 && p.slot_of_choice().size() == 5));
  p.reset(3, 2, 2);
  CHECK((p.choices() == 6 && p.slot_of_choice().size() == 6));
  // As many choices of more tokens or of fewer, at most so many each.
  struct shape {
    index_t tokens, k;
  };
  for (const auto [tokens, k] : {shape{3, 2}, shape{2, 3}, shape{2, 4}, shape{6, 4}}) {
    p.reset(tokens, 2, k, 6, 6);
    CHECK((p.tokens() == tokens && p.k() == k && p.choices() == 6));
  }
  CHECK(test::refusal([&] { p.reset(1, 2, 2, index_t{1} << 31, 1); }) ==
        "moeroute::plan: choices is 2147483648, expected 0 to 2147483647");
  CHECK(test::refusal([&] { p.reset(1, 2, 2, 2, index_t{1} << 31); }) ==
        "moeroute::plan: slots is 2147483648, expected 0 to 2147483647");
}

TEST_CASE("an exchange's rows and entries are counted rank by rank") {
  exchange_plan x;
  CHECK((x.ranks() == 0 && x.tokens() == 0 && x.rows() == 0 && x.entries() == 0));
  CHECK((x.row_token().empty() && x.entries_of_row().empty() && x.local_slot().empty()));
  // Token 0 to ranks 0 (twice) and 2, token 1 to rank 2, token 2 to nobody.
  const std::vector<std::int32_t> rows{0, 1, 1, 3}, entries{0, 2, 2, 4}, tokens{0, 0, 1, 9, 9},
      of_row{2, 1, 1, 9, 9}, slots{5, 6, 7, 8, 9};
  const exchange_plan::parts p = x.writable();
  p.outer.reset(3, 3, 2);
  std::copy(entries.begin(), entries.end(), p.outer.writable().offsets);
  const auto fill = [](auto& to, const std::vector<std::int32_t>& from) {
    to.resize(static_cast<index_t>(from.size()));
    std::copy(from.begin(), from.end(), to.data());
  };
  fill(p.row_offset, rows);
  fill(p.row_token, tokens);
  fill(p.row_entries, of_row);
  fill(p.local_slot, slots);
  p.rows = 3;
  CHECK((x.ranks() == 3 && x.tokens() == 3 && x.rows() == 3 && x.entries() == 4));
  for (std::size_t r = 0; r < 3; ++r) {
    CHECK(x.rows_to(static_cast<index_t>(r)) == rows[r + 1] - rows[r]);
    CHECK(x.entries_to(static_cast<index_t>(r)) == entries[r + 1] - entries[r]);
  }
  CHECK(
      (std::ranges::equal(x.row_offset(), rows) && std::ranges::equal(x.entry_offset(), entries)));
  CHECK(std::ranges::equal(x.row_token(), std::vector{0, 0, 1}));
  CHECK(std::ranges::equal(x.entries_of_row(), std::vector{2, 1, 1}));
  CHECK(std::ranges::equal(x.local_slot(), std::vector{5, 6, 7, 8}));
  CHECK(&x.outer() == &p.outer);
}
