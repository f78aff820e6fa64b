// Rules of selection, steps on logits and counts from the row, by template and by description.
#include <moeroute/policy/make_rare_router.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstring>
#include <moeroute/policy/row/explore.hpp>
#include <moeroute/policy/spec_text.hpp>
#include <string>
#include <vector>

#include "oracle/routing.hpp"
#include "support/compare.hpp"
#include "support/guarded.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using test::routed;

namespace rare_rules_tests {

namespace {

constexpr index_t tokens = 35, experts = 16;

std::string refused(const std::string& text, const router_tensors& tensors = {}) {
  return test::refusal([&] { make_rare_router(parse_spec(text), tensors); });
}

std::vector<float> numbers(std::uint64_t seed, index_t n, float size) {
  std::vector<float> list = test::make_logits(test::shape::normal, seed, 1, n);
  for (float& x : list) x *= size;
  return list;
}

// By name: clang 16 makes a wrong address of a router that is a member of an unnamed one.
template <class Step, class Router>
auto stepped(const Step& step, const Router& router) {
  const transformed<Step, Router> named{step, router};
  return named;
}

// A template and a line of text decide the same on every shape, to the bit.
template <class Router>
void same(const std::string& text, const Router& router, const router_tensors& tensors = {}) {
  const router_spec spec = parse_spec(text);
  INFO(text);
  CHECK(parse_spec(to_string(spec)) == spec);
  CHECK(spec.has_rare_words());
  const any_rare_router made = make_rare_router(spec, tensors);
  std::vector<std::uint8_t> modality, mask;
  for (index_t t = 0; t < tokens; ++t) {
    modality.push_back(t % 3 == 0);
    mask.push_back(t % 7 != 0);
  }
  const side_inputs side{.mask = mask, .modality = modality, .seed = 4, .step = 2};
  const index_t columns = spec.columns();
  for (const test::shape shape : test::all_shapes) {
    const std::vector<float> z = test::make_logits(shape, 11, tokens, columns);
    const side_inputs own = side.only(side_use_of(router, columns));
    const assignment a = routed(made, z, columns, own), b = routed(router, z, columns, own);
    INFO(test::name(shape));
    CHECK(test::bit_difference(a.ids(), b.ids()) == "");
    CHECK(test::bit_difference(a.weights(), b.weights()) == "");
    REQUIRE(a.tokens() == b.tokens());
    for (index_t t = 0; t < tokens; ++t) REQUIRE(a.count(t) == b.count(t));
  }
}

// How many experts each of the counts may be in double, where rounding decides.
struct counts {
  index_t least, most;
};

template <class F>
void counts_agree(const row_count& rule, bool sigmoids, F&& f) {
  for (const index_t e : {1, 7, 16, 60, 257})
    for (const test::shape shape : test::all_shapes) {
      const std::vector<float> z = test::make_logits(shape, 21, 9, e);
      row_count own = rule;
      own.min_k = std::min(own.min_k, e);
      own.mid_k = std::min(own.mid_k, e);
      const assignment a = sigmoids ? routed(counted<sigmoid>{.count = own}, z, e)
                                    : routed(counted<>{.count = own}, z, e);
      INFO(test::name(shape) << ", E = " << e);
      for (index_t t = 0; t < 9; ++t) {
        const float* const row = z.data() + t * e;
        const std::vector<expert_id> order = oracle::order(row, e);
        const auto there = static_cast<index_t>(order.size());
        std::vector<double> score = oracle::softmax(row, e, order);
        if (sigmoids)
          for (index_t i = 0; i < e; ++i)
            score[static_cast<std::size_t>(i)] = 1 / (1 + std::exp(-static_cast<double>(row[i])));
        const counts right = f(score, order);
        const index_t most = own.most(e);
        const auto bounded = [&](index_t n) {
          return std::min(std::clamp(n, std::min(own.min_k, most), most), there);
        };
        if (a.count(t) < bounded(right.least) || a.count(t) > bounded(right.most))
          FAIL_CHECK("token " << t << ": " << a.count(t) << " experts, expected "
                              << bounded(right.least) << " to " << bounded(right.most));
        for (index_t r = 0; r < a.count(t); ++r) {
          const auto at = static_cast<std::size_t>(r);
          REQUIRE(a.ids(t)[at] == order[at]);
          if (std::isfinite(row[order[at]]) || !sigmoids)
            CHECK(std::abs(static_cast<double>(a.weights(t)[at]) -
                           score[static_cast<std::size_t>(order[at])]) <= 3e-6);
        }
      }
    }
}

// Experts that reach a score, one that is within rounding either way.
counts reaching(const std::vector<double>& score, const std::vector<expert_id>& order,
                double least) {
  counts n{0, 0};
  const double slack = 4e-6 * std::abs(least) + 1e-37;
  for (const expert_id e : order) {
    n.least += score[static_cast<std::size_t>(e)] >= least + slack;
    n.most += score[static_cast<std::size_t>(e)] >= least - slack;
  }
  return n;
}

double entropy(const std::vector<double>& p) {
  double h = 0;
  for (const double x : p)
    if (x > 0) h -= x * std::log(x);
  return h;
}

}  // namespace

TEST_CASE("exploration from a line of text is the wrapper around the same router") {
  const router<softmax> plain{.selection = {.k = 3}, .weight = sum_normalized};
  const explore<router<softmax>> by_token{plain, 0.25f};
  same("E=16 k=3 score=softmax normalize=sum explore=0.25", by_token);
  const std::vector<float> bias = numbers(5, experts, 0.1f);
  const router<sigmoid> biased{.selection = {.k = 2},
                               .weight = {.scale = 2.5f},
                               .bias = selection_bias(bias),
                               .transform = {.temperature = 0.5f}};
  const explore<router<sigmoid>> by_batch{biased, 0.5f, exploration_scope::batch};
  same(
      "E=16 k=2 score=sigmoid bias=selection scale=2.5 temperature=0.5 explore=0.5 "
      "explore_scope=batch",
      by_batch, {.bias = bias});
}

TEST_CASE("rules of selection decide the same by template and by description") {
  const std::vector<float> bias = numbers(3, experts, 0.2f), other = numbers(4, experts, 0.3f);
  same("E=16 k=8 selection=each_group groups=4 normalize=sum eps=1e-20 eps_mode=add scale=2.5",
       router{softmax{}, top_of_each_group{8, 4},
              weight_rule{.normalize = normalization::sum,
                          .eps_where = eps_mode::add,
                          .eps = 1e-20f,
                          .scale = 2.5f}});
  same("E=16 k=3 score=sigmoid ties=higher_id", router{sigmoid{}, ordered_ties<>{{.k = 3}}});
  same("E=16 k=3 score=sigmoid bias=selection groups=4 topk_group=2 ties=higher_id",
       router{sigmoid{}, ordered_ties<>{{.k = 3, .groups = 4, .topk_group = 2}}, raw_weights,
              selection_bias(bias)},
       {.bias = bias});
  same("E=16 k=3 score=sigmoid bias=by_class normalize=sum",
       router{sigmoid{}, class_bias<>{{.k = 3}, {selection_bias(bias), selection_bias(other)}},
              sum_normalized},
       {.bias = bias, .second_bias = other});
  same("E=16 k=3 score=sigmoid bias=selection weight_score=softmax weight_domain=selected",
       router{chosen_by<sigmoid, softmax_selected>{}, top_k{.k = 3}, raw_weights,
              selection_bias(bias)},
       {.bias = bias});
  same("E=16 k=3 score=sigmoid bias=selection weight_score=softmax",
       router{chosen_by<sigmoid, softmax>{}, top_k{.k = 3}, raw_weights, selection_bias(bias)},
       {.bias = bias});
  same("E=16 k=3 score=sigmoid score_domain=selected bias=selection",
       router{chosen_by<identity_score, sigmoid>{}, top_k{.k = 3}, raw_weights,
              selection_bias(bias)},
       {.bias = bias});
}

TEST_CASE("steps on logits decide the same by template and by description") {
  const router best{softmax{}, top_k{.k = 3}};
  const router<sigmoid> by_first{.selection = {.k = 3}};
  const weighed_by_second<router<sigmoid>, softmax_selected> second{by_first};
  const router summed{identity_score{}, top_k{.k = 3}, sum_normalized};
  same("E=16 k=3 standardize=2", stepped(standardized{2.0f}, best));
  same("E=16 k=3 candidates=5", stepped(candidates{5}, best));
  same("E=16 k=3 candidates=5 candidate_scope=batch",
       stepped(candidates{5, row_scope::batch}, best));
  same("E=16 k=3 passes=4", stepped(pass_logits{.passes = 4}, best));
  same("E=16 k=3 passes=4 pass_rule=ratio",
       stepped(pass_logits{.passes = 4, .rule = pass_rule::ratio}, best));
  same("E=16 k=3 score=identity second_logits=sigmoid_sum normalize=sum",
       stepped(sigmoid_sum{}, summed));
  same("E=16 k=3 score=sigmoid second_logits=weigh weight_score=softmax weight_domain=selected",
       second);
  const std::vector<expert_id> up{5, 2}, down{0, 9};
  for (const promotion how : {promotion::soft, promotion::hard}) {
    const steering steer{.promote = up, .suppress = down, .how = how, .lambda = 1.5f};
    same("E=16 k=3 steering", stepped(steer, best), {.steer = steer});
  }
  same("E=15 k=4 selection=product_keys first_keys=3 normalize=sum",
       product_keys<softmax>{.choices = 4, .first_keys = 3, .weight = sum_normalized});
}

TEST_CASE("counts from the row decide the same by template and by description") {
  same("E=16 k=1 selection=counted count=ratio ratio=0.25 max_k=5",
       counted<>{.count = {.ratio = 0.25f, .max_k = 5}});
  same(
      "E=16 k=1 score=sigmoid selection=counted count=percentile quantile=0.8 min_k=2 "
      "normalize=sum",
      counted<sigmoid>{.count = {.rule = count_rule::percentile, .quantile = 0.8f, .min_k = 2},
                       .weight = sum_normalized});
  same("E=16 k=1 score_domain=selected selection=counted count=percentile quantile=0.8",
       counted<softmax_selected>{.count = {.rule = count_rule::percentile, .quantile = 0.8f}});
  same("E=16 k=1 selection=counted count=entropy entropy_low=1 entropy_high=2 mid_k=3 max_k=6",
       counted<>{
           .count = {
               .rule = count_rule::entropy, .low = 1.0f, .high = 2.0f, .mid_k = 3, .max_k = 6}});
  same("E=16 k=1 standardize=1 selection=counted count=ratio ratio=0.25",
       stepped(standardized{1.0f}, counted<>{.count = {.ratio = 0.25f}}));
  same("E=16 k=1 selection=counted count=tsallis p=0.75 min_k=2 normalize=sum", dynmole_included);
  same("E=16 k=1 selection=counted count=tsallis p=0.75 min_k=2 crossing=exclude",
       dynmole_excluded);
}

TEST_CASE("a percentile that is one of the scores does not hear of an infinite one above it") {
  const counted<identity_score> rule{.count = {.rule = count_rule::percentile, .quantile = 0.5f}};
  CHECK(routed(rule, {0.0f, 1.0f, test::infinity}, 3).count(0) == 2);
  CHECK(routed(rule, {1.0f, test::infinity, test::infinity}, 3).count(0) == 2);
}

TEST_CASE("a share of the best, a percentile and an entropy count what double counts") {
  for (const float ratio : {0.05f, 0.5f, 1.0f})
    counts_agree({.ratio = ratio, .max_k = 12}, false, [&](const auto& score, const auto& order) {
      if (order.empty()) return counts{0, 0};
      return reaching(score, order,
                      static_cast<double>(ratio) * score[static_cast<std::size_t>(order[0])]);
    });
  for (const float quantile : {0.0f, 0.3f, 0.75f, 1.0f})
    counts_agree({.rule = count_rule::percentile, .quantile = quantile, .min_k = 2}, true,
                 [&](const auto& score, const auto& order) {
                   std::vector<double> sorted;
                   for (const expert_id e : order)
                     sorted.push_back(score[static_cast<std::size_t>(e)]);
                   if (sorted.empty()) return counts{0, 0};
                   std::sort(sorted.begin(), sorted.end());
                   const double at =
                       static_cast<double>(sorted.size() - 1) * static_cast<double>(quantile);
                   const auto low = static_cast<std::size_t>(at);
                   const double above = sorted[std::min(low + 1, sorted.size() - 1)];
                   return reaching(score, order,
                                   sorted[low] + (at - std::floor(at)) * (above - sorted[low]));
                 });
  counts_agree({.rule = count_rule::entropy, .low = 0.7f, .high = 1.9f, .mid_k = 3, .max_k = 6},
               false, [&](const auto& score, const auto&) {
                 const double h = entropy(score);
                 counts n{6, 1};
                 for (const double x : {h - 1e-5, h + 1e-5}) {
                   const index_t k = x < 0.7f ? 1 : x > 1.9f ? 6 : 3;
                   n = {std::min(n.least, k), std::max(n.most, k)};
                 }
                 return n;
               });
}

TEST_CASE("undecided tokens take every expert, decided ones the floor, and the mean says which") {
  const std::vector<float> flat(16, 0.5f);
  std::vector<float> peaked(16, 0.0f);
  peaked[3] = 30.0f;
  CHECK(routed(dynmole_included, flat, 16).count(0) == 16);
  CHECK(routed(dynmole_included, peaked, 16).count(0) == 2);
  CHECK(routed(counted<>{.count = {.ratio = 0.5f}}, flat, 16).count(0) == 16);
  CHECK(routed(counted<>{.count = {.ratio = 0.5f}}, peaked, 16).count(0) == 1);
  // Tsallis' entropy of the softmax of (2, 1, 0.5, -1), q = 1.1, and of two of eight, q = 1.1
  // and 2.
  const std::vector<float> four{2.0f, 1.0f, 0.5f, -1.0f};
  using A = simd::default_arch;
  CHECK(std::abs(detail::tsallis_entropy<A>(four.data(), 4, 2.0f, 1.1f) - 0.727149f) < 2e-6f);
  std::vector<float> two(8, -test::infinity);
  two[1] = two[6] = 1.0f;
  CHECK(std::abs(detail::tsallis_entropy<A>(two.data(), 8, 1.0f, 1.1f) - 0.3567f) < 1e-4f);
  CHECK(std::abs(detail::tsallis_entropy<A>(two.data(), 8, 1.0f, 2.0f) - 0.5714f) < 1e-4f);
  CHECK(std::abs(detail::tsallis_entropy<A>(flat.data(), 16, 0.5f, 1.1f) - 1.0f) < 1e-5f);
  CHECK(detail::tsallis_entropy<A>(peaked.data(), 16, 30.0f, 1.1f) < 1e-5f);
}

TEST_CASE(
    "the Cartesian router has the weights of its golden vector, and its rows are not square") {
  const std::vector<float> z{2.0f, 1.0f, 0.0f, 1.0f, 0.5f, -1.0f};
  const assignment a = routed(product_keys<softmax>{.choices = 4}, z, 6);
  CHECK(test::listed(a.ids(0)) == std::vector<expert_id>{0, 1, 3, 4});
  CHECK(test::difference(a.weights(0), std::vector<double>{.381913, .231642, .140498, .085216},
                         1e-5) == "");
  // A node and an expert of it: the best product of the two softmaxes.
  for (const test::shape shape : test::all_shapes) {
    const std::vector<float> rows = test::make_logits(shape, 9, 20, 3 + 7);
    const assignment b = routed(product_keys<softmax>{.choices = 5, .first_keys = 3}, rows, 10);
    INFO(test::name(shape));
    CHECK(b.experts() == 21);
    for (index_t t = 0; t < 20; ++t) {
      const float* const one = rows.data() + t * 10;
      std::vector<float> sums;
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 7; ++j) sums.push_back(one[i] + one[3 + j]);
      CHECK(test::listed(b.ids(t)) == oracle::top_k(sums.data(), 21, 5));
    }
  }
}

TEST_CASE("of the experts of each group there are as many, and where a group has none, nobody") {
  std::vector<float> z = test::make_logits(test::shape::normal, 5, 30, 16);
  for (index_t e = 4; e < 8; ++e) z[static_cast<std::size_t>(e)] = -test::infinity;
  const assignment a = routed(router{softmax{}, top_of_each_group{8, 4}}, z, 16);
  for (index_t t = 0; t < 30; ++t)
    for (std::size_t r = 0; r < 8; ++r)
      CHECK(a.ids(t)[r] / 4 == (t == 0 && r / 2 == 1 ? 0 : static_cast<expert_id>(r / 2)));
  CHECK(a.ids(0)[2] == no_expert);
}

// Columns come to the rule inside in reverse: one that knows experts by their ids stands outside.
template <class Rule>
concept turned_inside = requires { typename ordered_ties<Rule>; };
static_assert(turned_inside<top_k> && turned_inside<top_of_each_group>);
static_assert(!turned_inside<class_bias<>> && selection_rule<class_bias<ordered_ties<>>>);

TEST_CASE("with the higher id first, equal experts come in reverse and the others as ever") {
  const std::vector<float> equal(8, 0.25f);
  const router turned{sigmoid{}, ordered_ties<>{{.k = 3}}};
  CHECK(test::listed(routed(turned, equal, 8).ids(0)) == std::vector<expert_id>{7, 6, 5});
  // Of equal groups the later one is kept.
  const router grouped{sigmoid{}, ordered_ties<>{{.k = 2, .groups = 4, .topk_group = 1}}};
  CHECK(test::listed(routed(grouped, equal, 8).ids(0)) == std::vector<expert_id>{7, 6});
  const std::vector<float> z = test::make_logits(test::shape::ascending, 1, 1, 8);
  CHECK(test::listed(routed(turned, z, 8).ids(0)) ==
        test::listed(routed(router{sigmoid{}, top_k{.k = 3}}, z, 8).ids(0)));
}

TEST_CASE("the sum of a group's probabilities picks the group with the most mass") {
  // Group 1 has the best expert, group 0 the most mass.
  const std::vector<float> z{1.0f, 1.0f, 1.0f, 1.0f, 1.5f, -4.0f, -4.0f, -4.0f};
  const auto of = [&](group_score how) {
    return routed(router{softmax{}, top_k{.k = 2, .groups = 2, .group_score = how}}, z, 8)
        .ids(0)[0];
  };
  CHECK(of(group_score::max) == 4);
  CHECK(of(group_score::sum) == 0);
}

TEST_CASE("promoted experts come first where they are promoted hard, suppressed ones never") {
  const router best{softmax{}, top_k{.k = 3}};
  const std::vector<expert_id> up{9, 4}, down{1, 2};
  const steering hard{.promote = up, .suppress = down, .how = promotion::hard};
  for (const test::shape shape : {test::shape::normal, test::shape::quantised, test::shape::extreme,
                                  test::shape::all_equal}) {
    const std::vector<float> z = test::make_logits(shape, 6, 40, 16);
    const assignment a = routed(stepped(hard, best), z, 16);
    for (index_t t = 0; t < 40; ++t) {
      CHECK(a.ids(t)[0] == 9);
      CHECK(a.ids(t)[1] == 4);
      CHECK((a.ids(t)[2] != 1 && a.ids(t)[2] != 2));
    }
    // Nothing is added with lambda 0, to the bit.
    const assignment b = routed(stepped(steering{.promote = up, .lambda = 0.0f}, best), z, 16);
    const assignment c = routed(best, z, 16);
    CHECK(test::bit_difference(b.ids(), c.ids()) == "");
    CHECK(test::bit_difference(b.weights(), c.weights()) == "");
  }
}

TEST_CASE("what is masked is promoted by nobody") {
  std::vector<float> z(16, 0.0f);
  z[9] = -test::infinity;
  z[4] = test::not_a_number;
  const std::vector<expert_id> up{9, 4, 7};
  for (const promotion how : {promotion::hard, promotion::soft}) {
    const steering step{.promote = up, .how = how, .lambda = 2.0f};
    const assignment a = routed(stepped(step, router{softmax{}, top_k{.k = 14}}), z, 16);
    for (const expert_id e : a.ids(0)) CHECK((e != 9 && e != 4));
    CHECK(a.ids(0)[0] == (how == promotion::hard ? 7 : 0));
  }
}

TEST_CASE("every expert is a candidate as often as any other, and the count is kept") {
  std::vector<index_t> seen(16, 0);
  const std::vector<float> z(16 * 4000, 0.0f);
  const assignment a =
      routed(stepped(candidates{4}, router{softmax{}, top_k{.k = 4}}), z, 16, {.seed = 8});
  for (const expert_id e : a.ids()) ++seen[static_cast<std::size_t>(e)];
  for (const index_t n : seen) CHECK(std::abs(static_cast<double>(n) - 1000.0) < 150.0);
  // One lot for the whole batch, another with the next step.
  const auto drawn = [&](std::uint64_t step) {
    const assignment b =
        routed(stepped(candidates{4, row_scope::batch}, router{softmax{}, top_k{.k = 4}}), z, 16,
               {.seed = 8, .step = step});
    for (index_t t = 1; t < 50; ++t) REQUIRE(test::bit_difference(b.ids(t), b.ids(0)) == "");
    return test::listed(b.ids(0));
  };
  CHECK(drawn(1) != drawn(2));
}

TEST_CASE("a row that is all equal is standardised to zeros, however its mean rounds") {
  for (const float x : {-0.166869655f, 1.903152585f, 0.1f, 1e30f})
    for (const index_t n : {5, 7, 9, 17, 33}) {
      std::vector<float> row(static_cast<std::size_t>(n), x), out(row.size(), 1.0f);
      row.back() = simd::minus_infinity;
      standardized{2.0f}.apply_row(row.data(), n, 0, {}, out.data());
      row.pop_back();
      for (std::size_t e = 0; e + 1 < out.size(); ++e) CHECK(out[e] == 0.0f);
      CHECK(out.back() == simd::minus_infinity);
    }
}

TEST_CASE("fewer choices of its own than groups weigh as a softmax of what is left") {
  const std::vector<float> z = {0.0f, 0.0f, 100.0f, 0.0f};
  const std::vector<std::int32_t> own = {1};
  const assignment out =
      routed(router{softmax{}, top_of_each_group{2, 2}}, z, 4, {.k_of_token = own});
  CHECK(out.ids()[0] == 0);
  CHECK(out.ids()[1] == no_expert);
  CHECK(std::isfinite(out.weights()[0]));
  CHECK(out.weights()[0] >= 0.0f);
  CHECK(out.weights()[0] <= 1.0f);
}

TEST_CASE("second logits weigh by their own largest, chosen or not, at every row of a block") {
  const router<softmax> best{.selection = {.k = 1}};
  const weighed_by_second<router<softmax>, softmax> second{best};
  for (const index_t n : {1, 5, 35})
    for (const index_t largest : {0, 1, 3}) {
      std::vector<float> z;
      for (index_t t = 0; t < n; ++t) {
        std::vector<float> row{2.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        row[static_cast<std::size_t>(4 + largest)] = 300.0f;
        z.insert(z.end(), row.begin(), row.end());
      }
      const assignment a = routed(second, z, 8);
      for (index_t t = 0; t < n; ++t) {
        CHECK(a.ids(t)[0] == 0);
        CHECK(a.weights(t)[0] == (largest == 0 ? 1.0f : 0.0f));
      }
    }
}

TEST_CASE("passes that agree are one pass, and of equal means the surer expert wins") {
  const std::vector<float> row = test::make_logits(test::shape::quantised, 2, 1, 8);
  std::vector<float> twice(row);
  twice.insert(twice.end(), row.begin(), row.end());
  const router best{softmax{}, top_k{.k = 3}};
  const assignment a = routed(stepped(pass_logits{.passes = 2}, best), twice, 16);
  CHECK(test::listed(a.ids(0)) == test::listed(routed(best, row, 8).ids(0)));
  const std::vector<float> unsure{1.0f, 0.5f, 0.0f, 0.5f};  // means 0.5 and 0.5
  CHECK(routed(stepped(pass_logits{.passes = 2}, router{softmax{}, top_k{.k = 1}}), unsure, 4)
            .ids(0)[0] == 1);
}

TEST_CASE("importance by attention is one where attention is even, and gives every token its k") {
  constexpr index_t n = 6, heads = 2;
  std::vector<float> even(heads * n * n, 1.0f / n), importance(n);
  attention_importance({even.data(), heads * n, n}, false, importance);
  for (const float i : importance) CHECK(std::abs(i - 1.0f / n) < 1e-6f);
  std::vector<std::int32_t> k(n);
  k_of_importance(std::vector<float>(n, 0.5f), 1, 4, k);
  CHECK(k == std::vector<std::int32_t>(n, 1));
  k_of_importance(std::vector<float>{0.0f, 0.1f, 0.5f, 0.84f, 0.9f, 1.0f}, 1, 4, k);
  CHECK(k == std::vector<std::int32_t>{1, 1, 3, 4, 4, 4});
  // Causal: a token that few can see is as important as they find it.
  std::vector<float> causal(n * n, 0.0f);
  for (index_t i = 0; i < n; ++i) causal[static_cast<std::size_t>(i * n + i)] = 1.0f;
  attention_importance({causal.data(), n, n}, true, importance);
  CHECK(importance[5] == 1.0f);
  CHECK(importance[0] == 1.0f / n);
  CHECK(test::refusal([&] { k_of_importance(importance, 3, 2, k); }) ==
        "moeroute::k_of_importance: least is 3, expected 0 to 2");
}

TEST_CASE("what does not fit is refused with the field and its value") {
  const product_keys<> pairs{.choices = 4};
  const weighed_by_second<product_keys<>> no_column_each{pairs};
  CHECK(test::refusal([&] { no_column_each.check(16); }) ==
        "moeroute::weighed_by_second: experts is 16, expected 8");
  CHECK(refused("E=16 k=6 selection=each_group groups=4") ==
        "moeroute::top_of_each_group: k is 6, expected a multiple of groups = 4");
  CHECK(refused("E=16 k=4 selection=each_group groups=3") ==
        "moeroute::top_of_each_group: groups is 3, expected a divisor of E = 16");
  CHECK(refused("E=8 k=2 selection=top_p p=0.5 ties=higher_id") ==
        "moeroute::router_spec: ties=higher_id clashes with selection=top_p: only top_k and "
        "each_group turn ties");
  CHECK(refused("E=8 k=2 second_logits=weigh passes=2") ==
        "moeroute::router_spec: second_logits=weigh clashes with passes=2: columns are read one "
        "way");
  CHECK(refused("E=8 k=2 second_logits=sigmoid_sum") ==
        "moeroute::router_spec: second_logits=sigmoid_sum clashes with score=softmax: the sum is "
        "the score: score=identity");
  CHECK(refused("E=8 k=2 candidates=9") ==
        "moeroute::router_spec: candidates is 9, expected 2 to 8");
  CHECK(refused("E=8 k=2 standardize=-1") ==
        "moeroute::router_spec: standardize is -1, expected >= 0");
  CHECK(refused("E=8 k=1 selection=counted count=percentile quantile=2") ==
        "moeroute::router_spec: quantile is 2, expected 0 to 1");
  CHECK(refused("E=8 k=1 selection=counted count=percentile quantile=-0.5") ==
        "moeroute::router_spec: quantile is -0.5, expected 0 to 1");
  CHECK(refused("E=8 k=1 selection=counted count=entropy entropy_low=2 entropy_high=1 max_k=4") ==
        "moeroute::counted: entropy_high is 1.000000, expected at least entropy_low = 2.000000");
  CHECK(refused("E=8 k=1 selection=counted count=tsallis p=0.5 tsallis_q=9") ==
        "moeroute::dense_if: q is 9.000000, expected more than 0 and at most 8");
  CHECK(refused("E=8 k=2 steering") ==
        "moeroute::make_router: steer has no expert, expected some: the spec says steering");
  const std::vector<expert_id> all{0, 1, 2, 3, 4, 5, 6}, twice{1, 1}, far{8};
  CHECK(refused("E=8 k=2 steering", {.steer = {.suppress = all}}) ==
        "moeroute::steering: experts that are not suppressed is 1, expected 2 to 8");
  CHECK(refused("E=8 k=2 steering", {.steer = {.promote = twice}}) ==
        "moeroute::steering: promote has expert 1 twice");
  CHECK(refused("E=8 k=2 steering", {.steer = {.promote = far}}) ==
        "moeroute::steering: promote is 8, expected 0 to 7");
  const std::vector<float> eight(8, 0.5f), seven(7, 0.5f), four(4, 0.5f);
  CHECK(refused("E=8 k=2 score=sigmoid bias=by_class", {.bias = eight, .second_bias = seven}) ==
        "moeroute::make_router: second_bias.size() is 7, expected 8");
  const router by_class{sigmoid{},
                        class_bias<>{{.k = 2}, {selection_bias(four), selection_bias(four)}}};
  CHECK(test::refusal([&] { routed(by_class, four, 4); }) ==
        "moeroute::class_bias: side_inputs::modality is missing");
  const std::vector<float> three(3, 0.5f);
  const auto of_class = [](std::span<const float> one, std::span<const float> other) {
    return test::refusal(
        [&] { class_bias<>{{.k = 2}, {selection_bias(one), selection_bias(other)}}.check(4); });
  };
  CHECK(of_class(four, three) == "moeroute::class_bias: second bias.size() is 3, expected 4");
  CHECK(of_class(three, four) == "moeroute::class_bias: first bias.size() is 3, expected 4");
  CHECK(of_class(four, {}) == "moeroute::class_bias: second bias.size() is 0, expected 4");
  CHECK(of_class({}, four) == "moeroute::class_bias: first bias.size() is 0, expected 4");
  CHECK(of_class({}, {}) == "accepted");
  CHECK(test::refusal([] { class_bias<>{{.k = 5}}.check(4); }) ==
        "moeroute::top_k: k is 5, expected 1 to 4");
  // What is suppressed may be among what the lot leaves.
  const std::vector<expert_id> two{1, 4};
  CHECK(refused("E=8 k=2 candidates=3 steering", {.steer = {.suppress = two}}) ==
        "moeroute::candidates: active is 3, expected 4 to 8");
}

TEST_CASE(
    "with every option at once rows have as many of their best experts as plain loops count") {
  test::random rng(101);
  enum class kind { mass, share, centile, entropies, dense };
  index_t dense = 0, sparse = 0, mixed = 0;
  const auto agrees = [&](kind which) {
    const auto coin = [&] { return rng.below(2) == 0; };
    constexpr index_t edges[] = {1, 2, 7, 8, 9, 15, 16, 17, 18, 33, 64, 65, 130, 300};
    const index_t e = coin() ? edges[rng.below(14)] : 1 + rng.below(40), t = 1 + rng.below(40);
    const test::shape shapes[] = {test::shape::normal, test::shape::zipf, test::shape::all_equal,
                                  test::shape::quantised};
    const auto seed = rng.bits() % 1000;
    std::vector<float> z = test::make_logits(shapes[rng.below(4)], seed, t, e), vector;
    for (float& x : z)
      if (const auto odd = rng.below(16); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    for (index_t i = 0; i < e; ++i) vector.push_back(0.25f * std::floor(rng.normal()));
    logit_transform transform{};
    if (rng.below(3) == 0) transform = {.temperature = 2.0f, .add = vector};
    weight_rule weight{};
    if (coin()) weight = sum_normalized;
    if (coin()) weight.scale = 2.5f;
    const index_t min_k = 1 + (coin() ? 0 : rng.below(e)),
                  max_k = coin() && which != kind::entropies ? 0 : min_k + rng.below(e + 3);
    const index_t most = max_k > 0 ? std::min(max_k, e) : e;
    const top_p mass{.p = 0.05f + 0.9f * rng.uniform(),
                     .crossing = static_cast<crossing>(rng.below(3)),
                     .min_k = min_k,
                     .max_k = max_k,
                     .weight = weight,
                     .transform = transform};
    const dense_if undecided{
        .rule = mass, .q = coin() ? 1.0f : 0.5f + 2.0f * rng.uniform(), .threshold = rng.uniform()};
    const float low = 2.0f * rng.uniform(), high = low + 2.0f * rng.uniform();
    const row_count count{.rule = which == kind::share     ? count_rule::ratio
                                  : which == kind::centile ? count_rule::percentile
                                                           : count_rule::entropy,
                          .quantile = coin() ? rng.uniform() : 1.0f,
                          .ratio = rng.uniform(),
                          .low = low,
                          .high = high,
                          .mid_k = min_k + (max_k > min_k ? rng.below(max_k - min_k + 1) : 0),
                          .min_k = min_k,
                          .max_k = max_k};
    std::vector<std::int32_t> own;
    std::vector<std::uint8_t> mask;
    for (index_t i = 0; i < t; ++i) {
      own.push_back(static_cast<std::int32_t>(rng.below(most + 1)));
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    }
    side_inputs side;
    if (coin()) side.k_of_token = own;
    if (coin()) side.mask = mask;
    const counted<> by_count{.count = count, .weight = weight, .transform = transform};
    const assignment a = which == kind::mass    ? routed(mass, z, e, side)
                         : which == kind::dense ? routed(undecided, z, e, side)
                                                : routed(by_count, z, e, side);
    std::string broken;
    index_t all_of = 0, few_of = 0;
    for (index_t i = 0; i < t; ++i) {
      std::vector<float> row(z.begin() + i * e, z.begin() + (i + 1) * e);
      for (std::size_t j = 0; transform.active() && j < row.size(); ++j)
        row[j] = row[j] / 2.0f + vector[j];
      const std::vector<expert_id> order = oracle::order(row.data(), e);
      const std::vector<double> p = oracle::softmax(row.data(), e, order);
      const auto of = [&](std::size_t r) { return p[static_cast<std::size_t>(order[r])]; };
      const auto there = static_cast<index_t>(order.size());
      counts n{0, 0};
      const auto add_mass = [&] {
        n = {there, there};
        double sum = 0.0;
        bool first = true;
        for (index_t r = 0; r < there; ++r) {
          sum += of(static_cast<std::size_t>(r));
          const index_t in = mass.crossing == crossing::exclude ? r : r + 1;
          if (first && sum >= static_cast<double>(mass.p) - 1e-5) n.least = in, first = false;
          if (!first && sum > static_cast<double>(mass.p) + 1e-5) {
            n.most = in;
            break;
          }
        }
      };
      if (which == kind::mass) add_mass();
      if (which == kind::share && there > 0)
        n = reaching(p, order, static_cast<double>(count.ratio) * of(0));
      if (which == kind::centile && there > 0) {
        const double place = static_cast<double>(there - 1) * static_cast<double>(count.quantile);
        // Ascending: the place-th from the end of the order.
        const auto under = static_cast<std::size_t>(there - 1) - static_cast<std::size_t>(place);
        const double above = of(under > 0 ? under - 1 : 0), part = place - std::floor(place);
        n = reaching(p, order, part == 0.0 ? of(under) : of(under) + part * (above - of(under)));
      }
      const double h = entropy(p);
      if (which == kind::entropies && there > 0) {
        n = {most + 3, 0};
        for (const double x : {h - 1e-5, h + 1e-5}) {
          const index_t k = x < static_cast<double>(low)    ? min_k
                            : x > static_cast<double>(high) ? max_k
                                                            : count.mid_k;
          n = {std::min(n.least, k), std::max(n.most, k)};
        }
      }
      if (which == kind::dense && there > 0) {
        const auto q = static_cast<double>(undecided.q);
        double powers = 0.0;
        for (const expert_id id : order) powers += std::pow(p[static_cast<std::size_t>(id)], q);
        const double even = std::pow(static_cast<double>(e), 1.0 - q),
                     share = e == 1                ? 0.0
                             : undecided.q == 1.0f ? h / std::log(static_cast<double>(e))
                                                   : (1.0 - powers) / (1.0 - even);
        add_mass();
        const double over = share - static_cast<double>(undecided.threshold);
        if (over > 1e-3) n = {there, there};
        if (std::abs(over) <= 1e-3) n.most = there;
        (over > 0.0 ? all_of : few_of) += 1;
      }
      const auto bounded = [&](index_t x) {
        x = std::min(std::clamp(x, std::min(min_k, most), most), there);
        if (!side.k_of_token.empty()) x = std::min<index_t>(x, own[static_cast<std::size_t>(i)]);
        return side.masked(i) ? 0 : x;
      };
      if (a.count(i) < bounded(n.least) || a.count(i) > bounded(n.most))
        broken = "token " + std::to_string(i) + " has " + std::to_string(a.count(i)) +
                 " experts, expected " + std::to_string(bounded(n.least)) + " to " +
                 std::to_string(bounded(n.most));
      double sum = 0.0;
      const auto has = static_cast<std::size_t>(std::min(a.count(i), there));
      for (std::size_t r = 0; r < has; ++r) sum += of(r);
      for (std::size_t r = 0; r < has; ++r) {
        const double w = of(r) * static_cast<double>(weight.scale) /
                         (weight.normalize == normalization::sum && sum > 0.0 ? sum : 1.0);
        if (a.ids(i)[r] != order[r]) broken = "another expert";
        if (std::abs(static_cast<double>(a.weights(i)[r]) - w) > 1e-5 * w + 1e-36)
          broken = "another weight";
      }
    }
    dense += all_of > 0 && few_of == 0;
    sparse += all_of == 0 && few_of > 0;
    mixed += all_of > 0 && few_of > 0;
    INFO("kind " << static_cast<int>(which) << " T=" << t << " E=" << e << " min_k " << min_k
                 << " max_k " << max_k << " p " << mass.p << " crossing "
                 << static_cast<int>(mass.crossing) << " own k " << !side.k_of_token.empty());
    CHECK(broken == "");
  };
  for (index_t round = 0; round < 60; ++round)
    for (const kind which : {kind::mass, kind::share, kind::centile, kind::entropies, kind::dense})
      agrees(which);
  CHECK((dense > 0 && sparse > 0 && mixed > 0));
}

TEST_CASE("with every option at once steps on logits are those of plain loops") {
  test::random rng(103);
  const auto alike = [](const std::vector<float>& got, const std::vector<double>& expected) {
    for (std::size_t i = 0; i < got.size(); ++i) {
      const auto x = static_cast<double>(got[i]);
      if (x != expected[i] && !(std::abs(x - expected[i]) <= 1e-5 * std::abs(expected[i]) + 1e-5))
        return false;
    }
    return got.size() == expected.size();
  };
  for (index_t round = 0; round < 300; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t n = 2 + rng.below(40), token = rng.below(100);
    const side_inputs side{.seed = rng.bits(), .step = static_cast<std::uint64_t>(rng.below(99))};
    const auto parts = static_cast<index_t>(rng.below(3) == 0 ? 2 : 1 + rng.below(5));
    const auto seed = rng.bits() % 1000;
    std::vector<float> z = test::make_logits(
        rng.below(4) == 0 ? test::shape::all_equal : test::shape::normal, seed, 1, n * parts);
    for (float& x : z)
      if (const auto odd = rng.below(14); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    const auto at = [&](index_t part, index_t e) {
      return static_cast<double>(z[static_cast<std::size_t>(part * n + e)]);
    };
    const auto size = static_cast<std::size_t>(n);
    INFO("round " << round << " E=" << n << " parts " << parts);
    // Exactly the memory that is theirs.
    test::guarded<float> in(n * parts), to(n);
    const auto after = [&](const auto& step) {
      float* const from = in.window(n * parts, test::guarded_end::back);
      float* const out = to.window(n, test::guarded_end::back);
      std::copy(z.begin(), z.end(), from);
      step.apply_row(from, n * parts, token, side, out);
      return std::vector<float>(out, out + n);
    };
    if (parts == 2) {
      std::vector<double> sums;
      for (index_t e = 0; e < n; ++e)
        sums.push_back(at(0, e) > -HUGE_VAL && at(1, e) > -HUGE_VAL
                           ? 1 / (1 + std::exp(-at(0, e))) + 1 / (1 + std::exp(-at(1, e)))
                           : -HUGE_VAL);
      CHECK(alike(after(sigmoid_sum{}), sums));
    }
    const pass_logits passes{.passes = parts,
                             .rule = coin() ? pass_rule::bound : pass_rule::ratio,
                             .lambda = coin() ? 1.0f : -0.5f};
    std::vector<double> of_passes;
    for (index_t e = 0; e < n; ++e) {
      double mean = 0.0, square = 0.0;
      for (index_t p = 0; p < parts; ++p) mean += at(p, e) / static_cast<double>(parts);
      for (index_t p = 0; p < parts; ++p)
        square += (at(p, e) - mean) * (at(p, e) - mean) / static_cast<double>(parts);
      bool there = true;
      for (index_t p = 0; p < parts; ++p) there = there && at(p, e) > -HUGE_VAL;
      const double deviation = std::sqrt(square);
      of_passes.push_back(!there ? -HUGE_VAL
                          : passes.rule == pass_rule::bound
                              ? mean - static_cast<double>(passes.lambda) * deviation
                              : mean / std::max(deviation, 1e-6));
    }
    // A quotient by nearly nothing has the roundings of that.
    if (passes.rule == pass_rule::bound || parts > 2) CHECK(alike(after(passes), of_passes));
    if (parts != 1) continue;
    double mean = 0.0, square = 0.0, count = 0.0;
    for (const float x : z)
      if (std::isfinite(x)) mean += static_cast<double>(x), count += 1.0;
    mean /= std::max(count, 1.0);
    for (const float x : z)
      if (std::isfinite(x))
        square += (static_cast<double>(x) - mean) * (static_cast<double>(x) - mean);
    const double deviation = std::sqrt(square / std::max(count, 1.0));
    const float lambda = coin() ? 1.0f : 2.5f;
    std::vector<double> standard;
    for (const float x : z)
      standard.push_back(!(x > -test::infinity) ? -HUGE_VAL
                         : deviation > 1e-6     ? static_cast<double>(lambda) *
                                                  (static_cast<double>(x) - mean) / deviation
                                            : 0.0);
    std::vector<float> got = after(standardized{lambda});
    for (float& x : got)
      if (x != x) x = -test::infinity;
    CHECK(alike(got, standard));
    // The lot, expert by expert.
    const candidates lot{.active = 1 + rng.below(n),
                         .scope = coin() ? row_scope::token : row_scope::batch};
    std::vector<float> drawn = z;
    index_t wanted = lot.active;
    for (index_t e = 0; e < n; ++e) {
      const auto place =
          static_cast<std::uint64_t>((lot.scope == row_scope::token ? token : 0) * n + e);
      const bool is_in =
          static_cast<index_t>(random_below(
              static_cast<std::uint32_t>(n - e), side.seed,
              detail::random_stream(detail::random_use::candidates, side.step), place)) < wanted;
      wanted -= is_in;
      if (!is_in) drawn[static_cast<std::size_t>(e)] = -test::infinity;
    }
    CHECK(wanted == 0);
    const std::vector<float> left = after(lot);
    CHECK(std::memcmp(left.data(), drawn.data(), size * 4) == 0);
    // Promoted and suppressed experts.
    std::vector<expert_id> list(size), up, down;
    for (std::size_t i = 0; i < size; ++i) list[i] = static_cast<expert_id>(i);
    for (std::size_t i = 0; i < size; ++i)
      std::swap(list[i], list[static_cast<std::size_t>(rng.below(n))]);
    for (std::size_t i = 0; i < size; ++i)
      if (const auto where = rng.below(4); where < 2) (where == 0 ? up : down).push_back(list[i]);
    const steering steer{.promote = up,
                         .suppress = down,
                         .how = coin() ? promotion::soft : promotion::hard,
                         .lambda = coin() ? 1.0f : -0.75f};
    CHECK(steer.active() == !(up.empty() && down.empty()));
    float top = -test::infinity;
    for (const float x : z) top = x > top ? x : top;
    std::vector<double> steered(z.begin(), z.end());
    for (std::size_t i = 0; i < up.size(); ++i) {
      double& x = steered[static_cast<std::size_t>(up[i])];
      if (steer.how == promotion::soft)
        x += static_cast<double>(steer.lambda) * (deviation > 1e-6 ? deviation : 0.0);
      else if (x > -HUGE_VAL)
        x = static_cast<double>(top) +
            std::max(1e-6, std::abs(static_cast<double>(top)) * 0x1p-22) *
                static_cast<double>(up.size() - i);
    }
    for (const expert_id e : down) steered[static_cast<std::size_t>(e)] = -HUGE_VAL;
    std::vector<float> by_steer = after(steer);
    for (std::size_t i = 0; i < size; ++i)
      if (by_steer[i] != by_steer[i]) by_steer[i] = -test::infinity;
    for (double& x : steered)
      if (x != x) x = -HUGE_VAL;
    CHECK(alike(by_steer, steered));
    if (steer.how == promotion::hard) {  // the first of the list on top, and so on
      float above = test::infinity;
      bool falls = true;
      for (const expert_id e : up) {
        const float x = by_steer[static_cast<std::size_t>(e)];
        if (x == -test::infinity) continue;
        falls = falls && x < above && x > top;
        above = x;
      }
      CHECK(falls);
    }
  }
}

TEST_CASE("steps picked at run time are the steps themselves, one after the other") {
  test::random rng(107);
  for (index_t round = 0; round < 200; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t n = 4 + rng.below(30);
    const std::vector<expert_id> up{1}, down{3};
    any_row_transform all;
    all.sums_sigmoids = coin();
    if (!all.sums_sigmoids && coin()) all.passes = {.passes = 3, .lambda = 0.5f};
    if (coin()) all.standardize = 1.5f;
    if (coin()) all.steer = {.promote = up, .suppress = down, .lambda = 0.5f};
    if (coin()) all.lot = {.active = 2 + rng.below(n - 2)};
    const index_t columns = n * (all.sums_sigmoids ? 2 : all.passes.passes);
    CHECK(all.experts(columns) == n);
    CHECK(test::refusal([&] { all.check(columns, 1); }) == "accepted");
    const std::vector<float> z = test::make_logits(test::shape::normal, 5, 1, columns);
    const side_inputs side{.seed = rng.bits()};
    std::vector<float> got(static_cast<std::size_t>(n)), expected(got);
    all.apply_row(z.data(), columns, 7, side, got.data());
    if (all.sums_sigmoids)
      sigmoid_sum::apply_row(z.data(), columns, 7, side, expected.data());
    else if (all.passes.passes > 1)
      all.passes.apply_row(z.data(), columns, 7, side, expected.data());
    else
      expected = z;
    float* const row = expected.data();
    if (all.standardize != 0.0f) standardized{all.standardize}.apply_row(row, n, 7, side, row);
    if (all.steer.active()) all.steer.apply_row(row, n, 7, side, row);
    if (all.lot.active != 0) all.lot.apply_row(row, n, 7, side, row);
    CHECK(test::bit_difference(got, expected) == "");
    CHECK(all.active() == (all.sums_sigmoids || all.passes.passes > 1 || all.standardize != 0.0f ||
                           all.steer.active() || all.lot.active != 0));
  }
  const auto refused = [](const any_row_transform& t, index_t columns) {
    return test::refusal([&] { t.check(columns, 2); });
  };
  CHECK(refused({.sums_sigmoids = true}, 7) ==
        "moeroute::sigmoid_sum: columns is 7, expected a multiple of 2");
  CHECK(refused({.sums_sigmoids = true}, 0) ==
        "moeroute::sigmoid_sum: columns is 0, expected a multiple of 2");
  CHECK(refused({.passes = {.passes = 3}}, 8) ==
        "moeroute::pass_logits: columns is 8, expected a multiple of passes = 3");
  CHECK(refused({.passes = {.passes = 0}}, 8) ==
        "moeroute::pass_logits: passes is 0, expected 1 to 65536");
  CHECK(refused({.passes = {.passes = 65537}}, 8) ==
        "moeroute::pass_logits: passes is 65537, expected 1 to 65536");
  CHECK(refused({.passes = {.passes = 65536}}, 1 << 17) == "accepted");
  CHECK(refused({.standardize = -1.0f}, 8) ==
        "moeroute::standardized: lambda is -1.000000, expected > 0");
  CHECK(refused({.lot = {.active = 9}}, 8) == "moeroute::candidates: active is 9, expected 2 to 8");
  CHECK(refused({.lot = {.active = 1}}, 8) == "moeroute::candidates: active is 1, expected 2 to 8");
  CHECK(refused({.lot = {.active = 2}}, 8) == "accepted");
  const std::vector<expert_id> low{-1}, end{7}, two{0, 1}, six{0, 1, 2, 3, 4, 5};
  CHECK(refused({.steer = {.promote = low}}, 8) ==
        "moeroute::steering: promote is -1, expected 0 to 7");
  CHECK(refused({.steer = {.promote = end, .suppress = six}}, 8) == "accepted");
  CHECK(refused({.steer = {.suppress = low}}, 8) ==
        "moeroute::steering: suppress is -1, expected 0 to 7");
  CHECK(refused({.steer = {.promote = two, .suppress = two}}, 8) ==
        "moeroute::steering: expert 0 is both promoted and suppressed");
  const any_row_transform none;
  CHECK_FALSE(none.active());
  CHECK(none.experts(9) == 9);
  CHECK((pass_logits{}.passes == 8 && pass_logits{}.lambda == 1.0f &&
         pass_logits{}.rule == pass_rule::bound && standardized{}.lambda == 1.0f &&
         steering{}.lambda == 1.0f && steering{}.how == promotion::soft &&
         candidates{}.active == 1 && candidates{}.scope == row_scope::token));
}

}  // namespace rare_rules_tests
