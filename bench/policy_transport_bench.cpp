// Balanced plans: the KL projection, selective Sinkhorn, expert choice on a plan, BASE and sparse
// transport by expert and by token, whole calls
// against the same rule in plain loops.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/batch/sparse_transport.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/plain_selection.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;
using moeroute::expert_id;
using matrix = std::vector<float>;

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

// Softmax of every row by std::exp; NaN and -inf get 0.
void softmax_rows(const float* z, index_t tokens, index_t experts, matrix& out) {
  out.resize(at(tokens * experts));
  for (index_t t = 0; t < tokens; ++t) {
    float max = bench::plain_selection::lowest, sum = 0.0f;
    for (index_t e = 0; e < experts; ++e) max = std::max(max, z[t * experts + e]);
    for (index_t e = 0; e < experts; ++e) {
      const float x = z[t * experts + e];
      sum += out[at(t * experts + e)] =
          x > bench::plain_selection::lowest ? std::exp(x - max) : 0.0f;
    }
    for (index_t e = 0; e < experts && sum > 0.0f; ++e) out[at(t * experts + e)] /= sum;
  }
}

// Columns then rows, so many times; then the k best of every row of the plan, weighted by the plan
// or by the softmax of the logits.
struct plain_plan {
  index_t k, iterations;
  float temperature;
  bool by_plan;
  matrix kernel, u, v, soft;
  bench::plain_selection select;
  std::vector<expert_id> id;
  matrix weight;

  void operator()(const float* z, index_t tokens, index_t experts) {
    kernel.resize(at(tokens * experts));
    u.assign(at(tokens), 1.0f);
    v.assign(at(experts), 1.0f);
    id.resize(at(tokens * k));
    weight.resize(id.size());
    for (index_t t = 0; t < tokens; ++t) {
      float max = bench::plain_selection::lowest;
      for (index_t e = 0; e < experts; ++e) max = std::max(max, z[t * experts + e]);
      for (index_t e = 0; e < experts; ++e) {
        const float x = z[t * experts + e];
        kernel[at(t * experts + e)] =
            x > bench::plain_selection::lowest ? std::exp((x - max) / temperature) : 0.0f;
      }
    }
    const float share = static_cast<float>(tokens) / static_cast<float>(experts);
    for (index_t n = 0; n < iterations; ++n) {
      std::fill(v.begin(), v.end(), 0.0f);
      for (index_t t = 0; t < tokens; ++t)
        for (index_t e = 0; e < experts; ++e) v[at(e)] += u[at(t)] * kernel[at(t * experts + e)];
      for (float& x : v) x = x > 0.0f ? share / x : 0.0f;
      for (index_t t = 0; t < tokens; ++t) {
        float dot = 0.0f;
        for (index_t e = 0; e < experts; ++e) dot += v[at(e)] * kernel[at(t * experts + e)];
        u[at(t)] = dot > 0.0f ? 1.0f / dot : 0.0f;
      }
    }
    if (!by_plan) softmax_rows(z, tokens, experts, soft);
    for (index_t t = 0; t < tokens; ++t) {
      float* row = kernel.data() + t * experts;
      for (index_t e = 0; e < experts; ++e) row[e] *= u[at(t)] * v[at(e)];
      float* w = weight.data() + t * k;
      select.partial_sort(row, experts, k, id.data() + t * k, w);
      if (!by_plan) {
        for (index_t r = 0; r < k; ++r) w[r] = soft[at(t * experts + id[at(t * k + r)])];
        continue;
      }
      float sum = 0.0f;
      for (index_t r = 0; r < k; ++r) sum += w[r];
      for (index_t r = 0; r < k; ++r) w[r] /= sum;
    }
    benchmark::DoNotOptimize(weight.data());
  }
};

// The auction of the published code: every expert lists its T / E + 1 best by std::nth_element.
struct plain_auction {
  std::vector<std::pair<float, std::int32_t>> list;
  matrix value, cost, highest;
  std::vector<std::int32_t> winner, bidder, expert_of;

  void operator()(const float* z, index_t tokens, index_t experts) {
    const index_t jobs = tokens / experts;
    const auto [least, most] = std::minmax_element(z, z + tokens * experts);
    const float eps = std::max((*most - *least) / 50.0f, 1e-4f);
    cost.assign(at(tokens), 0.0f);
    winner.assign(at(tokens), -1);
    expert_of.assign(at(tokens), -1);
    list.resize(at(tokens));
    for (index_t round = 0; round < 2000; ++round) {
      highest.assign(at(tokens), 0.0f);
      bidder.assign(at(tokens), -1);
      std::fill(expert_of.begin(), expert_of.end(), -1);
      index_t placed = 0;
      for (index_t e = 0; e < experts; ++e) {
        for (index_t t = 0; t < tokens; ++t) {
          const float raw = z[t * experts + e];
          const bool won = winner[at(t)] == e;
          list[at(t)] = {-(won ? (round > 100 ? raw : *most) : raw - cost[at(t)]),
                         static_cast<std::int32_t>(t)};
        }
        std::nth_element(list.begin(), list.begin() + jobs, list.end());
        const float next = -list[at(jobs)].first;
        for (index_t i = 0; i < jobs; ++i) {
          const auto t = at(list[at(i)].second);
          placed += expert_of[t] < 0;
          expert_of[t] = static_cast<std::int32_t>(e);
          const bool retains = round > 0 && round < 100 && winner[t] == e;
          const float bid = retains ? eps : -list[at(i)].first - next + eps;
          if (bid > highest[t]) {
            highest[t] = bid;
            bidder[t] = static_cast<std::int32_t>(e);
          }
        }
      }
      if (placed == tokens) break;
      for (index_t t = 0; t < tokens; ++t) {
        if (round > 0 && round < 100 && winner[at(t)] >= 0 && bidder[at(t)] < 0) {
          highest[at(t)] = eps;
          bidder[at(t)] = winner[at(t)];
        }
        cost[at(t)] += highest[at(t)];
      }
      winner = bidder;
    }
    benchmark::DoNotOptimize(expert_of.data());
  }
};

// Twenty steps of Adam on the semi-dual; the C best tokens of every column by std::partial_sort.
struct plain_sparse {
  matrix similarity, potential, gradient, mean, square, threshold_of;
  std::vector<std::pair<float, std::int32_t>> column;

  void operator()(const float* z, index_t tokens, index_t experts, index_t capacity) {
    softmax_rows(z, tokens, experts, similarity);
    const float share = static_cast<float>(tokens) / static_cast<float>(experts);
    for (matrix* m : {&potential, &mean, &square}) m->assign(at(tokens), 0.0f);
    column.resize(at(tokens));
    threshold_of.resize(at(experts));
    for (int step = 0; step < 20; ++step) {
      gradient.assign(at(tokens), -1.0f);
      for (index_t e = 0; e < experts; ++e) {
        for (index_t t = 0; t < tokens; ++t)
          column[at(t)] = {-(similarity[at(t * experts + e)] + potential[at(t)]) / share,
                           static_cast<std::int32_t>(t)};
        std::partial_sort(column.begin(), column.begin() + capacity, column.end());
        float sum = 0.0f, threshold = 0.0f;
        for (index_t i = 0; i < capacity; ++i) {
          sum -= column[at(i)].first;
          const float candidate = (sum - 1.0f) / static_cast<float>(i + 1);
          if (-column[at(i)].first > candidate) threshold = candidate;
        }
        threshold_of[at(e)] = threshold;
        for (index_t i = 0; i < capacity; ++i)
          gradient[at(column[at(i)].second)] +=
              share * std::max(0.0f, -column[at(i)].first - threshold);
      }
      const float first = 1.0f - std::pow(0.9f, static_cast<float>(step + 1)),
                  second = 1.0f - std::pow(0.999f, static_cast<float>(step + 1));
      for (std::size_t t = 0; t < at(tokens); ++t) {
        mean[t] = 0.9f * mean[t] + 0.1f * gradient[t];
        square[t] = 0.999f * square[t] + 0.001f * gradient[t] * gradient[t];
        potential[t] -= 1e-2f * mean[t] / first / (std::sqrt(square[t] / second) + 1e-8f);
      }
    }
    benchmark::DoNotOptimize(potential.data());
  }
};

// The k best of every row of that plan.
struct plain_sparse_rows {
  index_t k;
  plain_sparse plan;
  bench::plain_selection select;
  matrix row, weight;
  std::vector<expert_id> id;

  void operator()(const float* z, index_t tokens, index_t experts) {
    plan(z, tokens, experts, std::min(tokens, (2 * tokens + experts - 1) / experts));
    const float share = static_cast<float>(tokens) / static_cast<float>(experts);
    row.resize(at(experts));
    weight.resize(at(tokens * k));
    id.resize(weight.size());
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t e = 0; e < experts; ++e)
        row[at(e)] = (plan.similarity[at(t * experts + e)] + plan.potential[at(t)]) / share -
                     plan.threshold_of[at(e)];
      select.partial_sort(row.data(), experts, k, id.data() + t * k, weight.data() + t * k);
      for (index_t r = 0; r < k; ++r)
        weight[at(t * k + r)] = plan.similarity[at(t * experts + id[at(t * k + r)])];
    }
    benchmark::DoNotOptimize(weight.data());
  }
};

// The C best of every column of a balanced plan, found by std::nth_element.
struct plain_plan_columns {
  plain_plan plan;
  std::vector<std::pair<float, std::int32_t>> column;
  std::vector<std::int32_t> taken;

  void operator()(const float* z, index_t tokens, index_t experts, index_t capacity) {
    plan(z, tokens, experts);
    column.resize(at(tokens));
    taken.resize(at(experts * capacity));
    for (index_t e = 0; e < experts; ++e) {
      for (index_t t = 0; t < tokens; ++t)
        column[at(t)] = {-plan.kernel[at(t * experts + e)], static_cast<std::int32_t>(t)};
      std::nth_element(column.begin(), column.begin() + (capacity - 1), column.end());
      std::int32_t* ids = taken.data() + e * capacity;
      for (index_t c = 0; c < capacity; ++c) ids[c] = column[at(c)].second;
      std::sort(ids, ids + capacity);
    }
    benchmark::DoNotOptimize(taken.data());
  }
};

// Whole calls of a router and of a plain rule on one batch. Batches take turns, so that no branch
// has seen its data.
template <class Router, class Plain>
void compete(benchmark::State& state, const std::string& shape, index_t tokens, index_t experts,
             const Router& router, Plain plain) {
  constexpr index_t batches = 4;
  moeroute::buffer<float> logits(batches * tokens * experts);
  bench::fill(shape, batches * tokens, experts, logits.data());
  const moeroute::side_inputs side{.seed = 1};
  moeroute::workspace workspace;
  moeroute::assignment choices;
  const auto turns = [&](auto call) -> bench::turn {
    return [&, call, batch = index_t{0}](bench::stopwatch& watch) mutable {
      const float* z = logits.data() + batch * tokens * experts;
      watch.time(tokens, [&] { call(z); });
      batch = (batch + 1) % batches;
    };
  };
  std::vector<bench::competitor> list;
  list.push_back({"ours", turns([&](const float* z) {
                    moeroute::route(router, moeroute::matrix_view<const float>(z, tokens, experts),
                                    side, workspace, choices);
                  })});
  list.push_back({"baseline", turns([&](const float* z) { plain(z, tokens, experts); })});
  bench::compete(state, static_cast<double>(experts * 4), std::move(list));
}

template <class Router, class Plain>
void add(const std::string& rule, const std::string& shape, index_t tokens, index_t experts,
         Router router, Plain plain) {
  bench::entry(
      rule + "/T:" + std::to_string(tokens) + "/E:" + std::to_string(experts) + "/shape:" + shape,
      [=](benchmark::State& state) { compete(state, shape, tokens, experts, router, plain); });
}

const bool registered = [] {
  using namespace moeroute;
  sinkhorn kl{.k = 2, .weights = plan_weights::softmax, .scaling = kl_projection_scaling};
  selective_sinkhorn selective{.probability = 1.0f};
  selective.scaling.tolerance = 0.0f;
  selective.scaling.most_iterations = 20;
  sinkhorn_scaling twenty = kl_projection_scaling;
  twenty.tolerance = 0.0f;
  twenty.most_iterations = 20;
  const auto all = [&](const std::string& shape, index_t tokens, index_t experts) {
    const index_t places = std::min(tokens, (2 * tokens + experts - 1) / experts);
    add("sinkhorn_expert_choice", shape, tokens, experts,
        sinkhorn_expert_choice{.capacity = {.fixed = places}, .scaling = twenty},
        [places,
         plain = plain_plan_columns{{2, 20, 1.0f, false, {}, {}, {}, {}, {}, {}, {}}, {}, {}}](
            const float* z, index_t t, index_t e) mutable { plain(z, t, e, places); });
    add("sparse_transport_token_choice", shape, tokens, experts,
        sparse_transport_token_choice{.k = 2}, plain_sparse_rows{2, {}, {}, {}, {}, {}});
    add("kl_projection", shape, tokens, experts, kl,
        plain_plan{2, 20, 1.0f, false, {}, {}, {}, {}, {}, {}, {}});
    add("selective_sinkhorn", shape, tokens, experts, selective,
        plain_plan{2, 20, 0.05f, true, {}, {}, {}, {}, {}, {}, {}});
    add("sparse_transport", shape, tokens, experts, sparse_transport{},
        [plain = plain_sparse{}](const float* z, index_t t, index_t e) mutable {
          plain(z, t, e, std::min(t, (2 * t + e - 1) / e));
        });
  };
  for (const char* shape : bench::shapes) all(shape, 1024, 64);
  for (const index_t experts : {3, 8, 60, 256}) all("normal", 1024, experts);
  all("normal", 1, 8);
  // The plain auction knows finite logits that are not all alike only.
  for (const char* shape : {"normal", "bf16_rounded", "one_hot_expert", "zipf"})
    add("base_assignment", shape, 1024, 64, base_assignment{}, plain_auction{});
  for (const index_t experts : {8, 16, 128})
    add("base_assignment", "normal", 1024, experts, base_assignment{}, plain_auction{});
  return true;
}();

}  // namespace
