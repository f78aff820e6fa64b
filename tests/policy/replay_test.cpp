#include <moeroute/policy/row/replay.hpp>

#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <moeroute/metrics/agreement.hpp>
#include <moeroute/policy/router.hpp>

#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sparse_rows.hpp"

using namespace moeroute;
using test::routed;

TEMPLATE_TEST_CASE("a replay on the same logits gives the same ids and weights, bit for bit", "",
                   std::uint8_t, std::uint16_t, std::int32_t) {
  const std::vector<float> logits = test::make_logits(test::shape::normal, 3, 37, 60);
  const router live{softmax{}, top_k{.k = 4}, raw_weights};
  const assignment first = routed(live, logits, 60);
  routing_record<TestType> record;
  record.record(first);
  const assignment again =
      routed(replay<softmax, TestType>{.record = &record, .weight = raw_weights}, logits, 60);
  CHECK(test::listed(again.ids()) == test::listed(first.ids()));
  CHECK(test::listed(again.weights()) == test::listed(first.weights()));
}

TEST_CASE("a replay on other logits keeps the ids and weighs them anew") {
  const std::vector<float> then = test::make_logits(test::shape::normal, 3, 20, 32);
  const std::vector<float> now = test::make_logits(test::shape::normal, 4, 20, 32);
  const assignment first = routed(router{softmax_selected{}, top_k{.k = 4}}, then, 32);
  routing_record<std::uint8_t> record;
  record.record(first);
  const assignment replayed =
      routed(replay<softmax_selected, std::uint8_t>{.record = &record}, now, 32);
  CHECK(test::listed(replayed.ids()) == test::listed(first.ids()));
  CHECK(selection_disagreement(first, replayed).differing_tokens == 0);
  for (index_t t = 0; t < 20; ++t) {
    double sum = 0.0;
    for (const expert_id e : replayed.ids(t))
      sum += std::exp(double{now[static_cast<std::size_t>(t * 32 + e)]});
    for (std::size_t r = 0; r < 4; ++r) {
      const double z = now[static_cast<std::size_t>(t * 32 + replayed.ids(t)[r])];
      CHECK(std::abs(double{replayed.weights(t)[r]} - std::exp(z) / sum) < 1e-6);
    }
  }
}

TEST_CASE("an expert that is masked now is not taken, and no_expert stays") {
  routing_record<std::uint8_t> record;
  assignment a;
  a.reset(1, 4, 3);
  a.ids()[0] = 2;
  a.ids()[1] = 0;
  a.ids()[2] = no_expert;
  record.record(a);
  const assignment replayed = routed(replay<softmax_selected, std::uint8_t>{.record = &record},
                                     {-test::infinity, 1.0f, 2.0f, 3.0f}, 4);
  CHECK(test::listed(replayed.ids()) == std::vector<expert_id>{2, no_expert, no_expert});
  CHECK(test::listed(replayed.weights()) == std::vector<float>{1.0f, 0.0f, 0.0f});
}

TEST_CASE("a replay without a record, for another E or for more tokens is refused") {
  routing_record<std::uint8_t> record;
  record.record(routed(router{softmax{}, top_k{.k = 2}}, std::vector<float>(8, 0.0f), 4));
  using sample = replay<softmax, std::uint8_t>;
  CHECK(test::refusal([] { routed(sample{}, {0.0f, 0.0f}, 2); }) ==
        "moeroute::replay: record is missing");
  CHECK(test::refusal([&] {
          routed(sample{.record = &record}, std::vector<float>(10, 0.0f), 5);
        }) == "moeroute::replay: record.experts is 4, expected 5");
  CHECK(test::refusal([&] {
          routed(sample{.record = &record}, std::vector<float>(12, 0.0f), 4);
        }) == "moeroute::replay: tokens is 3, expected 0 to 2");
}

#if defined(__linux__)
TEST_CASE("rows beyond 2^31 elements are read right") {
  constexpr index_t rows = 18, experts = 40, stride = (index_t{1} << 28) + 64;
  const test::sparse_rows<float> memory(rows, experts, stride);
  const std::vector<float> logits = test::make_logits(test::shape::normal, 5, rows, experts);
  for (index_t t = 0; t < rows; ++t)
    std::copy_n(logits.data() + t * experts, experts, memory.view().row(t));
  routing_record<std::uint8_t> record;
  record.record(routed(router{softmax_selected{}, top_k{.k = 3}}, logits, experts));
  const replay<softmax_selected, std::uint8_t> again{.record = &record};
  workspace ws;
  assignment out;
  route(again, matrix_view<const float>(memory.view()), {}, ws, out);
  const assignment expected = routed(again, logits, experts);
  CHECK(test::listed(out.ids()) == test::listed(expected.ids()));
  CHECK(test::listed(out.weights()) == test::listed(expected.weights()));
}
#endif
