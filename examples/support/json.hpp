// JSON files of the examples: the library's door to nlohmann-json, on files of a bounded size.
#pragma once

#include "error.hpp"
#include "file.hpp"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <moeroute/json/json.hpp>

namespace example {

using json = nlohmann::json;

/// JSON whose fractional numbers are floats, parsed with strtof: by way of double some would be
/// rounded twice.
using float_json = nlohmann::basic_json<std::map, std::vector, std::string, bool, std::int64_t,
                                        std::uint64_t, float>;

using moeroute::basic_json_fields;
using moeroute::json_fields;
using moeroute::parse_json;

inline constexpr std::uint64_t json_size_limit = 100'000'000;

template <class Json = json>
[[nodiscard]] Json read_json(const std::filesystem::path& path) {
  const input_file file(path);
  return parse_json<Json>(file.text(json_size_limit), file.name());
}

}  // namespace example
