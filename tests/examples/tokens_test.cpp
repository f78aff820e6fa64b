#include "support/tokens.hpp"

#include "scratch_checkpoint.hpp"
#include "support/sampling.hpp"

#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

namespace tokens_test {

using namespace example;
using namespace example::fixture;
using Catch::Matchers::EndsWith;

namespace {

std::string printed(std::string_view bytes) {
  std::ostringstream out;
  model_config config;
  config.vocab = 256;
  token_printer printer(out, config);
  printer.write(byte_tokens(bytes));
  printer.finish();
  return out.str();
}

}  // namespace

TEST_CASE("valid text is printed as it is") {
  CHECK(printed("int main()\n\t{ }") == "int main()\n\t{ }");
  CHECK(printed("naïve → 𝄞") == "naïve → 𝄞");
}

TEST_CASE("control characters and bytes that are no UTF-8 are printed harmlessly") {
  CHECK(printed("\x1b[2J\r\x7f") == "\\x1b[2J\\x0d\\x7f");
  CHECK(printed("\xff\xc0\xaf") == "\\xff\\xc0\\xaf");           // never in UTF-8; overlong
  CHECK(printed("\xed\xa0\x80") == "\\xed\\xa0\\x80");           // a surrogate
  CHECK(printed("\xc2\x9b") == "\\xc2\\x9b");                    // a C1 control
  CHECK(printed("\xe2\x86x") == "\\xe2\\x86x");                  // broken off
  CHECK(printed("a\xe2\x86") == "a\\xe2\\x86");                  // unfinished at the end
  CHECK(printed("\xe2\xe2\x86\x92") == "\\xe2\xe2\x86\x92");     // starts anew
  CHECK(printed("\xf5\x80\x80\x80") == "\\xf5\\x80\\x80\\x80");  // past U+10FFFF
}

TEST_CASE("token ids are read from a list, and anything else in it is refused") {
  CHECK(parse_token_ids("1,2,31", 32) == token_ids{1, 2, 31});
  CHECK(parse_token_ids("", 32).empty());
  for (const char* list : {"32", "-1", "1,,2", "1,x", "1.5", " 1", "99999999999999999999"}) {
    CHECK_THAT(refusal([&] { static_cast<void>(parse_token_ids(list, 32)); }).substr(0, 47),
               EndsWith("--prompt-ids: expected token ids from 0 to 31, "));
  }
}

TEST_CASE("temperature 0 takes the largest logit, the lowest token among equals") {
  sampler pick(0.0, 1);
  CHECK(pick(std::vector<float>{1, 3, 2}) == 1);
  CHECK(pick(std::vector<float>{3, 1, 3}) == 0);
}

TEST_CASE("the same seed draws the same tokens, on every platform") {
  const std::vector<float> logits{0.0F, 0.0F, 0.0F, 0.0F};
  sampler pick(1.0, 7);
  std::vector<std::int32_t> drawn;
  for (int i = 0; i < 8; ++i) {
    drawn.push_back(pick(logits));
  }
  // Quarters of the unit interval: the two upper bits of mt19937_64 from seed 7.
  std::mt19937_64 bits(7);
  for (const std::int32_t token : drawn) {
    CHECK(token == static_cast<std::int32_t>(bits() >> 62));
  }
}

TEST_CASE("draws follow the softmax of the logits over the temperature") {
  const std::vector<float> logits{0.0F, 1.0F, -2.0F};
  const double temperature = 0.7;
  sampler pick(temperature, 11);
  std::vector<double> share(3, 0.0);
  const int draws = 200'000;
  for (int i = 0; i < draws; ++i) {
    share[static_cast<std::size_t>(pick(logits))] += 1.0 / draws;
  }
  double sum = 0;
  for (const float logit : logits) {
    sum += std::exp(static_cast<double>(logit) / temperature);
  }
  for (std::size_t i = 0; i < 3; ++i) {
    const double expected = std::exp(static_cast<double>(logits[i]) / temperature) / sum;
    CHECK(std::abs(share[i] - expected) < 5 * std::sqrt(expected / draws));
  }
}

}  // namespace tokens_test
