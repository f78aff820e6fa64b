// Losses of single tokens: router z, entropy, Tsallis entropy, sparsity. With `tokens` the values
// and gradients of parts (micro-steps, ranks) add up to those of the whole, however uneven their
// padding.
#pragma once

#include <moeroute/balance/loss.hpp>

namespace moeroute {

/// Router z-loss: coefficient * mean_t lse(z_t)^2, lse = log sum exp. Keeps logits small.
///
/// Backward: dz[t, i] = 2 coefficient / T * lse_t * p[t, i]. Ensures: gradient 0 iff lse is 0. Not
/// invariant to a shift of the logits. Throws: error where coefficient < 0. Source: Zoph et al.
/// 2022.
struct router_z_loss {
  double coefficient = 1e-3;
  double tokens = 0.0;  ///< T of the whole where this call is a part; 0: the tokens of this call
  static constexpr unsigned functions = simd::square_lse;

  void check(const loss_shape&) const {
    detail::check_coefficient("router_z_loss", coefficient);
    detail::check_whole("router_z_loss", "tokens", tokens);
  }
  simd::row_functions<double> row_weights(const loss_shape& shape) const {
    return {.square_lse = coefficient / detail::tokens_of(shape, tokens)};
  }
};
static_assert(loss_term<router_z_loss>);

/// Entropy of tokens: coefficient * mean_t H(p_t), H = -sum p ln p. Minimising it sharpens.
///
/// Backward: dz[t, i] = -coefficient / T * p_i (ln p_i + H). Ensures: in coefficient * [0, ln E].
/// Throws: error where coefficient < 0. Source: Huang et al. 2024 (dynamic routing, top-p).
struct token_entropy_loss {
  double coefficient = 1e-4;
  double tokens = 0.0;  ///< T of the whole where this call is a part; 0: the tokens of this call
  static constexpr unsigned functions = simd::entropy;

  void check(const loss_shape&) const {
    detail::check_coefficient("token_entropy_loss", coefficient);
    detail::check_whole("token_entropy_loss", "tokens", tokens);
  }
  simd::row_functions<double> row_weights(const loss_shape& shape) const {
    return {.entropy = coefficient / detail::tokens_of(shape, tokens)};
  }
};
static_assert(loss_term<token_entropy_loss>);

/// Tsallis entropy of tokens: coefficient * mean_t (1 - sum_e p^q) / (q - 1). As q goes to 1 it
/// becomes token_entropy_loss, whose formula is the one to take there.
///
/// Backward: G[t, e] = -coefficient * q p^(q - 1) / ((q - 1) T). Ensures: in coefficient *
/// [0, (1 - E^(1 - q)) / (q - 1)]. Throws: error where coefficient < 0, q <= 0, or q is within 1e-3
/// of 1, where the quotient loses its digits; or another loss of the call has another q.
/// Source: DynMoLE (Li et al. 2025).
struct tsallis_loss {
  double coefficient = 0.01;
  double q = 1.1;
  double tokens = 0.0;  ///< T of the whole where this call is a part; 0: the tokens of this call
  static constexpr unsigned functions = simd::power;

  void check(const loss_shape&) const {
    detail::check_coefficient("tsallis_loss", coefficient);
    detail::check_whole("tsallis_loss", "tokens", tokens);
    if (!(q > 0.0) || std::abs(q - 1.0) < 1e-3 || std::isinf(q))
      fail_value("tsallis_loss", "q", q, "> 0 and not 1");
  }
  simd::row_functions<double> row_weights(const loss_shape& shape) const {
    return {.power = coefficient / detail::tokens_of(shape, tokens), .q = q};
  }
};
static_assert(loss_term<tsallis_loss>);

/// SpeechMoE's sparsity: coefficient * mean_t |p_t / (|p_t|_2 + 1e-9)|_1, which for probabilities
/// is 1 / |p_t|_2. Minimising it sharpens.
///
/// Backward: G[t, e] = -coefficient / T * p_e / (|p| (|p| + 1e-9)^2). Ensures: in coefficient *
/// [1, sqrt E]. Throws: error where coefficient < 0. Source: You et al. 2021.
struct sparsity_loss {
  double coefficient = 0.1;
  double tokens = 0.0;  ///< T of the whole where this call is a part; 0: the tokens of this call
  static constexpr unsigned functions = simd::inverse_norm;

  void check(const loss_shape&) const {
    detail::check_coefficient("sparsity_loss", coefficient);
    detail::check_whole("sparsity_loss", "tokens", tokens);
  }
  simd::row_functions<double> row_weights(const loss_shape& shape) const {
    return {.inverse_norm = coefficient / detail::tokens_of(shape, tokens), .offset = 1e-9};
  }
};
static_assert(loss_term<sparsity_loss>);

}  // namespace moeroute
