// The conformance kit's files as they are read, an engine's answers beside them, and what a pattern
// of differences looks like.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <istream>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace conformance {

/// Floats are parsed as floats: by way of double some would be rounded twice.
using json = nlohmann::basic_json<nlohmann::ordered_map, std::vector, std::string, bool,
                                  std::int64_t, std::uint64_t, float>;

/// What an engine decided for one token.
struct answer {
  std::vector<std::int64_t> ids;  ///< [k], -1: no expert
  std::vector<float> weights;     ///< [k]
};

/// Tokens that exist for one reason.
struct kit_case {
  std::string name, reason;
  std::vector<std::vector<float>> logits;  ///< [T][columns]
  std::vector<std::int64_t> mask;          ///< [T], 0: takes no part; or empty
  std::vector<std::int64_t> token_ids;     ///< [T] for tables; or empty
  std::vector<answer> answers;             ///< [T]
  /// By name of a mistake: what it makes of the tokens that it changes.
  std::map<std::string, std::map<std::size_t, answer>> mistaken;

  std::size_t tokens() const { return logits.size(); }
};

/// A file of the kit: one router and its cases.
struct kit_file {
  std::string model, rule;
  std::int64_t experts = 0, columns = 0, k = 0;
  std::vector<float> bias, per_expert_scale;                  ///< [E], or empty
  std::vector<std::vector<std::int64_t>> table;               ///< [vocabulary][k], or empty
  double relative = 0, absolute = 0;                          ///< tolerance of a weight
  std::vector<std::pair<std::string, std::string>> mistakes;  ///< name and sentence
  std::vector<kit_case> cases;

  std::size_t tokens() const {
    std::size_t n = 0;
    for (const kit_case& c : cases) n += c.tokens();
    return n;
  }
};

/// What is wrong with a file: `FILE:LINE: field: sentence`.
struct malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

// One line of a file of lines of JSON, whose fields are read by name.
class line_reader {
 public:
  line_reader(const std::string& file, int line, const std::string& text)
      : file_(file), line_(line) {
    try {
      value_ = json::parse(text);
    } catch (const json::parse_error& e) {
      refuse("column " + std::to_string(e.byte), "this is no JSON");
    }
    if (!value_.is_object()) refuse("the line", "is no JSON object");
  }

  [[noreturn]] void refuse(const std::string& field, const std::string& what) const {
    throw malformed(file_ + ":" + std::to_string(line_) + ": " + field + ": " + what);
  }
  bool has(const char* field) const { return value_.contains(field); }
  const json& at(const std::string& field) const {
    if (!value_.contains(field)) refuse(field, "is missing");
    return value_.at(field);
  }
  std::string text(const std::string& field) const {
    const json& v = at(field);
    if (!v.is_string()) refuse(field, "is no text");
    return v.get<std::string>();
  }
  std::int64_t whole(const std::string& field, const json& v) const {
    if (!v.is_number_integer()) refuse(field, "is " + shown(v) + ", expected a whole number");
    if (v.is_number_unsigned() &&
        v.get<std::uint64_t>() > std::uint64_t{std::numeric_limits<std::int64_t>::max()})
      refuse(field, "is " + shown(v) + ", expected a smaller number");
    return v.get<std::int64_t>();
  }
  std::int64_t whole(const std::string& field, std::int64_t least, std::int64_t most) const {
    const std::int64_t n = whole(field, at(field));
    if (n < least || n > most)
      refuse(field, "is " + std::to_string(n) + ", expected " + std::to_string(least) + " to " +
                        std::to_string(most));
    return n;
  }
  float number(const std::string& field, const json& v) const {
    if (v.is_number()) return v.get<float>();
    const std::string word = v.is_string() ? v.get<std::string>() : "";
    if (word == "nan") return std::numeric_limits<float>::quiet_NaN();
    if (word == "inf") return std::numeric_limits<float>::infinity();
    if (word == "-inf") return -std::numeric_limits<float>::infinity();
    refuse(field, "is " + shown(v) + R"(, expected a number, "nan", "inf" or "-inf")");
  }
  // A list of `size` values, each read by `read`.
  template <class Read>
  auto list(const std::string& field, const json& v, std::size_t size, const Read& read) const {
    if (!v.is_array()) refuse(field, "is no list");
    if (v.size() != size)
      refuse(field,
             "has " + std::to_string(v.size()) + " values, expected " + std::to_string(size));
    std::vector<decltype(read(field, v))> out;
    for (const json& x : v) out.push_back(read(field + "[" + std::to_string(out.size()) + "]", x));
    return out;
  }
  std::vector<float> floats(const std::string& field, const json& v, std::size_t size) const {
    return list(field, v, size, [&](const std::string& f, const json& x) { return number(f, x); });
  }
  std::vector<std::int64_t> wholes(const std::string& field, const json& v,
                                   std::size_t size) const {
    return list(field, v, size, [&](const std::string& f, const json& x) { return whole(f, x); });
  }
  // `tokens` answers of the fields ids and weights of `of`, whose name is in front.
  std::vector<answer> answers(const std::string& front, const json& of, std::size_t tokens,
                              std::size_t k) const {
    std::vector<answer> out(tokens);
    for (const char* field : {"ids", "weights"})
      if (!of.is_object() || !of.contains(field)) refuse(front + field, "is missing");
    const auto ids = list(front + "ids", of.at("ids"), tokens,
                          [&](const std::string& f, const json& x) { return wholes(f, x, k); });
    const auto weights = list(front + "weights", of.at("weights"), tokens,
                              [&](const std::string& f, const json& x) { return floats(f, x, k); });
    for (std::size_t t = 0; t < tokens; ++t) out[t] = {ids[t], weights[t]};
    return out;
  }
  answer one_answer(std::size_t k) const {
    return {wholes("ids", at("ids"), k), floats("weights", at("weights"), k)};
  }

 private:
  static std::string shown(const json& v) {
    std::string text = v.dump();
    if (text.size() > 40) text = text.substr(0, 37) + "...";
    return text;
  }

  std::string file_;
  int line_;
  json value_;
};

}  // namespace detail

/// Reads a file of the kit. Throws: malformed.
inline kit_file read_kit(std::istream& in, const std::string& name) {
  kit_file kit;
  std::string text;
  int line = 0;
  while (std::getline(in, text)) {
    const detail::line_reader r(name, ++line, text);
    if (line == 1) {
      if (r.text("format") != "moeroute-conformance")
        r.refuse("format", "is '" + r.text("format") + "', expected 'moeroute-conformance'");
      r.whole("version", 1, 1);
      kit.model = r.text("model");
      kit.rule = r.text("rule");
      kit.experts = r.whole("experts", 1, 1 << 20);
      kit.columns = r.whole("columns", 1, 1 << 21);
      kit.k = r.whole("k", 1, kit.experts);
      kit.relative = static_cast<double>(r.number("relative", r.at("relative")));
      kit.absolute = static_cast<double>(r.number("absolute", r.at("absolute")));
      const auto experts = static_cast<std::size_t>(kit.experts);
      if (r.has("bias")) kit.bias = r.floats("bias", r.at("bias"), experts);
      if (r.has("per_expert_scale"))
        kit.per_expert_scale = r.floats("per_expert_scale", r.at("per_expert_scale"), experts);
      if (r.has("table"))
        kit.table = r.list("table", r.at("table"), r.at("table").size(),
                           [&](const std::string& f, const json& x) {
                             return r.wholes(f, x, static_cast<std::size_t>(kit.k));
                           });
      if (!r.at("mistakes").is_object()) r.refuse("mistakes", "is no JSON object");
      for (const auto& [mistake, sentence] : r.at("mistakes").items()) {
        if (!sentence.is_string()) r.refuse("mistakes." + mistake, "is no text");
        kit.mistakes.emplace_back(mistake, sentence.get<std::string>());
      }
      continue;
    }
    kit_case c;
    c.name = r.text("case");
    c.reason = r.text("reason");
    const auto k = static_cast<std::size_t>(kit.k);
    const json& logits = r.at("logits");
    const std::size_t tokens = logits.size();
    c.logits = r.list("logits", logits, tokens, [&](const std::string& f, const json& x) {
      return r.floats(f, x, static_cast<std::size_t>(kit.columns));
    });
    if (r.has("mask")) c.mask = r.wholes("mask", r.at("mask"), tokens);
    if (r.has("token_ids")) c.token_ids = r.wholes("token_ids", r.at("token_ids"), tokens);
    for (const std::int64_t id : c.token_ids)
      if (id < 0 || id >= std::ssize(kit.table))
        r.refuse("token_ids", std::to_string(id) + " is no row of the table");
    const json both = {{"ids", r.at("ids")}, {"weights", r.at("weights")}};
    c.answers = r.answers("", both, tokens, k);
    for (const answer& a : c.answers)
      for (const std::int64_t id : a.ids)
        if (id < -1 || id >= kit.experts)
          r.refuse("ids", std::to_string(id) + " is no expert of " + std::to_string(kit.experts));
    if (!r.at("mistakes").is_object()) r.refuse("mistakes", "is no JSON object");
    for (const auto& [mistake, of] : r.at("mistakes").items()) {
      const std::string front = "mistakes." + mistake + ".";
      if (std::none_of(kit.mistakes.begin(), kit.mistakes.end(),
                       [&](const auto& m) { return m.first == mistake; }))
        r.refuse("mistakes", "'" + mistake + "' is not in the first line");
      if (!of.is_object() || !of.contains("tokens")) r.refuse(front + "tokens", "is missing");
      const auto at = r.wholes(front + "tokens", of.at("tokens"), of.at("tokens").size());
      const auto answers = r.answers(front, of, at.size(), k);
      for (std::size_t i = 0; i < at.size(); ++i) {
        if (at[i] < 0 || at[i] >= static_cast<std::int64_t>(tokens))
          r.refuse(front + "tokens", std::to_string(at[i]) + " is no token of the case");
        c.mistaken[mistake][static_cast<std::size_t>(at[i])] = answers[i];
      }
    }
    kit.cases.push_back(std::move(c));
  }
  if (line == 0) throw malformed(name + ":1: format: is missing");
  return kit;
}

inline kit_file read_kit(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw malformed(path + ": cannot be opened");
  return read_kit(in, path);
}

/// An engine's answers, a line `{"ids": [...], "weights": [...]}` for each token of the file in its
/// order. Throws: malformed.
inline std::vector<answer> read_answers(std::istream& in, const std::string& name,
                                        const kit_file& kit) {
  std::vector<answer> out;
  std::string text;
  while (std::getline(in, text)) {
    const detail::line_reader r(name, static_cast<int>(out.size()) + 1, text);
    if (out.size() == kit.tokens())
      r.refuse("the line", "is one too many, " + kit.model + " has " +
                               std::to_string(kit.tokens()) + " tokens");
    out.push_back(r.one_answer(static_cast<std::size_t>(kit.k)));
  }
  if (out.size() < kit.tokens())
    throw malformed(name + ":" + std::to_string(out.size() + 1) + ": ids: is missing, " +
                    kit.model + " has " + std::to_string(kit.tokens()) + " tokens");
  return out;
}

// ---- arrays of NumPy ----------------------------------------------------------------------------

/// A matrix of a .npy file as doubles: row-major little-endian integers or floats.
struct npy_matrix {
  std::vector<std::size_t> shape;
  std::vector<double> values;
};

/// Throws: malformed.
inline npy_matrix read_npy(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw malformed(path + ": cannot be opened");
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  const auto refuse = [&](const std::string& field, const std::string& what) {
    throw malformed(path + ":1: " + field + ": " + what);
  };
  if (bytes.size() < 10 || bytes.compare(0, 6, "\x93NUMPY") != 0)
    refuse("magic", "this is no .npy file");
  const bool large = bytes[6] >= 2;
  const std::size_t front = large ? 12 : 10;
  std::size_t size = 0;
  for (std::size_t i = front; i-- > 8;)
    size = size << 8 | static_cast<unsigned char>(i < bytes.size() ? bytes[i] : 0);
  if (bytes.size() < front + size) refuse("header", "is cut off");
  const std::string header = bytes.substr(front, size);
  const auto value_of = [&](const std::string& key) {
    const auto at = header.find("'" + key + "':");
    if (at == header.npos) refuse(key, "is missing");
    return header.substr(header.find_first_not_of(' ', at + key.size() + 3));
  };
  if (!value_of("fortran_order").starts_with("False")) refuse("fortran_order", "expected False");
  npy_matrix out;
  const std::string shape = value_of("shape");
  std::size_t total = 1;
  for (std::size_t i = 1; i < shape.size() && shape[i] != ')';) {
    if (shape[i] < '0' || shape[i] > '9') {
      ++i;
      continue;
    }
    std::size_t n = 0;
    for (; i < shape.size() && shape[i] >= '0' && shape[i] <= '9'; ++i) {
      n = 10 * n + static_cast<std::size_t>(shape[i] - '0');
      if (n > bytes.size()) refuse("shape", "is larger than the file");
    }
    out.shape.push_back(n);
    total *= std::max<std::size_t>(n, 1);
    if (total > bytes.size()) refuse("shape", "is larger than the file");
  }
  std::size_t count = 1;
  for (const std::size_t n : out.shape) count *= n;
  const std::string type = value_of("descr").substr(1, 3);
  const std::size_t width = type.size() == 3 ? static_cast<std::size_t>(type[2] - '0') : 0;
  const char* const data = bytes.data() + front + size;
  if (bytes.size() - front - size != count * width) refuse("shape", "does not fit the file's size");
  const auto each = [&](auto zero) {
    for (std::size_t i = 0; i < count; ++i) {
      auto x = zero;
      std::memcpy(&x, data + i * sizeof x, sizeof x);
      out.values.push_back(static_cast<double>(x));
    }
  };
  const std::string kind = type.substr(1);
  if (type[0] != '<' && type[0] != '|')
    refuse("descr", "is '" + type + "', expected little-endian");
  if (kind == "f4")
    each(float{});
  else if (kind == "f8")
    each(double{});
  else if (kind == "i1")
    each(std::int8_t{});
  else if (kind == "u1")
    each(std::uint8_t{});
  else if (kind == "i2")
    each(std::int16_t{});
  else if (kind == "u2")
    each(std::uint16_t{});
  else if (kind == "i4")
    each(std::int32_t{});
  else if (kind == "u4")
    each(std::uint32_t{});
  else if (kind == "i8")
    each(std::int64_t{});
  else
    refuse("descr", "is '" + type + "', expected integers or floats");
  return out;
}

/// The answers of two arrays [T, k]. Throws: malformed.
inline std::vector<answer> read_answers(const std::string& ids_path,
                                        const std::string& weights_path, const kit_file& kit) {
  const npy_matrix ids = read_npy(ids_path), weights = read_npy(weights_path);
  const std::vector<std::size_t> shape{kit.tokens(), static_cast<std::size_t>(kit.k)};
  for (const auto& [path, m] : {std::pair{&ids_path, &ids}, std::pair{&weights_path, &weights}})
    if (m->shape != shape) {
      std::string got;
      for (const std::size_t n : m->shape) got += (got.empty() ? "" : ", ") + std::to_string(n);
      throw malformed(*path + ":1: shape: is (" + got + "), expected (" + std::to_string(shape[0]) +
                      ", " + std::to_string(shape[1]) + ")");
    }
  std::vector<answer> out(kit.tokens());
  for (std::size_t t = 0; t < out.size(); ++t)
    for (std::size_t i = t * shape[1]; i < (t + 1) * shape[1]; ++i) {
      out[t].ids.push_back(static_cast<std::int64_t>(ids.values[i]));
      out[t].weights.push_back(static_cast<float>(weights.values[i]));
    }
  return out;
}

// ---- the judgement ------------------------------------------------------------------------------

/// How answers are compared.
struct comparison {
  bool unordered = false;  ///< ranks may stand in any order
  bool ids_only = false;   ///< weights are not looked at
};

/// Where an answer differs; empty where it does not. NaN equals NaN alone.
inline std::string difference(const kit_file& kit, answer got, answer expected, comparison how) {
  if (how.unordered)
    for (answer* a : {&got, &expected}) {
      std::vector<std::size_t> order(a->ids.size());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::stable_sort(order.begin(), order.end(),
                       [&](std::size_t i, std::size_t j) { return a->ids[i] < a->ids[j]; });
      answer sorted;
      for (const std::size_t i : order) {
        sorted.ids.push_back(a->ids[i]);
        sorted.weights.push_back(a->weights[i]);
      }
      *a = sorted;
    }
  for (std::size_t r = 0; r < got.ids.size(); ++r)
    if (got.ids[r] != expected.ids[r])
      return "rank " + std::to_string(r) + ": expert " + std::to_string(got.ids[r]) +
             ", expected " + std::to_string(expected.ids[r]);
  for (std::size_t r = 0; r < got.ids.size() && !how.ids_only; ++r) {
    const auto g = static_cast<double>(got.weights[r]),
               e = static_cast<double>(expected.weights[r]);
    const bool same = e != e ? g != g
                      : std::isinf(e) || std::isinf(g)
                          ? g == e
                          : std::abs(g - e) <= kit.relative * std::abs(e) + kit.absolute;
    if (same) continue;
    char text[96];
    std::snprintf(text, sizeof text, "rank %zu: weight %.9g, expected %.9g", r, g, e);
    return text;
  }
  return "";
}

/// A mistake that an engine may have made.
struct suspect {
  std::string name, sentence;
  std::size_t explains = 0;  ///< differing tokens that are what it makes
  std::size_t contradicts =
      0;  ///< tokens that it would change and that were right, or otherwise wrong
};

/// What was found in an engine's answers.
struct judgement {
  struct wrong {
    std::size_t in_case, token;
    std::string what;
  };
  std::size_t tokens = 0;
  std::vector<wrong> wrongs;
  std::vector<suspect> suspects;  ///< the likeliest first

  /// The mistakes that make exactly these answers, or, where none does, nothing.
  std::vector<suspect> recognised() const {
    std::vector<suspect> out;
    for (const suspect& s : suspects)
      if (s.contradicts == 0 && s.explains == wrongs.size() && s.explains > 0) out.push_back(s);
    return out;
  }
};

/// Compares and recognises.
inline judgement judge(const kit_file& kit, const std::vector<answer>& answers,
                       comparison how = {}) {
  judgement out;
  std::map<std::string, suspect> all;
  for (const auto& [name, sentence] : kit.mistakes) all[name] = {name, sentence};
  for (std::size_t c = 0; c < kit.cases.size(); ++c)
    for (std::size_t t = 0; t < kit.cases[c].tokens(); ++t) {
      const kit_case& in = kit.cases[c];
      const answer& got = answers[out.tokens++];
      const std::string what = difference(kit, got, in.answers[t], how);
      if (!what.empty()) out.wrongs.push_back({c, t, what});
      for (const auto& [mistake, tokens] : in.mistaken) {
        const auto made = tokens.find(t);
        if (made == tokens.end()) continue;
        // In this comparison the mistake may not show.
        if (difference(kit, made->second, in.answers[t], how).empty()) continue;
        const bool is = difference(kit, got, made->second, how).empty();
        ++(is ? all[mistake].explains : all[mistake].contradicts);
      }
    }
  for (const auto& [name, s] : all)
    if (s.explains > 0) out.suspects.push_back(s);
  std::stable_sort(out.suspects.begin(), out.suspects.end(),
                   [](const suspect& a, const suspect& b) {
                     if (a.explains != b.explains) return a.explains > b.explains;
                     return a.contradicts < b.contradicts;
                   });
  return out;
}

}  // namespace conformance
