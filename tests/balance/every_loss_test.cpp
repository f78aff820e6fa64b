// What holds for every loss and every controller that takes rows: wherever these lie, and whatever
// masked tokens say.
#include <moeroute/balance/loss.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
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
#include <string>
#include <vector>

#include "support/assignments.hpp"
#include "support/compare.hpp"
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
      const std::string broken = test::differs_by_stride([&](test::layout& l) {
        const auto z = l.in(in.logits, in.tokens, in.experts);
        const auto dz = l.in_out(in.before, in.tokens, in.experts);
        workspace ws;
        // Who wants no gradient need not have a place for it.
        const matrix_view<float> none{};
        l.result(call(in, z, to == gradient_to::nowhere ? none : dz, ws, l));
      });
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
  for (const index_t experts : {9, 32})
    CHECK(test::differs_by_stride([&](test::layout& l) {
            const inputs in(40, experts, gradient_to::nowhere);
            const auto scores = l.in(in.logits, 40, experts);
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
