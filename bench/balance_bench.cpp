// Balancing losses, value and gradient: against plain two-pass loops, and against one pass that
// reads the logits and writes the gradient.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <moeroute/balance/loss_chunk.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>

#include "support/contest.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;
using moeroute::matrix_view;

struct subject {
  index_t tokens, experts;
  moeroute::buffer<float> logits, gradient;
  std::vector<double> counts, counts_by_sequence;
  moeroute::workspace ws;

  subject(index_t t, index_t e)
      : tokens(t),
        experts(e),
        logits(t * e),
        gradient(t * e),
        counts(static_cast<std::size_t>(e), static_cast<double>(8 * t) / static_cast<double>(e)) {
    bench::fill("normal", t, e, logits.data());
    for (std::size_t i = 0; i < counts.size(); i += 2) counts[i] *= 1.5;
    for (index_t s = 0; s < 8; ++s)
      counts_by_sequence.insert(counts_by_sequence.end(), counts.begin(), counts.end());
  }
  matrix_view<const float> z() const { return {logits.data(), tokens, experts}; }
  matrix_view<float> dz() { return {gradient.data(), tokens, experts}; }
};

// Every row read and, from what was read, written: what no gradient can do without.
void read_and_write(const subject& s, float* out) {
  using F = moeroute::simd::vfloat<>;
  constexpr index_t w = F::size;
  const F factor(0.5f);
  const index_t n = s.tokens * s.experts;
  for (index_t i = 0; i + w <= n; i += w)
    (F::load_unaligned(s.logits.data() + i) * factor).store_unaligned(out + i);
}

// The exponentials that a softmax needs, from cache to cache.
void exponentials(const subject& s, float* out) {
  for (index_t t = 0; t < s.tokens; ++t)
    moeroute::simd::map_row<moeroute::simd::default_arch>(
        s.logits.data() + t * s.experts, s.experts, out,
        [](auto x) { return moeroute::simd::exp_nonpositive<moeroute::simd::default_arch>(x); });
}

// Pass 1: the softmax into the gradient, and its column sums. slopes(sums) gives dvalue/dsum. Pass
// 2: p (c - sum p c).
template <class Slopes>
double plain(const subject& s, float* out, Slopes slopes) {
  std::vector<float> sum(static_cast<std::size_t>(s.experts), 0.0f), c(sum);
  for (index_t t = 0; t < s.tokens; ++t) {
    const float* z = s.logits.data() + t * s.experts;
    float* p = out + t * s.experts;
    const float top = *std::max_element(z, z + s.experts);
    float all = 0.0f;
    for (index_t e = 0; e < s.experts; ++e) all += p[e] = std::exp(z[e] - top);
    for (index_t e = 0; e < s.experts; ++e) sum[static_cast<std::size_t>(e)] += p[e] = p[e] / all;
  }
  const double value = slopes(sum, c);
  for (index_t t = 0; t < s.tokens; ++t) {
    float* p = out + t * s.experts;
    float mean = 0.0f;
    for (index_t e = 0; e < s.experts; ++e) mean += p[e] * c[static_cast<std::size_t>(e)];
    for (index_t e = 0; e < s.experts; ++e) p[e] *= c[static_cast<std::size_t>(e)] - mean;
  }
  return value;
}

template <class F>
bench::turn whole(index_t tokens, F f) {
  return [=](bench::stopwatch& watch) { watch.time(tokens, f); };
}

// The same for the scores of sqrt-softplus: an exponential, a logarithm and a root.
void roots(const subject& s, float* out) {
  using A = moeroute::simd::default_arch;
  for (index_t t = 0; t < s.tokens; ++t)
    moeroute::simd::map_row<A>(s.logits.data() + t * s.experts, s.experts, out,
                               [](auto x) { return moeroute::simd::sqrt_softplus<A>(x); });
}

// Ours against the plain loops; the time allowed is three floors and one pass of the scores.
template <class Ours, class Scores>
void compete(benchmark::State& state, index_t tokens, index_t experts, Ours ours, Scores scores) {
  subject s(tokens, experts);
  const auto slopes = [&](const std::vector<float>& sum, std::vector<float>& c) {
    double value = 0.0;
    const double factor = 0.01 * static_cast<double>(experts) /
                          (8.0 * static_cast<double>(tokens) * static_cast<double>(tokens));
    for (std::size_t e = 0; e < c.size(); ++e) {
      c[e] = static_cast<float>(factor * s.counts[e]);
      value += static_cast<double>(c[e]) * static_cast<double>(sum[e]);
    }
    return value;
  };
  moeroute::buffer<float> other(tokens * experts);
  bench::compete(
      state, static_cast<double>(experts) * 4.0,
      {{"ours", whole(tokens, [&] { benchmark::DoNotOptimize(ours(s)); })},
       {"floor", whole(tokens, [&] { read_and_write(s, other.data()); })},
       {"baseline",
        whole(tokens, [&] { benchmark::DoNotOptimize(plain(s, other.data(), slopes)); })},
       {"scores", whole(tokens, [&] { scores(s, other.data()); })}});
  const double allowed = 3.0 * static_cast<double>(state.counters["floor_ns_per_token"]) +
                         static_cast<double>(state.counters["scores_ns_per_token"]);
  state.counters["x_allowed"] = static_cast<double>(state.counters["ns_per_token"]) / allowed;
}

template <class Ours>
void add(const std::string& name, Ours ours,
         void (*scores)(const subject&, float*) = exponentials) {
  for (const index_t experts : {64, 256})
    bench::entry("loss/" + name + "/T:4096/E:" + std::to_string(experts),
                 [=](benchmark::State& state) { compete(state, 4096, experts, ours, scores); });
}

// One call of the engine.
template <class... Loss>
double engine(subject& s, const moeroute::loss_options& how, const Loss&... losses) {
  return moeroute::balance_loss(how, s.z(), s.dz(), s.ws, moeroute::serial{}, losses...).total();
}

const bool registered = [] {
  using namespace moeroute;
  add("switch", [](subject& s) { return engine(s, {}, switch_loss::megatron(0.01, s.counts, 8)); });
  add("switch_sigmoid", [](subject& s) {
    return engine(s, {.scores = probability::normalized_sigmoid},
                  switch_loss::megatron(0.01, s.counts, 8));
  });
  add(
      "switch_sqrt_softplus",
      [](subject& s) {
        return engine(s, {.scores = probability::normalized_sqrt_softplus},
                      switch_loss::megatron(0.01, s.counts, 8));
      },
      roots);
  add("sequence", [](subject& s) {
    const matrix_view<const double> counts(s.counts_by_sequence.data(), 8, s.experts);
    return engine(s, {.sequence_length = s.tokens / 8}, sequence_loss{.counts = counts, .k = 8});
  });
  add("router_z", [](subject& s) { return engine(s, {}, router_z_loss{}); });
  add("token_entropy", [](subject& s) { return engine(s, {}, token_entropy_loss{}); });
  add("tsallis", [](subject& s) { return engine(s, {}, tsallis_loss{}); });
  add("sparsity", [](subject& s) { return engine(s, {}, sparsity_loss{}); });
  add("importance", [](subject& s) { return engine(s, {}, importance_loss{}); });
  add("batch_entropy", [](subject& s) { return engine(s, {}, batch_entropy_loss{}); });
  add("switch_and_z", [](subject& s) {
    return engine(s, {}, switch_loss::megatron(0.01, s.counts, 8), router_z_loss{});
  });
  add("relu_load",
      [](subject& s) { return relu_balance_loss({.k = 8}, {}, s.z(), s.dz(), s.ws, serial{}); });
  add("share_balance",
      [](subject& s) { return share_balance({}, {}, s.z(), s.dz(), s.ws, serial{}); });
  return true;
}();

}  // namespace
