#include <moeroute/stage/gate.hpp>

#include <catch2/catch_test_macros.hpp>
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
        "moeroute::gemm: x.cols() is 7, expected 8");
}
