// The conformance kit: every mistake that it knows is recognised, whoever makes it, and files that
// are broken say where.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../../conformance/own.hpp"

namespace {

using namespace conformance;

std::vector<kit_file> read_all() {
  std::vector<std::string> paths;
  for (const auto& entry : std::filesystem::directory_iterator(MOEROUTE_CONFORMANCE_KIT "/cases"))
    paths.push_back(entry.path().string());
  std::sort(paths.begin(), paths.end());
  std::vector<kit_file> kits;
  for (const std::string& path : paths) kits.push_back(read_kit(path));
  return kits;
}

const std::vector<kit_file>& all_kits() {
  static const std::vector<kit_file> kits = read_all();
  return kits;
}

const kit_file& kit_named(const std::string& model) {
  for (const kit_file& kit : all_kits())
    if (kit.model == model) return kit;
  FAIL(model << " is not in the kit");
  std::abort();
}

std::vector<answer> right_answers(const kit_file& kit) {
  std::vector<answer> out;
  for (const kit_case& c : kit.cases) out.insert(out.end(), c.answers.begin(), c.answers.end());
  return out;
}

std::vector<answer> planted(const kit_file& kit, const std::string& mistake) {
  std::vector<answer> out = right_answers(kit);
  std::size_t first = 0;
  for (const kit_case& c : kit.cases) {
    if (const auto of = c.mistaken.find(mistake); of != c.mistaken.end())
      for (const auto& [t, a] : of->second) out[first + t] = a;
    first += c.tokens();
  }
  return out;
}

std::set<std::string> names(const judgement& found) {
  std::set<std::string> out;
  for (const suspect& s : found.recognised()) out.insert(s.name);
  return out;
}

std::string refusal(const std::string& text) {
  std::istringstream in(text);
  try {
    read_kit(in, "x.jsonl");
  } catch (const malformed& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("the right answers and those of the library agree with every case of the kit") {
  std::set<std::string> without_words;
  CHECK(all_kits().size() > 150);
  for (const kit_file& kit : all_kits()) {
    INFO(kit.model);
    CHECK(judge(kit, right_answers(kit)).wrongs.empty());
    if (in_library(kit))
      CHECK(judge(kit, own_answers(kit)).wrongs.empty());
    else
      without_words.insert(kit.model.substr(0, kit.model.find('.')));
  }
  // The few rules with words that the compiled library does not have.
  CHECK(without_words.size() < all_kits().size() / 10);
}

TEST_CASE("an engine with one mistake is told its name, wherever the mistake shows") {
  std::set<std::string> known, alone, shown_by_ids;
  for (const kit_file& kit : all_kits())
    for (const auto& [mistake, sentence] : kit.mistakes) {
      INFO(kit.model << ", " << mistake);
      const std::set<std::string> told = names(judge(kit, planted(kit, mistake)));
      CHECK(told.contains(mistake));
      // By ids alone it may not show; where it does, what it makes of weights does not hide it.
      const judgement by_ids = judge(kit, planted(kit, mistake), {.ids_only = true});
      CHECK((by_ids.wrongs.empty() || names(by_ids).contains(mistake)));
      if (!by_ids.wrongs.empty()) shown_by_ids.insert(mistake);
      known.insert(mistake);
      if (told.size() == 1) alone.insert(mistake);
    }
  CHECK(known.size() == 29);
  CHECK(alone == known);
  CHECK(shown_by_ids.size() > 10);
}

TEST_CASE("mistakes that the library itself is made to make are recognised") {
  struct planting {
    std::string model, mistake;
    std::function<void(moeroute_spec&)> change{};
    std::function<void(answer&)> after{};
  };
  const std::vector<planting> plantings{
      {"deepseek_v3", "eps_missing", [](auto& s) { s.eps_mode = MOEROUTE_EPS_NONE, s.eps = 0; }},
      {"deepseek_v3", "groups_by_maximum", [](auto& s) { s.group_score = MOEROUTE_GROUP_MAX; }},
      {"deepseek_v3", "groups_ignored", [](auto& s) { s.groups = s.topk_group = 1; }},
      {"deepseek_v3", "raw_weights", [](auto& s) { s.normalize = MOEROUTE_NORMALIZE_NONE; }},
      {"deepseek_v3", "scale_twice", [](auto& s) { s.scale *= s.scale; }},
      {"deepseek_v3", "scale_missing", [](auto& s) { s.scale = 1; }},
      {"deepseek_v3", "bias_ignored", [](auto& s) { s.selection_bias = 0; }},
      {"deepseek_v3", "softmax_for_sigmoid", [](auto& s) { s.score = MOEROUTE_SOFTMAX; }},
      {"deepseek_v2", "groups_by_two", [](auto& s) { s.group_score = MOEROUTE_GROUP_TOP2_SUM; }},
      {"deepseek_v4", "eps_missing", [](auto& s) { s.eps_mode = MOEROUTE_EPS_NONE, s.eps = 0; }},
      {"mixtral", "raw_weights", [](auto& s) { s.normalize = MOEROUTE_NORMALIZE_NONE; }},
      {"mixtral", "sigmoid_for_softmax", [](auto& s) { s.score = MOEROUTE_SIGMOID; }},
      {"gpt_oss", "softmax_over_all", [](auto& s) { s.score_selected = 0; }},
      {"olmoe", "softmax_over_selected", [](auto& s) { s.score_selected = 1; }},
      {"gemma4", "expert_scale_missing", [](auto& s) { s.per_expert_scale = 0; }},
      {"grok1", "softcap_missing", [](auto& s) { s.softcap = 0; }},
      {"qwen3_next",
       "ids_of_8_bits",
       {},
       [](answer& a) {
         for (auto& id : a.ids) id = id < 0 ? id : id & 0xff;
       }},
      {"mixtral",
       "worst_first",
       {},
       [](answer& a) {
         std::reverse(a.ids.begin(), a.ids.end());
         std::reverse(a.weights.begin(), a.weights.end());
       }},
  };
  for (const planting& p : plantings) {
    INFO(p.model << ", " << p.mistake);
    const kit_file& kit = kit_named(p.model);
    std::vector<answer> answers = own_answers(kit, p.change);
    for (answer& a : answers)
      if (p.after) p.after(a);
    const judgement found = judge(kit, answers);
    CHECK(!found.wrongs.empty());
    CHECK(names(found).contains(p.mistake));
  }
}

TEST_CASE("the higher id wins for an engine that sees its experts backwards, and is told so") {
  for (const std::string model : {"mixtral", "qwen3_moe", "gpt_oss"}) {
    INFO(model);
    kit_file backwards = kit_named(model);
    for (kit_case& c : backwards.cases)
      for (auto& row : c.logits) std::reverse(row.begin(), row.end());
    std::vector<answer> answers = own_answers(backwards);
    for (answer& a : answers)
      for (auto& id : a.ids) id = id < 0 ? id : backwards.experts - 1 - id;
    CHECK(names(judge(kit_named(model), answers)) == std::set<std::string>{"higher_id"});
  }
}

TEST_CASE("two mistakes at once are known in part, and noise is not known at all") {
  const kit_file& kit = kit_named("deepseek_v3");
  std::vector<answer> both = planted(kit, "nan_is_largest");
  const std::vector<answer> other = planted(kit, "mask_ignored"), right = right_answers(kit);
  for (std::size_t t = 0; t < both.size(); ++t)
    if (!difference(kit, other[t], right[t], {}).empty()) both[t] = other[t];
  const judgement found = judge(kit, both);
  CHECK(found.recognised().empty());
  REQUIRE(found.suspects.size() >= 2);
  std::set<std::string> part;
  for (const suspect& s : found.suspects)
    if (s.contradicts == 0) part.insert(s.name);
  CHECK(part.contains("nan_is_largest"));
  CHECK(part.contains("mask_ignored"));

  std::vector<answer> noise = right;
  for (answer& a : noise)
    for (float& w : a.weights) w += 0.37f;
  CHECK(judge(kit, noise).suspects.empty());
}

TEST_CASE("ranks in any order and ids alone can be asked for") {
  const kit_file& kit = kit_named("mixtral");
  std::vector<answer> answers = right_answers(kit);
  for (answer& a : answers) {
    std::reverse(a.ids.begin(), a.ids.end());
    std::reverse(a.weights.begin(), a.weights.end());
  }
  CHECK(!judge(kit, answers).wrongs.empty());
  CHECK(judge(kit, answers, {.unordered = true}).wrongs.empty());
  for (answer& a : answers) a.weights[0] += 1;
  CHECK(!judge(kit, answers, {.unordered = true}).wrongs.empty());
  CHECK(judge(kit, answers, {.unordered = true, .ids_only = true}).wrongs.empty());
}

TEST_CASE("a malformed file is refused by line and field") {
  const std::string first =
      R"({"format":"moeroute-conformance","version":1,"model":"m","rule":"E=3 k=2","experts":3,"columns":3,"k":2,"relative":1e-6,"absolute":0,"mistakes":{"higher_id":"x"}})"
      "\n";
  const std::string second =
      R"({"case":"c","reason":"r","logits":[[1,2,"nan"]],"ids":[[1,0]],"weights":[[0.7,0.3]],"mistakes":{"higher_id":{"tokens":[0],"ids":[[0,1]],"weights":[[0.3,0.7]]}}})"
      "\n";
  CHECK(refusal(first + second).empty());
  const auto changed = [](std::string text, const std::string& from, const std::string& to) {
    return text.replace(text.find(from), from.size(), to);
  };
  const auto of_first = [&](const std::string& from, const std::string& to) {
    return refusal(changed(first, from, to) + second);
  };
  const auto of_second = [&](const std::string& from, const std::string& to) {
    return refusal(first + changed(second, from, to));
  };
  CHECK(refusal("") == "x.jsonl:1: format: is missing");
  CHECK(refusal(first + second + "{\n") == "x.jsonl:3: column 2: this is no JSON");
  CHECK(refusal(first + "[]\n") == "x.jsonl:2: the line: is no JSON object");
  CHECK(of_first(R"("version":1)", R"("version":2)") ==
        "x.jsonl:1: version: is 2, expected 1 to 1");
  CHECK(of_first("moeroute-conformance", "other") ==
        "x.jsonl:1: format: is 'other', expected 'moeroute-conformance'");
  CHECK(of_first(R"("k":2)", R"("k":4)") == "x.jsonl:1: k: is 4, expected 1 to 3");
  CHECK(of_first(R"("columns":3)", R"("columns":3.5)") ==
        "x.jsonl:1: columns: is 3.5, expected a whole number");
  CHECK(of_first(R"("relative":1e-6,)", "") == "x.jsonl:1: relative: is missing");
  CHECK(of_second(R"([1,2,"nan"])", "[1,2]") == "x.jsonl:2: logits[0]: has 2 values, expected 3");
  CHECK(of_second(R"("nan")", R"("many")") ==
        R"(x.jsonl:2: logits[0][2]: is "many", expected a number, "nan", "inf" or "-inf")");
  CHECK(of_second("[[1,0]]", "[[1,3]]") == "x.jsonl:2: ids: 3 is no expert of 3");
  CHECK(of_second("[[1,0]]", "[[1,0.5]]") ==
        "x.jsonl:2: ids[0][1]: is 0.5, expected a whole number");
  CHECK(of_second("[[0.7,0.3]]", "[]") == "x.jsonl:2: weights: has 0 values, expected 1");
  CHECK(of_second(R"("higher_id")", R"("lower_id")") ==
        "x.jsonl:2: mistakes: 'lower_id' is not in the first line");
  CHECK(of_second(R"("tokens":[0])", R"("tokens":[7])") ==
        "x.jsonl:2: mistakes.higher_id.tokens: 7 is no token of the case");
  CHECK(of_second(R"("reason":"r",)", "") == "x.jsonl:2: reason: is missing");

  std::istringstream whole(first + second);
  const kit_file kit = read_kit(whole, "x.jsonl");
  const auto answers = [&](const std::string& text) -> std::string {
    std::istringstream in(text);
    try {
      read_answers(in, "answers", kit);
    } catch (const malformed& e) {
      return e.what();
    }
    return "";
  };
  const std::string line = R"({"ids":[1,0],"weights":[0.7,0.3]})"
                           "\n";
  CHECK(answers(line).empty());
  CHECK(answers("") == "answers:1: ids: is missing, m has 1 tokens");
  CHECK(answers(line + line) == "answers:2: the line: is one too many, m has 1 tokens");
  CHECK(answers(R"({"ids":[1],"weights":[0.7,0.3]})") ==
        "answers:1: ids: has 1 values, expected 2");
}

TEST_CASE("the arrays hold the tokens of the cases, and arrays that do not fit are refused") {
  for (const std::string model : {"mixtral", "deepseek_v3", "deepseek_v4_hash"}) {
    INFO(model);
    const std::string folder = MOEROUTE_CONFORMANCE_KIT "/npy/" + model + "/";
    const kit_file& kit = kit_named(model);
    CHECK(judge(kit, read_answers(folder + "ids.npy", folder + "weights.npy", kit)).wrongs.empty());
    const npy_matrix logits = read_npy(folder + "logits.npy");
    CHECK(logits.shape ==
          std::vector<std::size_t>{kit.tokens(), static_cast<std::size_t>(kit.columns)});
  }
  const std::string ids = MOEROUTE_CONFORMANCE_KIT "/npy/mixtral/ids.npy";
  const auto refused = [](const std::function<void()>& f) -> std::string {
    try {
      f();
    } catch (const malformed& e) {
      return std::string(e.what()).substr(std::string(e.what()).rfind(".npy") + 4);
    }
    return "";
  };
  CHECK(refused([&] {
          read_answers(ids, ids, kit_named("deepseek_v3"));
        }).starts_with(":1: shape: is ("));
  const std::string cut = "cut.npy";
  std::ifstream in(ids, std::ios::binary);
  std::string bytes{std::istreambuf_iterator<char>(in), {}};
  const auto write = [&](const std::string& text) { std::ofstream(cut, std::ios::binary) << text; };
  write(bytes.substr(0, 20));
  CHECK(refused([&] { read_npy(cut); }) == ":1: header: is cut off");
  write(bytes.substr(0, bytes.size() - 1));
  CHECK(refused([&] { read_npy(cut); }) == ":1: shape: does not fit the file's size");
  write("PK");
  CHECK_THROWS_AS(read_npy(cut), malformed);
  std::filesystem::remove(cut);
}
