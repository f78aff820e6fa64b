// What looking costs: meters fed with one batch, against the gate's product alone, the least that a
// routed layer does.
#include <string>
#include <utility>
#include <vector>

#include <moeroute/matrix/eigen.hpp>
#include <moeroute/metrics/co_activation.hpp>
#include <moeroute/metrics/entropy.hpp>
#include <moeroute/metrics/load.hpp>
#include <moeroute/metrics/segment.hpp>
#include <moeroute/metrics/sparsity.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/route.hpp>

#include "support/contest.hpp"
#include "support/shapes.hpp"

namespace {

using bench::index_t;

constexpr index_t tokens = 1024, d = 2048;

template <class F>
bench::turn whole(F f) {
  return [=](bench::stopwatch& watch) { watch.time(tokens, f); };
}

// meter(choices, logits) is timed.
template <class Meter>
void look(benchmark::State& state, index_t experts, index_t k, Meter meter) {
  using matrix = moeroute::row_matrix<float>;
  moeroute::buffer<float> logits(tokens * experts);
  bench::fill("normal", tokens, experts, logits.data());
  const moeroute::matrix_view<const float> z(logits.data(), tokens, experts);
  moeroute::workspace ws;
  moeroute::assignment choices;
  const moeroute::router<moeroute::softmax> router{
      .score = {}, .selection = {.k = k}, .weight = moeroute::sum_normalized};
  moeroute::route(router, z, ws, choices);
  const matrix weight = matrix::Random(experts, d), x = matrix::Random(tokens, d);
  const moeroute::simd::packed_matrix<> packed(moeroute::view(weight));
  matrix out(tokens, experts);
  std::vector<bench::competitor> list;
  list.push_back({"ours", whole([&] { meter(choices, z); })});
  list.push_back({"gate", whole([&] { moeroute::gate(x, packed, out); })});
  bench::compete(state, static_cast<double>(k * 4), std::move(list));
}

template <class Make>
void add(const std::string& name, Make make) {
  for (const auto& [experts, k] : {std::pair<index_t, index_t>{64, 8}, {256, 8}})
    bench::entry("metrics/" + name + "/E:" + std::to_string(experts) + "/k:" + std::to_string(k),
                 [=, e = experts, n = k](benchmark::State& state) {
                   auto meter = make(e);
                   look(state, e, n, [&](const auto& choices, const auto& logits) {
                     if constexpr (requires { meter.add(choices); }) {
                       meter.add(choices);
                     } else {
                       meter.add(logits);
                     }
                   });
                 });
}

const bool registered = [] {
  add("load", [](index_t e) { return moeroute::load_meter(e); });
  add("co_activation", [](index_t e) { return moeroute::co_activation(e); });
  add("entropy", [](index_t) { return moeroute::entropy_meter(); });
  add("segment", [](index_t e) { return moeroute::segment_meter(e, 16); });
  add("sparsity", [](index_t e) { return moeroute::sparsity_meter(e, 16); });
  return true;
}();

}  // namespace
