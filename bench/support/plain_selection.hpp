// Baselines of selection: what one writes in an afternoon. All of them give the library's order:
// value descending, then expert ascending, NaN as -inf, and no_expert where nothing finite is left.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include <moeroute/base/index.hpp>

namespace bench {

using moeroute::index_t;

/// One row's choices, best first. Memory is kept from row to row.
class plain_selection {
 public:
  static constexpr float lowest = -std::numeric_limits<float>::infinity();

  void partial_sort(const float* row, index_t experts, index_t k, std::int32_t* id, float* value) {
    start(row, experts);
    std::partial_sort(order_.begin(), order_.begin() + k, order_.end(), better());
    finish(k, id, value);
  }

  void nth_element(const float* row, index_t experts, index_t k, std::int32_t* id, float* value) {
    start(row, experts);
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), better());
    std::sort(order_.begin(), order_.begin() + k, better());
    finish(k, id, value);
  }

  /// A sorted list of k, into which every logit that beats its last is inserted.
  static void insertion(const float* row, index_t experts, index_t k, std::int32_t* id,
                        float* value) {
    for (index_t r = 0; r < k; ++r) {
      id[r] = moeroute::no_expert;
      value[r] = lowest;
    }
    for (index_t e = 0; e < experts; ++e) {
      const float x = row[e];
      if (!(x > value[k - 1])) continue;
      index_t r = k - 1;
      for (; r > 0 && x > value[r - 1]; --r) {
        value[r] = value[r - 1];
        id[r] = id[r - 1];
      }
      value[r] = x;
      id[r] = static_cast<std::int32_t>(e);
    }
  }

  /// The maximum, k times over, as Eigen expressions.
  void eigen(const float* row, index_t experts, index_t k, std::int32_t* id, float* value) {
    const Eigen::Map<const Eigen::ArrayXf> x(row, experts);
    left_ = x.isNaN().select(lowest, x);
    for (index_t r = 0; r < k; ++r) {
      Eigen::Index best;
      value[r] = left_.maxCoeff(&best);
      id[r] = value[r] > lowest ? static_cast<std::int32_t>(best) : moeroute::no_expert;
      left_[best] = lowest;
    }
  }

 private:
  void start(const float* row, index_t experts) {
    clean_.resize(static_cast<std::size_t>(experts));
    order_.resize(static_cast<std::size_t>(experts));
    for (std::size_t e = 0; e < clean_.size(); ++e) clean_[e] = row[e] == row[e] ? row[e] : lowest;
    std::iota(order_.begin(), order_.end(), 0);
  }
  struct before {
    const float* x;
    bool operator()(std::int32_t a, std::int32_t b) const {
      return x[a] > x[b] || (x[a] == x[b] && a < b);
    }
  };
  before better() const { return {clean_.data()}; }
  void finish(index_t k, std::int32_t* id, float* value) const {
    for (index_t r = 0; r < k; ++r) {
      const std::int32_t e = order_[static_cast<std::size_t>(r)];
      value[r] = clean_[static_cast<std::size_t>(e)];
      id[r] = value[r] > lowest ? e : moeroute::no_expert;
    }
  }

  std::vector<float> clean_;
  std::vector<std::int32_t> order_;
  Eigen::ArrayXf left_;
};

}  // namespace bench
