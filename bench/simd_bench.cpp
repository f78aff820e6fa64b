// top_k: the k best columns of rows of logits, without any policy around it.
#include <algorithm>
#include <string>
#include <vector>

#include <moeroute/simd/select/top_k_packed.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/logits.hpp"
#include "support/peers/peers.hpp"
#include "support/plain_selection.hpp"

namespace {

using bench::index_t;
constexpr index_t block = moeroute::block_rows;

// The kernel with its memory: blocks of up to 16 rows, the results rank by rank.
struct kernel {
  int k;
  std::vector<float> value;
  std::vector<std::int32_t> column;
  moeroute::buffer<std::uint64_t> key;

  kernel(index_t experts, int choices)
      : k(choices),
        value(static_cast<std::size_t>(block * k)),
        column(static_cast<std::size_t>(block * k)),
        key(moeroute::simd::top_k_scratch(experts, k)) {}

  void operator()(const float* rows, index_t n, index_t experts) {
    moeroute::simd::top_k_block(rows, experts, static_cast<int>(n), experts, k, value.data(),
                                column.data(), key.data());
    benchmark::DoNotOptimize(column.data());
  }
};

bool agrees(const bench::logit_rows& logits, kernel& ours) {
  bench::plain_selection plain;
  std::vector<std::int32_t> id(static_cast<std::size_t>(ours.k));
  std::vector<float> value(id.size());
  for (index_t first = 0; first + block <= std::min<index_t>(logits.turns.units, 256);
       first += block) {
    ours(logits.row(first), block, logits.experts);
    for (index_t i = 0; i < block; ++i) {
      plain.partial_sort(logits.row(first + i), logits.experts, ours.k, id.data(), value.data());
      for (std::size_t r = 0; r < id.size(); ++r)
        if (ours.column[r * block + static_cast<std::size_t>(i)] != id[r]) return false;
    }
  }
  return true;
}

// rows: what one call of the kernel sees, 16 or 1.
void top_k(benchmark::State& state, index_t rows, index_t experts, int k, const std::string& shape,
           const std::string& mem) {
  const bench::logit_rows logits(shape, experts, mem, rows);
  kernel ours(experts, k);
  if (!agrees(logits, ours)) {
    state.SkipWithError("differs from std::partial_sort");
    return;
  }
  bench::plain_selection plain;
  std::vector<std::int32_t> id(static_cast<std::size_t>(k));
  std::vector<float> value(id.size());
  moeroute::buffer<float> best(logits.turns.units);
  const auto row_by_row = [&](auto select) {
    return [&, select](index_t first, index_t n) {
      for (index_t r = first; r < first + n; ++r) {
        select(logits.row(r), experts, k, id.data(), value.data());
        benchmark::DoNotOptimize(id.data());
      }
    };
  };
  const auto partial_sort = row_by_row([&](auto... a) { plain.partial_sort(a...); });
  const auto insertion = row_by_row([](auto... a) { bench::plain_selection::insertion(a...); });

  const bench::rotation by_row = logits.turns.row_by_row();
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(logits.turns, 0.0, [&](index_t first, index_t n) {
                    for (index_t r = first; r < first + n; r += rows)
                      ours(logits.row(r), rows, experts);
                  })});
  list.push_back({"floor", bench::over(by_row, 1.0 / 3, [&](index_t first, index_t n) {
                    bench::max_of_rows(logits.row(first), n, experts, best.data());
                  })});
  // One row at a time is what decoding asks for, and there insertion is the plain way.
  if (rows == 1)
    list.push_back({"baseline", bench::over(by_row, 2.0 / 3, insertion)});
  else
    list.push_back({"baseline", bench::over(by_row, 2.0 / 3, partial_sort)});
  if (rows == block && shape == "normal" && mem == "l2" && k == 8) {
    list.push_back({"insertion", bench::over(by_row, 2.0 / 3, insertion)});
    list.push_back({"nth_element", bench::over(by_row, 2.0 / 3, row_by_row([&](auto... a) {
                                                 plain.nth_element(a...);
                                               }))});
    list.push_back(
        {"eigen", bench::over(by_row, 2.0 / 3, row_by_row([&](auto... a) { plain.eigen(a...); }))});
    const bench::rotation batches(logits.turns.units, logits.turns.unit_bytes,
                                  std::min<index_t>(logits.turns.units, 1024));
    std::vector<float> expected;
    for (index_t r = 0; r < batches.step; ++r) {
      plain.partial_sort(logits.row(r), experts, k, id.data(), value.data());
      expected.insert(expected.end(), value.begin(), value.end());
    }
    const std::string wrong = bench::add_peers(list, bench::selection_peers(experts, k),
                                               logits.row(0), experts, batches, expected, k);
    if (!wrong.empty()) {
      state.SkipWithError(("differs from " + wrong).c_str());
      return;
    }
  }
  kernel eight(experts, 8);
  if (k == 32)
    list.push_back({"k8", bench::over(logits.turns, 1.0 / 3, [&](index_t first, index_t n) {
                      for (index_t r = first; r < first + n; r += rows)
                        eight(logits.row(r), rows, experts);
                    })});
  bench::compete(state, logits.bytes(), std::move(list));
}

// The same logits rounded to bfloat16. Floor: the SIMD max over the same 16-bit rows. Baseline:
// widening a block and then the kernel of floats.
void top_k_of_bfloat16(benchmark::State& state, index_t rows, index_t experts, int k,
                       const std::string& shape, const std::string& mem) {
  const bench::logit_rows logits(shape, experts, mem, rows);
  const index_t units = logits.turns.units;
  moeroute::buffer<moeroute::bfloat16> narrow(units * experts);
  moeroute::simd::convert_row(logits.values.data(), units * experts, narrow.data());
  const auto row = [&](index_t r) { return narrow.data() + r * experts; };

  kernel floats(experts, k), ours(experts, k);
  moeroute::buffer<float> scratch(moeroute::simd::widened_block(experts)), wide(block * experts);
  const auto packed = [&](index_t first) {
    moeroute::simd::top_k_block(row(first), experts, static_cast<int>(rows), experts, k,
                                ours.value.data(), ours.column.data(), scratch.data(),
                                ours.key.data());
    benchmark::DoNotOptimize(ours.column.data());
  };
  const auto widened = [&](index_t first) {
    for (index_t i = 0; i < rows; ++i)
      moeroute::simd::convert_row(row(first + i), experts, wide.data() + i * experts);
    floats(wide.data(), rows, experts);
  };
  for (index_t first = 0; first + rows <= std::min<index_t>(units, 1024); first += rows) {
    packed(first);
    widened(first);
    for (index_t r = 0; r < k; ++r)
      for (index_t i = 0; i < rows; ++i)
        if (const auto at = static_cast<std::size_t>(r * block + i);
            ours.column[at] != floats.column[at] || ours.value[at] != floats.value[at]) {
          state.SkipWithError("differs from the kernel of floats");
          return;
        }
  }

  moeroute::buffer<std::int16_t> best(8 * units);
  const bench::rotation turns(units, experts * static_cast<index_t>(sizeof(moeroute::bfloat16)),
                              rows);
  const auto blocks = [&](auto& f) {
    return [&](index_t first, index_t n) {
      for (index_t r = first; r < first + n; r += rows) f(r);
    };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", bench::over(turns, 0.0, blocks(packed))});
  list.push_back({"floor", bench::over(turns.row_by_row(), 1.0 / 3, [&](index_t first, index_t n) {
                    bench::max_of_rows(row(first), n, experts, best.data());
                  })});
  list.push_back({"baseline", bench::over(turns, 2.0 / 3, blocks(widened))});
  bench::compete(state, static_cast<double>(turns.unit_bytes), std::move(list));
}

void add_bfloat16(index_t rows, index_t experts, int k, const std::string& shape,
                  const std::string& mem) {
  const std::string name = std::string("top_k") + (rows == 1 ? "/T:1" : "") +
                           "/E:" + std::to_string(experts) + "/k:" + std::to_string(k) +
                           "/shape:" + shape + "/mem:" + mem + "/dtype:bf16";
  bench::entry(name, [=](benchmark::State& state) {
    top_k_of_bfloat16(state, rows, experts, k, shape, mem);
  });
}

void add(index_t rows, index_t experts, int k, const std::string& shape, const std::string& mem) {
  const std::string name = std::string("top_k") + (rows == 1 ? "/T:1" : "") +
                           "/E:" + std::to_string(experts) + "/k:" + std::to_string(k) +
                           "/shape:" + shape + "/mem:" + mem;
  bench::entry(name, [=](benchmark::State& state) { top_k(state, rows, experts, k, shape, mem); });
}

const bool registered = [] {
  for (const index_t experts : {8, 16, 32, 64, 128, 256, 384, 512, 1024})
    for (const int k : {1, 2, 4, 6, 8, 10, 16, 32, 64})
      if (k <= experts && (k <= 16 || experts == 256)) add(block, experts, k, "normal", "l2");
  for (const index_t experts : {64, 128, 256, 384, 512, 1024})
    add(block, experts, 8, "normal", "stream");
  for (const int k : {4, 16}) add(block, 256, k, "normal", "stream");
  for (const char* shape : bench::shapes) {
    if (std::string("normal") == shape) continue;
    for (const index_t experts : {64, 256}) add(block, experts, 8, shape, "l2");
  }
  for (const index_t experts : {64, 128, 256, 512}) add(1, experts, 8, "normal", "l2");

  for (const index_t experts : {8, 16, 32, 64, 128, 256, 384, 512, 1024})
    for (const int k : {1, 2, 4, 8, 10, 16})
      if (k <= experts) add_bfloat16(block, experts, k, "normal", "l2");
  for (const index_t experts : {64, 128, 256}) add_bfloat16(block, experts, 8, "normal", "stream");
  for (const char* shape : {"quantised", "all_equal", "masked", "half_nan", "one_column"})
    add_bfloat16(block, 256, 8, shape, "l2");
  return true;
}();

}  // namespace
