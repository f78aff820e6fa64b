// The bias that moves the choice and never the weight.
#pragma once

#include <cmath>
#include <span>

#include <moeroute/base/lasting_span.hpp>
#include <moeroute/policy/concepts.hpp>

namespace moeroute {

/// A float per expert, added to the scores for the choice only; empty for none. The caller keeps
/// the values alive.
///
/// 16-bit biases do not compile: rounding them changes who is chosen. Source: DeepSeek-V3 (2024),
/// the auxiliary-loss-free bias of Wang et al. 2024.
class selection_bias {
 public:
  selection_bias() = default;
  /// Throws: error where a value is NaN, which would put its expert anywhere.
  selection_bias(lasting_span<const float> values) : values_(values) {
    check_numbers("selection_bias", "bias", values.data(), static_cast<index_t>(values.size()));
  }

  template <std::ranges::range R>
    requires(sizeof(std::ranges::range_value_t<R>) == 2)
  selection_bias(R&&) {
    static_assert(
        sizeof(std::ranges::range_value_t<R>) != 2,
        "[moeroute::selection_bias] a selection bias is float: 16 bits would change who is chosen");
  }

  bool empty() const { return values_.empty(); }
  std::span<const float> values() const { return values_; }

  /// Throws: error where the length is not E.
  void check(index_t experts) const {
    if (empty()) return;
    check_size("selection_bias", "bias.size()", static_cast<index_t>(values_.size()), experts);
  }

 private:
  std::span<const float> values_{};
};

}  // namespace moeroute
