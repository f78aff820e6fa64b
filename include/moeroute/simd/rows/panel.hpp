// Panels: a matrix in tiles of 16 x 16, transposed, so that rules that work down the columns read
// registers.
#pragma once

#include <algorithm>
#include <limits>

#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/transpose.hpp>

namespace moeroute::simd {

/// The lanes that hold n.
template <class A>
MOEROUTE_INLINE vmask<A> lanes_equal(vint<A> x, std::int32_t n) {
  return xsimd::batch_bool_cast<float>(x == vint<A>(n));
}

/// Rows and columns of a tile.
inline constexpr int tile_size = block_rows;

/// Floats of a panel for a matrix of rows x cols.
constexpr index_t panel_size(index_t rows, index_t cols) {
  return round_up(rows, tile_size) * round_up(cols, tile_size);
}

/// Where things are in a panel: strips of 16 columns, each a run of tiles, each tile column by
/// column with one row per lane. Tile b holds the rows [16 b, 16 b + 16).
struct panel_shape {
  index_t tiles;  ///< in a strip: ceil(rows / 16)

  index_t strip(index_t column) const { return column / tile_size * tiles * tile_size * tile_size; }
  /// The 16 rows of `tile` in a column that is numbered within its strip.
  static index_t lanes(index_t tile, int column) { return (tile * tile_size + column) * tile_size; }
};

/// out = `size` values of a column, in runs of eight rows spread evenly over all of them:
/// neighbours are alike in most batches, and a run is a read from memory.
///
/// Shapes: source.values<A>(tile, column, lane) is the register of the rows [16 tile + lane, ...).
/// Requires: size is a multiple of 16 and at most rows / 2.
template <class A, class Source>
void sample_column(const Source& source, index_t rows, int column, index_t size, float* out) {
  constexpr int run = 8;
  const index_t runs = size / run, tiles = ceil_div(rows, tile_size);
  for (index_t i = 0; i < runs; ++i) {
    alignas(alignment) float lanes[tile_size];
    for (int lane = 0; lane < tile_size; lane += width<A>)
      source.template values<A>(i * tiles / runs, column, lane).store_aligned(lanes + lane);
    std::copy_n(lanes + i * run % tile_size, run, out + i * run);
  }
}

/// What pack_tiles makes of the values: they stay as they are.
struct keep_values {
  template <class A>
  MOEROUTE_INLINE vfloat<A> map(vfloat<A> x) const {
    return x;
  }
};

/// -inf in place of what is not finite.
struct keep_finite {
  template <class A>
  MOEROUTE_INLINE vfloat<A> map(vfloat<A> x) const {
    return select<A>(absolute<A>(x) <= vfloat<A>(std::numeric_limits<float>::max()), x,
                     vfloat<A>(minus_infinity));
  }
};

/// Writes one tile of every strip: the 16 rows that it holds, each times its factor and mapped by
/// `kept`, become columns.
///
/// Shapes: rows is [16, stride] with stride >= cols rounded up to 16, factor is [16].
/// Requires: the caller has filled what lies beyond the matrix (with -inf where it must not be
/// chosen).
template <class A = default_arch, class Kept = keep_values>
void pack_tiles(const float* rows, index_t stride, const float* factor, index_t cols, float* panel,
                panel_shape shape, index_t tile, const Kept& kept = {}) {
  constexpr int w = width<A>;
  vfloat<A> times[registers_per_block<A>];
  for (int r = 0; r < registers_per_block<A>; ++r) times[r] = load<A>(factor + r * w);
  for (index_t first = 0; first < cols; first += tile_size) {
    float* const out = panel + shape.strip(first) + panel_shape::lanes(tile, 0);
    for (int r = 0; r < registers_per_block<A>; ++r)
      for (int c = 0; c < tile_size; c += w) {
        vfloat<A> x[w];
        MOEROUTE_UNROLL
        for (int i = 0; i < w; ++i) x[i] = load<A>(rows + (r * w + i) * stride + first + c);
        transpose<A>(x);
        MOEROUTE_UNROLL
        for (int i = 0; i < w; ++i)
          kept.template map<A>(x[i] * times[r]).store_unaligned(out + (c + i) * tile_size + r * w);
      }
  }
}

}  // namespace moeroute::simd
