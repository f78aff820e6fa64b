// Matrix products with weights that were packed once: y = x W^T + b, no allocation.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/exec/executor.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/rows/rows.hpp>

namespace moeroute::simd {

namespace detail {

// Accumulators of the register tile: tile_rows x tile_registers; more where the ISA has 32
// registers.
template <class A>
inline constexpr bool has_32_registers =
    std::derived_from<A, xsimd::avx512f> || std::derived_from<A, xsimd::neon64>;
template <class A>
inline constexpr int tile_registers = has_32_registers<A> ? 4 : 2;
inline constexpr int tile_rows = 6;
// Narrower panels leave accumulators over: more rows hide the latency of the multiply-adds.
template <class A, int registers>
inline constexpr int most_tile_rows =
    registers == tile_registers<A> ? tile_rows : (has_32_registers<A> && registers > 2 ? 8 : 12);
// Columns of x per pass: a slice of a panel stays in L2, six rows of x in L1.
inline constexpr index_t tile_depth = 512;
// How far ahead weights are fetched.
inline constexpr index_t bytes_ahead = 2048;

// Fused where the hardware does it; a product's bits may differ between ISAs, unlike a score's.
template <class A>
MOEROUTE_INLINE vfloat<A> multiply_add(vfloat<A> a, vfloat<A> b, vfloat<A> c) {
  if constexpr (has_fma<A>) {
    return xsimd::fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// Two registers of bfloat16 weights lie in one of 32-bit lanes, in the lower and the upper halves:
// widening them is a shift and a mask.
template <class W>
inline constexpr bool packs_pairs = std::is_same_v<W, bfloat16>;

// Where output o of a panel of so many registers stands among the weights of one column of x.
template <class W, class A>
constexpr index_t packed_place(index_t o, int registers) {
  const index_t j = o / width<A>;
  if (!packs_pairs<W> || (j | 1) >= registers) return o;
  return j / 2 * 2 * width<A> + o % width<A> * 2 + j % 2;
}

// The weights of one column of x.
template <class A, int v, class W>
MOEROUTE_INLINE void load_packed(const W* w, vfloat<A> (&column)[v]) {
  using U = xsimd::batch<std::uint32_t, A>;
  MOEROUTE_UNROLL
  for (int j = 0; j < v; ++j) {
    if constexpr (std::is_same_v<W, float>) {
      column[j] = vfloat<A>::load_aligned(w + j * width<A>);
    } else if (packs_pairs<W> && (j | 1) < v) {
      const U pair =
          U::load_unaligned(reinterpret_cast<const std::uint32_t*>(w + j / 2 * 2 * width<A>));
      column[j] = j % 2 == 0 ? bits_as<float>(pair << 16) : bits_as<float>(pair & U(0xffff0000u));
    } else {
      column[j] = load_wide<A>(w + j * width<A>);
    }
  }
}

}  // namespace detail

/// The weights [N, K] of a linear map, one output per row as checkpoints store them, packed into
/// panels that the product reads from front to back; with an optional bias [N].
///
/// Stored as W: float, or in half the memory bfloat16 or float16, which the product widens in
/// registers and accumulates in float: the same bits as float weights of the same values. A product
/// of one row is bound by reading them. Weights that a checkpoint keeps in 16 bits lose nothing;
/// others are rounded once, here.
/// Example:
///
///     const simd::packed_matrix<> w(view(gate_weight));    // packed once
///     gate(x, w, logits);                                  // logits = x W^T
template <storage W = float, class A = default_arch>
class packed_matrix {
 public:
  /// Outputs per panel.
  static constexpr index_t panel_width = detail::tile_registers<A> * width<A>;

  packed_matrix() = default;

  /// Room for N x K zeros and a zero bias: fill with set_rows.
  packed_matrix(index_t rows, index_t cols) : rows_(rows), cols_(cols) {
    if (rows < 0) fail_value("packed_matrix", "rows", rows, ">= 0");
    if (cols < 0) fail_value("packed_matrix", "cols", cols, ">= 0");
    constexpr index_t most = index_t{1} << 48;  // what is still too much, the buffer refuses
    check_range("packed_matrix", "rows", rows, 0, most);
    check_range("packed_matrix", "cols", cols, 0, most);
    weights_.resize(size_product(panels() * panel_width, cols));  // the last panel may need less
    bias_.resize(panels() * panel_width);
    std::fill_n(weights_.data(), weights_.size(), W{});
    std::fill_n(bias_.data(), bias_.size(), 0.0f);
  }

  explicit packed_matrix(matrix_view<const float> w) : packed_matrix(w.rows, w.cols) {
    set_rows(0, w);
  }
  explicit packed_matrix(matrix_view<const W> w)
    requires(!std::is_same_v<W, float>)
      : packed_matrix(w.rows, w.cols) {
    set_rows(0, w);
  }

  /// Packs the rows of w as outputs [first, first + w.rows), rounded to W (nearest, ties to even).
  /// Several maps of one input are fused this way.
  void set_rows(index_t first, matrix_view<const float> w) { pack_rows(first, w); }
  void set_rows(index_t first, matrix_view<const W> w)
    requires(!std::is_same_v<W, float>)
  {
    pack_rows(first, w);
  }

  /// The bias of output r.
  float& bias(index_t r) { return bias_[r]; }

  index_t rows() const { return rows_; }
  index_t cols() const { return cols_; }
  index_t panels() const { return ceil_div(rows_, panel_width); }
  /// Registers across a panel: fewer in the last one where its outputs fit into them.
  int registers(index_t p) const {
    const index_t left = rows_ - p * panel_width;
    return static_cast<int>(std::min<index_t>(detail::tile_registers<A>, ceil_div(left, width<A>)));
  }
  const W* panel(index_t p) const { return weights_.data() + p * panel_width * cols_; }
  const float* panel_bias(index_t p) const { return bias_.data() + p * panel_width; }

 private:
  template <class From>
  void pack_rows(index_t first, matrix_view<const From> w) {
    check_size("packed_matrix::set_rows", "w.cols()", w.cols, cols_);
    check_range("packed_matrix::set_rows", "w.rows()", w.rows, 0, rows_);
    check_range("packed_matrix::set_rows", "first", first, 0, rows_ - w.rows);
    check_stride("packed_matrix::set_rows", "w", w);
    if (cols_ == 0) return;  // no panel to point into
    for (index_t r = 0; r < w.rows; ++r) {
      const index_t p = (first + r) / panel_width;
      const index_t step = registers(p) * width<A>;
      W* out = weights_.data() + p * panel_width * cols_ +
               detail::packed_place<W, A>((first + r) % panel_width, registers(p));
      const From* in = w.data + r * w.stride;
      for (index_t c = 0; c < cols_; ++c) {
        if constexpr (std::is_same_v<From, W>) {
          out[c * step] = in[c];
        } else {
          out[c * step] = detail::narrowed<A, W>(in[c]);
        }
      }
    }
  }

  index_t rows_ = 0;
  index_t cols_ = 0;
  buffer<W> weights_;
  buffer<float> bias_;
};

namespace detail {

// y[0..m) x one panel, columns [0, depth) of x; starts from `start` (one row, or the rows of y
// itself).
template <class A, int v, int m, class W>
void multiply_tile(const float* MOEROUTE_RESTRICT x, index_t x_stride, const W* MOEROUTE_RESTRICT w,
                   index_t depth, const float* start, index_t start_stride, float* y,
                   index_t y_stride, index_t cols) {
  constexpr int lanes = width<A>;
  vfloat<A> sum[m][v];
  MOEROUTE_UNROLL
  for (int r = 0; r < m; ++r) {
    MOEROUTE_UNROLL
    for (int j = 0; j < v; ++j)
      sum[r][j] = load_first<A>(start + r * start_stride + j * lanes,
                                std::clamp<index_t>(cols - j * lanes, 0, lanes), 0.0f);
  }
  for (index_t c = 0; c < depth; ++c, w += v * lanes) {
    vfloat<A> column[v];
    // One row or two are bound by reading the weights, and the hardware stops at every page.
    if constexpr (m <= 2) MOEROUTE_PREFETCH(reinterpret_cast<const char*>(w) + bytes_ahead);
    load_packed<A>(w, column);
    MOEROUTE_UNROLL
    for (int r = 0; r < m; ++r) {
      const vfloat<A> a(x[r * x_stride + c]);
      MOEROUTE_UNROLL
      for (int j = 0; j < v; ++j) sum[r][j] = multiply_add<A>(a, column[j], sum[r][j]);
    }
  }
  // One question for all rows: one for each register would be most of the code.
  const auto write = [&](const auto& store) MOEROUTE_INLINE_LAMBDA {
    MOEROUTE_UNROLL
    for (int r = 0; r < m; ++r) {
      MOEROUTE_UNROLL
      for (int j = 0; j < v; ++j) store(y + r * y_stride + j * lanes, j, sum[r][j]);
    }
  };
  if (cols >= v * lanes) {
    write([](float* out, int, vfloat<A> made)
              MOEROUTE_INLINE_LAMBDA { made.store_unaligned(out); });
  } else {
    write([&](float* out, int j, vfloat<A> made) MOEROUTE_INLINE_LAMBDA {
      store_first<A>(out, std::clamp<index_t>(cols - j * lanes, 0, lanes), made);
    });
  }
}

// A stripe of rows times one panel of v registers, columns [0, depth).
template <class A, int v, class T, class W>
void multiply_panel(const matrix_view<const T>& x, index_t depth0, const W* w, index_t depth,
                    const float* start, index_t start_stride, const matrix_view<float>& y,
                    index_t first_col, index_t cols) {
  constexpr index_t most = most_tile_rows<A, v>;
  alignas(alignment) float wide[std::is_same_v<T, float> ? 1 : most * tile_depth];
  for (index_t r = 0; r < x.rows;) {
    const index_t left = x.rows - r;
    const auto run = [&]<int m>(std::integral_constant<int, m>) {
      const float* in;
      index_t in_stride = x.stride;
      if constexpr (std::is_same_v<T, float>) {
        in = x.data + r * x.stride + depth0;
      } else {
        for (index_t i = 0; i < m; ++i)
          convert_row<A>(x.data + (r + i) * x.stride + depth0, depth, wide + i * tile_depth);
        in = wide;
        in_stride = tile_depth;
      }
      multiply_tile<A, v, m>(in, in_stride, w, depth, start + r * start_stride, start_stride,
                             y.data + r * y.stride + first_col, y.stride, cols);
      r += m;
    };
    if (left >= most) {
      run(std::integral_constant<int, most>{});
    } else if constexpr (v < tile_registers<A>) {
      // A few sizes do: a narrow panel is a small part of most products.
      if (left >= 4) {
        run(std::integral_constant<int, 4>{});
      } else if (left >= 2) {
        run(std::integral_constant<int, 2>{});
      } else {
        run(std::integral_constant<int, 1>{});
      }
    } else {
      switch (left) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
        default: run(std::integral_constant<int, 5>{}); break;
      }
    }
  }
}

// A stripe of rows times the panels [panel, panel_end), slice by slice of the depth.
template <class A, class T, class W>
void multiply_stripe(const matrix_view<const T>& x, const packed_matrix<W, A>& w, index_t panel,
                     index_t panel_end, const matrix_view<float>& y) {
  constexpr index_t panel_width = packed_matrix<W, A>::panel_width;
  for (index_t depth0 = 0; depth0 == 0 || depth0 < w.cols(); depth0 += tile_depth) {
    const index_t depth = std::min(tile_depth, w.cols() - depth0);
    for (index_t p = panel; p < panel_end; ++p) {
      const index_t first = p * panel_width, cols = std::min(panel_width, w.rows() - first);
      const float* start = depth0 == 0 ? w.panel_bias(p) : y.data + first;
      const index_t start_stride = depth0 == 0 ? 0 : y.stride;
      const auto run = [&]<int v>(std::integral_constant<int, v>) {
        multiply_panel<A, v>(x, depth0, w.panel(p) + depth0 * v * width<A>, depth, start,
                             start_stride, y, first, cols);
      };
      const int registers = w.registers(p);
      if (registers == tile_registers<A>) {
        run(std::integral_constant<int, tile_registers<A>>{});
      } else if (registers == 1) {
        run(std::integral_constant<int, 1>{});
      } else if constexpr (tile_registers<A> == 4) {
        if (registers == 2) {
          run(std::integral_constant<int, 2>{});
        } else {
          run(std::integral_constant<int, 3>{});
        }
      }
    }
  }
}

}  // namespace detail

/// y = x W^T + b.
///
/// Shapes: x [M, K] in float, bfloat16 or float16, W [N, K] packed in one of them, y [M, N] in
/// float.
/// Throws: error where the shapes do not fit, rows run into one another, or x and y overlap.
/// Cost: M N K multiply-adds, no allocation. Splits over the executor's threads where there is
/// enough work. Determinism: every element is one chain of multiply-adds over K in order, so a row
/// of y depends neither on the other rows nor on threads.
template <storage W, class A, readable_rows X, writable_rows Y, executor Exec = serial>
void gemm(const X& x_rows, const packed_matrix<W, A>& w, Y&& y_rows, const Exec& exec = {}) {
  const auto x = const_view(x_rows);
  const matrix_view<float> y = view(y_rows);
  check_size("gemm", "x.cols()", x.cols, w.cols());
  check_size("gemm", "y.cols()", y.cols, w.rows());
  check_size("gemm", "y.rows()", y.rows, x.rows);
  check_stride("gemm", "x", x);
  check_stride("gemm", "y", y);
  check_apart("gemm", "x", x, "y", y);
  if (x.rows == 0 || w.rows() == 0) return;
  constexpr index_t panel_width = packed_matrix<W, A>::panel_width;
  // A piece of work: a stripe of rows times a stripe of panels, about 2^18 multiply-adds or more.
  const index_t stripe_rows = std::min<index_t>(x.rows, 16 * detail::tile_rows);
  const index_t panel_cost = std::max<index_t>(1, stripe_rows * panel_width * w.cols());
  const index_t stripe_panels = std::min(w.panels(), ceil_div(index_t{1} << 18, panel_cost));
  const index_t row_stripes = ceil_div(x.rows, stripe_rows);
  const index_t panel_stripes = ceil_div(w.panels(), stripe_panels);
  // The smaller of both is read again: panels stay in the caches while rows pass, or rows do.
  const bool panels_stay =
      x.rows * static_cast<index_t>(sizeof(*x.data)) < w.rows() * static_cast<index_t>(sizeof(W));
  exec.parallel_for(row_stripes * panel_stripes, 1, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; ++i) {
      const index_t row = (panels_stay ? i % row_stripes : i / panel_stripes) * stripe_rows;
      const index_t panel = (panels_stay ? i / row_stripes : i % panel_stripes) * stripe_panels;
      const index_t rows = std::min(stripe_rows, x.rows - row);
      detail::multiply_stripe<A>(x.middle_rows(row, rows), w, panel,
                                 std::min(w.panels(), panel + stripe_panels),
                                 y.middle_rows(row, rows));
    }
  });
}

}  // namespace moeroute::simd
