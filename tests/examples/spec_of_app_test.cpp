#include "support/spec_of_app.hpp"

#include "scratch_checkpoint.hpp"

#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>

namespace spec_of_app_test {

namespace {

struct run_result {
  int code;
  std::string out, err;
};

run_result run(std::initializer_list<std::string> words) {
  std::vector<const char*> list{"spec_of"};
  for (const std::string& word : words) list.push_back(word.c_str());
  std::ostringstream out, err;
  const int code = example::run_spec_of(static_cast<int>(list.size()), list.data(), out, err);
  return {code, out.str(), err.str()};
}

std::string seed(const std::string& name) { return MOEROUTE_TEST_DATA "/fuzz/corpus/" + name; }

}  // namespace

TEST_CASE("spec_of prints one line where layers are alike, one for each kind where they differ") {
  CHECK(run({example::fixture::bundled_model().string() + "/config.json"}).out ==
        "E=32 k=4 score=softmax normalize=sum\n");
  const std::string hashed =
      "score=sqrtsoftplus selection=hash_table normalize=sum "
      "eps=9.99999968e-21 eps_mode=add scale=1.5\n";
  const std::string scored =
      "score=sqrtsoftplus bias=selection normalize=sum "
      "eps=9.99999968e-21 eps_mode=add scale=1.5\n";
  const std::string v4 = seed("config/deepseek_v4.json");
  CHECK(run({v4}).out == "layers 0-1: E=64 k=6 " + hashed + "layers 2-4: E=64 k=6 " + scored);
  CHECK(run({v4, "--layer", "1"}).out == "E=64 k=6 " + hashed);
  CHECK(run({"--layer=2", v4}).out == "E=64 k=6 " + scored);
  const std::string gguf = seed("gguf/deepseek2.gguf");
  CHECK(run({gguf}).out.ends_with("scale=2.5\nlayer 0: no experts\n"));
  CHECK(run({gguf, "--layer", "0"}).out == "no experts\n");
}

TEST_CASE("spec_of ends with 2 and one line that names file and key") {
  const example::fixture::scratch_folder folder;
  const auto refused = [](const run_result& r, const std::string& words) {
    INFO(r.err);
    CHECK(r.code == 2);
    CHECK(r.out.empty());
    CHECK(r.err.find(words) != std::string::npos);
    CHECK(r.err.find('\n') == r.err.size() - 1);
  };
  const std::string odd =
      folder
          .write("odd.json", R"({"model_type": "mixtral", "num_local_experts": 8,
                                 "num_experts_per_tok": 2, "router_temperature": 2})")
          .string();
  refused(run({odd}), "odd.json: field 'router_temperature' speaks of routing");
  refused(run({seed("config/deepseek_v4.json"), "--layer", "5"}), "--layer: expected 0 to 4");
  refused(run({seed("config/deepseek_v4.json"), "--layer", "-1"}), "--layer");
  refused(run({seed("config/deepseek_v4.json"), "--layer"}), "--layer");
  refused(run({folder.path().string() + "/none.json"}), "none.json: no such file");
  refused(run({folder.write("a.json", "{\n \"a\" 1}").string()}), "a.json: line 2, column 6");
  refused(run({}), "found no file");
  refused(run({"--what"}), "unknown option '--what'");
}

}  // namespace spec_of_app_test
