#include <moeroute/balance/quantile.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "support/allocations.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/skewed.hpp"

using namespace moeroute;
using test::skewed_scores;

namespace {

// D(alpha, beta) = sum max(0, s - alpha - beta) + k sum alpha + q sum beta, in double.
double objective(const skewed_scores& d, const std::vector<double>& alpha,
                 const std::vector<double>& beta) {
  double sum = 0;
  for (index_t t = 0; t < d.tokens; ++t)
    for (index_t e = 0; e < d.experts; ++e)
      sum +=
          std::max(0.0, static_cast<double>(d.score[static_cast<std::size_t>(t * d.experts + e)]) -
                            alpha[static_cast<std::size_t>(t)] - beta[static_cast<std::size_t>(e)]);
  for (const double a : alpha) sum += static_cast<double>(d.k) * a;
  for (const double b : beta) sum += static_cast<double>(d.k * d.tokens / d.experts) * b;
  return sum;
}

std::vector<double> alphas(const skewed_scores& d, const std::vector<double>& beta) {
  std::vector<double> out;
  for (index_t t = 0; t < d.tokens; ++t) {
    std::vector<double> row;
    for (index_t e = 0; e < d.experts; ++e)
      row.push_back(static_cast<double>(d.score[static_cast<std::size_t>(t * d.experts + e)]) -
                    beta[static_cast<std::size_t>(e)]);
    out.push_back(test::nth_largest(row, d.k + 1));
  }
  return out;
}

std::vector<double> betas(const skewed_scores& d, const std::vector<double>& alpha) {
  std::vector<double> out;
  for (index_t e = 0; e < d.experts; ++e) {
    std::vector<double> column;
    for (index_t t = 0; t < d.tokens; ++t)
      column.push_back(static_cast<double>(d.score[static_cast<std::size_t>(t * d.experts + e)]) -
                       alpha[static_cast<std::size_t>(t)]);
    out.push_back(test::nth_largest(column, d.k * d.tokens / d.experts + 1));
  }
  return out;
}

}  // namespace

TEST_CASE("the sheet's hand example: loads 4 and 0 become 2 and 2") {
  const std::vector<float> s{.9f, .5f, .8f, .7f, .7f, .2f, .6f, .45f};
  quantile_balancer b(2, {.k = 1});
  workspace ws;
  b.observe(matrix_view<const float>(s.data(), 4, 2), ws);
  b.update();
  // beta = (.15, 0), less its mean; the bias is its negative.
  CHECK(test::difference(b.bias(), std::vector{-.075f, .075f}, 1e-6) == "");
  // Tokens 1 and 3 keep expert 1, token 2 goes; token 4 ties exactly in the reals.
  const float gap[] = {.9f - .5f - .15f, .8f - .7f - .15f, .7f - .2f - .15f};
  CHECK(gap[0] > 0);
  CHECK(gap[1] < 0);
  CHECK(gap[2] > 0);
  CHECK(std::abs((.6f + b.bias()[0]) - (.45f + b.bias()[1])) < 1e-6f);

  skewed_scores d(1, 4, 2, 1);
  d.score = s;
  const std::vector<double> zero{0, 0}, alpha = alphas(d, zero), beta = betas(d, alpha);
  CHECK(std::abs(objective(d, alpha, zero) - 3.0) < 1e-6);
  CHECK(std::abs(objective(d, alpha, beta) - 2.75) < 1e-6);
  CHECK(std::abs(beta[0] - .15) < 1e-6);
}

TEST_CASE("quantile balancing reaches the sheet's bands on the recipe's scores") {
  double sum[4] = {};
  for (const std::uint64_t seed : {1u, 2u, 3u, 4u, 5u}) {
    const skewed_scores data(seed);
    quantile_balancer b(16, {.k = 4});
    workspace ws;
    int slot = 0;
    for (int step = 1; step <= 8; ++step) {
      b.observe(data.view(), ws);
      b.update();
      if (step == 1 || step == 2 || step == 4 || step == 8)
        sum[slot++] += data.max_violation(b.bias()) / 5;
    }
  }
  // One token of 256 is 0.004: what is near a token has no 30 % band.
  const double band[] = {0.27, 0.12, 0.03, 0.01};
  for (int i = 0; i < 4; ++i) {
    INFO("slot " << i << ": " << sum[i]);
    CHECK(sum[i] < band[i] * 1.3 + 0.02);
    CHECK(sum[i] > band[i] * 0.7 - 0.02);
  }
}

TEST_CASE("each half step lowers the dual objective, and the estimate is the oracle's") {
  const skewed_scores d(7, 96, 8, 2);
  std::vector<double> beta(8, 0.0), alpha = alphas(d, beta);
  double last = objective(d, alpha, beta);
  quantile_balancer b(8, {.k = 2});
  workspace ws;
  for (int step = 0; step < 6; ++step) {
    beta = betas(d, alpha);
    CHECK(objective(d, alpha, beta) <= last + 1e-9);
    last = objective(d, alpha, beta);
    alpha = alphas(d, beta);
    CHECK(objective(d, alpha, beta) <= last + 1e-9);
    last = objective(d, alpha, beta);
    b.observe(d.view(), ws);
    b.update();
    double mean = 0;
    for (const double x : beta) mean += x / 8;
    std::vector<double> expected;
    for (const double x : beta) expected.push_back(mean - x);
    CHECK(test::difference(b.bias(), expected, 1e-5, 1e-6) == "");
  }
}

TEST_CASE("large and odd sizes, every k and masked tokens agree with the oracle") {
  struct size {
    index_t tokens, experts, k;
  };
  const auto [tokens, experts, k] = GENERATE(size{5000, 3, 1}, size{1237, 20, 7}, size{700, 90, 70},
                                             size{17, 5, 4}, size{1, 4, 2}, size{2048, 16, 8});
  INFO(tokens << " " << experts << " " << k);
  skewed_scores d(11, tokens, experts, k);
  for (float& s : d.score) s = std::round(s * 64) / 64;  // ties everywhere
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens));
  skewed_scores kept = d;
  kept.score.clear();
  kept.tokens = 0;
  for (index_t t = 0; t < tokens; ++t) {
    mask[static_cast<std::size_t>(t)] = t % 5 != 3;
    if (t % 5 == 3) continue;
    kept.score.insert(kept.score.end(), d.score.begin() + t * experts,
                      d.score.begin() + (t + 1) * experts);
    ++kept.tokens;
  }
  const std::vector<double> beta =
      betas(kept, alphas(kept, std::vector<double>(static_cast<std::size_t>(experts), 0.0)));
  double mean = 0;
  for (const double x : beta) mean += x / static_cast<double>(experts);
  std::vector<double> expected;
  for (const double x : beta) expected.push_back(mean - x);
  quantile_balancer one(experts, {.k = k}), two(experts, {.k = k});
  workspace ws;
  one.observe(d.view(), mask, ws);
  one.update();
  CHECK(test::difference(one.bias(), expected, 1e-5, 1e-6) == "");
  two.observe(d.view(), mask, ws, test::backwards{});
  two.update();
  CHECK(test::bit_difference(two.bias(), one.bias()) == "");
  // From a bias that is not 0 any more.
  std::vector<double> price;
  for (const float b : one.bias()) price.push_back(-static_cast<double>(b));
  const std::vector<double> next = betas(kept, alphas(kept, price));
  mean = 0;
  for (const double x : next) mean += x / static_cast<double>(experts);
  for (std::size_t e = 0; e < next.size(); ++e) expected[e] = mean - next[e];
  one.observe(d.view(), mask, ws);
  one.update();
  CHECK(test::difference(one.bias(), expected, 1e-5, 1e-6) == "");
}

TEST_CASE("the histogram counts many choices per token too, from a bias of its own") {
  const skewed_scores d(12, 400, 90, 70);
  quantile_balancer exact(90, {.k = 70});
  quantile_histogram counted(90, {.k = 70, .buckets = 4000});
  workspace ws;
  const std::vector<std::uint8_t> mask = [] {
    std::vector<std::uint8_t> m(400, 1);
    for (std::size_t t = 0; t < 400; t += 7) m[t] = 0;
    return m;
  }();
  for (int step = 0; step < 2; ++step) {
    const auto width = static_cast<double>(counted.bucket_width());
    exact.observe(d.view(), mask, ws);
    counted.observe(d.view(), mask, ws);
    CHECK(counted.tokens() == 342);
    exact.update();
    counted.update();
    CHECK(counted.tokens() == 0);
    CHECK(test::difference(counted.bias(), exact.bias(), 0.0, 4 * (step + 1) * width) == "");
  }
}

TEST_CASE("the histogram's rank is interpolated within its bucket") {
  // Buckets of 0.5 from -1: expert 0 has alpha - s = -0.75, -0.3, -0.3, 0, expert 1 three times 0
  // and -0.1. The second of four ends half way through bucket 1, or a third into bucket 2.
  const std::vector<float> s{0.95f, 0.2f, 0.5f, 0.2f, 0.5f, 0.2f, 0.2f, 0.3f};
  quantile_histogram h(2, {.k = 1, .buckets = 4});
  workspace ws;
  h.observe(matrix_view<const float>(s.data(), 4, 2), ws);
  h.update();
  const double first = -1.0 + 1.5 * 0.5, second = -1.0 + (2.0 + 1.0 / 3.0) * 0.5;
  CHECK(std::abs(static_cast<double>(h.bias()[0]) - (first - second) / 2) < 1e-6);
  CHECK(std::abs(static_cast<double>(h.bias()[1]) - (second - first) / 2) < 1e-6);
}

TEST_CASE("counts that somebody lost leave the bias within the buckets") {
  // As above, but of expert 1 one count is left, in the last bucket, or none: rank 2 is beyond.
  const std::vector<float> s{0.95f, 0.2f, 0.5f, 0.2f, 0.5f, 0.2f, 0.2f, 0.3f};
  for (const int left : {0, 1}) {
    quantile_histogram h(2, {.k = 1, .buckets = 4});
    workspace ws;
    h.observe(matrix_view<const float>(s.data(), 4, 2), ws);
    for (index_t b = 0; b < 4; ++b)
      h.counts()[static_cast<std::size_t>(simd::count_place(1, b, 4))] = b == 3 ? left : 0;
    h.update();
    const double first = -0.25, second = left == 0 ? 0.5 : 1.0;
    CHECK(std::abs(static_cast<double>(h.bias()[0]) - (first - second) / 2) < 1e-6);
    CHECK(std::abs(static_cast<double>(h.bias()[1]) - (second - first) / 2) < 1e-6);
  }
}

TEST_CASE(
    "a score that nobody can choose by is counted in the farthest bucket, +inf in the nearest") {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  const std::vector<float> s{0.5f, 0.25f, nan, -inf, 0.5f, inf, 0.25f, 0.125f};
  quantile_histogram h(4, {.k = 1, .buckets = 4});
  workspace ws;
  h.observe(matrix_view<const float>(s.data(), 2, 4), ws);
  const auto count = [&](index_t e, index_t b) {
    return h.counts()[static_cast<std::size_t>(simd::count_place(e, b, 4))];
  };
  // Only finite scores set alpha: 0.25 in both tokens.
  CHECK(count(1, 0) == 1);
  CHECK(count(1, 2) == 1);
  CHECK(count(2, 3) == 1);
  CHECK(count(3, 3) == 1);
}

TEST_CASE("the histogram's buckets follow its biases, which may go anywhere") {
  // Each token prefers one expert by as much as scores allow, all of them the one that lost before.
  quantile_histogram h(2, {.k = 1, .buckets = 1000});
  quantile_balancer exact(2, {.k = 1});
  workspace ws;
  for (int step = 0; step < 3; ++step) {
    const float first = step % 2 == 0 ? 1.0f : 0.0f;
    const std::vector<float> s{first, 1.0f - first, first, 1.0f - first};
    const matrix_view<const float> view(s.data(), 2, 2);
    const auto width = static_cast<double>(h.bucket_width());
    const auto spread = static_cast<double>(std::abs(h.bias()[0] - h.bias()[1]));
    CHECK(std::abs(width - (2.0 + spread) / 1000) < 1e-6);
    h.observe(view, ws);
    exact.observe(view, ws);
    h.update();
    exact.update();
    CHECK(test::difference(h.bias(), exact.bias(), 0.0, 2 * (step + 1) * width) == "");
  }
}

TEST_CASE(
    "the histogram's bias is within a bucket of the exact one, however the tokens are split") {
  const skewed_scores data;
  quantile_balancer exact(16, {.k = 4});
  quantile_histogram whole(16, {.k = 4}), left(16, {.k = 4}), right(16, {.k = 4});
  workspace ws;
  for (int step = 0; step < 3; ++step) {
    const float width = whole.bucket_width();
    exact.observe(data.view(), ws);
    exact.update();
    whole.observe(data.view(), ws);
    left.observe(data.view().middle_rows(0, 300), ws);
    right.observe(data.view().middle_rows(300, 724), ws);
    for (std::size_t i = 0; i < left.counts().size(); ++i) left.counts()[i] += right.counts()[i];
    whole.update();
    left.update();
    CHECK(test::bit_difference(left.bias(), whole.bias()) == "");
    // Both are centred: two widths.
    if (step == 0)
      CHECK(test::difference(whole.bias(), exact.bias(), 0.0, 2 * static_cast<double>(width)) ==
            "");
    right = left;
  }
  CHECK(data.max_violation(whole.bias()) < 0.12);
}

TEST_CASE("a moving average keeps its share of the old bias; estimates of batches are averaged") {
  const skewed_scores a(1), b(2);
  workspace ws;
  const auto bias_after = [&](float ema, std::initializer_list<const skewed_scores*> batches) {
    quantile_balancer q(16, {.k = 4, .ema = ema});
    for (const auto* batch : batches) q.observe(batch->view(), ws);
    q.update();
    return std::vector<float>(q.bias().begin(), q.bias().end());
  };
  const auto of_a = bias_after(0, {&a}), of_b = bias_after(0, {&b}), both = bias_after(0, {&a, &b}),
             half = bias_after(0.5f, {&a});
  for (std::size_t e = 0; e < 16; ++e) {
    CHECK(std::abs(both[e] - (of_a[e] + of_b[e]) / 2) < 1e-6f);
    CHECK(std::abs(half[e] - of_a[e] / 2) < 1e-6f);
  }
}

TEST_CASE("a warm observation allocates nothing") {
  const skewed_scores data;
  quantile_balancer q(16, {.k = 4});
  quantile_histogram h(16, {.k = 4});
  workspace ws;
  const auto step = [&] {
    q.observe(data.view(), ws);
    q.update();
    h.observe(data.view(), ws);
    h.update();
  };
  step();
  CHECK(test::allocations_during(step) == 0);
}

TEST_CASE("what has nothing to decide moves no bias") {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  workspace ws;
  const auto bias_of = [&](const std::vector<float>& s, index_t experts, index_t k,
                           std::vector<std::uint8_t> mask = {}) {
    quantile_balancer q(experts, {.k = k});
    quantile_histogram h(experts, {.k = k});
    const matrix_view<const float> v(s.data(), static_cast<index_t>(s.size()) / experts, experts);
    q.observe(v, mask, ws);
    q.update();
    h.observe(v, mask, ws);
    h.update();
    for (const float b : h.bias()) CHECK(b == 0.0f);
    return std::vector<float>(q.bias().begin(), q.bias().end());
  };
  const std::vector<float> zero{0, 0};
  CHECK(bias_of({}, 2, 1) == zero);
  CHECK(bias_of({1, 2, 3, 4}, 2, 1, {0, 0}) == zero);
  CHECK(bias_of({1, 2, 3, 4}, 2, 2) == zero);
  CHECK(bias_of({nan, nan, inf, -inf}, 2, 1) == zero);
  CHECK(bias_of({1, 2}, 1, 1) == std::vector<float>{0});
  quantile_balancer q(2, {.k = 1});
  CHECK(test::refusal([&] { q.observe(matrix_view<const float>(zero.data(), 1, 1), ws); }) ==
        "moeroute::quantile_balancer: scores.cols is 1, expected 2");
  CHECK(test::refusal([&] {
          q.observe(matrix_view<const float>(zero.data(), 1, 2), std::vector<std::uint8_t>(2), ws);
        }) == "moeroute::quantile_balancer: mask.size() is 2, expected 1");
  quantile_histogram h(2, {.k = 1});
  CHECK(test::refusal([&] { h.observe(matrix_view<const float>(zero.data(), 1, 1), ws); }) ==
        "moeroute::quantile_histogram: scores.cols is 1, expected 2");
  CHECK(test::refusal([&] {
          h.observe(matrix_view<const float>(zero.data(), 1, 2), std::vector<std::uint8_t>(2), ws);
        }) == "moeroute::quantile_histogram: mask.size() is 2, expected 1");
  constexpr float most = std::numeric_limits<float>::max();
  for (const auto& [low, high] : {std::pair{-most, most}, {0.5f, 0.5f}, {0.0f, inf}, {nan, 1.0f}})
    CHECK(test::refusal([&] {
            quantile_histogram(2, {.k = 1, .least_score = low, .most_score = high});
          }) == "moeroute::quantile_histogram: least_score must be below most_score, both finite");
  CHECK(test::refusal([] { quantile_balancer(2, {.k = 3}); }) ==
        "moeroute::quantile_balancer: k is 3, expected 1 to 2");
}

TEST_CASE("quantiles follow the experts' shares; equal shares change no bit") {
  const test::skewed_scores d;
  const std::vector<float> equal(16, 2.0f);
  std::vector<float> share(16, 1.0f);
  share[3] = 4.0f;
  workspace ws;
  const auto bias = [&](std::span<const float> shares) {
    quantile_balancer b(16, {.k = 4, .share = shares});
    b.observe(d.view(), ws);
    b.update();
    return std::vector<float>(b.bias().begin(), b.bias().end());
  };
  CHECK(test::bit_difference(bias({}), bias(equal)) == "");
  // Who is to have more is chosen more readily, against everybody else.
  const std::vector<float> plain = bias({}), more = bias(share);
  for (std::size_t e = 0; e < 16; ++e)
    if (e != 3) CHECK(more[3] - more[e] > plain[3] - plain[e]);
  // The histogram is within a bucket of it.
  quantile_histogram h(16, {.k = 4, .share = share}), even(16, {.k = 4, .share = equal}),
      none(16, {.k = 4});
  const float bucket = h.bucket_width();
  for (auto* one : {&h, &even, &none}) {
    one->observe(d.view(), ws);
    one->update();
  }
  for (std::size_t e = 0; e < 16; ++e) CHECK(std::abs(h.bias()[e] - more[e]) <= 2.0f * bucket);
  CHECK(test::bit_difference(even.bias(), none.bias()) == "");
}

TEST_CASE("an expert whose share is every token's has the bias that the most tokens ask for") {
  // Experts 4, of whom one is to have half of all choices: as many as there are tokens.
  const skewed_scores d(3);
  std::vector<float> four;
  for (index_t t = 0; t < d.tokens; ++t)
    for (index_t e = 0; e < 4; ++e)
      four.push_back(d.score[static_cast<std::size_t>(t * d.experts + e)]);
  const matrix_view<const float> z(four.data(), d.tokens, 4);
  const std::vector<float> share = {3.0f, 1.0f, 1.0f, 1.0f};
  workspace ws;
  quantile_balancer b(4, {.k = 2, .share = share});
  quantile_histogram h(4, {.k = 2, .share = share});
  b.observe(z, ws);
  b.update();
  CHECK(b.bias()[0] != 0.0f);
  for (std::size_t e = 1; e < 4; ++e) CHECK(b.bias()[0] > b.bias()[e]);
  // The range of the histogram follows the scores and does not run away.
  const float bucket = h.bucket_width();
  h.observe(z, ws);
  h.update();
  for (std::size_t e = 0; e < 4; ++e) CHECK(std::abs(h.bias()[e] - b.bias()[e]) <= 3.0f * bucket);
  h.observe(z, ws);
  h.update();
  const float width = h.bucket_width();
  for (int i = 0; i < 20; ++i) {
    h.observe(z, ws);
    h.update();
  }
  CHECK(h.bucket_width() < 2.0f * width);
  // What should be whole is not one less by the rounding of a part.
  CHECK(detail::whole_places(49.0, 1.0 / 49.0) == 1);
  CHECK(detail::whole_places(49.0, 0.9 / 49.0) == 0);
  // Nor where there are so many places that the rounding is more than a hair.
  CHECK(detail::whole_places(49.0 * 33333333.0, 1.0 / 49.0) == 33333333);
}

TEST_CASE("with every option at once biases are their formula, observation after observation") {
  test::random rng(71);
  workspace ws;  // with whatever other shapes left in it
  for (int round = 0; round < 120; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    // Wide rows are where a k beyond a sorting network's, and beyond the lanes', is selected.
    const bool wide = rng.below(10) == 0;
    const index_t experts = wide ? 67 + rng.below(40) : 2 + rng.below(19);
    const index_t k = wide ? 32 + rng.below(experts - 32) : 1 + rng.below(experts - 1);
    const auto E = static_cast<std::size_t>(experts);
    const float ema = coin() ? 0.0f : rng.uniform();
    std::vector<float> share;
    double whole = 0.0;
    if (coin())
      for (std::size_t e = 0; e < E; ++e) {
        share.push_back(0.25f + rng.uniform());
        whole += static_cast<double>(share.back());
      }
    quantile_balancer exact(experts, {.k = k, .ema = ema, .share = share});
    const float least = coin() ? 0.0f : -3.0f, spread = coin() ? 1.0f : 4.0f;
    quantile_histogram counted(experts, {.k = k,
                                         .ema = ema,
                                         .buckets = 3000,
                                         .least_score = least,
                                         .most_score = least + spread,
                                         .share = share});
    const auto width = static_cast<double>(counted.bucket_width());
    CHECK(std::abs(width - static_cast<double>(spread) / 1500.0) < 1e-6);
    CHECK((exact.sums().size() == 2 * E &&
           std::ssize(counted.counts()) == round_up(experts, 16) * 3000));
    std::vector<double> bias(E, 0.0);
    // What a half makes of tokens: [E] estimates of s - alpha, of rows that decide.
    const auto estimates = [&](const std::vector<std::vector<double>>& decided) {
      std::vector<double> of(E, -HUGE_VAL);
      const auto tokens = static_cast<index_t>(decided.size());
      for (std::size_t e = 0; e < E && tokens > 0; ++e) {
        std::vector<double> column;
        for (const auto& above : decided)
          if (std::isfinite(above[e])) column.push_back(above[e]);
        const index_t q =
            share.empty()
                ? k * tokens / experts
                : std::min(tokens - 1,
                           static_cast<index_t>(static_cast<double>(k * tokens) *
                                                    (static_cast<double>(share[e]) / whole) +
                                                1e-9));
        of[e] = test::nth_largest(column, q + 1);
      }
      return of;
    };
    const bool odd_scores = coin();
    std::vector<std::vector<double>> all;
    for (int step = 0; step < 3; ++step) {
      std::vector<double> sum(E, 0.0), n(E, 0.0);
      for (std::int64_t batch = rng.below(3); batch >= 0; --batch) {
        const index_t tokens = rng.below(30);
        std::vector<float> s;
        std::vector<std::uint8_t> mask;
        for (index_t i = 0; i < tokens * experts; ++i) {
          const auto odd = odd_scores ? rng.below(30) : 9;
          s.push_back(odd == 0   ? std::numeric_limits<float>::quiet_NaN()
                      : odd == 1 ? HUGE_VALF
                      : odd == 2 ? -HUGE_VALF
                                 : least + spread * rng.uniform());
        }
        for (index_t t = 0; t < tokens; ++t)
          mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
        const bool masked = coin();
        const matrix_view<const float> view(s.data(), tokens, experts);
        const std::span<const std::uint8_t> of =
            masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>();
        if (coin())
          exact.observe(view, of, ws);
        else
          exact.observe(view, of, ws, test::backwards{});
        if (step == 0 && !odd_scores) counted.observe(view, of, ws);
        std::vector<std::vector<double>> decided;
        for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
          if (masked && mask[t] == 0) continue;
          std::vector<double> above, finite;
          for (std::size_t e = 0; e < E; ++e) {
            const auto x = static_cast<double>(s[t * E + e]);
            above.push_back(std::isfinite(x) ? x : -HUGE_VAL);
            if (std::isfinite(x)) finite.push_back(x + bias[e]);
          }
          const double alpha = test::nth_largest(finite, k + 1);
          if (alpha == -HUGE_VAL) continue;
          for (double& x : above) x -= alpha;
          decided.push_back(above);
          if (step == 0) all.push_back(above);
        }
        const std::vector<double> seen = estimates(decided);
        for (std::size_t e = 0; e < E; ++e) {
          if (!std::isfinite(seen[e])) continue;
          sum[e] -= seen[e];
          n[e] += 1.0;
        }
      }
      INFO("round " << round << " step " << step << " E=" << experts << " k=" << k << " ema " << ema
                    << " shares " << !share.empty());
      const auto next = [&](std::vector<double> b, const auto& fresh) {
        double mean = 0.0;
        for (std::size_t e = 0; e < E; ++e) {
          const double f = fresh(e), keep = static_cast<double>(ema);
          if (std::isfinite(f)) b[e] = keep * b[e] + (1.0 - keep) * f;
          mean += b[e] / static_cast<double>(experts);
        }
        for (double& x : b) x -= mean;
        return b;
      };
      if (step == 0 && !odd_scores) {
        CHECK(counted.tokens() == static_cast<std::int64_t>(all.size()));
        const std::vector<double> seen = estimates(all);
        const auto of = next(bias, [&](std::size_t e) { return -seen[e]; });
        counted.update();
        CHECK(counted.tokens() == 0);
        CHECK(test::difference(counted.bias(), of, 0.0, 2.0 * width + 1e-6) == "");
      }
      exact.update();
      bias = next(bias, [&](std::size_t e) { return n[e] > 0.0 ? sum[e] / n[e] : HUGE_VAL; });
      CHECK(test::difference(exact.bias(), bias, 1e-5, 2e-6) == "");
      for (std::size_t e = 0; e < E; ++e) bias[e] = static_cast<double>(exact.bias()[e]);
    }
  }
}

TEST_CASE("quantiles of up to 64 choices among many experts are their formula in both forms") {
  constexpr index_t tokens = 100;
  struct sizes {
    index_t experts, k;
  };
  // With k + 1 on either side of what kernels of another kind take.
  for (const auto [experts, k] : {sizes{70, 63}, sizes{2100, 64}}) {
    test::random rng(73);
    std::vector<float> s;
    for (index_t i = 0; i < tokens * experts; ++i) s.push_back(rng.uniform());
    const matrix_view<const float> scores(s.data(), tokens, experts);
    quantile_balancer exact(experts, {.k = k});
    quantile_histogram counted(experts, {.k = k, .buckets = 200});
    const auto width = static_cast<double>(counted.bucket_width());
    workspace ws;
    exact.observe(scores, ws);
    exact.update();
    workspace own;
    counted.observe(scores, own);
    counted.update();
    std::vector<std::vector<double>> column(static_cast<std::size_t>(experts));
    for (index_t t = 0; t < tokens; ++t) {
      const float* const score = scores.row(t);
      const double alpha = test::nth_largest(std::vector<double>(score, score + experts), k + 1);
      for (std::size_t e = 0; e < column.size(); ++e)
        column[e].push_back(static_cast<double>(score[e]) - alpha);
    }
    std::vector<double> expected;
    double mean = 0.0;
    for (const auto& list : column) {
      expected.push_back(-test::nth_largest(list, k * tokens / experts + 1));
      mean += expected.back() / static_cast<double>(experts);
    }
    for (double& x : expected) x -= mean;
    INFO(experts << " experts, " << k << " choices");
    CHECK(test::difference(exact.bias(), expected, 1e-5, 1e-6) == "");
    int wrong = 0;
    for (std::size_t e = 0; e < expected.size(); ++e)
      wrong += std::abs(static_cast<double>(counted.bias()[e]) - expected[e]) > 2.0 * width;
    CHECK(wrong == 0);
  }
}
