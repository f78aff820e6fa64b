#include <moeroute/residency/union.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "oracle/residency.hpp"
#include "support/assignments.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/traces.hpp"

namespace union_test {

using namespace moeroute;

namespace {

using kind = union_kind;

router<softmax> plain_of(index_t k) {
  return {.score = {}, .selection = {.k = k}, .weight = sum_normalized};
}

std::vector<expert_id> chosen(const assignment& a, index_t t) {
  std::vector<expert_id> list;
  for (const expert_id e : a.ids(t))
    if (e != no_expert) list.push_back(e);
  return list;
}

// What the batch agrees on.
std::set<expert_id> agreed(const union_rule& rule, const assignment& plain) {
  std::set<expert_id> in;
  if (rule.kind == kind::opportunistic) {
    for (index_t t = 0; t < plain.tokens(); ++t) {
      float mass = 0, all = 0;
      for (const float w : plain.weights(t)) all += w;
      for (std::size_t r = 0; r < static_cast<std::size_t>(rule.k0); ++r) {
        if (plain.ids(t)[r] == no_expert) break;
        if (rule.mass > 0 && r > 0 && mass >= rule.mass * all) break;
        in.insert(plain.ids(t)[r]);
        mass += plain.weights(t)[r];
      }
    }
    return in;
  }
  const bool vote = rule.kind == kind::vote;
  const index_t groups = vote ? rule.groups : 1, size = plain.experts() / groups;
  for (index_t g = 0; g < groups; ++g) {
    std::vector<std::pair<double, expert_id>> worth;
    for (expert_id e = static_cast<expert_id>(g * size); e < (g + 1) * size; ++e) {
      double sum = 0;
      for (std::size_t c = 0; c < plain.ids().size(); ++c)
        if (plain.ids()[c] == e) sum += vote ? 1.0 : double{plain.weights()[c]};
      if (sum > 0) worth.emplace_back(-sum, e);
    }
    std::sort(worth.begin(), worth.end());
    const auto most = static_cast<std::size_t>(vote ? rule.stays : rule.budget);
    for (std::size_t i = 0; i < std::min(most, worth.size()); ++i) in.insert(worth[i].second);
  }
  return in;
}

}  // namespace

TEST_CASE("a batch agrees and chooses as plain loops do; each token keeps its best") {
  constexpr index_t experts = 48, k = 4;
  const std::vector<union_rule> rules = {{.k0 = 1},
                                         {.k0 = 2},
                                         {.k0 = 3, .mass = 0.6f},
                                         {.k0 = 2, .most_rank = 9},
                                         {.kind = kind::budget, .budget = 10},
                                         {.kind = kind::budget, .budget = 1},
                                         {.kind = kind::vote, .groups = 6, .stays = 2},
                                         {.kind = kind::vote, .groups = 1, .stays = 12}};
  for (const test::shape shape : {test::shape::normal, test::shape::quantised, test::shape::masked,
                                  test::shape::zipf, test::shape::all_minus_inf})
    for (const index_t tokens : {0, 1, 7, 16, 37})
      for (const union_rule& rule : rules) {
        INFO(test::name(shape) << " T " << tokens << " kind " << int(rule.kind) << " k0 "
                               << rule.k0);
        const auto z = test::make_logits(shape, 5, tokens, experts);
        const assignment plain = test::routed(plain_of(k), z, experts);
        union_counts counts;
        const assignment a = test::routed(union_router(plain_of(k), rule, &counts), z, experts);
        const std::set<expert_id> in = agreed(rule, plain);
        std::set<expert_id> read, before;
        index_t choices = 0;
        for (index_t t = 0; t < tokens; ++t) {
          const std::vector<float> row(z.begin() + t * experts, z.begin() + (t + 1) * experts);
          const residency_rule within{.kind = residency_kind::within, .ranks = rule.most_rank};
          const auto want = oracle::choose(within, in, row, k);
          REQUIRE(chosen(a, t) == want);
          if (plain.ids(t)[0] != no_expert) REQUIRE(a.ids(t)[0] == plain.ids(t)[0]);
          if (rule.kind == kind::opportunistic && rule.mass == 0)
            REQUIRE(chosen(a, t).size() >=
                    std::min(static_cast<std::size_t>(rule.k0), chosen(plain, t).size()));
          float sum = 0;
          for (const float w : a.weights(t)) sum += w;
          if (!want.empty()) REQUIRE(std::abs(sum - 1.0f) < 1e-5f);
          for (const expert_id e : want) read.insert(e);
          for (const expert_id e : chosen(plain, t)) before.insert(e);
          choices += static_cast<index_t>(want.size());
        }
        CHECK(counts.batches == 1);
        CHECK(counts.experts_per_batch() == static_cast<double>(counts.experts));
        CHECK(counts.plain_experts_per_batch() == static_cast<double>(counts.plain_experts));
        CHECK(counts.tokens == tokens);
        CHECK(counts.choices == choices);
        CHECK(counts.experts == static_cast<std::int64_t>(read.size()));
        CHECK(counts.plain_experts == static_cast<std::int64_t>(before.size()));
        CHECK(counts.agreed_on == static_cast<std::int64_t>(in.size()));
        std::int64_t forced = 0;
        for (const expert_id e : read) forced += !in.contains(e);
        CHECK(counts.forced == forced);
      }
}

TEST_CASE("k0 = k is the router to the bit; the order of tokens and masked ones do not matter") {
  constexpr index_t experts = 32, k = 4, tokens = 21;
  const auto z = test::make_logits(test::shape::bf16_rounded, 3, tokens, experts);
  const assignment plain = test::routed(plain_of(k), z, experts);
  const assignment same = test::routed(union_router(plain_of(k), {.k0 = k}), z, experts);
  CHECK(test::listed(same.ids()) == test::listed(plain.ids()));
  CHECK(test::listed(same.weights()) == test::listed(plain.weights()));
  const union_rule rule{.k0 = 2};
  const assignment a = test::routed(union_router(plain_of(k), rule), z, experts);
  std::vector<float> turned;
  for (index_t t = tokens - 1; t >= 0; --t)
    turned.insert(turned.end(), z.begin() + t * experts, z.begin() + (t + 1) * experts);
  const assignment b = test::routed(union_router(plain_of(k), rule), turned, experts);
  for (index_t t = 0; t < tokens; ++t) CHECK(chosen(a, t) == chosen(b, tokens - 1 - t));
  // Padding that would ask for everything else.
  std::vector<std::uint8_t> mask(tokens + 1, 1);
  mask[tokens] = 0;
  std::vector<float> padded = z;
  for (index_t e = 0; e < experts; ++e)
    padded.push_back(chosen(a, 0)[0] == e ? -9.0f : static_cast<float>(e));
  const assignment c =
      test::routed(union_router(plain_of(k), rule), padded, experts, {.mask = mask});
  for (index_t t = 0; t < tokens; ++t) CHECK(chosen(a, t) == chosen(c, t));
  CHECK(chosen(c, tokens).empty());
}

TEST_CASE("streams of real logits side by side read as few experts as the study says") {
  const auto traces = example::read_traces(MOEROUTE_MODEL_DIR);
  const example::router_trace& python = traces[0];
  struct row {
    index_t streams, k0;
    double distinct, choices, agreement, mass;
  };
  // A plain-loop study in another language, on the same trace.
  constexpr row rows[] = {
      {4, 4, 10.6899, 4.0000, 1.0000, 0.0000},  {4, 3, 8.3350, 4.0000, 0.8392, 0.0114},
      {4, 2, 5.8701, 3.9775, 0.6400, 0.0505},   {4, 1, 3.3022, 3.3022, 0.3900, 0.1704},
      {8, 4, 15.2568, 4.0000, 1.0000, 0.0000},  {8, 3, 12.1709, 4.0000, 0.8846, 0.0061},
      {8, 2, 8.8076, 4.0000, 0.7204, 0.0305},   {8, 1, 5.4141, 3.9766, 0.5022, 0.1129},
      {16, 4, 19.5859, 4.0000, 1.0000, 0.0000}, {16, 3, 16.1367, 4.0000, 0.9229, 0.0032},
      {16, 2, 11.9375, 4.0000, 0.7896, 0.0183}, {16, 1, 7.8516, 4.0000, 0.6156, 0.0689}};
  for (const row& want : rows) {
    union_counts counts;
    double agreed = 0, lost = 0;
    workspace ws;
    assignment a, plain;
    std::vector<float> z(static_cast<std::size_t>(want.streams * 32));
    for (index_t l = 0; l < python.layers; ++l)
      for (index_t t = 0; t < 2048 / want.streams; ++t) {
        for (index_t s = 0; s < want.streams; ++s)
          std::copy_n(python.layer(l).row(s * (2048 / want.streams) + t), 32, z.data() + s * 32);
        route(union_router(plain_of(4), {.k0 = want.k0}, &counts), test::rows_of(z, 32), ws, a);
        route(plain_of(4), test::rows_of(z, 32), ws, plain);
        for (index_t s = 0; s < want.streams; ++s) {
          double total = 0;
          const float* row = z.data() + s * 32;
          for (index_t e = 0; e < 32; ++e) total += std::exp(double(row[e]));
          const auto now = chosen(a, s), before = chosen(plain, s);
          for (const expert_id e : now) {
            lost -= std::exp(double(row[e])) / total;
            agreed += std::find(before.begin(), before.end(), e) != before.end();
          }
          for (const expert_id e : before) lost += std::exp(double(row[e])) / total;
        }
      }
    INFO("B " << want.streams << " k0 " << want.k0);
    const auto near = [](double x, double y) { return std::abs(x - y) <= 0.01 * y + 1e-9; };
    const double tokens = double(counts.tokens);
    CHECK(near(counts.experts_per_batch(), want.distinct));
    CHECK(near(double(counts.choices) / tokens, want.choices));
    CHECK(near(agreed / (4 * tokens), want.agreement));
    CHECK(std::abs(lost / tokens - want.mass) <= 0.01 * want.mass + 6e-5);
  }
}

TEST_CASE(
    "a union plan is the tokens of each expert that is used, ascending; dropped ones are not") {
  test::random rng(1);
  union_plan plan;
  for (const bool ragged : {false, true})
    for (const index_t tokens : {0, 1, 5, 60}) {
      assignment a = ragged ? test::ragged_choices(rng, tokens, 130, 5)
                            : test::fixed_choices(rng, tokens, 130, 4, 6);
      if (tokens == 60) test::drop_some(rng, a, 4);
      std::map<expert_id, std::vector<std::pair<index_t, index_t>>> want;
      for (index_t t = 0; t < tokens; ++t)
        for (index_t c = a.first(t); c < a.first(t + 1); ++c)
          if (const expert_id e = a.ids()[static_cast<std::size_t>(c)]; e != no_expert && a.kept(c))
            want[e].emplace_back(t, c);
      plan.make(a);
      REQUIRE(plan.experts().size() == want.size());
      index_t i = 0;
      for (const auto& [e, uses] : want) {
        REQUIRE(plan.experts()[static_cast<std::size_t>(i)] == e);
        REQUIRE(plan.tokens(i).size() == uses.size());
        for (std::size_t u = 0; u < uses.size(); ++u) {
          REQUIRE(plan.tokens(i)[u] == uses[u].first);
          REQUIRE(plan.choices(i)[u] == uses[u].second);
        }
        ++i;
      }
    }
}

TEST_CASE("as many drafts are verified as bring the most tokens per time") {
  test::random rng(2);
  for (int trial = 0; trial < 50; ++trial) {
    const assignment sets =
        test::fixed_choices(rng, 7, trial % 2 == 0 ? 24 : 150, 3, trial % 3 == 0 ? 3 : 0, 1.0);
    std::vector<double> acceptance(6);
    for (double& p : acceptance) p = 0.5 + 0.5 * double(rng.uniform());
    const step_time time{double(rng.below(3)), double(rng.uniform()), double(rng.below(8))};
    double best = -1;
    index_t depth = 0;
    for (index_t n = 0; n <= 6; ++n) {
      std::set<expert_id> read;
      double gain = 0, through = 1;
      for (index_t i = 0; i <= n; ++i) {
        for (const expert_id e : sets.ids(i))
          if (e != no_expert) read.insert(e);
        if (i > 0) through *= acceptance[static_cast<std::size_t>(i - 1)];
        gain += through;
      }
      const double cost =
          time.fixed + time.expert * double(read.size()) + time.token * double(n + 1);
      const double rate = cost == 0 ? gain * 1e300 : gain / cost;
      if (rate > best * (1 + 1e-12)) {
        best = rate;
        depth = n;
      }
    }
    CHECK(speculation_depth(sets, acceptance, time) == depth);
  }
  CHECK(union_counts{}.experts_per_batch() == 0.0);
  CHECK((step_time{}.expert == 1.0 && step_time{}.token == 0.0 && step_time{}.fixed == 0.0));
  const union_rule u;
  CHECK((u.kind == kind::opportunistic && u.k0 == 1 && u.mass == 0.0f && u.most_rank == 0 &&
         u.budget == 1 && u.groups == 1 && u.stays == 1));
  const assignment one = test::fixed_choices(rng, 1, 4, 2);
  CHECK(speculation_depth(one, {}, {}) == 0);
  // Drafts that are sure to come through and share all experts are free.
  assignment same;
  same.reset(4, 8, 1);
  std::fill(same.ids().begin(), same.ids().end(), 5);
  CHECK(speculation_depth(same, std::vector<double>{1, 1, 1}, {.expert = 1}) == 3);
  CHECK(speculation_depth(same, std::vector<double>{0, 1, 1}, {.expert = 1, .token = 0.1}) == 0);
}

TEST_CASE("union rules that do not fit are refused by name") {
  const auto refused = [](const union_rule& rule) {
    return test::refusal(
        [&] { test::routed(union_router(plain_of(4), rule), test::zeros(2, 32), 32); });
  };
  CHECK(refused({.k0 = 0}) == "moeroute::union_router: k0 is 0, expected 1 to 4");
  CHECK(refused({.k0 = 5}) == "moeroute::union_router: k0 is 5, expected 1 to 4");
  CHECK(refused({.mass = 2}) == "moeroute::union_router: mass is 2.000000, expected 0 to 1");
  CHECK(refused({.mass = 1}) == "accepted");
  CHECK(refused({.most_rank = 3}) == "moeroute::union_router: most_rank is 3, expected 4 to 32");
  CHECK(refused({.mass = -0.5f}) == "moeroute::union_router: mass is -0.500000, expected 0 to 1");
  CHECK(refused({.most_rank = 33}) == "moeroute::union_router: most_rank is 33, expected 4 to 32");
  CHECK(refused({.kind = kind::budget, .budget = 0}) ==
        "moeroute::union_router: budget is 0, expected 1 to 32");
  CHECK(refused({.kind = kind::vote, .groups = 4, .stays = 0}) ==
        "moeroute::union_router: stays is 0, expected 1 to 8");
  CHECK(refused({.kind = kind::budget, .budget = 33}) ==
        "moeroute::union_router: budget is 33, expected 1 to 32");
  for (const index_t groups : {0, 33})
    CHECK(refused({.kind = kind::vote, .groups = groups}) ==
          "moeroute::union_router: groups is " + std::to_string(groups) + ", expected 1 to 32");
  CHECK(refused({.kind = kind::vote, .groups = 5}) ==
        "moeroute::union_router: experts % groups is 2, expected 0");
  CHECK(refused({.kind = kind::vote, .groups = 4, .stays = 9}) ==
        "moeroute::union_router: stays is 9, expected 1 to 8");
  // What the router alone refuses.
  const auto too_many = [](const auto& router) {
    return test::refusal([&] { test::routed(router, test::zeros(2, 32), 32); });
  };
  CHECK(too_many(union_router(plain_of(33), {})) == too_many(plain_of(33)));
  CHECK(too_many(plain_of(33)) != "accepted");
  test::random rng(3);
  const assignment sets = test::fixed_choices(rng, 3, 8, 2);
  assignment strange = sets;
  strange.ids()[3] = 8;
  CHECK(test::refusal([&] { union_plan().make(strange); }) ==
        "moeroute::union_plan: the id of choice 3 is 8, expected -1 to 7");
  CHECK(test::refusal([&] { speculation_depth(strange, {}, {}); }) ==
        "moeroute::speculation_depth: the id of choice 3 is 8, expected -1 to 7");
  CHECK(test::refusal([&] { speculation_depth(sets, std::vector<double>{1, 1, 1}, {}); }) ==
        "moeroute::speculation_depth: acceptance.size() is 3, expected 0 to 2");
  for (const index_t tokens : {0, 1})
    CHECK(test::refusal([&] {
            speculation_depth(test::fixed_choices(rng, tokens, 8, 2), std::vector<double>{1}, {});
          }) == "moeroute::speculation_depth: acceptance.size() is 1, expected 0 to 0");
  CHECK(test::refusal([&] { speculation_depth(sets, std::vector<double>{1.5}, {}); }) ==
        "moeroute::speculation_depth: acceptance is 1.500000, expected 0 to 1");
  CHECK(test::refusal([&] { speculation_depth(sets, std::vector<double>{-0.5}, {}); }) ==
        "moeroute::speculation_depth: acceptance is -0.500000, expected 0 to 1");
  for (const step_time& time :
       {step_time{.expert = -1.0}, step_time{.token = std::nan("")}, step_time{.fixed = -1.0}})
    CHECK(test::refusal([&] { speculation_depth(sets, {}, time); }) ==
          "moeroute::speculation_depth: a time is negative, expected 0 or more");
}

TEST_CASE("a union of any fields is that of its tokens that are not masked, each with its own k") {
  test::random rng(95);
  const test::shape shapes[] = {test::shape::normal, test::shape::quantised, test::shape::masked,
                                test::shape::half_nan};
  for (int draw = 0; draw < 400; ++draw) {
    const index_t groups = 1 + rng.below(4), experts = groups * (1 + rng.below(18)),
                  k = 1 + rng.below(std::min<index_t>(experts, 7));
    union_rule rule{.kind = static_cast<kind>(rng.below(3)),
                    .k0 = 1 + rng.below(k),
                    .mass = rng.below(2) == 0 ? 0.0f : rng.uniform(),
                    .budget = 1 + rng.below(experts),
                    .groups = groups,
                    .stays = 1 + rng.below(experts / groups)};
    if (rng.below(2) == 0) rule.most_rank = k + rng.below(experts - k + 1);
    INFO("draw " << draw << ", kind " << int(rule.kind) << ", k0 " << rule.k0 << ", mass "
                 << rule.mass << ", most_rank " << rule.most_rank << ", E " << experts << ", k "
                 << k);
    union_counts counts, want;
    const union_router router(plain_of(k), rule, &counts);
    for (int call = 0; call < 2; ++call) {
      const index_t tokens = rng.below(20);
      const auto z = test::make_logits(shapes[rng.below(4)], rng.bits(), tokens, experts);
      std::vector<std::uint8_t> mask;
      std::vector<std::int32_t> own;
      for (index_t t = 0, some = rng.below(2), fewer = rng.below(2); t < tokens; ++t) {
        if (some != 0) mask.push_back(static_cast<std::uint8_t>(2 * rng.below(3)));
        if (fewer != 0) own.push_back(static_cast<std::int32_t>(rng.below(k + 1)));
      }
      const side_inputs side{.mask = mask, .k_of_token = own};
      const assignment plain = test::routed(plain_of(k), z, experts, side),
                       a = test::routed(router, z, experts, side);
      const std::set<expert_id> in = agreed(rule, plain);
      std::set<expert_id> read, before;
      for (index_t t = 0; t < tokens; ++t) {
        const auto at = static_cast<std::size_t>(t);
        INFO("call " << call << ", token " << t);
        if (!mask.empty() && mask[at] == 0) {
          REQUIRE(chosen(a, t).empty());
          for (const float w : a.weights(t)) REQUIRE(w == 0.0f);
          continue;
        }
        ++want.tokens;
        std::vector<float> row(z.begin() + t * experts, z.begin() + (t + 1) * experts);
        for (float& x : row)
          if (x != x) x = -INFINITY;
        auto ids =
            oracle::choose({.kind = residency_kind::within, .ranks = rule.most_rank}, in, row, k);
        if (!own.empty() && ids.size() > static_cast<std::size_t>(own[at]))
          ids.resize(static_cast<std::size_t>(own[at]));
        REQUIRE(chosen(a, t) == ids);
        double sum = 0.0;
        for (const expert_id e : ids)
          sum += std::exp(double{row[static_cast<std::size_t>(e)]} -
                          double{row[static_cast<std::size_t>(ids[0])]});
        for (std::size_t r = 0; r < ids.size(); ++r)
          REQUIRE(std::abs(double{a.weights(t)[r]} -
                           std::exp(double{row[static_cast<std::size_t>(ids[r])]} -
                                    double{row[static_cast<std::size_t>(ids[0])]}) /
                               sum) < 2e-5);
        read.insert(ids.begin(), ids.end());
        for (const expert_id e : chosen(plain, t)) before.insert(e);
        want.choices += static_cast<std::int64_t>(ids.size());
      }
      ++want.batches;
      want.plain_experts += static_cast<std::int64_t>(before.size());
      want.agreed_on += static_cast<std::int64_t>(in.size());
      want.experts += static_cast<std::int64_t>(read.size());
      for (const expert_id e : read) want.forced += !in.contains(e);
    }
    CHECK(counts.batches == want.batches);
    CHECK(counts.tokens == want.tokens);
    CHECK(counts.plain_experts == want.plain_experts);
    CHECK(counts.agreed_on == want.agreed_on);
    CHECK(counts.experts == want.experts);
    CHECK(counts.forced == want.forced);
    CHECK(counts.choices == want.choices);
    CHECK(counts.experts_per_batch() == static_cast<double>(want.experts) / 2.0);
    CHECK(counts.plain_experts_per_batch() == static_cast<double>(want.plain_experts) / 2.0);
  }
}

}  // namespace union_test
