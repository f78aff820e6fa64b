// Traces of routing in files: which experts each token had in each layer, in the five forms in
// which they are kept.
//
//   csv      layer,expert: a row for each activation, tokens told apart by their layers' turns
//   route    "# route_trace v1", then
//   turn,phase,step,layer,slot,expert,weight,residency,expert_bytes npy      int16 or int32
//   [tokens, layers, k], as servers return it for replay; -1: nobody record   what routing_record
//   holds, layer by layer, behind one line of sizes jsonl    {"layer": 0, "token": 0, "ids": [..],
//   "weights": [..]} a line
#pragma once

#include "error.hpp"
#include "file.hpp"
#include "json.hpp"
#include "npy.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <moeroute/base/read_number.hpp>
#include <moeroute/data/assignment.hpp>
#include <moeroute/data/routing_record.hpp>

namespace example {

using moeroute::expert_id;
using moeroute::index_t;

enum class trace_format { csv, route, npy, record, jsonl };
inline constexpr std::array<std::pair<const char*, trace_format>, 5> trace_formats{
    {{"csv", trace_format::csv},
     {"route", trace_format::route},
     {"npy", trace_format::npy},
     {"record", trace_format::record},
     {"jsonl", trace_format::jsonl}}};

[[nodiscard]] inline trace_format parse_trace_format(std::string_view name) {
  for (const auto& [known, format] : trace_formats)
    if (name == known) return format;
  refuse("--to: expected csv, route, npy, record or jsonl, found '", name, "'");
}

/// One token in one layer. Weights are as many as ids, or none.
struct trace_step {
  index_t token = 0, layer = 0;
  std::vector<expert_id> ids{};
  std::vector<float> weights{};
};
using trace_sink = std::function<void(const trace_step&)>;

namespace detail {

/// Lines of a file, read a piece at a time.
class line_reader {
 public:
  explicit line_reader(const std::filesystem::path& path) : file_(path) {}

  [[nodiscard]] bool next(std::string_view& line) {
    while (true) {
      const std::size_t end = memory_.find('\n', at_);
      if (end != std::string::npos) {
        line = std::string_view(memory_).substr(at_, end - at_);
        at_ = end + 1;
        break;
      }
      if (read_ == file_.size()) {
        if (at_ == memory_.size()) return false;
        line = std::string_view(memory_).substr(at_);
        at_ = memory_.size();
        break;
      }
      memory_.erase(0, at_);
      at_ = 0;
      if (memory_.size() > (1U << 24)) refuse(file_.name(), ": line ", number_ + 1, " has no end");
      const std::size_t more =
          static_cast<std::size_t>(std::min<std::uint64_t>(1U << 16, file_.size() - read_));
      const std::size_t old = memory_.size();
      memory_.resize(old + more);
      file_.read(read_, memory_.data() + old, more);
      read_ += more;
    }
    ++number_;
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    return true;
  }
  [[nodiscard]] std::int64_t number() const { return number_; }
  template <class... Parts>
  [[noreturn]] void wrong(std::size_t column, const Parts&... parts) const {
    refuse(file_.name(), ":", number_, ":", column + 1, ": ", parts...);
  }

 private:
  input_file file_;
  std::string memory_;
  std::size_t at_ = 0;
  std::uint64_t read_ = 0;
  std::int64_t number_ = 0;
};

/// The fields of a line between commas, with where they begin.
inline void split(std::string_view line,
                  std::vector<std::pair<std::size_t, std::string_view>>& out) {
  out.clear();
  for (std::size_t at = 0;;) {
    const std::size_t comma = line.find(',', at);
    out.emplace_back(at, line.substr(at, comma == std::string_view::npos ? comma : comma - at));
    if (comma == std::string_view::npos) return;
    at = comma + 1;
  }
}

template <class T>
[[nodiscard]] T number_at(const line_reader& lines,
                          const std::pair<std::size_t, std::string_view>& field, const char* name,
                          T low, T high) {
  T value{};
  if (!moeroute::detail::read_number(field.second, value) || !(value >= low && value <= high))
    lines.wrong(field.first, "expected ", name, " from ", low, " to ", high, ", found '",
                field.second, "'");
  return value;
}

inline constexpr std::int64_t most_layers = 1 << 20, most_tokens = std::int64_t{1} << 40;

inline void read_csv(line_reader& lines, const trace_sink& sink) {
  std::vector<std::pair<std::size_t, std::string_view>> fields;
  std::string_view line;
  if (!lines.next(line) || line != "layer,expert")
    lines.wrong(0, "expected the columns layer,expert, found '", line, "'");
  // A layer that comes again after another one, or an expert after itself, is of the next token.
  trace_step step;
  std::vector<index_t> tokens;
  const auto close = [&] {
    if (step.ids.empty()) return;
    const auto at = static_cast<std::size_t>(step.layer);
    if (tokens.size() <= at) tokens.resize(at + 1);
    step.token = tokens[at]++;
    sink(step);
    step.ids.clear();
  };
  while (lines.next(line)) {
    if (line.empty()) continue;
    split(line, fields);
    if (fields.size() != 2) lines.wrong(0, "expected 2 fields, found ", fields.size());
    const auto layer = number_at<index_t>(lines, fields[0], "a layer", 0, most_layers - 1);
    const auto expert =
        number_at<expert_id>(lines, fields[1], "an expert", 0, moeroute::max_experts - 1);
    if (layer != step.layer ||
        std::find(step.ids.begin(), step.ids.end(), expert) != step.ids.end())
      close();
    step.layer = layer;
    step.ids.push_back(expert);
  }
  close();
}

inline void read_route(line_reader& lines, const trace_sink& sink) {
  constexpr std::array<const char*, 9> known{"turn",   "phase",  "step",      "layer",       "slot",
                                             "expert", "weight", "residency", "expert_bytes"};
  std::vector<std::pair<std::size_t, std::string_view>> fields;
  std::string_view line;
  if (!lines.next(line) || !line.starts_with("# route_trace v1"))
    lines.wrong(0, "expected '# route_trace v1', found '", line, "'");
  while (true) {
    if (!lines.next(line)) lines.wrong(0, "expected a line of columns, found the end");
    if (!line.starts_with('#')) break;
  }
  split(line, fields);
  std::array<std::size_t, 9> place;
  place.fill(std::string::npos);
  for (std::size_t i = 0; i < fields.size(); ++i) {
    const auto found = std::find(known.begin(), known.end(), fields[i].second);
    if (found == known.end())
      lines.wrong(fields[i].first, "unknown column '", fields[i].second, "'");
    const auto at = static_cast<std::size_t>(found - known.begin());
    if (place[at] != std::string::npos)
      lines.wrong(fields[i].first, "column '", fields[i].second, "' is there twice");
    place[at] = i;
  }
  for (const std::size_t needed : {2, 3, 5})
    if (place[needed] == std::string::npos)
      lines.wrong(0, "expected a column '", known[needed], "'");
  const std::size_t columns = fields.size();
  // A token is a turn's step in its phase; the rows of one of its layers stand together.
  std::string token_name, now_name;
  std::vector<index_t> seen;  // the layers of the token so far
  trace_step step;
  index_t token = -1;
  bool weights = place[6] != std::string::npos;
  const auto close = [&] {
    if (step.ids.empty()) return;
    sink(step);
    step.ids.clear();
    step.weights.clear();
  };
  while (lines.next(line)) {
    if (line.empty() || line.starts_with('#')) continue;
    split(line, fields);
    if (fields.size() != columns)
      lines.wrong(0, "expected ", columns, " fields, found ", fields.size());
    now_name.clear();
    for (const std::size_t part : {0, 1, 2})
      if (place[part] != std::string::npos) now_name.append(fields[place[part]].second).append(",");
    const auto layer = number_at<index_t>(lines, fields[place[3]], "a layer", 0, most_layers - 1);
    if (now_name != token_name || token < 0) {
      close();
      ++token;
      token_name = now_name;
      seen.clear();
    }
    if (step.ids.empty() || layer != step.layer) {
      close();
      if (std::find(seen.begin(), seen.end(), layer) != seen.end())
        lines.wrong(fields[place[3]].first, "layer ", layer,
                    " of this step again, expected its rows together");
      seen.push_back(layer);
      step.token = token;
      step.layer = layer;
    }
    step.ids.push_back(
        number_at<expert_id>(lines, fields[place[5]], "an expert", -1, moeroute::max_experts - 1));
    if (place[4] != std::string::npos) {
      const auto slot =
          number_at<index_t>(lines, fields[place[4]], "a slot", 0, moeroute::max_experts);
      if (slot != static_cast<index_t>(step.ids.size()) - 1)
        lines.wrong(fields[place[4]].first, "expected slot ", step.ids.size() - 1, ", found ",
                    slot);
    }
    if (weights)
      step.weights.push_back(number_at<float>(lines, fields[place[6]], "a weight", -1e30F, 1e30F));
  }
  close();
}

inline void read_jsonl(line_reader& lines, const std::string& name, const trace_sink& sink) {
  std::string_view line;
  while (lines.next(line)) {
    if (line.empty()) continue;
    json row = json::parse(line, nullptr, false);
    if (row.is_discarded() || !row.is_object()) lines.wrong(0, "expected a JSON object");
    for (const auto& [key, value] : row.items())
      if (key != "layer" && key != "token" && key != "ids" && key != "weights")
        lines.wrong(0, "unknown field '", key, "'");
    const auto whole = [&](const json& value, const char* what, std::int64_t low,
                           std::int64_t high) {
      const bool beyond = value.is_number_unsigned() &&
                          value.get<std::uint64_t>() > static_cast<std::uint64_t>(high);
      if (!value.is_number_integer() || beyond || value.get<std::int64_t>() < low ||
          value.get<std::int64_t>() > high)
        lines.wrong(0, "field '", what, "': expected integers from ", low, " to ", high);
      return value.get<std::int64_t>();
    };
    for (const char* needed : {"layer", "token", "ids"})
      if (!row.contains(needed)) lines.wrong(0, "expected a field '", needed, "'");
    trace_step step{.token = whole(row["token"], "token", 0, most_tokens - 1),
                    .layer = whole(row["layer"], "layer", 0, most_layers - 1)};
    if (!row["ids"].is_array()) lines.wrong(0, "field 'ids': expected a list");
    for (const json& id : row["ids"])
      step.ids.push_back(static_cast<expert_id>(whole(id, "ids", -1, moeroute::max_experts - 1)));
    if (row.contains("weights")) {
      const json& list = row["weights"];
      if (!list.is_array() || list.size() != step.ids.size())
        lines.wrong(0, "field 'weights': expected ", step.ids.size(), " numbers");
      for (const json& w : list) {
        if (!w.is_number()) lines.wrong(0, "field 'weights': expected numbers");
        step.weights.push_back(w.get<float>());
      }
    }
    sink(step);
  }
  static_cast<void>(name);
}

// Sizes that a file claims, before anything is read by them.
inline void check_extent(const input_file& file, const char* name, std::uint64_t found,
                         std::uint64_t most) {
  if (found < 1 || found > most)
    refuse(file.name(), ": expected ", name, " from 1 to ", most, ", found ", found);
}
inline void check_extents(const input_file& file, std::uint64_t tokens, std::uint64_t layers,
                          std::uint64_t k) {
  check_extent(file, "tokens", tokens, most_tokens);
  check_extent(file, "layers", layers, most_layers);
  check_extent(file, "k", k, moeroute::max_experts);
}

// Ids [tokens, layers, k] of so many bytes each behind a header.
template <class Id>
void read_ids(const input_file& file, std::uint64_t begin, index_t tokens, index_t layers,
              index_t k, bool by_layer, Id none, const trace_sink& sink) {
  std::vector<Id> row(static_cast<std::size_t>(k));
  trace_step step;
  for (index_t a = 0; a < (by_layer ? layers : tokens); ++a)
    for (index_t b = 0; b < (by_layer ? tokens : layers); ++b) {
      file.read(begin, row.data(), row.size() * sizeof(Id));
      begin += row.size() * sizeof(Id);
      step.token = by_layer ? b : a;
      step.layer = by_layer ? a : b;
      step.ids.clear();
      for (const Id id : row) {
        const bool nobody = id == none;
        if (!nobody && (static_cast<std::int64_t>(id) < 0 ||
                        static_cast<std::int64_t>(id) >= moeroute::max_experts))
          refuse(file.name(), ": token ", step.token, ", layer ", step.layer,
                 ": expected an expert from -1 to ", moeroute::max_experts - 1, ", found ",
                 static_cast<std::int64_t>(id));
        step.ids.push_back(nobody ? moeroute::no_expert : static_cast<expert_id>(id));
      }
      sink(step);
    }
}

inline void read_npy_trace(const std::filesystem::path& path, const trace_sink& sink) {
  const input_file file(path);
  std::array<unsigned char, 10> head{};
  if (file.size() < head.size())
    refuse(file.name(), ": expected a .npy file, found only ", file.size(), " bytes");
  file.read(0, head.data(), head.size());
  const std::uint64_t length = head[8] + 256ULL * head[9];
  if (std::memcmp(head.data(), "\x93NUMPY", 6) != 0 || head[6] != 1 || length > file.size() - 10)
    refuse(file.name(), ": expected a .npy file of version 1");
  std::string header(static_cast<std::size_t>(length), '\0');
  file.read(10, header.data(), header.size());
  const bool narrow = npy_value(header, "descr").starts_with("'<i2'");
  if ((!narrow && !npy_value(header, "descr").starts_with("'<i4'")) ||
      !npy_value(header, "fortran_order").starts_with("False"))
    refuse(file.name(), ": expected little-endian int16 or int32 values in row-major order");
  const auto shape = npy_shape(npy_value(header, "shape"));
  if (!shape || shape->size() != 3) refuse(file.name(), ": expected a shape [tokens, layers, k]");
  const auto& s = *shape;
  check_extents(file, s[0], s[1], s[2]);
  std::optional<std::uint64_t> bytes = narrow ? 2 : 4;
  for (const std::uint64_t extent : s) bytes = bytes ? checked_product(*bytes, extent) : bytes;
  if (bytes != file.size() - 10 - length)
    refuse(file.name(), ": shape ", example::to_string(s), ": found ", file.size() - 10 - length,
           " bytes of values, expected ",
           bytes ? std::to_string(*bytes) : std::string("more than 64 bits can count"));
  const auto extent = [&](std::size_t i) { return static_cast<index_t>(s[i]); };
  if (narrow)
    read_ids<std::int16_t>(file, 10 + length, extent(0), extent(1), extent(2), false, -1, sink);
  else
    read_ids<std::int32_t>(file, 10 + length, extent(0), extent(1), extent(2), false, -1, sink);
}

inline constexpr std::string_view record_head = "moeroute_record v1 ";

inline void read_record(const std::filesystem::path& path, const trace_sink& sink) {
  line_reader lines(path);
  std::string_view line;
  static_cast<void>(lines.next(line));
  const std::uint64_t begin = line.size() + 1;
  std::array<std::int64_t, 5> size{};
  std::string_view rest = line.substr(std::min(record_head.size(), line.size()));
  for (std::int64_t& n : size) {
    const auto [end, failure] = std::from_chars(rest.data(), rest.data() + rest.size(), n);
    if (failure != std::errc() || n < 0)
      lines.wrong(0, "expected '", record_head, "LAYERS TOKENS EXPERTS K BYTES'");
    rest.remove_prefix(static_cast<std::size_t>(end - rest.data()));
    if (!rest.empty()) rest.remove_prefix(1);
  }
  const auto [layers, tokens, experts, k, bytes] = size;
  if (bytes != 1 && bytes != 2 && bytes != 4)
    lines.wrong(0, "expected ids of 1, 2 or 4 bytes, found ", bytes);
  const input_file file(path);
  if (begin > file.size())
    lines.wrong(line.size(), "expected the end of the line and ids behind it");
  check_extents(file, static_cast<std::uint64_t>(tokens), static_cast<std::uint64_t>(layers),
                static_cast<std::uint64_t>(k));
  check_extent(file, "experts", static_cast<std::uint64_t>(experts), moeroute::max_experts);
  std::optional<std::uint64_t> all = static_cast<std::uint64_t>(bytes);
  for (const std::int64_t n : {layers, tokens, k})
    all = all ? checked_product(*all, static_cast<std::uint64_t>(n)) : all;
  if (all != file.size() - begin)
    refuse(file.name(), ": found ", file.size() - begin, " bytes of ids, expected ",
           all ? std::to_string(*all) : std::string("more than 64 bits can count"));
  const trace_sink checked = [&, most = experts](const trace_step& step) {
    for (const expert_id e : step.ids)
      if (e >= most)
        refuse(file.name(), ": token ", step.token, ", layer ", step.layer,
               ": expected an expert below ", most, ", found ", e);
    sink(step);
  };
  if (bytes == 1)
    read_ids<std::uint8_t>(file, begin, tokens, layers, k, true, 255, checked);
  else if (bytes == 2)
    read_ids<std::uint16_t>(file, begin, tokens, layers, k, true, 65535, checked);
  else
    read_ids<std::int32_t>(file, begin, tokens, layers, k, true, -1, checked);
}

}  // namespace detail

/// The format of a file by its first bytes.
[[nodiscard]] inline trace_format format_of(const std::filesystem::path& path) {
  const input_file file(path);
  std::string head(static_cast<std::size_t>(std::min<std::uint64_t>(file.size(), 32)), '\0');
  file.read(0, head.data(), head.size());
  if (head.starts_with("\x93NUMPY")) return trace_format::npy;
  if (head.starts_with(detail::record_head)) return trace_format::record;
  if (head.starts_with('#')) return trace_format::route;
  if (head.starts_with('{')) return trace_format::jsonl;
  return trace_format::csv;
}

/// Reads a trace of any of the formats, a token's layer at a time.
///
/// A file that is wrong is refused by name, line and column (or token and layer).
inline void read_trace(const std::filesystem::path& path, const trace_sink& sink) {
  switch (format_of(path)) {
    case trace_format::npy: return detail::read_npy_trace(path, sink);
    case trace_format::record: return detail::read_record(path, sink);
    case trace_format::csv: {
      detail::line_reader lines(path);
      return detail::read_csv(lines, sink);
    }
    case trace_format::route: {
      detail::line_reader lines(path);
      return detail::read_route(lines, sink);
    }
    case trace_format::jsonl: {
      detail::line_reader lines(path);
      return detail::read_jsonl(lines, path.string(), sink);
    }
  }
}

/// Writes steps as they come; forms of one size for all (npy, record) when finish() is called.
class trace_writer {
 public:
  trace_writer(const std::filesystem::path& path, trace_format format)
      : path_(path), format_(format), out_(path, std::ios::binary) {
    if (format == trace_format::csv) out_ << "layer,expert\n";
    if (format == trace_format::route)
      out_ << "# route_trace v1\nturn,phase,step,layer,slot,expert,weight\n";
  }

  void write(const trace_step& step) {
    experts_ = std::max<index_t>(experts_, [&] {
      expert_id most = 0;
      for (const expert_id e : step.ids) most = std::max(most, e + 1);
      return most;
    }());
    const bool weighed = step.weights.size() == step.ids.size();
    switch (format_) {
      case trace_format::csv:
        for (const expert_id e : step.ids)
          if (e != moeroute::no_expert) out_ << step.layer << ',' << e << '\n';
        return;
      case trace_format::route:
        for (std::size_t r = 0; r < step.ids.size(); ++r)
          out_ << "0,decode," << step.token << ',' << step.layer << ',' << r << ',' << step.ids[r]
               << ',' << number(weighed ? step.weights[r] : 0.0F) << '\n';
        return;
      case trace_format::jsonl: {
        out_ << "{\"layer\": " << step.layer << ", \"token\": " << step.token << ", \"ids\": [";
        for (std::size_t r = 0; r < step.ids.size(); ++r)
          out_ << (r == 0 ? "" : ", ") << step.ids[r];
        out_ << ']';
        for (std::size_t r = 0; weighed && r < step.weights.size(); ++r)
          out_ << (r == 0 ? ", \"weights\": [" : ", ") << number(step.weights[r]);
        out_ << (weighed && !step.weights.empty() ? "]}\n" : "}\n");
        return;
      }
      default: kept_.push_back(step); kept_.back().weights.clear();
    }
  }

  /// Refuses what its form cannot hold, and a file that cannot be written.
  void finish() {
    if (format_ == trace_format::npy || format_ == trace_format::record) write_block();
    out_.flush();
    if (!out_) refuse(path_.string(), ": cannot be written");
  }

 private:
  static std::string number(float x) {
    std::array<char, 32> text{};
    const auto end = std::to_chars(text.data(), text.data() + text.size(), x).ptr;
    return {text.data(), end};
  }

  void write_block() {
    index_t tokens = 0, layers = 0;
    std::size_t k = 1;
    for (const trace_step& s : kept_) {
      tokens = std::max(tokens, s.token + 1);
      layers = std::max(layers, s.layer + 1);
      k = std::max(k, s.ids.size());
    }
    if (tokens * layers != static_cast<index_t>(kept_.size()))
      refuse(path_.string(), ": expected every layer of every token once (", tokens * layers,
             " steps), found ", kept_.size());
    const bool npy = format_ == trace_format::npy;
    std::vector<expert_id> ids(static_cast<std::size_t>(tokens * layers) * k, moeroute::no_expert);
    std::vector<std::uint8_t> there(kept_.size());
    for (const trace_step& s : kept_) {
      const auto at =
          static_cast<std::size_t>(npy ? s.token * layers + s.layer : s.layer * tokens + s.token);
      if (std::exchange(there[at], 1) != 0)
        refuse(path_.string(), ": token ", s.token, " has layer ", s.layer, " twice");
      std::copy(s.ids.begin(), s.ids.end(), ids.begin() + static_cast<std::ptrdiff_t>(at * k));
    }
    if (npy) {
      const bool narrow = experts_ <= 32767;
      std::string header =
          join("{'descr': '<i", narrow ? 2 : 4, "', 'fortran_order': False, 'shape': (", tokens,
               ", ", layers, ", ", k, "), }");
      while ((header.size() + 11) % 64 != 0) header += ' ';
      header += '\n';
      out_ << std::string_view("\x93NUMPY\x01\0", 8) << static_cast<char>(header.size() & 255)
           << static_cast<char>(header.size() >> 8) << header;
      if (narrow)
        put<std::int16_t>(ids);
      else
        put<std::int32_t>(ids);
      return;
    }
    // Whole layers, as routing_record keeps them.
    const int bytes = experts_ <= 255 ? 1 : experts_ <= 65535 ? 2 : 4;
    out_ << detail::record_head << layers << ' ' << tokens << ' ' << experts_ << ' ' << k << ' '
         << bytes << '\n';
    moeroute::assignment a;
    for (index_t l = 0; l < layers && tokens > 0; ++l) {
      a.reset(tokens, std::max<index_t>(experts_, static_cast<index_t>(k)),
              static_cast<index_t>(k));
      std::copy_n(
          ids.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(l * tokens) * k),
          a.ids().size(), a.ids().begin());
      if (bytes == 1) record<std::uint8_t>(a);
      if (bytes == 2) record<std::uint16_t>(a);
      if (bytes == 4) record<std::int32_t>(a);
    }
  }
  template <class Id>
  void record(const moeroute::assignment& a) {
    moeroute::routing_record<Id> kept;
    kept.record(a);
    out_.write(reinterpret_cast<const char*>(kept.ids().data()),
               static_cast<std::streamsize>(kept.ids().size_bytes()));
  }
  template <class Id>
  void put(const std::vector<expert_id>& ids) {
    const std::vector<Id> list(ids.begin(), ids.end());
    out_.write(reinterpret_cast<const char*>(list.data()),
               static_cast<std::streamsize>(list.size() * sizeof(Id)));
  }

  std::filesystem::path path_;
  trace_format format_;
  std::ofstream out_;
  std::vector<trace_step> kept_;
  index_t experts_ = 1;
};

}  // namespace example
