#include <moeroute/simd/select/top_k_packed.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <functional>
#include <moeroute/base/workspace.hpp>
#include <span>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/arches.hpp"
#include "support/edges.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::shape;

namespace {

constexpr index_t packed_columns[] = {1,  2,  3,  7,  8,   9,   15,  16,  17,  24,   31,  60,
                                      64, 65, 72, 96, 128, 160, 255, 256, 257, 1024, 1100};
constexpr index_t packed_ranks[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 32, 33, 64, 65};

// Rows of bfloat16 and what they widen to.
struct narrow_rows {
  std::vector<bfloat16> narrow;
  std::vector<float> wide;

  explicit narrow_rows(const std::vector<float>& values) {
    for (const float x : values) {
      narrow.push_back(bfloat16(x));
      wide.push_back(simd::detail::widened<simd::default_arch>(narrow.back()));
    }
  }
};

struct packed_block {
  std::vector<float> value;
  std::vector<std::int32_t> column;
};

constexpr index_t cols_of_most = 1100;

// What is written, scratch too, ends where memory does, or begins there.
template <class A>
const packed_block& select(const bfloat16* rows, index_t stride, int n, index_t cols, int k) {
  static packed_block b;
  static test::edges memory(4 * simd::widened_block(cols_of_most));
  static buffer<float> much;
  const index_t size = k * block_rows;
  memory.begin((n + k) % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
  float* const value = memory.room<float>(size);
  std::int32_t* const column = memory.room<std::int32_t>(size);
  std::fill_n(column, size, -7);
  if (cols > cols_of_most) much.resize(simd::widened_block(cols));
  float* const wide =
      cols > cols_of_most ? much.data() : memory.room<float>(simd::widened_block(cols));
  simd::top_k_block<A>(rows, stride, n, cols, k, value, column, wide,
                       memory.room<std::uint64_t>(simd::top_k_scratch(cols, k)));
  b.value.assign(value, value + size);
  b.column.assign(column, column + size);
  return b;
}

// Ids by the oracle's order, values the rows' own to the bit, (-inf, no_expert) for what is
// missing: what the kernel of floats is held to.
std::string wrong(const packed_block& b, const float* rows, index_t stride, int n, index_t cols,
                  int k) {
  for (int i = 0; i < n; ++i) {
    const float* const row = rows + i * stride;
    const std::vector<expert_id> expected = oracle::top_k(row, cols, k);
    for (std::size_t r = 0; r < static_cast<std::size_t>(k); ++r) {
      const std::size_t at = r * block_rows + static_cast<std::size_t>(i);
      const expert_id id = expected[r];
      const float value = id == no_expert ? simd::minus_infinity : row[id];
      if (b.column[at] != id)
        return "row " + std::to_string(i) + " rank " + std::to_string(r) + ": column " +
               std::to_string(b.column[at]) + ", expected " + std::to_string(id);
      if (std::bit_cast<std::uint32_t>(b.value[at]) != std::bit_cast<std::uint32_t>(value))
        return "row " + std::to_string(i) + " rank " + std::to_string(r) + ": value " +
               std::to_string(b.value[at]) + ", expected " + std::to_string(value);
    }
  }
  return "";
}

template <class A>
std::string wrong_selection(const narrow_rows& rows, index_t stride, int n, index_t cols, int k) {
  return wrong(select<A>(rows.narrow.data(), stride, n, cols, k), rows.wide.data(), stride, n, cols,
               k);
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("bfloat16 rows give what the rows they widen to give, to the bit", "",
                        test::widths) {
  for (const shape s : test::all_shapes)
    for (const index_t cols : packed_columns) {
      if (cols > test::sized(1100, 320)) continue;
      const int n = 1 + static_cast<int>(cols + 5 * static_cast<index_t>(s)) % block_rows;
      const narrow_rows rows(test::make_logits(s, 11, n, cols));
      std::vector<index_t> ks;
      for (const index_t k : packed_ranks)
        if (k < cols) ks.push_back(k);
      if (cols <= 257) ks.push_back(cols);
      for (const index_t k : ks) {
        INFO(to_string(test::reproducer{s, 11, n, cols, k}));
        CHECK(wrong_selection<TestType>(rows, cols, n, cols, static_cast<int>(k)) == "");
      }
    }
}

TEMPLATE_LIST_TEST_CASE("any 16 bits are a logit: NaN of both signs, denormals, the largest", "",
                        test::widths) {
  test::random rng(3);
  for (const index_t cols : {5, 8, 13, 40, 64, 100, 256, 300})
    for (int round = 0; round < 20; ++round) {
      narrow_rows rows({});
      for (index_t i = 0; i < block_rows * cols; ++i) {
        // Half of them from the edges of the range.
        constexpr std::uint16_t edges[] = {0x0000, 0x8000, 0x0001, 0x8001, 0x7f7f, 0xff7f,
                                           0x7f80, 0xff80, 0x7f81, 0xff81, 0x7fff, 0xffff};
        const auto bits = static_cast<std::uint16_t>(
            rng.below(2) == 0 ? edges[rng.below(std::size(edges))] : rng.below(65536));
        rows.narrow.push_back(std::bit_cast<bfloat16>(bits));
        rows.wide.push_back(simd::detail::widened<simd::default_arch>(rows.narrow.back()));
      }
      const int n = 1 + round % block_rows;
      for (const int k : {1, 2, 4, 7, 8, 10, 16, 33}) {
        if (k > cols) continue;
        INFO(cols << " columns, round " << round << ", k " << k);
        CHECK(wrong_selection<TestType>(rows, cols, n, cols, k) == "");
      }
    }
}

TEMPLATE_LIST_TEST_CASE("every number of bfloat16 rows is selected, row by row", "", test::widths) {
  for (const index_t cols : {20, 160})
    for (int n = 1; n <= block_rows; ++n)
      for (const int k : {1, 2, 6, 8, 11, 20}) {
        const narrow_rows rows(test::make_logits(shape::quantised, 6, n, cols));
        INFO("n=" << n << " k=" << k);
        CHECK(wrong_selection<TestType>(rows, cols, n, cols, k) == "");
      }
}

TEMPLATE_LIST_TEST_CASE("columns between cols and stride of bfloat16 rows are not looked at", "",
                        test::widths) {
  const index_t stride = 150;
  for (const index_t cols : {13, 75, 130}) {
    std::vector<float> values = test::make_logits(shape::normal, 7, 16, stride);
    for (index_t i = 0; i < 16; ++i)
      for (index_t c = cols; c < stride; ++c)
        values[static_cast<std::size_t>(i * stride + c)] = 100.0f;
    const narrow_rows rows(values);
    for (const int k : {1, 4, 8, 13})
      CHECK(wrong_selection<TestType>(rows, stride, 16, cols, k) == "");
  }
}

TEMPLATE_LIST_TEST_CASE(
    "any number of bfloat16 rows of any length, each of a kind of its own, give their k best", "",
    test::widths) {
  // The last row ends where memory does, and what lies between two rows is above everything.
  test::guarded<bfloat16> memory(block_rows * 140);
  test::random draw(62);
  for (index_t cols = 1; cols <= 130; ++cols) {
    const index_t stride = cols + draw.below(4), size = (block_rows - 1) * stride + cols;
    bfloat16* const rows = memory.window(size, test::guarded_end::back);
    const narrow_rows both(test::rows_of_all_shapes(draw, static_cast<std::uint64_t>(16 * cols),
                                                    block_rows, cols, stride));
    std::copy(both.narrow.begin(), both.narrow.end(), rows);
    for (int trial = 0; trial < test::sized(12, 5); ++trial) {
      const auto most = std::min<std::int64_t>(cols, trial % 3 == 0 ? 66 : 17);
      const int n = 1 + static_cast<int>(draw.below(block_rows)),
                k = 1 + static_cast<int>(draw.below(most));
      const index_t first = (block_rows - n) * stride;
      INFO(n << " rows of " << cols << " columns, k " << k);
      CHECK(wrong(select<TestType>(rows + first, stride, n, cols, k), both.wide.data() + first,
                  stride, n, cols, k) == "");
    }
  }
}

TEMPLATE_LIST_TEST_CASE("every column of a bfloat16 row can come first, in every kernel", "",
                        test::widths) {
  for (const index_t cols : {60, 140, 1090}) {
    std::vector<bfloat16> rows(static_cast<std::size_t>(cols * 6), bfloat16(-1.0f));
    // In steps that meet every place of a register and of a mask.
    index_t missed = 0;
    for (index_t c = 0; c < cols; c += cols > 1000 ? 13 : test::sized(1, 3)) {
      rows[static_cast<std::size_t>(5 * cols + c)] = bfloat16(1.0f);
      for (const int k : {1, 2, 4, 8, 16, 20})
        missed += select<TestType>(rows.data(), cols, 6, cols, k).column[5] != c;
      rows[static_cast<std::size_t>(5 * cols + c)] = bfloat16(-1.0f);
    }
    CHECK(missed == 0);
  }
}

TEMPLATE_LIST_TEST_CASE("the last columns that a key can number, and more than it can", "",
                        test::widths) {
  for (const index_t cols : {simd::max_packed_columns, simd::max_packed_columns + 1, max_experts}) {
    if (cols > test::sized(max_experts, simd::max_packed_columns + 1)) break;
    std::vector<bfloat16> rows(static_cast<std::size_t>(cols * 6), bfloat16(0.0f));
    rows[static_cast<std::size_t>(6 * cols - 1)] = bfloat16(2.0f);
    rows[static_cast<std::size_t>(5 * cols + 77)] = bfloat16(1.0f);
    for (const int k : {1, 3, 16}) {
      if (cols == test::sized(max_experts, cols) && k != 3) continue;
      const auto& got = select<TestType>(rows.data(), cols, 6, cols, k);
      CHECK(got.column[5] == cols - 1);
      if (k > 1) CHECK(got.column[block_rows + 5] == 77);
      if (k > 2) CHECK(got.column[2 * block_rows + 5] == 0);
    }
  }
}

#if defined(__AVX2__)
TEST_CASE("a bound of packed rows is the k-th largest of the largest orders of their groups") {
  const auto check = []<class A>(A) {
    if constexpr (simd::has_packed_keys<A>) {
      constexpr int w = simd::width<A>, groups = simd::detail::packed_groups;
      test::edges memory(2 * w * 320);
      test::random draw(63);
      for (const index_t cols : {1, 31, 32, 33, 64, 100, 257, 300}) {
        const index_t stride = simd::detail::order_stride(cols);
        const narrow_rows rows(test::rows_of_all_shapes(draw, 64, w, cols, cols));
        const bfloat16* row[w];
        memory.begin(test::guarded_end::back);
        std::int16_t* const order = memory.room<std::int16_t>(w * stride);
        std::vector<std::int16_t> expected;
        std::vector<std::vector<std::int16_t>> largest;
        for (index_t i = 0; i < w; ++i) {
          const std::span<const bfloat16> values(rows.narrow.data() + i * cols,
                                                 static_cast<std::size_t>(cols));
          row[i] = memory.copy(values);
          largest.emplace_back(groups, simd::order_of_minus_infinity);
          for (index_t c = 0; c < stride; ++c) {
            expected.push_back(c < cols ? simd::order_of(row[i][c].bits)
                                        : simd::order_of_minus_infinity);
            auto& most = largest.back()[static_cast<std::size_t>(c % groups)];
            most = std::max(most, expected.back());
          }
        }
        alignas(alignment) std::int16_t most[w][groups];
        simd::detail::order_rows<A>(row, cols, order, most);
        CHECK(std::equal(expected.begin(), expected.end(), order));
        for (std::size_t i = 0; i < w; ++i) {
          CHECK(std::equal(largest[i].begin(), largest[i].end(), most[i]));
          std::ranges::sort(largest[i], std::greater<>());
        }
        for (int k = 1; k <= 8; ++k) {
          alignas(alignment) std::int16_t bound[2 * w];
          simd::detail::packed_bound<A, 8>(most, k).store_aligned(bound);
          for (std::size_t i = 0; i < w; ++i)
            CHECK((bound[2 * i] == largest[i][static_cast<std::size_t>(k - 1)] &&
                   bound[2 * i + 1] == bound[2 * i]));
        }
      }
    }
  };
  check(simd::default_arch{});
}
#endif

TEST_CASE("orders ascend where bfloat16 ascend, -0 with +0, NaN below -inf") {
  const auto order = [](float x) { return simd::order_of(bfloat16(x).bits); };
  const float ascending[] = {-test::infinity, -3e38f, -1.0f, -0x1p-130f,    0.0f,
                             0x1p-130f,       1.0f,   3e38f, test::infinity};
  for (std::size_t i = 0; i + 1 < std::size(ascending); ++i)
    CHECK(order(ascending[i]) < order(ascending[i + 1]));
  CHECK(order(-0.0f) == order(0.0f));
  CHECK(order(-test::infinity) == simd::order_of_minus_infinity);
  for (int bits = 0; bits < 65536; ++bits)
    if ((bits & 0x7fff) > 0x7f80)
      CHECK(simd::order_of(static_cast<std::uint16_t>(bits)) < simd::order_of_minus_infinity);
}
