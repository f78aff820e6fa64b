// Schedules: k and the capacity factor as plain functions of the step, and k of the layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include <moeroute/balance/check_counts.hpp>
#include <moeroute/base/index.hpp>
#include <moeroute/policy/parts/phase.hpp>

namespace moeroute {

/// The way between the two ends of an annealing.
enum class anneal_shape {
  linear,
  cosine,       ///< half a wave: slow at both ends
  exponential,  ///< by equal ratios; both ends positive
  step,         ///< the first end until the last step
};

/// A number that goes from one value to another over the steps [begin, end] and stays there: the k
/// of SMoE-Dropout's growth, a capacity factor, a loss coefficient.
struct annealing {
  double from = 1.0;
  double to = 1.0;
  std::int64_t begin = 0;
  std::int64_t end = 1;
  anneal_shape shape = anneal_shape::linear;

  /// Throws: error where begin > end, a value is not finite, or an exponential one not positive.
  void check() const {
    if (begin > end) fail("annealing", "begin is after end");
    if (!std::isfinite(from) || !std::isfinite(to)) fail("annealing", "from and to must be finite");
    if (shape == anneal_shape::exponential && !(from > 0.0 && to > 0.0))
      fail("annealing", "from and to of an exponential must be positive");
  }

  double at(std::int64_t step) const {
    if (step >= end) return to;
    if (step <= begin) return from;
    const double x = static_cast<double>(step - begin) / static_cast<double>(end - begin);
    switch (shape) {
      case anneal_shape::linear: return from + (to - from) * x;
      case anneal_shape::cosine:
        return from + (to - from) * 0.5 * (1.0 - std::cos(std::numbers::pi * x));
      case anneal_shape::exponential: return from * std::pow(to / from, x);
      case anneal_shape::step: break;
    }
    return from;
  }

  /// The nearest number of experts in [1, E]; halves go away from zero.
  index_t k_at(std::int64_t step, index_t experts) const {
    return static_cast<index_t>(
        std::clamp(std::round(at(step)), 1.0, static_cast<double>(experts)));
  }
};

/// Capacity factors of training and of evaluation. Source: Switch (1.25 and 2), DeepSpeed.
struct capacity_factors {
  double training = 1.25;
  double evaluation = 2.0;

  double at(routing_phase phase) const {
    return phase == routing_phase::training ? training : evaluation;
  }
};

/// DynaMoE's six ways to spread experts over layers. The sources differ on names and formulas:
/// these are the sheet's definitions.
enum class layer_schedule { uniform, descending, ascending, pyramid_up, pyramid_down, wave };

struct layer_schedule_options {
  index_t layers = 1;
  index_t least = 1;   ///< experts of the leanest layer
  index_t most = 1;    ///< and of the richest; uniform gives it to all
  double waves = 1.0;  ///< full waves from the first layer to the last
};

/// Experts of one layer, in [least, most].
///
/// With x = layer / (layers - 1): descending most to least; ascending mirrored; pyramid_up peaks in
/// the middle, 1 - |2x - 1|; pyramid_down dips there; wave (1 + sin(2 pi waves x)) / 2. One layer
/// counts as the first. Throws: error where layer is outside [0, layers), or not 1 <= least <=
/// most.
inline index_t experts_of_layer(layer_schedule schedule, index_t layer,
                                const layer_schedule_options& options) {
  constexpr const char* where = "experts_of_layer";
  check_range(where, "layers", options.layers, 1, index_t{1} << 20);
  check_range(where, "layer", layer, 0, options.layers - 1);
  check_range(where, "most", options.most, 1, max_experts);
  check_range(where, "least", options.least, 1, options.most);
  if (!std::isfinite(options.waves)) fail(where, "waves must be finite");
  const double x = options.layers == 1
                       ? 0.0
                       : static_cast<double>(layer) / static_cast<double>(options.layers - 1);
  const double tent = 1.0 - std::abs(2.0 * x - 1.0);
  double share = 1.0;
  switch (schedule) {
    case layer_schedule::uniform: break;
    case layer_schedule::descending: share = 1.0 - x; break;
    case layer_schedule::ascending: share = x; break;
    case layer_schedule::pyramid_up: share = tent; break;
    case layer_schedule::pyramid_down: share = 1.0 - tent; break;
    case layer_schedule::wave:
      share = 0.5 * (1.0 + std::sin(2.0 * std::numbers::pi * options.waves * x));
      break;
  }
  const double span = static_cast<double>(options.most - options.least);
  return options.least + static_cast<index_t>(std::round(span * share));
}

}  // namespace moeroute
