// What route_file does, apart from its streams: reads a file, routes, writes ids and weights as
// JSON.
#pragma once

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cxxopts.hpp>
#include <exception>
#include <filesystem>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "golden_route.hpp"
#include "npy.hpp"

namespace example {

/// The command line of route_file.
struct route_file_arguments {
  std::filesystem::path input;
  std::optional<std::filesystem::path> spec;
  std::optional<index_t> k;
  std::optional<std::string> mask;
  std::optional<std::string> help;  ///< asked for: the text to print, nothing else to do
};

[[nodiscard]] inline route_file_arguments parse_route_file(int count, const char* const* words) {
  cxxopts::Options options("route_file",
                           "Routes the logits of a file and writes {\"ids\", \"weights\"}.\n");
  const auto text = [] { return cxxopts::value<std::string>(); };
  options.positional_help("IN.json | IN.npy")
      .add_options()                                                                             //
      ("input", "a file in the format of tests/golden, or logits [T, E] as .npy", text(), "IN")  //
      ("spec", "the router of .npy logits: experts, k and the vocabulary of config", text(),
       "SPEC.json")                                                                            //
      ("k", "choices per token, in place of the file's", text(), "N")                          //
      ("mask", "1,1,0,... or a file of such: 0 for tokens that take no part", text(), "LIST")  //
      ("help", "this");
  options.parse_positional("input");
  // cxxopts knows options of one letter by one dash only.
  std::vector<std::string> spelled(words, words + count);
  for (std::string& word : spelled)
    if (word == "--k" || word.starts_with("--k="))
      word = word == "--k" ? "-k" : "-k" + word.substr(4);
  std::vector<const char*> list;
  for (const std::string& word : spelled) list.push_back(word.c_str());
  cxxopts::ParseResult found;
  try {
    found = options.parse(count, list.data());
  } catch (const std::exception& error) {
    refuse("command line: ", error.what(), " (--help lists the options)");
  }
  route_file_arguments made;
  if (found.count("help") > 0) {
    made.help = options.help();
    return made;
  }
  for (const char* once : {"input", "spec", "k", "mask"})
    if (found.count(once) > 1)
      refuse("--", once, ": expected once, found ", found.count(once), " times");
  if (!found.unmatched().empty())
    refuse("command line: expected one file, found also '", found.unmatched().front(), "'");
  if (found.count("input") == 0) refuse("command line: expected a file (--help says more)");
  made.input = found["input"].as<std::string>();
  if (found.count("spec") > 0) made.spec = found["spec"].as<std::string>();
  if (found.count("mask") > 0) made.mask = found["mask"].as<std::string>();
  if (found.count("k") > 0) {
    const auto word = found["k"].as<std::string>();
    index_t k = 0;
    const auto [end, failure] = std::from_chars(word.data(), word.data() + word.size(), k);
    if (failure != std::errc() || end != word.data() + word.size())
      refuse("--k: expected an integer, found '", word, "'");
    made.k = k;
  }
  return made;
}

/// Zeros and ones between commas, blanks or brackets; `text` is such a list or a file of one.
[[nodiscard]] inline std::vector<std::uint8_t> read_token_mask(const std::string& text,
                                                               index_t tokens) {
  const bool list = text.find_first_not_of("01, ") == std::string::npos;
  const std::string content = list ? text : input_file(text).text(json_size_limit);
  const std::string where = list ? "--mask" : "--mask " + text;
  std::vector<std::uint8_t> mask;
  bool apart = true;
  for (const char c : content) {
    const bool digit = c == '0' || c == '1';
    if (digit && !apart) refuse(where, ": expected 0 or 1 for each token, with commas between");
    if (digit) mask.push_back(c == '1');
    if (!digit && std::string_view(", \t\r\n[]").find(c) == std::string_view::npos)
      refuse(where, ": expected 0 or 1 for each token, found '", one_line(std::string(1, c)), "'");
    apart = !digit;
  }
  if (static_cast<index_t>(mask.size()) != tokens)
    refuse(where, ": expected ", tokens, " values (tokens), found ", mask.size());
  return mask;
}

/// Token ids of a table have to be in it; of a masked token nobody asks, whatever its padding is.
inline void check_token_ids(golden_router& router, const std::vector<std::uint8_t>& mask,
                            const std::string& file) {
  if (!router.table) return;
  for (std::size_t t = 0; t < router.input_ids.size(); ++t) {
    std::int32_t& id = router.input_ids[t];
    if (id >= 0 && id < router.table->vocabulary()) continue;
    if (mask.empty() || mask[t] != 0)
      refuse(file, ": field 'extra': field 'input_ids': expected integers from 0 to ",
             router.table->vocabulary() - 1, ", found ", id);
    id = 0;
  }
}

/// Logits from an .npy file, the router from a spec file.
[[nodiscard]] inline golden_input read_npy_input(const route_file_arguments& given) {
  if (!given.spec) refuse("--spec: expected the file that describes the router of .npy logits");
  npy_array array = read_npy(given.input);
  if (array.shape.size() != 2)
    refuse(given.input.string(), ": shape ", to_string(array.shape),
           ": expected [tokens, experts]");
  golden_input made;
  made.tokens = static_cast<index_t>(array.shape[0]);
  made.router = read_golden_router(read_json<float_json>(*given.spec), given.spec->string(),
                                   given.k, made.tokens);
  const index_t columns = made.router.spec.columns();
  if (static_cast<index_t>(array.shape[1]) != columns)
    refuse(given.input.string(), ": shape ", to_string(array.shape), ": expected ", columns,
           " columns as field 'experts' of ", given.spec->string(), " asks for");
  made.logits = std::move(array.values);
  if (made.router.spec.selection == moeroute::selection_kind::product_keys)
    made.logits = in_the_reference_view(made.logits, made.tokens, columns);
  return made;
}

/// {"ids": [[...]], "weights": [[...]]}: a row per token, as long as its choices are many; weights
/// with the nine digits that bring a float back.
inline std::string choices_as_json(const moeroute::assignment& a) {
  std::string ids, weights;
  char number[32];
  for (index_t t = 0; t < a.tokens(); ++t) {
    const char* open = t == 0 ? "[" : ", [";
    ids += open;
    weights += open;
    for (index_t c = a.first(t); c < a.first(t + 1); ++c) {
      const auto at = static_cast<std::size_t>(c);
      const char* comma = c == a.first(t) ? "" : ", ";
      ids += comma + std::to_string(a.ids()[at]);
      std::snprintf(number, sizeof number, "%s%.9g", comma, static_cast<double>(a.weights()[at]));
      weights += number;
    }
    ids += "]";
    weights += "]";
  }
  return "{\"ids\": [" + ids + "],\n \"weights\": [" + weights + "]}\n";
}

/// The whole program: 0, or 2 with one line on `err`.
inline int run_route_file(int count, const char* const* words, std::ostream& out,
                          std::ostream& err) {
  std::string file = "route_file";
  try {
    const route_file_arguments given = parse_route_file(count, words);
    if (given.help) {
      out << *given.help << std::flush;
      if (!out) refuse("the output cannot be written");
      return 0;
    }
    file = given.input.string();
    golden_input in;
    if (given.input.extension() == ".npy") {
      in = read_npy_input(given);
    } else {
      if (given.spec)
        refuse("--spec: expected with .npy logits only, ", file, " has its own config");
      in = read_golden_input(read_json<float_json>(given.input), file, given.k);
    }
    std::vector<std::uint8_t> mask;
    if (given.mask) mask = read_token_mask(*given.mask, in.tokens);
    check_token_ids(in.router, mask, file);
    const moeroute::matrix_view<const float> logits(in.logits.data(), in.tokens,
                                                    in.router.spec.columns());
    out << choices_as_json(route_golden(in.router, logits, mask)) << std::flush;
    if (!out) refuse("the output cannot be written");
    return 0;
  } catch (const input_error& e) {
    err << "route_file: " << one_line(e.what()) << "\n";
  } catch (const std::exception& e) {
    const std::string what = e.what();
    const bool named = what.find(file) != std::string::npos;
    err << "route_file: " << one_line(named ? what : file + ": " + what) << "\n";
  }
  return 2;
}

}  // namespace example
