// Routers that see the whole batch, against the float64 references of families/ and the forward
// values of gradients/. When one goes red: the file's `params.rule` says what it computed.
#include <moeroute/policy/batch/base_assignment.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/route.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/golden.hpp"

using namespace moeroute;

namespace {

struct golden_batch {
  test::golden_json json;
  index_t tokens, experts;
  std::vector<float> logits;

  explicit golden_batch(const std::string& file) : json(test::read_golden(file)) {
    tokens = json.at(json.contains("tokens") ? "tokens" : "T").get<index_t>();
    experts = json.at(json.contains("experts") ? "experts" : "E").get<index_t>();
    logits = test::golden_floats(json.at("logits"));
  }

  matrix_view<const float> view() const { return {logits.data(), tokens, experts}; }

  assignment routed(const auto& router) const {
    workspace ws;
    assignment out;
    route(router, view(), ws, out);
    return out;
  }

  std::vector<float> flat(const char* key) const {
    std::vector<float> values;
    for (const auto& row : json.at(key))
      for (const auto& x : row) values.push_back(test::golden_float(x));
    return values;
  }

  std::vector<expert_id> flat_ids(const char* key) const {
    std::vector<expert_id> ids;
    for (const auto& row : json.at(key))
      for (const auto& x : row) ids.push_back(x.get<expert_id>());
    return ids;
  }
};

std::vector<expert_id> ids_of(const assignment& a) { return {a.ids().begin(), a.ids().end()}; }

// Every expert's tokens, best first, with their weights.
struct columns {
  std::vector<expert_id> tokens;
  std::vector<float> weights;

  explicit columns(const assignment& a) {
    for (expert_id e = 0; e < a.experts(); ++e) {
      std::vector<std::pair<float, index_t>> column;
      for (index_t t = 0; t < a.tokens(); ++t)
        for (std::size_t i = 0; i < a.ids(t).size(); ++i)
          if (a.ids(t)[i] == e) column.emplace_back(-a.weights(t)[i], t);
      std::sort(column.begin(), column.end());
      for (const auto& [weight, t] : column) {
        tokens.push_back(static_cast<expert_id>(t));
        weights.push_back(-weight);
      }
    }
  }
};

}  // namespace

TEST_CASE("Sinkhorn plans, choices and weights are those of the reference") {
  for (const index_t k : {1, 2, 4}) {
    const golden_batch g("families/sinkhorn_k" + std::to_string(k) + ".json");
    INFO("k=" << k);
    for (const auto domain : {sinkhorn_domain::exponential, sinkhorn_domain::logarithm}) {
      const sinkhorn router{.k = k, .scaling = {.domain = domain}};
      workspace ws;
      std::vector<float> plan(g.logits.size());
      const index_t iterations = sinkhorn_plan(
          router.scaling, g.view(), {}, ws, matrix_view<float>(plan.data(), g.tokens, g.experts));
      CHECK(iterations == g.json.at("iterations").get<index_t>());
      CHECK(test::difference(plan, test::golden_floats(g.json.at("plan")), 5e-6) == "");
      const assignment a = g.routed(router);
      CHECK(ids_of(a) == g.flat_ids("ids"));
      CHECK(test::difference(a.weights(), g.flat("weights"), 3e-6) == "");
    }
  }
}

TEST_CASE("Sinkhorn plans after ten iterations are those of the reference") {
  for (const char* size : {"_T6_E16_k4", "_T5_E64_k6"})
    for (const auto& [name, domain] :
         {std::pair<const char*, sinkhorn_domain>{"log10", sinkhorn_domain::logarithm},
          {"megatron10", sinkhorn_domain::exponential}}) {
      const golden_batch g(std::string("gradients/sinkhorn_") + name + size + ".json");
      INFO(name << size);
      const sinkhorn_scaling how{.domain = domain, .tolerance = 0.0f, .most_iterations = 10};
      workspace ws;
      std::vector<float> plan(g.logits.size());
      sinkhorn_plan(how, g.view(), {}, ws, matrix_view<float>(plan.data(), g.tokens, g.experts));
      CHECK(test::difference(plan, test::golden_floats(g.json.at("plan")), 5e-6) == "");
    }
}

TEST_CASE("expert choice takes the reference's tokens with its weights") {
  for (const char* file :
       {"families/expert_choice_cf1", "families/expert_choice_cf2",
        "gradients/expert_choice_T6_E16_k4", "gradients/expert_choice_T5_E64_k6"}) {
    const golden_batch g(std::string(file) + ".json");
    INFO(file);
    const bool family = g.json.at("params").contains("capacity");
    const index_t capacity = (family ? g.json.at("params") : g.json).at("capacity").get<index_t>();
    expert_choice<> router{.capacity = {.fixed = capacity}};
    if (family)
      router.capacity = floor_capacity(g.json.at("params").at("capacity_factor").get<double>());
    CHECK(router.capacity_of(g.tokens, g.experts) == capacity);
    const columns got(g.routed(router));
    CHECK(got.tokens == g.flat_ids("token_ids"));
    CHECK(test::difference(got.weights, g.flat("weights"), 3e-6) == "");
  }
}

TEST_CASE("the optimal balanced assignment is the reference's, the auction comes near it") {
  const golden_batch g("families/base_assignment.json");
  const assignment best = g.routed(base_assignment{.solver = assignment_solver::optimal});
  CHECK(ids_of(best) == g.flat_ids("ids"));
  CHECK(test::difference(best.weights(), g.flat("weights"), 3e-6) == "");
  const auto objective = [&](const assignment& a) {
    double sum = 0;
    for (index_t t = 0; t < g.tokens; ++t)
      sum += static_cast<double>(g.logits[static_cast<std::size_t>(t * g.experts + a.ids(t)[0])]);
    return sum;
  };
  const auto expected = g.json.at("objective").get<double>();
  CHECK(std::abs(objective(best) - expected) < 1e-5);
  const double bid = objective(g.routed(base_assignment{}));
  CHECK(bid <= expected + 1e-5);
  CHECK(bid >= 0.95 * expected);
}
