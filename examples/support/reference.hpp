// The reference's answers beside a checkpoint: what --verify compares with.
#pragma once

#include "json.hpp"
#include "npy.hpp"

#include <cstdint>
#include <filesystem>
#include <string>
#include <type_traits>
#include <vector>

namespace example {

/// One layer's routing of a prompt: `k` choices per token.
struct reference_layer {
  std::vector<std::vector<std::int32_t>> ids;
  std::vector<std::vector<float>> weights;
  std::vector<double> margin;  // gap between the k-th logit and the next
};

struct reference_case {
  std::string name;
  std::vector<std::int32_t> prompt;
  npy_array logits;  // [prompt, vocab]
  std::vector<reference_layer> layers;
  std::vector<std::int32_t> greedy;  // empty where the reference made none
};

/// What the reference has to agree with in size.
struct reference_extents {
  std::int64_t vocab = 0;
  std::int64_t layers = 0;
  std::int64_t experts = 0;
  std::int64_t experts_per_token = 0;
  std::int64_t positions = 0;
};

namespace detail {

/// The array's numbers; `low` and `high` bound them.
template <class T>
[[nodiscard]] std::vector<T> read_numbers(const json& values, const std::string& where, double low,
                                          double high, const char* expected) {
  if (!values.is_array()) {
    refuse(where, ": expected an array, found ", values.type_name());
  }
  std::vector<T> made;
  made.reserve(values.size());
  for (const json& value : values) {
    const bool whole = std::is_floating_point_v<T> || value.is_number_integer();
    if (!value.is_number() || !whole ||
        !(value.get<double>() >= low && value.get<double>() <= high)) {
      refuse(where, ": expected ", expected, ", found ",
             value.is_number() ? value.dump() : value.type_name());
    }
    made.push_back(value.get<T>());
  }
  return made;
}

template <class T>
[[nodiscard]] std::vector<std::vector<T>> read_rows(const json_fields& fields,
                                                    const std::string& name, std::size_t rows,
                                                    std::size_t columns, double low, double high,
                                                    const char* expected) {
  const std::string where = fields.where() + ": field '" + name + "'";
  std::vector<std::vector<T>> made;
  for (const json& row : fields.array(name)) {
    made.push_back(read_numbers<T>(row, where, low, high, expected));
    if (made.back().size() != columns) {
      refuse(where, ": expected ", columns, " values per token, found ", made.back().size());
    }
  }
  if (made.size() != rows) {
    refuse(where, ": expected ", rows, " tokens, found ", made.size());
  }
  return made;
}

[[nodiscard]] inline reference_case read_case(const json_fields& fields,
                                              const std::filesystem::path& directory,
                                              const reference_extents& extents) {
  const auto at = [&](const char* name) { return fields.where() + ": field '" + name + "'"; };
  const auto last_token = static_cast<double>(extents.vocab - 1);
  reference_case made;
  made.name = fields.has("name") ? fields.text("name") : std::string("reference");
  made.prompt = read_numbers<std::int32_t>(fields.array("prompt"), at("prompt"), 0, last_token,
                                           "token ids of the vocabulary");
  if (fields.has("greedy")) {
    made.greedy = read_numbers<std::int32_t>(fields.array("greedy"), at("greedy"), 0, last_token,
                                             "token ids of the vocabulary");
  }
  const std::size_t tokens = made.prompt.size();
  if (tokens == 0 || tokens + made.greedy.size() > static_cast<std::size_t>(extents.positions)) {
    refuse(at("prompt"), ": expected 1 to ", extents.positions,
           " tokens with their continuation, found ", tokens + made.greedy.size());
  }
  const auto file = directory / std::filesystem::path(fields.text("logits")).filename();
  made.logits = read_npy(file);
  const tensor_shape shape{tokens, static_cast<std::uint64_t>(extents.vocab)};
  if (made.logits.shape != shape) {
    refuse(file.string(), ": expected shape ", to_string(shape), ", found ",
           to_string(made.logits.shape));
  }
  const auto k = static_cast<std::size_t>(extents.experts_per_token);
  for (const json& layer : fields.array("layers")) {
    const json_fields part(layer, at("layers"));
    made.layers.push_back(
        {read_rows<std::int32_t>(part, "ids", tokens, k, 0,
                                 static_cast<double>(extents.experts - 1), "expert ids"),
         read_rows<float>(part, "weights", tokens, k, 0, 1e30, "weights"),
         read_numbers<double>(part.array("logit_margin_k"),
                              at("layers") + ": field 'logit_margin_k'", 0, 1e30,
                              "margins from 0 on")});
    if (made.layers.back().margin.size() != tokens) {
      refuse(at("layers"), ": field 'logit_margin_k': expected ", tokens, " values, found ",
             made.layers.back().margin.size());
    }
  }
  if (made.layers.size() != static_cast<std::size_t>(extents.layers)) {
    refuse(at("layers"), ": expected ", extents.layers, " layers, found ", made.layers.size());
  }
  return made;
}

}  // namespace detail

/// Reads DIRECTORY/reference.json: either one case, or an array `cases`.
[[nodiscard]] inline std::vector<reference_case> read_reference(
    const std::filesystem::path& directory, const reference_extents& extents) {
  const auto path = directory / "reference.json";
  const json document = read_json(path);
  const json_fields fields(document, path.string());
  std::vector<reference_case> cases;
  if (!fields.has("cases")) {
    cases.push_back(detail::read_case(fields, directory, extents));
    return cases;
  }
  for (const json& one : fields.array("cases")) {
    const json_fields part(one, join(path.string(), ": case ", cases.size()));
    cases.push_back(detail::read_case(part, directory, extents));
  }
  if (cases.empty()) {
    fields.wrong("cases", "at least one case");
  }
  return cases;
}

}  // namespace example
