#include <moeroute/simd/rows/row_product.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/base/workspace.hpp>
#include <moeroute/simd/caches.hpp>
#include <moeroute/simd/rows/row_dot.hpp>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "support/arches.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"
#include "support/threads.hpp"

using namespace moeroute;

namespace {

template <class T>
std::vector<T> random_values(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  std::vector<T> x(static_cast<std::size_t>(n));
  for (T& v : x) v = static_cast<T>(rng.normal());
  return x;
}

// Both products of R x n by n x d, rows kept as T, against plain loops in double.
template <class T>
void products_agree(index_t r, index_t n, index_t d) {
  INFO(r << " x " << n << " x " << d);
  constexpr index_t gap = 5;
  const auto a = random_values<float>(r * (n + gap), 1),
             turned = random_values<float>(n * (r + gap), 2);
  const auto x = random_values<T>(n * (d + gap), 3);
  // The last rows end where memory does.
  const auto at_the_end = [](const auto& from, index_t rows, index_t cols, auto& memory) {
    const index_t size = rows == 0 ? 0 : (rows - 1) * (cols + gap) + cols;
    auto* const to = memory.window(size, test::guarded_end::back);
    std::copy_n(from.data(), size, to);
    return to;
  };
  test::guarded<float> a_memory(r * (n + gap)), turned_memory(n * (r + gap));
  test::guarded<float> out_memory(r * (d + gap));
  test::guarded<T> x_memory(n * (d + gap));
  const float* const a_rows = at_the_end(a, r, n, a_memory);
  const float* const turned_rows = at_the_end(turned, n, r, turned_memory);
  for (const auto start : {simd::sum_start::zero, simd::sum_start::output})
    for (const bool transposed : {false, true}) {
      const index_t size = r == 0 ? 0 : (r - 1) * (d + gap) + d;
      auto out = random_values<float>(size, 4);
      const auto before = out;
      std::vector<double> expected(before.begin(), before.end());
      for (index_t i = 0; i < r; ++i)
        for (index_t c = 0; c < d; ++c) {
          double sum =
              start == simd::sum_start::zero
                  ? 0.0
                  : static_cast<double>(before[static_cast<std::size_t>(i * (d + gap) + c)]);
          for (index_t j = 0; j < n; ++j)
            sum +=
                static_cast<double>(transposed ? turned[static_cast<std::size_t>(j * (r + gap) + i)]
                                               : a[static_cast<std::size_t>(i * (n + gap) + j)]) *
                static_cast<double>(x[static_cast<std::size_t>(j * (d + gap) + c)]);
          expected[static_cast<std::size_t>(i * (d + gap) + c)] = sum;
        }
      const matrix_view<const T> rows(at_the_end(x, n, d, x_memory), n, d, d + gap);
      const auto run = [&](const auto& exec, std::vector<float>& into) {
        float* const at = out_memory.window(size, test::guarded_end::back);
        std::copy(into.begin(), into.end(), at);
        const matrix_view<float> o(at, r, d, d + gap);
        if (transposed)
          simd::multiply_transposed(matrix_view<const float>(turned_rows, n, r, r + gap), rows, o,
                                    start, exec);
        else
          simd::multiply_rows(matrix_view<const float>(a_rows, r, n, n + gap), rows, o, start,
                              exec);
        std::copy_n(at, size, into.begin());
      };
      run(serial{}, out);
      // What lies between the rows is nobody's.
      CHECK(test::difference(out, expected, 1e-5, 3e-5) == "");
      auto others = before;
      run(test::backwards{}, others);
      CHECK(test::bit_difference(others, out) == "");
      others = before;
      run(test::several_threads{}, others);
      CHECK(test::bit_difference(others, out) == "");
    }
}

}  // namespace

TEST_CASE("products of rows as they lie in memory are those of plain loops") {
  for (const index_t r : {1, 2, 5, 6, 7, 13, 100})
    for (const index_t n : {0, 1, 95, 97, 200})
      for (const index_t d : {1, 16, 63, 65, 130})
        if (r * n * d <= test::sized(3000000, 200000)) products_agree<float>(r, n, d);
  products_agree<bfloat16>(9, 100, 70);
  products_agree<float16>(9, 100, 70);
  products_agree<float>(0, 4, 5);
}

TEST_CASE("factors are packed in the order in which a tile reads them, a register past the end") {
  test::edges memory(4 * 6 * 200);
  test::random rng(20);
  for (int round = 0; round < 200; ++round) {
    const index_t n = 1 + rng.below(6), depth = rng.below(20), gap = rng.below(3);
    const bool turned = rng.below(2) == 0;
    const index_t row_step = turned ? 1 : depth + gap, depth_step = turned ? n + gap : 1;
    const auto from =
        random_values<float>(depth == 0 ? 0 : (n - 1) * row_step + (depth - 1) * depth_step + 1, 8);
    test::for_each_arch<test::widths>([&]<class A>(A) {
      const auto packed = [&]<int m>(std::integral_constant<int, m>) {
        memory.begin(test::guarded_end::back);
        float* const to = memory.room<float>(m * depth + simd::width<A>);
        simd::detail::pack_factors<A, m>(memory.copy(from), row_step, depth_step, n, depth, to);
        int wrong = 0;
        for (index_t i = 0; i < depth; ++i)
          for (index_t q = 0; q < n; ++q)
            wrong += to[i * m + q] != from[static_cast<std::size_t>(q * row_step + i * depth_step)];
        INFO("n " << n << " of " << m << " depth " << depth << " turned " << turned);
        CHECK(wrong == 0);
      };
      packed(std::integral_constant<int, simd::detail::tile_rows>{});
      if (n <= 2) packed(std::integral_constant<int, 2>{});
    });
  }
}

TEST_CASE("a part of a product of nothing is 0, and its columns only") {
  constexpr index_t rows = 4, cols = 100, first = 64;
  test::edges memory(4 * rows * cols);
  for (const auto store :
       {simd::detail::product_store::first, simd::detail::product_store::written}) {
    memory.begin(test::guarded_end::back);
    float* const at = memory.copy(std::vector<float>(rows * cols, 7.0f));
    simd::detail::product_block<simd::default_arch, float>({nullptr, 0, 1, rows, 0},
                                                           {nullptr, 0, cols}, {at, rows, cols},
                                                           store, 1, rows, first, cols);
    int wrong = 0;
    for (index_t r = 0; r < rows; ++r)
      for (index_t c = 0; c < cols; ++c)
        wrong +=
            at[r * cols + c] !=
            (r >= 1 && c >= first && store == simd::detail::product_store::first ? 0.0f : 7.0f);
    CHECK(wrong == 0);
  }
}

TEST_CASE("a product that is much larger than a cache has the bits of its parts") {
  // Streamed as a whole; parts are not, nor what does not begin where a line does.
  constexpr index_t d = 2048 + 20, stride = d + 12;
  const index_t r = simd::machine_caches().second / 2048 + 29;
  for (const index_t n : {0, 3}) {
    const auto a = random_values<float>(r * n, 1), x = random_values<float>(n * d, 3);
    const matrix_view<const float> rows(x.data(), n, d), left(a.data(), r, n);
    buffer<float> whole(r * stride + 16), parts(r * stride + 16);
    const auto difference = [&](index_t first, const auto& exec) {
      for (buffer<float>* out : {&whole, &parts}) std::fill_n(out->data(), out->size(), 7.0f);
      simd::multiply_rows(left, rows, {whole.data() + first, r, d, stride}, simd::sum_start::zero,
                          exec);
      for (index_t t = 0; t < r; t += 100) {
        const index_t here = std::min<index_t>(100, r - t);
        simd::multiply_rows(left.middle_rows(t, here), rows,
                            {parts.data() + first + t * stride, here, d, stride},
                            simd::sum_start::zero);
      }
      return test::bit_difference(std::span<float>(whole), std::span<float>(parts));
    };
    CHECK(difference(0, serial{}) == "");
    CHECK(difference(3, serial{}) == "");
    CHECK(difference(0, test::several_threads{}) == "");
  }
}

TEST_CASE("the second-level cache is as large as the machine says, or a usual size") {
  index_t said = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  said = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  CHECK(simd::machine_caches().second == (said > 0 ? said : index_t{1} << 20));
  CHECK(simd::cache_sizes{}.second == 1048576);
}

TEST_CASE("a dot product of rows is the sum of their products, whatever its tail") {
  for (const index_t n : {0, 1, 15, 16, 17, 31, 33, 64, 100}) {
    const auto a = random_values<float>(n, 5), b = random_values<float>(n, 6);
    double sum = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i)
      sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    CHECK(std::abs(static_cast<double>(simd::row_dot(a.data(), b.data(), n)) - sum) < 1e-5);
  }
}

TEST_CASE(
    "products refuse rows that run into one another, shared memory and other sizes, by name") {
  std::vector<std::vector<float>> own(3, std::vector<float>(64));
  const auto at = [&](std::size_t i, index_t stride) {
    matrix_view<float> v(own[i].data(), 8, 8);
    v.stride = stride;
    return v;
  };
  const auto said = [&](const auto& a, const auto& rows, const auto& out) {
    return test::refusal([&] {
      simd::multiply_rows(matrix_view<const float>(a), matrix_view<const float>(rows), out,
                          simd::sum_start::zero);
    });
  };
  const auto turned = [&](const auto& a, const auto& rows, const auto& out) {
    return test::refusal([&] {
      simd::multiply_transposed(matrix_view<const float>(a), matrix_view<const float>(rows), out,
                                simd::sum_start::zero);
    });
  };
  for (const index_t stride : {0, 7, -8}) {
    const std::string text = ".stride is " + std::to_string(stride) + ", expected at least 8";
    CHECK(said(at(0, stride), at(1, 8), at(2, 8)) == "moeroute::multiply_rows: a" + text);
    CHECK(said(at(0, 8), at(1, stride), at(2, 8)) == "moeroute::multiply_rows: rows" + text);
    CHECK(said(at(0, 8), at(1, 8), at(2, stride)) == "moeroute::multiply_rows: out" + text);
    CHECK(turned(at(0, stride), at(1, 8), at(2, 8)) == "moeroute::multiply_transposed: a" + text);
  }
  CHECK(said(at(0, 8), at(1, 8), at(0, 8)) ==
        "moeroute::multiply_rows: a and out overlap, expected memory of their own");
  CHECK(turned(at(0, 8), at(1, 8), at(1, 8)) ==
        "moeroute::multiply_transposed: rows and out overlap, expected memory of their own");
  CHECK(said(at(0, 8), at(1, 8), at(2, 8)) == "accepted");
  const auto part = [&](std::size_t i, index_t rows, index_t cols) {
    return matrix_view<float>(own[i].data(), rows, cols);
  };
  const auto a = part(0, 5, 3), back = part(0, 3, 5), rows = part(1, 3, 4), out = part(2, 5, 4);
  CHECK(said(a, part(1, 4, 4), out) == "moeroute::multiply_rows: rows.rows() is 4, expected 3");
  CHECK(said(a, rows, part(2, 3, 4)) == "moeroute::multiply_rows: out.rows() is 3, expected 5");
  CHECK(said(a, rows, part(2, 5, 3)) == "moeroute::multiply_rows: out.cols() is 3, expected 4");
  CHECK(turned(back, part(1, 5, 4), out) ==
        "moeroute::multiply_transposed: rows.rows() is 5, expected 3");
  CHECK(turned(back, rows, part(2, 3, 4)) ==
        "moeroute::multiply_transposed: out.rows() is 3, expected 5");
  CHECK((said(a, rows, out) == "accepted" && turned(back, rows, out) == "accepted"));
}
