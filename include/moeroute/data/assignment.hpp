// What routing decided: which experts each token goes to, with which weights. Holds and checks, decides nothing.
#pragma once

#include <cstdint>
#include <span>

#include <moeroute/base/contract.hpp>
#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/base/workspace.hpp>

namespace moeroute {

/// The sparse T x E result of routing: per token a list of choices (expert, weight), best first.
///
/// A choice that could not be made has id no_expert and weight 0. Storage is reused: a warm reset() with sizes
/// seen before allocates nothing.
class assignment {
 public:
  assignment() = default;

  /// Room for k choices per token, contents unspecified.
  ///
  /// Throws: error where T < 0, E is outside [1, 2^20], k is outside [1, E], or T * k exceeds 2^31 - 1.
  void reset(index_t tokens, index_t experts, index_t k) {
    check_range("assignment", "tokens", tokens, 0, std::int32_t{0x7fffffff});
    check_range("assignment", "experts", experts, 1, max_experts);
    check_range("assignment", "k", k, 1, experts);
    check_range("assignment", "tokens * k", tokens * k, 0, std::int32_t{0x7fffffff});
    tokens_ = tokens;
    experts_ = experts;
    k_ = k;
    ids_.resize(tokens * k);
    weights_.resize(tokens * k);
  }

  index_t tokens() const { return tokens_; }
  index_t experts() const { return experts_; }
  /// Choices per token.
  index_t k() const { return k_; }
  /// All choices, T * k.
  index_t choices() const { return tokens_ * k_; }

  /// Every choice's expert, token by token: [T, k].
  std::span<expert_id> ids() { return ids_; }
  std::span<const expert_id> ids() const { return ids_; }
  /// Every choice's weight, token by token: [T, k].
  std::span<float> weights() { return weights_; }
  std::span<const float> weights() const { return weights_; }

  /// One token's experts, best first.
  std::span<const expert_id> ids(index_t token) const {
    MOEROUTE_EXPECTS(token >= 0 && token < tokens_);
    return {ids_.data() + token * k_, static_cast<std::size_t>(k_)};
  }
  /// One token's weights, in the order of ids(token).
  std::span<const float> weights(index_t token) const {
    MOEROUTE_EXPECTS(token >= 0 && token < tokens_);
    return {weights_.data() + token * k_, static_cast<std::size_t>(k_)};
  }

 private:
  index_t tokens_ = 0;
  index_t experts_ = 0;
  index_t k_ = 0;
  buffer<expert_id> ids_;
  buffer<float> weights_;
};

}  // namespace moeroute
