// Affinity: experts of following layers on one rank, for tokens that stay where their last expert
// is. Where tokens return home after each layer, grouping.hpp is what helps.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <moeroute/base/rng.hpp>
#include <moeroute/placement/loads.hpp>

namespace moeroute {

/// How often experts of a layer and the next serve the same token.
struct layer_transitions {
  index_t experts = 0;
  /// [L - 1], each [E, E]: tokens that use expert i of a layer and j of the next.
  std::vector<std::vector<double>> count{};
};

struct affinity_options {
  index_t ranks = 1;
  std::vector<std::int32_t> node_of_rank{};  ///< empty: one node
  double weight_within = 1.0;                ///< of a transition between ranks of a node
  double weight_across = 1.0;                ///< of one between nodes
  index_t restarts = 12;
};

/// The rank of each layer's experts, [L][E], equally many on every rank.
struct affinity_plan {
  std::vector<std::vector<std::int32_t>> rank_of_expert;
  double cost = 0.0;
  index_t swaps = 0;
};

namespace detail {

inline void check_affinity(const layer_transitions& t, const affinity_options& o) {
  constexpr const char* where = "affinity";
  check_range(where, "experts", t.experts, 1, max_experts);
  check_range(where, "ranks", o.ranks, 1, t.experts);
  if (t.experts % o.ranks != 0)
    fail(where, std::to_string(t.experts) + " experts on " + std::to_string(o.ranks) +
                    " ranks, expected a multiple of the ranks");
  if (!o.node_of_rank.empty())
    check_size(where, "node_of_rank.size()", static_cast<index_t>(o.node_of_rank.size()), o.ranks);
  for (const double w : {o.weight_within, o.weight_across})
    if (!(w >= 0.0 && std::isfinite(w))) fail_value(where, "weight", w, "a finite number >= 0");
  for (const auto& layer : t.count) {
    check_size(where, "count.size()", static_cast<index_t>(layer.size()), t.experts * t.experts);
    for (const double v : layer)
      if (!(v >= 0.0 && std::isfinite(v))) fail_value(where, "count", v, "a finite number >= 0");
  }
}

// Tables of one problem.
class affinity_search {
 public:
  affinity_search(const layer_transitions& t, const affinity_options& o)
      : t_(t), o_(o), experts_(t.experts), layers_(static_cast<index_t>(t.count.size()) + 1) {
    for (index_t a = 0; a < o.ranks; ++a)
      for (index_t b = 0; b < o.ranks; ++b) {
        const bool across =
            !o.node_of_rank.empty() && o.node_of_rank[at(a)] != o.node_of_rank[at(b)];
        distance_.push_back(a == b ? 0.0 : across ? o.weight_across : o.weight_within);
      }
  }

  using ranks = std::vector<std::vector<std::int32_t>>;

  double cost(const ranks& r) const {
    double sum = 0.0;
    for (index_t l = 0; l + 1 < layers_; ++l)
      for (index_t i = 0; i < experts_; ++i)
        for (index_t j = 0; j < experts_; ++j)
          sum += t_.count[at(l)][at(i * experts_ + j)] *
                 distance(r[at(l)][at(i)], r[at(l) + 1][at(j)]);
    return sum;
  }

  // Layers 1, 2, ... given the first: the expert with the largest regret to its cheapest rank.
  void greedy(ranks& r) const {
    for (index_t l = 1; l < layers_; ++l) {
      std::vector<double> price(at(experts_ * o_.ranks), 0.0);
      for (index_t i = 0; i < experts_; ++i)
        for (index_t j = 0; j < experts_; ++j) {
          const double n = t_.count[at(l) - 1][at(i * experts_ + j)];
          if (n == 0.0) continue;
          for (index_t k = 0; k < o_.ranks; ++k)
            price[at(j * o_.ranks + k)] +=
                n * distance(r[at(l) - 1][at(i)], static_cast<std::int32_t>(k));
        }
      std::vector<index_t> room(at(o_.ranks), experts_ / o_.ranks);
      r[at(l)].assign(at(experts_), -1);
      for (index_t placed = 0; placed < experts_; ++placed) {
        double best_regret = -1.0;
        index_t expert = -1, rank = -1;
        for (index_t j = 0; j < experts_; ++j) {
          if (r[at(l)][at(j)] >= 0) continue;
          double first = std::numeric_limits<double>::infinity(), second = first;
          index_t cheapest = -1;
          for (index_t k = 0; k < o_.ranks; ++k) {
            if (room[at(k)] == 0) continue;
            const double p = price[at(j * o_.ranks + k)];
            if (cheapest < 0 || p < first) {
              second = first;
              first = p;
              cheapest = k;
            } else if (p < second) {
              second = p;
            }
          }
          const double regret = second - first;  // infinite where one rank is left
          if (expert < 0 || regret > best_regret) {
            best_regret = regret;
            expert = j;
            rank = cheapest;
          }
        }
        r[at(l)][at(expert)] = static_cast<std::int32_t>(rank);
        --room[at(rank)];
      }
    }
  }

  // Swaps within layers, the steepest first; returns how many.
  index_t descend(ranks& r) const {
    std::vector<std::vector<double>> price(at(layers_));
    for (index_t l = 0; l < layers_; ++l) price[at(l)] = prices(r, l);
    for (index_t swaps = 0;; ++swaps) {
      double best = -1e-9;
      index_t layer = -1, a = -1, b = -1;
      for (index_t l = 0; l < layers_; ++l)
        for (index_t i = 0; i < experts_; ++i)
          for (index_t j = i + 1; j < experts_; ++j) {
            const index_t p = r[at(l)][at(i)], q = r[at(l)][at(j)];
            if (p == q) continue;
            const double* const x = price[at(l)].data() + i * o_.ranks;
            const double* const y = price[at(l)].data() + j * o_.ranks;
            const double change = x[q] - x[p] + y[p] - y[q];
            if (change < best) {
              best = change;
              layer = l;
              a = i;
              b = j;
            }
          }
      if (layer < 0 || swaps > 100 * layers_ * experts_) return swaps;
      std::swap(r[at(layer)][at(a)], r[at(layer)][at(b)]);
      for (const index_t l : {layer - 1, layer + 1})
        if (l >= 0 && l < layers_) price[at(l)] = prices(r, l);
    }
  }

  index_t layers() const { return layers_; }
  index_t experts() const { return experts_; }
  index_t per_rank() const { return experts_ / o_.ranks; }

  // Layer 0 with what leads to the same experts two steps on side by side.
  std::vector<std::int32_t> clustered() const {
    std::vector<double> like(at(experts_ * experts_), 0.0);
    if (layers_ > 1)
      for (index_t a = 0; a < experts_; ++a)
        for (index_t b = 0; b < experts_; ++b)
          for (index_t j = 0; j < experts_; ++j)
            like[at(a * experts_ + b)] +=
                std::min(t_.count[0][at(a * experts_ + j)], t_.count[0][at(b * experts_ + j)]);
    std::vector<std::int32_t> rank(at(experts_), -1);
    for (index_t k = 0; k < o_.ranks; ++k) {
      std::vector<index_t> own;
      for (index_t n = 0; n < per_rank(); ++n) {
        index_t pick = -1;
        double best = -1.0;
        for (index_t e = 0; e < experts_; ++e) {
          if (rank[at(e)] >= 0) continue;
          double sum = 0.0;
          for (const index_t f : own) sum += like[at(e * experts_ + f)];
          if (pick < 0 || sum > best) {
            pick = e;
            best = sum;
          }
        }
        rank[at(pick)] = static_cast<std::int32_t>(k);
        own.push_back(pick);
      }
    }
    return rank;
  }

 private:
  double distance(std::int32_t a, std::int32_t b) const { return distance_[at(a * o_.ranks + b)]; }

  // What each expert of a layer would cost on each rank, its neighbours as they are.
  std::vector<double> prices(const ranks& r, index_t l) const {
    std::vector<double> price(at(experts_ * o_.ranks), 0.0);
    const auto add = [&](index_t e, std::int32_t other, double n) {
      if (n == 0.0) return;
      for (index_t k = 0; k < o_.ranks; ++k)
        price[at(e * o_.ranks + k)] += n * distance(other, static_cast<std::int32_t>(k));
    };
    for (index_t i = 0; i < experts_; ++i)
      for (index_t j = 0; j < experts_; ++j) {
        if (l > 0) add(j, r[at(l) - 1][at(i)], t_.count[at(l) - 1][at(i * experts_ + j)]);
        if (l + 1 < layers_) add(i, r[at(l) + 1][at(j)], t_.count[at(l)][at(i * experts_ + j)]);
      }
    return price;
  }

  const layer_transitions& t_;
  const affinity_options& o_;
  index_t experts_, layers_;
  std::vector<double> distance_;
};

}  // namespace detail

/// The cost of a placement of all layers: transitions between different ranks, weighted.
inline double affinity_cost(const layer_transitions& t, const affinity_options& options,
                            const std::vector<std::vector<std::int32_t>>& rank_of_expert) {
  detail::check_affinity(t, options);
  check_size("affinity_cost", "layers", static_cast<index_t>(rank_of_expert.size()),
             static_cast<index_t>(t.count.size()) + 1);
  for (const auto& layer : rank_of_expert) {
    check_size("affinity_cost", "experts", static_cast<index_t>(layer.size()), t.experts);
    for (const std::int32_t r : layer)
      check_range("affinity_cost", "rank", r, 0, options.ranks - 1);
  }
  return detail::affinity_search(t, options).cost(rank_of_expert);
}

/// The plan from layer 0 as it is given: greedy by regret, then, with `descend`, swaps.
inline affinity_plan affinity_from(const layer_transitions& t, const affinity_options& options,
                                   std::span<const std::int32_t> first, bool descend) {
  detail::check_affinity(t, options);
  check_size("affinity", "first.size()", static_cast<index_t>(first.size()), t.experts);
  for (const std::int32_t r : first) check_range("affinity", "first", r, 0, options.ranks - 1);
  const detail::affinity_search search(t, options);
  affinity_plan plan;
  plan.rank_of_expert.resize(detail::at(search.layers()));
  plan.rank_of_expert[0].assign(first.begin(), first.end());
  search.greedy(plan.rank_of_expert);
  if (descend) plan.swaps = search.descend(plan.rank_of_expert);
  plan.cost = search.cost(plan.rank_of_expert);
  return plan;
}

/// The best of several starts: layer 0 contiguous, layer 0 clustered by where its tokens go, and
/// random ones.
///
/// Throws: error where sizes do not fit or a count is negative. Cost: O(restarts (L E^2 R + swaps L
/// E^2)). Determinism: exact. Source: the objective is ExFlow's (2024).
inline affinity_plan place_by_affinity(const layer_transitions& t,
                                       const affinity_options& options) {
  using detail::at;
  detail::check_affinity(t, options);
  const detail::affinity_search search(t, options);
  std::vector<std::int32_t> first(at(t.experts));
  for (index_t e = 0; e < t.experts; ++e)
    first[at(e)] = static_cast<std::int32_t>(e / search.per_rank());
  affinity_plan best = affinity_from(t, options, first, true);
  for (index_t i = 0; i < options.restarts && best.cost > 0.0; ++i) {
    if (i == 0) {
      first = search.clustered();
    } else {
      for (index_t e = t.experts - 1; e > 0; --e)
        std::swap(
            first[at(e)],
            first[random_below(static_cast<std::uint32_t>(e + 1), 7, static_cast<std::uint64_t>(i),
                               static_cast<std::uint64_t>(e))]);
    }
    if (affinity_plan made = affinity_from(t, options, first, true); made.cost < best.cost)
      best = std::move(made);
  }
  return best;
}

}  // namespace moeroute
