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
  // Where nearly all of it lies at one end each half is told by the fraction that converges there.
  CHECK(beta_distribution(1e-6, 1).cdf(1e-5) == Approx(std::pow(1e-5, 1e-6)).epsilon(1e-12));
  CHECK(beta_distribution(1, 1e-6).cdf(1.0 - 1e-5) ==
        Approx(-std::expm1(1e-6 * std::log(1e-5))).epsilon(1e-8));
  // The larger both are, the more steps its middle takes.
  for (const double a : {10.0, 1e4, 1e6, 1e8, 1e10})
    for (const double x : {0.5, 0.5 - 1e-12})
      CHECK(beta_distribution(a, a).cdf(x) == Approx(0.5).margin(2e-14 * a + 2e-7));
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
  for (const double bad : {0.0, -1.0, nan, infinity}) {
    const row broken = {1.0, bad, 1.0};
    CHECK(test::refusal([&] { run({3, 3, {}, {}}, z, {.alpha = broken}, nullptr); }) ==
          "moeroute::dirichlet_prior: an alpha is " + std::to_string(bad) + ", expected > 0");
  }
  CHECK(test::refusal([&] {
          run({3, 3, {}, {}}, z, {.coefficient = -1.0, .alpha = three}, nullptr);
        }) == "moeroute::dirichlet_prior: coefficient is -1.000000, expected >= 0");
}

TEST_CASE("the prior's loss has its numbers per token, however many experts there are") {
  const auto b = test::random_batch(104, 200, 64);
  const row alpha(64, 1.5);
  row dz(b.logits.size());
  workspace ws;
  dirichlet_prior({.alpha = alpha}, {}, matrix_view<const double>(b.logits.data(), 200, 64),
                  matrix_view<double>(dz.data(), 200, 64), ws, serial{});
  CHECK(ws.capacity() <= 200 * 19 * 8 + 64 * 4 * 8 + 5 * 64);
}

TEST_CASE("with every option at once the prior's loss is its formula, and its gradient the pull") {
  test::random rng(105);
  for (int round = 0; round < 40; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t tokens = rng.below(80), experts = 2 + rng.below(round % 4 == 0 ? 40 : 7);
    const auto T = static_cast<std::size_t>(tokens), E = static_cast<std::size_t>(experts);
    oracle::batch b =
        test::random_batch(static_cast<std::uint64_t>(round), tokens, experts, coin());
    const bool ties = coin();
    for (double& x : b.logits) {
      const auto odd = rng.below(60);
      if (odd < 3) x = odd == 0 ? std::nan("") : odd == 1 ? -HUGE_VAL : HUGE_VAL;
    }
    // Equal rows have equal probabilities, which are ranked by token.
    for (std::size_t i = 4 * E; i < T * E && ties; ++i)
      if (i / E % 3 == 0) b.logits[i] = b.logits[i - 4 * E];
    row alpha, before;
    double all = 0.0, live = 0.0;
    for (std::size_t e = 0; e < E; ++e) {
      alpha.push_back(0.5 + 0.25 * static_cast<double>(rng.below(6)));
      all += alpha.back();
    }
    for (std::size_t i = 0; i < T * E; ++i) before.push_back(static_cast<double>(rng.normal()));
    for (std::size_t t = 0; t < T; ++t) live += b.live(static_cast<index_t>(t)) ? 1.0 : 0.0;
    const dirichlet_prior_loss loss{
        .coefficient = 0.5, .alpha = alpha, .clamp = coin() ? 1e-6 : 0.0625};
    // Rows with +inf, or with nothing above -inf, have no probabilities and no gradient.
    row p(T * E, 0.0);
    std::vector<bool> whole(T, false);
    for (std::size_t t = 0; t < T; ++t) {
      double top = -HUGE_VAL, sum = 0.0;
      for (std::size_t e = 0; e < E; ++e) top = std::fmax(top, b.logits[t * E + e]);
      whole[t] = std::isfinite(top);
      for (std::size_t e = 0; e < E && whole[t]; ++e)
        sum += p[t * E + e] =
            std::isnan(b.logits[t * E + e]) ? 0.0 : std::exp(b.logits[t * E + e] - top);
      for (std::size_t e = 0; e < E && whole[t]; ++e) p[t * E + e] /= sum;
    }
    const auto there = [&](std::size_t t) { return b.live(static_cast<index_t>(t)); };
    double value = 0.0;
    row pull(T * E, 0.0);
    const double factor = 0.5 / (live * static_cast<double>(experts));
    for (std::size_t t = 0; t < T; ++t)
      for (std::size_t e = 0; e < E && there(t); ++e) {
        const double mine = p[t * E + e];
        double rank = 1.0;
        for (std::size_t s = 0; s < T; ++s)
          rank += there(s) && (p[s * E + e] < mine || (p[s * E + e] == mine && s < t));
        const double inside = std::min(std::max(mine, loss.clamp), 1.0 - loss.clamp);
        const beta_distribution prior(alpha[e], all - alpha[e]);
        const double miss = rank / (live + 1.0) - prior.cdf(inside);
        value += factor * miss * miss;
        if (mine == inside && whole[t])
          pull[t * E + e] = -2.0 * factor * miss * prior.pdf(mine) * mine;
      }
    const auto to = static_cast<gradient_to>(rng.below(3));
    row expected = before;
    for (std::size_t t = 0; t < T; ++t) {
      double sum = 0.0;
      for (std::size_t e = 0; e < E; ++e) sum += pull[t * E + e];
      for (std::size_t e = 0; e < E && to != gradient_to::nowhere; ++e)
        expected[t * E + e] = (to == gradient_to::add ? before[t * E + e] : 0.0) + pull[t * E + e] -
                              p[t * E + e] * sum;
    }
    INFO("round " << round << " T=" << tokens << " E=" << experts << " ties " << ties);
    row found = before;
    const double seen = coin() ? run(b, b.logits, loss, &found, to)
                               : run(b, b.logits, loss, &found, to, test::several_threads{3});
    CHECK(seen == Approx(value).epsilon(1e-10));
    CHECK(test::difference(found, expected, 1e-9, 1e-13) == "");
  }
}
