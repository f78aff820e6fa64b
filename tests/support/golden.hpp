// Reads a golden file and compares by the rules of tests/golden/README.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <map>
#include <moeroute/base/index.hpp>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "support/compare.hpp"

namespace test {

using moeroute::expert_id;
using moeroute::index_t;

/// Numbers are parsed to float directly (strtof): by way of double some would be rounded twice.
using golden_json = nlohmann::basic_json<std::map, std::vector, std::string, bool, std::int64_t,
                                         std::uint64_t, float>;

/// A file of tests/golden, by its path there.
inline golden_json read_golden(const std::string& file) {
  const std::string path = std::string(MOEROUTE_TEST_DATA "/golden/") + file;
  std::ifstream in(path);
  if (!in) throw std::runtime_error(path + ": cannot be opened");
  return golden_json::parse(in);
}

/// A file of tests/golden/families.
inline golden_json read_family(const std::string& name) {
  return read_golden("families/" + name + ".json");
}

/// A number; the files write non-finite ones as strings.
inline float golden_float(const golden_json& value) {
  if (!value.is_string()) return value.get<float>();
  const auto text = value.get<std::string>();
  if (text == "nan") return std::nanf("");
  if (text == "inf") return HUGE_VALF;
  if (text == "-inf") return -HUGE_VALF;
  throw std::runtime_error("'" + text + "' is no number");
}

inline std::vector<float> golden_floats(const golden_json& list) {
  std::vector<float> values;
  if (list.is_null()) return values;
  for (const golden_json& value : list) values.push_back(golden_float(value));
  return values;
}

/// What a file of golden/open holds for every model.
struct golden_model {
  std::string name;
  golden_json config;
  golden_json extra;
  index_t tokens = 0;
  index_t hidden_size = 0;
  index_t experts = 0;  ///< rows of the gate
  index_t k = 0;
  std::vector<float> hidden;       ///< [T, d]
  std::vector<float> gate_weight;  ///< [E, d]
  std::vector<float> gate_bias;    ///< [E], or empty
  std::vector<float> logits;       ///< [T, E]
  std::vector<float> correction_bias;
  std::vector<expert_id> ids;  ///< [T, k]
  std::vector<float> weights;  ///< [T, k]
  bool ordered = false;        ///< ids are in descending order
  std::vector<bool> exact;     ///< of each token: logits must match bit for bit
  std::vector<bool> tie, order_tie, denormal;
  std::vector<float> margin;
};

inline golden_model read_golden_model(const std::string& model) {
  const golden_json j = read_golden("open/" + model + ".json");
  golden_model m;
  m.name = model;
  m.config = j.at("config");
  m.extra = j.at("extra");
  m.tokens = j.at("tokens").get<index_t>();
  m.hidden_size = j.at("hidden_size").get<index_t>();
  m.experts = j.at("shapes").at("gate_weight").at(0).get<index_t>();
  m.k = j.at("k").get<index_t>();
  m.hidden = golden_floats(j.at("hidden"));
  m.gate_weight = golden_floats(j.at("gate_weight"));
  m.gate_bias = golden_floats(j.at("gate_bias"));
  m.logits = golden_floats(j.at("logits"));
  m.correction_bias = golden_floats(j.at("correction_bias"));
  for (const golden_json& row : j.at("ids"))
    for (const golden_json& id : row) m.ids.push_back(id.get<expert_id>());
  for (const golden_json& row : j.at("weights"))
    for (const golden_json& weight : row) m.weights.push_back(golden_float(weight));
  m.ordered = j.at("order").get<std::string>().starts_with("descending");
  // Probes have dyadic values like the exact tokens; only the generic ones do not.
  for (const golden_json& tag : j.at("token_tags")) m.exact.push_back(tag != "generic");
  m.tie = j.at("tie").get<std::vector<bool>>();
  m.order_tie = j.at("order_tie").get<std::vector<bool>>();
  m.denormal = j.at("weights_denormal").get<std::vector<bool>>();
  m.margin = golden_floats(j.at("margin_rel"));
  return m;
}

/// Choices of one token as they were compared: expert and weight.
using golden_choices = std::vector<std::pair<expert_id, float>>;

namespace detail {

inline std::string weight_difference(const golden_choices& got, const golden_choices& expected,
                                     bool denormal) {
  for (std::size_t r = 0; r < got.size(); ++r) {
    const double x = static_cast<double>(got[r].second),
                 y = static_cast<double>(expected[r].second);
    const bool flushed = denormal && std::abs(x) < 1.2e-38 && std::abs(y) < 1.2e-38;
    if (!flushed && !(std::abs(x - y) <= 3e-6 * std::abs(y)))
      return "rank " + std::to_string(r) + ": weight " + shown(x) + ", expected " + shown(y);
  }
  return "";
}

}  // namespace detail

/// ids and weights [T, k] against the file's, by its rules; empty where they agree.
inline std::string golden_difference(const golden_model& m, const std::vector<expert_id>& ids,
                                     const std::vector<float>& weights) {
  if (ids.size() != m.ids.size() || weights.size() != m.weights.size())
    return m.name + ": " + std::to_string(ids.size()) + " ids and " +
           std::to_string(weights.size()) + " weights, expected " + std::to_string(m.ids.size());
  for (index_t t = 0; t < m.tokens; ++t) {
    const auto token = static_cast<std::size_t>(t);
    golden_choices got, expected;
    for (index_t i = t * m.k; i < (t + 1) * m.k; ++i) {
      const auto at = static_cast<std::size_t>(i);
      got.emplace_back(ids[at], weights[at]);
      expected.emplace_back(m.ids[at], m.weights[at]);
    }
    // A margin of -1 says that there is no boundary to be near.
    const bool decided = !m.tie[token] && (m.margin[token] < 0.0f || m.margin[token] >= 1e-6f);
    // Which of two equal experts is chosen shows in the weight only where something is per expert.
    const bool moved = m.config.at("bias") != "none" || m.config.at("groups") != 1 ||
                       m.config.contains("per_expert_scale");
    if (!decided && moved) continue;
    const auto by_weight = [](const auto& a, const auto& b) { return a.second > b.second; };
    if (!decided) {
      std::stable_sort(got.begin(), got.end(), by_weight);
      std::stable_sort(expected.begin(), expected.end(), by_weight);
    } else if (!m.ordered || m.order_tie[token]) {
      std::sort(got.begin(), got.end());
      std::sort(expected.begin(), expected.end());
    }
    std::string broken;
    for (std::size_t r = 0; decided && r < got.size() && broken.empty(); ++r)
      if (got[r].first != expected[r].first)
        broken = "rank " + std::to_string(r) + ": expert " + std::to_string(got[r].first) +
                 ", expected " + std::to_string(expected[r].first);
    if (broken.empty()) broken = detail::weight_difference(got, expected, m.denormal[token]);
    if (!broken.empty())
      return "golden/open/" + m.name + ".json, token " + std::to_string(t) + ", " + broken;
  }
  return "";
}

}  // namespace test
