#include <moeroute/stage/gate.hpp>

#include <catch2/catch_test_macros.hpp>
#include <moeroute/matrix/eigen.hpp>
#include <span>
#include <vector>

#include "oracle/layer.hpp"
#include "support/compare.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

using namespace moeroute;

TEST_CASE("logits are x W^T + b, also of 16-bit hidden states") {
  test::random rng(1);
  const index_t tokens = 19, d = 40, experts = 11;
  std::vector<bfloat16> x;
  std::vector<float> w, b;
  for (index_t i = 0; i < tokens * d; ++i) x.push_back(static_cast<bfloat16>(rng.normal()));
  for (index_t i = 0; i < experts * d; ++i) w.push_back(rng.normal());
  for (index_t e = 0; e < experts; ++e) b.push_back(rng.normal());
  simd::packed_matrix<> packed(matrix_view<const float>(w.data(), experts, d));
  for (index_t e = 0; e < experts; ++e) packed.bias(e) = b[static_cast<std::size_t>(e)];
  row_matrix<float> logits(tokens, experts);
  gate(matrix_view<const bfloat16>(x.data(), tokens, d), packed, logits);
  const oracle::matrix expected =
      oracle::linear(oracle::matrix(tokens, d, x.data()), oracle::matrix(experts, d, w.data()),
                     {b.begin(), b.end()});
  const std::span got(logits.data(), static_cast<std::size_t>(logits.size()));
  CHECK(test::difference(got, expected.value, 1e-5, 1e-5) == "");
}

TEST_CASE("a gate of another width is refused") {
  const simd::packed_matrix<> packed(4, 8);
  const row_matrix<float> x(3, 7);
  row_matrix<float> logits(3, 4);
  CHECK(test::refusal([&] { gate(x, packed, logits); }) ==
        "moeroute::gate: x.cols() is 7, expected 8");
  row_matrix<float> turned(4, 3);
  const row_matrix<float> fits(3, 8);
  CHECK(test::refusal([&] { gate(fits, packed, turned); }) ==
        "moeroute::gate: logits.rows() is 4, expected 3");
  CHECK(test::refusal([&] { cosine_gate(x, packed, 1.0f, logits); }) ==
        "moeroute::cosine_gate: x.cols() is 7, expected 8");
}

TEST_CASE("a cosine gate sees directions only: |logit| <= scale, whatever the lengths") {
  row_matrix<float> x = row_matrix<float>::Random(9, 40), w = row_matrix<float>::Random(6, 40);
  row_matrix<float> unit = w, logits(9, 6), longer_logits(9, 6);
  unit_rows(unit);
  cosine_gate(x, simd::packed_matrix<>(view(unit)), 10.0f, logits);
  for (index_t t = 0; t < 9; ++t)
    for (index_t e = 0; e < 6; ++e) {
      const double cosine = x.row(t).cast<double>().dot(w.row(e).cast<double>()) /
                            (x.row(t).cast<double>().norm() * w.row(e).cast<double>().norm());
      CHECK(std::abs(double{logits(t, e)} - 10.0 * cosine) < 1e-5);
    }
  row_matrix<float> longer = 4.0f * x;
  cosine_gate(longer, simd::packed_matrix<>(view(unit)), 10.0f, longer_logits);
  CHECK((longer_logits - logits).cwiseAbs().maxCoeff() < 1e-5f);
  longer.setZero();
  cosine_gate(longer, simd::packed_matrix<>(view(unit)), 10.0f, logits);
  CHECK(logits.isZero());
}
