#include <moeroute/policy/weigh/sinkhorn_plan.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/batch/sinkhorn.hpp>
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
      CHECK(test::difference(dz, file.numbers("grad_logits"), 1e-9, 1e-14) == "");
    }
}

TEST_CASE("weights of a plan are what the routers write, and their gradients are derivatives") {
  constexpr index_t tokens = 9, experts = 6;
  const std::vector<float> near = test::make_logits(test::shape::normal, 3, tokens, experts);
  const plan_doubles z(near.begin(), near.end());
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1, 1};
  const side_inputs side{.mask = mask};
  test::random rng(5);
  const auto agrees = [&](const char* name, const sinkhorn_scaling& how, const auto& router,
                          plan_share share, std::span<const float> shares = {}) {
    INFO(name);
    const assignment a = test::routed(router, near, experts, side);
    workspace ws;
    plan_doubles w(a.weights().size()), up(w.size());
    weigh_plan(how, share, matrix_view<const double>(z.data(), tokens, experts), side, a,
               std::span(w), ws, shares);
    CHECK(test::difference(w, a.weights(), 2e-5, 1e-7) == "");
    for (double& u : up) u = static_cast<double>(rng.normal());
    const auto value = [&](const plan_doubles& x) {
      plan_doubles at(w.size());
      weigh_plan(how, share, matrix_view<const double>(x.data(), tokens, experts), side, a,
                 std::span(at), ws, shares);
      double sum = 0.0;
      for (std::size_t c = 0; c < at.size(); ++c) sum += up[c] * at[c];
      return sum;
    };
    plan_doubles dz(z.size());
    weigh_plan_backward(how, share, matrix_view<const double>(z.data(), tokens, experts), side, a,
                        up, plan_gradient::unrolled, gradient_to::write, plan_rows(dz, tokens), ws,
                        shares);
    CHECK(test::difference(dz, oracle::derivative(z, value), 1e-6, 2e-9) == "");
  };
  const auto plan = plan_weights::plan;
  sinkhorn_scaling how = fixed_iterations(megatron_scaling, 7);
  agrees("rows then columns", how, sinkhorn{.k = 2, .weights = plan, .scaling = how},
         plan_share::of_choices);
  how = fixed_iterations(kl_projection_scaling, 5);
  agrees("columns then rows", how, sinkhorn{.k = 3, .weights = plan, .scaling = how},
         plan_share::of_choices);
  const std::vector<float> shares{1.0f, 4.0f, 0.5f, 1.0f, 2.0f, 1.0f};
  agrees("columns of unequal shares", how,
         sinkhorn{.k = 2, .weights = plan, .scaling = how, .share = shares}, plan_share::of_choices,
         shares);
  how.similarity = plan_similarity::softmax;
  how.temperature = 0.5f;
  agrees("similarity of probabilities", how, sinkhorn{.k = 2, .weights = plan, .scaling = how},
         plan_share::of_choices);
  how = fixed_iterations(megatron_scaling, 6);
  how.domain = sinkhorn_domain::logarithm;
  agrees("entries", how,
         sinkhorn_expert_choice{.capacity = {.factor = 2.0}, .weights = plan, .scaling = how},
         plan_share::entries);
}

TEST_CASE("at the fixed point the implicit gradient is the one through many iterations") {
  constexpr index_t tokens = 12, experts = 7;
  const std::vector<float> near = test::make_logits(test::shape::normal, 8, tokens, experts);
  plan_doubles z(near.begin(), near.end()), up(z.size()), through(z.size()), at(z.size());
  test::random rng(6);
  for (double& u : up) u = static_cast<double>(rng.normal());
  workspace ws;
  for (const auto order : {scaling_order::rows_then_columns, scaling_order::columns_then_rows}) {
    sinkhorn_scaling how = fixed_iterations(kl_projection_scaling, 2000);
    how.order = order;
    for (const auto by : {plan_gradient::unrolled, plan_gradient::implicit})
      sinkhorn_plan_backward(how, plan_rows(z, tokens), {}, plan_rows(up, tokens), by,
                             gradient_to::write,
                             plan_rows(by == plan_gradient::unrolled ? through : at, tokens), ws);
    CHECK(test::difference(at, through, 1e-7, 1e-9) == "");
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
