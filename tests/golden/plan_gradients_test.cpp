#include <moeroute/policy/weigh/sinkhorn_plan.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "oracle/losses.hpp"
#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/counting_new.hpp"
#include "support/gradient_file.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/routed.hpp"
#include "support/shapes.hpp"

using namespace moeroute;
using plan_doubles = std::vector<double>;

namespace {

matrix_view<double> plan_rows(plan_doubles& x, index_t n) {
  return {x.data(), n, static_cast<index_t>(x.size()) / n};
}
sinkhorn_scaling fixed_iterations(sinkhorn_scaling how, index_t n) {
  how.tolerance = 0.0f;
  how.most_iterations = n;
  return how;
}

}  // namespace

TEST_CASE("plans and their gradients through ten iterations are autograd's, with and without eps") {
  for (const char* shape : {"_T6_E16_k4", "_T5_E64_k6"})
    for (const bool log : {false, true}) {
      const std::string name = std::string(log ? "sinkhorn_log10" : "sinkhorn_megatron10") + shape;
      INFO(name);
      const test::gradient_file file(name);
      sinkhorn_scaling how = fixed_iterations(megatron_scaling, 10);
      if (log) how.domain = sinkhorn_domain::logarithm;
      plan_doubles z = file.numbers("logits"), up = file.numbers("upstream"), dz(z.size());
      workspace ws;
      sinkhorn_plan_backward(how, plan_rows(z, file.tokens), {}, plan_rows(up, file.tokens),
                             plan_gradient::unrolled, gradient_to::write,
                             plan_rows(dz, file.tokens), ws);
      // The reference adds eps to sums of exp(z) as it is.
      CHECK(test::difference(dz, file.numbers("grad_logits"), log ? 1e-9 : 1e-6, 1e-12) == "");
    }
}

TEST_CASE(
    "with every option at once, weights of a plan are what the routers write, and their gradients "
    "are derivatives") {
  test::random rng(5);
  for (int round = 0; round < 60; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t tokens = 1 + rng.below(9), experts = 1 + rng.below(6);
    const float eps[] = {0.0f, 1e-8f, 0.25f}, shift[] = {0.0f, 20.0f, -20.0f};
    // Under the lowest temperature the exponential domain counts some entries as 0.
    const float heat[] = {1.0f, 0.5f, 2.0f, 0.05f};
    const sinkhorn_scaling how{
        .mass = coin() ? plan_mass::one : plan_mass::tokens,
        .order = coin() ? scaling_order::rows_then_columns : scaling_order::columns_then_rows,
        .domain = coin() ? sinkhorn_domain::exponential : sinkhorn_domain::logarithm,
        .similarity = coin() ? plan_similarity::logits : plan_similarity::softmax,
        .temperature = heat[rng.below(4)],
        .eps = eps[rng.below(3)],
        .tolerance = 0.0f,
        .most_iterations = 1 + rng.below(7)};
    std::vector<float> given(static_cast<std::size_t>(tokens * experts)), shares;
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < tokens; ++t) {
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(6)));
      const float by = shift[rng.below(3)];
      for (index_t e = 0; e < experts; ++e)
        given[static_cast<std::size_t>(t * experts + e)] = rng.normal() + by;
    }
    const bool columns = rng.below(3) == 0;
    if (!columns && coin())
      for (index_t e = 0; e < experts; ++e) shares.push_back(0.5f + rng.uniform());
    const side_inputs side{.mask = mask};
    const index_t k = 1 + rng.below(experts);
    const assignment a =
        columns
            ? test::routed(
                  sinkhorn_expert_choice{
                      .capacity = {.factor = 2.0}, .weights = plan_weights::plan, .scaling = how},
                  given, experts, side)
            : test::routed(
                  sinkhorn{.k = k, .weights = plan_weights::plan, .scaling = how, .share = shares},
                  given, experts, side);
    const plan_share share = columns ? plan_share::entries : plan_share::of_choices;
    INFO("round " << round << " T=" << tokens << " E=" << experts << " columns " << columns
                  << " domain " << static_cast<int>(how.domain) << " order "
                  << static_cast<int>(how.order) << " similarity "
                  << static_cast<int>(how.similarity) << " temperature " << how.temperature
                  << " eps " << how.eps);
    const plan_doubles z(given.begin(), given.end());
    workspace ws;
    const auto weights = [&](const plan_doubles& x, plan_share what) {
      plan_doubles w(a.weights().size(), 7.0);  // those of nobody are written too
      weigh_plan(how, what, matrix_view<const double>(x.data(), tokens, experts), side, a,
                 std::span(w), ws, shares);
      return w;
    };
    CHECK(test::difference(weights(z, share), a.weights(), 2e-5, 1e-7) == "");
    std::vector<float> plan(given.size()), entries;
    sinkhorn_plan(how, {given.data(), tokens, experts}, side, ws,
                  matrix_view<float>(plan.data(), tokens, experts), serial{}, shares);
    for (index_t t = 0; t < tokens; ++t)
      for (const expert_id e : a.ids(t))
        entries.push_back(e < 0 ? 0.0f : plan[static_cast<std::size_t>(t * experts + e)]);
    CHECK(test::difference(weights(z, plan_share::entries), entries, 2e-5, 1e-7) == "");

    plan_doubles up(a.weights().size()), dz(z.size());
    for (double& u : up) u = static_cast<double>(rng.normal());
    const plan_share by = coin() ? share : plan_share::entries;
    const auto value = [&](const plan_doubles& x) {
      const plan_doubles w = weights(x, by);
      return std::inner_product(up.begin(), up.end(), w.begin(), 0.0);
    };
    weigh_plan_backward(how, by, matrix_view<const double>(z.data(), tokens, experts), side, a, up,
                        plan_gradient::unrolled, gradient_to::write, plan_rows(dz, tokens), ws,
                        shares);
    CHECK(test::difference(dz, oracle::derivative(z, value), 1e-5, 1e-7) == "");
  }
}

TEST_CASE(
    "weights of a plan that cannot be even are finite, as the router's, however long it runs") {
  // Only the last token may go to the second expert, whose factor grows without end.
  constexpr index_t tokens = 600;
  std::vector<float> given(2 * tokens, 0.0f);
  for (index_t t = 0; t + 1 < tokens; ++t)
    given[static_cast<std::size_t>(2 * t + 1)] = -test::infinity;
  const plan_doubles z(given.begin(), given.end());
  for (const auto domain : {sinkhorn_domain::exponential, sinkhorn_domain::logarithm}) {
    sinkhorn_scaling how = fixed_iterations(kl_projection_scaling, 200);
    how.domain = domain;
    const assignment a =
        test::routed(sinkhorn{.k = 2, .weights = plan_weights::plan, .scaling = how}, given, 2, {});
    workspace ws;
    plan_doubles w(a.weights().size()), up(w.size(), 1.0), dz(z.size());
    up[0] = -1.0;
    weigh_plan(how, plan_share::of_choices, {z.data(), tokens, 2}, {}, a, std::span(w), ws);
    CHECK(test::difference(w, a.weights(), 2e-5, 1e-7) == "");
    weigh_plan_backward(how, plan_share::of_choices, {z.data(), tokens, 2}, {}, a, up,
                        plan_gradient::unrolled, gradient_to::write, plan_rows(dz, tokens), ws);
    CHECK(std::all_of(dz.begin(), dz.end(), [](double g) { return std::abs(g) <= 2.0; }));
  }
}

TEST_CASE(
    "what the router's plan counts as 0 is 0 in double too, and a token without a share has no "
    "gradient") {
  constexpr index_t tokens = 4, experts = 2;
  std::vector<float> given(tokens * experts, 0.0f);
  for (std::size_t t = 0; t < tokens; ++t) given[2 * t + 1] = -80.0f;
  const plan_doubles z(given.begin(), given.end());
  const std::vector<std::uint8_t> mask{1, 0, 1, 1};
  const side_inputs side{.mask = mask};
  assignment a;  // both experts of all, of the masked token too
  a.reset(tokens, experts, 2);
  for (std::size_t c = 0; c < 2 * tokens; ++c) a.ids()[c] = static_cast<expert_id>(c % 2);
  for (const auto domain : {sinkhorn_domain::exponential, sinkhorn_domain::logarithm}) {
    sinkhorn_scaling how = fixed_iterations(kl_projection_scaling, 3);
    how.domain = domain;
    workspace ws;
    std::vector<float> plan(given.size());
    sinkhorn_plan(how, {given.data(), tokens, experts}, side, ws,
                  matrix_view<float>(plan.data(), tokens, experts));
    CHECK((plan[1] > 0.0f) == (domain == sinkhorn_domain::logarithm));
    plan_doubles w(plan.size(), 7.0), shares(plan.size(), 7.0), up(plan.size(), 1.0), dz(z.size());
    weigh_plan(how, plan_share::entries, {z.data(), tokens, experts}, side, a, std::span(w), ws);
    CHECK(test::difference(w, plan, 2e-5, 1e-7) == "");
    weigh_plan(how, plan_share::of_choices, {z.data(), tokens, experts}, side, a, std::span(shares),
               ws);
    CHECK(shares[2] == 0.0);
    CHECK(shares[3] == 0.0);
    up[1] = up[2] = -1.0;
    weigh_plan_backward(how, plan_share::of_choices, {z.data(), tokens, experts}, side, a, up,
                        plan_gradient::unrolled, gradient_to::write, plan_rows(dz, tokens), ws);
    CHECK(std::all_of(dz.begin(), dz.end(), [](double g) { return std::isfinite(g); }));
  }
}

TEST_CASE(
    "at the fixed point the implicit gradient is the one through many iterations, whoever is "
    "masked") {
  constexpr index_t tokens = 12, experts = 7;
  const std::vector<float> near = test::make_logits(test::shape::normal, 8, tokens, experts);
  plan_doubles z(near.begin(), near.end()), up(z.size()), through(z.size()), at(z.size());
  test::random rng(6);
  for (double& u : up) u = static_cast<double>(rng.normal());
  workspace ws;
  for (const auto order : {scaling_order::rows_then_columns, scaling_order::columns_then_rows}) {
    sinkhorn_scaling how = fixed_iterations(kl_projection_scaling, 2000);
    how.order = order;
    for (const bool one_less : {false, true}) {
      std::vector<std::uint8_t> mask(tokens, 1);
      if (one_less) mask[2] = 0;
      // What another plan left in the scratch is nobody's.
      sinkhorn_plan_backward(fixed_iterations(how, 2100), plan_rows(z, tokens), {},
                             plan_rows(up, tokens), plan_gradient::unrolled, gradient_to::write,
                             plan_rows(at, tokens), ws);
      for (const auto by : {plan_gradient::unrolled, plan_gradient::implicit})
        sinkhorn_plan_backward(how, plan_rows(z, tokens), {.mask = mask}, plan_rows(up, tokens), by,
                               gradient_to::write,
                               plan_rows(by == plan_gradient::unrolled ? through : at, tokens), ws);
      CHECK(test::difference(at, through, 1e-7, 1e-9) == "");
      plan_doubles more(z.size(), 5.0);
      sinkhorn_plan_backward(how, plan_rows(z, tokens), {.mask = mask}, plan_rows(up, tokens),
                             plan_gradient::implicit, gradient_to::add, plan_rows(more, tokens),
                             ws);
      for (double& x : more) x -= 5.0;
      CHECK(test::difference(more, at, 0.0, 1e-14) == "");
    }
  }
}

TEST_CASE("a plan that may end early has no gradient of its own") {
  plan_doubles z(6, 0.5), dz(6);
  workspace ws;
  CHECK(test::refusal([&] {
          sinkhorn_plan_backward(megatron_scaling, plan_rows(z, 2), {}, plan_rows(z, 2),
                                 plan_gradient::unrolled, gradient_to::write, plan_rows(dz, 2), ws);
        }) ==
        "moeroute::sinkhorn_plan_backward: tolerance is 0.000100, expected 0: gradients are of a "
        "fixed number of iterations");
}

TEST_CASE(
    "a plan whose tokens are masked or send infinite logits has finite weights and gradients") {
  constexpr index_t tokens = 5, experts = 6;
  const float top = test::infinity;
  for (const bool every : {false, true})
    for (const plan_similarity similarity : {plan_similarity::logits, plan_similarity::softmax})
      for (const auto order : {scaling_order::rows_then_columns, scaling_order::columns_then_rows})
        for (const auto by : {plan_gradient::unrolled, plan_gradient::implicit}) {
          INFO(every << " masked, " << static_cast<int>(similarity) << static_cast<int>(order)
                     << static_cast<int>(by));
          std::vector<float> near = test::make_logits(test::shape::normal, 4, tokens, experts);
          near[2] = near[4] = near[experts + 1] = top;
          near[3 * experts] = test::not_a_number;
          for (index_t e = 0; e < experts; ++e)
            near[static_cast<std::size_t>(4 * experts + e)] = -top;
          const plan_doubles z(near.begin(), near.end());
          const std::vector<std::uint8_t> mask(tokens, every ? 0 : 1);
          sinkhorn_scaling how = fixed_iterations(megatron_scaling, 8);
          how.similarity = similarity;
          how.order = order;
          how.mass = by == plan_gradient::unrolled ? plan_mass::tokens : plan_mass::one;
          if (similarity == plan_similarity::softmax) how.temperature = 0.5f;
          const sinkhorn router{.k = 2, .weights = plan_weights::plan, .scaling = how};
          const side_inputs side{.mask = mask};
          const assignment a = test::routed(router, near, experts, side);
          workspace ws;
          plan_doubles w(a.weights().size()), up(w.size(), 1.0), dz(z.size(), 5.0);
          for (std::size_t c = 0; c < up.size(); c += 2) up[c] = -2.0;
          weigh_plan(how, plan_share::of_choices, {z.data(), tokens, experts}, side, a,
                     std::span(w), ws);
          CHECK(test::difference(w, a.weights(), 2e-5, 1e-7) == "");
          if (every) CHECK(w == plan_doubles(w.size(), 0.0));
          weigh_plan_backward(how, plan_share::of_choices, {z.data(), tokens, experts}, side, a, up,
                              by, gradient_to::write, plan_rows(dz, tokens), ws);
          bool finite = true, moves = false;
          for (std::size_t i = 0; i < dz.size(); ++i) {
            finite = finite && std::isfinite(dz[i]);
            moves = moves || dz[i] != 0.0;
            if (z[i] != z[i] || z[i] == -static_cast<double>(top)) CHECK(dz[i] == 0.0);
          }
          CHECK(finite);
          CHECK(moves == !every);
        }
}

TEST_CASE("sizes that do not fit a plan's weights and gradient are refused by name") {
  test::random rng(9);
  assignment a = test::ragged_choices(rng, 4, 6, 3);
  const auto n = static_cast<std::size_t>(a.choices());
  plan_doubles z(30, 0.5), dz(30), w(n), wide(n + 1);
  const sinkhorn_scaling how = fixed_iterations(megatron_scaling, 3);
  workspace ws;
  const std::vector<float> five(5, 1.0f);
  const std::vector<std::uint8_t> mask(3, 1);
  using rows = matrix_view<double>;
  const rows x{z.data(), 4, 6}, out{dz.data(), 4, 6};
  const auto by = plan_gradient::unrolled;
  const auto forward = [&](const rows& from, std::span<double> to, const side_inputs& side = {},
                           std::span<const float> shares = {}) {
    return [&, from, to, side, shares] {
      weigh_plan(how, plan_share::entries, from, side, a, to, ws, shares);
    };
  };
  const auto back = [&](const rows& from, std::span<const double> up, const rows& to) {
    return [&, from, up, to] {
      weigh_plan_backward(how, plan_share::entries, from, {}, a, up, by, gradient_to::write, to,
                          ws);
    };
  };
  const auto whole = [&](const rows& up, const rows& to) {
    return [&, up, to] { sinkhorn_plan_backward(how, x, {}, up, by, gradient_to::write, to, ws); };
  };
  const rows fewer{dz.data(), 3, 6}, less{dz.data(), 4, 5}, tight{z.data(), 4, 6, 5};
  const std::string sizes = std::to_string(n + 1) + ", expected " + std::to_string(n);
  const std::string apart = "logits and dlogits overlap, expected memory of their own";
  for (const auto& [call, words] :
       test::refusals{{forward(fewer, w), "weigh_plan: logits.rows is 3, expected 4"},
                      {forward(less, w), "weigh_plan: logits.cols is 5, expected 6"},
                      {forward(x, wide), "weigh_plan: weights.size() is " + sizes},
                      {forward(tight, w), "weigh_plan: logits.stride is 5, expected at least 6"},
                      {forward({z.data(), 4, 0}, w),
                       "weigh_plan: experts is 0, expected 1 to " + std::to_string(max_experts)},
                      {forward(x, w, {.mask = mask}), "weigh_plan: mask.size() is 3, expected 4"},
                      {forward(x, w, {}, five), "weigh_plan: share.size() is 5, expected 6"},
                      {back(fewer, w, out), "weigh_plan_backward: logits.rows is 3, expected 4"},
                      {back(less, w, out), "weigh_plan_backward: logits.cols is 5, expected 6"},
                      {back(x, wide, out), "weigh_plan_backward: dweights.size() is " + sizes},
                      {back(x, w, fewer), "weigh_plan_backward: dlogits.rows is 3, expected 4"},
                      {back(x, w, less), "weigh_plan_backward: dlogits.cols is 5, expected 6"},
                      {back(x, w, x), "weigh_plan_backward: " + apart},
                      {whole(fewer, out), "sinkhorn_plan_backward: rows is 3, expected 4"},
                      {whole(less, out), "sinkhorn_plan_backward: cols is 5, expected 6"},
                      {whole(out, fewer), "sinkhorn_plan_backward: rows is 3, expected 4"},
                      {whole(out, less), "sinkhorn_plan_backward: cols is 5, expected 6"},
                      {whole(out, x), "sinkhorn_plan_backward: " + apart}})
    CHECK(test::refusal(call) == "moeroute::" + words);
  a.to_fill().ids[0] = 6;
  CHECK(test::refusal(forward(x, w)) == "moeroute::weigh_plan: an id is 6, expected -1 to 5");
  // Nobody asks what nothing is written to.
  const rows nothing{nullptr, 0, 0};
  weigh_plan_backward(how, plan_share::entries, x, {}, a, w, by, gradient_to::nowhere, nothing, ws);
  sinkhorn_plan_backward(how, x, {}, nothing, by, gradient_to::nowhere, nothing, ws);
}

TEST_CASE("offsets of choices that do not ascend are refused before a plan is read by them") {
  test::random rng(7);
  assignment a = test::ragged_choices(rng, 4, 6, 3);
  plan_doubles z(24, 0.5), dz(24), w(static_cast<std::size_t>(a.choices()));
  a.to_fill().offsets[2] = -4;
  const sinkhorn_scaling how = fixed_iterations(megatron_scaling, 3);
  workspace ws;
  CHECK(test::refusal([&] {
          weigh_plan(how, plan_share::entries, plan_rows(z, 4), {}, a, std::span(w), ws);
        }) ==
        "moeroute::weigh_plan: token 1 has the choices from 3 to -4, expected 0 to k = 3 of them, "
        "from 0 on");
  CHECK(test::refusal([&] {
          weigh_plan_backward(how, plan_share::entries, plan_rows(z, 4), {}, a, w,
                              plan_gradient::unrolled, gradient_to::write, plan_rows(dz, 4), ws);
        }) ==
        "moeroute::weigh_plan_backward: token 1 has the choices from 3 to -4, expected 0 to k = 3 "
        "of them, from 0 on");
}

TEST_CASE("warm gradients of a plan allocate nothing, through iterations and at the fixed point") {
  constexpr index_t tokens = 40, experts = 8;
  const std::vector<float> near = test::make_logits(test::shape::normal, 3, tokens, experts);
  plan_doubles z(near.begin(), near.end()), dz(z.size());
  const sinkhorn_scaling how = fixed_iterations(megatron_scaling, 6);
  for (const auto by : {plan_gradient::unrolled, plan_gradient::implicit}) {
    workspace ws;
    long made = 0;
    for (int i = 0; i < 2; ++i)
      made = test::allocations_during([&] {
        sinkhorn_plan_backward(how, plan_rows(z, tokens), {}, plan_rows(z, tokens), by,
                               gradient_to::write, plan_rows(dz, tokens), ws);
      });
    CHECK(made == 0);
  }
}
