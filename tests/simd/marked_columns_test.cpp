#include <moeroute/simd/marked_columns.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "support/arches.hpp"
#include "support/compare.hpp"
#include "support/edges.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"

using namespace moeroute;

namespace {

using ints = std::vector<std::int32_t>;

struct marked_row {
  std::vector<float> value;
  std::vector<std::uint64_t> bits;
  std::vector<bool> marked;
  float least = test::infinity, most = -test::infinity;  // of those above -inf

  marked_row(test::shape s, index_t cols, index_t one_in, test::random& draw)
      : value(test::make_logits(s, static_cast<std::uint64_t>(cols), 1, cols)),
        bits(static_cast<std::size_t>(ceil_div(cols, 64))) {
    for (std::size_t c = 0; c < value.size(); ++c) {
      marked.push_back(draw.below(one_in) == 0);
      bits[c / 64] |= std::uint64_t{marked.back()} << (c % 64);
      if (!(value[c] > -test::infinity)) continue;
      least = std::min(least, value[c]);
      most = std::max(most, value[c]);
    }
  }
};

// Everything that is done to a row of its marked columns, by plain loops; "" where all agree. `row`
// and `bits` end where memory does.
template <class A>
std::string disagreement(const marked_row& m, const float* row, const std::uint64_t* bits) {
  const auto cols = static_cast<index_t>(m.value.size());
  const std::size_t n = m.value.size();
  const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
    for (std::size_t i = 0; i < b.size(); ++i)
      if (a[i] != b[i] && !(a[i] != a[i] && b[i] != b[i])) return false;
    return a.size() == b.size();
  };

  const simd::row_bounds bounds = simd::bounds_of<A>(row, cols);
  if (bounds.least != m.least || bounds.most != m.most) return "bounds_of";
  if (bounds.range() != (m.most > m.least && m.most < test::infinity ? m.most - m.least : 0.0f))
    return "range";
  if (simd::least_of<A>(row, cols) != m.least) return "least_of";

  std::vector<float> more(n), kept(n), first(n);
  ints list;
  simd::marked_best best{-test::infinity, cols};
  int largest = 0;
  for (std::size_t c = 0; c < n; ++c) {
    const float x = m.value[c];
    more[c] = m.marked[c] ? x + 0.5f : x;
    kept[c] = m.marked[c] ? x : -test::infinity;
    first[c] = x == m.most ? test::infinity : more[c];
    largest += x == m.most;
    if (m.marked[c]) list.push_back(static_cast<std::int32_t>(c));
    if (m.marked[c] && x > best.value) best = {x, static_cast<index_t>(c)};
  }
  // What is written ends where memory does, or begins there.
  static test::edges memory(4 * 1100);
  memory.begin(cols % 2 == 0 ? test::guarded_end::front : test::guarded_end::back);
  float* const out = memory.room<float>(cols);
  const auto is = [&](const std::vector<float>& expected) {
    return same(std::vector<float>(out, out + cols), expected);
  };
  simd::add_to_marked<A>(row, cols, bits, 0.5f, out);
  if (!is(more)) return "add_to_marked";
  if (m.most > -test::infinity) {
    const int equal = simd::add_to_marked_after<A>(row, cols, bits, 0.5f, m.most, out);
    if (equal != largest || !is(first)) return "add_to_marked_after";
  }
  simd::keep_marked<A>(row, cols, bits, out);
  if (!is(kept)) return "keep_marked";
  const simd::marked_best got = simd::best_of_marked<A>(row, cols, bits);
  if (got.value != best.value || got.column != best.column) return "best_of_marked";

  std::int32_t* const listed = memory.room<std::int32_t>(std::ssize(list));
  if (simd::list_marked(bits, cols, listed) != std::ssize(list)) return "list_marked";
  if (!std::equal(list.begin(), list.end(), listed)) return "list_marked";

  // To the size of the list, and a few more.
  const index_t size = std::ssize(list) + cols % 5;
  std::vector<float> packed(static_cast<std::size_t>(size), -test::infinity);
  for (std::size_t i = 0; i < list.size(); ++i)
    packed[i] = m.value[static_cast<std::size_t>(list[i])];
  float* const pack = memory.room<float>(size + 16);
  if (simd::pack_marked<A>(row, cols, bits, size, pack) !=
      (std::find(m.value.begin(), m.value.end(), test::infinity) != m.value.end()))
    return "pack_marked's infinity";
  if (!same(std::vector<float>(pack, pack + size), packed)) return "pack_marked";

  for (index_t c = 0; c < cols; c += simd::width<A>) {
    alignas(alignment) std::int32_t column[simd::width<A>];
    std::uint64_t expected = 0, there = 0;
    for (int i = 0; i < simd::width<A>; ++i) {
      // Neighbours in one register lie in several words, and some outside.
      const index_t at = (c + i) * 37 % (cols + 2) - 1;
      column[i] = static_cast<std::int32_t>(at);
      if (at < 0 || at >= cols) continue;
      there |= std::uint64_t{1} << i;
      expected |= std::uint64_t{m.marked[static_cast<std::size_t>(at)]} << i;
    }
    const auto mask = simd::marked_at<A>(bits, cols, simd::vint<A>::load_aligned(column)).mask();
    if ((mask & there) != expected) return "marked_at";
  }
  return "";
}

}  // namespace

TEST_CASE("what is done to the marked columns of a row of any length is what plain loops do") {
  test::guarded<float> row_memory(130);
  test::guarded<std::uint64_t> bit_memory(3);
  test::random draw(51);
  for (index_t cols = 1; cols <= 130; ++cols)
    for (const index_t one_in : {1, 2, 40}) {
      const auto s = test::all_shapes[draw.below(std::ssize(test::all_shapes))];
      const marked_row m(s, cols, one_in, draw);
      float* const row = row_memory.window(cols, test::guarded_end::back);
      std::copy(m.value.begin(), m.value.end(), row);
      std::uint64_t* const bits = bit_memory.window(ceil_div(cols, 64), test::guarded_end::back);
      std::copy(m.bits.begin(), m.bits.end(), bits);
      INFO(test::name(s) << ", " << cols << " columns, one in " << one_in);
      test::for_each_arch<test::arches>(
          [&](auto tag) { CHECK(disagreement<decltype(tag)>(m, row, bits) == ""); });
    }
}

TEST_CASE("columns of more words than a register holds are found marked") {
  test::random draw(52);
  for (const index_t cols : {512, 513, 700, 1025}) {
    const marked_row m(test::shape::quantised, cols, 3, draw);
    test::for_each_arch<test::arches>([&](auto tag) {
      CHECK(disagreement<decltype(tag)>(m, m.value.data(), m.bits.data()) == "");
    });
  }
}

TEST_CASE("columns are numbered by a list, and rows give their values, where the column is there") {
  test::edges memory(4 * block_rows * 44);
  test::random draw(53);
  for (const int n : {1, 2, 5, 8, 11, 16})
    for (const int k : {1, 3}) {
      const index_t cols = 1 + draw.below(40), stride = cols + draw.below(4);
      auto rows = test::make_logits(test::shape::normal, 3, n, stride);
      rows.resize(static_cast<std::size_t>((n - 1) * stride + cols));
      ints column(static_cast<std::size_t>(k * block_rows)), list(static_cast<std::size_t>(cols));
      for (auto& c : column) c = static_cast<std::int32_t>(draw.below(cols + 4)) - 2;
      for (auto& c : list) c = static_cast<std::int32_t>(draw.below(1000));
      std::vector<float> expected(column.size(), 9.0f);
      ints numbered(column.size(), -1);
      for (std::size_t at = 0; at < column.size(); ++at) {
        const index_t c = column[at], i = static_cast<index_t>(at) % block_rows;
        if (c < 0 || c >= cols) continue;
        numbered[at] = list[static_cast<std::size_t>(c)];
        if (i < n) expected[at] = rows[static_cast<std::size_t>(i * stride + c)];
      }
      test::for_each_arch<test::arches>([&](auto tag) {
        using A = decltype(tag);
        test::at_both_ends(memory, [&] {
          const float* const from = memory.copy(rows);
          const std::int32_t *const at = memory.copy(column), *const names = memory.copy(list);
          float* const value = memory.room<float>(std::ssize(column));
          const std::span<const float> values(value, column.size());
          std::fill_n(value, column.size(), 9.0f);
          simd::take_values<A>(from, stride, n, cols, at, k, value);
          CHECK(test::bit_difference(values, expected) == "");
          if (n == 1) {
            // So far apart that 32 bits do not number the values of two rows.
            std::fill_n(value, column.size(), 9.0f);
            simd::take_values<A>(from, (index_t{1} << 26) + 1, n, cols, at, k, value);
            CHECK(test::bit_difference(values, expected) == "");
          }
          std::int32_t* const c = memory.copy(column);
          simd::renumber<A>(c, std::ssize(column), names, cols);
          CHECK(std::equal(numbered.begin(), numbered.end(), c));
          simd::renumber<A>(c, std::ssize(column), nullptr, 0);
          CHECK(std::count(c, c + column.size(), -1) == std::ssize(column));
        });
      });
    }
}
