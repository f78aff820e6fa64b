#include <moeroute/stage/policy_gradient.hpp>
#include <moeroute/stage/retained_inputs.hpp>
#include <moeroute/stage/router_target.hpp>
//
#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "support/allocations.hpp"
#include "support/gradient.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;
using Catch::Approx;
using doubles = oracle::row;

namespace {

doubles normals(std::uint64_t seed, index_t n) {
  test::random rng(seed);
  doubles x;
  for (index_t i = 0; i < n; ++i) x.push_back(static_cast<double>(rng.normal()));
  return x;
}
template <class T>
matrix_view<const T> read_rows(const std::vector<T>& x, index_t n) {
  return {x.data(), n, static_cast<index_t>(x.size()) / n};
}
template <class T>
matrix_view<T> into(std::vector<T>& x, index_t n) {
  return {x.data(), n, static_cast<index_t>(x.size()) / n};
}

doubles softmax_of(const doubles& z) {
  doubles p(z);
  double sum = 0.0;
  for (double& v : p) sum += v = std::exp(v);
  for (double& v : p) v /= sum;
  return p;
}

assignment draws_of(index_t tokens, index_t experts, index_t k, std::vector<expert_id> ids) {
  assignment a;
  a.reset(tokens, experts, k);
  std::copy(ids.begin(), ids.end(), a.ids().begin());
  return a;
}

constexpr index_t T = 5, E = 6;

// The loss of z towards q and, where there is room, its gradient.
double distill(const distillation_options& how, const doubles& z, const doubles& q, doubles* dz) {
  workspace ws;
  distillation_options o = how;
  doubles unused(z.size());
  if (dz == nullptr) o.gradient = gradient_to::nowhere;
  return router_distillation<double>(o, read_rows(z, T), read_rows(q, T),
                                     into(dz != nullptr ? *dz : unused, T), ws);
}

}  // namespace

TEST_CASE("distillation is its formula, and its gradient the derivative") {
  const doubles z = normals(1, T * E);
  doubles q;
  for (index_t t = 0; t < T; ++t) {
    const doubles p = softmax_of(normals(10 + static_cast<std::uint64_t>(t), E));
    q.insert(q.end(), p.begin(), p.end());
  }
  const std::vector<std::uint8_t> mask{1, 0, 1, 1, 1};
  for (const auto distance : {target_distance::cross_entropy, target_distance::squares})
    for (const double temperature : {1.0, 2.5})
      for (const bool masked : {false, true}) {
        distillation_options how{distance, 0.7, temperature};
        if (masked) how.mask = mask;
        double expected = 0.0;
        for (index_t t = 0; t < T; ++t) {
          if (masked && mask[static_cast<std::size_t>(t)] == 0) continue;
          doubles own;
          for (index_t e = 0; e < E; ++e)
            own.push_back(z[static_cast<std::size_t>(t * E + e)] / temperature);
          const doubles p = softmax_of(own);
          for (std::size_t e = 0; e < p.size(); ++e) {
            const double target = q[static_cast<std::size_t>(t * E) + e];
            expected += distance == target_distance::squares ? (p[e] - target) * (p[e] - target)
                                                             : -target * std::log(p[e]);
          }
        }
        CHECK(distill(how, z, q, nullptr) == Approx(0.7 * expected / (masked ? 4 : 5)));
        CHECK(test::gradient_difference(
                  z, [&](const doubles& x, doubles* g) { return distill(how, x, q, g); }) == "");
      }
}

TEST_CASE("a step against its gradient brings a router nearer, and at the target nothing pulls") {
  doubles z = normals(1, T * E), q, dz(z.size());
  for (index_t t = 0; t < T; ++t) {
    const doubles p = softmax_of(normals(10 + static_cast<std::uint64_t>(t), E));
    q.insert(q.end(), p.begin(), p.end());
  }
  for (const auto distance : {target_distance::cross_entropy, target_distance::squares}) {
    const double before = distill({distance}, z, q, &dz);
    doubles moved(z);
    for (std::size_t i = 0; i < z.size(); ++i) moved[i] -= 0.1 * dz[i];
    CHECK(distill({distance}, moved, q, nullptr) < before);
    doubles log_q(q);
    for (double& v : log_q) v = std::log(v);
    distill({distance}, log_q, q, &dz);
    for (const double g : dz) CHECK(std::abs(g) < 1e-15);
  }
}

TEST_CASE("towards another router's first choices a target is one there; float is double") {
  const doubles z = normals(3, T * E);
  const assignment chosen = draws_of(T, E, 2, {0, 1, 5, 2, 3, 4, -1, 0, 2, 1});
  doubles q(z.size(), 0.0), dz(z.size(), 1.0), expected(z.size(), 1.0);
  for (index_t t = 0; t < T; ++t)
    if (chosen.ids(t)[0] >= 0) q[static_cast<std::size_t>(t * E + chosen.ids(t)[0])] = 1.0;
  workspace ws;
  const distillation_options adds{.gradient = gradient_to::add};
  const double value = router_distillation<double>(adds, read_rows(z, T), chosen, into(dz, T), ws);
  CHECK(value == Approx(router_distillation<double>(adds, read_rows(z, T), read_rows(q, T),
                                                    into(expected, T), ws)));
  CHECK(test::difference(dz, expected, 1e-14, 1e-14) == "");

  const std::vector<float> narrow(z.begin(), z.end()), target(q.begin(), q.end());
  std::vector<float> slope(z.size(), 1.0f);
  CHECK(router_distillation<float>(adds, read_rows(narrow, T), read_rows(target, T), into(slope, T),
                                   ws) == Approx(value).epsilon(1e-5));
  CHECK(test::difference(slope, expected, 1e-6, 1e-6) == "");
}

TEST_CASE("a logit that is no number is an expert that is not there, whatever its target") {
  doubles z = normals(1, T * E), absent(z), dz(z.size()), expected(z.size());
  const doubles q(z.size(), 1.0 / static_cast<double>(E));
  for (const std::size_t i : {3u, 13u}) {
    z[i] = std::numeric_limits<double>::quiet_NaN();
    absent[i] = -std::numeric_limits<double>::infinity();
  }
  for (const auto distance : {target_distance::cross_entropy, target_distance::squares}) {
    CHECK(distill({distance}, z, q, &dz) == distill({distance}, absent, q, &expected));
    CHECK(dz == expected);
    CHECK(dz[3] == 0.0);
    CHECK(dz[2] != 0.0);
  }
}

TEST_CASE("a row without a finite softmax is no token of a distillation") {
  doubles z = normals(1, T * E), q(z.size(), 1.0 / static_cast<double>(E)), dz(z.size(), 7.0);
  const double top = std::numeric_limits<double>::infinity();
  for (std::size_t i = 0; i < z.size(); ++i)
    if (i / E == 1) z[i] = -top;
  doubles absent(z), expected(z.size());
  z[2 * E + 3] = top;
  for (std::size_t e = 0; e < E; ++e) absent[2 * E + e] = -top;
  for (const auto distance : {target_distance::cross_entropy, target_distance::squares}) {
    CHECK(distill({distance}, z, q, &dz) == distill({distance}, absent, q, &expected));
    CHECK(dz == expected);
    CHECK(std::isfinite(distill({distance}, z, q, nullptr)));
  }
}

TEST_CASE("neighbours pull at one another as the graph's Laplacian says") {
  const index_t n = 4, width = 3, m = 2;
  const doubles r = normals(5, n * width), w{0.5, 0.2, 0.1, 0.7, 0.3, 0.4, 0.9, 0.6};
  const std::vector<std::int32_t> neighbour{1, 2, 0, 3, -1, 1, 2, 0};
  const auto value = [&](neighbour_gradient moves, const doubles& x, doubles* g) {
    doubles unused(x.size());
    return neighbour_loss<double>(0.3, moves, read_rows(x, n), neighbour, read_rows(w, n),
                                  g == nullptr ? gradient_to::nowhere : gradient_to::write,
                                  into(g == nullptr ? unused : *g, n));
  };
  // 2 eta tr(r^T L r) with L = D - A of the symmetrised weights, halved once for both directions.
  doubles laplacian(16, 0.0);
  for (index_t i = 0; i < n; ++i)
    for (index_t k = 0; k < m; ++k) {
      const std::int32_t j = neighbour[static_cast<std::size_t>(i * m + k)];
      if (j < 0) continue;
      const double weight = w[static_cast<std::size_t>(i * m + k)];
      laplacian[static_cast<std::size_t>(i * n + i)] += weight;
      laplacian[static_cast<std::size_t>(j * n + j)] += weight;
      laplacian[static_cast<std::size_t>(i * n + j)] -= weight;
      laplacian[static_cast<std::size_t>(j * n + i)] -= weight;
    }
  double form = 0.0;
  for (index_t i = 0; i < n; ++i)
    for (index_t j = 0; j < n; ++j)
      for (index_t c = 0; c < width; ++c)
        form += laplacian[static_cast<std::size_t>(i * n + j)] *
                r[static_cast<std::size_t>(i * width + c)] *
                r[static_cast<std::size_t>(j * width + c)];
  CHECK(value(neighbour_gradient::both, r, nullptr) == Approx(0.3 * form));
  CHECK(test::gradient_difference(r, [&](const doubles& x, doubles* g) {
          return value(neighbour_gradient::both, x, g);
        }) == "");
  // Constant neighbours: the derivative where only one row moves as itself.
  doubles g(r.size());
  value(neighbour_gradient::constant, r, &g);
  for (index_t c = 0; c < width; ++c) {
    const auto at = [&](index_t i) { return r[static_cast<std::size_t>(i * width + c)]; };
    CHECK(g[static_cast<std::size_t>(2 * width + c)] == Approx(2.0 * 0.3 * w[5] * (at(2) - at(1))));
  }
}

namespace {

// Every ordered draw of k out of n experts, and its probability under softmax(z).
struct draw {
  std::vector<expert_id> ids;
  double probability;
};
std::vector<draw> all_draws(const doubles& z, index_t k) {
  std::vector<draw> list{{{}, 1.0}};
  for (index_t r = 0; r < k; ++r) {
    std::vector<draw> longer;
    for (const draw& d : list) {
      double left = 0.0;
      const auto drawn = [&](index_t e) {
        return std::find(d.ids.begin(), d.ids.end(), static_cast<expert_id>(e)) != d.ids.end();
      };
      for (index_t e = 0; e < static_cast<index_t>(z.size()); ++e)
        if (!drawn(e)) left += std::exp(z[static_cast<std::size_t>(e)]);
      for (index_t e = 0; e < static_cast<index_t>(z.size()); ++e) {
        if (drawn(e)) continue;
        draw next = d;
        next.ids.push_back(static_cast<expert_id>(e));
        next.probability *= std::exp(z[static_cast<std::size_t>(e)]) / left;
        longer.push_back(std::move(next));
      }
    }
    list = std::move(longer);
  }
  return list;
}
// A reward that depends on the set, as the output of a mixture with equal weights does.
double reward(const draw& d) {
  constexpr double worth[] = {0.3, -1.2, 2.0, 0.7};
  double sum = 0.0;
  for (const expert_id e : d.ids) sum += worth[e];
  return sum * sum / static_cast<double>(d.ids.size());
}
double expected_reward(const doubles& z, index_t k) {
  double sum = 0.0;
  for (const draw& d : all_draws(z, k)) sum += d.probability * reward(d);
  return sum;
}

}  // namespace

TEST_CASE("draws with and without putting back: the policy gradient is that of the mean reward") {
  const doubles z{0.2, -0.4, 0.9, 0.1};
  workspace ws;
  for (const index_t k : {1, 2, 3}) {  // RL-R, ReMix
    INFO("k " << k);
    doubles mean(z.size(), 0.0), with_others(z.size(), 0.0), dz(z.size());
    const auto list = all_draws(z, k);
    const auto pull = [&](const draw& d, double advantage) {
      doubles log_pi(1);
      const doubles a{advantage};
      const double value = policy_gradient<double>(read_rows(z, 1), draws_of(1, 4, k, d.ids), a,
                                                   gradient_to::write, into(dz, 1), ws, log_pi);
      CHECK(log_pi[0] == Approx(std::log(d.probability)));
      CHECK(value == Approx(-advantage * std::log(d.probability)));
    };
    for (const draw& d : list) {
      pull(d, reward(d));
      for (std::size_t e = 0; e < z.size(); ++e) mean[e] -= d.probability * dz[e];
    }
    const doubles slope =
        oracle::derivative(z, [&](const doubles& x) { return expected_reward(x, k); });
    CHECK(test::difference(mean, slope, 1e-8, 1e-9) == "");

    // Two draws, each with the other's reward as its baseline: the mean over all pairs.
    for (const draw& one : list)
      for (const draw& two : list) {
        doubles a(2);
        leave_one_out<double>(2, doubles{reward(one), reward(two)}, std::span<double>(a));
        for (const auto& [d, advantage] : {std::pair{one, a[0]}, std::pair{two, a[1]}}) {
          pull(d, advantage);
          for (std::size_t e = 0; e < z.size(); ++e)
            with_others[e] -= one.probability * two.probability * dz[e] / 2.0;
        }
      }
    CHECK(test::difference(with_others, slope, 1e-8, 1e-9) == "");
  }
}

TEST_CASE("advantages of a token sum to 0, and are its rewards' distances from the others'") {
  const doubles r{1.0, 5.0, 2.0, 7.0, 6.0, 0.0};  // three draws of two tokens
  doubles a(6);
  leave_one_out<double>(3, r, std::span<double>(a));
  CHECK(a[0] == Approx(1.0 - 4.0));
  CHECK(a[2] == Approx(2.0 - 3.5));
  CHECK(a[0] + a[2] + a[4] == Approx(0.0).margin(1e-15));
  CHECK(a[1] == Approx(5.0 - 3.5));
}

TEST_CASE("policy gradients are added, end with a token's draws, and NaN stays in its row") {
  const doubles z = normals(7, 3 * E);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  doubles dz(z.size(), 1.0);
  workspace ws;
  policy_gradient<double>(read_rows(z, 3), draws_of(3, E, 2, {1, 2, -1, 3, 0, -1}),
                          doubles{nan, 1.0, 2.0}, gradient_to::add, into(dz, 3), ws);
  for (index_t e = 0; e < E; ++e) {
    CHECK(std::isnan(dz[static_cast<std::size_t>(e)]));
    CHECK(dz[static_cast<std::size_t>(E + e)] == 1.0);
    const doubles p = softmax_of(doubles(z.end() - E, z.end()));
    CHECK(dz[static_cast<std::size_t>(2 * E + e)] ==
          Approx(1.0 - 2.0 / 3.0 * ((e == 0 ? 1.0 : 0.0) - p[static_cast<std::size_t>(e)])));
  }
}

TEST_CASE("a token without an advantage takes no part in a policy gradient, whatever it drew") {
  doubles z = normals(8, 2 * E), dz(z.size(), 3.0), alone(z.size(), 3.0);
  z[1] = -HUGE_VAL;
  z[2] = HUGE_VAL;
  workspace ws;
  const auto of = [&](double advantage, doubles& to) {
    return policy_gradient<double>(read_rows(z, 2), draws_of(2, E, 1, {1, 4}),
                                   doubles{0.0, advantage}, gradient_to::add, into(to, 2), ws);
  };
  dz[3] = dz[E] = -0.0;
  CHECK(of(0.0, dz) == 0.0);
  CHECK((std::signbit(dz[3]) && std::signbit(dz[E])));
  dz[3] = dz[E] = 3.0;
  CHECK(dz == doubles(z.size(), 3.0));
  CHECK(std::isfinite(of(1.0, dz)));
  CHECK(std::equal(dz.begin(), dz.begin() + E, alone.begin()));
  // A logit of -inf has no gradient, though it was drawn.
  dz[E + 4] = 3.0;
  z[E + 4] = -HUGE_VAL;
  CHECK(of(1.0, dz) == HUGE_VAL);
  CHECK(dz[E + 4] == 3.0);
}

TEST_CASE("a router's shift is the mean over the experts that a token has; without one it is 0") {
  const doubles old_z = normals(1, T * E), new_z = normals(2, T * E);
  const std::vector<expert_id> ids{0, -1, 5, 2, -1, 4, -1, -1, 2, 1};
  const assignment chosen = draws_of(T, E, 2, ids);
  doubles shift(T, 0.0), expected(T, 0.0);
  workspace ws;
  add_router_shift<double>(read_rows(new_z, T), read_rows(old_z, T), chosen,
                           std::span<double>(shift), ws);
  for (index_t t = 0; t < T; ++t) {
    const auto at = [&](const doubles& z, expert_id e) {
      return std::log(softmax_of(
          doubles(z.begin() + t * E, z.begin() + (t + 1) * E))[static_cast<std::size_t>(e)]);
    };
    double sum = 0.0, n = 0.0;
    for (const expert_id e : chosen.ids(t)) {
      if (e < 0) continue;
      sum += std::abs(at(new_z, e) - at(old_z, e));
      n += 1.0;
    }
    if (n > 0.0) expected[static_cast<std::size_t>(t)] = sum / n;
  }
  CHECK(test::difference(shift, expected, 1e-12) == "");
  // It is added to what there is, layer by layer.
  add_router_shift<double>(read_rows(new_z, T), read_rows(old_z, T), chosen,
                           std::span<double>(shift), ws);
  for (double& s : expected) s *= 2.0;
  CHECK(test::difference(shift, expected, 1e-12) == "");
}

TEST_CASE("a router's shift is 1 where nothing moved, in (0, 1] elsewhere, and its formula") {
  const doubles old_z = normals(1, T * E), new_z = normals(2, T * E);
  const assignment chosen = draws_of(T, E, 2, {0, 1, 5, 2, 3, 4, 2, 0, 2, 1});
  doubles shift(T, 0.0), ratio(T);
  workspace ws;
  add_router_shift<double>(read_rows(old_z, T), read_rows(old_z, T), chosen,
                           std::span<double>(shift), ws);
  router_shift_ratio<double>(shift, 1, 0.0, std::span<double>(ratio));
  for (const double g : ratio) CHECK(g == 1.0);
  // A layer that moved and one that did not.
  add_router_shift<double>(read_rows(new_z, T), read_rows(old_z, T), chosen,
                           std::span<double>(shift), ws);
  router_shift_ratio<double>(shift, 2, 0.0, std::span<double>(ratio));
  for (index_t t = 0; t < T; ++t) {
    const auto at = [&](const doubles& z) {
      return softmax_of(doubles(z.begin() + t * E, z.begin() + (t + 1) * E));
    };
    const doubles p = at(old_z), q = at(new_z);
    double sum = 0.0;
    for (const expert_id e : chosen.ids(t))
      sum += std::abs(std::log(q[static_cast<std::size_t>(e)] / p[static_cast<std::size_t>(e)]));
    const double g = ratio[static_cast<std::size_t>(t)];
    CHECK(g == Approx(std::exp(-sum / 2.0 / 2.0)));
    CHECK((g > 0.0 && g < 1.0));
  }
  router_shift_ratio<double>(shift, 2, 0.9, std::span<double>(shift));
  for (std::size_t t = 0; t < shift.size(); ++t) CHECK(shift[t] == std::max(ratio[t], 0.9));
  // An expert that neither router gives a probability has not moved; one that one of them does has.
  doubles none = old_z;
  none[0] = -INFINITY;
  std::fill(shift.begin(), shift.end(), 0.0);
  add_router_shift<double>(read_rows(none, T), read_rows(none, T), chosen, std::span<double>(shift),
                           ws);
  for (const double s : shift) CHECK(s == 0.0);
  add_router_shift<double>(read_rows(none, T), read_rows(old_z, T), chosen,
                           std::span<double>(shift), ws);
  CHECK(shift[0] == INFINITY);
}

TEST_CASE("a projected update leaves the logits of what is retained, and moves the others") {
  const index_t d = 16, n = 12;
  const doubles x = normals(3, n * d);
  std::vector<float> states(x.begin(), x.end()), delta(E * d), before;
  for (index_t i = 0; i < E * d; ++i)
    delta[static_cast<std::size_t>(i)] =
        static_cast<float>(normals(4, E * d)[static_cast<std::size_t>(i)]);
  before = delta;
  retained_inputs all(d, d);
  for (index_t t = 0; t < 5; ++t) CHECK(all.retain(read_rows(states, n).middle_rows(t, 1)));
  CHECK_FALSE(all.retain(read_rows(states, n).middle_rows(2, 1)));  // spanned
  CHECK(all.rank() == 5);
  all.project(into(delta, E));
  const auto logit = [&](const std::vector<float>& rows_of, index_t t, index_t e) {
    double sum = 0.0;
    for (index_t c = 0; c < d; ++c)
      sum += x[static_cast<std::size_t>(t * d + c)] *
             static_cast<double>(rows_of[static_cast<std::size_t>(e * d + c)]);
    return sum;
  };
  for (index_t e = 0; e < E; ++e) {
    for (index_t t = 0; t < 5; ++t) CHECK(std::abs(logit(delta, t, e)) < 1e-5);
    CHECK(std::abs(logit(delta, 9, e)) > 1e-3);
  }
  // Once more changes nothing.
  const auto once = delta;
  all.project(into(delta, E));
  CHECK(test::difference(delta, doubles(once.begin(), once.end()), 1e-5, 1e-6) == "");

  // One expert's own states, the others' row untouched.
  delta = before;
  std::vector<expert_id> ids;
  for (index_t t = 0; t < n; ++t) ids.push_back(static_cast<expert_id>(t % 3));
  retained_inputs of_one(d, d);
  of_one.retain_choices(read_rows(states, n), draws_of(n, E, 1, ids), 1);
  CHECK(of_one.rank() == 4);
  of_one.project(into(delta, E).middle_rows(1, 1));
  for (index_t t = 0; t < n; ++t) {
    CHECK((std::abs(logit(delta, t, 1)) < 1e-5) == (t % 3 == 1));
    CHECK(logit(delta, t, 2) == logit(before, t, 2));
  }
  retained_inputs of_first(d, 4);  // the first token's, and room for no more
  of_first.retain_choices(read_rows(states, n), draws_of(n, E, 1, ids), 0);
  CHECK(of_first.rank() == 4);
  delta = before;
  of_first.project(into(delta, E));
  for (index_t t = 0; t < n; ++t) CHECK((std::abs(logit(delta, t, 1)) < 1e-5) == (t % 3 == 0));
  // All directions: nothing moves.
  const test::forbidden_memory around(test::guarded_end::back);
  retained_inputs full(d, d);
  for (index_t t = 0; t < d; ++t) {
    std::vector<float> unit(static_cast<std::size_t>(d), 0.0f);
    unit[static_cast<std::size_t>(t)] = 2.0f;
    full.retain(read_rows(unit, 1));
  }
  full.project(into(delta, E));
  for (const float v : delta) CHECK(std::abs(v) < 1e-6f);
}

TEST_CASE("a state is a direction of its own where the square of its rest is above the tolerance") {
  for (const double tolerance : {1e-4, 1e-2, 0.25}) {
    INFO(tolerance);
    retained_inputs kept(2, 2);
    const auto retain = [&](double square) {
      const std::vector<float> state{1.0f, static_cast<float>(std::sqrt(square))};
      return kept.retain(read_rows(state, 1), tolerance);
    };
    CHECK(retain(0.0));
    CHECK_FALSE(retain(0.8 * tolerance));
    CHECK(kept.rank() == 1);
    CHECK(retain(1.25 * tolerance));
  }
  // States that differ by little are spanned as well as others.
  retained_inputs like(3, 3);
  std::vector<float> pair{1e6f, 1e6f, 1e6f, 1e6f + 0.0625f, 1e6f, 1e6f};
  CHECK(like.retain(read_rows(pair, 2).middle_rows(0, 1), 0.0));
  CHECK(like.retain(read_rows(pair, 2).middle_rows(1, 1), 1e-6));
  doubles moved{1.0, 2.0, 4.0};
  like.project(into(moved, 1));
  for (std::size_t i = 0; i < 6; i += 3) {
    double logit = 0.0;
    for (std::size_t c = 0; c < 3; ++c) logit += moved[c] * static_cast<double>(pair[i + c]);
    CHECK(std::abs(logit) < 1e-6);
  }
  // What has no length is no direction.
  for (const float length : {HUGE_VALF, std::nanf("")}) {
    retained_inputs kept(2, 2);
    const std::vector<float> state{1.0f, length};
    CHECK_FALSE(kept.retain(read_rows(state, 1)));
    CHECK(kept.rank() == 0);
  }
}

TEST_CASE("arguments of the router's training terms are refused by name") {
  doubles z(T * E), dz(T * E), other(T * E + E), a(T);
  workspace ws;
  const assignment chosen = draws_of(T, E, 1, {0, 1, 2, 3, 6});
  CHECK(test::refusal([&] { distill({.temperature = 0.0}, z, z, nullptr); }) ==
        "moeroute::router_distillation: temperature is 0.000000, expected > 0");
  CHECK(test::refusal([&] {
          router_distillation<double>({}, read_rows(z, T), read_rows(z, T), into(z, T), ws);
        }) ==
        "moeroute::router_distillation: logits and dlogits overlap, expected memory "
        "of their own");
  CHECK(test::refusal([&] {
          router_distillation<double>({}, read_rows(z, T), read_rows(dz, T), into(dz, T), ws);
        }) ==
        "moeroute::router_distillation: target and dlogits overlap, expected memory of their own");
  CHECK(test::refusal([&] {
          router_distillation<double>({}, read_rows(z, T), read_rows(other, T + 1), into(dz, T),
                                      ws);
        }) == "moeroute::router_distillation: target.rows is 6, expected 5");
  CHECK(test::refusal([&] {
          router_distillation<double>({}, read_rows(z, T), chosen, into(dz, T), ws);
        }) == "moeroute::router_distillation: an id is 6, expected -1 to 5");
  CHECK(test::refusal([&] {
          policy_gradient<double>(read_rows(z, T), chosen, a, gradient_to::write, into(dz, T), ws);
        }) == "moeroute::policy_gradient: an id is 6, expected -1 to 5");
  CHECK(test::refusal([&] {
          policy_gradient<double>(read_rows(z, T), chosen, doubles(3), gradient_to::write,
                                  into(dz, T), ws);
        }) == "moeroute::policy_gradient: advantage.size() is 3, expected 5");
  // Of fewer tokens than there are, too, where that is what the whole is said to have.
  const doubles pulls(T, 1.0);
  const assignment each = draws_of(T, E, 1, {0, 1, 2, 3, 4});
  const auto value = [&](double whole) {
    return policy_gradient<double>(read_rows(z, T), each, pulls, gradient_to::nowhere, {}, ws, {},
                                   whole);
  };
  CHECK(value(0.0) > 0.0);
  CHECK(value(0.0) == value(static_cast<double>(T)));
  CHECK(value(1.0) == Approx(value(0.0) * static_cast<double>(T)));
  CHECK(value(0.5) == Approx(value(1.0) * 2.0));
  assignment falls;
  falls.reset_ragged(T, E, 1);
  std::fill_n(falls.to_fill().offsets, T + 1, 0);
  falls.close();
  falls.to_fill().offsets[T] = 99;
  const std::string not_there =
      ": token 4 has the choices from 0 to 99, expected 0 to k = 1 of them, from 0 on";
  CHECK(test::refusal([&] {
          policy_gradient<double>(read_rows(z, T), falls, a, gradient_to::write, into(dz, T), ws);
        }) == "moeroute::policy_gradient" + not_there);
  CHECK(test::refusal([&] {
          add_router_shift<double>(read_rows(z, T), read_rows(z, T), falls, std::span<double>(a),
                                   ws);
        }) == "moeroute::add_router_shift" + not_there);
  CHECK(test::refusal([&] { router_shift_ratio<double>(a, 1, -0.5, std::span<double>(a)); }) ==
        "moeroute::router_shift_ratio: least is -0.500000, expected 0 to 1");
  CHECK(test::refusal([&] { leave_one_out<double>(1, a, std::span<double>(a)); }) ==
        "moeroute::leave_one_out: samples is 1, expected 2 to 1099511627776");
  CHECK(test::refusal([&] { router_shift_ratio<double>(a, 1, 1.5, std::span<double>(a)); }) ==
        "moeroute::router_shift_ratio: least is 1.500000, expected 0 to 1");
  CHECK(test::refusal([&] {
          add_router_shift<double>(read_rows(z, T), read_rows(other, T + 1), chosen,
                                   std::span<double>(a), ws);
        }) == "moeroute::add_router_shift: old_logits.rows is 6, expected 5");
  CHECK(test::refusal([&] {
          neighbour_loss<double>(1.0, neighbour_gradient::both, read_rows(z, T),
                                 std::vector<std::int32_t>{0, 1, 2, 3, 5}, read_rows(a, T),
                                 gradient_to::write, into(dz, T));
        }) == "moeroute::neighbour_loss: a neighbour is 5, expected -1 to 4");
  retained_inputs kept(2, 1);
  const doubles unit{1.0, 0.0};
  CHECK(test::refusal([&] {
          kept.retain(matrix_view<const float>(std::vector<float>{1.0f, 0.0f}.data(), 1, 2));
          kept.retain(matrix_view<const float>(std::vector<float>{0.0f, 1.0f}.data(), 1, 2));
        }) == "moeroute::retained_inputs: rank is 1, expected room for another direction");
  CHECK(test::refusal([&] { kept.project(into(z, T)); }) ==
        "moeroute::retained_inputs: delta.cols is 6, expected 2");
}

TEST_CASE("every size of the router's training terms is refused by its own name") {
  doubles z(T * E), wide(T * (E + 1)), more(T * E + E), dz(T * E), a(T), few(T - 1);
  workspace ws;
  const assignment good = draws_of(T, E, 1, {0, 1, 2, 3, 4}),
                   longer = draws_of(T + 1, E, 1, {0, 1, 2, 3, 4, 5}),
                   wider = draws_of(T, E + 1, 1, {0, 1, 2, 3, 4});
  const auto drawn = [&](const assignment& d, std::span<double> log_probability = {}) {
    return [&, log_probability] {
      policy_gradient<double>(read_rows(z, T), d, a, gradient_to::write, into(dz, T), ws,
                              log_probability);
    };
  };
  const auto gradient = [&](matrix_view<double> to) {
    return
        [&, to] { policy_gradient<double>(read_rows(z, T), good, a, gradient_to::write, to, ws); };
  };
  const auto shifted = [&](matrix_view<const double> now, matrix_view<const double> then,
                           const assignment& choices, std::span<double> shift) {
    return [&ws, now, then, &choices, shift] {
      add_router_shift<double>(now, then, choices, shift, ws);
    };
  };
  const auto taught = [&](matrix_view<const double> target, matrix_view<double> to) {
    return [&, target, to] { router_distillation<double>({}, read_rows(z, T), target, to, ws); };
  };
  const auto assigned = [&](const assignment& target, const distillation_options& how = {}) {
    return [&, how] { router_distillation<double>(how, read_rows(z, T), target, into(dz, T), ws); };
  };
  const auto near_by = [&](index_t n, matrix_view<const double> weight, matrix_view<double> to) {
    return [&, n, weight, to] {
      neighbour_loss<double>(1.0, neighbour_gradient::both, read_rows(z, T),
                             std::vector<std::int32_t>(static_cast<std::size_t>(n), -1), weight,
                             gradient_to::write, to);
    };
  };
  const auto tight = [](doubles& v) { return matrix_view<double>(v.data(), T, E, E - 1); };
  const std::string own = " overlap, expected memory of their own";
  const test::refusals refused{
      {drawn(longer), "policy_gradient: draws.tokens() is 6, expected 5"},
      {drawn(wider), "policy_gradient: draws.experts() is 7, expected 6"},
      {drawn(good, few), "policy_gradient: log_probability.size() is 4, expected 5"},
      {gradient(into(more, T + 1)), "policy_gradient: dlogits.rows is 6, expected 5"},
      {gradient(into(wide, T)), "policy_gradient: dlogits.cols is 7, expected 6"},
      {gradient(tight(dz)), "policy_gradient: dlogits.stride is 5, expected at least 6"},
      {gradient(into(z, T)), "policy_gradient: logits and dlogits" + own},
      {[&] {
         policy_gradient<double>(matrix_view<const double>(z.data(), T, E, E - 1), good, a,
                                 gradient_to::nowhere, {}, ws);
       },
       "policy_gradient: logits.stride is 5, expected at least 6"},
      {[&] { leave_one_out<double>(2, a, std::span<double>(a)); },
       "leave_one_out: reward.size() % samples is 1, expected 0"},
      {[&] { leave_one_out<double>(5, a, std::span<double>(few)); },
       "leave_one_out: advantage.size() is 4, expected 5"},
      {shifted(read_rows(z, T), read_rows(wide, T), good, a),
       "add_router_shift: old_logits.cols is 7, expected 6"},
      {shifted(tight(z), read_rows(z, T), good, a),
       "add_router_shift: new_logits.stride is 5, expected at least 6"},
      {shifted(read_rows(z, T), tight(z), good, a),
       "add_router_shift: old_logits.stride is 5, expected at least 6"},
      {shifted(read_rows(z, T), read_rows(z, T), longer, a),
       "add_router_shift: old_choices.tokens() is 6, expected 5"},
      {shifted(read_rows(z, T), read_rows(z, T), wider, a),
       "add_router_shift: old_choices.experts() is 7, expected 6"},
      {shifted(read_rows(z, T), read_rows(z, T), good, few),
       "add_router_shift: shift.size() is 4, expected 5"},
      {[&] { router_shift_ratio<double>(a, 1, 0.5, std::span<double>(few)); },
       "router_shift_ratio: ratio.size() is 4, expected 5"},
      {[&] { router_shift_ratio<double>(a, 0, 0.5, std::span<double>(a)); },
       "router_shift_ratio: layers is 0, expected 1 to 1099511627776"},
      {taught(read_rows(wide, T), into(dz, T)),
       "router_distillation: target.cols is 7, expected 6"},
      {taught(tight(more), into(dz, T)),
       "router_distillation: target.stride is 5, expected at least 6"},
      {taught(read_rows(z, T), into(more, T + 1)),
       "router_distillation: dlogits.rows is 6, expected 5"},
      {taught(read_rows(z, T), into(wide, T)),
       "router_distillation: dlogits.cols is 7, expected 6"},
      {assigned(longer), "router_distillation: target.tokens() is 6, expected 5"},
      {assigned(wider), "router_distillation: target.experts() is 7, expected 6"},
      {assigned(good, {.temperature = -1.0}),
       "router_distillation: temperature is -1.000000, expected > 0"},
      {near_by(T, read_rows(more, T + 1), into(dz, T)),
       "neighbour_loss: weight.rows is 6, expected 5"},
      {near_by(T + 1, read_rows(a, T), into(dz, T)),
       "neighbour_loss: neighbour.size() is 6, expected 5"},
      {near_by(T, read_rows(a, T), into(more, T + 1)), "neighbour_loss: dr.rows is 6, expected 5"},
      {near_by(T, read_rows(a, T), into(wide, T)), "neighbour_loss: dr.cols is 7, expected 6"},
      {near_by(T, read_rows(a, T), tight(dz)),
       "neighbour_loss: dr.stride is 5, expected at least 6"},
      {near_by(T, read_rows(a, T), into(z, T)), "neighbour_loss: r and dr" + own},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  // The least ratio may be either end of its range.
  doubles ratio(T, 9.0);
  router_shift_ratio<double>(doubles{0.0, 1.0, 2.0, 0.5, HUGE_VAL}, 2, 0.0,
                             std::span<double>(ratio));
  CHECK(ratio[0] == 1.0);
  CHECK(ratio[1] == Approx(std::exp(-0.5)));
  CHECK(ratio[4] == 0.0);
  router_shift_ratio<double>(doubles{0.0, 1.0, 2.0, 0.5, HUGE_VAL}, 2, 1.0,
                             std::span<double>(ratio));
  CHECK(ratio == doubles(T, 1.0));
}

TEST_CASE("training terms are divided by the tokens that are said, and written, added or left") {
  test::random rng(41);
  workspace ws;
  for (int round = 0; round < 120; ++round) {
    const index_t n = 1 + rng.below(5), experts = 1 + rng.below(5);
    const auto at = [&](index_t t, index_t e) { return static_cast<std::size_t>(t * experts + e); };
    doubles z = normals(rng.bits(), n * experts), q, before = normals(rng.bits(), n * experts);
    for (std::size_t i = 0; i < z.size(); ++i) q.push_back(static_cast<double>(rng.below(3)) / 2.0);
    std::vector<std::uint8_t> mask;
    for (index_t t = 0; t < n; ++t) mask.push_back(static_cast<std::uint8_t>(3 * rng.below(3)));
    const bool masked = rng.below(2) == 0, squares = rng.below(2) == 0;
    const auto to = static_cast<gradient_to>(rng.below(3));
    const double whole = rng.below(2) == 0 ? 0.0 : 7.5;
    distillation_options how{
        .distance = squares ? target_distance::squares : target_distance::cross_entropy,
        .coefficient = static_cast<double>(rng.below(3)) - 1.5,
        .temperature = rng.below(2) == 0 ? 1.0 : 0.5,
        .tokens = whole,
        .gradient = to};
    if (masked) how.mask = mask;
    const auto start = [&](double own) { return to == gradient_to::write ? 0.0 : own; };
    std::vector<doubles> p;
    index_t live = 0;
    for (index_t t = 0; t < n; ++t) {
      live += !masked || mask[static_cast<std::size_t>(t)] != 0;
      doubles row;
      for (index_t e = 0; e < experts; ++e) row.push_back(z[at(t, e)] / how.temperature);
      p.push_back(softmax_of(row));
    }
    double value = 0.0;
    doubles dz(before), expected(before);
    const double divisor = whole > 0.0 ? whole : static_cast<double>(live);
    for (index_t t = 0; t < n; ++t) {
      const doubles& own = p[static_cast<std::size_t>(t)];
      const bool there = !masked || mask[static_cast<std::size_t>(t)] != 0;
      double mass = 0.0, mean = 0.0;
      for (index_t e = 0; e < experts; ++e) {
        const double pe = own[static_cast<std::size_t>(e)], qe = q[at(t, e)];
        mass += qe;
        mean += pe * 2.0 * (pe - qe);
        if (there)
          value +=
              how.coefficient / divisor * (squares ? (pe - qe) * (pe - qe) : -qe * std::log(pe));
      }
      for (index_t e = 0; e < experts; ++e) {
        const double pe = own[static_cast<std::size_t>(e)], qe = q[at(t, e)];
        const double slope = squares ? pe * (2.0 * (pe - qe) - mean) : pe * mass - qe;
        expected[at(t, e)] = start(before[at(t, e)]);
        if (there) expected[at(t, e)] += how.coefficient / divisor / how.temperature * slope;
      }
    }
    INFO("round " << round << " T=" << n << " E=" << experts);
    CHECK(router_distillation<double>(how, read_rows(z, n), read_rows(q, n), into(dz, n), ws) ==
          Approx(value).margin(1e-12));
    CHECK(test::difference(dz, to == gradient_to::nowhere ? before : expected, 1e-9, 1e-12) == "");

    // Towards first choices, which some tokens lack: targets that are 1 there.
    assignment chosen;
    const bool ragged = rng.below(2) == 0;
    doubles one_hot(z.size(), 0.0);
    chosen.reset(n, experts, 1);
    if (ragged) chosen.reset_ragged(n, experts, 1);
    const assignment::parts list = chosen.to_fill();
    for (index_t t = 0, c = 0; t < n; ++t) {
      const index_t e = rng.below(experts + 2) - 2;  // -2: the ragged form has no choice at all
      const index_t more = !ragged || e >= -1;
      if (more != 0) list.ids[c] = static_cast<expert_id>(std::max<index_t>(e, -1));
      if (e >= 0) one_hot[at(t, e)] = 1.0;
      c += more;
      if (ragged) list.offsets[t] = static_cast<std::int32_t>(c - more);
      if (ragged) list.offsets[t + 1] = static_cast<std::int32_t>(c);
    }
    if (ragged) chosen.close();
    dz = expected = before;
    value = 0.0;
    if (!squares) {
      value = router_distillation<double>(how, read_rows(z, n), read_rows(one_hot, n),
                                          into(expected, n), ws);
      CHECK(router_distillation<double>(how, read_rows(z, n), chosen, into(dz, n), ws) ==
            Approx(value).margin(1e-12));
      CHECK(test::difference(dz, expected, 1e-12, 1e-14) == "");
    }

    // One draw of each token, with an advantage.
    std::vector<expert_id> ids;
    doubles advantage, log_pi(static_cast<std::size_t>(n), 9.0), expected_log;
    dz = expected = before;
    value = 0.0;
    for (index_t t = 0; t < n; ++t) {
      ids.push_back(static_cast<expert_id>(rng.below(experts)));
      advantage.push_back(static_cast<double>(rng.below(3)) - 1.0);
      doubles row;
      for (index_t e = 0; e < experts; ++e) row.push_back(z[at(t, e)]);
      const doubles own = softmax_of(row);
      const double pull = advantage.back() / (whole > 0.0 ? whole : static_cast<double>(n));
      expected_log.push_back(std::log(own[static_cast<std::size_t>(ids.back())]));
      value -= pull * expected_log.back();
      for (index_t e = 0; e < experts; ++e)
        expected[at(t, e)] = start(before[at(t, e)]) - pull * ((e == ids.back() ? 1.0 : 0.0) -
                                                               own[static_cast<std::size_t>(e)]);
    }
    CHECK(policy_gradient<double>(read_rows(z, n), draws_of(n, experts, 1, ids), advantage, to,
                                  into(dz, n), ws, log_pi, whole) == Approx(value).margin(1e-12));
    CHECK(test::difference(dz, to == gradient_to::nowhere ? before : expected, 1e-9, 1e-12) == "");
    CHECK(test::difference(log_pi, expected_log, 1e-9, 1e-12) == "");

    // Neighbours, some of them none.
    const index_t each = 1 + rng.below(3);
    std::vector<std::int32_t> neighbour;
    const doubles w = normals(rng.bits(), n * each);
    for (index_t i = 0; i < n * each; ++i)
      neighbour.push_back(static_cast<std::int32_t>(rng.below(n + 2) - 2));
    const bool both = rng.below(2) == 0;
    dz = expected = before;
    value = 0.0;
    if (to == gradient_to::write) std::fill(expected.begin(), expected.end(), 0.0);
    for (index_t i = 0; i < n * each; ++i) {
      const index_t own = i / each, j = neighbour[static_cast<std::size_t>(i)];
      for (index_t c = 0; j >= 0 && c < experts; ++c) {
        const double gap = z[at(own, c)] - z[at(j, c)], pull = 0.7 * w[static_cast<std::size_t>(i)];
        value += pull * gap * gap;
        expected[at(own, c)] += 2.0 * pull * gap;
        if (both) expected[at(j, c)] -= 2.0 * pull * gap;
      }
    }
    CHECK(neighbour_loss<double>(
              0.7, both ? neighbour_gradient::both : neighbour_gradient::constant, read_rows(z, n),
              neighbour, read_rows(w, n), to, into(dz, n)) == Approx(value).margin(1e-12));
    CHECK(test::difference(dz, to == gradient_to::nowhere ? before : expected, 1e-9, 1e-12) == "");
  }
  // Of no tokens nothing is the mean.
  const std::vector<std::uint8_t> nobody(T, 0);
  const doubles z = normals(1, T * E);
  doubles dz(z.size(), 3.0);
  CHECK(distill({.mask = nobody}, z, z, &dz) == 0.0);
  CHECK(dz == doubles(z.size(), 0.0));
  const distillation_options plain;
  CHECK((plain.distance == target_distance::cross_entropy && plain.coefficient == 1.0 &&
         plain.temperature == 1.0 && plain.tokens == 0.0 && plain.gradient == gradient_to::write));
}

TEST_CASE("what a training term cannot be of is refused: coefficients, masks, states, strides") {
  doubles z(T * E), q(T * E), dz(T * E), a(T);
  const std::vector<std::uint8_t> few(T - 1, 1);
  const std::vector<float> state(4, 1.0f);
  retained_inputs kept(4, 2);
  const assignment two = draws_of(2, E, 1, {0, 1});
  const auto tight = [](const doubles& v) {
    return matrix_view<const double>(v.data(), T, E, E - 1);
  };
  const auto near_by = [&](matrix_view<const double> r, matrix_view<const double> weight) {
    return [=] {
      neighbour_loss<double>(1.0, neighbour_gradient::both, r, std::vector<std::int32_t>(T * E, -1),
                             weight, gradient_to::nowhere, matrix_view<double>{});
    };
  };
  const auto taught = [&](matrix_view<const double> from, const distillation_options& how) {
    return [&, from, how] {
      workspace ws;
      router_distillation<double>(how, from, read_rows(q, T), into(dz, T), ws);
    };
  };
  const test::refusals refused{
      {taught(read_rows(z, T), {.coefficient = std::nan("")}),
       "router_distillation: coefficient is nan, expected finite"},
      {taught(read_rows(z, T), {.coefficient = -HUGE_VAL}),
       "router_distillation: coefficient is -inf, expected finite"},
      {taught(read_rows(z, T), {.temperature = std::nan("")}),
       "router_distillation: temperature is nan, expected > 0"},
      {taught(read_rows(z, T), {.mask = few}), "router_distillation: mask.size() is 4, expected 5"},
      {taught(tight(z), {}), "router_distillation: logits.stride is 5, expected at least 6"},
      {near_by(tight(z), read_rows(q, T)), "neighbour_loss: r.stride is 5, expected at least 6"},
      {near_by(read_rows(z, T), tight(q)),
       "neighbour_loss: weight.stride is 5, expected at least 6"},
      {[&] {
         workspace ws;
         add_router_shift<double>(read_rows(z, T), read_rows(q, T),
                                  draws_of(T, E, 1, {0, 1, 2, 3, E}), std::span(a), ws);
       },
       "add_router_shift: an id is 6, expected -1 to 5"},
      {[] { retained_inputs(-1, 0); }, "retained_inputs: d is -1, expected 0 to 1099511627776"},
      {[] { retained_inputs(3, 4); }, "retained_inputs: most is 4, expected 0 to 3"},
      {[] { retained_inputs(3, -1); }, "retained_inputs: most is -1, expected 0 to 3"},
      {[&] { kept.retain(read_rows(state, 2)); }, "retained_inputs: x.rows is 2, expected 1"},
      {[&] { kept.retain(matrix_view<const float>(state.data(), 1, 3)); },
       "retained_inputs: x.cols is 3, expected 4"},
      {[&] { kept.retain_choices(read_rows(state, 1), two, 0); },
       "retained_inputs: choices.tokens() is 2, expected 1"},
      {[&] {
         matrix_view<double> rows(dz.data(), 2, 4);
         rows.stride = 3;
         kept.project(rows);
       },
       "retained_inputs: delta.stride is 3, expected at least 4"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK((kept.d() == 4 && kept.rank() == 0));
  // Unless told otherwise a direction's square is above a hundredth.
  for (const bool by_choice : {false, true})
    for (const float rest : {0.09f, 0.11f}) {
      retained_inputs own(2, 2);
      const std::vector<float> states{1.0f, 0.0f, 1.0f, rest};
      for (index_t t = 0; t < 2 && !by_choice; ++t)
        own.retain(read_rows(states, 2).middle_rows(t, 1));
      if (by_choice) own.retain_choices(read_rows(states, 2), draws_of(2, E, 1, {4, 4}), 4);
      CHECK(own.rank() == (rest > 0.1f ? 2 : 1));
    }
}
