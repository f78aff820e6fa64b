// Blocks of rows of probabilities: their functions, column sums and gradients against what the
// definitions give in double. What is read and written begins or ends where memory does.
#include <moeroute/simd/probability/probability_block.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/simd/probability/close_probability_rows.hpp>
#include <moeroute/simd/probability/open_probability_rows.hpp>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace probability_block_test {

using simd::column_sums;
using simd::probability;
using simd::row_functions;
using doubles = std::vector<double>;

constexpr unsigned all_functions =
    simd::square_lse | simd::entropy | simd::power | simd::inverse_norm;

// Rows, what their values weigh and what they come to by definition.
struct block_case {
  index_t n, cols, stride;
  std::vector<std::vector<float>> x;
  std::vector<float> coefficient;
  row_functions<float> functions;
  std::vector<doubles> p, gradient;
  double square_lse = 0, entropy = 0, power = 0, inverse_norm = 0;
  doubles column_sum;
};

double score_of(probability kind, double x) {
  if (!(x > -HUGE_VAL)) return 0.0;
  if (kind == probability::normalized_sigmoid) return 1.0 / (1.0 + std::exp(-x));
  return std::sqrt(std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))));
}

// Fills in what one row comes to; weights of functions that are not used are 0.
void softmax_by_definition(block_case& b, std::size_t i, unsigned uses) {
  const auto cols = b.x[i].size();
  const row_functions<float>& f = b.functions;
  double top = -HUGE_VAL, sum = 0.0;
  for (const float x : b.x[i]) top = x == x ? std::max(top, static_cast<double>(x)) : top;
  doubles &p = b.p[i], &gradient = b.gradient[i];
  p.assign(cols, 0.0);
  gradient.assign(cols, 0.0);
  if (!(top > -HUGE_VAL)) return;
  for (std::size_t c = 0; c < cols; ++c) {
    const double x = static_cast<double>(b.x[i][c]);
    p[c] = x == top ? 1.0 : x > -HUGE_VAL ? std::exp(x - top) : 0.0;
    sum += p[c];
  }
  double h = 0.0, powers = 0.0, squares = 0.0;
  const double q = static_cast<double>(f.q);
  for (double& v : p) {
    v /= sum;
    if (v > 0.0) h -= v * std::log(v);
    if (v > 0.0) powers += std::pow(v, q);
    squares += v * v;
  }
  const bool finite = top < HUGE_VAL;
  const double lse = finite ? top + std::log(sum) : 0.0, norm = std::sqrt(squares);
  const double inverse = 1.0 / (norm + static_cast<double>(f.offset));
  if (uses & simd::square_lse) b.square_lse += lse * lse;
  if (uses & simd::entropy) b.entropy += h;
  if (uses & simd::power) b.power += (1.0 - powers) / (q - 1.0);
  if (uses & simd::inverse_norm) b.inverse_norm += inverse;
  if (!finite) return;
  doubles g(cols, 0.0);
  double mean = 0.0;
  for (std::size_t c = 0; c < cols; ++c) {
    g[c] = static_cast<double>(b.coefficient[c]);
    if (p[c] == 0.0) continue;
    if (uses & simd::entropy) g[c] -= static_cast<double>(f.entropy) * std::log(p[c]);
    if (uses & simd::power)
      g[c] -= static_cast<double>(f.power) * q / (q - 1.0) * std::pow(p[c], q - 1.0);
    if (uses & simd::inverse_norm)
      g[c] -= static_cast<double>(f.inverse_norm) * inverse * inverse * p[c] / norm;
    mean += p[c] * g[c];
  }
  const double whole = uses & simd::square_lse ? 2.0 * static_cast<double>(f.square_lse) * lse : 0;
  for (std::size_t c = 0; c < cols; ++c) gradient[c] = p[c] * (g[c] - mean + whole);
}

void scores_by_definition(block_case& b, std::size_t i, probability kind) {
  const auto cols = b.x[i].size();
  double sum = static_cast<double>(b.functions.eps), mean = 0.0;
  doubles s;
  for (const float x : b.x[i]) s.push_back(score_of(kind, static_cast<double>(x)));
  for (const double v : s) sum += v;
  b.p[i].assign(cols, 0.0);
  b.gradient[i].assign(cols, 0.0);
  if (sum == static_cast<double>(b.functions.eps)) return;
  for (std::size_t c = 0; c < cols; ++c) {
    b.p[i][c] = s[c] / sum;
    mean += b.p[i][c] * static_cast<double>(b.coefficient[c]);
  }
  for (std::size_t c = 0; c < cols; ++c) {
    if (s[c] == 0.0) continue;
    const double slope = kind == probability::normalized_sigmoid
                             ? s[c] * (1.0 - s[c])
                             : -std::expm1(-s[c] * s[c]) / (2 * s[c]);
    b.gradient[i][c] = slope / sum * (static_cast<double>(b.coefficient[c]) - mean);
  }
}

block_case make_case(test::random& rng, probability kind, unsigned uses, index_t n, index_t cols) {
  block_case b;
  b.n = n;
  b.cols = cols;
  b.stride = round_up(cols, block_rows);
  b.p.resize(static_cast<std::size_t>(n));
  b.gradient = b.p;
  b.column_sum.assign(static_cast<std::size_t>(cols), 0.0);
  for (index_t c = 0; c < b.stride; ++c) b.coefficient.push_back(c < cols ? rng.normal() : 0.0f);
  row_functions<float>& f = b.functions;
  f.square_lse = 0.25f + rng.uniform();
  f.entropy = -0.5f - rng.uniform();
  f.power = 0.5f + rng.uniform();
  f.inverse_norm = 0.5f + rng.uniform();
  f.q = rng.below(2) == 0 ? 2.0f : 1.5f;
  f.offset = 0.25f * rng.uniform();
  f.eps = kind == probability::softmax ? 0.0f : 0.125f;
  constexpr test::shape shapes[] = {
      test::shape::normal,  test::shape::quantised, test::shape::all_equal,
      test::shape::masked,  test::shape::half_nan,  test::shape::all_minus_inf,
      test::shape::all_nan, test::shape::plus_infs, test::shape::signed_zeros};
  for (std::size_t i = 0; i < b.p.size(); ++i) {
    auto s = shapes[rng.below(std::ssize(shapes))];
    if (kind != probability::softmax && s == test::shape::plus_infs) s = test::shape::normal;
    b.x.push_back(test::make_logits(s, static_cast<std::uint64_t>(rng.below(1000)), 1, cols));
    // Scores whose slopes are taken by both formulas.
    if (kind != probability::softmax)
      for (float& x : b.x.back()) x *= 2.0f;
    if (kind == probability::softmax)
      softmax_by_definition(b, i, uses);
    else
      scores_by_definition(b, i, kind);
    for (std::size_t c = 0; c < b.column_sum.size(); ++c) b.column_sum[c] += b.p[i][c];
  }
  return b;
}

// The rows of one case at an edge, opened and closed; "" where all is as defined.
template <probability kind, unsigned uses, gradient_to to, column_sums how, class F, class... A>
std::string disagreement(test::edges& memory, const block_case& b) {
  const auto as = [](const auto& values) { return std::vector<F>(values.begin(), values.end()); };
  const auto n = static_cast<int>(b.n);
  constexpr bool is_float = sizeof(F) == 4;
  std::vector<const F*> row;
  std::vector<F*> out;
  std::vector<double> before;
  for (index_t i = 0; i < b.n; ++i) {
    row.push_back(memory.copy(as(b.x[static_cast<std::size_t>(i)])));
    before.push_back(0.5 - 0.25 * static_cast<double>(i % 4));
    out.push_back(memory.copy(std::vector<F>(static_cast<std::size_t>(b.cols), F(before.back()))));
  }
  const F* const* const rows = memory.copy(row);
  F* const* const gradient = memory.copy(out);
  const F* const coefficient = memory.copy(as(b.coefficient));
  row_functions<F> f;
  f.square_lse = F(b.functions.square_lse);
  f.entropy = F(b.functions.entropy);
  f.power = F(b.functions.power);
  f.inverse_norm = F(b.functions.inverse_norm);
  f.q = F(b.functions.q);
  f.offset = F(b.functions.offset);
  f.eps = F(b.functions.eps);
  simd::probability_block<F> block;
  block.unscaled = memory.room<F>(block_rows * b.stride);
  block.powers = uses & simd::power ? memory.room<F>(block_rows * b.stride) : nullptr;
  block.stride = b.stride;
  const index_t sums = how == column_sums::compensated && is_float ? 2 : 1;
  F* const column_sum =
      memory.copy(std::vector<F>(static_cast<std::size_t>(sums * b.stride), F(0.25)));
  simd::row_function_sums total{1.0, 2.0, 3.0, 4.0};
  simd::open_probability_rows<kind, uses, A...>(rows, n, b.cols, coefficient, f,
                                                to == gradient_to::nowhere ? nullptr : gradient,
                                                block, total);
  const double error = is_float ? 1e-5 : 1e-11;
  const auto close = [&](double got, double expected) {
    return std::abs(got - expected) <= error * (std::abs(expected) + static_cast<double>(b.n));
  };
  if (!close(total.square_lse, 1.0 + b.square_lse)) return "square_lse";
  if (!close(total.entropy, 2.0 + b.entropy)) return "entropy";
  if (!close(total.power, 3.0 + b.power)) return "power";
  if (!close(total.inverse_norm, 4.0 + b.inverse_norm)) return "inverse_norm";
  for (index_t i = 0; i < b.n; ++i)
    for (index_t c = 0; c < b.cols; ++c) {
      const double got = static_cast<double>(block.scale[i]) *
                         static_cast<double>(block.unscaled[i * b.stride + c]);
      if (!close(got, b.p[static_cast<std::size_t>(i)][static_cast<std::size_t>(c)])) return "p";
    }
  simd::close_probability_rows<kind, uses, to, how, A...>(rows, n, b.cols, coefficient, f, block,
                                                          gradient, column_sum);
  for (index_t c = 0; c < b.cols; ++c) {
    double got = static_cast<double>(column_sum[c]);
    if (sums == 2) got += static_cast<double>(column_sum[b.stride + c]) - 0.25;
    if (!close(got, 0.25 + b.column_sum[static_cast<std::size_t>(c)])) return "column_sum";
  }
  for (std::size_t i = 0; i < b.x.size(); ++i)
    for (std::size_t c = 0; c < b.column_sum.size(); ++c) {
      double expected = to == gradient_to::nowhere ? before[i] : b.gradient[i][c];
      if (to == gradient_to::add) expected += before[i];
      const double got = static_cast<double>(out[i][c]);
      if (!(std::abs(got - expected) <= error * (1.0 + std::abs(expected)))) return "gradient";
    }
  return "";
}

// The other way to a gradient: probabilities are kept, and weighed when the weights are known.
template <class A>
std::string kept_disagreement(test::edges& memory, const block_case& b) {
  const auto n = static_cast<int>(b.n);
  std::vector<const float*> row;
  std::vector<float*> out;
  for (const auto& x : b.x) row.push_back(memory.copy(x));
  for (const auto& x : b.x) out.push_back(memory.room<float>(std::ssize(x)));
  float* const* const to = memory.copy(out);
  const float* const coefficient = memory.copy(b.coefficient);
  simd::probability_block<float> block;
  block.unscaled = memory.room<float>(block_rows * b.stride);
  block.powers = nullptr;
  block.stride = b.stride;
  float* const column_sum =
      memory.copy(std::vector<float>(static_cast<std::size_t>(2 * b.stride), 0.0f));
  simd::row_function_sums none;
  simd::open_probability_rows<probability::softmax, simd::no_function, A>(
      memory.copy(row), n, b.cols, coefficient, {}, nullptr, block, none);
  simd::keep_probability_rows<A>(block, n, b.cols, to, column_sum);
  const auto alike = [](double got, double expected) { return std::abs(got - expected) <= 2e-6; };
  for (std::size_t i = 0; i < b.x.size(); ++i) {
    const bool shared = std::ranges::count(b.x[i], test::infinity) > 0;
    for (std::size_t c = 0; c < b.x[i].size(); ++c)
      if (!alike(static_cast<double>(out[i][c]), shared ? 0.0 : b.p[i][c])) return "kept";
  }
  // What has been added up goes to the sums, and what they round away beside them.
  const auto size = static_cast<std::size_t>(b.stride);
  std::vector<float> begin(size, 3e7f), before(size, 0.125f);
  float *const sum = memory.copy(begin), *const rest = memory.copy(before);
  simd::add_block_sum<column_sums::compensated, A>(column_sum, b.stride, sum, rest);
  for (std::size_t c = 0; c < b.column_sum.size(); ++c)
    if (!alike(static_cast<double>(sum[c]) - 3e7 + static_cast<double>(rest[c]),
               b.column_sum[c] + 0.125))
      return "add_block_sum";
  for (index_t c = 0; c < 2 * b.stride; ++c)
    if (column_sum[c] != 0.0f) return "a block that is not 0";
  float* const plain = memory.copy(before);
  simd::add_block_sum<column_sums::plain, A>(plain, b.stride, sum, rest);
  for (std::size_t c = 0; c < b.column_sum.size(); ++c)
    if (plain[c] != 0.0f || !alike(static_cast<double>(sum[c]) - 3e7 + static_cast<double>(rest[c]),
                                   b.column_sum[c] + 0.25))
      return "a plain sum";
  simd::gradient_of_probability_rows<A>(to, n, b.cols, coefficient);
  for (std::size_t i = 0; i < b.x.size(); ++i)
    for (std::size_t c = 0; c < b.x[i].size(); ++c)
      if (!alike(static_cast<double>(out[i][c]), b.gradient[i][c])) return "gradient";
  return "";
}

}  // namespace probability_block_test

TEST_CASE("rows of probabilities, their functions and gradients are what the definitions say") {
  using namespace probability_block_test;
  test::edges memory(8 * block_rows * 144);
  test::random rng(91);
  for (index_t cols = 1; cols <= 130; cols += cols < 36 ? 1 : 7) {
    const std::int64_t less = rng.below(3);
    const index_t n = less == 0 ? block_rows : 1 + rng.below(block_rows);
    INFO(n << " rows of " << cols << " columns");
    const auto soft = make_case(rng, probability::softmax, all_functions, n, cols);
    const auto plain = make_case(rng, probability::softmax, simd::no_function, n, cols);
    const auto sigmoids = make_case(rng, probability::normalized_sigmoid, 0, n, cols);
    const auto roots = make_case(rng, probability::normalized_sqrt_softplus, 0, n, cols);
    constexpr auto compensated = column_sums::compensated;
    constexpr auto write = gradient_to::write, add = gradient_to::add;
    const auto softmaxes = [&]<class F, class... A>(F, A...) {
      constexpr auto softmax = probability::softmax;
      test::at_both_ends(memory, [&] {
        CHECK(disagreement<softmax, all_functions, write, column_sums::plain, F, A...>(memory,
                                                                                       soft) == "");
      });
      test::at_both_ends(memory, [&] {
        CHECK(disagreement<softmax, 0, add, compensated, F, A...>(memory, plain) == "");
      });
    };
    const auto scores = [&]<class F>(F) {
      test::at_both_ends(memory, [&] {
        CHECK(disagreement<probability::normalized_sigmoid, 0, add, column_sums::plain, F>(
                  memory, sigmoids) == "");
      });
      test::at_both_ends(memory, [&] {
        CHECK(disagreement<probability::normalized_sqrt_softplus, 0, write, compensated, F>(
                  memory, roots) == "");
      });
    };
    softmaxes(double{});
    scores(double{});
    scores(float{});
    test::for_each_arch<test::widths>([&]<class A>(A tag) {
      // Eight lanes differ from four and sixteen in nothing here.
      if constexpr (std::is_same_v<A, simd::default_arch> || simd::width<A> == 4) {
        softmaxes(float{}, tag);
        test::at_both_ends(memory, [&] { CHECK(kept_disagreement<A>(memory, plain) == ""); });
      }
    });
    // Each function by itself, with what it alone needs.
    const auto one = [&]<unsigned uses>(std::integral_constant<unsigned, uses>) {
      const auto b = make_case(rng, probability::softmax, uses, n, cols);
      test::at_both_ends(memory, [&] {
        CHECK(
            disagreement<probability::softmax, uses, gradient_to::write, column_sums::plain, float>(
                memory, b) == "");
      });
    };
    one(std::integral_constant<unsigned, simd::square_lse>{});
    one(std::integral_constant<unsigned, simd::entropy>{});
    one(std::integral_constant<unsigned, simd::power>{});
    one(std::integral_constant<unsigned, simd::inverse_norm>{});
    test::at_both_ends(memory, [&] {
      CHECK(disagreement<probability::softmax, 0, gradient_to::nowhere, column_sums::plain, float>(
                memory, plain) == "");
    });
  }
}
