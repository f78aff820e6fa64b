// Variants of SwiGLU experts, against double.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/layer/swiglu_experts.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <string>
#include <vector>

#include "oracle/layer.hpp"
#include "support/compare.hpp"
#include "support/planned.hpp"
#include "support/refusal.hpp"

namespace swiglu_options_test {

using namespace moeroute;

namespace {

constexpr index_t d = 19;

struct parts {
  index_t ff;
  row_matrix<float> gate = 3.0f * test::random_rows(ff, d, 1);
  row_matrix<float> up = 3.0f * test::random_rows(ff, d, 2);
  row_matrix<float> down = test::random_rows(d, ff, 3);
  std::vector<float> gate_bias = test_bias(ff, 4), up_bias = test_bias(ff, 5),
                     down_bias = test_bias(d, 6);

  static std::vector<float> test_bias(index_t n, std::uint64_t seed) {
    const row_matrix<float> b = test::random_rows(1, n, seed);
    return {b.data(), b.data() + n};
  }
  static oracle::matrix copy(const row_matrix<float>& m) { return {m.rows(), m.cols(), m.data()}; }
};

oracle::matrix slow(const parts& p, const oracle::matrix& x, const swiglu_options& o) {
  const auto bias = [](const std::vector<float>& b) {
    return std::vector<double>(b.begin(), b.end());
  };
  oracle::matrix gate = oracle::linear(x, parts::copy(p.gate), bias(p.gate_bias));
  const oracle::matrix up = oracle::linear(x, parts::copy(p.up), bias(p.up_bias));
  const double limit = o.limit > 0.0f ? static_cast<double>(o.limit) : 1e300;
  for (std::size_t i = 0; i < gate.value.size(); ++i) {
    const double g = std::min(gate.value[i], limit), u = std::clamp(up.value[i], -limit, limit);
    if (o.activation == expert_activation::relu_squared) {
      gate.value[i] = u > 0.0 ? u * u : 0.0;
    } else {
      gate.value[i] = g / (1.0 + std::exp(-static_cast<double>(o.alpha) * g)) *
                      (u + static_cast<double>(o.up_offset));
    }
  }
  return oracle::linear(gate, parts::copy(p.down), bias(p.down_bias));
}

}  // namespace

TEST_CASE("limit, alpha, offset, biases and relu squared are what they say, all at once") {
  test::random rng(3);
  for (int round = 0; round < 60; ++round) {
    const index_t ff = 1 + rng.below(40), n = round % 10 == 0 ? 190 + rng.below(8) : rng.below(6),
                  of_x = d + rng.below(3), of_y = d + rng.below(3);
    swiglu_options o;
    if (rng.below(3) == 0) o.activation = expert_activation::relu_squared;
    if (rng.below(2) == 0) o.limit = 0.5f + 4.0f * rng.uniform();
    if (rng.below(2) == 0) o.alpha = rng.normal();
    if (rng.below(2) == 0) o.up_offset = rng.normal();
    const bool gated = o.activation == expert_activation::silu_gated;
    INFO("round " << round << ", gated " << gated << ", ff " << ff << ", rows " << n);
    parts p{ff};
    swiglu_experts<> experts(2, d, ff, o);
    CHECK(experts.kept_floats() == (gated ? 2 * ff : ff));
    if (gated) experts.set_gate(1, const_view(p.gate));
    experts.set_up(1, const_view(p.up));
    experts.set_down(1, const_view(p.down));
    if (rng.below(2) == 0) {
      if (gated) experts.set_gate_bias(1, p.gate_bias);
      experts.set_up_bias(1, p.up_bias);
      experts.set_down_bias(1, p.down_bias);
    } else {
      for (auto* bias : {&p.gate_bias, &p.up_bias, &p.down_bias})
        std::fill(bias->begin(), bias->end(), 0.0f);
    }
    const row_matrix<float> x = test::random_rows(n, of_x, 7), dense = x.leftCols(d);
    row_matrix<float> y = row_matrix<float>::Constant(n, of_y, 9.0f);
    std::vector<float> memory(static_cast<std::size_t>(experts.scratch_floats()));
    const index_t width = experts.kept_floats(), of_kept = width + rng.below(3);
    row_matrix<float> kept = row_matrix<float>::Constant(n, of_kept, 9.0f), between(n, width);
    const matrix_view<const float> in(x.data(), n, d, of_x);
    const matrix_view<float> out(y.data(), n, d, of_y);
    if (rng.below(2) == 0) {
      experts(1, in, out, {kept.data(), n, width, of_kept}, memory.data());
      experts.activation_input(1, in, view(between));
      CHECK(kept.leftCols(width) == between);
      CHECK((kept.rightCols(of_kept - width).array() == 9.0f).all());
    } else {
      experts(1, in, out, memory.data());
    }
    CHECK((y.rightCols(of_y - d).array() == 9.0f).all());
    const row_matrix<float> made = y.leftCols(d);
    const oracle::matrix expected = slow(p, parts::copy(dense), o);
    double largest = 0;
    for (const double v : expected.value) largest = std::max(largest, std::abs(v));
    CHECK(test::difference(test::values(made), expected.value, 1e-5, 1e-5 * largest) == "");
  }
}

TEST_CASE("fused checkpoints of either layout give the bits of separate matrices") {
  constexpr index_t ff = 24, n = 3;
  swiglu_experts<> apart(n, d, ff), halves(n, d, ff), turns(n, d, ff);
  row_matrix<float> in_halves(n * 2 * ff, d), in_turns(n * 2 * ff, d), downs(n * d, ff);
  for (expert_id e = 0; e < n; ++e) {
    const auto seed = static_cast<std::uint64_t>(20 + 3 * e);
    const row_matrix<float> gate = test::random_rows(ff, d, seed),
                            up = test::random_rows(ff, d, seed + 1),
                            down = test::random_rows(d, ff, seed + 2);
    apart.set_gate(e, const_view(gate));
    apart.set_up(e, const_view(up));
    apart.set_down(e, const_view(down));
    in_halves.middleRows(e * 2 * ff, ff) = gate;
    in_halves.middleRows(e * 2 * ff + ff, ff) = up;
    for (index_t r = 0; r < ff; ++r) {
      in_turns.row(e * 2 * ff + 2 * r) = gate.row(r);
      in_turns.row(e * 2 * ff + 2 * r + 1) = up.row(r);
    }
    downs.middleRows(e * d, d) = down;
  }
  halves.set_all_gate_up(const_view(in_halves), gate_up_layout::gate_then_up);
  halves.set_all_down(const_view(downs));
  turns.set_all_gate_up(const_view(in_turns), gate_up_layout::interleaved);
  turns.set_all_down(const_view(downs));
  const row_matrix<float> x = test::random_rows(7, d, 30);
  std::vector<float> memory(static_cast<std::size_t>(apart.scratch_floats()));
  for (expert_id e = 0; e < n; ++e) {
    row_matrix<float> a(7, d), b(7, d), c(7, d);
    apart(e, const_view(x), view(a), memory.data());
    halves(e, const_view(x), view(b), memory.data());
    turns(e, const_view(x), view(c), memory.data());
    CHECK(test::bit_difference(test::values(b), test::values(a)) == "");
    CHECK(test::bit_difference(test::values(c), test::values(a)) == "");
  }
}

TEST_CASE("options and weights that do not fit are refused by name") {
  CHECK(test::refusal([] { swiglu_experts<>(1, 5, 7, {.limit = -1.0f}); }) ==
        "moeroute::swiglu_experts: limit is -1.000000, expected >= 0");
  CHECK(test::refusal([] { swiglu_experts<>(1, 5, 7, {.limit = INFINITY}); }) ==
        "moeroute::swiglu_experts: limit is inf, expected >= 0");
  for (const swiglu_options& o : {swiglu_options{.alpha = NAN}, swiglu_options{.alpha = INFINITY},
                                  swiglu_options{.up_offset = -INFINITY}})
    CHECK(test::refusal([&] { swiglu_experts<>(1, 5, 7, o); }) ==
          "moeroute::swiglu_experts: alpha or up_offset is not a finite number");
  const row_matrix<float> w = row_matrix<float>::Zero(7, 5);
  swiglu_experts<> gateless(2, 5, 7, {.activation = expert_activation::relu_squared});
  CHECK(test::refusal([&] { gateless.set_gate(0, const_view(w)); }) ==
        "moeroute::swiglu_experts: these experts have no gate: relu_squared");
  swiglu_experts<> gated(2, 5, 7);
  CHECK(test::refusal([&] { gated.set_gate_up(0, const_view(w), gate_up_layout::gate_then_up); }) ==
        "moeroute::swiglu_experts: w.rows() is 7, expected 14");
  const std::vector<float> six(6);
  CHECK(test::refusal([&] { gated.set_up_bias(0, six); }) ==
        "moeroute::swiglu_experts: bias.size() is 6, expected 7");
}

}  // namespace swiglu_options_test
