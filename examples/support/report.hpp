// The load report: one HTML page that needs nothing but itself.
#pragma once

#include "error.hpp"
#include "load_profile.hpp"
#include "report_style.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

namespace example {

struct report_facts {
  std::string model;
  std::string model_type;
  std::int64_t experts = 0;
  std::int64_t experts_per_token = 0;
};

namespace detail {

/// Upper ends of the heat map's classes, in multiples of the even share.
inline constexpr std::array<double, 7> heat_bounds{0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0};

[[nodiscard]] inline std::size_t heat_class(double relative) {
  return static_cast<std::size_t>(
      std::upper_bound(heat_bounds.begin(), heat_bounds.end(), relative) - heat_bounds.begin());
}

[[nodiscard]] inline std::string escape_html(std::string_view text) {
  std::string made;
  for (const char c : text) {
    switch (c) {
      case '&': made += "&amp;"; break;
      case '<': made += "&lt;"; break;
      case '>': made += "&gt;"; break;
      case '"': made += "&quot;"; break;
      default: made += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
    }
  }
  return made;
}

[[nodiscard]] inline std::string fixed(double value, int digits) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << std::fixed << std::setprecision(digits) << value;
  return text.str();
}

/// Lengths of the heat map, in the units of its viewBox.
struct heat_layout {
  std::int64_t experts;
  std::int64_t layers;
  double left = 52;
  double top = 6;
  double bottom = 34;
  double map_width = 384;

  [[nodiscard]] double cell_width() const { return map_width / static_cast<double>(experts); }
  [[nodiscard]] double cell_height() const {
    return std::clamp(220.0 / static_cast<double>(layers), 7.0, 26.0);
  }
  [[nodiscard]] double map_height() const { return cell_height() * static_cast<double>(layers); }
  [[nodiscard]] double width() const { return left + map_width + 8; }
  [[nodiscard]] double height() const { return top + map_height() + bottom; }
  /// Every so many layers or experts carry a number.
  [[nodiscard]] static std::int64_t label_step(double cell, double wanted) {
    std::int64_t step = 1;
    while (static_cast<double>(step) * cell < wanted) {
      step *= 2;
    }
    return step;
  }
};

inline void write_heat_cells(std::ostream& out, const load_profile& profile,
                             const heat_layout& at) {
  // A hair of surface between neighbours, unless the cells are tiny.
  const double gap = at.cell_width() > 5 ? 1.0 : 0.0;
  for (std::size_t layer = 0; layer < profile.layers.size(); ++layer) {
    const layer_load& load = profile.layers[layer];
    const double total = std::max(1.0, static_cast<double>(load.total()));
    for (std::size_t expert = 0; expert < load.choices.size(); ++expert) {
      const double relative = load.relative(expert);
      out << "<rect class=\"h" << heat_class(relative) << "\" x=\""
          << fixed(at.left + static_cast<double>(expert) * at.cell_width(), 2) << "\" y=\""
          << fixed(at.top + static_cast<double>(layer) * at.cell_height(), 2) << "\" width=\""
          << fixed(at.cell_width() - gap, 2) << "\" height=\"" << fixed(at.cell_height() - gap, 2)
          << "\"><title>layer " << layer << ", expert " << expert << ": " << load.choices[expert]
          << " choices, " << fixed(100.0 * static_cast<double>(load.choices[expert]) / total, 1)
          << " % (" << fixed(relative, 2) << "× even share)</title></rect>\n";
    }
  }
}

inline void write_heat_axes(std::ostream& out, const heat_layout& at) {
  const auto rows = heat_layout::label_step(at.cell_height(), 12);
  for (std::int64_t layer = 0; layer < at.layers; layer += rows) {
    out << "<text class=\"tick end\" x=\"" << fixed(at.left - 7, 1) << "\" y=\""
        << fixed(at.top + (static_cast<double>(layer) + 0.5) * at.cell_height() + 3.5, 1) << "\">"
        << (layer == 0 ? "layer " : "") << layer << "</text>\n";
  }
  const auto columns = heat_layout::label_step(at.cell_width(), 40);
  for (std::int64_t expert = 0; expert < at.experts; expert += columns) {
    out << "<text class=\"tick mid\" x=\""
        << fixed(at.left + (static_cast<double>(expert) + 0.5) * at.cell_width(), 1) << "\" y=\""
        << fixed(at.top + at.map_height() + 14, 1) << "\">" << expert << "</text>\n";
  }
  out << "<text class=\"axis mid\" x=\"" << fixed(at.left + at.map_width / 2, 1) << "\" y=\""
      << fixed(at.top + at.map_height() + 29, 1) << "\">expert</text>\n";
}

inline void write_panel(std::ostream& out, const load_profile& profile) {
  const auto& layers = profile.layers;
  const heat_layout at{static_cast<std::int64_t>(layers.front().choices.size()),
                       static_cast<std::int64_t>(layers.size())};
  std::size_t worst = 0;
  for (std::size_t i = 1; i < layers.size(); ++i) {
    worst = layers[i].max_violation() > layers[worst].max_violation() ? i : worst;
  }
  const std::size_t expert = layers[worst].busiest();
  out << "<figure>\n<h2>" << escape_html(profile.name) << " <small>" << layers.front().tokens
      << " tokens</small></h2>\n<svg viewBox=\"0 0 " << fixed(at.width(), 0) << ' '
      << fixed(at.height(), 0) << "\" role=\"img\" aria-label=\"Expert load by layer, "
      << escape_html(profile.name) << "\">\n";
  write_heat_cells(out, profile, at);
  write_heat_axes(out, at);
  out << "</svg>\n<figcaption>Busiest: expert " << expert << " of layer " << worst << ", "
      << fixed(layers[worst].relative(expert), 1) << "× its even share.</figcaption>\n"
      << "</figure>\n";
}

inline void write_legend(std::ostream& out) {
  out << "<div class=\"legend\"><span>Load, in multiples of the even share</span>"
         "<ul>\n";
  for (std::size_t i = 0; i <= heat_bounds.size(); ++i) {
    out << "<li><svg viewBox=\"0 0 28 14\" aria-hidden=\"true\"><rect class=\"h" << i
        << "\" width=\"28\" height=\"14\" rx=\"2\"/></svg>";
    if (i == heat_bounds.size()) {
      out << "from " << heat_bounds.back() << "×";
    } else {
      out << (i == 0 ? 0.0 : heat_bounds[i - 1]) << "–" << heat_bounds[i] << "×";
    }
    out << "</li>\n";
  }
  out << "</ul></div>\n";
}

inline void write_table(std::ostream& out, const std::vector<load_profile>& profiles) {
  out << "<div class=\"scroll\"><table>\n<thead><tr><th rowspan=\"2\">Layer</th>";
  for (const load_profile& profile : profiles) {
    out << "<th colspan=\"2\">" << escape_html(profile.name) << "</th>";
  }
  out << "</tr>\n<tr>";
  for (std::size_t i = 0; i < profiles.size(); ++i) {
    out << "<th>MaxVio</th><th>entropy, bits</th>";
  }
  out << "</tr></thead>\n<tbody>\n";
  for (std::size_t layer = 0; layer < profiles.front().layers.size(); ++layer) {
    out << "<tr><th>" << layer << "</th>";
    for (const load_profile& profile : profiles) {
      out << "<td>" << fixed(profile.layers[layer].max_violation(), 2) << "</td><td>"
          << fixed(profile.layers[layer].entropy(), 2) << "</td>";
    }
    out << "</tr>\n";
  }
  out << "</tbody></table></div>\n";
}

}  // namespace detail

/// Requires: at least one profile, all of the same model.
inline void write_report(std::ostream& out, const report_facts& facts,
                         const std::vector<load_profile>& profiles) {
  using namespace detail;
  out << "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
         "<meta name=\"color-scheme\" content=\"light dark\">\n<title>Expert load of "
      << escape_html(facts.model) << "</title>\n<style>\n"
      << report_style << "</style>\n</head>\n<body>\n<main>\n<h1>Expert load by text</h1>\n"
      << "<p class=\"lead\">Model <b>" << escape_html(facts.model) << "</b>, type "
      << escape_html(facts.model_type) << ": " << profiles.front().layers.size() << " layers of "
      << facts.experts << " experts, " << facts.experts_per_token
      << " chosen per token. The even share is "
      << fixed(100.0 / static_cast<double>(facts.experts), 2) << " % of a layer’s choices.</p>\n";
  write_legend(out);
  out << "<div class=\"panels\">\n";
  for (const load_profile& profile : profiles) {
    write_panel(out, profile);
  }
  out << "</div>\n<h2>Imbalance and entropy</h2>\n";
  write_table(out, profiles);
  out << "<p class=\"note\"><b>MaxVio</b> is the busiest expert’s load over the mean load, "
         "less one: 0 where all experts get the same. <b>Entropy</b> is that of the router’s "
         "softmax over all experts, averaged over tokens: 0 bits where it always knows one "
         "expert, "
      << fixed(std::log2(static_cast<double>(facts.experts)), 2)
      << " bits where it cannot tell them apart. Texts run in segments of 256 tokens, each "
         "with a fresh context.</p>\n</main>\n</body>\n</html>\n";
}

/// Refuses a path that cannot be written, before the work and with nothing lost
/// of what is there.
inline void check_report_path(const std::filesystem::path& path) {
  if (!std::ofstream(path, std::ios::binary | std::ios::app)) {
    refuse(path.string(), ": cannot be written");
  }
}

inline void save_report(const std::filesystem::path& path, const report_facts& facts,
                        const std::vector<load_profile>& profiles) {
  std::ofstream out(path, std::ios::binary);
  out.imbue(std::locale::classic());
  write_report(out, facts, profiles);
  out.flush();
  if (!out) {
    refuse(path.string(), ": cannot be written");
  }
}

}  // namespace example
