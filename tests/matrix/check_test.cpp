#include <moeroute/matrix/check.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"

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

TEST_CASE("matrices that share a byte overlap; of one stride they do not where they share none") {
  test::random rng(11);
  alignas(8) std::byte memory[256];
  std::string wrong;
  int shared = 0, apart = 0;
  for (int trial = 0; trial < test::sized(20000, 2000); ++trial) {
    const bool alike = rng.below(2) == 0;
    const index_t stride = 1 + rng.below(6);
    const auto make = [&](auto value) {
      using T = decltype(value);
      const index_t rows = rng.below(5), by = alike ? stride : 1 + rng.below(6),
                    cols = rng.below(by + 1), at = rng.below(16);
      return matrix_view<T>(reinterpret_cast<T*>(memory + 64 + at * index_t{sizeof(T)}), rows, cols,
                            by);
    };
    const auto a = make(float{});
    const auto bytes = [&](const auto& m, auto&& f) {
      for (index_t r = 0; r < m.rows; ++r)
        for (index_t b = 0; b < m.cols * index_t{sizeof *m.data}; ++b)
          f(reinterpret_cast<std::byte*>(m.data + r * m.stride) - memory + b);
    };
    const auto look = [&](const auto& b) {
      bool used[256] = {}, met = false;
      bytes(a, [&](std::ptrdiff_t i) { used[i] = true; });
      bytes(b, [&](std::ptrdiff_t i) { met = met || used[i]; });
      const bool said = overlap(a, b), other = overlap(b, a);
      if (said != other || (met && !said)) wrong = "a shared byte";
      if (said && (a.rows * a.cols == 0 || b.rows * b.cols == 0)) wrong = "nothing";
      // Rows of one stride, or one after the other, are told apart exactly.
      const index_t size = sizeof *b.data;
      const bool exact = a.rows > 1 && b.rows > 1 && a.stride * 4 == b.stride * size;
      if (exact && !met && said) wrong = "no shared byte";
      ++(met ? shared : apart);
      const bool same = static_cast<void*>(a.data) == static_cast<void*>(b.data) && size == 4 &&
                        (a.rows <= 1 || a.stride == b.stride);
      const auto refused = [&](auto check) { return test::refusal(check) != "accepted"; };
      if (refused([&] { check_apart("s", "a", a, "b", b); }) != said ||
          refused([&] { check_apart_or_same("s", "a", a, "b", b); }) != (said && !same))
        wrong = "a check";
    };
    look(make(float{}));
    look(make(std::uint16_t{}));
  }
  CHECK(wrong == "");
  CHECK((shared > 100 && apart > 100));
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
  CHECK(said(0, -8, 8) ==
        "moeroute::stage: x of 0 x -8 values with stride 8 is no matrix that memory holds");
  CHECK(said(0, max_bytes, 0) == "accepted");
  matrix_view<const std::byte> bytes;
  bytes.rows = 1, bytes.cols = max_bytes;
  CHECK(test::refusal([&] { check_stride("stage", "x", bytes); }) == "accepted");
  bytes.rows = 2, bytes.cols = 1, bytes.stride = max_bytes - 1;
  CHECK(test::refusal([&] { check_stride("stage", "x", bytes); }) == "accepted");
  bytes.stride = max_bytes;
  CHECK(test::refusal([&] { check_stride("stage", "x", bytes); }) ==
        "moeroute::stage: x of 2 x 1 values with stride " + std::to_string(max_bytes) +
            " is no matrix that memory holds");
  CHECK(said(0, max_bytes + 1, 0) == "moeroute::stage: x of 0 x " + std::to_string(max_bytes + 1) +
                                         " values with stride 0 is no matrix that memory holds");
  CHECK(said(1, max_bytes / 4, 0) == "accepted");
  CHECK(said(1, max_bytes / 4 + 1, 0) ==
        "moeroute::stage: x of 1 x " + std::to_string(max_bytes / 4 + 1) +
            " values with stride 0 is no matrix that memory holds");
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
  matrix_view<const double> doubles;
  doubles.rows = doubles.cols = doubles.stride = (index_t{1} << 27) - 1;
  CHECK(test::refusal([&] { check_stride("stage", "x", doubles); }) ==
        "moeroute::stage: x of 134217727 x 134217727 values with stride 134217727 is no matrix "
        "that memory holds");
}
