#include <moeroute/simd/probability/sinkhorn_sweep.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <span>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

struct swept {
  std::vector<float> u, column_sum;
};

// Rows that are `gap` further apart than they are long: what lies between is nobody's.
std::vector<float> rows_with_gaps(const std::vector<float>& m, index_t rows, index_t cols,
                                  index_t gap) {
  const index_t stride = cols + gap;
  std::vector<float> wide(static_cast<std::size_t>((rows - 1) * stride + cols), test::not_a_number);
  for (index_t i = 0; i < rows; ++i)
    std::copy_n(m.data() + i * cols, cols, wide.data() + i * stride);
  return wide;
}

template <class A>
swept sweep(const std::vector<float>& k, index_t rows, index_t cols, const std::vector<float>& v,
            index_t gap = 0) {
  // Every array ends where memory does.
  static test::edges memory(4 * 80 * 160);
  memory.begin(test::guarded_end::back);
  float *const u = memory.room<float>(rows), *const sum =
                                                 memory.copy(std::vector<float>(v.size(), 0.25f));
  simd::sinkhorn_sweep<A>(memory.copy(rows_with_gaps(k, rows, cols, gap)), rows, cols + gap,
                          memory.copy(v), cols, 0.5f, 1e-8f, u, sum);
  return {{u, u + rows}, {sum, sum + cols}};
}

template <class A>
swept log_sweep(const std::vector<float>& x, index_t rows, index_t cols,
                const std::vector<float>& g, index_t gap = 0) {
  static test::edges memory(4 * 80 * 160);
  memory.begin(test::guarded_end::back);
  float *const u = memory.room<float>(rows),
               *const sum = memory.copy(std::vector<float>(g.size(), 0.25f)),
               *const p = memory.room<float>(16 * cols);
  const float *const logarithms = memory.copy(rows_with_gaps(x, rows, cols, gap)), *const factors =
                                                                                       memory.copy(
                                                                                           g);
  for (index_t t = 0; t < rows; t += 16)
    simd::sinkhorn_log_block<A>(logarithms + t * (cols + gap), cols + gap,
                                static_cast<int>(std::min<index_t>(16, rows - t)), factors, cols,
                                0.5f, p, u + t, sum);
  return {{u, u + rows}, {sum, sum + cols}};
}

}  // namespace

TEST_CASE(
    "a sweep gives token factors and adds the column sums, with the same bits on every arch") {
  for (const auto& [rows, stride] : {std::pair<index_t, index_t>{1, 16},
                                     {3, 32},
                                     {7, 16},
                                     {15, 48},
                                     {16, 16},
                                     {29, 64},
                                     {40, 144},
                                     {64, 48},
                                     {71, 128}}) {
    test::random rng(static_cast<std::uint64_t>(rows));
    std::vector<float> k(static_cast<std::size_t>(rows * stride)),
        v(static_cast<std::size_t>(stride));
    for (float& x : k) x = rng.uniform();
    for (float& x : v) x = rng.uniform() + 0.1f;
    std::fill_n(k.begin(), stride, 0.0f);  // a row without mass
    std::vector<double> u, sum(static_cast<std::size_t>(stride), 0.25);
    for (index_t t = 0; t < rows; ++t) {
      double dot = 0;
      for (index_t e = 0; e < stride; ++e)
        dot += static_cast<double>(k[static_cast<std::size_t>(t * stride + e)]) *
               static_cast<double>(v[static_cast<std::size_t>(e)]);
      u.push_back(dot > 0 ? 0.5 / (dot + 1e-8) : 0);
      for (index_t e = 0; e < stride; ++e)
        sum[static_cast<std::size_t>(e)] +=
            u.back() * static_cast<double>(k[static_cast<std::size_t>(t * stride + e)]);
    }
    const swept s = sweep<simd::default_arch>(k, rows, stride, v);
    CHECK(test::difference(s.u, u, 1e-5) == "");
    CHECK(test::difference(s.column_sum, sum, 1e-5) == "");
    // The logarithms of the same matrix: the same factors, as logarithms, of the plan itself.
    std::vector<float> x(k.size()), g(v.size());
    for (std::size_t i = 0; i < k.size(); ++i) x[i] = std::log(k[i]);
    for (std::size_t i = 0; i < v.size(); ++i) g[i] = std::log(v[i]);
    const swept l = log_sweep<simd::default_arch>(x, rows, stride, g);
    std::vector<double> log_u, plan_sum;
    for (const double factor : u) log_u.push_back(factor > 0 ? std::log(factor) : 0.0);
    for (std::size_t e = 0; e < sum.size(); ++e)
      plan_sum.push_back((sum[e] - 0.25) * static_cast<double>(v[e]) + 0.25);
    CHECK(l.u[0] == -test::infinity);
    std::vector<float> finite_u = l.u;
    finite_u[0] = 0.0f;
    CHECK(test::difference(finite_u, log_u, 1e-5, 2e-6) == "");
    CHECK(test::difference(l.column_sum, plan_sum, 1e-5) == "");
    // Rows a long way up or down: nothing overflows, and the plan is the same.
    for (const float shift : {-200.0f, 200.0f}) {
      std::vector<float> moved = x;
      for (float& value : moved) value += shift;
      const swept m = log_sweep<simd::default_arch>(moved, rows, stride, g);
      CHECK(test::difference(m.column_sum, l.column_sum, 1e-3) == "");
      std::vector<float> back = m.u;
      for (float& value : back) value += shift;
      back[0] = 0.0f;
      CHECK(test::difference(back, finite_u, 1e-4, 1e-3) == "");
    }
    test::for_each_arch<test::arches>([&](auto tag) {
      const swept other = sweep<decltype(tag)>(k, rows, stride, v, 16);
      CHECK(test::bit_difference(other.u, s.u) == "");
      CHECK(test::bit_difference(other.column_sum, s.column_sum) == "");
      const swept log_other = log_sweep<decltype(tag)>(x, rows, stride, g, 16);
      CHECK(test::bit_difference(log_other.u, l.u) == "");
      CHECK(test::bit_difference(log_other.column_sum, l.column_sum) == "");
    });
  }
}

TEST_CASE("kernel values are in [0, 1], 1 at the maximum, never denormal, and 0 for NaN and -inf") {
  test::edges memory(4 * 16 * 48);
  for (const test::shape shape : test::all_shapes)
    for (const index_t cols : {1, 7, 16, 17, 40}) {
      const auto z = test::make_logits(shape, 2, 16, cols);
      const index_t stride = round_up(cols, 16);
      // Any number of rows, which end where memory does.
      const index_t n = 1 + (cols + static_cast<index_t>(shape)) % 16;
      memory.begin(test::guarded_end::back);
      const float** const row = memory.room<const float*>(n);
      for (index_t i = 0; i < n; ++i)
        row[i] = i == 5 ? nullptr
                        : memory.copy(std::span<const float>(z).subspan(
                              static_cast<std::size_t>(i * cols), static_cast<std::size_t>(cols)));
      float* const k = memory.room<float>(n * stride);
      const int live =
          simd::sinkhorn_kernel_block(row, static_cast<int>(n), cols, 1.0f, false, k, stride);
      int expected_live = 0;
      bool sound = true;
      for (index_t i = 0; i < n; ++i) {
        float top = 0;
        for (index_t e = 0; e < stride; ++e) {
          const float x = k[i * stride + e];
          top = std::max(top, x);
          sound = sound && (x == 0.0f || (x >= simd::sinkhorn_flush && x <= 1.0f));
          if (e >= cols || row[i] == nullptr || !(row[i][e] > -test::infinity))
            sound = sound && x == 0.0f;
        }
        const bool any = row[i] != nullptr && std::any_of(row[i], row[i] + cols, [](float x) {
                           return x > -test::infinity;
                         });
        expected_live += any;
        sound = sound && top == (any ? 1.0f : 0.0f);
      }
      INFO(test::name(shape) << " cols=" << cols);
      CHECK(sound);
      CHECK(live == expected_live);
    }
}

TEST_CASE("kernel values are exponentials of what is below the maximum, or their logarithms") {
  test::edges memory(4 * 16 * 144);
  for (index_t cols = 1; cols <= 130; cols += cols < 20 ? 1 : 11)
    for (const float temperature : {1.0f, 0.5f, 3.0f})
      for (const bool logarithm : {false, true}) {
        const auto z = test::make_logits(test::shape::masked, 2, 3, cols);
        const index_t stride = round_up(cols, 16);
        std::vector<double> expected;
        for (index_t i = 0; i < 3; ++i) {
          const float* const row = z.data() + i * cols;
          const double top = static_cast<double>(*std::max_element(row, row + cols));
          for (index_t c = 0; c < stride; ++c) {
            const double x = c < cols ? static_cast<double>(row[c]) : -HUGE_VAL;
            const double below = x > -HUGE_VAL ? (x - top) / static_cast<double>(temperature) : x;
            // What is -inf stands as a number here.
            expected.push_back(logarithm ? std::max(below, -1e30) : std::exp(below));
          }
        }
        test::for_each_arch<test::arches>([&](auto tag) {
          test::at_both_ends(memory, [&] {
            std::vector<const float*> row;
            for (std::size_t i = 0; i < 3; ++i)
              row.push_back(memory.copy(std::span<const float>(z).subspan(
                  i * static_cast<std::size_t>(cols), static_cast<std::size_t>(cols))));
            float* const k = memory.room<float>(3 * stride);
            simd::sinkhorn_kernel_block<decltype(tag)>(memory.copy(row), 3, cols, temperature,
                                                       logarithm, k, stride);
            std::vector<float> got(k, k + 3 * stride);
            if (logarithm)
              for (float& x : got) x = std::max(x, -1e30f);
            INFO(cols << " columns, temperature " << temperature);
            CHECK(test::difference(got, expected, 1e-5, 1e-30) == "");
          });
        });
      }
}

TEST_CASE("kernel values below the flush level are 0, those above it are not") {
  const float z[] = {0.0f, -68.0f, -70.0f, -80.0f, -87.0f};
  const float* row[] = {z};
  std::vector<float> k(16);
  CHECK(simd::sinkhorn_kernel_block(row, 1, 5, 1.0f, false, k.data(), 16) == 1);
  CHECK(k[1] > 0.0f);
  CHECK(k[2] == 0.0f);
  CHECK(k[3] == 0.0f);
  CHECK(k[4] == 0.0f);
}
