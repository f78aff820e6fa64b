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
#include <span>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"
#include "support/strided.hpp"

using namespace moeroute;

namespace {

// Side inputs that every router may look at, by value.
struct side_values {
  std::vector<std::int32_t> token_ids;
  std::vector<std::uint8_t> mask, modality;
  std::vector<float> noise;

  side_values(index_t tokens, index_t experts) {
    test::random rng(1);
    for (index_t t = 0; t < tokens; ++t) {
      token_ids.push_back(static_cast<std::int32_t>(rng.below(9)));
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      modality.push_back(rng.below(2) != 0);
    }
    noise = test::numbers(rng, tokens * experts);
  }
};

// A router of any kind behind one face.
struct any_kind {
  std::string name;
  bool whole_batch = false;
  bool needs_modality = false, needs_token_ids = false, needs_noise = false;
  std::function<void(matrix_view<const float>, const side_inputs&, workspace&, assignment&, bool)>
      route;
  std::function<index_t(index_t)> own_k;  // the most that a token may ask for, of so many columns

  // For the first `tokens` of v.
  side_inputs side(const side_values& v, index_t tokens) const {
    const auto n = static_cast<std::size_t>(tokens);
    side_inputs s;
    s.seed = 5;
    s.step = 3;
    if (needs_modality) s.modality = std::span(v.modality).first(n);
    if (needs_token_ids) s.token_ids = std::span(v.token_ids).first(n);
    if (needs_noise)
      s.noise_logits = matrix_view<const float>(
          v.noise.data(), tokens, static_cast<index_t>(v.noise.size() / v.token_ids.size()));
    return s;
  }
};

template <class Router>
any_kind kind(std::string name, Router router) {
  return {.name = std::move(name),
          .whole_batch = batch_router<Router>,
          .route =
              [router](matrix_view<const float> z, const side_inputs& side, workspace& ws,
                       assignment& out, bool last_to_first) {
                if (last_to_first)
                  moeroute::route(router, z, side, ws, out, test::backwards{});
                else
                  moeroute::route(router, z, side, ws, out);
              },
          .own_k = [router](index_t columns) { return side_use_of(router, columns).own_k; }};
}

// A batch, what routers of every kind need for it, and these routers.
struct router_batch {
  index_t tokens, experts;
  side_values values;
  std::vector<float> logits, bias;
  expert_table table;
  routing_record<std::uint8_t> record;
  std::vector<any_kind> kinds;

  router_batch(index_t t, index_t e) : tokens(t), experts(e), values(t, e) {
    logits = test::make_logits(test::shape::normal, 3, tokens, experts);
    test::random rng(2);
    bias = test::numbers(rng, experts);
    for (float& b : bias) b *= 0.1f;
    table = random_table(9, 3, experts, 7);
    record.record(test::routed(random_choice{3}, test::zeros(tokens, experts), experts));
    kinds = every_kind();
  }
  router_batch(const router_batch&) = delete;
  router_batch& operator=(const router_batch&) = delete;

  matrix_view<const float> rows() const { return {logits.data(), tokens, experts}; }

 private:
  std::vector<any_kind> every_kind() const;
};

// Less than two registers of experts and less than three blocks of tokens, two for each expert.
const router_batch& small_batch() {
  static const router_batch b(40, 20);
  return b;
}

// More experts than two words of a mask have bits, and a last block of seven tokens: none of BASE,
// whose experts take equally many.
const router_batch& large_batch() {
  static const router_batch b(71, 132);
  return b;
}

std::vector<any_kind> router_batch::every_kind() const {
  using softmax_router = router<softmax>;
  std::vector<any_kind> list;
  list.push_back(kind("softmax top-k", softmax_router{.selection = {.k = 3}}));
  list.push_back(kind("grouped sigmoid with a bias",
                      router{sigmoid{}, top_k{.k = 3, .groups = 4, .topk_group = 2}, sum_normalized,
                             selection_bias(bias)}));
  // By name: clang 16 makes a wrong address of a router that is a member of an unnamed one.
  const softmax_router two_best{.selection = {.k = 2}}, three_best{.selection = {.k = 3}};
  const top_p nucleus{.p = 0.6f};
  list.push_back(kind("two modalities", by_modality<softmax_router>{two_best, two_best, 8}));
  list.back().needs_modality = true;
  list.push_back(kind("with shared experts", with_shared<softmax_router>{two_best, 2}));
  list.push_back(kind("product keys", product_keys<>{.choices = 4}));
  list.push_back(kind("random", random_choice{3}));
  list.push_back(kind("GShard's second by sampling", gshard_top2{second_expert::sampling}));
  list.push_back(kind("SparseMixer", sparsemixer{}));
  list.push_back(kind("a table", table_router<softmax>{.table = &table}));
  list.back().needs_token_ids = true;
  list.push_back(kind("a replay", replay<softmax, std::uint8_t>{.record = &record}));
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
  list.push_back(kind(
      "a bias per class",
      router{sigmoid{}, class_bias<>{{.k = 3}, {selection_bias(bias), selection_bias(bias)}}}));
  list.back().needs_modality = true;
  list.push_back(kind("standardised", transformed{standardized{2.0f}, two_best}));
  list.push_back(kind("candidates by lot", transformed{candidates{6}, nucleus}));
  list.push_back(kind("two logits for one", transformed{sigmoid_sum{}, three_best}));
  list.push_back(
      kind("weights of other logits", weighed_by_second<softmax_router, sigmoid>{two_best}));
  list.push_back(kind("a percentile of the batch", batch_percentile<>{.max_k = 5}));
  list.push_back(kind("expert choice", expert_choice<>{.normalize = token_renormalization::sum}));
  list.push_back(kind("expert choice of sigmoids, capped",
                      expert_choice<sigmoid>{.capacity = {.factor = 3.0}, .most_experts = 2}));
  list.push_back(kind("Sinkhorn", sinkhorn{.k = 2}));
  list.push_back(kind("selective Sinkhorn", selective_sinkhorn{.k = 2, .probability = 1.0f}));
  list.push_back(kind("experts choose from a Sinkhorn plan", sinkhorn_expert_choice{}));
  list.push_back(kind("sparse transport", sparse_transport{}));
  list.push_back(kind("tokens choose from sparse transport", sparse_transport_token_choice{}));
  if (tokens % experts != 0) return list;
  list.push_back(kind("BASE by auction", base_assignment{}));
  list.push_back(kind("BASE by optimum", base_assignment{.solver = assignment_solver::optimal}));
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

choices chosen(const any_kind& r, matrix_view<const float> z, const side_inputs& side,
               bool last_to_first = false) {
  workspace ws;
  assignment out;
  r.route(z, side, ws, out, last_to_first);
  return listed(out);
}

// What is not the same for a token in two assignments.
std::string token_difference(const assignment& a, const assignment& b, index_t t) {
  if (const std::string ids = test::bit_difference(a.ids(t), b.ids(t)); !ids.empty())
    return "token " + std::to_string(t) + ": " + ids;
  const std::string weights = test::bit_difference(a.weights(t), b.weights(t));
  return weights.empty() ? "" : "token " + std::to_string(t) + ": " + weights;
}

// Calls f(batch, router) for every kind of router and both batches.
template <class F>
void for_each_kind(F&& f) {
  for (const router_batch* b : {&small_batch(), &large_batch()})
    for (const any_kind& r : b->kinds) {
      INFO(r.name << ", E = " << b->experts);
      f(*b, r);
    }
}

}  // namespace

TEST_CASE("every kind of router reads logits and noise wherever their rows lie") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    CHECK(test::differs_by_stride([&](test::layout& l) {
            side_inputs side = r.side(b.values, b.tokens);
            if (r.needs_noise) side.noise_logits = l.in(b.values.noise, b.tokens, b.experts);
            const auto z = l.in(b.logits, b.tokens, b.experts);
            workspace ws;
            assignment out;
            r.route(z, side, ws, out, false);
            l.result(out.ids());
            l.result(out.weights());
          }) == "");
  });
}

TEST_CASE("every kind of router decides the same in whatever order its pieces run") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    const side_inputs side = r.side(b.values, b.tokens);
    CHECK(difference(chosen(r, b.rows(), side, true), chosen(r, b.rows(), side)) == "");
  });
}

TEST_CASE("what a masked token says matters to no kind of router, and it has no choices") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    const std::vector<std::uint8_t>& mask = b.values.mask;
    std::vector<float> shouted = b.logits;
    for (index_t t = 0; t < b.tokens; ++t)
      for (index_t e = 0; mask[static_cast<std::size_t>(t)] == 0 && e < b.experts; ++e)
        shouted[static_cast<std::size_t>(t * b.experts + e)] = e % 3 == 0   ? 900.0f
                                                               : e % 3 == 1 ? test::not_a_number
                                                                            : -test::infinity;
    side_inputs side = r.side(b.values, b.tokens);
    side.mask = mask;
    workspace ws;
    assignment out, other;
    r.route(b.rows(), side, ws, out, false);
    r.route(matrix_view<const float>(shouted.data(), b.tokens, b.experts), side, ws, other, false);
    CHECK(difference(listed(other), listed(out)) == "");
    index_t chosen_by_masked = 0;
    for (index_t t = 0; t < b.tokens; ++t)
      for (const expert_id e : out.ids(t))
        chosen_by_masked += mask[static_cast<std::size_t>(t)] == 0 && e != no_expert;
    CHECK(chosen_by_masked == 0);
    if (r.whole_batch) return;
    // A token router decides the others as if nobody were masked.
    assignment open;
    r.route(b.rows(), r.side(b.values, b.tokens), ws, open, false);
    for (index_t t = 0; t < b.tokens; ++t)
      if (mask[static_cast<std::size_t>(t)] != 0) REQUIRE(token_difference(out, open, t) == "");
  });
}

TEST_CASE("an own k is kept by every kind of router, or refused by its name") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    // All tokens have 0, 1 or 2, then each its own; masked ones too.
    std::vector<std::int32_t> own(static_cast<std::size_t>(b.tokens), 0);
    side_inputs side = r.side(b.values, b.tokens);
    side.k_of_token = own;
    workspace ws;
    assignment same[3], out, open;
    const auto most = static_cast<std::int32_t>(std::min<index_t>(2, r.own_k(b.experts)));
    if (most == 0) {
      CHECK(test::refusal([&] { r.route(b.rows(), side, ws, out, false); }).find("k_of_token") !=
            std::string::npos);
      return;
    }
    r.route(b.rows(), r.side(b.values, b.tokens), ws, open, false);
    const std::size_t shared = r.name == "with shared experts" ? 2 : 0;
    for (std::int32_t k = 0; k <= most; ++k) {
      std::fill(own.begin(), own.end(), k);
      r.route(b.rows(), side, ws, same[k], false);
    }
    for (index_t t = 0; t < b.tokens; ++t)
      own[static_cast<std::size_t>(t)] = static_cast<std::int32_t>((t + t / 16) % (most + 1));
    side.mask = b.values.mask;
    r.route(b.rows(), side, ws, out, false);
    for (index_t t = 0; t < b.tokens; ++t) {
      const auto k = static_cast<std::size_t>(own[static_cast<std::size_t>(t)]);
      const auto made = [](std::span<const expert_id> ids) {
        return static_cast<std::size_t>(
            std::count_if(ids.begin(), ids.end(), [](expert_id e) { return e != no_expert; }));
      };
      if (side.masked(t)) {
        REQUIRE(made(out.ids(t)) == 0);
        continue;
      }
      REQUIRE(made(out.ids(t)) <= k + shared);
      if (r.whole_batch) continue;  // what one may not take is left to others
      // What others may choose does not matter, and the first choices are those of who may have
      // all.
      REQUIRE(made(out.ids(t)) == std::min(k + shared, made(open.ids(t))));
      REQUIRE(token_difference(out, same[k], t) == "");
      for (std::size_t c = 0; c < std::min(k, out.ids(t).size()); ++c)
        REQUIRE(out.ids(t)[c] == open.ids(t)[c]);
    }
  });
}

TEST_CASE("to every kind of router a logit that is no number is one of -inf") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    // Two logits of one expert, or of a pair, are another matter.
    if (r.name == "two logits for one" || r.name == "product keys" ||
        r.name == "weights of other logits")
      return;
    test::random rng(12);
    std::vector<float> never = b.logits, none = b.logits;
    for (std::size_t i = 0; i < never.size(); ++i)
      if (rng.below(5) == 0) {
        never[i] = -test::infinity;
        none[i] = rng.below(2) == 0 ? test::not_a_number : -test::infinity;
      }
    const side_inputs side = r.side(b.values, b.tokens);
    const choices with_infinities =
        chosen(r, matrix_view<const float>(never.data(), b.tokens, b.experts), side);
    CHECK(difference(chosen(r, matrix_view<const float>(none.data(), b.tokens, b.experts), side),
                     with_infinities) == "");
  });
}

TEST_CASE("a percentile of the batch is one of the logits that are there") {
  const batch_percentile<> rule{.max_k = 5};
  const router_batch& b = small_batch();
  std::vector<float> wider;
  for (index_t t = 0; t < b.tokens; ++t) {
    wider.insert(wider.end(), b.logits.begin() + t * b.experts,
                 b.logits.begin() + (t + 1) * b.experts);
    wider.push_back(-test::infinity);
  }
  const assignment with = test::routed(rule, wider, b.experts + 1),
                   without = test::routed(rule, b.logits, b.experts);
  CHECK(difference(listed(with), listed(without)) == "");
  CHECK(without.choices() > 0);
}

TEST_CASE("a token router decides the first tokens as if no others followed, wherever rows lie") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    if (r.whole_batch) return;
    const index_t stride = b.experts + 5;
    std::vector<float> spread(static_cast<std::size_t>(b.tokens * stride), test::not_a_number);
    for (index_t t = 0; t < b.tokens; ++t)
      std::copy_n(b.logits.data() + t * b.experts, b.experts, spread.data() + t * stride);
    workspace ws;
    assignment all, some;
    r.route(b.rows(), r.side(b.values, b.tokens), ws, all, false);
    for (const index_t first : {1, 2, 3, 5, 9, 15, 16, 17, 33}) {
      r.route(matrix_view<const float>(spread.data(), first, b.experts, stride),
              r.side(b.values, first), ws, some, false);
      REQUIRE(some.tokens() == first);
      for (index_t t = 0; t < first; ++t) REQUIRE(token_difference(some, all, t) == "");
    }
  });
}

TEST_CASE("no kind of router remembers the batch before") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    const std::vector<float> before = test::make_logits(test::shape::zipf, 8, b.tokens, b.experts);
    workspace ws;
    assignment out;
    side_inputs masked = r.side(b.values, b.tokens);
    masked.mask = b.values.mask;
    r.route(matrix_view<const float>(before.data(), b.tokens, b.experts), masked, ws, out, false);
    for (std::uint8_t& kept : out.kept_to_change()) kept = 0;  // everything was dropped
    const side_inputs side = r.side(b.values, b.tokens);
    r.route(b.rows(), side, ws, out, false);
    CHECK_FALSE(out.drops());
    CHECK(difference(listed(out), chosen(r, b.rows(), side)) == "");
  });
}

TEST_CASE("no kind of router remembers a larger batch of more experts, or a smaller one") {
  workspace ws;
  assignment out;
  for (std::size_t i = 0; i < small_batch().kinds.size(); ++i)
    for (const router_batch* b : {&small_batch(), &large_batch(), &small_batch()}) {
      if (i >= b->kinds.size()) continue;
      const any_kind& r = b->kinds[i];
      INFO(r.name << ", E = " << b->experts);
      const side_inputs side = r.side(b->values, b->tokens);
      r.route(b->rows(), side, ws, out, false);
      CHECK(difference(listed(out), chosen(r, b->rows(), side)) == "");
    }
}

TEST_CASE("every kind of router takes no tokens") {
  for_each_kind([](const router_batch& b, const any_kind& r) {
    workspace ws;
    assignment out;
    side_inputs side;
    r.route(matrix_view<const float>(b.logits.data(), 0, b.experts), side, ws, out, false);
    CHECK(out.tokens() == 0);
    CHECK(out.choices() == 0);
  });
}

TEST_CASE("a percentile of the batch with every option at once counts what double counts") {
  test::random rng(53);
  const router_batch& b = small_batch();
  for (index_t round = 0; round < test::sized(200, 70); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(b.experts), tokens = 1 + rng.below(30);
    std::vector<float> z = test::make_logits(coin() ? test::shape::normal : test::shape::quantised,
                                             rng.bits() % 1000, tokens, experts);
    for (float& x : z)
      if (const auto odd = rng.below(20); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    batch_percentile<> rule{.quantile = rng.below(9) == 0 ? 1.0f : rng.uniform()};
    rule.min_k = 1 + rng.below(experts);
    rule.max_k = coin() ? 0 : rule.min_k + rng.below(experts - rule.min_k + 1);
    if (coin()) rule.weight = sum_normalized;
    if (coin()) rule.weight.scale = 2.5f;
    const index_t most = rule.max_k > 0 ? rule.max_k : experts;
    std::vector<std::uint8_t> mask;
    std::vector<std::int32_t> own;
    for (index_t t = 0; t < tokens; ++t) {
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      own.push_back(static_cast<std::int32_t>(rng.below(most + 1)));
    }
    side_inputs side;
    if (coin()) side.mask = mask;
    if (coin()) side.k_of_token = own;

    std::vector<double> there;
    std::vector<std::vector<double>> score;
    for (index_t t = 0; t < tokens; ++t) {
      const float* const row = z.data() + t * experts;
      const std::vector<expert_id> order = oracle::order(row, experts);
      score.push_back(oracle::softmax(row, experts, order));
      for (const expert_id e : order)
        if (!side.masked(t)) there.push_back(score.back()[static_cast<std::size_t>(e)]);
    }
    std::sort(there.begin(), there.end());
    double least = 0.0;
    if (!there.empty()) {
      const double place =
          static_cast<double>(there.size() - 1) * static_cast<double>(rule.quantile);
      const auto low = static_cast<std::size_t>(place);
      const double above = there[std::min(low + 1, there.size() - 1)];
      least = there[low] + (place - static_cast<double>(low)) * (above - there[low]);
    }
    const assignment out = test::routed(rule, z, experts, side);
    std::string broken;
    for (index_t t = 0; t < tokens; ++t) {
      const std::vector<expert_id> order = oracle::order(z.data() + t * experts, experts);
      const auto& s = score[static_cast<std::size_t>(t)];
      // What rounding may take for the percentile, or not.
      std::int64_t sure = 0, perhaps = 0;
      for (const expert_id e : order) {
        sure += s[static_cast<std::size_t>(e)] > least * (1.0 + 1e-5);
        perhaps += s[static_cast<std::size_t>(e)] > least * (1.0 - 1e-5);
      }
      const auto bounded = [&](std::int64_t n) {
        n = std::clamp<std::int64_t>(n, std::min(rule.min_k, most), most);
        if (!side.k_of_token.empty()) n = std::min<std::int64_t>(n, own[std::size_t(t)]);
        return side.masked(t) ? 0 : std::min<std::int64_t>(n, std::int64_t(order.size()));
      };
      const auto n = static_cast<std::int64_t>(out.ids(t).size());
      if (n < bounded(sure) || n > bounded(perhaps)) broken = "count of " + std::to_string(t);
      double sum = 0.0;
      for (std::size_t r = 0; r < std::min(out.ids(t).size(), order.size()); ++r)
        sum += s[static_cast<std::size_t>(order[r])];
      for (std::size_t r = 0; r < std::min(out.ids(t).size(), order.size()); ++r) {
        if (out.ids(t)[r] != order[r]) broken = "id of " + std::to_string(t);
        const double w = s[static_cast<std::size_t>(order[r])] *
                         static_cast<double>(rule.weight.scale) /
                         (rule.weight.normalize == normalization::sum ? sum : 1.0);
        if (std::abs(static_cast<double>(out.weights(t)[r]) - w) > 1e-5 * w)
          broken = "weight of " + std::to_string(t);
      }
    }
    INFO("round " << round << " T=" << tokens << " E=" << experts << " quantile " << rule.quantile
                  << " min " << rule.min_k << " max " << rule.max_k);
    CHECK(broken == "");
  }
}
