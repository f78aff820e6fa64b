// Small batches by hand, one for each rule that a known system states about its routing: numbers of
// our own, worked out on paper as the sentence above each says.
#include <moeroute/stage/capacity.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_load.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/stage/combine.hpp>
#include <moeroute/stage/dispatch.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/plan_layouts.hpp>
#include <vector>

#include "support/compare.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

namespace rules_test {

using namespace moeroute;

namespace {

using ids = std::vector<expert_id>;
using floats = std::vector<float>;
using flags = std::vector<std::uint8_t>;

assignment chosen(index_t experts, index_t k, const ids& id, const floats& weight) {
  assignment a;
  a.reset(static_cast<index_t>(id.size()) / k, experts, k);
  std::copy(id.begin(), id.end(), a.ids().begin());
  std::copy(weight.begin(), weight.end(), a.weights().begin());
  return a;
}

capacity_result drop(assignment& a, capacity_policy how) {
  workspace ws;
  return apply_capacity(a, how, ws);
}

flags kept(const assignment& a) {
  flags out;
  for (index_t c = 0; c < a.choices(); ++c) out.push_back(a.kept(c));
  return out;
}

constexpr capacity_rule room(index_t n) { return {.formula = capacity_formula::fixed, .count = n}; }

// Three tokens that want two of three experts each; every order of serving them ends elsewhere.
const ids wanted{0, 1, 1, 0, 1, 2};
const floats worth{0.6f, 0.4f, 0.5f, 0.45f, 0.7f, 0.3f};

template <class... L>
double loss_of(const floats& logits, index_t experts, const L&... losses) {
  workspace ws;
  return balance_loss_value<float>({}, test::rows_of(logits, experts), ws, serial{}, losses...)[0];
}

const float ln3 = std::log(3.0f);

}  // namespace

// --- who is dropped ---------------------------------------------------------------------------

TEST_CASE("GShard, Switch, flaxformer: all first choices are served before any second one") {
  // Firsts: token 0 takes expert 0, token 1 expert 1, token 2 finds it full. Seconds: 1 and 0 are
  // full, token 2 gets expert 2.
  assignment a = chosen(3, 2, wanted, worth);
  const capacity_result r = drop(a, {.rule = room(1), .order = drop_order::choice_major});
  CHECK(kept(a) == flags{1, 0, 1, 0, 0, 1});
  CHECK(r.kept == 3);
  CHECK(r.dropped == 3);
}

TEST_CASE("DeepSpeed's top-k by position: token after token, its choices by rank") {
  // Token 0 takes experts 0 and 1; what token 1 wants is gone; token 2 gets expert 2.
  assignment a = chosen(3, 2, wanted, worth);
  drop(a, {.rule = room(1), .order = drop_order::token_major});
  CHECK(kept(a) == flags{1, 1, 0, 0, 0, 1});
}

TEST_CASE("Megatron and DeepSpeed by probability: each expert keeps its largest weights") {
  // Expert 0: 0.6 before 0.45. Expert 1: 0.7 before 0.5 and 0.4. Expert 2: the only one.
  assignment a = chosen(3, 2, wanted, worth);
  drop(a, {.rule = room(1), .order = drop_order::by_weight});
  CHECK(kept(a) == flags{1, 0, 0, 0, 1, 1});
}

TEST_CASE("V-MoE's batch priority: tokens by their largest weight, first choices before second") {
  // Tokens 2 (0.7), 0 (0.6), 1 (0.5): firsts take 1 and 0, token 1 finds 1 full; seconds: 2 is
  // free.
  assignment a = chosen(3, 2, wanted, worth);
  drop(a, {.rule = room(1), .order = drop_order::batch_priority});
  CHECK(kept(a) == flags{1, 0, 0, 0, 1, 1});
  // With a priority of one's own: 1, 0, 2. Then token 1 has expert 1, and token 2 its second.
  assignment b = chosen(3, 2, wanted, worth);
  const floats priority{2.0f, 3.0f, 1.0f};
  drop(b, {.rule = room(1), .order = drop_order::batch_priority, .priority = priority});
  CHECK(kept(b) == flags{1, 0, 1, 0, 0, 1});
}

TEST_CASE("a dropped token keeps its id and weighs nothing, and counts as load before the drop") {
  assignment a = chosen(3, 2, wanted, worth);
  drop(a, {.rule = room(1)});
  CHECK(test::listed(a.ids()) == wanted);
  CHECK(test::listed(a.weights()) == floats{0.6f, 0.0f, 0.5f, 0.0f, 0.0f, 0.3f});
  std::vector<std::int64_t> before(3), after(3);
  count_choices(a, {}, std::span(before));
  count_choices(a, {.drops = drop_stage::after_drop}, std::span(after));
  CHECK(before == std::vector<std::int64_t>{2, 3, 1});
  CHECK(after == std::vector<std::int64_t>{1, 1, 1});
}

TEST_CASE("fairscale and DeepSpeed divide by what is left, NLLB by what was there") {
  // One token, weights 0.6 and 0.3; its second choice is behind two others.
  const ids id{1, 2, 1, 2, 0, 1};
  const floats weight{0.6f, 0.4f, 0.6f, 0.4f, 0.6f, 0.3f};
  assignment left = chosen(3, 2, id, weight), was = left;
  drop(left, {.rule = room(2), .renormalize = renormalization::after_drop});
  drop(was, {.rule = room(2), .renormalize = renormalization::before_drop});
  CHECK(test::difference(left.weights(2), floats{1.0f, 0.0f}, 1e-6) == "");
  CHECK(test::difference(was.weights(2), floats{2.0f / 3.0f, 0.0f}, 1e-6) == "");
}

TEST_CASE("a token whose choices are all dropped comes out as zeros, or as it went in (Switch)") {
  assignment a = chosen(1, 1, {0, 0}, {0.5f, 1.0f});
  drop(a, {.rule = room(1)});
  dispatch_plan p;
  plan(a, p);
  const floats x{1.0f, 2.0f, 3.0f, 4.0f};
  floats slots(2), y(4);
  const matrix_view<const float> in(x.data(), 2, 2);
  const matrix_view<float> room_for(slots.data(), 1, 2), out(y.data(), 2, 2);
  dispatch(in, p, room_for);
  combine(room_for, p, a, out);
  CHECK(y == floats{0.5f, 1.0f, 0.0f, 0.0f});
  combine(room_for, p, a, out, {.lost = lost_token::residual, .x = in});
  CHECK(y == floats{0.5f, 1.0f, 3.0f, 4.0f});
}

TEST_CASE("a capacity that the load does not reach changes nothing (drop_tokens = false)") {
  assignment a = chosen(3, 2, wanted, worth);
  // megablocks with factor 0: as many places as the fullest expert has tokens.
  const capacity_result r =
      drop(a, {.rule = {.formula = capacity_formula::megablocks, .factor = 0.0}});
  CHECK(r.capacity == 3);
  CHECK(r.dropped == 0);
  CHECK(test::listed(a.weights()) == worth);
}

TEST_CASE("a capacity below the minimum is raised to it before tokens are dropped (DeepSpeed)") {
  // ceil(4 / 4 * 0.25) = 1, at least 2: the third and fourth token of expert 3 go.
  assignment a = chosen(4, 1, {3, 3, 3, 3}, {1.0f, 1.0f, 1.0f, 1.0f});
  const capacity_result r =
      drop(a, {.rule = {.formula = capacity_formula::deepspeed, .factor = 0.25, .minimum = 2}});
  CHECK(r.capacity == 2);
  CHECK(kept(a) == flags{1, 1, 0, 0});
}

// --- places in the experts' buffers --------------------------------------------------------------

TEST_CASE("Megatron's permute: slots by expert, tokens in their order, and the way back") {
  assignment a = chosen(3, 2, {2, 0, 1, 2, 0, 1}, {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f});
  dispatch_plan p;
  plan(a, p);
  CHECK(test::listed(p.offsets()) == std::vector<slot_id>{0, 2, 4, 6});
  CHECK(test::listed(p.token_of_slot()) == std::vector<slot_id>{0, 2, 1, 2, 0, 1});
  CHECK(test::listed(p.slot_of_choice()) == std::vector<slot_id>{4, 0, 2, 5, 1, 3});
}

TEST_CASE("Megatron's pad to capacity: every expert has as many slots, the spare ones are empty") {
  assignment a = chosen(3, 1, {2, 2, 0}, {1.0f, 1.0f, 1.0f});
  dispatch_plan p;
  plan(a, p, {.capacity = 2});
  CHECK(test::listed(p.offsets()) == std::vector<slot_id>{0, 2, 4, 6});
  CHECK(test::listed(p.token_of_slot()) ==
        std::vector<slot_id>{2, no_token, no_token, no_token, 0, 1});
}

TEST_CASE("vLLM's and SGLang's aligned blocks: padding says the number of choices") {
  // Expert 0: choice 3. Expert 1: choices 0, 2, 5. Expert 2: none. Expert 3: choices 1, 4.
  assignment a = chosen(4, 2, {1, 3, 1, 0, 3, 1}, floats(6, 0.5f));
  dispatch_plan p;
  plan(a, p, {.block = 2});
  std::vector<std::int32_t> sorted(10), expert(5);
  CHECK(export_aligned_blocks(p, 2, {.sorted_choices = sorted, .block_experts = expert}) == 8);
  CHECK(sorted == std::vector<std::int32_t>{3, 6, 0, 2, 5, 6, 1, 4, 6, 6});
  CHECK(expert == std::vector<std::int32_t>{0, 1, 1, 3, -1});
}

TEST_CASE("DeepEP counts a token once per rank, and once per choice for experts") {
  // Two ranks with two experts each: token 0 goes to rank 0 twice, token 1 to both.
  const assignment a = chosen(4, 2, {0, 1, 1, 3}, floats(4, 0.5f));
  std::vector<std::int32_t> per_expert(4), per_rank(2);
  flags in_rank(4);
  export_once_counts(
      a, {.tokens_per_expert = per_expert, .tokens_per_rank = per_rank, .token_in_rank = in_rank});
  CHECK(per_expert == std::vector<std::int32_t>{1, 2, 0, 1});
  CHECK(per_rank == std::vector<std::int32_t>{2, 1});
  CHECK(in_rank == flags{1, 0, 1, 1});
}

// --- which experts, which weights
// ------------------------------------------------------------------

TEST_CASE("Mixtral divides by the chosen, Switch and Qwen do not; softmax before or after is one") {
  // exp gives 3, 1, 4 and 2, in all 10: experts 2 and 0 with 0.4 and 0.3.
  const floats z{std::log(3.0f), 0.0f, std::log(4.0f), std::log(2.0f)};
  const assignment raw = test::routed(router{softmax{}, top_k{.k = 2}, raw_weights}, z, 4);
  const assignment divided = test::routed(router{softmax{}, top_k{.k = 2}, sum_normalized}, z, 4);
  const assignment after = test::routed(router{softmax_selected{}, top_k{.k = 2}}, z, 4);
  CHECK(test::listed(raw.ids()) == ids{2, 0});
  CHECK(test::difference(raw.weights(), floats{0.4f, 0.3f}, 1e-6) == "");
  CHECK(test::difference(divided.weights(), floats{4.0f / 7.0f, 3.0f / 7.0f}, 1e-6) == "");
  CHECK(test::difference(after.weights(), divided.weights(), 1e-6) == "");
}

TEST_CASE("DeepSeek-V3: groups by their two best, a bias that chooses and does not weigh") {
  // Sigmoids: group 0 has 0.9 and 0.1, group 1 has 0.6 and 0.5. The bias of 0.2 on expert 3 makes
  // group 1 worth 1.3 against 1.0, and expert 3 (0.7) come before expert 2 (0.6).
  const auto logit = [](double p) { return static_cast<float>(std::log(p / (1.0 - p))); };
  const floats z{logit(0.9), logit(0.1), logit(0.6), logit(0.5)}, bias{0.0f, 0.0f, 0.0f, 0.2f};
  const router r{sigmoid{}, top_k{.k = 2, .groups = 2, .topk_group = 1}, sum_normalized,
                 selection_bias(bias)};
  const assignment a = test::routed(r, z, 4);
  CHECK(test::listed(a.ids()) == ids{3, 2});
  CHECK(test::difference(a.weights(), floats{5.0f / 11.0f, 6.0f / 11.0f}, 1e-6) == "");
}

TEST_CASE("expert choice: the experts' columns are full, tokens may have all or none") {
  // Softmax rows (3/4, 1/4), (1/2, 1/2), (1/4, 3/4), (9/10, 1/10); two tokens for each of two.
  const floats z{ln3, 0.0f, 0.0f, 0.0f, 0.0f, ln3, std::log(9.0f), 0.0f};
  const assignment a = test::routed(expert_choice<>{.capacity = {.factor = 1.0}}, z, 2);
  CHECK(test::listed(a.ids()) == ids{0, 1, 1, 0});  // tokens 0, 1, 2, 3
  CHECK(test::difference(a.weights(), floats{0.75f, 0.5f, 0.75f, 0.9f}, 1e-6) == "");
}

TEST_CASE("GShard keeps a second expert of weight g2 with probability min(1, 2 g2)") {
  // Both with 1/2: always. With 1/8 for the second: in a quarter of 4000, within 4.5 deviations.
  constexpr index_t tokens = 4000;
  floats even(2 * tokens, 0.0f), uneven;
  for (index_t t = 0; t < tokens; ++t) uneven.insert(uneven.end(), {std::log(7.0f), 0.0f});
  const gshard_top2 rule{.policy = second_expert::random};
  const auto seconds = [&](const floats& z) {
    const assignment a = test::routed(rule, z, 2, {.seed = 3});
    index_t n = 0;
    for (index_t t = 0; t < tokens; ++t) n += a.ids(t)[1] != no_expert;
    return n;
  };
  CHECK(seconds(even) == tokens);
  CHECK(std::abs(static_cast<double>(seconds(uneven)) - 1000.0) < 125.0);
}

// --- losses
// ------------------------------------------------------------------------------------------

TEST_CASE("Switch's loss is E times the sum of fraction times mean probability") {
  // Rows (3/4, 1/4) twice and (1/4, 3/4) once: sums 7/4 and 5/4; counts 2 and 1.
  const floats z{ln3, 0.0f, ln3, 0.0f, 0.0f, ln3};
  const std::vector<double> counts{2.0, 1.0};
  const double expected = 2.0 * (2.0 / 3.0 * 1.75 / 3.0 + 1.0 / 3.0 * 1.25 / 3.0);
  CHECK(std::abs(loss_of(z, 2, switch_loss::first_choice(1.0, counts)) - expected) < 1e-6);
  // transformers with k = 2 adds all choices up: both experts have 3.
  const std::vector<double> both{3.0, 3.0};
  CHECK(std::abs(loss_of(z, 2, switch_loss::hugging_face(1.0, both)) - 2.0) < 1e-6);
  CHECK(std::abs(loss_of(z, 2, switch_loss::megatron(1.0, both, 2)) - 1.0) < 1e-6);
  // MegaBlocks: the mean over the layers.
  CHECK(std::abs(loss_of(z, 2, switch_loss::megablocks(1.0, both, 2, 4)) - 0.25) < 1e-6);
}

TEST_CASE("ST-MoE's and flaxformer's z-loss is the mean of the squared log of the sum") {
  // Sums 2 and 4.
  const floats z{0.0f, 0.0f, ln3, 0.0f};
  const double expected = (std::pow(std::log(2.0), 2) + std::pow(std::log(4.0), 2)) / 2.0;
  CHECK(std::abs(loss_of(z, 2, router_z_loss{.coefficient = 1.0}) - expected) < 1e-6);
}

TEST_CASE("V-MoE's importance is the squared variation of the summed probabilities") {
  // Sums 7/4 and 5/4: mean 3/2, deviation 1/4.
  const floats z{ln3, 0.0f, ln3, 0.0f, 0.0f, ln3};
  CHECK(std::abs(loss_of(z, 2, importance_loss{.coefficient = 1.0}) - 1.0 / 36.0) < 1e-6);
  CHECK(std::abs(loss_of(z, 2, importance_loss{1.0, variance::unbiased}) - 1.0 / 18.0) < 1e-6);
}

TEST_CASE("the load loss: the chance to be chosen under new noise, by Shazeer and by V-MoE") {
  // Logits 2, 1, -1 with sigma 2 and no noise drawn, k = 1. Shazeer: the chosen one must stay above
  // the second (1), the others exceed the first (2). V-MoE: all against the first.
  const floats z{2.0f, 1.0f, -1.0f}, sigma{2.0f};
  const auto cdf = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  const auto variation = [](std::vector<double> load) {
    double mean = 0.0, squares = 0.0;
    for (const double x : load) mean += x / 3.0;
    for (const double x : load) squares += (x - mean) * (x - mean) / 3.0;
    return squares / (mean * mean);
  };
  const auto loss = [&](load_threshold threshold) {
    workspace ws;
    const matrix_view<const float> rows(z.data(), 1, 3), one(sigma.data(), 1, 1);
    return noisy_load_loss<float>({.coefficient = 1.0, .k = 1, .threshold = threshold},
                                  {.gradient = gradient_to::nowhere}, rows, rows, one, {}, ws,
                                  serial{});
  };
  CHECK(std::abs(loss(load_threshold::kth) - variation({cdf(0.0), cdf(-0.5), cdf(-1.5)})) < 1e-5);
  CHECK(std::abs(loss(load_threshold::without_self) - variation({cdf(0.5), cdf(-0.5), cdf(-1.5)})) <
        1e-5);
}

}  // namespace rules_test
