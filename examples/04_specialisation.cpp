// Which experts serve which kind of text, which serve all of it, and how many a cache should hold:
// from the bundled model's router logits. Writes tables and a picture.
//
//   specialisation [PAGE.html [MODEL]]
#include "support/chart.hpp"
#include "support/placed_words.hpp"
#include "support/traces.hpp"

#include <algorithm>
#include <cstdint>
#include <iostream>
#include <span>
#include <string>
#include <vector>

#include <moeroute/metrics/cache.hpp>
#include <moeroute/metrics/committee.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/metrics/segment.hpp>
#include <moeroute/metrics/specialisation.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>

namespace {

using namespace moeroute;

// Everything that is measured of one layer.
struct layer_view {
  specialisation_meter domains;
  committee_meter committee;
  load_meter load;
  expert_trace trace;
  segment_meter segments;

  layer_view(index_t count, index_t experts)
      : domains(count, experts),
        committee(count, experts),
        load(experts),
        trace(experts),
        segments(experts, 16) {}
};

std::string number(double x, int digits) { return example::detail::fixed(x, digits); }

std::string list_of(std::span<const expert_id> ids) {
  std::string text;
  for (const expert_id e : ids) {
    if (!text.empty()) text += ' ';
    text += std::to_string(e);
  }
  return text.empty() ? "none" : text;
}

// The expert's load in a domain, in multiples of the even share.
double relative(const specialisation_meter& m, index_t domain, index_t expert) {
  return m.share(domain, expert) * static_cast<double>(m.experts());
}

// The experts that a domain uses at least twice as much as the domains do on average, and at least
// as much as any expert of it: one that hardly ever serves is nobody's specialist.
std::vector<expert_id> specialists(const specialisation_meter& m, index_t domain) {
  std::vector<expert_id> ids;
  for (index_t e = 0; e < m.experts(); ++e)
    if (m.preference(e, domain) >= 2.0 && relative(m, domain, e) >= 1.0)
      ids.push_back(static_cast<expert_id>(e));
  return ids;
}

// "20 1.4x": each with its load.
std::string with_loads(const specialisation_meter& m, index_t domain) {
  std::string text;
  for (const expert_id e : specialists(m, domain))
    text += (text.empty() ? "" : ", ") + std::to_string(e) + " " +
            number(relative(m, domain, e), 1) + "×";
  return text.empty() ? "none" : text;
}

// One panel for each layer: a row for each domain, a cell for each expert.
void write_map(std::ostream& out, const std::vector<layer_view>& layers) {
  using example::detail::fixed;
  constexpr double left = 96, cell = 27, high = 28, gap = 34;
  const index_t experts = layers[0].domains.experts();
  const double panel = high * static_cast<double>(example::trace_domains.size()) + gap;
  const double height = panel * static_cast<double>(layers.size()) + 46;
  out << "<figure class=\"chart map\"><svg viewBox=\"0 0 "
      << fixed(left + cell * static_cast<double>(experts) + 8, 0) << ' ' << fixed(height, 0)
      << "\" role=\"img\" aria-label=\"Load by layer, domain and expert\">\n";
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const specialisation_meter& m = layers[l].domains;
    const double top = panel * static_cast<double>(l) + 26;
    out << "<text class=\"tick\" x=\"0\" y=\"" << fixed(top - 7, 1) << "\">layer " << l
        << "</text>\n";
    for (index_t d = 0; d < m.domains(); ++d) {
      const double y = top + high * static_cast<double>(d);
      out << "<text class=\"tick end\" x=\"" << fixed(left - 8, 1) << "\" y=\"" << fixed(y + 20, 1)
          << "\">" << example::trace_domains[static_cast<std::size_t>(d)] << "</text>\n";
      for (index_t e = 0; e < experts; ++e) {
        const double load = relative(m, d, e);
        out << "<rect class=\"h" << example::detail::heat_class(load) << "\" x=\""
            << fixed(left + cell * static_cast<double>(e), 1) << "\" y=\"" << fixed(y, 1)
            << "\" width=\"" << fixed(cell - 1.5, 1) << "\" height=\"" << fixed(high - 1.5, 1)
            << "\"><title>layer " << l << ", expert " << e << ", "
            << example::trace_domains[static_cast<std::size_t>(d)] << ": " << fixed(load, 2)
            << "× even share</title></rect>\n";
      }
    }
  }
  for (index_t e = 0; e < experts; e += 4)
    out << "<text class=\"tick mid\" x=\"" << fixed(left + cell * (static_cast<double>(e) + 0.5), 1)
        << "\" y=\"" << fixed(height - 34, 1) << "\">" << e << "</text>\n";
  out << "<text class=\"axis mid\" x=\"" << fixed(left + cell * static_cast<double>(experts) / 2, 1)
      << "\" y=\"" << fixed(height - 6, 1) << "\">expert</text>\n</svg></figure>\n";
}

struct cache_curve {
  const char* name;
  cache_policy policy;
};
constexpr cache_curve cache_curves[] = {{"LRU", cache_policy::lru},
                                        {"LFU", cache_policy::lfu},
                                        {"segment, next 16", cache_policy::segment},
                                        {"Belady", cache_policy::belady}};

// Mean hit rate over layers.
double hit_rate(const std::vector<layer_view>& layers, cache_policy policy, index_t capacity) {
  double sum = 0;
  for (const layer_view& l : layers)
    sum += simulate_cache(l.trace, {.policy = policy, .capacity = capacity}).hit_rate();
  return sum / static_cast<double>(layers.size());
}

int run(int argc, char** argv) {
  if (example::asked_how(argc, argv, 2, "specialisation [PAGE.html [MODEL]]", std::cout)) return 0;
  const std::string page = argc > 1 ? argv[1] : "build/specialisation.html";
  const auto traces = example::read_traces(argc > 2 ? argv[2] : "examples/model");
  const auto domains = static_cast<index_t>(traces.size());
  const index_t experts = traces[0].experts, k = example::trace_k;

  const router<softmax> rule{.score = {}, .selection = {.k = k}, .weight = sum_normalized};
  workspace ws;
  assignment choices;
  std::vector<layer_view> layers;
  for (index_t l = 0; l < traces[0].layers; ++l) {
    layer_view& view = layers.emplace_back(domains, experts);
    for (index_t d = 0; d < domains; ++d) {
      const auto logits = traces[static_cast<std::size_t>(d)].layer(l);
      route(rule, logits, ws, choices);
      view.domains.add(d, choices);
      view.committee.add(d, logits);
      view.load.add(choices);
      view.trace.add(choices);
      view.segments.add(choices);
    }
  }

  example::chart_table who{.head = {"layer"}, .rows = {}};
  for (const auto& trace : traces) who.head.push_back("for " + trace.domain);
  for (const char* name : {"standing committee", "its mass", "python-c", "c-english",
                           "python-english", "SRP, 16 tokens"})
    who.head.emplace_back(name);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const layer_view& view = layers[l];
    std::vector<std::string> row{std::to_string(l)};
    for (index_t d = 0; d < domains; ++d) row.push_back(with_loads(view.domains, d));
    const standing_committee c = view.committee.audit({.k = k});
    row.push_back(list_of(c.members));
    row.push_back(number(100 * c.coverage, 1) + " %");
    row.push_back(number(view.domains.divergence(0, 1), 3));
    row.push_back(number(view.domains.divergence(1, 2), 3));
    row.push_back(number(view.domains.divergence(0, 2), 3));
    row.push_back(number(view.segments.all().f1, 3));
    who.rows.push_back(row);
  }

  example::chart_table cache{.head = {"experts held"}, .rows = {}};
  for (const cache_curve& c : cache_curves) cache.head.emplace_back(c.name);
  // The knee: from here on one expert more brings the least-recently-used cache less than 2 %.
  index_t knee = experts;
  double last = 0;
  for (index_t capacity = k; capacity <= experts; ++capacity) {
    const double now = hit_rate(layers, cache_policy::lru, capacity);
    if (capacity > k && now - last < 0.02 && knee == experts) knee = capacity - 1;
    last = now;
    if (capacity % k != 0 && capacity != knee) continue;
    std::vector<std::string> row{std::to_string(capacity)};
    for (const cache_curve& c : cache_curves)
      row.push_back(number(100 * hit_rate(layers, c.policy, capacity), 1) + " %");
    cache.rows.push_back(row);
  }

  const std::string verdict =
      "Best cache size: " + std::to_string(knee) + " of " + std::to_string(experts) +
      " experts per layer; one more brings a least-recently-used cache less than 2 % of lookups.";
  example::write_markdown(std::cout, who);
  std::cout << '\n';
  example::write_markdown(std::cout, cache);
  std::cout << verdict << "\nwritten: " << page << '\n';
  example::save_page(
      page, "Which experts serve which text",
      "Router logits of a trained model, " + std::to_string(layers.size()) + " layers of " +
          std::to_string(experts) + " experts, " + std::to_string(k) +
          " per token, on 2048 tokens each of Python, C and English. " + verdict,
      [&](std::ostream& out) {
        example::detail::write_legend(out);
        write_map(out, layers);
        out << "<h2>Specialists, committee, divergence</h2>\n";
        example::write_html(out, who);
        out << "<p class=\"note\">A specialist's share of a domain is at least twice its mean "
               "share of all domains, and at least the even share; behind it, its load in "
               "multiples "
               "of the even share. The standing committee is among the k best of every domain, and "
               "no other "
               "such expert beats it in both mean and variance of its rank. Divergence is "
               "Jensen-Shannon over ln 2: 0 the same load, 1 nothing in common. SRP: the best F1 "
               "of "
               "keeping an expert for 16 tokens or not at all.</p>\n<h2>Caches</h2>\n";
        example::write_html(out, cache);
        out << "<p class=\"note\">Share of lookups met, first loads counted as misses; Belady "
               "knows "
               "the future, so no cache does better.</p>\n";
      });
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "specialisation: " << e.what() << '\n';
    return 2;
  }
}
