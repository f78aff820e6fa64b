// Balancing losses from their formulas, in double, without a thought for speed; and derivatives by
// central differences.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moeroute/base/index.hpp>
#include <vector>

namespace oracle {

using moeroute::index_t;
using row = std::vector<double>;
using rows = std::vector<row>;

/// Logits [T, E] and which tokens take part.
struct batch {
  index_t tokens = 0, experts = 0;
  row logits;
  std::vector<std::uint8_t> mask;  ///< empty: all

  bool live(index_t t) const { return mask.empty() || mask[static_cast<std::size_t>(t)] != 0; }
  double at(index_t t, index_t e) const {
    return logits[static_cast<std::size_t>(t * experts + e)];
  }
  row of(index_t t) const {
    row z;
    for (index_t e = 0; e < experts; ++e) z.push_back(at(t, e));
    return z;
  }
};

inline double log_sum_exp(const row& z) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (const double x : z)
    if (x > top) top = x;
  for (const double x : z)
    if (x == x) sum += std::exp(x - top);
  return top + std::log(sum);
}

inline row softmax(const row& z) {
  const double lse = log_sum_exp(z);
  row p;
  for (const double x : z) p.push_back(x == x ? std::exp(x - lse) : 0.0);
  return p;
}

inline row normalized_sigmoid(const row& z) {
  row q;
  double sum = 0.0;
  for (const double x : z) q.push_back(1.0 / (1.0 + std::exp(-x)));
  for (const double s : q) sum += s;
  for (double& s : q) s /= sum;
  return q;
}

inline row normalized_sqrt_softplus(const row& z) {
  row q;
  double sum = 0.0;
  for (const double x : z) q.push_back(std::sqrt(std::log1p(std::exp(x))));
  for (const double s : q) sum += s;
  for (double& s : q) s /= sum;
  return q;
}

/// The probabilities of the tokens of a batch that take part, in [first, last).
template <class Score>
rows probabilities(const batch& b, Score score, index_t first, index_t last) {
  rows p;
  for (index_t t = first; t < last; ++t)
    if (b.live(t)) p.push_back(score(b.of(t)));
  return p;
}
inline rows probabilities(const batch& b) {
  return probabilities(b, [](const row& z) { return softmax(z); }, 0, b.tokens);
}

inline row mean(const rows& p, std::size_t experts) {
  row m(experts, 0.0);
  for (const row& r : p)
    for (std::size_t e = 0; e < experts; ++e) m[e] += r[e] / static_cast<double>(p.size());
  return m;
}

inline double entropy(const row& p) {
  double h = 0.0;
  for (const double x : p)
    if (x > 0.0) h -= x * std::log(x);
  return h;
}

/// E * sum_e f_e P_e with f_e = count_e / (k T).
inline double switch_loss(const rows& p, const row& counts, double k) {
  const row mean_p = mean(p, counts.size());
  double value = 0.0;
  for (std::size_t e = 0; e < counts.size(); ++e)
    value += counts[e] / (k * static_cast<double>(p.size())) * mean_p[e];
  return value * static_cast<double>(counts.size());
}

/// The mean over sequences that have a token of switch_loss.
template <class Score>
double sequence_loss(const batch& b, Score score, index_t length, const rows& counts, double k) {
  double value = 0.0, sequences = 0.0;
  for (index_t s = 0; s * length < b.tokens; ++s) {
    const rows p = probabilities(b, score, s * length, std::min(b.tokens, (s + 1) * length));
    if (p.empty()) continue;
    value += switch_loss(p, counts[static_cast<std::size_t>(s)], k);
    sequences += 1.0;
  }
  return value / sequences;
}

/// sum_g (mean of f in g) (sum of P in g).
inline double device_loss(const rows& p, const row& counts, double k, std::size_t devices) {
  const row mean_p = mean(p, counts.size());
  const std::size_t each = counts.size() / devices;
  double value = 0.0;
  for (std::size_t g = 0; g < devices; ++g) {
    double f = 0.0, mass = 0.0;
    for (std::size_t e = g * each; e < (g + 1) * each; ++e) {
      f += static_cast<double>(counts.size()) / (k * static_cast<double>(p.size())) * counts[e] /
           static_cast<double>(each);
      mass += mean_p[e];
    }
    value += f * mass;
  }
  return value;
}

/// sum_g D / (M T) tokens_g (sum of P in g).
inline double communication_loss(const rows& p, const row& tokens, double most) {
  const std::size_t experts = p.front().size(), each = experts / tokens.size();
  const row mean_p = mean(p, experts);
  double value = 0.0;
  for (std::size_t e = 0; e < experts; ++e)
    value += static_cast<double>(tokens.size()) / (most * static_cast<double>(p.size())) *
             tokens[e / each] * mean_p[e];
  return value;
}

/// var(x) / (mean(x)^2 + eps).
inline double squared_variation(const row& x, bool unbiased, double eps) {
  const double n = static_cast<double>(x.size());
  double mu = 0.0, var = 0.0;
  for (const double v : x) mu += v / n;
  for (const double v : x) var += (v - mu) * (v - mu) / (unbiased ? n - 1.0 : n);
  return var / (mu * mu + eps);
}

inline double importance_loss(const rows& p, bool unbiased, double eps = 1e-10) {
  row sum = mean(p, p.front().size());
  for (double& s : sum) s *= static_cast<double>(p.size());
  return squared_variation(sum, unbiased, eps);
}

inline double mean_importance_loss(const rows& p) {
  double value = 0.0;
  for (const double m : mean(p, p.front().size())) value += m * m;
  return value * static_cast<double>(p.front().size());
}

template <class Value>
double mean_of(const rows& p, Value value) {
  double sum = 0.0;
  for (const row& r : p) sum += value(r) / static_cast<double>(p.size());
  return sum;
}

inline double tsallis(const row& p, double q) {
  double sum = 0.0;
  for (const double x : p)
    if (x > 0.0) sum += std::pow(x, q);
  return (1.0 - sum) / (q - 1.0);
}

/// The L1 norm of p / (|p|_2 + 1e-9).
inline double sparsity(const row& p) {
  double squares = 0.0, sum = 0.0;
  for (const double x : p) squares += x * x;
  for (const double x : p) sum += x / (std::sqrt(squares) + 1e-9);
  return sum;
}

inline double router_z_loss(const batch& b) {
  double sum = 0.0, n = 0.0;
  for (index_t t = 0; t < b.tokens; ++t)
    if (b.live(t)) {
      sum += std::pow(log_sum_exp(b.of(t)), 2);
      n += 1.0;
    }
  return sum / n;
}

/// d value / d x by central differences with one step of extrapolation: about 1e-10 of the value's
/// scale.
template <class Value>
row derivative(row x, Value value) {
  row slope(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double was = x[i];
    const auto difference = [&](double h) {
      x[i] = was + h;
      const double up = value(x);
      x[i] = was - h;
      const double down = value(x);
      x[i] = was;
      return (up - down) / (2.0 * h);
    };
    slope[i] = (4.0 * difference(5e-4) - difference(1e-3)) / 3.0;
  }
  return slope;
}

}  // namespace oracle
