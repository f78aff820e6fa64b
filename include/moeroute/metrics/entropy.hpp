// Entropies: of the load over experts, and of each token's distribution.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include <moeroute/base/error.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute {

/// Entropy of loads / sum, in nats; 0 where nothing was counted. Requires: loads are not negative.
template <class N>
double load_entropy(std::span<const N> load) {
  double sum = 0.0, weighted = 0.0;
  for (const N n : load) {
    const auto x = static_cast<double>(n);
    sum += x;
    if (x > 0.0) weighted += x * std::log(x);
  }
  return sum > 0.0 ? std::log(sum) - weighted / sum : 0.0;
}

/// The same over ln E, in [0, 1]; 1 for one expert.
template <class N>
double normalized_load_entropy(std::span<const N> load) {
  return load.size() < 2 ? 1.0 : load_entropy(load) / std::log(static_cast<double>(load.size()));
}

/// The divergence of the load from an even one, ln E - entropy, in nats; 0 where nothing was
/// counted.
template <class N>
double load_kl_to_uniform(std::span<const N> load) {
  double sum = 0.0;
  for (const N n : load) sum += static_cast<double>(n);
  return sum > 0.0 ? std::log(static_cast<double>(load.size())) - load_entropy(load) : 0.0;
}

/// Entropy of softmax(z), in nats. NaN and -inf are experts without mass; an empty row or one with
/// nothing else has 0; several +inf share. Cost: one exponential per logit.
template <class A = simd::default_arch>
double token_entropy(std::span<const float> logits) {
  const auto cols = static_cast<index_t>(logits.size());
  const float max = simd::row_max<A>(logits.data(), cols);
  if (!(max > simd::minus_infinity)) return 0.0;
  using F = simd::vfloat<A>;
  const F top(max), zero(0.0f);
  simd::partials<A> sum(0.0f), weighted(0.0f);
  simd::detail::for_each_register<A>(logits.data(), cols, simd::minus_infinity, [&](int r, F x) {
    const F below = simd::select<A>(x == top, zero, x - top);
    const F e = simd::exp_below_max<A>(x, top);
    sum.part[r] += e;
    // exp(-inf) (-inf) is a mass of nothing, not NaN.
    weighted.part[r] += simd::select<A>(e > zero, e * below, zero);
  });
  const double total = static_cast<double>(simd::sum_of<A>(sum));
  return std::log(total) - static_cast<double>(simd::sum_of<A>(weighted)) / total;
}

/// The mean entropy of tokens' softmax, fed batch by batch.
class entropy_meter {
 public:
  /// Shapes: logits [T, E]; mask [T] or empty, 0: the token does not count. Throws: error where the
  /// mask has another length, or rows run into one another.
  template <class A = simd::default_arch>
  void add(matrix_view<const float> logits, std::span<const std::uint8_t> mask = {}) {
    if (!mask.empty())
      check_size("entropy_meter", "mask.size()", static_cast<index_t>(mask.size()), logits.rows);
    check_stride("entropy_meter", "logits", logits);
    for (index_t t = 0; t < logits.rows; ++t) {
      if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) continue;
      sum_ += token_entropy<A>({logits.row(t), static_cast<std::size_t>(logits.cols)});
      ++tokens_;
    }
    if (logits.rows > 0) experts_ = logits.cols;
  }

  std::int64_t tokens() const { return tokens_; }
  /// In nats; 0 where there are no tokens.
  double mean() const { return tokens_ == 0 ? 0.0 : sum_ / static_cast<double>(tokens_); }
  /// Over ln E; 0 where there is one expert.
  double normalized() const {
    return experts_ < 2 ? 0.0 : mean() / std::log(static_cast<double>(experts_));
  }

 private:
  double sum_ = 0.0;
  std::int64_t tokens_ = 0;
  index_t experts_ = 0;
};

}  // namespace moeroute
