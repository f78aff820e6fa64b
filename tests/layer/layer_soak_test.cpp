// Endurance of whole layers. Hidden; test_layer "[soak]" runs it.
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <moeroute/exec/callable.hpp>
#include <moeroute/layer/moe_layer.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/batch/expert_choice.hpp>
#include <moeroute/policy/batch/sinkhorn.hpp>
#include <moeroute/policy/router.hpp>
#include <moeroute/policy/row/threshold.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "support/allocations.hpp"
#include "support/planned.hpp"
#include "support/random.hpp"
#include "support/resident.hpp"
#include "support/threads.hpp"

namespace layer_soak_test {

using namespace moeroute;

namespace {

constexpr index_t d = 16, most_tokens = 4096;
constexpr index_t batches[] = {0, 1, 3, 64, most_tokens};

// Expert e gives e + 1 times what it gets.
struct multiply {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < in.cols; ++c) out(r, c) = static_cast<float>(e + 1) * in(r, c);
  }
};

template <class Router>
auto layer_of(Router router, index_t experts, const moe_layer_options& options = {}) {
  return moe_layer<Router, multiply>(
      simd::packed_matrix<>(const_view(test::random_rows(experts, d, 1))), std::move(router), {},
      options);
}

const capacity_policy tight{.rule = {.formula = capacity_formula::megatron, .factor = 1.0},
                            .order = drop_order::by_weight};

// One layer of every kind of router: fixed k, fixed k under a capacity with experts that are no
// networks, a k that varies, and the kinds that see the whole batch.
struct layers {
  std::tuple<decltype(layer_of(router<softmax_selected>{}, 0)),
             decltype(layer_of(router<softmax>{}, 0)), decltype(layer_of(router<sigmoid>{}, 0)),
             decltype(layer_of(threshold_router<relu>{}, 0)),
             decltype(layer_of(expert_choice<>{}, 0)), decltype(layer_of(sinkhorn{}, 0))>
      all{layer_of(router<softmax_selected>{.selection = {.k = 2}}, 8),
          layer_of(router<softmax>{.selection = {.k = 4}, .weight = sum_normalized}, 60,
                   {.capacity = tight}),
          layer_of(router<sigmoid>{.selection = {.k = 3}, .weight = sum_normalized}, 32,
                   {.special = {.identity_first = 24,
                                .identity_end = 28,
                                .zero_first = 28,
                                .zero_end = 32}}),
          layer_of(threshold_router<relu>{.norm = threshold_norm::sum}, 7),
          layer_of(expert_choice<>{}, 16),
          layer_of(sinkhorn{.k = 2}, 8)};

  template <class F>
  void visit(std::size_t which, F&& f) {
    std::size_t i = 0;
    std::apply([&](auto&... layer) { ((i++ == which ? f(layer) : void()), ...); }, all);
  }
};

}  // namespace

TEST_CASE(
    "over 10^7 tokens through layers of changing batches, routers and executors memory is flat, "
    "nothing allocates and results do not drift",
    "[.][soak]") {
  const char* const wanted = std::getenv("MOEROUTE_SOAK_TOKENS");
  const index_t goal = wanted != nullptr ? std::atoll(wanted) : 10'000'000;
  layers under_test;
  constexpr std::size_t kinds = std::tuple_size_v<decltype(under_test.all)>;
  const row_matrix<float> pool = test::random_rows(2 * most_tokens, d, 2);
  row_matrix<float> y(most_tokens, d);
  std::uint64_t digest = 0;
  long allocations = 0;
  bool finite = true;
  // What is computed follows from the number alone; by which executor, from `how` too: it must not
  // matter.
  const auto call = [&](std::uint64_t number, std::uint64_t how, index_t tokens) {
    test::random rng(number);
    const auto which = static_cast<std::size_t>(rng.below(kinds));
    const matrix_view<const float> x(pool.data() + rng.below(most_tokens) * d, tokens, d);
    const matrix_view<float> to(y.data(), tokens, d);
    under_test.visit(which, [&](auto& layer) {
      allocations += test::allocations_during([&] {
        switch (how % 3) {
          case 0: return layer.forward(x, to);
          case 1: return layer.forward(x, to, test::several_threads{2});
          default:
            return layer.forward(x, to,
                                 callable_executor(
                                     [](index_t n, index_t grain, loop_body body) {
                                       for (index_t b = 0; b < n; b += grain)
                                         body(b, std::min(n, b + grain));
                                     },
                                     1));
        }
      });
    });
    for (index_t i = 0; i < tokens * d; ++i) {
      finite &= std::isfinite(y.data()[i]);
      digest = (digest ^ std::bit_cast<std::uint32_t>(y.data()[i])) * 0x100000001b3 + 1;
    }
  };
  const auto first_calls = [&](std::uint64_t how) {
    digest = 0;
    for (std::uint64_t i = 0; i < 100; ++i) call(i, how + i, batches[i % 5]);
    return digest;
  };
  // Largest first, under every executor: then all that is needed is there.
  for (std::uint64_t i = 0; i < 60 * kinds; ++i) call(i, i, most_tokens);
  const std::uint64_t at_first = first_calls(0);
  allocations = 0;
  const index_t before = test::resident_kilobytes();
  index_t tokens = 0;
  std::uint64_t calls = 0;
  for (; tokens < goal; ++calls) {
    const index_t batch = batches[test::random(calls).below(5)];
    call(1000 + calls, calls, batch);
    tokens += batch;
  }
  CHECK(first_calls(1) == at_first);
  CHECK(finite);
  CHECK(allocations == 0);
  const index_t grown = test::resident_kilobytes() - before;
  CHECK(grown < 1024);
  std::printf("soak: %lld tokens in %llu calls of %zu layers, memory grew by %lld KB\n",
              static_cast<long long>(tokens), static_cast<unsigned long long>(calls), kinds,
              static_cast<long long>(grown));
}

}  // namespace layer_soak_test
