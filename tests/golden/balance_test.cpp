// The families of balancing against an independent float64 reference; the library is float, so what
// float decides is compared to its rounding.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <cmath>
#include <moeroute/balance/bias_controller.hpp>
#include <moeroute/balance/bip.hpp>
#include <moeroute/data/expert_load.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/route.hpp>
#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/golden.hpp"
#include "support/routed.hpp"

using namespace moeroute;
using test::golden_json;
using test::rows_of;

TEST_CASE("auxiliary-loss-free balancing follows the reference step by step") {
  const golden_json file = test::read_family(GENERATE("auxfree_bias_u0.001", "auxfree_bias_u0.05"));
  const auto experts = file.at("experts").get<index_t>();
  const float u = file.at("params").at("u").get<float>();
  bias_controller controller(experts, {.step = u});
  workspace ws;
  assignment a;
  const golden_json& steps = file.at("logits_steps");
  for (std::size_t step = 0; step < steps.size(); ++step) {
    INFO("step " << step);
    CHECK(test::difference(controller.bias(), test::golden_floats(file.at("bias_after")[step]), 0.0,
                           1e-7) == "");
    const std::vector<float> logits = test::golden_floats(steps[step]);
    const router rule{.score = sigmoid{},
                      .selection = top_k{.k = file.at("k").get<index_t>()},
                      .weight = raw_weights,
                      .bias = selection_bias(std::span<const float>(controller.bias()))};
    route(rule, rows_of(logits, experts), ws, a);
    for (index_t t = 0; t < a.tokens(); ++t)
      CHECK(test::bit_difference(a.ids(t), file.at("ids_steps")[step][static_cast<std::size_t>(t)]
                                               .get<std::vector<expert_id>>()) == "");
    std::vector<std::int64_t> counts(static_cast<std::size_t>(experts));
    count_choices(a, {}, std::span(counts));
    CHECK(counts == file.at("counts")[step].get<std::vector<std::int64_t>>());
    controller.update(counts);
  }
  CHECK(test::difference(controller.bias(),
                         test::golden_floats(file.at("bias_after")[steps.size()]), 0.0,
                         1e-7) == "");
}

TEST_CASE("BIP balancing follows the reference batch by batch") {
  const golden_json file = test::read_family(GENERATE("bip_k2_iters4", "bip_k4_iters14"));
  const auto experts = file.at("experts").get<index_t>();
  const auto k = file.at("k").get<index_t>();
  bip_balancer balancer(experts,
                        {.k = k, .iterations = file.at("params").at("iterations").get<int>()});
  workspace ws;
  assignment a;
  index_t compared = 0;
  const golden_json& batches = file.at("logits_steps");
  for (std::size_t batch = 0; batch < batches.size(); ++batch) {
    INFO("batch " << batch);
    const std::vector<float> logits = test::golden_floats(batches[batch]);
    const auto tokens = static_cast<index_t>(logits.size()) / experts;
    std::vector<float> scores(logits.size());
    for (index_t t = 0; t < tokens; ++t)
      softmax{}.score_row(logits.data() + t * experts, experts, scores.data() + t * experts);
    balancer.update(rows_of(scores, experts), ws);
    CHECK(test::difference(balancer.token_prices(), test::golden_floats(file.at("p")[batch]), 3e-6,
                           3e-7) == "");
    CHECK(test::difference(balancer.prices(), test::golden_floats(file.at("q")[batch]), 3e-6,
                           3e-7) == "");
    const router rule{.score = softmax{},
                      .selection = top_k{.k = k},
                      .weight = raw_weights,
                      .bias = selection_bias(balancer.bias())};
    route(rule, rows_of(logits, experts), ws, a);
    for (index_t t = 0; t < tokens; ++t) {
      const auto at = static_cast<std::size_t>(t);
      if (!(test::golden_float(file.at("token_margin")[batch][at]) > 1e-6f)) continue;
      auto ids = file.at("ids")[batch][at].get<std::vector<expert_id>>();
      const auto weights = test::golden_floats(file.at("weights")[batch][at]);
      const auto mine = a.ids(t);
      for (std::size_t r = 0; r < ids.size(); ++r) {
        const auto found = std::find(mine.begin(), mine.end(), ids[r]);
        REQUIRE(found != mine.end());
        const float w = a.weights(t)[static_cast<std::size_t>(found - mine.begin())];
        CHECK(std::abs(w - weights[r]) <= 3e-6f * weights[r]);
      }
      ++compared;
    }
  }
  CHECK(compared > 80);
}

TEST_CASE("measures of a load are the reference's") {
  const golden_json file = test::read_family(GENERATE("metrics_k2", "metrics_k4"));
  const auto counts = file.at("counts").get<std::vector<std::int64_t>>();
  const auto experts = file.at("experts").get<index_t>();
  const std::vector<float> logits = test::golden_floats(file.at("logits"));
  workspace ws;
  assignment a;
  route(router{.score = softmax{}, .selection = top_k{.k = file.at("k").get<index_t>()}},
        rows_of(logits, experts), ws, a);
  load_meter meter(experts);
  meter.add(a);
  CHECK(std::vector<std::int64_t>(meter.load().begin(), meter.load().end()) == counts);
  const auto expected = [&](const char* name) {
    return static_cast<double>(test::golden_float(file.at(name)));
  };
  // The file's numbers are parsed to float here.
  const auto agrees = [](double x, double y) { return std::abs(x - y) <= 6e-8 * std::abs(y); };
  CHECK(agrees(meter.global_max_violation(), expected("max_violation")));
  CHECK(agrees(load_cv(meter.load()), expected("cv")));
  CHECK(agrees(normalized_load_entropy(meter.load()), expected("norm_entropy")));
}
