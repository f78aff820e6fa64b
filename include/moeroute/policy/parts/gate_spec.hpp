// What makes a router's logits, as a description names it: the kinds of gates and their shapes.
#pragma once

#include <moeroute/base/index.hpp>

namespace moeroute {

/// What the logits of a router are of its rows; stage/gates/make_gate.hpp makes one.
enum class gate_kind {
  linear,           ///< x W^T + b
  cosine,           ///< cos(x, w_e) / temperature
  low_rank_cosine,  ///< cos(P x, w_e) / temperature, P of `width` rows
  rms,              ///< scale * x / RMS(x), then linear (Gemma 4)
  mlp,              ///< a hidden layer of `width`
  codebook,         ///< the nearest of `width` codes
  mixing,           ///< probabilities of a linear gate, mixed over similar tokens
  none,             ///< none: logits come from outside, or nobody reads them
};

/// What an mlp_gate does to its hidden values.
enum class gate_activation { relu, tanh, silu };

/// A gate as data.
struct gate_spec {
  gate_kind kind = gate_kind::linear;
  index_t d = 0;      ///< of the rows; 0: what the weights have
  index_t width = 0;  ///< of what lies between: rank, hidden values or codes
  gate_activation activation = gate_activation::relu;
  float temperature = 1.0f;
  float scale = 1.0f;
  float eps = 1e-6f;

  bool operator==(const gate_spec&) const = default;

  constexpr bool has_width() const {
    return kind == gate_kind::low_rank_cosine || kind == gate_kind::mlp ||
           kind == gate_kind::codebook;
  }
  constexpr bool has_temperature() const {
    return kind == gate_kind::cosine || kind == gate_kind::low_rank_cosine ||
           kind == gate_kind::mixing;
  }
  /// Whether it can have a bias per column.
  constexpr bool has_bias() const {
    return kind == gate_kind::linear || kind == gate_kind::rms || kind == gate_kind::mlp ||
           kind == gate_kind::mixing;
  }
};

}  // namespace moeroute
