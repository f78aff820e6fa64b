// Properties of the readers of the examples: any file is read, or refused in one line that names
// it. Nothing else may come out, whatever the file says about itself.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "properties/bytes.hpp"
#include "support/config.hpp"
#include "support/hf_router_config.hpp"
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

// What comes of reading: empty where the file was read, or refused as it should be.
template <class F>
std::string reading_break(const std::filesystem::path& path, F&& read) {
  try {
    read(path);
  } catch (const example::input_error& refused) {
    const std::string sentence = refused.what();
    if (sentence.find(path.filename().string()) == std::string::npos)
      return "refused without the file's name: " + sentence;
  } catch (const moeroute::error&) {
    // What the library says about values that are well formed; the programs add the name.
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
    try {
      (void)example::read_config(path);
    } catch (const example::input_error&) {
      (void)example::spec_from_config(document, path.string());
    }
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
