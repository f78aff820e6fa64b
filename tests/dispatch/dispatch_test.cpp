#include <moeroute_dispatch.hpp>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstring>
#include <limits>
#include <moeroute/policy/catalog.hpp>
#include <random>

#include "properties/hold.hpp"
#include "properties/isa.hpp"

namespace {

using moeroute::router_spec;
using moeroute::dispatch::available;
using moeroute::dispatch::session;

struct routed {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

routed route_on(const moeroute::dispatch::kernels& kernels, const router_spec& spec,
                const std::vector<float>& logits, const std::vector<float>& bias,
                const std::vector<float>& scale) {
  const auto columns = static_cast<std::size_t>(spec.columns());
  const std::size_t tokens = logits.size() / columns;
  routed out{std::vector<std::int32_t>(tokens * static_cast<std::size_t>(spec.k)), {}};
  out.weights.resize(out.ids.size());
  session s(spec, {.bias = bias, .per_expert_scale = scale}, kernels);
  s.route(logits.data(), static_cast<std::int64_t>(tokens), spec.columns(), out.ids.data(),
          out.weights.data());
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("every instruction set of the machine gives the same ids and weights for the catalogue") {
  REQUIRE_FALSE(available().empty());
  std::mt19937 engine(11);
  std::normal_distribution<float> normal;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const moeroute::catalog_entry& entry : moeroute::catalog) {
    const moeroute::router_traits traits = moeroute::traits_of(entry.spec);
    if (!traits.fixed_k || traits.needs_token_ids) continue;  // not offered here
    INFO(entry.name);
    const auto experts = static_cast<std::size_t>(entry.spec.experts);
    std::vector<float> logits(static_cast<std::size_t>(37 * entry.spec.columns()));
    for (float& x : logits) {
      x = 3.0f * normal(engine);
      if (engine() % 4 == 0) x = std::round(x);
      if (engine() % 50 == 0) x = nan;
    }
    std::vector<float> bias(entry.spec.selection_bias ? experts : 0),
        scale(entry.spec.per_expert_scale ? experts : 0);
    for (float& x : bias) x = 0.1f * normal(engine);
    for (float& x : scale) x = 1.0f + 0.1f * normal(engine);
    const routed first = route_on(*available().front(), entry.spec, logits, bias, scale);
    for (const auto* kernels : available()) {
      INFO(kernels->name);
      const routed other = route_on(*kernels, entry.spec, logits, bias, scale);
      CHECK(other.ids == first.ids);
      CHECK(same_bits(other.weights, first.weights));
    }
  }
}

TEST_CASE("a spec that does not fit is refused across the border of an instruction set") {
  for (const auto* kernels : available()) {
    CHECK_THROWS_WITH(session({.experts = 4, .k = 5}, {}, *kernels),
                      Catch::Matchers::ContainsSubstring("k is 5, expected 1 to 4"));
    CHECK_THROWS_WITH(
        session({.experts = 4, .k = 2, .selection = moeroute::selection_kind::top_p, .top_p = 0.5f},
                {}, *kernels),
        Catch::Matchers::ContainsSubstring("the router's k varies"));
  }
}

TEST_CASE("20,000 random specs route alike on every instruction set, bit by bit") {
  test::hold(test::isa_property, 20000);
}
