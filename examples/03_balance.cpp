// Which way of balancing gets there first, and at what cost: the bundled model's router logits,
// batch by batch, under seven methods. Writes a table and one picture.
//
//   balance [PAGE.html [MODEL]]
#include "support/chart.hpp"
#include "support/traces.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/balance/loss.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/quantile.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

namespace {

using namespace moeroute;
using logits_view = matrix_view<const float>;

constexpr index_t batch = 1024, steps = 300, k = example::trace_k;

// One layer: all domains' tokens, shuffled once, so that every batch holds some of each.
struct layer {
  index_t tokens = 0, experts = 0;
  std::vector<float> logits, scores;  // scores: their softmax

  [[nodiscard]] static logits_view rows(const std::vector<float>& of, index_t first, index_t n,
                                        index_t experts) {
    return {of.data() + first * experts, n, experts};
  }
  [[nodiscard]] index_t first_of(index_t step) const { return step % (tokens / batch) * batch; }
};

layer make_layer(const std::vector<example::router_trace>& traces, index_t number) {
  layer made;
  made.experts = traces[0].experts;
  std::vector<const float*> rows;
  for (const auto& trace : traces)
    for (index_t t = 0; t < trace.tokens; ++t) rows.push_back(trace.layer(number).row(t));
  std::mt19937 random(7);
  for (std::size_t i = rows.size() - 1; i > 0; --i) std::swap(rows[i], rows[random() % (i + 1)]);
  for (const float* row : rows) made.logits.insert(made.logits.end(), row, row + made.experts);
  made.tokens = static_cast<index_t>(rows.size());
  made.scores.resize(made.logits.size());
  for (index_t t = 0; t < made.tokens; ++t)
    softmax{}.score_row(made.logits.data() + t * made.experts, made.experts,
                        made.scores.data() + t * made.experts);
  return made;
}

// The load of the whole text under a router.
template <class Router>
double violation(const Router& router, const layer& l, index_t piece, workspace& ws) {
  load_meter meter(l.experts);
  assignment choices;
  for (index_t t = 0; t < l.tokens; t += piece) {
    route(router, layer::rows(l.logits, t, std::min(piece, l.tokens - t), l.experts), ws, choices);
    meter.add(choices);
  }
  return meter.global_max_violation();
}

// Chooses by logit + bias: the one place where every method may put its correction.
router<identity_score> biased(std::span<const float> bias) {
  return {
      .score = {}, .selection = {.k = k}, .weight = sum_normalized, .bias = selection_bias(bias)};
}

struct method {
  std::string name, note;
  // Sees batches of one layer; fills curve[0, steps] and returns the median ns per token and step.
  std::function<double(const layer&, std::vector<double>& curve)> run;
};

double median(std::vector<double>& list) {
  const auto middle = list.begin() + static_cast<std::ptrdiff_t>(list.size() / 2);
  std::nth_element(list.begin(), middle, list.end());
  return *middle;
}

// Runs update(step) for all steps, timing it, and looks at the whole text after each.
template <class Update, class Look>
double run_steps(std::vector<double>& curve, Update&& update, Look&& look) {
  std::vector<double> times;
  curve.push_back(look());
  for (index_t step = 0; step < steps; ++step) {
    const auto begin = std::chrono::steady_clock::now();
    update(step);
    const auto end = std::chrono::steady_clock::now();
    times.push_back(std::chrono::duration<double, std::nano>(end - begin).count() / batch);
    // The early steps decide, the late ones are looked at now and then.
    const bool looked = step < 50 || step % 5 == 4;
    curve.push_back(looked ? look() : curve.back());
  }
  return median(times);
}

method bias_method(const std::string& name, const bias_options& options) {
  return {name, "counts of the batch just routed", [options](const layer& l, auto& curve) {
            bias_controller controller(l.experts, options);
            workspace ws;
            assignment choices;
            std::vector<std::int64_t> counts(static_cast<std::size_t>(l.experts));
            // Routing happens anyway: what balancing adds is the counting and the update.
            std::vector<double> times;
            run_steps(
                curve,
                [&](index_t step) {
                  route(biased(controller.bias()),
                        layer::rows(l.logits, l.first_of(step), batch, l.experts), ws, choices);
                  const auto begin = std::chrono::steady_clock::now();
                  count_choices(choices, {}, std::span(counts));
                  controller.update(counts);
                  const auto end = std::chrono::steady_clock::now();
                  times.push_back(std::chrono::duration<double, std::nano>(end - begin).count() /
                                  batch);
                },
                [&] { return violation(biased(controller.bias()), l, l.tokens, ws); });
            return median(times);
          }};
}

method bip_method() {
  return {"BIP, 2 iterations", "scores of the batch, before it is routed",
          [](const layer& l, auto& curve) {
            bip_balancer balancer(l.experts, {.k = k, .iterations = 2});
            workspace ws, looking;
            // Its prices are of shares: never negative, so scores must not be either.
            const auto on_softmax = [](std::span<const float> bias) {
              return router<softmax>{.score = {},
                                     .selection = {.k = k},
                                     .weight = sum_normalized,
                                     .bias = selection_bias(bias)};
            };
            return run_steps(
                curve,
                [&](index_t step) {
                  balancer.update(layer::rows(l.scores, l.first_of(step), batch, l.experts), ws);
                },
                [&] { return violation(on_softmax(balancer.bias()), l, l.tokens, looking); });
          }};
}

method quantile_method(const std::string& name, float ema) {
  return {name, "scores of the batch", [ema](const layer& l, auto& curve) {
            quantile_balancer balancer(l.experts, {.k = k, .ema = ema});
            workspace ws, looking;
            return run_steps(
                curve,
                [&](index_t step) {
                  balancer.observe(layer::rows(l.logits, l.first_of(step), batch, l.experts), ws);
                  balancer.update();
                },
                [&] { return violation(biased(balancer.bias()), l, l.tokens, looking); });
          }};
}

// Keeps nothing: every batch is balanced anew, and a step is one more iteration.
method sinkhorn_method() {
  return {"Sinkhorn", "per batch; a step is one iteration more", [](const layer& l, auto& curve) {
            workspace ws;
            assignment choices;
            sinkhorn rule{.k = k};
            rule.scaling.tolerance = 0.0f;
            curve.push_back(violation(biased({}), l, l.tokens, ws));
            for (index_t n = 1; n <= steps; ++n) {
              rule.scaling.most_iterations = n;
              const bool looked = n <= 30 || n == 50 || n == 100;
              curve.push_back(looked ? violation(rule, l, batch, ws) : curve.back());
            }
            // What a batch costs when it is stopped after 10, less a plain routing.
            rule.scaling.most_iterations = 10;
            std::vector<double> balanced, plain;
            for (index_t step = 0; step < 40; ++step) {
              const auto rows = layer::rows(l.logits, l.first_of(step), batch, l.experts);
              const auto begin = std::chrono::steady_clock::now();
              route(rule, rows, ws, choices);
              const auto middle = std::chrono::steady_clock::now();
              route(biased({}), rows, ws, choices);
              const auto end = std::chrono::steady_clock::now();
              balanced.push_back(std::chrono::duration<double, std::nano>(middle - begin).count());
              plain.push_back(std::chrono::duration<double, std::nano>(end - middle).count());
            }
            return std::max(0.0, median(balanced) - median(plain)) / batch;
          }};
}

// Descent on an offset of the logits, all that the loss could move here; a training would move the
// gate's weights and the hidden states with it.
method loss_method(const std::string& name, double rate) {
  return {name, "gradient of the Switch loss", [rate](const layer& l, auto& curve) {
            std::vector<float> offset(static_cast<std::size_t>(l.experts), 0.0f), shifted, gradient;
            shifted.resize(static_cast<std::size_t>(batch * l.experts));
            gradient.resize(shifted.size());
            std::vector<double> counts(offset.size());
            workspace ws, looking;
            assignment choices;
            std::vector<double> times;
            run_steps(
                curve,
                [&](index_t step) {
                  const auto rows = layer::rows(l.logits, l.first_of(step), batch, l.experts);
                  route(biased(offset), rows, ws, choices);
                  for (index_t t = 0; t < batch; ++t)
                    for (index_t e = 0; e < l.experts; ++e)
                      shifted[static_cast<std::size_t>(t * l.experts + e)] =
                          rows(t, e) + offset[static_cast<std::size_t>(e)];
                  const auto begin = std::chrono::steady_clock::now();
                  count_choices(choices, {}, std::span(counts));
                  balance_loss<float>(loss_options{}, logits_view(shifted.data(), batch, l.experts),
                                      matrix_view<float>(gradient.data(), batch, l.experts),
                                      looking, serial{}, switch_loss::megatron(1.0, counts, k));
                  const auto end = std::chrono::steady_clock::now();
                  times.push_back(std::chrono::duration<double, std::nano>(end - begin).count() /
                                  batch);
                  for (index_t t = 0; t < batch; ++t)
                    for (index_t e = 0; e < l.experts; ++e)
                      offset[static_cast<std::size_t>(e)] -=
                          static_cast<float>(rate) *
                          gradient[static_cast<std::size_t>(t * l.experts + e)];
                },
                [&] { return violation(biased(offset), l, l.tokens, ws); });
            return median(times);
          }};
}

// The first step from which on the curve stays below the bound; -1: none.
index_t settled(const std::vector<double>& curve, double bound) {
  index_t first = static_cast<index_t>(curve.size());
  while (first > 0 && curve[static_cast<std::size_t>(first - 1)] < bound) --first;
  return first == static_cast<index_t>(curve.size()) ? -1 : first;
}

int run(int argc, char** argv) {
  const std::string page = argc > 1 ? argv[1] : "build/balance.html";
  const auto traces = example::read_traces(argc > 2 ? argv[2] : "examples/model");
  const std::vector<method> methods{
      bias_method("sign bias, u = 0.01", {.step = 1e-2f}),
      bias_method("sign bias, u = 0.1", {.step = 1e-1f}),
      bias_method("proportional bias, u = 0.1", {.rule = bias_rule::proportional, .step = 1e-1f}),
      bip_method(),
      quantile_method("quantile", 0.0f),
      quantile_method("quantile, averaged 0.9", 0.9f),
      sinkhorn_method(),
      loss_method("auxiliary loss, rate 1", 1.0)};

  const index_t layers = traces[0].layers;
  std::vector<example::chart_line> lines;
  std::vector<double> costs(methods.size(), 0.0);
  for (const method& m : methods)
    lines.push_back({m.name, std::vector<double>(static_cast<std::size_t>(steps + 1), 0.0)});
  for (index_t number = 0; number < layers; ++number) {
    const layer l = make_layer(traces, number);
    for (std::size_t i = 0; i < methods.size(); ++i) {
      std::vector<double> curve;
      costs[i] += methods[i].run(l, curve) / static_cast<double>(layers);
      for (std::size_t s = 0; s < curve.size(); ++s)
        lines[i].values[s] += curve[s] / static_cast<double>(layers);
    }
  }

  const auto text = [](index_t step) {
    return step < 0 ? std::string("never") : std::to_string(step);
  };
  example::chart_table table{.head = {"method", "steps to 0.5", "steps to 0.2", "MaxVio at the end",
                                      "ns per token", "learns from"},
                             .rows = {}};
  std::size_t fastest = 0;
  for (std::size_t i = 0; i < methods.size(); ++i) {
    const auto& curve = lines[i].values;
    table.rows.push_back({methods[i].name, text(settled(curve, 0.5)), text(settled(curve, 0.2)),
                          example::detail::fixed(curve.back(), 3),
                          example::detail::fixed(costs[i], 1), methods[i].note});
    const auto steps_of = [&](std::size_t m) {
      const index_t n = settled(lines[m].values, 0.2);
      return n < 0 ? std::numeric_limits<index_t>::max() : n;
    };
    if (steps_of(i) < steps_of(fastest) ||
        (steps_of(i) == steps_of(fastest) && costs[i] < costs[fastest]))
      fastest = i;
  }
  const index_t best = settled(lines[fastest].values, 0.2);
  const std::string verdict =
      best < 0 ? "No method stays below a MaxVio of 0.2."
               : "Fastest to stay below a MaxVio of 0.2: " + methods[fastest].name + ", after " +
                     std::to_string(best) + (best == 1 ? " step" : " steps") + ", for " +
                     example::detail::fixed(costs[fastest], 1) + " ns per token and step.";
  const std::string lead =
      "Router logits of a trained model (" + std::to_string(layers) + " layers, " +
      std::to_string(traces[0].experts) + " experts, " + std::to_string(k) +
      " per token) on three kinds of text. A step sees a batch of 1024 tokens; MaxVio, the busiest "
      "expert's load over the mean less one, is that of all 6144 tokens, averaged over layers. " +
      verdict;
  example::write_markdown(std::cout, table);
  std::cout << verdict << "\nwritten: " << page << '\n';
  example::save_page(page, "How fast each method balances", lead, [&](std::ostream& out) {
    example::write_lines(out, lines, "steps", "MaxVio", 0.02, 6.0);
    example::write_html(out, table);
    out << "<p class=\"note\">The router itself does not learn here: what training would do to the "
           "logits is left out, for every method alike. Costs are medians of one thread and come "
           "on "
           "top of routing; that of Sinkhorn is of 10 iterations.</p>\n";
  });
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "balance: " << e.what() << '\n';
    return 2;
  }
}
