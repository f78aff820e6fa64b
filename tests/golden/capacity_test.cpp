// Capacity, drop orders and plans against golden files: families/ by a float64 reference, open/ by
// the real models. When one goes red, ask first whether the rounding of a capacity or the order of
// a drop changed.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <moeroute/stage/capacity.hpp>
#include <moeroute/stage/plan.hpp>
#include <moeroute/stage/plan_layouts.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using namespace moeroute;
using nlohmann::json;

namespace {

using ints = std::vector<std::int32_t>;
using doubles = std::vector<double>;

json golden(const std::string& name) {
  std::ifstream file(std::string(MOEROUTE_TEST_DATA "/golden/") + name + ".json");
  REQUIRE(file.good());
  return json::parse(file);
}

// A list, or a list of lists, as one list.
template <class T>
std::vector<T> flat(const json& list) {
  std::vector<T> all;
  for (const json& item : list) {
    if (item.is_array()) {
      for (const json& x : item) all.push_back(x.get<T>());
    } else {
      all.push_back(item.get<T>());
    }
  }
  return all;
}

assignment choices_of(const json& file, const doubles& weights) {
  assignment a;
  a.reset(file["tokens"], file["experts"], file["k"]);
  const auto ids = flat<std::int32_t>(file["ids"]);
  std::ranges::copy(ids, a.ids().begin());
  for (std::size_t c = 0; c < weights.size(); ++c) a.weights()[c] = static_cast<float>(weights[c]);
  return a;
}

ints kept_of(const assignment& a) {
  ints kept;
  for (index_t c = 0; c < a.choices(); ++c) kept.push_back(a.kept(c) ? 1 : 0);
  return kept;
}

double largest_error(std::span<const float> actual, const doubles& expected) {
  double worst = 0.0;
  for (std::size_t i = 0; i < expected.size(); ++i)
    worst = std::max(worst, std::abs(static_cast<double>(actual[i]) - expected[i]) /
                                std::max(1e-30, std::abs(expected[i])));
  return worst;
}

// The softmax of the logits at the choices.
doubles probabilities(const json& file) {
  const auto logits = flat<double>(file["logits"]);
  const auto ids = flat<std::int32_t>(file["ids"]);
  const std::size_t experts = file["experts"], k = file["k"];
  doubles p;
  for (std::size_t c = 0; c < ids.size(); ++c) {
    const double* row = logits.data() + c / k * experts;
    double sum = 0.0;
    for (std::size_t e = 0; e < experts; ++e) sum += std::exp(row[e]);
    p.push_back(std::exp(row[ids[c]]) / sum);
  }
  return p;
}

}  // namespace

TEST_CASE("capacity and its drop orders keep what the reference keeps") {
  workspace ws;
  for (const char* name :
       {"capacity_k1_cf1.0", "capacity_k2_cf0.5", "capacity_k2_cf1.0", "capacity_k4_cf1.25"}) {
    const json file = golden(std::string("families/") + name);
    const capacity_rule rule{.formula = capacity_formula::megatron,
                             .factor = file["params"]["capacity_factor"]};
    for (const auto& [order, suffix] :
         {std::pair{drop_order::token_major, "token"}, std::pair{drop_order::choice_major, "slot"},
          std::pair{drop_order::by_weight, "score"}}) {
      INFO(name << " " << suffix);
      assignment a = choices_of(file, flat<double>(file["weights"]));
      const capacity_result r = apply_capacity(
          a, {.rule = rule, .order = order, .renormalize = renormalization::after_drop}, ws);
      CHECK(r.capacity == file["params"]["capacity"].get<index_t>());
      CHECK(kept_of(a) == flat<std::int32_t>(file[std::string("keep_") + suffix]));
      CHECK(largest_error(a.weights(), flat<double>(file[std::string("renorm_") + suffix])) < 3e-7);
    }
    dispatch_plan p;
    plan(choices_of(file, flat<double>(file["weights"])), p);
    ints load;
    for (index_t e = 0; e < p.experts(); ++e) load.push_back(static_cast<std::int32_t>(p.load(e)));
    CHECK(load == flat<std::int32_t>(file["load"]));
  }
}

TEST_CASE("aligned blocks are those of the reference") {
  for (const char* name : {"dispatch_k2_block4", "dispatch_k4_block8"}) {
    const json file = golden(std::string("families/") + name);
    const index_t block = file["params"]["block"];
    const assignment a = choices_of(file, {});
    dispatch_plan p;
    plan(a, p);
    CHECK(ints(p.offsets().begin(), p.offsets().end()) == flat<std::int32_t>(file["offsets"]));
    ints sorted(static_cast<std::size_t>(p.slots())), experts(sorted.size());
    export_aligned_blocks(p, 1, {.sorted_choices = sorted, .block_experts = experts});
    CHECK(sorted == flat<std::int32_t>(file["sorted_slots"]));

    plan(a, p, {.block = block});
    CHECK(ints(p.offsets().begin(), p.offsets().end()) ==
          flat<std::int32_t>(file["padded_offsets"]));
    sorted.resize(static_cast<std::size_t>(p.slots()));
    experts.resize(static_cast<std::size_t>(p.slots() / block));
    export_aligned_blocks(p, block, {.sorted_choices = sorted, .block_experts = experts});
    CHECK(sorted == flat<std::int32_t>(file["padded_slots"]));
    CHECK(experts == flat<std::int32_t>(file["block_expert"]));
  }
}

TEST_CASE("models with a capacity drop what they drop, and weigh the rest as they do") {
  workspace ws;
  const auto check = [&](const char* name, const capacity_rule& rule, drop_order order,
                         renormalization renormalize, float eps) {
    INFO(name);
    const json file = golden(std::string("open/") + name);
    assignment a = choices_of(file, probabilities(file));
    const capacity_result r = apply_capacity(
        a, {.rule = rule, .order = order, .renormalize = renormalize, .eps = eps}, ws);
    if (!file["config"]["capacity"].is_null())
      CHECK(r.capacity == file["config"]["capacity"].get<index_t>());
    CHECK(kept_of(a) == flat<std::int32_t>(file["extra"]["kept"]));
    CHECK(largest_error(a.weights(), flat<double>(file["weights"])) < 3e-6);
  };
  constexpr float eps = 1.1920928955078125e-07f;
  check("nllb_moe", {.formula = capacity_formula::nllb_eval, .factor = 1.0},
        drop_order::choice_major, renormalization::after_drop, eps);
  check("nllb_moe_bpr", {.formula = capacity_formula::nllb_eval, .factor = 0.1},
        drop_order::batch_priority, renormalization::before_drop, eps);
  check("switch_transformers", {.formula = capacity_formula::fixed, .count = 64},
        drop_order::choice_major, renormalization::none, 0.0f);
}
