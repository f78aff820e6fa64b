// What experts contribute: sums over the tokens that they serve, of weights and of the length of
// what they say.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include <moeroute/data/assignment.hpp>
#include <moeroute/data/dispatch_plan.hpp>
#include <moeroute/matrix/check.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <moeroute/simd/reduce.hpp>

namespace moeroute {

/// Per expert: tokens, and the sums of weight g, of output length |f|, and of g |f|.
///
/// Fed batch by batch; several meters merge to that of all batches. Source: REAP (arXiv
/// 2510.13999); baselines of its evaluation: frequency, mean g, mean |f|.
class saliency_meter {
 public:
  /// Throws: error where E is outside [1, 2^20].
  explicit saliency_meter(index_t experts) {
    check_range("saliency_meter", "experts", experts, 1, max_experts);
    sums_.resize(static_cast<std::size_t>(experts));
  }

  /// out: what experts gave, [slots, d], before it is weighted. Throws: error where plan, choices
  /// and out are not of the same call. Cost: one read of out.
  void add(const dispatch_plan& plan, const assignment& choices, matrix_view<const float> out) {
    constexpr const char* where = "saliency_meter";
    check_size(where, "plan.experts()", plan.experts(), experts());
    check_size(where, "choices.choices()", choices.choices(), plan.choices());
    check_size(where, "out.rows", out.rows, plan.slots());
    check_stride(where, "out", out);
    for (index_t c = 0; c < choices.choices(); ++c) {
      const slot_id slot = plan.slot_of_choice()[static_cast<std::size_t>(c)];
      if (slot == no_slot) continue;
      const expert_id e = choices.ids()[static_cast<std::size_t>(c)];
      check_range(where, "expert", e, 0, experts() - 1);
      sums& s = sums_[static_cast<std::size_t>(e)];
      const auto g = static_cast<double>(choices.weights()[static_cast<std::size_t>(c)]);
      const auto length = static_cast<double>(simd::row_norm<>(out.row(slot), out.cols));
      ++s.tokens;
      s.weight += g;
      s.length += length;
      s.both += g * length;
    }
  }
  /// Adds what another meter saw. Throws: error where it is of another number of experts.
  void merge(const saliency_meter& other) {
    check_size("saliency_meter", "experts", other.experts(), experts());
    for (std::size_t e = 0; e < sums_.size(); ++e) {
      sums_[e].tokens += other.sums_[e].tokens;
      sums_[e].weight += other.sums_[e].weight;
      sums_[e].length += other.sums_[e].length;
      sums_[e].both += other.sums_[e].both;
    }
  }

  index_t experts() const { return static_cast<index_t>(sums_.size()); }
  /// Of these each. Throws: error where there is no such expert.
  std::int64_t tokens(index_t e) const { return at(e).tokens; }
  double mean_weight(index_t e) const { return mean(e, at(e).weight); }
  double mean_length(index_t e) const { return mean(e, at(e).length); }
  /// Sum of g |f|.
  double weighted_length(index_t e) const { return at(e).both; }
  /// Mean of g |f| over the tokens that the expert serves, 0 where there are none.
  double reap(index_t e) const { return mean(e, at(e).both); }

 private:
  struct sums {
    std::int64_t tokens = 0;
    double weight = 0.0, length = 0.0, both = 0.0;
  };
  const sums& at(index_t e) const {
    check_range("saliency_meter", "expert", e, 0, experts() - 1);
    return sums_[static_cast<std::size_t>(e)];
  }
  double mean(index_t e, double sum) const {
    return at(e).tokens == 0 ? 0.0 : sum / static_cast<double>(at(e).tokens);
  }
  std::vector<sums> sums_;
};

/// The least k (or prefix) that a layer needs: the smallest j such that on a share of the tokens
/// the j most likely experts have at least `mass` of the softmax.
///
/// Throws: error where mass or share is outside (0, 1]. Source: after LaDiMo's layer-wise profile.
inline index_t least_experts(matrix_view<const float> logits, double mass, double share) {
  constexpr const char* where = "least_experts";
  check_stride(where, "logits", logits);
  if (!(mass > 0.0 && mass <= 1.0)) fail_value(where, "mass", mass, "above 0, at most 1");
  if (!(share > 0.0 && share <= 1.0)) fail_value(where, "share", share, "above 0, at most 1");
  std::vector<index_t> tokens(static_cast<std::size_t>(logits.cols) + 1);
  std::vector<float> p(static_cast<std::size_t>(logits.cols));
  for (index_t t = 0; t < logits.rows; ++t) {
    const float max = simd::row_max<>(logits.row(t), logits.cols);
    const auto total =
        static_cast<double>(simd::row_exp<>(logits.row(t), logits.cols, max, p.data()));
    std::sort(p.begin(), p.end(), std::greater<>());
    double sum = 0.0;
    std::size_t j = 0;
    while (j < p.size() && sum < mass * total * (1.0 - 1e-6)) sum += static_cast<double>(p[j++]);
    ++tokens[j];
  }
  std::size_t least = 0;
  for (auto seen = static_cast<double>(tokens[0]); seen < share * static_cast<double>(logits.rows);)
    seen += static_cast<double>(tokens[++least]);
  return std::max<index_t>(1, static_cast<index_t>(least));
}

}  // namespace moeroute
