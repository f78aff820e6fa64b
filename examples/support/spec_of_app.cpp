#include "spec_of_app.hpp"

#include "arguments.hpp"
#include "json.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include <moeroute/json/config_json.hpp>
#include <moeroute/json/gguf.hpp>
#include <moeroute/json/model_routers.hpp>

namespace example {

namespace detail {

/// "3", "0-2" or "0 4 8-11": layers as a person writes them.
[[nodiscard]] inline std::string runs_of(const std::vector<std::size_t>& layers) {
  std::string text;
  for (std::size_t i = 0; i < layers.size();) {
    std::size_t end = i + 1;
    while (end < layers.size() && layers[end] == layers[end - 1] + 1) ++end;
    if (!text.empty()) text += ' ';
    text += std::to_string(layers[i]);
    if (end - i > 1) {
      text += '-';
      text += std::to_string(layers[end - 1]);
    }
    i = end;
  }
  return text;
}

/// The spec, with a line before it for every layer that differs, and one behind it for those
/// without experts.
[[nodiscard]] inline std::string lines_of(const moeroute::model_routers& model) {
  struct kind {
    std::optional<moeroute::router_spec> spec;
    std::vector<std::size_t> layers;
  };
  std::vector<kind> kinds;
  kind none;
  for (std::size_t l = 0; l < model.layers.size(); ++l) {
    const auto& spec = model.layers[l];
    if (!spec) {
      none.layers.push_back(l);
      continue;
    }
    kind* mine = nullptr;
    for (kind& one : kinds)
      if (one.spec == spec) mine = &one;
    if (mine == nullptr) mine = &kinds.emplace_back(kind{spec, {}});
    mine->layers.push_back(l);
  }
  const auto named = [](const std::vector<std::size_t>& layers) {
    std::string name(layers.size() == 1 ? "layer " : "layers ");
    return name += runs_of(layers);
  };
  std::string text;
  if (kinds.size() < 2 && (kinds.empty() || kinds[0].spec == model.spec)) {
    text = to_string(model.spec) + "\n";
  } else {
    for (const kind& one : kinds) text += named(one.layers) + ": " + to_string(*one.spec) + "\n";
    if (kinds.size() < 2) text += "other layers: " + to_string(model.spec) + "\n";
  }
  if (!none.layers.empty()) text += named(none.layers) + ": no experts\n";
  return text;
}

}  // namespace detail

/// The routers of a config.json, or of a GGUF file by its name's end.
[[nodiscard]] inline moeroute::model_routers read_routers(const std::filesystem::path& path) {
  if (path.extension() != ".gguf")
    return moeroute::routers_from_config(read_json(path), path.string());
  // The metadata stands first; most of it is the vocabulary.
  const input_file file(path);
  std::vector<std::uint8_t> head(
      static_cast<std::size_t>(std::min<std::uint64_t>(file.size(), json_size_limit)));
  file.read(0, head.data(), head.size());
  return moeroute::routers_from_gguf(moeroute::parse_gguf_metadata(head, path.string()),
                                     path.string());
}

int run_spec_of(int count, const char* const* words, std::ostream& out, std::ostream& err) {
  try {
    std::optional<std::string> file, layer;
    for (int i = 1; i < count; ++i) {
      const std::string word = words[i];
      if (word == "--help" || word == "-h") {
        out << "usage: spec_of CONFIG.json | MODEL.gguf [--layer N]\n";
        return 0;
      }
      if (word.starts_with("--layer=")) {
        layer = word.substr(8);
      } else if (word == "--layer") {
        if (i + 1 == count) refuse("--layer: expected a number behind it");
        layer = words[++i];
      } else if (word.starts_with("--")) {
        refuse("command line: unknown option '", word,
               "', expected CONFIG.json | MODEL.gguf [--layer N]");
      } else if (file) {
        refuse("command line: expected one file, found '", *file, "' and '", word, "'");
      } else {
        file = word;
      }
    }
    if (!file) refuse("command line: expected CONFIG.json | MODEL.gguf [--layer N], found no file");
    const moeroute::model_routers model = read_routers(*file);
    if (layer) {
      const auto n = detail::parse_number<std::int64_t>("layer", *layer, 0, 1 << 20);
      if (model.count != 0 && n >= model.count)
        refuse("--layer: expected 0 to ", model.count - 1, ", the layers of ", *file, ", found ",
               n);
      const auto spec = model.of(n);
      out << (spec ? to_string(*spec) : "no experts") << '\n' << std::flush;
    } else {
      out << detail::lines_of(model) << std::flush;
    }
    if (!out) refuse("the output cannot be written");
    return 0;
  } catch (const std::exception& e) {
    err << one_line(std::string("spec_of: ") + e.what()) << '\n';
  }
  return 2;
}

}  // namespace example
