// Square transposes of registers: rows of tokens become lanes of tokens.
#pragma once

#include <moeroute/simd/batch.hpp>

namespace moeroute::simd {

/// Columns [c, c + width) of `width` rows, transposed: out[j] holds column c + j, one row per lane.
///
/// Columns at or past `cols` read as `fill`. rows[i] points at row i.
template <class A>
MOEROUTE_INLINE void load_transposed(const float* const* rows, index_t c, index_t cols, float fill,
                                     vfloat<A>* out) {
  constexpr int w = width<A>;
  if (c + w <= cols) {
    for (int i = 0; i < w; ++i) out[i] = load<A>(rows[i] + c);
  } else {
    for (int i = 0; i < w; ++i) out[i] = load_first<A>(rows[i] + c, cols > c ? cols - c : 0, fill);
  }
  xsimd::transpose(out, out + w);
}

}  // namespace moeroute::simd
