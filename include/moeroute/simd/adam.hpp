// Adam on a vector, with bits that do not depend on compiler or register width.
#pragma once

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Steps of Adam with beta 0.9 and 0.999, eps 1e-8 and bias correction.
///
/// Determinism: the same bits on every ISA. Source: Kingma, Ba 2015.
class adam_steps {
 public:
  /// x -= rate * m / (sqrt(v) + eps), where m and v are the corrected moments of the gradient.
  ///
  /// Shapes: all arrays are [n], n a multiple of 16; mean and square start at 0.
  template <class A = default_arch>
  void step(float rate, const float* gradient, index_t n, float* mean, float* square, float* x) {
    using F = vfloat<A>;
    mean_left_ = fma<A>(F(mean_left_), F(0.9f), F(0.0f)).get(0);
    square_left_ = fma<A>(F(square_left_), F(0.999f), F(0.0f)).get(0);
    const F mean_share(1.0f - mean_left_), square_share(1.0f - square_left_);
    for (index_t i = 0; i < n; i += width<A>) {
      const F g = load<A>(gradient + i);
      // 1 - 0.9 and 1 - 0.999, the squares rounded before they are added.
      const F m = fma<A>(F(0.9f), load<A>(mean + i), F(0.1f) * g);
      const F v = fma<A>(F(0.999f), load<A>(square + i), F(0.001f) * (g * g));
      m.store_unaligned(mean + i);
      v.store_unaligned(square + i);
      const F slope = divide<A>(divide<A>(m, mean_share),
                                square_root<A>(divide<A>(v, square_share)) + F(1e-8f));
      fma<A>(F(-rate), slope, load<A>(x + i)).store_unaligned(x + i);
    }
  }

 private:
  float mean_left_ = 1.0f;    // 0.9^steps
  float square_left_ = 1.0f;  // 0.999^steps
};

}  // namespace moeroute::simd
