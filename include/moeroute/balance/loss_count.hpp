// Losses that multiply a count, which is a constant, with a mean probability: Switch and GShard
// with their normalisations, by sequence, by device, communication, specialisation balance.
#pragma once

#include <moeroute/balance/loss.hpp>

namespace moeroute {

namespace detail {

inline void check_k(const char* where, index_t k) { check_range(where, "k", k, 1, max_experts); }

}  // namespace detail

/// Switch / GShard load balancing: coefficient * E / (divisor N^2) * sum_e count_e sum_t p[t, e].
///
/// Backward: G[t, e] = coefficient * E * count_e / (divisor N^2). With N = the tokens of the call
/// and divisor = k the value is `coefficient` at balance and at most E times that where p follows
/// the counts. `tokens` is N where counts are summed over more than this call (ranks, layers,
/// micro-steps); values and gradients of the parts then add up to those of the whole.
/// Throws: error where counts are not E numbers >= 0, or coefficient, divisor or tokens is
/// negative. Source: Lepikhin et al. 2020, Fedus et al. 2021; the forms below by the projects they
/// name.
struct switch_loss {
  double coefficient = 0.01;
  std::span<const double> counts{};  ///< [E]
  double divisor = 1.0;
  double tokens = 0.0;  ///< N; 0: the tokens of this call

  /// Megatron-LM's aux_loss and global_aux_loss: all k choices, counts of the whole group.
  static switch_loss megatron(double coefficient, std::span<const double> counts, index_t k,
                              double group_tokens = 0.0) {
    return {coefficient, counts, static_cast<double>(k), group_tokens};
  }
  /// DeepSpeed's top-1 and top-2 gate and Tutel's gshard_loss: counts of the first choice.
  static switch_loss first_choice(double coefficient, std::span<const double> counts) {
    return {coefficient, counts, 1.0, 0.0};
  }
  /// DeepSpeed's gate for k > 2: all k choices, divided by k.
  static switch_loss deepspeed_top_k(double coefficient, std::span<const double> counts,
                                     index_t k) {
    return {coefficient, counts, static_cast<double>(k), 0.0};
  }
  /// MegaBlocks: the mean over layers; call it once for each.
  static switch_loss megablocks(double coefficient, std::span<const double> counts, index_t k,
                                index_t layers) {
    return {coefficient, counts, static_cast<double>(k * layers), 0.0};
  }
  /// Hugging Face transformers: all k choices without the division, so k times as much; the layers
  /// are one long batch: counts summed over them, and their tokens.
  static switch_loss hugging_face(double coefficient, std::span<const double> counts,
                                  double tokens_of_all_layers = 0.0) {
    return {coefficient, counts, 1.0, tokens_of_all_layers};
  }

  void check(const loss_shape& shape) const {
    detail::check_coefficient("switch_loss", coefficient);
    detail::check_counts("switch_loss", counts, shape.experts);
    if (!(divisor > 0.0)) fail_value("switch_loss", "divisor", divisor, "> 0");
    detail::check_whole("switch_loss", "tokens", tokens);
  }

  void expert_slope(const loss_shape& shape, double* c) const {
    const double n = detail::tokens_of(shape, tokens);
    const double factor = coefficient * static_cast<double>(shape.experts) / (divisor * n * n);
    for (index_t e = 0; e < shape.experts; ++e)
      c[e] += factor * counts[static_cast<std::size_t>(e)];
  }
};
static_assert(loss_term<switch_loss>);

/// DeepSeek's loss by sequence: the mean over sequences of coefficient * sum_e f_e P_e, with
/// f_e = E count_e / (k S) and P_e the mean of p over the sequence's S tokens.
///
/// Backward: G[t, e] = coefficient * E * count_e / (k S^2 sequences). S and the sequences leave
/// masked tokens out. loss_options::sequence_length says where sequences end; the last may be
/// shorter. `sequences` is how many have a token in more than this call (ranks, micro-steps);
/// values and gradients of the parts then add up to those of the whole. Throws: error where counts
/// are not [sequences, E] and >= 0, or coefficient or sequences is negative. Source: DeepSeek-V3
/// (normalised sigmoid), DeepSeek-V2; Megatron-LM's seq_aux_loss.
struct sequence_loss {
  double coefficient = 1e-4;
  matrix_view<const double> counts{};  ///< [sequences, E]
  index_t k = 1;
  double sequences = 0.0;  ///< that have a token, of the whole; 0: those of this call

  void check(const loss_shape& shape) const {
    detail::check_coefficient("sequence_loss", coefficient);
    detail::check_k("sequence_loss", k);
    detail::check_whole("sequence_loss", "sequences", sequences);
    check_size("sequence_loss", "counts.cols", counts.cols, shape.experts);
    check_size("sequence_loss", "counts.rows", counts.rows, shape.all_sequences);
    check_stride("sequence_loss", "counts", counts);
    for (index_t s = 0; s < counts.rows; ++s)
      detail::check_counts("sequence_loss", {counts.row(s), static_cast<std::size_t>(counts.cols)},
                           shape.experts);
  }

  void sequence_slope(const loss_shape& shape, index_t sequence, index_t tokens, double* c) const {
    const double s = static_cast<double>(tokens);
    const double factor = coefficient * static_cast<double>(shape.experts) /
                          (static_cast<double>(k) * s * s *
                           (sequences > 0.0 ? sequences : static_cast<double>(shape.sequences)));
    for (index_t e = 0; e < shape.experts; ++e) c[e] += factor * counts(sequence, e);
  }
};
static_assert(loss_term<sequence_loss>);

/// DeepSeek-V2's balance of devices: coefficient * sum_g f'_g P'_g, with f'_g the mean of
/// E count_e / (k T) over the experts of device g, and P'_g the sum of their mean probabilities.
///
/// Backward: G[t, e] = coefficient * f'_g / T for e in g. Ensures: `coefficient` at balance; moving
/// probability inside a device changes nothing.
/// Throws: error where counts are not E numbers >= 0, devices does not divide E, or coefficient <
/// 0.
struct device_loss {
  double coefficient = 0.05;
  std::span<const double> counts{};  ///< [E]
  index_t k = 1;
  index_t devices = 1;
  double tokens = 0.0;  ///< T of the whole, as in switch_loss; 0: the tokens of this call

  void check(const loss_shape& shape) const {
    detail::check_coefficient("device_loss", coefficient);
    detail::check_whole("device_loss", "tokens", tokens);
    detail::check_counts("device_loss", counts, shape.experts);
    detail::check_k("device_loss", k);
    check_range("device_loss", "devices", devices, 1, shape.experts);
    check_size("device_loss", "experts % devices", shape.experts % devices, 0);
  }

  void expert_slope(const loss_shape& shape, double* c) const {
    const double n = detail::tokens_of(shape, tokens);
    const index_t each = shape.experts / devices;
    for (index_t g = 0; g < devices; ++g) {
      double load = 0.0;
      for (index_t e = g * each; e < (g + 1) * each; ++e)
        load += counts[static_cast<std::size_t>(e)];
      // f'_g = E / (k T) * load / each, and E / each is the number of devices.
      const double f = static_cast<double>(devices) * load / (static_cast<double>(k) * n);
      for (index_t e = g * each; e < (g + 1) * each; ++e) c[e] += coefficient * f / n;
    }
  }
};
static_assert(loss_term<device_loss>);

/// DeepSeek-V2's balance of communication: coefficient * sum_g f''_g P'_g, with
/// f''_g = D / (M T) * tokens sent to device g, each token once, and P'_g as in device_loss.
///
/// Backward: G[t, e] = coefficient * f''_g / T for e in g. Ensures: `coefficient` at balance, when
/// every token reaches M devices.
/// Throws: error where counts are not D numbers >= 0, D does not divide E, or coefficient < 0.
struct communication_loss {
  double coefficient = 0.02;
  std::span<const double> counts{};  ///< [D], as count_device_tokens gives them
  index_t devices_per_token = 1;     ///< M, the most that a token may reach
  double tokens = 0.0;  ///< T of the whole, as in switch_loss; 0: the tokens of this call

  void check(const loss_shape& shape) const {
    const auto devices = static_cast<index_t>(counts.size());
    detail::check_coefficient("communication_loss", coefficient);
    detail::check_whole("communication_loss", "tokens", tokens);
    check_range("communication_loss", "counts.size", devices, 1, shape.experts);
    detail::check_counts("communication_loss", counts, devices);
    check_size("communication_loss", "experts % devices", shape.experts % devices, 0);
    check_range("communication_loss", "devices_per_token", devices_per_token, 1, devices);
  }

  void expert_slope(const loss_shape& shape, double* c) const {
    const double n = detail::tokens_of(shape, tokens);
    const auto devices = static_cast<index_t>(counts.size());
    const index_t each = shape.experts / devices;
    for (index_t e = 0; e < shape.experts; ++e) {
      const double f = static_cast<double>(devices) * counts[static_cast<std::size_t>(e / each)] /
                       (static_cast<double>(devices_per_token) * n);
      c[e] += coefficient * f / n;
    }
  }
};
static_assert(loss_term<communication_loss>);

/// LoRA-Mixer's specialisation balance: coefficient * sum_e pbar_e fbar_e - sharpness * mean_t
/// H(p_t), with pbar the mean probability and fbar = count / sum of counts.
///
/// Backward: G[t, e] = coefficient * fbar_e / T, and sharpness / T * p_i (ln p_i + H) on dz.
/// The sign of sharpness is free: as printed (> 0) the loss raises the entropy of a token, though
/// the text says that it sharpens, which is sharpness < 0.
/// Throws: error where counts are not E numbers >= 0, coefficient < 0, or sharpness is not finite.
struct specialisation_loss {
  double coefficient = 0.01;
  double sharpness = 0.0;
  std::span<const double> counts{};  ///< [E]
  double tokens = 0.0;  ///< T of the whole, as in switch_loss; 0: the tokens of this call
  static constexpr unsigned functions = simd::entropy;

  void check(const loss_shape& shape) const {
    detail::check_coefficient("specialisation_loss", coefficient);
    detail::check_whole("specialisation_loss", "tokens", tokens);
    detail::check_counts("specialisation_loss", counts, shape.experts);
    if (!std::isfinite(sharpness)) fail("specialisation_loss", "sharpness is not finite");
  }

  void expert_slope(const loss_shape& shape, double* c) const {
    double all = 0.0;
    for (const double n : counts) all += n;
    if (!(all > 0.0)) return;
    for (index_t e = 0; e < shape.experts; ++e)
      c[e] += coefficient * counts[static_cast<std::size_t>(e)] /
              (all * detail::tokens_of(shape, tokens));
  }

  simd::row_functions<double> row_weights(const loss_shape& shape) const {
    return {.entropy = -sharpness / detail::tokens_of(shape, tokens)};
  }
};
static_assert(loss_term<specialisation_loss>);

}  // namespace moeroute
