// Which way of balancing to take: the bundled model's router logits, batch by batch, under every
// method, with the choice made on logits, on sigmoids and on probabilities. Writes the tables of
// docs/balancing.md and a page with pictures.
//
//   balance [PAGE.html [MODEL [STEPS]]]
//
// Exit code 1 where what docs/balancing.md advises no longer holds.
#include "support/chart.hpp"
#include "support/placed_words.hpp"
#include "support/traces.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/balance/loss.hpp>
#include <moeroute/balance/loss_count.hpp>
#include <moeroute/balance/quantile.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/route.hpp>

namespace {

using namespace moeroute;
using values_view = matrix_view<const float>;

constexpr index_t batch = 1024, k = example::trace_k;

// What the choice is made on. The order within a row is the same; the unit of a bias is not.
enum space { logits, sigmoids, probabilities, spaces };
constexpr std::array<const char*, spaces> space_names{"logits", "sigmoid scores", "softmax scores"};

// One layer: all domains' tokens, shuffled once, so that every batch holds some of each.
struct layer {
  index_t tokens = 0, experts = 0;
  std::array<std::vector<float>, spaces> values;

  values_view rows(space of, index_t first, index_t n) const {
    return {values[of].data() + first * experts, n, experts};
  }
  values_view all(space of) const { return rows(of, 0, tokens); }
  values_view step(space of, index_t s) const {
    return rows(of, s % (tokens / batch) * batch, batch);
  }
};

layer make_layer(const std::vector<example::router_trace>& traces, index_t number) {
  layer made;
  made.experts = traces[0].experts;
  std::vector<const float*> rows;
  for (const auto& trace : traces)
    for (index_t t = 0; t < trace.tokens; ++t) rows.push_back(trace.layer(number).row(t));
  std::mt19937 random(7);
  for (std::size_t i = rows.size() - 1; i > 0; --i) std::swap(rows[i], rows[random() % (i + 1)]);
  for (const float* row : rows)
    made.values[logits].insert(made.values[logits].end(), row, row + made.experts);
  made.tokens = static_cast<index_t>(rows.size());
  for (auto& list : made.values) list.resize(made.values[logits].size());
  for (index_t t = 0; t < made.tokens; ++t) {
    const float* const row = made.values[logits].data() + t * made.experts;
    sigmoid{}.score_row(row, made.experts, made.values[sigmoids].data() + t * made.experts);
    softmax{}.score_row(row, made.experts, made.values[probabilities].data() + t * made.experts);
  }
  return made;
}

// Chooses by value + bias: the one place where every method may put its correction.
router<identity_score> biased(std::span<const float> bias) {
  router<identity_score> rule{.score = {}, .selection = {.k = k}, .weight = sum_normalized};
  rule.bias = selection_bias(bias);
  return rule;
}

// MaxVio of what was routed: the busiest expert's load over the mean, less one.
class load_of_pass {
 public:
  explicit load_of_pass(index_t experts, index_t batches)
      : counts_(static_cast<std::size_t>(batches)), experts_(experts) {}

  double add(const assignment& choices) {
    std::vector<std::int64_t>& now = counts_[next_++ % counts_.size()];
    now.assign(static_cast<std::size_t>(experts_), 0);
    count_choices(choices, {}, std::span(now));
    return violation({&now, 1});
  }
  // Of the last batches together, as many as the text has.
  double pass() const { return violation(counts_); }

 private:
  double violation(std::span<const std::vector<std::int64_t>> list) const {
    std::vector<std::int64_t> sum(static_cast<std::size_t>(experts_), 0);
    for (const auto& one : list)
      for (std::size_t e = 0; e < one.size(); ++e) sum[e] += one[e];
    std::int64_t all = 0;
    for (const std::int64_t n : sum) all += n;
    const auto most = static_cast<double>(*std::max_element(sum.begin(), sum.end()));
    return all == 0 ? 0.0 : most * static_cast<double>(experts_) / static_cast<double>(all) - 1.0;
  }

  std::vector<std::vector<std::int64_t>> counts_;
  index_t experts_;
  std::size_t next_ = 0;
};

double median(std::vector<double> list) {
  const auto middle = list.begin() + static_cast<std::ptrdiff_t>(list.size() / 2);
  std::nth_element(list.begin(), middle, list.end());
  return *middle;
}

// Adds what f takes, in ns per token of a batch.
template <class F>
void timed(std::vector<double>& times, F&& f) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  const auto end = std::chrono::steady_clock::now();
  times.push_back(std::chrono::duration<double, std::nano>(end - begin).count() / batch);
}

// What a method did in one layer: MaxVio of the whole text after each step, and what a step cost.
struct trial {
  std::vector<double> text;
  std::vector<double> times;
};

struct method {
  std::string name, learns_from;
  bool drawn;
  // Nothing where the method is not made for these values.
  std::function<std::optional<trial>(const layer&, space, index_t steps)> run;
};

// Methods that keep a bias: step(values, s) learns, bias() is looked at with the whole text.
template <class Step, class Bias>
trial run_bias(const layer& l, space on, index_t steps, Step&& step, Bias&& bias) {
  trial made;
  workspace ws;
  assignment choices;
  load_of_pass whole(l.experts, 1);
  const auto look = [&] {
    route(biased(bias()), l.all(on), ws, choices);
    made.text.push_back(whole.add(choices));
  };
  look();
  for (index_t s = 0; s < steps; ++s) {
    step(l.step(on, s), s, made.times);
    look();
  }
  return made;
}

method controller(const std::string& name, bool drawn, const bias_options& options) {
  return {name, "counts", drawn,
          [options](const layer& l, space on, index_t steps) -> std::optional<trial> {
            bias_controller balancer(l.experts, options);
            workspace ws;
            assignment choices;
            std::vector<std::int64_t> counts(static_cast<std::size_t>(l.experts));
            return run_bias(
                l, on, steps,
                [&](values_view scores, index_t, std::vector<double>& times) {
                  route(biased(balancer.bias()), scores, ws, choices);
                  // Routing happens anyway: what balancing adds is the counting and the update.
                  timed(times, [&] {
                    count_choices(choices, {}, std::span(counts));
                    balancer.update(counts);
                  });
                },
                [&] { return balancer.bias(); });
          }};
}

method quantile(const std::string& name, float ema) {
  return {name, "scores", true,
          [ema](const layer& l, space on, index_t steps) -> std::optional<trial> {
            quantile_balancer balancer(l.experts, {.k = k, .ema = ema});
            workspace ws;
            return run_bias(
                l, on, steps,
                [&](values_view scores, index_t, std::vector<double>& times) {
                  timed(times, [&] {
                    balancer.observe(scores, ws);
                    balancer.update();
                  });
                },
                [&] { return balancer.bias(); });
          }};
}

// Descent on an offset of the logits, all that the loss could move here; a training would move the
// gate's weights and the hidden states with it.
method loss(const std::string& name, float rate) {
  return {name, "gradient", true,
          [rate](const layer& l, space on, index_t steps) -> std::optional<trial> {
            std::vector<float> offset(static_cast<std::size_t>(l.experts), 0.0f);
            std::vector<float> shifted(static_cast<std::size_t>(batch * l.experts));
            std::vector<float> gradient(shifted.size());
            std::vector<double> counts(offset.size());
            const values_view z(shifted.data(), batch, l.experts);
            const matrix_view<float> dlogits(gradient.data(), batch, l.experts);
            const loss_options how{.scores = on == sigmoids ? probability::normalized_sigmoid
                                                            : probability::softmax};
            workspace ws, memory;
            assignment choices;
            // Scores rise with their logits: the choice is the same on all three, the loss is not.
            return run_bias(
                l, logits, steps,
                [&](values_view, index_t s, std::vector<double>& times) {
                  const values_view rows = l.step(logits, s);
                  for (index_t t = 0; t < batch; ++t)
                    for (index_t e = 0; e < l.experts; ++e)
                      shifted[static_cast<std::size_t>(t * l.experts + e)] =
                          rows(t, e) + offset[static_cast<std::size_t>(e)];
                  route(biased({}), z, ws, choices);
                  timed(times, [&] {
                    count_choices(choices, {}, std::span(counts));
                    const auto loss = switch_loss::megatron(1.0, counts, k);
                    balance_loss<float>(how, z, dlogits, memory, serial{}, loss);
                  });
                  for (std::size_t i = 0; i < gradient.size(); ++i)
                    offset[i % offset.size()] -= rate * gradient[i];
                },
                [&] { return std::span<const float>(offset); });
          }};
}

// Methods of the batch: they route it as they see it, and are judged by that. MaxVio of the text is
// that of the last batches together.
template <class Route>
trial run_batches(const layer& l, index_t steps, Route&& routed) {
  trial made;
  const index_t batches = l.tokens / batch;
  load_of_pass last(l.experts, batches);
  for (index_t s = 0; s < std::max(steps, batches); ++s) {
    last.add(routed(s, made.times));
    if (s + 1 >= batches) made.text.push_back(last.pass());
  }
  made.text.insert(made.text.begin(), static_cast<std::size_t>(batches), made.text.front());
  return made;
}

method bip(const std::string& name, bool drawn, price_start start) {
  return {name, "scores, before routing", drawn,
          [start](const layer& l, space on, index_t steps) -> std::optional<trial> {
            if (on == logits) return std::nullopt;  // its prices are never negative
            auto balancer =
                std::make_shared<bip_balancer>(l.experts, bip_options{.k = k, .start = start});
            workspace ws, memory;
            assignment choices;
            return run_batches(l, steps, [&](index_t s, std::vector<double>& times) -> auto& {
              const values_view scores = l.step(on, s);
              timed(times, [&] { balancer->update(scores, memory); });
              route(biased(balancer->bias()), scores, ws, choices);
              return choices;
            });
          }};
}

// What a plan of the batch costs comes less a plain routing.
method sinkhorn_plan() {
  return {"Sinkhorn, 10 iterations", "the batch", false,
          [](const layer& l, space on, index_t) -> std::optional<trial> {
            if (on != logits) return std::nullopt;  // its kernel is exp(logits)
            sinkhorn rule{.k = k};
            rule.scaling.most_iterations = 10;
            rule.scaling.tolerance = 0.0f;
            workspace ws;
            assignment choices;
            std::vector<double> plain;
            trial made = run_batches(l, 12, [&](index_t s, std::vector<double>& times) -> auto& {
              timed(plain, [&] { route(biased({}), l.step(on, s), ws, choices); });
              timed(times, [&] { route(rule, l.step(on, s), ws, choices); });
              return choices;
            });
            for (double& t : made.times) t = std::max(0.0, t - median(plain));
            return made;
          }};
}

// Rules with a limit: the busiest expert of any batch, and what the limit costs.
struct limited {
  const char* name;
  const char* costs;
  double worst = 0.0, lost = 0.0;  // lost: share of places or choices
};

std::vector<limited> hard_limits(const std::vector<layer>& layers) {
  std::vector<limited> list{{"top-k, no correction", "nothing"},
                            {"BIP, 4 iterations, on the batch it routes", "nothing"},
                            {"capacity T k / E, first come", "choices dropped"},
                            {"expert choice", "tokens without any expert"},
                            {"BASE, one expert per token", "nothing"}};
  double tokens = 0.0;
  for (const layer& l : layers) {
    bip_balancer balancer(l.experts, {.k = k});
    workspace ws, memory;
    assignment choices;
    for (index_t s = 0; s < l.tokens / batch; ++s) {
      load_of_pass one(l.experts, 1);
      const auto worst = [&](std::size_t i) {
        list[i].worst = std::max(list[i].worst, one.add(choices));
      };
      tokens += batch;
      route(biased({}), l.step(logits, s), ws, choices);
      worst(0);
      capacity_policy limit;
      limit.rule.formula = capacity_formula::fixed;
      limit.rule.count = batch * k / l.experts;
      limit.order = drop_order::token_major;
      apply_capacity(choices, limit, memory);
      std::vector<std::int64_t> kept(static_cast<std::size_t>(l.experts));
      count_choices(choices, {.drops = drop_stage::after_drop}, std::span(kept));
      double all = 0.0, most = 0.0;
      for (const std::int64_t n : kept) {
        all += static_cast<double>(n);
        most = std::max(most, static_cast<double>(n));
      }
      list[2].lost += static_cast<double>(batch * k) - all;
      list[2].worst = std::max(list[2].worst, most / static_cast<double>(limit.rule.count) - 1.0);
      balancer.update(l.step(probabilities, s), memory);
      route(biased(balancer.bias()), l.step(probabilities, s), ws, choices);
      worst(1);
      route(expert_choice<softmax>{.score = {}, .capacity = {.factor = k}}, l.step(logits, s), ws,
            choices);
      worst(3);
      for (index_t t = 0; t < choices.tokens(); ++t)
        list[3].lost +=
            choices.first(t) == choices.first(t + 1) ||
                    choices.ids()[static_cast<std::size_t>(choices.first(t))] == no_expert
                ? 1.0
                : 0.0;
      route(base_assignment{}, l.step(logits, s), ws, choices);
      worst(4);
    }
  }
  list[2].lost /= tokens * k;
  list[3].lost /= tokens;
  return list;
}

// The first step from which on the curve stays below the bound; -1: none. A curve that goes below
// in its last third only has not shown that it stays there.
index_t settled(const std::vector<double>& curve, double bound) {
  std::size_t first = curve.size();
  while (first > 0 && curve[first - 1] < bound) --first;
  return first > curve.size() - curve.size() / 3 ? -1 : static_cast<index_t>(first);
}

// A method in one space, over all layers: curves are means, the end is that of the last third of
// the steps, in which sampling and swings show.
struct summary {
  std::vector<double> text;
  double end = 0.0, worst = 0.0;
};

std::string cell(const std::optional<summary>& s) {
  if (!s) return "-";
  const index_t from = settled(s->text, 0.5);
  return example::detail::fixed(s->end, 2) + " (" + example::detail::fixed(s->worst, 2) + "), " +
         (from < 0 ? std::string("never") : std::to_string(from));
}

int run(int argc, char** argv) {
  if (example::asked_how(argc, argv, 3, "balance [PAGE.html [MODEL [STEPS]]]", std::cout)) return 0;
  const std::string page = argc > 1 ? argv[1] : "build/balance.html";
  const auto traces = example::read_traces(argc > 2 ? argv[2] : "examples/model");
  const index_t steps =
      argc > 3 ? example::number_in_place("STEPS", argv[3], index_t{12}, index_t{100000}) : 300;
  const auto proportional = [](float u) {
    return bias_options{.rule = bias_rule::proportional, .step = u};
  };
  const std::vector<method> methods{
      controller("sign, u = 0.1", false, {.step = 1e-1f}),
      controller("sign, u = 0.01", true, {.step = 1e-2f}),
      controller("sign, u = 0.001", false, {.step = 1e-3f}),
      controller("proportional, u = 0.1", true, proportional(1e-1f)),
      controller("proportional, u = 0.01", false, proportional(1e-2f)),
      controller("proportional, u = 0.001", true, proportional(1e-3f)),
      quantile("quantile", 0.0f),
      quantile("quantile, averaged 0.9", 0.9f),
      bip("BIP, 4 iterations", true, price_start::previous),
      bip("BIP, 4 iterations from zero", false, price_start::zero),
      sinkhorn_plan(),
      loss("auxiliary loss, rate 1", 1.0f)};

  std::vector<layer> layers;
  for (index_t number = 0; number < traces[0].layers; ++number)
    layers.push_back(make_layer(traces, number));
  std::vector<std::array<std::optional<summary>, spaces>> all(methods.size());
  std::vector<double> costs(methods.size(), 0.0);
  for (std::size_t m = 0; m < methods.size(); ++m) {
    std::vector<double> times;
    for (int on = 0; on < spaces; ++on) {
      summary sum;
      for (const layer& l : layers) {
        const std::optional<trial> one = methods[m].run(l, static_cast<space>(on), steps);
        if (!one) continue;
        sum.text.resize(one->text.size());
        const std::size_t from = one->text.size() - one->text.size() / 3;
        for (std::size_t s = 0; s < one->text.size(); ++s) {
          sum.text[s] += one->text[s] / static_cast<double>(layers.size());
          if (s < from) continue;
          sum.worst = std::max(sum.worst, one->text[s]);
          sum.end += one->text[s] / static_cast<double>((one->text.size() - from) * layers.size());
        }
        times.push_back(median(one->times));
      }
      if (!sum.text.empty()) all[m][static_cast<std::size_t>(on)] = sum;
    }
    costs[m] = median(times);
  }
  const std::vector<limited> limits = hard_limits(layers);

  example::chart_table ways{.head = {"method", "on logits", "on sigmoid scores",
                                     "on softmax scores", "ns per token", "learns from"},
                            .rows = {}};
  for (std::size_t m = 0; m < methods.size(); ++m)
    ways.rows.push_back({methods[m].name, cell(all[m][logits]), cell(all[m][sigmoids]),
                         cell(all[m][probabilities]), example::detail::fixed(costs[m], 1),
                         methods[m].learns_from});
  example::chart_table hard{.head = {"rule", "busiest expert, any batch", "price", "how much"},
                            .rows = {}};
  for (const limited& one : limits)
    hard.rows.push_back(
        {one.name, example::detail::fixed(100.0 * (1.0 + one.worst), 0) + " % of its share",
         one.costs, one.lost > 0.0 ? example::detail::fixed(100.0 * one.lost, 1) + " %" : "-"});

  // What docs/balancing.md says, in numbers that any run has to bear out.
  const auto end = [&](const char* name, space on) {
    for (std::size_t m = 0; m < methods.size(); ++m)
      if (methods[m].name == name && all[m][on]) return all[m][on]->end;
    throw std::logic_error(name);
  };
  struct claim {
    bool holds;
    const char* words;
  };
  const claim claims[] = {
      {std::abs(limits[3].worst) < 1e-9 && std::abs(limits[4].worst) < 1e-9 &&
           limits[2].worst <= 0.0,
       "expert choice, BASE and a capacity are hard limits"},
      {limits[1].worst > 0.05, "BIP is none"},
      {end("quantile, averaged 0.9", logits) < 0.5 &&
           end("quantile, averaged 0.9", sigmoids) < 0.5 &&
           end("quantile, averaged 0.9", probabilities) < 0.5,
       "the averaged quantile is good on all three"},
      {end("proportional, u = 0.1", logits) < 0.5 && end("proportional, u = 0.1", sigmoids) > 1.0 &&
           end("proportional, u = 0.1", probabilities) > 1.0,
       "a step that is good on logits is far too large on scores"},
  };
  bool held = true;
  example::write_markdown(std::cout, ways);
  std::cout << '\n';
  example::write_markdown(std::cout, hard);
  for (const claim& c : claims) {
    held = held && c.holds;
    if (!c.holds) std::cerr << "balance: no longer so: " << c.words << '\n';
  }
  std::cout << "written: " << page << '\n';

  const std::string lead =
      "Router logits of a trained model (" + std::to_string(layers.size()) + " layers, " +
      std::to_string(traces[0].experts) + " experts, " + std::to_string(k) +
      " per token) on three kinds of text. A step sees a batch of 1024 tokens; MaxVio, the busiest "
      "expert's load over the mean less one, is that of all " +
      std::to_string(layers[0].tokens) + " tokens, averaged over layers. The same step of a bias " +
      "is small on logits and far too large on scores; the averaged quantile has no step.";
  example::save_page(page, "How each method balances", lead, [&](std::ostream& out) {
    for (int on = 0; on < spaces; ++on) {
      std::vector<example::chart_line> lines;
      for (std::size_t m = 0; m < methods.size(); ++m) {
        if (!methods[m].drawn) continue;
        const auto& one = all[m][static_cast<std::size_t>(on)];
        lines.push_back({methods[m].name, one ? one->text : std::vector<double>{}});
      }
      if (on == 0) example::write_names(out, lines);
      out << "<h2>Choice on " << space_names[static_cast<std::size_t>(on)] << "</h2>\n";
      example::write_lines(out, lines, "steps", "MaxVio", 0.02, 10.0);
    }
    out << "<h2>The end, and when it is reached</h2>\n";
    example::write_html(out, ways);
    out << "<p class=\"note\">MaxVio of the text, mean (and worst of any layer) over the last "
           "third "
           "of the steps, then the step from which on the mean over layers stays below 0.5. BIP "
           "and "
           "Sinkhorn are judged by the batches that they route, the others by the whole text under "
           "their bias of the moment. The router itself does not learn here: what training would "
           "do "
           "to the logits is left out, for every method alike. Costs are medians of one thread and "
           "come on top of routing.</p>\n<h2>Hard limits</h2>\n";
    example::write_html(out, hard);
  });
  return held ? 0 : 1;
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
