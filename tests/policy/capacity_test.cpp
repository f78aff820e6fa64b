#include <moeroute/policy/parts/capacity.hpp>

#include <catch2/catch_test_macros.hpp>
#include <limits>
#include <string>

#include "support/refusal.hpp"

using namespace moeroute;
using enum capacity_formula;

TEST_CASE("each formula rounds where the system that it is named after rounds") {
  const auto c = [](capacity_formula f, double factor, index_t t, index_t e, index_t k,
                    index_t load = 0) {
    return capacity_rule{.formula = f, .factor = factor}.capacity(t, e, k, load);
  };
  CHECK(c(unlimited, 1, 10, 4, 2) == 20);
  CHECK(c(megatron, 1.0, 10, 4, 2) == 5);
  CHECK(c(megatron, 1.25, 10, 4, 2) == 7);      // 6.25
  CHECK(c(deepspeed, 1.25, 10, 4, 2) == 7);     // 2.5 * 2.5 = 6.25
  CHECK(c(megablocks, 1.25, 10, 4, 2) == 6);    // floor
  CHECK(c(megablocks, 0.0, 10, 4, 2, 9) == 9);  // the greatest load
  CHECK(c(vmoe_ceil, 1.05, 10, 4, 2) == 6);     // 5.25
  CHECK(c(vmoe_round, 1.05, 10, 4, 2) == 5);
  CHECK(c(vmoe_round, 1.1, 10, 4, 2) == 6);  // 5.5 to even
  CHECK(c(vmoe_round, 0.9, 10, 4, 2) == 4);  // 4.5 to even
  CHECK(c(vmoe_round, 0.2, 10, 4, 2) == 1);
  CHECK(c(tutel, 1.25, 10, 4, 2) == 6);      // 2 * floor(1.25 * 3)
  CHECK(c(tutel, 0.0, 10, 4, 2, 9) == 9);    // the greatest load
  CHECK(c(tutel, -1.25, 10, 4, 2, 9) == 6);  // the lesser of both
  CHECK(c(tutel, -1.25, 10, 4, 2, 4) == 4);
  CHECK(c(nllb_train, 1.0, 10, 4, 2) == 6);   // 2 * ceil(2.5)
  CHECK(c(nllb_train, 0.25, 10, 4, 2) == 1);  // 1.5
  CHECK(c(nllb_eval, 0.25, 10, 4, 2) == 3);   // a quarter of the tokens
  CHECK(c(nllb_eval, 1.0, 20, 128, 2) == 20);
  CHECK(c(nllb_eval, 0.1, 20, 128, 2) == 2);
  CHECK(c(stable_moe, 0.25, 10, 4, 2) == 2);
  CHECK(c(nucleus, 0.1, 10, 64, 1) == 1);
  CHECK(c(nucleus, 2.0, 100, 64, 1) == 4);  // 3.125
  CHECK(c(soft_moe, 1.0, 10, 4, 1) == 2);   // 2.5 to even
}

TEST_CASE("the load of the fullest expert is asked for where the capacity reads it") {
  for (const capacity_formula f :
       {unlimited, fixed, megatron, deepspeed, megablocks, vmoe_ceil, vmoe_round, tutel, nllb_train,
        nllb_eval, stable_moe, nucleus, soft_moe})
    for (const double factor : {-8.0, 0.0, 1.0}) {
      const capacity_rule rule{.formula = f, .factor = factor};
      if (test::refusal([&] { rule.check(); }) != "accepted") continue;
      CHECK(rule.needs_greatest_load() ==
            (rule.capacity(64, 4, 2, 3) != rule.capacity(64, 4, 2, 5)));
    }
}

TEST_CASE("the minimum comes before the multiple") {
  const capacity_rule rule{.formula = deepspeed, .factor = 1.0, .minimum = 5, .multiple = 4};
  CHECK(rule.capacity(4, 4, 1) == 8);
  CHECK(rule.capacity(100, 4, 1) == 28);
  CHECK((capacity_rule{.formula = vmoe_ceil, .multiple = 4}.capacity(10, 4, 2)) == 8);
  CHECK((capacity_rule{.formula = fixed, .count = 0}.capacity(10, 4, 2)) == 0);
}

TEST_CASE("no tokens need no capacity") {
  for (const capacity_formula f : {unlimited, fixed, megatron, deepspeed, megablocks, vmoe_ceil,
                                   vmoe_round, tutel, nllb_train, nllb_eval, stable_moe, soft_moe})
    CHECK(capacity_rule{.formula = f}.capacity(0, 4, 2) == 0);
}

TEST_CASE("a factor outside of its formula's domain is refused by name") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const capacity_formula f : {megatron, deepspeed, vmoe_ceil, vmoe_round, nllb_train,
                                   nllb_eval, stable_moe, nucleus, soft_moe})
    for (const double factor : {0.0, -1.0, nan, infinity}) {
      const std::string message =
          test::refusal([&] { capacity_rule{.formula = f, .factor = factor}.check(); });
      CHECK(message ==
            "moeroute::capacity_rule: factor is " + std::to_string(factor) + ", expected > 0");
    }
  CHECK(test::refusal([&] { capacity_rule{.formula = megablocks, .factor = -1.0}.check(); }) ==
        "moeroute::capacity_rule: factor is -1.000000, expected >= 0");
  CHECK(test::refusal([&] { capacity_rule{.formula = tutel, .factor = nan}.check(); }) ==
        "moeroute::capacity_rule: factor is nan, expected a finite number");
  CHECK(test::refusal([&] { capacity_rule{.formula = tutel, .factor = -2.0}.check(); }) ==
        "accepted");
  CHECK(test::refusal([&] { capacity_rule{.formula = fixed, .count = -1}.check(); }) ==
        "moeroute::capacity_rule: count is -1, expected 0 to 2147483647");
  CHECK(test::refusal([&] { capacity_rule{.multiple = 0}.check(); }) ==
        "moeroute::capacity_rule: multiple is 0, expected 1 to 2147483647");
  CHECK(
      test::refusal([&] {
        (void)capacity_rule{.formula = vmoe_round, .factor = 0.01}.capacity(10, 64, 1);
      }) ==
      "moeroute::capacity_rule: capacity is 0 for 10 tokens, expected at least 1: a larger factor");
}

TEST_CASE("a capacity beyond all choices does not overflow") {
  CHECK((capacity_rule{.formula = stable_moe, .factor = 1e300}.capacity(10, 4, 2)) == 0x7fffffff);
}

TEST_CASE("a capacity keeps every choice where nothing is said, and each of its numbers has ends") {
  constexpr capacity_rule plain;
  CHECK((plain.formula == unlimited && plain.factor == 1.0 && plain.count == 0 &&
         plain.minimum == 0 && plain.multiple == 1));
  const auto refused = [](const capacity_rule& rule) {
    return test::refusal([&] { rule.check(); });
  };
  constexpr index_t most = 0x7fffffff;
  struct range {
    std::string name;
    index_t capacity_rule::* number;
    index_t least;
  };
  for (const auto& [name, number, least] : {range{"count", &capacity_rule::count, 0},
                                            {"minimum", &capacity_rule::minimum, 0},
                                            {"multiple", &capacity_rule::multiple, 1}})
    for (const index_t x : {least - 1, least, most, most + 1}) {
      capacity_rule rule;
      rule.*number = x;
      CHECK(refused(rule) ==
            (x >= least && x <= most
                 ? "accepted"
                 : "moeroute::capacity_rule: " + name + " is " + std::to_string(x) + ", expected " +
                       std::to_string(least) + " to 2147483647"));
    }
  // A factor that nobody multiplies with is not looked at.
  CHECK(refused({.formula = fixed, .factor = -1.0}) == "accepted");
  CHECK(refused({.factor = -1.0}) == "accepted");
  CHECK((capacity_rule{.formula = fixed, .factor = -1.0, .count = 7}.capacity(1, 4, 2)) == 7);
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(refused({.formula = megablocks, .factor = infinity}) ==
        "moeroute::capacity_rule: factor is inf, expected >= 0");
  CHECK(refused({.formula = megablocks, .factor = 0.0}) == "accepted");
  CHECK(refused({.formula = tutel, .factor = -infinity}) ==
        "moeroute::capacity_rule: factor is -inf, expected a finite number");
}
