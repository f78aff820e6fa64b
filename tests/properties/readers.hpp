// Properties of the readers of the examples: any file is read, or refused in one line that names
// it. Nothing else may come out, whatever the file says about itself.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <moeroute/json/config_json.hpp>
#include <moeroute/json/gguf.hpp>

#include "properties/bytes.hpp"
#include "support/config.hpp"
#include "support/npy.hpp"
#include "support/route_file_app.hpp"
#include "support/safetensors.hpp"

namespace test {

namespace detail {

// The bytes as a file; one per process.
inline std::filesystem::path as_file(bytes in, const char* name) {
  static const std::filesystem::path folder = [] {
    auto made = std::filesystem::temp_directory_path() /
                ("moeroute_properties_" + std::to_string(::getpid()));
    std::filesystem::create_directories(made);
    return made;
  }();
  const std::filesystem::path path = folder / name;
  const std::span<const std::uint8_t> all = in.rest();
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(reinterpret_cast<const char*>(all.data()), static_cast<std::streamsize>(all.size()));
  return path;
}

// The complaint about a complaint that does not name the file, or is not one line.
inline std::string nameless(const std::string& sentence, const std::filesystem::path& path) {
  if (sentence.find('\n') != std::string::npos) return "refused in more than a line: " + sentence;
  if (sentence.find(path.filename().string()) == std::string::npos)
    return "refused without the file's name: " + sentence;
  return "";
}

// What comes of reading: empty where the file was read, or refused as it should be.
template <class F>
std::string reading_break(const std::filesystem::path& path, F&& read) {
  try {
    read(path);
  } catch (const std::runtime_error& refused) {
    return detail::nameless(refused.what(), path);
  } catch (const moeroute::error& refused) {
    return detail::nameless(refused.what(), path);
  }
  return "";
}

}  // namespace detail

inline std::string npy_property(bytes in) {
  return detail::reading_break(detail::as_file(in, "logits.npy"), [](const auto& path) {
    const example::npy_array array = example::read_npy(path);
    std::uint64_t n = 1;
    for (const std::uint64_t size : array.shape) n *= size;
    if (n != array.values.size()) throw std::logic_error("shape and values do not fit");
  });
}

inline std::string safetensors_property(bytes in) {
  return detail::reading_break(detail::as_file(in, "model.safetensors"), [](const auto& path) {
    const example::safetensors_file file(path);
    std::vector<float> values(8);
    for (const std::string& name : file.tensors()) {
      file.require(name, {2, 4});
      file.read(name, 0, values);
    }
  });
}

inline std::string config_property(bytes in) {
  return detail::reading_break(detail::as_file(in, "config.json"), [](const auto& path) {
    const auto document = example::read_json(path);
    const auto model = moeroute::routers_from_config(document, path.string());
    check(model.spec);
    for (const auto& layer : model.layers)
      if (layer) check(*layer);
    (void)example::read_config(path);
  });
}

inline std::string gguf_property(bytes in) {
  return detail::reading_break(detail::as_file(in, "model.gguf"), [&](const auto& path) {
    const auto keys = moeroute::parse_gguf_metadata(in.rest(), path.string());
    const auto model = moeroute::routers_from_gguf(keys, path.string());
    check(model.spec);
  });
}

inline std::string route_file_property(bytes in) {
  const std::filesystem::path path = detail::as_file(in, "logits.json");
  const std::string name = path.string();
  const char* words[] = {"route_file", name.c_str()};
  std::ostringstream out, err;
  const int code = example::run_route_file(2, words, out, err);
  const std::string said = err.str();
  if (code == 0) return said.empty() ? "" : "a warning: " + said;
  if (code != 2 || said.empty() || said.find('\n') != said.size() - 1) return "said: " + said;
  return out.str().empty() ? "" : "output before a refusal";
}

}  // namespace test
