#include <moeroute/balance/loss.hpp>
//
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>
#include <vector>

#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/counting_new.hpp"
#include "support/losses.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// All losses of the softmax at once.
template <class F>
auto run_all(const oracle::batch& b, const row& counts, loss_options how = {}) {
  how.sequence_length = 5;
  const index_t sequences = ceil_div(b.tokens, 5);
  row flat;
  for (index_t s = 0; s < sequences; ++s) flat.insert(flat.end(), counts.begin(), counts.end());
  return test::run_losses<F>(
      b, how, switch_loss::megatron(0.5, counts, 2),
      sequence_loss{.coefficient = 0.5,
                    .counts = matrix_view<const double>(flat.data(), sequences, b.experts),
                    .k = 2},
      importance_loss{.coefficient = 0.5}, mean_importance_loss{.coefficient = 0.5},
      batch_entropy_loss{.coefficient = 0.5}, router_z_loss{.coefficient = 0.5},
      token_entropy_loss{.coefficient = 0.5}, tsallis_loss{.coefficient = 0.5, .q = 1.5},
      sparsity_loss{.coefficient = 0.5});
}

}  // namespace

TEST_CASE(
    "losses that share a call have the values of their own calls and the sum of their gradients") {
  const auto b = test::random_batch(51, 40, 20, true);
  const row c = test::random_counts(52, 40, 20, 2);
  const auto together = run_all<double>(b, c);
  const loss_options how{};
  row gradient(b.logits.size(), 0.0);
  std::size_t i = 0;
  const auto add = [&](const auto& loss, const loss_options& o) {
    const auto one = test::run_losses<double>(b, o, loss);
    CHECK(one.values[0] == Approx(together.values[i++]).epsilon(1e-12));
    for (std::size_t j = 0; j < gradient.size(); ++j) gradient[j] += one.gradient[j];
  };
  row flat;
  for (int s = 0; s < 8; ++s) flat.insert(flat.end(), c.begin(), c.end());
  add(switch_loss::megatron(0.5, c, 2), how);
  add(
      sequence_loss{
          .coefficient = 0.5, .counts = matrix_view<const double>(flat.data(), 8, 20), .k = 2},
      {.sequence_length = 5});
  add(importance_loss{.coefficient = 0.5}, how);
  add(mean_importance_loss{.coefficient = 0.5}, how);
  add(batch_entropy_loss{.coefficient = 0.5}, how);
  add(router_z_loss{.coefficient = 0.5}, how);
  add(token_entropy_loss{.coefficient = 0.5}, how);
  add(tsallis_loss{.coefficient = 0.5, .q = 1.5}, how);
  add(sparsity_loss{.coefficient = 0.5}, how);
  CHECK(test::difference(together.gradient, gradient, 1e-10, 1e-14) == "");
}

TEST_CASE("float agrees with double on every width of row") {
  for (const index_t experts : {1, 2, 8, 15, 16, 17, 31, 64, 100, 256}) {
    const auto b = test::random_batch(53, 50, experts, true);
    const row c = test::random_counts(54, 50, experts, 2);
    const auto exact = run_all<double>(b, c);
    const auto single = run_all<float>(b, c);
    for (std::size_t i = 0; i < 9; ++i)
      CHECK(single.values[i] == Approx(exact.values[i]).epsilon(2e-5).margin(1e-6));
    CHECK(test::difference(single.gradient, exact.gradient, 1e-4, 1e-6) == "");
  }
}

TEST_CASE("rows of the gradient sum to 0 through a softmax, whatever the loss of probabilities") {
  const auto b = test::random_batch(55, 9, 24);
  const row c = test::random_counts(56, 9, 24, 2);
  const auto run = test::run_losses<double>(
      b, {}, switch_loss::megatron(1.0, c, 2), importance_loss{.coefficient = 1.0},
      batch_entropy_loss{.coefficient = 1.0}, token_entropy_loss{.coefficient = 1.0},
      tsallis_loss{.coefficient = 1.0}, sparsity_loss{.coefficient = 1.0});
  for (std::size_t t = 0; t < 9; ++t) {
    double sum = 0.0;
    for (std::size_t e = 0; e < 24; ++e) sum += run.gradient[t * 24 + e];
    CHECK(sum == Approx(0.0).margin(1e-15));
  }
}

TEST_CASE("masked tokens have no gradient and change nothing for the others") {
  const auto masked = test::random_batch(57, 30, 16, true);
  oracle::batch without{0, 16, {}, {}};
  for (index_t t = 0; t < 30; ++t)
    if (masked.live(t)) {
      const row z = masked.of(t);
      without.logits.insert(without.logits.end(), z.begin(), z.end());
      ++without.tokens;
    }
  const row c = test::random_counts(58, 20, 16, 2);
  const auto run = [&](const oracle::batch& b) {
    return test::run_losses<float>(
        b, {}, switch_loss::megatron(1.0, c, 2), importance_loss{.coefficient = 1.0},
        router_z_loss{.coefficient = 1.0}, token_entropy_loss{.coefficient = 1.0});
  };
  const auto a = run(masked), b = run(without);
  for (std::size_t i = 0; i < 4; ++i) CHECK(a.values[i] == Approx(b.values[i]).epsilon(1e-12));
  std::vector<float> live;
  for (index_t t = 0; t < 30; ++t)
    for (std::size_t e = 0; e < 16; ++e) {
      const float g = a.gradient[static_cast<std::size_t>(t) * 16 + e];
      if (masked.live(t))
        live.push_back(g);
      else if (g != 0.0f)
        FAIL("a masked token has a gradient");
    }
  CHECK(test::bit_difference(live, b.gradient) == "");
}

TEST_CASE("add leaves masked rows as they are and adds to the others what write would write") {
  const auto b = test::random_batch(59, 24, 21, true);
  const row c = test::random_counts(60, 24, 21, 2);
  const auto written = run_all<double>(b, c);
  const auto added = run_all<double>(b, c, {.gradient = gradient_to::add});  // on top of 7
  for (std::size_t i = 0; i < written.gradient.size(); ++i)
    if (added.gradient[i] != Approx(7.0 + written.gradient[i]).epsilon(1e-13)) FAIL(i);
  const auto single = run_all<float>(b, c, {.gradient = gradient_to::add});
  CHECK(test::difference(single.gradient, added.gradient, 1e-6) == "");
}

TEST_CASE("the values alone are the values of the call with a gradient") {
  const auto b = test::random_batch(61, 100, 32, true);
  const std::vector<float> z(b.logits.begin(), b.logits.end());
  workspace ws;
  loss_options how{.mask = b.mask};
  const auto alone =
      balance_loss_value(how, matrix_view<const float>(z.data(), 100, 32), ws, serial{},
                         importance_loss{.coefficient = 1.0}, router_z_loss{.coefficient = 1.0});
  const auto full = test::run_losses<float>(b, {}, importance_loss{.coefficient = 1.0},
                                            router_z_loss{.coefficient = 1.0});
  CHECK(alone.value == full.values.value);
}

TEST_CASE(
    "every executor and thread count gives the same bits, and a warm call allocates nothing") {
  // Pieces of wide rows take so long that two run at once, on one processor too.
  for (const bool wide : {false, true}) {
    const index_t tokens = wide ? 384 : 1000, experts = wide ? 3000 : 40;
    const auto b = test::random_batch(63, tokens, experts, true);
    const row c = test::random_counts(64, tokens, experts, 2);
    row flat;
    for (int s = 0; s < ceil_div(tokens, 150); ++s) flat.insert(flat.end(), c.begin(), c.end());
    const std::vector<float> z(b.logits.begin(), b.logits.end());
    const loss_options how{.mask = b.mask, .sequence_length = 150};
    const auto run = [&](std::vector<float>& dz, workspace& ws, const auto& exec) {
      return balance_loss(
          how, matrix_view<const float>(z.data(), tokens, experts),
          matrix_view<float>(dz.data(), tokens, experts), ws, exec,
          switch_loss::megatron(1.0, c, 2),
          sequence_loss{
              .coefficient = 1.0,
              .counts = matrix_view<const double>(flat.data(), ceil_div(tokens, 150), experts),
              .k = 2},
          importance_loss{.coefficient = 1.0}, router_z_loss{.coefficient = 1.0},
          token_entropy_loss{.coefficient = 1.0}, tsallis_loss{.coefficient = 1.0, .q = 1.5},
          sparsity_loss{.coefficient = 1.0});
    };
    std::vector<float> one(z.size()), other(z.size());
    workspace ws;
    const auto expected = run(one, ws, serial{});
    CHECK(test::allocations_during([&] { run(one, ws, serial{}); }) == 0);
    for (const int threads : {1, 2, 5}) {
      workspace own;
      const auto values = run(other, own, test::several_threads{threads});
      CHECK(values.value == expected.value);
      CHECK(test::bit_difference(other, one) == "");
    }
    // Nor does it matter what lay in the memory, and the order of the pieces.
    workspace soiled;
    constexpr index_t room = 1 << 19;
    for (const float left : {std::nanf(""), 1e30f}) {
      std::fill_n(soiled.carve([](scratch& tape) { return tape.take<float>(room); }), room, left);
      const auto values = run(other, soiled, test::backwards{});
      CHECK(values.value == expected.value);
      CHECK(test::bit_difference(other, one) == "");
    }
  }
}

namespace {

struct counting_loops {
  int* loops;

  static constexpr int concurrency() { return 1; }
  template <class F>
  void parallel_for(index_t n, index_t grain, F&& f) const {
    ++*loops;
    serial{}.parallel_for(n, grain, f);
  }
};

}  // namespace

TEST_CASE("losses share one sweep, and those of sums take a second one where there is a gradient") {
  const auto b = test::random_batch(62, 20, 5);
  const row c = test::random_counts(62, 20, 5, 2);
  row dz(b.logits.size());
  workspace ws;
  const auto loops = [&](gradient_to to, const auto&... losses) {
    int n = 0;
    balance_loss<double>({.gradient = to, .sequence_length = 4}, {b.logits.data(), 20, 5},
                         {dz.data(), 20, 5}, ws, counting_loops{&n}, losses...);
    return n;
  };
  const auto of_counts = switch_loss::megatron(1.0, c, 2);
  CHECK(loops(gradient_to::write, of_counts, router_z_loss{}) == 1);
  CHECK(loops(gradient_to::add, of_counts) == 1);
  CHECK(loops(gradient_to::add, of_counts, importance_loss{}) == 2);
  CHECK(loops(gradient_to::write, of_counts, importance_loss{}) == 2);
  CHECK(loops(gradient_to::nowhere, of_counts, importance_loss{}) == 1);
}

TEST_CASE("a NaN counts as -inf, a row of nothing else adds nothing, +inf has no gradient") {
  const double nan = std::nan("");
  oracle::batch b = test::random_batch(65, 4, 18);
  const row c(18, 1.0);
  for (std::size_t e = 0; e < 9; ++e) b.logits[2 * e] = e % 2 != 0 ? nan : -infinity;
  oracle::batch minus = b;
  for (double& x : minus.logits)
    if (x != x) x = -infinity;
  const auto a = run_all<float>(b, c), m = run_all<float>(minus, c);
  CHECK(a.values.value == m.values.value);
  CHECK(test::bit_difference(a.gradient, m.gradient) == "");
  for (std::size_t e = 0; e < 9; ++e) CHECK(a.gradient[2 * e] == 0.0f);
  CHECK(test::difference(a.gradient, run_all<double>(b, c).gradient, 1e-4, 1e-6) == "");

  for (std::size_t e = 0; e < 18; ++e) b.logits[18 + e] = e % 2 != 0 ? nan : -infinity;
  b.logits[36 + 3] = b.logits[36 + 5] = infinity;
  const auto exact = run_all<double>(b, c);
  const auto single = run_all<float>(b, c);
  CHECK(std::isfinite(exact.values.total()));
  CHECK(single.values.total() == Approx(exact.values.total()).epsilon(1e-5));
  for (std::size_t e = 18; e < 54; ++e) {
    CHECK(exact.gradient[e] == 0.0);
    CHECK(single.gradient[e] == 0.0f);
  }
  CHECK(test::difference(single.gradient, exact.gradient, 1e-4, 1e-6) == "");
}

TEST_CASE("sigmoids of NaN and -inf are 0, and a row without mass adds nothing") {
  oracle::batch b = test::random_batch(66, 3, 17);
  const row c = test::random_counts(67, 3, 17, 1);
  for (std::size_t e = 0; e < 17; ++e) b.logits[17 + e] = e % 2 != 0 ? std::nan("") : -infinity;
  b.logits[4] = infinity;
  b.logits[5] = std::nan("");
  const loss_options how{.scores = probability::normalized_sigmoid, .sigmoid_eps = 1e-20f};
  const auto exact = test::run_losses<double>(b, how, switch_loss::megatron(1.0, c, 1));
  const auto single = test::run_losses<float>(b, how, switch_loss::megatron(1.0, c, 1));
  CHECK(std::isfinite(exact.values[0]));
  CHECK(single.values[0] == Approx(exact.values[0]).epsilon(1e-5));
  CHECK(test::difference(single.gradient, exact.gradient, 1e-4, 1e-6) == "");
  for (std::size_t e = 17; e < 34; ++e) CHECK(single.gradient[e] == 0.0f);
}

TEST_CASE("no token, all masked: every value is 0 and so is the gradient") {
  const row c(6, 0.0);
  const oracle::batch none{0, 6, {}, {}};
  CHECK(run_all<float>(none, c).values.total() == 0.0);
  oracle::batch masked = test::random_batch(68, 5, 6);
  masked.mask.assign(5, 0);
  const auto run = run_all<float>(masked, c);
  CHECK(run.values.total() == 0.0);
  CHECK(run.gradient == std::vector<float>(30, 0.0f));
}

TEST_CASE("logits far apart and far from 0 stay finite") {
  oracle::batch b = test::random_batch(69, 6, 20);
  for (double& x : b.logits) x *= 3000.0;
  const row c = test::random_counts(70, 6, 20, 2);
  const auto exact = run_all<double>(b, c);
  const auto single = run_all<float>(b, c);
  CHECK(single.values.total() == Approx(exact.values.total()).epsilon(1e-4));
  CHECK(test::difference(single.gradient, exact.gradient, 1e-4, 1e-3) == "");
}

TEST_CASE("shapes that do not fit are refused by name") {
  std::vector<float> z(12), dz(12);
  const matrix_view<const float> logits(z.data(), 3, 4);
  workspace ws;
  const std::uint8_t mask[] = {1, 1};
  const auto refusal = [&](const loss_options& how, matrix_view<float> d) {
    return test::refusal([&] { balance_loss(how, logits, d, ws, serial{}, router_z_loss{}); });
  };
  const matrix_view<float> fits(dz.data(), 3, 4);
  CHECK(refusal({}, {dz.data(), 2, 4}) == "moeroute::balance_loss: dlogits.rows is 2, expected 3");
  CHECK(refusal({}, {dz.data(), 3, 3}) == "moeroute::balance_loss: dlogits.cols is 3, expected 4");
  CHECK(refusal({.mask = mask}, fits) == "moeroute::balance_loss: mask.size is 2, expected 3");
  CHECK(refusal({}, {z.data(), 3, 4}) ==
        "moeroute::balance_loss: logits and dlogits overlap, expected memory of their own");
  CHECK(refusal({.sigmoid_eps = -1.0f}, fits) ==
        "moeroute::balance_loss: sigmoid_eps is negative, expected >= 0");
}
