// Quantile balancing: the bias that would have given each expert exactly its share of the batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <moeroute/balance/check_counts.hpp>
#include <moeroute/balance/dual_prices.hpp>
#include <moeroute/simd/rows/histogram.hpp>

namespace moeroute {

struct quantile_options {
  index_t k = 1;
  float ema = 0.0f;  ///< share of the old bias that stays
  /// [E], the share of the k T places that each expert has, of any sum. Copied; empty: equal.
  std::span<const float> share{};
};

namespace detail {

// What both forms do with new biases: mix, then centre. NaN: nothing was seen, the old one stays.
template <class New>
void mix_and_centre(std::span<float> bias, float ema, New&& fresh) {
  double sum = 0.0;
  for (std::size_t e = 0; e < bias.size(); ++e) {
    const double wanted = fresh(e), keep = static_cast<double>(ema);
    if (std::isfinite(wanted))
      bias[e] = static_cast<float>(keep * static_cast<double>(bias[e]) + (1.0 - keep) * wanted);
    sum += static_cast<double>(bias[e]);
  }
  const auto mean = static_cast<float>(sum / static_cast<double>(bias.size()));
  for (float& b : bias) b -= mean;
}

// A token with no more than k finite scores has nothing to decide: it takes no part.
struct only_deciding_tokens {
  float operator()(float price) const {
    return price == simd::minus_infinity ? simd::plus_infinity : price;
  }
};

}  // namespace detail

/// The exact form. observe() a batch (or several: their estimates are averaged), then update().
///
/// alpha_t = (k+1)-th largest of s_te + b_e; b_e becomes -(q+1)-th largest of s_te - alpha_t over
/// the tokens, q = floor(k T / E); then the mean is subtracted. Biases are for the next batch.
/// Averages of quantiles are not the quantile of everything: across ranks the histogram form is.
/// Source: Megatron-LM's quantile balancing; Kimi K3's.
class quantile_balancer {
 public:
  /// Throws: error where E is outside [1, 2^20], k outside [1, E] or ema outside [0, 1].
  explicit quantile_balancer(index_t experts, const quantile_options& options) : options_(options) {
    check_range("quantile_balancer", "experts", experts, 1, max_experts);
    check_range("quantile_balancer", "k", options.k, 1, experts);
    detail::check_between("quantile_balancer", "ema", static_cast<double>(options.ema), 0.0, 1.0);
    bias_.assign(static_cast<std::size_t>(experts), 0.0f);
    estimate_.resize(bias_.size());
    sums_.assign(2 * bias_.size(), 0.0);
    part_ = detail::parts_of("quantile_balancer", options.share, experts);
    options_.share = {};
  }

  /// Adds the estimate of one batch.
  ///
  /// Shapes: scores [T, E]; mask [T] or empty. Scores that are not finite count as never chosen; a
  /// token with at most k others takes no part. Throws: error where a size differs. Cost: a row
  /// selection and a column selection; no allocation once ws is warm. Determinism: the same bits
  /// on every ISA, executor and thread count.
  template <executor Exec = serial, class A = simd::default_arch>
  void observe(matrix_view<const float> scores, std::span<const std::uint8_t> mask, workspace& ws,
               const Exec& exec = {}) {
    const auto experts = static_cast<index_t>(bias_.size());
    detail::check_scores("quantile_balancer", scores, mask, experts);
    const int workers = worker_slots::count(exec.concurrency());
    const auto memory = ws.carve([&](scratch& tape) {
      return detail::dual_memory::carve(tape, scores.rows, experts, options_.k + 1, workers);
    });
    detail::dual_prices<A, Exec> prices(scores, mask, memory, workers, exec);
    prices.price_tokens(bias_.data(), options_.k + 1, detail::only_deciding_tokens{});
    index_t tokens = 0;
    for (index_t t = 0; t < scores.rows; ++t) tokens += prices.price_of(t) < simd::plus_infinity;
    if (tokens == 0) return;
    if (part_.empty())
      prices.price_experts(options_.k * tokens / experts + 1, estimate_.data());
    else
      // No expert has a token twice, whatever its share.
      prices.price_experts(static_cast<double>(options_.k * tokens), part_, tokens,
                           estimate_.data());
    for (std::size_t e = 0; e < bias_.size(); ++e) {
      if (!std::isfinite(estimate_[e])) continue;
      sums_[e] -= static_cast<double>(estimate_[e]);
      sums_[bias_.size() + e] += 1.0;
    }
  }
  template <executor Exec = serial, class A = simd::default_arch>
  void observe(matrix_view<const float> scores, workspace& ws, const Exec& exec = {}) {
    observe<Exec, A>(scores, {}, ws, exec);
  }

  /// [2 E], to be summed over ranks before update(): estimates and how many there are.
  std::span<double> sums() { return sums_; }

  /// Takes the mean of the estimates and forgets them. Without any the bias stays.
  void update() {
    const std::size_t experts = bias_.size();
    detail::mix_and_centre(bias_, options_.ema, [&](std::size_t e) {
      const double n = sums_[experts + e];
      return n > 0.0 ? sums_[e] / n : std::numeric_limits<double>::quiet_NaN();
    });
    std::fill(sums_.begin(), sums_.end(), 0.0);
  }

  /// [E], to be added to the scores.
  std::span<const float> bias() const { return bias_; }
  std::span<float> bias() { return bias_; }

 private:
  quantile_options options_;
  std::vector<float> bias_, estimate_;
  std::vector<double> sums_, part_;
};

struct quantile_histogram_options {
  index_t k = 1;
  float ema = 0.0f;
  index_t buckets = 1000;
  float least_score = 0.0f;  ///< of all scores; the defaults are a sigmoid's or a softmax's
  float most_score = 1.0f;
  /// [E], the share of the k T places that each expert has, of any sum. Copied; empty: equal.
  std::span<const float> share{};
};

/// The form for many ranks: integer histograms that are summed, then an exact rank in them,
/// linearly interpolated within its bucket. The bias is within one bucket of the exact one.
///
/// Cost: observe is a row selection and one count per element; no allocation once ws is warm.
/// Determinism: counts are integers, so their sums are exact in any order. Source: Kimi K3's notes.
class quantile_histogram {
 public:
  /// Throws: error where E is outside [1, 2^20], k outside [1, E], ema outside [0, 1], buckets
  /// outside [2, 2^16] or the scores' range is empty.
  explicit quantile_histogram(index_t experts, const quantile_histogram_options& options)
      : options_(options) {
    constexpr const char* where = "quantile_histogram";
    check_range(where, "experts", experts, 1, max_experts);
    check_range(where, "k", options.k, 1, experts);
    check_range(where, "buckets", options.buckets, 2, index_t{1} << 16);
    detail::check_between(where, "ema", static_cast<double>(options.ema), 0.0, 1.0);
    if (!(options.least_score < options.most_score) ||
        !std::isfinite(options.most_score - options.least_score))
      fail(where, "least_score must be below most_score, both finite");
    bias_.assign(static_cast<std::size_t>(experts), 0.0f);
    part_ = detail::parts_of(where, options.share, experts);
    options_.share = {};
    counts_.assign(static_cast<std::size_t>(simd::count_size(experts, options.buckets)), 0);
    set_range();
  }

  /// Counts one batch. Shapes, Throws: as quantile_balancer::observe.
  template <class A = simd::default_arch>
  void observe(matrix_view<const float> scores, std::span<const std::uint8_t> mask, workspace& ws) {
    const auto experts = static_cast<index_t>(bias_.size());
    detail::check_scores("quantile_histogram", scores, mask, experts);
    const index_t stride = round_up(experts, simd::tile_size);
    struct memory {
      float *rows, *tile;
      simd::kth_largest_buffers kth;
    };
    const memory m = ws.carve([&](scratch& tape) {
      return memory{tape.take<float>(simd::tile_size * stride),
                    tape.take<float>(simd::tile_size * stride),
                    simd::kth_largest_buffers::carve(tape, experts, options_.k + 1)};
    });
    const float* row[simd::count_rows_at_once];
    float start[simd::count_rows_at_once];
    index_t found = 0;
    const auto count = [&] {
      simd::count_rows<A>(row, found, experts, start, scale_, options_.buckets, counts_.data());
      tokens_ += found;
      found = 0;
    };
    for (index_t first = 0; first < scores.rows; first += block_rows) {
      const index_t n = std::min<index_t>(block_rows, scores.rows - first);
      float alpha[block_rows];
      if (simd::tile_takes(options_.k + 1)) {
        detail::pack_scores<A>(scores, mask, first, m.rows, m.tile, simd::panel_shape{1}, 0);
        simd::kth_largest_of_tile<A>(m.tile, simd::panel_shape{1}, 0, experts, bias_.data(),
                                     options_.k + 1, alpha);
      } else {
        for (index_t i = 0; i < block_rows; ++i) {
          const bool taken =
              i < n && (mask.empty() || mask[static_cast<std::size_t>(first + i)] != 0);
          detail::finite_row<A>(taken ? scores.row(first + i) : nullptr, bias_.data(), experts,
                                m.rows + i * stride);
        }
        simd::kth_largest_of_block<A>(m.rows, stride, experts, options_.k + 1, m.kth, alpha);
      }
      for (index_t i = 0; i < n; ++i) {
        if (alpha[i] == simd::minus_infinity) continue;
        // alpha - s, in buckets from the low end.
        row[found] = scores.row(first + i);
        start[found++] = (alpha[i] - low_) * scale_;
      }
      if (found + block_rows > simd::count_rows_at_once) count();
    }
    count();
  }
  template <class A = simd::default_arch>
  void observe(matrix_view<const float> scores, workspace& ws) {
    observe<A>(scores, {}, ws);
  }

  /// [ceil(E / 16), buckets, 16], to be summed over ranks before update(): the bucket b of expert e
  /// is at simd::count_place(e, b, buckets).
  std::span<std::int32_t> counts() { return counts_; }

  /// Reads the biases off the counts and forgets these. Without any the bias stays.
  void update() {
    const index_t buckets = options_.buckets, experts = static_cast<index_t>(bias_.size());
    // Every token that took part is in each expert's histogram once.
    std::int64_t tokens = 0;
    const auto count = [&](index_t e, index_t b) {
      return counts_[static_cast<std::size_t>(simd::count_place(e, b, buckets))];
    };
    for (index_t b = 0; b < buckets; ++b) tokens += count(0, b);
    const auto even = static_cast<double>(options_.k * tokens / experts);
    const auto rank = [&](std::size_t e) {
      if (part_.empty()) return even;
      // No expert has a token twice, whatever its share.
      return static_cast<double>(std::min(
          tokens - 1, detail::whole_places(static_cast<double>(options_.k * tokens), part_[e])));
    };
    if (tokens > 0)
      detail::mix_and_centre(bias_, options_.ema, [&](std::size_t expert) {
        const auto e = static_cast<index_t>(expert);
        const double q = rank(expert);
        double before = 0.0;
        index_t b = 0;
        while (b + 1 < buckets && before + static_cast<double>(count(e, b)) <= q)
          before += static_cast<double>(count(e, b++));
        const double here = static_cast<double>(count(e, b));
        const double part = here > 0.0 ? std::clamp((q - before) / here, 0.0, 1.0) : 0.0;
        return static_cast<double>(low_) +
               (static_cast<double>(b) + part) / static_cast<double>(scale_);
      });
    std::fill(counts_.begin(), counts_.end(), 0);
    tokens_ = 0;
    set_range();
  }

  /// Width of a bucket: the error that interpolation cannot remove.
  float bucket_width() const { return 1.0f / scale_; }
  std::int64_t tokens() const { return tokens_; }
  std::span<const float> bias() const { return bias_; }

 private:
  // alpha is a biased score, so alpha - s is within the biases' range widened by the scores'.
  void set_range() {
    const auto [least, most] = std::minmax_element(bias_.begin(), bias_.end());
    const float spread = options_.most_score - options_.least_score;
    low_ = *least - spread;
    scale_ = static_cast<float>(options_.buckets) / (*most + spread - low_);
  }

  quantile_histogram_options options_;
  std::vector<float> bias_;
  std::vector<double> part_;
  std::vector<std::int32_t> counts_;
  std::int64_t tokens_ = 0;
  float low_ = 0.0f, scale_ = 1.0f;
};

}  // namespace moeroute
