// Rows of logits in rotation: mem:l2 cycles through a megabyte, mem:stream through four L2 caches.
#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

#include "support/contest.hpp"
#include "support/shapes.hpp"

namespace bench {

inline index_t l2_bytes() {
  for (const auto& cache : benchmark::CPUInfo::Get().caches)
    if (cache.level == 2) return static_cast<index_t>(cache.size);
  return index_t{2} << 20;
}

/// Rows [units, experts] of a named shape. `step`: rows that one call takes.
struct logit_rows {
  index_t experts;
  rotation turns;
  moeroute::buffer<float> values;

  logit_rows(const std::string& shape, index_t e, const std::string& mem, index_t step)
      : experts(e), turns(plan(e, mem, step)), values(turns.units * e) {
    fill(shape, turns.units, e, values.data());
  }

  const float* row(index_t r) const { return values.data() + r * experts; }
  double bytes() const { return static_cast<double>(turns.unit_bytes); }

 private:
  static rotation plan(index_t experts, const std::string& mem, index_t step) {
    const index_t bytes = experts * static_cast<index_t>(sizeof(float));
    // Three competitors walk a third of the rotation apart: each third is more than the cache.
    const index_t rows = mem == "stream" ? std::max<index_t>(4096, 4 * l2_bytes() / bytes)
                                         : (index_t{1} << 20) / bytes;
    return {std::max(step, rows / step * step), bytes, step};
  }
};

}  // namespace bench
