#include "support/generate_app.hpp"

#include "model_copy.hpp"

#include <fstream>
#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

namespace generate_app_test {

using namespace example;
using namespace example::fixture;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::EndsWith;
using Catch::Matchers::StartsWith;

namespace {

std::string bundled(const std::string& variant) {
  return (bundled_model() / "variants" / variant).string();
}

/// What is printed before the figures.
std::string text_of(const outcome& found) { return found.out.substr(0, found.out.find("prefill")); }

outcome prompt_on(const model_copy& copy) {
  return run({"--model", copy.path().string(), "--prompt", "ab", "--tokens", "3"});
}

}  // namespace

TEST_CASE("a wrong call is refused with one line and exit code 2") {
  const std::string model = bundled("olmoe");
  const auto refused = [&](std::vector<std::string> words, const std::string& what) {
    const outcome found = run(words);
    INFO(what << " / " << found.code << ": " << found.err);
    CHECK(is_refusal(found, what));
  };
  refused({}, "--model: expected the folder of a model");
  refused({"--model", model}, "--prompt: expected a text to continue");
  refused({"--model", model, "--prompt", ""}, "--prompt: expected at least one token");
  refused({"--model", model, "--prompt-ids", ""}, "--prompt-ids: expected at least one token");
  refused({"--model", model, "--prompt", "a", "--prompt-ids", "1"}, "found both");
  refused({"--model", model, "--prompt-ids", "1,256"},
          "--prompt-ids: expected token ids from 0 to 255, found '256'");
  refused({"--model", model, "--prompt", "a", "--tokens", "-1"}, "--tokens: expected a number");
  refused({"--model", model, "--prompt", "a", "--tokens=-1"}, "--tokens: expected a number");
  refused({"--model", model, "--prompt", "a", "--tokens", "10x"}, "found '10x'");
  refused({"--model", model, "--prompt", "a", "--temperature", "nan"}, "--temperature");
  refused({"--model", model, "--prompt", "a", "--seed", "18446744073709551616"}, "--seed");
  refused({"--model", model, "--prompt", "a", "--threads", "0"},
          "--threads: expected a number from 1 to 256, found '0'");
  refused({"--model", model, "--promt", "a"}, "promt");
  refused({"--model", model, "--prompt", "a", "stray"}, "found 'stray'");
  refused({"--model"}, "model");
  refused({"--model", model, "--model", model, "--prompt", "a"}, "found 2 times");
  refused({"--model", model, "--prompt", std::string(129, 'a')},
          "--prompt: expected at most 128 tokens (max_position_embeddings), found 129");
}

TEST_CASE("a folder or file that is missing is refused with its name") {
  CHECK(is_refusal(run({"--model", "no/such/folder", "--prompt", "a"}),
                   "no/such/folder: expected the folder of a model, found nothing"));
  const std::string file = bundled("olmoe") + "/config.json";
  CHECK(is_refusal(run({"--model", file, "--prompt", "a"}), "found something else"));
  for (const char* name : {"config.json", "model.safetensors"}) {
    const model_copy copy;
    std::filesystem::remove(copy.path() / name);
    CHECK(is_refusal(prompt_on(copy), std::string(name) + ": no such file"));
  }
  const model_copy copy;
  std::filesystem::remove(copy.path() / "reference.json");
  CHECK(is_refusal(run({"--model", copy.path().string(), "--verify"}),
                   "reference.json: no such file"));
}

TEST_CASE("weights that do not fit the configuration are refused with the tensor's name") {
  const auto refused = [](const char* field, const json& value, const std::string& what) {
    const model_copy copy;
    copy.edit("config.json", [&](json& config) { config[field] = value; });
    const outcome found = prompt_on(copy);
    INFO(what << " / " << found.err);
    CHECK(is_refusal(found, what));
  };
  refused("hidden_size", 128,
          "tensor 'model.embed_tokens.weight': expected shape [256, 128], found [256, 64]");
  refused("num_hidden_layers", 3, "tensor 'model.layers.2.input_layernorm.weight' is missing");
  refused("num_hidden_layers", 65536, "is missing");
  refused("num_experts", 17, "tensor 'model.layers.0.mlp.gate.weight': expected shape [17, 64]");
  refused("num_experts", 16777216, "field 'num_experts': expected an integer from 1 to 1048576");
  refused("num_experts", 1048576, "expected shape [1048576, 64]");
  refused("intermediate_size", 16777216, "expected shape [16777216, 64], found [32, 64]");
  refused("num_key_value_heads", 2,
          "tensor 'model.layers.0.self_attn.k_proj.weight': expected shape [32, 64]");
  refused("num_experts_per_tok", 17, "field 'num_experts_per_tok': expected an integer from 1");
  refused("model_type", "bert", "expected qwen3_moe, mixtral or olmoe, found 'bert'");
  refused("vocab_size", 300, "--prompt: expected --prompt-ids: the model's 300 tokens");
}

TEST_CASE("truncated or lying weights are refused and never read past their end") {
  const auto damaged = [](const auto& damage, const std::string& what) {
    const model_copy copy;
    damage(copy);
    const outcome found = prompt_on(copy);
    INFO(what << " / " << found.err);
    CHECK(is_refusal(found, what));
  };
  for (const std::size_t keep : {0U, 5U, 8U, 100U, 20'000U, 542'399U}) {
    damaged([&](const model_copy& copy) { copy.write_weights(copy.weights().substr(0, keep)); },
            "model.safetensors: ");
  }
  const std::string gate = "model.layers.1.mlp.gate.weight";
  const auto header = [&](const auto& change, const std::string& what) {
    damaged(
        [&](const model_copy& copy) {
          copy.edit_header([&](json& tensors) { change(tensors[gate]); });
        },
        "tensor '" + gate + "': " + what);
  };
  header([](json& t) { t["data_offsets"] = {494208, 900000}; }, "data_offsets");
  header([](json& t) { t["data_offsets"] = {0, 2048}; }, "");
  header([](json& t) { t["data_offsets"] = {-2048, 0}; }, "field 'data_offsets'");
  header([](json& t) { t["shape"] = {64, 16}; }, "expected shape [16, 64], found [64, 16]");
  header([](json& t) { t["shape"] = {16, 32}; }, "data_offsets span 2048 bytes, expected 1024");
  header([](json& t) { t["dtype"] = "I16"; }, "expected dtype F32, BF16 or F16, found I16");
  header([](json& t) { t["dtype"] = "F32"; }, "data_offsets span 2048 bytes, expected 4096");
  header([](json& t) { t.erase("dtype"); }, "field 'dtype' is missing");
}

TEST_CASE("NaN and infinite weights are refused with the tensor's name, wherever they stand") {
  for (const char* tensor : {"model.layers.0.mlp.gate.weight", "model.embed_tokens.weight",
                             "model.layers.1.mlp.experts.2.down_proj.weight"}) {
    for (const bool infinite : {false, true}) {
      const model_copy copy;
      copy.set_bfloat16(tensor, 7, infinite ? 0xff80 : 0x7fc0);
      CHECK(is_refusal(prompt_on(copy), "tensor '" + std::string(tensor) +
                                            "': expected finite numbers, element 7 is " +
                                            (infinite ? "infinite" : "NaN")));
    }
  }
}

TEST_CASE("no text is drawn from logits that are not finite") {
  const model_copy copy;
  // The largest bfloat16: what it is added to overflows.
  copy.set_bfloat16("model.norm.weight", 0, 0x7f7f);
  copy.set_bfloat16("model.norm.weight", 1, 0x7f7f);
  CHECK(is_refusal(prompt_on(copy), "the logits after position 1: expected finite numbers"));
}

TEST_CASE("an output that cannot be written is a failure") {
  std::ostream nowhere(nullptr);
  const std::string model = bundled("olmoe");
  for (const auto& rest :
       {std::vector<const char*>{"--prompt", "ab", "--tokens", "2"}, {"--verify"}, {"--help"}}) {
    std::vector<const char*> words{"generate", "--model", model.c_str()};
    words.insert(words.end(), rest.begin(), rest.end());
    std::ostringstream err;
    nowhere.clear();
    const int code = run_generate(static_cast<int>(words.size()), words.data(), nowhere, err, 1,
                                  [](int) { return moeroute::serial{}; });
    CHECK(is_refusal({code, "", err.str()}, "the output cannot be written"));
  }
}

TEST_CASE("a message stays on one line, whatever names the files hold") {
  const model_copy copy;
  copy.edit_header([](json& tensors) { tensors["a\nb\x1b[2J"] = 1; });
  const outcome found = prompt_on(copy);
  CHECK(is_refusal(found, "tensor 'a?b?[2J'"));
}

TEST_CASE("a reference that does not fit the model is refused") {
  const auto refused = [](const std::function<void(json&)>& change, const std::string& what) {
    const model_copy copy;
    copy.edit("reference.json", change);
    const outcome found = run({"--model", copy.path().string(), "--verify"});
    INFO(what << " / " << found.err);
    CHECK(is_refusal(found, what));
  };
  refused([](json& r) { r.erase("prompt"); }, "field 'prompt' is missing");
  refused([](json& r) { r["prompt"][3] = 256; }, "expected token ids of the vocabulary, found 256");
  refused([](json& r) { r["prompt"][3] = 2.5; }, "found 2.5");
  refused([](json& r) { r["prompt"].push_back(1); }, "expected shape [33, 256], found [32, 256]");
  refused([](json& r) { r["prompt"] = json::array(); }, "expected 1 to 128 tokens");
  refused([](json& r) { r["layers"].erase(1); }, "expected 2 layers, found 1");
  refused([](json& r) { r["layers"][0]["ids"][0].push_back(1); },
          "expected 4 values per token, found 5");
  refused([](json& r) { r["layers"][0]["ids"][0][0] = 16; }, "expected expert ids, found 16");
  refused([](json& r) { r["layers"][0]["weights"].erase(0); }, "expected 32 tokens, found 31");
  refused([](json& r) { r["logits"] = "none.npy"; }, "none.npy: no such file");
  refused([](json& r) { r["cases"] = json::array(); }, "expected at least one case");
}

TEST_CASE("verify agrees with the references of both variants") {
  for (const char* variant : {"mixtral", "olmoe"}) {
    const outcome found = run({"--model", bundled(variant), "--verify"});
    INFO(found.out << found.err);
    CHECK(found.code == 0);
    CHECK_THAT(found.out, EndsWith("verify: ok\n"));
  }
}

TEST_CASE("verify exits with 1 and says what differs") {
  const auto differs = [](const std::function<void(json&)>& change, const std::string& what) {
    const model_copy copy;
    copy.edit("reference.json", change);
    const outcome found = run({"--model", copy.path().string(), "--verify"});
    INFO(found.out);
    CHECK(found.code == 1);
    CHECK_THAT(found.out, ContainsSubstring(what));
    CHECK_THAT(found.out, EndsWith("verify: 1 of 1 cases differ\n"));
  };
  differs(
      [](json& r) {
        auto& ids = r["layers"][1]["ids"][5];
        ids[0] = (ids[0].get<int>() + 1) % 16;
      },
      "layer 1, token 5: experts and weights");
  differs(
      [](json& r) {
        auto& weight = r["layers"][0]["weights"][9][2];
        weight = weight.get<double>() * 1.001;
      },
      "layer 0, token 9: experts and weights");
  differs([](json& r) { r["prompt"][31] = (r["prompt"][31].get<int>() + 1) % 256; },
          "token 31: logit");
  differs([](json& r) { r["greedy"] = {1, 2, 3}; }, "greedy token");
}

TEST_CASE("experts whose logits nearly tie are not compared") {
  const model_copy copy;
  copy.edit("reference.json", [](json& r) {
    r["layers"][1]["ids"][5] = {0, 1, 2, 3};
    r["layers"][1]["logit_margin_k"][5] = 1e-4;
  });
  const outcome found = run({"--model", copy.path().string(), "--verify"});
  CHECK(found.code == 0);
  CHECK_THAT(found.out, ContainsSubstring("1 too close to call"));
}

TEST_CASE("the trained model continues a prompt byte for byte as the reference did") {
  const std::string model = bundled_model().string();
  const json reference = read_json(bundled_model() / "reference.json")["cases"][0];
  std::string text;
  for (const char* part : {"prompt", "greedy"}) {
    for (const json& byte : reference[part]) {
      text += static_cast<char>(byte.get<int>());
    }
  }
  std::string ids;
  for (const json& byte : reference["prompt"]) {
    ids += (ids.empty() ? "" : ",") + byte.dump();
  }
  const outcome found = run({"--model", model, "--prompt-ids", ids, "--tokens", "128"});
  CHECK(text_of(found) == text + "\n\n");
}

TEST_CASE("the seed decides what is drawn, and temperature 0 asks no seed") {
  const std::string model = bundled("mixtral");
  const auto text = [&](const char* temperature, const char* seed) {
    return text_of(run({"--model", model, "--prompt", "seed", "--tokens", "40", "--temperature",
                        temperature, "--seed", seed}));
  };
  CHECK(text("1", "7") == text("1", "7"));
  CHECK(text("1", "7") != text("1", "8"));
  CHECK(text("0", "7") == text("0", "8"));
}

#if defined(_OPENMP)
TEST_CASE("the text does not depend on the number of threads") {
  const std::string prompt(100, 'x');
  const auto text = [&](const char* threads) {
    return text_of(run_with([](int count) { return moeroute::openmp{count}; },
                            {"--model", bundled("olmoe"), "--prompt", prompt, "--tokens", "20",
                             "--temperature", "1", "--threads", threads}));
  };
  const std::string alone = text("1");
  CHECK_THAT(alone, StartsWith(prompt));
  CHECK(text("2") == alone);
  CHECK(text("3") == alone);
}
#endif

TEST_CASE("writing stops at the model's last position and says so") {
  const std::string model = bundled("olmoe");
  const outcome found = run({"--model", model, "--prompt", std::string(120, 'a')});
  CHECK(found.code == 0);
  CHECK(found.err ==
        "generate: stopped after 8 tokens: the model has 128 positions "
        "(max_position_embeddings)\n");
  const outcome full = run({"--model", model, "--prompt", std::string(128, 'a')});
  CHECK(full.code == 0);
  CHECK_THAT(full.err, ContainsSubstring("stopped after 0 tokens"));
}

TEST_CASE("float32 weights in several files give the text of the single bfloat16 file") {
  const model_copy copy;
  const outcome single = prompt_on(copy);
  const safetensors_file source(copy.path() / "model.safetensors");
  const std::string bytes = copy.weights();
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  const json header = json::parse(bytes.substr(8, length));
  json headers[2] = {json::object(), json::object()};
  std::string data[2];
  json map;
  std::size_t turn = 0;
  for (const auto& [name, tensor] : header.items()) {
    if (name == "__metadata__") {
      continue;
    }
    std::vector<float> values((tensor["data_offsets"][1].get<std::size_t>() -
                               tensor["data_offsets"][0].get<std::size_t>()) /
                              2);
    source.read(name, 0, values);
    const std::size_t file = turn++ % 2;
    const std::size_t begin = data[file].size();
    data[file] += bytes_of(values);
    headers[file][name] = {
        {"dtype", "F32"}, {"shape", tensor["shape"]}, {"data_offsets", {begin, data[file].size()}}};
    map[name] = file == 0 ? "a.safetensors" : "b.safetensors";
  }
  std::filesystem::remove(copy.path() / "model.safetensors");
  static_cast<void>(
      copy.folder().write("a.safetensors", safetensors_bytes(headers[0].dump(), data[0])));
  static_cast<void>(
      copy.folder().write("b.safetensors", safetensors_bytes(headers[1].dump(), data[1])));
  static_cast<void>(
      copy.folder().write("model.safetensors.index.json", json{{"weight_map", map}}.dump()));
  const outcome sharded = prompt_on(copy);
  CHECK(sharded.code == 0);
  CHECK(text_of(sharded) == text_of(single));
}

TEST_CASE("the report is one page that loads nothing, with a panel per text") {
  const model_copy copy;
  std::filesystem::create_directory(copy.path() / "text");
  for (const char* name : {"text/c.txt", "text/english.txt", "text/python.txt"}) {
    static_cast<void>(copy.folder().write(name, std::string(200, name[5])));
  }
  const auto file = copy.path() / "report.html";
  const std::string model = copy.path().string();
  const outcome found = run({"--model", model, "--report", file.string()});
  REQUIRE(found.code == 0);
  const std::string page = input_file(file).text(10'000'000);
  for (const char* name : {"<h2>C ", "<h2>English ", "<h2>Python "}) {
    CHECK_THAT(page, ContainsSubstring(name));
  }
  for (const char* loads : {"http:", "https:", "src=", "url(", "<script", "<link", "@import"}) {
    CHECK_THAT(page, !ContainsSubstring(loads));
  }
  CHECK(is_refusal(run({"--model", bundled("olmoe"), "--report", file.string()}),
                   "expected .txt files for --report"));
  CHECK(is_refusal(run({"--model", model, "--report", (copy.path() / "none" / "r.html").string()}),
                   "r.html: cannot be written"));
  static_cast<void>(copy.folder().write("text/empty.txt", ""));
  CHECK(is_refusal(run({"--model", model, "--report", file.string()}),
                   "empty.txt: expected a text, found nothing"));
}

TEST_CASE("without texts beside the model the report shows the prompt and its continuation") {
  const scratch_folder folder;
  const auto file = folder.path() / "report.html";
  const outcome found = run(
      {"--model", bundled("olmoe"), "--prompt", "abc", "--tokens", "5", "--report", file.string()});
  REQUIRE(found.code == 0);
  CHECK_THAT(input_file(file).text(10'000'000),
             ContainsSubstring("Prompt and continuation <small>8 tokens"));
}

TEST_CASE("help names every option and exits with 0") {
  const outcome found = run({"--help"});
  CHECK(found.code == 0);
  for (const char* option : {"--model", "--prompt", "--prompt-ids", "--tokens", "--temperature",
                             "--seed", "--threads", "--verify", "--report"}) {
    CHECK_THAT(found.out, ContainsSubstring(option));
  }
}

TEST_CASE("what only counts loads writes the same text; rules and policies have their figures") {
  const std::string model = bundled("olmoe");
  const std::vector<std::string> plain = {"--model", model, "--prompt", "ab", "--tokens", "12"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.begin(), plain.begin(), plain.end());
    return run(std::move(more));
  };
  const outcome all = with({"--memory-budget", "0.4", "--residency", "off"});
  CHECK(text_of(all) == text_of(run(plain)));
  CHECK_THAT(all.out, ContainsSubstring("agreement   100 % of the plain choices"));
  for (const char* rule : {"off", "prior:0.2", "maxrank:9", "mass:0.9", "swap:0.2", "drop:0.5"})
    for (const char* policy : {"lru", "lfu", "fifo", "segmented", "least_stale", "cost_aware"}) {
      const outcome some = with(
          {"--memory-budget", "0.5", "--residency", rule, "--cache", policy, "--read-experts"});
      INFO(rule << " " << policy << " " << some.err);
      CHECK(some.code == 0);
      CHECK_THAT(some.out, ContainsSubstring(std::string("experts per layer, ") + policy));
      CHECK_THAT(some.out, ContainsSubstring(" MiB in "));
    }
}

TEST_CASE("a text's loss is that of plain sums, with a budget beside that of all experts") {
  const model_copy copy;
  const auto text = copy.path() / "some.txt", profile = copy.path() / "profile.txt";
  std::ofstream(text) << "a few bytes of text";
  const outcome found =
      run({"--model", copy.path().string(), "--loss", text.string(), "--memory-budget", "0.5",
           "--residency", "swap:0.1", "--save-profile", profile.string()});
  INFO(found.err);
  CHECK(found.code == 0);
  CHECK_THAT(found.out, ContainsSubstring(" with all experts"));
  const outcome pinned = run({"--model", copy.path().string(), "--loss", text.string(),
                              "--memory-budget", "0.5", "--profile", profile.string()});
  CHECK(pinned.code == 0);
  // Half of it is there from the start, so fewer are read than without.
  CHECK_THAT(pinned.out, ContainsSubstring("% of lookups hit"));
  std::ofstream(profile) << "expert_profile v1 1 2\n3 4\n";
  CHECK(is_refusal(run({"--model", copy.path().string(), "--loss", text.string(), "--memory-budget",
                        "0.5", "--profile", profile.string()}),
                   "profile.txt: expected 2 layers of 16 experts, found 1 of 2"));
}

TEST_CASE("budgets, rules and policies that there are not are refused by name") {
  const std::string model = bundled("olmoe");
  const auto refused = [&](std::vector<std::string> more, const std::string& what) {
    more.insert(more.begin(), {"--model", model, "--prompt", "a", "--tokens", "1"});
    const outcome found = run(std::move(more));
    INFO(what << " / " << found.err);
    CHECK(is_refusal(found, what));
  };
  refused({"--memory-budget", "1.5"},
          "--memory-budget: expected a number from 0 to 1, found '1.5'");
  refused({"--residency", "prior:0.1"}, "--residency: expected together with --memory-budget");
  refused({"--memory-budget", "0.5", "--residency", "best:1"},
          "--residency: expected off, prior, maxrank, mass, swap or drop, found 'best'");
  refused({"--memory-budget", "0.5", "--residency", "prior"},
          "--residency: expected RULE:NUMBER, found 'prior'");
  refused({"--memory-budget", "0.5", "--residency", "prior:x"},
          "--residency: expected RULE:NUMBER, found 'prior:x'");
  refused({"--memory-budget", "0.5", "--residency", "maxrank:6.7"},
          "--residency: expected RULE:NUMBER, found 'maxrank:6.7'");
  refused({"--memory-budget", "0.5", "--residency", "maxrank:1"}, "ranks is 1, expected");
  refused(
      {"--memory-budget", "0.5", "--cache", "mru"},
      "--cache: expected one of lru, lfu, fifo, segmented, least_stale, cost_aware, found 'mru'");
  refused({"--memory-budget", "0.5", "--profile", "no/such"}, "no/such: no such file");
}

}  // namespace generate_app_test
