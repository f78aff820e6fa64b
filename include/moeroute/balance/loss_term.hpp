// What a balancing loss is made of: its parts, what the losses of a call share, what they check.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

#include <moeroute/base/error.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/probability/close_probability_rows.hpp>
#include <moeroute/simd/probability/open_probability_rows.hpp>

namespace moeroute {

using simd::probability;

/// What the losses of one call have in common.
struct loss_options {
  probability scores = probability::softmax;
  gradient_to gradient = gradient_to::write;  ///< write: masked rows become 0; add: they stay
  float sigmoid_eps = 0.0f;                   ///< added to the sum of a row's scores
  std::span<const std::uint8_t> mask{};       ///< [T], 0: the token takes no part; empty: all do
  index_t sequence_length = 0;                ///< of losses by sequence; 0: there are none
};

/// Where a loss of its own function puts its gradient, and which tokens take part.
struct token_options {
  gradient_to gradient = gradient_to::write;  ///< write: masked rows become 0; add: they stay
  std::span<const std::uint8_t> mask{};       ///< [T], 0: the token takes no part; empty: all do

  bool masked(index_t t) const { return !mask.empty() && mask[static_cast<std::size_t>(t)] == 0; }
};

/// What a loss knows before the first sweep.
struct loss_shape {
  index_t experts;
  index_t tokens;     ///< without the masked ones
  index_t sequences;  ///< that have at least one token
  index_t all_sequences;
};

/// A loss by its parts; it has at least one of
///
///   expert_slope(shape, c)   c[e] += d value / d sum_e, known beforehand; sum_e = sum over tokens
///                            of p[t, e], and the value is linear in it
///   from_sums(shape, sum, c) the value; c[e] += its derivative by sum[e]. Costs a second sweep.
///   functions                a static set of simd::row_function, with row_weights(shape) and
///                            value = sum of weight * function over tokens
///   sequence_slope(shape, sequence, tokens, c)  as expert_slope, for one sequence
///
/// Counts are constants in all of them. Reason: with these four, one pass over the softmax serves
/// every loss.
template <class L>
concept loss_term = requires(const L& loss, const loss_shape& shape) {
  { loss.check(shape) };  // throws error where the loss does not fit
} && (requires(const L& l, const loss_shape& s, double* c) { l.expert_slope(s, c); } ||
      requires(const L& l, const loss_shape& s, const double* sum, double* c) {
        { l.from_sums(s, sum, c) } -> std::convertible_to<double>;
      } || requires(const L& l, const loss_shape& s) {
        { l.row_weights(s) } -> std::same_as<simd::row_functions<double>>;
      } || requires(const L& l, const loss_shape& s, index_t n, double* c) {
        l.sequence_slope(s, n, n, c);
      });

/// The values of n losses, in the order of the arguments.
template <std::size_t n>
struct loss_values {
  std::array<double, n> value{};

  double total() const {
    double sum = 0.0;
    for (const double v : value) sum += v;
    return sum;
  }
  double operator[](std::size_t i) const { return value[i]; }
};

namespace detail {

template <class L>
concept has_expert_slope =
    requires(const L& l, const loss_shape& s, double* c) { l.expert_slope(s, c); };
template <class L>
concept has_sums = requires(const L& l, const loss_shape& s, const double* sum, double* c) {
  l.from_sums(s, sum, c);
};
template <class L>
concept has_row_functions = requires(const L& l, const loss_shape& s) { l.row_weights(s); };
template <class L>
concept has_sequences = requires(const L& l, const loss_shape& s, index_t n, double* c) {
  l.sequence_slope(s, n, n, c);
};

template <class L>
constexpr unsigned functions_of() {
  if constexpr (has_row_functions<L>) return L::functions;
  return simd::no_function;
}

// Coefficients must not be negative: a loss of the wrong sign unbalances in silence.
inline void check_coefficient(const char* where, double coefficient) {
  if (!(coefficient >= 0.0) || std::isinf(coefficient)) [[unlikely]]
    fail_value(where, "coefficient", coefficient, ">= 0");
}

// How many tokens (or sequences) a mean runs over, where it runs over more than one call: ranks,
// layers, micro-steps with padding of their own.
inline void check_whole(const char* where, const char* what, double whole) {
  if (!(whole >= 0.0) || std::isinf(whole)) [[unlikely]]
    fail_value(where, what, whole, ">= 0");
}
inline double tokens_of(const loss_shape& shape, double whole) {
  return whole > 0.0 ? whole : static_cast<double>(shape.tokens);
}

inline void check_counts(const char* where, std::span<const double> counts, index_t expected) {
  check_size(where, "counts.size", static_cast<index_t>(counts.size()), expected);
  for (const double c : counts)
    if (!(c >= 0.0) || std::isinf(c)) [[unlikely]]
      fail_value(where, "a count", c, ">= 0");
}

// The shapes that every loss of logits has in common.
template <class F>
void check_loss_shapes(const char* where, gradient_to gradient, std::span<const std::uint8_t> mask,
                       const matrix_view<const F>& z, const matrix_view<F>& dz) {
  check_range(where, "experts", z.cols, 1, max_experts);
  check_stride(where, "logits", z);
  if (!mask.empty()) check_size(where, "mask.size", static_cast<index_t>(mask.size()), z.rows);
  if (gradient == gradient_to::nowhere) return;
  check_size(where, "dlogits.rows", dz.rows, z.rows);
  check_size(where, "dlogits.cols", dz.cols, z.cols);
  check_stride(where, "dlogits", dz);
  check_apart(where, "logits", z, "dlogits", dz);
}

inline index_t live_tokens(const token_options& how, index_t tokens) {
  index_t n = 0;
  for (index_t t = 0; t < tokens; ++t) n += !how.masked(t);
  return n;
}

// Pieces of a sweep: at least 64 tokens each, at most 1024 of them.
inline index_t loss_grain(index_t tokens) {
  return round_up(std::max<index_t>(64, ceil_div(tokens, 1024)), block_rows);
}

}  // namespace detail

}  // namespace moeroute
