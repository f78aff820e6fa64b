// Whole models as experts: which model answers a query, by the library's routers over scores of
// queries times models. What predicts the scores (encoders, classifiers) is outside.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/stage/route.hpp>
#include <span>
#include <vector>

namespace example {

using moeroute::expert_id;
using moeroute::index_t;
using moeroute::matrix_view;

/// The model with the largest score of every query, the lower one among equals.
inline std::vector<expert_id> best_model(matrix_view<const float> scores,
                                         std::span<const float> add = {}) {
  moeroute::workspace ws;
  moeroute::assignment chosen;
  moeroute::route(
      moeroute::router<moeroute::identity_score>{.selection = {.k = 1}, .transform = {.add = add}},
      scores, ws, chosen);
  return {chosen.ids().begin(), chosen.ids().end()};
}

/// CARROT: argmax of (1 - mu) quality - mu cost, mu in [0, 1): how much a cost is worth.
///
/// Shapes: quality [queries, models], what is expected of each; cost [models].
inline std::vector<expert_id> by_cost(matrix_view<const float> quality, std::span<const float> cost,
                                      float mu) {
  std::vector<float> add;
  for (const float c : cost) add.push_back(-mu / (1.0f - mu) * c);
  return best_model(quality, add);
}

/// RouteLLM: the strong model (1) where it is likely to win, the weak one (0) elsewhere.
///
/// Shapes: win [queries, 1], the probability that the strong one's answer is better.
inline std::vector<expert_id> by_threshold(matrix_view<const float> win, float threshold) {
  moeroute::workspace ws;
  moeroute::assignment strong;
  moeroute::route(moeroute::threshold_router<moeroute::identity_score>{.threshold = threshold}, win,
                  ws, strong);
  std::vector<expert_id> chosen;
  for (index_t q = 0; q < win.rows; ++q) chosen.push_back(static_cast<expert_id>(strong.count(q)));
  return chosen;
}

/// A cascade: each model is asked in turn until one is sure, whose entropy over its answers is at
/// most `most`; the last one's answer counts anyhow. calls is how many models were asked in all.
///
/// answers(model, query) gives the model's logits over answers.
template <class Answers>
std::vector<expert_id> cascade(index_t models, index_t queries, double most, Answers&& answers,
                               index_t& calls) {
  std::vector<expert_id> chosen;
  calls = 0;
  for (index_t q = 0; q < queries; ++q) {
    expert_id m = 0;
    while (++calls, m + 1 < models && moeroute::token_entropy(answers(m, q)) > most) ++m;
    chosen.push_back(m);
  }
  return chosen;
}

/// LinUCB: a linear estimate of each model's reward and how sure it is of it,
/// theta . x + alpha sqrt(x^T A^-1 x). The inverse is kept up to date (Sherman, Morrison).
class linear_bandit {
 public:
  linear_bandit(index_t models, index_t width, double alpha)
      : width_(width), alpha_(alpha), arms_(static_cast<std::size_t>(models)) {
    for (arm& a : arms_) {
      a.inverse.assign(at(width * width), 0.0);
      a.reward.assign(at(width), 0.0);
      for (index_t i = 0; i < width; ++i) a.inverse[at(i * width + i)] = 1.0;
    }
  }

  /// What every model may be worth to a query with the features x.
  [[nodiscard]] std::vector<float> scores(std::span<const double> x) const {
    std::vector<float> score;
    for (const arm& a : arms_) {
      const std::vector<double> v = product(a.inverse, x);
      double mean = 0.0, spread = 0.0;
      for (index_t i = 0; i < width_; ++i) {
        mean += v[at(i)] * a.reward[at(i)];  // theta . x = b^T A^-1 x
        spread += v[at(i)] * x[at(i)];
      }
      score.push_back(static_cast<float>(mean + alpha_ * std::sqrt(spread)));
    }
    return score;
  }
  [[nodiscard]] expert_id choose(std::span<const double> x) const {
    const std::vector<float> s = scores(x);
    return best_model({s.data(), 1, static_cast<index_t>(s.size())})[0];
  }
  void learn(expert_id model, std::span<const double> x, double reward) {
    arm& a = arms_[at(model)];
    const std::vector<double> v = product(a.inverse, x);
    double spread = 1.0;
    for (index_t i = 0; i < width_; ++i) spread += v[at(i)] * x[at(i)];
    for (index_t i = 0; i < width_; ++i)
      for (index_t j = 0; j < width_; ++j)
        a.inverse[at(i * width_ + j)] -= v[at(i)] * v[at(j)] / spread;
    for (index_t i = 0; i < width_; ++i) a.reward[at(i)] += reward * x[at(i)];
  }
  [[nodiscard]] const std::vector<double>& inverse(expert_id model) const {
    return arms_[at(model)].inverse;
  }

 private:
  struct arm {
    std::vector<double> inverse, reward;
  };
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
  [[nodiscard]] std::vector<double> product(const std::vector<double>& m,
                                            std::span<const double> x) const {
    std::vector<double> out(at(width_));
    for (index_t i = 0; i < width_; ++i)
      for (index_t j = 0; j < width_; ++j) out[at(i)] += m[at(i * width_ + j)] * x[at(j)];
    return out;
  }

  index_t width_;
  double alpha_;
  std::vector<arm> arms_;
};

/// PORT's dual prices: what a unit of each model's budget is worth, learnt from the first share of
/// the queries, argmin over gamma in [0, 1]^M of
/// share gamma . budget + sum over those queries of max_i (weight quality_i - gamma_i cost_i).
/// Convex: found by projected subgradients, of which the best point is kept.
///
/// Shapes: quality and cost [queries, models], the first of them; budget [models].
class dual_prices_of_models {
 public:
  static double value(matrix_view<const float> quality, matrix_view<const float> cost,
                      std::span<const double> budget, double share, double weight,
                      std::span<const double> gamma) {
    std::vector<double> slope;
    return run(quality, cost, budget, share, weight, gamma, slope);
  }

  static std::vector<double> learn(matrix_view<const float> quality, matrix_view<const float> cost,
                                   std::span<const double> budget, double share, double weight,
                                   int steps = 400) {
    std::vector<double> gamma(budget.size(), 0.5), best = gamma, slope;
    double least = 1e300;
    for (int n = 1; n <= steps; ++n) {
      const double now = run(quality, cost, budget, share, weight, gamma, slope);
      if (now < least) {
        least = now;
        best = gamma;
      }
      double size = 0.0;
      for (const double s : slope) size += s * s;
      if (size == 0.0) break;
      for (std::size_t i = 0; i < gamma.size(); ++i)
        gamma[i] = std::clamp(gamma[i] - 0.5 / std::sqrt(double(n)) * slope[i] / std::sqrt(size),
                              0.0, 1.0);
    }
    return best;
  }

 private:
  static double run(matrix_view<const float> quality, matrix_view<const float> cost,
                    std::span<const double> budget, double share, double weight,
                    std::span<const double> gamma, std::vector<double>& slope) {
    slope.assign(gamma.size(), 0.0);
    double sum = 0.0;
    for (std::size_t i = 0; i < gamma.size(); ++i) {
      slope[i] = share * budget[i];
      sum += slope[i] * gamma[i];
    }
    for (index_t q = 0; q < quality.rows; ++q) {
      double most = -1e300;
      std::size_t winner = 0;
      for (std::size_t i = 0; i < gamma.size(); ++i) {
        const auto m = static_cast<index_t>(i);
        const double worth = weight * double{quality(q, m)} - gamma[i] * double{cost(q, m)};
        if (worth > most) {
          most = worth;
          winner = i;
        }
      }
      sum += most;
      slope[winner] -= double{cost(q, static_cast<index_t>(winner))};
    }
    return sum;
  }
};

/// What was served of a stream of queries under budgets.
struct served {
  index_t queries = 0;
  double quality = 0.0;
  std::vector<double> spent{};
};

/// Serves queries in their order: choose(query) names a model, which answers while its budget
/// lasts.
template <class Choose>
served serve(matrix_view<const float> quality, matrix_view<const float> cost,
             std::span<const double> budget, Choose&& choose) {
  served s{.spent = std::vector<double>(budget.size())};
  for (index_t q = 0; q < quality.rows; ++q) {
    const expert_id m = choose(q);
    const auto i = static_cast<std::size_t>(m);
    if (s.spent[i] + double{cost(q, m)} > budget[i]) continue;
    s.spent[i] += double{cost(q, m)};
    ++s.queries;
    s.quality += double{quality(q, m)};
  }
  return s;
}

/// A synthetic table: four models, the dearer the better, that differ from query to query; budgets
/// of equal shares of the queries, enough for 80 % of each share.
struct model_table {
  index_t queries, models = 4;
  std::vector<float> quality, cost;  ///< [queries, models]
  std::vector<double> budget;

  explicit model_table(index_t n, std::uint64_t seed = 7) : queries(n) {
    const double base[] = {0.45, 0.55, 0.65, 0.75}, price[] = {1.0, 2.0, 4.0, 8.0};
    budget.assign(4, 0.0);
    for (index_t q = 0; q < n; ++q) {
      const double length = 0.5 + u01(seed, q, 9);
      for (index_t m = 0; m < 4; ++m) {
        const double luck = u01(seed, q, m) - 0.5;
        quality.push_back(static_cast<float>(std::clamp(base[m] + 0.6 * luck, 0.0, 1.0)));
        cost.push_back(static_cast<float>(price[m] * length / 8.0));
        budget[static_cast<std::size_t>(m)] += 0.8 / 4.0 * double{cost.back()};
      }
    }
  }
  [[nodiscard]] matrix_view<const float> qualities() const { return {quality.data(), queries, 4}; }
  [[nodiscard]] matrix_view<const float> costs() const { return {cost.data(), queries, 4}; }

 private:
  static double u01(std::uint64_t seed, index_t q, index_t m) {
    return double{
        moeroute::random_u01(seed, static_cast<std::uint64_t>(m), static_cast<std::uint64_t>(q))};
  }
};

/// Always the best model while its budget lasts.
inline served serve_greedily(const model_table& t) {
  const std::vector<expert_id> best = best_model(t.qualities());
  return serve(t.qualities(), t.costs(), t.budget,
               [&](index_t q) { return best[static_cast<std::size_t>(q)]; });
}

/// Models at random over the first share of the queries, from which prices are learnt; then the one
/// whose quality exceeds its price the most.
inline served serve_by_prices(const model_table& t, double share, double weight = 1.0) {
  const auto first = static_cast<index_t>(share * double(t.queries));
  const std::vector<double> gamma =
      dual_prices_of_models::learn(t.qualities().middle_rows(0, first),
                                   t.costs().middle_rows(0, first), t.budget, share, weight);
  std::vector<float> worth;
  for (index_t q = 0; q < t.queries; ++q)
    for (index_t m = 0; m < t.models; ++m)
      worth.push_back(
          static_cast<float>(weight * double{t.qualities()(q, m)} -
                             gamma[static_cast<std::size_t>(m)] * double{t.costs()(q, m)}));
  const std::vector<expert_id> best = best_model({worth.data(), t.queries, t.models});
  return serve(t.qualities(), t.costs(), t.budget, [&](index_t q) {
    return q < first
               ? static_cast<expert_id>(moeroute::random_below(static_cast<std::uint32_t>(t.models),
                                                               1, 2, static_cast<std::uint64_t>(q)))
               : best[static_cast<std::size_t>(q)];
  });
}

}  // namespace example
