// Top-p: as many experts as it takes to reach a probability mass.
#pragma once

#include <algorithm>
#include <string>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/logit_transform.hpp>
#include <moeroute/policy/score.hpp>
#include <moeroute/policy/weight.hpp>
#include <moeroute/simd/top_k.hpp>

namespace moeroute {

/// Whether the expert whose probability crosses the mass is in.
enum class crossing {
  include,         ///< the first with cumulative sum >= p is the last one in
  include_strict,  ///< the first with cumulative sum > p (Huang et al. 2024)
  exclude,         ///< only those with cumulative sum <= p (DynMoLE, Li et al. 2025)
};

/// The shortest prefix of the experts, by descending probability, that reaches the mass p; at least
/// min_k and at most max_k of them. Probabilities are the softmax over all experts; the weight rule
/// sees the chosen ones.
///
/// A ragged router: choices come best first. Cost: O(E log k) per row.
/// Source: "Harder Tasks Need More Experts" (Huang et al. 2024).
struct top_p {
  float p = 0.4f;
  moeroute::crossing crossing = moeroute::crossing::include;
  index_t min_k = 1;
  index_t max_k = 0;  ///< 0: no cap
  weight_rule weight{};
  logit_transform transform{};

  struct buffers {
    std::uint64_t* key;
    float* logits;
    expert_id* id;
    float* value;
  };

  index_t max_choices(index_t columns) const {
    return max_k > 0 ? std::min(max_k, columns) : columns;
  }
  static index_t experts(index_t columns) { return columns; }

  /// Throws: error where p is outside (0, 1], min_k outside [1, E] or max_k below min_k.
  void check(index_t experts) const {
    if (!(p > 0.0f && p <= 1.0f))
      fail("top_p", "p is " + std::to_string(p) + ", expected more than 0 and at most 1");
    check_range("top_p", "min_k", min_k, 1, experts);
    if (max_k != 0) check_range("top_p", "max_k", max_k, min_k, max_experts);
    transform.check(experts);
    weight.check(experts);
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t most = max_choices(columns);
    return {tape.take<std::uint64_t>(simd::top_k_scratch(columns, most)),
            tape.take<float>(transform.active() ? block_rows * columns : 0),
            tape.take<expert_id>(block_rows * most), tape.take<float>(block_rows * most)};
  }

  template <class A = simd::default_arch>
  index_t route_block(logit_block z, const buffers& memory, expert_id* id, float* weights,
                      std::int32_t* count) const {
    if (transform.active()) z = transform.template apply<A>(z, memory.logits);
    const index_t most = max_choices(z.experts);
    // Few experts suffice almost always: look at more only where a row asks for them.
    choice_block c{0, memory.id, memory.value};
    for (index_t k = std::min<index_t>(most, 16);; k = std::min(most, 4 * k)) {
      c.k = static_cast<int>(k);
      simd::top_k_block<A>(z.logits, z.stride, z.rows, z.experts, c.k, c.value, c.id, memory.key);
      c.has_row_max = true;
      softmax::score_choices<A>(z, c, score_scale::exact);
      bool enough = true;
      for (int i = 0; i < z.rows; ++i) {
        count[i] = prefix(c, i, most);
        enough = enough && count[i] <= c.k;
      }
      if (enough || k == most) break;
    }
    for (int i = 0; i < z.rows; ++i) count[i] = std::min(count[i], c.k);
    for (int r = 0; r < c.k; ++r)
      for (int i = 0; i < block_rows; ++i)
        if (i >= z.rows || r >= count[i]) c.id[r * block_rows + i] = no_expert;
    weight.template apply<A>(c);
    index_t at = 0;
    for (int i = 0; i < z.rows; ++i)
      for (int r = 0; r < count[i]; ++r, ++at) {
        id[at] = c.id[r * block_rows + i];
        weights[at] = c.value[r * block_rows + i];
      }
    return at;
  }

 private:
  // How many of row i's ranks are in; more than c.k where the ranks at hand do not settle it.
  int prefix(const choice_block& c, int i, index_t most) const {
    float sum = 0.0f;
    for (int r = 0; r < c.k; ++r) {
      if (c.id[r * block_rows + i] == no_expert) return r;
      sum += c.value[r * block_rows + i];
      const bool crossed = crossing == moeroute::crossing::include ? sum >= p : sum > p;
      if (!crossed) continue;
      const int in = crossing == moeroute::crossing::exclude ? r : r + 1;
      return static_cast<int>(settle(c, i, std::max<index_t>(in, std::min(min_k, most))));
    }
    return c.k < most ? c.k + 1 : c.k;
  }

  // min_k may ask for ranks beyond those that exist or are at hand.
  static index_t settle(const choice_block& c, int i, index_t in) {
    index_t there = 0;
    while (there < std::min<index_t>(in, c.k) && c.id[there * block_rows + i] != no_expert) ++there;
    return there == c.k && in > c.k ? c.k + 1 : there;
  }
};
static_assert(ragged_router<top_p>);

}  // namespace moeroute
