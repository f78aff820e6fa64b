#include <moeroute/balance/loss_sums.hpp>

#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <utility>
#include <vector>

#include "support/guarded.hpp"
#include "support/loss_agreement.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;

TEST_CASE("importance is CV^2 of the summed probabilities, by either variance") {
  for (const bool masked : {false, true})
    for (const auto kind : {variance::population, variance::unbiased}) {
      const auto b = test::random_batch(31, 12, 21, masked);
      CHECK(test::disagreement(b, {}, importance_loss{.coefficient = 0.4, .kind = kind},
                               [&](const oracle::batch& x) {
                                 return 0.4 * oracle::importance_loss(oracle::probabilities(x),
                                                                      kind == variance::unbiased);
                               }) == "");
    }
}

TEST_CASE("mean importance and batch entropy are their formulas") {
  for (const index_t experts : {1, 16, 18, 65}) {
    const auto b = test::random_batch(33, 11, experts, true);
    CHECK(test::disagreement(b, {}, mean_importance_loss{.coefficient = 0.4},
                             [](const oracle::batch& x) {
                               return 0.4 * oracle::mean_importance_loss(oracle::probabilities(x));
                             }) == "");
    CHECK(test::disagreement(
              b, {}, batch_entropy_loss{.coefficient = 0.4}, [&](const oracle::batch& x) {
                return -0.4 * oracle::entropy(oracle::mean(oracle::probabilities(x),
                                                           static_cast<std::size_t>(experts)));
              }) == "");
  }
}

TEST_CASE("sums of normalised sigmoids are differentiated through the normalisation") {
  const auto b = test::random_batch(35, 7, 17);
  const loss_options how{.scores = probability::normalized_sigmoid};
  CHECK(test::disagreement(b, how, importance_loss{.coefficient = 1.0}, [](const oracle::batch& x) {
          return oracle::importance_loss(
              oracle::probabilities(x, oracle::normalized_sigmoid, 0, x.tokens), false);
        }) == "");
}

TEST_CASE("at balance CV^2 is 0, mean importance 1, batch entropy -ln E, and nothing pulls") {
  const oracle::batch b{6, 8, row(48, -1.5), {}};
  const auto run = test::run_losses<double>(b, {}, importance_loss{.coefficient = 1.0},
                                            mean_importance_loss{.coefficient = 1.0},
                                            batch_entropy_loss{.coefficient = 1.0});
  CHECK(run.values[0] == Approx(0.0).margin(1e-15));
  CHECK(run.values[1] == Approx(1.0).epsilon(1e-12));
  CHECK(run.values[2] == Approx(-std::log(8.0)).epsilon(1e-12));
  CHECK(test::difference(run.gradient, row(48, 0.0), 0.0, 1e-15) == "");
}

TEST_CASE("with everything on one expert CV^2 is E - 1, or E unbiased, and mean importance E") {
  oracle::batch b{5, 6, row(30, -200.0), {}};
  for (std::size_t t = 0; t < 5; ++t) b.logits[t * 6 + 2] = 200.0;
  const auto run = test::run_losses<double>(
      b, {}, importance_loss{.coefficient = 1.0, .eps = 0.0},
      importance_loss{.coefficient = 1.0, .kind = variance::unbiased, .eps = 0.0},
      mean_importance_loss{.coefficient = 1.0}, batch_entropy_loss{.coefficient = 1.0});
  CHECK(run.values[0] == Approx(5.0).epsilon(1e-12));
  CHECK(run.values[1] == Approx(6.0).epsilon(1e-12));
  CHECK(run.values[2] == Approx(6.0).epsilon(1e-12));
  CHECK(run.values[3] == Approx(0.0).margin(1e-12));
}

TEST_CASE("CV^2 does not change with the scale of its input, so its slope is orthogonal to it") {
  const double x[] = {1.0, 4.0, 2.5, 0.5, 3.0};
  double c[5] = {}, scaled[5] = {}, twice[5];
  for (int e = 0; e < 5; ++e) twice[e] = 2.0 * x[e];
  for (const auto kind : {variance::population, variance::unbiased}) {
    std::fill_n(c, 5, 0.0);
    const double value = detail::squared_variation(1.0, kind, 0.0, 5, x, c);
    CHECK(detail::squared_variation(1.0, kind, 0.0, 5, twice, scaled) == Approx(value));
    double along = 0.0;
    for (int e = 0; e < 5; ++e) along += x[e] * c[e];
    CHECK(along == Approx(0.0).margin(1e-14));
  }
}

TEST_CASE("one expert has no variance: unbiased is 0, not 0 / 0") {
  const oracle::batch b{3, 1, row(3, 0.5), {}};
  const auto run = test::run_losses<double>(
      b, {}, importance_loss{.coefficient = 1.0, .kind = variance::unbiased},
      batch_entropy_loss{.coefficient = 1.0});
  CHECK(run.values.total() == 0.0);
  CHECK(run.gradient == row(3, 0.0));
}

TEST_CASE(
    "rows of NaN, -inf and +inf: float agrees with double, and broken rows have no gradient") {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const index_t experts : {13, 32}) {
    auto b = test::random_batch(36, 40, experts, true);
    const auto n = static_cast<std::size_t>(experts);
    for (std::size_t e = 0; e < n; ++e) {
      if (e % 3 == 0) b.logits[e] = std::nan("");
      b.logits[2 * n + e] = e % 2 != 0 ? std::nan("") : -infinity;
    }
    b.logits[3 * n + 1] = b.logits[3 * n + 4] = infinity;
    const auto run = [&](auto number, const loss_options& how) {
      return test::run_losses<decltype(number)>(b, how, importance_loss{.coefficient = 1.0},
                                                batch_entropy_loss{.coefficient = 1.0});
    };
    const auto exact = run(1.0, {}), single = run(1.0, {.gradient = gradient_to::add});
    const auto written = run(1.0f, {});
    CHECK(written.values.total() == Approx(exact.values.total()).epsilon(1e-5));
    CHECK(single.values.total() == exact.values.total());
    CHECK(test::difference(written.gradient, exact.gradient, 1e-4, 1e-7) == "");
    for (std::size_t e = 2 * n; e < 4 * n; ++e)
      if (written.gradient[e] != 0.0f) FAIL(e);
  }
}

TEST_CASE("arguments of losses of sums are refused by name") {
  const auto b = test::random_batch(37, 4, 6);
  const auto refusal = [&](const auto& loss) {
    return test::refusal([&] { test::run_losses<double>(b, {}, loss); });
  };
  CHECK(refusal(importance_loss{.coefficient = -1.0}) ==
        "moeroute::importance_loss: coefficient is -1.000000, expected >= 0");
  CHECK(refusal(importance_loss{.eps = -1.0}) ==
        "moeroute::importance_loss: eps is -1.000000, expected >= 0");
  CHECK(refusal(mean_importance_loss{.coefficient = std::nan("")}) ==
        "moeroute::mean_importance_loss: coefficient is nan, expected >= 0");
  CHECK(refusal(batch_entropy_loss{.coefficient = -2.0}) ==
        "moeroute::batch_entropy_loss: coefficient is -2.000000, expected >= 0");
}

TEST_CASE("importance of nearly even loads is that in double to a millionth") {
  test::random rng(97);
  for (const auto& [tokens, experts] :
       {std::pair<index_t, index_t>{64, 64}, {64, 256}, {1024, 8}, {64, 8}, {32, 8}, {16, 64}}) {
    oracle::batch b{tokens, experts, {}, {}};
    row lean;
    for (index_t e = 0; e < experts; ++e) lean.push_back(0.01 * static_cast<double>(rng.normal()));
    std::vector<float> single;
    for (index_t i = 0; i < tokens * experts; ++i) {
      const double z = lean[static_cast<std::size_t>(i % experts)];
      single.push_back(static_cast<float>(z + 0.01 * static_cast<double>(rng.normal())));
      b.logits.push_back(static_cast<double>(single.back()));
    }
    const double exact = oracle::importance_loss(oracle::probabilities(b), false);
    workspace ws;
    const double value =
        balance_loss_value<float>({}, matrix_view<const float>(single.data(), tokens, experts), ws,
                                  serial{}, importance_loss{.coefficient = 1.0})[0];
    INFO(tokens << " tokens, " << experts << " experts");
    CHECK(std::abs(value - exact) < 1e-6 * exact);
    // The sweep that keeps the probabilities for the gradient adds them up alike.
    std::vector<float> gradient(single.size());
    const double kept =
        balance_loss<float>({}, matrix_view<const float>(single.data(), tokens, experts),
                            matrix_view<float>(gradient.data(), tokens, experts), ws, serial{},
                            importance_loss{.coefficient = 1.0})[0];
    CHECK(std::abs(kept - exact) < 1e-6 * exact);
  }
}

TEST_CASE("a variance is of distances from the mean, and of nothing there is none") {
  // The mean is no double: what it is off by must not be multiplied with the loads.
  const double large[] = {1e8, 1e8, 1e8 + 1.0}, none[3] = {};
  double c[3] = {7.0, 7.0, 7.0};
  CHECK(detail::squared_variation(1e16, variance::population, 0.0, 3, large, c) ==
        Approx(2.0 / 9.0).epsilon(1e-6));
  double still[3] = {7.0, 7.0, 7.0};
  CHECK(detail::squared_variation(1.0, variance::population, 0.0, 3, none, still) == 0.0);
  CHECK(row(still, still + 3) == row(3, 7.0));
  // It reads and writes as many loads as there are.
  test::guarded<double> loads(3), slopes(3);
  for (const auto end : {test::guarded_end::front, test::guarded_end::back}) {
    double *const x = loads.window(3, end), *const slope = slopes.window(3, end);
    std::copy_n(large, 3, x);
    std::fill_n(slope, 3, 7.0);
    double again[3] = {7.0, 7.0, 7.0};
    CHECK(detail::squared_variation(1.0, variance::unbiased, 0.5, 3, x, slope) ==
          detail::squared_variation(1.0, variance::unbiased, 0.5, 3, large, again));
    CHECK(row(slope, slope + 3) == row(again, again + 3));
  }
}

TEST_CASE("an expert without any probability has no entropy and pulls at nobody") {
  auto b = test::random_batch(38, 9, 5);
  auto less = b;
  less.experts = 4;
  less.logits.clear();
  for (std::size_t t = 0; t < 9; ++t) {
    b.logits[5 * t + 4] = -HUGE_VAL;
    less.logits.insert(less.logits.end(), b.logits.begin() + static_cast<std::ptrdiff_t>(5 * t),
                       b.logits.begin() + static_cast<std::ptrdiff_t>(5 * t + 4));
  }
  const batch_entropy_loss loss{.coefficient = 1.0};
  const auto of = test::run_losses<double>(less, {}, loss);
  const auto with = test::run_losses<double>(b, {}, loss);
  const auto single = test::run_losses<float>(b, {}, loss);
  CHECK(with.values[0] == Approx(of.values[0]).epsilon(1e-12));
  CHECK(single.values[0] == Approx(of.values[0]).epsilon(1e-5));
  for (std::size_t t = 0; t < 9; ++t)
    for (std::size_t e = 0; e < 5; ++e) {
      const double expected = e == 4 ? 0.0 : of.gradient[4 * t + e];
      if (!(std::abs(with.gradient[5 * t + e] - expected) < 1e-14)) FAIL(t << " " << e);
      if (!(std::abs(static_cast<double>(single.gradient[5 * t + e]) - expected) < 1e-6))
        FAIL(t << " " << e);
    }
}
