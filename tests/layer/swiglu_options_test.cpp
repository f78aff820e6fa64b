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

TEST_CASE("limit, alpha, offset, biases and relu squared are what they say, for every width") {
  const swiglu_options variants[] = {
      {},
      {.limit = 2.0f},
      {.limit = 7.0f, .alpha = 1.702f, .up_offset = 1.0f},
      {.activation = expert_activation::relu_squared},
      {.activation = expert_activation::relu_squared, .limit = 3.0f},
  };
  for (const index_t ff : {1, 16, 33})
    for (const swiglu_options& o : variants) {
      const parts p{ff};
      swiglu_experts<> experts(2, d, ff, o);
      if (o.activation == expert_activation::silu_gated) {
        experts.set_gate(1, const_view(p.gate));
        experts.set_gate_bias(1, p.gate_bias);
      }
      experts.set_up(1, const_view(p.up));
      experts.set_up_bias(1, p.up_bias);
      experts.set_down(1, const_view(p.down));
      experts.set_down_bias(1, p.down_bias);
      const row_matrix<float> x = test::random_rows(11, d, 7);
      row_matrix<float> y(11, d);
      std::vector<float> memory(static_cast<std::size_t>(experts.scratch_floats()));
      experts(1, const_view(x), view(y), memory.data());
      const oracle::matrix expected = slow(p, parts::copy(x), o);
      double largest = 0;
      for (const double v : expected.value) largest = std::max(largest, std::abs(v));
      CHECK(test::difference(test::values(y), expected.value, 1e-5, 1e-5 * largest) == "");
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
  CHECK(test::refusal([] {
          swiglu_experts<>(1, 5, 7, {.limit = -1.0f});
        }).starts_with("moeroute::swiglu_experts: limit is -1"));
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
