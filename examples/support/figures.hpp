// What generate prints below the text: speed, where the time went, and how
// the load fell on the experts.
#pragma once

#include "load_profile.hpp"
#include "stopwatch.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string>
#include <string_view>

namespace example {

/// Time spent on so many tokens.
struct phase {
  std::int64_t tokens = 0;
  stopwatch watch;

  [[nodiscard]] double rate() const {
    const double seconds = watch.seconds();
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
  }
  [[nodiscard]] double share(part of) const {
    const double all = watch.seconds();
    return all > 0 ? 100.0 * watch.seconds(of) / all : 0.0;
  }
};

inline void print_speed(std::ostream& out, const phase& prefill, const phase& decode) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << std::fixed << std::setprecision(0);
  const auto line = [&](const char* name, const phase& of) {
    text << std::left << std::setw(12) << name << std::right << std::setw(6) << of.tokens
         << " tokens " << std::setw(8) << of.rate() << " tokens/s\n";
  };
  line("prefill", prefill);
  if (decode.tokens > 0) {
    line("decode", decode);
  }
  text << std::setprecision(1) << "peak memory "
       << static_cast<double>(peak_memory()) / (1024.0 * 1024.0) << " MiB\n";
  out << text.str();
}

inline void print_shares(std::ostream& out, const phase& prefill, const phase& decode) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << std::fixed << std::setprecision(1);
  text << "time        prefill   decode\n";
  for (std::size_t i = 0; i < part_names.size(); ++i) {
    const auto which = static_cast<part>(i);
    text << "  " << std::left << std::setw(10) << part_names[i] << std::right << std::setw(5)
         << prefill.share(which) << " %";
    if (decode.tokens > 0) {
      text << std::setw(7) << decode.share(which) << " %";
    }
    text << '\n';
  }
  out << text.str();
}

/// One bar per expert, 64 to a line, the tallest for the busiest of all layers.
inline void print_bars(std::ostream& out, const load_profile& load) {
  constexpr std::array<std::string_view, 9> bars{" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  constexpr std::size_t per_line = 64;
  double top = 1.0;
  for (const layer_load& layer : load.layers) {
    top = std::max(top, layer.relative(layer.busiest()));
  }
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text << std::fixed << std::setprecision(1) << "expert load, one bar per expert (tallest: " << top
       << "x its even share)\n";
  for (std::size_t i = 0; i < load.layers.size(); ++i) {
    const layer_load& layer = load.layers[i];
    text << "  layer " << std::left << std::setw(3) << i << std::right;
    for (std::size_t e = 0; e < layer.choices.size(); ++e) {
      if (e > 0 && e % per_line == 0) {
        text << "\n           ";
      }
      // Rounded up, so that an expert with any token shows.
      const double height = std::ceil(layer.relative(e) / top * 8.0 - 1e-9);
      text << bars[static_cast<std::size_t>(std::clamp(height, 0.0, 8.0))];
    }
    text << "  busiest " << layer.busiest() << ": " << layer.relative(layer.busiest()) << "x\n";
  }
  out << text.str();
}

}  // namespace example
