#include <moeroute/matrix/check.hpp>

#include <catch2/catch_test_macros.hpp>
#include <string>
#include <vector>

#include "support/refusal.hpp"

using namespace moeroute;

TEST_CASE("matrices overlap where they share a byte, and only there") {
  std::vector<float> memory(100);
  float* p = memory.data();
  const auto at = [&](index_t offset, index_t rows, index_t cols, index_t stride) {
    return matrix_view<float>(p + offset, rows, cols, stride);
  };
  CHECK(overlap(at(0, 2, 10, 10), at(0, 2, 10, 10)));
  CHECK(overlap(at(0, 2, 10, 10), at(19, 1, 1, 1)));
  CHECK_FALSE(overlap(at(0, 2, 10, 10), at(20, 1, 1, 1)));
  CHECK_FALSE(overlap(at(20, 1, 1, 1), at(0, 2, 10, 10)));
  // Side by side in one matrix of ten columns.
  CHECK_FALSE(overlap(at(0, 5, 4, 10), at(4, 5, 6, 10)));
  CHECK_FALSE(overlap(at(4, 5, 6, 10), at(0, 5, 4, 10)));
  CHECK(overlap(at(0, 5, 5, 10), at(4, 5, 6, 10)));
  CHECK(overlap(at(4, 5, 6, 10), at(0, 5, 5, 10)));
  CHECK(overlap(at(0, 5, 4, 10), at(14, 3, 7, 10)));
  CHECK_FALSE(overlap(at(0, 5, 4, 10), at(14, 3, 6, 10)));
  CHECK(overlap(at(0, 5, 4, 10), at(4, 5, 6, 9)));
  // One row that stands for all.
  CHECK(overlap(at(0, 5, 4, 0), at(2, 5, 4, 0)));
  CHECK_FALSE(overlap(at(0, 5, 4, 0), at(4, 5, 4, 0)));
  // Nothing overlaps nothing.
  CHECK_FALSE(overlap(at(0, 0, 10, 10), at(0, 2, 10, 10)));
  CHECK_FALSE(overlap(at(0, 2, 0, 10), at(0, 2, 10, 10)));
}

TEST_CASE("the same matrix is let through where that is allowed, a shifted one is not") {
  std::vector<float> memory(100);
  const matrix_view<float> a(memory.data(), 3, 4, 10), b(memory.data() + 1, 3, 4, 10),
      c(memory.data(), 3, 4, 9);
  CHECK(test::refusal([&] { check_apart_or_same("stage", "x", a, "y", a); }) == "accepted");
  CHECK(test::refusal([&] { check_apart_or_same("stage", "x", a, "y", b); }) ==
        "moeroute::stage: x and y overlap, expected memory of their own");
  CHECK(test::refusal([&] { check_apart_or_same("stage", "x", a, "y", c); }) ==
        "moeroute::stage: x and y overlap, expected memory of their own");
  CHECK(test::refusal([&] { check_apart("stage", "x", a, "y", a); }) ==
        "moeroute::stage: x and y overlap, expected memory of their own");
}

TEST_CASE("rows that would run into one another are refused") {
  matrix_view<float> m(nullptr, 2, 8, 8);
  m.stride = 3;
  CHECK(test::refusal([&] { check_stride("stage", "x", m); }) ==
        "moeroute::stage: x.stride is 3, expected at least 8");
  m.rows = 1;
  CHECK(test::refusal([&] { check_stride("stage", "x", m); }) == "accepted");
}

// Tokens x experts x width that overflow an index, or an address of 32 bits, and what just fits.
TEST_CASE("a matrix that ends past what an address reaches is refused by its name") {
  const auto said = [](index_t rows, index_t cols, index_t stride) {
    matrix_view<const float> m;
    m.rows = rows, m.cols = cols, m.stride = stride;
    return test::refusal([&] { check_stride("stage", "x", m); });
  };
  const index_t many = index_t{1} << 40;
  CHECK(
      said(many, many, many) ==
      "moeroute::stage: x of 1099511627776 x 1099511627776 values with stride 1099511627776 is no "
      "matrix that memory holds");
  CHECK(said(2, 8, index_t{1} << 62) ==
        "moeroute::stage: x of 2 x 8 values with stride 4611686018427387904 is no matrix that "
        "memory holds");
  CHECK(said(1, index_t{1} << 62, 0) ==
        "moeroute::stage: x of 1 x 4611686018427387904 values with stride 0 is no matrix that "
        "memory holds");
  CHECK(said(-1, 8, 8) ==
        "moeroute::stage: x of -1 x 8 values with stride 8 is no matrix that memory holds");
  CHECK(said(1, -8, 8) ==
        "moeroute::stage: x of 1 x -8 values with stride 8 is no matrix that memory holds");
  // The last that fits, and the first that does not.
  const index_t rows = max_bytes / 4 / 4096;
  CHECK(said(rows, 4096, 4096) == "accepted");
  CHECK(said(0, many, many) == "accepted");
  CHECK(said(rows + 1, 4096, 4096) ==
        "moeroute::stage: x of " + std::to_string(rows + 1) +
            " x 4096 values with stride 4096 is no matrix that memory holds");
  CHECK(said(rows + 1, 4096, 0) == "moeroute::stage: x.stride is 0, expected at least 4096");
}
