#include "support/query_routing.hpp"

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <numeric>
#include <vector>

#include "support/random.hpp"

namespace query_routing_test {

using namespace example;

namespace {

const model_table& table() {
  static const model_table t(4000);
  return t;
}

}  // namespace

TEST_CASE(
    "by cost: the best model of all where cost is nothing, the cheapest where it is everything") {
  const model_table& t = table();
  const std::vector<float> cost{0.1f, 0.2f, 0.4f, 0.8f};
  double before = 1e300;
  for (const float mu : {0.0f, 0.2f, 0.4f, 0.6f, 0.9f}) {
    const std::vector<expert_id> chosen = by_cost(t.qualities(), cost, mu);
    double spent = 0.0;
    for (index_t q = 0; q < t.queries; ++q) {
      const auto worth = [&](expert_id m) {
        return (1.0 - double{mu}) * double{t.qualities()(q, m)} -
               double{mu} * double{cost[static_cast<std::size_t>(m)]};
      };
      const expert_id m = chosen[static_cast<std::size_t>(q)];
      for (expert_id other = 0; other < 4; ++other) REQUIRE(worth(m) >= worth(other) - 1e-6);
      spent += double{cost[static_cast<std::size_t>(m)]};
    }
    CHECK(spent < before);
    before = spent;
  }
  const auto cheapest = by_cost(t.qualities(), cost, 0.95f);
  CHECK(std::count(cheapest.begin(), cheapest.end(), 0) == t.queries);
}

TEST_CASE("by threshold: the strong model exactly where it is likely enough to win") {
  test::random rng(5);
  std::vector<float> win;
  for (int q = 0; q < 500; ++q) win.push_back(rng.uniform());
  for (const float threshold : {0.0f, 0.3f, 0.5f, 0.9f}) {
    const auto chosen = by_threshold({win.data(), 500, 1}, threshold);
    for (std::size_t q = 0; q < win.size(); ++q) CHECK(chosen[q] == (win[q] > threshold ? 1 : 0));
  }
}

TEST_CASE("a cascade asks until a model is sure, and pays for all that it asked") {
  constexpr index_t models = 3, queries = 200, answers = 6;
  test::random rng(6);
  std::vector<float> z;
  for (index_t i = 0; i < models * queries * answers; ++i) z.push_back(2.0f * rng.normal());
  const auto logits = [&](index_t m, index_t q) {
    return std::span<const float>(z).subspan(static_cast<std::size_t>((m * queries + q) * answers),
                                             answers);
  };
  const auto entropy = [&](index_t m, index_t q) {
    double sum = 0.0, weighted = 0.0;
    for (const float v : logits(m, q)) sum += std::exp(double{v});
    for (const float v : logits(m, q))
      weighted += std::exp(double{v}) / sum * (double{v} - std::log(sum));
    return -weighted;
  };
  for (const double most : {-1.0, 0.5, 1.0, 9.0}) {
    index_t calls = 0, expected_calls = 0;
    const auto chosen = cascade(models, queries, most, logits, calls);
    for (index_t q = 0; q < queries; ++q) {
      expert_id m = 0;
      while (m + 1 < models && entropy(m, q) > most) ++m;
      CHECK(chosen[static_cast<std::size_t>(q)] == m);
      expected_calls += m + 1;
    }
    CHECK(calls == expected_calls);
  }
}

TEST_CASE("a linear bandit's inverse is A^-1, and it finds the best model of each kind of query") {
  constexpr index_t width = 4, models = 3;
  linear_bandit bandit(models, width, 0.5);
  test::random rng(7);
  std::vector<double> a(width * width);  // of model 1
  for (std::size_t i = 0; i < width; ++i) a[i * width + i] = 1.0;
  int right = 0;
  for (int step = 0; step < 3000; ++step) {
    std::vector<double> x(width);
    for (double& v : x) v = double{rng.uniform()};
    const double worth[] = {x[0], x[1], 0.5 * (x[2] + x[3])};
    const expert_id m = bandit.choose(x);
    bandit.learn(m, x, worth[m] + 0.1 * double{rng.normal()});
    if (m == 1)
      for (std::size_t i = 0; i < width; ++i)
        for (std::size_t j = 0; j < width; ++j) a[i * width + j] += x[i] * x[j];
    if (step >= 2000) right += worth[m] > *std::max_element(worth, worth + 3) - 0.05;
  }
  CHECK(right > 900);
  const std::vector<double>& inverse = bandit.inverse(1);
  for (std::size_t i = 0; i < width; ++i)
    for (std::size_t j = 0; j < width; ++j) {
      double product = 0.0;
      for (std::size_t c = 0; c < width; ++c) product += a[i * width + c] * inverse[c * width + j];
      CHECK(std::abs(product - (i == j ? 1.0 : 0.0)) < 1e-9);
    }
}

TEST_CASE(
    "prices of budgets serve more than the best model while it lasts, and are nearly optimal") {
  const model_table& t = table();
  const served greedy = serve_greedily(t), priced = serve_by_prices(t, 0.1);
  for (std::size_t m = 0; m < 4; ++m) {
    CHECK(greedy.spent[m] <= t.budget[m]);
    CHECK(priced.spent[m] <= t.budget[m]);
  }
  INFO(greedy.queries << " " << greedy.quality << " to " << priced.queries << " "
                      << priced.quality);
  CHECK(priced.quality > 1.25 * greedy.quality);
  CHECK(static_cast<double>(priced.queries) > 1.35 * static_cast<double>(greedy.queries));
  // No other prices have a much lower objective: a grid and random points.
  const auto first = t.qualities().middle_rows(0, 400), cost = t.costs().middle_rows(0, 400);
  const auto gamma = dual_prices_of_models::learn(first, cost, t.budget, 0.1, 1.0);
  const double found = dual_prices_of_models::value(first, cost, t.budget, 0.1, 1.0, gamma);
  test::random rng(8);
  for (int i = 0; i < 2000; ++i) {
    std::vector<double> other(4);
    for (std::size_t m = 0; m < 4; ++m)
      other[m] = i % 2 == 0 ? double{rng.uniform()}
                            : std::clamp(gamma[m] + 0.1 * double{rng.normal()}, 0.0, 1.0);
    CHECK(found < 1.002 * dual_prices_of_models::value(first, cost, t.budget, 0.1, 1.0, other));
  }
}

}  // namespace query_routing_test
