// Where every choice goes: slots in expert-major order, and the way back. Built once per layer,
// then read only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>

namespace moeroute {

/// A slot that holds no token: empty padding behind an expert's rows.
inline constexpr slot_id no_token = -1;

/// The expert-major order of an assignment's choices.
///
/// Expert e owns the slots [offsets[e], offsets[e + 1]): first its load(e) rows in token order,
/// then padding, if the plan was padded. Every choice either has a slot, or was dropped, or names
/// an expert that this plan leaves to others, or has no expert (a masked token's choices count
/// among those): kept + dropped + elsewhere + unrouted = choices. Storage is reused.
/// Example:
///
///     for (index_t e = 0; e < slots.experts(); ++e)
///       for (index_t s = slots.offsets()[e]; s < slots.offsets()[e] + slots.load(e); ++s)
///         visit(slots.token_of_slot()[s], e, 1.0f);
class dispatch_plan {
 public:
  /// Room for a plan of T tokens with k choices each over E experts and no padding, contents
  /// unspecified.
  void reset(index_t tokens, index_t experts, index_t k) {
    const index_t choices = size_product(tokens, k);
    reset(tokens, experts, k, choices, choices);
  }

  /// The same with room for so many choices in all, k at most per token, and so many slots.
  ///
  /// Throws: error where `choices` or `slots` exceeds 2^31 - 1.
  void reset(index_t tokens, index_t experts, index_t k, index_t choices, index_t slots) {
    // The shape that it has already, as in every step of a decoder, has been checked.
    if (tokens == tokens_ && experts == experts_ && k == k_ && choices == choices_ && !ragged_ &&
        !padded_ && choices > 0 && offsets_.size() == experts + 1 &&
        slot_of_choice_.size() == choices && token_of_slot_.size() == slots) [[likely]] {
      dropped_ = elsewhere_ = padding_ = 0;
      return;
    }
    make_room(tokens, experts, k, choices, slots);
  }

  index_t tokens() const { return tokens_; }
  index_t experts() const { return experts_; }
  /// Choices per token, at most that many where the plan is ragged.
  index_t k() const { return k_; }
  bool ragged() const { return ragged_; }

  /// All choices of the assignment: T * k in the fixed form.
  index_t choices() const { return choices_; }
  /// Index of a token's first choice.
  index_t first(index_t token) const { return ragged_ ? index_t{first_[token]} : token * k_; }
  /// A token's number of choices.
  index_t count(index_t token) const { return first(token + 1) - first(token); }

  /// Rows of the expert-major matrices: kept choices and padding.
  index_t slots() const { return experts_ == 0 ? 0 : offsets_[experts_]; }
  /// Choices with a slot.
  index_t kept() const { return slots() - padding_; }
  /// Slots that no choice has: behind each expert's own, empty or with spare tokens.
  index_t padding() const { return padding_; }
  /// Choices that capacity dropped.
  index_t dropped() const { return dropped_; }
  /// Choices of experts that the plan leaves to others.
  index_t elsewhere() const { return elsewhere_; }
  /// Choices without an expert, and those of masked tokens.
  index_t unrouted() const { return choices_ - kept() - dropped_ - elsewhere_; }

  /// First slot of every expert and, last, the number of slots: [E + 1].
  std::span<const slot_id> offsets() const { return offsets_; }
  /// Tokens that expert e serves.
  index_t load(index_t e) const {
    MOEROUTE_EXPECTS(e >= 0 && e < experts_);
    return padded_ ? load_[e] : offsets_[e + 1] - offsets_[e];
  }
  /// Slots that expert e owns: load(e) and padding.
  index_t rows(index_t e) const {
    MOEROUTE_EXPECTS(e >= 0 && e < experts_);
    return offsets_[e + 1] - offsets_[e];
  }
  /// The token whose row belongs in each slot, no_token where the padding is empty: [slots].
  std::span<const slot_id> token_of_slot() const {
    return {token_of_slot_.data(), static_cast<std::size_t>(slots())};
  }
  /// The slot of every choice, token by token, or no_slot: [choices].
  std::span<const slot_id> slot_of_choice() const {
    return {slot_of_choice_.data(), static_cast<std::size_t>(choices_)};
  }

  /// For the stage that builds the plan.
  struct parts {
    slot_id* offsets;         ///< [E + 1]
    slot_id* token_of_slot;   ///< [slots]
    slot_id* slot_of_choice;  ///< [choices]
  };
  parts writable() { return {offsets_.data(), token_of_slot_.data(), slot_of_choice_.data()}; }

  /// For the stage that builds the plan: makes it ragged, and returns the room for T + 1 offsets.
  std::int32_t* first_to_fill() {
    ragged_ = true;
    first_.resize(tokens_ + 1);
    return first_.data();
  }
  /// For the stage that builds the plan: scratch of one integer for each choice of the reset.
  std::int32_t* token_of_choice() {
    token_of_choice_.resize(slot_of_choice_.size());
    return token_of_choice_.data();
  }
  /// For the stage that builds the plan: makes it padded, and returns the room for E loads.
  std::int32_t* loads_to_fill() {
    padded_ = true;
    load_.resize(experts_);
    return load_.data();
  }
  /// For the stage that builds the plan: fewer choices than there is room for.
  void set_choices(index_t choices) {
    MOEROUTE_EXPECTS(choices <= slot_of_choice_.size());
    choices_ = choices;
  }
  void set_counts(index_t dropped, index_t elsewhere, index_t padding) {
    dropped_ = dropped;
    elsewhere_ = elsewhere;
    padding_ = padding;
  }

 private:
  MOEROUTE_OUT_OF_LINE void make_room(index_t tokens, index_t experts, index_t k, index_t choices,
                                      index_t slots) {
    check_range("plan", "choices", choices, 0, std::int32_t{0x7fffffff});
    check_range("plan", "slots", slots, 0, std::int32_t{0x7fffffff});
    tokens_ = experts_ = choices_ = 0;  // until there is room
    ragged_ = padded_ = false;
    dropped_ = elsewhere_ = padding_ = 0;
    offsets_.resize(experts + 1);
    token_of_slot_.resize(slots);
    slot_of_choice_.resize(choices);
    tokens_ = tokens;
    experts_ = experts;
    k_ = k;
    choices_ = choices;
  }

  index_t tokens_ = 0;
  index_t experts_ = 0;
  index_t k_ = 0;
  index_t choices_ = 0;
  index_t dropped_ = 0;
  index_t elsewhere_ = 0;
  index_t padding_ = 0;
  bool ragged_ = false;
  bool padded_ = false;
  buffer<slot_id> offsets_;
  buffer<slot_id> token_of_slot_;
  buffer<slot_id> slot_of_choice_;
  buffer<std::int32_t> first_;
  buffer<std::int32_t> token_of_choice_;
  buffer<std::int32_t> load_;
};

}  // namespace moeroute
