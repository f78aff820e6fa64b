// What the routers that see the whole batch should decide, in double: slow and obvious.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <moeroute/base/index.hpp>
#include <numeric>
#include <vector>

#include "oracle/routing.hpp"

namespace oracle {

/// The rows of a column in the order in which an expert takes them: value descending, then row
/// ascending; NaN and -inf are not in it.
template <class T>
std::vector<index_t> column_order(const std::vector<T>& matrix, index_t rows, index_t cols,
                                  index_t column) {
  std::vector<index_t> order;
  const auto value = [&](index_t r) { return matrix[static_cast<std::size_t>(r * cols + column)]; };
  for (index_t r = 0; r < rows; ++r)
    if (value(r) > -std::numeric_limits<T>::infinity()) order.push_back(r);
  std::stable_sort(order.begin(), order.end(),
                   [&](index_t a, index_t b) { return value(a) > value(b); });
  return order;
}

/// Softmax of every row, in double.
inline std::vector<double> softmax_rows(const std::vector<float>& logits, index_t tokens,
                                        index_t experts) {
  std::vector<double> p;
  for (index_t t = 0; t < tokens; ++t) {
    const float* row = logits.data() + t * experts;
    const std::vector<double> one = softmax(row, experts, order(row, experts));
    p.insert(p.end(), one.begin(), one.end());
  }
  return p;
}

struct transport {
  std::vector<double> values;  ///< [T, E]
  int iterations = 0;
};

enum class scaling_order { rows_then_columns, columns_then_rows };

/// Sinkhorn on exp(z / epsilon) until the mean change of the column factors is at most `tolerance`.
inline transport sinkhorn(const std::vector<double>& z, index_t tokens, index_t experts,
                          double row_sum, const std::vector<double>& col_sum, double epsilon,
                          double eps, double tolerance, int most_iterations, scaling_order order) {
  const auto T = static_cast<std::size_t>(tokens), E = static_cast<std::size_t>(experts);
  std::vector<double> k(T * E), u(T, 1.0), v(E, 1.0);
  for (std::size_t t = 0; t < T; ++t) {
    const double max = *std::max_element(&z[t * E], &z[t * E] + E);
    for (std::size_t e = 0; e < E; ++e) k[t * E + e] = std::exp((z[t * E + e] - max) / epsilon);
  }
  const auto rows = [&] {
    for (std::size_t t = 0; t < T; ++t) {
      double dot = 0;
      for (std::size_t e = 0; e < E; ++e) dot += k[t * E + e] * v[e];
      u[t] = row_sum / (dot + eps);
    }
  };
  double change = 0;
  const auto columns = [&] {
    change = 0;
    for (std::size_t e = 0; e < E; ++e) {
      double sum = 0;
      for (std::size_t t = 0; t < T; ++t) sum += k[t * E + e] * u[t];
      const double next = col_sum[e] / (sum + eps);
      change += std::abs(next - v[e]) / static_cast<double>(E);
      v[e] = next;
    }
  };
  transport p;
  do {
    order == scaling_order::rows_then_columns ? rows() : columns();
    order == scaling_order::rows_then_columns ? columns() : rows();
    ++p.iterations;
  } while (change > tolerance && p.iterations < most_iterations);
  for (std::size_t t = 0; t < T; ++t)
    for (std::size_t e = 0; e < E; ++e) p.values.push_back(u[t] * k[t * E + e] * v[e]);
  return p;
}

inline transport sinkhorn(const std::vector<double>& z, index_t tokens, index_t experts,
                          double row_sum, double col_sum, double epsilon, double eps,
                          double tolerance, int most_iterations, scaling_order order) {
  return sinkhorn(z, tokens, experts, row_sum,
                  std::vector<double>(static_cast<std::size_t>(experts), col_sum), epsilon, eps,
                  tolerance, most_iterations, order);
}

/// Sparsity-constrained transport in the orientation of expert choice: softmax similarities, rows
/// 1, columns T / E, at most k entries per column, none at -inf, `steps` steps of Adam on the
/// semi-dual.
inline std::vector<double> sparse_plan(const std::vector<double>& similarity, index_t tokens,
                                       index_t experts, index_t k, double gamma, double rate,
                                       index_t steps) {
  const auto T = static_cast<std::size_t>(tokens), E = static_cast<std::size_t>(experts);
  const double b = static_cast<double>(tokens) / static_cast<double>(experts);
  std::vector<double> a(T, 0.0), m(T, 0.0), v(T, 0.0), plan;
  for (index_t step = 0;; ++step) {
    plan.assign(T * E, 0.0);
    for (std::size_t e = 0; e < E; ++e) {
      std::vector<double> x(T);
      for (std::size_t t = 0; t < T; ++t) x[t] = (similarity[t * E + e] + a[t]) / (gamma * b);
      auto order = column_order(x, tokens, 1, 0);
      order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
      // The last i at which the i-th largest exceeds (sum of the i largest - 1) / i.
      double sum = 0, theta = 0;
      for (std::size_t i = 0; i < order.size(); ++i) {
        sum += x[static_cast<std::size_t>(order[i])];
        const double candidate = (sum - 1) / static_cast<double>(i + 1);
        if (x[static_cast<std::size_t>(order[i])] > candidate) theta = candidate;
      }
      for (const index_t t : order)
        plan[static_cast<std::size_t>(t) * E + e] =
            b * std::max(0.0, x[static_cast<std::size_t>(t)] - theta);
    }
    if (step == steps) return plan;
    for (std::size_t t = 0; t < T; ++t) {
      double g = -1;
      for (std::size_t e = 0; e < E; ++e) g += plan[t * E + e];
      m[t] = 0.9 * m[t] + 0.1 * g;
      v[t] = 0.999 * v[t] + 0.001 * g * g;
      const auto n = static_cast<double>(step + 1);
      a[t] -= rate * (m[t] / (1 - std::pow(0.9, n))) /
              (std::sqrt(v[t] / (1 - std::pow(0.999, n))) + 1e-8);
    }
  }
}

/// The expert of every token by the published auction of BASE, in float, whose roundings decide:
/// experts list their T / E + 1 best, bid what each is worth above the last of them, and the
/// highest bid raises a token's price; for 100 rounds a winner bids no more than eps for what it
/// holds.
inline std::vector<expert_id> auction(const std::vector<float>& z, index_t tokens,
                                      index_t experts) {
  const auto T = static_cast<std::size_t>(tokens), E = static_cast<std::size_t>(experts);
  const std::size_t jobs = T / E;
  const float most = *std::max_element(z.begin(), z.end());
  const float eps = std::max((most - *std::min_element(z.begin(), z.end())) / 50.0f, 1e-4f);
  std::vector<float> value = z, price(T, 0.0f);
  std::vector<expert_id> holder(T, -1), taken;
  for (int round = 0;; ++round) {
    std::vector<float> bid(T * E, 0.0f);
    taken.assign(T, -1);
    std::size_t placed = 0;
    for (std::size_t e = 0; e < E; ++e) {
      const auto order = column_order(value, tokens, experts, static_cast<index_t>(e));
      const auto of = [&](std::size_t i) {
        return value[static_cast<std::size_t>(order[i]) * E + e];
      };
      for (std::size_t i = 0; i < jobs; ++i) {
        const auto t = static_cast<std::size_t>(order[i]);
        bid[t * E + e] = (of(i) - of(jobs)) + eps;
        placed += taken[t] < 0;
        taken[t] = static_cast<expert_id>(e);
      }
    }
    if (placed == T) return taken;
    for (std::size_t t = 0; t < T; ++t) {
      if (round > 0 && round < 100 && holder[t] >= 0)
        bid[t * E + static_cast<std::size_t>(holder[t])] = eps;
      const auto row = bid.begin() + static_cast<std::ptrdiff_t>(t * E);
      const auto best = std::max_element(row, row + static_cast<std::ptrdiff_t>(E));
      holder[t] = *best > 0.0f ? static_cast<expert_id>(best - row) : -1;
      price[t] += *best;
      for (std::size_t e = 0; e < E; ++e) value[t * E + e] = z[t * E + e] - price[t];
      if (holder[t] >= 0) {
        const std::size_t held = t * E + static_cast<std::size_t>(holder[t]);
        value[held] = round < 100 ? most : z[held];
      }
    }
  }
}

}  // namespace oracle
