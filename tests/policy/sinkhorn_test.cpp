#include <moeroute/policy/batch/sinkhorn.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/route.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "oracle/batch_routing.hpp"
#include "support/batch_bits.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::listed;
using test::routed;
using test::rows_of;

namespace {

struct planned {
  std::vector<float> values;
  index_t iterations;
};

planned plan_of(const sinkhorn_scaling& how, const std::vector<float>& z, index_t tokens,
                index_t experts, const side_inputs& side = {}) {
  planned p{std::vector<float>(z.size()), 0};
  workspace ws;
  p.iterations = sinkhorn_plan(how, rows_of(z, experts), side, ws,
                               matrix_view<float>(p.values.data(), tokens, experts));
  return p;
}

std::vector<double> sums(const std::vector<float>& m, index_t tokens, index_t experts, bool rows) {
  std::vector<double> sum(static_cast<std::size_t>(rows ? tokens : experts), 0.0);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      sum[static_cast<std::size_t>(rows ? t : e)] +=
          static_cast<double>(m[static_cast<std::size_t>(t * experts + e)]);
  return sum;
}

double worst(const std::vector<double>& sum, double target) {
  double error = 0;
  for (const double s : sum) error = std::max(error, std::abs(s / target - 1));
  return error;
}

sinkhorn_scaling with(sinkhorn_scaling s, sinkhorn_domain d) {
  s.domain = d;
  return s;
}

constexpr sinkhorn_domain both_domains[] = {sinkhorn_domain::exponential,
                                            sinkhorn_domain::logarithm};

}  // namespace

TEST_CASE("the plan is that of the double-precision iteration, with as many iterations") {
  for (const auto& [tokens, experts] :
       {std::pair<index_t, index_t>{1, 1}, {1, 7}, {5, 3}, {64, 8}, {300, 60}, {1100, 17}})
    for (const auto order : {scaling_order::rows_then_columns, scaling_order::columns_then_rows})
      for (const auto mass : {plan_mass::one, plan_mass::tokens})
        for (const auto domain : both_domains) {
          const auto z = test::make_logits(test::shape::normal, 7, tokens, experts);
          const sinkhorn_scaling how{
              .mass = mass, .order = order, .domain = domain, .temperature = 1.5f};
          const auto T = static_cast<double>(tokens), E = static_cast<double>(experts);
          const bool one = mass == plan_mass::one;
          const oracle::transport expected = oracle::sinkhorn(
              {z.begin(), z.end()}, tokens, experts, one ? 1 / T : 1.0, one ? 1 / E : T / E, 1.5,
              domain == sinkhorn_domain::exponential ? 1e-8 : 0.0, 1e-4, 1000,
              order == scaling_order::rows_then_columns ? oracle::scaling_order::rows_then_columns
                                                        : oracle::scaling_order::columns_then_rows);
          const planned p = plan_of(how, z, tokens, experts);
          INFO("T=" << tokens << " E=" << experts << " order=" << int(order)
                    << " mass=" << int(mass) << " domain=" << int(domain));
          CHECK(p.iterations == expected.iterations);
          CHECK(test::difference(p.values, expected.values, 2e-5) == "");
        }
}

TEST_CASE("the sums that were scaled last are exact, the others within tolerance") {
  constexpr index_t tokens = 500, experts = 24;
  for (const test::shape shape : {test::shape::normal, test::shape::zipf, test::shape::quantised})
    for (const auto domain : both_domains)
      for (const auto order :
           {scaling_order::rows_then_columns, scaling_order::columns_then_rows}) {
        const auto z = test::make_logits(shape, 3, tokens, experts);
        const planned p = plan_of({.mass = plan_mass::tokens,
                                   .order = order,
                                   .domain = domain,
                                   .stop = sinkhorn_stop::column_error,
                                   .eps = 0.0f,
                                   .tolerance = 1e-4f},
                                  z, tokens, experts);
        const double rows = worst(sums(p.values, tokens, experts, true), 1.0);
        const double columns =
            worst(sums(p.values, tokens, experts, false), static_cast<double>(tokens) / experts);
        const bool rows_last = order == scaling_order::columns_then_rows;
        INFO(test::name(shape) << " " << int(domain) << " " << int(order) << " rows " << rows
                               << " columns " << columns);
        CHECK((rows_last ? rows : columns) < 3e-6);
        CHECK((rows_last ? columns : rows) < 1.1e-4);
      }
}

TEST_CASE("V-MoE's projection scales rows last: they are exact, however few its iterations") {
  const std::vector<float> z{0.0f, 0.0f, 0.0f, 20.0f};
  const planned p = plan_of(kl_projection_scaling, z, 2, 2);
  CHECK(worst(sums(p.values, 2, 2, true), 1.0) < 1e-6);
  CHECK(worst(sums(p.values, 2, 2, false), 1.0) > 1e-3);
}

TEST_CASE("the two by two example has 0.715042 on its diagonal") {
  const std::vector<float> z{0.73f, 0.27f, 0.27f, 0.73f};
  for (const auto domain : both_domains) {
    sinkhorn_scaling how = selective_sinkhorn{}.scaling;
    how.temperature = 0.5f;
    how.domain = domain;
    const planned p = plan_of(how, z, 2, 2);
    const std::vector<double> expected{0.715042, 0.284958, 0.284958, 0.715042};
    CHECK(test::difference(p.values, expected, 2e-6) == "");
  }
}

TEST_CASE("a skewed batch becomes nearly even") {
  constexpr index_t tokens = 2048, experts = 8;
  const auto z = test::make_logits(test::shape::zipf, 2, tokens, experts);
  const auto most = [&](const assignment& a) {
    std::vector<int> load(experts, 0);
    for (const expert_id e : a.ids()) ++load[static_cast<std::size_t>(e)];
    return static_cast<double>(*std::max_element(load.begin(), load.end())) * experts / tokens;
  };
  CHECK(most(routed(sinkhorn{}, z, experts)) < 1.15);
  CHECK(most(routed(sinkhorn{.phase = routing_phase::evaluation}, z, experts)) > 1.8);
}

TEST_CASE("with shares columns sum to them, as in the double-precision iteration") {
  for (const auto& [tokens, experts] : {std::pair<index_t, index_t>{5, 3}, {64, 8}, {300, 60}})
    for (const auto order : {scaling_order::rows_then_columns, scaling_order::columns_then_rows})
      for (const auto mass : {plan_mass::one, plan_mass::tokens})
        for (const auto domain : both_domains) {
          const auto z = test::make_logits(test::shape::normal, 7, tokens, experts);
          const auto T = static_cast<double>(tokens);
          const double all = mass == plan_mass::one ? 1.0 : T;
          std::vector<float> share;
          std::vector<double> target;
          for (index_t e = 0; e < experts; ++e) share.push_back(e % 3 == 2 ? 8.0f : 0.5f);
          const double sum = std::accumulate(share.begin(), share.end(), 0.0);
          for (const float s : share) target.push_back(all * double{s} / sum);
          sinkhorn_scaling how{.mass = mass, .order = order, .domain = domain};
          how.tolerance = 1e-5f;
          const oracle::transport expected = oracle::sinkhorn(
              {z.begin(), z.end()}, tokens, experts, all / T, target, 1.0,
              domain == sinkhorn_domain::exponential ? 1e-8 : 0.0, 1e-5, 1000,
              order == scaling_order::rows_then_columns ? oracle::scaling_order::rows_then_columns
                                                        : oracle::scaling_order::columns_then_rows);
          std::vector<float> plan(z.size());
          workspace ws;
          sinkhorn_plan(how, rows_of(z, experts), {}, ws,
                        matrix_view<float>(plan.data(), tokens, experts), serial{}, share);
          INFO("T=" << tokens << " E=" << experts << " order=" << int(order)
                    << " mass=" << int(mass) << " domain=" << int(domain));
          CHECK(test::difference(plan, expected.values, 1e-4) == "");
          const auto columns = sums(plan, tokens, experts, false);
          for (std::size_t e = 0; e < share.size(); ++e)
            CHECK(std::abs(columns[e] / target[e] - 1.0) < 5e-3);
        }
}

TEST_CASE("a batch is shared out as experts' shares say; equal shares change no bit") {
  constexpr index_t tokens = 2048, experts = 8;
  const auto z = test::make_logits(test::shape::zipf, 2, tokens, experts);
  const std::vector<float> share{1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 2.0f, 8.0f}, equal(8, 5.0f);
  // The sharper a plan is, the nearer its choices are to its sums, and the longer it takes.
  for (const sinkhorn_scaling& base : {megatron_scaling, kl_projection_scaling})
    for (const sinkhorn_domain domain : both_domains) {
      sinkhorn_scaling how = base;
      how.domain = domain;
      how.stop = sinkhorn_stop::column_error;
      how.temperature = 0.1f;
      how.eps = 0.0f;  // beside the factor of an expert that every token wants 1e-8 is much
      how.tolerance = 1e-3f;
      how.most_iterations = 2000;
      const assignment a = routed(sinkhorn{.scaling = how, .share = share}, z, experts);
      std::vector<int> load(experts, 0);
      for (const expert_id e : a.ids()) ++load[static_cast<std::size_t>(e)];
      for (std::size_t e = 0; e < experts; ++e) {
        const double wanted = double{share[e]} / 16.0 * tokens;
        UNSCOPED_INFO(e << ": " << load[e] << " of " << wanted);
        CHECK(std::abs(load[e] / wanted - 1.0) < 0.3);
      }
      how = with(base, domain);
      const assignment b = routed(sinkhorn{.k = 2, .scaling = how, .share = equal}, z, experts);
      const assignment c = routed(sinkhorn{.k = 2, .scaling = how}, z, experts);
      CHECK(test::bit_difference(b.ids(), c.ids()) == "");
      CHECK(test::bit_difference(b.weights(), c.weights()) == "");
    }
  const std::vector<float> seven(7, 1.0f), zero{1.0f, 0.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  CHECK(test::refusal([&] { routed(sinkhorn{.share = seven}, z, experts); }) ==
        "moeroute::sinkhorn: share.size() is 7, expected 8");
  CHECK(test::refusal([&] { routed(sinkhorn{.share = zero}, z, experts); }) ==
        "moeroute::sinkhorn: share of expert 1 is 0.000000, expected > 0");
}

TEST_CASE(
    "weights are sigmoid for one expert, softmax over all for more, and sum to 1 from the plan") {
  constexpr index_t tokens = 40, experts = 12;
  const auto z = test::make_logits(test::shape::normal, 5, tokens, experts);
  const auto p = oracle::softmax_rows(z, tokens, experts);
  const assignment one = routed(sinkhorn{.k = 1}, z, experts);
  const assignment two = routed(sinkhorn{.k = 2}, z, experts);
  std::vector<double> first, pair;
  for (index_t t = 0; t < tokens; ++t) {
    const double logit =
        static_cast<double>(z[static_cast<std::size_t>(t * experts + one.ids(t)[0])]);
    first.push_back(1 / (1 + std::exp(-logit)));
    for (const expert_id e : two.ids(t))
      pair.push_back(p[static_cast<std::size_t>(t * experts + e)]);
  }
  CHECK(test::difference(one.weights(), first, 3e-6) == "");
  CHECK(test::difference(two.weights(), pair, 3e-6) == "");
  for (const auto domain : both_domains) {
    const assignment plan = routed(
        sinkhorn{.k = 2, .weights = plan_weights::plan, .scaling = with(megatron_scaling, domain)},
        z, experts);
    for (index_t t = 0; t < tokens; ++t)
      CHECK(std::abs(plan.weights(t)[0] + plan.weights(t)[1] - 1.0f) < 1e-6f);
  }
}

TEST_CASE("evaluation routes by the logits alone") {
  constexpr index_t tokens = 30, experts = 20;
  const auto z = test::make_logits(test::shape::quantised, 5, tokens, experts);
  const assignment a = routed(sinkhorn{.k = 3, .phase = routing_phase::evaluation}, z, experts);
  for (index_t t = 0; t < tokens; ++t)
    CHECK(listed(a.ids(t)) == oracle::top_k(z.data() + t * experts, experts, 3));
}

TEST_CASE("shifting a token's logits changes no choice") {
  constexpr index_t tokens = 200, experts = 16;
  const auto z = test::make_logits(test::shape::quantised, 6, tokens, experts);
  auto shifted = z;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      shifted[static_cast<std::size_t>(t * experts + e)] += static_cast<float>(t % 7) * 32.0f;
  for (const auto domain : both_domains) {
    const sinkhorn router{.k = 2, .scaling = with(megatron_scaling, domain)};
    CHECK(listed(routed(router, z, experts).ids()) ==
          listed(routed(router, shifted, experts).ids()));
  }
}

TEST_CASE("plans stay finite and choices in range, whatever the logits") {
  for (const test::shape shape : test::all_shapes)
    for (const auto domain : both_domains)
      for (const auto& [tokens, experts] :
           {std::pair<index_t, index_t>{1, 1}, {1, 9}, {37, 1}, {64, 24}})
        for (const auto& base : {megatron_scaling, kl_projection_scaling}) {
          const auto z = test::make_logits(shape, 3, tokens, experts);
          const auto how = with(base, domain);
          const planned p = plan_of(how, z, tokens, experts);
          INFO(test::name(shape) << " domain=" << int(domain) << " T=" << tokens
                                 << " E=" << experts);
          CHECK(std::all_of(p.values.begin(), p.values.end(),
                            [](float x) { return std::isfinite(x) && x >= 0.0f; }));
          for (const index_t k : {index_t{1}, experts}) {
            const assignment a = routed(sinkhorn{.k = k, .scaling = how}, z, experts);
            bool sound = true;
            for (index_t t = 0; t < tokens; ++t) {
              const auto open = oracle::order(z.data() + t * experts, experts);
              for (std::size_t r = 0; r < a.ids(t).size(); ++r) {
                const expert_id e = a.ids(t)[r];
                const float w = a.weights(t)[r];
                sound = sound && std::isfinite(w) && (e == no_expert) == (r >= open.size());
                if (e == no_expert) {
                  sound = sound && w == 0.0f;
                } else {
                  sound = sound && std::find(open.begin(), open.end(), e) != open.end();
                }
              }
            }
            CHECK(sound);
          }
        }
}

TEST_CASE("logits of 10000 are balanced in the log domain") {
  // Two groups of tokens want one expert each by a margin that exp cannot hold.
  constexpr index_t tokens = 64, experts = 4;
  std::vector<float> z;
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      z.push_back(e == 0 ? 1e4f : -1e4f + static_cast<float>((t * 7 + e * 3) % 11));
  const planned p = plan_of({.mass = plan_mass::tokens,
                             .domain = sinkhorn_domain::logarithm,
                             .stop = sinkhorn_stop::column_error,
                             .tolerance = 1e-3f,
                             .most_iterations = 1000},
                            z, tokens, experts);
  CHECK(worst(sums(p.values, tokens, experts, true), 1.0) < 2e-2);
  CHECK(worst(sums(p.values, tokens, experts, false), 16.0) < 2e-2);
}

TEST_CASE(
    "more than 69 temperatures down all is equally hopeless to exp, and not to the logarithm") {
  // One token that wants expert 0 alone, and others that want them all alike.
  std::vector<float> z(8 * 4, 0.0f);
  const float low[] = {0.0f, -100.0f, -80.0f, -90.0f};
  std::copy(low, low + 4, z.begin());
  for (const float temperature : {1.0f, 0.5f}) {
    std::vector<float> scaled = z;
    for (float& x : scaled) x *= temperature;
    sinkhorn router{.k = 4};
    router.scaling.temperature = temperature;
    router.scaling.domain = sinkhorn_domain::exponential;
    CHECK(listed(routed(router, scaled, 4).ids(0)) == std::vector<expert_id>{0, 1, 2, 3});
    router.scaling.domain = sinkhorn_domain::logarithm;
    CHECK(listed(routed(router, scaled, 4).ids(0)) == std::vector<expert_id>{0, 2, 3, 1});
    for (float& x : scaled) x *= 0.65f;  // 65 at the most
    router.scaling.domain = sinkhorn_domain::exponential;
    CHECK(listed(routed(router, scaled, 4).ids(0)) == std::vector<expert_id>{0, 2, 3, 1});
  }
}

TEST_CASE("an expert that no token can go to stops nobody from converging") {
  constexpr index_t tokens = 80, experts = 5;
  auto z = test::make_logits(test::shape::normal, 3, tokens, experts);
  for (index_t t = 0; t < tokens; ++t)
    z[static_cast<std::size_t>(t * experts + 2)] = -test::infinity;
  for (const auto domain : both_domains)
    for (const auto stop : {sinkhorn_stop::mean_change, sinkhorn_stop::column_error}) {
      // The other columns hold 1/5 each of what rows of 1 cannot fill: only their ratio settles.
      const planned p = plan_of({.mass = plan_mass::tokens,
                                 .order = scaling_order::columns_then_rows,
                                 .domain = domain,
                                 .stop = stop,
                                 .tolerance = 0.26f,
                                 .most_iterations = 50},
                                z, tokens, experts);
      CHECK(p.iterations < 50);
      const auto columns = sums(p.values, tokens, experts, false);
      CHECK(columns[2] == 0.0);
      CHECK(worst(sums(p.values, tokens, experts, true), 1.0) < 3e-6);
    }
}

TEST_CASE("masked tokens have no part in the plan") {
  constexpr index_t tokens = 60, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 3, tokens, experts);
  std::vector<std::uint8_t> mask(tokens, 1);
  std::vector<float> open;
  for (index_t t = 0; t < tokens; ++t) {
    if (t % 4 == 1) {
      mask[static_cast<std::size_t>(t)] = 0;
    } else {
      open.insert(open.end(), z.begin() + t * experts, z.begin() + (t + 1) * experts);
    }
  }
  const assignment all = routed(sinkhorn{.k = 2}, z, experts, {.mask = mask});
  const assignment rest = routed(sinkhorn{.k = 2}, open, experts);
  index_t at = 0;
  for (index_t t = 0; t < tokens; ++t) {
    if (mask[static_cast<std::size_t>(t)] == 0) {
      CHECK(listed(all.ids(t)) == std::vector<expert_id>{no_expert, no_expert});
    } else {
      CHECK(listed(all.ids(t)) == listed(rest.ids(at++)));
    }
  }
  std::fill(mask.begin(), mask.end(), std::uint8_t{0});
  const assignment none = routed(sinkhorn{.k = 2}, z, experts, {.mask = mask});
  CHECK(std::all_of(none.ids().begin(), none.ids().end(),
                    [](expert_id e) { return e == no_expert; }));
}

TEST_CASE("Sinkhorn has the same bits on every instruction set, executor and thread count") {
  for (const test::shape shape : test::all_shapes)
    for (const auto domain : both_domains) {
      // One shape of several pieces tells whether they are joined in order.
      const index_t tokens = test::sized(2500, shape == test::shape::normal ? 900 : 60),
                    experts = 40;
      const auto z = test::make_logits(shape, 12, tokens, experts);
      auto how = with(megatron_scaling, domain);
      how.most_iterations = test::sized(12, 2);
      const sinkhorn router{.k = 4, .weights = plan_weights::plan, .scaling = how};
      INFO(test::name(shape) << " domain " << int(domain));
      CHECK(test::batch_bits_differ(router, z, experts) == "");
    }
}

TEST_CASE("selective routing with probability 0 has the bits of a softmax top-k") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = 33, experts = 24;
    const auto z = test::make_logits(shape, 12, tokens, experts);
    const assignment a = routed(selective_sinkhorn{.k = 3, .probability = 0.0f}, z, experts);
    const assignment b =
        routed(router<softmax>{.selection = {.k = 3}, .weight = sum_normalized}, z, experts);
    const assignment c =
        routed(selective_sinkhorn{.k = 3, .probability = 1.0f, .phase = routing_phase::evaluation},
               z, experts);
    CHECK(listed(a.ids()) == listed(b.ids()));
    CHECK(listed(c.ids()) == listed(b.ids()));
    CHECK(test::bit_difference(a.weights(), b.weights()) == "");
    CHECK(test::bit_difference(c.weights(), b.weights()) == "");
  }
}

TEST_CASE("selective routing takes the plan as often as it says, and the same steps again") {
  const selective_sinkhorn router{.k = 1, .probability = 0.25f};
  const selective_sinkhorn above{.k = 1, .probability = 0.25f, .stream = 7};
  int balanced = 0;
  for (std::uint64_t step = 0; step < 4000; ++step) {
    const side_inputs side{.seed = 5, .step = step};
    CHECK(router.balances(side) == (random_u01(5, router.stream, step) < 0.25f));
    CHECK(above.balances(side) == (random_u01(5, 7, step) < 0.25f));
    balanced += router.balances(side);
  }
  CHECK(std::abs(balanced - 1000) < 140);  // 5 standard deviations
}

TEST_CASE("weights of a selective plan sum to 1 and its choices are even") {
  constexpr index_t tokens = 512, experts = 8;
  const auto z = test::make_logits(test::shape::one_hot_expert, 4, tokens, experts);
  selective_sinkhorn router{.k = 1, .probability = 1.0f};
  router.scaling.temperature = 1.0f;
  const assignment a = routed(router, z, experts);
  std::vector<int> load(experts, 0);
  for (const expert_id e : a.ids()) ++load[static_cast<std::size_t>(e)];
  CHECK(*std::max_element(load.begin(), load.end()) < 90);
  CHECK(std::all_of(a.weights().begin(), a.weights().end(), [](float w) { return w == 1.0f; }));
}

TEST_CASE("a balanced step of selective routing is the plan's own, shares and all") {
  constexpr index_t tokens = 64, experts = 4;
  const auto z = test::make_logits(test::shape::normal, 3, tokens, experts);
  for (const std::vector<float>& share : {std::vector<float>{}, {1.0f, 1.0f, 1.0f, 5.0f}})
    for (const index_t k : {1, 2}) {
      const selective_sinkhorn router{.k = k, .probability = 1.0f, .share = share};
      const assignment a = routed(router, z, experts);
      const assignment b = routed(
          sinkhorn{
              .k = k, .weights = plan_weights::plan, .scaling = router.scaling, .share = share},
          z, experts);
      CHECK(listed(a.ids()) == listed(b.ids()));
      CHECK(test::bit_difference(a.weights(), b.weights()) == "");
    }
}

TEST_CASE("Sinkhorn refuses what does not fit, by name") {
  const auto refusal = [](const sinkhorn& r) { return test::refusal([&] { r.check(10, 4); }); };
  CHECK(refusal({.k = 5}) == "moeroute::sinkhorn: k is 5, expected 1 to 4");
  CHECK(refusal({.scaling = {.temperature = 0.0f}}) ==
        "moeroute::sinkhorn: temperature is 0.000000, expected > 0");
  CHECK(refusal({.scaling = {.most_iterations = 0}}) ==
        "moeroute::sinkhorn: most_iterations is 0, expected 1 to 1073741824");
  CHECK(refusal({.phase = routing_phase::evaluation, .weights = plan_weights::plan}) ==
        "moeroute::sinkhorn: weights is plan and phase is evaluation, which has no plan");
  CHECK(refusal({}) == "accepted");
  CHECK(test::refusal([] { selective_sinkhorn{.probability = 1.5f}.check(10, 4); }) ==
        "moeroute::selective_sinkhorn: probability is 1.500000, expected 0 to 1");
  CHECK(test::refusal([] { selective_sinkhorn{.noise = {.sigma = -1.0f}}.check(10, 4); }) ==
        "moeroute::logit_noise: sigma is -1.000000, expected >= 0");
  const auto z = test::make_logits(test::shape::normal, 3, 4, 3);
  std::vector<float> dense(20);
  workspace ws;
  const auto planned = [&](index_t rows, index_t cols) {
    return test::refusal([&] {
      sinkhorn_plan({}, rows_of(z, 3), {}, ws, matrix_view<float>(dense.data(), rows, cols));
    });
  };
  CHECK(planned(3, 3) == "moeroute::sinkhorn_plan: plan.rows is 3, expected 4");
  CHECK(planned(4, 4) == "moeroute::sinkhorn_plan: plan.cols is 4, expected 3");
  CHECK(planned(4, 3) == "accepted");
  index_t iterations = -1;
  const auto of = [&](index_t rows, index_t experts) {
    return test::refusal([&] {
      iterations =
          sinkhorn_plan({}, {z.data(), rows, experts}, {}, ws, {dense.data(), rows, experts});
    });
  };
  CHECK(of(0, 3) == "accepted");
  CHECK(iterations == 0);
  CHECK(of(4, 0) ==
        "moeroute::sinkhorn_plan: experts is 0, expected 1 to " + std::to_string(max_experts));
}

namespace {

// The plan in double, as the comments of sinkhorn_scaling say.
struct slow_plan {
  std::vector<double> values;
  index_t iterations = 0;

  slow_plan(const sinkhorn_scaling& how, const std::vector<float>& z, index_t tokens,
            index_t experts, const side_inputs& side, const std::vector<float>& share)
      : values(z.size(), 0.0) {
    const auto E = static_cast<std::size_t>(experts), T = static_cast<std::size_t>(tokens);
    std::vector<double> kernel(z.size(), 0.0), u(T, 1.0), v(E, 1.0), column_mass(E), sum(E);
    double live = 0.0;
    const std::vector<double> softmax = oracle::softmax_rows(z, tokens, experts);
    for (std::size_t t = 0; t < T; ++t) {
      std::vector<double> row(E, -HUGE_VAL);
      for (std::size_t e = 0; e < E; ++e)
        if (!side.masked(static_cast<index_t>(t)) && z[t * E + e] > -test::infinity)
          row[e] = how.similarity == plan_similarity::softmax ? softmax[t * E + e]
                                                              : double{z[t * E + e]};
      const double most = *std::max_element(row.begin(), row.end());
      if (most == -HUGE_VAL) continue;
      live += 1.0;
      for (std::size_t e = 0; e < E; ++e)
        kernel[t * E + e] = std::exp((row[e] - most) / static_cast<double>(how.temperature));
    }
    if (live == 0.0) return;
    const double all = how.mass == plan_mass::one ? 1.0 : live, row_mass = all / live;
    const double eps =
        how.domain == sinkhorn_domain::exponential ? static_cast<double>(how.eps) : 0.0;
    const double shares = std::accumulate(share.begin(), share.end(), 0.0);
    for (std::size_t e = 0; e < E; ++e)
      column_mass[e] = all * (share.empty() ? 1.0 / static_cast<double>(experts)
                                            : static_cast<double>(share[e]) / shares);
    double change = 0.0, error = 0.0;
    const auto add_columns = [&] {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (std::size_t i = 0; i < kernel.size(); ++i) sum[i % E] += kernel[i] * u[i / E];
    };
    const auto columns = [&] {
      change = 0.0;
      for (std::size_t e = 0; e < E; ++e) {
        const double next = sum[e] > 0.0 ? column_mass[e] / (sum[e] + eps) : 0.0;
        change += std::abs(next - v[e]) / static_cast<double>(experts);
        v[e] = next;
      }
    };
    const auto rows = [&] {
      for (std::size_t t = 0; t < T; ++t) {
        double dot = 0.0;
        for (std::size_t e = 0; e < E; ++e) dot += kernel[t * E + e] * v[e];
        u[t] = dot > 0.0 ? row_mass / (dot + eps) : 0.0;
      }
      add_columns();
      error = 0.0;
      for (std::size_t e = 0; e < E; ++e)
        if (sum[e] > 0.0) error = std::max(error, std::abs(v[e] * sum[e] / column_mass[e] - 1.0));
    };
    const bool columns_first = how.order == scaling_order::columns_then_rows;
    add_columns();
    do {
      if (columns_first) columns();
      rows();
      if (!columns_first) columns();
      ++iterations;
    } while ((how.stop == sinkhorn_stop::column_error ? error : change) >
                 static_cast<double>(how.tolerance) &&
             iterations < how.most_iterations);
    for (std::size_t i = 0; i < kernel.size(); ++i) values[i] = u[i / E] * kernel[i] * v[i % E];
  }
};

}  // namespace

TEST_CASE("with every option at once the plan and its choices are those of a slow iteration") {
  test::random rng(31);
  for (index_t round = 0; round < test::sized(250, 23); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    // Now and then more tokens than the largest piece has.
    const index_t experts = 1 + rng.below(20), several = round % 8 == 7 ? 2048 : 0,
                  tokens = 1 + several + rng.below(90);
    sinkhorn router{.k = 1 + rng.below(experts)};
    router.weights = static_cast<plan_weights>(rng.below(4));
    router.scaling = {
        .mass = coin() ? plan_mass::one : plan_mass::tokens,
        .order = coin() ? scaling_order::rows_then_columns : scaling_order::columns_then_rows,
        .domain = both_domains[rng.below(2)],
        .stop = coin() ? sinkhorn_stop::mean_change : sinkhorn_stop::column_error,
        .similarity = coin() ? plan_similarity::logits : plan_similarity::softmax,
        .temperature = coin() ? 1.0f : 0.25f + rng.uniform(),
        .eps = coin() ? 0.0f : 1e-3f,
        .tolerance = coin() ? 0.0f : 0.05f,
        .most_iterations = 1 + rng.below(6)};
    std::vector<float> z = test::make_logits(test::shape::normal, rng.bits() % 1000, tokens,
                                             experts),
                       share;
    for (float& x : z)
      if (const auto odd = rng.below(24); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    if (coin())
      for (index_t e = 0; e < experts; ++e) share.push_back(0.5f + rng.uniform());
    router.share = share;
    std::vector<std::uint8_t> mask;
    std::vector<std::int32_t> own_k;
    for (index_t t = 0; t < tokens; ++t) {
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
      own_k.push_back(static_cast<std::int32_t>(rng.below(router.k + 1)));
    }
    side_inputs side;
    if (coin()) side.mask = mask;
    const slow_plan expected(router.scaling, z, tokens, experts, side, share);
    std::vector<float> plan(z.size(), 5.0f);
    workspace ws;
    const auto to = matrix_view<float>(plan.data(), tokens, experts);
    const index_t iterations =
        coin() ? sinkhorn_plan(router.scaling, rows_of(z, experts), side, ws, to, serial{}, share)
               : sinkhorn_plan(router.scaling, rows_of(z, experts), side, ws, to,
                               test::several_threads{3}, share);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << router.k
                  << " weights " << int(router.weights) << " domain " << int(router.scaling.domain)
                  << " order " << int(router.scaling.order) << " stop "
                  << int(router.scaling.stop));
    // Whether an error is 0 is decided by rounding.
    if (router.scaling.tolerance > 0.0f) CHECK(iterations == expected.iterations);
    CHECK(iterations <= router.scaling.most_iterations);
    CHECK(test::difference(plan, expected.values, 3e-5, 1e-9) == "");

    if (coin()) side.k_of_token = own_k;
    const assignment out = routed(router, z, experts, side);
    const auto p = oracle::softmax_rows(z, tokens, experts);
    const auto rule = router.weights != plan_weights::by_k ? router.weights
                      : router.k == 1                      ? plan_weights::sigmoid
                                                           : plan_weights::softmax;
    std::string broken;
    for (index_t t = 0; t < tokens; ++t) {
      const auto row = [&](const auto& list, expert_id e) {
        return static_cast<double>(list[static_cast<std::size_t>(t * experts + e)]);
      };
      std::vector<expert_id> best;
      for (expert_id e = 0; e < experts; ++e)
        if (!side.masked(t) && row(z, e) > -HUGE_VAL) best.push_back(e);
      std::stable_sort(best.begin(), best.end(), [&](expert_id a, expert_id b) {
        return row(expected.values, a) > row(expected.values, b);
      });
      auto n = static_cast<std::size_t>(router.k);
      if (!side.k_of_token.empty()) n = static_cast<std::size_t>(own_k[std::size_t(t)]);
      best.resize(std::min(n, best.size()));
      double sum = 0.0;
      for (const expert_id e : best) sum += row(expected.values, e);
      for (std::size_t r = 0; r < static_cast<std::size_t>(router.k); ++r) {
        const expert_id e = out.ids(t)[r];
        const auto w = static_cast<double>(out.weights(t)[r]);
        if ((e == no_expert) != (r >= best.size())) broken = "count";
        if (e == no_expert && w != 0.0) broken = "weight of none";
        if (e == no_expert || r >= best.size()) continue;
        // Entries that only rounding tells apart may change places.
        if (std::abs(row(expected.values, e) / row(expected.values, best[r]) - 1.0) > 1e-4)
          broken = "another entry";
        const double value = rule == plan_weights::sigmoid   ? 1.0 / (1.0 + std::exp(-row(z, e)))
                             : rule == plan_weights::softmax ? row(p, e)
                                                             : row(expected.values, e) / sum;
        if (std::abs(w - value) > 1e-4 * value) broken = "weight";
        if (std::count(out.ids(t).begin(), out.ids(t).end(), e) != 1) broken = "twice";
      }
    }
    CHECK(broken == "");
  }
}

TEST_CASE("each number of Sinkhorn's rules has two ends, and one where nothing is said") {
  const std::vector<float> four(4, 1.0f), five(5, 1.0f), wild{1.0f, test::infinity, 1.0f, 1.0f},
      none{1.0f, test::not_a_number, 1.0f, 1.0f};
  const std::string experts_0 = ": experts is 0, expected 1 to 1048576",
                    experts_more = ": experts is 1048577, expected 1 to 1048576";
  const auto refused = [](const auto& rule, index_t experts = 4) {
    return test::refusal([&] { rule.check(8, experts); });
  };
  CHECK(refused(sinkhorn{.k = 0}) == "moeroute::sinkhorn: k is 0, expected 1 to 4");
  CHECK(refused(sinkhorn{.k = 4}) == "accepted");
  CHECK(refused(sinkhorn{}, 0) == "moeroute::sinkhorn" + experts_0);
  CHECK(refused(sinkhorn{}, max_experts) == "accepted");
  CHECK(refused(sinkhorn{}, max_experts + 1) == "moeroute::sinkhorn" + experts_more);
  CHECK(refused(sinkhorn{.share = four}) == "accepted");
  CHECK(refused(sinkhorn{.share = wild}) ==
        "moeroute::sinkhorn: share of expert 1 is inf, expected > 0");
  CHECK(refused(sinkhorn{.share = none}) ==
        "moeroute::sinkhorn: share of expert 1 is nan, expected > 0");
  CHECK(refused(sinkhorn{.phase = routing_phase::evaluation}) == "accepted");
  CHECK(refused(selective_sinkhorn{.k = 0}) ==
        "moeroute::selective_sinkhorn: k is 0, expected 1 to 4");
  CHECK(refused(selective_sinkhorn{.k = 4}) == "accepted");
  CHECK(refused(selective_sinkhorn{.k = 5}) ==
        "moeroute::selective_sinkhorn: k is 5, expected 1 to 4");
  CHECK(refused(selective_sinkhorn{}, 0) == "moeroute::selective_sinkhorn" + experts_0);
  CHECK(refused(selective_sinkhorn{}, max_experts + 1) ==
        "moeroute::selective_sinkhorn" + experts_more);
  CHECK(refused(selective_sinkhorn{.share = five}) ==
        "moeroute::selective_sinkhorn: share.size() is 5, expected 4");
  CHECK(refused(selective_sinkhorn{.scaling = {.temperature = 0.0f}}) ==
        "moeroute::selective_sinkhorn: temperature is 0.000000, expected > 0");
  CHECK(refused(sinkhorn_expert_choice{}, max_experts + 1) ==
        "moeroute::sinkhorn_expert_choice" + experts_more);
  CHECK(refused(sinkhorn_expert_choice{}, 1) == "accepted");
  CHECK(refused(sinkhorn_expert_choice{.capacity = {.factor = 0.0}}) ==
        "moeroute::expert_choice: capacity.factor is 0.000000, expected > 0");
  CHECK(refused(sinkhorn_expert_choice{.weights = plan_weights::sigmoid}) ==
        "moeroute::sinkhorn_expert_choice: weights is by_k or sigmoid, expected softmax or plan");
  CHECK(refused(sinkhorn_expert_choice{.weights = plan_weights::plan}) == "accepted");
  constexpr index_t most = index_t{1} << 30;
  const auto iterations = [&](index_t n) {
    return refused(sinkhorn{.scaling = {.most_iterations = n}});
  };
  CHECK(iterations(1) == "accepted");
  CHECK(iterations(most) == "accepted");
  CHECK(iterations(most + 1) ==
        "moeroute::sinkhorn: most_iterations is 1073741825, expected 1 to 1073741824");
  const sinkhorn_scaling plain{.mass = plan_mass::one,
                               .order = scaling_order::rows_then_columns,
                               .domain = sinkhorn_domain::exponential,
                               .stop = sinkhorn_stop::mean_change,
                               .similarity = plan_similarity::logits,
                               .temperature = 1.0f,
                               .eps = 1e-8f,
                               .tolerance = 1e-4f,
                               .most_iterations = 1000};
  CHECK((sinkhorn{}.scaling == plain && megatron_scaling == plain &&
         sinkhorn_expert_choice{}.scaling == plain));
  CHECK(selective_sinkhorn{}.scaling == selective_scaling);
  CHECK((sinkhorn{}.k == 1 && sinkhorn{}.phase == routing_phase::training &&
         sinkhorn{}.weights == plan_weights::by_k));
  CHECK((selective_sinkhorn{}.k == 2 && selective_sinkhorn{}.probability == 1e-3f &&
         selective_sinkhorn{}.phase == routing_phase::training &&
         selective_sinkhorn{}.stream == 0x53535200 && !selective_sinkhorn{}.noise.active()));
  CHECK((sinkhorn_expert_choice{}.capacity == tokens_per_expert{} &&
         sinkhorn_expert_choice{}.weights == plan_weights::softmax));
  // The coin is below the chance, not at it.
  const side_inputs side{.seed = 5, .step = 7};
  const float coin = random_u01(side.seed, 0x53535200, side.step);
  CHECK_FALSE(selective_sinkhorn{.probability = coin}.balances(side));
  CHECK(selective_sinkhorn{.probability = std::nextafter(coin, 2.0f)}.balances(side));
}

TEST_CASE("scratch of workers is a list of them and as much for each as for one") {
  const auto listed_bytes = [](std::size_t size, const auto& carve) {
    const auto bytes = [&](int workers) {
      scratch tape;
      carve(tape, workers);
      return tape.used();
    };
    const auto list = [&](int workers) {
      return round_up(static_cast<index_t>(size) * workers, 64);
    };
    const index_t each = bytes(1) - list(1);
    CHECK(bytes(0) == 0);
    CHECK(bytes(5) == list(5) + 5 * each);
    return each;
  };
  constexpr index_t line = block_rows * 4;
  const router<softmax> plain{.selection = {.k = 2}};
  using rows = detail::row_memory<router<softmax>>;
  CHECK(listed_bytes(sizeof(rows), [&](scratch& s, int n) { rows::carve(s, plain, 9, n); }) ==
        4 * line);
  CHECK(listed_bytes(sizeof(detail::choice_rows),
                     [](scratch& s, int n) { detail::choice_rows::carve(s, 17, n); }) == 33 * line);
  CHECK(listed_bytes(sizeof(simd::column_top_k_buffers),
                     [](scratch& s, int n) { detail::carve_column_buffers(s, 100, n); }) > 0);
}

TEST_CASE("each number of a scaling is refused beyond its ends by every rule that has one") {
  const auto says = [](const sinkhorn_scaling& how, const std::string& what) {
    const auto of = [](const auto& rule) { return test::refusal([&] { rule.check(8, 4); }); };
    CHECK(of(sinkhorn{.scaling = how}) == "moeroute::sinkhorn: " + what);
    CHECK(of(selective_sinkhorn{.scaling = how}) == "moeroute::selective_sinkhorn: " + what);
    CHECK(of(sinkhorn_expert_choice{.scaling = how}) ==
          "moeroute::sinkhorn_expert_choice: " + what);
  };
  for (const float x : {0.0f, -1.0f, test::infinity, test::not_a_number})
    says({.temperature = x}, "temperature is " + std::to_string(x) + ", expected > 0");
  for (const float x : {-1e-3f, test::infinity, test::not_a_number})
    says({.eps = x}, "eps is " + std::to_string(x) + ", expected >= 0");
  for (const float x : {-1e-3f, test::not_a_number})
    says({.tolerance = x}, "tolerance is " + std::to_string(x) + ", expected >= 0");
  says({.most_iterations = 0}, "most_iterations is 0, expected 1 to 1073741824");
  for (const float x : {0.0f, test::infinity})
    CHECK(test::refusal([&] { sinkhorn{.scaling = {.eps = 0.0f, .tolerance = x}}.check(8, 4); }) ==
          "accepted");
}
