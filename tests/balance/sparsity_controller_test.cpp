#include <moeroute/balance/sparsity_controller.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/balance/expert_threshold.hpp>
#include <moeroute/balance/schedule.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/skewed.hpp"

using namespace moeroute;

TEST_CASE("lambda grows by the factor while too many experts are active, else shrinks") {
  lambda_controller c({.experts = 8, .k = 2});
  for (int i = 0; i < 10; ++i) c.update(5, 16);
  CHECK(std::abs(c.lambda() / (1e-8 * std::pow(1.2, 10)) - 1) < 1e-12);
  for (int i = 0; i < 10; ++i) c.update(3, 16);
  CHECK(std::abs(c.lambda() / 1e-8 - 1) < 1e-12);
  c.update(4, 16);  // on target
  CHECK(std::abs(c.lambda() * 1.2 / 1e-8 - 1) < 1e-12);
  lambda_controller held({.experts = 8, .k = 2, .equal = at_target::hold});
  held.update(4, 16);
  CHECK(held.lambda() == 1e-8);
  held.update(0, 0);
  CHECK(held.lambda() == 1e-8);
  held.update(3, 16);
  CHECK(held.lambda() == 1e-8 / 1.2);
  held.update(5, 16);
  CHECK(held.lambda() == 1e-8 / 1.2 * 1.2);
}

TEST_CASE("a floor bounds the way back from a dead phase") {
  const auto steps_back = [](double floor) {
    lambda_controller c({.experts = 8, .k = 2, .floor = floor});
    for (int i = 0; i < 500; ++i) c.update(0, 800);
    int steps = 0;
    for (; c.lambda() < 1e-6; ++steps) c.update(800, 800);
    return steps;
  };
  CHECK(steps_back(0.0) > 500);
  CHECK(steps_back(1e-8) < 30);
}

TEST_CASE("lambda stays at its ceiling and comes back from it at once") {
  lambda_controller c({.experts = 8, .k = 2, .start = 1.0, .ceiling = 1.5});
  c.update(16, 16);
  CHECK(c.lambda() == 1.2);
  for (int i = 0; i < 50; ++i) c.update(16, 16);
  CHECK(c.lambda() == 1.5);
  c.update(0, 16);
  CHECK(c.lambda() == 1.5 / 1.2);
  lambda_controller low({.experts = 8, .k = 2, .start = 1.0, .floor = 0.9});
  for (int i = 0; i < 50; ++i) low.update(0, 16);
  CHECK(low.lambda() == 0.9);
}

TEST_CASE("lambda settles descent on random logits near k active experts") {
  // Each place drifts up and is pushed down by lambda; noise moves it.
  test::random rng(9);
  const index_t tokens = 256, experts = 8;
  std::vector<double> z(static_cast<std::size_t>(tokens * experts));
  for (double& x : z) x = static_cast<double>(rng.normal());
  lambda_controller c({.experts = experts, .k = 2, .start = 1e-3});
  double mean = 0;
  for (int step = 0; step < 1500; ++step) {
    std::int64_t active = 0;
    for (double& x : z) {
      const bool on = x > 0;
      active += on;
      x += 0.02 * (0.0 - x) + 0.1 * static_cast<double>(rng.normal()) - (on ? c.lambda() : 0.0);
    }
    c.update(active, tokens * experts);
    if (step >= 1000) mean += static_cast<double>(active) / static_cast<double>(tokens) / 500;
  }
  CHECK(std::abs(mean - 2.0) < 0.1);
}

TEST_CASE("the target controller steers the mean number of experts and keeps its bounds") {
  for (const target_rule rule : {target_rule::proportional, target_rule::sign}) {
    target_controller c({.start = 0.1f, .target = 3.0f, .step = 0.02f, .rule = rule});
    double p = 0;
    for (int step = 0; step < 400; ++step) {
      p = static_cast<double>(c.value());
      c.update(static_cast<std::int64_t>(1000 * (1 + 7 * p * p)), 1000);
    }
    CHECK(std::abs(1 + 7 * p * p - 3) < 0.25);
  }
  target_controller stuck({.target = 3.0f});
  for (int step = 0; step < 1000; ++step) stuck.update(0, 10);
  CHECK(stuck.value() == 1.0f);
  stuck.update(0, 0);
  CHECK(stuck.value() == 1.0f);
}

TEST_CASE(
    "a controlled value is held by its bounds wherever they lie; one step is as long as it says") {
  target_controller low({.start = -2.0f, .least = -3.0f, .most = -1.5f});
  low.update(1, 1);  // by a hundredth: 0.02 times half of the target
  CHECK(std::abs(low.value() + 1.99f) < 1e-6f);
  for (int step = 0; step < 100; ++step) low.update(0, 1);
  CHECK(low.value() == -1.5f);
  for (int step = 0; step < 1000; ++step) low.update(9, 1);
  CHECK(low.value() == -3.0f);
  target_controller steps({.target = 3.0f, .step = 0.25f, .rule = target_rule::sign});
  steps.update(6, 2);  // on target
  CHECK(steps.value() == 0.5f);
  steps.update(5, 2);
  CHECK(steps.value() == 0.75f);
  steps.update(7, 2);
  CHECK(steps.value() == 0.5f);
}

TEST_CASE("thresholds give each expert its share of tokens that it has not seen") {
  expert_thresholds th(16, {.k = 4.0f, .ema = 0.9f});
  workspace ws;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    th.observe(test::skewed_scores(seed).view(), ws);
    th.update();
  }
  const test::skewed_scores fresh(77);
  double all = 0;
  for (std::size_t e = 0; e < 16; ++e) {
    double n = 0;
    for (std::size_t t = 0; t < 1024; ++t) n += fresh.score[t * 16 + e] > th.thresholds()[e];
    CHECK(std::abs(n / 1024 - 0.25) < 0.06);
    all += n / 1024;
    CHECK(th.bias()[e] == -th.thresholds()[e]);
  }
  CHECK(std::abs(all - 4) < 0.25);
}

TEST_CASE("the first threshold is the batch's own, and batches without a whole token have none") {
  const std::vector<float> s{1, 5, 2, 6, 3, 7, 4, 8};
  workspace ws;
  expert_thresholds th(2, {.k = 1.0f});
  th.observe(matrix_view<const float>(s.data(), 1, 2), ws);
  th.update();
  CHECK(th.thresholds()[0] == 0.0f);
  expert_thresholds best(2, {.k = 1.0f});  // of two tokens one for each: the best
  best.observe(matrix_view<const float>(s.data(), 2, 2), ws);
  best.update();
  CHECK(best.thresholds()[0] == 2.0f);
  CHECK(best.thresholds()[1] == 6.0f);
  th.observe(matrix_view<const float>(s.data(), 4, 2), ws);
  th.update();
  CHECK(th.thresholds()[0] == 3.0f);
  CHECK(th.thresholds()[1] == 7.0f);
  th.observe(matrix_view<const float>(s.data(), 4, 2), std::vector<std::uint8_t>(4, 0), ws);
  th.update();
  CHECK(th.thresholds()[0] == 3.0f);
}

TEST_CASE(
    "a threshold keeps its share of the old one; masked tokens and their scores do not count") {
  // The q-th largest of each column, q = k T / E.
  const std::vector<float> s{1, 5, 2, 6, 900, 900, 3, 7, 4, 8};
  const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1};
  workspace ws;
  expert_thresholds th(2, {.k = 1.0f, .ema = 0.75f});
  th.observe(matrix_view<const float>(s.data(), 5, 2), mask, ws);
  th.update();
  CHECK(th.thresholds()[0] == 3.0f);
  CHECK(th.thresholds()[1] == 7.0f);
  const std::vector<float> higher{11, 15, 12, 16, 13, 17, 14, 18};
  th.observe(matrix_view<const float>(higher.data(), 4, 2), ws);
  th.observe(matrix_view<const float>(higher.data(), 2, 2), ws);  // 12 and 16; the mean is 12.5
  th.update();
  CHECK(th.thresholds()[0] == 0.75f * 3.0f + 0.25f * 12.5f);
  CHECK(th.thresholds()[1] == 0.75f * 7.0f + 0.25f * 16.5f);
  th.update();  // nothing was seen since
  CHECK(th.thresholds()[0] == 0.75f * 3.0f + 0.25f * 12.5f);
}

TEST_CASE("annealing holds its ends and passes the middle as its shape says") {
  annealing a{.from = 2, .to = 8, .begin = 10, .end = 20};
  for (const anneal_shape shape : {anneal_shape::linear, anneal_shape::cosine,
                                   anneal_shape::exponential, anneal_shape::step}) {
    a.shape = shape;
    a.check();
    CHECK(a.at(0) == 2);
    CHECK(a.at(20) == 8);
    CHECK(a.at(1000) == 8);
    for (int step = 0; step < 30; ++step) CHECK(a.at(step + 1) >= a.at(step));
  }
  a.shape = anneal_shape::linear;
  CHECK(a.at(15) == 5);
  CHECK(a.k_at(15, 4) == 4);
  a.shape = anneal_shape::exponential;
  CHECK(std::abs(a.at(15) - 4) < 1e-12);
  // Without a way between them `to` holds from the step itself on.
  a.begin = a.end = 12;
  CHECK(a.at(11) == 2);
  CHECK(a.at(12) == 8);
  a.from = 0;
  CHECK(test::refusal([&] { a.check(); }) ==
        "moeroute::annealing: from and to of an exponential must be positive");
  CHECK(capacity_factors{}.at(routing_phase::training) == 1.25);
  CHECK(capacity_factors{}.at(routing_phase::evaluation) == 2.0);
}

TEST_CASE("k of an annealing is the nearest in 1 to E; halves go away from zero") {
  const annealing a{.from = -1, .to = 5, .begin = 0, .end = 12};
  const index_t expected[] = {1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4};  // -1, -0.5, 0, ... 5
  for (int step = 0; step <= 12; ++step) CHECK(a.k_at(step, 4) == expected[step]);
}

TEST_CASE("an annealing without a way is at its end from its only step on; a step waits") {
  const annealing sudden{.from = 2, .to = 8, .begin = 10, .end = 10};
  CHECK(sudden.at(9) == 2);
  CHECK(sudden.at(10) == 8);
  const annealing step{.from = 2, .to = 8, .begin = 0, .end = 10, .shape = anneal_shape::step};
  CHECK(step.at(9) == 2);
  CHECK(step.at(10) == 8);
  const annealing wave{.from = 2, .to = 8, .begin = 0, .end = 10, .shape = anneal_shape::cosine};
  CHECK(std::abs(wave.at(5) - 5.0) < 1e-12);
  CHECK(std::abs(wave.at(2) - (5.0 - 3.0 * std::cos(0.2 * std::acos(-1.0)))) < 1e-12);
  // An end is that number itself, wherever the other is.
  const annealing wide{.from = -1.5e308, .to = 1.5e308, .begin = 0, .end = 10};
  CHECK((wide.at(0) == -1.5e308 && wide.at(10) == 1.5e308));
}

TEST_CASE("the six layer schedules have their ends, order and symmetry") {
  const layer_schedule_options o{.layers = 9, .least = 4, .most = 20};
  const auto at = [&](layer_schedule s, index_t layer) { return experts_of_layer(s, layer, o); };
  for (index_t l = 0; l < 9; ++l) {
    CHECK(at(layer_schedule::uniform, l) == 20);
    CHECK(at(layer_schedule::descending, l) == at(layer_schedule::ascending, 8 - l));
    CHECK(at(layer_schedule::pyramid_up, l) == at(layer_schedule::pyramid_up, 8 - l));
    CHECK(at(layer_schedule::pyramid_up, l) + at(layer_schedule::pyramid_down, l) == 24);
    CHECK(at(layer_schedule::wave, l) >= 4);
    CHECK(at(layer_schedule::wave, l) <= 20);
    if (l > 0) CHECK(at(layer_schedule::ascending, l) > at(layer_schedule::ascending, l - 1));
  }
  CHECK(at(layer_schedule::descending, 0) == 20);
  CHECK(at(layer_schedule::descending, 8) == 4);
  CHECK(at(layer_schedule::pyramid_up, 4) == 20);
  CHECK(at(layer_schedule::wave, 2) == 20);
  CHECK(at(layer_schedule::wave, 6) == 4);
  CHECK(experts_of_layer(layer_schedule::ascending, 0, {.layers = 1, .least = 2, .most = 3}) == 2);
}

TEST_CASE("a wave has as many waves as it says; capacity factors are those of the phase") {
  const double pi = std::acos(-1.0);
  for (const double waves : {0.5, 1.5, 3.0})
    for (index_t layer = 0; layer < 11; ++layer) {
      const double share =
          0.5 * (1.0 + std::sin(2.0 * pi * waves * static_cast<double>(layer) / 10.0));
      const index_t found = experts_of_layer(
          layer_schedule::wave, layer, {.layers = 11, .least = 3, .most = 1002, .waves = waves});
      CHECK(std::abs(static_cast<double>(found) - (3.0 + 999.0 * share)) < 0.5 + 1e-9);
    }
  const capacity_factors own{.training = 1.5, .evaluation = 3.0};
  CHECK(own.at(routing_phase::training) == 1.5);
  CHECK(own.at(routing_phase::evaluation) == 3.0);
}

TEST_CASE("controllers of sparsity refuse what makes no sense") {
  CHECK(test::refusal([] { lambda_controller({.experts = 2, .k = 3}); }) ==
        "moeroute::lambda_controller: k is 3.000000, expected 0.000000 to 2.000000");
  CHECK(test::refusal([] { lambda_controller({.factor = 0.5}); }) ==
        "moeroute::lambda_controller: factor is 0.500000, expected 1.000000 to 1000000.000000");
  CHECK(test::refusal([] { lambda_controller({}).update(3, 2); }) ==
        "moeroute::lambda_controller: active is 3, expected 0 to 2");
  CHECK(test::refusal([] { target_controller({.start = 2.0f}); }) ==
        "moeroute::target_controller: start is 2.000000, expected 0.000000 to 1.000000");
  CHECK(test::refusal([] { expert_thresholds(2, {.k = std::nanf("")}); }) ==
        "moeroute::expert_thresholds: k is nan, expected 0.000001 to 2.000000");
  CHECK(test::refusal([] { expert_thresholds(0, {}); }) ==
        "moeroute::expert_thresholds: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([] { experts_of_layer(layer_schedule::wave, 2, {.layers = 2}); }) ==
        "moeroute::experts_of_layer: layer is 2, expected 0 to 1");
}

TEST_CASE("with every option at once thresholds are their formula, observation after observation") {
  test::random rng(73);
  workspace ws;  // with whatever other shapes left in it
  for (int round = 0; round < 100; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(20);
    const auto E = static_cast<std::size_t>(experts);
    const expert_threshold_options o{
        .k = std::max(0.125f, static_cast<float>(experts) * rng.uniform()),
        .ema = coin() ? 0.75f : rng.uniform()};
    expert_thresholds th(experts, o);
    std::vector<double> expected(E, 0.0);
    bool first = true;
    for (int step = 0; step < 4; ++step) {
      std::vector<double> sum(E, 0.0), n(E, 0.0);
      for (std::int64_t batch = rng.below(3); batch > 0; --batch) {
        const index_t tokens = rng.below(30);
        std::vector<float> s;
        std::vector<std::uint8_t> mask;
        for (index_t i = 0; i < tokens * experts; ++i)
          s.push_back(rng.below(20) == 0 ? std::nanf("") : rng.normal());
        for (index_t t = 0; t < tokens; ++t)
          mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
        const bool masked = coin();
        th.observe(matrix_view<const float>(s.data(), tokens, experts),
                   masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>(),
                   ws);
        double live = 0.0;
        for (std::size_t t = 0; t < mask.size(); ++t) live += !masked || mask[t] != 0;
        const auto rank =
            static_cast<index_t>(static_cast<double>(o.k) * live / static_cast<double>(experts));
        for (std::size_t e = 0; e < E && rank > 0; ++e) {
          std::vector<double> column;
          for (std::size_t t = 0; t < mask.size(); ++t)
            if ((!masked || mask[t] != 0) && std::isfinite(s[t * E + e]))
              column.push_back(static_cast<double>(s[t * E + e]));
          const double estimate = test::nth_largest(column, rank);
          if (!std::isfinite(estimate)) continue;
          sum[e] += estimate;
          n[e] += 1.0;
        }
      }
      CHECK(test::difference(th.sums().first(E), sum, 1e-9, 1e-9) == "");
      CHECK(test::difference(th.sums().subspan(E), n, 0.0) == "");
      th.update();
      bool any = false;
      for (std::size_t e = 0; e < E; ++e) {
        if (n[e] == 0.0) continue;
        const double keep = first ? 0.0 : static_cast<double>(o.ema);
        expected[e] = keep * expected[e] + (1.0 - keep) * (sum[e] / n[e]);
        any = true;
      }
      if (any) first = false;
      INFO("round " << round << " step " << step << " E=" << experts << " k=" << o.k);
      CHECK(test::difference(th.thresholds(), expected, 1e-5, 1e-6) == "");
      for (std::size_t e = 0; e < E; ++e) REQUIRE(th.bias()[e] == -th.thresholds()[e]);
    }
  }
}
