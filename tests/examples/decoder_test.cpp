#include "support/decoder.hpp"

#include "model_copy.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>

namespace decoder_test {

using namespace example;
using namespace example::fixture;

namespace {

model load(const std::filesystem::path& directory) {
  return load_model(directory, read_model_config(directory), [](index_t) {});
}

}  // namespace

TEST_CASE("router logits on the bundled texts are those of the recorded traces") {
  model weights = load(bundled_model());
  const index_t segment = 256;
  const index_t tokens = 256;
  decoder decode(weights, segment, moeroute::serial{});
  for (const char* domain : {"python", "c", "english"}) {
    const npy_array trace =
        read_npy(bundled_model() / "traces" / join("router_logits_", domain, ".npy"));
    const token_ids text =
        byte_tokens(input_file(bundled_model() / "text" / join(domain, ".txt")).text(10'000));
    float worst = 0;
    index_t compared = 0;
    for (index_t first = 0; first < tokens; first += segment) {
      decode.reset();
      decode.run({text.data() + first, static_cast<std::size_t>(segment)}, wanted_logits::last,
                 [&](const layer_routing& found) {
                   for (index_t t = 0; t < segment; ++t) {
                     for (index_t e = 0; e < found.logits.cols; ++e) {
                       const auto at = static_cast<std::size_t>(
                           (static_cast<index_t>(found.layer) * 2048 + first + t) * 32 + e);
                       worst = std::max(worst, std::abs(found.logits(t, e) - trace.values[at]));
                       ++compared;
                     }
                   }
                 });
    }
    CHECK(compared == 4 * tokens * 32);
    CHECK(worst < 2e-4F);
  }
}

TEST_CASE("decoding token by token gives the bits of a prefill, also past one round of rows") {
  model weights = load(bundled_model());
  const token_ids text =
      byte_tokens(input_file(bundled_model() / "text" / "english.txt").text(10'000).substr(0, 300));
  decoder whole(weights, 300, moeroute::serial{});
  const auto at_once = whole.run(text, wanted_logits::all);
  decoder stepwise(weights, 300, moeroute::serial{});
  index_t different = 0;
  for (std::size_t t = 0; t < text.size(); ++t) {
    const auto one = stepwise.run({text.data() + t, 1});
    different +=
        std::equal(one.data, one.data + one.cols, at_once.row(static_cast<index_t>(t))) ? 0 : 1;
  }
  CHECK(different == 0);
}

TEST_CASE("a fresh context forgets the one before") {
  model weights = load(bundled_model() / "variants" / "mixtral");
  const token_ids text = byte_tokens("the same words");
  decoder decode(weights, 64, moeroute::serial{});
  const auto first = decode.run(text);
  const std::vector<float> before(first.data, first.data + first.cols);
  static_cast<void>(decode.run(byte_tokens("and others")));
  decode.reset();
  const auto again = decode.run(text);
  CHECK(std::equal(before.begin(), before.end(), again.data));
}

TEST_CASE("clipping bounds queries, keys and values before anything else sees them") {
  const model_copy copy;
  model plain = load(copy.path());
  copy.edit("config.json", [](json& config) { config["clip_qkv"] = 1e30; });
  model wide = load(copy.path());
  copy.edit("config.json", [](json& config) { config["clip_qkv"] = 1e-3; });
  model narrow = load(copy.path());
  const token_ids text = byte_tokens("clip");
  const auto logits = [&](model& weights) {
    decoder decode(weights, 8, moeroute::serial{});
    const auto row = decode.run(text);
    return std::vector<float>(row.data, row.data + row.cols);
  };
  CHECK(logits(wide) == logits(plain));
  CHECK(logits(narrow) != logits(plain));
}

}  // namespace decoder_test
