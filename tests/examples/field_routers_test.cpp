#include "support/field_routers.hpp"

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <numeric>
#include <vector>

#include "support/random.hpp"

namespace field_routers_test {

using namespace example;

namespace {

std::vector<float> field_floats(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  std::vector<float> x(static_cast<std::size_t>(n));
  for (float& v : x) v = rng.normal();
  return x;
}
matrix_view<const float> field_rows(const std::vector<float>& x, index_t cols) {
  return {x.data(), static_cast<index_t>(x.size()) / cols, cols};
}

// Experts of a pool: expert e multiplies by (e + 1) / 8.
struct pool_of_scales {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = in(r, c) * static_cast<float>(e + 1) / 8.0f;
  }
};
using pooled_layer = moeroute::moe_layer<moeroute::router<moeroute::softmax>, pool_of_scales>;

pooled_layer layer_of(const std::vector<float>& w, index_t d, bool adds) {
  return {moeroute::simd::packed_matrix<>(field_rows(w, d)),
          moeroute::router<moeroute::softmax>{.selection = {.k = 2}},
          pool_of_scales{},
          {.output =
               adds ? moeroute::combine_output::accumulate : moeroute::combine_output::overwrite}};
}

// What such a layer gives for a row, in double.
std::vector<double> in_double(const std::vector<float>& w, const std::vector<double>& x) {
  const std::size_t d = x.size(), experts = w.size() / d;
  std::vector<double> z(experts);
  for (std::size_t e = 0; e < experts; ++e)
    for (std::size_t c = 0; c < d; ++c) z[e] += double{w[e * d + c]} * x[c];
  double sum = 0.0;
  for (const double v : z) sum += std::exp(v);
  std::vector<std::size_t> order(experts);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return z[a] > z[b]; });
  double factor = 0.0;
  for (int r = 0; r < 2; ++r)
    factor += std::exp(z[order[static_cast<std::size_t>(r)]]) / sum *
              static_cast<double>(order[static_cast<std::size_t>(r)] + 1) / 8.0;
  std::vector<double> y;
  for (const double v : x) y.push_back(factor * v);
  return y;
}

}  // namespace

TEST_CASE("a query reads its own block, none behind it, and the best by mean keys") {
  constexpr index_t tokens = 37, d = 8, block = 8, blocks = 5;
  const auto q = field_floats(tokens * d, 1), k = field_floats(tokens * d, 2);
  std::vector<float> z(tokens * blocks);
  const matrix_view<float> scores(z.data(), tokens, blocks);
  block_scores(field_rows(q, d), field_rows(k, d), block, scores);
  moeroute::workspace ws;
  moeroute::assignment read;
  moeroute::route(moeroute::router<moeroute::softmax_selected>{.selection = {.k = 3}}, scores, ws,
                  read);
  for (index_t t = 0; t < tokens; ++t) {
    CHECK(read.ids(t)[0] == t / block);
    for (const expert_id b : read.ids(t)) CHECK(b <= t / block);
    for (index_t b = 0; b < t / block; ++b) {
      double score = 0.0;
      for (index_t i = b * block; i < (b + 1) * block; ++i)
        for (index_t c = 0; c < d; ++c)
          score += double{q[static_cast<std::size_t>(t * d + c)]} *
                   double{k[static_cast<std::size_t>(i * d + c)]} / block;
      CHECK(std::abs(score - double{scores(t, b)}) < 1e-5);
    }
    CHECK(read.count(t) == 3);
    CHECK((read.ids(t)[2] == moeroute::no_expert) == (t / block < 2));
  }
}

TEST_CASE("a chain of experts is its passes one after the other, over one pool") {
  constexpr index_t tokens = 12, d = 6, experts = 5;
  const auto first = field_floats(experts * d, 3), second = field_floats(experts * d, 4);
  const auto x = field_floats(tokens * d, 5);
  pooled_layer passes[] = {layer_of(first, d, true), layer_of(second, d, true)};
  std::vector<float> y = x;
  chain_of_experts(std::span<pooled_layer>(passes), matrix_view<float>(y.data(), tokens, d));
  for (index_t t = 0; t < tokens; ++t) {
    std::vector<double> row;
    for (index_t c = 0; c < d; ++c) row.push_back(double{x[static_cast<std::size_t>(t * d + c)]});
    for (const auto* w : {&first, &second}) {
      const std::vector<double> more = in_double(*w, row);
      for (std::size_t c = 0; c < row.size(); ++c) row[c] += more[c];
    }
    for (index_t c = 0; c < d; ++c)
      CHECK(std::abs(row[static_cast<std::size_t>(c)] -
                     double{y[static_cast<std::size_t>(t * d + c)]}) < 1e-4);
  }
}

TEST_CASE("two views of a token are mixed by its gate; without noise they are one") {
  constexpr index_t tokens = 9, d = 6, experts = 5;
  const auto weight = field_floats(experts * d, 6), x = field_floats(tokens * d, 7);
  pooled_layer layer = layer_of(weight, d, false);
  std::vector<float> plain(x.size()), same(x.size()), mixed(x.size()), seen(x.size()),
      other(x.size()), shut(d, 0.0f);
  const auto rows = [&](std::vector<float>& m) { return matrix_view<float>(m.data(), tokens, d); };
  layer.forward(field_rows(x, d), rows(plain));
  two_views(layer, field_rows(x, d), shut, 0.0f, {.seed = 3}, rows(same));
  for (std::size_t i = 0; i < x.size(); ++i) CHECK(std::abs(same[i] - plain[i]) < 1e-6f);
  // Half and half where w is 0.
  two_views(layer, field_rows(x, d), shut, 0.5f, {.seed = 3}, rows(mixed));
  moeroute::gaussian_rows(field_rows(x, d), 0.5f, 0.5f, {.seed = 3}, rows(other));
  layer.forward(field_rows(other, d), rows(seen));
  for (std::size_t i = 0; i < x.size(); ++i)
    CHECK(std::abs(mixed[i] - (plain[i] + seen[i]) / 2.0f) < 1e-6f);
}

TEST_CASE("centres find the middles of two clouds, and read the rows nearest to them") {
  constexpr index_t n = 200;
  test::random rng(8);
  std::vector<float> x;
  for (index_t i = 0; i < n; ++i) {
    x.push_back((i % 2 == 0 ? -4.0f : 4.0f) + 0.3f * rng.normal());
    x.push_back(0.3f * rng.normal());
  }
  const std::vector<float> start{-1.0f, 0.5f, 1.0f, -0.5f};
  moving_centres centres(field_rows(start, 2));
  for (int step = 0; step < 40; ++step) {
    const auto nearest = centres.follow(field_rows(x, 2), 0.5f);
    for (index_t i = 0; i < n; ++i) CHECK(nearest[static_cast<std::size_t>(i)] == i % 2);
  }
  CHECK(std::abs(centres.centres()(0, 0) + 4.0f) < 0.1f);
  CHECK(std::abs(centres.centres()(1, 0) - 4.0f) < 0.1f);
  const moeroute::assignment& clusters = centres.clusters(field_rows(x, 2), 10);
  std::vector<int> taken(2, 0);
  for (index_t t = 0; t < n; ++t)
    for (const expert_id e : clusters.ids(t)) {
      CHECK(e == t % 2);
      ++taken[static_cast<std::size_t>(e)];
    }
  CHECK(taken == std::vector<int>{10, 10});
}

TEST_CASE("added experts change no old logit and are not chosen before they are let in") {
  constexpr index_t tokens = 20, d = 6, experts = 4;
  const auto w = field_floats(experts * d, 9), x = field_floats(tokens * d, 10);
  const grown_gate grown(field_rows(w, d), 2);
  std::vector<float> z(tokens * 6), before(tokens * experts);
  moeroute::gate(field_rows(x, d), moeroute::simd::packed_matrix<>(field_rows(grown.weight, d)),
                 matrix_view<float>(z.data(), tokens, 6));
  moeroute::gate(field_rows(x, d), moeroute::simd::packed_matrix<>(field_rows(w, d)),
                 matrix_view<float>(before.data(), tokens, experts));
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e)
      CHECK(std::abs(z[static_cast<std::size_t>(t * 6 + e)] -
                     before[static_cast<std::size_t>(t * experts + e)]) < 1e-5f);
  moeroute::workspace ws;
  moeroute::assignment choices;
  const moeroute::router<moeroute::softmax> router{.selection = {.k = 3},
                                                   .transform = {.add = grown.bias}};
  moeroute::route(router, matrix_view<const float>(z.data(), tokens, 6), ws, choices);
  for (const expert_id e : choices.ids()) CHECK(e < experts);
}

TEST_CASE("instances have one decision for all of their rows, that of their mean") {
  constexpr index_t tokens = 10, d = 5, experts = 6;
  const auto w = field_floats(experts * d, 11), x = field_floats(tokens * d, 12);
  const std::vector<std::int32_t> offsets{0, 4, 4, 10};
  moeroute::assignment out;
  route_instances(moeroute::router<moeroute::softmax>{.selection = {.k = 2}},
                  moeroute::simd::packed_matrix<>(field_rows(w, d)), field_rows(x, d), offsets,
                  out);
  CHECK(out.tokens() == tokens);
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const index_t from = offsets[s], until = offsets[s + 1];
    if (from == until) continue;
    std::vector<double> z(experts);
    for (index_t e = 0; e < experts; ++e)
      for (index_t t = from; t < until; ++t)
        for (index_t c = 0; c < d; ++c)
          z[static_cast<std::size_t>(e)] += double{w[static_cast<std::size_t>(e * d + c)]} *
                                            double{x[static_cast<std::size_t>(t * d + c)]} /
                                            static_cast<double>(until - from);
    const auto best = std::max_element(z.begin(), z.end()) - z.begin();
    for (index_t t = from; t < until; ++t) CHECK(out.ids(t)[0] == best);
  }
}

TEST_CASE("a step that moves a token by less than a share of its norm ends it") {
  const std::vector<float> x{3.0f, 4.0f}, small{0.03f, 0.0f}, large{0.0f, 1.0f};
  CHECK(halts(small, x, 0.01f));
  CHECK_FALSE(halts(large, x, 0.01f));
  CHECK_FALSE(halts(small, x, 0.001f));
}

TEST_CASE("a switch by entropy spreads what has gathered and sharpens what is even") {
  const std::vector<float> even(8, 0.125f), one{1.0f, 0.0f, 0.0f, 0.0f},
      half{0.5f, 0.5f, 0.0f, 0.0f};
  CHECK(loss_of(even, 0.9f) == 1);
  CHECK(loss_of(one, 0.9f) == 0);
  CHECK(loss_of(half, 0.6f) == 0);
  CHECK(loss_of(half, 0.4f) == 1);
}

TEST_CASE("a prior guides a choice as far as its strength goes") {
  std::vector<float> z{1.0f, 0.0f, 1.0f, 0.0f};
  const std::vector<float> prior{0.5f, 0.5f, 0.1f, 0.9f};
  guide(matrix_view<float>(z.data(), 2, 2), field_rows(prior, 2), 1.0f);
  CHECK(z[0] > z[1]);
  CHECK(z[2] < z[3]);
  std::vector<float> same{1.0f, 0.0f};
  guide(matrix_view<float>(same.data(), 1, 2), matrix_view<const float>(prior.data() + 2, 1, 2),
        0.0f);
  CHECK(same == std::vector<float>{1.0f, 0.0f});
}

TEST_CASE("a layer takes its own keys or another's at random, the same ones when replayed") {
  constexpr index_t layers = 4000;
  const std::vector<float> z(2 * layers);
  moeroute::workspace ws;
  moeroute::assignment a, b;
  const moeroute::random_choice coin{.choices = 1};
  for (auto* out : {&a, &b})
    moeroute::route(coin, field_rows(z, 2), {.seed = 5, .step = 2}, ws, *out);
  CHECK(std::equal(a.ids().begin(), a.ids().end(), b.ids().begin()));
  const double own = static_cast<double>(std::count(a.ids().begin(), a.ids().end(), 0)) / layers;
  CHECK(std::abs(own - 0.5) < 4.0 * 0.5 / std::sqrt(double{layers}));
}

TEST_CASE("an unseen model is worth what it was on prompts like the query") {
  const std::vector<float> near{1.0f, 0.0f, 0.25f, 0.75f}, error{0.1f, 0.9f, 0.5f, 0.3f};
  std::vector<float> quality(4);
  quality_of_unseen(field_rows(near, 2), field_rows(error, 2),
                    matrix_view<float>(quality.data(), 2, 2));
  const double expected[] = {0.9, 0.5, 1.0 - (0.025 + 0.675), 1.0 - (0.125 + 0.225)};
  for (std::size_t i = 0; i < 4; ++i) CHECK(std::abs(double{quality[i]} - expected[i]) < 1e-6);
}

TEST_CASE("the mean quality over budgets is the area under the hull of cost and quality") {
  // A point below the line of two others adds nothing, one that costs more and gives less neither.
  CHECK(std::abs(mean_quality({{0.0, 0.2}, {1.0, 0.8}}) - 0.5) < 1e-12);
  CHECK(std::abs(mean_quality({{0.0, 0.2}, {0.5, 0.4}, {1.0, 0.8}}) - 0.5) < 1e-12);
  CHECK(std::abs(mean_quality({{0.0, 0.2}, {0.5, 0.8}, {1.0, 0.6}}) - 0.65) < 1e-12);
  CHECK(std::abs(mean_quality({{0.0, 0.2}, {0.5, 0.7}, {1.0, 0.8}}) - 0.6) < 1e-12);
}

}  // namespace field_routers_test
