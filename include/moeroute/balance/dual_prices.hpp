// The two half steps of balancing by duality: a price per token from its row, a price per expert
// from its column.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <utility>

#include <moeroute/balance/check_counts.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/exec/worker_slots.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/panel.hpp>
#include <moeroute/simd/select/kth_largest.hpp>

namespace moeroute::detail {

// out[e] = row[e] + bias[e], -inf where row[e] is not finite and up to the next multiple of 16; all
// -inf for no row.
template <class A>
void finite_row(const float* row, const float* bias, index_t cols, float* out) {
  using F = simd::vfloat<A>;
  constexpr int w = simd::width<A>;
  const F never(simd::minus_infinity), most(std::numeric_limits<float>::max());
  const index_t stride = round_up(cols, simd::tile_size);
  index_t c = 0;
  for (; row != nullptr && c < cols; c += w) {
    const index_t n = std::min<index_t>(w, cols - c);
    const F x =
        n == w ? simd::load<A>(row + c) : simd::load_first<A>(row + c, n, simd::minus_infinity);
    F y = x;
    if (bias != nullptr)
      y += n == w ? simd::load<A>(bias + c) : simd::load_first<A>(bias + c, n, 0.0f);
    simd::select<A>(simd::absolute<A>(x) <= most, y, never).store_unaligned(out + c);
  }
  for (; c < stride; c += w) never.store_unaligned(out + c);
}

// Packs the rows [16 tile, 16 tile + 16) of the scores as a tile of a panel; -inf where a score is
// not finite, and for tokens that there are not or that take no part. rows: [16, round_up(E, 16)].
template <class A>
void pack_scores(matrix_view<const float> scores, std::span<const std::uint8_t> mask, index_t first,
                 float* rows, float* panel, simd::panel_shape shape, index_t tile) {
  constexpr int size = simd::tile_size;
  const index_t stride = round_up(scores.cols, size);
  float one[size];
  std::fill_n(one, size, 1.0f);
  if (mask.empty() && first + size <= scores.rows && stride == scores.cols) {
    simd::pack_tiles<A>(scores.row(first), scores.stride, one, scores.cols, panel, shape, tile,
                        simd::keep_finite{});
    return;
  }
  for (index_t i = 0; i < size; ++i) {
    const index_t t = first + i;
    const bool taken = t < scores.rows && (mask.empty() || mask[static_cast<std::size_t>(t)] != 0);
    finite_row<A>(taken ? scores.row(t) : nullptr, nullptr, scores.cols, rows + i * stride);
  }
  simd::pack_tiles<A>(rows, stride, one, scores.cols, panel, shape, tile);
}

// What the expert's price is counted from: a strip of scores, less the price of each token.
struct priced_strip {
  const float* strip;
  const float* price;

  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> values(index_t tile, int column, int lane) const {
    return simd::load<A>(strip + simd::panel_shape::lanes(tile, column) + lane) -
           simd::load<A>(price + tile * simd::tile_size + lane);
  }
};

// Scores that are not finite, masked tokens and rows without a token become -inf; a price of +inf
// takes a token out of every column.
struct dual_memory {
  struct worker {
    float* rows;  // [16, round_up(E, 16)]
    simd::kth_largest_buffers row;
    simd::kth_column_buffers column;
  };
  float* panel;
  float* price;  // [16 tiles]
  worker* workers;

  static dual_memory carve(scratch& tape, index_t tokens, index_t experts, index_t k, int count) {
    const index_t stride = round_up(experts, simd::tile_size);
    dual_memory m{tape.take<float>(simd::panel_size(tokens, experts)),
                  tape.take<float>(round_up(tokens, simd::tile_size)), tape.take<worker>(count)};
    for (int w = 0; w < count; ++w) {
      const worker memory{tape.take<float>(simd::tile_size * stride),
                          simd::kth_largest_buffers::carve(tape, experts, k),
                          simd::kth_column_buffers::carve(tape, tokens)};
      if (m.workers != nullptr) std::construct_at(m.workers + w, memory);
    }
    return m;
  }
};

// One column of a strip.
struct one_column {
  priced_strip strip;
  int column;

  template <class A>
  MOEROUTE_INLINE simd::vfloat<A> values(index_t tile, int, int lane) const {
    return strip.values<A>(tile, column, lane);
  }
};

template <class A, executor Exec>
class dual_prices {
 public:
  dual_prices(matrix_view<const float> scores, std::span<const std::uint8_t> mask,
              const dual_memory& memory, int workers, const Exec& exec)
      : scores_(scores), mask_(mask), memory_(memory), slots_(workers), exec_(exec) {}

  // Tokens that take part.
  index_t tokens() const {
    if (mask_.empty()) return scores_.rows;
    return static_cast<index_t>(
        std::count_if(mask_.begin(), mask_.end(), [](std::uint8_t m) { return m != 0; }));
  }

  // price = adjust(k-th largest of score + bias), of every token; the first time the scores are
  // laid out, each tile just before it is read.
  template <class Adjust>
  void price_tokens(const float* bias, index_t k, Adjust&& adjust) {
    const bool lay_out = !std::exchange(laid_out_, true);
    for_each_tile([&](const dual_memory::worker& m, index_t tile) {
      if (lay_out) pack(m, tile);
      // Rows past the end have prices too.
      float price[simd::tile_size];
      const index_t first = tile * simd::tile_size;
      if (simd::tile_takes(k)) {
        simd::kth_largest_of_tile<A>(memory_.panel, shape(), tile, scores_.cols, bias, k, price);
      } else {
        for (int i = 0; i < simd::tile_size; ++i) copy_row(first + i, bias, m.rows + i * stride());
        simd::kth_largest_of_block<A>(m.rows, stride(), scores_.cols, k, m.row, price);
      }
      for (int i = 0; i < simd::tile_size; ++i) memory_.price[first + i] = adjust(price[i]);
    });
  }

  // In place of price_tokens.
  void price_tokens_at_zero() {
    for_each_tile([&](const dual_memory::worker& m, index_t tile) { pack(m, tile); });
    std::fill_n(memory_.price, round_up(scores_.rows, simd::tile_size), 0.0f);
  }

  // out[e] = rank-th largest of score - price down column e, -inf where there is none. Comes after
  // price_tokens.
  void price_experts(index_t rank, float* out) {
    const index_t strips = ceil_div(scores_.cols, simd::tile_size);
    exec_.parallel_for(strips, 1, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots_);
      for (index_t strip = begin; strip < end; ++strip) {
        const index_t first = strip * simd::tile_size;
        const auto columns =
            static_cast<int>(std::min<index_t>(simd::tile_size, scores_.cols - first));
        const priced_strip source{memory_.panel + shape().strip(first), memory_.price};
        simd::kth_largest_of_columns<A>(source, scores_.rows, columns, rank,
                                        memory_.workers[worker].column, out + first);
      }
    });
  }

  // The same with a rank of its own for each column: floor(places * part of the expert) + 1, `most`
  // where that is more. One sweep per column.
  void price_experts(double places, std::span<const double> part, index_t most, float* out) {
    exec_.parallel_for(scores_.cols, 1, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots_);
      for (index_t e = begin; e < end; ++e) {
        const one_column source{{memory_.panel + shape().strip(e), memory_.price},
                                static_cast<int>(e % simd::tile_size)};
        const index_t rank =
            std::min(most, whole_places(places, part[static_cast<std::size_t>(e)]) + 1);
        simd::kth_largest_of_columns<A>(source, scores_.rows, 1, rank,
                                        memory_.workers[worker].column, out + e);
      }
    });
  }

  float price_of(index_t token) const { return memory_.price[token]; }

 private:
  index_t stride() const { return round_up(scores_.cols, simd::tile_size); }
  simd::panel_shape shape() const { return {ceil_div(scores_.rows, simd::tile_size)}; }

  template <class F>
  void for_each_tile(F&& f) {
    const index_t tiles = shape().tiles;
    const index_t grain = std::max<index_t>(1, (index_t{1} << 11) / scores_.cols);
    exec_.parallel_for(tiles, grain, [&](index_t begin, index_t end) {
      const worker_slots::held worker(slots_);
      for (index_t tile = begin; tile < end; ++tile) f(memory_.workers[worker], tile);
    });
  }

  void pack(const dual_memory::worker& m, index_t tile) {
    pack_scores<A>(scores_, mask_, tile * simd::tile_size, m.rows, memory_.panel, shape(), tile);
  }

  // out = the row of a token, a bias added; -inf where there is no such token.
  void copy_row(index_t t, const float* bias, float* out) const {
    const bool taken =
        t < scores_.rows && (mask_.empty() || mask_[static_cast<std::size_t>(t)] != 0);
    finite_row<A>(taken ? scores_.row(t) : nullptr, bias, scores_.cols, out);
  }

  matrix_view<const float> scores_;
  std::span<const std::uint8_t> mask_;
  dual_memory memory_;
  worker_slots slots_;
  const Exec& exec_;
  bool laid_out_ = false;
};

inline void check_scores(const char* where, matrix_view<const float> scores,
                         std::span<const std::uint8_t> mask, index_t experts) {
  check_size(where, "scores.cols", scores.cols, experts);
  check_range(where, "scores.rows", scores.rows, 0, std::int32_t{0x7fffffff});
  check_stride(where, "scores", scores);
  if (!mask.empty())
    check_size(where, "mask.size()", static_cast<index_t>(mask.size()), scores.rows);
}

}  // namespace moeroute::detail
