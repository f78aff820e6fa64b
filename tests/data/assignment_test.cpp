#include <moeroute/data/assignment.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "support/allocations.hpp"
#include "support/counting_new.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;
using test::allocations_during;
using test::refusal;

TEST_CASE("an assignment has k choices per token, token by token") {
  assignment a;
  a.reset(3, 8, 2);
  CHECK((a.tokens() == 3 && a.experts() == 8 && a.k() == 2 && a.choices() == 6));
  CHECK((a.ids().size() == 6 && a.weights().size() == 6));
  for (int i = 0; i < 6; ++i) a.ids()[static_cast<std::size_t>(i)] = i;
  const assignment& read = a;
  CHECK((read.ids(1).size() == 2 && read.ids(1)[0] == 2 && read.ids(2)[1] == 5));
  CHECK(read.weights(2).data() == read.weights().data() + 4);
}

TEST_CASE("an assignment over the caller's memory writes there, and its copies do not") {
  expert_id ids[6] = {};
  float weights[6] = {};
  assignment a = assignment::over(ids, weights);
  CHECK((a.room() == 0 && a.ids().empty()));
  a.reset(3, 8, 2);
  const assignment& itself = a;
  a = itself;
  a.ids()[5] = 7;
  a.weights()[0] = 0.5f;
  CHECK((ids[5] == 7 && weights[0] == 0.5f && a.room() == 6));
  assignment copy = a;
  copy.ids()[5] = 1;
  CHECK((ids[5] == 7 && copy.ids()[5] == 1 && copy.weights()[0] == 0.5f));
  copy.reset(4, 8, 2);  // its memory grows
  const assignment moved = std::move(a);
  CHECK((moved.ids().data() == ids && moved.choices() == 6 && a.room() == 0));
  assignment other = assignment::over(ids, weights);
  CHECK(refusal([&] { other.reset(4, 8, 2); }) ==
        "moeroute::assignment: ids.size() is 6, expected room for 8");
  CHECK(allocations_during([&] { other.reset(2, 8, 3); }) == 0);
  other = copy;
  other.ids()[0] = 3;
  CHECK((ids[0] == 0 && other.tokens() == 4));
}

TEST_CASE("a new decision has no drops of the one before, whatever its shape") {
  assignment a;
  CHECK((a.tokens() == 0 && a.experts() == 0 && a.k() == 0 && a.choices() == 0 && a.room() == 0));
  CHECK(!(a.ragged() || a.drops()));
  for (const index_t tokens : {3, 3, 2, 3}) {  // the same shape again, a smaller one, a larger one
    a.reset(tokens, 8, 2);
    CHECK_FALSE(a.drops());
    CHECK((a.kept().empty() && a.kept(1)));
    a.kept_to_fill()[1] = 0;
    CHECK((a.drops() && !a.kept(1) && a.kept(0) && a.kept()[0] == 1));
  }
  for (int turn = 0; turn < 2; ++turn) {
    a.reset_ragged(3, 8, 2);
    CHECK_FALSE(a.drops());
    std::fill_n(a.to_fill().offsets, 4, 0);
    a.to_fill().offsets[3] = 2;
    a.close();
    a.kept_to_fill()[1] = 0;
  }
  a.reset(3, 8, 2);
  CHECK_FALSE(a.drops());
}

TEST_CASE("a warm assignment never allocates") {
  assignment a;
  a.reset(64, 256, 8);
  CHECK(allocations_during([&] {
          a.reset(64, 256, 8);
          a.reset(1, 256, 8);
          a.reset(0, 1, 1);
          a.reset(512, 2, 1);
        }) == 0);
}

TEST_CASE("an assignment refuses sizes outside the promises, and takes their ends") {
  assignment a;
  const auto reset = [&](index_t t, index_t e, index_t k) {
    return refusal([&] { a.reset(t, e, k); });
  };
  CHECK(reset(-1, 8, 2) == "moeroute::assignment: tokens is -1, expected 0 to 2147483647");
  CHECK(reset(-(index_t{1} << 62), 8, 4) ==
        "moeroute::assignment: tokens is -4611686018427387904, expected 0 to 2147483647");
  CHECK(reset(1, 0, 1) == "moeroute::assignment: experts is 0, expected 1 to 1048576");
  CHECK(reset(1, 1048577, 1) == "moeroute::assignment: experts is 1048577, expected 1 to 1048576");
  CHECK(reset(1, 8, 0) == "moeroute::assignment: k is 0, expected 1 to 8");
  CHECK(reset(1, 8, 9) == "moeroute::assignment: k is 9, expected 1 to 8");
  CHECK(reset(0x40000000, 8, 2) ==
        "moeroute::assignment: tokens * k is 2147483648, expected 0 to 2147483647");
  CHECK(reset(1, 1048576, 1) == "accepted");
  CHECK(reset(0, 1, 1) == "accepted");
}

TEST_CASE("a refused reset leaves the assignment as it was") {
  assignment a;
  a.reset(3, 8, 2);
  CHECK_THROWS_AS(a.reset(1, 8, 9), error);
  CHECK((a.tokens() == 3 && a.k() == 2 && a.ids().size() == 6));
}

TEST_CASE(
    "an assignment of any history is that of its last reset, and of no tokens without memory") {
  test::random rng(21);
  std::vector<expert_id> ids(16);
  std::vector<float> weights(16);
  constexpr index_t own_memory = 1000;
  index_t room[2] = {own_memory, own_memory};  // of ids and of weights
  index_t tokens = 0, experts = 0, k = 0;
  std::vector<std::int32_t> first{0};
  bool ragged = false, drops = false;
  assignment a;
  for (int step = 0; step < 3000; ++step) {
    switch (rng.below(10)) {
      case 0:  // memory of the caller's
        for (index_t& n : room) n = rng.below(16);
        a = assignment::over(std::span(ids).first(static_cast<std::size_t>(room[0])),
                             std::span(weights).first(static_cast<std::size_t>(room[1])));
        tokens = experts = k = 0, first = {0}, ragged = drops = false;
        break;
      case 1: {  // moved away and back
        assignment other = std::move(a);
        a = std::move(other);
        break;
      }
      case 2: {  // a copy has memory of its own
        const assignment copy(a);
        a = copy;
        room[0] = room[1] = own_memory;
        break;
      }
      default: break;
    }
    const bool again = rng.below(3) == 0, negative = rng.below(20) == 0;
    const index_t t = again ? tokens : negative ? -1 : rng.below(5);
    const index_t e = again || rng.below(3) > 0 ? experts : rng.below(4);
    const index_t m = again ? k : rng.below(4);
    const bool fixed = rng.below(3) > 0, gone = rng.below(8) == 0;
    INFO("step " << step << ": from " << tokens << ", " << experts << ", " << k << " to " << t
                 << ", " << e << ", " << m << (fixed ? "" : ", ragged"));
    if (gone) {  // who was moved away is as good as new
      const assignment other = std::move(a);
      room[0] = room[1] = own_memory;
    }
    const std::string said =
        test::refusal([&] { fixed ? a.reset(t, e, m) : a.reset_ragged(t, e, m); });
    const bool shape = t >= 0 && e > 0 && m > 0 && m <= e;
    const auto expected = [&]() -> std::string {
      if (t < 0) return "tokens is -1, expected 0 to 2147483647";
      if (e == 0) return "experts is 0, expected 1 to 1048576";
      if (!shape) return "k is " + std::to_string(m) + ", expected 1 to " + std::to_string(e);
      for (const int i : {0, 1})
        if (t * m > room[i])
          return std::string(i == 0 ? "ids" : "weights") + ".size() is " + std::to_string(room[i]) +
                 ", expected room for " + std::to_string(t * m);
      return {};
    }();
    REQUIRE(said == (expected.empty() ? "accepted" : "moeroute::assignment: " + expected));
    if (said == "accepted") {
      tokens = t, experts = e, k = m, ragged = !fixed, drops = false;
      first.assign(1, 0);
      const bool full = fixed || rng.below(3) == 0;
      for (index_t i = 0; i < t; ++i)
        first.push_back(first.back() + static_cast<std::int32_t>(full ? m : rng.below(m + 1)));
      if (ragged) {
        std::copy(first.begin(), first.end(), a.to_fill().offsets);
        a.close();
      }
      REQUIRE(a.room() == t * m);
      REQUIRE_FALSE(a.drops());
      std::iota(a.ids().begin(), a.ids().end(), 0);
      std::iota(a.weights().begin(), a.weights().end(), 1.0f);
      if (rng.below(3) == 0) {
        std::ranges::fill(a.kept_to_change(), std::uint8_t{0});
        drops = true;
      }
    } else if (shape || gone) {  // of no tokens
      tokens = 0, first = {0}, ragged = drops = false;
      if (gone && !shape) a = {}, experts = k = 0;
    }
    REQUIRE((a.tokens() == tokens && a.choices() == first.back() && a.ragged() == ragged));
    if (tokens > 0) REQUIRE((a.experts() == experts && a.k() == k));
    experts = a.experts(), k = a.k();
    std::vector<expert_id> in_order(static_cast<std::size_t>(first.back()));
    std::iota(in_order.begin(), in_order.end(), 0);
    REQUIRE(std::ranges::equal(a.ids(), in_order));
    REQUIRE(std::ranges::equal(a.weights(), in_order, {}, {},
                               [](expert_id i) { return static_cast<float>(i + 1); }));
    REQUIRE(std::ranges::equal(a.offsets(), ragged ? first : std::vector<std::int32_t>{}));
    int wrong = 0;
    for (std::size_t i = 0; i + 1 < first.size(); ++i) {
      const auto token = static_cast<index_t>(i), begin = index_t{first[i]},
                 n = first[i + 1] - begin;
      const auto of = a.ids(token);
      const auto weighs = a.weights(token);
      wrong += a.first(token) != begin || a.count(token) != n;
      wrong += of.data() != a.ids().data() + begin || std::ssize(of) != n;
      wrong += weighs.data() != a.weights().data() + begin || std::ssize(weighs) != n;
    }
    REQUIRE(wrong == 0);
    REQUIRE(a.drops() == drops);
    REQUIRE(a.kept().size() == (drops ? in_order.size() : 0));
  }
}

TEST_CASE("sizes whose product is no number of 64 bits are refused by their own name") {
  assignment a;
  dispatch_plan p;
  const std::string tokens =
      "moeroute::assignment: tokens is 4611686018427387904, expected 0 to 2147483647";
  CHECK(refusal([&] { a.reset(index_t{1} << 62, 1024, 4); }) == tokens);
  CHECK(refusal([&] { a.reset_ragged(index_t{1} << 62, 1024, 4); }) == tokens);
  CHECK(refusal([&] { p.reset(index_t{1} << 62, 1024, 4); }) ==
        "moeroute::plan: choices is 9223372036854775807, expected 0 to 2147483647");
  CHECK(refusal([&] { a.reset(index_t{1} << 31, 8, 1); }) ==
        "moeroute::assignment: tokens is 2147483648, expected 0 to 2147483647");
  for (const index_t choices : {index_t{-1}, index_t{1} << 31})
    CHECK(refusal([&] { a.reset_ragged(3, 8, 2, choices); }) ==
          "moeroute::assignment: choices is " + std::to_string(choices) +
              ", expected 0 to 2147483647");
  a.reset_ragged(3, 8, 2, 5);
  CHECK((a.room() == 5 && a.k() == 2 && a.tokens() == 3 && a.ragged()));
}
