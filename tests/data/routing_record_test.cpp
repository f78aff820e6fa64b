#include <moeroute/data/routing_record.hpp>

#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "support/refusal.hpp"

using namespace moeroute;

namespace {

assignment made_of(index_t experts, std::initializer_list<expert_id> ids, index_t k) {
  assignment a;
  a.reset(static_cast<index_t>(ids.size()) / k, experts, k);
  std::copy(ids.begin(), ids.end(), a.ids().begin());
  std::fill(a.weights().begin(), a.weights().end(), 0.5f);
  return a;
}

}  // namespace

TEMPLATE_TEST_CASE("a record gives back every id, and no_expert as no_expert", "", std::uint8_t,
                   std::uint16_t, std::int32_t) {
  routing_record<TestType> record;
  record.record(made_of(255, {0, 254, no_expert, 17, 3, no_expert}, 2));
  CHECK(record.tokens() == 3);
  CHECK(record.experts() == 255);
  CHECK(record.k() == 2);
  const expert_id expected[] = {0, 254, no_expert, 17, 3, no_expert};
  for (index_t c = 0; c < 6; ++c) CHECK(record.id(c) == expected[c]);
  CHECK(sizeof(record.ids()[0]) == sizeof(TestType));
}

TEST_CASE("every expert can be recorded: an id type too small for E is refused by name") {
  routing_record<std::uint8_t> small;
  routing_record<std::uint16_t> medium;
  routing_record<std::int32_t> large;
  CHECK(test::refusal([&] { small.record(made_of(256, {0}, 1)); }) ==
        "moeroute::routing_record: E is 256, expected 1 to 255");
  CHECK(test::refusal([&] { medium.record(made_of(65536, {0}, 1)); }) ==
        "moeroute::routing_record: E is 65536, expected 1 to 65535");
  medium.record(made_of(65535, {65534}, 1));
  CHECK(medium.id(0) == 65534);
  large.record(made_of(max_experts, {static_cast<expert_id>(max_experts - 1)}, 1));
  CHECK(large.id(0) == max_experts - 1);
}

TEST_CASE("a ragged assignment is not recorded") {
  assignment ragged;
  ragged.reset_ragged(1, 4, 2);
  ragged.to_fill().offsets[0] = 0;
  ragged.to_fill().offsets[1] = 0;
  ragged.close();
  routing_record<std::uint8_t> record;
  CHECK(test::refusal([&] { record.record(ragged); }) ==
        "moeroute::routing_record: the assignment is ragged, expected the fixed form");
}

TEST_CASE("a record of a second batch is that batch alone, and what is refused changes nothing") {
  routing_record<std::uint8_t> record;
  CHECK((record.tokens() == 0 && record.experts() == 0 && record.k() == 0 && record.ids().empty()));
  record.record(made_of(255, {0, 254, no_expert, 17, 3, no_expert}, 2));
  record.record(made_of(9, {8, no_expert, 0}, 3));
  CHECK((record.tokens() == 1 && record.experts() == 9 && record.k() == 3));
  CHECK(record.ids().size() == 3);
  CHECK((record.id(0) == 8 && record.id(1) == no_expert && record.id(2) == 0));
  for (const expert_id wild : {9, -2})
    CHECK(test::refusal([&] { record.record(made_of(9, {wild}, 1)); }) ==
          "moeroute::routing_record: the id of choice 0 is " + std::to_string(wild) +
              ", expected -1 to 8");
  CHECK((record.tokens() == 1 && record.k() == 3 && record.id(0) == 8));
  record.record(made_of(4, {}, 2));
  CHECK((record.tokens() == 0 && record.ids().empty()));
}
