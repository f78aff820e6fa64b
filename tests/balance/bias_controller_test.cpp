#include <moeroute/balance/bias_controller.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/skewed.hpp"

using namespace moeroute;
using test::skewed_scores;

namespace {

using load_counts = std::vector<std::int64_t>;

std::vector<float> after(const bias_options& options, const load_counts& n, int updates = 1) {
  bias_controller c(static_cast<index_t>(n.size()), options);
  for (int i = 0; i < updates; ++i) c.update(n);
  return {c.bias().begin(), c.bias().end()};
}

}  // namespace

TEST_CASE("the sign rule moves every bias by u towards the mean, and not at all on it") {
  CHECK(after({.step = 0.5f}, {1, 2, 3}) == std::vector{0.5f, 0.0f, -0.5f});
  // A mean that no count equals.
  CHECK(after({.step = 0.5f}, {1, 2, 2, 2}) == std::vector{0.5f, -0.5f, -0.5f, -0.5f});
}

TEST_CASE("the proportional rule moves by the error in the chosen unit") {
  bias_options o{.rule = bias_rule::proportional, .step = 0.5f};
  CHECK(after(o, {0, 2, 4}) == std::vector{0.5f, 0.0f, -0.5f});
  o.error = bias_error::tokens;
  CHECK(after(o, {0, 2, 4}) == std::vector{1.0f, 0.0f, -1.0f});
  o.error = bias_error::over_total;
  CHECK(test::difference(after(o, {0, 2, 4}), std::vector{1.0f / 6, 0.0f, -1.0f / 6}, 1e-7) == "");
}

TEST_CASE("multiplicative factors start at 1 and stay positive") {
  const bias_options o{.rule = bias_rule::multiplicative, .step = 0.25f, .least_factor = 0.125f};
  CHECK(after(o, {0, 2, 4}) == std::vector{1.25f, 1.0f, 0.75f});
  CHECK(after(o, {0, 2, 4}, 9) == std::vector{3.25f, 1.0f, 0.125f});
  bias_controller c(3, o);
  c.update(load_counts{0, 2, 4});
  std::vector<float> logarithm(3);
  c.log_factors(logarithm);
  CHECK(test::difference(logarithm, std::vector{std::log(1.25f), 0.0f, std::log(0.75f)}, 1e-6) ==
        "");
}

TEST_CASE("steps decay as u, u / sqrt(n) and u / n") {
  const load_counts n{0, 2};
  bias_options o{.step = 1.0f};
  const auto sum = [&](step_decay decay) {
    o.decay = decay;
    return after(o, n, 4)[0];
  };
  CHECK(sum(step_decay::none) == 4.0f);
  CHECK(std::abs(sum(step_decay::inverse_root) -
                 (1 + 1 / std::sqrt(2.0f) + 1 / std::sqrt(3.0f) + 0.5f)) < 1e-6f);
  CHECK(std::abs(sum(step_decay::inverse) - (1 + 0.5f + 1.0f / 3 + 0.25f)) < 1e-6f);
}

TEST_CASE("recentring moves no choice") {
  const skewed_scores data;
  bias_controller free(16, {.step = 0.01f}),
      centred(16, {.centre = bias_centre::mean, .step = 0.01f});
  for (int step = 0; step < 30; ++step) {
    const auto n = data.counts(free.bias());
    free.update(n);
    centred.update(n);
  }
  double sum = 0;
  for (const float b : centred.bias()) sum += static_cast<double>(b);
  CHECK(std::abs(sum) < 1e-6);
  const double offset =
      static_cast<double>(free.bias()[0]) - static_cast<double>(centred.bias()[0]);
  for (std::size_t e = 0; e < 16; ++e)
    CHECK(std::abs(static_cast<double>(free.bias()[e]) - static_cast<double>(centred.bias()[e]) -
                   offset) < 1e-6);
}

TEST_CASE("the sign rule balances the recipe's scores within the sheet's bands") {
  const skewed_scores data;
  CHECK(data.max_violation() > 2.25 * 0.7);
  CHECK(data.max_violation() < 2.25 * 1.3);
  bias_controller c(16, {.step = 0.01f});
  for (int step = 0; step < 50; ++step) c.update(data.counts(c.bias()));
  double worst = data.max_violation(c.bias()), best = worst;
  for (int step = 0; step < 30; ++step) {
    c.update(data.counts(c.bias()));
    worst = std::max(worst, data.max_violation(c.bias()));
    best = std::min(best, data.max_violation(c.bias()));
  }
  CHECK(worst < 0.13 * 1.3);
  CHECK(best > 0.05 * 0.7 * 0.5);

  bias_controller slow(16, {.step = 1e-3f});
  for (int step = 0; step < 200; ++step) slow.update(data.counts(slow.bias()));
  CHECK(slow.updates() == 200);
  CHECK(data.max_violation(slow.bias()) > 0.13 * 1.3);
}

// Lg(x, p) = sum over choices of (gamma + p) - L sum p.
TEST_CASE("a step changes the Lagrangian of its own choice by - sum of eps (A - L)^2, exactly") {
  const skewed_scores data;
  const double level = 1024.0 * 4 / 16;
  const bias_rule rule = GENERATE(bias_rule::sign, bias_rule::proportional);
  bias_controller c(
      16,
      {.rule = rule, .error = bias_error::tokens, .step = rule == bias_rule::sign ? 0.01f : 1e-5f});
  for (int step = 0; step < 10; ++step) {
    const std::vector<float> before(c.bias().begin(), c.bias().end());
    const auto n = data.counts(before);
    c.update(n);
    // gamma is the same on both sides: what remains is p.
    double change = 0, expected = 0;
    for (std::size_t e = 0; e < 16; ++e) {
      const double load = static_cast<double>(n[e]);
      const double moved = static_cast<double>(c.bias()[e]) - static_cast<double>(before[e]);
      change += moved * (load - level);
      const double gap = std::abs(load - level);
      const double eps = rule == bias_rule::sign
                             ? (gap > 0 ? static_cast<double>(0.01f) / gap : 0.0)
                             : static_cast<double>(1e-5f);
      expected -= eps * gap * gap;
    }
    CHECK(std::abs(change - expected) < 1e-5 * std::abs(expected));
  }
}

TEST_CASE("a token drops an expert only for one that had no more tokens") {
  const skewed_scores data;
  const bias_rule rule = GENERATE(bias_rule::sign, bias_rule::proportional);
  bias_controller c(
      16,
      {.rule = rule, .error = bias_error::tokens, .step = rule == bias_rule::sign ? 0.01f : 1e-5f});
  index_t switches = 0, broken = 0;
  for (int step = 0; step < 30; ++step) {
    const std::vector<float> before(c.bias().begin(), c.bias().end());
    const auto n = data.counts(before);
    c.update(n);
    for (index_t t = 0; t < data.tokens; ++t) {
      const auto old = data.choose(t, before), now = data.choose(t, c.bias());
      for (const index_t out : old) {
        if (std::find(now.begin(), now.end(), out) != now.end()) continue;
        for (const index_t in : now) {
          if (std::find(old.begin(), old.end(), in) != old.end()) continue;
          ++switches;
          const auto a = n[static_cast<std::size_t>(out)], b = n[static_cast<std::size_t>(in)];
          broken += a < b;
          // The sign rule: from an expert not below the mean to one not above it.
          if (rule == bias_rule::sign) broken += a < 256 || b > 256;
        }
      }
    }
  }
  CHECK(switches > 500);
  CHECK(broken == 0);
}

TEST_CASE(
    "LongCat's rule reaches the wanted number of computing experts and leaves the others alone") {
  // Eight computing experts, then four that cost nothing, which the scores prefer.
  const index_t columns = 12, k = 4;
  skewed_scores data(3, 1024, columns, k);
  for (index_t t = 0; t < data.tokens; ++t)
    std::reverse(data.score.begin() + t * columns, data.score.begin() + (t + 1) * columns);
  real_expert_controller c({.experts = 8, .zero_experts = 4, .k = k, .target = 2.5f, .step = 0.5f});
  const auto real = [&](const auto& n) {
    double sum = 0;
    for (std::size_t e = 0; e < 8; ++e) sum += static_cast<double>(n[e]);
    return sum / 1024;
  };
  CHECK(real(data.counts()) < 1.5);
  for (int step = 0; step < 300; ++step) c.update(data.counts(c.bias()));
  CHECK(std::abs(real(data.counts(c.bias())) - 2.5) < 0.05);
  for (std::size_t e = 8; e < 12; ++e) CHECK(c.bias()[e] == 0.0f);
}

TEST_CASE("a controller's update allocates nothing") {
  bias_controller c(64, {.centre = bias_centre::mean});
  const load_counts n(64, 3);
  CHECK(test::allocations_during([&] { c.update(n); }) == 0);
}

TEST_CASE("counts that say nothing move no bias; counts that are wrong are refused") {
  bias_controller c(2);
  c.update(load_counts{0, 0});
  CHECK(c.updates() == 0);
  CHECK(c.bias()[0] == 0.0f);
  CHECK(test::refusal([&] { c.update(load_counts{1}); }) ==
        "moeroute::bias_controller: counts.size() is 1, expected 2");
  CHECK(test::refusal([&] { c.update(load_counts{-1, 1}); }) ==
        "moeroute::bias_controller: counts must be finite and not negative");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(test::refusal([&] { c.update(std::vector{nan, 1.0f}); }) ==
        "moeroute::bias_controller: counts must be finite and not negative");
  CHECK(c.bias()[0] == 0.0f);
  CHECK(test::refusal([] { bias_controller(0); }) ==
        "moeroute::bias_controller: experts is 0, expected 1 to 1048576");
  CHECK(test::refusal([&] { bias_controller(2, {.step = nan}); }) ==
        "moeroute::bias_controller: step is nan, expected >= 0 and finite");
  CHECK(test::refusal([] { real_expert_controller({.experts = 2, .k = 3}); }) ==
        "moeroute::real_expert_controller: k is 3, expected 1 to 2");
  // One expert is always balanced.
  bias_controller one(1);
  one.update(load_counts{7});
  CHECK(one.bias()[0] == 0.0f);
}

TEST_CASE("experts with shares of their own move towards these; equal shares change no bit") {
  const std::vector<float> share{1.0f, 1.0f, 2.0f}, equal(8, 3.0f);
  bias_options o{.rule = bias_rule::proportional, .error = bias_error::over_total, .step = 0.5f};
  o.share = share;
  CHECK(after(o, {2, 2, 4}) == std::vector{0.0f, 0.0f, 0.0f});
  CHECK(after(o, {4, 2, 2}) == std::vector{-0.125f, 0.0f, 0.125f});
  for (const bias_error error :
       {bias_error::over_mean, bias_error::over_total, bias_error::tokens}) {
    bias_options plain{.rule = bias_rule::proportional, .error = error, .step = 0.01f};
    bias_options shared = plain;
    shared.share = equal;
    const load_counts n{3, 1, 4, 1, 5, 9, 2, 6};
    CHECK(test::bit_difference(after(plain, n, 5), after(shared, n, 5)) == "");
  }
  // What has its part has it exactly, though 49 of 49ths are not one in double.
  CHECK(after({.step = 0.5f, .share = std::vector<float>(49, 2.0f)}, load_counts(49, 1)) ==
        std::vector<float>(49, 0.0f));
  CHECK(bias_controller(3, o).options().share.empty());  // it is not ours to keep
  const std::vector<float> two(2, 1.0f), none{1.0f, 0.0f, 1.0f};
  CHECK(test::refusal([&] { bias_controller(3, {.share = two}); }) ==
        "moeroute::bias_controller: share.size() is 2, expected 3");
  CHECK(test::refusal([&] { bias_controller(3, {.share = none}); }) ==
        "moeroute::bias_controller: share of expert 1 is 0.000000, expected > 0");
}

TEST_CASE("every combination of a controller's options is its formula, update after update") {
  const std::vector<load_counts> batches{
      {3, 1, 4, 1, 5}, {0, 0, 0, 0, 0}, {2, 2, 2, 2, 2}, {0, 9, 0, 0, 1}, {7, 1, 8, 2, 8}};
  const std::vector<float> uneven{1.0f, 2.0f, 3.0f, 1.0f, 1.0f};
  for (int bits = 0; bits < 108; ++bits) {
    const auto rule = static_cast<bias_rule>(bits % 3);
    const auto error = static_cast<bias_error>(bits / 3 % 3);
    const auto decay = static_cast<step_decay>(bits / 9 % 3);
    const auto centre = static_cast<bias_centre>(bits / 27 % 2);
    const bool shares = bits / 54 == 1;
    INFO(bits);
    bias_options o{.rule = rule,
                   .error = error,
                   .decay = decay,
                   .centre = centre,
                   .step = 0.25f,
                   .least_factor = 0.5f};
    if (shares) o.share = uneven;
    bias_controller c(5, o);
    const bool factors = rule == bias_rule::multiplicative;
    std::vector<double> expected(5, factors ? 1.0 : 0.0);
    double u = 0.25;
    int n = 0;
    for (std::size_t b = 0; b < batches.size(); ++b) {
      if (b == 3) c.set_step(0.125f), u = 0.125;
      c.update(batches[b]);
      double sum = 0.0, all = 0.0;
      for (const std::int64_t x : batches[b]) sum += static_cast<double>(x);
      if (sum == 0.0) continue;
      ++n;
      const double step = decay == step_decay::none           ? u
                          : decay == step_decay::inverse_root ? u / std::sqrt(n)
                                                              : u / n;
      for (std::size_t e = 0; e < 5; ++e) {
        const double mean = sum * (shares ? static_cast<double>(uneven[e]) / 8.0 : 0.2);
        double gap = mean - static_cast<double>(batches[b][e]);
        if (std::abs(gap) < 1e-12) gap = 0.0;
        const double moved = rule != bias_rule::proportional   ? (gap > 0) - (gap < 0)
                             : error == bias_error::over_mean  ? gap / mean
                             : error == bias_error::over_total ? gap / sum
                                                               : gap;
        expected[e] += step * moved;
        if (factors) expected[e] = std::max(expected[e], 0.5);
        all += expected[e] / 5.0;
      }
      for (double& x : expected)
        if (centre == bias_centre::mean) x = factors ? x / all : x - all;
    }
    CHECK(c.updates() == 4);
    CHECK(test::difference(c.bias(), expected, 1e-5, 1e-6) == "");
  }
}

TEST_CASE("LongCat's rule is its formula: the wanted share of all choices less the seen one") {
  real_expert_controller c({.experts = 2, .zero_experts = 1, .k = 2, .target = 1.5f, .step = 0.5f});
  c.update(load_counts{6, 2, 8});
  c.update(load_counts{0, 0, 0});
  CHECK(c.bias().size() == 3);
  CHECK(c.bias()[0] == 0.0f);  // 1.5 / 4 is 6 of 16
  CHECK(c.bias()[1] == 0.125f);
  CHECK(c.bias()[2] == 0.0f);
  c.update(load_counts{0, 4, 0});
  CHECK(c.bias()[0] == 0.1875f);
  CHECK(c.bias()[1] == 0.125f - 0.3125f);
}

TEST_CASE("a controller goes on from the bias that it is given, and from a fractional count") {
  bias_controller c(2, {.step = 0.5f});
  c.bias()[0] = 2.0f;
  c.update(std::vector<float>{0.25f, 0.5f});
  CHECK(std::vector<float>(c.bias().begin(), c.bias().end()) == std::vector{2.5f, -0.5f});
  real_expert_controller real({.experts = 2, .step = 0.5f});
  real.bias()[1] = 2.0f;
  real.update(std::vector<float>{0.75f, 0.25f});
  CHECK(std::vector<float>(real.bias().begin(), real.bias().end()) == std::vector{-0.125f, 2.125f});
}
