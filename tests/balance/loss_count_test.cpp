#include <moeroute/balance/loss_count.hpp>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <moeroute/data/expert_load.hpp>
#include <vector>

#include "support/loss_agreement.hpp"
#include "support/refusal.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;
using oracle::rows;

namespace {

constexpr double tight = 1e-12;

// The agreement as an assertion.
template <class L>
void agrees(const oracle::batch& b, const loss_options& how, const L& loss,
            const std::function<double(const oracle::batch&)>& formula) {
  CHECK(test::disagreement(b, how, loss, formula) == "");
}

}  // namespace

TEST_CASE(
    "the Switch loss is its formula, and its gradient the derivative, in each normalisation") {
  for (const bool masked : {false, true})
    for (const index_t experts : {1, 5, 16, 37}) {
      const index_t tokens = experts > 16 ? 7 : 21;
      const auto b = test::random_batch(3, tokens, experts, masked);
      const row c = test::random_counts(4, tokens, experts, 2);
      const auto plain = [&](double factor, double k) {
        return [=](const oracle::batch& x) {
          return factor * oracle::switch_loss(oracle::probabilities(x), c, k);
        };
      };
      agrees(b, {}, switch_loss::megatron(0.01, c, 2), plain(0.01, 2));
      agrees(b, {}, switch_loss::first_choice(1.0, c), plain(1.0, 1));
      agrees(b, {}, switch_loss::deepspeed_top_k(1.0, c, 2), plain(1.0, 2));
      agrees(b, {}, switch_loss::megablocks(1.0, c, 2, 4), plain(0.25, 2));
      agrees(b, {}, switch_loss::hugging_face(1.0, c), plain(1.0, 1));
    }
}

TEST_CASE("the Switch loss of normalised sigmoids is differentiated through the normalisation") {
  const auto b = test::random_batch(5, 9, 19, true);
  const row c = test::random_counts(6, 9, 19, 3);
  agrees(b, {.scores = probability::normalized_sigmoid}, switch_loss::megatron(2.0, c, 3),
         [&](const oracle::batch& x) {
           return 2.0 *
                  oracle::switch_loss(
                      oracle::probabilities(x, oracle::normalized_sigmoid, 0, x.tokens), c, 3);
         });
}

TEST_CASE(
    "the Switch loss of normalised sqrt-softplus scores is differentiated through both steps") {
  auto b = test::random_batch(7, 9, 19, true);
  const row c = test::random_counts(6, 9, 19, 3);
  agrees(b, {.scores = probability::normalized_sqrt_softplus}, switch_loss::megatron(2.0, c, 3),
         [&](const oracle::batch& x) {
           return 2.0 * oracle::switch_loss(
                            oracle::probabilities(x, oracle::normalized_sqrt_softplus, 0, x.tokens),
                            c, 3);
         });
}

TEST_CASE("sqrt-softplus scores of far, broken and infinite logits: float agrees with double") {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  auto b = test::random_batch(10, 6, 18);
  const row c = test::random_counts(6, 6, 18, 2);
  for (std::size_t e = 0; e < 18; ++e) {
    b.logits[e] = 4.0 * static_cast<double>(e) - 36.0;
    b.logits[18 + e] = -infinity;
    b.logits[36 + e] *= 20.0;
  }
  b.logits[54] = std::nan("");
  b.logits[55] = -infinity;
  b.logits[72] = infinity;
  const loss_options how{.scores = probability::normalized_sqrt_softplus};
  const auto exact = test::run_losses<double>(b, how, switch_loss::megatron(1.0, c, 2));
  const auto single = test::run_losses<float>(b, how, switch_loss::megatron(1.0, c, 2));
  CHECK(std::isfinite(exact.values[0]));
  CHECK(single.values[0] == Approx(exact.values[0]).epsilon(1e-5));
  CHECK(test::difference(single.gradient, exact.gradient, 1e-4, 1e-8) == "");
  for (std::size_t e = 18; e < 36; ++e) CHECK(single.gradient[e] == 0.0f);
  CHECK(single.gradient[54] == 0.0f);
  for (std::size_t e = 72; e < 90; ++e) CHECK(std::abs(single.gradient[e]) < 1e-8f);
}

TEST_CASE("parts of a group with the group's counts add up to the whole") {
  const auto all = test::random_batch(8, 30, 12);
  const row c = test::random_counts(9, 30, 12, 2);
  const auto whole = test::run_losses<double>(all, {}, switch_loss::megatron(1.0, c, 2));
  double value = 0.0;
  row gradient;
  for (const index_t first : {0, 10, 20}) {
    oracle::batch part{
        10, 12, {all.logits.begin() + first * 12, all.logits.begin() + (first + 10) * 12}, {}};
    const auto one = test::run_losses<double>(part, {}, switch_loss::megatron(1.0, c, 2, 30));
    value += one.values[0];
    gradient.insert(gradient.end(), one.gradient.begin(), one.gradient.end());
  }
  CHECK(value == Approx(whole.values[0]).epsilon(tight));
  CHECK(test::difference(gradient, whole.gradient, tight, 1e-15) == "");
}

TEST_CASE("the loss by sequence is the mean of the losses of the sequences") {
  for (const auto scores : {probability::softmax, probability::normalized_sigmoid})
    for (const bool masked : {false, true})
      for (const index_t length : {1, 4, 7, 30}) {
        const auto b = test::random_batch(11, 23, 18, masked);
        const index_t n = ceil_div(23, length);
        row flat;
        rows c;
        for (index_t s = 0; s < n; ++s) {
          c.push_back(test::random_counts(12 + static_cast<std::uint64_t>(s), length, 18, 2));
          flat.insert(flat.end(), c.back().begin(), c.back().end());
        }
        const sequence_loss loss{
            .coefficient = 0.5, .counts = matrix_view<const double>(flat.data(), n, 18), .k = 2};
        agrees(b, {.scores = scores, .sequence_length = length}, loss, [&](const oracle::batch& x) {
          return 0.5 * (scores == probability::softmax
                            ? oracle::sequence_loss(x, oracle::softmax, length, c, 2)
                            : oracle::sequence_loss(x, oracle::normalized_sigmoid, length, c, 2));
        });
      }
}

TEST_CASE("a sequence whose tokens are all masked is none of those that the mean is over") {
  auto b = test::random_batch(31, 12, 6);
  b.mask.assign(12, 1);
  for (std::size_t t = 4; t < 8; ++t) b.mask[t] = 0;
  row flat;
  rows c;
  for (std::uint64_t s = 0; s < 3; ++s) {
    c.push_back(test::random_counts(32 + s, 4, 6, 2));
    flat.insert(flat.end(), c.back().begin(), c.back().end());
  }
  const sequence_loss loss{
      .coefficient = 0.5, .counts = matrix_view<const double>(flat.data(), 3, 6), .k = 2};
  agrees(b, {.sequence_length = 4}, loss, [&](const oracle::batch& x) {
    return 0.5 * oracle::sequence_loss(x, oracle::softmax, 4, c, 2);
  });
}

TEST_CASE("one sequence is the plain loss") {
  const auto b = test::random_batch(13, 17, 16);
  const row c = test::random_counts(14, 17, 16, 2);
  const auto plain = test::run_losses<double>(b, {}, switch_loss::megatron(1.0, c, 2));
  const auto one = test::run_losses<double>(
      b, {.sequence_length = 17},
      sequence_loss{
          .coefficient = 1.0, .counts = matrix_view<const double>(c.data(), 1, 16), .k = 2});
  CHECK(one.values[0] == Approx(plain.values[0]).epsilon(tight));
  CHECK(test::difference(one.gradient, plain.gradient, tight, 1e-16) == "");
}

TEST_CASE("the losses of devices and of communication are their formulas") {
  const auto b = test::random_batch(15, 14, 24, true);
  const row c = test::random_counts(16, 14, 24, 3);
  agrees(b, {}, device_loss{.coefficient = 0.05, .counts = c, .k = 3, .devices = 4},
         [&](const oracle::batch& x) {
           return 0.05 * oracle::device_loss(oracle::probabilities(x), c, 3, 4);
         });
  const row tokens = {5, 9, 0, 14};
  agrees(b, {}, communication_loss{.coefficient = 0.02, .counts = tokens, .devices_per_token = 2},
         [&](const oracle::batch& x) {
           return 0.02 * oracle::communication_loss(oracle::probabilities(x), tokens, 2);
         });
}

TEST_CASE("moving probability inside a device changes the device loss by nothing") {
  // Two experts of the same device swap their logits everywhere.
  auto b = test::random_batch(17, 10, 8);
  const row c = test::random_counts(18, 10, 8, 2);
  const device_loss loss{.coefficient = 1.0, .counts = c, .k = 2, .devices = 4};
  const double before = test::run_losses<double>(b, {}, loss).values[0];
  for (index_t t = 0; t < 10; ++t)
    std::swap(b.logits[static_cast<std::size_t>(t * 8 + 2)],
              b.logits[static_cast<std::size_t>(t * 8 + 3)]);
  CHECK(test::run_losses<double>(b, {}, loss).values[0] == Approx(before).epsilon(tight));
}

TEST_CASE("specialisation balance is its formula for both signs of sharpness") {
  const auto b = test::random_batch(19, 13, 10, true);
  const row c = test::random_counts(20, 13, 10, 2);
  for (const double sharpness : {-0.3, 0.0, 0.3})
    agrees(b, {}, specialisation_loss{.coefficient = 0.7, .sharpness = sharpness, .counts = c},
           [&](const oracle::batch& x) {
             const rows p = oracle::probabilities(x);
             double all = 0.0, value = 0.0;
             for (const double n : c) all += n;
             const row pbar = oracle::mean(p, 10);
             for (std::size_t e = 0; e < 10; ++e) value += 0.7 * pbar[e] * c[e] / all;
             return value - sharpness * oracle::mean_of(p, oracle::entropy);
           });
}

TEST_CASE("at balance the value is the coefficient") {
  oracle::batch b{8, 4, row(32, 0.25), {}};
  const row c(4, 4.0), devices(2, 8.0);
  const rows per_sequence(2, row(4, 2.0));
  const row flat(8, 2.0);
  const auto v = test::run_losses<double>(
      b, {.sequence_length = 4}, switch_loss::megatron(0.3, c, 2),
      switch_loss::hugging_face(0.3, c),
      sequence_loss{
          .coefficient = 0.3, .counts = matrix_view<const double>(flat.data(), 2, 4), .k = 2},
      device_loss{.coefficient = 0.3, .counts = c, .k = 2, .devices = 2},
      communication_loss{.coefficient = 0.3, .counts = devices, .devices_per_token = 2});
  CHECK(v.values[0] == Approx(0.3).epsilon(tight));
  CHECK(v.values[1] == Approx(0.6).epsilon(tight));  // without the division by k
  for (std::size_t i = 2; i < 5; ++i) CHECK(v.values[i] == Approx(0.3).epsilon(tight));
  // Where none is given it is the published one.
  CHECK(test::run_losses<double>(b, {}, switch_loss{.counts = c, .divisor = 2.0}).values[0] ==
        Approx(0.01).epsilon(tight));
}

TEST_CASE("where the counts follow p the Switch loss is between coefficient and E times that") {
  for (const double spread : {0.0, 1.0, 5.0, 60.0}) {
    oracle::batch b{6, 5, {}, {}};
    for (index_t i = 0; i < 30; ++i) b.logits.push_back(i % 5 == 2 ? spread : 0.0);
    row c = oracle::mean(oracle::probabilities(b), 5);
    for (double& x : c) x *= 6.0;
    const double v = test::run_losses<double>(b, {}, switch_loss::megatron(1.0, c, 1)).values[0];
    CHECK(v >= 1.0 - tight);
    CHECK(v <= 5.0 + tight);
    if (spread == 0.0) CHECK(v == Approx(1.0).epsilon(tight));
    if (spread == 60.0) CHECK(v == Approx(5.0).epsilon(tight));
  }
}

TEST_CASE("arguments of losses of counts are refused by name") {
  const auto b = test::random_batch(21, 4, 6);
  const row five(5, 1.0), six(6, 1.0), negative = {1, 1, 1, -1, 1, 1};
  const auto refusal = [&](const auto& loss, const loss_options& how = {}) {
    return test::refusal([&] { test::run_losses<double>(b, how, loss); });
  };
  CHECK(refusal(switch_loss::megatron(1.0, five, 2)) ==
        "moeroute::switch_loss: counts.size is 5, expected 6");
  CHECK(refusal(switch_loss::megatron(-1.0, six, 2)) ==
        "moeroute::switch_loss: coefficient is -1.000000, expected >= 0");
  CHECK(refusal(switch_loss::megatron(1.0, negative, 2)) ==
        "moeroute::switch_loss: a count is -1.000000, expected >= 0");
  CHECK(refusal(switch_loss::megatron(1.0, six, 0)) ==
        "moeroute::switch_loss: divisor is 0.000000, expected > 0");
  CHECK(refusal(device_loss{.counts = six, .k = 2, .devices = 4}) ==
        "moeroute::device_loss: experts % devices is 2, expected 0");
  CHECK(refusal(communication_loss{.counts = five}) ==
        "moeroute::communication_loss: experts % devices is 1, expected 0");
  CHECK(refusal(sequence_loss{.counts = matrix_view<const double>(six.data(), 1, 6)}) ==
        "moeroute::balance_loss: sequence_length is 0, expected 1 to 1099511627776");
  CHECK(refusal(sequence_loss{.counts = matrix_view<const double>(six.data(), 1, 6)},
                {.sequence_length = 2}) == "moeroute::sequence_loss: counts.rows is 1, expected 2");
}
