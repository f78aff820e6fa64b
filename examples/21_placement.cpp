// Who should hold which expert: planners of placements compared on simulated ranks, 8 to 2048 of
// them, on made-up traffic that drifts and switches, or on the router logits of a trace. Writes
// tables and a picture.
//
//   placement [TRACE.npy] [PAGE.html] [MOST_RANKS]
#include "support/chart.hpp"
#include "support/npy.hpp"
#include "support/placed_words.hpp"
#include "support/placement_figures.hpp"

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include <moeroute/placement/simulate.hpp>
#include <moeroute/placement/traffic.hpp>

namespace {

using namespace moeroute;
using example::detail::fixed;

constexpr planner_kind planners[] = {planner_kind::contiguous,   planner_kind::eplb,
                                     planner_kind::search,       planner_kind::incremental,
                                     planner_kind::batch_split,  planner_kind::spill,
                                     planner_kind::exact_balance};

std::string name_of(planner_kind p) { return planner_names[static_cast<std::size_t>(p)]; }

struct setting {
  index_t experts, ranks, more, steps;
};

// Counts of every step, [steps][E].
using traffic_steps = std::vector<std::vector<double>>;

traffic_steps made_up(const setting& s, double zipf, index_t switch_at, index_t k) {
  expert_traffic traffic(
      {.experts = s.experts, .zipf = zipf, .drift = 0.05, .switch_at = switch_at, .seed = 7});
  traffic_steps list;
  for (index_t i = 0; i < s.steps; ++i) {
    list.emplace_back();
    traffic.sample(static_cast<double>(512 * s.ranks * k), static_cast<std::uint64_t>(i),
                   list.back());
    traffic.advance();
  }
  return list;
}

// The k largest logits of each token, batch by batch; one list for each layer.
std::vector<traffic_steps> from_trace(const std::filesystem::path& path, index_t k, index_t batch,
                                      index_t& experts) {
  const example::npy_array file = example::read_npy(path);
  if (file.shape.size() != 3)
    example::refuse(path.string(), ": expected [layers, tokens, experts]");
  const auto layers = static_cast<index_t>(file.shape[0]),
             tokens = static_cast<index_t>(file.shape[1]);
  experts = static_cast<index_t>(file.shape[2]);
  if (experts < 2 * k || tokens < 4 * batch)
    example::refuse(path.string(), ": expected at least ", 2 * k, " experts and ", 4 * batch,
                    " tokens");
  std::vector<traffic_steps> list(static_cast<std::size_t>(layers));
  std::vector<index_t> order(static_cast<std::size_t>(experts));
  for (index_t l = 0; l < layers; ++l)
    for (index_t first = 0; first + batch <= tokens; first += batch) {
      std::vector<double> count(static_cast<std::size_t>(experts), 0.0);
      for (index_t t = first; t < first + batch; ++t) {
        const float* const z = file.values.data() + (l * tokens + t) * experts;
        std::iota(order.begin(), order.end(), index_t{0});
        std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](index_t a, index_t b) {
          return z[a] > z[b] || (z[a] == z[b] && a < b);
        });
        for (index_t r = 0; r < k; ++r)
          ++count[static_cast<std::size_t>(order[static_cast<std::size_t>(r)])];
      }
      list[static_cast<std::size_t>(l)].push_back(std::move(count));
    }
  return list;
}

struct outcome {
  std::vector<double> excess, moved;  // of each step, the mean over layers
  double imbalance = 0.0, moves = 0.0, milliseconds = 0.0, off_node = 0.0;  // means from step 1 on
};

outcome simulate(const std::vector<traffic_steps>& layers, const setting& s, planner_kind planner,
                 index_t k, double memory) {
  simulation_options o{.planner = planner, .slots = s.experts + s.more, .memory = memory, .k = k};
  o.incremental = {.target = 1.02, .budget = std::max<index_t>(8, s.ranks / 8)};
  if (s.ranks > 128) o.search = {.candidates = 4, .most_steps = 4, .kicks = 0};
  o.machine.ranks = s.ranks;
  o.machine.nodes = std::max<index_t>(1, s.ranks / 8);
  outcome out;
  for (const traffic_steps& steps : layers) {
    layer_simulation layer(s.experts, o);
    out.excess.resize(steps.size());
    out.moved.resize(steps.size());
    const double all = static_cast<double>(layers.size());
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const simulated_step step = layer.next(steps[i]);
      out.excess[i] += (step.imbalance - 1.0) / all;
      out.moved[i] += step.moves / all;
      if (i == 0) continue;
      const double part = 1.0 / (all * static_cast<double>(steps.size() - 1));
      out.imbalance += step.imbalance * part;
      out.milliseconds += 1e3 * step.seconds.total() * part;
      out.off_node += step.off_node_rows * part;
      // The first plan moves everything, whoever makes it.
      if (i > 1) out.moves += step.moves / (all * static_cast<double>(steps.size() - 2));
    }
  }
  return out;
}

int run(const std::filesystem::path& trace, const std::filesystem::path& page, index_t most) {
  const auto began = std::chrono::steady_clock::now();
  const bool real = !trace.empty();
  const index_t k = real ? 4 : 8;
  std::vector<setting> settings{{64, 8, 8, 24},      {256, 32, 32, 24},     {256, 64, 64, 24},
                                {1024, 256, 256, 8}, {2048, 1024, 1024, 5}, {4096, 2048, 2048, 4}};
  std::erase_if(settings, [&](const setting& s) { return s.ranks > most; });
  std::vector<traffic_steps> traced;
  if (real) {
    index_t experts = 0;
    traced = from_trace(trace, k, 64, experts);
    settings.clear();
    for (index_t ranks = 2; ranks <= std::min<index_t>(32, experts / 2); ranks *= 2)
      if (experts % ranks == 0)
        settings.push_back({experts, ranks, ranks, static_cast<index_t>(traced[0].size())});
  }

  example::chart_table table{{"ranks", "experts", "slots", "planner", "imbalance", "moved per step",
                              "rows off node", "layer, ms"},
                             {}};
  std::vector<example::chart_line> excess, moved;
  for (const setting& s : settings) {
    const std::vector<traffic_steps> layers =
        real ? traced : std::vector<traffic_steps>{made_up(s, 1.1, -1, k)};
    for (const planner_kind planner : planners) {
      const outcome o = simulate(layers, s, planner, k, real ? 0.8 : 0.5);
      const bool replicas = planner >= planner_kind::eplb && planner <= planner_kind::batch_split;
      table.rows.push_back({std::to_string(s.ranks), std::to_string(s.experts),
                            std::to_string(replicas ? s.experts + s.more : s.experts),
                            name_of(planner), fixed(o.imbalance, 3), fixed(o.moves, 1),
                            fixed(o.off_node, 2), fixed(o.milliseconds, 2)});
    }
  }
  // Drawn over more steps, with a switch to another kind of text halfway where traffic is made up.
  setting drawn = settings[std::min<std::size_t>(2, settings.size() - 1)];
  if (!real) drawn.steps = 40;
  const std::vector<traffic_steps> layers =
      real ? traced : std::vector<traffic_steps>{made_up(drawn, 1.1, drawn.steps / 2, k)};
  for (const planner_kind planner : planners) {
    const outcome o = simulate(layers, drawn, planner, k, real ? 0.8 : 0.5);
    excess.push_back({name_of(planner), o.excess});
    moved.push_back({name_of(planner), o.moved});
    for (double& v : moved.back().values) v /= static_cast<double>(drawn.experts + drawn.more);
  }
  example::write_markdown(std::cout, table);

  example::chart_table figures{{"figure", "known", "here", ""}, {}};
  bool held = true;
  for (const example::placement_figure& f : example::placement_figures()) {
    figures.rows.push_back(
        {f.name, fixed(f.known, 4), fixed(f.here, 4), f.holds() ? "holds" : "NO"});
    held = held && f.holds();
  }
  std::cout << '\n';
  example::write_markdown(std::cout, figures);

  const std::string of = real ? "the router logits of " + trace.filename().string() +
                                    ", batches of 64 tokens, " + std::to_string(k) + " experts each"
                              : "made-up traffic: Zipf 1.1, loads that drift by 5 % a step and "
                                "switch halfway, 512 tokens per rank, 8 experts each";
  example::save_page(
      page, "Who should hold which expert",
      "Simulated ranks, 8 to a node, on " + of +
          ". Planners of placements see past batches only; the last three see the batch itself.",
      [&](std::ostream& out) {
        example::write_names(out, excess);
        out << "<h2>Imbalance of " << drawn.ranks << " ranks, over 1</h2>\n";
        example::write_lines(out, excess, "steps", "busiest rank over the mean, less 1", 0.0003,
                             30.0);
        out << "<h2>Experts moved, over slots</h2>\n";
        example::write_lines(out, moved, "steps", "experts newly on a rank / slots", 0.003, 1.0);
        out << "<h2>From one machine to many</h2>\n";
        example::write_html(out, table);
        out << "<p class=\"note\">Imbalance is the mean over steps of the busiest rank's rows over "
               "the mean; moved counts experts newly on a rank. "
               "Milliseconds are of the cost model (300 GB/s within a node, 50 between), with "
               "weights that move for one batch on the way; a plan "
               "between batches is not charged.</p>\n<h2>Figures known from elsewhere</h2>\n";
        example::write_html(out, figures);
      });
  std::cout << "\nwritten: " << page.string() << "\nseconds: "
            << fixed(
                   std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count(),
                   1)
            << '\n';
  if (!held) std::cerr << "placement: a known figure does not hold\n";
  return held ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (example::asked_how(argc, argv, 3, "placement [TRACE.npy] [PAGE.html] [MOST_RANKS]",
                           std::cout))
      return 0;
    std::filesystem::path trace, page = "build/placement.html";
    index_t most = 2048;
    for (int i = 1; i < argc; ++i) {
      const std::filesystem::path word = argv[i];
      if (word.extension() == ".html")
        page = word;
      else if (word.extension() == ".npy")
        trace = word;
      else
        most = example::number_in_place("MOST_RANKS", argv[i], index_t{8}, index_t{2048});
    }
    return run(trace, page, most);
  } catch (const std::exception& e) {
    std::cerr << "placement: " << example::one_line(e.what()) << '\n';
    return 2;
  }
}
