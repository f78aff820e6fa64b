#include <moeroute/policy/batch/sparse_transport.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <memory>
#include <moeroute/policy/weigh/transport_plan.hpp>
#include <moeroute/stage/route.hpp>
#include <span>
#include <string>
#include <vector>

#include "oracle/batch_routing.hpp"
#include "oracle/losses.hpp"
#include "support/allocations.hpp"
#include "support/batch_bits.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"
#include "support/sized.hpp"

using namespace moeroute;
using test::routed;
using test::rows_of;

namespace {

std::vector<float> plan_of(const sparse_transport& router, const std::vector<float>& z,
                           index_t tokens, index_t experts) {
  std::vector<float> plan(z.size());
  workspace ws;
  router.plan(rows_of(z, experts), {}, ws, matrix_view<float>(plan.data(), tokens, experts));
  return plan;
}

}  // namespace

TEST_CASE("at every step columns sum to T / E and have at most k entries") {
  constexpr index_t tokens = 96, experts = 8;
  for (const test::shape shape : {test::shape::normal, test::shape::zipf, test::shape::quantised,
                                  test::shape::all_equal, test::shape::extreme})
    for (const index_t k : {index_t{1}, index_t{12}, index_t{40}, tokens})
      for (const index_t steps : {0, 1, 2, 5, 20}) {
        const auto z = test::make_logits(shape, 3, tokens, experts);
        const auto plan = plan_of({.support = k, .steps = steps}, z, tokens, experts);
        double error = 0;
        index_t most = 0;
        for (index_t e = 0; e < experts; ++e) {
          double sum = 0;
          index_t entries = 0;
          for (index_t t = 0; t < tokens; ++t) {
            const float x = plan[static_cast<std::size_t>(t * experts + e)];
            sum += static_cast<double>(x);
            entries += x != 0.0f;
          }
          error = std::max(error, std::abs(sum * experts / tokens - 1));
          most = std::max(most, entries);
        }
        INFO(test::name(shape) << " k=" << k << " steps=" << steps);
        CHECK(error < 1e-6);
        CHECK(most <= k);
      }
}

TEST_CASE("the plan is that of the double-precision solver") {
  for (const auto& [tokens, experts, k] : {std::tuple<index_t, index_t, index_t>{32, 4, 12},
                                           {32, 4, 32},
                                           {60, 6, 10},
                                           {64, 16, 20},
                                           {48, 40, 12}})
    for (const auto& [steps, gamma, rate] : {std::tuple<index_t, float, float>{0, 1.0f, 1e-2f},
                                             {1, 1.0f, 1e-2f},
                                             {7, 1.0f, 1e-2f},
                                             {0, 0.5f, 1e-2f},
                                             {3, 0.5f, 0.1f}}) {
      const auto z = test::make_logits(test::shape::normal, 4, tokens, experts);
      const auto plan =
          plan_of({.support = k, .gamma = gamma, .learning_rate = rate, .steps = steps}, z, tokens,
                  experts);
      const auto expected =
          oracle::sparse_plan(oracle::softmax_rows(z, tokens, experts), tokens, experts, k,
                              static_cast<double>(gamma), static_cast<double>(rate), steps);
      INFO("T=" << tokens << " E=" << experts << " k=" << k << " steps=" << steps
                << " gamma=" << gamma << " rate=" << rate);
      CHECK(test::difference(plan, expected, 1e-4, 2e-5) == "");
    }
}

TEST_CASE("steps bring the rows closer to 1") {
  constexpr index_t tokens = 256, experts = 8;
  const auto z = test::make_logits(test::shape::zipf, 4, tokens, experts);
  const auto row_error = [&](index_t steps) {
    const auto plan = plan_of({.support = tokens, .steps = steps}, z, tokens, experts);
    double error = 0;
    for (index_t t = 0; t < tokens; ++t) {
      double sum = 0;
      for (index_t e = 0; e < experts; ++e)
        sum += static_cast<double>(plan[static_cast<std::size_t>(t * experts + e)]);
      error += std::abs(sum - 1) / tokens;
    }
    return error;
  };
  CHECK(row_error(20) < 0.8 * row_error(0));
  CHECK(row_error(500) < 0.1 * row_error(0));
}

TEST_CASE("every expert takes exactly C tokens, with softmax weights") {
  for (const auto& [tokens, experts] :
       {std::pair<index_t, index_t>{1, 1}, {7, 3}, {64, 60}, {1200, 16}})
    for (const index_t support : {index_t{0}, index_t{1}, index_t{1000}}) {
      const auto z = test::make_logits(test::shape::normal, 9, tokens, experts);
      const auto p = oracle::softmax_rows(z, tokens, experts);
      const sparse_transport router{.support = support};
      const assignment a = routed(router, z, experts);
      const index_t c = router.capacity(tokens, experts);
      std::vector<index_t> load(static_cast<std::size_t>(experts), 0);
      for (const expert_id e : a.ids()) ++load[static_cast<std::size_t>(e)];
      CHECK(std::all_of(load.begin(), load.end(), [&](index_t n) { return n == c; }));
      std::vector<double> expected;
      for (index_t t = 0; t < tokens; ++t)
        for (const expert_id e : a.ids(t))
          expected.push_back(p[static_cast<std::size_t>(t * experts + e)]);
      CHECK(test::difference(a.weights(), expected, 3e-6, 1.2e-38) == "");
    }
}

TEST_CASE("weights from the plan are its entries") {
  constexpr index_t tokens = 96, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 3, tokens, experts);
  const sparse_transport router{.weights = transport_weights::plan};
  const auto plan = plan_of(router, z, tokens, experts);
  const assignment a = routed(router, z, experts);
  double sum = 0;
  for (index_t t = 0; t < tokens; ++t)
    for (std::size_t i = 0; i < a.ids(t).size(); ++i) {
      const float w = a.weights(t)[i];
      CHECK(w == plan[static_cast<std::size_t>(t * experts + a.ids(t)[i])]);
      sum += static_cast<double>(w);
    }
  CHECK(std::abs(sum - tokens) < 1e-3);
}

TEST_CASE("one token per expert is chosen hard, without steps by similarity") {
  constexpr index_t tokens = 64, experts = 8;
  const auto z = test::make_logits(test::shape::normal, 5, tokens, experts);
  const auto plan = plan_of({.support = 1, .steps = 0}, z, tokens, experts);
  const auto p = oracle::softmax_rows(z, tokens, experts);
  for (index_t e = 0; e < experts; ++e) {
    const index_t best = oracle::column_order(p, tokens, experts, e)[0];
    CHECK(plan[static_cast<std::size_t>(best * experts + e)] == 8.0f);
  }
}

TEST_CASE("masked tokens and logits of -inf are never taken, weights stay finite") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = 50, experts = 12;
    const auto z = test::make_logits(shape, 9, tokens, experts);
    std::vector<std::uint8_t> mask(tokens, 1);
    for (std::size_t t = 0; t < tokens; t += 3) mask[t] = 0;
    const assignment a = routed(sparse_transport{}, z, experts, {.mask = mask});
    bool sound = true;
    for (index_t t = 0; t < tokens; ++t) {
      sound = sound && (mask[static_cast<std::size_t>(t)] != 0 || a.count(t) == 0);
      for (std::size_t i = 0; i < a.ids(t).size(); ++i)
        sound = sound && std::isfinite(a.weights(t)[i]) &&
                z[static_cast<std::size_t>(t * experts + a.ids(t)[i])] > -test::infinity;
    }
    INFO(test::name(shape));
    CHECK(sound);
    CHECK(routed(sparse_transport{}, z, experts, {.mask = std::vector<std::uint8_t>(tokens, 0)})
              .choices() == 0);
  }
}

TEST_CASE(
    "sparse transport has the same bits on every instruction set, executor and thread count") {
  for (const test::shape shape : test::all_shapes) {
    constexpr index_t tokens = test::sized(1200, 130), experts = 24;
    const auto z = test::make_logits(shape, 12, tokens, experts);
    const sparse_transport router{.support = test::sized(300, 30),
                                  .weights = transport_weights::plan};
    INFO(test::name(shape));
    CHECK(test::batch_bits_differ(router, z, experts) == "");
  }
}

TEST_CASE(
    "a transport whose scores leave no room for 1 ends; potentials that are not finite are "
    "refused") {
  constexpr index_t tokens = 9, experts = 4;
  const auto z = test::make_logits(test::shape::normal, 3, tokens, experts);
  const sparse_transport steep{.weights = transport_weights::plan, .gamma = 1e-20f};
  const assignment a = routed(steep, z, experts);
  CHECK(a.tokens() == tokens);
  std::vector<double> w(a.weights().size());
  std::vector<float> potentials(tokens, 0.0f);
  potentials[2] = test::infinity;
  const std::vector<double> wide(z.begin(), z.end());
  workspace ws;
  CHECK(test::refusal([&] {
          weigh_transport(sparse_transport{.weights = transport_weights::plan}, potentials,
                          matrix_view<const double>(wide.data(), tokens, experts), {}, a,
                          std::span(w), ws);
        }) == "moeroute::weigh_transport: a potential is not finite");
}

TEST_CASE("sparse transport refuses what does not fit, by name") {
  const auto refusal = [](const sparse_transport& r) {
    return test::refusal([&] { r.check(10, 4); });
  };
  CHECK(refusal({.gamma = 0.0f}) == "moeroute::sparse_transport: gamma is 0.000000, expected > 0");
  CHECK(refusal({.support = -1}) ==
        "moeroute::sparse_transport: support is -1, expected 0 to 1073741824");
  for (const float rate : {0.0f, -1.0f, HUGE_VALF, test::not_a_number})
    CHECK(refusal({.learning_rate = rate}) == "moeroute::sparse_transport: learning_rate is " +
                                                  std::to_string(rate) + ", expected > 0");
  CHECK(refusal({}) == "accepted");
  const auto z = test::make_logits(test::shape::normal, 3, 4, 3);
  std::vector<float> dense(20);
  workspace ws;
  const auto planned = [&](index_t rows, index_t cols) {
    return test::refusal(
        [&] { sparse_transport{}.plan({z.data(), 4, 3}, {}, ws, {dense.data(), rows, cols}); });
  };
  CHECK(planned(3, 3) == "moeroute::sparse_transport: plan.rows is 3, expected 4");
  CHECK(planned(4, 4) == "moeroute::sparse_transport: plan.cols is 4, expected 3");
  CHECK(planned(4, 3) == "accepted");
}

TEST_CASE("weights of a sparse plan are what routers write, their gradients are derivatives") {
  constexpr index_t tokens = 21, experts = 6;
  auto near = test::make_logits(test::shape::normal, 3, tokens, experts);
  near[2] = -test::infinity;
  std::vector<std::uint8_t> mask(tokens, 1);
  mask[3] = 0;
  const side_inputs side{.mask = mask};
  const std::vector<double> z(near.begin(), near.end());
  const auto double_rows = [](std::vector<double>& x) {
    return matrix_view<double>(x.data(), tokens, experts);
  };
  assignment everything;
  everything.reset(tokens, experts, experts);
  for (index_t c = 0; c < tokens * experts; ++c)
    everything.ids()[static_cast<std::size_t>(c)] = static_cast<expert_id>(c % experts);
  test::random rng(5);
  for (const index_t support : {0, 3, 9, 21})
    for (const float gamma : {1.0f, 0.25f})
      for (const bool of_tokens : {false, true}) {
        const sparse_transport how{.capacity = {.factor = 2.0},
                                   .support = support,
                                   .weights = transport_weights::plan,
                                   .gamma = gamma};
        INFO("support " << support << " gamma " << gamma << " of tokens " << of_tokens);
        const assignment a = of_tokens
                                 ? routed(sparse_transport_token_choice{.k = 2, .transport = how},
                                          near, experts, side)
                                 : routed(how, near, experts, side);
        workspace ws;
        std::vector<float> potentials(tokens);
        how.potentials(rows_of(near, experts), side, ws, potentials);
        std::vector<double> w(a.weights().size(), 7.0), up(w.size()), dz(z.size(), 5.0);
        const auto weights_at = [&](std::vector<double> x, std::vector<double>& to) {
          weigh_transport(how, potentials, double_rows(x), side, a, std::span(to), ws);
        };
        weights_at(z, w);
        CHECK(test::difference(w, a.weights(), 1e-5, 2e-6) == "");
        CHECK(std::any_of(w.begin(), w.end(), [](double x) { return x > 0.0; }));
        for (double& u : up) u = static_cast<double>(rng.normal());
        const auto value = [&](const std::vector<double>& x) {
          std::vector<double> at(w.size());
          weights_at(x, at);
          double sum = 0.0;
          for (std::size_t c = 0; c < at.size(); ++c) sum += up[c] * at[c];
          return sum;
        };
        std::vector<double> logits = z;
        const auto pull = [&](transport_gradient by, gradient_to to) {
          weigh_transport_backward<double>(how, potentials, double_rows(logits), side, a, up, by,
                                           to, double_rows(dz), ws);
        };
        pull(transport_gradient::projection, gradient_to::write);
        const std::vector<double> once = dz;
        std::vector<double> slope = oracle::derivative(z, value), smooth = once;
        // A step that brings another token into a column, or takes one out, meets a corner.
        const auto members = [&](const std::vector<double>& x) {
          std::vector<double> plan(z.size());
          std::vector<double> moved = x;
          weigh_transport(how, potentials, double_rows(moved), side, everything, std::span(plan),
                          ws);
          for (double& p : plan) p = p > 0.0;
          return plan;
        };
        const std::vector<double> here = members(z);
        index_t corners = 0;
        for (std::size_t i = 0; i < z.size(); ++i) {
          std::vector<double> up_by = z, down_by = z;
          up_by[i] += 1e-3;
          down_by[i] -= 1e-3;
          if (members(up_by) == here && members(down_by) == here) continue;
          ++corners;
          slope[i] = smooth[i] = 0.0;
        }
        CHECK(corners < tokens * experts / 8);
        CHECK(std::any_of(slope.begin(), slope.end(), [](double g) { return g != 0.0; }));
        CHECK(test::difference(smooth, slope, 1e-6, 2e-9) == "");
        pull(transport_gradient::projection, gradient_to::add);
        for (std::size_t i = 0; i < dz.size(); ++i) CHECK(dz[i] == 2.0 * once[i]);
        pull(transport_gradient::constant, gradient_to::add);
        for (std::size_t i = 0; i < dz.size(); ++i) CHECK(dz[i] == 2.0 * once[i]);
        CHECK(test::allocations_during(
                  [&] { pull(transport_gradient::projection, gradient_to::write); }) == 0);
        pull(transport_gradient::constant, gradient_to::write);
        CHECK(dz == std::vector<double>(dz.size(), 0.0));
      }
}

TEST_CASE("sizes that do not fit a sparse plan's gradient are refused by name; no tokens are not") {
  const auto near = test::make_logits(test::shape::normal, 3, 4, 3);
  const sparse_transport how{.weights = transport_weights::plan};
  assignment a = routed(how, near, 3);
  std::vector<float> z = near, dz(z.size()), potentials(4), w(a.weights().size());
  workspace ws;
  const auto refused = [&](index_t potential_count, index_t weight_count, index_t rows,
                           float* gradient) {
    return test::refusal([&] {
      weigh_transport_backward<float>(
          how, std::span(potentials).first(static_cast<std::size_t>(potential_count)),
          {z.data(), 4, 3}, {}, a, std::span(w).first(static_cast<std::size_t>(weight_count)),
          transport_gradient::projection, gradient_to::write, {gradient, rows, 3}, ws);
    });
  };
  const auto n = static_cast<index_t>(w.size());
  CHECK(refused(3, n, 4, dz.data()) ==
        "moeroute::weigh_transport_backward: potentials.size() is 3, expected 4");
  CHECK(refused(4, n - 1, 4, dz.data()) ==
        "moeroute::weigh_transport_backward: dweights.size() is " + std::to_string(n - 1) +
            ", expected " + std::to_string(n));
  CHECK(refused(4, n, 3, dz.data()) ==
        "moeroute::weigh_transport_backward: dlogits.rows is 3, expected 4");
  CHECK(refused(4, n, 4, z.data()) ==
        "moeroute::weigh_transport_backward: logits and dlogits overlap, expected memory of their "
        "own");
  CHECK(refused(4, n, 4, dz.data()) == "accepted");
  CHECK(test::refusal([&] {
          weigh_transport<float>(how, potentials, {z.data(), 4, 3}, {}, a,
                                 std::span(w).first(w.size() - 1), ws);
        }) == "moeroute::weigh_transport: weights.size() is " + std::to_string(n - 1) +
                  ", expected " + std::to_string(n));
  // Nobody asks what nothing is written to.
  weigh_transport_backward<float>(how, potentials, {z.data(), 4, 3}, {}, a, w,
                                  transport_gradient::projection, gradient_to::nowhere,
                                  {nullptr, 0, 0}, ws);
  a.to_fill().ids[0] = 3;
  CHECK(refused(4, n, 4, dz.data()) ==
        "moeroute::weigh_transport_backward: an id is 3, expected -1 to 2");
  const assignment none = routed(how, {}, 3);
  weigh_transport_backward<float>(how, {}, {z.data(), 0, 3}, {}, none, {},
                                  transport_gradient::projection, gradient_to::write,
                                  {dz.data(), 0, 3}, ws);
  how.potentials({z.data(), 0, 3}, {}, ws, {});
}

TEST_CASE("with every option at once a sparse plan and its choices are those of a slow descent") {
  test::random rng(37);
  for (index_t round = 0; round < test::sized(250, 30); ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t experts = 1 + rng.below(20), tokens = 1 + rng.below(60);
    const sparse_transport router{
        .capacity = {.factor = 0.5 + 2.0 * static_cast<double>(rng.uniform()),
                     .at_least = 2,
                     .fixed = rng.below(2) * (2 + rng.below(tokens))},
        .support = rng.below(2) * (2 + rng.below(tokens)),
        .weights = coin() ? transport_weights::softmax : transport_weights::plan,
        .gamma = coin() ? 1.0f : 0.25f + rng.uniform(),
        .learning_rate = coin() ? 1e-2f : 0.1f,
        // Of two experts' similarities one says all: gradients of 0 have the sign of their
        // rounding.
        .steps = experts < 3 ? 0 : rng.below(6)};
    auto z = test::make_logits(test::shape::normal, rng.bits() % 1000, tokens, experts);
    for (float& x : z)
      if (const auto odd = rng.below(20); odd < 2)
        x = odd == 0 ? -test::infinity : test::not_a_number;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t)
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    side_inputs side;
    if (coin()) side.mask = mask;
    // Tokens that take part, without the others.
    const auto p = oracle::softmax_rows(z, tokens, experts);
    std::vector<index_t> live;
    std::vector<double> similarity;
    for (index_t t = 0; t < tokens; ++t) {
      const auto open = [&](index_t e) {
        return z[static_cast<std::size_t>(t * experts + e)] > -test::infinity;
      };
      bool any = false;
      for (index_t e = 0; e < experts; ++e) any = any || open(e);
      if (!any || side.masked(t)) continue;
      live.push_back(t);
      for (index_t e = 0; e < experts; ++e)
        similarity.push_back(open(e) ? p[static_cast<std::size_t>(t * experts + e)] : -HUGE_VAL);
    }
    const index_t capacity = router.capacity(tokens, experts),
                  support = router.support > 0 ? router.support : capacity;
    std::vector<double> expected(z.size(), 0.0);
    if (!live.empty()) {
      const auto n = static_cast<index_t>(live.size());
      const auto rows =
          oracle::sparse_plan(similarity, n, experts, support, static_cast<double>(router.gamma),
                              static_cast<double>(router.learning_rate), router.steps);
      for (index_t i = 0; i < n; ++i)
        std::copy_n(rows.begin() + i * experts, experts,
                    expected.begin() + live[static_cast<std::size_t>(i)] * experts);
    }
    // A gradient of 0 has the sign of its rounding, and Adam steps by signs: of one token or two
    // experts all sums are known.
    if (router.steps > 0 && (experts < 3 || live.size() < 3)) continue;
    std::vector<float> plan(z.size(), 5.0f), potential(static_cast<std::size_t>(tokens));
    workspace ws;
    router.plan(rows_of(z, experts), side, ws, matrix_view<float>(plan.data(), tokens, experts));
    router.potentials(rows_of(z, experts), side, ws, potential);
    INFO("round " << round << " T=" << tokens << " E=" << experts << " support " << router.support
                  << " C=" << capacity << " masked " << !side.mask.empty() << " live "
                  << live.size() << " steps " << router.steps);
    CHECK(test::difference(plan, expected, 1e-4, 2e-4) == "");

    const assignment out = routed(router, z, experts, side);
    std::vector<std::vector<float>> taken(static_cast<std::size_t>(experts)), left = taken;
    std::string broken;
    const auto weight_of = [&](index_t t, expert_id e) {
      const auto at = static_cast<std::size_t>(t * experts + e);
      return router.weights == transport_weights::plan ? static_cast<double>(plan[at]) : p[at];
    };
    for (const index_t t : live) {
      std::size_t i = 0;
      for (expert_id e = 0; e < experts; ++e) {
        const auto at = static_cast<std::size_t>(t * experts + e);
        if (!(z[at] > -test::infinity)) continue;
        const bool takes = i < out.ids(t).size() && out.ids(t)[i] == e;
        (takes ? taken : left)[static_cast<std::size_t>(e)].push_back(
            static_cast<float>(p[at]) + potential[static_cast<std::size_t>(t)]);
        if (!takes) continue;
        if (std::abs(static_cast<double>(out.weights(t)[i]) - weight_of(t, e)) > 1e-6)
          broken = "weight";
        ++i;
      }
      if (i != out.ids(t).size()) broken = "an expert that may not be";
    }
    std::size_t all = 0;
    for (std::size_t e = 0; e < taken.size(); ++e) {
      all += taken[e].size();
      const std::size_t most = static_cast<std::size_t>(std::min(capacity, tokens));
      if (taken[e].size() != std::min(most, taken[e].size() + left[e].size())) broken = "count";
      if (taken[e].empty() || left[e].empty()) continue;
      if (*std::min_element(taken[e].begin(), taken[e].end()) <
          *std::max_element(left[e].begin(), left[e].end()) - 1e-6f)
        broken = "a lesser token";
    }
    if (static_cast<std::size_t>(out.choices()) != all) broken = "a token that may not be";
    CHECK(broken == "");
  }
}

TEST_CASE("experts that take more than a support of one weigh the others 0") {
  constexpr index_t tokens = 24, experts = 5;
  const auto z = test::make_logits(test::shape::normal, 8, tokens, experts);
  for (const index_t support : {1, 2}) {
    const sparse_transport router{
        .capacity = {.fixed = 6}, .support = support, .weights = transport_weights::plan};
    const auto plan = plan_of(router, z, tokens, experts);
    const assignment a = routed(router, z, experts);
    index_t above = 0;
    for (index_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < a.ids(t).size(); ++i) {
        above += a.weights(t)[i] > 0.0f;
        CHECK(a.weights(t)[i] == plan[static_cast<std::size_t>(t * experts + a.ids(t)[i])]);
      }
    CHECK(a.choices() == 6 * experts);
    CHECK((above >= experts && above <= support * experts));
  }
}

TEST_CASE("a sparse plan's gradient with more experts than tokens begins at nothing") {
  constexpr index_t tokens = 4, experts = 11;
  const auto z = test::make_logits(test::shape::normal, 6, tokens, experts);
  const sparse_transport how{.weights = transport_weights::plan};
  const assignment a = routed(how, z, experts);
  std::vector<float> potentials(tokens), w(a.weights().size(), 1.0f);
  how.potentials(rows_of(z, experts), {}, *std::make_unique<workspace>(), potentials);
  workspace ws;
  std::vector<float> first(z.size()), again(z.size());
  const auto pull = [&](std::vector<float>& dz) {
    weigh_transport_backward<float>(how, potentials, {z.data(), tokens, experts}, {}, a, w,
                                    transport_gradient::projection, gradient_to::write,
                                    {dz.data(), tokens, experts}, ws);
  };
  // Of the same memory, with what the call before left in it.
  pull(first);
  for (float& x : w) x = -3.0f;
  pull(again);
  for (float& x : w) x = 1.0f;
  pull(again);
  CHECK(test::bit_difference(again, first) == "");
}

TEST_CASE("each number of a sparse transport has two ends, and one where nothing is said") {
  const auto refused = [](const sparse_transport& r, index_t experts = 4) {
    return test::refusal([&] { r.check(8, experts); });
  };
  constexpr index_t most = index_t{1} << 30;
  CHECK(refused({.support = most}) == "accepted");
  CHECK(refused({.support = most + 1}) ==
        "moeroute::sparse_transport: support is 1073741825, expected 0 to 1073741824");
  CHECK(refused({.steps = 0}) == "accepted");
  CHECK(refused({.steps = -1}) ==
        "moeroute::sparse_transport: steps is -1, expected 0 to 1073741824");
  CHECK(refused({.steps = most}) == "accepted");
  CHECK(refused({.steps = most + 1}) ==
        "moeroute::sparse_transport: steps is 1073741825, expected 0 to 1073741824");
  for (const float gamma : {HUGE_VALF, -1.0f, test::not_a_number})
    CHECK(refused({.gamma = gamma}) ==
          "moeroute::sparse_transport: gamma is " + std::to_string(gamma) + ", expected > 0");
  CHECK(refused({}, 0) == "moeroute::sparse_transport: experts is 0, expected 1 to 1048576");
  CHECK(refused({}, 1) == "accepted");
  CHECK(refused({}, max_experts + 1) ==
        "moeroute::sparse_transport: experts is 1048577, expected 1 to 1048576");
  CHECK(refused({.capacity = {.factor = 0.0}}) ==
        "moeroute::expert_choice: capacity.factor is 0.000000, expected > 0");
  const sparse_transport plain;
  CHECK((plain.capacity == tokens_per_expert{} && plain.support == 0 && plain.gamma == 1.0f &&
         plain.learning_rate == 1e-2f && plain.steps == 20 &&
         plain.weights == transport_weights::softmax));
  const auto of_tokens = [](const sparse_transport_token_choice& r) {
    return test::refusal([&] { r.check(8, 4); });
  };
  CHECK(of_tokens({.k = 0}) == "moeroute::sparse_transport_token_choice: k is 0, expected 1 to 4");
  CHECK(of_tokens({.k = 4}) == "accepted");
  CHECK(of_tokens({.transport = {.steps = -1}}) ==
        "moeroute::sparse_transport: steps is -1, expected 0 to 1073741824");
  CHECK(sparse_transport_token_choice{}.k == 1);
  const auto z = test::make_logits(test::shape::normal, 3, 4, 3);
  std::vector<float> list(5);
  workspace ws;
  CHECK(test::refusal([&] { plain.potentials({z.data(), 4, 3}, {}, ws, list); }) ==
        "moeroute::sparse_transport: potentials.size() is 5, expected 4");
}
