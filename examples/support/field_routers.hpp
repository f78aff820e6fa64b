// Routing systems of the field that are a few calls of the library each: attention over blocks,
// passes over one pool of experts, two views of a token, centres that move, experts that are added.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/gates/codebook.hpp>
#include <moeroute/stage/route.hpp>
#include <moeroute/stage/sequences.hpp>
#include <span>
#include <vector>

namespace example {

using moeroute::expert_id;
using moeroute::index_t;
using moeroute::matrix_view;

/// MoBA: what a query of position t is worth to each block of keys, its product with the block's
/// mean key. Blocks behind t are -inf, its own is +inf: a top-k always reads it.
///
/// Shapes: query [T, d], keys [T, d], scores [T, ceil(T / block)].
inline void block_scores(matrix_view<const float> query, matrix_view<const float> keys,
                         index_t block, matrix_view<float> scores) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  const std::int32_t whole[] = {0, static_cast<std::int32_t>(keys.rows)};
  std::vector<std::int32_t> cuts(static_cast<std::size_t>(2 + keys.rows));
  const index_t blocks = moeroute::window_offsets(whole, block, cuts);
  cuts.resize(static_cast<std::size_t>(blocks) + 1);
  std::vector<float> mean(static_cast<std::size_t>(blocks * keys.cols));
  const matrix_view<float> means(mean.data(), blocks, keys.cols);
  moeroute::pool_rows(keys, cuts, means);
  moeroute::gate(query, moeroute::simd::packed_matrix<>(matrix_view<const float>(means)), scores);
  for (index_t t = 0; t < query.rows; ++t)
    for (index_t b = t / block; b < blocks; ++b)
      scores(t, b) = b == t / block ? infinity : -infinity;
}

/// Chain-of-Experts: layers with gates of their own over one pool of experts, each adding to y what
/// it makes of it. A layer is any moe_layer with output = combine_output::accumulate; its experts
/// are a reference to the pool.
template <class Layer>
void chain_of_experts(std::span<Layer> passes, matrix_view<float> y) {
  std::vector<float> before(static_cast<std::size_t>(y.rows * y.cols));
  const matrix_view<float> x(before.data(), y.rows, y.cols);
  for (Layer& pass : passes) {
    for (index_t t = 0; t < y.rows; ++t) std::copy_n(y.row(t), y.cols, x.row(t));
    pass.forward(matrix_view<const float>(x), y);
  }
}

/// S2MoE: y = g f(x) + (1 - g) f(x'), x' a noisy copy of x and g = sigmoid(x . w) per token.
template <class Layer>
void two_views(Layer& layer, matrix_view<const float> x, std::span<const float> w, float noise,
               const moeroute::side_inputs& side, matrix_view<float> y) {
  std::vector<float> copy(static_cast<std::size_t>(x.rows * x.cols)), other(copy.size());
  const matrix_view<float> noisy(copy.data(), x.rows, x.cols), seen(other.data(), x.rows, x.cols);
  moeroute::gaussian_rows(x, noise, noise, side, noisy);
  layer.forward(x, y);
  layer.forward(matrix_view<const float>(noisy), seen);
  for (index_t t = 0; t < x.rows; ++t) {
    float z = 0.0f;
    for (index_t c = 0; c < x.cols; ++c) z += x(t, c) * w[static_cast<std::size_t>(c)];
    const float g = 1.0f / (1.0f + std::exp(-z));
    for (index_t c = 0; c < x.cols; ++c) y(t, c) = g * y(t, c) + (1.0f - g) * seen(t, c);
  }
}

/// Routing Transformer, AdaptDHM: centres that follow the rows nearest to them.
class moving_centres {
 public:
  /// centres [E, d].
  explicit moving_centres(matrix_view<const float> centres) : gate_(centres, centres.rows) {}

  /// One step towards the rows, and where each of them belongs (AdaptDHM).
  std::vector<std::int32_t> follow(matrix_view<const float> x, float decay) {
    std::vector<std::int32_t> nearest(static_cast<std::size_t>(x.rows));
    gate_.nearest(x, nearest, ws_);
    gate_.update(x, nearest, decay);
    return nearest;
  }
  /// Every centre reads the `take` rows nearest to it (Routing Transformer).
  const moeroute::assignment& clusters(matrix_view<const float> x, index_t take) {
    z_.resize(x.rows * gate_.columns());
    const matrix_view<float> z(z_.data(), x.rows, gate_.columns());
    moeroute::gate(x, gate_, z, ws_);
    const moeroute::expert_choice<moeroute::identity_score> rule{.capacity = {.fixed = take}};
    moeroute::route(rule, z, route_ws_, choices_);
    return choices_;
  }
  [[nodiscard]] matrix_view<const float> centres() const { return gate_.code_rows(); }

 private:
  moeroute::codebook_gate<> gate_;
  moeroute::buffer<float> z_;
  moeroute::workspace ws_, route_ws_;
  moeroute::assignment choices_;
};

/// PMoE: a gate [E, d] with n more experts, whose rows start as the mean of the old ones; what the
/// old ones say stays. bias [E + n] keeps the new ones out (-inf) until they are trained.
struct grown_gate {
  std::vector<float> weight, bias;

  grown_gate(matrix_view<const float> old, index_t n) {
    std::vector<float> mean(static_cast<std::size_t>(old.cols));
    for (index_t e = 0; e < old.rows; ++e) {
      weight.insert(weight.end(), old.row(e), old.row(e) + old.cols);
      for (index_t c = 0; c < old.cols; ++c)
        mean[static_cast<std::size_t>(c)] += old(e, c) / static_cast<float>(old.rows);
    }
    for (index_t e = 0; e < n; ++e) weight.insert(weight.end(), mean.begin(), mean.end());
    bias.assign(static_cast<std::size_t>(old.rows), 0.0f);
    bias.resize(bias.size() + static_cast<std::size_t>(n), -std::numeric_limits<float>::infinity());
  }
};

/// Equifinality: a token goes no further once a layer changes it by less than `least` of its norm.
inline bool halts(std::span<const float> change, std::span<const float> x, float least) {
  double moved = 0.0, norm = 0.0;
  for (std::size_t c = 0; c < x.size(); ++c) {
    moved += double{change[c]} * double{change[c]};
    norm += double{x[c]} * double{x[c]};
  }
  return moved < double{least} * double{least} * norm;
}

/// MAGNET: which of two losses a batch is trained with, by the entropy of its mean probabilities as
/// a share of ln E: what spreads (0) where they have gathered, what sharpens (1) where they are
/// even.
inline int loss_of(std::span<const float> mean_probability, float even) {
  double entropy = 0.0;
  for (const float p : mean_probability)
    if (p > 0.0f) entropy -= double{p} * std::log(double{p});
  return entropy < double{even} * std::log(static_cast<double>(mean_probability.size())) ? 0 : 1;
}

/// SplatWeaver: logits [T, E] that a prior over experts guides, z += strength ln prior.
inline void guide(matrix_view<float> z, matrix_view<const float> prior, float strength) {
  for (index_t t = 0; t < z.rows; ++t)
    for (index_t e = 0; e < z.cols; ++e) z(t, e) += strength * std::log(prior(t, e));
}

/// MST-Distill, DORNet: the experts of a whole instance by the mean of its rows, for all of them.
///
/// weight [E, d] packed. Shapes: x [T, d], offsets [S + 1]; out [T, k].
template <class Router>
void route_instances(const Router& router, const moeroute::simd::packed_matrix<>& weight,
                     matrix_view<const float> x, std::span<const std::int32_t> offsets,
                     moeroute::assignment& out) {
  const auto n = static_cast<index_t>(offsets.size()) - 1;
  std::vector<float> mean(static_cast<std::size_t>(n * x.cols)),
      z(static_cast<std::size_t>(n * weight.rows()));
  const matrix_view<float> pooled(mean.data(), n, x.cols), logits(z.data(), n, weight.rows());
  moeroute::pool_rows(x, offsets, pooled);
  moeroute::gate(matrix_view<const float>(pooled), weight, logits);
  moeroute::workspace ws;
  moeroute::assignment decisions;
  moeroute::route(router, logits, ws, decisions);
  std::vector<std::int32_t> instance(static_cast<std::size_t>(x.rows));
  moeroute::sequences_of_tokens(offsets, instance);
  moeroute::spread_to_tokens(decisions, instance, out);
}

/// Universal Model Routing: what is expected of a model that no router was trained on: the mean of
/// its errors on clusters of validation prompts, weighed by how near the query is to each.
///
/// Shapes: near [queries, clusters], rows sum to 1; error [models, clusters]; quality [queries,
/// models] gets 1 - the expected error.
inline void quality_of_unseen(matrix_view<const float> near, matrix_view<const float> error,
                              matrix_view<float> quality) {
  moeroute::gate(near, moeroute::simd::packed_matrix<>(error), quality);
  for (index_t q = 0; q < quality.rows; ++q)
    for (index_t m = 0; m < quality.cols; ++m) quality(q, m) = 1.0f - quality(q, m);
}

/// RouterBench: the area under the non-decreasing upper hull of (cost, quality) points, divided by
/// the range of costs: the mean quality that a router has over all budgets.
inline double mean_quality(std::vector<std::pair<double, double>> points) {
  std::sort(points.begin(), points.end());
  std::vector<std::pair<double, double>> hull;
  for (const auto& [cost, quality] : points) {
    if (!hull.empty() && quality <= hull.back().second) continue;
    while (hull.size() > 1) {
      const auto &b = hull.back(), &a = hull[hull.size() - 2];
      if ((b.second - a.second) * (cost - a.first) > (quality - a.second) * (b.first - a.first))
        break;
      hull.pop_back();
    }
    hull.emplace_back(cost, quality);
  }
  const double first = points.front().first, last = points.back().first;
  double area = (last - hull.back().first) * hull.back().second;
  for (std::size_t i = 1; i < hull.size(); ++i)
    area += (hull[i].first - hull[i - 1].first) * (hull[i].second + hull[i - 1].second) / 2.0;
  return last > first ? area / (last - first) : hull.back().second;
}

}  // namespace example
