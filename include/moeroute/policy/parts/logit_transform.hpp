// What happens to logits before they are scored: temperature, soft-cap, an additive vector, noise.
#pragma once

#include <cmath>
#include <span>
#include <string>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/simd/elementwise.hpp>

namespace moeroute {

/// z' = softcap * tanh((z / temperature) / softcap) + add + noise, in this order; a soft-cap of 0
/// is off.
///
/// Determinism: the same bits on every ISA. Source: soft-capping as in Gemma 2 (2024) and Laguna;
/// an additive vector is steering (Bandarkar et al. 2026) or the delta of Rewiring Experts on the
/// Fly (2025).
struct logit_transform {
  float temperature = 1.0f;
  float softcap = 0.0f;
  std::span<const float> add{};  ///< [columns], or empty
  logit_noise noise{};

  bool active() const {
    return temperature != 1.0f || softcap != 0.0f || !add.empty() || noise.active();
  }

  /// Throws: error where temperature is not positive, softcap is negative, or add has another
  /// length.
  MOEROUTE_OUT_OF_LINE void check(index_t columns) const {
    if (!(temperature > 0.0f) || !std::isfinite(temperature))
      fail_value("logit_transform", "temperature", temperature, "> 0");
    if (!(softcap >= 0.0f) || !std::isfinite(softcap))
      fail_value("logit_transform", "softcap", softcap, ">= 0");
    if (!add.empty())
      check_size("logit_transform", "add.size()", static_cast<index_t>(add.size()), columns);
    noise.check();
  }

  /// The block with its rows transformed into `rows` [16, columns].
  template <class A = simd::default_arch>
  logit_block apply(logit_block z, float* rows) const {
    for (int i = 0; i < z.rows; ++i) {
      float* row = rows + i * z.experts;
      this->template apply_row<A>(z.row(i), z.experts, row);
      if (noise.active()) noise.template add_to_row<A>(row, z.experts, z.first_token + i, *z.side);
    }
    z.logits = rows;
    z.stride = z.experts;
    return z;
  }

 private:
  template <class A = simd::default_arch>
  void apply_row(const float* z, index_t columns, float* out) const {
    using F = simd::vfloat<A>;
    const F t(temperature), cap(softcap), never(simd::minus_infinity);
    simd::map_row<A>(z, columns, out, [&](F x) {
      if (temperature != 1.0f) x = simd::divide<A>(x, t);
      // The soft-cap would lift -inf to -softcap, and a masked expert with it.
      if (softcap != 0.0f)
        x = simd::select<A>(x > never, simd::tanh<A>(simd::divide<A>(x, cap)) * cap, never);
      return x;
    });
    if (!add.empty())
      for (index_t c = 0; c < columns; ++c) out[c] += add[static_cast<std::size_t>(c)];
  }
};

}  // namespace moeroute
