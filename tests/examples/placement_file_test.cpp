#include "support/placement_file_app.hpp"
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

namespace placement_file_test {

using example::json;

namespace {

// "" where what the vectors say is what was answered: whole numbers exactly, others to 1e-9.
std::string difference(const json& got, const json& want, const std::string& where) {
  if (want.is_object()) {
    for (const auto& [key, value] : want.items()) {
      if (!got.contains(key)) return where + "/" + key + " is missing";
      if (const std::string d = difference(got[key], value, where + "/" + key); !d.empty())
        return d;
    }
    return "";
  }
  if (want.is_array()) {
    if (!got.is_array() || got.size() != want.size()) return where + " has another length";
    for (std::size_t i = 0; i < want.size(); ++i)
      if (const std::string d = difference(got[i], want[i], where + "/" + std::to_string(i));
          !d.empty())
        return d;
    return "";
  }
  if (want.is_number() && got.is_number()) {
    const double a = got.get<double>(), b = want.get<double>();
    return std::abs(a - b) <= 1e-9 * (1.0 + std::abs(b))
               ? ""
               : where + " is " + got.dump() + ", expected " + want.dump();
  }
  return got == want ? "" : where + " is " + got.dump() + ", expected " + want.dump();
}

}  // namespace

TEST_CASE("placement_file answers every case of the vectors from its input alone") {
  // What only brute force knows, and a split that is one of several.
  const std::set<std::string> aside{"optimum_max", "optimum_cost", "optimum", "one_split",
                                    "rank_load"};
  int cases = 0;
  for (const std::string name :
       {"affinity", "distinct", "eplb", "exact_balance", "exchange", "failover", "llep", "refine",
        "replan", "shadow", "split", "two_level"}) {
    std::ifstream in(std::string(MOEROUTE_TEST_DATA "/golden/placement/") + name + ".json");
    const json file = json::parse(in);
    json asked{{"cases", json::array()}};
    for (const json& one : file["cases"])
      asked["cases"].push_back({{"name", one["name"]}, {"input", one["input"]}});
    const json answers = example::answer_placement_file(asked);
    REQUIRE(answers["cases"].size() == file["cases"].size());
    for (std::size_t i = 0; i < file["cases"].size(); ++i, ++cases) {
      json want = file["cases"][i]["output"];
      if (name != "eplb")
        for (const std::string& key : aside) want.erase(key);
      CHECK(difference(answers["cases"][i]["output"], want,
                       name + "/" + file["cases"][i]["name"].get<std::string>()) == "");
    }
  }
  CHECK(cases == 52);
}

TEST_CASE("placement_file names file, case and field of bad input, and writes nothing else") {
  const auto said = [](const std::string& input) {
    const json file{{"cases", {{{"name", "mine"}, {"input", json::parse(input)}}}}};
    try {
      return example::answer_placement_file(file).dump();
    } catch (const example::input_error& e) {
      return std::string(e.what());
    }
  };
  CHECK(said(R"({"weight":[1,2,-3],"slots":6,"ranks":3})") ==
        "case mine: moeroute::search_placement: the load of expert 2 is -3.000000, expected a "
        "finite number >= 0");
  CHECK(said(R"({"weight":[1,2,3],"slots":2,"ranks":2})") ==
        "case mine: moeroute::search_placement: slots is 2, expected 3 to 2147483647");
  CHECK(said(R"({"weight":"x","slots":2,"ranks":2})") ==
        "case mine: field 'weight' has another type than expected");
  CHECK(said(R"({"weight":[1],"slots":2.5,"ranks":2})") ==
        "case mine: field 'slots': expected whole numbers");
  CHECK(said(R"({"weight":[1],"slots":18446744073709551615,"ranks":2})")
            .find("is more than any size here") != std::string::npos);
  CHECK(said(R"({"color":1})") == "case mine: its input is of no planner that is known");
  CHECK(said(R"({"expert_of_slot":[0,9],"ranks":2,"alive":[1,1],"experts":2})") ==
        "case mine: moeroute::placement: the expert of slot 1 is 9, expected -1 to 1");
  CHECK(said(R"({"rule":"nearest","slots":[7],"slots_per_rank":2,"node_of_rank":[0,0]})") ==
        "case mine: field 'slots': 7 is no slot of 4");
  std::ostringstream out, err;
  const char* words[] = {"placement_file", "/nonexistent/in.json"};
  CHECK(example::run_placement_file(2, words, out, err) == 2);
  CHECK(out.str().empty());
  CHECK(err.str().find("placement_file: /nonexistent/in.json") == 0);
}

}  // namespace placement_file_test
