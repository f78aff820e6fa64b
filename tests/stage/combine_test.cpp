#include <moeroute/stage/combine.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/matrix/eigen.hpp>
#include <string>
#include <vector>

#include "oracle/layer.hpp"
#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

using namespace moeroute;

TEST_CASE("a token gets the weighted sum of its slots") {
  for (const index_t tokens : {0, 1, 17, 300}) {
    const index_t d = 37, k = 3;
    const test::planned p(tokens, 13, k);
    const row_matrix<float> slots = test::random_rows(p.plan.slots(), d);
    row_matrix<float> y = row_matrix<float>::Constant(tokens, d, 77.0f);
    combine(slots, p.plan, p.choices, y);
    const oracle::matrix expected = oracle::combine(oracle::matrix(slots.rows(), d, slots.data()),
                                                    p.slow, p.choices.weights(), tokens, k);
    CHECK(test::difference(test::values(y), expected.value, 1e-6, 1e-6) == "");
  }
}

TEST_CASE(
    "combine adds in rank order with fused multiply-adds and rounds to the output type once") {
  const index_t tokens = 50, d = 21, k = 4;
  const test::planned p(tokens, 8, k);
  const row_matrix<bfloat16> slots = test::random_rows(p.plan.slots(), d).cast<bfloat16>();
  row_matrix<float> y(tokens, d), expected(tokens, d);
  row_matrix<bfloat16> y16(tokens, d);
  combine(slots, p.plan, p.choices, y);
  combine(slots, p.plan, p.choices, y16);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t c = 0; c < d; ++c) {
      float sum = 0.0f;
      for (index_t i = t * k; i < (t + 1) * k; ++i) {
        const slot_id s = p.slow.slot_of_choice[static_cast<std::size_t>(i)];
        if (s != no_slot)
          sum = std::fma(p.choices.weights()[static_cast<std::size_t>(i)],
                         static_cast<float>(slots(s, c)), sum);
      }
      expected(t, c) = sum;
    }
  CHECK(test::bit_difference(test::values(y), test::values(expected)) == "");
  const row_matrix<bfloat16> rounded = expected.cast<bfloat16>();
  CHECK(test::bit_difference(test::values(y16), test::values(rounded)) == "");
}

TEST_CASE("a token without any slot gets zeros") {
  assignment choices;
  choices.reset(3, 4, 2);
  for (std::size_t i = 0; i < 6; ++i) {
    choices.ids()[i] = no_expert;
    choices.weights()[i] = 0.0f;
  }
  dispatch_plan p;
  plan(choices, p);
  const row_matrix<float> slots(0, 5);
  row_matrix<float> y = row_matrix<float>::Constant(3, 5, 77.0f);
  combine(slots, p, choices, y);
  CHECK(y == row_matrix<float>::Zero(3, 5));
}

TEST_CASE("x gets what the weights of a token leave of 1, and all of it where the token is lost") {
  const index_t d = 21, k = 2;
  for (const index_t tokens : {0, 1, 40}) {
    const test::planned p(tokens, 8, k);
    const row_matrix<float> slots = test::random_rows(p.plan.slots(), d);
    const row_matrix<float> x = test::random_rows(tokens, d, 3);
    row_matrix<float> y(tokens, d), in_place = x;
    combine_options<float, float> mix{.lost = lost_token::mix};
    mix.x = const_view(x);
    combine(slots, p.plan, p.choices, y, serial{}, mix);
    mix.x = const_view(in_place);
    combine(slots, p.plan, p.choices, in_place, serial{}, mix);
    CHECK(test::bit_difference(test::values(in_place), test::values(y)) == "");
    std::vector<double> expected;
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = 0; c < d; ++c) {
        double sum = 0.0, rest = 1.0;
        for (index_t i = t * k; i < (t + 1) * k; ++i)
          if (const auto s = p.slow.slot_of_choice[static_cast<std::size_t>(i)]; s != no_slot) {
            const double w = static_cast<double>(p.choices.weights()[static_cast<std::size_t>(i)]);
            sum += w * static_cast<double>(slots(s, c));
            rest -= w;
          }
        expected.push_back(sum + rest * static_cast<double>(x(t, c)));
      }
    CHECK(test::difference(test::values(y), expected, 1e-5, 1e-5) == "");
  }
}

TEST_CASE("combine undoes dispatch where the weights of a token sum to 1") {
  const index_t tokens = 40, k = 4;
  assignment choices;
  choices.reset(tokens, 16, k);
  for (index_t i = 0; i < tokens * k; ++i) {
    choices.ids()[static_cast<std::size_t>(i)] = static_cast<expert_id>((i * 5) % 16);
    choices.weights()[static_cast<std::size_t>(i)] = 0.25f;
  }
  dispatch_plan p;
  plan(choices, p);
  const row_matrix<float> x = test::random_rows(tokens, 30);
  row_matrix<float> slots(p.slots(), 30), y(tokens, 30);
  dispatch(x, p, slots);
  combine(slots, p, choices, y);
  CHECK(test::difference(test::values(y), test::values(x), 0.0) == "");
}

#if defined(_OPENMP)
TEST_CASE("combine has the same bits for any number of threads") {
  const test::planned p(400, 16, 4);
  const row_matrix<float> slots = test::random_rows(p.plan.slots(), 500);
  row_matrix<float> one(400, 500), many(400, 500);
  combine(slots, p.plan, p.choices, one);
  for (const int threads : {1, 2, 4}) {
    many.setZero();
    combine(slots, p.plan, p.choices, many, openmp{threads});
    CHECK(test::bit_difference(test::values(many), test::values(one)) == "");
  }
}
#endif

TEST_CASE("combine refuses shapes that do not fit") {
  const test::planned p(4, 6, 2), other_k(4, 6, 3), other_t(5, 6, 2);
  const index_t slots = p.plan.slots();
  const auto refusal = [&](const assignment& choices, index_t slot_rows, index_t rows,
                           index_t cols) {
    const row_matrix<float> in = row_matrix<float>::Zero(slot_rows, 7);
    row_matrix<float> y(rows, cols);
    return test::refusal([&] { combine(in, p.plan, choices, y); });
  };
  CHECK(refusal(p.choices, slots, 3, 7) == "moeroute::combine: y.rows() is 3, expected 4");
  CHECK(refusal(p.choices, slots, 4, 8) == "moeroute::combine: y.cols() is 8, expected 7");
  CHECK(refusal(p.choices, slots + 1, 4, 7) == "moeroute::combine: slots.rows() is " +
                                                   std::to_string(slots + 1) + ", expected " +
                                                   std::to_string(slots));
  CHECK(refusal(other_k.choices, slots, 4, 7) == "moeroute::combine: choices.k() is 3, expected 2");
  CHECK(refusal(other_t.choices, slots, 4, 7) ==
        "moeroute::combine: choices.tokens() is 5, expected 4");
  CHECK(refusal(p.choices, slots, 4, 7) == "accepted");
}

TEST_CASE("a choice without an expert is no identity expert") {
  test::random rng(71);
  const assignment a = test::fixed_choices(rng, 6, 4, 2, 3);
  std::vector<float> rows(12 * 4, 1.0f), x(6 * 4, 1.0f), y(6 * 4);
  const auto refused = [&](expert_id first, expert_id end) {
    return test::refusal([&] {
      combine(
          matrix_view<const float>(rows.data(), 12, 4), a, matrix_view<float>(y.data(), 6, 4),
          serial{},
          combine_options<>{.identity_first = first, .identity_end = end, .x = {x.data(), 6, 4}});
    });
  };
  CHECK(refused(-1, 2) == "moeroute::combine: identity_first is -1, expected 0 to 1048576");
  CHECK(refused(0, 2) == "accepted");
}

TEST_CASE("what combine is given beside rows is refused by name, at either end of its range") {
  test::random rng(72);
  const assignment a = test::ragged_choices(rng, 6, 4, 3),
                   other = test::ragged_choices(rng, 6, 4, 3);
  REQUIRE(a.choices() != other.choices());
  dispatch_plan p;
  plan(a, p);
  const index_t n = a.choices();
  std::vector<float> rows(static_cast<std::size_t>(n * 4), 1.0f), x(6 * 5, 1.0f), y(6 * 4 + 1);
  const matrix_view<float> out(y.data(), 6, 4);
  const auto said = [&](const combine_options<>& how) {
    const std::string text = test::refusal(
        [&] { combine(matrix_view<const float>(rows.data(), n, 4), p, a, out, serial{}, how); });
    const std::string front = "moeroute::combine: ";
    return text.starts_with(front) ? text.substr(front.size()) : text;
  };
  const matrix_view<const float> wide(x.data(), 6, 5);
  const matrix_view<const float> beside(y.data() + 1, 6, 4);
  for (const lost_token lost : {lost_token::residual, lost_token::mix})
    CHECK(said({.lost = lost, .x = wide}) == "x.cols() is 5, expected 4");
  CHECK(said({.identity_end = 2, .x = wide}) == "x.cols() is 5, expected 4");
  CHECK(said({.shared = wide}) == "shared.cols() is 5, expected 4");
  CHECK(said({.shared = beside}) == "shared and y overlap, expected memory of their own");
  constexpr auto adds = combine_output::accumulate;
  CHECK(said({.output = adds, .identity_first = 1048576, .identity_end = 1048576}) == "accepted");
  CHECK(said({.output = adds, .identity_first = 1048577, .identity_end = 1048577}) ==
        "identity_first is 1048577, expected 0 to 1048576");
  CHECK(test::refusal([&] {
          combine(matrix_view<const float>(rows.data(), n, 4), p, other, out);
        }) == "moeroute::combine: choices.choices() is " + std::to_string(other.choices()) +
                  ", expected " + std::to_string(n));
  CHECK(test::refusal([&] {
          combine(matrix_view<const float>(rows.data(), n, 4), p,
                  std::span<const float>(rows).first(static_cast<std::size_t>(n)), out, serial{},
                  combine_options<>{.identity_end = -1});
        }) == "moeroute::combine: identity_end is -1, expected 0 to 0");
  CHECK(test::refusal([&] {
          combine(matrix_view<const float>(rows.data(), n, 4), p,
                  std::span<const float>(x).first(static_cast<std::size_t>(n - 1)), out);
        }) == "moeroute::combine: weights.size() is " + std::to_string(n - 1) + ", expected " +
                  std::to_string(n));
  // Where the plan gave identity experts slots, these are what is added.
  const std::vector<float> others(6 * 4, 5.0f);
  combine(matrix_view<const float>(rows.data(), n, 4), p, a, out);
  const std::vector<float> sums = y;
  combine(matrix_view<const float>(rows.data(), n, 4), p, a, out, serial{},
          combine_options<>{.identity_end = 3, .x = {others.data(), 6, 4}});
  CHECK(y == sums);
  const combine_options<> plain;
  CHECK((plain.plain() && !plain.needs_x()));
  CHECK((plain.weight == combine_weight::of_choice && plain.output == combine_output::overwrite &&
         plain.lost == lost_token::zero && plain.identity_first == 0 && plain.identity_end == 0));
}
