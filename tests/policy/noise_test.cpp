#include <moeroute/policy/parts/noise.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/router.hpp>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace {

std::vector<float> noise_of(const logit_noise& how, index_t tokens, index_t columns,
                            const side_inputs& side) {
  std::vector<float> z(static_cast<std::size_t>(tokens * columns), 0.0f);
  for (index_t t = 0; t < tokens; ++t) how.add_to_row(z.data() + t * columns, columns, t, side);
  return z;
}

struct moments {
  double mean = 0, variance = 0;
};

moments of(const std::vector<float>& values) {
  moments m;
  const auto n = static_cast<double>(values.size());
  for (const float v : values) m.mean += static_cast<double>(v) / n;
  for (const float v : values) m.variance += std::pow(static_cast<double>(v) - m.mean, 2) / n;
  return m;
}

}  // namespace

TEST_CASE("the normal quantile is the inverse of the normal distribution") {
  using A = simd::default_arch;
  for (const double p : {1e-6, 1e-4, 0.01, 0.2, 0.4999, 0.5, 0.6, 0.9, 0.999, 0.99999}) {
    const auto u = static_cast<float>(p);
    float x[simd::width<A>];
    detail::normal_quantile<A>(simd::vfloat<A>(u)).store_unaligned(x);
    const double back = 0.5 * std::erfc(-static_cast<double>(x[0]) / std::sqrt(2.0));
    INFO("p = " << p << ", x = " << x[0]);
    // The slope of the distribution times the rounding of u and x.
    CHECK(std::abs(back - static_cast<double>(u)) <= 2e-6 * std::min(back, 1 - back) + 6e-8);
  }
}

TEST_CASE("the normal quantile is finite for every number that is drawn") {
  using A = simd::default_arch;
  for (const std::uint32_t word : {0u, 1u << 9, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    float x[simd::width<A>];
    detail::normal_quantile<A>(simd::vfloat<A>(open_u01_of(word))).store_unaligned(x);
    CHECK(std::isfinite(x[0]));
    CHECK(std::abs(x[0]) < 6.0f);
  }
}

TEST_CASE("Gaussian noise has mean 0 and the variance asked for") {
  const moments m =
      of(noise_of({.kind = noise_kind::gaussian, .sigma = 2.0f}, 400, 100, {.seed = 3}));
  CHECK(std::abs(m.mean) < 0.04);
  CHECK(std::abs(m.variance - 4) < 0.12);
}

TEST_CASE("Gumbel noise has Euler's mean and variance pi^2 / 6") {
  const moments m = of(noise_of({.kind = noise_kind::gumbel}, 400, 100, {.seed = 3}));
  CHECK(std::abs(m.mean - 0.5772) < 0.03);
  CHECK(std::abs(m.variance - 1.6449) < 0.08);
}

TEST_CASE("the largest logit with Gumbel noise follows the softmax") {
  const index_t tokens = 20000;
  std::vector<float> logits;
  for (index_t t = 0; t < tokens; ++t)
    logits.insert(logits.end(), {std::log(1.0f), std::log(2.0f), std::log(7.0f)});
  const router<softmax> sampler{.selection = {.k = 1},
                                .transform = {.noise = {.kind = noise_kind::gumbel}}};
  const assignment a = routed(sampler, logits, 3, {.seed = 21});
  std::vector<int> count(3, 0);
  for (const expert_id e : a.ids()) ++count[static_cast<std::size_t>(e)];
  CHECK(std::abs(count[0] - 2000) < 200);
  CHECK(std::abs(count[1] - 4000) < 260);
  CHECK(std::abs(count[2] - 14000) < 300);
}

TEST_CASE("noise replays by seed, step and token, and no two of them share it") {
  const logit_noise how{.kind = noise_kind::gaussian};
  const auto once = noise_of(how, 3, 37, {.seed = 1, .step = 2});
  CHECK(test::bit_difference(once, noise_of(how, 3, 37, {.seed = 1, .step = 2})) == "");
  CHECK(test::bit_difference(once, noise_of(how, 3, 37, {.seed = 1, .step = 3})) != "");
  CHECK(test::bit_difference(once, noise_of(how, 3, 37, {.seed = 2, .step = 2})) != "");
  for (const index_t columns : {1, 5, 37, 64, 70}) {
    std::vector<float> all = noise_of(how, 3, columns, {.seed = 1, .step = 2});
    std::sort(all.begin(), all.end());
    CHECK(std::adjacent_find(all.begin(), all.end()) == all.end());
  }
}

TEST_CASE("noise has the same bits on every instruction set") {
  const side_inputs side{.seed = 9};
  for (const noise_kind kind : {noise_kind::gaussian, noise_kind::gumbel}) {
    std::vector<float> expected(53, 0.5f);
    logit_noise{.kind = kind}.add_to_row(expected.data(), 53, 4, side);
    test::for_each_arch<test::widths>([&]<class A>(A) {
      std::vector<float> z(53, 0.5f);
      logit_noise{.kind = kind}.add_to_row<A>(z.data(), 53, 4, side);
      CHECK(test::bit_difference(z, expected) == "");
    });
  }
}

TEST_CASE("a noise gate scales the noise by softplus + floor") {
  const std::vector<float> gate = {-100.0f, -1.0f, 0.0f, 1.0f, 30.0f};
  const side_inputs plain{.seed = 4};
  side_inputs gated = plain;
  gated.noise_logits = {gate.data(), 1, 5};
  for (const float floor : {0.01f, 0.75f}) {
    const logit_noise how{.kind = noise_kind::gaussian, .floor = floor};
    const auto unit = noise_of(how, 1, 5, plain), scaled = noise_of(how, 1, 5, gated);
    std::vector<double> expected;
    for (std::size_t e = 0; e < gate.size(); ++e)
      expected.push_back(
          static_cast<double>(unit[e]) *
          (std::log1p(std::exp(static_cast<double>(gate[e]))) + static_cast<double>(floor)));
    CHECK(test::difference(scaled, expected, 1e-6) == "");
  }
}

TEST_CASE("noise leaves masked experts masked") {
  const std::vector<float> logits = test::make_logits(test::shape::masked, 2, 50, 16);
  const router<softmax> noisy{.transform = {.noise = {.kind = noise_kind::gaussian, .sigma = 50}}};
  const assignment a = routed(noisy, logits, 16, {.seed = 1});
  for (index_t c = 0; c < a.choices(); ++c) {
    const expert_id e = a.ids()[static_cast<std::size_t>(c)];
    if (e != no_expert) CHECK(logits[static_cast<std::size_t>(c / 2 * 16 + e)] > -test::infinity);
  }
}

TEST_CASE("jitter multiplies every element by a number within eps of 1, and replays") {
  const std::vector<float> x(60, 2.0f);
  std::vector<float> y(60), again(60);
  const matrix_view<const float> from(x.data(), 6, 10);
  jitter_rows(from, 0.125f, {.seed = 5}, matrix_view<float>(y.data(), 6, 10));
  jitter_rows(from, 0.125f, {.seed = 5}, matrix_view<float>(again.data(), 6, 10));
  CHECK(test::bit_difference(y, again) == "");
  const moments m = of(y);
  CHECK(std::abs(m.mean - 2) < 0.07);
  for (const float v : y) CHECK((v >= 1.75f && v <= 2.25f));
  CHECK(m.variance > 0.005);
  std::sort(y.begin(), y.end());
  CHECK(std::adjacent_find(y.begin(), y.end()) == y.end());
}

TEST_CASE("noise on inputs is that of a row's place, however far apart the rows are stored") {
  constexpr index_t rows = 6, cols = 10, stride = 13;
  std::vector<float> x(rows * cols), apart(rows * stride, 9.0f);
  for (index_t t = 0; t < rows; ++t)
    for (index_t c = 0; c < cols; ++c)
      apart[static_cast<std::size_t>(t * stride + c)] = x[static_cast<std::size_t>(t * cols + c)] =
          static_cast<float>(t - c) * 0.5f;
  const side_inputs side{.seed = 5, .step = 2};
  const auto same = [&](auto&& noisy) {
    std::vector<float> y(x.size()), z(x.size());
    noisy(matrix_view<const float>(x.data(), rows, cols), matrix_view<float>(y.data(), rows, cols));
    noisy(matrix_view<const float>(apart.data(), rows, cols, stride),
          matrix_view<float>(z.data(), rows, cols));
    CHECK(test::bit_difference(y, z) == "");
    CHECK(test::bit_difference(y, x) != "");
  };
  same([&](auto from, auto to) { jitter_rows(from, 0.125f, side, to); });
  same([&](auto from, auto to) { gaussian_rows(from, 0.1f, 0.3f, side, to); });
}

TEST_CASE("Gaussian noise on inputs multiplies and adds as asked, replays, and is off at 0") {
  constexpr index_t rows = 60, cols = 70;
  const std::vector<float> x(rows * cols, 2.0f);
  std::vector<float> y(x), z(x);
  const side_inputs side{.seed = 5, .step = 2};
  const auto noisy = [&](float factor, float addend, std::vector<float>& out) {
    gaussian_rows(matrix_view<const float>(x.data(), rows, cols), factor, addend, side,
                  matrix_view<float>(out.data(), rows, cols));
  };
  noisy(0.0f, 0.0f, y);
  CHECK(y == x);
  for (const auto& [factor, addend] : {std::pair{0.1f, 0.0f}, std::pair{0.0f, 0.3f}}) {
    noisy(factor, addend, y);
    noisy(factor, addend, z);
    CHECK(y == z);
    double sum = 0, square = 0;
    for (const float v : y) sum += double{v} - 2.0, square += (double{v} - 2.0) * (double{v} - 2.0);
    const double n = rows * cols, deviation = 2.0 * double{factor} + double{addend};
    CHECK(std::abs(sum / n) < 5 * deviation / std::sqrt(n));
    CHECK(std::abs(square / n / (deviation * deviation) - 1.0) < 0.1);
  }
  for (const float bad : {-1.0f, HUGE_VALF}) {
    const std::string number = bad < 0 ? "-1.000000" : "inf";
    CHECK(test::refusal([&] { noisy(bad, 0.0f, y); }) ==
          "moeroute::gaussian_rows: factor is " + number + ", expected >= 0");
    CHECK(test::refusal([&] { noisy(0.0f, bad, y); }) ==
          "moeroute::gaussian_rows: addend is " + number + ", expected >= 0");
  }
}

TEST_CASE("noise is that of a place, number by number, in exactly the memory of its row") {
  using A = simd::default_arch;
  test::random rng(113);
  for (index_t round = 0; round < 120; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    constexpr index_t edges[] = {1, 3, 4, 5, 8, 15, 16, 17, 63, 64, 65, 128, 129, 131};
    const index_t n = edges[rng.below(14)], token = rng.below(5), gap = rng.below(3);
    const logit_noise how{.kind = coin() ? noise_kind::gaussian : noise_kind::gumbel,
                          .sigma = coin() ? 1.0f : 0.25f,
                          .floor = coin() ? 0.01f : 0.5f};
    std::vector<float> gate(static_cast<std::size_t>(5 * (n + gap)));
    for (float& x : gate) x = rng.normal();
    side_inputs side{.seed = rng.bits(), .step = static_cast<std::uint64_t>(rng.below(99))};
    const bool gated = coin();
    if (gated) side.noise_logits = {gate.data(), 5, n, n + gap};
    test::guarded<float> memory(n);
    float* const z = memory.window(n, test::guarded_end::back);
    std::vector<float> before;
    for (index_t c = 0; c < n; ++c) before.push_back(z[c] = rng.normal());
    how.add_to_row(z, n, token, side);
    std::vector<double> expected;
    const std::uint64_t stream = detail::random_stream(detail::random_use::logit_noise, side.step);
    for (index_t c = 0; c < n; ++c) {
      const random_words words = random_block(
          side.seed, stream, static_cast<std::uint64_t>(token * ((n + 3) / 4) + c / 4));
      const float u = open_u01_of(words.word[c % 4]);
      float normal[simd::width<A>];
      detail::normal_quantile<A>(simd::vfloat<A>(u)).store_unaligned(normal);
      const double drawn = how.kind == noise_kind::gaussian
                               ? static_cast<double>(normal[0])
                               : -std::log(-std::log(static_cast<double>(u))),
                   width = gated ? std::log1p(std::exp(static_cast<double>(
                                       gate[static_cast<std::size_t>(token * (n + gap) + c)]))) +
                                       static_cast<double>(how.floor)
                                 : static_cast<double>(how.sigma);
      expected.push_back(static_cast<double>(before[static_cast<std::size_t>(c)]) + drawn * width);
    }
    INFO("n " << n << " token " << token << " kind " << static_cast<int>(how.kind) << " gate "
              << gated);
    CHECK(test::difference(std::vector<float>(z, z + n), expected, 2e-6, 2e-6) == "");
  }
}

TEST_CASE("noise on inputs is number by number what it says, in place and in 16 bits too") {
  using A = simd::default_arch;
  constexpr index_t rows = 3, cols = 5, stride = 7;
  const std::vector<float> x = test::make_logits(test::shape::normal, 4, rows, stride);
  const side_inputs side{.seed = 6, .step = 3};
  const matrix_view<const float> from(x.data(), rows, cols, stride);
  const auto word = [&](detail::random_use use, index_t t, index_t c, int which) {
    return random_block(side.seed, detail::random_stream(use, side.step),
                        static_cast<std::uint64_t>(t * cols + c))
        .word[which];
  };
  const auto normal = [&](index_t t, index_t c, int which) {
    float q[simd::width<A>];
    detail::normal_quantile<A>(
        simd::vfloat<A>(open_u01_of(word(detail::random_use::input_noise, t, c, which))))
        .store_unaligned(q);
    return static_cast<double>(q[0]);
  };
  std::vector<double> jittered, noisy;
  for (index_t t = 0; t < rows; ++t)
    for (index_t c = 0; c < cols; ++c) {
      const auto v = static_cast<double>(from(t, c));
      const auto u = static_cast<double>(u01_of(word(detail::random_use::jitter, t, c, 0)));
      jittered.push_back(v * (0.75 + 0.5 * u));
      noisy.push_back(v * (1.0 + 0.5 * normal(t, c, 0)) + 2.0 * normal(t, c, 1));
    }
  const auto check = [&](auto&& make, const std::vector<double>& expected) {
    std::vector<float> apart(rows * cols), same(x), packed;
    make(from, matrix_view<float>(apart.data(), rows, cols));
    CHECK(test::difference(apart, expected, 2e-6, 1e-6) == "");
    const matrix_view<float> here(same.data(), rows, cols, stride);
    make(here, here);
    for (index_t t = 0; t < rows; ++t)
      for (index_t c = 0; c < cols; ++c) packed.push_back(here(t, c));
    CHECK(test::bit_difference(packed, apart) == "");
    std::vector<bfloat16> narrow(rows * cols);
    make(from, matrix_view<bfloat16>(narrow.data(), rows, cols));
    double worst = 0.0;
    for (std::size_t i = 0; i < narrow.size(); ++i)
      worst = std::max(worst, std::abs(static_cast<double>(static_cast<float>(narrow[i])) -
                                       static_cast<double>(apart[i])) /
                                  (std::abs(static_cast<double>(apart[i])) + 1e-6));
    CHECK(worst < 1.0 / 200);
  };
  check([&](auto a, auto b) { jitter_rows(a, 0.25f, side, b); }, jittered);
  check([&](auto a, auto b) { gaussian_rows(a, 0.5f, 2.0f, side, b); }, noisy);
}

TEST_CASE(
    "noise on inputs is refused where shapes differ, rows overlap, or one runs into another") {
  std::vector<float> x(40, 1.0f), y(40);
  const side_inputs side;
  const matrix_view<const float> from(x.data(), 3, 5);
  const auto refused = [&](auto&& call) { return test::refusal(call); };
  for (const bool gaussian : {false, true}) {
    const std::string who = gaussian ? "moeroute::gaussian_rows: " : "moeroute::jitter_rows: ";
    const auto make = [&](matrix_view<const float> a, matrix_view<float> b) {
      return refused([&] {
        gaussian ? gaussian_rows(a, 0.1f, 0.1f, side, b) : jitter_rows(a, 0.1f, side, b);
      });
    };
    CHECK(make(from, {y.data(), 3, 5}) == "accepted");
    CHECK(make(from, {y.data(), 2, 5}) == who + "out.rows is 2, expected 3");
    CHECK(make(from, {y.data(), 3, 4}) == who + "out.cols is 4, expected 5");
    CHECK(make({x.data(), 3, 5, 4}, {y.data(), 3, 5}) ==
          who + "x.stride is 4, expected at least 5");
    CHECK(make(from, {y.data(), 3, 5, 4}) == who + "out.stride is 4, expected at least 5");
    CHECK(make(from, {x.data() + 1, 3, 5}) ==
          who + "x and out overlap, expected memory of their own");
  }
  CHECK(logit_noise{}.kind == noise_kind::none);
  CHECK((logit_noise{}.sigma == 1.0f && logit_noise{}.floor == 0.01f));
}
