#include "placement_file_app.hpp"

#include "error.hpp"
#include "json.hpp"

#include <algorithm>
#include <cstdint>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/layer/virtual_ranks.hpp>
#include <moeroute/placement/affinity.hpp>
#include <moeroute/placement/cost.hpp>
#include <moeroute/placement/eplb.hpp>
#include <moeroute/placement/exact_balance.hpp>
#include <moeroute/placement/failover.hpp>
#include <moeroute/placement/grouping.hpp>
#include <moeroute/placement/replan.hpp>
#include <moeroute/placement/search.hpp>
#include <moeroute/placement/shadow.hpp>
#include <moeroute/placement/spill.hpp>
#include <moeroute/placement/split.hpp>

namespace example {

namespace detail {

using namespace moeroute;

inline std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

// A field of a case's input; the wrong type is refused by the field's name.
template <class T>
[[nodiscard]] T field(const json& in, const char* name) {
  if (!in.contains(name)) refuse("field '", name, "' is missing");
  try {
    return in[name].get<T>();
  } catch (const std::exception&) {
    refuse("field '", name, "' has another type than expected");
  }
}

// What get() would round or wrap is refused.
[[nodiscard]] inline index_t whole(const json& value, const char* name) {
  if (!value.is_number_integer()) refuse("field '", name, "': expected whole numbers");
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > (std::uint64_t{1} << 40))
    refuse("field '", name, "': ", value.get<std::uint64_t>(), " is more than any size here");
  return value.get<index_t>();
}
[[nodiscard]] inline index_t whole_field(const json& in, const char* name) {
  if (!in.contains(name)) refuse("field '", name, "' is missing");
  return whole(in[name], name);
}

template <class T>
[[nodiscard]] std::vector<T> whole_list(const json& list, const char* name) {
  if (!list.is_array()) refuse("field '", name, "': expected a list");
  std::vector<T> out;
  for (const json& v : list) {
    const index_t n = whole(v, name);
    if (n < index_t{std::numeric_limits<T>::min()} || n > index_t{std::numeric_limits<T>::max()})
      refuse("field '", name, "': ", n, " does not fit");
    out.push_back(static_cast<T>(n));
  }
  return out;
}
// Empty where the field is missing or null.
template <class T>
[[nodiscard]] std::vector<T> whole_list_of(const json& in, const char* name, bool needed = true) {
  if (!in.contains(name) || in[name].is_null()) {
    if (needed) refuse("field '", name, "' is missing");
    return {};
  }
  return whole_list<T>(in[name], name);
}
[[nodiscard]] inline std::vector<double> numbers(const json& in, const char* name) {
  return field<std::vector<double>>(in, name);
}

template <class T>
[[nodiscard]] json rows_of(const std::vector<T>& flat, index_t width) {
  json out = json::array();
  for (index_t i = 0; i < static_cast<index_t>(flat.size()); i += width)
    out.push_back(std::vector<T>(flat.begin() + i, flat.begin() + i + width));
  return out;
}

template <class T>
[[nodiscard]] std::vector<std::remove_const_t<T>> list_of(std::span<T> s) {
  return {s.begin(), s.end()};
}

// Most experts where the search looks everywhere.
inline constexpr index_t small_instance = 32;

[[nodiscard]] inline json answer_eplb(const json& in) {
  const std::vector<double> w = numbers(in, "weight");
  const index_t slots = whole_field(in, "slots"), ranks = whole_field(in, "ranks");
  const index_t groups = whole_field(in, "groups"), nodes = whole_field(in, "nodes");
  const eplb_result r = eplb(w, slots, groups, nodes, ranks);
  const placement_plan plan = eplb_plan(w, slots, ranks, groups, nodes);
  return {{"expert_of_slot", r.expert_of_slot},
          {"slots_of_expert", rows_of(r.slots_of_expert, r.most)},
          {"replicas", r.replicas},
          {"rank_load", plan.rank_load},
          {"imbalance", plan.balance.imbalance}};
}

[[nodiscard]] inline json answer_search(const json& in) {
  const std::vector<double> w = numbers(in, "weight");
  const index_t slots = whole_field(in, "slots"), ranks = whole_field(in, "ranks");
  search_options free{.distinct = false, .swaps = false, .kicks = 0};
  search_options ours;
  // Small: every change is tried, once down. Else the likely ones, from several starts.
  if (static_cast<index_t>(w.size()) <= small_instance)
    free.candidates = ours.candidates = 0;
  else
    free.kicks = ours.kicks;
  const packing counts = search_packing(w, slots, ranks, free);
  free.swaps = true;
  const packing swapped = search_packing(w, slots, ranks, free);
  json out{{"eplb_replicas", replicate(w, slots, slots)},
           {"eplb_max", eplb_plan(w, slots, ranks).balance.max_load},
           {"search_replicas", counts.count},
           {"search_max", counts.max_load},
           {"search_rank_load", counts.load},
           {"after_swaps_max", swapped.max_load},
           {"steps", counts.steps},
           {"mean", balance_of(counts.load).mean_load}};
  // And the placement that one would use: no expert twice on a rank.
  if (slots / ranks <= static_cast<index_t>(w.size())) {
    const placement_plan plan = search_placement(w, slots, ranks, ours);
    out["placement"] = {{"expert_of_slot", list_of(plan.experts.expert_of_slot())},
                        {"rank_load", plan.rank_load},
                        {"max", plan.balance.max_load},
                        {"imbalance", plan.balance.imbalance},
                        {"lower_bound", plan.lower_bound}};
  }
  return out;
}

[[nodiscard]] inline json ranges_as_json(const std::vector<std::vector<rank_range>>& ranges) {
  json out = json::object();
  for (std::size_t e = 0; e < ranges.size(); ++e) {
    json list = json::array();
    for (const rank_range& r : ranges[e]) list.push_back({r.rank, r.begin, r.end});
    out[std::to_string(e)] = list;
  }
  return out;
}

[[nodiscard]] inline json answer_spill(const json& in) {
  const auto alpha = whole_list_of<std::int64_t>(in, "alpha");
  if (alpha.size() != 2) refuse("field 'alpha': expected [numerator, denominator]");
  spill_options o{
      .alpha_num = alpha[0], .alpha_den = alpha[1], .min_rows = whole_field(in, "min_rows")};
  if (in.contains("lambda_") && !in["lambda_"].is_null()) o.lambda = field<double>(in, "lambda_");
  const batch_plan plan =
      spill(whole_list_of<std::int64_t>(in, "load"), whole_field(in, "ranks"), o);
  json moves = json::array();
  for (const expert_move& m : plan.moves) moves.push_back({m.expert, m.from, m.to});
  json out{{"enabled", plan.enabled},
           {"ranges", ranges_as_json(plan.range)},
           {"moves", moves},
           {"load", plan.load},
           {"cap", nullptr}};
  if (plan.enabled) {
    out["cap"] = plan.cap;
    out["forced"] = plan.forced;
  }
  return out;
}

[[nodiscard]] inline json answer_exact_balance(const json& in) {
  const json table = field<json>(in, "tokens_per_expert");
  if (!table.is_array() || table.empty())
    refuse("field 'tokens_per_expert': expected a row for each rank");
  std::vector<std::int64_t> count;
  for (const json& row : table) {
    const auto list = whole_list<std::int64_t>(row, "tokens_per_expert");
    if (count.empty()) count.assign(list.size(), 0);
    if (list.size() != count.size()) refuse("field 'tokens_per_expert': rows of different lengths");
    for (std::size_t e = 0; e < list.size(); ++e) {
      if (list[e] < 0) refuse("field 'tokens_per_expert': ", list[e], " is negative");
      count[e] += list[e];
    }
  }
  const index_t ranks = whole_field(in, "ranks");
  const exact_balance_plan plan = balance_exactly(count, ranks);
  json fills = json::array();
  for (const rank_fill& f : plan.fills) fills.push_back({f.from, f.to, f.rows});
  return {{"fills", fills},
          {"alloc", rows_of(plan.alloc, ranks)},
          {"foreign", plan.foreign},
          {"capacity", plan.capacity},
          {"counts", count}};
}

[[nodiscard]] inline json answer_split(const json& in) {
  const auto rule = field<std::string>(in, "rule");
  if (rule == "even") {
    const index_t n = whole_field(in, "rows"), m = whole_field(in, "replicas");
    if (n < 0 || m < 1 || m > max_ranks)
      refuse("fields 'rows' and 'replicas': expected rows >= 0 and at least one replica");
    std::vector<std::int64_t> edges;
    for (index_t j = 0; j <= m; ++j) edges.push_back(n * j / m);
    return {{"boundaries", edges}};
  }
  if (rule == "nearest") {
    const auto node = whole_list_of<std::int32_t>(in, "node_of_rank");
    const auto ranks = static_cast<index_t>(node.size());
    const index_t per = whole_field(in, "slots_per_rank");
    if (per < 1 || per > 1 << 20) refuse("field 'slots_per_rank': expected 1 to 2^20");
    std::vector<expert_id> slots(at(ranks * per), no_expert);
    for (const auto s : whole_list_of<std::int32_t>(in, "slots")) {
      if (s < 0 || s >= ranks * per) refuse("field 'slots': ", s, " is no slot of ", ranks * per);
      slots[at(s)] = 0;
    }
    const placement p = placement::from_slots(1, ranks, slots, node);
    assignment one;
    one.reset(1, 1, 1);
    one.ids()[0] = 0;
    std::vector<slot_id> of_source, slot(1);
    workspace memory;
    for (index_t r = 0; r < ranks; ++r) {
      resolve(one, p, r, {}, memory, slot);
      of_source.push_back(slot[0]);
    }
    return {{"slot_of_source", of_source}};
  }
  if (rule != "optimal")
    refuse("field 'rule': expected even, nearest or optimal, found '", rule, "'");
  const auto count = whole_list_of<std::int64_t>(in, "load");
  const placement p =
      placement::from_slots(static_cast<index_t>(count.size()), whole_field(in, "ranks"),
                            whole_list_of<expert_id>(in, "expert_of_slot"));
  const slot_split s = split_optimal(p, count);
  json of = json::object();
  for (index_t e = 0; e < p.experts(); ++e) {
    json by_rank = json::object();
    for (const slot_id i : p.slots_of_expert(e)) {
      const std::string r = std::to_string(p.rank_of_slot()[at(i)]);
      by_rank[r] = by_rank.value(r, std::int64_t{0}) + s.of_slot[at(i)];
    }
    of[std::to_string(e)] = by_rank;
  }
  const std::vector<double> real(count.begin(), count.end());
  return {{"smallest_max", s.max_load},
          {"even_max", balance_of(rank_loads(p, real)).max_load},
          {"one_split", of},
          {"rank_load", s.rank_load}};
}

[[nodiscard]] inline json answer_affinity(const json& in) {
  layer_transitions t{.experts = whole_field(in, "experts"), .count = {}};
  for (const auto& layer :
       field<std::vector<std::vector<std::vector<double>>>>(in, "transitions")) {
    t.count.emplace_back();
    for (const auto& row : layer)
      t.count.back().insert(t.count.back().end(), row.begin(), row.end());
  }
  const affinity_options o{.ranks = whole_field(in, "ranks"),
                           .node_of_rank = whole_list_of<std::int32_t>(in, "node_of_rank", false),
                           .weight_within = field<double>(in, "weight_within"),
                           .weight_across = field<double>(in, "weight_across")};
  check_range("affinity", "experts", t.experts, 1, max_experts);
  check_range("affinity", "ranks", o.ranks, 1, t.experts);
  std::vector<std::int32_t> first;
  for (index_t e = 0; e < t.experts; ++e)
    first.push_back(static_cast<std::int32_t>(e * o.ranks / t.experts));
  const affinity_plan greedy = affinity_from(t, o, first, false),
                      local = affinity_from(t, o, first, true), best = place_by_affinity(t, o);
  return {{"trivial_cost",
           affinity_cost(t, o, std::vector<std::vector<std::int32_t>>(t.count.size() + 1, first))},
          {"greedy", greedy.rank_of_expert},
          {"greedy_cost", greedy.cost},
          {"local", local.rank_of_expert},
          {"local_cost", local.cost},
          {"swaps", local.swaps},
          {"restarts", best.rank_of_expert},
          {"restarts_cost", best.cost}};
}

[[nodiscard]] inline json answer_grouping(const json& in) {
  std::vector<token_set> sets;
  for (const json& s : field<json>(in, "token_sets")) {
    if (!s.is_array() || s.size() != 2 || !s[1].is_number())
      refuse("field 'token_sets': expected [[experts], count]");
    sets.push_back({whole_list<expert_id>(s[0], "token_sets"), s[1].get<double>()});
  }
  const grouping_options o{.ranks = whole_field(in, "ranks"),
                           .node_of_rank = whole_list_of<std::int32_t>(in, "node_of_rank", false),
                           .weight_node = field<double>(in, "weight_node"),
                           .weight_rank = field<double>(in, "weight_rank"),
                           .slack = field<double>(in, "slack")};
  const grouping_plan plan =
      group_experts(sets, numbers(in, "weight"), whole_list_of<std::int32_t>(in, "start"), o);
  return {{"placement", plan.rank_of_expert},
          {"cost", plan.cost},
          {"start_cost", plan.start_cost},
          {"swaps", plan.swaps},
          {"max_load", plan.max_load}};
}

[[nodiscard]] inline json answer_replan(const json& in) {
  const std::vector<double> w = numbers(in, "weight");
  const placement old =
      placement::from_slots(static_cast<index_t>(w.size()), whole_field(in, "ranks"),
                            whole_list_of<expert_id>(in, "expert_of_slot"));
  const replan_result r =
      replan(old, w, {.target = field<double>(in, "target"), .budget = whole_field(in, "budget")});
  json steps = json::array();
  for (const replan_step& s : r.steps)
    steps.push_back({s.what == replan_step::kind::swap ? "swap" : "copy", s.slot, s.other});
  return {{"expert_of_slot", list_of(r.experts.expert_of_slot())},
          {"moves", r.moves},
          {"steps", steps},
          {"imbalance_before", r.imbalance_before},
          {"imbalance_after", r.imbalance_after},
          {"moves_checked", count_moves(old, r.experts)}};
}

[[nodiscard]] inline json answer_failover(const json& in) {
  const placement p = placement::from_slots(whole_field(in, "experts"), whole_field(in, "ranks"),
                                            whole_list_of<expert_id>(in, "expert_of_slot"));
  const placement left = without(p, whole_list_of<std::uint8_t>(in, "alive"));
  json live = json::array();
  for (index_t e = 0; e < left.experts(); ++e) live.push_back(list_of(left.slots_of_expert(e)));
  return {{"live_slots", live},
          {"lost", left.lost()},
          {"expert_of_slot", list_of(left.expert_of_slot())}};
}

[[nodiscard]] inline json answer_shadow(const json& in) {
  const shadow_plan plan = shadow_published(
      numbers(in, "load"),
      {field<double>(in, "d"), field<double>(in, "ratio"), field<double>(in, "bytes"),
       field<double>(in, "bandwidth"), field<double>(in, "flops")});
  return {{"shadowed", plan.shadowed}, {"latency", plan.latency}, {"trace", plan.trace}};
}

[[nodiscard]] inline json answer_distinct(const json& in) {
  const index_t experts = whole_field(in, "experts"), k = whole_field(in, "k"),
                ranks = whole_field(in, "ranks"), nodes = whole_field(in, "nodes");
  const expected_rows r = expect_rows(experts, k, ranks, nodes);
  const auto replaced = [&](index_t n) {
    return static_cast<double>(n) *
           (1.0 - std::pow(1.0 - 1.0 / static_cast<double>(n), static_cast<double>(k)));
  };
  return {{"distinct_ranks", r.distinct_ranks},
          {"distinct_nodes", r.distinct_nodes},
          {"with_replacement_ranks", replaced(ranks)},
          {"with_replacement_nodes", replaced(nodes)},
          {"off_rank_choices", r.off_rank_choices},
          {"off_rank_rows_dedup", r.off_rank_rows},
          {"off_node_choices", r.off_node_choices},
          {"off_node_rows_rank_dedup", r.off_node_rows_by_rank},
          {"off_node_rows_node_dedup", r.off_node_rows_by_node}};
}

[[nodiscard]] inline json answer_exchange(const json& in) {
  const auto slots = whole_list_of<expert_id>(in, "expert_of_slot");
  const index_t ranks = whole_field(in, "ranks");
  index_t experts = 1;
  for (const expert_id e : slots) experts = std::max<index_t>(experts, e + 1);
  const json ids = field<json>(in, "ids"), weights = field<json>(in, "weights"),
             x = field<json>(in, "x");
  for (const auto& [name, table] : {std::pair{"ids", &ids}, {"weights", &weights}, {"x", &x}})
    if (!table->is_array() || static_cast<index_t>(table->size()) != ranks)
      refuse("field '", name, "': expected a list for each of ", ranks, " ranks");
  index_t k = 1, d = 0;
  for (const json& rank : ids)
    for (const json& token : rank)
      for (const auto e : whole_list<expert_id>(token, "ids"))
        experts = std::max<index_t>(experts, e + 1);
  for (const json& rank : ids)
    for (const json& token : rank) k = std::max(k, static_cast<index_t>(token.size()));
  if (k > experts) refuse("field 'ids': ", k, " ids of a token for ", experts, " experts");
  for (const json& rank : x)
    for (const json& row : rank) d = std::max(d, static_cast<index_t>(row.size()));
  const placement p = placement::from_slots(experts, ranks, slots,
                                            whole_list_of<std::int32_t>(in, "node_of_rank", false),
                                            whole_list_of<std::uint8_t>(in, "alive", false));
  std::vector<assignment> choices(at(ranks));
  std::vector<std::vector<float>> rows(at(ranks)), y(at(ranks));
  std::vector<rank_tokens<>> tokens;
  for (index_t r = 0; r < ranks; ++r) {
    const auto n = static_cast<index_t>(ids[at(r)].size());
    if (static_cast<index_t>(weights[at(r)].size()) != n ||
        static_cast<index_t>(x[at(r)].size()) != n)
      refuse("fields 'weights' and 'x': expected as many tokens as 'ids' has on rank ", r);
    choices[at(r)].reset(n, experts, k);
    for (index_t t = 0; t < n; ++t) {
      const auto list = whole_list<expert_id>(ids[at(r)][at(t)], "ids");
      const auto weight = weights[at(r)][at(t)].get<std::vector<float>>();
      const auto row = x[at(r)][at(t)].get<std::vector<float>>();
      if (static_cast<index_t>(list.size()) != k || weight.size() != list.size() ||
          static_cast<index_t>(row.size()) != d)
        refuse("token ", t, " of rank ", r, ": expected ", k, " ids and weights and ", d,
               " values");
      std::copy(list.begin(), list.end(), choices[at(r)].ids().begin() + t * k);
      std::copy(weight.begin(), weight.end(), choices[at(r)].weights().begin() + t * k);
      rows[at(r)].insert(rows[at(r)].end(), row.begin(), row.end());
    }
    y[at(r)].resize(rows[at(r)].size());
    tokens.push_back({{rows[at(r)].data(), n, d}, choices[at(r)], {y[at(r)].data(), n, d}});
  }
  virtual_ranks<> all(p);
  all.forward(tokens,
              [&](index_t rank, expert_id slot, matrix_view<const float> a, matrix_view<float> b) {
                const auto e = static_cast<float>(p.experts_of_rank(rank)[at(slot)]);
                for (index_t i = 0; i < a.rows; ++i)
                  for (index_t j = 0; j < a.cols; ++j) b(i, j) = (e + 1.0f) * a(i, j) + e;
              });
  json out{{"rows_sent", json::array()},      {"entries_sent", json::array()},
           {"rows_to_node", json::array()},   {"slot_of_choice", json::array()},
           {"tokens_to_rank", json::array()}, {"entries_token_choice_slot", json::array()},
           {"received", json::array()},       {"y", json::array()}};
  workspace memory;
  for (index_t r = 0; r < ranks; ++r) {
    const exchange_plan& plan = all.plan(r);
    std::vector<slot_id> slot(at(choices[at(r)].choices()));
    resolve(choices[at(r)], p, r, {}, memory, slot);
    out["slot_of_choice"].push_back(rows_of(slot, k));
    std::vector<std::int32_t> nodes(at(p.nodes()));
    count_node_rows(plan, p, memory, nodes);
    out["rows_to_node"].push_back(nodes);
    json sent = json::array(), entries = json::array(), of_token = json::array(),
         triples = json::array();
    std::vector<index_t> choice_of(at(plan.entries()));
    for (index_t c = 0; c < choices[at(r)].choices(); ++c)
      if (const slot_id e = plan.outer().slot_of_choice()[at(c)]; e >= 0) choice_of[at(e)] = c;
    for (index_t to = 0; to < ranks; ++to) {
      sent.push_back(plan.rows_to(to));
      entries.push_back(plan.entries_to(to));
      of_token.push_back(
          list_of(plan.row_token().subspan(at(plan.row_offset()[at(to)]), at(plan.rows_to(to)))));
      json list = json::array();
      for (index_t i = plan.entry_offset()[at(to)]; i < plan.entry_offset()[at(to) + 1]; ++i)
        list.push_back({choice_of[at(i)] / k, choice_of[at(i)] % k, plan.local_slot()[at(i)]});
      triples.push_back(list);
    }
    out["rows_sent"].push_back(sent);
    out["entries_sent"].push_back(entries);
    out["tokens_to_rank"].push_back(of_token);
    out["entries_token_choice_slot"].push_back(triples);
    out["y"].push_back(d > 0 ? rows_of(y[at(r)], d) : json::array());
  }
  for (index_t to = 0; to < ranks; ++to) {
    const dispatch_plan& got = all.received(to);
    json where = json::array(), by_row = json::array(), load = json::array();
    for (index_t s = 0; s < ranks; ++s) {
      const exchange_plan& plan = all.plan(s);
      for (index_t i = plan.row_offset()[at(to)]; i < plan.row_offset()[at(to) + 1]; ++i)
        where.push_back({s, plan.row_token()[at(i)]});
    }
    std::vector<std::int32_t> order(at(got.slots()));
    for (index_t row = 0; row < got.tokens(); ++row)
      for (index_t c = got.first(row); c < got.first(row + 1); ++c) {
        const slot_id at_slot = got.slot_of_choice()[at(c)];
        const index_t local =
            std::upper_bound(got.offsets().begin(), got.offsets().end(), at_slot) -
            got.offsets().begin() - 1;
        by_row.push_back({row, local});
        order[at(at_slot)] = static_cast<std::int32_t>(c);
      }
    for (index_t s = 0; s < p.slots(to); ++s) load.push_back(got.load(s));
    out["received"].push_back({{"rows", where},
                               {"entries_row_slot", by_row},
                               {"slot_order", order},
                               {"load_of_slot", load}});
  }
  return out;
}

// Cases are told apart by their fields.
[[nodiscard]] inline json answer(const json& in) {
  const auto has = [&](const char* name) { return in.contains(name); };
  if (has("ids") && has("x")) return answer_exchange(in);
  if (has("transitions")) return answer_affinity(in);
  if (has("token_sets")) return answer_grouping(in);
  if (has("tokens_per_expert")) return answer_exact_balance(in);
  if (has("rule")) return answer_split(in);
  if (has("alpha")) return answer_spill(in);
  if (has("bandwidth")) return answer_shadow(in);
  if (has("budget")) return answer_replan(in);
  if (has("alive")) return answer_failover(in);
  if (has("groups")) return answer_eplb(in);
  if (has("weight") && has("slots")) return answer_search(in);
  if (has("k") && has("experts")) return answer_distinct(in);
  refuse("its input is of no planner that is known");
}

}  // namespace detail

json answer_placement_file(const json& file) {
  if (!file.is_object() || !file.contains("cases") || !file["cases"].is_array())
    refuse("expected an object with a list 'cases'");
  json cases = json::array();
  for (const json& one : file["cases"]) {
    const std::string name = one.is_object() && one.contains("name") && one["name"].is_string()
                                 ? one["name"].get<std::string>()
                                 : "number " + std::to_string(cases.size());
    if (!one.is_object() || !one.contains("input") || !one["input"].is_object())
      refuse("case ", name, ": field 'input' is missing");
    try {
      json made{{"name", name}, {"input", one["input"]}};
      made["output"] = detail::answer(one["input"]);
      cases.push_back(std::move(made));
    } catch (const std::exception& e) {
      refuse("case ", name, ": ", e.what());
    }
  }
  json out{{"cases", cases}};
  if (file.contains("planner")) out["planner"] = file["planner"];
  return out;
}

int run_placement_file(int count, const char* const* words, std::ostream& out, std::ostream& err) {
  try {
    if (count != 2 || std::string(words[1]) == "--help") refuse("usage: placement_file IN.json");
    const std::filesystem::path path = words[1];
    const json file = read_json(path);
    try {
      out << answer_placement_file(file).dump(1) << "\n" << std::flush;
    } catch (const std::exception& e) {
      refuse(path.string(), ": ", e.what());
    }
    if (!out) refuse("the output cannot be written");
    return 0;
  } catch (const std::exception& e) {
    err << "placement_file: " << one_line(e.what()) << "\n";
    return 2;
  }
}

}  // namespace example
