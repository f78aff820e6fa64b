#include "support/config.hpp"

#include "scratch_checkpoint.hpp"

#include <string>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

namespace config_test {

using namespace example;
using namespace example::fixture;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::EndsWith;

namespace {

json bundled(const std::string& folder) {
  return read_json(bundled_model() / folder / "config.json");
}

model_config read(const json& document) {
  const scratch_folder folder;
  return read_config(folder.write("config.json", document.dump()));
}

/// The refusal of the bundled configuration with one field set otherwise.
std::string changed(const std::string& field, const json& value) {
  json document = bundled(".");
  document[field] = value;
  return refusal([&] { static_cast<void>(read(document)); });
}

std::string without(const std::string& field) {
  json document = bundled(".");
  document.erase(field);
  return refusal([&] { static_cast<void>(read(document)); });
}

}  // namespace

TEST_CASE("both spellings of a configuration mean the same") {
  json newer = bundled(".");
  json older = newer;
  older["num_experts"] = older["num_local_experts"];
  older["rope_theta"] = older["rope_parameters"]["rope_theta"];
  older["torch_dtype"] = older["dtype"];
  for (const char* field : {"num_local_experts", "rope_parameters", "dtype"}) {
    older.erase(field);
  }
  const model_config a = read(newer);
  const model_config b = read(older);
  CHECK(a.router == b.router);
  CHECK(b.experts() == 32);
  CHECK(a.rope_theta == 10000.0);
  CHECK(b.rope_theta == 10000.0);
}

TEST_CASE("what a family leaves out takes the value that its models have") {
  const model_config mixtral = read(bundled("variants/mixtral"));
  CHECK(mixtral.router.normalize == moeroute::normalization::sum);
  CHECK(mixtral.head_dim == 16);
  CHECK(mixtral.expert_width == 48);
  const model_config olmoe = read(bundled("variants/olmoe"));
  CHECK(olmoe.router.normalize == moeroute::normalization::none);
  CHECK_FALSE(olmoe.tied_head);
  CHECK(olmoe.experts() == 16);
  const model_config qwen3 = read(bundled("."));
  CHECK(qwen3.expert_width == 64);
  CHECK(qwen3.tied_head);
}

TEST_CASE("a configuration without a needed field is refused with the field's name") {
  for (const char* field : {"model_type", "vocab_size", "hidden_size", "num_hidden_layers",
                            "num_attention_heads", "num_experts_per_tok", "moe_intermediate_size",
                            "max_position_embeddings", "rms_norm_eps"}) {
    CHECK_THAT(without(field), EndsWith(join("config.json: field '", field, "' is missing")));
  }
  CHECK_THAT(without("num_local_experts"), EndsWith("field 'num_experts' is missing") ||
                                               EndsWith("field 'num_local_experts' is missing"));
  CHECK_THAT(without("rope_parameters"), EndsWith("field 'rope_theta' is missing"));
}

TEST_CASE("a field of a wrong type or size is refused with what was expected") {
  CHECK_THAT(changed("hidden_size", "128"),
             EndsWith("field 'hidden_size': expected an integer from 1 to 16777216, found "
                      "'128'"));
  CHECK_THAT(changed("hidden_size", -1), EndsWith("found -1"));
  CHECK_THAT(changed("hidden_size", 0), EndsWith("found 0"));
  CHECK_THAT(changed("hidden_size", 128.5), EndsWith("found 128.5"));
  CHECK_THAT(changed("vocab_size", UINT64_MAX), EndsWith("found 18446744073709551615"));
  CHECK_THAT(changed("num_hidden_layers", json::array()), EndsWith("found a value of type array"));
  CHECK_THAT(changed("rms_norm_eps", 0), ContainsSubstring("expected a positive number"));
  CHECK_THAT(changed("norm_topk_prob", 1), EndsWith("expected true or false, found 1"));
  CHECK_THAT(changed("rope_parameters", json{{"rope_theta", "x"}}),
             ContainsSubstring("'rope_parameters': field 'rope_theta': expected a positive"));
}

TEST_CASE("more experts per token than there are experts are refused") {
  CHECK_THAT(changed("num_experts_per_tok", 33),
             EndsWith("field 'num_experts_per_tok': expected an integer from 1 to 32, found 33"));
  CHECK(changed("num_experts_per_tok", 32).empty());
}

TEST_CASE("head counts that do not divide are refused") {
  CHECK_THAT(changed("num_key_value_heads", 3),
             ContainsSubstring("expected a divisor of num_attention_heads (4), found 3"));
  CHECK_THAT(changed("head_dim", 31), EndsWith("expected an even number, found 31"));
  json document = bundled("variants/mixtral");
  document["num_attention_heads"] = 6;
  CHECK_THAT(refusal([&] { static_cast<void>(read(document)); }),
             ContainsSubstring("expected a divisor of hidden_size (64), found 6"));
}

TEST_CASE("an unknown model type, and what the forward pass does not compute, is refused") {
  CHECK_THAT(changed("model_type", "gpt2"),
             EndsWith("field 'model_type': expected qwen3_moe, mixtral or olmoe, found 'gpt2'"));
  CHECK_THAT(changed("hidden_act", "gelu"), ContainsSubstring("field 'hidden_act'"));
  CHECK_THAT(changed("attention_bias", true), ContainsSubstring("field 'attention_bias'"));
  CHECK_THAT(changed("mlp_only_layers", json{1}), ContainsSubstring("every layer has experts"));
  CHECK_THAT(changed("first_k_dense_replace", 1), ContainsSubstring("experts in every layer"));
  CHECK_THAT(changed("router_temperature", 2), ContainsSubstring("field 'router_temperature'"));
  CHECK_THAT(changed("decoder_sparse_step", 2), ContainsSubstring("every layer has experts"));
  CHECK_THAT(changed("rope_scaling", json{{"type", "yarn"}}),
             ContainsSubstring("field 'rope_scaling'"));
  json sliding = bundled("variants/mixtral");
  sliding["sliding_window"] = 64;
  CHECK_THAT(refusal([&] { static_cast<void>(read(sliding)); }),
             ContainsSubstring("field 'sliding_window'"));
}

TEST_CASE("a file that is no JSON object is refused") {
  const scratch_folder folder;
  const auto read_text = [&](const std::string& text) {
    const auto path = folder.write("config.json", text);
    return refusal([&] { static_cast<void>(read_config(path)); });
  };
  CHECK_THAT(read_text(""), EndsWith("config.json: line 1, column 1: expected JSON text, found "
                                     "something else"));
  CHECK_THAT(read_text("\x7f"
                       "ELF"),
             EndsWith("expected JSON text, found something else"));
  CHECK_THAT(read_text("3"), EndsWith("config.json: expected a JSON object, found number"));
  CHECK_THAT(read_text("{\"vocab_size\": 1e999}"),
             ContainsSubstring("expected numbers that fit their type"));
}

}  // namespace config_test
