#include <moeroute/json/gguf.hpp>

#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cstdint>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

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
  same(keys_of("deepseek2", {{"expert_count", n(160)},
                             {"expert_used_count", n(6)},
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
  CHECK(keys_refusal(keys_of("llama", {{"expert_count", n(8)}})) ==
        "moeroute::gguf: m.gguf: key 'llama.expert_used_count': expected a whole number, found "
        "none");
  CHECK(with("expert_used_count", n(9)).find("expected a whole number from 1 to 8, found 9") !=
        std::string::npos);
  CHECK(with("expert_count", 8.0).find("found 8") != std::string::npos);
  // What each key allows and all together do not.
  const std::string uneven = keys_refusal(keys_of("deepseek2", {{"expert_count", n(160)},
                                                                {"expert_used_count", n(6)},
                                                                {"expert_weights_scale", 16.0},
                                                                {"expert_group_count", n(7)},
                                                                {"expert_group_used_count", n(3)},
                                                                {"expert_weights_norm", false}}));
  CHECK(uneven.find("groups is 7, expected a divisor of E = 160") != std::string::npos);
  const std::string kept = keys_refusal(keys_of("deepseek2", {{"expert_count", n(160)},
                                                              {"expert_used_count", n(6)},
                                                              {"expert_weights_scale", 16.0},
                                                              {"expert_group_count", n(8)},
                                                              {"expert_weights_norm", false}}));
  CHECK(kept.find("how many groups are kept") != std::string::npos);
  CHECK(with("expert_gating_func", n(2))
            .find("'llama.expert_gating_func': expected that of "
                  "mixtral, softmax, found 2") != std::string::npos);
  CHECK(with("expert_weights_norm", false).find("'llama.expert_weights_norm'") !=
        std::string::npos);
  CHECK(with("expert_weights_scale", 2.0).find("expected 0 or 1, found 2") != std::string::npos);
  CHECK(with("expert_group_count", n(4)).find("'llama.expert_group_count'") != std::string::npos);
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
  written strange = head(1);
  strange.key("a", 13);
  CHECK(refused(strange).find("expected the type of a value, found 13") != std::string::npos);
  written nested = head(1);
  nested.key("a", 9).add(std::uint32_t{9}).add(std::uint64_t{1});
  CHECK(refused(nested).find("expected an array of numbers or texts") != std::string::npos);
  written longer = head(1);
  longer.key("a", 9).add(std::uint32_t{4}).add(UINT64_MAX);
  CHECK(refused(longer).find("expected an array of numbers or texts") != std::string::npos);
  written huge = head(1);
  huge.add(UINT64_MAX);
  CHECK(refused(huge).find("expected 18446744073709551615 bytes") != std::string::npos);
}
