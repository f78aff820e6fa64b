// The dense plan of a soft mixture: every token in every slot, every slot in every token.
#pragma once

#include <cstdint>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// Dispatch and combine weights of T tokens and S slots, `slots_per_expert` of each expert in a
/// row. Storage is reused.
class soft_plan {
 public:
  /// Contents unspecified. Throws: error where a size is negative or slots_per_expert does not
  /// divide the slots.
  void reset(index_t tokens, index_t slots, index_t slots_per_expert) {
    check_range("soft_plan", "tokens", tokens, 0, std::int32_t{0x7fffffff});
    check_range("soft_plan", "slots", slots, 1, std::int32_t{0x7fffffff});
    check_range("soft_plan", "slots_per_expert", slots_per_expert, 1, slots);
    check_size("soft_plan", "slots % slots_per_expert", slots % slots_per_expert, 0);
    const index_t entries = size_product(tokens, slots);
    tokens_ = slots_ = 0;  // until there is room
    dispatch_.resize(entries);
    combine_.resize(entries);
    tokens_ = tokens;
    slots_ = slots;
    slots_per_expert_ = slots_per_expert;
  }

  index_t tokens() const { return tokens_; }
  index_t slots() const { return slots_; }
  index_t slots_per_expert() const { return slots_per_expert_; }
  index_t experts() const { return slots_ == 0 ? 0 : slots_ / slots_per_expert_; }

  /// [S, T]: how much of each token a slot is; rows sum to 1.
  matrix_view<const float> dispatch() const { return {dispatch_.data(), slots_, tokens_}; }
  matrix_view<float> dispatch() { return {dispatch_.data(), slots_, tokens_}; }
  /// [T, S]: how much of each slot's output a token gets; rows sum to 1.
  matrix_view<const float> combine() const { return {combine_.data(), tokens_, slots_}; }
  matrix_view<float> combine() { return {combine_.data(), tokens_, slots_}; }

 private:
  index_t tokens_ = 0;
  index_t slots_ = 0;
  index_t slots_per_expert_ = 1;
  buffer<float> dispatch_;
  buffer<float> combine_;
};

}  // namespace moeroute
