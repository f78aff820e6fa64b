// Top-p: as many experts as it takes to reach a probability mass.
#pragma once

#include <algorithm>
#include <string>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/kinds.hpp>
#include <moeroute/policy/parts/logit_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>
#include <moeroute/simd/select/rank_columns.hpp>
#include <moeroute/simd/select/top_k.hpp>

namespace moeroute {

/// The shortest prefix of the experts, by descending probability, that reaches the mass p; at least
/// min_k and at most max_k of them. Probabilities are the softmax over all experts; the weight rule
/// sees the chosen ones.
///
/// A ragged router: choices come best first; side_inputs::k_of_token cuts them, below min_k too.
/// Cost: O(E log k) per row. Source: "Harder Tasks Need More Experts" (Huang et al. 2024).
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
    std::int32_t* rank_key;  ///< of one row, where rows come alone
    expert_id* order;
    float* score;
  };

  index_t max_choices(index_t columns) const {
    return max_k > 0 ? std::min(max_k, columns) : columns;
  }
  static index_t experts(index_t columns) { return columns; }
  side_use reads_side(index_t columns) const {
    return {.own_k = max_choices(columns), .noise_logits = transform.noise.active()};
  }

  /// Throws: error where p is outside (0, 1], min_k outside [1, E] or max_k below min_k.
  void check(index_t experts) const {
    detail::check_top_p(experts, p, min_k, max_k);
    transform.check(experts);
    weight.check(experts);
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t most = max_choices(columns);
    return {tape.take<std::uint64_t>(simd::top_k_scratch(columns, most)),
            tape.take<float>(transform.active() ? block_rows * columns : 0),
            tape.take<expert_id>(block_rows * most),
            tape.take<float>(block_rows * most),
            tape.take<std::int32_t>(short_row(columns) ? simd::rank_columns_scratch(columns) : 0),
            tape.take<expert_id>(short_row(columns) ? columns : 0),
            tape.take<float>(short_row(columns) ? columns : 0)};
  }

  template <class A = simd::default_arch>
  index_t route_block(logit_block z, const buffers& memory, expert_id* id, float* weights,
                      std::int32_t* count) const {
    if (transform.active()) z = transform.template apply<A>(z, memory.logits);
    choice_block c{0, memory.id, memory.value};
    // The lanes of a third of a register cost more together than so many short rows one by one.
    if (short_row(z.experts) && 3 * z.rows <= simd::width<A>)
      this->template choose_row_by_row<A>(z, memory, c, count);
    else
      this->template choose_together<A>(z, memory, c, count);
    if (!z.side->k_of_token.empty())
      for (int i = 0; i < z.rows; ++i)
        count[i] =
            std::min(count[i], z.side->k_of_token[static_cast<std::size_t>(z.first_token + i)]);
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
  // Rows whose experts are best ranked by counting.
  static bool short_row(index_t columns) { return columns <= 256; }

  template <class A>
  void choose_together(const logit_block& z, const buffers& memory, choice_block& c,
                       std::int32_t* count) const {
    const index_t most = max_choices(z.experts);
    // Few experts suffice almost always: look at more only where a row asks for them.
    index_t k = std::min<index_t>(most, 16);
    for (;;) {
      c.k = static_cast<int>(k);
      simd::top_k_block<A>(z.logits, z.stride, z.rows, z.experts, c.k, c.value, c.id, memory.key);
      c.has_row_max = true;
      softmax::score_choices<A>(z, c, score_scale::exact);
      bool enough = true;
      index_t needed = 0;
      for (int i = 0; i < z.rows; ++i) {
        const expert_id* const id = c.id + i;
        int there = 0;
        while (there < c.k && id[there * block_rows] != no_expert) ++there;
        count[i] = prefix(c.value + i, block_rows, there, c.k, most);
        enough = enough && count[i] <= c.k;
        if (count[i] > c.k) needed = std::max(needed, least_needed(c.value + i, c.k));
      }
      if (enough) break;  // as where k is most
      // Looking at nearly all costs little more than looking at many once more.
      k = std::max(4 * k, needed + needed / 2);
      if (4 * k > most) k = most;
    }
  }

  // The same choices and scores.
  template <class A>
  void choose_row_by_row(const logit_block& z, const buffers& memory, choice_block& c,
                         std::int32_t* count) const {
    using F = simd::vfloat<A>;
    const index_t most = max_choices(z.experts);
    for (int i = 0; i < z.rows; ++i) {
      const index_t there =
          std::min(most, simd::rank_columns<A>(z.row(i), z.experts, memory.rank_key, memory.order));
      for (index_t r = 0; r < there; ++r) memory.score[r] = z.row(i)[memory.order[r]];
      const float max = there > 0 ? memory.score[0] : simd::minus_infinity;
      const F top(max), sum(simd::row_sum_exp<A>(z.row(i), z.experts, max));
      simd::map_row<A>(memory.score, there, memory.score,
                       [&](F x) { return simd::divide<A>(simd::exp_below_max<A>(x, top), sum); });
      const int k = static_cast<int>(most);
      count[i] = prefix(memory.score, 1, static_cast<int>(there), k, most);
      for (int r = 0; r < count[i]; ++r) {
        c.id[r * block_rows + i] = memory.order[r];
        c.value[r * block_rows + i] = memory.score[r];
      }
      c.k = std::max(c.k, count[i]);
    }
  }

  // Ranks that a row needs at least, as none beyond the k at hand is heavier than their last.
  index_t least_needed(const float* score, int k) const {
    float sum = 0.0f;
    for (int r = 0; r < k; ++r) sum += score[r * block_rows];
    const float more = (p - sum) / score[(k - 1) * block_rows];
    return k + (more > 0.0f && more < 1e6f ? static_cast<index_t>(more) : 0);
  }

  // How many of a row's k best are in, of which `there` exist; more than k where these do not
  // settle it.
  int prefix(const float* score, int stride, int there, int k, index_t most) const {
    float sum = 0.0f;
    for (int r = 0; r < there; ++r) {
      sum += score[r * stride];
      const bool crossed = crossing == moeroute::crossing::include ? sum >= p : sum > p;
      if (!crossed) continue;
      const int in = crossing == moeroute::crossing::exclude ? r : r + 1;
      // min_k may ask for ranks beyond those that exist or are at hand.
      const int wanted = std::max(in, static_cast<int>(std::min(min_k, most)));
      return there < k ? std::min(wanted, there) : wanted > k ? k + 1 : wanted;
    }
    return there < k ? there : k < most ? k + 1 : k;
  }
};
static_assert(ragged_router<top_p>);

}  // namespace moeroute
