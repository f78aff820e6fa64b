// Exploration around any token router: now and then experts are drawn instead of chosen.
#pragma once

#include <algorithm>
#include <utility>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/noise.hpp>
#include <moeroute/simd/mask.hpp>

namespace moeroute {

/// What explores at once.
enum class exploration_scope {
  token,  ///< each token for itself
  batch,  ///< all tokens of a call or none, with the same experts for all
};

/// Epsilon-greedy: with probability epsilon k distinct experts drawn uniformly, else what the
/// router chooses.
///
/// Drawn experts are weighed as the router weighs (score, transform and weight rule, of the logits
/// as they are); with 1 / k where it is not made of these. An expert that is masked (NaN or -inf)
/// is not drawn by a token, and given up where the batch draws it. Replays from side_inputs seed
/// and step. epsilon = 0 has the router's bits. Throws: error where epsilon is not in [0, 1] or k
/// above E. Cost: the router's, E + k^2 for a token that explores. Determinism: the same ids on
/// every ISA, executor and thread count. Source: Mixture of States (2025, token); THOR (Zuo et al.
/// 2022, batch, epsilon 1).
template <token_router Router>
struct explore {
  Router router{};
  float epsilon = 0.1f;
  exploration_scope scope = exploration_scope::token;

  struct buffers {
    decltype(std::declval<const Router&>().carve(std::declval<scratch&>(), index_t{})) router;
    expert_id* id;       ///< [k][16], of a row that explores
    float* value;        ///< [k][16]
    expert_id* allowed;  ///< [E]
    float* logits;       ///< [E] where the router transforms them
  };

  index_t k() const { return router.k(); }
  index_t experts(index_t columns) const { return router.experts(columns); }
  side_use reads_side(index_t columns) const { return side_use_of(router, columns); }
  void check(index_t columns) const {
    if (!(epsilon >= 0.0f && epsilon <= 1.0f)) fail_value("explore", "epsilon", epsilon, "0 to 1");
    router.check(columns);
    check_size("explore", "experts", router.experts(columns), columns);
    check_range("explore", "k", k(), 1, columns);
  }
  buffers carve(scratch& tape, index_t columns) const {
    return {router.carve(tape, columns), tape.take<expert_id>(k() * block_rows),
            tape.take<float>(k() * block_rows), tape.take<expert_id>(columns),
            tape.take<float>(transforms() ? columns : 0)};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const {
    if (epsilon < 1.0f)
      router.route_block(z, memory.router, c);
    else
      clear_lanes(c, z.rows);
    if (epsilon <= 0.0f) return;
    const bool whole = scope == exploration_scope::batch;
    const std::uint64_t coins = detail::random_stream(detail::random_use::explore, z.side->step);
    for (int i = 0; i < z.rows; ++i) {
      const auto of = whole ? std::uint64_t{0} : static_cast<std::uint64_t>(z.first_token + i);
      if (epsilon >= 1.0f || random_u01(z.side->seed, coins, of) < epsilon)
        this->template draw<A>(z, i, of, memory, c);
    }
  }

 private:
  static constexpr bool of_parts =
      requires(const Router& r, const logit_block& z, choice_block& c) {
        r.score.score_choices(z, c, r.weight.needs());
        r.weight.apply(c);
        r.transform.active();
      };
  bool transforms() const {
    if constexpr (of_parts) {
      return router.transform.active();
    } else {
      return false;
    }
  }

  template <class A>
  static index_t above_never(const float* row, index_t n) {
    simd::vint<A> found(0);
    for (index_t e = 0; e < n; e += simd::width<A>)
      found = simd::count_where<A>(
          found, simd::load_first<A>(row + e, std::min<index_t>(simd::width<A>, n - e),
                                     simd::minus_infinity) > simd::vfloat<A>(simd::minus_infinity));
    alignas(alignment) std::int32_t lane[simd::width<A>];
    found.store_aligned(lane);
    index_t sum = 0;
    for (const std::int32_t c : lane) sum += c;
    return sum;
  }

  template <class A>
  MOEROUTE_OUT_OF_LINE void draw(const logit_block& z, int i, std::uint64_t of,
                                 const buffers& memory, choice_block& c) const {
    logit_block row{z.row(i), z.stride, 1, z.experts, z.first_token + i, z.side};
    if constexpr (of_parts)
      if (transforms()) row = router.transform.template apply<A>(row, memory.logits);
    choice_block one{c.k, memory.id, memory.value};
    clear_lanes(one, 1);
    const bool whole = scope == exploration_scope::batch;
    // A token draws from what it may take, the batch from everything: places in a list, which is
    // left out where every expert is in it.
    index_t n = whole ? z.experts : this->template above_never<A>(row.logits, z.experts);
    const bool listed = n < z.experts;
    if (listed) {
      n = 0;
      for (index_t e = 0; e < z.experts; ++e)
        if (row.logits[e] > simd::minus_infinity) memory.allowed[n++] = static_cast<expert_id>(e);
    }
    const index_t drawn = std::min<index_t>(c.k, n);
    const std::uint64_t stream =
        detail::random_stream(detail::random_use::explored_choice, z.side->step);
    for (int r = 0; r < c.k; ++r) {
      expert_id& id = one.id[r * block_rows];
      id = no_expert;
      if (r >= drawn) continue;
      // Floyd's sampling of places in the list; one that is taken yields to the new last.
      const auto limit = static_cast<std::uint32_t>(n - drawn + r + 1);
      auto place = static_cast<expert_id>(
          random_below(limit, z.side->seed, stream,
                       of * static_cast<std::uint64_t>(c.k) + static_cast<std::uint64_t>(r)));
      for (int before = 0; before < r; ++before)
        if (one.id[before * block_rows] == place) {
          place = static_cast<expert_id>(limit) - 1;
          break;
        }
      id = place;
    }
    for (int r = 0; r < c.k; ++r) {
      expert_id& id = one.id[r * block_rows];
      float& value = one.value[r * block_rows];
      if (listed && id != no_expert) id = memory.allowed[id];
      if (id != no_expert && !(row.logits[id] > simd::minus_infinity)) id = no_expert;
      value = id == no_expert ? simd::minus_infinity : row.logits[id];
    }
    keep_own_k(row, one);
    if constexpr (of_parts) {
      router.score.template score_choices<A>(row, one, router.weight.needs());
      router.weight.template apply<A>(one);
    } else {
      for (int r = 0; r < c.k; ++r)
        one.value[r * block_rows] =
            one.id[r * block_rows] == no_expert ? 0.0f : 1.0f / static_cast<float>(c.k);
    }
    for (int r = 0; r < c.k; ++r) {
      c.id[r * block_rows + i] = one.id[r * block_rows];
      c.value[r * block_rows + i] = one.value[r * block_rows];
    }
  }
};

}  // namespace moeroute
