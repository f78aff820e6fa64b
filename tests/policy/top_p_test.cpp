#include <moeroute/policy/row/top_p.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/row/counted.hpp>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace {

// Whether `count` experts are a right answer in double, where a sum within rounding of p may go
// either way.
std::string count_break(const top_p& rule, const std::vector<expert_id>& order,
                        const std::vector<double>& score, index_t count) {
  const double p = static_cast<double>(rule.p), slack = 1e-5;
  const auto there = static_cast<index_t>(order.size());
  const index_t most = rule.max_k > 0 ? std::min(rule.max_k, there) : there;
  double sum = 0;
  // The fewest and the most experts that a sum within slack of p allows.
  index_t fewest = there, greatest = there;
  bool first = true;
  for (index_t r = 0; r < there; ++r) {
    sum += score[static_cast<std::size_t>(order[static_cast<std::size_t>(r)])];
    const index_t in = rule.crossing == crossing::exclude ? r : r + 1;
    if (first && sum >= p - slack) fewest = in, first = false;
    if (sum > p + slack) {
      greatest = in;
      break;
    }
  }
  const auto bounded = [&](index_t n) { return std::min(std::max(n, rule.min_k), most); };
  return count >= bounded(fewest) && count <= bounded(greatest)
             ? ""
             : std::to_string(count) + " experts, expected " + std::to_string(bounded(fewest)) +
                   " to " + std::to_string(bounded(greatest));
}

void agrees(const top_p& rule, index_t experts) {
  for (const test::shape s : test::all_shapes) {
    const index_t tokens = 18;  // the last two come row by row
    const std::vector<float> logits = test::make_logits(s, 3, tokens, experts);
    const assignment a = routed(rule, logits, experts);
    INFO(test::name(s) << ", p = " << rule.p << ", E = " << experts);
    for (index_t t = 0; t < tokens; ++t) {
      const float* row = logits.data() + t * experts;
      const std::vector<expert_id> order = oracle::order(row, experts);
      const std::vector<double> score = oracle::softmax(row, experts, order);
      const std::string broken = count_break(rule, order, score, a.count(t));
      if (!broken.empty()) FAIL("token " << t << ": " << broken);
      std::vector<double> weight;
      double sum = 0;
      for (index_t r = 0; r < a.count(t); ++r) {
        REQUIRE(a.ids(t)[static_cast<std::size_t>(r)] == order[static_cast<std::size_t>(r)]);
        weight.push_back(score[static_cast<std::size_t>(order[static_cast<std::size_t>(r)])]);
        sum += weight.back();
      }
      if (rule.weight.normalize == normalization::sum)
        for (double& w : weight) w /= sum;
      CHECK(test::difference(a.weights(t), weight, 3e-6, 1e-36) == "");
    }
  }
}

}  // namespace

TEST_CASE("top-p takes the shortest prefix that reaches the mass, on every shape") {
  for (const index_t experts : {1, 3, 16, 60, 257})
    for (const float p : {0.1f, 0.4f, 0.75f, 0.99f}) {
      agrees({.p = p}, experts);
      agrees({.p = p, .weight = sum_normalized}, experts);
    }
}

TEST_CASE("top-p leaves out the crossing expert where it is told to") {
  agrees({.p = 0.6f, .crossing = crossing::exclude}, 16);
  agrees({.p = 0.6f, .crossing = crossing::include_strict}, 16);
}

TEST_CASE("a floor and a cap bound the number of experts") {
  agrees({.p = 0.3f, .min_k = 4}, 60);
  agrees({.p = 0.9f, .max_k = 3}, 60);
  agrees({.p = 0.5f, .crossing = crossing::exclude, .min_k = 2, .max_k = 20}, 60);
  // More than the sixteen that are looked at first.
  agrees({.p = 0.2f, .min_k = 40}, 257);
}

TEST_CASE("a token has at least one expert where it can have one, whatever the reading") {
  const std::vector<float> sharp = {20.0f, 0.0f, 0.0f};
  for (const crossing how : {crossing::include, crossing::include_strict, crossing::exclude}) {
    const assignment a = routed(top_p{.p = 0.1f, .crossing = how}, sharp, 3);
    CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{0});
  }
  CHECK(routed(top_p{}, {test::not_a_number, -test::infinity, -test::infinity}, 3).count(0) == 0);
}

TEST_CASE("a mass of 1 takes every expert that can be chosen, up to rounding of the sum") {
  const std::vector<float> logits = {0.0f, 1.0f, test::not_a_number, 2.0f};
  const assignment a = routed(top_p{.p = 1.0f, .crossing = crossing::include_strict}, logits, 4);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{3, 1, 0});
}

TEST_CASE("equal probabilities are taken by ascending id") {
  const assignment a = routed(top_p{.p = 0.3f}, std::vector<float>(10, 0.5f), 10);
  for (std::size_t r = 0; r < a.ids(0).size(); ++r) CHECK(a.ids(0)[r] == static_cast<expert_id>(r));
}

TEST_CASE(
    "a mass that is reached exactly is crossed by the next expert where it must be exceeded") {
  // Quarters are exact.
  const auto count = [](crossing how) {
    return routed(top_p{.p = 0.5f, .crossing = how}, std::vector<float>(4, 1.5f), 4).count(0);
  };
  CHECK(count(crossing::include) == 2);
  CHECK(count(crossing::include_strict) == 3);
  CHECK(count(crossing::exclude) == 2);
}

TEST_CASE("the experts of a smaller mass begin those of a larger one") {
  const std::vector<float> logits = test::make_logits(test::shape::quantised, 8, 40, 60);
  const assignment few = routed(top_p{.p = 0.3f}, logits, 60);
  const assignment many = routed(top_p{.p = 0.8f}, logits, 60);
  for (index_t t = 0; t < 40; ++t) {
    REQUIRE(few.count(t) <= many.count(t));
    for (std::size_t r = 0; r < few.ids(t).size(); ++r) CHECK(few.ids(t)[r] == many.ids(t)[r]);
  }
}

TEST_CASE("rows that take all experts are tempered once, as the others are") {
  const index_t tokens = 40, experts = 8;
  const std::vector<float> logits = test::make_logits(test::shape::normal, 21, tokens, experts);
  std::vector<float> tempered(logits);
  for (float& z : tempered) z *= 0.5f;
  const dense_if plain{.rule = {.p = 0.5f}, .threshold = 0.8f};
  dense_if warm = plain;
  warm.rule.transform.temperature = 2.0f;
  const assignment expected = routed(plain, tempered, experts), got = routed(warm, logits, experts);
  index_t dense = 0;
  for (index_t t = 0; t < tokens; ++t) {
    dense += expected.count(t) == experts;
    CHECK(test::listed(got.ids(t)) == test::listed(expected.ids(t)));
    CHECK(test::bit_difference(got.weights(t), expected.weights(t)) == "");
  }
  CHECK(dense > 0);
  CHECK(dense < tokens);
}

TEST_CASE("a mass, floor or cap that makes no sense is refused") {
  const auto refused = [](const top_p& rule) { return test::refusal([&] { rule.check(8); }); };
  CHECK(refused({.p = 0.0f}) ==
        "moeroute::top_p: p is 0.000000, expected more than 0 and at most 1");
  CHECK(refused({.p = 1.5f}) ==
        "moeroute::top_p: p is 1.500000, expected more than 0 and at most 1");
  CHECK(refused({.p = test::not_a_number}) ==
        "moeroute::top_p: p is nan, expected more than 0 and at most 1");
  CHECK(refused({.min_k = 9}) == "moeroute::top_p: min_k is 9, expected 1 to 8");
  CHECK(refused({.min_k = 3, .max_k = 2}) == "moeroute::top_p: max_k is 2, expected 3 to 1048576");
}

TEST_CASE("importance is the attention that a token receives, not that which it pays") {
  constexpr index_t n = 5, heads = 3, stride = 8;
  const std::vector<float> memory = test::make_logits(test::shape::normal, 4, heads * n, stride);
  const matrix_view<const float> attention(memory.data(), heads * n, n, stride);
  for (const bool causal : {false, true}) {
    std::vector<float> importance(n, 7.0f);
    attention_importance(attention, causal, importance);
    for (index_t j = 0; j < n; ++j) {
      double sum = 0.0;
      for (index_t i = 0; i < heads * n; ++i) sum += static_cast<double>(attention(i, j));
      sum /= static_cast<double>(heads * (causal ? n - j : n));
      CHECK(std::abs(static_cast<double>(importance[static_cast<std::size_t>(j)]) - sum) < 1e-5);
    }
  }
  std::vector<float> none;
  attention_importance({memory.data(), 0, 0, 0}, true, none);
}

TEST_CASE("an own k goes from the least to the most by importance, halves up") {
  std::vector<std::int32_t> k(3, -1), one(1), empty;
  k_of_importance(std::vector<float>{-4.0f, 0.0f, 4.0f}, 1, 2, k);
  CHECK(k == std::vector<std::int32_t>{1, 2, 2});
  k_of_importance(std::vector<float>{3.0f, 0.0f, 1.0f}, 0, 3, k);
  CHECK(k == std::vector<std::int32_t>{3, 0, 1});
  k_of_importance(std::vector<float>{3.0f, 0.0f, 1.0f}, 2, 2, k);
  CHECK(k == std::vector<std::int32_t>{2, 2, 2});
  k_of_importance(std::vector<float>{}, 1, 2, empty);
  const std::vector<float> z(40), three{1, 2, 3}, wild{1, test::infinity, 3};
  std::vector<float> importance(4);
  const auto attended = [&](matrix_view<const float> a) {
    return [&importance, a] { attention_importance(a, false, importance); };
  };
  const auto counted_by = [](const row_count& rule) { return [rule] { rule.check(8); }; };
  using enum count_rule;
  const test::refusals refused{
      {[&] { k_of_importance(three, 1, 2, one); }, "k_of_importance: k.size() is 1, expected 3"},
      {[&] { k_of_importance(three, -1, 2, k); }, "k_of_importance: least is -1, expected 0 to 2"},
      {[&] { k_of_importance(three, 1, max_experts + 1, k); },
       "k_of_importance: most is 1048577, expected 1 to 1048576"},
      {[&] { k_of_importance(wild, 1, 2, k); },
       "k_of_importance: importance of token 1 is inf, expected a finite number"},
      {attended({z.data(), 4, 5}), "attention_importance: importance.size() is 4, expected 5"},
      {attended({z.data(), 4, 4, 3}),
       "attention_importance: attention.stride is 3, expected at least 4"},
      {attended({z.data(), 6, 4}),
       "attention_importance: attention.rows % tokens is 2, expected 0"},
      {attended({z.data(), 0, 4}), "attention_importance: heads is 0, expected 1 to 1048576"},
      {counted_by({.rule = tsallis}),
       "counted: rule is tsallis, expected percentile, ratio or entropy: that is dense_if"},
      {counted_by({.rule = percentile, .quantile = -0.5f}),
       "counted: quantile is -0.500000, expected 0 to 1"},
      {counted_by({.rule = percentile, .quantile = 1.5f}),
       "counted: quantile is 1.500000, expected 0 to 1"},
      {counted_by({.rule = ratio, .ratio = -0.5f}), "counted: ratio is -0.500000, expected 0 to 1"},
      {counted_by({.rule = ratio, .ratio = 1.5f}), "counted: ratio is 1.500000, expected 0 to 1"},
      {counted_by({.min_k = 0}), "counted: min_k is 0, expected 1 to 8"},
      {counted_by({.min_k = 9}), "counted: min_k is 9, expected 1 to 8"},
      {counted_by({.min_k = 3, .max_k = 2}), "counted: max_k is 2, expected 3 to 1048576"},
      {counted_by({.rule = entropy, .low = -0.5f, .max_k = 3}),
       "counted: entropy_low is -0.500000, expected >= 0"},
      {counted_by({.rule = entropy, .low = 1.0f, .high = 0.5f, .max_k = 3}),
       "counted: entropy_high is 0.500000, expected at least entropy_low = 1.000000"},
      {counted_by({.rule = entropy}), "counted: max_k is 0, expected 1 to 1048576"},
      {counted_by({.rule = entropy, .mid_k = 4, .max_k = 3}),
       "counted: mid_k is 4, expected 1 to 3"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  // A number of another rule is not looked at; ends of ranges are in them.
  for (const row_count& fits :
       {row_count{.rule = ratio, .quantile = 9.0f, .ratio = 0.0f, .low = -1.0f},
        row_count{.rule = percentile, .quantile = 1.0f, .ratio = 9.0f},
        row_count{.rule = percentile, .quantile = 0.0f, .min_k = 8, .max_k = 8},
        row_count{.rule = entropy, .low = 0.0f, .high = 0.0f, .mid_k = 3, .max_k = 3}})
    CHECK(test::refusal(counted_by(fits)) == "accepted");
  CHECK((row_count{.max_k = 3}.most(8) == 3 && row_count{.max_k = 9}.most(8) == 8 &&
         row_count{}.most(8) == 8));
}

TEST_CASE("a block looks at sixteen ranks, then at half as many again as its rows must need") {
  constexpr index_t experts = 2048;
  // So many equal logits in each row, of which half are taken; the ranks that were looked at.
  const auto looked_at = [](const std::vector<index_t>& open, index_t max_k = 0) {
    std::vector<float> z(open.size() * experts, -test::infinity);
    for (std::size_t t = 0; t < open.size(); ++t)
      std::fill_n(z.begin() + static_cast<std::ptrdiff_t>(t) * experts, open[t], 1.0f);
    const top_p rule{.p = 0.5f, .max_k = max_k};
    const index_t most = rule.max_choices(experts);
    const side_inputs side;
    workspace ws;
    const top_p::buffers memory = ws.carve([&](scratch& s) { return rule.carve(s, experts); });
    std::fill_n(memory.id, most * block_rows, -7);
    std::fill_n(memory.value, most * block_rows, test::not_a_number);
    std::vector<expert_id> id(open.size() * static_cast<std::size_t>(most));
    std::vector<float> weight(id.size());
    std::vector<std::int32_t> count(open.size()), expected;
    rule.route_block(
        logit_block{z.data(), experts, static_cast<int>(open.size()), experts, 0, &side}, memory,
        id.data(), weight.data(), count.data());
    for (const index_t n : open)
      expected.push_back(static_cast<std::int32_t>(std::min(n / 2, most)));
    CHECK(count == expected);
    index_t ranks = 0;
    while (ranks < most && memory.id[ranks * block_rows] != -7) ++ranks;
    return ranks;
  };
  CHECK(looked_at({8, 2, 4}) == 16);
  CHECK(looked_at({4, 32}) == 16);
  // At four times as many at least, and at all where that is a quarter of them.
  CHECK(looked_at({64}) == 64);
  CHECK(looked_at({8, 256, 64}) == 192);
  CHECK(looked_at({512, 4}) == 384);
  CHECK(looked_at({1024}) == 2048);
  CHECK(looked_at({64}, 256) == 64);
  CHECK(looked_at({64}, 255) == 255);
  CHECK(looked_at({256}, 100) == 100);
}

TEST_CASE("top-p takes 0.4 of the mass where nothing is said, each of its numbers has ends") {
  const top_p plain;
  CHECK((plain.p == 0.4f && plain.crossing == crossing::include && plain.min_k == 1 &&
         plain.max_k == 0 && plain.weight.normalize == normalization::none &&
         !plain.transform.active()));
  CHECK((plain.max_choices(8) == 8 && top_p{.max_k = 3}.max_choices(8) == 3 &&
         top_p{.max_k = 9}.max_choices(8) == 8));
  const auto refused = [](const top_p& rule) { return test::refusal([&] { rule.check(8); }); };
  for (const top_p& fits : {top_p{.p = 1.0f}, top_p{.p = 1e-9f}, top_p{.min_k = 8},
                            top_p{.min_k = 3, .max_k = 3}, top_p{.max_k = max_experts}})
    CHECK(refused(fits) == "accepted");
  CHECK(refused({.min_k = 0}) == "moeroute::top_p: min_k is 0, expected 1 to 8");
  CHECK(refused({.max_k = max_experts + 1}) ==
        "moeroute::top_p: max_k is 1048577, expected 1 to 1048576");
  CHECK(refused({.p = test::infinity}) ==
        "moeroute::top_p: p is inf, expected more than 0 and at most 1");
  CHECK(refused({.weight = {.divide = 0.0f}}) ==
        "moeroute::weight_rule: divide is 0.000000, expected > 0");
  CHECK(refused({.transform = {.temperature = 0.0f}}) ==
        "moeroute::logit_transform: temperature is 0.000000, expected > 0");
}
