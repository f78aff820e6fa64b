// Peer: Highway, its VQSelect on packed keys and its vector mathematics for the scores, as a gate
// that is written for speed with that library.
#pragma once

#include <hwy/contrib/math/math-inl.h>
#include <hwy/contrib/sort/vqsort.h>
#include <hwy/highway.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include <moeroute/policy/router_spec.hpp>

#include "support/plain_gate.hpp"
#include "support/plain_selection.hpp"

namespace bench {

/// One row's choices, best first, in the library's order: the logit and the inverted id as one key.
class highway_selection {
 public:
  highway_selection() {
    // VQSelect picks its instruction set at run time: none with wider registers than ours.
    if (HWY_STATIC_TARGET > HWY_AVX3) hwy::DisableTargets(HWY_AVX2 - 1);
  }

  void operator()(const float* row, index_t experts, index_t k, std::int32_t* id, float* value) {
    clear(experts);
    pack(row, experts, 0);
    best(k, id);
    for (index_t r = 0; r < k; ++r) value[r] = id[r] < 0 ? plain_selection::lowest : row[id[r]];
  }

  /// The same step by step: memory for at most n keys, the experts from `first` on, the choice.
  void clear(index_t n) {
    key_.resize(static_cast<std::size_t>(n));
    size_ = 0;
  }
  void pack(const float* x, index_t n, index_t first) {
    std::uint64_t* to = key_.data() + size_;
    for (index_t i = 0; i < n; ++i) {
      const auto bits = std::bit_cast<std::int32_t>(x[i] + 0.0f);  // no negative zero
      const std::uint32_t order = static_cast<std::uint32_t>(
          bits ^ ((bits >> 31) | std::numeric_limits<std::int32_t>::min()));
      const std::uint32_t high = x[i] > plain_selection::lowest ? order : 0u;
      to[i] = std::uint64_t{high} << 32 | ~static_cast<std::uint32_t>(first + i);
    }
    size_ += static_cast<std::size_t>(n);
  }
  void best(index_t k, std::int32_t* id) {
    const auto last = static_cast<std::size_t>(k);
    if (last < size_) hwy::VQSelect(key_.data(), size_, last - 1, hwy::SortDescending());
    std::sort(key_.begin(), key_.begin() + k, std::greater<>());
    for (index_t r = 0; r < k; ++r) {
      const std::uint64_t key = key_[static_cast<std::size_t>(r)];
      const auto expert = static_cast<std::uint32_t>(~key);
      id[r] = key >> 32 == 0 ? moeroute::no_expert : static_cast<std::int32_t>(expert);
    }
  }

 private:
  std::vector<std::uint64_t> key_;
  std::size_t size_ = 0;
};

/// One row's ids and weights: softmax gates, and sigmoid gates with bias and groups.
class highway_gate {
 public:
  explicit highway_gate(const moeroute::router_spec& spec, std::span<const float> bias = {})
      : spec_(spec), bias_(bias), score_(static_cast<std::size_t>(spec.experts + lanes)) {
    choice_ = score_;
    group_.resize(static_cast<std::size_t>(spec.groups));
    group_score_.resize(group_.size());
  }

  static bool can(const moeroute::router_spec& s) {
    using namespace moeroute;
    const bool softmax = s.score == score_kind::softmax && !s.selection_bias && s.groups == 1;
    return plain_gate::can(s) && s.experts / s.groups % lanes == 0 &&
           (softmax || s.score == score_kind::sigmoid) &&
           (s.groups == 1 || s.group_score == group_score::top2_sum);
  }

  void operator()(const float* row, std::int32_t* id, float* weight) {
    if (spec_.score == moeroute::score_kind::softmax)
      softmax(row, id, weight);
    else
      sigmoid(row, id, weight);
  }

 private:
  using tag = hwy::HWY_NAMESPACE::ScalableTag<float>;
  static constexpr index_t lanes = HWY_MAX_BYTES / sizeof(float);

  // Softmax keeps the order of the logits: those are chosen from, and where the weights are
  // normalised over the choices the others need no exponential.
  void softmax(const float* row, std::int32_t* id, float* weight) {
    using namespace moeroute;
    select_(row, spec_.experts, spec_.k, id, weight);
    const float max = weight[0];
    const bool over_choices = spec_.domain == score_domain::selected;
    const bool renormalised = over_choices || (spec_.normalize == normalization::sum &&
                                               spec_.eps_where == eps_mode::none);
    float sum = 1.0f;
    if (!renormalised) sum = exponentials(row, spec_.experts, max);
    std::fill(std::copy_n(weight, spec_.k, choice_.begin()), choice_.end(),
              plain_selection::lowest);
    const float chosen = exponentials(choice_.data(), spec_.k, max);
    if (over_choices) sum = chosen;
    for (index_t r = 0; r < spec_.k; ++r) weight[r] = score_[static_cast<std::size_t>(r)] / sum;
    finish_weights(spec_, weight);
  }

  // score_ = exp(x - max); returns their sum. Reads x up to a whole vector.
  float exponentials(const float* x, index_t n, float max) {
    namespace hn = hwy::HWY_NAMESPACE;
    const tag d;
    const auto shift = hn::Set(d, max);
    auto sum = hn::Zero(d);
    for (index_t e = 0; e < n; e += step()) {
      const auto y = hn::Exp(d, hn::Sub(hn::LoadU(d, x + e), shift));
      hn::StoreU(y, d, score_.data() + e);
      sum = hn::Add(sum, y);
    }
    return hn::ReduceSum(d, sum);
  }

  void sigmoid(const float* row, std::int32_t* id, float* weight) {
    namespace hn = hwy::HWY_NAMESPACE;
    const tag d;
    const auto one = hn::Set(d, 1.0f);
    for (index_t e = 0; e < spec_.experts; e += step()) {
      const auto y = hn::Div(one, hn::Add(one, hn::Exp(d, hn::Neg(hn::LoadU(d, row + e)))));
      hn::StoreU(y, d, score_.data() + e);
      const auto b = spec_.selection_bias ? hn::LoadU(d, bias_.data() + e) : hn::Zero(d);
      hn::StoreU(hn::Add(y, b), d, choice_.data() + e);
    }
    // Experts of a group that is left out are never better than k of the groups that stay.
    const index_t size = spec_.experts / spec_.groups;
    if (spec_.groups > 1) best_groups(size);
    select_.clear(spec_.experts);
    for (index_t i = 0; i < (spec_.groups > 1 ? spec_.topk_group : 1); ++i) {
      const index_t g = spec_.groups > 1 ? group_[static_cast<std::size_t>(i)] : 0;
      select_.pack(choice_.data() + g * size, size, g * size);
    }
    select_.best(spec_.k, id);
    for (index_t r = 0; r < spec_.k; ++r) weight[r] = score_[static_cast<std::size_t>(id[r])];
    finish_weights(spec_, weight);
  }

  void best_groups(index_t size) {
    namespace hn = hwy::HWY_NAMESPACE;
    const tag d;
    for (index_t g = 0; g < spec_.groups; ++g) {
      auto first = hn::Set(d, plain_selection::lowest), second = first;
      for (index_t e = g * size; e < (g + 1) * size; e += step()) {
        const auto x = hn::LoadU(d, choice_.data() + e);
        second = hn::Max(second, hn::Min(first, x));
        first = hn::Max(first, x);
      }
      // The best of all lanes, and the best of what is left without it.
      const float best = hn::ReduceMax(d, first);
      const auto there = hn::Eq(first, hn::Set(d, best));
      const auto rest = hn::IfThenElse(there, second, first);
      const float next = hn::CountTrue(d, there) > 1 ? best : hn::ReduceMax(d, rest);
      group_score_[static_cast<std::size_t>(g)] = best + next;
    }
    // Ranks by counting: no branch to predict.
    index_t kept = 0;
    for (std::size_t g = 0; g < group_.size(); ++g) {
      index_t better = 0;
      for (std::size_t h = 0; h < group_.size(); ++h)
        better +=
            (group_score_[h] > group_score_[g]) | ((group_score_[h] == group_score_[g]) & (h < g));
      group_[static_cast<std::size_t>(kept)] = static_cast<index_t>(g);
      kept += better < spec_.topk_group;
    }
  }

  static index_t step() { return static_cast<index_t>(hwy::HWY_NAMESPACE::Lanes(tag())); }

  moeroute::router_spec spec_;
  std::span<const float> bias_;
  highway_selection select_;
  std::vector<float> score_, choice_;
  std::vector<float> group_score_;
  std::vector<index_t> group_;
};

}  // namespace bench
