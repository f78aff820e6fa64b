#include <moeroute/stage/soft_backward.hpp>
//
#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/simd/rows/row_dot.hpp>
#include <moeroute/stage/gate_backward.hpp>
#include <moeroute/stage/soft.hpp>
#include <string>
#include <vector>

#include "support/allocations.hpp"
#include "support/backwards.hpp"
#include "support/compare.hpp"
#include "support/gradient_file.hpp"
#include "support/refusal.hpp"

using namespace moeroute;
using doubles = std::vector<double>;

namespace {

matrix_view<double> rows(doubles& x, index_t n) {
  return {x.data(), n, static_cast<index_t>(x.size()) / n};
}
// [T, S] as [S, T].
doubles turned(const doubles& x, index_t tokens) {
  const index_t slots = static_cast<index_t>(x.size()) / tokens;
  doubles y(x.size());
  for (index_t t = 0; t < tokens; ++t)
    for (index_t s = 0; s < slots; ++s)
      y[static_cast<std::size_t>(s * tokens + t)] = x[static_cast<std::size_t>(t * slots + s)];
  return y;
}

}  // namespace

TEST_CASE("gradients of soft plans are autograd's") {
  for (const char* name : {"soft_moe_weights_T6_E16_k4", "soft_moe_weights_T5_E64_k6"}) {
    INFO(name);
    const test::gradient_file file(name);
    const index_t tokens = file.tokens, slots = file.experts;
    doubles dispatch = turned(file.numbers("dispatch"), tokens), combine = file.numbers("combine");
    doubles ddispatch = turned(file.numbers("upstream_dispatch"), tokens);
    doubles dcombine = file.numbers("upstream_combine"), dz(combine.size()),
            other(combine.size(), 1.0);
    const test::forbidden_memory around(test::guarded_end::back);
    workspace ws;
    plan_soft_backward(rows(dispatch, slots), rows(combine, tokens), rows(ddispatch, slots),
                       rows(dcombine, tokens), gradient_to::write, rows(dz, tokens), ws);
    CHECK(test::difference(dz, file.numbers("grad_logits"), 1e-9, 1e-13) == "");
    // Each of the views may have a stride of its own.
    doubles wide(static_cast<std::size_t>(slots * (tokens + 2)), NAN);
    for (index_t s = 0; s < slots; ++s)
      std::copy_n(ddispatch.begin() + s * tokens, tokens, wide.begin() + s * (tokens + 2));
    plan_soft_backward(rows(dispatch, slots), rows(combine, tokens),
                       matrix_view<const double>(wide.data(), slots, tokens, tokens + 2),
                       rows(dcombine, tokens), gradient_to::write, rows(other, tokens), ws);
    CHECK(other == dz);
    std::fill(other.begin(), other.end(), 1.0);
    plan_soft_backward(rows(dispatch, slots), rows(combine, tokens), rows(ddispatch, slots),
                       rows(dcombine, tokens), gradient_to::add, rows(other, tokens), ws,
                       test::backwards{});
    for (double& g : other) g -= 1.0;
    CHECK(test::difference(other, dz, 0.0, 1e-13) == "");
  }
}

TEST_CASE(
    "a gradient of a soft plan is one product, fused with the other, whatever a compiler likes") {
  const test::gradient_file file("soft_moe_weights_T5_E64_k6");
  const index_t tokens = file.tokens, slots = file.experts;
  doubles dispatch = turned(file.numbers("dispatch"), tokens), combine = file.numbers("combine");
  doubles ddispatch = turned(file.numbers("upstream_dispatch"), tokens);
  doubles dcombine = file.numbers("upstream_combine"), dz(combine.size());
  workspace ws;
  plan_soft_backward(rows(dispatch, slots), rows(combine, tokens), rows(ddispatch, slots),
                     rows(dcombine, tokens), gradient_to::write, rows(dz, tokens), ws);
  const auto dot = [](const matrix_view<double>& x, const matrix_view<double>& y, index_t r) {
    return simd::row_dot<simd::default_arch>(x.row(r), y.row(r), x.cols);
  };
  const auto d = rows(dispatch, slots), c = rows(combine, tokens), dd = rows(ddispatch, slots),
             dc = rows(dcombine, tokens), z = rows(dz, tokens);
  for (index_t t = 0; t < tokens; ++t)
    for (index_t s = 0; s < slots; ++s) {
      volatile double of_dispatch = d(s, t) * (dd(s, t) - dot(d, dd, s));  // rounded by itself
      REQUIRE(z(t, s) == std::fma(c(t, s), dc(t, s) - dot(c, dc, t), of_dispatch));
    }
}

TEST_CASE("a soft layer's gradients are autograd's, stage by stage") {
  const test::gradient_file file("layer_soft_moe_T6_E16_k4");
  const index_t tokens = file.tokens, slots = file.experts, d = file.json["d"];
  doubles x = file.numbers("X"), mu = file.numbers("gate_weight"), dy = file.numbers("upstream");
  const doubles a = file.numbers("expert_weight");
  doubles dispatch = turned(file.numbers("dispatch"), tokens), combine = file.numbers("combine");
  const auto size = static_cast<std::size_t>(slots * d);
  doubles in(size), out(size), dout(size), din(size), da(a.size());
  for (index_t s = 0; s < slots; ++s) {
    for (index_t t = 0; t < tokens; ++t)
      for (index_t j = 0; j < d; ++j)
        rows(in, slots)(s, j) += rows(dispatch, slots)(s, t) * rows(x, tokens)(t, j);
    for (index_t i = 0; i < d; ++i)
      for (index_t j = 0; j < d; ++j)
        rows(out, slots)(s, i) +=
            a[static_cast<std::size_t>((s * d + i) * d + j)] * rows(in, slots)(s, j);
  }
  doubles ddispatch(dispatch.size()), dcombine(combine.size()), dz(combine.size()),
      dx(x.size(), 7.0), added(x.size(), 1.0), dmu(mu.size());
  workspace ws;
  mix_backward(rows(combine, tokens), rows(out, slots), rows(dy, tokens), rows(dcombine, tokens),
               gradient_to::write, rows(dout, slots));
  for (index_t s = 0; s < slots; ++s)
    for (index_t i = 0; i < d; ++i)
      for (index_t j = 0; j < d; ++j) {
        const auto at = static_cast<std::size_t>((s * d + i) * d + j);
        rows(din, slots)(s, j) += rows(dout, slots)(s, i) * a[at];
        da[at] += rows(dout, slots)(s, i) * rows(in, slots)(s, j);
      }
  mix_backward(rows(dispatch, slots), rows(x, tokens), rows(din, slots), rows(ddispatch, slots),
               gradient_to::write, rows(dx, tokens));
  mix_backward(rows(dispatch, slots), rows(x, tokens), rows(din, slots), rows(ddispatch, slots),
               gradient_to::add, rows(added, tokens));
  for (double& v : added) v -= 1.0;
  CHECK(test::difference(added, dx, 1e-12, 1e-12) == "");
  plan_soft_backward(rows(dispatch, slots), rows(combine, tokens), rows(ddispatch, slots),
                     rows(dcombine, tokens), gradient_to::write, rows(dz, tokens), ws);
  gate_backward(rows(x, tokens), rows(mu, slots), rows(dz, tokens),
                gate_gradients<double>{gradient_to::add, rows(dx, tokens), rows(dmu, slots)});
  CHECK(test::difference(dx, file.numbers("grad_X"), 1e-9, 1e-12) == "");
  CHECK(test::difference(dmu, file.numbers("grad_gate_weight"), 1e-9, 1e-12) == "");
  CHECK(test::difference(da, file.numbers("grad_expert_weight"), 1e-9, 1e-12) == "");
}

TEST_CASE("gradients of a soft plan that do not fit are refused by name") {
  doubles a(12), b(12), c(12), e(12), dz(12);
  workspace ws;
  const auto refused = [&](matrix_view<double> out, matrix_view<double> ddispatch) {
    return test::refusal([&] {
      plan_soft_backward(rows(a, 4), rows(b, 3), ddispatch, rows(e, 3), gradient_to::write, out,
                         ws);
    });
  };
  CHECK(refused(rows(dz, 4), rows(c, 4)) ==
        "moeroute::plan_soft_backward: dlogits.rows() is 4, expected 3");
  CHECK(refused(rows(dz, 3), rows(c, 3)) ==
        "moeroute::plan_soft_backward: ddispatch.rows() is 3, expected 4");
  CHECK(refused(rows(b, 3), rows(c, 4)) ==
        "moeroute::plan_soft_backward: dlogits and combine overlap, expected memory of their own");
  CHECK(refused(rows(a, 3), rows(c, 4)) ==
        "moeroute::plan_soft_backward: dlogits and dispatch overlap, expected memory of their own");
  // Which of the views has rows that run into one another; 5: none.
  const auto narrow = [&](std::size_t wrong) {
    const auto at = [&](std::size_t i, doubles& x, index_t n) {
      matrix_view<double> v = rows(x, n);
      if (i == wrong) v.stride = v.cols - 1;
      return v;
    };
    return test::refusal([&] {
      plan_soft_backward(at(0, a, 4), at(1, b, 3), at(2, c, 4), at(3, e, 3), gradient_to::write,
                         at(4, dz, 3), ws);
    });
  };
  const index_t cols_of[] = {3, 4, 3, 4, 4};
  const char* const names[] = {"dispatch", "combine", "ddispatch", "dcombine", "dlogits"};
  for (std::size_t wrong = 0; wrong < 5; ++wrong)
    CHECK(narrow(wrong) == "moeroute::plan_soft_backward: " + std::string(names[wrong]) +
                               ".stride is " + std::to_string(cols_of[wrong] - 1) +
                               ", expected at least " + std::to_string(cols_of[wrong]));
  CHECK(narrow(5) == "accepted");
  const std::vector<float> logits(12);
  matrix_view<const float> close(logits.data(), 3, 4);
  close.stride = 3;
  soft_plan soft;
  CHECK(test::refusal([&] { plan_soft(close, 1, soft); }) ==
        "moeroute::plan_soft: logits.stride is 3, expected at least 4");
}

TEST_CASE("gradients of a mixture that do not fit, or share memory, are refused by name") {
  std::vector<doubles> own(5, doubles(64));
  // Which of the views has rows that run into one another; 5: none.
  const auto mixed = [&](std::size_t wrong, std::size_t drows = 4, std::size_t dweight = 3) {
    const auto at = [&](std::size_t i, std::size_t memory, index_t n, index_t cols) {
      matrix_view<double> v(own[memory].data(), n, cols);
      if (i == wrong) v.stride = cols - 1;
      return v;
    };
    return test::refusal([&] {
      mix_backward(at(0, 0, 3, 4), at(1, 1, 4, 5), at(2, 2, 3, 5), at(3, dweight, 3, 4),
                   gradient_to::write, at(4, drows, 4, 5));
    });
  };
  const index_t cols_of[] = {4, 5, 5, 4, 5};
  const char* const names[] = {"weight", "rows", "dout", "dweight", "drows"};
  for (std::size_t wrong = 0; wrong < 5; ++wrong)
    CHECK(mixed(wrong) == "moeroute::mix_backward: " + std::string(names[wrong]) + ".stride is " +
                              std::to_string(cols_of[wrong] - 1) + ", expected at least " +
                              std::to_string(cols_of[wrong]));
  CHECK(mixed(5) == "accepted");
  const auto sized = [&](std::size_t wrong) {
    const auto rows = [&](std::size_t i, std::size_t memory, index_t n, index_t cols) {
      return matrix_view<double>(own[memory].data(), n + (wrong == 2 * i),
                                 cols + (wrong == 2 * i + 1));
    };
    return test::refusal([&] {
      mix_backward(rows(0, 0, 3, 4), matrix_view<double>(own[1].data(), 4, 5), rows(1, 2, 3, 5),
                   rows(2, 3, 3, 4), gradient_to::write, rows(3, 4, 4, 5));
    });
  };
  const char* const of_sizes[] = {"",
                                  "weight.cols() is 5, expected 4",
                                  "dout.rows() is 4, expected 3",
                                  "dout.cols() is 6, expected 5",
                                  "dweight.rows() is 4, expected 3",
                                  "dweight.cols() is 5, expected 4",
                                  "drows.rows() is 5, expected 4",
                                  "drows.cols() is 6, expected 5"};
  for (std::size_t wrong = 1; wrong < 8; ++wrong)
    CHECK(sized(wrong) == "moeroute::mix_backward: " + std::string(of_sizes[wrong]));
  const std::string apart = " overlap, expected memory of their own";
  CHECK(mixed(5, 0) == "moeroute::mix_backward: weight and drows" + apart);
  CHECK(mixed(5, 2) == "moeroute::mix_backward: dout and drows" + apart);
  CHECK(mixed(5, 4, 1) == "moeroute::mix_backward: rows and dweight" + apart);
  CHECK(mixed(5, 4, 2) == "moeroute::mix_backward: dout and dweight" + apart);
  const auto unit = [&](std::size_t wrong, std::size_t into = 2) {
    const auto at = [&](std::size_t i, std::size_t memory) {
      matrix_view<double> v(own[memory].data(), 4, 5);
      if (i == wrong) v.stride = 4;
      return v;
    };
    return test::refusal(
        [&] { unit_rows_backward(at(0, 0), at(1, 1), gradient_to::write, at(2, into)); });
  };
  const char* const of_unit[] = {"v", "du", "dv"};
  for (std::size_t wrong = 0; wrong < 3; ++wrong)
    CHECK(unit(wrong) == "moeroute::unit_rows_backward: " + std::string(of_unit[wrong]) +
                             ".stride is 4, expected at least 5");
  CHECK(unit(3) == "accepted");
  CHECK(unit(3, 1) == "accepted");
}

TEST_CASE("every size of a soft plan's gradients has its name; what is nowhere is left alone") {
  // [S, T] = [4, 3]: dispatch, combine, ddispatch, dcombine, dlogits, in memory of their own.
  std::vector<doubles> own(5, doubles(20, 0.5));
  workspace ws;
  const auto planned = [&](std::size_t wrong, index_t more_rows, index_t more_cols,
                           gradient_to to = gradient_to::write, std::size_t into = 4) {
    const auto at = [&](std::size_t i, std::size_t memory, index_t n, index_t cols) {
      return matrix_view<double>(own[memory].data(), n + (i == wrong ? more_rows : 0),
                                 cols + (i == wrong ? more_cols : 0));
    };
    return test::refusal([&] {
      plan_soft_backward(at(0, 0, 4, 3), at(1, 1, 3, 4), at(2, 2, 4, 3), at(3, 3, 3, 4), to,
                         at(4, into, 3, 4), ws);
    });
  };
  const std::string where = "moeroute::plan_soft_backward: ";
  const char* const names[] = {"dispatch", "combine", "ddispatch", "dcombine", "dlogits"};
  for (const std::size_t i : {0u, 2u, 3u, 4u}) {
    const bool turned_one = i == 0 || i == 2;
    CHECK(planned(i, 1, 0) ==
          where + names[i] + ".rows() is " + (turned_one ? "5, expected 4" : "4, expected 3"));
    CHECK(planned(i, 0, 1) ==
          where + names[i] + ".cols() is " + (turned_one ? "4, expected 3" : "5, expected 4"));
    if (i < 4)
      CHECK(planned(5, 0, 0, gradient_to::write, i) ==
            where + "dlogits and " + names[i] + " overlap, expected memory of their own");
  }
  CHECK(planned(0, 1, 0, gradient_to::nowhere) == "accepted");
  CHECK(own[4] == doubles(20, 0.5));
  // A product's gradients, both, one or none of them.
  doubles weight(6), from(8), dout(12);
  for (std::size_t i = 0; i < 12; ++i) {
    const auto v = static_cast<double>(i);
    dout[i] = v - 5.0;
    if (i < 6) weight[i] = 2.0 - v;
    if (i < 8) from[i] = v * v;
  }
  const auto mixed = [&](bool of_weight, bool of_rows, gradient_to to) {
    doubles dweight(6, 7.0), drows(8, 7.0);
    mix_backward(rows(weight, 3), rows(from, 2), matrix_view<const double>(dout.data(), 3, 4),
                 of_weight ? rows(dweight, 3) : matrix_view<double>{}, to,
                 of_rows ? rows(drows, 2) : matrix_view<double>{});
    dweight.insert(dweight.end(), drows.begin(), drows.end());
    return dweight;
  };
  doubles expected(14, 0.0);
  for (std::size_t r = 0; r < 3; ++r)
    for (std::size_t i = 0; i < 2; ++i)
      for (std::size_t c = 0; c < 4; ++c) {
        expected[r * 2 + i] += dout[r * 4 + c] * from[i * 4 + c];
        expected[6 + i * 4 + c] += weight[r * 2 + i] * dout[r * 4 + c];
      }
  const doubles all = mixed(true, true, gradient_to::write);
  CHECK(all == expected);
  for (const bool of_weight : {false, true})
    for (const bool of_rows : {false, true}) {
      doubles one = all;
      if (!of_weight) std::fill_n(one.begin(), 6, 7.0);
      if (!of_rows) std::fill_n(one.begin() + 6, 8, 7.0);
      CHECK(mixed(of_weight, of_rows, gradient_to::write) == one);
      std::fill_n(one.begin() + 6, 8, 7.0);
      CHECK(mixed(of_weight, of_rows, gradient_to::nowhere) == one);
    }
}
