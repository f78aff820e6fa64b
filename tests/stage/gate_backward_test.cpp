#include <moeroute/stage/gate_backward.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/expert_backward.hpp>
#include <moeroute/stage/gate.hpp>
#include <moeroute/stage/plan.hpp>
#include <string>
#include <vector>

#include "oracle/losses.hpp"
#include "support/allocations.hpp"
#include "support/assignments.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/threads.hpp"

using namespace moeroute;

namespace {

constexpr index_t back_tokens = 23, back_experts = 9, back_width = 21;

template <class T>
std::vector<T> random_values(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  std::vector<T> x(static_cast<std::size_t>(n));
  for (T& v : x) v = static_cast<T>(rng.normal());
  return x;
}
template <class T>
matrix_view<T> rows(std::vector<T>& x, index_t n) {
  return {x.data(), n, static_cast<index_t>(x.size()) / n};
}
double sum_of_products(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i)
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return sum;
}

}  // namespace

TEST_CASE("the gate's gradients are the adjoints of gate, for 16-bit states and weights too") {
  const auto check = [&]<class X, class W>(X, W) {
    auto x = random_values<X>(back_tokens * back_width, 1);
    auto w = random_values<W>(back_experts * back_width, 2);
    auto dz = random_values<float>(back_tokens * back_experts, 3);
    const std::vector<float> wide_x(x.begin(), x.end());
    std::vector<float> wide_w(w.begin(), w.end());
    std::vector<float> dx(x.size(), 7.0f), dw(w.size(), 7.0f), db(back_experts, 7.0f), z(dz.size());
    gate(rows(x, back_tokens), simd::packed_matrix<>(rows(wide_w, back_experts)),
         rows(z, back_tokens));
    gate_backward(rows(x, back_tokens), rows(w, back_experts), rows(dz, back_tokens),
                  gate_gradients<float>{gradient_to::write, rows(dx, back_tokens),
                                        rows(dw, back_experts), db});
    const double forward = sum_of_products(dz, z);
    CHECK(std::abs(sum_of_products(dx, wide_x) - forward) < 1e-3);
    CHECK(std::abs(sum_of_products(dw, wide_w) - forward) < 1e-3);
    double all = 0.0, bias = 0.0;
    for (const float g : dz) all += static_cast<double>(g);
    for (const float g : db) bias += static_cast<double>(g);
    CHECK(std::abs(all - bias) < 1e-4);
    // Added: twice as much.
    const auto once = dw;
    const long made = test::allocations_during([&] {
      gate_backward(rows(x, back_tokens), rows(w, back_experts), rows(dz, back_tokens),
                    gate_gradients<float>{gradient_to::add, {}, rows(dw, back_experts), db});
    });
    CHECK(made == 0);
    for (std::size_t i = 0; i < dw.size(); ++i) dw[i] -= once[i];
    CHECK(test::difference(dw, once, 1e-4, 1e-5) == "");
  };
  check(float{}, float{});
  check(bfloat16{}, float{});
  check(float{}, bfloat16{});
  check(float16{}, float16{});
}

TEST_CASE("the gradients of a cosine gate and of a shared expert's gate are derivatives") {
  workspace ws;
  // Arrays that end with a line of memory, and inside of one; a token without a direction.
  for (const std::size_t n : {5u, 8u}) {
    constexpr std::size_t d = 4, experts = 3;
    const auto rows_n = static_cast<index_t>(n);
    auto x = random_values<double>(rows_n * 4, 11), w = random_values<double>(3 * 4, 12);
    auto dz = random_values<double>(rows_n * 3, 13);
    for (std::size_t j = d; j < 2 * d; ++j) x[j] = 0.0;
    std::vector<double> dx(n * d, 7.0), dw(experts * d, 7.0);
    double dscale = 0.0;
    cosine_gate_backward(rows(x, rows_n), rows(w, 3), 2.5, rows(dz, rows_n),
                         gate_gradients<double>{gradient_to::write, rows(dx, rows_n), rows(dw, 3)},
                         ws, serial{}, &dscale);
    const auto value = [&](const std::vector<double>& a, const std::vector<double>& b,
                           double scale) {
      double sum = 0.0;
      for (std::size_t t = 0; t < n; ++t)
        for (std::size_t e = 0; e < experts; ++e) {
          double ab = 0.0, aa = 0.0, bb = 0.0;
          for (std::size_t j = 0; j < d; ++j) {
            ab += a[t * d + j] * b[e * d + j];
            aa += a[t * d + j] * a[t * d + j];
            bb += b[e * d + j] * b[e * d + j];
          }
          if (t != 1) sum += dz[t * experts + e] * scale * ab / std::sqrt(aa * bb);
        }
      return sum;
    };
    const auto of_x = [&](const std::vector<double>& a) { return value(a, w, 2.5); };
    const auto of_w = [&](const std::vector<double>& b) { return value(x, b, 2.5); };
    CHECK(test::difference(dw, oracle::derivative(w, of_w), 1e-7, 2e-9) == "");
    std::vector<double> slope = oracle::derivative(x, of_x);
    for (std::size_t j = d; j < 2 * d; ++j) slope[j] = 0.0;
    CHECK(test::difference(dx, slope, 1e-7, 2e-9) == "");
    CHECK(std::abs(dscale - value(x, w, 1.0)) < 1e-12);
  }

  auto x = random_values<double>(5 * 4, 11);
  auto gate_row = random_values<double>(4, 14), up = random_values<double>(5, 15);
  const auto gated = [&](const std::vector<double>& g) {
    std::vector<double> weight(5);
    for (std::size_t t = 0; t < 5; ++t) {
      double z = 0.0;
      for (std::size_t j = 0; j < 4; ++j) z += x[t * 4 + j] * g[j];
      weight[t] = 0.75 / (1.0 + std::exp(-z));
    }
    return weight;
  };
  std::vector<double> dgate(4, 7.0);
  shared_gate_backward(rows(x, 5), rows(gate_row, 1), 0.75, gated(gate_row), up,
                       gate_gradients<double>{gradient_to::write, {}, rows(dgate, 1)}, ws);
  CHECK(test::difference(dgate,
                         oracle::derivative(gate_row,
                                            [&](const std::vector<double>& g) {
                                              const auto weight = gated(g);
                                              double sum = 0.0;
                                              for (std::size_t t = 0; t < 5; ++t)
                                                sum += up[t] * weight[t];
                                              return sum;
                                            }),
                         1e-7, 2e-9) == "");
}

TEST_CASE("every expert that has tokens is run backwards once, with its rows") {
  test::random rng(5);
  const assignment a = test::fixed_choices(rng, 30, 7, 2, 3);
  dispatch_plan p;
  plan(a, p, {.block = 4});
  buffer<float> in(p.slots() * 2), dout(p.slots() * 3), din(p.slots() * 2);
  std::vector<int> calls(7);
  std::vector<index_t> seen(7, 0);
  for_each_expert_backward(p, matrix_view<float>(in.data(), p.slots(), 2),
                           matrix_view<float>(dout.data(), p.slots(), 3),
                           matrix_view<float>(din.data(), p.slots(), 2),
                           [&](expert_id e, matrix_view<const float> rows_in,
                               matrix_view<const float> drows, matrix_view<float> out) {
                             const auto at = static_cast<std::size_t>(e);
                             ++calls[at];
                             seen[at] = rows_in.rows;
                             CHECK(rows_in.data == in.data() + p.offsets()[at] * 2);
                             CHECK(drows.data == dout.data() + p.offsets()[at] * 3);
                             CHECK(out.data == din.data() + p.offsets()[at] * 2);
                           });
  for (std::size_t e = 0; e < 7; ++e) {
    CHECK(calls[e] == (p.load(index_t(e)) > 0 ? 1 : 0));
    CHECK(seen[e] == p.load(index_t(e)));
  }
  CHECK(test::refusal([&] {
          for_each_expert_backward(p, matrix_view<float>(in.data(), p.slots(), 2),
                                   matrix_view<float>(dout.data(), p.slots() - 1, 3),
                                   matrix_view<float>(din.data(), p.slots(), 2),
                                   [](expert_id, matrix_view<const float>, matrix_view<const float>,
                                      matrix_view<float>) {});
        }) == "moeroute::for_each_expert_backward: dout.rows() is " +
                  std::to_string(p.slots() - 1) + ", expected " + std::to_string(p.slots()));
}

TEST_CASE("gradients of a gate that do not fit are refused by name") {
  auto x = random_values<float>(back_tokens * back_width, 1),
       w = random_values<float>(back_experts * back_width, 2);
  auto dz = random_values<float>(back_tokens * back_experts, 3);
  std::vector<float> dx(x.size()), dw(w.size());
  const auto refused = [&](matrix_view<float> z, const gate_gradients<float>& g) {
    return test::refusal([&] { gate_backward(rows(x, back_tokens), rows(w, back_experts), z, g); });
  };
  CHECK(refused(rows(dz, back_tokens).middle_rows(0, 4), {}) ==
        "moeroute::gate_backward: dlogits.rows() is 4, expected 23");
  CHECK(refused(rows(dz, back_tokens), {.weight = rows(dw, back_experts).middle_rows(0, 3)}) ==
        "moeroute::gate_backward: gradients.weight.rows() is 3, expected 9");
  CHECK(refused(rows(dz, back_tokens), {.bias = std::span<float>(dx.data(), 2)}) ==
        "moeroute::gate_backward: gradients.bias.size() is 2, expected 9");
  CHECK(refused(rows(dz, back_tokens), {.x = rows(x, back_tokens)}) ==
        "moeroute::gate_backward: x and gradients.x overlap, expected memory of their own");
  CHECK(
      refused(rows(dz, back_tokens), {.weight = rows(w, back_experts)}) ==
      "moeroute::gate_backward: weight and gradients.weight overlap, expected memory of their own");
  const matrix_view<float> in_dx(dx.data(), back_tokens, back_experts),
      in_dw(dw.data(), 12, back_experts);
  CHECK(refused(in_dx, {.x = rows(dx, back_tokens)}) ==
        "moeroute::gate_backward: dlogits and gradients.x overlap, expected memory of their own");
  std::vector<float> both(
      static_cast<std::size_t>(back_tokens * back_experts + back_experts * back_width));
  CHECK(refused({both.data(), back_tokens, back_experts},
                {.weight = {both.data() + 1, back_experts, back_width}}) ==
        "moeroute::gate_backward: dlogits and gradients.weight overlap, expected memory of their "
        "own");
}

TEST_CASE("every gradient of a gate and of directions is refused by its own name") {
  auto x = random_values<float>(6 * 8, 1), w = random_values<float>(3 * 8, 2),
       dz = random_values<float>(6 * 3, 3);
  std::vector<float> a(96), b(96), up(6);
  workspace ws;
  const auto of = [](std::vector<float>& v, index_t n, index_t cols, index_t stride = 8) {
    return matrix_view<float>(v.data(), n, cols, stride);
  };
  const auto gated = [&](matrix_view<float> weight, matrix_view<float> z,
                         gate_gradients<float> to = {}) {
    return [&, weight, z, to] { gate_backward(of(x, 6, 8), weight, z, to); };
  };
  const auto unit = [&](matrix_view<float> v, matrix_view<float> du, matrix_view<float> dv) {
    return [=] { unit_rows_backward(v, du, gradient_to::write, dv); };
  };
  const auto good = rows(dz, 6);
  const std::string own = " overlap, expected memory of their own";
  const test::refusals refused{
      {gated(of(w, 3, 7), good), "gate_backward: weight.cols() is 7, expected 8"},
      {gated(of(w, 3, 8), of(dz, 6, 2, 3)), "gate_backward: dlogits.cols() is 2, expected 3"},
      {gated(of(w, 3, 8, 7), good), "gate_backward: weight.stride is 7, expected at least 8"},
      {gated(of(w, 3, 8), of(dz, 6, 3, 2)),
       "gate_backward: dlogits.stride is 2, expected at least 3"},
      {gated(of(w, 3, 8), good, {.x = of(a, 5, 8)}),
       "gate_backward: gradients.x.rows() is 5, expected 6"},
      {gated(of(w, 3, 8), good, {.x = of(a, 6, 7)}),
       "gate_backward: gradients.x.cols() is 7, expected 8"},
      {gated(of(w, 3, 8), good, {.x = of(a, 6, 8, 7)}),
       "gate_backward: gradients.x.stride is 7, expected at least 8"},
      {gated(of(a, 3, 8), good, {.x = of(a, 6, 8)}), "gate_backward: weight and gradients.x" + own},
      {gated(of(w, 3, 8), good, {.weight = of(a, 3, 7)}),
       "gate_backward: gradients.weight.cols() is 7, expected 8"},
      {gated(of(w, 3, 8), good, {.weight = of(a, 3, 8, 7)}),
       "gate_backward: gradients.weight.stride is 7, expected at least 8"},
      {gated(of(w, 3, 8), good, {.weight = of(x, 3, 8)}),
       "gate_backward: x and gradients.weight" + own},
      {[&] {
         std::vector<float> bias(3);
         cosine_gate_backward(of(x, 6, 8), of(w, 3, 8), 1.0f, good,
                              gate_gradients<float>{.bias = bias}, ws);
       },
       "cosine_gate_backward: gradients.bias.size() is 3, expected 0"},
      {unit(of(x, 6, 8), of(a, 5, 8), of(b, 6, 8)),
       "unit_rows_backward: du.rows() is 5, expected 6"},
      {unit(of(x, 6, 8), of(a, 6, 7), of(b, 6, 8)),
       "unit_rows_backward: du.cols() is 7, expected 8"},
      {unit(of(x, 6, 8), of(a, 6, 8), of(b, 5, 8)),
       "unit_rows_backward: dv.rows() is 5, expected 6"},
      {unit(of(x, 6, 8), of(a, 6, 8), of(b, 6, 7)),
       "unit_rows_backward: dv.cols() is 7, expected 8"},
      {unit(of(x, 6, 8, 7), of(a, 6, 8), of(b, 6, 8)),
       "unit_rows_backward: v.stride is 7, expected at least 8"},
      {unit(of(x, 6, 8), of(a, 6, 8, 7), of(b, 6, 8)),
       "unit_rows_backward: du.stride is 7, expected at least 8"},
      {unit(of(x, 6, 8), of(a, 6, 8), of(b, 6, 8, 7)),
       "unit_rows_backward: dv.stride is 7, expected at least 8"},
      {unit(of(x, 6, 8), of(a, 6, 8), of(a, 6, 8, 9)), "unit_rows_backward: du and dv" + own},
      {unit(of(a, 6, 8), of(b, 6, 8), of(a, 6, 8, 9)), "unit_rows_backward: v and dv" + own},
      {[&] {
         shared_gate_backward(of(x, 6, 8), of(w, 2, 8), 1.0f, up, up, gate_gradients<float>{}, ws);
       },
       "shared_gate_backward: weight.rows() is 2, expected 1"},
      {[&] {
         shared_gate_backward(of(x, 6, 8), of(w, 1, 8), 1.0f, std::span<const float>(up).first(5),
                              up, gate_gradients<float>{}, ws);
       },
       "shared_gate_backward: weights.size() is 5, expected 6"},
      {[&] {
         shared_gate_backward(of(x, 6, 8), of(w, 1, 8), 1.0f, up,
                              std::span<const float>(up).first(5), gate_gradients<float>{}, ws);
       },
       "shared_gate_backward: dweights.size() is 5, expected 6"},
  };
  for (const auto& [call, message] : refused) CHECK(test::refusal(call) == "moeroute::" + message);
  // The direction's gradient may lie in that of the direction, and in what it is of.
  std::vector<float> du = random_values<float>(6 * 8, 4), expected(48), v = x;
  unit_rows_backward(of(x, 6, 8), of(du, 6, 8), gradient_to::write, of(expected, 6, 8));
  unit_rows_backward(of(x, 6, 8), of(du, 6, 8), gradient_to::nowhere, of(a, 6, 8));
  CHECK(a == std::vector<float>(96, 0.0f));
  std::vector<float> same = du;
  unit_rows_backward(of(x, 6, 8), of(same, 6, 8), gradient_to::write, of(same, 6, 8));
  CHECK(test::bit_difference(same, expected) == "");
  unit_rows_backward(of(v, 6, 8), of(du, 6, 8), gradient_to::write, of(v, 6, 8));
  CHECK(test::bit_difference(v, expected) == "");
}

TEST_CASE("directions pull back row by row, written or added, wherever rows lie") {
  constexpr index_t n = 19, width = 21;
  auto v = random_values<double>(n * 24, 5), du = random_values<double>(n * 22, 6);
  const auto before = random_values<double>(n * 27, 7);
  for (std::size_t j = 0; j < width; ++j) v[3 * 24 + j] = 0.0;  // a row without a direction
  for (const double eps : {0.0, 0.5})
    for (const gradient_to to : {gradient_to::write, gradient_to::add}) {
      std::vector<double> dv = before, slow = before;
      unit_rows_backward(matrix_view<double>(v.data(), n, width, 24),
                         matrix_view<const double>(du.data(), n, width, 22), to,
                         matrix_view<double>(dv.data(), n, width, 27), serial{}, eps);
      for (std::size_t r = 0; r < n; ++r) {
        double square = eps, along = 0.0;
        for (std::size_t j = 0; j < width; ++j) {
          square += v[r * 24 + j] * v[r * 24 + j];
          along += v[r * 24 + j] * du[r * 22 + j];
        }
        for (std::size_t j = 0; j < width; ++j) {
          const double g =
              square > 0.0 ? (du[r * 22 + j] - along / square * v[r * 24 + j]) / std::sqrt(square)
                           : 0.0;
          double& made = slow[r * 27 + j];
          made = to == gradient_to::write ? g : made + g;
        }
      }
      CHECK(test::difference(dv, slow, 1e-12, 1e-12) == "");
    }
}

TEST_CASE("a cosine gate's gradients have the same bits for every executor, and allocate nothing") {
  const auto x = random_values<float>(200 * 48, 1), w = random_values<float>(9 * 48, 2);
  const auto dz = random_values<float>(200 * 9, 3);
  workspace ws;
  const auto all = [&](const auto& exec) {
    std::vector<float> dx(x.size()), dw(w.size()), bits;
    float dscale = 0.0f;
    long made = 0;
    for (int i = 0; i < 2; ++i) {
      dscale = 0.0f;
      made = test::allocations_during([&] {
        cosine_gate_backward(
            matrix_view<const float>(x.data(), 200, 48), matrix_view<const float>(w.data(), 9, 48),
            2.5f, matrix_view<const float>(dz.data(), 200, 9),
            gate_gradients<float>{gradient_to::write, {dx.data(), 200, 48}, {dw.data(), 9, 48}}, ws,
            exec, &dscale);
      });
    }
    if constexpr (std::is_same_v<std::decay_t<decltype(exec)>, serial>) CHECK(made == 0);
    bits = dx;
    bits.insert(bits.end(), dw.begin(), dw.end());
    bits.push_back(dscale);
    return bits;
  };
  const std::vector<float> alone = all(serial{});
  CHECK(test::bit_difference(all(test::backwards{}), alone) == "");
  CHECK(test::bit_difference(all(test::several_threads{}), alone) == "");
}

TEST_CASE("an expert's rows are refused on the way back by name, and may be left out") {
  test::random rng(6);
  const assignment a = test::fixed_choices(rng, 5, 4, 2);
  dispatch_plan p;
  plan(a, p);
  const index_t n = p.slots();
  std::vector<float> own[3] = {std::vector<float>(200), std::vector<float>(200),
                               std::vector<float>(200)};
  // Which of in, dout and din is of another height or has rows too close; 3: none.
  const auto said = [&](int short_one, int close_one, int memory_of_din = 2, bool with_in = true) {
    const auto at = [&](int i, int memory) {
      matrix_view<float> v(own[memory].data(), n - (i == short_one), 4);
      if (i == close_one) v.stride = 3;
      return v;
    };
    return test::refusal([&] {
      for_each_expert_backward(
          p, with_in ? at(0, 0) : matrix_view<float>{}, at(1, 1), at(2, memory_of_din),
          [&](expert_id, matrix_view<const float> in, matrix_view<const float>,
              matrix_view<float>) { CHECK((in.data == nullptr) == !with_in); });
    });
  };
  const std::string where = "moeroute::for_each_expert_backward: ";
  const char* const names[] = {"in", "dout", "din"};
  for (int i = 0; i < 3; ++i) {
    CHECK(said(i, 3) == where + names[i] + ".rows() is " + std::to_string(n - 1) + ", expected " +
                            std::to_string(n));
    CHECK(said(3, i) == where + names[i] + ".stride is 3, expected at least 4");
    if (i < 2)
      CHECK(said(3, 3, i) == where + names[i] + " and din overlap, expected memory of their own");
  }
  CHECK(said(3, 3) == "accepted");
  CHECK(said(3, 3, 2, false) == "accepted");
}
