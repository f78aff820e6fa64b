#include <moeroute/balance/loss_relu.hpp>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "support/gradient.hpp"
#include "support/losses.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;

namespace {

template <class F, class Exec = serial>
test::loss_run<F, 1> run(const oracle::batch& b, const relu_loss& loss, token_options how = {},
                         const Exec& exec = {}) {
  const std::vector<F> z(b.logits.begin(), b.logits.end());
  test::loss_run<F, 1> out;
  out.gradient.assign(z.size(), F(7));
  how.mask = b.mask;
  workspace ws;
  out.values.value[0] =
      relu_balance_loss(loss, how, matrix_view<const F>(z.data(), b.tokens, b.experts),
                        matrix_view<F>(out.gradient.data(), b.tokens, b.experts), ws, exec);
  return out;
}

}  // namespace

TEST_CASE("ReMoE's losses are their formulas and their gradients the derivatives") {
  for (const bool masked : {false, true})
    for (const index_t experts : {1, 15, 16, 37}) {
      auto b = test::random_batch(71, 90, experts, masked);
      for (double& x : b.logits)
        if (std::abs(x) < 0.01) x = 0.5;  // no difference crosses the bend at 0
      double plain = 0.0, n = 0.0;
      row counts(static_cast<std::size_t>(experts), 0.0), sums = counts;
      for (index_t t = 0; t < 90; ++t) {
        if (!b.live(t)) continue;
        n += 1.0;
        for (index_t e = 0; e < experts; ++e)
          if (b.at(t, e) > 0.0) {
            plain += b.at(t, e);
            counts[static_cast<std::size_t>(e)] += 1.0;
            sums[static_cast<std::size_t>(e)] += b.at(t, e);
          }
      }
      double weighted = 0.0;
      for (std::size_t e = 0; e < counts.size(); ++e)
        weighted += static_cast<double>(experts) / (1.0 * n) * counts[e] * sums[e] / n;
      const relu_loss l1{.coefficient = 0.3, .weighting = relu_weighting::plain};
      const relu_loss lb{.coefficient = 0.3};
      CHECK(run<double>(b, l1).values[0] == Approx(0.3 * plain / n).epsilon(1e-12));
      CHECK(run<double>(b, lb).values[0] == Approx(0.3 * weighted).epsilon(1e-12));
      for (const auto& loss : {l1, lb}) {
        CHECK(test::gradient_difference(b.logits, [&](const row& z, row* gradient) {
                oracle::batch moved = b;
                moved.logits = z;
                // Counts are constants: a difference that crossed 0 would move them.
                relu_loss fixed = loss;
                fixed.counts = counts;
                const auto r = run<double>(moved, fixed);
                if (gradient != nullptr) *gradient = run<double>(b, loss).gradient;
                return r.values[0];
              }) == "");
        const auto single = run<float>(b, loss);
        CHECK(single.values[0] == Approx(run<double>(b, loss).values[0]).epsilon(1e-5));
        CHECK(test::difference(single.gradient, run<double>(b, loss).gradient, 1e-6) == "");
        CHECK(test::bit_difference(run<float>(b, loss, {}, test::several_threads{3}).gradient,
                                   single.gradient) == "");
        const auto added = run<double>(b, loss, {.gradient = gradient_to::add});
        const auto written = run<double>(b, loss);
        for (std::size_t i = 0; i < added.gradient.size(); ++i)
          if (added.gradient[i] != Approx(7.0 + written.gradient[i]).epsilon(1e-14)) FAIL(i);
      }
    }
}

TEST_CASE("the tokens that a ReLU loss is told are those of the whole, be it one") {
  const auto b = test::random_batch(74, 3, 4);
  for (const auto weighting : {relu_weighting::plain, relu_weighting::load}) {
    const auto of = [&](double tokens) {
      return run<double>(b, {.coefficient = 1.0, .weighting = weighting, .tokens = tokens})
          .values[0];
    };
    const double power = weighting == relu_weighting::load ? 9.0 : 3.0;
    CHECK(of(3.0) == Approx(of(0.0)).epsilon(1e-12));
    CHECK(of(1.0) == Approx(power * of(3.0)).epsilon(1e-12));
  }
}

TEST_CASE("inactive, NaN and masked scores have no gradient; no token, no loss") {
  oracle::batch b{2, 3, {-1.0, std::nan(""), 0.0, 2.0, 1.0, 3.0}, {1, 0}};
  CHECK(run<float>(b, {.coefficient = 1.0}).gradient == std::vector<float>(6, 0.0f));
  b.mask = {0, 0};
  const auto r = run<float>(b, {.coefficient = 1.0});
  CHECK(r.values[0] == 0.0);
  CHECK(r.gradient == std::vector<float>(6, 0.0f));
  CHECK(run<float>({0, 3, {}, {}}, {.coefficient = 1.0}).values[0] == 0.0);
  CHECK(run<float>({0, 3, {}, {}}, {.coefficient = 1.0, .weighting = relu_weighting::plain})
            .values[0] == 0.0);
}

TEST_CASE("arguments of the ReLU loss are refused by name") {
  const auto b = test::random_batch(73, 3, 4);
  const row three(3, 1.0);
  CHECK(test::refusal([&] { run<float>(b, {.coefficient = -1.0}); }) ==
        "moeroute::relu_loss: coefficient is -1.000000, expected >= 0");
  CHECK(test::refusal([&] { run<float>(b, {.k = 5}); }) ==
        "moeroute::relu_loss: k is 5, expected 1 to 4");
  CHECK(test::refusal([&] { run<float>(b, {.counts = three}); }) ==
        "moeroute::relu_loss: counts.size is 3, expected 4");
}

TEST_CASE("with every option at once ReMoE's loss is its formula, and its gradient the slope") {
  test::random rng(75);
  for (int round = 0; round < 100; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t tokens = rng.below(140), experts = 1 + rng.below(20);
    oracle::batch b =
        test::random_batch(static_cast<std::uint64_t>(round), tokens, experts, coin());
    for (double& x : b.logits) {
      const auto odd = rng.below(30);
      if (odd < 2) x = odd == 0 ? std::nan("") : -HUGE_VAL;
    }
    row given;
    for (index_t e = 0; e < experts; ++e) given.push_back(static_cast<double>(rng.below(9)));
    relu_loss loss{.coefficient = 0.3,
                   .weighting = coin() ? relu_weighting::plain : relu_weighting::load,
                   .k = 1 + rng.below(experts),
                   .tokens = coin() ? 0.0 : 37.5};
    if (coin()) loss.counts = given;
    row sums(given.size(), 0.0), counts(given.size(), 0.0), gradient(b.logits.size(), 0.0);
    double live = 0.0, value = 0.0;
    for (index_t t = 0; t < tokens; ++t) live += b.live(t) ? 1.0 : 0.0;
    const auto there = [&](index_t t, index_t e) { return b.live(t) && b.at(t, e) > 0.0; };
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e)
        if (there(t, e)) {
          sums[static_cast<std::size_t>(e)] += b.at(t, e);
          counts[static_cast<std::size_t>(e)] += 1.0;
        }
    if (!loss.counts.empty()) counts = given;
    const double n = loss.tokens > 0.0 ? loss.tokens : live;
    for (index_t e = 0; e < experts; ++e) {
      const auto at = static_cast<std::size_t>(e);
      double slope = 0.3 / n;
      if (loss.weighting == relu_weighting::load)
        slope *= static_cast<double>(experts) * counts[at] / (static_cast<double>(loss.k) * n);
      if (sums[at] > 0.0) value += slope * sums[at];
      for (index_t t = 0; t < tokens; ++t)
        if (there(t, e)) gradient[static_cast<std::size_t>(t * experts + e)] = slope;
    }
    const auto to = static_cast<gradient_to>(rng.below(3));
    for (double& g : gradient)
      g = to == gradient_to::nowhere ? 7.0 : to == gradient_to::add ? 7.0 + g : g;
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << loss.k);
    const auto exact = run<double>(b, loss, {.gradient = to});
    CHECK(exact.values[0] == Approx(value).epsilon(1e-12));
    CHECK(test::difference(exact.gradient, gradient, 1e-12) == "");
    const auto single = run<float>(b, loss, {.gradient = to}, test::several_threads{3});
    CHECK(single.values[0] == Approx(value).epsilon(1e-5));
    CHECK(test::difference(single.gradient, gradient, 1e-6) == "");
  }
}
