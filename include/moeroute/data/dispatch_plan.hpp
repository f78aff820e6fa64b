// Where every choice goes: slots in expert-major order, and the way back. Built once per layer, then read only.
#pragma once

#include <cstdint>
#include <span>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>

namespace moeroute {

/// The expert-major order of an assignment's choices.
///
/// Expert e owns the slots [offsets[e], offsets[e + 1]), in token order. Storage is reused.
class dispatch_plan {
 public:
  /// Room for a plan of T tokens with k choices each over E experts, contents unspecified.
  void reset(index_t tokens, index_t experts, index_t k) {
    tokens_ = tokens;
    experts_ = experts;
    k_ = k;
    offsets_.resize(experts + 1);
    token_of_slot_.resize(tokens * k);
    slot_of_choice_.resize(tokens * k);
    cursor_.resize(experts);
  }

  index_t tokens() const { return tokens_; }
  index_t experts() const { return experts_; }
  index_t k() const { return k_; }
  /// Slots in use: choices that were kept.
  index_t slots() const { return experts_ == 0 ? 0 : offsets_[experts_]; }
  /// Choices without an expert.
  index_t unrouted() const { return tokens_ * k_ - slots(); }

  /// First slot of every expert and, last, the number of slots: [E + 1].
  std::span<const slot_id> offsets() const { return offsets_; }
  /// Tokens that expert e serves.
  index_t load(index_t e) const {
    MOEROUTE_EXPECTS(e >= 0 && e < experts_);
    return offsets_[e + 1] - offsets_[e];
  }
  /// The token whose row belongs in each slot: [slots].
  std::span<const slot_id> token_of_slot() const {
    return {token_of_slot_.data(), static_cast<std::size_t>(slots())};
  }
  /// The slot of every choice, token by token, or no_slot: [T, k].
  std::span<const slot_id> slot_of_choice() const { return slot_of_choice_; }

  /// For the stage that builds the plan.
  struct parts {
    slot_id* offsets;
    slot_id* token_of_slot;
    slot_id* slot_of_choice;
    slot_id* cursor;
  };
  parts writable() {
    return {offsets_.data(), token_of_slot_.data(), slot_of_choice_.data(), cursor_.data()};
  }

 private:
  index_t tokens_ = 0;
  index_t experts_ = 0;
  index_t k_ = 0;
  buffer<slot_id> offsets_;
  buffer<slot_id> token_of_slot_;
  buffer<slot_id> slot_of_choice_;
  buffer<slot_id> cursor_;
};

}  // namespace moeroute
