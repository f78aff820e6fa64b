// expert_choice and sinkhorn: the rules that see the whole batch.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/floors.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;

// Turns that are one whole call each.
template <class F>
bench::turn whole(index_t tokens, F f) {
  return [=](bench::stopwatch& watch) { watch.time(tokens, f); };
}

// Turns of a pass over all rows, in pieces of an eighth of a megabyte.
template <class F>
bench::turn pass(index_t tokens, index_t row_bytes, F f) {
  const index_t piece = std::max<index_t>(1, (index_t{1} << 17) / row_bytes);
  return [=](bench::stopwatch& watch) {
    for (index_t t = 0; t < tokens; t += piece) {
      const index_t end = std::min(tokens, t + piece);
      watch.time(end - t, [&] { f(t, end); });
    }
  };
}

void per_element(benchmark::State& state, index_t experts, index_t iterations = 1) {
  state.counters["ns_per_element"] = static_cast<double>(state.counters["ns_per_token"]) /
                                     static_cast<double>(experts * iterations);
}

// Softmax of every row by std::exp, every column copied and split by std::nth_element, ids sorted.
struct plain_expert_choice {
  std::vector<float> score;
  std::vector<std::pair<float, std::int32_t>> column;
  std::vector<std::int32_t> taken;

  void operator()(const float* logits, index_t tokens, index_t experts, index_t capacity) {
    score.resize(static_cast<std::size_t>(tokens * experts));
    column.resize(static_cast<std::size_t>(tokens));
    taken.resize(static_cast<std::size_t>(experts * capacity));
    for (index_t t = 0; t < tokens; ++t) {
      const float* z = logits + t * experts;
      float* s = score.data() + t * experts;
      const float max = *std::max_element(z, z + experts);
      float sum = 0.0f;
      for (index_t e = 0; e < experts; ++e) sum += s[e] = std::exp(z[e] - max);
      for (index_t e = 0; e < experts; ++e) s[e] /= sum;
    }
    for (index_t e = 0; e < experts; ++e) {
      for (index_t t = 0; t < tokens; ++t)
        column[static_cast<std::size_t>(t)] = {-score[static_cast<std::size_t>(t * experts + e)],
                                               static_cast<std::int32_t>(t)};
      std::nth_element(column.begin(), column.begin() + (capacity - 1), column.end());
      std::int32_t* ids = taken.data() + e * capacity;
      for (index_t c = 0; c < capacity; ++c) ids[c] = column[static_cast<std::size_t>(c)].second;
      std::sort(ids, ids + capacity);
    }
  }
};

// `sequence`: tokens that compete with one another.
void expert_choice(benchmark::State& state, index_t tokens, index_t experts, index_t capacity,
                   const std::string& shape, index_t sequence) {
  moeroute::buffer<float> logits(tokens * experts);
  bench::fill(shape, tokens, experts, logits.data());
  const moeroute::matrix_view<const float> z(logits.data(), tokens, experts);
  const moeroute::expert_choice<> router{.capacity = {.fixed = capacity},
                                         .sequence_length = sequence};
  moeroute::workspace workspace;
  moeroute::assignment choices;
  moeroute::buffer<float> best(tokens);
  plain_expert_choice plain;
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole(tokens, [&] { moeroute::route(router, z, workspace, choices); })});
  list.push_back({"floor", pass(tokens, experts * 4, [&](index_t t, index_t end) {
                    bench::max_of_rows(z.row(t), end - t, experts, best.data() + t);
                  })});
  list.push_back({"baseline", whole(tokens, [&] {
                    for (index_t t = 0; t < tokens; t += sequence)
                      plain(z.row(t), sequence, experts, capacity);
                  })});
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
  per_element(state, experts);
}

// Megatron's loop: scale rows, then columns, a pass over the matrix for each.
void plain_sinkhorn(const float* logits, index_t tokens, index_t experts, index_t iterations,
                    std::vector<float>& plan, std::vector<float>& d0, std::vector<float>& d1) {
  plan.resize(static_cast<std::size_t>(tokens * experts));
  for (std::size_t i = 0; i < plan.size(); ++i) plan[i] = std::exp(logits[i]);
  d0.assign(static_cast<std::size_t>(tokens), 1.0f);
  d1.assign(static_cast<std::size_t>(experts), 1.0f);
  std::vector<float> sum(d1.size());
  for (index_t n = 0; n < iterations; ++n) {
    for (index_t t = 0; t < tokens; ++t) {
      float dot = 0.0f;
      for (index_t e = 0; e < experts; ++e)
        dot += d1[static_cast<std::size_t>(e)] * plan[static_cast<std::size_t>(t * experts + e)];
      d0[static_cast<std::size_t>(t)] = 1.0f / (static_cast<float>(tokens) * (dot + 1e-8f));
    }
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (index_t t = 0; t < tokens; ++t)
      for (index_t e = 0; e < experts; ++e)
        sum[static_cast<std::size_t>(e)] +=
            d0[static_cast<std::size_t>(t)] * plan[static_cast<std::size_t>(t * experts + e)];
    for (std::size_t e = 0; e < d1.size(); ++e)
      d1[e] = 1.0f / (static_cast<float>(experts) * (sum[e] + 1e-8f));
  }
}

// One sweep: the difference between many iterations and few, so that the exponentials before them
// and the choice after them do not count. Its floor is a read of the matrix.
void sinkhorn(benchmark::State& state, index_t tokens, index_t experts,
              moeroute::sinkhorn_domain domain) {
  constexpr index_t few = 10, many = 30;
  moeroute::buffer<float> logits(tokens * experts);
  bench::fill("normal", tokens, experts, logits.data());
  const moeroute::matrix_view<const float> z(logits.data(), tokens, experts);
  moeroute::workspace workspace;
  moeroute::assignment choices;
  std::vector<float> plan, d0, d1;
  std::int32_t kept = 0;
  // Both calls of a pair lie close together, so that a change of clock meets both.
  const auto sweep = [tokens](auto call) -> bench::turn {
    return [=](bench::stopwatch& watch) {
      bench::stopwatch pair;
      const double ns = -pair.time(1, [&] { call(few); }) + pair.time(1, [&] { call(many); });
      watch.add(ns / static_cast<double>(many - few), tokens);
    };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", sweep([&](index_t iterations) {
                    moeroute::sinkhorn router;
                    router.scaling.domain = domain;
                    router.scaling.tolerance = 0.0f;
                    router.scaling.most_iterations = iterations;
                    moeroute::route(router, z, workspace, choices);
                  })});
  list.push_back({"floor", pass(tokens, experts * 4, [&](index_t t, index_t end) {
                    kept |= bench::read_pass(z.row(t), (end - t) * experts * 4);
                    benchmark::DoNotOptimize(kept);
                  })});
  list.push_back({"baseline", sweep([&](index_t iterations) {
                    plain_sinkhorn(z.data, tokens, experts, iterations, plan, d0, d1);
                    benchmark::DoNotOptimize(d1.data());
                  })});
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
  per_element(state, experts);
}

std::string part(const char* letter, index_t n) {
  return std::string("/") + letter + ":" + std::to_string(n);
}

const bool registered = [] {
  for (const auto& [experts, capacity] : std::vector<std::pair<index_t, index_t>>{
           {64, 128}, {64, 512}, {128, 64}, {256, 32}, {256, 128}})
    bench::entry("expert_choice" + part("T", 4096) + part("E", experts) + part("C", capacity),
                 [=](benchmark::State& state) {
                   expert_choice(state, 4096, experts, capacity, "normal", 4096);
                 });
  for (const index_t sequence : {64, 512})
    bench::entry("expert_choice" + part("T", 4096) + part("E", 64) + part("C", sequence / 32) +
                     part("scope", sequence),
                 [=](benchmark::State& state) {
                   expert_choice(state, 4096, 64, sequence / 32, "normal", sequence);
                 });
  for (const char* shape : bench::shapes)
    bench::entry(
        "expert_choice" + part("T", 1024) + part("E", 64) + part("C", 32) + "/shape:" + shape,
        [=](benchmark::State& state) { expert_choice(state, 1024, 64, 32, shape, 1024); });
  for (const index_t experts : {3, 8, 60, 2048})
    bench::entry(
        "expert_choice" + part("T", 1024) + part("E", experts) + part("C", 32) + "/shape:normal",
        [=](benchmark::State& state) { expert_choice(state, 1024, experts, 32, "normal", 1024); });
  for (const auto& [tokens, experts, mem] : std::vector<std::tuple<index_t, index_t, const char*>>{
           {256, 64, "l2"}, {4096, 64, "l2"}, {1024, 256, "l2"}, {4096, 256, "stream"}})
    for (const auto& [name, domain] :
         {std::pair{"sinkhorn", moeroute::sinkhorn_domain::exponential},
          std::pair{"sinkhorn_log", moeroute::sinkhorn_domain::logarithm}})
      bench::entry(name + part("T", tokens) + part("E", experts) + "/mem:" + mem,
                   [=](benchmark::State& state) { sinkhorn(state, tokens, experts, domain); });
  return true;
}();

}  // namespace
