#include <moeroute/layer/soft_moe.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>
#include <moeroute/exec/callable.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"

namespace soft_moe_test {

using namespace moeroute;

namespace {

constexpr index_t d = 21;

struct doubling {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = static_cast<float>(e + 2) * in(r, c);
  }
};

template <class Exec = serial>
row_matrix<float> run(soft_moe<doubling>& layer, const row_matrix<float>& x,
                      const Exec& exec = {}) {
  row_matrix<float> y(x.rows(), x.cols());
  layer.forward(matrix_view<const float>(x.data(), x.rows(), x.cols()),
                matrix_view<float>(y.data(), y.rows(), y.cols()), exec);
  return y;
}

}  // namespace

TEST_CASE("a slot's shares of the tokens sum to 1, and so do a token's shares of the slots") {
  soft_plan p;
  for (const index_t tokens : {1, 5, 40})
    for (const index_t slots : {1, 6, 33}) {
      const row_matrix<float> z = 3.0f * test::random_rows(tokens, slots, 1);
      plan_soft(z, 1, p);
      for (index_t s = 0; s < slots; ++s) {
        const float* row = p.dispatch().row(s);
        CHECK(std::abs(std::accumulate(row, row + tokens, 0.0) - 1.0) < 1e-6);
      }
      for (index_t t = 0; t < tokens; ++t) {
        const float* row = p.combine().row(t);
        CHECK(std::abs(std::accumulate(row, row + slots, 0.0) - 1.0) < 1e-6);
      }
    }
}

TEST_CASE("a logit of -inf or NaN gives nothing, and a token without another logit gets nothing") {
  row_matrix<float> z = test::random_rows(4, 3, 2);
  z(1, 0) = -std::numeric_limits<float>::infinity();
  z(2, 1) = std::numeric_limits<float>::quiet_NaN();
  z.row(3).setConstant(-std::numeric_limits<float>::infinity());
  soft_plan p;
  plan_soft(z, 1, p);
  CHECK((p.combine()(1, 0) == 0.0f && p.dispatch()(0, 1) == 0.0f));
  CHECK((p.combine()(2, 1) == 0.0f && p.dispatch()(1, 2) == 0.0f));
  for (index_t s = 0; s < 3; ++s) CHECK((p.combine()(3, s) == 0.0f && p.dispatch()(s, 3) == 0.0f));
}

TEST_CASE("a soft layer is two weighted means with the experts between them") {
  for (const index_t own : {1, 3}) {
    const index_t slots = 4 * own;
    const row_matrix<float> mu = test::random_rows(slots, d, 3), x = test::random_rows(10, d, 4);
    soft_moe<doubling> layer(const_view(mu), doubling{}, {.slots_per_expert = own, .scale = 2.5f});
    const row_matrix<float> y = run(layer, x);
    row_matrix<double> expected = row_matrix<double>::Zero(10, d), z(10, slots);
    for (index_t t = 0; t < 10; ++t)
      for (index_t s = 0; s < slots; ++s) {
        const auto a = x.row(t).cast<double>(), b = mu.row(s).cast<double>();
        z(t, s) = 2.5 * a.dot(b) / std::sqrt((a.dot(a) + 1e-6) * (b.dot(b) + 1e-6));
      }
    for (index_t s = 0; s < slots; ++s) {
      const auto column = z.col(s).array().exp().eval();
      const auto slot = (x.cast<double>().transpose() * (column / column.sum()).matrix()).eval();
      for (index_t t = 0; t < 10; ++t)
        expected.row(t) += std::exp(z(t, s)) / z.row(t).array().exp().sum() *
                           static_cast<double>(s / own + 2) * slot.transpose();
    }
    CHECK((y.cast<double>() - expected).cwiseAbs().maxCoeff() < 1e-5);
  }
}

TEST_CASE("a soft layer's rows may lie apart, and its experts may have memory") {
  struct through_memory {
    index_t scratch_floats() const { return d; }
    void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out,
                    float* memory) const {
      for (index_t r = 0; r < in.rows; ++r) {
        std::copy_n(in.row(r), d, memory);
        for (index_t c = 0; c < d; ++c) out(r, c) = static_cast<float>(e + 2) * memory[c];
      }
    }
  };
  const row_matrix<float> mu = test::random_rows(6, d, 3), x = test::random_rows(10, d, 4);
  soft_moe<doubling> layer(const_view(mu), doubling{}, {.slots_per_expert = 2});
  const row_matrix<float> y = run(layer, x);
  row_matrix<float> apart = row_matrix<float>::Constant(10, d + 3, 7.0f),
                    to = row_matrix<float>::Constant(10, d + 5, 9.0f),
                    mu_apart = row_matrix<float>::Constant(6, d + 2, 5.0f);
  apart.leftCols(d) = x;
  mu_apart.leftCols(d) = mu;
  const matrix_view<const float> from(apart.data(), 10, d, d + 3);
  soft_moe<doubling> same(matrix_view<const float>(mu_apart.data(), 6, d, d + 2), doubling{},
                          {.slots_per_expert = 2});
  same.forward(from, matrix_view<float>(to.data(), 10, d, d + 5));
  CHECK(to.leftCols(d) == y);
  CHECK(to.rightCols(5) == row_matrix<float>::Constant(10, 5, 9.0f));
  soft_moe<through_memory> remembers(const_view(mu), through_memory{}, {.slots_per_expert = 2});
  remembers.forward(from, matrix_view<float>(to.data(), 10, d, d + 5));
  CHECK(to.leftCols(d) == y);
}

TEST_CASE("without a scale all tokens get the same mean") {
  const row_matrix<float> mu = test::random_rows(6, d, 5), x = test::random_rows(9, d, 6);
  soft_moe<doubling> layer(const_view(mu), doubling{}, {.scale = 0.0f});
  const row_matrix<float> y = run(layer, x);
  for (index_t t = 0; t < 9; ++t) {
    CHECK(y.row(t) == y.row(0));
    for (index_t s = 0; s < 6; ++s) CHECK(layer.plan().combine()(t, s) == 1.0f / 6.0f);
  }
}

TEST_CASE("permuted tokens get permuted outputs") {
  const row_matrix<float> mu = test::random_rows(6, d, 7), x = test::random_rows(9, d, 8);
  soft_moe<doubling> layer(const_view(mu), doubling{});
  const row_matrix<float> y = run(layer, x), z = run(layer, x.colwise().reverse());
  CHECK((z.colwise().reverse() - y).cwiseAbs().maxCoeff() < 1e-5f);
}

TEST_CASE(
    "a soft layer has the same bits under other executors, in place, and warm without memory") {
  const row_matrix<float> mu = test::random_rows(8, d, 9);
  row_matrix<float> x = test::random_rows(70, d, 10);
  soft_moe<doubling> layer(const_view(mu), doubling{}, {.slots_per_expert = 2});
  const row_matrix<float> y = run(layer, x);
  const callable_executor backwards(
      [](index_t n, index_t grain, loop_body body) {
        for (index_t b = (n - 1) / grain * grain; b >= 0; b -= grain)
          body(b, std::min(n, b + grain));
      },
      2);
  const row_matrix<float> other = run(layer, x, backwards);
  CHECK(test::bit_difference(test::values(other), test::values(y)) == "");
  const matrix_view<float> view(x.data(), x.rows(), x.cols());
  run(layer, row_matrix<float>::Zero(70, d));
  CHECK(test::allocations_during([&] { layer.forward(view, view); }) == 0);
  CHECK(test::bit_difference(test::values(x), test::values(y)) == "");
}

TEST_CASE("shapes that do not fit a soft layer are refused by name") {
  const row_matrix<float> mu = test::random_rows(6, d, 11);
  CHECK(test::refusal([&] {
          soft_moe<doubling>(const_view(mu), doubling{}, {.slots_per_expert = 4});
        }) == "moeroute::soft_moe: mu.rows() % slots_per_expert is 2, expected 0");
  soft_moe<doubling> layer(const_view(mu), doubling{});
  row_matrix<float> x(3, d), y(4, d);
  CHECK(test::refusal([&] { layer.forward(x, y); }) ==
        "moeroute::soft_moe: y.rows() is 4, expected 3");
  CHECK(test::refusal([&] {
          soft_moe<doubling>(const_view(mu), doubling{},
                             {.scale = std::numeric_limits<float>::infinity()});
        }) == "moeroute::soft_moe: scale is inf, expected a finite number");
  for (const index_t own : {0, 7})
    CHECK(test::refusal(
              [&] { soft_moe<doubling>(const_view(mu), doubling{}, {.slots_per_expert = own}); }) ==
          "moeroute::soft_moe: slots_per_expert is " + std::to_string(own) + ", expected 1 to 6");
  CHECK(test::refusal([&] {
          soft_moe<doubling>(matrix_view<const float>(mu.data(), 6, d, d - 1), doubling{});
        }) == "moeroute::soft_moe: mu.stride is 20, expected at least 21");
  const auto refused = [&](const matrix_view<const float>& from, const matrix_view<float>& to) {
    return test::refusal([&] { layer.forward(from, to); });
  };
  row_matrix<float> wide(4, d + 1);
  CHECK(refused({x.data(), 3, d - 1}, {y.data(), 3, d}) ==
        "moeroute::soft_moe: x.cols() is 20, expected 21");
  CHECK(refused({x.data(), 3, d}, {wide.data(), 3, d + 1}) ==
        "moeroute::soft_moe: y.cols() is 22, expected 21");
  CHECK(refused({x.data(), 3, d, d - 1}, {y.data(), 3, d}) ==
        "moeroute::soft_moe: x.stride is 20, expected at least 21");
  CHECK(refused({x.data(), 3, d}, {y.data(), 3, d, d - 1}) ==
        "moeroute::soft_moe: y.stride is 20, expected at least 21");
  row_matrix<float> both(6, d);
  CHECK(test::refusal([&] {
          layer.forward(matrix_view<const float>(both.data(), 3, d),
                        matrix_view<float>(both.data() + d, 3, d));
        }) == "moeroute::soft_moe: x and y overlap, expected memory of their own");
}

TEST_CASE("a soft plan is refused for another number of tokens or slots, and for shared memory") {
  soft_plan p;
  plan_soft(test::random_rows(5, 6, 12), 1, p);
  row_matrix<float> x(5, d), slots(6, d), six(6, d);
  CHECK(test::refusal([&] { dispatch(six, p, slots); }) ==
        "moeroute::dispatch: x.rows() is 6, expected 5");
  CHECK(test::refusal([&] { dispatch(x, p, x); }) ==
        "moeroute::dispatch: slots.rows() is 5, expected 6");
  CHECK(test::refusal([&] { combine(slots, p, six); }) ==
        "moeroute::combine: y.rows() is 6, expected 5");
  CHECK(test::refusal([&] { combine(slots, p, matrix_view<float>(slots.data(), 5, d)); }) ==
        "moeroute::combine: slots and y overlap, expected memory of their own");
  CHECK(test::refusal([&] { dispatch(matrix_view<const float>(slots.data(), 5, d), p, slots); }) ==
        "moeroute::dispatch: x and slots overlap, expected memory of their own");
}

TEST_CASE("a described soft mixture hands on every option that its line names") {
  const soft_moe_options plain = soft_options_of(parse_spec("E=4 selection=soft"));
  CHECK(plain.slots_per_expert == 1);
  CHECK(plain.logits == soft_logits::normalized);
  CHECK(plain.scale == 1.0f);
  const soft_moe_options own = soft_options_of(
      parse_spec("E=4 selection=soft slots_per_expert=3 slot_logits=product scale=2.5"));
  CHECK(own.slots_per_expert == 3);
  CHECK(own.logits == soft_logits::product);
  CHECK(own.scale == 2.5f);
}

}  // namespace soft_moe_test
