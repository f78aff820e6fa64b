// Every published router with reference vectors, through its file's own config.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <filesystem>
#include <moeroute/policy/catalog.hpp>
#include <set>
#include <string>
#include <vector>

#include "oracle/spec_routing.hpp"
#include "support/golden.hpp"
#include "support/golden_route.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"

using example::golden_input;
using moeroute::assignment;
using moeroute::catalog;
using moeroute::catalog_entry;

namespace {

// Every file of the folder: a new one is tested because it is there.
std::vector<std::string> open_models() {
  std::vector<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(MOEROUTE_TEST_DATA "/golden/open"))
    if (file.path().extension() == ".json") names.push_back(file.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

// Both lists.
std::vector<catalog_entry> every_entry() {
  std::vector<catalog_entry> all(std::begin(catalog), std::end(catalog));
  all.insert(all.end(), std::begin(moeroute::newer_catalog), std::end(moeroute::newer_catalog));
  return all;
}

golden_input read(const std::string& model) {
  return example::read_golden_input(test::read_golden("open/" + model + ".json"), model);
}

assignment routed(const golden_input& in) {
  return example::route_golden(in.router, {in.logits.data(), in.tokens, in.router.spec.columns()});
}

}  // namespace

TEST_CASE("there are reference vectors of 66 routers") { CHECK(open_models().size() == 66); }

TEST_CASE("open models: ids and weights are the reference's") {
  const auto model = GENERATE(from_range(open_models()));
  const assignment a = routed(read(model));
  CHECK(test::golden_difference(test::read_golden_model(model), {a.ids().begin(), a.ids().end()},
                                {a.weights().begin(), a.weights().end()}) == "");
}

TEST_CASE("open models: what the reference kept is kept, what it dropped has its id and weight 0") {
  const std::string model = GENERATE("nllb_moe", "nllb_moe_bpr");
  const assignment a = routed(read(model));
  const auto kept =
      test::read_golden_model(model).extra.at("kept").get<std::vector<std::uint8_t>>();
  INFO(model);
  REQUIRE(static_cast<moeroute::index_t>(kept.size()) == a.choices());
  for (moeroute::index_t c = 0; c < a.choices(); ++c) {
    const auto at = static_cast<std::size_t>(c);
    CHECK(a.kept(c) == (kept[at] != 0));
    if (!a.kept(c)) CHECK((a.ids()[at] >= 0 && a.weights()[at] == 0.0f));
  }
}

TEST_CASE("open models: the catalogue's spec is that of the file's config") {
  std::set<std::string> files;
  for (const catalog_entry& entry : every_entry()) {
    if (entry.golden.empty()) continue;
    INFO(entry.name);
    files.emplace(entry.golden);
    CHECK(to_string(entry.spec) == to_string(read(std::string(entry.golden)).router.spec));
    CHECK(entry.spec == read(std::string(entry.golden)).router.spec);
  }
  const auto all = open_models();
  CHECK(std::vector<std::string>(files.begin(), files.end()) == all);
}

TEST_CASE("catalogue: every router decides at its own size what float64 says, on every shape") {
  constexpr moeroute::index_t tokens = 17;
  for (const catalog_entry& entry : every_entry()) {
    const moeroute::router_spec& spec = entry.spec;
    golden_input in;
    in.tokens = tokens;
    in.router.spec = spec;
    in.router.spec.capacity = 0;
    in.router.spec.drop_order = moeroute::drop_order::choice_major;
    test::random rng(42);
    const auto experts = static_cast<std::size_t>(spec.experts);
    // Biases on the scale of the scores, so that they decide something.
    const float size = spec.score == moeroute::score_kind::softmax ? 0.01f : 0.3f;
    for (std::size_t e = 0; e < experts; ++e) {
      if (spec.selection_bias) in.router.bias.push_back(size * rng.normal());
      if (spec.class_bias) in.router.second_bias.push_back(size * rng.normal());
      if (spec.per_expert_scale) in.router.per_expert_scale.push_back(0.5f + rng.uniform());
    }
    for (int t = 0; spec.class_bias && t < tokens; ++t)
      in.router.modality.push_back(static_cast<std::uint8_t>(t % 3 == 0));
    if (spec.selection == moeroute::selection_kind::expert_table) {
      in.router.table = moeroute::random_table(100, spec.k, spec.experts, 1);
      for (int t = 0; t < tokens; ++t)
        in.router.input_ids.push_back(static_cast<std::int32_t>(rng.below(100)));
    }
    for (const test::shape shape : test::all_shapes) {
      const moeroute::index_t columns = spec.columns();
      in.logits = test::make_logits(shape, 5, tokens, columns);
      const assignment a = routed(in);
      INFO(entry.name << ", " << test::name(shape));
      for (moeroute::index_t t = 0; t < tokens; ++t) {
        const bool second =
            !in.router.modality.empty() && in.router.modality[static_cast<std::size_t>(t)] != 0;
        oracle::token_inputs token{in.logits.data() + t * columns,
                                   second ? in.router.second_bias : in.router.bias,
                                   in.router.per_expert_scale};
        if (in.router.table)
          token.table = in.router.table->of(in.router.input_ids[static_cast<std::size_t>(t)]);
        const std::string broken = oracle::break_of(in.router.spec, token, a.ids(t), a.weights(t));
        if (!broken.empty()) FAIL_CHECK("token " << t << ", " << broken);
      }
    }
  }
}

TEST_CASE("a file's config may be a line of text, which names every router") {
  const auto input = [](const std::string& config) {
    example::float_json document = {{"tokens", 2}, {"experts", 4}, {"k", 2}, {"config", config}};
    document["logits"] = {0.0f, 1.0f, 2.0f, 3.0f, 3.0f, 2.0f, 1.0f, 0.0f};
    return example::read_golden_input(document, "a file");
  };
  CHECK(routed(input("selection=each_group groups=2")).ids(0)[0] == 1);
  CHECK(routed(input("selection=expert_choice take=1")).choices() == 4);
  CHECK_THROWS(input("router=fast"));
}
