#include "trace_app.hpp"

#include "arguments.hpp"
#include "scatter.hpp"
#include "trace_file.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <numeric>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <moeroute/data/expert_profile.hpp>
#include <moeroute/metrics/cache.hpp>
#include <moeroute/residency/predictor.hpp>
#include <moeroute/residency/regroup.hpp>

namespace example {

inline constexpr const char* trace_usage =
    "trace IN [--to csv|route|npy|record|jsonl --out FILE] [--experts N] [--cache N] [--policy P] "
    "[--page FILE] [--json]";

namespace detail {

/// What is known of a trace after one reading.
struct trace_view {
  index_t layers = 0, experts = 1, steps = 0, lookups = 0, most = 0;
  std::vector<std::vector<trace_step>> of_layer;

  void add(const trace_step& s) {
    layers = std::max(layers, s.layer + 1);
    if (of_layer.size() < static_cast<std::size_t>(layers))
      of_layer.resize(static_cast<std::size_t>(layers));
    for (const expert_id e : s.ids) {
      experts = std::max<index_t>(experts, e + 1);
      lookups += e != moeroute::no_expert;
    }
    most = std::max(most, static_cast<index_t>(s.ids.size()));
    ++steps;
    of_layer[static_cast<std::size_t>(s.layer)].push_back(s);
    of_layer[static_cast<std::size_t>(s.layer)].back().weights.clear();
  }

  [[nodiscard]] moeroute::assignment choices(index_t layer) const {
    const auto& list = of_layer[static_cast<std::size_t>(layer)];
    moeroute::assignment a;
    a.reset(static_cast<index_t>(list.size()), std::max(experts, most), std::max<index_t>(1, most));
    std::fill(a.ids().begin(), a.ids().end(), moeroute::no_expert);
    std::fill(a.weights().begin(), a.weights().end(), 0.0F);
    for (std::size_t t = 0; t < list.size(); ++t)
      std::copy(list[t].ids.begin(), list[t].ids.end(),
                a.ids().begin() + static_cast<std::ptrdiff_t>(t) * a.k());
    return a;
  }
};

/// Share of asked-for experts among a predictor's k and 2 k best guesses, layers in turn.
template <class Predictor>
[[nodiscard]] std::array<double, 2> recall_of(const trace_view& trace, Predictor predictor) {
  std::array<moeroute::recall_meter, 2> meters;
  std::vector<expert_id> guesses(static_cast<std::size_t>(std::min(trace.experts, 2 * trace.most)));
  std::size_t tokens = 0;
  for (const auto& list : trace.of_layer) tokens = std::max(tokens, list.size());
  for (std::size_t t = 0; t < tokens; ++t)
    for (index_t l = 0; l < trace.layers; ++l) {
      const auto& list = trace.of_layer[static_cast<std::size_t>(l)];
      if (t >= list.size()) continue;
      const auto n = static_cast<std::size_t>(predictor.rank(l, guesses));
      const auto found = std::span(guesses).first(n);
      meters[0].add(found.first(std::min(n, static_cast<std::size_t>(trace.most))), list[t].ids);
      meters[1].add(found, list[t].ids);
      predictor.saw(l, list[t].ids);
    }
  return {meters[0].recall(), meters[1].recall()};
}

}  // namespace detail

int run_trace(int count, const char* const* words, std::ostream& out, std::ostream& err) {
  using detail::fixed;
  try {
    std::optional<std::string> in, to, file, experts, held, policy_name, page;
    bool as_json = false;
    for (int i = 1; i < count; ++i) {
      const std::string word = words[i];
      const auto value = [&](const char* name, std::optional<std::string>& into) {
        if (word != name) return false;
        if (into) refuse(name, ": expected once");
        if (i + 1 == count) refuse(name, ": expected a value behind it");
        into = words[++i];
        return true;
      };
      if (word == "--help" || word == "-h") {
        out << "usage: " << trace_usage << '\n';
        return 0;
      }
      if (word == "--json") {
        as_json = true;
      } else if (value("--to", to) || value("--out", file) || value("--experts", experts) ||
                 value("--cache", held) || value("--policy", policy_name) ||
                 value("--page", page)) {
      } else if (word.starts_with("--")) {
        refuse("command line: unknown option '", word, "', expected ", trace_usage);
      } else if (in) {
        refuse("command line: expected one file, found '", *in, "' and '", word, "'");
      } else {
        in = word;
      }
    }
    if (!in) refuse("command line: expected ", trace_usage, ", found no file");
    if (to.has_value() != file.has_value()) refuse("--to: expected together with --out");
    std::optional<trace_writer> writer;
    if (to) {
      std::error_code ignored;
      if (std::filesystem::equivalent(*in, *file, ignored))
        refuse("--out: expected another file than ", *in);
      writer.emplace(*file, parse_trace_format(*to));
    }
    detail::trace_view trace;
    read_trace(*in, [&](const trace_step& step) {
      trace.add(step);
      if (writer) writer->write(step);
    });
    if (writer) writer->finish();
    if (trace.steps == 0) refuse(*in, ": expected a trace, found no step");
    if (trace.lookups == 0) refuse(*in, ": expected a trace, found no expert in its steps");
    if (experts) {
      const auto n = detail::parse_number<index_t>("experts", *experts, 1, moeroute::max_experts);
      if (n < trace.experts)
        refuse("--experts: expected at least ", trace.experts, ", as the trace has, found ", n);
      trace.experts = n;
    }

    // Every layer's stack distances, their mean as the curve.
    std::vector<moeroute::expert_trace> layers;
    std::vector<double> curve(static_cast<std::size_t>(trace.experts) + 1);
    std::vector<scatter_line> lines;
    for (index_t l = 0; l < trace.layers; ++l) {
      auto& one = layers.emplace_back(std::max(trace.experts, trace.most));
      one.add(trace.choices(l));
      const auto hits = moeroute::lru_hits(one);
      scatter_line line{"layer " + std::to_string(l), {}};
      for (std::size_t c = 0; c < curve.size(); ++c) {
        curve[c] +=
            static_cast<double>(one.lookups() - hits[c]) / static_cast<double>(trace.lookups);
        line.points.push_back({static_cast<double>(c),
                               one.lookups() == 0
                                   ? 0.0
                                   : 100.0 * static_cast<double>(one.lookups() - hits[c]) /
                                         static_cast<double>(one.lookups()),
                               std::to_string(c)});
      }
      lines.push_back(std::move(line));
    }
    json made;
    made["layers"] = trace.layers;
    made["experts"] = trace.experts;
    made["steps"] = trace.steps;
    made["lookups"] = trace.lookups;
    made["lru_miss_rate"] = curve;
    chart_table misses{.head = {"experts held", "LRU misses"}, .rows = {}};
    for (const index_t part : {1, 2, 3, 4}) {
      const auto c = static_cast<std::size_t>(std::max<index_t>(1, trace.experts * part / 4));
      misses.rows.push_back({std::to_string(c), fixed(100 * curve[c], 1) + " %"});
    }

    chart_table hot{.head = {"layer", "hottest experts", "their share"}, .rows = {}};
    for (index_t l = 0; l < trace.layers; ++l) {
      moeroute::expert_profile profile{
          1, trace.experts, std::vector<std::int64_t>(static_cast<std::size_t>(trace.experts))};
      const auto& one = layers[static_cast<std::size_t>(l)];
      for (const expert_id e : one.ids()) ++profile.uses[static_cast<std::size_t>(e)];
      const auto keys = moeroute::hot_keys(profile, std::max<index_t>(1, trace.experts / 4));
      std::int64_t uses = 0;
      std::string names;
      for (const std::int32_t e : keys) {
        uses += profile.uses[static_cast<std::size_t>(e)];
        names += (names.empty() ? "" : " ") + std::to_string(e);
      }
      const double share =
          one.lookups() == 0 ? 0 : static_cast<double>(uses) / static_cast<double>(one.lookups());
      made["hot"].push_back({{"layer", l}, {"experts", keys}, {"share", share}});
      hot.rows.push_back({std::to_string(l), names, fixed(100 * share, 1) + " %"});
    }

    const index_t k = std::max<index_t>(1, trace.most);
    chart_table recall{
        .head = {"predictor", "recall at " + std::to_string(k), "at " + std::to_string(2 * k)},
        .rows = {}};
    const auto add_recall = [&](const char* name, std::array<double, 2> r) {
      made["recall"][name] = r;
      recall.rows.push_back({name, fixed(100 * r[0], 1) + " %", fixed(100 * r[1], 1) + " %"});
    };
    add_recall("last",
               detail::recall_of(trace, moeroute::last_predictor(trace.layers, trace.experts)));
    add_recall("popularity", detail::recall_of(trace, moeroute::popularity_predictor(
                                                          trace.layers, trace.experts)));
    // Its counts are layers * E^2.
    if (trace.layers > 1 && trace.layers * trace.experts * trace.experts <= (index_t{1} << 26))
      add_recall("transition", detail::recall_of(trace, moeroute::transition_predictor(
                                                            trace.layers, trace.experts)));

    chart_table unions{.head = {"batch", "distinct experts", "regrouped"}, .rows = {}};
    for (const index_t batch : {2, 4, 8, 16}) {
      double before = 0, after = 0, batches = 0;
      bool skipped = false;
      for (index_t l = 0; l < trace.layers; ++l) {
        const moeroute::assignment a = trace.choices(l);
        std::vector<std::int32_t> given(static_cast<std::size_t>(a.tokens()));
        std::iota(given.begin(), given.end(), 0);
        before += static_cast<double>(moeroute::distinct_experts(a, given, batch));
        // Quadratic: not of long traces.
        skipped = skipped || a.tokens() > 8192;
        if (!skipped)
          after += static_cast<double>(
              moeroute::distinct_experts(a, moeroute::regroup(a, batch), batch));
        batches += static_cast<double>((a.tokens() + batch - 1) / batch);
      }
      made["union"].push_back({{"batch", batch},
                               {"distinct", before / batches},
                               {"regrouped", skipped ? json(nullptr) : json(after / batches)}});
      unions.rows.push_back({std::to_string(batch), fixed(before / batches, 2),
                             skipped ? "-" : fixed(after / batches, 2)});
    }

    std::string cache_line;
    if (held || policy_name) {
      const auto capacity = detail::parse_number<index_t>(
          "cache", held.value_or(std::to_string(std::max(k, trace.experts / 2))), 1, trace.experts);
      const std::string name = policy_name.value_or("lru");
      std::optional<moeroute::cache_policy> policy;
      for (int p = 0; p <= static_cast<int>(moeroute::cache_policy::belady); ++p)
        if (name == to_string(static_cast<moeroute::cache_policy>(p)))
          policy = static_cast<moeroute::cache_policy>(p);
      if (!policy)
        refuse(
            "--policy: expected lru, lfu, fifo, segmented, least_stale, cost_aware, segment or "
            "belady, found '",
            name, "'");
      std::int64_t hits = 0;
      for (const auto& one : layers)
        hits += moeroute::simulate_cache(one, {.policy = *policy, .capacity = capacity}).hits;
      const double rate = static_cast<double>(hits) / static_cast<double>(trace.lookups);
      made["cache"] = {{"policy", name}, {"held", capacity}, {"hit_rate", rate}};
      cache_line = join(name, " of ", capacity, " experts per layer: ", fixed(100 * rate, 2),
                        " % of lookups hit\n");
    }

    if (as_json) {
      out << made.dump() << '\n';
    } else {
      out << join(trace.layers, " layers of ", trace.experts, " experts, ", trace.steps, " steps, ",
                  trace.lookups, " lookups\n\n");
      for (const chart_table* table : {&misses, &hot, &recall, &unions}) {
        write_markdown(out, *table);
        out << '\n';
      }
      out << cache_line;
    }
    if (page) {
      save_page(*page, "A trace of routing",
                join(*in, ": ", trace.layers, " layers of ", trace.experts, " experts, ",
                     trace.lookups, " lookups."),
                [&](std::ostream& html) {
                  html << "<style>.dot { fill: var(--page); stroke-width: 2; }</style>\n";
                  // A few layers tell the story; eight hues tell them apart.
                  std::vector<scatter_line> some;
                  std::vector<chart_line> names;
                  const std::size_t every = std::max<std::size_t>(1, (lines.size() + 7) / 8);
                  for (std::size_t l = 0; l < lines.size(); l += every) {
                    some.push_back(lines[l]);
                    names.push_back({lines[l].name, {}});
                  }
                  write_names(html, names);
                  write_scatter(html, some, "Misses of an LRU cache", "experts held per layer",
                                "misses, % of lookups", static_cast<double>(trace.experts), 0, 100);
                  for (const chart_table* table : {&hot, &recall, &unions})
                    write_html(html, *table);
                });
      if (!as_json) out << "written: " << *page << '\n';
    }
    out << std::flush;
    if (!out) refuse("the output cannot be written");
    return 0;
  } catch (const std::exception& e) {
    err << one_line(std::string("trace: ") + e.what()) << '\n';
  }
  return 2;
}

}  // namespace example
