#include <moeroute/balance/loss_load.hpp>

#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "support/gradient.hpp"
#include "support/loss_agreement.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;

namespace {

struct noisy_batch {
  oracle::batch b;
  row noise, sigma;  // sigma [T, E], or one value
};

noisy_batch make(bool masked, bool constant) {
  noisy_batch n{test::random_batch(91, 70, 9, masked), {}, {}};
  test::random rng(92);
  for (std::size_t i = 0; i < n.b.logits.size(); ++i) {
    n.noise.push_back(static_cast<double>(rng.normal()));
    if (!constant) n.sigma.push_back(0.3 + static_cast<double>(rng.uniform()));
  }
  if (constant) n.sigma = {1.0 / 9.0};
  return n;
}

double sigma_of(const noisy_batch& n, std::size_t i) {
  return n.sigma.size() == 1 ? n.sigma[0] : n.sigma[i];
}

template <class Exec = serial>
double run(const noisy_batch& n, const row& z, const load_loss& loss, row* gradient,
           const Exec& exec = {}) {
  row noisy(z.size()), unused(z.size());
  for (std::size_t i = 0; i < z.size(); ++i) noisy[i] = z[i] + n.noise[i] * sigma_of(n, i);
  workspace ws;
  const bool constant = n.sigma.size() == 1;
  return noisy_load_loss(
      loss, {.mask = n.b.mask}, matrix_view<const double>(z.data(), 70, 9),
      matrix_view<const double>(noisy.data(), 70, 9),
      matrix_view<const double>(n.sigma.data(), constant ? 1 : 70, constant ? 1 : 9),
      matrix_view<double>((gradient != nullptr ? *gradient : unused).data(), 70, 9), ws, exec);
}

double formula(const noisy_batch& n, const load_loss& loss) {
  row load(9, 0.0);
  for (std::size_t t = 0; t < 70; ++t) {
    if (!n.b.live(static_cast<index_t>(t))) continue;
    row h;
    for (std::size_t e = 0; e < 9; ++e)
      h.push_back(n.b.logits[t * 9 + e] + n.noise[t * 9 + e] * sigma_of(n, t * 9 + e));
    for (std::size_t e = 0; e < 9; ++e) {
      row others = h;
      if (loss.threshold == load_threshold::without_self)
        others.erase(others.begin() + static_cast<std::ptrdiff_t>(e));
      std::sort(others.rbegin(), others.rend());
      const auto k = static_cast<std::size_t>(loss.k);
      const double u = k > others.size()
                           ? std::numeric_limits<double>::infinity()
                           : (n.b.logits[t * 9 + e] - others[k - 1]) / sigma_of(n, t * 9 + e);
      load[e] += 0.5 * std::erfc(-u / std::sqrt(2.0));
    }
  }
  return loss.coefficient *
         oracle::squared_variation(load, loss.kind == variance::unbiased, loss.eps);
}

}  // namespace

TEST_CASE("the load loss is its formula by both thresholds, and its gradient the derivative") {
  for (const bool masked : {false, true})
    for (const bool constant : {false, true})
      for (const auto threshold : {load_threshold::without_self, load_threshold::kth})
        for (const index_t k : {1, 2, 9}) {
          const noisy_batch n = make(masked, constant);
          const load_loss loss{.coefficient = 0.5, .k = k, .threshold = threshold};
          row gradient(n.b.logits.size(), 7.0), other = gradient;
          const double value = run(n, n.b.logits, loss, &gradient);
          CHECK(value == Approx(formula(n, loss)).epsilon(1e-11).margin(1e-13));
          CHECK(run(n, n.b.logits, loss, &other, test::several_threads{3}) == value);
          CHECK(gradient == other);
          if (!(masked && k == 2)) continue;
          // Only entries whose threshold does not change hands within the difference.
          const row slope = oracle::derivative(
              n.b.logits, [&](const row& z) { return run(n, z, loss, nullptr); });
          int apart = 0;
          for (std::size_t i = 0; i < slope.size(); ++i)
            apart += std::abs(slope[i] - gradient[i]) > 1e-7 * std::abs(slope[i]) + 1e-8;
          CHECK(apart <= 2);
        }
}

TEST_CASE("noise that is learned has the derivative of the load loss by its logits") {
  for (const auto threshold : {load_threshold::without_self, load_threshold::kth})
    for (const auto to : {gradient_to::write, gradient_to::add}) {
      noisy_batch n = make(true, false);
      // sigma = softplus(x) + 0.01.
      row x(n.b.logits.size());
      test::random rng(93);
      for (double& v : x) v = static_cast<double>(rng.normal());
      const auto sigmas = [](const row& logits) {
        row s;
        for (const double v : logits) s.push_back(std::log1p(std::exp(v)) + 0.01);
        return s;
      };
      const load_loss loss{.coefficient = 0.5, .k = 2, .threshold = threshold};
      n.sigma = sigmas(x);
      row noisy(x.size()), dz(x.size(), 0.0), dx(x.size(), 0.0);
      for (std::size_t i = 0; i < x.size(); ++i) noisy[i] = n.b.logits[i] + n.noise[i] * n.sigma[i];
      if (to == gradient_to::write) std::fill(dx.begin(), dx.end(), 7.0);
      workspace ws;
      const matrix_view<double> dsigma(dx.data(), 70, 9);
      const matrix_view<const double> sigma(n.sigma.data(), 70, 9);
      noisy_load_loss(loss, {.gradient = to, .mask = n.b.mask},
                      matrix_view<const double>(n.b.logits.data(), 70, 9),
                      matrix_view<const double>(noisy.data(), 70, 9), sigma,
                      matrix_view<double>(dz.data(), 70, 9), dsigma, ws, serial{});
      noise_logit_gradient(sigma, 0.01, dsigma);
      const row slope = oracle::derivative(x, [&](const row& logits) {
        noisy_batch other = n;
        other.sigma = sigmas(logits);
        return run(other, n.b.logits, loss, nullptr);
      });
      int apart = 0;
      double largest = 0.0;
      for (std::size_t i = 0; i < slope.size(); ++i) {
        apart += std::abs(slope[i] - dx[i]) > 1e-7 * std::abs(slope[i]) + 1e-8;
        largest = std::max(largest, std::abs(slope[i]));
      }
      CHECK(apart <= 2);  // thresholds that change hands within the difference
      CHECK(largest > 1e-4);
    }
  noisy_batch constant = make(false, true);
  row dz(630), dsigma(630);
  workspace ws;
  const matrix_view<const double> z(constant.b.logits.data(), 70, 9);
  CHECK(test::refusal([&] {
          noisy_load_loss({.k = 1}, {}, z, z,
                          matrix_view<const double>(constant.sigma.data(), 1, 1),
                          matrix_view<double>(dz.data(), 70, 9),
                          matrix_view<double>(dsigma.data(), 70, 9), ws, serial{});
        }) == "moeroute::load_loss: dsigma is given, expected sigma of [T, E]");
  // Of one token and one expert one value is [T, E].
  const double one = 0.5;
  const auto of = [&](index_t tokens, index_t experts) {
    const matrix_view<const double> given(constant.b.logits.data(), tokens, experts);
    return test::refusal([&] {
      noisy_load_loss({.k = 1}, {}, given, given, matrix_view<const double>(&one, 1, 1),
                      matrix_view<double>(dz.data(), tokens, experts),
                      matrix_view<double>(dsigma.data(), tokens, experts), ws, serial{});
    });
  };
  dz[0] = dsigma[0] = 7.0;
  CHECK(of(1, 1) == "accepted");
  CHECK((dz[0] == 0.0 && dsigma[0] == 0.0));
  CHECK(of(1, 2) == "moeroute::load_loss: dsigma is given, expected sigma of [T, E]");
  CHECK(of(2, 1) == "moeroute::load_loss: dsigma is given, expected sigma of [T, E]");
}

TEST_CASE("in float the load loss is that in double, at every width, with both gradients") {
  workspace ws;
  for (const index_t experts : {1, 3, 16, 33, 100, 256})
    for (const bool constant : {false, true})
      for (const auto threshold : {load_threshold::without_self, load_threshold::kth})
        for (const index_t k : {index_t{1}, std::min<index_t>(8, experts), experts}) {
          const auto b = test::random_batch(94, 70, experts, true);
          const std::size_t size = b.logits.size();
          const index_t sigma_rows = constant ? 1 : 70, sigma_cols = constant ? 1 : experts;
          test::random rng(95);
          std::vector<float> sigma(static_cast<std::size_t>(sigma_rows * sigma_cols)), noisy(size);
          for (float& s : sigma) s = 0.3f + rng.uniform();
          for (std::size_t i = 0; i < size; ++i)
            noisy[i] = static_cast<float>(b.logits[i]) + rng.normal() * sigma[constant ? 0 : i];
          const auto loss = [&](auto z, auto dz, gradient_to to) {
            using F = std::remove_cvref_t<decltype(dz(0, 0))>;
            const std::vector<F> s(sigma.begin(), sigma.end()), h(noisy.begin(), noisy.end());
            const token_options how{.gradient = to, .mask = b.mask};
            const load_loss what{.coefficient = 1.0, .k = k, .threshold = threshold};
            return noisy_load_loss<F>(what, how, z, {h.data(), 70, experts},
                                      {s.data(), sigma_rows, sigma_cols}, dz, ws,
                                      test::several_threads{2});
          };
          CHECK(test::float_disagreement(b, loss) == "");
          if (constant) continue;
          // The gradient by sigma in place of that by the logits.
          CHECK(test::float_disagreement(b, [&](auto z, auto dsigma, gradient_to to) {
                  using F = std::remove_cvref_t<decltype(dsigma(0, 0))>;
                  const std::vector<F> s(sigma.begin(), sigma.end()), h(noisy.begin(), noisy.end());
                  std::vector<F> dz(size);
                  const token_options how{.gradient = to, .mask = b.mask};
                  const load_loss what{.coefficient = 1.0, .k = k, .threshold = threshold};
                  return noisy_load_loss<F>(what, how, z, {h.data(), 70, experts},
                                            {s.data(), sigma_rows, sigma_cols},
                                            {dz.data(), 70, experts}, dsigma, ws, serial{});
                }) == "");
        }
}

TEST_CASE("every expert selected: probability 1 for all, no loss and no gradient") {
  const noisy_batch n = make(false, true);
  row gradient(630, 7.0);
  CHECK(run(n, n.b.logits, {.k = 9}, &gradient) == Approx(0.0).margin(1e-20));
  CHECK(gradient == row(630, 0.0));
}

TEST_CASE("NaN and infinite logits leave the load loss finite, with both gradients") {
  oracle::batch b = test::random_batch(91, 70, 9, false);
  b.logits[0] = std::nan("");
  b.logits[9] = std::numeric_limits<double>::infinity();
  b.logits[10] = std::numeric_limits<double>::infinity();
  for (std::size_t e = 0; e < 9; ++e) b.logits[18 + e] = -std::numeric_limits<double>::infinity();
  workspace ws;
  const auto broken = [&]<class F>(const load_loss& loss, F) {
    // An infinite noise alone, too: a threshold that no logit is near.
    const std::vector<F> z(b.logits.begin(), b.logits.end()), sigma(630, F(0.25));
    std::vector<F> noisy = z, dz(630), dsigma(630);
    noisy[29] = noisy[31] = std::numeric_limits<F>::infinity();
    const double value = noisy_load_loss<F>(loss, {}, {z.data(), 70, 9}, {noisy.data(), 70, 9},
                                            {sigma.data(), 70, 9}, matrix_view<F>(dz.data(), 70, 9),
                                            matrix_view<F>(dsigma.data(), 70, 9), ws, serial{});
    const auto endless = [](F x) { return !std::isfinite(x); };
    return (std::isfinite(value) ? 0 : 1000) + std::count_if(dz.begin(), dz.end(), endless) +
           std::count_if(dsigma.begin(), dsigma.end(), endless);
  };
  for (const auto threshold : {load_threshold::without_self, load_threshold::kth})
    for (const index_t k : {1, 2, 9}) {
      const load_loss loss{.k = k, .threshold = threshold};
      CHECK(broken(loss, double{}) == 0);
      CHECK(broken(loss, float{}) == 0);
    }
}

TEST_CASE("a selection of many ranks has a word for every expert to sort by") {
  const auto held = [](index_t k) {
    workspace ws;
    const std::vector<float> z(100, 1.0f), sigma(1, 1.0f);
    std::vector<float> dz(100);
    const matrix_view<const float> logits(z.data(), 1, 100);
    noisy_load_loss<float>({.k = k}, {}, logits, logits, {sigma.data(), 1, 1},
                           matrix_view<float>(dz.data(), 1, 100), ws, serial{});
    return ws.capacity();
  };
  // One rank more is a value and a column of 16 rows more.
  CHECK(held(63) - held(62) == 2 * 64);
  CHECK(held(64) - held(63) == 2 * 64 + 100 * 8 + 32);  // in whole cache lines
  CHECK(held(99) == held(98) + 2 * 64);
}

TEST_CASE("arguments of the load loss are refused by name") {
  const noisy_batch n = make(false, true);
  CHECK(test::refusal([&] { run(n, n.b.logits, {.k = 10}, nullptr); }) ==
        "moeroute::load_loss: k is 10, expected 1 to 9");
  CHECK(test::refusal([&] { run(n, n.b.logits, {.coefficient = -1.0}, nullptr); }) ==
        "moeroute::load_loss: coefficient is -1.000000, expected >= 0");
}

TEST_CASE("with every option at once the load loss is its formula, and both gradients the slopes") {
  test::random rng(97);
  for (int round = 0; round < 150; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t tokens = rng.below(rng.below(3) == 0 ? 3 : 90), experts = 1 + rng.below(20);
    const index_t k = 1 + rng.below(experts);
    const auto T = static_cast<std::size_t>(tokens), E = static_cast<std::size_t>(experts);
    const bool constant = coin(), ties = coin();
    row z, h, sigma, dz, ds;
    std::vector<std::uint8_t> mask;
    for (std::size_t i = 0; i < T * E; ++i) {
      const double s = constant ? 0.5 : 0.25 + static_cast<double>(rng.uniform());
      sigma.push_back(s);
      z.push_back(static_cast<double>(rng.normal()));
      const double noisy = z.back() + s * static_cast<double>(rng.normal());
      h.push_back(ties ? std::round(noisy) : noisy);
      dz.push_back(static_cast<double>(rng.normal()));
      ds.push_back(static_cast<double>(rng.normal()));
    }
    for (std::size_t t = 0; t < T; ++t) mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    const auto to = static_cast<gradient_to>(rng.below(3));
    token_options how{.gradient = to};
    if (coin()) how.mask = mask;
    const double eps = coin() ? 1e-10 : 0.25;
    const load_loss loss{.coefficient = 0.5,
                         .k = k,
                         .threshold = coin() ? load_threshold::without_self : load_threshold::kth,
                         .kind = coin() ? variance::population : variance::unbiased,
                         .eps = eps};
    // Whom each expert has to exceed; -1: nobody.
    std::vector<std::ptrdiff_t> rival(T * E, -1);
    row u(T * E, HUGE_VAL), load(E, 0.0);
    for (std::size_t t = 0; t < T; ++t) {
      if (how.masked(static_cast<index_t>(t))) continue;
      std::vector<std::size_t> order;
      for (std::size_t e = 0; e < E; ++e) order.push_back(t * E + e);
      std::stable_sort(order.begin(), order.end(),
                       [&](std::size_t a, std::size_t b) { return h[a] > h[b]; });
      for (std::size_t r = 0; r < E; ++r) {
        const bool chosen = r < static_cast<std::size_t>(k);
        const bool passes = chosen && loss.threshold == load_threshold::without_self;
        const std::size_t th = static_cast<std::size_t>(k) - (passes ? 0 : 1), i = order[r];
        if (th < E) {
          rival[i] = static_cast<std::ptrdiff_t>(order[th]);
          u[i] = (z[i] - h[order[th]]) / sigma[i];
        }
        load[i % E] += 0.5 * std::erfc(-u[i] / std::sqrt(2.0));
      }
    }
    const bool unbiased = loss.kind == variance::unbiased;
    const double n = static_cast<double>(experts), d = unbiased ? n - 1.0 : n;
    double mean = 0.0, value = 0.0;
    for (const double x : load) mean += x / n;
    const double m = mean * mean + eps;
    if (d > 0.0) value = 0.5 * oracle::squared_variation(load, unbiased, eps);
    row by_z(T * E, 0.0), by_sigma(T * E, 0.0);
    for (std::size_t i = 0; i < T * E && d > 0.0; ++i) {
      if (rival[i] < 0) continue;
      const auto th = static_cast<std::size_t>(rival[i]);
      const double slope =
          0.5 * 2.0 * (load[i % E] - mean) / (d * m) - value * 2.0 * mean / (n * m);
      const double w =
          slope * std::exp(-0.5 * u[i] * u[i]) / std::sqrt(2.0 * std::acos(-1.0)) / sigma[i];
      by_z[i] += w;
      by_z[th] -= w;
      by_sigma[i] -= w * u[i];
      by_sigma[th] -= w * (h[th] - z[th]) / sigma[th];
    }
    const bool learned = !constant && coin();
    row expected = dz, second = ds;
    for (std::size_t i = 0; i < T * E && to != gradient_to::nowhere; ++i) {
      expected[i] = by_z[i] + (to == gradient_to::add ? dz[i] : 0.0);
      if (learned) second[i] = by_sigma[i] + (to == gradient_to::add ? ds[i] : 0.0);
    }
    const matrix_view<const double> clean(z.data(), tokens, experts),
        noisy(h.data(), tokens, experts), all(sigma.data(), tokens, experts);
    const double one = 0.5;
    const matrix_view<const double> single(&one, 1, 1);
    const matrix_view<double> out(dz.data(), tokens, experts), dsigma(ds.data(), tokens, experts);
    // Without a gradient nobody asks what is handed in for one.
    const matrix_view<double> any(ds.data(), tokens + 1, experts);
    const matrix_view<double> place = to == gradient_to::nowhere ? any
                                      : learned                  ? dsigma
                                                                 : matrix_view<double>{};
    workspace ws;
    const auto found = [&](const auto& exec) {
      return noisy_load_loss(loss, how, clean, noisy, constant ? single : all, out, place, ws,
                             exec);
    };
    const double seen = coin() ? found(serial{}) : found(test::several_threads{3});
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << k << " ties "
                  << ties);
    CHECK(seen == Approx(value).epsilon(1e-10).margin(1e-13));
    CHECK(test::difference(dz, expected, 1e-8, 1e-10) == "");
    CHECK(test::difference(ds, second, 1e-8, 1e-10) == "");
  }
}
