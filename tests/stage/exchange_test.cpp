#include <moeroute/stage/exchange.hpp>
//
#include <algorithm>
#include <array>
#include <catch2/catch_test_macros.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/plan_layouts.hpp>
#include <moeroute/stage/resolve.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/golden.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"

using namespace moeroute;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

template <class T = std::int32_t>
std::vector<T> list_of(const test::golden_json& j) {
  std::vector<T> v;
  if (!j.is_null())
    for (const auto& x : j) v.push_back(x.get<T>());
  return v;
}

template <class T>
std::vector<T> copy_of(std::span<const T> s) {
  return {s.begin(), s.end()};
}

// One rank's part of a case of golden/placement/exchange.json.
struct golden_rank {
  assignment choices;
  std::vector<slot_id> slot;
  exchange_plan plan;
};

placement placement_of(const test::golden_json& in) {
  const std::vector<expert_id> slots = list_of<expert_id>(in["expert_of_slot"]);
  expert_id experts = 0;
  for (const expert_id e : slots) experts = std::max(experts, e + 1);
  return placement::from_slots(experts, in["ranks"].get<index_t>(), slots,
                               list_of(in["node_of_rank"]), list_of<std::uint8_t>(in["alive"]));
}

std::vector<slot_id> resolved(const assignment& a, const placement& p, index_t rank,
                              const resolve_options& how, resolve_counts* counts = nullptr) {
  workspace memory;
  std::vector<slot_id> slot(at(a.choices()));
  const resolve_counts found = resolve(a, p, rank, how, memory, slot);
  if (counts != nullptr) *counts = found;
  return slot;
}

}  // namespace

TEST_CASE("the exchange of hand-made cases is that of the vectors, row by row") {
  const auto file = test::read_golden("placement/exchange.json");
  for (const auto& one : file["cases"]) {
    INFO(one["name"].get<std::string>());
    const auto &in = one["input"], &out = one["output"];
    const placement p = placement_of(in);
    const index_t ranks = p.ranks();
    std::vector<golden_rank> rank(at(ranks));
    workspace memory;
    for (index_t r = 0; r < ranks; ++r) {
      golden_rank& here = rank[at(r)];
      const auto &ids = in["ids"][at(r)], &weights = in["weights"][at(r)];
      here.choices.reset(static_cast<index_t>(ids.size()), p.experts(), 2);
      for (std::size_t t = 0; t < ids.size(); ++t)
        for (std::size_t c = 0; c < 2; ++c) {
          here.choices.ids()[2 * t + c] = ids[t][c].get<expert_id>();
          here.choices.weights()[2 * t + c] = weights[t][c].get<float>();
        }
      here.slot = resolved(here.choices, p, r, {});
      plan_exchange(here.choices, here.slot, p, here.plan);
      std::vector<slot_id> want_slot;
      for (const auto& row : out["slot_of_choice"][at(r)])
        for (const auto& s : row) want_slot.push_back(s.get<slot_id>());
      CHECK(here.slot == want_slot);
      std::vector<std::int32_t> nodes(at(p.nodes()));
      count_node_rows(here.plan, p, memory, nodes);
      CHECK(nodes == list_of(out["rows_to_node"][at(r)]));
      for (index_t d = 0; d < ranks; ++d) {
        CHECK(here.plan.rows_to(d) == out["rows_sent"][at(r)][at(d)].get<index_t>());
        CHECK(here.plan.entries_to(d) == out["entries_sent"][at(r)][at(d)].get<index_t>());
        const auto offset = here.plan.row_offset();
        CHECK(std::vector<slot_id>(here.plan.row_token().begin() + offset[at(d)],
                                   here.plan.row_token().begin() + offset[at(d) + 1]) ==
              list_of(out["tokens_to_rank"][at(r)][at(d)]));
        const auto& entries = out["entries_token_choice_slot"][at(r)][at(d)];
        for (index_t i = 0; i < here.plan.entries_to(d); ++i) {
          const index_t e = here.plan.entry_offset()[at(d)] + i;
          CHECK(here.plan.local_slot()[at(e)] == entries[at(i)][2].get<std::int32_t>());
          const index_t choice =
              entries[at(i)][0].get<index_t>() * 2 + entries[at(i)][1].get<index_t>();
          CHECK(here.plan.outer().slot_of_choice()[at(choice)] == e);
        }
      }
    }
    // Receivers, and the results back home.
    std::vector<std::vector<float>> returned(at(ranks));
    for (index_t s = 0; s < ranks; ++s) returned[at(s)].resize(at(2 * rank[at(s)].plan.entries()));
    for (index_t d = 0; d < ranks; ++d) {
      std::vector<std::int32_t> rows_from, entries_from, row_entries, local_slot;
      std::vector<float> rows;
      for (index_t s = 0; s < ranks; ++s) {
        const exchange_plan& plan = rank[at(s)].plan;
        rows_from.push_back(static_cast<std::int32_t>(plan.rows_to(d)));
        entries_from.push_back(static_cast<std::int32_t>(plan.entries_to(d)));
        for (index_t i = plan.row_offset()[at(d)]; i < plan.row_offset()[at(d) + 1]; ++i) {
          row_entries.push_back(plan.entries_of_row()[at(i)]);
          for (std::size_t j = 0; j < 2; ++j)
            rows.push_back(in["x"][at(s)][at(plan.row_token()[at(i)])][j].get<float>());
        }
        for (index_t i = plan.entry_offset()[at(d)]; i < plan.entry_offset()[at(d) + 1]; ++i)
          local_slot.push_back(plan.local_slot()[at(i)]);
      }
      dispatch_plan inner;
      plan_received({rows_from, entries_from, row_entries, local_slot}, p.slots(d), inner);
      const auto& want = out["received"][at(d)];
      for (index_t s = 0; s < p.slots(d); ++s)
        CHECK(inner.load(s) == want["load_of_slot"][at(s)].get<index_t>());
      std::vector<std::int32_t> order(at(inner.slots()));
      for (index_t i = 0; i < inner.choices(); ++i)
        order[at(inner.slot_of_choice()[at(i)])] = static_cast<std::int32_t>(i);
      CHECK(order == list_of(want["slot_order"]));
      std::vector<float> slots(at(2 * inner.slots()));
      dispatch(matrix_view<const float>(rows.data(), inner.tokens(), 2), inner,
               matrix_view<float>(slots.data(), inner.slots(), 2));
      for (index_t s = 0; s < p.slots(d); ++s)
        for (index_t i = inner.offsets()[at(s)]; i < inner.offsets()[at(s) + 1]; ++i)
          for (index_t j = 0; j < 2; ++j) {
            const auto e = static_cast<float>(p.experts_of_rank(d)[at(s)]);
            slots[at(2 * i + j)] = (e + 1) * slots[at(2 * i + j)] + e;
          }
      std::vector<float> results(at(2 * inner.choices()));
      gather_rows(matrix_view<const float>(slots.data(), inner.slots(), 2), inner.slot_of_choice(),
                  matrix_view<float>(results.data(), inner.choices(), 2));
      auto from = results.begin();
      for (index_t s = 0; s < ranks; ++s) {
        const index_t n = 2 * rank[at(s)].plan.entries_to(d);
        std::copy_n(from, n, returned[at(s)].begin() + 2 * rank[at(s)].plan.entry_offset()[at(d)]);
        from += n;
      }
    }
    for (index_t s = 0; s < ranks; ++s) {
      const golden_rank& here = rank[at(s)];
      std::vector<float> y(at(2 * here.choices.tokens())), want;
      combine(matrix_view<const float>(returned[at(s)].data(), here.plan.entries(), 2),
              here.plan.outer(), here.choices,
              matrix_view<float>(y.data(), here.choices.tokens(), 2));
      for (const auto& row : out["y"][at(s)])
        for (const auto& v : row) want.push_back(v.get<float>());
      CHECK(y == want);
    }
  }
}

TEST_CASE("rules cut an expert's tokens as the vectors say") {
  const auto file = test::read_golden("placement/split.json");
  for (const auto& one : file["cases"]) {
    const auto& in = one["input"];
    INFO(one["name"].get<std::string>());
    if (in["rule"] == "even") {
      const index_t n = in["rows"].get<index_t>(), m = in["replicas"].get<index_t>();
      const placement p = placement::from_slots(1, m, std::vector<expert_id>(at(m), 0));
      assignment a;
      a.reset(n, 1, 1);
      std::fill(a.ids().begin(), a.ids().end(), 0);
      std::vector<std::int32_t> counts(at(m), 0);
      counts[0] = static_cast<std::int32_t>(n);
      const std::vector<slot_id> slot =
          resolved(a, p, 0, {.rule = replica_rule::even, .counts = counts});
      const std::vector<std::int32_t> edges = list_of(one["output"]["boundaries"]);
      for (index_t t = 0; t < n; ++t)
        CHECK((edges[at(slot[at(t)])] <= t && t < edges[at(slot[at(t)]) + 1]));
    } else if (in["rule"] == "nearest") {
      const std::vector<std::int32_t> node = list_of(in["node_of_rank"]);
      const index_t per = in["slots_per_rank"].get<index_t>();
      std::vector<expert_id> slots(node.size() * at(per), no_expert);
      for (const auto& s : in["slots"]) slots[s.get<std::size_t>()] = 0;
      const placement p = placement::from_slots(1, static_cast<index_t>(node.size()), slots, node);
      assignment a;
      a.reset(1, 1, 1);
      a.ids()[0] = 0;
      for (std::size_t r = 0; r < node.size(); ++r)
        CHECK(resolved(a, p, static_cast<index_t>(r), {})[0] ==
              one["output"]["slot_of_source"][r].get<slot_id>());
    }
  }
}

TEST_CASE("tokens are cut where shares round to, and halves go to the slot before") {
  const placement p = placement::from_slots(1, 2, std::vector<expert_id>{0, 0});
  for (const std::int32_t n : {1, 2, 3, 7, 8}) {
    assignment a;
    a.reset(n, 1, 1);
    std::fill(a.ids().begin(), a.ids().end(), 0);
    const std::vector<std::int32_t> counts{n, 0};
    const auto slot = resolved(a, p, 0, {.rule = replica_rule::shares, .counts = counts});
    CHECK(std::count(slot.begin(), slot.end(), 0) == (n + 1) / 2);
  }
}

TEST_CASE("shares that round below 1 leave nobody behind the last slot") {
  const std::vector<std::int32_t> offset{0, 1, 2};
  const std::vector<expert_id> both{0, 0};
  const std::vector<double> share{0.5, 0.4999995};
  const placement p({.experts = 1, .slot_offset = offset, .expert_of_slot = both, .share = share});
  assignment a;
  a.reset(3, 1, 1);
  std::fill(a.ids().begin(), a.ids().end(), 0);
  const std::vector<std::int32_t> counts{0x7fffff00, 3};
  CHECK(resolved(a, p, 1, {.rule = replica_rule::shares, .counts = counts}) ==
        std::vector<slot_id>{1, 1, 1});
}

TEST_CASE("tokens of all ranks are more than 32 bits hold, and are cut where they should be") {
  const placement p = placement::from_slots(1, 4, std::vector<expert_id>{0, 0, 0, no_expert});
  constexpr std::int32_t most = 0x7fffffff;
  assignment a;
  a.reset(5, 1, 1);
  std::fill(a.ids().begin(), a.ids().end(), 0);
  const std::vector<std::int32_t> counts{most, 5, most, most};
  // A third of the tokens is 2^31 and two thirds of one: this rank's first is the one below 2^31.
  CHECK(resolved(a, p, 1, {.rule = replica_rule::even, .counts = counts}) ==
        std::vector<slot_id>{0, 1, 1, 1, 1});
  CHECK(resolved(a, p, 1, {.rule = replica_rule::shares, .counts = counts}) ==
        std::vector<slot_id>{0, 0, 1, 1, 1});
}

TEST_CASE("rules with counts partition each expert's tokens, whatever ranks have") {
  test::random rng(4);
  for (const index_t ranks : {1, 2, 3, 7}) {
    const index_t experts = 5;
    std::vector<expert_id> slots;
    for (index_t s = 0; s < 4 * ranks; ++s)
      slots.push_back(static_cast<expert_id>(s < experts ? s : rng.below(experts + 1) - 1));
    const placement even = placement::from_slots(
        experts, ranks, std::vector<expert_id>(slots.begin(), slots.begin() + 4 * ranks));
    if (!even.lost().empty()) continue;
    // Shares that are not equal, and the ranges that they stand for.
    std::vector<double> share(at(even.slots()), 0.0);
    for (index_t e = 0; e < experts; ++e) {
      double sum = 0.0;
      for (const slot_id s : even.slots_of_expert(e))
        sum += share[at(s)] = 0.1 + double(rng.uniform());
      for (const slot_id s : even.slots_of_expert(e)) share[at(s)] /= sum;
    }
    const placement p({.experts = experts,
                       .slot_offset = even.slot_offset(),
                       .expert_of_slot = even.expert_of_slot(),
                       .share = share});
    std::vector<assignment> a;
    std::vector<std::int32_t> counts(at(ranks * experts));
    for (index_t r = 0; r < ranks; ++r) {
      a.push_back(test::fixed_choices(rng, r == 1 ? 0 : rng.below(40), experts, 2, 5));
      count_choices(a.back(), std::span(counts).subspan(at(r * experts), at(experts)));
    }
    for (const replica_rule rule : {replica_rule::even, replica_rule::shares}) {
      std::vector<std::vector<slot_id>> of(at(experts));  // slots in global order
      for (index_t r = 0; r < ranks; ++r) {
        const std::vector<slot_id> slot =
            resolved(a[at(r)], p, r, {.rule = rule, .counts = counts});
        for (std::size_t c = 0; c < slot.size(); ++c) {
          const expert_id e = a[at(r)].ids()[c];
          CHECK((slot[c] >= 0) == (e >= 0));
          if (e < 0) continue;
          CHECK(p.expert_of_slot()[at(slot[c])] == e);
          of[at(e)].push_back(slot[c]);
        }
      }
      for (index_t e = 0; e < experts; ++e) {
        const auto n = static_cast<index_t>(of[at(e)].size());
        CHECK(std::is_sorted(of[at(e)].begin(), of[at(e)].end()));
        double prefix = 0.0;
        for (index_t j = 0; j < p.replicas(e); ++j) {
          const slot_id s = p.slots_of_expert(e)[at(j)];
          const index_t got = std::count(of[at(e)].begin(), of[at(e)].end(), s);
          const double before = prefix;
          prefix += share[at(s)];
          if (rule == replica_rule::even)
            CHECK(got == n * (j + 1) / p.replicas(e) - n * j / p.replicas(e));
          else
            CHECK(std::abs(double(got) - double(n) * (prefix - before)) <= 1.0 + 1e-9);
        }
      }
      // The same as ranges.
      slot_ranges ranges;
      for (index_t e = 0; e < experts; ++e) {
        ranges.first.push_back(static_cast<std::int32_t>(ranges.range.size()));
        for (std::size_t i = 0; i < of[at(e)].size(); ++i) {
          if (i == 0 || of[at(e)][i] != of[at(e)][i - 1])
            ranges.range.push_back(
                {of[at(e)][i], static_cast<std::int64_t>(i), static_cast<std::int64_t>(i)});
          ++ranges.range.back().end;
        }
      }
      ranges.first.push_back(static_cast<std::int32_t>(ranges.range.size()));
      for (index_t r = 0; r < ranks; ++r)
        CHECK(resolved(a[at(r)], p, r, {.rule = rule, .counts = counts}) ==
              resolved(a[at(r)], p, r,
                       {.rule = replica_rule::ranges,
                        .counts = counts,
                        .range_first = ranges.first,
                        .range = ranges.range}));
    }
  }
}

TEST_CASE("a choice that was dropped goes nowhere, and no rule counts it") {
  assignment a;
  a.reset(3, 2, 1);
  std::fill(a.ids().begin(), a.ids().end(), 0);
  std::fill(a.weights().begin(), a.weights().end(), 1.0f);
  a.kept_to_change()[1] = 0;
  const placement p = placement::from_slots(2, 2, std::vector<expert_id>{0, 1, 0, 1});
  std::vector<std::int32_t> counts(4);
  count_choices(a, std::span<std::int32_t>(counts).first(2));
  CHECK(counts == std::vector<std::int32_t>{2, 0, 0, 0});
  for (const replica_rule rule :
       {replica_rule::nearest, replica_rule::round_robin, replica_rule::even}) {
    resolve_counts found;
    const slot_id last = rule == replica_rule::nearest ? 0 : 2;
    CHECK(resolved(a, p, 0, {.rule = rule, .counts = counts}, &found) ==
          std::vector<slot_id>{0, no_slot, last});
    CHECK(found.kept == 2);
    CHECK(found.lost == 0);
  }
}

TEST_CASE("what takes no part goes where a choice without an expert goes, under every rule") {
  test::random rng(8);
  constexpr index_t experts = 6, ranks = 2, tokens = 21;
  const placement p =
      placement::from_slots(experts, ranks, std::vector<expert_id>{0, 1, 2, 3, 4, 5, 0, 1, 2, 3});
  const std::vector<std::uint8_t> five{1, 1, 0, 1, 1, 0};
  for (const bool ragged : {false, true})
    for (int bits = 0; bits < 8; ++bits)
      for (const index_t rank : {0, 1}) {
        INFO(ragged << " " << bits << " " << rank);
        assignment a = ragged ? test::ragged_choices(rng, tokens, experts, 3)
                              : test::fixed_choices(rng, tokens, experts, 3, 6);
        if ((bits & 1) != 0) test::drop_some(rng, a, 4);
        std::vector<std::uint8_t> mask, owned;
        for (index_t t = 0; (bits & 2) != 0 && t < tokens; ++t)
          mask.push_back(static_cast<std::uint8_t>(2 * rng.below(3)));
        if ((bits & 4) != 0) owned = five;
        // The same without what takes no part.
        assignment b = a;
        index_t parts = 0;
        for (index_t t = 0; t < tokens; ++t)
          for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
            expert_id& e = b.ids()[at(c)];
            if (e >= 0 &&
                ((!mask.empty() && mask[at(t)] == 0) || (!owned.empty() && owned[at(e)] == 0)))
              e = no_expert;
            parts += e >= 0 && b.kept(c);
          }
        std::vector<std::int32_t> counts(at(ranks * experts), 3), alone(at(experts));
        const auto own = std::span(counts).subspan(at(rank * experts), at(experts));
        count_choices(a, own, owned, mask);
        count_choices(b, std::span(alone));
        CHECK(std::equal(own.begin(), own.end(), alone.begin()));
        for (const replica_rule rule : {replica_rule::nearest, replica_rule::round_robin,
                                        replica_rule::even, replica_rule::shares}) {
          resolve_counts found, same;
          const std::vector<slot_id> slot = resolved(
              a, p, rank, {.rule = rule, .counts = counts, .owned = owned, .mask = mask}, &found);
          CHECK(slot == resolved(b, p, rank, {.rule = rule, .counts = counts}, &same));
          CHECK(found.kept == parts);
          CHECK((same.kept == parts && found.lost == 0));
          for (index_t c = 0; c < a.choices(); ++c)
            CHECK((slot[at(c)] != no_slot) == (b.ids()[at(c)] >= 0 && b.kept(c)));
        }
      }
  // Who is not of the ranks is not lost, though it has no slot.
  const placement without = placement::from_slots(experts, 1, std::vector<expert_id>{0, 1, 3, 4});
  assignment a = test::fixed_choices(rng, 8, experts, 2);
  for (const replica_rule rule :
       {replica_rule::only, replica_rule::nearest, replica_rule::round_robin}) {
    resolve_counts found;
    resolved(a, without, 0, {.rule = rule, .owned = five}, &found);
    CHECK(found.lost == 0);
  }
  const std::vector<std::uint8_t> few(5, 1);
  std::vector<std::int32_t> counts(6), five_counts(5);
  const test::refusals refused{
      {[&] { resolved(a, p, 0, {.owned = few}); }, "resolve: owned.size() is 5, expected 6"},
      {[&] { resolved(a, p, 0, {.mask = few}); }, "resolve: mask.size() is 5, expected 8"},
      {[&] { count_choices(a, std::span(counts), few); },
       "count_choices: owned.size() is 5, expected 6"},
      {[&] { count_choices(a, std::span(counts), {}, few); },
       "count_choices: mask.size() is 5, expected 8"},
      {[&] { count_choices(a, std::span(five_counts)); },
       "count_choices: counts.size() is 5, expected 6"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
}

TEST_CASE("rows are those of sets: entries >= rows >= rows per node") {
  test::random rng(6);
  for (int draw = 0; draw < 40; ++draw) {
    const index_t ranks = 1 + rng.below(9), experts = 1 + rng.below(20), k = 1 + rng.below(experts);
    const assignment a = draw % 3 == 0 ? test::ragged_choices(rng, rng.below(30), experts, k)
                                       : test::fixed_choices(rng, rng.below(30), experts, k, 6);
    std::vector<std::int32_t> node;
    for (index_t r = 0; r < ranks; ++r)
      node.push_back(static_cast<std::int32_t>(r % std::min<index_t>(ranks, 3)));
    const placement flat = placement::contiguous(experts, ranks);
    const placement p({.experts = experts,
                       .slot_offset = flat.slot_offset(),
                       .expert_of_slot = flat.expert_of_slot(),
                       .node_of_rank = node});
    const std::vector<slot_id> slot = resolved(a, p, 0, {.rule = replica_rule::only});
    exchange_plan plan;
    plan_exchange(a, slot, p, plan);
    std::set<std::pair<index_t, index_t>> rows, node_rows;
    std::vector<index_t> entries(at(ranks), 0);
    const std::vector<std::int32_t> token = test::tokens_of(a);
    for (std::size_t c = 0; c < slot.size(); ++c) {
      if (slot[c] < 0) continue;
      const index_t r = p.rank_of_slot()[at(slot[c])];
      ++entries[at(r)];
      rows.insert({r, token[c]});
      node_rows.insert({node[at(r)], token[c]});
    }
    std::vector<std::pair<index_t, index_t>> got;
    for (index_t r = 0; r < ranks; ++r) {
      CHECK(plan.entries_to(r) == entries[at(r)]);
      CHECK(plan.entries_to(r) >= plan.rows_to(r));
      for (index_t i = plan.row_offset()[at(r)]; i < plan.row_offset()[at(r) + 1]; ++i)
        got.push_back({r, plan.row_token()[at(i)]});
    }
    CHECK(got == std::vector(rows.begin(), rows.end()));
    std::vector<std::int32_t> to_node(at(p.nodes()), 7);
    workspace memory;
    count_node_rows(plan, p, memory, to_node);
    std::vector<std::int32_t> of_node(to_node.size(), 0);
    for (const auto& row : node_rows) ++of_node[at(row.first)];
    CHECK(to_node == of_node);
    if (experts % ranks == 0) {
      std::vector<std::int32_t> per_expert(at(experts)), per_rank(at(ranks));
      std::vector<std::uint8_t> in_rank(at(a.tokens() * ranks));
      export_once_counts(
          a,
          {.tokens_per_expert = per_expert, .tokens_per_rank = per_rank, .token_in_rank = in_rank});
      for (index_t r = 0; r < ranks; ++r) CHECK(per_rank[at(r)] == plan.rows_to(r));
    }
  }
}

TEST_CASE("a placement says what is lost, what is twice, and who it is") {
  const placement p = placement::from_slots(4, 2, std::vector<expert_id>{0, 0, 3, 1, 3, -1});
  CHECK(p.lost() == std::vector<expert_id>{2});
  CHECK(p.duplicates() == std::vector<slot_id>{1});
  CHECK(copy_of(p.slots_of_expert(3)) == std::vector<slot_id>{2, 4});
  CHECK(copy_of(p.experts_of_rank(1)) == std::vector<expert_id>{1, 3, -1});
  CHECK(test::refusal([&] { p.check_hosted("adopt"); }) ==
        "moeroute::adopt: 1 experts have no live slot: 2");
  CHECK(p.hash() == placement(p).hash());
  std::vector<expert_id> changed{0, 0, 3, 1, 3, 2};
  CHECK(placement::from_slots(4, 2, changed).hash() != p.hash());
  const std::vector<std::uint8_t> alive{1, 0};
  CHECK(placement::from_slots(4, 2, std::vector<expert_id>{0, 0, 3, 1, 3, -1}, {}, alive).hash() !=
        p.hash());
  // Of a rank without experts too: nothing else tells it.
  const std::vector<expert_id> first_rank_only{0, 1, -1, -1};
  CHECK(placement::from_slots(2, 2, first_rank_only, {}, alive).hash() !=
        placement::from_slots(2, 2, first_rank_only).hash());
  const std::vector<std::int32_t> node{0, 1};
  CHECK(placement::from_slots(4, 2, std::vector<expert_id>{0, 0, 3, 1, 3, -1}, node).hash() !=
        p.hash());
  const std::vector<double> share{0.25, 0.75, 0.5, 1, 0.5, 0};
  CHECK(placement({.experts = 4,
                   .slot_offset = p.slot_offset(),
                   .expert_of_slot = p.expert_of_slot(),
                   .share = share})
            .hash() != p.hash());
  for (const auto& [experts, ranks] :
       {std::pair<index_t, index_t>{5, 3}, {3, 7}, {64, 64}, {1, 1}, {13, 4}})
    for (const placement& q :
         {placement::contiguous(experts, ranks), placement::round_robin(experts, ranks)}) {
      CHECK(q.lost().empty());
      CHECK(q.slots() == experts);
      for (index_t s = 0; s < q.slots(); ++s)
        CHECK(q.slots_of_expert(q.expert_of_slot()[at(s)])[0] == s);
      for (index_t r = 0; r < ranks; ++r) CHECK(q.slots(r) <= experts / ranks + 1);
    }
  const eplb_arrays e =
      export_eplb_arrays(placement::from_slots(2, 3, std::vector<expert_id>{1, 0, 1}));
  CHECK(e.log2phy == std::vector<slot_id>{1, -1, 0, 2});
  CHECK(e.logcnt == std::vector<std::int32_t>{1, 2});
}

TEST_CASE("every field of a placement is refused by name") {
  const std::vector<std::int32_t> offset{0, 2, 3};
  const std::vector<expert_id> slots{0, 1, 0};
  const placement_fields good{.experts = 2, .slot_offset = offset, .expert_of_slot = slots};
  const auto said = [&](auto&& change) {
    placement_fields f = good;
    change(f);
    return test::refusal([&] { placement p(f); });
  };
  CHECK(said([](placement_fields&) {}) == "accepted");
  CHECK(said([](placement_fields& f) { f.experts = 0; }) ==
        "moeroute::placement: experts is 0, expected 1 to 1048576");
  CHECK(said([](placement_fields& f) { f.slot_offset = {}; }) ==
        "moeroute::placement: ranks is -1, expected 1 to 1048576");
  const std::vector<std::int32_t> late{1, 2, 3}, fall{0, 4, 3}, past{0, 2, 4}, gap{0, 2},
      negative{-1, 0}, few{0};
  CHECK(said([&](placement_fields& f) { f.slot_offset = late; }) ==
        "moeroute::placement: slot_offset[0] is 1, expected 0");
  CHECK(said([&](placement_fields& f) { f.slot_offset = past; }) ==
        "moeroute::placement: slot_offset[R] is 4, expected 3");
  CHECK(said([&](placement_fields& f) { f.slot_offset = fall; }) ==
        "moeroute::placement: slot_offset falls behind rank 1, expected to ascend");
  const std::vector<expert_id> wild{0, 2, 0}, low{0, -2, 0};
  CHECK(said([&](placement_fields& f) { f.expert_of_slot = wild; }) ==
        "moeroute::placement: the expert of slot 1 is 2, expected -1 to 1");
  CHECK(said([&](placement_fields& f) { f.expert_of_slot = low; }) ==
        "moeroute::placement: the expert of slot 1 is -2, expected -1 to 1");
  CHECK(said([&](placement_fields& f) { f.node_of_rank = few; }) ==
        "moeroute::placement: node_of_rank.size() is 1, expected 2");
  CHECK(said([&](placement_fields& f) { f.node_of_rank = gap; }) ==
        "moeroute::placement: node_of_rank is 2, expected 0 to 1");
  CHECK(said([&](placement_fields& f) { f.node_of_rank = negative; }) ==
        "moeroute::placement: node_of_rank is -1, expected 0 to 1");
  const std::vector<std::int32_t> ones{1, 1};
  CHECK(said([&](placement_fields& f) { f.node_of_rank = ones; }) ==
        "moeroute::placement: node 0 has no rank, expected numbers without a gap");
  const std::vector<std::uint8_t> two{1, 2}, short_alive{1};
  CHECK(said([&](placement_fields& f) { f.alive = two; }) ==
        "moeroute::placement: alive is 2, expected 0 to 1");
  CHECK(said([&](placement_fields& f) { f.alive = short_alive; }) ==
        "moeroute::placement: alive.size() is 1, expected 2");
  const std::vector<double> below{-1, 1, 2}, nan{0.5, 1, std::nan("")}, sum{0.5, 1, 0.6}, size{1};
  CHECK(said([&](placement_fields& f) { f.share = below; }) ==
        "moeroute::placement: share is -1.000000, expected 0 to 1");
  CHECK(said([&](placement_fields& f) { f.share = nan; }) ==
        "moeroute::placement: share is nan, expected 0 to 1");
  CHECK(said([&](placement_fields& f) { f.share = sum; }) ==
        "moeroute::placement: the shares of expert 0 sum to 1.100000, expected 1");
  CHECK(said([&](placement_fields& f) { f.share = size; }) ==
        "moeroute::placement: share.size() is 1, expected 3");
  CHECK(test::refusal([&] { placement::from_slots(2, 2, slots); }) ==
        "moeroute::placement: 3 slots on 2 ranks, expected a multiple of the ranks");
  CHECK(test::refusal([&] { placement::contiguous(4, 0); }) ==
        "moeroute::placement: ranks is 0, expected 1 to 1048576");
}

TEST_CASE("counts, ranges and messages of others are checked before they index anything") {
  test::random rng(2);
  const assignment a = test::fixed_choices(rng, 6, 3, 1);
  const placement p = placement::from_slots(3, 2, std::vector<expert_id>{0, 1, 2, 0});
  const auto said = [&](const resolve_options& o, index_t rank = 0) {
    return test::refusal([&] { resolved(a, p, rank, o); });
  };
  std::vector<std::int32_t> counts(6, 0);
  count_choices(a, std::span(counts).first(3));
  CHECK(said({.rule = replica_rule::even, .counts = counts}) == "accepted");
  CHECK(said({.rule = replica_rule::even}) == "moeroute::resolve: counts.size() is 0, expected 6");
  CHECK(said({.rule = replica_rule::only}) ==
        "moeroute::resolve: expert 0 has 2 live slots, expected one where the rule is only");
  CHECK(said({}, 2) == "moeroute::resolve: rank is 2, expected 0 to 1");
  for (std::size_t e = 0; e < 3; ++e)
    for (const std::int32_t by : {-1, 1}) {
      std::vector<std::int32_t> wrong = counts;
      wrong[e] += by;
      CHECK(said({.rule = replica_rule::even, .counts = wrong}) ==
            "moeroute::resolve: the counts of rank 0 for expert " + std::to_string(e) +
                " are not those of its choices");
      // A token that is not counted is behind all ranges.
      if (by > 0 || wrong[e] < 0) continue;
      const std::vector<slot_range> all{{0, 0, wrong[0]}, {1, 0, wrong[1]}, {2, 0, wrong[2]}};
      const std::vector<std::int32_t> begins{0, 1, 2, 3};
      CHECK(said({.rule = replica_rule::ranges,
                  .counts = wrong,
                  .range_first = begins,
                  .range = all}) == "moeroute::resolve: the counts of rank 0 for expert " +
                                        std::to_string(e) + " are not those of its choices");
    }
  std::vector<std::int32_t> negative = counts;
  for (const std::int32_t below : {-1, -3}) {
    negative[4] = below;
    CHECK(said({.rule = replica_rule::shares, .counts = negative}) ==
          "moeroute::resolve: counts is " + std::to_string(below) + ", expected >= 0");
  }
  {
    // Who is behind all that this rank counted is refused where it stands, whoever has tokens.
    assignment two;
    two.reset(2, 2, 1);
    two.ids()[0] = 1;
    two.ids()[1] = 0;
    const std::vector<std::int32_t> others{0, 0, 5, 5};
    const placement each = placement::from_slots(2, 2, std::vector<expert_id>{0, 1});
    CHECK(test::refusal(
              [&] { resolved(two, each, 0, {.rule = replica_rule::even, .counts = others}); }) ==
          "moeroute::resolve: the counts of rank 0 for expert 1 are not those of its choices");
    two.ids()[1] = 7;
    CHECK(test::refusal([&] { resolved(two, each, 0, {}); }) ==
          "moeroute::resolve: the id of choice 1 is 7, expected -1 to 1");
  }
  const std::vector<std::int32_t> first{0, 1, 2, 3};
  const auto ranges = [&](slot_range changed) {
    std::vector<slot_range> r{{0, 0, counts[0]}, {1, 0, counts[1]}, {2, 0, counts[2]}};
    r[1] = changed;
    return said({.rule = replica_rule::ranges, .counts = counts, .range_first = first, .range = r});
  };
  CHECK(ranges({1, 0, counts[1]}) == "accepted");
  CHECK(ranges({0, 0, counts[1]}) ==
        "moeroute::resolve: a range of expert 1 names slot 0, expected a live slot of that expert");
  CHECK(ranges({7, 0, counts[1]}) ==
        "moeroute::resolve: a range of expert 1 names slot 7, expected a live slot of that expert");
  for (const slot_id wrong : {-1, 4})
    CHECK(ranges({wrong, 0, counts[1]}) == "moeroute::resolve: a range of expert 1 names slot " +
                                               std::to_string(wrong) +
                                               ", expected a live slot of that expert");
  CHECK(ranges({1, 0, -1}) ==
        "moeroute::resolve: the ranges of expert 1 go from 0 to -1, expected to begin at 0");
  {
    // Who has tokens and a slot has a range; who is lost has none.
    const std::vector<std::int32_t> none_of_2{0, 1, 2, 2};
    const std::vector<slot_range> two{{0, 0, counts[0]}, {1, 0, counts[1]}};
    const resolve_options o{.rule = replica_rule::ranges,
                            .lost = lost_expert::drop,
                            .counts = counts,
                            .range_first = none_of_2,
                            .range = two};
    CHECK(said(o) == "moeroute::resolve: the ranges of expert 2 end at 0, expected " +
                         std::to_string(counts[2]));
    const placement without = placement::from_slots(3, 2, std::vector<expert_id>{0, 1, -1, 0});
    resolve_counts found_here;
    resolved(a, without, 0, o, &found_here);
    CHECK((found_here.lost == counts[2] && found_here.kept == 6 - counts[2]));
  }
  CHECK(ranges({1, 1, counts[1]}) == "moeroute::resolve: the ranges of expert 1 go from 1 to " +
                                         std::to_string(counts[1]) + ", expected to begin at 0");
  CHECK(ranges({1, 0, counts[1] + 1}) == "moeroute::resolve: the ranges of expert 1 end at " +
                                             std::to_string(counts[1] + 1) + ", expected " +
                                             std::to_string(counts[1]));
  const placement half = placement::from_slots(3, 2, std::vector<expert_id>{0, 1, 2, 0}, {},
                                               std::vector<std::uint8_t>{1, 0});
  const std::vector<slot_range> dead{{3, 0, counts[0]}, {1, 0, counts[1]}, {2, 0, counts[2]}};
  CHECK(
      test::refusal([&] {
        resolved(
            a, half, 0,
            {.rule = replica_rule::ranges, .counts = counts, .range_first = first, .range = dead});
      }) ==
      "moeroute::resolve: a range of expert 0 names slot 3, expected a live slot of that expert");
  resolve_counts found;
  const placement lost = placement::from_slots(3, 2, std::vector<expert_id>{0, 1});
  CHECK(test::refusal([&] { resolved(a, lost, 0, {}); }) ==
        "moeroute::resolve: choice " +
            std::to_string(std::find(a.ids().begin(), a.ids().end(), 2) - a.ids().begin()) +
            " is of expert 2, which has no live slot");
  const std::vector<slot_id> slot = resolved(a, lost, 0, {.lost = lost_expert::drop}, &found);
  CHECK(found.lost == counts[2]);
  CHECK(found.kept + found.lost == 6);
  CHECK(std::count(slot.begin(), slot.end(), no_slot) == counts[2]);

  exchange_plan plan;
  plan_exchange(a, resolved(a, p, 0, {}), p, plan);
  REQUIRE(plan.rows() > 0);
  const std::vector<slot_id> wild(6, 4);
  CHECK(test::refusal([&] { plan_exchange(a, wild, p, plan); }) ==
        "moeroute::plan_exchange: slot is 4, expected -1 to 3");
  CHECK((plan.rows() == 0 && plan.tokens() == 0 && plan.ranks() == 0));
  const std::vector<std::int32_t> rows{1, 1}, entries{2, 1}, of_row{2, 1}, local{0, 1, 0};
  dispatch_plan inner;
  const auto got = [&](received_entries g, index_t slots = 2) {
    return test::refusal([&] { plan_received(g, slots, inner); });
  };
  CHECK(got({rows, entries, of_row, local}) == "accepted");
  CHECK((inner.k() == 2 && inner.slots() == 3));
  CHECK(got({rows, entries, of_row, local}, 1) ==
        "moeroute::plan_received: local_slot is 1, expected 0 to 0");
  CHECK((inner.slots() == 0 && inner.tokens() == 0));
  const std::vector<std::int32_t> bad_rows{1, 2}, bad_entries{1, 2}, zero{0, 3}, minus{-1, 3},
      below{0, -1, 0}, twice{1, 1}, swap{1, 0};
  CHECK(got({bad_rows, entries, of_row, local}) ==
        "moeroute::plan_received: rows_from is 2, expected 0 to 1");
  CHECK(got({rows, bad_entries, of_row, local}) ==
        "moeroute::plan_received: entries_from is 1, expected 2");
  CHECK(got({rows, entries, zero, local}) ==
        "moeroute::plan_received: entries_of_row is 0, expected 1 to 3");
  CHECK(got({rows, entries, minus, local}) ==
        "moeroute::plan_received: entries_of_row is -1, expected 1 to 3");
  CHECK(got({rows, entries, of_row, below}) ==
        "moeroute::plan_received: local_slot is -1, expected 0 to 1");
  CHECK(got({rows, entries, of_row, local, twice}) ==
        "moeroute::plan_received: order names row 1 twice");
  CHECK(inner.slots() == 0);  // what is refused is no plan
  CHECK(got({rows, entries, of_row, local, swap}) == "accepted");
  CHECK(inner.token_of_slot()[0] == 1);  // row 1 comes first in slot 0
  CHECK(inner.token_of_slot()[1] == 0);
  assignment own = a;
  CHECK(test::refusal([&] { copy_tokens(own, 0, 2, own); }) ==
        "moeroute::copy_tokens: out is all, expected an assignment of its own");

  std::vector<std::int32_t> two(2), one(1), falls{0, 2, 1, 3}, late{1, 1, 2, 3}, short_first{0, 1};
  std::vector<slot_id> slots(6), five(5);
  std::vector<float> weights(6), weights_of_entries(6);
  workspace memory;
  const auto by_ranges = [&](const std::vector<std::int32_t>& begins, std::size_t n = 3) {
    return [&, n] {
      const std::vector<slot_range> r(n, {0, 0, counts[0]});
      resolved(a, p, 0,
               {.rule = replica_rule::ranges, .counts = counts, .range_first = begins, .range = r});
    };
  };
  resolve(a, p, 0, {}, memory, slots);
  plan_exchange(a, slots, p, plan);
  for (std::size_t c = 0; c < 6; ++c) weights[c] = static_cast<float>(c + 1);
  gather_entry_weights(plan, weights, weights_of_entries);
  for (std::size_t c = 0; c < 6; ++c)
    CHECK(weights_of_entries[at(plan.outer().slot_of_choice()[c])] == weights[c]);
  const placement single = placement::from_slots(3, 1, std::vector<expert_id>{0, 1, 2});
  std::vector<float> x(12), y(12);
  const std::vector<slot_id> index{1, 0};
  const auto gathered = [&](matrix_view<float> from, matrix_view<float> to) {
    return [&, from, to] { gather_rows(from, index, to); };
  };
  const std::vector<slot_id> before_all(6, -2);
  assignment falling = test::ragged_choices(rng, 6, 3, 1);
  falling.to_fill().offsets[6] = 99;
  const std::string not_there = ": token 5 has the choices from " +
                                std::to_string(falling.offsets()[5]) +
                                " to 99, expected 0 to k = 1 of them, from 0 on";
  // An order that names a row too much meets no slot that is taken there.
  inner.reset(9, 2, 1);
  std::fill_n(inner.writable().slot_of_choice, 9, no_slot);
  CHECK(got({rows, entries, of_row, local, entries}) ==
        "moeroute::plan_received: order is 2, expected 0 to 1");
  // What is too long is not read.
  constexpr std::size_t beyond = 0x80000000u;
  const placement wider = placement::from_slots(4, 1, std::vector<expert_id>{0, 1, 2, 3});
  const std::vector<std::int32_t> three{2, 1, 0}, four_entries{2, 1, 1, 1}, one_row{2}, all_rows{3};
  const test::refusals refused{
      {by_ranges(short_first), "resolve: range_first.size() is 2, expected 4"},
      {by_ranges(late), "resolve: range_first[0] is 1, expected 0"},
      {by_ranges(falls), "resolve: range_first falls behind expert 1, expected to ascend"},
      {by_ranges(first, 2), "resolve: range.size() is 2, expected 3"},
      {[&] { resolve(a, p, 0, {}, memory, five); }, "resolve: slot.size() is 5, expected 6"},
      {[&] { count_node_rows(plan, p, memory, two); },
       "count_node_rows: rows_to_node.size() is 2, expected 1"},
      {[&] { count_node_rows(plan, single, memory, one); },
       "count_node_rows: plan.ranks() is 2, expected 1"},
      {gathered({x.data(), 3, 4, 4}, {y.data(), 3, 4, 4}),
       "gather_rows: to.rows() is 3, expected 2"},
      {gathered({x.data(), 3, 4, 4}, {y.data(), 2, 3, 4}),
       "gather_rows: to.cols() is 3, expected 4"},
      {gathered({x.data(), 3, 4, 3}, {y.data(), 2, 4, 4}),
       "gather_rows: from.stride is 3, expected at least 4"},
      {gathered({x.data(), 3, 4, 4}, {y.data(), 2, 4, 3}),
       "gather_rows: to.stride is 3, expected at least 4"},
      {gathered({x.data(), 3, 4, 4}, {x.data() + 4, 2, 4, 4}),
       "gather_rows: from and to overlap, expected memory of their own"},
      {[&] { resolved(a, wider, 0, {}); }, "resolve: choices.experts() is 3, expected 4"},
      {[&] { resolved(a, p, -1, {}); }, "resolve: rank is -1, expected 0 to 1"},
      {[&] { plan_received({rows, entries, {of_row.data(), beyond}, local}, 2, inner); },
       "plan_received: rows is 2147483648, expected 0 to 2147483647"},
      {[&] { plan_received({rows, entries, of_row, {local.data(), beyond}}, 2, inner); },
       "plan_received: entries is 2147483648, expected 0 to 2147483647"},
      {[&] { plan_received({rows, entries, of_row, {local.data(), beyond - 1}}, 2, inner); },
       "plan_received: local_slot.size() is 2147483647, expected 3"},
      {[&] { plan_received({minus, entries, of_row, local}, 2, inner); },
       "plan_received: rows_from is -1, expected 0 to 2"},
      {[&] { plan_received({rows, entries, of_row, local, minus}, 2, inner); },
       "plan_received: order is -1, expected 0 to 1"},
      {[&] { copy_tokens(a, -1, 0, own); }, "copy_tokens: first is -1, expected 0 to 6"},
      {[&] { copy_tokens(a, 4, -1, own); }, "copy_tokens: count is -1, expected 0 to 2"},
      {[&] { copy_tokens(a, 7, 0, own); }, "copy_tokens: first is 7, expected 0 to 6"},
      {[&] { copy_tokens(a, 4, 3, own); }, "copy_tokens: count is 3, expected 0 to 2"},
      {[&] { gather_entry_weights(plan, std::span<const float>(weights).first(5), weights); },
       "gather_entry_weights: weights.size() is 5, expected 6"},
      {[&] { gather_entry_weights(plan, weights, std::span<float>(weights_of_entries).first(5)); },
       "gather_entry_weights: entry_weight.size() is 5, expected 6"},
      {[&] { plan_received({rows, three, of_row, local}, 2, inner); },
       "plan_received: entries_from.size() is 3, expected 2"},
      {[&] { plan_received({rows, entries, one_row, local}, 2, inner); },
       "plan_received: rows_from is 1, expected 0 to 0"},
      {[&] { plan_received({all_rows, all_rows, four_entries, local}, 2, inner); },
       "plan_received: entries_of_row is 1, expected 1 to 0"},
      {[&] {
         plan_received({std::span(rows).first(1), std::span(entries).first(1), of_row, local}, 2,
                       inner);
       },
       "plan_received: entries_of_row.size() is 2, expected 1"},
      {[&] {
         plan_received({std::span(rows).first(1), std::span(entries).first(1),
                        std::span(of_row).first(1), local},
                       2, inner);
       },
       "plan_received: local_slot.size() is 3, expected 2"},
      {[&] { plan_received({rows, entries, of_row, local, one_row}, 2, inner); },
       "plan_received: order.size() is 1, expected 2"},
      {[&] { plan_received({rows, entries, of_row, local, entries}, 2, inner); },
       "plan_received: order is 2, expected 0 to 1"},
      {[&] { plan_exchange(falling, wild, p, plan); }, "plan_exchange" + not_there},
      {[&] { copy_tokens(falling, 0, 1, own); }, "copy_tokens" + not_there},
      {[&] { plan_exchange(a, five, p, plan); }, "plan_exchange: slot.size() is 5, expected 6"},
      {[&] { plan_exchange(a, before_all, p, plan); },
       "plan_exchange: slot is -2, expected -1 to 3"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  // Rows from where they lie to where they belong, each with a stride of its own.
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  gather_rows(matrix_view<const float>(x.data(), 3, 2, 4), index,
              matrix_view<float>(y.data(), 2, 2, 3));
  CHECK((y[0] == 4.0f && y[1] == 5.0f && y[3] == 0.0f && y[4] == 1.0f));
  std::vector<bfloat16> y16(12);
  gather_rows(matrix_view<const float>(x.data(), 3, 2, 4), index,
              matrix_view<bfloat16>(y16.data(), 2, 2, 3));
  for (std::size_t i = 0; i < 6; ++i) CHECK(static_cast<float>(y16[i]) == y[i]);
}

TEST_CASE("tokens that are copied keep their choices, weights and drops") {
  test::random rng(31);
  for (const bool ragged : {false, true}) {
    assignment all =
        ragged ? test::ragged_choices(rng, 17, 6, 3) : test::fixed_choices(rng, 17, 6, 3, 5);
    const std::span<std::uint8_t> kept = all.kept_to_change();
    for (std::size_t c = 0; c < kept.size(); ++c) kept[c] = c * c % 7 < 3;
    for (const index_t first : {0, 5, 17})
      for (const index_t n : {0, 1, 12}) {
        if (first + n > 17) continue;
        assignment part;
        copy_tokens(all, first, n, part);
        REQUIRE(part.tokens() == n);
        const index_t begin = all.first(first);
        REQUIRE(part.choices() == all.first(first + n) - begin);
        for (index_t t = 0; t < n; ++t) CHECK(part.count(t) == all.count(first + t));
        for (index_t c = 0; c < part.choices(); ++c) {
          CHECK(part.ids()[at(c)] == all.ids()[at(begin + c)]);
          CHECK(part.weights()[at(c)] == all.weights()[at(begin + c)]);
          CHECK(part.kept(c) == all.kept(begin + c));
        }
      }
  }
}

TEST_CASE("a warm exchange allocates nothing") {
  test::random rng(5);
  const placement p = placement::contiguous(16, 4);
  const assignment a = test::fixed_choices(rng, 50, 16, 4);
  std::vector<slot_id> slot(200);
  std::vector<std::int32_t> counts(64);
  count_choices(a, std::span(counts).first(16));
  workspace memory;
  exchange_plan plan;
  dispatch_plan inner;
  const auto run = [&] {
    resolve(a, p, 0, {.rule = replica_rule::even, .counts = counts}, memory, slot);
    plan_exchange(a, slot, p, plan);
    // All to itself, as if it were rank 1.
    const index_t first = plan.row_offset()[1], last = plan.row_offset()[2];
    const index_t entry = plan.entry_offset()[1];
    const std::array<std::int32_t, 1> rows{static_cast<std::int32_t>(last - first)},
        entries{static_cast<std::int32_t>(plan.entries_to(1))};
    plan_received({rows, entries, plan.entries_of_row().subspan(at(first), at(last - first)),
                   plan.local_slot().subspan(at(entry), at(entries[0]))},
                  p.slots(1), inner);
  };
  run();
  CHECK(test::allocations_during(run) == 0);
}

TEST_CASE("with dead ranks, nodes and drops at once every choice goes where its rule's words say") {
  test::random rng(101);
  exchange_plan out;
  dispatch_plan home;
  for (index_t round = 0; round < test::sized(250, 80); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t ranks = 1 + rng.below(6), experts = 1 + rng.below(7), each = 1 + rng.below(4);
    std::vector<expert_id> expert_of;
    for (index_t s = 0; s < ranks * each; ++s)
      expert_of.push_back(static_cast<expert_id>(rng.below(experts + 1) - 1));
    std::vector<std::int32_t> node;
    std::vector<std::uint8_t> alive;
    for (index_t r = 0; r < ranks; ++r) {
      node.push_back(static_cast<std::int32_t>(r / 2));
      alive.push_back(rng.below(4) != 0);
    }
    const placement p = placement::from_slots(experts, ranks, expert_of, node, alive);
    std::vector<std::uint8_t> owned, mask;
    std::vector<assignment> all;
    std::vector<std::vector<std::uint8_t>> masks;
    for (index_t e = 0; e < experts; ++e) owned.push_back(rng.below(5) != 0 ? 2 : 0);
    const bool some_owned = coin(), masked = coin();
    std::vector<std::int32_t> counts;
    // Who takes part, rank after rank: {choice, expert}.
    std::vector<std::vector<std::pair<index_t, expert_id>>> part(at(ranks));
    for (index_t r = 0; r < ranks; ++r) {
      const index_t tokens = rng.below(20), k = 1 + rng.below(std::min<index_t>(experts, 3));
      assignment a = coin() ? test::ragged_choices(rng, tokens, experts, k)
                            : test::fixed_choices(rng, tokens, experts, k, 5);
      if (coin()) test::drop_some(rng, a, 4);
      mask.clear();
      for (index_t t = 0; t < tokens; ++t)
        mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      std::vector<std::int32_t> row(at(experts), 0);
      for (index_t t = 0; t < tokens; ++t)
        for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
          const expert_id e = a.ids()[at(c)];
          if (e < 0 || !a.kept(c) || (masked && mask[at(t)] == 0) ||
              (some_owned && owned[at(e)] == 0))
            continue;
          part[at(r)].push_back({c, e});
          ++row[at(e)];
        }
      counts.insert(counts.end(), row.begin(), row.end());
      all.push_back(a);
      masks.push_back(mask);
    }
    // Live slots of an expert for which f holds, in order.
    const auto live = [&](expert_id e, const auto& f) {
      std::vector<slot_id> slots;
      for (index_t s = 0; s < ranks * each; ++s)
        if (expert_of[at(s)] == e && alive[at(s / each)] != 0 && f(s / each))
          slots.push_back(static_cast<slot_id>(s));
      return slots;
    };
    for (const replica_rule rule :
         {replica_rule::nearest, replica_rule::round_robin, replica_rule::even}) {
      std::vector<index_t> before(at(experts), 0);
      for (index_t r = 0; r < ranks; ++r) {
        std::vector<slot_id> expected(at(all[at(r)].choices()), no_slot);
        std::vector<index_t> seen(at(experts), 0);
        index_t kept = 0, lost = 0;
        for (const auto& [c, e] : part[at(r)]) {
          auto slots = live(e, [](index_t) { return true; });
          const auto m = static_cast<index_t>(slots.size());
          if (m == 0) {
            ++lost;
            continue;
          }
          ++kept;
          const index_t mine = seen[at(e)]++;
          if (rule == replica_rule::round_robin) {
            expected[at(c)] = slots[at(mine % m)];
          } else if (rule == replica_rule::nearest) {
            const auto here = live(e, [&](index_t other) { return other == r; });
            const auto near_by =
                live(e, [&](index_t other) { return node[at(other)] == node[at(r)]; });
            if (!near_by.empty()) slots = near_by;
            if (!here.empty()) slots = here;
            expected[at(c)] = slots[at(r % static_cast<index_t>(slots.size()))];
          } else {
            index_t total = 0;
            for (index_t other = 0; other < ranks; ++other)
              total += counts[at(other * experts + e)];
            const index_t number = before[at(e)] + mine;
            index_t j = 0;
            while (number >= total * (j + 1) / m) ++j;
            expected[at(c)] = slots[at(j)];
          }
        }
        resolve_options o{.rule = rule, .lost = lost_expert::drop, .counts = counts};
        if (some_owned) o.owned = owned;
        if (masked) o.mask = masks[at(r)];
        resolve_counts found;
        INFO("round " << round << " rule " << int(rule) << " rank " << r << " of " << ranks);
        CHECK(resolved(all[at(r)], p, r, o, &found) == expected);
        CHECK(found.kept == kept);
        CHECK(found.lost == lost);
        o.lost = lost_expert::error;
        CHECK((test::refusal([&] { resolved(all[at(r)], p, r, o); }) == "accepted") == (lost == 0));

        // Rows to a rank are its tokens, each once, and entries come token by token.
        plan_exchange(all[at(r)], expected, p, out);
        std::vector<std::int32_t> row_token, row_offset{0}, entries, local;
        for (index_t to = 0; to < ranks; ++to) {
          for (index_t t = 0; t < all[at(r)].tokens(); ++t) {
            std::int32_t n = 0;
            for (index_t c = all[at(r)].first(t); c < all[at(r)].first(t + 1); ++c) {
              if (expected[at(c)] < 0 || expected[at(c)] / each != to) continue;
              local.push_back(static_cast<std::int32_t>(expected[at(c)] % each));
              ++n;
            }
            if (n == 0) continue;
            row_token.push_back(static_cast<std::int32_t>(t));
            entries.push_back(n);
          }
          row_offset.push_back(static_cast<std::int32_t>(row_token.size()));
        }
        CHECK(copy_of(out.row_token()) == row_token);
        CHECK(copy_of(out.row_offset()) == row_offset);
        CHECK(copy_of(out.entries_of_row()) == entries);
        CHECK(copy_of(out.local_slot()) == local);
        // Home again every token has a row of each rank that it went to, in rank order.
        plan_reduced(out, home);
        index_t wrong = home.tokens() != all[at(r)].tokens() || home.experts() != ranks ||
                        home.slots() != out.rows() || home.kept() != out.rows() ||
                        home.padding() != 0 || !home.ragged() ||
                        home.k() != std::min(ranks, std::max<index_t>(1, out.rows())) ||
                        home.first(0) != 0;
        wrong +=
            copy_of(home.token_of_slot()) != row_token || copy_of(home.offsets()) != row_offset;
        for (index_t t = 0, c = 0; t < all[at(r)].tokens(); ++t) {
          wrong += home.first(t) != c;
          for (std::size_t i = 0; i < row_token.size(); ++i)
            if (row_token[i] == t)
              wrong +=
                  c >= home.choices() || home.slot_of_choice()[at(c++)] != static_cast<slot_id>(i);
          wrong += home.first(t + 1) != c || home.count(t) > home.k();
          wrong += out.outer().first(t + 1) != all[at(r)].first(t + 1);
        }
        CHECK(wrong == 0);
        for (std::size_t e = 0; e < before.size(); ++e) before[e] += counts[at(r * experts) + e];
      }
    }
  }
}
