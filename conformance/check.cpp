// Says which cases of the conformance kit an engine fails, and which known mistake that looks like.
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>
#include <vector>

#include "kit.hpp"
#include "own.hpp"

namespace {

using namespace conformance;

constexpr const char* usage =
    "usage: moeroute-conformance [--unordered] [--ids-only] CASES.jsonl < ANSWERS\n"
    "       moeroute-conformance [--unordered] [--ids-only] CASES.jsonl --ids I.npy --weights "
    "W.npy\n"
    "       moeroute-conformance --own CASES.jsonl...\n"
    "       moeroute-conformance --answers [MISTAKE] CASES.jsonl\n"
    "\n"
    "ANSWERS has a line {\"ids\": [k], \"weights\": [k]} for each token of the cases, in their "
    "order;\n"
    "I.npy and W.npy hold the same as arrays [T, k]. --unordered: ranks may stand in any order.\n"
    "--ids-only: weights are not looked at. --own: the answers of the compiled library itself.\n"
    "--answers: writes the right answers, or those of an engine with that mistake.\n"
    "Exit code: 0 where all agree, 1 where some differ, 2 where a file is malformed.\n";

// The report; the program in Python prints the same.
int report(const kit_file& kit, const judgement& found) {
  std::printf("%s: %zu of %zu tokens differ\n", kit.model.c_str(), found.wrongs.size(),
              found.tokens);
  for (std::size_t c = 0; c < kit.cases.size(); ++c) {
    std::size_t differ = 0;
    const judgement::wrong* first = nullptr;
    for (const judgement::wrong& w : found.wrongs)
      if (w.in_case == c && ++differ == 1) first = &w;
    if (first == nullptr) continue;
    std::printf("  %s: %zu of %zu: token %zu: %s\n    (%s)\n", kit.cases[c].name.c_str(), differ,
                kit.cases[c].tokens(), first->token, first->what.c_str(),
                kit.cases[c].reason.c_str());
  }
  if (found.wrongs.empty()) return 0;
  const std::vector<suspect> sure = found.recognised();
  for (const suspect& s : sure)
    std::printf("  looks like %s: %s\n", s.name.c_str(), s.sentence.c_str());
  int shown = 0;
  for (const suspect& s : found.suspects)
    if (sure.empty() && ++shown <= 3)
      std::printf("  in part like %s: %s (%zu tokens are, %zu are not)\n", s.name.c_str(),
                  s.sentence.c_str(), s.explains, s.contradicts);
  if (sure.empty() && shown == 0) std::printf("  looks like no mistake that the kit knows\n");
  return 1;
}

int own(const std::vector<std::string>& files) {
  int code = 0;
  std::size_t tokens = 0, routers = 0;
  for (const std::string& file : files) {
    const kit_file kit = read_kit(file);
    if (!in_library(kit)) {
      std::printf("%s: the compiled library has no words for this rule\n", kit.model.c_str());
      continue;
    }
    const judgement found = judge(kit, own_answers(kit));
    if (!found.wrongs.empty()) code = report(kit, found);
    tokens += found.tokens;
    routers += 1;
  }
  std::printf("own answers: %zu routers, %zu tokens\n", routers, tokens);
  return code;
}

void print(const answer& a) {
  json weights = json::array();
  for (const float w : a.weights)
    if (w != w)
      weights.push_back("nan");
    else if (std::isinf(w))
      weights.push_back(w > 0 ? "inf" : "-inf");
    else
      weights.push_back(w);
  const json line = {{"ids", a.ids}, {"weights", weights}};
  std::puts(line.dump().c_str());
}

int answers(const std::string& mistake, const kit_file& kit) {
  bool known = mistake.empty();
  for (const auto& [name, sentence] : kit.mistakes) known = known || name == mistake;
  if (!known) {
    std::fprintf(stderr, "moeroute-conformance: %s has no token that shows '%s'\n",
                 kit.model.c_str(), mistake.c_str());
    return 2;
  }
  for (const kit_case& c : kit.cases)
    for (std::size_t t = 0; t < c.tokens(); ++t) {
      const auto of = c.mistaken.find(mistake);
      const bool changed = of != c.mistaken.end() && of->second.contains(t);
      print(changed ? of->second.at(t) : c.answers[t]);
    }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    comparison how;
    std::string ids, weights;
    std::vector<std::string> names;
    bool of_own = false, of_answers = false;
    for (int i = 1; i < argc; ++i) {
      const std::string_view word = argv[i];
      if (word == "--unordered")
        how.unordered = true;
      else if (word == "--ids-only")
        how.ids_only = true;
      else if (word == "--own")
        of_own = true;
      else if (word == "--answers")
        of_answers = true;
      else if (word == "--ids" && i + 1 < argc)
        ids = argv[++i];
      else if (word == "--weights" && i + 1 < argc)
        weights = argv[++i];
      else if (word == "--help")
        return std::fputs(usage, stdout), 0;
      else if (word.starts_with("--"))
        return std::fputs(usage, stderr), 2;
      else
        names.emplace_back(word);
    }
    if (of_own && !names.empty()) return own(names);
    if (of_answers && (names.size() == 1 || names.size() == 2))
      return answers(names.size() == 2 ? names[0] : "", read_kit(names.back()));
    if (names.size() != 1 || ids.empty() != weights.empty()) return std::fputs(usage, stderr), 2;
    const kit_file kit = read_kit(names[0]);
    return report(kit, judge(kit,
                             ids.empty() ? read_answers(std::cin, "standard input", kit)
                                         : read_answers(ids, weights, kit),
                             how));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "moeroute-conformance: %s\n", e.what());
    return 2;
  }
}
