// Exploration around any token router: now and then experts are drawn instead of chosen.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
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
/// is not drawn by a token, and given up where the batch draws it. Ranks are the order of the draw.
/// Replays from side_inputs seed and step. epsilon = 0 has the router's bits. Throws: error where
/// epsilon is not in [0, 1] or k above E. Cost: the router's, E + k^2 for a token that explores.
/// Determinism: the same ids on every ISA, executor and thread count. Source: Mixture of States
/// (2025, token); THOR (Zuo et al. 2022, batch, epsilon 1).
template <token_router Router>
struct explore {
  Router router{};
  float epsilon = 0.1f;
  exploration_scope scope = exploration_scope::token;

  struct buffers {
    decltype(std::declval<const Router&>().carve(std::declval<scratch&>(), index_t{})) router;
    expert_id* id;       ///< [k][16], of the rows of a block that explore
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
    if (epsilon < 1.0f) router.route_block(z, memory.router, c);
    if (epsilon <= 0.0f) return;
    const std::uint64_t coins = detail::random_stream(detail::random_use::explore, z.side->step);
    const auto of = [&](int i) {
      return scope == exploration_scope::batch ? std::uint64_t{0}
                                               : static_cast<std::uint64_t>(z.first_token + i);
    };
    std::uint32_t explores = 0;
    for (int i = 0; i < z.rows; ++i)
      explores |= std::uint32_t{epsilon >= 1.0f || random_u01(z.side->seed, coins, of(i)) < epsilon}
                  << i;
    if (explores == 0) return;
    choice_block drawn{c.k, memory.id, memory.value};
    std::fill_n(drawn.id, c.k * block_rows, no_expert);
    std::fill_n(drawn.value, c.k * block_rows, simd::minus_infinity);
    const auto take = [&](int from, int i) {
      for (int r = 0; r < c.k; ++r) {
        c.id[r * block_rows + i] = drawn.id[r * block_rows + from];
        c.value[r * block_rows + i] = drawn.value[r * block_rows + from];
      }
    };
    const auto for_each_explorer = [&](auto f) {
      for (std::uint32_t left = explores; left != 0; left &= left - 1) f(std::countr_zero(left));
    };
    if (!transforms() && std::popcount(explores) > few_explorers) {
      // Weighed together: a block of one row costs nearly as much as one of sixteen.
      for_each_explorer(
          [&](int i) { this->template draw<A>(z.row(i), z, of(i), memory, drawn, i); });
      this->template weigh<A>(z, drawn);
      for_each_explorer([&](int i) { take(i, i); });
      return;
    }
    for_each_explorer([&](int i) {
      logit_block row{z.row(i), z.stride, 1, z.experts, z.first_token + i, z.side};
      if constexpr (of_parts)
        if (transforms()) row = router.transform.template apply<A>(row, memory.logits);
      this->template draw<A>(row.logits, z, of(i), memory, drawn, 0);
      this->template weigh<A>(row, drawn);
      take(0, i);
    });
  }

 private:
  // So many rows of a block are weighed one by one.
  static constexpr int few_explorers = 4;
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

  // A lane of what was drawn: ids, and their logits.
  template <class A>
  MOEROUTE_OUT_OF_LINE void draw(const float* row, const logit_block& z, std::uint64_t of,
                                 const buffers& memory, choice_block& drawn, int lane) const {
    // A token draws from what it may take, the batch from everything: places in a list, which is
    // left out where every expert is in it.
    const bool whole = scope == exploration_scope::batch;
    index_t n = whole ? z.experts : this->template above_never<A>(row, z.experts);
    const bool listed = n < z.experts;
    if (listed) {
      n = 0;
      for (index_t e = 0; e < z.experts; ++e)
        if (row[e] > simd::minus_infinity) memory.allowed[n++] = static_cast<expert_id>(e);
    }
    const index_t many = std::min<index_t>(drawn.k, n);
    const std::uint64_t stream =
        detail::random_stream(detail::random_use::explored_choice, z.side->step);
    expert_id* const id = drawn.id + lane;
    for (int r = 0; r < drawn.k; ++r) {
      id[r * block_rows] = no_expert;
      if (r >= many) continue;
      // Floyd's sampling of places in the list; one that is taken yields to the new last.
      const auto limit = static_cast<std::uint32_t>(n - many + r + 1);
      auto place = static_cast<expert_id>(
          random_below(limit, z.side->seed, stream,
                       of * static_cast<std::uint64_t>(drawn.k) + static_cast<std::uint64_t>(r)));
      for (int before = 0; before < r; ++before)
        if (id[before * block_rows] == place) {
          place = static_cast<expert_id>(limit) - 1;
          break;
        }
      id[r * block_rows] = place;
    }
    for (int at = 0; at < drawn.k * block_rows; at += block_rows) {
      if (listed && id[at] != no_expert) id[at] = memory.allowed[id[at]];
      if (id[at] != no_expert && !(row[id[at]] > simd::minus_infinity)) id[at] = no_expert;
      drawn.value[at + lane] = id[at] == no_expert ? simd::minus_infinity : row[id[at]];
    }
  }

  template <class A>
  void weigh(const logit_block& z, choice_block& drawn) const {
    keep_own_k(z, drawn);
    if constexpr (of_parts) {
      router.score.template score_choices<A>(z, drawn, router.weight.needs());
      router.weight.template apply<A>(drawn);
      if constexpr (requires { router.selection.template settle<A>(drawn, z.rows); })
        router.selection.template settle<A>(drawn, z.rows);
    } else {
      for (int at = 0; at < drawn.k * block_rows; ++at)
        drawn.value[at] = drawn.id[at] == no_expert ? 0.0f : 1.0f / static_cast<float>(drawn.k);
    }
  }
};

}  // namespace moeroute
