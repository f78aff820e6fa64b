// What a layer is asked for beside its gate, router and experts.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/combine.hpp>

namespace moeroute {

/// The steps of a layer, as a probe hears of them.
enum class layer_step { gate, route, plan, dispatch, experts, combine, done };

/// Hears of nothing and costs nothing.
struct no_probe {
  void operator()(layer_step) const {}
};

/// A layer without shared experts.
struct no_shared_experts {};

/// Experts that are not networks. Ids outside of both ranges belong to the layer's Experts; a
/// constant expert is an expert function like any other.
struct special_experts {
  /// Their output is the token itself: weight * x[t] enters the sum in rank order.
  expert_id identity_first = 0;
  expert_id identity_end = 0;
  /// Their output is zero: the token spends a choice and nothing else.
  expert_id zero_first = 0;
  expert_id zero_end = 0;

  bool any() const { return identity_first < identity_end || zero_first < zero_end; }
  bool contains(index_t e) const {
    return (e >= identity_first && e < identity_end) || (e >= zero_first && e < zero_end);
  }
};

/// Where a choice's weight is applied.
enum class weight_on {
  output,  ///< to what the expert gives
  input,   ///< to what the expert gets (Llama 4)
};

/// What the output of shared experts is multiplied with.
struct shared_expert_weight {
  float scale = 1.0f;
  /// [d], the shared experts' own gate: times sigmoid(x[t] . gate) (Qwen2-MoE, Qwen3-Next). Empty:
  /// the scale alone. The layer keeps a copy.
  std::span<const float> gate{};
};

struct moe_layer_options {
  /// Width of x and of y; 0: the gate's, and what experts say in d_out() or x's.
  index_t d = 0, d_out = 0;
  std::optional<capacity_policy> capacity{};
  special_experts special{};
  weight_on weights = weight_on::output;
  lost_token lost = lost_token::zero;
  /// accumulate: y gets the sum added (a residual stream, where y is x).
  combine_output output = combine_output::overwrite;
  shared_expert_weight shared{};
  /// Most rows that an expert is called with at once, 0: all that it has.
  index_t rows_per_call = 0;
};

/// Tokens up to which a layer runs experts on the rows of x itself instead of gathered copies.
inline constexpr index_t decode_tokens = 8;

namespace detail {

// Where d and d_out are what the layer found them to be.
inline void check_options(const moe_layer_options& options, index_t experts, bool with_shared) {
  constexpr const char* where = "moe_layer";
  check_range(where, "d", options.d, 1, index_t{1} << 40);
  check_range(where, "d_out", options.d_out, 1, index_t{1} << 40);
  const special_experts& s = options.special;
  if (s.identity_first < s.identity_end || options.lost != lost_token::zero)
    check_size(where, "d_out with x in the output", options.d_out, options.d);
  if (options.lost == lost_token::mix && options.weights == weight_on::input)
    fail(where, "lost_token::mix shares x by the weights of outputs, not of inputs");
  check_range(where, "identity_first", s.identity_first, 0, s.identity_end);
  check_range(where, "identity_end", s.identity_end, 0, experts);
  check_range(where, "zero_first", s.zero_first, 0, s.zero_end);
  check_range(where, "zero_end", s.zero_end, 0, experts);
  if (std::max(s.identity_first, s.zero_first) < std::min(s.identity_end, s.zero_end))
    fail(where,
         {"identity experts [", s.identity_first, ", ", s.identity_end, ") and zero experts [",
          s.zero_first, ", ", s.zero_end, ") overlap, expected ranges of their own"});
  if (options.capacity) options.capacity->rule.check();
  const shared_expert_weight& weight = options.shared;
  if (!with_shared && (weight.scale != 1.0f || !weight.gate.empty()))
    fail(where, "shared experts have a weight, but there are none");
  if (!std::isfinite(weight.scale))
    fail_value(where, "shared.scale", weight.scale, "a finite number");
}

}  // namespace detail

}  // namespace moeroute
