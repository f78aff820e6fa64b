// Kernels of single rows, of every length and at every alignment, against plain loops. What they
// read and write begins or ends where memory does.
#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moeroute/simd/adam.hpp>
#include <moeroute/simd/elementwise.hpp>
#include <moeroute/simd/numbers.hpp>
#include <moeroute/simd/probability/softmax_row.hpp>
#include <moeroute/simd/reduce.hpp>
#include <moeroute/simd/rows/row_dot.hpp>
#include <span>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

template <class T>
std::vector<T> row_values(test::random& rng, index_t n) {
  std::vector<T> x;
  for (index_t i = 0; i < n; ++i) {
    const float v = rng.normal();
    x.push_back(static_cast<T>(rng.below(8) == 0 ? 0.0f * v : v));
  }
  return x;
}

// 16 strided partial sums of fused multiply-adds, joined at distance 8, 4, 2, 1.
template <class S, class T>
float strided_dot(const std::vector<S>& a, const std::vector<T>& b) {
  float lane[16] = {};
  for (std::size_t c = 0; c < a.size(); ++c)
    lane[c % 16] = std::fma(static_cast<float>(a[c]), static_cast<float>(b[c]), lane[c % 16]);
  for (int distance = 8; distance > 0; distance /= 2)
    for (int i = 0; i < distance; ++i) lane[i] += lane[i + distance];
  return lane[0];
}

bool same_float(float a, float b) {
  return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

template <class T>
bool same_row(const T* got, const std::vector<T>& expected) {
  return test::bit_difference(std::span<const T>(got, expected.size()), expected) == "";
}

// Each length in [0, 130] and a few that are longer than what is taken at once.
template <class F>
void at_row_lengths(F&& f) {
  for (index_t n = 0; n <= 130; ++n) f(n);
  for (const index_t n : {511, 513, 545, 1060}) f(n);
}

// The dots and products of R rows at once; what is streamed has whole lines.
template <class A, int R, class U, class T, class V>
bool scales_and_dots(test::edges& memory, test::random& rng, index_t n, bool stream) {
  const auto row = row_values<U>(rng, n);
  std::vector<T> others[R];
  std::vector<float> factor;
  const T* rows[R];
  V* out[R];
  for (int r = 0; r < R; ++r) {
    others[r] = row_values<T>(rng, n);
    factor.push_back(rng.normal());
    rows[r] = memory.copy(others[r]);
    out[r] = memory.room<V>(n);
  }
  float* const dot = memory.room<float>(R);
  simd::scale_and_dot_rows<A, R>(memory.copy(row), rows, memory.copy(factor), n, out, stream, dot);
  bool right = true;
  for (std::size_t r = 0; r < R; ++r) {
    std::vector<V> scaled;
    for (const U x : row) scaled.push_back(static_cast<V>(factor[r] * static_cast<float>(x)));
    right = right && same_row(out[r], scaled) && same_float(dot[r], strided_dot(row, others[r]));
  }
  return right;
}

}  // namespace

TEST_CASE("sums, norms, maxima and exponentials of a row look at its columns alone") {
  test::edges memory(4 * 1060);
  test::random rng(71);
  const auto check = [&](index_t n) {
    const auto plain = row_values<float>(rng, n);
    const auto s = test::all_shapes[rng.below(std::ssize(test::all_shapes))];
    const auto odd = n == 0 ? plain : test::make_logits(s, 3, 1, n);
    const std::vector<float> ones(plain.size(), 1.0f);
    float top = -test::infinity;
    for (const float x : odd) top = x > top ? x : top;
    // A value that is there, twice perhaps, or that is not.
    const float sought = n == 0 ? 1.0f : plain[static_cast<std::size_t>(rng.below(n))];
    const auto first = std::find(plain.begin(), plain.end(), sought) - plain.begin();
    std::vector<double> exact;
    for (const float x : odd)
      exact.push_back(x == top ? 1.0
                      : x > -test::infinity
                          ? std::exp(static_cast<double>(x) - static_cast<double>(top))
                          : 0.0);
    INFO(test::name(s) << " n=" << n);
    test::for_each_arch<test::arches>([&](auto tag) {
      using A = decltype(tag);
      test::at_both_ends(memory, [&] {
        const float* const x = memory.copy(plain);
        const float* const y = memory.copy(odd);
        CHECK(same_float(simd::row_sum<A>(x, n), strided_dot(plain, ones)));
        CHECK(same_float(simd::row_norm<A>(x, n), std::sqrt(strided_dot(plain, plain))));
        CHECK(simd::row_max<A>(y, n) == top);
        CHECK(simd::first_column<A>(x, n, sought) == first);
        CHECK(simd::first_column<A>(x, n, 77.0f) == n);
        if (top == -test::infinity) return;
        float* const e = memory.room<float>(n);
        const float sum = simd::row_exp<A>(y, n, top, e);
        const std::vector<float> made(e, e + n);
        CHECK(test::difference(made, exact, 2e-6, 1.2e-38) == "");
        CHECK(same_float(sum, strided_dot(made, ones)));
        CHECK(same_float(simd::row_sum_exp<A>(y, n, top), sum));
      });
    });
  };
  at_row_lengths(check);
}

TEST_CASE("dots, products and sums of rows look at their columns alone, in 16 bits too") {
  test::edges memory(8 * 1060);
  test::random rng(72);
  const auto check = [&](index_t n) {
    const auto a = row_values<float>(rng, n), b = row_values<float>(rng, n);
    const auto narrow = row_values<bfloat16>(rng, n);
    const auto half = row_values<float16>(rng, n);
    const std::vector<double> wide_a(a.begin(), a.end()), wide_b(b.begin(), b.end());
    const float factor = rng.normal();
    std::vector<float> scaled, added;
    std::vector<bfloat16> scaled_narrow;
    std::vector<double> added_wide;
    double exact = 0.0, size = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      scaled.push_back(factor * static_cast<float>(half[i]));
      scaled_narrow.push_back(static_cast<bfloat16>(factor * a[i]));
      added.push_back(std::fma(factor, static_cast<float>(narrow[i]), b[i]));
      added_wide.push_back(wide_b[i] + static_cast<double>(factor) * wide_a[i]);
      exact += wide_a[i] * wide_b[i];
      size += std::abs(wide_a[i] * wide_b[i]);
    }
    INFO("n=" << n);
    test::at_both_ends(memory, [&] {
      const double *const x = memory.copy(wide_a), *const y = memory.copy(wide_b);
      double* const into = memory.copy(wide_b);
      CHECK(std::abs(simd::row_dot<double>(x, y, n) - exact) <= 1e-15 * size);
      CHECK(simd::row_dot(x, y, n) == exact);
      simd::add_scaled_row(x, static_cast<double>(factor), n, into);
      CHECK(std::equal(added_wide.begin(), added_wide.end(), into));
      simd::scale_row(x, static_cast<double>(factor), n, into);
      bool right = true;
      for (std::size_t i = 0; i < wide_a.size(); ++i)
        right = right && into[i] == static_cast<double>(factor) * wide_a[i];
      CHECK(right);
    });
    test::for_each_arch<test::arches>([&](auto tag) {
      using A = decltype(tag);
      test::at_both_ends(memory, [&] {
        const float *const x = memory.copy(a), *const y = memory.copy(b);
        const bfloat16* const z = memory.copy(narrow);
        const float16* const h = memory.copy(half);
        CHECK(std::abs(static_cast<double>(simd::row_dot<float, A>(x, y, n)) - exact) <=
              1e-6 * size);
        CHECK(same_float(simd::row_dot<A>(x, y, n), strided_dot(a, b)));
        CHECK(same_float(simd::row_dot<A>(z, h, n), strided_dot(narrow, half)));
        CHECK(same_float(simd::row_norm<A>(z, n), std::sqrt(strided_dot(narrow, narrow))));
        float* const out = memory.room<float>(n);
        simd::scale_row<A>(h, factor, n, out);
        CHECK(same_row(out, scaled));
        bfloat16* const small_out = memory.room<bfloat16>(n);
        simd::scale_row<A>(x, factor, n, small_out);
        CHECK(same_row(small_out, scaled_narrow));
        float* const sum = memory.copy(b);
        simd::add_scaled_row<A>(z, factor, n, sum);
        CHECK(same_row(sum, added));
      });
      test::at_both_ends(memory, [&] {
        CHECK((scales_and_dots<A, 2, bfloat16, bfloat16, bfloat16>(memory, rng, n, false)));
        CHECK((scales_and_dots<A, 3, float, bfloat16, float>(memory, rng, n, false)));
        if (n % 32 != 0) return;
        CHECK((scales_and_dots<A, 2, bfloat16, bfloat16, bfloat16>(memory, rng, n, true)));
        CHECK((scales_and_dots<A, 3, float, bfloat16, float>(memory, rng, n, true)));
      });
    });
  };
  at_row_lengths(check);
  check(1056);
}

TEST_CASE("the softmax of one row and its logarithm of a sum are those of plain loops") {
  test::edges memory(8 * 130);
  test::random rng(76);
  for (index_t n = 1; n <= 130; ++n) {
    const auto z = test::make_logits(test::shape::half_nan, static_cast<std::uint64_t>(n), 1, n);
    double sum = 0.0;
    std::vector<double> p;
    for (const float x : z) sum += p.emplace_back(x == x ? std::exp(static_cast<double>(x)) : 0.0);
    for (double& x : p) x = sum > 0.0 ? x / sum : 0.0;
    const double lse = std::log(sum);
    const auto check = [&](auto* x, auto* out, auto run, double error) {
      const auto right = [&](auto* to) {
        const double got = static_cast<double>(run(x, to));
        CHECK((got == lse || std::abs(got - lse) <= error * (1.0 + std::abs(lse))));
        CHECK(test::difference(std::span(to, p.size()), p, error, 1.2e-38) == "");
      };
      right(out);
      right(x);
    };
    INFO("n=" << n);
    test::at_both_ends(memory, [&] {
      double* const x = memory.copy(std::vector<double>(z.begin(), z.end()));
      check(
          x, memory.room<double>(n),
          [&](const double* from, double* to) { return simd::softmax_row(from, n, to); }, 1e-12);
    });
    test::for_each_arch<test::arches>([&](auto tag) {
      test::at_both_ends(memory, [&] {
        float* const x = memory.copy(z);
        check(
            x, memory.room<float>(n),
            [&](const float* from, float* to) {
              return simd::softmax_row<decltype(tag)>(from, n, to);
            },
            4e-6);
      });
    });
  }
}

TEST_CASE("steps of Adam are those of its formulas, for every weight") {
  test::edges memory(4 * 48);
  test::random rng(75);
  for (const index_t n : {0, 16, 48}) {
    const auto start = row_values<float>(rng, n);
    std::vector<std::vector<float>> gradients;
    for (int step = 0; step < 5; ++step) gradients.push_back(row_values<float>(rng, n));
    std::vector<double> x(start.begin(), start.end()), mean(x.size()), square(x.size());
    for (std::size_t step = 0; step < gradients.size(); ++step)
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double g = static_cast<double>(gradients[step][i]);
        const double steps = static_cast<double>(step + 1);
        mean[i] = 0.9 * mean[i] + 0.1 * g;
        square[i] = 0.999 * square[i] + 0.001 * g * g;
        const double m = mean[i] / (1.0 - std::pow(0.9, steps)),
                     v = square[i] / (1.0 - std::pow(0.999, steps));
        x[i] -= 0.125 * m / (std::sqrt(v) + 1e-8);
      }
    test::for_each_arch<test::arches>([&](auto tag) {
      test::at_both_ends(memory, [&] {
        const std::vector<float> zeros(start.size(), 0.0f);
        float *const m = memory.copy(zeros), *const v = memory.copy(zeros),
                     *const weights = memory.copy(start), *const gradient = memory.room<float>(n);
        simd::adam_steps adam;
        for (const auto& g : gradients) {
          std::copy(g.begin(), g.end(), gradient);
          adam.step<decltype(tag)>(0.125f, gradient, n, m, v, weights);
        }
        // Corrections of 1 - 0.999^steps are differences of numbers near 1.
        CHECK(test::difference(std::span<const float>(weights, x.size()), x, 1e-4, 1e-4) == "");
        CHECK(test::difference(std::span<const float>(m, x.size()), mean, 1e-5, 1e-6) == "");
        CHECK(test::difference(std::span<const float>(v, x.size()), square, 1e-5, 1e-8) == "");
      });
    });
  }
}

TEST_CASE("a row is mapped from its first column to its last, in place too") {
  test::edges memory(4 * 130);
  test::random rng(73);
  for (index_t n = 0; n <= 130; ++n) {
    const auto in = row_values<float>(rng, n);
    std::vector<float> twice;
    for (const float x : in) twice.push_back(x + x);
    test::for_each_arch<test::arches>([&](auto tag) {
      using A = decltype(tag);
      test::at_both_ends(memory, [&] {
        float *const x = memory.copy(in), *const out = memory.room<float>(n);
        const auto doubled = [](simd::vfloat<A> v) { return v + v; };
        simd::map_row<A>(x, n, out, doubled);
        CHECK(same_row(out, twice));
        simd::map_row<A>(x, n, x, doubled);
        CHECK(same_row(x, twice));
      });
    });
  }
}

TEST_CASE("a softmax in place reads and writes its values alone, in float and in double") {
  test::edges memory(8 * 130);
  test::random rng(74);
  for (index_t n = 0; n <= 130; ++n) {
    const auto s = test::all_shapes[rng.below(std::ssize(test::all_shapes))];
    const auto z = n == 0 ? std::vector<float>{} : test::make_logits(s, 5, 1, n);
    double top = -HUGE_VAL, sum = 0.0;
    for (const float x : z) top = std::max(top, x == x ? static_cast<double>(x) : top);
    std::vector<double> p;
    for (const float x : z) {
      p.push_back(static_cast<double>(x) == top ? 1.0 : std::exp(static_cast<double>(x) - top));
      if (!(x > -test::infinity)) p.back() = 0.0;
      sum += p.back();
    }
    for (double& x : p) x = sum > 0.0 ? x / sum : 0.0;
    INFO(test::name(s) << " n=" << n);
    test::at_both_ends(memory, [&] {
      double* const x = memory.copy(std::vector<double>(z.begin(), z.end()));
      simd::softmax_in_place(x, n);
      CHECK(test::difference(std::span<const double>(x, p.size()), p, 1e-12) == "");
    });
    test::for_each_arch<test::arches>([&](auto tag) {
      test::at_both_ends(memory, [&] {
        float* const x = memory.copy(z);
        simd::softmax_in_place<float, decltype(tag)>(x, n);
        CHECK(test::difference(std::span<const float>(x, p.size()), p, 4e-6, 1.2e-38) == "");
      });
    });
  }
}
