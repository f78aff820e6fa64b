// Baseline of routing: a described top-k gate as one writes it in an afternoon, scores by std::exp
// and the choice by std::partial_sort.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include <moeroute/base/workspace.hpp>
#include <moeroute/policy/router_spec.hpp>
#include <moeroute/simd/elementwise.hpp>

#include "support/floors.hpp"
#include "support/plain_selection.hpp"

namespace bench {

/// What weights are multiplied by after everything else.
inline float weight_factor(const moeroute::router_spec& spec) {
  const float scale = spec.scale_where == moeroute::scale_place::weights ? spec.scale : 1.0f;
  return spec.divide_by_k ? scale / static_cast<float>(spec.k) : scale;
}

/// Scores of one row's k choices to its weights: normalised and scaled as the spec says.
inline void finish_weights(const moeroute::router_spec& spec, float* weight) {
  using moeroute::eps_mode;
  float divisor = 1.0f;
  if (spec.normalize == moeroute::normalization::sum) {
    divisor = 0.0f;
    for (index_t r = 0; r < spec.k; ++r) divisor += weight[r];
    if (spec.eps_where == eps_mode::add) divisor += spec.eps;
    if (spec.eps_where == eps_mode::clamp) divisor = std::max(divisor, spec.eps);
  }
  const float factor = weight_factor(spec);
  for (index_t r = 0; r < spec.k; ++r) weight[r] = weight[r] / divisor * factor;
}

/// One row's ids and weights for the specs that choose the k best; memory is kept from row to row.
class plain_gate {
 public:
  explicit plain_gate(const moeroute::router_spec& spec, std::span<const float> bias = {})
      : spec_(spec), bias_(bias) {}

  /// Whether this gate can carry out a spec.
  static bool can(const moeroute::router_spec& s) {
    using namespace moeroute;
    return s.selection == selection_kind::top_k && !s.per_expert_scale && s.softcap == 0.0f &&
           s.temperature == 1.0f && s.normalize != normalization::lp &&
           s.score != score_kind::uniform;
  }

  void operator()(const float* row, std::int32_t* id, float* weight) {
    using namespace moeroute;
    if (spec_.score == score_kind::softmax && spec_.domain == score_domain::selected) {
      select_.partial_sort(row, spec_.experts, spec_.k, id, weight);
      const float max = weight[0];
      float sum = 0.0f;
      for (index_t r = 0; r < spec_.k; ++r)
        sum += weight[r] = id[r] < 0 ? 0.0f : std::exp(weight[r] - max);
      for (index_t r = 0; r < spec_.k; ++r) weight[r] /= sum;
      finish_weights(spec_, weight);
      return;
    }
    scores(row);
    choice_ = score_;
    if (spec_.selection_bias)
      for (std::size_t e = 0; e < choice_.size(); ++e) choice_[e] += bias_[e];
    if (spec_.groups > 1) keep_groups();
    select_.partial_sort(choice_.data(), spec_.experts, spec_.k, id, weight);
    for (index_t r = 0; r < spec_.k; ++r)
      weight[r] = id[r] < 0 ? 0.0f : score_[static_cast<std::size_t>(id[r])];
    finish_weights(spec_, weight);
  }

 private:
  void scores(const float* row) {
    using moeroute::score_kind;
    const auto experts = static_cast<std::size_t>(spec_.experts);
    score_.resize(experts);
    if (spec_.score == score_kind::softmax) {
      constexpr float lowest = plain_selection::lowest;  // NaN and -inf are never chosen
      float max = lowest, sum = 0.0f;
      for (std::size_t e = 0; e < experts; ++e) max = row[e] > max ? row[e] : max;
      for (std::size_t e = 0; e < experts; ++e) {
        const bool there = row[e] > lowest;
        score_[e] = there ? std::exp(row[e] - max) : lowest;
        sum += there ? score_[e] : 0.0f;
      }
      for (float& s : score_) s /= sum;
      return;
    }
    for (std::size_t e = 0; e < experts; ++e) {
      const float z = row[e];
      score_[e] = spec_.score == score_kind::sigmoid         ? 1.0f / (1.0f + std::exp(-z))
                  : spec_.score == score_kind::sqrt_softplus ? std::sqrt(std::log1p(std::exp(z)))
                  : spec_.score == score_kind::relu          ? std::max(z, 0.0f)
                                                             : z;
    }
  }

  // Only the best groups stay in the running.
  void keep_groups() {
    const index_t size = spec_.experts / spec_.groups;
    group_.resize(static_cast<std::size_t>(spec_.groups));
    for (index_t g = 0; g < spec_.groups; ++g) {
      const float* of = choice_.data() + g * size;
      float first = plain_selection::lowest, second = first;
      for (index_t e = 0; e < size; ++e) {
        if (of[e] > first) {
          second = first;
          first = of[e];
        } else {
          second = std::max(second, of[e]);
        }
      }
      const bool pair = spec_.group_score == moeroute::group_score::top2_sum;
      group_[static_cast<std::size_t>(g)] = {pair ? first + second : first, g};
    }
    std::partial_sort(group_.begin(), group_.begin() + spec_.topk_group, group_.end(),
                      [](const auto& a, const auto& b) {
                        return a.first > b.first || (a.first == b.first && a.second < b.second);
                      });
    for (auto g = group_.begin() + spec_.topk_group; g != group_.end(); ++g)
      std::fill_n(choice_.data() + g->second * size, size, spec_.group_fill);
  }

  moeroute::router_spec spec_;
  std::span<const float> bias_;
  plain_selection select_;
  std::vector<float> score_, choice_;
  std::vector<std::pair<float, index_t>> group_;
};

/// The same by what a good engineer would write for one token: no more exponentials than are
/// needed, scores by vectors, and a selection that sorts nothing. Softmax and sigmoid gates.
class quick_gate {
 public:
  /// How the k best are found.
  enum class way { insertion, max_passes };

  quick_gate(const moeroute::router_spec& spec, std::span<const float> bias, way w)
      : spec_(spec), bias_(bias), way_(w), score_(spec.experts), choice_(spec.experts) {}

  static bool can(const moeroute::router_spec& s) {
    using moeroute::score_kind;
    return plain_gate::can(s) && (s.score == score_kind::softmax || s.score == score_kind::sigmoid);
  }

  void operator()(const float* row, std::int32_t* id, float* weight) {
    using namespace moeroute;
    const index_t experts = spec_.experts, k = spec_.k;
    const bool monotone = !spec_.selection_bias && spec_.groups <= 1;
    if (!monotone) {
      by_vectors([](simd::vfloat<> x) { return simd::sigmoid<simd::default_arch>(x); }, row,
                 score_.data());
      for (index_t e = 0; e < experts; ++e)
        choice_[e] = score_[e] + (spec_.selection_bias ? bias_[static_cast<std::size_t>(e)] : 0.0f);
      if (spec_.groups > 1) keep_groups();
    } else {
      std::copy_n(row, experts, choice_.data());
    }
    if (way_ == way::insertion)
      plain_selection::insertion(choice_.data(), experts, k, id, weight);
    else
      max_passes(id, weight);
    if (!monotone) {
      for (index_t r = 0; r < k; ++r) weight[r] = score_[id[r]];
    } else if (spec_.score == score_kind::sigmoid) {
      for (index_t r = 0; r < k; ++r) weight[r] = 1.0f / (1.0f + std::exp(-weight[r]));
    } else {
      const float max = weight[0];
      const bool all = spec_.domain == score_domain::all && spec_.normalize == normalization::none;
      float sum = 0.0f;
      if (all) {
        by_vectors(
            [max](simd::vfloat<> x) {
              return simd::exp<simd::default_arch>(x - simd::vfloat<>(max));
            },
            row, score_.data());
        simd::vfloat<> sums(0.0f);
        index_t e = 0;
        constexpr index_t w = simd::width<>;
        for (; e + w <= experts; e += w) sums += simd::vfloat<>::load_unaligned(score_.data() + e);
        sum = xsimd::reduce_add(sums);
        for (; e < experts; ++e) sum += score_[e];
      }
      for (index_t r = 0; r < k; ++r) {
        weight[r] = std::exp(weight[r] - max);
        if (!all) sum += weight[r];
      }
      for (index_t r = 0; r < k; ++r) weight[r] *= weight_factor(spec_) / sum;
      return;
    }
    finish_weights(spec_, weight);
  }

 private:
  template <class F>
  void by_vectors(F&& f, const float* row, float* out) const {
    moeroute::simd::map_row<moeroute::simd::default_arch>(row, spec_.experts, out, f);
  }

  // Clobbers the choice scores.
  void max_passes(std::int32_t* id, float* value) {
    using F = moeroute::simd::vfloat<>;
    constexpr index_t w = moeroute::simd::width<>;
    const index_t experts = spec_.experts;
    for (index_t r = 0; r < spec_.k; ++r) {
      max_of_rows(choice_.data(), 1, experts, &value[r]);
      index_t e = 0;
      const F best(value[r]);
      while (e + w <= experts && !xsimd::any(F::load_unaligned(choice_.data() + e) == best)) e += w;
      while (choice_[e] != value[r]) ++e;
      id[r] = static_cast<std::int32_t>(e);
      choice_[e] = plain_selection::lowest;
    }
  }

  void keep_groups() {
    const index_t size = spec_.experts / spec_.groups;
    float worth[64];
    for (index_t g = 0; g < spec_.groups; ++g) {
      const float* of = choice_.data() + g * size;
      float first = plain_selection::lowest, second = first;
      for (index_t e = 0; e < size; ++e) {
        second = std::max(second, std::min(first, of[e]));
        first = std::max(first, of[e]);
      }
      worth[g] = spec_.group_score == moeroute::group_score::top2_sum ? first + second : first;
    }
    for (index_t left = spec_.groups - spec_.topk_group; left > 0; --left) {
      const index_t g = std::min_element(worth, worth + spec_.groups) - worth;
      worth[g] = std::numeric_limits<float>::infinity();
      std::fill_n(choice_.data() + g * size, size, plain_selection::lowest);
    }
  }

  moeroute::router_spec spec_;
  std::span<const float> bias_;
  way way_;
  moeroute::buffer<float> score_, choice_;
};

}  // namespace bench
