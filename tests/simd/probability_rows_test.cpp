// Rows of scores and probabilities, of every length and at every alignment, against plain loops in
// double. What they read and write begins or ends where memory does.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/simd/probability/locality_rows.hpp>
#include <moeroute/simd/probability/noisy_load_rows.hpp>
#include <moeroute/simd/probability/rectified_rows.hpp>
#include <moeroute/simd/probability/share_rows.hpp>
#include <span>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"

using namespace moeroute;

namespace probability_rows_test {

using doubles = std::vector<double>;

// Scores of both signs, zeros of both, and where `odd`, NaN and -inf.
doubles scores(test::random& rng, index_t n, bool odd) {
  doubles x;
  for (index_t i = 0; i < n; ++i) {
    const double v = static_cast<double>(rng.normal());
    const double choice[] = {0.0, -0.0, HUGE_VAL * -1.0, std::nan("")};
    x.push_back(rng.below(3) > 0 ? v : choice[rng.below(odd ? 4 : 2)]);
  }
  return x;
}

template <class F>
std::vector<F> as(const doubles& x) {
  return std::vector<F>(x.begin(), x.end());
}

template <class F>
bool near_row(const F* got, const doubles& expected, double size = 1.0) {
  const double error = sizeof(F) == 4 ? 3e-6 : 1e-13;
  return test::difference(std::span<const F>(got, expected.size()), expected, error,
                          error * size) == "";
}

template <class F>
bool near_sum(F got, double expected, double size) {
  return std::abs(static_cast<double>(got) - expected) <= (sizeof(F) == 4 ? 3e-6 : 1e-13) * size;
}

double positive(double x) { return x > 0.0 ? x : 0.0; }

// Everything that is computed of a row of shares, by plain loops; "" where all agree.
template <class F, class A>
std::string shares_disagree(test::edges& memory, test::random& rng, index_t n) {
  const doubles x = scores(rng, n, true), slope = scores(rng, n, false),
                product = scores(rng, n, false), before = scores(rng, n, false);
  // A share may be 1, and a little more by rounding.
  double most = 0.0;
  for (const double v : x) most = std::max(most, v);
  const bool whole = rng.below(4) == 0 && most > 0.0;
  const double scale = whole ? 1.0 / most : 0.01 + 0.2 * static_cast<double>(rng.uniform()),
               eps = 1e-3;
  const simd::share_gradient<double> g{static_cast<double>(rng.normal()),
                                       static_cast<double>(rng.normal()),
                                       static_cast<double>(rng.normal())};
  doubles sum = before, count = before, rest = product, pull, gradient, added = before;
  double total = 0.0, squares = 0.0, dot = 0.0, pulled = 0.0, size = 1e-30, pull_size = 1e-30;
  for (std::size_t c = 0; c < x.size(); ++c) {
    const double r = positive(x[c]), s = scale * r;
    total += r;
    squares += r * r;
    sum[c] += s;
    count[c] += x[c] > 0.0;
    dot += slope[c] * s;
    const double left = positive(1.0 - s) + eps;
    rest[c] *= left;
    pull.push_back(product[c] / left);
    pulled += pull[c] * s;
    pull_size += std::abs(pull[c] * s) + (whole ? 1.0 : 0.0);
    size += std::abs(slope[c]) * r;
    gradient.push_back(r > 0.0 ? (slope[c] - g.center - g.bend * r) * g.scale : 0.0);
    added[c] += gradient[c];
  }
  const F *const row = memory.copy(as<F>(x)), *const slopes = memory.copy(as<F>(slope)),
                 *const products = memory.copy(as<F>(product));
  const simd::rectified_sums<F> sums = simd::sums_of_rectified<F, A>(row, n);
  if (!near_sum(sums.sum, total, total + 1e-30)) return "sum";
  if (!near_sum(sums.squares, squares, squares + 1e-30)) return "squares";
  F *const a = memory.copy(as<F>(before)), *const b = memory.copy(as<F>(before));
  simd::add_share_row<F, A>(row, F(scale), n, a, b);
  if (!near_row(a, sum) || !near_row(b, count)) return "add_share_row";
  if (!near_sum(simd::share_dot<F, A>(row, F(scale), slopes, n), dot, size)) return "share_dot";
  // Where a share is 1 in double it may be a little less in float: eps beside 1e-7.
  const double loose = whole ? 300.0 : 30.0;
  F* const left = memory.copy(as<F>(product));
  simd::multiply_rest_row<F, A>(row, F(scale), F(eps), n, left);
  if (!near_row(left, rest, loose)) return "multiply_rest_row";
  F* const away = memory.room<F>(n);
  const F pulling = simd::pull_row<F, A>(row, F(scale), F(eps), products, n, away);
  const double error = (sizeof(F) == 4 ? 1e-6 : 1e-15) / eps;
  if (test::difference(std::span<const F>(away, x.size()), pull, error, 1e-30) != "")
    return "pull_row";
  if (!(std::abs(static_cast<double>(pulling) - pulled) <= error * pull_size)) return "pull";
  const simd::share_gradient<F> how{F(g.center), F(g.bend), F(g.scale)};
  F *const out = memory.room<F>(n), *const more = memory.copy(as<F>(before));
  simd::share_gradient_row<false, F, A>(row, slopes, how, n, out);
  simd::share_gradient_row<true, F, A>(row, slopes, how, n, more);
  return near_row(out, gradient, 10.0) && near_row(more, added, 10.0) ? "" : "share_gradient_row";
}

double sigmoid_of(double x) { return 1.0 / (1.0 + std::exp(-x)); }
double softplus_of(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

template <class F, class A>
std::string locality_disagrees(test::edges& memory, test::random& rng, index_t n) {
  doubles guess = scores(rng, n, true), truth = scores(rng, n, true);
  const double beta = rng.below(2) == 0 ? 1.5 : 40.0, factor = 0.75;
  for (double& x : guess)
    if (rng.below(9) == 0) x = HUGE_VAL;
  for (double& x : truth)
    if (rng.below(9) == 0) x = HUGE_VAL;
  const doubles one = scores(rng, n, false), two = scores(rng, n, false);
  doubles dguess = one, dtruth = two;
  double sum = 0.0, size = 1e-30;
  for (std::size_t c = 0; c < guess.size(); ++c) {
    const double a = beta * guess[c], b = beta * truth[c], y = sigmoid_of(b);
    if (!(std::abs(a) < HUGE_VAL && std::abs(b) < HUGE_VAL)) continue;
    sum += softplus_of(a) - a * y;
    size += softplus_of(a) + std::abs(a * y);
    dguess[c] += factor * (sigmoid_of(a) - y);
    dtruth[c] -= factor * a * y * (1.0 - y);
  }
  const F *const g = memory.copy(as<F>(guess)), *const t = memory.copy(as<F>(truth));
  F *const dg = memory.copy(as<F>(one)), *const dt = memory.copy(as<F>(two));
  const F made = simd::locality_row<F, A>(g, t, F(beta), F(factor), n, dg, dt);
  if (!near_sum(made, sum, size)) return "sum";
  if (!near_row(dg, dguess, 3.0)) return "dguess";
  if (!near_row(dt, dtruth, 30.0)) return "dtruth";
  F* const none = nullptr;
  if (simd::locality_row<F, A>(g, t, F(beta), F(factor), n, none, none) != made)
    return "no gradient";
  // Both tokens the same one: both gradients are its own.
  double alone = 0.0;
  doubles own = one;
  for (std::size_t c = 0; c < guess.size(); ++c) {
    const double a = beta * guess[c], y = sigmoid_of(a);
    if (!(std::abs(a) < HUGE_VAL)) continue;
    alone += softplus_of(a) - a * y;
    own[c] -= factor * a * y * (1.0 - y);
  }
  F* const both = memory.copy(as<F>(one));
  const F itself = simd::locality_row<F, A>(g, g, F(beta), F(factor), n, both, both);
  return near_sum(itself, alone, size + 100.0) && near_row(both, own, 30.0) ? "" : "one token";
}

template <class F, class A>
std::string load_disagrees(test::edges& memory, test::random& rng, index_t n) {
  // Steps of a quarter, so that values are equal to a threshold often.
  const auto steps = [&] {
    doubles x;
    for (index_t i = 0; i < n; ++i) {
      const double v = 0.25 * static_cast<double>(rng.below(17)) - 2.0;
      x.push_back(rng.below(12) == 0 ? -HUGE_VAL : v);
    }
    return x;
  };
  const doubles clean = steps(), noisy = steps(), slope = scores(rng, n, false),
                before = scores(rng, n, false), dbefore = scores(rng, n, false);
  doubles sigma;
  for (index_t i = 0; i < n; ++i) sigma.push_back(0.25 + static_cast<double>(rng.uniform()));
  // Only in some rows is sigma a column's own; some thresholds are far, some are nowhere.
  const bool own = rng.below(2) == 0;
  const std::int64_t kind = rng.below(4);
  const double at = 0.25 * static_cast<double>(rng.below(9)) - 1.0;
  const double last = kind == 0 ? -HUGE_VAL : kind == 1 ? 30.0 : at, above = kind == 2 ? -4.0 : 0.5;
  const auto column = static_cast<std::int32_t>(kind == 0 ? -1 : rng.below(n + 1));
  doubles sum = before, out = before, dsigma = dbefore;
  double push[2] = {0.0, 0.0};
  for (std::size_t c = 0; c < clean.size(); ++c) {
    const bool chosen =
        noisy[c] > last || (noisy[c] == last && static_cast<std::int32_t>(c) <= column);
    const double s = own ? sigma[c] : 0.5, u = (clean[c] - (chosen ? above : last)) / s;
    if (u == u) sum[c] += 0.5 * std::erfc(-u * std::sqrt(0.5));
    if (!(std::abs(u) < HUGE_VAL)) continue;
    const double w = slope[c] * 0.39894228040143268 * std::exp(-0.5 * u * u) / s;
    out[c] += w;
    dsigma[c] -= w * u;
    push[chosen] += w;
  }
  const F* const sigmas = memory.copy(as<F>(sigma));
  const simd::noisy_row<F> row{memory.copy(as<F>(clean)), memory.copy(as<F>(noisy)),
                               own ? sigmas : nullptr, F(0.5)};
  const simd::load_bound<F> bound{{F(last), F(above)}, {column, column}};
  F* const sums = memory.copy(as<F>(before));
  simd::add_load_row<F, A>(row, bound, n, sums);
  if (!near_row(sums, sum)) return "add_load_row";
  const F* const slopes = memory.copy(as<F>(slope));
  F *const o = memory.copy(as<F>(before)), *const d = memory.copy(as<F>(dbefore));
  const simd::threshold_push<F> got = simd::load_gradient_row<F, A>(row, bound, slopes, n, o, d);
  if (!near_row(o, out, 3.0)) return "out";
  if (!near_row(d, dsigma, 10.0)) return "dsigma";
  const double size = 3.0 * static_cast<double>(n) + 1e-30;
  if (!near_sum(got.at[0], push[0], size) || !near_sum(got.at[1], push[1], size)) return "push";
  F *const again = memory.copy(as<F>(before)), *const none = nullptr;
  const auto same = simd::load_gradient_row<F, A>(row, bound, slopes, n, again, none);
  return std::equal(o, o + n, again) && same.at[0] == got.at[0] && same.at[1] == got.at[1]
             ? ""
             : "no dsigma";
}

// Sums, counts and gradients of max(x, 0): exact.
template <class F, class... A>
std::string rectified_disagrees(test::edges& memory, test::random& rng, index_t n) {
  const std::vector<F> x = as<F>(scores(rng, n, true)), slope = as<F>(scores(rng, n, false)),
                       before = as<F>(scores(rng, n, false));
  std::vector<F> sum = before, count = before, gradient, added = before;
  for (std::size_t c = 0; c < x.size(); ++c) {
    const bool on = x[c] > F(0);
    sum[c] += on ? x[c] : F(0);
    count[c] += on ? F(1) : F(0);
    gradient.push_back(on ? slope[c] : F(0));
    added[c] += gradient[c];
  }
  const F *const row = memory.copy(x), *const slopes = memory.copy(slope);
  F *const a = memory.copy(before), *const b = memory.copy(before);
  if constexpr (sizeof(F) == 4)
    simd::add_rectified_row<A...>(row, n, a, b);
  else
    simd::add_rectified_row(row, n, a, b);
  if (!std::equal(sum.begin(), sum.end(), a)) return "sum";
  if (!std::equal(count.begin(), count.end(), b)) return "count";
  F *const out = memory.room<F>(n), *const more = memory.copy(before);
  if constexpr (sizeof(F) == 4) {
    simd::rectified_gradient_row<false, A...>(row, slopes, n, out);
    simd::rectified_gradient_row<true, A...>(row, slopes, n, more);
  } else {
    simd::rectified_gradient_row<false>(row, slopes, n, out);
    simd::rectified_gradient_row<true>(row, slopes, n, more);
  }
  if (!std::equal(gradient.begin(), gradient.end(), out)) return "gradient";
  return std::equal(added.begin(), added.end(), more) ? "" : "added gradient";
}

}  // namespace probability_rows_test

TEST_CASE("rectified scores, shares, alike tokens and noisy loads are those of plain loops") {
  using namespace probability_rows_test;
  test::edges memory(8 * 130);
  test::random rng(81);
  for (index_t n = 0; n <= 130; ++n)
    for (const auto end : {test::guarded_end::front, test::guarded_end::back}) {
      INFO("n=" << n);
      const auto begin = [&] { memory.begin(end); };
      const auto check = [&]<class F, class A>(F, A) {
        begin();
        CHECK(rectified_disagrees<F, A>(memory, rng, n) == "");
        begin();
        CHECK(shares_disagree<F, A>(memory, rng, n) == "");
        begin();
        CHECK(locality_disagrees<F, A>(memory, rng, n) == "");
        begin();
        CHECK(load_disagrees<F, A>(memory, rng, n) == "");
      };
      check(double{}, simd::default_arch{});
      test::for_each_arch<test::widths>([&](auto tag) { check(float{}, tag); });
    }
}
