// How well a model foretells a text: its loss in nats per token, segment by segment.
#pragma once

#include "decoder.hpp"
#include "tokens.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

namespace example {

/// The mean loss of every token but the first of its segment; see(token, its logits) hears of what
/// the model said before each.
template <class Exec, class See>
[[nodiscard]] double text_loss(decoder<Exec>& decode, const token_ids& tokens, index_t segment,
                               See&& see) {
  double sum = 0;
  std::int64_t count = 0;
  const auto all = static_cast<index_t>(tokens.size());
  for (index_t first = 0; first < all; first += segment) {
    const index_t n = std::min(segment, all - first);
    decode.reset();
    const auto logits = decode.run(
        std::span(tokens).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)),
        wanted_logits::all);
    for (index_t t = 0; t + 1 < n; ++t) {
      const float* const row = logits.row(t);
      const auto next = tokens[static_cast<std::size_t>(first + t + 1)];
      double max = -INFINITY, total = 0;
      for (index_t c = 0; c < logits.cols; ++c) max = std::max(max, static_cast<double>(row[c]));
      for (index_t c = 0; c < logits.cols; ++c)
        total += std::exp(static_cast<double>(row[c]) - max);
      sum += std::log(total) + max - static_cast<double>(row[next]);
      see(count++, std::span(row, static_cast<std::size_t>(logits.cols)));
    }
  }
  return count == 0 ? 0.0 : sum / static_cast<double>(count);
}

}  // namespace example
