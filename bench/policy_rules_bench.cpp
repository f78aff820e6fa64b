// Token rules that no spec describes, against the same rule row by row: by mass, by threshold, by
// chance, by two halves, by a table, by a record, by modality.
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <moeroute/stage/route.hpp>

#include "support/logits.hpp"
#include "support/plain_rules.hpp"
#include "support/rule_contest.hpp"

namespace {

using bench::add_everywhere;
using bench::add_rule;
using bench::agreement;
using bench::drawn_sides;
using bench::index_t;
using bench::rule;
using moeroute::expert_id;
using input = bench::rule_input;
using run = bench::rule_run;

// A table of every kind: it is the lookups and the weights that are timed.
template <class Router>
run table_rule(index_t k, moeroute::table_key key, bench::given_weight by,
               const std::string& made) {
  return [=](benchmark::State& state, const input& in) {
    constexpr std::int32_t vocabulary = drawn_sides::vocabulary;
    std::vector<std::int64_t> frequency(vocabulary);
    std::vector<std::int32_t> cluster(vocabulary);
    for (std::int32_t i = 0; i < vocabulary; ++i) {
      frequency[static_cast<std::size_t>(i)] = 1000000 / (i + 1);
      cluster[static_cast<std::size_t>(i)] = i / 7;
    }
    const moeroute::expert_table table =
        made == "balanced"    ? moeroute::balanced_table(frequency, in.experts)
        : made == "clustered" ? moeroute::clustered_table(cluster, in.experts)
                              : moeroute::random_table(vocabulary, k, in.experts, 9);
    const auto plain = [&table, key, by](const float* row, index_t experts, index_t token,
                                         const moeroute::side_inputs& side, expert_id* id,
                                         float* weight) {
      const auto at = static_cast<std::size_t>(token);
      index_t place = side.token_ids[at];
      if (key == moeroute::table_key::bigram)
        place = moeroute::random_below(
            static_cast<std::uint32_t>(table.vocabulary()), 0,
            static_cast<std::uint32_t>(token > 0 ? side.token_ids[at - 1] : -1),
            static_cast<std::uint32_t>(side.token_ids[at]));
      bench::plain_given{by}(row, experts, table.of(place).data(), table.k(), id, weight);
      return table.k();
    };
    Router router{.table = &table, .key = key};
    if (by != bench::given_weight::softmax) router.weight = moeroute::sum_normalized;
    bench::compete_rule(state, in, router, plain, drawn_sides(in));
  };
}

template <class Id>
void replay(benchmark::State& state, const input& in) {
  constexpr index_t k = 2;
  const auto drawn = bench::expert_ids("normal", in.tokens, in.experts, k);
  moeroute::assignment past;
  past.reset(in.tokens, in.experts, k);
  std::copy(drawn.data(), drawn.data() + drawn.size(), past.ids().begin());
  moeroute::routing_record<Id> record;
  record.record(past);
  const auto plain = [&](const float* row, index_t experts, index_t token,
                         const moeroute::side_inputs&, expert_id* id, float* weight) {
    bench::plain_given{}(row, experts, past.ids(token).data(), k, id, weight);
    return k;
  };
  bench::compete_rule(state, in,
                      moeroute::replay<moeroute::sigmoid, Id>{.record = &record,
                                                              .weight = moeroute::sum_normalized},
                      plain, drawn_sides(in));
}

// Half of the experts for each modality.
void by_modality(benchmark::State& state, const input& in) {
  using one = moeroute::router<moeroute::softmax_selected>;
  const index_t first = in.experts / 2;
  const moeroute::by_modality<one> router{
      .first = {.selection = {.k = 2}}, .second = {.selection = {.k = 2}}, .first_experts = first};
  bench::compete_rule(
      state, in, router,
      [first, best = bench::plain_softmax_k{2, {}}](
          const float* row, index_t experts, index_t token, const moeroute::side_inputs& side,
          expert_id* id, float* weight) mutable {
        if (side.modality[static_cast<std::size_t>(token)] == 0)
          return best(row, first, token, side, id, weight);
        best(row + first, experts - first, token, side, id, weight);
        for (int r = 0; r < 2; ++r) id[r] = id[r] < 0 ? id[r] : id[r] + static_cast<int>(first);
        return index_t{2};
      },
      drawn_sides(in));
}

const bool registered = [] {
  using namespace moeroute;
  add_everywhere("top_p", 1, rule(top_p{}, bench::plain_top_p{}));
  add_everywhere("top_p/p:0.9", 1,
                 rule(top_p{.p = 0.9f}, bench::plain_top_p{.p = 0.9f, .score = {}, .order = {}}));
  add_everywhere("relu", 1, rule(threshold_router<relu>{}, bench::plain_relu{}));
  add_everywhere("relu/norm:sum", 1,
                 rule(threshold_router<relu>{.norm = threshold_norm::sum},
                      bench::plain_relu{threshold_norm::sum}));
  add_everywhere("relu/norm:rms", 1,
                 rule(threshold_router<relu>{.norm = threshold_norm::rms},
                      bench::plain_relu{threshold_norm::rms}));
  add_everywhere("threshold", 1,
                 rule(threshold_router<sigmoid>{.threshold = 0.6f}, bench::plain_threshold{0.6f}));
  add_everywhere("random_choice", 2, rule(random_choice{}, bench::plain_random{}));
  for (const auto& [name, policy] : {std::pair{"best", second_expert::best},
                                     {"sampling", second_expert::sampling},
                                     {"random", second_expert::random}})
    add_everywhere(std::string("gshard/second:") + name, 2,
                   rule(gshard_top2{.policy = policy}, bench::plain_gshard{policy}));
  add_everywhere("sparsemixer", 2, rule(sparsemixer{}, bench::plain_sparsemixer{0.01f, {}}));
  add_everywhere(
      "noisy_top_k", 2,
      rule(router<softmax_selected>{.selection = {.k = 2},
                                    .transform = {.noise = {.kind = noise_kind::gaussian}}},
           bench::plain_noisy{}, agreement::not_asked));
  add_everywhere("by_modality", 7, by_modality);
  for (const char* shape : bench::shapes)
    for (const index_t columns : {16, 64, 256, 2048})
      if (columns == 64 || std::string(shape) == "normal")
        add_rule("product_keys/k:16", {1024, columns, shape},
                 rule(product_keys<>{}, bench::plain_product_keys{}));
  add_rule("product_keys/k:16", {1, 256, "normal"},
           rule(product_keys<>{}, bench::plain_product_keys{}));

  for (const char* made : {"random", "balanced", "clustered"})
    add_everywhere(std::string("hash/table:") + made, 2,
                   table_rule<table_router<uniform_score>>(1, table_key::token,
                                                           bench::given_weight::equal, made));
  add_everywhere("hash/table:bigram", 2,
                 table_rule<table_router<uniform_score>>(1, table_key::bigram,
                                                         bench::given_weight::equal, "random"));
  add_everywhere("table/score:sigmoid", 2,
                 table_rule<table_router<sigmoid>>(2, table_key::token,
                                                   bench::given_weight::sigmoid, "random"));
  add_everywhere("table/score:softmax", 2,
                 table_rule<table_router<softmax>>(2, table_key::token,
                                                   bench::given_weight::softmax, "random"));
  add_rule("replay/ids:8", {1024, 64, "normal"}, replay<std::uint8_t>);
  add_rule("replay/ids:16", {1024, 64, "normal"}, replay<std::uint16_t>);
  add_everywhere("replay/ids:32", 2, replay<std::int32_t>);
  return true;
}();

}  // namespace
