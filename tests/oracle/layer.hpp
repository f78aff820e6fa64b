// The stages after routing, and a whole layer, in double by plain loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <moeroute/base/index.hpp>
#include <vector>

#include "oracle/routing.hpp"

namespace oracle {

/// [rows, cols], row by row.
struct matrix {
  index_t rows = 0;
  index_t cols = 0;
  std::vector<double> value;

  matrix() = default;
  matrix(index_t r, index_t c) : rows(r), cols(c), value(static_cast<std::size_t>(r * c)) {}
  template <class T>
  matrix(index_t r, index_t c, const T* data) : matrix(r, c) {
    for (index_t i = 0; i < r * c; ++i)
      value[static_cast<std::size_t>(i)] = static_cast<double>(data[i]);
  }
  double& operator()(index_t r, index_t c) { return value[static_cast<std::size_t>(r * cols + c)]; }
  double operator()(index_t r, index_t c) const {
    return value[static_cast<std::size_t>(r * cols + c)];
  }
};

/// x w^T + b.
inline matrix linear(const matrix& x, const matrix& w, const std::vector<double>& b = {}) {
  matrix y(x.rows, w.rows);
  for (index_t i = 0; i < x.rows; ++i)
    for (index_t j = 0; j < w.rows; ++j) {
      double sum = b.empty() ? 0.0 : b[static_cast<std::size_t>(j)];
      for (index_t c = 0; c < x.cols; ++c) sum += x(i, c) * w(j, c);
      y(i, j) = sum;
    }
  return y;
}

struct plan {
  std::vector<std::int32_t> offsets;         ///< [E + 1]
  std::vector<std::int32_t> token_of_slot;   ///< [slots]
  std::vector<std::int32_t> slot_of_choice;  ///< [T, k], -1 without a slot
};

/// By brute force: expert by expert, all choices are looked at.
inline plan make_plan(const std::vector<expert_id>& ids, index_t tokens, index_t experts,
                      index_t k) {
  plan p;
  p.slot_of_choice.assign(static_cast<std::size_t>(tokens * k), -1);
  for (index_t e = 0; e < experts; ++e) {
    p.offsets.push_back(static_cast<std::int32_t>(p.token_of_slot.size()));
    for (index_t c = 0; c < tokens * k; ++c) {
      if (ids[static_cast<std::size_t>(c)] != e) continue;
      p.slot_of_choice[static_cast<std::size_t>(c)] =
          static_cast<std::int32_t>(p.token_of_slot.size());
      p.token_of_slot.push_back(static_cast<std::int32_t>(c / k));
    }
  }
  p.offsets.push_back(static_cast<std::int32_t>(p.token_of_slot.size()));
  return p;
}

inline matrix dispatch(const matrix& x, const plan& p) {
  matrix slots(static_cast<index_t>(p.token_of_slot.size()), x.cols);
  for (index_t s = 0; s < slots.rows; ++s)
    for (index_t c = 0; c < x.cols; ++c)
      slots(s, c) = x(p.token_of_slot[static_cast<std::size_t>(s)], c);
  return slots;
}

template <class Weights>
matrix combine(const matrix& slots, const plan& p, const Weights& weights, index_t tokens,
               index_t k) {
  matrix y(tokens, slots.cols);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t r = 0; r < k; ++r) {
      const auto choice = static_cast<std::size_t>(t * k + r);
      const index_t s = p.slot_of_choice[choice];
      if (s < 0) continue;
      for (index_t c = 0; c < slots.cols; ++c)
        y(t, c) += static_cast<double>(weights[choice]) * slots(s, c);
    }
  return y;
}

struct swiglu {
  matrix gate, up, down;  ///< [ff, d], [ff, d], [d, ff]
};

inline matrix run(const swiglu& expert, const matrix& x) {
  matrix hidden = linear(x, expert.gate);
  const matrix up = linear(x, expert.up);
  for (std::size_t i = 0; i < hidden.value.size(); ++i) {
    const double g = hidden.value[i];
    hidden.value[i] = g / (1.0 + std::exp(-g)) * up.value[i];
  }
  return linear(hidden, expert.down);
}

/// The layer token by token, with ids and weights already decided.
template <class Ids, class Weights>
matrix mixture(const matrix& x, const std::vector<swiglu>& experts, const Ids& ids,
               const Weights& weights, index_t k) {
  matrix y(x.rows, x.cols);
  for (index_t t = 0; t < x.rows; ++t) {
    const matrix row(1, x.cols, x.value.data() + t * x.cols);
    for (index_t r = 0; r < k; ++r) {
      const auto choice = static_cast<std::size_t>(t * k + r);
      if (ids[choice] < 0) continue;
      const matrix out = run(experts[static_cast<std::size_t>(ids[choice])], row);
      for (index_t c = 0; c < x.cols; ++c)
        y(t, c) += static_cast<double>(weights[choice]) * out(0, c);
    }
  }
  return y;
}

}  // namespace oracle
