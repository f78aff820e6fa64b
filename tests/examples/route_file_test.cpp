// The program as a person runs it: what it writes, what it says about bad input, and its exit code.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "support/golden.hpp"
#include "support/golden_config.hpp"

namespace route_file_test {

using example::float_json;

namespace {

struct run_result {
  int code;
  std::string out, err;
};

const std::filesystem::path folder =
    std::filesystem::temp_directory_path() / ("moeroute_route_file_" + std::to_string(getpid()));

std::string slurp(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Runs route_file with these words of a shell.
run_result run(const std::string& words) {
  std::filesystem::create_directories(folder);
  const auto out = folder / "out", err = folder / "err";
  const std::string command =
      "'" MOEROUTE_ROUTE_FILE "' " + words + " >'" + out.string() + "' 2>'" + err.string() + "'";
  const int status = std::system(command.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, slurp(out), slurp(err)};
}

std::string golden_path(const std::string& model) {
  return MOEROUTE_TEST_DATA "/golden/open/" + model + ".json";
}

// A file of that name in the scratch folder; its path.
std::string written(const std::string& name, const std::string& content) {
  std::filesystem::create_directories(folder);
  std::ofstream(folder / name, std::ios::binary) << content;
  return (folder / name).string();
}

run_result run_on(const float_json& document, const std::string& options = "") {
  return run("'" + written("in.json", document.dump()) + "' " + options);
}

float_json golden(const std::string& model) { return test::read_golden("open/" + model + ".json"); }

// The inputs of routing alone.
float_json inputs_of(const std::string& model) {
  const float_json all = golden(model);
  float_json in;
  for (const char* key : {"tokens", "experts", "k", "logits", "config", "correction_bias", "extra"})
    in[key] = all.at(key);
  return in;
}

std::string npy(const std::vector<float>& values, std::size_t rows, std::size_t columns) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" +
                       std::to_string(rows) + ", " + std::to_string(columns) + "), }";
  header.resize(118 - 1, ' ');
  header += "\n";
  std::string file = std::string("\x93NUMPY\x01\x00", 8) + static_cast<char>(header.size()) + '\0';
  return file + header +
         std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::vector<std::string> open_models() {
  std::vector<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(MOEROUTE_TEST_DATA "/golden/open"))
    names.push_back(file.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

// One line, exit code 2, nothing on stdout, and these words in the line.
void refuses(const run_result& r, const std::string& words) {
  INFO(r.err);
  CHECK(r.code == 2);
  CHECK(r.out.empty());
  CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
  CHECK(r.err.find(words) != std::string::npos);
}

}  // namespace

TEST_CASE("route_file reproduces ids and weights of every open golden file from its inputs alone") {
  const auto model = GENERATE(from_range(open_models()));
  // The copy is printed anew: inputs survive the nine digits of their text.
  const run_result r = run_on(inputs_of(model));
  CHECK(r.err.empty());
  REQUIRE(r.code == 0);
  const float_json made = float_json::parse(r.out);
  CHECK(made.size() == 2);
  std::vector<test::expert_id> ids;
  for (const float_json& row : made.at("ids"))
    for (const float_json& id : row) ids.push_back(id.get<test::expert_id>());
  std::vector<float> weights;
  for (const float_json& row : made.at("weights"))
    for (const float_json& weight : row) weights.push_back(weight.get<float>());
  CHECK(test::golden_difference(test::read_golden_model(model), ids, weights) == "");
}

TEST_CASE("logits as .npy with a spec file are routed like those of the golden file") {
  const std::string model =
      GENERATE("deepseek_v3", "gemma4", "deepseek_v4_hash", "doge", "mixtral");
  const float_json in = inputs_of(model);
  float_json spec = in;
  spec.erase("logits");
  if (model == "mixtral") {  // the vocabulary directly beside experts and k
    spec = in.at("config");
    spec["experts"] = in.at("experts");
    spec["k"] = in.at("k");
  }
  const std::vector<float> logits = test::golden_floats(in.at("logits"));
  const auto tokens = in.at("tokens").get<std::size_t>();
  const std::string file = written("in.npy", npy(logits, tokens, logits.size() / tokens));
  const run_result r = run("'" + file + "' --spec '" + written("spec.json", spec.dump()) + "'");
  CHECK(r.err.empty());
  CHECK(r.code == 0);
  CHECK(r.out == run("'" + golden_path(model) + "'").out);
}

TEST_CASE("--k chooses more or fewer, a prefix where the weights are raw") {
  const auto few = float_json::parse(run("'" + golden_path("olmoe") + "' --k 3").out);
  const auto many = float_json::parse(run("'" + golden_path("olmoe") + "' --k=64").out);
  for (std::size_t t = 0; t < few.at("ids").size(); ++t) {
    REQUIRE(few.at("ids")[t].size() == 3);
    REQUIRE(many.at("ids")[t].size() == 64);
    for (std::size_t r = 0; r < 3; ++r) {
      CHECK(few.at("ids")[t][r] == many.at("ids")[t][r]);
      CHECK(few.at("weights")[t][r] == many.at("weights")[t][r]);
    }
  }
}

TEST_CASE("a masked token has no choices, the others are as without the mask") {
  const auto plain = float_json::parse(run("'" + golden_path("mixtral") + "'").out);
  std::string list = "0";
  for (int t = 1; t < 20; ++t) list += t % 3 == 0 ? ",0" : ",1";
  const std::string file = written("mask.txt", "[" + list + "]\n");
  for (const std::string& mask : {list, file}) {
    const auto masked =
        float_json::parse(run("'" + golden_path("mixtral") + "' --mask '" + mask + "'").out);
    for (std::size_t t = 0; t < 20; ++t) {
      CHECK(masked.at("ids")[t] == (t % 3 == 0 ? float_json{-1, -1} : plain.at("ids")[t]));
      CHECK(masked.at("weights")[t] == (t % 3 == 0 ? float_json{0, 0} : plain.at("weights")[t]));
    }
  }
}

TEST_CASE(
    "picks that cannot be made are -1 with weight 0; NaN counts as -inf; no tokens, no rows") {
  float_json in = {{"tokens", 2}, {"experts", 3}, {"k", 2}, {"config", {{"normalize", "sum"}}}};
  in["logits"] = {"nan", 1.5f, "-inf", "-inf", "nan", "-inf"};
  CHECK(run_on(in).out == "{\"ids\": [[1, -1], [-1, -1]],\n \"weights\": [[1, 0], [0, 0]]}\n");
  in["tokens"] = 0;
  in["logits"] = float_json::array();
  CHECK(run_on(in).out == "{\"ids\": [],\n \"weights\": []}\n");
}

TEST_CASE("remarks are ignored, and so is what is not an input of routing") {
  float_json in = inputs_of("mixtral");
  const std::string plain = run_on(in).out;
  in["remarks"] = {{"score", "no router has this"}};
  in["ids"] = "not looked at";
  in["weights"] = 7;
  in["own_notes"] = {1, 2};
  CHECK(run_on(in).out == plain);
}

TEST_CASE("an unknown key or value of config is refused by name") {
  const auto with = [](const char* key, const float_json& value) {
    float_json in = inputs_of("deepseek_v3");
    in["config"][key] = value;
    return run_on(in);
  };
  refuses(with("temprature", 1), "unknown key 'temprature'");
  refuses(with("score", "gelu"), "field 'score': expected softmax, sigmoid, sqrtsoftplus");
  refuses(with("score_domain", "some"), "field 'score_domain'");
  refuses(with("selection", "top_j"), "found 'top_j'");
  refuses(with("bias", "both"), "field 'bias': expected none, selection, found 'both'");
  refuses(with("group_score", "mean"), "field 'group_score'");
  refuses(with("group_fill", 1), "field 'group_fill': expected \"-inf\" or 0, found 1");
  refuses(with("normalize", "max"), "field 'normalize'");
  refuses(with("eps_mode", "sub"), "field 'eps_mode'");
  refuses(with("scale_where", "input"), "field 'scale_where'");
  refuses(with("weight_on", "both"), "field 'weight_on'");
  refuses(with("drop_order", "random"), "capacity clashes with drop_order");
}

TEST_CASE("wrong sizes and values are refused with the field and both values") {
  const auto with = [](const char* key, const float_json& value) {
    float_json in = inputs_of("deepseek_v3");
    in[key] = value;
    return run_on(in);
  };
  const auto configured = [](const char* key, const float_json& value) {
    float_json in = inputs_of("deepseek_v3");
    in["config"][key] = value;
    return run_on(in);
  };
  refuses(with("k", 257), "field 'k': expected an integer from 1 to 256, found 257");
  refuses(with("k", 0), "field 'k': expected an integer from 1 to 256, found 0");
  refuses(with("tokens", 19),
          "field 'logits': expected 4864 values (tokens 19 x columns 256), found 5120");
  refuses(with("correction_bias", nullptr),
          "field 'correction_bias': expected an array, found null");
  float_json bias = inputs_of("deepseek_v3").at("correction_bias");
  bias[7] = "nan";
  refuses(with("correction_bias", bias), "value 7 is nan");
  bias.erase(7);
  refuses(with("correction_bias", bias), "expected 256 values (one per expert), found 255");
  refuses(configured("groups", 7), "groups is 7, expected a divisor of E = 256");
  refuses(configured("topk_group", 9), "field 'topk_group': expected an integer from 1 to 8");
  refuses(configured("groups", 256),
          "topk_group is 4 groups of 1 experts, expected room for k = 8");
  refuses(configured("eps", -1), "field 'eps': expected a number from 0 on, found -1");
  refuses(configured("capacity", 0), "field 'capacity'");
}

TEST_CASE("tables with ids out of range or twice, and token ids outside them, are refused") {
  const auto with = [](const char* key, std::size_t at, int value) {
    float_json in = inputs_of("deepseek_v4_hash");
    in["extra"][key][at] = value;
    return run_on(in);
  };
  refuses(with("tid2eid", 3, 256), "field 'tid2eid': expected integers from -1 to 255, found 256");
  const int first = inputs_of("deepseek_v4_hash").at("extra").at("tid2eid")[0].get<int>();
  refuses(with("tid2eid", 1, first), "twice, expected distinct experts");
  refuses(with("input_ids", 0, 64), "field 'input_ids': expected integers from 0 to 63, found 64");
}

TEST_CASE("the id of a masked token is not looked at") {
  const std::string padded = written("padded.json", R"({"experts": 6, "k": 2, "tokens": 3,
      "config": {"score": "sqrtsoftplus", "selection": "hash_table", "normalize": "sum"},
      "logits": [0.5, 1.25, -0.75, 2, 0, -1, 1, 0, 0.5, -0.25, 1.5, 2, 0, 0, 0, 0, 0, 0],
      "extra": {"tid2eid": [[0, 1], [2, 3], [4, 5], [1, 3]], "input_ids": [3, 0, -1]}})");
  const run_result r = run("'" + padded + "' --mask 1,1,0");
  CHECK(r.code == 0);
  CHECK(float_json::parse(r.out).at("ids") == float_json::parse("[[1, 3], [0, 1], [-1, -1]]"));
  refuses(run("'" + padded + "'"), "field 'input_ids': expected integers from 0 to 3, found -1");
}

TEST_CASE("files that are none, and words that make no command line, are refused") {
  refuses(run("'" + written("in.json", "{\"tokens\": ") + "'"), "expected JSON text");
  refuses(run("'" + written("in.json", "[]") + "'"), "expected a JSON object");
  refuses(run("/no/such/file.json"), "/no/such/file.json: no such file");
  refuses(run(""), "expected a file");
  const std::string file = "'" + golden_path("mixtral") + "' ";
  refuses(run(file + "--k 9"), "--k: expected an integer from 1 to 8");
  refuses(run(file + "--k two"), "--k: expected an integer, found 'two'");
  refuses(run(file + "--mask 1,0"), "--mask: expected 20 values (tokens), found 2");
  refuses(run(file + "--unknown"), "unknown");
  refuses(run(file + "--spec x.json"), "--spec: expected with .npy logits only");
  refuses(run("'" + written("in.npy", npy({1, 2, 3, 4}, 2, 2)) + "'"), "--spec: expected");
}

}  // namespace route_file_test
