#include <moeroute/balance/loss_selected.hpp>

#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "support/assignments.hpp"
#include "support/gradient.hpp"
#include "support/losses.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using Catch::Approx;
using oracle::row;

namespace {

template <class Exec = serial>
double importance(const row& z, const assignment& a, const importance_loss& loss,
                  const token_options& how, row* gradient, const Exec& exec = {}) {
  workspace ws;
  row unused(z.size(), 0.0);
  row& out = gradient != nullptr ? *gradient : unused;
  return selected_importance_loss(loss, drop_stage::before_drop, how, a,
                                  matrix_view<const double>(z.data(), a.tokens(), a.experts()),
                                  matrix_view<double>(out.data(), a.tokens(), a.experts()), ws,
                                  exec);
}

}  // namespace

TEST_CASE("importance over the gates is CV^2 of their sums, and its gradient the derivative") {
  test::random rng(81);
  const assignment a = test::fixed_choices(rng, 80, 12, 3, 7);
  const auto b = test::random_batch(82, 80, 12, true);
  const token_options how{.mask = b.mask};
  for (const auto kind : {variance::population, variance::unbiased}) {
    const importance_loss loss{.coefficient = 0.5, .kind = kind};
    row sum(12, 0.0);
    for (index_t t = 0; t < 80; ++t) {
      if (!b.live(t)) continue;
      double all = 0.0;
      for (const expert_id e : a.ids(t))
        if (e != no_expert) all += std::exp(b.at(t, e));
      for (const expert_id e : a.ids(t))
        if (e != no_expert) sum[static_cast<std::size_t>(e)] += std::exp(b.at(t, e)) / all;
    }
    row one(b.logits.size()), three(b.logits.size());
    CHECK(importance(b.logits, a, loss, how, &one) ==
          Approx(0.5 * oracle::squared_variation(sum, kind == variance::unbiased, 1e-10))
              .epsilon(1e-12));
    CHECK(importance(b.logits, a, loss, how, &three, test::several_threads{3}) ==
          importance(b.logits, a, loss, how, nullptr));
    CHECK(one == three);
    CHECK(test::gradient_difference(b.logits, [&](const row& z, row* gradient) {
            return importance(z, a, loss, how, gradient);
          }) == "");
  }
}

TEST_CASE("StableMoE pushes overloaded experts down, underloaded up, and none at balance") {
  assignment a;
  a.reset(6, 3, 1);
  const auto assign = [&](std::initializer_list<expert_id> ids) {
    std::copy(ids.begin(), ids.end(), a.ids().begin());
  };
  const auto b = test::random_batch(83, 6, 3);
  row counts(3), gradient(18, 7.0);
  const auto run = [&](const row& z, row* out) {
    row unused(18);
    count_choices(a, {.basis = count_basis::first_choice}, std::span(counts));
    return stable_moe_loss(0.3, counts, drop_stage::before_drop, {}, a,
                           matrix_view<const double>(z.data(), 6, 3),
                           matrix_view<double>((out != nullptr ? *out : unused).data(), 6, 3));
  };
  assign({0, 1, 2, 2, 1, 0});
  CHECK(run(b.logits, &gradient) == 0.0);
  CHECK(gradient == row(18, 0.0));
  assign({0, 0, 0, 0, 1, 2});
  double expected = 0.0;
  for (index_t t = 0; t < 6; ++t) {
    const index_t e = a.ids(t)[0];
    expected += 0.3 * (e == 0 ? 1.0 : -0.5) / (1.0 + std::exp(-b.at(t, e)));
  }
  CHECK(run(b.logits, &gradient) == Approx(expected).epsilon(1e-12));
  for (std::size_t t = 0; t < 6; ++t)
    for (std::size_t e = 0; e < 3; ++e) {
      const bool chosen = a.ids(static_cast<index_t>(t))[0] == static_cast<expert_id>(e);
      const double g = gradient[t * 3 + e];
      if (chosen ? (e == 0 ? g <= 0.0 : g >= 0.0) : g != 0.0) FAIL(t << " " << e);
    }
  CHECK(test::gradient_difference(b.logits, run) == "");
}

TEST_CASE("NaN logits of chosen experts have no gate, and nothing chosen no gradient") {
  test::random rng(84);
  assignment a = test::fixed_choices(rng, 2, 4, 2);
  row z(8, std::nan("")), gradient(8, 7.0);
  CHECK(importance(z, a, {}, {}, &gradient) == 0.0);
  CHECK(gradient == row(8, 0.0));
  const row counts = {2, 0, 0, 0};
  CHECK(stable_moe_loss(1.0, counts, drop_stage::before_drop, {}, a,
                        matrix_view<const double>(z.data(), 2, 4),
                        matrix_view<double>(gradient.data(), 2, 4)) == 0.0);
  CHECK(test::refusal([&] { importance(z, a, {.coefficient = -1.0}, {}, nullptr); }) ==
        "moeroute::selected_importance_loss: coefficient is -1.000000, expected >= 0");
  a.ids()[1] = 4;
  CHECK(test::refusal([&] { importance(z, a, {}, {}, nullptr); }) ==
        "moeroute::selected_importance_loss: the id of choice 1 is 4, expected -1 to 3");
}

TEST_CASE("with every option at once losses of the selected are their formulas and derivatives") {
  test::random rng(85);
  for (int round = 0; round < 120; ++round) {
    const auto coin = [&] { return rng.below(2) == 0; };
    const index_t tokens = rng.below(90), experts = 1 + rng.below(20);
    const index_t k = 1 + rng.below(std::min<index_t>(3, experts));
    const auto E = static_cast<std::size_t>(experts);
    assignment a = coin() ? test::ragged_choices(rng, tokens, experts, k)
                          : test::fixed_choices(rng, tokens, experts, k, 5);
    test::drop_some(rng, a, 4);
    row z, before;
    std::vector<std::uint8_t> mask;
    bool many = false;  // of the token's logits are +inf: several of its choices, and not the last
    for (index_t i = 0; i < tokens * experts; ++i) {
      if (i % experts == 0) many = rng.below(8) == 0;
      const auto odd = rng.below(many ? 3 : 40);
      z.push_back(odd == 0   ? HUGE_VAL
                  : odd == 1 ? -HUGE_VAL
                  : odd == 2 ? std::nan("")
                             : 2.0 * static_cast<double>(rng.normal()));
      before.push_back(static_cast<double>(rng.normal()));
    }
    for (index_t t = 0; t < tokens; ++t)
      mask.push_back(static_cast<std::uint8_t>(2 * rng.below(4)));
    const auto to = static_cast<gradient_to>(rng.below(3));
    token_options how{.gradient = to};
    if (coin()) how.mask = mask;
    const drop_stage drops = coin() ? drop_stage::before_drop : drop_stage::after_drop;
    const double eps = coin() ? 1e-10 : 0.25;
    const importance_loss loss{
        .coefficient = 0.5, .kind = coin() ? variance::population : variance::unbiased, .eps = eps};
    // The choices that count, of each token, and of these who is the first of all.
    std::vector<std::vector<std::size_t>> counted(static_cast<std::size_t>(tokens));
    std::vector<bool> leads(counted.size(), false);
    for (std::size_t t = 0; t < counted.size(); ++t) {
      const auto token = static_cast<index_t>(t);
      if (how.masked(token)) continue;
      for (index_t r = 0; r < a.count(token); ++r) {
        const expert_id e = a.ids(token)[static_cast<std::size_t>(r)];
        if (e == no_expert) continue;
        if (drops == drop_stage::after_drop && !a.kept(a.first(token) + r)) continue;
        counted[t].push_back(static_cast<std::size_t>(e));
        leads[t] = leads[t] || r == 0;
      }
    }
    const auto shown = [&](row gradient, row written) {
      for (std::size_t i = 0; i < gradient.size(); ++i)
        written[i] = to == gradient_to::nowhere ? before[i]
                     : to == gradient_to::add   ? before[i] + gradient[i]
                                                : gradient[i];
      return written;
    };
    INFO("round " << round << " T=" << tokens << " E=" << experts << " k=" << k);

    std::vector<row> gate;
    row sum(E, 0.0);
    for (std::size_t t = 0; t < counted.size(); ++t) {
      row chosen;
      double top = -HUGE_VAL, all = 0.0;
      for (const std::size_t e : counted[t]) top = std::fmax(top, z[t * E + e]);
      for (const std::size_t e : counted[t]) {
        const double x = z[t * E + e];
        chosen.push_back(!(x > -HUGE_VAL) ? 0.0 : x == top ? 1.0 : std::exp(x - top));
        all += chosen.back();
      }
      for (double& g : chosen) g = all > 0.0 ? g / all : 0.0;
      for (std::size_t i = 0; i < chosen.size(); ++i) sum[counted[t][i]] += chosen[i];
      gate.push_back(chosen);
    }
    const bool unbiased = loss.kind == variance::unbiased;
    const double n = static_cast<double>(experts), d = unbiased ? n - 1.0 : n;
    double mean = 0.0, value = 0.0;
    for (const double x : sum) mean += x / n;
    const double m = mean * mean + eps;
    if (d > 0.0) value = 0.5 * oracle::squared_variation(sum, unbiased, eps);
    row slope(E, 0.0), gradient(z.size(), 0.0);
    for (std::size_t e = 0; e < E && d > 0.0; ++e)
      slope[e] = 0.5 * 2.0 * (sum[e] - mean) / (d * m) - value * 2.0 * mean / (n * m);
    for (std::size_t t = 0; t < counted.size(); ++t) {
      double along = 0.0;
      bool finite = true;
      for (std::size_t i = 0; i < gate[t].size(); ++i) {
        along += gate[t][i] * slope[counted[t][i]];
        finite = finite && z[t * E + counted[t][i]] != HUGE_VAL;
      }
      for (std::size_t i = 0; i < gate[t].size() && finite; ++i)
        gradient[t * E + counted[t][i]] += gate[t][i] * (slope[counted[t][i]] - along);
    }
    workspace ws;
    const matrix_view<const double> logits(z.data(), tokens, experts);
    row out = before;
    const matrix_view<double> dz(out.data(), tokens, experts);
    const double found =
        coin() ? selected_importance_loss(loss, drops, how, a, logits, dz, ws, serial{})
               : selected_importance_loss(loss, drops, how, a, logits, dz, ws,
                                          test::several_threads{3});
    CHECK(found == Approx(value).epsilon(1e-11).margin(1e-13));
    CHECK(test::difference(out, shown(gradient, out), 1e-9, 1e-12) == "");

    // StableMoE's, with any counts.
    row counts;
    double even = 0.0, expected = 0.0;
    const bool nobody = rng.below(6) == 0;
    for (std::size_t e = 0; e < E; ++e) {
      counts.push_back(nobody ? 0.0 : static_cast<double>(rng.below(5)));
      even += counts.back() / n;
    }
    std::fill(gradient.begin(), gradient.end(), 0.0);
    for (std::size_t t = 0; t < counted.size() && even > 0.0; ++t) {
      if (!leads[t] || std::isnan(z[t * E + counted[t][0]])) continue;
      const std::size_t e = counted[t][0];
      const double s = 1.0 / (1.0 + std::exp(-z[t * E + e]));
      const double excess = 0.3 * (counts[e] - even) / even;
      expected += excess * s;
      gradient[t * E + e] = excess * s * (1.0 - s);
    }
    out = before;
    CHECK(stable_moe_loss(0.3, counts, drops, how, a, logits, dz) ==
          Approx(expected).epsilon(1e-11).margin(1e-12));
    CHECK(test::difference(out, shown(gradient, out), 1e-9, 1e-12) == "");
  }
}
