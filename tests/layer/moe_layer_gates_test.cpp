#include <moeroute/layer/moe_layer.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/layer/moe_layer_backward.hpp>
#include <moeroute/policy/make_router.hpp>
#include <moeroute/policy/row/product_keys.hpp>
#include <moeroute/policy/row/random_choice.hpp>
#include <moeroute/policy/row/replay.hpp>
#include <moeroute/policy/row/table.hpp>
#include <moeroute/policy/weigh/any_router.hpp>
#include <numeric>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/float_rows.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace moe_layer_gates_test {

using namespace moeroute;
using test::as_rows;
using test::floats;
using test::into_rows;
using test::random_floats;

namespace {

constexpr index_t d = 20, experts = 12, k = 3;
constexpr index_t batches[] = {0, 1, 3, 17, 40};

// Expert e: out[c] = (e + 1) tanh(in[c mod d]), as wide as asked for.
struct curves {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < out.cols; ++c)
        out(r, c) = std::tanh(in(r, c % in.cols)) * static_cast<float>(e + 1);
  }
};
struct curve_gradients {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dout,
                  matrix_view<float> din) const {
    for (index_t r = 0; r < in.rows; ++r) {
      for (index_t c = 0; c < in.cols; ++c) din(r, c) = 0.0f;
      for (index_t c = 0; c < dout.cols; ++c) {
        const float y = std::tanh(in(r, c % in.cols));
        din(r, c % in.cols) += dout(r, c) * (1.0f - y * y) * static_cast<float>(e + 1);
      }
    }
  }
};

const router<softmax>& three_best() {
  static const router<softmax> rule{.selection = {.k = k}, .weight = sum_normalized};
  return rule;
}
const floats& gate_weight() {
  static const floats w = random_floats(experts * d, 1);
  return w;
}
simd::packed_matrix<> packed() { return simd::packed_matrix<>(as_rows(gate_weight(), d)); }

// A gate of somebody else's: the linear one, times 2, through scratch of its own.
struct doubled {
  simd::packed_matrix<> weight;
  index_t columns() const { return weight.rows(); }
  index_t d() const { return weight.cols(); }
  index_t scratch_floats(index_t tokens) const { return tokens * columns(); }
  template <class T, class Exec>
  void operator()(const matrix_view<const T>& x, const matrix_view<float>& logits, float* memory,
                  const Exec& exec) const {
    gate(x, weight, matrix_view<float>(memory, x.rows, columns()), exec);
    for (index_t i = 0; i < x.rows * columns(); ++i) logits.data[i] = 2.0f * memory[i];
  }
};
static_assert(gate_function_with_scratch<doubled> && !gate_function<doubled>);
static_assert(gate_function<linear_gate<>> && gate_function<gate_ref<linear_gate<>>>);
static_assert(gate_function_with_scratch<gate_ref<doubled>> && !any_gate<no_gate>);

template <class Layer>
floats output(Layer& layer, const floats& x, const side_inputs& side = {}) {
  const index_t tokens = static_cast<index_t>(x.size()) / d;
  floats y(static_cast<std::size_t>(tokens * layer.d_out()), 7.0f);
  layer.forward(as_rows(x, d), into_rows(y, layer.d_out()), side);
  return y;
}

}  // namespace

TEST_CASE(
    "a layer has the same bits by its gate, by a shared one, by rows or logits from outside") {
  const linear_gate<> one(packed());
  moe_layer plain(packed(), three_best(), curves{});
  moe_layer first(gate_ref{one}, three_best(), curves{});
  moe_layer second(gate_ref{one}, three_best(), curves{});
  moe_layer outside(no_gate(experts), three_best(), curves{}, {.d = d});
  for (const index_t tokens : batches) {
    const floats x = random_floats(tokens * d, 2);
    const floats expected = output(plain, x);
    CHECK(test::bit_difference(output(first, x), expected) == "");
    CHECK(test::bit_difference(output(second, x), expected) == "");
    floats y(x.size()), logits(static_cast<std::size_t>(tokens * experts));
    plain.forward(as_rows(x, d), as_rows(x, d), into_rows(y, d));
    CHECK(test::bit_difference(y, expected) == "");
    gate(as_rows(x, d), one, into_rows(logits, experts));
    outside.forward_logits(as_rows(x, d), as_rows(logits, experts), into_rows(y, d));
    CHECK(test::bit_difference(y, expected) == "");
    CHECK(outside.logits().rows == 0);
  }
}

TEST_CASE(
    "the router's rows are its own: another width, another type, and no part of the experts") {
  constexpr index_t width = 9;
  const floats w = random_floats(experts * width, 3);
  moe_layer layer(simd::packed_matrix<>(as_rows(w, width)), three_best(), curves{}, {.d = d});
  moe_layer outside(no_gate(experts), three_best(), curves{}, {.d = d});
  for (const index_t tokens : batches) {
    const floats x = random_floats(tokens * d, 4), wide = random_floats(tokens * width, 5);
    std::vector<bfloat16> r;
    for (const float v : wide) r.push_back(static_cast<bfloat16>(v));
    const matrix_view<const bfloat16> narrow(r.data(), tokens, width);
    floats y(x.size()), expected(x.size()), logits(static_cast<std::size_t>(tokens * experts));
    layer.forward(as_rows(x, d), narrow, into_rows(y, d));
    gate(narrow, layer.gate(), into_rows(logits, experts));
    outside.forward_logits(as_rows(x, d), as_rows(logits, experts), into_rows(expected, d));
    CHECK(test::bit_difference(y, expected) == "");
  }
}

TEST_CASE("a gate of one's own runs in a layer, warm without allocations") {
  moe_layer layer(doubled{packed()}, three_best(), curves{});
  floats twice = gate_weight();
  for (float& v : twice) v *= 2.0f;
  moe_layer plain(simd::packed_matrix<>(as_rows(twice, d)), three_best(), curves{});
  for (const index_t tokens : batches) {
    const floats x = random_floats(tokens * d, 6);
    const floats expected = output(plain, x);
    CHECK(test::bit_difference(output(layer, x), expected) == "");
    floats y(x.size());
    CHECK(test::allocations_during([&] { layer.forward(as_rows(x, d), into_rows(y, d)); }) == 0);
    workspace ws;
    floats logits(static_cast<std::size_t>(tokens * experts));
    gate(as_rows(x, d), layer.gate(), into_rows(logits, experts), ws);
    CHECK(std::equal(logits.begin(), logits.end(), layer.logits().data));
  }
}

TEST_CASE(
    "routers that read no logits take no gate: the choices of route(), and no matrix of logits") {
  constexpr index_t many = 4096, tokens = 600;
  expert_table table = random_table(50, 2, many, 5);
  routing_record<std::uint16_t> record;
  std::vector<std::int32_t> ids(tokens);
  for (std::size_t t = 0; t < ids.size(); ++t) ids[t] = static_cast<std::int32_t>(t * 7 % 50);
  const floats x = random_floats(tokens * d, 7), zeros(static_cast<std::size_t>(tokens * many));
  const auto check = [&](const auto& router, const side_inputs& side) {
    for (const index_t n : {index_t{3}, tokens}) {
      moe_layer layer(no_gate(many), router, curves{}, {.d = d});
      side_inputs cut = side;
      if (!cut.token_ids.empty()) cut.token_ids = cut.token_ids.first(static_cast<std::size_t>(n));
      floats y(static_cast<std::size_t>(n * d));
      const long bytes = test::bytes_allocated_during(
          [&] { layer.forward(matrix_view<const float>(x.data(), n, d), into_rows(y, d), cut); });
      CHECK(layer.logits().rows == 0);
      if (n == tokens) CHECK(bytes < static_cast<long>(tokens * many));  // a logit has four
      workspace ws;
      assignment expected;
      route(router, matrix_view<const float>(zeros.data(), n, many), cut, ws, expected);
      CHECK(test::bit_difference(layer.choices().ids(), expected.ids()) == "");
      CHECK(test::bit_difference(layer.choices().weights(), expected.weights()) == "");
      CHECK(std::accumulate(y.begin(), y.end(), 0.0f) != 0.0f);
    }
  };
  check(random_choice{3}, {.seed = 9});
  const table_router<uniform_score> hashed{&table, {}, sum_normalized};
  check(hashed, {.token_ids = ids});
  check(table_router<uniform_score>{&table, {}, raw_weights, {}, table_key::bigram},
        {.token_ids = ids});
  const router_spec spec{.experts = many,
                         .k = 2,
                         .score = score_kind::uniform,
                         .selection = selection_kind::expert_table,
                         .normalize = normalization::sum};
  check(make_router(spec, {.table = &table}), {.token_ids = ids});
  {
    workspace ws;
    assignment chosen;
    route(hashed, matrix_view<const float>(zeros.data(), tokens, many), {.token_ids = ids}, ws,
          chosen);
    record.record(chosen);
  }
  check(replay<uniform_score, std::uint16_t>{&record}, {});
}

TEST_CASE(
    "a router picked at run time is a layer's like any other, fixed, ragged or without gate") {
  const auto check = [&](const auto& typed, const router_spec& spec) {
    moe_layer expected(packed(), typed, curves{});
    moe_layer layer(packed(), make_router(spec), curves{});
    for (const index_t tokens : batches) {
      const floats x = random_floats(tokens * d, 8);
      const floats y = output(expected, x);
      CHECK(test::bit_difference(output(layer, x), y) == "");
      CHECK(layer.experts() == expected.experts());
    }
  };
  check(three_best(), {.experts = experts, .k = k, .normalize = normalization::sum});
  check(threshold_router<sigmoid>{.threshold = 0.5f}, {.experts = experts,
                                                       .score = score_kind::sigmoid,
                                                       .selection = selection_kind::threshold,
                                                       .threshold = 0.5f});
  moe_layer hashed(no_gate(experts),
                   make_router({.experts = experts, .k = 2, .selection = selection_kind::random}),
                   curves{}, {.d = d});
  const floats x = random_floats(17 * d, 9);
  CHECK(output(hashed, x, {.seed = 3}) == output(hashed, x, {.seed = 3}));
}

TEST_CASE("experts of another width: y is as wide as they are") {
  constexpr index_t wide = 31;
  moe_layer layer(packed(), three_best(), curves{}, {.d_out = wide});
  moe_layer narrow(packed(), three_best(), curves{});
  for (const index_t tokens : batches) {
    const floats x = random_floats(tokens * d, 10);
    const floats y = output(layer, x), first = output(narrow, x);
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = 0; c < wide; ++c)
        CHECK(y[static_cast<std::size_t>(t * wide + c)] ==
              first[static_cast<std::size_t>(t * d + c % d)]);
  }
}

TEST_CASE("a layer adds to its output where told to, and to x itself") {
  moe_layer layer(packed(), three_best(), curves{}, {.output = combine_output::accumulate});
  moe_layer plain(packed(), three_best(), curves{});
  for (const index_t tokens : batches) {
    const floats x = random_floats(tokens * d, 11);
    const floats added = output(plain, x);
    floats y = x;
    layer.forward(as_rows(y, d), into_rows(y, d));
    for (std::size_t i = 0; i < y.size(); ++i)
      CHECK(std::abs(y[i] - (x[i] + added[i])) < 2e-5f * (1.0f + std::abs(y[i])));
  }
}

TEST_CASE("a layer refuses gates, rows and logits that do not fit, by name") {
  const floats x(3 * d), r(2 * d), z(3 * experts);
  floats y(3 * d);
  moe_layer layer(packed(), three_best(), curves{});
  moe_layer outside(no_gate(experts), three_best(), curves{}, {.d = d});
  const auto refusal = [&](auto&& f) { return test::refusal(f); };
  CHECK(refusal([&] { layer.forward(as_rows(x, d), as_rows(r, d), into_rows(y, d)); }) ==
        "moeroute::moe_layer: r.rows() is 2, expected 3");
  CHECK(refusal([&] { layer.forward(as_rows(x, d), as_rows(x, d / 2), into_rows(y, d)); }) ==
        "moeroute::moe_layer: r.cols() is 10, expected 20");
  CHECK(refusal([&] {
          layer.forward_logits(as_rows(x, d), as_rows(z, experts / 2), into_rows(y, d));
        }) == "moeroute::moe_layer: logits.rows() is 6, expected 3");
  CHECK(refusal([&] {
          layer.forward_logits(as_rows(x, d), matrix_view<const float>(z.data(), 3, experts - 1),
                               into_rows(y, d));
        }) == "moeroute::moe_layer: logits.cols() is 11, expected 12");
  CHECK(refusal([&] { outside.forward(as_rows(x, d), into_rows(y, d)); }) ==
        "moeroute::moe_layer: the router reads logits, and there is no gate: give it one, or take "
        "forward_logits");
  CHECK(refusal([] {
          moe_layer(packed(), make_router({.experts = experts + 1, .k = k}), curves{});
        }) == "moeroute::moe_layer: gate.columns() is 12, expected 13");
  CHECK(refusal([] { moe_layer(no_gate(experts), three_best(), curves{}); }) ==
        "moeroute::moe_layer: d is 0, expected 1 to 1099511627776");
  CHECK(refusal([] { no_gate(0); }) ==
        "moeroute::no_gate: columns is 0, expected 1 to 1099511627776");
  CHECK(refusal([] {
          moe_layer(packed(), three_best(), curves{}, {.d_out = 7, .lost = lost_token::residual});
        }) == "moeroute::moe_layer: d_out with x in the output is 7, expected 20");
  CHECK(refusal([&] { layer.set_gate(linear_gate<>(simd::packed_matrix<>(experts, d + 1))); }) ==
        "moeroute::moe_layer: gate.d() is 21, expected 20");
}

TEST_CASE("another gate has as many columns, which of keys are fewer than the experts") {
  // Twelve columns: two halves of six keys, and 36 experts.
  const product_keys<softmax> keys{.choices = k};
  const floats others = random_floats(experts * d, 21), x = random_floats(17 * d, 22);
  moe_layer layer(packed(), keys, curves{});
  moe_layer other(simd::packed_matrix<>(as_rows(others, d)), keys, curves{});
  CHECK(layer.experts() == 36);
  const floats before = output(layer, x);
  layer.set_gate(linear_gate<>(simd::packed_matrix<>(as_rows(others, d))));
  const floats after = output(layer, x);
  CHECK(test::bit_difference(after, output(other, x)) == "");
  CHECK(test::bit_difference(after, before) != "");
  layer.set_gate(as_rows(gate_weight(), d));
  CHECK(test::bit_difference(output(layer, x), before) == "");
  for (const index_t n : {index_t{11}, index_t{13}, index_t{36}})
    CHECK(test::refusal([&] { layer.set_gate(linear_gate<>(simd::packed_matrix<>(n, d))); }) ==
          "moeroute::moe_layer: gate.columns() is " + std::to_string(n) + ", expected 12");
  for (const index_t n : {d - 1, d + 1})
    CHECK(test::refusal([&] {
            layer.set_gate(linear_gate<>(simd::packed_matrix<>(experts, n)));
          }) == "moeroute::moe_layer: gate.d() is " + std::to_string(n) + ", expected 20");
  CHECK(test::bit_difference(output(layer, x), before) == "");
  // Another router has as many experts, whatever its columns.
  const auto set = [&](const product_keys<softmax>& r) {
    return test::refusal([&] { layer.set_router(r); });
  };
  CHECK(set({.choices = k, .first_keys = 5}) ==
        "moeroute::moe_layer: router.experts() is 35, expected 36");
  CHECK(set({.choices = 37}) == "moeroute::product_keys: k is 37, expected 1 to 36");
  CHECK(test::bit_difference(output(layer, x), before) == "");
  CHECK(set({.choices = 1, .first_keys = 6}) == "accepted");
  output(layer, x);
  CHECK(layer.choices().choices() == 17);
  // A layer without a gate counts its columns too.
  moe_layer outside(no_gate(experts), keys, curves{}, {.d = d});
  CHECK(test::refusal([&] { outside.set_gate(no_gate(36)); }) ==
        "moeroute::moe_layer: gate.columns() is 36, expected 12");
  CHECK(test::refusal([&] { outside.set_gate(no_gate(experts)); }) == "accepted");
}

TEST_CASE(
    "a cosine gate is trained through the layer, a gate without a gradient up to its logits") {
  constexpr index_t tokens = 17;
  const floats x = random_floats(tokens * d, 15), dy = random_floats(tokens * d, 16);
  floats y(x.size()), dx(x.size()), dgate(gate_weight().size()), dlogits(tokens * experts);
  layer_tape tape;
  moe_layer layer(scaled_cosine_gate<>(as_rows(gate_weight(), d), 0.5f), three_best(), curves{});
  layer.forward(as_rows(x, d), into_rows(y, d), side_inputs{}, serial{}, tape);
  backward(layer, as_rows(x, d), side_inputs{}, tape, as_rows(dy, d),
           layer_weights<>{as_rows(gate_weight(), d)}, curve_gradients{},
           layer_gradients{.x = into_rows(dx, d), .gate = into_rows(dgate, d)});
  const std::vector<expert_id> chosen(tape.choices.ids().begin(), tape.choices.ids().end());
  const auto slope = [&](const floats& vx, const floats& vw) {
    const auto moved = [&](float h) {
      floats at = x, w = gate_weight();
      for (std::size_t i = 0; i < at.size(); ++i) at[i] += h * vx[i];
      for (std::size_t i = 0; i < w.size(); ++i) w[i] += h * vw[i];
      moe_layer other(scaled_cosine_gate<>(as_rows(w, d), 0.5f), three_best(), curves{});
      const floats out = output(other, at);
      REQUIRE(std::equal(chosen.begin(), chosen.end(), other.choices().ids().begin()));
      return std::inner_product(out.begin(), out.end(), dy.begin(), 0.0);
    };
    return (moved(0x1p-11f) - moved(-0x1p-11f)) / 0x1p-10;
  };
  const floats vx = random_floats(tokens * d, 17), vw = random_floats(experts * d, 18);
  const floats still_x(vx.size()), still_w(vw.size());
  const double of_x = std::inner_product(dx.begin(), dx.end(), vx.begin(), 0.0);
  const double of_w = std::inner_product(dgate.begin(), dgate.end(), vw.begin(), 0.0);
  CHECK(std::abs(slope(vx, still_w) - of_x) < 1e-2 * (1.0 + std::abs(of_x)));
  CHECK(std::abs(slope(still_x, vw) - of_w) < 1e-2 * (1.0 + std::abs(of_w)));

  moe_layer own(doubled{packed()}, three_best(), curves{});
  own.forward(as_rows(x, d), into_rows(y, d), side_inputs{}, serial{}, tape);
  backward(own, as_rows(x, d), side_inputs{}, tape, as_rows(dy, d), layer_weights<>{},
           curve_gradients{},
           layer_gradients{.x = into_rows(dx, d), .logits = into_rows(dlogits, experts)});
  CHECK(std::any_of(dlogits.begin(), dlogits.end(), [](float v) { return v != 0.0f; }));
}

TEST_CASE("gradients end at the logits where these were not the gate's of x") {
  constexpr index_t tokens = 17, wide = 27;
  const floats x = random_floats(tokens * d, 12), dy = random_floats(tokens * wide, 13);
  moe_layer layer(packed(), three_best(), curves{}, {.d_out = wide});
  floats y(tokens * wide), dx(x.size()), dx_alone(x.size()), dgate(gate_weight().size()),
      dlogits(tokens * experts), dlogits_alone(tokens * experts), logits(tokens * experts);
  layer_tape tape;
  layer.forward(as_rows(x, d), into_rows(y, wide), side_inputs{}, serial{}, tape);
  backward(layer, as_rows(x, d), side_inputs{}, tape, as_rows(dy, wide),
           layer_weights<>{as_rows(gate_weight(), d)}, curve_gradients{},
           layer_gradients{.x = into_rows(dx, d),
                           .gate = into_rows(dgate, d),
                           .logits = into_rows(dlogits, experts)});
  // Rows of the router's own.
  const floats r = random_floats(tokens * d, 14);
  floats of_r(y.size()), expected(y.size());
  layer.forward(as_rows(x, d), as_rows(r, d), into_rows(expected, wide), side_inputs{}, serial{});
  layer.forward(as_rows(x, d), as_rows(r, d), into_rows(of_r, wide), side_inputs{}, serial{}, tape);
  CHECK(test::bit_difference(of_r, expected) == "");
  CHECK(test::bit_difference(of_r, y) != "");
  CHECK(test::refusal([&] {
          backward(layer, as_rows(x, d), side_inputs{}, tape, as_rows(dy, wide),
                   layer_weights<>{as_rows(gate_weight(), d)}, curve_gradients{},
                   layer_gradients{.gate = into_rows(dgate, d)});
        }) ==
        "moeroute::backward: a gradient of the gate is wanted, but the logits were not the gate's "
        "of x, or it offers no gate_backward: take gradients.logits to what made them");
  gate(as_rows(x, d), layer.gate(), into_rows(logits, experts));
  layer.forward_logits(as_rows(x, d), as_rows(logits, experts), into_rows(y, wide), side_inputs{},
                       serial{}, tape);
  backward(
      layer, as_rows(x, d), side_inputs{}, tape, as_rows(dy, wide), layer_weights<>{},
      curve_gradients{},
      layer_gradients{.x = into_rows(dx_alone, d), .logits = into_rows(dlogits_alone, experts)});
  CHECK(test::bit_difference(dlogits_alone, dlogits) == "");
  gate_backward(as_rows(x, d), as_rows(gate_weight(), d), as_rows(dlogits_alone, experts),
                gate_gradients<float>{gradient_to::add, into_rows(dx_alone, d)});
  CHECK(test::bit_difference(dx_alone, dx) == "");
  // Of a call that made none the layer has none.
  layer.forward(as_rows(x, d), into_rows(y, wide), side_inputs{});
  CHECK(layer.logits().rows == tokens);
  layer.forward_logits(as_rows(x, d), as_rows(logits, experts), into_rows(y, wide));
  CHECK(layer.logits().rows == 0);
  // Wherever the logits lie.
  floats apart(tokens * (experts + 5), 100.0f), dlogits_apart(tokens * experts);
  const matrix_view<float> spread(apart.data(), tokens, experts, experts + 5);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t e = 0; e < experts; ++e) spread(t, e) = as_rows(logits, experts)(t, e);
  layer.forward_logits(as_rows(x, d), spread, into_rows(y, wide), side_inputs{}, serial{}, tape);
  backward(
      layer, as_rows(x, d), side_inputs{}, tape, as_rows(dy, wide), layer_weights<>{},
      curve_gradients{},
      layer_gradients{.x = into_rows(dx_alone, d), .logits = into_rows(dlogits_apart, experts)});
  CHECK(test::bit_difference(dlogits_apart, dlogits) == "");
  // Slope of the sum of y dy along a direction of x, by central differences: short enough that no
  // token changes its experts.
  const std::vector<expert_id> chosen(tape.choices.ids().begin(), tape.choices.ids().end());
  const floats v = random_floats(tokens * d, 14);
  const auto moved = [&](float h) {
    floats at = x;
    for (std::size_t i = 0; i < at.size(); ++i) at[i] += h * v[i];
    const floats out = output(layer, at);
    REQUIRE(std::equal(chosen.begin(), chosen.end(), layer.choices().ids().begin()));
    return std::inner_product(out.begin(), out.end(), dy.begin(), 0.0);
  };
  const double slope = (moved(0x1p-12f) - moved(-0x1p-12f)) / 0x1p-11;
  const double said = std::inner_product(dx.begin(), dx.end(), v.begin(), 0.0);
  CHECK(std::abs(slope - said) < 5e-3 * (1.0 + std::abs(said)));
  CHECK(test::refusal([&] {
          backward(layer, as_rows(x, d), side_inputs{}, tape, as_rows(dy, wide), layer_weights<>{},
                   curve_gradients{}, layer_gradients{.gate = into_rows(dgate, d)});
        }) ==
        "moeroute::backward: a gradient of the gate is wanted, but the logits were not the gate's "
        "of x, or it offers no gate_backward: take gradients.logits to what made them");
}

TEST_CASE("a call without logits has the gradient of its rows, and none of logits") {
  for (const index_t tokens : {0, 1, 17}) {
    const floats x = random_floats(tokens * d, 15), dy = random_floats(tokens * d, 16);
    floats y(x.size()), dx(x.size(), 9.0f), dlogits(static_cast<std::size_t>(tokens * experts));
    moe_layer layer(no_gate(experts), random_choice{2}, curves{}, {.d = d});
    layer_tape tape;
    layer.forward(matrix_view<const float>(x.data(), tokens, d),
                  matrix_view<float>(y.data(), tokens, d), {.seed = 9}, serial{}, tape);
    const auto back = [&](matrix_view<float> logits) {
      return test::refusal([&] {
        backward(layer, matrix_view<const float>(x.data(), tokens, d), {.seed = 9}, tape,
                 matrix_view<const float>(dy.data(), tokens, d), layer_weights<>{},
                 curve_gradients{}, layer_gradients{.x = {dx.data(), tokens, d}, .logits = logits});
      });
    };
    CHECK(back({}) == "accepted");
    int wrong = 0;
    for (index_t i = 0; i < tokens * d; ++i) {
      const auto at = static_cast<std::size_t>(i);
      double sum = 0.0;
      for (index_t c = i / d * 2; c < i / d * 2 + 2; ++c)
        sum += static_cast<double>(tape.choices.weights()[static_cast<std::size_t>(c)]) *
               (tape.choices.ids()[static_cast<std::size_t>(c)] + 1);
      const double tanh = std::tanh(static_cast<double>(x[at]));
      sum *= static_cast<double>(dy[at]) * (1.0 - tanh * tanh);
      wrong += std::abs(static_cast<double>(dx[at]) - sum) > 1e-5 * (1.0 + std::abs(sum));
    }
    CHECK(wrong == 0);
    if (tokens > 0)
      CHECK(back({dlogits.data(), tokens, experts}) ==
            "moeroute::backward: gradients.logits is given, but the call had no logits");
  }
}

}  // namespace moe_layer_gates_test
