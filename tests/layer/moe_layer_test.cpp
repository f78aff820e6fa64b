#include <moeroute/layer/moe_layer.hpp>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <moeroute/policy/router.hpp>
#include <optional>
#include <string>
#include <vector>

#include "oracle/layer.hpp"
#include "oracle/routing.hpp"
#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/counting_new.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"
#if defined(_OPENMP)
#include <moeroute/exec/openmp.hpp>
#endif

namespace moe_layer_test {

using namespace moeroute;

namespace {

constexpr index_t d = 24, ff = 40, experts = 10, k = 3;

using layer = moe_layer<router<softmax>, swiglu_experts<>>;

row_matrix<float> weights(index_t rows, index_t cols, std::uint64_t seed) {
  return test::random_rows(rows, cols, seed) / std::sqrt(static_cast<float>(cols));
}

row_matrix<float> gate_weight() { return weights(experts, d, 100); }

std::vector<oracle::swiglu> slow_experts() {
  std::vector<oracle::swiglu> list;
  for (std::uint64_t e = 0; e < experts; ++e) {
    const auto copy = [](const row_matrix<float>& m) {
      return oracle::matrix(m.rows(), m.cols(), m.data());
    };
    list.push_back({copy(weights(ff, d, 200 + e)), copy(weights(ff, d, 300 + e)),
                    copy(weights(d, ff, 400 + e))});
  }
  return list;
}

swiglu_experts<> fast_experts() {
  swiglu_experts<> list(experts, d, ff);
  for (expert_id e = 0; e < experts; ++e) {
    const auto seed = static_cast<std::uint64_t>(e);
    list.set_gate(e, const_view(weights(ff, d, 200 + seed)));
    list.set_up(e, const_view(weights(ff, d, 300 + seed)));
    list.set_down(e, const_view(weights(d, ff, 400 + seed)));
  }
  return list;
}

layer make_layer() {
  return {simd::packed_matrix<>(const_view(gate_weight())),
          router<softmax>{.selection = {.k = k}, .weight = sum_normalized}, fast_experts()};
}

// Every layer test goes through here, so that forward is compiled few times.
template <class T, class Exec = serial>
void forward(layer& l, const row_matrix<T>& x, row_matrix<T>& y, const Exec& exec = {}) {
  l.forward(matrix_view<const T>(x.data(), x.rows(), x.cols()),
            matrix_view<T>(y.data(), y.rows(), y.cols()), exec);
}

constexpr index_t batches[] = {0, 1, 3, 16, 17, 512};

}  // namespace

TEST_CASE("a router that was set is that of the next call") {
  const router<softmax> other{
      .selection = {.k = 2}, .weight = sum_normalized, .transform = {.temperature = 0.25f}};
  layer changed = make_layer(),
        fresh{simd::packed_matrix<>(const_view(gate_weight())), other, fast_experts()};
  row_matrix<float> x = test::random_rows(17, d, 7), y(17, d), expected(17, d);
  forward(changed, x, y);
  changed.set_router(other);
  forward(changed, x, y);
  forward(fresh, x, expected);
  CHECK((y.array() == expected.array()).all());
  CHECK(changed.choices().k() == 2);
  CHECK(test::refusal([&] { changed.set_router({.selection = {.k = experts + 1}}); }) ==
        "moeroute::top_k: k is 11, expected 1 to 10");
  CHECK(changed.router().k() == 2);
}

TEST_CASE("a layer is the weighted sum of the chosen experts of every token") {
  layer l = make_layer();
  for (const index_t tokens : batches) {
    const row_matrix<float> x = test::random_rows(tokens, d, 5);
    row_matrix<float> y(tokens, d);
    forward(l, x, y);
    INFO("T = " << tokens);
    const row_matrix<float> w = gate_weight();
    const oracle::matrix input(tokens, d, x.data());
    const oracle::matrix logits = oracle::linear(input, oracle::matrix(experts, d, w.data()));
    const std::vector<float> got_logits(l.logits().data, l.logits().data + tokens * experts);
    CHECK(test::difference(got_logits, logits.value, 1e-6, 1e-6) == "");
    // Ids from the layer's own logits, whose last bit is not the oracle's.
    const oracle::decision decided =
        oracle::route({.normalize = oracle::divisor::sum}, got_logits, tokens, experts, k);
    CHECK(test::bit_difference(l.choices().ids(), decided.ids) == "");
    CHECK(test::difference(l.choices().weights(), decided.weights, 3e-6) == "");
    const oracle::matrix expected =
        oracle::mixture(input, slow_experts(), decided.ids, decided.weights, k);
    CHECK(test::difference(test::values(y), expected.value, 1e-5, 1e-5) == "");
    CHECK(l.plan().slots() == tokens * k);
  }
}

TEST_CASE(
    "16-bit rows go through a layer as the floats they widen to, with one rounding at the end") {
  layer l = make_layer();
  const row_matrix<bfloat16> x = test::random_rows(33, d, 6).cast<bfloat16>();
  const row_matrix<float> wide = x.cast<float>();
  row_matrix<bfloat16> y(33, d);
  row_matrix<float> y_wide(33, d);
  forward(l, x, y);
  forward(l, wide, y_wide);
  const row_matrix<bfloat16> rounded = y_wide.cast<bfloat16>();
  CHECK(test::bit_difference(test::values(y), test::values(rounded)) == "");
}

TEST_CASE("a layer may write over its input") {
  layer l = make_layer();
  row_matrix<float> x = test::random_rows(17, d, 7), y(17, d);
  forward(l, x, y);
  forward(l, x, x);
  CHECK(test::bit_difference(test::values(x), test::values(y)) == "");
}

TEST_CASE("a token's output does not depend on the other tokens") {
  layer l = make_layer();
  const row_matrix<float> x = test::random_rows(200, d, 8);
  row_matrix<float> y(200, d), alone(1, d);
  forward(l, x, y);
  for (const index_t t : {0, 1, 15, 16, 100, 199}) {
    const row_matrix<float> row = x.row(t);
    forward(l, row, alone);
    const row_matrix<float> among = y.row(t);
    CHECK(test::bit_difference(test::values(alone), test::values(among)) == "");
  }
}

TEST_CASE("a warm layer never allocates, in float and bfloat16") {
  layer l = make_layer();
  for (const index_t tokens : {512, 17, 16, 3, 1}) {
    const row_matrix<float> x = test::random_rows(tokens, d, 9);
    const row_matrix<bfloat16> x16 = x.cast<bfloat16>();
    row_matrix<float> y(tokens, d);
    row_matrix<bfloat16> y16(tokens, d);
    if (tokens == 512) forward(l, x, y);
    CHECK(test::allocations_during([&] {
            forward(l, x, y);
            forward(l, x16, y16);
          }) == 0);
  }
}

TEST_CASE("a copied layer has what the original had, in memory of its own") {
  const auto x = test::random_rows(9, d, 12);
  row_matrix<float> y(9, d), again(9, d);
  std::optional<layer> original(make_layer());
  original->forward(x, y);
  const layer copy = *original;
  const std::vector<float> before(original->logits().data, original->logits().data + 9 * experts);
  CHECK(copy.logits().data != original->logits().data);
  original->forward(test::random_rows(9, d, 13), again);
  original.reset();
  CHECK((copy.logits().rows == 9 && copy.logits().cols == experts));
  CHECK(std::equal(before.begin(), before.end(), copy.logits().data));
  layer other = copy;
  other.forward(x, again);
  CHECK(test::bit_difference(test::values(y), test::values(again)) == "");
}

TEST_CASE("each batch size is warm after one call of its own") {
  for (const index_t tokens : batches) {
    layer l = make_layer();
    const row_matrix<float> x = test::random_rows(tokens, d, 9);
    row_matrix<float> y(tokens, d);
    forward(l, x, y);
    CHECK(test::allocations_during([&] { forward(l, x, y); }) == 0);
  }
}

#if defined(_OPENMP)
TEST_CASE("a layer has the same bits for any number of threads") {
  layer l = make_layer();
  const row_matrix<float> x = test::random_rows(5000, d, 10);
  row_matrix<float> y(5000, d), parallel(5000, d);
  forward(l, x, y);
  for (const int threads : {1, 2, 4}) {
    parallel.setZero();
    forward(l, x, parallel, openmp{threads});
    CHECK(test::bit_difference(test::values(parallel), test::values(y)) == "");
  }
}
#endif

TEST_CASE("a layer refuses shapes that do not fit") {
  layer l = make_layer();
  const auto refusal = [&](index_t x_cols, index_t rows, index_t cols) {
    const row_matrix<float> x = row_matrix<float>::Zero(4, x_cols);
    row_matrix<float> y(rows, cols);
    return test::refusal([&] { forward(l, x, y); });
  };
  CHECK(refusal(d + 1, 4, d + 1) == "moeroute::moe_layer: x.cols() is 25, expected 24");
  CHECK(refusal(d, 3, d) == "moeroute::moe_layer: y.rows() is 3, expected 4");
  CHECK(refusal(d, 4, d - 1) == "moeroute::moe_layer: y.cols() is 23, expected 24");
  CHECK(refusal(d, 4, d) == "accepted");
  CHECK(test::refusal([] {
          layer(simd::packed_matrix<>(2, d), router<softmax>{.selection = {.k = 3}},
                fast_experts());
        }) == "moeroute::top_k: k is 3, expected 1 to 2");
}

TEST_CASE("a layer refuses experts that do not fit its gate") {
  const auto refusal = [](index_t gate_rows, index_t gate_cols) {
    return test::refusal([&] {
      layer(simd::packed_matrix<>(gate_rows, gate_cols), router<softmax>{}, fast_experts());
    });
  };
  CHECK(refusal(experts + 1, d) == "moeroute::moe_layer: experts.experts() is 10, expected 11");
  CHECK(refusal(experts, d + 1) == "moeroute::moe_layer: experts.d() is 24, expected 25");
}

TEST_CASE("a probe hears of every step in order") {
  layer l = make_layer();
  const row_matrix<float> x = test::random_rows(4, d, 11);
  row_matrix<float> y(4, d);
  std::vector<layer_step> steps;
  l.forward(x, y, serial{}, [&](layer_step s) { steps.push_back(s); });
  CHECK(steps == std::vector<layer_step>{layer_step::gate, layer_step::route, layer_step::plan,
                                         layer_step::dispatch, layer_step::experts,
                                         layer_step::combine, layer_step::done});
}

}  // namespace moe_layer_test
