// Points in a plane, joined in their order: what two figures of the same runs trade for one
// another.
#pragma once

#include "chart.hpp"

#include <algorithm>
#include <cmath>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace example {

struct scatter_point {
  double x, y;
  std::string name;
};

/// Points of one kind; a single one stands alone.
struct scatter_line {
  std::string name;
  std::vector<scatter_point> points;
};

/// Linear axes from (0, low) to (right, high); points outside are left out. The i-th line has the
/// hue of write_names()'s i-th.
inline void write_scatter(std::ostream& out, const std::vector<scatter_line>& lines,
                          std::string_view title, std::string_view x_name, std::string_view y_name,
                          double right, double low, double high) {
  using detail::fixed;
  constexpr double left = 84, top = 30, width = 538, height = 290;
  const auto x_of = [&](double x) { return left + width * x / right; };
  const auto y_of = [&](double y) { return top + height * (high - y) / (high - low); };
  const auto step_of = [](double span) {
    double step = std::pow(10.0, std::floor(std::log10(span)));
    for (const double part : {0.1, 0.2, 0.25, 0.5})
      if (span / (step * part) <= 7) return step * part;
    return step;
  };
  out << "<figure class=\"chart\"><svg viewBox=\"0 0 640 372\" role=\"img\" aria-label=\""
      << detail::escape_html(title) << "\">\n<text class=\"axis\" x=\"" << fixed(left, 1)
      << "\" y=\"16\">" << detail::escape_html(title) << "</text>\n";
  const double up = step_of(high - low), along = step_of(right);
  for (double y = std::ceil(low / up) * up; y <= high + 1e-9; y += up)
    out << "<line class=\"grid\" x1=\"" << fixed(left, 1) << "\" x2=\"" << fixed(left + width, 1)
        << "\" y1=\"" << fixed(y_of(y), 1) << "\" y2=\"" << fixed(y_of(y), 1)
        << "\"/><text class=\"tick end\" x=\"" << fixed(left - 8, 1) << "\" y=\""
        << fixed(y_of(y) + 4, 1) << "\">" << std::round(y * 1000) / 1000 + 0.0 << "</text>\n";
  for (double x = 0; x <= right + 1e-9; x += along)
    out << "<text class=\"tick mid\" x=\"" << fixed(x_of(x), 1) << "\" y=\""
        << fixed(top + height + 18, 1) << "\">" << std::round(x * 1000) / 1000 << "</text>\n";
  out << "<text class=\"axis mid\" x=\"" << fixed(left + width / 2, 1) << "\" y=\""
      << fixed(top + height + 40, 1) << "\">" << detail::escape_html(x_name)
      << "</text>\n<text class=\"axis mid\" transform=\"translate(16 " << fixed(top + height / 2, 1)
      << ") rotate(-90)\">" << detail::escape_html(y_name) << "</text>\n";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    std::string path;
    for (const scatter_point& p : lines[i].points) {
      if (p.x > right || p.y > high || p.y < low) continue;
      path += (path.empty() ? "M" : "L") + fixed(x_of(p.x), 1) + " " + fixed(y_of(p.y), 1);
    }
    if (lines[i].points.size() > 1)
      out << "<path class=\"" << detail::line_style(i) << "\" d=\"" << path << "\"/>\n";
    for (const scatter_point& p : lines[i].points) {
      if (p.x > right || p.y > high || p.y < low) continue;
      out << "<circle class=\"dot s" << i % 8 << "\" cx=\"" << fixed(x_of(p.x), 1) << "\" cy=\""
          << fixed(y_of(p.y), 1) << "\" r=\"" << (lines[i].points.size() > 1 ? 3.5 : 6.5)
          << "\"><title>" << detail::escape_html(lines[i].name + " " + p.name) << ": "
          << fixed(p.x, 3) << ", " << fixed(p.y, 2) << "</title></circle>\n";
    }
  }
  out << "</svg></figure>\n";
}

}  // namespace example
