#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <moeroute/base/linear_assignment.hpp>
#include <moeroute/metrics/saliency.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/residency/merge.hpp>
#include <moeroute/residency/prune.hpp>
#include <moeroute/stage/plan.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace compress_test {

using namespace moeroute;

namespace {

std::vector<float> some(test::random& rng, index_t n) {
  std::vector<float> list(static_cast<std::size_t>(n));
  for (float& x : list) x = rng.normal();
  return list;
}

struct expert {
  index_t f, d;
  std::vector<float> gate, up, down;
  expert(test::random& rng, index_t units, index_t width)
      : f(units), d(width), gate(some(rng, f * d)), up(some(rng, f * d)), down(some(rng, f * d)) {}
  swiglu_weights view() const {
    return {{gate.data(), f, d}, {up.data(), f, d}, {down.data(), d, f}};
  }
  std::vector<double> run(const std::vector<float>& x) const {
    std::vector<double> y(static_cast<std::size_t>(d));
    for (index_t i = 0; i < f; ++i) {
      double g = 0, u = 0;
      for (index_t c = 0; c < d; ++c) {
        g += double(view().gate(i, c)) * double(x[static_cast<std::size_t>(c)]);
        u += double(view().up(i, c)) * double(x[static_cast<std::size_t>(c)]);
      }
      for (index_t c = 0; c < d; ++c)
        y[static_cast<std::size_t>(c)] += double(view().down(c, i)) * g / (1 + std::exp(-g)) * u;
    }
    return y;
  }
};

}  // namespace

TEST_CASE("a linear assignment has the largest sum that any permutation has") {
  test::random rng(1);
  for (index_t n = 0; n <= 6; ++n)
    for (int trial = 0; trial < 20; ++trial) {
      std::vector<double> gain(static_cast<std::size_t>(n * n));
      for (double& g : gain) g = double(trial % 2 == 0 ? rng.normal() : float(rng.below(3)));
      const auto sum = [&](const std::vector<std::int32_t>& column) {
        double s = 0;
        for (index_t r = 0; r < n; ++r)
          s += gain[static_cast<std::size_t>(r * n + column[static_cast<std::size_t>(r)])];
        return s;
      };
      const auto made = linear_assignment(gain, n);
      std::vector<std::int32_t> order(static_cast<std::size_t>(n));
      std::iota(order.begin(), order.end(), 0);
      REQUIRE(std::is_permutation(made.begin(), made.end(), order.begin(), order.end()));
      double best = sum(order);
      while (std::next_permutation(order.begin(), order.end())) best = std::max(best, sum(order));
      CHECK(std::abs(sum(made) - best) < 1e-9);
    }
}

TEST_CASE("saliency by batches and merged is that of one; the mean times the tokens is the sum") {
  test::random rng(2);
  constexpr index_t experts = 6, d = 5;
  saliency_meter one(experts), two(experts), rest(experts), louder(experts);
  std::vector<double> both(experts), weight(experts), length(experts), tokens(experts);
  for (int batch = 0; batch < 3; ++batch) {
    const assignment a = test::fixed_choices(rng, 20, experts, 2, 5);
    dispatch_plan p;
    plan(a, p);
    std::vector<float> out = some(rng, p.slots() * d);
    const matrix_view<const float> rows(out.data(), p.slots(), d);
    one.add(p, a, rows);
    (batch == 0 ? two : rest).add(p, a, rows);
    for (index_t c = 0; c < a.choices(); ++c) {
      const slot_id s = p.slot_of_choice()[static_cast<std::size_t>(c)];
      if (s == no_slot) continue;
      double square = 0;
      for (index_t i = 0; i < d; ++i) square += double(rows(s, i)) * double(rows(s, i));
      const auto e = static_cast<std::size_t>(a.ids()[static_cast<std::size_t>(c)]);
      const double g = double(a.weights()[static_cast<std::size_t>(c)]);
      both[e] += std::sqrt(square) * g;
      weight[e] += g;
      length[e] += std::sqrt(square);
      tokens[e] += 1;
    }
    // Expert 3 three times as loud.
    for (index_t s = p.offsets()[3]; s < p.offsets()[4]; ++s)
      for (index_t i = 0; i < d; ++i) out[static_cast<std::size_t>(s * d + i)] *= 3;
    louder.add(p, a, rows);
  }
  two.merge(rest);
  for (index_t e = 0; e < experts; ++e) {
    const auto i = static_cast<std::size_t>(e);
    CHECK(double(one.tokens(e)) == tokens[i]);
    CHECK(one.tokens(e) == two.tokens(e));
    CHECK(std::abs(one.reap(e) - two.reap(e)) < 1e-12);
    CHECK(std::abs(one.mean_weight(e) * tokens[i] - weight[i]) < 1e-5);
    CHECK(std::abs(one.mean_length(e) * tokens[i] - length[i]) < 1e-5);
    CHECK(std::abs(two.mean_weight(e) - one.mean_weight(e)) < 1e-12);
    CHECK(std::abs(two.mean_length(e) - one.mean_length(e)) < 1e-12);
    CHECK(std::abs(one.weighted_length(e) - both[static_cast<std::size_t>(e)]) < 1e-5);
    CHECK(std::abs(one.reap(e) * double(one.tokens(e)) - one.weighted_length(e)) < 1e-9);
    CHECK(std::abs(louder.reap(e) - (e == 3 ? 3 : 1) * one.reap(e)) < 1e-5);
  }
}

TEST_CASE("a layer needs as many experts as have the mass on enough of its tokens") {
  // Masses 0.5 0.3 0.2 and 0.9 0.05 0.05.
  const float z[] = {std::log(0.3f),  std::log(0.5f), std::log(0.2f),
                     std::log(0.05f), std::log(0.9f), std::log(0.05f)};
  const matrix_view<const float> rows(z, 2, 3);
  CHECK(least_experts(rows, 0.5, 1.0) == 1);
  CHECK(least_experts(rows, 0.8, 1.0) == 2);
  CHECK(least_experts(rows, 0.8, 0.5) == 1);
  CHECK(least_experts(rows, 1.0, 1.0) == 3);
  const std::vector<float> level(64, 1.5f);
  CHECK(least_experts({level.data(), 1, 64}, 0.5, 1.0) == 32);
}

TEST_CASE("what stays keeps its order, and a description is pruned with it or refused") {
  const std::vector<double> worth = {3, 1, 4, 1, 5, 9, 2, 6};
  const expert_subset first = keep_best(std::vector<double>{1, 2, 1, 1, 1}, 3);
  CHECK(std::vector<expert_id>(first.kept().begin(), first.kept().end()) ==
        std::vector<expert_id>{0, 1, 2});
  const expert_subset stay = keep_best(worth, 4);
  CHECK(std::vector<expert_id>(stay.kept().begin(), stay.kept().end()) ==
        std::vector<expert_id>{2, 4, 5, 7});
  CHECK(stay.place(5) == 2);
  CHECK(stay.place(0) == no_expert);
  test::random rng(3);
  const std::vector<float> gate = some(rng, 8 * 3), bias = some(rng, 8);
  const auto rows = kept_rows({gate.data(), 8, 3}, stay);
  for (std::size_t i = 0; i < 4; ++i)
    for (std::size_t c = 0; c < 3; ++c)
      CHECK(rows[i * 3 + c] == gate[static_cast<std::size_t>(stay.kept()[i]) * 3 + c]);
  CHECK(kept_values(bias, stay)[1] == bias[4]);
  const expert_table table = kept_table(expert_table({0, 5, 7, no_expert}, 2, 8), stay);
  CHECK(table.of(0)[0] == no_expert);
  CHECK(table.of(0)[1] == 2);
  CHECK(table.of(1)[0] == 3);
  CHECK(table.of(1)[1] == no_expert);
  CHECK(pruned({.experts = 8, .k = 4}, stay).experts == 4);
  const router_spec halves{.experts = 8, .k = 2, .groups = 2, .topk_group = 1, .zero_experts = 2};
  CHECK(pruned(halves, expert_subset({0, 2, 3, 4, 6, 7}, 8)).experts == 6);
  const auto refused = [&](const router_spec& spec) {
    return test::refusal([&] { pruned(spec, stay); });
  };
  CHECK(refused({.experts = 8, .k = 5}) == "moeroute::pruned: k is 5, expected 1 to 4");
  CHECK(refused({.experts = 16, .k = 2}) == "moeroute::pruned: experts is 8, expected 16");
  CHECK(refused({.experts = 8, .k = 1, .groups = 2, .topk_group = 1}) ==
        "moeroute::pruned: group 1 keeps 3 experts and group 0 1, expected equally many");
  CHECK(refused({.experts = 8, .k = 2, .zero_experts = 2}) ==
        "moeroute::pruned: expert 6 is a zero expert, expected all of them to stay");
  CHECK(test::refusal([] { expert_subset({2, 1}, 4); }) ==
        "moeroute::expert_subset: expert is 1, expected 3 to 3");
  CHECK(test::refusal([&] { keep_best(worth, 9); }) ==
        "moeroute::keep_best: n is 9, expected 1 to 8");
}

TEST_CASE("merging twins changes nothing, and a permuted copy is aligned back to its twin") {
  test::random rng(4);
  const expert a(rng, 6, 4);
  expert b = a;
  const std::int32_t order[] = {3, 5, 0, 1, 4, 2};
  for (index_t i = 0; i < 6; ++i)
    for (index_t c = 0; c < 4; ++c) {
      const auto to = static_cast<std::size_t>(i * 4 + c),
                 down = static_cast<std::size_t>(c * 6 + i);
      b.gate[to] = a.view().gate(order[i], c);
      b.up[to] = a.view().up(order[i], c);
      b.down[down] = a.view().down(c, order[i]);
    }
  const std::vector<float> x = some(rng, 4);
  const auto y = a.run(x), z = b.run(x);
  for (std::size_t c = 0; c < 4; ++c) CHECK(std::abs(y[c] - z[c]) < 1e-9);
  const auto unit = align_units(a.view(), b.view());
  for (std::size_t i = 0; i < 6; ++i) CHECK(order[unit[i]] == static_cast<std::int32_t>(i));
  // Each of the three matrices tells, where the others say nothing.
  for (const int told : {0, 1, 2}) {
    expert one = a, other = b;
    for (expert* e : {&one, &other}) {
      if (told != 0) std::fill(e->gate.begin(), e->gate.end(), 0.0f);
      if (told != 1) std::fill(e->up.begin(), e->up.end(), 0.0f);
      if (told != 2) std::fill(e->down.begin(), e->down.end(), 0.0f);
    }
    CHECK(align_units(one.view(), other.view()) == unit);
  }
  for (const double share : {0.0, 1.0, 3.0}) {
    const swiglu_weights both[] = {a.view(), b.view()};
    const merged_expert made = merge_experts(both, std::vector<double>{1.0, share});
    for (std::size_t i = 0; i < a.gate.size(); ++i) {
      CHECK(std::abs(made.gate[i] - a.gate[i]) < 1e-6f);
      CHECK(std::abs(made.up[i] - a.up[i]) < 1e-6f);
      CHECK(std::abs(made.down[i] - a.down[i]) < 1e-6f);
    }
  }
  // Weights of a merge lie between those of its parts.
  const expert c(rng, 6, 4);
  const swiglu_weights pair[] = {a.view(), c.view()};
  const merged_expert one = merge_experts(pair, std::vector<double>{2.0, 0.0});
  CHECK(one.gate == a.gate);
  // Experts that nobody used count alike.
  const merged_expert unused = merge_experts(pair, std::vector<double>{0.0, 0.0}),
                      even = merge_experts(pair, std::vector<double>{2.0, 2.0});
  CHECK(unused.gate == even.gate);
  CHECK(unused.up == even.up);
  CHECK(unused.down == even.down);
}

TEST_CASE(
    "leaders are the most used of all layers, one in each at least; others join the nearest") {
  // Layer 0: expert 0 leads; 1 goes with it, 2 against it. Layer 1 has three leaders.
  const double usage[] = {9, 1, 1, 1, 5, 4, 4, 1};
  const float z0[] = {1, 1, -1, 1, 2, 2, -2, 1, 3, 3.1f, -3, 0};
  const float z1[] = {1, 0, 0, 0.9f, 0, 1, 0, 0.1f, 0, 0, 1, 0};
  const matrix_view<const float> z[] = {{z0, 3, 4}, {z1, 3, 4}};
  const auto leader = group_experts({usage, 2, 4}, z, 4);
  CHECK(leader[0] == std::vector<expert_id>{0, 0, 0, 0});
  CHECK(leader[1] == std::vector<expert_id>{0, 1, 2, 0});
  const double level[] = {9, 9, 1, 1, 5, 1, 1, 1};  // two that are as good in the first layer
  for (const auto& own : group_experts({level, 2, 4}, z, 2))
    CHECK(own == std::vector<expert_id>{0, 0, 0, 0});
  // A layer that nobody used has one leader, and no more before those that were used.
  const double unused[] = {0, 0, 0, 0, 5, 4, 4, 1};
  const auto of_used = group_experts({unused, 2, 4}, z, 3);
  CHECK(of_used[0] == std::vector<expert_id>{0, 0, 0, 0});
  CHECK(of_used[1][1] == 1);
  CHECK(test::refusal([&] { group_experts({usage, 2, 4}, z, 1); }) ==
        "moeroute::group_experts: leaders is 1, expected 2 to 8");
  // A column without a finite length joins somebody all the same.
  const float endless[] = {1, INFINITY, 2, 1};
  const matrix_view<const float> wild[] = {{endless, 2, 2}};
  CHECK(group_experts({usage, 1, 2}, wild, 1)[0] == std::vector<expert_id>{0, 0});
  // Nor is who says nothing near to anybody: 0 is above an angle beyond the right one, below less.
  const double first_two[] = {9, 8, 1, 1};
  const float silent[] = {0, 1, -2, 2, 0, 1, -1, 3};
  const matrix_view<const float> quiet[] = {{silent, 2, 4}};
  CHECK(group_experts({first_two, 1, 4}, quiet, 2)[0] == std::vector<expert_id>{0, 1, 0, 1});
  const double unknown[] = {1, NAN};
  CHECK(test::refusal([&] { group_experts({unknown, 1, 2}, wild, 1); }) ==
        "moeroute::group_experts: usage is nan, expected a finite number");
  CHECK(test::refusal([&] { keep_best(unknown, 1); }) ==
        "moeroute::keep_best: worth is nan, expected a number");
}

TEST_CASE("what does not belong together is not merged, kept or counted, and named") {
  const expert_subset stay = keep_best(std::vector<double>{3, 1, 2, 0}, 2);
  const std::vector<float> numbers(60);
  CHECK(test::refusal([&] { kept_rows({numbers.data(), 3, 5}, stay); }) ==
        "moeroute::kept_rows: gate.rows is 3, expected 4");
  CHECK(test::refusal([&] { kept_values(numbers, stay); }) ==
        "moeroute::kept_values: values.size() is 60, expected 4");
  CHECK(test::refusal([&] { kept_table(expert_table({0, 1, 2}, 1, 3), stay); }) ==
        "moeroute::kept_table: table.experts() is 3, expected 4");
  CHECK(test::refusal([&] { kept_table(expert_table({0, 1, 2}, 3, 4), stay); }) ==
        "moeroute::kept_table: k is 3, expected 1 to 2");

  test::random rng(9);
  const expert one(rng, 4, 3), more(rng, 5, 3), wide(rng, 4, 6);
  const auto merged = [](const std::vector<swiglu_weights>& list,
                         const std::vector<double>& usage) {
    return test::refusal([&] { merge_experts(list, usage); });
  };
  CHECK(merged({}, {}) == "moeroute::merge_experts: experts.size() is 0, expected 1 to 1048576");
  CHECK(merged({one.view(), one.view()}, {1.0}) ==
        "moeroute::merge_experts: usage.size() is 1, expected 2");
  CHECK(merged({one.view(), one.view()}, {1.0, -1.0}) ==
        "moeroute::merge_experts: usage is -1.000000, expected >= 0");
  CHECK(merged({one.view(), one.view()}, {0.0, 0.0}) == "accepted");
  // Every side of an expert is that of the first.
  const auto aligned = [&](const swiglu_weights& other) {
    return test::refusal([&] { align_units(one.view(), other); });
  };
  CHECK(aligned(more.view()) == "moeroute::align_units: gate.rows is 5, expected 4");
  CHECK(aligned(wide.view()) == "moeroute::align_units: gate.cols is 6, expected 3");
  swiglu_weights mixed = one.view();
  mixed.up = more.view().up;
  CHECK(aligned(mixed) == "moeroute::align_units: up.rows is 5, expected 4");
  CHECK(test::refusal([&] { align_units(mixed, mixed); }) ==
        "moeroute::align_units: up.rows is 5, expected 4");
  CHECK(merged({mixed}, {1.0}) == "moeroute::merge_experts: up.rows is 5, expected 4");
  mixed.up = wide.view().up;
  CHECK(aligned(mixed) == "moeroute::align_units: up.cols is 6, expected 3");
  mixed.up = one.view().up;
  mixed.down = wide.view().down;
  CHECK(aligned(mixed) == "moeroute::align_units: down.rows is 6, expected 3");
  mixed.down = more.view().down;
  CHECK(aligned(mixed) == "moeroute::align_units: down.cols is 5, expected 4");

  CHECK(test::refusal([] { saliency_meter(0); }) ==
        "moeroute::saliency_meter: experts is 0, expected 1 to 1048576");
  const assignment a = test::fixed_choices(rng, 3, 6, 2);
  dispatch_plan p;
  plan(a, p);
  CHECK(test::refusal([&] { saliency_meter(5).add(p, a, {numbers.data(), p.slots(), 5}); }) ==
        "moeroute::saliency_meter: plan.experts() is 6, expected 5");
  CHECK(test::refusal([&] { saliency_meter(6).add(p, a, {numbers.data(), 2, 5}); }) ==
        "moeroute::saliency_meter: out.rows is 2, expected " + std::to_string(p.slots()));
  CHECK(test::refusal([&] {
          saliency_meter(6).add(p, test::fixed_choices(rng, 4, 6, 2),
                                {numbers.data(), p.slots(), 5});
        }) == "moeroute::saliency_meter: choices.choices() is 8, expected 6");
  CHECK(test::refusal([] { saliency_meter(6).merge(saliency_meter(5)); }) ==
        "moeroute::saliency_meter: experts is 5, expected 6");
  const auto least = [&](double mass, double share) {
    return test::refusal([&] { (void)least_experts({numbers.data(), 2, 3}, mass, share); });
  };
  CHECK(least(0.0, 1.0) ==
        "moeroute::least_experts: mass is 0.000000, expected above 0, at most 1");
  CHECK(least(1.5, 1.0) ==
        "moeroute::least_experts: mass is 1.500000, expected above 0, at most 1");
  CHECK(least(0.5, 0.0) ==
        "moeroute::least_experts: share is 0.000000, expected above 0, at most 1");
  CHECK(least(0.5, 1.5) ==
        "moeroute::least_experts: share is 1.500000, expected above 0, at most 1");
}

TEST_CASE("what is merged, pruned or measured is refused by the size that does not fit") {
  const double usage[] = {9, 1, 1, 1, 5, 4, 4, 1};
  const float z[12] = {};
  const matrix_view<const float> narrow[] = {{z, 3, 4}, {z, 3, 3}};
  const expert_subset stay({1, 3}, 4);
  test::random rng(9);
  const assignment a = test::fixed_choices(rng, 3, 6, 2);
  dispatch_plan p;
  plan(a, p);
  const std::vector<float> numbers(60);
  const matrix_view<const float> tangled(numbers.data(), p.slots(), 5, 4);
  const test::refusals all{
      {[&] { group_experts({usage, 2, 4}, std::span(narrow).first(1), 2); },
       "group_experts: logits.size() is 1, expected 2"},
      {[&] { group_experts({usage, 2, 4}, narrow, 2); },
       "group_experts: logits.cols is 3, expected 4"},
      {[&] { group_experts({usage, 2, 4}, narrow, 9); },
       "group_experts: leaders is 9, expected 2 to 8"},
      {[] { expert_subset({}, 4); }, "expert_subset: kept is 0, expected 1 to 4"},
      {[&] { group_experts({usage, 2, 4}, narrow, 1); },
       "group_experts: leaders is 1, expected 2 to 8"},
      {[] { expert_subset({0, 1, 2, 3, 4}, 4); }, "expert_subset: kept is 5, expected 1 to 4"},
      {[] { expert_subset({0}, max_experts + 1); },
       "expert_subset: experts is 1048577, expected 1 to 1048576"},
      {[] { keep_best(std::vector<double>{1, 2}, 3); }, "keep_best: n is 3, expected 1 to 2"},
      {[] { expert_subset({0}, 0); }, "expert_subset: experts is 0, expected 1 to 1048576"},
      {[] { expert_subset({0, 4}, 4); }, "expert_subset: expert is 4, expected 1 to 3"},
      {[] { expert_subset({1, 1}, 4); }, "expert_subset: expert is 1, expected 2 to 3"},
      {[] { expert_subset({-1}, 4); }, "expert_subset: expert is -1, expected 0 to 3"},
      {[&] { stay.place(4); }, "expert_subset: expert is 4, expected 0 to 3"},
      {[&] { stay.place(-1); }, "expert_subset: expert is -1, expected 0 to 3"},
      {[&] { keep_best(std::vector<double>{1, 2}, 0); }, "keep_best: n is 0, expected 1 to 2"},
      {[&] { pruned({.experts = 4, .k = 2, .selection = selection_kind::product_keys}, stay); },
       "pruned: product keys have no column per expert, expected another selection"},
      {[&] { saliency_meter(6).add(p, a, tangled); },
       "saliency_meter: out.stride is 4, expected at least 5"},
      {[] { (void)saliency_meter(6).reap(6); }, "saliency_meter: expert is 6, expected 0 to 5"},
      {[] { (void)saliency_meter(6).tokens(-1); }, "saliency_meter: expert is -1, expected 0 to 5"},
      {[&] { (void)least_experts({z, 3, 4, 3}, 0.5, 0.5); },
       "least_experts: logits.stride is 3, expected at least 4"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(group_experts({usage, 2, 4}, std::vector<matrix_view<const float>>(2, narrow[0]), 8)[1] ==
        std::vector<expert_id>{0, 1, 2, 3});
}

}  // namespace compress_test
