// What routing decided: which experts each token goes to, with which weights. Holds and checks,
// decides nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>

namespace moeroute {

namespace detail {

// A buffer, or memory of the caller's that takes its place. A copy owns what it holds.
template <class T>
class lendable {
 public:
  lendable() = default;
  lendable(const lendable& other) { *this = other; }
  lendable(lendable&& other) noexcept { *this = std::move(other); }
  lendable& operator=(const lendable& other) {
    if (this == &other) return *this;
    lent_ = -1;
    own_.resize(other.size_);
    std::copy_n(other.data_, other.size_, own_.data());
    point(own_.data(), other.size_);
    return *this;
  }
  lendable& operator=(lendable&& other) noexcept {
    own_ = std::move(other.own_);
    lent_ = std::exchange(other.lent_, -1);
    point(std::exchange(other.data_, nullptr), std::exchange(other.size_, 0));
    return *this;
  }

  void lend(std::span<T> memory) {
    lent_ = static_cast<index_t>(memory.size());
    point(memory.data(), 0);
  }

  void resize(index_t n, const char* what) {
    if (lent_ < 0) {
      own_.resize(n);
      data_ = own_.data();
    } else if (n > lent_) [[unlikely]] {
      fail_value("assignment", what, lent_, "room for ", n);
    }
    size_ = n;
  }

  T* data() const { return data_; }
  index_t size() const { return size_; }

 private:
  void point(T* data, index_t size) {
    data_ = data;
    size_ = size;
  }

  buffer<T> own_;
  T* data_ = nullptr;
  index_t size_ = 0;
  index_t lent_ = -1;  // values that there is room for in the caller's memory; -1: own_ is used
};

}  // namespace detail

/// The sparse T x E result of routing: per token a list of choices (expert, weight).
///
/// Two forms. Fixed: every token has k choices, best first; one that could not be made has id
/// no_expert and weight 0. Ragged: token t has the choices [first(t), first(t + 1)), possibly none.
/// A choice that capacity dropped keeps its id, has weight 0 and kept() false. Routers choose
/// distinct experts; whoever writes choices of his own may name one twice for a token in the fixed
/// form: it gets a slot for each, and combine adds both. Storage is reused: a warm reset() with
/// sizes seen before allocates nothing. Example:
///
///     for (index_t t = 0; t < choices.tokens(); ++t)
///       for (std::size_t i = 0; i < choices.ids(t).size(); ++i)
///         visit(t, choices.ids(t)[i], choices.weights(t)[i]);
class assignment {
 public:
  assignment() = default;

  /// An assignment whose choices lie in the caller's memory, which must outlive it: room for as
  /// many choices as the shorter of both. A copy has memory of its own.
  ///
  /// Throws: (on reset) error where T * k choices have no room.
  static assignment over(std::span<expert_id> ids, std::span<float> weights) {
    assignment a;
    a.ids_.lend(ids);
    a.weights_.lend(weights);
    return a;
  }

  /// The fixed form: room for k choices per token, contents unspecified, nothing dropped.
  ///
  /// Throws: error where T < 0, E is outside [1, 2^20], k is outside [1, E], or T * k exceeds 2^31
  /// - 1.
  void reset(index_t tokens, index_t experts, index_t k) {
    // The shape that it has already, as in every step of a decoder, has been checked.
    if (tokens == tokens_ && experts == experts_ && k == k_ && !ragged_ && choices_ > 0 &&
        ids_.size() == choices_ && weights_.size() == choices_) [[likely]] {
      drops_ = false;
      return;
    }
    prepare(tokens, experts, k, room_of(tokens, k), false);
    choices_ = tokens * k;
  }

  /// The ragged form: room for up to `most` choices per token. The writer fills offsets_to_fill()
  /// and, with it, the choices; then calls close().
  void reset_ragged(index_t tokens, index_t experts, index_t most) {
    reset_ragged(tokens, experts, most, room_of(tokens, most));
  }

  /// The same with room for `choices` choices in all: for writers that know their number.
  void reset_ragged(index_t tokens, index_t experts, index_t most, index_t choices) {
    prepare(tokens, experts, most, choices, true);
  }

  /// Ends the writing of the ragged form: offsets are complete.
  void close() {
    MOEROUTE_EXPECTS(ragged_);
    choices_ = offsets_[tokens_];
  }

  /// Flags for dropped choices, all set to kept; the writer clears those that were dropped.
  std::span<std::uint8_t> kept_to_fill() {
    kept_.resize(choices_);
    std::fill_n(kept_.data(), choices_, std::uint8_t{1});
    drops_ = true;
    return kept_;
  }

  /// The flags as they are, all set to kept where nothing was dropped yet.
  std::span<std::uint8_t> kept_to_change() {
    return drops_ ? std::span<std::uint8_t>(kept_.data(), size()) : kept_to_fill();
  }

  index_t tokens() const { return tokens_; }
  index_t experts() const { return experts_; }
  /// Choices per token in the fixed form, at most that many in the ragged one.
  index_t k() const { return k_; }
  bool ragged() const { return ragged_; }
  /// All choices: T * k in the fixed form.
  index_t choices() const { return choices_; }
  /// Choices that there is room for: what the shapes allow, where choices() varies from call to
  /// call.
  index_t room() const { return ids_.size(); }

  /// Index of a token's first choice.
  index_t first(index_t token) const { return ragged_ ? index_t{offsets_[token]} : token * k_; }
  /// A token's number of choices.
  index_t count(index_t token) const { return first(token + 1) - first(token); }

  /// Every choice's expert, token by token.
  std::span<expert_id> ids() { return {ids_.data(), size()}; }
  std::span<const expert_id> ids() const { return {ids_.data(), size()}; }
  /// Every choice's weight, token by token.
  std::span<float> weights() { return {weights_.data(), size()}; }
  std::span<const float> weights() const { return {weights_.data(), size()}; }

  /// One token's experts.
  std::span<const expert_id> ids(index_t token) const {
    MOEROUTE_EXPECTS(token >= 0 && token < tokens_);
    return {ids_.data() + first(token), static_cast<std::size_t>(count(token))};
  }
  /// One token's weights, in the order of ids(token).
  std::span<const float> weights(index_t token) const {
    MOEROUTE_EXPECTS(token >= 0 && token < tokens_);
    return {weights_.data() + first(token), static_cast<std::size_t>(count(token))};
  }

  /// Whether choices may have been dropped.
  bool drops() const { return drops_; }
  /// False for a choice that capacity dropped.
  bool kept(index_t choice) const { return !drops_ || kept_[choice] != 0; }
  /// The flags of all choices, 1 for kept; empty where nothing can have been dropped.
  std::span<const std::uint8_t> kept() const {
    return {kept_.data(), drops_ ? size() : std::size_t{0}};
  }

  /// First choice of every token, [T + 1]; empty in the fixed form.
  std::span<const std::int32_t> offsets() const {
    return {offsets_.data(), ragged_ ? static_cast<std::size_t>(tokens_ + 1) : std::size_t{0}};
  }

  /// For writers of the ragged form: raw room for the choices asked for and T + 1 offsets.
  struct parts {
    expert_id* ids;
    float* weights;
    std::int32_t* offsets;
  };
  parts to_fill() { return {ids_.data(), weights_.data(), offsets_.data()}; }

 private:
  std::size_t size() const { return static_cast<std::size_t>(choices_); }

  // Not checked yet: negative sizes are refused by their own names.
  static index_t room_of(index_t tokens, index_t k) {
    return tokens < 0 || k < 0 ? 0 : size_product(tokens, k);
  }

  MOEROUTE_OUT_OF_LINE void prepare(index_t tokens, index_t experts, index_t k, index_t room,
                                    bool ragged) {
    check_range("assignment", "tokens", tokens, 0, std::int32_t{0x7fffffff});
    check_range("assignment", "experts", experts, 1, max_experts);
    check_range("assignment", "k", k, 1, experts);
    check_range("assignment", room == tokens * k ? "tokens * k" : "choices", room, 0,
                std::int32_t{0x7fffffff});
    // Without memory an assignment of no tokens is left.
    tokens_ = choices_ = 0;
    ragged_ = drops_ = false;
    ids_.resize(room, "ids.size()");
    weights_.resize(room, "weights.size()");
    if (ragged) offsets_.resize(tokens + 1);
    tokens_ = tokens;
    experts_ = experts;
    k_ = k;
    ragged_ = ragged;
  }

  index_t tokens_ = 0;
  index_t experts_ = 0;
  index_t k_ = 0;
  index_t choices_ = 0;
  bool ragged_ = false;
  bool drops_ = false;
  detail::lendable<expert_id> ids_;
  detail::lendable<float> weights_;
  buffer<std::int32_t> offsets_;
  buffer<std::uint8_t> kept_;
};

}  // namespace moeroute
