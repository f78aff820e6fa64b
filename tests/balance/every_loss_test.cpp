// What holds for every loss and every controller that takes rows: wherever these lie, and whatever
// masked tokens say.
#include <moeroute/balance/loss.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/balance/expert_threshold.hpp>
#include <moeroute/balance/loss_chunk.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_load.hpp>
#include <moeroute/balance/loss_prior.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/loss_router.hpp>
#include <moeroute/balance/loss_selected.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>
#include <moeroute/balance/quantile.hpp>
#include <moeroute/balance/schedule.hpp>
#include <moeroute/balance/sparsity_controller.hpp>
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/compare.hpp"
#include "support/refusal.hpp"
#include "support/strided.hpp"

using namespace moeroute;

namespace {

// A loss's tokens and what it may need beside its logits.
struct inputs {
  index_t tokens, experts;
  gradient_to gradient;
  std::vector<float> logits, before;
  std::vector<double> counts;
  std::vector<std::uint8_t> mask;
  assignment choices;

  inputs(index_t t, index_t e, gradient_to to) : tokens(t), experts(e), gradient(to) {
    test::random rng(static_cast<std::uint64_t>(100 * t + e));
    logits = test::numbers(rng, t * e);
    before = test::numbers(rng, t * e);
    for (index_t i = 0; i < e; ++i) counts.push_back(static_cast<double>(1 + rng.below(9)));
    for (index_t i = 0; i < t; ++i) mask.push_back(i % 5 != 2);
    choices = test::fixed_choices(rng, t, e, 2, 5);
  }
};

// The first layout with another value or another gradient: call(how, z, dz, workspace, layout).
template <class Call>
std::string loss_differs(const Call& call) {
  for (const gradient_to to : {gradient_to::nowhere, gradient_to::write, gradient_to::add})
    for (const auto& [tokens, experts] : {std::pair<index_t, index_t>{1, 2}, {40, 17}, {36, 64}}) {
      const inputs in(tokens, experts, to);
      bool stays = true;
      std::string broken = test::differs_by_stride([&](test::layout& l) {
        const auto z = l.in(in.logits, in.tokens, in.experts);
        const auto dz = l.in_out(in.before, in.tokens, in.experts);
        workspace ws;
        // Who wants no gradient need not have a place for it.
        const matrix_view<float> none{};
        l.result(call(in, z, to == gradient_to::nowhere ? none : dz, ws, l));
        if (to != gradient_to::nowhere) return;
        // Who has one finds it as it was.
        call(in, z, dz, ws, l);
        for (index_t t = 0; t < in.tokens; ++t)
          stays = stays &&
                  std::equal(dz.row(t), dz.row(t) + in.experts, in.before.begin() + t * in.experts);
      });
      if (!stays) broken = "written without a wish";
      if (!broken.empty())
        return "T=" + std::to_string(tokens) + " E=" + std::to_string(experts) + ": " + broken;
    }
  return "";
}

template <class... L>
std::string sums_differ(probability scores, const L&... losses) {
  return loss_differs([&](const inputs& in, auto z, auto dz, workspace& ws, test::layout& l) {
    const auto values = balance_loss<float>(
        {.scores = scores, .gradient = in.gradient, .mask = in.mask, .sequence_length = 8}, z, dz,
        ws, serial{}, losses...);
    for (std::size_t i = 0; i + 1 < sizeof...(losses); ++i) l.result(values[i]);
    return values[sizeof...(losses) - 1];
  });
}

}  // namespace

TEST_CASE("losses of probabilities do not depend on where rows of logits and gradients lie") {
  for (const probability scores : {probability::softmax, probability::normalized_sigmoid,
                                   probability::normalized_sqrt_softplus})
    CHECK(sums_differ(scores, importance_loss{}, batch_entropy_loss{}) == "");
  CHECK(sums_differ(probability::softmax, importance_loss{}) == "");
  CHECK(sums_differ(probability::softmax, router_z_loss{}, token_entropy_loss{}, sparsity_loss{},
                    tsallis_loss{}) == "");
}

TEST_CASE("losses of counts by sequence read them wherever their rows lie") {
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout& l) {
          const index_t sequences = (in.tokens + 7) / 8;
          std::vector<double> counts;
          for (index_t s = 0; s < sequences; ++s)
            counts.insert(counts.end(), in.counts.begin(), in.counts.end());
          for (std::size_t i = 0; i < counts.size(); i += 3) counts[i] += 2.0;
          const auto rows = l.in(counts, sequences, in.experts);
          return balance_loss<float>({.gradient = in.gradient, .sequence_length = 8}, z, dz, ws,
                                     serial{}, sequence_loss{.counts = rows, .k = 1})[0];
        }) == "");
}

TEST_CASE("losses with functions of their own do not depend on where rows lie") {
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout&) {
          return relu_balance_loss<float>({}, {in.gradient, in.mask}, z, dz, ws, serial{});
        }) == "");
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout&) {
          return chunk_sparsity<float>({.chunk = in.tokens > 1 ? 4 : 1}, {in.gradient, in.mask}, z,
                                       dz, ws, serial{});
        }) == "");
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout&) {
          return share_balance<float>({}, {in.gradient, in.mask}, z, dz, ws, serial{});
        }) == "");
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace&, test::layout&) {
          std::vector<std::int32_t> neighbour;
          for (index_t t = 0; t < in.tokens; ++t)
            neighbour.push_back(static_cast<std::int32_t>(t % 3 == 0 ? -1 : t * 7 % in.tokens));
          return activation_locality<float>({.neighbour = neighbour}, {in.gradient, in.mask}, z,
                                            dz);
        }) == "");
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout&) {
          const std::vector<double> alpha(static_cast<std::size_t>(in.experts), 1.5);
          return dirichlet_prior<float>({.alpha = alpha}, {in.gradient, in.mask}, z, dz, ws,
                                        serial{});
        }) == "");
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout&) {
          return selected_importance_loss<float>(
              {}, drop_stage::before_drop, {in.gradient, in.mask}, in.choices, z, dz, ws, serial{});
        }) == "");
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace&, test::layout&) {
          return stable_moe_loss<float>(0.3, in.counts, drop_stage::before_drop,
                                        {in.gradient, in.mask}, in.choices, z, dz);
        }) == "");
}

TEST_CASE("the load loss does not depend on where logits, noise, sigmas and gradients lie") {
  CHECK(loss_differs([](const inputs& in, auto z, auto dz, workspace& ws, test::layout& l) {
          test::random rng(3);
          std::vector<float> noisy, sigma;
          for (const float x : in.logits) {
            sigma.push_back(0.1f + rng.uniform());
            noisy.push_back(x + sigma.back() * rng.normal());
          }
          const auto sigmas = l.in(sigma, in.tokens, in.experts);
          const auto dsigma = l.in_out(in.before, in.tokens, in.experts);
          const double value = noisy_load_loss<float>({.k = 1}, {in.gradient, in.mask}, z,
                                                      l.in(noisy, in.tokens, in.experts), sigmas,
                                                      dz, dsigma, ws, serial{});
          noise_logit_gradient<float>(sigmas, 0.05, dsigma);
          return value;
        }) == "");
}

TEST_CASE("the coupling of experts and router does not depend on where their rows lie") {
  for (const gradient_to to : {gradient_to::nowhere, gradient_to::write, gradient_to::add})
    CHECK(test::differs_by_stride([&](test::layout& l) {
            test::random rng(4);
            const index_t experts = 3, hidden = 5, d = 18;
            const auto router = l.in(test::numbers(rng, experts * d), experts, d);
            const auto expert = l.in(test::numbers(rng, experts * hidden * d), experts * hidden, d);
            const auto delta = l.out<float>(experts, d);
            fill_router_noise<float>(router, 5, 6, delta);
            const auto drouter = l.in_out(test::numbers(rng, experts * d), experts, d);
            const auto dexpert =
                l.in_out(test::numbers(rng, experts * hidden * d), experts * hidden, d);
            workspace ws;
            l.result(expert_router_coupling<float>({.alpha = 0.9}, to, router, delta, expert,
                                                   drouter, dexpert, ws, serial{}));
          }) == "");
}

TEST_CASE("controllers that see scores read them wherever rows lie") {
  for (const index_t experts : {9, 16, 32, -9, -16})  // below 0: without a mask
    CHECK(test::differs_by_stride(
              [experts = std::abs(experts), masked = experts > 0](test::layout& l) {
                inputs in(40, experts, gradient_to::nowhere);
                const auto scores = l.in(in.logits, 40, experts);
                if (!masked) in.mask.clear();
                workspace ws;
                bip_balancer bip(experts, {.k = 2});
                bip.update(scores, in.mask, ws);
                l.result(bip.bias());
                expert_thresholds thresholds(experts, {.k = 2});
                thresholds.observe(scores, in.mask, ws);
                thresholds.update();
                l.result(thresholds.bias());
                quantile_balancer exact(experts, {.k = 2});
                exact.observe(scores, in.mask, ws);
                exact.update();
                l.result(exact.bias());
                for (const index_t k : {2, 8}) {
                  quantile_histogram counted(
                      experts, {.k = k, .buckets = 50, .least_score = -6.0f, .most_score = 6.0f});
                  counted.observe(scores, in.mask, ws);
                  l.result(std::span<const std::int32_t>(counted.counts()));
                  counted.update();
                  l.result(counted.bias());
                }
              }) == "");
}

namespace {

// A masked batch and the same without its masked tokens, of one loss: call(how, z, dz, choices,
// workspace) gives the value.
template <class Call>
std::string masked_differs(const Call& call) {
  for (const index_t experts : {1, 17, 65})
    for (const gradient_to to : {gradient_to::write, gradient_to::add}) {
      const index_t tokens = 130;
      test::random rng(static_cast<std::uint64_t>(experts));
      const assignment all = test::fixed_choices(rng, tokens, experts, 1);
      std::vector<float> z = test::numbers(rng, tokens * experts), rest;
      std::vector<float> dz = test::numbers(rng, tokens * experts), drest;
      std::vector<std::uint8_t> mask;
      std::vector<index_t> taken;
      for (index_t t = 0; t < tokens; ++t) {
        mask.push_back(t % 7 != 0 && t != tokens - 1);
        if (mask.back() != 0) taken.push_back(t);
        for (index_t e = 0; e < experts; ++e) {
          const auto at = static_cast<std::size_t>(t * experts + e);
          if (mask.back() != 0) {
            rest.push_back(z[at]);
            drest.push_back(dz[at]);
          } else {
            z[at] = e % 2 == 0 ? 50.0f : std::nanf("");  // nobody looks at it
          }
        }
      }
      const auto n = static_cast<index_t>(taken.size());
      assignment left;
      left.reset(n, experts, 1);
      for (index_t i = 0; i < n; ++i)
        left.ids()[static_cast<std::size_t>(i)] = all.ids(taken[static_cast<std::size_t>(i)])[0];
      workspace ws;
      const std::vector<float> before = dz;
      const double masked =
          call(token_options{to, mask}, matrix_view<const float>(z.data(), tokens, experts),
               matrix_view<float>(dz.data(), tokens, experts), all, ws);
      const double without =
          call(token_options{to, {}}, matrix_view<const float>(rest.data(), n, experts),
               matrix_view<float>(drest.data(), n, experts), left, ws);
      const std::string where = "E=" + std::to_string(experts) + ": ";
      if (!(std::abs(masked - without) <= 1e-5 * std::abs(without) + 1e-12))
        return where + test::shown(masked) + " masked, " + test::shown(without) + " without";
      std::vector<float> got;
      for (index_t t = 0; t < tokens; ++t)
        for (index_t e = 0; e < experts; ++e) {
          const auto at = static_cast<std::size_t>(t * experts + e);
          if (mask[static_cast<std::size_t>(t)] != 0)
            got.push_back(dz[at]);
          else if (dz[at] != (to == gradient_to::write ? 0.0f : before[at]))
            return where + "a masked row has the gradient " + test::shown(dz[at]);
        }
      if (const std::string broken = test::difference(got, drest, 1e-4, 1e-7); !broken.empty())
        return where + broken;
    }
  return "";
}

template <class... L>
auto of_sums(const L&... losses) {
  return [=](const token_options& how, auto z, auto dz, const assignment&, workspace& ws) {
    return balance_loss<float>({.gradient = how.gradient, .mask = how.mask}, z, dz, ws, serial{},
                               losses...)[0];
  };
}

// Calls f(call) for every loss that a token can be left out of.
template <class F>
void for_each_loss(F&& f) {
  f(of_sums(importance_loss{.coefficient = 1.0}));
  f(of_sums(mean_importance_loss{.coefficient = 1.0}));
  f(of_sums(batch_entropy_loss{.coefficient = 1.0}));
  f(of_sums(router_z_loss{.coefficient = 1.0}, token_entropy_loss{}, sparsity_loss{}));
  f([](const token_options& how, auto z, auto dz, const assignment&, workspace& ws) {
    return relu_balance_loss<float>({.coefficient = 1.0}, how, z, dz, ws, serial{});
  });
  f([](const token_options& how, auto z, auto dz, const assignment&, workspace& ws) {
    return share_balance<float>({}, how, z, dz, ws, serial{});
  });
  f([](const token_options& how, auto z, auto dz, const assignment&, workspace& ws) {
    const std::vector<double> alpha(static_cast<std::size_t>(z.cols), 1.5);
    return dirichlet_prior<float>({.alpha = alpha}, how, z, dz, ws, serial{});
  });
  f([](const token_options& how, auto z, auto dz, const assignment& a, workspace& ws) {
    return selected_importance_loss<float>({.coefficient = 1.0}, drop_stage::before_drop, how, a, z,
                                           dz, ws, serial{});
  });
  f([](const token_options& how, auto z, auto dz, const assignment& a, workspace&) {
    std::vector<double> drawn(static_cast<std::size_t>(z.cols), 3.0);
    drawn[0] = 5.0;
    return stable_moe_loss<float>(0.3, drawn, drop_stage::before_drop, how, a, z, dz);
  });
  f([](const token_options& how, auto z, auto dz, const assignment&, workspace& ws) {
    const float one = 1.0f;
    return noisy_load_loss<float>({.coefficient = 1.0, .k = 1}, how, z, z,
                                  matrix_view<const float>(&one, 1, 1), dz, ws, serial{});
  });
}

// What differs where -inf is spelled NaN.
template <class Call>
std::string nan_differs(const Call& call) {
  constexpr index_t tokens = 20, experts = 18;
  test::random rng(9);
  const assignment choices = test::fixed_choices(rng, tokens, experts, 1);
  std::vector<float> z = test::numbers(rng, tokens * experts), nan;
  for (std::size_t i = 0; i < z.size(); ++i)
    if (rng.below(4) == 0 || i < static_cast<std::size_t>(experts)) z[i] = -HUGE_VALF;
  for (const float x : z) nan.push_back(x == -HUGE_VALF ? std::nanf("") : x);
  std::vector<float> dz(z.size(), 7.0f), dnan = dz;
  workspace ws;
  const double value = call(token_options{}, matrix_view<const float>(z.data(), tokens, experts),
                            matrix_view<float>(dz.data(), tokens, experts), choices, ws);
  const double other = call(token_options{}, matrix_view<const float>(nan.data(), tokens, experts),
                            matrix_view<float>(dnan.data(), tokens, experts), choices, ws);
  if (!std::isfinite(value) || value != other) return test::shown(other);
  return test::bit_difference(dnan, dz);
}

}  // namespace

TEST_CASE("to every loss masked tokens are not there, and their gradient rows are 0 or stay") {
  for_each_loss([](const auto& call) { CHECK(masked_differs(call) == ""); });
}

TEST_CASE("to every loss a NaN is -inf, in value and gradient") {
  for_each_loss([](const auto& call) { CHECK(nan_differs(call) == ""); });
}

TEST_CASE("no loss hears of what another call left in its memory") {
  for_each_loss([](const auto& call) {
    constexpr index_t tokens = 70, experts = 18;
    test::random rng(12);
    const assignment choices = test::fixed_choices(rng, tokens, experts, 1);
    const std::vector<float> z = test::numbers(rng, tokens * experts),
                             other = test::numbers(rng, tokens * experts);
    const auto of = [&](const std::vector<float>& logits, workspace& ws, std::vector<float>& dz) {
      dz.assign(logits.size(), 7.0f);
      return call(token_options{}, matrix_view<const float>(logits.data(), tokens, experts),
                  matrix_view<float>(dz.data(), tokens, experts), choices, ws);
    };
    workspace fresh, used;
    std::vector<float> expected, got;
    const double value = of(z, fresh, expected);
    of(other, used, got);
    CHECK(of(z, used, got) == value);
    CHECK(test::bit_difference(got, expected) == "");
  });
}

TEST_CASE("without a token that takes part no loss has a value, and gradients are 0 or stay") {
  for_each_loss([](const auto& call) {
    constexpr index_t tokens = 21, experts = 5;
    test::random rng(13);
    const assignment choices = test::fixed_choices(rng, tokens, experts, 1);
    const std::vector<float> z = test::numbers(rng, tokens * experts),
                             before = test::numbers(rng, tokens * experts);
    const std::vector<std::uint8_t> mask(tokens, 0);
    assignment nobody;
    nobody.reset(0, experts, 1);
    workspace ws;
    for (const gradient_to to : {gradient_to::write, gradient_to::add, gradient_to::nowhere}) {
      std::vector<float> dz = before;
      const matrix_view<float> out(dz.data(), tokens, experts);
      CHECK(call(token_options{to, mask}, matrix_view<const float>(z.data(), tokens, experts),
                 to == gradient_to::nowhere ? matrix_view<float>{} : out, choices, ws) == 0.0);
      CHECK(dz == (to == gradient_to::write ? std::vector<float>(z.size(), 0.0f) : before));
      CHECK(call(token_options{to, {}}, matrix_view<const float>(z.data(), 0, experts),
                 matrix_view<float>(dz.data(), 0, experts), nobody, ws) == 0.0);
    }
  });
}

TEST_CASE("no controller hears of what another call left in its memory") {
  test::random rng(14);
  for (const index_t experts : {3, 16, 17, 90})
    for (const index_t k : {index_t{1}, experts - 1}) {
      constexpr index_t tokens = 37;
      const std::vector<float> z = test::numbers(rng, tokens * experts);
      std::vector<std::uint8_t> mask;
      for (index_t t = 0; t < tokens; ++t) mask.push_back(static_cast<std::uint8_t>(t % 6));
      const auto numbers = [&](float left) {
        workspace ws;
        const auto soil = [&] {
          constexpr index_t size = 20000;
          std::fill_n(ws.carve([](scratch& tape) { return tape.take<float>(size); }), size, left);
        };
        const matrix_view<const float> scores(z.data(), tokens, experts);
        std::vector<float> all;
        const auto say = [&](std::span<const float> list) {
          all.insert(all.end(), list.begin(), list.end());
        };
        for (const std::span<const std::uint8_t> of : {std::span<const std::uint8_t>(mask), {}}) {
          for (const int iterations : {0, 2}) {
            bip_balancer bip(experts, {.k = k, .iterations = iterations});
            soil();
            bip.update(scores, of, ws);
            say(bip.bias());
            say(bip.token_prices());
          }
          expert_thresholds thresholds(experts, {.k = static_cast<float>(k)});
          soil();
          thresholds.observe(scores, of, ws);
          thresholds.update();
          say(thresholds.bias());
          quantile_balancer exact(experts, {.k = k});
          soil();
          exact.observe(scores, of, ws);
          exact.update();
          say(exact.bias());
          quantile_histogram counted(
              experts, {.k = k, .buckets = 50, .least_score = -6.0f, .most_score = 6.0f});
          soil();
          counted.observe(scores, of, ws);
          counted.update();
          say(counted.bias());
        }
        return all;
      };
      const std::vector<float> clean = numbers(0.0f);
      for (const float left : {std::nanf(""), HUGE_VALF, -HUGE_VALF, 1e30f})
        CHECK(test::bit_difference(numbers(left), clean) == "");
    }
}

TEST_CASE("what nobody says of a loss, a controller or a schedule is what is published") {
  const auto are = [](const std::vector<double>& values, const std::vector<double>& expected) {
    return test::difference(values, expected, 0.0);
  };
  const switch_loss of_switch;
  const device_loss device;
  const communication_loss communication;
  const specialisation_loss special;
  CHECK(are({of_switch.coefficient, of_switch.divisor, of_switch.tokens}, {0.01, 1, 0}) == "");
  const std::vector<double> four(4, 1.0);
  const auto made = {switch_loss::megatron(0.3, four, 2), switch_loss::first_choice(0.3, four),
                     switch_loss::deepspeed_top_k(0.3, four, 2),
                     switch_loss::hugging_face(0.3, four),
                     switch_loss::megablocks(0.3, four, 2, 1)};
  for (const switch_loss& one : made) CHECK(are({one.coefficient, one.tokens}, {0.3, 0}) == "");
  const switch_loss layers_of = switch_loss::hugging_face(0.3, four, 7.0);
  CHECK(are({layers_of.divisor, layers_of.tokens}, {1, 7}) == "");
  CHECK(are({sequence_loss{}.coefficient, static_cast<double>(sequence_loss{}.k),
             sequence_loss{}.sequences},
            {1e-4, 1, 0}) == "");
  CHECK(are({device.coefficient, static_cast<double>(device.k), static_cast<double>(device.devices),
             device.tokens},
            {0.05, 1, 1, 0}) == "");
  CHECK(are({communication.coefficient, static_cast<double>(communication.devices_per_token),
             communication.tokens},
            {0.02, 1, 0}) == "");
  CHECK(are({special.coefficient, special.sharpness, special.tokens}, {0.01, 0, 0}) == "");
  CHECK(are({importance_loss{}.coefficient, importance_loss{}.eps,
             mean_importance_loss{}.coefficient, batch_entropy_loss{}.coefficient},
            {0.01, 1e-10, 0.1, 0.01}) == "");
  CHECK(importance_loss{}.kind == variance::population);
  CHECK(are({router_z_loss{}.coefficient, router_z_loss{}.tokens, token_entropy_loss{}.coefficient,
             token_entropy_loss{}.tokens, tsallis_loss{}.coefficient, tsallis_loss{}.q,
             tsallis_loss{}.tokens, sparsity_loss{}.coefficient, sparsity_loss{}.tokens},
            {1e-3, 0, 1e-4, 0, 0.01, 1.1, 0, 0.1, 0}) == "");
  const relu_loss relu;
  CHECK(are({relu.coefficient, static_cast<double>(relu.k), relu.tokens}, {1e-8, 1, 0}) == "");
  CHECK(relu.weighting == relu_weighting::load);
  const load_loss load;
  CHECK(are({load.coefficient, static_cast<double>(load.k), load.eps}, {0.01, 1, 1e-10}) == "");
  CHECK(load.threshold == load_threshold::without_self);
  CHECK(load.kind == variance::population);
  const dirichlet_prior_loss prior;
  const coupling_loss coupling;
  CHECK(are({prior.coefficient, prior.clamp, coupling.coefficient, coupling.alpha},
            {0.01, 1e-6, 1, 1}) == "");
  const share_balance_loss shares;
  const chunk_sparsity_loss chunks;
  const locality_loss locality;
  CHECK(are({shares.coefficient, shares.eps, shares.norm_eps}, {1, 1e-5, 1e-6}) == "");
  CHECK(are({chunks.coefficient, static_cast<double>(chunks.chunk), chunks.eps, chunks.norm_eps},
            {1, 64, 1e-5, 1e-6}) == "");
  CHECK((shares.normalized && chunks.normalized));
  CHECK(are({locality.coefficient, locality.beta}, {1, 100}) == "");
  const loss_options how;
  CHECK(how.scores == probability::softmax);
  CHECK((how.gradient == gradient_to::write && token_options{}.gradient == gradient_to::write));
  CHECK(are({static_cast<double>(how.sigmoid_eps), static_cast<double>(how.sequence_length)},
            {0, 0}) == "");

  const auto wide = [](float x) { return static_cast<double>(x); };
  const auto whole = [](index_t x) { return static_cast<double>(x); };
  const bias_options bias;
  CHECK(bias.rule == bias_rule::sign);
  CHECK(bias.error == bias_error::over_mean);
  CHECK(bias.decay == step_decay::none);
  CHECK(bias.centre == bias_centre::free);
  CHECK(are({wide(bias.step), wide(bias.least_factor)}, {wide(1e-3f), wide(1e-3f)}) == "");
  const real_expert_options real;
  CHECK(are({whole(real.experts), whole(real.zero_experts), whole(real.k), wide(real.target),
             wide(real.step)},
            {1, 0, 1, 1, wide(1e-3f)}) == "");
  CHECK(are({whole(bip_options{}.k), static_cast<double>(bip_options{}.iterations)}, {1, 4}) == "");
  CHECK(bip_options{}.start == price_start::previous);
  const expert_threshold_options threshold;
  CHECK(are({wide(threshold.k), wide(threshold.ema)}, {1, wide(0.99f)}) == "");
  const quantile_options exact;
  const quantile_histogram_options counted;
  CHECK(are({whole(exact.k), wide(exact.ema), whole(counted.k), wide(counted.ema),
             whole(counted.buckets), wide(counted.least_score), wide(counted.most_score)},
            {1, 0, 1, 0, 1000, 0, 1}) == "");
  const lambda_options lambda;
  CHECK(are({whole(lambda.experts), wide(lambda.k), lambda.start, lambda.factor, lambda.floor,
             lambda.ceiling},
            {1, 1, 1e-8, 1.2, 0, 1e30}) == "");
  CHECK(lambda.equal == at_target::decrease);
  const target_options target;
  CHECK(are({wide(target.start), wide(target.target), wide(target.step), wide(target.least),
             wide(target.most)},
            {0.5, 2, wide(0.02f), 0, 1}) == "");
  CHECK(target.rule == target_rule::proportional);
  const annealing a;
  CHECK(are({a.from, a.to, whole(a.begin), whole(a.end)}, {1, 1, 0, 1}) == "");
  CHECK(a.shape == anneal_shape::linear);
  const layer_schedule_options layers;
  CHECK(are({whole(layers.layers), whole(layers.least), whole(layers.most), layers.waves},
            {1, 1, 1, 1}) == "");
}

TEST_CASE("losses with functions of their own refuse by name what does not fit their logits") {
  using rows = matrix_view<const float>;
  using gradients = matrix_view<float>;
  std::vector<float> in(24), noise(24), sigmas(24, 1.0f), out(24), other(24);
  const rows z(in.data(), 3, 4), noisy(noise.data(), 3, 4), sigma(sigmas.data(), 3, 4);
  const gradients dz(out.data(), 3, 4), ds(other.data(), 3, 4), none;
  const rows one(sigmas.data(), 1, 1), shorter(noise.data(), 2, 4), narrower(noise.data(), 3, 3),
      tangled(noise.data(), 3, 4, 3);
  const gradients dshorter(other.data(), 2, 4), dnarrower(other.data(), 3, 3),
      dtangled(other.data(), 3, 4, 3);
  workspace ws;
  const auto chunk = [&](const chunk_sparsity_loss& o) {
    return [&, o] { chunk_sparsity<float>(o, {}, z, dz, ws, serial{}); };
  };
  const auto shares = [&](const share_balance_loss& o) {
    return [&, o] { share_balance<float>(o, {}, z, dz, ws, serial{}); };
  };
  const std::int32_t next[] = {-1, 0, 1}, below[] = {-2, 0, 1};
  const auto local = [&](const locality_loss& o) {
    return [&, o] { activation_locality<float>(o, {}, z, dz); };
  };
  const std::vector<double> negative{1, 1, 1, -1}, five(5, 1.0), four(4, 1.0);
  const auto relu = [&](const relu_loss& o) {
    return [&, o] { relu_balance_loss<float>(o, {}, z, dz, ws, serial{}); };
  };
  const auto load = [&](rows n, rows s, gradients d, const load_loss& o = {}) {
    return [&, n, s, d, o] { noisy_load_loss<float>(o, {}, z, n, s, dz, d, ws, serial{}); };
  };
  const auto noise_logits = [](rows s, gradients d) {
    return [s, d] { noise_logit_gradient<float>(s, 0.0, d); };
  };
  const auto filled = [](rows r, gradients d) {
    return [r, d] { fill_router_noise<float>(r, 0, 0, d); };
  };
  // Router and noise [2, 3], experts of two units [4, 3].
  const rows router(in.data(), 2, 3), delta(noise.data(), 2, 3), expert(sigmas.data(), 4, 3);
  const gradients drouter(out.data(), 2, 3), dexpert(other.data(), 4, 3);
  const auto coupled = [&](rows r, rows d, rows e, gradients dr, gradients de) {
    return [&, r, d, e, dr, de] {
      expert_router_coupling<float>({}, gradient_to::write, r, d, e, dr, de, ws, serial{});
    };
  };
  test::random rng(1);
  const assignment right = test::fixed_choices(rng, 3, 4, 1);
  const assignment fewer = test::fixed_choices(rng, 2, 4, 1),
                   wider = test::fixed_choices(rng, 3, 5, 1);
  const auto chosen = [&](const assignment& a) {
    return [&] {
      selected_importance_loss<float>({}, drop_stage::before_drop, {}, a, z, dz, ws, serial{});
    };
  };
  const auto settled = [&](const assignment& a) {
    return [&] { stable_moe_loss<float>(1.0, four, drop_stage::before_drop, {}, a, z, dz); };
  };
  const auto relus = [&](rows l, gradients d, std::span<const std::uint8_t> mask = {}) {
    return [&, l, d, mask] { relu_balance_loss<float>({}, {.mask = mask}, l, d, ws, serial{}); };
  };
  const std::vector<std::uint8_t> mask(2, 1);
  const test::refusals all{
      {relus({in.data(), 3, 0}, dz), "relu_loss: experts is 0, expected 1 to 1048576"},
      {relus({in.data(), 3, 4, 3}, dz), "relu_loss: logits.stride is 3, expected at least 4"},
      {relus(z, dz, mask), "relu_loss: mask.size is 2, expected 3"},
      {relus(z, dshorter), "relu_loss: dlogits.rows is 2, expected 3"},
      {relus(z, dnarrower), "relu_loss: dlogits.cols is 3, expected 4"},
      {relus(z, dtangled), "relu_loss: dlogits.stride is 3, expected at least 4"},
      {[&] { chunk_sparsity<float>({.chunk = 1}, {}, z, dshorter, ws, serial{}); },
       "chunk_sparsity: dlogits.rows is 2, expected 3"},
      {[&] { share_balance<float>({}, {}, z, dshorter, ws, serial{}); },
       "share_balance: dlogits.rows is 2, expected 3"},
      {[&] { activation_locality<float>({.neighbour = next}, {}, z, dshorter); },
       "activation_locality: dlogits.rows is 2, expected 3"},
      {[&] { noisy_load_loss<float>({}, {}, z, noisy, sigma, dnarrower, none, ws, serial{}); },
       "load_loss: dlogits.cols is 3, expected 4"},
      {[&] { dirichlet_prior<float>({.alpha = four}, {}, z, dnarrower, ws, serial{}); },
       "dirichlet_prior: dlogits.cols is 3, expected 4"},
      {[&] { dirichlet_prior<float>({.alpha = five}, {}, z, dz, ws, serial{}); },
       "dirichlet_prior: alpha.size is 5, expected 4"},
      {[&] {
         selected_importance_loss<float>({}, drop_stage::before_drop, {}, right, z, dnarrower, ws,
                                         serial{});
       },
       "selected_importance_loss: dlogits.cols is 3, expected 4"},
      {[&] {
         selected_importance_loss<float>({.eps = -1.0}, drop_stage::before_drop, {}, right, z, dz,
                                         ws, serial{});
       },
       "selected_importance_loss: eps is -1.000000, expected >= 0"},
      {[&] { stable_moe_loss<float>(1.0, four, drop_stage::before_drop, {}, right, z, dnarrower); },
       "stable_moe_loss: dlogits.cols is 3, expected 4"},
      {[&] { stable_moe_loss<float>(1.0, five, drop_stage::before_drop, {}, right, z, dz); },
       "stable_moe_loss: counts.size is 5, expected 4"},
      {[&] { stable_moe_loss<float>(-1.0, four, drop_stage::before_drop, {}, right, z, dz); },
       "stable_moe_loss: coefficient is -1.000000, expected >= 0"},
      {chunk({.chunk = 0}), "chunk_sparsity: chunk is 0, expected 1 to 1099511627776"},
      {chunk({.chunk = 1, .eps = 0.0}), "chunk_sparsity: an eps is not positive"},
      {chunk({.chunk = 1, .norm_eps = -1.0}), "chunk_sparsity: an eps is not positive"},
      {shares({.coefficient = -1.0}), "share_balance: coefficient is -1.000000, expected >= 0"},
      {shares({.eps = 0.0}), "share_balance: an eps is not positive"},
      {shares({.norm_eps = std::nan("")}), "share_balance: an eps is not positive"},
      {local({.coefficient = -1.0, .neighbour = next}),
       "activation_locality: coefficient is -1.000000, expected >= 0"},
      {local({.beta = -1.0, .neighbour = next}),
       "activation_locality: beta is not finite and >= 0"},
      {local({.beta = HUGE_VAL, .neighbour = next}),
       "activation_locality: beta is not finite and >= 0"},
      {local({.neighbour = std::span(next).first(2)}),
       "activation_locality: neighbour.size is 2, expected 3"},
      {local({.neighbour = below}), "activation_locality: neighbour is -2, expected -1 to 2"},
      {relu({.k = 0}), "relu_loss: k is 0, expected 1 to 4"},
      {relu({.counts = negative}), "relu_loss: a count is -1.000000, expected >= 0"},
      {relu({.tokens = -1.0}), "relu_loss: tokens is negative, expected >= 0"},
      {load(noisy, sigma, ds, {.k = 0}), "load_loss: k is 0, expected 1 to 4"},
      {load(noisy, sigma, ds, {.eps = -1.0}), "load_loss: eps is -1.000000, expected >= 0"},
      {load(shorter, sigma, ds), "load_loss: noisy.rows is 2, expected 3"},
      {load(narrower, sigma, ds), "load_loss: noisy.cols is 3, expected 4"},
      {load(tangled, sigma, ds), "load_loss: noisy.stride is 3, expected at least 4"},
      {load(noisy, {sigmas.data(), 2, 4}, ds), "load_loss: sigma.rows is 2, expected 3"},
      {load(noisy, {sigmas.data(), 3, 1}, ds), "load_loss: sigma.cols is 1, expected 4"},
      {load(noisy, {sigmas.data(), 3, 4, 3}, ds),
       "load_loss: sigma.stride is 3, expected at least 4"},
      {load(noisy, one, ds), "load_loss: dsigma is given, expected sigma of [T, E]"},
      {load(noisy, sigma, dshorter), "load_loss: dsigma.rows is 2, expected 3"},
      {load(noisy, sigma, dnarrower), "load_loss: dsigma.cols is 3, expected 4"},
      {load(noisy, sigma, dtangled), "load_loss: dsigma.stride is 3, expected at least 4"},
      {load(noisy, sigma, dz),
       "load_loss: dlogits and dsigma overlap, expected memory of their own"},
      {load({out.data(), 3, 4}, sigma, none),
       "load_loss: logits, noisy or sigma and dlogits overlap, expected memory of their own"},
      {load(noisy, {other.data(), 3, 4}, ds),
       "load_loss: logits, noisy or sigma and dsigma overlap, expected memory of their own"},
      {noise_logits({sigmas.data(), 2, 4}, ds),
       "noise_logit_gradient: sigma.rows is 2, expected 3"},
      {noise_logits({sigmas.data(), 3, 3}, ds),
       "noise_logit_gradient: sigma.cols is 3, expected 4"},
      {noise_logits({sigmas.data(), 3, 4, 3}, ds),
       "noise_logit_gradient: sigma.stride is 3, expected at least 4"},
      {noise_logits(sigma, dtangled),
       "noise_logit_gradient: dsigma.stride is 3, expected at least 4"},
      {noise_logits({other.data(), 3, 4}, ds),
       "noise_logit_gradient: sigma and dsigma overlap, expected memory of their own"},
      {filled(z, dshorter), "fill_router_noise: delta.rows is 2, expected 3"},
      {filled(z, dnarrower), "fill_router_noise: delta.cols is 3, expected 4"},
      {filled(tangled, dz), "fill_router_noise: router.stride is 3, expected at least 4"},
      {filled(z, dtangled), "fill_router_noise: delta.stride is 3, expected at least 4"},
      {filled({out.data(), 3, 4}, dz),
       "fill_router_noise: router and delta overlap, expected memory of their own"},
      {coupled({in.data(), 0, 3}, delta, expert, drouter, dexpert),
       "expert_router_coupling: experts is 0, expected 1 to 1048576"},
      {coupled(router, {noise.data(), 1, 3}, expert, drouter, dexpert),
       "expert_router_coupling: delta.rows is 1, expected 2"},
      {coupled(router, {noise.data(), 2, 2}, expert, drouter, dexpert),
       "expert_router_coupling: delta.cols is 2, expected 3"},
      {coupled(router, delta, {sigmas.data(), 3, 3}, drouter, dexpert),
       "expert_router_coupling: expert.rows % experts is 1, expected 0"},
      {coupled(router, delta, {sigmas.data(), 4, 2}, drouter, dexpert),
       "expert_router_coupling: expert.cols is 2, expected 3"},
      {coupled({in.data(), 2, 3, 2}, delta, expert, drouter, dexpert),
       "expert_router_coupling: router.stride is 2, expected at least 3"},
      {coupled(router, {noise.data(), 2, 3, 2}, expert, drouter, dexpert),
       "expert_router_coupling: delta.stride is 2, expected at least 3"},
      {coupled(router, delta, {sigmas.data(), 4, 3, 2}, drouter, dexpert),
       "expert_router_coupling: expert.stride is 2, expected at least 3"},
      {coupled(router, delta, expert, {out.data(), 1, 3}, dexpert),
       "expert_router_coupling: drouter.rows is 1, expected 2"},
      {coupled(router, delta, expert, {out.data(), 2, 2}, dexpert),
       "expert_router_coupling: drouter.cols is 2, expected 3"},
      {coupled(router, delta, expert, drouter, {other.data(), 3, 3}),
       "expert_router_coupling: dexpert.rows is 3, expected 4"},
      {coupled(router, delta, expert, drouter, {other.data(), 4, 2}),
       "expert_router_coupling: dexpert.cols is 2, expected 3"},
      {coupled(router, delta, expert, {out.data(), 2, 3, 2}, dexpert),
       "expert_router_coupling: drouter.stride is 2, expected at least 3"},
      {coupled(router, delta, expert, drouter, {other.data(), 4, 3, 2}),
       "expert_router_coupling: dexpert.stride is 2, expected at least 3"},
      {coupled(router, delta, expert, drouter, {out.data(), 4, 3}),
       "expert_router_coupling: drouter and dexpert overlap, expected memory of their own"},
      {coupled(router, {out.data(), 2, 3}, expert, drouter, dexpert),
       "expert_router_coupling: router, delta or expert and drouter overlap, expected memory of "
       "their own"},
      {coupled(router, delta, {other.data(), 4, 3}, drouter, dexpert),
       "expert_router_coupling: router, delta or expert and dexpert overlap, expected memory of "
       "their own"},
      {[&] {
         expert_router_coupling<float>({.alpha = -0.5}, gradient_to::nowhere, router, delta, expert,
                                       none, none, ws, serial{});
       },
       "expert_router_coupling: alpha is -0.500000, expected 0 to 1"},
      {[&] {
         expert_router_coupling<float>({.alpha = std::nan("")}, gradient_to::nowhere, router, delta,
                                       expert, none, none, ws, serial{});
       },
       "expert_router_coupling: alpha is nan, expected 0 to 1"},
      {relu({.coefficient = HUGE_VAL}), "relu_loss: coefficient is inf, expected >= 0"},
      {relu({.tokens = std::nan("")}), "relu_loss: tokens is negative, expected >= 0"},
      {chunk({.chunk = 1, .eps = -1.0}), "chunk_sparsity: an eps is not positive"},
      {chunk({.chunk = 1, .eps = std::nan("")}), "chunk_sparsity: an eps is not positive"},
      {chunk({.chunk = 1, .norm_eps = std::nan("")}), "chunk_sparsity: an eps is not positive"},
      {shares({.eps = std::nan("")}), "share_balance: an eps is not positive"},
      {shares({.norm_eps = -1.0}), "share_balance: an eps is not positive"},
      {local({.beta = std::nan(""), .neighbour = next}),
       "activation_locality: beta is not finite and >= 0"},
      {load(noisy, sigma, ds, {.eps = std::nan("")}), "load_loss: eps is nan, expected >= 0"},
      {chosen(fewer), "selected_importance_loss: assignment.tokens is 2, expected 3"},
      {chosen(wider), "selected_importance_loss: assignment.experts is 5, expected 4"},
      {settled(fewer), "stable_moe_loss: assignment.tokens is 2, expected 3"},
      {settled(wider), "stable_moe_loss: assignment.experts is 5, expected 4"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  const auto unwritten = [&] {  // what nobody is to write may lie anywhere, in any shape
    noisy_load_loss<float>({}, {.gradient = gradient_to::nowhere}, z, noisy, sigma,
                           {in.data(), 3, 4}, dshorter, ws, serial{});
  };
  for (const auto& accepted : std::vector<std::function<void()>>{
           unwritten, local({.beta = 0.0, .neighbour = next}), chunk({.chunk = 1, .norm_eps = 0.0}),
           shares({.norm_eps = 0.0})})
    CHECK(test::refusal(accepted) == "accepted");
}

TEST_CASE("losses of counts and of rows refuse by name the numbers that they are given") {
  const loss_shape shape{.experts = 4, .tokens = 6, .sequences = 2, .all_sequences = 2};
  const std::vector<double> four(4, 1.0), two(2, 1.0), endless{1, 1, 1, HUGE_VAL}, eight(8, 1.0),
      unknown{1, 1, std::nan(""), 1}, negative{1, -1, 1, 1, 1, 1, 1, 1};
  const matrix_view<const double> by_sequence(eight.data(), 2, 4);
  const auto of = [&](const auto& loss) { return [&shape, loss] { loss.check(shape); }; };
  const test::refusals all{
      {of(switch_loss{.counts = four, .tokens = -1.0}),
       "switch_loss: tokens is -1.000000, expected >= 0"},
      {of(switch_loss{.counts = endless}), "switch_loss: a count is inf, expected >= 0"},
      {of(sequence_loss{.coefficient = -1.0, .counts = by_sequence}),
       "sequence_loss: coefficient is -1.000000, expected >= 0"},
      {of(sequence_loss{.counts = by_sequence, .k = 0}),
       "sequence_loss: k is 0, expected 1 to 1048576"},
      {of(sequence_loss{.counts = by_sequence, .sequences = -1.0}),
       "sequence_loss: sequences is -1.000000, expected >= 0"},
      {of(sequence_loss{.counts = {eight.data(), 2, 3}}),
       "sequence_loss: counts.cols is 3, expected 4"},
      {of(sequence_loss{.counts = {eight.data(), 2, 4, 3}}),
       "sequence_loss: counts.stride is 3, expected at least 4"},
      {of(device_loss{.counts = four, .k = 0}), "device_loss: k is 0, expected 1 to 1048576"},
      {of(device_loss{.counts = two}), "device_loss: counts.size is 2, expected 4"},
      {of(device_loss{.counts = four, .devices = 0}), "device_loss: devices is 0, expected 1 to 4"},
      {of(device_loss{.counts = four, .devices = 5}), "device_loss: devices is 5, expected 1 to 4"},
      {of(device_loss{.counts = four, .tokens = HUGE_VAL}),
       "device_loss: tokens is inf, expected >= 0"},
      {of(communication_loss{}), "communication_loss: counts.size is 0, expected 1 to 4"},
      {of(communication_loss{.counts = eight}),
       "communication_loss: counts.size is 8, expected 1 to 4"},
      {of(communication_loss{.counts = two, .devices_per_token = 0}),
       "communication_loss: devices_per_token is 0, expected 1 to 2"},
      {of(communication_loss{.counts = two, .devices_per_token = 3}),
       "communication_loss: devices_per_token is 3, expected 1 to 2"},
      {of(communication_loss{.counts = two, .tokens = -1.0}),
       "communication_loss: tokens is -1.000000, expected >= 0"},
      {of(specialisation_loss{.sharpness = HUGE_VAL, .counts = four}),
       "specialisation_loss: sharpness is not finite"},
      {of(specialisation_loss{.counts = four, .tokens = -1.0}),
       "specialisation_loss: tokens is -1.000000, expected >= 0"},
      {of(router_z_loss{.tokens = -1.0}), "router_z_loss: tokens is -1.000000, expected >= 0"},
      {of(token_entropy_loss{.tokens = -1.0}),
       "token_entropy_loss: tokens is -1.000000, expected >= 0"},
      {of(tsallis_loss{.tokens = -1.0}), "tsallis_loss: tokens is -1.000000, expected >= 0"},
      {of(sparsity_loss{.tokens = -1.0}), "sparsity_loss: tokens is -1.000000, expected >= 0"},
      {of(switch_loss{.coefficient = HUGE_VAL, .counts = four}),
       "switch_loss: coefficient is inf, expected >= 0"},
      {of(switch_loss{.counts = four, .tokens = std::nan("")}),
       "switch_loss: tokens is nan, expected >= 0"},
      {of(switch_loss{.counts = four, .divisor = std::nan("")}),
       "switch_loss: divisor is nan, expected > 0"},
      {of(switch_loss{.counts = unknown}), "switch_loss: a count is nan, expected >= 0"},
      {of(device_loss{.coefficient = -1.0, .counts = four}),
       "device_loss: coefficient is -1.000000, expected >= 0"},
      {of(communication_loss{.coefficient = -1.0, .counts = two}),
       "communication_loss: coefficient is -1.000000, expected >= 0"},
      {of(communication_loss{.counts = {negative.data(), 2}}),
       "communication_loss: a count is -1.000000, expected >= 0"},
      {of(sequence_loss{.counts = {negative.data(), 2, 4}}),
       "sequence_loss: a count is -1.000000, expected >= 0"},
      {of(specialisation_loss{.coefficient = -1.0, .counts = four}),
       "specialisation_loss: coefficient is -1.000000, expected >= 0"},
      {of(specialisation_loss{.counts = two}), "specialisation_loss: counts.size is 2, expected 4"},
      {of(specialisation_loss{.sharpness = std::nan(""), .counts = four}),
       "specialisation_loss: sharpness is not finite"},
      {of(importance_loss{.eps = std::nan("")}), "importance_loss: eps is nan, expected >= 0"},
      {of(tsallis_loss{.coefficient = -1.0}),
       "tsallis_loss: coefficient is -1.000000, expected >= 0"},
      {of(tsallis_loss{.q = 1.0005}), "tsallis_loss: q is 1.000500, expected > 0 and not 1"},
      {of(tsallis_loss{.q = 0.9995}), "tsallis_loss: q is 0.999500, expected > 0 and not 1"},
      {of(tsallis_loss{.q = HUGE_VAL}), "tsallis_loss: q is inf, expected > 0 and not 1"},
      {of(tsallis_loss{.q = std::nan("")}), "tsallis_loss: q is nan, expected > 0 and not 1"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  for (const double q : {0.5, 0.998, 1.002})
    CHECK(test::refusal(of(tsallis_loss{.q = q})) == "accepted");
  CHECK(test::refusal(of(specialisation_loss{.sharpness = -1.0, .counts = four})) == "accepted");
}

TEST_CASE("controllers and schedules refuse by name the numbers that make no sense") {
  constexpr index_t beyond = max_experts + 1;
  std::vector<float> values(4), three(3);
  const std::vector<float> none{1, 0}, endless_share{HUGE_VALF, 1}, unknown_share{1, std::nanf("")};
  const std::vector<std::uint8_t> mask(1, 1);
  workspace ws;
  const matrix_view<const float> scores(values.data(), 2, 2),
      endless(values.data(), index_t{1} << 31, 2), tangled(values.data(), 2, 2, 1);
  const auto lambda = [](const lambda_options& o) { return [o] { lambda_controller{o}; }; };
  const auto real = [](const real_expert_options& o) { return [o] { real_expert_controller{o}; }; };
  const auto layers = [](const layer_schedule_options& o) {
    return [o] { experts_of_layer(layer_schedule::wave, 0, o); };
  };
  const auto priced = [&](matrix_view<const float> s, std::span<const std::uint8_t> m = {}) {
    return [&ws, s, m] { bip_balancer(2, {.k = 1}).update(s, m, ws); };
  };
  const auto seen_by = [&](const expert_thresholds& one, matrix_view<const float> s,
                           std::span<const std::uint8_t> m = {}) {
    return [&ws, one, s, m] { expert_thresholds(one).observe(s, m, ws); };
  };
  const test::refusals all{
      {[] { bias_controller(2, {.step = -1.0f}); },
       "bias_controller: step is -1.000000, expected >= 0 and finite"},
      {[] { bias_controller(2, {.least_factor = -1.0f}); },
       "bias_controller: least_factor is -1.000000, expected >= 0 and finite"},
      {[] { bias_controller(2).set_step(HUGE_VALF); },
       "bias_controller: step is inf, expected >= 0 and finite"},
      {[&] { bias_controller(2).log_factors(three); },
       "bias_controller: out.size() is 3, expected 2"},
      {real({.experts = 0}), "real_expert_controller: experts is 0, expected 1 to 1048576"},
      {real({.experts = 2, .zero_experts = -1}),
       "real_expert_controller: zero_experts is -1, expected 0 to 1048574"},
      {real({.experts = 2, .k = 0}), "real_expert_controller: k is 0, expected 1 to 2"},
      {real({.experts = 2, .k = 2, .target = 3.0f}),
       "real_expert_controller: target is 3.000000, expected 0.000000 to 2.000000"},
      {real({.experts = 2, .target = -0.5f}),
       "real_expert_controller: target is -0.500000, expected 0.000000 to 1.000000"},
      {real({.experts = 2, .step = -1.0f}),
       "real_expert_controller: step is -1.000000, expected >= 0 and finite"},
      {[] { bip_balancer(0, {.k = 1}); }, "bip_balancer: experts is 0, expected 1 to 1048576"},
      {[] { bip_balancer(2, {.k = 0}); }, "bip_balancer: k is 0, expected 1 to 2"},
      {[] { bip_balancer(2, {.k = 3}); }, "bip_balancer: k is 3, expected 1 to 2"},
      {[] { bip_balancer(2, {.k = 1, .iterations = -1}); },
       "bip_balancer: iterations is -1, expected 0 to 1000"},
      {[] { bip_balancer(2, {.k = 1, .iterations = 1001}); },
       "bip_balancer: iterations is 1001, expected 0 to 1000"},
      {[&] { bip_balancer(2, {.k = 1, .share = three}); },
       "bip_balancer: share.size() is 3, expected 2"},
      {priced(endless), "bip_balancer: scores.rows is 2147483648, expected 0 to 2147483647"},
      {priced(tangled), "bip_balancer: scores.stride is 1, expected at least 2"},
      {priced(scores, mask), "bip_balancer: mask.size() is 1, expected 2"},
      {[] { bip_online(0, 1, 1); }, "bip_online: experts is 0, expected 1 to 1048576"},
      {[] { bip_online(2, 0, 1); }, "bip_online: k is 0, expected 1 to 2"},
      {[] { bip_online(2, 3, 1); }, "bip_online: k is 3, expected 1 to 2"},
      {[] { bip_online(2, 1, 0); }, "bip_online: window is 0, expected 1 to 2147483647"},
      {[&] { bip_online(2, 1, 1, none); },
       "bip_online: share of expert 1 is 0.000000, expected > 0"},
      {[] { expert_thresholds(2, {.ema = 1.5f}); },
       "expert_thresholds: ema is 1.500000, expected 0.000000 to 1.000000"},
      {[] { expert_thresholds(2, {.ema = -0.5f}); },
       "expert_thresholds: ema is -0.500000, expected 0.000000 to 1.000000"},
      {[] { expert_thresholds(2, {.k = 2.5f}); },
       "expert_thresholds: k is 2.500000, expected 0.000001 to 2.000000"},
      {[] { quantile_balancer(0, {.k = 1}); },
       "quantile_balancer: experts is 0, expected 1 to 1048576"},
      {[] { quantile_balancer(2, {.ema = 1.5f}); },
       "quantile_balancer: ema is 1.500000, expected 0.000000 to 1.000000"},
      {[] { quantile_histogram(0, {.k = 1}); },
       "quantile_histogram: experts is 0, expected 1 to 1048576"},
      {[] { quantile_histogram(2, {.k = 3}); }, "quantile_histogram: k is 3, expected 1 to 2"},
      {[] { quantile_histogram(2, {.ema = -0.5f}); },
       "quantile_histogram: ema is -0.500000, expected 0.000000 to 1.000000"},
      {[] { quantile_histogram(2, {.buckets = 1}); },
       "quantile_histogram: buckets is 1, expected 2 to 65536"},
      {[] { quantile_histogram(2, {.buckets = 65537}); },
       "quantile_histogram: buckets is 65537, expected 2 to 65536"},
      {[] { annealing{.begin = 2, .end = 1}.check(); }, "annealing: begin is after end"},
      {[] { annealing{.from = HUGE_VAL}.check(); }, "annealing: from and to must be finite"},
      {[] { annealing{.to = std::nan("")}.check(); }, "annealing: from and to must be finite"},
      {layers({.layers = 0}), "experts_of_layer: layers is 0, expected 1 to 1048576"},
      {layers({.most = 0}), "experts_of_layer: most is 0, expected 1 to 1048576"},
      {layers({.least = 0}), "experts_of_layer: least is 0, expected 1 to 1"},
      {layers({.least = 3, .most = 2}), "experts_of_layer: least is 3, expected 1 to 2"},
      {layers({.waves = HUGE_VAL}), "experts_of_layer: waves must be finite"},
      {lambda({.experts = 0}), "lambda_controller: experts is 0, expected 1 to 1048576"},
      {lambda({.k = -1.0f}), "lambda_controller: k is -1.000000, expected 0.000000 to 1.000000"},
      {lambda({.start = 1.0, .ceiling = 0.5}),
       "lambda_controller: start is 1.000000, expected 0.000000 to 0.500000"},
      {lambda({.start = 0.0, .ceiling = 0.5}),
       "lambda_controller: start is 0.000000, expected 0.000000 to 0.500000"},
      {lambda({.start = 0.5, .floor = 1.0}),
       "lambda_controller: floor is 1.000000, expected 0.000000 to 0.500000"},
      {lambda({.start = 0.5, .floor = -1.0}),
       "lambda_controller: floor is -1.000000, expected 0.000000 to 0.500000"},
      {[] { target_controller({.target = 0.0f}); },
       "target_controller: target is 0.000000, expected 0.000001 to 1048576.000000"},
      {[] { target_controller({.step = -1.0f}); },
       "target_controller: step is -1.000000, expected >= 0 and finite"},
      {[] { target_controller({.start = -1.0f}); },
       "target_controller: start is -1.000000, expected 0.000000 to 1.000000"},
      {[] { target_controller({}).update(-1, 1); },
       "target_controller: choices is -1.000000, expected >= 0 and finite"},
      {[] { target_controller({}).update(1, -1); },
       "target_controller: tokens is -1.000000, expected >= 0 and finite"},
      {[] { bias_controller((index_t{1} << 20) + 1); },
       "bias_controller: experts is 1048577, expected 1 to 1048576"},
      {[&] { bias_controller(2, {.share = endless_share}); },
       "bias_controller: share of expert 0 is inf, expected > 0"},
      {[&] { bias_controller(2, {.share = unknown_share}); },
       "bias_controller: share of expert 1 is nan, expected > 0"},
      {[] { bias_controller(2).update(std::vector<double>{HUGE_VAL, 1.0}); },
       "bias_controller: counts must be finite and not negative"},
      {[] { real_expert_controller({}).update(std::vector<double>{std::nan("")}); },
       "real_expert_controller: counts must be finite and not negative"},
      {[] { real_expert_controller({.zero_experts = 2}).update(std::vector<int>{1}); },
       "real_expert_controller: counts.size() is 1, expected 3"},
      {real({.target = std::nanf("")}),
       "real_expert_controller: target is nan, expected 0.000000 to 1.000000"},
      {seen_by(expert_thresholds(2, {}), tangled),
       "expert_thresholds: scores.stride is 1, expected at least 2"},
      {seen_by(expert_thresholds(2, {}), endless),
       "expert_thresholds: scores.rows is 2147483648, expected 0 to 2147483647"},
      {seen_by(expert_thresholds(3, {}), scores),
       "expert_thresholds: scores.cols is 2, expected 3"},
      {seen_by(expert_thresholds(2, {}), scores, mask),
       "expert_thresholds: mask.size() is 1, expected 2"},
      {[] { expert_thresholds(2, {.k = 0.0f}); },
       "expert_thresholds: k is 0.000000, expected 0.000001 to 2.000000"},
      {[] { quantile_balancer(2, {.k = 0}); }, "quantile_balancer: k is 0, expected 1 to 2"},
      {[] { quantile_balancer(2, {.ema = -0.5f}); },
       "quantile_balancer: ema is -0.500000, expected 0.000000 to 1.000000"},
      {[] { quantile_histogram(2, {.k = 0}); }, "quantile_histogram: k is 0, expected 1 to 2"},
      {[] { quantile_histogram(2, {.ema = 1.5f}); },
       "quantile_histogram: ema is 1.500000, expected 0.000000 to 1.000000"},
      {[&] { quantile_balancer(2, {.share = three}); },
       "quantile_balancer: share.size() is 3, expected 2"},
      {[&] { quantile_histogram(2, {.share = three}); },
       "quantile_histogram: share.size() is 3, expected 2"},
      {[&] { bip_online(2, 1, 1, three); }, "bip_online: share.size() is 3, expected 2"},
      {[] { annealing{.from = 1.0, .to = 0.0, .shape = anneal_shape::exponential}.check(); },
       "annealing: from and to of an exponential must be positive"},
      {[] { annealing{.from = -1.0, .to = 1.0, .shape = anneal_shape::exponential}.check(); },
       "annealing: from and to of an exponential must be positive"},
      {lambda({.factor = 2e6}),
       "lambda_controller: factor is 2000000.000000, expected 1.000000 to 1000000.000000"},
      {lambda({.factor = std::nan("")}),
       "lambda_controller: factor is nan, expected 1.000000 to 1000000.000000"},
      {[] { lambda_controller({}).update(-1, 1); },
       "lambda_controller: active is -1, expected 0 to 1"},
      {[] { target_controller({.target = 2e6f}); },
       "target_controller: target is 2000000.000000, expected 0.000001 to 1048576.000000"},
      {[] { target_controller({.start = -4.0f, .least = -3.0f, .most = -1.0f}); },
       "target_controller: start is -4.000000, expected -3.000000 to -1.000000"},
      {[] { target_controller({.step = std::nanf("")}); },
       "target_controller: step is nan, expected >= 0 and finite"},
      {layers({.layers = 2, .waves = std::nan("")}), "experts_of_layer: waves must be finite"},
      {[] { experts_of_layer(layer_schedule::wave, -1, {}); },
       "experts_of_layer: layer is -1, expected 0 to 0"},
      {layers({.layers = beyond}), "experts_of_layer: layers is 1048577, expected 1 to 1048576"},
      {layers({.most = beyond}), "experts_of_layer: most is 1048577, expected 1 to 1048576"},
      {real({.experts = beyond}),
       "real_expert_controller: experts is 1048577, expected 1 to 1048576"},
      {real({.experts = 2, .zero_experts = max_experts - 1}),
       "real_expert_controller: zero_experts is 1048575, expected 0 to 1048574"},
      {real({.experts = 2, .zero_experts = 3, .k = 6}),
       "real_expert_controller: k is 6, expected 1 to 5"},
      {lambda({.experts = beyond}), "lambda_controller: experts is 1048577, expected 1 to 1048576"},
      {[] { bip_balancer(beyond, {}); }, "bip_balancer: experts is 1048577, expected 1 to 1048576"},
      {[] { bip_online(beyond, 1, 1); }, "bip_online: experts is 1048577, expected 1 to 1048576"},
      {[] { bip_online(2, 1, index_t{1} << 31); },
       "bip_online: window is 2147483648, expected 1 to 2147483647"},
      {[] { expert_thresholds(beyond, {}); },
       "expert_thresholds: experts is 1048577, expected 1 to 1048576"},
      {[] { quantile_balancer(beyond, {}); },
       "quantile_balancer: experts is 1048577, expected 1 to 1048576"},
      {[] { quantile_balancer(2, {.k = 3}); }, "quantile_balancer: k is 3, expected 1 to 2"},
      {[] { quantile_histogram(beyond, {}); },
       "quantile_histogram: experts is 1048577, expected 1 to 1048576"}};
  for (const auto& [call, message] : all) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(test::refusal(lambda({.ceiling = 0.0})) ==
        "moeroute::lambda_controller: ceiling is 0.000000, expected 0.000000 to " +
            std::to_string(1e300));
  // What is at the end of its range is in it.
  for (const auto& accepted : std::vector<std::function<void()>>{
           [] { bip_balancer(2, {.k = 2, .iterations = 0}); },
           [] { expert_thresholds(2, {.k = 2.0f, .ema = 1.0f}); },
           [] { quantile_histogram(2, {.buckets = 2}); },
           [] { annealing{.begin = 1, .end = 1}.check(); },
           [] { annealing{.from = -1.0, .to = 0.0}.check(); },
           [] { annealing{.from = 2.0, .shape = anneal_shape::exponential}.check(); },
           [] { bias_controller(2, {.step = 0.0f, .least_factor = 0.0f}); },
           [] { expert_thresholds(2, {.k = 1e-5f, .ema = 0.0f}); },
           [] { quantile_balancer(2, {.k = 2, .ema = 1.0f}); },
           [] { quantile_histogram(2, {.k = 2, .ema = 1.0f}); },
           [] { target_controller({.start = 0.0f, .step = 0.0f, .most = 0.0f}); },
           lambda({.start = 1.5e-300, .ceiling = 1.5e-300}),
           lambda({.ceiling = 1e300}),
           real({.k = 1, .target = 0.0f, .step = 0.0f}),
           lambda({.k = 0.0f, .start = 0.5, .factor = 1.0, .floor = 0.5, .ceiling = 0.5}),
           real({.experts = 2, .k = 2, .target = 2.0f}),
           layers({.layers = max_experts}),
           layers({.least = max_experts, .most = max_experts}),
           real({.experts = max_experts}),
           real({.experts = 2, .zero_experts = 3, .k = 5}),
           lambda({.experts = max_experts}),
           [] { bias_controller{max_experts}; },
           [] { bip_balancer(max_experts, {}); },
           [] { bip_online(max_experts, 1, 1); },
           [] { expert_thresholds(max_experts, {}); },
           [] { quantile_balancer(max_experts, {}); },
           [] { quantile_histogram(max_experts, {.buckets = 2}); }})
    CHECK(test::refusal(accepted) == "accepted");
}
