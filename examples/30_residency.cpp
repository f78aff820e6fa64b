// What it costs when a token takes the experts that are in memory: the bundled model really run
// with every rule and parameter, on its three texts. Writes tables and a picture.
//
//   residency [PAGE.html [MODEL [TOKENS]]]
#include "support/decoder.hpp"
#include "support/generate_app.hpp"
#include "support/placed_words.hpp"
#include "support/scatter.hpp"
#include "support/text_loss.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include <moeroute/exec/executor.hpp>
#include <moeroute/metrics/cache.hpp>

namespace {

using namespace moeroute;
using example::index_t;
using kind = residency_kind;

// A rule to be run: a line of the picture and a point on it.
struct trial {
  std::string line, parameter;
  residency_rule rule{};
};
struct batch_trial {
  std::string line, parameter;
  union_rule rule{};
};

// Mean over the texts.
struct figures {
  double loads = 0;       // per token and layer, or distinct experts per batch and layer
  double loss = 0;        // nats per byte
  double more_loss = 0;   // against the plain router, in per cent
  double divergence = 0;  // of the next byte's distribution from the plain model's, nats
  double agreement = 1, mass_lost = 0;
};

struct text_run {
  example::token_ids tokens;
  double plain_loss = 0;
  std::vector<float> plain_logits{};
  std::vector<buddy_table> buddies{};  // per layer, from the other texts
};

class study {
 public:
  study(example::model& model, std::vector<text_run>& texts)
      : model_(model), texts_(texts), decode_(model, segment, serial{}) {
    for (std::size_t t = 0; t < texts.size(); ++t) run_plain(t);
    for (std::size_t t = 0; t < texts.size(); ++t) befriend(t);
  }

  figures run(const trial& what, index_t held) {
    figures mean;
    for (std::size_t t = 0; t < texts_.size(); ++t) {
      std::vector<std::unique_ptr<example::layer_steering>> steering;
      for (std::size_t l = 0; l < model_.layers.size(); ++l) {
        residency_rule rule = what.rule;
        if (rule.kind == kind::buddy) rule.buddies = &texts_[t].buddies[l];
        steering.push_back(std::make_unique<example::layer_steering>(
            model_.layers[l].moe.router().plain(), rule,
            expert_cache_options{.experts = model_.config.experts(), .capacity = held}));
      }
      add_run(t, steering, mean);
      for (const auto& s : steering) {
        const double share = 1.0 / static_cast<double>(steering.size() * texts_.size());
        mean.loads +=
            share * static_cast<double>(s->loads()) / static_cast<double>(s->counts.tokens);
        mean.agreement += share * (s->counts.agreement() - 1);
        mean.mass_lost += share * s->counts.mass_lost();
      }
    }
    return mean;
  }

  figures run(const batch_trial& what, index_t batch) {
    figures mean;
    for (std::size_t t = 0; t < texts_.size(); ++t) {
      std::vector<std::unique_ptr<example::layer_steering>> steering;
      for (auto& layer : model_.layers)
        steering.push_back(std::make_unique<example::layer_steering>(layer.moe.router().plain(),
                                                                     what.rule, batch));
      add_run(t, steering, mean);
      for (const auto& s : steering)
        mean.loads +=
            s->batches.experts_per_batch() / static_cast<double>(steering.size() * texts_.size());
    }
    return mean;
  }

  // Choices of a layer on one text, as the plain router makes them.
  const expert_trace& trace(std::size_t text, std::size_t layer) const {
    return traces_[text][layer];
  }

 private:
  static constexpr index_t segment = 256;

  void run_plain(std::size_t t) {
    text_run& text = texts_[t];
    auto& traces = traces_.emplace_back();
    for (std::size_t l = 0; l < model_.layers.size(); ++l)
      traces.emplace_back(model_.config.experts());
    text.plain_loss = example::text_loss(
        decode_, text.tokens, segment, [&](std::int64_t, std::span<const float> logits) {
          text.plain_logits.insert(text.plain_logits.end(), logits.begin(), logits.end());
        });
    // Choices once more, layer by layer: the loss above needs logits only.
    const auto all = static_cast<index_t>(text.tokens.size());
    assignment kept;
    for (index_t first = 0; first < all; first += segment) {
      decode_.reset();
      static_cast<void>(
          decode_.run(std::span(text.tokens)
                          .subspan(static_cast<std::size_t>(first),
                                   static_cast<std::size_t>(std::min(segment, all - first))),
                      example::wanted_logits::last, [&](const example::layer_routing& r) {
                        kept.reset(r.ids.rows, model_.config.experts(), r.ids.cols);
                        std::copy_n(r.ids.data, r.ids.rows * r.ids.cols, kept.ids().begin());
                        traces[r.layer].add(kept);
                      }));
    }
  }

  void befriend(std::size_t t) {
    const index_t experts = model_.config.experts();
    for (std::size_t l = 0; l < model_.layers.size(); ++l) {
      std::vector<double> together(static_cast<std::size_t>(experts * experts));
      for (std::size_t other = 0; other < texts_.size(); ++other) {
        if (other == t) continue;
        const expert_trace& seen = traces_[other][l];
        for (index_t i = 0; i < seen.tokens(); ++i)
          for (const expert_id a : seen.ids(i))
            for (const expert_id b : seen.ids(i))
              together[static_cast<std::size_t>(a * experts + b)] += 1;
      }
      texts_[t].buddies.emplace_back(matrix_view<const double>(together.data(), experts, experts),
                                     index_t{8});
    }
  }

  void add_run(std::size_t t, const std::vector<std::unique_ptr<example::layer_steering>>& steering,
               figures& mean) {
    const text_run& text = texts_[t];
    for (std::size_t l = 0; l < steering.size(); ++l)
      model_.layers[l].moe.router().steer(steering[l].get());
    double divergence = 0;
    std::int64_t rows = 0;
    const double loss = example::text_loss(
        decode_, text.tokens, segment, [&](std::int64_t row, std::span<const float> logits) {
          const float* const plain =
              text.plain_logits.data() + row * static_cast<std::int64_t>(logits.size());
          divergence += kl({plain, logits.size()}, logits);
          ++rows;
        });
    for (auto& layer : model_.layers) layer.moe.router().steer(nullptr);
    const auto share = 1.0 / static_cast<double>(texts_.size());
    mean.loss += share * loss;
    mean.more_loss += share * 100 * (loss / text.plain_loss - 1);
    mean.divergence += share * divergence / static_cast<double>(rows);
  }

  static double kl(std::span<const float> p, std::span<const float> q) {
    const auto total = [](std::span<const float> z) {
      const double max = static_cast<double>(*std::max_element(z.begin(), z.end()));
      double sum = 0;
      for (const float x : z) sum += std::exp(static_cast<double>(x) - max);
      return max + std::log(sum);
    };
    const double all_p = total(p), all_q = total(q);
    double sum = 0;
    for (std::size_t i = 0; i < p.size(); ++i) {
      const double log_p = static_cast<double>(p[i]) - all_p;
      sum += std::exp(log_p) * (log_p - (static_cast<double>(q[i]) - all_q));
    }
    return sum;
  }

  example::model& model_;
  std::vector<text_run>& texts_;
  example::decoder<serial> decode_;
  std::vector<std::vector<expert_trace>> traces_;
};

std::vector<trial> trials(index_t k) {
  std::vector<trial> list{{"plain router", "", {}}};
  const auto add = [&](const char* line, const char* parameter, const residency_rule& rule) {
    list.push_back({line, parameter, rule});
  };
  add("cache prior", "0.05", {.kind = kind::cache_prior, .strength = 0.05f});
  add("cache prior", "0.1", {.kind = kind::cache_prior, .strength = 0.1f});
  add("cache prior", "0.2", {.kind = kind::cache_prior, .strength = 0.2f});
  add("cache prior", "0.3", {.kind = kind::cache_prior, .strength = 0.3f});
  for (const index_t ranks : {3 * k / 2, 2 * k, 3 * k})
    list.push_back({"max-rank", std::to_string(ranks), {.kind = kind::max_rank, .ranks = ranks}});
  add("mass threshold", "0.6", {.kind = kind::mass_threshold, .strength = 0.6f});
  add("mass threshold", "0.75", {.kind = kind::mass_threshold, .strength = 0.75f});
  add("mass threshold", "0.9", {.kind = kind::mass_threshold, .strength = 0.9f});
  add("margin swap", "0.05", {.kind = kind::margin_swap, .strength = 0.05f});
  add("margin swap", "0.1", {.kind = kind::margin_swap, .strength = 0.1f});
  add("margin swap", "0.2", {.kind = kind::margin_swap, .strength = 0.2f});
  add("drop cold", "0.1", {.kind = kind::drop_cold, .strength = 0.1f});
  add("drop cold", "0.2", {.kind = kind::drop_cold, .strength = 0.2f});
  add("drop cold", "0.5", {.kind = kind::drop_cold, .strength = 0.5f});
  for (const index_t search : {2, 4, 8})
    list.push_back({"buddy", std::to_string(search), {.kind = kind::buddy, .search = search}});
  for (const index_t search : {2, 4, 8})
    list.push_back({"buddy, sure rows as they are",
                    std::to_string(search),
                    {.kind = kind::buddy, .search = search, .least_entropy = 2.0f}});
  list.push_back({"buddy for the best too", "4", {.kind = kind::buddy, .forced = 0, .search = 4}});
  return list;
}

std::vector<batch_trial> batch_trials(index_t k, index_t experts) {
  std::vector<batch_trial> list{{"plain router", "", {.k0 = k}}};
  for (index_t k0 = k - 1; k0 >= 1; --k0)
    list.push_back({"opportunistic (OEA)", "k0 = " + std::to_string(k0), {.k0 = k0}});
  for (const index_t budget : {experts / 2, experts / 3, experts / 4})
    list.push_back({"budget by weight",
                    "B = " + std::to_string(budget),
                    {.kind = union_kind::budget, .budget = budget}});
  for (const index_t stays : {4, 3, 2})
    list.push_back(
        {"vote per group of 8",
         std::to_string(stays) + " stay",
         {.kind = union_kind::vote, .groups = std::max<index_t>(1, experts / 8), .stays = stays}});
  return list;
}

std::string number(double x, int digits) { return example::detail::fixed(x, digits); }

// Points of the same line side by side.
void add_point(std::vector<example::scatter_line>& lines, const std::string& line,
               const example::scatter_point& point) {
  for (auto& known : lines)
    if (known.name == line) return known.points.push_back(point);
  lines.push_back({line, {point}});
}

int run(int argc, char** argv) {
  if (example::asked_how(argc, argv, 3, "residency [PAGE.html [MODEL [TOKENS]]]", std::cout))
    return 0;
  const std::string page = argc > 1 ? argv[1] : "build/residency.html";
  const std::filesystem::path folder = argc > 2 ? argv[2] : "examples/model";
  const std::size_t most =
      argc > 3 ? example::number_in_place<std::size_t>("TOKENS", argv[3], 64, 1u << 30) : 2048;
  const example::model_config config = example::read_model_config(folder);
  example::model model = example::load_model(folder, config, [](index_t) {});
  std::vector<text_run> texts;
  for (auto& text : example::detail::bundled_texts(folder, config)) {
    text.tokens.resize(std::min(text.tokens.size(), most));
    texts.push_back({.tokens = std::move(text.tokens)});
  }
  if (texts.empty()) example::refuse(folder.string(), "/text: expected .txt files");
  study runs(model, texts);
  const index_t experts = config.experts(), k = config.experts_per_token();
  const std::vector<trial> rules = trials(k);
  const std::vector<batch_trial> batch_rules = batch_trials(k, experts);
  const index_t sizes[] = {experts / 4, (4 * experts + 5) / 10, experts / 2, 3 * experts / 4};
  const index_t batches[] = {2, 4, 8, 16};

  example::progress shown(std::cerr, "runs:");
  const auto all = static_cast<std::int64_t>(rules.size() * 4 + batch_rules.size() * 4);
  std::int64_t done = 0;
  std::vector<example::chart_table> tables;
  std::vector<std::vector<example::scatter_line>> pictures;
  for (const index_t held : sizes) {
    example::chart_table table{.head = {"rule", "loads per token", "fewer", "loss", "more loss",
                                        "KL", "agreement", "mass lost"},
                               .rows = {}};
    auto& lines = pictures.emplace_back();
    double plain_loads = 0;
    for (const trial& one : rules) {
      const figures f = runs.run(one, held);
      shown.show(++done, all);
      if (plain_loads == 0) plain_loads = f.loads;
      table.rows.push_back({one.line + " " + one.parameter, number(f.loads, 3),
                            number(100 * (1 - f.loads / plain_loads), 1) + " %", number(f.loss, 4),
                            number(f.more_loss, 2) + " %", number(f.divergence, 4),
                            number(f.agreement, 3), number(f.mass_lost, 4)});
      if (one.rule.forced > 0) add_point(lines, one.line, {f.loads, f.more_loss, one.parameter});
    }
    tables.push_back(std::move(table));
  }
  for (const index_t batch : batches) {
    example::chart_table table{
        .head = {"rule", "experts per batch", "fewer", "loss", "more loss", "KL"}, .rows = {}};
    auto& lines = pictures.emplace_back();
    double plain_experts = 0;
    for (const batch_trial& one : batch_rules) {
      const figures f = runs.run(one, batch);
      shown.show(++done, all);
      if (plain_experts == 0) plain_experts = f.loads;
      table.rows.push_back({one.line + " " + one.parameter, number(f.loads, 2),
                            number(100 * (1 - f.loads / plain_experts), 1) + " %",
                            number(f.loss, 4), number(f.more_loss, 2) + " %",
                            number(f.divergence, 4)});
      add_point(lines, one.line, {f.loads, f.more_loss, one.parameter});
    }
    tables.push_back(std::move(table));
  }
  // Which cache: the plain router's hits.
  example::chart_table caches{.head = {"hit rate"}, .rows = {}};
  for (const index_t held : sizes) caches.head.push_back(std::to_string(held) + " held");
  std::vector<cache_policy> policies(std::begin(live_policies), std::end(live_policies));
  policies.insert(policies.end(), {cache_policy::segment, cache_policy::belady});
  for (const cache_policy policy : policies) {
    std::vector<std::string> row{to_string(policy)};
    for (const index_t held : sizes) {
      double rate = 0;
      for (std::size_t t = 0; t < texts.size(); ++t)
        for (std::size_t l = 0; l < model.layers.size(); ++l)
          rate +=
              simulate_cache(runs.trace(t, l), {.policy = policy, .capacity = held, .decay = 0.98})
                  .hit_rate();
      row.push_back(
          number(100 * rate / static_cast<double>(texts.size() * model.layers.size()), 1) + " %");
    }
    caches.rows.push_back(std::move(row));
  }

  const auto title_of = [&](std::size_t i) {
    return i < 4
               ? std::to_string(sizes[i]) + " of " + std::to_string(experts) + " experts in memory"
               : "Batches of " + std::to_string(batches[i - 4]) + " tokens";
  };
  for (std::size_t i = 0; i < tables.size(); ++i) {
    std::cout << title_of(i) << "\n\n";
    example::write_markdown(std::cout, tables[i]);
    std::cout << '\n';
  }
  example::write_markdown(std::cout, caches);
  std::cout << "written: " << page << '\n';
  example::save_page(
      page, "When memory is the limit",
      "A trained model of " + std::to_string(model.layers.size()) + " layers with " +
          std::to_string(experts) + " experts, " + std::to_string(k) +
          " per token, run with every rule on " + std::to_string(texts[0].tokens.size()) +
          " bytes each of " + std::to_string(texts.size()) +
          " texts. Left and low is good: little to read, and little lost.",
      [&](std::ostream& out) {
        out << "<style>.dot { fill: var(--page); stroke-width: 2.5; } .panels figure.chart { "
               "max-width: 680px; }</style>\n";
        for (const bool of_batches : {false, true}) {
          std::vector<example::chart_line> names;
          for (const auto& line : pictures[of_batches ? 4 : 0]) names.push_back({line.name, {}});
          out << "<h2>" << (of_batches ? "Batches" : "One token at a time") << "</h2>\n";
          example::write_names(out, names);
          out << "<div class=\"panels\">\n";
          for (std::size_t i = of_batches ? 4 : 0; i < (of_batches ? pictures.size() : 4); ++i) {
            double right = 0, high = 1;
            for (const auto& line : pictures[i])
              for (const auto& p : line.points) {
                right = std::max(right, p.x);
                if (p.y < 8) high = std::max(high, p.y);
              }
            example::write_scatter(out, pictures[i], title_of(i),
                                   of_batches ? "distinct experts per batch and layer"
                                              : "experts read per token and layer",
                                   "loss above the plain router's, %", right * 1.06, -high / 8,
                                   high * 1.1);
          }
          out << "</div>\n<p class=\"note\">The large point is the plain router; each line is a "
                 "rule, its points "
                 "parameters. What costs more than 8 % is in the tables only.</p>\n";
        }
        for (std::size_t i = 0; i < tables.size(); ++i) {
          out << "<h2>" << title_of(i) << "</h2>\n";
          example::write_html(out, tables[i]);
        }
        out << "<h2>Caches, plain routing</h2>\n";
        example::write_html(out, caches);
      });
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "residency: " << e.what() << '\n';
    return 2;
  }
}
