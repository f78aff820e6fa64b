#include <moeroute/balance/loss_token.hpp>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/balance/loss_count.hpp>
#include <span>
#include <vector>

#include "support/loss_agreement.hpp"
#include "support/refusal.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;

namespace {

row shifted(row z, double by) {
  for (double& x : z) x += by;
  return z;
}

}  // namespace

TEST_CASE("losses of tokens are their formulas, and their gradients the derivatives") {
  for (const bool masked : {false, true})
    for (const index_t experts : {1, 7, 16, 33}) {
      const auto b = test::random_batch(41, experts > 16 ? 7 : 20, experts, masked);
      CHECK(test::disagreement(
                b, {}, router_z_loss{.coefficient = 0.2},
                [](const oracle::batch& x) { return 0.2 * oracle::router_z_loss(x); }) == "");
      CHECK(test::disagreement(
                b, {}, token_entropy_loss{.coefficient = 0.2}, [](const oracle::batch& x) {
                  return 0.2 * oracle::mean_of(oracle::probabilities(x), oracle::entropy);
                }) == "");
      CHECK(
          test::disagreement(b, {}, sparsity_loss{.coefficient = 0.2}, [](const oracle::batch& x) {
            return 0.2 * oracle::mean_of(oracle::probabilities(x), oracle::sparsity);
          }) == "");
      for (const double q : {0.5, 1.1, 1.5, 2.0, 3.5})
        CHECK(test::disagreement(
                  b, {}, tsallis_loss{.coefficient = 0.2, .q = q}, [q](const oracle::batch& x) {
                    return 0.2 * oracle::mean_of(oracle::probabilities(x), [q](const row& p) {
                             return oracle::tsallis(p, q);
                           });
                  }) == "");
    }
}

TEST_CASE("the gradient of the z-loss sums to 2 c lse / T in each row, all others to 0") {
  const auto b = test::random_batch(43, 6, 12);
  const auto z = test::run_losses<double>(b, {}, router_z_loss{.coefficient = 0.3});
  for (index_t t = 0; t < 6; ++t) {
    double sum = 0.0;
    for (std::size_t e = 0; e < 12; ++e) sum += z.gradient[static_cast<std::size_t>(t) * 12 + e];
    CHECK(sum == Approx(2.0 * 0.3 * oracle::log_sum_exp(b.of(t)) / 6.0).epsilon(1e-10));
  }
}

TEST_CASE("the z-loss does not pull where the logits' lse is 0") {
  const oracle::batch b{2, 4, row(8, -std::log(4.0)), {}};
  const auto run = test::run_losses<double>(b, {}, router_z_loss{.coefficient = 1.0});
  CHECK(run.values[0] == Approx(0.0).margin(1e-28));
  CHECK(test::difference(run.gradient, row(8, 0.0), 0.0, 1e-15) == "");
}

TEST_CASE(
    "entropy, Tsallis entropy and sparsity end where one expert or all experts have the mass") {
  const auto values = [](const row& z) {
    const oracle::batch b{3, 9, z, {}};
    return test::run_losses<double>(b, {}, token_entropy_loss{.coefficient = 1.0},
                                    tsallis_loss{.coefficient = 1.0, .q = 1.5},
                                    sparsity_loss{.coefficient = 1.0})
        .values;
  };
  const auto even = values(row(27, 3.0));
  CHECK(even[0] == Approx(std::log(9.0)));
  CHECK(even[1] == Approx((1.0 - std::pow(9.0, -0.5)) / 0.5));
  CHECK(even[2] == Approx(3.0));
  row one(27, 0.0);
  for (std::size_t t = 0; t < 3; ++t) one[t * 9 + 4] = 900.0;
  const auto sharp = values(one);
  CHECK(sharp[0] == Approx(0.0).margin(1e-12));
  CHECK(sharp[1] == Approx(0.0).margin(1e-12));
  CHECK(sharp[2] == Approx(1.0));
}

TEST_CASE("Tsallis entropy nears Shannon's as q nears 1") {
  const auto b = test::random_batch(45, 5, 10);
  const auto run = test::run_losses<double>(b, {}, token_entropy_loss{.coefficient = 1.0});
  const auto near = test::run_losses<double>(b, {}, tsallis_loss{.coefficient = 1.0, .q = 1.002});
  CHECK(near.values[0] == Approx(run.values[0]).epsilon(5e-3));
}

TEST_CASE("a shift of all logits changes no loss of probabilities") {
  const auto b = test::random_batch(47, 5, 10);
  oracle::batch moved = b;
  moved.logits = shifted(b.logits, 7.0);
  const auto run = [](const oracle::batch& x) {
    return test::run_losses<double>(x, {}, token_entropy_loss{.coefficient = 1.0},
                                    tsallis_loss{.coefficient = 1.0}, sparsity_loss{});
  };
  CHECK(run(moved).values.total() == Approx(run(b).values.total()).epsilon(1e-12));
  CHECK(test::difference(run(moved).gradient, run(b).gradient, 1e-9, 1e-14) == "");
}

TEST_CASE("arguments of losses of tokens are refused by name") {
  const auto b = test::random_batch(49, 4, 6);
  const auto refusal = [&](const auto&... loss) {
    return test::refusal([&] { test::run_losses<double>(b, {}, loss...); });
  };
  CHECK(refusal(router_z_loss{.coefficient = -1.0}) ==
        "moeroute::router_z_loss: coefficient is -1.000000, expected >= 0");
  CHECK(refusal(token_entropy_loss{.coefficient = -1.0}) ==
        "moeroute::token_entropy_loss: coefficient is -1.000000, expected >= 0");
  CHECK(refusal(sparsity_loss{.coefficient = -1.0}) ==
        "moeroute::sparsity_loss: coefficient is -1.000000, expected >= 0");
  for (const double q : {1.0, 0.0, -0.5})
    CHECK(refusal(tsallis_loss{.q = q}) ==
          "moeroute::tsallis_loss: q is " + std::to_string(q) + ", expected > 0 and not 1");
  CHECK(refusal(tsallis_loss{.q = 2.0}, tsallis_loss{.q = 1.5}) ==
        "moeroute::balance_loss: q is 1.500000, expected 2.000000 as in the other loss");
  const loss_options sigmoid{.scores = probability::normalized_sigmoid};
  CHECK(test::refusal([&] { test::run_losses<double>(b, sigmoid, router_z_loss{}); }) ==
        "moeroute::balance_loss: scores are divided by their sum, expected the softmax for "
        "losses of rows");
}

TEST_CASE("told the tokens of the whole, parts with padding of their own add up to it") {
  const auto whole = test::random_batch(91, 24, 8);
  const auto value = [](const oracle::batch& b, std::span<const std::uint8_t> mask, double tokens,
                        row& gradient) {
    workspace ws;
    const std::vector<double> counts(8, 3.0),
        by_sequence(static_cast<std::size_t>(b.tokens / 6 * 8), 2.0);
    const double sequences = tokens > 0.0 ? 4.0 : 0.0;
    gradient.assign(b.logits.size(), 0.0);
    const auto values = balance_loss<double>(
        {.mask = mask, .sequence_length = 6},
        matrix_view<const double>(b.logits.data(), b.tokens, 8),
        matrix_view<double>(gradient.data(), b.tokens, 8), ws, serial{},
        router_z_loss{.coefficient = 0.3, .tokens = tokens},
        token_entropy_loss{.coefficient = 0.2, .tokens = tokens},
        tsallis_loss{.coefficient = 0.2, .q = 1.5, .tokens = tokens},
        sparsity_loss{.coefficient = 0.1, .tokens = tokens},
        device_loss{.counts = counts, .devices = 2, .tokens = tokens},
        communication_loss{.counts = {counts.data(), 2}, .tokens = tokens},
        specialisation_loss{.sharpness = 0.5, .counts = counts, .tokens = tokens},
        sequence_loss{.counts = {by_sequence.data(), b.tokens / 6, 8}, .sequences = sequences});
    return std::vector<double>(values.value.begin(), values.value.end());
  };
  // The first part has a padded end: 7 of its 12 tokens count, in both of its sequences.
  std::vector<std::uint8_t> mask(24, 1);
  for (const std::size_t t : {4u, 5u, 9u, 10u, 11u}) mask[t] = 0;
  row all, first, second;
  const auto together = value(whole, mask, 0.0, all);
  oracle::batch a = whole, b = whole;
  a.tokens = b.tokens = 12;
  a.logits.assign(whole.logits.begin(), whole.logits.begin() + 96);
  b.logits.assign(whole.logits.begin() + 96, whole.logits.end());
  auto sum = value(a, std::span(mask).first(12), 19.0, first);
  const auto rest = value(b, std::span(mask).last(12), 19.0, second);
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += rest[i];
  CHECK(test::difference(sum, together, 1e-12) == "");
  first.insert(first.end(), second.begin(), second.end());
  CHECK(test::difference(first, all, 1e-12, 1e-15) == "");
}

TEST_CASE("losses of the same function of a row add up, whatever their coefficients") {
  const auto b = test::random_batch(93, 20, 18, true);
  const row counts(18, 2.0);
  const auto pull = [&]<class F>(F, const auto&... losses) {
    return test::run_losses<F>(b, {}, losses...).gradient;
  };
  const auto together = [&]<class F>(F, const auto& one, const auto& other, double tolerance) {
    auto sum = pull(F{}, one);
    const auto second = pull(F{}, other);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += second[i];
    return test::difference(pull(F{}, one, other), sum, tolerance, 0.01 * tolerance);
  };
  const auto both = [&](const auto& one, const auto& other) {
    CHECK(together(double{}, one, other, 1e-10) == "");
    CHECK(together(float{}, one, other, 1e-4) == "");
  };
  both(router_z_loss{.coefficient = 0.5}, router_z_loss{.coefficient = 0.2});
  both(token_entropy_loss{.coefficient = 0.5},
       specialisation_loss{.coefficient = 0.1, .sharpness = 0.3, .counts = counts});
  both(tsallis_loss{.coefficient = 0.5, .q = 1.5}, tsallis_loss{.coefficient = 0.2, .q = 1.5});
  both(sparsity_loss{.coefficient = 0.5}, sparsity_loss{.coefficient = 0.2});
}

TEST_CASE("a whole may be one token: a mean over it is as many times as large") {
  const auto b = test::random_batch(95, 5, 4);
  const row counts{4.0, 1.0, 3.0, 2.0};
  const auto of = [&](double whole) {
    return test::run_losses<double>(
               b, {.sequence_length = 5}, router_z_loss{.tokens = whole},
               token_entropy_loss{.tokens = whole}, tsallis_loss{.tokens = whole},
               sparsity_loss{.tokens = whole},
               specialisation_loss{.sharpness = 0.5, .counts = counts, .tokens = whole},
               switch_loss{.counts = counts, .tokens = whole},
               device_loss{.counts = counts, .devices = 2, .tokens = whole},
               communication_loss{.counts = {counts.data(), 2}, .tokens = whole},
               sequence_loss{.counts = {counts.data(), 1, 4}, .sequences = 0.2 * whole})
        .values;
  };
  const auto five = of(5.0), one = of(1.0), none = of(0.0);
  for (std::size_t i = 0; i < 9; ++i) {
    const double power = i < 5 || i == 8 ? 5.0 : 25.0;
    CHECK(five[i] == Approx(none[i]).epsilon(1e-12));
    CHECK(one[i] == Approx(power * five[i]).epsilon(1e-12));
  }
  // Counts that are all 0 say nothing.
  const row zero(4, 0.0);
  const auto silent = test::run_losses<double>(b, {}, specialisation_loss{.counts = zero});
  CHECK(silent.values[0] == 0.0);
  CHECK(silent.gradient == row(20, 0.0));
}
