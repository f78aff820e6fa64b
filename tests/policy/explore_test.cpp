#include <moeroute/policy/row/explore.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <limits>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/compose.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/stage/route.hpp>
#include <vector>

#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/sized.hpp"
#include "support/threads.hpp"

using namespace moeroute;

namespace {

std::vector<float> explore_logits(index_t tokens, index_t experts, std::uint64_t seed) {
  test::random rng(seed << 32);
  std::vector<float> z(static_cast<std::size_t>(tokens * experts));
  for (float& v : z) v = rng.normal();
  return z;
}
template <class Router, class Exec = serial>
assignment explored(const Router& router, const std::vector<float>& z, index_t experts,
                    const side_inputs& side, const Exec& exec = {}) {
  workspace ws;
  assignment out;
  route(router,
        matrix_view<const float>(z.data(), static_cast<index_t>(z.size()) / experts, experts), side,
        ws, out, exec);
  return out;
}
const router<softmax>& greedy() {
  static const router<softmax> rule{.selection = {.k = 3}, .weight = sum_normalized};
  return rule;
}

}  // namespace

TEST_CASE("exploration with epsilon 0 has the bits of the router") {
  for (const index_t tokens : {1, 3, 16, 50}) {
    const auto z = explore_logits(tokens, 11, 1);
    const assignment plain = explored(greedy(), z, 11, {});
    const assignment same = explored(explore<router<softmax>>{greedy(), 0.0f}, z, 11, {.seed = 4});
    CHECK(test::bit_difference(same.ids(), plain.ids()) == "");
    CHECK(test::bit_difference(same.weights(), plain.weights()) == "");
  }
}

TEST_CASE("a token that explores draws k of what it may take, wherever what it may not stands") {
  constexpr index_t tokens = 6000, experts = 7, k = 3;
  std::vector<float> z(tokens * experts, 0.0f);
  for (index_t t = 0; t < tokens; ++t) {
    z[static_cast<std::size_t>(t * experts)] = -std::numeric_limits<float>::infinity();
    z[static_cast<std::size_t>(t * experts + 3)] = std::numeric_limits<float>::quiet_NaN();
  }
  const assignment a = explored(explore<router<softmax>>{greedy(), 1.0f}, z, experts, {.seed = 6});
  std::vector<int> drawn(experts, 0);
  for (const expert_id e : a.ids()) {
    REQUIRE(e != no_expert);
    ++drawn[static_cast<std::size_t>(e)];
  }
  for (std::size_t e = 0; e < experts; ++e) {
    const double share = e == 0 || e == 3 ? 0.0 : double{k} / 5.0;
    CHECK(std::abs(drawn[e] / double{tokens} - share) <=
          4.0 * std::sqrt(0.24 / tokens) * (share > 0.0));
  }
}

TEST_CASE("rank r of a token is included with probability (1 - epsilon) [r < k] + epsilon k / m") {
  constexpr index_t tokens = test::sized(40000, 10000), experts = 9, k = 3;
  std::vector<float> z;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      // The last expert is masked; the others have the ranks 2, 3, ..., 7, 0, 1.
      z.push_back(e == experts - 1 ? -std::numeric_limits<float>::infinity()
                                   : -static_cast<float>((e + 2) % 8));
  for (const float epsilon : {0.1f, 0.5f, 1.0f}) {
    const assignment a =
        explored(explore<router<softmax>>{greedy(), epsilon}, z, experts, {.seed = 7});
    std::vector<double> count(experts);
    for (index_t t = 0; t < tokens; ++t) {
      std::vector<expert_id> ids(a.ids(t).begin(), a.ids(t).end());
      for (const expert_id e : ids) count[static_cast<std::size_t>(e)] += 1.0 / tokens;
      std::sort(ids.begin(), ids.end());
      REQUIRE(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
    }
    CHECK(count[experts - 1] == 0.0);
    for (index_t e = 0; e + 1 < experts; ++e) {
      const double p = (1.0 - double{epsilon}) * ((e + 2) % 8 < k ? 1.0 : 0.0) +
                       double{epsilon} * double{k} / 8.0;
      CHECK(std::abs(count[static_cast<std::size_t>(e)] - p) <
            5.0 * std::sqrt(p * (1.0 - p) / tokens) + 1e-9);
    }
    if (epsilon < 1.0f) continue;
    // What a token draws second says nothing of what the next one draws first.
    int alike = 0;
    for (index_t t = 0; t + 1 < tokens; ++t) alike += a.ids(t)[1] == a.ids(t + 1)[0];
    CHECK(std::abs(alike / double{tokens} - 1.0 / 8) < 2.0 / std::sqrt(double{tokens}));
  }
}

TEST_CASE(
    "exploration is a token's own: whoever is beside it, on any number of threads, replayed") {
  const index_t tokens = 5000, experts = 20;
  const auto z = explore_logits(tokens, experts, 2);
  const explore<router<softmax>> rule{greedy(), 0.3f};
  const assignment one = explored(rule, z, experts, {.seed = 5, .step = 2});
  const assignment more =
      explored(rule, z, experts, {.seed = 5, .step = 2}, test::several_threads{3});
  CHECK(test::bit_difference(more.ids(), one.ids()) == "");
  CHECK(test::bit_difference(more.weights(), one.weights()) == "");
  // Few that explore are weighed one by one, many together.
  for (const index_t n : {1, 2, 7, 16, 100}) {
    const std::vector<float> head(z.begin(), z.begin() + n * experts);
    const assignment few = explored(rule, head, experts, {.seed = 5, .step = 2});
    CHECK(test::bit_difference(few.ids(), one.ids().first(few.ids().size())) == "");
    CHECK(test::bit_difference(few.weights(), one.weights().first(few.weights().size())) == "");
  }
  for (const side_inputs& other : {side_inputs{.seed = 6, .step = 2}, {.seed = 5, .step = 3}})
    CHECK(test::bit_difference(explored(rule, z, experts, other).ids(), one.ids()) != "");
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(tokens), 1);
  mask[3] = 0;
  const assignment masked = explored(rule, z, experts, {.mask = mask, .seed = 5, .step = 2});
  for (index_t t = 0; t < 8; ++t)
    for (std::size_t r = 0; r < 3; ++r)
      CHECK(masked.ids(t)[r] == (t == 3 ? no_expert : one.ids(t)[r]));
}

TEST_CASE("drawn experts are weighed as the router weighs, or evenly where it has no rule for it") {
  const index_t tokens = 300, experts = 20;
  const auto z = explore_logits(tokens, experts, 3);
  const auto check = [&](const auto& rule) {
    const assignment drawn =
        explored(explore<std::remove_cvref_t<decltype(rule)>>{rule, 0.6f}, z, experts, {.seed = 5});
    routing_record<std::int32_t> record;
    record.record(drawn);
    const assignment expected = explored(
        replay<std::remove_cvref_t<decltype(rule.score)>, std::int32_t>{
            &record, rule.score, rule.weight, rule.transform},
        z, experts, {});
    CHECK(test::bit_difference(drawn.ids(), expected.ids()) == "");
    CHECK(test::difference(drawn.weights(), expected.weights(), 2e-7) == "");
  };
  check(greedy());
  check(router<softmax>{.selection = {.k = 2}, .transform = {.temperature = 2.0f}});
  check(router<sigmoid>{.selection = {.k = 4}, .weight = sum_normalized});
  auto few = z;
  for (std::size_t i = 0; i < few.size(); ++i)
    if (i / experts % 3 == 1 && i % experts > 2) few[i] = -std::numeric_limits<float>::infinity();
  const assignment even =
      explored(explore<random_choice>{random_choice{4}, 0.5f}, few, experts, {});
  index_t none = 0;
  for (std::size_t c = 0; c < even.ids().size(); ++c) {
    none += even.ids()[c] == no_expert;
    CHECK(even.weights()[c] == (even.ids()[c] == no_expert ? 0.0f : 0.25f));
  }
  CHECK(none > 0);
}

TEST_CASE("a batch that explores has the same experts for every token, but for masked ones") {
  const index_t tokens = 40, experts = 12;
  auto z = explore_logits(tokens, experts, 4);
  const explore<router<softmax>> rule{greedy(), 0.5f, exploration_scope::batch};
  int exploring = 0;
  for (std::uint64_t step = 0; step < 200; ++step) {
    const assignment a = explored(rule, z, experts, {.seed = 1, .step = step});
    const bool all_alike = [&] {
      for (index_t t = 1; t < tokens; ++t)
        if (!std::equal(a.ids(t).begin(), a.ids(t).end(), a.ids(0).begin())) return false;
      return true;
    }();
    exploring += all_alike;
    if (!all_alike)
      CHECK(test::bit_difference(a.ids(), explored(greedy(), z, experts, {}).ids()) == "");
  }
  CHECK(std::abs(exploring - 100) < 40);
  const explore<router<softmax>> always{greedy(), 1.0f, exploration_scope::batch};
  const assignment first = explored(always, z, experts, {});
  const auto ids = first.ids(0);
  const std::vector<expert_id> drawn(ids.begin(), ids.end());
  z[static_cast<std::size_t>(5 * experts + drawn[1])] = std::numeric_limits<float>::quiet_NaN();
  const assignment a = explored(always, z, experts, {});
  CHECK(a.ids(5)[0] == drawn[0]);
  CHECK(a.ids(5)[1] == no_expert);
  CHECK(a.weights(5)[1] == 0.0f);
  CHECK(std::abs(a.weights(5)[0] + a.weights(5)[2] - 1.0f) < 1e-6f);
}

TEST_CASE("a token that explores keeps its own k, and no more experts than may be had") {
  const index_t tokens = 30, experts = 8;
  auto z = explore_logits(tokens, experts, 5);
  for (std::size_t i = 0; i < z.size(); ++i)
    if (i % 8 > 1) z[i] = -std::numeric_limits<float>::infinity();
  const explore<router<softmax>> rule{greedy(), 1.0f};
  std::vector<std::int32_t> own(static_cast<std::size_t>(tokens));
  for (std::size_t t = 0; t < own.size(); ++t) own[t] = static_cast<std::int32_t>(t % 4);
  const assignment a = explored(rule, z, experts, {.k_of_token = own});
  for (index_t t = 0; t < tokens; ++t) {
    index_t there = 0;
    float sum = 0.0f;
    for (std::size_t r = 0; r < 3; ++r) {
      there += a.ids(t)[r] != no_expert;
      CHECK(a.ids(t)[r] < 2);
      sum += a.weights(t)[r];
    }
    CHECK(there == std::min<index_t>(2, t % 4));
    CHECK(std::abs(sum - (there > 0 ? 1.0f : 0.0f)) < 1e-6f);
  }
  CHECK(test::refusal([&] {
          explored(explore<router<softmax>>{greedy(), 1.5f}, z, experts, {});
        }) == "moeroute::explore: epsilon is 1.500000, expected 0 to 1");
}

TEST_CASE("with every option at once exploration is a coin and a draw without repetition") {
  test::random rng(61);
  for (index_t round = 0; round < test::sized(200, 40); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(40), tokens = 1 + rng.below(40);
    const auto k = static_cast<int>(1 + rng.below(std::min<index_t>(experts, 18)));
    std::vector<float> z = explore_logits(tokens, experts, 100 + static_cast<std::uint64_t>(round)),
                       hidden(static_cast<std::size_t>(experts), 0.0f);
    for (float& x : z)
      if (const auto odd = rng.below(8); odd < 2)
        x = odd == 0 ? -std::numeric_limits<float>::infinity()
                     : std::numeric_limits<float>::quiet_NaN();
    hidden[static_cast<std::size_t>(rng.below(experts))] = -std::numeric_limits<float>::infinity();
    explore<router<softmax>> rule{{.selection = {.k = k}}};
    if (coin()) rule.router.weight = sum_normalized;
    if (coin()) rule.router.transform = {.temperature = 2.0f, .add = hidden};
    if (coin()) rule.scope = exploration_scope::batch;
    const bool together = rule.scope == exploration_scope::batch;
    side_inputs side{.seed = rng.bits(), .step = static_cast<std::uint64_t>(rng.below(1000))};
    const auto stream = [&](detail::random_use use) {
      return detail::random_stream(use, side.step);
    };
    const auto place = [&](index_t t) { return together ? 0 : static_cast<std::uint64_t>(t); };
    const auto thrown = [&](index_t t) {
      return random_u01(side.seed, stream(detail::random_use::explore), place(t));
    };
    // Also exactly what a token has thrown, and the next number above.
    const float own_coin = thrown(rng.below(tokens)),
                epsilons[] = {0.0f, 0.5f, 1.0f, own_coin, std::nextafter(own_coin, 2.0f)};
    rule.epsilon = epsilons[rng.below(5)];
    std::vector<std::int32_t> own;
    for (index_t t = 0; t < tokens; ++t) own.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
    if (coin()) side.k_of_token = own;
    const assignment chosen = explored(rule.router, z, experts, side);
    std::vector<expert_id> ids(chosen.ids().begin(), chosen.ids().end());
    std::vector<bool> explores;
    for (index_t t = 0; t < tokens; ++t) {
      explores.push_back(rule.epsilon == 1.0f || thrown(t) < rule.epsilon);
      if (!explores.back()) continue;
      const auto open = [&](index_t e) {
        return z[static_cast<std::size_t>(t * experts + e)] +
                   (rule.router.transform.active() ? hidden[static_cast<std::size_t>(e)] : 0.0f) >
               -std::numeric_limits<float>::infinity();
      };
      std::vector<expert_id> from, drawn;
      for (index_t e = 0; e < experts; ++e)
        if (together || open(e)) from.push_back(static_cast<expert_id>(e));
      const auto n = static_cast<int>(from.size()), many = std::min(k, n);
      for (int r = 0; r < many; ++r) {
        const int limit = n - many + r + 1;
        auto at = static_cast<int>(
            random_below(static_cast<std::uint32_t>(limit), side.seed,
                         stream(detail::random_use::explored_choice),
                         place(t) * static_cast<std::uint64_t>(k) + static_cast<std::uint64_t>(r)));
        if (std::count(drawn.begin(), drawn.end(), at) > 0) at = limit - 1;
        drawn.push_back(at);
      }
      for (int r = 0; r < k; ++r) {
        expert_id& id = ids[static_cast<std::size_t>(t * k + r)];
        id = r < many ? from[static_cast<std::size_t>(drawn[static_cast<std::size_t>(r)])]
                      : no_expert;
        if (id != no_expert && !open(id)) id = no_expert;
        if (!side.k_of_token.empty() && r >= own[static_cast<std::size_t>(t)]) id = no_expert;
      }
    }
    const assignment out = explored(rule, z, experts, side);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << k << " epsilon "
                  << rule.epsilon << " batch " << together);
    CHECK(test::bit_difference(out.ids(), ids) == "");
    routing_record<std::int32_t> record;
    record.record(out);
    const assignment weighed = explored(
        replay<softmax, std::int32_t>{&record, {}, rule.router.weight, rule.router.transform}, z,
        experts, {});
    CHECK(test::difference(out.weights(), weighed.weights(), 3e-7, 1e-36) == "");
    std::string moved;
    for (index_t t = 0; t < tokens; ++t)
      if (!explores[static_cast<std::size_t>(t)])
        moved += test::bit_difference(out.weights(t), chosen.weights(t));
    CHECK(moved == "");
  }
}

namespace {

// Choices in lanes without a row that are not (no_expert, empty).
int held_without_a_row(const choice_block& c, std::uint32_t rows, float empty) {
  int held = 0;
  for (int at = 0; at < c.k * block_rows; ++at)
    held +=
        (rows >> at % block_rows & 1) == 0 && (c.id[at] != no_expert || !(c.value[at] == empty));
  return held;
}

// A router that counts the blocks it is asked for, and what it finds in lanes without a row.
struct counting_router {
  index_t choices = 2;
  int *asked = nullptr, *held = nullptr;

  index_t k() const { return choices; }
  static index_t experts(index_t columns) { return columns; }
  static void check(index_t) {}
  static int carve(scratch&, index_t) { return 0; }
  void route_block(const logit_block& z, int, choice_block& c) const {
    ++*asked;
    if (held != nullptr) *held += held_without_a_row(c, (1u << z.rows) - 1, 0.0f);
    for (int at = 0; at < c.k * block_rows; ++at) {
      c.id[at] = at / block_rows;
      c.value[at] = 1.0f;
    }
  }
};

}  // namespace

TEST_CASE("a router inside another is asked only where somebody takes what it says") {
  int first = 0, second = 0;
  const counting_router one{2, &first}, other{2, &second};
  const auto z = explore_logits(16, 8, 1);
  explored(explore<counting_router>{one, 1.0f}, z, 8, {});
  CHECK(first == 0);
  explored(explore<counting_router>{one, 0.999f}, z, 8, {});
  CHECK(first == 1);
  std::vector<std::uint8_t> modality(16, 0);
  const by_modality<counting_router> both{one, other, 4};
  explored(both, z, 8, {.modality = modality});
  CHECK((first == 2 && second == 0));
  modality[7] = 1;
  explored(both, z, 8, {.modality = modality});
  CHECK((first == 3 && second == 1));
  modality.assign(16, 1);
  explored(both, z, 8, {.modality = modality});
  CHECK((first == 3 && second == 2));
  // Lanes without a row are empty before either is asked, whatever the block before left there.
  int held = 0;
  const by_modality<counting_router> watching{{2, &first, &held}, {2, &second, &held}, 4};
  modality.assign(31, 0);
  modality[3] = modality[18] = 1;
  explored(watching, explore_logits(31, 8, 1), 8, {.modality = modality});
  CHECK((first == 5 && second == 4 && held == 0));
}

namespace {

// A router of parts, whose score counts what it finds where nobody was drawn.
struct watching_parts {
  struct watching_score {
    int *asked, *held;
    std::uint32_t drawn;
    template <class A = simd::default_arch>
    void score_choices(const logit_block& z, choice_block& c, score_scale) const {
      ++*asked;
      *held += held_without_a_row(c, z.rows == 1 ? 1 : drawn, simd::minus_infinity);
    }
  };
  struct plain_weight {
    static score_scale needs() { return score_scale::exact; }
    template <class A = simd::default_arch>
    static void apply(choice_block& c) {
      for (int at = 0; at < c.k * block_rows; ++at)
        if (c.id[at] != no_expert) c.value[at] = 0.5f;
    }
  };
  watching_score score{};
  plain_weight weight{};
  logit_transform transform{};

  static index_t k() { return 3; }
  static index_t experts(index_t columns) { return columns; }
  static void check(index_t) {}
  static int carve(scratch&, index_t) { return 0; }
  static void route_block(const logit_block&, int, choice_block& c) {
    std::fill_n(c.id, c.k * block_rows, 0);
  }
};

}  // namespace

TEST_CASE("where nobody explores a score finds nobody, whatever the block before left there") {
  // So many that they are weighed together, and so few that each is alone.
  const index_t experts = 8;
  const auto z = explore_logits(block_rows, experts, 6);
  for (const float epsilon : {0.3f, 0.9f, 1.0f}) {
    int asked = 0, held = 0;
    workspace ws;
    explore<watching_parts> rule{{}, epsilon};
    const auto memory = ws.carve([&](scratch& tape) { return rule.carve(tape, experts); });
    std::vector<expert_id> id(3 * block_rows);
    std::vector<float> value(id.size());
    choice_block c{3, id.data(), value.data()};
    for (std::uint64_t step = 0; step < 20; ++step) {
      const side_inputs side{.seed = 3, .step = step};
      const int rows = step % 3 == 0 ? block_rows : 11;
      std::uint32_t explores = 0;
      for (int i = 0; i < rows; ++i)
        explores |=
            std::uint32_t{random_u01(side.seed,
                                     detail::random_stream(detail::random_use::explore, step),
                                     static_cast<std::uint64_t>(i)) < epsilon}
            << i;
      rule.router.score = {&asked, &held, explores};
      std::fill_n(memory.id, id.size(), 1);
      std::fill_n(memory.value, id.size(), 7.0f);
      std::ranges::fill(value, 0.0f);
      rule.route_block({z.data(), experts, rows, experts, 0, &side}, memory, c);
      for (int at = 0; at < 3 * block_rows; ++at)
        held += (value[static_cast<std::size_t>(at)] == 0.5f) != (explores >> at % block_rows & 1);
    }
    INFO("epsilon " << epsilon);
    CHECK(held == 0);
    CHECK(asked > 0);
  }
}

TEST_CASE(
    "exploration is refused where it has no experts to draw k from, or a chance that is none") {
  const auto refused = [](const auto& rule) { return test::refusal([&] { rule.check(8); }); };
  using within = explore<counting_router>;
  for (const float epsilon : {-1e-9f, 1.0001f, -HUGE_VALF, HUGE_VALF, std::nanf("")})
    CHECK(refused(within{{}, epsilon}) ==
          "moeroute::explore: epsilon is " + std::to_string(epsilon) + ", expected 0 to 1");
  for (const float epsilon : {0.0f, 1.0f}) CHECK(refused(within{{8}, epsilon}) == "accepted");
  CHECK(refused(within{{9}}) == "moeroute::explore: k is 9, expected 1 to 8");
  CHECK(refused(within{{0}}) == "moeroute::explore: k is 0, expected 1 to 8");
  const with_shared<counting_router> wider{{}, 1};
  CHECK(refused(explore<with_shared<counting_router>>{wider}) ==
        "moeroute::explore: experts is 9, expected 8");
  const router<softmax> nine{.selection = {.k = 9}};
  CHECK(refused(explore<router<softmax>>{nine}) == "moeroute::top_k: k is 9, expected 1 to 8");
  CHECK(explore<counting_router>{}.epsilon == 0.1f);
  CHECK(explore<counting_router>{}.scope == exploration_scope::token);
}
