// RMSNorm, and rotary position embedding in the rotate-half form.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include <moeroute/base/index.hpp>
#include <moeroute/simd/batch.hpp>
#include <moeroute/simd/reduce.hpp>

namespace example {

using moeroute::index_t;

/// out = x / sqrt(mean(x^2) + eps) * weight; in and out may be the same row.
template <class A = moeroute::simd::default_arch>
void rms_norm(const float* x, std::span<const float> weight, float eps, float* out) {
  namespace simd = moeroute::simd;
  const auto n = static_cast<index_t>(weight.size());
  simd::partials<A> squares(0.0F);
  int part = 0;
  for (index_t i = 0; i < n; i += simd::width<A>) {
    const simd::vfloat<A> v =
        i + simd::width<A> <= n ? simd::load<A>(x + i) : simd::load_first<A>(x + i, n - i, 0.0F);
    squares.part[part] = simd::fma<A>(v, v, squares.part[part]);
    part = (part + 1) % simd::partials<A>::n;
  }
  const float scale = 1.0F / std::sqrt(simd::sum_of<A>(squares) / static_cast<float>(n) + eps);
  for (index_t i = 0; i < n; ++i) {
    out[i] = x[i] * scale * weight[static_cast<std::size_t>(i)];
  }
}

/// Cosines and sines of the rotation at each position, in float as the
/// reference implementations compute them.
class rotary_table {
 public:
  rotary_table(double theta, index_t head_dim, index_t positions)
      : half_(head_dim / 2),
        cosines_(static_cast<std::size_t>(half_ * positions)),
        sines_(cosines_.size()) {
    for (index_t i = 0; i < half_; ++i) {
      const auto frequency = static_cast<float>(
          1.0 / std::pow(theta, static_cast<double>(2 * i) / static_cast<double>(head_dim)));
      for (index_t p = 0; p < positions; ++p) {
        const float angle = static_cast<float>(p) * frequency;
        const auto at = static_cast<std::size_t>(p * half_ + i);
        cosines_[at] = std::cos(angle);
        sines_[at] = std::sin(angle);
      }
    }
  }

  /// Rotates the first half of the head with the second, in place.
  void rotate(float* head, index_t position) const {
    const float* cosine = cosines_.data() + position * half_;
    const float* sine = sines_.data() + position * half_;
    for (index_t i = 0; i < half_; ++i) {
      const float a = head[i];
      const float b = head[half_ + i];
      head[i] = a * cosine[i] - b * sine[i];
      head[half_ + i] = b * cosine[i] + a * sine[i];
    }
  }

 private:
  index_t half_;
  std::vector<float> cosines_;
  std::vector<float> sines_;
};

}  // namespace example
