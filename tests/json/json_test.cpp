#include <moeroute/json/json.hpp>
#include <moeroute/json/routing_words.hpp>

#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

using moeroute::parse_json;

namespace {

std::string text_refusal(const std::string& text) {
  try {
    (void)parse_json(text, "a.json");
  } catch (const moeroute::error& e) {
    return e.what();
  }
  return "";
}

}  // namespace

TEST_CASE("a document is what the library makes of it") {
  for (const char* text :
       {"[]", "{}", "3", "-1.5e3", "null", "true", R"("a\"b\\")", R"({"a": [1, {"b": [[], {}]}],
        "c": "\u00e9", "d": 18446744073709551615, "e": -9223372036854775808})"})
    CHECK(parse_json(text, "a.json") == nlohmann::json::parse(text));
}

TEST_CASE("a key's words end at a hump and at what is no letter or digit, and are small") {
  using words = std::vector<std::string>;
  CHECK(moeroute::detail::words_of("moe_topK-prob") == words{"moe", "top", "k", "prob"});
  CHECK(moeroute::detail::words_of("numExpertsDropped") == words{"num", "experts", "dropped"});
  CHECK(moeroute::detail::words_of("_MOE__top2.") == words{"moe", "top2"});
  CHECK(moeroute::detail::words_of("").empty());
}

TEST_CASE("top and k side by side speak of routing, wherever they stand, and not the other way") {
  using moeroute::detail::speaks_of_routing;
  for (const char* key : {"top_k", "top_k_bias", "norm_top_k", "topK"})
    CHECK(speaks_of_routing(key));
  for (const char* key : {"k_top", "top", "k", "top_down_k", "index_top_k", "top_k_attention"})
    CHECK_FALSE(speaks_of_routing(key));
}

TEST_CASE("Python's numbers are read outside strings, as strings of their letters") {
  const auto read =
      parse_json(R"({"NaN": [NaN, Infinity, -Infinity], "s": "NaN \" -Infinity"})", "a.json");
  CHECK(read == nlohmann::json::parse(
                    R"({"NaN": ["NaN", "Infinity", "-Infinity"], "s": "NaN \" -Infinity"})"));
  CHECK(parse_json("NaN", "a.json") == nlohmann::json("NaN"));
  // Beside a letter it is none, whichever letter.
  const std::string found = ": expected JSON text, found something else";
  for (const char* text : {"[NaNs]", "[NaNa]", "[NaNz]", "[NaNA]", "[NaNZ]"})
    CHECK(text_refusal(text) == "moeroute::json: a.json: line 1, column 2" + found);
  CHECK(text_refusal("[trueNaN]") == "moeroute::json: a.json: line 1, column 6" + found);
}

TEST_CASE("what is no JSON is refused with line and column") {
  const std::string found = ": expected JSON text, found something else";
  CHECK(text_refusal("") == "moeroute::json: a.json: line 1, column 1" + found);
  CHECK(text_refusal("{\"a\": 1,\n \"b\" 2}") ==
        "moeroute::json: a.json: line 2, column 6" + found);
  CHECK(text_refusal("[NaN, Infinity,\n NaN, x]") ==
        "moeroute::json: a.json: line 2, column 7" + found);
  CHECK(text_refusal("[1] 2") == "moeroute::json: a.json: line 1, column 5" + found);
  // Behind the place nothing counts; a misplaced number of Python's is refused at its last letter.
  CHECK(text_refusal("[x,\n NaN]") == "moeroute::json: a.json: line 1, column 2" + found);
  CHECK(text_refusal("[1 NaN]") == "moeroute::json: a.json: line 1, column 6" + found);
  CHECK(text_refusal("[NaN NaN, Infinity]") == "moeroute::json: a.json: line 1, column 8" + found);
  CHECK(text_refusal("[1e999]") ==
        "moeroute::json: a.json: line 1, column 6: expected numbers that fit their type, found a "
        "larger one");
}

TEST_CASE("a key that an object has twice is refused") {
  CHECK(text_refusal(R"({"a": 1, "b": {"a": 2}, "a": 1})") ==
        "moeroute::json: a.json: key 'a' stands there twice");
  CHECK(text_refusal(R"({"a": {"c\n": 1, "c\n": 2}})") ==
        "moeroute::json: a.json: key 'c?' stands there twice");
  CHECK(text_refusal(R"([{"a": 1}, {"a": 1}])").empty());
}

TEST_CASE("a name in a message stays as it is, but for what would end its line") {
  for (int c = 0; c < 256; ++c) {
    const std::string name(1, static_cast<char>(c));
    CHECK(moeroute::detail::printable(name) == (c < 0x20 || c == 0x7f ? "?" : name));
  }
  CHECK(text_refusal("{\"größe\": 1, \"größe\": 2}") ==
        "moeroute::json: a.json: key 'größe' stands there twice");
}

TEST_CASE("deep nesting is read without deep recursion") {
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  CHECK(text_refusal(deep).empty());
}

TEST_CASE("null is there, and is not a value") {
  const auto document = parse_json(R"({"a": null, "b": 1})", "a.json");
  const moeroute::json_fields fields(document, "a.json");
  CHECK(fields.said("a"));
  CHECK_FALSE(fields.has("a"));
  CHECK_FALSE(fields.said("c"));
  CHECK(fields.asked("a"));
  CHECK_FALSE(fields.asked("b"));
  const auto refused = [&](auto&& f) {
    try {
      f();
    } catch (const moeroute::error& e) {
      return std::string(e.what()).substr(std::string("moeroute::json: a.json: field ").size());
    }
    return std::string("accepted");
  };
  CHECK(refused([&] { (void)fields.integer("a", 0, 3); }) ==
        "'a': expected an integer from 0 to 3, found null");
  // The ends of a range and one beyond; what is -1 where it is read with a sign.
  CHECK(fields.integer("b", 1, 1) == 1);
  CHECK(refused([&] { (void)fields.integer("b", 2, 3); }) ==
        "'b': expected an integer from 2 to 3, found 1");
  CHECK(refused([&] { (void)fields.integer("b", 0, 0); }) ==
        "'b': expected an integer from 0 to 0, found 1");
  const nlohmann::json numbers{{"most", UINT64_MAX}, {"none", 0.0}, {"beyond", HUGE_VAL}};
  const moeroute::json_fields of(numbers, "a.json");
  CHECK(refused([&] { (void)of.integer("most", -1, 3); }) ==
        "'most': expected an integer from -1 to 3, found 18446744073709551615");
  CHECK(refused([&] { (void)of.positive("none"); }) ==
        "'none': expected a positive number, found 0.0");
  CHECK(refused([&] { (void)of.positive("beyond"); }) ==
        "'beyond': expected a positive number, found null");
  CHECK((fields.flag("a", true) && !fields.flag("c", false)));
  CHECK(refused([&] { (void)fields.flag("b", true); }) == "'b': expected true or false, found 1");
  const std::string longest(40, 'x');
  CHECK(moeroute::json_fields::show(longest) == "'" + longest + "'");
  CHECK(moeroute::json_fields::show(longest + "x") == "a value of type string");
}

TEST_CASE("a number of Python's in a key's place is refused where it stands") {
  const std::string found = ": expected JSON text, found something else";
  for (const char* word : {"NaN", "Infinity", "-Infinity"}) {
    const char column = word[0] == '-' ? '3' : '2';  // behind the sign, which may begin a number
    CHECK(text_refusal("{" + std::string(word) + ": 1}") ==
          "moeroute::json: a.json: line 1, column " + (column + found));
    CHECK(text_refusal("{\"a\": NaN,\n " + std::string(word) + "\t :1}") ==
          "moeroute::json: a.json: line 2, column " + (column + found));
  }
  CHECK(text_refusal("{\"a\": NaN , \"b\": [Infinity\n]}").empty());
}
