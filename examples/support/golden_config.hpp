// Files that describe a router and its logits in the closed vocabulary of tests/golden/README.md:
// the one place where those words become a router_spec.
#pragma once

#include <moeroute/base/error.hpp>
#include <moeroute/policy/catalog.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/spec_text.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "json.hpp"

namespace example {

using moeroute::index_t;
using golden_fields = basic_json_fields<float_json>;

/// A described router with the tensors that belong to it.
struct golden_router {
  moeroute::router_spec spec;
  std::vector<float> bias;
  std::vector<float> second_bias;        ///< where the spec has a bias per class of tokens
  std::vector<std::uint8_t> modality{};  ///< [T], the class of each token
  std::vector<float> per_expert_scale;
  std::optional<moeroute::expert_table> table;
  /// [T], the token ids that a table is asked for; any number for a token that is masked.
  std::vector<std::int32_t> input_ids;
};

/// A router and the logits that it is to route.
struct golden_input {
  golden_router router;
  index_t tokens = 0;
  std::vector<float> logits;  ///< [T, spec.columns()]
};

namespace detail {

template <class T>
struct word {
  const char* name;
  T value;
};

// What the text of a field stands for; another text is refused with the list of those there are.
template <class T, std::size_t N>
[[nodiscard]] T one_of(const golden_fields& config, const char* key, const word<T> (&words)[N]) {
  const float_json& value = config.at(key);
  std::string list;
  for (const word<T>& w : words) {
    if (value == w.name) return w.value;
    list += (list.empty() ? "" : ", ") + std::string(w.name);
  }
  config.wrong(key, list);
}

inline constexpr const char* config_keys[] = {
    "score",         "score_domain", "selection",
    "bias",          "groups",       "topk_group",
    "group_score",   "group_fill",   "normalize",
    "lp_p",          "eps",          "eps_mode",
    "scale",         "scale_where",  "post_divide_by_k",
    "output_scale",  "gate_bias",    "per_expert_scale",
    "logit_softcap", "jitter_eps",   "zero_experts",
    "num_keys",      "weight_on",    "zero_expert_first_id",
    "capacity",      "drop_order",   "norm_before_drop",
};

inline void refuse_unknown_keys(const float_json& config, const golden_fields& fields,
                                bool beside_tensors) {
  std::string list;
  for (const char* key : config_keys) list += (list.empty() ? "" : ", ") + std::string(key);
  for (const auto& [key, value] : config.items()) {
    bool known = beside_tensors && (key == "experts" || key == "k" || key == "correction_bias" ||
                                    key == "extra" || key == "remarks");
    for (const char* one : config_keys) known = known || key == one;
    if (!known)
      refuse(fields.where(), ": unknown key '", one_line(key), "', expected some of ", list);
  }
}

// A number, or one of the words that JSON has no numbers for.
[[nodiscard]] inline std::optional<float> number_of(const float_json& value) {
  if (value.is_number()) return value.get<float>();
  if (value == "inf") return HUGE_VALF;
  if (value == "-inf") return -HUGE_VALF;
  if (value == "nan") return std::nanf("");
  return std::nullopt;
}

[[nodiscard]] inline float number(const golden_fields& fields, const char* key, float absent) {
  if (!fields.has(key)) return absent;
  const std::optional<float> value = number_of(fields.at(key));
  if (!value || !std::isfinite(*value)) fields.wrong(key, "a finite number");
  return *value;
}

// What f returns; a refusal by the library is told with the place in the file.
template <class F>
auto told(const std::string& where, F&& f) {
  try {
    return f();
  } catch (const moeroute::error& e) {
    refuse(where, ": ", e.what());
  }
}

// `size` floats, flat or in rows of any length.
[[nodiscard]] inline std::vector<float> floats(const golden_fields& fields, const char* key,
                                               index_t size, const std::string& expected) {
  std::vector<float> values;
  const auto add = [&](const float_json& value) {
    const std::optional<float> x = number_of(value);
    if (!x)
      refuse(fields.where(), ": field '", key,
             "': expected numbers, \"nan\", \"inf\" or \"-inf\", ", "value ", values.size(),
             " is of type ", value.type_name());
    values.push_back(*x);
  };
  for (const float_json& value : fields.array(key)) {
    if (!value.is_array()) {
      add(value);
    } else {
      for (const float_json& one : value) add(one);
    }
  }
  if (static_cast<index_t>(values.size()) != size)
    refuse(fields.where(), ": field '", key, "': expected ", size, " values (", expected,
           "), found ", values.size());
  return values;
}

[[nodiscard]] inline std::vector<float> finite_floats(const golden_fields& fields, const char* key,
                                                      index_t experts) {
  std::vector<float> values = floats(fields, key, experts, "one per expert");
  for (std::size_t e = 0; e < values.size(); ++e)
    if (!std::isfinite(values[e]))
      refuse(fields.where(), ": field '", key, "': expected finite numbers, value ", e, " is ",
             values[e]);
  return values;
}

[[nodiscard]] inline std::int32_t integer_of(const golden_fields& fields, const char* key,
                                             const float_json& value, std::int64_t low,
                                             std::int64_t high) {
  if (!value.is_number_integer() || value.get<std::int64_t>() < low ||
      value.get<std::int64_t>() > high)
    refuse(fields.where(), ": field '", key, "': expected integers from ", low, " to ", high,
           ", found ", value.is_number() ? value.dump() : value.type_name());
  return value.get<std::int32_t>();
}

// ids = tid2eid[input_ids]: the table and the row that each token reads.
inline void read_table(const golden_fields& extra, std::optional<index_t> tokens,
                       golden_router& made) {
  const index_t k = made.spec.k, experts = made.spec.experts;
  std::vector<moeroute::expert_id> ids;
  const auto add = [&](const float_json& id) {
    ids.push_back(integer_of(extra, "tid2eid", id, -1, experts - 1));
  };
  for (const float_json& row : extra.array("tid2eid")) {
    if (!row.is_array()) {
      add(row);
      continue;
    }
    if (static_cast<index_t>(row.size()) != k)
      refuse(extra.where(), ": field 'tid2eid': expected rows of k = ", k,
             " experts, found one of ", row.size());
    for (const float_json& id : row) add(id);
  }
  made.table = told(extra.where() + ": field 'tid2eid'",
                    [&] { return moeroute::expert_table(std::move(ids), k, experts); });
  for (const float_json& id : extra.array("input_ids"))
    made.input_ids.push_back(integer_of(extra, "input_ids", id, INT32_MIN, INT32_MAX));
  if (tokens && static_cast<index_t>(made.input_ids.size()) != *tokens)
    refuse(extra.where(), ": field 'input_ids': expected ", *tokens, " values (tokens), found ",
           made.input_ids.size());
}

}  // namespace detail

/// The router that a file's `config` describes. Keys that are absent have the value of the plain
/// softmax top-k.
///
/// Refuses keys and values outside the vocabulary, and combinations that clash, by name.
[[nodiscard]] inline moeroute::router_spec spec_from_golden(const float_json& config,
                                                            const std::string& where,
                                                            index_t experts, index_t k,
                                                            bool beside_tensors = false) {
  using namespace moeroute;
  using detail::number;
  using detail::one_of;
  const golden_fields fields(config, where);
  detail::refuse_unknown_keys(config, fields, beside_tensors);
  router_spec s;
  s.experts = experts;
  s.k = k;
  const auto size = [&](const char* key, index_t absent, index_t low, index_t high) {
    return fields.has(key) ? static_cast<index_t>(fields.integer(key, low, high)) : absent;
  };

  bool mixes = false;
  if (fields.has("score")) {
    enum class score { softmax, sigmoid, sqrtsoftplus, sparsemixer };
    const auto word = one_of<score>(fields, "score",
                                    {{"softmax", score::softmax},
                                     {"sigmoid", score::sigmoid},
                                     {"sqrtsoftplus", score::sqrtsoftplus},
                                     {"sparsemixer", score::sparsemixer}});
    if (word == score::sigmoid) s.score = score_kind::sigmoid;
    if (word == score::sqrtsoftplus) s.score = score_kind::sqrt_softplus;
    mixes = word == score::sparsemixer;
  }
  if (fields.has("score_domain"))
    s.domain = one_of<score_domain>(
        fields, "score_domain", {{"all", score_domain::all}, {"selected", score_domain::selected}});
  if (mixes) s.selection = selection_kind::sparsemixer;
  if (fields.has("selection"))
    s.selection = one_of<selection_kind>(fields, "selection",
                                         {{"top_k", selection_kind::top_k},
                                          {"hash_table", selection_kind::expert_table},
                                          {"product_keys", selection_kind::product_keys},
                                          {"sparsemixer", selection_kind::sparsemixer},
                                          {"top2_second_by_logit", selection_kind::top2}});
  if (mixes != (s.selection == selection_kind::sparsemixer))
    refuse(where, ": score=", mixes ? "sparsemixer" : std::string(to_string(s.score)),
           " clashes with selection=", std::string(to_string(s.selection)),
           ": sparsemixer is both a score and a selection");
  if (fields.has("bias"))
    s.selection_bias = one_of<bool>(fields, "bias", {{"none", false}, {"selection", true}});

  s.groups = size("groups", 1, 1, experts);
  s.topk_group = size("topk_group", 1, 1, s.groups);
  const auto score =
      fields.has("group_score")
          ? one_of<group_score>(fields, "group_score",
                                {{"max", group_score::max}, {"top2_sum", group_score::top2_sum}})
          : s.group_score;
  float fill = s.group_fill;
  if (fields.has("group_fill")) {
    const std::optional<float> given = detail::number_of(fields.at("group_fill"));
    if (given != 0.0f && given != -HUGE_VALF) fields.wrong("group_fill", "\"-inf\" or 0");
    fill = *given;
  }
  // Files name both also where there is one group, which limits nothing.
  if (s.groups != 1) {
    s.group_score = score;
    s.group_fill = fill;
  }

  if (fields.has("normalize"))
    s.normalize = one_of<normalization>(
        fields, "normalize",
        {{"none", normalization::none}, {"sum", normalization::sum}, {"lp", normalization::lp}});
  s.lp_p = number(fields, "lp_p", 1.0f);
  if (!(s.lp_p >= 1.0f)) fields.wrong("lp_p", "a number from 1 on");
  if (fields.has("eps_mode"))
    s.eps_where = one_of<eps_mode>(
        fields, "eps_mode",
        {{"none", eps_mode::none}, {"add", eps_mode::add}, {"clamp", eps_mode::clamp}});
  const float eps = number(fields, "eps", 0.0f);
  if (!(eps >= 0.0f)) fields.wrong("eps", "a number from 0 on");
  if (s.eps_where != eps_mode::none) s.eps = eps;
  s.scale = number(fields, "scale", 1.0f);
  if (fields.has("scale_where"))
    s.scale_where =
        one_of<scale_place>(fields, "scale_where",
                            {{"weights", scale_place::weights}, {"output", scale_place::output}});
  s.divide_by_k = fields.flag("post_divide_by_k", false);
  s.output_scale = number(fields, "output_scale", 1.0f);
  s.per_expert_scale = fields.flag("per_expert_scale", false);
  s.gate_bias = fields.flag("gate_bias", false);
  s.softcap = number(fields, "logit_softcap", 0.0f);
  if (!(s.softcap >= 0.0f)) fields.wrong("logit_softcap", "a number from 0 on");
  if (fields.has("jitter_eps")) {
    if (!mixes && number(fields, "jitter_eps", 0.0f) != 0.0f)
      refuse(where, ": jitter_eps clashes with score=", std::string(to_string(s.score)),
             ": only sparsemixer has a jitter");
    if (mixes) s.jitter = number(fields, "jitter_eps", 0.0f);
    if (!(s.jitter >= 0.0f)) fields.wrong("jitter_eps", "a number from 0 on");
  }
  s.zero_experts = size("zero_experts", 0, 0, experts - 1);
  size("zero_expert_first_id", 0, s.zero_experts == 0 ? 0 : experts - s.zero_experts,
       experts - s.zero_experts);
  if (fields.has("weight_on"))
    s.weight_on = one_of<weight_place>(
        fields, "weight_on", {{"output", weight_place::output}, {"input", weight_place::input}});
  s.capacity = size("capacity", 0, 1, 0x7fffffff);
  if (fields.has("drop_order") != (s.capacity != 0))
    refuse(where, ": capacity clashes with drop_order: expected both or neither, ",
           s.capacity == 0 ? "capacity" : "drop_order", " is missing");
  if (s.capacity != 0)
    s.drop_order = one_of<drop_order>(fields, "drop_order",
                                      {{"position_slot_major", drop_order::choice_major},
                                       {"batch_priority_slot_major", drop_order::batch_priority}});
  s.normalize_before_drop = fields.flag("norm_before_drop", true);

  detail::told(where, [&] { check(s); });
  if (fields.has("num_keys")) {
    if (s.selection != selection_kind::product_keys)
      refuse(where, ": num_keys clashes with selection=", std::string(to_string(s.selection)),
             ": only product_keys has keys");
    const index_t n = s.columns() / 2;
    if (fields.integer("num_keys", 1, experts) != n) fields.wrong("num_keys", join(n));
  }
  return s;
}

/// The router of a whole file: experts, k, config, correction_bias and extra. `k` overrides the
/// file's.
///
/// The vocabulary stands under `config`, or directly beside experts and k (a spec file).
[[nodiscard]] inline golden_router read_golden_router(const float_json& document,
                                                      const std::string& file,
                                                      std::optional<index_t> k = {},
                                                      std::optional<index_t> tokens = {}) {
  const golden_fields fields(document, file);
  const index_t experts = fields.integer("experts", 1, moeroute::max_experts);
  if (k && (*k < 1 || *k > experts))
    refuse("--k: expected an integer from 1 to ", experts, " (experts of ", file, "), found ", *k);
  if (!k) k = fields.integer("k", 1, experts);

  golden_router made;
  // A line of the words of parse_spec, which names every router, or the closed vocabulary.
  if (fields.has("config") && fields.at("config").is_string())
    made.spec = detail::told(file + ": field 'config'", [&] {
      return moeroute::parse_spec("E=" + std::to_string(experts) + " k=" + std::to_string(*k) +
                                  " " + fields.at("config").get<std::string>());
    });
  else if (fields.has("config") || fields.has("logits"))
    made.spec = spec_from_golden(fields.at("config"), file + ": field 'config'", experts, *k);
  else
    made.spec = spec_from_golden(document, file, experts, *k, true);

  if (made.spec.selection_bias)
    made.bias = detail::finite_floats(fields, "correction_bias", experts);
  const bool tabled = made.spec.selection == moeroute::selection_kind::expert_table;
  if (tabled || made.spec.per_expert_scale) {
    const golden_fields extra(fields.at("extra"), file + ": field 'extra'");
    if (made.spec.per_expert_scale)
      made.per_expert_scale = detail::finite_floats(extra, "per_expert_scale", experts);
    if (tabled) detail::read_table(extra, tokens, made);
  }
  return made;
}

/// Logits as the reference of product keys reads them.
///
/// DogeCDMoE views its [T, 2n] buffer as (2, T, n): the first halves of all tokens come from the
/// first T rows of n, the second ones from the others, so token t reads rows of other tokens. The
/// library takes a token's own two halves in its own row, hence this copy.
[[nodiscard]] inline std::vector<float> in_the_reference_view(const std::vector<float>& logits,
                                                              index_t tokens, index_t columns) {
  std::vector<float> own;
  own.reserve(logits.size());
  const index_t n = columns / 2;
  for (index_t t = 0; t < tokens; ++t)
    for (const index_t row : {t, tokens + t})
      own.insert(own.end(), logits.begin() + row * n, logits.begin() + (row + 1) * n);
  return own;
}

/// A whole file of the golden format; what it holds beside the inputs of routing is not looked at.
[[nodiscard]] inline golden_input read_golden_input(const float_json& document,
                                                    const std::string& file,
                                                    std::optional<index_t> k = {}) {
  const golden_fields fields(document, file);
  golden_input made;
  made.tokens = fields.integer("tokens", 0, 0x7fffffff);
  made.router = read_golden_router(document, file, k, made.tokens);
  const index_t columns = made.router.spec.columns();
  made.logits = detail::floats(fields, "logits", made.tokens * columns,
                               join("tokens ", made.tokens, " x columns ", columns));
  if (made.router.spec.selection == moeroute::selection_kind::product_keys)
    made.logits = in_the_reference_view(made.logits, made.tokens, columns);
  return made;
}

}  // namespace example
