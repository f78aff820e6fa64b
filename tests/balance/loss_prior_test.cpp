#include <moeroute/balance/loss_prior.hpp>

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

template <class Exec = serial>
double run(const oracle::batch& b, const row& z, const dirichlet_prior_loss& loss, row* gradient,
           gradient_to to = gradient_to::write, const Exec& exec = {}) {
  workspace ws;
  row unused(z.size());
  return dirichlet_prior(
      loss, {.gradient = to, .mask = b.mask},
      matrix_view<const double>(z.data(), b.tokens, b.experts),
      matrix_view<double>((gradient != nullptr ? *gradient : unused).data(), b.tokens, b.experts),
      ws, exec);
}

// The integral of x^(a-1) (1-x)^(b-1) by Simpson's rule after x = u^2, which tames a >= 1/2.
double slow_cdf(double a, double b, double x) {
  const auto integral = [&](double to) {
    const int n = 200000;
    const double end = std::sqrt(to), h = end / n;
    const auto f = [&](double u) {
      return 2.0 * std::pow(u, 2.0 * a - 1.0) * std::pow(1.0 - u * u, b - 1.0);
    };
    double sum = 0.0;
    for (int i = 0; i <= n; ++i) {
      const double u = i * h;
      if (i == n && to == 1.0) continue;
      sum += (i == 0 || i == n ? 1.0 : i % 2 != 0 ? 4.0 : 2.0) * f(u);
    }
    return sum * h / 3.0;
  };
  return integral(x) / std::exp(std::lgamma(a) + std::lgamma(b) - std::lgamma(a + b));
}

}  // namespace

TEST_CASE("the beta distribution: closed forms, symmetry, and the integral of its density") {
  for (const double x : {0.0, 1e-6, 0.1, 0.37, 0.5, 0.9, 1.0}) {
    CHECK(beta_distribution(1, 1).cdf(x) == Approx(x).margin(1e-15));
    CHECK(beta_distribution(1, 3).cdf(x) == Approx(1.0 - std::pow(1.0 - x, 3)).margin(1e-14));
    CHECK(beta_distribution(2.5, 1).cdf(x) == Approx(std::pow(x, 2.5)).margin(1e-14));
    CHECK(beta_distribution(0.75, 11).cdf(x) ==
          Approx(1.0 - beta_distribution(11, 0.75).cdf(1.0 - x)).margin(1e-12));
  }
  for (const double a : {0.75, 1.5, 4.0})
    for (const double x : {0.05, 0.3, 0.8})
      CHECK(beta_distribution(a, 3.25).cdf(x) == Approx(slow_cdf(a, 3.25, x)).epsilon(1e-7));
  const beta_distribution beta(0.75, 5.0);
  CHECK(beta.pdf(0.2) ==
        Approx((beta.cdf(0.2 + 1e-5) - beta.cdf(0.2 - 1e-5)) / 2e-5).epsilon(1e-7));
}

TEST_CASE("the prior's loss is the squared distance of ranks, and its gradient the derivative") {
  for (const bool masked : {false, true}) {
    const auto b = test::random_batch(101, 20, 5, masked);
    const row alpha = {0.75, 1.0, 1.5, 0.75, 2.0};
    const dirichlet_prior_loss loss{.coefficient = 0.5, .alpha = alpha};
    const oracle::rows p = oracle::probabilities(b);
    const double n = static_cast<double>(p.size());
    double expected = 0.0;
    for (std::size_t e = 0; e < 5; ++e)
      for (const row& mine : p) {
        double rank = 0.0;
        for (const row& other : p) rank += other[e] <= mine[e];
        expected +=
            0.5 / (n * 5.0) *
            std::pow(rank / (n + 1.0) - beta_distribution(alpha[e], 6.0 - alpha[e]).cdf(mine[e]),
                     2);
      }
    row gradient(100, 7.0), other(100, 7.0), added(100, 7.0);
    CHECK(run(b, b.logits, loss, &gradient) == Approx(expected).epsilon(1e-12));
    CHECK(run(b, b.logits, loss, &other, gradient_to::write, test::several_threads{3}) ==
          run(b, b.logits, loss, nullptr));
    CHECK(other == gradient);
    run(b, b.logits, loss, &added, gradient_to::add);
    for (double& g : added) g -= 7.0;
    CHECK(test::difference(added, gradient, 0.0, 1e-14) == "");
    CHECK(test::gradient_difference(
              b.logits, [&](const row& z, row* out) { return run(b, z, loss, out); }) == "");
    for (std::size_t t = 0; t < 20; ++t) {
      double sum = 0.0;
      for (std::size_t e = 0; e < 5; ++e) sum += gradient[t * 5 + e];
      CHECK(sum == Approx(0.0).margin(1e-15));
    }
  }
}

TEST_CASE("quantiles of the prior itself have no loss") {
  // Two experts under (1, 1): p is uniform, and so is 1 - p.
  oracle::batch b{9, 2, {}, {}};
  for (int r = 1; r <= 9; ++r) {
    b.logits.push_back(std::log(r / 10.0));
    b.logits.push_back(std::log(1.0 - r / 10.0));
  }
  const row alpha = {1.0, 1.0};
  row gradient(18, 7.0);
  CHECK(run(b, b.logits, {.coefficient = 1.0, .alpha = alpha}, &gradient) ==
        Approx(0.0).margin(1e-20));
  CHECK(test::difference(gradient, row(18, 0.0), 0.0, 1e-12) == "");
}

TEST_CASE("one expert, no token, NaN and infinities are defined for the prior") {
  const row one = {1.0}, three = {1.0, 1.0, 1.0};
  row gradient(2, 7.0);
  CHECK(run({2, 1, {}, {}}, {0.5, 1.0}, {.alpha = one}, &gradient) == 0.0);
  CHECK(gradient == row(2, 0.0));
  CHECK(run({0, 3, {}, {}}, {}, {.alpha = three}, nullptr) == 0.0);
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const row z = {nan, 1.0, 0.0, nan, nan, -infinity, infinity, 0.0, 1.0};
  row wild(9);
  CHECK(std::isfinite(run({3, 3, {}, {}}, z, {.alpha = three}, &wild)));
  for (std::size_t i = 0; i < 9; ++i)
    if (!std::isfinite(wild[i]) || (i >= 3 && wild[i] != 0.0)) FAIL(i);
  CHECK(test::refusal([&] { run({3, 3, {}, {}}, z, {.alpha = one}, nullptr); }) ==
        "moeroute::dirichlet_prior: alpha.size is 1, expected 3");
  for (const double clamp : {0.0, 0.5, -1.0, nan})
    CHECK(test::refusal([&] {
            run({3, 3, {}, {}}, z, {.alpha = three, .clamp = clamp}, nullptr);
          }) == "moeroute::dirichlet_prior: clamp is not between 0 and 0.5");
  const row zero = {1.0, 0.0, 1.0};
  CHECK(test::refusal([&] { run({3, 3, {}, {}}, z, {.alpha = zero}, nullptr); }) ==
        "moeroute::dirichlet_prior: an alpha is 0.000000, expected > 0");
}
