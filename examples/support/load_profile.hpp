// How evenly a model spreads its choices over the experts, layer by layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/base/index.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace example {

/// Choices per expert of one layer, and how undecided its router was.
struct layer_load {
  std::vector<std::int64_t> choices;  // per expert
  double entropy_sum = 0;             // bits, over tokens
  std::int64_t tokens = 0;

  [[nodiscard]] std::int64_t total() const {
    return std::accumulate(choices.begin(), choices.end(), std::int64_t{0});
  }
  /// The expert's choices over those it would get if all got the same.
  [[nodiscard]] double relative(std::size_t expert) const {
    const auto all = static_cast<double>(total());
    return all > 0
               ? static_cast<double>(choices[expert]) * static_cast<double>(choices.size()) / all
               : 0.0;
  }
  [[nodiscard]] std::size_t busiest() const {
    return static_cast<std::size_t>(std::max_element(choices.begin(), choices.end()) -
                                    choices.begin());
  }
  /// Largest load over the mean load, less one: 0 when all are equal.
  [[nodiscard]] double max_violation() const {
    return total() > 0 ? relative(busiest()) - 1.0 : 0.0;
  }
  /// Mean over tokens of the entropy of the router's softmax, in bits.
  [[nodiscard]] double entropy() const {
    return tokens > 0 ? entropy_sum / static_cast<double>(tokens) : 0.0;
  }
};

/// The entropy of softmax(logits), in bits.
[[nodiscard]] inline double softmax_entropy(const float* logits, moeroute::index_t count) {
  const double top = static_cast<double>(*std::max_element(logits, logits + count));
  double sum = 0;
  double weighted = 0;
  for (moeroute::index_t i = 0; i < count; ++i) {
    const double below = static_cast<double>(logits[i]) - top;
    const double term = std::exp(below);
    sum += term;
    weighted += term * below;
  }
  return (std::log(sum) - weighted / sum) / std::log(2.0);
}

/// The loads of all layers over one text.
struct load_profile {
  std::string name;
  std::vector<layer_load> layers;

  load_profile(std::string text, std::int64_t layer_count, std::int64_t experts)
      : name(std::move(text)), layers(static_cast<std::size_t>(layer_count)) {
    for (layer_load& layer : layers) {
      layer.choices.assign(static_cast<std::size_t>(experts), 0);
    }
  }

  void count(std::size_t layer, moeroute::matrix_view<const moeroute::expert_id> ids) {
    layer_load& load = layers[layer];
    load.tokens += ids.rows;
    for (moeroute::index_t t = 0; t < ids.rows; ++t) {
      for (moeroute::index_t rank = 0; rank < ids.cols; ++rank) {
        if (const moeroute::expert_id id = ids(t, rank); id != moeroute::no_expert) {
          ++load.choices[static_cast<std::size_t>(id)];
        }
      }
    }
  }
  void add_entropy(std::size_t layer, moeroute::matrix_view<const float> logits) {
    for (moeroute::index_t t = 0; t < logits.rows; ++t) {
      layers[layer].entropy_sum += softmax_entropy(logits.row(t), logits.cols);
    }
  }
};

}  // namespace example
