#include "support/npy.hpp"

#include "scratch_checkpoint.hpp"

#include <string>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

namespace npy_test {

using namespace example;
using namespace example::fixture;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::EndsWith;

namespace {

std::string npy_bytes(const std::string& header, const std::vector<float>& values) {
  std::string made("\x93NUMPY\x01\x00", 8);
  made += static_cast<char>(header.size() & 255U);
  made += static_cast<char>(header.size() >> 8);
  return made + header + bytes_of(values);
}

std::string dictionary(const std::string& shape, const std::string& descr = "<f4",
                       const std::string& order = "False") {
  return "{'descr': '" + descr + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }\n";
}

std::string npy_refusal(const std::string& content) {
  const scratch_folder folder;
  const auto path = folder.write("a.npy", content);
  return refusal([&] { static_cast<void>(read_npy(path)); });
}

}  // namespace

TEST_CASE("an array is read with its shape and values") {
  const scratch_folder folder;
  const auto array =
      read_npy(folder.write("a.npy", npy_bytes(dictionary("(2, 3)"), {1, 2, 3, 4, 5, 6})));
  CHECK(array.shape == tensor_shape{2, 3});
  CHECK(array.values == std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(read_npy(folder.write("b.npy", npy_bytes(dictionary("(1,)"), {7}))).shape ==
        tensor_shape{1});
}

TEST_CASE("the bundled traces have the shape that their README states") {
  const auto array = read_npy(bundled_model() / "traces" / "router_logits_c.npy");
  CHECK(array.shape == tensor_shape{4, 2048, 32});
}

TEST_CASE("a file that is no float32 array, or not as long as its shape, is refused") {
  CHECK_THAT(npy_refusal("short"), ContainsSubstring("expected a .npy file, found only 5 bytes"));
  CHECK_THAT(npy_refusal(std::string(40, 'x')), ContainsSubstring("expected a .npy file"));
  CHECK_THAT(npy_refusal(npy_bytes(dictionary("(1,)", "<f8"), {7, 8})),
             EndsWith("values of type '<f8': expected '<f4', little-endian float32: save "
                      "logits.astype(\"<f4\")"));
  CHECK_THAT(npy_refusal(npy_bytes(dictionary("(1,)", "<f4", "True"), {7})),
             EndsWith("expected rows: save numpy.ascontiguousarray(logits)"));
  CHECK_THAT(npy_refusal(npy_bytes(dictionary("(2,)"), {7})),
             EndsWith("shape [2]: found 4 bytes of values, expected 8"));
  CHECK_THAT(npy_refusal(npy_bytes(dictionary("(4611686018427387904, 4)"), {})),
             EndsWith("expected more than 64 bits can count"));
  CHECK_THAT(npy_refusal(npy_bytes(dictionary("(99999999999999999999,)"), {7})),
             EndsWith("field 'shape': expected a tuple of sizes"));
  CHECK_THAT(npy_refusal(npy_bytes(dictionary("(-1,)"), {7})), EndsWith("a tuple of sizes"));
  CHECK_THAT(npy_refusal(std::string("\x93NUMPY\x01\x00\xff\xff{}", 12)),
             ContainsSubstring("header length 65535: expected at most 2"));
}

TEST_CASE("a header that says a thing twice, or has a NUL in it, is refused") {
  const auto twice = [](const std::string& more) {
    return "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), " + more + "}\n";
  };
  CHECK(npy_refusal(npy_bytes(twice(""), {7})).empty());
  CHECK_THAT(npy_refusal(npy_bytes(twice("'shape': (1,), "), {7})),
             EndsWith("field 'shape': expected once in the header"));
  CHECK_THAT(npy_refusal(npy_bytes(twice("'descr': '<f4', "), {7})),
             EndsWith("field 'descr': expected once in the header"));
  CHECK_THAT(npy_refusal(npy_bytes(twice("'fortran_order': True, "), {7})),
             EndsWith("field 'fortran_order': expected once in the header"));
  CHECK_THAT(npy_refusal(npy_bytes(twice(std::string("\0", 1)), {7})),
             EndsWith("expected a header of text, found a NUL"));
}

}  // namespace npy_test
