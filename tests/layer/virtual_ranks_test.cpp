#include <moeroute/layer/virtual_ranks.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/layer/joined_backward.hpp>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/assignments.hpp"
#include "support/column_experts.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

namespace virtual_ranks_test {

using namespace moeroute;

namespace {

using rows = std::vector<float>;
using test::column_experts;

rows random_rows(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  rows v(static_cast<std::size_t>(n));
  for (float& x : v) x = rng.normal();
  return v;
}

// What one rank makes of all tokens.
struct one_rank {
  rows y, dx, dweights, dw;

  one_rank(const rows& x, const rows& dy, const assignment& choices, column_experts experts,
           const exchange_options& o, std::span<const std::uint8_t> mask,
           std::span<const expert_id> lost = {}) {
    const index_t d = experts.d, tokens = choices.tokens();
    dispatch_plan plan;
    std::vector<std::uint8_t> owned;
    for (index_t e = 0; e < choices.experts(); ++e) owned.push_back(o.special.contains(e) ? 0 : 1);
    for (const expert_id e : lost) owned[static_cast<std::size_t>(e)] = 0;
    moeroute::plan(choices, plan, {.owned = owned, .mask = mask});
    rows in(static_cast<std::size_t>(plan.slots() * d)), out = in, din = in, dout = in;
    const auto as = [&](rows& v) { return matrix_view<float>(v.data(), plan.slots(), d); };
    const auto seen = [&](const rows& v, index_t n) {
      return matrix_view<const float>(v.data(), n, d);
    };
    const bool on_input = o.weights == weight_on::input;
    dispatch_options moving;
    if (on_input) moving.scale = choices.weights();
    dispatch(seen(x, tokens), plan, as(in), moving);
    for_each_expert(plan, as(in), as(out),
                    [&](expert_id e, matrix_view<const float> a, matrix_view<float> b) {
                      experts.forward(e, a, b);
                    });
    combine_options<float> combining;
    if (on_input) combining.weight = combine_weight::one;
    combining.lost = o.lost_token_gets;
    combining.identity_first = o.special.identity_first;
    combining.identity_end = o.special.identity_end;
    combining.x = seen(x, tokens);
    y.resize(x.size());
    combine(as(out), plan, choices, matrix_view<float>(y.data(), tokens, d), combining);

    dx.assign(x.size(), 0.0f);
    dweights.resize(static_cast<std::size_t>(choices.choices()));
    rows identities(dweights.size());
    const bool identity = o.special.identity_first < o.special.identity_end;
    combine_gradients<float> terms{.slots = as(dout),
                                   .weights = on_input ? identities : dweights,
                                   .x = {dx.data(), tokens, d}};
    combine_backward(as(out), plan, choices, seen(dy, tokens), terms, serial{}, combining);
    for_each_expert_backward(
        plan, seen(in, plan.slots()), seen(dout, plan.slots()), as(din),
        [&](expert_id e, matrix_view<const float> a, matrix_view<const float> b,
            matrix_view<float> c) { experts.backward(e, a, b, c); });
    dispatch_scale<float> scale;
    if (on_input) scale = {.scale = choices.weights(), .x = seen(x, tokens), .dscale = dweights};
    const bool first = identity || o.lost_token_gets == lost_token::residual;
    dispatch_backward(as(din), plan, first ? gradient_to::add : gradient_to::write,
                      matrix_view<float>(dx.data(), tokens, d), serial{}, scale);
    for (std::size_t c = 0; on_input && identity && c < dweights.size(); ++c)
      dweights[c] += identities[c];
    dw = experts.gradient;
  }
};

// Ragged numbers of tokens, some 0; rank 0 gets none where there are several.
std::vector<index_t> cut_tokens(index_t tokens, index_t ranks, std::uint64_t seed) {
  test::random rng(seed);
  std::vector<index_t> edge{0};
  for (index_t r = 1; r < ranks; ++r) edge.push_back(r == 1 ? 0 : rng.below(tokens + 1));
  edge.push_back(tokens);
  std::sort(edge.begin(), edge.end());
  return edge;
}

struct scene {
  std::string name;
  assignment choices;
  rows x, dy;
  index_t d;
  std::vector<std::uint8_t> mask{};
  std::uint64_t cut = 5;  ///< seed of which rank has which tokens
};

scene scene_of(std::string name, assignment a, index_t d, std::uint64_t seed) {
  const index_t n = a.tokens() * d;
  return {std::move(name), std::move(a), random_rows(n, seed), random_rows(n, seed + 1), d};
}

// The first thing in which R ranks differ from one: "" where nothing does.
template <class Exec = serial>
std::string difference(const scene& s, const placement& p, const exchange_options& options,
                       exchange_path path = exchange_path::flat, const Exec& exec = {},
                       const slot_ranges* ranges = nullptr) {
  column_experts experts(s.choices.experts(), s.d);
  const std::vector<expert_id> lost = p.lost();
  const one_rank expected(s.x, s.dy, s.choices, experts, options, s.mask, lost);
  const index_t ranks = p.ranks();
  const std::vector<index_t> edge =
      cut_tokens(s.choices.tokens(), ranks, s.cut + static_cast<std::uint64_t>(ranks));
  std::vector<assignment> own(static_cast<std::size_t>(ranks));
  // Rows apart, each kind by its own distance.
  const index_t of_x = s.d + 1, of_y = s.d + 2, of_dy = s.d + 3, of_dx = s.d + 4;
  const auto apart = [&](const rows& from, index_t stride) {
    rows to(static_cast<std::size_t>(s.choices.tokens() * stride), 9.0f);
    for (index_t t = 0; t < s.choices.tokens(); ++t)
      std::copy_n(from.begin() + t * s.d, s.d, to.begin() + t * stride);
    return to;
  };
  const auto together = [&](const rows& from, index_t stride) {
    rows to(s.x.size());
    for (index_t t = 0; t < s.choices.tokens(); ++t)
      std::copy_n(from.begin() + t * stride, s.d, to.begin() + t * s.d);
    return to;
  };
  const rows x = apart(s.x, of_x), dy = apart(s.dy, of_dy);
  rows y = apart(rows(s.x.size(), 9.0f), of_y), dx = apart(rows(s.x.size(), 9.0f), of_dx),
       dweights(static_cast<std::size_t>(s.choices.choices()), 9.0f);
  std::vector<rank_tokens<>> tokens;
  std::vector<rank_gradients> gradients;
  for (index_t r = 0; r < ranks; ++r) {
    const index_t first = edge[static_cast<std::size_t>(r)],
                  n = edge[static_cast<std::size_t>(r) + 1] - first;
    copy_tokens(s.choices, first, n, own[static_cast<std::size_t>(r)]);
    std::span<const std::uint8_t> mask = s.mask;
    if (!mask.empty())
      mask = mask.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
    tokens.push_back({{x.data() + first * of_x, n, s.d, of_x},
                      own[static_cast<std::size_t>(r)],
                      {y.data() + first * of_y, n, s.d, of_y},
                      mask});
    const index_t c = s.choices.first(first);
    gradients.push_back(
        {{dy.data() + first * of_dy, n, s.d, of_dy},
         {dx.data() + first * of_dx, n, s.d, of_dx},
         std::span(dweights).subspan(static_cast<std::size_t>(c),
                                     static_cast<std::size_t>(s.choices.first(first + n) - c))});
  }
  virtual_ranks<> all(p, options, path);
  if (ranges != nullptr) all.set_ranges(*ranges);
  const auto expert_at = [&](index_t rank, expert_id slot) {
    return p.experts_of_rank(rank)[static_cast<std::size_t>(slot)];
  };
  // Twice: what a warm call finds in its buffers is nothing to it.
  for (int call = 0; call < 2; ++call)
    all.forward(
        tokens,
        [&](index_t rank, expert_id slot, matrix_view<const float> in, matrix_view<float> out) {
          experts.forward(expert_at(rank, slot), in, out);
        },
        exec);
  const bool reduced = options.result == exchange_result::reduced;
  const rows made = together(y, of_y);
  for (std::size_t i = 0; reduced && i < made.size(); ++i)
    if (!(std::abs(made[i] - expected.y[i]) <= 1e-4f)) return s.name + " reduced y";
  if (const std::string diff = test::bit_difference(made, expected.y); !reduced && !diff.empty())
    return s.name + " y " + diff;
  if (y != apart(together(y, of_y), of_y)) return s.name + " y between its rows";
  const auto backward = [&] {
    all.backward(
        tokens, gradients,
        [&](index_t rank, expert_id slot, matrix_view<const float> in,
            matrix_view<const float> dout,
            matrix_view<float> din) { experts.backward(expert_at(rank, slot), in, dout, din); },
        exec);
  };
  if (reduced) {
    const std::string said = test::refusal(backward);
    return said == "moeroute::exchange: reduced results have no backward pass: expected exact"
               ? ""
               : said;
  }
  backward();
  if (const std::string diff = test::bit_difference(together(dx, of_dx), expected.dx);
      !diff.empty())
    return s.name + " dx " + diff;
  if (dx != apart(together(dx, of_dx), of_dx)) return s.name + " dx between its rows";
  if (const std::string diff = test::bit_difference(dweights, expected.dweights); !diff.empty())
    return s.name + " dweights " + diff;
  // A replicated expert's gradient is a sum of its slots' own.
  for (index_t e = 0; e < p.experts(); ++e) {
    if (p.replicas(e) != 1) continue;
    const auto at = static_cast<std::size_t>(e * s.d), n = static_cast<std::size_t>(s.d);
    if (const std::string diff = test::bit_difference(std::span(experts.gradient).subspan(at, n),
                                                      std::span(expected.dw).subspan(at, n));
        !diff.empty())
      return s.name + " dw of expert " + std::to_string(e) + " " + diff;
  }
  // The gradients of weights alone, and of tokens alone, are the same.
  std::fill(dweights.begin(), dweights.end(), 9.0f);
  std::vector<rank_gradients> both = gradients;
  for (rank_gradients& g : gradients) g.dx = {};
  backward();
  if (const std::string diff = test::bit_difference(dweights, expected.dweights); !diff.empty())
    return s.name + " dweights without dx " + diff;
  std::swap(gradients, both);
  for (rank_gradients& g : gradients) g.dweights = {};
  std::fill(dx.begin(), dx.end(), 9.0f);
  backward();
  if (const std::string diff = test::bit_difference(together(dx, of_dx), expected.dx);
      !diff.empty())
    return s.name + " dx without dweights " + diff;
  gradients = both;
  const auto n = static_cast<index_t>(gradients[0].dweights.size());
  if (n < 2) return "";
  gradients[0].dweights = gradients[0].dweights.first(static_cast<std::size_t>(n - 1));
  const std::string said = test::refusal(backward);
  return said.ends_with("is " + std::to_string(n - 1) + ", expected " + std::to_string(n))
             ? ""
             : s.name + ": dweights that are too short: " + said;
}

std::vector<scene> scenes() {
  test::random rng(3);
  std::vector<scene> list;
  list.push_back(scene_of("fixed", test::fixed_choices(rng, 60, 24, 8), 5, 1));
  list.push_back(
      scene_of("skewed, some missing", test::fixed_choices(rng, 45, 64, 6, 7, 1.0), 7, 2));
  list.push_back(scene_of("ragged", test::ragged_choices(rng, 33, 12, 9), 3, 3));
  list.push_back(scene_of("k is E", test::fixed_choices(rng, 9, 8, 8), 4, 4));
  list.push_back(scene_of("one choice", test::fixed_choices(rng, 50, 16, 1), 2, 5));
  assignment dropped = test::fixed_choices(rng, 29, 5, 2);
  test::drop_some(rng, dropped, 3);
  list.push_back(scene_of("drops", dropped, 6, 6));
  list.push_back(scene_of("nobody", test::fixed_choices(rng, 0, 4, 2), 6, 7));
  list.push_back(scene_of("masked", test::fixed_choices(rng, 31, 10, 3), 4, 8));
  for (index_t t = 0; t < 31; ++t) list.back().mask.push_back(t % 4 != 1 ? 1 : 0);
  assignment one = test::fixed_choices(rng, 20, 6, 1);
  std::fill(one.ids().begin(), one.ids().end(), 4);
  list.push_back(scene_of("all to one expert", one, 4, 9));
  return list;
}

// Experts contiguous, and `extra` more slots on ranks in turn for experts in turn: replicas,
// numbers of slots that differ, two nodes.
placement replicated(index_t experts, index_t ranks, index_t extra) {
  std::vector<std::vector<expert_id>> of(static_cast<std::size_t>(ranks));
  for (index_t e = 0; e < experts; ++e)
    of[static_cast<std::size_t>(e * ranks / experts)].push_back(static_cast<expert_id>(e));
  for (index_t i = 0; i < extra; ++i)
    of[static_cast<std::size_t>(i * 5 % ranks)].push_back(static_cast<expert_id>(i * 3 % experts));
  std::vector<std::int32_t> offset{0}, node;
  std::vector<expert_id> slots;
  for (index_t r = 0; r < ranks; ++r) {
    std::vector<expert_id>& own = of[static_cast<std::size_t>(r)];
    slots.insert(slots.end(), own.begin(), own.end());
    offset.push_back(static_cast<std::int32_t>(slots.size()));
    node.push_back(ranks > 1 && r >= ranks / 2 ? 1 : 0);
  }
  return placement(
      {.experts = experts, .slot_offset = offset, .expert_of_slot = slots, .node_of_rank = node});
}

constexpr index_t rank_counts[] = {1, 2, 3, 4, 7, 16, 64};

}  // namespace

TEST_CASE("tokens over R ranks have the outputs and gradients of one rank bit for bit") {
  for (const scene& s : scenes())
    for (const index_t ranks : rank_counts) {
      INFO(ranks << " ranks");
      CHECK(difference(s, placement::contiguous(s.choices.experts(), ranks), {}) == "");
      CHECK(difference(s, placement::round_robin(s.choices.experts(), ranks), {}) == "");
    }
}

TEST_CASE("replicas and the rule that picks them do not change a bit") {
  for (const scene& s : scenes())
    for (const index_t ranks : {2, 4, 7}) {
      const placement p = replicated(s.choices.experts(), ranks, 9);
      for (const replica_rule rule : {replica_rule::nearest, replica_rule::round_robin,
                                      replica_rule::even, replica_rule::shares}) {
        INFO(ranks << " ranks, rule " << static_cast<int>(rule));
        CHECK(difference(s, p, {.rule = rule}) == "");
      }
    }
}

TEST_CASE("every router of the catalogue that sees tokens one by one gives the bits of one rank") {
  for (const catalog_entry& entry : catalog) {
    router_spec spec = entry.spec;
    if (spec.capacity != 0) continue;
    const bool table = spec.selection == selection_kind::expert_table;
    test::random rng(7);
    rows bias, scale;
    for (index_t e = 0; e < spec.experts; ++e) {
      if (spec.selection_bias) bias.push_back(0.1f * rng.normal());
      if (spec.per_expert_scale) scale.push_back(0.5f + rng.uniform());
    }
    expert_table of_tokens;
    if (table) of_tokens = random_table(8, spec.k, spec.experts, 11);
    const any_router router =
        make_router(spec, {.bias = bias, .per_expert_scale = scale, .table = &of_tokens});
    const index_t tokens = 13;
    const rows logits = random_rows(tokens * router.columns(), 5);
    std::vector<std::int32_t> ids;
    for (index_t t = 0; t < tokens; ++t) ids.push_back(static_cast<std::int32_t>(t % 8));
    workspace memory;
    assignment choices;
    side_inputs side;
    if (table) side.token_ids = ids;
    route(router, matrix_view<const float>(logits.data(), tokens, router.columns()), side, memory,
          choices);
    exchange_options options;
    if (spec.zero_experts > 0) {
      options.special.identity_first =
          static_cast<expert_id>(choices.experts() - spec.zero_experts);
      options.special.identity_end = static_cast<expert_id>(choices.experts());
    }
    const scene s = scene_of(std::string(entry.name), choices, 3, 3);
    CHECK(difference(s, replicated(choices.experts(), 3, 4), options) == "");
  }
}

TEST_CASE("weights on inputs, identity experts and residuals are added where one rank adds them") {
  test::random rng(8);
  scene s = scene_of("special", test::fixed_choices(rng, 40, 12, 4, 6), 5, 1);
  for (const weight_on weights : {weight_on::output, weight_on::input})
    for (const bool identity : {false, true})
      for (const index_t ranks : {1, 3, 4}) {
        exchange_options o{.weights = weights};
        if (identity) {
          o.special = {.identity_first = 8, .identity_end = 10, .zero_first = 10, .zero_end = 12};
          o.lost_token_gets = lost_token::residual;
        }
        INFO(static_cast<int>(weights) << identity << ranks);
        CHECK(difference(s, replicated(12, ranks, 3), o) == "");
      }
}

// Slots of random ranks, some empty and some ranks dead or without one; experts that `without` says
// have none. Where nodes are more than 1 they are runs of equally many ranks.
placement any_placement(test::random& rng, index_t experts, index_t ranks, index_t nodes,
                        bool several, const std::vector<std::uint8_t>& without) {
  std::vector<std::vector<expert_id>> of(static_cast<std::size_t>(ranks));
  std::vector<std::uint8_t> alive;
  for (index_t r = 0; r < ranks; ++r) alive.push_back(r == 0 || rng.below(5) > 0 ? 1 : 0);
  const auto put = [&](index_t e, bool live) {
    auto r = static_cast<std::size_t>(rng.below(ranks));
    if (live && alive[r] == 0) r = 0;
    const auto at = rng.below(static_cast<index_t>(of[r].size()) + 1);
    of[r].insert(of[r].begin() + at, static_cast<expert_id>(e));
  };
  for (index_t e = 0; e < experts; ++e)
    if (without[static_cast<std::size_t>(e)] == 0) put(e, true);
  for (index_t i = rng.below(6); several && i > 0; --i) {
    const index_t e = rng.below(experts);
    if (without[static_cast<std::size_t>(e)] == 0) put(e, false);
  }
  for (index_t i = rng.below(3); i > 0; --i) put(no_expert, false);
  std::vector<std::int32_t> offset{0}, node;
  std::vector<expert_id> slots;
  for (index_t r = 0; r < ranks; ++r) {
    const auto& own = of[static_cast<std::size_t>(r)];
    slots.insert(slots.end(), own.begin(), own.end());
    offset.push_back(static_cast<std::int32_t>(slots.size()));
    node.push_back(static_cast<std::int32_t>(r / (ranks / nodes)));
  }
  return placement({.experts = experts,
                    .slot_offset = offset,
                    .expert_of_slot = slots,
                    .node_of_rank = node,
                    .alive = alive});
}

// Every expert's tokens, cut at random between its live slots.
slot_ranges any_ranges(test::random& rng, const placement& p, const scene& s,
                       const special_experts& special) {
  std::vector<std::int32_t> count(static_cast<std::size_t>(p.experts())), of_expert(count);
  for (index_t t = 0; t < s.choices.tokens(); ++t)
    for (index_t c = s.choices.first(t); c < s.choices.first(t + 1); ++c) {
      const expert_id e = s.choices.ids()[static_cast<std::size_t>(c)];
      if (e >= 0 && s.choices.kept(c) && !special.contains(e) &&
          (s.mask.empty() || s.mask[static_cast<std::size_t>(t)] != 0))
        ++count[static_cast<std::size_t>(e)];
    }
  slot_ranges cut{.first = {0}, .range = {}};
  for (index_t e = 0; e < p.experts(); ++e) {
    const std::span<const slot_id> own = p.slots_of_expert(e);
    const std::int64_t all = count[static_cast<std::size_t>(e)];
    for (std::int64_t at = 0; !own.empty() && at < all;) {
      const std::int64_t end = at + 1 + rng.below(static_cast<index_t>(all - at));
      const index_t i = rng.below(static_cast<index_t>(own.size()));
      cut.range.push_back({own[static_cast<std::size_t>(i)], at, end});
      at = end;
    }
    cut.first.push_back(static_cast<std::int32_t>(cut.range.size()));
  }
  return cut;
}

TEST_CASE(
    "whatever options, rules, paths and placements come together, R ranks give the bits of one") {
  test::random rng(21);
  for (int round = 0; round < 400; ++round) {
    const index_t experts = 1 + rng.below(10), most = 1 + rng.below(std::min<index_t>(experts, 4)),
                  tokens = rng.below(26), d = 1 + rng.below(6);
    const int none = static_cast<int>(rng.below(2)) * 4;
    assignment choices = rng.below(3) == 0 ? test::ragged_choices(rng, tokens, experts, most)
                                           : test::fixed_choices(rng, tokens, experts, most, none);
    if (rng.below(3) == 0) test::drop_some(rng, choices, 3);
    const std::uint64_t seed = 100 + static_cast<std::uint64_t>(round);
    scene s = scene_of("round " + std::to_string(round), std::move(choices), d, seed);
    s.cut = seed;
    const bool masked = rng.below(3) == 0;
    for (index_t t = 0; masked && t < tokens; ++t) s.mask.push_back(rng.below(4) > 0 ? 1 : 0);

    exchange_options o{.rule = static_cast<replica_rule>(rng.below(6)),
                       .lost = static_cast<lost_expert>(rng.below(2)),
                       .rows_per_call = rng.below(4)};
    const bool reduced = rng.below(5) == 0;
    if (reduced) o.result = exchange_result::reduced;
    if (rng.below(2) == 0) o.weights = weight_on::input;
    if (!reduced && rng.below(2) == 0) {
      o.special.identity_first = static_cast<expert_id>(rng.below(experts + 1));
      const index_t after = experts - o.special.identity_first;
      o.special.identity_end =
          o.special.identity_first + static_cast<expert_id>(rng.below(after + 1));
      o.special.zero_end = static_cast<expert_id>(rng.below(o.special.identity_first + 1));
    }
    if (!reduced && rng.below(2) == 0) o.lost_token_gets = lost_token::residual;
    std::vector<std::uint8_t> without;
    for (expert_id e = 0; e < experts; ++e) {
      const bool nowhere = o.lost == lost_expert::drop && rng.below(4) == 0;
      without.push_back(nowhere || (o.special.contains(e) && rng.below(2) == 0) ? 1 : 0);
    }
    const index_t nodes = 1 + rng.below(3), ranks = nodes * (1 + rng.below(3));
    const placement p =
        any_placement(rng, experts, ranks, nodes, o.rule != replica_rule::only, without);
    const slot_ranges ranges = any_ranges(rng, p, s, o.special);
    auto path = static_cast<exchange_path>(rng.below(3));
    if (path == exchange_path::two_level && (reduced || o.weights == weight_on::input))
      path = exchange_path::flat;
    INFO(ranks << " ranks on " << nodes << " nodes, path " << static_cast<int>(path) << ", rule "
               << static_cast<int>(o.rule));
    if (rng.below(4) == 0)
      CHECK(difference(s, p, o, path, test::several_threads{3}, &ranges) == "");
    else
      CHECK(difference(s, p, o, path, serial{}, &ranges) == "");
  }
}

TEST_CASE("any executor gives the bits of the serial one") {
  const test::several_threads exec{3};
  for (const scene& s : scenes())
    CHECK(difference(s, placement::contiguous(s.choices.experts(), 4), {}, exchange_path::flat,
                     exec) == "");
}

TEST_CASE("two levels give the bits of one") {
  for (const scene& s : scenes())
    for (const auto& [nodes, places] :
         {std::pair<index_t, index_t>{1, 3}, {2, 2}, {3, 2}, {4, 4}}) {
      const index_t ranks = nodes * places;
      std::vector<std::int32_t> node;
      for (index_t r = 0; r < ranks; ++r) node.push_back(static_cast<std::int32_t>(r / places));
      const placement even = replicated(s.choices.experts(), ranks, 5);
      const placement p({.experts = even.experts(),
                         .slot_offset = even.slot_offset(),
                         .expert_of_slot = even.expert_of_slot(),
                         .node_of_rank = node});
      INFO(nodes << " nodes of " << places);
      CHECK(difference(s, p, {.rule = replica_rule::even}, exchange_path::two_level) == "");
    }
}

TEST_CASE("chunks of tokens that are joined add up gradients as one chunk does") {
  test::random rng(12);
  constexpr index_t experts = 6, ranks = 2, d = 5, tokens = 24, per = experts / ranks;
  scene s = scene_of("chunks", test::fixed_choices(rng, tokens, experts, 2, 5), d, 3);
  const placement p = placement::contiguous(experts, ranks);
  // Tokens of rank 0, then of rank 1, each in three chunks; some are empty.
  const std::vector<index_t> edge{0, 5, 5, 12, 13, 20, 24};
  constexpr std::size_t chunks = 3;
  for (const weight_on weights : {weight_on::output, weight_on::input})
    for (const bool scratch : {false, true}) {
      INFO("weights on inputs " << (weights == weight_on::input) << ", scratch " << scratch);
      const exchange_options o{.weights = weights};
      column_experts of(experts, d);
      const one_rank expected(s.x, s.dy, s.choices, of, o, {});
      std::vector<exchange_sender<>> senders(ranks * chunks);
      std::vector<std::vector<exchange_receiver<>>> receivers(ranks);
      for (auto& list : receivers) list = std::vector<exchange_receiver<>>(chunks);
      std::vector<assignment> own(ranks * chunks);
      rows y(s.x.size()), dx(s.x.size(), 9.0f),
          dweights(static_cast<std::size_t>(s.choices.choices()), 9.0f);
      const auto copy = [](auto from, auto to) {
        REQUIRE(from.size() == to.size());
        std::copy(from.begin(), from.end(), to.begin());
      };
      const auto part = [&](auto& all, std::size_t i) {
        using value = std::remove_reference_t<decltype(*all.data())>;
        return matrix_view<value>(all.data() + edge[i] * d, edge[i + 1] - edge[i], d);
      };
      for (std::size_t i = 0; i < senders.size(); ++i) {
        copy_tokens(s.choices, edge[i], edge[i + 1] - edge[i], own[i]);
        senders[i].pack(part(std::as_const(s.x), i), own[i], p, static_cast<index_t>(i / chunks), o,
                        {});
      }
      for (std::size_t r = 0; r < ranks; ++r)
        for (std::size_t c = 0; c < chunks; ++c) {
          std::vector<std::int32_t> rows_from, entries_from;
          const auto from = [&](std::size_t source) -> exchange_sender<>& {
            return senders[source * chunks + c];
          };
          const auto to_rank = static_cast<index_t>(r);
          for (std::size_t q = 0; q < ranks; ++q) {
            rows_from.push_back(static_cast<std::int32_t>(from(q).plan().rows_to(to_rank)));
            entries_from.push_back(static_cast<std::int32_t>(from(q).plan().entries_to(to_rank)));
          }
          exchange_receiver<>& to = receivers[r][c];
          to.expect(rows_from, entries_from, d, o);
          for (std::size_t q = 0; q < ranks; ++q) {
            const auto source = static_cast<index_t>(q);
            copy(from(q).rows_to(to_rank), to.rows_from(source));
            copy(from(q).entries_of_row_to(to_rank), to.entries_of_row_from(source));
            copy(from(q).local_slot_to(to_rank), to.local_slot_from(source));
            if (weights == weight_on::input)
              copy(from(q).weight_to(to_rank), to.weight_from(source));
          }
          to.run(
              per,
              [&](expert_id slot, matrix_view<const float> in, matrix_view<float> out) {
                of.forward(to_rank * per + slot, in, out);
              },
              o);
        }
      const auto home = [&](std::size_t i) {
        return std::pair(static_cast<index_t>(i / chunks), i % chunks);
      };
      for (std::size_t i = 0; i < senders.size(); ++i) {
        const auto [source, c] = home(i);
        senders[i].expect_results(o.result);
        for (std::size_t r = 0; r < ranks; ++r)
          copy(receivers[r][c].results_to(source),
               senders[i].results_from(static_cast<index_t>(r)));
        senders[i].finish(part(std::as_const(s.x), i), own[i], o, part(y, i));
      }
      CHECK(test::bit_difference(y, expected.y) == "");
      const auto weights_of = [&](std::size_t i) {
        const index_t first = s.choices.first(edge[i]), end = s.choices.first(edge[i + 1]);
        return std::span(dweights).subspan(static_cast<std::size_t>(first),
                                           static_cast<std::size_t>(end - first));
      };
      for (std::size_t i = 0; i < senders.size(); ++i)
        senders[i].pack_backward(part(std::as_const(s.x), i), part(std::as_const(s.dy), i), own[i],
                                 o, weights_of(i), part(dx, i));
      for (std::size_t r = 0; r < ranks; ++r) {
        for (std::size_t c = 0; c < chunks; ++c) {
          receivers[r][c].expect_backward();
          for (std::size_t q = 0; q < ranks; ++q) {
            const exchange_sender<>& from = senders[q * chunks + c];
            const auto source = static_cast<index_t>(q), to = static_cast<index_t>(r);
            copy(from.gradient_rows_to(to), receivers[r][c].gradient_rows_from(source));
            copy(from.weight_to(to), receivers[r][c].weight_from(source));
          }
          receivers[r][c].begin_backward();
        }
        joined_backward<> join;
        const auto plain = [&](expert_id slot, matrix_view<const float> in,
                               matrix_view<const float> dout, matrix_view<float> din) {
          of.backward(static_cast<index_t>(r) * per + slot, in, dout, din);
        };
        struct with_memory {
          decltype(plain)& f;
          index_t scratch_floats() const { return 3; }
          void operator()(expert_id slot, matrix_view<const float> in,
                          matrix_view<const float> dout, matrix_view<float> din,
                          float* memory) const {
            std::fill_n(memory, 3, 1.0f);
            f(slot, in, dout, din);
          }
        };
        if (scratch)
          join.run(receivers[r], per, with_memory{plain});
        else
          join.run(receivers[r], per, plain);
        for (exchange_receiver<>& to : receivers[r]) to.end_backward();
        // The same rows, joined, for who makes the weights' gradients apart.
        struct in_two {
          std::vector<std::pair<expert_id, index_t>> seen;
          double sum = 0.0;
          void weights(expert_id slot, matrix_view<const float> in, matrix_view<const float> dout) {
            seen.push_back({slot, in.rows});
            for (index_t i = 0; i < in.rows; ++i)
              for (index_t j = 0; j < in.cols; ++j)
                sum += static_cast<double>(in(i, j)) * static_cast<double>(dout(i, j));
          }
        } apart;
        join.run_weights(receivers[r], per, apart);
        double wanted = 0.0;
        std::vector<std::pair<expert_id, index_t>> slots;
        for (expert_id slot = 0; slot < per; ++slot) {
          const auto e = static_cast<expert_id>(static_cast<index_t>(r) * per + slot);
          const auto n = std::count(s.choices.ids().begin(), s.choices.ids().end(), e);
          if (n > 0) slots.push_back({slot, n});
          for (index_t j = 0; j < d; ++j)
            wanted += static_cast<double>(expected.dw[static_cast<std::size_t>(e * d + j)]);
        }
        CHECK(apart.seen == slots);
        CHECK(std::abs(apart.sum - wanted) < 1e-4 * (1.0 + std::abs(wanted)));
      }
      CHECK(test::bit_difference(of.gradient, expected.dw) == "");
      for (std::size_t i = 0; i < senders.size(); ++i) {
        const auto [source, c] = home(i);
        for (std::size_t r = 0; r < ranks; ++r)
          copy(receivers[r][c].gradients_to(source),
               senders[i].gradients_from(static_cast<index_t>(r)));
        senders[i].finish_backward(part(std::as_const(s.x), i), own[i], o, weights_of(i),
                                   part(dx, i));
      }
      CHECK(test::bit_difference(dx, expected.dx) == "");
      CHECK(test::bit_difference(dweights, expected.dweights) == "");
      // What is held: of a receiver its rows, and six times its entries' or rows'; of a sender its
      // rows, and what comes back.
      for (const auto& list : receivers)
        for (const exchange_receiver<>& to : list)
          CHECK(to.capacity() >=
                (to.rows() * 2 + to.entries() * 5) * d * static_cast<index_t>(sizeof(float)));
      for (const exchange_sender<>& from : senders)
        CHECK(from.capacity() >= (from.plan().rows() * 2 + from.plan().entries() * 2) * d *
                                     static_cast<index_t>(sizeof(float)));
    }
  // Rows are held as they were given, what comes back as floats.
  exchange_sender<bfloat16> narrow;
  const std::vector<bfloat16> row{bfloat16(1.0f)};
  assignment one;
  one.reset(1, 1, 1);
  one.ids()[0] = 0;
  one.weights()[0] = 1.0f;
  narrow.pack(matrix_view<const bfloat16>(row.data(), 1, 1), one, placement::contiguous(1, 1), 0,
              {}, {});
  narrow.expect_results(exchange_result::exact);
  CHECK(narrow.capacity() == 2 + 4);
  joined_backward<> nothing;
  nothing.run(std::span<exchange_receiver<>>(), 3,
              [](expert_id, matrix_view<const float>, matrix_view<const float>,
                 matrix_view<float>) { FAIL("nobody has rows"); });
}

TEST_CASE("ranks that all get all tokens pick what one rank would have sent them") {
  for (const scene& s : scenes())
    for (const index_t ranks : {1, 3, 7})
      CHECK(difference(s, replicated(s.choices.experts(), ranks, 5), {.rule = replica_rule::even},
                       exchange_path::all_gather) == "");
  test::random rng(8);
  const scene s = scene_of("special", test::fixed_choices(rng, 40, 12, 4, 6), 5, 1);
  const exchange_options o{
      .weights = weight_on::input,
      .special = {.identity_first = 8, .identity_end = 10, .zero_first = 10, .zero_end = 12},
      .lost_token_gets = lost_token::residual};
  CHECK(difference(s, replicated(12, 3, 3), o, exchange_path::all_gather) == "");
}

TEST_CASE("a message of gathered tokens that is not what was announced is refused") {
  test::random rng(8);
  const assignment choices = test::fixed_choices(rng, 6, 4, 2);
  const rows x = random_rows(6 * 3, 1);
  const placement p = placement::contiguous(4, 2);
  exchange_sender<> sender;
  sender.pack(matrix_view<const float>(x.data(), 6, 3), choices, p, 0, {}, {});
  sender.pack_gathered({x.data(), 6, 3}, choices, true);
  const auto said = [&](index_t row_count, index_t entry_count, index_t d, auto&& spoil) {
    const std::vector<std::int32_t> rows_from{static_cast<std::int32_t>(row_count)},
        entries_from{static_cast<std::int32_t>(entry_count)};
    std::vector<std::byte> message(sender.gathered().begin(), sender.gathered().end());
    spoil(message);
    exchange_receiver<> to;
    to.expect(rows_from, entries_from, d, {});
    return test::refusal(
        [&] { to.take_gathered(0, message, sender.shape_of_gathered(), p.first_slot(1), 2); });
  };
  const auto same = [](std::vector<std::byte>&) {};
  const index_t n = sender.plan().rows_to(1), m = sender.plan().entries_to(1);
  const auto number = [](index_t i) { return std::to_string(i); };
  const std::string exchange = "moeroute::exchange: ";
  CHECK(said(n, m, 3, same) == "accepted");
  CHECK(said(n - 1, m, 3, same) ==
        exchange + "a message's rows is " + number(n - 1) + ", expected 0 to " + number(n - 2));
  CHECK(said(n, m + 1, 3, same) ==
        exchange + "a message's entries is " + number(m) + ", expected " + number(m + 1));
  CHECK(said(n, m - 1, 3, same) ==
        exchange + "a message's entries is " + number(m - 1) + ", expected 0 to " + number(m - 2));
  CHECK(said(n + 1, std::max(m, n + 1), 3, same) ==
        exchange + "a message's rows is " + number(n) + ", expected " + number(n + 1));
  CHECK(said(n, m, 4, same) == exchange + "d of a message is 3, expected 4");
  const auto packed = [&](index_t row_count, index_t stride, std::size_t slots) {
    const std::vector<slot_id> slot(slots);
    gathered_shape shape;
    buffer<std::byte> message;
    return test::refusal([&] {
      pack_gathered(matrix_view<const float>(x.data(), row_count, 3, stride), choices,
                    std::span<const slot_id>(slot), true, shape, message);
    });
  };
  const std::string pack = "moeroute::pack_gathered: ";
  CHECK(packed(6, 3, 12) == "accepted");
  CHECK(packed(5, 3, 12) == pack + "x.rows() is 5, expected 6");
  CHECK(packed(6, 2, 12) == pack + "x.stride is 2, expected at least 3");
  for (const std::size_t slots : {11, 13})
    CHECK(packed(6, 3, slots) ==
          pack + "slot.size() is " + std::to_string(slots) + ", expected 12");
  const auto bytes = static_cast<index_t>(sender.gathered().size());
  CHECK(said(n, m, 3, [](auto& list) { list.pop_back(); }) ==
        "moeroute::gathered_reader: message.size() is " + number(bytes - 1) + ", expected " +
            number(bytes));
  CHECK(said(n, m, 3, [](auto& list) { list[0] = std::byte{1}; }) ==
        exchange + "a message's first choice is 1, expected 0");
  // Of token 1 and of token 2, by the byte that weighs most.
  CHECK(said(n, m, 3, [](auto& list) { list[7] = std::byte{0x7f}; }) ==
        exchange + "a message's choices is " + number(0x7f000002) + ", expected 0 to 12");
  CHECK(said(n, m, 3, [](auto& list) { list[11] = std::byte{0x80}; }) ==
        exchange + "a message's choices is " + number(4 - (index_t{1} << 31)) +
            ", expected 2 to 12");
}

TEST_CASE("counts that no message can have are refused before there is room for them") {
  using counts = std::vector<std::int32_t>;
  constexpr std::int32_t most = 0x7fffffff;
  const auto said = [](const counts& rows_from, const counts& entries_from, index_t most_rows) {
    exchange_receiver<> to;
    return test::refusal([&] { to.expect(rows_from, entries_from, 3, {.most_rows = most_rows}); });
  };
  const std::string exchange = "moeroute::exchange: ";
  CHECK(said({2, 1}, {2, 3}, 3) == "accepted");
  CHECK(said({2, 1}, {2, 3}, 2) == exchange + "received rows is 3, expected 0 to 2");
  CHECK(said({2, 1}, {2}, 0) == exchange + "entries_from.size() is 1, expected 2");
  CHECK(said({-1}, {0}, 0) == exchange + "rows_from is -1, expected 0 to 2147483647");
  CHECK(said({0, 2}, {0, 1}, 0) == exchange + "entries_from is 1, expected 2 to 2147483647");
  CHECK(said({most, most}, {most, most}, 0) ==
        exchange + "received rows is 4294967294, expected 0 to 2147483647");
  CHECK(said({1, 1}, {most, 1}, 0) ==
        exchange + "received entries is 2147483648, expected 0 to 2147483647");
}

TEST_CASE("reduced results are within their bound and the same every time") {
  test::random rng(9);
  const scene s = scene_of("reduced", test::fixed_choices(rng, 50, 24, 8), 6, 2);
  column_experts experts(24, s.d);
  for (const weight_on weights : {weight_on::output, weight_on::input}) {
    const one_rank exact(s.x, s.dy, s.choices, experts, {.weights = weights}, {});
    for (const index_t ranks : {1, 3, 16}) {
      const placement p = placement::contiguous(24, ranks);
      const std::vector<index_t> edge = cut_tokens(50, ranks, 1);
      std::vector<assignment> own(static_cast<std::size_t>(ranks));
      rows y(s.x.size()), again;
      std::vector<rank_tokens<>> tokens;
      for (std::size_t r = 0; r < own.size(); ++r) {
        copy_tokens(s.choices, edge[r], edge[r + 1] - edge[r], own[r]);
        tokens.push_back({{s.x.data() + edge[r] * s.d, edge[r + 1] - edge[r], s.d},
                          own[r],
                          {y.data() + edge[r] * s.d, edge[r + 1] - edge[r], s.d}});
      }
      virtual_ranks<> all(p, {.result = exchange_result::reduced, .weights = weights});
      const auto run = [&] {
        all.forward(tokens, [&](index_t rank, expert_id slot, matrix_view<const float> in,
                                matrix_view<float> out) {
          experts.forward(p.experts_of_rank(rank)[static_cast<std::size_t>(slot)], in, out);
        });
      };
      run();
      again = y;
      run();
      CHECK(test::bit_difference(y, again) == "");
      bool within = true;
      for (index_t t = 0; t < 50; ++t)
        for (index_t j = 0; j < s.d; ++j) {
          double sum = 0.0;
          for (index_t c = 0; c < 8; ++c)
            sum += std::abs(double(s.choices.weights(t)[static_cast<std::size_t>(c)]) *
                            double(experts.weight[static_cast<std::size_t>(
                                s.choices.ids(t)[static_cast<std::size_t>(c)] * s.d + j)]) *
                            double(s.x[static_cast<std::size_t>(t * s.d + j)]));
          const auto at = static_cast<std::size_t>(t * s.d + j);
          within = within &&
                   std::abs(double(y[at]) - double(exact.y[at])) <= 2 * 7 * 0x1p-24 * sum + 1e-30;
        }
      CHECK(within);
    }
  }
}

TEST_CASE("a rank that serves nobody changes nothing while every expert has another slot") {
  test::random rng(10);
  const scene s = scene_of("drained", test::fixed_choices(rng, 40, 6, 2), 4, 1);
  const std::vector<expert_id> slots{0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1, 2};
  for (index_t dead = 0; dead < 4; ++dead) {
    std::vector<std::uint8_t> alive(4, 1);
    alive[static_cast<std::size_t>(dead)] = 0;
    const placement p = placement::from_slots(6, 4, slots, {}, alive);
    for (const replica_rule rule :
         {replica_rule::nearest, replica_rule::even, replica_rule::shares})
      CHECK(difference(s, p, {.rule = rule}) == "");
  }
}

TEST_CASE("experts that are networks give the bits of one rank, in 16 bits too") {
  constexpr index_t d = 24, ff = 16, experts = 8, tokens = 30, ranks = 3;
  swiglu_experts<> net(experts, d, ff);
  for (index_t e = 0; e < experts; ++e) {
    const rows w = random_rows(3 * d * ff, 40 + static_cast<std::uint64_t>(e));
    net.set_gate(static_cast<expert_id>(e), {w.data(), ff, d});
    net.set_up(static_cast<expert_id>(e), {w.data() + d * ff, ff, d});
    net.set_down(static_cast<expert_id>(e), {w.data() + 2 * d * ff, d, ff});
  }
  test::random rng(2);
  const assignment choices = test::fixed_choices(rng, tokens, experts, 3);
  const rows wide = random_rows(tokens * d, 3);
  std::vector<bfloat16> x(wide.begin(), wide.end());
  rows memory(static_cast<std::size_t>(net.scratch_floats())), expected(wide.size()),
      y(wide.size());
  dispatch_plan plan;
  moeroute::plan(choices, plan);
  rows in(static_cast<std::size_t>(plan.slots() * d)), out = in;
  dispatch(matrix_view<const bfloat16>(x.data(), tokens, d), plan,
           matrix_view<float>(in.data(), plan.slots(), d));
  for_each_expert(plan, matrix_view<const float>(in.data(), plan.slots(), d),
                  matrix_view<float>(out.data(), plan.slots(), d), net, memory.data());
  combine(matrix_view<const float>(out.data(), plan.slots(), d), plan, choices,
          matrix_view<float>(expected.data(), tokens, d));
  const placement p = placement::contiguous(experts, ranks);
  const std::vector<index_t> edge{0, 1, 1, tokens};
  std::vector<assignment> own(ranks);
  std::vector<rank_tokens<bfloat16>> list;
  for (std::size_t r = 0; r < ranks; ++r) {
    copy_tokens(choices, edge[r], edge[r + 1] - edge[r], own[r]);
    list.push_back({{x.data() + edge[r] * d, edge[r + 1] - edge[r], d},
                    own[r],
                    {y.data() + edge[r] * d, edge[r + 1] - edge[r], d}});
  }
  virtual_ranks<bfloat16> all(p);
  all.forward(list,
              [&](index_t rank, expert_id slot, matrix_view<const float> a, matrix_view<float> b) {
                net(p.experts_of_rank(rank)[static_cast<std::size_t>(slot)], a, b, memory.data());
              });
  CHECK(test::bit_difference(y, expected) == "");
}

TEST_CASE("virtual ranks refuse by name what does not fit") {
  test::random rng(1);
  const assignment choices = test::fixed_choices(rng, 4, 4, 2);
  rows x(16), y(16);
  std::vector<rank_tokens<>> one{{{x.data(), 4, 4}, choices, {y.data(), 4, 4}}};
  const auto identity = [](index_t, expert_id, matrix_view<const float> in,
                           matrix_view<float> out) {
    for (index_t r = 0; r < in.rows; ++r) std::copy_n(in.row(r), in.cols, out.row(r));
  };
  CHECK(test::refusal([&] {
          virtual_ranks<>(placement::contiguous(4, 2)).forward(one, identity);
        }) == "moeroute::virtual_ranks: ranks.size() is 1, expected 2");
  CHECK(test::refusal([&] {
          virtual_ranks<>(placement::contiguous(4, 1), {.most_rows = 3}).forward(one, identity);
        }) == "moeroute::exchange: received rows is 4, expected 0 to 3");
  virtual_ranks<> alone(placement::contiguous(4, 1)),
      on_input(placement::contiguous(4, 1), {.weights = weight_on::input});
  alone.forward(one, identity);
  on_input.forward(one, identity);
  rows up(20), down(20);
  std::vector<float> dweights(8);
  const auto back = [&](matrix_view<const float> dy, matrix_view<float> dx, std::size_t n = 8,
                        bool inputs = false, std::size_t ranks_given = 1, std::size_t given = 1) {
    const std::vector<rank_gradients> gradients{{dy, dx, std::span(dweights).first(n)}};
    return test::refusal([&] {
      (inputs ? on_input : alone)
          .backward(std::span(one).first(ranks_given), std::span(gradients).first(given),
                    [](index_t, expert_id, matrix_view<const float>, matrix_view<const float> dout,
                       matrix_view<float> din) {
                      for (index_t r = 0; r < din.rows; ++r)
                        std::copy_n(dout.row(r), din.cols, din.row(r));
                    });
    });
  };
  const matrix_view<const float> dy(up.data(), 4, 4);
  const matrix_view<float> dx(down.data(), 4, 4);
  CHECK(back(dy, dx) == "accepted");
  CHECK(back(dy, dx, 8, false, 0, 1) == "moeroute::virtual_ranks: ranks.size() is 0, expected 1");
  CHECK(back(dy, dx, 8, false, 1, 0) ==
        "moeroute::virtual_ranks: gradients.size() is 0, expected 1");
  CHECK(back(dy, dx, 7) == "moeroute::combine_backward: gradients.weights.size() is 7, expected 8");
  CHECK(back(dy, dx, 8, true) == "accepted");
  CHECK(back(dy, dx, 7, true) == "moeroute::exchange: dweights.size() is 7, expected 8");
  CHECK(back({up.data(), 5, 4}, dx) == "moeroute::exchange: dy.rows() is 5, expected 4");
  CHECK(back({up.data(), 4, 5}, dx) == "moeroute::exchange: dy.cols() is 5, expected 4");
  CHECK(back({up.data(), 4, 4, 3}, dx) ==
        "moeroute::exchange: dy.stride is 3, expected at least 4");
  CHECK(back(dy, {down.data(), 5, 4}) == "moeroute::exchange: dx.rows() is 5, expected 4");
  CHECK(back(dy, {down.data(), 4, 5}) == "moeroute::exchange: dx.cols() is 5, expected 4");
  CHECK(back(dy, {down.data(), 4, 4, 3}) ==
        "moeroute::exchange: dx.stride is 3, expected at least 4");
  CHECK(back(dy, {up.data() + 4, 4, 4}) ==
        "moeroute::exchange: dy and dx overlap, expected memory of their own");
  const auto first_of_3 =
      std::find(choices.ids().begin(), choices.ids().end(), 3) - choices.ids().begin();
  CHECK(test::refusal([&] {
          virtual_ranks<>(placement::from_slots(4, 1, std::vector<expert_id>{0, 1, 2}))
              .forward(one, identity);
        }) == "moeroute::resolve: choice " + std::to_string(first_of_3) +
                  " is of expert 3, which has no live slot");
  // Sums that ranks made have neither special experts nor what a lost token gets.
  for (const exchange_options& how :
       {exchange_options{.result = exchange_result::reduced,
                         .lost_token_gets = lost_token::residual},
        exchange_options{.result = exchange_result::reduced,
                         .special = {.identity_first = 3, .identity_end = 4}},
        exchange_options{.result = exchange_result::reduced,
                         .special = {.zero_first = 3, .zero_end = 4}}})
    CHECK(test::refusal(
              [&] { virtual_ranks<>(placement::contiguous(4, 1), how).forward(one, identity); }) ==
          "moeroute::exchange: reduced results with special experts or a lost token's "
          "residual: expected exact");
  CHECK(test::refusal([&] {
          virtual_ranks<>(placement::contiguous(4, 1), {.lost_token_gets = lost_token::mix})
              .forward(one, identity);
        }) ==
        "moeroute::rank_exchange: lost_token::mix needs the weights, which reduced rows "
        "have lost");
  const auto two_level = [](const std::vector<std::int32_t>& node, const exchange_options& how) {
    return test::refusal([&] {
      virtual_ranks<>(placement::from_slots(3, 3, std::vector<expert_id>{0, 1, 2}, node), how,
                      exchange_path::two_level);
    });
  };
  CHECK(two_level({0, 1, 0}, {}) ==
        "moeroute::virtual_ranks: rank 0 is on node 0, expected nodes that are runs of equally "
        "many ranks for two levels");
  CHECK(two_level({0, 2, 1}, {}) ==
        "moeroute::virtual_ranks: rank 1 is on node 2, expected nodes that are runs of equally "
        "many ranks for two levels");
  for (const exchange_options& how : {exchange_options{.result = exchange_result::reduced},
                                      exchange_options{.weights = weight_on::input}})
    CHECK(two_level({0, 0, 0}, how) ==
          "moeroute::virtual_ranks: two levels take exact results and weights on outputs only");
  // Fewer rows than tokens are not read past their end, by one level or by two.
  const std::vector<std::int32_t> nodes{0, 0, 1, 1};
  for (const bool two : {false, true}) {
    std::vector<assignment> none(4);
    for (assignment& a : none) a.reset(0, 4, 2);
    std::vector<rank_tokens<>> ranks{{{x.data(), 2, 4}, choices, {y.data(), 4, 4}}};
    for (std::size_t r = 1; r < 4; ++r)
      ranks.push_back({{x.data(), 0, 4}, none[r], {y.data(), 0, 4}});
    virtual_ranks<> all(placement::from_slots(4, 4, std::vector<expert_id>{0, 1, 2, 3}, nodes), {},
                        two ? exchange_path::two_level : exchange_path::flat);
    CHECK(test::refusal([&] { all.forward(ranks, identity); }) ==
          "moeroute::exchange: x.rows() is 2, expected 4");
  }
}

}  // namespace virtual_ranks_test
