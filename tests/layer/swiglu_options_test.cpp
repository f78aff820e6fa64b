// Variants of SwiGLU experts, against double.
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/layer/swiglu_backward.hpp>
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

std::vector<double> as_double(const std::vector<float>& b) { return {b.begin(), b.end()}; }

oracle::matrix slow(const parts& p, const oracle::matrix& x, const swiglu_options& o) {
  oracle::matrix gate = oracle::linear(x, parts::copy(p.gate), as_double(p.gate_bias));
  const oracle::matrix up = oracle::linear(x, parts::copy(p.up), as_double(p.up_bias));
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
  return oracle::linear(gate, parts::copy(p.down), as_double(p.down_bias));
}

// Whether what lies behind the columns of a matrix is what filled it.
bool filled_from(const row_matrix<float>& m, index_t cols, float with) {
  bool all = true;
  for (index_t r = 0; r < m.rows(); ++r)
    for (index_t c = cols; c < m.cols(); ++c) all = all && m(r, c) == with;
  return all;
}

// Gradients of one expert: of x, gate, up, down, and of their biases.
struct slow_gradients {
  oracle::matrix x, gate, up, down, gate_bias, up_bias, down_bias;

  slow_gradients(const parts& p, const oracle::matrix& in, const oracle::matrix& dy,
                 const swiglu_options& o)
      : x(in.rows, d),
        gate(p.ff, d),
        up(p.ff, d),
        down(d, p.ff),
        gate_bias(1, p.ff),
        up_bias(1, p.ff),
        down_bias(1, d) {
    const oracle::matrix g = oracle::linear(in, parts::copy(p.gate), as_double(p.gate_bias)),
                         u = oracle::linear(in, parts::copy(p.up), as_double(p.up_bias));
    const double limit = o.limit > 0.0f ? static_cast<double>(o.limit) : 1e300;
    const auto alpha = static_cast<double>(o.alpha);
    for (index_t r = 0; r < in.rows; ++r) {
      for (index_t c = 0; c < d; ++c) down_bias(0, c) += dy(r, c);
      for (index_t i = 0; i < p.ff; ++i) {
        const double held = std::min(g(r, i), limit),
                     open = std::clamp(u(r, i), -limit, limit) + static_cast<double>(o.up_offset);
        const double s = 1.0 / (1.0 + std::exp(-alpha * held));
        double dh = 0.0, h = held * s * open, dg = open * (s + alpha * held * s * (1.0 - s)),
               du = held * s;
        for (index_t c = 0; c < d; ++c) dh += dy(r, c) * static_cast<double>(p.down(c, i));
        if (g(r, i) > limit) dg = 0.0;
        if (std::abs(u(r, i)) > limit) du = 0.0;
        if (o.activation == expert_activation::relu_squared) {
          const double positive = std::clamp(u(r, i), 0.0, limit);
          h = positive * positive;
          dg = 0.0;
          du = u(r, i) > limit ? 0.0 : 2.0 * positive;
        }
        gate_bias(0, i) += dg * dh;
        up_bias(0, i) += du * dh;
        for (index_t c = 0; c < d; ++c) {
          x(r, c) += dg * dh * static_cast<double>(p.gate(i, c)) +
                     du * dh * static_cast<double>(p.up(i, c));
          gate(i, c) += dg * dh * in(r, c);
          up(i, c) += du * dh * in(r, c);
          down(c, i) += dy(r, c) * h;
        }
      }
    }
  }
};

// The second of two experts that lie in rows with room behind them: what is made of it, and all
// else as it was.
struct second_of_two {
  index_t rows, cols, stride;
  row_matrix<float> all;

  second_of_two(index_t high, index_t wide, index_t room, float filled)
      : rows(high),
        cols(wide),
        stride(wide + room),
        all(row_matrix<float>::Constant(2 * high, wide + room, filled)) {}
  second_of_two(const row_matrix<float>& m, index_t room)
      : second_of_two(m.rows(), m.cols(), room, NAN) {
    all.bottomLeftCorner(rows, cols) = m;
  }
  matrix_view<float> whole() { return {all.data(), 2 * rows, cols, stride}; }
  // "" where one part is `expected` on top of `before`.
  std::string differs(const oracle::matrix& expected, float before) const {
    if (!(all.topRows(rows).array() == before).all() || !filled_from(all, cols, before))
      return "elsewhere";
    const row_matrix<float> made = all.bottomLeftCorner(rows, cols).array() - before;
    double largest = 1.0;
    for (const double v : expected.value) largest = std::max(largest, std::abs(v));
    return test::difference(test::values(made), expected.value, 1e-5, 2e-5 * largest);
  }
};

}  // namespace

TEST_CASE("limit, alpha, offset, biases and relu squared are what they say, all at once") {
  test::random rng(3);
  for (int round = 0; round < 60; ++round) {
    const index_t ff = 1 + rng.below(40), n = round % 10 == 0 ? 190 + rng.below(8) : rng.below(6),
                  of_x = d + rng.below(3), of_y = d + rng.below(3);
    swiglu_options o;
    if (rng.below(3) == 0) o.activation = expert_activation::relu_squared;
    if (rng.below(2) == 0) o.limit = 0.5f + 4.0f * rng.uniform();
    if (rng.below(2) == 0) o.alpha = round % 4 == 1 ? 0.0f : rng.normal();
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
      CHECK(filled_from(kept, width, 9.0f));
    } else {
      experts(1, in, out, memory.data());
    }
    CHECK(filled_from(y, d, 9.0f));
    const row_matrix<float> made = y.leftCols(d);
    const oracle::matrix expected = slow(p, parts::copy(dense), o);
    double largest = 0;
    for (const double v : expected.value) largest = std::max(largest, std::abs(v));
    CHECK(test::difference(test::values(made), expected.value, 1e-5, 1e-5 * largest) == "");

    // Backwards, added to what is there; memory is what somebody left in it.
    const index_t rooms[] = {rng.below(3), rng.below(3), rng.below(3), rng.below(3)};
    const auto room = [&](int i) { return rooms[i]; };
    const float before = 0.5f;
    second_of_two gate(p.gate, room(0)), up(p.up, room(1)), down(p.down, room(2)),
        dgate(gated ? ff : 0, d, room(1), before), dup(ff, d, room(2), before),
        ddown(d, ff, room(3), before);
    std::vector<float> biases[3];
    const bool with_biases = rng.below(3) > 0;
    if (with_biases)
      for (int i = gated ? 0 : 1; i < 3; ++i)
        biases[i].assign(static_cast<std::size_t>(i == 2 ? 2 * d : 2 * ff), before);
    const swiglu_backward<> back(
        experts, {gated ? gate.whole() : matrix_view<float>{}, up.whole(), down.whole()},
        {dgate.whole(), dup.whole(), ddown.whole()}, {biases[0], biases[1], biases[2]});
    const row_matrix<float> dy = test::random_rows(n, of_y, 8), dense_dy = dy.leftCols(d);
    row_matrix<float> dx = row_matrix<float>::Constant(n, of_x, 9.0f);
    memory.assign(static_cast<std::size_t>(back.scratch_floats()), NAN);
    const matrix_view<const float> dout(dy.data(), n, d, of_y);
    const matrix_view<float> din(dx.data(), n, d, of_x);
    if (rng.below(2) == 0) {
      experts.activation_input(1, in, {kept.data(), n, width, of_kept});
      back(1, in, dout, din, {kept.data(), n, width, of_kept}, memory.data());
    } else {
      back(1, in, dout, din, memory.data());
    }
    const slow_gradients want(p, parts::copy(dense), parts::copy(dense_dy), o);
    CHECK(filled_from(dx, d, 9.0f));
    const row_matrix<float> of_input = dx.leftCols(d);
    largest = 1.0;
    for (const double v : want.x.value) largest = std::max(largest, std::abs(v));
    CHECK(test::difference(test::values(of_input), want.x.value, 1e-5, 2e-5 * largest) == "");
    if (gated) CHECK(dgate.differs(want.gate, before) == "");
    CHECK(dup.differs(want.up, before) == "");
    CHECK(ddown.differs(want.down, before) == "");
    if (!with_biases) continue;
    const oracle::matrix* const sums[] = {&want.gate_bias, &want.up_bias, &want.down_bias};
    for (int i = gated ? 0 : 1; i < 3; ++i) {
      second_of_two made_bias(1, i == 2 ? d : ff, 0, 0.0f);
      std::copy(biases[i].begin(), biases[i].end(), made_bias.all.data());
      CHECK(made_bias.differs(*sums[i], before) == "");
    }
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
  const index_t beyond = (index_t{1} << 40) + 1;
  const auto sized = [](index_t n, index_t wide, index_t ff) {
    return test::refusal([&] { swiglu_experts<>(n, wide, ff); });
  };
  for (const index_t n : {index_t{0}, index_t{1048577}})
    CHECK(sized(n, 5, 7) ==
          "moeroute::swiglu_experts: experts is " + std::to_string(n) + ", expected 1 to 1048576");
  for (const index_t n : {index_t{-1}, beyond}) {
    const std::string range = " is " + std::to_string(n) + ", expected 0 to 1099511627776";
    CHECK(sized(1, n, 7) == "moeroute::swiglu_experts: d" + range);
    CHECK(sized(1, 5, n) == "moeroute::swiglu_experts: ff" + range);
  }
  CHECK(sized(1, 0, 0) == "accepted");
  CHECK(test::refusal([] { swiglu_experts<>(1, 5, 7, {.limit = NAN}); }) ==
        "moeroute::swiglu_experts: limit is nan, expected >= 0");
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
  const std::vector<float> six(6), seven(7);
  const row_matrix<float> six_rows = row_matrix<float>::Zero(6, 5);
  const std::string none = "these experts have no gate: relu_squared";
  constexpr auto turns = gate_up_layout::interleaved;
  const test::refusals refused{
      {[&] { gated.set_gate_bias(0, six); }, "bias.size() is 6, expected 7"},
      {[&] { gated.set_up_bias(0, six); }, "bias.size() is 6, expected 7"},
      {[&] { gated.set_down_bias(0, six); }, "bias.size() is 6, expected 5"},
      {[&] { gated.set_gate(0, const_view(six_rows)); }, "w.rows() is 6, expected 7"},
      {[&] { gated.set_up(0, const_view(six_rows)); }, "w.rows() is 6, expected 7"},
      {[&] { gated.set_all_gate_up(const_view(w), turns); }, "w.rows() is 7, expected 28"},
      {[&] { gated.set_all_down(const_view(w)); }, "w.rows() is 7, expected 10"},
      {[&] { gateless.set_gate_bias(0, seven); }, none},
      {[&] { gateless.set_gate_up(0, const_view(w), turns); }, none},
  };
  for (const auto& [call, message] : refused)
    CHECK(test::refusal(call) == "moeroute::swiglu_experts: " + message);
  const swiglu_options plain;
  CHECK((plain.activation == expert_activation::silu_gated && plain.limit == 0.0f &&
         plain.alpha == 1.0f && plain.up_offset == 0.0f));
}

TEST_CASE("what is at a limit passes it, there and back, and NaN stays NaN") {
  const float values[] = {2.0f, -2.0f, 0.0f, 3.0f, -3.0f, NAN};
  const float one = 1.0f;
  const matrix_view<const float> x(&one, 1, 1);
  index_t wrong = 0;
  const auto same = [](float a, double b) {
    return std::isnan(b) ? std::isnan(a) : std::abs(static_cast<double>(a) - b) < 1e-5;
  };
  for (const auto kind : {expert_activation::silu_gated, expert_activation::relu_squared})
    for (const float limit : {0.0f, 2.0f})
      for (const float g : values)
        for (const float u : values) {
          const bool gated = kind == expert_activation::silu_gated, bounded = limit > 0.0f;
          swiglu_experts<> experts(1, 1, 1, {.activation = kind, .limit = limit});
          const matrix_view<const float> gate(&g, gated ? 1 : 0, 1), up(&u, 1, 1);
          if (gated) experts.set_gate(0, gate);
          experts.set_up(0, up);
          experts.set_down(0, x);
          float y = 0.0f, dx = 0.0f, dg = 0.0f, du = 0.0f, dd = 0.0f;
          std::vector<float> memory(static_cast<std::size_t>(experts.scratch_floats()));
          experts(0, x, matrix_view<float>(&y, 1, 1), memory.data());
          const swiglu_backward<> back(
              experts, {gate, up, x},
              {{&dg, gate.rows, 1}, matrix_view<float>(&du, 1, 1), matrix_view<float>(&dd, 1, 1)});
          memory.resize(static_cast<std::size_t>(back.scratch_floats()));
          back(0, x, x, matrix_view<float>(&dx, 1, 1), memory.data());
          const double gd = bounded && g > limit ? 2.0 : static_cast<double>(g),
                       ud = bounded && u > limit            ? 2.0
                            : bounded && gated && u < -2.0f ? -2.0
                                                            : static_cast<double>(u);
          const double s = 1.0 / (1.0 + std::exp(-gd)), positive = ud < 0.0 ? 0.0 : ud;
          const bool held_gate = bounded && g > limit,
                     held_up = bounded && (u > limit || (gated && u < -limit));
          const double value = gated ? gd * s * ud : positive * positive;
          wrong += !same(y, value) || !same(dd, value);
          wrong += gated && !same(dg, held_gate ? 0.0 : ud * (s + gd * s * (1.0 - s)));
          wrong += !same(du, held_up ? 0.0 : gated ? gd * s : 2.0 * positive);
        }
  CHECK(wrong == 0);
}

}  // namespace swiglu_options_test
