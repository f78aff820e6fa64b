#include <moeroute/simd/probability/softmax_rows.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/simd/numbers.hpp>
#include <moeroute/simd/probability/softmax_row.hpp>
#include <span>
#include <vector>

#include "oracle/routing.hpp"
#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

TEST_CASE("times their factor the rows are a softmax, with the same bits on every arch") {
  test::edges memory(4 * block_rows * 144);
  for (const test::shape shape : test::all_shapes)
    for (index_t cols = 1; cols <= 130; cols += cols < 34 ? 1 : 5) {
      const auto z = test::make_logits(shape, 4, block_rows, cols);
      const index_t stride = round_up(cols, block_rows);
      const float* row[block_rows];
      for (index_t i = 0; i < block_rows; ++i) row[i] = i == 3 ? nullptr : z.data() + i * cols;
      std::vector<float> out(static_cast<std::size_t>(block_rows * stride)), factor(block_rows);
      simd::exp_rows(row, cols, out.data(), stride, factor.data());
      INFO(test::name(shape) << " cols=" << cols);
      for (index_t i = 0; i < block_rows; ++i) {
        std::vector<double> expected(static_cast<std::size_t>(stride), -HUGE_VAL);
        if (row[i] != nullptr) {
          const auto open = oracle::order(row[i], cols);
          const auto p = oracle::softmax(row[i], cols, open);
          for (const expert_id e : open)
            expected[static_cast<std::size_t>(e)] = p[static_cast<std::size_t>(e)];
        }
        CHECK(std::isfinite(factor[static_cast<std::size_t>(i)]));
        bool close = true;
        for (std::size_t e = 0; e < expected.size(); ++e) {
          const auto got = static_cast<double>(out[static_cast<std::size_t>(i * stride) + e] *
                                               factor[static_cast<std::size_t>(i)]);
          close = close && (got == expected[e] ||
                            std::abs(got - expected[e]) <= 2e-6 * expected[e] + 1.2e-38);
        }
        CHECK(close);
      }
      test::for_each_arch<test::arches>([&](auto tag) {
        test::at_both_ends(memory, [&] {
          const float** const at = memory.room<const float*>(block_rows);
          for (index_t i = 0; i < block_rows; ++i)
            at[i] =
                row[i] == nullptr
                    ? nullptr
                    : memory.copy(std::span<const float>(row[i], static_cast<std::size_t>(cols)));
          float *const other = memory.room<float>(block_rows * stride), *const other_factor =
                                                                            memory.room<float>(
                                                                                block_rows);
          simd::exp_rows<decltype(tag)>(at, cols, other, stride, other_factor);
          CHECK(test::bit_difference(std::span<const float>(other, out.size()), out) == "");
          CHECK(test::bit_difference(std::span<const float>(other_factor, factor.size()), factor) ==
                "");
        });
      });
    }
}

TEST_CASE("a few values become their softmax in place: NaN and -inf are 0, several +inf share") {
  const auto agrees = [](auto zero, const std::vector<float>& z, index_t n, double error) {
    using F = decltype(zero);
    for (index_t row = 0; row < block_rows; ++row) {
      const float* const from = z.data() + row * n;
      std::vector<F> x(from, from + n);
      simd::softmax_in_place(x.data(), n);
      std::vector<double> expected(static_cast<std::size_t>(n), 0.0);
      const auto open = oracle::order(from, n);
      const auto p = oracle::softmax(from, n, open);
      for (const expert_id e : open)
        expected[static_cast<std::size_t>(e)] = p[static_cast<std::size_t>(e)];
      bool close = true;
      for (std::size_t i = 0; i < expected.size(); ++i)
        close = close &&
                std::abs(static_cast<double>(x[i]) - expected[i]) <= error * expected[i] + 1.2e-38;
      CHECK(close);
    }
  };
  for (const test::shape shape : test::all_shapes)
    for (index_t n = 1; n <= 130; n += n < 34 ? 1 : 7) {
      INFO(test::name(shape) << " n=" << n);
      const auto z = test::make_logits(shape, 6, block_rows, n);
      agrees(0.0f, z, n, 4e-6);
      agrees(0.0, z, n, 1e-12);
    }
}

TEST_CASE("16 joined sums have the bits of sum_of") {
  test::random rng(5);
  std::vector<float> partial(256), out(16);
  for (float& x : partial) x = rng.normal();
  std::vector<float> expected;
  for (int i = 0; i < 16; ++i) expected.push_back(simd::row_sum(partial.data() + i * 16, 16));
  test::for_each_arch<test::arches>([&](auto tag) {
    simd::join_partials<decltype(tag)>(partial.data(), out.data(),
                                       [](auto a, auto b) { return a + b; });
    CHECK(test::bit_difference(out, expected) == "");
  });
}

TEST_CASE(
    "the softmax of one row is all 0 without a logit above -inf, +inf share it, in place too") {
  const auto check = []<class F>(F above) {
    const F nan = std::numeric_limits<F>::quiet_NaN();
    for (const std::vector<F>& nothing :
         {std::vector<F>(21, -above), std::vector<F>(21, nan), std::vector<F>{}}) {
      std::vector<F> p(nothing.size(), F(7));
      CHECK(simd::softmax_row(nothing.data(), std::ssize(nothing), p.data()) == -above);
      CHECK(p == std::vector<F>(nothing.size(), F(0)));
    }
    std::vector<F> z{1, above, nan, -above, above};
    simd::softmax_row(z.data(), std::ssize(z), z.data());
    CHECK(z == std::vector<F>{0, F(0.5), 0, 0, F(0.5)});
    std::vector<F> two{0, std::log(F(3))};
    const F lse = simd::softmax_row(two.data(), 2, two.data());
    CHECK(std::abs(two[0] - F(0.25)) < F(1e-6));
    CHECK(std::abs(two[1] - F(0.75)) < F(1e-6));
    CHECK(std::abs(lse - std::log(F(4))) < F(1e-6));
  };
  check(std::numeric_limits<float>::infinity());
  check(std::numeric_limits<double>::infinity());
}
