#include <moeroute/simd/select/top_k.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "oracle/routing.hpp"
#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::shape;

namespace {

constexpr index_t sorted_columns[] = {1,  2,  3,   7,   8,   16,  31,  60,
                                      64, 72, 128, 160, 256, 257, 768, 2048};
constexpr index_t sorted_ranks[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 32, 33, 64, 65, 100};

struct block {
  std::vector<float> value;
  std::vector<std::int32_t> column;
};

// What is written, scratch too, ends where memory does, or begins there.
template <class A>
const block& select(const float* rows, index_t stride, int n, index_t cols, int k) {
  static block b;
  static test::edges memory(8 * max_experts);
  memory.begin((n + k) % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
  const index_t size = k * block_rows;
  float* const value = memory.room<float>(size);
  std::int32_t* const column = memory.room<std::int32_t>(size);
  std::fill_n(column, size, -7);
  simd::top_k_block<A>(rows, stride, n, cols, k, value, column,
                       memory.room<std::uint64_t>(simd::top_k_scratch(cols, k)));
  b.value.assign(value, value + size);
  b.column.assign(column, column + size);
  return b;
}

// Ids by the oracle's order, values the rows' own to the bit, (-inf, no_expert) for what is
// missing.
std::string wrong(const block& b, const float* rows, index_t stride,
                  std::span<const std::vector<expert_id>> order, int k) {
  for (std::size_t i = 0; i < order.size(); ++i)
    for (int r = 0; r < k; ++r) {
      const auto rank = static_cast<std::size_t>(r);
      const bool there = rank < order[i].size();
      const expert_id id = there ? order[i][rank] : no_expert;
      const float value =
          there ? rows[static_cast<index_t>(i) * stride + id] : simd::minus_infinity;
      const auto at = rank * block_rows + i;
      if (b.column[at] != id)
        return "row " + std::to_string(i) + " rank " + std::to_string(r) + ": column " +
               std::to_string(b.column[at]) + ", expected " + std::to_string(id);
      if (std::bit_cast<std::uint32_t>(b.value[at]) != std::bit_cast<std::uint32_t>(value))
        return "row " + std::to_string(i) + " rank " + std::to_string(r) + ": value " +
               test::shown(b.value[at]) + ", expected " + test::shown(value);
    }
  return "";
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("top-k is value descending, then column ascending; NaN and -inf never", "",
                        test::widths) {
  for (const shape s : test::all_shapes)
    for (const index_t cols : sorted_columns) {
      const int n = 1 + static_cast<int>(cols + static_cast<index_t>(s)) % block_rows;
      const std::vector<float> rows = test::make_logits(s, 5, n, cols);
      std::vector<std::vector<expert_id>> order;
      for (int i = 0; i < n; ++i) order.push_back(oracle::order(rows.data() + i * cols, cols));
      std::vector<index_t> ks;
      for (const index_t k : sorted_ranks)
        if (k < cols) ks.push_back(k);
      ks.push_back(cols);
      for (const index_t k : ks) {
        const auto& got = select<TestType>(rows.data(), cols, n, cols, static_cast<int>(k));
        INFO(to_string(test::reproducer{s, 5, n, cols, k}));
        CHECK(wrong(got, rows.data(), cols, order, static_cast<int>(k)) == "");
      }
    }
}

TEMPLATE_LIST_TEST_CASE("the bound of a row is the k-th largest of the maxima of its groups", "",
                        test::widths) {
  constexpr int w = simd::width<TestType>;
  const auto kth_of_groups = [](const float* row, index_t cols, int groups, int k) {
    std::vector<float> most(static_cast<std::size_t>(groups), simd::minus_infinity);
    for (index_t c = 0; c < cols; ++c) {
      float& of_group = most[static_cast<std::size_t>(c % groups)];
      of_group = row[c] > of_group ? row[c] : of_group;
    }
    std::sort(most.begin(), most.end(), std::greater<>());
    return most[static_cast<std::size_t>(k - 1)];
  };
  for (const index_t cols : {1, 15, 32, 33, 64, 257}) {
    const std::vector<float> rows = test::make_logits(shape::normal, 7, w, cols);
    const float* row[w];
    for (int i = 0; i < w; ++i) row[i] = rows.data() + i * cols;
    for (int k = 1; k <= 8; ++k) {
      alignas(alignment) float bound[w];
      simd::column_bound<TestType, 32, 8>(row, cols, k).store_aligned(bound);
      for (int i = 0; i < w; ++i) {
        INFO("cols=" << cols << " k=" << k << " row=" << i);
        REQUIRE(bound[i] == kth_of_groups(row[i], cols, 32, k));
      }
    }
    // Of a row alone there are fewer groups or more, and no bound is -inf.
    const std::vector<float> one = test::make_logits(shape::half_nan, 7, 1, cols);
    const auto alone = [&]<int n>(std::integral_constant<int, n>) {
      for (int k = 1; k <= 16 * n; k += k < 8 ? 1 : 4) {
        INFO("cols=" << cols << " k=" << k << " groups=" << 16 * n);
        CHECK(simd::detail::bound_of_row<TestType, n>(one.data(), cols, k).get(0) ==
              std::max(kth_of_groups(one.data(), cols, 16 * n, k),
                       std::numeric_limits<float>::lowest()));
      }
    };
    alone(std::integral_constant<int, 1>{});
    alone(std::integral_constant<int, 2>{});
    alone(std::integral_constant<int, 4>{});
  }
}

TEMPLATE_LIST_TEST_CASE("every number of rows in a block is selected, row by row", "",
                        test::widths) {
  const index_t cols = 60;
  for (int n = 1; n <= block_rows; ++n)
    for (const int k : {1, 2, 6, 60, 9}) {
      const std::vector<float> rows = test::make_logits(shape::quantised, 6, n, cols);
      std::vector<std::vector<expert_id>> order;
      for (int i = 0; i < n; ++i) order.push_back(oracle::order(rows.data() + i * cols, cols));
      INFO("n=" << n << " k=" << k);
      CHECK(wrong(select<TestType>(rows.data(), cols, n, cols, k), rows.data(), cols, order, k) ==
            "");
    }
}

TEMPLATE_LIST_TEST_CASE("a row alone is selected as it is in a block", "", test::widths) {
  for (const shape s : test::all_shapes)
    for (const index_t cols :
         {index_t{1}, index_t{15}, index_t{64}, index_t{65}, index_t{255}, index_t{256},
          index_t{257}, index_t{320}, index_t{1040}, index_t{2200}}) {
      if (cols > test::sized(2200, 320)) continue;
      const std::vector<float> rows = test::make_logits(s, 9, block_rows, cols);
      for (const int k : {1, 2, 3, 8, 9, 10, 12, 17, 40, 64}) {
        if (k > cols) continue;
        const block all = select<TestType>(rows.data(), cols, block_rows, cols, k);
        for (int i = 0; i < block_rows; ++i) {
          const std::vector<float> row(rows.begin() + i * cols, rows.begin() + (i + 1) * cols);
          const block& one = select<TestType>(row.data(), cols, 1, cols, k);
          bool same = true;
          for (std::size_t r = 0; r < static_cast<std::size_t>(k); ++r) {
            const std::size_t here = r * block_rows, there = here + static_cast<std::size_t>(i);
            same = same && one.column[here] == all.column[there] &&
                   std::bit_cast<std::uint32_t>(one.value[here]) ==
                       std::bit_cast<std::uint32_t>(all.value[there]);
          }
          if (k <= block_rows) {  // and so it is in registers
            constexpr int w = simd::width<TestType>;
            simd::vfloat<TestType> value[simd::registers_per_block<TestType>];
            simd::vint<TestType> column[simd::registers_per_block<TestType>];
            simd::top_k_row<TestType>(row.data(), cols, k, value, column);
            for (int r = 0; r < k; ++r) {
              const auto here = static_cast<std::size_t>(r * block_rows);
              const auto lane = static_cast<std::size_t>(r % w);
              same = same && column[r / w].get(lane) == one.column[here] &&
                     std::bit_cast<std::uint32_t>(value[r / w].get(lane)) ==
                         std::bit_cast<std::uint32_t>(one.value[here]);
            }
          }
          INFO(to_string(test::reproducer{s, 9, block_rows, cols, k}) << " row " << i);
          CHECK(same);
        }
      }
    }
}

// The measured ways are even there: a change of a figure is a decision, with a measurement.
TEMPLATE_LIST_TEST_CASE("so many rows of a shape are sooner alone, by the width of registers", "",
                        test::arches) {
  struct limit {
    index_t cols, k, rows_by_width[3];  // registers of 4, 8 and 16 floats
  };
  constexpr limit limits[] = {{1, 1, {2, 4, 4}},     {8, 2, {2, 4, 4}},    {32, 1, {2, 4, 4}},
                              {32, 32, {2, 4, 4}},   {33, 1, {2, 10, 10}}, {33, 2, {2, 5, 8}},
                              {64, 1, {2, 10, 10}},  {64, 10, {2, 5, 8}},  {64, 11, {2, 3, 5}},
                              {512, 10, {2, 5, 8}},  {512, 11, {2, 3, 5}}, {256, 64, {2, 3, 5}},
                              {2048, 1, {2, 10, 10}}};
  constexpr int w = simd::width<TestType>, at = w == 4 ? 0 : w == 8 ? 1 : 2;
  STATIC_REQUIRE(w == 4 << at);
  for (const limit& l : limits) {
    CAPTURE(l.cols, l.k, w);
    CHECK(simd::rows_sooner_alone<TestType>(l.cols, l.k) == l.rows_by_width[at]);
  }
}

TEMPLATE_LIST_TEST_CASE("a row that many columns tie in does not touch the rows before it", "",
                        test::widths) {
  constexpr index_t cols = 64;
  for (const int n : {1, 2, 3, 4, 5})
    for (const int k : {2, 4, 8}) {
      std::vector<float> rows = test::make_logits(test::shape::normal, 4, n, cols);
      std::fill_n(rows.end() - cols, cols, 1.0f);
      std::vector<std::vector<expert_id>> order;
      for (int i = 0; i < n; ++i) order.push_back(oracle::order(rows.data() + i * cols, cols));
      INFO(n << " rows, k " << k);
      CHECK(wrong(select<TestType>(rows.data(), cols, n, cols, k), rows.data(), cols, order, k) ==
            "");
    }
}

TEMPLATE_LIST_TEST_CASE("however the largest values of a row alone lie, the best are found", "",
                        test::widths) {
  constexpr index_t cols = 2500;
  for (const index_t step : {1, 16, 32, 64, 640})
    for (const bool ascending : {false, true}) {
      std::vector<float> row = test::make_logits(shape::normal, 12, 1, cols);
      // Every step-th column is above all others, a few of them equal.
      for (index_t c = 3; c < cols; c += step) {
        const auto size = static_cast<float>((ascending ? c : cols - c) / (4 * step));
        row[static_cast<std::size_t>(c)] = 100.0f + size;
      }
      const std::vector<std::vector<expert_id>> order{oracle::order(row.data(), cols)};
      for (const int k : {1, 2, 4, 8, 10, 11, 16, 20, 32, 33, 64}) {
        INFO("every " << step << "th column, ascending " << ascending << ", k " << k);
        CHECK(wrong(select<TestType>(row.data(), cols, 1, cols, k), row.data(), cols, order, k) ==
              "");
      }
    }
}

TEMPLATE_LIST_TEST_CASE("ranks are taken in two runs, each in its order, and nobody after them", "",
                        test::widths) {
  using A = TestType;
  test::random draw(41);
  for (const int ranks : {1, 5, 16, 17, 40, 64})
    for (int trial = 0; trial < 60; ++trial) {
      moeroute::simd::row_ranks from{}, to;
      for (int r = 0; r < moeroute::simd::max_row_k; ++r) {
        from.value[r] = static_cast<float>(100 - r);
        from.column[r] = 1000 + r;
      }
      std::uint64_t first = 0, then = 0;
      for (int r = 0; r < ranks; ++r) {
        const auto kind = draw.below(3);
        (kind == 0 ? first : then) |= std::uint64_t{kind < 2} << r;
      }
      const int k = 1 + static_cast<int>(draw.below(16)) * (ranks > 16 ? 3 : 1);
      moeroute::simd::take_ranks<A>(from, first, then, k, to);
      int out = 0;
      for (const std::uint64_t run : {first, then})
        for (int r = 0; r < ranks; ++r)
          if ((run >> r & 1) != 0 && out < k) {
            CHECK(to.column[out] == 1000 + r);
            CHECK(to.value[out++] == static_cast<float>(100 - r));
          }
      for (; out < moeroute::round_up(k, moeroute::block_rows); ++out) {
        CHECK(to.column[out] == moeroute::no_expert);
        CHECK(to.value[out] == moeroute::simd::minus_infinity);
      }
    }
}

TEMPLATE_LIST_TEST_CASE(
    "the rows of a register are those that are named, in every kernel of such rows", "",
    test::widths) {
  using A = TestType;
  constexpr int w = simd::width<A>;
  // The list of rows ends where memory does.
  test::edges memory(4 * 300);
  for (const index_t cols : {5, 40, 100, 300})
    for (const int k : {1, 2, 4, 7, 12, 20, 40}) {
      if (k > cols) continue;
      memory.begin(test::guarded_end::back);
      const std::vector<float> rows = test::make_logits(shape::quantised, 8, w, cols);
      std::vector<const float*> list;
      std::vector<std::vector<expert_id>> order;
      for (int i = 0; i < w; ++i) {
        order.push_back(oracle::order(rows.data() + i * cols, cols));
        list.push_back(memory.copy(std::span(rows).subspan(static_cast<std::size_t>(i * cols),
                                                           static_cast<std::size_t>(cols))));
      }
      block got;
      got.value.resize(static_cast<std::size_t>(k * block_rows));
      got.column.resize(got.value.size());
      simd::detail::top_k_lane_group<A, 1, simd::max_lane_k>(memory.copy(list), cols, k,
                                                             got.value.data(), got.column.data());
      INFO(cols << " columns, k " << k);
      CHECK(wrong(got, rows.data(), cols, order, k) == "");
    }
}

TEMPLATE_LIST_TEST_CASE(
    "chosen columns give other values of their row, and get the numbers back that they had", "",
    test::widths) {
  using A = TestType;
  test::guarded<float> memory(200);
  test::random draw(43);
  for (const index_t cols : {1, 9, 31, 32, 33, 64, 65, 128, 200})
    for (int trial = 0; trial < 12; ++trial) {
      const int k = 1 + static_cast<int>(draw.below(std::min<index_t>(cols, simd::max_row_k)));
      float* const row = memory.window(cols, test::guarded_end::back);
      for (index_t c = 0; c < cols; ++c) row[c] = draw.normal();
      simd::row_ranks ranks{};
      for (int r = 0; r < simd::max_row_k; ++r)
        ranks.column[r] =
            r >= k || draw.below(5) == 0 ? no_expert : static_cast<std::int32_t>(draw.below(cols));
      const simd::row_ranks before = ranks;
      simd::take_values<A>(row, cols, k, ranks);
      bool right = true;
      for (int r = 0; r < round_up(k, block_rows); ++r) {
        const std::int32_t c = before.column[r];
        right &= ranks.column[r] == c && ranks.value[r] == (c < 0 ? simd::minus_infinity : row[c]);
      }
      CHECK(right);
      // Groups of `size` columns that stood at `start` before they were moved together.
      const int groups = 1 + static_cast<int>(draw.below(5));
      const auto size = static_cast<std::int32_t>(ceil_div(cols, groups));
      std::int32_t at = static_cast<std::int32_t>(draw.below(3));
      std::vector<std::int32_t> start;
      for (int g = 0; g < groups; ++g, at += size + static_cast<std::int32_t>(draw.below(20)))
        start.push_back(at);
      for (int r = 0; r < k; ++r) ranks.column[r] = std::max(ranks.column[r], 0);
      const simd::row_ranks moved = ranks;
      simd::move_columns<A>(ranks, k, start.data(), groups, size);
      for (int r = 0; r < k; ++r) {
        const std::int32_t c = moved.column[r];
        right &= ranks.column[r] == start[static_cast<std::size_t>(c / size)] + c % size;
      }
      CHECK(right);
    }
}

TEMPLATE_LIST_TEST_CASE("columns between cols and stride are not looked at", "", test::widths) {
  const index_t cols = 13, stride = 20;
  std::vector<float> rows = test::make_logits(shape::normal, 7, 16, stride);
  for (index_t i = 0; i < 16; ++i)
    for (index_t c = cols; c < stride; ++c) rows[static_cast<std::size_t>(i * stride + c)] = 100.0f;
  std::vector<std::vector<expert_id>> order;
  for (int i = 0; i < 16; ++i) order.push_back(oracle::order(rows.data() + i * stride, cols));
  for (const int k : {1, 4, 13})
    CHECK(wrong(select<TestType>(rows.data(), stride, 16, cols, k), rows.data(), stride, order,
                k) == "");
}

TEMPLATE_LIST_TEST_CASE("every column can come first, in every kernel", "", test::widths) {
  const index_t cols = 75;
  std::vector<float> row(static_cast<std::size_t>(cols), -1.0f);
  for (index_t c = 0; c < cols; ++c) {
    row[static_cast<std::size_t>(c)] = 1.0f;
    for (const int k : {1, 2, 4, 8, 16, 32, 64, 70})
      CHECK(select<TestType>(row.data(), cols, 1, cols, k).column[0] == c);
    row[static_cast<std::size_t>(c)] = -1.0f;
  }
}

TEST_CASE("the whole range of E: 2^20 columns") {
  const index_t cols = max_experts;
  std::vector<float> row(static_cast<std::size_t>(cols), 0.0f);
  row[static_cast<std::size_t>(cols - 1)] = 2.0f;
  row[77] = 1.0f;
  for (const int k : {1, 3, 65}) {
    const auto& got = select<simd::default_arch>(row.data(), cols, 1, cols, k);
    CHECK(got.column[0] == cols - 1);
    if (k > 1) CHECK(got.column[block_rows] == 77);
    if (k > 2) CHECK(got.column[2 * block_rows] == 0);
  }
}

TEST_CASE("keys ascend where floats descend, -0 with +0, NaN and -inf last") {
  const float descending[] = {test::infinity, 3e38f,      1.0f,  0x1p-149f,
                              0.0f,           -0x1p-149f, -1.0f, -3e38f};
  for (std::size_t i = 0; i + 1 < std::size(descending); ++i)
    CHECK(simd::detail::descending_key(descending[i]) <
          simd::detail::descending_key(descending[i + 1]));
  CHECK(simd::detail::descending_key(-0.0f) == simd::detail::descending_key(0.0f));
  for (const float never : {-test::infinity, test::not_a_number, -test::not_a_number})
    CHECK(simd::detail::descending_key(never) == 0xffffffffu);
}

TEMPLATE_LIST_TEST_CASE("a row alone is read from its first column to its last and nowhere else",
                        "", test::widths) {
  test::guarded<float> memory(1040);
  for (const shape s : {shape::normal, shape::all_nan, shape::all_minus_inf, shape::quantised})
    for (const index_t cols :
         {1, 7, 8, 9, 15, 16, 17, 33, 64, 65, 128, 200, 256, 320, 512, 513, 768, 1024, 1040})
      for (const auto end : {test::guarded_end::front, test::guarded_end::back}) {
        const std::vector<float> row = test::make_logits(s, 14, 1, cols);
        const std::vector<std::vector<expert_id>> order{oracle::order(row.data(), cols)};
        float* const at = memory.window(cols, end);
        std::copy(row.begin(), row.end(), at);
        for (const int k : {1, 2, 3, 8, 9, 10, 16}) {
          if (k > cols) continue;
          INFO(to_string(test::reproducer{s, 14, 1, cols, k}));
          CHECK(wrong(select<TestType>(at, cols, 1, cols, k), row.data(), cols, order, k) == "");
        }
      }
}

TEMPLATE_LIST_TEST_CASE(
    "any number of rows of any length, each of a kind of its own, give their k best", "",
    test::widths) {
  // The last row ends where memory does, and what lies between two rows is above everything.
  test::guarded<float> memory(block_rows * 140);
  test::random draw(61);
  for (index_t cols = 1; cols <= 130; ++cols) {
    const index_t stride = cols + draw.below(4), size = (block_rows - 1) * stride + cols;
    float* const rows = memory.window(size, test::guarded_end::back);
    std::ranges::copy(test::rows_of_all_shapes(draw, static_cast<std::uint64_t>(16 * cols),
                                               block_rows, cols, stride),
                      rows);
    std::vector<std::vector<expert_id>> order;
    for (index_t i = 0; i < block_rows; ++i)
      order.push_back(oracle::order(rows + i * stride, cols));
    for (index_t k = 1; k <= std::min<index_t>(cols, test::sized(66, 20)); ++k) {
      const index_t n = 1 + draw.below(block_rows), first = block_rows - n;
      const float* const from = rows + first * stride;
      const block& got =
          select<TestType>(from, stride, static_cast<int>(n), cols, static_cast<int>(k));
      const auto expected =
          std::span<const std::vector<expert_id>>(order).last(static_cast<std::size_t>(n));
      INFO(n << " rows of " << cols << " columns, k " << k);
      CHECK(wrong(got, from, stride, expected, static_cast<int>(k)) == "");
    }
  }
}
