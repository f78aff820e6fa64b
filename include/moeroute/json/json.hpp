// The door to nlohmann-json: opt-in, include it and link moeroute::json. The library reads and
// writes JSON; the door adds a place to every complaint, Python's numbers, and keys that stand
// once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <moeroute/base/error.hpp>
#include <moeroute/json/routing_words.hpp>

namespace moeroute {

namespace detail {

// Python writes bare NaN, Infinity and -Infinity, which JSON has no numbers for: they become
// strings of the same letters. `added` says after which bytes of the copy quotes were put.
inline std::string quoted_numbers(std::string_view text, std::vector<std::size_t>& added) {
  std::string copy;
  copy.reserve(text.size());
  const auto letter = [&](std::size_t at) {
    return at < text.size() && ((text[at] | 0x20) >= 'a' && (text[at] | 0x20) <= 'z');
  };
  bool inside = false;
  for (std::size_t i = 0; i < text.size();) {
    if (inside && text[i] == '\\' && i + 1 < text.size()) {
      copy.append(text.substr(i, 2));
      i += 2;
      continue;
    }
    if (text[i] == '"') inside = !inside;
    std::size_t length = 0;
    if (!inside && (i == 0 || !letter(i - 1)))
      for (const std::string_view word : {"NaN", "Infinity", "-Infinity"})
        if (text.substr(i, word.size()) == word && !letter(i + word.size())) length = word.size();
    // A word in a key's place stays one, and is refused.
    const std::size_t next = text.find_first_not_of(" \t\r\n", i + length);
    if (length == 0 || (next != text.npos && text[next] == ':')) {
      copy += text[i++];
      continue;
    }
    copy += '"';
    added.push_back(copy.size());
    copy.append(text.substr(i, length)) += '"';
    added.push_back(copy.size());
    i += length;
  }
  return copy;
}

// Makes a document of the parser's events; refuses a key that an object has twice.
template <class Json>
class document_builder {
 public:
  using number_integer_t = typename Json::number_integer_t;
  using number_unsigned_t = typename Json::number_unsigned_t;
  using number_float_t = typename Json::number_float_t;
  using string_t = typename Json::string_t;
  using binary_t = typename Json::binary_t;

  Json document;
  std::string repeated;      // a key that stood twice
  std::size_t position = 0;  // of what is no JSON, from 1 on
  bool too_large = false;    // a number that does not fit

  bool null() { return add(Json(nullptr)); }
  bool boolean(bool value) { return add(Json(value)); }
  bool number_integer(number_integer_t value) { return add(Json(value)); }
  bool number_unsigned(number_unsigned_t value) { return add(Json(value)); }
  bool number_float(number_float_t value, const string_t&) { return add(Json(value)); }
  bool string(string_t& value) { return add(Json(std::move(value))); }
  bool binary(binary_t&) { return false; }
  bool start_object(std::size_t) { return open(Json::object()); }
  bool start_array(std::size_t) { return open(Json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(string_t& name) {
    if (open_.back()->contains(name)) {
      repeated = name;
      return false;
    }
    key_ = std::move(name);
    return true;
  }
  bool parse_error(std::size_t at, const std::string&, const typename Json::exception& what) {
    position = at;
    too_large = what.id == 406;
    return false;
  }

 private:
  Json* put(Json&& value) {
    if (open_.empty()) return &(document = std::move(value));
    Json& in = *open_.back();
    if (in.is_object()) return &(in[key_] = std::move(value));
    in.push_back(std::move(value));
    return &in.back();
  }
  bool add(Json&& value) { return put(std::move(value)) != nullptr; }
  bool open(Json&& value) {
    open_.push_back(put(std::move(value)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  std::vector<Json*> open_;
  string_t key_;
};

}  // namespace detail

/// The JSON document that `text` is; `file` names it in messages.
///
/// Python's bare NaN, Infinity and -Infinity are read, as strings of these letters: JSON has no
/// such numbers. Throws: error that says where the text is no JSON (line and column, from 1 on), or
/// which key an object has twice.
template <class Json = nlohmann::json>
[[nodiscard]] Json parse_json(std::string_view text, const std::string& file) {
  std::vector<std::size_t> added;
  const std::string copy = detail::quoted_numbers(text, added);
  detail::document_builder<Json> builder;
  if (Json::sax_parse(copy, &builder)) return std::move(builder.document);
  if (!builder.repeated.empty() || builder.position == 0)
    fail("json", file + ": key '" + detail::printable(builder.repeated) + "' stands there twice");
  const auto quotes = std::upper_bound(added.begin(), added.end(), builder.position);
  const std::size_t at =
      std::min(builder.position - static_cast<std::size_t>(quotes - added.begin()), text.size());
  const std::string_view before = text.substr(0, at == 0 ? 0 : at - 1);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const std::size_t column = before.size() - (before.rfind('\n') + 1) + 1;
  fail("json", file + ": line " + std::to_string(line) + ", column " + std::to_string(column) +
                   (builder.too_large ? ": expected numbers that fit their type, found a larger one"
                                      : ": expected JSON text, found something else"));
}

/// The fields of one JSON object in a named file: every complaint says which file and field.
template <class Json>
class basic_json_fields {
 public:
  /// Throws: error where it is no object.
  basic_json_fields(const Json& object, std::string where)
      : object_(&object), where_(std::move(where)) {
    if (!object.is_object())
      fail("json", where_ + ": expected a JSON object, found " + object.type_name());
  }

  [[nodiscard]] const std::string& where() const { return where_; }
  [[nodiscard]] const Json& object() const { return *object_; }

  /// The field is there, with whatever value.
  [[nodiscard]] bool said(const std::string& name) const {
    asked_.push_back(name);
    return object_->find(name) != object_->end();
  }

  /// The field is there with a value that is not null.
  [[nodiscard]] bool has(const std::string& name) const {
    return said(name) && !object_->find(name)->is_null();
  }

  /// A field of that name was looked at.
  [[nodiscard]] bool asked(const std::string& name) const {
    return std::find(asked_.begin(), asked_.end(), name) != asked_.end();
  }

  [[nodiscard]] const Json& at(const std::string& name) const {
    if (!said(name)) fail("json", where_ + ": field '" + detail::printable(name) + "' is missing");
    return *object_->find(name);
  }

  [[nodiscard]] std::int64_t integer(const std::string& name, std::int64_t low,
                                     std::int64_t high) const {
    const Json& value = at(name);
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() &&
                        value.template get<std::uint64_t>() > static_cast<std::uint64_t>(high));
    if (!fits || value.template get<std::int64_t>() < low ||
        value.template get<std::int64_t>() > high)
      wrong(name, "an integer from " + std::to_string(low) + " to " + std::to_string(high));
    return value.template get<std::int64_t>();
  }

  [[nodiscard]] double positive(const std::string& name) const {
    const Json& value = at(name);
    if (!value.is_number() || !(value.template get<double>() > 0) ||
        !std::isfinite(value.template get<double>()))
      wrong(name, "a positive number");
    return value.template get<double>();
  }

  [[nodiscard]] bool flag(const std::string& name, bool absent) const {
    if (!has(name)) return absent;
    if (!at(name).is_boolean()) wrong(name, "true or false");
    return at(name).template get<bool>();
  }

  [[nodiscard]] std::string text(const std::string& name) const {
    if (!at(name).is_string()) wrong(name, "a string");
    return at(name).template get<std::string>();
  }

  [[nodiscard]] const Json& array(const std::string& name) const {
    if (!at(name).is_array()) wrong(name, "an array");
    return at(name);
  }

  [[noreturn]] void wrong(const std::string& name, const std::string& expected) const {
    fail("json", where_ + ": field '" + detail::printable(name) + "': expected " + expected +
                     ", found " + show(at(name)));
  }

  /// A value as a message shows it.
  [[nodiscard]] static std::string show(const Json& value) {
    if (value.is_number() || value.is_boolean() || value.is_null()) return value.dump();
    if (value.is_string() && value.template get_ref<const std::string&>().size() <= 40)
      return "'" + detail::printable(value.template get<std::string>()) + "'";
    return std::string("a value of type ") + value.type_name();
  }

 private:
  const Json* object_;
  std::string where_;
  mutable std::vector<std::string> asked_;
};

using json_fields = basic_json_fields<nlohmann::json>;

}  // namespace moeroute
