#include <moeroute/simd/select/column_top_k.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <span>
#include <vector>

#include "oracle/batch_routing.hpp"
#include "support/arches.hpp"
#include "support/edges.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;

namespace {

struct strip_source {
  const float* strip;

  template <class A>
  simd::vfloat<A> values(index_t tile, int column, int lane) const {
    return simd::load<A>(strip + simd::panel_shape::lanes(tile, column) + lane);
  }
};

// The rows that each column picks, ascending, by way of a panel.
template <class A>
std::vector<std::vector<index_t>> picked(const std::vector<float>& m, index_t rows, index_t cols,
                                         index_t k) {
  const simd::panel_shape shape{ceil_div(rows, simd::tile_size)};
  const index_t stride = round_up(cols, simd::tile_size);
  std::vector<float> panel(static_cast<std::size_t>(simd::panel_size(rows, cols)));
  std::vector<float> block(static_cast<std::size_t>(simd::tile_size * stride)), one(16, 1.0f);
  for (index_t tile = 0; tile < shape.tiles; ++tile) {
    std::fill(block.begin(), block.end(), -test::infinity);
    for (index_t lane = 0; lane < simd::tile_size; ++lane)
      if (tile * simd::tile_size + lane < rows)
        std::copy_n(m.data() + (tile * simd::tile_size + lane) * cols, cols,
                    block.data() + lane * stride);
    simd::pack_tiles<A>(block.data(), stride, one.data(), cols, panel.data(), shape, tile);
  }
  // Every array ends where memory does, or begins there.
  static test::edges edges(8 * simd::tile_size * 4200);
  std::vector<std::vector<index_t>> result;
  for (index_t first = 0; first < cols; first += simd::tile_size) {
    const int n = static_cast<int>(std::min<index_t>(simd::tile_size, cols - first));
    edges.begin(k % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
    const auto memory =
        edges.carve([&](scratch& tape) { return simd::column_top_k_buffers::carve(tape, rows); });
    std::int32_t *const picks = edges.room<std::int32_t>(n * k),
                        *const key = edges.room<std::int32_t>(n * k),
                        *const count = edges.room<std::int32_t>(n);
    const auto strip = std::span<const float>(panel).subspan(
        static_cast<std::size_t>(shape.strip(first)),
        static_cast<std::size_t>(simd::panel_size(rows, simd::tile_size)));
    simd::column_top_k<A>(strip_source{edges.copy(strip)}, rows, n, k, memory, {picks, key, count});
    for (int c = 0; c < n; ++c) {
      std::vector<index_t> column;
      for (index_t i = 0; i < count[c]; ++i) {
        const index_t at = c * k + i;
        const index_t row = picks[at];
        column.push_back(row);
        // A wrong key spoils the column.
        if (simd::value_of_key(key[at]) != m[static_cast<std::size_t>(row * cols + first + c)])
          column.push_back(-1);
      }
      if (!std::is_sorted(column.begin(), column.end())) column.push_back(-2);
      result.push_back(column);
    }
  }
  return result;
}

}  // namespace

TEST_CASE("every column keeps its k best rows, the lowest rows among equals, on every arch") {
  for (const auto& [rows, cols] :
       {std::pair<index_t, index_t>{1, 1}, {15, 3}, {16, 16}, {17, 17}, {700, 5}, {2500, 19}})
    for (const test::shape shape : test::all_shapes) {
      if (rows > test::sized(2500, 700)) continue;
      const auto m = test::make_logits(shape, 3, rows, cols);
      for (const index_t k : {index_t{1}, (rows + 30) / 31, (rows + 1) / 2, rows}) {
        std::vector<std::vector<index_t>> expected;
        for (index_t c = 0; c < cols; ++c) {
          auto column = oracle::column_order(m, rows, cols, c);
          column.resize(std::min(column.size(), static_cast<std::size_t>(k)));
          std::sort(column.begin(), column.end());
          expected.push_back(column);
        }
        INFO(test::name(shape) << " rows=" << rows << " cols=" << cols << " k=" << k);
        test::for_each_arch<test::arches>(
            [&](auto tag) { CHECK(picked<decltype(tag)>(m, rows, cols, k) == expected); });
      }
    }
}

TEST_CASE("a sample that misleads costs a second sweep, not a row") {
  // The sampled rows hold all large values, fewer than k of them; everything else is small.
  constexpr index_t rows = 4096, cols = 2;
  std::vector<float> m(static_cast<std::size_t>(rows * cols), 0.0f);
  for (index_t r = 0; r < rows; ++r) {
    const bool sampled = r / 16 % 8 == 0 && r % 16 / 8 == r / 128 % 2;
    m[static_cast<std::size_t>(r * cols)] =
        sampled ? 1.0f + static_cast<float>(r) : -1.0f * static_cast<float>(r);
    m[static_cast<std::size_t>(r * cols + 1)] = static_cast<float>(r % 97);
  }
  for (const index_t k : {index_t{300}, index_t{1000}}) {
    const auto got = picked<simd::default_arch>(m, rows, cols, k);
    for (index_t c = 0; c < cols; ++c) {
      auto expected = oracle::column_order(m, rows, cols, c);
      expected.resize(static_cast<std::size_t>(k));
      std::sort(expected.begin(), expected.end());
      CHECK(got[static_cast<std::size_t>(c)] == expected);
    }
  }
}

TEST_CASE("keys have the order of their floats and give them back") {
  const float values[] = {-test::infinity, -3e38f, -1.5f, -1e-40f,       0.0f,
                          1e-40f,          2.5f,   3e38f, test::infinity};
  for (std::size_t i = 0; i < std::size(values); ++i) {
    CHECK(simd::value_of_key(simd::ordered_key(values[i])) == values[i]);
    if (i > 0) CHECK(simd::ordered_key(values[i - 1]) < simd::ordered_key(values[i]));
    CHECK(simd::ordered_key<simd::default_arch>(simd::vfloat<>(values[i])).get(0) ==
          simd::ordered_key(values[i]));
  }
  CHECK(simd::ordered_key(-0.0f) == simd::ordered_key(0.0f));
}
