// What holds for routers of every kind, tokens', ragged and of the whole batch: where rows lie, who
// carries the work out, masks, and what a workspace and an assignment held before.
#include <moeroute/stage/route.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <functional>
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/batch_percentile.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>
#include <moeroute/policy/parts/selection_rules.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/counted.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/policy/row/sparsemixer.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <moeroute/policy/row/top_p.hpp>
#include <moeroute/policy/row/transformed.hpp>
#include <string>
#include <vector>

#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/strided.hpp"

using namespace moeroute;

namespace {

constexpr index_t batch_tokens = 40, batch_experts = 20;

// Side inputs that every router may look at, by value.
struct side_values {
  std::vector<std::int32_t> token_ids;
  std::vector<std::uint8_t> mask, modality;
  std::vector<float> noise;

  side_values() {
    test::random rng(1);
    for (index_t t = 0; t < batch_tokens; ++t) {
      token_ids.push_back(static_cast<std::int32_t>(rng.below(9)));
      mask.push_back(rng.below(4) != 0);
      modality.push_back(rng.below(2) != 0);
    }
    noise = test::numbers(rng, batch_tokens * batch_experts);
  }
};

// A router of any kind behind one face.
struct any_kind {
  std::string name;
  bool whole_batch = false;
  bool needs_modality = false, needs_token_ids = false, needs_noise = false;
  std::function<void(matrix_view<const float>, const side_inputs&, workspace&, assignment&, bool)>
      route;

  side_inputs side(const side_values& v) const {
    side_inputs s;
    s.seed = 5;
    s.step = 3;
    if (needs_modality) s.modality = v.modality;
    if (needs_token_ids) s.token_ids = v.token_ids;
    if (needs_noise)
      s.noise_logits = matrix_view<const float>(v.noise.data(), batch_tokens, batch_experts);
    return s;
  }
};

template <class Router>
any_kind kind(std::string name, Router router) {
  return {.name = std::move(name),
          .whole_batch = batch_router<Router>,
          .route = [router](matrix_view<const float> z, const side_inputs& side, workspace& ws,
                            assignment& out, bool last_to_first) {
            if (last_to_first)
              moeroute::route(router, z, side, ws, out, test::backwards{});
            else
              moeroute::route(router, z, side, ws, out);
          }};
}

const expert_table& a_table() {
  static const expert_table table = random_table(9, 3, batch_experts, 7);
  return table;
}

const routing_record<std::uint8_t>& a_record() {
  static const routing_record<std::uint8_t> record = [] {
    routing_record<std::uint8_t> made;
    made.record(
        test::routed(random_choice{3}, test::zeros(batch_tokens, batch_experts), batch_experts));
    return made;
  }();
  return record;
}

const std::vector<float>& a_bias() {
  static const std::vector<float> bias = [] {
    test::random rng(2);
    std::vector<float> made = test::numbers(rng, batch_experts);
    for (float& b : made) b *= 0.1f;
    return made;
  }();
  return bias;
}

std::vector<any_kind> kinds() {
  using softmax_router = router<softmax>;
  std::vector<any_kind> list;
  list.push_back(kind("softmax top-k", softmax_router{.selection = {.k = 3}}));
  list.push_back(kind("grouped sigmoid with a bias",
                      router{sigmoid{}, top_k{.k = 3, .groups = 4, .topk_group = 2}, sum_normalized,
                             selection_bias(a_bias())}));
  // By name: clang 16 makes a wrong address of a router that is a member of an unnamed one.
  const plain two_best{.selection = {.k = 2}}, three_best{.selection = {.k = 3}};
  const top_p nucleus{.p = 0.6f};
  list.push_back(kind("two modalities", by_modality<softmax_router>{two_best, two_best, 8}));
  list.back().needs_modality = true;
  list.push_back(kind("with shared experts", with_shared<softmax_router>{two_best, 2}));
  list.push_back(kind("product keys", product_keys<>{.choices = 4}));
  list.push_back(kind("random", random_choice{3}));
  list.push_back(kind("GShard's second by sampling", gshard_top2{second_expert::sampling}));
  list.push_back(kind("SparseMixer", sparsemixer{}));
  list.push_back(kind("a table", table_router<softmax>{.table = &a_table()}));
  list.back().needs_token_ids = true;
  list.push_back(kind("a replay", replay<softmax, std::uint8_t>{.record = &a_record()}));
  list.push_back(kind("top-p", top_p{.p = 0.6f, .weight = sum_normalized}));
  list.push_back(kind("every expert above a threshold",
                      threshold_router<identity_score>{.threshold = -100.0f, .scale = 2.0f}));
  list.push_back(kind("ReLU, RMS-normalised", threshold_router<relu>{.norm = threshold_norm::rms}));
  list.push_back(kind("a share of the best", counted<>{.count = {.ratio = 0.3f, .max_k = 6}}));
  list.push_back(kind("a percentile of the row",
                      counted<sigmoid>{.count = {.rule = count_rule::percentile, .quantile = 0.8f},
                                       .weight = sum_normalized}));
  list.push_back(kind(
      "a count by entropy",
      counted<>{
          .count = {
              .rule = count_rule::entropy, .low = 2.0f, .high = 2.5f, .mid_k = 3, .max_k = 5}}));
  list.push_back(kind("dense where undecided", dense_if{.rule = {.p = 0.5f}, .threshold = 0.8f}));
  list.push_back(kind("some of each group", router{softmax{}, top_of_each_group{4, 4}}));
  list.push_back(kind("the higher id first", router{sigmoid{}, ordered_ties<>{{.k = 3}}}));
  list.push_back(
      kind("a bias per class",
           router{sigmoid{},
                  class_bias<>{{.k = 3}, {selection_bias(a_bias()), selection_bias(a_bias())}}}));
  list.back().needs_modality = true;
  list.push_back(kind("standardised", transformed{standardized{2.0f}, two_best}));
  list.push_back(kind("candidates by lot", transformed{candidates{6}, nucleus}));
  list.push_back(kind("two logits for one", transformed{sigmoid_sum{}, three_best}));
  list.push_back(kind("weights of other logits", weighed_by_second<plain, sigmoid>{two_best}));
  list.push_back(kind("a percentile of the batch", batch_percentile<>{.max_k = 5}));
  list.push_back(kind("expert choice", expert_choice<>{.normalize = token_renormalization::sum}));
  list.push_back(kind("expert choice of sigmoids, capped",
                      expert_choice<sigmoid>{.capacity = {.factor = 3.0}, .most_experts = 2}));
  list.push_back(kind("Sinkhorn", sinkhorn{.k = 2}));
  list.push_back(kind("selective Sinkhorn", selective_sinkhorn{.k = 2, .probability = 1.0f}));
  list.push_back(kind("experts choose from a Sinkhorn plan", sinkhorn_expert_choice{}));
  list.push_back(kind("BASE by auction", base_assignment{}));
  list.push_back(kind("BASE by optimum", base_assignment{.solver = assignment_solver::optimal}));
  list.push_back(kind("sparse transport", sparse_transport{}));
  list.push_back(kind("tokens choose from sparse transport", sparse_transport_token_choice{}));
  return list;
}

struct choices {
  std::vector<expert_id> ids;
  std::vector<float> weights;
  std::vector<std::int32_t> counts;
};

choices listed(const assignment& a) {
  choices out{test::listed(a.ids()), test::listed(a.weights()), {}};
  for (index_t t = 0; t < a.tokens(); ++t)
    out.counts.push_back(static_cast<std::int32_t>(a.count(t)));
  return out;
}

std::string difference(const choices& a, const choices& b) {
  if (a.counts != b.counts) return "counts";
  if (a.ids != b.ids) return "ids";
  return test::bit_difference(a.weights, b.weights);
}

choices chosen(const any_kind& r, const std::vector<float>& z, const side_inputs& side,
               bool last_to_first = false) {
  workspace ws;
  assignment out;
  r.route(matrix_view<const float>(z.data(), batch_tokens, batch_experts), side, ws, out,
          last_to_first);
  return listed(out);
}

const std::vector<float>& logits() {
  static const std::vector<float> z =
      test::make_logits(test::shape::normal, 3, batch_tokens, batch_experts);
  return z;
}

}  // namespace

TEST_CASE("every kind of router reads logits and noise wherever their rows lie") {
  const side_values values;
  for (const any_kind& r : kinds()) {
    INFO(r.name);
    CHECK(test::differs_by_stride([&](test::layout& l) {
            side_inputs side = r.side(values);
            if (r.needs_noise) side.noise_logits = l.in(values.noise, batch_tokens, batch_experts);
            const auto z = l.in(logits(), batch_tokens, batch_experts);
            workspace ws;
            assignment out;
            r.route(z, side, ws, out, false);
            l.result(out.ids());
            l.result(out.weights());
          }) == "");
  }
}

TEST_CASE("every kind of router decides the same in whatever order its pieces run") {
  const side_values values;
  for (const any_kind& r : kinds()) {
    INFO(r.name);
    CHECK(difference(chosen(r, logits(), r.side(values), true),
                     chosen(r, logits(), r.side(values))) == "");
  }
}

TEST_CASE("what a masked token says matters to no kind of router, and it has no choices") {
  const side_values values;
  std::vector<float> shouted = logits();
  for (index_t t = 0; t < batch_tokens; ++t)
    for (index_t e = 0; values.mask[static_cast<std::size_t>(t)] == 0 && e < batch_experts; ++e)
      shouted[static_cast<std::size_t>(t * batch_experts + e)] = e % 3 == 0   ? 900.0f
                                                                 : e % 3 == 1 ? test::not_a_number
                                                                              : -test::infinity;
  for (const any_kind& r : kinds()) {
    INFO(r.name);
    side_inputs side = r.side(values);
    side.mask = values.mask;
    workspace ws;
    assignment out, other;
    r.route(matrix_view<const float>(logits().data(), batch_tokens, batch_experts), side, ws, out,
            false);
    r.route(matrix_view<const float>(shouted.data(), batch_tokens, batch_experts), side, ws, other,
            false);
    CHECK(difference(listed(other), listed(out)) == "");
    index_t chosen_by_masked = 0;
    for (index_t t = 0; t < batch_tokens; ++t)
      for (const expert_id e : out.ids(t))
        chosen_by_masked += values.mask[static_cast<std::size_t>(t)] == 0 && e != no_expert;
    CHECK(chosen_by_masked == 0);
    if (r.whole_batch) continue;
    // A token router decides the others as if nobody were masked.
    assignment open;
    r.route(matrix_view<const float>(logits().data(), batch_tokens, batch_experts), r.side(values),
            ws, open, false);
    for (index_t t = 0; t < batch_tokens; ++t) {
      if (values.mask[static_cast<std::size_t>(t)] == 0) continue;
      REQUIRE(test::bit_difference(out.ids(t), open.ids(t)) == "");
      REQUIRE(test::bit_difference(out.weights(t), open.weights(t)) == "");
    }
  }
}

TEST_CASE("an own k is kept by every kind of router, or refused by its name") {
  const side_values values;
  std::vector<std::int32_t> own;
  for (index_t t = 0; t < batch_tokens; ++t) own.push_back(static_cast<std::int32_t>(t % 3));
  for (const any_kind& r : kinds()) {
    INFO(r.name);
    side_inputs side = r.side(values);
    side.k_of_token = own;
    workspace ws;
    assignment out;
    std::string refused;
    try {
      r.route(matrix_view<const float>(logits().data(), batch_tokens, batch_experts), side, ws, out,
              false);
    } catch (const error& e) {
      refused = e.what();
    }
    if (!refused.empty()) {
      CHECK(refused.find("k_of_token") != std::string::npos);
      continue;
    }
    const index_t shared = r.name == "with shared experts" ? 2 : 0;
    for (index_t t = 0; t < batch_tokens; ++t) {
      index_t made = 0;
      for (const expert_id e : out.ids(t)) made += e != no_expert;
      REQUIRE(made <= own[static_cast<std::size_t>(t)] + shared);
    }
  }
}

TEST_CASE("no kind of router remembers the batch before") {
  const side_values values;
  const std::vector<float> before =
      test::make_logits(test::shape::zipf, 8, batch_tokens, batch_experts);
  for (const any_kind& r : kinds()) {
    INFO(r.name);
    workspace ws;
    assignment out;
    side_inputs masked = r.side(values);
    masked.mask = values.mask;
    r.route(matrix_view<const float>(before.data(), batch_tokens, batch_experts), masked, ws, out,
            false);
    for (std::uint8_t& kept : out.kept_to_change()) kept = 0;  // everything was dropped
    r.route(matrix_view<const float>(logits().data(), batch_tokens, batch_experts), r.side(values),
            ws, out, false);
    CHECK_FALSE(out.drops());
    CHECK(difference(listed(out), chosen(r, logits(), r.side(values))) == "");
  }
}

TEST_CASE("every kind of router takes no tokens") {
  const side_values values;
  for (const any_kind& r : kinds()) {
    INFO(r.name);
    workspace ws;
    assignment out;
    side_inputs side;
    r.route(matrix_view<const float>(logits().data(), 0, batch_experts), side, ws, out, false);
    CHECK(out.tokens() == 0);
    CHECK(out.choices() == 0);
  }
}
