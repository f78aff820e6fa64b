// What routing should decide, in double and one row at a time: slow and obvious.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moeroute/base/index.hpp>
#include <numeric>
#include <vector>

namespace oracle {

using moeroute::expert_id;
using moeroute::index_t;

/// The columns of a row in the order in which they are chosen: value descending, then column
/// ascending. NaN and -inf are not in it.
inline std::vector<expert_id> order(const float* row, index_t n) {
  std::vector<expert_id> ids;
  for (index_t e = 0; e < n; ++e)
    if (row[e] > -std::numeric_limits<float>::infinity()) ids.push_back(static_cast<expert_id>(e));
  std::stable_sort(ids.begin(), ids.end(),
                   [&](expert_id a, expert_id b) { return row[a] > row[b]; });
  return ids;
}

/// The first k of order(), no_expert where there are fewer.
inline std::vector<expert_id> top_k(const float* row, index_t n, index_t k) {
  std::vector<expert_id> ids = order(row, n);
  ids.resize(static_cast<std::size_t>(k), moeroute::no_expert);
  return ids;
}

/// Softmax over the columns in `ids`: value by column, 0 elsewhere; +inf columns share the whole.
inline std::vector<double> softmax(const float* row, index_t n, const std::vector<expert_id>& ids) {
  std::vector<double> score(static_cast<std::size_t>(n), 0.0);
  double max = -std::numeric_limits<double>::infinity();
  for (const expert_id e : ids)
    if (e >= 0) max = std::max(max, static_cast<double>(row[e]));
  double sum = 0;
  for (const expert_id e : ids) {
    if (e < 0) continue;
    const double z = static_cast<double>(row[e]);
    score[static_cast<std::size_t>(e)] = z == max ? 1.0 : std::exp(z - max);
    sum += score[static_cast<std::size_t>(e)];
  }
  for (double& s : score) s = sum > 0 ? s / sum : 0.0;
  return score;
}

enum class domain { all, selected };
enum class divisor { none, sum, lp };
enum class eps_place { none, add, clamp };

/// A softmax top-k router in words.
struct softmax_routing {
  domain scored = domain::all;
  divisor normalize = divisor::none;
  double p = 1;
  eps_place eps_where = eps_place::none;
  double eps = 0;
  double scale = 1;
};

struct decision {
  std::vector<expert_id> ids;   ///< [T, k]
  std::vector<double> weights;  ///< [T, k]
};

inline decision route(const softmax_routing& how, const std::vector<float>& logits, index_t tokens,
                      index_t experts, index_t k) {
  decision d;
  for (index_t t = 0; t < tokens; ++t) {
    const float* row = logits.data() + t * experts;
    const std::vector<expert_id> chosen = top_k(row, experts, k);
    const std::vector<double> score =
        softmax(row, experts, how.scored == domain::all ? order(row, experts) : chosen);
    std::vector<double> weight;
    for (const expert_id e : chosen)
      weight.push_back(e < 0 ? 0.0 : score[static_cast<std::size_t>(e)]);
    double divide = 1;
    if (how.normalize == divisor::sum) {
      divide = std::accumulate(weight.begin(), weight.end(), 0.0);
    } else if (how.normalize == divisor::lp) {
      double sum = 0;
      for (const double w : weight) sum += std::pow(w, how.p);
      divide = std::pow(sum, 1 / how.p);
    }
    if (how.normalize != divisor::none) {
      if (how.eps_where == eps_place::add) divide += how.eps;
      if (how.eps_where == eps_place::clamp) divide = std::max(divide, how.eps);
    }
    for (double& w : weight) w = divide > 0 ? how.scale * w / divide : 0.0;
    d.ids.insert(d.ids.end(), chosen.begin(), chosen.end());
    d.weights.insert(d.weights.end(), weight.begin(), weight.end());
  }
  return d;
}

}  // namespace oracle
