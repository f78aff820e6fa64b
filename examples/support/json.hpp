// JSON from files that may be wrong: every access says which file and field.
#pragma once

#include "error.hpp"
#include "file.hpp"

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

namespace example {

using json = nlohmann::json;

/// JSON whose fractional numbers are floats, parsed with strtof: by way of double some would be
/// rounded twice.
using float_json = nlohmann::basic_json<std::map, std::vector, std::string, bool, std::int64_t,
                                        std::uint64_t, float>;

inline constexpr std::uint64_t json_size_limit = 100'000'000;

template <class Json = json>
[[nodiscard]] Json parse_json(std::string_view text, const std::string& file) {
  try {
    return Json::parse(text);
  } catch (const nlohmann::json::out_of_range&) {
    refuse(file, ": expected numbers that fit their type, found a larger one");
  } catch (const nlohmann::json::exception&) {
    // The parser's own message quotes the input, which may be binary.
    refuse(file, ": expected JSON text, found something else");
  }
}

template <class Json = json>
[[nodiscard]] Json read_json(const std::filesystem::path& path) {
  const input_file file(path);
  return parse_json<Json>(file.text(json_size_limit), file.name());
}

/// The fields of one JSON object in a named file. A field that is null counts
/// as absent, as it does where such files are written.
template <class Json>
class basic_json_fields {
 public:
  basic_json_fields(const Json& object, std::string where)
      : object_(&object), where_(std::move(where)) {
    if (!object.is_object()) {
      refuse(where_, ": expected a JSON object, found ", object.type_name());
    }
  }

  [[nodiscard]] const std::string& where() const { return where_; }

  [[nodiscard]] bool has(const std::string& name) const {
    const auto found = object_->find(name);
    return found != object_->end() && !found->is_null();
  }

  [[nodiscard]] const Json& at(const std::string& name) const {
    if (!has(name)) {
      refuse(where_, ": field '", name, "' is missing");
    }
    return *object_->find(name);
  }

  [[nodiscard]] std::int64_t integer(const std::string& name, std::int64_t low,
                                     std::int64_t high) const {
    const Json& value = at(name);
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() &&
                        value.template get<std::uint64_t>() > static_cast<std::uint64_t>(high));
    if (!fits || value.template get<std::int64_t>() < low ||
        value.template get<std::int64_t>() > high) {
      wrong(name, join("an integer from ", low, " to ", high));
    }
    return value.template get<std::int64_t>();
  }

  [[nodiscard]] double positive(const std::string& name) const {
    const Json& value = at(name);
    if (!value.is_number() || !(value.template get<double>() > 0) ||
        !std::isfinite(value.template get<double>())) {
      wrong(name, "a positive number");
    }
    return value.template get<double>();
  }

  [[nodiscard]] bool flag(const std::string& name, bool absent) const {
    if (!has(name)) {
      return absent;
    }
    if (!at(name).is_boolean()) {
      wrong(name, "true or false");
    }
    return at(name).template get<bool>();
  }

  [[nodiscard]] std::string text(const std::string& name) const {
    if (!at(name).is_string()) {
      wrong(name, "a string");
    }
    return at(name).template get<std::string>();
  }

  [[nodiscard]] const Json& array(const std::string& name) const {
    if (!at(name).is_array()) {
      wrong(name, "an array");
    }
    return at(name);
  }

  [[noreturn]] void wrong(const std::string& name, const std::string& expected) const {
    refuse(where_, ": field '", name, "': expected ", expected, ", found ", show(at(name)));
  }

 private:
  static std::string show(const Json& value) {
    if (value.is_number() || value.is_boolean()) {
      return value.dump();
    }
    if (value.is_string() && value.template get_ref<const std::string&>().size() <= 40) {
      return "'" + value.template get_ref<const std::string&>() + "'";
    }
    return std::string("a value of type ") + value.type_name();
  }

  const Json* object_;
  std::string where_;
};

using json_fields = basic_json_fields<json>;

}  // namespace example
