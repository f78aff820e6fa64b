#include "support/trace_app.hpp"

#include "scratch_checkpoint.hpp"
#include "support/trace_file.hpp"

#include <fstream>
#include <initializer_list>
#include <iterator>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>

#include "support/random.hpp"

namespace trace_app_test {

using namespace example;
using Catch::Matchers::ContainsSubstring;

namespace {

struct trace_run {
  int code;
  std::string out, err;
};

trace_run run_trace_with(std::vector<std::string> words) {
  std::vector<const char*> list{"trace"};
  for (const std::string& word : words) list.push_back(word.c_str());
  std::ostringstream out, err;
  const int code = run_trace(static_cast<int>(list.size()), list.data(), out, err);
  return {code, out.str(), err.str()};
}

using step_facts = std::tuple<index_t, index_t, std::vector<expert_id>, std::vector<float>>;
std::vector<step_facts> steps_of(const std::filesystem::path& path) {
  std::vector<step_facts> list;
  read_trace(path,
             [&](const trace_step& s) { list.emplace_back(s.token, s.layer, s.ids, s.weights); });
  return list;
}

std::vector<trace_step> some_steps(index_t experts) {
  ::test::random rng(3);
  std::vector<trace_step> list;
  for (index_t t = 0; t < 40; ++t)
    for (index_t l = 0; l < 3; ++l) {
      trace_step s{.token = t, .layer = l};
      while (s.ids.size() < 2) {
        const auto e = static_cast<expert_id>(rng.below(experts));
        if (s.ids.empty() || s.ids[0] != e) s.ids.push_back(e);
      }
      s.weights = {rng.uniform(), rng.uniform()};
      list.push_back(s);
    }
  return list;
}

}  // namespace

TEST_CASE("a trace that is written in any form and read again is the same steps") {
  const example::fixture::scratch_folder folder;
  for (const index_t experts : {8, 300, 70000})
    for (const auto& [name, format] : trace_formats) {
      INFO(name << " " << experts);
      const auto path = folder.path() / join("t", experts, ".", name);
      std::vector<step_facts> want;
      trace_writer writer(path, format);
      for (const trace_step& s : some_steps(experts)) {
        writer.write(s);
        const bool weighed = format == trace_format::route || format == trace_format::jsonl;
        want.emplace_back(s.token, s.layer, s.ids, weighed ? s.weights : std::vector<float>{});
      }
      writer.finish();
      CHECK(format_of(path) == format);
      auto got = steps_of(path);
      std::sort(got.begin(), got.end());
      CHECK(got == want);
    }
}

TEST_CASE("the program converts, and says the same of every form of a trace") {
  const example::fixture::scratch_folder folder;
  const auto path = folder.path() / "in.jsonl";
  trace_writer writer(path, trace_format::jsonl);
  for (const trace_step& s : some_steps(24)) writer.write(s);
  writer.finish();
  const trace_run first =
      run_trace_with({path.string(), "--cache", "6", "--policy", "belady", "--json"});
  REQUIRE(first.code == 0);
  const json said = json::parse(first.out);
  CHECK(said["layers"] == 3);
  CHECK(said["lookups"] == 240);
  CHECK(said["lru_miss_rate"].size() == said["experts"].get<std::size_t>() + 1);
  CHECK(said["lru_miss_rate"][0] == 1.0);
  CHECK(said["cache"]["hit_rate"] >= 1.0 - said["lru_miss_rate"][6].get<double>());
  CHECK(said["union"][0]["distinct"] >= said["union"][0]["regrouped"].get<double>());
  for (const auto& [name, format] : trace_formats) {
    const auto other = folder.path() / join("out.", name);
    CHECK(run_trace_with({path.string(), "--to", name, "--out", other.string()}).code == 0);
    const trace_run again =
        run_trace_with({other.string(), "--cache", "6", "--policy", "belady", "--json"});
    INFO(name << again.err);
    CHECK(again.out == first.out);
  }
  // Long traces are not regrouped, and the report says so.
  std::string lines = "layer,expert\n";
  for (int i = 0; i < 8193; ++i) lines += "0,1\n";
  const trace_run endless = run_trace_with({folder.write("long", lines).string(), "--json"});
  REQUIRE(endless.code == 0);
  CHECK(json::parse(endless.out)["union"][0]["regrouped"].is_null());
  const auto page = folder.path() / "page.html";
  const trace_run shown =
      run_trace_with({path.string(), "--page", page.string(), "--policy", "lru"});
  CHECK_THAT(shown.out, ContainsSubstring("| popularity |"));
  CHECK_THAT(shown.out, ContainsSubstring("% of lookups hit"));
  std::ifstream html(page);
  CHECK_THAT(std::string(std::istreambuf_iterator<char>(html), {}),
             ContainsSubstring("Misses of an LRU cache"));
}

TEST_CASE("optional columns may be missing; comments and their order do not matter") {
  const example::fixture::scratch_folder folder;
  const auto path = folder.write(
      "t",
      "# route_trace v1 of some server\n# more\nexpert,layer,step\n3,0,7\n5,0,7\n1,1,7\n2,0,8\n");
  CHECK(steps_of(path) ==
        std::vector<step_facts>{{0, 0, {3, 5}, {}}, {0, 1, {1}, {}}, {1, 0, {2}, {}}});
  const auto csv = folder.write("c", "layer,expert\r\n0,1\r\n0,2\r\n1,4\r\n0,2\r\n0,2\r\n");
  CHECK(steps_of(csv) ==
        std::vector<step_facts>{
            {0, 0, {1, 2}, {}}, {0, 1, {4}, {}}, {1, 0, {2}, {}}, {2, 0, {2}, {}}});
}

TEST_CASE("a trace that is wrong is refused by file, line and column") {
  const example::fixture::scratch_folder folder;
  const auto refused = [&](std::string_view text, const std::string& what) {
    const auto path = folder.write("bad", text);
    const trace_run found = run_trace_with({path.string()});
    INFO(what << " / " << found.err);
    CHECK(found.code == 2);
    CHECK(found.err.find(what) != std::string::npos);
    CHECK(found.err.starts_with("trace: "));
  };
  refused("", "bad:0:1: expected the columns layer,expert, found ''");
  refused("layer,expert,gpu\n", "bad:1:1: expected the columns layer,expert");
  refused("layer,expert\n", "bad: expected a trace, found no step");
  refused("layer,expert\n0,x\n", "bad:2:3: expected an expert from 0 to 1048575, found 'x'");
  refused("layer,expert\n0,1\n0,1,2\n", "bad:3:1: expected 2 fields, found 3");
  refused("layer,expert\n0,1\n-1,1\n", "bad:3:1: expected a layer from 0 to 1048575, found '-1'");
  refused("# route_trace v2\n", "bad:1:1: expected '# route_trace v1'");
  refused("# route_trace v1\nstep,layer,expert,colour\n", "bad:2:19: unknown column 'colour'");
  refused("# route_trace v1\nstep,layer,layer,expert\n", "bad:2:12: column 'layer' is there twice");
  refused("# route_trace v1\nstep,layer\n", "bad:2:1: expected a column 'expert'");
  refused("# route_trace v1\nstep,layer,expert\n0,0,1\n0,1,1\n0,0,2\n",
          "bad:5:3: layer 0 of this step again, expected its rows together");
  refused("# route_trace v1\nstep,layer,slot,expert\n0,0,1,1\n",
          "bad:3:5: expected slot 0, found 1");
  refused("{\"layer\": 0, \"token\": 0}\n", "bad:1:1: expected a field 'ids'");
  refused("{\"layer\": 0, \"token\": 0, \"ids\": [1], \"gpu\": 2}\n",
          "bad:1:1: unknown field 'gpu'");
  refused("{\"layer\": 0, \"token\": 0, \"ids\": [1.5]}\n", "field 'ids': expected integers");
  refused("{\"layer\": 0,\n", "bad:1:1: expected a JSON object");
  refused("moeroute_record v1 1 2 4 1\n", "bad:1:1: expected 'moeroute_record v1 LAYERS");
  refused("moeroute_record v1 1 2 4 1 1\nx", "bad: found 1 bytes of ids, expected 2");
  refused(std::string_view("moeroute_record v1 1 2 4 1 1\n\x01\x07", 31),
          "token 1, layer 0: expected an expert below 4, found 7");
  refused("moeroute_record v1 1 2 4 1 1", "bad:1:29: expected the end of the line and ids");
  refused("moeroute_record v1 0 2 4 1 1\n", "bad: expected layers from 1 to 1048576, found 0");
  refused("moeroute_record v1 9000000 2 4 1 1\n", "bad: expected layers from 1 to 1048576");
  refused("moeroute_record v1 1 9000000000000 4 0 1\n", "bad: expected tokens from 1 to");
  refused("moeroute_record v1 1 9 4 0 1\n", "bad: expected k from 1 to 1048576, found 0");
  refused("{\"layer\": 0, \"token\": 0, \"ids\": [18446744073709551615]}\n",
          "field 'ids': expected integers from -1");
  refused("{\"layer\": 0, \"token\": 9000000000000, \"ids\": [1]}\n",
          "field 'token': expected integers from 0");
  refused("{\"layer\": 0, \"token\": 0, \"ids\": [-1]}\n",
          "bad: expected a trace, found no expert in its steps");
  refused("\x93NUMPY\x01", "expected a .npy file");
  std::string none = "{'descr': '<i2', 'fortran_order': False, 'shape': (5, 0, 2), }\n";
  none.insert(0, std::string("\x93NUMPY\x01\0", 8) + static_cast<char>(none.size()) + '\0');
  refused(none, "bad: expected layers from 1 to 1048576, found 0");
  const auto whole = folder.path() / "whole.npy";
  trace_writer writer(whole, trace_format::npy);
  for (const trace_step& s : some_steps(9)) writer.write(s);
  writer.finish();
  std::ifstream file(whole, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  refused(std::string_view(bytes).substr(0, bytes.size() - 3), "bytes of values, expected 480");
  // What has no fixed form is not written in one.
  const auto uneven = folder.write("u", "layer,expert\n0,1\n1,2\n0,3\n");
  const trace_run found =
      run_trace_with({uneven.string(), "--to", "npy", "--out", (folder.path() / "o").string()});
  CHECK_THAT(found.err,
             ContainsSubstring("expected every layer of every token once (4 steps), found 3"));
}

TEST_CASE("a wrong call of trace is refused by name") {
  const example::fixture::scratch_folder folder;
  const auto path = folder.write("t", "layer,expert\n0,1\n").string();
  const auto refused = [&](std::vector<std::string> words, const std::string& what) {
    const trace_run found = run_trace_with(std::move(words));
    INFO(what << " / " << found.err);
    CHECK(found.code == 2);
    CHECK(found.err.find(what) != std::string::npos);
  };
  refused({}, "found no file");
  refused({path, path}, "expected one file");
  refused({path, "--to", "csv"}, "--to: expected together with --out");
  refused({path, "--to", "xml", "--out", path + "x"},
          "--to: expected csv, route, npy, record or jsonl, found 'xml'");
  refused({path, "--to", "csv", "--out", path}, "--out: expected another file");
  refused({path, "--cache", "9"}, "--cache: expected a number from 1 to 2, found '9'");
  refused({path, "--policy", "mru"}, "--policy: expected lru");
  refused({path, "--experts", "1"}, "--experts: expected at least 2");
  refused({path, "--colour"}, "unknown option '--colour'");
  refused({"no/such/file"}, "no/such/file: no such file");
}

}  // namespace trace_app_test
