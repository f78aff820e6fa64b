// Balancing without a loss: one iteration of prices, one step of quantiles, one update of a bias.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/balance/quantile.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;
using moeroute::matrix_view;

constexpr index_t k = 8;

// Sigmoids of normal logits: what the balancers are fed.
struct score_rows {
  index_t tokens, experts;
  moeroute::buffer<float> score;

  score_rows(index_t t, index_t e) : tokens(t), experts(e), score(t * e) {
    bench::fill("normal", t, e, score.data());
    for (index_t i = 0; i < t * e; ++i) score[i] = 1.0f / (1.0f + std::exp(-score[i]));
  }
  matrix_view<const float> view() const { return {score.data(), tokens, experts}; }
};

template <class F>
bench::turn whole(index_t tokens, F f) {
  return [=](bench::stopwatch& watch) { watch.time(tokens, f); };
}

bench::competitor read_floor(const score_rows& s, std::int32_t& kept) {
  return {"floor", whole(s.tokens, [&] {
            kept |= bench::read_pass(s.score.data(), s.tokens * s.experts * 4);
            benchmark::DoNotOptimize(kept);
          })};
}

// One half step each way by copies and std::nth_element.
struct plain_prices {
  std::vector<float> list, token, expert;

  void operator()(const score_rows& s) {
    token.resize(static_cast<std::size_t>(s.tokens));
    expert.assign(static_cast<std::size_t>(s.experts), 0.0f);
    const auto nth = [&](index_t n) {
      std::nth_element(list.begin(), list.begin() + n, list.end(), std::greater<>());
      return list[static_cast<std::size_t>(n)];
    };
    for (index_t t = 0; t < s.tokens; ++t) {
      list.assign(s.score.data() + t * s.experts, s.score.data() + (t + 1) * s.experts);
      token[static_cast<std::size_t>(t)] = nth(k);
    }
    for (index_t e = 0; e < s.experts; ++e) {
      list.clear();
      for (index_t t = 0; t < s.tokens; ++t)
        list.push_back(s.score[t * s.experts + e] - token[static_cast<std::size_t>(t)]);
      expert[static_cast<std::size_t>(e)] = nth(k * s.tokens / s.experts);
    }
    benchmark::DoNotOptimize(expert.data());
  }
};

void per_element(benchmark::State& state, index_t experts) {
  state.counters["ns_per_element"] =
      static_cast<double>(state.counters["ns_per_token"]) / static_cast<double>(experts);
}

// The difference between many iterations and few, so that laying the scores out does not count.
void bip(benchmark::State& state, index_t tokens, index_t experts) {
  constexpr int few = 1, many = 5;
  const score_rows s(tokens, experts);
  moeroute::workspace ws;
  const auto make = [&](int iterations) {
    return moeroute::bip_balancer(
        experts, {.k = k, .iterations = iterations, .start = moeroute::price_start::zero});
  };
  moeroute::bip_balancer short_one = make(few), long_one = make(many);
  plain_prices plain;
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", [&](bench::stopwatch& watch) {
                    bench::stopwatch pair;
                    const double ns = -pair.time(1, [&] { short_one.update(s.view(), ws); }) +
                                      pair.time(1, [&] { long_one.update(s.view(), ws); });
                    watch.add(ns / (many - few), tokens);
                  }});
  list.push_back(read_floor(s, kept));
  list.push_back({"baseline", whole(tokens, [&] { plain(s); })});
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
  per_element(state, experts);
}

void quantile(benchmark::State& state, index_t tokens, index_t experts) {
  const score_rows s(tokens, experts);
  moeroute::workspace ws;
  moeroute::quantile_balancer balancer(experts, {.k = k});
  plain_prices plain;
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, [&] {
                    balancer.observe(s.view(), ws);
                    balancer.update();
                  })});
  list.push_back(read_floor(s, kept));
  list.push_back({"baseline", whole(tokens, [&] { plain(s); })});
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
  per_element(state, experts);
}

void histogram(benchmark::State& state, index_t tokens, index_t experts) {
  const score_rows s(tokens, experts);
  moeroute::workspace ws;
  moeroute::quantile_histogram balancer(experts, {.k = k});
  std::int32_t kept = 0;
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, [&] { balancer.observe(s.view(), ws); })});
  list.push_back(read_floor(s, kept));
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
  per_element(state, experts);
}

// Units are experts.
void bias(benchmark::State& state, index_t experts) {
  moeroute::bias_controller controller(experts, {.centre = moeroute::bias_centre::mean});
  std::vector<std::int64_t> counts(static_cast<std::size_t>(experts));
  for (std::size_t e = 0; e < counts.size(); ++e) counts[e] = static_cast<std::int64_t>(e % 97);
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(experts, [&] { controller.update(counts); })});
  bench::compete(state, 8.0, std::move(list));
}

std::string shape(index_t tokens, index_t experts) {
  return "/T:" + std::to_string(tokens) + "/E:" + std::to_string(experts) +
         "/k:" + std::to_string(k);
}

const bool registered = [] {
  for (const index_t tokens : {1024, 4096})
    for (const index_t experts : {64, 256}) {
      bench::entry("bip" + shape(tokens, experts),
                   [=](benchmark::State& state) { bip(state, tokens, experts); });
      bench::entry("quantile" + shape(tokens, experts),
                   [=](benchmark::State& state) { quantile(state, tokens, experts); });
      bench::entry("quantile_histogram" + shape(tokens, experts),
                   [=](benchmark::State& state) { histogram(state, tokens, experts); });
    }
  for (const index_t experts : {64, 256, 4096})
    bench::entry("bias_update/E:" + std::to_string(experts),
                 [=](benchmark::State& state) { bias(state, experts); });
  return true;
}();

}  // namespace
