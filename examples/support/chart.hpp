// Charts of one page: lines over a logarithmic axis, tables; HTML that needs nothing but
// itself.
#pragma once

#include "error.hpp"
#include "report.hpp"
#include "report_style.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

namespace example {

/// One line: a value for each step from 0 on.
struct chart_line {
  std::string name;
  std::vector<double> values;
};

namespace detail {

// Hues that stay apart for most eyes, a shade for each background; the dashes tell them apart
// without any.
inline constexpr std::string_view chart_style = R"css(
:root { --c0: #0b6e99; --c1: #c2410c; --c2: #15803d; --c3: #9d174d; --c4: #6d28d9; --c5: #8a6d00;
  --c6: #475569; --c7: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #5cc3ee; --c1: #ff9a62; --c2: #6fd28e; --c3: #f48fb8; --c4: #b9a2ff; --c5: #e3c04a;
    --c6: #b5c0cc; --c7: #ff8a8a; }
}
figure.chart { max-width: 1000px; margin-bottom: 22px; }
.chart path { fill: none; stroke-width: 2; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.s3 { stroke: var(--c3); } .s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.s6 { stroke: var(--c6); } .s7 { stroke: var(--c7); }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 3; } .d3 { stroke-dasharray: 9 3 2 3; }
td:first-child, th:first-child { text-align: left; }
td { white-space: nowrap; }
/* A picture shrinks with its page; what is written in it has to stay readable. */
@media (max-width: 760px) {
  main { padding: 18px 14px 28px; }
  th, td { padding: 4px 9px; }
  .chart .tick, .chart .axis { font-size: 19px; }
  .map .tick, .map .axis { font-size: 24px; }
}
)css";

struct line_axes {
  double left = 84, top = 12, width = 618, height = 300;
  double low, high;  // of the values, powers of ten apart
  double steps;

  [[nodiscard]] double x(double step) const {
    // The first steps decide: the axis is logarithmic in step + 1.
    return left + width * std::log(step + 1) / std::log(steps + 1);
  }
  [[nodiscard]] double y(double value) const {
    const double v = std::clamp(value, low, high);
    return top + height * (1 - std::log(v / low) / std::log(high / low));
  }
};

inline void write_axes(std::ostream& out, const line_axes& at, std::string_view x_name,
                       std::string_view y_name) {
  for (const double tick : {0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0}) {
    if (tick < at.low || tick > at.high) continue;
    out << "<line class=\"grid\" x1=\"" << fixed(at.left, 1) << "\" x2=\""
        << fixed(at.left + at.width, 1) << "\" y1=\"" << fixed(at.y(tick), 1) << "\" y2=\""
        << fixed(at.y(tick), 1) << "\"/>\n<text class=\"tick end\" x=\"" << fixed(at.left - 8, 1)
        << "\" y=\"" << fixed(at.y(tick) + 4, 1) << "\">" << tick << "</text>\n";
  }
  for (const double tick : {0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0}) {
    if (tick > at.steps) continue;
    out << "<text class=\"tick mid\" x=\"" << fixed(at.x(tick), 1) << "\" y=\""
        << fixed(at.top + at.height + 18, 1) << "\">" << tick << "</text>\n";
  }
  out << "<text class=\"axis mid\" x=\"" << fixed(at.left + at.width / 2, 1) << "\" y=\""
      << fixed(at.top + at.height + 38, 1) << "\">" << escape_html(x_name)
      << "</text>\n<text class=\"axis mid\" transform=\"translate(16 "
      << fixed(at.top + at.height / 2, 1) << ") rotate(-90)\">" << escape_html(y_name)
      << "</text>\n";
}

// Eight hues, and other dashes the second time that a hue comes: 32 lines differ. Hues that are
// four apart look alike to some eyes, and have other dashes too.
inline std::string line_style(std::size_t i) {
  return std::string("s")
      .append(std::to_string(i % 8))
      .append(" d")
      .append(std::to_string((i + i / 4 % 2 + i / 8) % 4));
}

}  // namespace detail

/// Lines over steps, both axes logarithmic; write_names() says which is whose.
///
/// Requires: at most 32 lines, of two values or more; one without values is left out.
inline void write_lines(std::ostream& out, const std::vector<chart_line>& lines,
                        std::string_view x_name, std::string_view y_name, double low, double high) {
  using namespace detail;
  std::size_t most = 2;
  for (const chart_line& line : lines) most = std::max(most, line.values.size());
  line_axes at{.low = low, .high = high, .steps = static_cast<double>(most - 1)};
  out << "<figure class=\"chart\">\n<svg viewBox=\"0 0 720 368\" role=\"img\" aria-label=\""
      << escape_html(y_name) << " against " << escape_html(x_name) << "\">\n";
  write_axes(out, at, x_name, y_name);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].values.empty()) continue;
    out << "<path class=\"" << line_style(i) << "\" d=\"";
    for (std::size_t s = 0; s < lines[i].values.size(); ++s)
      out << (s == 0 ? 'M' : 'L') << fixed(at.x(static_cast<double>(s)), 1) << ' '
          << fixed(at.y(lines[i].values[s]), 1);
    out << "\"><title>" << escape_html(lines[i].name) << "</title></path>\n";
  }
  out << "</svg>\n</figure>\n";
}

/// The names of the lines of charts, each beside its hue and dashes.
inline void write_names(std::ostream& out, const std::vector<chart_line>& lines) {
  out << "<div class=\"legend\"><ul>\n";
  for (std::size_t i = 0; i < lines.size(); ++i)
    out << "<li><svg class=\"chart\" viewBox=\"0 0 28 14\" aria-hidden=\"true\"><path class=\""
        << detail::line_style(i) << "\" d=\"M0 7L28 7\"/></svg>"
        << detail::escape_html(lines[i].name) << "</li>\n";
  out << "</ul></div>\n";
}

/// A table of text; the first column names the rows.
struct chart_table {
  std::vector<std::string> head;
  std::vector<std::vector<std::string>> rows;
};

inline void write_html(std::ostream& out, const chart_table& table) {
  out << "<div class=\"scroll\"><table>\n<thead><tr>";
  for (const std::string& cell : table.head) out << "<th>" << detail::escape_html(cell) << "</th>";
  out << "</tr></thead>\n<tbody>\n";
  for (const auto& row : table.rows) {
    out << "<tr>";
    for (std::size_t i = 0; i < row.size(); ++i)
      out << (i == 0 ? "<th>" : "<td>") << detail::escape_html(row[i])
          << (i == 0 ? "</th>" : "</td>");
    out << "</tr>\n";
  }
  out << "</tbody></table></div>\n";
}

/// The same for a terminal and for Markdown.
inline void write_markdown(std::ostream& out, const chart_table& table) {
  const auto line = [&](const std::vector<std::string>& row) {
    for (const std::string& cell : row) out << "| " << cell << ' ';
    out << "|\n";
  };
  line(table.head);
  for (std::size_t i = 0; i < table.head.size(); ++i) out << (i == 0 ? "|---" : "|---:");
  out << "|\n";
  for (const auto& row : table.rows) line(row);
}

/// A page of a title, a lead and what body(stream) writes. Refuses a path that cannot be written.
template <class Body>
void save_page(const std::filesystem::path& path, std::string_view title, std::string_view lead,
               Body&& body) {
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path());
  std::ofstream out(path, std::ios::binary);
  out.imbue(std::locale::classic());
  out << "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
         "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
         "<meta name=\"color-scheme\" content=\"light dark\">\n<title>"
      << detail::escape_html(title) << "</title>\n<style>\n"
      << detail::report_style << detail::chart_style << "</style>\n</head>\n<body>\n<main>\n<h1>"
      << detail::escape_html(title) << "</h1>\n<p class=\"lead\">" << detail::escape_html(lead)
      << "</p>\n";
  body(out);
  out << "</main>\n</body>\n</html>\n";
  out.flush();
  if (!out) {
    refuse(path.string(), ": cannot be written");
  }
}

}  // namespace example
