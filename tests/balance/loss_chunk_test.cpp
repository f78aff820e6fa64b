#include <moeroute/balance/loss_chunk.hpp>

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

template <class Exec = serial>
double run(const oracle::batch& b, const row& z, const chunk_sparsity_loss& loss, row* gradient,
           const Exec& exec = {}) {
  workspace ws;
  row unused(z.size());
  return chunk_sparsity(
      loss, {.mask = b.mask}, matrix_view<const double>(z.data(), b.tokens, b.experts),
      matrix_view<double>((gradient != nullptr ? *gradient : unused).data(), b.tokens, b.experts),
      ws, exec);
}

// Shares of one token, step by step as published: rectify, normalise, divide by the sum.
row shares(const oracle::batch& b, index_t t, bool normalized, double eps = 1e-5,
           double norm_eps = 1e-6) {
  row r = b.of(t);
  double squares = 0.0, sum = 0.0;
  for (double& x : r) x = x > 0.0 && b.live(t) ? x : 0.0;
  for (const double x : r) squares += x * x / static_cast<double>(r.size());
  if (normalized)
    for (double& x : r) x /= std::sqrt(squares + norm_eps);
  for (const double x : r) sum += x;
  for (double& x : r) x /= sum + eps;
  return r;
}

double formula(const oracle::batch& b, const chunk_sparsity_loss& loss) {
  const index_t chunk = loss.chunk;
  double value = 0.0, n = 0.0;
  for (index_t c = 0; c < b.tokens / chunk; ++c)
    for (std::size_t e = 0; e < static_cast<std::size_t>(b.experts); ++e) {
      double log_product = 0.0;
      for (index_t t = c * chunk; t < (c + 1) * chunk; ++t)
        log_product +=
            std::log(1.0 - shares(b, t, loss.normalized, loss.eps, loss.norm_eps)[e] + loss.eps);
      value += 1.0 - std::exp(log_product);
      n += 1.0;
    }
  return loss.coefficient * value / n;
}

// Away from 0, where the rectifier bends.
oracle::batch smooth_batch(std::uint64_t seed, index_t tokens, index_t experts, bool masked) {
  auto b = test::random_batch(seed, tokens, experts, masked);
  for (double& x : b.logits) x += x > 0.0 ? 0.05 : -0.05;
  return b;
}

double run_locality(const oracle::batch& b, const row& z, const locality_loss& loss,
                    row* gradient) {
  row unused(z.size());
  return activation_locality(
      loss, {.mask = b.mask}, matrix_view<const double>(z.data(), b.tokens, b.experts),
      matrix_view<double>((gradient != nullptr ? *gradient : unused).data(), b.tokens, b.experts));
}

}  // namespace

TEST_CASE("chunk sparsity is its formula, and its gradient the derivative") {
  for (const bool masked : {false, true})
    for (const bool normalized : {false, true})
      for (const index_t chunk : {1, 4, 12}) {
        const auto b = smooth_batch(121, 24, 7, masked);
        chunk_sparsity_loss loss{.coefficient = 0.5, .chunk = chunk, .normalized = normalized};
        if (chunk == 4) loss.eps = 0.25, loss.norm_eps = 0.125;
        row gradient(168, 7.0), other(168, 7.0);
        CHECK(run(b, b.logits, loss, &gradient) == Approx(formula(b, loss)).epsilon(1e-10));
        run(b, b.logits, loss, &other, test::several_threads{3});
        CHECK(other == gradient);
        CHECK(test::gradient_difference(
                  b.logits, [&](const row& z, row* out) { return run(b, z, loss, out); }) == "");
      }
}

TEST_CASE("chunk sparsity has the same bits where several threads are inside chunks at once") {
  // Chunks take so long that two run at once, on one processor too.
  const auto b = smooth_batch(124, 512, 3000, true);
  const chunk_sparsity_loss loss{.coefficient = 0.5, .chunk = 16};
  row one(b.logits.size()), other(b.logits.size());
  const double value = run(b, b.logits, loss, &one);
  CHECK(run(b, b.logits, loss, &other, test::several_threads{3}) == value);
  CHECK(other == one);
}

TEST_CASE("soft balance is its formula, and its gradient the derivative at constant loads") {
  for (const bool masked : {false, true})
    for (const bool normalized : {false, true}) {
      const auto b = smooth_batch(122, 70, 7, masked);
      share_balance_loss loss{.coefficient = 0.5, .normalized = normalized};
      if (masked) loss.eps = 0.25, loss.norm_eps = 0.125;
      const auto run_on = [&](const row& z, row* gradient, const auto& exec) {
        workspace ws;
        row unused(z.size());
        return share_balance(
            loss, {.mask = b.mask}, matrix_view<const double>(z.data(), 70, 7),
            matrix_view<double>((gradient != nullptr ? *gradient : unused).data(), 70, 7), ws,
            exec);
      };
      row sum(7, 0.0), load(7, 0.0);
      double live = 0.0, all = loss.eps, expected = 0.0;
      for (index_t t = 0; t < 70; ++t) {
        const row s = shares(b, t, normalized, loss.eps, loss.norm_eps);
        live += b.live(t) ? 1.0 : 0.0;
        for (std::size_t e = 0; e < 7; ++e) {
          sum[e] += s[e];
          load[e] += s[e] > 0.0 ? 1.0 : 0.0;
        }
      }
      for (const double n : load) all += n;
      for (std::size_t e = 0; e < 7; ++e) expected += 0.5 * 7.0 * sum[e] / live * load[e] / all;
      row gradient(490, 7.0), other(490, 7.0);
      CHECK(run_on(b.logits, &gradient, serial{}) == Approx(expected).epsilon(1e-10));
      run_on(b.logits, &other, test::several_threads{3});
      CHECK(other == gradient);
      CHECK(test::gradient_difference(
                b.logits, [&](const row& z, row* out) { return run_on(z, out, serial{}); }) == "");
    }
}

TEST_CASE("soft balance of one expert, of masked tokens, of broken logits, of bad options") {
  workspace ws;
  row z{1.0, 2.0, -1.0}, dz(3, 7.0);
  const matrix_view<const double> logits(z.data(), 3, 1);
  const matrix_view<double> gradient(dz.data(), 3, 1);
  // Two of three tokens have a share, which is all of it.
  CHECK(share_balance({}, {}, logits, gradient, ws, serial{}) == Approx(2.0 / 3.0).epsilon(1e-4));
  const std::vector<std::uint8_t> none(3, 0);
  CHECK(share_balance({}, {.mask = none}, logits, gradient, ws, serial{}) == 0.0);
  CHECK(dz == row(3, 0.0));
  z = {std::nan(""), std::numeric_limits<double>::infinity(),
       -std::numeric_limits<double>::infinity()};
  CHECK(share_balance({}, {}, logits, gradient, ws, serial{}) == 0.0);
  CHECK(dz == row(3, 0.0));
  const auto refused = [&](const auto& loss) {
    return test::refusal([&] { share_balance(loss, {}, logits, gradient, ws, serial{}); });
  };
  CHECK(refused(share_balance_loss{.coefficient = -1.0}) ==
        "moeroute::share_balance: coefficient is -1.000000, expected >= 0");
  CHECK(refused(share_balance_loss{.eps = 0.0}) ==
        "moeroute::share_balance: an eps is not positive");
}

TEST_CASE(
    "chunk sparsity does not fall when chunks are merged, and of single tokens it is the mean") {
  const auto b = smooth_batch(123, 64, 10, false);
  double last = -1.0;
  for (const index_t chunk : {1, 2, 4, 8, 16, 32, 64}) {
    const double value = run(b, b.logits, {.coefficient = 1.0, .chunk = chunk}, nullptr);
    CHECK(value >= last);
    CHECK(value >= -static_cast<double>(chunk) * 1e-5);
    CHECK(value <= 1.0);
    last = value;
  }
  double mean = 0.0;
  for (index_t t = 0; t < 64; ++t)
    for (const double s : shares(b, t, true)) mean += s / 640.0;
  CHECK(run(b, b.logits, {.coefficient = 1.0, .chunk = 1}, nullptr) == Approx(mean - 1e-5));
}

TEST_CASE("locality is the cross-entropy of neighbours, and its gradient the derivative") {
  const std::int32_t neighbour[] = {6, 0, 1, 1, 3, -1, 5, 2};
  for (const bool masked : {false, true}) {
    auto b = test::random_batch(125, 8, 6, masked);
    const locality_loss loss{.coefficient = 0.5, .beta = 2.0, .neighbour = neighbour};
    double expected = 0.0, n = 0.0;
    for (index_t t = 0; t < 8; ++t) {
      const index_t nb = neighbour[t];
      if (nb < 0 || !b.live(t) || !b.live(nb)) continue;
      for (index_t e = 0; e < 6; ++e, n += 1.0) {
        const double y = 1.0 / (1.0 + std::exp(-2.0 * b.at(t, e)));
        const double p = 1.0 / (1.0 + std::exp(-2.0 * b.at(nb, e)));
        expected -= 0.5 * (y * std::log(p) + (1.0 - y) * std::log(1.0 - p));
      }
    }
    row gradient(48, 7.0);
    CHECK(run_locality(b, b.logits, loss, &gradient) == Approx(expected / n).epsilon(1e-11));
    CHECK(test::gradient_difference(b.logits, [&](const row& z, row* out) {
            return run_locality(b, z, loss, out);
          }) == "");
  }
}

TEST_CASE("in float, losses of chunks and neighbours are those in double, at every width") {
  workspace ws;
  for (const index_t experts : {1, 3, 16, 33, 64, 200})
    for (const bool masked : {false, true}) {
      const auto b = smooth_batch(126, 96, experts, masked);
      std::vector<std::int32_t> neighbour(96);
      for (std::size_t t = 0; t < 96; ++t) neighbour[t] = static_cast<std::int32_t>(t * 5 % 96);
      for (const bool normalized : {false, true}) {
        CHECK(test::float_disagreement(b, [&](auto z, auto dz, gradient_to to) {
                return chunk_sparsity({.chunk = 12, .normalized = normalized},
                                      {.gradient = to, .mask = b.mask}, z, dz, ws,
                                      test::several_threads{2});
              }) == "");
        CHECK(test::float_disagreement(b, [&](auto z, auto dz, gradient_to to) {
                return share_balance({.normalized = normalized}, {.gradient = to, .mask = b.mask},
                                     z, dz, ws, test::several_threads{2});
              }) == "");
      }
      for (const double beta : {0.5, 100.0})
        CHECK(test::float_disagreement(b, [&](auto z, auto dz, gradient_to to) {
                return activation_locality({.beta = beta, .neighbour = neighbour},
                                           {.gradient = to, .mask = b.mask}, z, dz);
              }) == "");
    }
}

TEST_CASE("one expert that takes the whole share leaves a chunk's product above 0") {
  // 1 - share is a rounding error here; eps is what keeps the factor positive.
  const std::vector<float> z{1e6f, -1.0f, 3e5f, -1.0f};
  std::vector<float> dz(4);
  workspace ws;
  for (const double eps : {1e-5, 1e-9}) {
    const double value = chunk_sparsity({.coefficient = 1.0, .chunk = 2, .eps = eps}, {},
                                        matrix_view<const float>(z.data(), 2, 2),
                                        matrix_view<float>(dz.data(), 2, 2), ws, serial{});
    CHECK(value == Approx(0.5).epsilon(1e-4));
    CHECK(value <= 0.5);
    for (const float g : dz) CHECK(std::isfinite(g));
  }
}

TEST_CASE("NaN, infinities, empty rows and no tokens are defined for chunks and neighbours") {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  const oracle::batch b{
      4, 3, {nan, 1.0, 2.0, -1.0, -2.0, -infinity, infinity, 0.0, 1.0, 0, 0, 0}, {}};
  row gradient(12, 7.0);
  CHECK(std::isfinite(run(b, b.logits, {.chunk = 2}, &gradient)));
  for (std::size_t i = 0; i < 12; ++i)
    if (!std::isfinite(gradient[i]) || (i >= 3 && gradient[i] != 0.0)) FAIL(i);
  const std::int32_t previous[] = {-1, 0, 1, 2}, outside[] = {-1, 0, 1, 4},
                     none[] = {-1, -1, -1, -1};
  CHECK(std::isfinite(run_locality(b, b.logits, {.neighbour = previous}, &gradient)));
  for (const double g : gradient)
    if (!std::isfinite(g)) FAIL("a gradient is not finite");
  CHECK(run_locality(b, b.logits, {.neighbour = none}, &gradient) == 0.0);
  const std::vector<float> z(b.logits.begin(), b.logits.end());
  std::vector<float> single(12, 7.0f);
  const matrix_view<const float> logits(z.data(), 4, 3);
  const matrix_view<float> dlogits(single.data(), 4, 3);
  workspace ws;
  run(b, b.logits, {.chunk = 2}, &gradient);
  CHECK(std::isfinite(chunk_sparsity({.chunk = 2}, {}, logits, dlogits, ws, serial{})));
  CHECK(test::difference(single, gradient, 1e-4, 1e-7) == "");
  CHECK(std::isfinite(share_balance({}, {}, logits, dlogits, ws, serial{})));
  for (std::size_t i = 0; i < 12; ++i)
    if (!std::isfinite(single[i]) || (i >= 3 && single[i] != 0.0f)) FAIL(i);
  run_locality(b, b.logits, {.neighbour = previous}, &gradient);
  CHECK(std::isfinite(activation_locality({.neighbour = previous}, {}, logits, dlogits)));
  CHECK(test::difference(single, gradient, 1e-4, 1e-5) == "");
  CHECK(run({0, 3, {}, {}}, {}, {}, nullptr) == 0.0);
  // Without a chunk none has memory, however long it is.
  CHECK(run({0, 3, {}, {}}, {}, {.chunk = index_t{1} << 40}, nullptr) == 0.0);
  // A row without shares has no root of its own either, and needs none.
  const row negative(6, -1.0);
  CHECK(run({2, 3, {}, {}}, negative, {.chunk = 1, .eps = 0.125, .norm_eps = 0.0}, nullptr) ==
        Approx(-0.125));
  CHECK(test::refusal([&] { run(b, b.logits, {.chunk = 3}, nullptr); }) ==
        "moeroute::chunk_sparsity: tokens % chunk is 1, expected 0");
  CHECK(test::refusal([&] { run(b, b.logits, {.coefficient = -1.0, .chunk = 2}, nullptr); }) ==
        "moeroute::chunk_sparsity: coefficient is -1.000000, expected >= 0");
  CHECK(test::refusal([&] { run_locality(b, b.logits, {.neighbour = outside}, nullptr); }) ==
        "moeroute::activation_locality: neighbour is 4, expected -1 to 3");
}
