// Low-rank adapters as experts, ids for adapters of experts, masks of ranks, and parameters that
// are mixed before they are used.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/base/rng.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/check_choices.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/rows/gemm.hpp>

namespace moeroute {

/// Which ranks of an adapter a row uses (FlyLoRA).
struct rank_mask {
  index_t keep = 0;  ///< the ranks with the largest |A x + bias|; 0: all
  /// [r], or empty: moves the choice and never the value. The caller keeps it alive.
  lasting_span<const float> bias{};
};

/// E low-rank adapters: y += (alpha / r) B_e (A_e x), A [r, d], B [d', r].
///
/// An expert function with scratch, which writes the adapter's own output; add_to() adds it to what
/// a base product left in y. Cost: r (d + d') multiply-adds per row, both products on a tile of
/// rows that stays in cache; no allocation. Determinism: a row does not depend on others. Source:
/// Hu et al. 2021; rank masks: FlyLoRA 2025.
template <class A = simd::default_arch>
class lora_experts {
 public:
  static constexpr index_t tile = 32;
  /// The most ranks of which a mask chooses.
  static constexpr index_t most_masked = 256;

  /// Throws: error where a size is out of its range, or the mask keeps more ranks than there are.
  lora_experts(index_t experts, index_t d, index_t d_out, index_t rank, float alpha,
               const rank_mask& mask = {})
      : d_(d), d_out_(d_out), rank_(rank), scale_(alpha / static_cast<float>(rank)), mask_(mask) {
    constexpr const char* where = "lora_experts";
    check_range(where, "experts", experts, 1, max_experts);
    check_range(where, "d", d, 1, index_t{1} << 40);
    check_range(where, "d_out", d_out, 1, index_t{1} << 40);
    check_range(where, "rank", rank, 1, index_t{1} << 20);
    if (!std::isfinite(alpha)) fail_value(where, "alpha", alpha, "a finite number");
    check_range(where, "mask.keep", mask.keep, 0, rank);
    if (mask.keep > 0) check_range(where, "rank of a mask", rank, 1, most_masked);
    if (!mask.bias.empty())
      check_size(where, "mask.bias.size()", static_cast<index_t>(mask.bias.size()), rank);
    down_.assign(static_cast<std::size_t>(experts), simd::packed_matrix<float, A>(rank, d));
    up_.assign(static_cast<std::size_t>(experts), simd::packed_matrix<float, A>(d_out, rank));
  }

  /// Throws: error where e or a shape does not fit.
  void set_a(expert_id e, matrix_view<const float> a) {
    check_size("lora_experts", "a.rows", a.rows, rank_);
    check_size("lora_experts", "a.cols", a.cols, d_);
    part(down_, e).set_rows(0, a);
  }
  void set_b(expert_id e, matrix_view<const float> b) {
    check_size("lora_experts", "b.rows", b.rows, d_out_);
    check_size("lora_experts", "b.cols", b.cols, rank_);
    part(up_, e).set_rows(0, b);
  }

  index_t experts() const { return static_cast<index_t>(down_.size()); }
  index_t d() const { return d_; }
  index_t d_out() const { return d_out_; }
  index_t rank() const { return rank_; }
  index_t scratch_floats() const { return round_up(tile * (rank_ + d_out_), 64); }
  /// alpha / r.
  float scale() const { return scale_; }
  /// Whether a mask drops ranks.
  bool masks() const { return mask_.keep > 0 && mask_.keep < rank_; }

  /// low = A x of expert e, [n, r], which a mask has not seen.
  void low_rank(expert_id e, matrix_view<const float> x, matrix_view<float> low) const {
    simd::gemm(x, part(down_, e), low);
  }
  /// dropped[i] = whether the mask drops rank i of a row of low_rank(); the lowest stays among
  /// equals.
  void dropped_ranks(const float* row, bool (&dropped)[most_masked]) const {
    const auto size = [&](index_t i) {
      return std::abs(row[i] +
                      (mask_.bias.empty() ? 0.0f : mask_.bias[static_cast<std::size_t>(i)]));
    };
    // Ranks are few: each counts who comes before it.
    const index_t n = rank_;
    for (index_t i = 0; i < n; ++i) {
      index_t before = 0;
      for (index_t j = 0; j < rank_; ++j)
        before += size(j) > size(i) || (size(j) == size(i) && j < i);
      dropped[i] = before >= mask_.keep;
    }
  }

  /// y = (alpha / r) B (A x).
  ///
  /// Shapes: x [n, d], y [n, d_out], memory [scratch_floats()]. Throws: error where e or a shape
  /// does not fit, or x and y overlap.
  void operator()(expert_id e, matrix_view<const float> x, matrix_view<float> y,
                  float* memory) const {
    check_call(e, x, y);
    for (index_t first = 0; first < x.rows; first += tile) {
      const index_t n = std::min(tile, x.rows - first);
      const matrix_view<float> out = y.middle_rows(first, n);
      product(e, x.middle_rows(first, n), out, memory);
      for (index_t t = 0; t < n; ++t)
        for (index_t c = 0; c < d_out_; ++c) out.row(t)[c] *= scale_;
    }
  }
  /// y += (alpha / r) B (A x). Shapes and errors as above.
  void add_to(expert_id e, matrix_view<const float> x, matrix_view<float> y, float* memory) const {
    check_call(e, x, y);
    for (index_t first = 0; first < x.rows; first += tile) {
      const index_t n = std::min(tile, x.rows - first);
      const matrix_view<float> own(memory + tile * rank_, n, d_out_);
      product(e, x.middle_rows(first, n), own, memory);
      for (index_t t = 0; t < n; ++t) {
        float* const to = y.row(first + t);
        for (index_t c = 0; c < d_out_; ++c) to[c] = std::fma(scale_, own.row(t)[c], to[c]);
      }
    }
  }

 private:
  void check_call(expert_id e, const matrix_view<const float>& x,
                  const matrix_view<float>& y) const {
    constexpr const char* where = "lora_experts";
    check_range(where, "expert", e, 0, experts() - 1);
    check_size(where, "x.cols", x.cols, d_);
    check_size(where, "y.rows", y.rows, x.rows);
    check_size(where, "y.cols", y.cols, d_out_);
    check_stride(where, "x", x);
    check_stride(where, "y", y);
    check_apart(where, "x", x, "y", y);
  }

  void product(expert_id e, matrix_view<const float> x, matrix_view<float> y, float* memory) const {
    const matrix_view<float> low(memory, x.rows, rank_);
    low_rank(e, x, low);
    if (masks())
      for (index_t t = 0; t < low.rows; ++t) keep_ranks(low.row(t));
    simd::gemm(low, up_[static_cast<std::size_t>(e)], y);
  }

  void keep_ranks(float* row) const {
    bool dropped[most_masked];
    dropped_ranks(row, dropped);
    const index_t n = rank_;
    for (index_t i = 0; i < n; ++i)
      if (dropped[i]) row[i] = 0.0f;
  }

  template <class List>
  static auto& part(List& of, expert_id e) {
    check_range("lora_experts", "expert", e, 0, static_cast<index_t>(of.size()) - 1);
    return of[static_cast<std::size_t>(e)];
  }

  index_t d_, d_out_, rank_;
  float scale_;
  rank_mask mask_;
  std::vector<simd::packed_matrix<float, A>> down_, up_;
};

/// The choices of tokens that come with an adapter each: expert e of adapter a has the id
/// a * E + e, so that a plan puts tokens of one adapter and expert together.
///
/// adapter [T]: of each token. What capacity dropped stays dropped. Throws: error where sizes
/// differ, an adapter is outside [0, A), or out is choices. Cost: a copy of the choices.
inline void virtual_experts(const assignment& choices, std::span<const std::int32_t> adapter,
                            index_t adapters, assignment& out) {
  constexpr const char* where = "virtual_experts";
  check_choices(where, choices);
  if (choices.ragged()) fail(where, "the assignment is ragged, expected the fixed form");
  if (&out == &choices) fail(where, "out is choices, expected an assignment of its own");
  check_range(where, "choices.experts()", choices.experts(), 1, max_experts);
  check_size(where, "adapter.size()", static_cast<index_t>(adapter.size()), choices.tokens());
  check_range(where, "adapters", adapters, 1, max_experts / choices.experts());
  for (const std::int32_t a : adapter) check_range(where, "adapter", a, 0, adapters - 1);
  out.reset(choices.tokens(), adapters * choices.experts(), choices.k());
  const auto k = static_cast<std::size_t>(choices.k());
  for (std::size_t c = 0; c < choices.ids().size(); ++c) {
    const expert_id e = choices.ids()[c];
    out.ids()[c] =
        e == no_expert ? no_expert : static_cast<expert_id>(adapter[c / k] * choices.experts() + e);
    out.weights()[c] = choices.weights()[c];
  }
  if (choices.drops()) {
    const std::span<std::uint8_t> kept = out.kept_to_fill();
    std::copy(choices.kept().begin(), choices.kept().end(), kept.begin());
  }
}

/// out[s] = the parameters of all experts mixed for sequence s, block by block: block h of the
/// columns takes the weights [s * blocks + h].
///
/// Shapes: weights [S * blocks, E], parameters [E, n], blocks divides n, out [S, n]. One block is
/// SMEAR (Muqeeth et al. 2023) and Polytropon (Ponti et al. 2023), several are MHR (Caccia et al.
/// 2023). Ensures: one-hot weights give that expert's values (a
/// zero without its sign). Mixing A and B of an adapter apart is
/// not the mixture of their products. Throws: error where shapes do not fit or out overlaps what is
/// read. Cost: O(S E n).
inline void mix_parameters(matrix_view<const float> weights, matrix_view<const float> parameters,
                           index_t blocks, matrix_view<float> out) {
  constexpr const char* where = "mix_parameters";
  check_range(where, "blocks", blocks, 1, std::max<index_t>(1, parameters.cols));
  check_size(where, "parameters.cols % blocks", parameters.cols % blocks, 0);
  check_size(where, "weights.rows", weights.rows, out.rows * blocks);
  check_size(where, "weights.cols", weights.cols, parameters.rows);
  check_size(where, "out.cols", out.cols, parameters.cols);
  check_stride(where, "weights", weights);
  check_stride(where, "parameters", parameters);
  check_stride(where, "out", out);
  check_apart(where, "weights", weights, "out", out);
  check_apart(where, "parameters", parameters, "out", out);
  const index_t width = parameters.cols / blocks;
  for (index_t s = 0; s < out.rows; ++s)
    for (index_t h = 0; h < blocks; ++h) {
      const float* const w = weights.row(s * blocks + h);
      float* const to = out.row(s) + h * width;
      std::fill_n(to, width, 0.0f);
      for (index_t e = 0; e < parameters.rows; ++e) {
        if (w[e] == 0.0f) continue;
        const float* const from = parameters.row(e) + h * width;
        for (index_t c = 0; c < width; ++c) to[c] = std::fma(w[e], from[c], to[c]);
      }
    }
}

/// The frozen A of FlyLoRA: each of r rows has exactly p = max(1, n * keep / r) entries that are
/// not 0, at random places, normal with deviation 1 / r. The same seed gives the same matrix.
inline std::vector<float> fly_projection(index_t r, index_t n, index_t keep, std::uint64_t seed) {
  constexpr const char* where = "fly_projection";
  check_range(where, "r", r, 1, index_t{1} << 20);
  check_range(where, "n", n, 1, index_t{1} << 30);
  check_range(where, "keep", keep, 1, r);
  const index_t p = std::max<index_t>(1, n * keep / r);
  std::vector<float> a(static_cast<std::size_t>(r * n));
  for (index_t i = 0; i < r; ++i) {
    std::uint64_t draw = 0;
    for (index_t made = 0; made < p;) {
      const auto stream = static_cast<std::uint64_t>(i);
      const std::uint32_t at = random_below(static_cast<std::uint32_t>(n), seed, stream, draw++);
      float& x = a[static_cast<std::size_t>(i * n) + at];
      if (x != 0.0f) continue;
      // Twelve uniforms have the variance 1 and need no library of mathematics.
      float sum = -6.0f;
      for (int u = 0; u < 12; ++u)
        sum += random_u01(seed + 1, stream, 12 * draw + static_cast<std::uint64_t>(u));
      x = (sum == 0.0f ? 1.0f : sum) / static_cast<float>(r);
      ++made;
    }
  }
  return a;
}

/// The step of FlyLoRA's bias: d += rate * sign(mean count - count), so that ranks that are used
/// less are taken sooner. Throws: error where sizes differ.
inline void update_rank_bias(std::span<const std::int64_t> counts, float rate,
                             std::span<float> bias) {
  check_size("update_rank_bias", "counts.size()", static_cast<index_t>(counts.size()),
             static_cast<index_t>(bias.size()));
  std::int64_t all = 0;
  for (const std::int64_t c : counts) all += c;
  const auto n = static_cast<std::int64_t>(counts.size());
  for (std::size_t i = 0; i < bias.size(); ++i) {
    const std::int64_t less = all - counts[i] * n;
    bias[i] += less > 0 ? rate : less < 0 ? -rate : 0.0f;
  }
}

}  // namespace moeroute
