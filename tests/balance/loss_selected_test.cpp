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
