// What experts that choose for themselves give: lists of tokens. Holds, decides nothing.
#pragma once

#include <cstdint>
#include <span>

#include <moeroute/base/index.hpp>

namespace moeroute {

/// Each expert's tokens, [E, C], as expert choice gives them: in any order, each token at most once
/// per expert, -1 where an expert has fewer than C.
struct expert_lists {
  index_t tokens = 0;
  index_t experts = 0;
  index_t capacity = 0;                   ///< C
  std::span<const std::int32_t> token{};  ///< [E * C], expert e's at [e C, (e + 1) C)
  std::span<const float> weight{};        ///< [E * C], likewise, or empty
};

}  // namespace moeroute
