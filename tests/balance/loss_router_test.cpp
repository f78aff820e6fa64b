#include <moeroute/balance/loss_router.hpp>

#include <algorithm>
#include <catch2/catch_approx.hpp>
#include <catch2/catch_test_macros.hpp>
#include <cmath>

#include "support/gradient.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

namespace loss_router_test {

using namespace moeroute;
using Catch::Approx;
using oracle::row;

namespace {

constexpr index_t E = 4, D = 6, H = 3;

row normals(std::uint64_t seed, index_t n) {
  test::random rng(seed);
  row x;
  for (index_t i = 0; i < n; ++i) x.push_back(static_cast<double>(rng.normal()));
  return x;
}

template <class Exec = serial>
double run(const row& router, const row& delta, const row& expert, const coupling_loss& loss,
           row* drouter, row* dexpert, gradient_to to = gradient_to::write, const Exec& exec = {}) {
  workspace ws;
  std::fill_n(ws.carve([](scratch& tape) { return tape.take<double>(512); }), 512, std::nan(""));
  row r(router.size()), w(expert.size());
  return expert_router_coupling(
      loss, to, matrix_view<const double>(router.data(), E, D),
      matrix_view<const double>(delta.data(), E, D),
      matrix_view<const double>(expert.data(), E * H, D),
      matrix_view<double>((drouter != nullptr ? *drouter : r).data(), E, D),
      matrix_view<double>((dexpert != nullptr ? *dexpert : w).data(), E * H, D), ws, exec);
}

double formula(const row& router, const row& delta, const row& expert, double alpha) {
  double m[E][E] = {}, value = 0.0;
  for (index_t i = 0; i < E; ++i)
    for (index_t j = 0; j < E; ++j) {
      for (index_t h = 0; h < H; ++h) {
        double x = 0.0;
        for (index_t c = 0; c < D; ++c) {
          const auto at = static_cast<std::size_t>(i * D + c);
          x += expert[static_cast<std::size_t>((j * H + h) * D + c)] * router[at] * delta[at];
        }
        m[i][j] += x * x;
      }
      m[i][j] = std::sqrt(m[i][j]);
    }
  for (index_t i = 0; i < E; ++i)
    for (index_t j = 0; j < E; ++j)
      if (i != j)
        value +=
            std::max(0.0, m[i][j] - alpha * m[i][i]) + std::max(0.0, m[j][i] - alpha * m[i][i]);
  return value / (E * E);
}

}  // namespace

TEST_CASE("coupling is its formula, and both gradients the derivatives") {
  const row router = normals(111, E * D), expert = normals(112, E * H * D);
  row delta(router.size());
  fill_router_noise(matrix_view<const double>(router.data(), E, D), 5, 0,
                    matrix_view<double>(delta.data(), E, D));
  for (const double alpha : {0.0, 0.5, 1.0}) {
    const coupling_loss loss{.coefficient = 1.0, .alpha = alpha};
    row drouter(router.size(), 7.0), dexpert(expert.size(), 7.0);
    const double value = run(router, delta, expert, loss, &drouter, &dexpert);
    CHECK(value == Approx(formula(router, delta, expert, alpha)).epsilon(1e-12));
    row r(router.size()), w(expert.size());
    CHECK(run(router, delta, expert, loss, &r, &w, gradient_to::write, test::several_threads{3}) ==
          value);
    CHECK(r == drouter);
    CHECK(w == dexpert);
    CHECK(test::gradient_difference(router, [&](const row& x, row* g) {
            return run(x, delta, expert, loss, g, nullptr);
          }) == "");
    CHECK(test::gradient_difference(expert, [&](const row& x, row* g) {
            return run(router, delta, x, loss, nullptr, g);
          }) == "");
    row added(router.size(), 7.0), more(expert.size(), 7.0);
    run(router, delta, expert, loss, &added, &more, gradient_to::add);
    for (double& g : added) g -= 7.0;
    for (double& g : more) g -= 7.0;
    CHECK(test::difference(added, drouter, 0.0, 1e-13) == "");
    CHECK(test::difference(more, dexpert, 0.0, 1e-13) == "");
  }
}

TEST_CASE("experts that answer only their own row have no coupling loss") {
  row router(E * D, 0.0), expert(E * H * D, 0.0);
  for (index_t e = 0; e < E; ++e) {
    router[static_cast<std::size_t>(e * D + e)] = 2.0;
    expert[static_cast<std::size_t>(e * H * D + e)] = 1.0;
  }
  row drouter(router.size(), 7.0);
  CHECK(run(router, row(E * D, 1.0), expert, {.alpha = 0.1}, &drouter, nullptr) == 0.0);
  CHECK(drouter == row(E * D, 0.0));
}

TEST_CASE("noise keeps each router row nearer to itself than to any other, and replays") {
  const row router = normals(113, E * D);
  row a(router.size()), b(router.size());
  const matrix_view<const double> r(router.data(), E, D);
  fill_router_noise(r, 9, 3, matrix_view<double>(a.data(), E, D));
  fill_router_noise(r, 9, 3, matrix_view<double>(b.data(), E, D));
  CHECK(a == b);
  const auto distance = [&](index_t i, index_t j) {
    double squares = 0.0;
    for (index_t c = 0; c < D; ++c)
      squares += std::pow(
          router[static_cast<std::size_t>(i * D + c)] * a[static_cast<std::size_t>(i * D + c)] -
              router[static_cast<std::size_t>(j * D + c)],
          2);
    return squares;
  };
  for (index_t i = 0; i < E; ++i)
    for (index_t j = 0; j < E; ++j)
      if (i != j) CHECK(distance(i, i) < distance(i, j));
}

TEST_CASE("noise is uniform around 1 by half the way to the nearest row, one number per element") {
  const row router = normals(116, E * D);
  row delta(router.size());
  fill_router_noise(matrix_view<const double>(router.data(), E, D), 9, 3,
                    matrix_view<double>(delta.data(), E, D));
  for (index_t i = 0; i < E; ++i) {
    double nearest = HUGE_VAL, norm = 0.0;
    for (index_t j = 0; j < E; ++j) {
      double squares = 0.0;
      for (index_t c = 0; c < D; ++c)
        squares += std::pow(router[static_cast<std::size_t>(i * D + c)] -
                                router[static_cast<std::size_t>(j * D + c)],
                            2);
      if (j != i) nearest = std::min(nearest, std::sqrt(squares));
    }
    for (index_t c = 0; c < D; ++c)
      norm += std::pow(router[static_cast<std::size_t>(i * D + c)], 2);
    const double eps = nearest / (2.0 * std::sqrt(norm));
    for (index_t c = 0; c < D; ++c) {
      const double u =
          static_cast<double>(random_u01(9, 0x45524300 + 3, static_cast<std::uint64_t>(i * D + c)));
      CHECK(delta[static_cast<std::size_t>(i * D + c)] ==
            Approx(1.0 + eps * (2.0 * u - 1.0)).epsilon(1e-12));
    }
  }
}

TEST_CASE("a row without a length, or without another row, hears no noise") {
  // The second row is 0; of equal rows the nearest is no way off.
  const row router{3.0, 4.0, 0.0, 0.0, 3.0, 4.0};
  row delta(6, 7.0);
  fill_router_noise(matrix_view<const double>(router.data(), 3, 2), 1, 2,
                    matrix_view<double>(delta.data(), 3, 2));
  CHECK(delta == row(6, 1.0));
  delta.assign(6, 7.0);
  fill_router_noise(matrix_view<const double>(router.data(), 1, 6), 1, 2,
                    matrix_view<double>(delta.data(), 1, 6));
  CHECK(delta == row(6, 1.0));
}

TEST_CASE("who wants no gradient of the coupling need not have a place for it") {
  const row router = normals(117, E * D), expert = normals(118, E * H * D), delta(E * D, 1.0);
  workspace ws;
  const matrix_view<double> none{};
  const double value = expert_router_coupling(
      {}, gradient_to::nowhere, matrix_view<const double>(router.data(), E, D),
      matrix_view<const double>(delta.data(), E, D),
      matrix_view<const double>(expert.data(), E * H, D), none, none, ws, serial{});
  CHECK(value == run(router, delta, expert, {}, nullptr, nullptr));
}

TEST_CASE("the coupling grows with its experts, and its pull at them does not") {
  const row router = normals(119, E * D), expert = normals(120, E * H * D), delta(E * D, 1.0);
  row lesser, quiet, dr(E * D), dw(E * H * D), less(E * D), same(E * H * D), hushed(E * D);
  for (const double w : expert) lesser.push_back(w / 1024.0);
  const coupling_loss loss{.alpha = 0.5};
  const double value = run(router, delta, expert, loss, &dr, &dw);
  CHECK(run(router, delta, lesser, loss, &less, &same) == Approx(value / 1024.0).epsilon(1e-12));
  for (double& g : less) g *= 1024.0;
  CHECK(test::difference(less, dr, 1e-11, 1e-14) == "");
  CHECK(test::difference(same, dw, 1e-11, 1e-14) == "");
  // Noise is as large as the rows are.
  for (const double r : router) quiet.push_back(r / 1024.0);
  const matrix_view<const double> loud_rows(router.data(), E, D), quiet_rows(quiet.data(), E, D);
  fill_router_noise(loud_rows, 9, 3, matrix_view<double>(dr.data(), E, D));
  fill_router_noise(quiet_rows, 9, 3, matrix_view<double>(hushed.data(), E, D));
  CHECK(test::difference(hushed, dr, 1e-12) == "");
}

TEST_CASE("answers that are as loud pull at nobody; nor does one that is no number") {
  // All experts and all rows are alike.
  const row one = normals(121, D), unit = normals(122, H * D);
  row router, expert, dr(E * D, 7.0), dw(E * H * D, 7.0);
  for (index_t e = 0; e < E; ++e) {
    router.insert(router.end(), one.begin(), one.end());
    expert.insert(expert.end(), unit.begin(), unit.end());
  }
  CHECK(run(router, row(E * D, 1.0), expert, {}, &dr, &dw) == 0.0);
  CHECK(dr == row(E * D, 0.0));
  CHECK(dw == row(E * H * D, 0.0));
  const row other = normals(123, E * D);
  expert = normals(124, E * H * D);
  expert[2 * H * D] = std::nan("");
  CHECK(std::isfinite(run(other, row(E * D, 1.0), expert, {}, &dr, &dw)));
  int broken = 0;
  for (const double g : dr) broken += !std::isfinite(g);
  for (const double g : dw) broken += !std::isfinite(g);
  CHECK(broken == 0);
}

TEST_CASE("the coupling has the same bits where several threads ask experts at once") {
  constexpr index_t experts = 32, hidden = 8, d = 64;
  const row router = normals(125, experts * d), expert = normals(126, experts * hidden * d);
  const row delta(router.size(), 1.0);
  const auto on = [&](const auto& exec) {
    workspace ws;
    row made(router.size() + expert.size());
    double* const dexpert = made.data() + router.size();
    const double value = expert_router_coupling<double>(
        {}, gradient_to::write, {router.data(), experts, d}, {delta.data(), experts, d},
        {expert.data(), experts * hidden, d}, {made.data(), experts, d},
        {dexpert, experts * hidden, d}, ws, exec);
    made.push_back(value);
    return made;
  };
  const row alone = on(serial{});
  bool same = true;
  for (int i = 0; i < 5; ++i) same = on(test::several_threads{3}) == alone && same;
  CHECK(same);
}

TEST_CASE("arguments of the coupling loss are refused by name") {
  const row router = normals(114, E * D), expert = normals(115, E * H * D), delta(E * D, 1.0);
  CHECK(test::refusal([&] { run(router, delta, expert, {.alpha = 1.0625}, nullptr, nullptr); }) ==
        "moeroute::expert_router_coupling: alpha is 1.062500, expected 0 to 1");
  CHECK(test::refusal([&] {
          run(router, delta, expert, {.coefficient = -1.0}, nullptr, nullptr);
        }) == "moeroute::expert_router_coupling: coefficient is -1.000000, expected >= 0");
}

}  // namespace loss_router_test
