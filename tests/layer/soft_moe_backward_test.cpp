#include <moeroute/layer/soft_moe_backward.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace soft_moe_backward_test {

using namespace moeroute;
using floats = std::vector<float>;

namespace {

constexpr index_t tokens = 9, slots = 6, d = 5;

floats random_floats(index_t n, std::uint64_t seed) {
  test::random rng(seed);
  floats x(static_cast<std::size_t>(n));
  for (float& v : x) v = rng.normal();
  return x;
}
matrix_view<const float> rows(const floats& x, index_t n) { return {x.data(), n, d}; }
matrix_view<float> into(floats& x, index_t n) { return {x.data(), n, d}; }

struct curves {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<float> out) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < d; ++c) out(r, c) = std::tanh(in(r, c)) * static_cast<float>(e + 1);
  }
};
struct curve_gradients {
  void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dout,
                  matrix_view<float> din) const {
    for (index_t r = 0; r < in.rows; ++r)
      for (index_t c = 0; c < d; ++c) {
        const float y = std::tanh(in(r, c));
        // Fused by name: left to the compiler it may be fused under one executor and not under
        // another.
        din(r, c) = dout(r, c) * std::fma(-y, y, 1.0f) * static_cast<float>(e + 1);
      }
  }
};

}  // namespace

TEST_CASE("a soft layer changes as its gradients say, its slots, their scale and its input") {
  for (const soft_logits kind : {soft_logits::product, soft_logits::normalized}) {
    const floats x = random_floats(tokens * d, 1), mu = random_floats(slots * d, 2);
    const floats dy = random_floats(tokens * d, 3);
    const float scale = kind == soft_logits::normalized ? 1.5f : 1.0f;
    const auto value = [&](const floats& at_x, const floats& at_mu, float at_scale) {
      soft_moe layer(rows(at_mu, slots), curves{}, {2, kind, at_scale});
      floats y(x.size());
      layer.forward(rows(at_x, tokens), into(y, tokens));
      double sum = 0.0;
      for (std::size_t i = 0; i < y.size(); ++i)
        sum += static_cast<double>(y[i]) * static_cast<double>(dy[i]);
      return sum;
    };
    soft_moe layer(rows(mu, slots), curves{}, {2, kind, scale});
    soft_tape tape;
    floats y(x.size()), dx(x.size(), 9.0f), dmu(mu.size(), 9.0f);
    float dscale = 0.0f;
    layer.forward(rows(x, tokens), into(y, tokens), serial{}, tape);
    const soft_gradients wanted{gradient_to::write, into(dx, tokens), into(dmu, slots), &dscale};
    backward(layer, rows(x, tokens), tape, rows(dy, tokens), rows(mu, slots), curve_gradients{},
             wanted);
    const float h = 0x1p-7f;
    const auto slope = [&](auto&& at) { return (at(h) - at(-h)) / (2.0 * static_cast<double>(h)); };
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double s = slope([&](float step) {
        floats moved = x;
        moved[i] += step;
        return value(moved, mu, scale);
      });
      CHECK(std::abs(s - static_cast<double>(dx[i])) < 3e-3 * (1.0 + std::abs(s)));
    }
    for (std::size_t i = 0; i < mu.size(); ++i) {
      const double s = slope([&](float step) {
        floats moved = mu;
        moved[i] += step;
        return value(x, moved, scale);
      });
      CHECK(std::abs(s - static_cast<double>(dmu[i])) < 3e-3 * (1.0 + std::abs(s)));
    }
    if (kind == soft_logits::normalized) {
      const double s = slope([&](float step) { return value(x, mu, scale + step); });
      CHECK(std::abs(s - static_cast<double>(dscale)) < 3e-3 * (1.0 + std::abs(s)));
    }
    floats again(x.size()), mu_again(mu.size());
    backward(layer, rows(x, tokens), tape, rows(dy, tokens), rows(mu, slots), curve_gradients{},
             {gradient_to::write, into(again, tokens), into(mu_again, slots)}, test::backwards{});
    CHECK(test::bit_difference(again, dx) == "");
    CHECK(test::bit_difference(mu_again, dmu) == "");
  }
}

TEST_CASE("a soft tape without a call, or of another shape, is refused by name") {
  const floats x = random_floats(tokens * d, 1), mu = random_floats(slots * d, 2);
  floats y(x.size()), dx(x.size());
  soft_moe layer(rows(mu, slots), curves{});
  soft_tape tape;
  const auto refused = [&](index_t n) {
    return test::refusal([&] {
      backward(layer, rows(x, n), tape, rows(x, n), rows(mu, slots), curve_gradients{},
               {.x = into(dx, n)});
    });
  };
  CHECK(refused(tokens) == "moeroute::backward: the tape is empty: it comes from forward()");
  layer.forward(rows(x, tokens), into(y, tokens), serial{}, tape);
  CHECK(refused(4) == "moeroute::backward: x.rows() is 4, expected 9");
  const auto said = [&](const matrix_view<const float>& states, const matrix_view<const float>& dy,
                        const matrix_view<const float>& vectors) {
    return test::refusal([&] {
      backward(layer, states, tape, dy, vectors, curve_gradients{}, {.x = into(dx, tokens)});
    });
  };
  const auto all = rows(x, tokens), own = rows(mu, slots);
  const matrix_view<const float> narrow(x.data(), tokens, d - 1, d);
  const std::string less = std::to_string(d - 1) + ", expected " + std::to_string(d);
  CHECK(said(narrow, all, own) == "moeroute::backward: x.cols() is " + less);
  CHECK(said(all, all.middle_rows(0, 4), own) == "moeroute::backward: dy.rows() is 4, expected 9");
  CHECK(said(all, narrow, own) == "moeroute::backward: dy.cols() is " + less);
  CHECK(said(all, all, own.middle_rows(0, slots - 1)) == "moeroute::backward: mu.rows() is " +
                                                             std::to_string(slots - 1) +
                                                             ", expected " + std::to_string(slots));
  CHECK(said(all, all, {mu.data(), slots, d - 1, d}) == "moeroute::backward: mu.cols() is " + less);
  const soft_moe fewer(own.middle_rows(0, slots - 1), curves{});
  CHECK(test::refusal([&] {
          backward(fewer, all, tape, all, own.middle_rows(0, slots - 1), curve_gradients{},
                   {.x = into(dx, tokens)});
        }) == "moeroute::backward: tape.plan.slots() is " + std::to_string(slots) + ", expected " +
                  std::to_string(slots - 1));
  CHECK(refused(tokens) == "accepted");
}

TEST_CASE("gradients that go nowhere are written nowhere") {
  const floats x = random_floats(tokens * d, 1), mu = random_floats(slots * d, 2);
  for (const soft_logits kind : {soft_logits::product, soft_logits::normalized}) {
    soft_moe layer(rows(mu, slots), curves{}, {2, kind, 1.0f});
    soft_tape tape;
    floats y(x.size()), dx(x.size(), 4.0f), dmu(mu.size(), 4.0f);
    layer.forward(rows(x, tokens), into(y, tokens), serial{}, tape);
    backward(layer, rows(x, tokens), tape, rows(y, tokens), rows(mu, slots), curve_gradients{},
             {gradient_to::nowhere, into(dx, tokens), into(dmu, slots)});
    CHECK(dx == floats(x.size(), 4.0f));
    CHECK(dmu == floats(mu.size(), 4.0f));
  }
}

TEST_CASE("a soft layer goes forwards and backwards beside memory that nobody may touch") {
  constexpr index_t many = 16;  // tokens and slots
  const floats x = random_floats(many * d, 1), mu = random_floats(many * d, 2);
  const auto gradients = [&](soft_logits kind, index_t stride = d) {
    soft_moe layer(rows(mu, many), curves{}, {2, kind, 1.5f});
    soft_tape tape;
    floats y(x.size()), dx(x.size()), dmu(mu.size()), wide(static_cast<std::size_t>(many * stride));
    for (index_t t = 0; t < many; ++t) std::copy_n(x.begin() + t * d, d, wide.begin() + t * stride);
    const matrix_view<const float> input(wide.data(), many, d, stride);
    float dscale = 0.0f;
    layer.forward(input, into(y, many), serial{}, tape);
    backward(layer, input, tape, rows(y, many), rows(mu, many), curve_gradients{},
             {gradient_to::write, into(dx, many), into(dmu, many), &dscale});
    dx.insert(dx.end(), dmu.begin(), dmu.end());
    dx.push_back(dscale);
    return dx;
  };
  for (const soft_logits kind : {soft_logits::product, soft_logits::normalized}) {
    const floats expected = gradients(kind);
    CHECK(test::bit_difference(gradients(kind, d + 3), expected) == "");
    for (const test::guarded_end end : {test::guarded_end::front, test::guarded_end::back}) {
      const test::forbidden_memory around(end);
      CHECK(test::bit_difference(gradients(kind), expected) == "");
    }
  }
}

TEST_CASE("a warm soft layer goes backwards without an allocation") {
  const floats x = random_floats(tokens * d, 1), mu = random_floats(slots * d, 2);
  floats y(x.size()), dx(x.size()), dmu(mu.size());
  float dscale = 0.0f;
  soft_moe layer(rows(mu, slots), curves{}, {2, soft_logits::normalized, 1.5f});
  soft_tape tape;
  long made = 0;
  for (int i = 0; i < 3; ++i)
    made = test::allocations_during([&] {
      layer.forward(rows(x, tokens), into(y, tokens), serial{}, tape);
      backward(layer, rows(x, tokens), tape, rows(y, tokens), rows(mu, slots), curve_gradients{},
               {gradient_to::write, into(dx, tokens), into(dmu, slots), &dscale});
    });
  CHECK(made == 0);
}

TEST_CASE("a soft layer's gradients are added, each wanted by itself, and of 16 bits too") {
  struct with_memory {
    index_t scratch_floats() const { return d; }
    void operator()(expert_id e, matrix_view<const float> in, matrix_view<const float> dout,
                    matrix_view<float> din, float* memory) const {
      curve_gradients{}(e, in, dout, din);
      std::fill_n(memory, d, 5.0f);
    }
  };
  const auto narrow = [](const floats& v) { return std::vector<bfloat16>(v.begin(), v.end()); };
  const std::vector<bfloat16> x16 = narrow(random_floats(tokens * d, 1)),
                              dy16 = narrow(random_floats(tokens * d, 3));
  const floats x(x16.begin(), x16.end()), dy(dy16.begin(), dy16.end()),
      mu = random_floats(slots * d, 2);
  for (const soft_logits kind : {soft_logits::product, soft_logits::normalized}) {
    soft_moe layer(rows(mu, slots), curves{}, {2, kind, 1.5f});
    soft_tape tape;
    floats y(x.size());
    layer.forward(rows(x, tokens), into(y, tokens), serial{}, tape);
    // What is made of gradients that were `before`, and of a scale's that was 2.
    const auto made = [&](gradient_to to, float before, bool of_x, bool of_mu, bool of_scale) {
      floats dx(x.size(), before), dmu(mu.size(), before);
      float dscale = 2.0f;
      backward(layer, rows(x, tokens), tape, rows(dy, tokens), rows(mu, slots), curve_gradients{},
               {to, of_x ? into(dx, tokens) : matrix_view<float>{},
                of_mu ? into(dmu, slots) : matrix_view<float>{}, of_scale ? &dscale : nullptr});
      dx.insert(dx.end(), dmu.begin(), dmu.end());
      dx.push_back(dscale);
      return dx;
    };
    const floats all = made(gradient_to::write, 9.0f, true, true, true);
    CHECK((all.back() == 2.0f) == (kind == soft_logits::product));
    floats added = made(gradient_to::add, 1.0f, true, true, true);
    for (std::size_t i = 0; i + 1 < added.size(); ++i) added[i] -= 1.0f;
    CHECK(test::difference(added, all, 1e-5, 1e-5) == "");
    const auto n = static_cast<std::ptrdiff_t>(x.size());
    floats one = all;
    std::fill(one.begin() + n, one.end() - 1, 9.0f), one.back() = 2.0f;
    CHECK(made(gradient_to::write, 9.0f, true, false, false) == one);
    one = all;
    std::fill_n(one.begin(), n, 9.0f), one.back() = 2.0f;
    CHECK(made(gradient_to::write, 9.0f, false, true, false) == one);

    floats dx(x.size()), dmu(mu.size());
    const matrix_view<const bfloat16> few(x16.data(), tokens, d);
    layer.forward(few, into(y, tokens), serial{}, tape);
    backward(layer, few, tape, matrix_view<const bfloat16>(dy16.data(), tokens, d), rows(mu, slots),
             with_memory{}, {gradient_to::write, into(dx, tokens), into(dmu, slots)});
    dx.insert(dx.end(), dmu.begin(), dmu.end());
    CHECK(test::difference(dx, floats(all.begin(), all.end() - 1), 1e-5, 1e-5) == "");
  }
}

}  // namespace soft_moe_backward_test
