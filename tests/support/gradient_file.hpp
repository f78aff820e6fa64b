// A file of tests/golden/gradients: what torch's autograd computed in float64.
#pragma once

#include <cstdint>
#include <fstream>
#include <moeroute/data/assignment.hpp>
#include <moeroute/matrix/matrix.hpp>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

using moeroute::assignment;
using moeroute::expert_id;
using moeroute::index_t;

struct gradient_file {
  nlohmann::json json;
  index_t tokens, experts;

  explicit gradient_file(const std::string& name) {
    std::ifstream in(std::string(MOEROUTE_TEST_DATA "/golden/gradients/") + name + ".json");
    if (!in) throw std::runtime_error(name + ": cannot be opened");
    json = nlohmann::json::parse(in);
    tokens = json.at("T").get<index_t>();
    experts = json.at("E").get<index_t>();
  }

  /// A field, its rows one after the other.
  std::vector<double> numbers(const std::string& field) const {
    std::vector<double> all;
    for (const auto& item : json.at(field)) {
      if (item.is_array())
        for (const auto& x : item) all.push_back(x.get<double>());
      else
        all.push_back(number(item));
    }
    return all;
  }
  std::vector<float> floats(const std::string& field) const {
    const std::vector<double> all = numbers(field);
    return {all.begin(), all.end()};
  }

  /// The choices: ids by token, tokens by expert, or the positive entries of a dense matrix.
  /// Weights are 0. `order` maps each choice to its place in the file's lists.
  assignment choices(std::vector<std::size_t>& order) const {
    std::vector<std::vector<expert_id>> ids(static_cast<std::size_t>(tokens));
    std::vector<std::vector<std::size_t>> place(ids.size());
    const auto add = [&](index_t t, index_t e, std::size_t at) {
      ids[static_cast<std::size_t>(t)].push_back(static_cast<expert_id>(e));
      place[static_cast<std::size_t>(t)].push_back(at);
    };
    if (json.contains("ids")) {
      std::size_t at = 0;
      for (index_t t = 0; t < tokens; ++t)
        for (const auto& e : json["ids"][static_cast<std::size_t>(t)])
          add(t, e.get<index_t>(), at++);
    } else if (json.contains("token_ids")) {
      const std::size_t capacity = json["capacity"];
      const std::vector<double> token = numbers("token_ids");
      for (std::size_t i = 0; i < token.size(); ++i)
        add(static_cast<index_t>(token[i]), static_cast<index_t>(i / capacity), i);
    } else {
      const std::vector<double> dense = numbers("weights_dense");
      for (std::size_t i = 0; i < dense.size(); ++i)
        if (dense[i] > 0.0)
          add(static_cast<index_t>(i) / experts, static_cast<index_t>(i) % experts, i);
    }
    assignment a;
    a.reset_ragged(tokens, experts, experts);
    const assignment::parts p = a.to_fill();
    p.offsets[0] = 0;
    order.clear();
    for (std::size_t t = 0; t < ids.size(); ++t) {
      for (std::size_t i = 0; i < ids[t].size(); ++i) {
        p.ids[order.size()] = ids[t][i];
        p.weights[order.size()] = 0.0f;
        order.push_back(place[t][i]);
      }
      p.offsets[t + 1] = static_cast<std::int32_t>(order.size());
    }
    a.close();
    return a;
  }

 private:
  static double number(const nlohmann::json& x) {
    if (!x.is_string()) return x.get<double>();
    const auto text = x.get<std::string>();
    if (text == "-inf") return -HUGE_VAL;
    if (text == "inf") return HUGE_VAL;
    return std::nan("");
  }
};

}  // namespace test
