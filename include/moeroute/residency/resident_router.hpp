// Any router of tokens, giving way to what is in memory.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <moeroute/policy/router.hpp>
#include <moeroute/policy/weigh/weight_map.hpp>
#include <moeroute/residency/resident_selection.hpp>

namespace moeroute {

namespace detail {

// What a router becomes whose choice a rule moves: itself where it does not choose by rank.
template <class Router>
struct moved_router {
  static constexpr bool by_rank = false;
  using type = Router;
  static Router made(const Router& r, const residency_rule&, const resident_view&) { return r; }
};
template <class Score, class Selection>
  requires selects_ranks<Selection>
struct moved_router<router<Score, Selection>> {
  static constexpr bool by_rank = true;
  using type = router<Score, resident_selection<Selection>>;
  static type made(const router<Score, Selection>& r, const residency_rule& rule,
                   const resident_view& set) {
    return {r.score, {r.selection, rule, set, false}, r.weight, r.bias, r.transform};
  }
};

// x where it stays, 0 where it does not.
MOEROUTE_INLINE float kept_if(bool stays, float x) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) & (0u - std::uint32_t{stays}));
}

// Leaves out what is missing and hardly counts. Nothing here branches on what is missing: no
// processor can foretell it.
MOEROUTE_INLINE void drop_cold(const residency_rule& rule, const resident_view& set, expert_id* id,
                               float* weight, index_t step, int k) {
  float most[2] = {0.0f, 0.0f}, all = 0.0f, kept = 0.0f;
  for (int r = 0; r < k; ++r) most[r & 1] = std::max(most[r & 1], weight[r * step]);
  const float least = rule.strength * std::max(most[0], most[1]);
  for (int r = 0; r < k; ++r) {
    const expert_id e = id[r * step];
    const float w = weight[r * step];
    const bool held = set.contains(std::max<expert_id>(e, 0));
    const bool leaves = (r >= rule.forced) & (e != no_expert) & (w < least) & !held;
    const float left = kept_if(!leaves, w);
    static_assert(no_expert == -1);
    id[r * step] = e | -static_cast<expert_id>(leaves);
    weight[r * step] = left;
    all += w;
    kept += left;
  }
  const bool shares = (rule.dropped != dropped_weight::lost) & (kept > 0.0f) & (kept != all);
  const float one = kept_if(!shares, 1.0f);
  const float factor = (kept_if(shares, all) + one) / (kept_if(shares, kept) + one);
  for (int r = 0; r < k; ++r) weight[r * step] *= factor;
}

// What a rule did to one token. z: its logits; choices `step` apart. Mass is lost only where
// experts have a column of their own, and none by rows without a softmax.
inline residency_counts counts_of(const float* z, index_t experts, const resident_view& set,
                                  const expert_id* plain, index_t plain_step,
                                  const expert_id* chosen, index_t step, int k) {
  residency_counts n{.tokens = 1};
  const bool columns = experts == set.experts;
  double lost = 0.0, max = -INFINITY, total = 0.0;
  const auto in = [k](const expert_id* list, index_t by, expert_id e) {
    for (int r = 0; r < k; ++r)
      if (list[r * by] == e) return true;
    return false;
  };
  for (index_t e = 0; columns && e < experts; ++e)
    if (static_cast<double>(z[e]) > max) max = static_cast<double>(z[e]);
  // Only where something changed: exponentials are dear.
  const auto mass = [&](expert_id e) {
    if (total == 0.0)
      for (index_t i = 0; i < experts; ++i)
        if (z[i] == z[i]) total += std::exp(static_cast<double>(z[i]) - max);
    return std::exp(static_cast<double>(z[e]) - max) / total;
  };
  for (int r = 0; r < k; ++r) {
    const expert_id e = chosen[r * step], p = plain[r * plain_step];
    if (e != no_expert) {
      const bool own = in(plain, plain_step, e);
      ++n.choices;
      n.misses += !set.contains(e);
      n.agreed += own;
      n.substitutions += !own;
      if (!own && columns) lost -= mass(e);
    }
    if (p != no_expert) {
      ++n.plain_choices;
      if (columns && !in(chosen, step, p)) lost += mass(p);
    }
  }
  n.dropped = std::max<std::int64_t>(0, n.plain_choices - n.choices);
  n.mass = std::isfinite(lost) ? std::llround(lost * 0x1p32) : 0;
  return n;
}

}  // namespace detail

/// A router whose choice gives way to what is in memory by a residency_rule; weights are what it
/// would give the experts that are chosen then.
///
/// Rules that look for other experts need a router that chooses by rank: router<Score, top_k> or
/// top_k_of. drop_cold takes any router of tokens. The set is the caller's; it may change between
/// calls. Its experts() are the router's. `counts`, where given, is added to; it costs the plain
/// choice once more. Throws: error where rule, set and router do not fit one another.
/// Determinism: the same ids and weights on every ISA, executor and thread count; with a rule that
/// is not active() those of the router.
///
///     resident_set held(64);                            // what the cache says is in memory
///     const resident_router careful(router<softmax>{.score = {}, .selection = {.k = 8}},
///                                   {.kind = residency_kind::cache_prior, .strength = 0.1f},
///                                   held);
///     route(careful, logits, ws, choices);
///
template <token_router Router>
class resident_router {
  using change = detail::moved_router<Router>;

 public:
  resident_router(Router router, const residency_rule& rule, const resident_set& set,
                  residency_counts* counts = nullptr)
      : resident_router(std::move(router), rule, set.view(), counts) {}
  resident_router(Router router, const residency_rule& rule, const resident_view& set,
                  residency_counts* counts = nullptr)
      : plain_(std::move(router)),
        rule_(rule),
        set_(set),
        counts_(counts),
        moved_(change::made(plain_, rule, set)) {
    rule.check(set.experts, plain_.k());
    if (!change::by_rank && rule.active() && !drops())
      fail("resident_router",
           std::string("the rule is ") + to_string(rule.kind) +
               ", and this router does not choose by rank: drop is what it takes");
  }

  const Router& plain() const { return plain_; }
  const residency_rule& rule() const { return rule_; }

  index_t k() const { return plain_.k(); }
  index_t experts(index_t columns) const { return plain_.experts(columns); }
  index_t columns() const
    requires requires(const Router& r) { r.columns(); }
  {
    return plain_.columns();
  }
  side_use reads_side(index_t columns) const { return side_use_of(plain_, columns); }
  void check(index_t columns) const {
    // The rule was held against the set and k when it came.
    plain_.check(columns);
    check_size("resident_router", "set.experts", set_.experts, plain_.experts(columns));
  }

  template <class R>
  using buffers_of = decltype(std::declval<const R&>().carve(std::declval<scratch&>(), index_t{}));
  struct buffers {
    buffers_of<typename change::type> moved;
    buffers_of<Router> plain;
    expert_id* id;  ///< [k][16], what the router alone chooses
    float* value;
  };
  buffers carve(scratch& tape, index_t columns) const {
    const index_t lanes = counts_ != nullptr ? k() * block_rows : 0;
    return {moved_.carve(tape, columns),
            counts_ != nullptr ? plain_.carve(tape, columns) : buffers_of<Router>{},
            tape.take<expert_id>(lanes), tape.take<float>(lanes)};
  }

  template <class A = simd::default_arch>
  void route_block(const logit_block& z, const buffers& m, choice_block& c) const {
    if constexpr (requires { moved_.template route_block<A>(z, m.moved, c); })
      moved_.template route_block<A>(z, m.moved, c);
    else
      moved_.route_block(z, m.moved, c);
    if (counts_ == nullptr) {
      if (drops_after()) detail::drop_cold<A>(rule_, set_, c, z.rows);
      return;
    }
    this->template count_block<A>(z, m, c);
  }

  index_t rows_alone(index_t columns) const {
    if constexpr (requires { moved_.rows_alone(columns); }) {
      return counts_ != nullptr ? 0 : moved_.rows_alone(columns);
    } else {
      return 0;
    }
  }

  template <class A = simd::default_arch>
    requires row_router<typename change::type>
  void route_row(const float* z, index_t columns, index_t token, const side_inputs& side,
                 expert_id* id, float* weights) const {
    moved_.template route_row<A>(z, columns, token, side, id, weights);
    if (drops_after()) detail::drop_cold(rule_, set_, id, weights, 1, static_cast<int>(k()));
  }

 private:
  bool drops() const { return rule_.kind == residency_kind::drop_cold && rule_.active(); }
  // A selection by rank drops by itself.
  bool drops_after() const { return !change::by_rank && drops(); }

  template <class A>
  MOEROUTE_OUT_OF_LINE void count_block(const logit_block& z, const buffers& m,
                                        choice_block& c) const {
    choice_block own{c.k, m.id, m.value};
    clear_lanes(own, z.rows);
    if constexpr (requires { plain_.template route_block<A>(z, m.plain, own); })
      plain_.template route_block<A>(z, m.plain, own);
    else
      plain_.route_block(z, m.plain, own);
    for (int i = 0; i < z.rows; ++i) {
      if (drops_after()) detail::drop_cold(rule_, set_, c.id + i, c.value + i, block_rows, c.k);
      if (z.side->masked(z.first_token + i)) continue;
      counts_->add(detail::counts_of(z.row(i), z.experts, set_, own.id + i, block_rows, c.id + i,
                                     block_rows, c.k));
    }
  }

  Router plain_;
  residency_rule rule_;
  resident_view set_;
  residency_counts* counts_;
  typename change::type moved_;
};
template <class Router>
resident_router(Router, const residency_rule&, const resident_view&) -> resident_router<Router>;
template <class Router>
resident_router(Router, const residency_rule&, const resident_view&, residency_counts*)
    -> resident_router<Router>;
template <class Router>
resident_router(Router, const residency_rule&, const resident_set&) -> resident_router<Router>;
template <class Router>
resident_router(Router, const residency_rule&, const resident_set&, residency_counts*)
    -> resident_router<Router>;
static_assert(row_router<resident_router<router<softmax>>>);

/// Chosen experts are weighed as the router weighs them, dropped ones aside.
template <class Router>
  requires requires(const Router& r, const side_inputs& s) { weight_maps_of(r, s); }
weight_maps weight_maps_of(const resident_router<Router>& r, const side_inputs& side) {
  return weight_maps_of(r.plain(), side);
}

}  // namespace moeroute
