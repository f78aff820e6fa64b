#include <moeroute/simd/rows/gemm.hpp>

#include <algorithm>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "oracle/layer.hpp"
#include "support/allocations.hpp"
#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/counting_new.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

using namespace moeroute;
using test::refusal;

namespace {

template <class T>
std::vector<T> values(std::uint64_t seed, index_t n) {
  test::random rng(seed);
  std::vector<T> list;
  for (index_t i = 0; i < n; ++i) list.push_back(static_cast<T>(rng.normal()));
  return list;
}

// Every test calls this one, because each way to call gemm is compiled anew.
template <class W, class A, class T, class Exec = serial>
void multiply(matrix_view<const T> x, const simd::packed_matrix<W, A>& w, matrix_view<float> y,
              const Exec& exec = {}) {
  simd::gemm(x, w, y, exec);
}

struct product {
  index_t m, n, k;
};

// Against double. Rows of x and y are further apart than they are long; the gap must stay.
template <class A, class T>
std::string wrong(product p) {
  const index_t x_stride = p.k + 3, y_stride = p.n + 5;
  const index_t w_stride = p.k + p.n % 3;
  const std::vector<T> x = values<T>(1, (p.m - 1) * x_stride + p.k);
  const std::vector<float> w = values<float>(2, (p.n - 1) * w_stride + p.k),
                           b = values<float>(3, p.n);
  // The last rows end where memory does.
  static test::edges memory(4 * 100 * 1600);
  memory.begin(test::guarded_end::back);
  simd::packed_matrix<float, A> packed(
      matrix_view<const float>(memory.copy(w), p.n, p.k, w_stride));
  for (index_t r = 0; r < p.n; ++r) packed.bias(r) = b[static_cast<std::size_t>(r)];
  const index_t y_size = (p.m - 1) * y_stride + p.n;
  float* const y = memory.room<float>(y_size);
  std::fill_n(y, y_size, 77.0f);
  multiply(matrix_view<const T>(memory.copy(x), p.m, p.k, x_stride), packed,
           matrix_view<float>(y, p.m, p.n, y_stride));
  for (index_t i = 0; i < p.m; ++i)
    for (index_t j = 0; j < (i + 1 < p.m ? y_stride : p.n); ++j) {
      double sum = 77.0, size = 0.0;
      if (j < p.n) {
        sum = static_cast<double>(b[static_cast<std::size_t>(j)]);
        size = std::abs(sum);
        for (index_t c = 0; c < p.k; ++c) {
          const double term = static_cast<double>(x[static_cast<std::size_t>(i * x_stride + c)]) *
                              static_cast<double>(w[static_cast<std::size_t>(j * w_stride + c)]);
          sum += term;
          size += std::abs(term);
        }
      }
      const double got = static_cast<double>(y[i * y_stride + j]);
      // A chain of k roundings, each half a unit of a partial sum.
      if (!(std::abs(got - sum) <= 6e-8 * static_cast<double>(p.k + 1) * size))
        return "m=" + std::to_string(p.m) + " n=" + std::to_string(p.n) +
               " k=" + std::to_string(p.k) + " at (" + std::to_string(i) + ", " +
               std::to_string(j) + "): " + test::shown(got) + ", expected " + test::shown(sum);
    }
  return "";
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("a product is near the one in double at every edge size", "",
                        test::widths) {
  for (const index_t m : {1, 2, 3, 5, 6, 7, 11, 13, 97})
    for (const index_t n : {1, 3, 8, 15, 16, 17, 31, 33, 63, 65, 130})
      for (const index_t k : {0, 1, 2, 17, 64}) CHECK(wrong<TestType, float>({m, n, k}) == "");
  for (const product p : {product{3, 20, 511}, {7, 20, 512}, {7, 65, 513}, {2, 5, 1500}})
    CHECK(wrong<TestType, float>(p) == "");
}

TEST_CASE("a product of 16-bit rows is that of the widened rows, to the bit") {
  for (const product p : {product{1, 3, 5}, {7, 33, 64}, {13, 17, 600}}) {
    const auto check = [&]<class T>(T) {
      CHECK(wrong<simd::default_arch, T>(p) == "");
      const std::vector<T> x = values<T>(1, p.m * p.k);
      std::vector<float> wide;
      for (const T v : x) wide.push_back(static_cast<float>(v));
      const std::vector<float> w = values<float>(2, p.n * p.k);
      const simd::packed_matrix<> packed(matrix_view<const float>(w.data(), p.n, p.k));
      std::vector<float> a(static_cast<std::size_t>(p.m * p.n)), b(a);
      multiply(matrix_view<const T>(x.data(), p.m, p.k), packed,
               matrix_view<float>(a.data(), p.m, p.n));
      multiply(matrix_view<const float>(wide.data(), p.m, p.k), packed,
               matrix_view<float>(b.data(), p.m, p.n));
      CHECK(test::bit_difference(a, b) == "");
    };
    check(bfloat16{});
    check(float16{});
  }
}

TEMPLATE_LIST_TEST_CASE("a product with 16-bit weights is that of their widened values, to the bit",
                        "", test::widths) {
  const auto check = [&]<class W>(W) {
    for (const index_t m : {1, 2, 5, 13})
      for (const index_t n : {1, 7, 16, 17, 33, 40, 49, 64, 129})
        for (const index_t k : {1, 33, 600}) {
          const std::vector<float> x = values<float>(1, m * k), precise = values<float>(2, n * k);
          std::vector<W> narrow;
          std::vector<float> wide;
          for (const float v : precise) {
            narrow.push_back(static_cast<W>(v));
            wide.push_back(static_cast<float>(narrow.back()));
          }
          using half = simd::packed_matrix<W, TestType>;
          const half from_half(matrix_view<const W>(narrow.data(), n, k));
          const half from_float(matrix_view<const float>(precise.data(), n, k));
          const simd::packed_matrix<float, TestType> widened(
              matrix_view<const float>(wide.data(), n, k));
          const auto product_with = [&](const auto& w) {
            std::vector<float> y(static_cast<std::size_t>(m * n));
            multiply(matrix_view<const float>(x.data(), m, k), w,
                     matrix_view<float>(y.data(), m, n));
            return y;
          };
          INFO("m=" << m << " n=" << n << " k=" << k);
          const std::vector<float> expected = product_with(widened);
          CHECK(test::bit_difference(product_with(from_half), expected) == "");
          CHECK(test::bit_difference(product_with(from_float), expected) == "");
        }
  };
  check(bfloat16{});
  check(float16{});
}

TEMPLATE_LIST_TEST_CASE("a row of a product depends neither on the other rows nor on threads", "",
                        test::widths) {
  const product p{205, 150, 700};
  const std::vector<float> x = values<float>(4, p.m * p.k), w = values<float>(5, p.n * p.k);
  const simd::packed_matrix<float, TestType> packed(matrix_view<const float>(w.data(), p.n, p.k));
  std::vector<float> y(static_cast<std::size_t>(p.m * p.n));
  const matrix_view<const float> rows(x.data(), p.m, p.k);
  multiply(rows, packed, matrix_view<float>(y.data(), p.m, p.n));
  for (index_t r = 0; r < p.m; r += 17) {
    std::vector<float> alone(static_cast<std::size_t>(p.n));
    multiply(rows.middle_rows(r, 1), packed, matrix_view<float>(alone.data(), 1, p.n));
    const std::span<const float> among(y.data() + r * p.n, static_cast<std::size_t>(p.n));
    CHECK(test::bit_difference(alone, among) == "");
  }
#if defined(_OPENMP)
  if constexpr (std::is_same_v<TestType, simd::default_arch>)
    for (const int threads : {1, 2, 4}) {
      std::vector<float> parallel(y.size());
      multiply(rows, packed, matrix_view<float>(parallel.data(), p.m, p.n), openmp{threads});
      CHECK(test::bit_difference(parallel, y) == "");
    }
#endif
}

TEST_CASE("a product of nothing touches nothing; without columns it is the bias") {
  simd::packed_matrix<> w(3, 0);
  w.bias(1) = 2.0f;
  std::vector<float> y(6, 9.0f);
  multiply(matrix_view<const float>(nullptr, 2, 0), w, matrix_view<float>(y.data(), 2, 3));
  CHECK(test::bit_difference(y, std::vector<float>{0, 2, 0, 0, 2, 0}) == "");
  const simd::packed_matrix<> no_outputs(0, 4);
  const std::vector<float> x(8, 1.0f);
  multiply(matrix_view<const float>(x.data(), 2, 4), no_outputs,
           matrix_view<float>(y.data(), 2, 0));
  multiply(matrix_view<const float>(x.data(), 0, 4), simd::packed_matrix<>(3, 4),
           matrix_view<float>(y.data(), 0, 3));
  CHECK(test::bit_difference(y, std::vector<float>{0, 2, 0, 0, 2, 0}) == "");
}

TEST_CASE("maps of one input are packed row by row into one") {
  const std::vector<float> a = values<float>(6, 5 * 7), b = values<float>(7, 30 * 7),
                           x = values<float>(8, 4 * 7);
  simd::packed_matrix<> both(35, 7);
  both.set_rows(0, matrix_view<const float>(a.data(), 5, 7));
  both.set_rows(5, matrix_view<const float>(b.data(), 30, 7));
  std::vector<float> all = a;
  all.insert(all.end(), b.begin(), b.end());
  const simd::packed_matrix<> one(matrix_view<const float>(all.data(), 35, 7));
  std::vector<float> y(4 * 35), z(y);
  multiply(matrix_view<const float>(x.data(), 4, 7), both, matrix_view<float>(y.data(), 4, 35));
  multiply(matrix_view<const float>(x.data(), 4, 7), one, matrix_view<float>(z.data(), 4, 35));
  CHECK(test::bit_difference(y, z) == "");
}

TEST_CASE("a product never allocates") {
  const std::vector<float> x = values<float>(1, 50 * 600), w = values<float>(2, 40 * 600);
  const std::vector<bfloat16> narrow = values<bfloat16>(1, 50 * 600);
  const simd::packed_matrix<> packed(matrix_view<const float>(w.data(), 40, 600));
  std::vector<float> y(50 * 40);
  const matrix_view<float> out(y.data(), 50, 40);
  CHECK(test::allocations_during([&] {
          multiply(matrix_view<const float>(x.data(), 50, 600), packed, out);
          multiply(matrix_view<const bfloat16>(narrow.data(), 50, 600), packed, out);
        }) == 0);
}

TEST_CASE("outputs that nobody set are zeros, whatever lay in the memory before") {
  for (const auto& [rows, cols] : {std::pair<index_t, index_t>{3, 4}, {35, 7}, {64, 16}}) {
    const std::vector<float> never(static_cast<std::size_t>(rows * cols), NAN),
        x(static_cast<std::size_t>(cols), 1.0f);
    const matrix_view<const float> all(never.data(), rows, cols), one(x.data(), 1, cols);
    {
      simd::packed_matrix<> before[4];  // what is made next may lie where one of these was
      for (auto& m : before) {
        m = simd::packed_matrix<>(all);
        for (index_t r = 0; r < rows; ++r) m.bias(r) = NAN;
      }
    }
    simd::packed_matrix<> w(rows, cols);
    w.set_rows(1, one);
    std::vector<float> y(static_cast<std::size_t>(rows), 9.0f), want(y.size(), 0.0f);
    want[1] = static_cast<float>(cols);
    multiply(one, w, matrix_view<float>(y.data(), 1, rows));
    CHECK(y == want);
  }
}

TEST_CASE("a product refuses shapes that do not fit") {
  const std::vector<float> x(100);
  std::vector<float> y(100);
  simd::packed_matrix<> w(4, 5);
  const auto gemm = [&](index_t m, index_t k, index_t rows, index_t cols) {
    return refusal([&] {
      multiply(matrix_view<const float>(x.data(), m, k), w,
               matrix_view<float>(y.data(), rows, cols));
    });
  };
  CHECK(gemm(2, 6, 2, 4) == "moeroute::gemm: x.cols() is 6, expected 5");
  CHECK(gemm(2, 5, 2, 3) == "moeroute::gemm: y.cols() is 3, expected 4");
  CHECK(gemm(2, 5, 3, 4) == "moeroute::gemm: y.rows() is 3, expected 2");
  CHECK(gemm(2, 5, 2, 4) == "accepted");
  // Rows that run into one another, and y in the memory of x.
  const auto strides = [&](index_t of_x, index_t of_y, const float* from) {
    return refusal([&] {
      multiply(matrix_view<const float>(from, 2, 5, of_x), w,
               matrix_view<float>(y.data(), 2, 4, of_y));
    });
  };
  CHECK(strides(4, 4, x.data()) == "moeroute::gemm: x.stride is 4, expected at least 5");
  CHECK(strides(5, 3, x.data()) == "moeroute::gemm: y.stride is 3, expected at least 4");
  CHECK(strides(5, 4, y.data() + 7) ==
        "moeroute::gemm: x and y overlap, expected memory of their own");
}

TEST_CASE("packing refuses shapes that do not fit") {
  const std::vector<float> x(100);
  simd::packed_matrix<> w(4, 5);
  const auto set = [&](index_t first, index_t rows, index_t cols) {
    return refusal([&] { w.set_rows(first, matrix_view<const float>(x.data(), rows, cols)); });
  };
  CHECK(set(0, 4, 6) == "moeroute::packed_matrix::set_rows: w.cols() is 6, expected 5");
  CHECK(set(0, 5, 5) == "moeroute::packed_matrix::set_rows: w.rows() is 5, expected 0 to 4");
  CHECK(set(3, 2, 5) == "moeroute::packed_matrix::set_rows: first is 3, expected 0 to 2");
  CHECK(set(-1, 2, 5) == "moeroute::packed_matrix::set_rows: first is -1, expected 0 to 2");
  CHECK(set(2, 2, 5) == "accepted");
  CHECK(refusal([] { simd::packed_matrix<>(-1, 3); }) ==
        "moeroute::packed_matrix: rows is -1, expected >= 0");
  CHECK(refusal([] { simd::packed_matrix<>(3, -2); }) ==
        "moeroute::packed_matrix: cols is -2, expected >= 0");
  constexpr index_t most = index_t{1} << 48;
  CHECK(refusal([] { simd::packed_matrix<>(most + 1, 0); }) ==
        "moeroute::packed_matrix: rows is 281474976710657, expected 0 to 281474976710656");
  CHECK(refusal([] { simd::packed_matrix<>(0, most + 1); }) ==
        "moeroute::packed_matrix: cols is 281474976710657, expected 0 to 281474976710656");
  CHECK(refusal([] { simd::packed_matrix<>(0, most); }) == "accepted");
}
