// Balancing losses, value and gradient: against plain loops, and against one pass that reads the
// logits and writes the gradient.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <moeroute/balance/loss_chunk.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/loss_load.hpp>
#include <moeroute/balance/loss_prior.hpp>
#include <moeroute/balance/loss_relu.hpp>
#include <moeroute/balance/loss_selected.hpp>
#include <moeroute/balance/loss_sums.hpp>
#include <moeroute/balance/loss_token.hpp>

#include "support/contest.hpp"
#include "support/moving.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;
using moeroute::matrix_view;

struct subject {
  index_t tokens, experts;
  moeroute::buffer<float> logits, gradient;
  moeroute::buffer<float> noisy;  // the logits under noise of sigma 1 / E
  std::vector<double> counts, counts_by_sequence, device_counts;
  std::vector<std::int32_t> previous;
  moeroute::assignment choices;
  moeroute::workspace ws;

  subject(index_t t, index_t e)
      : tokens(t),
        experts(e),
        logits(t * e),
        gradient(t * e),
        noisy(t * e),
        counts(static_cast<std::size_t>(e), static_cast<double>(8 * t) / static_cast<double>(e)),
        device_counts(8, static_cast<double>(3 * t) / 8.0),
        choices(bench::make_assignment("normal", t, e, 8)) {
    bench::fill("normal", t, e, logits.data());
    bench::fill("normal", t, e, noisy.data());
    for (index_t i = 0; i < t * e; ++i)
      noisy.data()[i] = logits.data()[i] + noisy.data()[t * e - 1 - i] * sigma();
    for (index_t i = 0; i < t; ++i) previous.push_back(static_cast<std::int32_t>(i) - 1);
    for (std::size_t i = 0; i < counts.size(); i += 2) counts[i] *= 1.5;
    for (index_t s = 0; s < 8; ++s)
      counts_by_sequence.insert(counts_by_sequence.end(), counts.begin(), counts.end());
  }
  float sigma() const { return 1.0f / static_cast<float>(experts); }
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

// The same for a loss of counts: the slopes are known.
double plain_counts(const subject& s, float* out) {
  return plain(s, out, [&](const std::vector<float>& sum, std::vector<float>& c) {
    double value = 0.0;
    const double factor = 0.01 * static_cast<double>(s.experts) /
                          (8.0 * static_cast<double>(s.tokens) * static_cast<double>(s.tokens));
    for (std::size_t e = 0; e < c.size(); ++e) {
      c[e] = static_cast<float>(factor * s.counts[e]);
      value += static_cast<double>(c[e]) * static_cast<double>(sum[e]);
    }
    return value;
  });
}

// ReMoE's: sums and counts of what is positive, then the slope where it is.
double plain_relu(const subject& s, float* out) {
  std::vector<float> sum(static_cast<std::size_t>(s.experts), 0.0f), slope(sum);
  for (index_t t = 0; t < s.tokens; ++t)
    for (index_t e = 0; e < s.experts; ++e)
      if (const float x = s.logits.data()[t * s.experts + e]; x > 0.0f) {
        sum[static_cast<std::size_t>(e)] += x;
        slope[static_cast<std::size_t>(e)] += 1e-9f;
      }
  double value = 0.0;
  for (std::size_t e = 0; e < sum.size(); ++e)
    value += static_cast<double>(sum[e]) * static_cast<double>(slope[e]);
  for (index_t t = 0; t < s.tokens; ++t)
    for (index_t e = 0; e < s.experts; ++e)
      out[t * s.experts + e] =
          s.logits.data()[t * s.experts + e] > 0.0f ? slope[static_cast<std::size_t>(e)] : 0.0f;
  return value;
}

// BlockFFN's shares of a row into out; returns 1 / (their divisor).
float plain_shares(const float* z, index_t experts, float* out) {
  float sum = 0.0f, squares = 0.0f;
  for (index_t e = 0; e < experts; ++e) {
    const float r = std::max(z[e], 0.0f);
    sum += r;
    squares += r * r;
  }
  const float rho = std::sqrt(squares / static_cast<float>(experts) + 1e-6f);
  const float scale = 1.0f / (sum + 1e-5f * rho);
  for (index_t e = 0; e < experts; ++e) out[e] = std::max(z[e], 0.0f) * scale;
  return scale;
}

double plain_share_balance(const subject& s, float* out) {
  std::vector<float> sum(static_cast<std::size_t>(s.experts), 0.0f), load(sum),
      scale(static_cast<std::size_t>(s.tokens));
  for (index_t t = 0; t < s.tokens; ++t) {
    float* const share = out + t * s.experts;
    scale[static_cast<std::size_t>(t)] =
        plain_shares(s.logits.data() + t * s.experts, s.experts, share);
    for (index_t e = 0; e < s.experts; ++e) {
      sum[static_cast<std::size_t>(e)] += share[e];
      load[static_cast<std::size_t>(e)] += share[e] > 0.0f ? 1.0f : 0.0f;
    }
  }
  double value = 0.0;
  for (std::size_t e = 0; e < sum.size(); ++e)
    value += static_cast<double>(sum[e]) * static_cast<double>(load[e]);
  for (index_t t = 0; t < s.tokens; ++t) {
    float* const share = out + t * s.experts;
    float mean = 0.0f;
    for (index_t e = 0; e < s.experts; ++e) mean += load[static_cast<std::size_t>(e)] * share[e];
    for (index_t e = 0; e < s.experts; ++e)
      share[e] = share[e] > 0.0f ? (load[static_cast<std::size_t>(e)] - mean) *
                                       scale[static_cast<std::size_t>(t)]
                                 : 0.0f;
  }
  return value;
}

double plain_chunk_sparsity(const subject& s, float* out) {
  std::vector<float> product(static_cast<std::size_t>(s.experts));
  double value = 0.0;
  for (index_t first = 0; first < s.tokens; first += 64) {
    std::fill(product.begin(), product.end(), 1.0f);
    float scale[64];
    for (index_t i = 0; i < 64; ++i) {
      float* const share = out + (first + i) * s.experts;
      scale[i] = plain_shares(s.logits.data() + (first + i) * s.experts, s.experts, share);
      for (index_t e = 0; e < s.experts; ++e)
        product[static_cast<std::size_t>(e)] *= 1.0f - share[e] + 1e-5f;
    }
    for (const float p : product) value += static_cast<double>(1.0f - p);
    for (index_t i = 0; i < 64; ++i) {
      float* const share = out + (first + i) * s.experts;
      float mean = 0.0f;
      const auto pull = [&](index_t e) {
        return product[static_cast<std::size_t>(e)] / (1.0f - share[e] + 1e-5f);
      };
      for (index_t e = 0; e < s.experts; ++e) mean += pull(e) * share[e];
      for (index_t e = 0; e < s.experts; ++e)
        share[e] = share[e] > 0.0f ? (pull(e) - mean) * scale[i] : 0.0f;
    }
  }
  return value;
}

double plain_locality(const subject& s, float* out) {
  std::fill_n(out, s.tokens * s.experts, 0.0f);
  double value = 0.0;
  for (index_t t = 1; t < s.tokens; ++t)
    for (index_t e = 0; e < s.experts; ++e) {
      const index_t at = t * s.experts + e, before = at - s.experts;
      const float a = 100.0f * s.logits.data()[before], b = 100.0f * s.logits.data()[at];
      const float y = 1.0f / (1.0f + std::exp(-b)), guess = 1.0f / (1.0f + std::exp(-a));
      value += static_cast<double>(std::max(a, 0.0f) + std::log1p(std::exp(-std::abs(a))) - a * y);
      out[before] += guess - y;
      out[at] -= a * y * (1.0f - y);
    }
  return value;
}

double plain_load(const subject& s, float* out) {
  constexpr std::size_t k = 8;
  std::vector<float> load(static_cast<std::size_t>(s.experts), 0.0f), order(load);
  std::vector<float> threshold(static_cast<std::size_t>(2 * s.tokens));
  const float inverse = 1.0f / s.sigma();
  const auto bound = [&](index_t t, index_t e) {
    const float* const th = threshold.data() + 2 * t;
    return s.noisy.data()[t * s.experts + e] >= th[0] ? th[1] : th[0];
  };
  for (index_t t = 0; t < s.tokens; ++t) {
    const float* const z = s.logits.data() + t * s.experts;
    std::copy_n(s.noisy.data() + t * s.experts, s.experts, order.data());
    std::partial_sort(order.begin(), order.begin() + k + 1, order.end(), std::greater<>());
    std::copy_n(order.data() + k - 1, 2, threshold.data() + 2 * t);
    for (index_t e = 0; e < s.experts; ++e)
      load[static_cast<std::size_t>(e)] +=
          0.5f * std::erfc((bound(t, e) - z[e]) * inverse * 0.70710678f);
  }
  for (index_t t = 0; t < s.tokens; ++t)
    for (index_t e = 0; e < s.experts; ++e) {
      const index_t at = t * s.experts + e;
      const float u = (s.logits.data()[at] - bound(t, e)) * inverse;
      out[at] = load[static_cast<std::size_t>(e)] * std::exp(-0.5f * u * u) * inverse;
    }
  return static_cast<double>(load[0]);
}

// What the functions of the scores need, from cache to cache.
void roots(const subject& s, float* out) {
  using A = moeroute::simd::default_arch;
  for (index_t t = 0; t < s.tokens; ++t)
    moeroute::simd::map_row<A>(s.logits.data() + t * s.experts, s.experts, out,
                               [](auto x) { return moeroute::simd::sqrt_softplus<A>(x); });
}
void sigmoids_and_softplus(const subject& s, float* out) {
  using A = moeroute::simd::default_arch;
  for (index_t t = 0; t < s.tokens; ++t)
    moeroute::simd::map_row<A>(s.logits.data() + t * s.experts, s.experts, out, [](auto x) {
      return moeroute::simd::sigmoid<A>(x) + moeroute::simd::sigmoid<A>(x + x) +
             moeroute::simd::softplus<A>(x);
    });
}
// Thresholds among the noisy logits, then an error function and an exponential.
void normal_distributions(const subject& s, float* out) {
  using A = moeroute::simd::default_arch;
  float value[9 * 16];
  std::int32_t column[9 * 16];
  for (index_t t = 0; t < s.tokens; t += 16) {
    moeroute::simd::top_k_block<A>(s.noisy.data() + t * s.experts, s.experts, 16, s.experts, 9,
                                   value, column, nullptr);
    benchmark::DoNotOptimize(column[8]);
    for (index_t i = t; i < t + 16; ++i)
      moeroute::simd::map_row<A>(s.logits.data() + i * s.experts, s.experts, out, [](auto x) {
        using Of = moeroute::simd::of_lanes<A>;
        return Of::normal_cdf(x) + Of::normal_density(x);
      });
  }
}
// Every column sorted by value and token, and a beta distribution and its density of every value.
void prior_distributions(const subject& s, float* out) {
  const double n = static_cast<double>(s.experts);
  const moeroute::beta_distribution prior(1.0, n - 1.0);
  std::vector<std::pair<double, index_t>> column(static_cast<std::size_t>(s.tokens));
  for (index_t e = 0; e < s.experts; ++e) {
    for (index_t t = 0; t < s.tokens; ++t)
      column[static_cast<std::size_t>(t)] = {s.logits.data()[t * s.experts + e], t};
    std::sort(column.begin(), column.end());
    for (const auto& [x, t] : column) {
      const double p = std::exp(x) / (1.6 * n);
      *out = static_cast<float>(prior.cdf(std::min(p, 0.9)) + prior.pdf(std::min(p, 0.9)));
      benchmark::DoNotOptimize(*out);
    }
  }
}

template <class F>
bench::turn whole(index_t tokens, F f) {
  return [=](bench::stopwatch& watch) { watch.time(tokens, f); };
}

using pass = void (*)(const subject&, float*);
using plain_loss = double (*)(const subject&, float*);

// Ours against plain loops; the time allowed is three floors and one pass of the scores, where
// there are any.
template <class Ours>
void compete(benchmark::State& state, index_t tokens, index_t experts, Ours ours, pass scores,
             plain_loss baseline) {
  subject s(tokens, experts);
  moeroute::buffer<float> other(tokens * experts);
  std::vector<bench::competitor> list{
      {"ours", whole(tokens, [&] { benchmark::DoNotOptimize(ours(s)); })},
      {"floor", whole(tokens, [&] { read_and_write(s, other.data()); })}};
  if (baseline != nullptr)
    list.push_back(
        {"baseline", whole(tokens, [&] { benchmark::DoNotOptimize(baseline(s, other.data())); })});
  if (scores != nullptr)
    list.push_back({"scores", whole(tokens, [&] { scores(s, other.data()); })});
  bench::compete(state, static_cast<double>(experts) * 4.0, std::move(list));
  const auto ns = [&](const char* name) { return static_cast<double>(state.counters[name]); };
  const double allowed =
      3.0 * ns("floor_ns_per_token") + (scores != nullptr ? ns("scores_ns_per_token") : 0.0);
  state.counters["x_allowed"] = ns("ns_per_token") / allowed;
}

template <class Ours>
void add(const std::string& name, Ours ours, pass scores = exponentials,
         plain_loss baseline = plain_counts) {
  for (const index_t experts : {64, 256})
    bench::entry(
        "loss/" + name + "/T:4096/E:" + std::to_string(experts),
        [=](benchmark::State& state) { compete(state, 4096, experts, ours, scores, baseline); });
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
  add("mean_importance", [](subject& s) { return engine(s, {}, mean_importance_loss{}); });
  add("device", [](subject& s) {
    return engine(s, {}, device_loss{.counts = s.counts, .k = 8, .devices = 8});
  });
  add("communication", [](subject& s) {
    return engine(s, {}, communication_loss{.counts = s.device_counts, .devices_per_token = 3});
  });
  add("specialisation", [](subject& s) {
    return engine(s, {}, specialisation_loss{.sharpness = 0.01, .counts = s.counts});
  });
  add(
      "relu_load",
      [](subject& s) { return relu_balance_loss({.k = 8}, {}, s.z(), s.dz(), s.ws, serial{}); },
      nullptr, plain_relu);
  add(
      "share_balance",
      [](subject& s) { return share_balance({}, {}, s.z(), s.dz(), s.ws, serial{}); }, nullptr,
      plain_share_balance);
  add(
      "chunk_sparsity",
      [](subject& s) { return chunk_sparsity({}, {}, s.z(), s.dz(), s.ws, serial{}); }, nullptr,
      plain_chunk_sparsity);
  add(
      "activation_locality",
      [](subject& s) { return activation_locality({.neighbour = s.previous}, {}, s.z(), s.dz()); },
      sigmoids_and_softplus, plain_locality);
  add(
      "noisy_load",
      [](subject& s) {
        const float sigma = s.sigma();
        return noisy_load_loss<float>({.k = 8}, {}, s.z(), {s.noisy.data(), s.tokens, s.experts},
                                      {&sigma, 1, 1}, s.dz(), s.ws, serial{});
      },
      normal_distributions, plain_load);
  add(
      "selected_importance",
      [](subject& s) {
        return selected_importance_loss({}, drop_stage::before_drop, {}, s.choices, s.z(), s.dz(),
                                        s.ws, serial{});
      },
      exponentials, nullptr);
  add(
      "stable_moe",
      [](subject& s) {
        return stable_moe_loss(0.3, s.counts, drop_stage::before_drop, {}, s.choices, s.z(),
                               s.dz());
      },
      exponentials, nullptr);
  bench::entry("loss/dirichlet_prior/T:512/E:64", [](benchmark::State& state) {
    const std::vector<double> alpha(64, 1.0);
    const auto ours = [&](subject& s) {
      return dirichlet_prior({.alpha = alpha}, {}, s.z(), s.dz(), s.ws, serial{});
    };
    compete(state, 512, 64, ours, prior_distributions, nullptr);
  });
  return true;
}();

}  // namespace
