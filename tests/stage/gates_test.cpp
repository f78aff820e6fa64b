#include <moeroute/stage/gates/codebook.hpp>
#include <moeroute/stage/gates/cosine.hpp>
#include <moeroute/stage/gates/make_gate.hpp>
#include <moeroute/stage/gates/mixing.hpp>
#include <moeroute/stage/gates/mlp.hpp>
#include <moeroute/stage/gates/normalized.hpp>
#include <moeroute/stage/gates_backward.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/policy/spec_text.hpp>
#include <string>
#include <type_traits>
#include <vector>

#include "oracle/layer.hpp"
#include "oracle/losses.hpp"
#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/float_rows.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/strided.hpp"
#include "support/threads.hpp"

using namespace moeroute;
using test::as_rows;
using test::floats;
using test::random_floats;
using test::wide;

namespace {

constexpr index_t batches[] = {0, 1, 5, 16, 100};
constexpr index_t row_width = 37, gate_experts = 11;

double dot(const oracle::matrix& a, index_t i, const oracle::matrix& b, index_t j) {
  double sum = 0.0;
  for (index_t c = 0; c < a.cols; ++c) sum += a(i, c) * b(j, c);
  return sum;
}
oracle::matrix cosines(const oracle::matrix& x, const oracle::matrix& w) {
  oracle::matrix z(x.rows, w.rows);
  for (index_t t = 0; t < x.rows; ++t)
    for (index_t e = 0; e < w.rows; ++e)
      z(t, e) = dot(x, t, w, e) / std::sqrt(dot(x, t, x, t) * dot(w, e, w, e));
  return z;
}
void softmax_of(oracle::matrix& z) {
  for (index_t t = 0; t < z.rows; ++t) {
    double most = z(t, 0), sum = 0.0;
    for (index_t c = 0; c < z.cols; ++c) most = std::max(most, z(t, c));
    for (index_t c = 0; c < z.cols; ++c) sum += z(t, c) = std::exp(z(t, c) - most);
    for (index_t c = 0; c < z.cols; ++c) z(t, c) /= sum;
  }
}

// A gate agrees with its oracle on float and bfloat16 rows that lie apart, under executors, without
// allocations once warm, and refuses rows of another width.
template <class G, class Oracle>
void agrees(const G& g, Oracle&& oracle, double tolerance, bool rows_alone = true) {
  workspace ws;
  const auto run = [&]<class T>(const std::vector<T>& x, index_t stride, const auto& exec) {
    const index_t tokens = static_cast<index_t>(x.size()) / stride;
    floats logits(static_cast<std::size_t>(tokens * (g.columns() + 3)), 7.0f);
    const matrix_view<float> out(logits.data(), tokens, g.columns(), g.columns() + 3);
    const matrix_view<const T> in(x.data(), tokens, g.d(), stride);
    const auto call = [&] {
      if constexpr (gate_function<G>) {
        gate(in, g, out, exec);
      } else {
        gate(in, g, out, ws, exec);
      }
    };
    call();
    if (std::is_same_v<std::remove_cvref_t<decltype(exec)>, serial>)
      CHECK(test::allocations_during(call) == 0);
    floats packed;
    for (index_t t = 0; t < tokens; ++t) {
      packed.insert(packed.end(), out.row(t), out.row(t) + g.columns());
      for (index_t c = g.columns(); c < g.columns() + 3; ++c) CHECK(out.row(t)[c] == 7.0f);
    }
    return packed;
  };
  for (const index_t tokens : batches) {
    const index_t stride = g.d() + 5;
    const floats x = random_floats(tokens * stride, static_cast<std::uint64_t>(tokens) + 50);
    std::vector<bfloat16> narrow;
    floats dense, dense_narrow;
    for (const float v : x) narrow.push_back(static_cast<bfloat16>(v));
    for (index_t t = 0; t < tokens; ++t)
      for (index_t c = 0; c < g.d(); ++c) {
        const auto at = static_cast<std::size_t>(t * stride + c);
        dense.push_back(x[at]);
        dense_narrow.push_back(static_cast<float>(narrow[at]));
      }
    INFO(tokens << " tokens");
    const floats z = run(x, stride, serial{});
    CHECK(test::difference(z, oracle(wide(dense, g.d())).value, tolerance, tolerance) == "");
    CHECK(test::difference(run(narrow, stride, serial{}), oracle(wide(dense_narrow, g.d())).value,
                           tolerance, tolerance) == "");
    CHECK(test::bit_difference(run(x, stride, test::several_threads{3}), z) == "");
    if (!rows_alone || tokens < 2) continue;
    const floats last(x.end() - stride, x.end());
    const floats alone = run(last, stride, serial{});
    CHECK(std::equal(alone.begin(), alone.end(), z.end() - g.columns()));
  }
  floats x(static_cast<std::size_t>(2 * (g.d() + 1))), z(static_cast<std::size_t>(2 * g.columns()));
  const auto refusal = [&](index_t cols, index_t out_rows, index_t out_cols) {
    return test::refusal([&] {
      const matrix_view<const float> in(x.data(), 2, cols);
      const matrix_view<float> out(z.data(), out_rows, out_cols);
      if constexpr (gate_function<G>) {
        gate(in, g, out);
      } else {
        gate(in, g, out, ws);
      }
    });
  };
  const std::string width = std::to_string(g.d()), columns = std::to_string(g.columns());
  CHECK(refusal(g.d() + 1, 2, g.columns()) ==
        "moeroute::gate: x.cols() is " + std::to_string(g.d() + 1) + ", expected " + width);
  CHECK(refusal(g.d(), 1, g.columns()) == "moeroute::gate: logits.rows() is 1, expected 2");
  CHECK(refusal(g.d(), 2, g.columns() - 1) == "moeroute::gate: logits.cols() is " +
                                                  std::to_string(g.columns() - 1) + ", expected " +
                                                  columns);
}

}  // namespace

TEST_CASE("a linear gate's logits are x W^T + b, of float and of 16-bit weights") {
  const floats w = random_floats(gate_experts * row_width, 1), b = random_floats(gate_experts, 2);
  simd::packed_matrix<> packed(as_rows(w, row_width));
  simd::packed_matrix<bfloat16> narrow(as_rows(w, row_width));
  floats rounded = w;
  for (float& v : rounded) v = static_cast<float>(static_cast<bfloat16>(v));
  for (index_t e = 0; e < gate_experts; ++e)
    packed.bias(e) = narrow.bias(e) = b[static_cast<std::size_t>(e)];
  const std::vector<double> bias(b.begin(), b.end());
  agrees(
      linear_gate<>(packed),
      [&](const oracle::matrix& x) { return oracle::linear(x, wide(w, row_width), bias); }, 2e-5);
  agrees(
      linear_gate<bfloat16>(narrow),
      [&](const oracle::matrix& x) { return oracle::linear(x, wide(rounded, row_width), bias); },
      2e-5);
}

TEST_CASE("a cosine gate's logits are cos / temperature, of any norms of its weights") {
  const floats w = random_floats(gate_experts * row_width, 3, 9.0f);
  const auto expected = [&](const oracle::matrix& x) {
    oracle::matrix z = cosines(x, wide(w, row_width));
    for (double& v : z.value) v /= 0.07;
    return z;
  };
  scaled_cosine_gate<> g(as_rows(w, row_width), 0.07f);
  agrees(g, expected, 2e-5);
  floats longer = w;
  for (float& v : longer) v *= 4.0f;
  g.set_weight(as_rows(longer, row_width));
  agrees(g, expected, 2e-5);
  CHECK(test::refusal([&] { scaled_cosine_gate<>(as_rows(w, row_width), 0.0f); }) ==
        "moeroute::scaled_cosine_gate: temperature is 0.000000, expected a number above 0");
  CHECK(test::refusal([&] { g.set_weight(as_rows(w, gate_experts)); }) ==
        "moeroute::scaled_cosine_gate: weight.rows() is 37, expected 11");
}

TEST_CASE("a low-rank cosine gate's logits are cos(P x, w) / temperature") {
  constexpr index_t rank = 6;
  const floats p = random_floats(rank * row_width, 4), w = random_floats(gate_experts * rank, 5);
  const low_rank_cosine_gate<> g(simd::packed_matrix<>(as_rows(p, row_width)), as_rows(w, rank),
                                 0.5f);
  agrees(
      g,
      [&](const oracle::matrix& x) {
        oracle::matrix z = cosines(oracle::linear(x, wide(p, row_width)), wide(w, rank));
        for (double& v : z.value) v /= 0.5;
        return z;
      },
      1e-5);
  CHECK(test::refusal([&] {
          low_rank_cosine_gate<>(simd::packed_matrix<>(as_rows(p, row_width)),
                                 as_rows(p, row_width), 0.5f);
        }) == "moeroute::low_rank_cosine_gate: weight.cols() is 37, expected 6");
}

TEST_CASE("a gate with a norm of its own reads x / rms(x), scaled") {
  const floats w = random_floats(gate_experts * row_width, 6), gamma = random_floats(row_width, 7),
               b = random_floats(gate_experts, 8);
  const auto expected = [&](const oracle::matrix& x, bool with_gamma, double scale, double eps,
                            bool with_bias) {
    oracle::matrix r = x;
    for (index_t t = 0; t < x.rows; ++t) {
      const double root = std::sqrt(dot(x, t, x, t) / static_cast<double>(row_width) + eps);
      for (index_t c = 0; c < row_width; ++c)
        r(t, c) *= scale / root * (with_gamma ? double{gamma[static_cast<std::size_t>(c)]} : 1.0);
    }
    return oracle::linear(
        r, wide(w, row_width),
        with_bias ? std::vector<double>(b.begin(), b.end()) : std::vector<double>{});
  };
  const float scale = 1.0f / std::sqrt(static_cast<float>(row_width));
  agrees(
      rms_gate<>(as_rows(w, row_width), {.gamma = gamma, .scale = scale}),
      [&](const oracle::matrix& x) { return expected(x, true, double{scale}, 1e-6, false); }, 1e-5);
  agrees(
      rms_gate<>(as_rows(w, row_width), {.eps = 0.5f}, b),
      [&](const oracle::matrix& x) { return expected(x, false, 1.0, 0.5, true); }, 2e-5);
  // A row of zeros has the bias alone, also where nothing is added to the mean.
  floats z(gate_experts), zero(row_width);
  gate(as_rows(zero, row_width), rms_gate<>(as_rows(w, row_width), {.eps = 0.0f}, b),
       matrix_view<float>(z.data(), 1, gate_experts));
  CHECK(z == b);
  CHECK(test::refusal([&] { rms_gate<>(as_rows(w, row_width), {.gamma = b}); }) ==
        "moeroute::rms_gate: gamma.size() is 11, expected 37");
  CHECK(test::refusal([&] { rms_gate<>(as_rows(w, row_width), {}, gamma); }) ==
        "moeroute::rms_gate: bias.size() is 37, expected 11");
  CHECK(test::refusal([&] { rms_gate<>(as_rows(w, row_width), {.eps = -1.0f}); }) ==
        "moeroute::rms_gate: eps is -1.000000, expected a number of 0 or more");
}

TEST_CASE("a gate with a hidden layer is W2 f(W1 x + b1) + b2") {
  constexpr index_t hidden = 19;
  const floats first = random_floats(hidden * row_width, 9, 0.3f),
               second = random_floats(gate_experts * hidden, 10), b = random_floats(hidden, 11);
  simd::packed_matrix<> packed(as_rows(first, row_width));
  for (index_t i = 0; i < hidden; ++i) packed.bias(i) = b[static_cast<std::size_t>(i)];
  const auto check = [&](gate_activation f, auto&& of) {
    agrees(
        mlp_gate<>(packed, simd::packed_matrix<>(as_rows(second, hidden)), f),
        [&](const oracle::matrix& x) {
          oracle::matrix h = oracle::linear(x, wide(first, row_width), {b.begin(), b.end()});
          for (double& v : h.value) v = of(v);
          return oracle::linear(h, wide(second, hidden));
        },
        2e-5);
  };
  check(gate_activation::relu, [](double v) { return std::max(v, 0.0); });
  check(gate_activation::tanh, [](double v) { return std::tanh(v); });
  check(gate_activation::silu, [](double v) { return v / (1.0 + std::exp(-v)); });
  CHECK(test::refusal([&] { mlp_gate<>(packed, packed); }) ==
        "moeroute::mlp_gate: second.cols() is 37, expected 19");
}

TEST_CASE("a codebook gate's best expert has the nearest code, by brute force") {
  for (const index_t codes : {gate_experts, index_t{30}, index_t{512}}) {
    const floats c = random_floats(codes * row_width, 12);
    const codebook_gate<> g(as_rows(c, row_width), gate_experts);
    const oracle::matrix code = wide(c, row_width);
    const auto scores = [&](const oracle::matrix& x) {
      oracle::matrix z(x.rows, gate_experts);
      for (index_t t = 0; t < x.rows; ++t)
        for (index_t i = 0; i < codes; ++i) {
          const double score = dot(x, t, code, i) - 0.5 * dot(code, i, code, i);
          z(t, i % gate_experts) =
              i < gate_experts ? score : std::max(z(t, i % gate_experts), score);
        }
      return z;
    };
    agrees(g, scores, 3e-5);
    const floats x = random_floats(64 * row_width, 13);
    std::vector<std::int32_t> nearest(64);
    workspace ws;
    g.nearest(as_rows(x, row_width), nearest, ws);
    const oracle::matrix wide_x = wide(x, row_width);
    const oracle::matrix z = scores(wide_x);
    for (index_t t = 0; t < 64; ++t) {
      index_t best = 0;
      double least = 1e300;
      for (index_t i = 0; i < codes; ++i) {
        double distance = 0.0;
        for (index_t k = 0; k < row_width; ++k) {
          const double apart = wide_x(t, k) - code(i, k);
          distance += apart * apart;
        }
        if (distance < least) {
          least = distance;
          best = i;
        }
      }
      CHECK(nearest[static_cast<std::size_t>(t)] == best);
      index_t expert = 0;
      for (index_t e = 1; e < gate_experts; ++e)
        if (z(t, e) > z(t, expert)) expert = e;
      CHECK(g.expert_of(best) == expert);
    }
  }
}

TEST_CASE("a code moves to the mean of its tokens, and one without tokens stays") {
  const floats c{0, 0, 10, 10, -50, 50};
  codebook_gate<> g(as_rows(c, 2), 3);
  const floats x{1, 0, 0, 1, 1, 1, 12, 8};
  std::vector<std::int32_t> code(4);
  workspace ws;
  g.nearest(as_rows(x, 2), code, ws);
  CHECK(code == std::vector<std::int32_t>{0, 0, 0, 1});
  g.update(as_rows(x, 2), code, 0.75f);
  // n = 0.75 + 0.25 * 3, m = 0.25 (2, 2); n = 1, m = 0.75 (10, 10) + 0.25 (12, 8).
  const auto near = [&](index_t r, double a, double b) {
    CHECK(std::abs(double{g.code_rows()(r, 0)} - a) < 1e-5);
    CHECK(std::abs(double{g.code_rows()(r, 1)} - b) < 1e-5);
  };
  near(0, 0.5 / 1.5, 0.5 / 1.5);
  near(1, 10.5, 9.5);
  near(2, -50.0, 50.0);
  CHECK(test::allocations_during([&] {
          for (int step = 0; step < 60; ++step) {
            g.nearest(as_rows(x, 2), code, ws);
            g.update(as_rows(x, 2), code, 0.5f);
          }
        }) == 0);
  near(0, 2.0 / 3.0, 2.0 / 3.0);
  near(1, 12.0, 8.0);
  near(2, -50.0, 50.0);
  // One that nobody took for long has forgotten nothing: n = 0.5 + 0.5, m = 0.5 (-50 - 46, 100).
  const floats late{-46, 50};
  const std::vector<std::int32_t> third{2};
  g.update(as_rows(late, 2), third, 0.5f);
  near(2, -48.0, 50.0);
  CHECK(test::refusal([&] { g.update(as_rows(x, 2), code, 1.0f); }) ==
        "moeroute::codebook_gate: decay is 1.000000, expected a number from 0 to below 1");
  code[1] = 3;
  CHECK(test::refusal([&] { g.update(as_rows(x, 2), code, 0.5f); }) ==
        "moeroute::codebook_gate: code is 3, expected 0 to 2");
  CHECK(test::refusal([&] { codebook_gate<>(as_rows(c, 2), 4); }) ==
        "moeroute::codebook_gate: experts is 4, expected 1 to 3");
}

TEST_CASE("a mixing gate's columns are S P: softmax of similarities times softmax of logits") {
  const floats w = random_floats(gate_experts * row_width, 14, 0.3f);
  const linear_gate<> inner{simd::packed_matrix<>(as_rows(w, row_width))};
  agrees(
      mixing_gate(inner, 12.0f),
      [&](const oracle::matrix& x) {
        oracle::matrix p = oracle::linear(x, wide(w, row_width)), s(x.rows, x.rows),
                       mixed(x.rows, gate_experts);
        softmax_of(p);
        for (index_t t = 0; t < x.rows; ++t)
          for (index_t u = 0; u < x.rows; ++u) s(t, u) = dot(x, t, x, u) / 12.0;
        softmax_of(s);
        for (index_t t = 0; t < x.rows; ++t)
          for (index_t e = 0; e < gate_experts; ++e)
            for (index_t u = 0; u < x.rows; ++u) mixed(t, e) += s(t, u) * p(u, e);
        return mixed;
      },
      2e-5, false);
  CHECK(test::refusal([&] { mixing_gate(inner, 0.0f); }) ==
        "moeroute::mixing_gate: temperature is 0.000000, expected a number above 0");
}

TEST_CASE("a row without a logit has no probabilities, and others do not hear of it") {
  constexpr float never = -HUGE_VALF, none = NAN;
  floats z{never, never, never, 1, never, 1, none, 2, none, none, never, none};
  const matrix_view<float> rows(z.data(), 4, 3);
  softmax_rows(rows);
  CHECK(z == floats{0, 0, 0, 0.5f, 0, 0.5f, 0, 1, 0, 0, 0, 0});
  const floats s{0.5f, 0.25f, 0.25f, 0};
  floats mixed(3);
  mix_probabilities(as_rows(s, 4), matrix_view<const float>(z.data(), 4, 3),
                    matrix_view<float>(mixed.data(), 1, 3));
  CHECK(mixed == floats{0.125f, 0.25f, 0.125f});
}

TEST_CASE("a gate from a line of text has the bits of the one by type") {
  constexpr index_t hidden = 19, rows = 21;
  const floats w = random_floats(gate_experts * row_width, 1), b = random_floats(gate_experts, 2),
               first = random_floats(hidden * row_width, 3, 0.3f),
               second = random_floats(gate_experts * hidden, 4), own = random_floats(hidden, 5),
               gamma = random_floats(row_width, 6), x = random_floats(rows * row_width, 7);
  const auto packed = [](const floats& m, index_t cols, const floats& bias) {
    simd::packed_matrix<> p(as_rows(m, cols));
    for (std::size_t i = 0; i < bias.size(); ++i) p.bias(static_cast<index_t>(i)) = bias[i];
    return p;
  };
  workspace ws;
  const auto logits = [&](const auto& g) {
    floats z(static_cast<std::size_t>(rows * gate_experts));
    const matrix_view<float> out(z.data(), rows, gate_experts);
    if constexpr (gate_function<std::remove_cvref_t<decltype(g)>>)
      gate(as_rows(x, row_width), g, out);
    else
      gate(as_rows(x, row_width), g, out, ws);
    return z;
  };
  const auto same = [&](const std::string& words, const gate_tensors& tensors, const auto& g) {
    INFO(words);
    const run_time_gate<> made = make_gate(parse_spec("E=11 k=2 " + words), tensors);
    CHECK(made.columns() == g.columns());
    CHECK(made.d() == g.d());
    index_t scratch_of_it = 0;
    if constexpr (requires { g.scratch_floats(7); }) scratch_of_it = g.scratch_floats(7);
    CHECK(made.scratch_floats(7) == scratch_of_it);
    CHECK(test::bit_difference(logits(made), logits(g)) == "");
  };
  static_assert(gate_function_with_scratch<run_time_gate<>>);
  const auto rows_of_w = as_rows(w, row_width), rows_of_first = as_rows(first, row_width),
             rows_of_second = as_rows(second, hidden);
  same("gate_bias gate_d=37", {.weight = rows_of_w, .bias = b},
       linear_gate<>(packed(w, row_width, b)));
  same("gate=cosine gate_temperature=0.07", {.weight = rows_of_w},
       scaled_cosine_gate<>(rows_of_w, 0.07f));
  same("gate=low_rank_cosine gate_width=19 gate_temperature=0.1",
       {.weight = rows_of_second, .first = rows_of_first},
       low_rank_cosine_gate<>(packed(first, row_width, {}), rows_of_second, 0.1f));
  same("gate=rms gate_scale=0.25 gate_eps=0.001 gate_bias",
       {.weight = rows_of_w, .bias = b, .gamma = gamma},
       rms_gate<>(rows_of_w, {gamma, 0.25f, 0.001f}, b));
  same("gate=mlp gate_width=19 gate_activation=silu gate_bias",
       {.weight = rows_of_second, .bias = b, .first = rows_of_first, .first_bias = own},
       mlp_gate<>(packed(first, row_width, own), packed(second, hidden, b), gate_activation::silu));
  same("gate=codebook gate_width=19", {.first = rows_of_first},
       codebook_gate<>(rows_of_first, gate_experts));
  same("gate=mixing gate_temperature=12 score=identity", {.weight = rows_of_w},
       mixing_gate(linear_gate<>(packed(w, row_width, {})), 12.0f));

  const auto refusal = [&](const std::string& words, const gate_tensors& tensors) {
    return test::refusal([&] { make_gate(parse_spec("E=11 k=2 " + words), tensors); });
  };
  CHECK(refusal("gate=none", {}) == "moeroute::make_gate: gate is none, expected one with weights");
  CHECK(refusal("", {}) == "moeroute::make_gate: weight.rows is 0, expected 11");
  CHECK(refusal("gate=mlp gate_width=19",
                {.weight = rows_of_second, .first = rows_of_first, .first_bias = b}) ==
        "moeroute::make_gate: first_bias.size() is 11, expected 19");
  CHECK(refusal("gate_d=36", {.weight = rows_of_w}) ==
        "moeroute::make_gate: weight.cols is 37, expected 36");
  CHECK(refusal("", {.weight = rows_of_w, .bias = b}) ==
        "moeroute::make_gate: bias.size() is 11, expected 0");
  CHECK(refusal("gate_bias", {.weight = rows_of_w}) ==
        "moeroute::make_gate: bias.size() is 0, expected 11");
  CHECK(refusal("gate=mlp gate_width=18", {.weight = rows_of_second, .first = rows_of_first}) ==
        "moeroute::make_gate: first.rows is 19, expected 18");
  CHECK(refusal("gate=codebook gate_width=19", {.weight = rows_of_w, .first = rows_of_first}) ==
        "moeroute::make_gate: weight.rows is 11, expected 0");
  CHECK(refusal("gate=rms", {.weight = rows_of_w, .gamma = b}) ==
        "moeroute::make_gate: gamma.size() is 11, expected 37");
  CHECK(test::refusal([] { make_gate(parse_spec("E=4 selection=soft"), {}); }) ==
        "moeroute::make_gate: gate is that of a soft mixture, expected one with weights");
  // What a kind of gate has no use for is refused as well; what may be left out is.
  CHECK(refusal("", {.weight = rows_of_w, .gamma = gamma}) ==
        "moeroute::make_gate: gamma.size() is 37, expected 0");
  CHECK(refusal("", {.weight = rows_of_w, .first_bias = own}) ==
        "moeroute::make_gate: first_bias.size() is 19, expected 0");
  CHECK(refusal("", {.weight = rows_of_w, .first = rows_of_first}) ==
        "moeroute::make_gate: first.rows is 19, expected 0");
  CHECK(refusal("", {.weight = rows_of_w, .first = {first.data(), 0, 5}}) ==
        "moeroute::make_gate: first.cols is 5, expected 0");
  CHECK(refusal("", {.weight = {w.data(), gate_experts, 0}}) ==
        "moeroute::make_gate: d is 0, expected 1 to 2147483648");
  CHECK(refusal("gate=mlp gate_width=19 gate_d=36",
                {.weight = rows_of_second, .first = rows_of_first}) ==
        "moeroute::make_gate: first.cols is 37, expected 36");
  CHECK(refusal("gate=mlp gate_width=19", {.weight = rows_of_w, .first = rows_of_first}) ==
        "moeroute::make_gate: weight.cols is 37, expected 19");
  CHECK(refusal("gate=codebook gate_width=19",
                {.weight = {w.data(), 0, 5}, .first = rows_of_first}) ==
        "moeroute::make_gate: weight.cols is 5, expected 0");
  same("gate=rms gate_scale=0.25 gate_d=37", {.weight = rows_of_w},
       rms_gate<>(rows_of_w, {{}, 0.25f, 1e-6f}));
  same("gate=mlp gate_width=19 gate_d=37 gate_activation=relu",
       {.weight = rows_of_second, .first = rows_of_first},
       mlp_gate<>(packed(first, row_width, {}), packed(second, hidden, {})));
}

// --- backward ----------------------------------------------------------------------------------

namespace {

using gate_doubles = std::vector<double>;
constexpr index_t few_tokens = 6, few_experts = 4, few_d = 5;

gate_doubles random_gate_doubles(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  gate_doubles x(static_cast<std::size_t>(n));
  for (double& v : x) v = static_cast<double>(rng.normal());
  return x;
}
template <class T>
matrix_view<T> gate_rows_in(std::vector<T>& x, index_t n) {
  return {x.data(), n, static_cast<index_t>(x.size()) / n};
}
double entry_of(const gate_doubles& x, index_t i) { return x[static_cast<std::size_t>(i)]; }
// The sum over c of a[i, c] b[j, c].
double gate_rows_dot(const gate_doubles& a, index_t i, const gate_doubles& b, index_t j,
                     index_t n) {
  double sum = 0.0;
  for (index_t c = 0; c < n; ++c) sum += entry_of(a, i * n + c) * entry_of(b, j * n + c);
  return sum;
}

// gradients(parameters, out): what a backward pass writes for lists of numbers;
// value(parameters): the dot product of the logits and their gradient.
template <class Value, class Gradients>
void are_derivatives(const char* name, std::vector<gate_doubles> parameters, Value&& value,
                     Gradients&& gradients) {
  std::vector<gate_doubles> out;
  for (const gate_doubles& p : parameters) out.emplace_back(p.size(), 0.0);
  gradients(parameters, out, gradient_to::write);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    INFO(name << ", list " << i);
    const auto of = [&](const gate_doubles& x) {
      std::vector<gate_doubles> moved = parameters;
      moved[i] = x;
      return value(moved);
    };
    CHECK(out[i] != gate_doubles(out[i].size(), 0.0));
    CHECK(test::difference(out[i], oracle::derivative(parameters[i], of), 1e-6, 1e-8) == "");
  }
  std::vector<gate_doubles> twice = out;
  gradients(parameters, twice, gradient_to::add);
  for (std::size_t i = 0; i < out.size(); ++i) {
    for (double& g : twice[i]) g /= 2.0;
    CHECK(test::difference(twice[i], out[i], 1e-12, 1e-14) == "");
  }
}

}  // namespace

TEST_CASE("gradients of a gate with a hidden layer are derivatives") {
  constexpr index_t hidden = 7;
  gate_doubles dz = random_gate_doubles(few_tokens * few_experts, 9);
  for (const auto f : {gate_activation::relu, gate_activation::tanh, gate_activation::silu})
    are_derivatives(
        "mlp",
        {random_gate_doubles(few_tokens * few_d, 1), random_gate_doubles(hidden * few_d, 2),
         random_gate_doubles(hidden, 3), random_gate_doubles(few_experts * hidden, 4),
         random_gate_doubles(few_experts, 5)},
        [&](const std::vector<gate_doubles>& p) {
          double sum = 0.0;
          for (index_t t = 0; t < few_tokens; ++t) {
            gate_doubles h;
            for (index_t i = 0; i < hidden; ++i) {
              const double v = gate_rows_dot(p[0], t, p[1], i, few_d) + entry_of(p[2], i);
              h.push_back(f == gate_activation::relu   ? std::max(v, 0.0)
                          : f == gate_activation::tanh ? std::tanh(v)
                                                       : v / (1.0 + std::exp(-v)));
            }
            for (index_t e = 0; e < few_experts; ++e)
              sum += entry_of(dz, t * few_experts + e) *
                     (gate_rows_dot(h, 0, p[3], e, hidden) + entry_of(p[4], e));
          }
          return sum;
        },
        [&](std::vector<gate_doubles>& p, std::vector<gate_doubles>& out, gradient_to to) {
          workspace ws;
          mlp_gate_backward(gate_rows_in(p[0], few_tokens),
                            mlp_gate_weights<double, double>{gate_rows_in(p[1], hidden), p[2],
                                                             gate_rows_in(p[3], few_experts), f},
                            gate_rows_in(dz, few_tokens),
                            mlp_gate_gradients<double>{to, gate_rows_in(out[0], few_tokens),
                                                       gate_rows_in(out[1], hidden), out[2],
                                                       gate_rows_in(out[3], few_experts), out[4]},
                            ws);
        });
}

TEST_CASE("relu at 0 has no gradient, nor has a logit of -inf that neighbours share") {
  workspace ws;
  gate_doubles x = random_gate_doubles(few_tokens * few_d, 1),
               dz = random_gate_doubles(few_tokens * few_experts, 9);
  // Every hidden value is 0.
  constexpr index_t hidden = 3;
  gate_doubles w(hidden * few_d, 0.0), b(hidden, 0.0),
      w2 = random_gate_doubles(few_experts * hidden, 4);
  gate_doubles dx(x.size(), 7.0), dw(w.size(), 7.0), db(hidden, 7.0), dw2(w2.size(), 7.0),
      db2(few_experts, 7.0);
  mlp_gate_backward(
      gate_rows_in(x, few_tokens),
      mlp_gate_weights<double, double>{gate_rows_in(w, hidden), b, gate_rows_in(w2, few_experts),
                                       gate_activation::relu},
      gate_rows_in(dz, few_tokens),
      mlp_gate_gradients<double>{gradient_to::write, gate_rows_in(dx, few_tokens),
                                 gate_rows_in(dw, hidden), db, gate_rows_in(dw2, few_experts), db2},
      ws);
  CHECK(dx == gate_doubles(x.size(), 0.0));
  CHECK(dw == gate_doubles(w.size(), 0.0));
  CHECK(db == gate_doubles(hidden, 0.0));

  gate_doubles z = random_gate_doubles(few_tokens * few_experts, 2), dlogits(z.size(), 7.0);
  z[0] = -HUGE_VAL;
  std::fill_n(z.begin() + few_experts, few_experts, -HUGE_VAL);
  mixing_gate_backward<double>(gate_rows_in(x, few_tokens), gate_rows_in(z, few_tokens), 1.5f,
                               gate_rows_in(dz, few_tokens), gradient_to::write,
                               gate_rows_in(dx, few_tokens), gate_rows_in(dlogits, few_tokens), ws);
  for (std::size_t i = 0; i < z.size(); ++i) CHECK((dlogits[i] == 0.0) == (z[i] == -HUGE_VAL));
}

TEST_CASE("gradients of a gate of normalised input are derivatives, gamma's among them") {
  gate_doubles dz = random_gate_doubles(few_tokens * few_experts, 9);
  const floats gamma = random_floats(few_d, 4);
  for (const bool with_gamma : {true, false}) {
    const rms_input input{
        .gamma = with_gamma ? std::span<const float>(gamma) : std::span<const float>(),
        .scale = 0.75f,
        .eps = 0.25f};
    const gate_doubles ones(few_d, 1.0);
    are_derivatives(
        "rms",
        {random_gate_doubles(few_tokens * few_d, 1), random_gate_doubles(few_experts * few_d, 2),
         random_gate_doubles(few_experts, 3),
         with_gamma ? gate_doubles(gamma.begin(), gamma.end()) : ones},
        [&](const std::vector<gate_doubles>& p) {
          double sum = 0.0;
          for (index_t t = 0; t < few_tokens; ++t) {
            const double root = std::sqrt(gate_rows_dot(p[0], t, p[0], t, few_d) / few_d + 0.25);
            for (index_t e = 0; e < few_experts; ++e) {
              double z = entry_of(p[2], e);
              for (index_t c = 0; c < few_d; ++c)
                z += 0.75 * entry_of(p[3], c) * entry_of(p[0], t * few_d + c) / root *
                     entry_of(p[1], e * few_d + c);
              sum += entry_of(dz, t * few_experts + e) * z;
            }
          }
          return sum;
        },
        [&](std::vector<gate_doubles>& p, std::vector<gate_doubles>& out, gradient_to to) {
          workspace ws;
          rms_gate_backward(gate_rows_in(p[0], few_tokens), gate_rows_in(p[1], few_experts), input,
                            gate_rows_in(dz, few_tokens),
                            gate_gradients<double>{to, gate_rows_in(out[0], few_tokens),
                                                   gate_rows_in(out[1], few_experts), out[2]},
                            ws, serial{}, out[3]);
        });
  }
}

TEST_CASE("gradients of codes are derivatives of the nearest one's logit") {
  constexpr index_t codes = 9;
  gate_doubles dz = random_gate_doubles(few_tokens * few_experts, 9);
  are_derivatives(
      "codebook",
      {random_gate_doubles(few_tokens * few_d, 1), random_gate_doubles(codes * few_d, 2)},
      [&](const std::vector<gate_doubles>& p) {
        double sum = 0.0;
        for (index_t t = 0; t < few_tokens; ++t)
          for (index_t e = 0; e < few_experts; ++e) {
            double z = -1e9;
            for (index_t c = e; c < codes; c += few_experts)
              z = std::max(z, gate_rows_dot(p[0], t, p[1], c, few_d) -
                                  gate_rows_dot(p[1], c, p[1], c, few_d) / 2.0);
            sum += entry_of(dz, t * few_experts + e) * z;
          }
        return sum;
      },
      [&](std::vector<gate_doubles>& p, std::vector<gate_doubles>& out, gradient_to to) {
        workspace ws;
        codebook_gate_backward(gate_rows_in(p[0], few_tokens), gate_rows_in(p[1], codes),
                               matrix_view<const double>(gate_rows_in(dz, few_tokens)),
                               gate_gradients<double>{to, gate_rows_in(out[0], few_tokens),
                                                      gate_rows_in(out[1], codes)},
                               ws);
      });
}

TEST_CASE("gradients of decisions that neighbours share are derivatives") {
  gate_doubles dz = random_gate_doubles(few_tokens * few_experts, 9);
  are_derivatives(
      "mixing",
      {random_gate_doubles(few_tokens * few_d, 1),
       random_gate_doubles(few_tokens * few_experts, 2)},
      [&](const std::vector<gate_doubles>& p) {
        oracle::matrix s(few_tokens, few_tokens), z(few_tokens, few_experts);
        for (index_t t = 0; t < few_tokens; ++t) {
          for (index_t u = 0; u < few_tokens; ++u)
            s(t, u) = gate_rows_dot(p[0], t, p[0], u, few_d) / 1.5;
          for (index_t e = 0; e < few_experts; ++e) z(t, e) = entry_of(p[1], t * few_experts + e);
        }
        softmax_of(s);
        softmax_of(z);
        double sum = 0.0;
        for (index_t t = 0; t < few_tokens; ++t)
          for (index_t u = 0; u < few_tokens; ++u)
            for (index_t e = 0; e < few_experts; ++e)
              sum += entry_of(dz, t * few_experts + e) * s(t, u) * z(u, e);
        return sum;
      },
      [&](std::vector<gate_doubles>& p, std::vector<gate_doubles>& out, gradient_to to) {
        workspace ws;
        mixing_gate_backward<double>(gate_rows_in(p[0], few_tokens), gate_rows_in(p[1], few_tokens),
                                     1.5f, gate_rows_in(dz, few_tokens), to,
                                     gate_rows_in(out[0], few_tokens),
                                     gate_rows_in(out[1], few_tokens), ws);
      });
}

TEST_CASE("the gradient of gamma alone is added, and never lies in gamma's memory") {
  constexpr index_t tokens = 5, wide = 6, few = 3;
  const auto x = random_gate_doubles(tokens * wide, 1), w = random_gate_doubles(few * wide, 2),
             dz = random_gate_doubles(tokens * few, 3);
  floats gamma = random_floats(wide, 4);
  std::vector<float> fx(x.begin(), x.end()), fw(w.begin(), w.end()), fdz(dz.begin(), dz.end()),
      dx(x.size()), with(gamma.size()), alone(gamma.size());
  workspace ws;
  const auto go = [&](gate_gradients<float> g, std::span<float> dgamma) {
    rms_gate_backward(gate_rows_in(fx, tokens), gate_rows_in(fw, few), {.gamma = gamma},
                      gate_rows_in(fdz, tokens), g, ws, serial{}, dgamma);
  };
  go({gradient_to::write, gate_rows_in(dx, tokens)}, with);
  go({gradient_to::nowhere}, alone);
  CHECK(with == alone);
  CHECK(std::any_of(alone.begin(), alone.end(), [](float v) { return v != 0.0f; }));
  CHECK(test::refusal([&] { go({gradient_to::write, gate_rows_in(dx, tokens)}, gamma); }) ==
        "moeroute::rms_gate_backward: dgamma lies in the memory of gamma");
  const floats before = dx;
  go({gradient_to::nowhere, gate_rows_in(dx, tokens)}, with);
  CHECK(dx == before);
}

TEST_CASE("a token of zeros that no eps lifts has and gives no gradient of a normalised gate") {
  constexpr index_t wide = 5, few = 3;
  std::vector<double> x = random_gate_doubles(3 * wide, 1), w = random_gate_doubles(few * wide, 2),
                      dz = random_gate_doubles(3 * few, 3);
  std::fill_n(x.begin() + 2 * wide, wide, 0.0);  // the last
  for (const gradient_to to : {gradient_to::write, gradient_to::add, gradient_to::nowhere}) {
    const auto pass = [&](index_t tokens, bool by_gamma) {
      std::vector<double> dx(3 * wide, 7.0), dw(few * wide, 7.0), dgamma(wide, 7.0);
      workspace ws;
      rms_gate_backward(
          matrix_view<double>(x.data(), tokens, wide), gate_rows_in(w, few), {.eps = 0.0f},
          matrix_view<double>(dz.data(), tokens, few),
          gate_gradients<double>{to, {dx.data(), tokens, wide}, gate_rows_in(dw, few)}, ws,
          serial{}, by_gamma ? std::span<double>(dgamma) : std::span<double>());
      dx.insert(dx.end(), dw.begin(), dw.end());
      dx.insert(dx.end(), dgamma.begin(), dgamma.end());
      return dx;
    };
    std::vector<double> expected = pass(2, true);
    const double stays = to == gradient_to::write ? 0.0 : 7.0;
    std::fill_n(expected.begin() + 2 * wide, wide, stays);
    CHECK(test::difference(pass(3, true), expected, 1e-12) == "");
    std::fill_n(expected.end() - wide, wide, 7.0);
    CHECK(test::difference(pass(3, false), expected, 1e-12) == "");
  }
}

TEST_CASE(
    "gates' gradients in float are those in double, have the same bits for every executor, "
    "allocate "
    "nothing once warm, and refuse sizes and overlaps by name") {
  constexpr index_t tokens = 70, wide_d = 37, hidden = 19, codes = 25;
  const gate_doubles x = random_gate_doubles(tokens * wide_d, 1),
                     first = random_gate_doubles(hidden * wide_d, 2),
                     second = random_gate_doubles(few_experts * hidden, 3),
                     w = random_gate_doubles(codes * wide_d, 4),
                     dz = random_gate_doubles(tokens * few_experts, 5),
                     z = random_gate_doubles(tokens * few_experts, 6);
  const floats gamma = random_floats(wide_d, 7);
  const auto pass = [&]<class F>(F, const auto& exec, bool warm) {
    std::vector<F> fx(x.begin(), x.end()), f1(first.begin(), first.end()),
        f2(second.begin(), second.end()), fw(w.begin(), w.end()), fdz(dz.begin(), dz.end()),
        fz(z.begin(), z.end());
    std::vector<F> dx[4], d1(f1.size()), db(static_cast<std::size_t>(hidden)), d2(f2.size()),
        dw(static_cast<std::size_t>(few_experts * wide_d)), dgamma(gamma.size()), dcodes(fw.size()),
        inner(fz.size());
    for (std::vector<F>& one : dx) one.resize(x.size());
    using enum gradient_to;
    const auto all = [&](workspace* ws) {
      mlp_gate_backward(
          gate_rows_in(fx, tokens),
          mlp_gate_weights<F, F>{
              gate_rows_in(f1, hidden), {}, gate_rows_in(f2, few_experts), gate_activation::silu},
          gate_rows_in(fdz, tokens),
          mlp_gate_gradients<F>{write,
                                gate_rows_in(dx[0], tokens),
                                gate_rows_in(d1, hidden),
                                db,
                                gate_rows_in(d2, few_experts),
                                {}},
          ws[0], exec);
      rms_gate_backward(
          gate_rows_in(fx, tokens), gate_rows_in(fw, codes).middle_rows(0, few_experts),
          {.gamma = gamma}, gate_rows_in(fdz, tokens),
          gate_gradients<F>{write, gate_rows_in(dx[1], tokens), gate_rows_in(dw, few_experts)},
          ws[1], exec, dgamma);
      codebook_gate_backward(
          gate_rows_in(fx, tokens), gate_rows_in(fw, codes),
          matrix_view<const F>(gate_rows_in(fdz, tokens)),
          gate_gradients<F>{write, gate_rows_in(dx[2], tokens), gate_rows_in(dcodes, codes)}, ws[2],
          exec);
      mixing_gate_backward<F>(gate_rows_in(fx, tokens), gate_rows_in(fz, tokens), 4.0f,
                              gate_rows_in(fdz, tokens), write, gate_rows_in(dx[3], tokens),
                              gate_rows_in(inner, tokens), ws[3], exec);
    };
    workspace ws[4];
    all(ws);
    if (warm) {
      std::fill(dgamma.begin(), dgamma.end(), F(0));
      CHECK(test::allocations_during([&] { all(ws); }) == 0);
    }
    std::vector<F> list;
    for (const auto* part :
         {&dx[0], &dx[1], &dx[2], &dx[3], &d1, &db, &d2, &dw, &dgamma, &dcodes, &inner})
      list.insert(list.end(), part->begin(), part->end());
    return list;
  };
  const floats alone = pass(float{}, serial{}, true);
  CHECK(test::difference(alone, pass(double{}, serial{}, false), 1e-3, 2e-3) == "");
  CHECK(test::bit_difference(pass(float{}, test::several_threads{}, false), alone) == "");

  floats fx(x.begin(), x.end()), fw(w.begin(), w.end()), fdz(dz.begin(), dz.end()), dx(fx.size());
  workspace ws;
  const auto refused = [&](index_t gradient_rows, float* gradient) {
    return test::refusal([&] {
      codebook_gate_backward(
          gate_rows_in(fx, tokens), gate_rows_in(fw, codes),
          matrix_view<const float>(gate_rows_in(fdz, tokens)),
          gate_gradients<float>{gradient_to::write, {gradient, gradient_rows, wide_d}}, ws);
    });
  };
  CHECK(refused(tokens - 1, dx.data()) ==
        "moeroute::codebook_gate_backward: gradients.x is 69, expected 70");
  CHECK(refused(tokens, fx.data()) ==
        "moeroute::codebook_gate_backward: what is read and gradients.x overlap, expected memory "
        "of "
        "their own");
  CHECK(test::refusal([&] {
          mlp_gate_backward(gate_rows_in(fx, tokens),
                            mlp_gate_weights<float>{
                                gate_rows_in(fw, codes), {}, {fw.data(), few_experts, codes - 1}},
                            gate_rows_in(fdz, tokens), mlp_gate_gradients<float>{}, ws);
        }) == "moeroute::mlp_gate_backward: weights.second.cols() is 24, expected 25");
}

TEST_CASE("gates' gradients do not depend on where any rows lie, written or added") {
  constexpr index_t tokens = 19, wide_d = 21, hidden = 18, experts = 9, codes = 20;
  for (const gradient_to to : {gradient_to::write, gradient_to::add})
    CHECK(test::differs_by_stride([&](test::layout& l) {
            test::random rng(6);
            const auto x = l.in(test::numbers(rng, tokens * wide_d), tokens, wide_d);
            const auto dz = l.in(test::numbers(rng, tokens * experts), tokens, experts);
            const auto z = l.in(test::numbers(rng, tokens * experts), tokens, experts);
            const auto w = l.in(test::numbers(rng, experts * wide_d), experts, wide_d);
            const auto code = l.in(test::numbers(rng, codes * wide_d), codes, wide_d);
            const auto first = l.in(test::numbers(rng, hidden * wide_d), hidden, wide_d);
            const auto second = l.in(test::numbers(rng, experts * hidden), experts, hidden);
            const auto one = l.in(test::numbers(rng, wide_d), 1, wide_d);
            const floats gamma = test::numbers(rng, wide_d), up = test::numbers(rng, tokens);
            const auto into = [&](index_t rows, index_t cols) {
              return l.in_out(test::numbers(rng, rows * cols), rows, cols);
            };
            const auto gradients = [&](index_t rows) {
              const auto dx = into(tokens, wide_d);
              return gate_gradients<float>{to, dx, into(rows, wide_d), {}};
            };
            workspace ws;
            floats bias(experts, 1.0f), first_bias(hidden, 2.0f), second_bias(experts, 3.0f),
                dgamma(wide_d, 4.0f), weights(tokens, 0.25f);
            float dscale = 5.0f;
            gate_gradients<float> linear = gradients(experts);
            linear.bias = bias;
            gate_backward(x, w, dz, linear);
            cosine_gate_backward(x, w, 2.0f, dz, gradients(experts), ws, serial{}, &dscale);
            shared_gate_backward(x, one, 0.5f, weights, up, gradients(1), ws);
            const auto dx = into(tokens, wide_d), dfirst = into(hidden, wide_d),
                       dsecond = into(experts, hidden);
            mlp_gate_backward(
                x, mlp_gate_weights<float>{first, {}, second, gate_activation::tanh}, dz,
                mlp_gate_gradients<float>{to, dx, dfirst, first_bias, dsecond, second_bias}, ws);
            rms_gate_backward(x, w, {.gamma = gamma}, dz, gradients(experts), ws, serial{}, dgamma);
            codebook_gate_backward(x, code, matrix_view<const float>(dz), gradients(codes), ws);
            const auto dmixed = into(tokens, wide_d), inner = into(tokens, experts);
            mixing_gate_backward<float>(x, z, 4.0f, dz, to, dmixed, inner, ws);
            for (floats* list : {&bias, &first_bias, &second_bias, &dgamma})
              l.result(std::span<const float>(*list));
            l.result(static_cast<double>(dscale));
          }) == "");
}

TEST_CASE("every size of a gate's gradients is refused by its own name") {
  constexpr index_t n = 6, width = 8, h = 5, e = 3;
  floats x(n * width), w(e * width), first(h * width), second(e * h), dz(n * e), z(n * e),
      gamma(width), a(96), b(96);
  workspace ws;
  const auto of = [](floats& v, index_t rows, index_t cols, index_t stride = 0) {
    return matrix_view<float>(v.data(), rows, cols, stride == 0 ? cols : stride);
  };
  const auto mlp = [&](mlp_gate_gradients<float> g, std::span<const float> bias = {}) {
    return [&, g, bias] {
      mlp_gate_backward(of(x, n, width),
                        mlp_gate_weights<float>{of(first, h, width), bias, of(second, e, h)},
                        of(dz, n, e), g, ws);
    };
  };
  const auto rms = [&](std::span<const float> scale, std::span<float> dscale) {
    return [&, scale, dscale] {
      rms_gate_backward(of(x, n, width), of(w, e, width), {.gamma = scale}, of(dz, n, e),
                        gate_gradients<float>{gradient_to::nowhere}, ws, serial{}, dscale);
    };
  };
  const auto coded = [&](matrix_view<float> codes, matrix_view<float> logits,
                         gate_gradients<float> g = {}) {
    return [&, codes, logits, g] {
      codebook_gate_backward(of(x, n, width), codes, matrix_view<const float>(logits), g, ws);
    };
  };
  const auto mixed = [&](matrix_view<float> of_z, matrix_view<float> of_dz, matrix_view<float> to_x,
                         matrix_view<float> to_z, float heat = 1.0f) {
    return [&, of_z, of_dz, to_x, to_z, heat] {
      mixing_gate_backward<float>(of(x, n, width), of_z, heat, of_dz, gradient_to::write, to_x,
                                  to_z, ws);
    };
  };
  codebook_gate<> g(as_rows(w, width), e);
  const linear_gate<> inner{simd::packed_matrix<>(as_rows(w, width))};
  std::vector<std::int32_t> code(n - 1), whole(n);
  const auto good_z = of(z, n, e), good_dz = of(dz, n, e), dx = of(a, n, width), dzs = of(b, n, e);
  const std::string own = " overlap, expected memory of their own";
  const test::refusals refused{
      {mlp({}, std::span<const float>(a).first(4)),
       "mlp_gate_backward: weights.first_bias.size() is 4, expected 5"},
      {rms(gamma, std::span<float>(a).first(7)),
       "rms_gate_backward: dgamma.size() is 7, expected 8"},
      {rms(std::span<const float>(gamma).first(7), a),
       "rms_gate_backward: gamma.size() is 7, expected 8"},
      {coded(of(w, e, width), of(a, n, 4)),
       "codebook_gate_backward: dlogits.cols() is 4, expected 1 to 3"},
      {coded(of(w, e, 7), good_dz), "codebook_gate_backward: codes.cols() is 7, expected 8"},
      {coded(of(w, e, width), of(dz, 5, e)),
       "codebook_gate_backward: dlogits.rows() is 5, expected 6"},
      {coded(of(w, e, width, 7), good_dz),
       "codebook_gate_backward: codes.stride is 7, expected at least 8"},
      {coded(of(w, e, width), of(dz, n, e, 2)),
       "codebook_gate_backward: dlogits.stride is 2, expected at least 3"},
      {coded(of(w, e, width), good_dz, {.bias = a}),
       "codebook_gate_backward: gradients.bias.size() is 96, expected 0"},
      {mixed(of(z, 5, e), good_dz, dx, dzs), "mixing_gate_backward: z.rows() is 5, expected 6"},
      {mixed(good_z, of(dz, 5, e), dx, dzs),
       "mixing_gate_backward: dlogits.rows() is 5, expected 6"},
      {mixed(good_z, of(dz, n, 2, 3), dx, dzs),
       "mixing_gate_backward: dlogits.cols() is 2, expected 3"},
      {mixed(of(z, n, e, 2), good_dz, dx, dzs),
       "mixing_gate_backward: z.stride is 2, expected at least 3"},
      {mixed(good_z, of(dz, n, e, 2), dx, dzs),
       "mixing_gate_backward: dlogits.stride is 2, expected at least 3"},
      {mixed(good_z, good_dz, of(a, 5, width), dzs), "mixing_gate_backward: dx is 5, expected 6"},
      {mixed(good_z, good_dz, of(a, n, 7), dzs), "mixing_gate_backward: dx is 7, expected 8"},
      {mixed(good_z, good_dz, dx, of(b, n, 2)), "mixing_gate_backward: dz is 2, expected 3"},
      {mixed(good_z, good_dz, dx, good_z), "mixing_gate_backward: what is read and dz" + own},
      {mixed(good_z, good_dz, dx, of(a, n, e)), "mixing_gate_backward: dz and dx" + own},
      {mixed(good_z, good_dz, dx, dzs, 0.0f),
       "mixing_gate_backward: temperature is 0.000000, expected a number above 0"},
      {mixed(good_z, good_dz, dx, dzs, HUGE_VALF),
       "mixing_gate_backward: temperature is inf, expected a number above 0"},
      {[&] { g.nearest(as_rows(x, width), code, ws); },
       "codebook_gate: code.size() is 5, expected 6"},
      {[&] { g.update(as_rows(x, width), code, 0.5f); },
       "codebook_gate: code.size() is 5, expected 6"},
      {[&] { g.update(as_rows(x, width), whole, -0.5f); },
       "codebook_gate: decay is -0.500000, expected a number from 0 to below 1"},
      {[&] { mixing_gate(inner, HUGE_VALF); },
       "mixing_gate: temperature is inf, expected a number above 0"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  // Numbers that are none, infinite or beyond their range.
  const std::string above = ", expected a number above 0";
  for (const float bad : {0.0f, -1.0f, HUGE_VALF, -HUGE_VALF, std::nanf("")}) {
    const std::string is = " is " + std::to_string(bad);
    CHECK(test::refusal([&] { scaled_cosine_gate<>(as_rows(w, width), bad); }) ==
          "moeroute::scaled_cosine_gate: temperature" + is + above);
    CHECK(test::refusal([&] { mixing_gate(inner, bad); }) ==
          "moeroute::mixing_gate: temperature" + is + above);
    CHECK(test::refusal(mixed(good_z, good_dz, dx, dzs, bad)) ==
          "moeroute::mixing_gate_backward: temperature" + is + above);
    if (bad == 0.0f) continue;
    CHECK(test::refusal([&] { g.update(as_rows(x, width), whole, bad); }) ==
          "moeroute::codebook_gate: decay" + is + ", expected a number from 0 to below 1");
    CHECK(test::refusal([&] { rms_gate<>(as_rows(w, width), {.eps = bad}); }) ==
          "moeroute::rms_gate: eps" + is + ", expected a number of 0 or more");
    if (bad == -1.0f) continue;
    CHECK(test::refusal([&] { rms_gate<>(as_rows(w, width), {.scale = bad}); }) ==
          "moeroute::rms_gate: scale" + is + ", expected a finite number");
  }
}

TEST_CASE("of codes that are as near the lowest is a token's, and of its experts too") {
  // Codes 1, 3 and 18 are one; 18 is beyond a register, and of expert 18 % 3 = 0.
  floats c(20 * 2, 9.0f);
  for (const std::size_t same : {1u, 3u, 18u}) c[2 * same] = c[2 * same + 1] = 1.0f;
  const codebook_gate<> g(as_rows(c, 2), 3);
  const floats x{1, 1, 9, 9, NAN, 1};
  std::vector<std::int32_t> code(3, -1);
  workspace ws;
  g.nearest(as_rows(x, 2), code, ws);
  CHECK(code == std::vector<std::int32_t>{1, 0, 0});
  // So is its gradient: codes 0 and 18 are one to expert 0.
  c[0] = c[1] = 1.0f;
  floats at{2, 2}, dz{1, 0, 0}, dcodes(c.size(), 7.0f);
  codebook_gate_backward(matrix_view<float>(at.data(), 1, 2), matrix_view<float>(c.data(), 20, 2),
                         matrix_view<const float>(dz.data(), 1, 3),
                         gate_gradients<float>{gradient_to::write, {}, {dcodes.data(), 20, 2}}, ws);
  for (std::size_t i = 0; i < dcodes.size(); ++i) CHECK(dcodes[i] == (i < 2 ? 1.0f : 0.0f));
}

TEST_CASE("whatever does not fit a gate is refused by its own name") {
  constexpr index_t n = 6, width = 8, e = 3;
  floats x(n * width, 0.5f), w(e * width, 0.25f), z(n * e), more(n * n, 0.5f), list(n);
  const auto at = [](floats& v, index_t r, index_t cols, bool good = true) {
    matrix_view<float> m(v.data(), r, cols);
    if (!good) m.stride = cols - 1;
    return m;
  };
  const simd::packed_matrix<> packed(as_rows(w, width)), one(as_rows(w, width).middle_rows(0, 1));
  linear_gate<> linear(packed);
  scaled_cosine_gate<> cosine(as_rows(w, width), 1.0f);
  codebook_gate<> codes(as_rows(w, width), e);
  workspace ws;
  std::vector<std::int32_t> code(n, 0), below(n, -1);
  const auto mixed = [&](int close_one) {
    return [&, close_one] {
      mix_probabilities(at(more, n, n, close_one != 0), at(x, n, e, close_one != 1),
                        at(z, n, e, close_one != 2));
    };
  };
  const std::string eight = ".stride is 7, expected at least 8",
                    three = ".stride is 2, expected at least 3";
  const test::refusals refused{
      {[&] { linear.set_weight(at(x, 2, width)); }, "linear_gate: w.rows() is 2, expected 3"},
      {[] { no_gate(0); }, "no_gate: columns is 0, expected 1 to 1099511627776"},
      {[] { no_gate((index_t{1} << 40) + 1); },
       "no_gate: columns is 1099511627777, expected 1 to 1099511627776"},
      {[&] { gate(at(x, n, width, false), linear, at(z, n, e)); }, "gate: x" + eight},
      {[&] { gate(at(x, n, width), linear, at(z, n, e, false)); }, "gate: logits" + three},
      {[&] { gate(at(x, n, width), linear, at(x, n, e)); },
       "gate: x and logits overlap, expected memory of their own"},
      {[&] { shared_gate(at(x, n, width), packed, 1.0f, list); },
       "shared_gate: weight.rows() is 3, expected 1"},
      {[&] { shared_gate(at(x, n, width), one, 1.0f, std::span(list).first(5)); },
       "shared_gate: weights.size() is 5, expected 6"},
      {[&] { unit_rows(at(w, e, width, false)); }, "unit_rows: weight" + eight},
      {[&] { codebook_gate<>(at(w, e, width, false), e); }, "codebook_gate: codes" + eight},
      {[&] { codebook_gate<>(at(w, e, width), 0); },
       "codebook_gate: experts is 0, expected 1 to 3"},
      {[&] { codes.nearest(at(x, n, width - 1), code, ws); },
       "codebook_gate: x.cols() is 7, expected 8"},
      {[&] { codes.nearest(at(x, n - 1, width), code, ws); },
       "codebook_gate: code.size() is 6, expected 5"},
      {[&] { codes.update(at(x, n, width - 1), code, 0.5f); },
       "codebook_gate: x.cols() is 7, expected 8"},
      {[&] { codes.update(at(x, n - 1, width), code, 0.5f); },
       "codebook_gate: code.size() is 6, expected 5"},
      {[&] { codes.update(at(x, n, width), below, 0.5f); },
       "codebook_gate: code is -1, expected 0 to 2"},
      {[&] { scaled_cosine_gate<>(at(w, e, width, false), 1.0f); },
       "scaled_cosine_gate: weight" + eight},
      {[&] { cosine.set_weight(at(w, e, width - 1)); },
       "scaled_cosine_gate: weight.cols() is 7, expected 8"},
      {[&] { rms_gate<>(at(w, e, width, false)); }, "rms_gate: weight" + eight},
      {mixed(0), "mix_probabilities: s.stride is 5, expected at least 6"},
      {mixed(1), "mix_probabilities: p" + three},
      {mixed(2), "mix_probabilities: mixed" + three},
      {[&] { softmax_rows(at(z, n, e, false)); }, "softmax_rows: z" + three},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  CHECK(test::refusal(mixed(3)) == "accepted");
  CHECK(no_gate(index_t{1} << 40).columns() == index_t{1} << 40);
  // A row of no numbers has no nearest code, and gets the first; a decay of 0 forgets all.
  floats nothing(width, std::nanf(""));
  std::vector<std::int32_t> first{2};
  codes.nearest(at(nothing, 1, width), first, ws);
  CHECK(first[0] == 0);
  codes.update(at(x, n, width), code, 0.0f);
  CHECK(codes.code_rows()(0, 0) == 0.5f);
  CHECK(codes.code_rows()(1, 0) == 0.25f);
  const low_rank_cosine_gate<> low(simd::packed_matrix<>(2, width), at(more, e, 2), 1.0f);
  const mlp_gate<> deep(simd::packed_matrix<>(5, width), simd::packed_matrix<>(e, 5));
  const mixing_gate<linear_gate<>> mixing(linear, 1.0f);
  CHECK((low.rank() == 2 && low.scratch_floats(7) == 14 && gate_ref(low).scratch_floats(7) == 14));
  CHECK((deep.hidden() == 5 && deep.scratch_floats(7) == 35 && codes.scratch_floats(7) == 21));
  CHECK(mixing.scratch_floats(7) == 7 * (7 + 2 * width + e));
  const rms_input plain;
  CHECK((plain.scale == 1.0f && plain.eps == 1e-6f && plain.gamma.empty()));
  CHECK(mlp_gate_weights<float>{}.activation == gate_activation::relu);
  CHECK((gate_gradients<>{}.to == gradient_to::write &&
         mlp_gate_gradients<>{}.to == gradient_to::write));
}

TEST_CASE("rows have a direction down to a norm of 1e-12, below it they fade") {
  const auto like = [](float a, float b) { return std::abs(a - b) <= 1e-5f * std::abs(b); };
  floats x{2e-12f, 0, 0, 5e-13f, 0, 0}, w{1, 0, 0, 1}, z(6);
  const matrix_view<float> out(z.data(), 3, 2);
  cosine_gate(as_rows(x, 2), simd::packed_matrix<>(as_rows(w, 2)), 4.0f, out);
  CHECK((like(z[0], 4.0f) && z[1] == 0.0f && z[2] == 0.0f && like(z[3], 2.0f)));
  const scaled_cosine_gate<> g(as_rows(x, 2).middle_rows(0, 2), 0.25f);
  gate(as_rows(w, 2), g, out.middle_rows(0, 2));
  CHECK((like(z[0], 4.0f) && z[1] == 0.0f && z[2] == 0.0f && like(z[3], 2.0f)));
  CHECK(g.temperature() == 0.25f);
  floats unit = x;
  unit_rows(test::into_rows(unit, 2));
  CHECK((like(unit[0], 1.0f) && like(unit[3], 0.5f) && unit[4] == 0.0f));
  // What turns a row is across it; there is nothing below the least norm.
  floats du{3, 3, 3, 3, 3, 3}, dv(6, 7.0f);
  unit_rows_backward(as_rows(x, 2), as_rows(du, 2), gradient_to::write, test::into_rows(dv, 2));
  CHECK((std::abs(dv[0]) < 1e6f && like(dv[1], 1.5e12f)));
  CHECK(std::all_of(dv.begin() + 2, dv.end(), [](float v) { return v == 0.0f; }));
  floats dz{0, 1, 1, 0, 0, 0}, dw(4, 7.0f);
  workspace ws;
  cosine_gate_backward(as_rows(x, 2), as_rows(w, 2), 4.0f, as_rows(dz, 2),
                       gate_gradients<float>{.weight = test::into_rows(dw, 2)}, ws);
  CHECK((dw[0] == 0.0f && like(dw[1], 2.0f) && like(dw[2], 4.0f) && std::abs(dw[3]) < 1e-5f));
}

TEST_CASE("each gradient of a gate that is wanted alone has the bits of all; nowhere is nowhere") {
  constexpr index_t n = 18, d = 9, e = 5, h = 4, c = 11;
  const floats x = random_floats(n * d, 1), w = random_floats(c * d, 2),
               dz = random_floats(n * e, 3), two = random_floats(e * h, 4),
               up = random_floats(n, 5), half(n, 0.5f);
  const auto of_x = as_rows(x, d), of_w = as_rows(w, d), of_dz = as_rows(dz, e);
  workspace ws;
  float dscale = 7.0f;
  const auto whole = [&](index_t rows, bool has_bias, auto&& call) {
    const auto made = [&](int wanted, gradient_to to) {
      std::vector<floats> out{floats(n * d, 7.0f), floats(static_cast<std::size_t>(rows * d), 7.0f),
                              floats(static_cast<std::size_t>(rows), 7.0f)};
      gate_gradients<float> g{.to = to};
      if (wanted == 0 || wanted == 3) g.x = test::into_rows(out[0], d);
      if (wanted == 1 || wanted == 3) g.weight = test::into_rows(out[1], d);
      if ((wanted == 2 || wanted == 3) && has_bias) g.bias = out[2];
      call(g);
      return out;
    };
    const std::vector<floats> none = made(4, gradient_to::write), all = made(3, gradient_to::write);
    for (std::size_t j = 0; j < 3; ++j) {
      CHECK((all[j] != none[j]) == (j < 2 || has_bias));
      const std::vector<floats> one = made(static_cast<int>(j), gradient_to::write);
      for (std::size_t i = 0; i < 3; ++i) CHECK(one[i] == (i == j ? all[i] : none[i]));
    }
    const float before = dscale;
    CHECK(made(3, gradient_to::nowhere) == none);
    CHECK(dscale == before);
  };
  whole(e, true, [&](const gate_gradients<float>& g) {
    gate_backward(of_x, of_w.middle_rows(0, e), of_dz, g);
  });
  whole(e, false, [&](const gate_gradients<float>& g) {
    cosine_gate_backward(of_x, of_w.middle_rows(0, e), 2.0f, of_dz, g, ws, serial{}, &dscale);
  });
  whole(1, true, [&](const gate_gradients<float>& g) {
    shared_gate_backward(of_x, of_w.middle_rows(0, 1), 0.75f, half, up, g, ws);
  });
  whole(e, true, [&](const gate_gradients<float>& g) {
    rms_gate_backward(of_x, of_w.middle_rows(0, e), {}, of_dz, g, ws);
  });
  whole(c, false,
        [&](const gate_gradients<float>& g) { codebook_gate_backward(of_x, of_w, of_dz, g, ws); });
  const auto deep = [&](bool of_input, gradient_to to) {
    floats dx(n * d, 7.0f), first(h * d, 7.0f), second(e * h, 7.0f), b1(h, 7.0f), b2(e, 7.0f);
    mlp_gate_gradients<float> g{.to = to};
    if (of_input) g.x = test::into_rows(dx, d);
    if (!of_input || to == gradient_to::nowhere)
      g.first = test::into_rows(first, d), g.first_bias = b1, g.second = test::into_rows(second, h),
      g.second_bias = b2;
    mlp_gate_backward(
        of_x, mlp_gate_weights<float>{.first = of_w.middle_rows(0, h), .second = as_rows(two, h)},
        of_dz, g, ws);
    const auto same = [](const floats& list) { return list == floats(list.size(), 7.0f); };
    return std::vector<bool>{same(dx), same(first), same(second), same(b1), same(b2)};
  };
  CHECK(deep(true, gradient_to::write) == std::vector<bool>{false, true, true, true, true});
  CHECK(deep(false, gradient_to::write) == std::vector<bool>{true, false, false, false, false});
  CHECK(deep(true, gradient_to::nowhere) == std::vector<bool>(5, true));
  // A mixing gate's decisions are pulled without its tokens too; +inf is all there is, NaN nothing.
  const auto mixed = [&](const floats& z, gradient_to to, bool of_input) {
    floats dx(n * d, 7.0f), inner(n * e, 7.0f);
    mixing_gate_backward<float>(of_x, as_rows(z, e), 1.5f, of_dz, to,
                                of_input ? test::into_rows(dx, d) : matrix_view<float>{},
                                test::into_rows(inner, e), ws);
    inner.insert(inner.end(), dx.begin(), dx.end());
    return inner;
  };
  floats z = random_floats(n * e, 6), known = z;
  floats pulled = mixed(z, gradient_to::write, true), alone = mixed(z, gradient_to::write, false);
  CHECK(std::equal(pulled.begin(), pulled.begin() + n * e, alone.begin()));
  CHECK(std::count(alone.begin(), alone.end(), 7.0f) == n * d);
  CHECK(mixed(z, gradient_to::nowhere, true) == floats(n * (d + e), 7.0f));
  z[0] = z[3] = HUGE_VALF, known[0] = known[3] = 60.0f;
  z[6] = std::nanf(""), known[6] = -200.0f;
  known[1] = known[2] = known[4] = -200.0f;
  CHECK(test::difference(mixed(z, gradient_to::write, true), mixed(known, gradient_to::write, true),
                         1e-6, 1e-6) == "");
}

TEST_CASE("a shared expert's weight is scale sigmoid(x w), and without a scale it pulls nothing") {
  constexpr index_t n = 19, d = 21;
  const floats x = random_floats(n * d, 1), w = random_floats(d, 2, 0.3f), up = random_floats(n, 3);
  floats made(n), dx(n * d, 7.0f);
  std::vector<double> expected(n), slope(n * d);
  shared_gate(as_rows(x, d), simd::packed_matrix<>(as_rows(w, d)), 1.5f, made);
  for (index_t t = 0; t < n; ++t) {
    const auto at = static_cast<std::size_t>(t);
    const double s = 1.0 / (1.0 + std::exp(-dot(wide(x, d), t, wide(w, d), 0)));
    expected[at] = 1.5 * s;
    for (std::size_t i = 0; i < d; ++i)
      slope[at * d + i] = double{up[at]} * 1.5 * s * (1.0 - s) * double{w[i]};
  }
  CHECK(test::difference(made, expected, 1e-5) == "");
  workspace ws;
  for (const float scale : {1.5f, 0.0f}) {
    shared_gate_backward(as_rows(x, d), as_rows(w, d), scale, made, up,
                         gate_gradients<float>{.x = test::into_rows(dx, d)}, ws);
    if (scale != 0.0f) CHECK(test::difference(dx, slope, 1e-5, 1e-5) == "");
  }
  CHECK(dx == floats(n * d, 0.0f));
}
