#include <moeroute/simd/select/kth_largest.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <moeroute/simd/rows/histogram.hpp>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/random.hpp"

using namespace moeroute;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Kinds of values: spread, tied, all equal, both signs of zero, mostly masked, NaN among them, of
// many magnitudes, +inf among them.
std::vector<float> values(int kind, index_t n, std::uint64_t seed) {
  test::random rng(seed);
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& v : x) {
    v = rng.normal();
    if (kind == 1) v = std::round(v);
    if (kind == 2) v = 0.25f;
    if (kind == 3) v = rng.below(2) == 0 ? 0.0f : -0.0f;
    if (kind == 4 && rng.below(5) != 0) v = -infinity;
    if (kind == 5 && rng.below(3) == 0) v = std::nanf("");
    if (kind == 7 && rng.below(9) == 0) v = infinity;
    if (kind == 6) v *= std::ldexp(1.0f, static_cast<int>(rng.below(200)) - 100);
  }
  return x;
}

float slow_kth_largest(std::vector<float> x, index_t k) {
  std::erase_if(x, [](float v) { return !(v > -infinity); });
  if (k > static_cast<index_t>(x.size())) return -infinity;
  std::sort(x.begin(), x.end(), std::greater<>());
  return x[static_cast<std::size_t>(k - 1)] + 0.0f;
}

// A zero has the sign of +0, whichever of both was the k-th.
bool equal_with_sign(float a, float b) { return a == b && std::signbit(a) == std::signbit(b); }

struct panel_of {
  const float* data;
  template <class A>
  simd::vfloat<A> values(index_t tile, int column, int lane) const {
    return simd::load<A>(data + simd::panel_shape::lanes(tile, column) + lane);
  }
};

}  // namespace

TEST_CASE("the k-th largest of columns and rows is the oracle's, on every ISA, for every kind") {
  test::edges memory(4 * 17 * 3100);
  for (const index_t rows : {1, 15, 100, 700, 3000})
    for (int kind = 0; kind < 8; ++kind) {
      std::vector<std::vector<float>> columns;
      std::vector<float> panel(static_cast<std::size_t>(simd::panel_size(rows, 16)), -infinity);
      for (int c = 0; c < 5; ++c) {
        columns.push_back(values(kind, rows, static_cast<std::uint64_t>(c + 1)));
        for (index_t t = 0; t < rows; ++t)
          panel[static_cast<std::size_t>(simd::panel_shape::lanes(t / 16, c) + t % 16)] =
              columns.back()[static_cast<std::size_t>(t)];
      }
      for (const index_t k : {index_t{1}, index_t{3}, rows / 8 + 1, rows / 2 + 1, rows, rows + 1}) {
        std::vector<float> expected;
        for (const auto& column : columns) expected.push_back(slow_kth_largest(column, k));
        test::for_each_arch<test::widths>([&](auto tag) {
          using A = decltype(tag);
          memory.begin(k % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
          const auto m =
              memory.carve([&](scratch& t) { return simd::kth_column_buffers::carve(t, rows); });
          float* const out = memory.room<float>(5);
          simd::kth_largest_of_columns<A>(panel_of{memory.copy(panel)}, rows, 5, k, m, out);
          for (std::size_t c = 0; c < 5; ++c) {
            INFO("rows " << rows << " kind " << kind << " k " << k << " column " << c);
            REQUIRE(equal_with_sign(out[c], expected[c]));
          }
        });
      }
    }
  for (const index_t cols : {1, 7, 16, 90, 300})
    for (int kind = 0; kind < 8; ++kind)
      for (const index_t k : {1, 2, 9, 64, 65, 90, 301}) {
        const index_t stride = cols + kind % 3;
        std::vector<float> rows = values(kind, 15 * stride + cols, 9);
        std::vector<std::vector<float>> row;
        for (index_t i = 0; i < 16; ++i) {
          const auto begin = rows.begin() + i * stride;
          row.emplace_back(begin, begin + cols);
          if (i < 15) std::fill(begin + cols, begin + stride, infinity);
        }
        test::for_each_arch<test::widths>([&](auto tag) {
          using A = decltype(tag);
          memory.begin(k % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
          const auto m = memory.carve(
              [&](scratch& t) { return simd::kth_largest_buffers::carve(t, cols, k); });
          float* const out = memory.room<float>(16);
          simd::kth_largest_of_block<A>(memory.copy(rows), stride, cols, k, m, out);
          for (index_t i = 0; i < 16; ++i) {
            INFO("cols " << cols << " kind " << kind << " k " << k << " row " << i);
            REQUIRE(equal_with_sign(out[i], slow_kth_largest(row[static_cast<std::size_t>(i)], k)));
          }
        });
      }
}

TEST_CASE("the k-th largest of a column is right where the rows of a sample are its largest") {
  // Columns of row numbers tell which rows a sample looks at: those are put above all others.
  constexpr index_t rows = 3000;
  std::vector<float> panel(static_cast<std::size_t>(simd::panel_size(rows, 16)), -infinity);
  const auto at = [&](index_t t, int c) -> float& {
    return panel[static_cast<std::size_t>(simd::panel_shape::lanes(t / 16, c) + t % 16)];
  };
  for (index_t t = 0; t < rows; ++t) at(t, 0) = static_cast<float>(t);
  alignas(64) float sampled[256];
  simd::sample_column<simd::default_arch>(panel_of{panel.data()}, rows, 0, 256, sampled);
  std::vector<float> column = values(0, rows, 3);
  for (const float t : sampled) column[static_cast<std::size_t>(t)] += 100.0f;
  const std::vector<float> plain = values(0, rows, 4);
  for (index_t t = 0; t < rows; ++t) {
    at(t, 0) = plain[static_cast<std::size_t>(t)];
    at(t, 1) = column[static_cast<std::size_t>(t)];
  }
  for (const index_t k : {100, 257, 600})
    test::for_each_arch<test::widths>([&](auto tag) {
      using A = decltype(tag);
      workspace ws;
      const auto m = ws.carve([&](scratch& t) { return simd::kth_column_buffers::carve(t, rows); });
      float out[2];
      simd::kth_largest_of_columns<A>(panel_of{panel.data()}, rows, 2, k, m, out);
      INFO("k " << k);
      CHECK(out[0] == slow_kth_largest(plain, k));
      CHECK(out[1] == slow_kth_largest(column, k));
    });
}

TEST_CASE("a bound of keys is the k-th largest, or reached by k of them and the slack") {
  test::edges memory(4 * 96);
  test::random rng(19);
  for (int round = 0; round < 400; ++round) {
    const index_t n = 1 + rng.below(80), k = 1 + rng.below(n);
    const index_t slack = rng.below(2) == 0 ? 0 : rng.below(6);
    const auto kinds = 1 + rng.below(90);
    const auto spread = rng.below(2) == 0 ? 1 : 20'000'000;
    std::vector<std::int32_t> key(static_cast<std::size_t>(round_up(n, 16)), simd::lowest_key);
    // Where fewer than k are above the lowest key the bound may be any.
    for (index_t i = 0; i < n; ++i)
      if (rng.below(20) != 0)
        key[static_cast<std::size_t>(i)] =
            (static_cast<std::int32_t>(rng.below(kinds)) - 45) * spread;
    std::vector<std::int32_t> sorted(key);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const auto reach = [&](std::int32_t bound) {
      return std::count_if(key.begin(), key.end(), [&](std::int32_t x) { return x >= bound; });
    };
    const std::int32_t kth = sorted[static_cast<std::size_t>(k - 1)];
    INFO("round " << round << " n " << n << " k " << k << " slack " << slack);
    test::for_each_arch<test::widths>([&](auto tag) {
      using A = decltype(tag);
      memory.begin(round % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
      const std::int32_t* const keys = memory.copy(key);
      const std::int32_t bound = simd::kth_largest_bound<A>(keys, n, k, slack);
      if (kth != simd::lowest_key) {
        CHECK(simd::count_at_least<A>(keys, n, kth) == reach(kth));
        CHECK(reach(bound) >= k);
        CHECK((bound == kth || reach(bound) <= k + slack));
      }
    });
  }
}

TEST_CASE("the k-th largest of a tile is that of its rows with the bias added, on every ISA") {
  test::edges memory(4 * 32 * 112);
  for (const index_t cols : {1, 5, 16, 17, 40, 100})
    for (int kind = 0; kind < 5; ++kind) {
      const index_t stride = round_up(cols, 16);
      const auto rows = values(kind, 16 * stride, 7);
      std::vector<float> bias(static_cast<std::size_t>(cols)), one(16, 1.0f);
      std::vector<float> panel(static_cast<std::size_t>(simd::panel_size(32, cols)), infinity);
      for (std::size_t c = 0; c < bias.size(); ++c) bias[c] = 0.25f * static_cast<float>(c % 3);
      // The second of two tiles.
      simd::pack_tiles(rows.data(), stride, one.data(), cols, panel.data(), simd::panel_shape{2},
                       1);
      for (index_t k = 1; k <= 32; k += k < 10 ? 1 : 11) {
        REQUIRE(simd::tile_takes(k));
        test::for_each_arch<test::widths>([&](auto tag) {
          memory.begin(k % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
          float* const out = memory.room<float>(16);
          simd::kth_largest_of_tile<decltype(tag)>(memory.copy(panel), simd::panel_shape{2}, 1,
                                                   cols, memory.copy(bias), k, out);
          for (index_t i = 0; i < 16; ++i) {
            std::vector<float> row(rows.begin() + i * stride, rows.begin() + i * stride + cols);
            for (std::size_t c = 0; c < row.size(); ++c) row[c] += bias[c];
            INFO("cols " << cols << " kind " << kind << " k " << k << " row " << i);
            REQUIRE(equal_with_sign(out[i], slow_kth_largest(row, k)));
          }
        });
      }
    }
}

TEST_CASE("a tile is its rows times their factors, turned over, and touches no other tile") {
  test::edges memory(4 * 48 * 144);
  test::random rng(18);
  for (index_t cols = 1; cols <= 130; cols += cols < 20 ? 1 : 11) {
    const index_t padded = round_up(cols, 16), stride = padded + cols % 3, tile = cols % 3;
    std::vector<float> rows = values(7, 15 * stride + padded, static_cast<std::uint64_t>(cols));
    std::vector<float> factor;
    for (int i = 0; i < 16; ++i) factor.push_back(rng.normal());
    rows[0] = std::nanf("");
    const simd::panel_shape shape{3};
    std::vector<float> before(static_cast<std::size_t>(simd::panel_size(48, cols)), 9.0f);
    for (const bool finite : {false, true}) {
      std::vector<float> expected = before;
      for (index_t i = 0; i < 16; ++i)
        for (index_t c = 0; c < padded; ++c) {
          const float x =
              rows[static_cast<std::size_t>(i * stride + c)] * factor[static_cast<std::size_t>(i)];
          const auto at = c / 16 * 3 * 256 + tile * 256 + c % 16 * 16 + i;
          expected[static_cast<std::size_t>(at)] = finite && !std::isfinite(x) ? -infinity : x;
        }
      test::for_each_arch<test::widths>([&](auto tag) {
        using A = decltype(tag);
        test::at_both_ends(memory, [&] {
          float* const panel = memory.copy(before);
          const float *const from = memory.copy(rows), *const by = memory.copy(factor);
          if (finite)
            simd::pack_tiles<A>(from, stride, by, cols, panel, shape, tile, simd::keep_finite{});
          else
            simd::pack_tiles<A>(from, stride, by, cols, panel, shape, tile);
          bool right = true;
          for (std::size_t i = 0; i < expected.size(); ++i)
            right = right && (panel[i] == expected[i] ||
                              (panel[i] != panel[i] && expected[i] != expected[i]));
          CHECK(right);
        });
      });
    }
  }
}

TEST_CASE("rows of any length count in the buckets of their columns, and touch no others") {
  test::edges memory(4 * 144 * 9);
  test::random rng(17);
  for (index_t cols = 1; cols <= 130; ++cols) {
    const index_t n = rng.below(5), buckets = 1 + rng.below(9);
    const float scale = rng.below(2) == 0 ? 0.5f : -2.0f;
    std::vector<float> start;
    std::vector<std::vector<float>> row;
    std::vector<std::int32_t> expected(static_cast<std::size_t>(simd::count_size(cols, buckets)),
                                       3);
    for (index_t i = 0; i < n; ++i) {
      start.push_back(0.25f * static_cast<float>(rng.below(17)));
      row.push_back(values(rng.below(2) == 0 ? 7 : 5, cols, static_cast<std::uint64_t>(cols + i)));
      for (index_t c = 0; c < cols; ++c) {
        float& x = row.back()[static_cast<std::size_t>(c)];
        x = std::round(4.0f * x) / 2.0f;
        const float at = start.back() - scale * x, last = static_cast<float>(buckets - 1);
        const float in = at != at ? last : std::clamp(at, 0.0f, last);
        ++expected[static_cast<std::size_t>(
            simd::count_place(c, static_cast<index_t>(in), buckets))];
      }
    }
    INFO(n << " rows of " << cols << " columns, " << buckets << " buckets");
    test::for_each_arch<test::widths>([&](auto tag) {
      test::at_both_ends(memory, [&] {
        std::vector<const float*> at;
        for (const auto& values : row) at.push_back(memory.copy(values));
        std::int32_t* const counts = memory.copy(std::vector<std::int32_t>(expected.size(), 3));
        simd::count_rows<decltype(tag)>(memory.copy(at), n, cols, memory.copy(start), scale,
                                        buckets, counts);
        CHECK(std::equal(expected.begin(), expected.end(), counts));
      });
    });
  }
}

TEST_CASE("a row counts once in each histogram; what lies outside counts at the nearer end") {
  const std::vector<float> row{0.0f,   -1.0f,         -2.5f,     9.0f,
                               -99.0f, std::nanf(""), -infinity, infinity};
  const int expected[] = {0, 1, 3, 0, 3, 3, 3, 0};
  // As one strip of columns, and spread over three of them: the row's values at every fifth column.
  for (const index_t apart : {1, 5}) {
    const index_t cols = 8 * apart;
    std::vector<float> spread(static_cast<std::size_t>(cols), 0.0f);
    for (std::size_t c = 0; c < 8; ++c) spread[c * static_cast<std::size_t>(apart)] = row[c];
    const float* const rows[] = {spread.data(), spread.data(), spread.data()};
    const float start[] = {0.5f, 0.5f, 1.5f};
    test::for_each_arch<test::widths>([&](auto tag) {
      std::vector<std::int32_t> counts(static_cast<std::size_t>(simd::count_size(cols, 4)), 0);
      simd::count_rows<decltype(tag)>(rows, 3, cols, start, 1.0f, 4, counts.data());
      for (index_t c = 0; c < cols; ++c) {
        const int first = c % apart == 0 ? expected[c / apart] : 0;
        const bool at_an_end = c % apart == 0 && (c / apart == 3 || c / apart == 7);
        const int second = at_an_end ? 0 : std::min(3, first + 1);
        for (int b = 0; b < 4; ++b)
          CHECK(counts[static_cast<std::size_t>(simd::count_place(c, b, 4))] ==
                2 * (b == first) + (b == second));
      }
    });
  }
}

TEST_CASE("-inf stands in place of what is not finite, and the largest float is finite") {
  const float largest = std::numeric_limits<float>::max();
  test::for_each_arch<test::widths>([&]<class A>(A) {
    const auto kept = [](float x) {
      return simd::keep_finite{}.template map<A>(simd::vfloat<A>(x)).get(0);
    };
    for (const float x : {0.0f, -1.5f, 0x1p-149f, largest, -largest}) CHECK(kept(x) == x);
    for (const float x : {infinity, -infinity, std::nanf("")}) CHECK(kept(x) == -infinity);
  });
}
