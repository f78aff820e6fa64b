#include <moeroute/balance/bip.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "support/allocations.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/guarded.hpp"
#include "support/refusal.hpp"
#include "support/skewed.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using test::skewed_scores;

TEST_CASE("more iterations balance better, within the sheet's bands") {
  const double band[] = {0.93, 0.90, 0.63, 0.30};
  const int iterations[] = {1, 2, 4, 8};
  for (int i = 0; i < 4; ++i) {
    double mean = 0;
    for (const std::uint64_t seed : {1u, 2u, 3u, 4u, 5u}) {
      const skewed_scores data(seed);
      bip_balancer b(16, {.k = 4, .iterations = iterations[i]});
      workspace ws;
      b.update(data.view(), ws);
      mean += data.max_violation(b.bias()) / 5;
    }
    INFO(iterations[i] << " iterations: " << mean);
    CHECK(mean < band[i] * 1.3);
    CHECK(mean > band[i] * 0.7);
  }
}

TEST_CASE("prices are not negative, and one iteration is the oracle's") {
  const skewed_scores d(5, 333, 10, 3);
  bip_balancer b(10, {.k = 3, .iterations = 1});
  workspace ws;
  b.update(d.view(), ws);
  std::vector<double> p, q;
  for (index_t t = 0; t < d.tokens; ++t) {
    std::vector<double> row;
    for (index_t e = 0; e < 10; ++e)
      row.push_back(static_cast<double>(d.score[static_cast<std::size_t>(t * 10 + e)]));
    p.push_back(std::max(0.0, test::nth_largest(row, 4)));
  }
  for (index_t e = 0; e < 10; ++e) {
    std::vector<double> column;
    for (index_t t = 0; t < d.tokens; ++t)
      column.push_back(static_cast<double>(d.score[static_cast<std::size_t>(t * 10 + e)]) -
                       p[static_cast<std::size_t>(t)]);
    q.push_back(std::max(0.0, test::nth_largest(column, 3 * d.tokens / 10 + 1)));
  }
  CHECK(test::difference(b.token_prices(), p, 1e-6) == "");
  CHECK(test::difference(b.prices(), q, 1e-5, 1e-7) == "");
  for (std::size_t e = 0; e < 10; ++e) CHECK(b.bias()[e] == -b.prices()[e]);
}

TEST_CASE("prices go on from batch to batch unless they start at zero, whatever the executor") {
  const skewed_scores data;
  workspace ws;
  bip_balancer whole(16, {.k = 4, .iterations = 6}), halves(16, {.k = 4, .iterations = 3}),
      anew(16, {.k = 4, .iterations = 3, .start = price_start::zero}),
      once(16, {.k = 4, .iterations = 3});
  whole.update(data.view(), ws, test::backwards{});
  for (int i = 0; i < 2; ++i) {
    halves.update(data.view(), ws);
    anew.update(data.view(), ws);
  }
  once.update(data.view(), ws);
  CHECK(test::bit_difference(halves.bias(), whole.bias()) == "");
  CHECK(test::bit_difference(anew.bias(), once.bias()) == "");
}

TEST_CASE("the online form balances a stream better than no form at all") {
  const skewed_scores data(3, 4096);
  bip_online b(16, 4, 1024);
  std::vector<std::int64_t> load(16, 0);
  for (index_t t = 0; t < data.tokens; ++t) {
    if (t == 1024 || t == 2048 || t == 3072) b.next_window();
    for (const index_t e : data.choose(t, b.bias())) load[static_cast<std::size_t>(e)] += t >= 2048;
    b.update({data.score.data() + t * 16, 16});
  }
  const auto most = static_cast<double>(*std::max_element(load.begin(), load.end()));
  CHECK(most / (2048.0 * 4 / 16) - 1 < 0.5 * data.max_violation());
  for (const float x : b.bias()) CHECK(x <= 0.0f);
}

TEST_CASE("a heap keeps the best of its tokens: the online price is the batch's order statistic") {
  const skewed_scores data(4, 256, 8, 2);
  const std::vector<float> none, equal(8, 3.0f), share{1, 1, 2, 1, 4, 1, 1, 1};
  for (const auto* shares : {&none, &equal, &share}) {
    bip_online b(8, 2, 256, *shares);
    std::vector<std::vector<double>> pushed(8);
    for (index_t t = 0; t < data.tokens; ++t) {
      std::vector<double> row;
      for (std::size_t e = 0; e < 8; ++e)
        row.push_back(
            static_cast<double>(data.score[static_cast<std::size_t>(t) * 8 + e] + b.bias()[e]));
      const double p = std::max(0.0, test::nth_largest(row, 3));
      for (std::size_t e = 0; e < 8; ++e)
        pushed[e].push_back(static_cast<double>(data.score[static_cast<std::size_t>(t) * 8 + e]) -
                            p);
      b.update({data.score.data() + t * 8, 8});
    }
    for (std::size_t e = 0; e < 8; ++e) {
      const double part = shares == &share ? double{share[e]} / 12.0 : 0.125;
      const auto room = static_cast<index_t>(512.0 * part) + 1;
      CHECK(std::abs(static_cast<double>(b.bias()[e]) +
                     std::max(0.0, test::nth_largest(pushed[e], room))) < 1e-5);
    }
  }
}

TEST_CASE("warm updates allocate nothing") {
  const skewed_scores data;
  bip_balancer b(16, {.k = 4});
  bip_online o(16, 4, 1024);
  workspace ws;
  b.update(data.view(), ws);
  CHECK(test::allocations_during([&] {
          b.update(data.view(), ws);
          o.update({data.score.data(), 16});
        }) == 0);
}

TEST_CASE("without tokens prices stay; scores that are no numbers are never chosen") {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  workspace ws;
  bip_balancer b(2, {.k = 1});
  b.update(matrix_view<const float>(nullptr, 0, 2), ws);
  CHECK(b.bias()[0] == 0.0f);
  const std::vector<float> s{nan, inf, -inf, nan};
  b.update(matrix_view<const float>(s.data(), 2, 2), ws);
  CHECK(b.bias()[0] == 0.0f);
  CHECK(b.bias()[1] == 0.0f);
  b.update(matrix_view<const float>(s.data(), 2, 2), std::vector<std::uint8_t>{0, 0}, ws);
  bip_balancer all(2, {.k = 2});
  const std::vector<float> two{1, 2};
  all.update(matrix_view<const float>(two.data(), 1, 2), ws);
  CHECK(all.bias()[0] == 0.0f);
  bip_balancer one(1, {.k = 1});
  one.update(matrix_view<const float>(two.data(), 2, 1), ws);
  CHECK(one.bias()[0] == 0.0f);
  // The largest float is a number, its negative too.
  const float most = std::numeric_limits<float>::max();
  const std::vector<float> ends{most, most, 0, -most, -most, -most};
  for (const std::vector<std::uint8_t>& mask : {std::vector<std::uint8_t>{}, {1, 1}}) {
    bip_balancer three(3, {.k = 1, .iterations = 1});
    three.update(matrix_view<const float>(ends.data(), 2, 3), mask, ws);
    CHECK(three.token_prices()[0] == most);
    CHECK(three.token_prices()[1] == 0.0f);
  }
  bip_online online(2, 1, 4);
  online.update(std::vector{nan, inf});
  CHECK(online.bias()[0] == 0.0f);
  CHECK(test::refusal([&] { online.update(std::vector{1.0f}); }) ==
        "moeroute::bip_online: scores.size() is 1, expected 2");
  CHECK(test::refusal([&] { b.update(matrix_view<const float>(s.data(), 1, 3), ws); }) ==
        "moeroute::bip_balancer: scores.cols is 3, expected 2");
}

TEST_CASE("experts are priced for the places that their share gives them; equal shares are none") {
  const skewed_scores d(5, 333, 10, 3);
  std::vector<float> share;
  for (int e = 0; e < 10; ++e) share.push_back(1.0f + static_cast<float>(e % 3));
  double sum = 0;
  for (const float s : share) sum += double{s};
  bip_balancer b(10, {.k = 3, .iterations = 1, .share = share});
  workspace ws;
  b.update(d.view(), ws);
  for (index_t e = 0; e < 10; ++e) {
    std::vector<double> column;
    for (index_t t = 0; t < d.tokens; ++t)
      column.push_back(static_cast<double>(d.score[static_cast<std::size_t>(t * 10 + e)]) -
                       static_cast<double>(b.token_prices()[static_cast<std::size_t>(t)]));
    const auto places = static_cast<index_t>(static_cast<double>(3 * d.tokens) *
                                             (double{share[static_cast<std::size_t>(e)]} / sum));
    CHECK(std::abs(static_cast<double>(b.prices()[static_cast<std::size_t>(e)]) -
                   std::max(0.0, test::nth_largest(column, places + 1))) < 1e-5);
  }
  const std::vector<float> equal(16, 2.0f);
  const skewed_scores even;
  bip_balancer plain(16, {.k = 4, .iterations = 3}),
      shared(16, {.k = 4, .iterations = 3, .share = equal});
  plain.update(even.view(), ws);
  shared.update(even.view(), ws);
  CHECK(test::bit_difference(plain.bias(), shared.bias()) == "");
}

TEST_CASE("with every option at once prices are their formula, batch after batch") {
  test::random rng(61);
  workspace ws;  // with whatever other shapes left in it
  for (int round = 0; round < 150; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    // Wide rows are where a k beyond a sorting network's, and beyond the lanes', is selected.
    const bool wide = rng.below(10) == 0;
    const index_t experts = wide ? 65 + rng.below(40) : 2 + rng.below(19);
    const index_t k = wide ? 32 + rng.below(experts - 31) : 1 + rng.below(experts);
    std::vector<float> share;
    double whole = 0.0;
    if (coin())
      for (index_t e = 0; e < experts; ++e) {
        share.push_back(0.25f + rng.uniform());
        whole += static_cast<double>(share.back());
      }
    const int iterations = static_cast<int>(rng.below(4));
    const price_start start = coin() ? price_start::previous : price_start::zero;
    bip_balancer b(experts, {.k = k, .iterations = iterations, .start = start, .share = share});
    std::vector<double> q(static_cast<std::size_t>(experts), 0.0);
    for (int batch = 0; batch < 4; ++batch) {
      const index_t tokens = rng.below(40);
      std::vector<float> s;
      std::vector<std::uint8_t> mask;
      for (index_t i = 0; i < tokens * experts; ++i) {
        const auto odd = rng.below(30);
        s.push_back(odd == 0   ? std::numeric_limits<float>::quiet_NaN()
                    : odd == 1 ? HUGE_VALF
                    : odd == 2 ? -HUGE_VALF
                               : rng.uniform());
      }
      const bool nobody = rng.below(5) == 0;
      for (index_t t = 0; t < tokens; ++t)
        mask.push_back(static_cast<std::uint8_t>(nobody ? 0 : 2 * rng.below(4)));
      const bool masked = coin();
      const matrix_view<const float> view(s.data(), tokens, experts);
      const std::span<const std::uint8_t> of =
          masked ? std::span<const std::uint8_t>(mask) : std::span<const std::uint8_t>();
      if (coin())
        b.update(view, of, ws);
      else
        b.update(view, of, ws, test::backwards{});

      index_t live = 0;
      for (index_t t = 0; t < tokens; ++t) live += !masked || mask[static_cast<std::size_t>(t)];
      std::vector<double> p(static_cast<std::size_t>(tokens), 0.0);
      const auto there = [&](index_t t, index_t e) {
        return (!masked || mask[static_cast<std::size_t>(t)] != 0) &&
               std::isfinite(s[static_cast<std::size_t>(t * experts + e)]);
      };
      const auto score = [&](index_t t, index_t e) {
        return static_cast<double>(s[static_cast<std::size_t>(t * experts + e)]);
      };
      if (live > 0 && start == price_start::zero) std::fill(q.begin(), q.end(), 0.0);
      for (int i = 0; live > 0 && i < iterations; ++i) {
        for (index_t t = 0; t < tokens; ++t) {
          std::vector<double> row;
          for (index_t e = 0; e < experts; ++e)
            if (there(t, e)) row.push_back(score(t, e) - q[static_cast<std::size_t>(e)]);
          p[static_cast<std::size_t>(t)] = std::max(0.0, test::nth_largest(row, k + 1));
        }
        for (index_t e = 0; e < experts; ++e) {
          std::vector<double> column;
          for (index_t t = 0; t < tokens; ++t)
            if (there(t, e)) column.push_back(score(t, e) - p[static_cast<std::size_t>(t)]);
          const auto at = static_cast<std::size_t>(e);
          const index_t places =
              share.empty() ? k * live / experts
                            : static_cast<index_t>(static_cast<double>(k * live) *
                                                       (static_cast<double>(share[at]) / whole) +
                                                   1e-9);
          q[at] = std::max(0.0, test::nth_largest(column, places + 1));
        }
      }
      INFO("round " << round << " batch " << batch << " T=" << tokens << " E=" << experts
                    << " k=" << k << " iterations " << iterations << " shares " << !share.empty());
      CHECK(test::difference(b.token_prices(), p, 1e-5, 1e-6) == "");
      CHECK(test::difference(b.prices(), q, 1e-5, 1e-6) == "");
      for (std::size_t e = 0; e < q.size(); ++e) REQUIRE(b.bias()[e] == 0.0f - b.prices()[e]);
    }
  }
}

TEST_CASE("with shares and windows the online price is what is left of a sorted list") {
  test::random rng(67);
  for (int round = 0; round < 60; ++round) {
    const index_t experts = 1 + rng.below(6), k = 1 + rng.below(experts),
                  window = 1 + rng.below(12);
    std::vector<float> share;
    double whole = 0.0;
    if (rng.below(2) == 0)
      for (index_t e = 0; e < experts; ++e) {
        share.push_back(0.25f + rng.uniform());
        whole += static_cast<double>(share.back());
      }
    bip_online b(experts, k, window, share);
    std::vector<std::vector<double>> seen(static_cast<std::size_t>(experts));
    std::vector<double> price(static_cast<std::size_t>(experts), 0.0);
    for (int token = 0; token < 40; ++token) {
      if (rng.below(12) == 0) {
        b.next_window();
        for (auto& list : seen) list.clear();
      }
      std::vector<float> s;
      std::vector<double> row;
      for (std::size_t e = 0; e < price.size(); ++e) {
        s.push_back(rng.below(9) == 0 ? std::numeric_limits<float>::quiet_NaN() : rng.uniform());
        if (std::isfinite(s[e])) row.push_back(static_cast<double>(s[e]) - price[e]);
      }
      b.update(s);
      const double p = std::max(0.0, test::nth_largest(row, k + 1));
      for (std::size_t e = 0; e < price.size(); ++e) {
        if (!std::isfinite(s[e])) continue;
        seen[e].push_back(static_cast<double>(s[e]) - p);
        const index_t room =
            1 + (share.empty() ? k * window / experts
                               : static_cast<index_t>(static_cast<double>(k * window) *
                                                          (static_cast<double>(share[e]) / whole) +
                                                      1e-9));
        if (static_cast<index_t>(seen[e].size()) >= room)
          price[e] = std::max(0.0, test::nth_largest(seen[e], room));
      }
      for (std::size_t e = 0; e < price.size(); ++e)
        REQUIRE(std::abs(static_cast<double>(b.bias()[e]) + price[e]) < 1e-5);
    }
  }
}

TEST_CASE(
    "more experts than tokens of a piece have columns, and up to 64 choices, are priced too") {
  constexpr index_t tokens = 100;
  struct sizes {
    index_t experts, k;
  };
  // With k + 1 on either side of what kernels of another kind take.
  for (const auto [experts, k] : {sizes{2100, 1}, sizes{70, 63}, sizes{2100, 64}}) {
    test::random rng(63);
    std::vector<float> s;
    for (index_t i = 0; i < tokens * experts; ++i) s.push_back(rng.uniform());
    bip_balancer b(experts, {.k = k, .iterations = 1});
    workspace ws;
    b.update(matrix_view<const float>(s.data(), tokens, experts), ws);
    int wrong = 0;
    std::vector<std::vector<double>> column(static_cast<std::size_t>(experts));
    for (std::size_t t = 0; t < std::size_t{tokens}; ++t) {
      const float* const row = s.data() + t * column.size();
      const float price = b.token_prices()[t];
      wrong += static_cast<double>(price) !=
               test::nth_largest(std::vector<double>(row, row + experts), k + 1);
      for (std::size_t e = 0; e < column.size(); ++e)
        column[e].push_back(static_cast<double>(row[e] - price));
    }
    for (std::size_t e = 0; e < column.size(); ++e)
      wrong += static_cast<double>(b.prices()[e]) !=
               std::max(0.0, test::nth_largest(column[e], k * tokens / experts + 1));
    INFO(experts << " experts, " << k << " choices");
    CHECK(wrong == 0);
    bip_balancer other(experts, {.k = k, .iterations = 1});
    other.update(matrix_view<const float>(s.data(), tokens, experts), ws, test::several_threads{2});
    CHECK(test::bit_difference(other.prices(), b.prices()) == "");
  }
}

TEST_CASE("prices of wide rows and many choices are found within the memory carved for them") {
  constexpr index_t experts = 2100, tokens = 10, k = 33;
  test::random rng(64);
  std::vector<float> s, bias;
  for (index_t i = 0; i < tokens * experts; ++i) s.push_back(rng.uniform());
  for (index_t e = 0; e < experts; ++e) bias.push_back(rng.uniform());
  test::edges memory(1 << 20);
  test::at_both_ends(memory, [&] {
    const auto m = memory.carve(
        [](scratch& tape) { return detail::dual_memory::carve(tape, tokens, experts, k, 1); });
    const serial exec;
    detail::dual_prices<simd::default_arch, serial> prices(
        {memory.copy(s), tokens, experts}, std::span<const std::uint8_t>(), m, 1, exec);
    prices.price_tokens(memory.copy(bias), k, [](float price) { return price; });
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<float> row(bias);
      for (std::size_t e = 0; e < row.size(); ++e)
        row[e] += s[static_cast<std::size_t>(t * experts) + e];
      std::nth_element(row.begin(), row.begin() + k - 1, row.end(), std::greater<>());
      CHECK(prices.price_of(t) == row[k - 1]);
    }
  });
}

TEST_CASE("a row of scores is read and filled up within its bounds, with a bias and without") {
  constexpr index_t most = 130;
  test::guarded<float> scores(most), added(most), filled(round_up(most, 16));
  const auto end = test::guarded_end::back;
  test::random rng(65);
  for (index_t n = 0; n <= most; ++n) {
    float *const row = scores.window(n, end), *const bias = added.window(n, end);
    const index_t stride = round_up(n, 16);
    for (index_t c = 0; c < n; ++c) {
      const auto odd = rng.below(10);
      const float number = rng.normal(), more = rng.normal();
      row[c] = odd == 0 ? HUGE_VALF : odd == 1 ? -HUGE_VALF : odd == 2 ? std::nanf("") : number;
      bias[c] = more;
    }
    int wrong = 0;
    for (const bool there : {true, false})
      for (const bool biased : {true, false}) {
        float* const out = filled.window(stride, end);
        detail::finite_row<simd::default_arch>(there ? row : nullptr, biased ? bias : nullptr, n,
                                               out);
        for (index_t c = 0; c < stride; ++c) {
          const bool number = there && c < n && std::isfinite(row[c]);
          const float expected = !number ? -HUGE_VALF : biased ? row[c] + bias[c] : row[c];
          wrong += out[c] != expected;
        }
      }
    CHECK(wrong == 0);
  }
}
