// The kinds of parts of routers that see the whole batch, and what their numbers must satisfy: no
// kernel, so that describing such a router costs none.
#pragma once

#include <cmath>
#include <string>

#include <moeroute/base/error.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/policy/parts/phase.hpp>

namespace moeroute {

/// How a capacity that is no whole number becomes one.
enum class capacity_rounding { down, nearest, up };

/// Tokens that each expert takes: T * factor / E, rounded, raised to a multiple and to a minimum,
/// at most T.
///
/// All tokens count, masked ones too, so that the capacity is a constant of the shape.
/// Source: Zhou et al. 2022; the rounding rules of V-MoE and Nucleus-Image.
struct tokens_per_expert {
  double factor = 2.0;
  capacity_rounding rounding = capacity_rounding::up;
  index_t multiple_of = 1;
  index_t at_least = 1;
  index_t fixed = 0;  ///< where positive, this many whatever T and E are

  bool operator==(const tokens_per_expert&) const = default;

  /// Throws: error where factor is not positive and finite, or a size is out of range.
  void check() const {
    if (!(factor > 0.0) || !std::isfinite(factor))
      fail_value("expert_choice", "capacity.factor", factor, "> 0");
    check_range("expert_choice", "capacity.multiple_of", multiple_of, 1, index_t{1} << 30);
    check_range("expert_choice", "capacity.at_least", at_least, 1, index_t{1} << 30);
    check_range("expert_choice", "capacity.fixed", fixed, 0, index_t{1} << 30);
  }

  index_t operator()(index_t tokens, index_t experts) const {
    if (fixed > 0) return fixed < tokens ? fixed : tokens;
    const double most = static_cast<double>(tokens),
                 wanted = most * factor / static_cast<double>(experts),
                 share = wanted < most ? wanted : most;
    const double whole = rounding == capacity_rounding::down      ? std::floor(share)
                         : rounding == capacity_rounding::nearest ? std::nearbyint(share)
                                                                  : std::ceil(share);
    const auto least = static_cast<index_t>(whole);
    const index_t n = round_up(least > at_least ? least : at_least, multiple_of);
    return n < tokens ? n : tokens;
  }
};

/// ceil(T factor / E), then up to a multiple of 4 (V-MoE).
constexpr tokens_per_expert vmoe_capacity(double factor) {
  return {.factor = factor, .multiple_of = 4};
}
/// max(1, ceil(factor S / E)) (Nucleus-Image).
constexpr tokens_per_expert nucleus_capacity(double factor) { return {.factor = factor}; }
/// floor(T factor / E), at least 1.
constexpr tokens_per_expert floor_capacity(double factor) {
  return {.factor = factor, .rounding = capacity_rounding::down};
}

/// What a token's scores are divided by.
enum class token_renormalization {
  none,
  sum,  ///< the sum over the experts that took the token, plus eps
};

/// What rows and columns of the plan sum to.
enum class plan_mass {
  one,     ///< rows 1 / T, columns 1 / E (Megatron-LM)
  tokens,  ///< rows 1, columns T / E (V-MoE, selective Sinkhorn)
};

/// Which sums an iteration leaves exact: the last ones it scaled.
enum class scaling_order { rows_then_columns, columns_then_rows };

/// Where the iteration computes.
enum class sinkhorn_domain {
  exponential,  ///< products with exp(x); what is below 1e-30 of its row's largest counts as 0
  logarithm,    ///< sums with x; one exponential per element and iteration; any spread of logits
};

/// What the plan transports along.
enum class plan_similarity {
  logits,   ///< the plan scales exp(z / temperature)
  softmax,  ///< the plan scales exp(softmax(z) / temperature)
};

/// What has to be at most the tolerance.
enum class sinkhorn_stop {
  mean_change,   ///< the mean over experts of |change of the expert's factor| (Megatron-LM)
  column_error,  ///< the largest |column sum / its target - 1| while rows are exact
};

/// How the iteration runs. Every field is part of what the plan is: none is a mere speed setting.
struct sinkhorn_scaling {
  plan_mass mass = plan_mass::one;
  scaling_order order = scaling_order::rows_then_columns;
  sinkhorn_domain domain = sinkhorn_domain::exponential;
  sinkhorn_stop stop = sinkhorn_stop::mean_change;
  plan_similarity similarity = plan_similarity::logits;
  float temperature = 1.0f;
  /// Added to every sum that is divided by; unused in the log domain. Sums are of rows whose
  /// largest entry is 1, so a constant added to a row's logits moves no plan. (Megatron-LM adds it
  /// to sums of exp(z) as it is: the same at logits of usual size.)
  float eps = 1e-8f;
  float tolerance = 1e-4f;  ///< 0: run most_iterations
  index_t most_iterations = 1000;

  bool operator==(const sinkhorn_scaling&) const = default;

  /// Throws: error where temperature is not positive, eps or tolerance negative, or no iteration is
  /// allowed.
  void check(const char* who) const {
    if (!(temperature > 0.0f) || !std::isfinite(temperature))
      fail_value(who, "temperature", temperature, "> 0");
    if (!(eps >= 0.0f) || !std::isfinite(eps)) fail_value(who, "eps", eps, ">= 0");
    if (!(tolerance >= 0.0f)) fail_value(who, "tolerance", tolerance, ">= 0");
    check_range(who, "most_iterations", most_iterations, 1, index_t{1} << 30);
  }
};

/// Selective Sinkhorn's: rows 1, columns T / E, the softmax sharpened, until columns are within
/// 1e-4.
inline constexpr sinkhorn_scaling selective_scaling{.mass = plan_mass::tokens,
                                                    .order = scaling_order::columns_then_rows,
                                                    .stop = sinkhorn_stop::column_error,
                                                    .temperature = 0.05f,
                                                    .eps = 0.0f,
                                                    .tolerance = 1e-4f,
                                                    .most_iterations = 100};
/// Megatron-LM's: rows then columns, eps 1e-8, until the mean change is at most 1e-4.
inline constexpr sinkhorn_scaling megatron_scaling{};
/// The projection of V-MoE: rows 1, columns T / E, exactly 20 iterations.
inline constexpr sinkhorn_scaling kl_projection_scaling{.mass = plan_mass::tokens,
                                                        .order = scaling_order::columns_then_rows,
                                                        .eps = 0.0f,
                                                        .tolerance = 0.0f,
                                                        .most_iterations = 20};

/// Where the weights of the chosen experts come from.
enum class plan_weights {
  by_k,     ///< sigmoid(z) where k is 1, softmax(z) over all experts otherwise (Megatron-LM)
  sigmoid,  ///< sigmoid(z)
  softmax,  ///< softmax(z) over all experts
  plan,     ///< the plan's own entries, divided by their sum
};

/// Where the weights of an expert's tokens come from.
enum class transport_weights {
  softmax,  ///< softmax over experts (V-MoE)
  plan,     ///< the entries of the plan, which may be 0
};

/// What the logits of a soft mixture are made of.
enum class soft_logits {
  product,     ///< x . mu
  normalized,  ///< scale * unit(x) . unit(mu), as in the paper's code
};

/// How the balanced assignment is found.
enum class assignment_solver {
  auction,  ///< the published one: experts bid, near the optimum
  optimal,  ///< the largest sum of logits; O(T E^2) and more, on one thread
};

}  // namespace moeroute
