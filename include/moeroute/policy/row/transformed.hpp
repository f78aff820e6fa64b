// A router behind a step on its logits, and one whose weights come from other logits than its
// choice.
#pragma once

#include <algorithm>
#include <utility>

#include <moeroute/policy/concepts.hpp>
#include <moeroute/policy/parts/row_transform.hpp>
#include <moeroute/policy/parts/score.hpp>
#include <moeroute/policy/parts/weight.hpp>

namespace moeroute {

/// A router that sees each row of logits after a transform: any token or ragged router.
///
/// Example: transformed{standardized{.lambda = 2.0f}, router<softmax>{.selection = {.k = 2}}}.
/// Shapes: logits [T, columns] of the transform. Cost: the transform's, and 16 rows of scratch.
template <row_transform Transform, class Router>
  requires token_router<Router> || ragged_router<Router>
struct transformed {
  Transform transform{};
  Router router{};

  struct buffers {
    float* rows;  ///< [16, E]
    decltype(std::declval<const Router&>().carve(std::declval<scratch&>(), index_t{})) router;
  };

  index_t k() const
    requires token_router<Router>
  {
    return router.k();
  }
  index_t max_choices(index_t columns) const
    requires ragged_router<Router>
  {
    return router.max_choices(transform.experts(columns));
  }
  index_t experts(index_t columns) const { return router.experts(transform.experts(columns)); }

  side_use reads_side(index_t columns) const {
    const index_t own = transform.experts(columns);
    side_use use = side_use_of(router, own);
    // The noise gate has a column per expert, as the logits have none.
    if (own != columns) use.noise_logits = false;
    return use;
  }

  /// Throws: error where the transform or the router does not fit.
  void check(index_t columns) const {
    index_t least = 1;
    if constexpr (token_router<Router>) least = router.k();
    transform.check(columns, least);
    router.check(transform.experts(columns));
  }

  buffers carve(scratch& tape, index_t columns) const {
    const index_t own = transform.experts(columns);
    return {tape.take<float>(block_rows * own), router.carve(tape, own)};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& memory, choice_block& c) const
    requires token_router<Router>
  {
    router.route_block(this->template after<A>(z, memory), memory.router, c);
  }

  template <class A = simd::default_arch>
  index_t route_block(const logit_block& z, const buffers& memory, expert_id* id, float* weight,
                      std::int32_t* count) const
    requires ragged_router<Router>
  {
    return router.route_block(this->template after<A>(z, memory), memory.router, id, weight, count);
  }

 private:
  template <class A>
  logit_block after(const logit_block& z, const buffers& memory) const {
    logit_block out = z;
    out.experts = out.stride = transform.experts(z.experts);
    out.logits = memory.rows;
    for (int i = 0; i < z.rows; ++i)
      transform.template apply_row<A>(z.row(i), z.experts, z.first_token + i, *z.side,
                                      memory.rows + i * out.stride);
    return out;
  }
};

template <class Transform, class Router>
transformed(Transform, Router) -> transformed<Transform, Router>;

/// A router that chooses by the first half of the columns, with weights from the second: what a
/// kernel does that is handed two matrices.
///
/// Shapes: logits [T, 2E]. An expert whose second logit is NaN or -inf weighs what the score gives
/// -inf. Source: router_probs and router_weights of ONNX Runtime's QMoE.
template <token_router Router, score_function Score = identity_score>
struct weighed_by_second {
  Router router{};
  Score score{};
  weight_rule weight{};
  bool active = true;  ///< false: the router as it is, for who picks at run time

  index_t k() const { return router.k(); }
  index_t experts(index_t columns) const { return router.experts(first(columns)); }
  side_use reads_side(index_t columns) const {
    side_use use = side_use_of(router, first(columns));
    if (active) use.noise_logits = false;
    return use;
  }
  /// Throws: error where the columns are odd, or a part does not fit their half.
  void check(index_t columns) const {
    if (active) {
      detail::check_half("weighed_by_second", columns, 2, "a multiple of ");
      weight.check(columns / 2);
    }
    router.check(first(columns));
    if (active)
      check_size("weighed_by_second", "experts", router.experts(first(columns)), first(columns));
  }
  auto carve(scratch& tape, index_t columns) const { return router.carve(tape, first(columns)); }

  template <class A = simd::default_arch, class Buffers>
  void route_block(const logit_block& z, const Buffers& memory, choice_block& c) const {
    logit_block half = z;
    half.experts = first(z.experts);
    router.route_block(half, memory, c);
    if (!active) return;
    half.logits = z.logits + half.experts;
    for (int r = 0; r < c.k; ++r)
      for (int i = 0; i < z.rows; ++i) {
        const expert_id e = c.id[r * block_rows + i];
        const float x = e == no_expert ? simd::minus_infinity : half.row(i)[e];
        c.value[r * block_rows + i] = x == x ? x : simd::minus_infinity;
      }
    c.has_row_max = false;
    score.template score_choices<A>(half, c, weight.needs());
    weight.template apply<A>(c);
  }

 private:
  index_t first(index_t columns) const { return active ? columns / 2 : columns; }
};

}  // namespace moeroute
