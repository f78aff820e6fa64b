#include <moeroute/stage/soft_backward.hpp>
//
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <moeroute/stage/gate_backward.hpp>
#include <string>
#include <vector>

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
    workspace ws;
    plan_soft_backward(rows(dispatch, slots), rows(combine, tokens), rows(ddispatch, slots),
                       rows(dcombine, tokens), gradient_to::write, rows(dz, tokens), ws);
    CHECK(test::difference(dz, file.numbers("grad_logits"), 1e-9, 1e-13) == "");
    plan_soft_backward(rows(dispatch, slots), rows(combine, tokens), rows(ddispatch, slots),
                       rows(dcombine, tokens), gradient_to::add, rows(other, tokens), ws,
                       test::backwards{});
    for (double& g : other) g -= 1.0;
    CHECK(test::difference(other, dz, 0.0, 1e-13) == "");
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
  doubles ddispatch(dispatch.size()), dcombine(combine.size()), dz(combine.size()), dx(x.size()),
      dmu(mu.size());
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
}
