#include <moeroute/json/gguf.hpp>

#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <limits>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "support/random.hpp"
#include "support/refusal.hpp"

using moeroute::find_in_catalog;
using moeroute::gguf_metadata;
using moeroute::parse_gguf_metadata;
using moeroute::routers_from_gguf;

namespace {

gguf_metadata keys_of(const std::string& arch, gguf_metadata more) {
  gguf_metadata keys{{"general.architecture", arch}};
  for (auto& [key, value] : more) keys[arch + "." + key] = value;
  return keys;
}

std::string keys_refusal(const gguf_metadata& keys) {
  try {
    (void)routers_from_gguf(keys, "m.gguf");
  } catch (const moeroute::error& e) {
    return e.what();
  }
  return "accepted";
}

std::int64_t n(std::int64_t value) { return value; }

// A file's begin, written value by value.
struct written {
  std::vector<std::uint8_t> bytes;

  template <class T>
  written& add(T value) {
    if constexpr (std::is_same_v<T, float>) {
      return add(std::bit_cast<std::uint32_t>(value));
    } else {
      for (std::size_t i = 0; i < sizeof(T); ++i)
        bytes.push_back(static_cast<std::uint8_t>(static_cast<std::uint64_t>(value) >> (8 * i)));
      return *this;
    }
  }
  written& add_text(const std::string& text) {
    add(std::uint64_t{text.size()});
    bytes.insert(bytes.end(), text.begin(), text.end());
    return *this;
  }
  written& key(const std::string& name, std::uint32_t type) { return add_text(name).add(type); }
};

written head(std::uint64_t keys) {
  written w;
  for (const char c : {'G', 'G', 'U', 'F'}) w.add(static_cast<std::uint8_t>(c));
  return w.add(std::uint32_t{3}).add(std::uint64_t{0}).add(keys);
}

}  // namespace

TEST_CASE("the keys of a published model give the catalogue's spec") {
  const auto same = [](const gguf_metadata& keys, const char* entry) {
    INFO(entry);
    const auto model = routers_from_gguf(keys, "m.gguf");
    CHECK(to_string(model.spec) == to_string(find_in_catalog(entry)->spec));
    CHECK(model.entry == find_in_catalog(entry));
  };
  same(keys_of("llama", {{"expert_count", n(8)}, {"expert_used_count", n(2)}}), "mixtral");
  same(keys_of("qwen2moe", {{"expert_count", n(60)}, {"expert_used_count", n(4)}}), "qwen2_moe");
  same(keys_of(
           "gpt-oss",
           {{"expert_count", n(128)}, {"expert_used_count", n(4)}, {"expert_gating_func", n(3)}}),
       "gpt_oss");
  same(keys_of("deepseek2", {{"expert_count", n(256)},
                             {"expert_used_count", n(8)},
                             {"expert_gating_func", n(2)},
                             {"expert_weights_norm", true},
                             {"expert_weights_scale", 2.5},
                             {"expert_group_count", n(8)},
                             {"expert_group_used_count", n(4)},
                             {"expert_shared_count", n(1)},
                             {"expert_feed_forward_length", n(2048)}}),
       "deepseek_v3");
  for (const int softmax : {0, 1})
    same(keys_of("deepseek2", {{"expert_count", n(160)},
                               {"expert_used_count", n(6)},
                               {"expert_gating_func", n(softmax)},
                               {"expert_weights_scale", 16.0},
                               {"expert_group_count", n(8)},
                               {"expert_group_used_count", n(3)},
                               {"expert_weights_norm", false}}),
         "deepseek_v2");
  same(keys_of("glm4moe", {{"expert_count", n(160)},
                           {"expert_used_count", n(8)},
                           {"expert_gating_func", n(2)},
                           {"expert_weights_norm", true},
                           {"expert_weights_scale", 2.5}}),
       "glm4_moe");
  same(keys_of("llama4", {{"expert_count", n(16)}, {"expert_used_count", n(1)}}), "llama4_scout");
  const auto sized = [](const char* arch, int experts, int k, int gating, gguf_metadata more = {}) {
    gguf_metadata keys = keys_of(arch, {{"expert_count", n(experts)}, {"expert_used_count", n(k)}});
    if (gating != 0) keys[std::string(arch) + ".expert_gating_func"] = n(gating);
    for (const auto& [key, value] : more) keys[std::string(arch) + "." + key] = value;
    return keys;
  };
  same(
      sized("bailingmoe", 64, 6, 0, {{"expert_weights_norm", true}, {"expert_weights_scale", 1.0}}),
      "ling_lite");
  same(sized("bailingmoe2", 256, 8, 2,
             {{"expert_weights_norm", true},
              {"expert_weights_scale", 2.5},
              {"expert_group_count", n(8)},
              {"expert_group_used_count", n(4)}}),
       "ling2");
  same(sized("mimo2", 256, 8, 2, {{"expert_weights_norm", true}}), "mimo_v2_flash");
  for (const int none : {0, 1})  // groups that are none
    same(sized("mimo2", 256, 8, 2,
               {{"expert_weights_norm", true},
                {"expert_group_count", n(none)},
                {"expert_group_used_count", n(none)}}),
         "mimo_v2_flash");
  same(sized("step35", 288, 8, 2, {{"expert_weights_norm", true}, {"expert_weights_scale", 1.0}}),
       "step3p7");
  same(sized("kimi-linear", 256, 8, 2,
             {{"expert_weights_norm", true}, {"expert_weights_scale", 2.446}}),
       "kimi_linear");
  same(sized("smallthinker", 32, 4, 2), "smallthinker");
  same(sized("grovemoe", 128, 8, 0, {{"experts_per_group", n(2)}, {"expert_group_scale", 0.05}}),
       "grove_moe");
  same(sized("grok", 8, 2, 0, {{"router_logit_softcapping", 30.0}}), "grok1");
  same(sized("arctic", 128, 2, 0), "arctic");
  same(sized("nomic-bert-moe", 8, 2, 0, {{"moe_every_n_layers", n(2)}}), "nomic_bert_moe");
}

TEST_CASE("metadata says which layers have experts, and which a table") {
  const auto kinds = [](const gguf_metadata& keys) {
    std::string text;
    for (const auto& layer : routers_from_gguf(keys, "m.gguf").layers)
      text += !layer ? '-' : layer->selection == moeroute::selection_kind::expert_table ? 't' : 's';
    return text;
  };
  CHECK(kinds(keys_of("glm4moe", {{"expert_count", n(8)},
                                  {"expert_used_count", n(2)},
                                  {"block_count", n(5)},
                                  {"leading_dense_block_count", n(1)},
                                  {"nextn_predict_layers", n(1)}})) == "-sss");
  CHECK(kinds(keys_of("llama4", {{"expert_count", n(8)},
                                 {"expert_used_count", n(1)},
                                 {"block_count", n(4)},
                                 {"interleave_moe_layer_step", n(2)}})) == "-s-s");
  CHECK(kinds(keys_of("deepseek4", {{"expert_count", n(8)},
                                    {"expert_used_count", n(2)},
                                    {"expert_gating_func", n(4)},
                                    {"expert_weights_scale", 1.5},
                                    {"block_count", n(4)},
                                    {"hash_layer_count", n(3)}})) == "ttts");
}

TEST_CASE("whatever keys of layers come together, every layer is what they say of its number") {
  test::random rng(5);
  for (int round = 0; round < 300; ++round) {
    const bool tables = round % 3 == 0;
    gguf_metadata keys{{"expert_count", n(8)}, {"expert_used_count", n(2)}};
    if (tables) {
      keys["expert_gating_func"] = n(4);
      keys["expert_weights_scale"] = 1.5;
    }
    std::map<std::string, std::int64_t> said;
    const auto draw = [&](const char* name, std::int64_t most) {
      if (rng.below(3) == 0) return;
      said[name] = rng.below(most + 1);
      keys[name] = said[name];
    };
    const auto of = [&](const char* name) { return said.contains(name) ? said[name] : 0; };
    draw("block_count", 12);
    draw("nextn_predict_layers", of("block_count"));
    draw("leading_dense_block_count", 5);
    draw("interleave_moe_layer_step", 4);
    draw("moe_every_n_layers", 4);
    if (tables) draw("hash_layer_count", 14);
    const auto made = routers_from_gguf(keys_of(tables ? "deepseek4" : "glm4moe", keys), "m.gguf");
    INFO("round " << round);
    const std::int64_t count = of("block_count") - of("nextn_predict_layers");
    const std::int64_t every =
        of(said.contains("interleave_moe_layer_step") ? "interleave_moe_layer_step"
                                                      : "moe_every_n_layers");
    REQUIRE(made.count == count);
    REQUIRE(std::int64_t(made.layers.size()) == std::max(count, of("hash_layer_count")));
    std::int64_t wrong = 0;
    for (std::int64_t l = 0; l < std::int64_t(made.layers.size()); ++l) {
      const bool sparse =
          l >= of("leading_dense_block_count") && (every < 2 || l % every == every - 1);
      moeroute::router_spec own = made.spec;
      if (l < of("hash_layer_count")) {
        own.selection = moeroute::selection_kind::expert_table;
        own.selection_bias = false;
      }
      const auto& layer = made.layers[static_cast<std::size_t>(l)];
      if (layer.has_value() != sparse || (sparse && !(*layer == own))) ++wrong;
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("what an architecture's keys may say is pinned for each") {
  // Weights without a word, with expert_weights_norm true and false; a scale of 0, 1 and 2; four
  // groups of which two are kept. "no": refused.
  std::istringstream pinned(R"(
    llama sum sum no 1 1 no no
    qwen2moe none no none 1 1 no no
    qwen3moe sum sum no 1 1 no no
    qwen3next sum sum no 1 1 no no
    qwen35moe sum sum no 1 1 no no
    qwen3vlmoe sum sum no 1 1 no no
    olmoe none no none 1 1 no no
    jamba none no none 1 1 no no
    dbrx lp lp no 1 1 no no
    hunyuan-moe sum sum no 1 1 no no
    gemma4 sum sum no 1 1 no no
    mellum sum sum none 1 1 no no
    mistral4 none sum none 1 1 2 42top20
    deepseek2 none sum none 1 1 2 42top2
    deepseek2-ocr none no none 1 1 2 42max0
    deepseek32 none sum none 1 1 2 42top2
    deepseek4 sum sum no 1 1 2 no
    dots1 none sum none 1 1 2 42top2
    glm4moe none sum none 1 1 2 42top2
    glm-dsa none sum none 1 1 2 42top2
    exaone-moe none sum none 1 1 2 42top2
    nemotron_h_moe none sum none 1 1 2 42top2
    afmoe none sum none 1 1 2 no
    laguna sum sum no 1 1 2 no
    hy_v3 sum sum no 1 1 2 no
    lfm2moe sum sum no 1 1 no no
    minimax-m2 sum sum no 1 1 no no
    minimax-m3 sum sum no 1 1 2 no
    ernie4_5-moe sum sum no 1 1 no no
    gpt-oss none none none 1 1 no no
    granitemoe none none none 1 1 no no
    granitehybrid none none none 1 1 no no
    cohere2moe none none none 1 1 no no
    llama4 none no none 1 1 no no
    phimoe none no none 1 1 no no
    bailingmoe none sum none 1 1 no no
    bailingmoe2 none sum none 1 1 2 42top2
    mimo2 none sum none 1 1 2 42top2
    step35 sum sum no 1 1 2 no
    kimi-linear none sum none 1 1 2 42top2
    smallthinker sum sum no 1 1 no no
    grovemoe none no none 1 1 no no
    grok sum sum no 1 1 no no
    arctic sum sum no 1 1 no no
    nomic-bert-moe none no none 1 1 no no)");
  std::map<std::string, std::string> expected;
  for (std::string arch, said; pinned >> arch && std::getline(pinned, said);)
    expected[arch] = arch + said;
  for (const moeroute::detail::gguf_model& model : moeroute::detail::gguf_models) {
    const auto answer = [&](const gguf_metadata& more, auto what) {
      const auto score = find_in_catalog(model.entry)->spec.score;
      gguf_metadata keys =
          keys_of(model.arch, {{"expert_count", n(16)}, {"expert_used_count", n(2)}});
      if (model.arch == std::string("deepseek2") || score != moeroute::score_kind::softmax)
        keys[std::string(model.arch) + ".expert_gating_func"] =
            n(score == moeroute::score_kind::sqrt_softplus ? 4
              : score == moeroute::score_kind::sigmoid     ? 2
                                                           : 1);
      for (const auto& [key, value] : more) keys[std::string(model.arch) + "." + key] = value;
      if (keys_refusal(keys) != "accepted") return std::string("no");
      std::ostringstream said;
      said << what(routers_from_gguf(keys, "m.gguf").spec);
      return said.str();
    };
    const auto weights = [](const moeroute::router_spec& s) {
      return std::string(to_string(s.normalize));
    };
    const auto scale = [](const moeroute::router_spec& s) { return s.scale; };
    std::string line = std::string(model.arch) + " " + answer({}, weights);
    for (const bool norm : {true, false})
      line += " " + answer({{"expert_weights_norm", norm}}, weights);
    for (const double by : {0.0, 1.0, 2.0})
      line += " " + answer({{"expert_weights_scale", by}}, scale);
    line += " " + answer({{"expert_group_count", n(4)}, {"expert_group_used_count", n(2)}},
                         [](const moeroute::router_spec& s) {
                           return std::to_string(s.groups) + std::to_string(s.topk_group) +
                                  (s.group_score == moeroute::group_score::max ? "max" : "top2") +
                                  (s.group_fill == 0.0f ? "0" : "");
                         });
    CHECK(line == expected[model.arch]);
  }
}

TEST_CASE("every key has its type and its range, and says so whole") {
  const auto with = [&](const char* arch, const char* key, moeroute::gguf_value value) {
    gguf_metadata keys = keys_of(arch, {{"expert_count", n(8)}, {"expert_used_count", n(2)}});
    keys[std::string(arch) + "." + key] = std::move(value);
    const std::string said = keys_refusal(keys);
    const std::string begin =
        "moeroute::gguf: m.gguf: key '" + std::string(arch) + "." + key + "': expected ";
    return said.starts_with(begin) ? said.substr(begin.size()) : said;
  };
  const auto whole = [](std::int64_t low, std::int64_t high, const std::string& found) {
    return "a whole number from " + std::to_string(low) + " to " + std::to_string(high) +
           ", found " + found;
  };
  struct range {
    const char* key;
    std::int64_t low, high;
  };
  for (const range& r : {range{"expert_count", 1, 1048576},
                         {"expert_used_count", 1, 8},
                         {"expert_gating_func", 0, 4},
                         {"expert_group_count", 0, 8},
                         {"expert_group_used_count", 0, 1},
                         {"block_count", 0, 4096},
                         {"nextn_predict_layers", 0, 0},
                         {"leading_dense_block_count", 0, 4096},
                         {"interleave_moe_layer_step", 0, 4096},
                         {"moe_every_n_layers", 0, 4096}}) {
    CHECK(with("llama", r.key, n(r.low - 1)) == whole(r.low, r.high, std::to_string(r.low - 1)));
    CHECK(with("llama", r.key, n(r.high + 1)) == whole(r.low, r.high, std::to_string(r.high + 1)));
    CHECK(with("llama", r.key, true) == whole(r.low, r.high, "true"));
    CHECK(with("llama", r.key, std::string("two\n")) == whole(r.low, r.high, "'two?'"));
    CHECK(with("llama", r.key, std::vector<std::int64_t>{1}) == whole(r.low, r.high, "an array"));
  }
  CHECK(with("llama", "expert_count", n(1048576)) == "accepted");
  CHECK(with("llama", "expert_used_count", n(8)) == "accepted");
  CHECK(with("llama", "block_count", n(4096)) == "accepted");
  gguf_metadata v4 =
      keys_of("deepseek4",
              {{"expert_count", n(8)}, {"expert_used_count", n(2)}, {"hash_layer_count", n(4097)}});
  CHECK(keys_refusal(v4) == "moeroute::gguf: m.gguf: key 'deepseek4.hash_layer_count': expected " +
                                whole(0, 4096, "4097"));
  v4["deepseek4.hash_layer_count"] = n(3);
  CHECK(routers_from_gguf(v4, "m.gguf").layers.size() == 3);
  CHECK(routers_from_gguf(v4, "m.gguf").count == 0);
  CHECK(test::refusal([&] { (void)routers_from_gguf(v4, "m.gguf").of(-1); }) ==
        "moeroute::model_routers: layer is -1, expected 0 to 4611686018427387904");
  for (const char* key : {"expert_weights_scale", "router_logit_softcapping"}) {
    for (const double wrong :
         {-0.5, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()})
      CHECK(with("grok", key, wrong) ==
            "a number from 0 on, found " +
                moeroute::detail::gguf_fields::show(moeroute::gguf_value(wrong)));
    CHECK(with("grok", key, n(1)) == "a number from 0 on, found 1");
  }
  CHECK(with("llama", "expert_weights_norm", n(1)) == "true or false, found 1");
  CHECK(with("llama", "expert_weights_norm", std::string(40, 'a')) ==
        "true or false, found '" + std::string(40, 'a') + "'");
  CHECK(with("llama", "expert_weights_norm", std::string(41, 'a')) ==
        "true or false, found a text");
  CHECK(with("llama", "expert_weights_norm", false) == "true, found false");
  CHECK(with("qwen2moe", "expert_weights_norm", true) == "false, found true");
  CHECK(with("llama", "expert_weights_scale", 2.0) == "0 or 1, found 2");
  CHECK(with("llama", "router_logit_softcapping", 30.0) == "0, found 30");
  CHECK(with("llama", "router_logit_softcapping", 0.0) == "accepted");
  CHECK(with("llama", "expert_group_count", n(4)) == "0 or 1, found 4");
  CHECK(with("dots1", "expert_gating_func", n(1)) == "that of dots1, sigmoid, found 1");
  CHECK(with("gpt-oss", "expert_gating_func", n(3)) == "accepted");
  CHECK(with("llama", "expert_gating_func", n(3)) == "that of mixtral, softmax, found 3");
  CHECK(with("qwen2moe", "expert_gating_func", n(1)) == "accepted");
  CHECK(with("qwen2moe", "expert_gating_func", n(3)) == "that of qwen2_moe, softmax, found 3");
  for (const std::int64_t gating : {1, 2, 3})
    CHECK(with("cohere2moe", "expert_gating_func", n(gating)) == "accepted");
  CHECK(with("cohere2moe", "expert_gating_func", n(4)) ==
        "that of cohere2_moe, " +
            std::string(to_string(find_in_catalog("cohere2_moe")->spec.score)) + ", found 4");
  gguf_metadata kept = keys_of("dots1", {{"expert_count", n(8)},
                                         {"expert_used_count", n(2)},
                                         {"expert_gating_func", n(2)},
                                         {"expert_group_count", n(4)}});
  CHECK(keys_refusal(kept) ==
        "moeroute::gguf: m.gguf: key 'dots1.expert_group_used_count': expected how many groups are "
        "kept, found none");
  CHECK(keys_refusal(keys_of("llama", {{"expert_used_count", n(2)}})) ==
        "moeroute::gguf: m.gguf: key 'llama.expert_count': expected a whole number, found none");
  CHECK(keys_refusal(keys_of("llama", {{"expert_count", n(8)}})) ==
        "moeroute::gguf: m.gguf: key 'llama.expert_used_count': expected a whole number, found "
        "none");
  // One group is none: what would fill others is what it always is.
  for (const char* const arch : {"deepseek2", "mistral4", "dots1"})
    for (const std::int64_t groups : {0, 1}) {
      gguf_metadata one = keys_of(arch, {{"expert_count", n(8)},
                                         {"expert_used_count", n(2)},
                                         {"expert_group_count", n(groups)},
                                         {"expert_group_used_count", n(groups)}});
      const moeroute::router_spec s = routers_from_gguf(one, "m.gguf").spec, usual;
      CHECK((s.groups == 1 && s.topk_group == 1));
      CHECK((s.group_fill == usual.group_fill && s.group_score == moeroute::group_score::top2_sum));
    }
  CHECK(keys_refusal({{"general.architecture", n(3)}}) ==
        "moeroute::gguf: m.gguf: key 'general.architecture': expected a mixture-of-experts model "
        "of the catalogue, found 3");
  // Of others than the architecture nothing is asked; what changes no routing is passed over.
  for (const std::string_view key : moeroute::detail::harmless_gguf_keys)
    CHECK(with("llama", std::string(key).c_str(), n(1)) == "accepted");
  gguf_metadata other = keys_of("llama", {{"expert_count", n(8)}, {"expert_used_count", n(2)}});
  other["grok.expert_router"] = n(1);
  other["llama.rope.freq_base"] = 1.0;
  CHECK(keys_refusal(other) == "accepted");
}

TEST_CASE("layers of metadata: dense ones first, steps, tables and predicted ones") {
  const auto kinds = [](const char* arch, const gguf_metadata& more) {
    gguf_metadata keys = keys_of(arch, more);
    keys[std::string(arch) + ".expert_count"] = n(8);
    keys[std::string(arch) + ".expert_used_count"] = n(2);
    std::string text;
    const auto all = routers_from_gguf(keys, "m.gguf");
    for (const auto& layer : all.layers)
      text += !layer ? '-' : layer->selection == moeroute::selection_kind::expert_table ? 't' : 's';
    return std::to_string(all.count) + text;
  };
  CHECK(kinds("llama", {{"block_count", n(3)}}) == "3sss");
  CHECK(kinds("llama", {{"block_count", n(3)}, {"nextn_predict_layers", n(3)}}) == "0");
  CHECK(kinds("llama", {{"block_count", n(3)}, {"leading_dense_block_count", n(9)}}) == "3---");
  for (const std::int64_t step : {0, 1})
    CHECK(kinds("llama", {{"block_count", n(3)}, {"interleave_moe_layer_step", n(step)}}) ==
          "3sss");
  CHECK(kinds("llama", {{"block_count", n(7)},
                        {"interleave_moe_layer_step", n(3)},
                        {"moe_every_n_layers", n(2)}}) == "7--s--s-");
  CHECK(kinds("llama", {{"block_count", n(5)},
                        {"moe_every_n_layers", n(2)},
                        {"leading_dense_block_count", n(2)}}) == "5---s-");
  CHECK(kinds("deepseek4", {{"block_count", n(2)}, {"hash_layer_count", n(3)}}) == "2ttt");
  const auto v4 = routers_from_gguf(keys_of("deepseek4", {{"expert_count", n(8)},
                                                          {"expert_used_count", n(2)},
                                                          {"block_count", n(2)},
                                                          {"hash_layer_count", n(1)}}),
                                    "m.gguf");
  CHECK((!v4.of(0)->selection_bias && v4.of(1)->selection_bias));
}

TEST_CASE("a key that is missing, wrong or unknown is named") {
  const gguf_metadata good =
      keys_of("llama", {{"expert_count", n(8)}, {"expert_used_count", n(2)}});
  const auto with = [&](const char* key, moeroute::gguf_value value) {
    gguf_metadata keys = good;
    keys[std::string("llama.") + key] = std::move(value);
    return keys_refusal(keys);
  };
  CHECK(with("block_count", n(4)) == "accepted");
  CHECK(keys_refusal({}) == "moeroute::gguf: m.gguf: key 'general.architecture' is missing");
  CHECK(keys_refusal({{"general.architecture", std::string("gpt2")}}) ==
        "moeroute::gguf: m.gguf: key 'general.architecture': expected a mixture-of-experts model "
        "of the catalogue, found 'gpt2'");
  for (const std::size_t letters : {40u, 41u}) {
    const std::string name(letters, 'x');
    CHECK(keys_refusal({{"general.architecture", name}}) ==
          "moeroute::gguf: m.gguf: key 'general.architecture': expected a mixture-of-experts "
          "model of the catalogue, found " +
              (letters == 40 ? "'" + name + "'" : std::string("a text")));
  }
  CHECK(keys_refusal(keys_of("llama", {{"expert_count", n(8)}})) ==
        "moeroute::gguf: m.gguf: key 'llama.expert_used_count': expected a whole number, found "
        "none");
  const std::string key = "moeroute::gguf: m.gguf: key 'llama.";
  CHECK(with("expert_used_count", n(9)) ==
        key + "expert_used_count': expected a whole number from 1 to 8, found 9");
  CHECK(with("expert_count", 8.0) ==
        key + "expert_count': expected a whole number from 1 to 1048576, found 8");
  CHECK(with("expert_gating_func", n(2)) ==
        key + "expert_gating_func': expected that of mixtral, softmax, found 2");
  CHECK(with("expert_weights_norm", false) ==
        key + "expert_weights_norm': expected true, found false");
  CHECK(with("expert_weights_scale", 2.0) ==
        key + "expert_weights_scale': expected 0 or 1, found 2");
  CHECK(with("expert_group_count", n(4)) == key + "expert_group_count': expected 0 or 1, found 4");
  // What each key allows and all together do not.
  gguf_metadata grouped{{"expert_count", n(160)},          {"expert_used_count", n(6)},
                        {"expert_weights_scale", 16.0},    {"expert_group_count", n(7)},
                        {"expert_group_used_count", n(3)}, {"expert_weights_norm", false}};
  CHECK(keys_refusal(keys_of("deepseek2", grouped)) ==
        "moeroute::json: m.gguf: moeroute::top_k: groups is 7, expected a divisor of E = 160");
  grouped.erase("expert_group_used_count");
  CHECK(keys_refusal(keys_of("deepseek2", grouped)) ==
        "moeroute::gguf: m.gguf: key 'deepseek2.expert_group_used_count': expected how many groups "
        "are kept, found none");
  CHECK(with("router_temperature", 2.0) ==
        "moeroute::gguf: m.gguf: key 'llama.router_temperature' speaks of routing and is not "
        "known");
}

TEST_CASE("metadata is parsed from the bytes of a file") {
  written w = head(6);
  w.key("general.architecture", 8).add_text("llama");
  w.key("llama.expert_count", 4).add(std::uint32_t{8});
  w.key("llama.expert_used_count", 5).add(std::int32_t{2});
  w.key("tokens", 9).add(std::uint32_t{8}).add(std::uint64_t{2}).add_text("a").add_text("bc");
  w.key("llama.expert_weights_scale", 6).add(1.0f);
  w.key("sizes", 9).add(std::uint32_t{3}).add(std::uint64_t{2});
  w.add(std::int16_t{-1}).add(std::int16_t{5});
  const gguf_metadata keys = parse_gguf_metadata(w.bytes, "m.gguf");
  CHECK(keys.at("sizes") == moeroute::gguf_value(std::vector<std::int64_t>{-1, 5}));
  CHECK(to_string(routers_from_gguf(keys, "m.gguf").spec) ==
        to_string(find_in_catalog("mixtral")->spec));

  // Cut anywhere it is refused, never read past its end.
  for (std::size_t size = 0; size < w.bytes.size(); ++size) {
    INFO(size);
    CHECK_THROWS_AS(parse_gguf_metadata({w.bytes.data(), size}, "m.gguf"), moeroute::error);
  }
}

TEST_CASE("a value of every type is read with its sign, at its ends") {
  struct value {
    std::uint32_t type;
    std::uint64_t bits;
    int size;
    moeroute::gguf_value expected;
  };
  const value values[] = {{0, 0xff, 1, n(255)},
                          {1, 0xff, 1, n(-1)},
                          {1, 0x80, 1, n(-128)},
                          {1, 0x7f, 1, n(127)},
                          {2, 0xfffe, 2, n(65534)},
                          {3, 0xfffe, 2, n(-2)},
                          {4, 0xfffffffe, 4, n(4294967294)},
                          {5, 0xfffffffe, 4, n(-2)},
                          {6, std::bit_cast<std::uint32_t>(-1.5f), 4, -1.5},
                          {7, 0, 1, false},
                          {7, 1, 1, true},
                          {7, 2, 1, true},
                          {10, 5, 8, n(5)},
                          {10, UINT64_MAX, 8, n(INT64_MAX)},
                          {11, UINT64_MAX - 6, 8, n(-7)},
                          {12, std::bit_cast<std::uint64_t>(0.1), 8, 0.1}};
  for (const value& v : values) {
    INFO(v.type << ' ' << v.bits);
    const auto put = [&](written& w) {
      for (int i = 0; i < v.size; ++i) w.add(static_cast<std::uint8_t>(v.bits >> (8 * i)));
    };
    written file = head(3);
    file.key("one", v.type);
    put(file);
    file.key("list", 9).add(v.type).add(std::uint64_t{2});
    put(file);
    put(file);
    file.key("behind", 8).add_text("x");
    const gguf_metadata keys = parse_gguf_metadata(file.bytes, "m.gguf");
    CHECK(keys.at("one") == v.expected);
    CHECK(keys.at("behind") == moeroute::gguf_value(std::string("x")));
    const auto* whole = std::get_if<std::int64_t>(&v.expected);
    const auto* flag = std::get_if<bool>(&v.expected);
    if (whole != nullptr || flag != nullptr)
      CHECK(keys.at("list") ==
            moeroute::gguf_value(std::vector<std::int64_t>(2, whole != nullptr ? *whole : *flag)));
    else
      CHECK(std::holds_alternative<std::monostate>(keys.at("list")));
  }
}

TEST_CASE("lists of up to 4096 whole numbers are kept, longer ones passed over") {
  written file = head(3);
  for (const std::uint32_t length : {4096u, 4097u}) {
    file.key(std::to_string(length), 9).add(std::uint32_t{4}).add(std::uint64_t{length});
    for (std::uint32_t i = 0; i < length; ++i) file.add(i);
  }
  file.key("behind", 4).add(std::uint32_t{7});
  const gguf_metadata keys = parse_gguf_metadata(file.bytes, "m.gguf");
  const auto& list = std::get<std::vector<std::int64_t>>(keys.at("4096"));
  CHECK(list.size() == 4096);
  CHECK(list.back() == 4095);
  CHECK(std::holds_alternative<std::monostate>(keys.at("4097")));
  CHECK(std::get<std::int64_t>(keys.at("behind")) == 7);
}

TEST_CASE("bytes that are no metadata are refused") {
  const auto refused = [](const written& w) {
    try {
      (void)parse_gguf_metadata(w.bytes, "m.gguf");
    } catch (const moeroute::error& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  written twice = head(2);
  twice.key("a", 7).add(std::uint8_t{1}).key("a", 7).add(std::uint8_t{1});
  CHECK(refused(twice) == "moeroute::gguf: m.gguf: key 'a' stands there twice at offset 52");
  for (const std::uint32_t type : {13u, 14u, 255u}) {
    written strange = head(1);
    strange.key("a", type);
    CHECK(refused(strange) == "moeroute::gguf: m.gguf: expected the type of a value, found " +
                                  std::to_string(type) + " at offset 37");
  }
  for (const std::uint32_t of : {9u, 13u}) {
    written nested = head(1);
    nested.key("a", 9).add(of).add(std::uint64_t{1});
    CHECK(refused(nested) ==
          "moeroute::gguf: m.gguf: expected an array of numbers or texts at offset 49");
  }
  written longer = head(1);
  longer.key("a", 9).add(std::uint32_t{4}).add(UINT64_MAX);
  CHECK(refused(longer) ==
        "moeroute::gguf: m.gguf: expected an array of numbers or texts at offset 49");
  written round = head(1);  // so many values of eight bytes that their bytes count from 0 again
  round.key("a", 9).add(std::uint32_t{12}).add(std::uint64_t{1} << 61);
  CHECK(refused(round) ==
        "moeroute::gguf: m.gguf: expected an array of numbers or texts at offset 49");
  written most = head(1);
  most.key("a", 9).add(std::uint32_t{4}).add(UINT64_MAX / 8);
  CHECK(refused(most) ==
        "moeroute::gguf: m.gguf: expected 9223372036854775804 bytes at offset 49, there are 0");
  written huge = head(1);
  huge.add(UINT64_MAX);
  CHECK(refused(huge) ==
        "moeroute::gguf: m.gguf: expected 18446744073709551615 bytes at offset 32, there are 0");
  written other;
  other.add(std::uint32_t{0x46554748}).add(std::uint32_t{3});
  CHECK(refused(other) == "moeroute::gguf: m.gguf: expected a GGUF file at offset 4");
  for (const std::uint32_t version : {1u, 2u, 3u, 4u}) {
    written w;
    w.add(std::uint32_t{0x46554747}).add(version).add(std::uint64_t{9}).add(std::uint64_t{0});
    CHECK(refused(w) == (version == 2 || version == 3
                             ? "accepted"
                             : "moeroute::gguf: m.gguf: expected version 2 or 3, found " +
                                   std::to_string(version) + " at offset 8"));
  }
}

TEST_CASE(
    "words of routing are seen in any spelling, shared ones where none of others' is beside") {
  using moeroute::detail::speaks_of_routing;
  using moeroute::detail::words_of;
  using words = std::vector<std::string>;
  CHECK(words_of("moe_topK-prob") == words{"moe", "top", "k", "prob"});
  CHECK(words_of("..numExperts.PER__2b") == words{"num", "experts", "per", "2b"});
  CHECK((words_of("").empty() && words_of("__").empty()));
  for (const char* const key :
       {"attn_xexpertx", "vision.subrouter", "kv_moex", "conv-Routing", "top_k", "myTopK"})
    CHECK(speaks_of_routing(key));
  for (const char* const key : {"", "amoe", "abrout", "top", "k_top", "top_p", "topk2", "gated"})
    CHECK_FALSE(speaks_of_routing(key));
  std::istringstream shared(
      "gate gates gating score scores scoring scorer group groups grouped topk jitter capacity "
      "softcap softcapping balance balancing aux noaux hash renormalize sinkhorn"),
      others(
          "attn attention index indexer mamba ssm vision image video audio mtp nextn kv key query "
          "value conv final lora quant beam code linear hc rope speech");
  std::string wrong;
  for (std::string word; shared >> word;)
    if (!speaks_of_routing("a_" + word)) wrong += word + " ";
  for (std::string word; others >> word;)
    for (const std::string& key : {word + "_gate", "gate." + word, word + "_top_k", word})
      if (speaks_of_routing(key)) wrong += key + " ";
  CHECK(wrong == "");
}

TEST_CASE("the keys that change no routing are these, word for word") {
  // The sum of their hashes, in any order: a key more, less or misspelt is another sum.
  const auto sum_of = [](const auto& keys) {
    std::uint64_t sum = 0;
    for (const std::string_view key : keys) {
      std::uint64_t hash = 1469598103934665603u;
      for (const char c : key) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
      sum += hash;
    }
    return sum;
  };
  CHECK(std::size(moeroute::detail::harmless_config_keys) == 120);
  CHECK(sum_of(moeroute::detail::harmless_config_keys) == 0x385168812fac8e5bu);
  CHECK(std::size(moeroute::detail::harmless_gguf_keys) == 11);
  CHECK(sum_of(moeroute::detail::harmless_gguf_keys) == 0x98c73f674928e4a0u);
}
