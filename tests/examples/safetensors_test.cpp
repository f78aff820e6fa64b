#include "support/safetensors.hpp"

#include "scratch_checkpoint.hpp"
#include "support/checkpoint.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <sys/stat.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

namespace safetensors_test {

using namespace example;
using namespace example::fixture;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::EndsWith;

namespace {

std::string open_refusal(const std::string& content) {
  const scratch_folder folder;
  const auto path = folder.write("model.safetensors", content);
  return refusal([&] { const safetensors_file file(path); });
}

std::string header_refusal(const std::string& header, std::size_t data_bytes = 16) {
  return open_refusal(safetensors_bytes(header, std::string(data_bytes, '\0')));
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

}  // namespace

TEST_CASE("a tensor is read with the values it was written with, from any element on") {
  const scratch_folder folder;
  const auto path = folder.write(
      "model.safetensors",
      safetensors_bytes(
          R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})",
          bytes_of({1.5F, -2.0F, 3.25F, 1e-30F})));
  const safetensors_file file(path);
  file.require("a", {2, 2});
  std::vector<float> values(4);
  file.read("a", 0, values);
  CHECK(values == std::vector<float>{1.5F, -2.0F, 3.25F, 1e-30F});
  std::vector<float> tail(2);
  file.read("a", 2, tail);
  CHECK(tail == std::vector<float>{3.25F, 1e-30F});
}

TEST_CASE("bfloat16 tensors longer than one read piece widen exactly") {
  const std::size_t count = 20'000;
  std::string data;
  std::vector<float> expected;
  for (std::size_t i = 0; i < count; ++i) {
    const auto bits = static_cast<std::uint16_t>(0x3f00U + i % 300);
    data.append(reinterpret_cast<const char*>(&bits), 2);
    expected.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16));
  }
  const scratch_folder folder;
  const safetensors_file file(folder.write(
      "model.safetensors", safetensors_bytes(entry("BF16", "[20000]", "[0,40000]"), data)));
  std::vector<float> values(count);
  file.read("a", 0, values);
  CHECK(values == expected);
}

TEST_CASE("every kind of half-precision number widens to its value") {
  CHECK(widen_f16(0x3c00) == 1.0F);
  CHECK(widen_f16(0xc000) == -2.0F);
  CHECK(widen_f16(0x7bff) == 65504.0F);
  CHECK(widen_f16(0x0001) == 0x1p-24F);
  CHECK(widen_f16(0x03ff) == 1023 * 0x1p-24F);
  CHECK(widen_f16(0x0400) == 0x1p-14F);
  CHECK(widen_f16(0x7c00) == std::numeric_limits<float>::infinity());
  CHECK(std::isnan(widen_f16(0x7e00)));
  CHECK(std::signbit(widen_f16(0x8000)));
  CHECK(widen_f16(0x8000) == 0.0F);
}

TEST_CASE("a file shorter than its header says is refused") {
  CHECK_THAT(open_refusal(""), EndsWith("expected a safetensors file, found only 0 bytes"));
  CHECK_THAT(open_refusal("1234567"), ContainsSubstring("found only 7 bytes"));
  CHECK_THAT(open_refusal(std::string(8, '\xff') + "{}"),
             ContainsSubstring("header length 18446744073709551615: expected at most 2"));
  CHECK_THAT(open_refusal(std::string("\x20\0\0\0\0\0\0\0{}", 10)),
             ContainsSubstring("header length 32: expected at most 2"));
}

TEST_CASE("a header that is not a JSON object is refused") {
  CHECK_THAT(header_refusal("{\"a\":"), ContainsSubstring(": expected JSON text"));
  CHECK_THAT(header_refusal("\x80\x02}q\x01"), ContainsSubstring(": expected JSON text"));
  CHECK_THAT(header_refusal("[1]"), EndsWith("header: expected a JSON object, found array"));
  CHECK_THAT(header_refusal(R"({"a":7})"),
             EndsWith("tensor 'a': expected a JSON object, found number"));
  CHECK_THAT(header_refusal(std::string(100'000, '[')), ContainsSubstring(": expected JSON text"));
}

TEST_CASE("a tensor description with a field missing or of a wrong type is refused with its name") {
  CHECK_THAT(header_refusal(R"({"a":{"dtype":"F32","shape":[4]}})"),
             EndsWith("tensor 'a': field 'data_offsets' is missing"));
  CHECK_THAT(header_refusal(R"({"a":{"dtype":4,"shape":[4],"data_offsets":[0,16]}})"),
             EndsWith("tensor 'a': field 'dtype': expected a string, found 4"));
  CHECK_THAT(header_refusal(entry("F32", "4", "[0,16]")),
             EndsWith("tensor 'a': field 'shape': expected an array, found 4"));
  CHECK_THAT(header_refusal(entry("F32", "[4]", "[0,8,16]")),
             EndsWith("field 'data_offsets': expected 2 integers, found 3"));
}

TEST_CASE("sizes that are negative, fractional or not numbers are refused") {
  CHECK_THAT(header_refusal(entry("F32", "[-4]", "[0,16]")),
             EndsWith("tensor 'a': field 'shape': expected integers from 0 on, found -4"));
  CHECK_THAT(header_refusal(entry("F32", "[4.0]", "[0,16]")), ContainsSubstring("found 4.0"));
  CHECK_THAT(header_refusal(entry("F32", "[\"4\"]", "[0,16]")), ContainsSubstring("found string"));
  CHECK_THAT(header_refusal(entry("F32", "[4]", "[-16,0]")),
             EndsWith("field 'data_offsets': expected integers from 0 on, found -16"));
  CHECK_THAT(header_refusal(entry("F32", "[4]", "[0,99999999999999999999]")),
             ContainsSubstring("expected integers from 0 on"));
}

TEST_CASE("a tensor whose offsets lie past the end or run backwards is refused with its name") {
  CHECK_THAT(header_refusal(entry("F32", "[5]", "[0,20]")),
             EndsWith("tensor 'a': data_offsets [0, 20]: expected a range within the file's 16 "
                      "bytes of data"));
  CHECK_THAT(header_refusal(entry("F32", "[4]", "[18446744073709551600,18446744073709551615]")),
             ContainsSubstring("expected a range within"));
  CHECK_THAT(header_refusal(entry("F32", "[4]", "[16,0]")),
             ContainsSubstring("data_offsets [16, 0]: expected a range"));
}

TEST_CASE("a shape that does not fill its offsets is refused, also where its size overflows") {
  CHECK_THAT(header_refusal(entry("F32", "[3]", "[0,16]")),
             EndsWith("data_offsets span 16 bytes, expected 12 for F32 of shape [3]"));
  CHECK_THAT(header_refusal(entry("F32", "[4611686018427387904,4]", "[0,0]")),
             ContainsSubstring("expected more than 64 bits can count"));
  CHECK_THAT(header_refusal(entry("F32", "[9223372036854775808,2,2]", "[0,0]")),
             ContainsSubstring("expected more than 64 bits can count"));
}

TEST_CASE("two tensors that share bytes are refused") {
  CHECK_THAT(header_refusal(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},)"
                            R"("b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}})"),
             EndsWith("tensor 'b': expected data of its own, found it overlapping tensor 'a'"));
}

TEST_CASE("a tensor of another shape, of a dtype that is no float, or absent is refused on use") {
  const scratch_folder folder;
  const safetensors_file file(folder.write(
      "model.safetensors",
      safetensors_bytes(R"({"a":{"dtype":"F32","shape":[32,1],"data_offsets":[0,128]},)"
                        R"("ids":{"dtype":"I64","shape":[2],"data_offsets":[128,144]},)"
                        R"("odd":{"dtype":"F4","shape":[2],"data_offsets":[144,145]}})",
                        std::string(145, '\0'))));
  CHECK_THAT(refusal([&] { file.require("a", {32, 128}); }),
             EndsWith("model.safetensors: tensor 'a': expected shape [32, 128], found [32, 1]"));
  CHECK_THAT(refusal([&] { file.require("a", {32}); }), EndsWith("found [32, 1]"));
  CHECK_THAT(refusal([&] { file.require("ids", {2}); }),
             EndsWith("tensor 'ids': expected dtype F32, BF16 or F16, found I64"));
  CHECK_THAT(refusal([&] { file.require("odd", {2}); }), EndsWith("found F4"));
  CHECK_THAT(refusal([&] { file.require("b", {2}); }), EndsWith("tensor 'b' is missing"));
}

TEST_CASE("what is no regular file is refused without waiting for it") {
  const scratch_folder folder;
  CHECK_THAT(refusal([&] { const safetensors_file file(folder.path() / "none"); }),
             EndsWith("none: no such file"));
  CHECK_THAT(refusal([&] { const safetensors_file file(folder.path()); }),
             EndsWith("expected a regular file"));
  const auto pipe = folder.path() / "pipe";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  CHECK_THAT(refusal([&] { const safetensors_file file(pipe); }),
             EndsWith("expected a regular file"));
}

TEST_CASE("a sharded checkpoint finds each tensor in the file that its index names") {
  const scratch_folder folder;
  const std::string header = entry("F32", "[1]", "[0,4]");
  const std::string second = R"({"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  static_cast<void>(folder.write("one.safetensors", safetensors_bytes(header, bytes_of({1.0F}))));
  static_cast<void>(folder.write("two.safetensors", safetensors_bytes(second, bytes_of({2.0F}))));
  const auto index = [&](const std::string& map) {
    static_cast<void>(folder.write("model.safetensors.index.json", "{\"weight_map\":" + map + "}"));
  };
  index(R"({"a":"one.safetensors","b":"two.safetensors"})");
  {
    const checkpoint tensors(folder.path());
    tensors.require("b", {1});
    float value = 0;
    tensors.read("b", 0, {&value, 1});
    CHECK(value == 2.0F);
    CHECK_THAT(refusal([&] { tensors.require("c", {1}); }),
               EndsWith("model.safetensors.index.json: tensor 'c' is missing"));
  }
  const auto open = [&] { const checkpoint tensors(folder.path()); };
  index(R"({"a":"one.safetensors","b":"one.safetensors"})");
  CHECK_THAT(refusal(open), ContainsSubstring("one.safetensors: tensor 'b' is missing"));
  index(R"({"a":"three.safetensors"})");
  CHECK_THAT(refusal(open), EndsWith("three.safetensors: no such file"));
  index(R"({"a":"../one.safetensors"})");
  CHECK_THAT(refusal(open), EndsWith("expected a file name without folders, found "
                                     "'../one.safetensors'"));
  index(R"({"a":3})");
  CHECK_THAT(refusal(open), EndsWith("tensor 'a': expected a file name, found number"));
  index("[]");
  CHECK_THAT(refusal(open), ContainsSubstring("field 'weight_map': expected an object"));
}

}  // namespace safetensors_test
