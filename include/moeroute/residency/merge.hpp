// Experts that become one: who joins whom, hidden units that are put in the same order, weights
// that are averaged.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include <moeroute/base/linear_assignment.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>

namespace moeroute {

/// The matrices of a SwiGLU expert: gate and up [f, d], down [d, f].
struct swiglu_weights {
  matrix_view<const float> gate{}, up{}, down{};
};

namespace detail {

inline void check_swiglu(const char* where, const swiglu_weights& w, const swiglu_weights& like) {
  check_size(where, "gate.rows", w.gate.rows, like.gate.rows);
  check_size(where, "gate.cols", w.gate.cols, like.gate.cols);
  check_size(where, "up.rows", w.up.rows, like.gate.rows);
  check_size(where, "up.cols", w.up.cols, like.gate.cols);
  check_size(where, "down.rows", w.down.rows, like.gate.cols);
  check_size(where, "down.cols", w.down.cols, like.gate.rows);
}

}  // namespace detail

/// unit[i]: the hidden unit of `other` that stands where unit i of `reference` stands, such that
/// the products of their weights are largest. An expert whose units are permuted (rows of gate and
/// up, columns of down) is the same function. Cost: O(f^2 d + f^3).
inline std::vector<std::int32_t> align_units(const swiglu_weights& reference,
                                             const swiglu_weights& other) {
  detail::check_swiglu("align_units", reference, reference);
  detail::check_swiglu("align_units", other, reference);
  const index_t f = reference.gate.rows, d = reference.gate.cols;
  std::vector<double> gain(static_cast<std::size_t>(f * f));
  for (index_t i = 0; i < f; ++i)
    for (index_t j = 0; j < f; ++j) {
      double sum = 0.0;
      for (index_t c = 0; c < d; ++c)
        sum += static_cast<double>(reference.gate(i, c)) * static_cast<double>(other.gate(j, c)) +
               static_cast<double>(reference.up(i, c)) * static_cast<double>(other.up(j, c)) +
               static_cast<double>(reference.down(c, i)) * static_cast<double>(other.down(c, j));
      gain[static_cast<std::size_t>(i * f + j)] = sum;
    }
  return linear_assignment(gain, f);
}

/// A merged expert.
struct merged_expert {
  std::vector<float> gate, up, down;  ///< [f, d], [f, d], [d, f]
};

/// W = sum u_e W_e / sum u_e, after every expert's units are aligned to those of the first (the
/// dominant one).
///
/// usage: how much each counts, at least 0; all 0 counts as equal. Throws: error where shapes or
/// lengths differ, or a usage is negative. Source: M-SMoE (Li et al. 2024), its paper's intent.
inline merged_expert merge_experts(std::span<const swiglu_weights> experts,
                                   std::span<const double> usage) {
  constexpr const char* where = "merge_experts";
  check_range(where, "experts.size()", static_cast<index_t>(experts.size()), 1, max_experts);
  check_size(where, "usage.size()", static_cast<index_t>(usage.size()),
             static_cast<index_t>(experts.size()));
  double all = 0.0;
  for (const double u : usage) {
    if (!(u >= 0.0)) fail_value(where, "usage", u, ">= 0");
    all += u;
  }
  const swiglu_weights& first = experts[0];
  detail::check_swiglu(where, first, first);
  const index_t f = first.gate.rows, d = first.gate.cols;
  const auto size = static_cast<std::size_t>(f * d);
  std::vector<double> gate(size), up(size), down(size);
  for (std::size_t e = 0; e < experts.size(); ++e) {
    const double u = all > 0.0 ? usage[e] / all : 1.0 / static_cast<double>(experts.size());
    std::vector<std::int32_t> unit(static_cast<std::size_t>(f));
    std::iota(unit.begin(), unit.end(), 0);
    if (e > 0) unit = align_units(first, experts[e]);
    for (index_t i = 0; i < f; ++i)
      for (index_t c = 0; c < d; ++c) {
        const std::int32_t from = unit[static_cast<std::size_t>(i)];
        gate[static_cast<std::size_t>(i * d + c)] +=
            u * static_cast<double>(experts[e].gate(from, c));
        up[static_cast<std::size_t>(i * d + c)] += u * static_cast<double>(experts[e].up(from, c));
        down[static_cast<std::size_t>(c * f + i)] +=
            u * static_cast<double>(experts[e].down(c, from));
      }
  }
  const auto narrow = [](const std::vector<double>& x) {
    std::vector<float> out(x.size());
    std::transform(x.begin(), x.end(), out.begin(), [](double v) { return static_cast<float>(v); });
    return out;
  };
  return {narrow(gate), narrow(up), narrow(down)};
}

/// leader[l][e]: the expert of layer l that expert e is merged into; leaders lead themselves.
///
/// usage [L, E]: how often each was used. logits: a matrix [T, E] per layer, of the same tokens or
/// others. Leaders are the `leaders` most used of all layers, each layer's usage divided by its
/// largest, at least one per layer (ties: lower layer, lower expert); everybody else joins the
/// leader of the layer whose column of logits has the largest cosine with its own. Throws: error
/// where sizes differ, a usage is not finite, or leaders is outside [L, L * E]. Source: M-SMoE (Li
/// et al. 2024).
inline std::vector<std::vector<expert_id>> group_experts(
    matrix_view<const double> usage, std::span<const matrix_view<const float>> logits,
    index_t leaders) {
  constexpr const char* where = "group_experts";
  const index_t layers = usage.rows, experts = usage.cols;
  check_size(where, "logits.size()", static_cast<index_t>(logits.size()), layers);
  check_range(where, "leaders", leaders, layers, layers * experts);
  std::vector<double> worth;  // of layer * E + expert
  for (index_t l = 0; l < layers; ++l) {
    for (index_t e = 0; e < experts; ++e)
      if (!std::isfinite(usage(l, e))) fail_value(where, "usage", usage(l, e), "a finite number");
    const index_t best = std::max_element(usage.row(l), usage.row(l) + experts) - usage.row(l);
    const double most = usage(l, best);
    for (index_t e = 0; e < experts; ++e)
      worth.push_back(e == best ? 2.0 : most > 0.0 ? usage(l, e) / most : 0.0);
  }
  std::vector<index_t> order(worth.size());
  std::iota(order.begin(), order.end(), index_t{0});
  std::sort(order.begin(), order.end(),
            greatest_first([&](index_t i) { return worth[static_cast<std::size_t>(i)]; }));
  std::vector<std::vector<expert_id>> leader(
      static_cast<std::size_t>(layers),
      std::vector<expert_id>(static_cast<std::size_t>(experts), no_expert));
  for (index_t i = 0; i < leaders; ++i) {
    const index_t key = order[static_cast<std::size_t>(i)], e = key % experts;
    leader[static_cast<std::size_t>(key / experts)][static_cast<std::size_t>(e)] =
        static_cast<expert_id>(e);
  }
  for (index_t l = 0; l < layers; ++l) {
    const auto& z = logits[static_cast<std::size_t>(l)];
    check_size(where, "logits.cols", z.cols, experts);
    auto& own = leader[static_cast<std::size_t>(l)];
    const std::vector<expert_id> leads = own;
    const auto product = [&](expert_id a, expert_id b) {
      double sum = 0.0;
      for (index_t t = 0; t < z.rows; ++t)
        sum += static_cast<double>(z(t, a)) * static_cast<double>(z(t, b));
      return sum;
    };
    for (expert_id e = 0; e < experts; ++e) {
      if (leads[static_cast<std::size_t>(e)] != no_expert) continue;
      double best = -2.0;
      for (expert_id a = 0; a < experts; ++a) {
        if (leads[static_cast<std::size_t>(a)] == no_expert) continue;
        const double lengths = std::sqrt(product(a, a) * product(e, e));
        const double cosine =
            lengths > 0.0 && std::isfinite(lengths) ? product(a, e) / lengths : 0.0;
        if (!(cosine > best)) continue;
        best = cosine;
        own[static_cast<std::size_t>(e)] = a;
      }
    }
  }
  return leader;
}

}  // namespace moeroute
